"""Fitting the transform of the `hidden` payload: which components, how coarse.

What an error e of the hidden state does to the losses is, to second order, a quadratic form: the KL
at temperature T is e' F e / 2 with F = E[W' (diag p - p p') W] / T^2, the gradient's squared error
e' G e with G = E[W' (diag p - p p')^2 W] / T^2. The transform makes their (normalised) sum the unit
matrix and the components uncorrelated, so that one step for all is the best there is: the
reverse water-filling of a Gaussian source, components below the water level left out. On the
benchmark teacher (d = 256, V = 8,192) a cosine of .991 takes 6 bytes a position, .9995 takes 18,
beside the candidates that pin the top (`python -m benchmarks.gradients`).

Shapes: P positions, D hidden size, R components kept, V vocabulary.
"""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tide_cache.payload_facts import HiddenFacts
from tide_cache.payloads.hidden import NARROW_MAX, Float32Array, Transform, limits

logger = logging.getLogger(__name__)
# Directions that matter less than this, relative to the most important one, count as this much.
_FLOOR = 1e-7
# A component whose deviation is below so many steps rounds to 0 but for one value in a thousand,
# and costs less left out than rounded.
_KEPT_FROM = 0.28
# Six deviations, times this, must fit a narrow code.
_DEVIATIONS = 6.0
# Deviations, in steps, at which a new column begins: each column then has one kind of symbol.
_BAND_EDGES = (16.0, 8.0, 4.0, 2.0, 1.0, 0.5)
_SLICE_POSITIONS = 256
_SLICE_IDS = 8192


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Head:
    """The output head over the shared ids: `weight_VD` in the teacher's type, `bias_V` or None."""

    weight_VD: Tensor
    bias_V: Tensor | None

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """Return float32 logits (P, V) of a slice of hidden states."""
        weight_VD = self.weight_VD
        hidden_PD = hidden_PD.to(weight_VD.device, weight_VD.dtype)
        return torch.nn.functional.linear(hidden_PD, weight_VD, self.bias_V).float()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FittedBasis:
    """All D components, the largest first: maps both ways, the mean, and deviations.

    `nats_per_variance`: by how many nats the KL grows with the squared error of a component, on
    average over components and temperatures.
    """

    analysis_DD: Float32Array
    synthesis_DD: Float32Array
    mean_D: Float32Array
    deviation_D: npt.NDArray[np.float64]
    peak_D: npt.NDArray[np.float64]
    nats_per_variance: float
    num_positions: int


@torch.no_grad()
def fit_basis(hidden_PD: Tensor, head: Head, temperatures: Sequence[float]) -> FittedBasis:
    """Fit the transform to hidden states (P, D) of masked positions, float64 throughout."""
    wide_PD = hidden_PD.detach().double().cpu()
    mean_D = wide_PD.mean(dim=0)
    centred_PD = wide_PD - mean_D
    covariance_DD = centred_PD.T @ centred_PD / len(wide_PD)
    kl_forms = []
    metric_DD = torch.zeros_like(covariance_DD)
    for temperature in temperatures:
        kl_DD, gradient_DD = quadratic_forms(hidden_PD, head, temperature)
        kl_forms.append(kl_DD)
        for form_DD in (kl_DD, gradient_DD):
            metric_DD += form_DD / (form_DD * covariance_DD).sum().clamp_min(1e-30)
    weight_D, vector_DD = torch.linalg.eigh(metric_DD)
    weight_D = weight_D.clamp_min(float(weight_D.max()) * _FLOOR + 1e-30).sqrt()
    root_DD = (vector_DD * weight_D) @ vector_DD.T
    inverse_DD = (vector_DD / weight_D) @ vector_DD.T
    variance_D, rotation_DD = torch.linalg.eigh(root_DD @ covariance_DD @ root_DD)
    order_D = variance_D.argsort(descending=True)
    rotation_DD = rotation_DD[:, order_D]
    analysis_DD, synthesis_DD = rotation_DD.T @ root_DD, inverse_DD @ rotation_DD
    # 1/2 tr(S' F S) per unit of squared error in every component, over D components.
    nats = [0.5 * float((synthesis_DD * (form @ synthesis_DD)).sum()) for form in kl_forms]
    return FittedBasis(
        analysis_DD=analysis_DD.float().numpy(),
        synthesis_DD=synthesis_DD.float().numpy(),
        mean_D=mean_D.float().numpy(),
        deviation_D=variance_D[order_D].clamp_min(0).sqrt().numpy(),
        peak_D=(centred_PD @ analysis_DD.T).abs().amax(dim=0).numpy(),
        nats_per_variance=float(np.mean(nats)) / len(mean_D),
        num_positions=len(wide_PD),
    )


@torch.no_grad()
def quadratic_forms(hidden_PD: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the KL's and the gradient's quadratic form in the hidden state, float64 (D, D) each.

    Means over the positions of W' J W and W' J^2 W over T^2, J = diag p - p p'; with u = W' p,
    v = W' p^2 they are sums of W' diag(.) W and of outer products of u and v.
    """
    weight_VD = head.weight_VD
    size, device = weight_VD.shape[1], weight_VD.device
    p_V = torch.zeros(len(weight_VD), dtype=torch.float64, device=device)
    p2_V = torch.zeros_like(p_V)
    kl_DD = torch.zeros((size, size), dtype=torch.float64)
    gradient_DD = torch.zeros_like(kl_DD)
    for start in range(0, len(hidden_PD), _SLICE_POSITIONS):
        logits_PV = head.logits(hidden_PD[start : start + _SLICE_POSITIONS])
        p_PV = torch.softmax(logits_PV / temperature, dim=-1)
        p_V += p_PV.sum(dim=0, dtype=torch.float64)
        u_PD = (p_PV.to(weight_VD.dtype) @ weight_VD).double().cpu()
        p2_PV = p_PV.square()
        p2_V += p2_PV.sum(dim=0, dtype=torch.float64)
        v_PD = (p2_PV.to(weight_VD.dtype) @ weight_VD).double().cpu()
        norm_P1 = p2_PV.sum(dim=1, keepdim=True).double().cpu()
        kl_DD -= u_PD.T @ u_PD
        gradient_DD += (u_PD * norm_P1).T @ u_PD - v_PD.T @ u_PD - u_PD.T @ v_PD
    for start in range(0, len(weight_VD), _SLICE_IDS):
        stop = start + _SLICE_IDS
        rows_VD = weight_VD[start:stop].double().cpu()
        kl_DD += (rows_VD.T * p_V[start:stop].cpu()) @ rows_VD
        gradient_DD += (rows_VD.T * p2_V[start:stop].cpu()) @ rows_VD
    scale = len(hidden_PD) * temperature**2
    return kl_DD / scale, gradient_DD / scale


def cut_basis(basis: FittedBasis, nats: float, vocab_size: int) -> tuple[HiddenFacts, Transform]:
    """Choose the step at which rounding costs about `nats`, and the components worth keeping.

    A rounded component has an error of step^2 / 12, one left out its whole variance: the step is
    found by bisection on their sum.
    """
    variance_D = basis.deviation_D**2
    low, high = 1e-9, 4.0 * float(basis.deviation_D.max()) + 1e-9
    for _ in range(60):
        step = (low * high) ** 0.5
        kept_D = basis.deviation_D > _KEPT_FROM * step
        error = float(np.where(kept_D, step**2 / 12, variance_D).sum())
        low, high = (step, high) if error * basis.nats_per_variance < nats else (low, step)
    step = float(np.float32(low))
    in_steps_D = basis.deviation_D / step
    kept = max(int((in_steps_D > _KEPT_FROM).sum()), 1)
    in_steps_R = in_steps_D[:kept]
    largest_R = np.maximum(_DEVIATIONS * in_steps_R, 1.5 * basis.peak_D[:kept] / step)
    is_wide_R = largest_R > NARROW_MAX
    num_wide = int(np.flatnonzero(is_wide_R)[-1]) + 1 if is_wide_R.any() else 0
    counts = np.histogram(-in_steps_R, bins=[-np.inf, *(-e for e in _BAND_EDGES), np.inf])[0]
    facts = HiddenFacts(
        hidden_size=len(basis.mean_D),
        vocab_size=vocab_size,
        bands=tuple(int(count) for count in counts if count),
        num_wide=num_wide,
        step=step,
        fit_positions=basis.num_positions,
    )
    transform = Transform(
        analysis_RD=np.ascontiguousarray(basis.analysis_DD[:kept]),
        synthesis_DR=np.ascontiguousarray(basis.synthesis_DD[:, :kept]),
        mean_D=basis.mean_D,
        limit_R=limits(facts),
        step=step,
    )
    return facts, transform


class DeviceTransform:
    """`Transform.to_codes` on the teacher's device, where hidden states are."""

    def __init__(self, transform: Transform, device: torch.device) -> None:
        self._analysis_DR = torch.from_numpy(transform.analysis_RD.T.copy()).to(device)
        self._mean_D = torch.from_numpy(transform.mean_D.copy()).to(device)
        self._limit_R = torch.from_numpy(transform.limit_R.astype(np.float32)).to(device)
        self._step = transform.step

    @torch.no_grad()
    def to_codes(self, hidden_PD: Tensor) -> npt.NDArray[np.int16]:
        """Return the nearest codes, int16 (P, R), in float32 arithmetic."""
        component_PR = (hidden_PD.float() - self._mean_D) @ self._analysis_DR
        code_PR = torch.round(component_PR / self._step)
        code_PR = torch.minimum(torch.maximum(code_PR, -self._limit_R), self._limit_R)
        codes: npt.NDArray[np.int16] = code_PR.to(torch.int16).cpu().numpy()
        return codes
