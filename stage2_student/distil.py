"""The losses over a teacher's whole distribution, with their gradients in closed form.

With q = softmax(s/T) and c what one unit of the loss counts in the total, the gradients by the
student's logits s are

    tidal        c w(t) T (q - r), r = softmax(((1 - lambda) s + lambda z) / T)
    kl           c T (q - softmax(z/T))
    reverse_kl   c T q (d - sum of q d), d = log q - log softmax(z/T)

Values are computed in the order of operations of `losses.tidal` and `losses.kl`, which published
figures pin. Ids beyond the teacher's get no gradient, and no position that it
never saw.

Shapes: Q positions of a slice, R some rows of them, K candidates, V ids, W the teacher's (W <= V).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from stage2_student.losses import LossName, TeacherCandidates
from stage2_student.losses.targets import LOG_ZERO
from stage2_student.objective_config import ObjectiveConfig
from tide_cache.errors import CompatibilityError

# Stands for a logit of -inf where it is multiplied by a share that may be 0.
_LOWEST = -1e30


class Distillation:
    """One slice of positions: asked row by row, it fills in values and returns gradients.

    `values` and `agrees` are where each loss's value (nats, unweighted) and the agreement of the
    likeliest ids are written, (Q,) each; `shares` what one unit of each loss counts.
    """

    def __init__(
        self,
        teacher: TeacherCandidates,
        timestep_Q: Tensor,
        *,
        config: ObjectiveConfig,
        progress: float,
        shares: Mapping[LossName, float],
        values: Mapping[LossName, Tensor],
        agrees: Tensor | None,
        needs_gradient: bool,
    ) -> None:
        self._teacher, self._shares, self._values, self._agrees = teacher, shares, values, agrees
        self._temperature, self._needs_gradient = config.temperature, needs_gradient
        self.width = teacher.vocab_size
        seen_Q = ~torch.isneginf(teacher.logsumexp_P(config.temperature)) if shares else None
        self._seen_Q = seen_Q
        if "tidal" in shares and seen_Q is not None:
            interpolation = config.interpolation
            self._lambda_Q = interpolation.lambda_P(timestep_Q, progress) * seen_Q
            self._weight_Q = interpolation.weight_P(timestep_Q)
        # The replayed head is applied to the whole slice at once, its rows are cut up below.
        replays = bool(shares) and teacher.tail == "hidden"
        self._replayed_QW = teacher.hidden.logits() if replays and teacher.hidden else None

    def __len__(self) -> int:
        return self._teacher.num_positions

    def rows(self, rows: slice, logits_RV: Tensor) -> Tensor | None:
        """Return the gradient of the total by the logits of some rows, float32 (R, W).

        None where there is no loss, or nobody wants it. `logits_RV` float32 is left as it is.
        """
        teacher = self._teacher.slice(rows.start, rows.stop)
        if self.width > logits_RV.shape[1]:
            raise CompatibilityError(
                f"teacher: {self.width} ids, but the student has {logits_RV.shape[1]}"
            )
        student_RW = logits_RV[:, : self.width]
        if self._agrees is not None:
            best_R1 = teacher.logits_PK.argmax(dim=1, keepdim=True)
            likeliest_R = teacher.ids_PK.gather(1, best_R1)[:, 0]
            self._agrees[rows] = (student_RW.argmax(dim=1) == likeliest_R).float()
        if not self._shares:
            return None
        replayed_RW = None if self._replayed_QW is None else self._replayed_QW[rows]
        teacher_RW = teacher.dense(self._temperature, student_RW, replayed_RW)
        logq_RW = torch.log_softmax(student_RW / self._temperature, dim=-1)
        q_RW = logq_RW.exp() if self._needs_gradient else logq_RW
        gradient_RW = None
        for name in self._shares:
            term = {"tidal": self._tidal, "kl": self._kl, "reverse_kl": self._reverse_kl}[name]
            found_RW = term(rows, student_RW, teacher_RW, logq_RW, q_RW)
            gradient_RW = found_RW if gradient_RW is None else gradient_RW.add_(found_RW)
        return gradient_RW if self._needs_gradient else None

    def _tidal(
        self, rows: slice, student_RW: Tensor, teacher_RW: Tensor, logq_RW: Tensor, q_RW: Tensor
    ) -> Tensor:
        lambda_R1, weight_R = self._lambda_Q[rows, None], self._weight_Q[rows]
        mixed_RW = teacher_RW.clamp_min(_LOWEST).mul_(lambda_R1)
        mixed_RW.add_(student_RW * (1.0 - lambda_R1)).div_(self._temperature)
        target_RW = torch.softmax(mixed_RW, dim=-1)
        value_R = _kl_rows(target_RW, torch.log(target_RW, out=mixed_RW), logq_RW)
        self._values["tidal"][rows] = self._temperature**2 * weight_R * value_R
        factor_R = self._shares["tidal"] * self._temperature * weight_R
        return torch.sub(q_RW, target_RW, out=target_RW).mul_(factor_R[:, None])

    def _kl(
        self, rows: slice, student_RW: Tensor, teacher_RW: Tensor, logq_RW: Tensor, q_RW: Tensor
    ) -> Tensor:
        logp_RW = self._teacher_logprobs(rows, student_RW, teacher_RW)
        p_RW = logp_RW.exp()
        self._values["kl"][rows] = self._temperature**2 * _kl_rows(p_RW, logp_RW, logq_RW)
        return torch.sub(q_RW, p_RW, out=p_RW).mul_(self._shares["kl"] * self._temperature)

    def _reverse_kl(
        self, rows: slice, student_RW: Tensor, teacher_RW: Tensor, logq_RW: Tensor, q_RW: Tensor
    ) -> Tensor:
        logp_RW = self._teacher_logprobs(rows, student_RW, teacher_RW)
        difference_RW = logq_RW.clamp_min(LOG_ZERO).sub_(logp_RW.clamp_min_(LOG_ZERO))
        weighed_RW = logq_RW.exp().mul_(difference_RW)
        value_R = weighed_RW.sum(dim=-1)
        self._values["reverse_kl"][rows] = self._temperature**2 * value_R
        weighed_RW.addcmul_(q_RW, value_R[:, None], value=-1.0)
        return weighed_RW.mul_(self._shares["reverse_kl"] * self._temperature)

    def _teacher_logprobs(self, rows: slice, student_RW: Tensor, teacher_RW: Tensor) -> Tensor:
        assert self._seen_Q is not None
        shown_RW = torch.where(self._seen_Q[rows, None], teacher_RW, student_RW)
        return torch.log_softmax(shown_RW.div_(self._temperature), dim=-1)


def _kl_rows(p_RW: Tensor, logp_RW: Tensor, logq_RW: Tensor) -> Tensor:
    """Return KL(p || q) per row as `losses.targets.kl_rows`; `logp_RW` is used up."""
    logp_RW.clamp_min_(LOG_ZERO).sub_(logq_RW.clamp_min(LOG_ZERO))
    return logp_RW.mul_(p_RW).sum(dim=-1)
