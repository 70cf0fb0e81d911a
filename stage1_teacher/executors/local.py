"""Run tasks in N processes of this machine, or in this process when N is 1.

Processes come from a server that has imported what they need once (`preload`), so that a worker
starts in the time that its model takes to load, a replacement too. The server holds no threads and
no GPU; a fork of this process, which does, would not be safe.
"""

import functools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.process import BaseProcess
from typing import Any, Generic

from stage1_teacher.events import EventLog
from stage1_teacher.executors.base import (
    MakeWorker,
    OnDone,
    Progress,
    Result,
    TaskQueue,
    Value,
    Worker,
    WorkerDied,
    sendable,
)
from tide_cache.errors import TideError
from tide_cache.parent_watch import exit_with_parent

_STOP_S = 5.0


class LocalExecutor:
    """Runs tasks in processes of this machine. See `base.Executor`."""

    def __init__(self, num_workers: int, *, preload: Sequence[str] = ()) -> None:
        self._num_workers = max(1, num_workers)
        self._preload = list(preload)

    def call(
        self, function: Callable[[Progress | None], Value], progress: Progress | None
    ) -> Value:
        """Run the function here."""
        return function(progress)

    def run(
        self,
        make_worker: MakeWorker[Result],
        tasks: Sequence[int],
        on_done: OnDone[Result],
        log: EventLog,
    ) -> dict[int, TideError]:
        """Run all tasks; see `base.Executor`."""
        queue = TaskQueue(tasks, log)
        if queue.is_finished:
            return {}
        if self._num_workers == 1:
            self._run_here(make_worker(0), queue, on_done)
        else:
            num_workers = min(self._num_workers, len(tasks))
            pool = _Pool(make_worker, num_workers, self._preload, queue, on_done)
            pool.run()
        return queue.set_aside

    def _run_here(self, worker: Worker[Result], queue: TaskQueue, on_done: OnDone[Result]) -> None:
        queue.started(0, process=os.getpid())
        pending: dict[Future[Result], int] = {}
        try:
            while not queue.is_finished:
                while (task := queue.take(0, worker.depth)) is not None:
                    pending[worker.submit(task)] = task
                finished, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in sorted(finished, key=pending.__getitem__):
                    task = pending.pop(future)
                    error = future.exception()
                    if error is not None:
                        queue.failed(0, task, error)
                        continue
                    queue.done(0, task)
                    on_done(task, future.result())
        finally:
            worker.close()


@dataclass(kw_only=True, slots=True, eq=False)
class _Process:
    """A worker process as its parent sees it; `depth` is 0 until it is ready."""

    slot: int
    process: BaseProcess
    connection: Connection
    depth: int = 0


class _Pool(Generic[Result]):
    """The worker processes of one run."""

    def __init__(
        self,
        make_worker: MakeWorker[Result],
        num_workers: int,
        preload: list[str],
        queue: TaskQueue,
        on_done: OnDone[Result],
    ) -> None:
        self._make_worker = make_worker
        self._num_workers = num_workers
        self._queue = queue
        self._on_done = on_done
        self._context: Any = multiprocessing.get_context("spawn")
        if "forkserver" in multiprocessing.get_all_start_methods():
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload(preload)
        self._processes: dict[int, _Process] = {}

    def run(self) -> None:
        """Run until the queue is finished; no process is left behind."""
        try:
            for slot in range(self._num_workers):
                self._start(slot)
            while not self._queue.is_finished:
                self._hand_out()
                self._listen()
        finally:
            self._stop()

    def _start(self, slot: int) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(self._make_worker, slot, theirs), name=f"worker-{slot}"
        )
        process.start()
        theirs.close()
        self._processes[slot] = _Process(slot=slot, process=process, connection=ours)

    def _hand_out(self) -> None:
        for one in self._processes.values():
            while (task := self._queue.take(one.slot, one.depth)) is not None:
                try:
                    one.connection.send(task)
                except OSError:
                    break  # it has died: its end is noticed below, with this task in its hands

    def _listen(self) -> None:
        by_handle: dict[Any, _Process] = {}
        for one in self._processes.values():
            by_handle[one.connection] = by_handle[one.process.sentinel] = one
        for handle in wait_for_any(list(by_handle)):
            one = by_handle[handle]
            if one is not self._processes.get(one.slot):
                continue  # replaced a moment ago
            if not self._receive(one):
                self._replace(one)

    def _receive(self, one: _Process) -> bool:
        """Take what a worker has said. Returns False when it is gone."""
        try:
            while one.connection.poll():
                kind, *values = one.connection.recv()
                self._hear(one, kind, values)
        except (EOFError, OSError, pickle.UnpicklingError):
            return False
        return one.process.is_alive()

    def _hear(self, one: _Process, kind: str, values: list[Any]) -> None:
        if kind == "ready":
            (one.depth,) = values
            self._queue.started(one.slot, process=one.process.pid)
        elif kind == "done":
            task, result = values
            self._queue.done(one.slot, task)
            self._on_done(task, result)
        elif kind == "failed":
            task, error = values
            self._queue.failed(one.slot, task, error)
        else:  # it could not start, and says why
            raise values[0]

    def _replace(self, one: _Process) -> None:
        one.connection.close()
        one.process.join()
        del self._processes[one.slot]
        self._queue.died(one.slot, _describe_exit(one.process.exitcode))
        if self._queue.num_waiting > 0:
            self._start(one.slot)

    def _stop(self) -> None:
        for one in self._processes.values():
            one.connection.close()  # a worker that waits for a task ends by that
            if not self._queue.is_finished:
                one.process.terminate()
        for one in self._processes.values():
            one.process.join(_STOP_S)
            if one.process.is_alive():
                one.process.kill()
                one.process.join()


def default_num_workers() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe_exit(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def _serve(make_worker: MakeWorker[Any], slot: int, connection: Connection) -> None:
    """Be a worker: take tasks from the connection until it closes."""
    exit_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    speaker = _Speaker(connection)
    try:
        worker = make_worker(slot)
    except BaseException as error:
        speaker.say("broken", sendable(error))
        return
    speaker.say("ready", worker.depth)
    try:
        while True:
            task = connection.recv()
            future = worker.submit(task)
            future.add_done_callback(functools.partial(speaker.report, task))
    except (EOFError, OSError):
        worker.close()


class _Speaker:
    """Sends to the parent from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def say(self, *message: Any) -> None:
        """Send a message; a parent that is gone hears nothing."""
        try:
            with self._lock:
                self._connection.send(message)
        except OSError:
            pass

    def report(self, task: int, future: "Future[Any]") -> None:
        """Say how a task has ended."""
        error = future.exception()
        if error is None:
            self.say("done", task, future.result())
        else:
            self.say("failed", task, sendable(error))


__all__ = ["LocalExecutor", "WorkerDied", "default_num_workers"]
