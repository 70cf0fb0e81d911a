"""What is minimised: cross entropy and distillation terms by name, as sums that are divided once.

A step may be spread over micro-batches and ranks that hold different numbers of positions. A mean
of their means is another loss, so every term is a sum over its positions, divided by the count of
the whole step (`Denominators`), which is known before the first forward. `fused` computes the sums
and their gradients, `plain` says what they are.

Shapes: P masked positions, D hidden, V ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from stage2_student.batches import Batch
from stage2_student.fused import Slice, TableGradient, Values, Work, fused_losses, plan_slices
from stage2_student.losses import LossName, ce_denominator
from stage2_student.objective_config import PAYLOAD_OF, ObjectiveConfig, PayloadName


@dataclass(frozen=True, kw_only=True, slots=True)
class Denominators:
    """What the terms of a step are divided by: counts over all its micro-batches and ranks."""

    ce: int
    candidates: int
    chunks: int

    def of(self, payload: PayloadName | None) -> int:
        """Return the denominator of the terms that read `payload`, at least 1."""
        counts = {None: self.ce, "candidates": self.candidates, "chunks": self.chunks}
        return max(counts[payload], 1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Losses:
    """The weighted total, a scalar with its graph, and each term unweighted and detached.

    `values` are those of the single positions and chunks.
    """

    total: Tensor
    terms: Mapping[LossName, Tensor]
    values: Values


class Objective:
    """Computes the losses of a batch from the student's hidden states at masked positions."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def denominators(self, batch: Batch) -> Denominators:
        """Return what this batch adds to the denominators of its step."""
        ce = ce_denominator(batch.labelled_per_row_B, normalization=self.config.loss_norm)
        chunks = batch.teacher.chunks
        return Denominators(
            ce=int(ce),
            candidates=len(batch.teacher.index_Q),
            chunks=0 if chunks is None else len(chunks.logprob_C),
        )

    def __call__(
        self,
        hidden_PD: Tensor,
        head_VD: Tensor,
        batch: Batch,
        denominators: Denominators,
        *,
        progress: float,
        slices: Sequence[Slice] | None = None,
        wants_agreement: bool = False,
        table: TableGradient | None = None,
    ) -> Losses:
        """Return the batch's share of the step's losses, in nats.

        `progress` is step / max_steps. The shares of a step's batches add up to its losses.
        `slices` are `plan_slices` of the batch, made here where they are not given; then the batch
        must lie on the CPU.
        """
        divisors = {name: denominators.of(PAYLOAD_OF[name]) for name in self.config.weights}
        work = Work(
            batch=batch,
            config=self.config,
            shares={name: w / divisors[name] for name, w in self.config.weights.items()},
            slices=tuple(plan_slices(batch, len(head_VD)) if slices is None else slices),
            progress=progress,
            wants_agreement=wants_agreement,
        )
        total, values = fused_losses(hidden_PD, head_VD, work, table)
        terms = {name: value.sum() / divisors[name] for name, value in values.terms.items()}
        return Losses(total=total, terms=terms, values=values)
