"""The two KL baselines: the student against the teacher's whole distribution, in either direction.

Forward, KL(teacher || student), covers every mode of the teacher; reverse, KL(student || teacher),
settles on one. Both run at temperature T and carry T^2, which keeps the gradient's scale when T
changes. The gradient of the forward form is T (softmax(s/T) - softmax(z/T)) / P.

Shapes: P masked positions, V vocabulary. Source: arXiv 2604.26951, the KL baselines.
"""

from typing import Literal

import torch
from torch import Tensor

from stage2_student.choices import check_choice
from stage2_student.losses.targets import Teacher, kl_rows, mean_over, shared_logits

Direction = Literal["forward", "reverse"]


def kl_per_position(
    student_logits_PV: Tensor,
    teacher: Teacher,
    *,
    temperature: float = 2.0,
    direction: Direction = "forward",
) -> Tensor:
    """Return T^2 KL at each masked position in nats, float32 (P,), over the teacher's ids.

    Arguments and errors are those of `kl_loss`; a trainer sums this over accumulated batches and
    divides once by all their positions.
    """
    check_choice("direction", direction, Direction)
    student_PV, teacher_PV = shared_logits(student_logits_PV, teacher, temperature)
    log_student_PV = torch.log_softmax(student_PV / temperature, dim=-1)
    log_teacher_PV = torch.log_softmax(teacher_PV / temperature, dim=-1)
    log_p_PV, log_q_PV = (
        (log_teacher_PV, log_student_PV)
        if direction == "forward"
        else (log_student_PV, log_teacher_PV)
    )
    return temperature**2 * kl_rows(log_p_PV.exp(), log_p_PV, log_q_PV)


def kl_loss(
    student_logits_PV: Tensor,
    teacher: Teacher,
    *,
    temperature: float = 2.0,
    direction: Direction = "forward",
) -> Tensor:
    """Return T^2 times the mean KL over the masked positions, a float32 scalar.

    `student_logits_PV` (P, V) with its graph; `teacher` is a TeacherCandidates or dense logits
    (P, V_sh) with V_sh <= V. P = 0 gives 0 with a graph. Raises ConfigError on an unknown
    direction, CompatibilityError where teacher and student, or cache and temperature, do not fit.
    """
    return mean_over(
        kl_per_position(student_logits_PV, teacher, temperature=temperature, direction=direction)
    )
