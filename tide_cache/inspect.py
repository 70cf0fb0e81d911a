"""What a set is, on one screen: recipe, sizes, teacher, payloads, provenance."""

from typing import Any

from tide_cache.card import describe_fidelity, describe_payload, entries_count
from tide_cache.manifest import CacheManifest, Manifest, identity


def summary(manifest: Manifest, *, url: str) -> dict[str, Any]:
    """Return the facts that a person asks for first, as JSON values."""
    counts = dict(manifest.counts)
    size_bytes = counts.get("size_bytes", 0)
    facts: dict[str, Any] = {
        "url": url,
        "kind": manifest.kind,
        "identity": identity(manifest),
        "format_version": manifest.format_version,
        "alignment": manifest.alignment,
        "num_views": manifest.num_views,
        "block_size": manifest.block_size,
        "counts": counts,
        "dropped": dict(manifest.dropped),
        "num_shards": len(manifest.shards),
        "student": manifest.student.model_dump(),
        "teacher": manifest.teacher.model_dump(),
        "noising": manifest.noising.model_dump(),
        "sources": [source.model_dump() for source in manifest.sources],
        "provenance": manifest.provenance,
        "origins": [origin.model_dump(exclude={"made"}) for origin in manifest.origins],
    }
    if isinstance(manifest, CacheManifest):
        num_entries = entries_count(manifest)
        facts |= {
            "teacher_model": manifest.teacher_model.model_dump(),
            "comp_demo": manifest.comp_demo,
            "payloads": [payload.model_dump(mode="json") for payload in manifest.payloads],
            "payload_texts": [describe_payload(payload) for payload in manifest.payloads],
            "fidelity": [facts.model_dump() for facts in manifest.fidelity],
            "fidelity_texts": [describe_fidelity(facts) for facts in manifest.fidelity],
            "premasked_sha256": manifest.premasked_sha256,
            "bytes_per_entry": round(size_bytes / num_entries, 2) if num_entries else None,
            "build_provenance": manifest.build_provenance,
        }
    return facts


def lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the summary as (label, text) pairs for a screen."""
    counts = facts["counts"]
    out = [
        ("kind", f"{facts['kind']} (format {facts['format_version']}), {facts['alignment']}"),
        ("identity", facts["identity"]),
        (
            "rows",
            f"{counts.get('num_samples', 0):,} samples x {facts['num_views']} views in "
            f"{facts['num_shards']} shards, {counts.get('size_bytes', 0) / 1e6:,.1f} MB",
        ),
        (
            "positions",
            f"{counts.get('num_masked_positions', 0):,} masked of "
            f"{counts.get('num_labelled_positions', 0):,} labelled",
        ),
        ("student", _tokenizer(facts["student"])),
        ("teacher", _tokenizer(facts["teacher"])),
        ("timesteps", _noising(facts["noising"])),
    ]
    if facts["kind"] == "cache":
        out += _cache_lines(facts)
    for source in facts["sources"]:
        licence = source["licence"] or "unknown"
        out.append(
            (
                "source",
                f"{source['name']}: {source['num_rows_taken']:,} of {source['num_rows']:,} rows, "
                f"licence {licence}",
            )
        )
    for origin in facts["origins"]:
        label = "merged from" if origin["relation"] == "merged" else "part of"
        out.append((label, f"{origin['identity']}, {origin['num_samples']:,} samples"))
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in facts["dropped"].items())
    out.append(("dropped", dropped or "none"))
    made = facts.get("build_provenance", facts["provenance"])
    out.append(
        (
            "made by",
            f"{made.get('command')} (tide-cache {made.get('tide_cache')}, git {_short(made)})",
        )
    )
    return out


def _cache_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    teacher = facts["teacher_model"]
    out = [
        (
            "teacher model",
            f"{teacher['name']} ({teacher['family']}, {teacher['dtype']}, {teacher['attention']} "
            f"attention, weights {teacher['weights_sha256'][:12]}…)",
        ),
        ("CompDemo", "two passes" if facts["comp_demo"] else "off: one pass"),
    ]
    smaller = facts["counts"].get("num_rows_at_smaller_token_budget", 0)
    if smaller:
        out.append(
            ("memory", f"{smaller:,} rows in smaller batches than configured: other rounding")
        )
    out += [("payload", text) for text in facts["payload_texts"]]
    out.append(("bytes/entry", f"{facts['bytes_per_entry']} (rows and payloads together)"))
    out += [("fidelity", text) for text in facts["fidelity_texts"] or ["not measured"]]
    return out


def _tokenizer(facts: dict[str, Any]) -> str:
    return f"{facts['name']} ({facts['vocab_size']:,} ids, {facts['sha256'][:12]}…)"


def _noising(facts: dict[str, Any]) -> str:
    if not facts["drawn"]:
        return "masks from outside"
    return (
        f"{facts['num_timesteps']} in [{facts['t_min']:g}, {facts['t_max']:g}), demo ratio "
        f"{facts['demo_ratio']:g}, seed {facts['seed']}"
    )


def _short(made: dict[str, Any]) -> str:
    return str(made.get("git_revision") or "unknown")[:12]
