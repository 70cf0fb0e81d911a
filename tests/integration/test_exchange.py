"""Push and pull through real servers on loopback: what is sent and kept, kills at any moment."""

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from stage2_student import cli
from tests.builders import (
    all_files,
    assert_same_files,
    command,
    command_environment,
    run_command,
    write_yaml,
)
from tests.cache_builders import (
    SetShape,
    Workshop,
    make_workshop,
    numbered_from,
    write_cache,
    write_premasked,
)
from tests.http_servers import WebServer, web_server
from tests.s3_servers import s3_server
from tests.support import PROJECT_ROOT
from tide_cache.cache import open_cache
from tide_cache.errors import CompatibilityError, ConfigError, FormatError, StorageError, TideError
from tide_cache.manifest import CacheManifest, Manifest
from tide_cache.merge import merge, plan_merge
from tide_cache.part import plan_part, pull_part
from tide_cache.set_files import SIGNATURE, read_set_files
from tide_cache.store import Store
from tide_cache.targets import FolderTarget, open_target
from tide_cache.transfer import TransferPlan, plan_transfer, transfer
from tide_cache.verify import verify_set

BUCKET = "lab"
SHARD = "data/view-01/00001.parquet"
SHAPE = SetShape(num_samples=60, num_views=3, samples_per_task=10)
PAYLOADS = ("candidates", "chunks")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    return make_workshop(folder, SHAPE, mean_logits=True, payloads=PAYLOADS)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(BUCKET, tmp_path_factory.mktemp("s3") / "server.log"):
        yield f"s3://{BUCKET}"


@pytest.fixture
def server(workshop: Workshop, tmp_path: Path) -> Iterator[WebServer]:
    with web_server(workshop.cache, tmp_path / "requests.log") as server:
        yield server


def send(source: Path | str, target: Path | str, *, replace: bool = False) -> TransferPlan:
    store = Store(source)
    place = open_target(str(target))
    plan = plan_transfer(read_set_files(store), place)
    transfer(store, place, plan, replace=replace)
    return plan


def fetched(url: str) -> dict[str, bytes]:
    store = Store(url)
    return {path: store.read_bytes(path) for path in store.list_files()}


def test_a_bucket_gets_the_same_bytes_and_gives_them_back(
    workshop: Workshop, bucket: str, tmp_path: Path
) -> None:
    url = f"{bucket}/round"
    done = run_command("push", workshop.cache, url, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["bytes_to_send"] == told["size_bytes"] == size_of(workshop.cache)
    assert fetched(url) == all_files(workshop.cache)
    assert verify_set(Store(url)).ok
    done = run_command("pull", url, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert_same_files(tmp_path / "cache", workshop.cache)
    done = run_command("push", workshop.cache, url)
    assert "nothing to do, the set is there" in done.stdout
    assert send(workshop.cache, url).bytes_to_send == 0


def size_of(folder: Path) -> int:
    return sum(map(len, all_files(folder).values()))


def test_objects_without_a_manifest_are_known_by_their_metadata(
    workshop: Workshop, bucket: str
) -> None:
    """A push that was killed before its manifest: nothing is read back, nothing sent twice."""
    url = f"{bucket}/begun"
    send(workshop.cache, url)
    store = Store(url)
    store.remove("manifest.json")
    plan = send(workshop.cache, url)
    assert (len(plan.to_send), plan.different) == (0, ())
    assert store.exists("manifest.json")
    # Bytes of the same size that somebody else put there are found, and not overwritten unasked.
    store.remove("manifest.json")
    store._fs.pipe_file(store.path(SHARD), bytes(store.size_bytes(SHARD)))
    with pytest.raises(CompatibilityError, match=rf"1 files would be overwritten .*{SHARD}"):
        send(workshop.cache, url)
    assert not store.exists("manifest.json")
    assert len(send(workshop.cache, url, replace=True).to_send) == 1
    assert fetched(url) == all_files(workshop.cache)


@pytest.mark.parametrize("num_files", [1, 4, 9, 17])
def test_a_killed_push_goes_on(
    workshop: Workshop, bucket: str, tmp_path: Path, num_files: int
) -> None:
    url = f"{bucket}/killed-{num_files}"
    arguments = ("push", workshop.cache, url)
    kill_when(arguments, lambda: len(Store(url).list_files()) >= num_files)
    before = fetched(url)
    assert all(data == all_files(workshop.cache)[path] for path, data in before.items())
    plan = send(workshop.cache, url)
    assert len(plan.present) >= len(before.keys() - {"manifest.json"})
    assert fetched(url) == all_files(workshop.cache)


@pytest.mark.parametrize("kind", ["http", "s3"])
@pytest.mark.parametrize("num_files", [1, 5, 12])
def test_a_killed_pull_goes_on(
    workshop: Workshop,
    bucket: str,
    server: WebServer,
    tmp_path: Path,
    kind: str,
    num_files: int,
) -> None:
    url = server.url
    if kind == "s3":
        url = f"{bucket}/pulled"
        send(workshop.cache, url)
    folder = tmp_path / "cache"
    kill_when(("pull", url, folder), lambda: len(list(folder.rglob("*.*"))) >= num_files)
    if not (folder / "manifest.json").exists():
        with pytest.raises(StorageError, match=r"no manifest\.json"):
            open_cache(folder)
    done = run_command("pull", url, folder)
    assert done.returncode == 0, done.stderr
    assert_same_files(folder, workshop.cache)
    report = verify_set(Store(folder))
    assert report.ok, report.problems


@pytest.mark.slow
def test_push_pull_verify_train_killed_at_random(
    workshop: Workshop, bucket: str, tmp_path: Path
) -> None:
    """Through S3, and from there through a web server, whatever moment a kill comes at."""
    seed = time.time_ns()
    print(f"seed {seed}")
    draw = random.Random(seed)
    url = f"{bucket}/random"
    run_in_pieces(("push", workshop.cache, url), draw)
    assert fetched(url) == all_files(workshop.cache)
    run_in_pieces(("pull", url, tmp_path / "from-s3"), draw)
    assert_same_files(tmp_path / "from-s3", workshop.cache)
    with web_server(tmp_path / "from-s3", tmp_path / "requests.log") as server:
        run_in_pieces(("pull", server.url, tmp_path / "from-http"), draw)
    losses = []
    for cache in (workshop.cache, tmp_path / "from-http"):
        assert run_command("verify", cache).returncode == 0
        output = tmp_path / f"run-{len(losses)}"
        values = workshop.config(output=str(output), max_steps=8, checkpoints={"every": 20})
        cli.train(write_yaml(tmp_path / "c.yaml", values), [str(cache)], resume="never")
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]


def run_in_pieces(arguments: tuple[str | Path, ...], draw: random.Random) -> None:
    """Run a command again and again, killed at random moments, and once to its end."""
    for _ in range(6):
        moment_s = time.monotonic() + draw.uniform(0.3, 3.0)
        kill_when(arguments, partial(is_past, moment_s))
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr


def is_past(moment_s: float) -> bool:
    return time.monotonic() > moment_s


def kill_when(arguments: tuple[str | Path, ...], is_time: Callable[[], bool]) -> None:
    """Start a command and kill it at a moment, or let it end where that never comes."""
    process = subprocess.Popen(
        command(*arguments), env=command_environment(), cwd=PROJECT_ROOT, stderr=subprocess.PIPE
    )
    deadline_s = time.monotonic() + 120
    while process.poll() is None and not is_time() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)


def test_what_is_there_is_not_fetched_again_and_what_is_damaged_is(
    workshop: Workshop, server: WebServer, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    send(server.url, folder)
    (folder / SHARD).write_bytes(b"damaged" + (folder / SHARD).read_bytes()[7:])
    (folder / "data/view-00/00002.parquet").unlink()
    num_before = len(server.requests())
    with pytest.raises(CompatibilityError, match="--replace to put this set in its stead"):
        send(server.url, folder)
    plan = send(server.url, folder, replace=True)
    assert [facts.path for facts in plan.different] == [SHARD]
    asked = [path for path in server.requests()[num_before:] if path.startswith("data/")]
    assert sorted(asked) == ["data/view-00/00002.parquet", SHARD]
    assert_same_files(folder, workshop.cache)


@pytest.mark.parametrize("fault", ["flip", "cut"])
def test_bytes_that_are_not_the_listed_ones_are_never_kept(
    workshop: Workshop, server: WebServer, tmp_path: Path, fault: str
) -> None:
    server.misbehave(SHARD, fault, times=1)
    send(server.url, tmp_path / "once")
    server.behave()
    assert_same_files(tmp_path / "once", workshop.cache)
    server.misbehave(SHARD, fault)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises((FormatError, StorageError), match=rf"{SHARD}: .*\(5 tries\)"),
    ):
        patch.setattr("tide_cache.fetch._FIRST_DELAY_S", 0.001)
        send(server.url, tmp_path / "always")
    server.behave()
    kept = all_files(tmp_path / "always")
    assert SHARD not in kept
    assert "manifest.json" not in kept
    assert all(data == all_files(workshop.cache)[path] for path, data in kept.items())
    send(server.url, tmp_path / "always")
    assert_same_files(tmp_path / "always", workshop.cache)


def test_large_files_are_sent_from_the_disk(
    workshop: Workshop, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tide_cache.targets._WHOLE_BYTES", 0)
    url = f"{bucket}/large"
    send(workshop.cache, url)
    assert fetched(url) == all_files(workshop.cache)
    store = Store(url)
    sha256 = store._fs.metadata(store.path(SHARD))["sha256"]
    assert sha256 == store.sha256(SHARD)
    shutil.copytree(workshop.cache, tmp_path / "bad")
    shard = tmp_path / "bad" / SHARD
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(FormatError, match=rf"{SHARD}: sha256 mismatch"):
        send(tmp_path / "bad", f"{bucket}/bad-large")
    assert not Store(f"{bucket}/bad-large").exists(SHARD)


def test_a_damaged_set_is_not_pushed(workshop: Workshop, bucket: str, tmp_path: Path) -> None:
    shutil.copytree(workshop.cache, tmp_path / "bad")
    shard = tmp_path / "bad" / SHARD
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    done = run_command("push", tmp_path / "bad", f"{bucket}/bad")
    assert done.returncode == 1
    assert f"{SHARD}: sha256 mismatch" in done.stderr
    assert not Store(f"{bucket}/bad").exists("manifest.json")
    assert not Store(f"{bucket}/bad").exists(SHARD)


def test_a_set_that_grew_by_a_hundredth_is_sent_by_a_hundredth(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = SetShape(num_samples=3000, samples_per_task=100)
    base = make_workshop(tmp_path / "base", shape, payloads=("candidates",))
    few = SetShape(num_samples=30, samples_per_task=100)
    write_premasked(tmp_path / "few-premasked", base.tokenizer, few, change=numbered_from(100_000))
    write_cache(tmp_path / "few", tmp_path / "few-premasked", payloads=("candidates",))
    merge(plan_merge([str(base.cache), str(tmp_path / "few")]), Store(tmp_path / "grown"))
    url = f"{bucket}/grown"
    first = send(base.cache, url)
    again = send(tmp_path / "grown", url)
    assert again.overwrites == []
    assert [f.path for f in again.different] == ["README.md"]
    assert fetched(url) == all_files(tmp_path / "grown")
    assert verify_set(Store(url)).ok
    share = again.bytes_to_send / again.files.size_bytes
    with capsys.disabled():
        print(
            f"\n1% more rows: {again.bytes_to_send:,} of {again.files.size_bytes:,} bytes sent "
            f"({share:.1%}; manifest and card {again.bytes_to_send - added(again):,}), "
            f"{first.bytes_to_send:,} at first"
        )
    assert len(again.absent) == again.files.manifest.num_views
    assert share < 0.03, "with all that a shard, the card and the manifest say of the set"
    # And who has pulled it before fetches as little.
    send(url, tmp_path / "here")
    assert_same_files(tmp_path / "here", tmp_path / "grown")


def added(plan: TransferPlan) -> int:
    return sum(facts.size_bytes for facts in plan.absent)


def test_another_set_is_not_overwritten_unless_asked(
    workshop: Workshop, bucket: str, tmp_path: Path
) -> None:
    url = f"{bucket}/other"
    send(workshop.premasked, url)
    done = run_command("push", workshop.cache, url, "--dry-run")
    assert done.returncode == 0
    assert "another set's data/view-00/00000.parquet is in the way" in done.stdout
    done = run_command("push", workshop.cache, url)
    assert done.returncode == 1
    assert "holds another set: 18 files would be overwritten" in done.stderr
    assert fetched(url) == all_files(workshop.premasked)
    done = run_command("push", workshop.cache, url, "--replace")
    assert done.returncode == 0, done.stderr
    assert fetched(url) == all_files(workshop.cache)
    # The other way round, files are left over: the codec's.
    send(workshop.premasked, url, replace=True)
    assert fetched(url) == all_files(workshop.premasked)


@pytest.mark.parametrize("kind", ["bucket", "folder"])
def test_a_replacing_that_was_killed_leaves_nothing_of_the_old_set(
    workshop: Workshop, bucket: str, tmp_path: Path, kind: str
) -> None:
    """The manifest goes first: what else there was is then known by where it lies alone."""
    url = f"{bucket}/replaced" if kind == "bucket" else str(tmp_path / "replaced")
    send(workshop.cache, url)
    Store(url).remove("manifest.json")
    if kind == "folder":
        (tmp_path / "replaced/mine.tmp").write_text("mine")
        (tmp_path / f"replaced/data/.x.{'0' * 32}.tmp").write_text("of a killed transfer")
    with pytest.raises(CompatibilityError, match="holds another set"):
        send(workshop.premasked, url)
    send(workshop.premasked, url, replace=True)
    kept = fetched(url)
    assert kept.pop("mine.tmp", b"mine") == b"mine"
    assert kept == all_files(workshop.premasked)
    report = verify_set(Store(url))
    assert report.ok, report.problems


def test_where_a_set_is_being_made_nothing_is_put(workshop: Workshop, tmp_path: Path) -> None:
    Store(tmp_path / "busy").publish("_build/header.json", b"{}")
    with pytest.raises(CompatibilityError, match="a set is being made there"):
        send(workshop.cache, tmp_path / "busy")


def test_a_signature_goes_along_and_an_old_one_goes(workshop: Workshop, tmp_path: Path) -> None:
    shutil.copytree(workshop.cache, tmp_path / "signed")
    (tmp_path / "signed" / SIGNATURE).write_bytes(b"signature")
    send(tmp_path / "signed", tmp_path / "copy")
    assert_same_files(tmp_path / "copy", tmp_path / "signed")
    plan = send(workshop.cache, tmp_path / "copy")
    assert (plan.is_finished, plan.to_send) == (False, [])
    assert_same_files(tmp_path / "copy", workshop.cache)


def test_a_dry_run_writes_nothing(workshop: Workshop, bucket: str, tmp_path: Path) -> None:
    done = run_command("push", workshop.cache, f"{bucket}/dry", "--dry-run", "--json")
    assert json.loads(done.stdout)["num_to_send"] == 20
    assert fetched(f"{bucket}/dry") == {}
    for more in ((), ("--views", "0,2")):
        done = run_command("pull", workshop.cache, tmp_path / "dry", "--dry-run", *more)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "dry").exists()


def test_web_servers_and_passwords(workshop: Workshop, tmp_path: Path) -> None:
    done = run_command("push", workshop.cache, "https://me:secret@localhost/cache")
    assert done.returncode == 1
    assert "https://***@localhost/cache: cannot be written to, only read" in done.stderr
    done = run_command("pull", "http://me:secret@127.0.0.1:9/cache", tmp_path / "x")
    assert done.returncode == 1
    assert "secret" not in done.stderr + done.stdout
    done = run_command("pull", workshop.cache, "s3://bucket/x")
    assert "expected a folder on this machine" in done.stderr


def part(source: str | Path, folder: Path, **chosen: list[int] | list[str]) -> Manifest:
    store = Store(source)
    plan = plan_part(
        open_cache(source).manifest,
        views=chosen.get("views"),  # type: ignore[arg-type]
        payloads=chosen.get("payloads"),  # type: ignore[arg-type]
    )
    return pull_part(plan, store, Store(folder))


def test_the_first_views_are_taken_over_byte_for_byte(
    workshop: Workshop, server: WebServer, tmp_path: Path
) -> None:
    manifest = part(server.url, tmp_path / "part", views=[0, 1])
    whole = open_cache(workshop.cache)
    assert (manifest.num_views, manifest.format_version) == (2, 3)
    (origin,) = manifest.origins
    assert (origin.relation, origin.identity, origin.views) == ("part", whole.identity, (0, 1))
    files = all_files(tmp_path / "part")
    shards = {path: data for path, data in files.items() if path.startswith("data/")}
    assert len(shards) == 12
    assert shards == {path: all_files(workshop.cache)[path] for path in shards}
    assert not [path for path in server.requests() if "view-02" in path]
    report = verify_set(Store(tmp_path / "part"))
    assert report.ok, report.problems
    assert report.num_rows == manifest.counts["num_rows"] == 120


def test_other_views_are_numbered_anew(workshop: Workshop, tmp_path: Path) -> None:
    part(workshop.cache, tmp_path / "part", views=[2, 0])
    ours, whole = open_cache(tmp_path / "part"), open_cache(workshop.cache)
    assert verify_set(Store(tmp_path / "part")).ok
    rows = range(whole.num_samples)
    for view, old in ((0, 2), (1, 0)):
        mine, theirs = ours.read_rows(view, rows), whole.read_rows(old, rows)
        assert set(mine["view"].to_pylist()) == {view}
        assert mine.drop_columns(["view"]).equals(theirs.drop_columns(["view"]))


def test_a_payload_alone(workshop: Workshop, tmp_path: Path) -> None:
    manifest = part(workshop.cache, tmp_path / "part", payloads=["chunks"])
    assert isinstance(manifest, CacheManifest)
    assert [facts.name for facts in manifest.payloads] == ["chunks"]
    assert [facts.path for facts in manifest.files] == ["README.md"], "no codec file is needed"
    assert verify_set(Store(tmp_path / "part")).ok
    ours, whole = open_cache(tmp_path / "part"), open_cache(workshop.cache)
    mine = ours.read_rows(1, [0, 5, 59])
    assert "cand_ids" not in mine.column_names
    assert mine.equals(whole.read_rows(1, [0, 5, 59]).select(mine.column_names))


def test_a_part_of_a_merged_set_of_parts(workshop: Workshop, tmp_path: Path) -> None:
    """Every shard that was never rewritten still proves where it comes from."""
    write_premasked(tmp_path / "more-p", workshop.tokenizer, SHAPE, change=numbered_from(1000))
    write_cache(tmp_path / "more", tmp_path / "more-p", mean_logits=True, payloads=PAYLOADS)
    merge(plan_merge([str(workshop.cache), str(tmp_path / "more")]), Store(tmp_path / "both"))
    manifest = part(tmp_path / "both", tmp_path / "part", views=[0, 1])
    assert [origin.relation for origin in manifest.origins] == ["merged", "merged", "part"]
    report = verify_set(Store(tmp_path / "part"))
    assert report.ok, report.problems
    shard = "data/view-01/00003.parquet"
    assert (tmp_path / "part" / shard).read_bytes() == (workshop.cache / shard).read_bytes()


def test_a_part_trains_and_reads_its_views_alone(
    workshop: Workshop, server: WebServer, tmp_path: Path
) -> None:
    """Push, pull a part, verify, train: the losses are those of the whole's views."""
    losses = []
    for name, views, cache in (
        ("whole", 3, str(workshop.cache)),
        ("part", 2, str(tmp_path / "part-cache")),
    ):
        if name == "part":
            done = run_command(
                "pull", server.url, cache, "--views", "0,1", "--payload", "candidates"
            )
            assert done.returncode == 0, done.stderr
            assert run_command("verify", cache).returncode == 0
        config = write_yaml(
            tmp_path / f"{name}.yaml",
            workshop.config(output=str(tmp_path / name), max_steps=14, checkpoints={"every": 20}),
        )
        cli.train(config, cache, json_output=True, resume="never")
        assert open_cache(cache).num_views == views
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1], "two epochs of 7 steps, of view 0 and view 1"
    assert len(losses[0]) == 14


@pytest.mark.parametrize("num_tasks", [0, 2, 5])
def test_a_killed_part_goes_on(
    workshop: Workshop, server: WebServer, tmp_path: Path, num_tasks: int
) -> None:
    part(server.url, tmp_path / "straight", views=[1, 2])
    folder = tmp_path / "killed"
    arguments = ("pull", server.url, folder, "--views", "1,2")
    kill_when(
        arguments,
        lambda: (
            (folder / "_build/header.json").exists()
            and len(list(folder.glob("_build/tasks/*.json"))) >= num_tasks
        ),
    )
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    assert_same_files(folder, tmp_path / "straight")
    done = run_command("pull", server.url, folder, "--views", "0,2")
    assert done.returncode == 1
    assert "holds another set; differing: config.part_of" in done.stderr


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"views": []}, "views: expected some, each once"),
        ({"views": [1, 1]}, "views: expected some, each once"),
        ({"views": [3]}, r"views: expected numbers in 0\.\.2, got 3"),
        ({"payloads": ["chunk"]}, r"got 'chunk' \(did you mean 'chunks'\?\)"),
        ({"payloads": ["hidden"]}, "expected some of candidates, chunks, got 'hidden'"),
    ],
)
def test_a_part_that_there_is_not(
    workshop: Workshop, chosen: dict[str, list[int]], message: str
) -> None:
    manifest = open_cache(workshop.cache).manifest
    with pytest.raises(ConfigError, match=message):
        plan_part(manifest, views=chosen.get("views"), payloads=chosen.get("payloads"))  # type: ignore[arg-type]
    with pytest.raises(TideError, match="a premasked set has none"):
        plan_part(open_cache(workshop.premasked).manifest, views=None, payloads=["chunks"])


def test_a_folder_is_believed_nothing(workshop: Workshop, tmp_path: Path) -> None:
    send(workshop.cache, tmp_path / "cache")
    shard = tmp_path / "cache" / SHARD
    shard.write_bytes(bytes(shard.stat().st_size))
    files = read_set_files(Store(workshop.cache))
    facts = next(facts for facts in files.listed if facts.path == SHARD)
    assert FolderTarget(Store(tmp_path / "cache")).has(facts, facts.sha256) is False
