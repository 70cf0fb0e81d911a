"""Which rows a step trains on, as a pure function of its number, and how they reach the trainer.

Step s belongs to epoch s // steps_per_epoch, which reads view `epoch mod V` and nothing else; its
rows are a slice of that epoch's order. So the whole state of the stream is the number of the next
step, and resuming is arithmetic. The slice is the *global* batch: ranks and micro-batches cut it
further, so one rank and eight train on the same batches. The last batch of an epoch holds what is
left (its losses are means, so its rows weigh more, by less than one step per epoch).
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from stage2_student.batches import Batch, BatchReader
from stage2_student.readers import read_ahead
from tide_cache.config import StrictModel
from tide_cache.errors import CompatibilityError
from tide_cache.order import (
    DEFAULT_GROUPS_PER_WINDOW,
    DEFAULT_SHARDS_PER_POOL,
    epoch_order,
    epoch_windows,
)

Int64Array = npt.NDArray[np.int64]


class StreamConfig(StrictModel):
    """How rows are put into batches."""

    batch_size: int = Field(32, ge=1, description="rows of one optimiser step, over all ranks")
    micro_batch_size: int | None = Field(
        None, ge=1, description="rows of one forward on one rank; default: as many as there are"
    )
    groups_per_window: int = Field(
        DEFAULT_GROUPS_PER_WINDOW, ge=1, description="row groups of 256 rows shuffled together"
    )
    shards_per_pool: int | None = Field(
        DEFAULT_SHARDS_PER_POOL,
        ge=1,
        description="shards whose row groups are shuffled together; null: all of a view",
    )
    workers: int = Field(
        2, ge=0, description="threads that read ahead; 0: read when a step asks for its rows"
    )
    prefetch: int = Field(4, ge=1, description="steps that may be read ahead, which bounds memory")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepRows:
    """The rows of one step, over all ranks. `cache` counts the caches of a run of several."""

    step: int
    epoch: int
    view: int
    rows_G: Int64Array
    cache: int = 0


class GlobalOrder:
    """The rows of every step of a run."""

    def __init__(
        self,
        *,
        seed: int,
        group_sizes: Int64Array,
        num_views: int,
        batch_size: int,
        groups_per_window: int = DEFAULT_GROUPS_PER_WINDOW,
        groups_per_shard: Int64Array | None = None,
        shards_per_pool: int | None = None,
    ) -> None:
        self.seed = seed
        self.group_sizes = group_sizes
        self.num_views = num_views
        self.batch_size = batch_size
        self.groups_per_window = groups_per_window
        self.groups_per_shard = groups_per_shard
        self.shards_per_pool = shards_per_pool
        self._steps_per_epoch = -(-int(group_sizes.sum()) // batch_size)
        self._epoch: tuple[int, Int64Array] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in which every row is read once."""
        return self._steps_per_epoch

    def at(self, step: int) -> StepRows:
        """Return the rows of step `step` (from 0)."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = self._order_of(epoch)
        start = number * self.batch_size
        return StepRows(
            step=step,
            epoch=epoch,
            view=epoch % self.num_views,
            rows_G=order[start : start + self.batch_size],
        )

    def windows(self, epoch: int) -> list[Int64Array]:
        """Return the row groups of each window of an epoch, in the order in which they are read."""
        return epoch_windows(
            self.seed,
            epoch,
            self.group_sizes,
            self.groups_per_window,
            groups_per_shard=self.groups_per_shard,
            shards_per_pool=self.shards_per_pool,
        )

    def _order_of(self, epoch: int) -> Int64Array:
        if self._epoch is None or self._epoch[0] != epoch:
            order = epoch_order(
                self.seed,
                epoch,
                self.group_sizes,
                self.groups_per_window,
                groups_per_shard=self.groups_per_shard,
                shards_per_pool=self.shards_per_pool,
            )
            self._epoch = (epoch, order)
        return self._epoch[1]


def rank_rows(
    rows_G: Int64Array, *, rank: int, world_size: int, micro_batch_size: int | None
) -> list[Int64Array]:
    """Cut a step's rows into this rank's micro-batches.

    Every rank gets the same number of micro-batches, because gradients are exchanged together;
    where rows do not suffice, some are empty. Every row is in exactly one.
    """
    largest_share = -(-len(rows_G) // world_size)
    num_micro = -(-largest_share // (micro_batch_size or largest_share))
    share = np.array_split(rows_G, world_size)[rank]
    return np.array_split(share, num_micro)


class StepOrder(Protocol):
    """Knows the rows of every step of a run."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in which every row could be read once."""

    def at(self, step: int) -> StepRows:
        """Return the rows of step `step` (from 0)."""


class FetchAhead(Protocol):
    """Whoever fetches what later steps read."""

    def at(self, step: int) -> None:
        """Hear that training is at `step`: whatever is for earlier steps alone may go."""

    def stop(self) -> None:
        """Hear that no step follows."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepBatches:
    """One step's work for one rank."""

    rows: StepRows
    batches: list[Batch]


class StepStream:
    """Reads the batches of consecutive steps for one rank, `prefetch` steps ahead of training.

    Nothing in here depends on what training did, so neither does reading ahead; `workers` threads
    (0: the caller's own) give the same batches. `stall_s` adds up the seconds for which steps were
    waited for. `readers`: one for each cache. `fetch_ahead` is told where training stands.
    """

    def __init__(
        self,
        order: StepOrder,
        readers: Sequence[BatchReader],
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int | None,
        workers: int = 0,
        prefetch: int = 1,
        fetch_ahead: FetchAhead | None = None,
    ) -> None:
        self.order = order
        self.stall_s = 0.0
        self._readers = tuple(readers)
        self._rank = rank
        self._world_size = world_size
        self._micro_batch_size = micro_batch_size
        self._workers = workers
        self._prefetch = prefetch
        self._fetch_ahead = fetch_ahead

    def steps(self, first: int, stop: int) -> Generator[StepBatches, None, None]:
        """Yield the work of the steps [first, stop). Close it to stop the threads early."""
        self._say_where(first)
        reads = read_ahead(
            map(self.order.at, range(first, stop)),
            self._batches_of,
            num_workers=self._workers,
            num_ahead=self._prefetch,
        )
        try:
            began_s = time.monotonic()
            for work in reads:
                self.stall_s += time.monotonic() - began_s
                self._say_where(work.rows.step)
                yield work
                began_s = time.monotonic()
        finally:
            reads.close()
            if self._fetch_ahead is not None:
                self._fetch_ahead.stop()

    def _say_where(self, step: int) -> None:
        if self._fetch_ahead is not None:
            self._fetch_ahead.at(step)

    def _batches_of(self, rows: StepRows) -> StepBatches:
        return StepBatches(rows=rows, batches=[self._read(rows, r) for r in self._cut(rows)])

    def _cut(self, rows: StepRows) -> list[Int64Array]:
        return rank_rows(
            rows.rows_G,
            rank=self._rank,
            world_size=self._world_size,
            micro_batch_size=self._micro_batch_size,
        )

    def _read(self, step: StepRows, rows: Int64Array) -> Batch:
        reader = self._readers[step.cache]
        if len(rows):
            return reader.read(step.view, rows)
        # This rank has no row left, but must take part in the exchange of gradients.
        return reader.read(step.view, step.rows_G[:1]).without_targets()


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamState:
    """Where a run stands in its stream: how many steps are done, and of which set."""

    num_steps_done: int
    cache_identity: str

    def as_json(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"num_steps_done": self.num_steps_done, "cache_identity": self.cache_identity}

    def require_cache(self, identity: str, *, where: str) -> None:
        """Raise CompatibilityError unless `identity` is the set that this run was begun with."""
        if identity != self.cache_identity:
            raise CompatibilityError(
                f"{where}: begun with the cache {self.cache_identity[:12]}…, got another one, "
                f"{identity[:12]}…",
                hint="name the same cache, or train into an empty output folder",
            )
