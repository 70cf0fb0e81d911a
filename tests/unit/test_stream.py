"""Every row exactly once an epoch, for any cut of the work, from any point of it."""

import time
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage2_student.batches import BatchReader
from stage2_student.config import FREE_KEYS, TrainConfig, deciding_keys
from stage2_student.stream import GlobalOrder, StepStream, StreamState, rank_rows
from tide_cache.errors import CompatibilityError

GROUPS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def make_order(
    groups: list[int],
    batch_size: int,
    seed: int,
    views: int = 3,
    per_shard: int = 3,
    per_pool: int | None = None,
) -> GlobalOrder:
    whole, rest = divmod(len(groups), per_shard)
    return GlobalOrder(
        seed=seed,
        group_sizes=np.array(groups),
        num_views=views,
        batch_size=batch_size,
        groups_per_window=2,
        groups_per_shard=np.array([per_shard] * whole + ([rest] if rest else [])),
        shards_per_pool=per_pool,
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


class RecordingReader:
    """Gives the rows themselves for a batch; what is made of rows is tested elsewhere."""

    def read(self, view: int, rows: np.ndarray[Any, Any]) -> "Rows":
        return Rows(view, rows.tolist())


class Rows:
    """A batch that remembers which rows it was asked for."""

    def __init__(self, view: int, rows: list[int]) -> None:
        self.view, self.rows = view, rows

    def without_targets(self) -> "Rows":
        return Rows(self.view, [])


def read_run(
    order: GlobalOrder, first: int, stop: int, *, world_size: int, **options: Any
) -> list[list[tuple[int, int]]]:
    """The (view, row) pairs of each step, put together over all ranks."""
    streams = [
        StepStream(
            order,
            [cast(BatchReader, RecordingReader())],
            rank=rank,
            world_size=world_size,
            **options,
        ).steps(first, stop)
        for rank in range(world_size)
    ]
    steps = []
    for works in zip(*streams, strict=True):
        batches = [cast(Any, batch) for work in works for batch in work.batches]
        assert len({work.rows.step for work in works}) == 1
        steps.append([(batch.view, row) for batch in batches for row in batch.rows])
    return steps


@settings(deadline=None, max_examples=60)
@given(
    groups=GROUPS,
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 3),
    per_shard=st.integers(1, 4),
    per_pool=st.none() | st.integers(1, 4),
    cuts=st.lists(
        st.tuples(
            st.integers(1, 4),  # ranks
            st.integers(0, 3),  # workers
            st.integers(1, 4),  # steps read ahead
            st.none() | st.integers(1, 9),  # rows of a micro-batch
        ),
        min_size=1,
        max_size=4,
    ),
    stops=st.lists(st.integers(0, 200), max_size=3),
)
def test_every_row_once_for_any_ranks_workers_and_resume_points(
    groups: list[int],
    batch_size: int,
    seed: int,
    per_shard: int,
    per_pool: int | None,
    cuts: list[tuple[int, int, int, int | None]],
    stops: list[int],
) -> None:
    """A run of two epochs, stopped at will and gone on with by other ranks and workers."""

    def order() -> GlobalOrder:
        return make_order(groups, batch_size, seed, 2, per_shard, per_pool)

    per_epoch = order().steps_per_epoch
    straight = [step.rows_G.tolist() for step in map(order().at, range(2 * per_epoch))]
    points = sorted({0, 2 * per_epoch, *(min(stop, 2 * per_epoch) for stop in stops)})
    seen: list[list[tuple[int, int]]] = []
    for number, (first, stop) in enumerate(pairwise(points)):
        world_size, workers, prefetch, micro = cuts[number % len(cuts)]
        seen += read_run(
            order(),
            first,
            stop,
            world_size=world_size,
            micro_batch_size=micro,
            workers=workers,
            prefetch=prefetch,
        )
    assert [[row for _, row in step] for step in seen] == straight
    for view in range(2):
        rows = sorted(pair for step in seen for pair in step if pair[0] == view)
        assert rows == [(view, row) for row in range(sum(groups))]


class SlowReader:
    """A reader that takes its time."""

    def read(self, view: int, rows: np.ndarray[Any, Any]) -> Rows:
        time.sleep(0.05)
        return Rows(view, rows.tolist())


def stall_s_of(workers: int) -> float:
    """Eight reads of 50 ms, beside a caller that works for 60 ms a step."""
    stream = StepStream(
        make_order([64], 8, seed=0),
        [cast(BatchReader, SlowReader())],
        rank=0,
        world_size=1,
        micro_batch_size=None,
        workers=workers,
        prefetch=4,
    )
    for _ in stream.steps(0, 8):
        time.sleep(0.06)
    return stream.stall_s


def test_stall_time_is_what_was_waited_for() -> None:
    one_by_one_s = stall_s_of(0)
    assert one_by_one_s >= 0.4
    assert stall_s_of(4) < one_by_one_s


def test_readers_may_change_within_a_run_and_pools_may_not() -> None:
    config = TrainConfig.model_validate(
        {"output": "x", "student": {"init": "somewhere"}, "epochs": 1}
    )
    keys = deciding_keys(config)
    assert {"stream.workers", "stream.prefetch"} <= set(FREE_KEYS)
    assert not {"stream.workers", "stream.prefetch"} & set(keys)
    assert keys["stream.shards_per_pool"] == 64
