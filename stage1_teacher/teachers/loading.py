"""Weights from safetensors into a stock transformers model, strictly and only once in memory.

The model is built without storage, the copies are planned from the files' headers (`copy_plan`),
each parameter is allocated at its final type and place, and the shards are then read one after the
other, tensor by tensor, straight into it: the peak is the weights plus one shard's mapped pages
(LLaDA2.0-mini: 33 GB, not 66). Buffers that no checkpoint holds (rotary frequencies) are computed
afresh in float32; a model of which anything is still without storage is never returned.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from stage1_teacher.teachers.checkpoint import Checkpoint
from stage1_teacher.teachers.copy_plan import Part, Shape, plan_copies
from stage1_teacher.teachers.families import Family, build_config
from stage1_teacher.teachers.placement import Placement, place_model, spread_over_devices
from tide_cache.errors import CompatibilityError, FormatError

logger = logging.getLogger(__name__)

HEAD_NAME = "lm_head.weight"


def load_model(
    checkpoint: Checkpoint,
    family: Family,
    *,
    dtype: torch.dtype,
    device: str,
    device_map: str | Mapping[str, str] | None,
    attn_implementation: str,
) -> Any:
    """Load a checkpoint into its family's stock class, ready for inference.

    Returns a transformers `*ForCausalLM` in eval mode without gradients. Raises CompatibilityError
    where weights and config do not fit, FormatError where a file is broken, ConfigError where the
    devices asked for are not there.
    """
    config = build_config(family, checkpoint)
    config.dtype = dtype
    model = build_without_storage(family.class_name, config, attn_implementation)
    tied = bool(config.tie_word_embeddings)
    sources = read_shapes(checkpoint.weight_files)
    targets = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if tied:
        targets.pop(HEAD_NAME)
    plan = plan_copies(
        {name: shape for name, shape in sources.items() if not (tied and name == HEAD_NAME)},
        targets,
        family.make_route(config),
        where=str(checkpoint.folder),
    )
    placement = place_model(model, dtype=dtype, device=device, device_map=device_map)
    allocate(model, sorted(targets), dtype, placement)
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    copy_weights(checkpoint.weight_files, plan, model.state_dict(keep_vars=True))
    if tied and HEAD_NAME in sources:
        _check_tied_head(checkpoint, model)
    rebuild_computed_buffers(model, placement)
    _choose_experts(model, placement, dtype)
    return spread_over_devices(model.eval().requires_grad_(False), placement)


def build_without_storage(class_name: str, config: Any, attn_implementation: str) -> Any:
    """Build a model whose parameters and buffers have shapes but no memory."""
    import transformers

    config._attn_implementation = attn_implementation
    with torch.device("meta"):
        return getattr(transformers, class_name)(config)


def read_shapes(weight_files: Sequence[Path]) -> dict[str, Shape]:
    """Read the names and shapes of all tensors from the files' headers. Raises FormatError."""
    shapes: dict[str, Shape] = {}
    for path in weight_files:
        with open_shard(path) as shard:
            for name in sorted(shard.keys()):
                if name in shapes:
                    raise FormatError(f"{path}: {name} stands in another file of the checkpoint")
                shapes[name] = tuple(shard.get_slice(name).get_shape())
    return shapes


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """Open a safetensors file; a truncated or foreign one is a FormatError that names it."""
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path}: not a whole safetensors file: {error}", hint="download it again"
        ) from error


def allocate(
    model: nn.Module, names: Sequence[str], dtype: torch.dtype, placement: Placement
) -> None:
    """Give the named parameters and buffers memory at their final place.

    Parameters take `dtype`; buffers keep the type their class chose (LLaDA2's routing bias is
    float32 whatever the weights are, or experts are chosen differently).
    """
    for name in names:
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        device = placement.device_of(name)
        if leaf in owner._parameters:
            empty = torch.empty(owner.get_parameter(leaf).shape, dtype=dtype, device=device)
            owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
        else:
            owner._buffers[leaf] = torch.empty_like(owner.get_buffer(leaf), device=device)


def copy_weights(
    weight_files: Sequence[Path],
    plan: Mapping[str, Sequence[Part]],
    targets: Mapping[str, torch.Tensor],
) -> None:
    """Copy every planned tensor into its places, one shard open at a time."""
    for number, path in enumerate(weight_files, start=1):
        logger.info("loading %s (%d of %d)", path.name, number, len(weight_files))
        with open_shard(path) as shard, torch.no_grad():
            for source in sorted(plan.keys() & set(shard.keys())):
                tensor: torch.Tensor = shard.get_tensor(source)
                for part in plan[source]:
                    rows = tensor if part.source_rows is None else tensor[slice(*part.source_rows)]
                    targets[part.target][part.index].copy_(rows)


def rebuild_computed_buffers(model: nn.Module, placement: Placement) -> None:
    """Compute the buffers that no checkpoint holds, in the type their class gives them."""
    for name, module in model.named_modules():
        missing = [leaf for leaf, buffer in module._buffers.items() if _is_empty(buffer)]
        if missing:
            fresh = type(module)(config=model.config)
            device = placement.device_of(name)
            for leaf in missing:
                module._buffers[leaf] = fresh.get_buffer(leaf).to(device)
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not left, f"without storage after loading: {left}"


def _is_empty(buffer: torch.Tensor | None) -> bool:
    return buffer is not None and buffer.is_meta


def _check_tied_head(checkpoint: Checkpoint, model: Any) -> None:
    """Refuse a checkpoint that declares its head tied and then brings another one."""
    weight = model.lm_head.weight
    for path in checkpoint.weight_files:
        with open_shard(path) as shard:
            if HEAD_NAME not in set(shard.keys()):
                continue
            stored = shard.get_tensor(HEAD_NAME).to(device=weight.device, dtype=weight.dtype)
            if not torch.equal(stored, weight):
                raise CompatibilityError(
                    f"{checkpoint.config_path}: tie_word_embeddings is true, but {path.name} holds "
                    f"a {HEAD_NAME} that differs from the embedding",
                    hint="set tie_word_embeddings to false in config.json to use that head",
                )


def _choose_experts(model: Any, placement: Placement, dtype: torch.dtype) -> None:
    """Choose how a mixture of experts is computed (float32 on a CPU: the loop is 1.5x faster)."""
    if getattr(model.config, "n_routed_experts", None):
        on_cpu = all(device.type == "cpu" for device in placement.devices)
        looped = on_cpu and dtype is torch.float32
        model.set_experts_implementation("eager" if looped else "grouped_mm")
