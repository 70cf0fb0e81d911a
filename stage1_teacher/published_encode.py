"""A published row as a sample: its ids and labels checked, its alignment checked or put right.

Wherever the reply's place is known from the chat templates, the alignment is computed as for a
conversation and the published one only says whether the row counts as repaired. Where it is not
(the set was made with other templates), a published alignment without fault is used as it stands,
pairs with a fault lose what is wrong with them, and ranges with a fault drop the row.

Shapes: L tokens, P pairs.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stage1_teacher.chat import RenderedChat
from stage1_teacher.encode import EncodedSample, Encoder, Side, SideTokens
from stage1_teacher.published_alignment import (
    ALIGNMENT_FAULTS,
    ROW_FAULTS,
    LabelledSide,
    Range,
    check_pairs,
    check_ranges,
)
from stage1_teacher.reply_frames import (
    ContentBytes,
    SpelledIds,
    as_chats,
    find_reply,
    find_same_reply,
    read_frame,
    spell,
)
from stage1_teacher.token_bytes import Int64Array, token_bytes
from tide_cache.alignment import Int32Array
from tide_cache.errors import DataError

_UNLABELLED = -100


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PublishedRow:
    """A row as it was published; int64 (L,), None where a column is null or holds nulls.

    One of `ranges` with `teacher_labels_L`, and `align_student_N` with `align_teacher_N`, is there.
    """

    ids_L: Int64Array | None
    labels_L: Int64Array | None
    teacher_ids_L: Int64Array | None
    prompt_length: int | None
    teacher_labels_L: Int64Array | None = None
    ranges: Any = None
    align_student_N: Int64Array | None = None
    align_teacher_N: Int64Array | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Aligned:
    """Both sides' tokens and their alignment, as `Encoder.finish` takes it."""

    student: SideTokens
    teacher: SideTokens
    aligned_RX: Int32Array
    counts: Counter[str]


class PublishedEncoder:
    """Turns published rows into samples for one config; a pure function of the row."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._student = _SideReader(encoder.student)
        self._teacher = _SideReader(encoder.teacher)

    def encode(self, row: PublishedRow, *, sample_id: str, source: str) -> EncodedSample:
        """Encode one row.

        Raises DataError with a `reason` of `published_alignment.DROP_REASONS`,
        `encode.DROP_REASONS` or `chat.REFUSALS`.
        """
        student = self._student.spell(row.ids_L, "input_ids")
        teacher = self._teacher.spell(row.teacher_ids_L, "teacher_input_ids")
        prompt_length = _prompt_length(student.ids_L, row.labels_L, "labels")
        align = self._by_pairs if self._encoder.alignment == "positions" else self._by_ranges
        made = align(row, student, teacher, prompt_length)
        cuts = self._encoder.cut(made.student, made.teacher)
        counts = made.counts
        counts["num_prompt_lengths_corrected"] = int(row.prompt_length != prompt_length)
        counts["num_replies_cut_before"] = int(not made.student.is_whole)
        return self._encoder.finish(
            cuts, made.aligned_RX, counts, sample_id=sample_id, source=source
        )

    def _by_ranges(
        self, row: PublishedRow, student: SpelledIds, teacher: SpelledIds, prompt_length: int
    ) -> _Aligned:
        teacher_prompt = _prompt_length(teacher.ids_L, row.teacher_labels_L, "teacher_labels")
        content = self._student.find_reply(student, prompt_length)
        teacher_content = self._teacher.find_reply(teacher, teacher_prompt)
        is_known = content is not None and teacher_content is not None
        found, fault = check_ranges(
            row.ranges,
            self._student.labelled(student, prompt_length, content),
            self._teacher.labelled(teacher, teacher_prompt, teacher_content),
            _range_of(student, content, teacher, teacher_content),
        )
        counts = _counted(fault, is_known=is_known)
        if content is None or teacher_content is None:
            if found is None:
                assert fault is not None
                raise DataError(f"ranges: {ALIGNMENT_FAULTS[fault]}", reason=fault)
            content = _content_of(student, *found[2:])
            teacher_content = _content_of(teacher, *found[:2])
        return self._of_contents(
            (student, content, prompt_length), (teacher, teacher_content, teacher_prompt), counts
        )

    def _by_pairs(
        self, row: PublishedRow, student: SpelledIds, teacher: SpelledIds, prompt_length: int
    ) -> _Aligned:
        given_P2 = _stacked(row.align_student_N, row.align_teacher_N)
        made, truth_P2 = None, None
        content = self._student.find_reply(student, prompt_length)
        if content is not None:
            shown = student.raw[content.byte_start : content.byte_end]
            found = self._teacher.find_same_reply(teacher, shown)
            if found is not None:
                made = self._of_contents(
                    (student, content, prompt_length), (teacher, *found), Counter()
                )
                truth_P2 = _within_contents(made.aligned_RX, student, content, teacher, found[0])
        kept_P2, fault = check_pairs(
            given_P2, student.ids_L, teacher.ids_L, prompt_length, truth_P2
        )
        counts = _counted(fault, is_known=made is not None)
        if made is not None:
            return _Aligned(
                student=made.student,
                teacher=made.teacher,
                aligned_RX=made.aligned_RX,
                counts=made.counts + counts,
            )
        if not len(kept_P2):
            assert fault is not None
            raise DataError(f"pairs: {ALIGNMENT_FAULTS[fault]}", reason=fault)
        return _of_pairs(kept_P2, student, teacher, prompt_length, counts)

    def _of_contents(
        self,
        student: tuple[SpelledIds, ContentBytes, int],
        teacher: tuple[SpelledIds, ContentBytes, int],
        counts: Counter[str],
    ) -> _Aligned:
        chats = as_chats(*student, *teacher)
        aligned_RX, more = self._encoder.align(*chats)
        return _Aligned(
            student=_tokens(chats[0], student[1]),
            teacher=_tokens(chats[1], teacher[1]),
            aligned_RX=aligned_RX,
            counts=counts + more,
        )


class _SideReader:
    """What is known of one side's tokenizer and template, read once."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._table = token_bytes(side.tokenizer)
        self._frame = read_frame(side)
        added = side.tokenizer.added_tokens_decoder.items()
        special = {token_id for token_id, token in added if token.special}
        self._control_ids = np.array(sorted(special | {side.eos_token_id}), dtype=np.int64)

    def spell(self, ids_L: Int64Array | None, column: str) -> SpelledIds:
        """Check ids against the vocabulary and return what they spell."""
        if ids_L is None or not len(ids_L):
            raise _bad_row("row_incomplete", column)
        if ids_L.min() < 0 or ids_L.max() >= min(
            self._side.facts.vocab_size, len(self._table.pieces)
        ):
            raise _bad_row("ids_outside_vocabulary", column)
        return spell(ids_L.astype(np.int32), self._table)

    def find_reply(self, spelled: SpelledIds, prompt_length: int) -> ContentBytes | None:
        """Find the labelled reply, if the template is the one that the row was made with."""
        if self._frame is None:
            return None
        return find_reply(spelled, self._frame, prompt_length)

    def find_same_reply(
        self, spelled: SpelledIds, content: bytes
    ) -> tuple[ContentBytes, int] | None:
        """Find the reply that shows `content`, and the length of its prompt."""
        if self._frame is None:
            return None
        return find_same_reply(spelled, self._frame, content)

    def labelled(
        self, spelled: SpelledIds, prompt_length: int, content: ContentBytes | None
    ) -> LabelledSide:
        """Return the side as ranges are checked against it."""
        return LabelledSide(
            spelled=spelled,
            prompt_length=prompt_length,
            control_ids=self._control_ids,
            is_cut=content is None or not content.is_whole,
        )


def _prompt_length(ids_L: Int32Array, labels_L: Int64Array | None, column: str) -> int:
    """Return where the labels begin; behind that they must be the ids."""
    if labels_L is None:
        raise _bad_row("row_incomplete", column)
    is_labelled_L = labels_L != _UNLABELLED
    if not is_labelled_L.any():
        raise _bad_row("labels_empty", column)
    start = int(np.argmax(is_labelled_L))
    if not np.array_equal(labels_L[start:], ids_L[start:]) or len(labels_L) != len(ids_L):
        raise _bad_row("labels_malformed", column)
    return start


def _bad_row(reason: str, column: str) -> DataError:
    return DataError(f"{column}: {ROW_FAULTS[reason]}", reason=reason)


def _counted(fault: str | None, *, is_known: bool) -> Counter[str]:
    counts = Counter(num_rows_unverified=int(not is_known))
    if fault is not None:
        counts.update({"num_rows_repaired": 1, f"num_repaired_{fault}": 1})
    return counts


def _range_of(
    student: SpelledIds,
    content: ContentBytes | None,
    teacher: SpelledIds,
    teacher_content: ContentBytes | None,
) -> Range | None:
    if content is None or teacher_content is None:
        return None
    ours = student.tokens_within(content.byte_start, content.byte_end)
    theirs = teacher.tokens_within(teacher_content.byte_start, teacher_content.byte_end)
    return (*theirs, *ours)


def _content_of(spelled: SpelledIds, start: int, end: int) -> ContentBytes:
    """Take a published range for the content; it is whole if anything stands behind it."""
    return ContentBytes(
        byte_start=int(spelled.bounds_M[start]),
        byte_end=int(spelled.bounds_M[end]),
        is_whole=end < len(spelled.ids_L),
    )


def _stacked(a_N: Int64Array | None, b_N: Int64Array | None) -> npt.NDArray[np.int64] | None:
    if a_N is None or b_N is None or len(a_N) != len(b_N):
        return None
    return np.stack([a_N, b_N], axis=1)


def _within_contents(
    pairs_P2: Int32Array,
    student: SpelledIds,
    content: ContentBytes,
    teacher: SpelledIds,
    teacher_content: ContentBytes,
) -> Int32Array:
    """Leave out the pairs behind the content, which published rows never have."""
    first, last = student.tokens_within(content.byte_start, content.byte_end)
    start, end = teacher.tokens_within(teacher_content.byte_start, teacher_content.byte_end)
    a_P, b_P = pairs_P2[:, 0], pairs_P2[:, 1]
    return pairs_P2[(a_P >= first) & (a_P < last) & (b_P >= start) & (b_P < end)]


def _of_pairs(
    pairs_P2: Int32Array,
    student: SpelledIds,
    teacher: SpelledIds,
    prompt_length: int,
    counts: Counter[str],
) -> _Aligned:
    """Take pairs as they are; a side that ends with its last pair was cut there."""
    last, teacher_last = pairs_P2[-1].tolist()
    return _Aligned(
        student=SideTokens(
            ids_L=student.ids_L,
            prompt_length=prompt_length,
            is_whole=last < len(student.ids_L) - 1,
        ),
        teacher=SideTokens(
            ids_L=teacher.ids_L,
            prompt_length=int(pairs_P2[0, 1]),
            is_whole=teacher_last < len(teacher.ids_L) - 1,
        ),
        aligned_RX=pairs_P2,
        counts=counts,
    )


def _tokens(chat: RenderedChat, content: ContentBytes) -> SideTokens:
    return SideTokens(ids_L=chat.ids_L, prompt_length=chat.prompt_length, is_whole=content.is_whole)
