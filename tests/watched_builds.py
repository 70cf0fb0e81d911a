"""Builds in processes of their own, known to a test by their event log alone."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.build_grounds import BuildGround
from tests.builders import command, command_environment
from tests.executor_workers import wait_for


class Watched:
    """A build in processes of its own, known by its event log."""

    def __init__(self, ground: BuildGround, output: Path, *more: str) -> None:
        self.log = output.parent / f"{output.name}.events.jsonl"
        self._from = len(self.events())
        self.process = subprocess.Popen(
            command(*ground.arguments(output), *more),
            env=command_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        if not self.log.exists():
            return []
        lines = self.log.read_text().splitlines()[getattr(self, "_from", 0) :]
        found = [json.loads(line) for line in lines]
        return [event for event in found if name in (None, event["event"])]

    def workers(self) -> list[int]:
        """Processes of workers that live."""
        started = [event["process"] for event in self.events("worker_started")]
        return [process for process in started if is_alive(process)]

    def kill_driver(self) -> None:
        """Kill the driver; its workers must end by themselves."""
        workers = self.workers()
        self.process.kill()
        self.process.wait()
        wait_for(lambda: not any(map(is_alive, workers)), "workers to follow their driver")


def is_alive(process: int) -> bool:
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


@contextmanager
def watched(ground: BuildGround, output: Path, *more: str) -> Iterator[Watched]:
    build = Watched(ground, output, *more)
    try:
        yield build
    finally:
        if build.process.poll() is None:
            os.killpg(build.process.pid, signal.SIGKILL)
            build.process.wait()
