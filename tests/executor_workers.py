"""Workers for tests of the executors: what a task does is written in its number."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stage1_teacher.executors.base import PlainWorker
from tide_cache.errors import ConfigError, DataError

DEADLY, BAD, BROKEN = 1000, 2000, 3000


@dataclass(frozen=True)
class Maker:
    """Makes workers that leave a file for each task begun: `TASK.PID`.

    Tasks from DEADLY on kill their process, from BAD on raise a DataError, from BROKEN on a bug.
    """

    folder: Path
    seconds: float = 0.0
    on_start: str = ""

    def __call__(self, slot: int) -> PlainWorker[tuple[int, int]]:
        if self.on_start == "refuse":
            raise ConfigError("no such model", hint="name another")
        if self.on_start == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return PlainWorker(self.work)

    def work(self, task: int) -> tuple[int, int]:
        (self.folder / f"{task}.{os.getpid()}").touch()
        time.sleep(self.seconds)
        if DEADLY <= task < BAD:
            os.kill(os.getpid(), signal.SIGKILL)
        if BAD <= task < BROKEN:
            raise DataError(f"row {task} is bad", hint="repair it")
        if task >= BROKEN:
            raise ZeroDivisionError(f"bug in {task}")
        return task, os.getpid()


def begun(folder: Path) -> list[tuple[int, int]]:
    """Return (task, process) of each task that was begun."""
    names = [path.name.split(".") for path in folder.iterdir()]
    return sorted((int(task), int(process)) for task, process in names)


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    """Wait until a condition holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s} s for {what}"
        time.sleep(0.01)
