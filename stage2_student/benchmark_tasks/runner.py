"""Run benchmarks on a student: from Python, what `tide-eval run` does.

    from stage2_student.benchmark_tasks.runner import BenchmarkConfig, run_benchmarks

    results = run_benchmarks(
        BenchmarkConfig(model="runs/wedlm/student/final", output="runs/wedlm/eval", data="data")
    )
    print(results.as_json()["average"])

Everything that can be refused is refused before a weight is read: names, row, data files and their
rows, chat template. A run that was stopped goes on when it is started again: finished benchmarks
are skipped, answers that are on disk are not generated anew.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stage2_student.benchmark_tasks.engines import Engine, open_engine, resolve_device
from stage2_student.benchmark_tasks.plan import (
    BenchmarkConfig,
    PlannedBenchmark,
    plan_benchmarks,
)
from stage2_student.benchmark_tasks.progress import BenchmarkProgress, NoProgress
from stage2_student.benchmark_tasks.protocol import Benchmark
from stage2_student.benchmark_tasks.results import (
    BenchmarkResults,
    Score,
    read_score,
    write_file,
    write_lines,
    write_score,
)
from stage2_student.benchmark_tasks.score_table import as_markdown
from stage2_student.benchmark_tasks.task_configs import load_tasks
from tide_cache.canonical import fingerprint, pretty_json

__all__ = ["BenchmarkConfig", "run_benchmarks"]

# Raised when a change of ours can change a score, so that finished tasks are scored anew.
_SCORING_VERSION = 1
_FEWSHOT_SEED = 1234


def run_benchmarks(
    config: BenchmarkConfig,
    *,
    progress: BenchmarkProgress | None = None,
    engine: Engine | None = None,
) -> BenchmarkResults:
    """Run the benchmarks, write the output folder (see `results`) and return the scores.

    `engine` replaces what generates (default: the student on `config.devices`).
    """
    plan = plan_benchmarks(config)
    run = _Run(config, progress or NoProgress(), engine)
    try:
        scores = tuple(run.score(planned) for planned in plan.planned)
    finally:
        run.close()
    results = BenchmarkResults(
        model=config.model,
        model_sha256=run.model_sha256,
        row=config.row,
        settings=run.settings(),
        versions=_versions(),
        scores=scores,
        left_out=plan.left_out,
    )
    write_file(Path(config.output, "results.json"), pretty_json(results.as_json()))
    write_file(Path(config.output, "results.md"), as_markdown(results).encode())
    return results


class _Run:
    """One student, opened once for all benchmarks."""

    def __init__(
        self, config: BenchmarkConfig, progress: BenchmarkProgress, engine: Engine | None
    ) -> None:
        from stage2_student.benchmark_tasks.model_folder import (
            find_model_folder,
            load_tokenizer,
            model_sha256,
        )

        self._config = config
        self._progress = progress
        self._device_types = sorted({resolve_device(d).split(":")[0] for d in config.devices})
        folder = find_model_folder(config.model, config.revision)
        self._tokenizer = load_tokenizer(folder)
        self.model_sha256 = model_sha256(folder)
        self._engine = engine or open_engine(folder, config.devices, config.dtype)

    def settings(self) -> dict[str, Any]:
        """Return the settings that are the same for all benchmarks."""
        return {
            "block_size": self._config.block_size,
            "threshold": self._config.threshold,
            "temperature": 0.0,
            "cfg_scale": 0.0,
            "think_block": True,
            "fewshot_as_multiturn": False,
            "limit": self._config.limit,
            "batch_size": self._config.batch_size,
            "dtype": self._config.dtype,
            "devices": list(self._config.devices),
        }

    def score(self, planned: PlannedBenchmark) -> Score:
        """Return a benchmark's score: that of an earlier run where nothing has changed since."""
        task = planned.benchmark.task
        path = Path(self._config.output, "tasks", f"{task}.json")
        identity = self._fingerprint(planned)
        if (finished := read_score(path, identity)) is not None:
            self._progress.say(f"{task}: finished before, {finished.score:.2f}; see {path}")
            return finished
        if path.exists():
            self._progress.say(f"{task}: {path} is of other settings or data; run again")
        score, samples = self._evaluate(planned)
        write_lines(Path(self._config.output, "samples", f"{task}.jsonl"), samples)
        write_score(path, identity, score)
        return score

    def close(self) -> None:
        """Let go of devices and the bar."""
        self._progress.close()
        self._engine.close()

    def _evaluate(self, planned: PlannedBenchmark) -> tuple[Score, list[dict[str, Any]]]:
        from lm_eval.evaluator import evaluate

        from stage2_student.benchmark_tasks.answer_journal import AnswerJournal
        from stage2_student.benchmark_tasks.language_model import TideLM

        benchmark = planned.benchmark
        began_s = time.monotonic()
        self._progress.begin(benchmark.title)
        loaded = load_tasks(planned.definition, planned.rows)
        for task in loaded.tasks.values():
            task.set_fewshot_seed(_FEWSHOT_SEED)
        answers = Path(self._config.output, "answers", f"{benchmark.task}.jsonl")
        model = TideLM(
            tokenizer=self._tokenizer,
            engine=self._engine,
            settings=self._config.settings_of(benchmark),
            batch_size=self._config.batch_size,
            journal=AnswerJournal(answers),
            journal_context=self._answer_context(benchmark),
            progress=self._progress,
        )
        found = evaluate(
            lm=model,
            task_dict={"tasks": loaded.tasks, "groups": loaded.groups},
            limit=self._config.limit,
            bootstrap_iters=100,
            apply_chat_template=True,
            fewshot_as_multiturn=False,
            confirm_run_unsafe_code=self._config.run_generated_code,
        )
        seconds = time.monotonic() - began_s
        return _score(benchmark, found, model, seconds), _samples(found["samples"])

    def _answer_context(self, benchmark: Benchmark) -> dict[str, object]:
        """Return what decides an answer besides its prompt."""
        return {
            "model": self.model_sha256,
            "generation": asdict(self._config.settings_of(benchmark)),
            "dtype": self._config.dtype,
            "device_types": self._device_types,
        }

    def _fingerprint(self, planned: PlannedBenchmark) -> str:
        """Return a hash over all that decides a benchmark's score."""
        return fingerprint(
            {
                "scoring_version": _SCORING_VERSION,
                "benchmark": asdict(planned.benchmark),
                "answers": self._answer_context(planned.benchmark),
                "data": planned.rows.sha256 if planned.rows else "hub",
                "limit": self._config.limit,
                "versions": _versions(),
            }
        )


def _score(benchmark: Benchmark, found: Mapping[str, Any], model: Any, seconds: float) -> Score:
    metrics = _metrics(found["results"][benchmark.task])
    counts = found["n-samples"].values()
    return Score(
        task=benchmark.task,
        title=benchmark.title,
        metric=benchmark.metric,
        score=float(metrics[benchmark.metric]["score"] or 0.0),
        stderr=metrics[benchmark.metric]["stderr"],
        num_samples=sum(count["effective"] for count in counts),
        num_rows=sum(count["original"] for count in counts),
        metrics=metrics,
        num_new_tokens=sum(answer.num_new_tokens for answer in model.answers),
        num_forwards=sum(answer.num_forwards for answer in model.answers),
        seconds=round(seconds, 3),
    )


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Turn lm-eval's "metric,filter" and "metric_stderr,filter" keys into pairs, in percent."""
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        name, _, filter_name = key.partition(",")
        if not filter_name or name.endswith("_stderr"):
            continue
        stderr = values.get(f"{name}_stderr,{filter_name}")
        metrics[key] = {
            "score": 100 * float(value),
            "stderr": 100 * float(stderr) if isinstance(stderr, int | float) else None,
        }
    return metrics


def _samples(by_task: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "question": sample["doc_id"],
            "prompt": sample["arguments"][0][0],
            "answer": sample["resps"][0][0],
            "filter": sample["filter"],
            "filtered": sample["filtered_resps"][0],
            "target": sample["target"],
            "metrics": {name: float(sample[name]) for name in sample["metrics"]},
        }
        for task, samples in by_task.items()
        for sample in samples
    ]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("tide-cache", "lm-eval", "transformers", "torch")}
