"""A row of a premasked set: one (sample, view), and how it stands in Arrow.

Ids and scalars are plain columns that any tool reads; masks are bits. A cache repeats these
columns and adds payload columns, so that a cache alone is enough to train from. Rows are checked
when they are made, when a builder reads them from outside and when a cache is verified, by the one
function `check_row`.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from tide_cache.alignment import Int32Array, check_chunks, check_runs, check_whole_chunks
from tide_cache.bits import pack_bits, unpack_bits
from tide_cache.errors import DataError, FormatError
from tide_cache.geometry import BoolArray

AlignmentKind = Literal["positions", "chunks"]
_ALIGNMENT_COLUMN = {"positions": ("align_runs", 3), "chunks": ("chunks", 4)}
MAX_POSITIONS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PremaskedRow:
    """One noised copy of one conversation, for student and teacher.

    `student_ids_L` int32 (L,); positions from `prompt_length` on are the labelled reply.
    `student_mask_L` bool (L,): masked positions; `half_a_L` bool (L,): those of them in CompDemo's
    half A. `teacher_ids_L` int32 (L_T,). `alignment_RX` int32: runs (R, 3) or chunks (C, 4), see
    `tide_cache.alignment`. `timestep` is the expected masked fraction, in (0, 1].
    """

    sample_id: str
    source: str
    view: int
    timestep: float
    student_ids_L: Int32Array
    prompt_length: int
    student_mask_L: BoolArray
    half_a_L: BoolArray
    teacher_ids_L: Int32Array
    alignment_RX: Int32Array


def row_fields(alignment: AlignmentKind) -> list[pa.Field]:
    """Return the Arrow fields that premasked sets and caches share, none of them nullable."""
    int_list = pa.list_(pa.field("element", pa.int32(), nullable=False))
    fields = [
        ("sample_id", pa.string()),
        ("source", pa.string()),
        ("view", pa.int16()),
        ("timestep", pa.float32()),
        ("student_ids", int_list),
        ("prompt_length", pa.int32()),
        ("student_mask", pa.binary()),
        ("half_a", pa.binary()),
        ("teacher_ids", int_list),
        (_ALIGNMENT_COLUMN[alignment][0], int_list),
    ]
    return [pa.field(name, kind, nullable=False) for name, kind in fields]


def row_schema(alignment: AlignmentKind) -> pa.Schema:
    """Return the Arrow schema of a premasked shard."""
    return pa.schema(row_fields(alignment))


def rows_to_table(rows: list[PremaskedRow], alignment: AlignmentKind) -> pa.Table:
    """Put rows into an Arrow table of `row_schema(alignment)`."""
    columns = [
        [row.sample_id for row in rows],
        [row.source for row in rows],
        [row.view for row in rows],
        [row.timestep for row in rows],
        [row.student_ids_L for row in rows],
        [row.prompt_length for row in rows],
        [pack_bits(row.student_mask_L) for row in rows],
        [pack_bits(row.half_a_L) for row in rows],
        [row.teacher_ids_L for row in rows],
        [row.alignment_RX.reshape(-1) for row in rows],
    ]
    schema = row_schema(alignment)
    arrays = [pa.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def table_to_rows(table: pa.Table, alignment: AlignmentKind) -> list[PremaskedRow]:
    """Take rows out of an Arrow table that has (at least) the columns of `row_schema`."""
    column, width = _ALIGNMENT_COLUMN[alignment]
    student_ids = _int_lists(table["student_ids"])
    teacher_ids = _int_lists(table["teacher_ids"])
    alignments = _int_lists(table[column])
    scalars = {
        name: table[name].to_pylist()
        for name in ("sample_id", "source", "view", "timestep", "prompt_length")
    }
    masks, halves = table["student_mask"].to_pylist(), table["half_a"].to_pylist()
    rows = []
    for index in range(table.num_rows):
        where = f"row {scalars['sample_id'][index]}"
        if len(alignments[index]) % width:
            raise FormatError(f"{where}: {column}: expected groups of {width} numbers")
        num_positions = len(student_ids[index])
        rows.append(
            PremaskedRow(
                **{name: values[index] for name, values in scalars.items()},
                student_ids_L=student_ids[index],
                student_mask_L=unpack_bits(masks[index], num_positions),
                half_a_L=unpack_bits(halves[index], num_positions),
                teacher_ids_L=teacher_ids[index],
                alignment_RX=alignments[index].reshape(-1, width),
            )
        )
    return rows


def check_row(
    row: PremaskedRow,
    *,
    alignment: AlignmentKind,
    student_vocab_size: int,
    teacher_vocab_size: int,
    num_views: int,
) -> None:
    """Raise DataError, naming the sample and the field, unless every field is in its bounds.

    Checks ids against the vocabularies, the mask against the labelled part, halves against the
    mask, the timestep, the view, the alignment against both sequences, and that masks and halves
    hold whole chunks.
    """
    where = f"sample {row.sample_id} view {row.view}"
    num_student, num_teacher = len(row.student_ids_L), len(row.teacher_ids_L)
    problems = [
        (not 0 <= row.view < num_views, "view", f"0..{num_views - 1}", row.view),
        (not 0.0 < row.timestep <= 1.0, "timestep", "in (0, 1]", row.timestep),
        (not 1 <= num_student <= MAX_POSITIONS, "student_ids", "1..2^20 ids", num_student),
        (not 1 <= num_teacher <= MAX_POSITIONS, "teacher_ids", "1..2^20 ids", num_teacher),
        (
            not 0 <= row.prompt_length <= num_student,
            "prompt_length",
            f"0..{num_student}",
            row.prompt_length,
        ),
    ]
    for is_wrong, field, expected, got in problems:
        if is_wrong:
            _refuse(where, field, expected, got)
    _check_ids(row.student_ids_L, student_vocab_size, where, "student_ids")
    _check_ids(row.teacher_ids_L, teacher_vocab_size, where, "teacher_ids")
    if row.student_mask_L[: row.prompt_length].any():
        at = int(np.argmax(row.student_mask_L))
        _refuse(where, "student_mask", f"only positions from {row.prompt_length} on", at)
    if (row.half_a_L & ~row.student_mask_L).any():
        at = int(np.argmax(row.half_a_L & ~row.student_mask_L))
        _refuse(where, "half_a", "only masked positions", at)
    if alignment == "positions":
        check_runs(row.alignment_RX, row.student_ids_L, row.teacher_ids_L, where=where)
    else:
        check_chunks(row.alignment_RX, num_student, num_teacher, where=where)
        check_whole_chunks(
            row.student_mask_L, row.half_a_L, row.alignment_RX, row.prompt_length, where=where
        )


def _check_ids(ids_L: Int32Array, vocab_size: int, where: str, field: str) -> None:
    bad = (ids_L < 0) | (ids_L >= vocab_size)
    if bad.any():
        at = int(np.argmax(bad))
        _refuse(f"{where} position {at}", field, f"ids in 0..{vocab_size - 1}", int(ids_L[at]))


def _refuse(where: str, field: str, expected: str, got: object) -> None:
    raise DataError(f"{where}: {field}: expected {expected}, got {got}", reason=f"bad_{field}")


def _int_lists(column: pa.ChunkedArray) -> list[Int32Array]:
    """Return the int32 arrays of a list column without going through Python numbers."""
    lists: list[Int32Array] = []
    for chunk in column.chunks:
        if chunk.null_count:
            raise FormatError("expected no missing values in a list column")
        offsets = chunk.offsets.to_numpy()
        values = chunk.values.to_numpy(zero_copy_only=False)
        lists += [values[a:b] for a, b in itertools.pairwise(offsets)]
    return lists
