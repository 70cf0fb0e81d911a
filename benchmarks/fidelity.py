"""What a payload is worth: students trained from it, against one with the teacher in memory.

As in real use, distillation goes on from a student that was trained before (here: by cross entropy
on the teacher's own text, one for each seed). From there all students of a seed see the same rows
under the same masks, and are compared by their KL from the teacher on held-out text, which the
teacher itself answers in full. `online` computes the teacher's full logits at every step: what any
cache can reach at best; `gain kept` is how much of its advantage over cross entropy alone a student
from a cache has. The default cache of the product holds hidden states; `k=64` is a cache of
candidates, read with every tail.

    python -m benchmarks.teacher -o runs/benchmark/code
    python -m benchmarks.fidelity -o runs/benchmark/code

Caches and finished students are kept; run again, it does what is missing. On two cores, 45 minutes.

Shapes: P masked positions, D the teacher's hidden size, V vocabulary.
"""

import argparse
import json
import multiprocessing
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.teacher import load, random_student
from stage1_teacher.build import run_build
from stage1_teacher.build_plan import make_plan
from stage1_teacher.payload_config import BuildConfig
from stage1_teacher.questions import ask, checked_rows
from stage1_teacher.teachers.hf import HfTeacher
from stage2_student.batches import Batch, BatchReader, InputForm
from stage2_student.columns import Int64Array
from stage2_student.config import TrainConfig
from stage2_student.losses import TeacherCandidates, kl_per_position
from stage2_student.plan import open_run
from stage2_student.progress import NoProgress
from stage2_student.stream import StepStream
from stage2_student.student import Student
from stage2_student.teacher_rows import TeacherRows
from stage2_student.trainer import Trainer, train
from tide_cache.cache import Cache, open_cache
from tide_cache.rows import PremaskedRow

DEFAULT, TOP = "default", "k=64"
_TEMPERATURES = (1.0, 2.0)
_EVALUATED_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One line of the table: what a student learns from."""

    name: str
    cache: str
    tail: str = "auto"
    uses_teacher: bool = True
    online: bool = False

    @property
    def slug(self) -> str:
        """Return what folders are called."""
        return "".join(c if c.isalnum() or c == "_" else "-" for c in self.name)


ARMS = (
    Arm(name="cross entropy alone", cache=DEFAULT, uses_teacher=False),
    Arm(name="online: full logits", cache=DEFAULT, online=True),
    Arm(name="default cache", cache=DEFAULT),
    *(
        Arm(name=f"{TOP}, tail {tail}", cache=TOP, tail=tail)
        for tail in ("mean", "student", "mean_student", "bucket", "uniform", "none")
    ),
)
BASE, BEST = ARMS[0].name, ARMS[1].name


class OnlineTeacher:
    """The teacher in memory, asked about the rows of a set."""

    def __init__(self, teacher: HfTeacher, cache: Cache) -> None:
        self.teacher, self.cache = teacher, cache

    @torch.no_grad()
    def answers(self, view: int, rows: Int64Array) -> TeacherCandidates:
        """Return whole distributions at the masked positions of some rows, row by row."""
        table = self.cache.read_rows(view, rows)
        hidden = self._ask(checked_rows(table, self.cache, view))
        logits_PV = self.teacher.logits(torch.cat(hidden))
        total_PT = [torch.logsumexp(logits_PV / t, dim=-1) for t in _TEMPERATURES]
        return TeacherCandidates(
            ids_PK=torch.arange(logits_PV.shape[1]).expand_as(logits_PV),
            logits_PK=logits_PV,
            logsumexp_PT=torch.stack(total_PT, dim=-1),
            temperatures=_TEMPERATURES,
            vocab_size=logits_PV.shape[1],
        )

    def _ask(self, rows: list[PremaskedRow]) -> list[torch.Tensor]:
        """Return the hidden states (P, D) of each row's masked positions, ascending."""
        questions = [ask([row], comp_demo=True) for row in rows]
        answers = self.teacher.hidden_states([question.request for question in questions])
        found = []
        for question, streams in zip(questions, answers, strict=True):
            hidden_PD = torch.cat([torch.empty(0, self.teacher.hidden_size), *streams])
            entries = [np.empty(0, np.int64), *(entry_P for _, entry_P in question.slots)]
            order_P = torch.from_numpy(np.argsort(np.concatenate(entries)))
            found.append(hidden_PD[order_P])
        return found


class OnlineReader(BatchReader):
    """Reads batches whose teacher answers now, in full, instead of what a cache says."""

    def __init__(self, online: OnlineTeacher, *, form: InputForm) -> None:
        super().__init__(online.cache, form=form, teacher=None)
        self._online = online

    def read(self, view: int, rows: Int64Array) -> Batch:
        """Read some rows; every masked position has the teacher's whole distribution."""
        batch = super().read(view, rows)
        candidates = self._online.answers(view, rows)
        answers = TeacherRows(
            index_Q=torch.arange(candidates.num_positions), candidates=candidates, chunks=None
        )
        return replace(batch, teacher=answers)


class OnlineTrainer(Trainer):
    """The product's trainer with the teacher in memory: only where batches come from differs."""

    teacher: OnlineTeacher

    def _open_stream(self) -> StepStream:
        mask_token_id = self.run.source.mask_token_id
        reader = OnlineReader(self.teacher, form=_form(self.run.cache, self.student, mask_token_id))
        return StepStream(self.run.order, [reader], rank=0, world_size=1, micro_batch_size=None)


def _form(cache: Cache, student: Student, mask_token_id: int) -> InputForm:
    return InputForm(
        block_size=cache.manifest.block_size,
        mask_token_id=mask_token_id,
        attention=student.model.config._attn_implementation,
        device=torch.device("cpu"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Where the benchmark teacher lies, and how its students are trained."""

    folder: Path
    block_size: int
    steps: int
    batch_size: int
    hidden_size: int
    layers: int
    learning_rate: float
    losses: dict[str, float]
    first_steps: int
    first_learning_rate: float

    def cache_folder(self, name: str) -> Path:
        """Return the folder of a cache."""
        return self.folder / f"cache-{'candidates' if name == TOP else name}"

    @property
    def teacher(self) -> Path:
        """The trained teacher."""
        return self.folder / "teacher" / "final"

    def first_student(self, seed: int) -> Path:
        """The student that all of a seed begin with, trained by cross entropy alone."""
        return self.folder / "students" / f"first-{seed}"


def build_caches(bench: Bench, num_workers: int) -> dict[str, dict[str, Any]]:
    """Build both caches of the students' part and return what they weigh and promise."""
    premasked = open_cache(bench.folder / "premasked-student")
    teacher = {"model": str(bench.teacher), "dtype": "float32", "device": "cpu"}
    common = {"teacher": {**teacher, "block_size": bench.block_size}}
    configs = {DEFAULT: common, TOP: {**common, "payloads": ["candidates"]}}
    facts = {}
    for name, values in configs.items():
        began_s = time.monotonic()
        plan = make_plan(
            BuildConfig.model_validate(values), premasked, str(bench.cache_folder(name))
        )
        manifest = run_build(plan, num_workers=num_workers)
        (fidelity,) = manifest.fidelity
        facts[name] = {
            "setting": fidelity.setting,
            "worst_cosine": fidelity.worst.cosine,
            "bytes_per_position": fidelity.bytes_per_position,
            "num_positions": manifest.counts["num_payload_positions"],
            "seconds_of_building_now": round(time.monotonic() - began_s, 1),
        }
    return facts


def train_first_student(bench: Bench, seed: int) -> None:
    """Train what the students of a seed begin with, unless it is there."""
    torch.set_num_threads(1)
    config = _config(
        bench,
        bench.first_student(seed),
        student=random_student(bench.teacher, bench.hidden_size, bench.layers),
        objective={"losses": {"ce": 1.0}},
        steps=bench.first_steps,
        learning_rate=bench.first_learning_rate,
        seed=seed,
    )
    train(config, bench.folder / "premasked-teacher")


def train_student(bench: Bench, arm: Arm, seed: int) -> dict[str, Any]:
    """Train and measure one student, or return what was measured of it before."""
    folder = bench.folder / "students" / f"{arm.slug}-{seed}"
    result = folder / "kl.json"
    settings = {
        "losses": bench.losses,
        "steps": bench.steps,
        "batch_size": bench.batch_size,
        "learning_rate": bench.learning_rate,
    }
    if result.is_file():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if found["settings"] == settings:
            return found
    torch.set_num_threads(1)
    losses = bench.losses if arm.uses_teacher else {"ce": bench.losses["ce"]}
    config = _config(
        bench,
        folder,
        student={"init": str(bench.first_student(seed) / "final")},
        objective={"losses": losses, "temperature": 2.0, "tail": arm.tail},
        steps=bench.steps,
        learning_rate=bench.learning_rate,
        seed=seed,
    )
    run = open_run(config, str(bench.cache_folder(arm.cache)))
    teacher = load(bench.teacher, bench.block_size)
    kind = Trainer
    if arm.online:
        kind = OnlineTrainer
        OnlineTrainer.teacher = OnlineTeacher(teacher, run.cache)
    began_s = time.monotonic()
    trainer = kind(run, None, NoProgress())
    trainer.train()
    seconds = time.monotonic() - began_s
    figures = {
        "arm": arm.name,
        "seed": seed,
        "kl": held_out_kl(bench, trainer.student, teacher, run.source.mask_token_id),
        "train_seconds": round(seconds, 1),
        "settings": settings,
    }
    result.write_text(json.dumps(figures), encoding="utf-8")
    return figures


def _config(
    bench: Bench,
    output: Path,
    *,
    student: dict[str, Any],
    objective: dict[str, Any],
    steps: int,
    learning_rate: float,
    seed: int,
) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "output": str(output),
            "student": student,
            "objective": objective,
            "stream": {"batch_size": bench.batch_size},
            "optimizer": {"learning_rate": learning_rate, "beta2": 0.98},
            "max_steps": steps,
            "seed": seed,
            "metrics": {"every": 50},
            "checkpoints": {"every": steps, "keep": 1},
        }
    )


@torch.no_grad()
def held_out_kl(bench: Bench, student: Student, teacher: HfTeacher, mask_token_id: int) -> float:
    """Return the mean KL(teacher || student) at T = 1 over held-out masked positions, in nats.

    Both distributions are whole; nothing comes from a cache.
    """
    premasked = open_cache(bench.folder / "premasked-held_out")
    online = OnlineTeacher(teacher, premasked)
    reader = OnlineReader(online, form=_form(premasked, student, mask_token_id))
    student.eval()
    total, count = 0.0, 0
    for start in range(0, premasked.num_samples, _EVALUATED_AT_ONCE):
        stop = min(start + _EVALUATED_AT_ONCE, premasked.num_samples)
        batch = reader.read(0, np.arange(start, stop))
        hidden_PD = student(
            batch.input_ids_1N, batch.position_ids_1N, batch.attention_mask, batch.masked_index_P
        )
        candidates = batch.teacher.candidates
        assert candidates is not None
        logits_PV = hidden_PD @ student.head_VD.T
        total += float(kl_per_position(logits_PV, candidates, temperature=1.0).double().sum())
        count += len(logits_PV)
    student.train()
    return total / count


def table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line per arm: KL and the share of the online gain, mean and spread over seeds."""
    kl = {(found["arm"], found["seed"]): found["kl"] for found in results}
    seeds = sorted({found["seed"] for found in results})
    mean_gain = np.mean([kl[BASE, seed] - kl[BEST, seed] for seed in seeds])
    lines = []
    for arm in ARMS:
        kl_S = np.array([kl[arm.name, seed] for seed in seeds])
        # Paired: a seed decides init and order of all its students.
        kept_S = np.array([kl[BASE, seed] - kl[arm.name, seed] for seed in seeds]) / mean_gain
        took_S = [found["train_seconds"] for found in results if found["arm"] == arm.name]
        lines.append(
            {
                "student": arm.name,
                "kl_mean": round(float(kl_S.mean()), 5),
                "kl_sd": round(float(kl_S.std(ddof=1)), 5),
                "gain_kept_mean": round(float(kept_S.mean()), 4),
                "gain_kept_sd": round(float(kept_S.std(ddof=1)), 4),
                "train_seconds_mean": round(float(np.mean(took_S)), 1),
            }
        )
    return lines


def run(bench: Bench, seeds: list[int], num_workers: int) -> dict[str, Any]:
    """Build, train and measure whatever is missing, and return all figures."""
    caches = build_caches(bench, num_workers)
    work = [(bench, arm, seed) for seed in seeds for arm in ARMS]
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        pool.starmap(train_first_student, [(bench, seed) for seed in seeds], chunksize=1)
        results = pool.starmap(train_student, work, chunksize=1)
    return {
        "teacher": str(bench.teacher),
        "losses": bench.losses,
        "steps": bench.steps,
        "batch_size": bench.batch_size,
        "seeds": seeds,
        "caches": caches,
        "students": table(results),
    }


def _print_table(figures: dict[str, Any]) -> None:
    for name, facts in figures["caches"].items():
        sys.stdout.write(
            f"{name}: {facts['setting']}, {facts['bytes_per_position']} B a position, worst "
            f"gradient cosine {facts['worst_cosine']:.4f}\n"
        )
    sys.stdout.write(
        f"{figures['losses']}, {figures['steps']} steps of {figures['batch_size']} rows, seeds "
        f"{figures['seeds']}: KL from the teacher, held out, in nats (sd over seeds)\n"
    )
    for line in figures["students"]:
        sys.stdout.write(
            f"  {line['student']:<26}{line['kl_mean']:.4f} ({line['kl_sd']:.4f})   gain kept "
            f"{100 * line['gain_kept_mean']:6.1f}% ({100 * line['gain_kept_sd']:.1f})   "
            f"{line['train_seconds_mean']:.0f} s\n"
        )


def main() -> None:
    """Parse the command line, do what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/benchmark/code"))
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--first-steps", type=int, default=400, help="of cross entropy (400)")
    parser.add_argument("--first-learning-rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=200, help="of distillation (200)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ce", type=float, default=1.0, help="weight of the cross entropy (1)")
    parser.add_argument("--tidal", type=float, default=4.0, help="weight of TIDAL (4)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread (2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if len(options.seeds) < 2:
        parser.error("--seeds: expected at least 2, a spread needs them")
    bench = Bench(
        folder=options.output,
        block_size=options.block_size,
        steps=options.steps,
        batch_size=options.batch_size,
        hidden_size=options.hidden_size,
        layers=options.layers,
        learning_rate=options.learning_rate,
        losses={"ce": options.ce, "tidal": options.tidal},
        first_steps=options.first_steps,
        first_learning_rate=options.first_learning_rate,
    )
    if not bench.teacher.is_dir():
        parser.error(f"{bench.teacher}: run 'python -m benchmarks.teacher -o {bench.folder}' first")
    figures = run(bench, options.seeds, options.workers)
    if options.json:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    else:
        _print_table(figures)


if __name__ == "__main__":
    main()
