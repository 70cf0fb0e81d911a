"""CALM: chunk likelihoods matched across two tokenizers, where no two ids mean the same.

An aligned chunk is the same bytes in both tokenizations. Its log-probability is the sum over its
tokens of log p(true token), one number on each side, and the loss is the binary cross-entropy
between the two probabilities at temperature T. So a cache needs four bytes a chunk, and they are
exact: nothing of the teacher's distribution is dropped. Probabilities are clamped to
[1e-7, 1 - 1e-7], beyond which a chunk gives no gradient: at T = 1 that is already a chunk of about
16 nats.

Shapes: P masked positions, C active chunks, V vocabulary. Source: arXiv 2604.26951, CALM.
"""

import torch
from torch import Tensor

from stage2_student.choices import check_choice
from stage2_student.losses.kl import Direction
from stage2_student.losses.targets import check_length, mean_over
from stage2_student.schedules import Axis, Interpolation, TimestepWeight
from tide_cache.errors import ConfigError

PROBABILITY_FLOOR = 1e-7


def chunk_logprobs(logits_PV: Tensor, labels_P: Tensor, chunk_P: Tensor, num_chunks: int) -> Tensor:
    """Return each chunk's log-probability in nats, float32 (C,): the sum over its tokens.

    `labels_P` int64 true ids, `chunk_P` int64 the chunk of each position, in [0, num_chunks).
    Temperature 1, over the model's full vocabulary.
    """
    token_logprob_P = token_logprobs(logits_PV, labels_P)
    return token_logprob_P.new_zeros(num_chunks).index_add(0, chunk_P, token_logprob_P)


def token_logprobs(logits_PV: Tensor, labels_P: Tensor) -> Tensor:
    """Return log p(true token) at temperature 1 in nats, float32 (P,).

    As logit - logsumexp, which needs no (P, V) of log-probabilities and is what the published
    figures were made with: log_softmax rounds otherwise, and where a chunk is nearly certain
    (1 - p = 2e-3) that alone moves its gradient by 2e-5.
    """
    logits_PV = logits_PV.float()
    return logits_PV.gather(1, labels_P[:, None])[:, 0] - torch.logsumexp(logits_PV, dim=-1)


def calm_per_chunk(
    student_logprob_C: Tensor,
    teacher_logprob_C: Tensor,
    *,
    temperature: float = 2.0,
    direction: Direction = "reverse",
    timestep_C: Tensor | None = None,
    progress: float | None = None,
    interpolation: Interpolation | None = None,
) -> Tensor:
    """Return the binary cross-entropy of each chunk in nats, float32 (C,).

    With `interpolation` (CALM-TIDAL) the teacher's probability is replaced by the detached mixture
    (1 - lambda) p_s + lambda p_t and each chunk counts w(t); without it, `timestep_C` and
    `progress` are not looked at. Errors are those of `calm_loss`; a trainer sums this over
    accumulated batches and divides once by all their chunks.
    """
    check_choice("direction", direction, Direction)
    if not 0.0 < temperature < float("inf"):
        raise ConfigError(f"temperature: expected a positive number, got {temperature}")
    check_length("teacher_logprob_C", teacher_logprob_C, len(student_logprob_C), "chunk")
    student_C = _chunk_probability(student_logprob_C, temperature)
    target_C = _chunk_probability(teacher_logprob_C.detach(), temperature)
    if interpolation is None:
        return _cross_entropy(student_C, target_C, direction)
    if timestep_C is None or progress is None:
        missing = "timestep_C" if timestep_C is None else "progress"
        raise ConfigError(f"{missing}: the interpolated chunk loss needs it, got none")
    check_length("timestep_C", timestep_C, len(student_logprob_C), "chunk")
    lambda_C = interpolation.lambda_P(timestep_C, progress)
    mixed_C = (1.0 - lambda_C) * student_C.detach() + lambda_C * target_C
    return interpolation.weight_P(timestep_C) * _cross_entropy(student_C, mixed_C, direction)


def calm_loss(
    student_logprob_C: Tensor,
    teacher_logprob_C: Tensor,
    *,
    temperature: float = 2.0,
    direction: Direction = "reverse",
    timestep_C: Tensor | None = None,
    progress: float | None = None,
    lambda_init: float = 0.1,
    lambda_max: float = 0.9,
    axis: Axis = "both",
    timestep_weight: TimestepWeight = "uniform",
    interpolate: bool = False,
) -> Tensor:
    """Return the mean chunk cross-entropy over the chunks given, a float32 scalar.

    `*_logprob_C` (C,) in nats at temperature 1, the student's with its graph. `interpolate` makes
    it CALM-TIDAL, which needs `timestep_C` and `progress` (cosine schedule; `calm_per_chunk` takes
    others) and reads the lambdas, axis and timestep weight. C = 0 gives 0 with a graph. Raises
    ConfigError on an unknown word or a missing argument, DataError where lengths differ.
    """
    interpolation = Interpolation(
        lambda_init=lambda_init, lambda_max=lambda_max, axis=axis, timestep_weight=timestep_weight
    )
    return mean_over(
        calm_per_chunk(
            student_logprob_C,
            teacher_logprob_C,
            temperature=temperature,
            direction=direction,
            timestep_C=timestep_C,
            progress=progress,
            interpolation=interpolation if interpolate else None,
        )
    )


def _chunk_probability(logprob_C: Tensor, temperature: float) -> Tensor:
    probability_C = torch.exp(logprob_C.float() / temperature)
    return probability_C.clamp(PROBABILITY_FLOOR, 1.0 - PROBABILITY_FLOOR)


def _cross_entropy(student_C: Tensor, target_C: Tensor, direction: Direction) -> Tensor:
    """Return -[a log b + (1 - a) log(1 - b)]: a is the target, or the student where reversed."""
    weight_C, scored_C = (target_C, student_C) if direction == "forward" else (student_C, target_C)
    return -(weight_C * scored_C.log() + (1.0 - weight_C) * (1.0 - scored_C).log())
