"""The losses over logits: closed forms, invariances, ends, and what they say to bad input.

Legend: P masked positions, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stage2_student.losses import (
    TeacherCandidates,
    kl_loss,
    kl_per_position,
    tidal_loss,
    tidal_per_position,
)
from stage2_student.losses.targets import Teacher
from stage2_student.schedules import Interpolation
from tide_cache.errors import CompatibilityError, ConfigError, DataError

P, V = 7, 23
LogitLoss = Callable[..., Tensor]


def draw(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


STUDENT_PV, TEACHER_PV = draw(1, P, V), draw(2, P, V)
TIMESTEP_P = torch.linspace(0.05, 0.95, P)


def tidal(student_PV: Tensor, teacher: Teacher, **changes: object) -> Tensor:
    arguments = {"progress": 0.4, "timestep_weight": "midrange", **changes}
    return tidal_loss(student_PV, teacher, TIMESTEP_P[: len(student_PV)], **arguments)  # type: ignore[arg-type]


LOGIT_LOSSES = {
    "tidal": tidal,
    "kl": kl_loss,
    "reverse_kl": partial(kl_loss, direction="reverse"),
}
every_logit_loss = pytest.mark.parametrize("loss_fn", LOGIT_LOSSES.values(), ids=LOGIT_LOSSES)


def value_and_gradient(
    loss_fn: LogitLoss, student_PV: Tensor, teacher: Teacher, **arguments: object
) -> tuple[Tensor, Tensor]:
    leaf = student_PV.clone().requires_grad_()
    loss = loss_fn(leaf, teacher, **arguments)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@every_logit_loss
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_all_candidates_equal_dense_logits_to_the_bit(
    loss_fn: LogitLoss, temperature: float
) -> None:
    candidates = TeacherCandidates.from_logits(TEACHER_PV, k=V, temperatures=(1.0, 2.0, 5.0))
    online = value_and_gradient(loss_fn, STUDENT_PV, TEACHER_PV, temperature=temperature)
    cached = value_and_gradient(loss_fn, STUDENT_PV, candidates, temperature=temperature)
    assert torch.equal(online[0], cached[0])
    assert torch.equal(online[1], cached[1])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("teacher_width", [V, 17])
def test_tidal_gradient_is_the_closed_form(temperature: float, teacher_width: int) -> None:
    """w(t) T (softmax(s/T) - target) / P on the shared ids, nothing on the others."""
    teacher_PV = TEACHER_PV[:, :teacher_width]
    _, gradient_PV = value_and_gradient(tidal, STUDENT_PV, teacher_PV, temperature=temperature)
    interpolation = Interpolation(timestep_weight="midrange")
    lambda_P1 = interpolation.lambda_P(TIMESTEP_P, 0.4)[:, None]
    weight_P1 = interpolation.weight_P(TIMESTEP_P)[:, None]
    shared_PV = STUDENT_PV[:, :teacher_width]
    target_PV = torch.softmax(
        ((1 - lambda_P1) * shared_PV + lambda_P1 * teacher_PV) / temperature, dim=-1
    )
    model_PV = torch.softmax(shared_PV / temperature, dim=-1)
    expected_PV = torch.zeros(P, V)
    expected_PV[:, :teacher_width] = weight_P1 * temperature * (model_PV - target_PV) / P
    torch.testing.assert_close(gradient_PV, expected_PV, rtol=1e-5, atol=1e-8)


def test_kl_gradients_are_the_closed_forms() -> None:
    temperature = 2.0
    model_PV = torch.softmax(STUDENT_PV / temperature, dim=-1)
    target_PV = torch.softmax(TEACHER_PV / temperature, dim=-1)
    _, forward_PV = value_and_gradient(kl_loss, STUDENT_PV, TEACHER_PV, temperature=temperature)
    expected_PV = temperature * (model_PV - target_PV) / P
    torch.testing.assert_close(forward_PV, expected_PV, rtol=1e-5, atol=1e-8)

    ratio_PV = (model_PV / target_PV).log()
    kl_P1 = (model_PV * ratio_PV).sum(dim=-1, keepdim=True)
    _, reverse_PV = value_and_gradient(
        kl_loss, STUDENT_PV, TEACHER_PV, temperature=temperature, direction="reverse"
    )
    expected_PV = temperature * model_PV * (ratio_PV - kl_P1) / P
    torch.testing.assert_close(reverse_PV, expected_PV, rtol=1e-4, atol=1e-7)


@every_logit_loss
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    k=st.integers(1, V),
    temperature=st.sampled_from([1.0, 2.0]),
)
def test_losses_are_finite_and_not_negative(
    loss_fn: LogitLoss, seed: int, scale: float, k: int, temperature: float
) -> None:
    student_PV, teacher_PV = draw(seed, 3, V, scale=scale), draw(seed + 1, 3, V, scale=scale)
    teacher = TeacherCandidates.from_logits(teacher_PV, k=k, temperatures=(1.0, 2.0))
    loss, gradient = value_and_gradient(loss_fn, student_PV, teacher, temperature=temperature)
    assert loss.item() >= -1e-6
    assert torch.isfinite(gradient).all()


@every_logit_loss
def test_a_student_that_agrees_has_nothing_to_learn(loss_fn: LogitLoss) -> None:
    loss, gradient = value_and_gradient(loss_fn, TEACHER_PV, TEACHER_PV)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(gradient, torch.zeros(P, V), rtol=0, atol=1e-7)


@every_logit_loss
@pytest.mark.parametrize("k", [5, V])
def test_constants_added_to_logits_change_nothing(loss_fn: LogitLoss, k: int) -> None:
    def cached(logits_PV: Tensor) -> TeacherCandidates:
        return TeacherCandidates.from_logits(logits_PV, k=k, temperatures=(2.0,))

    plain = value_and_gradient(loss_fn, STUDENT_PV, cached(TEACHER_PV))
    shift_P1 = torch.linspace(-20, 20, P)[:, None]
    shifted = value_and_gradient(loss_fn, STUDENT_PV - shift_P1, cached(TEACHER_PV + shift_P1))
    torch.testing.assert_close(shifted, plain, rtol=1e-4, atol=1e-5)


def test_tidal_at_its_ends_is_nothing_and_forward_kl() -> None:
    no_teacher, gradient = value_and_gradient(
        tidal, STUDENT_PV, TEACHER_PV, progress=0.0, lambda_init=0.0
    )
    assert no_teacher.item() == pytest.approx(0.0, abs=1e-6)
    assert gradient.abs().max().item() < 1e-7
    ends = {"progress": 1.0, "lambda_max": 1.0, "axis": "training_only"}
    only_teacher = tidal(STUDENT_PV, TEACHER_PV, timestep_weight="uniform", **ends)
    torch.testing.assert_close(only_teacher, kl_loss(STUDENT_PV, TEACHER_PV))


@every_logit_loss
@pytest.mark.parametrize("cached", [False, True])
def test_no_masked_position_gives_zero_with_a_graph(loss_fn: LogitLoss, cached: bool) -> None:
    teacher: Teacher = torch.zeros(0, V)
    if cached:
        teacher = TeacherCandidates.from_logits(torch.zeros(0, V), k=4, temperatures=(2.0,))
    leaf = STUDENT_PV.clone().requires_grad_()
    loss = loss_fn(leaf[:0], teacher)
    assert loss.item() == 0.0
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], torch.zeros(P, V))


@every_logit_loss
@pytest.mark.parametrize("k", [None, 4, V])
def test_a_position_the_teacher_never_saw_teaches_nothing(
    loss_fn: LogitLoss, k: int | None
) -> None:
    teacher_PV = TEACHER_PV.clone()
    teacher_PV[2] = -torch.inf
    keep_P = torch.arange(P) != 2

    def form(logits_PV: Tensor) -> Teacher:
        if k is None:
            return logits_PV
        return TeacherCandidates.from_logits(logits_PV, k=k, temperatures=(2.0,))

    _, with_gap_PV = value_and_gradient(loss_fn, STUDENT_PV, form(teacher_PV))
    _, without_PV = value_and_gradient(loss_fn, STUDENT_PV, form(TEACHER_PV))
    assert with_gap_PV[2].abs().max().item() < 1e-7
    torch.testing.assert_close(with_gap_PV[keep_P], without_PV[keep_P])


@every_logit_loss
@pytest.mark.parametrize("k", [None, 2, 6, V])
def test_ids_that_the_teacher_rules_out_stay_finite(loss_fn: LogitLoss, k: int | None) -> None:
    teacher_PV = TEACHER_PV.clone()
    teacher_PV[:, 4:] = -torch.inf  # also a one-hot row below
    teacher_PV[0, 1:] = -torch.inf
    teacher: Teacher = teacher_PV
    if k is not None:
        teacher = TeacherCandidates.from_logits(teacher_PV, k=k, temperatures=(2.0,))
    loss, gradient = value_and_gradient(loss_fn, STUDENT_PV, teacher)
    assert torch.isfinite(loss)
    assert loss.item() > 0
    assert torch.isfinite(gradient).all()


def test_a_share_of_zero_ignores_an_id_that_is_ruled_out() -> None:
    teacher_PV = TEACHER_PV.clone()
    teacher_PV[:, 3] = -torch.inf
    loss = tidal(STUDENT_PV, teacher_PV, progress=0.0, lambda_init=0.0)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_nothing_flows_into_the_teacher() -> None:
    teacher_PV = TEACHER_PV.clone().requires_grad_()
    leaf = STUDENT_PV.clone().requires_grad_()
    loss = tidal(leaf, teacher_PV) + kl_loss(leaf, teacher_PV)
    gradients = torch.autograd.grad(loss, (leaf, teacher_PV), allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1] is None


def test_half_precision_logits_are_widened_before_the_softmax() -> None:
    rounded_PV = STUDENT_PV.bfloat16()
    assert kl_loss(rounded_PV, TEACHER_PV).dtype == torch.float32
    assert torch.equal(kl_loss(rounded_PV, TEACHER_PV), kl_loss(rounded_PV.float(), TEACHER_PV))


def test_accumulated_slices_divide_once() -> None:
    teacher = TeacherCandidates.from_logits(TEACHER_PV, k=6, temperatures=(2.0,))
    interpolation = Interpolation(timestep_weight="midrange")
    parts = []
    for start, stop in ((0, 2), (2, 2), (2, P)):
        rows = slice(start, stop)
        part_teacher = teacher.slice(start, stop)
        parts.append(kl_per_position(STUDENT_PV[rows], part_teacher))
        parts[-1] = parts[-1] + tidal_per_position(
            STUDENT_PV[rows],
            part_teacher,
            TIMESTEP_P[rows],
            progress=0.4,
            interpolation=interpolation,
        )
    accumulated = torch.stack([part.sum() for part in parts]).sum() / P
    torch.testing.assert_close(
        accumulated, tidal(STUDENT_PV, teacher) + kl_loss(STUDENT_PV, teacher)
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: kl_loss(STUDENT_PV[:, :20], TEACHER_PV),
            CompatibilityError,
            r"teacher: 23 ids, but the student has 20; cut the teacher's logits",
        ),
        (
            lambda: kl_loss(STUDENT_PV[:3], TEACHER_PV),
            DataError,
            r"teacher: expected 3 masked positions .*, got 7",
        ),
        (
            lambda: tidal_loss(STUDENT_PV, TEACHER_PV, TIMESTEP_P[:3], progress=0.0),
            DataError,
            r"timestep_P: expected shape \(7,\), one per masked position, got \(3,\)",
        ),
        (
            lambda: kl_loss(STUDENT_PV, TEACHER_PV, temperature=0.0),
            ConfigError,
            r"temperature: expected a positive number, got 0.0",
        ),
        (
            lambda: kl_loss(STUDENT_PV, TEACHER_PV, direction="revers"),  # type: ignore[arg-type]
            ConfigError,
            r"direction: expected one of forward, reverse, got 'revers' \(did you mean 'reverse'\?",
        ),
        (
            lambda: kl_loss(STUDENT_PV[None], TEACHER_PV),
            DataError,
            r"student_logits_PV: expected masked positions x vocabulary",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    call: Callable[[], Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
