"""An exported student to the hub: what is missing, weights first, config and card last.

What is there already with the same bytes is not sent again, so a push that broke off goes on when
the command is run again. Files with other bytes are another model's (or a card that somebody
edited): replacing them is asked for by name, and takes the config away first, so that nobody loads
half of each.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage2_student.release.model_card import CARD
from tide_cache.errors import CompatibilityError, ConfigError
from tide_cache.hub import MODEL, HubTarget
from tide_cache.store import Store

_CONFIG = "config.json"
_LAST = (CARD, _CONFIG)
OnBytes = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentFile:
    """One file of an exported student."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PushPlan:
    """What has to be sent, and what of it would replace other bytes."""

    url: str
    num_files: int
    to_send: tuple[StudentFile, ...]
    overwrites: tuple[str, ...]

    @property
    def bytes_to_send(self) -> int:
        """How many bytes are to be sent."""
        return sum(file.size_bytes for file in self.to_send)

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "url": self.url,
            "num_files": self.num_files,
            "num_to_send": len(self.to_send),
            "bytes_to_send": self.bytes_to_send,
            "overwrites": list(self.overwrites),
        }


def open_hub(place: str, *, private: bool = True) -> HubTarget:
    """Return the model repository `hf://USER/NAME[@REVISION]`, or `USER/NAME`.

    Raises ConfigError for anything else, StorageError where the hub's client is not installed.
    """
    name = place.removeprefix(MODEL.prefix)
    parts = name.split("/")
    if "://" in name or len(parts) != 2 or not all(parts) or parts[0] in ("datasets", "spaces"):
        raise ConfigError(f"--push {place}: expected {MODEL.prefix}USER/NAME")
    return HubTarget(MODEL.prefix + name, kind=MODEL, private=private)


def hub_name(place: str) -> str:
    """Return `USER/NAME`, which transformers loads from, of a place to push to."""
    return place.removeprefix(MODEL.prefix).partition("@")[0]


def plan_push(folder: Path, target: HubTarget) -> PushPlan:
    """Compare an exported folder with the repository. Nothing is written."""
    files = _files(folder)
    answers = [(file, target.has(file, None)) for file in files]
    return PushPlan(
        url=target.url,
        num_files=len(files),
        to_send=tuple(file for file, answer in answers if not answer),
        overwrites=tuple(file.path for file, answer in answers if answer is False),
    )


def push(
    folder: Path,
    target: HubTarget,
    plan: PushPlan,
    *,
    replace: bool = False,
    on_bytes: OnBytes = lambda _: None,
) -> None:
    """Carry out a plan. Raises CompatibilityError unless what is overwritten may be (`replace`).

    Raises StorageError when the hub refuses; what was sent by then stays for the next time.
    """
    if plan.overwrites and not replace:
        raise CompatibilityError(
            f"{target.url}: {len(plan.overwrites)} files there have other bytes (first: "
            f"{plan.overwrites[0]})",
            hint="name another repository, or --replace to put this student in its stead",
        )
    last = [file for file in plan.to_send if file.path in _LAST]
    weights_first = [file for file in plan.to_send if file.path not in _LAST]
    if plan.overwrites and weights_first:
        target.remove([_CONFIG])
        last = [file for file in _files(folder) if file.path in _LAST]
    target.send(Store(folder), weights_first, on_bytes)
    if last:
        target.publish({file.path: (folder / file.path).read_bytes() for file in last})
        on_bytes(sum(file.size_bytes for file in last))
    target.close()


def _files(folder: Path) -> list[StudentFile]:
    found = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        found.append(StudentFile(path=path.name, size_bytes=path.stat().st_size, sha256=sha256))
    return found
