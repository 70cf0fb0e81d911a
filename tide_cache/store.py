"""Where files are: a folder or bucket behind fsspec, with atomic create-if-absent publishing.

Publishing is the one rule that makes building safe: a file appears whole or not at all, and the
first writer wins. On a local disk: unique temporary name, fsync, hard link, fsync of the folder. On
object stores: one conditional put. Reading names the file in every error, and never a password that
stands in a URL.
"""

import errno
import hashlib
import io
import logging
import os
import posixpath
import re
import stat
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tide_cache.errors import ConfigError, FormatError, MissingFileError, StorageError, TideError

logger = logging.getLogger(__name__)
_READ_BYTES = 1 << 22
_REMOVALS = 5  # tries, each after others removed a part
TEMPORARY_SUFFIX = ".tmp"
_EXTRA_OF = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http", "hf": "hub"}
_PASSWORD = re.compile(r"(://)[^/@\s]*@")
_CONNECT_S, _SILENCE_S = 30.0, 60.0


class Store:
    """A folder, local or remote, addressed by relative POSIX paths."""

    def __init__(self, url: str | Path) -> None:
        self._address = str(url).rstrip("/") or "/"
        self.url = without_password(self._address)
        protocol = fsspec.core.split_protocol(self._address)[0] or "file"
        self._is_http = protocol in ("http", "https")
        # Those that can send a whole file in one answer.
        self._has_streams = self._is_http or protocol == "hf"
        self._fs, self._root = _file_system(self._address, protocol)
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self._address,)

    def path(self, relative: str) -> str:
        """Return the full path of `relative` as the file system understands it."""
        return posixpath.join(self._root, relative) if relative else str(self._root)

    def exists(self, relative: str = "") -> bool:
        """Say whether the file or folder exists. Raises StorageError when nobody can say."""
        with self._explained(relative):
            if not self._is_http:
                return bool(self._fs.exists(self.path(relative)))
            # fsspec takes a server that does not answer for one that lacks the file.
            try:
                with self._explained(relative):
                    self._fs.info(self.path(relative))
                return True
            except MissingFileError:
                return False

    def size_bytes(self, relative: str) -> int:
        """Return the size of a file.

        Raises MissingFileError when it is not there, StorageError when nobody can say.
        """
        with self._explained(relative):
            self._require_plain(relative)
            size_bytes = self._fs.size(self.path(relative))
            if size_bytes is None:
                raise StorageError(f"{self._name(relative)}: the server does not say its size")
            return int(size_bytes)

    def list_files(self, relative: str = "") -> list[str]:
        """Return the relative paths of all files below `relative`, sorted.

        A web server that shows no listings seems empty.
        """
        try:
            with self._explained(relative):
                if not self.exists(relative):
                    return []
                self._fs.invalidate_cache()
                if self.is_local:
                    return _find_local(Path(self._root), relative)
                found = self._fs.find(self.path(relative))
        except StorageError as error:
            if not self._is_http:
                raise
            logger.info("%s: no listing: %s", self._name(relative), error)
            return []
        return sorted(posixpath.relpath(path, self._root) for path in found)

    def sizes(self, relative: str = "") -> dict[str, int]:
        """Return the size of every file below `relative`, by relative path, from one listing."""
        with self._explained(relative):
            if not self.exists(relative):
                return {}
            self._fs.invalidate_cache()
            found = self._fs.find(self.path(relative), detail=True)
        return {
            posixpath.relpath(path, self._root): int(facts["size"]) for path, facts in found.items()
        }

    def modified(self, relative: str = "") -> list[datetime]:
        """Return when each file below `relative` was last written, as the store says."""
        if not self.exists(relative):
            return []
        self._fs.invalidate_cache()
        found = self._fs.find(self.path(relative), detail=True)
        return [time for facts in found.values() if (time := _modified(facts)) is not None]

    def open(self, relative: str) -> BinaryIO:
        """Open a file for reading anywhere in it.

        Raises MissingFileError when it is not there, StorageError when it cannot be read. Of a web
        server that sends whole files only, the whole file is read into memory.
        """
        with self._explained(relative):
            self._require_plain(relative)
            file = cast(BinaryIO, self._fs.open(self.path(relative), "rb"))
            if self._is_http and not _has_ranges(file):
                file.close()
                return io.BytesIO(self.read_bytes(relative))
            return file

    def open_stream(self, relative: str, size_bytes: int) -> BinaryIO:
        """Open a file of a known size for reading once, from its beginning. Raises as `open`."""
        options: dict[str, Any] = {} if self.is_local else {"block_size": _READ_BYTES}
        if self._has_streams:
            options["block_size"] = 0
        if self._is_http:
            options["size"] = size_bytes  # else it would be asked for
        with self._explained(relative):
            self._require_plain(relative)
            return cast(BinaryIO, self._fs.open(self.path(relative), "rb", **options))

    def blocks(self, relative: str, size_bytes: int) -> Generator[bytes, None, None]:
        """Yield the bytes of a file in order, not many more than `size_bytes`. Raises as `open`."""
        with self._explained(relative), self.open_stream(relative, size_bytes) as file:
            left = size_bytes + 1  # one more tells a file that is too long
            while left and (block := file.read(min(_READ_BYTES, left))):
                left -= len(block)
                yield block

    def read_bytes(self, relative: str, *, max_bytes: int | None = None) -> bytes:
        """Read a whole file. Raises as `open`; FormatError beyond `max_bytes`, reading no more."""
        if max_bytes is not None and (not self.is_local or self.size_bytes(relative) > max_bytes):
            data = b"".join(self.blocks(relative, max_bytes))
            if len(data) > max_bytes:
                raise FormatError(f"{self._name(relative)}: expected at most {max_bytes} bytes")
            return data
        with self._explained(relative):
            self._require_plain(relative)
            return bytes(self._fs.cat_file(self.path(relative)))

    def read_many(self, relatives: Sequence[str]) -> list[bytes]:
        """Read small files whole, together where the store can; what vanishes is left out."""
        if not relatives:
            return []
        for relative in relatives:
            with suppress(FileNotFoundError):
                self._require_plain(relative)
        paths = [self.path(relative) for relative in relatives]
        try:
            found = self._fs.cat(paths, on_error="omit")
        except OSError as error:
            raise StorageError(f"{self.url}: cannot read: {error}") from error
        # One path is answered by its bytes alone.
        return [found] if isinstance(found, bytes) else [found[path] for path in sorted(found)]

    def sha256(self, relative: str) -> str:
        """Return the hex sha256 of a file, read as a stream. Raises as `open`."""
        digest = hashlib.sha256()
        for block in self.blocks(relative, self.size_bytes(relative)):
            digest.update(block)
        return digest.hexdigest()

    def publish(self, relative: str, data: bytes) -> bool:
        """Create a file whole, if it is absent. Returns False when another writer was first.

        Raises StorageError when the disk is full or refuses; nothing is left behind then.
        """
        if self._is_http:  # its PUT would overwrite what is there
            raise StorageError(f"{self.url}: cannot be written to, only read")
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
        """Remove a file or a folder with all that is in it, if it exists.

        Several processes may remove the same at once, as those do that finish one set.
        """
        for _ in range(_REMOVALS):
            if not self.exists(relative):
                return
            # Missing now: another has removed what this one was about to.
            with suppress(FileNotFoundError):
                self._fs.rm(self.path(relative), recursive=True)
                return
            self._fs.invalidate_cache()

    @contextmanager
    def _explained(self, relative: str) -> Iterator[None]:
        """Turn what a file system raises while reading into errors that name the file."""
        try:
            yield
        except TideError:
            raise
        except Exception as error:
            if self.is_local and not isinstance(error, OSError):
                raise
            cause = error.__cause__ if self._is_http and error.__cause__ is not None else error
            hide = self.url != self._address  # the password would stand in the chained error
            if isinstance(error, FileNotFoundError) and _says_missing(cause):
                raise MissingFileError(f"{self._name(relative)}: no such file") from (
                    None if hide else error
                )
            raise StorageError(f"{self._name(relative)}: cannot read: {_told(cause)}") from (
                None if hide else error
            )

    def _require_plain(self, relative: str) -> None:
        """Refuse, on a local disk, what is no plain file of this folder: links, pipes, devices.

        A set from elsewhere could name with them what it does not hold, or what never ends.
        """
        if not self.is_local or not relative:
            return
        path = Path(self._root)
        parts = Path(relative).parts
        for part in parts:
            path /= part
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise StorageError(
                    f"{self._name(relative)}: a symbolic link, which sets have none of",
                    hint="copy the set with its links followed: cp -rL",
                )
        if not stat.S_ISREG(mode):
            raise StorageError(f"{self._name(relative)}: not a file")

    def _name(self, relative: str) -> str:
        return f"{self.url}/{relative}" if relative else self.url


def without_password(text: str) -> str:
    """Return a URL, or a text with URLs, without the user names and passwords in them."""
    return _PASSWORD.sub(r"\1***@", text)


def _file_system(address: str, protocol: str) -> tuple[Any, str]:
    # A listing that is remembered does not show what other writers publish.
    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            # Of the whole answer nothing is known: a shard may take an hour, silence may not.
            options["client_kwargs"] = {
                "timeout": aiohttp.ClientTimeout(
                    total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S
                )
            }
        fs, root = fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        extra = _EXTRA_OF.get(protocol)
        raise StorageError(
            f"{without_password(address)}: {protocol}:// needs a package that is not installed "
            f"({error})",
            hint=f"pip install 'tide-cache[{extra}]'" if extra else None,
        ) from error
    except ValueError as error:
        raise ConfigError(f"{without_password(address)}: {error}") from error
    return fs, str(root)


def _find_local(root: Path, relative: str) -> list[str]:
    """Return all files below a folder; links are listed as files and never followed."""
    found = []
    for folder, folders, files in os.walk(root / relative):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        found += [Path(folder, name).relative_to(root).as_posix() for name in (*files, *links)]
    return sorted(found)


def _has_ranges(file: BinaryIO) -> bool:
    """Say whether a file of a web server can be read from its end, where Parquet begins."""
    try:
        file.seek(-1, os.SEEK_END)
        file.read(1)
        file.seek(0)
    except ValueError:
        return False
    return True


def _says_missing(cause: BaseException) -> bool:
    """Say whether an error means that the file is not there, not that nobody answered."""
    status = getattr(cause, "status", None)
    return isinstance(cause, FileNotFoundError) or status in (404, 410)


def _told(error: BaseException) -> str:
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    return without_password(text)


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
