"""The tables in miniature as Markdown, for the terminal and for a file."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from examples.demo.config import PipelineConfig
from examples.paper.cells import (
    ABLATIONS,
    METHODS,
    Method,
    PipelineName,
    read_cell,
)
from examples.paper.markdown import table
from examples.paper.mini_figures import SETTINGS, Setting
from examples.paper.mini_runs import AR_CELL
from stage2_student.benchmark_tasks.paper_figures import paper_row

_TABLE_1 = (SETTINGS[0], SETTINGS[-1])
_HEAD = ("student", "teacher's answers", "weight", "NLL", "KL", "exact match")
_TITLES = {
    "shared": "shared tokenizer (KL to the teacher)",
    "cross": "two tokenizers (KL of chunks to the teacher)",
}


def markdown(figures: Mapping[str, Any], pipelines: Mapping[PipelineName, PipelineConfig]) -> str:
    """Return tables 1 and 2, the orderings, every cell with every seed, and the seconds."""
    rows = {(row["cell"], row["weight"]): row for row in figures["cells"]}
    parts = ["# The paper's tables in miniature", _introduction(pipelines, rows)]
    for name in pipelines:
        parts += [f"## Table 1, {_TITLES[name]}", _table_1(name, rows, figures)]
    parts.append(_ar_note(figures))
    if "shared" in pipelines:
        parts += ["## Table 2, shared tokenizer", _table_2(rows, figures["weights"])]
    parts += ["## Orderings of the paper", _ordering_rule()]
    for figure, words in (("nll", "NLL"), ("exact_match", "exact match")):
        parts += [f"### By {words}", _orderings(figures["orderings"], figure)]
    parts += ["### In short", _in_short(figures["orderings"])]
    if figures["tried"]:
        parts += ["## Weights: NLL on validation prompts, one seed", _weights(figures)]
    parts += ["## Every cell, weight and seed", _every_cell(rows)]
    parts.append(_seconds(figures["seconds"]))
    return "\n\n".join(parts) + "\n"


def _introduction(
    pipelines: Mapping[PipelineName, PipelineConfig],
    rows: Mapping[tuple[str, float], Mapping[str, Any]],
) -> str:
    config = next(iter(pipelines.values()))
    seeds = sorted({seed for row in rows.values() for seed in row["exact_match"]["values"]})
    return (
        f"{config.data.held_out_rows:,} held-out rows masked at t = 0.5 (NLL, KL), "
        f"{config.data.prompts:,} prompts to answer; mean ± sd over seeds {', '.join(seeds)}. "
        "All students are drawn at random and see the same rows, masks and steps; BD3LM is cross "
        "entropy alone, where the paper evaluates a released model. Weights other than 1 were "
        "chosen on validation prompts, from one grid for every method."
    )


def _table_1(
    pipeline: PipelineName,
    rows: Mapping[tuple[str, float], Mapping[str, Any]],
    figures: Mapping[str, Any],
) -> str:
    weights, teacher = figures["weights"], figures["teachers"][pipeline]
    lines = []
    if (AR_CELL, 1.0) in rows and pipeline == "shared":
        lines.append([*_cells_of("AR", (AR_CELL, 1.0), rows), f"{paper_row('AR')['Avg']:.2f}"])
    lines.append(
        [
            *_cells_of("BD3LM (CE alone)", (f"{pipeline}/ce", 1.0), rows),
            f"{paper_row('BD3LM')['Avg']:.2f}",
        ]
    )
    for method in METHODS:
        if method.pipeline == pipeline:
            lines += _method_lines(method, rows, weights)
    lines.append(
        [
            "the teacher",
            "",
            "",
            f"{teacher['nll']:.3f}" if "nll" in teacher else "",
            f"{abs(teacher['kl']):.3f}" if teacher.get("kl") is not None else "",
            f"{teacher['exact_match']['all']:.3f}",
            "",
        ]
    )
    return table((*_HEAD, "paper's average"), lines)


def _published(row: str) -> str:
    return f"{paper_row(row)['Avg']:.2f}"


def _method_lines(
    method: Method,
    rows: Mapping[tuple[str, float], Mapping[str, Any]],
    weights: Mapping[str, float],
) -> list[list[str]]:
    runs = dict.fromkeys(s.run_of(method.label, method.pipeline, weights) for s in _TABLE_1)
    return [
        [*_cells_of(method.label, run, rows), _published(method.row)] for run in runs if run in rows
    ]


def _table_2(
    rows: Mapping[tuple[str, float], Mapping[str, Any]], weights: Mapping[str, float]
) -> str:
    lines = []
    for label, cell in ABLATIONS:
        for weight in dict.fromkeys((1.0, weights.get(cell, 1.0))):
            if (cell, weight) in rows:
                lines.append(_cells_of(label, (cell, weight), rows))
    return table(_HEAD, lines)


def _cells_of(
    label: str,
    run: tuple[str, float],
    rows: Mapping[tuple[str, float], Mapping[str, Any]],
) -> list[str]:
    row = rows.get(run)
    if row is None:
        return [label, "", "", "", "", ""]
    distils = run[0] != AR_CELL and read_cell(run[0]).loss is not None
    answers = {"cache": "with CompDemo", "cache-plain": "without CompDemo"}
    return [
        label,
        answers[read_cell(run[0]).cache] if distils else "none",
        f"{run[1]:g}" if distils else "",
        *(_text(row[figure]) for figure in ("nll", "kl", "exact_match")),
    ]


def _ar_note(figures: Mapping[str, Any]) -> str:
    found = [run["next_token_nll"] for run in figures["runs"] if "next_token_nll" in run]
    if not found:
        return "AR was not trained."
    return (
        f"AR's NLL of the next token, {mean(found):.3f} nats, is another quantity than that of "
        "masked tokens and therefore not in the column."
    )


def _ordering_rule() -> str:
    return (
        "Differences are paired by seed, positive where they have the paper's sign. *Appears*: in "
        "every seed, and the mean exceeds its sd; *reversed*: the same with the other sign; else "
        "*within the spread*. With three seeds this is coarse. Table 2's orderings are the claim "
        "that each component helps. AR against BD3LM has no common NLL."
    )


def _orderings(orderings: Sequence[Mapping[str, Any]], figure: str) -> str:
    lines = []
    for ordering in orderings:
        gap = "" if ordering["gap"] is None else f" (+{ordering['gap']:.2f})"
        found = [ordering["settings"][setting.name][figure] for setting in SETTINGS]
        lines.append(
            [
                f"{ordering['pipeline']}: {ordering['better']} > {ordering['worse']}{gap}",
                *(_comparison(comparison) for comparison in found),
            ]
        )
    return table(("in the paper (points)", *(setting.name for setting in SETTINGS)), lines)


def _comparison(found: Mapping[str, Any]) -> str:
    if found["num_seeds"] == 0:
        return ""
    sd = "" if found["sd"] is None else f" ± {found['sd']:.3f}"
    return (
        f"{found['verdict']}, {found['num_as_paper']}/{found['num_seeds']}, "
        f"{found['mean']:+.3f}{sd}"
    )


def _in_short(orderings: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for setting in SETTINGS:
        for figure, words in (("nll", "NLL"), ("exact_match", "exact match")):
            lines.append([setting.name, words, *_counts(orderings, setting, figure)])
    return table(("setting", "figure", "appear", "reversed", "within the spread"), lines)


def _counts(orderings: Sequence[Mapping[str, Any]], setting: Setting, figure: str) -> list[str]:
    verdicts = [ordering["settings"][setting.name][figure]["verdict"] for ordering in orderings]
    return [str(verdicts.count(v)) for v in ("appears", "reversed", "within the spread")]


def _weights(figures: Mapping[str, Any]) -> str:
    tried = figures["tried"]
    grid = list(next(iter(tried.values())))
    lines = [
        [cell, *(f"{nll:.3f}" for nll in by_weight.values()), f"{figures['weights'][cell]:g}"]
        for cell, by_weight in tried.items()
    ]
    return table(("cell", *(f"weight {weight}" for weight in grid), "chosen"), lines)


def _every_cell(rows: Mapping[tuple[str, float], Mapping[str, Any]]) -> str:
    lines = [
        [cell, f"{weight:g}", *(_seeds(row[figure]) for figure in ("nll", "kl", "exact_match"))]
        for (cell, weight), row in rows.items()
    ]
    return table(("cell", "weight", "NLL", "KL", "exact match"), lines)


def _seconds(seconds: Mapping[str, float]) -> str:
    stages = ", ".join(f"{name} {value:,.0f}" for name, value in seconds.items())
    total = sum(seconds.values())
    return f"Seconds: {stages}; {total:,.0f} in all ({total / 60:.1f} minutes)."


def _text(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    sd = "" if found["sd"] is None else f" ± {found['sd']:.3f}"
    return f"{found['mean']:.3f}{sd}"


def _seeds(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else ", ".join(f"{v:.3f}" for v in found["values"].values())
