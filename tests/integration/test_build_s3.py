"""Builds straight to a bucket: a real S3 protocol server on loopback, and competing writers."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.build_grounds import BuildGround
from tests.builders import command, command_environment, run_command
from tests.s3_servers import s3_server
from tide_cache.store import Store
from tide_cache.verify import verify_set

BUCKET = "lab"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with s3_server(BUCKET, tmp_path_factory.mktemp("s3") / "server.log"):
        yield


def test_of_many_writers_of_a_file_one_wins_and_its_bytes_stay(server: None) -> None:
    """Also above 50 MB, where the client uploads in parts."""
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        for number, size in enumerate([10, 1000, 10, 1000, 10, 60 * 2**20]):
            jobs = [pool.submit(publish, f"race/{number}", writer, size) for writer in range(4)]
            won = [job.result() for job in jobs]
            assert sum(won) == 1
            found = Store(f"s3://{BUCKET}").read_bytes(f"race/{number}")
            assert found == bytes([won.index(True)]) * size


def publish(path: str, writer: int, size: int) -> bool:
    return Store(f"s3://{BUCKET}").publish(path, bytes([writer]) * size)


def test_a_file_that_another_writer_made_is_seen_at_once(server: None) -> None:
    mine, other = Store(f"s3://{BUCKET}/seen"), Store(f"s3://{BUCKET}/seen")
    assert mine.publish("a", b"1")
    assert mine.list_files() == ["a"]
    assert not mine.exists("b")
    other._fs.pipe_file(other.path("b"), b"2")
    assert mine.exists("b")
    assert mine.list_files() == ["a", "b"]
    assert mine.read_many(["a", "b", "c"]) == [b"1", b"2"]
    assert len(mine.modified()) == 2


def test_what_another_removes_at_the_same_time_is_removed(
    server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{BUCKET}/swept"
    store = Store(url)
    store.publish("_build/one", b"1")
    seen: list[bool] = []

    def exists(relative: str) -> bool:
        """Between the look and the removal another writer sweeps."""
        seen.append(Store.exists(store, relative))
        Store(url)._fs.rm(store.path("_build/one"))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(store, "exists", lambda relative: exists(relative) if not seen else False)
        store.remove("_build")
    assert seen == [True]
    assert not store.exists("_build")


def test_two_builds_into_one_bucket_lose_nothing(
    server: None, build_ground: BuildGround, tmp_path: Path
) -> None:
    """Both begin with the same task at the same time; each would do them all."""
    premasked, output = f"s3://{BUCKET}/premasked", f"s3://{BUCKET}/cache"
    upload(build_ground.premasked, premasked)
    arguments = build_ground.arguments(output, premasked=premasked)
    events = [tmp_path / f"{index}.jsonl" for index in range(2)]
    processes = [
        subprocess.Popen(
            command(*arguments, "--workers", "1", "--events", str(log)),
            env=command_environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for log in events
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
    assert all("task_done" in log.read_text() for log in events), "both had a part in it"
    assert download(output) == build_ground.files
    report = verify_set(Store(output))
    assert report.ok, report.problems
    told = run_command("status", output, "--json")
    assert '"state": "finished"' in told.stdout


def upload(folder: Path, url: str) -> None:
    store = Store(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            assert store.publish(str(path.relative_to(folder)), path.read_bytes())


def download(url: str) -> dict[str, bytes]:
    store = Store(url)
    return {path: store.read_bytes(path) for path in store.list_files()}
