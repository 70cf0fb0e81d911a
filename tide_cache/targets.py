"""Places that a set can be moved to: a folder, a bucket behind fsspec, the Hugging Face hub.

All write a file whole or not at all. A folder is believed nothing: what lies there is hashed. A
bucket tells sizes in one listing and keeps the sha256 of what was sent in the object's metadata,
so that nothing has to be read back. The hub knows the sha256 of large files and git's hash of small
ones. Credentials are found by the libraries themselves, where they always look.
"""

import hashlib
import os
import re
import threading
import uuid
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tide_cache.errors import ConfigError, FormatError, MissingFileError, StorageError, TideError
from tide_cache.fetch import RETRIES, Listed, fetch, fetch_bytes, mismatch
from tide_cache.store import TEMPORARY_SUFFIX, Store, without_password
from tide_cache.transfer import OnBytes, Target, in_parallel

_SHA256_KEY = "sha256"
_TEMPORARY = re.compile(rf"\..+\.[0-9a-f]{{32}}{re.escape(TEMPORARY_SUFFIX)}")
_WHOLE_BYTES = 64 << 20  # files up to this size are sent from memory


def open_target(url: str) -> Target:
    """Return the place that a URL names. Raises ConfigError or StorageError."""
    if url.startswith("hf://"):
        from tide_cache.hub import HubTarget

        return HubTarget(url)
    if url.startswith(("http://", "https://")):
        raise StorageError(
            f"{without_password(url)}: cannot be written to, only read",
            hint="push to a folder, a bucket or hf://datasets/USER/NAME, or upload what "
            "'tide-cache pack' makes",
        )
    store = Store(url)
    return FolderTarget(store) if store.is_local else BucketTarget(store)


class FolderTarget:
    """A folder on a local disk."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._root = Path(store.path(""))
        self.url = store.url

    def paths(self) -> list[str]:
        """Return the files that are there."""
        return self._store.list_files()

    def read(self, path: str) -> bytes:
        """Return a file."""
        return self._store.read_bytes(path)

    def has(self, facts: Listed, listed_sha256: str | None) -> bool | None:
        """Hash what is there."""
        try:
            if self._store.size_bytes(facts.path) != facts.size_bytes:
                return False
            return self._store.sha256(facts.path) == facts.sha256
        except MissingFileError:
            return None

    def send(self, source: Store, files: Sequence[Listed], on_bytes: OnBytes) -> None:
        """Fetch files into temporary ones, and move each to its place once it is sound."""
        in_parallel(lambda facts: self._fetch(source, facts, on_bytes), files)

    def publish(self, small: dict[str, bytes]) -> None:
        """Write small files, durable one after the other."""
        for path, data in small.items():
            with self._explained(path, len(data)):
                self._write(path, lambda file, data=data: file.write(data))  # type: ignore[misc]

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files."""
        for path in paths:
            (self._root / path).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the temporary files that killed transfers left."""
        for path in self._store.list_files():
            if _TEMPORARY.fullmatch(path.rpartition("/")[2]):
                self._store.remove(path)

    def _fetch(self, source: Store, facts: Listed, on_bytes: OnBytes) -> None:
        def write(file: Any) -> None:
            fetch(source, facts, file, retries=RETRIES, stopped=threading.Event())
            file.truncate(facts.size_bytes)

        with self._explained(facts.path, facts.size_bytes):
            self._write(facts.path, write)
        on_bytes(facts.size_bytes)

    def _write(self, path: str, write: Callable[[Any], Any]) -> None:
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def _explained(self, path: str, size_bytes: int) -> "_Explained":
        return _Explained(f"{self.url}/{path}", size_bytes)


class BucketTarget:
    """A bucket, or another store behind fsspec that is not on this disk."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._fs = store._fs
        self.url = store.url

    def paths(self) -> list[str]:
        """Return the objects that were there when the transfer began."""
        return sorted(self._sizes)

    def read(self, path: str) -> bytes:
        """Return a file."""
        return self._store.read_bytes(path)

    def has(self, facts: Listed, listed_sha256: str | None) -> bool | None:
        """Compare size, then the sha256 that a manifest there or the object's metadata tells."""
        size_bytes = self._sizes.get(facts.path)
        if size_bytes is None:
            return None
        if size_bytes != facts.size_bytes:
            return False
        told = listed_sha256 or self._metadata(facts.path) or self._store.sha256(facts.path)
        return told == facts.sha256

    def send(self, source: Store, files: Sequence[Listed], on_bytes: OnBytes) -> None:
        """Upload files; those on a local disk that are large from there, others from memory."""

        def put(facts: Listed) -> None:
            if facts.size_bytes <= _WHOLE_BYTES or not source.is_local:
                self._put(facts.path, fetch_bytes(source, facts), facts.sha256)
            else:
                self._put_large(source, facts)
            on_bytes(facts.size_bytes)

        in_parallel(put, files)

    def publish(self, small: dict[str, bytes]) -> None:
        """Upload small files one after the other."""
        for path, data in small.items():
            self._put(path, data, hashlib.sha256(data).hexdigest())

    def remove(self, paths: Sequence[str]) -> None:
        """Remove objects."""
        for path in paths:
            self._store.remove(path)

    def close(self) -> None:
        """Nothing lies about: an upload that breaks off leaves no object."""

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return self._store.sizes()

    def _metadata(self, path: str) -> str | None:
        ask = getattr(self._fs, "metadata", None)
        if ask is None:
            return None
        with self._store._explained(path):
            found: str | None = ask(self._store.path(path)).get(_SHA256_KEY)
        return found

    def _put(self, path: str, data: bytes, sha256: str) -> None:
        with _Explained(f"{self.url}/{path}", len(data)):
            self._fs.pipe_file(self._store.path(path), data, **self._metadata_option(sha256))

    def _put_large(self, source: Store, facts: Listed) -> None:
        """Hash a local file, then upload it; refuses one that changes in between."""
        path = Path(source.path(facts.path))
        before = path.stat()
        sha256 = source.sha256(facts.path)
        if before.st_size != facts.size_bytes or sha256 != facts.sha256:
            raise mismatch(str(path), source.url, facts, before.st_size, sha256)
        with _Explained(f"{self.url}/{facts.path}", facts.size_bytes):
            self._fs.put_file(
                str(path), self._store.path(facts.path), **self._metadata_option(sha256)
            )
        after = path.stat()
        if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
            self._store.remove(facts.path)
            raise FormatError(f"{path}: changed while it was sent", hint="run the command again")

    def _metadata_option(self, sha256: str) -> dict[str, Any]:
        protocols = self._fs.protocol
        is_s3 = "s3" in ((protocols,) if isinstance(protocols, str) else protocols)
        return {"Metadata": {_SHA256_KEY: sha256}} if is_s3 else {}


class _Explained:
    """Turns what a file system raises while writing into errors that name the file."""

    def __init__(self, where: str, size_bytes: int) -> None:
        self._where, self._size_bytes = where, size_bytes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, TideError) or not isinstance(error, Exception):
            return
        told = without_password((str(error).splitlines() or [""])[0]) or type(error).__name__
        raise StorageError(
            f"{self._where}: cannot write {self._size_bytes} bytes: {told}",
            hint="repair it and run the same command again: what was sent is not sent again",
        ) from None


def require_local(folder: str) -> Store:
    """Return the store of a local folder. Raises ConfigError for a URL."""
    store = Store(folder)
    if not store.is_local:
        raise ConfigError(f"{store.url}: expected a folder on this machine")
    return store
