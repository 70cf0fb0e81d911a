"""Builds on a Ray cluster of several nodes on loopback: what comes and goes changes no byte."""

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.build_grounds import BuildGround, write_build_ground
from tests.builders import all_files, run_command
from tests.executor_workers import wait_for
from tests.ray_clusters import add_node, ray_cluster
from tests.watched_builds import Watched, is_alive, watched

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
_NUM_KILLS = 12


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster(num_nodes=2, num_cpus=1) as found:
        yield found


@pytest.fixture(scope="module")
def slow_ground(tmp_path_factory: pytest.TempPathFactory) -> BuildGround:
    """A task takes seconds: longer than a worker needs to start."""
    return write_build_ground(
        tmp_path_factory.mktemp("slow"), hidden_size=512, intermediate_size=2048, num_layers=8
    )


def ray_options(cluster: Any) -> tuple[str, ...]:
    return ("--executor", "ray", "--ray-address", cluster.address)


@pytest.mark.slow
def test_a_worker_killed_a_node_removed_and_one_added_change_no_byte(
    slow_ground: BuildGround, tmp_path: Path, cluster: Any
) -> None:
    """The removed node held one of two workers; the added one gets its place."""
    output = tmp_path / "cache"
    (lost,) = cluster.worker_nodes
    with watched(slow_ground, output, *ray_options(cluster)) as build:
        wait_for(lambda: len(build.workers()) == 2, "two workers", timeout_s=120)
        os.kill(build.workers()[0], signal.SIGKILL)
        wait_for(lambda: len(build.events("worker_died")) == 1, "the death to be seen")
        wait_for(lambda: len(build.workers()) == 2, "the worker's replacement", timeout_s=120)
        cluster.remove_node(lost, allow_graceful=False)
        add_node(cluster, num_cpus=1)
        _, stderr = build.process.communicate(timeout=300)
        assert build.process.returncode == 0, stderr
    assert len(build.events("worker_died")) >= 2, "the node's worker has died too"
    assert len(build.events("worker_started")) >= 3
    assert all_files(output) == slow_ground.files


@pytest.mark.slow
def test_a_ray_build_killed_at_random_moments_is_finished_by_any_executor(
    build_ground: BuildGround, tmp_path: Path, cluster: Any
) -> None:
    chance = random.Random(1)
    output = tmp_path / "cache"
    num_kills = 0
    while num_kills < _NUM_KILLS:
        with watched(build_ground, output, *ray_options(cluster)) as build:
            wait_for(
                lambda: bool(build.workers()) or build.process.poll() is not None,
                "a worker",
                timeout_s=120,
            )
            for _ in range(4):
                time.sleep(chance.uniform(0, 0.7))
                workers = build.workers()
                if workers and build.process.poll() is None:
                    os.kill(chance.choice(workers), signal.SIGKILL)
                    num_kills += 1
            kill_driver(build)
            num_kills += 1
        if (output / "manifest.json").exists():
            assert all_files(output) == build_ground.files
            output = tmp_path / f"cache-{num_kills}"
    done = run_command(*build_ground.arguments(output), "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert all_files(output) == build_ground.files


def kill_driver(build: Watched) -> None:
    workers = build.workers()
    build.process.kill()
    build.process.wait()
    wait_for(lambda: not any(map(is_alive, workers)), "Ray to end the actors", timeout_s=120)


def test_an_address_where_nobody_answers_is_named(
    build_ground: BuildGround, tmp_path: Path
) -> None:
    done = run_command(
        *build_ground.arguments(tmp_path / "cache"),
        "--executor",
        "ray",
        "--ray-address",
        "127.0.0.1:1",
    )
    assert done.returncode == 2
    assert "--ray-address: no Ray cluster answers at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr
    done = run_command(*build_ground.arguments(tmp_path / "cache"), "--ray-address", "x:1")
    assert done.returncode == 2
    assert "--ray-address: goes with --executor ray" in done.stderr
