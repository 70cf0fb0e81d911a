"""`verify` and `inspect`, through the real command: exit codes, problems by name, JSON."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.set_builders import premasked_header, random_row, write_premasked
from tide_cache.cache import open_cache
from tide_cache.rows import rows_to_table
from tide_cache.store import Store
from tide_cache.verify import verify_set
from tide_cache.writer import SetWriter


def command(*arguments: str | Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tide_cache", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def edit_manifest(folder: Path, edit: Any) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def test_a_sound_set_and_its_summary(tmp_path: Path) -> None:
    manifest = write_premasked(tmp_path)
    code, out, _ = command("verify", tmp_path, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["ok"]
    assert (report["num_shards"], report["num_rows"]) == (4, 20)
    code, out, _ = command("inspect", tmp_path, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["identity"] == report["identity"]
    assert facts["dropped"] == {"empty_reply": 1}
    assert facts["counts"] == manifest.counts
    code, out, _ = command("inspect", tmp_path)
    assert code == 0
    assert "empty_reply 1" in out


def test_exit_codes_and_texts_of_the_command(tmp_path: Path) -> None:
    code, _, err = command("verify", tmp_path / "none")
    assert code == 2
    assert "no manifest.json" in err
    write_premasked(tmp_path / "set")
    shard = tmp_path / "set/data/view-00/00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    code, out, _ = command("verify", tmp_path / "set")
    assert code == 1
    assert "data/view-00/00001.parquet: size: expected" in out


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    write_premasked(tmp_path)
    shard = tmp_path / "data/view-01/00000.parquet"
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    (problem,) = verify_set(Store(tmp_path)).problems
    assert problem.startswith("shard data/view-01/00000.parquet: sha256 mismatch (expected ")


def test_exchanged_shards_are_found_even_with_matching_hashes(tmp_path: Path) -> None:
    write_premasked(tmp_path)
    one, two = tmp_path / "data/view-00/00000.parquet", tmp_path / "data/view-01/00000.parquet"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)

    def swap(values: dict[str, Any]) -> None:
        a, b = values["shards"][0], values["shards"][1]
        for key in ("sha256", "size_bytes"):
            a[key], b[key] = b[key], a[key]

    edit_manifest(tmp_path, swap)
    problems = verify_set(Store(tmp_path)).problems
    assert any("holds task 0 view 1: shards were exchanged" in problem for problem in problems)


def test_extra_and_missing_files_are_found(tmp_path: Path) -> None:
    write_premasked(tmp_path)
    (tmp_path / "data/view-00/extra.parquet").write_bytes(b"x")
    (tmp_path / "data/view-01/00001.parquet").unlink()
    problems = "\n".join(verify_set(Store(tmp_path)).problems)
    assert "data/view-00/extra.parquet: not in the manifest" in problems
    assert "data/view-01/00001.parquet: " in problems
    assert "no such file" in problems


def test_a_hostile_row_behind_right_hashes_is_found(tmp_path: Path) -> None:
    row = random_row(0, 0)
    hostile = dataclasses.replace(row, student_ids_L=np.full(12, 4000, dtype=np.int32))
    writer = SetWriter(Store(tmp_path), premasked_header(num_views=1))
    writer.begin()
    writer.publish_task(
        0, [rows_to_table([hostile], "positions")], counts={"num_rows": 1}, dropped={}
    )
    writer.finish([0])
    (problem,) = verify_set(Store(tmp_path)).problems
    assert "student_ids: expected ids in 0..39, got 4000" in problem


def test_another_sound_set_is_told_by_its_identity(tmp_path: Path) -> None:
    write_premasked(tmp_path / "set")
    meant = open_cache(tmp_path / "set").identity
    assert command("verify", tmp_path / "set", "--identity", meant.upper())[0] == 0
    # What was dropped stands in the manifest alone: all hashes stay right, and the set is sound.
    edit_manifest(tmp_path / "set", lambda values: values["dropped"].update(empty_reply=7))
    assert command("verify", tmp_path / "set")[0] == 0
    code, out, _ = command("verify", tmp_path / "set", "--identity", meant)
    assert code == 1
    assert f"identity: expected {meant}" in out


def test_a_sample_that_occurs_twice_is_found(tmp_path: Path) -> None:
    writer = SetWriter(Store(tmp_path), premasked_header(num_views=1))
    writer.begin()
    for task in (0, 1):
        table = rows_to_table([random_row(0, 0)], "positions")
        writer.publish_task(task, [table], counts={"num_rows": 1}, dropped={})
    writer.finish([0, 1])
    assert verify_set(Store(tmp_path)).problems == ["1 samples occur twice"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "other", "not a tide-cache manifest"),
        ("format_version", 9, "format_version: this program reads 1, 2 and 3, got 9"),
        ("kind", "parcel", "kind: expected premasked or cache"),
        ("num_views", 0, "num_views"),
        ("surprise", 1, "surprise"),
    ],
)
def test_a_manifest_that_is_not_sound_is_refused(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    write_premasked(tmp_path)
    edit_manifest(tmp_path, lambda values: values.update({key: value}))
    code, out, _ = command("verify", tmp_path, "--json")
    assert code == 2
    assert message in json.loads(out)["problems"][0]


@pytest.mark.parametrize(
    "path", ["../secret.parquet", "/etc/passwd", "data/view-00/../../x.parquet", "s3://b/x.parquet"]
)
def test_a_manifest_cannot_name_a_path_outside(tmp_path: Path, path: str) -> None:
    write_premasked(tmp_path)
    edit_manifest(tmp_path, lambda values: values["shards"][0].update(path=path))
    code, _, err = command("verify", tmp_path)
    assert code == 2
    assert "data/view-NN/NNNNN.parquet" in err
