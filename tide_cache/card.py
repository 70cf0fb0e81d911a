"""The dataset card of a set: README.md with the YAML that makes the folder a valid Hub dataset."""

from typing import Any

import yaml

from tide_cache.manifest import CacheManifest, Manifest
from tide_cache.payload_facts import (
    ChunksFacts,
    FidelityFacts,
    HiddenFacts,
    PayloadFacts,
    RankedFacts,
)


def dataset_card(manifest: Manifest) -> str:
    """Return the card, a pure function of the manifest's facts (its `files` are not used)."""
    licences = sorted({source.licence or "unknown" for source in manifest.sources})
    front = {
        "tags": ["tide-cache", "diffusion-language-model", "distillation", manifest.kind],
        "license": licences[0] if len(licences) == 1 else "other",
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/*/*.parquet"}],
            }
        ],
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=True).strip(), "---", "", *_body(manifest)]
    return "\n".join(lines) + "\n"


def describe_payload(facts: PayloadFacts) -> str:
    """Return a payload in a few words."""
    if isinstance(facts, ChunksFacts):
        return f"{facts.name}: one log-prob each, codec {facts.codec} {facts.codec_version}"
    codec = f"codec {facts.codec} {facts.codec_version}"
    if isinstance(facts, HiddenFacts):
        return (
            f"{facts.name}: {facts.num_components} of {facts.hidden_size} components, replayed "
            f"over {facts.vocab_size:,} ids, {codec}"
        )
    temperatures = ", ".join(f"{t:g}" for t in facts.temperatures)
    how_many = f"k = {facts.k}"
    if isinstance(facts, RankedFacts):
        codec += f", {facts.bits} bits"
        if facts.top_p is not None:
            how_many = f"k = {facts.min_k} to {facts.k} by top-p {facts.top_p:g}"
    of = f"{how_many} of {facts.vocab_size:,} ids"
    return f"{facts.name}: {of}, temperatures {temperatures}, {codec}"


def describe_fidelity(facts: FidelityFacts) -> str:
    """Return what was measured of a payload in one line: its least faithful loss."""
    worst = facts.worst
    loss = worst.loss if worst.weight is None else f"{worst.loss} at lambda {worst.weight:g}"
    return (
        f"gradient cosine {worst.cosine:.4f} or better over {len(facts.losses)} losses (least: "
        f"{loss}, T = {worst.temperature:g}), {facts.setting}, tail {facts.tail}, against a "
        f"{facts.student} on {facts.num_positions:,} positions"
    )


def entries_count(manifest: Manifest) -> int:
    """Return how many entries each payload has: payload positions or active chunks."""
    name = "num_payload_positions" if manifest.alignment == "positions" else "num_active_chunks"
    return manifest.counts.get(name, 0)


def _body(manifest: Manifest) -> list[str]:
    is_cache = isinstance(manifest, CacheManifest)
    return [
        f"# {'Teacher cache' if is_cache else 'Premasked set'}",
        "",
        *_contents(manifest),
        *_origins(manifest),
        "",
        "## Sources",
        "",
        *[
            f"- {as_code(s.name)}: licence {as_words(s.licence or 'unknown')}, "
            f"{s.num_rows_taken:,} of {s.num_rows:,} rows taken, fingerprint "
            f"{as_code(s.fingerprint[:12])}"
            for s in manifest.sources
        ],
        "",
        "## Made by",
        "",
        *_makers(manifest),
        "",
        "## What is in it",
        "",
        "Token ids are text: whoever holds this folder can read the conversations in it.",
        "The terms of the sources go with their text, those of the teacher with its answers;",
        "whoever passes this folder on passes both on.",
    ]


def _contents(manifest: Manifest) -> list[str]:
    counts = manifest.counts
    lines = []
    if isinstance(manifest, CacheManifest):
        teacher = manifest.teacher_model
        revision = "revision not given" if teacher.revision is None else teacher.revision
        payloads = ", ".join(describe_payload(payload) for payload in manifest.payloads)
        lines += [
            f"- teacher: {as_code(teacher.name)} ({as_words(revision)}, weights "
            f"{as_code(teacher.weights_sha256[:12])}, {as_words(teacher.dtype)}, "
            f"{as_words(teacher.attention)} attention), licence "
            f"{as_words(teacher_license(manifest))}",
            f"- payloads: {payloads}",
            *[f"- fidelity: {as_words(describe_fidelity(facts))}" for facts in manifest.fidelity],
        ]
    return [
        *lines,
        f"- student tokenizer: {as_code(manifest.student.name)}",
        f"- {counts.get('num_samples', 0)} samples, {manifest.num_views} views each, "
        f"{counts.get('num_masked_positions', 0)} masked positions",
    ]


def teacher_license(manifest: CacheManifest) -> str:
    """Return the licence of the teacher's weights, as the build's config records it."""
    recorded = manifest.build_config.get("teacher")
    license = recorded.get("license") if isinstance(recorded, dict) else None
    return license if isinstance(license, str) else "not recorded (that model's own)"


def _origins(manifest: Manifest) -> list[str]:
    """What a set that was merged or is a part says of where it comes from."""
    if not manifest.origins:
        return []
    lines = ["", "## Made from", ""]
    for origin in manifest.origins:
        told = f"- {as_code(origin.identity[:12])}: {origin.num_samples:,} samples"
        if origin.num_duplicates:
            told += f", {origin.num_duplicates:,} more left out as duplicates"
        if origin.relation == "part":
            views = "all" if origin.views is None else ", ".join(map(str, origin.views))
            payloads = "all" if origin.payloads is None else ", ".join(origin.payloads)
            told += f"; this is a part of it: views {views}, payloads {as_words(payloads)}"
        lines.append(told)
    return lines


def _makers(manifest: Manifest) -> list[str]:
    """Which programs made it, and what it was made from, each line once."""
    made: list[Any] = [manifest.provenance]
    if isinstance(manifest, CacheManifest):
        made.append(manifest.build_provenance)
    for origin in manifest.origins:
        made += [origin.made.get(name) for name in ("provenance", "build_provenance")]
    lines = [_maker(facts) for facts in made if isinstance(facts, dict)]
    return list(dict.fromkeys(lines))


def _maker(facts: dict[str, Any]) -> str:
    packages = facts.get("packages")
    told = ", ".join(
        f"{name} {version}"
        for name, version in (packages.items() if isinstance(packages, dict) else ())
    )
    revision = str(facts.get("git_revision") or "unknown")[:12]
    return (
        f"- {as_code(str(facts.get('command')))}, tide-cache "
        f"{as_words(str(facts.get('tide_cache')))}, git {as_words(revision)}"
        + (f", with {as_words(told)}" if told else "")
    )


def as_code(text: str) -> str:
    """Return a name of a stranger's as code, which holds no markup."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def as_words(text: str) -> str:
    """Return a stranger's words without what Markdown or HTML would take for markup."""
    plain = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "<>[]`|*\\" else letter for letter in plain)
