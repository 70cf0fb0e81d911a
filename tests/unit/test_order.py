"""The order visits each row once, needs few windows at a time and is a function of its keys."""

import hashlib
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tide_cache.order import epoch_order, epoch_windows


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(0, 5), st.integers(1, 5))
def test_each_row_once(sizes: list[int], epoch: int, window: int) -> None:
    order = epoch_order(3, epoch, np.array(sizes, dtype=np.int64), window)
    assert sorted(order.tolist()) == list(range(sum(sizes)))


def test_a_window_touches_its_groups_only() -> None:
    sizes = np.full(10, 16, dtype=np.int64)
    order = epoch_order(0, 0, sizes, groups_per_window=2)
    groups = order // 16
    for start in range(0, 160, 32):
        assert len(set(groups[start : start + 32].tolist())) == 2
    assert (np.sort(order[:32]) != order[:32]).any()


def test_order_depends_on_seed_and_epoch_alone() -> None:
    sizes = np.array([7, 5, 9], dtype=np.int64)
    base = epoch_order(1, 2, sizes)
    np.testing.assert_array_equal(base, epoch_order(1, 2, sizes))
    assert not np.array_equal(base, epoch_order(1, 3, sizes))
    assert not np.array_equal(base, epoch_order(2, 2, sizes))


def test_a_view_of_one_pool_is_ordered_as_it_always_was() -> None:
    """Literals of the program before there were pools: checkpoints of then go on as they were."""
    sizes = np.array([3, 2, 4, 1, 3, 2], dtype=np.int64)
    by_two = [1, 2, 9, 0, 3, 7, 5, 6, 4, 8, 10, 12, 11, 14, 13]
    by_eight = [9, 4, 7, 1, 11, 2, 8, 13, 0, 12, 6, 14, 5, 3, 10]
    for pools in ({}, {"groups_per_shard": np.array([2, 1, 3]), "shards_per_pool": 3}):
        assert epoch_order(7, 3, sizes, 2, **pools).tolist() == by_two
        assert epoch_order(7, 3, sizes, 8, **pools).tolist() == by_eight
    large = epoch_order(0, 1, np.full(300, 256), 8)
    digest = hashlib.sha256(large.astype("<i8").tobytes()).hexdigest()
    assert digest == "962b62992327653b0e2db0b8bff7cf11519d1f24bd8dab77beb30bf357e51eea"


SHARDS = st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=9)


@given(
    SHARDS, st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.none() | st.integers(1, 5)
)
def test_pools(
    shards: list[list[int]], seed: int, epoch: int, window: int, per_pool: int | None
) -> None:
    sizes = np.array([size for shard in shards for size in shard], dtype=np.int64)
    counts = np.array([len(shard) for shard in shards], dtype=np.int64)
    options: dict[str, Any] = {"groups_per_shard": counts, "shards_per_pool": per_pool}
    order = epoch_order(seed, epoch, sizes, window, **options)
    assert sorted(order.tolist()) == list(range(sizes.sum()))
    # The windows say which row groups each piece of the order is made of.
    group_of_row = np.repeat(np.arange(len(sizes)), sizes)
    windows = epoch_windows(seed, epoch, sizes, window, **options)
    start = 0
    for groups in windows:
        stop = start + int(sizes[groups].sum())
        assert set(group_of_row[order[start:stop]].tolist()) == set(groups.tolist())
        start = stop
    assert start == len(order)
    # A shard is wanted within one pool, and a pool is so many shards.
    shard_of_group = np.repeat(np.arange(len(counts)), counts)
    seen: list[int] = []
    for shard in shard_of_group[np.concatenate(windows)] if windows else []:
        if shard not in seen:
            seen.append(int(shard))
        elif per_pool is not None:
            assert len(seen) - seen.index(shard) <= per_pool


def test_shards_are_permuted_too() -> None:
    """Else the first pool would hold the same samples in every epoch."""
    firsts = set()
    for epoch in range(5):
        order = epoch_order(
            0, epoch, np.full(12, 4), 2, groups_per_shard=np.full(6, 2), shards_per_pool=2
        )
        firsts.add(frozenset((order[:16] // 8).tolist()))
    assert len(firsts) > 1
    assert all(len(first) == 2 for first in firsts)
