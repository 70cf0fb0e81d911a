"""What a manifest says of payloads: which, how they are coded, and how faithful they are.

One class a codec. A reader refuses a codec or version that it does not know (`KNOWN_CODECS`); what
a version means never changes.
"""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from tide_cache.config import StrictModel

# Sums of a thousand counts stay within 64 bits.
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 24)]
VocabSize = Annotated[int, Field(ge=1, le=1 << 24)]
MAX_RANKED_K: Final = (1 << 16) - 1
KNOWN_CODECS: Final[dict[tuple[Any, Any], tuple[int, ...]]] = {
    ("candidates", "raw"): (1, 2),
    ("candidates", "ranked"): (1,),
    ("chunks", "raw"): (1, 2),
    ("hidden", "transform"): (1,),
}


class CandidatesFacts(StrictModel):
    """The `candidates` payload: k ids with logits, and exact logsumexps, at each masked position.

    Ids lie below `vocab_size`, the ids that teacher and student share; `temperatures` are those
    whose logsumexp over these ids is stored. Codec `raw` is lossless; version 2 has a checksum.
    """

    name: Literal["candidates"] = "candidates"
    codec: Literal["raw", "ranked"] = "raw"
    codec_version: Literal[1, 2] = 2
    k: int = Field(ge=1, le=1 << 24)
    vocab_size: VocabSize
    temperatures: tuple[float, ...] = Field(min_length=1, max_length=16)
    mean_logits_positions: Count

    @field_validator("temperatures")
    @classmethod
    def _positive(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0.001 <= value <= 1000.0 for value in temperatures):
            raise ValueError("expected temperatures in 0.001..1000")
        return temperatures


class RankedFacts(CandidatesFacts):
    """`candidates` under the codec `ranked`: ids by frequency rank, logits of `bits` bits.

    `top_p`: how much of the mass at T = 1 a position keeps, from `min_k` ids up to `k`; None: each
    position keeps k. `ranks` says what the rank table was counted on.
    """

    codec: Literal["ranked"] = "ranked"
    codec_version: Literal[1] = 1
    bits: Literal[6, 8]
    top_p: float | None = Field(None, gt=0, le=1)
    min_k: int | None = Field(None, ge=1)
    ranks: Literal["answers", "corpus"]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.k > MAX_RANKED_K:
            raise ValueError(f"k: expected at most {MAX_RANKED_K}, got {self.k}")
        if (self.top_p is None) != (self.min_k is None):
            raise ValueError("expected top_p and min_k together")
        if self.min_k is not None and self.min_k > self.k:
            raise ValueError(f"min_k: expected at most k = {self.k}, got {self.min_k}")
        return self


class ChunksFacts(StrictModel):
    """The `chunks` payload: the teacher's log-prob of each active chunk.

    Version 2 of its codec adds a checksum.
    """

    name: Literal["chunks"] = "chunks"
    codec: Literal["raw"] = "raw"
    codec_version: Literal[1, 2] = 2


class HiddenFacts(StrictModel):
    """The `hidden` payload: the hidden state that the output head reads, transform-coded.

    `bands` counts the components of each column, the largest first; they sum to the components
    kept. The first `num_wide` components take two bytes. Codes are multiples of `step`. The head
    covers `vocab_size` ids. `fit_positions`: masked positions that basis and step were fitted on.
    """

    name: Literal["hidden"] = "hidden"
    codec: Literal["transform"] = "transform"
    codec_version: Literal[1] = 1
    hidden_size: int = Field(ge=1, le=1 << 16)
    vocab_size: VocabSize
    bands: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1, max_length=8)
    num_wide: Count
    step: float = Field(gt=0, le=1e6, allow_inf_nan=False)
    fit_positions: int = Field(ge=1)

    @property
    def num_components(self) -> int:
        """How many components of a hidden state are kept."""
        return sum(self.bands)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_components > self.hidden_size:
            raise ValueError(
                f"bands: expected at most hidden_size = {self.hidden_size} components, got "
                f"{self.num_components}"
            )
        if self.num_wide > self.num_components:
            raise ValueError(f"num_wide: expected at most {self.num_components} components")
        return self


def _payload_tag(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value.get('name')}/{value.get('codec')}"
    return f"{getattr(value, 'name', None)}/{getattr(value, 'codec', None)}"


PayloadFacts = Annotated[
    Annotated[CandidatesFacts, Tag("candidates/raw")]
    | Annotated[RankedFacts, Tag("candidates/ranked")]
    | Annotated[ChunksFacts, Tag("chunks/raw")]
    | Annotated[HiddenFacts, Tag("hidden/transform")],
    Discriminator(_payload_tag),
]


class LossFidelity(StrictModel):
    """How close one loss's gradient from a payload comes to that from full logits.

    Over all positions measured, with respect to the student's logits: `cosine` between the two
    gradients, `relative_error` |difference| / |full|. `weight` is lambda, for TIDAL only.
    """

    loss: Literal["tidal", "kl", "reverse_kl"]
    weight: float | None = Field(None, ge=0, le=1)
    temperature: float = Field(gt=0)
    cosine: float
    relative_error: float = Field(ge=0)


class FidelityFacts(StrictModel):
    """What was measured of a payload before the cache was built.

    `student` says against whose logits: a checkpoint, or `noised teacher`. `bytes_per_position`
    counts the payload's columns compressed as the cache holds them.
    """

    setting: str
    tail: str
    student: str
    num_positions: int = Field(ge=1)
    bytes_per_position: float = Field(ge=0)
    target: float | None = Field(None, gt=0, le=1)
    losses: tuple[LossFidelity, ...] = Field(min_length=1)

    @property
    def worst(self) -> LossFidelity:
        """The loss whose gradient is followed least closely."""
        return min(self.losses, key=lambda loss: loss.cosine)
