"""The fitted transform: the metric is the explicit one, and rounding costs the nats asked for.

Shapes: P positions, D hidden size, R components kept, V vocabulary.
"""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from stage1_teacher import hidden_fit
from stage1_teacher.hidden_fit import (
    DeviceTransform,
    FittedBasis,
    Head,
    cut_basis,
    fit_basis,
    quadratic_forms,
)
from tide_cache.payload_facts import HiddenFacts
from tide_cache.payloads.hidden import Transform, limits

P, D, V = 700, 16, 120
TEMPERATURES = (1.0, 2.0)
NATS = (0.1, 0.03, 0.01, 0.003, 0.001, 1e-5)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_head(*, has_bias: bool = True, dtype: torch.dtype = torch.float32) -> Head:
    return Head(
        weight_VD=draw(1, V, D).to(dtype), bias_V=draw(2, V).to(dtype) if has_bias else None
    )


def hidden_states(seed: int, num_positions: int = P) -> Tensor:
    """Correlated, around a mean, with deviations from 1.2 down to 0.02."""
    deviation_D = torch.logspace(0.1, -1.7, D)
    rotation_DD: Tensor = torch.linalg.qr(draw(3, D, D))[0]
    return (draw(seed, num_positions, D) * deviation_D) @ rotation_DD + draw(4, D) / 2


@cache
def basis() -> FittedBasis:
    return fit_basis(hidden_states(0), make_head(), TEMPERATURES)


def explicit_forms(hidden_PD: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
    """Means of W' J W and W' J^2 W over T^2 with J = diag p - p p', position after position."""
    weight_VD = head.weight_VD.double()
    kl_DD, gradient_DD = torch.zeros(D, D).double(), torch.zeros(D, D).double()
    for logits_V in head.logits(hidden_PD).double():
        p_V = torch.softmax(logits_V / temperature, dim=0)
        j_VV = torch.diag(p_V) - torch.outer(p_V, p_V)
        kl_DD += weight_VD.T @ j_VV @ weight_VD
        gradient_DD += weight_VD.T @ j_VV @ j_VV @ weight_VD
    scale = len(hidden_PD) * temperature**2
    return kl_DD / scale, gradient_DD / scale


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_forms_are_the_explicit_ones(
    has_bias: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices of positions and of ids that do not divide either."""
    monkeypatch.setattr(hidden_fit, "_SLICE_POSITIONS", 7)
    monkeypatch.setattr(hidden_fit, "_SLICE_IDS", 50)
    hidden_PD, head = hidden_states(5, 30), make_head(has_bias=has_bias)
    found = quadratic_forms(hidden_PD, head, temperature)
    for form_DD, expected_DD in zip(
        found, explicit_forms(hidden_PD, head, temperature), strict=True
    ):
        assert form_DD.dtype == torch.float64
        slack = 1e-5 * float(expected_DD.abs().max())
        torch.testing.assert_close(form_DD, expected_DD, rtol=0, atol=slack)


def test_a_head_in_bfloat16_has_the_forms_of_its_numbers() -> None:
    hidden_PD, head = hidden_states(5, 30), make_head(dtype=torch.bfloat16)
    for form_DD, expected_DD in zip(
        quadratic_forms(hidden_PD, head, 2.0), explicit_forms(hidden_PD, head, 2.0), strict=True
    ):
        slack = 0.02 * float(expected_DD.abs().max())
        torch.testing.assert_close(form_DD, expected_DD, rtol=0, atol=slack)


def mean_kl(exact_PD: Tensor, changed_PD: Tensor, head: Head, temperature: float) -> float:
    """Mean KL(exact || changed) of the head's softmaxes at one temperature, float64."""
    log_p_PV, log_q_PV = (
        torch.log_softmax(head.logits(hidden_PD).double() / temperature, dim=-1)
        for hidden_PD in (exact_PD, changed_PD)
    )
    return float((log_p_PV.exp() * (log_p_PV - log_q_PV)).sum(dim=1).mean())


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_half_the_form_of_a_small_error_is_its_kl(temperature: float) -> None:
    hidden_PD, head = hidden_states(5), make_head()
    kl_DD, _ = quadratic_forms(hidden_PD, head, temperature)
    error_D = 0.02 * draw(6, D)
    predicted = 0.5 * float(error_D.double() @ kl_DD @ error_D.double())
    measured = mean_kl(hidden_PD, hidden_PD + error_D, head, temperature)
    assert measured == pytest.approx(predicted, rel=0.05)


def test_the_maps_undo_each_other() -> None:
    fitted = basis()
    product_DD = fitted.analysis_DD.astype(float) @ fitted.synthesis_DD.astype(float)
    np.testing.assert_allclose(product_DD, np.eye(D), atol=1e-4)
    assert fitted.num_positions == P


def test_components_are_uncorrelated_and_descend() -> None:
    fitted = basis()
    hidden_PD = hidden_states(0).double().numpy()
    np.testing.assert_allclose(hidden_PD.mean(axis=0), fitted.mean_D, atol=1e-5)
    component_PD = (hidden_PD - hidden_PD.mean(axis=0)) @ fitted.analysis_DD.T.astype(float)
    covariance_DD = component_PD.T @ component_PD / P
    outer_DD = np.outer(fitted.deviation_D, fitted.deviation_D)
    np.testing.assert_allclose(covariance_DD / outer_DD, np.eye(D), atol=1e-3)
    assert (np.diff(fitted.deviation_D) <= 0).all()
    np.testing.assert_allclose(np.abs(component_PD).max(axis=0), fitted.peak_D, rtol=1e-3)


def test_errors_of_components_matter_equally() -> None:
    """In components the metric, each form over its trace with the covariance, is the unit."""
    fitted, hidden_PD, head = basis(), hidden_states(0), make_head()
    centred_PD = hidden_PD.double() - hidden_PD.double().mean(dim=0)
    covariance_DD = centred_PD.T @ centred_PD / P
    metric_DD = torch.zeros(D, D).double()
    for temperature in TEMPERATURES:
        for form_DD in quadratic_forms(hidden_PD, head, temperature):
            metric_DD += form_DD / (form_DD * covariance_DD).sum()
    synthesis_DD = torch.from_numpy(fitted.synthesis_DD).double()
    in_components_DD = synthesis_DD.T @ metric_DD @ synthesis_DD
    torch.testing.assert_close(in_components_DD, torch.eye(D).double(), rtol=0, atol=1e-3)
    # The four traces over the normalised covariance are 1 each, so the variances sum to 4.
    assert float((fitted.deviation_D**2).sum()) == pytest.approx(4, rel=1e-3)


def cut(nats: float) -> tuple[HiddenFacts, Transform]:
    return cut_basis(basis(), nats, V)


def rounded(hidden_PD: Tensor, transform: Transform) -> Tensor:
    codes_PR = transform.to_codes(hidden_PD.numpy())
    return torch.from_numpy(transform.to_hidden(codes_PR))


@pytest.mark.parametrize("nats", NATS)
def test_rounding_costs_about_the_nats_asked_for(nats: float) -> None:
    """Over positions that were not fitted on: within a factor of 2, mean over temperatures."""
    _, transform = cut(nats)
    hidden_PD, head = hidden_states(7), make_head()
    back_PD = rounded(hidden_PD, transform)
    measured = np.mean([mean_kl(hidden_PD, back_PD, head, t) for t in TEMPERATURES])
    assert nats / 2 < measured < 2 * nats


def test_fewer_nats_take_smaller_steps_and_more_components() -> None:
    found = [cut(nats)[0] for nats in NATS]
    steps = [facts.step for facts in found]
    kept = [facts.num_components for facts in found]
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) == len(steps)
    assert kept == sorted(kept)
    assert kept[0] < D
    assert kept[-1] == D


@pytest.mark.parametrize("nats", NATS)
def test_facts_and_transform_fit_each_other(nats: float) -> None:
    facts, transform = cut(nats)
    kept = facts.num_components
    assert sum(facts.bands) == kept == len(transform.limit_R)
    assert (facts.hidden_size, facts.vocab_size, facts.fit_positions) == (D, V, P)
    assert transform.step == facts.step
    np.testing.assert_array_equal(transform.limit_R, limits(facts))
    np.testing.assert_array_equal(transform.analysis_RD, basis().analysis_DD[:kept])
    np.testing.assert_array_equal(transform.synthesis_DR, basis().synthesis_DD[:, :kept])
    tensors = {"analysis": transform.analysis_RD, "synthesis": transform.synthesis_DR}
    Transform.from_tensors(facts, tensors | {"mean": transform.mean_D})


@pytest.mark.parametrize("nats", NATS)
def test_a_column_holds_components_of_one_size(nats: float) -> None:
    """Deviations within a column differ by a factor of 2 at most, but for the first and last."""
    facts, _ = cut(nats)
    in_steps_R = basis().deviation_D[: facts.num_components] / facts.step
    edges = np.cumsum([0, *facts.bands])
    for start, stop in itertools.pairwise(edges[1:-1]):
        assert in_steps_R[start] / in_steps_R[stop - 1] <= 2
    if len(facts.bands) > 1:
        assert in_steps_R[edges[1] - 1] > in_steps_R[edges[1]]


@pytest.mark.parametrize("nats", [0.01, 1e-3, 1e-5, 1e-8])
def test_components_that_outgrow_a_byte_take_two(nats: float) -> None:
    facts, transform = cut(nats)
    codes_PR = transform.to_codes(hidden_states(7).numpy())
    assert (np.abs(codes_PR) < transform.limit_R).all(), "nothing is cut off"
    largest_R = np.abs(codes_PR).max(axis=0)
    assert (largest_R[facts.num_wide :] <= 127).all()
    if nats >= 0.01:
        assert facts.num_wide == 0
    if nats <= 1e-5:
        assert facts.num_wide > 0
        assert (largest_R[: facts.num_wide] > 30).all(), "and none is wide for nothing"
    assert (facts.num_wide == facts.num_components) == (nats == 1e-8)


@pytest.mark.parametrize("nats", [0.1, 1e-3, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teachers_device_gives_the_codes_of_the_slow_form(
    nats: float, dtype: torch.dtype
) -> None:
    """Alike but where float32 rounds a half the other way; far outside both cut at the limits."""
    _, transform = cut(nats)
    hidden_PD = torch.cat([hidden_states(7), 1e6 * hidden_states(8, 20)]).to(dtype)
    found_PR = DeviceTransform(transform, torch.device("cpu")).to_codes(hidden_PD)
    expected_PR = transform.to_codes(hidden_PD.float().numpy())
    assert found_PR.dtype == np.int16
    component_PR = (hidden_PD.float().numpy() - transform.mean_D) @ transform.analysis_RD.T
    from_half_PR = np.abs(component_PR / transform.step % 1 - 0.5)
    differs_PR = found_PR != expected_PR
    assert (np.abs(found_PR.astype(int) - expected_PR) <= 1).all()
    assert (from_half_PR[differs_PR] < 0.01).all()
    assert differs_PR.mean() < 1e-3
    assert (np.abs(expected_PR[P:]) == transform.limit_R).mean() > 0.9


def test_a_direction_that_never_varies_costs_nothing() -> None:
    """Fewer positions than components, and one direction that no position has."""
    hidden_PD = hidden_states(9, 10)
    hidden_PD[:, 3] = 0.25
    fitted = fit_basis(hidden_PD, make_head(), TEMPERATURES)
    assert np.isfinite(fitted.analysis_DD).all()
    assert np.isfinite(fitted.synthesis_DD).all()
    assert (fitted.deviation_D >= 0).all()
    facts, transform = cut_basis(fitted, 0.001, V)
    assert facts.num_components <= 9
    back_PD = rounded(hidden_PD, transform)
    assert mean_kl(hidden_PD, back_PD, make_head(), 1.0) < 0.01
