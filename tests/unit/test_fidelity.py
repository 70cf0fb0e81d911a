"""Closed-form gradients are those of stage 2's autograd, and their sums those of one whole.

Shapes: P positions, V vocabulary.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from stage2_student.losses import kl_per_position, tidal_per_position
from stage2_student.schedules import Interpolation
from tests.payload_builders import random_logits
from tide_cache.fidelity import (
    TIDAL_WEIGHTS,
    GradientSums,
    LossKey,
    gradients,
    log_softmax,
    loss_keys,
)
from tide_cache.payload_facts import LossFidelity

P, V = 6, 31
KEYS = loss_keys([1.0])


def tidal(student_PV: Tensor, teacher_PV: Tensor, weight: float, temperature: float) -> Tensor:
    """TIDAL with one lambda for all positions, whatever progress and timestep are."""
    constant = Interpolation(lambda_init=weight, lambda_max=weight, axis="training_only")
    timestep_P = torch.linspace(0, 1, len(student_PV))
    return tidal_per_position(
        student_PV,
        teacher_PV,
        timestep_P,
        progress=0.37,
        interpolation=constant,
        temperature=temperature,
    )


def loss_of(key: LossKey) -> Callable[[Tensor, Tensor], Tensor]:
    if key.weight is not None:
        return partial(tidal, weight=key.weight, temperature=key.temperature)
    direction = "forward" if key.loss == "kl" else "reverse"
    return partial(kl_per_position, temperature=key.temperature, direction=direction)  # type: ignore[arg-type]


def autograd(key: LossKey, student_PV: np.ndarray, teacher_PV: np.ndarray) -> np.ndarray:
    leaf_PV = torch.from_numpy(student_PV).requires_grad_()
    loss = loss_of(key)(leaf_PV, torch.from_numpy(teacher_PV)).sum()
    (gradient_PV,) = torch.autograd.grad(loss, leaf_PV)
    return gradient_PV.numpy()


def teacher_logits(kind: str) -> np.ndarray:
    """`holes`: a fifth of the ids are ruled out at each position."""
    logits_PV = random_logits(2, P, V, scale={"plain": 3.0, "holes": 3.0, "sharp": 30.0}[kind])
    if kind == "holes":
        logits_PV[:, ::5] = -np.inf
    return logits_PV


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["plain", "holes", "sharp"])
def test_the_closed_forms_are_what_autograd_finds(kind: str, temperature: float) -> None:
    student_PV, teacher_PV = random_logits(1, P, V), teacher_logits(kind)
    keys = loss_keys([temperature])
    found = list(gradients(student_PV, teacher_PV, temperature))
    assert len(found) == len(keys) == 5
    for key, found_PV in zip(keys, found, strict=True):
        expected_PV = autograd(key, student_PV, teacher_PV)
        assert np.abs(expected_PV).max() > 0.01
        # Where an id is ruled out, a reverse KL is 1e4 nats a unit of mass and float32 is relative.
        slack = 1e-5 * max(1.0, float(np.abs(expected_PV).max()))
        np.testing.assert_allclose(found_PV, expected_PV, rtol=0, atol=slack, err_msg=str(key))
        assert found_PV.dtype == np.float32


def test_a_gradient_moves_mass_and_makes_none() -> None:
    for gradient_PV in gradients(random_logits(1, P, V), teacher_logits("holes"), 2.0):
        scale = np.abs(gradient_PV).sum(axis=1)
        assert (np.abs(gradient_PV.sum(axis=1)) <= 1e-6 * scale).all()


def test_a_student_that_is_the_teacher_has_no_gradient() -> None:
    logits_PV = random_logits(1, P, V)
    for gradient_PV in gradients(logits_PV, logits_PV.copy(), 2.0):
        np.testing.assert_allclose(gradient_PV, 0, atol=2e-6)


def test_every_loss_is_measured_at_each_temperature() -> None:
    keys = loss_keys([1.0, 2.0])
    assert [key.temperature for key in keys] == [1.0] * 5 + [2.0] * 5
    assert [key.loss for key in keys[:5]] == ["tidal", "tidal", "tidal", "kl", "reverse_kl"]
    assert [key.weight for key in keys[:5]] == [*TIDAL_WEIGHTS, None, None]
    assert TIDAL_WEIGHTS == (0.1, 0.5, 0.9)


def test_log_softmax_is_that_of_torch() -> None:
    logits_PV = np.concatenate([teacher_logits("holes"), teacher_logits("sharp") * 100])
    expected_PV = torch.log_softmax(torch.from_numpy(logits_PV), dim=-1).numpy()
    np.testing.assert_allclose(log_softmax(logits_PV), expected_PV, rtol=1e-6, atol=1e-6)


def summed(full: np.ndarray, payload: np.ndarray, edges: list[int]) -> GradientSums:
    """The sums over slices of positions, loss by loss."""
    sums = GradientSums(len(full))
    for start, stop in itertools.pairwise(edges):
        for index in range(len(full)):
            sums.add(index, full[index, start:stop], payload[index, start:stop])
    return sums


def two_payloads(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Full gradients and those of a teacher that is a little off, (5, P, V) each."""
    student_PV, teacher_PV = random_logits(seed, P, V), random_logits(seed + 1, P, V)
    off_PV = teacher_PV + random_logits(seed + 2, P, V, scale=0.3)
    return (
        np.stack(list(gradients(student_PV, teacher_PV, 1.0))),
        np.stack(list(gradients(student_PV, off_PV, 1.0))),
    )


@pytest.mark.parametrize("edges", [[0, 1, 2, 3, 4, 5, 6], [0, 4, 6], [0, 0, 5, 6, 6]])
def test_slices_of_positions_add_up_to_the_whole(edges: list[int]) -> None:
    full, payload = two_payloads(3)
    whole = summed(full, payload, [0, P])
    sliced = summed(full, payload, edges)
    np.testing.assert_allclose(sliced.sums_4N, whole.sums_4N, rtol=1e-6)
    for a, b in zip(sliced.result(KEYS), whole.result(KEYS), strict=True):
        assert a.model_dump() == pytest.approx(b.model_dump(), abs=2e-6)


def test_cosine_and_error_are_those_of_all_positions_end_to_end() -> None:
    full, payload = two_payloads(3)
    found = summed(full, payload, [0, 2, P]).result(KEYS)
    for fidelity, key, a_PV, b_PV in zip(found, KEYS, full, payload, strict=True):
        a, b = a_PV.reshape(-1).astype(float), b_PV.reshape(-1).astype(float)
        cosine = a @ b / math.sqrt((a @ a) * (b @ b))
        assert (fidelity.loss, fidelity.weight) == (key.loss, key.weight)
        assert fidelity.temperature == key.temperature
        assert fidelity.cosine == pytest.approx(cosine, abs=2e-6)
        assert 0.5 < fidelity.cosine < 0.9999
        error = np.linalg.norm(b - a) / np.linalg.norm(a)
        assert fidelity.relative_error == pytest.approx(error, abs=2e-6)


def compare(full: np.ndarray, payload: np.ndarray) -> tuple[float, float]:
    sums = GradientSums(1)
    sums.add(0, full, payload)
    (found,) = sums.result(KEYS[:1])
    assert isinstance(found, LossFidelity)
    return found.cosine, found.relative_error


def test_the_ends_of_the_scale() -> None:
    gradient_PV = next(gradients(random_logits(1, P, V), teacher_logits("plain"), 1.0))
    zero_PV = np.zeros_like(gradient_PV)
    assert compare(gradient_PV, gradient_PV) == (1.0, 0.0)
    assert compare(gradient_PV, -gradient_PV) == (-1.0, 2.0)
    assert compare(gradient_PV, 3 * gradient_PV) == (1.0, 2.0)
    assert compare(gradient_PV, zero_PV) == (0.0, 1.0)
    assert compare(zero_PV, gradient_PV) == (0.0, 1.0)
    assert compare(zero_PV, zero_PV) == (1.0, 0.0)
