"""A conversation as ids of both sides: rendered, cut, filled with EOS and aligned.

Cutting follows the published pipeline: a reply that is too long is cut and kept, a prompt that
leaves no room for a reply drops the row. Behind the reply EOS fills the last block; these positions
are labelled and maskable, which teaches the student to stop. What was cut on either side is no part
of the alignment: a chunk that lost a token on the teacher's side has no log-prob to learn from.
Costs about 1 ms a conversation when both sides render alike, 2 ms when they do not.

Shapes: L positions, P pairs, C chunks.
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
        cut = _cut_and_fill(chat, self.student, self._student_block, "prompt_too_long")
        teacher_cut = _cut_and_fill(
            teacher_chat, self.teacher, self._teacher_block, "teacher_prompt_too_long"
        )
        counts = Counter(
            num_truncated=int(cut.num_kept < len(chat.ids_L)),
            num_teacher_truncated=int(teacher_cut.num_kept < len(teacher_chat.ids_L)),
            num_prompts_ending_at_content=int(chat.prompt_edge == "content"),
            num_turns_cut=chat.num_turns_cut,
        )
        if self.alignment == "positions":
            alignment_RX = self._runs(chat, teacher_chat, cut, teacher_cut)
            end_R = alignment_RX[:, 0] + alignment_RX[:, 2]
        else:
            alignment_RX, num_edge_bytes = _chunks(chat, teacher_chat, cut, teacher_cut)
            counts["num_edge_bytes_left_out"] = num_edge_bytes
            end_R = alignment_RX[:, 1]
        if not (end_R > chat.prompt_length).any():
            raise DataError(DROP_REASONS["nothing_aligned"], reason="nothing_aligned")
        sample = PreparedSample(
            sample_id=sample_id,
            source=source,
            student_ids_L=cut.ids_L,
            prompt_length=chat.prompt_length,
            teacher_ids_L=teacher_cut.ids_L,
            alignment_RX=alignment_RX,
        )
        return EncodedSample(sample=sample, counts=+counts)

    def _runs(
        self, chat: RenderedChat, teacher_chat: RenderedChat, cut: "_Cut", teacher_cut: "_Cut"
    ) -> Int32Array:
        """Pair what survived the cut, and the EOS fill of both sides in order: (R, 3)."""
        assert self.shared_vocab_size is not None
        a_P, b_P = align_positions(chat, teacher_chat)
        survives_P = (a_P < cut.num_kept) & (b_P < teacher_cut.num_kept)
        # A side that was cut has no fill, so fill is never paired with fill of another place.
        num_fill = min(cut.num_fill, teacher_cut.num_fill)
        fill = np.arange(num_fill, dtype=np.int32)
        a_P = np.concatenate([a_P[survives_P], cut.num_kept + fill])
        b_P = np.concatenate([b_P[survives_P], teacher_cut.num_kept + fill])
        # Equal ids beyond the shared ones are different tokens.
        ids_P = cut.ids_L[a_P]
        same_P = (ids_P == teacher_cut.ids_L[b_P]) & (ids_P < self.shared_vocab_size)
        return positions_to_runs(a_P[same_P], b_P[same_P])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Cut:
    """`ids_L`: the first `num_kept` tokens of a rendering, then EOS to the end of the block."""

    ids_L: Int32Array
    num_kept: int

    @property
    def num_fill(self) -> int:
        return len(self.ids_L) - self.num_kept


def _render(messages: Sequence[Mapping[str, Any]], side: Side) -> RenderedChat:
    return render_chat(messages, side.tokenizer, template_kwargs=side.template_kwargs)


def _cut_and_fill(chat: RenderedChat, side: Side, block_size: int, reason: str) -> _Cut:
    if chat.prompt_length >= side.max_length:
        raise DataError(
            f"prompt of {chat.prompt_length} tokens: expected fewer than max_length = "
            f"{side.max_length}",
            reason=reason,
        )
    ids_L = chat.ids_L[: side.max_length]
    fill_L = np.full(-len(ids_L) % block_size, side.eos_token_id, dtype=np.int32)
    return _Cut(ids_L=np.concatenate([ids_L, fill_L]), num_kept=len(ids_L))


def _chunks(
    chat: RenderedChat, teacher_chat: RenderedChat, cut: _Cut, teacher_cut: _Cut
) -> tuple[Int32Array, int]:
    """Return the reply's chunks that survived the cut, (C, 4), and the edge bytes in no chunk."""
    aligned = align_chats(chat, teacher_chat)
    survives_C = (aligned.chunks[:, 1] <= cut.num_kept) & (
        aligned.chunks[:, 3] <= teacher_cut.num_kept
    )
    return aligned.chunks[aligned.in_response & survives_C], aligned.edge_bytes[-1]


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
