"""`tide-cache calibrate` and `payload: auto` as processes, on a sharp and on an uncertain teacher.

Two teachers of one body whose output heads differ in scale: a few ids hold all the mass of the
sharp one, the other spreads it. Where a word of the config decides, the table has to have shown it.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stage1_teacher.teachers import load_teacher
from stage1_teacher.teachers.base import TeacherConfig
from stage2_student.config import TrainConfig
from stage2_student.trainer import train
from tests.builders import (
    all_files,
    chat_rows,
    make_tokenizer,
    run_command,
    write_chat_jsonl,
    write_yaml,
)
from tests.teacher_checkpoints import make_model, write_checkpoint
from tide_cache.cache import Cache, open_cache
from tide_cache.errors import FormatError
from tide_cache.manifest import CacheManifest
from tide_cache.store import Store
from tide_cache.verify import verify_set

TARGET = 0.9
NUM_POSITIONS = 600
# Of the logits, so that their standard deviation is about 1.7 and 10 nats.
SCALES = {"uncertain": 0.7, "sharp": 4.0}
# Between two samples of 600 positions; measured .004 for these teachers.
SAMPLING = 0.03
LOSS_KEYS = [
    (loss, weight, temperature)
    for temperature in (1.0, 2.0)
    for loss, weight in (
        *(("tidal", weight) for weight in (0.1, 0.5, 0.9)),
        ("kl", None),
        ("reverse_kl", None),
    )
]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, both teachers, their configs, and the caches that auto makes."""
    folder = tmp_path_factory.mktemp("calibrate")
    tokenizer = make_tokenizer(folder)
    write_chat_jsonl(folder / "chat.jsonl", chat_rows(110))
    for name, scale in SCALES.items():
        model = make_model("qwen3", vocab_size=448, hidden_size=64, max_position_embeddings=512)
        model.lm_head.weight.data *= scale
        write_checkpoint(folder / name, "qwen3", model)
        shutil.copytree(tokenizer, folder / name, dirs_exist_ok=True)
        write_yaml(folder / f"{name}.yaml", config_of(folder, name))
    prepare(folder, folder / "premasked")
    for name in SCALES:
        succeed("build", *source(folder, name), "-o", folder / f"{name}-cache", "--workers", "1")
    return folder


def config_of(folder: Path, name: str) -> dict[str, Any]:
    teacher = {"dtype": "float32", "block_size": 8, "token_budget": 2048}
    return {
        "prepare": {
            "sources": str(folder / "chat.jsonl"),
            "student": {"tokenizer": str(folder / "tokenizer"), "max_length": 128},
            "block_size": 8,
            "num_views": 1,
        },
        "build": {
            "teacher": {"model": str(folder / name), **teacher},
            "payload": "auto",
            "fidelity": TARGET,
            "fidelity_positions": NUM_POSITIONS,
            "candidates": {"mean_logits_positions": NUM_POSITIONS},
            "hidden": {"fit_positions": NUM_POSITIONS},
        },
    }


def prepare(folder: Path, output: Path, *more: str) -> None:
    succeed("prepare", folder / "sharp.yaml", "-o", output, "--workers", "1", *more)


def source(ground: Path, name: str) -> tuple[str | Path, ...]:
    return (ground / f"{name}.yaml", "-p", ground / "premasked")


def succeed(*arguments: str | Path) -> str:
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = run_command(*arguments)
    assert done.returncode in (1, 2), done.stdout
    assert "Traceback" not in done.stderr
    return done


def manifest_of(folder: Path) -> CacheManifest:
    manifest = open_cache(folder).manifest
    assert isinstance(manifest, CacheManifest)
    return manifest


def names_of(folder: Path) -> list[str]:
    return [payload.name for payload in manifest_of(folder).payloads]


def test_a_sharp_and_an_uncertain_teacher_get_different_payloads(ground: Path) -> None:
    assert names_of(ground / "sharp-cache") == ["candidates"]
    assert names_of(ground / "uncertain-cache") == ["candidates", "hidden"]
    for name in SCALES:
        report = verify_set(Store(ground / f"{name}-cache"))
        assert report.ok, report.problems


@pytest.mark.parametrize("name", SCALES)
def test_the_manifest_records_what_was_measured_and_inspect_shows_it(
    ground: Path, name: str
) -> None:
    (facts,) = manifest_of(ground / f"{name}-cache").fidelity
    is_sharp = name == "sharp"
    assert facts.setting.startswith("candidates k=32" if is_sharp else "hidden 0.")
    assert facts.tail == ("mean" if is_sharp else "hidden")
    assert facts.target == TARGET
    assert facts.student == "noised teacher"
    assert facts.num_positions >= NUM_POSITIONS
    assert [(x.loss, x.weight, x.temperature) for x in facts.losses] == LOSS_KEYS
    assert TARGET <= facts.worst.cosine <= min(x.cosine for x in facts.losses) < 1
    assert all(0 < x.relative_error < 1 for x in facts.losses)
    shown = json.loads(succeed("inspect", ground / f"{name}-cache", "--json"))
    assert shown["fidelity"] == [facts.model_dump(mode="json")]
    (text,) = shown["fidelity_texts"]
    assert text.startswith(f"gradient cosine {facts.worst.cosine:.4f} or better over 10 losses")
    assert facts.setting in text
    assert text in (ground / f"{name}-cache/README.md").read_text()


def test_the_table_says_why_auto_chose_what_it_chose(ground: Path) -> None:
    """The build measured the same setting by itself, and came to the same figures."""
    table = json.loads(succeed("calibrate", *source(ground, "sharp"), "--json"))
    (facts,) = manifest_of(ground / "sharp-cache").fidelity
    assert table["chosen"] == facts.setting
    assert table["fidelity_target"] == TARGET
    assert table["num_positions"] == facts.num_positions
    assert table["num_fit_positions"] >= NUM_POSITIONS
    default = [line for line in table["settings"] if line["is_default_tail"]]
    good = [line for line in default if line["worst_cosine"] >= TARGET]
    chosen = min(good, key=lambda line: line["bytes_per_position"])
    assert chosen["setting"] == facts.setting
    assert chosen["losses"] == [loss.model_dump() for loss in facts.losses]
    assert chosen["bytes_per_position"] == facts.bytes_per_position
    total = sum(chosen["bytes_by_column"].values())
    assert total == pytest.approx(chosen["bytes_per_position"], abs=0.05)
    by_name = {line["setting"]: line["worst_cosine"] for line in default}
    few_to_many = [by_name[f"candidates k={k} 6 bits"] for k in (16, 32, 64)]
    assert few_to_many == sorted(few_to_many)
    # Renormalised candidates are what others train on: the table says what that does.
    tails = {line["tail"]: line for line in table["settings"] if not line["is_default_tail"]}
    assert set(tails) == {"mean_student", "student", "bucket", "uniform", "none"}
    assert tails["none"]["worst_cosine"] < 0.5 < tails["student"]["worst_cosine"]
    assert tails["bucket"]["losses"] == tails["student"]["losses"]


def test_the_table_is_readable_and_never_refuses(ground: Path) -> None:
    out = succeed("calibrate", *source(ground, "uncertain"), "--set", "fidelity=0.99999")
    assert "against a noised teacher" in out
    lines = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    for setting in ("candidates k=16 6 bits", "hidden 0.001 nats + candidates k=16 8 bits"):
        assert setting in lines
    assert "payload: auto with fidelity 0.99999 takes: none of them" in out


@pytest.mark.parametrize("name", SCALES)
def test_a_finished_cache_keeps_its_promise_on_other_positions(ground: Path, name: str) -> None:
    cache = ground / f"{name}-cache"
    before = all_files(cache)
    found = json.loads(succeed("calibrate", *source(ground, name), "--cache", cache, "--json"))
    (facts,) = manifest_of(cache).fidelity
    assert found["identity"] == open_cache(cache).identity
    assert found["num_positions"] >= NUM_POSITIONS
    assert abs(found["worst_cosine"] - facts.worst.cosine) < SAMPLING
    assert 0 < found["largest_difference"] < SAMPLING  # 0 would be the same positions again
    for line, promise in zip(found["losses"], facts.losses, strict=True):
        assert (line["loss"], line["weight"]) == (promise.loss, promise.weight)
        assert line["promised_cosine"] == promise.cosine
        assert line["promised_relative_error"] == promise.relative_error
    assert all_files(cache) == before


def test_a_dry_run_asks_nothing_of_the_teacher(ground: Path, tmp_path: Path) -> None:
    """Here it could not be asked: the weights are cut short."""
    teacher = shutil.copytree(ground / "sharp", tmp_path / "teacher")
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    broken = (*source(ground, "sharp"), "--set", f"teacher.model={teacher}")
    facts = json.loads(succeed("calibrate", *broken, "--dry-run", "--json"))
    assert facts["dry_run"] is True
    assert NUM_POSITIONS <= facts["num_fit_positions"] < NUM_POSITIONS + 100
    assert NUM_POSITIONS <= facts["num_positions"] < NUM_POSITIONS + 100
    assert 0 < facts["num_rows"] < 110
    with pytest.raises(FormatError, match=r"model\.safetensors: not a whole safetensors file"):
        load_teacher(TeacherConfig(model=str(teacher), block_size=8))


def test_a_fidelity_out_of_reach_names_the_best_setting(ground: Path, tmp_path: Path) -> None:
    done = refused(
        "build", *source(ground, "uncertain"), "-o", tmp_path / "cache", "--workers", "1",
        "--set", "fidelity=0.99999",
    )  # fmt: skip
    assert done.returncode == 2
    assert "fidelity: no payload reaches a gradient cosine of 0.99999" in done.stderr
    assert "the best, hidden 0.001 nats + candidates k=16 8 bits, reaches 0.99" in done.stderr
    assert "'tide-cache calibrate' prints the table" in done.stderr
    assert all_files(tmp_path) == {}


def test_chunks_alone_are_exact_and_not_calibrated(ground: Path) -> None:
    named = ("--set", "payload=null", "--set", "payloads=[chunks]")
    done = refused("calibrate", *source(ground, "sharp"), *named)
    assert "payloads: expected candidates or hidden, got chunks alone" in done.stderr
    assert "nothing to calibrate" in done.stderr


def test_a_cache_of_another_set_is_refused(ground: Path, tmp_path: Path) -> None:
    prepare(ground, tmp_path / "other", "--set", "seed=7")
    cache: Cache = open_cache(ground / "sharp-cache")
    arguments = ("calibrate", ground / "sharp.yaml", "-p", tmp_path / "other", "--cache", cache.url)
    done = refused(*arguments)
    assert (
        "premasked_sha256: expected " + open_cache(tmp_path / "other").identity[:12] in done.stderr
    )
    assert open_cache(ground / "premasked").identity[:12] in done.stderr
    assert "name the set that the cache was built from" in done.stderr


def test_a_cache_of_another_teacher_is_refused(ground: Path) -> None:
    cache = ground / "uncertain-cache"
    done = refused("calibrate", *source(ground, "sharp"), "--cache", cache)
    expected = manifest_of(cache).teacher_model.weights_sha256
    assert f"weights_sha256: expected {expected[:12]}… (of uncertain), got" in done.stderr
    assert "(of sharp)" in done.stderr
    assert "set teacher.model to the teacher that the cache was built with" in done.stderr


def test_a_students_checkpoint_is_measured_against_and_named(ground: Path, tmp_path: Path) -> None:
    config = TrainConfig.model_validate(
        {
            "output": str(tmp_path / "run"),
            "student": {
                "init": "random",
                "tokenizer": str(ground / "tokenizer"),
                "architecture": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
            },
            "stream": {"batch_size": 8},
            "max_steps": 1,
            "device": "cpu",
        }
    )
    student = train(config, ground / "sharp-cache").final
    named = ("--set", "payload=null", "--set", "payloads=[candidates]", "--set", "candidates.k=32")
    succeed(
        "build", *source(ground, "sharp"), "-o", tmp_path / "cache", "--workers", "1", *named,
        "--set", f"student={student}",
    )  # fmt: skip
    (facts,) = manifest_of(tmp_path / "cache").fidelity
    assert facts.student == "final"
    assert facts.target is None
    (noised,) = manifest_of(ground / "sharp-cache").fidelity
    assert facts.setting == noised.setting
    assert facts.losses != noised.losses
