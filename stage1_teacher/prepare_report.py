"""What `tide-cache prepare` says when it is done: one screen, or one JSON object."""

from collections.abc import Mapping
from typing import Any

from stage1_teacher.prepare import PreparePlan, Projection
from stage1_teacher.prepare_plan import DROP_REASONS
from stage1_teacher.published_alignment import ALIGNMENT_FAULTS
from tide_cache.manifest import Manifest, SourceFacts, identity


def as_json(manifest: Manifest, url: str, *, num_tasks: Mapping[str, int]) -> dict[str, Any]:
    """Return the result as JSON values; `num_tasks`: how many were made, how many kept."""
    return {
        "url": url,
        "identity": identity(manifest),
        "counts": dict(manifest.counts),
        "dropped": dict(manifest.dropped),
        "sources": [source.model_dump() for source in manifest.sources],
        "num_tasks": dict(num_tasks),
    }


def lines(manifest: Manifest, url: str, *, num_tasks: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the result as (label, text) pairs, one per reason for which rows were dropped."""
    counts = manifest.counts
    made, kept = num_tasks["made"], num_tasks["kept"]
    run = f"{made} tasks made, {kept} kept from an earlier run"
    out = [
        ("set", f"{url} ({manifest.alignment}), identity {identity(manifest)[:12]}…"),
        ("run", run if made + kept else "nothing to do: the set was complete already"),
        (
            "samples",
            f"{counts['num_samples']:,}, {manifest.num_views} views each, in "
            f"{len(manifest.shards)} shards, {counts['size_bytes'] / 1e6:,.1f} MB",
        ),
        *_count_lines(counts),
        *map(_source_line, manifest.sources),
        *_dropped_lines(manifest.dropped),
    ]
    return [*out, ("next", f"tide-cache build CONFIG.yaml --premasked {url} -o CACHE")]


def dry_run_as_json(plan: PreparePlan, seen: Projection) -> dict[str, Any]:
    """Return a dry run as JSON values."""
    counts = seen.record.counts
    return {
        "dry_run": True,
        "num_rows": seen.num_rows,
        "num_rows_read": seen.num_rows_read,
        "counts_of_rows_read": dict(counts),
        "dropped_of_rows_read": dict(seen.record.dropped),
        "projected_counts": {name: seen.scaled(count) for name, count in counts.items()},
        "projected_dropped": _projected_dropped(plan, seen),
        "sources": [source.model_dump() for source in plan.rows.facts],
    }


def dry_run_lines(plan: PreparePlan, seen: Projection) -> list[tuple[str, str]]:
    """Return a dry run as (label, text) pairs."""
    counts = {name: seen.scaled(count) for name, count in seen.record.counts.items()}
    num_views, num_shards = plan.config.num_views, plan.num_tasks * plan.config.num_views
    return [
        ("dry run", f"projected from the first {seen.num_rows_read:,} of {seen.num_rows:,} rows"),
        (
            "samples",
            f"{counts['num_samples']:,}, {num_views} views each, in {num_shards} shards, "
            f"{counts['size_bytes'] / 1e6:,.1f} MB",
        ),
        *_count_lines(counts),
        *map(_source_line, plan.rows.facts),
        *_dropped_lines(_projected_dropped(plan, seen)),
        ("written", "nothing"),
    ]


def _projected_dropped(plan: PreparePlan, seen: Projection) -> dict[str, int]:
    # What is dropped before encoding is known exactly.
    encoding = {reason: seen.scaled(count) for reason, count in seen.record.dropped.items()}
    return {**plan.rows.dropped, **encoding}


def _count_lines(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    payload = (
        f"{counts['num_active_chunks']:,} active chunks"
        if "num_active_chunks" in counts
        else f"{counts.get('num_payload_positions', 0):,} with a partner of the teacher's"
    )
    out = [
        (
            "positions",
            f"{counts.get('num_masked_positions', 0):,} masked of "
            f"{counts.get('num_labelled_positions', 0):,} labelled, {payload}",
        )
    ]
    told = {
        "num_truncated": "replies cut at student.max_length",
        "num_teacher_truncated": "replies cut at teacher.max_length",
        "num_prompts_ending_at_content": "replies labelled from their content on, because the "
        "template's generation prompt is no prefix of its rendering",
        "num_turns_cut": "user turns behind the last reply left out",
        "num_edge_bytes_left_out": "bytes of replies in no chunk, at an edge merged with the "
        "template",
        "num_replies_cut_before": "published replies that were cut before they came here",
        "num_prompt_lengths_corrected": "prompt_len that is not where the labels begin: the labels "
        "were followed",
        "num_rows_unverified": "published rows of other templates than those given, whose "
        "alignment could only be checked by itself",
        "num_rows_repaired": "num_rows_repaired, published rows whose alignment was put right",
        **{
            f"num_repaired_{fault}": f"of those because of {fault} ({text})"
            for fault, text in ALIGNMENT_FAULTS.items()
        },
        "num_rows_without_mask": "rows in which no position happens to be masked",
    }
    return out + [("note", f"{text}: {counts[n]:,}") for n, text in told.items() if counts.get(n)]


def _source_line(source: SourceFacts) -> tuple[str, str]:
    return (
        "source",
        f"{source.name}: {source.num_rows_taken:,} of {source.num_rows:,} rows, licence "
        f"{source.licence or 'unknown'}",
    )


def _dropped_lines(dropped: Mapping[str, int]) -> list[tuple[str, str]]:
    if not dropped:
        return [("dropped", "none")]
    return [
        ("dropped", f"{reason} {count:,}: {DROP_REASONS[reason]}")
        for reason, count in sorted(dropped.items())
    ]
