"""AdamW and the learning rate of a step, which is a pure function of the step's number.

No scheduler object: a resumed run asks for the rate of its next step and has it. Matrices decay,
vectors (norms) do not. Float32 weights and moments are torch's own AdamW; fewer bits of either are
`low_bits`. The optimiser's state goes to disk by parameter name as safetensors, so that nothing is
unpickled on the way back and the order of parameters does not matter.
"""

import importlib.util
import math
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stage2_student.sharded import fill, whole
from tide_cache.config import StrictModel
from tide_cache.errors import ConfigError, FormatError


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
    state: Literal["float32", "8bit"] = Field(
        "float32",
        description="of the two moments: 8 bytes a parameter, or 2.03 in 8bit (a scale for every "
        "256 values; vectors stay float32; needs torchao). With weights and gradients, a parameter "
        "takes 16 or 10.03 bytes, and 12 or 6.03 with student.dtype: bfloat16",
    )
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


def require_optimizer(config: OptimizerConfig, dtype: str) -> None:
    """Raise ConfigError where the optimiser for weights of `dtype` is not installed."""
    wanted = [] if config.state == "float32" else [f"optimizer.state: {config.state}"]
    wanted += [] if dtype == "float32" else [f"student.dtype: {dtype}"]
    if wanted and importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            f"{' and '.join(wanted)}: needs torchao, which is not installed",
            hint="pip install 'tide-cache[lowbit]'",
        )


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters of `model`.

    Torch's, fused (one kernel for all), for float32 weights and moments, else `LowBitAdamW`. Raises
    ConfigError where that is not installed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
    }
    others = {p.dtype for p in trained} - {torch.float32}
    if config.state == "float32" and not others:
        return torch.optim.AdamW(groups, **settings, fused=True)
    names = sorted(str(dtype).removeprefix("torch.") for dtype in others)
    require_optimizer(config, ", ".join(names) or "float32")
    from stage2_student.low_bits import LowBitAdamW

    return LowBitAdamW(groups, **settings, eight_bits=config.state == "8bit")


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimiser's state on the CPU, `<key>/<parameter name>` each.

    A moment in 8 bits is several tensors: `<key>.codes/<parameter name>` and so on. Of a model that
    is spread over ranks every rank must ask.
    """
    name_of: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{key}/{name_of[parameter]}": whole(value)
        for parameter, state in optimizer.state.items()
        for key, value in _stored(state).items()
    }


def save_optimizer(tensors: dict[str, Tensor], path: Path) -> None:
    """Write what `optimizer_tensors` returned."""
    save_file(tensors, path)


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """Read what `save_optimizer` wrote. Raises FormatError when it is of another model or state."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: not a whole safetensors file: {error}") from error
    if not tensors:
        return  # saved before the first update
    states: dict[Tensor, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        states[parameter] = _empty_state(optimizer, parameter)
        for key, value in _stored(states[parameter]).items():
            found = tensors.pop(f"{key}/{name}", None)
            if found is None:
                raise FormatError(f"{path}: {key}/{name} is missing")
            if (found.shape, found.dtype) != (value.shape, value.dtype):
                raise FormatError(
                    f"{path}: {key}/{name}: expected {value.dtype} {tuple(value.shape)}, got "
                    f"{found.dtype} {tuple(found.shape)}"
                )
            fill(value, found)
    if tensors:
        raise FormatError(f"{path}: {min(tensors)} does not fit the model")
    optimizer.state.update(states)


def _stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the plain tensors of a parameter's state, those inside of a wrapper by its key."""
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        if type(value) is Tensor or isinstance(value, DTensor):
            plain[key] = value
        else:
            parts, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
            plain |= {f"{key}.{part}": getattr(value, part) for part in parts}
    return plain


def _empty_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    if isinstance(optimizer, torch.optim.AdamW):
        on_gpu = parameter.device if parameter.is_cuda else None
        return {
            "step": torch.zeros((), dtype=torch.float32, device=on_gpu),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    empty: dict[str, Tensor] = optimizer.empty_state(parameter)  # type: ignore[attr-defined]
    return empty
