"""What a run of the benchmarks leaves: scores, and files that another run can go on from.

`OUTPUT/results.json` is the whole run (`as_json`, schema below), `results.md` its table. Beside
them, for each task: `tasks/TASK.json`, its scores under a fingerprint of all that decides them;
`answers/TASK.jsonl`, what the student said (see `answer_journal`); and `samples/TASK.jsonl`, each
question with its answer, what the filter made of it and whether it was right.
"""

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stage2_student.benchmark_tasks.paper_figures import SOURCE, paper_row
from stage2_student.benchmark_tasks.protocol import BENCHMARKS
from tide_cache.canonical import pretty_json
from tide_cache.errors import StorageError

FORMAT = "tide-eval-results"
VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A finished benchmark. Scores and standard errors in percent.

    `metrics` holds all of lm-eval's, {"metric,filter": {"score", "stderr"}}; `score` is the one of
    `metric`. `num_samples` questions were asked out of `num_rows`. `num_forwards` adds up the
    forwards that each prompt took part in, `seconds` is this benchmark's wall-clock time in the run
    that finished it.
    """

    task: str
    title: str
    metric: str
    score: float
    stderr: float | None
    num_samples: int
    num_rows: int
    metrics: dict[str, dict[str, float | None]]
    num_new_tokens: int
    num_forwards: int
    seconds: float

    @property
    def is_limited(self) -> bool:
        """Whether fewer questions were asked than there are."""
        return self.num_samples < self.num_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkResults:
    """A whole run. `left_out` maps tasks that were not run to the reason and what to do."""

    model: str
    model_sha256: str
    row: str | None
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    scores: tuple[Score, ...]
    left_out: Mapping[str, str]

    @property
    def average(self) -> float | None:
        """Mean of the eight scores, None unless all eight are there and complete."""
        whole = [s.score for s in self.scores if not s.is_limited]
        return sum(whole) / len(whole) if len(whole) == len(BENCHMARKS) else None

    def as_json(self) -> dict[str, Any]:
        """Return the content of `results.json`."""
        paper = paper_row(self.row) if self.row else {}
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": {"name": self.model, "sha256": self.model_sha256},
            "paper": {"row": self.row, "source": SOURCE} if self.row else None,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "benchmarks": [
                {
                    **asdict(score),
                    "is_limited": score.is_limited,
                    "metric_is_certain": BENCHMARKS[score.task].metric_is_certain,
                    "paper_score": paper.get(score.title),
                }
                for score in self.scores
            ],
            "left_out": dict(self.left_out),
            "average": self.average,
            "paper_average": paper.get("Avg"),
        }


def read_score(path: Path, fingerprint: str) -> Score | None:
    """Return the score that an earlier run left, None if there is none of this fingerprint."""
    try:
        value = json.loads(path.read_bytes())
        return Score(**value["score"]) if value["fingerprint"] == fingerprint else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        # A file that is not ours, or of another version: the answers decide, not this file.
        return None


def write_score(path: Path, fingerprint: str, score: Score) -> None:
    """Write a finished benchmark, in one step."""
    write_file(path, pretty_json({"fingerprint": fingerprint, "score": asdict(score)}))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, in one step."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def write_file(path: Path, data: bytes) -> None:
    """Replace a file in one step: a kill leaves the old content or the new."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot write it ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)
