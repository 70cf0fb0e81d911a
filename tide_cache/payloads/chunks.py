"""The `chunks` payload: the teacher's log-prob of each active chunk, one float32 each.

A chunk is a minimal group of tokens that covers the same bytes for both tokenizers; it is active
where it is masked and holds no token of the prompt. Its log-prob is the sum of its teacher tokens'
log p(true token) at temperature 1, over the teacher's whole vocabulary. With a shared tokenizer
(`alignment: positions`) each payload position is a chunk of one token. 4 bytes a chunk before
compression, and exact: a chunk loss needs nothing else of the teacher.

Shapes: B rows, C active chunks of all rows.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tide_cache.errors import FormatError
from tide_cache.payload_facts import ChunksFacts
from tide_cache.payloads.flat import (
    Int64Array,
    Part,
    bytes_column,
    bytes_field,
    check_checksums,
    checksums,
    crc_field,
    read_bytes,
)

Float32Array = npt.NDArray[np.float32]

COLUMN = "chunk_logprob"
CRC = "chunk_crc32"
# A log-prob is at most 0; float32 sums over the vocabulary may end this far above.
_LOGPROB_SLACK = 1e-4


class RawChunks:
    """Codec `raw` of `chunks`: version 1 (format 1) has no checksum, version 2 has one."""

    def __init__(self, facts: ChunksFacts) -> None:
        self.facts = facts
        self._has_crc = facts.codec_version >= 2

    def fields(self) -> list[pa.Field]:
        """Return the Arrow fields that this payload adds to a row."""
        return [bytes_field(COLUMN), *([crc_field(CRC)] if self._has_crc else [])]

    def encode(self, logprob_C: Float32Array, num_chunks_B: Int64Array) -> list[pa.Array]:
        """Encode the log-probs of the active chunks of B rows, in the order of the chunks."""
        _check(logprob_C)
        data = np.ascontiguousarray(logprob_C, dtype="<f4").view(np.uint8)
        part = Part(values=data, counts_B=4 * num_chunks_B)
        columns = [bytes_column(part.values, part.counts_B)]
        if self._has_crc:
            columns.append(pa.array(checksums([part], len(num_chunks_B)), pa.uint32()))
        return columns

    def decode(self, table: pa.Table, num_chunks_B: Int64Array) -> Float32Array:
        """Decode rows of `num_chunks_B` active chunks each. Returns float32 (C,).

        Raises FormatError on a wrong length or checksum, NaN, infinity or a log-prob above 0.
        """
        data = read_bytes(table, COLUMN, 4 * num_chunks_B)
        if self._has_crc:
            check_checksums(table, CRC, [Part(values=data, counts_B=4 * num_chunks_B)])
        logprob_C = np.ascontiguousarray(data).view("<f4")
        _check(logprob_C)
        return logprob_C


def _check(logprob_C: Float32Array) -> None:
    if not np.isfinite(logprob_C).all() or (logprob_C > _LOGPROB_SLACK).any():
        raise FormatError(f"{COLUMN}: expected finite log-probabilities")
