"""The part of a model card that holds numbers: the run's own, its evaluation's, benchmarks'.

What was not measured is said in the same place.
"""

from collections.abc import Sequence

from stage2_student.release.benchmark_results import Score
from stage2_student.release.training_record import TrainingRecord
from tide_cache.card import as_code, as_words

# What a line of `metrics.jsonl` counts, besides what it measures.
_COUNTS = ("step", "epoch", "view", "cache", "padding")


def figures(record: TrainingRecord | None, scores: Sequence[Score]) -> list[str]:
    """Return the lines with all figures there are."""
    lines: list[str] = []
    if record is not None and record.last_metrics:
        lines += ["", f"At step {record.steps_done:,} of training, on its batch (losses in nats):"]
        lines += ["", "| figure | value |", "|---|---|"]
        lines += [
            f"| {as_words(name)} | {value:.4g} |"
            for name, value in sorted(record.last_metrics.items())
            if name not in _COUNTS and not name.startswith("num_")
        ]
    if record is not None:
        lines += _evaluation(record)
    if scores:
        lines += ["", "Benchmarks:", "", "| task | shots | metric | value |", "|---|---|---|---|"]
        lines += [_score_row(score) for score in scores]
    return ["## Figures", *lines, ""] if lines else []


def limits(record: TrainingRecord | None, scores: Sequence[Score]) -> list[str]:
    """Return the lines that say what nobody measured."""
    missing = []
    if record is None or record.evaluation is None:
        missing.append("the likelihood of held-out text")
    if not scores:
        missing.append("answers to any benchmark")
    if record is not None and any(cache.teacher and not cache.fidelity for cache in record.caches):
        missing.append("how faithful the cache's payloads are to its teacher's full logits")
    missing.append("safety, bias, and text unlike the data")
    return ["## What was not measured", "", *[f"- {what}" for what in missing], ""]


def _evaluation(record: TrainingRecord) -> list[str]:
    evaluation, held_out = record.evaluation, record.evaluation_set
    if evaluation is None:
        return []
    on = "a held-out set"
    if held_out is not None:
        on += f" {as_code(held_out.name)} ({as_code(held_out.identity[:12])})"
    lines = ["", f"Masked tokens of {on}, in nats, by `tide-train`'s own evaluation:", ""]
    lines += [
        "| timestep | NLL | KL to the teacher | KL of chunks | positions |",
        "|---|---|---|---|---|",
    ]
    for name, part in {"all": evaluation, **evaluation.by_timestep}.items():
        shown = [
            "-" if value is None else f"{value:.4f}" for value in (part.nll, part.kl, part.chunk_kl)
        ]
        lines.append(f"| {' | '.join([as_words(name), *shown])} | {part.num_positions:,} |")
    return lines


def _score_row(score: Score) -> str:
    shots = "-" if score.num_shots is None else str(score.num_shots)
    value = f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
    return f"| {as_words(score.task)} | {shots} | {as_words(score.metric)} | {value} |"
