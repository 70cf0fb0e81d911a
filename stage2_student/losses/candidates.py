"""What a cache remembers of one teacher distribution, and the full distribution rebuilt from it.

Per masked position: the K likeliest ids, their logits, and the exact logsumexp of z/T over the
whole vocabulary for each temperature of the build. The head is exact; the other V - K logits are
modelled as one shape plus one number per position, chosen so that the total mass at T is the stored
one. At T = 2 that mass often exceeds the head's: renormalised top-64 has a gradient cosine of 0.6
with the full-logit loss, tails of the right mass 0.76 (uniform) and 0.86 (mean logits). K = V
gives the logits back to the bit.

Shapes: P masked positions, K candidates, V vocabulary, T temperatures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from stage2_student.choices import check_choice
from tide_cache.errors import CompatibilityError, ConfigError, DataError

Tail = Literal["mean", "uniform"]

# A stored logsumexp and the head's agree to a few float32 steps; a smaller tail is rounding noise.
_RESOLUTION_STEPS = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherCandidates:
    """The top of the teacher's distribution at P positions with its exact total mass.

    `ids_PK` int64, the K likeliest ids in any order; `logits_PK` float32, at temperature 1;
    `logsumexp_PT` float32, of z/T over the full vocabulary, a column per entry of `temperatures`;
    `mean_logits_V` float32, the teacher's mean logits over the cache. `tail` says how the other
    logits are modelled: `mean` shapes them like `mean_logits_V` (the default where it is given),
    `uniform` makes them equal. Raises DataError where shapes do not fit together.
    """

    ids_PK: Tensor
    logits_PK: Tensor
    logsumexp_PT: Tensor
    temperatures: tuple[float, ...]
    vocab_size: int
    mean_logits_V: Tensor | None = None
    tail: Tail | None = None

    def __post_init__(self) -> None:
        if self.tail is None:
            default: Tail = "uniform" if self.mean_logits_V is None else "mean"
            object.__setattr__(self, "tail", default)
        _check_fields(self)

    @classmethod
    def from_logits(
        cls,
        logits_PV: Tensor,
        *,
        k: int,
        temperatures: Sequence[float],
        mean_logits_V: Tensor | None = None,
    ) -> "TeacherCandidates":
        """Keep the `k` likeliest of each row of full logits (P, V), as a cache would.

        Detached, float32. Raises ConfigError unless 1 <= k <= V and every temperature is positive.
        """
        vocab_size = logits_PV.shape[-1]
        if not 1 <= k <= vocab_size:
            raise ConfigError(f"k: expected 1 to {vocab_size} (the vocabulary), got {k}")
        kept = tuple(float(temperature) for temperature in temperatures)
        _check_temperatures(kept)
        logits_PV = logits_PV.detach().float()
        top = torch.topk(logits_PV, k, dim=-1)
        columns = [torch.logsumexp(logits_PV / temperature, dim=-1) for temperature in kept]
        return cls(
            ids_PK=top.indices,
            logits_PK=top.values,
            logsumexp_PT=torch.stack(columns, dim=-1),
            temperatures=kept,
            vocab_size=vocab_size,
            mean_logits_V=None if mean_logits_V is None else mean_logits_V.detach().float(),
        )

    @property
    def num_positions(self) -> int:
        """P, the number of masked positions."""
        return self.ids_PK.shape[0]

    @property
    def num_candidates(self) -> int:
        """K, the number of ids kept per position."""
        return self.ids_PK.shape[1]

    def slice(self, start: int, stop: int) -> "TeacherCandidates":
        """Return the positions [start, stop) as views, for work in slices of P."""
        return replace(
            self,
            ids_PK=self.ids_PK[start:stop],
            logits_PK=self.logits_PK[start:stop],
            logsumexp_PT=self.logsumexp_PT[start:stop],
        )

    def to(self, device: torch.device | str) -> "TeacherCandidates":
        """Return the same candidates on `device`."""
        mean_logits_V = self.mean_logits_V
        return replace(
            self,
            ids_PK=self.ids_PK.to(device),
            logits_PK=self.logits_PK.to(device),
            logsumexp_PT=self.logsumexp_PT.to(device),
            mean_logits_V=None if mean_logits_V is None else mean_logits_V.to(device),
        )

    def logsumexp_P(self, temperature: float) -> Tensor:
        """Return the stored logsumexp of z/T, float32 (P,).

        Raises CompatibilityError naming the stored temperatures where this one is not among them.
        """
        for column, stored in enumerate(self.temperatures):
            if math.isclose(stored, temperature, rel_tol=1e-6):
                return self.logsumexp_PT[:, column]
        raise CompatibilityError(
            f"temperature {temperature:g}: the cache holds the teacher's mass at "
            f"{', '.join(f'{stored:g}' for stored in self.temperatures)} only",
            hint="train at one of these, or build the cache again with this temperature",
        )

    @torch.no_grad()
    def tail_logmass_P(self, temperature: float) -> Tensor:
        """Return log of the sum of exp(z/T) over the ids that are not candidates, float32 (P,).

        The stored total less the head. A tail below float32's resolution cannot be told from none:
        there it is the largest that the total's rounding and the least candidate (no other logit
        exceeds it) both allow. -inf where K = V.
        """
        total_P = self.logsumexp_P(temperature)
        num_others = self.vocab_size - self.num_candidates
        if num_others == 0:
            return torch.full_like(total_P, -math.inf)
        head_P = torch.logsumexp(self.logits_PK / temperature, dim=-1)
        tail_share_P = -torch.expm1(head_P - total_P)
        resolution_P = _RESOLUTION_STEPS * total_P.abs().clamp_min(1.0)
        measured_P = total_P + tail_share_P.clamp_min(resolution_P).log()
        bound_P = self.logits_PK.amin(dim=-1) / temperature + math.log(num_others)
        resolved_P = tail_share_P > resolution_P
        tail_P = torch.where(resolved_P, measured_P, torch.minimum(measured_P, bound_P))
        # A row of -inf everywhere (no teacher here) has -inf - -inf above.
        return torch.where(total_P.isneginf(), total_P, tail_P)

    @torch.no_grad()
    def dense(self, temperature: float) -> Tensor:
        """Rebuild full logits float32 (P, V) whose logsumexp at `temperature` is the stored one.

        Candidates keep their logits to the bit. Raises CompatibilityError where `temperature` was
        not stored.
        """
        tail_logmass_P = self.tail_logmass_P(temperature)
        others_PV = (
            self._tail_shape_V().expand(self.num_positions, -1).scatter(1, self.ids_PK, -math.inf)
        )
        shape_logmass_P = torch.logsumexp(others_PV / temperature, dim=-1)
        shift_P = temperature * (tail_logmass_P - shape_logmass_P)
        # A shape without any mass left (K = V, or -inf everywhere) stays empty instead of NaN.
        shift_P = torch.where(shape_logmass_P.isneginf(), shape_logmass_P, shift_P)
        return (others_PV + shift_P[:, None]).scatter(1, self.ids_PK, self.logits_PK)

    def _tail_shape_V(self) -> Tensor:
        """Return the logits (V,) that the tail follows up to one constant per position."""
        if self.tail == "mean":
            assert self.mean_logits_V is not None  # checked on construction
            return self.mean_logits_V
        return self.logits_PK.new_zeros(self.vocab_size)


def _check_temperatures(temperatures: tuple[float, ...]) -> None:
    if not temperatures or not all(0.0 < value < math.inf for value in temperatures):
        raise ConfigError(
            f"temperatures: expected one or more positive numbers, got {list(temperatures)}"
        )


def _check_fields(candidates: TeacherCandidates) -> None:
    check_choice("tail", str(candidates.tail), Tail)
    _check_temperatures(candidates.temperatures)
    num_positions, num_candidates = _shape_2d("ids_PK", candidates.ids_PK)
    _expect("logits_PK", candidates.logits_PK, (num_positions, num_candidates), torch.float32)
    mass_shape = (num_positions, len(candidates.temperatures))
    _expect("logsumexp_PT", candidates.logsumexp_PT, mass_shape, torch.float32)
    _expect("ids_PK", candidates.ids_PK, (num_positions, num_candidates), torch.int64)
    if not 1 <= num_candidates <= candidates.vocab_size:
        raise DataError(
            f"ids_PK: expected 1 to {candidates.vocab_size} candidates (the vocabulary), got "
            f"{num_candidates}"
        )
    if candidates.mean_logits_V is not None:
        _expect("mean_logits_V", candidates.mean_logits_V, (candidates.vocab_size,), torch.float32)
    elif candidates.tail == "mean":
        raise DataError("mean_logits_V: the tail 'mean' needs it, got none")


def _shape_2d(field: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.ndim != 2:
        raise DataError(f"{field}: expected two axes, got shape {tuple(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]


def _expect(field: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise DataError(
            f"{field}: expected {dtype} of shape {shape}, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )
