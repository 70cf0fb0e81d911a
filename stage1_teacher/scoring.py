"""From a slice of logits to what a cache keeps of them.

Everything is taken in float32 from the logits as the head gave them: at T = 2 the tail can weigh
more than the candidates do, and it is rebuilt from these logsumexps. Equal logits (common where the
head runs in bfloat16, whose steps are 0.06 between 8 and 16) are listed by ascending id, so that
the order of candidates does not depend on the kernel that picked them. A slice is copied once per
temperature, so that the reduction takes up to three times the slice.

Shapes: P masked positions, K candidates, V vocabulary, T temperatures.
"""

import numpy as np
import torch

from stage1_teacher.teachers.base import NonFiniteLogitsError, Scores, ScoreSpec


def check_finite(logits_PV: torch.Tensor) -> None:
    """Raise NonFiniteLogitsError (with `row`) where a row of `logits_PV` holds NaN or infinity."""
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
    check_finite(logits_PV)
    logits_PV = logits_PV.float()
    shared_PV = logits_PV[:, : spec.vocab_size]
    topk_logits_PK, topk_ids_PK = top_candidates(shared_PV, spec.k)
    logsumexps_P = [torch.logsumexp(shared_PV / t, dim=-1) for t in spec.temperatures]
    label_logit_P = logits_PV.gather(-1, labels_P[:, None])[:, 0]
    label_logprob_P = label_logit_P - torch.logsumexp(logits_PV, dim=-1)
    return Scores(
        topk_ids_PK=topk_ids_PK.to(torch.int32).cpu().numpy(),
        topk_logits_PK=topk_logits_PK.cpu().numpy(),
        logsumexp_PT=_stack(logsumexps_P, len(logits_PV)),
        label_logprob_P=label_logprob_P.cpu().numpy(),
    )


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
