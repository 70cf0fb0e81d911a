"""Reading ahead: a few threads make the next results while the caller works on this one.

Results come in the order of their tasks, whichever thread made them, so the number of threads
changes nothing but time; numpy, pyarrow and zstd let go of the interpreter while they decode. At
most `num_ahead` results wait beside the one in use, which bounds memory. An error belongs to its
task: it is raised, as it is, where that task's result would have come. Whoever stops early (an
exception, an interrupt, a generator that is dropped) stops the threads with it.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from queue import SimpleQueue
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)
_JOIN_S = 5.0

Task = TypeVar("Task")
Result = TypeVar("Result")


def read_ahead(
    tasks: Iterable[Task], read: Callable[[Task], Result], *, num_workers: int, num_ahead: int
) -> Generator[Result, None, None]:
    """Yield `read(task)` for each task, in order, made by `num_workers` threads (0: by the caller).

    `tasks` are drawn in the caller's thread, `num_ahead` (at least 1) before their results are
    needed. Closing the iterator waits for what is being read, for a few seconds at most.
    """
    if num_workers == 0:
        for task in tasks:
            yield read(task)
        return
    source = iter(tasks)
    crew = _Crew(read, num_workers)
    try:
        pending = deque(crew.begin(task) for task in islice(source, num_ahead))
        while pending:
            result = pending.popleft().wait()
            pending.extend(crew.begin(task) for task in islice(source, 1))
            yield result
    finally:
        crew.stop()


class _Reading(Generic[Task, Result]):
    """One task and, later, what came of it."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._is_done = threading.Event()
        self._result: Result | None = None
        self._error: BaseException | None = None

    def run(self, read: Callable[[Task], Result]) -> None:
        try:
            self._result = read(self._task)
        except BaseException as error:  # handed over to whoever waits
            self._error = error
        finally:
            self._is_done.set()

    def wait(self) -> Result:
        self._is_done.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


class _Crew(Generic[Task, Result]):
    """The threads of one reader."""

    def __init__(self, read: Callable[[Task], Result], num_workers: int) -> None:
        self._queue: SimpleQueue[_Reading[Task, Result] | None] = SimpleQueue()
        self._is_stopped = threading.Event()
        # Daemons: one that hangs in somebody's network must not keep the process from ending.
        self._threads = [
            threading.Thread(
                target=_serve,
                args=(self._queue, read, self._is_stopped),
                name=f"tide-reader-{number}",
                daemon=True,
            )
            for number in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, task: Task) -> _Reading[Task, Result]:
        reading: _Reading[Task, Result] = _Reading(task)
        self._queue.put(reading)
        return reading

    def stop(self) -> None:
        self._is_stopped.set()
        for _ in self._threads:
            self._queue.put(None)
        deadline_s = time.monotonic() + _JOIN_S
        for thread in self._threads:
            # A collected generator is closed by whichever thread collected it.
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline_s - time.monotonic()))
                if thread.is_alive():
                    logger.warning("%s is still reading and is left behind", thread.name)


def _serve(
    queue: "SimpleQueue[_Reading[Task, Result] | None]",
    read: Callable[[Task], Result],
    is_stopped: threading.Event,
) -> None:
    while (reading := queue.get()) is not None:
        if not is_stopped.is_set():
            reading.run(read)
        del reading  # what was made belongs to the caller alone
