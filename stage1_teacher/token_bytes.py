"""What every token id spells, in bytes, and where the tokens of a text begin and end.

The offsets that tokenizers report count characters, so a character split over several tokens gives
them all the same offsets. Bytes have no such gap: when the pieces of the ids, joined, are the UTF-8
text itself, the running sum of their lengths is the exact boundary of every token. The join is
checked for every text (15 us for 500 tokens), so a tokenizer that rewrites its input is refused
instead of being aligned wrongly. A table of 152k ids takes 0.4 s to make and is kept per tokenizer.

Understood: byte-level BPE, sentencepiece-style pieces (`▁`, byte fallback `<0xE2>`, an invented
leading space) and literal pieces (character-level tokenizers).
Suffixes: V ids, L tokens, M = L + 1 boundaries.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from tide_cache.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Int64Array = npt.NDArray[np.int64]
_META_SPACE = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CONTEXT_BYTES = 12


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenBytes:
    """The bytes of every id: `pieces[id]`, and `lengths_V` int32 (V,).

    Ids that the vocabulary leaves out spell nothing (length 0).
    """

    pieces: tuple[bytes, ...]
    lengths_V: npt.NDArray[np.int32]

    def spell(self, ids: Sequence[int]) -> bytes:
        """Join the bytes of a list of ids."""
        pieces = self.pieces
        return b"".join([pieces[token] for token in ids])

    def bounds(self, ids: Sequence[int], text: bytes) -> Int64Array:
        """Return the byte at which every token of `text` begins, and the end: int64 (L + 1,).

        Token i covers bytes [bounds[i], bounds[i + 1]). A leading space that the tokenizer invented
        counts for nothing. Raises DataError (`bytes_differ`) if the ids spell another text.
        """
        if self.spell(ids) == text:
            lengths_L = self.lengths_V[np.asarray(ids, dtype=np.int64)]
        else:
            lengths_L = np.array(self._walk(ids, text), dtype=np.int32)
        bounds_M = np.zeros(len(lengths_L) + 1, dtype=np.int64)
        np.cumsum(lengths_L, out=bounds_M[1:])
        return bounds_M

    def _walk(self, ids: Sequence[int], text: bytes) -> list[int]:
        """Follow the tokens through `text`, forgiving one invented space before a piece."""
        at, lengths = 0, []
        for index, token in enumerate(ids):
            piece = self.pieces[token]
            if not text.startswith(piece, at):
                if not (piece.startswith(b" ") and text.startswith(piece[1:], at)):
                    raise _rewritten(index, token, piece, text, at)
                piece = piece[1:]
            lengths.append(len(piece))
            at += len(piece)
        if at != len(text):
            raise _rewritten(len(ids), None, b"", text, at)
        return lengths


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> TokenBytes:
    """Return the byte table of a fast tokenizer, made once and again after tokens were added.

    Added tokens spell their literal text. Raises ConfigError for a tokenizer without a fast
    (`tokenizers`) backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"tokenizer {_name(tokenizer)}: expected a fast tokenizer, got "
            f"{type(tokenizer).__name__}",
            hint="save it with a tokenizer.json (`use_fast=True`) and name that folder",
        )
    num_ids = len(tokenizer)
    known = _TABLES.get(tokenizer)
    if known is None or known[0] != num_ids:
        known = (num_ids, _read_table(backend))
        _TABLES[tokenizer] = known
    return known[1]


def token_byte_lengths(tokenizer: "PreTrainedTokenizerBase") -> npt.NDArray[np.int32]:
    """Return how many bytes every id spells, int32 (V,). Raises as `token_bytes`."""
    return token_bytes(tokenizer).lengths_V


_TABLES: "WeakKeyDictionary[Any, tuple[int, TokenBytes]]" = WeakKeyDictionary()


def _read_table(backend: Any) -> TokenBytes:
    read_piece = _piece_reader(backend)
    spelled = {
        token: read_piece(piece)
        for piece, token in backend.get_vocab(with_added_tokens=False).items()
    }
    # Added tokens are matched in the raw text, whatever alphabet the model's own pieces use.
    spelled |= {
        token: added.content.encode() for token, added in backend.get_added_tokens_decoder().items()
    }
    pieces = tuple(spelled.get(token, b"") for token in range(max(spelled, default=-1) + 1))
    lengths_V = np.fromiter(map(len, pieces), dtype=np.int32, count=len(pieces))
    return TokenBytes(pieces=pieces, lengths_V=lengths_V)


def _piece_reader(backend: Any) -> Callable[[str], bytes]:
    words = _component_words(backend)
    if "ByteLevel" in words:
        return _read_byte_level
    has_byte_pieces = "ByteFallback" in words or getattr(backend.model, "byte_fallback", False)
    has_meta_space = _META_SPACE in words

    def read(piece: str) -> bytes:
        if has_byte_pieces and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return (piece.replace(_META_SPACE, " ") if has_meta_space else piece).encode()

    return read


def _component_words(backend: Any) -> set[str]:
    """Collect every string in the settings of the parts that decide how a piece is written."""
    parts = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    pending: list[Any] = [json.loads(part.__getstate__()) for part in parts if part is not None]
    words: set[str] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)
        elif isinstance(node, str):
            words.add(node)
    return words


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes a byte as itself where Latin-1 prints it, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(hidden)
    }


_BYTE_OF = _byte_alphabet()


def _read_byte_level(piece: str) -> bytes:
    try:
        return bytes([_BYTE_OF[letter] for letter in piece])
    except KeyError:
        # A piece that was put into the vocabulary as plain text; the decoder reads it so, too.
        return piece.encode()


def _rewritten(index: int, token: int | None, piece: bytes, text: bytes, at: int) -> DataError:
    here = text[at : at + max(len(piece), _CONTEXT_BYTES)]
    got = f"token {index} (id {token}) spells {piece!r}" if token is not None else "the tokens end"
    return DataError(
        f"the tokenizer does not spell the text it was given: at byte {at} of {len(text)} {got} "
        f"where the text has {here!r}",
        hint="its normaliser rewrites this text; drop the row or normalise the text beforehand",
        reason="bytes_differ",
    )


def _name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
