"""What `tide-cache plan` says: lines for people or one JSON object; every assumption is named."""

import dataclasses
from typing import Any

from stage1_teacher.plan_cost import CostPlan, Operations
from stage1_teacher.token_count import TokenCount


def as_json(plan: CostPlan) -> dict[str, Any]:
    """Return the whole plan as JSON values; bytes and operations are plain numbers."""
    tokens, model, machine = plan.tokens, plan.model, plan.machine
    configured, separate = (
        count.times(plan.factor) for count in (tokens.configured, tokens.separate)
    )
    hours = plan.gpu_hours(plan.operations)
    return {
        "premasked": plan.premasked_url,
        "num_samples_of_set": plan.num_samples_of_set,
        "counts": {
            "num_samples": plan.num_samples,
            "num_views": plan.num_views,
            "num_rows": plan.num_samples * plan.num_views,
            "num_masked_positions": plan.num_masked_positions,
            "num_payload_entries": plan.num_payload_entries,
        },
        "tokens": {
            "is_exact": tokens.is_exact and plan.factor == 1,
            "num_samples_read": tokens.num_read,
            "relative_error": tokens.relative_error,
            "passes": plan.config.teacher.passes,
            "token_budget": plan.config.teacher.token_budget,
            "configured": _count_json(configured),
            "separate": _count_json(separate),
            "calibration": _count_json(tokens.calibration),
            "separate_over_configured": _ratio(separate.num_computed, configured.num_computed),
        },
        "teacher": {
            "model": plan.config.teacher.model,
            "family": plan.family,
            "layout": plan.layout,
            "dtype": plan.config.teacher.dtype,
            "num_parameters": model.num_parameters,
            "num_active_parameters": model.num_active,
            "weights_bytes": plan.weights_bytes,
            "flops_per_token_with_head": 2 * model.num_active,
        },
        "flops": {
            **_operations_json(plan.operations),
            "separate": _operations_json(plan.separate_operations),
        },
        "gpu": {
            **dataclasses.asdict(machine.gpu),
            "assumed_mfu": machine.mfu,
            "num_gpus_for_weights": plan.num_gpus,
            "gpu_hours": hours,
            "gpu_hours_separate": plan.gpu_hours(plan.separate_operations),
            "usd_per_gpu_hour": machine.usd_per_gpu_hour,
            "usd": _usd(plan, hours),
        },
        "row_bytes": round(plan.row_bytes),
        "payloads": [
            {
                **dataclasses.asdict(payload),
                "cache_bytes": [round(size) for size in plan.cache_bytes(payload)],
            }
            for payload in plan.payloads
        ],
    }


def lines(plan: CostPlan) -> list[tuple[str, str]]:
    """Return the plan as (label, text) pairs."""
    what = "payload positions" if plan.alignment == "positions" else "chunks"
    projected = (
        "" if plan.factor == 1 else f", projected from the set's {plan.num_samples_of_set:,}"
    )
    return [
        (
            "set",
            f"{plan.num_samples:,} samples x {plan.num_views} views = "
            f"{plan.num_samples * plan.num_views:,} rows{projected}; "
            f"{plan.num_masked_positions:,} masked positions, {plan.num_payload_entries:,} {what}",
        ),
        ("teacher", _teacher_line(plan)),
        *[("tokens", text) for text in _token_lines(plan)],
        ("flops", _operations_line(plan.operations)),
        ("memory", _memory_line(plan)),
        ("time", _time_line(plan)),
        ("rows", f"{_gigabytes(plan.row_bytes)} GB, whatever the payload"),
        *[("cache", text) for text in _payload_lines(plan)],
        *[("bytes", source) for source in dict.fromkeys(p.source for p in plan.payloads)],
        ("next", _next_line(plan)),
    ]


def _teacher_line(plan: CostPlan) -> str:
    teacher, model = plan.config.teacher, plan.model
    return (
        f"{teacher.model} ({plan.family}, {teacher.dtype}, {plan.layout}): "
        f"{model.num_parameters / 1e9:.2f}e9 parameters, {model.num_active / 1e9:.2f}e9 active "
        f"= {2 * model.num_active / 1e9:.2g} GFLOP a scored token"
    )


def _token_lines(plan: CostPlan) -> list[str]:
    tokens = plan.tokens
    configured = tokens.configured.times(plan.factor)
    separate = tokens.separate.times(plan.factor)
    found = [
        f"{_count(configured.num_computed)} in {_count(configured.num_forwards)} forwards "
        f"(passes {plan.config.teacher.passes}, budget {plan.config.teacher.token_budget:,}), "
        f"{configured.padding_share:.1%} of them padding, longest sequence {configured.longest:,}"
    ]
    if plan.config.teacher.passes == "shared":
        ratio = _ratio(separate.num_computed, configured.num_computed)
        flops = _ratio(plan.separate_operations.total, plan.operations.total)
        found.append(
            f"plain separate passes: {_count(separate.num_computed)}, {ratio:.2f} times as many, "
            f"{flops:.2f} times the operations"
        )
    if tokens.is_exact:
        found.append("counted on every row of the set")
    else:
        error = tokens.relative_error
        spread = "" if error is None else f", standard error {error:.1%}"
        found.append(
            f"estimated: {tokens.num_read:,} of {tokens.num_samples:,} samples were read{spread}"
        )
    if tokens.calibration.num_computed:
        found.append(f"and {_count(tokens.calibration.num_computed)} to calibrate, once")
    return found


def _operations_line(operations: Operations) -> str:
    return (
        f"{operations.total:.3g}: body {_share(operations.body, operations)}, attention "
        f"{_share(operations.attention, operations)} (all pairs of a sequence, masked ones too), "
        f"output head on scored positions {_share(operations.head, operations)}"
    )


def _memory_line(plan: CostPlan) -> str:
    gpu = plan.machine.gpu
    weights = f"{plan.weights_bytes / 1e9:,.1f} GB of weights in {plan.config.teacher.dtype}"
    if plan.num_gpus == 1:
        left = gpu.memory_bytes - plan.weights_bytes
        return f"{weights} fit one {gpu.name}, {left / 1e9:,.1f} GB left for activations"
    return (
        f"{weights} do not fit one {gpu.name} ({gpu.memory_bytes / 1e9:,.0f} GB): spread them over "
        f"{plan.num_gpus} with teacher.device_map: auto; layers then take turns"
    )


def _time_line(plan: CostPlan) -> str:
    machine = plan.machine
    hours = plan.gpu_hours(plan.operations)
    if hours is None:
        return "not projected: peaks are of bfloat16; set teacher.dtype: bfloat16"
    usd = _usd(plan, hours)
    price = "" if usd is None else f", {usd:,.2f} USD at {machine.usd_per_gpu_hour:g} an hour"
    return (
        f"{_hours(hours)} GPU-hours of {machine.gpu.name}{price}, assuming {machine.mfu:.0%} of "
        f"its {machine.gpu.peak_flops / 1e12:,.0f} TFLOP/s (--mfu; not measured)"
    )


def _payload_lines(plan: CostPlan) -> list[str]:
    found = []
    for payload in plan.payloads:
        low, high = plan.cache_bytes(payload)
        mark = ", as configured" if payload.is_configured else ""
        if payload.low_bytes == payload.high_bytes:
            size, each = _gigabytes(low), f"{payload.low_bytes:.1f}"
        else:
            size = f"{_gigabytes(low)} to {_gigabytes(high)}"
            each = f"{payload.low_bytes:.3g} to {payload.high_bytes:.3g}"
        found.append(f"{size} GB with {payload.name}, {each} bytes each{mark}")
    if plan.config.payload == "auto":
        found.append(f"payload: auto takes the smallest that reaches {plan.config.fidelity:g}")
    return found


def _next_line(plan: CostPlan) -> str:
    if plan.alignment != "positions" or plan.payloads[0].source.startswith("measured"):
        return f"tide-cache build CONFIG.yaml -p {plan.premasked_url} -o DIR"
    return (
        f"tide-cache calibrate CONFIG.yaml -p {plan.premasked_url} --json > FILE measures these "
        "bytes; then plan --calibration FILE"
    )


def _count_json(count: TokenCount) -> dict[str, Any]:
    return {
        "num_tokens": round(count.num_tokens),
        "num_computed": round(count.num_computed),
        "padding_share": round(count.padding_share, 5),
        "num_pairs": round(count.num_pairs),
        "num_scored": round(count.num_scored),
        "num_forwards": round(count.num_forwards),
        "longest_sequence": count.longest,
    }


def _operations_json(operations: Operations) -> dict[str, float]:
    return {**dataclasses.asdict(operations), "total": operations.total}


def _usd(plan: CostPlan, hours: float | None) -> float | None:
    price = plan.machine.usd_per_gpu_hour
    return None if price is None or hours is None else hours * price


def _ratio(other: float, ours: float) -> float:
    return round(other / ours, 4) if ours else 1.0


def _share(part: float, operations: Operations) -> str:
    return f"{part / operations.total:.1%}" if operations.total else "0%"


def _count(value: float) -> str:
    """Write a count so that its first digits can be read."""
    for size, letter in ((1e12, "e12"), (1e9, "e9"), (1e6, "e6")):
        if value >= size:
            return f"{value / size:.2f}{letter}"
    return f"{value:,.0f}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def _gigabytes(size_bytes: float) -> str:
    gigabytes = size_bytes / 1e9
    return f"{gigabytes:,.0f}" if gigabytes >= 100 else f"{gigabytes:.3g}"
