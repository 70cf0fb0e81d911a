"""Where the reply's content stands in ids that come without their text.

A chat template puts the same bytes before and behind every last reply: its *frame*, read once from
a conversation of two letters. The bytes that ids spell, the frame and the place where the labels
begin give the content's exact span, so a tokenised row can be aligned as a conversation is. A frame
that does not fit (the row was made with another template) gives no span, never a guess.

Shapes: L tokens, M = L + 1 boundaries.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stage1_teacher.chat import MessageSpan, RenderedChat, render_chat
from stage1_teacher.token_bytes import Int64Array, TokenBytes
from tide_cache.alignment import Int32Array
from tide_cache.errors import DataError

if TYPE_CHECKING:
    from stage1_teacher.encode import Side

# Labels may begin behind a token that holds the prompt's end and the reply's first bytes.
_MAX_STRADDLING_BYTES = 32
_MAX_BYTES_OF_A_LETTER = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyFrame:
    """What stands around the last reply's content in a rendering.

    `lead` is everything between the user's content and the reply's; its last `num_head_bytes` are
    labelled (an empty think block). `tail` is everything behind the content.
    """

    lead: bytes
    num_head_bytes: int
    tail: bytes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SpelledIds:
    """Ids and what they spell: token i covers bytes [bounds_M[i], bounds_M[i + 1]) of `raw`."""

    ids_L: Int32Array
    raw: bytes
    bounds_M: Int64Array

    def tokens_within(self, byte_start: int, byte_end: int) -> tuple[int, int]:
        """Return the tokens [first, last) that lie within a span of bytes."""
        first = int(np.searchsorted(self.bounds_M, byte_start, side="left"))
        return first, max(first, int(np.searchsorted(self.bounds_M, byte_end, side="right")) - 1)

    def bytes_of(self, first: int, last: int) -> bytes:
        """Return what the tokens [first, last) spell."""
        return self.raw[self.bounds_M[first] : self.bounds_M[last]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ContentBytes:
    """The content of a reply, in bytes of the ids; not whole where its end is missing."""

    byte_start: int
    byte_end: int
    is_whole: bool


def spell(ids_L: Int32Array, table: TokenBytes) -> SpelledIds:
    """Return ids with the bytes that they spell; the ids must lie in the vocabulary."""
    bounds_M = np.zeros(len(ids_L) + 1, dtype=np.int64)
    np.cumsum(table.lengths_V[ids_L], out=bounds_M[1:])
    return SpelledIds(ids_L=ids_L, raw=table.spell(ids_L.tolist()), bounds_M=bounds_M)


def read_frame(side: "Side") -> ReplyFrame | None:
    """Read the frame off a side's chat template.

    None where it renders no plain chat, or puts nothing between the turns.
    """
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    try:
        chat = render_chat(messages, side.tokenizer, template_kwargs=side.template_kwargs)
    except DataError:
        return None
    raw = chat.text.encode()
    user, reply = chat.messages
    if user.byte_end == reply.byte_start:
        return None
    label_start = int(chat.bounds_M[chat.prompt_length])
    return ReplyFrame(
        lead=raw[user.byte_end : reply.byte_start],
        num_head_bytes=max(reply.byte_start - label_start, 0),
        tail=raw[reply.byte_end :],
    )


def find_reply(spelled: SpelledIds, frame: ReplyFrame, prompt_length: int) -> ContentBytes | None:
    """Find the content of a reply that is labelled from `prompt_length` on."""
    label_start = int(spelled.bounds_M[prompt_length])
    search_from = max(0, label_start - len(frame.lead) - _MAX_STRADDLING_BYTES)
    at = spelled.raw.find(frame.lead, search_from)
    start = at + len(frame.lead)
    if at < 0 or start > label_start + frame.num_head_bytes:
        return None
    return _until_tail(spelled, frame, start)


def find_same_reply(
    spelled: SpelledIds, frame: ReplyFrame, content: bytes
) -> tuple[ContentBytes, int] | None:
    """Find the last reply with the bytes of `content`, as far as both go, without labels.

    Returns its span and the length of the prompt, in tokens.
    """
    content, at = content.lstrip(), len(spelled.raw)
    while (at := spelled.raw.rfind(frame.lead, 0, at + len(frame.lead) - 1)) >= 0:
        start = at + len(frame.lead)
        found = _until_tail(spelled, frame, start)
        shown = spelled.raw[found.byte_start : found.byte_end].lstrip()
        num_bytes = min(len(shown), len(content))
        if num_bytes and shown[:num_bytes] == content[:num_bytes]:
            prompt_end = start - frame.num_head_bytes
            return found, int(np.searchsorted(spelled.bounds_M[:-1], prompt_end))
    return None


def as_chats(
    student: SpelledIds,
    student_content: ContentBytes,
    student_prompt_length: int,
    teacher: SpelledIds,
    teacher_content: ContentBytes,
    teacher_prompt_length: int,
) -> tuple[RenderedChat, RenderedChat]:
    """Return both sides as renderings of one conversation of which only the reply is known.

    White space that only one side's template left in front of the content shifts its span. Raises
    DataError (`bytes_differ`) for ids that spell no text.
    """
    indent, teacher_indent = (
        _num_leading_spaces(spelled.raw[content.byte_start : content.byte_end])
        for spelled, content in ((student, student_content), (teacher, teacher_content))
    )
    widest = max(indent, teacher_indent)
    return (
        _as_chat(student, student_content, student_prompt_length, widest - indent),
        _as_chat(teacher, teacher_content, teacher_prompt_length, widest - teacher_indent),
    )


def _until_tail(spelled: SpelledIds, frame: ReplyFrame, start: int) -> ContentBytes:
    """End the content before the tail, or before as much of it as a cut left."""
    raw, tail = spelled.raw, frame.tail
    shown = next(
        (n for n in range(len(tail), 0, -1) if raw.endswith(tail[:n]) and len(raw) - n >= start), 0
    )
    return ContentBytes(
        byte_start=start, byte_end=max(start, len(raw) - shown), is_whole=shown == len(tail)
    )


def _as_chat(
    spelled: SpelledIds, content: ContentBytes, prompt_length: int, content_byte_start: int
) -> RenderedChat:
    text = _decode(spelled.raw)
    byte_end = min(content.byte_end, len(text.encode()))
    byte_start = min(content.byte_start, byte_end)
    span = MessageSpan(
        role="assistant",
        char_start=len(spelled.raw[:byte_start].decode(errors="replace")),
        char_end=len(spelled.raw[:byte_end].decode(errors="replace")),
        byte_start=byte_start,
        byte_end=byte_end,
        content_byte_start=content_byte_start,
        num_content_bytes=content_byte_start + byte_end - byte_start,
    )
    return RenderedChat(
        text=text,
        ids_L=spelled.ids_L,
        bounds_M=spelled.bounds_M,
        messages=(span,),
        prompt_length=prompt_length,
        prompt_edge="generation_prompt",
        num_turns_cut=0,
    )


def _decode(raw: bytes) -> str:
    """Decode what ids spell; only a letter at the very end may be cut."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        if len(raw) - error.start >= _MAX_BYTES_OF_A_LETTER:
            raise DataError(
                f"the ids spell no text: byte {error.start} of {len(raw)} is no UTF-8",
                reason="bytes_differ",
            ) from error
        return raw[: error.start].decode()


def _num_leading_spaces(raw: bytes) -> int:
    return len(raw) - len(raw.lstrip())
