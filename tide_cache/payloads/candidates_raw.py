"""The lossless codec of `candidates`: int32 ids, ascending, and float32 logits.

8 K + 4 T + 4 bytes a position before compression. Version 1 (format 1) has no checksum.

Shapes: B rows, P payload positions of all rows, K candidates, T temperatures.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tide_cache.errors import FormatError
from tide_cache.payload_facts import CandidatesFacts
from tide_cache.payloads.candidates import (
    NO_ID,
    Candidates,
    check_candidates,
    sort_by_id,
)
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

COLUMNS = ("cand_ids", "cand_logits", "cand_logsumexp", "cand_label_logprob")
CRC = "cand_crc32"


class RawCandidates:
    """Codec `raw`, versions 1 and 2."""

    def __init__(self, facts: CandidatesFacts) -> None:
        self.facts = facts
        self._has_crc = facts.codec_version >= 2

    def fields(self) -> list[pa.Field]:
        """Return the Arrow fields that this payload adds to a row."""
        return [*map(bytes_field, COLUMNS), *([crc_field(CRC)] if self._has_crc else [])]

    def encode(self, candidates: Candidates, num_positions_B: Int64Array) -> list[pa.Array]:
        """Encode the answers of B rows, end to end. Raises FormatError out of bounds."""
        candidates = sort_by_id(candidates)
        self._check(candidates)
        parts = [
            _part(candidates.ids_PK, "<i4", num_positions_B),
            _part(candidates.logits_PK, "<f4", num_positions_B),
            _part(candidates.logsumexp_PT, "<f4", num_positions_B),
            _part(candidates.label_logprob_P, "<f4", num_positions_B),
        ]
        columns = [bytes_column(part.values, part.counts_B) for part in parts]
        if self._has_crc:
            columns.append(pa.array(checksums(parts, len(num_positions_B)), pa.uint32()))
        return columns

    def decode(self, table: pa.Table, num_positions_B: Int64Array) -> Candidates:
        """Decode rows of `num_positions_B` payload positions each.

        Raises FormatError on any wrong length, checksum, id out of range or out of order, NaN, or
        a logsumexp below the largest stored logit: nothing unchecked leaves this function.
        """
        num_positions, k = int(num_positions_B.sum()), self.facts.k
        widths = (4 * k, 4 * k, 4 * len(self.facts.temperatures), 4)
        parts = [
            Part(values=read_bytes(table, name, width * num_positions_B), counts_B=counts_B)
            for name, width in zip(COLUMNS, widths, strict=True)
            for counts_B in [width * num_positions_B]
        ]
        if self._has_crc:
            check_checksums(table, CRC, parts)
        ids, logits, totals, labels = (part.values for part in parts)
        candidates = Candidates(
            ids_PK=_view(ids, "<i4").reshape(num_positions, k),
            logits_PK=_view(logits, "<f4").reshape(num_positions, k),
            logsumexp_PT=_view(totals, "<f4").reshape(num_positions, -1)
            if num_positions
            else np.empty((0, len(self.facts.temperatures)), np.float32),
            label_logprob_P=_view(labels, "<f4"),
        )
        self._check(candidates)
        return candidates

    def _check(self, candidates: Candidates) -> None:
        check_candidates(candidates, self.facts)
        ids_PK = candidates.ids_PK
        if (ids_PK == NO_ID).any():
            raise FormatError(f"cand_ids: expected ids in 0..{self.facts.vocab_size - 1}")
        if (np.diff(ids_PK, axis=1) <= 0).any():
            raise FormatError("cand_ids: expected ascending ids in each position")


def _part(values: npt.NDArray[Any], dtype: str, num_positions_B: Int64Array) -> Part:
    data = np.ascontiguousarray(values, dtype=dtype)
    width = data.itemsize * int(np.prod(data.shape[1:]))
    return Part(values=data.view(np.uint8).reshape(-1), counts_B=width * num_positions_B)


def _view(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[Any]:
    return np.ascontiguousarray(data).view(dtype)
