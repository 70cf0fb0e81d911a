"""Levels of `verify`, its processes, and how it goes on after a kill."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.builders import command, command_environment, run_command
from tests.cache_builders import SetShape
from tests.payload_caches import PAYLOADS, make_cache
from tests.set_builders import write_premasked
from tests.support import PROJECT_ROOT
from tests.unit.test_verify import edit_manifest
from tide_cache.errors import ConfigError
from tide_cache.store import Store
from tide_cache.verify import verify_set


@pytest.mark.parametrize("kind", PAYLOADS)
def test_every_payload_is_sound_on_every_level(tmp_path: Path, kind: str) -> None:
    manifest = make_cache(tmp_path / "cache", kind).manifest
    store = Store(tmp_path / "cache")
    for level in ("manifest", "files", "deep"):
        report = verify_set(store, level=level)  # type: ignore[arg-type]
        assert report.ok, report.problems
        assert report.num_rows == manifest.counts["num_rows"]
        assert report.size_bytes == manifest.counts["size_bytes"]
    entries = "num_active_chunks" if kind == "chunks" else "num_payload_positions"
    assert report.num_payload_entries == manifest.counts[entries] > 0


def test_each_level_finds_what_it_reads(tmp_path: Path) -> None:
    write_premasked(tmp_path)
    shard = tmp_path / "data/view-01/00000.parquet"
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    store = Store(tmp_path)
    assert verify_set(store, level="manifest").ok
    (problem,) = verify_set(store, level="files").problems
    assert problem.startswith("shard data/view-01/00000.parquet: sha256 mismatch")


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("num_rows", "manifest"),
        ("num_samples", "manifest"),
        ("size_bytes", "manifest"),
        ("num_positions", "deep"),
        ("num_masked_positions", "deep"),
        ("num_payload_positions", "deep"),
    ],
)
def test_wrong_counts_are_found(tmp_path: Path, name: str, level: Any) -> None:
    right = make_cache(tmp_path / "cache", "raw").manifest.counts[name]
    edit_manifest(tmp_path / "cache", lambda values: values["counts"].update({name: right + 1}))
    problems = verify_set(Store(tmp_path / "cache"), level=level).problems
    assert problems == [f"counts.{name}: expected {right}, got {right + 1}"]


def test_a_header_that_is_not_the_shards_is_found(tmp_path: Path) -> None:
    """Also where the manifest has a value and the shard's header says nothing of it."""
    make_cache(tmp_path / "cache", "raw")
    fidelity = {
        "setting": "claimed", "tail": "mean", "student": "nobody", "num_positions": 1,
        "bytes_per_position": 1.0, "target": 0.99,
        "losses": [{"loss": "kl", "weight": None, "temperature": 1.0, "cosine": 1.0,
                    "relative_error": 0.0}],
    }  # fmt: skip
    edit_manifest(tmp_path / "cache", lambda values: values.update(fidelity=[fidelity]))
    problems = verify_set(Store(tmp_path / "cache")).problems
    assert len(problems) == 4
    assert all("belongs to another set (differing: fidelity)" in p for p in problems)


def test_processes_find_what_one_finds(tmp_path: Path) -> None:
    write_premasked(tmp_path, num_tasks=3)
    (tmp_path / "data/view-01/00001.parquet").write_bytes(b"PAR1")
    (tmp_path / "data/view-00/00002.parquet").unlink()
    store = Store(tmp_path)
    one, three = verify_set(store), verify_set(store, num_workers=3)
    assert len(one.problems) == 2
    assert three.as_json() == one.as_json()


def test_a_killed_verify_goes_on(tmp_path: Path) -> None:
    """Killed for good in the middle, then run again: the shards that were done are not read."""
    shape = SetShape(num_samples=400, samples_per_task=4)
    make_cache(tmp_path / "cache", "ranked", shape)
    state = tmp_path / "verify.jsonl"
    arguments = ("verify", tmp_path / "cache", "--resume", state, "--workers", "2", "--json")
    process = subprocess.Popen(
        command(*arguments), cwd=PROJECT_ROOT, env=command_environment(), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not state.exists() or state.read_bytes().count(b"\n") < 10:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    num_done = state.read_bytes().count(b"\n") - 1
    assert 9 <= num_done < 200
    with state.open("ab") as file:
        file.write(b'{"path": "data/view-0')  # as if the kill had come in the middle of a line
    again = run_command(*arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    report = json.loads(again.stdout)
    assert report["num_shards_resumed"] == num_done
    assert report["num_shards"] == 200
    assert report["num_payload_entries"] > 0
    assert not state.exists()
    whole = verify_set(Store(tmp_path / "cache")).as_json()
    assert {**report, "num_shards_resumed": 0} == whole


def test_what_is_resumed_holds_for_the_very_files(tmp_path: Path) -> None:
    write_premasked(tmp_path / "set")
    store, state = Store(tmp_path / "set"), tmp_path / "state.jsonl"
    bad, good = (tmp_path / f"set/data/view-00/0000{n}.parquet" for n in (0, 1))
    right = bad.read_bytes()
    bad.write_bytes(right[:-1])
    assert len(verify_set(store, resume=state).problems) == 1
    # The one that was good is spoilt now; the one that was bad is repaired.
    bad.write_bytes(right)
    data = bytearray(good.read_bytes())
    data[100] ^= 1
    good.write_bytes(data)
    report = verify_set(store, resume=state)
    assert report.num_shards_resumed == 2
    (problem,) = report.problems
    assert problem.startswith("shard data/view-00/00001.parquet: sha256 mismatch")
    # What was found good by its hash alone is not found good in depth.
    write_premasked(tmp_path / "other")
    other, state = Store(tmp_path / "other"), tmp_path / "other.jsonl"
    (tmp_path / "other/README.md").write_text("changed")
    assert verify_set(other, level="files", resume=state).num_shards_resumed == 0
    assert verify_set(other, level="deep", resume=state).num_shards_resumed == 0
    assert verify_set(other, level="files", resume=state).num_shards_resumed == 4


def test_the_resume_file_of_another_set_is_refused(tmp_path: Path) -> None:
    write_premasked(tmp_path / "one")
    write_premasked(tmp_path / "two", num_tasks=1)
    (tmp_path / "one/README.md").unlink()
    state = tmp_path / "state.jsonl"
    verify_set(Store(tmp_path / "one"), resume=state)
    with pytest.raises(ConfigError, match="not the resume file of this set"):
        verify_set(Store(tmp_path / "two"), resume=state)
    state.write_text("my thesis\n")
    with pytest.raises(ConfigError, match="not the resume file of this set"):
        verify_set(Store(tmp_path / "one"), resume=state)
    assert state.read_text() == "my thesis\n"
