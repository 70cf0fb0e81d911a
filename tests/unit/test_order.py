"""The order visits each row once, needs few windows at a time and is a function of its keys."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tide_cache.order import epoch_order


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
