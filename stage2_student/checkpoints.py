"""Checkpoints: whole or absent, few, and enough to go on to the same bits.

A checkpoint is a folder `step-00000100` in the released format (so any of them can be used as a
student) plus the optimiser's state and `state.json`: how many steps are done, of which set, under
which config. It is written beside its place, synced, and renamed. There is no random state to keep:
a step's seed, rows and learning rate are functions of its number. Nothing in it is a pickle.
"""

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from stage2_student.stream import StreamState
from tide_cache.canonical import pretty_json
from tide_cache.config import StrictModel
from tide_cache.errors import CompatibilityError, ConfigError, FormatError, StorageError

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_VERSION = 1
AUTO, NEVER = "auto", "never"
# What a checkpoint meant that was written before these keys existed.
_BEFORE_THEY_WERE_KEYS = {"optimizer.state": "float32"}
_STEP = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp"
_SET_ASIDE = ".later"


class CheckpointConfig(StrictModel):
    """How often a run can be resumed from, and how many such points stay on disk."""

    every: int = Field(500, ge=1, description="steps between two checkpoints; one more at the end")
    keep: int = Field(2, ge=1, description="the newest so many stay")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A whole checkpoint: its folder, where the stream stands, the config's deciding keys."""

    folder: Path
    stream: StreamState
    deciding_keys: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.stream.num_steps_done

    def require_config(self, keys: dict[str, Any]) -> None:
        """Raise CompatibilityError naming the keys that would alter the run."""
        present = _BEFORE_THEY_WERE_KEYS | self.deciding_keys
        differing = sorted(k for k in keys | present if keys.get(k) != present.get(k))
        if differing:
            shown = ", ".join(
                f"{key} (begun with {present.get(key)!r}, now {keys.get(key)!r})"
                for key in differing[:4]
            )
            more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
            raise CompatibilityError(
                f"{self.folder}: begun with another config: {shown}{more}",
                hint="restore these keys to go on, or train into an empty output folder",
            )


def find_resume_point(output: Path, resume: str) -> Checkpoint | None:
    """Return the checkpoint to go on from: the newest (`auto`), a given folder, or none.

    Raises ConfigError for `never` where the output holds a run already, and where the folder given
    is no checkpoint.
    """
    if resume not in (AUTO, NEVER):
        return read_checkpoint(Path(resume))
    present = list_checkpoints(output)
    if not present:
        return None
    if resume == NEVER:
        raise ConfigError(
            f"{output}: holds a run already (last checkpoint: {present[-1].name})",
            hint="name another output, remove that folder, or leave --resume out to go on with it",
        )
    return read_checkpoint(present[-1])


def list_checkpoints(output: Path) -> list[Path]:
    """Return the folders of all whole checkpoints, by step."""
    folder = output / FOLDER
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's state. Raises ConfigError without one, FormatError when it is broken."""
    path = folder / STATE_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{folder}: not a checkpoint (no {STATE_FILE})",
            hint="name a folder such as OUTPUT/checkpoints/step-00000500",
        ) from error
    except ValueError as error:
        raise FormatError(f"{path}: not JSON: {error}") from error
    if values.get("state_version") != STATE_VERSION:
        raise FormatError(
            f"{path}: state_version: this program reads {STATE_VERSION}, got "
            f"{values.get('state_version')!r}"
        )
    return Checkpoint(
        folder=folder,
        stream=StreamState(**values["stream"]),
        deciding_keys=values["deciding_keys"],
    )


def write_checkpoint(
    output: Path,
    stream: StreamState,
    *,
    deciding_keys: dict[str, Any],
    config: dict[str, Any],
    write_files: Callable[[Path], None],
    keep: int,
) -> Path:
    """Publish a checkpoint and remove the oldest beyond `keep`. `write_files` fills its folder.

    Raises StorageError when the disk is full; older checkpoints are untouched then.
    """
    target = output / FOLDER / f"step-{stream.num_steps_done:08d}"
    state = {
        "state_version": STATE_VERSION,
        "stream": stream.as_json(),
        "deciding_keys": deciding_keys,
        "config": config,
    }

    def write(folder: Path) -> None:
        write_files(folder)
        (folder / STATE_FILE).write_bytes(pretty_json(state))

    publish_folder(target, write)
    for old in list_checkpoints(output)[:-keep]:
        shutil.rmtree(old)
    return target


def publish_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder and move it to `target`, replacing what is there. Whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        temporary.mkdir()
        write(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise StorageError(
            f"{target}: cannot write: {error.strerror or error}; nothing of it was kept",
            hint="free some space and run the same command again: it goes on from the last "
            "checkpoint",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(output: Path, resumed_step: int) -> None:
    """Remove half-written folders of killed runs and set aside checkpoints behind `resumed_step`.

    The latter exist when a run is resumed from an earlier point on purpose: it will write them
    anew, and until then the newest must be the one in use.
    """
    for parent in (output, output / FOLDER):
        for path in parent.glob(f".*{_TEMPORARY}"):
            if path.is_dir():
                shutil.rmtree(path)
    for path in list_checkpoints(output):
        if int(path.name.removeprefix("step-")) > resumed_step:
            aside = path.with_name(path.name + _SET_ASIDE)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning("%s is later than the point resumed from: renamed to %s", path, aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
