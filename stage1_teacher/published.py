"""Published, already tokenised data sets as input: opened, planned and made into rows.

Two layouts are known by their columns: that of `distill_llada2_sft` (two tokenizers, `ranges`) and
that of `distill_wedlm_sft` (one tokenizer, `align_student` and `align_teacher`). Both are folders
of `save_to_disk`, but any form that a source may have will do. A row is its ids: they are its
identity, so that a second copy is left out as a duplicate and masks do not depend on where the row
stands. The one pass over all ids reads 40,000 rows of 2 x 150 tokens a second.

Shapes: R rows of the data set.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stage1_teacher.encode import Encoder
from stage1_teacher.mixture import source_labels
from stage1_teacher.prepare_config import PrepareConfig
from stage1_teacher.prepare_plan import no_rows_left
from stage1_teacher.published_encode import PublishedEncoder, PublishedRow
from stage1_teacher.source_errors import empty_source
from stage1_teacher.source_formats import open_dataset
from stage1_teacher.task_rows import RowMaker, SampleCollector, TaskRows
from stage1_teacher.token_bytes import Int64Array
from tide_cache.errors import ConfigError, DataError, did_you_mean
from tide_cache.manifest import SourceFacts
from tide_cache.rows import AlignmentKind

logger = logging.getLogger(__name__)

_BATCH_ROWS = 256
_BOTH_LAYOUTS = ("input_ids", "labels", "teacher_input_ids", "prompt_len")
_LAYOUTS: Mapping[AlignmentKind, tuple[str, ...]] = {
    "chunks": (*_BOTH_LAYOUTS, "teacher_labels", "ranges"),
    "positions": (*_BOTH_LAYOUTS, "align_student", "align_teacher"),
}
_DEPTHS = {"prompt_len": 0, "ranges": 2}  # of lists; every other column is a list of integers
_SHAPES = ("integers", "lists of integers", "lists of lists of integers")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PublishedRows:
    """The rows to make: row r is row `row_index_R[r]` of `dataset`, which holds their columns only.

    `facts` and `dropped` say what was taken and what was dropped before encoding.
    """

    dataset: datasets.Dataset
    row_index_R: npt.NDArray[np.int64]
    facts: tuple[SourceFacts, ...]
    dropped: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.row_index_R)

    def row_maker(self, config: PrepareConfig, encoder: Encoder) -> RowMaker:
        """Return the function that checks, encodes and masks a range of these rows."""
        return _PublishedReader(self, config, encoder).make


def plan_published(config: PrepareConfig) -> PublishedRows:
    """Open the published data set of a config and read its ids once.

    Raises DataError for data that is missing, empty or broken, for a missing column or one of
    another type, and when no row is left; ConfigError when its layout is not that of the alignment.
    """
    assert config.published is not None
    source = config.published.as_source()
    opened = open_dataset(source)
    if not len(opened.dataset):
        raise empty_source(source.path)
    _check_layout(source.path, opened.dataset.features.arrow_schema, config.alignment)
    columns = list(_LAYOUTS[config.alignment])
    dataset = opened.dataset.select_columns(columns).with_format("arrow")
    sample_id_R = _scan(dataset)
    usable_R = np.flatnonzero(sample_id_R != b"")
    first = np.unique(sample_id_R[usable_R], return_index=True)[1]
    rows_R = usable_R[np.sort(first)]
    taken_R = rows_R[: config.max_samples]
    dropped = Counter(
        row_incomplete=len(dataset) - len(usable_R),
        duplicate=len(usable_R) - len(rows_R),
        over_max_samples=len(rows_R) - len(taken_R),
    )
    if not len(taken_R):
        raise no_rows_left(source.path, +dropped)
    facts = SourceFacts(
        name=source_labels([source])[0],
        fingerprint=hashlib.sha256(sample_id_R.tobytes()).hexdigest(),
        licence=source.license or opened.license,
        num_rows=len(dataset),
        num_rows_taken=len(taken_R),
    )
    logger.info("%s: published rows for alignment %s, %s", source.path, config.alignment, facts)
    return PublishedRows(
        dataset=dataset, row_index_R=taken_R, facts=(facts,), dropped=dict(+dropped)
    )


def published_id(ids_L: Int64Array, teacher_ids_L: Int64Array) -> str:
    """Return the identity of a row: blake2b-16 of both sides' ids, 32 hex digits.

    Each side is its length and its ids as little-endian int64, so neither the integer type nor the
    file that held them matters.
    """
    digest = hashlib.blake2b(digest_size=16)
    for side_L in (ids_L, teacher_ids_L):
        digest.update(len(side_L).to_bytes(8, "little"))
        digest.update(side_L.astype("<i8").tobytes())
    return digest.hexdigest()


class _PublishedReader:
    """Reads, encodes and masks ranges of the plan; one per worker."""

    def __init__(self, rows: PublishedRows, config: PrepareConfig, encoder: Encoder) -> None:
        self._rows = rows
        self._config = config
        self._encoder = PublishedEncoder(encoder)
        self._source = rows.facts[0].name

    def make(self, rows: range) -> TaskRows:
        """Return the rows of a range of the plan; what cannot be used is counted."""
        collector = SampleCollector(self._config)
        for row in self._read(self._rows.row_index_R[rows.start : rows.stop]):
            assert row.ids_L is not None  # the plan holds rows with ids only
            assert row.teacher_ids_L is not None
            identity = published_id(row.ids_L, row.teacher_ids_L)
            collector.add(
                lambda r=row, i=identity: self._encoder.encode(  # type: ignore[misc]
                    r, sample_id=i, source=self._source
                ),
                sample_id=identity,
                source=self._source,
            )
        return collector.collected()

    def _read(self, row_index_R: npt.NDArray[np.int64]) -> Iterator[PublishedRow]:
        for start in range(0, len(row_index_R), _BATCH_ROWS):
            table = self._rows.dataset[row_index_R[start : start + _BATCH_ROWS]]
            yield from _rows_of(table, self._config.alignment)


def _rows_of(table: pa.Table, alignment: AlignmentKind) -> Iterator[PublishedRow]:
    names = {"ids_L": "input_ids", "labels_L": "labels", "teacher_ids_L": "teacher_input_ids"}
    if alignment == "chunks":
        names |= {"teacher_labels_L": "teacher_labels"}
    else:
        names |= {"align_student_N": "align_student", "align_teacher_N": "align_teacher"}
    lists = {field: _int_lists(table[name]) for field, name in names.items()}
    prompt_lengths = table["prompt_len"].to_pylist()
    ranges = table["ranges"].to_pylist() if alignment == "chunks" else [None] * table.num_rows
    for index in range(table.num_rows):
        yield PublishedRow(
            **{field: values[index] for field, values in lists.items()},
            prompt_length=prompt_lengths[index],
            ranges=ranges[index],
        )


def _scan(dataset: datasets.Dataset) -> npt.NDArray[np.bytes_]:
    """Return the identity of every row, `S32` (R,); empty where a side has no ids."""
    sides = dataset.select_columns(["input_ids", "teacher_input_ids"])
    sample_id_R = np.zeros(len(sides), dtype="S32")
    for start in range(0, len(sides), _BATCH_ROWS):
        table = sides[start : start + _BATCH_ROWS]
        pairs = zip(*(_int_lists(table[name]) for name in table.column_names), strict=True)
        for index, (ids_L, teacher_ids_L) in enumerate(pairs, start=start):
            if ids_L is None or teacher_ids_L is None or not (len(ids_L) and len(teacher_ids_L)):
                continue
            sample_id_R[index] = published_id(ids_L, teacher_ids_L).encode()
    return sample_id_R


def _int_lists(column: pa.ChunkedArray) -> list[Int64Array | None]:
    """Return the lists of a column; None for a list that is null or holds a null."""
    lists: list[Int64Array | None] = []
    for chunk in column.cast(pa.large_list(pa.int64())).chunks:
        for scalar in chunk:
            values = scalar.values
            is_whole = values is not None and not values.null_count
            lists.append(values.to_numpy() if is_whole else None)
    return lists


def _check_layout(path: str, schema: pa.Schema, alignment: AlignmentKind) -> None:
    """Refuse missing columns, columns of another type and the layout of another alignment."""
    layout = _closest_layout(schema.names)
    for name in _LAYOUTS[layout]:
        if name not in schema.names:
            raise DataError(
                f"{path}: no column {name!r}{did_you_mean(name, schema.names)}; columns: "
                f"{', '.join(schema.names)}",
                hint="a published data set of tokenised rows has "
                + " or ".join(", ".join(columns) for columns in _LAYOUTS.values()),
                reason="bad_schema",
            )
        depth = _DEPTHS.get(name, 1)
        if not _is_integers(schema.field(name).type, depth):
            raise DataError(
                f"{path}: {name}: expected {_SHAPES[depth]}, got {schema.field(name).type}",
                reason="bad_schema",
            )
    if layout != alignment:
        raise ConfigError(
            f"{path}: its columns ({', '.join(_LAYOUTS[layout][-2:])}) are those of alignment: "
            f"{layout}, got alignment: {alignment}",
            hint=f"set alignment: {layout}, with the two tokenizers that the data was made with",
        )


def _closest_layout(names: Sequence[str]) -> AlignmentKind:
    own: dict[AlignmentKind, int] = {
        kind: sum(name in names for name in columns) for kind, columns in _LAYOUTS.items()
    }
    return max(own, key=lambda kind: own[kind])


def _is_integers(kind: Any, depth: int) -> bool:
    """Say whether a type is that many lists of integers; lists that are all empty may be null."""
    for _ in range(depth):
        if pa.types.is_null(kind):
            return True
        if not (
            pa.types.is_list(kind)
            or pa.types.is_large_list(kind)
            or pa.types.is_fixed_size_list(kind)
        ):
            return False
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_null(kind))
