"""One row of float32 per wanted position: the only thing that leaves the engine's worker.

vLLM carries one float tensor per prompt. A row holds K logits, their K ids (exact: float32 counts
to 2^24, more than any vocabulary here), T logsumexps, the label's log-prob, and 1 or 0 for whether
all logits were finite; a worker that raised would take the engine down. The numbers are those of
`scoring.reduce_logits`, called in the worker. At K = 64 a row is 528 bytes, beside 608 kB of logits
over 152,000 ids.

Shapes: P wanted positions, K candidates, T temperatures, V vocabulary.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stage1_teacher.teachers.base import FloatArray, Scores, ScoreSpec
from tide_cache.errors import CompatibilityError

if TYPE_CHECKING:
    import torch

MAX_VOCAB_SIZE = 1 << 24


def check_ids_are_exact(vocab_size: int, teacher: str) -> None:
    """Refuse a vocabulary whose ids float32 does not hold. Raises CompatibilityError."""
    if vocab_size > MAX_VOCAB_SIZE:
        raise CompatibilityError(
            f"teacher.backend: vllm: expected at most {MAX_VOCAB_SIZE} ids, which float32 holds "
            f"exactly, got {vocab_size} of {teacher}",
            hint="set teacher.backend: hf",
        )


def num_columns(spec: ScoreSpec) -> int:
    """Count the values of a row."""
    return 2 * spec.k + len(spec.temperatures) + 2


def pack_answers(
    logits_PV: "torch.Tensor", labels_P: "torch.Tensor", spec: ScoreSpec
) -> "torch.Tensor":
    """Reduce logits (P, V) to rows. Returns float32 (P, `num_columns`) on the CPU."""
    import torch

    from stage1_teacher.scoring import reduce_logits

    finite_P = torch.isfinite(logits_PV).all(dim=-1)
    scores = reduce_logits(logits_PV.masked_fill(~finite_P[:, None], 0.0), labels_P, spec)
    columns = [
        scores.topk_logits_PK,
        scores.topk_ids_PK.astype(np.float32),
        scores.logsumexp_PT,
        scores.label_logprob_P[:, None],
        finite_P.cpu().numpy().astype(np.float32)[:, None],
    ]
    return torch.from_numpy(np.concatenate(columns, axis=1))


def unpack_answers(rows_PC: FloatArray, spec: ScoreSpec) -> tuple[Scores, npt.NDArray[np.bool_]]:
    """Take rows apart. Returns the scores and which rows are of finite logits, bool (P,)."""
    assert rows_PC.dtype == np.float32 and rows_PC.shape[1] == num_columns(spec)
    k, num_temperatures = spec.k, len(spec.temperatures)
    scores = Scores(
        topk_ids_PK=rows_PC[:, k : 2 * k].astype(np.int32),
        topk_logits_PK=np.ascontiguousarray(rows_PC[:, :k]),
        logsumexp_PT=np.ascontiguousarray(rows_PC[:, 2 * k : 2 * k + num_temperatures]),
        label_logprob_P=np.ascontiguousarray(rows_PC[:, -2]),
    )
    return scores, rows_PC[:, -1] > 0.5
