"""What the command line of `tide-cache build` says beyond the config: where and by whom it runs."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from stage1_teacher.build import ShardRange, local_executor
from stage1_teacher.build_plan import device_name
from stage1_teacher.executors.base import Executor
from stage1_teacher.teachers.base import TeacherConfig
from tide_cache.errors import ConfigError


def parse_shard_range(text: str) -> ShardRange:
    """Read `i/N`, i from 0. Raises ConfigError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise ConfigError(f"--shard-range: expected i/N, such as 0/8, got {text!r}")
    index, count = int(found[1]), int(found[2])
    if not index < count:
        raise ConfigError(f"--shard-range: expected i from 0 to N - 1, got {text}")
    return ShardRange(index=index, count=count)


def open_executor(
    name: Literal["local", "ray"],
    teacher: TeacherConfig,
    num_workers: int | None,
    ray_address: str | None,
) -> tuple[Executor, str]:
    """Return the executor and the kind of device that its workers compute on.

    Raises ConfigError where Ray is asked for and missing, or an address is given without it.
    """
    if name == "local":
        if ray_address is not None:
            raise ConfigError("--ray-address: goes with --executor ray")
        return local_executor(teacher, num_workers), device_name(teacher)
    from stage1_teacher.executors.ray import RayExecutor

    executor = RayExecutor(
        address=ray_address, num_workers=num_workers, uses_gpu=teacher.device != "cpu"
    )
    return executor, executor.call(_DeviceOf(teacher), None)


@dataclass(frozen=True)
class _DeviceOf:
    teacher: TeacherConfig

    def __call__(self, progress: object) -> str:
        return device_name(self.teacher)


def default_event_log(output_url: str) -> Path | None:
    """Return the file beside a local output, or None where that is elsewhere or not writable."""
    fs, root = url_to_fs(output_url.rstrip("/"))
    path = Path(f"{root}.events.jsonl")
    if not isinstance(fs, LocalFileSystem):
        return None
    folder = next(parent for parent in path.parents if parent.exists())
    return path if os.access(path if path.exists() else folder, os.W_OK) else None
