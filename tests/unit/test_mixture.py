"""Steps over several caches: a pure function of the weights, each cache in its own order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage2_student.mixture import MixedFetcher, MixedOrder, caches_of_steps
from stage2_student.stream import GlobalOrder

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


def make_order(num_rows: int, *, batch_size: int = 4, num_views: int = 2) -> GlobalOrder:
    return GlobalOrder(
        seed=0,
        group_sizes=np.array([num_rows]),
        num_views=num_views,
        batch_size=batch_size,
    )


@given(WEIGHTS, st.integers(0, 300), st.integers(0, 300))
def test_a_longer_run_begins_like_a_shorter_one(weights: list[float], one: int, other: int) -> None:
    shorter, longer = sorted((one, other))
    found = caches_of_steps(weights, longer)
    assert len(found) == longer
    np.testing.assert_array_equal(found[:shorter], caches_of_steps(weights, shorter))


@given(WEIGHTS, st.integers(1, 300))
def test_every_cache_has_its_share_at_any_moment(weights: list[float], num_steps: int) -> None:
    found = caches_of_steps(weights, num_steps)
    for cache, weight in enumerate(weights):
        had = np.cumsum(found == cache)
        share = np.arange(1, num_steps + 1) * weight / sum(weights)
        assert np.abs(had - share).max() <= len(weights) / 2 + 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 4))
def test_whole_shares_are_exact(weights: list[int], times: int) -> None:
    found = caches_of_steps(weights, times * sum(weights))
    assert np.bincount(found, minlength=len(weights)).tolist() == [times * w for w in weights]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 9))
def test_epochs_read_every_row_of_every_cache_as_often(
    sizes: list[int], epochs: int, batch_size: int
) -> None:
    orders = [make_order(size, batch_size=batch_size) for size in sizes]
    weights = [order.steps_per_epoch for order in orders]
    order = MixedOrder(orders, weights, max_steps=epochs * sum(weights))
    assert order.steps_per_epoch == sum(weights)
    seen: dict[tuple[int, int, int], int] = {}
    for step in range(epochs * sum(weights)):
        rows = order.at(step)
        assert rows.step == step
        assert rows.view == rows.epoch % 2
        for row in rows.rows_G.tolist():
            key = (rows.cache, rows.epoch, row)
            seen[key] = seen.get(key, 0) + 1
    assert set(seen.values()) == {1}
    assert len(seen) == epochs * sum(sizes)


def test_a_cache_keeps_its_own_order() -> None:
    orders = [make_order(10), make_order(23)]
    mixed = MixedOrder(orders, [2.0, 1.0], max_steps=30)
    own_steps = [0, 0]
    for step in range(30):
        assert mixed.steps_before(step) == own_steps
        rows = mixed.at(step)
        alone = orders[rows.cache].at(own_steps[rows.cache])
        assert (rows.epoch, rows.view) == (alone.epoch, alone.view)
        np.testing.assert_array_equal(rows.rows_G, alone.rows_G)
        own_steps[rows.cache] += 1
    assert own_steps == [20, 10] == [mixed.num_steps_of(0), mixed.num_steps_of(1)]


class Recorder:
    def __init__(self) -> None:
        self.heard: list[int | str] = []

    def at(self, step: int) -> None:
        self.heard.append(step)

    def stop(self) -> None:
        self.heard.append("stop")


@pytest.mark.parametrize("local", [True, False])
def test_fetchers_hear_their_own_steps(local: bool) -> None:
    mixed = MixedOrder([make_order(10), make_order(23)], [1.0, 1.0], max_steps=6)
    first, second = Recorder(), Recorder()
    fetcher = MixedFetcher(mixed, [None if local else first, second])
    for step in range(6):
        fetcher.at(step)
    fetcher.stop()
    assert second.heard == [0, 0, 1, 1, 2, 2, "stop"]
    assert first.heard == ([] if local else [0, 1, 1, 2, 2, 3, "stop"])
