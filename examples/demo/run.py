"""`make demo`: the whole pipeline on data it generates, through the product's own functions.

Chat data with checkable answers -> a small teacher is trained on it -> a premasked set -> a cache
-> students are trained on the same rows and masks, with and without the cache -> a table. No GPU,
no hub, nothing downloaded. Every stage prints the command that does the same. Students run two at a
time, one thread each, so that a figure does not depend on how many processors there are.
"""

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from examples.demo.config import DemoConfig
from examples.demo.measure import answer_share, measure
from examples.demo.report import print_table, table_of
from examples.demo.tasks import Split, generate_rows, write_jsonl
from examples.demo.tokenizer import CHARACTERS, PAIRS, save_tokenizer
from stage1_teacher.build import run_build
from stage1_teacher.build_plan import BuildConfig
from stage1_teacher.build_plan import make_plan as plan_build
from stage1_teacher.prepare import make_plan as plan_prepare
from stage1_teacher.prepare import run_prepare
from stage1_teacher.prepare_config import PrepareConfig
from stage2_student.config import TrainConfig
from stage2_student.trainer import train
from tide_cache.cache import open_cache
from tide_cache.card import describe_fidelity, entries_count
from tide_cache.cli import run as run_app
from tide_cache.config import load_config, parse_config
from tide_cache.errors import TideError
from tide_cache.manifest import CacheManifest, Manifest
from tide_cache.store import Store
from tide_cache.verify import verify_set

TOKENIZERS = {"characters": CHARACTERS, "pairs": PAIRS}
_HELD_OUT_TIMESTEPS = {"num": 1, "min": 0.49, "max": 0.51}
console = Console(stderr=True, soft_wrap=True, highlight=False)


class Demo:
    """One run of the demo in a folder; stages that are finished are kept by running again."""

    def __init__(self, config: DemoConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.seconds: dict[str, float] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> dict[str, Any]:
        """Run all stages and return the figures."""
        torch.set_num_threads(1)
        with self.stage("data", "generate rows and tokenizers"):
            self._write_data()
        with self.stage("prepare", "tide-cache prepare"):
            self._prepare("teacher")
            premasked = self._prepare("student")
            self._prepare("held_out")
        with self.stage("teacher", "tide-train teacher.yaml --cache premasked-teacher"):
            self._train_teacher()
        with self.stage("build", "tide-cache build"):
            cache = self._build("student", {})
            # Whole distributions, asked as students are: the KL to the teacher is exact.
            self._build("held_out", self._exact_payload())
        with self.stage("verify", "tide-cache verify"):
            self._verify("cache-student")
            self._verify("cache-held_out")
        with self.stage("students", "tide-train student.yaml --cache cache-student"):
            runs = self._train_students()
        with self.stage("teacher's figures", "the same measurements on the teacher itself"):
            teacher = self._measure_teacher()
        return {
            "students": runs,
            "teacher": teacher,
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "fidelity": [describe_fidelity(facts) for facts in cache.fidelity],
            "bytes_per_masked_position": bytes_per_masked_position(cache),
            "bytes_per_answer": round(cache.counts["size_bytes"] / entries_count(cache), 2),
            "premasked_bytes": premasked.counts["size_bytes"],
            "cache_bytes": cache.counts["size_bytes"],
            "num_masked_positions": cache.counts["num_masked_positions"],
        }

    @contextmanager
    def stage(self, name: str, does: str) -> Iterator[None]:
        """Say what begins and keep how long it took."""
        console.print(f"[bold]{name}[/bold]: {does}")
        began_s = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began_s
        console.print(f"  {self.seconds[name]:.1f} s")

    def path(self, name: str) -> str:
        """Return a path in the demo's folder."""
        return str(self.folder / name)

    def _write_data(self) -> None:
        config = self.config.data
        for name, split, num_rows, wrong in self._parts():
            rows = generate_rows(split, num_rows, seed=config.seed, wrong_fraction=wrong)
            write_jsonl(self.folder / f"{name}.jsonl", rows)
        for name in {self.config.teacher_tokenizer, self.config.student_tokenizer}:
            save_tokenizer(TOKENIZERS[name], self.folder / f"tokenizer-{name}")

    def _parts(self) -> list[tuple[str, Split, int, float]]:
        data = self.config.data
        return [
            ("teacher", "teacher", data.teacher_rows, 0.0),
            ("student", "student", data.student_rows, data.wrong_fraction),
            ("held_out", self.config.split, data.held_out_rows, 0.0),
        ]

    def _prepare(self, name: str) -> Manifest:
        masking, config = self.config.masking, self.config
        teachers = self.path(f"tokenizer-{config.teacher_tokenizer}")
        students = self.path(f"tokenizer-{config.student_tokenizer}")
        for_teacher, held_out = name == "teacher", name == "held_out"
        timesteps: Any = masking.teacher_timesteps if for_teacher else masking.student_timesteps
        values = {
            "sources": [{"path": self.path(f"{name}.jsonl"), "license": "Apache-2.0"}],
            "student": {
                "tokenizer": teachers if for_teacher else students,
                "max_length": masking.max_length,
            },
            "teacher": {"tokenizer": teachers, "max_length": masking.max_length},
            "alignment": "positions" if for_teacher or config.is_shared else "chunks",
            "block_size": masking.block_size,
            "num_views": 1 if held_out else masking.num_views,
            "timesteps": _HELD_OUT_TIMESTEPS if held_out else timesteps.model_dump(),
        }
        plan, encoder = plan_prepare(parse_config(values, PrepareConfig, where="demo: prepare"))
        return run_prepare(plan, self.path(f"premasked-{name}"), encoder=encoder)

    def _train_teacher(self) -> None:
        values = {
            **self.config.teacher_train,
            "output": self.path("teacher"),
            "device": "cpu",
        }
        values["student"] = {
            **values["student"],
            "tokenizer": self.path(f"tokenizer-{self.config.teacher_tokenizer}"),
            "mask_token": TOKENIZERS[self.config.teacher_tokenizer].mask,
        }
        config = parse_config(values, TrainConfig, where="demo: teacher_train")
        train(config, self.path("premasked-teacher"))

    def _build(self, name: str, changes: dict[str, Any]) -> CacheManifest:
        values = {**self.config.build, **changes}
        values["teacher"] = {
            "block_size": self.config.masking.block_size,
            "device": "cpu",
            "dtype": "float32",
            **values.get("teacher", {}),
            "model": self.path("teacher/final"),
        }
        config = parse_config(values, BuildConfig, where="demo: build")
        premasked = open_cache(self.path(f"premasked-{name}"))
        return run_build(plan_build(config, premasked, self.path(f"cache-{name}")))

    def _exact_payload(self) -> dict[str, Any]:
        if not self.config.is_shared:
            return {}
        shared = open_cache(self.path("premasked-held_out")).manifest.shared_vocab_size
        return {
            "payload": None,
            "payloads": ["candidates"],
            "candidates": {"codec": "raw", "k": shared, "mean_logits_positions": 0},
            "comp_demo": False,
        }

    def _verify(self, name: str) -> None:
        report = verify_set(Store(self.path(name)))
        if not report.ok:
            raise TideError(f"{name}: {report.problems[0]}")
        console.print(
            f"  {name}: sound, {report.num_rows:,} rows, {report.size_bytes / 1e6:.2f} MB"
        )

    def _train_students(self) -> list[dict[str, Any]]:
        jobs = [(name, seed) for seed in self.config.seeds for name in self.config.students]
        arguments = [(self.config.model_dump(mode="json"), str(self.folder), *job) for job in jobs]
        runs = []
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            for run in pool.map(train_student, arguments):
                console.print(f"  {run['name']}, seed {run['seed']}: nll {run['nll']:.3f}")
                runs.append(run)
        return runs

    def _measure_teacher(self) -> dict[str, Any]:
        final = Path(self.path("teacher/final"))
        share = answer_share(final, self.config)
        if not self.config.is_shared:
            return {"exact_match": share}
        return {**measure(final, Path(self.path("cache-held_out"))), "exact_match": share}


def train_student(job: tuple[dict[str, Any], str, str, int]) -> dict[str, Any]:
    """Train one student and measure it; runs in a process of its own."""
    values, folder, name, seed = job
    config = DemoConfig.model_validate(values)
    torch.set_num_threads(1)
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    output = Path(folder) / f"student-{slug}-{seed}"
    train_values = {**config.student_train, "output": str(output), "seed": seed, "device": "cpu"}
    train_values["student"] = {
        **train_values["student"],
        "tokenizer": str(Path(folder) / f"tokenizer-{config.student_tokenizer}"),
        "mask_token": TOKENIZERS[config.student_tokenizer].mask,
    }
    objective = {**train_values.get("objective", {}), "losses": config.students[name]}
    train_values["objective"] = objective
    began_s = time.monotonic()
    parsed = parse_config(train_values, TrainConfig, where=f"demo: student {name}")
    train(parsed, str(Path(folder) / "cache-student"))
    seconds = time.monotonic() - began_s
    return {
        "name": name,
        "seed": seed,
        "seconds": round(seconds, 1),
        **measure(output / "final", Path(folder) / "cache-held_out"),
        "exact_match": answer_share(output / "final", config),
    }


def bytes_per_masked_position(manifest: Manifest) -> float:
    """Return the size of a cache's shards over its masked positions."""
    return round(manifest.counts["size_bytes"] / manifest.counts["num_masked_positions"], 2)


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML, see examples/.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run the demo and print its table.

    [bold]Examples[/bold]

    python -m examples.demo.run examples/demo.yaml -o runs/demo

    python -m examples.demo.run examples/demo.yaml -o runs/demo --set 'seeds=[5, 6]' --json
    """
    config = load_config(config_path, DemoConfig, overrides or (), section="demo")
    figures = Demo(config, output).run()
    figures["table"] = table_of(figures)
    (output / "figures.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    if json_output:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    else:
        print_table(figures, config)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    run_app(app)
