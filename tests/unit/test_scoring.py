"""Logits to scores, against a float64 reference in numpy."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage1_teacher.scoring import logsumexps, reduce_logits, rows_per_slice, top_candidates
from stage1_teacher.teachers.base import NonFiniteLogitsError, Scores, ScoreSpec
from tide_cache.errors import DataError


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 6 * torch.randn(num_rows, vocab_size, generator=generator)


def exact_logsumexp(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    top = scaled.max(axis=-1, keepdims=True)
    result: np.ndarray = np.log(np.exp(scaled - top).sum(axis=-1)) + top[:, 0]
    return result


@pytest.mark.parametrize("k", [0, 1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_match_a_float64_reference(k: int, dtype: torch.dtype) -> None:
    vocab_size, shared_size = 50, 40
    logits = random_logits(9, vocab_size).to(dtype)
    labels = torch.tensor([0, 49, 3, 3, 41, 8, 39, 40, 12])
    spec = ScoreSpec(k=k, temperatures=(1.0, 2.0, 5.0), vocab_size=shared_size)

    scores = reduce_logits(logits, labels, spec)

    exact = logits.double().numpy()
    shared = exact[:, :shared_size]
    order = np.argsort(-shared, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(
        scores.topk_logits_PK, np.take_along_axis(shared, order, -1).astype(np.float32)
    )
    np.testing.assert_array_equal(
        np.take_along_axis(shared, scores.topk_ids_PK.astype(int), -1), scores.topk_logits_PK
    )
    for column, temperature in enumerate(spec.temperatures):
        np.testing.assert_allclose(
            scores.logsumexp_PT[:, column], exact_logsumexp(shared, temperature), rtol=1e-6
        )
    label_logit = exact[np.arange(9), labels.numpy()]
    np.testing.assert_allclose(
        scores.label_logprob_P, label_logit - exact_logsumexp(exact, 1.0), atol=5e-6
    )
    assert scores.topk_ids_PK.dtype == np.int32
    assert scores.topk_logits_PK.dtype == np.float32
    assert scores.logsumexp_PT.dtype == scores.label_logprob_P.dtype == np.float32


@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (2.0, 1.0), (1.0,), (0.5, 5.0, 1.0), (4.0,)])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0, 1000.0])
def test_sums_of_exponentials_are_exact_to_float32(
    temperatures: tuple[float, ...], scale: float
) -> None:
    """Over a whole vocabulary, beside the plain way; flat rows, sharp ones, and far from zero."""
    logits = random_logits(4, 151_936) * scale / 6
    logits[1] += 300
    logits[2] -= 300
    for temperature, found in zip(temperatures, logsumexps(logits, temperatures), strict=True):
        exact = exact_logsumexp(logits.numpy(), temperature)
        steps = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        slack = 4 * np.maximum(steps, np.finfo(np.float32).eps)
        assert (np.abs(found.double().numpy() - exact) <= slack).all()
        plain = torch.logsumexp(logits / temperature, dim=-1).double().numpy()
        assert (np.abs(plain - exact) <= slack).all(), "the plain way is no better"


def test_no_temperatures_and_no_candidates_leave_the_label() -> None:
    spec = ScoreSpec(k=0, temperatures=(), vocab_size=5)
    scores = reduce_logits(random_logits(3, 5), torch.tensor([0, 1, 2]), spec)
    assert scores.topk_ids_PK.shape == (3, 0)
    assert scores.logsumexp_PT.shape == (3, 0)
    assert np.isfinite(scores.label_logprob_P).all()


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    k=st.integers(0, 30),
)
def test_candidates_descend_and_equal_logits_ascend_by_id(values: list[int], k: int) -> None:
    k = min(k, len(values))
    logits = torch.tensor([values], dtype=torch.float32)
    top_values, top_ids = (tensor[0].tolist() for tensor in top_candidates(logits, k))
    assert top_values == sorted(values, reverse=True)[:k]
    assert [values[token_id] for token_id in top_ids] == top_values
    pairs = list(zip([-value for value in top_values], top_ids, strict=True))
    assert pairs == sorted(pairs)
    assert len(set(top_ids)) == k


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_poisoned_row_is_named(poison: float) -> None:
    logits = random_logits(4, 10)
    logits[2, 7] = poison
    # The poison lies outside the shared vocabulary: the label's softmax still meets it.
    spec = ScoreSpec(k=2, temperatures=(1.0,), vocab_size=5)
    with pytest.raises(NonFiniteLogitsError, match="row 2 of the teacher's logits") as caught:
        reduce_logits(logits, torch.zeros(4, dtype=torch.long), spec)
    assert caught.value.row == 2
    assert isinstance(caught.value, DataError)
    assert caught.value.reason == "nonfinite_logits"


def test_the_error_survives_a_process_boundary() -> None:
    error = NonFiniteLogitsError("request 3: bad")
    error.request_index, error.stream_index = 3, 1
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.request_index, copy.stream_index, str(copy)) == (3, 1, "request 3: bad")


def test_rows_and_concatenate_undo_each_other() -> None:
    spec = ScoreSpec(k=3, temperatures=(1.0, 2.0), vocab_size=12)
    whole = reduce_logits(random_logits(7, 12), torch.arange(7), spec)
    parts = [whole.rows(0, 2), whole.rows(2, 2), whole.rows(2, 7)]
    joined = Scores.concatenate(parts, spec)
    for field in ("topk_ids_PK", "topk_logits_PK", "logsumexp_PT", "label_logprob_P"):
        np.testing.assert_array_equal(getattr(joined, field), getattr(whole, field))
    empty = Scores.concatenate([], spec)
    assert empty.topk_ids_PK.shape == (0, 3)
    assert empty.logsumexp_PT.shape == (0, 2)
    assert empty.topk_ids_PK.dtype == np.int32


def test_a_slice_holds_as_many_rows_as_its_size_says() -> None:
    assert rows_per_slice(151_936, 256) == 441
    assert 441 * 151_936 * 4 <= 256 * 2**20 < 442 * 151_936 * 4
    assert rows_per_slice(10**9, 1) == 1
