"""What the paper's tables are made of: methods, and the configs behind them.

A cell is a config in this folder, `shared/kl` is `shared/kl.yaml`, which `tide-train` reads as it
is; what its cache must hold stands in the same file (`build.comp_demo`). One cache with CompDemo
serves every method of a pipeline. KL, CALM and TIDE-Cross were published without CompDemo, so each
of them has a second cell "as published", whose answers come from a plain cache of the same
premasked set; TIDE-Shared's two cells are one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from stage1_teacher.payload_config import BuildConfig
from stage2_student.benchmark_tasks.paper_figures import paper_row
from stage2_student.config import TrainConfig
from tide_cache.config import load_config

PipelineName = Literal["shared", "cross"]
CacheName = Literal["cache", "cache-plain"]
FOLDER = Path(__file__).resolve().parent
PIPELINES: tuple[PipelineName, ...] = get_args(PipelineName)

AR_MODEL = "Qwen/Qwen3-0.6B"
BD3LM_MODEL = "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A distilled row of table 1: its two cells, and the student that was released of it."""

    pipeline: PipelineName
    label: str
    one_cache: str
    as_published: str
    released: str

    @property
    def row(self) -> str:
        """Its name among the rows of table 1, as `tide-eval run --row` takes it."""
        return f"{self.label} ({self.pipeline})"

    @property
    def published_average(self) -> float:
        """The paper's average over the eight benchmarks, in percent."""
        return paper_row(self.row)["Avg"]


METHODS = (
    Method(
        pipeline="shared",
        label="KL",
        one_cache="shared/kl",
        as_published="shared/kl_as_published",
        released="TIDE-dllm/distill-WeDLM-KL",
    ),
    Method(
        pipeline="shared",
        label="TIDE-Cross",
        one_cache="shared/tide_cross",
        as_published="shared/tide_cross_as_published",
        released="TIDE-dllm/distill-WeDLM-TIDE_Cross",
    ),
    Method(
        pipeline="shared",
        label="TIDE-Shared",
        one_cache="shared/tide_shared",
        as_published="shared/tide_shared",
        released="TIDE-dllm/distill-WeDLM-TIDE_Shared",
    ),
    Method(
        pipeline="cross",
        label="CALM",
        one_cache="cross/calm",
        as_published="cross/calm_as_published",
        released="TIDE-dllm/distill-LLaDA2-CALM",
    ),
    Method(
        pipeline="cross",
        label="TIDE-Shared",
        one_cache="cross/tide_shared",
        as_published="cross/tide_shared",
        released="TIDE-dllm/distill-LLaDA2-TIDE_Shared",
    ),
    Method(
        pipeline="cross",
        label="TIDE-Cross",
        one_cache="cross/tide_cross",
        as_published="cross/tide_cross_as_published",
        released="TIDE-dllm/distill-LLaDA2-TIDE_Cross",
    ),
)

# Table 2, in the shared pipeline: label and cell, the whole method last.
ABLATIONS = (
    ("CE alone", "shared/ce"),
    ("without timestep axis", "shared/no_timestep_axis"),
    ("without CompDemo", "shared/no_comp_demo"),
    ("TIDE-Shared, full", "shared/tide_shared"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A config of this folder, read."""

    name: str
    path: Path
    build: BuildConfig
    train: TrainConfig

    @property
    def pipeline(self) -> PipelineName:
        """The pipeline whose rows it trains on."""
        return next(name for name in PIPELINES if self.name.startswith(f"{name}/"))

    @property
    def cache(self) -> CacheName:
        """The cache it reads, a folder beside the pipeline's premasked set."""
        return "cache" if self.build.comp_demo else "cache-plain"

    @property
    def loss(self) -> str | None:
        """The name of the distillation loss beside cross entropy; None where there is none."""
        names = [name for name in self.train.objective.weights if name != "ce"]
        return names[0] if names else None


def read_cell(name: str) -> Cell:
    """Read a cell's config. Raises ConfigError where it is none."""
    path = FOLDER / f"{name}.yaml"
    return Cell(
        name=name,
        path=path,
        build=load_config(path, BuildConfig, section="build"),
        train=load_config(path, TrainConfig, section="train"),
    )


def cell_names() -> tuple[str, ...]:
    """Return every cell of both tables once, those of a pipeline together."""
    names = [f"{pipeline}/ce" for pipeline in PIPELINES]
    names += [name for method in METHODS for name in (method.one_cache, method.as_published)]
    names += [name for _, name in ABLATIONS]
    return tuple(sorted(dict.fromkeys(names), key=lambda name: PIPELINES.index(_first(name))))


def _first(name: str) -> PipelineName:
    return next(pipeline for pipeline in PIPELINES if name.startswith(f"{pipeline}/"))
