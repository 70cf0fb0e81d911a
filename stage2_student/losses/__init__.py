"""The losses of stage 2 in their reference form: plain float32 torch, one function per term.

`tidal_loss`, `kl_loss` and `calm_loss` are the calls that outside programs make. Each is the mean
over a per-position (per-chunk) form, which a trainer sums over accumulated batches so as to divide
once. Published vectors pin them to 1e-5; anything faster is tested against them.
"""

from stage2_student.choices import LOSS_NAMES, LossName, canonical_loss_name
from stage2_student.losses.calm import calm_loss, calm_per_chunk, chunk_logprobs, token_logprobs
from stage2_student.losses.candidates import TeacherCandidates
from stage2_student.losses.ce import (
    Normalization,
    ce_denominator,
    ce_loss,
    ce_numerators,
    ce_per_position,
    mask_probability,
)
from stage2_student.losses.kl import Direction, kl_loss, kl_per_position
from stage2_student.losses.replay import HiddenRows, ReplayHead
from stage2_student.losses.targets import Teacher
from stage2_student.losses.tidal import tidal_loss, tidal_per_position
from tide_cache.tails import Tail

__all__ = [
    "LOSS_NAMES",
    "Direction",
    "HiddenRows",
    "LossName",
    "Normalization",
    "ReplayHead",
    "Tail",
    "Teacher",
    "TeacherCandidates",
    "calm_loss",
    "calm_per_chunk",
    "canonical_loss_name",
    "ce_denominator",
    "ce_loss",
    "ce_numerators",
    "ce_per_position",
    "chunk_logprobs",
    "kl_loss",
    "kl_per_position",
    "mask_probability",
    "tidal_loss",
    "tidal_per_position",
    "token_logprobs",
]
