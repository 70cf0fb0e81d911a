"""Which tokens of two tokenizers spell the same bytes: minimal chunks of common boundaries.

Both sequences are cut wherever both have a token boundary at the same byte, so a chunk is the
smallest group of tokens that spells the same bytes on both sides, even when a token holds half a
character. The fast path is one `searchsorted` over cumulative lengths: 8M chunks/s at 200 chunks a
call and 3M at 80, where the two-pointer walk beside it makes 2M (`benchmarks/align.py`).

In a conversation only contents are aligned, message by message, from their exact spans: template
tokens are never part of a chunk, and a token that straddles a content's edge (Qwen merges the
template's line feed with the content's) is left out together with the other side's bytes.
Suffixes: C chunks, M token boundaries. `stage1_teacher.positions` is the shared-tokenizer twin.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stage1_teacher.chat import MessageSpan, RenderedChat, render_chat
from stage1_teacher.positions import align_positions, positions_to_runs, runs_to_positions
from stage1_teacher.token_bytes import Int64Array
from tide_cache.alignment import Int32Array
from tide_cache.errors import DataError
from tide_cache.geometry import BoolArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "MessageAlignment",
    "align_bytes",
    "align_bytes_reference",
    "align_chats",
    "align_messages",
    "align_positions",
    "positions_to_runs",
    "runs_to_positions",
]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MessageAlignment:
    """Two renderings of one conversation and the chunks that their contents share.

    `chunks` int32 (C, 4): a_start, a_end, b_start, b_end in token positions, ascending on both
    sides. `in_response` bool (C,): the chunk lies in the last assistant message and in the labelled
    part on both sides. Per message, `edge_bytes` counts content bytes that lie in no chunk because
    a token straddles the content's edge, `trimmed_bytes` those that a template left out.
    """

    chat_a: RenderedChat
    chat_b: RenderedChat
    chunks: Int32Array
    in_response: BoolArray
    edge_bytes: tuple[int, ...]
    trimmed_bytes: tuple[int, ...]

    @property
    def ids_a(self) -> Int32Array:
        """Token ids of the first rendering, int32."""
        return self.chat_a.ids_L

    @property
    def ids_b(self) -> Int32Array:
        """Token ids of the second rendering, int32."""
        return self.chat_b.ids_L

    @property
    def num_edge_bytes_left_out(self) -> int:
        """Bytes of all contents that were left out at an edge."""
        return sum(self.edge_bytes)


def align_bytes(lengths_a: npt.ArrayLike, lengths_b: npt.ArrayLike) -> Int32Array:
    """Cut two token sequences that spell the same bytes into minimal common chunks.

    `lengths_*`: bytes of each token, integers >= 0. Returns int32 (C, 4): a_start, a_end, b_start,
    b_end, tiling both sequences. A token of zero bytes opens the chunk behind it, or closes the
    last one; sequences without any byte give no chunk. Raises DataError if the totals differ.
    """
    bounds_a, bounds_b = _bounds(lengths_a, "lengths_a"), _bounds(lengths_b, "lengths_b")
    _check_totals(int(bounds_a[-1]), int(bounds_b[-1]))
    return _chunks_between(bounds_a, bounds_b)


def align_bytes_reference(lengths_a: npt.ArrayLike, lengths_b: npt.ArrayLike) -> Int32Array:
    """Do what `align_bytes` does by walking both sequences with one pointer each."""
    a, b = np.asarray(lengths_a).tolist(), np.asarray(lengths_b).tolist()
    _check_totals(sum(a), sum(b))
    chunks: list[tuple[int, int, int, int]] = []
    a_start = b_start = at_a = at_b = bytes_a = bytes_b = 0
    while at_a < len(a) or at_b < len(b):
        if at_b == len(b) or (at_a < len(a) and bytes_a <= bytes_b):
            bytes_a += a[at_a]
            at_a += 1
        else:
            bytes_b += b[at_b]
            at_b += 1
        if bytes_a == bytes_b > 0:
            chunks.append((a_start, at_a, b_start, at_b))
            a_start, b_start, bytes_a, bytes_b = at_a, at_b, 0, 0
    if chunks:
        # What is left are tokens of zero bytes.
        chunks[-1] = (chunks[-1][0], len(a), chunks[-1][2], len(b))
    return np.array(chunks, dtype=np.int32).reshape(-1, 4)


def align_messages(
    messages: Sequence[Mapping[str, Any]],
    tokenizer_a: "PreTrainedTokenizerBase",
    tokenizer_b: "PreTrainedTokenizerBase",
) -> MessageAlignment:
    """Render a conversation for both tokenizers and align the contents of its messages.

    Raises DataError with a `reason` of `stage1_teacher.chat.REFUSALS`.
    """
    return align_chats(render_chat(messages, tokenizer_a), render_chat(messages, tokenizer_b))


def align_chats(chat_a: RenderedChat, chat_b: RenderedChat) -> MessageAlignment:
    """Align two renderings of the same conversation.

    Where a template trims a content, the part that both sides show is aligned. Raises DataError
    (`bytes_differ`) if the two do not show the same contents.
    """
    text_a, text_b = chat_a.text.encode(), chat_b.text.encode()
    parts, edge_bytes, trimmed_bytes = [], [], []
    for number, (span_a, span_b) in enumerate(_paired(chat_a, chat_b), start=1):
        start_a, start_b, num_bytes = _common_part(span_a, span_b)
        shown_a = text_a[start_a : start_a + num_bytes]
        if shown_a != text_b[start_b : start_b + num_bytes]:
            raise _other_text(number, len(chat_a.messages))
        chunks_C4 = _align_part(chat_a.bounds_M, chat_b.bounds_M, start_a, start_b, num_bytes)
        parts.append(chunks_C4)
        edge_bytes.append(num_bytes - _num_covered(chunks_C4, chat_a.bounds_M))
        trimmed_bytes.append(span_a.num_content_bytes - num_bytes)
    chunks_C4 = np.concatenate(parts)
    in_response_C = (
        (np.arange(len(chunks_C4)) >= len(chunks_C4) - len(parts[-1]))
        & (chunks_C4[:, 0] >= chat_a.prompt_length)
        & (chunks_C4[:, 2] >= chat_b.prompt_length)
    )
    return MessageAlignment(
        chat_a=chat_a,
        chat_b=chat_b,
        chunks=chunks_C4,
        in_response=in_response_C,
        edge_bytes=tuple(edge_bytes),
        trimmed_bytes=tuple(trimmed_bytes),
    )


def _align_part(
    bounds_a: Int64Array, bounds_b: Int64Array, start_a: int, start_b: int, num_bytes: int
) -> Int32Array:
    """Align the tokens that lie within one content on both sides, in positions of the rendering."""
    first_a, inside_a = _inside(bounds_a, start_a, num_bytes)
    first_b, inside_b = _inside(bounds_b, start_b, num_bytes)
    offsets = np.array([first_a, first_a, first_b, first_b], dtype=np.int32)
    return _chunks_between(inside_a, inside_b) + offsets


def _inside(bounds_M: Int64Array, start: int, num_bytes: int) -> tuple[int, Int64Array]:
    """Return the first boundary in [start, start + num_bytes], and all of them, from `start` on."""
    first = int(bounds_M.searchsorted(start, side="left"))
    last = int(bounds_M.searchsorted(start + num_bytes, side="right"))
    return first, bounds_M[first:last] - start


def _chunks_between(bounds_a: Int64Array, bounds_b: Int64Array) -> Int32Array:
    """Make a chunk of every two consecutive bytes at which both sides have a token boundary."""
    if not len(bounds_a) or not len(bounds_b):
        return np.empty((0, 4), dtype=np.int32)
    # Array methods and `nonzero` here: their np.* twins take half of the time of a short message.
    at_b = bounds_b.searchsorted(bounds_a)
    is_common = bounds_b.take(at_b, mode="clip") == bounds_a
    # Of equal boundaries the first counts, so a token of zero bytes opens the chunk behind it...
    is_common[1:] &= bounds_a[1:] != bounds_a[:-1]
    common_a = is_common.nonzero()[0]
    common_b = at_b[common_a]
    if len(common_a) < 2:
        return np.empty((0, 4), dtype=np.int32)
    # ...except at the end, where there is none behind it.
    last = bounds_a[common_a[-1]]
    common_a[-1] = bounds_a.searchsorted(last, side="right") - 1
    common_b[-1] = bounds_b.searchsorted(last, side="right") - 1
    chunks_C4 = np.empty((len(common_a) - 1, 4), dtype=np.int32)
    chunks_C4[:, 0], chunks_C4[:, 1] = common_a[:-1], common_a[1:]
    chunks_C4[:, 2], chunks_C4[:, 3] = common_b[:-1], common_b[1:]
    return chunks_C4


def _num_covered(chunks_C4: Int32Array, bounds_a: Int64Array) -> int:
    if not len(chunks_C4):
        return 0
    return int(bounds_a[chunks_C4[-1, 1]] - bounds_a[chunks_C4[0, 0]])


def _paired(chat_a: RenderedChat, chat_b: RenderedChat) -> list[tuple[MessageSpan, MessageSpan]]:
    if len(chat_a.messages) != len(chat_b.messages):
        raise DataError(
            f"two renderings of one conversation: expected as many messages, got "
            f"{len(chat_a.messages)} and {len(chat_b.messages)}",
            reason="bytes_differ",
        )
    return list(zip(chat_a.messages, chat_b.messages, strict=True))


def _common_part(span_a: MessageSpan, span_b: MessageSpan) -> tuple[int, int, int]:
    """Return where the part of a content that both sides show begins in each, and its length."""
    start = max(span_a.content_byte_start, span_b.content_byte_start)
    end = min(span_a.content_byte_end, span_b.content_byte_end)
    start_a = span_a.byte_start + start - span_a.content_byte_start
    start_b = span_b.byte_start + start - span_b.content_byte_start
    return start_a, start_b, max(end - start, 0)


def _bounds(lengths: npt.ArrayLike, name: str) -> Int64Array:
    lengths_L = np.asarray(lengths)
    is_integer = lengths_L.dtype.kind in "iu" or not lengths_L.size
    if lengths_L.ndim != 1 or not is_integer or (lengths_L.size and lengths_L.min() < 0):
        raise DataError(
            f"{name}: expected one dimension of integers >= 0, got {lengths_L.dtype} of shape "
            f"{lengths_L.shape}",
            hint="take the bytes of each token from stage1_teacher.token_bytes",
            reason="bytes_differ",
        )
    bounds_M = np.zeros(len(lengths_L) + 1, dtype=np.int64)
    lengths_L.cumsum(dtype=np.int64, out=bounds_M[1:])
    return bounds_M


def _check_totals(num_bytes_a: int, num_bytes_b: int) -> None:
    if num_bytes_a != num_bytes_b:
        raise DataError(
            f"expected two token sequences of the same text, got {num_bytes_a} and {num_bytes_b} "
            "bytes",
            hint="normalise the text to NFC before tokenising and align one content at a time",
            reason="bytes_differ",
        )


def _other_text(number: int, num_messages: int) -> DataError:
    return DataError(
        f"message {number} of {num_messages}: expected the same content in both renderings, got "
        "different bytes",
        hint="render both from the same messages",
        reason="bytes_differ",
    )
