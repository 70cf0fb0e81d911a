"""The losses of a batch in their plain form: all logits at once, gradients by autograd.

The reference that `fused` is tested against, and what to read first. It takes several times the
memory of (P, V) logits.

Shapes: P masked positions, Q those with candidates, C active chunks, E positions in them, D hidden,
V ids.
"""

import torch
from torch import Tensor
from torch.nn import functional

from stage2_student.batches import Batch
from stage2_student.losses import (
    LossName,
    calm_per_chunk,
    ce_numerators,
    ce_per_position,
    kl_per_position,
    tidal_per_position,
    token_logprobs,
)
from stage2_student.objective import Denominators
from stage2_student.objective_config import PAYLOAD_OF, ObjectiveConfig


def plain_losses(
    hidden_PD: Tensor,
    head_VD: Tensor,
    batch: Batch,
    config: ObjectiveConfig,
    denominators: Denominators,
    *,
    progress: float,
) -> tuple[Tensor, dict[LossName, Tensor]]:
    """Return the batch's share of the step's loss, a scalar with its graph, and of each term."""
    logits_PV = functional.linear(hidden_PD, head_VD.to(hidden_PD.dtype)).float()
    terms: dict[LossName, Tensor] = {}
    total = logits_PV.new_zeros(())
    for name, weight in config.weights.items():
        if PAYLOAD_OF[name] is None:
            value_X = _ce(logits_PV, batch, config)
        elif PAYLOAD_OF[name] == "candidates":
            value_X = _distilled(name, logits_PV, batch, config, progress)
        else:
            value_X = _chunks(name, logits_PV, batch, config, progress)
        terms[name] = value_X.sum() / denominators.of(PAYLOAD_OF[name])
        total = total + weight * terms[name]
    return total, terms


def _ce(logits_PV: Tensor, batch: Batch, config: ObjectiveConfig) -> Tensor:
    draws_P = batch.teacher.num_draws_P if config.counts_draws else None
    ce_P = ce_per_position(logits_PV, batch.labels_P, batch.timestep_P, num_draws_P=draws_P)
    return ce_numerators(
        ce_P,
        labelled_per_row_B=batch.labelled_per_row_B,
        row_P=batch.row_P,
        normalization=config.loss_norm,
    )


def _distilled(
    name: LossName, logits_PV: Tensor, batch: Batch, config: ObjectiveConfig, progress: float
) -> Tensor:
    teacher, index_Q = batch.teacher.candidates, batch.teacher.index_Q
    assert teacher is not None
    if name == "tidal":
        return tidal_per_position(
            logits_PV[index_Q],
            teacher,
            batch.timestep_P[index_Q],
            progress=progress,
            interpolation=config.interpolation,
            temperature=config.temperature,
        )
    return kl_per_position(
        logits_PV[index_Q],
        teacher,
        temperature=config.temperature,
        direction="reverse" if name == "reverse_kl" else "forward",
    )


def _chunks(
    name: LossName, logits_PV: Tensor, batch: Batch, config: ObjectiveConfig, progress: float
) -> Tensor:
    chunks = batch.teacher.chunks
    assert chunks is not None
    logprob_E = token_logprobs(logits_PV, batch.labels_P)[chunks.index_E]
    return calm_per_chunk(
        torch.zeros_like(chunks.logprob_C).index_add(0, chunks.chunk_E, logprob_E),
        chunks.logprob_C,
        temperature=config.temperature,
        direction="reverse" if name.startswith("reverse") else "forward",
        timestep_C=chunks.timestep_C,
        progress=progress,
        interpolation=config.interpolation if name.endswith("tidal") else None,
    )
