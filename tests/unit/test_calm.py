"""The chunk loss against torch's binary cross-entropy, its ends, its floor and bad input.

Legend: P masked positions, C chunks, V vocabulary.
"""

from functools import partial

import pytest
import torch
from torch.nn.functional import binary_cross_entropy

from stage2_student.losses import calm_loss, calm_per_chunk, chunk_logprobs
from stage2_student.losses.kl import Direction
from stage2_student.schedules import Interpolation
from tide_cache.errors import ConfigError, DataError

STUDENT_LOGPROB_C = torch.tensor([-0.02, -0.7, -3.0, -9.0])
TEACHER_LOGPROB_C = torch.tensor([-1.0, -0.1, -4.0, -2.0])
TIMESTEP_C = torch.tensor([0.1, 0.4, 0.6, 0.9])


def test_chunk_logprobs_sum_their_tokens() -> None:
    logits_PV = torch.randn(7, 23, generator=torch.Generator().manual_seed(1)) * 3
    labels_P = torch.arange(7)
    chunk_P = torch.tensor([0, 0, 2, 1, 2, 2, 0])
    logprobs_C = chunk_logprobs(logits_PV, labels_P, chunk_P, 4)
    log_p_PV = torch.log_softmax(logits_PV.double(), dim=-1)
    expected_C = torch.zeros(4, dtype=torch.float64)
    for position, chunk in enumerate(chunk_P.tolist()):
        expected_C[chunk] += log_p_PV[position, labels_P[position]]
    torch.testing.assert_close(logprobs_C.double(), expected_C, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_calm_is_the_binary_cross_entropy(temperature: float) -> None:
    student_C = (STUDENT_LOGPROB_C.double() / temperature).exp()
    teacher_C = (TEACHER_LOGPROB_C.double() / temperature).exp()
    for direction, weight_C, scored_C in (
        ("forward", teacher_C, student_C),
        ("reverse", student_C, teacher_C),
    ):
        expected = binary_cross_entropy(scored_C, weight_C)
        loss = calm_loss(
            STUDENT_LOGPROB_C,
            TEACHER_LOGPROB_C,
            temperature=temperature,
            direction=direction,  # type: ignore[arg-type]
        )
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_interpolated_calm_at_its_ends(direction: Direction) -> None:
    """A share of 1 is plain CALM; a share of 0 leaves a forward target equal to the student."""
    call = partial(
        calm_loss, direction=direction, timestep_C=TIMESTEP_C, interpolate=True, lambda_max=1.0
    )
    only_teacher = call(STUDENT_LOGPROB_C, TEACHER_LOGPROB_C, progress=1.0, axis="training_only")
    plain = calm_loss(STUDENT_LOGPROB_C, TEACHER_LOGPROB_C, direction=direction)
    torch.testing.assert_close(only_teacher, plain)
    if direction == "forward":
        leaf = STUDENT_LOGPROB_C.clone().requires_grad_()
        loss = call(leaf, TEACHER_LOGPROB_C, progress=0.0, lambda_init=0.0)
        assert torch.autograd.grad(loss, leaf)[0].abs().max().item() < 1e-6


def test_interpolated_calm_weighs_each_chunk_by_its_timestep() -> None:
    interpolation = Interpolation(schedule="linear", timestep_weight="midrange")
    per_chunk_C = calm_per_chunk(
        STUDENT_LOGPROB_C,
        TEACHER_LOGPROB_C,
        direction="forward",
        timestep_C=TIMESTEP_C,
        progress=0.5,
        interpolation=interpolation,
    )
    student_C, teacher_C = (STUDENT_LOGPROB_C / 2).exp(), (TEACHER_LOGPROB_C / 2).exp()
    lambda_C = 0.5 * (1 - TIMESTEP_C)
    mixed_C = (1 - lambda_C) * student_C + lambda_C * teacher_C
    expected_C = torch.exp(-((TIMESTEP_C - 0.5) ** 2) / 0.045) * (
        binary_cross_entropy(student_C, mixed_C, reduction="none")
    )
    torch.testing.assert_close(per_chunk_C, expected_C)


def test_probabilities_beyond_the_floor_give_no_gradient() -> None:
    leaf = torch.tensor([-40.0, 0.0, -1.0], requires_grad=True)
    loss = calm_loss(leaf, torch.full((3,), -0.5), temperature=1.0, direction="forward")
    gradient_C = torch.autograd.grad(loss, leaf)[0]
    assert gradient_C[:2].tolist() == [0.0, 0.0]
    assert gradient_C[2].item() != 0.0


def test_no_active_chunk_gives_zero_with_a_graph() -> None:
    leaf = STUDENT_LOGPROB_C.clone().requires_grad_()
    loss = calm_loss(leaf[:0], TEACHER_LOGPROB_C[:0])
    assert loss.item() == 0.0
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], torch.zeros(4))


def test_calm_names_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="timestep_C: the interpolated chunk loss needs it"):
        calm_loss(STUDENT_LOGPROB_C, TEACHER_LOGPROB_C, interpolate=True, progress=0.5)
    with pytest.raises(ConfigError, match="progress: the interpolated chunk loss needs it"):
        calm_loss(STUDENT_LOGPROB_C, TEACHER_LOGPROB_C, interpolate=True, timestep_C=TIMESTEP_C)
    with pytest.raises(DataError, match=r"teacher_logprob_C: expected shape \(4,\), one per chunk"):
        calm_loss(STUDENT_LOGPROB_C, TEACHER_LOGPROB_C[:2])
