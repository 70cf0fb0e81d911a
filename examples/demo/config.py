"""The demo's config: how much data, which models, which students, all in one YAML."""

from typing import Any, Literal

from pydantic import Field

from stage1_teacher.prepare_config import TimestepsConfig
from tide_cache.config import StrictModel

TokenizerName = Literal["characters", "pairs"]


class DataConfig(StrictModel):
    """How many rows of generated chat data each part gets."""

    seed: int = 0
    teacher_rows: int = Field(ge=1, description="rows that the teacher learns from, all right")
    student_rows: int = Field(ge=1, description="rows that the teacher is asked about")
    wrong_fraction: float = Field(ge=0, le=1, description="share of student rows answered wrong")
    held_out_rows: int = Field(ge=1, description="test prompts, all right, for NLL and KL")
    prompts: int = Field(ge=1, description="test prompts that students answer")


class MaskingConfig(StrictModel):
    """How rows are cut and masked."""

    max_length: int = Field(ge=1)
    block_size: int = Field(ge=1)
    num_views: int = Field(ge=1)
    teacher_timesteps: TimestepsConfig
    student_timesteps: TimestepsConfig


class PipelineConfig(StrictModel):
    """A teacher, its cache and how students are trained: the product's own configs, paths left out.

    `train`, `build` and their like are what `tide-train` and `tide-cache build` read.
    """

    split: Literal["validation", "test"] = Field(
        "test", description="prompts that figures are taken on; settings were chosen on validation"
    )
    teacher_tokenizer: TokenizerName
    student_tokenizer: TokenizerName
    data: DataConfig
    masking: MaskingConfig
    teacher_train: dict[str, Any]
    build: dict[str, Any]
    student_train: dict[str, Any]
    new_tokens: int = Field(ge=1, description="tokens generated per answer")

    @property
    def is_shared(self) -> bool:
        """Whether teacher and student share a tokenizer."""
        return self.teacher_tokenizer == self.student_tokenizer


class DemoConfig(PipelineConfig):
    """What `make demo` runs."""

    students: dict[str, dict[str, float]] = Field(description="name: losses and their weights")
    seeds: tuple[int, ...] = Field(min_length=1)
