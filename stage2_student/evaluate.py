"""How well a student fills in masked tokens: NLL, and KL to the teacher, over a held-out set.

Means over masked positions at temperature 1, whole and by timestep, because a figure at t = 0.1
(nearly everything in sight) and one at 0.9 say different things. The KL runs over the ids
that both models share; it is exact where the cache holds the whole vocabulary (k = V) and rests on
the rebuilt tail elsewhere, and it is None where the set has no payload or no temperature 1.

Shapes: P masked positions, Q those with candidates, C active chunks, V ids, N timestep buckets.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from stage2_student.attention import BY_ROWS
from stage2_student.batches import Batch, BatchReader, InputForm
from stage2_student.compatibility import candidates_reading
from stage2_student.forward import batch_losses
from stage2_student.insight import NUM_BUCKETS, bucket_name, bucket_of
from stage2_student.objective import Objective
from stage2_student.objective_config import ObjectiveConfig
from stage2_student.student import Student
from stage2_student.teacher_rows import TeacherReading
from tide_cache.cache import Cache
from tide_cache.config import StrictModel
from tide_cache.errors import CompatibilityError
from tide_cache.manifest import CacheManifest
from tide_cache.payloads import open_codecs

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

logger = logging.getLogger(__name__)
_MIN_PROBABILITY = 1e-7


class EvaluationConfig(StrictModel):
    """A held-out set, and when the student is measured on it."""

    cache: str | None = Field(None, description="folder or URL of a cache or premasked set")
    every: int | None = Field(None, ge=1, description="steps; default: at the end only")
    batch_size: int = Field(64, ge=1)
    max_samples: int | None = Field(None, ge=1, description="the first so many; default: all")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Means over `num_positions` masked positions in nats; None where there is nothing to average.

    `kl` is KL(teacher || student) over the `num_payload_positions` with candidates. `chunk_kl` is
    that between the two probabilities of a chunk (right or not), over `num_chunks` active chunks.
    """

    nll: float | None
    kl: float | None
    chunk_kl: float | None
    num_positions: int
    num_payload_positions: int
    num_chunks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation(Figures):
    """The figures of a whole set, and of each quarter of the timesteps, by name `t0.00-0.25`."""

    by_timestep: dict[str, Figures]

    def as_json(self) -> dict[str, Any]:
        """Return the figures as nested JSON values."""
        return asdict(self)

    def as_metrics(self) -> dict[str, float]:
        """Return the figures that exist, flat, with names for `metrics.jsonl`."""
        named = {"": self, **{f"/{name}": figures for name, figures in self.by_timestep.items()}}
        found = {
            f"eval/{what}{suffix}": getattr(figures, what)
            for suffix, figures in named.items()
            for what in ("nll", "kl", "chunk_kl")
        }
        return {name: value for name, value in found.items() if value is not None}


@torch.no_grad()
def evaluate(
    model: "Qwen3ForCausalLM | Student",
    cache: Cache,
    *,
    batch_size: int = 64,
    views: Sequence[int] | None = None,
    max_samples: int | None = None,
    mask_token_id: int | None = None,
) -> Evaluation:
    """Measure a model on the first `max_samples` samples of some views (default: all of both).

    `mask_token_id` defaults to what the set says. Raises CompatibilityError when neither says it,
    FormatError or DataError on damaged rows. Leaves the model in the mode in which it came.
    """
    student = model if isinstance(model, Student) else Student(model)
    sums = _Sums()
    was_training, attention = student.training, student.model.config._attn_implementation
    student.eval()
    if attention == "sdpa":
        student.model.set_attn_implementation(BY_ROWS)  # the same, without pairs of rows
    try:
        reader = _reader(student, cache, mask_token_id)
        num_samples = min(max_samples or cache.num_samples, cache.num_samples)
        rows = torch.arange(num_samples).numpy()
        for view in range(cache.num_views) if views is None else views:
            for start in range(0, num_samples, batch_size):
                batch = reader.read(view, rows[start : start + batch_size])
                sums.add(batch, *_measure(student, batch))
    finally:
        student.train(was_training)
        student.model.set_attn_implementation(attention)
    return sums.evaluation()


def _measure(student: Student, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return NLL (P,), KL (Q,) and chunk KL (C,) of a batch, None where nobody answered."""
    has_candidates = batch.teacher.candidates is not None
    losses = {"ce": 1.0, "kl": 1.0} if has_candidates else {"ce": 1.0}
    objective = Objective(ObjectiveConfig(losses=losses, temperature=1.0))
    losses_of_batch, batch = batch_losses(
        student,
        batch,
        objective,
        num_ids=len(student.head_VD),
        device=student.head_VD.device,
        progress=0.0,
    )
    values = losses_of_batch.values
    chunks, chunk_kl_C = batch.teacher.chunks, None
    if chunks is not None and values.logprob_C is not None:
        chunk_kl_C = binary_kl(chunks.logprob_C, values.logprob_C)
    return values.nll_P, values.terms["kl"] if has_candidates else None, chunk_kl_C


def binary_kl(teacher_logprob_C: Tensor, student_logprob_C: Tensor) -> Tensor:
    """Return KL between the two-way distributions (p, 1 - p) of log-probs, in nats, float64 (C,).

    Probabilities are kept 1e-7 away from 0 and 1, as the published chunk losses keep them.
    """
    p_C, q_C = (
        logprob.double().exp().clamp(_MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
        for logprob in (teacher_logprob_C, student_logprob_C)
    )
    return p_C * (p_C / q_C).log() + (1 - p_C) * ((1 - p_C) / (1 - q_C)).log()


class _Sums:
    """Sums of the three figures by timestep bucket, in float64."""

    def __init__(self) -> None:
        self._sum_3N = torch.zeros(3, NUM_BUCKETS, dtype=torch.float64)
        self._count_3N = torch.zeros(3, NUM_BUCKETS, dtype=torch.int64)

    def add(
        self, batch: Batch, nll_P: Tensor, kl_Q: Tensor | None, chunk_kl_C: Tensor | None
    ) -> None:
        self._add(0, batch.timestep_P, nll_P)
        if kl_Q is not None:
            self._add(1, batch.timestep_P[batch.teacher.index_Q], kl_Q)
        if chunk_kl_C is not None and batch.teacher.chunks is not None:
            self._add(2, batch.teacher.chunks.timestep_C, chunk_kl_C)

    def _add(self, figure: int, timestep_X: Tensor, value_X: Tensor) -> None:
        bucket_X = bucket_of(timestep_X.cpu())
        self._sum_3N[figure].index_add_(0, bucket_X, value_X.double().cpu())
        self._count_3N[figure].index_add_(0, bucket_X, torch.ones_like(bucket_X))

    def evaluation(self) -> Evaluation:
        by_timestep = {
            bucket_name(i): Figures(**self._of(slice(i, i + 1))) for i in range(NUM_BUCKETS)
        }
        return Evaluation(**self._of(slice(None)), by_timestep=by_timestep)

    def _of(self, buckets: slice) -> dict[str, Any]:
        sums = self._sum_3N[:, buckets].sum(dim=1).tolist()
        counts = self._count_3N[:, buckets].sum(dim=1).tolist()
        nll, kl, chunk_kl = (s / n if n else None for s, n in zip(sums, counts, strict=True))
        return {
            "nll": nll,
            "kl": kl,
            "chunk_kl": chunk_kl,
            "num_positions": counts[0],
            "num_payload_positions": counts[1],
            "num_chunks": counts[2],
        }


def _reader(student: Student, cache: Cache, mask_token_id: int | None) -> BatchReader:
    manifest = cache.manifest
    if mask_token_id is None:
        mask_token_id = manifest.student.mask_token_id
    if mask_token_id is None:
        raise CompatibilityError(
            f"{cache.url}: student.mask_token_id: not known to this set",
            hint="pass mask_token_id",
        )
    form = InputForm(
        block_size=manifest.block_size,
        mask_token_id=mask_token_id,
        attention=student.model.config._attn_implementation,
        device=student.head_VD.device,
    )
    return BatchReader(cache, form=form, teacher=_teacher(cache))


def _teacher(cache: Cache) -> TeacherReading | None:
    manifest = cache.manifest
    if not isinstance(manifest, CacheManifest):
        return None
    codecs = open_codecs(cache.store, manifest)
    facts = manifest.candidates
    if facts is not None and 1.0 not in facts.temperatures:
        logger.warning("%s: no temperature 1 in the build: KL is not measured", cache.url)
        facts = None
    return TeacherReading(
        alignment=manifest.alignment,
        candidates=None if facts is None else candidates_reading(cache, codecs, tail="auto"),
        chunks=codecs.chunks,
    )
