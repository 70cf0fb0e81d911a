"""How far the target leans to the teacher, and how much a timestep counts.

TIDAL trains against a mixture of student and teacher. Its share lambda grows along two axes: with
training (the student can follow more) and with a cleaner input (at t near 1 nearly everything is
masked and the teacher itself is unsure). Everything here is a pure function of (progress, t), so a
resumed run continues on the same curve without any state.

Shapes: P masked positions (or chunks). Source: arXiv 2604.26951, the TIDAL section.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stage2_student.choices import check_choice
from tide_cache.errors import ConfigError

Schedule = Literal["cosine", "linear"]
Axis = Literal["both", "training_only", "timestep_only"]
TimestepWeight = Literal["uniform", "midrange"]

MIDRANGE_CENTRE = 0.5
MIDRANGE_WIDTH = 0.15


def lambda_train(
    progress: float,
    lambda_init: float = 0.1,
    lambda_max: float = 0.9,
    schedule: Schedule = "cosine",
) -> float:
    """Return the teacher's share that training has reached, from lambda_init to lambda_max.

    `progress` is step / max_steps; outside [0, 1] the nearer end's value holds, so that a run
    prolonged past max_steps keeps lambda_max. Raises ConfigError on an unknown schedule or a
    progress that is not a number.
    """
    check_choice("schedule", schedule, Schedule)
    if math.isnan(progress):
        raise ConfigError("progress: expected step / max_steps in [0, 1], got nan")
    done = min(max(progress, 0.0), 1.0)
    share = done if schedule == "linear" else (1.0 - math.cos(math.pi * done)) / 2.0
    return lambda_init + (lambda_max - lambda_init) * share


def effective_lambda(
    timestep_P: Tensor,
    progress: float,
    lambda_init: float = 0.1,
    lambda_max: float = 0.9,
    schedule: Schedule = "cosine",
    axis: Axis = "both",
) -> Tensor:
    """Return the teacher's share of each position's target, float32 (P,).

    `axis` says what moves it: `both` lambda_train (1 - t), `training_only` lambda_train,
    `timestep_only` lambda_max (1 - t). Raises ConfigError on an unknown schedule or axis.
    """
    check_choice("axis", axis, Axis)
    reached = lambda_train(progress, lambda_init, lambda_max, schedule)
    t_P = timestep_P.float()
    if axis == "training_only":
        return torch.full_like(t_P, reached)
    return (reached if axis == "both" else lambda_max) * (1.0 - t_P)


def timestep_weight(timestep_P: Tensor, kind: TimestepWeight = "uniform") -> Tensor:
    """Return how much each position counts, float32 (P,): 1, or a bell around t = 0.5.

    `midrange` is exp(-(t - 0.5)^2 / (2 * 0.15^2)), not normalised: it also scales the loss, by
    0.37 on average over uniform t. Raises ConfigError on an unknown kind.
    """
    check_choice("timestep_weight", kind, TimestepWeight)
    t_P = timestep_P.float()
    if kind == "uniform":
        return torch.ones_like(t_P)
    return torch.exp(-((t_P - MIDRANGE_CENTRE) ** 2) / (2 * MIDRANGE_WIDTH**2))


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpolation:
    """The settings of one interpolated loss, checked once and carried as a value.

    Raises ConfigError where a lambda lies outside [0, 1] or a word is not known.
    """

    lambda_init: float = 0.1
    lambda_max: float = 0.9
    schedule: Schedule = "cosine"
    axis: Axis = "both"
    timestep_weight: TimestepWeight = "uniform"

    def __post_init__(self) -> None:
        for field in ("lambda_init", "lambda_max"):
            value = getattr(self, field)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{field}: expected a share in [0, 1], got {value!r}")
        check_choice("schedule", self.schedule, Schedule)
        check_choice("axis", self.axis, Axis)
        check_choice("timestep_weight", self.timestep_weight, TimestepWeight)

    def lambda_P(self, timestep_P: Tensor, progress: float) -> Tensor:
        """Return the teacher's share per position, float32 (P,); see `effective_lambda`."""
        return effective_lambda(
            timestep_P, progress, self.lambda_init, self.lambda_max, self.schedule, self.axis
        )

    def weight_P(self, timestep_P: Tensor) -> Tensor:
        """Return the weight per position, float32 (P,); see the function `timestep_weight`."""
        return timestep_weight(timestep_P, self.timestep_weight)
