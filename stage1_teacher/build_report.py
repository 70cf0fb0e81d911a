"""What `tide-cache build` says: before (`--dry-run`) and after, as lines or one JSON object."""

from collections.abc import Mapping
from typing import Any

from stage1_teacher.build import ShardRange
from stage1_teacher.build_plan import BuildPlan, projected_bytes
from tide_cache.card import describe_fidelity, entries_count
from tide_cache.manifest import CacheManifest, Manifest, identity


def as_json(manifest: Manifest, url: str, *, num_tasks: Mapping[str, int]) -> dict[str, Any]:
    """Return the result as JSON values; `num_tasks`: how many were made, how many kept."""
    assert isinstance(manifest, CacheManifest)
    return {
        "url": url,
        "identity": identity(manifest),
        "counts": dict(manifest.counts),
        "teacher": manifest.teacher_model.model_dump(),
        "payloads": [payload.model_dump(mode="json") for payload in manifest.payloads],
        "bytes_per_entry": bytes_per_entry(manifest),
        "fidelity": [facts.model_dump(mode="json") for facts in manifest.fidelity],
        "num_tasks": dict(num_tasks),
    }


def lines(manifest: Manifest, url: str, *, num_tasks: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the result as (label, text) pairs."""
    assert isinstance(manifest, CacheManifest)
    counts = manifest.counts
    made, kept = num_tasks["made"], num_tasks["kept"]
    run = f"{made} tasks made, {kept} kept from an earlier run"
    num_entries = entries_count(manifest)
    what = "positions" if manifest.alignment == "positions" else "chunks"
    return [
        ("cache", f"{url}, identity {identity(manifest)[:12]}…"),
        ("run", run if made + kept else "nothing to do: the cache was complete already"),
        (
            "rows",
            f"{counts['num_rows']:,} in {len(manifest.shards)} shards, "
            f"{counts['size_bytes'] / 1e6:,.1f} MB",
        ),
        (
            "answers",
            f"{num_entries:,} {what} for {counts['num_masked_positions']:,} masked positions, "
            f"{bytes_per_entry(manifest)} bytes each (everything included)",
        ),
        *[("fidelity", describe_fidelity(facts)) for facts in manifest.fidelity],
        ("next", f"tide-train CONFIG.yaml --cache {url}"),
    ]


def share_facts(url: str, share: ShardRange, *, num_tasks: Mapping[str, int]) -> dict[str, Any]:
    """Return what to say of a share that is done while others are not, as JSON values."""
    return {
        "url": url,
        "shard_range": f"{share.index}/{share.count}",
        "finished": False,
        "num_tasks": dict(num_tasks),
    }


def share_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the same as (label, text) pairs."""
    made, kept = facts["num_tasks"]["made"], facts["num_tasks"]["kept"]
    return [
        ("share", f"{facts['shard_range']} of {facts['url']} is done"),
        ("run", f"{made} tasks made, {kept} kept from an earlier run"),
        (
            "next",
            f"the share that ends last writes the manifest; 'tide-cache status {facts['url']}' "
            "shows how far the others are",
        ),
    ]


def dry_run_as_json(plan: BuildPlan, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return what a build would make, as JSON values."""
    return {
        "dry_run": True,
        "num_tasks": len(plan.tasks),
        "counts": dict(counts),
        "teacher": plan.teacher_model.model_dump(),
        "payloads": payload_names(plan),
        "num_calibration_positions": _calibration_positions(plan),
        "payload_bytes_before_compression": projected_bytes(plan, counts),
    }


def dry_run_lines(plan: BuildPlan, counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return what a build would make, as (label, text) pairs."""
    teacher = plan.teacher_model
    size = projected_bytes(plan, counts)
    fitted, measured = _calibration_positions(plan)
    return [
        (
            "teacher",
            f"{teacher.name} ({teacher.family}, {teacher.dtype}, {teacher.attention} attention) on "
            f"{teacher.device}",
        ),
        ("tasks", f"{len(plan.tasks)}, {counts.get('num_rows', 0):,} rows"),
        *[("payload", name) for name in payload_names(plan)],
        ("calibrate", f"fit on {fitted:,} positions, measure on {measured:,} others"),
        (
            "size",
            "decided by calibration: 'tide-cache calibrate' projects it"
            if size is None
            else f"at most {size / 1e6:,.1f} MB before compression",
        ),
        ("written", "nothing"),
    ]


def payload_names(plan: BuildPlan) -> list[str]:
    """Return the payloads that a plan will make, as far as they are decided."""
    names = ["chunks: one log-prob each"] if plan.has_chunks else []
    if plan.calibration is not None:
        setting = plan.calibration.setting
        auto = f"auto: the smallest that reaches fidelity {plan.config.fidelity:g}"
        names.insert(0, auto if setting is None else setting.name)
    return names


def _calibration_positions(plan: BuildPlan) -> tuple[int, int]:
    if plan.calibration is None:
        return 0, 0
    return plan.calibration.fit_rows.num_positions, plan.calibration.measure_rows.num_positions


def bytes_per_entry(manifest: CacheManifest) -> float | None:
    """Return the size of the shards over the number of answers."""
    num_entries = entries_count(manifest)
    return round(manifest.counts["size_bytes"] / num_entries, 2) if num_entries else None
