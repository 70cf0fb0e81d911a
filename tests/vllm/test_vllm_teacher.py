"""The vLLM backend against the transformers backend: the real engine on a CPU, tiny checkpoints.

Run with `make test-vllm`, which makes an environment of its own; elsewhere these are skipped.
Engines run in the test's own process, because two more of them take 20 s to import vLLM: the build
and the case of two workers run them as users do. Each case starts one and asks it everything.
"""

import dataclasses
import os
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest

from stage1_teacher.teachers import load_teacher
from stage1_teacher.teachers.base import (
    NonFiniteLogitsError,
    ScoreRequest,
    Scores,
    ScoreSpec,
    Stream,
    TeacherConfig,
)
from stage1_teacher.teachers.hf import HfTeacher, load_hf_teacher
from stage1_teacher.teachers.layouts import Layout
from tests.teacher_checkpoints import MASK_ID, VOCAB_SIZE, make_model, write_checkpoint
from tide_cache.errors import CompatibilityError, DataError
from tide_cache.payloads.hidden import WIDE_MAX, Transform

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# Two workers on one memory node would not be bound to processors, and so refused.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
pytest.importorskip("vllm", reason="vllm is not installed: run 'make test-vllm'")

from vllm.distributed import cleanup_dist_env_and_memory

from stage1_teacher.teachers.vllm import VllmTeacher

TOLERANCE = 1e-4
MAX_LENGTH = 64
POISON_ID = 77  # its embedding is NaN in every checkpoint here
SPEC = ScoreSpec(k=12, temperatures=(1.0, 2.0), vocab_size=MASK_ID)
CASES = [
    ("qwen3", "published", Layout.BLOCK_DIFFUSION, 1),
    ("wedlm", "native", Layout.OBSERVED_FIRST, 1),
    ("qwen2", "published", Layout.BLOCK_DIFFUSION, 1),
    ("llama", "bidirectional", Layout.BIDIRECTIONAL, 1),
    ("llada2_moe", "native", Layout.BLOCK_CAUSAL, 1),
    ("llada2_moe", "published", Layout.BIDIRECTIONAL, 1),
    ("qwen3", "published", Layout.BLOCK_DIFFUSION, 2),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    vllm: VllmTeacher
    hf: HfTeacher


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    family, attention, layout, tensor_parallel_size = request.param
    # vLLM's CPU attention knows head sizes from 32 on.
    wide = {"hidden_size": 128} if family in ("qwen2", "llama") else {"head_dim": 32}
    model = make_model(family, **wide)
    model.get_input_embeddings().weight.data[POISON_ID] = float("nan")
    folder = write_checkpoint(tmp_path_factory.mktemp(family), family, model, num_files=3)
    common: dict[str, Any] = {
        "model": str(folder),
        "attention": attention,
        "dtype": "float32",
        "device": "cpu",
        "block_size": 4,
        "mask_token_id": MASK_ID,
    }
    options = {
        "kv_cache_gib": 0.25,
        "max_model_len": MAX_LENGTH,
        "tensor_parallel_size": tensor_parallel_size,
    }
    config = TeacherConfig(**common, backend="vllm", token_budget=160, vllm=options)
    teacher = load_teacher(config)
    assert isinstance(teacher, VllmTeacher)
    assert teacher.identity.attention == layout
    yield Pair(vllm=teacher, hf=load_hf_teacher(TeacherConfig(**common)))
    teacher.close()
    cleanup_dist_env_and_memory()


def comp_demo_requests(lengths: list[int], num_views: int, seed: int) -> list[ScoreRequest]:
    """Samples with `num_views` views of two halves each: one reveals what the other masks."""
    rng = np.random.default_rng(seed)
    requests = []
    for number, length in enumerate(lengths):
        streams = []
        for _ in range(num_views):
            masked = rng.random(length) < rng.uniform(0.1, 0.9)
            masked[: length // 3] = False
            half = masked & (rng.random(length) < 0.5)
            for part in (masked & ~half, half):
                streams.append(Stream(masked_L=part, wanted_P=np.flatnonzero(part)))
        ids = rng.integers(0, POISON_ID, length)
        requests.append(
            ScoreRequest(clean_ids_L=ids, streams=tuple(streams), name=f"sample-{number}")
        )
    return requests


def assert_same_answers(
    got: list[list[Scores]], expected: list[list[Scores]], tolerance: float = TOLERANCE
) -> None:
    assert [len(streams) for streams in got] == [len(streams) for streams in expected]
    for one, other in zip(chain(*got), chain(*expected), strict=True):
        np.testing.assert_array_equal(one.topk_ids_PK, other.topk_ids_PK)
        assert one.hidden_codes_PR is None
        for field in ("topk_ids_PK", "topk_logits_PK", "logsumexp_PT", "label_logprob_P"):
            mine, theirs = getattr(one, field), getattr(other, field)
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance)


def test_ragged_batches_of_views_and_halves_agree(pair: Pair) -> None:
    lengths = [9, 16, 7, 1, 13, MAX_LENGTH, 16, 33, 2, 30]
    requests = comp_demo_requests(lengths, num_views=3, seed=1)
    expected = pair.hf.score(requests, SPEC)
    assert_same_answers(pair.vllm.score(requests, SPEC), expected)
    alone = [pair.vllm.score([request], SPEC)[0] for request in requests]
    assert_same_answers(alone, expected)


def test_the_spec_is_that_of_the_call(pair: Pair) -> None:
    requests = comp_demo_requests([16, 11, 5], num_views=2, seed=2)
    for spec in (
        ScoreSpec(k=0, temperatures=(), vocab_size=VOCAB_SIZE),
        ScoreSpec(k=VOCAB_SIZE, temperatures=(0.5, 1.0, 3.0), vocab_size=VOCAB_SIZE),
        ScoreSpec(k=3, temperatures=(2.0,), vocab_size=20),
    ):
        assert_same_answers(pair.vllm.score(requests, spec), pair.hf.score(requests, spec))


def test_the_mask_id_among_the_text_is_text(pair: Pair) -> None:
    (request,) = comp_demo_requests([14], num_views=2, seed=3)
    ids = request.clean_ids_L.copy()
    ids[[2, 13]] = MASK_ID
    requests = [dataclasses.replace(request, clean_ids_L=ids)]
    assert_same_answers(pair.vllm.score(requests, SPEC), pair.hf.score(requests, SPEC))


def test_a_poisoned_request_is_named_and_the_others_can_go_on(pair: Pair) -> None:
    requests = comp_demo_requests([20, 12, 16], num_views=2, seed=4)
    expected = pair.hf.score([requests[0], requests[2]], SPEC)
    ids = requests[1].clean_ids_L.copy()
    ids[0] = POISON_ID
    poisoned = dataclasses.replace(requests[1], clean_ids_L=ids)
    for _ in range(3):
        with pytest.raises(
            NonFiniteLogitsError,
            match=r"request 1 \(sample-1\), stream \d, position \d+: the teacher's logits hold NaN",
        ) as caught:
            pair.vllm.score([requests[0], poisoned, requests[2]], SPEC)
        assert caught.value.request_index == 1
        # Its keys and values are left in pages that the next prompts take.
        assert_same_answers(pair.vllm.score([requests[0], requests[2]], SPEC), expected)


def test_what_the_engine_cannot_answer_is_refused(pair: Pair) -> None:
    (request,) = comp_demo_requests([8], num_views=1, seed=5)
    wrong = dataclasses.replace(request, clean_ids_L=np.full(8, VOCAB_SIZE), name="abc")
    with pytest.raises(DataError, match=r"request 0 \(abc\): token id 96 is outside the vocabul"):
        pair.vllm.score([wrong], SPEC)
    with pytest.raises(CompatibilityError, match="has 96 logits, got 97"):
        pair.vllm.score([], ScoreSpec(k=1, temperatures=(), vocab_size=97))
    (long,) = comp_demo_requests([MAX_LENGTH + 4], num_views=2, seed=6)
    with pytest.raises(DataError, match=r"\(sample-0\): 6\d tokens, the engine takes 64; raise"):
        pair.vllm.score([long], SPEC)
    transform = Transform(
        analysis_RD=np.ones((1, 32), np.float32),
        synthesis_DR=np.ones((32, 1), np.float32),
        mean_D=np.zeros(32, np.float32),
        limit_R=np.array([WIDE_MAX], np.int16),
        step=1.0,
    )
    with pytest.raises(CompatibilityError, match="'vllm' gives no hidden states"):
        pair.vllm.score([request], dataclasses.replace(SPEC, transform=transform))


def test_nothing_wanted_is_nothing_asked(pair: Pair) -> None:
    nothing = Stream(masked_L=np.zeros(4, bool), wanted_P=np.zeros(0, int))
    requests = [ScoreRequest(clean_ids_L=np.arange(4), streams=(nothing,))]
    assert_same_answers(pair.vllm.score(requests, SPEC), pair.hf.score(requests, SPEC))
