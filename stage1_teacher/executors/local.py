"""Run tasks in N processes of this machine, or in this process when N is 1.

A worker is built once per process and then called per task, so that a model or a tokenizer is
loaded once. Results come back in the order of completion; correctness never depends on it, because
tasks publish their own files. A worker that dies takes the run down with a clear error, and what
was finished stays: running the command again goes on from there.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import Any, Generic, TypeVar

from stage1_teacher.executors.parent_watch import exit_with_parent
from tide_cache.errors import TideError

Result = TypeVar("Result")
Worker = Callable[[int], Result]

_worker: Worker[Any] | None = None


class WorkerDied(TideError):
    """A worker process was killed or crashed."""


class LocalExecutor(Generic[Result]):
    """Runs `worker(task)` for many tasks, with `worker = make_worker(slot)` once per process.

    `slot` counts the processes from 0 (a build takes its GPU by it). `make_worker` must be
    picklable when there are several: processes are spawned, never forked, since torch and
    tokenizers hold threads.
    """

    def __init__(self, make_worker: Callable[[int], Worker[Result]], num_workers: int) -> None:
        self._make_worker = make_worker
        self._num_workers = max(1, num_workers)

    def run(self, tasks: Sequence[int], on_done: Callable[[int, Result], None]) -> None:
        """Run all tasks; `on_done(task, result)` is called in this process as each one ends.

        Raises the first error of a task after cancelling what has not begun.
        """
        if not tasks:
            return
        if self._num_workers == 1:
            worker = self._make_worker(0)
            for task in tasks:
                on_done(task, worker(task))
            return
        self._run_in_processes(tasks, on_done)

    def _run_in_processes(
        self, tasks: Sequence[int], on_done: Callable[[int, Result], None]
    ) -> None:
        num_workers = min(self._num_workers, len(tasks))
        context = get_context("spawn")
        slots = context.SimpleQueue()
        for slot in range(num_workers):
            slots.put(slot)
        with ProcessPoolExecutor(
            num_workers,
            mp_context=context,
            initializer=_start,
            initargs=(self._make_worker, slots),
        ) as pool:
            pending: dict[Future[Result], int] = {pool.submit(_call, t): t for t in tasks}
            try:
                while pending:
                    done, _ = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        on_done(pending[future], future.result())
                        del pending[future]
            except BrokenProcessPool as error:
                raise WorkerDied(
                    f"a worker process died ({len(pending)} tasks were left)",
                    hint="see its last output above (out of memory?), then run the same command "
                    "again: finished tasks are kept",
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def default_num_workers() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(make_worker: Callable[[int], Worker[Any]], slots: "SimpleQueue[int]") -> None:
    global _worker
    exit_with_parent()
    _worker = make_worker(slots.get())


def _call(task: int) -> Any:
    assert _worker is not None
    return _worker(task)
