"""What does not fit is refused in one line, before a model is loaded.

Most students here have a config and a tokenizer but no weights at all: a run that came as far as
loading them would fail with another error.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stage2_student.cli import main
from stage2_student.release.released_format import released_config
from tests.cache_builders import (
    SetShape,
    Workshop,
    make_workshop,
    save_tokenizer,
    write_cache,
    write_premasked,
)
from tests.unit.test_signing import make_key
from tests.unit.test_student import tiny_config
from tide_cache.signing import sign_set
from tide_cache.store import Store

SHAPE = SetShape(num_samples=8, block_size=4)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("workshop"), SHAPE)


def weightless_student(folder: Path, **config: Any) -> Path:
    """A released student of which only config and tokenizer were downloaded."""
    import torch

    save_tokenizer(folder)
    num_rows = config.pop("vocab_size", 64)
    values = released_config(tiny_config(vocab_size=num_rows), dtype=torch.float32)
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def refuse(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    config: Path,
    cache: Path,
    *options: str,
) -> tuple[int, str]:
    """Run the real command; return its exit code and what stands on stderr, on one line."""
    command = ["tide-train", str(config), "--cache", str(cache), *options]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    return int(stop.value.code or 0), " ".join(shown.err.split())


def expect(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cache: Path,
    words: list[str],
    *,
    code: int = 1,
    student: dict[str, Any] | None = None,
    **changes: Any,
) -> None:
    student = student or {"init": str(weightless_student(tmp_path / "student"))}
    values = Workshop(folder=tmp_path).config(student=student, **changes)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    found, text = refuse(capsys, monkeypatch, path, cache)
    assert found == code
    for word in words:
        assert word in text
    assert not (tmp_path / "run").exists()


def test_the_weightless_student_comes_as_far_as_its_weights(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["student/model.safetensors: no such file", "safetensors only"]
    expect(capsys, monkeypatch, tmp_path, workshop.cache, words, code=2)


def test_another_tokenizer(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = weightless_student(tmp_path / "student")
    save_tokenizer(student, letters="gfedcba")
    words = ["student.sha256: made for the tokenizer 'tiny' (", "got that of", "prepare and build"]
    expect(capsys, monkeypatch, tmp_path, workshop.cache, words, student={"init": str(student)})


def test_a_vocabulary_that_the_student_cannot_embed(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide = tmp_path / "wide"
    facts = {"name": "tiny", "mask_token_id": 39, "eos_token_id": 1, "pad_token_id": 0}
    student = weightless_student(tmp_path / "student", vocab_size=40)
    from tests.cache_builders import tokenizer_facts

    real = tokenizer_facts(student)
    wider = real.model_copy(update={**facts, "vocab_size": 41})
    write_premasked(wide, student, SHAPE, student=wider)
    words = ["student.vocab_size: the set has ids up to 40", "embeds 40", "start from a checkpoint"]
    expect(
        capsys,
        monkeypatch,
        tmp_path,
        wide,
        words,
        student={"init": str(student)},
        objective={"losses": ["ce"]},
    )


def test_a_mask_token_of_another_id(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.cache_builders import tokenizer_facts

    student = weightless_student(tmp_path / "student")
    moved = tokenizer_facts(student).model_copy(update={"mask_token_id": 38})
    write_premasked(tmp_path / "moved", student, SHAPE, student=moved)
    words = ["student.mask_token_id: expected 38, got 39", "set student.mask_token"]
    expect(
        capsys,
        monkeypatch,
        tmp_path,
        tmp_path / "moved",
        words,
        student={"init": str(student)},
        objective={"losses": ["ce"]},
    )


@pytest.mark.parametrize("loss", ["tidal", "kl", "reverse_kl", "taid_aligned"])
def test_a_temperature_that_was_not_built(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
) -> None:
    objective = {"losses": [loss], "temperature": 5.0}
    words = ["objective.temperature: the cache was built for 1, 2, got 5", "build the cache again"]
    expect(capsys, monkeypatch, tmp_path, workshop.cache, words, objective=objective)


def test_cross_entropy_asks_for_no_temperature(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective = {"losses": ["ce"], "temperature": 5.0}
    words = ["model.safetensors: no such file"]
    expect(capsys, monkeypatch, tmp_path, workshop.cache, words, code=2, objective=objective)


def test_distillation_from_a_premasked_set(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [
        "objective.losses: 'tidal' needs a teacher's answers (payload 'candidates')",
        "run 'tide-cache build'",
    ]
    expect(capsys, monkeypatch, tmp_path, workshop.premasked, words)


def test_a_loss_over_a_payload_that_the_cache_lacks(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["'reverse_calm' needs the payload 'chunks', the cache holds candidates"]
    objective = {"losses": {"ce": 1.0, "reverse_alm": 1.0}}
    expect(capsys, monkeypatch, tmp_path, workshop.cache, words, objective=objective)


@pytest.mark.parametrize("said_by", ["config", "checkpoint"])
def test_another_block_size(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    said_by: str,
) -> None:
    config = {"block_size": 8} if said_by == "checkpoint" else {}
    student: dict[str, Any] = {"init": str(weightless_student(tmp_path / "student", **config))}
    if said_by == "config":
        student["block_size"] = 8
    words = ["block_size: the set was made for 4", "has 8", "set student.block_size: 4"]
    expect(capsys, monkeypatch, tmp_path, workshop.cache, words, student=student)


def test_a_checkpoint_of_other_blocks_trains_on_when_asked(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    init = str(weightless_student(tmp_path / "student", block_size=8))
    words = ["model.safetensors: no such file"]
    student = {"init": init, "block_size": 4}
    expect(capsys, monkeypatch, tmp_path, workshop.cache, words, code=2, student=student)


def test_a_tail_without_its_mean_logits(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_cache(tmp_path / "cache", workshop.premasked, k=4)
    words = ["objective.tail: 'mean' needs the teacher's mean logits", "tail: uniform"]
    objective = {"losses": ["tidal"], "tail": "mean"}
    expect(capsys, monkeypatch, tmp_path, tmp_path / "cache", words, objective=objective)


def test_a_set_of_another_format_version(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_cache(tmp_path / "cache", workshop.premasked)
    path = tmp_path / "cache/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 7}))
    words = ["format_version: this program reads 1, 2 and 3, got 7", "install a newer tide-cache"]
    expect(capsys, monkeypatch, tmp_path, tmp_path / "cache", words)


def test_no_set_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["no manifest.json: not a cache or premasked set"]
    expect(capsys, monkeypatch, tmp_path, tmp_path / "nowhere", words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": {"learning_rat": 1}}, ["optimizer.learning_rat", "'learning_rate'"]),
        ({"objective": {"losses": {"tidle": 1.0}}}, ["got 'tidle'", "did you mean 'tidal'"]),
        ({"objective": {"losses": ["tidal", "taid"]}}, ["loss 'tidal' is given twice"]),
        ({"objective": {"losses": {"ce": 0.0}}}, ["at least one loss with a weight above 0"]),
        ({"objective": {"losses": {"ce": -1.0}}}, ["weight of 'ce': expected 0 or more, got -1"]),
        ({"epochs": 2}, ["exactly one of the keys epochs and max_steps"]),
        ({"stream": {"batch_size": 0}}, ["stream.batch_size", "got 0"]),
        ({"precision": "fp16"}, ["precision", "'float32' or 'bf16'", "got 'fp16'"]),
    ],
)
def test_a_config_that_cannot_be_meant(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    words: list[str],
) -> None:
    expect(capsys, monkeypatch, tmp_path, workshop.cache, words, code=2, **changes)


def test_a_tracker_that_is_not_installed(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import of a missing package sees
    metrics = {"report_to": ["wandb"]}
    words = ["metrics.report_to: wandb is not installed", "pip install 'tide-cache[wandb]'"]
    expect(capsys, monkeypatch, tmp_path, workshop.cache, words, metrics=metrics)


def test_only_what_the_owner_of_a_key_signed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = make_workshop(tmp_path / "workshop", SHAPE)
    private, public = make_key(tmp_path)
    config = workshop.write_config(output=str(tmp_path / "run"))
    options = ["--dry-run", "--json", "--public-key", str(public)]
    code, text = refuse(capsys, monkeypatch, config, workshop.cache, *options)
    assert code
    assert "cache.sig" in text
    sign_set(Store(workshop.cache), private)
    monkeypatch.setattr(
        sys, "argv", ["tide-train", str(config), "--cache", str(workshop.cache), *options]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, capsys.readouterr().err
    capsys.readouterr()
    (workshop.cache / "notes.txt").write_text("one file too many")
    code, text = refuse(capsys, monkeypatch, config, workshop.cache, *options)
    assert code
    assert "notes.txt" in text


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = workshop.write_config(output=str(tmp_path / "run"))
    command = ["tide-train", str(config), "--cache", str(workshop.cache), "--dry-run", "--json"]
    monkeypatch.setattr(sys, "argv", [*command, "--set", "stream.batch_size=4"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps_per_epoch"], plan["max_steps"], plan["losses"]["tidal"]) == (2, 12, 1.0)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_checks_the_weights_too(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = {"init": str(weightless_student(tmp_path / "student"))}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(workshop.config(student=student)))
    code, text = refuse(capsys, monkeypatch, path, workshop.cache, "--dry-run")
    assert code == 2
    assert "model.safetensors: no such file" in text
