"""The benchmark teacher: a small diffusion model with a large vocabulary, trained once and kept.

What a payload must hold depends on how sure the teacher is, so every payload figure of this project
names its teacher by this command's output: accuracy, entropy and tail mass per timestep. The
default reads the standard library's sources with a BPE vocabulary of 8,192 trained on them;
`--data` and `--tokenizer` take other chats and a real vocabulary. All through the product's own
`prepare` and `tide-train`; run again, it goes on where it was and then only measures.

    python -m benchmarks.teacher -o runs/benchmark/code
    python -m benchmarks.teacher -o runs/benchmark/gsm8k --data train.jsonl --tokenizer qwen3 \
        --max-length 192 --hidden-size 128 --layers 3 --steps 500 --batch-size 16
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.texts import Chat, source_chats, train_tokenizer
from stage1_teacher.prepare import make_plan, run_prepare
from stage1_teacher.prepare_config import PrepareConfig
from stage1_teacher.questions import ask, checked_rows
from stage1_teacher.teachers.base import TeacherConfig
from stage1_teacher.teachers.hf import HfTeacher, load_hf_teacher
from stage2_student.config import TrainConfig
from stage2_student.trainer import train
from tide_cache.cache import Cache, open_cache

MASK_TOKEN = "<|mask|>"
PARTS = ("teacher", "student", "held_out")
_NUM_STUDENT, _NUM_HELD_OUT = 3000, 600
_TEMPERATURES = (1.0, 2.0)
_TAIL_OF = (16, 64)
_BUCKETS = 4


def read_chats(data: Path | None) -> list[Chat]:
    """Return the rows of a JSONL file, or of the standard library, in a fixed random order."""
    if data is None:
        rows = source_chats()
    else:
        rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[index] for index in order]


def write_parts(arguments: argparse.Namespace) -> Path:
    """Write one JSONL file per part and the tokenizer; returns the tokenizer's folder."""
    folder: Path = arguments.output
    tokenizer = arguments.tokenizer or folder / "tokenizer"
    if all((folder / f"{part}.jsonl").is_file() for part in PARTS):
        return Path(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_chats(arguments.data)
    if arguments.tokenizer is None:
        texts = ["\n".join(row.values()) for row in rows]
        train_tokenizer(texts, arguments.vocab_size, folder / "tokenizer")
    held_out, student = rows[:_NUM_HELD_OUT], rows[_NUM_HELD_OUT:][:_NUM_STUDENT]
    parts = {"held_out": held_out, "student": student, "teacher": rows[len(held_out + student) :]}
    for name, part in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return Path(tokenizer)


def prepare_part(arguments: argparse.Namespace, part: str, tokenizer: Path) -> Cache:
    """Run `tide-cache prepare` on one part."""
    is_held_out = part == "held_out"
    config = PrepareConfig.model_validate(
        {
            "sources": [{"path": str(arguments.output / f"{part}.jsonl")}],
            "student": {"tokenizer": str(tokenizer), "max_length": arguments.max_length},
            "block_size": arguments.block_size,
            "num_views": 1 if is_held_out else 4,
            "timesteps": {"num": 32, "min": 0.05, "max": 1.0},
        }
    )
    plan, encoder = make_plan(config)
    url = str(arguments.output / f"premasked-{part}")
    run_prepare(plan, url, encoder=encoder, num_workers=1)
    return open_cache(url)


def random_student(tokenizer: Path, hidden_size: int, num_layers: int) -> dict[str, Any]:
    """Return the `student` section of a `tide-train` config for a small model from nothing."""
    return {
        "init": "random",
        "tokenizer": str(tokenizer),
        "mask_token": MASK_TOKEN,
        "architecture": {
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": max(hidden_size // 64, 2),
            "rope_theta": 10_000.0,
            "initializer_range": 0.5 * hidden_size**-0.5,
        },
    }


def train_teacher(arguments: argparse.Namespace, tokenizer: Path) -> Path:
    """Run `tide-train` on the teacher's part with cross entropy alone; returns its folder."""
    output = arguments.output / "teacher"
    config = TrainConfig.model_validate(
        {
            "output": str(output),
            "student": random_student(tokenizer, arguments.hidden_size, arguments.layers),
            "objective": {"losses": {"ce": 1.0}},
            "stream": {"batch_size": arguments.batch_size},
            "optimizer": {"learning_rate": arguments.learning_rate, "beta2": 0.98},
            "max_steps": arguments.steps,
            "precision": "bf16",
            "metrics": {"every": 20},
            "checkpoints": {"every": 100, "keep": 1},
        }
    )
    train(config, arguments.output / "premasked-teacher")
    return Path(output / "final")


def load(folder: Path, block_size: int) -> HfTeacher:
    """Load a trained teacher in float32 for scoring."""
    return load_hf_teacher(
        TeacherConfig(model=str(folder), dtype="float32", device="cpu", block_size=block_size)
    )


@torch.no_grad()
def sharpness(teacher: HfTeacher, premasked: Cache, num_rows: int) -> list[dict[str, float]]:
    """Measure how sure the teacher is, by quarter of the timesteps.

    Accuracy and entropy (nats) of masked tokens at T = 1, and for each temperature the share of the
    mass that lies outside the k likeliest ids.
    """
    num_rows = min(num_rows, premasked.num_samples)
    rows = checked_rows(premasked.read_rows(0, range(num_rows)), premasked, 0)
    sums: dict[int, dict[str, float]] = {bucket: {} for bucket in range(_BUCKETS)}
    for row in rows:
        question = ask([row], comp_demo=True)
        bucket = min(int(row.timestep * _BUCKETS), _BUCKETS - 1)
        (hidden,) = teacher.hidden_states([question.request])
        for stream, hidden_Pd in zip(question.request.streams, hidden, strict=True):
            logits_PV = teacher.logits(hidden_Pd)
            labels_P = torch.from_numpy(question.request.clean_ids_L[stream.wanted_P]).long()
            for name, value in _sums(logits_PV, labels_P).items():
                sums[bucket][name] = sums[bucket].get(name, 0.0) + value
    return [
        {"t_from": b / _BUCKETS, **{n: round(v / of["n"], 4) for n, v in of.items() if n != "n"}}
        for b, of in sums.items()
        if of.get("n")
    ]


def _sums(logits_PV: torch.Tensor, labels_P: torch.Tensor) -> dict[str, float]:
    log_p_PV = torch.log_softmax(logits_PV, dim=-1)
    found = {
        "n": float(len(labels_P)),
        "accuracy": float((logits_PV.argmax(-1) == labels_P).sum()),
        "nll": float(-log_p_PV.gather(1, labels_P[:, None]).sum()),
        "entropy": float(-(log_p_PV.exp() * log_p_PV).sum()),
    }
    for temperature in _TEMPERATURES:
        p_PV = torch.softmax(logits_PV / temperature, dim=-1)
        top_PK = p_PV.topk(max(_TAIL_OF), dim=-1).values
        for k in _TAIL_OF:
            tail = float((1 - top_PK[:, :k].sum(-1)).sum())
            found[f"tail_{k}_T{temperature:g}"] = tail
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the teacher if it is not there and return the figures that describe it."""
    torch.set_num_threads(arguments.threads)
    tokenizer = write_parts(arguments)
    for part in PARTS:
        prepare_part(arguments, part, tokenizer)
    began_s = time.monotonic()
    final = train_teacher(arguments, tokenizer)
    seconds = time.monotonic() - began_s
    teacher = load(final, arguments.block_size)
    held_out = open_cache(arguments.output / "premasked-held_out")
    return {
        "teacher": str(final),
        "vocab_size": teacher.vocab_size,
        "hidden_size": arguments.hidden_size,
        "num_parameters": sum(p.numel() for p in teacher.model.parameters()),
        "seconds_of_training_now": round(seconds, 1),
        "by_timestep": sharpness(teacher, held_out, arguments.measure_rows),
    }


def make_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/benchmark/code"))
    parser.add_argument("--data", type=Path, help="JSONL of chats; default: the standard library")
    parser.add_argument("--tokenizer", type=Path, help="folder; default: trained on the data")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure-rows", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main() -> None:
    """Make and describe the teacher."""
    arguments = make_parser().parse_args()
    figures = run(arguments)
    if arguments.json:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        return
    for name, value in figures.items():
        if name != "by_timestep":
            sys.stdout.write(f"{name:<24} {value}\n")
    for bucket in figures["by_timestep"]:
        sys.stdout.write("  ".join(f"{n} {v}" for n, v in bucket.items()) + "\n")


if __name__ == "__main__":
    main()
