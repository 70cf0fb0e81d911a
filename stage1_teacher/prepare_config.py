"""The config of `tide-cache prepare`: data, both tokenizers, noising.

Everything in it decides bytes, and so all of it stands in the header of the set that it makes.
What does not (the number of workers, where the set goes) is an option of the command instead.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from stage1_teacher.mixture import Name, SourceConfig, Sources
from stage1_teacher.mixture_grammar import scan_mixture
from tide_cache.config import StrictModel
from tide_cache.errors import ConfigError
from tide_cache.rows import AlignmentKind
from tide_cache.timesteps import FloatArray, draw_timesteps, timestep_grid


class SideConfig(StrictModel):
    """How one side, student or teacher, sees a conversation."""

    tokenizer: str = Field(
        min_length=1, description="Folder of a fast tokenizer, or a model on the Hugging Face Hub."
    )
    revision: str | None = Field(None, description="Commit, tag or branch of a hub tokenizer.")
    max_length: int = Field(512, ge=1, description="Tokens kept of a conversation.")
    chat_template: str | None = Field(
        None, description="File or text of a Jinja template; default: the tokenizer's own."
    )
    template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Passed to the template, such as enable_thinking: false."
    )


class TimestepsConfig(StrictModel):
    """The fixed grid: midpoints of `num` equal cells of [min, max)."""

    num: int = Field(32, ge=1, description="Timesteps in the grid; a multiple of num_views.")
    min: float = Field(1e-3, ge=0, le=1, description="Lower end of the range.")
    max: float = Field(1.0, ge=0, le=1, description="Upper end of the range.")

    def grid(self) -> FloatArray:
        """Return the grid, float32 (num,)."""
        return timestep_grid(self.num, self.min, self.max)


class PublishedConfig(StrictModel):
    """A published data set of tokenised rows: a folder, or the name of one on the hub.

    `split`, `name`, `revision`, `license` and `label` mean what they mean for a source.
    """

    path: Name
    name: Name | None = None
    split: Name | None = None
    revision: Name | None = None
    license: Name | None = None
    label: Name | None = None

    def as_source(self) -> SourceConfig:
        """Return the source that is opened."""
        return SourceConfig(**self.model_dump())


def _one_term(value: Any) -> Any:
    """Read `DIR[split:train]`; raises ValueError, which pydantic reports with the field."""
    if not isinstance(value, str):
        return value
    terms = scan_mixture(value, tuple(key for key in PublishedConfig.model_fields if key != "path"))
    if len(terms) != 1:
        raise ValueError(f"expected one data set, got {len(terms)}")
    return terms[0]


Published = Annotated[
    PublishedConfig,
    BeforeValidator(_one_term, json_schema_input_type=str | PublishedConfig),
]


class PrepareConfig(StrictModel):
    """`tide-cache prepare`: conversations, or rows made elsewhere, to a premasked set."""

    sources: Sources | None = Field(
        None, description="Chat data: a mixture written a+b+c[lang:python,cap:1000], or a list."
    )
    published: Published | None = Field(
        None,
        description="Instead of sources: a data set of both sides' ids, such as distill_llada2_sft "
        "(alignment: chunks) or distill_wedlm_sft (alignment: positions); DIR[split:train].",
    )
    premasked: str | None = Field(
        None, description="Instead of sources: Parquet files with masks drawn elsewhere."
    )
    student: SideConfig
    teacher: SideConfig | None = Field(None, description="Default: as the student.")
    alignment: AlignmentKind = Field(
        "positions",
        description="positions: both share a tokenizer; chunks: two tokenizers, aligned by bytes.",
    )
    block_size: int = Field(32, ge=1, description="Replies are filled with EOS to whole blocks.")
    seed: int = Field(0, ge=0, description="Decides mixture, masks, halves and timesteps.")
    num_views: int = Field(4, ge=1, le=1000, description="Noised copies of a sample.")
    timesteps: TimestepsConfig = TimestepsConfig()
    demo_ratio: float = Field(
        0.5, ge=0, le=1, description="Share of the masked positions that CompDemo shows in pass 1."
    )
    samples_per_shard: int = Field(2048, ge=1, description="Samples of a task; bounds memory.")
    max_samples: int | None = Field(None, ge=1, description="Prepare at most so many rows.")

    @property
    def teacher_side(self) -> SideConfig:
        """The teacher's side; the student's where none is given."""
        return self.teacher or self.student

    @model_validator(mode="after")
    def _one_input(self) -> "PrepareConfig":
        inputs = (self.sources, self.published, self.premasked)
        if sum(value is not None for value in inputs) != 1:
            raise ValueError("expected one of 'sources', 'published' and 'premasked'")
        return self

    @model_validator(mode="after")
    def _whole_blocks(self) -> "PrepareConfig":
        sides = {"student": self.student}
        if self.alignment == "positions":
            sides["teacher"] = self.teacher_side
        for name, side in sides.items():
            if side.max_length % self.block_size:
                raise ValueError(
                    f"{name}.max_length: expected a multiple of block_size = {self.block_size}, "
                    f"got {side.max_length}"
                )
        return self

    @model_validator(mode="after")
    def _strata_fit(self) -> "PrepareConfig":
        try:
            draw_timesteps(self.seed, "", self.num_views, self.timesteps.grid())
        except ConfigError as error:
            raise ValueError(f"timesteps: {error.message}") from error
        return self
