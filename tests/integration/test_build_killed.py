"""Builds that are killed, wherever: what comes out is byte for byte the undisturbed cache.

Each row exactly once follows from that. Processes are real and die by SIGKILL, at every step of a
commit and at random moments.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.build_grounds import NUM_TASKS, BuildGround, write_build_ground
from tests.builders import PROJECT_ROOT, all_files, command_environment, run_command
from tests.executor_workers import wait_for
from tests.watched_builds import Watched, watched

_NUM_KILLS = 50
# A process is killed within so many seconds of the last one.
_MOMENT_S = 0.8
_NUM_TASKS = 60


@pytest.mark.slow
def test_a_build_killed_at_any_step_of_a_commit_is_finished_by_the_next(
    build_ground: BuildGround, tmp_path: Path
) -> None:
    """Two processes share the steps: one takes the odd ones."""
    small = small_ground(build_ground, tmp_path)
    processes = []
    for first in (1, 2):
        folder = tmp_path / f"from-{first}"
        folder.mkdir()
        arguments = [build_ground.config, small, folder, str(first), "2"]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.kill_points", *map(str, arguments)],
                cwd=PROJECT_ROOT,
                env=command_environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    steps: Counter[str] = Counter()
    for process, first in zip(processes, (1, 2), strict=True):
        out, err = process.communicate(timeout=1200)
        assert process.returncode == 0, err
        for line in out.splitlines():
            facts = json.loads(line)
            assert facts["exit"] in (0, -signal.SIGKILL), err
            assert facts["exit_of_next"] == 0, err
            if facts["exit"]:
                steps[facts["what"]] += 1
            files = all_files(tmp_path / f"from-{first}" / f"{facts['step']:04d}")
            assert files == all_files(tmp_path / "from-1" / "whole"), facts
    whole = all_files(tmp_path / "from-1" / "whole")
    assert "manifest.json" in whole
    assert not any("_build" in path or path.endswith(".tmp") for path in whole)
    # Claim, codec file, calibration, header, total; two shards and a record; card and manifest: ten
    # files, each with five steps; then the state is removed.
    for step in (
        "half a file",
        "a whole file, not yet published",
        "after link",
        "before a folder is durable",
    ):
        assert steps[step] == 10, step
    assert steps["before unlink"] > 10


def small_ground(build_ground: BuildGround, tmp_path: Path) -> Path:
    """A premasked set of one task: every step costs two builds."""
    done = run_command(
        "prepare",
        build_ground.config,
        "-o",
        tmp_path / "premasked",
        "--set",
        f"sources={first_rows(build_ground.folder / 'chat.jsonl', 8, tmp_path)}",
        "--workers",
        "1",
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / "premasked"


def first_rows(path: Path, count: int, tmp_path: Path) -> Path:
    lines = path.read_text().splitlines(keepends=True)[:count]
    (tmp_path / "few.jsonl").write_text("".join(lines))
    return tmp_path / "few.jsonl"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_build_killed_at_random_moments_is_finished_by_the_next(tmp_path: Path) -> None:
    """Two workers and their driver, 50 times; most kills hit a worker.

    A task that is unlucky three times is set aside, and done by the next build.
    """
    ground = write_build_ground(tmp_path / "ground", num_tasks=_NUM_TASKS)
    chance = random.Random(0)
    kills: Counter[str] = Counter()
    number = 0
    while kills.total() < _NUM_KILLS:
        output = tmp_path / f"cache-{number}"
        number += 1
        while not (output / "manifest.json").exists():
            with watched(ground, output, "--workers", "2") as build:
                torment(build, chance, kills)
                _, stderr = build.process.communicate(timeout=240)
            ended_well = build.process.returncode in (0, -signal.SIGKILL)
            assert ended_well or "killed 3 workers" in stderr, stderr
        if all_files(output) != ground.files:
            # The driver died between its manifest and the end of its sweep.
            done = run_command(*ground.arguments(output), "--workers", "1")
            assert done.returncode == 0, done.stderr
        assert all_files(output) == ground.files
    assert kills["worker"] > 25
    assert kills["driver"] >= 5


def torment(build: Watched, chance: random.Random, kills: Counter[str]) -> None:
    """Kill workers until it is the driver's turn, the build ends, or there were enough."""
    wait_for(
        lambda: bool(build.workers()) or build.process.poll() is not None, "a worker", timeout_s=120
    )
    while kills.total() < _NUM_KILLS and build.process.poll() is None:
        time.sleep(chance.uniform(0, _MOMENT_S))
        workers = build.workers()
        if chance.random() < 0.15:
            kills["driver"] += 1
            build.kill_driver()
        elif workers:
            kills["worker"] += 1
            os.kill(chance.choice(workers), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_builds_in_one_folder_share_the_work(build_ground: BuildGround, tmp_path: Path) -> None:
    output = tmp_path / "cache"
    with watched(build_ground, output, "--workers", "1") as first:
        wait_for(lambda: len(first.events("task_done")) > 1, "the first tasks", timeout_s=120)
        second = run_command(*build_ground.arguments(output), "--workers", "1", "--json")
        assert second.returncode == 0, second.stderr
        _, stderr = first.process.communicate(timeout=240)
        assert first.process.returncode == 0, stderr
    assert all_files(output) == build_ground.files


def test_shares_fill_one_folder_and_the_last_finishes_it(
    build_ground: BuildGround, tmp_path: Path
) -> None:
    output = tmp_path / "cache"
    for index in (2, 0, 1):
        done = run_command(
            *build_ground.arguments(output),
            "--shard-range",
            f"{index}/3",
            "--workers",
            "1",
            "--json",
        )
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
        if index != 1:
            assert facts["finished"] is False
            assert facts["num_tasks"] == {"made": NUM_TASKS // 3, "kept": 0}
            told = json.loads(run_command("status", output, "--json").stdout)
            assert told["state"] == "building"
            assert told["num_tasks"] == NUM_TASKS
            assert told["num_tasks_done"] == (4 if index == 2 else 8)
            assert 0 < told["num_rows_done"] < told["num_rows"]
            assert "rows/s between first and last task" in run_command("status", output).stdout
    assert all_files(output) == build_ground.files
    for wrong in ("3/3", "1", "a/b", "-1/2"):
        done = run_command(*build_ground.arguments(output), f"--shard-range={wrong}")
        assert done.returncode == 2
        assert "--shard-range: expected" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_folder_that_is_lost_under_a_build_stops_it(
    build_ground: BuildGround, tmp_path: Path
) -> None:
    """As when a mount goes: nothing may be written into the empty place."""
    (tmp_path / "mount").mkdir()
    output = tmp_path / "mount" / "cache"
    with watched(
        build_ground, output, "--workers", "1", "--events", str(tmp_path / "log")
    ) as build:
        build.log = tmp_path / "log"
        wait_for(lambda: len(build.events("task_done")) > 0, "the first task", timeout_s=120)
        (tmp_path / "mount").rename(tmp_path / "away")
        (tmp_path / "mount").mkdir()
        _, stderr = build.process.communicate(timeout=240)
    assert build.process.returncode == 1
    assert "_build/header.json has gone since this command began" in stderr
    assert not list((tmp_path / "mount").rglob("*.parquet"))
    (tmp_path / "mount").rmdir()
    (tmp_path / "away").rename(tmp_path / "mount")
    done = run_command(*build_ground.arguments(output), "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert all_files(output) == build_ground.files


def test_times_of_files_do_not_matter(build_ground: BuildGround, tmp_path: Path) -> None:
    """Machines whose clocks are years apart share a folder."""
    output = tmp_path / "cache"
    run_command(*build_ground.arguments(output), "--shard-range", "0/2", "--workers", "1")
    for index, path in enumerate(sorted(output.rglob("*"))):
        os.utime(path, (1e9, 4e9) if index % 2 else (4e9, 1e9))
    told = json.loads(run_command("status", output, "--json").stdout)
    assert told["num_tasks_done"] == NUM_TASKS // 2
    done = run_command(*build_ground.arguments(output), "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert all_files(output) == build_ground.files
