"""The config of `make paper-mini`: two small pipelines, seeds, and how weights are chosen."""

from pathlib import Path
from typing import Any

from pydantic import Field

from examples.demo.config import DemoConfig, PipelineConfig
from examples.paper.cells import PIPELINES, PipelineName, cell_names
from tide_cache.config import StrictModel, load_config
from tide_cache.errors import ConfigError, did_you_mean


class WeightsConfig(StrictModel):
    """How the weight of each distillation loss is chosen, the same way for every method."""

    grid: tuple[float, ...] = Field(min_length=1, description="weights that are tried")
    seed: int = Field(description="of the students that are tried; none of the reported seeds")


class MiniConfig(StrictModel):
    """The paper's tables in miniature."""

    pipelines: dict[PipelineName, str] = Field(
        description="configs of the demo, relative to this file; their students are not read"
    )
    seeds: tuple[int, ...] = Field(min_length=1)
    weights: WeightsConfig
    cells: tuple[str, ...] | None = Field(None, description="only these; default: all of them")
    autoregressive: bool = Field(True, description="train the AR row, too")

    @property
    def chosen_cells(self) -> tuple[str, ...]:
        """The cells to train. Raises ConfigError on a name that is none."""
        known = cell_names()
        for name in self.cells or ():
            if name not in known:
                raise ConfigError(f"cells: no cell {name!r}{did_you_mean(name, known)}")
        return known if self.cells is None else self.cells


def read_mini(
    path: Path, overrides: list[str]
) -> tuple[MiniConfig, dict[PipelineName, PipelineConfig]]:
    """Read the config and the pipelines that it names.

    Raises ConfigError where something is missing, or a seed is for choosing and for reporting.
    """
    config = load_config(path, MiniConfig, overrides)
    if config.weights.seed in config.seeds:
        raise ConfigError(f"weights.seed: {config.weights.seed} is one of the reported seeds")
    pipelines: dict[PipelineName, PipelineConfig] = {}
    for name in PIPELINES:
        if name in config.pipelines:
            demo = load_config(path.parent / config.pipelines[name], DemoConfig, section="demo")
            fields: dict[str, Any] = demo.model_dump(include=set(PipelineConfig.model_fields))
            pipelines[name] = PipelineConfig(**fields)
    for cell in config.chosen_cells:
        if not any(cell.startswith(f"{name}/") for name in pipelines):
            raise ConfigError(f"pipelines: cell {cell!r} needs a pipeline that is not given")
    return config, pipelines
