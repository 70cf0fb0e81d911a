"""`tide-cache build` as a process: same bytes for any workers and after SIGKILL, and bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import (
    all_files,
    command,
    command_environment,
    make_tokenizer,
    run_command,
    write_yaml,
)
from tests.pipelines import write_pipeline
from tests.teacher_checkpoints import make_model, write_checkpoint
from tide_cache.cache import open_cache
from tide_cache.card import describe_fidelity
from tide_cache.manifest import CacheManifest
from tide_cache.payload_facts import RankedFacts
from tide_cache.payloads.candidates import CODEC_FILE
from tide_cache.payloads.hidden import HEAD_FILE, TRANSFORM_FILE
from tide_cache.store import Store
from tide_cache.verify import verify_set

NUM_SAMPLES = 40
CANDIDATES_ALONE = "payloads=[candidates]"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a teacher, a premasked set of five tasks, a config and a cache."""
    folder = tmp_path_factory.mktemp("build")
    config = write_pipeline(
        folder,
        make_model("qwen3", vocab_size=448, max_position_embeddings=512),
        num_rows=NUM_SAMPLES,
        prepare={},
        build={
            "candidates": {"k": 12, "mean_logits_positions": 100},
            "hidden": {"fit_positions": 256},
            "fidelity_positions": 64,
        },
    )
    succeed("prepare", config, "-o", folder / "premasked", "--workers", "1")
    succeed("build", config, "-p", folder / "premasked", "-o", folder / "cache", "--workers", "1")
    return folder


def succeed(*arguments: str | Path) -> str:
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(ground: Path, output: Path, *more: str | Path, premasked: Path | None = None) -> Any:
    return run_command(
        "build",
        ground / "pipeline.yaml",
        "-p",
        premasked or ground / "premasked",
        "-o",
        output,
        "--workers",
        "1",
        *more,
    )


def copy_of_premasked(ground: Path, tmp_path: Path) -> Path:
    shutil.copytree(ground / "premasked", tmp_path / "premasked")
    return tmp_path / "premasked"


def open_manifest(folder: Path) -> CacheManifest:
    manifest = open_cache(folder).manifest
    assert isinstance(manifest, CacheManifest)
    return manifest


def test_the_cache_is_sound_and_says_what_it_is(ground: Path) -> None:
    report = verify_set(Store(ground / "cache"))
    assert report.ok, report.problems
    cache, manifest = open_cache(ground / "cache"), open_manifest(ground / "cache")
    assert isinstance(manifest.candidates, RankedFacts)
    assert (manifest.candidates.k, manifest.candidates.bits) == (12, 8)
    assert manifest.candidates.mean_logits_positions >= 100
    assert manifest.hidden is not None
    assert manifest.hidden.fit_positions >= 100
    assert {facts.path for facts in manifest.files} == {
        "README.md",
        "codec/candidates.safetensors",
        "codec/head.safetensors",
        "codec/hidden.safetensors",
    }
    assert manifest.counts["num_samples"] == cache.num_samples
    assert manifest.counts["num_payload_positions"] == report.num_payload_entries > 100
    assert not (ground / "cache/_build").exists()
    assert "Token ids are text" in (ground / "cache/README.md").read_text()


def test_the_manifest_records_fidelity_and_inspect_prints_it(ground: Path) -> None:
    (facts,) = open_manifest(ground / "cache").fidelity
    assert facts.setting == "hidden 0.01 nats + candidates k=12 8 bits"
    assert (facts.tail, facts.student, facts.target) == ("hidden", "noised teacher", None)
    assert 32 <= facts.num_positions <= 128
    assert facts.bytes_per_position > 0
    # TIDAL at three lambdas and both KLs, at each temperature.
    kinds = [(loss.loss, loss.weight, loss.temperature) for loss in facts.losses]
    names = [("tidal", w) for w in (0.1, 0.5, 0.9)] + [("kl", None), ("reverse_kl", None)]
    assert kinds == [(name, w, t) for t in (1.0, 2.0) for name, w in names]
    assert all(0 < loss.cosine <= 1 and loss.relative_error >= 0 for loss in facts.losses)
    assert facts.worst.cosine == min(loss.cosine for loss in facts.losses)

    printed = succeed("inspect", ground / "cache")
    text = describe_fidelity(facts)
    assert f"gradient cosine {facts.worst.cosine:.4f} or better over 10 losses" in text
    assert text in " ".join(printed.split()), "whatever the width of the screen"
    assert text in (ground / "cache/README.md").read_text()
    told = json.loads(succeed("inspect", ground / "cache", "--json"))
    assert told["fidelity"] == [facts.model_dump(mode="json")]


def test_fidelity_that_was_not_measured_is_not_claimed(ground: Path, tmp_path: Path) -> None:
    output = tmp_path / "cache"
    done = build(ground, output, "--set", "fidelity_positions=0", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fidelity"] == []
    printed = succeed("inspect", output)
    assert "not measured" in printed
    assert "gradient cosine" not in printed


def test_datasets_reads_the_folder(ground: Path, tmp_path: Path) -> None:
    import datasets

    rows = datasets.load_dataset(str(ground / "cache"), cache_dir=str(tmp_path))["train"]
    assert len(rows) == open_cache(ground / "cache").manifest.counts["num_rows"]
    assert {"student_ids", "cand_codes", "hidden_0"} <= set(rows.column_names)


def test_three_workers_write_the_same_bytes(ground: Path, tmp_path: Path) -> None:
    succeed(
        "build",
        ground / "pipeline.yaml",
        "-p",
        ground / "premasked",
        "-o",
        tmp_path / "three",
        "--workers",
        "3",
    )
    assert all_files(tmp_path / "three") == all_files(ground / "cache")


# Every stage at which something has been published: each codec file, the record of calibration,
# the header, some tasks.
STAGES = [
    (CODEC_FILE, 0),
    (HEAD_FILE, 0),
    (TRANSFORM_FILE, 0),
    ("_build/calibration.json", 0),
    ("_build/header.json", 0),
    ("_build/header.json", 1),
    ("_build/header.json", 3),
]


@pytest.mark.parametrize(("published", "num_tasks_done"), STAGES)
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(
    ground: Path, tmp_path: Path, published: str, num_tasks_done: int
) -> None:
    output = tmp_path / "cache"
    arguments = ("build", ground / "pipeline.yaml", "-p", ground / "premasked", "-o", output)
    process = subprocess.Popen(
        command(*arguments, "--workers", "1"),
        env=command_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s and process.poll() is None:
        begun = (output / published).exists()
        if begun and len(list(output.glob("_build/tasks/*.json"))) >= num_tasks_done:
            break
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    killed_early = not (output / "manifest.json").exists()
    out = succeed(*arguments, "--workers", "1", "--json")
    assert all_files(output) == all_files(ground / "cache")
    if killed_early:
        assert json.loads(out)["num_tasks"]["kept"] >= num_tasks_done


def test_running_a_finished_build_again_does_nothing(ground: Path, tmp_path: Path) -> None:
    shutil.copytree(ground / "cache", tmp_path / "cache")
    done = build(ground, tmp_path / "cache")
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    assert all_files(tmp_path / "cache") == all_files(ground / "cache")


def test_another_config_is_refused_by_key(ground: Path, tmp_path: Path) -> None:
    shutil.copytree(ground / "cache", tmp_path / "cache")
    done = build(ground, tmp_path / "cache", "--set", "candidates.k=13")
    assert done.returncode == 1
    assert "holds another set; differing: build_config.candidates.k" in done.stderr


def test_dry_run_writes_nothing(ground: Path, tmp_path: Path) -> None:
    done = build(ground, tmp_path / "cache", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert plan["num_tasks"] == 5
    assert plan["payloads"] == ["hidden 0.01 nats + candidates k=12 8 bits"]
    assert plan["payload_bytes_before_compression"] is None, "calibration decides it"
    assert all(positions > 0 for positions in plan["num_calibration_positions"])
    done = build(ground, tmp_path / "cache", "--dry-run", "--json", "--set", CANDIDATES_ALONE)
    assert json.loads(done.stdout)["payload_bytes_before_compression"] > 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("override", "exit_code", "message"),
    [
        ("candidates.k=100000", 2, "candidates.k: expected at most the 4"),
        ("candidates.temperatures=[0]", 2, "candidates.temperatures.0"),
        ("candidates.temperatures=[2, 2]", 2, "expected each temperature once"),
        ("candidates.vocab_size=100000", 2, "leading ids are shared by both tokenizers"),
        ("teacher.block_size=16", 1, "teacher.block_size: the premasked set is cut into blocks"),
        ("teacher.model=/nowhere", 1, "/nowhere"),
        ("teacher.modl=x", 2, "unknown key 'teacher.modl' (did you mean 'model'?)"),
        ("candidates.kk=3", 2, "unknown key 'candidates.kk' (did you mean 'k'?)"),
        ("comp_demmo=true", 2, "unknown key 'comp_demmo' (did you mean 'comp_demo'?)"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(
    ground: Path, tmp_path: Path, override: str, exit_code: int, message: str
) -> None:
    done = build(ground, tmp_path / "cache", "--set", override)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == exit_code or override.startswith("teacher.model")
    assert not (tmp_path / "cache").exists()


def test_a_teacher_with_another_tokenizer_is_refused(ground: Path, tmp_path: Path) -> None:
    shutil.copytree(ground / "teacher", tmp_path / "teacher")
    other = make_tokenizer(tmp_path, vocab_size=400, name="other")
    for path in other.iterdir():
        shutil.copy(path, tmp_path / "teacher" / path.name)
    done = build(ground, tmp_path / "cache", "--set", f"teacher.model={tmp_path / 'teacher'}")
    assert done.returncode == 1
    assert "teacher.model: teacher: tokenizer: expected" in done.stderr
    assert "prepare the set again with teacher.tokenizer" in done.stderr


def test_a_truncated_premasked_shard_is_named_and_nothing_is_lost(
    ground: Path, tmp_path: Path
) -> None:
    premasked = copy_of_premasked(ground, tmp_path)
    shard = premasked / "data/view-01/00003.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-50])
    done = build(ground, tmp_path / "cache", premasked=premasked)
    assert done.returncode == 1
    assert "shard data/view-01/00003.parquet: expected" in done.stderr
    finished = list((tmp_path / "cache/_build/tasks").glob("*.json"))
    assert len(finished) == 4, "all other tasks are done"
    shard.write_bytes(whole)
    done = build(ground, tmp_path / "cache", premasked=premasked)
    assert done.returncode == 0, done.stderr
    assert all_files(tmp_path / "cache") == all_files(ground / "cache")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # Calibration reads single row groups, whose pages have checksums of their own; where it
        # reads none of the damaged ones, the hash of the whole shard tells.
        ((), r"data/view-00/00000.parquet: (damaged data|sha256 mismatch \(expected)"),
        (
            (
                "candidates.codec=raw",
                "candidates.mean_logits_positions=0",
                "payloads=[candidates]",
                "fidelity_positions=0",
            ),
            r"shard data/view-00/00000.parquet: sha256 mismatch \(expected",
        ),
    ],
)
def test_a_changed_byte_of_a_premasked_shard_is_named(
    ground: Path, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    premasked = copy_of_premasked(ground, tmp_path)
    shard = premasked / "data/view-00/00000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    options = [part for override in overrides for part in ("--set", override)]
    done = build(ground, tmp_path / "c", *options, premasked=premasked)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr


def test_a_cache_is_no_premasked_set(ground: Path, tmp_path: Path) -> None:
    done = build(ground, tmp_path / "c", premasked=ground / "cache")
    assert done.returncode == 1
    assert "expected a premasked set, got a cache" in done.stderr


def test_an_answer_that_no_codec_takes_names_its_row(ground: Path, tmp_path: Path) -> None:
    """Logits of 1e33 are numbers, but beyond what `ranked` stores."""
    model = make_model("qwen3", vocab_size=448, max_position_embeddings=512)
    model.lm_head.weight.data *= 1e33
    write_checkpoint(tmp_path / "teacher", "qwen3", model)
    shutil.copytree(ground / "tokenizer", tmp_path / "teacher", dirs_exist_ok=True)
    settings = [
        f"teacher.model={tmp_path / 'teacher'}",
        CANDIDATES_ALONE,
        "candidates.mean_logits_positions=0",
        "candidates.ranks=corpus",
        "fidelity_positions=0",
    ]
    overrides = [word for setting in settings for word in ("--set", setting)]
    done = build(ground, tmp_path / "cache", *overrides)
    assert done.returncode == 1
    assert re.search(r"sample [0-9a-f]{32} view [01]: cand_logits: expected", done.stderr)


@pytest.mark.parametrize("full_at", ["codec", "data"])
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small tmpfs")
def test_a_full_disk_is_named_and_the_build_goes_on_when_there_is_room(
    ground: Path, tmp_path: Path, full_at: str
) -> None:
    codec_files = sum(path.stat().st_size for path in (ground / "cache/codec").iterdir())
    room_kib = 32 if full_at == "codec" else codec_files // 1024 + 64
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room_kib}k", "tmpfs", str(small)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        done = build(ground, small / "cache")
        assert done.returncode == 1
        assert f"cache/{full_at}/" in done.stderr
        assert "the disk is full" in done.stderr
        assert "run the same command again" in done.stderr
        assert not list(small.rglob("*.tmp")), "no half-written file is left"
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        done = build(ground, small / "cache")
        assert done.returncode == 0, done.stderr
        assert all_files(small / "cache") == all_files(ground / "cache")
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("payloads", "codec", "held"),
    [
        ("[candidates, chunks]", "raw", ["candidates", "chunks"]),
        ("[chunks, hidden]", "ranked", ["candidates", "chunks", "hidden"]),
    ],
)
def test_a_cache_may_hold_several_payloads_and_a_student_learn_from_all(
    ground: Path, tmp_path: Path, payloads: str, codec: str, held: list[str]
) -> None:
    output = tmp_path / "cache"
    options = ("--set", f"payloads={payloads}", "--set", f"candidates.codec={codec}")
    done = build(ground, output, *options)
    assert done.returncode == 0, done.stderr
    report = verify_set(Store(output))
    assert report.ok, report.problems
    assert [facts.name for facts in open_manifest(output).payloads] == held
    table = open_cache(output).read_rows(1, range(NUM_SAMPLES))
    # With one tokenizer each answered position is a chunk of one token.
    if codec == "raw":
        assert table["chunk_logprob"].to_pylist() == table["cand_label_logprob"].to_pylist()
    else:  # 4 significant bits
        exact = np.frombuffer(b"".join(table["chunk_logprob"].to_pylist()), "<f4")
        rounded = table["cand_label_logprob"].combine_chunks().flatten().to_numpy()
        np.testing.assert_allclose(rounded, exact, rtol=2**-4)
    train = write_yaml(
        tmp_path / "train.yaml",
        {
            "output": str(tmp_path / "run"),
            "student": {"init": str(ground / "teacher")},
            "objective": {"losses": ["ce", "tidal", "reverse_calm"]},
            "stream": {"batch_size": 16},
            "metrics": {"every": 1},
            "max_steps": 4,
        },
    )
    trained = subprocess.run(
        [sys.executable, "-m", "stage2_student", str(train), "--cache", str(output)],
        capture_output=True,
        text=True,
        check=False,
        env=command_environment(),
    )
    assert trained.returncode == 0, trained.stderr
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    terms = [line for line in lines if "loss" in line]
    assert len(terms) == 4
    assert all(
        line[f"loss/{name}"] > 0 for line in terms for name in ("ce", "tidal", "reverse_calm")
    )
