"""`make paper-mini`: tables 1 and 2 of the paper on the demo's teachers and students, on a CPU.

Two teachers (one shares the students' tokenizer, one does not) -> per pipeline one premasked set,
one cache with CompDemo and one without -> every cell of both tables, for every seed -> tables, and
which of the paper's orderings they show. Students run two at a time, one thread each. Run the same
command again to go on after a kill.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from examples.demo.config import PipelineConfig
from examples.demo.measure import answer_share, measure
from examples.demo.pipeline import PARTS, Pipeline
from examples.paper.cells import PipelineName, read_cell
from examples.paper.mini_config import MiniConfig, read_mini
from examples.paper.mini_figures import Tried, chosen_weights, figures_of
from examples.paper.mini_report import markdown
from examples.paper.mini_runs import (
    AR_CELL,
    Run,
    command_of,
    kept_figures,
    start_worker,
    train_and_measure,
)
from tide_cache.canonical import pretty_json
from tide_cache.cli import run as run_app
from tide_cache.errors import ConfigError
from tide_cache.store import Store

_CONFIG_FILE, _TEACHER_FILE, _SECONDS_FILE = "config.json", "teacher.json", "seconds.json"
_MAX_WORKERS = 2
console = Console(stderr=True, soft_wrap=True, highlight=False)


class Mini:
    """One run of the tables in a folder; whatever is finished is kept by running again."""

    def __init__(
        self,
        config: MiniConfig,
        pipelines: dict[PipelineName, PipelineConfig],
        folder: Path,
    ) -> None:
        self.config, self.folder = config, folder
        self.pipelines = {
            name: Pipeline(values, folder / name) for name, values in pipelines.items()
        }
        self.seconds = _read(folder / _SECONDS_FILE)
        self._require_same_config()

    def run(self) -> dict[str, Any]:
        """Run all stages and return the figures."""
        torch.set_num_threads(1)
        teachers = {name: self._make_sets(name) for name in self.pipelines}
        tried = self._try_weights()
        runs = reported_runs(self.config, chosen_weights(tried))
        with self.stage("students", "tide-train, once per cell, weight and seed"):
            measured = self._train(runs)
        return figures_of(measured, teachers=teachers, tried=tried, seconds=self.seconds)

    @contextmanager
    def stage(self, name: str, does: str) -> Iterator[None]:
        """Say what begins; add how long it took to what earlier, interrupted runs took."""
        console.print(f"[bold]{name}[/bold]: {does}")
        began_s = time.monotonic()
        try:
            yield
        finally:
            taken_s = time.monotonic() - began_s
            self.seconds[name] = round(self.seconds.get(name, 0.0) + taken_s, 1)
            (self.folder / _SECONDS_FILE).write_bytes(pretty_json(self.seconds))
        console.print(f"  {taken_s:.1f} s")

    def _make_sets(self, name: PipelineName) -> dict[str, Any]:
        """Make a pipeline's teacher and sets. Returns the teacher's own figures."""
        pipeline = self.pipelines[name]
        path = pipeline.folder / _TEACHER_FILE
        if path.is_file():
            return _read(path)
        with self.stage(f"{name}: sets", "tide-cache prepare, four times"):
            pipeline.write_data(PARTS)
            for part in PARTS:
                pipeline.prepare(part)
        with self.stage(f"{name}: teacher", "tide-train --cache premasked-teacher"):
            pipeline.train_teacher()
        with self.stage(f"{name}: caches", "tide-cache build and verify, three times"):
            pipeline.build("student", cache="cache")
            pipeline.build("student", {"comp_demo": False}, cache="cache-plain")
            pipeline.build_held_out()
            for cache in ("cache", "cache-plain", "cache-held_out"):
                pipeline.verify(cache)
        with self.stage(f"{name}: teacher's figures", "the measurements of the students"):
            final = Path(pipeline.path("teacher/final"))
            found: dict[str, Any] = {"exact_match": answer_share(final, pipeline.config)}
            if pipeline.config.is_shared:
                found |= measure(final, Path(pipeline.path("cache-held_out")))
        Store(pipeline.folder).publish(_TEACHER_FILE, pretty_json(found))
        return found

    def _try_weights(self) -> Tried:
        """Return by cell the NLL on validation prompts of each weight of the grid."""
        runs = choosing_runs(self.config)
        with self.stage("weights", f"{len(runs)} students, measured on validation prompts"):
            measured = self._train(runs)
        tried: Tried = {}
        for run in runs:
            tried.setdefault(run.cell, {})[run.weight] = measured[run]["nll"]
        return tried

    def _train(self, runs: Sequence[Run]) -> dict[Run, dict[str, Any]]:
        """Train and measure what is missing; returns the figures of all `runs`."""
        kept = {run: kept_figures(self.folder, run) for run in runs}
        measured = {run: figures for run, figures in kept.items() if figures is not None}
        missing = [run for run in runs if run not in measured]
        if measured:
            console.print(f"  {len(measured)} of {len(runs)} were done before")
        began_s = time.monotonic()
        with ProcessPoolExecutor(
            min(_MAX_WORKERS, max(len(missing), 1)),
            mp_context=get_context("spawn"),
            initializer=start_worker,
        ) as pool:
            jobs = {
                pool.submit(train_and_measure, (run, self._values(run), str(self.folder))): run
                for run in missing
            }
            for number, job in enumerate(as_completed(jobs), start=1):
                run = jobs[job]
                measured[run] = job.result()
                left_s = (time.monotonic() - began_s) / number * (len(missing) - number)
                console.print(
                    f"  {number} of {len(missing)}: {_line(run, measured[run])}; {left_s:,.0f} s "
                    "left"
                )
        return measured

    def _values(self, run: Run) -> dict[str, Any]:
        return self.pipelines[run.pipeline].config.model_dump(mode="json")

    def _require_same_config(self) -> None:
        """Refuse a folder whose runs were begun with other pipelines."""
        values = {name: p.config.model_dump(mode="json") for name, p in self.pipelines.items()}
        path = self.folder / _CONFIG_FILE
        if not path.exists():
            Store(self.folder).publish(_CONFIG_FILE, pretty_json(values))
        elif _read(path) != values:
            raise ConfigError(
                f"{self.folder}: was begun with other pipelines ({path.name})",
                hint="choose another --output, or remove the folder",
            )


def choosing_runs(config: MiniConfig) -> list[Run]:
    """Return the students that weights are chosen by: each distilled cell with each weight."""
    return [
        Run(cell=name, weight=weight, seed=config.weights.seed, purpose="choose")
        for name in config.chosen_cells
        if read_cell(name).loss is not None
        for weight in config.weights.grid
    ]


def reported_runs(config: MiniConfig, weights: dict[str, float]) -> list[Run]:
    """Return the students that tables show: each cell with weight 1 and with the chosen one."""
    pairs = {
        (name, weight): None
        for name in config.chosen_cells
        for weight in (1.0, weights.get(name, 1.0))
    }
    if config.autoregressive:
        pairs[AR_CELL, 1.0] = None
    return [
        Run(cell=cell, weight=weight, seed=seed, purpose="report")
        for seed in config.seeds
        for cell, weight in pairs
    ]


def _line(run: Run, figures: dict[str, Any]) -> str:
    nll = f", NLL {figures['nll']:.3f}" if "nll" in figures else ""
    share = figures.get("exact_match")
    right = "" if share is None else f", exact match {share['all']:.3f}"
    return f"{run.cell}, weight {run.weight:g}, seed {run.seed}{nll}{right}"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, stop.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train the paper's tables in miniature and print them, with the orderings that they show.

    [bold]Examples[/bold]

    python -m examples.paper.mini examples/paper/mini.yaml -o runs/paper-mini

    python -m examples.paper.mini examples/paper/mini.yaml -o runs/paper-mini --set 'seeds=[1, 2]'
    """
    config, pipelines = read_mini(config_path, overrides or [])
    if dry_run:
        _print_plan(config, output, json_output)
        return
    output.mkdir(parents=True, exist_ok=True)
    figures = Mini(config, pipelines, output).run()
    text = markdown(figures, pipelines)
    (output / "figures.json").write_bytes(pretty_json(figures))
    (output / "tables.md").write_text(text, encoding="utf-8")
    sys.stdout.write(json.dumps(figures, indent=2) + "\n" if json_output else text)


def _print_plan(config: MiniConfig, output: Path, json_output: bool) -> None:
    tried, reported = choosing_runs(config), reported_runs(config, {})
    runs = [*tried, *reported]
    num_more = len({run.cell for run in tried}) * len(config.seeds)
    commands = [command_of(output, run) for run in runs if run.cell != AR_CELL]
    if json_output:
        sys.stdout.write(json.dumps({"num_runs": len(runs), "commands": commands}, indent=2) + "\n")
        return
    sys.stdout.write("\n".join(commands) + f"\n{len(runs)} students, and up to {num_more} more "
                     "with the weights chosen by then\n")  # fmt: skip


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    run_app(app)
