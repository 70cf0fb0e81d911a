"""What a step says of itself: what a resumed run repeats to the bit, and what is measured."""

import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from stage2_student.schedules import lambda_train
from stage2_student.sharded import number
from stage2_student.stream import StepBatches, StepStream
from stage2_student.update import StepCounts, StepOutcome, Updater

if TYPE_CHECKING:
    from accelerate import Accelerator


def step_metrics(
    work: StepBatches,
    counts: StepCounts,
    outcome: StepOutcome,
    *,
    updater: Updater,
    accelerator: "Accelerator",
    several_caches: bool = False,
) -> dict[str, Any]:
    """Return what a step came to, over all ranks. Every rank must ask.

    Losses in nats, per position of the term; `t…/…` by timestep (`insight`); `padding`: the share
    of the tokens computed that are nobody's.
    """
    step, objective = work.rows.step, updater.config.objective
    values = torch.stack([share.double() for share in outcome.shares.values()])
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values, reduction="sum")
    return {
        "step": step + 1,
        "epoch": work.rows.epoch,
        "view": work.rows.view,
        **({"cache": work.rows.cache} if several_caches else {}),
        **dict(zip(outcome.shares, values.tolist(), strict=True)),
        "grad_norm": number(outcome.grad_norm),
        "learning_rate": updater.learning_rate(step),
        "lambda": lambda_train(
            updater.progress(step),
            objective.lambda_init,
            objective.lambda_max,
            objective.schedule,
        ),
        "num_masked": counts.num_masked,
        "num_candidates": counts.denominators.candidates,
        "num_chunks": counts.denominators.chunks,
        "num_tokens": counts.num_tokens,
        "num_computed": counts.num_computed,
        "padding": counts.num_filled / max(counts.num_computed, 1),
        **(outcome.insight.means(accelerator) if outcome.insight is not None else {}),
    }


class Meter:
    """Measures a run on this rank: tokens and how fast they go, waiting for data, memory."""

    def __init__(self, stream: StepStream, device: torch.device) -> None:
        self.num_tokens = 0
        self._stream, self._device = stream, device
        self._since, self._stalled_s, self._lap_s = 0, 0.0, time.monotonic()

    def add(self, num_tokens: int) -> None:
        """Count the tokens of a step, over all ranks."""
        self.num_tokens += num_tokens
        self._since += num_tokens

    def lap(self) -> dict[str, float]:
        """Return tokens per second and seconds waited for data since the last lap, peak memory.

        Memory in GB: of the GPU, or the process's where there is none.
        """
        now_s, stalled_s = time.monotonic(), self._stream.stall_s
        figures = {
            "tokens_per_s": round(self._since / max(now_s - self._lap_s, 1e-9), 1),
            "stall_s": round(stalled_s - self._stalled_s, 3),
            "peak_memory_gb": round(peak_memory_bytes(self._device) / 1e9, 3),
        }
        self._since, self._stalled_s, self._lap_s = 0, stalled_s, now_s
        return figures


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
