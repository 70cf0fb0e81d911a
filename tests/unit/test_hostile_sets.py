"""A set from a stranger can do no more than be refused: paths, sizes, numbers, names."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.builders import command_environment, run_command
from tests.hostile_parquet import declare_page_bytes, rehash, rewrite_shard
from tests.payload_caches import make_cache
from tests.set_builders import premasked_header, random_row, write_premasked
from tests.support import PROJECT_ROOT
from tests.unit.test_verify import edit_manifest
from tide_cache.cache import open_cache
from tide_cache.errors import FormatError, StorageError, TideError, printable
from tide_cache.rows import rows_to_table
from tide_cache.shards import METADATA_KEY, read_shard, table_bytes
from tide_cache.store import Store
from tide_cache.verify import verify_set
from tide_cache.writer import SetWriter

SHARD = "data/view-00/00000.parquet"
GIB = 1 << 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_premasked(tmp_path / "set")
    return tmp_path / "set"


def within(memory_bytes: int, code: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that may take no more address space than that."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({memory_bytes},) * 2)\n"
    return subprocess.run(
        [sys.executable, "-c", limit + code],
        cwd=PROJECT_ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


# Paths


@pytest.mark.parametrize("relative", [SHARD, "README.md", "data/view-00", "manifest.json"])
def test_a_link_is_not_followed(folder: Path, tmp_path: Path, relative: str) -> None:
    """Whatever it points to, an honest copy of the very file included."""
    outside = tmp_path / "outside"
    (folder / relative).rename(outside)
    (folder / relative).symlink_to(outside)
    done = run_command("verify", folder)
    assert done.returncode in (1, 2)
    assert "a symbolic link, which sets have none of" in done.stdout + done.stderr
    with pytest.raises(StorageError, match="a symbolic link"):
        open_cache(folder).read_rows(0, [0])
        Store(folder).read_bytes(relative)


def test_a_set_may_itself_be_reached_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert verify_set(Store(tmp_path / "link")).ok


def test_a_pipe_does_not_hang(folder: Path) -> None:
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    done = run_command("verify", folder, timeout_s=60)
    assert done.returncode == 1
    assert f"{SHARD}: not a file" in done.stdout


def test_folders_that_hold_themselves_are_listed_once(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / "data" / name).symlink_to("..")
    problems = verify_set(Store(folder)).problems
    assert problems == ["file data/a: not in the manifest", "file data/b: not in the manifest"]


# The manifest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        ('{"format": NaN}', "not JSON: NaN"),
        ('{"format": 1e999}', "not JSON"),
        ('{"format": "\\ud800"}', "not JSON"),
        ('{"format": ' + "9" * 5000 + "}", "not JSON"),
        ("\x00", "not JSON"),
        ("[]", "not a tide-cache manifest"),
    ],
)
def test_json_that_is_none_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "manifest.json").write_text(text)
    for name in ("verify", "inspect", "status"):
        done = run_command(name, folder)
        assert done.returncode in (1, 2)
        assert message in done.stderr + done.stdout
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("value", [float("inf"), "\ud800"])
def test_values_that_have_no_canonical_form_are_refused(folder: Path, value: object) -> None:
    edit_manifest(folder, lambda values: values["provenance"].update(extra=value))
    with pytest.raises(FormatError, match="not JSON"):
        open_cache(folder)


HUGE = 10**30


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("block_size",), 1 << 40),
        (("student", "vocab_size"), 1 << 40),
        (("student", "mask_token_id"), HUGE),
        (("teacher", "pad_token_id"), 1 << 24),
        (("num_views",), HUGE),
        (("shards", 0, "num_rows"), HUGE),
        (("shards", 0, "num_rows"), 0),
        (("shards", 0, "size_bytes"), HUGE),
        (("counts", "num_rows"), HUGE),
        (("dropped", "empty_reply"), HUGE),
        (("payloads", 0, "temperatures"), [1e-300, 2.0]),
        (("payloads", 0, "k"), 40),
        (("payloads", 0, "vocab_size"), 40),
        (("payloads", 1, "num_wide"), 10),
        (("payloads", 1, "bands"), [2, 3, 4, 5]),
        (("payloads", 1, "bands"), [HUGE]),
        (("payloads", 1, "vocab_size"), 38),
        (("payloads", 1, "step"), 1e300),
        (("payloads", 1, "hidden_size"), HUGE),
        (("teacher_model", "mask_token_id"), HUGE),
        (("alignment",), "chunks"),
        (("kind",), []),
        (("kind",), {}),
        (("format_version",), [2]),
        (("payloads", 0, "codec"), []),
        (("payloads", 0, "name"), {}),
        (("payloads", 0), []),
        (("payloads",), {}),
        (("shards", 0, "path"), "data/view-\u0660\u0660/00000.parquet"),
    ],
)
def test_numbers_out_of_bounds_are_refused(tmp_path: Path, path: Any, value: object) -> None:
    make_cache(tmp_path / "cache", "hidden")

    def edit(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    edit_manifest(tmp_path / "cache", edit)
    with pytest.raises(FormatError, match=f"{path[0]}|{path[-1]}|payload"):
        open_cache(tmp_path / "cache")


def test_rows_that_a_file_cannot_hold_are_refused(folder: Path) -> None:
    """A loader makes room for every row before it reads one."""

    def many(values: Any, size_bytes: int) -> None:
        for shard in values["shards"]:
            shard.update(num_rows=1 << 30, size_bytes=size_bytes)

    edit_manifest(folder, lambda values: many(values, 5000))
    with pytest.raises(FormatError, match="1073741824 rows in 5000 bytes"):
        open_cache(folder)
    edit_manifest(folder, lambda values: many(values, 1 << 30))
    with pytest.raises(FormatError, match=r"expected 1073741824 rows in 1073741824 bytes, got"):
        open_cache(folder).row_group_sizes  # noqa: B018


def test_a_manifest_of_a_gigabyte_is_not_read(folder: Path) -> None:
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(3 * GIB)  # takes no room on the disk
    code = f"from tide_cache import open_cache; open_cache({str(folder)!r})"
    done = within(2 * GIB, code)
    assert "FormatError" in done.stderr
    assert "expected at most 536870912 bytes" in done.stderr


def test_names_do_not_reach_the_terminal_as_commands(folder: Path) -> None:
    def edit(values: Any) -> None:
        values["student"]["name"] = "\x1b[2J\x1b]0;owned\x07"
        values["provenance"] = {}

    edit_manifest(folder, edit)
    done = run_command("inspect", folder)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "\\x1b[2J" in done.stdout
    assert printable("Ä ü\n\u202e") == "Ä ü\n\\u202e"


# Shards


def spoil_shard(folder: Path, table: pa.Table, **options: Any) -> None:
    rewrite_shard(folder / SHARD, table, **options)
    rehash(folder)


def test_another_schema_is_refused_before_it_is_read(folder: Path) -> None:
    table = read_shard(Store(folder), SHARD)
    at = table.schema.get_field_index("student_ids")
    other = table["student_ids"].cast(pa.large_list(pa.int64()))
    spoil_shard(folder, table.set_column(at, "student_ids", other))
    with pytest.raises(FormatError, match="schema: expected"):
        open_cache(folder).read_rows(0, [0])
    assert "schema: expected" in verify_set(Store(folder)).problems[0]


@pytest.mark.parametrize("stamp", [b"[" * 100_000, b'{"header": []}', b"\xff", b"null"])
def test_a_stamp_that_is_none_is_refused(folder: Path, stamp: bytes) -> None:
    table = read_shard(Store(folder), SHARD).replace_schema_metadata({METADATA_KEY: stamp})
    (folder / SHARD).write_bytes(table_bytes(table))
    rehash(folder)
    assert "no tide_cache metadata" in verify_set(Store(folder)).problems[0]


def test_other_row_groups_are_refused(folder: Path) -> None:
    table = read_shard(Store(folder), SHARD)
    metadata = {"row_group_size": 2}
    sink = pa.BufferOutputStream()
    import pyarrow.parquet as pq

    kept = pq.read_schema(folder / SHARD).metadata
    pq.write_table(table.replace_schema_metadata(kept), sink, **metadata)
    (folder / SHARD).write_bytes(sink.getvalue().to_pybytes())
    rehash(folder)
    with pytest.raises(FormatError, match="groups of 256"):
        open_cache(folder).read_rows(0, [0])
    assert "expected row groups of 256 rows, got [2, 2, 1]" in verify_set(Store(folder)).problems[0]


def bomb(kind: str) -> tuple[str, Any, dict[str, Any]]:
    """A column of five rows that takes gigabytes, in a few kilobytes of Parquet."""
    ids = pa.list_(pa.field("element", pa.int32(), nullable=False))
    if kind == "a list of equal numbers":
        num = 1 << 26
        offsets = pa.array(np.arange(6) * num, pa.int32())
        values = pa.array(np.zeros(5 * num, np.int32))
        return "student_ids", pa.ListArray.from_arrays(offsets, values, type=ids), {}
    size = 200 << 20
    if kind == "zeros":
        return "half_a", pa.array([bytes(size)] * 5, pa.binary()), {"use_dictionary": False}
    assert kind == "one value for all"
    return "source", pa.array(["x" * (60 << 20)] * 5), {"use_dictionary": ["source"]}


@pytest.mark.parametrize("kind", ["a list of equal numbers", "zeros", "one value for all"])
def test_a_decompression_bomb_is_refused_before_it_goes_off(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "set"
    write_premasked(folder)
    table = read_shard(Store(folder), SHARD)
    name, values, options = bomb(kind)
    at = table.schema.get_field_index(name)
    table = table.set_column(at, table.schema.field(at), values)
    spoil_shard(folder, table, compression="zstd", **options)
    del table, values
    assert (folder / SHARD).stat().st_size < 1 << 20
    code = (
        "from tide_cache.store import Store; from tide_cache.verify import verify_set\n"
        "from tide_cache.cache import open_cache\n"
        f"print(verify_set(Store({str(folder)!r})).problems)\n"
        f"open_cache({str(folder)!r}).read_rows(0, [0])"
    )
    done = within(2 * GIB, code)
    assert "damaged data (row group 0: expected at most" in done.stdout
    assert "FormatError" in done.stderr
    assert "bytes when decoded, its pages declare" in done.stderr


def test_a_page_that_declares_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    """The size that a decompressor would allocate, in the header of a page."""
    folder = tmp_path / "set"
    write_premasked(folder)
    table = read_shard(Store(folder), SHARD)
    at = table.schema.get_field_index("half_a")
    table = table.set_column(
        at, table.schema.field(at), pa.array([bytes(5 << 20)] * 5, pa.binary())
    )
    data = rewrite_shard(folder / SHARD, table, compression="zstd", use_dictionary=False)
    (folder / SHARD).write_bytes(declare_page_bytes(data, "half_a", (1 << 27) - 1))
    rehash(folder)
    with pytest.raises(FormatError, match="its pages declare 1342"):
        open_cache(folder).read_rows(0, [0])


def test_chunks_that_overlap_are_refused_before_they_make_positions(tmp_path: Path) -> None:
    """A thousand chunks of a thousand tokens each would be a million positions of one row."""
    from stage2_student.aligned_rows import chunk_tokens, decode_chunks
    from stage2_student.batches import decode_rows

    num = 1 << 12
    row = dataclasses.replace(
        random_row(0, 0, length=num, prompt_length=0),
        student_mask_L=np.ones(num, bool),
        half_a_L=np.zeros(num, bool),
        alignment_RX=np.array([[0, num, 0, 1]] * 100_000, np.int32),
    )
    table = rows_to_table([row], "chunks")
    noised = decode_rows(table, num_ids=40)
    with pytest.raises(FormatError, match="chunks: entries out of order"):
        chunk_tokens(decode_chunks(table, noised), noised)


def test_a_sequence_beyond_the_format_is_refused(tmp_path: Path) -> None:
    from stage2_student.batches import decode_rows

    num = (1 << 20) + 1
    ids = np.full(num, 2, np.int32)
    row = dataclasses.replace(
        random_row(0, 0, length=12),
        student_ids_L=ids,
        teacher_ids_L=ids,
        student_mask_L=np.zeros(num, bool),
        half_a_L=np.zeros(num, bool),
    )
    table = rows_to_table([row], "positions")
    with pytest.raises(FormatError, match="more than 1048576 ids"):
        decode_rows(table, num_ids=40)
    writer = SetWriter(Store(tmp_path / "set"), premasked_header(num_views=1))
    writer.begin()
    writer.publish_task(0, [table], counts={"num_rows": 1}, dropped={})
    writer.finish([0])
    (problem,) = verify_set(Store(tmp_path / "set")).problems
    assert "student_ids: expected 1..2^20 ids" in problem


def test_every_error_is_ours(folder: Path) -> None:
    """Whatever stands where the folder should be."""
    for url in (folder / SHARD, folder / "none", "/dev/null", "/dev/zero"):
        with pytest.raises(TideError):
            open_cache(url)


def test_the_honest_estimate_is_no_less_than_what_is_decoded(tmp_path: Path) -> None:
    from tide_cache import parquet_pages
    from tide_cache.shards import open_shard

    make_cache(tmp_path / "cache", "hidden")
    store = Store(tmp_path / "cache")
    with open_shard(store, SHARD) as shard:
        group = shard.metadata.row_group(0)
        estimate = sum(
            parquet_pages._decoded_bytes(
                shard.file, (tmp_path / "cache" / SHARD).stat().st_size, group.column(i), "x"
            )
            for i in range(shard.metadata.num_columns)
        )
    decoded = read_shard(store, SHARD).nbytes
    assert decoded <= estimate < 10 * decoded


def test_json_reports_are_json(folder: Path) -> None:
    edit_manifest(folder, lambda values: values["student"].update(name="\x1b[2J"))
    for name in ("verify", "inspect"):
        json.loads(run_command(name, folder, "--json").stdout)
