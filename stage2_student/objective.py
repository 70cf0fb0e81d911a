"""What is minimised: cross entropy and distillation terms by name, as sums that are divided once.

A step may be spread over micro-batches and ranks that hold different numbers of positions. A mean
of their means is another loss, so every term returns a sum over its positions and is divided by
the count of the whole step (`Denominators`), which is known before the first forward. A term is a
function of logits and batch, and says which payload it reads.

Shapes: P masked positions, Q those with candidates, C active chunks, D hidden, V ids.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn import functional

from stage2_student.batches import Batch
from stage2_student.losses import (
    Direction,
    LossName,
    Normalization,
    calm_per_chunk,
    canonical_loss_name,
    ce_denominator,
    ce_numerators,
    ce_per_position,
    kl_per_position,
    tidal_per_position,
    token_logprobs,
)
from stage2_student.schedules import Axis, Interpolation, Schedule, TimestepWeight
from stage2_student.slices import summed_in_slices
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Denominators:
    """What the terms of a step are divided by: counts over all its micro-batches and ranks."""

    ce: int
    candidates: int
    chunks: int

    def of(self, payload: PayloadName | None) -> int:
        """Return the denominator of the terms that read `payload`, at least 1."""
        counts = {None: self.ce, "candidates": self.candidates, "chunks": self.chunks}
        return max(counts[payload], 1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Losses:
    """The weighted total, a scalar with its graph, and each term unweighted and detached."""

    total: Tensor
    terms: Mapping[LossName, Tensor]


Term = Callable[["Objective", Tensor, Batch, float], Tensor]


class Objective:
    """Computes the losses of a batch from the student's hidden states at masked positions."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.interpolation = config.interpolation

    def denominators(self, batch: Batch) -> Denominators:
        """Return what this batch adds to the denominators of its step."""
        ce = ce_denominator(batch.labelled_per_row_B, normalization=self.config.loss_norm)
        chunks = batch.teacher.chunks
        return Denominators(
            ce=int(ce),
            candidates=len(batch.teacher.index_Q),
            chunks=0 if chunks is None else len(chunks.logprob_C),
        )

    def __call__(
        self,
        hidden_PD: Tensor,
        head_VD: Tensor,
        batch: Batch,
        denominators: Denominators,
        *,
        progress: float,
    ) -> Losses:
        """Return the batch's share of the step's losses, in nats.

        `progress` is step / max_steps. The shares of a step's batches add up to its losses.
        """
        logits_PV = functional.linear(hidden_PD, head_VD.to(hidden_PD.dtype))
        terms: dict[LossName, Tensor] = {}
        total = torch.zeros((), device=hidden_PD.device)
        for name, weight in self.config.weights.items():
            payload = PAYLOAD_OF[name]
            summed = _TERMS[name](self, logits_PV, batch, progress)
            share = summed / denominators.of(payload)
            total = total + weight * share
            terms[name] = share.detach()
        return Losses(total=total, terms=terms)


def _ce(objective: Objective, logits_PV: Tensor, batch: Batch, _progress: float) -> Tensor:
    return ce_numerators(
        ce_per_position(
            logits_PV,
            batch.labels_P,
            batch.timestep_P,
            num_draws_P=batch.teacher.num_draws_P if objective.config.counts_draws else None,
        ),
        labelled_per_row_B=batch.labelled_per_row_B,
        row_P=batch.row_P,
        normalization=objective.config.loss_norm,
    ).sum()


def _tidal(objective: Objective, logits_PV: Tensor, batch: Batch, progress: float) -> Tensor:
    teacher = batch.teacher.candidates
    assert teacher is not None
    timestep_Q = batch.timestep_P[batch.teacher.index_Q]

    def loss(student_PV: Tensor, start: int, stop: int) -> Tensor:
        return tidal_per_position(
            student_PV,
            teacher.slice(start, stop),
            timestep_Q[start:stop],
            progress=progress,
            interpolation=objective.interpolation,
            temperature=objective.config.temperature,
        ).sum()

    return summed_in_slices(at_candidates(logits_PV, batch), loss)


def _kl(direction: Direction) -> Term:
    def term(objective: Objective, logits_PV: Tensor, batch: Batch, _progress: float) -> Tensor:
        teacher = batch.teacher.candidates
        assert teacher is not None

        def loss(student_PV: Tensor, start: int, stop: int) -> Tensor:
            return kl_per_position(
                student_PV,
                teacher.slice(start, stop),
                temperature=objective.config.temperature,
                direction=direction,
            ).sum()

        return summed_in_slices(at_candidates(logits_PV, batch), loss)

    return term


def _calm(direction: Direction, *, interpolate: bool) -> Term:
    def term(objective: Objective, logits_PV: Tensor, batch: Batch, progress: float) -> Tensor:
        chunks = batch.teacher.chunks
        assert chunks is not None
        logprob_E = token_logprobs(logits_PV, batch.labels_P)[chunks.index_E]
        summed_C = torch.zeros_like(chunks.logprob_C).index_add(0, chunks.chunk_E, logprob_E)
        return calm_per_chunk(
            summed_C,
            chunks.logprob_C,
            temperature=objective.config.temperature,
            direction=direction,
            timestep_C=chunks.timestep_C,
            progress=progress,
            interpolation=objective.interpolation if interpolate else None,
        ).sum()

    return term


_TERMS: dict[LossName, Term] = {
    "ce": _ce,
    "tidal": _tidal,
    "kl": _kl("forward"),
    "reverse_kl": _kl("reverse"),
    "calm": _calm("forward", interpolate=False),
    "reverse_calm": _calm("reverse", interpolate=False),
    "calm_tidal": _calm("forward", interpolate=True),
    "reverse_calm_tidal": _calm("reverse", interpolate=True),
}


def at_candidates(values_PX: Tensor, batch: Batch) -> Tensor:
    """Return the rows of the masked positions that have candidates, (Q, X)."""
    if len(batch.teacher.index_Q) == batch.num_masked:
        return values_PX  # the common case, without a copy of (P, V)
    return values_PX.index_select(0, batch.teacher.index_Q)
