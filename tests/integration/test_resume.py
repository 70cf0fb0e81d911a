"""A run that is stopped anywhere and started again is the run that was not stopped, to the bit."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from stage2_student import checkpoints
from stage2_student.config import TrainConfig
from stage2_student.metrics import MEASURED_KEYS, read_metrics
from stage2_student.trainer import TrainSummary, train
from tests.cache_builders import SetShape, Workshop, make_workshop, write_cache
from tests.support import PROJECT_ROOT
from tide_cache.errors import CompatibilityError, ConfigError, FormatError, StorageError, TideError

SHAPE = SetShape(num_samples=60, max_blocks=6)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("workshop"), SHAPE)


def run(workshop: Workshop, output: Path, resume: str = "auto", **changes: Any) -> TrainSummary:
    config = TrainConfig.model_validate(workshop.config(output=str(output), **changes))
    return train(config, workshop.cache, resume=resume)


def losses_of(output: Path) -> list[dict[str, Any]]:
    lines = read_metrics(output / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in MEASURED_KEYS} for line in lines]


def same_weights(one: Path, other: Path) -> bool:
    left, right = (load_file(path / "final/model.safetensors") for path in (one, other))
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def start(config: Path, cache: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "stage2_student", str(config), "--cache", str(cache)],
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_at_step(process: "subprocess.Popen[bytes]", output: Path, step: int) -> None:
    metrics = output / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.002)
    raise AssertionError(f"the process ended before step {step}, with {process.returncode}")


@pytest.mark.slow
def test_killed_at_random_steps_and_started_again(workshop: Workshop, tmp_path: Path) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    draw = random.Random(seed)
    settings: dict[str, Any] = {"max_steps": 60, "checkpoints": {"every": 7}}
    config = workshop.write_config(output=str(tmp_path / "straight"), **settings)
    assert start(config, workshop.cache).wait() == 0
    config = workshop.write_config(output=str(tmp_path / "killed"), **settings)
    for step in (draw.randint(1, 25), draw.randint(26, 55)):
        kill_at_step(start(config, workshop.cache), tmp_path / "killed", step)
    assert start(config, workshop.cache).wait() == 0
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "straight")
    assert len(losses_of(tmp_path / "killed")) == 60
    assert same_weights(tmp_path / "killed", tmp_path / "straight")


class Stopped(Exception):
    """Stands for a process that ended."""


class StopAfter:
    """A progress that ends the run after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def start(self, first_step: int, max_steps: int) -> None: ...

    def update(self, steps_done: int, loss: float, tokens_per_s: float) -> None:
        if steps_done >= self.steps:
            raise Stopped

    def close(self) -> None: ...


def run_until(workshop: Workshop, output: Path, steps: int, **changes: Any) -> None:
    config = TrainConfig.model_validate(workshop.config(output=str(output), **changes))
    with pytest.raises(Stopped):
        train(config, workshop.cache, progress=StopAfter(steps))


@pytest.mark.parametrize("stop", [1, 5, 6, 9, 11])
def test_every_kind_of_point_resumes(workshop: Workshop, tmp_path: Path, stop: int) -> None:
    """Before the first checkpoint, at one, behind one, and across an epoch's edge (8 steps)."""
    run(workshop, tmp_path / "straight")
    run_until(workshop, tmp_path / "stopped", stop)
    summary = run(workshop, tmp_path / "stopped")
    # A run that stops while step 5 or 10 reports has not saved it.
    assert summary.resumed_from_step == (stop - 1) // 5 * 5
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")
    assert same_weights(tmp_path / "stopped", tmp_path / "straight")


@pytest.mark.parametrize(
    ("dtype", "state"), [("bfloat16", "float32"), ("bfloat16", "8bit"), ("float32", "8bit")]
)
def test_few_bits_resume_to_the_bit(
    workshop: Workshop, tmp_path: Path, dtype: str, state: str
) -> None:
    student = workshop.config()["student"]
    wide = {**student["architecture"], "hidden_size": 64}  # matrices of whole blocks of 8 bits
    changes: dict[str, Any] = {
        "student": {**student, "dtype": dtype, "architecture": wide},
        "optimizer": {"learning_rate": 0.01, "state": state},
    }
    run(workshop, tmp_path / "straight", **changes)
    run_until(workshop, tmp_path / "stopped", 7, **changes)
    saved = load_file(tmp_path / "stopped/checkpoints/step-00000005/optimizer.safetensors")
    assert any(".codes/" in name for name in saved) == (state == "8bit")
    assert run(workshop, tmp_path / "stopped", **changes).resumed_from_step == 5
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")
    assert same_weights(tmp_path / "stopped", tmp_path / "straight")


def test_a_half_written_line_and_folder_are_cleared(workshop: Workshop, tmp_path: Path) -> None:
    run(workshop, tmp_path / "straight")
    run_until(workshop, tmp_path / "stopped", 7)
    with (tmp_path / "stopped/metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    half = tmp_path / "stopped/checkpoints/.step-00000010.abc.tmp"
    half.mkdir()
    (half / "state.json").write_text("{}")
    run(workshop, tmp_path / "stopped")
    assert not half.exists()
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")


def test_a_finished_run_is_left_alone(workshop: Workshop, tmp_path: Path) -> None:
    first = run(workshop, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert run(workshop, tmp_path) == first
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_run_stopped_before_its_last_file_is_completed(
    workshop: Workshop, tmp_path: Path
) -> None:
    evaluation = {"cache": str(workshop.premasked)}
    whole = run(workshop, tmp_path, evaluation=evaluation)
    shutil.rmtree(tmp_path / "final")
    again = run(workshop, tmp_path, evaluation=evaluation)
    assert (tmp_path / "final/model.safetensors").is_file()
    assert again.last_metrics == whole.last_metrics
    assert again.evaluation == whole.evaluation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, r"seed \(begun with 0, now 4\)"),
        ({"max_steps": 13}, r"max_steps \(begun with 12, now 13\)"),
        ({"optimizer": {"learning_rate": 0.1}}, r"optimizer\.learning_rate"),
        ({"objective": {"losses": {"ce": 1.0, "tidal": 2.0}}}, r"objective\.losses .*'tidal': 2"),
        ({"stream": {"batch_size": 4}}, r"stream\.batch_size \(begun with 8, now 4\)"),
        ({"stream": {"batch_size": 8, "groups_per_window": 2}}, r"stream\.groups_per_window"),
    ],
)
def test_a_changed_run_is_refused_by_key(
    workshop: Workshop, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run_until(workshop, tmp_path, 7)
    with pytest.raises(CompatibilityError, match=f"begun with another config: {message}"):
        run(workshop, tmp_path, **changes)


def test_where_and_how_often_may_change(workshop: Workshop, tmp_path: Path) -> None:
    run(workshop, tmp_path / "straight")
    run_until(workshop, tmp_path / "stopped", 7)
    (tmp_path / "stopped").rename(tmp_path / "moved")
    changes: dict[str, Any] = {
        "checkpoints": {"every": 4, "keep": 1},
        "evaluation": {"cache": str(workshop.premasked)},
        # One shard a view is one pool, whatever a pool may hold.
        "stream": {"batch_size": 8, "workers": 3, "prefetch": 2, "shards_per_pool": None},
    }
    assert run(workshop, tmp_path / "moved", **changes).resumed_from_step == 5
    trained = [line for line in losses_of(tmp_path / "moved") if "loss" in line]
    assert trained == losses_of(tmp_path / "straight")


def test_activation_checkpointing_may_change_and_changes_no_bit(
    workshop: Workshop, tmp_path: Path
) -> None:
    student = {**workshop.config()["student"], "activation_checkpointing": True}
    run(workshop, tmp_path / "straight")
    run_until(workshop, tmp_path / "stopped", 7)
    assert run(workshop, tmp_path / "stopped", student=student).resumed_from_step == 5
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")
    assert same_weights(tmp_path / "stopped", tmp_path / "straight")


@pytest.mark.slow
def test_compiled_layers_learn_the_same(workshop: Workshop, tmp_path: Path) -> None:
    """Beside an optimiser that must not be compiled, and with checkpointing around the layers."""
    student = {**workshop.config()["student"], "dtype": "bfloat16"}
    compiled = {**student, "compile": True, "activation_checkpointing": True}
    run(workshop, tmp_path / "plain", student=student)
    run(workshop, tmp_path / "compiled", student=compiled)
    plain, found = losses_of(tmp_path / "plain"), losses_of(tmp_path / "compiled")
    for one, other in zip(plain, found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02)
    names = [
        set(load_file(tmp_path / x / "final/model.safetensors")) for x in ("plain", "compiled")
    ]
    assert names[0] == names[1]


def test_another_cache_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    run_until(workshop, tmp_path / "run", 7)
    other = Workshop(folder=tmp_path)
    write_cache(other.cache, workshop.premasked, k=6)
    config = TrainConfig.model_validate(workshop.config(output=str(tmp_path / "run")))
    with pytest.raises(CompatibilityError, match=r"step-00000005: begun with the cache .*another"):
        train(config, other.cache)


def test_never_refuses_to_touch_a_run(workshop: Workshop, tmp_path: Path) -> None:
    run_until(workshop, tmp_path / "run", 7)
    with pytest.raises(ConfigError, match=r"holds a run already \(last checkpoint: step-00000005"):
        run(workshop, tmp_path / "run", resume="never")
    assert run(workshop, tmp_path / "new", resume="never").resumed_from_step == 0


def test_an_earlier_point_can_be_named(workshop: Workshop, tmp_path: Path) -> None:
    run(workshop, tmp_path / "straight")
    run_until(workshop, tmp_path / "back", 11)
    point = tmp_path / "back/checkpoints/step-00000005"
    assert run(workshop, tmp_path / "back", resume=str(point)).resumed_from_step == 5
    assert losses_of(tmp_path / "back") == losses_of(tmp_path / "straight")
    names = sorted(p.name for p in (tmp_path / "back/checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000010.later", "step-00000012"]
    with pytest.raises(ConfigError, match=r"elsewhere: not a checkpoint \(no state\.json\)"):
        run(workshop, tmp_path / "back", resume=str(tmp_path / "elsewhere"))


def test_a_full_disk_keeps_the_last_checkpoint(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(workshop, tmp_path / "straight")
    sync, calls = checkpoints._sync, []

    def full_later(path: Path) -> None:
        calls.append(path)
        if "step-00000010" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    monkeypatch.setattr(checkpoints, "_sync", full_later)
    with pytest.raises(StorageError, match="step-00000010: cannot write: No space left"):
        run(workshop, tmp_path / "full")
    names = [p.name for p in (tmp_path / "full/checkpoints").iterdir()]
    assert names == ["step-00000005"]
    monkeypatch.undo()
    assert run(workshop, tmp_path / "full").resumed_from_step == 5
    assert losses_of(tmp_path / "full") == losses_of(tmp_path / "straight")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("state.json", FormatError, "state.json: not JSON"),
        ("optimizer.safetensors", FormatError, "optimizer.safetensors: not a whole safetensors"),
        ("model.safetensors", FormatError, "model.safetensors: not a whole safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_named(
    workshop: Workshop, tmp_path: Path, damage: str, error: type[TideError], message: str
) -> None:
    run_until(workshop, tmp_path, 7)
    path = tmp_path / "checkpoints/step-00000005" / damage
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(error, match=message):
        run(workshop, tmp_path)


def test_a_state_of_another_version_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    run_until(workshop, tmp_path, 7)
    path = tmp_path / "checkpoints/step-00000005/state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state_version": 9}))
    with pytest.raises(FormatError, match="state_version: this program reads 1, got 9"):
        run(workshop, tmp_path)


def test_a_checkpoint_from_before_there_were_pools(tmp_path: Path) -> None:
    """It goes on where the order is the same, and is refused by name where it is another."""
    small = SetShape(num_samples=60, samples_per_task=15, max_blocks=6)
    workshop = make_workshop(tmp_path / "workshop", small)
    whole: dict[str, Any] = {"batch_size": 8, "shards_per_pool": None}
    run_until(workshop, tmp_path / "old", 7, stream=whole)
    path = tmp_path / "old/checkpoints/step-00000005/state.json"
    state = json.loads(path.read_text())
    assert state["deciding_keys"].pop("stream.shards_per_pool") is None
    path.write_text(json.dumps(state))
    with pytest.raises(CompatibilityError, match=r"stream\.shards_per_pool \(begun with None, now"):
        run(workshop, tmp_path / "old", stream={"batch_size": 8, "shards_per_pool": 2})
    assert run(workshop, tmp_path / "old").resumed_from_step == 5
    run(workshop, tmp_path / "straight", stream=whole)
    assert losses_of(tmp_path / "old") == losses_of(tmp_path / "straight")


def test_pools_and_workers_to_the_bit(tmp_path: Path) -> None:
    """Several shards, pools of two, stopped in the second epoch, other readers afterwards."""
    small = SetShape(num_samples=60, samples_per_task=9, max_blocks=6)
    workshop = make_workshop(tmp_path / "workshop", small)
    stream = {"batch_size": 8, "shards_per_pool": 2, "groups_per_window": 1}
    run(workshop, tmp_path / "straight", stream={**stream, "workers": 0})
    run_until(workshop, tmp_path / "stopped", 9, stream={**stream, "workers": 3, "prefetch": 7})
    summary = run(workshop, tmp_path / "stopped", stream={**stream, "workers": 1, "prefetch": 1})
    assert summary.resumed_from_step == 5
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")
    assert same_weights(tmp_path / "stopped", tmp_path / "straight")
    other = {"batch_size": 8, "groups_per_window": 1}
    run(workshop, tmp_path / "whole", stream=other)
    assert losses_of(tmp_path / "whole") != losses_of(tmp_path / "straight")
