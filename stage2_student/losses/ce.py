"""The denoising cross-entropy, with its sum and its denominator to be had apart.

Each masked token's NLL counts one over the probability of its mask: 1/t as published, where each
token draws its own. A chunk is masked as a whole, with probability 1 - (1 - t)^n for its n draws,
so there the published weight counts a token too often: 2.85 times at t = 0.05 and n = 3. Both are
offered (`num_draws_P`); published is the default, since published vectors pin its gradients.
Accumulated micro-batches hold different numbers of labelled tokens, so a mean of their means is not
the loss of the whole batch: sum the numerators and the denominators of `ce_numerators` and
`ce_denominator` over micro-batches and ranks, and divide once.

Shapes: B rows, P masked positions of all rows, V vocabulary. Source: arXiv 2604.26951; the three
normalisations are the published trainer's `loss_norm_type`.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from stage2_student.choices import check_choice
from stage2_student.losses.targets import check_length
from tide_cache.errors import ConfigError

Normalization = Literal["token", "sequence", "batch"]

# The published weight is 1/(t + 1e-6); timesteps are at least 1e-3.
TIMESTEP_EPSILON = 1e-6


def mask_probability(timestep_P: Tensor, num_draws_P: Tensor | None = None) -> Tensor:
    """Return how likely each position was masked, float32 (P,): 1 - (1 - t)^n, or t without draws.

    `num_draws_P` int: the tokens of which each is drawn with probability t and hides the position,
    at least 1: the labelled tokens of its chunk. Raises DataError where lengths differ.
    """
    timestep_P = timestep_P.float()
    if num_draws_P is None:
        return timestep_P
    check_length("num_draws_P", num_draws_P, len(timestep_P), "masked position")
    # 1 - (1 - t) in float32 would be off by 3e-5 at t = 1e-3. At t = 1 this is 1.
    return -torch.expm1(num_draws_P * torch.log1p(-timestep_P))


def ce_per_position(
    student_logits_PV: Tensor,
    labels_P: Tensor,
    timestep_P: Tensor,
    *,
    num_draws_P: Tensor | None = None,
) -> Tensor:
    """Return NLL / (p + 1e-6) at each masked position in nats, float32 (P,).

    `student_logits_PV` (P, V) with its graph, over the student's full vocabulary; `labels_P` int64
    the true ids; `timestep_P` each position's timestep. p is the timestep, as published; with
    `num_draws_P` it is `mask_probability`, which makes the expectation over masks that of all
    labelled tokens, each once. Raises DataError where lengths differ.
    """
    num_positions = len(student_logits_PV)
    check_length("labels_P", labels_P, num_positions, "masked position")
    check_length("timestep_P", timestep_P, num_positions, "masked position")
    nll_P = functional.cross_entropy(student_logits_PV.float(), labels_P, reduction="none")
    return nll_P / (mask_probability(timestep_P, num_draws_P) + TIMESTEP_EPSILON)


def ce_numerators(
    ce_P: Tensor,
    *,
    labelled_per_row_B: Tensor,
    row_P: Tensor | None = None,
    normalization: Normalization = "token",
) -> Tensor:
    """Return what each position adds to the numerator, float32 (P,).

    `ce_P` comes from `ce_per_position`; `labelled_per_row_B` int (B,) counts the maskable
    positions of each row; `row_P` int64 the row of each position, which only `sequence` needs:
    there a row's sum is divided by the row's own count.
    """
    check_choice("normalization", normalization, Normalization)
    if normalization != "sequence":
        return ce_P
    if row_P is None:
        raise ConfigError("row_P: the normalization 'sequence' needs each position's row, got none")
    check_length("row_P", row_P, len(ce_P), "masked position")
    return ce_P / labelled_per_row_B.clamp_min(1)[row_P]


def ce_denominator(labelled_per_row_B: Tensor, *, normalization: Normalization = "token") -> Tensor:
    """Return the batch's share of the denominator, an int64 scalar.

    `token`: its labelled positions, masked or not; `sequence` and `batch`: its rows.
    """
    check_choice("normalization", normalization, Normalization)
    if normalization == "token":
        return labelled_per_row_B.long().sum()
    return torch.tensor(len(labelled_per_row_B), device=labelled_per_row_B.device)


def ce_loss(
    student_logits_PV: Tensor,
    labels_P: Tensor,
    timestep_P: Tensor,
    *,
    labelled_per_row_B: Tensor,
    row_P: Tensor | None = None,
    normalization: Normalization = "token",
    num_draws_P: Tensor | None = None,
) -> Tensor:
    """Return the normalised cross-entropy of one batch, a float32 scalar.

    `token` divides the sum by all labelled positions, `sequence` averages over rows the row's sum
    by the row's labelled positions, `batch` divides the sum by the rows. No masked or labelled
    position gives 0 with a graph. `num_draws_P` and errors: see `ce_per_position`; errors also:
    `ce_numerators`.
    """
    ce_P = ce_per_position(student_logits_PV, labels_P, timestep_P, num_draws_P=num_draws_P)
    numerators_P = ce_numerators(
        ce_P, labelled_per_row_B=labelled_per_row_B, row_P=row_P, normalization=normalization
    )
    denominator = ce_denominator(labelled_per_row_B, normalization=normalization)
    return numerators_P.sum() / denominator.clamp_min(1)
