"""What runs tasks has in common: workers, and one rule for tasks that fail or kill.

An executor makes workers, hands each as many tasks as it wants at a time, and reports results as
they come. Correctness never depends on it: tasks publish their own files, whole or not at all. What
goes wrong is of three kinds. An error that concerns the rows of one task sets that task aside, and
the others go on. A worker that dies is replaced and its tasks go back; a task that has killed three
workers is set aside. Anything else (a config, a full disk, a bug) stops the run.
"""

import logging
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

from stage1_teacher.events import EventLog
from tide_cache.errors import TideError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Value = TypeVar("Value")
Progress = Callable[[int, int], None]
MAX_DEATHS = 3
MAX_SET_ASIDE = 10
# A worker that cannot even start is no task's fault.
MAX_FAILED_STARTS = 3


class WorkerDied(TideError):
    """A worker process was killed or crashed."""


class Worker(Protocol[Result]):
    """Does tasks; made once per process, so that a model is loaded once.

    `depth`: how many tasks it takes at a time, so that reading, computing and writing overlap.
    """

    @property
    def depth(self) -> int:
        """Return how many unfinished tasks keep every part of it busy."""
        ...

    def submit(self, task: int) -> "Future[Result]":
        """Begin a task, in the order of the calls."""
        ...

    def close(self) -> None:
        """Begin nothing more; what runs may be cut short."""
        ...


MakeWorker = Callable[[int], Worker[Result]]
OnDone = Callable[[int, Result], None]


class PlainWorker(Generic[Result]):
    """A function as a worker: one task at a time, in the caller's thread."""

    depth = 1

    def __init__(self, function: Callable[[int], Result]) -> None:
        self._function = function

    def submit(self, task: int) -> "Future[Result]":
        """Do the task now."""
        future: Future[Result] = Future()
        try:
            future.set_result(self._function(task))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Nothing to do."""


class Executor(Protocol):
    """Runs tasks on workers."""

    def call(
        self, function: Callable[[Progress | None], Value], progress: Progress | None
    ) -> Value:
        """Run a picklable function once, where a worker would run.

        It gets `progress`, or None where it runs in another process.
        """
        ...

    def run(
        self,
        make_worker: MakeWorker[Result],
        tasks: Sequence[int],
        on_done: OnDone[Result],
        log: EventLog,
    ) -> dict[int, TideError]:
        """Run all tasks with workers of `make_worker(slot)`, one per process; picklable.

        `slot` counts the workers of a machine from 0 (a build takes its GPU by it). `on_done(task,
        result)` is called here as each task ends. Returns the tasks that were set aside, with the
        reason. Raises what concerns all tasks.
        """
        ...


class TaskQueue:
    """Which task a worker gets next, and what becomes of those it held when it died.

    Pure bookkeeping, shared by the executors; workers are known by a number. A task that was in a
    worker that died runs alone in its next one, so that only it is to blame.
    """

    def __init__(
        self, tasks: Iterable[int], log: EventLog, *, max_failed_starts: int = MAX_FAILED_STARTS
    ) -> None:
        self._fresh = deque(tasks)
        self._ready: set[int] = set()
        self._max_failed_starts = max_failed_starts
        self._suspects: deque[int] = deque()
        self._deaths: Counter[int] = Counter()
        self._held: dict[int, list[int]] = defaultdict(list)
        self._failed_starts = 0
        self._log = log
        self.set_aside: dict[int, TideError] = {}

    @property
    def is_finished(self) -> bool:
        """Whether no task is waiting or with a worker."""
        return not (self._fresh or self._suspects or any(self._held.values()))

    @property
    def num_waiting(self) -> int:
        """How many tasks are with no worker."""
        return len(self._fresh) + len(self._suspects)

    def take(self, worker: int, depth: int) -> int | None:
        """Return the next task for a worker, or None where it has enough or nothing waits."""
        held = self._held[worker]
        if len(held) >= depth or any(self._deaths[task] for task in held):
            return None
        if self._suspects and not held:
            task = self._suspects.popleft()
        elif self._fresh:
            task = self._fresh.popleft()
        else:
            return None
        held.append(task)
        return task

    def started(self, worker: int, **facts: object) -> None:
        """A worker is ready for tasks."""
        self._failed_starts = 0
        self._ready.add(worker)
        self._log.write("worker_started", worker=worker, **facts)

    def done(self, worker: int, task: int) -> None:
        """A task has ended well."""
        self._held[worker].remove(task)

    def failed(self, worker: int, task: int, error: BaseException) -> None:
        """Set a task aside if the error concerns it alone; raise the error if not."""
        self._held[worker].remove(task)
        if not (isinstance(error, TideError) and error.is_about_rows):
            raise error
        self._set_aside(task, error)
        if len(self.set_aside) >= MAX_SET_ASIDE:
            self._log.write("too_many_failed", num_tasks=len(self.set_aside))
            raise error

    def died(self, worker: int, reason: str) -> None:
        """A worker is gone: put its tasks back, or aside if they have killed too many.

        Raises WorkerDied when workers do not even start.
        """
        held = self._held.pop(worker, [])
        self._log.write("worker_died", worker=worker, reason=reason, tasks=held)
        if worker not in self._ready:
            self._failed_starts += 1
            if self._failed_starts >= self._max_failed_starts:
                raise WorkerDied(
                    f"{self._failed_starts} worker processes died before their first task "
                    f"({reason})",
                    hint="see their last output above (out of memory?), then run the same command "
                    "again: finished tasks are kept",
                )
        self._ready.discard(worker)
        for task in held:
            self._deaths[task] += 1
            if self._deaths[task] >= MAX_DEATHS:
                self._set_aside(
                    task, WorkerDied(f"task {task} killed {MAX_DEATHS} workers (last: {reason})")
                )
            else:
                self._suspects.append(task)

    def _set_aside(self, task: int, error: TideError) -> None:
        self.set_aside[task] = error
        logger.warning("task %d is set aside: %s", task, error.message)
        self._log.write("task_set_aside", task=task, error=error.message)


def sendable(error: BaseException) -> BaseException:
    """Return an error that survives pickling: a TideError itself, others with their traceback."""
    if isinstance(error, TideError):
        return error
    text = "".join(traceback.format_exception(error))
    return RuntimeError(f"in a worker process:\n{text}")
