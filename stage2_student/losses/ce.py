"""The denoising cross-entropy, with its sum and its denominator to be had apart.

Each masked token's NLL counts 1/t (a row with timestep t shows only a share t of its tokens).
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


def ce_per_position(student_logits_PV: Tensor, labels_P: Tensor, timestep_P: Tensor) -> Tensor:
    """Return NLL / (t + 1e-6) at each masked position in nats, float32 (P,).

    `student_logits_PV` (P, V) with its graph, over the student's full vocabulary; `labels_P` int64
    the true ids; `timestep_P` each position's timestep. Raises DataError where lengths differ.
    """
    num_positions = len(student_logits_PV)
    check_length("labels_P", labels_P, num_positions, "masked position")
    check_length("timestep_P", timestep_P, num_positions, "masked position")
    nll_P = functional.cross_entropy(student_logits_PV.float(), labels_P, reduction="none")
    return nll_P / (timestep_P.float() + TIMESTEP_EPSILON)


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
) -> Tensor:
    """Return the normalised cross-entropy of one batch, a float32 scalar.

    `token` divides the sum by all labelled positions, `sequence` averages over rows the row's sum
    by the row's labelled positions, `batch` divides the sum by the rows. No masked or labelled
    position gives 0 with a graph. Errors: see `ce_per_position` and `ce_numerators`.
    """
    ce_P = ce_per_position(student_logits_PV, labels_P, timestep_P)
    numerators_P = ce_numerators(
        ce_P, labelled_per_row_B=labelled_per_row_B, row_P=row_P, normalization=normalization
    )
    denominator = ce_denominator(labelled_per_row_B, normalization=normalization)
    return numerators_P.sum() / denominator.clamp_min(1)
