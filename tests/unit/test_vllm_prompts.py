"""Prompts of an engine without masks, and rows of answers: what needs no engine to be checked.

A prompt stands for a part of a stream: read with the attention that its layout is served with, each
wanted token must see exactly the tokens that it sees in the transformers backend's sequence.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stage1_teacher.scoring import reduce_logits
from stage1_teacher.teachers.base import ScoreRequest, ScoreSpec, Stream, TeacherConfig
from stage1_teacher.teachers.layouts import Layout, LayoutSpec, plan_sequences, visibility_mask
from stage1_teacher.teachers.vllm_answers import (
    check_ids_are_exact,
    num_columns,
    pack_answers,
    unpack_answers,
)
from stage1_teacher.teachers.vllm_engine import cut_by_tokens
from stage1_teacher.teachers.vllm_probe import plan_probes
from stage1_teacher.teachers.vllm_prompts import Prompt, num_tokens, plan_prompts
from tide_cache.errors import CompatibilityError

MASK_ID, VOCAB_SIZE = 90, 96


def masked_id(layout: Layout) -> int:
    return VOCAB_SIZE if layout is Layout.OBSERVED_FIRST else MASK_ID


def seen_in_prompt(prompt: Prompt, row: int, layout: Layout, block_size: int) -> set:
    """(position, id) of what a token of a prompt sees under the attention it is served with."""
    position = np.arange(len(prompt.ids_N))
    if layout is Layout.OBSERVED_FIRST:
        is_masked = prompt.ids_N == VOCAB_SIZE
        order = np.argsort(np.argsort(is_masked, kind="stable"), kind="stable")
        seen = order <= order[row]
        ids = np.where(is_masked, MASK_ID, prompt.ids_N)
    else:
        block = position * 0 if layout is Layout.BIDIRECTIONAL else position // block_size
        seen, ids = block <= block[row], prompt.ids_N
    return {(int(p), int(i)) for p, i in zip(position[seen], ids[seen], strict=True)}


def seen_in_sequences(
    request: ScoreRequest, layout: Layout, block_size: int
) -> dict[tuple[int, int], set]:
    """The same by (stream, position) from the transformers backend's sequences."""
    spec = LayoutSpec(layout=layout, block_size=block_size, mask_token_id=MASK_ID, shared=True)
    found = {}
    for sequence in plan_sequences([request], spec, max_tokens=10_000):
        tokens, mask = sequence.tokens, visibility_mask(sequence.tokens)
        for readout in sequence.readouts:
            for row in readout.rows_P:
                seen = mask[row]
                keys = zip(tokens.position_ids_N[seen], tokens.ids_N[seen], strict=True)
                position = int(tokens.position_ids_N[row])
                found[readout.stream_index, position] = {(int(p), int(i)) for p, i in keys}
    return found


@st.composite
def requests(draw: st.DrawFn) -> ScoreRequest:
    length = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    streams = []
    for _ in range(draw(st.integers(0, 3))):
        masked = rng.random(length) < rng.random()
        wanted = masked & (rng.random(length) < 0.8)
        streams.append(Stream(masked_L=masked, wanted_P=np.flatnonzero(wanted)))
    # The mask id among the text is a token like any other.
    ids = rng.integers(0, VOCAB_SIZE, length)
    return ScoreRequest(clean_ids_L=ids, streams=tuple(streams))


@given(requests(), st.sampled_from(list(Layout)), st.integers(1, 12))
def test_every_wanted_token_sees_what_it_sees_in_transformers(
    request: ScoreRequest, layout: Layout, block_size: int
) -> None:
    expected = seen_in_sequences(request, layout, block_size)
    prompts = plan_prompts([request], layout, block_size=block_size, masked_id=masked_id(layout))
    found: dict[tuple[int, int], set] = {}
    for prompt in prompts:
        wanted = request.streams[prompt.stream_index].wanted_P
        part = wanted[prompt.start : prompt.start + len(prompt.rows_P)]
        np.testing.assert_array_equal(part, prompt.rows_P)
        for row in prompt.rows_P:
            key = (prompt.stream_index, int(row))
            assert key not in found
            found[key] = seen_in_prompt(prompt, int(row), layout, block_size)
    assert found == expected
    assert num_tokens(prompts) == sum(len(prompt.ids_N) for prompt in prompts)


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 50))
def test_calls_hold_every_prompt_once_and_stay_within_their_tokens(
    lengths: list[int], max_tokens: int
) -> None:
    cuts = list(cut_by_tokens(lengths, max_tokens))
    assert [i for start, stop in cuts for i in range(start, stop)] == list(range(len(lengths)))
    for start, stop in cuts:
        assert stop - start == 1 or sum(lengths[start:stop]) <= max_tokens
    for (start, stop), (_, after) in pairwise(cuts):
        assert after > stop
        assert sum(lengths[start : stop + 1]) > max_tokens, "the next prompt would have fitted"


# --- rows of answers


@pytest.mark.parametrize("k", [0, 5, 40])
@pytest.mark.parametrize("temperatures", [(), (1.0, 2.0, 0.5)])
def test_rows_hold_what_the_reduction_gives(k: int, temperatures: tuple[float, ...]) -> None:
    spec = ScoreSpec(k=k, temperatures=temperatures, vocab_size=40)
    logits_PV = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    labels_P = torch.arange(7) * 7
    rows_PC = pack_answers(logits_PV, labels_P, spec)
    assert rows_PC.shape == (7, num_columns(spec))
    scores, finite_P = unpack_answers(rows_PC.numpy(), spec)
    assert finite_P.all()
    expected = reduce_logits(logits_PV, labels_P, spec)
    for field in ("topk_ids_PK", "topk_logits_PK", "logsumexp_PT", "label_logprob_P"):
        mine, theirs = getattr(scores, field), getattr(expected, field)
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_of_broken_logits_says_so_and_leaves_the_others(bad: float) -> None:
    spec = ScoreSpec(k=3, temperatures=(1.0,), vocab_size=8)
    logits_PV = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    plain, _ = unpack_answers(
        pack_answers(logits_PV, torch.zeros(4, dtype=int), spec).numpy(), spec
    )
    logits_PV[2, 9] = bad
    scores, finite_P = unpack_answers(
        pack_answers(logits_PV, torch.zeros(4, dtype=int), spec).numpy(), spec
    )
    assert finite_P.tolist() == [True, True, False, True]
    np.testing.assert_array_equal(scores.topk_ids_PK[finite_P], plain.topk_ids_PK[finite_P])


def test_ids_that_float32_cannot_hold_are_refused() -> None:
    check_ids_are_exact(1 << 24, "x")
    with pytest.raises(CompatibilityError, match="expected at most 16777216 ids"):
        check_ids_are_exact((1 << 24) + 1, "x")


# --- probes


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("block_size", [1, 2, 4, 32])
def test_probes_tell_layouts_apart(layout: Layout, block_size: int) -> None:
    spec = LayoutSpec(layout=layout, block_size=block_size, mask_token_id=MASK_ID, shared=True)
    probes = plan_probes(spec, VOCAB_SIZE, max_tokens=64)
    assert probes
    for probe in probes:
        seen = [as_seen(ids, probe.row, layout, block_size) for ids in probe.seen]
        plain = as_seen(probe.ids, probe.row, layout, block_size)
        assert seen
        assert all(other != plain for other in seen)
        assert all(as_seen(i, probe.row, layout, block_size) == plain for i in probe.unseen)
    if layout not in (Layout.BIDIRECTIONAL,):
        assert any(probe.unseen for probe in probes)


def as_seen(ids: tuple[int, ...], row: int, layout: Layout, block_size: int) -> set:
    prompt = Prompt(
        request_index=0, stream_index=0, start=0, ids_N=np.array(ids), rows_P=np.array([row])
    )
    return seen_in_prompt(prompt, row, layout, block_size)


# --- the config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backend": "hf", "vllm": {}}, "vllm: goes with backend: vllm"),
        ({"device_map": "auto"}, "device_map: goes with backend: hf; set vllm.tensor_parallel"),
        ({"passes": "separate"}, "passes: separate goes with backend: hf"),
        (
            {"device": "cuda:1", "vllm": {"tensor_parallel_size": 2}},
            "tensor_parallel_size above 1: leave device at auto",
        ),
    ],
)
def test_options_of_another_backend_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherConfig(**{"model": "x", "backend": "vllm", **values})
