"""The `candidates` payload: k ids with logits and exact logsumexps at each masked position.

Legend: P payload positions of a row, K candidates, T temperatures. A codec turns the four arrays of
a row into binary columns and back; codecs have a name and a version that the manifest carries.
`raw` version 1 is lossless: little-endian int32 ids (ascending) and float32 logits, 8 K + 4 T + 4
bytes a position before compression. It serves k = V and every test of equality.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tide_cache.errors import CompatibilityError, FormatError
from tide_cache.manifest import CandidatesFacts

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

COLUMNS = ("cand_ids", "cand_logits", "cand_logsumexp", "cand_label_logprob")
MEAN_LOGITS_FILE = "codec/candidates.safetensors"
MEAN_LOGITS_TENSOR = "mean_logits"
# float32 rounding of a logsumexp over up to 2^24 terms, relative to its magnitude.
_LOGSUMEXP_SLACK = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """The teacher's word on P masked positions.

    `ids_PK` int32, ascending in each row; `logits_PK` float32, raw logits (temperature 1), may be
    -inf; `logsumexp_PT` float32, logsumexp of logits / temperature over the whole shared
    vocabulary; `label_logprob_P` float32, log p(true token) of the teacher's full softmax.
    """

    ids_PK: Int32Array
    logits_PK: Float32Array
    logsumexp_PT: Float32Array
    label_logprob_P: Float32Array


def sort_by_id(candidates: Candidates) -> Candidates:
    """Return the same candidates with ids ascending in each position, as codecs expect them."""
    order_PK = np.argsort(candidates.ids_PK, axis=1, kind="stable")
    return Candidates(
        ids_PK=np.take_along_axis(candidates.ids_PK, order_PK, axis=1),
        logits_PK=np.take_along_axis(candidates.logits_PK, order_PK, axis=1),
        logsumexp_PT=candidates.logsumexp_PT,
        label_logprob_P=candidates.label_logprob_P,
    )


def payload_fields() -> list[pa.Field]:
    """Return the Arrow fields that this payload adds to a row."""
    return [pa.field(name, pa.binary(), nullable=False) for name in COLUMNS]


def encode(candidates: Candidates, facts: CandidatesFacts, *, where: str) -> dict[str, bytes]:
    """Encode the payload of one row as `{column: bytes}`. Raises FormatError out of bounds."""
    _require_raw(facts)
    _check(candidates, facts, where)
    return {
        "cand_ids": candidates.ids_PK.astype("<i4").tobytes(),
        "cand_logits": candidates.logits_PK.astype("<f4").tobytes(),
        "cand_logsumexp": candidates.logsumexp_PT.astype("<f4").tobytes(),
        "cand_label_logprob": candidates.label_logprob_P.astype("<f4").tobytes(),
    }


def decode(
    columns: dict[str, bytes], facts: CandidatesFacts, num_positions: int, *, where: str
) -> Candidates:
    """Decode the payload of one row that has `num_positions` payload positions.

    Raises FormatError on any wrong length, id out of range or out of order, NaN, or a logsumexp
    below the largest stored logit: nothing unchecked leaves this function.
    """
    _require_raw(facts)
    num_temperatures = len(facts.temperatures)
    candidates = Candidates(
        ids_PK=_array(columns, "cand_ids", "<i4", (num_positions, facts.k), where),
        logits_PK=_array(columns, "cand_logits", "<f4", (num_positions, facts.k), where),
        logsumexp_PT=_array(
            columns, "cand_logsumexp", "<f4", (num_positions, num_temperatures), where
        ),
        label_logprob_P=_array(columns, "cand_label_logprob", "<f4", (num_positions,), where),
    )
    _check(candidates, facts, where)
    return candidates


def _require_raw(facts: CandidatesFacts) -> None:
    if (facts.codec, facts.codec_version) != ("raw", 1):
        raise CompatibilityError(
            f"payload candidates: codec {facts.codec!r} version {facts.codec_version}: this "
            "program reads 'raw' version 1",
            hint="install a newer tide-cache",
        )


def _array(
    columns: dict[str, bytes], name: str, dtype: str, shape: tuple[int, ...], where: str
) -> npt.NDArray[Any]:
    data = columns[name]
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if len(data) != expected:
        raise FormatError(f"{where}: {name}: expected {expected} bytes, got {len(data)}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _check(candidates: Candidates, facts: CandidatesFacts, where: str) -> None:
    ids_PK, logits_PK = candidates.ids_PK, candidates.logits_PK
    if ids_PK.shape[1:] != (facts.k,):
        raise FormatError(f"{where}: cand_ids: expected k = {facts.k}, got {ids_PK.shape[1:]}")
    if not len(ids_PK):
        return
    if ids_PK.min() < 0 or ids_PK.max() >= facts.vocab_size:
        raise FormatError(f"{where}: cand_ids: expected ids in 0..{facts.vocab_size - 1}")
    if (np.diff(ids_PK, axis=1) <= 0).any():
        raise FormatError(f"{where}: cand_ids: expected ascending ids in each position")
    if np.isnan(logits_PK).any() or np.isposinf(logits_PK).any():
        raise FormatError(f"{where}: cand_logits: expected numbers or -inf")
    if not np.isfinite(candidates.logsumexp_PT).all():
        raise FormatError(f"{where}: cand_logsumexp: expected finite numbers")
    label_P = candidates.label_logprob_P
    if np.isnan(label_P).any() or (label_P > _LOGSUMEXP_SLACK).any():
        raise FormatError(f"{where}: cand_label_logprob: expected log-probabilities")
    peak_P1 = logits_PK.max(axis=1, keepdims=True).astype(np.float64)
    floor_PT = peak_P1 / np.asarray(facts.temperatures)
    slack_PT = _LOGSUMEXP_SLACK * np.maximum(1.0, np.abs(floor_PT))
    if (candidates.logsumexp_PT < floor_PT - np.where(np.isfinite(slack_PT), slack_PT, 0)).any():
        raise FormatError(f"{where}: cand_logsumexp: below the largest stored logit")
