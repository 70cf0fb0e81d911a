"""A loss over (P, V) logits, a slice of positions at a time, forward and backward.

A term of the objective needs several times the size of its logits for what autograd keeps. Here
each slice is differentiated at once and only its gradient stays, in the type of the logits: the
temporaries (the teacher's full distribution among them) are bounded by the slice, whatever P is.

Shapes: P positions, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

SliceLoss = Callable[[Tensor, int, int], Tensor]
# 64 MiB of float32: 110 positions at V = 151,936.
SLICE_FLOATS = 1 << 24


def summed_in_slices(
    logits_PV: Tensor, loss: SliceLoss, *, slice_floats: int = SLICE_FLOATS
) -> Tensor:
    """Return the sum of `loss(logits_PV[a:b], a, b)` over slices, with the gradient of `logits_PV`.

    `loss` returns a scalar that depends on no other tensor that needs a gradient.
    """
    step = max(1, slice_floats // max(logits_PV.shape[1], 1))
    total: Tensor = _SummedInSlices.apply(logits_PV, loss, step)  # type: ignore[no-untyped-call]
    return total


class _SummedInSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_PV: Tensor, loss: SliceLoss, step: int) -> Tensor:
        total = torch.zeros((), device=logits_PV.device)
        needs_gradient = logits_PV.requires_grad
        gradient_PV = torch.empty_like(logits_PV) if needs_gradient else None
        for start in range(0, len(logits_PV), step):
            stop = min(start + step, len(logits_PV))
            part_PV = logits_PV[start:stop].detach()
            if gradient_PV is None:
                total += loss(part_PV, start, stop).detach()
                continue
            with torch.enable_grad():
                value = loss(part_PV.requires_grad_(), start, stop)
                (gradient_PV[start:stop],) = torch.autograd.grad(value, part_PV)
            total += value.detach()
        ctx.save_for_backward(*([] if gradient_PV is None else [gradient_PV]))
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Any) -> tuple[Tensor, None, None]:
        (gradient_PV,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient_PV * gradients[0].to(gradient_PV.dtype), None, None
