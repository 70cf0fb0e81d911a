"""The raw codec is lossless, and nothing out of bounds gets through it in either direction."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tide_cache.errors import CompatibilityError, FormatError
from tide_cache.manifest import CandidatesFacts
from tide_cache.payloads.candidates import Candidates, decode, encode, sort_by_id


def facts(k: int, vocab_size: int = 50, **changes: object) -> CandidatesFacts:
    values = {"codec": "raw", "codec_version": 1, "temperatures": (1.0, 2.0)}
    values |= {"k": k, "vocab_size": vocab_size, "mean_logits_positions": 0, **changes}
    return CandidatesFacts(**values)  # type: ignore[arg-type]


def random_candidates(seed: int, num_positions: int, k: int, vocab_size: int = 50) -> Candidates:
    random = np.random.default_rng(seed)
    logits_PV = random.normal(size=(num_positions, vocab_size)).astype(np.float32) * 3
    ids_PK = np.argsort(-logits_PV, axis=1)[:, :k].astype(np.int32)
    full_PT = np.stack([np.logaddexp.reduce(logits_PV / t, axis=1) for t in (1.0, 2.0)], axis=1)
    return Candidates(
        ids_PK=ids_PK,
        logits_PK=np.take_along_axis(logits_PV, ids_PK, axis=1),
        logsumexp_PT=full_PT.astype(np.float32).reshape(num_positions, 2),
        label_logprob_P=-random.random(num_positions).astype(np.float32),
    )


@given(st.integers(0, 999), st.integers(0, 7), st.integers(1, 50))
def test_round_trip_is_exact(seed: int, num_positions: int, k: int) -> None:
    made = sort_by_id(random_candidates(seed, num_positions, k))
    columns = encode(made, facts(k), where="row")
    back = decode(columns, facts(k), num_positions, where="row")
    for field in dataclasses.fields(made):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(made, field.name))


def test_minus_infinity_and_ties_are_kept() -> None:
    made = sort_by_id(random_candidates(0, 2, 4))
    logits = made.logits_PK.copy()
    logits[0] = [-np.inf, 1, 1, -np.inf]
    logits[1] = -np.inf
    made = dataclasses.replace(made, logits_PK=logits)
    back = decode(encode(made, facts(4), where="row"), facts(4), 2, where="row")
    np.testing.assert_array_equal(back.logits_PK, logits)


@pytest.mark.parametrize(
    ("column", "dtype", "position", "value", "message"),
    [
        ("cand_ids", "<i4", 0, -1, r"ids in 0\.\.49"),
        ("cand_ids", "<i4", 7, 50, r"ids in 0\.\.49"),
        ("cand_ids", "<i4", 1, 0, "ascending"),
        ("cand_logits", "<f4", 3, np.nan, "numbers or -inf"),
        ("cand_logits", "<f4", 3, np.inf, "numbers or -inf"),
        ("cand_logsumexp", "<f4", 1, np.inf, "finite"),
        ("cand_logsumexp", "<f4", 0, -1e6, "below the largest stored logit"),
        ("cand_label_logprob", "<f4", 0, 1.0, "log-probabilities"),
        ("cand_label_logprob", "<f4", 0, np.nan, "log-probabilities"),
    ],
)
def test_a_value_out_of_bounds_is_refused(
    column: str, dtype: str, position: int, value: float, message: str
) -> None:
    columns = encode(sort_by_id(random_candidates(1, 2, 4)), facts(4), where="row")
    array = np.frombuffer(columns[column], dtype=dtype).copy()
    array[position] = value
    columns[column] = array.tobytes()
    with pytest.raises(FormatError, match=message):
        decode(columns, facts(4), 2, where="row 7")


def test_a_wrong_length_or_codec_is_refused() -> None:
    columns = encode(sort_by_id(random_candidates(1, 2, 4)), facts(4), where="row")
    with pytest.raises(FormatError, match="row 7: cand_ids: expected 48 bytes, got 32"):
        decode(columns, facts(4), 3, where="row 7")
    with pytest.raises(CompatibilityError, match="codec 'ranked' version 1"):
        decode(columns, facts(4, codec="ranked"), 2, where="row")
