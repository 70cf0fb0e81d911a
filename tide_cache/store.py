"""Where files are: a folder or bucket behind fsspec, with atomic create-if-absent publishing.

Publishing is the one rule that makes building safe: a file appears whole or not at all, and the
first writer wins. On a local disk: unique temporary name, fsync, hard link, fsync of the folder. On
object stores: one conditional put. Reading names the file in every error.
"""

import errno
import hashlib
import logging
import os
import posixpath
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tide_cache.errors import StorageError

logger = logging.getLogger(__name__)
_READ_BYTES = 1 << 22
TEMPORARY_SUFFIX = ".tmp"


class Store:
    """A folder, local or remote, addressed by relative POSIX paths."""

    def __init__(self, url: str | Path) -> None:
        self.url = str(url).rstrip("/") or "/"
        # A listing that is remembered does not show what other writers publish.
        self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url,)

    def path(self, relative: str) -> str:
        """Return the full path of `relative` as the file system understands it."""
        return posixpath.join(self._root, relative) if relative else str(self._root)

    def exists(self, relative: str = "") -> bool:
        """Say whether the file or folder exists."""
        return bool(self._fs.exists(self.path(relative)))

    def size_bytes(self, relative: str) -> int:
        """Return the size of a file. Raises StorageError when it is missing."""
        try:
            return int(self._fs.size(self.path(relative)))
        except FileNotFoundError as error:
            raise self._missing(relative) from error

    def list_files(self, relative: str = "") -> list[str]:
        """Return the relative paths of all files below `relative`, sorted."""
        if not self.exists(relative):
            return []
        self._fs.invalidate_cache()
        found = self._fs.find(self.path(relative))
        return sorted(posixpath.relpath(path, self._root) for path in found)

    def modified(self, relative: str = "") -> list[datetime]:
        """Return when each file below `relative` was last written, as the store says."""
        if not self.exists(relative):
            return []
        self._fs.invalidate_cache()
        found = self._fs.find(self.path(relative), detail=True)
        return [time for facts in found.values() if (time := _modified(facts)) is not None]

    def open(self, relative: str) -> BinaryIO:
        """Open a file for reading. Raises StorageError when it is missing."""
        try:
            return cast(BinaryIO, self._fs.open(self.path(relative), "rb"))
        except FileNotFoundError as error:
            raise self._missing(relative) from error
        except OSError as error:
            raise StorageError(f"{self.url}/{relative}: cannot read: {error}") from error

    def read_bytes(self, relative: str) -> bytes:
        """Read a whole file. Raises StorageError when it is missing or unreadable."""
        with self.open(relative) as file:
            return file.read()

    def read_many(self, relatives: Sequence[str]) -> list[bytes]:
        """Read small files whole, together where the store can; what vanishes is left out."""
        if not relatives:
            return []
        paths = [self.path(relative) for relative in relatives]
        try:
            found = self._fs.cat(paths, on_error="omit")
        except OSError as error:
            raise StorageError(f"{self.url}: cannot read: {error}") from error
        # One path is answered by its bytes alone.
        return [found] if isinstance(found, bytes) else [found[path] for path in sorted(found)]

    def sha256(self, relative: str) -> str:
        """Return the hex sha256 of a file, read as a stream."""
        digest = hashlib.sha256()
        with self.open(relative) as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def publish(self, relative: str, data: bytes) -> bool:
        """Create a file whole, if it is absent. Returns False when another writer was first.

        Raises StorageError when the disk is full or refuses; nothing is left behind then.
        """
        try:
            if self.is_local:
                return _publish_local(Path(self.path(relative)), data)
            if self.exists(relative):
                return False
            self._fs.pipe_file(self.path(relative), data, mode="create")
            return True
        except FileExistsError:
            return False
        except OSError as error:
            raise _explain_write(f"{self.url}/{relative}", len(data), error) from error

    def remove(self, relative: str) -> None:
        """Remove a file or a folder with all that is in it, if it exists."""
        if self.exists(relative):
            self._fs.rm(self.path(relative), recursive=True)

    def _missing(self, relative: str) -> StorageError:
        return StorageError(f"{self.url}/{relative}: no such file")


def _modified(facts: dict[str, Any]) -> datetime | None:
    """Read the time of a listing: seconds on local disks, a datetime in buckets."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = facts.get(name)
        if isinstance(value, datetime):
            return value.astimezone(UTC)
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value, UTC)
    return None


def _publish_local(path: Path, data: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            _link(temporary, path)
        except FileExistsError:
            return False
        except FileNotFoundError:
            # The writer that finished the set has swept this file: its own stands there.
            if path.exists():
                return False
            raise
        _sync_folder(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        # File systems without hard links: rename is atomic, only "first wins" becomes "last wins"
        # for two writers within the same instant, whose bytes are equal anyway.
        if path.exists():
            raise FileExistsError(path) from error
        temporary.replace(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain_write(where: str, size_bytes: int, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"{where}: the disk is full (needed {size_bytes} bytes); nothing of this file was kept",
            hint="free some space and run the same command again",
        )
    return StorageError(
        f"{where}: cannot write: {error.strerror or error}",
        hint="repair the storage and run the same command again",
    )
