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
