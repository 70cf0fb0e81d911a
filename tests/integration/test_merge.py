"""`tide-cache merge` as a process: halves built apart by a real teacher become the whole.

The teacher is asked one sample at a time: within a batch the last bits of logits depend on the
other samples of the batch, and a half has other batches than the whole.
"""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pytest

from stage2_student import cli
from tests.builders import (
    all_files,
    chat_rows,
    command,
    command_environment,
    run_command,
    write_chat_jsonl,
    write_yaml,
)
from tests.pipelines import write_pipeline
from tests.support import PROJECT_ROOT
from tests.teacher_checkpoints import make_model
from tide_cache.cache import open_cache
from tide_cache.manifest import CacheManifest, Manifest
from tide_cache.store import Store
from tide_cache.verify import verify_set

NUM_SAMPLES = 40
PARTS = {"whole": (0, 40), "first": (0, 16), "second": (16, 40), "overlap": (8, 24)}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Premasked sets and caches of all conversations and of parts of them, one recipe."""
    folder = tmp_path_factory.mktemp("merge")
    config = write_pipeline(
        folder,
        make_model("qwen3", vocab_size=448, max_position_embeddings=512),
        num_rows=NUM_SAMPLES,
        prepare={},
        build={
            "payloads": ["candidates", "chunks"],
            "candidates": {"codec": "raw", "k": 8, "mean_logits_positions": 0},
            "fidelity_positions": 0,
            "samples_per_batch": 1,
        },
    )
    rows = chat_rows(NUM_SAMPLES)
    for name, (start, stop) in PARTS.items():
        write_chat_jsonl(folder / "chat.jsonl", rows[start:stop])
        succeed("prepare", config, "-o", folder / f"premasked-{name}", "--workers", "1")
        build(folder, name)
    return folder


def build(folder: Path, name: str) -> None:
    config, premasked = folder / "pipeline.yaml", folder / f"premasked-{name}"
    succeed("build", config, "-p", premasked, "-o", folder / f"cache-{name}", "--workers", "1")


def succeed(*arguments: str | Path) -> str:
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def merged(output: Path, *inputs: Path) -> Manifest:
    succeed("merge", *inputs, "-o", output)
    report = verify_set(Store(output))
    assert report.ok, report.problems
    return open_cache(output).manifest


def rows_of(folder: Path) -> list[pa.Table]:
    """All rows of each view, by sample id."""
    cache = open_cache(folder)
    tables = [cache.read_rows(v, range(cache.num_samples)) for v in range(cache.num_views)]
    return [table.sort_by("sample_id") for table in tables]


@pytest.mark.parametrize("kind", ["premasked", "cache"])
def test_two_halves_are_the_whole_row_for_row(ground: Path, tmp_path: Path, kind: str) -> None:
    halves = [ground / f"{kind}-first", ground / f"{kind}-second"]
    manifest = merged(tmp_path / "both", *halves)
    whole = open_cache(ground / f"{kind}-whole").manifest
    for ours, theirs in zip(
        rows_of(tmp_path / "both"), rows_of(ground / f"{kind}-whole"), strict=True
    ):
        assert ours.equals(theirs)
    sizes = {"size_bytes"}
    assert {k: v for k, v in manifest.counts.items() if k not in sizes} == {
        k: v for k, v in whole.counts.items() if k not in sizes
    }
    assert manifest.counts["size_bytes"] == sum(shard.size_bytes for shard in manifest.shards)
    assert manifest.format_version == 3
    assert [origin.identity for origin in manifest.origins] == [
        open_cache(half).identity for half in halves
    ]
    assert manifest.config["merged_from"] == [origin.identity for origin in manifest.origins]
    assert [origin.num_samples for origin in manifest.origins] == [16, 24]
    assert sum(source.num_rows_taken for source in manifest.sources) == NUM_SAMPLES
    made = manifest.origins[0].made
    assert made["provenance"]["command"] == "tide-cache prepare"
    if isinstance(manifest, CacheManifest):
        assert made["build_provenance"]["command"] == "tide-cache build"
        assert len({manifest.premasked_sha256, made["premasked_sha256"]}) == 2


def test_shards_of_the_first_set_are_taken_over_byte_for_byte(ground: Path, tmp_path: Path) -> None:
    merged(tmp_path / "both", ground / "cache-first", ground / "cache-second")
    before, after = all_files(ground / "cache-first"), all_files(tmp_path / "both")
    shards = [name for name in before if name.startswith("data/")]
    assert len(shards) == 4
    assert all(after[name] == before[name] for name in shards)
    assert len([name for name in after if name.startswith("data/")]) == 10


def test_duplicates_are_kept_once_and_counted(ground: Path, tmp_path: Path) -> None:
    inputs = [ground / f"cache-{name}" for name in ("first", "overlap", "second")]
    told = json.loads(succeed("merge", *inputs, "-o", tmp_path / "all", "--json"))
    assert [source["num_duplicates"] for source in told["sources"]] == [0, 8, 8]
    assert (told["num_samples"], told["num_duplicates"]) == (NUM_SAMPLES, 16)
    manifest = open_cache(tmp_path / "all").manifest
    assert manifest.dropped["duplicate_in_merge"] == 16
    assert manifest.counts["num_samples"] == NUM_SAMPLES
    assert verify_set(Store(tmp_path / "all")).ok
    ids = [table["sample_id"] for table in rows_of(tmp_path / "all")]
    assert ids == [table["sample_id"] for table in rows_of(ground / "cache-whole")]
    rows = rows_of(tmp_path / "all")[0]
    assert rows["student_ids"] == rows_of(ground / "cache-whole")[0]["student_ids"]


def test_a_merged_set_merges_again(ground: Path, tmp_path: Path) -> None:
    merged(tmp_path / "a", ground / "cache-first", ground / "cache-overlap")
    manifest = merged(tmp_path / "b", tmp_path / "a", ground / "cache-second")
    assert manifest.counts["num_samples"] == NUM_SAMPLES
    assert len(manifest.origins) == 4, "both halves, their merger, and what was added"
    first = all_files(ground / "cache-first")
    shards = {name: data for name, data in first.items() if name.startswith("data/")}
    assert {name: all_files(tmp_path / "b")[name] for name in shards} == shards


def test_inspect_tells_where_it_comes_from(ground: Path, tmp_path: Path) -> None:
    halves = [ground / "premasked-first", ground / "premasked-second"]
    merged(tmp_path / "both", *halves)
    shown = succeed("inspect", tmp_path / "both")
    for half in halves:
        assert f"{open_cache(half).identity}, " in " ".join(shown.split())
    told = json.loads(succeed("inspect", tmp_path / "both", "--json"))
    assert [origin["num_samples"] for origin in told["origins"]] == [16, 24]
    assert json.loads(succeed("inspect", halves[0], "--json"))["origins"] == []


def test_a_dry_run_writes_nothing(ground: Path, tmp_path: Path) -> None:
    inputs = (ground / "cache-first", ground / "cache-second")
    out = succeed("merge", *inputs, "-o", tmp_path / "out", "--dry-run")
    assert "would make" in out
    assert "40 samples in 5 tasks (2 copied as they are), 0 duplicates" in out
    assert not (tmp_path / "out").exists()


def test_running_it_again_does_nothing_and_other_inputs_are_refused(
    ground: Path, tmp_path: Path
) -> None:
    inputs = (ground / "cache-first", ground / "cache-second")
    merged(tmp_path / "out", *inputs)
    before = all_files(tmp_path / "out")
    succeed("merge", *inputs, "-o", tmp_path / "out")
    assert all_files(tmp_path / "out") == before
    done = run_command("merge", *reversed(inputs), "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "holds another set; differing:" in done.stderr
    assert all_files(tmp_path / "out") == before


@pytest.mark.parametrize("num_tasks_done", [0, 1, 3, 5])
def test_a_killed_merge_goes_on_and_ends_with_the_same_bytes(
    ground: Path, tmp_path: Path, num_tasks_done: int
) -> None:
    inputs = (ground / "cache-first", ground / "cache-second")
    merged(tmp_path / "whole", *inputs)
    output = tmp_path / "killed"
    process = subprocess.Popen(
        command("merge", *inputs, "-o", output), env=command_environment(), cwd=PROJECT_ROOT
    )
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and process.poll() is None:
        begun = (output / "_build/header.json").exists()
        if begun and len(list(output.glob("_build/tasks/*.json"))) >= num_tasks_done:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    succeed("merge", *inputs, "-o", output)
    assert all_files(output) == all_files(tmp_path / "whole")


def test_a_damaged_shard_is_named_and_nothing_is_finished(ground: Path, tmp_path: Path) -> None:
    shutil.copytree(ground / "cache-second", tmp_path / "bad")
    shard = tmp_path / "bad/data/view-01/00001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    done = run_command("merge", ground / "cache-first", tmp_path / "bad", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "data/view-01/00001.parquet: sha256 mismatch (expected" in done.stderr
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_student_trains_from_a_merged_cache_as_from_the_whole(
    ground: Path, tmp_path: Path
) -> None:
    """In batches of all rows, as their order is another."""
    merged(tmp_path / "both", ground / "cache-first", ground / "cache-second")
    losses = []
    for name, cache in (("a", tmp_path / "both"), ("b", ground / "cache-whole")):
        config = write_yaml(
            tmp_path / f"{name}.yaml",
            {
                "output": str(tmp_path / name),
                "student": {
                    "init": "random",
                    "tokenizer": str(ground / "tokenizer"),
                    "architecture": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
                },
                "objective": {"losses": {"ce": 1.0, "tidal": 1.0}, "tail": "student"},
                "stream": {"batch_size": NUM_SAMPLES},
                "max_steps": 3,
                "device": "cpu",
                "metrics": {"every": 1},
            },
        )
        cli.train(config, str(cache), json_output=True, resume="never")
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 3
