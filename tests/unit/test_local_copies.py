"""Local copies: checked before use, within their bound, and never the last of their kind lost."""

import contextlib
import fcntl
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from stat import S_ISREG
from typing import Any

import fsspec
import numpy as np
import pytest

from tests.cache_builders import SetShape, save_tokenizer, write_premasked
from tide_cache import copies_folder, fetch
from tide_cache.cache import Cache, open_cache
from tide_cache.errors import FormatError, MissingFileError, StorageError
from tide_cache.local_copies import LocalCopies, LocalStoreConfig
from tide_cache.manifest import ShardFacts

SHAPE = SetShape(num_samples=80, samples_per_task=10, max_blocks=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    write_premasked(root / "set", save_tokenizer(root / "tokenizer"), SHAPE)
    return root / "set"


@pytest.fixture
def url(folder: Path, tmp_path: Path) -> Iterator[str]:
    """The set in fsspec's memory file system, which is remote to the program."""
    memory = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}"
    memory.put(str(folder), f"/{tmp_path.name}", recursive=True)
    yield url
    memory.rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(copies_folder, "_WAIT_FOR_ROOM_S", 0.3)


def open_remote(url: str, root: Path, max_bytes: float = 10**9, retries: int = 2) -> Cache:
    config = LocalStoreConfig(folder=str(root), max_gb=max_bytes / 10**9, retries=retries)
    return open_cache(url, local=config)


def copies_of(cache: Cache) -> LocalCopies:
    assert cache.copies is not None
    return cache.copies


def shards_of(cache: Cache) -> list[ShardFacts]:
    return list(cache.manifest.shards)


def size_of(root: Path) -> int:
    """The size of all files. Nothing may grow or move between two looks at the folder."""
    with (root / ".lock").open("a") as lock:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        total = 0
        for path in root.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # going is allowed
                stat = path.lstat()
                total += stat.st_size if S_ISREG(stat.st_mode) else 0
        return total


def present(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("*/data/*/*.parquet"))


def write_remote(url: str, path: str, data: bytes) -> None:
    fsspec.filesystem("memory").pipe_file(f"/{url.removeprefix('memory://')}/{path}", data)


def read_remote(url: str, path: str) -> bytes:
    found: bytes = fsspec.filesystem("memory").cat_file(f"/{url.removeprefix('memory://')}/{path}")
    return found


def remove_remote(url: str, path: str) -> None:
    fsspec.filesystem("memory").rm(f"/{url.removeprefix('memory://')}/{path}")


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_rows_are_those_of_the_original(url: str, folder: Path, tmp_path: Path) -> None:
    cache = open_remote(url, tmp_path / "store")
    rows = np.array([79, 3, 40, 3])
    for view in range(2):
        assert cache.read_rows(view, rows).equals(open_cache(folder).read_rows(view, rows))
    assert len(present(tmp_path / "store")) == 6
    assert cache.url == url
    cache.close()


def test_a_local_set_has_no_copies(folder: Path, tmp_path: Path) -> None:
    cache = open_remote(str(folder), tmp_path / "store")
    assert cache.copies is None
    cache.read_rows(0, [1])
    assert not (tmp_path / "store").exists()


def test_only_what_is_read_is_fetched(url: str, tmp_path: Path) -> None:
    cache = open_remote(url, tmp_path / "store")
    assert present(tmp_path / "store") == []
    cache.read_rows(1, [25])
    assert present(tmp_path / "store") == ["00002.parquet"]
    cache.close()


def test_a_fetch_that_came_wrong_is_tried_again(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_remote(url, tmp_path / "store")
    shard = shards_of(cache)[0]
    sound = read_remote(url, shard.path)
    write_remote(url, shard.path, same_size(sound))
    real = fetch._attempt

    def heal_afterwards(*arguments: Any) -> Any:
        problem = real(*arguments)
        write_remote(url, shard.path, sound)
        return problem

    monkeypatch.setattr(fetch, "_attempt", heal_afterwards)
    with caplog.at_level(logging.WARNING):
        cache.read_rows(0, [0])
    assert "sha256 mismatch" in caplog.text
    assert "trying again in" in caplog.text
    cache.close()


def same_size(data: bytes) -> bytes:
    return data[:500] + bytes([data[500] ^ 1]) + data[501:]


def cut_short(data: bytes) -> bytes:
    return data[:-7]


def much_longer(data: bytes) -> bytes:
    return data + bytes(10**6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (same_size, r"sha256 mismatch \(expected {sha}…, got [0-9a-f]{{12}}…\) \(3 tries\)"),
        (cut_short, r"expected {size} bytes, got {short} \(3 tries\)"),
        (much_longer, r"expected {size} bytes, got more \(3 tries\)"),
    ],
)
def test_what_never_comes_right_is_named(
    url: str, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    cache = open_remote(url, tmp_path / "store")
    shard = shards_of(cache)[4]
    write_remote(url, shard.path, damage(read_remote(url, shard.path)))
    told = message.format(sha=shard.sha256[:12], size=shard.size_bytes, short=shard.size_bytes - 7)
    with pytest.raises(FormatError, match=f"^{url}/{shard.path}: {told}; run 'tide-cache verify"):
        cache.read_rows(shard.view, np.arange(80))
    assert not list((tmp_path / "store").rglob("*.part"))
    cache.close()


def test_a_file_that_is_not_there_is_named_at_once(url: str, tmp_path: Path) -> None:
    cache = open_remote(url, tmp_path / "store", retries=50)
    remove_remote(url, shards_of(cache)[0].path)
    with pytest.raises(MissingFileError, match=r"00000\.parquet: no such file"):
        cache.read_rows(0, [0])
    cache.close()


def test_copies_of_an_earlier_run_are_used_after_a_check(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_remote(url, tmp_path / "store")
    first.read_rows(0, np.arange(80))
    first.close()
    copies = sorted((tmp_path / "store").rglob("*.parquet"))
    sound = copies[3].read_bytes()
    copies[3].write_bytes(same_size(sound))
    copies[5].write_bytes(cut_short(copies[5].read_bytes()))
    inodes = [path.stat().st_ino for path in copies]
    again = open_remote(url, tmp_path / "store")
    again.read_rows(0, np.arange(80))
    assert copies[3].read_bytes() == sound
    changed = [path.stat().st_ino != old for path, old in zip(copies, inodes, strict=True)]
    assert changed == [number in (3, 5) for number in range(8)]
    assert caplog.text.count("damaged, fetched anew") == 2
    again.close()


def test_the_store_stays_under_its_bound(url: str, tmp_path: Path) -> None:
    """Every size that the folder ever has is looked at, while four threads fetch."""
    whole = open_cache(url)
    bound = int(3.5 * max(shard.size_bytes for shard in whole.manifest.shards)) + 9000
    cache = open_remote(url, tmp_path / "store", bound)
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(size_of(tmp_path / "store"))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    draw = np.random.default_rng(0)
    for _ in range(40):
        rows = draw.integers(0, 80, 5)
        view = int(draw.integers(2))
        assert cache.read_rows(view, rows).equals(whole.read_rows(view, rows))
        cache._groups.clear()  # else nothing has to be read twice
    done.set()
    watcher.join()
    assert max(seen) <= bound
    assert max(seen) > bound / 2
    cache.close()


def test_the_longest_unused_goes_first(url: str, tmp_path: Path) -> None:
    sizes = [shard.size_bytes for shard in open_cache(url).manifest.shards]
    cache = open_remote(url, tmp_path / "store", 3 * max(sizes) + 9000)
    copies = copies_of(cache)
    of_view_0 = [shard.path for shard in shards_of(cache) if shard.view == 0]
    for path in (*of_view_0[:3], of_view_0[0], of_view_0[3]):
        copies.open(path).close()
        time.sleep(0.02)
    assert "00001.parquet" not in present(tmp_path / "store")
    assert {"00000.parquet", "00003.parquet"} <= set(present(tmp_path / "store"))
    cache.close()


def test_what_is_kept_stays_and_is_fetched_in_order(url: str, tmp_path: Path) -> None:
    sizes = [shard.size_bytes for shard in open_cache(url).manifest.shards]
    cache = open_remote(url, tmp_path / "store", 4 * max(sizes) + 9000)
    copies = copies_of(cache)
    paths = [shard.path for shard in shards_of(cache) if shard.view == 0]
    copies.keep(paths[:2])
    wait_until(lambda: len(present(tmp_path / "store")) == 2)
    for path in paths[2:]:
        copies.open(path).close()
    assert {"00000.parquet", "00001.parquet"} <= set(present(tmp_path / "store"))
    copies.keep(paths[1:2])
    for path in paths[2:]:
        copies.open(path).close()
    assert "00001.parquet" in present(tmp_path / "store")
    assert "00000.parquet" not in present(tmp_path / "store")
    cache.close()


def test_a_copy_without_its_original_is_never_removed(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is all there is: kept, said once, and an error where the bound cannot be kept with it."""
    sizes = [shard.size_bytes for shard in open_cache(url).manifest.shards]
    cache = open_remote(url, tmp_path / "store", 3 * max(sizes) + 9000)
    copies = copies_of(cache)
    paths = [shard.path for shard in shards_of(cache) if shard.view == 0]
    for path in paths[:3]:
        copies.open(path).close()
    held = [tmp_path / "store" / cache.identity / path for path in paths[:3]]
    first = held[0].read_bytes()
    remove_remote(url, paths[0])
    write_remote(url, paths[1], b"another file by that name")
    copies.open(paths[3]).close()
    assert held[0].read_bytes() == first
    assert held[1].exists() and not held[2].exists()
    remove_remote(url, paths[3])
    with pytest.raises(
        StorageError,
        match=r"no room for \d+ bytes more: \d+ of \d+ are used, .*3 files may be the only copies "
        r"left\); raise local_store\.max_gb",
    ):
        copies.open(paths[4])
    assert held[0].read_bytes() == first
    assert caplog.text.count("00000.parquet: kept, as it may be the only copy") == 1
    assert "is gone" in caplog.text and "is 25 bytes now, not" in caplog.text
    cache.close()


def test_what_others_put_there_is_counted_and_left(url: str, tmp_path: Path) -> None:
    sizes = [shard.size_bytes for shard in open_cache(url).manifest.shards]
    bound = 4 * max(sizes) + 9000
    cache = open_remote(url, tmp_path / "store", bound)
    paths = [shard.path for shard in shards_of(cache) if shard.view == 0]
    strangers = [
        tmp_path / "store" / "notes.txt",
        tmp_path / "store" / ("a" * 64) / "data/view-00/00000.parquet",
        tmp_path / "store" / cache.identity / "data/view-00/00000.parquet.bak",
        tmp_path / "store" / cache.identity / "data/view-00/99999.parquet",
    ]
    for path in strangers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(max(sizes) // 2))
    for path in paths:
        copies_of(cache).open(path).close()
        assert size_of(tmp_path / "store") <= bound
    assert all(path.stat().st_size == max(sizes) // 2 for path in strangers)
    strangers[0].write_bytes(bytes(bound))
    with pytest.raises(
        StorageError, match=r"no room for \d+ bytes more: \d+ of \d+ are used, and nothing"
    ):
        copies_of(cache).open(paths[0])
    assert len(present(tmp_path / "store")) > 3, "nothing goes for nothing"
    cache.close()


def test_copies_of_another_set_go_too(url: str, folder: Path, tmp_path: Path) -> None:
    write_premasked(
        tmp_path / "other", folder.parent / "tokenizer", SetShape(num_samples=30, block_size=8)
    )
    memory, other_url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}-other"
    memory.put(str(tmp_path / "other"), f"/{tmp_path.name}-other", recursive=True)
    sizes = [shard.size_bytes for shard in open_cache(url).manifest.shards]
    other = open_remote(other_url, tmp_path / "store")
    other.read_rows(0, [0])
    other.close()
    one = tmp_path / "store" / other.identity / "data/view-00/00000.parquet"
    assert one.exists()
    cache = open_remote(url, tmp_path / "store", 3 * max(sizes) + 15000)
    for shard in shards_of(cache):
        copies_of(cache).open(shard.path).close()
    assert not one.exists()
    cache.close()
    memory.rm(f"/{tmp_path.name}-other", recursive=True)


def test_two_processes_keep_what_the_other_uses(url: str, tmp_path: Path) -> None:
    """Locks belong to open files, so two objects stand for two processes."""
    sizes = [shard.size_bytes for shard in open_cache(url).manifest.shards]
    bound = 2 * max(sizes) + 9000
    one, other = (open_remote(url, tmp_path / "store", bound) for _ in range(2))
    paths = [shard.path for shard in shards_of(one) if shard.view == 0]
    held = [copies_of(one).open(path) for path in paths[:2]]
    with pytest.raises(StorageError, match=r"2 files are in use\)"):
        copies_of(other).open(paths[2])
    waiting = threading.Timer(0.1, held[0].close)
    waiting.start()
    copies_of(other).open(paths[2]).close()
    assert present(tmp_path / "store") == ["00001.parquet", "00002.parquet"]
    held[1].seek(0)
    assert len(held[1].read()) == shards_of(one)[2].size_bytes
    one.close()
    other.close()


def test_a_file_is_downloaded_once_for_all(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    real = fetch._attempt

    def counted(source: Any, facts: Any, *rest: Any) -> Any:
        fetched.append(facts.path)
        time.sleep(0.02)
        return real(source, facts, *rest)

    monkeypatch.setattr(fetch, "_attempt", counted)
    caches = [open_remote(url, tmp_path / "store") for _ in range(3)]
    paths = [shard.path for shard in shards_of(caches[0])]
    threads = [
        threading.Thread(target=lambda c=cache: [copies_of(c).open(p).close() for p in paths])
        for cache in caches
        for _ in range(2)
    ]
    for cache in caches:
        copies_of(cache).keep(paths)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fetched) == sorted(paths)
    for cache in caches:
        cache.close()


def test_leftovers_of_killed_processes_are_swept(url: str, tmp_path: Path) -> None:
    cache = open_remote(url, tmp_path / "store")
    path = tmp_path / "store" / cache.identity / "data/view-00/.00003.parquet.part"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    mine = tmp_path / "store" / "thesis.part"
    mine.write_bytes(b"not theirs")
    with copies_of(cache).folder.part_of(
        tmp_path / "store" / cache.identity / "data/view-00/00004.parquet", threading.Event()
    ) as part:
        assert part is not None
        open_remote(url, tmp_path / "store").close()
        assert Path(part.name).exists(), "a download under way"
    assert not path.exists()
    assert mine.exists()
    cache.close()


def test_closing_ends_whoever_waits(url: str, tmp_path: Path) -> None:
    cache = open_remote(url, tmp_path / "store", retries=1000)
    shard = shards_of(cache)[0]
    write_remote(url, shard.path, b"never right")
    heard: list[str] = []

    def read() -> None:
        with pytest.raises(StorageError) as caught:
            cache.read_rows(0, [0])
        heard.append(caught.value.message)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.1)
    began_s = time.monotonic()
    cache.close()
    thread.join(10)
    assert heard == [f"{url}: closed while being read"]
    assert time.monotonic() - began_s < 5
    wait_until(lambda: not [t for t in copies_of(cache)._threads if t.is_alive()])


def test_a_folder_that_cannot_be_used_is_named(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=r"file/store: cannot keep copies here: .*local_store"):
        open_remote(url, tmp_path / "file/store")


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TIDE_CACHE_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert LocalStoreConfig().root == tmp_path / "tide-cache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert LocalStoreConfig().root == Path.home() / ".cache/tide-cache"
    monkeypatch.setenv("TIDE_CACHE_HOME", str(tmp_path / "own"))
    assert LocalStoreConfig().root == tmp_path / "own"
    assert LocalStoreConfig(folder="~/x").root == Path.home() / "x"
    assert LocalStoreConfig().max_bytes == 50 * 10**9
