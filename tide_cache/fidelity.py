"""How close the gradients from a payload come to those from full logits.

The gradient of each loss with respect to the student's logits has a closed form, so nothing has to
be trained or differentiated: TIDAL T (softmax(s/T) - target), forward KL T (q - p), reverse KL
T q (log q - log p - KL). Two gradients are compared over all positions together (as a step sums
them): their cosine, and the relative error |g' - g| / |g|. Stage 2's autograd agrees to 1e-5.

Shapes: P masked positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tide_cache.payload_facts import LossFidelity

Float32Array = npt.NDArray[np.float32]
Loss = Literal["tidal", "kl", "reverse_kl"]

TIDAL_WEIGHTS = (0.1, 0.5, 0.9)
# As stage 2 does: log p of an id that is ruled out.
_LOG_ZERO = np.float32(-1e4)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossKey:
    """One loss at one temperature; `weight` is TIDAL's lambda."""

    loss: Loss
    weight: float | None
    temperature: float


def loss_keys(temperatures: Sequence[float]) -> list[LossKey]:
    """Return what is measured at each temperature: TIDAL at three lambdas and both KLs."""
    keys = []
    for temperature in temperatures:
        keys += [
            LossKey(loss="tidal", weight=weight, temperature=temperature)
            for weight in TIDAL_WEIGHTS
        ]
        keys += [
            LossKey(loss="kl", weight=None, temperature=temperature),
            LossKey(loss="reverse_kl", weight=None, temperature=temperature),
        ]
    return keys


def gradients(
    student_PV: Float32Array, teacher_PV: Float32Array, temperature: float
) -> Iterator[Float32Array]:
    """Yield the gradient of each loss of `loss_keys([temperature])` in order, float32 (P, V).

    Of the sum over positions, with respect to the student's logits. Logits may be -inf.
    """
    scale = np.float32(temperature)
    log_q_PV = log_softmax(student_PV / scale)
    q_PV = np.exp(log_q_PV)
    for weight in TIDAL_WEIGHTS:
        share = np.float32(weight)
        mixed_PV: Float32Array = (np.float32(1) - share) * student_PV + share * teacher_PV
        yield scale * (q_PV - np.exp(log_softmax(mixed_PV / scale)))
    log_p_PV = log_softmax(teacher_PV / scale)
    yield scale * (q_PV - np.exp(log_p_PV))
    log_ratio_PV = np.maximum(log_q_PV, _LOG_ZERO) - np.maximum(log_p_PV, _LOG_ZERO)
    kl_P1 = (q_PV * log_ratio_PV).sum(axis=1, keepdims=True)
    yield scale * q_PV * (log_ratio_PV - kl_P1)


def log_softmax(logits_PV: Float32Array) -> Float32Array:
    """Return log softmax over the last axis, float32."""
    shifted_PV = logits_PV - logits_PV.max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        return np.asarray(
            shifted_PV - np.log(np.exp(shifted_PV).sum(axis=1, keepdims=True, dtype=np.float32))
        )


class GradientSums:
    """Inner products of one payload's gradients with the full ones, summed over positions."""

    def __init__(self, num_losses: int) -> None:
        # Rows: <full, payload>, |full|^2, |payload|^2, |payload - full|^2.
        self.sums_4N = np.zeros((4, num_losses), dtype=np.float64)

    def add(self, index: int, full_PV: Float32Array, payload_PV: Float32Array) -> None:
        """Add a slice of positions of loss number `index`."""
        full, payload = full_PV.reshape(-1), payload_PV.reshape(-1)
        difference = payload - full
        self.sums_4N[:, index] += (
            float(np.dot(full, payload)),
            float(np.dot(full, full)),
            float(np.dot(payload, payload)),
            float(np.dot(difference, difference)),
        )

    def result(self, keys: Sequence[LossKey]) -> tuple[LossFidelity, ...]:
        """Return cosine and relative error of each loss, rounded to 6 places."""
        return tuple(
            _compare(key, *self.sums_4N[:, index].tolist()) for index, key in enumerate(keys)
        )


def _compare(
    key: LossKey, both: float, full: float, payload: float, difference: float
) -> LossFidelity:
    scale = (full * payload) ** 0.5
    # Two gradients of zero agree; a gradient of zero and another one do not.
    cosine = both / scale if scale > 0 else float(full == payload)
    error = (difference / full) ** 0.5 if full > 0 else float(payload > 0)
    return LossFidelity(
        loss=key.loss,
        weight=key.weight,
        temperature=key.temperature,
        cosine=round(min(cosine, 1.0), 6),
        relative_error=round(error, 6),
    )
