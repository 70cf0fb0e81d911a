"""`make demo`: the whole pipeline on data it generates, through the product's own functions.

Chat data with checkable answers -> a small teacher is trained on it -> a premasked set -> a cache
-> students are trained on the same rows and masks, with and without the cache -> a table. No GPU,
no hub, nothing downloaded. Every stage prints the command that does the same. Students run two at a
time, one thread each, so that a figure does not depend on how many processors there are.
"""

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from examples.demo.config import DemoConfig
from examples.demo.measure import answer_share, measure
from examples.demo.pipeline import Pipeline
from examples.demo.report import print_table, table_of
from stage2_student.trainer import train
from tide_cache.card import describe_fidelity, entries_count
from tide_cache.cli import run as run_app
from tide_cache.config import load_config
from tide_cache.manifest import Manifest

console = Console(stderr=True, soft_wrap=True, highlight=False)


class Demo:
    """One run of the demo in a folder; stages that are finished are kept by running again."""

    def __init__(self, config: DemoConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.pipeline = Pipeline(config, folder)
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Run all stages and return the figures."""
        torch.set_num_threads(1)
        with self.stage("data", "generate rows and tokenizers"):
            self.pipeline.write_data()
        with self.stage("prepare", "tide-cache prepare"):
            self.pipeline.prepare("teacher")
            premasked = self.pipeline.prepare("student")
            self.pipeline.prepare("held_out")
        with self.stage("teacher", "tide-train teacher.yaml --cache premasked-teacher"):
            self.pipeline.train_teacher()
        with self.stage("build", "tide-cache build"):
            cache = self.pipeline.build("student")
            self.pipeline.build_held_out()
        with self.stage("verify", "tide-cache verify"):
            self._verify("cache-student")
            self._verify("cache-held_out")
        with self.stage("students", "tide-train student.yaml --cache cache-student"):
            runs = self._train_students()
        with self.stage("teacher's figures", "the same measurements on the teacher itself"):
            teacher = self._measure_teacher()
        return {
            "students": runs,
            "teacher": teacher,
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "fidelity": [describe_fidelity(facts) for facts in cache.fidelity],
            "bytes_per_masked_position": bytes_per_masked_position(cache),
            "bytes_per_answer": round(cache.counts["size_bytes"] / entries_count(cache), 2),
            "premasked_bytes": premasked.counts["size_bytes"],
            "cache_bytes": cache.counts["size_bytes"],
            "num_masked_positions": cache.counts["num_masked_positions"],
        }

    @contextmanager
    def stage(self, name: str, does: str) -> Iterator[None]:
        """Say what begins and keep how long it took."""
        console.print(f"[bold]{name}[/bold]: {does}")
        began_s = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began_s
        console.print(f"  {self.seconds[name]:.1f} s")

    def _verify(self, name: str) -> None:
        report = self.pipeline.verify(name)
        console.print(
            f"  {name}: sound, {report.num_rows:,} rows, {report.size_bytes / 1e6:.2f} MB"
        )

    def _train_students(self) -> list[dict[str, Any]]:
        jobs = [(name, seed) for seed in self.config.seeds for name in self.config.students]
        arguments = [(self.config.model_dump(mode="json"), str(self.folder), *job) for job in jobs]
        runs = []
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            for run in pool.map(train_student, arguments):
                console.print(f"  {run['name']}, seed {run['seed']}: nll {run['nll']:.3f}")
                runs.append(run)
        return runs

    def _measure_teacher(self) -> dict[str, Any]:
        final = self.folder / "teacher/final"
        share = answer_share(final, self.config)
        if not self.config.is_shared:
            return {"exact_match": share}
        return {**measure(final, self.folder / "cache-held_out"), "exact_match": share}


def train_student(job: tuple[dict[str, Any], str, str, int]) -> dict[str, Any]:
    """Train one student and measure it; runs in a process of its own."""
    values, folder, name, seed = job
    config = DemoConfig.model_validate(values)
    torch.set_num_threads(1)
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    output = Path(folder) / f"student-{slug}-{seed}"
    parsed = Pipeline(config, Path(folder)).student_config(
        output, seed=seed, objective={"losses": config.students[name]}
    )
    began_s = time.monotonic()
    train(parsed, str(Path(folder) / "cache-student"))
    seconds = time.monotonic() - began_s
    return {
        "name": name,
        "seed": seed,
        "seconds": round(seconds, 1),
        **measure(output / "final", Path(folder) / "cache-held_out"),
        "exact_match": answer_share(output / "final", config),
    }


def bytes_per_masked_position(manifest: Manifest) -> float:
    """Return the size of a cache's shards over its masked positions."""
    return round(manifest.counts["size_bytes"] / manifest.counts["num_masked_positions"], 2)


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML, see examples/.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run the demo and print its table.

    [bold]Examples[/bold]

    python -m examples.demo.run examples/demo.yaml -o runs/demo

    python -m examples.demo.run examples/demo.yaml -o runs/demo --set 'seeds=[5, 6]' --json
    """
    config = load_config(config_path, DemoConfig, overrides or (), section="demo")
    figures = Demo(config, output).run()
    figures["table"] = table_of(figures)
    (output / "figures.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    if json_output:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    else:
        print_table(figures, config)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    run_app(app)
