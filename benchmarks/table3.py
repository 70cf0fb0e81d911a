"""The paper's Table 3: student, autoregressive model and both teachers generate 256 tokens.

Random weights of the real sizes, one model in memory at a time, batch 1, all greedily:

- student: Qwen3-0.6B with block diffusion through the fast sampler, and once more on the plain
  reference, which is what a sampler without a cache costs;
- AR: the same Qwen3-0.6B through transformers' `generate` with its KV cache;
- WeDLM-8B: the stock Qwen3 that computes it, through the fast sampler (its keys can be kept);
- LLaDA2.0-mini: Glm4Moe, block-causal, the whole prefix at every forward: its published way.

Diffusion models commit one token a forward here, an assumption that random weights force: no token
is likely, so a threshold would commit nothing more. Tokens a forward of a trained student is a
measurement of `benchmarks.sampler --model`, and multiplies its tokens/s. Memory is the peak while
generating, weights included.

Figures of the paper on an H100 for comparison (arXiv 2604.26951, Table 3): peak 1.4, 1.2, 15.5 and
31.3 GB; student 41.0 tokens/s, AR 51.3, LLaDA2 7.8.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.peak_memory import peak, reset_peak, wait
from benchmarks.published_step import Shape
from benchmarks.step import PRESETS as STEP_PRESETS
from benchmarks.step import TEACHERS
from stage2_student.sampler import GenerationSettings, Sampler
from stage2_student.sampling.blocks import block_bounds, staircase_mask
from stage2_student.sampling.reference import generate_reference

_REAL = {"student": STEP_PRESETS["qwen3-0.6b"][0], **TEACHERS}


def _reduced(shape: Shape) -> Shape:
    """Return an eighth of the width and a quarter of the layers: the same code on a CPU."""
    return replace(
        shape,
        hidden_size=shape.hidden_size // 8,
        num_layers=max(2, shape.num_layers // 8),
        num_heads=max(2, (shape.num_heads or 16) // 8),
        num_kv_heads=1,
        head_dim=64,
        intermediate_size=(shape.intermediate_size or 3 * shape.hidden_size) // 8,
        vocab_size=8192,
    )


PRESETS: dict[str, dict[str, Shape]] = {
    "real": _REAL,
    "small": {name: _reduced(shape) for name, shape in _REAL.items()},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    parameters: int
    peak_bytes: int
    latency_s: float
    tokens_per_s: float
    ratio_to_ar: float
    tokens_per_forward: float


def main(options: argparse.Namespace) -> None:
    """Measure all rows and print them."""
    rows = measure(options)
    if options.json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        return
    sys.stdout.write(
        f"random weights, {options.new_tokens} tokens after {options.prompt_tokens}, batch 1, "
        f"{options.device}; one token a forward\n"
        f"{'':<40}{'parameters':>16}{'peak GB':>9}{'latency s':>11}{'tokens/s':>10}{'/AR':>7}\n"
    )
    for row in rows:
        sys.stdout.write(
            f"{row.name:<40}{row.parameters:>16,}{row.peak_bytes / 1e9:>9.2f}"
            f"{row.latency_s:>11.2f}{row.tokens_per_s:>10.1f}{row.ratio_to_ar:>7.2f}\n"
        )


def measure(options: argparse.Namespace) -> list[Row]:
    """Measure every model in turn; AR first, for the ratios."""
    shapes = PRESETS[options.preset]
    plans: list[tuple[str, str, Callable[[Any, argparse.Namespace], None]]] = [
        ("AR with its KV cache", "student", _autoregressive),
        ("student, fast sampler", "student", _fast),
        ("student, whole prefix at every step", "student", _plain),
        ("WeDLM-8B, fast sampler", "wedlm-8b", _fast),
        ("LLaDA2.0-mini, whole prefix at every step", "llada2-mini", _block_causal),
    ]
    rows: list[Row] = []
    for name, shape, generate in plans:
        ar_s = rows[0].latency_s if rows else None
        rows.append(_measure_one(name, shapes[shape], generate, options, ar_s))
    return rows


def _measure_one(
    name: str,
    shape: Shape,
    generate: Callable[[Any, argparse.Namespace], None],
    options: argparse.Namespace,
    ar_s: float | None,
) -> Row:
    device = torch.device(options.device)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gc.collect()
    model = shape.build(dtype=dtype, device=device).eval()
    parameters = sum(p.numel() for p in model.parameters())
    if device.type == "cuda":
        generate(model, options)  # captures graphs, tunes kernels
    seconds = []
    reset_peak(device)
    for _ in range(options.repeats):
        wait(device)
        began_s = time.perf_counter()
        generate(model, options)
        wait(device)
        seconds.append(time.perf_counter() - began_s)
    latency_s = sorted(seconds)[len(seconds) // 2]
    return Row(
        name=name,
        parameters=parameters,
        peak_bytes=peak(device),
        latency_s=latency_s,
        tokens_per_s=options.new_tokens / latency_s,
        ratio_to_ar=1.0 if ar_s is None else ar_s / latency_s,
        tokens_per_forward=1.0,
    )


def _prompt(model: Any, options: argparse.Namespace) -> list[int]:
    random = torch.Generator().manual_seed(1)
    size = (options.prompt_tokens,)
    return torch.randint(model.config.vocab_size - 1, size, generator=random).tolist()


def _settings(options: argparse.Namespace) -> GenerationSettings:
    return GenerationSettings(max_new_tokens=options.new_tokens, block_size=options.block_size)


def _fast(model: Any, options: argparse.Namespace) -> None:
    # One sampler a model: what it has captured is kept with it.
    if not hasattr(model, "benchmark_sampler"):
        model.benchmark_sampler = Sampler(
            model,
            mask_token_id=model.config.vocab_size - 1,
            eos_token_id=None,
            settings=_settings(options),
        )
    model.benchmark_sampler.generate([_prompt(model, options)])


def _plain(model: Any, options: argparse.Namespace) -> None:
    generate_reference(
        model,
        [_prompt(model, options)],
        mask_token_id=model.config.vocab_size - 1,
        eos_token_id=None,
        settings=_settings(options),
    )


@torch.no_grad()
def _autoregressive(model: Any, options: argparse.Namespace) -> None:
    prompt_1L = torch.tensor([_prompt(model, options)], device=model.device)
    model.generate(
        prompt_1L,
        attention_mask=torch.ones_like(prompt_1L),
        do_sample=False,
        min_new_tokens=options.new_tokens,
        max_new_tokens=options.new_tokens,
        use_cache=True,
        pad_token_id=0,
    )


@torch.no_grad()
def _block_causal(model: Any, options: argparse.Namespace) -> None:
    """Commit the most confident mask of the block at each forward over everything so far."""
    mask_token_id = model.config.vocab_size - 1
    prompt = _prompt(model, options)
    size = options.block_size
    ids_1L = torch.tensor([prompt], device=model.device)
    for start, end in block_bounds(len(prompt), options.new_tokens, size, "sequence_start"):
        block_1N = ids_1L.new_full((1, end - start), mask_token_id)
        ids_1L = torch.cat([ids_1L, block_1N], dim=1)
        visible_LL = staircase_mask(end, size, 0).to(model.device)
        undecided_N = torch.ones(end - start, dtype=torch.bool, device=model.device)
        for _ in range(end - start):
            logits_NV = model(
                input_ids=ids_1L,
                attention_mask=visible_LL[None, None],
                use_cache=False,
                logits_to_keep=end - start,
            ).logits[0]
            confidence_N, chosen_N = logits_NV.float().softmax(-1).max(-1)
            best = confidence_N.masked_fill(~undecided_N, -1.0).argmax()
            ids_1L[0, start + best] = chosen_N[best]
            undecided_N[best] = False
