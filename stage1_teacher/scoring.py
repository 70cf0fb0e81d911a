"""From a slice of logits to what a cache keeps of them.

Everything is taken in float32 from the logits as the head gave them: at T = 2 the tail can weigh
more than the candidates do, and it is rebuilt from these logsumexps. Equal logits (common where the
head runs in bfloat16, whose steps are 0.06 between 8 and 16) are listed by ascending id, so that
the order of candidates does not depend on the kernel that picked them. A slice is copied once and
exponentiated once for all temperatures: over 152,000 ids that is most of the work beside the head.

Shapes: P masked positions, K candidates, V vocabulary, T temperatures.
"""

from collections.abc import Sequence

import numpy as np
import torch

from stage1_teacher.teachers.base import NonFiniteLogitsError, Scores, ScoreSpec


def check_finite(logits_PV: torch.Tensor) -> None:
    """Raise NonFiniteLogitsError (with `row`) where a row of `logits_PV` holds NaN or infinity."""
    if bool(torch.isfinite(logits_PV.sum(dim=-1)).all()):
        return  # one pass that needs no memory; an infinite sum may still be one of finite numbers
    bad_P = ~torch.isfinite(logits_PV).all(dim=-1)
    if bool(bad_P.any()):
        row = int(bad_P.nonzero()[0, 0])
        error = NonFiniteLogitsError(f"row {row} of the teacher's logits holds NaN or infinity")
        error.row = row
        raise error


def reduce_logits(logits_PV: torch.Tensor, labels_P: torch.Tensor, spec: ScoreSpec) -> Scores:
    """Reduce logits to candidates, logsumexps and the label's log-prob.

    `logits_PV` (P, V) of any float dtype; `labels_P` int64 (P,) below V, on the same device.
    Candidates and logsumexps are over the first `spec.vocab_size` ids, the label's log-prob over
    all V. Raises NonFiniteLogitsError.
    """
    logits_PV = logits_PV.float()
    check_finite(logits_PV)
    shared_PV = logits_PV[:, : spec.vocab_size]
    topk_logits_PK, topk_ids_PK = top_candidates(shared_PV, spec.k)
    logsumexps_P = logsumexps(shared_PV, spec.temperatures)
    label_logit_P = logits_PV.gather(-1, labels_P[:, None])[:, 0]
    if 1.0 in spec.temperatures:
        others_P = torch.logsumexp(logits_PV[:, spec.vocab_size :], dim=-1)
        total_P = torch.logaddexp(logsumexps_P[spec.temperatures.index(1.0)], others_P)
    else:
        (total_P,) = logsumexps(logits_PV, (1.0,))
    label_logprob_P = label_logit_P - total_P
    return Scores(
        topk_ids_PK=topk_ids_PK.to(torch.int32).cpu().numpy(),
        topk_logits_PK=topk_logits_PK.cpu().numpy(),
        logsumexp_PT=_stack(logsumexps_P, len(logits_PV)),
        label_logprob_P=label_logprob_P.cpu().numpy(),
    )


def logsumexps(logits_PV: torch.Tensor, temperatures: Sequence[float]) -> list[torch.Tensor]:
    """Return log sum exp(logits / T) for each temperature, float32 (P,) each.

    With e = exp((z - max) / T) at the highest T, the sum at T / 2 is that of e squared, so that one
    exponential serves both. Equal to `torch.logsumexp` to a few float32 steps.
    """
    if not temperatures:
        return []
    highest = max(temperatures)
    peak_P = logits_PV.amax(dim=-1)
    e_PV = (logits_PV - peak_P[:, None]).div_(highest).exp_()
    found = {highest: e_PV.sum(dim=-1).log() + peak_P / highest}
    if highest / 2 in temperatures:
        found[highest / 2] = e_PV.square_().sum(dim=-1).log() + peak_P / (highest / 2)
    for temperature in temperatures:
        if temperature not in found:
            found[temperature] = torch.logsumexp(logits_PV / temperature, dim=-1)
    return [found[temperature] for temperature in temperatures]


def top_candidates(logits_PV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `k` largest logits and their ids, descending, ties by ascending id.

    Which of several equal logits at the k-th place are taken is the kernel's choice when k < V.
    """
    if k == logits_PV.shape[-1]:
        values_PK, ids_PK = logits_PV.sort(dim=-1, descending=True, stable=True)
        return values_PK, ids_PK
    values_PK, ids_PK = torch.topk(logits_PV, k, dim=-1)
    ids_PK, by_id_PK = ids_PK.sort(dim=-1)
    values_PK, by_value_PK = values_PK.gather(-1, by_id_PK).sort(
        dim=-1, descending=True, stable=True
    )
    return values_PK, ids_PK.gather(-1, by_value_PK)


def rows_per_slice(vocab_size: int, slice_mib: int) -> int:
    """Count the positions whose float32 logits over `vocab_size` ids fill `slice_mib` MiB."""
    return max(1, slice_mib * 2**20 // (4 * vocab_size))


def _stack(columns_P: list[torch.Tensor], num_rows: int) -> np.ndarray:
    if not columns_P:
        return np.zeros((num_rows, 0), np.float32)
    stacked: np.ndarray = torch.stack(columns_P, dim=-1).cpu().numpy()
    return stacked
