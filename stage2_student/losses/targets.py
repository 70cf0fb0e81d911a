"""What the losses over logits share: one vocabulary, a dense teacher, and a KL that stays finite.

The loss lives on the teacher's vocabulary (V_sh, the ids that both models share), so the student's
logits are cut to its width and its softmax runs over those ids alone, as the published losses do.
These are the reference forms: full (P, V) rows in float32, 0.6 MB a position at V = 151,646. The
fused twins never build them.

Shapes: P masked positions, V the teacher's vocabulary.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from stage2_student.losses.candidates import TeacherCandidates
from tide_cache.errors import CompatibilityError, ConfigError, DataError

Teacher: TypeAlias = TeacherCandidates | Tensor

# An id that one side rules out (log p = -inf) costs this many nats per unit of mass on the other:
# far below any logit, yet finite, so that one such id cannot turn a step into NaN.
LOG_ZERO = -1.0e4


def shared_logits(
    student_logits_PV: Tensor, teacher: Teacher, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return student and teacher logits over the shared ids, float32 (P, V) each.

    The student's keep their graph and are cut to the teacher's width; the teacher's are detached.
    A row without one finite teacher logit (a position the teacher never saw) becomes the student's
    own, which teaches nothing: loss and gradient 0. Raises CompatibilityError where the teacher is
    wider than the student (cut a dense teacher to the shared ids: `teacher_PV[:, :shared]`), or
    was not cached at `temperature`; DataError where the positions differ in number.
    """
    if not 0.0 < temperature < float("inf"):
        raise ConfigError(f"temperature: expected a positive number, got {temperature}")
    if isinstance(teacher, Tensor):
        _check_fit(student_logits_PV, len(teacher), teacher.shape[-1])
        teacher_PV = teacher.detach().float()
    else:
        _check_fit(student_logits_PV, teacher.num_positions, teacher.vocab_size)
        teacher_PV = teacher.dense(temperature, student_logits_PV)
    width = teacher_PV.shape[1]
    student_PV = student_logits_PV[:, :width].float()
    seen_P1 = ~torch.isneginf(teacher_PV.amax(dim=-1, keepdim=True))
    return student_PV, torch.where(seen_P1, teacher_PV, student_PV.detach())


def kl_rows(p_PV: Tensor, log_p_PV: Tensor, log_q_PV: Tensor) -> Tensor:
    """Return KL(p || q) per row in nats, float32 (P,).

    Ids with p = 0 add nothing; where q = 0 and p > 0 the true value is infinite, and a term of
    1e4 p stands for it. `p_PV` and its logarithm are both given because a KL near 0 is what is
    left of terms that cancel, so how p was rounded shows: the published figures of the
    interpolated loss (softmax, then log) and of the plain ones (log_softmax, then exp) lie up to
    9e-6 from the exact value, each reproduced to 1e-6 by its own order only.
    """
    return (p_PV * (log_p_PV.clamp_min(LOG_ZERO) - log_q_PV.clamp_min(LOG_ZERO))).sum(dim=-1)


def mean_over(values_P: Tensor) -> Tensor:
    """Return the mean of per-position values, or 0 with a graph where there is none."""
    return values_P.sum() / max(values_P.numel(), 1)


def check_length(field: str, tensor: Tensor, expected: int, what: str) -> None:
    """Raise DataError unless `tensor` has one axis with an entry per `what`."""
    if tuple(tensor.shape) != (expected,):
        raise DataError(
            f"{field}: expected shape ({expected},), one per {what}, got {tuple(tensor.shape)}"
        )


def _check_fit(student_logits_PV: Tensor, num_positions: int, width: int) -> None:
    if student_logits_PV.ndim != 2:
        raise DataError(
            "student_logits_PV: expected masked positions x vocabulary, got shape "
            f"{tuple(student_logits_PV.shape)}"
        )
    if len(student_logits_PV) != num_positions:
        raise DataError(
            f"teacher: expected {len(student_logits_PV)} masked positions as in the student's "
            f"logits, got {num_positions}"
        )
    if width > student_logits_PV.shape[1]:
        raise CompatibilityError(
            f"teacher: {width} ids, but the student has {student_logits_PV.shape[1]}",
            hint="cut the teacher's logits to the ids that both share: teacher_PV[:, :num_shared]",
        )
