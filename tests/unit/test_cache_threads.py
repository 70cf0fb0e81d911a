"""Threads that read from one set at once get what one thread gets, and decode each group once."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.cache_builders import SetShape, save_tokenizer, write_premasked
from tide_cache import cache as cache_module
from tide_cache.cache import Cache, open_cache
from tide_cache.errors import FormatError
from tide_cache.manifest import Manifest

SHAPE = SetShape(num_samples=1300, samples_per_task=400, max_blocks=2)
NUM_GROUPS = 7  # of a view: 256 + 144 rows, three times, and 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    manifest: Manifest = write_premasked(root / "set", save_tokenizer(root / "tokenizer"), SHAPE)
    assert [shard.num_rows for shard in manifest.shards if not shard.view] == [400, 400, 400, 100]
    return root / "set"


def draws(seed: int, num_reads: int) -> list[tuple[int, np.ndarray[Any, Any]]]:
    random = np.random.default_rng(seed)
    return [(int(random.integers(2)), random.integers(0, 1300, 64)) for _ in range(num_reads)]


@pytest.mark.parametrize("num_kept", [2, 100])
def test_threads_read_what_one_thread_reads(folder: Path, num_kept: int) -> None:
    reads = draws(0, 60)
    alone = open_cache(folder)
    expected = [alone.read_rows(view, rows) for view, rows in reads]
    shared = open_cache(folder, num_groups_kept=num_kept)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda read: shared.read_rows(*read), reads))
    assert all(one.equals(other) for one, other in zip(expected, found, strict=True))
    shared.close()


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    counts: Counter[tuple[str, int]] = Counter()
    decode = cache_module.read_row_groups
    lock = threading.Lock()

    def counted(store: Any, path: str, file: Any, groups: list[int], columns: Any) -> pa.Table:
        with lock:
            counts[path, groups[0]] += 1
        return decode(store, path, file, groups, columns)

    monkeypatch.setattr(cache_module, "read_row_groups", counted)
    return counts


def test_each_group_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_decodes(monkeypatch)
    shared = open_cache(folder)
    everything = np.arange(1300)
    start = threading.Barrier(6)

    def read(view: int) -> pa.Table:
        start.wait()
        return shared.read_rows(view, everything, ("sample_id",))

    with ThreadPoolExecutor(6) as pool:
        tables = list(pool.map(read, [0, 0, 0, 1, 1, 1]))
    assert tables[0].equals(tables[2])
    assert len(counts) == 2 * NUM_GROUPS
    assert set(counts.values()) == {1}


def test_every_thread_hears_of_damage_and_may_try_again(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    for path in folder.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    shard = copy / "data/view-00/00000.parquet"
    sound = shard.read_bytes()
    shard.write_bytes(bytes(300) + sound[300:])
    cache: Cache = open_cache(copy)

    def read(_number: int) -> str:
        with pytest.raises(FormatError, match=r"data/view-00/00000\.parquet: damaged data"):
            cache.read_rows(0, np.arange(400))
        return "heard"

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(read, range(8))) == {"heard"}
    cache.close()
    shard.write_bytes(sound)
    assert cache.read_rows(0, np.arange(400)).num_rows == 400
