"""Checking a set while it is used: nothing of it is given out before it was found to be sound.

What `verify` finds in a shard is found here too, at the moment of its first use by this process:
sha256 and stamp when it is opened, the rows and payloads of a row group when that is decoded. So
the cost is spread over the first pass through the set (a second a gigabyte for the hashes, some
0.1 ms a row for the rows) and nobody has to have run `verify` before. What takes the whole set to
see is left to it: samples that occur twice, views that differ in their samples, files too many.
"""

import threading
from collections import Counter
from functools import cached_property

import pyarrow as pa

from tide_cache.errors import FormatError
from tide_cache.manifest import CacheManifest, Manifest, ShardFacts
from tide_cache.payloads import Codecs, open_codecs
from tide_cache.promises import broken_promises
from tide_cache.shard_checks import check_rows
from tide_cache.shards import ShardFile
from tide_cache.stamps import check_stamp, read_stamp
from tide_cache.store import Store


class FirstUse:
    """What of a set was found to be sound by this process. Threads may ask at the same time.

    `hashes`: whether sha256s are compared; local copies were hashed when they arrived. Raises
    FormatError at once where the manifest contradicts itself.
    """

    def __init__(self, store: Store, manifest: Manifest, *, hashes: bool = True) -> None:
        self._store, self._manifest = store, manifest
        problems = broken_promises(manifest)
        if problems:
            raise FormatError(f"{store.url}: {problems[0]}", hint=self._hint)
        paths = [shard.path for shard in manifest.shards]
        self._unhashed = {path: threading.Lock() for path in paths} if hashes else {}
        self._unstamped = set(paths)
        self._checked_groups: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def before_opening(self, shard: ShardFacts) -> None:
        """Compare a shard's sha256 with the manifest's, before anything of it is parsed."""
        lock = self._unhashed.get(shard.path)
        if lock is None:
            return
        with lock:
            if shard.path not in self._unhashed:
                return
            found = self._store.sha256(shard.path)
            if found != shard.sha256:
                told = f"expected {shard.sha256[:12]}…, got {found[:12]}…"
                raise self._problem(shard, f"sha256 mismatch ({told})")
            del self._unhashed[shard.path]

    def opened(self, shard: ShardFacts, file: ShardFile) -> None:
        """Check that an open shard says that it is this one."""
        if shard.path in self._unstamped:
            try:
                check_stamp(read_stamp(file, where=self._store.url), self._manifest, shard)
            except FormatError as error:
                raise self._problem(shard, error.message) from error
            self._unstamped.discard(shard.path)

    def needs_rows(self, shard: ShardFacts, group: int) -> bool:
        """Whether the rows of a row group are still to be checked, for which all columns count."""
        return (shard.path, group) not in self._checked_groups

    def check(self, shard: ShardFacts, group: int, table: pa.Table) -> None:
        """Check every row and payload of a row group, all of whose columns are in `table`."""
        with self._lock:
            codecs = self._codecs
        for problem in check_rows(table, self._manifest, shard.view, codecs, Counter()):
            raise self._problem(shard, problem)
        self._checked_groups.add((shard.path, group))

    @cached_property
    def _codecs(self) -> Codecs | None:
        if not isinstance(self._manifest, CacheManifest):
            return None
        return open_codecs(self._store, self._manifest)

    def _problem(self, shard: ShardFacts, what: str) -> FormatError:
        return FormatError(f"shard {shard.path}: {what}", hint=self._hint)

    @property
    def _hint(self) -> str:
        return f"run 'tide-cache verify {self._store.url}' to see what else is wrong"
