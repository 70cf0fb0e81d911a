"""Reading a finished set: rows by number, any column, bounded memory.

Rows of a view are numbered 0..num_samples-1 through the shards in the manifest's order. Row groups
that were read are kept, a bounded number of them; opening a shard checks its size and its row
count against the manifest, reading verifies page checksums. Whoever is about to use every row, as
training is, has everything checked at its first use (`first_use`). Threads may read at the same
time: a row group is decoded by one of them, and while it is, the others go on with the groups they
need besides.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tide_cache.errors import FormatError, TideError
from tide_cache.first_use import FirstUse
from tide_cache.local_copies import CopiedStore, LocalCopies, LocalStoreConfig
from tide_cache.manifest import Manifest, ShardFacts, identity
from tide_cache.set_schema import set_schema
from tide_cache.shards import ROWS_PER_GROUP, ShardFile, group_sizes, open_shard, read_row_groups
from tide_cache.store import Store
from tide_cache.writer import read_manifest

_IDLE_FILES = 8
DEFAULT_GROUPS_KEPT = 32
GroupKey = tuple[str, int, tuple[str, ...]]


class Cache:
    """A finished cache or premasked set.

    `num_groups_kept` bounds the memory of random access: that many row groups of 256 rows stay
    decoded from Parquet. `copies` are the local copies through which `store` reads, if it does.
    `first_use`: what has to be found sound before it is given out.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        *,
        num_groups_kept: int = DEFAULT_GROUPS_KEPT,
        copies: LocalCopies | None = None,
        first_use: FirstUse | None = None,
    ) -> None:
        self.store = store
        self.manifest = manifest
        self.copies = copies
        # A copy that is open cannot make room for another.
        self._num_idle_files = _IDLE_FILES if copies is None else 0
        self._num_groups_kept = num_groups_kept
        self._lock = threading.Lock()  # of the two below, never held while something is read
        self._idle_files: OrderedDict[str, ShardFile] = OrderedDict()
        self._groups: OrderedDict[GroupKey, Future[pa.Table]] = OrderedDict()
        self._first_use = first_use

    @property
    def url(self) -> str:
        """Where the set is."""
        return self.store.url

    @cached_property
    def identity(self) -> str:
        """The sha256 of the manifest's canonical JSON."""
        return identity(self.manifest)

    @property
    def num_views(self) -> int:
        """Number of noised copies of each sample."""
        return self.manifest.num_views

    @cached_property
    def num_samples(self) -> int:
        """Number of samples, which is the number of rows of each view."""
        return int(self._starts[-1])

    @cached_property
    def row_group_sizes(self) -> npt.NDArray[np.int64]:
        """Number of rows of each row group of a view, in order; the same for every view.

        Loaders make room for every row, so this raises FormatError where a local set has not the
        sizes that its manifest lists, or no rows.
        """
        if not self.manifest.shards:
            raise FormatError(f"{self.url}: the set has no rows")
        if self.store.is_local:
            for shard in self.manifest.shards:
                self._check_size(shard)
        sizes = [size for shard in self._shards_of(0) for size in group_sizes(shard.num_rows)]
        return np.asarray(sizes, dtype=np.int64)

    @cached_property
    def row_groups_per_shard(self) -> npt.NDArray[np.int64]:
        """Number of row groups of each shard of a view, in order; the same for every view."""
        return np.asarray(
            [len(group_sizes(s.num_rows)) for s in self._shards_of(0)], dtype=np.int64
        )

    def shards_of_groups(
        self, view: int, groups: Sequence[int] | npt.NDArray[np.integer]
    ) -> list[ShardFacts]:
        """Return the shards of a view that hold some of its row groups, in the groups' order."""
        ends = np.cumsum(self.row_groups_per_shard)
        numbers = np.searchsorted(ends, np.asarray(groups, dtype=np.int64), side="right")
        return [self._shards_of(view)[number] for number in dict.fromkeys(numbers.tolist())]

    def read_rows(
        self, view: int, rows: Sequence[int] | npt.NDArray[np.integer], columns: Sequence[str] = ()
    ) -> pa.Table:
        """Read rows of one view, in the order asked for. Returns all columns unless some are named.

        Raises IndexError for a row or view outside the set, FormatError for a damaged shard.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if not 0 <= view < self.num_views:
            raise IndexError(f"view {view} of {self.num_views}")
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.num_samples):
            raise IndexError(f"rows outside 0..{self.num_samples - 1}")
        names = tuple(columns)
        shards = self._shards_of(view)
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        local = wanted - self._starts[shard_of]
        group_of = local // ROWS_PER_GROUP
        wanted_groups = sorted(set(zip(shard_of.tolist(), group_of.tolist(), strict=True)))
        tables = self._read_groups([(shards[s], group) for s, group in wanted_groups], names)
        origin, offset = np.empty(len(wanted), dtype=np.int64), 0
        for (shard, group), table in zip(wanted_groups, tables, strict=True):
            here = np.flatnonzero((shard_of == shard) & (group_of == group))
            origin[here] = offset + local[here] - group * ROWS_PER_GROUP
            offset += table.num_rows
        if not tables:
            return self._empty(shards, names)
        return pa.concat_tables(tables).take(pa.array(origin)).combine_chunks()

    def close(self) -> None:
        """Close the open shards, stop fetching and forget what was read; nobody may be reading."""
        if self.copies is not None:
            self.copies.close()
        with self._lock:
            files = list(self._idle_files.values())
            self._idle_files.clear()
            self._groups.clear()
        for file in files:
            file.close(force=True)

    @cached_property
    def _schema(self) -> pa.Schema:
        return set_schema(self.manifest)

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        sizes = [shard.num_rows for shard in self._shards_of(0)]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)

    @cached_property
    def _by_view(self) -> list[list[ShardFacts]]:
        views: list[list[ShardFacts]] = [[] for _ in range(self.num_views)]
        for shard in self.manifest.shards:
            views[shard.view].append(shard)
        return views

    def _shards_of(self, view: int) -> list[ShardFacts]:
        return self._by_view[view]

    def _read_groups(
        self, groups: Sequence[tuple[ShardFacts, int]], columns: tuple[str, ...]
    ) -> list[pa.Table]:
        """Return row groups, decoding those that nobody has decoded or is about to."""
        futures = []
        for shard, group in groups:
            future, is_mine = self._claim((shard.path, group, columns))
            if is_mine:
                self._decode(shard, group, columns, future)
            futures.append(future)
        return [future.result() for future in futures]

    def _claim(self, key: GroupKey) -> tuple[Future[pa.Table], bool]:
        """Return the future of a row group, and whether the caller has to fulfil it."""
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key], False
            future: Future[pa.Table] = Future()
            self._groups[key] = future
            if len(self._groups) > self._num_groups_kept:
                self._groups.popitem(last=False)
            return future, True

    def _decode(
        self, shard: ShardFacts, group: int, columns: tuple[str, ...], future: Future[pa.Table]
    ) -> None:
        try:
            with self._opened(shard) as file:
                table = self._read_group(shard, file, group, list(columns))
            future.set_result(table.replace_schema_metadata(None))
        except BaseException as error:
            with self._lock:  # the next who asks shall try again
                self._groups.pop((shard.path, group, columns), None)
            future.set_exception(error)
            raise

    def _read_group(
        self, shard: ShardFacts, file: ShardFile, group: int, columns: list[str]
    ) -> pa.Table:
        if self._first_use is None or not self._first_use.needs_rows(shard, group):
            return read_row_groups(self.store, shard.path, file, [group], columns or None)
        table = read_row_groups(self.store, shard.path, file, [group])
        self._first_use.check(shard, group, table)
        return table.select(columns) if columns else table

    @contextmanager
    def _opened(self, shard: ShardFacts) -> Iterator[ShardFile]:
        """Lend an open shard to one thread; two that want it at once each have their own."""
        with self._lock:
            file = self._idle_files.pop(shard.path, None)
        if file is None:
            file = self._open(shard)
        try:
            yield file
        finally:
            self._put_back(shard.path, file)

    def _put_back(self, path: str, file: ShardFile) -> None:
        with self._lock:
            surplus = [self._idle_files.pop(path)] if path in self._idle_files else []
            self._idle_files[path] = file
            if len(self._idle_files) > self._num_idle_files:
                surplus.append(self._idle_files.popitem(last=False)[1])
        for old in surplus:
            old.close(force=True)

    def _open(self, shard: ShardFacts) -> ShardFile:
        if self._first_use is not None:
            self._check_size(shard)
            self._first_use.before_opening(shard)
        file = open_shard(self.store, shard.path)
        try:
            self._check_opened(shard, file)
            if self._first_use is not None:
                self._first_use.opened(shard, file)
        except TideError:
            file.close(force=True)
            raise
        return file

    def _check_opened(self, shard: ShardFacts, file: ShardFile) -> None:
        self._check_size(shard)
        if file.group_sizes != group_sizes(shard.num_rows):
            raise self._damaged(
                shard,
                f"expected {shard.num_rows} rows in groups of {ROWS_PER_GROUP}, got groups of "
                f"{file.group_sizes[:4]}",
            )
        if not file.schema_found.equals(self._schema, check_metadata=False):
            raise self._damaged(
                shard, f"schema: expected {self._schema.names}, got {file.schema_found.names}"
            )

    def _check_size(self, shard: ShardFacts) -> None:
        size_bytes = self.store.size_bytes(shard.path)
        if size_bytes != shard.size_bytes:
            raise self._damaged(
                shard,
                f"expected {shard.num_rows} rows in {shard.size_bytes} bytes, got {size_bytes} "
                "bytes",
            )

    def _damaged(self, shard: ShardFacts, what: str) -> FormatError:
        return FormatError(
            f"shard {shard.path}: {what}", hint=f"run 'tide-cache verify {self.url}'"
        )

    def _empty(self, shards: list[ShardFacts], columns: tuple[str, ...]) -> pa.Table:
        if not shards:
            raise FormatError(f"{self.url}: the set has no rows")
        return self._read_groups([(shards[0], 0)], columns)[0].slice(0, 0)


def open_cache(
    url: str | Path,
    *,
    num_groups_kept: int = DEFAULT_GROUPS_KEPT,
    local: LocalStoreConfig | None = None,
    check: bool = False,
) -> Cache:
    """Open a finished cache or premasked set: a folder, or s3://, http(s)://, hf:// and the like.

    With `local`, the files of a remote set are read from local copies, each checked against the
    manifest before its first use; without, by ranges from where they are. With `check`, every shard
    and every row is checked at its first use as `verify` does. Raises StorageError when there is
    none at `url`, FormatError when its manifest is not sound.
    """
    source = Store(url)
    manifest = read_manifest(source)
    copies = None
    store = source
    if local is not None and not source.is_local:
        copies = LocalCopies(source, manifest, local)
        store = CopiedStore(source, copies)
    return Cache(
        store,
        manifest,
        num_groups_kept=num_groups_kept,
        copies=copies,
        first_use=FirstUse(store, manifest, hashes=copies is None) if check else None,
    )
