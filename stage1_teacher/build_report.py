"""What `tide-cache build` says: before (`--dry-run`) and after, as lines or one JSON object."""

from collections.abc import Mapping
from typing import Any

from stage1_teacher.build_plan import BuildPlan, projected_bytes
from tide_cache.card import describe_payload, entries_count
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
        ("next", f"tide-train CONFIG.yaml --cache {url}"),
    ]


def dry_run_as_json(plan: BuildPlan, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return what a build would make, as JSON values."""
    return {
        "dry_run": True,
        "num_tasks": len(plan.tasks),
        "counts": dict(counts),
        "teacher": plan.header.teacher_model.model_dump(),
        "payloads": [payload.model_dump(mode="json") for payload in plan.header.payloads],
        "payload_bytes_before_compression": projected_bytes(plan, counts),
    }


def dry_run_lines(plan: BuildPlan, counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return what a build would make, as (label, text) pairs."""
    teacher = plan.header.teacher_model
    return [
        (
            "teacher",
            f"{teacher.name} ({teacher.family}, {teacher.dtype}, {teacher.attention} attention) on "
            f"{teacher.device}",
        ),
        ("tasks", f"{len(plan.tasks)}, {counts.get('num_rows', 0):,} rows"),
        *[("payload", describe_payload(payload)) for payload in plan.header.payloads],
        ("size", f"at most {projected_bytes(plan, counts) / 1e6:,.1f} MB before compression"),
        ("written", "nothing"),
    ]


def bytes_per_entry(manifest: CacheManifest) -> float | None:
    """Return the size of the shards over the number of answers."""
    num_entries = entries_count(manifest)
    return round(manifest.counts["size_bytes"] / num_entries, 2) if num_entries else None
