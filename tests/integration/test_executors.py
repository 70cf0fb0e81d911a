"""Both executors, with real processes: every task once, whatever dies; what kills is set aside."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stage1_teacher.events import NO_EVENTS, EventLog
from stage1_teacher.executors.base import Executor, TaskQueue, WorkerDied
from stage1_teacher.executors.local import LocalExecutor
from tests.executor_workers import BAD, BROKEN, DEADLY, Maker, begun, wait_for
from tests.ray_clusters import ray_cluster
from tide_cache.errors import ConfigError, DataError, TideError


@pytest.fixture(scope="module")
def ray_executor() -> Iterator[Executor]:
    with ray_cluster(num_nodes=1, num_cpus=2):
        from stage1_teacher.executors.ray import RayExecutor

        yield RayExecutor(num_workers=2, uses_gpu=False)


@pytest.fixture(params=["one process", "two processes", "ray"])
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "ray":
        found: Executor = request.getfixturevalue("ray_executor")
        return found
    return LocalExecutor(1 if request.param == "one process" else 2)


@pytest.fixture(params=["two processes", "ray"])
def processes(request: pytest.FixtureRequest) -> Executor:
    """An executor whose workers are other processes."""
    if request.param == "ray":
        found: Executor = request.getfixturevalue("ray_executor")
        return found
    return LocalExecutor(2)


def run(
    executor: Executor, maker: Maker, tasks: list[int], log: EventLog = NO_EVENTS
) -> tuple[list[int], dict[int, TideError]]:
    done: list[int] = []
    failed = executor.run(maker, tasks, lambda task, result: done.append(result[0]), log)
    return done, failed


def test_every_task_is_done_once(executor: Executor, tmp_path: Path) -> None:
    done, failed = run(executor, Maker(tmp_path), list(range(20)))
    assert sorted(done) == list(range(20))
    assert not failed
    assert [task for task, _ in begun(tmp_path)] == list(range(20))


def test_no_tasks_make_no_worker(executor: Executor, tmp_path: Path) -> None:
    assert run(executor, Maker(tmp_path, on_start="refuse"), []) == ([], {})


def test_two_processes_share_the_work(processes: Executor, tmp_path: Path) -> None:
    run(processes, Maker(tmp_path, seconds=0.1), list(range(12)))
    assert len({process for _, process in begun(tmp_path)}) == 2
    assert os.getpid() not in {process for _, process in begun(tmp_path)}


def test_a_task_with_a_bad_row_is_set_aside_and_the_others_go_on(
    executor: Executor, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    done, failed = run(executor, Maker(make(tmp_path)), [0, BAD, 1, BAD + 1, 2], EventLog(log))
    assert sorted(done) == [0, 1, 2]
    assert sorted(failed) == [BAD, BAD + 1]
    assert isinstance(failed[BAD], DataError)
    assert (failed[BAD].message, failed[BAD].hint) == (f"row {BAD} is bad", "repair it")
    assert {e["task"] for e in events(log, "task_set_aside")} == {BAD, BAD + 1}


def test_when_every_task_fails_the_run_stops(executor: Executor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 20"):
        run(executor, Maker(tmp_path), list(range(BAD, BAD + 100)))
    assert len(begun(tmp_path)) < 30


def test_a_bug_stops_the_run_with_its_trace(executor: Executor, tmp_path: Path) -> None:
    with pytest.raises((ZeroDivisionError, RuntimeError), match=f"bug in {BROKEN}"):
        run(executor, Maker(tmp_path), [0, BROKEN])


def test_a_worker_that_cannot_start_says_why(executor: Executor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such model; name another"):
        run(executor, Maker(tmp_path, on_start="refuse"), [0, 1])


def test_workers_that_die_before_their_first_task_stop_the_run(
    processes: Executor, tmp_path: Path
) -> None:
    with pytest.raises(WorkerDied, match="worker processes died before their first task"):
        run(processes, Maker(tmp_path, on_start="die"), [0, 1])


def test_a_task_that_kills_three_workers_is_set_aside(processes: Executor, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    folder = make(tmp_path)
    done, failed = run(processes, Maker(folder), [*range(6), DEADLY, *range(6, 12)], EventLog(log))
    assert sorted(done) == list(range(12))
    assert list(failed) == [DEADLY]
    assert isinstance(failed[DEADLY], WorkerDied)
    assert "killed 3 workers" in failed[DEADLY].message
    assert len([task for task, _ in begun(folder) if task == DEADLY]) == 3
    assert len(events(log, "worker_died")) == 3


def test_a_killed_worker_is_replaced_and_its_task_done(processes: Executor, tmp_path: Path) -> None:
    folder = make(tmp_path)

    def kill_first() -> None:
        wait_for(lambda: len(begun(folder)) > 2, "the first tasks")
        os.kill(begun(folder)[0][1], signal.SIGKILL)

    killer = threading.Thread(target=kill_first)
    killer.start()
    done, failed = run(processes, Maker(folder, seconds=0.15), list(range(20)))
    killer.join()
    assert sorted(done) == list(range(20))
    assert not failed
    assert len({process for _, process in begun(folder)}) == 3


def test_a_function_is_run_where_workers_run(processes: Executor) -> None:
    found = processes.call(process_of, None)
    assert (found == os.getpid()) == isinstance(processes, LocalExecutor)
    with pytest.raises(ConfigError, match="not here; go there"):
        processes.call(refuse, None)


def process_of(progress: object) -> int:
    return os.getpid()


def refuse(progress: object) -> None:
    raise ConfigError("not here", hint="go there")


def test_an_innocent_task_beside_a_deadly_one_is_not_blamed() -> None:
    """Three tasks are with a worker at a time; whoever was there when it died then runs alone."""
    queue = TaskQueue([7, 8, 9, 10], NO_EVENTS)
    queue.started(0)
    assert [queue.take(0, 3) for _ in range(4)] == [7, 8, 9, None]
    queue.died(0, "killed")
    for worker, deadly in ((1, False), (2, True), (3, False), (4, True)):
        queue.started(worker)
        task = queue.take(worker, 3)
        assert task is not None
        assert queue.take(worker, 3) is None, "a suspect runs alone"
        if deadly:
            queue.died(worker, "killed")
        else:
            queue.done(worker, task)
    # 7 done, 8 killed its second, 9 done, 8 killed its third.
    assert list(queue.set_aside) == [8]
    queue.started(5)
    assert queue.take(5, 3) == 10
    queue.done(5, 10)
    assert queue.is_finished


def make(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    return tmp_path / "tasks"


def events(log: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in log.read_text().splitlines()]
    assert all({"time", "host", "pid", "event"} <= set(event) for event in found)
    return [event for event in found if event["event"] == name]
