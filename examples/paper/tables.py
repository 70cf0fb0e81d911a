"""Tables 1 and 2 from the scores on disk, each beside the paper's figure where it has one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.paper.cells import ABLATIONS
from examples.paper.markdown import table
from examples.paper.steps import AR_RESULTS, TABLE_3, EvaluatedModel, Options, evaluated_models
from stage2_student.benchmark_tasks.paper_figures import SOURCE, paper_row
from stage2_student.benchmark_tasks.protocol import BENCHMARKS
from tide_cache.errors import FormatError

_PERCENT = 100.0
_TABLE_3_NOTE = (
    "Random weights of the real sizes, so the student's row is the undistilled BD3LM's as well. "
    "The paper, on an H100: student 1.4 GB, 6.25 s, 41.0 tokens/s; AR 1.2 GB, 51.3 tokens/s; "
    "WeDLM-8B 15.5 GB; LLaDA2.0-mini 31.3 GB, 32.55 s, 7.8 tokens/s."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredModel:
    """A row with what was measured of it: percent by benchmark title, missing where not run."""

    model: EvaluatedModel
    scores: Mapping[str, float]

    @property
    def average(self) -> float | None:
        """Mean over all eight benchmarks; None where one is missing."""
        whole = len(self.scores) == len(BENCHMARKS)
        return sum(self.scores.values()) / len(BENCHMARKS) if whole else None

    def as_json(self) -> dict[str, Any]:
        """Return the row as JSON values, the paper's figures beside it."""
        return {
            "label": self.model.label,
            "pipeline": self.model.pipeline,
            "model": self.model.model,
            "teacher_answers": self.model.caches or None,
            "scores": dict(self.scores),
            "average": self.average,
            "paper": paper_row(self.model.row) if self.model.row else None,
        }


def read_scores(options: Options) -> list[ScoredModel]:
    """Read the scores of every row; one that was not evaluated has none.

    Raises FormatError where a results file is not what its program writes.
    """
    return [
        ScoredModel(model=model, scores=_scores_of(model)) for model in evaluated_models(options)
    ]


def read_table_3(options: Options) -> list[dict[str, Any]] | None:
    """Return what `benchmarks.sampler --table3` measured, None where it did not run."""
    path = options.output / TABLE_3
    if not path.is_file():
        return None
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def markdown(
    scored: Sequence[ScoredModel],
    options: Options,
    table_3: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Return the tables that `options` ask for; table 3 where it was measured."""
    parts = [f"Percent; in brackets the paper's ({SOURCE}). A dash: not evaluated."]
    if 1 in options.tables:
        rows = [row for row in scored if row.model.row is not None]
        parts += ["## Table 1", _wide(rows)]
    ablations = {label for label, _ in ABLATIONS}
    if 2 in options.tables:
        rows = [r for r in scored if r.model.label in ablations or _is_full(r, options)]
        parts += ["## Table 2", _wide(rows)] if rows else []
    if 3 in options.tables and table_3 is not None:
        parts += ["## Table 3", _TABLE_3_NOTE, _third(table_3)]
    return "\n\n".join(parts) + "\n"


def _third(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ("256 tokens, batch 1", "parameters", "peak GB", "latency s", "tokens/s", "over AR")
    lines = [
        [
            row["name"],
            f"{row['parameters']:,}",
            f"{row['peak_bytes'] / 1e9:.1f}",
            f"{row['latency_s']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['ratio_to_ar']:.2f}",
        ]
        for row in rows
    ]
    return table(head, lines)


def _is_full(row: ScoredModel, options: Options) -> bool:
    """Say whether a row of table 1 is the whole method of table 2, which is evaluated once."""
    return row.model.folder == options.output / "scores" / ABLATIONS[-1][1]


def _wide(rows: Sequence[ScoredModel]) -> str:
    """Return the paper's form: a line for each benchmark, a column for each model."""
    head = ["benchmark", *(_title(row.model) for row in rows)]
    titles = [benchmark.title for benchmark in BENCHMARKS.values()]
    lines = [[title, *(_score(row, title, row.scores.get(title)) for row in rows)]
             for title in titles]  # fmt: skip
    return table(head, [*lines, ["Average", *(_score(row, "Avg", row.average) for row in rows)]])


def _title(model: EvaluatedModel) -> str:
    words = [word for word in (model.pipeline, model.caches) if word]
    return f"{model.label} ({', '.join(words)})" if words else model.label


def _score(row: ScoredModel, title: str, score: float | None) -> str:
    paper = "" if row.model.row is None else f" ({paper_row(row.model.row)[title]:.2f})"
    return f"{'-' if score is None else f'{score:.2f}'}{paper}"


def _scores_of(model: EvaluatedModel) -> dict[str, float]:
    if model.label == "AR":
        return _lm_eval_scores(model.folder)
    path = model.folder / "results.json"
    if not path.is_file():
        return {}
    values = _read(path)
    try:
        return {row["title"]: float(row["score"]) for row in values["benchmarks"]
                if not row["is_limited"]}  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: expected what tide-eval run writes, got {error!r}") from error


def _lm_eval_scores(folder: Path) -> dict[str, float]:
    """Read lm-eval's own results, which are shares of one, by the metrics of the protocol."""
    found: dict[str, float] = {}
    for path in sorted(folder.rglob(AR_RESULTS)):
        results = _read(path).get("results", {})
        for name, benchmark in BENCHMARKS.items():
            metrics = (benchmark.metric, benchmark.metric.replace("pass_at_1", "pass@1"))
            values = [results[name][m] for m in metrics if m in results.get(name, {})]
            if values:
                found[benchmark.title] = _PERCENT * float(values[0])
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
