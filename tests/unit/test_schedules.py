"""Schedules against their formulas, their ends, and what they say to a wrong word."""

import math

import pytest
import torch

from stage2_student.schedules import (
    Axis,
    Interpolation,
    Schedule,
    effective_lambda,
    lambda_train,
    timestep_weight,
)
from tide_cache.errors import ConfigError

TIMESTEP_P = torch.tensor([1e-3, 0.2, 0.5, 0.999])


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("cosine", 0.0, 0.1),
        ("cosine", 0.25, 0.1 + 0.8 * (1 - math.sqrt(0.5)) / 2),
        ("cosine", 0.5, 0.5),
        ("cosine", 1.0, 0.9),
        ("linear", 0.0, 0.1),
        ("linear", 0.25, 0.3),
        ("linear", 1.0, 0.9),
        ("linear", -0.5, 0.1),
        ("cosine", 7.0, 0.9),
    ],
)
def test_lambda_train(schedule: Schedule, progress: float, expected: float) -> None:
    assert lambda_train(progress, 0.1, 0.9, schedule) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_lambda_grows_with_training_from_end_to_end(schedule: Schedule) -> None:
    values = [lambda_train(step / 50, 0.2, 0.7, schedule) for step in range(51)]
    assert values == sorted(values)
    assert len(set(values)) == 51
    assert (values[0], values[-1]) == pytest.approx((0.2, 0.7))


@pytest.mark.parametrize(
    ("axis", "expected_P"),
    [
        ("both", 0.4 * (1 - TIMESTEP_P)),
        ("training_only", torch.full((4,), 0.4)),
        ("timestep_only", 0.6 * (1 - TIMESTEP_P)),
    ],
)
def test_effective_lambda_per_axis(axis: Axis, expected_P: torch.Tensor) -> None:
    lambda_P = effective_lambda(
        TIMESTEP_P, progress=0.5, lambda_init=0.2, lambda_max=0.6, axis=axis
    )
    torch.testing.assert_close(lambda_P, expected_P)


def test_the_timestep_axis_does_not_move_with_training() -> None:
    first_P, last_P = (
        effective_lambda(TIMESTEP_P, progress, axis="timestep_only") for progress in (0.0, 1.0)
    )
    assert torch.equal(first_P, last_P)


def test_midrange_is_a_bell_around_one_half() -> None:
    weight_P = timestep_weight(torch.tensor([0.5, 0.35, 0.65, 0.2]), "midrange")
    expected_P = torch.tensor([1.0, math.exp(-0.5), math.exp(-0.5), math.exp(-2.0)])
    torch.testing.assert_close(weight_P, expected_P)
    grid_P = torch.linspace(0, 1, 100_001)
    assert timestep_weight(grid_P, "midrange").mean().item() == pytest.approx(0.37, abs=0.01)


def test_uniform_weight_is_one() -> None:
    assert torch.equal(timestep_weight(TIMESTEP_P, "uniform"), torch.ones(4))


def test_half_precision_timesteps_are_widened() -> None:
    assert effective_lambda(TIMESTEP_P.bfloat16(), 0.5).dtype == torch.float32
    assert timestep_weight(TIMESTEP_P.bfloat16(), "midrange").dtype == torch.float32


def test_interpolation_carries_the_same_functions() -> None:
    interpolation = Interpolation(
        lambda_init=0.2,
        lambda_max=0.6,
        schedule="linear",
        axis="both",
        timestep_weight="midrange",
    )
    expected_P = effective_lambda(TIMESTEP_P, 0.3, 0.2, 0.6, "linear", "both")
    assert torch.equal(interpolation.lambda_P(TIMESTEP_P, 0.3), expected_P)
    assert torch.equal(interpolation.weight_P(TIMESTEP_P), timestep_weight(TIMESTEP_P, "midrange"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, r"schedule: expected one of cosine, linear.*'cosine'\?"),
        ({"axis": "timestep"}, r"axis: expected one of both, .*did you mean 'timestep_only'\?"),
        ({"timestep_weight": "mid"}, r"timestep_weight: expected one of uniform, midrange"),
        ({"lambda_max": 1.5}, r"lambda_max: expected a share in \[0, 1\], got 1.5"),
        ({"lambda_init": math.nan}, r"lambda_init: expected a share in \[0, 1\], got nan"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Interpolation(**settings)  # type: ignore[arg-type]


def test_progress_must_be_a_number() -> None:
    with pytest.raises(ConfigError, match="progress: expected step / max_steps"):
        lambda_train(math.nan)
