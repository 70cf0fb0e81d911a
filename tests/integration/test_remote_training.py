"""Training from a bucket or a web server is training from disk, to the bit, or an error by name.

Real servers on loopback in processes of their own: moto for S3, tests.http_servers for the rest.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stage2_student.config import TrainConfig
from stage2_student.metrics import MEASURED_KEYS, read_metrics
from stage2_student.plan import describe, open_run
from stage2_student.trainer import TrainSummary, train
from tests.cache_builders import SetShape, Workshop, make_workshop
from tests.http_servers import WebServer, web_server
from tests.s3_servers import s3_server
from tests.support import PROJECT_ROOT
from tests.unit.test_local_copies import present, size_of
from tide_cache import fetch, store
from tide_cache.cache import open_cache
from tide_cache.errors import FormatError, StorageError
from tide_cache.local_copies import LocalStoreConfig
from tide_cache.store import Store

SHAPE = SetShape(num_samples=96, samples_per_task=8, max_blocks=6)
NUM_SHARDS = 12  # of a view
STREAM = {"batch_size": 8, "groups_per_window": 1, "shards_per_pool": 4, "prefetch": 1}
STEPS = 24  # two epochs, one of each view
BUCKET = "lab"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("workshop"), SHAPE, mean_logits=True)


@pytest.fixture(scope="module")
def straight(workshop: Workshop) -> Path:
    """The output of the run from disk, with one thread, as the processes of this file have."""
    torch.set_num_threads(1)
    run(workshop, workshop.folder / "straight", workshop.cache)
    return workshop.folder / "straight"


@pytest.fixture
def server(workshop: Workshop, tmp_path: Path) -> Iterator[WebServer]:
    with web_server(workshop.cache, tmp_path / "requests.log") as server:
        yield server


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_FIRST_DELAY_S", 0.1)


def settings_of(output: Path, **local_store: Any) -> dict[str, Any]:
    return {
        "output": str(output),
        "max_steps": STEPS,
        "stream": STREAM,
        "local_store": {"folder": str(output.parent / "store"), **local_store},
    }


def run(
    workshop: Workshop, output: Path, cache: object, progress: Any = None, **local_store: Any
) -> TrainSummary:
    config = workshop.config(**settings_of(output, **local_store))
    return train(TrainConfig.model_validate(config), str(cache), progress=progress)


def losses_of(output: Path) -> list[dict[str, Any]]:
    lines = read_metrics(output / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in MEASURED_KEYS} for line in lines]


def expect_same(output: Path, straight: Path) -> None:
    assert len(losses_of(straight)) == STEPS
    assert losses_of(output) == losses_of(straight)
    left, right = (load_file(p / "final/model.safetensors") for p in (output, straight))
    assert all(left[name].equal(right[name]) for name in left)


def least_gb(workshop: Workshop, url: str, tmp_path: Path) -> float:
    config = TrainConfig.model_validate(workshop.config(**settings_of(tmp_path / "plan")))
    run = open_run(config, url)
    least: float = describe(run)["local_store"]["least_gb"]
    run.close()
    return least


def shards_in(requests: list[str]) -> list[str]:
    return [path for path in requests if path.startswith("data/")]


@pytest.mark.parametrize("with_ranges", [True, False])
def test_a_web_server_gives_the_losses_of_the_disk(
    workshop: Workshop, straight: Path, tmp_path: Path, with_ranges: bool
) -> None:
    with web_server(workshop.cache, tmp_path / "log", with_ranges=with_ranges) as server:
        run(workshop, tmp_path / "run", server.url)
        expect_same(tmp_path / "run", straight)
        # By whole files, each once, codec files included.
        fetched = [path for path in server.requests() if path != "manifest.json"]
        assert sorted(fetched) == sorted(
            [s.path for s in open_cache(workshop.cache).manifest.shards]
            + ["codec/candidates.safetensors"]
        )
        # A second run finds them here.
        run(workshop, tmp_path / "again", server.url)
        expect_same(tmp_path / "again", straight)
        assert server.requests().count("manifest.json") == 2
        assert len(server.requests()) == len(fetched) + 2


def test_a_bucket_gives_the_losses_of_the_disk(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    with s3_server(BUCKET, tmp_path / "s3.log"):
        for name, folder in (("cache", workshop.cache), ("held-out", workshop.premasked)):
            upload(folder, f"s3://{BUCKET}/{name}")
        run(workshop, tmp_path / "run", f"s3://{BUCKET}/cache")
        expect_same(tmp_path / "run", straight)
        # Held-out sets may be remote too.
        settings = settings_of(tmp_path / "evaluated")
        settings["evaluation"] = {"cache": f"s3://{BUCKET}/held-out"}
        config = TrainConfig.model_validate(workshop.config(**settings))
        summary = train(config, f"s3://{BUCKET}/cache")
        settings |= {"output": str(tmp_path / "beside"), "checkpoints": {"every": 50}}
        settings["evaluation"] = {"cache": str(workshop.premasked)}
        config = TrainConfig.model_validate(workshop.config(**settings))
        assert summary.evaluation == train(config, workshop.cache).evaluation


def upload(folder: Path, url: str) -> None:
    store = Store(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            assert store.publish(str(path.relative_to(folder)), path.read_bytes())


@pytest.mark.parametrize("fault", ["flip", "cut"])
def test_a_bad_transfer_is_survived(
    workshop: Workshop, straight: Path, server: WebServer, tmp_path: Path, fault: str
) -> None:
    bad = "data/view-00/00007.parquet"
    server.misbehave(bad, fault, times=2)
    run(workshop, tmp_path / "run", server.url)
    expect_same(tmp_path / "run", straight)
    assert server.requests().count(bad) == 3


def test_a_server_that_falls_silent_is_survived(
    workshop: Workshop,
    straight: Path,
    server: WebServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "_SILENCE_S", 0.5)
    server.misbehave("data/view-00/00002.parquet", "stall", times=1)
    run(workshop, tmp_path / "run", server.url)
    expect_same(tmp_path / "run", straight)


def test_a_bucket_that_goes_away_is_named(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with s3_server(BUCKET, tmp_path / "s3.log"):
        upload(workshop.cache, f"s3://{BUCKET}/gone")
        local = LocalStoreConfig(folder=str(tmp_path / "store"), retries=0)
        cache = open_cache(f"s3://{BUCKET}/gone", local=local)
        cache.read_rows(0, [0])
    with pytest.raises(StorageError, match=rf"^s3://{BUCKET}/gone/data/.*: cannot read: "):
        cache.read_rows(1, [0])
    cache.close()


def test_a_file_that_stays_bad_is_named(
    workshop: Workshop, straight: Path, server: WebServer, tmp_path: Path
) -> None:
    bad = "data/view-01/00003.parquet"
    server.misbehave(bad, "flip")
    sha256 = next(s.sha256 for s in open_cache(workshop.cache).manifest.shards if s.path == bad)
    with pytest.raises(
        FormatError,
        match=rf"^{server.url}/{bad}: sha256 mismatch \(expected {sha256[:12]}…, got "
        rf"[0-9a-f]{{12}}…\) \(2 tries\); run 'tide-cache verify {server.url}'$",
    ):
        run(workshop, tmp_path / "run", server.url, retries=1)
    # It was trained up to the step that needs it, and goes on from there once it is right.
    assert 12 <= len(losses_of(tmp_path / "run")) < STEPS
    assert not list((tmp_path / "store").rglob("*.part"))
    server.behave()
    assert run(workshop, tmp_path / "run", server.url).resumed_from_step >= 10
    expect_same(tmp_path / "run", straight)


@pytest.mark.parametrize("is_tight", [False, True])
def test_a_server_that_is_killed_in_the_middle_and_comes_back_is_survived(
    workshop: Workshop, straight: Path, server: WebServer, tmp_path: Path, is_tight: bool
) -> None:
    """Also while it should say whether copies that have to make room have originals."""
    room = {"max_gb": least_gb(workshop, server.url, tmp_path)} if is_tight else {}
    server.misbehave("data/view-01/00005.parquet", "die", times=1)

    def restart() -> None:
        assert server.process is not None
        assert server.process.wait() == -signal.SIGKILL
        server.behave()
        time.sleep(0.5)
        server.start()

    nurse = threading.Thread(target=restart)
    nurse.start()
    run(workshop, tmp_path / "run", server.url, retries=8, **room)
    nurse.join()
    expect_same(tmp_path / "run", straight)


def test_a_server_that_stays_away_is_named(
    workshop: Workshop, server: WebServer, tmp_path: Path
) -> None:
    dying = "data/view-01/00005.parquet"
    server.misbehave(dying, "die")
    with pytest.raises(
        StorageError, match=rf"^{server.url}/data/view-\d\d/\d+\.parquet: cannot read: .*\(2 tries"
    ):
        run(workshop, tmp_path / "run", server.url, retries=1)
    assert not list((tmp_path / "store").rglob("*.part"))
    # What does not answer from the beginning is not called empty.
    with pytest.raises(StorageError, match=rf"^{server.url}/manifest\.json: cannot read: .*onnect"):
        open_cache(server.url)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small tmpfs")
def test_a_full_disk_is_named_and_leaves_nothing(
    workshop: Workshop, straight: Path, server: WebServer, tmp_path: Path
) -> None:
    small = tmp_path / "store"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(small)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(
            StorageError,
            match=r"store/[0-9a-f]{64}/data/.*parquet: the disk is full \(needed \d+ bytes\); "
            r"nothing of this file was kept; free some space, or set local_store\.folder",
        ):
            run(workshop, tmp_path / "run", server.url)
        assert present(small)
        assert not list(small.rglob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        run(workshop, tmp_path / "run", server.url)
        expect_same(tmp_path / "run", straight)
    finally:
        subprocess.run(["umount", str(small)], check=True)


class FirstStep:
    """Remembers what had been asked for when the first step was done."""

    def __init__(self, server: WebServer) -> None:
        self._server = server
        self.requests: list[str] = []

    def start(self, first_step: int, max_steps: int) -> None: ...

    def update(self, steps_done: int, loss: float, tokens_per_s: float) -> None:
        if steps_done == 1:
            self.requests = self._server.requests()

    def close(self) -> None: ...


def test_within_the_least_bound_and_from_the_first_window_on(
    workshop: Workshop, straight: Path, server: WebServer, tmp_path: Path
) -> None:
    """The smallest store that is allowed: never exceeded, and training does not wait for all."""
    bound_gb = least_gb(workshop, server.url, tmp_path)
    whole = sum(shard.size_bytes for shard in open_cache(workshop.cache).manifest.shards)
    assert bound_gb * 1e9 < whole / 4
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(size_of(tmp_path / "store"))
            time.sleep(0.001)

    watcher, first = threading.Thread(target=watch), FirstStep(server)
    watcher.start()
    run(workshop, tmp_path / "run", server.url, progress=first, max_gb=bound_gb)
    done.set()
    watcher.join()
    expect_same(tmp_path / "run", straight)
    assert len(seen) > 20
    assert whole / 20 < max(seen) <= bound_gb * 1e9
    assert 1 <= len(set(shards_in(first.requests))) <= 6
    # Pools of four shards do not fit, so some came twice; none came without need.
    fetched = shards_in(server.requests())
    assert len(set(fetched)) == 2 * NUM_SHARDS
    assert len(present(tmp_path / "store")) < NUM_SHARDS


def test_a_shard_comes_once_an_epoch_where_two_pools_fit(
    workshop: Workshop, straight: Path, server: WebServer, tmp_path: Path
) -> None:
    shards = open_cache(workshop.cache).manifest.shards
    two_pools = 8 * max(shard.size_bytes for shard in shards) + 40_000
    run(workshop, tmp_path / "run", server.url, max_gb=two_pools / 1e9)
    expect_same(tmp_path / "run", straight)
    fetched = shards_in(server.requests())
    assert len(fetched) == len(set(fetched)) == 2 * NUM_SHARDS


def command(workshop: Workshop, url: object, *options: str, **settings: Any) -> list[str]:
    config = workshop.write_config(**settings)
    return ["-m", "stage2_student", str(config), "--cache", str(url), *options]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_command(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=PROJECT_ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_the_plan_says_what_will_be_fetched(
    workshop: Workshop, server: WebServer, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path / "run")
    done = run_command(command(workshop, server.url, "--dry-run", "--json", **settings))
    plan = json.loads(done.stdout)["local_store"]
    whole = sum(shard.size_bytes for shard in open_cache(workshop.cache).manifest.shards)
    assert plan["gb_to_fetch"] == pytest.approx(whole / 1e9, abs=1e-6)
    assert plan["fits"] is True
    assert plan["max_gb"] == 50
    assert not shards_in(server.requests())
    settings["local_store"]["max_gb"] = plan["least_gb"] - 1e-6
    done = run_command(command(workshop, server.url, **settings))
    assert done.returncode == 2
    told = f"local_store.max_gb: expected at least {plan['least_gb']:.6f} for the windows of row"
    assert told in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not shards_in(server.requests())


@pytest.mark.slow
def test_two_ranks_share_one_store(workshop: Workshop, server: WebServer, tmp_path: Path) -> None:
    """Together they fetch each shard once, and learn what two ranks learn from disk."""
    for name, url in (("disk", workshop.cache), ("remote", server.url)):
        settings = settings_of(tmp_path / name)
        arguments = command(workshop, url, "--json", **settings)
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = run_command([*ranks, *arguments])
        assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "remote") == losses_of(tmp_path / "disk")
    fetched = shards_in(server.requests())
    assert len(fetched) == len(set(fetched)) == 2 * NUM_SHARDS
    # And in the least room there may be, where each keeps what the other one uses.
    settings = settings_of(tmp_path / "tight", max_gb=least_gb(workshop, server.url, tmp_path))
    shutil.rmtree(tmp_path / "store")
    done = run_command([*ranks, *command(workshop, server.url, **settings)])
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "tight") == losses_of(tmp_path / "disk")


@pytest.mark.slow
def test_killed_and_resumed_with_other_workers(
    workshop: Workshop, straight: Path, server: WebServer, tmp_path: Path
) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    draw = random.Random(seed)
    settings = settings_of(tmp_path / "run", max_gb=least_gb(workshop, server.url, tmp_path))
    metrics = tmp_path / "run/metrics.jsonl"
    for workers, stop in ((3, draw.randint(1, 11)), (0, draw.randint(12, 22)), (1, None)):
        settings["stream"] = {**STREAM, "workers": workers}
        process = subprocess.Popen(
            [sys.executable, *command(workshop, server.url, **settings)],
            cwd=PROJECT_ROOT,
            env=ENVIRONMENT,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        while stop is not None and process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= stop:
                process.kill()
            time.sleep(0.001)
        assert process.wait() == (0 if stop is None else -signal.SIGKILL)
    expect_same(tmp_path / "run", straight)
    assert not list((tmp_path / "store").rglob("*.part"))


@pytest.mark.slow
def test_a_password_in_a_url_is_never_shown(
    workshop: Workshop, server: WebServer, tmp_path: Path
) -> None:
    url = server.url.replace("http://", "http://reader:hunter2@")
    settings = settings_of(tmp_path / "run")
    done = run_command(command(workshop, url, "--json", **settings))
    assert done.returncode == 0, done.stderr
    server.misbehave("data/view-00/00000.parquet", "flip")
    shutil.rmtree(tmp_path / "store")
    settings = settings_of(tmp_path / "again", retries=0)
    failed = run_command(command(workshop, url, **settings))
    assert failed.returncode == 1
    assert "http://***@127.0.0.1" in failed.stderr
    server.kill()
    gone = run_command(command(workshop, url, **settings))
    assert gone.returncode == 1
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for text in (done.stdout, done.stderr, failed.stderr, gone.stderr, str(written)):
        assert "hunter2" not in text
