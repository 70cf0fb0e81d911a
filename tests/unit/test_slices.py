"""A loss in slices of positions is the loss, value and gradient, whatever the slice.

Shapes: P positions, V vocabulary, D hidden size.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from stage2_student.losses import kl_per_position, tidal_per_position
from stage2_student.schedules import Interpolation
from stage2_student.slices import SLICE_FLOATS, SliceLoss, summed_in_slices

P, V, D = 7, 23, 5
TIMESTEP_P = torch.linspace(0.05, 0.95, P)
LOSSES = ("tidal", "kl", "reverse_kl")
every_loss = pytest.mark.parametrize("name", LOSSES)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


STUDENT_PV, TEACHER_PV = draw(1, P, V), draw(2, P, V)


def make_loss(name: str) -> SliceLoss:
    """A real term of the objective, as the objective slices it."""

    def loss(student_PV: Tensor, start: int, stop: int) -> Tensor:
        teacher_PV = TEACHER_PV[start:stop]
        if name == "tidal":
            return tidal_per_position(
                student_PV,
                teacher_PV,
                TIMESTEP_P[start:stop],
                progress=0.4,
                interpolation=Interpolation(),
            ).sum()
        direction = "forward" if name == "kl" else "reverse"
        return kl_per_position(student_PV, teacher_PV, direction=direction).sum()  # type: ignore[arg-type]

    return loss


def plain(logits_PV: Tensor, loss: SliceLoss) -> Tensor:
    return loss(logits_PV, 0, len(logits_PV))


def value_and_gradient(
    make: Callable[[Tensor], Tensor], logits_PV: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    leaf_PV = logits_PV.clone().requires_grad_()
    value = make(leaf_PV)
    (gradient_PV,) = torch.autograd.grad(scale * value, leaf_PV)
    return value.detach(), gradient_PV


@every_loss
@pytest.mark.parametrize("rows", [1, 2, 3, 6, P, P + 1, 1000])
def test_any_slice_gives_value_and_gradient_of_the_whole(name: str, rows: int) -> None:
    """`rows` positions a slice; 2, 3 and 6 do not divide P."""
    loss = make_loss(name)
    sliced = partial(summed_in_slices, loss=loss, slice_floats=rows * V + V - 1)
    value, gradient_PV = value_and_gradient(sliced, STUDENT_PV)
    expected, expected_PV = value_and_gradient(partial(plain, loss=loss), STUDENT_PV)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient_PV, expected_PV, rtol=0, atol=1e-6)
    assert expected_PV.abs().max() > 0.1


@pytest.mark.parametrize("slice_floats", [1, V, 3 * V, 3 * V + V - 1, SLICE_FLOATS])
def test_slices_follow_each_other_and_none_is_larger_than_asked(slice_floats: int) -> None:
    """A slice holds one position at least, however small it should be."""
    seen: list[tuple[int, int]] = []

    def loss(student_PV: Tensor, start: int, stop: int) -> Tensor:
        assert torch.equal(student_PV, STUDENT_PV[start:stop])
        seen.append((start, stop))
        return student_PV.square().sum()

    summed_in_slices(STUDENT_PV.clone().requires_grad_(), loss, slice_floats=slice_floats)
    assert [start for start, _ in seen] == [0, *(stop for _, stop in seen[:-1])]
    assert seen[-1][1] == P
    assert max(stop - start for start, stop in seen) == min(P, max(1, slice_floats // V))


@every_loss
def test_the_gradient_that_comes_from_above_scales_it(name: str) -> None:
    loss = make_loss(name)
    sliced = partial(summed_in_slices, loss=loss, slice_floats=2 * V)
    _, gradient_PV = value_and_gradient(sliced, STUDENT_PV)
    for scale in (0.25, -3.0):
        _, scaled_PV = value_and_gradient(sliced, STUDENT_PV, scale)
        torch.testing.assert_close(scaled_PV, scale * gradient_PV, rtol=1e-6, atol=0)


@every_loss
def test_the_gradient_goes_on_to_what_made_the_logits(name: str) -> None:
    """As in the objective: logits come from an output head, and other terms read them too."""
    loss, hidden_PD, head_VD = make_loss(name), draw(3, P, D), draw(4, V, D)
    found: list[Tensor] = []
    for make in (
        partial(summed_in_slices, loss=loss, slice_floats=2 * V),
        partial(plain, loss=loss),
    ):
        leaf_PD = hidden_PD.clone().requires_grad_()
        logits_PV = leaf_PD @ head_VD.T
        total = make(logits_PV) / P + logits_PV.square().mean()
        found += torch.autograd.grad(total, leaf_PD)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@every_loss
def test_logits_in_bfloat16_get_their_gradient_in_bfloat16(name: str) -> None:
    loss, logits_PV = make_loss(name), STUDENT_PV.bfloat16()
    sliced = partial(summed_in_slices, loss=loss, slice_floats=2 * V)
    value, gradient_PV = value_and_gradient(sliced, logits_PV)
    expected, expected_PV = value_and_gradient(partial(plain, loss=loss), logits_PV)
    assert value.dtype == torch.float32
    assert gradient_PV.dtype == torch.bfloat16
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient_PV, expected_PV, rtol=2**-8, atol=1e-6)


@every_loss
def test_without_a_gradient_there_is_the_value_and_no_graph(name: str) -> None:
    loss = make_loss(name)
    expected = plain(STUDENT_PV, loss)
    value = summed_in_slices(STUDENT_PV, loss, slice_floats=2 * V)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    with torch.no_grad():
        quiet = summed_in_slices(STUDENT_PV.clone().requires_grad_(), loss, slice_floats=2 * V)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, expected, rtol=1e-6, atol=0)


@every_loss
def test_no_position_gives_zero_with_a_graph(name: str) -> None:
    value, gradient_PV = value_and_gradient(
        partial(summed_in_slices, loss=make_loss(name)), STUDENT_PV[:0]
    )
    assert value == 0
    assert gradient_PV.shape == (0, V)


def test_a_backward_through_the_same_logits_twice_adds_up() -> None:
    loss = make_loss("kl")
    leaf_PV = STUDENT_PV.clone().requires_grad_()
    value = summed_in_slices(leaf_PV, loss, slice_floats=2 * V)
    again = summed_in_slices(leaf_PV, loss, slice_floats=3 * V)
    (found_PV,) = torch.autograd.grad(value + 2 * again, leaf_PV)
    _, gradient_PV = value_and_gradient(partial(plain, loss=loss), STUDENT_PV)
    torch.testing.assert_close(found_PV, 3 * gradient_PV, rtol=1e-5, atol=1e-6)
