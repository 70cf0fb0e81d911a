"""Tensors that FSDP2 spreads over ranks, whole again, and the other way round.

Checkpoints hold whole tensors whoever writes them, so a run may go on with another number of ranks
and with or without sharding. Gathering is collective: every rank calls it for the same tensors in
the same order, and each tensor is whole on the device for a moment only.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_spread(model: nn.Module) -> bool:
    """Say whether the weights of a model are spread over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as one piece, on the CPU, without its graph."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor that every rank holds into a tensor that may be spread."""
    if isinstance(target, DTensor):
        on_device = source.to(target.device)
        source = distribute_tensor(
            on_device, target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(source)


def number(tensor: Tensor) -> float:
    """Return the value of a scalar that may be spread."""
    return float(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
