"""One student of the tables in miniature: trained in a process of its own, measured, kept.

A run's folder is its cell, weight and seed; what was measured there is never measured again, so a
command that was killed goes on by being run again. The config that `tide-train` reads is written
beside it, to do the same by hand.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from examples.demo.config import PipelineConfig
from examples.demo.measure import answer_share, measure
from examples.demo.pipeline import Pipeline
from examples.paper.autoregressive import measure_autoregressive, train_autoregressive
from examples.paper.cells import PipelineName, read_cell
from stage2_student.config import TrainConfig
from stage2_student.trainer import train
from tide_cache.canonical import pretty_json
from tide_cache.parent_watch import exit_with_parent
from tide_cache.store import Store

AR_CELL = "shared/ar"
Purpose = Literal["choose", "report"]
_CONFIG_FILE = "train.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A student: its cell, the weight of its distillation loss, its seed, and what it is for.

    `choose` measures NLL on validation prompts only, `report` all figures on test prompts.
    """

    cell: str
    weight: float
    seed: int
    purpose: Purpose

    @property
    def pipeline(self) -> PipelineName:
        """The pipeline it belongs to."""
        return "shared" if self.cell.startswith("shared/") else "cross"

    @property
    def folder(self) -> str:
        """Its folder, relative to that of all runs."""
        return f"{self.cell}/weight-{self.weight:g}/seed-{self.seed}"

    @property
    def file(self) -> str:
        """The file that its figures are kept in, relative as `folder`."""
        return f"{self.folder}/{self.purpose}.json"


def start_worker() -> None:
    """Prepare a process that trains students: one thread, and no life beyond its parent's."""
    exit_with_parent()
    torch.set_num_threads(1)


def kept_figures(root: Path, run: Run) -> dict[str, Any] | None:
    """Return what a run measured before, or None."""
    path = root / run.file
    if not path.is_file():
        return None
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return figures


def train_and_measure(job: tuple[Run, dict[str, Any], str]) -> dict[str, Any]:
    """Train one student or find it trained, measure it, and keep its figures."""
    run, values, root = job
    pipeline = Pipeline(PipelineConfig.model_validate(values), Path(root) / run.pipeline)
    output = Path(root) / run.folder
    config = _config_of(run, pipeline, output)
    output.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    (output / _CONFIG_FILE).write_text(text, encoding="utf-8")
    began_s = time.monotonic()
    if run.cell == AR_CELL:
        final = train_autoregressive(config, pipeline.path("premasked-student"))
        seconds = time.monotonic() - began_s
        held_out = pipeline.path("premasked-held_out")
        figures = measure_autoregressive(final, pipeline.config, held_out)
    else:
        train(config, pipeline.path(read_cell(run.cell).cache))
        seconds = time.monotonic() - began_s
        figures = _measure(run, pipeline, output / "final")
    figures |= {"train_seconds": round(seconds, 2)}
    Store(root).publish(run.file, pretty_json(figures))
    return figures


def command_of(root: Path, run: Run) -> str:
    """Return the command that trains the same student."""
    cache = root / run.pipeline / read_cell(run.cell).cache
    return f"tide-train {root / run.folder / _CONFIG_FILE} --cache {cache}"


def _config_of(run: Run, pipeline: Pipeline, output: Path) -> TrainConfig:
    if run.cell == AR_CELL:
        return pipeline.student_config(output, seed=run.seed, objective={"losses": ["ce"]})
    cell = read_cell(run.cell)
    losses = {"ce": 1.0} | ({} if cell.loss is None else {cell.loss: run.weight})
    objective = {**cell.train.objective.model_dump(mode="json"), "losses": losses}
    return pipeline.student_config(output, seed=run.seed, objective=objective)


def _measure(run: Run, pipeline: Pipeline, final: Path) -> dict[str, Any]:
    if run.purpose == "choose":
        return {"nll": measure(final, Path(pipeline.path("premasked-validation")))["nll"]}
    figures = measure(final, Path(pipeline.path("cache-held_out")))
    return {**figures, "exact_match": answer_share(final, pipeline.config)}
