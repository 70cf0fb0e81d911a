"""Benchmark scores from a results file: JSON with `results: {task: {metric: number}}`.

lm-eval writes such files. Numbers and names alone are taken. A metric may carry its filter behind a
comma (`exact_match,strict-match`) and its standard error under `METRIC_stderr,FILTER`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from tide_cache.errors import ConfigError, FormatError

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
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it ({error.strerror})") from error
    except ValueError as error:
        raise FormatError(f"{path}: not JSON: {error}") from error
    tasks = values.get("results") if isinstance(values, dict) else None
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
