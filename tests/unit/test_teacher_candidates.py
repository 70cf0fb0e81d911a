"""What a cache keeps of a distribution: the head to the bit, the mass to rounding, no NaN.

Legend: P masked positions, K candidates, V vocabulary, T temperatures.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stage2_student.losses import Tail, TeacherCandidates
from tide_cache.errors import CompatibilityError, ConfigError, DataError

TEMPERATURES = (1.0, 2.0, 5.0)


def draw(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def keep(logits_PV: Tensor, k: int, mean_logits_V: Tensor | None = None) -> TeacherCandidates:
    return TeacherCandidates.from_logits(
        logits_PV, k=k, temperatures=TEMPERATURES, mean_logits_V=mean_logits_V
    )


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.integers(2, 300),
    share=st.floats(0, 1),
    scale=st.sampled_from([0.0, 0.1, 1.0, 4.0, 20.0, 80.0]),
    offset=st.sampled_from([-40.0, 0.0, 40.0]),
    tail=st.sampled_from(["mean", "uniform"]),
)
def test_the_mass_matches_at_every_stored_temperature(
    seed: int, vocab_size: int, share: float, scale: float, offset: float, tail: Tail
) -> None:
    logits_PV = draw(seed, 4, vocab_size, scale=scale) + offset
    k = 1 + round(share * (vocab_size - 1))
    mean_logits_V = draw(seed + 1, vocab_size) if tail == "mean" else None
    candidates = keep(logits_PV, k, mean_logits_V)
    assert candidates.tail == tail
    for temperature in TEMPERATURES:
        dense_PV = candidates.dense(temperature)
        assert torch.isfinite(dense_PV).all()
        mass_P = torch.logsumexp(dense_PV.double() / temperature, dim=-1)
        exact_P = torch.logsumexp(logits_PV.double() / temperature, dim=-1)
        torch.testing.assert_close(mass_P, exact_P, rtol=2e-6, atol=2e-6)
        assert torch.equal(dense_PV.gather(1, candidates.ids_PK), candidates.logits_PK)
        assert torch.equal(logits_PV.gather(1, candidates.ids_PK), candidates.logits_PK)


def test_all_ids_give_the_logits_back_to_the_bit() -> None:
    logits_PV = draw(3, 5, 40)
    logits_PV[0, 7:] = -torch.inf
    logits_PV[1] = -torch.inf
    candidates = keep(logits_PV, 40, mean_logits_V=draw(4, 40))
    for temperature in TEMPERATURES:
        assert torch.equal(candidates.dense(temperature), logits_PV)


def test_a_flat_tail_is_rebuilt_by_the_uniform_shape() -> None:
    logits_PV = torch.full((3, 50), -1.5)
    logits_PV[:, :4] = draw(5, 3, 4).abs()
    torch.testing.assert_close(keep(logits_PV, 4).dense(2.0), logits_PV, rtol=0, atol=2e-5)


def test_a_tail_shaped_like_the_mean_is_rebuilt_up_to_its_constant() -> None:
    mean_logits_V = draw(6, 60)
    logits_PV = mean_logits_V.repeat(3, 1) + torch.tensor([[-2.0], [0.0], [3.0]])
    candidates = keep(logits_PV, 5, mean_logits_V)
    torch.testing.assert_close(candidates.dense(2.0), logits_PV, rtol=0, atol=5e-5)


@pytest.mark.parametrize("mean_logits_V", [None, torch.arange(6.0)])
def test_a_tail_too_small_for_float32_is_bounded_by_the_least_candidate(
    mean_logits_V: Tensor | None,
) -> None:
    """e^-100 of the mass: the total says nothing, the least candidate says at most 0 each."""
    logits_PV = torch.tensor([[100.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    candidates = keep(logits_PV, 2, mean_logits_V)
    tail_mass = candidates.tail_logmass_P(1.0).item()
    assert tail_mass == pytest.approx(math.log(4.0), abs=1e-5)
    if mean_logits_V is None:
        torch.testing.assert_close(candidates.dense(1.0), logits_PV, rtol=0, atol=1e-5)


@pytest.mark.parametrize("error", [-3e-7, 0.0, 3e-7])
def test_a_total_that_rounds_to_the_head_gives_a_small_finite_tail(error: float) -> None:
    exact = keep(torch.tensor([[9.0, 8.5, 8.0] + [-30.0] * 20]), 3)
    rounded = dataclasses.replace(exact, logsumexp_PT=exact.logsumexp_PT * (1 + error))
    for temperature in (1.0, 2.0):
        dense_PV = rounded.dense(temperature)
        assert torch.isfinite(dense_PV).all()
        mass = torch.logsumexp(dense_PV / temperature, dim=-1)
        torch.testing.assert_close(mass, exact.logsumexp_P(temperature), rtol=1e-5, atol=0)


def test_a_one_hot_row_keeps_an_empty_tail() -> None:
    logits_PV = torch.full((1, 9), -torch.inf)
    logits_PV[0, 4] = 3.0
    for k in (2, 5):
        assert torch.equal(keep(logits_PV, k).dense(2.0), logits_PV)
    only_best = keep(logits_PV, 1).dense(2.0)  # nothing stored tells a small tail from none
    assert not only_best.isnan().any()
    torch.testing.assert_close(
        torch.softmax(only_best / 2.0, dim=-1), torch.softmax(logits_PV, dim=-1), rtol=0, atol=1e-6
    )


def test_a_row_without_a_finite_logit_stays_one() -> None:
    logits_PV = draw(7, 3, 12)
    logits_PV[1] = -torch.inf
    dense_PV = keep(logits_PV, 4, mean_logits_V=draw(8, 12)).dense(2.0)
    assert torch.equal(dense_PV[1], logits_PV[1])
    assert torch.isfinite(dense_PV[[0, 2]]).all()


def test_a_mean_without_mass_leaves_no_nan() -> None:
    mean_logits_V = torch.full((12,), -torch.inf)
    dense_PV = keep(draw(9, 3, 12), 4, mean_logits_V).dense(2.0)
    assert not dense_PV.isnan().any()


def test_slices_and_devices_keep_everything_else() -> None:
    candidates = keep(draw(10, 6, 30), 4, mean_logits_V=draw(11, 30))
    part = candidates.slice(2, 5).to("cpu")
    assert (part.num_positions, part.num_candidates, part.vocab_size) == (3, 4, 30)
    assert torch.equal(part.dense(2.0), candidates.dense(2.0)[2:5])
    assert part.ids_PK.data_ptr() == candidates.ids_PK[2:5].data_ptr()
    assert {t.device.type for t in _tensors(candidates.to("meta"))} == {"meta"}


def _tensors(candidates: TeacherCandidates) -> list[Tensor]:
    assert candidates.mean_logits_V is not None
    return [
        candidates.ids_PK,
        candidates.logits_PK,
        candidates.logsumexp_PT,
        candidates.mean_logits_V,
    ]


def test_the_mean_can_be_left_aside() -> None:
    candidates = keep(draw(12, 3, 20), 4, mean_logits_V=draw(13, 20))
    uniform = dataclasses.replace(candidates, tail="uniform")
    others = ~torch.zeros(3, 20, dtype=torch.bool).scatter(1, uniform.ids_PK, True)
    for row_V, mask_V in zip(uniform.dense(2.0), others, strict=True):
        assert row_V[mask_V].unique().numel() == 1


def test_half_precision_logits_are_kept_in_float32() -> None:
    candidates = keep(draw(14, 3, 20).bfloat16().requires_grad_(), 4)
    assert candidates.logits_PK.dtype == torch.float32
    assert not candidates.logits_PK.requires_grad


@pytest.mark.parametrize("k", [3, 8])
def test_a_temperature_that_was_not_stored_is_refused(k: int) -> None:
    candidates = keep(draw(15, 2, 8), k)
    with pytest.raises(CompatibilityError, match=r"temperature 3: .* at 1, 2, 5 only; train at"):
        candidates.dense(3.0)


def test_a_temperature_stored_in_float32_is_found() -> None:
    candidates = TeacherCandidates.from_logits(draw(16, 2, 8), k=3, temperatures=(0.7,))
    stored = float(torch.tensor(0.7))
    assert stored != 0.7
    assert torch.equal(candidates.dense(stored), candidates.dense(0.7))


@pytest.mark.parametrize("k", [0, 9])
def test_k_must_fit_the_vocabulary(k: int) -> None:
    with pytest.raises(ConfigError, match=rf"k: expected 1 to 8 \(the vocabulary\), got {k}"):
        keep(draw(17, 2, 8), k)


@pytest.mark.parametrize("temperatures", [(), (0.0,), (1.0, math.nan), (math.inf,)])
def test_temperatures_must_be_positive(temperatures: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="temperatures: expected one or more positive numbers"):
        TeacherCandidates.from_logits(draw(18, 2, 8), k=2, temperatures=temperatures)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_PK": torch.zeros(2, 4)}, r"logits_PK: expected torch.float32 of shape \(2, 3\)"),
        ({"logsumexp_PT": torch.zeros(2, 1)}, r"logsumexp_PT: .* \(2, 3\), got .* \(2, 1\)"),
        ({"ids_PK": torch.zeros(2, 3)}, r"ids_PK: expected torch.int64"),
        ({"ids_PK": torch.zeros(2, dtype=torch.int64)}, r"ids_PK: expected two axes"),
        ({"vocab_size": 2}, r"ids_PK: expected 1 to 2 candidates"),
        ({"mean_logits_V": torch.zeros(7)}, r"mean_logits_V: .* \(8,\), got .* \(7,\)"),
        ({"tail": "mean"}, r"mean_logits_V: the tail 'mean' needs it"),
        ({"tail": "mean_student"}, r"mean_logits_V: the tail 'mean_student' needs it"),
        ({"tail": "hidden"}, r"hidden: the tail 'hidden' needs it"),
        ({"tail_logshare_PT": torch.zeros(2, 1)}, r"tail_logshare_PT: .* \(2, 3\), got .*2, 1"),
    ],
)
def test_parts_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    candidates = keep(draw(19, 2, 8), 3)
    with pytest.raises(DataError, match=message):
        dataclasses.replace(candidates, **change)  # type: ignore[arg-type]


def test_an_unknown_tail_is_refused() -> None:
    known = "mean, student, mean_student, bucket, uniform, none, hidden"
    with pytest.raises(ConfigError, match=f"tail: expected one of {known}, got 'unifrom'"):
        dataclasses.replace(keep(draw(20, 2, 8), 3), tail="unifrom")  # type: ignore[arg-type]
