"""The order of training rows: a pure function of (seed, epoch, row groups, shards).

Shards are permuted and cut into pools of `shards_per_pool`; the row groups of a pool are permuted
and cut into windows of `groups_per_window`; the rows of a window are permuted together. So a reader
touches each row group once per epoch and holds two windows at most, each shard is wanted during one
pool only (a local store that holds two pools fetches it once per epoch), and the order has no state
but a position. A full permutation would mix better and read each group up to 256 times. A view that
is no larger than a pool is one pool, and its shards are not permuted.
"""

import numpy as np
import numpy.typing as npt

from tide_cache.draws import generator

Int64Array = npt.NDArray[np.int64]
DEFAULT_GROUPS_PER_WINDOW = 8
DEFAULT_SHARDS_PER_POOL = 64


def epoch_order(
    seed: int,
    epoch: int,
    group_sizes: Int64Array,
    groups_per_window: int = DEFAULT_GROUPS_PER_WINDOW,
    *,
    groups_per_shard: Int64Array | None = None,
    shards_per_pool: int | None = None,
) -> Int64Array:
    """Return the row numbers of one epoch in training order: each row once, int64 (num_rows,).

    `group_sizes` are the rows of each row group of the view, `groups_per_shard` the row groups of
    each shard in the same order; without either of the last two, the view is one pool.
    """
    random = generator(seed, "order", epoch, "order")
    starts = np.concatenate([[0], np.cumsum(group_sizes)])[:-1]
    pools = _permuted_pools(random, len(group_sizes), groups_per_shard, shards_per_pool)
    orders = []
    for window in _cut(pools, groups_per_window):
        rows = np.concatenate([np.arange(starts[g], starts[g] + group_sizes[g]) for g in window])
        orders.append(random.permutation(rows))
    return np.concatenate(orders).astype(np.int64) if orders else np.empty(0, dtype=np.int64)


def epoch_windows(
    seed: int,
    epoch: int,
    group_sizes: Int64Array,
    groups_per_window: int = DEFAULT_GROUPS_PER_WINDOW,
    *,
    groups_per_shard: Int64Array | None = None,
    shards_per_pool: int | None = None,
) -> list[Int64Array]:
    """Return the row groups of each window of `epoch_order` with the same arguments.

    The rows of window w are those that follow the rows of the windows before it. Far cheaper than
    the order: nothing is drawn for single rows.
    """
    random = generator(seed, "order", epoch, "order")
    pools = _permuted_pools(random, len(group_sizes), groups_per_shard, shards_per_pool)
    return _cut(pools, groups_per_window)


def is_one_pool(num_shards: int, shards_per_pool: int | None) -> bool:
    """Say whether a view of so many shards is shuffled as a whole."""
    return shards_per_pool is None or num_shards <= shards_per_pool


def _permuted_pools(
    random: np.random.Generator,
    num_groups: int,
    groups_per_shard: Int64Array | None,
    shards_per_pool: int | None,
) -> list[Int64Array]:
    """Return the row groups of each pool in training order."""
    if (
        groups_per_shard is None
        or shards_per_pool is None
        or is_one_pool(len(groups_per_shard), shards_per_pool)
    ):
        return [random.permutation(num_groups)]
    of_shard = np.split(np.arange(num_groups), np.cumsum(groups_per_shard)[:-1])
    shards = random.permutation(len(groups_per_shard))
    pools = [shards[a : a + shards_per_pool] for a in range(0, len(shards), shards_per_pool)]
    # All groups are drawn before any row, so that the windows are known without the rows.
    return [random.permutation(np.concatenate([of_shard[s] for s in pool])) for pool in pools]


def _cut(pools: list[Int64Array], groups_per_window: int) -> list[Int64Array]:
    return [
        pool[first : first + groups_per_window]
        for pool in pools
        for first in range(0, len(pool), groups_per_window)
    ]
