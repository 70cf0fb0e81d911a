"""Out of memory for real: the address space of a process is limited, and a teacher meets the limit.

The scripts run in processes of their own. They first score at a budget that fits, which also loads
all that is loaded lazily, then forbid more than a little above what they hold by then. A GPU's
allocator cannot be provoked here: its error is raised by hand, from inside a real forward.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stage1_teacher.teachers.base import ScoreRequest, Scores, ScoreSpec, Stream, TeacherConfig
from stage1_teacher.teachers.hf import HfTeacher, load_hf_teacher
from stage1_teacher.teachers.memory import TeacherMemoryError, is_out_of_memory
from tests.builders import command_environment
from tests.support import PROJECT_ROOT
from tests.teacher_checkpoints import MASK_ID, make_model, write_checkpoint

VOCAB_SIZE = 512
BIG, SMALL = 16384, 512
SPEC = ScoreSpec(k=8, temperatures=(1.0, 2.0), vocab_size=VOCAB_SIZE)
# What a process may take beyond what it holds: forwards of 16,384 tokens take 64 MiB several times.
_ROOM_MIB = 48

LIMITED = """
import json, logging, resource, sys
import numpy as np
import torch
from tests.integration import test_teacher_memory as ours
torch.set_num_threads(1)
logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(message)s")
logging.getLogger("torchao").setLevel(logging.ERROR)  # of kernels that this torch has no use for

def limit(room_mib):
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    set_limit(held + room_mib * 2**20)

def set_limit(num_bytes):
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, resource.RLIM_INFINITY))

folder, lengths, num_streams, room_mib = json.loads(sys.argv[1])
big = ours.load(folder, ours.BIG)
requests = ours.make_requests(lengths, num_streams)
big.score(ours.make_requests([64] * 8, 2), ours.SPEC)
limit(room_mib)
answers = big.score(requests, ours.SPEC)
budget = big.token_budget
set_limit(resource.RLIM_INFINITY)
"""


def load(folder: str | Path, token_budget: int, **changes: Any) -> HfTeacher:
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "block_size": 32}
    return load_hf_teacher(
        TeacherConfig(
            model=str(folder),
            mask_token_id=MASK_ID,
            token_budget=token_budget,
            **settings | changes,
        )
    )


def make_requests(lengths: list[int], num_streams: int) -> list[ScoreRequest]:
    rng = np.random.default_rng(7)
    requests = []
    for number, length in enumerate(lengths):
        masks = [rng.random(length) < 0.5 for _ in range(num_streams)]
        streams = [Stream(masked_L=mask, wanted_P=np.flatnonzero(mask)) for mask in masks]
        ids = rng.integers(0, MASK_ID, length).astype(np.int32)
        requests.append(
            ScoreRequest(clean_ids_L=ids, streams=tuple(streams), name=f"sample {number}")
        )
    return requests


def same_bytes(one: list[list[Scores]], other: list[list[Scores]]) -> bool:
    """Say whether two calls gave the same answers, bit for bit."""
    return all(
        getattr(a, field).tobytes() == getattr(b, field).tobytes()
        for streams, others in zip(one, other, strict=True)
        for a, b in zip(streams, others, strict=True)
        for field in ("topk_ids_PK", "topk_logits_PK", "logsumexp_PT", "label_logprob_P")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model(
        "qwen3",
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=1024,
        max_position_embeddings=8192,
        initializer_range=0.1,
    )
    return write_checkpoint(tmp_path_factory.mktemp("memory") / "teacher", "qwen3", model)


def run_limited(
    folder: Path, more: str, *, lengths: list[int], num_streams: int, room_mib: int = _ROOM_MIB
) -> subprocess.CompletedProcess[str]:
    arguments = json.dumps([str(folder), lengths, num_streams, room_mib])
    return subprocess.run(
        [sys.executable, "-c", LIMITED + more, arguments],
        cwd=PROJECT_ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to set the limit")


@needs_linux
def test_a_forward_that_does_not_fit_halves_the_budget_and_goes_on(folder: Path) -> None:
    done = run_limited(
        folder,
        "expected = ours.load(folder, budget).score(requests, ours.SPEC)\n"
        "print(json.dumps([budget, ours.same_bytes(answers, expected)]))",
        lengths=[128] * 50 + [90] * 5,
        num_streams=2,
    )
    assert done.returncode == 0, done.stderr
    budget, is_equal = json.loads(done.stdout)
    assert 256 <= budget < BIG
    assert is_equal, "answers are those of a teacher that began with the smaller budget"
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert "sample 0" in warnings[0]
    assert "out of memory in a forward (sequences: 46, longest: 352 tokens)" in warnings[0]
    assert "token budget 16384 -> 8096, from here on" in warnings[0]
    assert f"-> {budget}, from here on" in warnings[-1]


@needs_linux
def test_the_streams_of_one_sample_are_split_before_it_is_given_up(folder: Path) -> None:
    done = run_limited(
        folder,
        "expected = ours.load(folder, budget).score(requests, ours.SPEC)\n"
        "print(json.dumps([budget, ours.same_bytes(answers, expected)]))",
        lengths=[512],
        num_streams=8,
    )
    assert done.returncode == 0, done.stderr
    budget, is_equal = json.loads(done.stdout)
    assert budget < 9 * 512
    assert is_equal


@needs_linux
def test_a_stream_that_does_not_fit_alone_is_named_with_what_to_change(folder: Path) -> None:
    done = run_limited(folder, "", lengths=[64, 6000, 64], num_streams=2)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "TeacherMemoryError: request 1 (sample 1): out of memory: one of its streams" in last
    assert "alone takes 11,984 tokens, which cannot be cut" in last
    assert "prepare shorter samples (max_length)" in last


def test_a_gpu_out_of_memory_is_handled_alike(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = load(folder, BIG)

    def no_room_above_400(module: Any, arguments: Any, inputs: dict[str, Any]) -> None:
        if inputs["input_ids"].numel() > 400:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    teacher.model.model.register_forward_pre_hook(no_room_above_400, with_kwargs=True)
    requests = make_requests([64] * 12, 2)
    answers = teacher.score(requests, SPEC)
    # 12 sequences of 160 tokens are 1,920, whose halves are 960, 480 and 240.
    assert teacher.token_budget == 240
    assert same_bytes(answers, load(folder, teacher.token_budget).score(requests, SPEC))
    num_warnings = len(caplog.records)
    teacher.hidden_states(requests)
    assert len(caplog.records) == num_warnings, "the smaller budget stays"


def test_a_head_that_does_not_fit_takes_smaller_slices(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = load(folder, BIG)

    def no_room_above_20(module: Any, arguments: Any) -> None:
        if len(arguments[0]) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    teacher.model.lm_head.register_forward_pre_hook(no_room_above_20)
    teacher.rows_per_slice = 300
    (request,) = make_requests([120], 1)
    expected = load(folder, BIG).score([request], SPEC)
    answers = teacher.score([request], SPEC)
    assert teacher.rows_per_slice == 18
    assert teacher.token_budget == BIG, "one stream alone: no smaller forward would help"
    assert "out of memory in the output head (sequences: 1" in caplog.records[0].getMessage()
    np.testing.assert_allclose(
        answers[0][0].topk_logits_PK, expected[0][0].topk_logits_PK, rtol=1e-5, atol=1e-5
    )


def test_a_stream_that_never_fits_is_refused_and_the_teacher_lives_on(folder: Path) -> None:
    teacher = load(folder, BIG)

    def no_room_above_300(module: Any, arguments: Any, inputs: dict[str, Any]) -> None:
        if inputs["input_ids"].shape[1] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    teacher.model.model.register_forward_pre_hook(no_room_above_300, with_kwargs=True)
    requests = make_requests([64, 200, 64], 2)
    with pytest.raises(TeacherMemoryError, match=r"request 1 \(sample 1\)") as caught:
        teacher.score(requests, SPEC)
    assert caught.value.request_index == 1
    assert len(teacher.score([requests[0], requests[2]], SPEC)) == 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (
            RuntimeError("DefaultCPUAllocator: something else"),
            False,
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 bytes."), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried 1 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (MemoryError("Unable to allocate 2.00 GiB for an array"), True),
        (RuntimeError("expected scalar type Float but found Half"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_are_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_budgets_differ_by_rounding_alone(folder: Path, dtype: str, bound: float) -> None:
    """Measured: float32 1e-6 of the largest logit, bfloat16 2e-2."""
    requests = make_requests([128, 64, 96, 33], 4)
    logits = []
    for token_budget in (BIG, SMALL):
        teacher = load(folder, token_budget, dtype=dtype)
        hidden = [rows for streams in teacher.hidden_states(requests) for rows in streams]
        logits.append(torch.cat([teacher.logits(rows) for rows in hidden]))
    one, other = logits
    assert not torch.equal(one, other), "batches differ, or nothing is compared"
    assert float((one - other).abs().max()) <= bound * float(one.abs().max())
