"""TIDAL: the student against a mixture of itself and the teacher that moves towards the teacher.

The target is softmax(((1 - lambda) s + lambda z) / T) with s the student's own logits, detached:
early in training and at noisy timesteps it stays near the student, so the step is one it can make.
The mixture is one of logits, not of probabilities, which is why the teacher's tail matters: the
student's mass is scaled by exp(lambda z / T) on every id. The gradient is
w(t) T (softmax(s/T) - target) / P; a test holds autograd to it.

Shapes: P masked positions, V vocabulary. Source: arXiv 2604.26951, the TIDAL section.
"""

import torch
from torch import Tensor

from stage2_student.losses.targets import (
    Teacher,
    check_length,
    kl_rows,
    mean_over,
    shared_logits,
)
from stage2_student.schedules import Axis, Interpolation, Schedule, TimestepWeight


def mix_logits(student_PV: Tensor, teacher_PV: Tensor, lambda_P: Tensor) -> Tensor:
    """Return (1 - lambda) s + lambda z for each position, (P, V)."""
    lambda_P1 = lambda_P[:, None]
    mixed_PV = (1.0 - lambda_P1) * student_PV + lambda_P1 * teacher_PV
    # 0 * -inf is NaN, and a share of 0 must ignore even an id that the teacher rules out.
    return torch.where(lambda_P1 == 0.0, student_PV, mixed_PV)


def tidal_per_position(
    student_logits_PV: Tensor,
    teacher: Teacher,
    timestep_P: Tensor,
    *,
    progress: float,
    interpolation: Interpolation,
    temperature: float = 2.0,
) -> Tensor:
    """Return w(t) T^2 KL(target || student) at each masked position in nats, float32 (P,).

    Arguments and errors are those of `tidal_loss`; a trainer sums this over accumulated batches
    and divides once by all their positions.
    """
    check_length("timestep_P", timestep_P, len(student_logits_PV), "masked position")
    student_PV, teacher_PV = shared_logits(student_logits_PV, teacher, temperature)
    lambda_P = interpolation.lambda_P(timestep_P, progress)
    mixed_PV = mix_logits(student_PV.detach(), teacher_PV, lambda_P)
    target_PV = torch.softmax(mixed_PV / temperature, dim=-1)
    log_student_PV = torch.log_softmax(student_PV / temperature, dim=-1)
    scale_P = temperature**2 * interpolation.weight_P(timestep_P)
    return scale_P * kl_rows(target_PV, target_PV.log(), log_student_PV)


def tidal_loss(
    student_logits_PV: Tensor,
    teacher: Teacher,
    timestep_P: Tensor,
    *,
    progress: float,
    lambda_init: float = 0.1,
    lambda_max: float = 0.9,
    schedule: Schedule = "cosine",
    axis: Axis = "both",
    timestep_weight: TimestepWeight = "uniform",
    temperature: float = 2.0,
) -> Tensor:
    """Return T^2 times the mean of w(t) KL(target || student) over the masked positions.

    `student_logits_PV` (P, V) with its graph; `teacher` is a TeacherCandidates or dense logits
    (P, V_sh) with V_sh <= V; `timestep_P` in [0, 1], each position's; `progress` step / max_steps.
    The weights are not normalised: the sum is divided by P. P = 0 gives 0 with a graph. Raises
    ConfigError on an unknown word or a lambda outside [0, 1], CompatibilityError where teacher and
    student, or cache and temperature, do not fit.
    """
    interpolation = Interpolation(
        lambda_init=lambda_init,
        lambda_max=lambda_max,
        schedule=schedule,
        axis=axis,
        timestep_weight=timestep_weight,
    )
    return mean_over(
        tidal_per_position(
            student_logits_PV,
            teacher,
            timestep_P,
            progress=progress,
            interpolation=interpolation,
            temperature=temperature,
        )
    )
