"""Local copies of a remote set's files: fetched ahead, checked, bounded, shared by processes.

Whoever trains names the files of the next steps in order of need (`keep`); a few threads fetch them
in that order and they stay until a later call leaves them out. `open` gives any file of the set,
fetching it where it is not there. No file is given out before its sha256 was found to be the
manifest's by this process, copies of earlier runs included. A set on a local disk has no copies:
it is read where it is.
"""

import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from pydantic import Field

from tide_cache.config import StrictModel
from tide_cache.copies_folder import SOURCE, CopiesFolder, listed_files
from tide_cache.errors import StorageError, TideError
from tide_cache.fetch import Listed, Stopped, fetch, patience_s
from tide_cache.manifest import MANIFEST, Manifest
from tide_cache.store import Store

logger = logging.getLogger(__name__)
HOME_VARIABLE = "TIDE_CACHE_HOME"
BYTES_PER_GB = 10**9
_NUM_FETCHERS = 4
_BLOCK_BYTES = 1 << 22
_JOIN_S = 5.0


class LocalStoreConfig(StrictModel):
    """Where copies of a remote set's files are kept, and how many bytes of them."""

    folder: str | None = Field(
        None, description="default: TIDE_CACHE_HOME, or tide-cache in XDG_CACHE_HOME or ~/.cache"
    )
    max_gb: float = Field(
        50.0,
        gt=0,
        description="10^9 bytes that all copies in the folder take together, of all sets",
    )
    retries: int = Field(4, ge=0, description="how often a fetch that fails is tried again")

    @property
    def root(self) -> Path:
        """The folder of all sets."""
        if self.folder is not None:
            return Path(self.folder).expanduser()
        if HOME_VARIABLE in os.environ:
            return Path(os.environ[HOME_VARIABLE])
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / "tide-cache"

    @property
    def max_bytes(self) -> int:
        """The bound in bytes."""
        return int(self.max_gb * BYTES_PER_GB)


class LocalCopies:
    """The local copies of one remote set. `close` stops its threads; what is fetched stays."""

    def __init__(self, source: Store, manifest: Manifest, config: LocalStoreConfig) -> None:
        self.source = source
        self.config = config
        self.folder = CopiesFolder(config.root, config.max_bytes)
        self._here = self.folder.add_set(source, manifest)
        self._listed: dict[str, Listed] = {f.path: f for f in listed_files(manifest)}
        self._checked: dict[str, int] = {}  # the inode that was found to be sound
        self._stopped = threading.Event()
        self._changed = threading.Condition()  # guards what follows
        self._wanted: list[str] = []
        self._kept: dict[str, BinaryIO] = {}
        self._given_up: set[str] = set()
        self._running: set[str] = set()
        self._asked: dict[str, list[_Request]] = {}
        self._threads: list[threading.Thread] = []

    def __contains__(self, path: object) -> bool:
        """Whether the set lists a file of that name; the manifest itself is not listed."""
        return path in self._listed

    def keep(self, wanted: Sequence[str]) -> None:
        """Name the files needed next, in order of need: fetch them ahead, keep them, free others.

        Returns at once. A file that cannot be fetched is said in the log and left to `open`, which
        tries again and raises.
        """
        with self._changed:
            self._wanted = list(wanted)
            for path in self._kept.keys() - set(wanted):
                self._kept.pop(path).close()
            self._given_up &= set(wanted)
            if wanted:
                self._start_threads()
            self._changed.notify_all()

    def open(self, path: str) -> BinaryIO:
        """Open a file of the set, which stays until it is closed; fetches it where it is missing.

        Raises MissingFileError, StorageError or FormatError naming the file.
        """
        try:
            while (file := self._open_sound(self._listed[path])) is None:
                self._request(path).wait()
            return file
        except Stopped:
            raise self._closed() from None

    @property
    def fixed_bytes(self) -> int:
        """What the folder of this set takes besides copies."""
        names = (MANIFEST, SOURCE)
        return sum((self._here / name).stat().st_size for name in names)

    def largest_bytes(self, *, codec_files_only: bool = False) -> int:
        """Return the size of the largest file that is read beside the kept ones."""
        found = (f for f in self._listed.values() if f.path.startswith(("codec/", "data/")))
        sizes = [f.size_bytes for f in found if f.path.startswith("codec/") or not codec_files_only]
        return max(sizes, default=0)

    def close(self) -> None:
        """Stop fetching and let go of all files."""
        self._stopped.set()
        with self._changed:
            self._wanted = []
            for file in self._kept.values():
                file.close()
            self._kept.clear()
            for requests in self._asked.values():
                for request in requests:
                    request.finish(self._closed())
            self._asked.clear()
            self._changed.notify_all()
        deadline_s = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _closed(self) -> StorageError:
        return StorageError(f"{self.source.url}: closed while being read")

    def _request(self, path: str) -> "_Request":
        request = _Request()
        with self._changed:
            if self._stopped.is_set():
                raise self._closed()
            self._asked.setdefault(path, []).append(request)
            self._start_threads()
            self._changed.notify_all()
        return request

    def _start_threads(self) -> None:
        # Daemons: a server that falls silent must not keep the process from ending.
        while len(self._threads) < _NUM_FETCHERS:
            name = f"tide-fetcher-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
            self._threads[-1].start()

    def _work(self) -> None:
        while (path := self._take_task()) is not None:
            error: BaseException | None = None
            file: BinaryIO | None = None
            try:
                file = self._bring(self._listed[path])
            except BaseException as problem:  # handed over to whoever asked
                error = problem
            self._finish(path, file, error)

    def _take_task(self) -> str | None:
        with self._changed:
            while not self._stopped.is_set():
                ahead = (p for p in self._wanted if p not in self._kept and p not in self._given_up)
                for path in (*self._asked, *ahead):
                    if path not in self._running:
                        self._running.add(path)
                        return path
                self._changed.wait()
        return None

    def _finish(self, path: str, file: BinaryIO | None, error: BaseException | None) -> None:
        with self._changed:
            self._running.discard(path)
            requests = self._asked.pop(path, [])
            for request in requests:
                request.finish(self._closed() if isinstance(error, Stopped) else error)
            if file is not None:
                if path in self._wanted and path not in self._kept:
                    self._kept[path] = file
                else:
                    file.close()
            elif path in self._wanted:
                self._given_up.add(path)
                if not requests and not isinstance(error, Stopped):
                    logger.warning("%s; tried again when its rows are needed", error)
            self._changed.notify_all()

    def _bring(self, facts: Listed) -> BinaryIO:
        """Return a sound copy, open; fetch it where there is none."""
        while (file := self._open_sound(facts)) is None:
            self._fetch(facts)
        return file

    def _open_sound(self, facts: Listed) -> BinaryIO | None:
        """Open a copy that is there; None where there is none or where it is damaged."""
        file = self.folder.open_copy(self._here / facts.path, self._stopped)
        if file is None or self._is_sound(file, facts):
            return file
        logger.warning("%s: damaged, fetched anew", self._here / facts.path)
        self._fetch(facts, damaged=file)
        return None

    def _is_sound(self, file: BinaryIO, facts: Listed) -> bool:
        """Compare a copy with the manifest, once for each file and process."""
        stat = os.fstat(file.fileno())
        if stat.st_size != facts.size_bytes:
            return False
        if self._checked.get(facts.path) != stat.st_ino:
            digest = hashlib.sha256()
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
            file.seek(0)
            if digest.hexdigest() != facts.sha256:
                return False
            self._checked[facts.path] = stat.st_ino
        return True

    def _fetch(self, facts: Listed, *, damaged: BinaryIO | None = None) -> None:
        path = self._here / facts.path
        try:
            with self.folder.part_of(path, self._stopped, damaged=damaged) as part:
                if damaged is not None:
                    damaged.close()
                if part is None:
                    return
                retries, stopped = self.config.retries, self._stopped
                self.folder.make_room(
                    part, facts.size_bytes, stopped, patience_s=patience_s(retries)
                )
                fetch(self.source, facts, part, retries=retries, stopped=stopped)
                self.folder.settle(part, path)
                self._checked[facts.path] = os.fstat(part.fileno()).st_ino
        except OSError as error:
            raise _explain(path, facts, error) from error
        finally:
            if damaged is not None:
                damaged.close()


class _Request:
    """Somebody who waits for a file."""

    def __init__(self) -> None:
        self._is_done = threading.Event()
        self._error: BaseException | None = None

    def finish(self, error: BaseException | None) -> None:
        self._error = error
        self._is_done.set()

    def wait(self) -> None:
        self._is_done.wait()
        if self._error is not None:
            raise self._error


class CopiedStore(Store):
    """A remote set whose listed files are read from their local copies."""

    def __init__(self, source: Store, copies: LocalCopies) -> None:
        super().__init__(source._address)
        self.copies = copies

    def open(self, relative: str) -> BinaryIO:
        """Open the local copy of a listed file; another file where it is."""
        if relative in self.copies:
            return self.copies.open(relative)
        return super().open(relative)

    def size_bytes(self, relative: str) -> int:
        """Return the size of the local copy of a listed file, or of another file."""
        if relative not in self.copies:
            return super().size_bytes(relative)
        with self.copies.open(relative) as file:
            return os.fstat(file.fileno()).st_size

    def read_bytes(self, relative: str, *, max_bytes: int | None = None) -> bytes:
        """Read the local copy of a listed file, which has its listed size, or another file."""
        if relative not in self.copies:
            return super().read_bytes(relative, max_bytes=max_bytes)
        with self.copies.open(relative) as file:
            return file.read()


def _explain(path: Path, facts: Listed, error: OSError) -> TideError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"{path}: the disk is full (needed {facts.size_bytes} bytes); nothing of this file was "
            "kept",
            hint="free some space, or set local_store.folder to another disk or a smaller "
            "local_store.max_gb, and run the same command again",
        )
    return StorageError(
        f"{path}: cannot write: {error.strerror or error}",
        hint="repair the disk, or set local_store.folder to another one, and run the same command "
        "again",
    )
