"""Every row exactly once an epoch, for any cut of the work, from any point of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage2_student.stream import GlobalOrder, StreamState, rank_rows
from tide_cache.errors import CompatibilityError

GROUPS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def make_order(groups: list[int], batch_size: int, seed: int, views: int = 3) -> GlobalOrder:
    return GlobalOrder(
        seed=seed,
        group_sizes=np.array(groups),
        num_views=views,
        batch_size=batch_size,
        groups_per_window=2,
    )


@given(
    groups=GROUPS,
    batch_size=st.integers(1, 50),
    world_size=st.integers(1, 5),
    micro=st.none() | st.integers(1, 9),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 7),
)
def test_every_row_once_an_epoch_over_all_ranks(
    groups: list[int], batch_size: int, world_size: int, micro: int | None, seed: int, epoch: int
) -> None:
    order = make_order(groups, batch_size, seed)
    seen: list[int] = []
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        rows = order.at(step)
        assert (rows.epoch, rows.view) == (epoch, epoch % 3)
        cuts = [
            rank_rows(rows.rows_G, rank=rank, world_size=world_size, micro_batch_size=micro)
            for rank in range(world_size)
        ]
        # Ranks exchange gradients together: as many micro-batches on each.
        assert len({len(cut) for cut in cuts}) == 1
        pieces = [piece for cut in cuts for piece in cut]
        assert all(len(piece) <= (micro or batch_size) for piece in pieces)
        # Put together they are the global batch, whatever the cut.
        assert np.concatenate(pieces).tolist() == rows.rows_G.tolist()
        seen += rows.rows_G.tolist()
    assert sorted(seen) == list(range(sum(groups)))


@given(groups=GROUPS, batch_size=st.integers(1, 50), points=st.lists(st.integers(0, 60)))
def test_a_step_does_not_depend_on_what_was_read_before(
    groups: list[int], batch_size: int, points: list[int]
) -> None:
    walked = make_order(groups, batch_size, seed=1)
    for point in points:
        fresh = make_order(groups, batch_size, seed=1).at(point)
        again = walked.at(point)
        assert again.rows_G.tolist() == fresh.rows_G.tolist()
        assert (again.view, again.epoch) == (fresh.view, fresh.epoch)


def test_only_the_last_batch_of_an_epoch_is_short() -> None:
    order = make_order([10, 10, 3], batch_size=8, seed=0)
    assert order.steps_per_epoch == 3
    assert [len(order.at(step).rows_G) for step in range(6)] == [8, 8, 7, 8, 8, 7]


def test_epochs_and_seeds_differ_in_order() -> None:
    order, other = make_order([64], 64, seed=0), make_order([64], 64, seed=1)
    first, second = order.at(0).rows_G.tolist(), order.at(1).rows_G.tolist()
    assert first != second
    assert first != other.at(0).rows_G.tolist()
    assert sorted(first) == sorted(second)


def test_a_batch_larger_than_the_set_is_the_set() -> None:
    order = make_order([3, 2], batch_size=100, seed=0)
    assert order.steps_per_epoch == 1
    assert sorted(order.at(4).rows_G.tolist()) == [0, 1, 2, 3, 4]


def test_ranks_without_rows_still_take_part() -> None:
    cuts = [
        rank_rows(np.array([5]), rank=rank, world_size=3, micro_batch_size=2) for rank in range(3)
    ]
    assert [[piece.tolist() for piece in cut] for cut in cuts] == [[[5]], [[]], [[]]]


def test_the_state_knows_its_cache() -> None:
    state = StreamState(num_steps_done=3, cache_identity="a" * 64)
    state.require_cache("a" * 64, where="run")
    assert StreamState(**state.as_json()) == state
    with pytest.raises(CompatibilityError, match="run: begun with the cache aaaaaaaaaaaa…, got"):
        state.require_cache("b" * 64, where="run")
