"""Tails: the stored mass is where it belongs, its shape is the one named, candidates stay put.

Shapes: P positions, K candidates, V vocabulary, T temperatures.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.payload_builders import encode, logsumexp, random_logits, sizes, top_candidates
from tide_cache.errors import ConfigError
from tide_cache.payload_facts import RankedFacts
from tide_cache.payloads.candidates import NO_ID, Candidates, keep_top_p, tail_logshare
from tide_cache.payloads.candidates_ranked import RankedCandidates
from tide_cache.tails import TAILS, Tail, check_tail, complete

P, V = 5, 30
TEMPERATURES = (1.0, 2.0, 5.0)
WITH_MASS: tuple[Tail, ...] = tuple(tail for tail in TAILS if tail != "none")
# Half a unit in the last of 8 significant bits: what `ranked` keeps of the tail's share.
ROUNDING = 2.0**-8
every_tail = pytest.mark.parametrize("tail", TAILS)
every_tail_with_mass = pytest.mark.parametrize("tail", WITH_MASS)


def draw(seed: int, *, k: int, scale: float, top_p: float | None = None) -> Candidates:
    made = top_candidates(random_logits(seed, P, V, scale), k, temperatures=TEMPERATURES)
    return made if top_p is None else keep_top_p(made, top_p=top_p, min_k=1)


def ranked(made: Candidates, *, bits: int = 6, is_ragged: bool = False) -> Candidates:
    """The same answer as the codec `ranked` gives it back."""
    facts = RankedFacts.model_validate(
        {
            "k": made.ids_PK.shape[1],
            "vocab_size": V,
            "temperatures": TEMPERATURES,
            "mean_logits_positions": 0,
            "bits": bits,
            "top_p": 0.9 if is_ragged else None,
            "min_k": 1 if is_ragged else None,
            "ranks": "corpus",
        }
    )
    codec = RankedCandidates(facts, np.arange(V, dtype=np.int32))
    num_B = sizes(made.num_positions)
    return codec.decode(encode(codec, made, num_B), num_B)


def shapes(seed: int) -> dict[str, np.ndarray]:
    """Mean, student's and replayed logits."""
    return {
        "mean_logits_V": random_logits(seed + 1, 1, V)[0],
        "student_logits_PV": random_logits(seed + 2, P, V),
        "replayed_logits_PV": random_logits(seed + 3, P, V),
    }


def rebuild(made: Candidates, tail: Tail, column: int, seed: int = 0) -> np.ndarray:
    full_PV = complete(
        made, tail, temperatures=TEMPERATURES, column=column, vocab_size=V, **shapes(seed)
    )
    assert full_PV.dtype == np.float32
    assert full_PV.shape == (made.num_positions, V)
    assert not np.isnan(full_PV).any()
    return full_PV


def is_candidate(made: Candidates) -> np.ndarray:
    """Which ids are candidates, bool (P, V)."""
    found_PV = np.zeros((made.num_positions, V), dtype=bool)
    for position, ids_K in enumerate(made.ids_PK):
        found_PV[position, ids_K[ids_K != NO_ID]] = True
    return found_PV


def spread(made: Candidates) -> np.ndarray:
    """The candidates' logits at their ids, -inf elsewhere, float32 (P, V)."""
    logits_PV = np.full((made.num_positions, V), -np.inf, dtype=np.float32)
    for position, ids_K in enumerate(made.ids_PK):
        kept_K = ids_K != NO_ID
        logits_PV[position, ids_K[kept_K]] = made.logits_PK[position, kept_K]
    return logits_PV


answers = given(
    seed=st.integers(0, 999),
    k=st.integers(1, V),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    top_p=st.sampled_from([None, 0.7]),
    bits=st.sampled_from([None, 6, 8]),
)


def make(seed: int, k: int, scale: float, top_p: float | None, bits: int | None) -> Candidates:
    """`bits`: rounded by `ranked`; None: exact."""
    made = draw(seed, k=k, scale=scale, top_p=top_p)
    return made if bits is None else ranked(made, bits=bits, is_ragged=top_p is not None)


@every_tail
@settings(deadline=None, max_examples=30)
@answers
def test_the_mass_is_the_stored_one_at_each_temperature(
    tail: Tail, seed: int, k: int, scale: float, top_p: float | None, bits: int | None
) -> None:
    """Of all ids together; of the tail it is the share; with `none` the candidates hold it all."""
    made = make(seed, k, scale, top_p, bits)
    share_PT = tail_logshare(draw(seed, k=k, scale=scale, top_p=top_p), TEMPERATURES, V)
    for column, temperature in enumerate(TEMPERATURES):
        full_PV = rebuild(made, tail, column, seed).astype(np.float64) / temperature
        total_P = made.logsumexp_PT[:, column]
        slack = 1e-6 * np.maximum(1, np.abs(total_P))
        assert (np.abs(logsumexp(full_PV) - total_P) <= slack).all()
        others_PV = np.where(is_candidate(made), -np.inf, full_PV)
        if tail == "none":
            assert np.isneginf(others_PV).all()
            continue
        share_P = np.exp(logsumexp(others_PV) - total_P)
        expected_P = np.exp(share_PT[:, column].astype(np.float64))
        rounding_P = 0 if bits is None else ROUNDING * np.abs(share_PT[:, column]) * expected_P
        rounding_P = np.where(expected_P > 0, rounding_P, 0)
        assert (np.abs(share_P - expected_P) <= rounding_P + 3 * slack).all()


@every_tail
@settings(deadline=None, max_examples=30)
@answers
def test_candidates_stay_where_they_are_or_move_together(
    tail: Tail, seed: int, k: int, scale: float, top_p: float | None, bits: int | None
) -> None:
    """Exact ones stay, but for `none`. Rounded ones move by no more than they may be off.

    To that add what 8 significant bits of the share move its complement by: less than T * 2^-8.
    """
    made = make(seed, k, scale, top_p, bits)
    is_id_PV, stored_PV = is_candidate(made), spread(made).astype(np.float64)
    for column, temperature in enumerate(TEMPERATURES):
        full_PV = rebuild(made, tail, column, seed)
        if bits is None and tail != "none":
            np.testing.assert_array_equal(full_PV[is_id_PV], stored_PV[is_id_PV])
            continue
        with np.errstate(invalid="ignore"):
            moved_PV = np.where(is_id_PV, full_PV - stored_PV, np.nan)
        least_P, most_P = np.nanmin(moved_PV, axis=1), np.nanmax(moved_PV, axis=1)
        size_P = np.abs(stored_PV).max(axis=1, where=is_id_PV, initial=1) + np.abs(most_P)
        assert (most_P - least_P <= 1e-6 * size_P).all()
        if tail != "none":
            assert made.error_P is not None
            head_P = np.exp(logsumexp(spread(made) / temperature) - made.logsumexp_PT[:, column])
            may_P = made.error_P + temperature * (ROUNDING + 1e-6 * size_P / head_P)
            assert (np.maximum(-least_P, most_P) <= may_P).all()


@pytest.mark.parametrize(
    ("tail", "shape_of"),
    [
        ("mean", lambda of: of["mean_logits_V"]),
        ("student", lambda of: of["student_logits_PV"]),
        ("bucket", lambda of: of["student_logits_PV"]),
        ("mean_student", lambda of: (of["mean_logits_V"] + of["student_logits_PV"]) / 2),
        ("hidden", lambda of: of["replayed_logits_PV"]),
        ("uniform", lambda of: np.zeros(V)),
    ],
)
@pytest.mark.parametrize("is_rounded", [False, True])
def test_the_tail_has_the_shape_it_is_named_after(
    tail: Tail, shape_of: Callable[[dict[str, np.ndarray]], np.ndarray], is_rounded: bool
) -> None:
    made = draw(1, k=6, scale=2.0, top_p=0.7)
    if is_rounded:
        made = ranked(made, is_ragged=True)
    full_PV = rebuild(made, tail, 1)
    offset_PV = np.where(is_candidate(made), np.nan, full_PV - shape_of(shapes(0)))
    spread_P = np.nanmax(offset_PV, axis=1) - np.nanmin(offset_PV, axis=1)
    assert (spread_P < 1e-5).all()


@every_tail_with_mass
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_all_candidates_are_the_logits(tail: Tail, scale: float) -> None:
    logits_PV = random_logits(4, P, V, scale)
    made = top_candidates(logits_PV, V, temperatures=TEMPERATURES)
    for column in range(len(TEMPERATURES)):
        np.testing.assert_array_equal(rebuild(made, tail, column), logits_PV)


@pytest.mark.parametrize("k", [V, V - 1])
def test_none_is_the_candidates_renormalised(k: int) -> None:
    logits_PV = random_logits(4, P, V)
    made = top_candidates(logits_PV, k, temperatures=TEMPERATURES)
    for column, temperature in enumerate(TEMPERATURES):
        full_PV = rebuild(made, "none", column)
        kept_PV = np.where(is_candidate(made), logits_PV, -np.inf)
        kept_P = logsumexp(kept_PV / temperature)
        lost_P = temperature * (logsumexp(logits_PV / temperature) - kept_P)
        np.testing.assert_allclose(full_PV, kept_PV + lost_P[:, None], atol=2e-5)
        if k == V:
            np.testing.assert_allclose(full_PV, logits_PV, atol=1e-5)


def softmax(logits_PX: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(logits_PX - logsumexp(logits_PX)[:, None]))


def kl(p_PX: np.ndarray, q_PX: np.ndarray) -> np.ndarray:
    """KL(p || q) of each position."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms_PX = np.where(p_PX > 0, p_PX * np.log(p_PX / q_PX), 0.0)
    return np.asarray(terms_PX.sum(axis=1))


def losses(teacher_PX: np.ndarray, student_PX: np.ndarray, temperature: float) -> np.ndarray:
    """Forward and reverse KL and TIDAL's at two mixtures, (4, P), over whatever outcomes X."""
    student = softmax(student_PX / temperature)
    teacher = softmax(teacher_PX / temperature)
    found = [kl(teacher, student), kl(student, teacher)]
    for share in (0.1, 0.7):
        mixed_PX = (1 - share) * student_PX + share * teacher_PX
        found.append(kl(softmax(mixed_PX / temperature), student))
    return np.array(found)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 999),
    k=st.integers(1, V - 1),
    scale=st.sampled_from([0.1, 3.0]),
    column=st.integers(0, 2),
)
def test_a_bucket_is_one_outcome(seed: int, k: int, scale: float, column: int) -> None:
    """Losses over V ids are those over the candidates and the rest as one outcome."""
    made, temperature = draw(seed, k=k, scale=scale), TEMPERATURES[column]
    student_PV = shapes(seed)["student_logits_PV"].astype(np.float64)
    full_PV = rebuild(made, "bucket", column, seed).astype(np.float64)
    others_PV = np.where(is_candidate(made), -np.inf, student_PV)
    rest_P = temperature * logsumexp(others_PV / temperature)
    taken_PK = np.take_along_axis(student_PV, made.ids_PK, axis=1)
    student_PX = np.concatenate([taken_PK, rest_P[:, None]], axis=1)
    head_PK = made.logits_PK.astype(np.float64)
    total_P = made.logsumexp_PT[:, column].astype(np.float64)
    share_P = 1 - np.exp(head_PK / temperature - total_P[:, None]).sum(axis=1)
    others_P = temperature * (total_P + np.log(np.maximum(share_P, 1e-12)))
    is_told_P = share_P > 1e-4  # the rest's logit has four digits
    teacher_PX = np.concatenate([head_PK, others_P[:, None]], axis=1)
    expected = losses(teacher_PX, student_PX, temperature)
    found = losses(full_PV, student_PV, temperature)
    np.testing.assert_allclose(found[:, is_told_P], expected[:, is_told_P], atol=1e-4, rtol=1e-4)
    as_student_PV = rebuild(made, "student", column, seed)
    np.testing.assert_array_equal(as_student_PV, full_PV.astype(np.float32))


@pytest.mark.parametrize(
    ("tail", "lacking"),
    [
        ("mean", "mean_logits_V"),
        ("mean_student", "mean_logits_V"),
        ("student", "student_logits_PV"),
        ("mean_student", "student_logits_PV"),
        ("bucket", "student_logits_PV"),
        ("hidden", "replayed_logits_PV"),
    ],
)
def test_a_tail_says_when_its_shape_was_not_given(tail: Tail, lacking: str) -> None:
    made = draw(0, k=3, scale=1.0)
    enough = {name: value for name, value in shapes(0).items() if name != lacking}
    with pytest.raises(ConfigError, match=f"^tail: '{tail}' needs logits that were not given$"):
        complete(made, tail, temperatures=TEMPERATURES, column=0, vocab_size=V, **enough)


@pytest.mark.parametrize("tail", ["uniform", "none"])
def test_a_tail_without_a_shape_needs_none(tail: Tail) -> None:
    made = draw(0, k=3, scale=1.0)
    alone_PV = complete(made, tail, temperatures=TEMPERATURES, column=0, vocab_size=V)
    np.testing.assert_array_equal(alone_PV, rebuild(made, tail, 0))


def test_an_unknown_tail_is_refused_with_the_closest_name() -> None:
    message = (
        "tail: expected one of mean, student, mean_student, bucket, uniform, none, hidden, "
        r"got 'studnet' \(did you mean 'student'\?\)"
    )
    with pytest.raises(ConfigError, match=message):
        check_tail("studnet")
    with pytest.raises(ConfigError, match=r"got 'x'$"):
        complete(
            draw(0, k=3, scale=1.0),
            "x",  # type: ignore[arg-type]
            temperatures=TEMPERATURES,
            column=0,
            vocab_size=V,
        )


@every_tail
def test_no_positions_give_no_logits(tail: Tail) -> None:
    none = draw(0, k=3, scale=1.0).rows(0, 0)
    given_shapes = {**shapes(0), "student_logits_PV": np.empty((0, V), np.float32)}
    given_shapes["replayed_logits_PV"] = np.empty((0, V), np.float32)
    full_PV = complete(
        none, tail, temperatures=TEMPERATURES, column=1, vocab_size=V, **given_shapes
    )
    assert full_PV.shape == (0, V)


@given(seed=st.integers(0, 999), k=st.integers(1, V), scale=st.sampled_from([0.1, 3.0]))
def test_the_share_is_what_the_candidates_leave(seed: int, k: int, scale: float) -> None:
    """To what float32 can say of it: four steps of a stored logsumexp."""
    logits_PV = random_logits(seed, P, V, scale).astype(np.float64)
    made = draw(seed, k=k, scale=scale)
    share_PT = tail_logshare(made, TEMPERATURES, V)
    assert share_PT.dtype == np.float32
    for column, temperature in enumerate(TEMPERATURES):
        left_PV = np.where(is_candidate(made), -np.inf, logits_PV / temperature)
        left_P = np.exp(logsumexp(left_PV) - logsumexp(logits_PV / temperature))
        step_P = np.finfo(np.float32).eps * np.maximum(np.abs(made.logsumexp_PT[:, column]), 1)
        found_P = np.exp(share_PT[:, column].astype(np.float64))
        assert (np.abs(found_P - left_P) <= 4 * step_P + 1e-7 * left_P).all()
        if k == V:
            assert np.isneginf(share_PT[:, column]).all()


def test_a_share_below_what_float32_tells_is_bounded_by_the_least_candidate() -> None:
    """A mass of 1 + 1e-9 is stored as 1: the other ids are at most as likely as the last."""
    made = Candidates(
        ids_PK=np.array([[3, 4], [3, 4], [3, NO_ID]], np.int32),
        logits_PK=np.array([[0, -30], [0, -1], [0, -np.inf]], np.float32),
        logsumexp_PT=np.array([[0.0], [np.log1p(np.exp(-1))], [0.0]], np.float32),
        label_logprob_P=np.zeros(3, np.float32),
    )
    share_PT = tail_logshare(made, (1.0,), V)
    resolution = np.log(4 * np.finfo(np.float32).eps)
    assert share_PT[0, 0] == pytest.approx(-30 + np.log(V - 2), abs=1e-5)
    # There the bound is above what rounding leaves room for.
    assert share_PT[1, 0] == pytest.approx(resolution, abs=1e-5)
    assert share_PT[2, 0] == pytest.approx(resolution, abs=1e-5)
    least = dataclasses.replace(made, logits_PK=np.full((3, 2), -np.inf, np.float32))
    assert (tail_logshare(least, (1.0,), V) == 0).all()
