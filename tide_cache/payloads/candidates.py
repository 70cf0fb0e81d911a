"""The `candidates` payload: k ids with logits and exact logsumexps at each masked position.

What the top of the teacher's distribution is, and how much mass lies below it at each temperature
of the build; `tide_cache.tails` makes a full distribution of it. Two codecs: `raw` is lossless and
serves k = V and every test of equality, `ranked` is what caches use (88 bytes a position at k = 64
on the benchmark teacher's outputs: `python -m benchmarks.codec`).

Shapes: B rows, P payload positions of all rows, K candidates, T temperatures.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tide_cache.errors import FormatError
from tide_cache.payload_facts import CandidatesFacts

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
NO_ID = -1

CODEC_FILE = "codec/candidates.safetensors"
MEAN_LOGITS_TENSOR = "mean_logits"
RANKS_TENSOR = "id_of_rank"
# float32 rounding of a logsumexp over up to 2^24 terms, relative to its magnitude.
LOGSUMEXP_SLACK = 1e-4
# Beyond, sums and quotients by a temperature leave float32.
MAX_LOGIT, _MAX_LOGSUMEXP = 1e30, 1e34
_QUANTISED_ROOM = 1.25
# A stored logsumexp and the head's agree to a few float32 steps; a smaller tail is rounding noise.
_RESOLUTION = 4 * float(np.finfo(np.float32).eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """The teacher's word on P masked positions.

    `ids_PK` int32, distinct in each position; where a position has fewer than K they end in `NO_ID`
    with logits of -inf. `logits_PK` float32, raw logits (temperature 1), may be -inf.
    `logsumexp_PT` float32, logsumexp of logits / temperature over the whole shared vocabulary.
    `label_logprob_P` float32, log p(true token) of the teacher's full softmax. What a codec that
    rounds logits knows besides: `tail_logshare_PT` float32, log of the share of the mass that is
    not the candidates', at each temperature; `error_P` float32, by how much a logit may be off.
    """

    ids_PK: Int32Array
    logits_PK: Float32Array
    logsumexp_PT: Float32Array
    label_logprob_P: Float32Array
    tail_logshare_PT: Float32Array | None = None
    error_P: Float32Array | None = None

    @property
    def num_positions(self) -> int:
        """P, the number of positions."""
        return len(self.ids_PK)

    @property
    def counts_P(self) -> npt.NDArray[np.int64]:
        """How many candidates each position has."""
        return np.asarray(np.count_nonzero(self.ids_PK != NO_ID, axis=1), dtype=np.int64)

    def rows(self, start: int, stop: int) -> "Candidates":
        """Return positions [start, stop) as views."""
        cut: dict[str, Any] = {}
        for field in fields(self):
            values = getattr(self, field.name)
            cut[field.name] = None if values is None else values[start:stop]
        return Candidates(**cut)


def sort_by_id(candidates: Candidates) -> Candidates:
    """Return the same candidates with ids ascending in each position, as `raw` stores them."""
    order_PK = np.argsort(candidates.ids_PK, axis=1, kind="stable")
    return replace(
        candidates,
        ids_PK=np.take_along_axis(candidates.ids_PK, order_PK, axis=1),
        logits_PK=np.take_along_axis(candidates.logits_PK, order_PK, axis=1),
    )


def keep_top_p(
    candidates: Candidates, *, top_p: float, min_k: int, temperature_index: int = 0
) -> Candidates:
    """Keep of each position the likeliest ids that hold `top_p` of the mass, at least `min_k`.

    Logits must descend in each position. The mass is at the temperature with that index (of 1).
    """
    num_candidates = candidates.ids_PK.shape[1]
    total_P1 = candidates.logsumexp_PT[:, temperature_index : temperature_index + 1]
    before_PK = np.cumsum(np.exp(candidates.logits_PK - total_P1), axis=1)[:, :-1]
    kept_PK = np.ones(candidates.ids_PK.shape, dtype=bool)
    kept_PK[:, 1:] = (before_PK < top_p) | (np.arange(1, num_candidates) < min_k)
    return replace(
        candidates,
        ids_PK=np.where(kept_PK, candidates.ids_PK, NO_ID).astype(np.int32),
        logits_PK=np.where(kept_PK, candidates.logits_PK, -np.inf).astype(np.float32),
    )


def tail_logshare(
    candidates: Candidates, temperatures: tuple[float, ...], vocab_size: int
) -> Float32Array:
    """Return log of the share of the mass outside the candidates, float32 (P, T).

    The total less the candidates, where float32 can tell the two apart. Where it cannot, the
    largest that both the total's rounding and the least candidate (no other logit exceeds it)
    allow. -inf where no id is left.
    """
    logits_PK = candidates.logits_PK.astype(np.float64)
    is_id_PK = candidates.ids_PK != NO_ID
    num_others_P = vocab_size - candidates.counts_P
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_others_P = np.log(num_others_P)
        least_P = np.where(is_id_PK, logits_PK, np.inf).min(axis=1, initial=np.inf)
        shares = []
        for column, temperature in enumerate(temperatures):
            total_P = candidates.logsumexp_PT[:, column].astype(np.float64)
            share_P = 1.0 - np.exp(logits_PK / temperature - total_P[:, None]).sum(axis=1)
            resolution_P = _RESOLUTION * np.maximum(np.abs(total_P), 1.0)
            measured_P = np.log(np.maximum(share_P, resolution_P))
            bound_P = least_P / temperature + log_others_P - total_P
            is_noise_P = share_P <= resolution_P
            shares.append(np.where(is_noise_P, np.minimum(measured_P, bound_P), measured_P))
    logshare_PT = np.stack(shares, axis=1) if shares else np.empty((len(logits_PK), 0))
    logshare_PT[num_others_P == 0] = -np.inf
    return np.minimum(logshare_PT, 0.0).astype(np.float32)


def check_candidates(candidates: Candidates, facts: CandidatesFacts) -> None:
    """Raise FormatError unless ids, logits and scalars are within their bounds.

    That ids are distinct is each codec's own to check. A logsumexp below the largest logit is
    refused with the slack of float32, and of the codec's rounding.
    """
    ids_PK, logits_PK = candidates.ids_PK, candidates.logits_PK
    if ids_PK.shape[1:] != (facts.k,):
        raise FormatError(f"cand_ids: expected k = {facts.k}, got {ids_PK.shape[1:]}")
    shape_PT = (len(ids_PK), len(facts.temperatures))
    if candidates.logsumexp_PT.shape != shape_PT:
        raise FormatError(
            f"cand_logsumexp: expected shape {shape_PT}, got {candidates.logsumexp_PT.shape}"
        )
    if not len(ids_PK):
        return
    if ids_PK.min() < NO_ID or ids_PK.max() >= facts.vocab_size:
        raise FormatError(f"cand_ids: expected ids in 0..{facts.vocab_size - 1}")
    # NaN passes through max; one pass finds it and +inf together.
    peak_P = logits_PK.max(axis=1)
    if not (peak_P < np.inf).all():
        raise FormatError("cand_logits: expected numbers or -inf")
    # What is quantised comes back up to a step further out than the writer's bound.
    bound = MAX_LOGIT if candidates.error_P is None else _QUANTISED_ROOM * MAX_LOGIT
    if not (peak_P <= bound).all() or ((logits_PK < -bound) & (logits_PK > -np.inf)).any():
        raise FormatError(f"cand_logits: expected logits within {MAX_LOGIT:g}")
    if not (np.abs(candidates.logsumexp_PT) <= _MAX_LOGSUMEXP).all():  # NaN is not, either
        raise FormatError("cand_logsumexp: expected finite numbers")
    label_P = candidates.label_logprob_P
    if not (label_P <= LOGSUMEXP_SLACK).all():
        raise FormatError("cand_label_logprob: expected log-probabilities")
    peak_P1 = peak_P[:, None].astype(np.float64)
    floor_PT = peak_P1 / np.asarray(facts.temperatures)
    slack_PT = LOGSUMEXP_SLACK * np.maximum(1.0, np.abs(floor_PT))
    if candidates.error_P is not None:
        slack_PT = slack_PT + candidates.error_P[:, None] / np.asarray(facts.temperatures)
    if (candidates.logsumexp_PT < floor_PT - np.where(np.isfinite(slack_PT), slack_PT, 0)).any():
        raise FormatError("cand_logsumexp: below the largest stored logit")


def check_masses(candidates: Candidates, facts: CandidatesFacts) -> None:
    """Raise FormatError where a position's logsumexp cannot be that of its logits.

    It is at least the stored logits', and at most theirs with all other ids as likely as the
    least of them; a stored tail is what the two leave. Slower than what every reader checks, so for
    `verify`.
    """
    if not candidates.num_positions:
        return
    logits_PK = candidates.logits_PK.astype(np.float64)
    is_id_PK = candidates.ids_PK != NO_ID
    num_others_P = facts.vocab_size - candidates.counts_P
    least_P = np.where(is_id_PK, logits_PK, np.inf).min(axis=1)
    error_P = np.zeros(len(least_P)) if candidates.error_P is None else candidates.error_P
    for column, temperature in enumerate(facts.temperatures):
        total_P = candidates.logsumexp_PT[:, column].astype(np.float64)
        with np.errstate(divide="ignore"):
            head_P = _logsumexp(logits_PK / temperature)
            others_P = np.log(num_others_P) + least_P / temperature
        slack_P = error_P / temperature + LOGSUMEXP_SLACK * np.maximum(1.0, np.abs(total_P))
        if (total_P < head_P - slack_P).any():
            raise FormatError("cand_logsumexp: below that of the stored logits")
        if (total_P > np.logaddexp(head_P, others_P) + slack_P).any():
            raise FormatError("cand_logsumexp: above what ids below the stored ones can add")
        if candidates.tail_logshare_PT is not None:
            tail_P = candidates.tail_logshare_PT[:, column].astype(np.float64)
            with np.errstate(divide="ignore"):
                left_P = total_P + np.log(-np.expm1(tail_P))
            # Tails have 8 significant bits, so what they leave of a small head is known to 1%.
            if not (np.abs(left_P - head_P) <= slack_P + 0.01).all():
                raise FormatError("cand_tail: not what logits and logsumexp leave")


def _logsumexp(values_PK: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    peak_P1 = values_PK.max(axis=1, keepdims=True)
    anchor_P1 = np.where(np.isfinite(peak_P1), peak_P1, 0.0)
    return np.asarray(anchor_P1[:, 0] + np.log(np.exp(values_PK - anchor_P1).sum(axis=1)))
