"""What a config says of the objective: losses by name and weight, and the settings they share."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from stage2_student.losses import LossName, Normalization, canonical_loss_name
from stage2_student.schedules import Axis, Interpolation, Schedule, TimestepWeight
from tide_cache.config import StrictModel
from tide_cache.errors import ConfigError
from tide_cache.tails import Tail

PayloadName = Literal["candidates", "chunks"]
MaskWeight = Literal["published", "unbiased"]
Weights = dict[str, float] | list[str | dict[str, float]]


def canonical_weights(losses: Weights) -> dict[str, float]:
    """Return `{project's name of a loss: weight}` without the losses of weight 0.

    Takes a mapping or a list of names (weight 1) and single mappings; published names are known.
    Raises ValueError on an unknown name, a name given twice, a negative weight or none at all.
    """
    items = [losses] if isinstance(losses, dict) else losses
    weights: dict[str, float] = {}
    for item in items:
        for name, weight in ({item: 1.0} if isinstance(item, str) else item).items():
            try:
                canonical = canonical_loss_name(name)
            except ConfigError as error:
                raise ValueError(error.message) from error
            if canonical in weights:
                raise ValueError(f"loss {canonical!r} is given twice")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weight of {name!r}: expected 0 or more, got {weight}")
            weights[canonical] = float(weight)
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    if not weights:
        raise ValueError("expected at least one loss with a weight above 0")
    return weights


class ObjectiveConfig(StrictModel):
    """Which losses, how heavy, at which temperature."""

    losses: Annotated[Weights, AfterValidator(canonical_weights)] = Field(
        {"ce": 1.0, "tidal": 1.0}, description="{name: weight} or [name, ...]"
    )
    loss_norm: Normalization = Field("token", description="what the cross entropy is divided by")
    mask_weight: MaskWeight = Field(
        "published",
        description="of a masked token's cross entropy. published: 1/t, the default because the "
        "published trainer's gradients are what its vectors pin. unbiased: 1/(1-(1-t)^n) for the n "
        "labelled tokens of its chunk, so that each token counts once on average; published counts "
        "those of chunks of 3 2.85 times at t = 0.05. Without chunks both are the same",
    )
    temperature: float = Field(2.0, gt=0, description="of the distillation terms")
    lambda_init: float = Field(0.1, ge=0, le=1)
    lambda_max: float = Field(0.9, ge=0, le=1)
    schedule: Schedule = "cosine"
    axis: Axis = "both"
    timestep_weight: TimestepWeight = "uniform"
    tail: Literal["auto"] | Tail = Field(
        "auto",
        description="what the ids are taken to be that are no candidates (tide_cache.tails). auto: "
        "hidden where the cache has that payload, else mean, else uniform. none renormalises the "
        "candidates: a wrong gradient, for comparison only",
    )

    @property
    def weights(self) -> dict[LossName, float]:
        """The weight of each loss, by the project's name, none of them 0."""
        return {canonical_loss_name(k): w for k, w in canonical_weights(self.losses).items()}

    @property
    def payloads(self) -> dict[PayloadName, LossName]:
        """The payloads that the losses read, each with one of those losses."""
        return {payload: name for name in self.weights if (payload := PAYLOAD_OF[name]) is not None}

    @property
    def counts_draws(self) -> bool:
        """Whether the cross entropy asks how many draws hide each masked position."""
        return self.mask_weight == "unbiased" and "ce" in self.weights

    @property
    def interpolation(self) -> Interpolation:
        """The settings of TIDAL's mixture."""
        return Interpolation(
            lambda_init=self.lambda_init,
            lambda_max=self.lambda_max,
            schedule=self.schedule,
            axis=self.axis,
            timestep_weight=self.timestep_weight,
        )


PAYLOAD_OF: dict[LossName, PayloadName | None] = {
    "ce": None,
    "tidal": "candidates",
    "kl": "candidates",
    "reverse_kl": "candidates",
    "calm": "chunks",
    "reverse_calm": "chunks",
    "calm_tidal": "chunks",
    "reverse_calm_tidal": "chunks",
}
