"""Which teacher position stands for which student position, as the rows store it.

Two forms. *Runs* (shared tokenizer): triples (student_start, teacher_start, length) of positions
that carry the same token; a conversation rendered with one template is a single run, so the table
costs a few bytes instead of 4 L. *Chunks* (two tokenizers): quadruples (student_start, student_end,
teacher_start, teacher_end) of minimal token groups that cover the same bytes.
"""

import numpy as np
import numpy.typing as npt

from tide_cache.errors import DataError
from tide_cache.geometry import BoolArray

Int32Array = npt.NDArray[np.int32]
NO_PARTNER = -1


def teacher_partners(runs_R3: Int32Array, num_student: int) -> Int32Array:
    """Return for every student position its teacher position, or -1. Shape (L,), int32."""
    partner_L = np.full(num_student, NO_PARTNER, dtype=np.int32)
    for student_start, teacher_start, length in runs_R3.tolist():
        partner_L[student_start : student_start + length] = np.arange(
            teacher_start, teacher_start + length
        )
    return partner_L


def payload_positions(mask_L: BoolArray, runs_R3: Int32Array) -> Int32Array:
    """Return the masked student positions that have a teacher partner, ascending, int32 (P,).

    These are the positions that a `candidates` payload speaks of, in its order; other masked
    positions are trained by cross entropy alone.
    """
    partner_L = teacher_partners(runs_R3, len(mask_L))
    return np.flatnonzero(mask_L & (partner_L != NO_PARTNER)).astype(np.int32)


def chunk_masked(mask_L: BoolArray, chunks_C4: Int32Array) -> BoolArray:
    """Say which chunks have a masked student token: bool (C,)."""
    num_masked_before = np.zeros(len(mask_L) + 1, dtype=np.int64)
    np.cumsum(mask_L, out=num_masked_before[1:])
    masked_C: BoolArray = num_masked_before[chunks_C4[:, 1]] > num_masked_before[chunks_C4[:, 0]]
    return masked_C


def chunk_active(mask_L: BoolArray, chunks_C4: Int32Array, prompt_length: int) -> BoolArray:
    """Say which chunks the distillation loss counts: masked, and no token of the prompt. (C,)."""
    return chunk_masked(mask_L, chunks_C4) & (chunks_C4[:, 0] >= prompt_length)


def positions_within(start_C: Int32Array, end_C: Int32Array) -> Int32Array:
    """Return all positions of ascending intervals [start, end), ascending, int32."""
    length_C = (end_C - start_C).astype(np.int64)
    before_C = np.cumsum(length_C) - length_C
    positions = np.arange(length_C.sum()) + np.repeat(start_C - before_C, length_C)
    return np.asarray(positions, dtype=np.int32)


def fill(
    flags_C: BoolArray, start_C: Int32Array, end_C: Int32Array, num_positions: int
) -> BoolArray:
    """Mark every position of the intervals [start, end) whose flag is set: bool (L,)."""
    filled_L = np.zeros(num_positions, dtype=bool)
    filled_L[positions_within(start_C[flags_C], end_C[flags_C])] = True
    return filled_L


def check_runs(
    runs_R3: Int32Array, student_ids_L: Int32Array, teacher_ids_L: Int32Array, *, where: str
) -> None:
    """Raise DataError unless runs are in bounds, ascending on both sides and carry equal tokens."""
    _check_intervals(runs_R3[:, 0], runs_R3[:, 0] + runs_R3[:, 2], len(student_ids_L), where)
    _check_intervals(runs_R3[:, 1], runs_R3[:, 1] + runs_R3[:, 2], len(teacher_ids_L), where)
    for student_start, teacher_start, length in runs_R3.tolist():
        ours = student_ids_L[student_start : student_start + length]
        theirs = teacher_ids_L[teacher_start : teacher_start + length]
        if not np.array_equal(ours, theirs):
            at = student_start + int(np.argmax(ours != theirs))
            raise DataError(
                f"{where}: align_runs pairs different tokens at student position {at}",
                reason="bad_alignment",
            )


def check_whole_chunks(
    mask_L: BoolArray,
    half_a_L: BoolArray,
    chunks_C4: Int32Array,
    prompt_length: int,
    *,
    where: str,
) -> None:
    """Raise DataError unless mask and half A hold whole chunks (of their labelled tokens)."""
    start_C, end_C = chunks_C4[:, 0], chunks_C4[:, 1]
    in_chunk_L = fill(np.ones(len(chunks_C4), dtype=bool), start_C, end_C, len(mask_L))
    whole_mask_L = mask_L | fill(chunk_masked(mask_L, chunks_C4), start_C, end_C, len(mask_L))
    whole_mask_L[:prompt_length] = False
    whole_half_L = mask_L & fill(chunk_masked(half_a_L, chunks_C4), start_C, end_C, len(mask_L))
    for field, whole_L, given_L in (
        ("student_mask", whole_mask_L, mask_L),
        ("half_a", whole_half_L, half_a_L & in_chunk_L),
    ):
        if not np.array_equal(whole_L, given_L):
            at = int(np.argmax(whole_L != given_L))
            raise DataError(
                f"{where}: {field}: expected whole chunks, got a part of the chunk at student "
                f"position {at}",
                hint="mask all labelled tokens of a chunk, and put them into one half",
                reason=f"bad_{field}",
            )


def check_chunks(chunks_C4: Int32Array, num_student: int, num_teacher: int, *, where: str) -> None:
    """Raise DataError unless chunks are in bounds, not empty and ascending on both sides."""
    _check_intervals(chunks_C4[:, 0], chunks_C4[:, 1], num_student, where)
    _check_intervals(chunks_C4[:, 2], chunks_C4[:, 3], num_teacher, where)


def _check_intervals(
    start: npt.NDArray[np.int32], end: npt.NDArray[np.int32], limit: int, where: str
) -> None:
    # int64: a hostile start + length must not wrap around.
    start, end = start.astype(np.int64), end.astype(np.int64)
    good = (start >= 0) & (end > start) & (end <= limit)
    good[1:] &= start[1:] >= end[:-1]
    if not good.all():
        at = int(np.argmin(good))
        raise DataError(
            f"{where}: alignment entry {at} = [{start[at]}, {end[at]}) is empty, out of order or "
            f"outside [0, {limit})",
            reason="bad_alignment",
        )
