"""The build's config: which teacher, what of its answers is kept, how faithful that must be."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from stage1_teacher.teachers.base import TeacherConfig
from tide_cache.config import StrictModel

PayloadName = Literal["candidates", "chunks", "hidden"]
Temperature = Annotated[float, Field(gt=0, le=100)]
# Beside a replayed head the candidates only pin the top, exactly.
PIN_K, PIN_BITS = 16, 8


class CandidatesConfig(StrictModel):
    """The `candidates` payload."""

    k: int | None = Field(
        None,
        ge=1,
        description="Candidates per masked position, up to the vocabulary; default: 64, or 16 "
        "beside hidden.",
    )
    codec: Literal["ranked", "raw"] = Field(
        "ranked", description="ranked: few bits; raw: lossless, six times larger."
    )
    bits: Literal[6, 8] | None = Field(
        None, description="Of a logit under codec ranked; default: 6, or 8 beside hidden."
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Keep the ids with so much of the mass at T = 1, up to k.",
    )
    min_k: int | None = Field(None, ge=1, description="Keep at least so many; with top_p.")
    ranks: Literal["answers", "corpus"] = Field(
        "answers",
        description="Id frequencies behind codec ranked: of the teacher's answers at the "
        "calibration positions, or of the set's own tokens.",
    )
    temperatures: tuple[Temperature, ...] = Field(
        (1.0, 2.0), min_length=1, max_length=16, description="Whose logsumexp is stored, exactly."
    )
    vocab_size: Literal["auto"] | int = Field(
        "auto", description="Ids that teacher and student share; auto: the premasked set's figure."
    )
    mean_logits_positions: int = Field(
        4096, ge=0, description="Masked positions over which the tail's mean logits are taken."
    )

    @field_validator("temperatures")
    @classmethod
    def _distinct(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(temperatures)) != len(temperatures):
            raise ValueError("expected each temperature once")
        return temperatures

    @model_validator(mode="after")
    def _ragged(self) -> Self:
        if self.top_p is not None and self.codec == "raw":
            raise ValueError("top_p: goes with codec ranked")
        if self.top_p is not None and 1.0 not in self.temperatures:
            raise ValueError("top_p: needs temperature 1.0 among temperatures")
        if self.min_k is not None and self.top_p is None:
            raise ValueError("min_k: goes with top_p")
        return self


class HiddenConfig(StrictModel):
    """The `hidden` payload: the output head's input, transform-coded."""

    nats: float = Field(
        0.01,
        gt=0,
        le=10,
        description="Expected KL (at the temperatures of the build, on average) that rounding may "
        "cost; a quarter of them takes up to one bit more per component.",
    )
    fit_positions: int = Field(
        16384, ge=256, description="Masked positions that basis and step are fitted on, at most."
    )


class BuildConfig(StrictModel):
    """`tide-cache build` and `calibrate`: a teacher, and what of its answers is kept."""

    teacher: TeacherConfig
    payload: Literal["auto"] | None = Field(
        None,
        description="auto: calibrate first, and take the smallest payload that reaches fidelity.",
    )
    payloads: tuple[PayloadName, ...] | None = Field(
        None,
        min_length=1,
        max_length=3,
        description="What the cache holds; default: hidden where both sides share a tokenizer, "
        "chunks where they do not. hidden brings candidates that pin its top.",
    )
    fidelity: float = Field(
        0.99, gt=0, lt=1, description="Gradient cosine that payload: auto must reach, every loss."
    )
    fidelity_positions: int = Field(
        2048, ge=0, description="Masked positions on which fidelity is measured; 0: not measured."
    )
    student: str | None = Field(
        None,
        description="Checkpoint of a block-diffusion student against whose logits fidelity is "
        "measured; default: the teacher, noised.",
    )
    codec_from: str | None = Field(
        None,
        description="Folder or URL of a finished cache of this teacher whose codecs are taken "
        "instead of being fitted: what tide-cache merge needs to make one set of both.",
    )
    candidates: CandidatesConfig = CandidatesConfig()
    hidden: HiddenConfig = HiddenConfig()
    comp_demo: bool = Field(
        True, description="Two passes, each revealing the other half (CompDemo); false: one pass."
    )
    bad_samples: Literal["fail", "drop"] = Field(
        "fail",
        description="Samples for which the teacher gives NaN or infinity. fail: their task is set "
        "aside and named, the others are built; drop: left out, counted in the manifest.",
    )
    samples_per_batch: int = Field(
        128, ge=1, description="Samples scored at a time within a task; bounds memory."
    )

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.payload is not None and self.payloads is not None:
            raise ValueError("payload and payloads are both given: keep one")
        if self.payload == "auto" and self.fidelity_positions == 0:
            raise ValueError("payload: auto needs fidelity_positions above 0")
        if self.payloads is not None and len(set(self.payloads)) != len(self.payloads):
            raise ValueError("payloads: expected each once")
        return self

    def wanted(self, alignment: str) -> tuple[PayloadName, ...]:
        """Return the payloads that are asked for by name, in the order in which rows hold them."""
        if self.payloads is None:
            return ("candidates", "hidden") if alignment == "positions" else ("chunks",)
        names = set(self.payloads) | ({"candidates"} if "hidden" in self.payloads else set())
        return tuple(name for name in ("candidates", "chunks", "hidden") if name in names)
