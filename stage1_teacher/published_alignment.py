"""The alignments of published rows: what is wrong with them, if anything.

`ranges` (distill_llada2_sft) holds [teacher_start, teacher_end, student_start, student_end) in
tokens, one entry per message whose text was found on both sides; chunks were left to the trainer.
`align_student`/`align_teacher` (distill_wedlm_sft) pair positions of assistant contents. Both were
found by searching texts, which goes wrong for short answers, repeated texts and merged line feeds,
and neither was taken back when a side was cut.

Only the labelled reply is ever distilled: entries that lie in the prompt are not looked at. Where
the reply's place is known (`reply_frames`) an entry must be exactly that place; where it is not, an
entry must at least spell the same on both sides.

Shapes: L tokens, P pairs, N entries.
"""

import itertools
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stage1_teacher.reply_frames import SpelledIds
from tide_cache.alignment import Int32Array

ROW_FAULTS: Mapping[str, str] = {
    "row_incomplete": "a column of ids or labels is null, empty or holds nulls",
    "ids_outside_vocabulary": "an id is not in the vocabulary of its side's tokenizer",
    "labels_malformed": "the labels are not -100 on the prompt and the ids themselves behind it",
    "labels_empty": "no position is labelled",
}
"""Why a published row cannot be used whatever its alignment."""

ALIGNMENT_FAULTS: Mapping[str, str] = {
    "ranges_malformed": "ranges is no list of four integers each",
    "ranges_out_of_bounds": "a range ends outside of its sequence",
    "ranges_empty": "a range holds no token on a side",
    "ranges_out_of_order": "ranges overlap or descend",
    "ranges_outside_reply": "no range lies in the labelled reply on both sides",
    "ranges_on_template": "a range holds control tokens of the template",
    "ranges_differ": "a range spells different bytes on its two sides",
    "ranges_inexact": "the ranges are not the reply's content",
    "pairs_malformed": "align_student and align_teacher are not as long as each other",
    "pairs_out_of_bounds": "a pair lies outside of its sequences",
    "pairs_outside_reply": "no pair lies in the labelled reply",
    "pairs_differ": "a pair joins different ids",
    "pairs_out_of_order": "pairs do not ascend on both sides",
    "pairs_inexact": "the pairs are not those of the reply's content",
}
"""What can be wrong with a published alignment; where it cannot be repaired, the row is dropped."""

DROP_REASONS: Mapping[str, str] = {
    **ROW_FAULTS,
    **{
        fault: f"{text}, and the right place is unknown" for fault, text in ALIGNMENT_FAULTS.items()
    },
}
"""Every reason for which `published` drops a row, in words."""

Range = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelledSide:
    """One side of a published row. `control_ids`: tokens that no content holds.

    `is_cut` says that its end is missing, so that a range may have been longer once.
    """

    spelled: SpelledIds
    prompt_length: int
    control_ids: npt.NDArray[np.int64]
    is_cut: bool

    def __len__(self) -> int:
        return len(self.spelled.ids_L)


def check_ranges(
    ranges: Any, student: LabelledSide, teacher: LabelledSide, truth: Range | None
) -> tuple[Range | None, str | None]:
    """Return the range of the reply, cut to the student's tokens, and what is wrong, if anything.

    `truth` is the range that it must be, where that is known. The fault is a key of
    `ALIGNMENT_FAULTS`; with one there is no range.
    """
    if not _are_ranges(ranges):
        return None, "ranges_malformed"
    used = [_clipped(r, student) for r in ranges if not _lies_in_prompts(r, student, teacher)]
    if truth is not None and used == [truth]:
        return truth, None
    fault = _fault_of_ranges(used, student, teacher)
    if fault is None and (truth is not None or len(used) > 1):
        fault = "ranges_inexact"
    return (None, fault) if fault else (used[0], None)


def check_pairs(
    pairs_P2: npt.NDArray[np.integer[Any]] | None,
    student_ids_L: Int32Array,
    teacher_ids_L: Int32Array,
    prompt_length: int,
    truth_P2: Int32Array | None,
) -> tuple[Int32Array, str | None]:
    """Return the pairs of the reply that can be true, (P, 2), and what is wrong, if anything.

    `pairs_P2` int64 (N, 2) is None where the two lists do not go together. Kept are pairs of equal
    ids, and of those the longest chain that ascends on both sides. `truth_P2` holds the content's
    pairs, where they are known. The fault is a key of `ALIGNMENT_FAULTS`.
    """
    if pairs_P2 is None:
        return np.empty((0, 2), dtype=np.int32), "pairs_malformed"
    in_prompt_P = (pairs_P2[:, 0] >= 0) & (pairs_P2[:, 0] < prompt_length)
    used_P2 = pairs_P2[~in_prompt_P]
    inside_P = ((used_P2 >= 0) & (used_P2 < [len(student_ids_L), len(teacher_ids_L)])).all(axis=1)
    valid_P2 = used_P2[inside_P]
    same_P = student_ids_L[valid_P2[:, 0]] == teacher_ids_L[valid_P2[:, 1]]
    kept_P2 = ascending_pairs(valid_P2[same_P])
    faults = {
        "pairs_outside_reply": not len(used_P2),
        "pairs_out_of_bounds": not inside_P.all(),
        "pairs_differ": not same_P.all(),
        "pairs_out_of_order": bool((np.diff(valid_P2, axis=0) <= 0).any()),
        "pairs_inexact": truth_P2 is not None and not np.array_equal(kept_P2, truth_P2),
    }
    return kept_P2, next((fault for fault, is_there in faults.items() if is_there), None)


def ascending_pairs(pairs_P2: npt.NDArray[np.integer[Any]]) -> Int32Array:
    """Return the longest chain of pairs that ascends strictly on both sides: int32 (P', 2)."""
    # Falling on the second side among equals of the first: of those a chain takes one at most.
    ordered_P2 = pairs_P2[np.lexsort((-pairs_P2[:, 1], pairs_P2[:, 0]))]
    ends: list[int] = []  # the smallest second position that ends a chain of each length
    at: list[int] = []  # ... and where it stands
    before: list[int] = []
    for index, position in enumerate(ordered_P2[:, 1].tolist()):
        length = bisect_left(ends, position)
        before.append(at[length - 1] if length else -1)
        ends[length : length + 1] = [position]
        at[length : length + 1] = [index]
    chain, index = [], at[-1] if at else -1
    while index >= 0:
        chain.append(index)
        index = before[index]
    return ordered_P2[chain[::-1]].astype(np.int32).reshape(-1, 2)


def _are_ranges(ranges: Any) -> bool:
    return isinstance(ranges, Sequence) and all(
        isinstance(entry, Sequence)
        and len(entry) == 4
        and all(isinstance(number, int) for number in entry)
        for entry in ranges
    )


def _clipped(entry: Sequence[int], student: LabelledSide) -> Range:
    teacher_start, teacher_end, start, end = entry
    if student.is_cut and start < len(student) < end:
        end = len(student)
    return teacher_start, teacher_end, start, end


def _lies_in_prompts(entry: Sequence[int], student: LabelledSide, teacher: LabelledSide) -> bool:
    teacher_start, teacher_end, start, end = entry
    return (
        0 <= start < end <= student.prompt_length
        and 0 <= teacher_start < teacher_end <= teacher.prompt_length
    )


def _fault_of_ranges(
    used: Sequence[Range], student: LabelledSide, teacher: LabelledSide
) -> str | None:
    """Return the first fault of ranges, by what they are, how they stand and what they spell."""
    for teacher_start, teacher_end, start, end in used:
        if min(start, teacher_start) < 0 or end > len(student) or teacher_end > len(teacher):
            return "ranges_out_of_bounds"
        if start >= end or teacher_start >= teacher_end:
            return "ranges_empty"
    for one, two in itertools.pairwise(used):
        if two[0] < one[1] or two[2] < one[3]:
            return "ranges_out_of_order"
    if not used or any(
        start < student.prompt_length or teacher_start < teacher.prompt_length
        for teacher_start, _, start, _ in used
    ):
        return "ranges_outside_reply"
    for entry in used:
        if _holds_control(student, *entry[2:]) or _holds_control(teacher, *entry[:2]):
            return "ranges_on_template"
        if not _spell_the_same(student, teacher, entry):
            return "ranges_differ"
    return None


def _holds_control(side: LabelledSide, start: int, end: int) -> bool:
    return bool(np.isin(side.spelled.ids_L[start:end], side.control_ids).any())


def _spell_the_same(student: LabelledSide, teacher: LabelledSide, entry: Range) -> bool:
    ours = student.spelled.bytes_of(*entry[2:])
    theirs = teacher.spelled.bytes_of(*entry[:2])
    if student.is_cut and entry[3] == len(student):
        return theirs.startswith(ours)
    return ours == theirs
