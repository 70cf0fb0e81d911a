"""A conversation as ids of both sides: rendered, cut, filled with EOS and aligned.

Cutting follows the published pipeline: a reply that is too long is cut and kept, a prompt that
leaves no room for a reply drops the row. Behind the reply EOS fills the last block; these positions
are labelled and maskable, which teaches the student to stop. What was cut on either side is no part
of the alignment: a chunk that lost a token on the teacher's side has no log-prob to learn from.
Costs about 1 ms a conversation when both sides render alike, 2 ms when they do not.

`cut`, `align` and `finish` are the three steps; rows that come tokenised (`published`) take the
same ones.

Shapes: L positions, P pairs, C chunks; X is 2 for pairs, 3 for runs and 4 for chunks.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stage1_teacher.align import align_chats, align_positions, positions_to_runs
from stage1_teacher.chat import RenderedChat, render_chat
from stage1_teacher.premask import PreparedSample
from stage1_teacher.prepare_config import PrepareConfig, SideConfig
from stage1_teacher.tokenizers import (
    load_tokenizer,
    read_chat_template,
    shared_vocab_size,
    tokenizer_facts,
)
from tide_cache.alignment import Int32Array
from tide_cache.errors import ConfigError, DataError
from tide_cache.manifest import TokenizerFacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MIN_SHARED = 0.5

DROP_REASONS: Mapping[str, str] = {
    "prompt_too_long": "the prompt leaves no room for a reply within student.max_length",
    "teacher_prompt_too_long": "the prompt leaves no room for a reply within teacher.max_length",
    "mask_token_in_text": "the clean text holds the mask token of a side",
    "nothing_aligned": "no token of the reply has a counterpart on the teacher's side",
}
"""The reasons for which `Encoder` drops a row, beside `stage1_teacher.chat.REFUSALS`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Side:
    """One side, ready to encode: its tokenizer carries the chat template that the config asks for.

    `facts` and `chat_template` are for the manifest.
    """

    tokenizer: "PreTrainedTokenizerBase"
    chat_template: str
    template_kwargs: Mapping[str, Any]
    max_length: int
    eos_token_id: int
    facts: TokenizerFacts


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SideTokens:
    """One side of a sample before it is cut: int32 ids (L,), labelled from `prompt_length` on.

    `is_whole` is False where the end of the reply is missing: no EOS follows it in truth.
    """

    ids_L: Int32Array
    prompt_length: int
    is_whole: bool = True


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedSample:
    """A prepared sample and what is worth counting of it."""

    sample: PreparedSample
    counts: Counter[str]


def load_sides(config: PrepareConfig) -> tuple[Side, Side]:
    """Load both tokenizers; one object serves both sides where they render alike.

    Raises ConfigError when a tokenizer cannot be loaded or lacks EOS or a chat template.
    """
    student = load_side(config.student, "student")
    max_length = config.teacher_side.max_length
    if config.teacher_side == config.student.model_copy(update={"max_length": max_length}):
        return student, replace(student, max_length=max_length)
    return student, load_side(config.teacher_side, "teacher")


def load_side(config: SideConfig, field: str) -> Side:
    """Load the tokenizer of one side; `field` is its place in the config, for errors."""
    tokenizer = load_tokenizer(config.tokenizer, config.revision)
    if config.chat_template is not None:
        tokenizer.chat_template = read_chat_template(config.chat_template)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{field}.tokenizer: {config.tokenizer!r} has no chat template",
            hint=f"name one in {field}.chat_template",
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{field}.tokenizer: {config.tokenizer!r} has no EOS token, with which replies are "
            "filled",
            hint="set eos_token in its tokenizer_config.json",
        )
    return Side(
        tokenizer=tokenizer,
        chat_template=tokenizer.get_chat_template(),
        template_kwargs=config.template_kwargs,
        max_length=config.max_length,
        eos_token_id=tokenizer.eos_token_id,
        facts=tokenizer_facts(tokenizer, config.tokenizer),
    )


class Encoder:
    """Encodes conversations for one config; a pure function of the messages.

    `shared_vocab_size` counts the leading ids that are the same token on both sides, None for
    `alignment: chunks`. Raises ConfigError where tokenizers share too few for their alignment.
    """

    def __init__(self, config: PrepareConfig, student: Side, teacher: Side) -> None:
        self.student = student
        self.teacher = teacher
        self.alignment = config.alignment
        self.shared_vocab_size: int | None = None
        if self.alignment == "positions":
            self.shared_vocab_size = _shared_vocab_size(student, teacher)
        self._student_block = config.block_size
        # With two tokenizers the teacher runs on its own sequence alone, which needs no blocks.
        self._teacher_block = config.block_size if self.alignment == "positions" else 1

    def encode(
        self, messages: Sequence[Mapping[str, Any]], *, sample_id: str, source: str
    ) -> EncodedSample:
        """Encode one conversation.

        Raises DataError with a `reason` of `DROP_REASONS` or `stage1_teacher.chat.REFUSALS`.
        """
        chat = _render(messages, self.student)
        if self.teacher.tokenizer is self.student.tokenizer:
            teacher_chat = chat
        else:
            teacher_chat = _render(messages, self.teacher)
        cuts = self.cut(_tokens(chat), _tokens(teacher_chat))
        aligned_RX, counts = self.align(chat, teacher_chat)
        counts["num_prompts_ending_at_content"] = int(chat.prompt_edge == "content")
        counts["num_turns_cut"] = chat.num_turns_cut
        return self.finish(cuts, aligned_RX, counts, sample_id=sample_id, source=source)

    def cut(self, student: SideTokens, teacher: SideTokens) -> tuple["Cut", "Cut"]:
        """Cut both sides to their max_length and fill them to whole blocks.

        A student's reply that was cut before it came here is cut further to whole blocks, since
        EOS behind it would teach it to stop there. Raises DataError (`prompt_too_long`,
        `teacher_prompt_too_long`, `mask_token_in_text`).
        """
        ids_L = student.ids_L[: self.student.max_length]
        if not student.is_whole:
            ids_L = ids_L[: len(ids_L) // self._student_block * self._student_block]
        _check_room(student, self.student, len(ids_L), "prompt_too_long")
        teacher_ids_L = teacher.ids_L[: self.teacher.max_length]
        _check_room(teacher, self.teacher, len(teacher_ids_L), "teacher_prompt_too_long")
        for side, kept_L in ((self.student, ids_L), (self.teacher, teacher_ids_L)):
            _check_no_mask(kept_L, side)
        return (
            _fill(student, ids_L, self.student, self._student_block),
            _fill(teacher, teacher_ids_L, self.teacher, self._teacher_block),
        )

    def align(
        self, chat: RenderedChat, teacher_chat: RenderedChat
    ) -> tuple[Int32Array, Counter[str]]:
        """Align two renderings: pairs of positions (P, 2) or the reply's chunks (C, 4), and counts.

        Raises DataError (`bytes_differ`).
        """
        if self.alignment == "positions":
            return np.stack(align_positions(chat, teacher_chat), axis=1), Counter()
        aligned = align_chats(chat, teacher_chat)
        counts = Counter(num_edge_bytes_left_out=aligned.edge_bytes[-1])
        return aligned.chunks[aligned.in_response], counts

    def finish(
        self,
        cuts: tuple["Cut", "Cut"],
        aligned_RX: Int32Array,
        counts: Counter[str],
        *,
        sample_id: str,
        source: str,
    ) -> EncodedSample:
        """Restrict an alignment, as `align` returns it, to what survived the cut; add the counts.

        Raises DataError (`nothing_aligned`).
        """
        cut, teacher_cut = cuts
        if self.alignment == "positions":
            alignment_RX = self._runs(cut, teacher_cut, aligned_RX)
            end_R = alignment_RX[:, 0] + alignment_RX[:, 2]
        else:
            survives_C = aligned_RX[:, 1] <= cut.num_kept
            survives_C &= aligned_RX[:, 3] <= teacher_cut.num_kept
            alignment_RX = aligned_RX[survives_C]
            end_R = alignment_RX[:, 1]
        prompt_length = cut.tokens.prompt_length
        if not (end_R > prompt_length).any():
            raise DataError(DROP_REASONS["nothing_aligned"], reason="nothing_aligned")
        sample = PreparedSample(
            sample_id=sample_id,
            source=source,
            student_ids_L=cut.ids_L,
            prompt_length=prompt_length,
            teacher_ids_L=teacher_cut.ids_L,
            alignment_RX=alignment_RX,
        )
        truncated = Counter(
            num_truncated=int(cut.num_kept < len(cut.tokens.ids_L)),
            num_teacher_truncated=int(teacher_cut.num_kept < len(teacher_cut.tokens.ids_L)),
        )
        return EncodedSample(sample=sample, counts=truncated + counts)

    def _runs(self, cut: "Cut", teacher_cut: "Cut", pairs_P2: Int32Array) -> Int32Array:
        """Pair what survived the cut, and the EOS fill of both sides in order: (R, 3)."""
        assert self.shared_vocab_size is not None
        survives_P = (pairs_P2[:, 0] < cut.num_kept) & (pairs_P2[:, 1] < teacher_cut.num_kept)
        # A side that was cut has no fill, or none to learn from, so fill is never paired with fill
        # of another place.
        is_whole = cut.tokens.is_whole and teacher_cut.tokens.is_whole
        num_fill = min(cut.num_fill, teacher_cut.num_fill) if is_whole else 0
        fill = np.arange(num_fill, dtype=np.int32)
        a_P = np.concatenate([pairs_P2[survives_P, 0], cut.num_kept + fill])
        b_P = np.concatenate([pairs_P2[survives_P, 1], teacher_cut.num_kept + fill])
        # Equal ids beyond the shared ones are different tokens.
        ids_P = cut.ids_L[a_P]
        same_P = (ids_P == teacher_cut.ids_L[b_P]) & (ids_P < self.shared_vocab_size)
        return positions_to_runs(a_P[same_P], b_P[same_P])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cut:
    """`ids_L`: the first `num_kept` ids of `tokens`, then EOS to the end of the block."""

    tokens: SideTokens
    ids_L: Int32Array
    num_kept: int

    @property
    def num_fill(self) -> int:
        """How many EOS were added."""
        return len(self.ids_L) - self.num_kept


def _render(messages: Sequence[Mapping[str, Any]], side: Side) -> RenderedChat:
    return render_chat(messages, side.tokenizer, template_kwargs=side.template_kwargs)


def _tokens(chat: RenderedChat) -> SideTokens:
    return SideTokens(ids_L=chat.ids_L, prompt_length=chat.prompt_length)


def _check_room(tokens: SideTokens, side: Side, num_kept: int, reason: str) -> None:
    if tokens.prompt_length >= num_kept:
        raise DataError(
            f"prompt of {tokens.prompt_length} tokens: expected fewer than max_length = "
            f"{side.max_length}",
            reason=reason,
        )


def _check_no_mask(ids_L: Int32Array, side: Side) -> None:
    mask_token_id = side.facts.mask_token_id
    if mask_token_id is not None and (ids_L == mask_token_id).any():
        raise DataError(
            f"position {int(np.argmax(ids_L == mask_token_id))}: the clean text holds the mask "
            f"token of {side.facts.name!r}, id {mask_token_id}",
            reason="mask_token_in_text",
        )


def _fill(tokens: SideTokens, ids_L: Int32Array, side: Side, block_size: int) -> Cut:
    fill_L = np.full(-len(ids_L) % block_size, side.eos_token_id, dtype=np.int32)
    return Cut(tokens=tokens, ids_L=np.concatenate([ids_L, fill_L]), num_kept=len(ids_L))


def _shared_vocab_size(student: Side, teacher: Side) -> int:
    """Count the shared ids. Raises ConfigError when these are two tokenizers."""
    if student.tokenizer is teacher.tokenizer:
        return student.facts.vocab_size
    num_shared = shared_vocab_size(student.tokenizer, teacher.tokenizer)
    smaller = min(student.facts.vocab_size, teacher.facts.vocab_size)
    # Real pairs differ in a few control tokens at the end; two vocabularies share a byte alphabet.
    if num_shared < smaller * _MIN_SHARED:
        raise ConfigError(
            f"alignment: positions needs one vocabulary on both sides, but {student.facts.name!r} "
            f"and {teacher.facts.name!r} share only the first {num_shared} of {smaller} ids",
            hint="set alignment: chunks",
        )
    return num_shared
