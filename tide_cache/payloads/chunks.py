"""The `chunks` payload: the teacher's log-prob of each active chunk, one float32 each.

A chunk is a minimal group of tokens that covers the same bytes for both tokenizers; it is active
where it is masked and holds no token of the prompt. Its log-prob is the sum of its teacher tokens'
log p(true token) at temperature 1, over the teacher's whole vocabulary. With a shared tokenizer
(`alignment: positions`) each payload position is a chunk of one token. 4 bytes a chunk before
compression, and exact: a chunk loss needs nothing else of the teacher.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tide_cache.errors import CompatibilityError, FormatError
from tide_cache.manifest import ChunksFacts

Float32Array = npt.NDArray[np.float32]

COLUMNS = ("chunk_logprob",)
# A log-prob is at most 0; float32 sums over the vocabulary may end this far above.
_LOGPROB_SLACK = 1e-4


def payload_fields() -> list[pa.Field]:
    """Return the Arrow fields that this payload adds to a row."""
    return [pa.field(name, pa.binary(), nullable=False) for name in COLUMNS]


def encode(logprob_C: Float32Array, facts: ChunksFacts, *, where: str) -> dict[str, bytes]:
    """Encode the log-probs of a row's active chunks, float32 (C,), in the order of the chunks."""
    _require_raw(facts)
    _check(logprob_C, where)
    return {"chunk_logprob": logprob_C.astype("<f4").tobytes()}


def decode(
    columns: dict[str, bytes], facts: ChunksFacts, num_chunks: int, *, where: str
) -> Float32Array:
    """Decode the log-probs of a row that has `num_chunks` active chunks. Returns float32 (C,).

    Raises FormatError on a wrong length, NaN, infinity or a log-prob above 0.
    """
    _require_raw(facts)
    data = columns["chunk_logprob"]
    if len(data) != 4 * num_chunks:
        raise FormatError(
            f"{where}: chunk_logprob: expected {4 * num_chunks} bytes, got {len(data)}"
        )
    logprob_C = np.frombuffer(data, dtype="<f4")
    _check(logprob_C, where)
    return logprob_C


def _require_raw(facts: ChunksFacts) -> None:
    if (facts.codec, facts.codec_version) != ("raw", 1):
        raise CompatibilityError(
            f"payload chunks: codec {facts.codec!r} version {facts.codec_version}: this program "
            "reads 'raw' version 1",
            hint="install a newer tide-cache",
        )


def _check(logprob_C: Float32Array, where: str) -> None:
    if not np.isfinite(logprob_C).all() or (logprob_C > _LOGPROB_SLACK).any():
        raise FormatError(f"{where}: chunk_logprob: expected finite log-probabilities")
