"""Stores that are not on this disk: what is there, what is not, and who does not answer."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.cache_builders import SetShape, Workshop, make_workshop
from tests.http_servers import WebServer, web_server
from tests.support import PROJECT_ROOT
from tide_cache.cache import open_cache
from tide_cache.errors import ConfigError, MissingFileError, StorageError
from tide_cache.store import Store, without_password
from tide_cache.verify import verify_set

SHARD = "data/view-00/00001.parquet"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shape = SetShape(num_samples=40, samples_per_task=20)
    return make_workshop(tmp_path_factory.mktemp("workshop"), shape, mean_logits=True)


@pytest.fixture(params=["ranges", "whole files"])
def server(
    workshop: Workshop, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[WebServer]:
    with_ranges = request.param == "ranges"
    with web_server(workshop.cache, tmp_path / "log", with_ranges=with_ranges) as server:
        yield server


def test_a_set_behind_a_web_server_reads_and_verifies(
    workshop: Workshop, server: WebServer
) -> None:
    cache, local = open_cache(server.url), open_cache(workshop.cache)
    assert cache.identity == local.identity
    assert cache.copies is None
    rows = np.array([39, 0, 20])
    assert cache.read_rows(1, rows).equals(local.read_rows(1, rows))
    report = verify_set(Store(server.url))
    assert report.ok, report.problems
    assert report.num_rows == 80
    server.misbehave(SHARD, "flip")
    problems = verify_set(Store(server.url)).problems
    assert len(problems) == 1
    assert problems[0].startswith(f"shard {SHARD}: sha256 mismatch")


def test_missing_and_unreachable_are_told_apart(server: WebServer) -> None:
    store = Store(server.url)
    assert store.exists(SHARD)
    assert not store.exists("data/view-09/00000.parquet")
    assert store.list_files("data") == [], "this server shows no listings"
    for read in (store.size_bytes, store.open, store.read_bytes, store.sha256):
        with pytest.raises(MissingFileError, match=rf"^{server.url}/no/such: no such file$"):
            read("no/such")
    with pytest.raises(StorageError, match=r"no manifest\.json: not a cache"):
        open_cache(f"{server.url}/data")
    with pytest.raises(StorageError, match="cannot be written to, only read"):
        store.publish("new", b"data")
    server.kill()
    for read in (store.exists, store.size_bytes, store.open, store.read_bytes, store.sha256):
        with pytest.raises(StorageError, match=rf"^{server.url}/{SHARD}: cannot read: ") as caught:
            read(SHARD)
        assert not isinstance(caught.value, MissingFileError)


def test_a_stream_never_takes_much_more_than_the_listed_size(server: WebServer) -> None:
    store = Store(server.url)
    assert sum(map(len, store.blocks(SHARD, 1000))) == 1001


@pytest.mark.parametrize(
    ("package", "url", "extra"),
    [
        ("aiohttp", "https://example.invalid/cache", "http"),
        ("s3fs", "s3://bucket/cache", "s3"),
        ("huggingface_hub", "hf://datasets/who/what", "hub"),
    ],
)
def test_a_missing_package_is_one_line_with_the_command(package: str, url: str, extra: str) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['tide-cache', 'inspect', "
        f"{url!r}]; from tide_cache.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"error: {url}: {url.split(':')[0]}:// needs a package that is not installed" in (
        done.stderr
    )
    assert f"pip install 'tide-cache[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_kind_of_url_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^gopher://host/cache: .*gopher"):
        Store("gopher://host/cache")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host/a@b", "https://***@host/a@b"),
        ("https://token@host", "https://***@host"),
        ("https://host/a:b@c", "https://host/a:b@c"),
        ("cannot reach http://u:p@h:1/x, sorry", "cannot reach http://***@h:1/x, sorry"),
        ("s3://bucket/me@home", "s3://bucket/me@home"),
    ],
)
def test_passwords_are_left_out(text: str, shown: str) -> None:
    assert without_password(text) == shown
