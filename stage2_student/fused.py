"""The output head and every loss over it, a slice of masked positions at a time.

(P, V) logits are the largest tensor of a step by far (0.6 MB a position at V = 151,936), and
autograd keeps several of them. Here a slice of logits is made, turned into its own gradient in
place, multiplied into the gradients of hidden states and head, and forgotten: forward and backward
together hold one slice, whatever P is. All gradients are closed forms; that of cross entropy and of
the chunk losses is a (softmax(s) - onehot) with a the loss per nat, for the others see `distil`.
`plain` is the same in full logits and autograd, and a test holds values and gradients of every loss
together. A chunk's log-prob is a sum over its tokens, so no slice cuts a chunk.

Shapes: P masked positions, N those of a slice, R rows of an inner round, Q those with candidates,
C chunks, E positions in them, D hidden, V ids, W the teacher's ids (W <= V).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stage2_student.batches import Batch
from stage2_student.distil import Distillation
from stage2_student.losses import LossName, calm_per_chunk, mask_probability
from stage2_student.losses.ce import TIMESTEP_EPSILON
from stage2_student.objective_config import PAYLOAD_OF, ObjectiveConfig

# 128 MiB of float32, 220 positions at V = 151,936. Fewer would be slow: the gradient of the head is
# read and written once a slice.
SLICE_FLOATS = 1 << 25
# Inner rounds, so that the intermediate values of a slice stay in a processor's cache.
_ROUND_FLOATS_CPU = 1 << 20
_ROUND_FLOATS = 1 << 23


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Ranges of a batch that belong together: of P, of Q, of E and of C."""

    positions: slice
    candidates: slice
    entries: slice
    chunks: slice


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Work:
    """What the losses of one batch need besides hidden states and head.

    `shares`: what one unit of each loss's value counts in the total, its weight over its
    denominator. `wants_agreement`: whether to ask where student and teacher have the same likeliest
    id.
    """

    batch: Batch
    config: ObjectiveConfig
    shares: Mapping[LossName, float]
    slices: tuple[Slice, ...]
    progress: float
    wants_agreement: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Values:
    """What the positions of a batch came to, detached, float32.

    `nll_P` in nats at T = 1; `terms`: of each loss its value at each position or chunk, unweighted
    and undivided, in nats; `agrees_Q`: 1 where student and teacher have the same likeliest id, None
    where nobody asked; `logprob_C`: the student's log-prob of each chunk.
    """

    nll_P: Tensor
    terms: Mapping[LossName, Tensor]
    agrees_Q: Tensor | None
    logprob_C: Tensor | None


@dataclass(slots=True, eq=False)
class TableGradient:
    """Carries the gradient of a tied output head to the embedding, which is the same table.

    The head's backward puts it here instead of handing it to autograd, and the embedding's adds its
    own rows in place: one (V, D) gradient, where autograd would hold two and make a third.
    """

    value_VD: Tensor | None = None


def plan_slices(batch: Batch, vocab_size: int, slice_floats: int = SLICE_FLOATS) -> list[Slice]:
    """Cut the masked positions of a batch that lies on the CPU into slices that cut no chunk."""
    num_positions, step = batch.num_masked, max(1, slice_floats // vocab_size)
    index_Q = batch.teacher.index_Q.numpy()
    chunks = batch.teacher.chunks
    index_E = np.empty(0, np.int64) if chunks is None else chunks.index_E.numpy()
    chunk_E = np.empty(0, np.int64) if chunks is None else chunks.chunk_E.numpy()
    # Positions that go on with the chunk of the one before: no slice begins there.
    inside = set(index_E[1:][chunk_E[1:] == chunk_E[:-1]].tolist())
    edges = [0]
    while edges[-1] < num_positions:
        stop = min(edges[-1] + step, num_positions)
        while stop in inside:
            stop += 1
        edges.append(stop)
    edges_Q, edges_E = np.searchsorted(index_Q, edges), np.searchsorted(index_E, edges)
    # Chunks are numbered in the order of their positions, each has at least one.
    edges_C = np.append(chunk_E, 0 if chunks is None else len(chunks.logprob_C))[edges_E]
    ranges = [
        [slice(*pair) for pair in zip(of[:-1].tolist(), of[1:].tolist(), strict=True)]
        for of in (np.array(edges), edges_Q, edges_E, edges_C)
    ]
    return [
        Slice(positions=p, candidates=q, entries=e, chunks=c)
        for p, q, e, c in zip(*ranges, strict=True)
    ]


def fused_losses(
    hidden_PD: Tensor, head_VD: Tensor, work: Work, table: TableGradient | None = None
) -> tuple[Tensor, Values]:
    """Return the batch's weighted share of the step's loss, and the values.

    `hidden_PD` and `head_VD` floats with their graphs; the head's product runs in autocast's type,
    else in theirs, everything behind it in float32. The total is a float32 scalar; its gradients
    are computed here already and handed over by the one backward that is possible.
    """
    total, nll_P, agrees_Q, logprob_C, *values = _Fused.apply(  # type: ignore[no-untyped-call]
        hidden_PD, head_VD, work, table
    )
    return total, Values(
        nll_P=nll_P,
        terms=dict(zip(work.config.weights, values, strict=True)),
        agrees_Q=agrees_Q if work.wants_agreement else None,
        logprob_C=logprob_C if work.batch.teacher.chunks is not None else None,
    )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_PD: Tensor, head_VD: Tensor, work: Work, table: TableGradient | None
    ) -> tuple[Tensor, ...]:
        run = _Run(hidden_PD, head_VD, work, needs_input_grad=ctx.needs_input_grad)
        outputs = run.over_slices()
        ctx.gradients, ctx.table = (run.grad_PD, run.grad_VD), table
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("fused losses: a second backward, but the gradients are kept once")
        # Handed over, not kept: autograd then takes them as they are instead of copying.
        found, ctx.gradients = ctx.gradients, None
        factor = gradients[0]
        if factor.device.type != "cpu" or float(factor) != 1.0:
            found = tuple(None if g is None else g.mul_(factor) for g in found)
        grad_PD, grad_VD = found
        if ctx.table is not None:
            ctx.table.value_VD, grad_VD = grad_VD, None
        return grad_PD, grad_VD, None, None


class _Run:
    """One pass over the slices of a batch: values, and the sums of the gradients."""

    def __init__(
        self,
        hidden_PD: Tensor,
        head_VD: Tensor,
        work: Work,
        *,
        needs_input_grad: tuple[bool, ...],
    ) -> None:
        device = hidden_PD.device
        dtype = torch.promote_types(hidden_PD.dtype, head_VD.dtype)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        self.work, self.batch, self.config = work, work.batch, work.config
        self.hidden_PD, self.head_VD = hidden_PD.to(dtype), head_VD.to(dtype)
        self.needs_gradient = any(needs_input_grad[:2])
        self.grad_PD = torch.empty_like(hidden_PD) if needs_input_grad[0] else None
        # Summed over slices in float32, whatever the head is in.
        self.grad_VD = (
            torch.zeros_like(head_VD, dtype=torch.float32) if needs_input_grad[1] else None
        )
        self._head_dtype = head_VD.dtype
        floats = _ROUND_FLOATS_CPU if device.type == "cpu" else _ROUND_FLOATS
        self.round_rows = max(1, floats // len(head_VD))
        teacher = work.batch.teacher
        sizes = {
            None: work.batch.num_masked,
            "candidates": len(teacher.index_Q),
            "chunks": 0 if teacher.chunks is None else len(teacher.chunks.logprob_C),
        }

        def room(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float32, device=device)

        self.nll_P, self.agrees_Q = room(sizes[None]), room(sizes["candidates"])
        self.logprob_C = room(sizes["chunks"])
        self.values = {name: room(sizes[PAYLOAD_OF[name]]) for name in self.config.weights}
        self.weight_P = self._ce_weights()

    def over_slices(self) -> tuple[Tensor, ...]:
        """Return the total, and nll, agreement, chunk log-probs and the values of each loss."""
        for part in self.work.slices:
            self._slice(part)
        if self.grad_VD is not None:
            self.grad_VD = self.grad_VD.to(self._head_dtype)
        total = self.nll_P.new_zeros(())
        for name, value_X in self.values.items():
            total += self.work.shares[name] * value_X.sum()
        return total, self.nll_P, self.agrees_Q, self.logprob_C, *self.values.values()

    def _slice(self, part: Slice) -> None:
        hidden_ND = self.hidden_PD[part.positions]
        logits_NV = torch.mm(hidden_ND, self.head_VD.T).float()
        logsumexp_N = self._nll(part, logits_NV)
        per_nat_N = self._per_nat(part)
        distillation = self._distillation(part)
        labels_N = self.batch.labels_P[part.positions]
        index_Q, distilled_QW = None, None
        if distillation is not None and len(distillation) < len(logits_NV):
            # Some positions have no teacher: the others are done apart, in a copy.
            index_Q = self.batch.teacher.index_Q[part.candidates] - part.positions.start
            distilled_QW = logits_NV.index_select(0, index_Q)
            for rows in self._rounds(len(distilled_QW)):
                gradient_RW = distillation.rows(rows, distilled_QW[rows])
                if gradient_RW is not None:
                    distilled_QW[rows, : gradient_RW.shape[1]] = gradient_RW
            distilled_QW = distilled_QW[:, : distillation.width]
            distillation = None
        for rows in self._rounds(len(logits_NV)):
            logits_RV = logits_NV[rows]
            gradient_RW = None if distillation is None else distillation.rows(rows, logits_RV)
            if not self.needs_gradient:
                continue
            if per_nat_N is None:
                logits_RV.zero_()
            else:
                per_nat_R1 = per_nat_N[rows, None]
                logits_RV.sub_(logsumexp_N[rows, None]).exp_().mul_(per_nat_R1)
                logits_RV.scatter_add_(1, labels_N[rows, None], -per_nat_R1)
            if gradient_RW is not None:
                logits_RV[:, : gradient_RW.shape[1]] += gradient_RW
        if self.needs_gradient:
            if index_Q is not None and distilled_QW is not None:
                logits_NV[:, : distilled_QW.shape[1]].index_add_(0, index_Q, distilled_QW)
            self._into_gradients(part, logits_NV, hidden_ND)

    def _into_gradients(self, part: Slice, gradient_NV: Tensor, hidden_ND: Tensor) -> None:
        gradient_NV = gradient_NV.to(self.head_VD.dtype)
        if self.grad_PD is not None:
            self.grad_PD[part.positions] = torch.mm(gradient_NV, self.head_VD)
        if self.grad_VD is not None and gradient_NV.dtype == self.grad_VD.dtype:
            self.grad_VD.addmm_(gradient_NV.T, hidden_ND)
        elif self.grad_VD is not None:
            self.grad_VD += torch.mm(gradient_NV.T, hidden_ND)

    def _rounds(self, num_rows: int) -> Iterator[slice]:
        for start in range(0, num_rows, self.round_rows):
            yield slice(start, min(start + self.round_rows, num_rows))

    def _ce_weights(self) -> Tensor | None:
        """Return what each position's nll counts in the numerator of the cross entropy."""
        if "ce" not in self.values:
            return None
        batch = self.batch
        draws_P = batch.teacher.num_draws_P if self.config.counts_draws else None
        weight_P = 1.0 / (mask_probability(batch.timestep_P, draws_P) + TIMESTEP_EPSILON)
        if self.config.loss_norm == "sequence":
            weight_P = weight_P / batch.labelled_per_row_B.clamp_min(1)[batch.row_P]
        return weight_P

    def _nll(self, part: Slice, logits_NV: Tensor) -> Tensor:
        """Store the nll of a slice, and return the logsumexp of its logits, (N,)."""
        rounds = [torch.logsumexp(logits_NV[rows], 1) for rows in self._rounds(len(logits_NV))]
        logsumexp_N = torch.cat(rounds)
        labels_N1 = self.batch.labels_P[part.positions, None]
        nll_N = logsumexp_N - logits_NV.gather(1, labels_N1)[:, 0]
        self.nll_P[part.positions] = nll_N
        if self.weight_P is not None:
            self.values["ce"][part.positions] = nll_N * self.weight_P[part.positions]
        return logsumexp_N

    def _per_nat(self, part: Slice) -> Tensor | None:
        """Return the derivative of the total by each nll of a slice, (N,); None for all 0."""
        by_ce_N = by_chunks_N = None
        if self.weight_P is not None:
            by_ce_N = self.weight_P[part.positions] * self.work.shares["ce"]
        if self.batch.teacher.chunks is not None:
            by_chunks_N = self._chunks(part)
        if by_ce_N is None or by_chunks_N is None:
            return by_chunks_N if by_ce_N is None else by_ce_N
        return by_ce_N + by_chunks_N

    def _chunks(self, part: Slice) -> Tensor | None:
        """Store the chunk losses of a slice and return their derivative by each nll, (N,).

        By autograd: there are a few hundred chunks, and no logits are involved.
        """
        chunks = self.batch.teacher.chunks
        assert chunks is not None
        index_E = chunks.index_E[part.entries] - part.positions.start
        chunk_E = chunks.chunk_E[part.entries] - part.chunks.start
        nll_N, teacher_C = self.nll_P[part.positions], chunks.logprob_C[part.chunks]
        logprob_C = torch.zeros_like(teacher_C).index_add(0, chunk_E, -nll_N[index_E])
        self.logprob_C[part.chunks] = logprob_C
        names = [name for name in self.values if PAYLOAD_OF[name] == "chunks"]
        if not names:
            return None
        with torch.enable_grad():
            logprob_C.requires_grad_()
            total = logprob_C.new_zeros(())
            for name in names:
                value_C = calm_per_chunk(
                    logprob_C,
                    teacher_C,
                    temperature=self.config.temperature,
                    direction="reverse" if name.startswith("reverse") else "forward",
                    timestep_C=chunks.timestep_C[part.chunks],
                    progress=self.work.progress,
                    interpolation=self.config.interpolation if name.endswith("tidal") else None,
                )
                self.values[name][part.chunks] = value_C.detach()
                total = total + self.work.shares[name] * value_C.sum()
            (gradient_C,) = torch.autograd.grad(total, logprob_C)
        return torch.zeros_like(nll_N).index_add(0, index_E, -gradient_C[chunk_E])

    def _distillation(self, part: Slice) -> Distillation | None:
        here, teacher = part.candidates, self.batch.teacher
        if teacher.candidates is None or here.start == here.stop:
            return None
        names = [name for name in self.values if PAYLOAD_OF[name] == "candidates"]
        if not names and not self.work.wants_agreement:
            return None
        return Distillation(
            teacher.candidates.slice(here.start, here.stop),
            self.batch.timestep_P[teacher.index_Q[here]],
            config=self.config,
            progress=self.work.progress,
            shares={name: self.work.shares[name] for name in names},
            values={name: self.values[name][here] for name in names},
            agrees=self.agrees_Q[here] if self.work.wants_agreement else None,
            needs_gradient=self.needs_gradient,
        )
