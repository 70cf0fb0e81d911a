"""What the tables at real size will cost, before anything is spent: hours and gigabytes by step.

A build's figures are those of `tide-cache plan`. Training is counted as operations of the student
over a share of a card's peak that is an assumption (`--mfu`), evaluation as forwards at the paper's
own speed. Both are upper bounds in what is counted: every block of a row as if it had masks, every
answer as if it never ended before its last token.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import Qwen3Config

from examples.paper.cells import Cell, read_cell
from examples.paper.steps import Options, Step, overrides_of
from stage1_teacher.gpus import Gpu
from stage1_teacher.payload_config import BuildConfig
from stage1_teacher.plan_cost import Machine, plan_cost
from stage2_student.memory_plan import ModelSize, model_size
from tide_cache.cache import open_cache
from tide_cache.config import load_config
from tide_cache.errors import TideError
from tide_cache.manifest import Manifest

_MAX_SAMPLES_READ = 2048
# Qwen3-0.6B, from its public config.
_STUDENT = Qwen3Config(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
# Questions of the eight benchmarks by the most tokens of an answer (`tide-eval run --dry-run`).
_QUESTIONS = {256: 1319 + 5000 + 6511 + 12032 + 164 + 500, 3: 10042 + 14042}
_SECONDS_A_FORWARD = 6.25 / 256  # table 3: 256 tokens, one a forward, on an H100


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Hours of one GPU and bytes on disk; None where nothing can be said, with the reason."""

    hours: float | None = None
    size_bytes: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cards:
    """The GPU of the build and that of training, each with the share of its peak assumed."""

    teacher: Machine
    student: Gpu
    student_mfu: float


def project(step: Step, options: Options, cards: Cards, num_samples: int | None) -> Cost:
    """Return what a step will cost; `num_samples` projects a small prepared set to a larger one."""
    if step.stage in ("build", "train") and step.pipeline is not None and step.cell is not None:
        premasked = options.output / step.pipeline / "premasked"
        if not (premasked / "manifest.json").is_file():
            return Cost(note="not before its set is prepared, which needs no GPU")
        cell = read_cell(step.cell)
        if step.stage == "build":
            return _build_cost(cell, options, premasked, cards.teacher, num_samples)
        return training_cost(cell, open_cache(premasked).manifest, cards, num_samples)
    if step.stage == "evaluate" and step.command[0] == "tide-eval":
        return evaluation_cost()
    return Cost()


def _build_cost(
    cell: Cell, options: Options, premasked: Path, machine: Machine, num_samples: int | None
) -> Cost:
    overrides = overrides_of(options, "build", cell.pipeline)
    try:
        plan = plan_cost(
            load_config(cell.path, BuildConfig, overrides, section="build"),
            open_cache(premasked),
            machine,
            num_samples=num_samples,
            max_samples_read=_MAX_SAMPLES_READ,
        )
    except (TideError, OSError) as error:
        return Cost(note=f"not projected: {error}")
    sizes = [plan.cache_bytes(payload) for payload in plan.payloads]
    return Cost(
        hours=plan.gpu_hours(plan.operations),
        size_bytes=(min(low for low, _ in sizes), max(high for _, high in sizes)),
        note=f"{machine.gpu.name} at {machine.mfu:.0%} of its peak",
    )


def training_cost(
    cell: Cell, manifest: Manifest, cards: Cards, num_samples: int | None = None
) -> Cost:
    """Return the hours of training a Qwen3-0.6B on a set's rows for the cell's epochs."""
    samples = manifest.counts["num_samples"]
    factor = (cell.train.epochs or 1) * (num_samples or samples) / samples
    per_view = factor / manifest.num_views
    flops = training_flops(
        model_size(_STUDENT),
        num_positions=per_view * manifest.counts["num_positions"],
        num_masked=per_view * manifest.counts["num_masked_positions"],
    )
    hours = flops / (cards.student.peak_flops * cards.student_mfu) / 3600
    return Cost(hours=hours, note=f"{cards.student.name} at {cards.student_mfu:.0%} of its peak")


def training_flops(size: ModelSize, *, num_positions: float, num_masked: float) -> float:
    """Return operations of forward and backward: 6 a weight and token, both halves of each row.

    Attention's own products are left out: at 512 positions they are some percent.
    """
    return 6 * (2 * num_positions * size.layer_matrices + num_masked * size.head)


def evaluation_cost() -> Cost:
    """Return the hours of the eight benchmarks at the published protocol and the paper's speed."""
    num_forwards = sum(tokens * count for tokens, count in _QUESTIONS.items())
    return Cost(
        hours=num_forwards * _SECONDS_A_FORWARD / 3600,
        note="H100, at most: one prompt at a time, no answer ends early, 24 ms a forward",
    )
