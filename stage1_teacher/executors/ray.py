"""Run tasks as actors of a Ray cluster: one model each, on as many machines as there are.

Ray places actors and tells when one is gone; which task goes where, and what becomes of the tasks
of a dead actor, is `base.TaskQueue`'s to say, as everywhere. Exactly-once comes from publishing,
not from Ray. Where no number of workers is given there is one for each GPU (or processor) of the
cluster, looked up again while the build runs: a node that joins is put to work. All nodes must see
the premasked set, the checkpoint and the output under the same names.
"""

import logging
import os
import re
import socket
from collections.abc import Callable, Sequence
from typing import Any

from stage1_teacher.events import EventLog
from stage1_teacher.executors.base import (
    MAX_FAILED_STARTS,
    MakeWorker,
    OnDone,
    Progress,
    Result,
    TaskQueue,
    Value,
    sendable,
)
from tide_cache.errors import ConfigError, TideError

logger = logging.getLogger(__name__)
# How often the size of the cluster is looked up.
_LOOK_S = 5.0
_CONNECT_S = 10.0
# Reading, asking and writing, and room for questions about the actor itself.
_CONCURRENCY = 8


class RayExecutor:
    """Runs tasks on a Ray cluster. See `base.Executor`. Joins or starts the cluster at once."""

    def __init__(
        self, *, address: str | None = None, num_workers: int | None = None, uses_gpu: bool = True
    ) -> None:
        self._ray = _import_ray()
        if not self._ray.is_initialized():
            _join(self._ray, address)
        self._num_workers = num_workers
        self._resource = "GPU" if uses_gpu and self._total("GPU") else "CPU"

    def call(
        self, function: Callable[[Progress | None], Value], progress: Progress | None
    ) -> Value:
        """Run the function in a process of the cluster."""
        remote = self._ray.remote(**self._needs())(_guarded)
        kind, value = self._ray.get(remote.remote(function))
        if kind == "failed":
            raise value
        found: Value = value
        return found

    def run(
        self,
        make_worker: MakeWorker[Result],
        tasks: Sequence[int],
        on_done: OnDone[Result],
        log: EventLog,
    ) -> dict[int, TideError]:
        """Run all tasks; see `base.Executor`."""
        target = self._target()
        queue = TaskQueue(tasks, log, max_failed_starts=MAX_FAILED_STARTS * max(1, target))
        if queue.is_finished:
            return {}
        actors = _Actors(self._ray, make_worker, queue, self._needs())
        try:
            while not queue.is_finished:
                actors.hire(min(self._target(), len(tasks)))
                actors.hand_out()
                actors.listen(on_done)
        finally:
            actors.dismiss()
        return queue.set_aside

    def _needs(self) -> dict[str, Any]:
        return {"num_gpus": 1} if self._resource == "GPU" else {"num_cpus": 1}

    def _total(self, resource: str) -> int:
        return int(self._ray.cluster_resources().get(resource, 0))

    def _target(self) -> int:
        return self._num_workers or max(1, self._total(self._resource))


class _Actors:
    """The actors of one run and what they are busy with."""

    def __init__(
        self, ray: Any, make_worker: MakeWorker[Any], queue: TaskQueue, needs: dict[str, Any]
    ) -> None:
        self._ray = ray
        self._maker = ray.put(make_worker)
        self._queue = queue
        options = {**needs, "max_restarts": 0, "max_task_retries": 0}
        self._remote = ray.remote(**options, max_concurrency=_CONCURRENCY)(_Actor)
        self._actors: dict[int, Any] = {}
        self._depths: dict[int, int] = {}
        self._pending: dict[Any, tuple[int, int | None]] = {}
        self._num_hired = 0

    def hire(self, target: int) -> None:
        """Start actors until there are `target`; those that find no room wait for it."""
        while len(self._actors) < target:
            number = self._num_hired
            self._num_hired += 1
            actor = self._remote.remote()
            self._actors[number] = actor
            self._pending[actor.start.remote(self._maker)] = (number, None)

    def hand_out(self) -> None:
        """Give tasks to all that have room."""
        for number, depth in self._depths.items():
            while (task := self._queue.take(number, depth)) is not None:
                reference = self._actors[number].run.remote(task)
                self._pending[reference] = (number, task)

    def listen(self, on_done: OnDone[Any]) -> None:
        """Wait for one answer, or a while."""
        done, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=_LOOK_S)
        for reference in done:
            if reference not in self._pending:
                continue
            number, task = self._pending.pop(reference)
            try:
                kind, value = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                self._lost(number, error)
                continue
            if task is None:
                self._hear_start(number, kind, value)
            elif kind == "failed":
                self._queue.failed(number, task, value)
            else:
                self._queue.done(number, task)
                on_done(task, value)

    def dismiss(self) -> None:
        """End all actors."""
        for actor in self._actors.values():
            self._ray.kill(actor, no_restart=True)

    def _hear_start(self, number: int, kind: str, value: Any) -> None:
        if kind == "failed":
            raise value
        self._depths[number] = value.pop("depth")
        self._queue.started(number, **value)

    def _lost(self, number: int, error: Exception) -> None:
        if number not in self._actors:
            return
        del self._actors[number]
        self._depths.pop(number, None)
        gone = [ref for ref, (of, _) in self._pending.items() if of == number]
        for reference in gone:
            del self._pending[reference]
        self._queue.died(number, type(error).__name__)


class _Actor:
    """A worker in a process of the cluster."""

    def __init__(self) -> None:
        self._worker: Any = None

    def start(self, make_worker: MakeWorker[Any]) -> tuple[str, Any]:
        """Make the worker. Ray shows each actor only its own GPUs, so its slot is 0."""
        try:
            self._worker = make_worker(0)
        except BaseException as error:
            return "failed", sendable(error)
        facts = {"depth": self._worker.depth, "process": os.getpid(), "node": socket.gethostname()}
        return "ready", facts

    def run(self, task: int) -> tuple[str, Any]:
        """Do a task; errors come back as values, whole."""
        try:
            return "done", self._worker.submit(task).result()
        except BaseException as error:
            return "failed", sendable(error)


def _join(ray: Any, address: str | None) -> None:
    """Join the cluster at an address, or start one. Raises ConfigError."""
    try:
        if address is None:
            ray.init(include_dashboard=False, logging_level=logging.WARNING)
            return
        found = re.fullmatch(r"(?:ray://)?([^/:]+):(\d+)", address)
        if found is not None:
            # Ray itself tries for minutes.
            socket.create_connection((found[1], int(found[2])), timeout=_CONNECT_S).close()
        ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--ray-address: no Ray cluster answers at {address or 'this machine'}: {error}",
            hint="start one with 'ray start --head', or leave the address out for one of its own",
        ) from error


def _guarded(function: Callable[[None], Any]) -> tuple[str, Any]:
    try:
        return "done", function(None)
    except BaseException as error:
        return "failed", sendable(error)


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ConfigError(
            "--executor ray: Ray is not installed", hint="pip install 'tide-cache[ray]'"
        ) from error
    return ray
