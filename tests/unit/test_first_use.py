"""Checked while it is used, a set gives out nothing that `verify` would refuse in a shard."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cache_builders import SetShape
from tests.mutations import mutate
from tests.payload_caches import PAYLOADS, make_cache
from tide_cache.cache import Cache, open_cache
from tide_cache.errors import FormatError
from tide_cache.first_use import FirstUse
from tide_cache.shards import ROWS_PER_GROUP
from tide_cache.store import Store

SHAPE = SetShape(num_samples=12, samples_per_task=6, num_views=2, ragged=True, lone_share=0.3)


class CountingStore(Store):
    """Counts how often each file is hashed."""

    def __init__(self, url: str | Path) -> None:
        super().__init__(url)
        self.hashed: Counter[str] = Counter()

    def sha256(self, relative: str) -> str:
        self.hashed[relative] += 1
        return super().sha256(relative)


def _read_all(cache: Cache) -> None:
    for view in range(cache.num_views):
        cache.read_rows(view, range(cache.num_samples), ["sample_id", "timestep"])


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_sound_set_reads_as_without_checks(tmp_path: Path, payload: str) -> None:
    folder = make_cache(tmp_path / "set", payload, SHAPE).folder
    checked, plain = open_cache(folder, check=True), open_cache(folder)
    for view in range(plain.num_views):
        for columns in ([], ["sample_id", "student_ids"]):
            rows = [3, 0, 11, 7]
            assert checked.read_rows(view, rows, columns) == plain.read_rows(view, rows, columns)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shard_byte", "sha256 mismatch|bytes, got|not a readable|damaged data"),
        ("shards_swapped", "sha256 mismatch|bytes, got"),
        ("forged_swap", "were exchanged or renamed|belongs to another set"),
        ("forged_columns", "schema|rows in groups of"),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_what_verify_refuses_in_a_shard_is_refused_at_its_first_use(
    tmp_path: Path, kind: str, message: str, seed: int
) -> None:
    folder = make_cache(tmp_path / "set", "ranked", SHAPE).folder
    mutate(folder, kind, random.Random(seed))
    with pytest.raises(FormatError, match=message) as caught:
        _read_all(open_cache(folder, check=True))
    assert "tide-cache verify" in str(caught.value.hint)


def test_a_forged_row_is_refused_though_only_other_columns_are_asked_for(tmp_path: Path) -> None:
    refused = 0
    for seed in range(12):
        folder = make_cache(tmp_path / f"{seed}" / "set", "raw", SHAPE).folder
        mutate(folder, "forged_row_value", random.Random(seed))
        try:
            _read_all(open_cache(folder, check=True))
        except FormatError as error:
            assert "data/view-0" in error.message
            refused += 1
        _read_all(open_cache(folder))  # all hashes and pages are right: unchecked, it is read
    assert refused >= 8  # some forged values are sound rows of another set


def test_a_manifest_that_contradicts_itself_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    folder = make_cache(tmp_path / "set", "chunks", SHAPE).folder
    manifest = open_cache(folder).manifest
    wrong = manifest.model_copy(update={"counts": {**manifest.counts, "num_rows": 7}})
    with pytest.raises(FormatError, match="num_rows: expected 24, got 7"):
        FirstUse(Store(folder), wrong)


def test_each_shard_is_hashed_once_whoever_asks(tmp_path: Path) -> None:
    shape = SetShape(num_samples=ROWS_PER_GROUP + 40, samples_per_task=ROWS_PER_GROUP + 40)
    folder = make_cache(tmp_path / "set", "chunks", shape).folder
    store = CountingStore(folder)
    manifest = open_cache(folder).manifest
    cache = Cache(store, manifest, num_groups_kept=1, first_use=FirstUse(store, manifest))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: cache.read_rows(0, [n, n + ROWS_PER_GROUP]), range(40)))
    first = manifest.shards[0].path
    assert store.hashed[first] == 1
    assert store.hashed.total() == 1  # nothing of the other views was used
