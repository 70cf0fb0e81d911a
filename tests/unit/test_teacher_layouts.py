"""Layouts and batches as data: who sees whom, what may be left out, what shares a forward."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage1_teacher.teachers.base import ScoreRequest, ScoreSpec, Stream, TeacherConfig
from stage1_teacher.teachers.batching import MAX_PADDING, pad_batch, plan_batches
from stage1_teacher.teachers.layouts import (
    Layout,
    LayoutSpec,
    Roles,
    TeacherSequence,
    plan_sequences,
    visibility_mask,
    visible,
)
from tide_cache.config import parse_config
from tide_cache.errors import ConfigError, DataError
from tide_cache.geometry import block_diffusion_mask

MASK_ID = 99
UNBOUNDED = 10**9


def make_spec(layout: Layout, block_size: int, *, shared: bool) -> LayoutSpec:
    return LayoutSpec(layout=layout, block_size=block_size, mask_token_id=MASK_ID, shared=shared)


def make_request(masks: list[list[int]], wanted: list[list[int]] | None = None) -> ScoreRequest:
    """A request whose token at position i is 10 + i; `wanted` defaults to all masked positions."""
    streams = []
    for index, mask in enumerate(masks):
        masked_L = np.array(mask, dtype=bool)
        positions = np.flatnonzero(masked_L) if wanted is None else np.array(wanted[index], int)
        streams.append(Stream(masked_L=masked_L, wanted_P=positions))
    ids = np.arange(10, 10 + len(masks[0]), dtype=np.int32)
    return ScoreRequest(clean_ids_L=ids, streams=tuple(streams))


def only_sequence(request: ScoreRequest, spec: LayoutSpec) -> TeacherSequence:
    (sequence,) = plan_sequences([request], spec, max_tokens=UNBOUNDED)
    return sequence


# --- who sees whom: each layout against its definition, written out independently


@pytest.mark.parametrize(
    ("num_positions", "block_size"), [(8, 4), (10, 4), (5, 8), (6, 1), (12, 4), (1, 1)]
)
def test_plain_block_diffusion_is_the_published_mask(num_positions: int, block_size: int) -> None:
    request = make_request([[1] * num_positions])
    sequence = only_sequence(request, make_spec(Layout.BLOCK_DIFFUSION, block_size, shared=False))
    expected = block_diffusion_mask(num_positions, block_size, "x0_xt")
    np.testing.assert_array_equal(visibility_mask(sequence.tokens), expected)
    positions = list(range(num_positions))
    assert sequence.tokens.position_ids_N.tolist() == positions + positions


def test_bidirectional_sees_everything() -> None:
    request = make_request([[0, 1, 0, 1, 1]])
    for shared in (False, True):
        sequence = only_sequence(request, make_spec(Layout.BIDIRECTIONAL, 2, shared=shared))
        assert sequence.tokens.ids_N.tolist() == [10, MASK_ID, 12, MASK_ID, MASK_ID]
        assert visibility_mask(sequence.tokens).all()


def test_block_causal_sees_its_own_and_earlier_blocks() -> None:
    request = make_request([[0, 1, 0, 1, 1, 0, 1]])
    sequence = only_sequence(request, make_spec(Layout.BLOCK_CAUSAL, 3, shared=False))
    block = np.arange(7) // 3
    np.testing.assert_array_equal(visibility_mask(sequence.tokens), block[None] <= block[:, None])


def test_observed_first_is_a_causal_mask_after_reordering_each_block() -> None:
    masked = np.array([0, 1, 0, 1, 1, 1, 0, 0, 1, 0], dtype=bool)
    num_positions, block_size = len(masked), 4
    request = make_request([masked.astype(int).tolist()])
    sequence = only_sequence(request, make_spec(Layout.OBSERVED_FIRST, block_size, shared=False))
    mask = visibility_mask(sequence.tokens)
    for start in range(0, num_positions, block_size):
        # WeDLM's own query of one block: its clean prefix, then the block's observed tokens, then
        # its masked ones, all under a causal mask.
        block = np.arange(start, min(start + block_size, num_positions))
        order = [*block[~masked[block]], *block[masked[block]]]
        for rank, position in enumerate(order):
            expected = np.zeros(2 * num_positions, dtype=bool)
            expected[:start] = True
            expected[num_positions + np.array(order[: rank + 1])] = True
            np.testing.assert_array_equal(mask[num_positions + position], expected)
    causal = np.tri(num_positions, dtype=bool)
    np.testing.assert_array_equal(mask[:num_positions, :num_positions], causal)
    assert not mask[:num_positions, num_positions:].any()


def test_padding_sees_padding_and_nobody_sees_it() -> None:
    spec = make_spec(Layout.BLOCK_DIFFUSION, 2, shared=True)
    requests = [make_request([[0, 0, 0, 1, 1]]), make_request([[0, 1]])]
    sequences = plan_sequences(requests, spec, max_tokens=UNBOUNDED)
    batch = pad_batch([sequence.tokens for sequence in sequences])
    assert batch.ids.shape == (2, 7)
    stream, block, order = batch.stream, batch.block, batch.order
    query = Roles(stream=stream[:, :, None], block=block[:, :, None], order=order[:, :, None])
    mask = visible(query, Roles(stream=stream[:, None], block=block[:, None], order=order[:, None]))
    num_real = len(sequences[1].tokens)
    assert num_real == 2
    assert mask.any(axis=-1).all(), "a row without a key would be NaN"
    assert not mask[1, :num_real, num_real:].any()
    np.testing.assert_array_equal(
        mask[1, :num_real, :num_real], visibility_mask(sequences[1].tokens)
    )


# --- the savings: what a wanted position can reach is the same, and less is run


@dataclasses.dataclass(frozen=True)
class Node:
    """A token as the model meets it, wherever it stands in the sequence."""

    is_clean: bool
    token_id: int
    position_id: int


def reachable(sequence: TeacherSequence, start: int) -> dict[Node, frozenset[Node]]:
    """Every token that can influence token `start` through any number of layers, with its keys."""
    tokens = sequence.tokens
    mask = visibility_mask(tokens)
    nodes = [
        Node(bool(stream == 0), int(token_id), int(position))
        for stream, token_id, position in zip(
            tokens.stream_N, tokens.ids_N, tokens.position_ids_N, strict=True
        )
    ]
    found: dict[int, frozenset[Node]] = {}
    todo = [start]
    while todo:
        query = todo.pop()
        if query not in found:
            keys = np.flatnonzero(mask[query])
            found[query] = frozenset(nodes[key] for key in keys)
            assert len(found[query]) == len(keys), "two tokens of one sequence look the same"
            todo += keys.tolist()
    return {nodes[query]: keys for query, keys in found.items()}


@st.composite
def requests_with_streams(draw: st.DrawFn) -> ScoreRequest:
    num_positions = draw(st.integers(1, 14))
    bits = st.lists(st.booleans(), min_size=num_positions, max_size=num_positions)
    streams = []
    for _ in range(draw(st.integers(1, 4))):
        masked = np.array(draw(bits), dtype=bool)
        wanted = np.flatnonzero(masked & np.array(draw(bits), dtype=bool))
        streams.append(Stream(masked_L=masked, wanted_P=wanted))
    ids = np.arange(10, 10 + num_positions, dtype=np.int32)
    return ScoreRequest(clean_ids_L=ids, streams=tuple(streams))


@settings(max_examples=150, deadline=None)
@given(
    request=requests_with_streams(),
    layout=st.sampled_from(list(Layout)),
    block_size=st.integers(1, 6),
    max_tokens=st.sampled_from([1, 20, UNBOUNDED]),
)
def test_shared_sequences_hold_exactly_what_wanted_positions_can_see(
    request: ScoreRequest, layout: Layout, block_size: int, max_tokens: int
) -> None:
    answers: dict[bool, dict[tuple[int, int], dict[Node, frozenset[Node]]]] = {}
    totals = {}
    for shared in (False, True):
        spec = make_spec(layout, block_size, shared=shared)
        sequences = plan_sequences([request], spec, max_tokens=max_tokens)
        totals[shared] = sum(len(sequence.tokens) for sequence in sequences)
        answers[shared] = {}
        for sequence in sequences:
            assert len(sequence.readouts) == 1 or len(sequence.tokens) <= max_tokens
            for readout in sequence.readouts:
                wanted = request.streams[readout.stream_index].wanted_P
                for position, row in zip(wanted, readout.rows_P, strict=True):
                    assert sequence.tokens.position_ids_N[row] == position
                    assert sequence.tokens.ids_N[row] == MASK_ID
                    assert sequence.tokens.stream_N[row] > 0
                    key = (readout.stream_index, int(position))
                    assert key not in answers[shared], "answered twice"
                    answers[shared][key] = reachable(sequence, int(row))
    wanted_positions = {
        (index, int(position))
        for index, stream in enumerate(request.streams)
        for position in stream.wanted_P
    }
    assert set(answers[True]) == set(answers[False]) == wanted_positions
    assert answers[True] == answers[False]
    assert totals[True] <= totals[False]


def test_shared_plan_drops_dead_blocks_and_runs_the_clean_half_once() -> None:
    half_a = [0, 0, 0, 0, 0, 0, 1, 0, 0, 1]
    half_b = [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    spec = make_spec(Layout.BLOCK_DIFFUSION, 2, shared=True)
    sequence = only_sequence(make_request([half_a, half_b, [0] * 10]), spec)
    # Clean blocks 0..3 (nobody sees the last), then blocks 3 and 4 of one half, 3 of the other.
    assert sequence.tokens.position_ids_N.tolist() == [*range(8), 6, 7, 8, 9, 6, 7]
    assert sequence.tokens.stream_N.tolist() == [0] * 8 + [1] * 4 + [2] * 2
    assert [readout.stream_index for readout in sequence.readouts] == [0, 1]
    assert [readout.rows_P.tolist() for readout in sequence.readouts] == [[8, 11], [13]]


def test_streams_split_over_sequences_where_they_would_pass_the_limit() -> None:
    spec = make_spec(Layout.BLOCK_DIFFUSION, 2, shared=True)
    request = make_request([[0, 0, 1, 1]] * 5)
    sequences = plan_sequences([request], spec, max_tokens=7)
    assert [len(sequence.tokens) for sequence in sequences] == [6, 6, 4]
    served = [readout.stream_index for sequence in sequences for readout in sequence.readouts]
    assert served == [0, 1, 2, 3, 4]


# --- batches


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), max_size=60),
    token_budget=st.integers(1, 2000),
)
def test_every_sequence_runs_once_within_budget_and_padding(
    lengths: list[int], token_budget: int
) -> None:
    batches = plan_batches(lengths, token_budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        padded = longest * len(batch)
        real = sum(lengths[index] for index in batch)
        assert len(batch) == 1 or padded <= token_budget
        assert padded - real <= MAX_PADDING * padded


def test_equal_lengths_fill_batches_in_order() -> None:
    assert plan_batches([10] * 5, 25) == [(0, 1), (2, 3), (4,)]
    assert plan_batches([], 25) == []
    assert plan_batches([30, 10], 25) == [(0,), (1,)]


# --- what a caller can get wrong


def test_wanted_positions_must_be_masked_ascending_and_inside() -> None:
    masked = np.array([False, True, True])
    with pytest.raises(DataError, match="position 0 is not masked"):
        Stream(masked_L=masked, wanted_P=np.array([0, 1]))
    with pytest.raises(DataError, match="ascending positions without repeats"):
        Stream(masked_L=masked, wanted_P=np.array([2, 1]))
    with pytest.raises(DataError, match=r"positions in \[0, 3\), got 1\.\.3"):
        Stream(masked_L=masked, wanted_P=np.array([1, 3]))
    with pytest.raises(DataError, match="expected a bool vector, got int64"):
        Stream(masked_L=np.array([0, 1]), wanted_P=np.array([1]))


def test_streams_must_be_as_long_as_the_sample() -> None:
    stream = Stream(masked_L=np.array([False, True]), wanted_P=np.array([1]))
    with pytest.raises(DataError, match="stream 0: masked_L has 2 positions, clean_ids_L has 3"):
        ScoreRequest(clean_ids_L=np.arange(3), streams=(stream,))
    with pytest.raises(DataError, match="non-empty integer vector"):
        ScoreRequest(clean_ids_L=np.zeros(0, np.int32), streams=())


@pytest.mark.parametrize(
    ("k", "temperatures", "message"),
    [
        (11, (1.0,), r"k: expected 0 to 10 candidates \(the vocabulary\), got 11"),
        (-1, (1.0,), "k: expected 0 to 10"),
        (4, (0.0,), "temperatures: expected positive numbers, got 0.0"),
        (4, (float("nan"),), "temperatures: expected positive numbers, got nan"),
        (4, (2.0, 2.0), "holds a repeat"),
    ],
)
def test_impossible_specs_are_refused(
    k: int, temperatures: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ScoreSpec(k=k, temperatures=temperatures, vocab_size=10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention": "causal"}, "attention: Input should be 'published', 'native'"),
        ({"block_sise": 32}, r"unknown key 'block_sise' \(did you mean 'block_size'\?\)"),
        ({"device": "gpu"}, "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ({"device": "cpu", "device_map": "auto"}, "device and device_map are both given"),
        ({"attn_implementation": "eager"}, "attn_implementation: Input should be 'sdpa'"),
        ({"token_budget": 0}, "token_budget: Input should be greater than or equal to 1, got 0"),
    ],
)
def test_teacher_config_refuses_what_it_does_not_know(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"model": "some/teacher", **values}, TeacherConfig, where="build.yaml")
