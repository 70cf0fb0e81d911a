"""AdamW and the learning rate of a step, which is a pure function of the step's number.

No scheduler object: a resumed run asks for the rate of its next step and has it. Matrices decay,
vectors (norms) do not. The optimiser's state goes to disk by parameter name as safetensors, so that
nothing is unpickled on the way back and the order of parameters does not matter.
"""

import math
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tide_cache.config import StrictModel
from tide_cache.errors import FormatError


class OptimizerConfig(StrictModel):
    """AdamW, clipping, and how the learning rate rises and falls."""

    learning_rate: float = Field(5e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.05, ge=0, le=1, description="share of the steps")
    final_ratio: float = Field(0.0, ge=0, le=1, description="rate at the end / learning_rate")
    weight_decay: float = Field(0.01, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(1.0, gt=0, description="null: gradients are not clipped")


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Return the rate of step `step` (from 0): linear warm-up, then the schedule."""
    num_warmup = math.ceil(config.warmup_ratio * max_steps)
    if step < num_warmup:
        return config.learning_rate * (step + 1) / num_warmup
    done = (step - num_warmup) / max(max_steps - num_warmup, 1)
    left = {
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "linear": 1 - done,
        "constant": 1.0,
    }[config.schedule]
    return config.learning_rate * (config.final_ratio + (1 - config.final_ratio) * left)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters of `model`, fused (one kernel for all)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """Write the optimiser's state, `<key>/<parameter name>` each."""
    name_of: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    tensors = {
        f"{key}/{name_of[parameter]}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    save_file(tensors, path)


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """Read what `save_optimizer` wrote. Raises FormatError when it is of another model."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: not a whole safetensors file: {error}") from error
    parameter_of = dict(model.named_parameters())
    state: dict[Tensor, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        parameter = parameter_of.get(name)
        if parameter is None or tensor.shape not in (parameter.shape, torch.Size([])):
            raise FormatError(f"{path}: {full_name} does not fit the model")
        on_device = (
            tensor if key == "step" and not parameter.is_cuda else tensor.to(parameter.device)
        )
        state.setdefault(parameter, {})[key] = on_device
    missing = [name for name, p in parameter_of.items() if p.requires_grad and p not in state]
    if tensors and missing:
        raise FormatError(f"{path}: no state for {missing[0]}")
    optimizer.state.update(state)
