"""One optimiser step: count, forward and backward over micro-batches, clip, update.

The losses of a step are sums over all its micro-batches and ranks, divided once by counts that are
known before the first forward; so accumulation and world size change the rounding, not the loss.
accelerate brings devices, autocast and gradient exchange. The learning rate, lambda and seed are
functions of the step's number: nothing in here carries over from one step to the next but weights
and the optimiser's moments.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stage2_student.batches import Batch
from stage2_student.config import TrainConfig
from stage2_student.forward import batch_losses
from stage2_student.insight import StepInsight
from stage2_student.objective import Denominators, Losses, Objective
from stage2_student.optimizer import learning_rate, make_optimizer, set_learning_rate
from stage2_student.sharded import is_spread
from stage2_student.stream import StepBatches
from stage2_student.student import Student
from tide_cache.draws import generator
from tide_cache.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCounts:
    """Counts over all micro-batches and ranks of a step.

    `num_tokens` are the positions of its rows, `num_computed` the tokens that the student reads
    for them, `num_filled` those among them that are nobody's.
    """

    denominators: Denominators
    num_masked: int
    num_tokens: int
    num_computed: int
    num_filled: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepOutcome:
    """This rank's share of a step's losses by name, and the gradient norm, on the device.

    `insight`: what its positions came to, where somebody asked.
    """

    shares: dict[str, Tensor]
    grad_norm: Tensor
    insight: StepInsight | None


class Updater:
    """Holds a student and its optimiser on this rank's device."""

    def __init__(
        self, student: Student, config: TrainConfig, accelerator: "Accelerator", *, max_steps: int
    ) -> None:
        self.config = config
        self.max_steps = max_steps
        self.objective = Objective(config.objective)
        self._num_ids = len(student.head_VD)
        self._accelerator = accelerator
        self.optimizer = make_optimizer(student, config.optimizer)
        # The wrapped ones exchange gradients between ranks; on one rank they are thin.
        self._wrapped: nn.Module
        self._wrapped, self._stepper = accelerator.prepare(student, self.optimizer)
        self.student: Student = accelerator.unwrap_model(self._wrapped)
        # FSDP2 spreads the weights; every rank must take part in whatever reads them.
        self.is_sharded = is_spread(self.student)
        if self.is_sharded and config.optimizer.state == "8bit":
            raise ConfigError(
                "optimizer.state: 8bit under FSDP2: expected float32, since moments in blocks that "
                "are spread over ranks cannot be written whole",
                hint="set optimizer.state: float32, which FSDP2 shares out, or use DDP",
            )

    def count(self, work: StepBatches) -> StepCounts:
        """Count what the terms of a step are divided by, over all ranks."""
        each = [self.objective.denominators(batch) for batch in work.batches]
        mine = [
            sum(denominators.ce for denominators in each),
            sum(denominators.candidates for denominators in each),
            sum(denominators.chunks for denominators in each),
            sum(batch.num_masked for batch in work.batches),
            sum(batch.num_tokens for batch in work.batches),
            sum(batch.input_ids_1N.shape[1] for batch in work.batches),
            sum(batch.num_filled for batch in work.batches),
        ]
        if self._accelerator.num_processes > 1:
            tensor = torch.tensor(mine, device=self._accelerator.device)
            mine = self._accelerator.reduce(tensor, reduction="sum").tolist()
        ce, candidates, chunks, num_masked, num_tokens, num_computed, num_filled = mine
        return StepCounts(
            denominators=Denominators(ce=ce, candidates=candidates, chunks=chunks),
            num_masked=num_masked,
            num_tokens=num_tokens,
            num_computed=num_computed,
            num_filled=num_filled,
        )

    def update(
        self, work: StepBatches, counts: StepCounts, *, wants_insight: bool = False
    ) -> StepOutcome:
        """Do one update with the batches of a step."""
        insight = StepInsight(self._accelerator.device) if wants_insight else None
        step, accelerator = work.rows.step, self._accelerator
        torch.manual_seed(step_seed(self.config.seed, step, accelerator.process_index))
        set_learning_rate(self.optimizer, self.learning_rate(step))
        shares: dict[str, Tensor] = {}
        for number, batch in enumerate(work.batches, start=1):
            is_last = number == len(work.batches)
            exchange = contextlib.nullcontext() if is_last else accelerator.no_sync(self._wrapped)
            with exchange:
                losses = self._losses(batch, counts, self.progress(step), insight)
                # Ranks exchange the mean of their gradients; a step's loss is the sum of shares.
                accelerator.backward(losses.total * accelerator.num_processes)
            terms = {f"loss/{name}": term for name, term in losses.terms.items()}
            for name, share in {"loss": losses.total.detach(), **terms}.items():
                shares[name] = shares[name] + share if name in shares else share
        max_norm = self.config.optimizer.max_grad_norm
        grad_norm = accelerator.clip_grad_norm_(
            self._wrapped.parameters(), math.inf if max_norm is None else max_norm
        )
        self._stepper.step()
        self._stepper.zero_grad()
        return StepOutcome(shares=shares, grad_norm=grad_norm, insight=insight)

    def progress(self, step: int) -> float:
        """Return how much of training lies before a step, in [0, 1)."""
        return step / self.max_steps

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return learning_rate(self.config.optimizer, step, self.max_steps)

    def _losses(
        self, batch: Batch, counts: StepCounts, progress: float, insight: StepInsight | None
    ) -> Losses:
        with self._accelerator.autocast():
            found, on_device = batch_losses(
                self._wrapped,
                batch,
                self.objective,
                num_ids=self._num_ids,
                device=self._accelerator.device,
                progress=progress,
                denominators=counts.denominators,
                wants_agreement=insight is not None,
            )
        if insight is not None:
            insight.add(on_device, found.values)
        return found


def make_accelerator(config: TrainConfig) -> "Accelerator":
    """Return the accelerator of a run."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    # accelerate keeps its precision for the process; a second run may want another one.
    if PartialState._shared_state:
        AcceleratorState._reset_state(PartialState().num_processes == 1)
    return Accelerator(
        cpu=config.device == "cpu",
        mixed_precision={"float32": "no", "bf16": "bf16"}[config.precision],
    )


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of what a step draws (dropout, where a student has it)."""
    return int(generator(seed, f"step-{step}", rank, "train").integers(1 << 62))
