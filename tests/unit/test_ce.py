"""The cross-entropy against its three normalisations written as loops, whole and accumulated.

Legend: B rows, P masked positions, V vocabulary.
"""

from functools import partial

import pytest
import torch

from stage2_student.losses import ce_denominator, ce_loss, ce_numerators, ce_per_position
from stage2_student.losses.ce import Normalization
from tide_cache.errors import ConfigError, DataError

P, V = 7, 23
STUDENT_PV = torch.randn(P, V, generator=torch.Generator().manual_seed(1)) * 3
TIMESTEP_P = torch.linspace(0.05, 0.95, P)
ROW_P = torch.tensor([0, 0, 0, 1, 1, 3, 3])  # row 2 has no masked position
LABELLED_B = torch.tensor([6, 4, 5, 2])
LABELS_P = torch.tensor([3, 1, 4, 1, 5, 9, 2])


def spelled_out(normalization: str) -> float:
    """Write the three normalisations as loops in float64."""
    log_p_PV = torch.log_softmax(STUDENT_PV.double(), dim=-1)
    rows: list[float] = [0.0] * len(LABELLED_B)
    for position, row in enumerate(ROW_P.tolist()):
        nll = -float(log_p_PV[position, LABELS_P[position]])
        rows[row] += nll / (float(TIMESTEP_P[position]) + 1e-6)
    if normalization == "token":
        return sum(rows) / float(LABELLED_B.sum())
    if normalization == "batch":
        return sum(rows) / len(rows)
    per_row: list[float] = [
        total / count for total, count in zip(rows, LABELLED_B.tolist(), strict=True)
    ]
    return sum(per_row) / len(rows)


@pytest.mark.parametrize("normalization", ["token", "sequence", "batch"])
def test_ce_normalizations(normalization: Normalization) -> None:
    call = partial(
        ce_loss, STUDENT_PV, LABELS_P, TIMESTEP_P, labelled_per_row_B=LABELLED_B, row_P=ROW_P
    )
    loss = call(normalization=normalization)
    assert loss.item() == pytest.approx(spelled_out(normalization), rel=1e-6)


@pytest.mark.parametrize("normalization", ["token", "sequence", "batch"])
def test_ce_of_accumulated_batches_divides_once(normalization: Normalization) -> None:
    """Batches of rows {0} and {1, 2, 3}: numerators and denominators add up to the whole."""
    numerator, denominator = torch.tensor(0.0), torch.tensor(0)
    for first, last in ((0, 0), (1, 3)):
        in_batch_P = torch.isin(ROW_P, torch.arange(first, last + 1))
        labelled_B = LABELLED_B[first : last + 1]
        ce_P = ce_per_position(STUDENT_PV[in_batch_P], LABELS_P[in_batch_P], TIMESTEP_P[in_batch_P])
        numerator += ce_numerators(
            ce_P,
            labelled_per_row_B=labelled_B,
            row_P=ROW_P[in_batch_P] - first,
            normalization=normalization,
        ).sum()
        denominator += ce_denominator(labelled_B, normalization=normalization)
    assert (numerator / denominator).item() == pytest.approx(spelled_out(normalization), rel=1e-6)


@pytest.mark.parametrize("normalization", ["token", "sequence", "batch"])
def test_ce_without_masked_positions_is_zero_with_a_graph(normalization: Normalization) -> None:
    leaf = STUDENT_PV.clone().requires_grad_()
    loss = ce_loss(
        leaf[:0],
        LABELS_P[:0],
        TIMESTEP_P[:0],
        labelled_per_row_B=torch.tensor([0, 3]),
        row_P=ROW_P[:0],
        normalization=normalization,
    )
    assert loss.item() == 0.0
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], torch.zeros(P, V))


def test_ce_names_what_is_wrong() -> None:
    call = partial(ce_loss, STUDENT_PV, labelled_per_row_B=LABELLED_B)
    with pytest.raises(ConfigError, match="row_P: the normalization 'sequence' needs"):
        call(LABELS_P, TIMESTEP_P, normalization="sequence")
    with pytest.raises(ConfigError, match=r"normalization: expected one of .*'sequence'\?"):
        call(LABELS_P, TIMESTEP_P, normalization="sequences")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"labels_P: expected shape \(7,\)"):
        call(LABELS_P[:2], TIMESTEP_P)
