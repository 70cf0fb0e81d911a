"""Benchmark scores from a results file of `tide-eval run` or of lm-eval, for a model card.

lm-eval's files hold `results: {task: {metric: number}}`; a metric may carry its filter behind a
comma (`exact_match,strict-match`) and its standard error under `METRIC_stderr,FILTER`. Ours hold
one score per benchmark, in percent. Numbers and names alone are taken of either.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from stage2_student.benchmark_tasks.protocol import BENCHMARKS
from stage2_student.benchmark_tasks.results import FORMAT
from stage2_student.json_files import read_json_object
from tide_cache.errors import FormatError

_STDERR = "_stderr"
_SHOTS = ("n-shot", "num_fewshot")


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One figure of one task. `num_shots`: examples in the prompt, None where it is not said."""

    task: str
    metric: str
    value: float
    stderr: float | None
    num_shots: int | None


def read_results(path: Path) -> tuple[Score, ...]:
    """Read the scores of a results file.

    Raises ConfigError where it cannot be read, FormatError where it is no such file or holds no
    score.
    """
    values = read_json_object(path)
    if values.get("format") == FORMAT:
        return _scores_of_tide_eval(values, path)
    tasks = values.get("results")
    if not isinstance(tasks, dict):
        raise FormatError(
            f"{path}: results: expected an object of tasks",
            hint="name the results.json of 'tide-eval run' or of lm-eval",
        )
    shots: dict[str, Any] = next((s for k in _SHOTS if isinstance(s := values.get(k), dict)), {})
    scores = [
        score
        for task, metrics in sorted(tasks.items())
        if isinstance(metrics, dict)
        for score in _scores(task, metrics, shots.get(task))
    ]
    if not scores:
        raise FormatError(f"{path}: results: expected at least one number, got none")
    return tuple(scores)


def _scores_of_tide_eval(values: dict[str, Any], path: Path) -> tuple[Score, ...]:
    """Return one score per benchmark; where not all questions were asked, the metric says so."""
    scores = []
    try:
        for found in values["benchmarks"]:
            asked = ""
            if found["is_limited"]:
                asked = f", {int(found['num_samples'])} of {int(found['num_rows'])} questions"
            benchmark = BENCHMARKS[found["task"]]
            scores.append(
                Score(
                    task=benchmark.task,
                    metric=f"{benchmark.metric}, percent{asked}",
                    value=float(found["score"]),
                    stderr=None if found["stderr"] is None else float(found["stderr"]),
                    num_shots=benchmark.num_fewshot,
                )
            )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path}: benchmarks: not as 'tide-eval run' writes them ({error!r})",
            hint="run 'tide-eval run' again",
        ) from error
    if not scores or not all(math.isfinite(score.value) for score in scores):
        raise FormatError(f"{path}: benchmarks: expected at least one score, all finite")
    return tuple(scores)


def _scores(task: str, metrics: dict[str, Any], num_shots: Any) -> list[Score]:
    found = []
    for key, value in sorted(metrics.items()):
        name, _, filter_name = key.partition(",")
        if name.endswith(_STDERR) or not _is_number(value):
            continue
        error_key = f"{name}{_STDERR}" + (f",{filter_name}" if filter_name else "")
        stderr = metrics.get(error_key)
        found.append(
            Score(
                task=task,
                metric=name if filter_name in ("", "none") else f"{name} ({filter_name})",
                value=float(value),
                stderr=float(stderr) if _is_number(stderr) else None,
                num_shots=num_shots if isinstance(num_shots, int) else None,
            )
        )
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
