"""`tide-cache build` of the default payload, hidden states and a head, and who learns from it."""

import functools
import json
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stage1_teacher.teachers import load_teacher
from stage1_teacher.teachers.base import TeacherConfig
from stage2_student.config import TrainConfig
from stage2_student.metrics import read_metrics
from stage2_student.trainer import train
from tests.builders import (
    all_files,
    command_environment,
    run_command,
    write_yaml,
)
from tests.pipelines import write_pipeline
from tests.support import PROJECT_ROOT
from tests.teacher_checkpoints import edit_config, make_model
from tide_cache.cache import open_cache
from tide_cache.errors import CompatibilityError, FormatError
from tide_cache.manifest import CacheManifest
from tide_cache.payload_facts import RankedFacts
from tide_cache.payloads import num_entries, open_codecs
from tide_cache.payloads.candidates import NO_ID
from tide_cache.rows import table_to_rows
from tide_cache.store import Store
from tide_cache.verify import verify_set

LAST_TASK = "00002"
LOSSES = ("ce", "tidal", "kl", "reverse_kl")
TOP_P = (
    "payloads=[candidates]",
    "candidates.top_p=0.9",
    "candidates.min_k=4",
    "candidates.k=64",
    "candidates.mean_logits_positions=0",
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a teacher, a premasked set of three tasks, and two caches of it.

    `cache` holds the default payload, `ragged` candidates of as many ids as hold 90% of the mass.
    """
    folder = tmp_path_factory.mktemp("hidden")
    model = make_model("qwen3", vocab_size=448, max_position_embeddings=512)
    model.lm_head.weight.data *= 3  # so that 90% of the mass is now a few ids, now many
    write_pipeline(
        folder,
        model,
        num_rows=24,
        prepare={},
        build={
            "fidelity_positions": 100,
            "candidates": {"mean_logits_positions": 100},
            "hidden": {"fit_positions": 256},
        },
    )
    done = run_command(
        "prepare", folder / "pipeline.yaml", "-o", folder / "premasked", "--workers", "1"
    )
    assert done.returncode == 0, done.stderr
    for name, settings in (("cache", ()), ("ragged", TOP_P)):
        done = build(folder, folder / name, *settings)
        assert done.returncode == 0, done.stderr
    return folder


def build(
    ground: Path, output: Path, *settings: str, premasked: Path | None = None
) -> subprocess.CompletedProcess[str]:
    overrides = [word for setting in settings for word in ("--set", setting)]
    return run_command(
        "build",
        ground / "pipeline.yaml",
        "-p",
        premasked or ground / "premasked",
        "-o",
        output,
        "--workers",
        "1",
        *overrides,
    )


def train_values(ground: Path, output: Path, *, tail: str, max_steps: int) -> dict[str, Any]:
    return {
        "output": str(output),
        "student": {
            "init": "random",
            "tokenizer": str(ground / "tokenizer"),
            "architecture": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
        },
        "objective": {"losses": list(LOSSES), "tail": tail},
        "stream": {"batch_size": 8},
        "metrics": {"every": 1},
        "max_steps": max_steps,
        "device": "cpu",
    }


def learn(ground: Path, cache: Path, output: Path, *, tail: str, steps: int) -> list[Any]:
    """Train and return the losses of each step, by term."""
    values = train_values(ground, output, tail=tail, max_steps=steps)
    train(TrainConfig.model_validate(values), cache)
    lines = [line for line in read_metrics(output / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    found = [[line[f"loss/{name}"] for name in LOSSES] for line in lines]
    assert all(math.isfinite(loss) and loss > 0 for losses in found for loss in losses)
    return found


def teacher_like(ground: Path, folder: Path, change: Callable[[Path], None]) -> str:
    """Copy the teacher, change it, and return the override that names it."""
    shutil.copytree(ground / "teacher", folder)
    change(folder)
    return f"teacher.model={folder}"


def give_field(name: str, value: float, folder: Path) -> None:
    edit_config(folder, **{name: value})


def test_a_build_keeps_hidden_states_and_a_head_by_default(ground: Path) -> None:
    report = verify_set(Store(ground / "cache"))
    assert report.ok, report.problems
    manifest = open_cache(ground / "cache").manifest
    assert isinstance(manifest, CacheManifest)
    assert manifest.hidden is not None
    assert manifest.candidates is not None
    assert (manifest.hidden.hidden_size, manifest.candidates.k) == (32, 16)
    assert {facts.path for facts in manifest.files} == {
        "README.md",
        "codec/candidates.safetensors",
        "codec/head.safetensors",
        "codec/hidden.safetensors",
    }
    head = load_file(ground / "cache/codec/head.safetensors")["weight"]
    whole = load_file(ground / "teacher/model.safetensors")["lm_head.weight"]
    assert torch.equal(head, whole[: manifest.hidden.vocab_size])
    assert manifest.fidelity[0].worst.cosine > 0.95


def test_an_unfinished_build_goes_on_with_the_same_payload_alone(
    ground: Path, tmp_path: Path
) -> None:
    premasked = shutil.copytree(ground / "premasked", tmp_path / "premasked")
    shard = premasked / f"data/view-01/{LAST_TASK}.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-50])
    output = tmp_path / "cache"
    done = build(ground, output, premasked=premasked)
    assert done.returncode == 1
    assert f"view-01/{LAST_TASK}.parquet" in done.stderr
    assert len(list(output.glob("_build/tasks/*.json"))) == 2
    shard.write_bytes(whole)
    before = all_files(output)
    done = build(ground, output, "hidden.nats=0.1", "candidates.k=24", premasked=premasked)
    assert done.returncode == 1
    differing = "differing: build_config.candidates.k, build_config.hidden.nats"
    assert f"holds another set; {differing}" in done.stderr
    assert all_files(output) == before
    done = build(ground, output, premasked=premasked)
    assert done.returncode == 0, done.stderr
    assert "1 tasks made, 2 kept" in done.stdout
    assert all_files(output) == all_files(ground / "cache")


def test_a_ragged_cache_is_sound_and_a_student_learns_from_it(ground: Path, tmp_path: Path) -> None:
    report = verify_set(Store(ground / "ragged"))
    assert report.ok, report.problems
    cache = open_cache(ground / "ragged")
    assert isinstance(cache.manifest, CacheManifest)
    facts = cache.manifest.candidates
    assert isinstance(facts, RankedFacts)
    assert (facts.top_p, facts.min_k, facts.k) == (0.9, 4, 64)
    table = cache.read_rows(1, range(cache.num_samples))
    rows = table_to_rows(table, "positions")
    nums_B = torch.tensor([num_entries(row, "positions") for row in rows]).numpy()
    codec = open_codecs(cache.store, cache.manifest).candidates
    assert codec is not None
    found = codec.decode(table, nums_B)
    num_kept_P = (found.ids_PK != NO_ID).sum(axis=1)
    assert set(num_kept_P.tolist()) >= {4, 5, 6}
    assert num_kept_P.min() == 4
    assert 6 < num_kept_P.max() <= 64
    learn(ground, ground / "ragged", tmp_path / "run", tail="auto", steps=2)


def test_a_student_learns_from_hidden_states_under_either_tail(
    ground: Path, tmp_path: Path
) -> None:
    by_tail = {
        tail: learn(ground, ground / "cache", tmp_path / tail, tail=tail, steps=3)
        for tail in ("auto", "hidden", "mean")
    }
    assert by_tail["auto"] == by_tail["hidden"]
    first_hidden, first_mean = by_tail["hidden"][0], by_tail["mean"][0]
    assert first_hidden[0] == first_mean[0]  # cross entropy asks no teacher
    assert all(a != b for a, b in zip(first_hidden[1:], first_mean[1:], strict=True))


def test_the_tail_hidden_needs_a_cache_that_has_it(ground: Path, tmp_path: Path) -> None:
    values = train_values(ground, tmp_path / "run", tail="hidden", max_steps=2)
    message = "objective.tail: 'hidden' needs the payload hidden, which this cache does not hold"
    with pytest.raises(CompatibilityError, match=message):
        train(TrainConfig.model_validate(values), ground / "ragged")
    assert not (tmp_path / "run").exists()


def test_training_on_renormalised_candidates_warns(
    ground: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = train_values(ground, tmp_path / "run", tail="none", max_steps=1)
    config = write_yaml(tmp_path / "train.yaml", values)
    done = subprocess.run(
        [sys.executable, "-m", "stage2_student", str(config), "--cache", str(ground / "cache")],
        cwd=PROJECT_ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tail none: the candidates are renormalised" in done.stderr
    with caplog.at_level(logging.WARNING):
        learn(ground, ground / "cache", tmp_path / "hidden", tail="hidden", steps=1)
    assert "renormalised" not in caplog.text


def test_a_head_that_is_no_plain_product_is_refused(ground: Path, tmp_path: Path) -> None:
    for field, value in (("final_logit_softcapping", 30.0), ("logit_scale", 0.0625)):
        folder = tmp_path / field
        named = teacher_like(ground, folder, functools.partial(give_field, field, value))
        expected = f"config.json: {field}: expected a plain output head without it, got {value}"
        with pytest.raises(CompatibilityError, match=expected):
            load_teacher(TeacherConfig(model=str(folder), block_size=8))
    done = build(ground, tmp_path / "cache", named)
    assert done.returncode == 1
    assert expected in done.stderr
    assert not (tmp_path / "cache").exists()


def test_a_head_with_a_bias_is_refused_where_no_family_has_one(
    ground: Path, tmp_path: Path
) -> None:
    """The codec replays biases; the stock classes of today's families compute none."""

    def add_bias(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {"lm_head.bias": torch.ones(448)}, folder / "model.safetensors")

    done = build(ground, tmp_path / "cache", teacher_like(ground, tmp_path / "teacher", add_bias))
    assert done.returncode == 1
    assert "the weights do not fit the config: unexpected tensor lm_head.bias" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cache/codec").exists()


@pytest.mark.parametrize("name", ["head", "hidden"])
def test_a_changed_byte_of_a_codec_file_is_named(ground: Path, tmp_path: Path, name: str) -> None:
    cache = shutil.copytree(ground / "cache", tmp_path / "cache")
    path = cache / f"codec/{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 16
    path.write_bytes(data)
    done = run_command("verify", cache, "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert any(f"codec/{name}.safetensors" in problem for problem in report["problems"])
    values = train_values(ground, tmp_path / "run", tail="auto", max_steps=1)
    message = rf"{cache}/codec/{name}\.safetensors: sha256 mismatch \(expected"
    with pytest.raises(FormatError, match=message):
        train(TrainConfig.model_validate(values), cache)
