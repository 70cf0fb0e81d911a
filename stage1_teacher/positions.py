"""Which positions of two renderings carry the same token, for one tokenizer and two templates.

A content is tokenised alike under both templates except at its edges, so tokens pair up by content:
same message, same bytes of it, same id. Behind the reply the end-of-turn tokens pair up as long as
they are equal, because the student must learn to stop from the teacher as well. Template tokens
elsewhere have no partner: what stands before them differs. Two identical renderings pair up whole.
Pairs are stored as runs (a_start, b_start, length), one per message instead of 2 L numbers.

Suffixes: L tokens, M = L + 1 boundaries, P pairs, R runs.
"""

import numpy as np

from stage1_teacher.chat import MessageSpan, RenderedChat
from stage1_teacher.token_bytes import Int64Array
from tide_cache.alignment import Int32Array
from tide_cache.errors import DataError


def align_positions(chat_a: RenderedChat, chat_b: RenderedChat) -> tuple[Int32Array, Int32Array]:
    """Pair the positions of two renderings of one conversation by one tokenizer.

    Returns a_positions, b_positions: int32 (P,), both strictly ascending, with equal ids. Raises
    DataError (`bytes_differ`) if the two have different numbers of messages.
    """
    if len(chat_a.messages) != len(chat_b.messages):
        raise DataError(
            f"two renderings of one conversation: expected as many messages, got "
            f"{len(chat_a.messages)} and {len(chat_b.messages)}",
            reason="bytes_differ",
        )
    if np.array_equal(chat_a.ids_L, chat_b.ids_L):
        everything = np.arange(len(chat_a.ids_L), dtype=np.int32)
        return everything, everything.copy()
    parts = [
        _pair_contents(chat_a, span_a, chat_b, span_b)
        for span_a, span_b in zip(chat_a.messages, chat_b.messages, strict=True)
    ]
    parts.append(_pair_ends(chat_a, chat_b))
    a_P, b_P = np.concatenate(parts, axis=1).astype(np.int32)
    return a_P, b_P


def positions_to_runs(a_P: Int32Array, b_P: Int32Array) -> Int32Array:
    """Join pairs of neighbouring positions into runs: int32 (R, 3), a_start, b_start, length."""
    if not len(a_P):
        return np.empty((0, 3), dtype=np.int32)
    is_first = np.ones(len(a_P), dtype=bool)
    is_first[1:] = (np.diff(a_P) != 1) | (np.diff(b_P) != 1)
    first = np.flatnonzero(is_first)
    length_R = np.diff(np.append(first, len(a_P)))
    return np.stack([a_P[first], b_P[first], length_R], axis=1).astype(np.int32)


def runs_to_positions(runs_R3: Int32Array) -> tuple[Int32Array, Int32Array]:
    """Spread runs (R, 3) into pairs: a_positions, b_positions, int32 (P,)."""
    length_R = runs_R3[:, 2].astype(np.int64)
    first_R = np.cumsum(length_R) - length_R
    within_P = np.arange(length_R.sum()) - np.repeat(first_R, length_R)
    a_P = np.repeat(runs_R3[:, 0], length_R) + within_P
    b_P = np.repeat(runs_R3[:, 1], length_R) + within_P
    return a_P.astype(np.int32), b_P.astype(np.int32)


def _pair_contents(
    chat_a: RenderedChat, span_a: MessageSpan, chat_b: RenderedChat, span_b: MessageSpan
) -> Int64Array:
    """Pair equal tokens within one content that begin at the same byte of it: (2, P)."""
    first_a, bounds_a = _content_bounds(chat_a, span_a)
    first_b, bounds_b = _content_bounds(chat_b, span_b)
    _, at_a, at_b = np.intersect1d(bounds_a[:-1], bounds_b[:-1], return_indices=True)
    pairs_2P = np.stack([first_a + at_a, first_b + at_b])
    # The same id at the same byte spells the same bytes, so the ends need no look.
    return pairs_2P[:, chat_a.ids_L[pairs_2P[0]] == chat_b.ids_L[pairs_2P[1]]]


def _content_bounds(chat: RenderedChat, span: MessageSpan) -> tuple[int, Int64Array]:
    """Return the first token within a span, and the token boundaries there in content bytes."""
    first = int(np.searchsorted(chat.bounds_M, span.byte_start, side="left"))
    last = int(np.searchsorted(chat.bounds_M, span.byte_end, side="right"))
    return first, chat.bounds_M[first:last] - (span.byte_start - span.content_byte_start)


def _pair_ends(chat_a: RenderedChat, chat_b: RenderedChat) -> Int64Array:
    """Pair the equal tokens that directly follow the reply's content on both sides: (2, P)."""
    first_a, overhang_a = _end_of_reply(chat_a)
    first_b, overhang_b = _end_of_reply(chat_b)
    if overhang_a != overhang_b:
        return np.empty((2, 0), dtype=np.int64)
    num_tokens = min(len(chat_a.ids_L) - first_a, len(chat_b.ids_L) - first_b)
    tail_a = chat_a.ids_L[first_a : first_a + num_tokens]
    differs = np.flatnonzero(tail_a != chat_b.ids_L[first_b : first_b + num_tokens])
    run_P = np.arange(differs[0] if len(differs) else num_tokens, dtype=np.int64)
    return np.stack([first_a + run_P, first_b + run_P])


def _end_of_reply(chat: RenderedChat) -> tuple[int, int | None]:
    """Return the first token that ends behind the reply, and at which content byte it begins.

    None instead of the byte if it begins behind the reply as well, i.e. straddles nothing.
    """
    reply = chat.messages[-1]
    first = int(np.searchsorted(chat.bounds_M, reply.byte_end, side="right")) - 1
    begins_at = int(chat.bounds_M[first])
    if begins_at == reply.byte_end:
        return first, None
    return first, begins_at - reply.byte_start + reply.content_byte_start
