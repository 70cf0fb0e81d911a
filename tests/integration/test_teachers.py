"""Teachers as they are asked: logits, scores and who feels whom, for every family and layout.

The checkpoints are random ones in the published layouts; the reference is the model these came
from, run by transformers alone, one plain forward at a time, under eager attention and an additive
mask. Where the golden vectors are at hand, the published code's logits are compared as well. Which
token feels which is read off a one-layer model, by changing one token at a time.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays

from stage1_teacher.scoring import reduce_logits
from stage1_teacher.teachers.attention import check_mask_is_obeyed
from stage1_teacher.teachers.base import (
    NonFiniteLogitsError,
    OpenTeacher,
    ScoreRequest,
    Scores,
    ScoreSpec,
    Stream,
    TeacherConfig,
)
from stage1_teacher.teachers.batching import pad_batch
from stage1_teacher.teachers.hf import HfTeacher, load_hf_teacher
from stage1_teacher.teachers.layouts import Layout, Tokens, plan_sequences, visibility_mask
from tests.teacher_checkpoints import FAMILIES, MASK_ID, VOCAB_SIZE, make_model, write_checkpoint
from tide_cache.errors import CompatibilityError, DataError
from tide_cache.geometry import block_diffusion_mask
from tide_cache.payloads.hidden import NARROW_MAX, WIDE_MAX, Transform


def load(folder: Path, **changes: Any) -> HfTeacher:
    settings: dict[str, Any] = {
        "model": str(folder),
        "dtype": "float32",
        "device": "cpu",
        "block_size": 4,
        "mask_token_id": MASK_ID,
    }
    return load_hf_teacher(TeacherConfig(**settings | changes))


# --- requests


def make_requests(lengths: list[int], num_streams: int, seed: int = 0) -> list[ScoreRequest]:
    """Samples of the given lengths, each noised `num_streams` times; one stream wants nothing."""
    rng = np.random.default_rng(seed)
    requests = []
    for number, length in enumerate(lengths):
        streams = []
        for index in range(num_streams):
            masked = rng.random(length) < (index + 1) / (num_streams + 1)
            masked[: length // 3] = False
            if number == 1 and index == 0:
                masked[:] = False
            streams.append(Stream(masked_L=masked, wanted_P=np.flatnonzero(masked)))
        ids = rng.integers(0, MASK_ID, length).astype(np.int32)
        requests.append(
            ScoreRequest(clean_ids_L=ids, streams=tuple(streams), name=f"sample-{number}")
        )
    return requests


def wanted_logits(teacher: HfTeacher, requests: list[ScoreRequest]) -> list[np.ndarray]:
    """All logits at the wanted positions, one (P, V) array per stream of each request."""
    hidden = teacher.hidden_states(requests)
    return [teacher.logits(stream).numpy() for request in hidden for stream in request]


@torch.no_grad()
def run_plainly(
    model: Any, ids: torch.Tensor, position_ids: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """Logits (N, V) of one sequence under an additive mask."""
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    logits: torch.Tensor = model(
        input_ids=ids[None],
        position_ids=position_ids[None],
        attention_mask=additive[None, None],
        use_cache=False,
    ).logits[0]
    return logits


def observed_first_logits(
    model: Any, clean: torch.Tensor, masked: torch.Tensor, block_size: int
) -> torch.Tensor:
    """WeDLM's own query: each block alone after its clean prefix, observed tokens first, causal."""
    logits = torch.zeros(len(clean), VOCAB_SIZE)
    for start in range(0, len(clean), block_size):
        block = torch.arange(start, min(start + block_size, len(clean)))
        hidden = masked[block]
        order = torch.cat([torch.arange(start), block[~hidden], block[hidden]])
        ids = clean[order]
        ids[len(ids) - int(hidden.sum()) :] = MASK_ID
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        logits[order[start:]] = run_plainly(model, ids, order, causal)[start:]
    return logits


def expected_logits(
    model: Any, requests: list[ScoreRequest], layout: Layout, block_size: int
) -> list[np.ndarray]:
    """The same from the source model itself: one plain sequence per stream, or per block."""
    answers = []
    for request in requests:
        clean = torch.from_numpy(request.clean_ids_L).long()
        position, length = torch.arange(len(clean)), len(clean)
        for stream in request.streams:
            masked = torch.from_numpy(stream.masked_L)
            noised = torch.where(masked, MASK_ID, clean)
            if layout is Layout.BLOCK_DIFFUSION:
                seen = torch.from_numpy(block_diffusion_mask(length, block_size, "x0_xt"))
                both = torch.cat([clean, noised])
                logits = run_plainly(model, both, position.repeat(2), seen)[length:]
            elif layout is Layout.OBSERVED_FIRST:
                logits = observed_first_logits(model, clean, masked, block_size)
            else:
                block = position // (length if layout is Layout.BIDIRECTIONAL else block_size)
                logits = run_plainly(model, noised, position, block[None] <= block[:, None])
            answers.append(logits[torch.from_numpy(stream.wanted_P)].numpy())
    return answers


def assert_close(
    got: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 1e-5
) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        scale = max(1.0, float(np.abs(other).max())) if other.size else 1.0
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale)


# --- against the source model, for every family, layout and number of files


EVERY_FAMILY = (*FAMILIES, "a2d-qwen3")
CASES = [
    *[(family, "published", Layout.BLOCK_DIFFUSION) for family in EVERY_FAMILY[:-2]],
    *[(family, "bidirectional", Layout.BIDIRECTIONAL) for family in EVERY_FAMILY],
    ("llada2_moe", "published", Layout.BIDIRECTIONAL),
    ("llada2_moe", "native", Layout.BLOCK_CAUSAL),
    ("llada2_moe", "block_diffusion", Layout.BLOCK_DIFFUSION),
    ("wedlm", "native", Layout.OBSERVED_FIRST),
    ("a2d-qwen3", "published", Layout.BLOCK_DIFFUSION),
]


@pytest.mark.parametrize("passes", ["shared", "separate"])
@pytest.mark.parametrize(("family", "attention", "layout"), CASES)
def test_checkpoint_computes_what_its_source_computes(
    tmp_path: Path, family: str, attention: str, layout: Layout, passes: str
) -> None:
    model = make_model(family)
    folder = write_checkpoint(tmp_path / "teacher", family, model, num_files=3)
    teacher = load(folder, attention=attention, passes=passes)
    requests = make_requests([9, 16, 7, 13, 16], num_streams=3)
    expected = expected_logits(model, requests, layout, block_size=4)
    assert_close(wanted_logits(teacher, requests), expected)
    assert teacher.identity.family == family
    assert teacher.identity.attention == layout


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_heads(tmp_path: Path, tied: bool) -> None:
    model = make_model("qwen3", tie_word_embeddings=tied)
    folder = write_checkpoint(tmp_path, "qwen3", model, num_files=2)
    teacher = load(folder)
    same = teacher.model.lm_head.weight is teacher.model.get_input_embeddings().weight
    assert same is tied
    requests = make_requests([8, 12], num_streams=2)
    expected = expected_logits(model, requests, Layout.BLOCK_DIFFUSION, 4)
    assert_close(wanted_logits(teacher, requests), expected)


# --- who feels whom


def influence(teacher: HfTeacher, tokens: Tokens) -> np.ndarray:
    """Say for each query which token changes its hidden state, by changing each in turn."""
    num_tokens = len(tokens)
    batch = pad_batch([tokens] * (num_tokens + 1))
    batch.ids[np.arange(num_tokens), np.arange(num_tokens)] += 1
    hidden = teacher.forward(batch)
    change = (hidden[:num_tokens] - hidden[num_tokens]).abs().amax(dim=-1).T.numpy()
    felt = change > 1e-5
    np.testing.assert_array_equal(felt, change > 1e-7)  # nothing in between: no near-misses
    result: np.ndarray = felt
    return result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", list(Layout))
def test_a_token_feels_exactly_what_its_layout_lets_it_see(
    tmp_path: Path, family: str, layout: Layout
) -> None:
    folder = write_checkpoint(tmp_path, family, make_model(family, num_layers=1))
    teacher = load(folder)
    (request,) = make_requests([10], num_streams=3, seed=3)
    spec = teacher.layout.__class__(layout=layout, block_size=4, mask_token_id=MASK_ID, shared=True)
    for sequence in plan_sequences([request], spec, max_tokens=1000):
        expected = visibility_mask(sequence.tokens)
        np.testing.assert_array_equal(influence(teacher, sequence.tokens), expected)
        if layout is not Layout.OBSERVED_FIRST:
            assert np.triu(expected, 1).any(), "this layout looks ahead"


def test_the_mask_probe_notices_a_model_that_ignores_its_mask(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llama", make_model("llama"))
    model = load(folder).model
    check_mask_is_obeyed(model, mask_by_layer_type=False)
    forward = model.model.forward
    model.model.forward = lambda **inputs: forward(**inputs | {"attention_mask": None})
    with pytest.raises(CompatibilityError, match="does not obey an explicit attention mask"):
        check_mask_is_obeyed(model, mask_by_layer_type=False)
    model.model.forward = forward
    # Eager attention adds a bool mask to the scores: the silent mistake that the probe is for.
    model.set_attn_implementation("eager")
    with pytest.raises(CompatibilityError, match="does not obey an explicit attention mask"):
        check_mask_is_obeyed(model, mask_by_layer_type=False)


# --- scores


SPEC = ScoreSpec(k=12, temperatures=(1.0, 2.0), vocab_size=MASK_ID)


def assert_scores_close(got: Scores, expected: Scores, tolerance: float = 1e-5) -> None:
    np.testing.assert_array_equal(got.topk_ids_PK, expected.topk_ids_PK)
    for field in ("topk_logits_PK", "logsumexp_PT", "label_logprob_P"):
        one, other = getattr(got, field), getattr(expected, field)
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["wedlm", "llada2_moe"])
def test_scores_are_the_reduced_logits_of_plain_forwards(tmp_path: Path, family: str) -> None:
    model = make_model(family)
    teacher = load(write_checkpoint(tmp_path, family, model))
    # CompDemo: the second stream reveals what the first masks, and the other way round.
    rng = np.random.default_rng(5)
    requests = []
    for length in (12, 16, 9):
        masked = rng.random(length) < 0.7
        half = masked & (rng.random(length) < 0.5)
        streams = [
            Stream(masked_L=part, wanted_P=np.flatnonzero(part)) for part in (masked & ~half, half)
        ]
        ids = rng.integers(0, MASK_ID, length)
        requests.append(ScoreRequest(clean_ids_L=ids, streams=tuple(streams)))

    answers = teacher.score(requests, SPEC)

    layout = Layout.BLOCK_DIFFUSION if family == "wedlm" else Layout.BIDIRECTIONAL
    logits = iter(expected_logits(model, requests, layout, 4))
    for request, answer in zip(requests, answers, strict=True):
        for stream, scores in zip(request.streams, answer, strict=True):
            labels = torch.from_numpy(request.clean_ids_L[stream.wanted_P])
            expected = reduce_logits(torch.from_numpy(next(logits)), labels, SPEC)
            assert_scores_close(scores, expected, 2e-5)


@pytest.mark.parametrize("family", ["qwen3", "llada2_moe"])
def test_slices_batches_and_order_do_not_change_the_answer(tmp_path: Path, family: str) -> None:
    folder = write_checkpoint(tmp_path, family, make_model(family))
    requests = make_requests([5, 16, 11, 3, 16, 8, 13], num_streams=4)
    whole = load(folder, token_budget=4096).score(requests, SPEC)
    assert len(whole[1][0].label_logprob_P) == 0  # wants nothing

    in_small_batches = load(folder, token_budget=40)
    in_small_batches.rows_per_slice = 3
    one_by_one = [load(folder).score([request], SPEC)[0] for request in requests]
    for other in (in_small_batches.score(requests, SPEC), one_by_one):
        for request, expected in zip(other, whole, strict=True):
            for got, wanted in zip(request, expected, strict=True):
                assert_scores_close(got, wanted)


def test_the_same_call_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "wedlm", make_model("wedlm"))
    requests = make_requests([5, 16, 11, 16], num_streams=4)
    first, second = (load(folder, token_budget=64).score(requests, SPEC) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for scores, again in zip(one, other, strict=True):
            for field in ("topk_ids_PK", "topk_logits_PK", "logsumexp_PT", "label_logprob_P"):
                assert getattr(scores, field).tobytes() == getattr(again, field).tobytes()


def test_all_candidates_rebuild_the_logits(tmp_path: Path) -> None:
    model = make_model("qwen3")
    teacher = load(write_checkpoint(tmp_path, "qwen3", model))
    (request,) = make_requests([12], num_streams=1)
    spec = ScoreSpec(k=VOCAB_SIZE, temperatures=(2.0,), vocab_size=VOCAB_SIZE)
    (expected,) = expected_logits(model, [request], Layout.BLOCK_DIFFUSION, 4)
    scores = teacher.score([request], spec)[0][0]
    rebuilt = np.empty_like(expected)
    np.put_along_axis(rebuilt, scores.topk_ids_PK.astype(int), scores.topk_logits_PK, -1)
    np.testing.assert_allclose(rebuilt, expected, atol=1e-5)


def test_hidden_states_and_head_are_those_of_the_logits(tmp_path: Path) -> None:
    teacher = load(write_checkpoint(tmp_path, "qwen3", make_model("qwen3")))
    assert isinstance(teacher, OpenTeacher)
    requests = make_requests([5, 16, 11], num_streams=2)
    weight_VD, bias_V = teacher.head()
    assert weight_VD.shape == (VOCAB_SIZE, teacher.hidden_size)
    assert bias_V is None
    with torch.no_grad():
        hidden = [stream for request in teacher.hidden_states(requests) for stream in request]
        assert_close([(h @ weight_VD.T).numpy() for h in hidden], wanted_logits(teacher, requests))
    nothing = ScoreRequest(
        clean_ids_L=np.arange(4),
        streams=(Stream(masked_L=np.zeros(4, bool), wanted_P=np.zeros(0, int)),),
    )
    assert teacher.hidden_states([nothing])[0][0].shape == (0, teacher.hidden_size)


def test_scores_hold_the_codes_of_the_hidden_states(tmp_path: Path) -> None:
    """Whatever the batches, each position's codes are those of its own hidden state."""
    teacher = load(write_checkpoint(tmp_path, "qwen3", make_model("qwen3")), token_budget=64)
    requests = make_requests([5, 16, 11, 8], num_streams=3)
    random, size = np.random.default_rng(2), teacher.hidden_size
    transform = Transform(
        analysis_RD=random.normal(size=(6, size)).astype(np.float32),
        synthesis_DR=random.normal(size=(size, 6)).astype(np.float32),
        mean_D=random.normal(size=size).astype(np.float32),
        limit_R=np.array([WIDE_MAX, *[NARROW_MAX] * 5], dtype=np.int16),
        step=0.05,
    )
    answers = teacher.score(requests, dataclasses.replace(SPEC, transform=transform))
    plain = teacher.score(requests, SPEC)
    for request, scored, unasked in zip(
        teacher.hidden_states(requests), answers, plain, strict=True
    ):
        for hidden_PD, scores, others in zip(request, scored, unasked, strict=True):
            assert scores.hidden_codes_PR is not None
            expected_PR = transform.to_codes(hidden_PD.float().numpy())
            # Float32 sums in another order may round a code on the edge to its neighbour.
            np.testing.assert_allclose(scores.hidden_codes_PR, expected_PR, atol=1)
            num_other = np.count_nonzero(scores.hidden_codes_PR != expected_PR)
            assert num_other <= 0.01 * expected_PR.size
            assert others.hidden_codes_PR is None
            assert_scores_close(scores, others)


def test_a_poisoned_request_is_named_and_the_others_can_go_on(tmp_path: Path) -> None:
    model = make_model("qwen3")
    model.get_input_embeddings().weight.data[77] = float("nan")
    teacher = load(write_checkpoint(tmp_path, "qwen3", model), token_budget=64)
    requests = make_requests([12, 12, 12], num_streams=2)
    # Position 0 lies in the first block, clean for all later ones: each of its streams is met.
    ids = requests[1].clean_ids_L.copy()
    ids[0] = 77
    streams = tuple(Stream(masked_L=s.masked_L, wanted_P=s.wanted_P) for s in requests[2].streams)
    poisoned = ScoreRequest(clean_ids_L=ids, streams=streams, name="sample-1")
    with pytest.raises(
        NonFiniteLogitsError,
        match=r"request 1 \(sample-1\), stream \d, position \d+: the teacher's logits hold NaN",
    ) as caught:
        teacher.score([requests[0], poisoned, requests[2]], SPEC)
    assert caught.value.request_index == 1
    assert len(teacher.score([requests[0], requests[2]], SPEC)) == 2


def test_requests_that_do_not_fit_the_teacher_are_refused(tmp_path: Path) -> None:
    teacher = load(write_checkpoint(tmp_path, "qwen3", make_model("qwen3")))
    stream = Stream(masked_L=np.array([False, True]), wanted_P=np.array([1]))
    wrong = ScoreRequest(clean_ids_L=np.array([1, 96]), streams=(stream,), name="abc")
    with pytest.raises(DataError, match=r"request 0 \(abc\): token id 96 is outside the vocabul"):
        teacher.score([wrong], SPEC)
    with pytest.raises(CompatibilityError, match="has 96 logits, got 97"):
        teacher.score([], ScoreSpec(k=1, temperatures=(), vocab_size=97))


# --- golden vectors of the published code


def golden_requests(ids: np.ndarray, masked: np.ndarray, keep: np.ndarray) -> list[ScoreRequest]:
    return [
        ScoreRequest(
            clean_ids_L=row[kept],
            streams=(Stream(masked_L=mask[kept], wanted_P=np.flatnonzero(mask[kept])),),
        )
        for row, mask, kept in zip(ids, masked, keep, strict=True)
    ]


@pytest.mark.parametrize("passes", ["shared", "separate"])
@pytest.mark.parametrize(
    ("attention", "key"),
    [("published", "logits_bidirectional"), ("native", "logits_block_causal_8")],
)
def test_golden_llada2(golden_dir: Path, attention: str, key: str, passes: str) -> None:
    folder = golden_dir / "models" / "llada2_tiny"
    expected = load_arrays(folder / "expected.safetensors")
    ids, keep = expected["input_ids"], expected["keep"]
    masked = keep & (ids == 499)
    teacher = load(folder, attention=attention, mask_token_id=499, block_size=8, passes=passes)
    requests = golden_requests(ids, masked, keep)
    wanted = [row[mask] for row, mask in zip(expected[key], masked, strict=True)]
    assert all(len(row) for row in wanted)
    assert_close(wanted_logits(teacher, requests), wanted)
    everywhere = [row[kept] for row, kept in zip(expected[key], keep, strict=True)]
    assert_close(every_logit(teacher, requests), everywhere)


def every_logit(teacher: HfTeacher, requests: list[ScoreRequest]) -> list[np.ndarray]:
    """Logits at all noised tokens of single-stream requests, in one padded batch."""
    spec = dataclasses.replace(teacher.layout, shared=False)
    sequences = plan_sequences(requests, spec, max_tokens=1)
    batch = pad_batch([sequence.tokens for sequence in sequences])
    hidden = teacher.forward(batch)
    noised = torch.from_numpy(batch.stream > 0)
    return [teacher.logits(h[n]).numpy() for h, n in zip(hidden, noised, strict=True)]


@pytest.mark.parametrize("passes", ["shared", "separate"])
@pytest.mark.parametrize(
    ("attention", "key"), [("published", "logits_published"), ("native", "logits_native")]
)
def test_golden_wedlm(golden_dir: Path, attention: str, key: str, passes: str) -> None:
    folder = golden_dir / "models" / "wedlm_tiny"
    expected = load_arrays(folder / "expected.safetensors")
    ids, masked = expected["x0"], expected["masked"]
    teacher = load(folder, attention=attention, mask_token_id=None, passes=passes)
    assert teacher.mask_token_id == 500
    requests = golden_requests(ids, masked, np.ones_like(masked))
    wanted = [row[mask] for row, mask in zip(expected[key], masked, strict=True)]
    assert_close(wanted_logits(teacher, requests), wanted)


def test_golden_student(golden_dir: Path) -> None:
    folder = golden_dir / "models" / "student_tiny"
    expected = load_arrays(folder / "expected.safetensors")
    teacher = load(folder, mask_token_id=500, block_size=32, passes="separate")
    noised, clean = np.split(expected["train_input"], 2, axis=1)
    # The noise here is other tokens instead of the mask id, so the sequences are built by hand.
    requests = golden_requests(clean, np.ones(clean.shape, bool), np.ones(clean.shape, bool))
    sequences = plan_sequences(requests, teacher.layout, max_tokens=1)
    batch = pad_batch([sequence.tokens for sequence in sequences])
    batch.ids[:] = np.concatenate([clean, noised], axis=1)
    hidden = teacher.forward(batch)
    logits = [teacher.logits(rows).numpy() for rows in hidden[:, 64:]]
    assert_close(logits, list(expected["train_logits"]))
