"""Checking a premasked set or a cache from its manifest alone: hashes, schema and every bound.

Nothing is trusted: each shard's size and sha256, its schema, the header it carries, its row count,
each row by `check_row`, each payload by its decoder, that all views hold the same samples in the
same order and no sample twice. Problems are collected, not raised, so that one report names them
all; at most `_MAX_PROBLEMS_PER_SHARD` of a shard.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from tide_cache.canonical import fingerprint
from tide_cache.errors import FormatError, TideError
from tide_cache.manifest import CacheHeader, CacheManifest, Header, Manifest, ShardFacts, identity
from tide_cache.payloads import (
    Codecs,
    check_codec_files,
    check_payloads,
    num_entries,
    open_codecs,
    payload_fields,
)
from tide_cache.rows import PremaskedRow, check_row, row_fields, table_to_rows
from tide_cache.shards import open_shard, read_row_groups, read_stamp
from tide_cache.store import Store
from tide_cache.writer import read_manifest

_MAX_PROBLEMS_PER_SHARD = 10
Progress = Callable[[str], None]


@dataclass(kw_only=True, slots=True)
class Report:
    """What `verify_set` found. `ok` when there are no problems."""

    url: str
    identity: str
    kind: str
    num_shards: int = 0
    num_rows: int = 0
    num_payload_entries: int = 0
    size_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "ok": self.ok}


def set_schema(header: Header) -> pa.Schema:
    """Return the Arrow schema of the shards that `header` describes."""
    fields = row_fields(header.alignment)
    if isinstance(header, CacheHeader):
        fields = fields + payload_fields(header)
    return pa.schema(fields)


def verify_set(store: Store, *, on_shard: Progress | None = None) -> Report:
    """Check everything that the manifest and the format promise.

    Raises StorageError or FormatError only when there is no readable manifest.
    """
    manifest = read_manifest(store)
    report = Report(url=store.url, identity=identity(manifest), kind=manifest.kind)
    _check_files(store, manifest, report)
    codecs = _open_codecs(store, manifest, report)
    samples_by_task: dict[int, list[str]] = {}
    for shard in manifest.shards:
        if on_shard is not None:
            on_shard(shard.path)
        try:
            samples = _check_shard(store, manifest, shard, codecs, report)
        except TideError as error:
            report.problems.append(f"shard {shard.path}: {error.message}")
            continue
        first_view = samples_by_task.setdefault(shard.task, samples)
        if first_view != samples:
            report.problems.append(f"shard {shard.path}: not the samples of the other views")
        report.num_shards += 1
    _check_totals(manifest, samples_by_task, report)
    return report


def _check_files(store: Store, manifest: Manifest, report: Report) -> None:
    listed = {facts.path for facts in manifest.files} | {s.path for s in manifest.shards}
    for facts in manifest.files:
        try:
            _check_hash(store, facts.path, facts.size_bytes, facts.sha256)
        except TideError as error:
            report.problems.append(f"file {facts.path}: {error.message}")
    # A loader that globs data/ would read these, so they count.
    for path in store.list_files("data") + store.list_files("codec"):
        if path not in listed:
            report.problems.append(f"file {path}: not in the manifest")


def _check_hash(store: Store, path: str, size_bytes: int, sha256: str) -> None:
    present = store.size_bytes(path)
    if present != size_bytes:
        raise FormatError(f"size: expected {size_bytes} bytes, got {present}")
    found = store.sha256(path)
    if found != sha256:
        raise FormatError(f"sha256 mismatch (expected {sha256[:12]}…, got {found[:12]}…)")


def _open_codecs(store: Store, manifest: Manifest, report: Report) -> Codecs | None:
    """Return the codecs of a cache; where its codec files are no good, say so and return None."""
    if not isinstance(manifest, CacheManifest):
        return None
    try:
        check_codec_files(store, manifest)
        return open_codecs(store, manifest)
    except TideError as error:
        report.problems.append(error.message)
        return None


def _check_shard(
    store: Store, manifest: Manifest, shard: ShardFacts, codecs: Codecs | None, report: Report
) -> list[str]:
    """Check one shard; returns its sample ids. Row problems go to the report, others are raised."""
    _check_hash(store, shard.path, shard.size_bytes, shard.sha256)
    problems: list[str] = []
    samples: list[str] = []
    with open_shard(store, shard.path) as file:
        stamp = read_stamp(file, where=shard.path)
        _check_stamp(stamp, manifest, shard)
        expected = set_schema(manifest)
        if not file.schema_arrow.equals(expected, check_metadata=False):
            raise FormatError(f"schema: expected {expected.names}, got {file.schema_arrow.names}")
        if file.metadata.num_rows != shard.num_rows:
            raise FormatError(f"expected {shard.num_rows} rows, got {file.metadata.num_rows}")
        for group in range(file.num_row_groups):
            table = read_row_groups(store, shard.path, file, [group])
            samples += table["sample_id"].to_pylist()
            for problem in check_rows(table, manifest, shard.view, codecs, report):
                problems.append(f"shard {shard.path}: {problem}")
                if len(problems) >= _MAX_PROBLEMS_PER_SHARD:
                    break
    report.problems += problems[:_MAX_PROBLEMS_PER_SHARD]
    report.num_rows += shard.num_rows
    report.size_bytes += shard.size_bytes
    return samples


def _check_stamp(stamp: dict[str, Any], manifest: Manifest, shard: ShardFacts) -> None:
    if (stamp["task"], stamp["view"]) != (shard.task, shard.view):
        raise FormatError(
            f"holds task {stamp['task']} view {stamp['view']}: shards were exchanged or renamed"
        )
    header = manifest.model_dump(mode="json")
    theirs = stamp["header"]
    differing = [k for k in sorted(theirs) if theirs[k] != header.get(k)]
    # A shard that a merged set or a part has as it was carries the header it was made with.
    is_taken_over = fingerprint(theirs) in {origin.header_sha256 for origin in manifest.origins}
    if differing and not is_taken_over:
        raise FormatError(f"belongs to another set (differing: {', '.join(differing)})")


def check_rows(
    table: pa.Table,
    manifest: Manifest,
    view: int,
    codecs: Codecs | None = None,
    report: Report | None = None,
) -> Iterator[str]:
    """Yield a line for every row that breaks a bound or whose payload does not decode."""
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
        except TideError as error:
            yield error.message
    if codecs is None:
        return
    if len(sound) < len(rows):
        table = table.take(sound)
    yield from check_payloads(table, codecs, np.asarray(num_entries_B, dtype=np.int64))
    if report is not None:
        report.num_payload_entries += sum(num_entries_B)


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


def _check_totals(
    manifest: Manifest, samples_by_task: dict[int, list[str]], report: Report
) -> None:
    samples = [sample for task in samples_by_task.values() for sample in task]
    if len(samples) != len(set(samples)):
        report.problems.append(f"{len(samples) - len(set(samples))} samples occur twice")
    expected = manifest.counts.get("num_rows")
    if report.ok and expected != report.num_rows:
        report.problems.append(f"counts.num_rows: expected {report.num_rows}, got {expected}")
