"""`tide-cache prepare` on real files: same bytes from any workers, after a kill, bad input."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stage1_teacher.premask import teacher_streams
from stage1_teacher.prepare import dry_run, make_plan, run_prepare
from stage1_teacher.prepare_config import PrepareConfig
from stage1_teacher.sources import sample_id
from tests.builders import (
    all_files,
    assert_same_files,
    chat,
    chat_rows,
    command,
    command_environment,
    make_tokenizer,
    run_command,
    write_chat_jsonl,
    write_yaml,
)
from tests.small_tokenizers import CHATML, PLAIN_TAGS
from tests.support import PROJECT_ROOT
from tide_cache.cache import open_cache
from tide_cache.config import load_config, parse_config
from tide_cache.errors import CompatibilityError, DataError
from tide_cache.manifest import Manifest, PremaskedManifest
from tide_cache.rows import PremaskedRow, row_schema, table_to_rows
from tide_cache.shards import read_shard
from tide_cache.store import Store
from tide_cache.verify import verify_set

BLOCK = 16


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # for child processes


def make_values(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A config over a JSONL of these rows and two templates of one small tokenizer."""
    data = write_chat_jsonl(folder / "chat.jsonl", rows)
    student = make_tokenizer(folder, template=CHATML, name="student")
    teacher = make_tokenizer(folder, template=PLAIN_TAGS, name="teacher")
    return {
        "sources": f"{data}[license:MIT]",
        "student": {"tokenizer": str(student), "max_length": 96},
        "teacher": {"tokenizer": str(teacher), "max_length": 96},
        "block_size": BLOCK,
        "seed": 11,
        "samples_per_shard": 16,
        **changes,
    }


def prepare(values: dict[str, Any], output: Path, *, num_workers: int = 1) -> Manifest:
    plan, encoder = make_plan(parse_config(values, PrepareConfig, where="test.yaml"))
    return run_prepare(plan, str(output), encoder=encoder, num_workers=num_workers)


def rows_of(folder: Path) -> Iterator[PremaskedRow]:
    cache = open_cache(str(folder))
    for view in range(cache.num_views):
        table = cache.read_rows(view, np.arange(cache.num_samples))
        yield from table_to_rows(table, cache.manifest.alignment)


class TestSameBytes:
    def test_one_or_three_workers_through_the_command(self, tmp_path: Path) -> None:
        config = write_yaml(tmp_path / "prepare.yaml", make_values(tmp_path, chat_rows(70)))
        for workers in (1, 3):
            done = run_command(
                "prepare", config, "-o", tmp_path / f"{workers}", "--workers", str(workers)
            )
            assert done.returncode == 0, done.stderr
        assert_same_files(tmp_path / "1", tmp_path / "3")
        one = all_files(tmp_path / "1")
        assert {"manifest.json", "README.md", "data/view-03/00004.parquet"} <= one.keys()
        assert not any(name.startswith("_build") for name in one)
        assert verify_set(Store(tmp_path / "1")).problems == []

    def test_identity_depends_on_what_is_in_it_alone(self, tmp_path: Path) -> None:
        values = make_values(tmp_path, chat_rows(20))
        a = prepare(values, tmp_path / "a")
        prepare(values, tmp_path / "b")
        assert_same_files(tmp_path / "a", tmp_path / "b")
        for change in ({"seed": 12}, {"demo_ratio": 0.4}, {"num_views": 2}):
            other = prepare({**values, **change}, tmp_path / "-".join(change))
            assert other.shards[0].sha256 != a.shards[0].sha256

    def test_masks_of_a_conversation_do_not_depend_on_the_others(self, tmp_path: Path) -> None:
        rows = chat_rows(24)
        prepare(make_values(tmp_path, rows), tmp_path / "all")
        few = {**make_values(tmp_path, rows[5:9]), "samples_per_shard": 3}
        prepare(few, tmp_path / "few")
        everything = {(r.sample_id, r.view): r for r in rows_of(tmp_path / "all")}
        num_rows = 0
        for row in rows_of(tmp_path / "few"):
            other = everything[row.sample_id, row.view]
            assert row.timestep == other.timestep
            np.testing.assert_array_equal(row.student_mask_L, other.student_mask_L)
            np.testing.assert_array_equal(row.half_a_L, other.half_a_L)
            num_rows += 1
        assert num_rows == 4 * 4


class TestKilledAndResumed:
    @pytest.mark.slow
    def test_killed_with_its_workers_then_run_again(self, tmp_path: Path) -> None:
        values = make_values(tmp_path, chat_rows(600), samples_per_shard=4)
        config = write_yaml(tmp_path / "prepare.yaml", values)
        output = tmp_path / "out"
        arguments = ("prepare", config, "-o", output, "--workers", "2")
        process = subprocess.Popen(
            command(*arguments),
            cwd=PROJECT_ROOT,
            env=command_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        tasks = output / "_build" / "tasks"
        wait_for(lambda: len(list(tasks.glob("*.json"))) >= 3 or process.poll() is not None)
        workers = workers_of(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        num_done = len(list(tasks.glob("*.json")))
        assert 3 <= num_done < 150, "not killed in the middle"
        assert not (output / "manifest.json").exists()
        # No worker is left to write into what the next run makes.
        assert workers
        wait_for(lambda: not any(is_running(pid) for pid in workers))

        resumed = run_command(*arguments, "--json")
        assert resumed.returncode == 0, resumed.stderr
        num_tasks = json.loads(resumed.stdout)["num_tasks"]
        assert num_tasks["kept"] >= num_done
        assert num_tasks["kept"] + num_tasks["made"] == 150
        assert "from an earlier run" in resumed.stderr
        prepare(values, tmp_path / "reference")
        assert_same_files(output, tmp_path / "reference")

        again = run_command(*arguments)
        assert again.returncode == 0, again.stderr
        assert "nothing to do: the set was complete already" in again.stdout

    def test_leftovers_of_a_crash_between_any_two_files(self, tmp_path: Path) -> None:
        """A shard without a record, a record without the manifest, a temporary file."""
        values = make_values(tmp_path, chat_rows(40))
        prepare(values, tmp_path / "reference")
        expected = all_files(tmp_path / "reference")
        for number, keep in enumerate((1, 3, 5)):
            output = tmp_path / f"out{number}"
            names = sorted(name for name in expected if name.startswith("data/"))[:keep]
            for name in names:
                (output / name).parent.mkdir(parents=True, exist_ok=True)
                (output / name).write_bytes(expected[name])
            (output / "data/view-00/.00000.parquet.123.tmp").write_bytes(b"half a sh")
            prepare(values, output)
            assert_same_files(output, tmp_path / "reference")

    def test_other_settings_are_refused_and_nothing_is_lost(self, tmp_path: Path) -> None:
        values = make_values(tmp_path, chat_rows(20))
        prepare(values, tmp_path / "out")
        before = all_files(tmp_path / "out")
        with pytest.raises(CompatibilityError, match=r"config\.seed, noising\.seed"):
            prepare({**values, "seed": 12}, tmp_path / "out")
        template = CHATML.replace("assistant", "helper")
        changed = {**values, "student": {**values["student"], "chat_template": template}}
        with pytest.raises(CompatibilityError, match=r"config\.student\.chat_template"):
            prepare(changed, tmp_path / "out")
        assert all_files(tmp_path / "out") == before


class TestContents:
    def test_every_row_of_real_templates(self, tmp_path: Path) -> None:
        rows = chat_rows(60, num_words=5)
        rows.append({"messages": chat("First?", "Yes, first.", "Second?", "No, second.")})
        manifest = prepare(make_values(tmp_path, rows), tmp_path / "out")
        assert isinstance(manifest, PremaskedManifest)
        assert manifest.noising.drawn
        texts = {sample_id(row["messages"]): row["messages"] for row in rows}
        plan, encoder = make_plan(
            parse_config(make_values(tmp_path, rows), PrepareConfig, where="test")
        )
        decode = encoder.student.tokenizer.decode
        strata: dict[str, set[int]] = {}
        num_masked = num_payload = 0
        for row in rows_of(tmp_path / "out"):
            messages = texts[row.sample_id]
            labelled = decode(row.student_ids_L[row.prompt_length :])
            assert labelled.startswith(messages[-1]["content"])
            assert messages[0]["content"] in decode(row.student_ids_L[: row.prompt_length])
            assert len(row.student_ids_L) % BLOCK == len(row.teacher_ids_L) % BLOCK == 0
            assert row.source == "chat.jsonl"
            strata.setdefault(row.sample_id, set()).add(int(row.timestep * 4))
            (stream,) = teacher_streams(row, comp_demo=False)
            teacher_ids = row.teacher_ids_L[stream.wanted_P]
            student_ids = row.student_ids_L[row.student_mask_L]
            assert len(set(teacher_ids) - set(student_ids)) == 0
            num_masked += int(row.student_mask_L.sum())
            num_payload += len(stream.wanted_P)
        assert all(len(met) == 4 for met in strata.values())
        counts = manifest.counts
        assert counts["num_samples"] == len(strata) == 61
        assert counts["num_rows"] == 244
        assert counts["num_masked_positions"] == num_masked
        assert counts["num_payload_positions"] == num_payload > 0
        assert plan.header.sources[0].licence == "MIT"

    def test_drops_are_counted_and_said(self, tmp_path: Path) -> None:
        rows = [
            *chat_rows(10, num_words=5),
            chat_rows(10, num_words=5)[4],  # a duplicate
            {"messages": chat("A question without an answer?")},
            {"messages": chat("Hello?", "   ")},
            {"messages": [{"role": "tool", "content": "x"}, *chat("a", "b")]},
            {"messages": chat("word " * 400, "The prompt is too long.")},
            {"messages": chat("Long reply?", "The answer is 12. " * 200)},
        ]
        values = make_values(tmp_path, rows)
        config = write_yaml(tmp_path / "prepare.yaml", values)
        done = run_command("prepare", config, "-o", tmp_path / "out", "--workers", "1")
        assert done.returncode == 0, done.stderr
        manifest = open_cache(str(tmp_path / "out")).manifest
        assert manifest.dropped == {
            "duplicate": 1,
            "no_assistant_turn": 1,
            "content_blank": 1,
            "unsupported_role": 1,
            "prompt_too_long": 1,
        }
        assert manifest.counts["num_truncated"] == 1
        assert manifest.counts["num_samples"] == 11
        assert manifest.counts["num_samples"] + sum(manifest.dropped.values()) == len(rows)
        for line in (
            "dropped   duplicate 1: the same conversation stands earlier in the data",
            "dropped   no_assistant_turn 1: no message of the assistant",
            "dropped   prompt_too_long 1: the prompt leaves no room for a reply within "
            "student.max_length",
            "note      replies cut at student.max_length: 1",
            "source    chat.jsonl: 12 of 16 rows, licence MIT",
        ):
            assert line in done.stdout
        assert "12 of 12 rows" in done.stderr
        assert "1 dropped" in done.stderr

    def test_task_whose_rows_are_all_dropped(self, tmp_path: Path) -> None:
        rows = [{"messages": chat(f"word {i} " * 200, "Too long.")} for i in range(9)]
        rows += chat_rows(2)
        manifest = prepare(make_values(tmp_path, rows, samples_per_shard=2), tmp_path / "out")
        assert manifest.counts["num_samples"] == 2
        assert manifest.dropped == {"prompt_too_long": 9}
        assert verify_set(Store(tmp_path / "out")).problems == []

    def test_two_tokenizers(self, tmp_path: Path) -> None:
        values = make_values(tmp_path, chat_rows(30), alignment="chunks")
        values["teacher"]["tokenizer"] = str(
            make_tokenizer(tmp_path, template=PLAIN_TAGS, vocab_size=300, name="other")
        )
        manifest = prepare(values, tmp_path / "out")
        assert manifest.shared_vocab_size is None
        assert verify_set(Store(tmp_path / "out")).problems == []
        num_active = 0
        for row in rows_of(tmp_path / "out"):
            first, second = teacher_streams(row, comp_demo=True)
            num_active += len(set(first.payload_P.tolist()) | set(second.payload_P.tolist()))
        assert manifest.counts["num_active_chunks"] == num_active > 0

    def test_dry_run_writes_nothing_and_projects(self, tmp_path: Path) -> None:
        values = make_values(tmp_path, [*chat_rows(300), chat_rows(1)[0]])
        config = write_yaml(tmp_path / "prepare.yaml", values)
        before = {p for p in tmp_path.iterdir() if p.name != "cache"}
        done = run_command("prepare", config, "--dry-run", "--json")
        assert done.returncode == 0, done.stderr
        assert {p for p in tmp_path.iterdir() if p.name != "cache"} == before
        seen = json.loads(done.stdout)
        assert (seen["num_rows"], seen["num_rows_read"]) == (300, 256)
        assert seen["counts_of_rows_read"]["num_samples"] == 256
        assert seen["projected_counts"]["num_rows"] == 1200
        assert seen["projected_dropped"] == {"duplicate": 1}
        plan, encoder = make_plan(load_config(config, PrepareConfig))
        exact = prepare(values, tmp_path / "out").counts
        projection = dry_run(plan, encoder, 300)
        for name in ("num_samples", "num_rows", "num_positions", "num_masked_positions"):
            assert projection.record.counts[name] == exact[name]


class TestBadInput:
    def run(self, tmp_path: Path, values: dict[str, Any], *extra: str) -> str:
        config = write_yaml(tmp_path / "prepare.yaml", values)
        done = run_command("prepare", config, "-o", tmp_path / "out", *extra)
        assert done.returncode in (1, 2)
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out" / "manifest.json").exists()
        return done.stderr

    def test_misspelt_key(self, tmp_path: Path) -> None:
        values = {**make_values(tmp_path, chat_rows(2)), "demo_ration": 0.5}
        error = self.run(tmp_path, values)
        assert "prepare.yaml: unknown key 'demo_ration' (did you mean 'demo_ratio'?)" in error

    def test_empty_source(self, tmp_path: Path) -> None:
        assert "chat.jsonl: empty source (no rows)" in self.run(tmp_path, make_values(tmp_path, []))

    def test_rows_without_an_assistant_turn_only(self, tmp_path: Path) -> None:
        rows = [{"messages": chat(f"{n}?")} for n in range(3)]
        error = self.run(tmp_path, make_values(tmp_path, rows))
        assert "no rows left: dropped no_assistant_turn 3 (no message of the assistant)" in error

    def test_everything_too_long(self, tmp_path: Path) -> None:
        rows = [{"messages": chat(f"word {n} " * 100, "Yes.")} for n in range(40)]
        values = make_values(tmp_path, rows)
        error = self.run(tmp_path, values)
        assert "no rows left: dropped prompt_too_long 40" in error
        assert "raise student.max_length" in error
        # The folder is free for the corrected config.
        longer = {name: {**values[name], "max_length": 1024} for name in ("student", "teacher")}
        assert prepare({**values, **longer}, tmp_path / "out").counts["num_samples"] == 40

    def test_output_is_missing(self, tmp_path: Path) -> None:
        config = write_yaml(tmp_path / "prepare.yaml", make_values(tmp_path, chat_rows(2)))
        done = run_command("prepare", config)
        assert done.returncode == 2
        assert "expected -o DIR" in done.stderr


class TestOutsideRows:
    """Rows with masks drawn elsewhere, in whatever layout their author likes."""

    def outside(self, tmp_path: Path, **changes: Any) -> tuple[dict[str, Any], pa.Table]:
        values = make_values(tmp_path, chat_rows(20), **changes)
        prepare(values, tmp_path / "ours")
        tables = [read_shard(Store(tmp_path / "ours"), s.path) for s in self.shards(tmp_path)]
        table = pa.concat_tables([t.replace_schema_metadata(None) for t in tables])
        theirs = {k: v for k, v in values.items() if k != "sources"}
        return {**theirs, "premasked": str(tmp_path / "theirs")}, table

    def shards(self, tmp_path: Path) -> Any:
        return open_cache(str(tmp_path / "ours")).manifest.shards

    def write(self, tmp_path: Path, table: pa.Table, num_files: int = 1, **options: Any) -> None:
        folder = tmp_path / "theirs" / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        size = -(-table.num_rows // num_files)
        for number in range(num_files):
            part = table.slice(number * size, size)
            pq.write_table(part, folder / f"part-{number}.parquet", **options)

    @pytest.mark.parametrize("alignment", ["positions", "chunks"])
    def test_kept_as_they_are(self, alignment: str, tmp_path: Path) -> None:
        values, table = self.outside(tmp_path, alignment=alignment)
        shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
        self.write(tmp_path, shuffled, num_files=3, row_group_size=7)
        values["samples_per_shard"] = 6
        manifest = prepare(values, tmp_path / "out")
        assert not manifest.noising.drawn
        assert manifest.counts["num_samples"] == 20
        assert verify_set(Store(tmp_path / "out")).problems == []
        assert self.contents(tmp_path / "out") == self.contents(tmp_path / "ours")
        prepare(values, tmp_path / "again", num_workers=3)
        assert_same_files(tmp_path / "out", tmp_path / "again")

    def contents(self, folder: Path) -> list[tuple[Any, ...]]:
        cache = open_cache(str(folder))
        rows = []
        for view in range(cache.num_views):
            table = cache.read_rows(view, np.arange(cache.num_samples))
            rows += [tuple(map(str, row.values())) for row in table.to_pylist()]
        return sorted(rows)

    def test_missing_halves_are_drawn_as_ours_are(self, tmp_path: Path) -> None:
        values, table = self.outside(tmp_path)
        self.write(tmp_path, table.drop_columns(["half_a"]))
        prepare(values, tmp_path / "out")
        assert self.contents(tmp_path / "out") == self.contents(tmp_path / "ours")

    def test_wider_types_are_taken(self, tmp_path: Path) -> None:
        values, table = self.outside(tmp_path)
        wide = table.set_column(2, "view", table["view"].cast(pa.int64()))
        wide = wide.set_column(
            4, "student_ids", wide["student_ids"].cast(pa.large_list(pa.int64()))
        )
        self.write(tmp_path, wide.append_column("note", pa.array(["x"] * wide.num_rows)))
        prepare(values, tmp_path / "out")
        schema = read_shard(Store(tmp_path / "out"), "data/view-00/00000.parquet").schema
        assert schema.equals(row_schema("positions"), check_metadata=False)

    @pytest.mark.parametrize(
        ("column", "change", "message"),
        [
            ("student_ids", lambda v: [999, *v[1:]], "position 0: student_ids: expected ids in"),
            ("teacher_ids", lambda v: [-1, *v[1:]], "position 0: teacher_ids: expected ids in"),
            ("student_mask", lambda v: b"\x01" + v[1:], "student_mask: expected only positions"),
            ("student_mask", lambda v: v[:-1], "bit mask of"),
            ("half_a", lambda v: b"\x01" + v[1:], "half_a: expected only masked positions, got 0"),
            ("timestep", lambda v: 1.5, "timestep: expected in (0, 1], got 1.5"),
            ("prompt_length", lambda v: 10_000, "prompt_length: expected 0.."),
            ("align_runs", lambda v: [0, 1, 5], "align_runs pairs different tokens"),
            ("align_runs", lambda v: [0, 0, 9999], "alignment entry 0"),
            ("align_runs", lambda v: v[:-1], "align_runs: expected groups of 3 numbers"),
        ],
    )
    def test_every_field_is_checked(
        self, column: str, change: Any, message: str, tmp_path: Path
    ) -> None:
        values, table = self.outside(tmp_path)
        bad_row = 33
        cells = table[column].to_pylist()
        cells[bad_row] = change(cells[bad_row])
        index = table.schema.get_field_index(column)
        array = pa.array(cells, type=table.schema.field(column).type)
        self.write(tmp_path, table.set_column(index, column, array))
        with pytest.raises(DataError) as caught:
            prepare(values, tmp_path / "out")
        assert message in caught.value.message
        assert f"sample {table['sample_id'][bad_row]}" in caught.value.message
        assert str(tmp_path / "theirs") in caught.value.message

    def test_views_must_be_complete_and_alike(self, tmp_path: Path) -> None:
        values, table = self.outside(tmp_path)
        self.write(tmp_path, table.slice(0, table.num_rows - 1))
        with pytest.raises(DataError, match=r"expected views 0\.\.3 once each, got view 3 0 times"):
            prepare(values, tmp_path / "out")
        self.write(tmp_path, pa.concat_tables([table, table.slice(5, 1)]))
        with pytest.raises(DataError, match=r"once each, got view 0 2 times"):
            prepare(values, tmp_path / "out")
        with pytest.raises(DataError, match=r"view: expected 0\.\.1, got 2"):
            prepare({**values, "num_views": 2}, tmp_path / "out")
        lengths = table["prompt_length"].to_pylist()
        lengths[-1] -= 1
        other = table.set_column(5, "prompt_length", pa.array(lengths, pa.int32()))
        self.write(tmp_path, other)
        with pytest.raises(DataError, match="view 3: prompt_length: expected that of view 0"):
            prepare(values, tmp_path / "out")

    def test_columns(self, tmp_path: Path) -> None:
        values, table = self.outside(tmp_path)
        names = ["align_run" if n == "align_runs" else n for n in table.schema.names]
        self.write(tmp_path, table.rename_columns(names))
        with pytest.raises(
            DataError, match=r"no column 'align_runs' \(did you mean 'align_run'\?\)"
        ):
            prepare(values, tmp_path / "out")
        nothing = pa.array([None] * table.num_rows, pa.float32())
        self.write(tmp_path, table.set_column(3, pa.field("timestep", pa.float32()), nothing))
        with pytest.raises(DataError, match="timestep: expected float without missing values"):
            prepare(values, tmp_path / "out")
        (tmp_path / "theirs" / "deep" / "part-0.parquet").unlink()
        with pytest.raises(
            DataError, match=r"expected a folder of \.parquet files, got none in it"
        ):
            prepare(values, tmp_path / "out")


class TestRealTokenizers:
    def test_gsm8k_for_qwen3_with_two_templates(self, tmp_path: Path, shared_dir: Path) -> None:
        qwen3 = str(shared_dir / "tokenizers" / "qwen3")
        values = {
            "sources": f"'{shared_dir / 'data' / 'gsm8k' / 'test.jsonl'}'[cap:60,license:MIT]",
            "student": {"tokenizer": qwen3, "max_length": 512},
            "teacher": {"tokenizer": qwen3, "max_length": 512, "chat_template": PLAIN_TAGS},
            "samples_per_shard": 32,
        }
        manifest = prepare(values, tmp_path / "out")
        assert manifest.shared_vocab_size == manifest.student.vocab_size == 151670
        assert manifest.student.sha256 == manifest.teacher.sha256
        assert manifest.dropped == {"mixture_cap": 1319 - 60}
        assert verify_set(Store(tmp_path / "out")).problems == []
        # Nearly all of a reply has a partner: all but template tokens and unpaired fill.
        counts = manifest.counts
        assert counts["num_payload_positions"] > 0.8 * counts["num_masked_positions"]

    def test_gsm8k_across_tokenizers(self, tmp_path: Path, shared_dir: Path) -> None:
        values = {
            "sources": f"'{shared_dir / 'data' / 'gsm8k' / 'test.jsonl'}'[cap:40]",
            "student": {"tokenizer": str(shared_dir / "tokenizers" / "qwen3"), "max_length": 256},
            "teacher": {
                "tokenizer": str(shared_dir / "tokenizers" / "bailing-standin"),
                "max_length": 200,
            },
            "alignment": "chunks",
        }
        manifest = prepare(values, tmp_path / "out")
        assert verify_set(Store(tmp_path / "out")).problems == []
        assert manifest.counts["num_active_chunks"] > 0
        for row in rows_of(tmp_path / "out"):
            assert len(row.teacher_ids_L) <= 200


def wait_for(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "timed out"
        time.sleep(0.005)


def workers_of(pid: int) -> list[int]:
    """The worker processes of a process: the forks of its fork server."""
    servers = [
        c for c in children_of(pid) if b"forkserver" in Path(f"/proc/{c}/cmdline").read_bytes()
    ]
    return [worker for server in servers for worker in children_of(server)]


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
