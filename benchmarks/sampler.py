"""Tokens a second of the sampler: the plain reference, the fast one, and the fast one by threshold.

All in one process on the same model and prompts, in turn and each round from another one on; what
is reported is the median over rounds of the ratio within a round, so that a machine which is shared
slows both sides of it. Forwards and positions are counted where they happen, in the transformer.
What a threshold gives is compared with one token a forward, token by token; on random weights,
where no token is likely, that says little, so name a trained student and prompts that it knows.

    python -m benchmarks.sampler                              # random weights, a CPU: minutes
    python -m benchmarks.teacher -o runs/benchmark/code       # a student that knows its text
    python -m benchmarks.sampler --model runs/benchmark/code/teacher/final \
        --prompts runs/benchmark/code/held_out.jsonl --prompt-tokens 64
    python -m benchmarks.sampler --table3 --preset real       # a GPU of 80 GB: models in turn

`--table3` measures what the paper's Table 3 does (`benchmarks.table3`). It has been run at reduced
sizes on a CPU only, as has everything here: not yet on a GPU.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3ForCausalLM

from benchmarks import table3
from benchmarks.peak_memory import wait
from benchmarks.published_step import Shape
from stage2_student.sampler import GenerationSettings, Sampler, load_for_generation
from stage2_student.sampling.prompts import read_prompts, render
from stage2_student.sampling.reference import generate_reference

_PER_TOKENS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The model on trial and what it is asked."""

    model: Qwen3ForCausalLM
    prompts: list[list[int]]
    mask_token_id: int
    eos_token_id: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A way to generate; returns the new ids of each prompt."""

    name: str
    run: Callable[[], list[list[int]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One variant: medians over rounds, costs, and how far its tokens agree with one a forward.

    `speedup` is over the reference. `forwards` counts calls of the transformer for all prompts at
    once where they share a batch.
    """

    name: str
    tokens_per_s: float
    speedup: float
    forwards_per_256_tokens: float
    positions_per_256_tokens: float
    equal_tokens: float
    equal_answers: float


def random_subject(options: argparse.Namespace) -> Subject:
    """Build a Qwen3 with random weights, and prompts of random ids of one length."""
    torch.manual_seed(0)
    shape = Shape(
        hidden_size=options.hidden_size, num_layers=options.layers, vocab_size=options.vocab_size
    )
    model = shape.build(dtype=torch.float32, device=torch.device(options.device)).eval()
    assert isinstance(model, Qwen3ForCausalLM)
    size = (options.num_prompts, options.prompt_tokens)
    prompts = torch.randint(options.vocab_size - 1, size).tolist()
    return Subject(
        model=model, prompts=prompts, mask_token_id=options.vocab_size - 1, eos_token_id=None
    )


def trained_subject(options: argparse.Namespace) -> Subject:
    """Load a student; its prompts are lines of a file, cut to `--prompt-tokens`."""
    student = load_for_generation(options.model, device=options.device)
    conversations = islice(read_prompts(options.prompts), options.num_prompts)
    prompts = [
        render(student.tokenizer, each, is_raw=False, has_empty_think_block=False)
        for each in conversations
    ]
    return Subject(
        model=student.model,
        prompts=[prompt[-options.prompt_tokens :] for prompt in prompts],
        mask_token_id=student.mask_token_id,
        eos_token_id=student.eos_token_id,
    )


def make_variants(subject: Subject, options: argparse.Namespace) -> list[Variant]:
    """Return the reference first, then one token a forward, then each threshold."""
    common = {
        "max_new_tokens": options.new_tokens,
        "block_size": options.block_size,
        "block_origin": options.block_origin,
    }

    def reference() -> list[list[int]]:
        return generate_reference(
            subject.model,
            subject.prompts,
            mask_token_id=subject.mask_token_id,
            eos_token_id=subject.eos_token_id,
            settings=GenerationSettings(**common),
            batch_size=options.batch_size,
        )

    def fast(**changed: Any) -> Callable[[], list[list[int]]]:
        sampler = Sampler(
            subject.model,
            mask_token_id=subject.mask_token_id,
            eos_token_id=subject.eos_token_id,
            settings=GenerationSettings(**common, **changed),
        )
        return lambda: [
            answer.ids
            for answer in sampler.generate(subject.prompts, batch_size=options.batch_size)
        ]

    return [
        Variant(name="reference", run=reference),
        Variant(name="one token a forward", run=fast()),
        *(Variant(name=f"threshold {t:g}", run=fast(threshold=t)) for t in options.thresholds),
    ]


def measure(subject: Subject, variants: list[Variant], repeats: int) -> list[Measured]:
    """Time all variants in turn. The first run of each counts forwards and is not timed."""
    answers, counts = {}, {}
    for variant in variants:
        counts[variant.name], answers[variant.name] = _counted(subject.model, variant)
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for round_number in range(repeats):
        first = round_number % len(variants)
        for variant in (*variants[first:], *variants[:first]):
            seconds[variant.name].append(_timed(subject.model.device, variant))
    base_name, one_name = (variant.name for variant in variants[:2])
    base_tokens = _num_tokens(answers[base_name])
    found = []
    for name, taken in seconds.items():
        num_tokens = _num_tokens(answers[name])
        per_s = [num_tokens / s for s in taken]
        base_per_s = [base_tokens / s for s in seconds[base_name]]
        forwards, positions = counts[name]
        equal_tokens, equal_answers = _agreement(answers[name], answers[one_name])
        found.append(
            Measured(
                name=name,
                tokens_per_s=statistics.median(per_s),
                speedup=statistics.median(a / b for a, b in zip(per_s, base_per_s, strict=True)),
                forwards_per_256_tokens=forwards * _PER_TOKENS / num_tokens,
                positions_per_256_tokens=positions * _PER_TOKENS / num_tokens,
                equal_tokens=equal_tokens,
                equal_answers=equal_answers,
            )
        )
    return found


def _counted(model: Qwen3ForCausalLM, variant: Variant) -> tuple[tuple[int, int], list[list[int]]]:
    """Run once; returns forwards and positions of the transformer, and the answers."""
    sizes: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(kwargs["input_ids"].numel())

    hook = model.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        answers = variant.run()
    finally:
        hook.remove()
    return (len(sizes), sum(sizes)), answers


def _timed(device: torch.device, variant: Variant) -> float:
    wait(device)
    began_s = time.perf_counter()
    variant.run()
    wait(device)
    return time.perf_counter() - began_s


def _num_tokens(answers: list[list[int]]) -> int:
    return sum(map(len, answers))


def _agreement(answers: list[list[int]], base: list[list[int]]) -> tuple[float, float]:
    """Return the share of the base's tokens, and of its answers, that are the same."""
    equal = sum(
        a == b
        for mine, other in zip(answers, base, strict=True)
        for a, b in zip(mine, other, strict=False)
    )
    whole = sum(mine == other for mine, other in zip(answers, base, strict=True))
    return equal / _num_tokens(base), whole / len(base)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokens a second of the sampler.")
    parser.add_argument("--model", help="a trained student; default: random weights")
    parser.add_argument("--prompts", type=Path, help="its prompts: a file as tide-eval takes it")
    parser.add_argument("--hidden-size", type=int, default=256, help="of random weights (256)")
    parser.add_argument("--layers", type=int, default=4, help="of random weights (4)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of random weights (4,096)")
    parser.add_argument("--num-prompts", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument(
        "--block-origin", choices=["prompt_end", "sequence_start"], default="prompt_end"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="as the published protocol (1)")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.9, 0.7])
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--table3", action="store_true", help="student, AR and teachers instead")
    parser.add_argument(
        "--preset", choices=sorted(table3.PRESETS), default="small", help="sizes of --table3"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if (options.model is None) != (options.prompts is None):
        parser.error("--model and --prompts go together")
    return options


def main() -> None:
    """Parse the command line, measure and print."""
    options = _parse()
    torch.set_num_threads(options.threads)
    if options.table3:
        table3.main(options)
        return
    subject = random_subject(options) if options.model is None else trained_subject(options)
    facts = {
        "device": options.device,
        "threads": options.threads,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "prompts": len(subject.prompts),
        "prompt_tokens": sum(map(len, subject.prompts)),
        "weights": "random" if options.model is None else "trained",
    }
    found = measure(subject, make_variants(subject, options), options.repeats)
    if options.json:
        figures = {**facts, "variants": [asdict(each) for each in found]}
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        return
    for name, value in facts.items():
        sys.stdout.write(f"{name}: {value}\n")
    sys.stdout.write(
        f"{'':<22}{'tokens/s':>10}{'/reference':>12}{'forwards/256':>14}{'positions/256':>15}"
        f"{'tokens equal':>14}{'answers equal':>15}\n"
    )
    for each in found:
        sys.stdout.write(
            f"{each.name:<22}{each.tokens_per_s:>10.1f}{each.speedup:>12.2f}"
            f"{each.forwards_per_256_tokens:>14.1f}{each.positions_per_256_tokens:>15,.0f}"
            f"{each.equal_tokens:>14.3f}{each.equal_answers:>15.3f}\n"
        )


if __name__ == "__main__":
    main()
