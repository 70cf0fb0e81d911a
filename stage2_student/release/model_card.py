"""The model card of a student: README.md, made of its training record and nothing else.

What a run did not record is said to be missing and never filled in; licences are those that the
cache and the initial weights' own card name. Names come from other people's files, so they are
written as code or with their markup escaped.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from stage2_student.release.benchmark_results import Score
from stage2_student.release.card_figures import figures, limits
from stage2_student.release.training_record import SetRecord, TrainingRecord
from stage2_student.student_source import RANDOM
from tide_cache.card import as_code, as_words

CARD = "README.md"
_DATASET = "hf://datasets/"
_UNKNOWN = "unknown"
# Identifiers that the hub takes for `license`; anything else has to be called "other" there.
# fmt: off
_HUB_LICENCES = frozenset(
    (
        "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-3.0", "cc-by-4.0",
        "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "odc-by", "odbl", "pddl",
        "openrail", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "llama3", "llama3.1", "llama3.2",
        "llama3.3", "gemma", "unlicense"
    )
)
# fmt: on


def model_card(
    record: TrainingRecord | None,
    *,
    load_from: str,
    dtype: str,
    block_size: int | None,
    mask_token_id: int | None,
    has_tokenizer: bool = True,
    scores: Sequence[Score] = (),
) -> str:
    """Return the card of a student; `load_from` is the name by which its readers load it."""
    front = yaml.safe_dump(_front(record), sort_keys=True, allow_unicode=True).strip()
    blocks = "not recorded" if block_size is None else f"{block_size} tokens"
    mask = "the tokenizer's" if mask_token_id is None else str(mask_token_id)
    loading = [
        *_loading(load_from, has_tokenizer=has_tokenizer),
        f"- weights: {as_words(dtype)}, safetensors; block size: {blocks}; mask token id: {mask}",
        "- logits stand at the position that they predict (no shift)",
        "- every position sees all others unless `attention_mask` says otherwise: (rows, keys)",
        "  hides padding, (rows or 1, 1, queries, keys) is taken as it is; block diffusion lets",
        "  each position see its own block and those before",
        "",
    ]
    if record is None:
        parts = [
            *("# Block-diffusion student", ""),
            *loading,
            "Nothing was recorded of how this student was trained, on what, or under which",
            "licences.",
            "",
            *figures(None, scores),
            *limits(None, scores),
        ]
    else:
        parts = [
            *_title(record),
            *loading,
            *_origins(record),
            *_training(record),
            *figures(record, scores),
            *_again(record),
            *limits(record, scores),
            *_makers(record),
        ]
    return "\n".join(["---", front, "---", "", *parts]).rstrip() + "\n"


def write_card(
    folder: Path,
    record: TrainingRecord | None,
    *,
    load_from: str | None = None,
    scores: Sequence[Score] = (),
) -> None:
    """Write the card of a released student beside its `config.json`.

    `load_from` defaults to the folder's name.
    """
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    card = model_card(
        record,
        load_from=load_from or folder.name,
        dtype=values["dtype"],
        block_size=values["block_size"],
        mask_token_id=values["mask_token_id"],
        has_tokenizer=(folder / "tokenizer.json").is_file(),
        scores=scores,
    )
    (folder / CARD).write_text(card, encoding="utf-8")


def licences(record: TrainingRecord) -> dict[str, str]:
    """Return the licence of everything the student was made of, by what it is of."""
    found = {}
    if record.student.init != RANDOM:
        found[f"initial weights {record.student.init}"] = record.student.licence or _UNKNOWN
    for cache in record.caches:
        if cache.teacher is not None:
            found[f"teacher {cache.teacher.name}"] = cache.teacher.licence
        for source in cache.sources:
            found[f"data {source.name}"] = source.licence or _UNKNOWN
    return found


def _front(record: TrainingRecord | None) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["block-diffusion", "custom_code", "diffusion-language-model", "tide-cache"],
    }
    if record is None:
        return front
    if any(cache.teacher is not None for cache in record.caches):
        front["tags"] = sorted([*front["tags"], "distillation"])
    found = {licence.lower() for licence in licences(record).values()}
    if len(found) == 1 and found <= _HUB_LICENCES:
        front["license"] = found.pop()
    else:
        front |= {"license": "other", "license_name": "those-of-its-sources"}
    if record.student.is_hub_name:
        front |= {"base_model": record.student.init, "base_model_relation": "finetune"}
    places = [c.name.removeprefix(_DATASET) for c in record.caches if c.name.startswith(_DATASET)]
    datasets = ["/".join(place.split("/")[:2]).partition("@")[0] for place in places]
    if datasets:
        front["datasets"] = datasets
    return front


def _title(record: TrainingRecord | None) -> list[str]:
    if record is None:
        return ["# Block-diffusion student", ""]
    start, done = record.student, record.steps_done
    how_far = f"{done:,} steps" if done == record.max_steps else f"step {done:,}"
    if done != record.max_steps:
        how_far += f" of {record.max_steps:,} (a checkpoint, not the end of the run)"
    begun = "from random weights" if start.init == RANDOM else f"from {as_code(start.init)}"
    if start.revision is not None:
        begun += f" at revision {as_code(start.revision)}"
    return [
        "# Block-diffusion student",
        "",
        f"A Qwen3 of {start.num_parameters:,} parameters that writes by block diffusion, trained "
        f"{begun} with `tide-train`: {how_far}.",
        "",
    ]


def _loading(load_from: str, *, has_tokenizer: bool) -> list[str]:
    name = "".join(letter for letter in load_from if letter not in '"\\`\n')
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)"
    return [
        "## Loading it",
        "",
        "```python",
        f"from transformers import AutoModelForMaskedLM{', AutoTokenizer' * has_tokenizer}",
        "",
        f'name = "{name}"',
        *[tokenizer for _ in range(has_tokenizer)],
        "model = AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=True)",
        "```",
        "",
        "transformers 4.57 or 5.x. `trust_remote_code=True` runs `modeling_a2d_qwen3.py` of this",
        "folder: Qwen3 without its causal mask, short enough to be read before. Without that",
        "trust, the weights load into the stock `Qwen3ForCausalLM`, to be given explicit masks.",
        "",
    ]


def _origins(record: TrainingRecord) -> list[str]:
    lines = ["## Teacher and data", ""]
    if len(record.caches) > 1:
        lines += [f"Several sets, together {as_code(record.identity)}.", ""]
    for cache in record.caches:
        lines += _describe_set(cache)
    lines += ["", "Licences, as recorded:", ""]
    lines += [f"- {as_words(what)}: {as_words(of)}" for what, of in licences(record).items()]
    return [
        *lines,
        "",
        "Whether a student inherits the terms of its teacher and data is not decided here.",
        "",
    ]


def _describe_set(cache: SetRecord) -> list[str]:
    kind = "teacher cache" if cache.kind == "cache" else "premasked set"
    lines = [
        f"- {kind} {as_code(cache.name)}, identity (sha256 of its manifest) "
        f"{as_code(cache.identity)}, format {cache.format_version}: {cache.num_samples:,} samples, "
        f"{cache.num_views} views each, {cache.num_masked_positions:,} masked positions, blocks of "
        f"{cache.block_size}"
    ]
    if cache.teacher is not None:
        teacher = cache.teacher
        revision = "revision not given" if teacher.revision is None else teacher.revision
        halves = ", complementary halves (CompDemo)" if cache.comp_demo else ""
        lines.append(
            f"  - teacher {as_code(teacher.name)} ({as_words(revision)}, weights "
            f"{as_code(teacher.weights_sha256[:12])}, {as_words(teacher.dtype)}, "
            f"{as_words(teacher.attention)} attention, {as_words(teacher.backend)}){halves}"
        )
    lines += [f"  - payload {as_words(payload)}" for payload in cache.payloads]
    lines += [f"  - fidelity: {as_words(fidelity)}" for fidelity in cache.fidelity]
    lines += [
        f"  - data {as_code(source.name)}: {source.num_rows_taken:,} of {source.num_rows:,} rows, "
        f"fingerprint {as_code(source.fingerprint[:12])}"
        for source in cache.sources
    ]
    return lines


def _training(record: TrainingRecord) -> list[str]:
    config, objective, optimizer = record.config, record.config.objective, record.config.optimizer
    losses = ", ".join(f"{weight:g} x {name}" for name, weight in objective.weights.items())
    return [
        "## Training",
        "",
        f"- losses: {losses}; cross entropy per {objective.loss_norm}, mask weight "
        f"{objective.mask_weight}; distillation at temperature {objective.temperature:g}, tail "
        f"{objective.tail}",
        f"- lambda from {objective.lambda_init:g} to {objective.lambda_max:g}, "
        f"{objective.schedule}, axis {objective.axis}, timestep weight "
        f"{objective.timestep_weight}",
        f"- AdamW with {optimizer.state} moments: learning rate {optimizer.learning_rate:g}, "
        f"{optimizer.schedule}, warm-up {optimizer.warmup_ratio:g} of the steps, weight decay "
        f"{optimizer.weight_decay:g}, betas {optimizer.beta1:g} and {optimizer.beta2:g}",
        f"- {record.steps_done:,} steps of {config.stream.batch_size:,} rows, {record.epochs:g} "
        f"epochs, ranks: {record.num_ranks}, seed: {config.seed}",
        f"- precision {config.precision}, weights {config.student.dtype}",
        "",
    ]


def _again(record: TrainingRecord) -> list[str]:
    places = " ".join(f"--cache {as_code(cache.name)[1:-1]}" for cache in record.caches)
    config = yaml.safe_dump(
        record.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True
    )
    return [
        "## Training it again",
        "",
        "```",
        f"tide-train config.yaml {places}",
        "```",
        "",
        "with this `config.yaml`; of folders on the machine it ran on, the last names alone are",
        "kept:",
        "",
        "```yaml",
        *config.replace("```", "'''").strip().splitlines(),
        "```",
        "",
    ]


def _makers(record: TrainingRecord) -> list[str]:
    made = record.provenance
    packages = ", ".join(f"{name} {version}" for name, version in made.packages.items())
    return [
        "## Made with",
        "",
        f"tide-cache {as_words(made.tide_cache)}, git {as_words(made.git_revision or 'unknown')}, "
        f"Python {as_words(made.python)}, {as_words(packages)}.",
    ]
