"""A conversation as a model sees it: rendered text, token ids, and what is whose in both.

The rendering is tokenised once, as a whole, so the ids are those of inference; spans of contents
come from the template itself (`content_spans`) and token boundaries from the bytes that the ids
spell (`token_bytes`). Cost: three renderings (35 us each) and one tokenisation, 0.7 ms for a GSM8K
row. Nothing is cached per pattern of roles, because templates look at contents.

Contents are normalised to NFC first, as Qwen's tokenizer does, so that two tokenizers see the same
bytes. Text that looks like a control token (`<|im_end|>` typed by a user) becomes that token, as it
does at inference; it still spells the same bytes. Suffixes: L tokens, M = L + 1 boundaries.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import numpy as np
import numpy.typing as npt

from stage1_teacher.content_spans import ContentSpan, locate_contents
from stage1_teacher.token_bytes import Int64Array, token_bytes
from tide_cache.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptEdge = Literal["generation_prompt", "content"]

REFUSALS: Mapping[str, str] = {
    "bad_message": "a message is not a mapping with the texts 'role' and 'content'",
    "invalid_unicode": "a text holds half of a surrogate pair and has no UTF-8 form",
    "no_assistant_turn": "no message has the role 'assistant'",
    "empty_reply": "the last assistant message is empty or blank",
    "trailing_messages": "messages that are not the user's follow the last assistant message",
    "template_refused": "the chat template raised an error",
    "content_dropped": "the chat template leaves a content out",
    "content_repeated": "the chat template writes a content more than once",
    "content_rewritten": "the chat template changes a content",
    "content_reordered": "the chat template changes the order of the messages",
    "bytes_differ": "a tokenizer rewrites the text, or two renderings hold different bytes",
    "no_labelled_token": "the reply merges with the prompt into one token",
}
"""Every `reason` under which a conversation can be refused here or in `align`, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageSpan:
    """Where a message's content stands in the rendering, [start, end) in characters and in bytes.

    `content_byte_start`, `content_byte_end` is the part of the (NFC) content that the span shows;
    the rest, of `num_content_bytes` in all, was trimmed off by the template.
    """

    role: str
    char_start: int
    char_end: int
    byte_start: int
    byte_end: int
    content_byte_start: int
    num_content_bytes: int

    @property
    def content_byte_end(self) -> int:
        """End of the shown part, in bytes of the content."""
        return self.content_byte_start + self.byte_end - self.byte_start


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RenderedChat:
    """A rendered and tokenised conversation that ends with an assistant's reply.

    `ids_L` int32 (L,). `bounds_M` int64 (L + 1,): token i covers bytes [bounds_M[i],
    bounds_M[i + 1]) of the UTF-8 text. Tokens from `prompt_length` on are the labelled part: what
    the model must generate. `prompt_edge` says what that edge was taken from, `num_turns_cut` how
    many user turns behind the last reply were cut off; callers count both.
    """

    text: str
    ids_L: npt.NDArray[np.int32]
    bounds_M: Int64Array
    messages: tuple[MessageSpan, ...]
    prompt_length: int
    prompt_edge: PromptEdge
    num_turns_cut: int


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    template_kwargs: Mapping[str, Any] | None = None,
) -> RenderedChat:
    """Render, tokenise and measure a conversation; its last assistant message is the reply.

    The labelled part begins where the generation prompt ends (the rendering of everything before
    the reply with `add_generation_prompt`), so text that the template puts between the two, such as
    an empty think block, is labelled. Where that prompt is no prefix of the rendering, it begins at
    the reply's content. A token across the edge belongs to the prompt. It ends with the rendering.
    User turns behind the reply are cut off and counted; any other message there is refused.
    `template_kwargs` go to the template (`enable_thinking: false`). Raises DataError with a
    `reason` of `REFUSALS`, and ConfigError if the tokenizer has no template or no fast backend.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r}: expected a chat_template, got none",
            hint="put chat_template into its tokenizer_config.json",
        )
    turns, num_turns_cut = _reply_last(_check_messages(messages))
    template = _Template(tokenizer, turns, dict(template_kwargs or {}))
    text, spans = locate_contents([turn["content"] for turn in turns], template.render)
    text_bytes = text.encode()
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bounds_M = token_bytes(tokenizer).bounds(ids, text_bytes)
    prompt_end, prompt_edge = template.prompt_end(text, spans[-1])
    prompt_length = int(np.searchsorted(bounds_M[:-1], len(text[:prompt_end].encode())))
    if prompt_length == len(ids):
        raise DataError(
            f"conversation of {len(turns)} messages: expected labelled tokens behind the prompt, "
            f"got none of {len(ids)}: the reply is part of the prompt's last token",
            reason="no_labelled_token",
        )
    return RenderedChat(
        text=text,
        ids_L=np.asarray(ids, dtype=np.int32),
        bounds_M=bounds_M,
        messages=_measure(text, turns, spans),
        prompt_length=prompt_length,
        prompt_edge=prompt_edge,
        num_turns_cut=num_turns_cut,
    )


@dataclass(frozen=True, slots=True)
class _Template:
    tokenizer: Any
    turns: Sequence[Mapping[str, Any]]
    kwargs: Mapping[str, Any]

    def render(self, contents: Sequence[str]) -> str:
        """Render the conversation with other contents."""
        turns = [
            {**turn, "content": content} for turn, content in zip(self.turns, contents, strict=True)
        ]
        try:
            return self._apply(turns)
        except (jinja2.TemplateError, TypeError, LookupError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise DataError(
                f"conversation ({roles}): the chat template of {self.tokenizer.name_or_path!r} "
                f"refuses it: {error}",
                hint="drop the row or use a template that allows these roles",
                reason="template_refused",
            ) from error

    def prompt_end(self, text: str, reply: ContentSpan) -> tuple[int, PromptEdge]:
        """Return the character at which the labelled part begins, and how it was found."""
        if len(self.turns) == 1:
            return reply.start, "content"
        try:
            prompt = self._apply(self.turns[:-1], add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, LookupError):
            # Some templates insist on a system or a user turn, and none may be left.
            return reply.start, "content"
        if text.startswith(prompt):
            return len(prompt), "generation_prompt"
        return reply.start, "content"

    def _apply(self, turns: Sequence[Mapping[str, Any]], **options: Any) -> str:
        options = {**self.kwargs, "add_generation_prompt": False, **options}
        text: str = self.tokenizer.apply_chat_template(list(turns), tokenize=False, **options)
        return text


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with all their texts in NFC."""
    turns = []
    for number, message in enumerate(messages, start=1):
        where = f"message {number} of {len(messages)}"
        if not isinstance(message, Mapping):
            raise _bad_message(where, "a mapping with 'role' and 'content'", message)
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise _bad_message(f"{where}: {field}", "a text", message.get(field))
        turn = {
            key: _nfc(value) if isinstance(value, str) else value for key, value in message.items()
        }
        if not all(_is_utf8(value) for value in turn.values() if isinstance(value, str)):
            raise DataError(
                f"{where}: expected text with a UTF-8 form, got half of a surrogate pair",
                hint="repair the source's \\ud800-style escapes or drop the row",
                reason="invalid_unicode",
            )
        turns.append(turn)
    return turns


def _reply_last(turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Cut user turns behind the last assistant message. Returns the turns and how many were cut."""
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise DataError(
            f"conversation of {len(turns)} messages: expected one with role 'assistant', got roles "
            f"{sorted(set(roles))}",
            hint="rename the roles of the source or drop the row",
            reason="no_assistant_turn",
        )
    num_kept = len(roles) - roles[::-1].index("assistant")
    trailing = roles[num_kept:]
    if any(role != "user" for role in trailing):
        raise DataError(
            f"conversation of {len(turns)} messages: expected the last to be the assistant's, got "
            f"{', '.join(trailing)} behind it",
            hint="only user turns are cut off there; end the row with the reply to learn",
            reason="trailing_messages",
        )
    if not turns[num_kept - 1]["content"].strip():
        raise DataError(
            f"message {num_kept} of {len(turns)}: expected a reply, got a blank content",
            hint="drop the row",
            reason="empty_reply",
        )
    return turns[:num_kept], len(trailing)


def _measure(
    text: str, turns: Sequence[Mapping[str, Any]], spans: Sequence[ContentSpan]
) -> tuple[MessageSpan, ...]:
    """Give every span its bytes, walking the text once."""
    measured = []
    at_char = at_byte = 0
    for turn, span in zip(turns, spans, strict=True):
        byte_start = at_byte + _num_bytes(text[at_char : span.start])
        at_char, at_byte = span.end, byte_start + _num_bytes(text[span.start : span.end])
        measured.append(
            MessageSpan(
                role=turn["role"],
                char_start=span.start,
                char_end=span.end,
                byte_start=byte_start,
                byte_end=at_byte,
                content_byte_start=_num_bytes(turn["content"][: span.content_start]),
                num_content_bytes=_num_bytes(turn["content"]),
            )
        )
    return tuple(measured)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _nfc(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _is_utf8(text: str) -> bool:
    # Lone surrogates are the only characters without a UTF-8 form.
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _bad_message(where: str, expected: str, got: object) -> DataError:
    return DataError(
        f"{where}: expected {expected}, got {type(got).__name__}",
        hint="flatten parts of a content into one text beforehand",
        reason="bad_message",
    )
