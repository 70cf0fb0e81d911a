"""What a cache remembers of one teacher distribution, and the full distribution rebuilt from it.

Per masked position: the likeliest ids, their logits, and the exact logsumexp of z/T over the whole
vocabulary for each temperature of the build. The other logits follow a shape (`tail`) plus one
number per position, chosen so that the total mass at T is the stored one. At T = 2 that mass often
exceeds the head's, and how it is spread decides the gradient: `python -m benchmarks.fidelity`
prints what each tail keeps. K = V gives the logits back to the bit. `tide_cache.tails` is the same
in numpy, slow and obvious; a test holds the two together.

Shapes: P masked positions, K candidates, V vocabulary, T temperatures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stage2_student.choices import check_choice
from stage2_student.losses.replay import HiddenRows
from tide_cache.errors import CompatibilityError, ConfigError, DataError
from tide_cache.tails import NEEDS_MEAN, NEEDS_STUDENT, Tail

# A stored logsumexp and the head's agree to a few float32 steps; a smaller tail is rounding noise.
_RESOLUTION_STEPS = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherCandidates:
    """The top of the teacher's distribution at P positions with its exact total mass.

    `ids_PK` int64, the likeliest ids in any order; where a position has fewer than K the others
    are `vocab_size`, with logits of -inf. `logits_PK` float32, at temperature 1; `logsumexp_PT`
    float32, of z/T over the full vocabulary, a column per entry of `temperatures`.
    `tail_logshare_PT` float32: log of the share of the mass that is not the candidates', where
    their logits were rounded; they are then shifted together to the mass that is theirs. `tail`
    says how the other logits are modelled (`tide_cache.tails`); `mean_logits_V` float32 and
    `hidden` are what `mean` and `hidden` need, and the default where they are given. Raises
    DataError where shapes do not fit together.
    """

    ids_PK: Tensor
    logits_PK: Tensor
    logsumexp_PT: Tensor
    temperatures: tuple[float, ...]
    vocab_size: int
    mean_logits_V: Tensor | None = None
    tail_logshare_PT: Tensor | None = None
    hidden: HiddenRows | None = None
    tail: Tail | None = None

    def __post_init__(self) -> None:
        if self.tail is None:
            default: Tail = "uniform" if self.mean_logits_V is None else "mean"
            object.__setattr__(self, "tail", "hidden" if self.hidden is not None else default)
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
        """K, the number of ids kept per position, at most."""
        return self.ids_PK.shape[1]

    @property
    def needs_student(self) -> bool:
        """Whether `dense` asks for the student's logits."""
        return self.tail in NEEDS_STUDENT

    def slice(self, start: int, stop: int) -> "TeacherCandidates":
        """Return the positions [start, stop) as views, for work in slices of P."""
        logshare_PT = self.tail_logshare_PT
        return replace(
            self,
            ids_PK=self.ids_PK[start:stop],
            logits_PK=self.logits_PK[start:stop],
            logsumexp_PT=self.logsumexp_PT[start:stop],
            tail_logshare_PT=None if logshare_PT is None else logshare_PT[start:stop],
            hidden=None if self.hidden is None else self.hidden.slice(start, stop),
        )

    def to(self, device: torch.device | str) -> "TeacherCandidates":
        """Return the same candidates on `device`."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            ids_PK=self.ids_PK.to(device, non_blocking=True),
            logits_PK=self.logits_PK.to(device, non_blocking=True),
            logsumexp_PT=self.logsumexp_PT.to(device, non_blocking=True),
            mean_logits_V=moved(self.mean_logits_V),
            tail_logshare_PT=moved(self.tail_logshare_PT),
            hidden=None if self.hidden is None else self.hidden.to(device),
        )

    def logsumexp_P(self, temperature: float) -> Tensor:
        """Return the stored logsumexp of z/T, float32 (P,).

        Raises CompatibilityError naming the stored temperatures where this one is not among them.
        """
        return self.logsumexp_PT[:, self._column(temperature)]

    @torch.no_grad()
    def tail_logmass_P(self, temperature: float) -> Tensor:
        """Return log of the sum of exp(z/T) over the ids that are not candidates, float32 (P,).

        The stored share of the total, or the total less the head. A tail below float32's
        resolution cannot be told from none: there it is the largest that the total's rounding and
        the least candidate (no other logit exceeds it) both allow. -inf where no id is left.
        """
        column = self._column(temperature)
        total_P = self.logsumexp_PT[:, column]
        if self.tail_logshare_PT is not None:
            return total_P + self.tail_logshare_PT[:, column]
        missing_PK = self.ids_PK == self.vocab_size
        num_others_P = self.vocab_size - self.num_candidates + missing_PK.sum(dim=-1)
        head_P = torch.logsumexp(self.logits_PK / temperature, dim=-1)
        tail_share_P = -torch.expm1(head_P - total_P)
        resolution_P = _RESOLUTION_STEPS * total_P.abs().clamp_min(1.0)
        measured_P = total_P + tail_share_P.clamp_min(resolution_P).log()
        least_P = self.logits_PK.masked_fill(missing_PK, math.inf).amin(dim=-1)
        bound_P = least_P / temperature + num_others_P.float().log()
        resolved_P = tail_share_P > resolution_P
        tail_P = torch.where(resolved_P, measured_P, torch.minimum(measured_P, bound_P))
        # A row of -inf everywhere (no teacher here) has -inf - -inf above.
        is_empty_P = total_P.isneginf() | (num_others_P == 0)
        return tail_P.masked_fill(is_empty_P, -math.inf)

    @torch.no_grad()
    def dense(
        self,
        temperature: float,
        student_logits_PV: Tensor | None = None,
        replayed_PV: Tensor | None = None,
    ) -> Tensor:
        """Rebuild full logits float32 (P, V) whose logsumexp at `temperature` is the stored one.

        Exact candidates keep their logits to the bit, rounded ones their differences. The tails
        that follow the student need its logits. `replayed_PV`: what `hidden.logits()` gave, where
        the caller has it. Raises CompatibilityError where `temperature` was not stored, ConfigError
        where the student's logits are missing.
        """
        shape_PV = self._tail_shape(student_logits_PV) if replayed_PV is None else replayed_PV
        others_PV = torch.empty(
            (self.num_positions, self.vocab_size + 1), device=self.ids_PK.device
        )
        others_PV[:, :-1] = shape_PV
        # One column more takes the missing candidates of a short position.
        others_PV[:, -1] = -math.inf
        others_PV.scatter_(1, self.ids_PK, -math.inf)
        tail_logmass_P = self.tail_logmass_P(temperature)
        shape_logmass_P = torch.logsumexp(others_PV / temperature, dim=-1)
        shift_P = temperature * (tail_logmass_P - shape_logmass_P)
        # A shape without any mass left (K = V, or -inf everywhere) stays empty instead of NaN.
        shift_P = torch.where(shape_logmass_P.isneginf(), shape_logmass_P, shift_P)
        others_PV += shift_P[:, None]
        others_PV.scatter_(1, self.ids_PK, self._head_logits_PK(temperature))
        return others_PV[:, :-1]

    def _head_logits_PK(self, temperature: float) -> Tensor:
        """Return the candidates' logits, shifted to their mass where they were rounded."""
        if self.tail_logshare_PT is None and self.tail != "none":
            return self.logits_PK
        column = self._column(temperature)
        target_P = self.logsumexp_PT[:, column]
        if self.tail != "none" and self.tail_logshare_PT is not None:
            target_P = target_P + torch.log(-torch.expm1(self.tail_logshare_PT[:, column]))
        head_P = torch.logsumexp(self.logits_PK / temperature, dim=-1)
        shift_P = torch.where(head_P.isneginf(), 0.0, temperature * (target_P - head_P))
        return self.logits_PK + shift_P[:, None]

    def _column(self, temperature: float) -> int:
        for column, stored in enumerate(self.temperatures):
            if math.isclose(stored, temperature, rel_tol=1e-6):
                return column
        raise CompatibilityError(
            f"temperature {temperature:g}: the cache holds the teacher's mass at "
            f"{', '.join(f'{stored:g}' for stored in self.temperatures)} only",
            hint="train at one of these, or build the cache again with this temperature",
        )

    def _tail_shape(self, student_logits_PV: Tensor | None) -> Tensor | float:
        """Return the logits, broadcast to (P, V), that the tail follows up to a constant each."""
        if self.tail == "none":
            return -math.inf
        if self.tail == "uniform":
            return 0.0
        if self.tail == "hidden":
            assert self.hidden is not None  # checked on construction
            return self.hidden.logits()
        shapes = []
        if self.tail in NEEDS_MEAN:
            assert self.mean_logits_V is not None  # checked on construction
            shapes.append(self.mean_logits_V)
        if self.tail in NEEDS_STUDENT:
            if student_logits_PV is None:
                raise ConfigError(f"tail: {self.tail!r} needs the student's logits, got none")
            shapes.append(student_logits_PV[:, : self.vocab_size].detach().float())
        return shapes[0] if len(shapes) == 1 else (shapes[0] + shapes[1]) / 2


def _check_temperatures(temperatures: tuple[float, ...]) -> None:
    if not temperatures or not all(0.0 < value < math.inf for value in temperatures):
        raise ConfigError(
            f"temperatures: expected one or more positive numbers, got {list(temperatures)}"
        )


def _check_fields(candidates: TeacherCandidates) -> None:
    """Raise DataError, naming the field, where shapes or types do not fit together."""
    check_choice("tail", str(candidates.tail), Tail)
    _check_temperatures(candidates.temperatures)
    num_positions, num_candidates = _shape_2d("ids_PK", candidates.ids_PK)
    per_temperature = (num_positions, len(candidates.temperatures))
    _expect("logits_PK", candidates.logits_PK, (num_positions, num_candidates), torch.float32)
    _expect("logsumexp_PT", candidates.logsumexp_PT, per_temperature, torch.float32)
    _expect("ids_PK", candidates.ids_PK, (num_positions, num_candidates), torch.int64)
    if not 1 <= num_candidates <= candidates.vocab_size:
        raise DataError(
            f"ids_PK: expected 1 to {candidates.vocab_size} candidates (the vocabulary), got "
            f"{num_candidates}"
        )
    if candidates.tail_logshare_PT is not None:
        _expect("tail_logshare_PT", candidates.tail_logshare_PT, per_temperature, torch.float32)
    if candidates.mean_logits_V is not None:
        _expect("mean_logits_V", candidates.mean_logits_V, (candidates.vocab_size,), torch.float32)
    elif candidates.tail in NEEDS_MEAN:
        raise DataError(f"mean_logits_V: the tail {candidates.tail!r} needs it, got none")
    if candidates.hidden is not None:
        candidates.hidden.check(num_positions, candidates.vocab_size)
    elif candidates.tail == "hidden":
        raise DataError("hidden: the tail 'hidden' needs it, got none")


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
