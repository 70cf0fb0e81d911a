"""Which masked positions a teacher's answers speak of, from masks and alignment columns alone.

With a shared tokenizer an entry stands for one masked position that has a partner, with two for an
active chunk: masked, and behind the prompt. The alignment also says how likely a mask was: a token
of a chunk is hidden as soon as any labelled token of the chunk is drawn. All rows at once with
prefix sums, and every number is held against its bounds before it becomes an index.

Shapes: B rows, L positions, P masked positions of all rows (row by row), R runs, C chunks (active
ones in `AlignedTokens`), E masked positions behind entries.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stage2_student.columns import BoolArray, Int64Array, list_values, require


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NoisedRows:
    """Rows as arrays. Positions behind a row's `length_B` are padding: id 0, never masked."""

    ids_BL: Int64Array
    length_B: Int64Array
    masked_BL: BoolArray
    labelled_B: Int64Array
    timestep_B: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AlignedTokens:
    """The masked positions behind payload entries: index into P and entry of each, row counts."""

    index_E: Int64Array
    entry_E: Int64Array
    row_of_entry_C: Int64Array
    num_entries_B: Int64Array


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowChunks:
    """The chunks of all rows on the student's side: positions [start, end) of a row.

    Of a chunk's tokens those from `labelled_start_C` on are labelled; a chunk that lies in the
    prompt has none, and there it equals `end_C`.
    """

    row_C: Int64Array
    start_C: Int64Array
    labelled_start_C: Int64Array
    end_C: Int64Array


def decode_partners(table: pa.Table, noised: NoisedRows) -> BoolArray:
    """Say which student positions have a teacher position, from the column `align_runs`. (B, L).

    The same as `tide_cache.alignment.teacher_partners`, all rows at once. That runs pair equal
    tokens is `verify`'s business: training reads no teacher tokens.
    """
    runs_R3, row_R = _alignment(table, "align_runs", 3)
    start_R, end_R = runs_R3[:, 0], runs_R3[:, 0] + runs_R3[:, 2]
    _require_intervals("align_runs", start_R, end_R, noised.length_B[row_R], row_R)
    edges_BL = np.zeros((len(noised.ids_BL), noised.ids_BL.shape[1] + 1), dtype=np.int32)
    np.add.at(edges_BL, (row_R, start_R), 1)
    np.add.at(edges_BL, (row_R, end_R), -1)
    return np.asarray(edges_BL[:, :-1].cumsum(axis=1) > 0)


def partnered_tokens(partnered_BL: BoolArray, noised: NoisedRows) -> AlignedTokens:
    """Find the masked positions that have a partner, each an entry of its own."""
    wanted_BL = noised.masked_BL & partnered_BL
    index_E = np.flatnonzero(partnered_BL[noised.masked_BL])
    return AlignedTokens(
        index_E=index_E,
        entry_E=np.arange(len(index_E)),
        row_of_entry_C=np.nonzero(wanted_BL)[0],
        num_entries_B=wanted_BL.sum(axis=1),
    )


def decode_chunks(table: pa.Table, noised: NoisedRows) -> RowChunks:
    """Decode the column `chunks`. Raises FormatError for a chunk outside its sequence."""
    chunks_C4, row_C = _alignment(table, "chunks", 4)
    start_C, end_C = chunks_C4[:, 0], chunks_C4[:, 1]
    _require_intervals("chunks", start_C, end_C, noised.length_B[row_C], row_C)
    prompt_C = (noised.length_B - noised.labelled_B)[row_C]
    return RowChunks(
        row_C=row_C,
        start_C=start_C,
        labelled_start_C=np.minimum(np.maximum(start_C, prompt_C), end_C),
        end_C=end_C,
    )


def chunk_tokens(chunks: RowChunks, noised: NoisedRows) -> AlignedTokens:
    """Find the positions of active chunks: masked, and behind the prompt (`chunk_active`).

    Raises FormatError where some but not all labelled tokens of a chunk are masked: a token left
    in sight has no log-prob to compare, and no draw masks it so.
    """
    num_rows, num_positions = noised.ids_BL.shape
    before_BL = np.zeros((num_rows, num_positions + 1), dtype=np.int64)
    np.cumsum(noised.masked_BL, axis=1, out=before_BL[:, 1:])
    row_C, start_C = chunks.row_C, chunks.start_C
    num_masked_C = before_BL[row_C, chunks.end_C] - before_BL[row_C, start_C]
    num_labelled_C = chunks.end_C - chunks.labelled_start_C
    is_whole_C = (num_masked_C == 0) | (num_masked_C == num_labelled_C)
    require(is_whole_C.all(), "student_mask: a part of a chunk")
    active_C = (num_masked_C > 0) & (start_C == chunks.labelled_start_C)
    size_C, row_C, start_C = num_labelled_C[active_C], row_C[active_C], start_C[active_C]
    entry_E, position_E = _positions(start_C, size_C)
    masked_before_B = np.concatenate([[0], np.cumsum(before_BL[:, -1])])[:-1]
    return AlignedTokens(
        index_E=masked_before_B[row_C[entry_E]] + before_BL[row_C[entry_E], position_E],
        entry_E=entry_E,
        row_of_entry_C=row_C,
        num_entries_B=np.bincount(row_C, minlength=num_rows),
    )


def count_draws(chunks: RowChunks, noised: NoisedRows) -> Int64Array:
    """Count the labelled tokens whose draw hides each position: int64 (B, L).

    Those of the position's chunk, since a mask drawn for one spreads to all; 1 outside chunks. Of a
    chunk that straddles the prompt only the labelled tokens are drawn, so only they count.
    """
    num_draws_BL = np.ones(noised.ids_BL.shape, dtype=np.int64)
    size_C = chunks.end_C - chunks.labelled_start_C
    entry_E, position_E = _positions(chunks.labelled_start_C, size_C)
    num_draws_BL[chunks.row_C[entry_E], position_E] = size_C[entry_E]
    return num_draws_BL


def _positions(start_C: Int64Array, size_C: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return of every token of intervals [start, start + size) its interval and its position."""
    entry_E = np.repeat(np.arange(len(size_C)), size_C)
    within_E = np.arange(len(entry_E)) - np.repeat(np.cumsum(size_C) - size_C, size_C)
    return entry_E, start_C[entry_E] + within_E


def _alignment(table: pa.Table, column: str, width: int) -> tuple[Int64Array, Int64Array]:
    """Return the entries of an alignment column, (N, width), and the row of each."""
    values, count_B = list_values(table[column])
    require(not (count_B % width).any(), f"{column}: expected groups of {width} numbers")
    row = np.repeat(np.arange(len(count_B)), count_B // width)
    return values.reshape(-1, width), row


def _require_intervals(
    column: str, start: Int64Array, end: Int64Array, length: Int64Array, row: Int64Array
) -> None:
    good = (start >= 0) & (end > start) & (end <= length)
    require(good.all(), f"{column}: an entry outside the sequence")
    # Entries that overlap could stand for any number of tokens.
    is_behind = (start[1:] >= end[:-1]) | (row[1:] > row[:-1])
    require(is_behind.all(), f"{column}: entries out of order")
