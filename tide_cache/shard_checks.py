"""Checking one shard: size and sha256, and what is in it, every row and every payload.

Nothing is trusted: the schema, the header it carries, its row count, each row by `check_row`, each
payload by its decoder. Problems are collected, at most `_MAX_PROBLEMS_PER_SHARD` of a shard, and
come back as values, so that shards can be checked in processes of their own. A remote shard is
fetched once into a temporary file, hashed on the way, and read from there: what was hashed is what
is checked.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, cast

import numpy as np
import pyarrow as pa

from tide_cache.errors import FormatError, TideError
from tide_cache.fetch import Listed
from tide_cache.manifest import Header, Manifest, ShardFacts
from tide_cache.payloads import Codecs, check_payloads, num_entries
from tide_cache.rows import PremaskedRow, check_row, table_to_rows
from tide_cache.set_schema import set_schema
from tide_cache.shards import (
    ROWS_PER_GROUP,
    group_sizes,
    open_parquet,
    read_row_groups,
)
from tide_cache.stamps import check_stamp, read_stamp
from tide_cache.store import Store

Level = Literal["manifest", "files", "deep"]
SAMPLE_BYTES = 16
_MAX_PROBLEMS_PER_SHARD = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardResult:
    """What was found in one shard.

    `samples`: of each row `SAMPLE_BYTES` bytes that stand for its sample id, in order; None where
    the rows were not read. `counts` counts rows, positions and payload entries, by the manifest's
    names. `is_readable`: whether the shard is at all the file that the manifest lists.
    """

    problems: tuple[str, ...]
    samples: bytes | None
    counts: dict[str, int] = field(default_factory=dict)
    is_readable: bool = True

    @property
    def is_good(self) -> bool:
        """Whether nothing was found."""
        return not self.problems


def check_shard(
    store: Store, manifest: Manifest, shard: ShardFacts, codecs: Codecs | None, level: Level
) -> ShardResult:
    """Check one shard on level `files` or `deep`. Never raises for what is in the shard."""
    try:
        with checked_file(store, shard) as file:
            if level != "deep":
                return ShardResult(problems=(), samples=None)
            return _check_content(store, file, manifest, shard, codecs)
    except TideError as error:
        problem = f"shard {shard.path}: {error.message}"
        return ShardResult(problems=(problem,), samples=None, is_readable=False)


@contextmanager
def checked_file(store: Store, facts: Listed) -> Iterator[BinaryIO]:
    """Open a listed file whose size and sha256 are as listed. Raises FormatError if they are not.

    Of a remote file no more than one byte beyond the listed size is read.
    """
    present = store.size_bytes(facts.path)
    if present != facts.size_bytes:
        raise FormatError(f"size: expected {facts.size_bytes} bytes, got {present}")
    if store.is_local:
        _require_hash(store.sha256(facts.path), facts)
        with store.open(facts.path) as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:
        digest = hashlib.sha256()
        for block in store.blocks(facts.path, facts.size_bytes):
            digest.update(block)
            copy.write(block)
        _require_hash(digest.hexdigest(), facts)
        copy.seek(0)
        yield cast(BinaryIO, copy)


def _require_hash(found: str, facts: Listed) -> None:
    if found != facts.sha256:
        raise FormatError(f"sha256 mismatch (expected {facts.sha256[:12]}…, got {found[:12]}…)")


def _check_content(
    store: Store,
    file: BinaryIO,
    manifest: Manifest,
    shard: ShardFacts,
    codecs: Codecs | None,
) -> ShardResult:
    parquet = open_parquet(file, f"{store.url}/{shard.path}", url=store.url)
    check_stamp(read_stamp(parquet, where=shard.path), manifest, shard)
    expected = set_schema(manifest)
    if not parquet.schema_found.equals(expected, check_metadata=False):
        raise FormatError(f"schema: expected {expected.names}, got {parquet.schema_found.names}")
    if parquet.metadata.num_rows != shard.num_rows:
        raise FormatError(f"expected {shard.num_rows} rows, got {parquet.metadata.num_rows}")
    if parquet.group_sizes != group_sizes(shard.num_rows):
        found = parquet.group_sizes[:4]
        raise FormatError(f"expected row groups of {ROWS_PER_GROUP} rows, got {found}")
    problems: list[str] = []
    samples: list[bytes] = []
    counts: Counter[str] = Counter()
    for group in range(parquet.num_row_groups):
        table = read_row_groups(store, shard.path, parquet, [group])
        samples += [_digest(sample) for sample in table["sample_id"].to_pylist()]
        if len(problems) < _MAX_PROBLEMS_PER_SHARD:
            problems += check_rows(table, manifest, shard.view, codecs, counts)
    return ShardResult(
        problems=tuple(f"shard {shard.path}: {p}" for p in problems[:_MAX_PROBLEMS_PER_SHARD]),
        samples=b"".join(samples),
        counts=dict(counts),
    )


def check_rows(
    table: pa.Table, manifest: Manifest, view: int, codecs: Codecs | None, counts: Counter[str]
) -> Iterator[str]:
    """Yield a line for every row that breaks a bound or whose payload does not decode.

    `counts` is added to by the names of a manifest's counts.
    """
    try:
        rows = table_to_rows(table, manifest.alignment)
    except TideError as error:
        yield error.message
        return
    sound, num_entries_B = [], []
    for index, row in enumerate(rows):
        try:
            check_row_of(row, manifest, view)
            num_entries_B.append(num_entries(row, manifest.alignment))
            sound.append(index)
            _count(row, counts)
        except TideError as error:
            yield error.message
    entries = "num_payload_positions" if manifest.alignment == "positions" else "num_active_chunks"
    counts[entries] += sum(num_entries_B)
    if codecs is None:
        return
    if len(sound) < len(rows):
        table = table.take(sound)
    yield from check_payloads(table, codecs, np.asarray(num_entries_B, dtype=np.int64))


def check_row_of(row: PremaskedRow, header: Header, view: int) -> None:
    """Raise DataError or FormatError unless `row` is a sound row of that view of the set."""
    if row.view != view:
        raise FormatError(f"sample {row.sample_id}: view: expected {view}, got {row.view}")
    check_row(
        row,
        alignment=header.alignment,
        student_vocab_size=header.student.vocab_size,
        teacher_vocab_size=header.teacher.vocab_size,
        num_views=header.num_views,
    )


def _count(row: PremaskedRow, counts: Counter[str]) -> None:
    num_masked = int(row.student_mask_L.sum())
    counts["num_rows"] += 1
    counts["num_positions"] += len(row.student_ids_L)
    counts["num_labelled_positions"] += len(row.student_ids_L) - row.prompt_length
    counts["num_masked_positions"] += num_masked
    counts["num_rows_without_mask"] += num_masked == 0


def _digest(sample: str) -> bytes:
    return hashlib.blake2b(sample.encode(), digest_size=SAMPLE_BYTES).digest()
