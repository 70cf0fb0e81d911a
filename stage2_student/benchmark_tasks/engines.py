"""The student on its device, or on several: prompts in, new tokens out, as they are finished.

Several devices are worker processes with a copy of the student each. They answer; asking, scoring
and writing stay in the first process, so that a run on eight GPUs needs no launcher, writes the
files of a run on one, and gives the same answers: at temperature 0 an answer depends on its prompt
alone.
"""

import multiprocessing
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stage2_student.sampling.settings import Generation, GenerationSettings
from tide_cache.errors import ConfigError, TideError
from tide_cache.parent_watch import exit_with_parent

if TYPE_CHECKING:
    from stage2_student.sampling.loading import LoadedStudent

Prompts = Sequence[Sequence[int]]
# (index of the prompt, what followed it), a batch at a time.
Batches = Generator[list[tuple[int, Generation]], None, None]
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Batches handed to a worker beyond the one it works on, so that it never waits.
_NUM_QUEUED = 1


class Engine(Protocol):
    """What generates for the benchmarks."""

    def generate(self, prompts: Prompts, settings: GenerationSettings, batch_size: int) -> Batches:
        """Yield (index of the prompt, what followed it), a batch at a time, in any order."""

    def close(self) -> None:
        """Let go of devices and processes."""


class LocalEngine:
    """One device, in this process. The student is loaded at the first prompt."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        self._where = (folder, device, dtype)
        self._student: LoadedStudent | None = None

    def generate(self, prompts: Prompts, settings: GenerationSettings, batch_size: int) -> Batches:
        """Yield the answers of one batch after the other, the longest prompts first."""
        if self._student is None:
            self._student = load_student_on(*self._where)
        for indices in batches(prompts, batch_size):
            chosen = [prompts[i] for i in indices]
            answers = _sample(self._student, chosen, settings)
            yield list(zip(indices, answers, strict=True))

    def close(self) -> None:
        """Let go of the weights."""
        self._student = None


class WorkerEngine:
    """One worker process a device."""

    def __init__(self, folder: Path, devices: Sequence[str], dtype: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pools = [
            ProcessPoolExecutor(
                max_workers=1,
                mp_context=context,
                initializer=_start_worker,
                initargs=(folder, device, dtype),
            )
            for device in devices
        ]

    def generate(self, prompts: Prompts, settings: GenerationSettings, batch_size: int) -> Batches:
        """Yield batches as workers finish them. Raises TideError when a worker dies."""
        left = batches(prompts, batch_size)
        running: dict[Future[list[Generation]], tuple[ProcessPoolExecutor, list[int]]] = {}

        def hand_out(pool: ProcessPoolExecutor) -> None:
            indices = next(left, None)
            if indices is not None:
                chosen = [list(prompts[i]) for i in indices]
                running[pool.submit(_sample_in_worker, chosen, settings)] = (pool, indices)

        try:
            for pool in self._pools * (1 + _NUM_QUEUED):
                hand_out(pool)
            while running:
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    pool, indices = running.pop(future)
                    answers = future.result()
                    hand_out(pool)
                    yield list(zip(indices, answers, strict=True))
        except BrokenProcessPool as error:
            raise TideError(
                "a worker process ended (its message is above; often memory ran out)",
                hint="finished answers are kept: run again, with a smaller --batch-size",
            ) from error

    def close(self) -> None:
        """End the workers; what they have not finished is dropped."""
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)


def open_engine(folder: Path, devices: Sequence[str], dtype: str) -> Engine:
    """Return what generates on `devices` ("auto": a GPU if there is one, else the CPU).

    Raises ConfigError on a device or number format that there is not, before any weight is read.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if not devices:
        raise ConfigError("device: expected at least one")
    found = [resolve_device(device) for device in devices]
    if len(found) == 1:
        return LocalEngine(folder, found[0], dtype)
    return WorkerEngine(folder, found, dtype)


def batches(prompts: Prompts, batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of prompts in batches of like lengths, the longest first.

    So memory runs out at once if it does at all, and little is padded.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, got {batch_size}")
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


def resolve_device(device: str) -> str:
    """Return a device that is there. Raises ConfigError, naming it, where it is not."""
    import torch

    hint = "for example auto, cpu, cuda:0, or cuda:0,cuda:1 for two GPUs"
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device: no such device: {device!r}", hint=hint) from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {device!r} is not there: torch sees {torch.cuda.device_count()} GPUs",
            hint=hint,
        )
    return device


def load_student_on(folder: Path, device: str, dtype: str) -> "LoadedStudent":
    """Load a student; dtype "auto" is bfloat16, on a CPU float32."""
    import torch

    from stage2_student.sampling.loading import load_for_generation

    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return load_for_generation(folder, dtype=getattr(torch, dtype), device=device)


def _sample(
    student: "LoadedStudent", prompts: Prompts, settings: GenerationSettings
) -> list[Generation]:
    from stage2_student.sampler import Sampler

    sampler = Sampler(
        student.model,
        mask_token_id=student.mask_token_id,
        eos_token_id=student.eos_token_id,
        settings=settings,
    )
    return sampler.generate(prompts, batch_size=len(prompts))


_worker_student: "LoadedStudent | None" = None


def _start_worker(folder: Path, device: str, dtype: str) -> None:
    global _worker_student
    exit_with_parent()
    _worker_student = load_student_on(folder, device, dtype)


def _sample_in_worker(prompts: list[list[int]], settings: GenerationSettings) -> list[Generation]:
    assert _worker_student is not None
    return _sample(_worker_student, prompts, settings)
