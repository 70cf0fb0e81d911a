"""Builds that kill themselves (SIGKILL) at a chosen step of a commit. Run as a script.

    python -m tests.kill_points CONFIG PREMASKED FOLDER FIRST STEP

Steps are the calls by which a file becomes durable, is published, or is removed; a step that makes
a file durable is taken twice, once with half of the bytes lost. For each step from FIRST on, every
STEP-th, a child is forked that builds into a fresh folder and dies there; a second child builds on.
An undisturbed build is in `whole`. Prints a JSON line for each: the step, what it was, and how both
children ended. Stops when a build comes to its end before its step.
"""

import json
import os
import signal
import stat
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from stage1_teacher.build import run_build
from stage1_teacher.build_plan import BuildConfig, make_plan
from tide_cache.cache import open_cache

# Files that say who is at work hold nothing; who dies leaves them as they are.
_IGNORED = "calibration-turns"


class Killer:
    """Counts the steps of this process and kills it at one of them."""

    def __init__(self, at: int, report: Path) -> None:
        self._at = at
        self._count = 0
        self._report = report

    def install(self) -> None:
        """Wrap the calls of `os` that the store is built on."""
        fsync = os.fsync
        self._wrap("link", after=True)
        self._wrap("unlink", after=False)
        self._wrap("rmdir", after=False)

        def half_then_whole(descriptor: int) -> None:
            if _IGNORED in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
                fsync(descriptor)
                return
            found = os.fstat(descriptor)
            if stat.S_ISDIR(found.st_mode):
                if self._is_now("before a folder is durable"):
                    self._die()
                fsync(descriptor)
                return
            if self._is_now("half a file"):
                os.ftruncate(descriptor, found.st_size // 2)
                self._die()
            fsync(descriptor)
            if self._is_now("a whole file, not yet published"):
                self._die()

        os.fsync = half_then_whole

    def _wrap(self, name: str, *, after: bool) -> None:
        call: Callable[..., Any] = getattr(os, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            if _IGNORED in str(arguments[0]):
                return call(*arguments, **named)
            if not after and self._is_now(f"before {name}"):
                self._die()
            result = call(*arguments, **named)
            if after and self._is_now(f"after {name}"):
                self._die()
            return result

        setattr(os, name, wrapped)

    def _is_now(self, what: str) -> bool:
        self._count += 1
        if self._count == self._at:
            self._report.write_text(what)
        return self._count == self._at

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def build(config: Path, premasked: Path, output: Path) -> None:
    """Build in this process."""
    values = yaml.safe_load(config.read_text())["build"]
    plan = make_plan(BuildConfig.model_validate(values), open_cache(premasked), str(output))
    run_build(plan, num_workers=1)


def in_child(work: Callable[[], None]) -> int:
    """Do something in a fork of this process; returns how it ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main() -> None:
    """Kill at every step in turn."""
    config, premasked, folder = map(Path, sys.argv[1:4])
    first, stride = map(int, sys.argv[4:6])
    build(config, premasked, folder / "whole")  # and all is imported before the first fork
    at = first
    while True:
        output, report = folder / f"{at:04d}", folder / f"{at:04d}.step"

        def build_and_die(at: int = at, output: Path = output, report: Path = report) -> None:
            Killer(at, report).install()
            build(config, premasked, output)

        died = in_child(build_and_die)
        ended = 0 if died == 0 else in_child(lambda: build(config, premasked, output))  # noqa: B023
        what = report.read_text() if report.exists() else None
        facts = {"step": at, "what": what, "exit": died, "exit_of_next": ended}
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()
        if died == 0:
            return
        at += stride


if __name__ == "__main__":
    main()
