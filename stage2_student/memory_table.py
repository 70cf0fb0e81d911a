"""`tide-train --plan`: the memory plan of an opened run, and how it is printed."""

import math
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from stage2_student.compatibility import chosen_tail
from stage2_student.config import TrainConfig
from stage2_student.memory_plan import (
    RESERVED_BYTES,
    MemoryPlan,
    Setting,
    SettingPlan,
    model_size,
    plan_memory,
)
from stage2_student.plan import OpenRun
from tide_cache.manifest import CacheManifest, Manifest
from tide_cache.payloads.hidden import HEAD_FILE, TRANSFORM_FILE

_GIB = 1 << 30
_LONGEST = 1 << 20  # what a set says of its rows is believed up to here


def memory_plan_of(run: OpenRun, *, gpu_memory_gib: float) -> MemoryPlan:
    """Compare settings for the student, cache and micro-batch of a run on one card."""
    config, stream = run.config, run.config.stream
    attention: Literal["flex", "sdpa"] = "sdpa" if config.student.attention == "sdpa" else "flex"
    manifest = run.cache.manifest
    return plan_memory(
        model_size(run.source.model_config, num_embedding_rows=run.source.num_embedding_rows),
        Setting(
            weights=config.student.dtype,
            precision=config.precision,
            state=config.optimizer.state,
            activation_checkpointing=config.student.activation_checkpointing,
        ),
        positions_per_row=positions_per_row(manifest, run.cache.num_samples),
        micro_batch=min(stream.micro_batch_size or stream.batch_size, stream.batch_size),
        gpu_bytes=round(gpu_memory_gib * _GIB),
        attention=attention,
        teacher_head_bytes=teacher_head_bytes(manifest, config),
    )


def positions_per_row(manifest: Manifest, num_samples: int) -> int:
    """Return the longest that a row may be, or what rows have on average where no one wrote it."""
    mean = math.ceil(manifest.counts.get("num_positions", 0) / (num_samples * manifest.num_views))
    side = manifest.config.get("student")
    longest = side.get("max_length") if isinstance(side, dict) else None
    if isinstance(longest, int) and mean <= longest <= _LONGEST:
        return longest
    return max(mean, 1)


def teacher_head_bytes(manifest: Manifest, config: TrainConfig) -> int:
    """Return the bytes of the teacher's head where losses replay hidden states, else 0."""
    objective = config.objective
    replays = (
        isinstance(manifest, CacheManifest)
        and manifest.hidden is not None
        and "candidates" in objective.payloads
        and chosen_tail(manifest, objective.tail) == "hidden"
    )
    if not replays:
        return 0
    return sum(
        file.size_bytes for file in manifest.files if file.path in (HEAD_FILE, TRANSFORM_FILE)
    )


def print_memory_plan(plan: MemoryPlan, out: Console) -> None:
    """Print one line for each setting: its parts in GiB, the total by micro-batch, what fits."""
    rows = list(plan.settings[0].uses)
    table = Table(
        title=f"GiB of a step on a GPU of {plan.gpu_bytes / _GIB:g} GiB, "
        f"{plan.num_parameters:,} parameters, rows of up to {plan.positions_per_row:,} positions, "
        f"{plan.attention} attention",
        title_justify="left",
        caption=f"x{plan.micro_batch}: the rows that this config puts into one forward. act./row: "
        f"activations of one row. Totals hold {RESERVED_BYTES / _GIB:g} GiB for CUDA",
        caption_justify="left",
        box=None,
        padding=(0, 1),
    )
    table.add_column("weights, state", no_wrap=True)
    fixed = ("weights", "gradients", "state", "casts", "head", "teacher_head")
    for name in ("weights", "grad.", "state", "casts", "head", "teacher", "act./row"):
        table.add_column(name, justify="right", no_wrap=True)
    for number in rows:
        table.add_column(f"x{number}", justify="right", no_wrap=True)
    table.add_column("fits", justify="right", no_wrap=True)
    for each in plan.settings:
        one = each.uses[rows[0]]
        parts = [getattr(one, name) for name in fixed] + [one.activations // rows[0]]
        totals = [_total(use.total, plan.gpu_bytes) for use in each.uses.values()]
        fits = "-" if each.largest is None else f"x{each.largest}"
        table.add_row(_name(each), *(f"{part / _GIB:.2f}" for part in parts), *totals, fits)
    out.print(table)
    out.print(_verdict(plan), markup=False, highlight=False)


def _total(size_bytes: int, gpu_bytes: int) -> str:
    text = f"{size_bytes / _GIB:.1f}"
    return text if size_bytes <= gpu_bytes else f"[dim]{text}[/dim]"


def _name(each: SettingPlan) -> str:
    setting = each.setting
    weights = "bf16 autocast" if setting.is_autocast else setting.weights
    again = ", checkpointing" if setting.activation_checkpointing else ""
    return f"{weights}, {setting.state}{again}"


def _verdict(plan: MemoryPlan) -> str:
    rows = plan.micro_batch
    needed = f"this config, x{rows}: {plan.own.uses[rows].total / _GIB:.1f} GiB"
    if plan.chosen is plan.own:
        return f"{needed}, fits"
    if plan.chosen is not None:
        return f"{needed}, does not fit; the first that does: {_options(plan.chosen)}"
    fitting = [each for each in plan.settings if each.largest is not None]
    if not fitting:
        return f"{needed}; nothing fits: take a smaller student, shorter rows or a larger GPU"
    best = max(fitting, key=lambda each: each.largest or 0)
    return (
        f"{needed}; x{rows} fits with none, the largest is x{best.largest}: "
        f"--set stream.micro_batch_size={best.largest} {_options(best)}"
    )


def _options(each: SettingPlan) -> str:
    values: dict[str, Any] = each.setting.overrides
    return " ".join(f"--set {key}={value}" for key, value in values.items())
