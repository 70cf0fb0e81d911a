"""A replayed head is the head: on codes as the slow form says, on exact states as full logits do.

Shapes: P positions, K candidates, R components, D hidden size, V vocabulary, T temperatures.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from stage2_student.losses import (
    HiddenRows,
    ReplayHead,
    TeacherCandidates,
    kl_per_position,
    tidal_per_position,
)
from stage2_student.schedules import Interpolation
from tests.payload_builders import encode, random_logits, sizes, top_candidates
from tide_cache.errors import DataError
from tide_cache.fidelity import log_softmax
from tide_cache.payload_facts import CandidatesFacts, HiddenFacts, RankedFacts
from tide_cache.payloads.candidates import NO_ID, Candidates, keep_top_p, tail_logshare
from tide_cache.payloads.candidates_ranked import RankedCandidates
from tide_cache.payloads.candidates_raw import RawCandidates
from tide_cache.payloads.hidden import Transform, replay_reference
from tide_cache.tails import TAILS, Tail, complete

P, D, R, V = 9, 12, 5, 40
TEMPERATURES = (1.0, 2.0)
every_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)
with_and_without_bias = pytest.mark.parametrize("has_bias", [False, True])

LOSSES: dict[str, Callable[..., Tensor]] = {
    "tidal": partial(
        tidal_per_position,
        timestep_P=torch.linspace(0.05, 0.95, P),
        progress=0.6,
        interpolation=Interpolation(),
    ),
    "kl": partial(kl_per_position, direction="forward"),
    "reverse_kl": partial(kl_per_position, direction="reverse"),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def draw(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


HIDDEN_PD, WEIGHT_VD = draw(0, P, D), draw(1, V, D)
BIAS_V = draw(2, V)
STUDENT_PV = torch.from_numpy(draw(3, P, V, scale=2.0))


def make_transform(kept: int = R, step: float = 0.05) -> Transform:
    """A rotation of which `kept` components stay."""
    rotation_DD, _ = np.linalg.qr(draw(4, D, D).astype(np.float64))
    facts = HiddenFacts(
        hidden_size=D, vocab_size=V, bands=(kept,), num_wide=kept, step=step, fit_positions=1
    )
    basis_RD = rotation_DD[:kept].astype(np.float32)
    synthesis_DR = np.ascontiguousarray(basis_RD.T)
    tensors = {"analysis": basis_RD, "synthesis": synthesis_DR, "mean": draw(5, D)}
    return Transform.from_tensors(facts, tensors)


def make_head(
    transform: Transform, *, has_bias: bool, dtype: torch.dtype = torch.float32
) -> ReplayHead:
    return ReplayHead(
        weight_VD=torch.from_numpy(WEIGHT_VD).to(dtype),
        bias_V=torch.from_numpy(BIAS_V).to(dtype) if has_bias else None,
        synthesis_DR=torch.from_numpy(transform.synthesis_DR),
        mean_D=torch.from_numpy(transform.mean_D),
        step=transform.step,
    )


def exact_head(*, has_bias: bool) -> ReplayHead:
    """A head whose codes are the hidden states themselves."""
    return ReplayHead(
        weight_VD=torch.from_numpy(WEIGHT_VD),
        bias_V=torch.from_numpy(BIAS_V) if has_bias else None,
        synthesis_DR=torch.eye(D),
        mean_D=torch.zeros(D),
        step=1.0,
    )


@with_and_without_bias
@pytest.mark.parametrize("kept", [R, D])
def test_codes_become_the_logits_of_the_slow_form(kept: int, has_bias: bool) -> None:
    transform = make_transform(kept)
    code_PR = transform.to_codes(HIDDEN_PD)
    expected_PV = replay_reference(
        transform.to_hidden(code_PR), WEIGHT_VD, BIAS_V if has_bias else None
    )
    head = make_head(transform, has_bias=has_bias)
    rows = HiddenRows(code_PR=torch.from_numpy(code_PR), head=head)
    assert rows.code_PR.dtype == torch.int16
    for found_PV in (head.logits(rows.code_PR), rows.logits()):
        assert found_PV.dtype == torch.float32
        np.testing.assert_allclose(found_PV.numpy(), expected_PV, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rows.slice(2, 6).logits(), expected_PV[2:6], rtol=1e-5, atol=1e-5)


@with_and_without_bias
def test_a_head_in_bfloat16_is_read_in_bfloat16(has_bias: bool) -> None:
    """What the teacher computed: state and head rounded, logits rounded once more."""
    transform = make_transform(D)
    code_PR = transform.to_codes(HIDDEN_PD)
    head = make_head(transform, has_bias=has_bias, dtype=torch.bfloat16)
    hidden_PD = torch.from_numpy(transform.to_hidden(code_PR)).bfloat16().float().numpy()
    assert np.abs(hidden_PD - transform.to_hidden(code_PR)).max() > 1e-3
    bias_V = None if head.bias_V is None else head.bias_V.float().numpy()
    expected_PV = replay_reference(hidden_PD, head.weight_VD.float().numpy(), bias_V)
    found_PV = head.logits(torch.from_numpy(code_PR))
    assert found_PV.dtype == torch.float32
    np.testing.assert_allclose(found_PV.numpy(), expected_PV, rtol=2**-7, atol=2**-7)


def test_a_training_in_autocast_replays_in_full_precision() -> None:
    transform = make_transform()
    head = make_head(transform, has_bias=True)
    code_PR = torch.from_numpy(transform.to_codes(HIDDEN_PD))
    expected_PV = head.logits(code_PR)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head.logits(code_PR), expected_PV)
    assert not expected_PV.requires_grad


def test_a_head_is_copied_to_a_device_once() -> None:
    head = make_head(make_transform(), has_bias=True)
    assert head.on("cpu") is head
    elsewhere = head.on("meta")
    assert elsewhere is head.on("meta")
    assert elsewhere.weight_VD.device.type == "meta"
    rows = HiddenRows(code_PR=torch.zeros((2, R), dtype=torch.int16), head=head)
    assert rows.to("meta").head is elsewhere
    assert rows.to("meta").slice(0, 1).head is elsewhere


def full_logits(*, has_bias: bool) -> np.ndarray:
    return replay_reference(HIDDEN_PD, WEIGHT_VD, BIAS_V if has_bias else None)


def with_hidden(logits_PV: np.ndarray, k: int, hidden: HiddenRows) -> TeacherCandidates:
    kept = TeacherCandidates.from_logits(
        torch.from_numpy(logits_PV), k=k, temperatures=TEMPERATURES
    )
    return replace(kept, hidden=hidden, tail="hidden")


def value_and_gradient(name: str, teacher: object, temperature: float) -> tuple[Tensor, Tensor]:
    leaf_PV = STUDENT_PV.clone().requires_grad_()
    loss_P = LOSSES[name](leaf_PV, teacher, temperature=temperature)
    (gradient_PV,) = torch.autograd.grad(loss_P.sum(), leaf_PV)
    return loss_P.detach(), gradient_PV


def assert_same_loss(name: str, teacher: TeacherCandidates, full_PV: np.ndarray, t: float) -> None:
    expected = value_and_gradient(name, torch.from_numpy(full_PV), t)
    found = value_and_gradient(name, teacher, t)
    assert expected[1].abs().max() > 0.01
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_temperature
@with_and_without_bias
@pytest.mark.parametrize("kept", [R, D])
def test_the_rebuilt_logits_hold_the_stored_mass_in_the_replayed_shape(
    kept: int, has_bias: bool, temperature: float
) -> None:
    """Whatever rounding did to the states; the candidates stay where they were."""
    transform = make_transform(kept, step=0.5)
    code_PR = torch.from_numpy(transform.to_codes(HIDDEN_PD))
    rows = HiddenRows(code_PR=code_PR, head=make_head(transform, has_bias=has_bias))
    full_PV = full_logits(has_bias=has_bias)
    teacher = with_hidden(full_PV, 4, rows)
    dense_PV = teacher.dense(temperature)
    assert (rows.logits() - torch.from_numpy(full_PV)).abs().max() > 0.1
    mass_P = torch.logsumexp(dense_PV / temperature, dim=-1)
    torch.testing.assert_close(mass_P, teacher.logsumexp_P(temperature), rtol=1e-6, atol=1e-5)
    assert torch.equal(dense_PV.gather(1, teacher.ids_PK), teacher.logits_PK)
    is_tail_PV = torch.ones_like(dense_PV, dtype=torch.bool).scatter(1, teacher.ids_PK, False)
    offset_PX = (dense_PV - rows.logits())[is_tail_PV].reshape(P, V - 4)
    torch.testing.assert_close(offset_PX, offset_PX[:, :1].expand(-1, V - 4), rtol=0, atol=1e-5)


@every_loss
@every_temperature
@with_and_without_bias
@pytest.mark.parametrize("k", [1, 4, V])
def test_exact_states_give_the_losses_of_full_logits(
    k: int, has_bias: bool, temperature: float, name: str
) -> None:
    rows = HiddenRows(code_PR=torch.from_numpy(HIDDEN_PD), head=exact_head(has_bias=has_bias))
    full_PV = full_logits(has_bias=has_bias)
    assert_same_loss(name, with_hidden(full_PV, k, rows), full_PV, temperature)


@every_loss
def test_rounded_states_give_other_losses(name: str) -> None:
    """What the comparison above would show if the head were replayed on anything else."""
    transform = make_transform(R, step=0.5)
    code_PR = torch.from_numpy(transform.to_codes(HIDDEN_PD))
    rows = HiddenRows(code_PR=code_PR, head=make_head(transform, has_bias=True))
    full_PV = full_logits(has_bias=True)
    found, _ = value_and_gradient(name, with_hidden(full_PV, 1, rows), 2.0)
    expected, _ = value_and_gradient(name, torch.from_numpy(full_PV), 2.0)
    assert (found - expected).abs().max() > 1e-3


def as_stage_2_reads(found: Candidates) -> TeacherCandidates:
    """Missing ids as V, and whatever the codec gave."""
    logshare_PT = found.tail_logshare_PT
    return TeacherCandidates(
        ids_PK=torch.from_numpy(np.where(found.ids_PK == NO_ID, V, found.ids_PK).astype(np.int64)),
        logits_PK=torch.from_numpy(found.logits_PK.copy()),
        logsumexp_PT=torch.from_numpy(found.logsumexp_PT.copy()),
        tail_logshare_PT=None if logshare_PT is None else torch.from_numpy(logshare_PT.copy()),
        temperatures=TEMPERATURES,
        vocab_size=V,
    )


def through_the_raw_codec(logits_PV: np.ndarray, k: int) -> TeacherCandidates:
    """What a cache of codec `raw` gives back, as stage 2 reads it."""
    facts = CandidatesFacts(k=k, vocab_size=V, temperatures=TEMPERATURES, mean_logits_positions=0)
    codec, num_B = RawCandidates(facts), sizes(4, 0, P - 4)
    found = codec.decode(encode(codec, top_candidates(logits_PV, k), num_B), num_B)
    return as_stage_2_reads(found)


@every_loss
@every_temperature
@pytest.mark.parametrize("scale", [0.5, 3.0, 40.0])
def test_all_ids_through_the_raw_codec_give_the_losses_of_full_logits(
    name: str, temperature: float, scale: float
) -> None:
    full_PV = random_logits(7, P, V, scale)
    teacher = through_the_raw_codec(full_PV, V)
    assert torch.equal(teacher.dense(temperature), torch.from_numpy(full_PV))
    assert_same_loss(name, teacher, full_PV, temperature)


@every_loss
@every_temperature
def test_all_ids_leave_a_replayed_head_nothing_to_say(name: str, temperature: float) -> None:
    full_PV = random_logits(7, P, V)
    nonsense = HiddenRows(code_PR=torch.from_numpy(HIDDEN_PD), head=exact_head(has_bias=False))
    teacher = replace(through_the_raw_codec(full_PV, V), hidden=nonsense, tail="hidden")
    assert_same_loss(name, teacher, full_PV, temperature)


def kept_of(scale: float, k: int, *, is_ragged: bool, is_rounded: bool) -> Candidates:
    """The k likeliest, or as many of them as hold 80%; exact, or as `ranked` gives them back."""
    kept = top_candidates(random_logits(7, P, V, scale), k, temperatures=TEMPERATURES)
    if is_ragged:
        kept = keep_top_p(kept, top_p=0.8, min_k=1)
    if not is_rounded:
        return kept
    facts = RankedFacts.model_validate(
        {"k": k, "vocab_size": V, "temperatures": TEMPERATURES, "mean_logits_positions": 0}
        | {"bits": 6, "ranks": "corpus"}
        | ({"top_p": 0.8, "min_k": 1} if is_ragged else {})
    )
    id_of_rank_V = np.random.default_rng(8).permutation(V).astype(np.int32)
    codec, num_B = RankedCandidates(facts, id_of_rank_V), sizes(4, 0, P - 4)
    return codec.decode(encode(codec, kept, num_B), num_B)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("is_rounded", [False, True])
@pytest.mark.parametrize("is_ragged", [False, True])
def test_every_tail_is_that_of_the_slow_form(tail: Tail, is_ragged: bool, is_rounded: bool) -> None:
    """To 1e-4 of the largest logit; a probability to 2e-6, as that logit goes.

    Exact candidates leave a share which is the less precise in float32 the smaller it is.
    """
    shapes = {
        "mean_logits_V": random_logits(9, 1, V)[0],
        "student_logits_PV": STUDENT_PV.numpy(),
        "replayed_logits_PV": full_logits(has_bias=False),
    }
    mean_V = torch.from_numpy(shapes["mean_logits_V"])
    rows = HiddenRows(code_PR=torch.from_numpy(HIDDEN_PD), head=exact_head(has_bias=False))
    for scale, k, column in itertools.product([0.3, 3.0, 30.0], [1, 6, V - 1, V], [0, 1]):
        kept = kept_of(scale, k, is_ragged=is_ragged, is_rounded=is_rounded)
        temperature = TEMPERATURES[column]
        expected_PV = complete(
            kept, tail, temperatures=TEMPERATURES, column=column, vocab_size=V, **shapes
        )
        teacher = replace(as_stage_2_reads(kept), mean_logits_V=mean_V, hidden=rows, tail=tail)
        found_PV = teacher.dense(temperature, STUDENT_PV).numpy()
        is_finite_PV = np.isfinite(expected_PV)
        np.testing.assert_array_equal(np.isneginf(found_PV), ~is_finite_PV)
        size_P = np.abs(expected_PV).max(axis=1, where=is_finite_PV, initial=1)
        share_P = np.exp(tail_logshare(kept, TEMPERATURES, V)[:, column]).clip(1e-6)
        slack_P = size_P * (1e-4 + (0 if is_rounded else 1e-6 * temperature / share_P))
        error_PV = np.zeros((P, V))
        np.subtract(found_PV, expected_PV, out=error_PV, where=is_finite_PV)
        assert (np.abs(error_PV) <= slack_P[:, None]).all(), (scale, k, temperature)
        scaled = [(x_PV / temperature).astype(np.float32) for x_PV in (found_PV, expected_PV)]
        mass_PV, expected_mass_PV = (np.exp(log_softmax(x_PV)) for x_PV in scaled)
        np.testing.assert_allclose(mass_PV, expected_mass_PV, rtol=0, atol=2e-6 * size_P.max())


@pytest.mark.parametrize(
    ("code_PR", "found"),
    [
        (torch.zeros((P, R + 1), dtype=torch.int16), rf"torch.int16 of shape \({P}, {R + 1}\)"),
        (torch.zeros((P - 1, R), dtype=torch.int16), rf"torch.int16 of shape \({P - 1}, {R}\)"),
        (torch.zeros(P * R, dtype=torch.int16), rf"torch.int16 of shape \({P * R},\)"),
        (torch.zeros((P, R), dtype=torch.int32), rf"torch.int32 of shape \({P}, {R}\)"),
        (torch.zeros((P, R), dtype=torch.bfloat16), rf"torch.bfloat16 of shape \({P}, {R}\)"),
    ],
)
def test_codes_of_another_shape_or_type_are_refused(code_PR: Tensor, found: str) -> None:
    rows = HiddenRows(code_PR=code_PR, head=make_head(make_transform(), has_bias=False))
    message = rf"^code_PR: expected torch.int16 of shape \({P}, {R}\), got {found}$"
    with pytest.raises(DataError, match=message):
        rows.check(P, V)
    with pytest.raises(DataError, match=message):
        with_hidden(full_logits(has_bias=False), 3, rows)


def test_a_head_of_another_vocabulary_is_refused() -> None:
    code_PR = torch.zeros((P, R), dtype=torch.int16)
    rows = HiddenRows(code_PR=code_PR, head=make_head(make_transform(), has_bias=False))
    rows.check(P, V)
    with pytest.raises(DataError, match=f"^weight_VD: expected {V - 1} rows, got {V}$"):
        rows.check(P, V - 1)
    with pytest.raises(DataError, match=f"^weight_VD: expected {V - 1} rows, got {V}$"):
        with_hidden(full_logits(has_bias=False)[:, :-1], 3, rows)


def test_the_tail_hidden_needs_hidden_states() -> None:
    exact = through_the_raw_codec(random_logits(7, P, V), 3)
    with pytest.raises(DataError, match=r"^hidden: the tail 'hidden' needs it, got none$"):
        replace(exact, tail="hidden")
