"""Reading ahead changes when things are read, never what comes out, and always ends."""

import gc
import threading
import time
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage2_student.readers import read_ahead


def reader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("tide-reader")]


@given(
    num_tasks=st.integers(0, 30),
    num_workers=st.integers(0, 5),
    num_ahead=st.integers(1, 6),
    slow=st.sets(st.integers(0, 29), max_size=4),
)
def test_results_come_in_order(
    num_tasks: int, num_workers: int, num_ahead: int, slow: set[int]
) -> None:
    def read(task: int) -> int:
        time.sleep(0.002 if task in slow else 0)
        return task * task

    found = list(read_ahead(range(num_tasks), read, num_workers=num_workers, num_ahead=num_ahead))
    assert found == [task * task for task in range(num_tasks)]
    assert not reader_threads()


@pytest.mark.parametrize(("num_workers", "num_ahead"), [(1, 1), (3, 2), (2, 5)])
def test_memory_is_bounded_by_what_is_read_ahead(num_workers: int, num_ahead: int) -> None:
    begun, made = [], []

    def tasks() -> Generator[int, None, None]:
        for task in range(20):
            begun.append(task)
            yield task

    def read(task: int) -> int:
        made.append(task)
        return task

    for done, _ in enumerate(
        read_ahead(tasks(), read, num_workers=num_workers, num_ahead=num_ahead), start=1
    ):
        time.sleep(0.005)
        assert len(begun) <= done + num_ahead
        assert len(made) <= done + num_ahead
    assert sorted(made) == list(range(20))


def test_readers_work_while_the_caller_does() -> None:
    release = threading.Barrier(3, timeout=10)

    def read(task: int) -> int:
        if task in (1, 2):
            release.wait()  # both at the same time as the caller, or never
        return task

    results = read_ahead(range(4), read, num_workers=2, num_ahead=3)
    assert next(results) == 0
    release.wait()
    assert list(results) == [1, 2, 3]


class Broken(Exception):
    """Raised by a reader."""


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_an_error_surfaces_where_it_belongs(num_workers: int) -> None:
    def read(task: int) -> int:
        if task == 3:
            raise Broken(f"task {task}")
        return task

    seen = []
    with pytest.raises(Broken, match="task 3"):
        for result in read_ahead(range(9), read, num_workers=num_workers, num_ahead=4):
            seen.append(result)
    assert seen == [0, 1, 2]
    assert not reader_threads()


def drop(results: Generator[Any, None, None]) -> None:
    results.close()


def throw(results: Generator[Any, None, None]) -> None:
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)


@pytest.mark.parametrize("end", [drop, throw])
def test_stopping_early_stops_the_threads(end: Any) -> None:
    made = []

    def read(task: int) -> int:
        made.append(task)
        time.sleep(0.01)
        return task

    results = read_ahead(range(1000), read, num_workers=3, num_ahead=50)
    assert next(results) == 0
    end(results)
    assert not reader_threads()
    assert len(made) < 20, "what was begun is finished, what waited is not"


def test_a_dropped_iterator_stops_its_threads() -> None:
    results = read_ahead(range(1000), lambda task: task, num_workers=2, num_ahead=3)
    next(results)
    assert len(reader_threads()) == 2
    del results
    gc.collect()
    assert not reader_threads()


def test_a_reader_that_hangs_does_not_hang_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage2_student.readers._JOIN_S", 0.2)
    release = threading.Event()

    def read(task: int) -> int:
        if task:
            release.wait(30)
        return task

    results = read_ahead(range(5), read, num_workers=1, num_ahead=2)
    next(results)
    began_s = time.monotonic()
    results.close()
    assert time.monotonic() - began_s < 5
    release.set()
    for thread in reader_threads():
        thread.join(10)
    assert not reader_threads()


def test_an_error_of_the_tasks_is_raised_too() -> None:
    def tasks() -> Generator[int, None, None]:
        yield 0
        raise Broken("no more")

    with pytest.raises(Broken, match="no more"):
        list(read_ahead(tasks(), int, num_workers=2, num_ahead=1))
    assert not reader_threads()
