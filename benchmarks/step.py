"""Seconds and memory of one training step: from a cache, and as the published trainer computes it.

Ours (`benchmarks.cached_step`): each kind of loss and payload. Beside it (`published_step`) cross
entropy alone, and with a teacher in memory. All variants run in one process, in turn and each round
from another one on, on the same batch and the same student; what is reported is the median over
rounds of the ratio within a round, to the published step without a teacher and to that with one, so
that a machine which is shared for a while slows both sides of it. Seconds are given with and
without the optimiser's update, which is the same for all. Memory is the peak above what lies there
before the step (student, teacher, the optimiser's state): activations, logits, gradients. On a GPU
the allocator counts it; on a CPU it is the kernel's high-water mark of resident memory, reset
before each variant (Linux only).

    python -m benchmarks.step                                  # a CPU, 4 layers of 512: a minute
    python -m benchmarks.step --preset qwen3-0.6b --teacher wedlm-8b      # a GPU of 80 GB
    python -m benchmarks.step --preset qwen3-0.6b --teacher llada2-mini   # a GPU of 80 GB

The presets have been run at reduced sizes on a CPU only (`--hidden-size`, `--layers` and the like
override them), not yet on a GPU at their own.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.cached_step import TeacherSizes, cached_steps
from benchmarks.peak_memory import peak, reset_peak, wait
from benchmarks.published_step import (
    Material,
    PublishedCalm,
    PublishedCrossEntropy,
    PublishedTidal,
    Shape,
    Variant,
    draw_batch,
)
from stage2_student.optimizer import OptimizerConfig, make_optimizer

_V, _SHARED = 151_936, 151_646
_SMALL = {"hidden_size": 512, "layers": 4, "vocab_size": _V, "length": 256, "rows": 2}
_SMALL |= {"prompt": 100}
PRESETS: dict[str, tuple[Shape, dict[str, Any]]] = {
    "small": (Shape(hidden_size=512, num_layers=4, vocab_size=_V), _SMALL),
    "qwen3-0.6b": (
        Shape(
            hidden_size=1024,
            num_layers=28,
            vocab_size=_V,
            head_dim=128,
            num_heads=16,
            num_kv_heads=8,
            intermediate_size=3072,
        ),
        {
            "hidden_size": 1024,
            "layers": 28,
            "vocab_size": _V,
            "length": 512,
            "rows": 8,
            "prompt": 200,
            "precision": "bf16",
        },
    ),
}
TEACHERS = {
    "wedlm-8b": Shape(
        hidden_size=4096,
        num_layers=36,
        vocab_size=_V,
        head_dim=128,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=12_288,
        tied=False,
    ),
    "llada2-mini": Shape(
        hidden_size=2048,
        num_layers=20,
        vocab_size=157_184,
        head_dim=128,
        num_heads=16,
        num_kv_heads=4,
        intermediate_size=5120,
        tied=False,
        moe=True,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Medians of one variant. Ratios are round by round: to cross entropy as published, the first
    variant, and `online_ratio` to the published step with a teacher, the second.
    """

    name: str
    loss: float
    forward_backward_s: float
    update_s: float
    step_s: float
    step_ratio: float
    forward_backward_ratio: float
    online_ratio: float
    peak_bytes: int
    peak_ratio: float

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


def measure(variants: Sequence[Variant], *, repeats: int, device: torch.device) -> list[Measured]:
    """Time all variants in turn and read each one's peak memory. The first round is not counted."""
    losses, peaks = {}, {}
    for variant in variants:
        peaks[variant.name], losses[variant.name] = _peak_of(variant, device)
    seconds: dict[str, list[tuple[float, float]]] = {variant.name: [] for variant in variants}
    for round_number in range(repeats):
        first = round_number % len(variants)
        for variant in (*variants[first:], *variants[:first]):
            seconds[variant.name].append(_timed(variant, device))
    base, online = (seconds[variant.name] for variant in variants[:2])
    base_peak = peaks[variants[0].name]
    return [
        Measured(
            name=name,
            loss=losses[name],
            forward_backward_s=statistics.median(work for work, _ in taken),
            update_s=statistics.median(update for _, update in taken),
            step_s=statistics.median(sum(both) for both in taken),
            step_ratio=_ratio([sum(both) for both in taken], [sum(both) for both in base]),
            forward_backward_ratio=_ratio([work for work, _ in taken], [work for work, _ in base]),
            online_ratio=_ratio([sum(both) for both in taken], [sum(both) for both in online]),
            peak_bytes=peaks[name],
            peak_ratio=peaks[name] / base_peak,
        )
        for name, taken in seconds.items()
    ]


def _ratio(seconds: list[float], base: list[float]) -> float:
    return statistics.median(mine / other for mine, other in zip(seconds, base, strict=True))


def _timed(variant: Variant, device: torch.device) -> tuple[float, float]:
    wait(device)
    began_s = time.perf_counter()
    variant.forward_backward()
    wait(device)
    middle_s = time.perf_counter()
    variant.update()
    wait(device)
    return middle_s - began_s, time.perf_counter() - middle_s


def _peak_of(variant: Variant, device: torch.device) -> tuple[int, float]:
    """Return a whole step's peak bytes above what lay there before, and its loss."""
    variant.forward_backward()  # what is made once (states, workspaces) is not a step's
    variant.update()
    wait(device)
    gc.collect()
    before = reset_peak(device)
    loss = variant.forward_backward()
    variant.update()
    wait(device)
    return peak(device) - before, float(loss)


def student_shape(options: argparse.Namespace) -> Shape:
    """Return the preset's student in the sizes asked for."""
    shape, values = PRESETS[options.preset]
    narrower = options.hidden_size != values["hidden_size"]
    scaled: dict[str, Any] = {
        "num_heads": None,
        "num_kv_heads": None,
        "intermediate_size": None,
        "head_dim": 64,
    }
    return replace(
        shape,
        hidden_size=options.hidden_size,
        num_layers=options.layers,
        vocab_size=options.vocab_size,
        **(scaled if narrower else {}),
    )


def teacher_shape(options: argparse.Namespace, student: Shape) -> Shape:
    """Return the named teacher, or one with four times the parameters in each layer."""
    if options.teacher in TEACHERS:
        shape = TEACHERS[options.teacher]
        reduced = options.vocab_size != _V
        return replace(
            shape,
            vocab_size=options.vocab_size if reduced else shape.vocab_size,
            num_layers=options.teacher_layers or shape.num_layers,
        )
    widths = ("hidden_size", "num_heads", "num_kv_heads", "intermediate_size")
    given = {name: getattr(student, name) for name in widths}
    twice: dict[str, Any] = {name: 2 * width for name, width in given.items() if width}
    return replace(student, **twice)


def make_variants(options: argparse.Namespace) -> tuple[list[Variant], dict[str, Any]]:
    """Build models, batch and variants; and say what they are."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    shape = student_shape(options)
    student = shape.build(dtype=torch.float32, device=device).train()
    batch = draw_batch(
        num_rows=options.rows,
        length=options.length,
        prompt_length=options.prompt,
        vocab_size=options.vocab_size,
        block_size=options.block_size,
        timesteps=options.timesteps,
        device=device,
    )
    material = Material(
        student=student,
        optimizer=make_optimizer(student, OptimizerConfig()),
        batch=batch,
        autocast=options.precision == "bf16",
    )
    teacher_dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    teacher_of = teacher_shape(options, shape)
    teacher = teacher_of.build(dtype=teacher_dtype, device=device).eval().requires_grad_(False)
    online = PublishedCalm if teacher_of.moe else PublishedTidal
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": options.precision,
        "student": _parameters(student),
        "teacher": _parameters(teacher),
        "teacher_bytes": sum(p.nbytes for p in teacher.parameters()),
        "positions": 2 * batch.ids_BL.numel(),
        "masked_positions": int(batch.masked_BL.sum()),
    }
    sizes = TeacherSizes(
        k=options.k,
        hidden_size=teacher_of.hidden_size,
        components=max(1, teacher_of.hidden_size // 5),
        vocab_size=min(_SHARED, options.vocab_size - 2),
    )
    ours = cached_steps(material, sizes)
    facts["tokens_computed"] = ours[0].batch.input_ids_1N.shape[1]
    return [PublishedCrossEntropy(material), online(material, teacher), *ours], facts


def _parameters(model: torch.nn.Module) -> dict[str, int]:
    layers: Any = model.model.layers  # type: ignore[union-attr]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_in_layers": sum(p.numel() for p in layers.parameters()),
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds and memory of one training step.")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument(
        "--teacher",
        choices=["four-times", *TEACHERS],
        default="four-times",
        help="four-times: the student's shape at twice its width, 4x the parameters in the layers",
    )
    parser.add_argument("--teacher-layers", type=int, help="of a named teacher (its own)")
    parser.add_argument("--hidden-size", type=int, help="of the student")
    parser.add_argument("--layers", type=int, help="of the student")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--length", type=int, help="positions of a row")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--prompt", type=int, help="unlabelled positions of a row")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--k", type=int, default=64, help="candidates of a position (64)")
    parser.add_argument("--timesteps", type=float, nargs="+", default=[0.35, 0.65])
    parser.add_argument("--repeats", type=int, default=7, help="rounds (7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["float32", "bf16"], help="bf16: autocast")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    for name, value in {"precision": "float32", **PRESETS[options.preset][1]}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.hidden_size % 64:
        parser.error("--hidden-size: expected a multiple of 64")
    if options.prompt >= options.length:
        parser.error("--prompt: expected less than --length")
    return options


def main() -> None:
    """Parse the command line, measure and print."""
    options = _parse()
    torch.set_num_threads(options.threads)
    variants, facts = make_variants(options)
    found = measure(variants, repeats=options.repeats, device=torch.device(options.device))
    if options.json:
        figures = {**facts, "variants": [each.as_json() for each in found]}
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        return
    for name, value in facts.items():
        sys.stdout.write(f"{name}: {value}\n")
    sys.stdout.write(
        f"{'':<50}{'step s':>9}{'/CE':>7}{'/online':>9}{'fwd+bwd s':>11}{'/CE':>7}{'update s':>10}"
        f"{'peak GB':>9}{'/CE':>7}\n"
    )
    for each in found:
        sys.stdout.write(
            f"{each.name:<50}{each.step_s:>9.3f}{each.step_ratio:>7.2f}{each.online_ratio:>9.2f}"
            f"{each.forward_backward_s:>11.3f}{each.forward_backward_ratio:>7.2f}"
            f"{each.update_s:>10.3f}{each.peak_bytes / 1e9:>9.2f}{each.peak_ratio:>7.2f}\n"
        )


if __name__ == "__main__":
    main()
