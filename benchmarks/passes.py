"""What sharing the clean half saves: `passes: shared` beside `passes: separate`, measured.

One random Qwen3, asked both ways about the same samples: 4 views of each, 2 CompDemo halves of
each view, masks drawn as `tide-cache prepare` draws them. Both ways run in one process, in turn,
and the median is taken, of the clock and, since a machine may be shared, of this process's share
of the processor (which says nothing of a GPU). Beside each measurement stands what counts alone
predict (as `tide-cache plan` does), and the largest difference between the scores.

Sharing saves tokens, not attention: one long sequence has about as many (query, key) pairs as
eight short ones, and the dense mask has all of them computed. So a narrow model gains less than its
tokens say, and the less the longer the text (512 tokens, d = 256: 2.69 times fewer tokens, 1.48
times as fast); at d = 4,096 body and tokens decide.

    python -m benchmarks.passes                                        # a CPU, some minutes
    python -m benchmarks.passes --hidden-size 2048 --layers 28 --vocab-size 151936 --samples 32
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stage1_teacher.premask import Noising, PreparedSample, draw_rows
from stage1_teacher.questions import ask
from stage1_teacher.teachers.base import ScoreRequest, Scores, ScoreSpec, TeacherConfig
from stage1_teacher.teachers.hf import HfTeacher, load_hf_teacher
from stage1_teacher.teachers.model_cost import ModelCost, count_model
from stage1_teacher.token_count import TokenCount, count_call
from tide_cache.timesteps import timestep_grid

_WAYS = ("shared", "separate")
_K, _TEMPERATURES = 16, (1.0, 2.0)


def make_teachers(options: argparse.Namespace, folder: Path) -> dict[str, HfTeacher]:
    """Save a random Qwen3 and load it once; the two ways of asking share its weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=max(1, options.hidden_size // 128),
        head_dim=64,
        tie_word_embeddings=True,
        # Logits of a spread near 1, as of a teacher that says something.
        initializer_range=options.hidden_size**-0.5,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    shared = load_hf_teacher(
        TeacherConfig(
            model=str(folder),
            attention=options.attention,
            dtype=options.dtype,
            device=options.device,
            block_size=options.block_size,
            mask_token_id=options.vocab_size - 1,
            token_budget=options.token_budget,
        )
    )
    separate = HfTeacher(
        shared.model,
        identity=shared.identity,
        layout=dataclasses.replace(shared.layout, shared=False),
        mask_by_layer_type=True,
        token_budget=options.token_budget,
        head_slice_mib=256,
    )
    return {"shared": shared, "separate": separate}


def make_requests(options: argparse.Namespace, length: int) -> list[ScoreRequest]:
    """Draw samples of about `length` tokens (`--ragged`: from half of it on) with their masks."""
    random = np.random.default_rng(length)
    noising = Noising(
        seed=0,
        num_views=options.views,
        grid_G=timestep_grid(32, 0.001, 1.0),
        demo_ratio=0.5,
    )
    requests = []
    for number in range(options.samples):
        num_tokens = int(random.integers(length // 2, length + 1)) if options.ragged else length
        ids_L = random.integers(0, options.vocab_size - 1, num_tokens).astype(np.int32)
        sample = PreparedSample(
            sample_id=f"{length:016x}{number:016x}",
            source="random",
            student_ids_L=ids_L,
            prompt_length=round(options.prompt_share * num_tokens),
            teacher_ids_L=ids_L,
            alignment_RX=np.array([[0, 0, num_tokens]], dtype=np.int32),
        )
        requests.append(ask(draw_rows(sample, noising), comp_demo=True).request)
    return requests


def measure_length(
    options: argparse.Namespace, teachers: dict[str, HfTeacher], cost: ModelCost, length: int
) -> dict[str, Any]:
    """Time both ways on samples of one length, and count what each runs."""
    requests = make_requests(options, length)
    spec = ScoreSpec(k=_K, temperatures=_TEMPERATURES, vocab_size=options.vocab_size - 1)
    taken: dict[str, list[float]] = {way: [] for way in _WAYS}
    processor: dict[str, list[float]] = {way: [] for way in _WAYS}
    answers: dict[str, list[list[Scores]]] = {}
    for round_number in range(options.repeats + 1):
        for way in _WAYS:
            _wait(options.device)
            began_s, processor_s = time.perf_counter(), time.process_time()
            answers[way] = teachers[way].score(requests, spec)
            _wait(options.device)
            if round_number:  # the first round warms up
                taken[way].append(time.perf_counter() - began_s)
                processor[way].append(time.process_time() - processor_s)
    processor_seconds = {way: statistics.median(processor[way]) for way in _WAYS}
    seconds = {way: statistics.median(taken[way]) for way in _WAYS}
    counts = {
        way: count_call(requests, teacher.layout, options.token_budget)
        for way, teacher in teachers.items()
    }
    operations = {way: _operations(cost, count) for way, count in counts.items()}
    num_rows = options.samples * options.views
    return {
        "length": length,
        "samples": options.samples,
        **{f"{way}_ms_per_row": round(1e3 * seconds[way] / num_rows, 2) for way in _WAYS},
        **{
            f"{way}_processor_ms_per_row": round(1e3 * processor_seconds[way] / num_rows, 2)
            for way in _WAYS
        },
        **{f"{way}_tokens_per_row": round(counts[way].num_tokens / num_rows, 1) for way in _WAYS},
        **{f"{way}_padding": round(counts[way].padding_share, 4) for way in _WAYS},
        **{f"{way}_forwards": round(counts[way].num_forwards) for way in _WAYS},
        "time_ratio": round(seconds["separate"] / seconds["shared"], 3),
        "processor_time_ratio": round(
            processor_seconds["separate"] / processor_seconds["shared"], 3
        ),
        "predicted_by_tokens": round(
            counts["separate"].num_computed / counts["shared"].num_computed, 3
        ),
        "predicted_by_operations": round(operations["separate"] / operations["shared"], 3),
        "largest_difference": _largest_difference(answers["shared"], answers["separate"]),
    }


def _operations(cost: ModelCost, count: TokenCount) -> float:
    return (
        cost.body_flops(count.num_computed)
        + cost.attention_flops(count.num_pairs)
        + cost.head_flops(count.num_scored)
    )


def _largest_difference(one: list[list[Scores]], other: list[list[Scores]]) -> float:
    """Return the largest difference of any logit, logsumexp or log-prob (equal ranks compared)."""
    found = 0.0
    for streams, others in zip(one, other, strict=True):
        for a, b in zip(streams, others, strict=True):
            for field in ("topk_logits_PK", "logsumexp_PT", "label_logprob_P"):
                difference = np.abs(getattr(a, field) - getattr(b, field))
                found = max(found, float(difference.max(initial=0.0)))
    return found


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all lengths."""
    with tempfile.TemporaryDirectory() as folder:
        teachers = make_teachers(options, Path(folder))
        cost = count_model(teachers["shared"].model)
        lengths = [measure_length(options, teachers, cost, n) for n in options.lengths]
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "attention": options.attention,
        "num_parameters": cost.num_parameters,
        "views": options.views,
        "halves": 2,
        "block_size": options.block_size,
        "prompt_share": options.prompt_share,
        "token_budget": options.token_budget,
        "ragged": options.ragged,
        "lengths": lengths,
    }


def print_figures(figures: dict[str, Any]) -> None:
    """Print the figures as people read them; a row is a (sample, view)."""
    for name, value in figures.items():
        if name != "lengths":
            sys.stdout.write(f"{name:<16} {value}\n")
    sys.stdout.write(
        "\nlength   ms a row           tokens a row       padding        times as fast    "
        "predicted by      largest\n"
        "         shared  separate   shared  separate   shared  sep.   wall  processor     "
        "tokens  flops     difference\n"
    )
    for line in figures["lengths"]:
        sys.stdout.write(
            f"{line['length']:>6} {line['shared_ms_per_row']:>8.1f} "
            f"{line['separate_ms_per_row']:>9.1f} {line['shared_tokens_per_row']:>8.0f} "
            f"{line['separate_tokens_per_row']:>9.0f} {line['shared_padding']:>8.1%} "
            f"{line['separate_padding']:>5.1%} {line['time_ratio']:>6.2f} "
            f"{line['processor_time_ratio']:>10.2f} {line['predicted_by_tokens']:>10.2f} "
            f"{line['predicted_by_operations']:>6.2f} {line['largest_difference']:>14.1e}\n"
        )


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--samples", type=int, default=4, help="of each length (4)")
    parser.add_argument("--ragged", action="store_true", help="lengths from half of each on")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--prompt-share", type=float, default=0.4, help="of a sample (0.4)")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--attention", default="block_diffusion")
    parser.add_argument("--hidden-size", type=int, default=256, help="a multiple of 64 (256)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--token-budget", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3, help="median of so many (3)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--dtype", default="bfloat16" if default == "cuda" else "float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.hidden_size % 64:
        parser.error(f"--hidden-size: expected a multiple of 64, got {options.hidden_size}")
    if not 0 <= options.prompt_share < 1:
        parser.error(f"--prompt-share: expected 0 to below 1, got {options.prompt_share}")
    torch.set_num_threads(options.threads)
    figures = measure(options)
    if options.json:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    else:
        print_figures(figures)


if __name__ == "__main__":
    main()
