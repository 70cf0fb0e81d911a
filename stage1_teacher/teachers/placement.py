"""Where the parts of a teacher live: one device, or its layers spread over several GPUs.

Several devices go through accelerate, which balances whole decoder layers and moves activations at
their seams. A teacher that would spill to the CPU or to disk is refused: a build that runs a
hundred times slower than planned is a mistake, not a fallback.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from tide_cache.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Devices by module name prefix; the empty prefix is the whole model."""

    by_prefix: Mapping[str, torch.device]

    @property
    def devices(self) -> frozenset[torch.device]:
        """All devices in use."""
        return frozenset(self.by_prefix.values())

    def device_of(self, name: str) -> torch.device:
        """Return the device of a module or tensor by its dotted name."""
        prefix = name
        while prefix not in self.by_prefix:
            if not prefix:
                raise ConfigError(f"device_map: no entry covers {name}")
            prefix = prefix.rpartition(".")[0]
        return self.by_prefix[prefix]


def place_model(
    model: Any,
    *,
    dtype: torch.dtype,
    device: str,
    device_map: str | Mapping[str, str] | None,
) -> Placement:
    """Decide where each part of `model` (still without storage) will live.

    Raises ConfigError where a device is not there or the model does not fit the GPUs.
    """
    if device_map is None:
        return Placement(by_prefix={"": resolve_device(device)})
    if isinstance(device_map, str):
        device_map = _balanced_map(model, dtype)
    placement = Placement(
        by_prefix={prefix: resolve_device(name) for prefix, name in device_map.items()}
    )
    for name in model.state_dict():
        placement.device_of(name)
    return placement


def spread_over_devices(model: Any, placement: Placement) -> Any:
    """Let a model that lies on several devices move activations between them."""
    if len(placement.devices) == 1:
        return model
    device_map = {prefix: str(device) for prefix, device in placement.by_prefix.items()}
    return _accelerate().dispatch_model(
        model, device_map, skip_keys=model._skip_keys_device_placement
    )


def resolve_device(name: str) -> torch.device:
    """Turn a device's name into a device that exists. Raises ConfigError."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if num_gpus else "cpu")
    try:
        device = torch.device(int(name) if name.isdecimal() and num_gpus else name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is not a device; expected cpu or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected cpu or cuda:N, got {name}")
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise ConfigError(f"device: {name} is not there: this process sees {num_gpus} GPUs")
    return device


def _balanced_map(model: Any, dtype: torch.dtype) -> dict[str, str]:
    if not torch.cuda.is_available():
        raise ConfigError("device_map: auto spreads over GPUs, but this process sees none")
    accelerate = _accelerate()
    whole = sorted(model._no_split_modules)
    memory = accelerate.utils.get_balanced_memory(model, dtype=dtype, no_split_module_classes=whole)
    device_map = accelerate.infer_auto_device_map(
        model, max_memory=memory, dtype=dtype, no_split_module_classes=whole
    )
    spilt = [prefix for prefix, device in device_map.items() if device in ("cpu", "disk")]
    if spilt:
        raise ConfigError(
            f"device_map: the teacher does not fit the {torch.cuda.device_count()} GPUs: "
            f"{spilt[0]} and {len(spilt) - 1} other modules would lie outside them"
        )
    return {prefix: f"cuda:{device}" for prefix, device in device_map.items()}


def _accelerate() -> Any:
    try:
        import accelerate
        import accelerate.utils
    except ImportError as error:
        raise ConfigError(
            "device_map needs accelerate, which is not installed", hint="pip install accelerate"
        ) from error
    return accelerate
