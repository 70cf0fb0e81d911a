"""What a build will cost, before anything is spent: tokens, operations, GPU-hours, gigabytes.

Needs the premasked set and the teacher's `config.json`; no weights, no GPU. Tokens are counted by
laying rows out as the teacher will (`token_count`), operations on the teacher's own class
(`teachers.model_cost`), hours by a share of a GPU's peak that is an assumption, not a measurement.
Padding and masked pairs are computed like all others and so are counted.
"""

import dataclasses
import math
from pathlib import Path

import torch

from stage1_teacher.build_plan import check_fit
from stage1_teacher.gpus import Gpu
from stage1_teacher.payload_config import BuildConfig
from stage1_teacher.payload_sizes import PayloadSize, expected_sizes, measured_sizes
from stage1_teacher.teachers.checkpoint import open_checkpoint
from stage1_teacher.teachers.families import find_family, resolve_layout
from stage1_teacher.teachers.layouts import LayoutSpec
from stage1_teacher.teachers.model_cost import ModelCost, measure_model
from stage1_teacher.token_count import SetCount, TokenCount, count_set
from tide_cache.cache import Cache
from tide_cache.errors import ConfigError

# Of a GPU's memory, what weights may take: the rest is for activations and masks.
_WEIGHTS_SHARE = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The GPU that is planned with; `mfu`: the share of its peak that is assumed to be reached."""

    gpu: Gpu
    mfu: float
    usd_per_gpu_hour: float | None

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"--mfu: expected a share in (0, 1], got {self.mfu}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Operations:
    """Floating-point operations of a run, by part."""

    body: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.body + self.attention + self.head


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CostPlan:
    """A build's cost. Counts, tokens and operations are those of `num_samples` samples."""

    config: BuildConfig
    premasked_url: str
    alignment: str
    layout: str
    family: str
    model: ModelCost
    machine: Machine
    num_views: int
    num_samples_of_set: int
    num_samples: int
    num_masked_positions: int
    num_payload_entries: int
    row_bytes: float
    tokens: SetCount
    payloads: tuple[PayloadSize, ...]

    @property
    def factor(self) -> float:
        """How many times the set the projection is for."""
        return self.num_samples / self.num_samples_of_set

    @property
    def operations(self) -> Operations:
        """Operations as configured, calibration included."""
        return self.operations_of(
            self.tokens.configured.times(self.factor), self.tokens.calibration
        )

    @property
    def separate_operations(self) -> Operations:
        """Operations of plain separate passes, calibration included."""
        return self.operations_of(self.tokens.separate.times(self.factor), self.tokens.calibration)

    def operations_of(self, *counts: TokenCount) -> Operations:
        """Return the operations of forwards."""
        total = sum(counts, TokenCount())
        return Operations(
            body=self.model.body_flops(total.num_computed),
            attention=self.model.attention_flops(total.num_pairs),
            head=self.model.head_flops(total.num_scored),
        )

    @property
    def weights_bytes(self) -> int:
        """The weights in the type of the config."""
        dtype: torch.dtype = getattr(torch, self.config.teacher.dtype)
        return self.model.num_parameters * dtype.itemsize

    @property
    def num_gpus(self) -> int:
        """GPUs over which the weights must be spread; they take turns."""
        return math.ceil(self.weights_bytes / (_WEIGHTS_SHARE * self.machine.gpu.memory_bytes))

    def gpu_hours(self, operations: Operations) -> float | None:
        """Return the hours of a GPU, times GPUs that take turns; None in float32: no peak known."""
        if self.config.teacher.dtype == "float32":
            return None
        per_hour = 3600 * self.machine.gpu.peak_flops * self.machine.mfu
        return self.num_gpus * operations.total / per_hour

    def cache_bytes(self, payload: PayloadSize) -> tuple[float, float]:
        """Return what a cache with this payload takes, lowest and highest, rows included."""
        fixed = self.row_bytes + payload.once_bytes
        return (
            fixed + payload.low_bytes * self.num_payload_entries,
            fixed + payload.high_bytes * self.num_payload_entries,
        )


def plan_cost(
    config: BuildConfig,
    premasked: Cache,
    machine: Machine,
    *,
    num_samples: int | None = None,
    max_samples_read: int,
    calibration_path: Path | None = None,
) -> CostPlan:
    """Count and project. `num_samples`: of another set like this one; default: this one.

    Raises as a build does where set, teacher and payload do not fit together.
    """
    checkpoint = open_checkpoint(config.teacher.model, config.teacher.revision, need_weights=False)
    manifest, calibration = check_fit(config, premasked, checkpoint)
    model = measure_model(checkpoint)
    family = find_family(checkpoint)
    layout = resolve_layout(config.teacher.attention, family)
    tokens = count_set(
        config,
        premasked,
        LayoutSpec(
            layout=layout,
            block_size=config.teacher.block_size,
            mask_token_id=0,  # which id it is costs nothing
            shared=config.teacher.passes == "shared",
        ),
        calibration,
        max_samples=max_samples_read,
    )
    if calibration_path is not None:
        payloads = measured_sizes(calibration_path, config, manifest.alignment)
    else:
        payloads = expected_sizes(
            config,
            manifest.alignment,
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size if calibration is None else calibration.vocab_size,
        )
    counts = manifest.counts
    factor = 1.0 if num_samples is None else num_samples / tokens.num_samples
    entries = counts.get("num_payload_positions", 0) + counts.get("num_active_chunks", 0)
    return CostPlan(
        config=config,
        premasked_url=premasked.url,
        alignment=manifest.alignment,
        layout=str(layout),
        family=family.name,
        model=model,
        machine=machine,
        num_views=premasked.num_views,
        num_samples_of_set=tokens.num_samples,
        num_samples=num_samples or tokens.num_samples,
        num_masked_positions=round(factor * counts.get("num_masked_positions", 0)),
        num_payload_entries=round(factor * entries),
        row_bytes=factor * counts.get("size_bytes", 0),
        tokens=tokens,
        payloads=tuple(payloads),
    )
