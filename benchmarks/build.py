"""How much longer a build takes than its teacher alone, and where the time goes.

One worker builds a cache of the default payload from a random-weight Qwen3 (speed does not depend
on what weights say), all through the product: premasked set, plan, worker, files. The baseline is
the bare teacher on the same rows in the same process: the same sequences through the body, and the
output head at the masked positions, with nothing taken from the logits. Calibration is done once
for a whole cache, so it is timed apart. Repeats of both are interleaved; medians are reported.
Reading, encoding and writing overlap with the teacher, so the parts add up to more than the whole.

    python -m benchmarks.build
    python -m benchmarks.build --tokenizer FOLDER --json       # a vocabulary of real size
    python -m benchmarks.build --device cuda --dtype bfloat16 --hidden-size 4096 --layers 36 \
        --rows 2000                                            # real size, on a GPU
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.teacher import read_chats
from benchmarks.texts import train_tokenizer
from stage1_teacher.build import run_build
from stage1_teacher.build_plan import BuildPlan, make_plan
from stage1_teacher.build_worker import BuildWorker, read_task
from stage1_teacher.calibration_record import ensure_record
from stage1_teacher.events import EventLog
from stage1_teacher.executors.base import MakeWorker, OnDone, Result
from stage1_teacher.executors.local import LocalExecutor
from stage1_teacher.payload_config import BuildConfig
from stage1_teacher.prepare import make_plan as plan_prepare
from stage1_teacher.prepare import run_prepare
from stage1_teacher.prepare_config import PrepareConfig
from stage1_teacher.questions import ask, checked_rows
from stage1_teacher.teachers.base import ScoreRequest
from stage1_teacher.teachers.hf import HfTeacher, load_hf_teacher
from tide_cache.cache import Cache, open_cache
from tide_cache.errors import TideError
from tide_cache.manifest import CacheManifest

_SAMPLES_PER_SHARD = 32
TARGET = 1.10


class _Returns:
    """Makes the worker that is there already."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def __call__(self, slot: int) -> Any:
        return self._worker


class OneWorker(LocalExecutor):
    """The product's executor with one worker, which is kept to be looked at."""

    def __init__(self) -> None:
        super().__init__(1)
        self.worker: BuildWorker | None = None

    def run(
        self,
        make_worker: MakeWorker[Result],
        tasks: Sequence[int],
        on_done: OnDone[Result],
        log: EventLog,
    ) -> dict[int, TideError]:
        """Run all tasks here."""
        worker = make_worker(0)
        assert isinstance(worker, BuildWorker)
        self.worker = worker
        return super().run(_Returns(worker), tasks, on_done, log)


def prepare(options: argparse.Namespace) -> tuple[Cache, Path]:
    """Make chats, tokenizer, premasked set and a random teacher, unless they are there."""
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    chats = read_chats(options.data)[: options.rows]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    tokenizer: Path = options.tokenizer or folder / "tokenizer"
    if options.tokenizer is None and not tokenizer.is_dir():
        every = ["\n".join(chat.values()) for chat in read_chats(options.data)]
        train_tokenizer(every, 8192, tokenizer)
    plan, encoder = plan_prepare(
        PrepareConfig.model_validate(
            {
                "sources": [{"path": str(folder / "chats.jsonl")}],
                "student": {"tokenizer": str(tokenizer), "max_length": options.max_length},
                "num_views": 4,
                "samples_per_shard": _SAMPLES_PER_SHARD,
            }
        )
    )
    run_prepare(plan, str(folder / "premasked"), encoder=encoder, num_workers=1)
    premasked = open_cache(folder / "premasked")
    if not (folder / "teacher").is_dir():
        write_teacher(folder / "teacher", tokenizer, premasked.manifest.teacher.vocab_size, options)
    return premasked, folder / "teacher"


def write_teacher(
    folder: Path, tokenizer: Path, vocab_size: int, options: argparse.Namespace
) -> None:
    """Write a random Qwen3 checkpoint with a tokenizer."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=-(-(vocab_size + 1) // 128) * 128,  # the mask token is behind all others
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=max(1, options.hidden_size // 256),
        head_dim=64,
        tie_word_embeddings=False,
        initializer_range=options.hidden_size**-0.5,
        dtype=getattr(torch, options.dtype),
    )
    with torch.device(options.device):
        model = transformers.Qwen3ForCausalLM(config).to(getattr(torch, options.dtype))
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    for path in tokenizer.iterdir():
        if path.suffix in (".json", ".jinja", ".txt") and path.name != "config.json":
            shutil.copy(path, folder / path.name)


def build_config(teacher: Path, mask_token_id: int, options: argparse.Namespace) -> BuildConfig:
    """Return the config of a default build, calibrated on few positions."""
    return BuildConfig.model_validate(
        {
            "teacher": {
                "model": str(teacher),
                "dtype": options.dtype,
                "device": options.device,
                # A tokenizer that was trained here has its own.
                **({"mask_token_id": mask_token_id} if options.tokenizer else {}),
                "token_budget": options.token_budget,
            },
            "payloads": options.payloads,
            "candidates": {"mean_logits_positions": 1024},
            "hidden": {"fit_positions": 1024},
            "fidelity_positions": 0,
        }
    )


def requests_of(premasked: Cache) -> list[list[ScoreRequest]]:
    """Return what a build asks its teacher, task by task."""
    tasks = sorted({shard.task for shard in premasked.manifest.shards})
    found = []
    for task in tasks:
        tables = read_task(premasked, task)
        rows_V = [checked_rows(table, premasked, view) for view, table in enumerate(tables)]
        samples = zip(*rows_V, strict=True)
        found.append([ask(views, comp_demo=True).request for views in samples])
    return found


@torch.no_grad()
def bare_forward(teacher: HfTeacher, tasks: list[list[ScoreRequest]]) -> int:
    """Run body and head on everything that a build asks; returns the number of positions."""
    num_positions = 0
    for requests in tasks:
        # The head in full slices: over a few positions at a time it would be slower than a build's.
        hidden_Pd = torch.cat([part for found in teacher.hidden_states(requests) for part in found])
        num_positions += len(hidden_Pd)
        for start in range(0, len(hidden_Pd), teacher.rows_per_slice):
            teacher.logits(hidden_Pd[start : start + teacher.rows_per_slice])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return num_positions


def timed(work: Callable[[], Any]) -> float:
    """Return how long a call takes, in seconds."""
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def build_once(plan: BuildPlan, premasked: Cache) -> tuple[dict[str, float], CacheManifest]:
    """Build into an empty folder; returns seconds of each part, and what was built."""
    shutil.rmtree(plan.output_url, ignore_errors=True)
    calibrating_s = timed(lambda: ensure_record(plan, premasked))
    executor = OneWorker()
    found: list[CacheManifest] = []
    whole_s = timed(lambda: found.append(run_build(plan, executor=executor)))
    assert executor.worker is not None
    parts = dataclasses.asdict(executor.worker.seconds)
    return {"calibrating": calibrating_s, "whole": whole_s, **parts}, found[0]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Time both, interleaved, and return all figures."""
    torch.set_num_threads(1)  # as a worker of a build on the CPU
    premasked, folder = prepare(options)
    config = build_config(folder, premasked.manifest.teacher.vocab_size, options)
    plan = make_plan(config, premasked, str(options.output / "cache"))
    build_once(plan, premasked)  # warm: files, kernels
    teacher = load_hf_teacher(config.teacher, plan.teacher)
    tasks = requests_of(premasked)
    bare, built = [], []
    manifest = None
    for _repeat in range(options.repeats):
        bare.append(timed(lambda: bare_forward(teacher, tasks)))
        seconds, manifest = build_once(plan, premasked)
        built.append(seconds)
    assert manifest is not None
    bare_s = statistics.median(bare)
    parts = {name: statistics.median(one[name] for one in built) for name in built[0]}
    ratios = [one["whole"] / alone for one, alone in zip(built, bare, strict=True)]
    num_rows = manifest.counts["num_rows"]
    return {
        "teacher": {
            "hidden_size": options.hidden_size,
            "layers": options.layers,
            "vocab_size": plan.teacher_model.vocab_size,
            "dtype": options.dtype,
            "device": plan.teacher_model.device,
        },
        "num_rows": num_rows,
        "num_positions": manifest.counts["num_payload_positions"],
        "bytes_per_position": round(
            manifest.counts["size_bytes"] / manifest.counts["num_payload_positions"], 1
        ),
        "repeats": options.repeats,
        "bare_forward_s": round(bare_s, 2),
        "build_s": round(parts["whole"], 2),
        "calibration_s": round(parts["calibrating"], 2),
        "build_over_bare": round(statistics.median(ratios), 4),
        "build_over_bare_each": [round(ratio, 4) for ratio in ratios],
        "target": TARGET,
        "parts_over_bare": {
            name: round(parts[name] / bare_s, 4)
            for name in ("reading", "asking", "encoding", "writing")
        },
        "rows_per_s": round(num_rows / parts["whole"], 2),
    }


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/benchmark/build"))
    parser.add_argument("--data", type=Path, help="JSONL of chats; default: the standard library")
    parser.add_argument("--tokenizer", type=Path, help="folder; default: trained, 8,192 ids")
    parser.add_argument("--rows", type=int, default=96, help="samples, of 4 views each (96)")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--token-budget", type=int, default=16384)
    parser.add_argument("--payloads", nargs="+", default=["hidden"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    figures = run(options)
    if options.json:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        return
    for name, value in figures.items():
        sys.stdout.write(f"{name:<22} {value}\n")


if __name__ == "__main__":
    main()
