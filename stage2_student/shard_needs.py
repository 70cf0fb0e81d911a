"""Which shards the next steps need, so that those of a remote set are fetched before they are.

The order of rows is known beforehand, so the windows of row groups are too, and with them the
shards: `ShardNeeds` walks them, a pure function of the order, and `ShardFetcher` names those of the
steps ahead to the local copies as training advances. As many windows are named as go into half of
the local store, at most an epoch; the other half keeps what was used last. At least those of the
steps that may be read ahead must fit, which is known, and asked, before anything is fetched.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stage2_student.stream import GlobalOrder
from tide_cache.cache import Cache
from tide_cache.errors import ConfigError
from tide_cache.local_copies import BYTES_PER_GB, LocalCopies
from tide_cache.manifest import ShardFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowNeeds:
    """The steps that read a window of row groups, and the shards that it is in."""

    first_step: int
    last_step: int
    shards: tuple[ShardFacts, ...]


class ShardNeeds:
    """The windows of a run of `max_steps`, `prefetch` steps of which are read ahead."""

    def __init__(self, order: GlobalOrder, cache: Cache, *, max_steps: int, prefetch: int) -> None:
        self._order = order
        self._cache = cache
        self.max_steps = max_steps
        self.prefetch = prefetch

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of an epoch."""
        return self._order.steps_per_epoch

    @property
    def num_epochs(self) -> int:
        """Number of epochs that the run begins."""
        return -(-self.max_steps // self._order.steps_per_epoch)

    def windows(self, first_step: int = 0) -> Iterator[WindowNeeds]:
        """Yield the windows that are read from a step on, in order, to the end of the run."""
        for epoch in range(first_step // self._order.steps_per_epoch, self.num_epochs):
            for window in self._windows_of(epoch):
                if window.last_step >= first_step and window.first_step < self.max_steps:
                    yield window

    def least_bytes(self) -> int:
        """Return the size of the shards that have to be there at the same time, at most.

        They are of the windows of a step and of the steps read ahead of it.
        """
        in_use: deque[WindowNeeds] = deque()
        sizes = _CountedSizes()
        for window in self.windows():
            # Most is in use at the last step of the oldest window.
            while in_use and in_use[0].last_step + self.prefetch < window.first_step:
                sizes.remove(in_use.popleft())
            in_use.append(window)
            sizes.add(window)
        return sizes.most_bytes

    def bytes_read(self) -> tuple[int, int]:
        """Return the size of all shards that a run reads, each once, and once for each epoch."""
        once: dict[str, int] = {}
        each: dict[tuple[int, str], int] = {}
        for window in self.windows():
            epoch = window.first_step // self._order.steps_per_epoch
            for shard in window.shards:
                once[shard.path] = each[epoch, shard.path] = shard.size_bytes
        return sum(once.values()), sum(each.values())

    def _windows_of(self, epoch: int) -> Iterator[WindowNeeds]:
        order, row = self._order, 0
        begin = epoch * order.steps_per_epoch
        for groups in order.windows(epoch):
            stop = row + int(order.group_sizes[groups].sum())
            yield WindowNeeds(
                first_step=begin + row // order.batch_size,
                last_step=begin + (stop - 1) // order.batch_size,
                shards=tuple(self._cache.shards_of_groups(epoch % order.num_views, groups)),
            )
            row = stop


class _CountedSizes:
    """The size of the shards of the windows that were added and not removed, each shard once."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._bytes = 0
        self.most_bytes = 0

    def with_window(self, window: WindowNeeds) -> int:
        """Return what the size would be with another window."""
        return self._bytes + sum(s.size_bytes for s in window.shards if not self._counts[s.path])

    def add(self, window: WindowNeeds) -> None:
        self._bytes = self.with_window(window)
        self._counts.update(shard.path for shard in window.shards)
        self.most_bytes = max(self.most_bytes, self._bytes)

    def remove(self, window: WindowNeeds) -> None:
        for shard in window.shards:
            self._counts[shard.path] -= 1
            self._bytes -= shard.size_bytes if not self._counts[shard.path] else 0


class ShardFetcher:
    """Names the shards of the steps ahead to the local copies."""

    def __init__(self, needs: ShardNeeds, copies: LocalCopies, *, num_sharing: int = 1) -> None:
        """Share the half of the store that is for fetching ahead with so many fetchers in all."""
        self._needs = needs
        self._copies = copies
        self._budget_bytes = copies.config.max_bytes // 2 // num_sharing
        self._at: int | None = None
        self._ahead: deque[WindowNeeds] = deque()
        self._source: Iterator[WindowNeeds] = iter(())
        self._next: WindowNeeds | None = None
        self._sizes = _CountedSizes()

    def at(self, step: int) -> None:
        """Free what only earlier steps needed, and name what later ones will, as far as it goes."""
        is_new = self._at is None or step < self._at
        if is_new:
            self._restart(step)
        self._at = step
        num_before = len(self._ahead)
        while self._ahead and self._ahead[0].last_step < step:
            self._sizes.remove(self._ahead.popleft())
        if is_new or len(self._ahead) < num_before or self._must_take(step):
            while self._must_take(step) or self._may_take(step):
                assert self._next is not None
                self._ahead.append(self._next)
                self._sizes.add(self._next)
                self._next = next(self._source, None)
            shards = (shard.path for window in self._ahead for shard in window.shards)
            self._copies.keep(list(dict.fromkeys(shards)))

    def stop(self) -> None:
        """Free everything."""
        self._at = None
        self._copies.keep([])

    def _restart(self, step: int) -> None:
        self._ahead.clear()
        self._sizes = _CountedSizes()
        self._source = self._needs.windows(step)
        self._next = next(self._source, None)

    def _must_take(self, step: int) -> bool:
        reach = step + self._needs.prefetch
        return self._next is not None and self._next.first_step <= reach

    def _may_take(self, step: int) -> bool:
        if self._next is None or self._next.first_step > step + self._needs.steps_per_epoch:
            return False
        return self._sizes.with_window(self._next) <= self._budget_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class RemotePlan:
    """What a run from a remote set will fetch into an empty store, and what room it needs for that.

    Every shard is fetched once where all that the run reads fits, else once an epoch.
    """

    folder: str
    max_bytes: int
    least_bytes: int
    bytes_to_fetch: int
    fits: bool

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "folder": self.folder,
            "max_gb": self.max_bytes / BYTES_PER_GB,
            "least_gb": _gb_up(self.least_bytes),
            "gb_to_fetch": _gb_up(self.bytes_to_fetch),
            "fits": self.fits,
        }

    def require_room(self) -> None:
        """Raise ConfigError where the bound is too small, naming the least that works."""
        if self.least_bytes > self.max_bytes:
            raise ConfigError(
                f"local_store.max_gb: expected at least {_gb_up(self.least_bytes):.6f} for the "
                f"windows of row groups that are in use at the same time, got "
                f"{self.max_bytes / BYTES_PER_GB:g}",
                hint="raise it, or lower stream.groups_per_window or stream.prefetch, if this is a "
                "new run",
            )


def plan_fetching(
    parts: Sequence[tuple[ShardNeeds, LocalCopies]], others: Iterable[Cache]
) -> RemotePlan:
    """Say what a run will fetch for its remote sets, at least one.

    `others` are sets that are read beside them, a file at a time.
    """
    beside = [copies.largest_bytes(codec_files_only=True) for _, copies in parts]
    fixed = [copies.fixed_bytes for _, copies in parts]
    for other in others:
        if other.copies is not None:
            beside.append(other.copies.largest_bytes())
            fixed.append(other.copies.fixed_bytes)
    config = parts[0][1].config
    max_bytes = config.max_bytes
    read = [needs.bytes_read() for needs, _ in parts]
    once, each = sum(once for once, _ in read), sum(each for _, each in read)
    fits = once + sum(fixed) <= max_bytes
    return RemotePlan(
        folder=str(config.root),
        max_bytes=max_bytes,
        least_bytes=sum(needs.least_bytes() for needs, _ in parts) + sum(beside) + sum(fixed),
        bytes_to_fetch=once if fits else each,
        fits=fits,
    )


def _gb_up(size_bytes: int) -> float:
    """Return gigabytes rounded up to the kilobyte, so that what is named suffices."""
    return math.ceil(size_bytes / 1000) / 10**6
