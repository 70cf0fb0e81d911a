"""The folder of local copies: how much is in it, what may go, and who is using what.

    <folder>/<identity of a set>/manifest.json, source.json, data/..., codec/...

Any number of processes and sets share one folder and one bound. A copy in use is locked in shared
mode by whoever uses it, a download in exclusive mode (`flock`, so a process that dies lets go); the
bookkeeping of room is done under a lock of the whole folder, from the sizes on the disk, so that
nothing has to be remembered. A download takes its whole room at once.

What goes, to make room, is the copy used longest ago. Never one in use; never a file that is not in
the manifest of its set with its size; and never one whose original cannot be found any more with
that size, because then the copy is all there is.
"""

import fcntl
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from tide_cache.errors import MissingFileError, StorageError, TideError
from tide_cache.fetch import Listed, Stopped
from tide_cache.manifest import MANIFEST, Manifest, identity, manifest_bytes, parse_manifest
from tide_cache.store import Store

logger = logging.getLogger(__name__)
SOURCE = "source.json"
PART_SUFFIX = ".part"
_LOCK = ".lock"
_IDENTITY = re.compile(r"[0-9a-f]{64}")
_POLL_S = 0.05
_WAIT_FOR_ROOM_S = 300.0
_ASK_AGAIN_S = 60.0
_ASK_SILENT_AGAIN_S = 0.5
Fate = Literal["gone", "in use", "only copy", "no answer", "not ours"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Origin:
    """Where the files of a set come from, and how large they are."""

    store: Store
    sizes: dict[str, int]


class CopiesFolder:
    """A folder of copies with a bound. Raises StorageError where it cannot be used."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._origins: dict[str, _Origin | None] = {}
        self._asked_s: dict[Path, float] = {}
        self._silent_until_s: dict[str, float] = {}
        with self._usable():
            root.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._sweep()

    def add_set(self, source: Store, manifest: Manifest) -> Path:
        """Return the folder of a set, with the files that say what its copies are copies of."""
        name = identity(manifest)
        folder = self.root / name
        self._origins[name] = _Origin(store=source, sizes=_sizes(manifest))
        with self._usable(), self._locked():
            folder.mkdir(exist_ok=True)
            _write_whole(folder / MANIFEST, manifest_bytes(manifest))
            _write_whole(folder / SOURCE, json.dumps({"url": source.url}).encode())
        return folder

    def used_bytes(self) -> int:
        """Return the size of all files in the folder, whoever put them there."""
        return sum(stat.st_size for _, stat in self._files())

    @contextmanager
    def part_of(
        self, path: Path, stopped: threading.Event, *, damaged: BinaryIO | None = None
    ) -> Iterator[BinaryIO | None]:
        """Lend the file into which `path` is downloaded; None where another has finished it.

        Waits while another downloads the same. What is not moved to its place is removed. `damaged`
        is an open file at that place which is to be replaced.
        """
        part = path.with_name(f".{path.name}{PART_SUFFIX}")
        with self._usable():
            path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with self._usable():
                file = open(part, "r+b", opener=_or_create)  # noqa: SIM115
            with file:
                if self._try_lock(file, fcntl.LOCK_EX) and is_at(file, part):
                    if path.exists() and not (damaged and is_at(damaged, path)):
                        part.unlink()
                        yield None
                        return
                    try:
                        yield file
                    finally:
                        if is_at(file, part):
                            part.unlink()
                    return
            if stopped.wait(_POLL_S):
                raise Stopped

    def open_copy(self, path: Path, stopped: threading.Event) -> BinaryIO | None:
        """Open a copy that is there and keep it there until it is closed; None where it is not."""
        while True:
            try:
                with self._usable():
                    file = path.open("rb")
            except FileNotFoundError:
                return None
            if self._try_lock(file, fcntl.LOCK_SH):
                if is_at(file, path):
                    with suppress(PermissionError):  # another user's copy is as good
                        os.utime(path)  # the time by which copies are chosen to go
                    return file
                file.close()
                continue
            file.close()
            if stopped.wait(_POLL_S):
                raise Stopped

    def make_room(
        self, part: BinaryIO, size_bytes: int, stopped: threading.Event, *, patience_s: float
    ) -> None:
        """Give `part` its size, removing copies until the folder is within its bound.

        Waits where copies in use by others are in the way, and for `patience_s` where nobody says
        whether originals are there. Raises StorageError when nothing more may go.
        """
        os.ftruncate(part.fileno(), 0)
        began_s = time.monotonic()
        while not self._take_room(part, size_bytes):
            fates: list[Fate] = []
            copies, stay_bytes = self._survey()
            if stay_bytes + size_bytes > self.max_bytes:
                raise self._no_room(size_bytes, fates)  # before anything goes for nothing
            for path in copies:
                fates.append(self._let_go(path))
                if fates[-1] == "gone":
                    break
            else:
                waited_s = time.monotonic() - began_s
                may_end = "in use" in fates and waited_s < _WAIT_FOR_ROOM_S
                may_answer = "no answer" in fates and waited_s < patience_s
                if not (may_end or may_answer):
                    raise self._no_room(size_bytes, fates)
                if stopped.wait(_POLL_S):
                    raise Stopped

    def settle(self, part: BinaryIO, path: Path) -> None:
        """Move a finished download to its place."""
        with self._locked():  # a file that moves might not be counted
            Path(part.name).replace(path)

    def _take_room(self, part: BinaryIO, size_bytes: int) -> bool:
        with self._locked():
            if self.used_bytes() + size_bytes > self.max_bytes:
                return False
            os.ftruncate(part.fileno(), size_bytes)
            return True

    def _let_go(self, path: Path) -> Fate:
        """Remove a copy if it may go; say what came of it."""
        try:
            file = path.open("r+b")
        except FileNotFoundError:
            return "gone"
        except PermissionError:
            return "not ours"
        with file:
            if not self._try_lock(file, fcntl.LOCK_EX):
                return "in use"
            fate = self._ask(path)
            if fate == "gone" and is_at(file, path):
                path.unlink()
            return fate

    def _ask(self, path: Path) -> Fate:
        """Ask for the original of a copy. Returns what may become of the copy."""
        name, relative = self._split(path)
        began_s = time.monotonic()
        if began_s - self._asked_s.get(path, -_ASK_AGAIN_S) < _ASK_AGAIN_S:
            return "only copy"
        if began_s < self._silent_until_s.get(name, 0.0):
            return "no answer"
        origin = self._origin(name)
        assert origin is not None
        try:
            found = origin.store.size_bytes(relative)
            told = f"is {found} bytes now, not {origin.sizes[relative]}"
            if found == origin.sizes[relative]:
                return "gone"
        except MissingFileError:
            told = "is gone"
        except TideError as error:
            # A host that takes half a minute not to answer is not asked again for each file.
            took_s = time.monotonic() - began_s
            self._silent_until_s[name] = began_s + max(_ASK_SILENT_AGAIN_S, 10 * took_s)
            logger.warning("%s: kept: %s", path, error.message)
            return "no answer"
        if path not in self._asked_s:
            where = f"{origin.store.url}/{relative}"
            logger.warning(
                "%s: kept, as it may be the only copy: its original %s %s", path, where, told
            )
        self._asked_s[path] = time.monotonic()
        return "only copy"

    def _survey(self) -> tuple[list[Path], int]:
        """Return our copies, the one used longest ago first, and the size of what never goes."""
        copies, stay_bytes = [], 0
        for path, stat in self._files():
            name, relative = self._split(path)
            origin = self._origin(name)
            if origin is not None and origin.sizes.get(relative) == stat.st_size:
                copies.append((stat.st_mtime_ns, str(path)))
            elif not path.name.endswith(PART_SUFFIX):
                stay_bytes += stat.st_size
        return [Path(path) for _, path in sorted(copies)], stay_bytes

    def _origin(self, name: str) -> _Origin | None:
        """Return what a folder holds copies of, or None where it does not say so soundly."""
        if name not in self._origins:
            self._origins[name] = _read_origin(self.root / name)
        return self._origins[name]

    def _split(self, path: Path) -> tuple[str, str]:
        name, *rest = path.relative_to(self.root).parts
        return name, "/".join(rest)

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                try:
                    found.append((path, path.lstat()))
                except FileNotFoundError:
                    continue  # another process has just removed it
        return found

    def _sweep(self) -> None:
        """Remove the downloads of processes that were killed."""
        for path, _ in self._files():
            name, _ = self._split(path)
            if path.name.endswith(PART_SUFFIX) and _IDENTITY.fullmatch(name):
                try:
                    file = path.open("r+b")
                except FileNotFoundError:
                    continue
                with file:
                    if self._try_lock(file, fcntl.LOCK_EX) and is_at(file, path):
                        path.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.root / _LOCK).open("a") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            yield

    def _try_lock(self, file: BinaryIO, mode: int) -> bool:
        try:
            fcntl.flock(file.fileno(), mode | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            raise StorageError(
                f"{self.root}: cannot lock files here: {error.strerror or error}",
                hint="set local_store.folder to a folder on a local disk",
            ) from error

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(
                f"{self.root}: cannot keep copies here: {error.strerror or error}",
                hint="set local_store.folder to a folder on a local disk that can be written to",
            ) from error

    def _no_room(self, size_bytes: int, fates: list[Fate]) -> StorageError:
        used = self.used_bytes()
        told = ", ".join(
            f"{fates.count(fate)} {what}"
            for fate, what in (
                ("only copy", "files may be the only copies left"),
                ("no answer", "files whose originals nobody answers for"),
                ("in use", "files are in use"),
                ("not ours", "files belong to another user"),
            )
            if fate in fates
        )
        return StorageError(
            f"{self.root}: no room for {size_bytes} bytes more: {used} of {self.max_bytes} are "
            f"used, and nothing of it may go ({told or 'nothing of it was put there by us'})",
            hint="raise local_store.max_gb, or remove by hand what is not needed in that folder",
        )


def _or_create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o644)


def is_at(file: BinaryIO, path: Path) -> bool:
    """Say whether an open file is the one that stands at `path` now."""
    mine = os.fstat(file.fileno())
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _read_origin(folder: Path) -> _Origin | None:
    if not _IDENTITY.fullmatch(folder.name):
        return None
    try:
        manifest = parse_manifest((folder / MANIFEST).read_bytes(), where=str(folder))
        url = json.loads((folder / SOURCE).read_bytes())["url"]
        if identity(manifest) != folder.name:
            return None
        return _Origin(store=Store(url), sizes=_sizes(manifest))
    except (OSError, TideError, ValueError, KeyError, TypeError):
        return None


def listed_files(manifest: Manifest) -> list[Listed]:
    """Return all files that a manifest lists."""
    return [*manifest.shards, *manifest.files]


def _sizes(manifest: Manifest) -> dict[str, int]:
    return {facts.path: facts.size_bytes for facts in listed_files(manifest)}


def _write_whole(path: Path, data: bytes) -> None:
    if path.exists() and path.read_bytes() == data:
        return
    temporary = path.with_name(f".{path.name}{PART_SUFFIX}")
    temporary.write_bytes(data)
    temporary.replace(path)
