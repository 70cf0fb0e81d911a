"""Publishing is atomic and first-wins; a set can be interrupted anywhere and finished later."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.set_builders import premasked_header, random_row, write_premasked
from tide_cache.cache import open_cache
from tide_cache.errors import CompatibilityError, FormatError, StorageError
from tide_cache.rows import rows_to_table, table_to_rows
from tide_cache.store import Store
from tide_cache.writer import SetWriter


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_the_first_writer_wins_and_nothing_else_is_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.publish("a/b.bin", b"one")
    assert not store.publish("a/b.bin", b"two")
    assert all_bytes(tmp_path) == {"a/b.bin": b"one"}


def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"x\.bin: the disk is full \(needed 3 bytes\)"):
        Store(tmp_path).publish("x.bin", b"one")
    assert all_bytes(tmp_path) == {}


def test_memory_store_publishes_too() -> None:
    store = Store("memory://tide-store-test")
    assert store.publish("x", b"1")
    assert not store.publish("x", b"2")
    assert store.read_bytes("x") == b"1"
    store.remove("")


def test_a_set_interrupted_after_each_step_ends_with_the_same_bytes(tmp_path: Path) -> None:
    write_premasked(tmp_path / "whole")
    header = premasked_header()
    for task in (0, 1):  # two runs, each of which ends after one task
        writer = SetWriter(Store(tmp_path / "parts"), header)
        assert writer.begin() is None
        assert sorted(writer.finished_tasks()) == list(range(task))
        rows_V = [[random_row(task * 5 + n, v) for n in range(5)] for v in range(2)]
        tables = [rows_to_table(rows, "positions") for rows in rows_V]
        counts = {"num_samples": 5, "num_rows": 10}
        writer.publish_task(task, tables, counts=counts, dropped={"empty_reply": task})
    with pytest.raises(StorageError, match="1 of 3 tasks are not done"):
        writer.finish(range(3))
    writer.finish(range(2))
    assert all_bytes(tmp_path / "parts") == all_bytes(tmp_path / "whole")
    assert writer.begin() is not None


def test_what_killed_writers_left_is_swept_away(tmp_path: Path) -> None:
    """Half-written shards and codec files, under the temporary names of `publish`."""
    write_premasked(tmp_path / "whole")
    for folder in ("data/view-00", "codec"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        (tmp_path / "set" / folder / ".head.safetensors.0123abcd.tmp").write_bytes(b"half")
    write_premasked(tmp_path / "set")
    assert all_bytes(tmp_path / "set") == all_bytes(tmp_path / "whole")


def test_another_config_is_refused_by_key(tmp_path: Path) -> None:
    write_premasked(tmp_path / "set")
    other = premasked_header(config={"seed": 1}, block_size=8)
    with pytest.raises(CompatibilityError, match=r"differing: block_size, config\.seed"):
        SetWriter(Store(tmp_path / "set"), other).begin()
    SetWriter(Store(tmp_path / "begun"), premasked_header()).begin()
    with pytest.raises(CompatibilityError, match=r"differing: block_size, config\.seed"):
        SetWriter(Store(tmp_path / "begun"), other).begin()


def test_another_version_of_the_program_keeps_what_is_finished_and_mixes_nothing(
    tmp_path: Path,
) -> None:
    newer = premasked_header(provenance={"command": "tests", "tide_cache": "1"})
    manifest = write_premasked(tmp_path / "set")
    assert SetWriter(Store(tmp_path / "set"), newer).begin() == manifest
    SetWriter(Store(tmp_path / "begun"), premasked_header()).begin()
    with pytest.raises(CompatibilityError, match=r"provenance\.tide_cache; .*version included"):
        SetWriter(Store(tmp_path / "begun"), newer).begin()


def test_a_shard_that_changed_since_the_last_run_is_refused(tmp_path: Path) -> None:
    writer = SetWriter(Store(tmp_path), premasked_header(num_views=1))
    writer.begin()
    table = rows_to_table([random_row(0, 0)], "positions")
    (tmp_path / "data/view-00").mkdir(parents=True)
    (tmp_path / "data/view-00/00000.parquet").write_bytes(b"changed")
    with pytest.raises(StorageError, match=r"00000\.parquet: exists with other content"):
        writer.publish_task(0, [table], counts={}, dropped={})


def test_rows_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    write_premasked(tmp_path, num_tasks=3, samples_per_task=300)
    cache = open_cache(tmp_path, num_groups_kept=2)
    assert (cache.num_samples, cache.num_views) == (900, 2)
    assert cache.row_group_sizes.tolist() == [256, 44] * 3
    wanted = [899, 0, 301, 299, 300, 0]
    rows = table_to_rows(cache.read_rows(1, wanted), "positions")
    assert [int(row.sample_id, 16) for row in rows] == wanted
    assert {row.view for row in rows} == {1}
    expected = random_row(301, 1)
    assert rows[2].student_mask_L.tolist() == expected.student_mask_L.tolist()
    assert cache.read_rows(0, [5], ["sample_id"]).column_names == ["sample_id"]
    with pytest.raises(IndexError):
        cache.read_rows(0, [900])
    with pytest.raises(IndexError):
        cache.read_rows(2, [0])


def test_what_is_no_cache_or_not_finished_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no manifest\.json: not a cache"):
        open_cache(tmp_path)
    SetWriter(Store(tmp_path), premasked_header()).begin()
    with pytest.raises(StorageError, match="the set is not finished; run the command"):
        open_cache(tmp_path)


def test_a_truncated_shard_is_named_when_it_is_read(tmp_path: Path) -> None:
    write_premasked(tmp_path)
    shard = tmp_path / "data/view-01/00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(FormatError, match=r"view-01/00001\.parquet"):
        open_cache(tmp_path).read_rows(1, [7])


def test_several_may_remove_the_same_folder_at_once(tmp_path: Path) -> None:
    for attempt in range(20):
        folder = tmp_path / str(attempt) / "_build"
        for number in range(60):
            path = folder / f"{number % 6}" / f"{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        with ThreadPoolExecutor(4) as pool:
            stores = [Store(tmp_path / str(attempt)) for _ in range(4)]
            list(pool.map(lambda store: store.remove("_build"), stores))
        assert not folder.exists()
