"""The codec `ranked` of `candidates`: ids by frequency rank, sorted, as gaps; logits in few bits.

Frequent ids have low ranks, so sorted ranks have small gaps; each byte plane of the gaps is a
column of its own, and so are the logit codes, one byte each: a column then holds one kind of
symbol, which zstd's entropy stage brings close to its entropy, without bit packing. A logit is
linear between the extremes of its position: `low + code * range / (levels - 1)`.

Rounded logits sum to another mass than the true ones, and 1% of a sharp head can be all of its
tail. So the share of the tail is stored beside the exact logsumexp, and whoever rebuilds a
distribution shifts the head to what is left (`tide_cache.tails`). Scalars that only steer keep few
significant bits (`LOW_BITS` and its neighbours); logsumexps are exact.

Shapes: B rows, P payload positions of all rows, K candidates, N candidates of all positions end to
end, T temperatures.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tide_cache.errors import FormatError
from tide_cache.payload_facts import RankedFacts
from tide_cache.payloads.candidates import (
    MAX_LOGIT,
    NO_ID,
    Candidates,
    Float32Array,
    Int32Array,
    check_candidates,
    tail_logshare,
)
from tide_cache.payloads.flat import (
    Int64Array,
    Part,
    UInt8Array,
    bytes_column,
    bytes_field,
    check_checksums,
    checksums,
    crc_field,
    floats_column,
    floats_field,
    read_bytes,
    read_floats,
)

CRC = "cand_crc32"
# Significant bits. No loss reads the label; chunks hold it exactly.
LOW_BITS, RANGE_BITS, TAIL_BITS, LABEL_BITS = 8, 8, 8, 4
# Candidates that a position may lack take room when decoded: 2^28 take 3 GB.
_MAX_CELLS = 1 << 28
_PAD_KEY = np.uint32(0xFFFFFFFF)
# Rounding of low + code * step in float32, relative to its parts.
_FLOAT_SLACK = 2.0**-21


class RankedCandidates:
    """Codec `ranked`, version 1. `id_of_rank_V` int32: a permutation of the vocabulary."""

    def __init__(self, facts: RankedFacts, id_of_rank_V: Int32Array) -> None:
        self.facts = facts
        self._id_of_rank_V = check_ranks(id_of_rank_V, facts.vocab_size)
        self._rank_of_id_V = np.empty(facts.vocab_size, dtype=np.uint32)
        self._rank_of_id_V[id_of_rank_V] = np.arange(facts.vocab_size, dtype=np.uint32)
        # Codes 0..levels-1 are logits, the next one is -inf.
        self._levels = (1 << facts.bits) - 1
        self._num_planes = num_planes(facts.vocab_size)
        self._is_ragged = facts.top_p is not None

    def fields(self) -> list[pa.Field]:
        """Return the Arrow fields that this payload adds to a row."""
        return ranked_fields(self.facts)

    def encode(self, candidates: Candidates, num_positions_B: Int64Array) -> list[pa.Array]:
        """Encode the answers of B rows, end to end; ids in any order. Raises FormatError.

        The tail's share is taken from the logits before they are rounded, where it is not given.
        """
        facts = self.facts
        check_candidates(candidates, facts)
        counts_P = self._checked_counts(candidates)
        tail_PT = candidates.tail_logshare_PT
        if tail_PT is None:
            tail_PT = tail_logshare(candidates, facts.temperatures, facts.vocab_size)
        low_P, range_P = _extremes(candidates)
        codes_PK = self._to_codes(candidates.logits_PK, low_P, range_P)
        key_PK = self._rank_of_id_V[candidates.ids_PK] << np.uint32(8) | codes_PK
        if self._is_ragged:
            key_PK[candidates.ids_PK == NO_ID] = _PAD_KEY
        key_PK.sort(axis=1)
        rank_PK = key_PK >> np.uint32(8)
        gap_PK = rank_PK.copy()
        gap_PK[:, 1:] -= rank_PK[:, :-1] + np.uint32(1)
        kept = self._kept(counts_P)
        if (gap_PK[kept] > rank_PK[kept]).any():  # an id twice: its gap has wrapped around
            raise FormatError("cand_ids: expected distinct ids in each position")
        planes_N4 = np.ascontiguousarray(gap_PK[kept].reshape(-1), dtype="<u4").view(np.uint8)
        planes_N4 = planes_N4.reshape(-1, 4)
        codes_N = (key_PK[kept].reshape(-1) & np.uint32(0xFF)).astype(np.uint8)
        return self._columns(
            counts_P,
            [planes_N4[:, plane] for plane in range(self._num_planes)],
            codes_N,
            [
                low_P,
                range_P,
                candidates.logsumexp_PT,
                np.minimum(_round(tail_PT, TAIL_BITS), 0.0),
                np.minimum(_round(candidates.label_logprob_P, LABEL_BITS), 0.0),
            ],
            num_positions_B,
        )

    def decode(self, table: pa.Table, num_positions_B: Int64Array) -> Candidates:
        """Decode rows of `num_positions_B` payload positions each; ids come by rank.

        Raises FormatError on any wrong length, checksum, rank or code out of range, NaN, or scalars
        that contradict each other: nothing unchecked leaves this function.
        """
        num_positions, num_temperatures = int(num_positions_B.sum()), len(self.facts.temperatures)
        parts, counts_P = self._read_counts(table, num_positions_B)
        if self._is_ragged and num_positions * self.facts.k > _MAX_CELLS:
            raise FormatError(
                f"cand_counts: {num_positions} positions of up to {self.facts.k} candidates: "
                f"expected at most {_MAX_CELLS} in one batch",
                hint="read fewer rows at a time",
            )
        num_items_B = self._items_per_row(counts_P, num_positions_B)
        names = [f"cand_gaps_{plane}" for plane in range(self._num_planes)] + ["cand_codes"]
        parts += [
            Part(values=read_bytes(table, name, num_items_B), counts_B=num_items_B)
            for name in names
        ]
        widths = {"cand_low": 1, "cand_range": 1, "cand_logsumexp": num_temperatures}
        widths |= {"cand_tail": num_temperatures, "cand_label_logprob": 1}
        parts += [
            Part(
                values=read_floats(table, name, width * num_positions_B),
                counts_B=width * num_positions_B,
            )
            for name, width in widths.items()
        ]
        check_checksums(table, CRC, parts)
        values = [part.values for part in parts[1 if self._is_ragged else 0 :]]
        planes, (codes_N, low_P, range_P, totals, tails, labels) = values[:-6], values[-6:]
        ids_PK = self._to_ids(planes, counts_P)
        logits_PK = self._to_logits(codes_N, counts_P, low_P, range_P)
        candidates = Candidates(
            ids_PK=ids_PK,
            logits_PK=logits_PK,
            logsumexp_PT=totals.reshape(num_positions, num_temperatures),
            label_logprob_P=labels,
            tail_logshare_PT=tails.reshape(num_positions, num_temperatures),
            error_P=error_bound(low_P, range_P, self._levels),
        )
        check_candidates(candidates, self.facts)
        if not (tails <= 0).all():
            raise FormatError("cand_tail: expected logarithms of shares")
        if num_positions and not (logits_PK.max(axis=1) > -np.inf).all():
            raise FormatError("cand_codes: a position without a finite logit")
        return candidates

    def _checked_counts(self, candidates: Candidates) -> Int64Array:
        counts_P = candidates.counts_P
        least = self.facts.min_k if self.facts.min_k is not None else self.facts.k
        if len(counts_P) and counts_P.min() < min(least, self.facts.vocab_size):
            raise FormatError(f"cand_ids: expected at least {least} candidates in each position")
        is_id_PK = candidates.ids_PK != NO_ID
        if not np.array_equal(is_id_PK, np.arange(self.facts.k) < counts_P[:, None]):
            raise FormatError("cand_ids: expected missing candidates behind the others")
        finite_PK = np.isfinite(candidates.logits_PK)
        if len(counts_P) and not (finite_PK & is_id_PK).any(axis=1).all():
            raise FormatError("cand_logits: a position without a finite logit")
        if (np.abs(np.where(finite_PK, candidates.logits_PK, 0.0)) > MAX_LOGIT).any():
            raise FormatError(f"cand_logits: expected logits within {MAX_LOGIT:g}")
        return counts_P

    def _kept(self, counts_P: Int64Array) -> npt.NDArray[np.bool_] | slice:
        if not self._is_ragged:
            return slice(None)
        return np.arange(self.facts.k) < counts_P[:, None]

    def _columns(
        self,
        counts_P: Int64Array,
        planes: list[UInt8Array],
        codes_N: UInt8Array,
        scalars: list[Float32Array],
        num_positions_B: Int64Array,
    ) -> list[pa.Array]:
        parts, arrays = [], []
        if self._is_ragged:
            data = counts_P.astype("<u2").view(np.uint8)
            parts.append(Part(values=data, counts_B=2 * num_positions_B))
        num_items_B = self._items_per_row(counts_P, num_positions_B)
        parts += [
            Part(values=np.ascontiguousarray(values), counts_B=num_items_B)
            for values in [*planes, codes_N]
        ]
        arrays = [bytes_column(part.values, part.counts_B) for part in parts]
        for values in scalars:
            width = values.size // max(len(values), 1) if values.ndim > 1 else 1
            counts_B = width * num_positions_B
            flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
            parts.append(Part(values=flat, counts_B=counts_B))
            arrays.append(floats_column(flat, counts_B))
        return [*arrays, pa.array(checksums(parts, len(num_positions_B)), pa.uint32())]

    def _read_counts(
        self, table: pa.Table, num_positions_B: Int64Array
    ) -> tuple[list[Part], Int64Array]:
        num_positions = int(num_positions_B.sum())
        if not self._is_ragged:
            return [], np.full(num_positions, self.facts.k, dtype=np.int64)
        data = read_bytes(table, "cand_counts", 2 * num_positions_B)
        counts_P = np.ascontiguousarray(data).view("<u2").astype(np.int64)
        least = min(self.facts.min_k or 1, self.facts.vocab_size)
        if num_positions and not (counts_P.min() >= least and counts_P.max() <= self.facts.k):
            raise FormatError(f"cand_counts: expected {least} to {self.facts.k} candidates")
        return [Part(values=data, counts_B=2 * num_positions_B)], counts_P

    def _items_per_row(self, counts_P: Int64Array, num_positions_B: Int64Array) -> Int64Array:
        if not self._is_ragged:
            return self.facts.k * num_positions_B
        before = np.concatenate([[0], np.cumsum(counts_P)])
        stops_B = np.cumsum(num_positions_B)
        return np.asarray(before[stops_B] - before[stops_B - num_positions_B], dtype=np.int64)

    def _spread(self, values_N: npt.NDArray[np.int32], counts_P: Int64Array) -> Int32Array:
        """Put values end to end back into (P, K), zeros behind the last of a position."""
        if not self._is_ragged:
            return values_N.reshape(-1, self.facts.k)
        spread_PK = np.zeros((len(counts_P), self.facts.k), dtype=np.int32)
        spread_PK[self._kept(counts_P)] = values_N
        return spread_PK

    def _to_ids(self, planes: list[UInt8Array], counts_P: Int64Array) -> Int32Array:
        gap_N = planes[0].astype(np.int32)
        for shift, plane in enumerate(planes[1:], start=1):
            gap_N |= plane.astype(np.int32) << np.int32(8 * shift)
        gap_PK = self._spread(gap_N, counts_P)
        # The sum first, in 64 bits: hostile gaps must not wrap around.
        last_P = gap_PK.sum(axis=1, dtype=np.int64) + counts_P - 1
        if len(last_P) and last_P.max() >= self.facts.vocab_size:
            raise FormatError(f"cand_gaps: expected ranks in 0..{self.facts.vocab_size - 1}")
        rank_PK = np.cumsum(gap_PK, axis=1, dtype=np.int32)
        rank_PK += np.arange(self.facts.k, dtype=np.int32)
        if not self._is_ragged:
            return self._id_of_rank_V.take(rank_PK)
        kept_PK = self._kept(counts_P)
        ids_PK = np.full(rank_PK.shape, NO_ID, dtype=np.int32)
        ids_PK[kept_PK] = self._id_of_rank_V.take(rank_PK[kept_PK])
        return ids_PK

    def _to_codes(
        self, logits_PK: Float32Array, low_P: Float32Array, range_P: Float32Array
    ) -> npt.NDArray[np.uint32]:
        step_P1 = (range_P / np.float32(self._levels - 1))[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            code_PK = np.rint((logits_PK - low_P[:, None]) / step_P1)
        code_PK = np.clip(np.where(step_P1 > 0, code_PK, 0.0), 0, self._levels - 1)
        is_zero_PK = np.isneginf(logits_PK)
        return np.where(is_zero_PK, self._levels, code_PK).astype(np.uint32)

    def _to_logits(
        self,
        codes_N: UInt8Array,
        counts_P: Int64Array,
        low_P: Float32Array,
        range_P: Float32Array,
    ) -> Float32Array:
        if len(codes_N) and codes_N.max() > self._levels:
            raise FormatError(f"cand_codes: expected codes in 0..{self._levels}")
        if not (np.isfinite(low_P).all() and (range_P >= 0).all() and (range_P < 4e30).all()):
            raise FormatError("cand_low, cand_range: expected a finite low and a range from 0")
        codes_PK: npt.NDArray[np.integer]
        if self._is_ragged:
            codes_PK = self._spread(codes_N.astype(np.int32), counts_P)
        else:
            codes_PK = codes_N.reshape(-1, self.facts.k)
        step_P1 = (range_P / np.float32(self._levels - 1))[:, None]
        logits_PK: Float32Array = np.multiply(codes_PK, step_P1, dtype=np.float32)
        logits_PK += low_P[:, None]
        if len(codes_N) and codes_N.max() == self._levels:
            logits_PK[codes_PK == self._levels] = -np.inf
        if self._is_ragged:
            logits_PK[~np.asarray(self._kept(counts_P))] = -np.inf
        return logits_PK


def ranked_fields(facts: RankedFacts) -> list[pa.Field]:
    """Return the Arrow fields of a payload under this codec."""
    return [
        *([bytes_field("cand_counts")] if facts.top_p is not None else []),
        *(bytes_field(f"cand_gaps_{plane}") for plane in range(num_planes(facts.vocab_size))),
        bytes_field("cand_codes"),
        floats_field("cand_low"),
        floats_field("cand_range"),
        floats_field("cand_logsumexp"),
        floats_field("cand_tail"),
        floats_field("cand_label_logprob"),
        crc_field(CRC),
    ]


def num_planes(vocab_size: int) -> int:
    """Return how many bytes a rank below `vocab_size` takes."""
    return max(1, -(-(vocab_size - 1).bit_length() // 8))


def error_bound(low_P: Float32Array, range_P: Float32Array, levels: int) -> Float32Array:
    """Return by how much a decoded logit may differ from the one encoded, float32 (P,).

    Half a step, and the rounding of low + code * step in float32.
    """
    step_P = range_P / np.float32(levels - 1)
    return 0.5 * step_P + np.float32(_FLOAT_SLACK) * (np.abs(low_P) + range_P)


def check_ranks(id_of_rank_V: Int32Array, vocab_size: int) -> Int32Array:
    """Return the table if it is a permutation of 0..vocab_size-1; raise FormatError if not."""
    table = np.asarray(id_of_rank_V)
    if table.shape != (vocab_size,) or table.dtype != np.int32:
        raise FormatError(
            f"id_of_rank: expected int32 ({vocab_size},), got {table.dtype} {table.shape}"
        )
    if table.min() < 0 or table.max() >= vocab_size:
        raise FormatError(f"id_of_rank: expected ids in 0..{vocab_size - 1}")
    if (np.bincount(table, minlength=vocab_size) != 1).any():
        raise FormatError("id_of_rank: expected each id once")
    return table


def _extremes(candidates: Candidates) -> tuple[Float32Array, Float32Array]:
    """Return the lowest finite logit, rounded down, and the range from there, rounded up."""
    finite_PK = np.isfinite(candidates.logits_PK)
    low_P = candidates.logits_PK.min(axis=1, where=finite_PK, initial=np.inf)
    high_P = candidates.logits_PK.max(axis=1, where=finite_PK, initial=-np.inf)
    low_P = -_round_up(-low_P, LOW_BITS)
    return low_P, _round_up(high_P - low_P, RANGE_BITS)


def _round(values: Float32Array, num_bits: int) -> Float32Array:
    """Round float32 to so many significant bits, to nearest, ties to even; infinities stay."""
    dropped = np.uint32(24 - num_bits)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half = (np.uint32(1) << (dropped - np.uint32(1))) - np.uint32(1)
    nearest = bits + half + ((bits >> dropped) & np.uint32(1))
    rounded = (nearest >> dropped) << dropped
    return rounded.view(np.float32).reshape(np.shape(values))


def _round_up(values: Float32Array, num_bits: int) -> Float32Array:
    """Round float32 towards +infinity to so many significant bits."""
    values = np.asarray(values, dtype=np.float32)
    unit = np.uint32(1 << (24 - num_bits))
    bits = np.ascontiguousarray(values).view(np.uint32)
    cut_bits = bits & ~(unit - np.uint32(1))
    cut = cut_bits.view(np.float32).reshape(values.shape)
    next_up = (cut_bits + unit).view(np.float32).reshape(values.shape)
    # Cutting moves towards zero: already up for negative numbers.
    return np.where(cut >= values, cut, next_up).astype(np.float32)
