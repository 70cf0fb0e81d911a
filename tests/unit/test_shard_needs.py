"""What is named ahead is what the steps read, in their order, and within the room there is."""

from functools import cache as remembered
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stage2_student.shard_needs import RemotePlan, ShardFetcher, ShardNeeds
from stage2_student.stream import GlobalOrder
from tests.cache_builders import SetShape, save_tokenizer, write_premasked
from tide_cache.cache import Cache, open_cache
from tide_cache.errors import ConfigError
from tide_cache.local_copies import LocalCopies, LocalStoreConfig


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    root = tmp_path_factory.mktemp("set")
    shape = SetShape(num_samples=700, samples_per_task=60, max_blocks=1)
    write_premasked(root / "set", save_tokenizer(root / "tokenizer"), shape)
    return open_cache(root / "set")


def needs_of(
    cache: Cache, *, batch_size: int, window: int, pool: int | None, max_steps: int, prefetch: int
) -> tuple[GlobalOrder, ShardNeeds]:
    order = GlobalOrder(
        seed=1,
        group_sizes=cache.row_group_sizes,
        num_views=cache.num_views,
        batch_size=batch_size,
        groups_per_window=window,
        groups_per_shard=cache.row_groups_per_shard,
        shards_per_pool=pool,
    )
    return order, ShardNeeds(order, cache, max_steps=max_steps, prefetch=prefetch)


def read_by(order: GlobalOrder, cache: Cache, step: int) -> set[str]:
    rows = order.at(step)
    starts = cache._starts
    numbers = {int(starts.searchsorted(row, side="right")) - 1 for row in rows.rows_G}
    return {[s for s in cache.manifest.shards if s.view == rows.view][n].path for n in numbers}


class Recorder:
    """Stands for the local copies: remembers what is named."""

    def __init__(self, max_bytes: int) -> None:
        self.config = LocalStoreConfig(max_gb=max_bytes / 10**9)
        self.kept: list[str] = []

    def keep(self, wanted: list[str]) -> None:
        self.kept = wanted


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batch_size=st.integers(1, 200),
    window=st.integers(1, 4),
    pool=st.none() | st.integers(1, 12),
    max_steps=st.integers(1, 40),
    prefetch=st.integers(1, 5),
    room=st.floats(0, 1),
    data=st.data(),
)
def test_what_is_named_is_what_is_read(
    cache: Cache,
    batch_size: int,
    window: int,
    pool: int | None,
    max_steps: int,
    prefetch: int,
    room: float,
    data: st.DataObject,
) -> None:
    order, needs = needs_of(
        cache,
        batch_size=batch_size,
        window=window,
        pool=pool,
        max_steps=max_steps,
        prefetch=prefetch,
    )
    reads = remembered(lambda step: read_by(order, cache, step))
    windows = list(needs.windows())
    sizes = {shard.path: shard.size_bytes for shard in cache.manifest.shards}
    least, everything = needs.least_bytes(), needs.bytes_read()[0]
    max_bytes = least + int(room * 2 * everything)
    recorder = Recorder(max_bytes)
    fetcher = ShardFetcher(needs, cast(LocalCopies, recorder))
    first = data.draw(st.integers(0, max_steps - 1))
    for step in range(first, max_steps):
        named = {s.path for w in windows if w.first_step <= step <= w.last_step for s in w.shards}
        assert reads(step) <= named
        fetcher.at(step)
        soon = range(step, min(step + prefetch + 1, max_steps))
        assert set().union(*(reads(s) for s in soon)) <= set(recorder.kept)
        assert len(set(recorder.kept)) == len(recorder.kept)
        taken = sum(sizes[path] for path in recorder.kept)
        assert taken <= max(least, max_bytes // 2)
        # In order of need: what this step reads comes before what only later ones do.
        positions = [recorder.kept.index(path) for path in named]
        assert max(positions) < len(named)
    fetcher.stop()
    assert recorder.kept == []


def test_a_shard_is_needed_during_one_pool_only(cache: Cache) -> None:
    """Eleven shards a view in pools of two: no shard is named again once it was let go."""
    _, needs = needs_of(cache, batch_size=20, window=1, pool=2, max_steps=35, prefetch=1)
    recorder = Recorder(needs.least_bytes() * 4)
    fetcher = ShardFetcher(needs, cast(LocalCopies, recorder))
    gone: set[str] = set()
    before: set[str] = set()
    for step in range(35):
        fetcher.at(step)
        gone |= before - set(recorder.kept)
        before = set(recorder.kept)
        assert not gone & before
    sizes = {shard.size_bytes for shard in cache.manifest.shards}
    assert needs.least_bytes() <= 4 * max(sizes)


def test_what_a_run_fetches(cache: Cache) -> None:
    _, needs = needs_of(cache, batch_size=100, window=2, pool=None, max_steps=28, prefetch=1)
    whole = sum(shard.size_bytes for shard in cache.manifest.shards)
    assert needs.num_epochs == 4
    assert needs.bytes_read() == (whole, 2 * whole), "four epochs of two views"


def test_too_little_room_is_refused_with_what_suffices() -> None:
    facts: dict[str, Any] = {"folder": str(Path("store")), "bytes_to_fetch": 1, "fits": True}
    plan = RemotePlan(max_bytes=10**6, least_bytes=1_234_567, **facts)
    with pytest.raises(
        ConfigError, match=r"local_store\.max_gb: expected at least 0\.001235 .*, got 0\.001; raise"
    ):
        plan.require_room()
    assert plan.as_json()["least_gb"] == 0.001235
    RemotePlan(max_bytes=1_234_567, least_bytes=1_234_567, **facts).require_room()
