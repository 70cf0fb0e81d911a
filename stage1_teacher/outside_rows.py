"""Rows that somebody else masked: Parquet files of the documented schema, read and checked.

The masks and timesteps are kept as they are; only a missing `half_a` is drawn. Files may be laid
out in any way and rows may stand in any order: one pass over `sample_id` and `view` finds every row
of a sample. Nothing is dropped or repaired: these rows come from a program, so a wrong one is
refused by name, before a GPU has spent an hour on its neighbours.

Reading a task reads the row groups that hold its rows, so files sorted by sample are read once.

Shapes: S samples, V views, F files, R rows of all files together.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stage1_teacher.encode import Encoder
from stage1_teacher.premask import draw_half
from stage1_teacher.prepare_config import PrepareConfig
from stage1_teacher.task_rows import RowMaker, TaskRows
from tide_cache.errors import DataError, FormatError, did_you_mean
from tide_cache.manifest import SourceFacts, TokenizerFacts
from tide_cache.rows import AlignmentKind, PremaskedRow, check_row, row_schema, table_to_rows
from tide_cache.shards import open_shard, read_row_groups
from tide_cache.store import Store

_HALF = "half_a"
_SAME_IN_ALL_VIEWS = {
    "student_ids": "student_ids_L",
    "prompt_length": "prompt_length",
    "teacher_ids": "teacher_ids_L",
    "alignment": "alignment_RX",
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OutsideRows:
    """Where every row stands: sample s, view v is row `row_SV[s, v]` of all files in a row.

    `start_F` is the number of the first row of each file. Samples are in order of first appearance.
    """

    store: Store
    files: tuple[str, ...]
    start_F: npt.NDArray[np.int64]
    row_SV: npt.NDArray[np.int64]
    has_half: bool
    facts: tuple[SourceFacts, ...]

    def __len__(self) -> int:
        return len(self.row_SV)

    @property
    def dropped(self) -> dict[str, int]:
        """Nothing: a row that cannot be used is refused."""
        return {}

    def row_maker(self, config: PrepareConfig, encoder: Encoder) -> RowMaker:
        """Return the function that reads and checks a range of samples."""
        return OutsideReader(self, config, encoder.student.facts, encoder.teacher.facts).read


def index_rows(url: str, *, alignment: AlignmentKind, num_views: int) -> OutsideRows:
    """Find every row in the Parquet files below `url`.

    Raises DataError when there are none, when a column is missing or of another type, or when a
    sample lacks a view or has one twice; FormatError for a damaged file.
    """
    store = Store(url)
    files = tuple(path for path in store.list_files() if path.endswith(".parquet"))
    if not files:
        raise DataError(
            f"{url}: premasked: expected a folder of .parquet files, got "
            + ("none in it" if store.exists() else "no such folder"),
            reason="empty_source",
        )
    columns, has_half = [], []
    for path in files:
        with open_shard(store, path) as file:
            names = file.schema_arrow.names
            where = f"{url}/{path}"
            _check_columns(names, alignment, where)
            has_half.append(_HALF in names)
            table = read_row_groups(store, path, file, None, ["sample_id", "view"])
            columns.append(_conform(table, alignment, where))
    if len(set(has_half)) > 1:
        other = files[has_half.index(not has_half[0])]
        raise DataError(f"{url}: {_HALF}: expected in all files or in none: see {other}")
    num_rows_F = [table.num_rows for table in columns]
    if not any(num_rows_F):
        raise DataError(f"{url}: premasked: empty source (no rows)", reason="empty_source")
    start_F = np.concatenate([[0], np.cumsum(num_rows_F)[:-1]]).astype(np.int64)
    row_SV = _place(pa.concat_tables(columns), num_views, url)
    return OutsideRows(
        store=store,
        files=files,
        start_F=start_F,
        row_SV=row_SV,
        has_half=has_half[0],
        facts=(_facts(store, files, len(row_SV)),),
    )


class OutsideReader:
    """Reads and checks tasks of `OutsideRows`; one per worker."""

    def __init__(
        self,
        rows: OutsideRows,
        config: PrepareConfig,
        student: TokenizerFacts,
        teacher: TokenizerFacts,
    ) -> None:
        self._rows = rows
        self._config = config
        self._student = student
        self._teacher = teacher

    def read(self, samples: range) -> TaskRows:
        """Return the rows of a range of samples. Raises DataError naming the first bad one."""
        wanted_SV = self._rows.row_SV[samples.start : samples.stop]
        ascending, place = np.unique(wanted_SV, return_inverse=True)
        found = self._named_rows(self._read_table(ascending))
        for row in found:
            self._check(row)
        place_VS = place.reshape(wanted_SV.shape).T
        rows_V = [[found[at] for at in place_S.tolist()] for place_S in place_VS]
        for views in zip(*rows_V, strict=True):
            self._check_same(views)
        return TaskRows(rows_V=rows_V, counts=Counter(), dropped=Counter())

    def _read_table(self, ascending: npt.NDArray[np.int64]) -> pa.Table:
        """Read rows by their ascending numbers, from the row groups that hold them."""
        file_R = np.searchsorted(self._rows.start_F, ascending, side="right") - 1
        tables = []
        for index in np.unique(file_R).tolist():
            path = self._rows.files[index]
            local = ascending[file_R == index] - self._rows.start_F[index]
            table = _take(self._rows.store, path, local)
            where = f"{self._rows.store.url}/{path}"
            tables.append(_conform(table, self._config.alignment, where))
        return pa.concat_tables(tables)

    def _named_rows(self, table: pa.Table) -> list[PremaskedRow]:
        """Take the rows out of a table, naming the sample whose masks cannot be read."""
        if not self._rows.has_half:
            table = table.append_column(_HALF, table["student_mask"])
        try:
            rows = table_to_rows(table, self._config.alignment)
        except FormatError:
            for index in range(table.num_rows):
                try:
                    table_to_rows(table.slice(index, 1), self._config.alignment)
                except FormatError as error:
                    sample, view = table["sample_id"][index], table["view"][index]
                    raise DataError(
                        f"{self._rows.store.url}: sample {sample} view {view}: {error.message}",
                        reason="bad_student_mask",
                    ) from error
            raise
        return rows if self._rows.has_half else [self._with_half(row) for row in rows]

    def _with_half(self, row: PremaskedRow) -> PremaskedRow:
        half_a_L = draw_half(
            row.student_mask_L,
            row.alignment_RX,
            demo_ratio=self._config.demo_ratio,
            seed=self._config.seed,
            sample_id=row.sample_id,
            view=row.view,
        )
        return replace(row, half_a_L=half_a_L)

    def _check(self, row: PremaskedRow) -> None:
        try:
            check_row(
                row,
                alignment=self._config.alignment,
                student_vocab_size=self._student.vocab_size,
                teacher_vocab_size=self._teacher.vocab_size,
                num_views=self._config.num_views,
            )
        except DataError as error:
            raise DataError(
                f"{self._rows.store.url}: {error.message}", hint=error.hint, reason=error.reason
            ) from error

    def _check_same(self, views: Sequence[PremaskedRow]) -> None:
        for column, field in _SAME_IN_ALL_VIEWS.items():
            first = getattr(views[0], field)
            for row in views[1:]:
                if not np.array_equal(first, getattr(row, field)):
                    raise DataError(
                        f"{self._rows.store.url}: sample {row.sample_id} view {row.view}: "
                        f"{column}: expected that of view 0: all views are copies of one sample",
                        reason="bad_view",
                    )


def _place(table: pa.Table, num_views: int, url: str) -> npt.NDArray[np.int64]:
    """Return the row number of every (sample, view), int64 (S, V)."""
    samples = table["sample_id"].combine_chunks().dictionary_encode()
    view_R = table["view"].to_numpy()
    bad = np.flatnonzero((view_R < 0) | (view_R >= num_views))
    if len(bad):
        raise DataError(
            f"{url}: sample {table['sample_id'][int(bad[0])]}: view: expected 0..{num_views - 1}, "
            f"got {view_R[bad[0]]}",
            hint="set num_views to the number of views in these files",
            reason="bad_view",
        )
    slot_R = samples.indices.to_numpy().astype(np.int64) * num_views + view_R
    num_SV = np.bincount(slot_R, minlength=len(samples.dictionary) * num_views)
    if (num_SV != 1).any():
        sample, view = divmod(int(np.argmax(num_SV != 1)), num_views)
        raise DataError(
            f"{url}: sample {samples.dictionary[sample]}: expected views 0..{num_views - 1} once "
            f"each, got view {view} {num_SV[sample * num_views + view]} times",
            hint="set num_views to the number of views in these files",
            reason="bad_view",
        )
    row_SV = np.empty(len(num_SV), dtype=np.int64)
    row_SV[slot_R] = np.arange(len(slot_R))
    return row_SV.reshape(-1, num_views)


def _take(store: Store, path: str, local: npt.NDArray[np.int64]) -> pa.Table:
    """Read ascending rows of one file."""
    with open_shard(store, path) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = np.cumsum(sizes)
        group_R = np.searchsorted(ends, local, side="right")
        groups = np.unique(group_R)
        table = read_row_groups(store, path, file, groups.tolist())
        # Where each group that was read begins in the table, less where it begins in the file.
        starts = np.cumsum([0, *(sizes[group] for group in groups)])[:-1]
        shift = starts - (ends[groups] - np.asarray(sizes)[groups])
        return table.take(pa.array(local + shift[np.searchsorted(groups, group_R)]))


def _check_columns(names: Sequence[str], alignment: AlignmentKind, where: str) -> None:
    for name in row_schema(alignment).names:
        if name not in names and name != _HALF:
            raise DataError(
                f"{where}: no column {name!r}{did_you_mean(name, names)}; columns: "
                f"{', '.join(names)}",
                hint=f"the columns of alignment {alignment!r} are "
                f"{', '.join(row_schema(alignment).names)}",
                reason="bad_schema",
            )


def _conform(table: pa.Table, alignment: AlignmentKind, where: str) -> pa.Table:
    """Bring the columns to the types of the schema, refusing missing values and lost digits."""
    arrays, fields = [], []
    for field in row_schema(alignment):
        if field.name not in table.schema.names:
            continue
        column = table[field.name]
        try:
            column = column.cast(field.type)
            is_whole = not column.null_count
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            is_whole = False
        if not is_whole:
            raise DataError(
                f"{where}: {field.name}: expected {field.type} without missing values, got "
                f"{table[field.name].type} with {table[field.name].null_count} missing",
                reason="bad_schema",
            )
        arrays.append(column)
        fields.append(field)
    return pa.table(arrays, schema=pa.schema(fields))


def _facts(store: Store, files: Sequence[str], num_samples: int) -> SourceFacts:
    digest = hashlib.sha256("".join(store.sha256(path) for path in files).encode())
    return SourceFacts(
        name=store.url.rpartition("/")[2],
        fingerprint=digest.hexdigest(),
        licence=None,
        num_rows=num_samples,
        num_rows_taken=num_samples,
    )
