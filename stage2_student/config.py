"""The config file of `tide-train`: one section per component, each class beside its component.

Keys in `FREE_KEYS` say where and how often, or how the same step is computed; a run may be resumed
with other values of them. All others decide what is learnt, and changing one is another run.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stage2_student.checkpoints import CheckpointConfig
from stage2_student.evaluate import EvaluationConfig
from stage2_student.metrics import MetricsConfig
from stage2_student.objective_config import ObjectiveConfig
from stage2_student.optimizer import OptimizerConfig
from stage2_student.stream import StreamConfig
from stage2_student.student_source import StudentConfig
from tide_cache.config import StrictModel
from tide_cache.local_copies import LocalStoreConfig

FREE_KEYS = (
    "output",
    "device",
    "checkpoints",
    "metrics",
    "evaluation",
    "student.attention",
    "student.activation_checkpointing",
    "student.compile",
    "student.license",
    "stream.micro_batch_size",
    "stream.workers",
    "stream.prefetch",
    "local_store",
)


class TrainConfig(StrictModel):
    """One training run. Its caches are named on the command line."""

    output: str = Field(description="folder for checkpoints, metrics and the final student")
    student: StudentConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    stream: StreamConfig = StreamConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: int | None = Field(None, ge=1, description="passes over the samples; or max_steps")
    max_steps: int | None = Field(None, ge=1, description="optimiser steps; or epochs")
    cache_weights: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        description="share of the steps that read each --cache, in their order; default: as many "
        "as read each once an epoch",
    )
    seed: int = Field(0, ge=0, description="of the order of rows, and of init: random")
    precision: Literal["float32", "bf16"] = Field("float32", description="bf16: autocast")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoints: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    local_store: LocalStoreConfig = LocalStoreConfig()

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("expected exactly one of the keys epochs and max_steps")
        return self


def deciding_keys(config: TrainConfig) -> dict[str, Any]:
    """Return the dotted keys and values that decide what a run learns."""
    flat = _flatten(config.model_dump(mode="json"))
    return {
        key: value
        for key, value in flat.items()
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    }


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "losses":
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
