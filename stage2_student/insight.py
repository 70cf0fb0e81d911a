"""What a step's losses look like by timestep: a figure at t = 0.1 and one at 0.9 say other things.

Sums over masked positions and chunks in float64 on the device, added up over micro-batches and
ranks, and divided once. Buckets are quarters of the timestep, named `t0.00-0.25` as in `evaluate`.

Shapes: P masked positions, Q those with candidates, C active chunks, X any of them, T buckets.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stage2_student.batches import Batch
from stage2_student.fused import Values
from stage2_student.objective_config import PAYLOAD_OF

if TYPE_CHECKING:
    from accelerate import Accelerator

NUM_BUCKETS = 4


def bucket_name(bucket: int) -> str:
    """Return the name of a bucket of timesteps."""
    return f"t{bucket / NUM_BUCKETS:.2f}-{(bucket + 1) / NUM_BUCKETS:.2f}"


def bucket_of(timestep_X: Tensor) -> Tensor:
    """Return the bucket of each timestep, int64 (X,)."""
    return (timestep_X * NUM_BUCKETS).long().clamp(0, NUM_BUCKETS - 1)


class StepInsight:
    """Adds up what the positions of one step came to.

    `nll`: of masked tokens, nats; each distillation loss, unweighted, nats; `agreement`: share of
    positions where student and teacher have the same likeliest id; `chunk_overlap`: 1 less the
    difference between the two probabilities of a chunk.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, batch: Batch, values: Values) -> None:
        """Add the positions of one micro-batch."""
        teacher, timestep_P = batch.teacher, batch.timestep_P
        self._add("nll", timestep_P, values.nll_P)
        for name, value_X in values.terms.items():
            payload = PAYLOAD_OF[name]
            if payload == "candidates":
                self._add(name, timestep_P[teacher.index_Q], value_X)
            elif payload == "chunks" and teacher.chunks is not None:
                self._add(name, teacher.chunks.timestep_C, value_X)
        if values.agrees_Q is not None and teacher.candidates is not None:
            self._add("agreement", timestep_P[teacher.index_Q], values.agrees_Q)
        if values.logprob_C is not None and teacher.chunks is not None:
            overlap_C = 1 - (values.logprob_C.exp() - teacher.chunks.logprob_C.exp()).abs()
            self._add("chunk_overlap", teacher.chunks.timestep_C, overlap_C)

    def means(self, accelerator: "Accelerator") -> dict[str, float]:
        """Return `<bucket>/<figure>` for each that has a position, and the agreement over all.

        Every rank must call it: sums are added up over ranks.
        """
        found: dict[str, float] = {}
        for name, sums_2T in self._sums.items():
            if accelerator.num_processes > 1:
                sums_2T = accelerator.reduce(sums_2T, reduction="sum")
            totals, counts = sums_2T.tolist()
            for bucket, (total, count) in enumerate(zip(totals, counts, strict=True)):
                if count:
                    found[f"{bucket_name(bucket)}/{name}"] = total / count
            if name in ("agreement", "chunk_overlap") and sum(counts):
                found[name] = sum(totals) / sum(counts)
        return found

    def _add(self, name: str, timestep_X: Tensor, value_X: Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = torch.zeros(2, NUM_BUCKETS, dtype=torch.float64, device=self._device)
        bucket_X = bucket_of(timestep_X)
        self._sums[name][0].index_add_(0, bucket_X, value_X.double())
        self._sums[name][1].index_add_(0, bucket_X, torch.ones_like(value_X, dtype=torch.float64))
