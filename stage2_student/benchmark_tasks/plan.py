"""Which benchmarks a run asks, and of what data: everything that is settled before
a model is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage2_student.benchmark_tasks.engines import DTYPES
from stage2_student.benchmark_tasks.local_data import LocalRows, load_local_rows
from stage2_student.benchmark_tasks.paper_figures import paper_row
from stage2_student.benchmark_tasks.protocol import (
    BLOCK_SIZE,
    PAPER,
    Benchmark,
    choose_benchmarks,
)
from stage2_student.benchmark_tasks.task_configs import Definition, define
from stage2_student.sampling.settings import GenerationSettings
from tide_cache.errors import ConfigError

_CODE_FLAG = (
    "left out: it runs programs that the student wrote, on this machine and without a sandbox; "
    "add --run-generated-code"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """What is asked of which student.

    `model` is a folder or a hub name; `data` a folder of local data sets (None: lm-eval downloads
    them); `limit` the number of questions of each sub-task; `row` a row of the paper's Table 1.
    `threshold` commits by confidence rather than by count, which is not the published protocol.
    """

    model: str
    output: Path | str
    tasks: str = PAPER
    data: Path | str | None = None
    revision: str | None = None
    limit: int | None = None
    batch_size: int = 1
    devices: tuple[str, ...] = ("auto",)
    dtype: str = "auto"
    threshold: float | None = None
    block_size: int = BLOCK_SIZE
    run_generated_code: bool = False
    row: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit: expected at least 1, got {self.limit}")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1, got {self.batch_size}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.row is not None:
            paper_row(self.row)
        for benchmark in choose_benchmarks(self.tasks):
            self.settings_of(benchmark)

    def settings_of(self, benchmark: Benchmark) -> GenerationSettings:
        """Return how the answers to a benchmark are generated."""
        return GenerationSettings(
            max_new_tokens=benchmark.max_new_tokens,
            num_steps=benchmark.max_new_tokens if self.threshold is None else None,
            block_size=self.block_size,
            threshold=self.threshold,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBenchmark:
    """A benchmark with its rows in memory (None: lm-eval downloads them)."""

    benchmark: Benchmark
    definition: Definition
    rows: LocalRows | None

    def as_json(self) -> dict[str, Any]:
        """Return what `--dry-run` prints."""
        return {
            "task": self.benchmark.task,
            "new_tokens": self.benchmark.max_new_tokens,
            "fewshot": self.benchmark.num_fewshot,
            "sub_tasks": len(self.definition.leaves),
            "rows": self.rows.num_rows if self.rows else "downloaded by lm-eval",
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkPlan:
    """What a run will ask, and what it leaves out and why."""

    planned: tuple[PlannedBenchmark, ...]
    left_out: Mapping[str, str]


def plan_benchmarks(config: BenchmarkConfig) -> BenchmarkPlan:
    """Look up the benchmarks and read their local data. Loads no model.

    Raises ConfigError when nothing is left to run, and what `load_local_rows` raises.
    """
    chosen = choose_benchmarks(config.tasks)
    left_out = {b.task: _CODE_FLAG for b in chosen if b.runs_code and not config.run_generated_code}
    kept = [b for b in chosen if b.task not in left_out]
    if not kept:
        raise ConfigError(
            f"{', '.join(left_out)}: runs programs that the student wrote, on this machine and "
            "without a sandbox",
            hint="add --run-generated-code if that is acceptable here",
        )
    return BenchmarkPlan(planned=tuple(_plan(config, b) for b in kept), left_out=left_out)


def _plan(config: BenchmarkConfig, benchmark: Benchmark) -> PlannedBenchmark:
    definition = define(benchmark)
    rows = None
    if config.data is not None:
        parts = list(dict.fromkeys(definition.parts.values()))
        rows = load_local_rows(benchmark.task, Path(config.data), parts)
    return PlannedBenchmark(benchmark=benchmark, definition=definition, rows=rows)
