"""`tide-cache pack` and `unpack` as processes, and archives that strangers made."""

import io
import json
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from tests.builders import (
    all_files,
    assert_same_files,
    command,
    command_environment,
    run_command,
)
from tests.cache_builders import SetShape, Workshop, make_workshop
from tests.http_servers import web_server
from tests.support import PROJECT_ROOT
from tide_cache.cache import open_cache
from tide_cache.errors import FormatError, TideError
from tide_cache.pack import pack, unpack
from tide_cache.set_files import SIGNATURE, read_set_files
from tide_cache.store import Store

Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shape = SetShape(num_samples=240, samples_per_task=80)
    return make_workshop(tmp_path_factory.mktemp("workshop"), shape, mean_logits=True)


def packed(folder: Path, **options: int) -> bytes:
    target = io.BytesIO()
    pack(Store(folder), read_set_files(Store(folder)), target, **options)
    return target.getvalue()


def members_of(archive: bytes) -> Members:
    plain = zstandard.ZstdDecompressor().stream_reader(archive).read()
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        return [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]


def archive_of(members: Members) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return zstandard.ZstdCompressor().compress(target.getvalue())


def test_there_and_back(workshop: Workshop, tmp_path: Path) -> None:
    done = run_command("pack", workshop.cache, "-o", tmp_path / "c.tar.zst", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["archive_bytes"] == (tmp_path / "c.tar.zst").stat().st_size
    done = run_command("unpack", tmp_path / "c.tar.zst", tmp_path / "deep/cache")
    assert done.returncode == 0, done.stderr
    assert_same_files(tmp_path / "deep/cache", workshop.cache)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["cache"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.tar.zst", "deep"]


def test_the_same_set_gives_the_same_bytes(workshop: Workshop, tmp_path: Path) -> None:
    first = packed(workshop.cache, num_threads=1)
    assert packed(workshop.cache, num_threads=4) == first
    unpack(io.BytesIO(first), tmp_path / "copy", where="here")
    assert packed(tmp_path / "copy", num_threads=2) == first
    assert members_of(first)[0][0].name == "manifest.json"
    for member, _ in members_of(first):
        assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644)


def test_large_inputs_give_the_same_bytes_with_any_number_of_threads(tmp_path: Path) -> None:
    """More than one job of the compressor, which is where threads could show."""
    store = Store(tmp_path)
    for name, data in (("a", bytes(range(256)) * 80_000), ("b", b"x" * 9_000_001)):
        store.publish(name, data)
    outputs = []
    for threads in (1, 2, 3):
        target = io.BytesIO()
        compressor = zstandard.ZstdCompressor(level=1, threads=threads, write_checksum=True)
        with compressor.stream_writer(target, closefd=False) as writer:
            for name in ("a", "b"):
                for block in store.blocks(name, store.size_bytes(name)):
                    writer.write(block)
        outputs.append(target.getvalue())
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_pipe_from_a_web_server(workshop: Workshop, tmp_path: Path) -> None:
    with web_server(workshop.cache, tmp_path / "log") as server:
        first = subprocess.Popen(
            command("pack", server.url, "-o", "-"),
            stdout=subprocess.PIPE,
            env=command_environment(),
            cwd=PROJECT_ROOT,
        )
        done = subprocess.run(
            command("unpack", "-", tmp_path / "cache", "--json"),
            stdin=first.stdout,
            env=command_environment(),
            cwd=PROJECT_ROOT,
            capture_output=True,
            check=False,
        )
    assert (first.wait(), done.returncode) == (0, 0), done.stderr
    assert json.loads(done.stdout)["identity"] == open_cache(workshop.cache).identity
    assert_same_files(tmp_path / "cache", workshop.cache)


def test_dry_runs_write_nothing_but_check(workshop: Workshop, tmp_path: Path) -> None:
    archive = tmp_path / "c.tar.zst"
    assert run_command("pack", workshop.cache, "-o", archive, "--dry-run").returncode == 0
    assert not archive.exists()
    archive.write_bytes(packed(workshop.cache)[:-100])
    done = run_command("unpack", archive, tmp_path / "cache", "--dry-run")
    assert done.returncode == 1
    assert "cut off in" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_what_is_there_is_left_alone(workshop: Workshop, tmp_path: Path) -> None:
    archive = packed(workshop.cache)
    unpack(io.BytesIO(archive), tmp_path / "cache", where="here")
    unpack(io.BytesIO(archive), tmp_path / "cache", where="here")
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(TideError, match="is not empty; name a folder that is not there yet"):
        unpack(io.BytesIO(archive), other, where="here")
    assert [p.name for p in other.iterdir()] == ["mine.txt"]
    (tmp_path / "c.tar.zst").write_bytes(b"mine")
    done = run_command("pack", workshop.cache, "-o", tmp_path / "c.tar.zst")
    assert (done.returncode, (tmp_path / "c.tar.zst").read_bytes()) == (2, b"mine")
    assert "exists already" in done.stderr


def test_a_signature_goes_along(workshop: Workshop, tmp_path: Path) -> None:
    unpack(io.BytesIO(packed(workshop.cache)), tmp_path / "signed", where="here")
    (tmp_path / "signed" / SIGNATURE).write_bytes(b"signature")
    archive = packed(tmp_path / "signed")
    unpack(io.BytesIO(archive), tmp_path / "copy", where="here")
    assert_same_files(tmp_path / "copy", tmp_path / "signed")


def named(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def replaced(members: Members, at: int, member: tarfile.TarInfo, data: bytes) -> Members:
    member.size = len(data) if member.isreg() else 0
    return [*members[:at], (member, data), *members[at + 1 :]]


HOSTILE: list[tuple[str, Callable[[Members], Members], str]] = [
    ("absolute", lambda m: replaced(m, 2, named("/tmp/evil"), b"x"), "got '/tmp/evil'"),
    ("dotdot", lambda m: replaced(m, 2, named("../evil"), b"x"), r"got '\.\./evil'"),
    ("symlink", lambda m: replaced(m, 2, named("data", tarfile.SYMTYPE, "/etc"), b""), "plain"),
    ("hard link", lambda m: replaced(m, 2, named("data", tarfile.LNKTYPE, "a"), b""), "plain"),
    ("device", lambda m: replaced(m, 2, named("data", tarfile.CHRTYPE), b""), "plain file"),
    ("folder", lambda m: replaced(m, 2, named("data", tarfile.DIRTYPE), b""), "plain file"),
    ("fifo", lambda m: replaced(m, 2, named("data", tarfile.FIFOTYPE), b""), "plain file"),
    ("long name", lambda m: replaced(m, 2, named("a" * 300), b"x"), "plain file"),
    ("extra", lambda m: [*m, (named("evil.txt"), b"")], "'evil.txt': not in the manifest"),
    ("missing", lambda m: m[:-1], "next, got the end"),
    ("twice", lambda m: [*m, m[-1]], "not in the manifest"),
    ("swapped", lambda m: [*m[:-2], m[-1], m[-2]], "next, got 'data/view"),
    ("no manifest", lambda m: m[1:], "expected manifest.json first"),
    ("short", lambda m: replaced(m, 2, named(m[2][0].name), m[2][1][:-1]), "bytes, got"),
    (
        "changed",
        lambda m: replaced(m, 2, named(m[2][0].name), m[2][1][:-1] + b"\x00"),
        "sha256 mismatch",
    ),
]


@pytest.mark.parametrize(("kind", "change", "message"), HOSTILE, ids=[h[0] for h in HOSTILE])
def test_a_hostile_archive_is_refused_and_leaves_nothing(
    workshop: Workshop,
    tmp_path: Path,
    kind: str,
    change: Callable[[Members], Members],
    message: str,
) -> None:
    archive = archive_of(change(members_of(packed(workshop.cache))))
    with pytest.raises(FormatError, match=message):
        unpack(io.BytesIO(archive), tmp_path / "deep/cache", where="here")
    assert list((tmp_path / "deep").iterdir()) == [] if (tmp_path / "deep").exists() else True
    assert list(tmp_path.rglob("evil*")) == []


def test_a_sound_archive_of_another_program_is_read(workshop: Workshop, tmp_path: Path) -> None:
    """The bound of the test above: what it changes is what is refused."""
    unpack(io.BytesIO(archive_of(members_of(packed(workshop.cache)))), tmp_path / "c", where="here")
    assert_same_files(tmp_path / "c", workshop.cache)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.95])
def test_an_archive_that_breaks_off_is_refused(
    workshop: Workshop, tmp_path: Path, share: float
) -> None:
    archive = packed(workshop.cache)
    with pytest.raises(FormatError, match=r"cut off in|not a sound zstd stream"):
        unpack(io.BytesIO(archive[: int(share * len(archive))]), tmp_path / "c", where="here")
    assert list(tmp_path.iterdir()) == []


def test_changed_bytes_anywhere_are_refused_or_mean_nothing(
    workshop: Workshop, tmp_path: Path
) -> None:
    """300 archives, each with a few bytes changed before compression or behind it."""
    random = np.random.default_rng(0)
    archive = packed(workshop.cache)
    plain = zstandard.ZstdDecompressor().stream_reader(archive).read()
    num_refused = 0
    for number in range(300):
        is_plain = number % 2 == 0
        data = bytearray(plain if is_plain else archive)
        # Every third time near a header, where there is most to get wrong.
        limit = 8192 if number % 3 == 0 else len(data)
        for at in random.integers(0, limit, 3):
            data[at] = random.integers(0, 256)
        changed = zstandard.ZstdCompressor(level=1).compress(bytes(data)) if is_plain else data
        target = tmp_path / str(number)
        try:
            unpack(io.BytesIO(bytes(changed)), target, where="here")
            assert_same_files(target, workshop.cache)
        except FormatError:
            num_refused += 1
            assert not target.exists()
    assert num_refused > 250
    assert len(list(tmp_path.iterdir())) == 300 - num_refused


def test_bytes_behind_the_end_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    plain = zstandard.ZstdDecompressor().stream_reader(packed(workshop.cache)).read()
    for rest in (b"x", bytes(2 << 20), b"\x00" * 600 + b"evil"):
        archive = zstandard.ZstdCompressor().compress(plain + rest)
        with pytest.raises(FormatError, match="bytes behind its end"):
            unpack(io.BytesIO(archive), tmp_path / "c", where="here")
    for text in (b"", b"PK not an archive at all", b"\x28\xb5\x2f\xfd broken"):
        with pytest.raises(FormatError):
            unpack(io.BytesIO(text), tmp_path / "c", where="here")


def test_headers_that_claim_too_much_take_no_memory(tmp_path: Path) -> None:
    """A manifest of 8 EB, and an extension record of as much, of which nothing is there."""
    for name, kind in (("manifest.json", tarfile.REGTYPE), ("x", tarfile.XHDTYPE)):
        member = named(name, kind)
        member.size = 8 << 60
        archive = zstandard.ZstdCompressor().compress(member.tobuf(tarfile.GNU_FORMAT))
        with pytest.raises(FormatError, match=r"more than 256 MiB|plain file"):
            unpack(io.BytesIO(archive), tmp_path / "c", where="here")


def test_a_damaged_set_is_not_packed(workshop: Workshop, tmp_path: Path) -> None:
    unpack(io.BytesIO(packed(workshop.cache)), tmp_path / "bad", where="here")
    shard = tmp_path / "bad/data/view-01/00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    done = run_command("pack", tmp_path / "bad", "-o", tmp_path / "c.tar.zst")
    assert done.returncode == 1
    assert "data/view-01/00001.parquet: sha256 mismatch" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]
    shard.write_bytes(shard.read_bytes() + b"more")
    with pytest.raises(FormatError, match="got more"):
        packed(tmp_path / "bad")


def test_after_a_kill_it_is_done_again_and_nothing_lies_about(
    workshop: Workshop, tmp_path: Path
) -> None:
    archive = packed(workshop.cache)
    process = subprocess.Popen(
        command("unpack", "-", tmp_path / "cache"),
        stdin=subprocess.PIPE,
        env=command_environment(),
        cwd=PROJECT_ROOT,
    )
    assert process.stdin is not None
    process.stdin.write(archive[:-10])  # the last block of the stream never comes
    process.stdin.flush()
    deadline_s = time.monotonic() + 60
    while not list(tmp_path.glob(".cache.unpacking/data")) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cache").exists()
    assert (tmp_path / ".cache.unpacking").exists(), "or the kill came too early to tell"
    unpack(io.BytesIO(archive), tmp_path / "cache", where="here")
    assert_same_files(tmp_path / "cache", workshop.cache)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    assert len(all_files(tmp_path / "cache")) == 9
