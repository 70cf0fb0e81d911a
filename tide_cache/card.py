"""The dataset card of a set: README.md with the YAML that makes the folder a valid Hub dataset."""

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
    counts = manifest.counts
    title = "Teacher cache" if isinstance(manifest, CacheManifest) else "Premasked set"
    lines = [f"# {title}", ""]
    if isinstance(manifest, CacheManifest):
        teacher = manifest.teacher_model
        payloads = ", ".join(describe_payload(payload) for payload in manifest.payloads)
        lines += [
            f"- teacher: `{teacher.name}` ({teacher.dtype}, {teacher.attention} attention)",
            f"- payloads: {payloads}",
            *[f"- fidelity: {describe_fidelity(facts)}" for facts in manifest.fidelity],
        ]
    lines += [
        f"- student tokenizer: `{manifest.student.name}`",
        f"- {counts.get('num_samples', 0)} samples, {manifest.num_views} views each, "
        f"{counts.get('num_masked_positions', 0)} masked positions",
        "",
        "## Sources",
        "",
        *[f"- `{s.name}`: licence {s.licence or 'unknown'}" for s in manifest.sources],
        "",
        "Token ids are text: whoever holds this folder can read the conversations in it.",
    ]
    return lines
