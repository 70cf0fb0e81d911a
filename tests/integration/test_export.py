"""`tide-train export`: what it takes, what it writes, what it refuses, and the way to the hub."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stage2_student.config import TrainConfig
from stage2_student.metrics import read_metrics
from stage2_student.release.export import export, plan_export
from stage2_student.release.push import open_hub
from stage2_student.release.training_record import read_record
from stage2_student.trainer import train
from tests.builders import all_files, assert_same_files
from tests.cache_builders import SetShape, Workshop, make_workshop
from tests.hub_servers import hub_server
from tests.support import PROJECT_ROOT
from tide_cache.errors import CompatibilityError, ConfigError, TideError

URL = "hf://lab/student"
FILES = {
    "README.md",
    "config.json",
    "model.safetensors",
    "modeling_a2d_qwen3.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    workshop = make_workshop(tmp_path_factory.mktemp("workshop"), SetShape(num_samples=20))
    run(workshop, "run")
    return workshop


def run(workshop: Workshop, name: str, **changes: Any) -> Path:
    output = workshop.folder / name
    config = workshop.config(output=str(output), max_steps=6, checkpoints={"every": 2})
    train(TrainConfig.model_validate({**config, **changes}), workshop.cache)
    return output


def command(
    *arguments: str | Path, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "stage2_student", *map(str, arguments)],
        cwd=PROJECT_ROOT,
        env={**(environment or os.environ), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def succeed(*arguments: str | Path, environment: dict[str, str] | None = None) -> dict[str, Any]:
    done = command(*arguments, "--json", environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def test_a_run_is_exported_and_starts_another_with_the_same_loss(
    workshop: Workshop, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    plan = succeed("export", workshop.folder / "run", "-o", output, "--dry-run")
    assert not output.exists()
    facts = succeed("export", workshop.folder / "run", "-o", output)
    assert {name: facts[name] for name in ("source", "steps", "num_parameters", "dtype")} == {
        name: plan[name] for name in ("source", "steps", "num_parameters", "dtype")
    }
    assert facts["source"].endswith("run/final")
    assert (facts["steps"], facts["max_difference"]) == (6, 0)
    assert {path.name for path in output.iterdir()} == FILES
    kept = load_file(workshop.folder / "run/final/model.safetensors")
    for name, tensor in load_file(output / "model.safetensors").items():
        assert torch.equal(tensor, kept[name])
    losses = []
    for name, init in (("a", workshop.folder / "run/final"), ("b", output)):
        student = {"init": str(init)}
        second = run(workshop, f"second-{name}", student=student, max_steps=1)
        losses.append(read_metrics(second / "metrics.jsonl")[0]["loss"])
        record = read_record(second / "final")
        assert record is not None
        assert (record.student.init, record.student.is_hub_name) == (init.name, False)
    assert losses[0] == losses[1]
    before = all_files(output)
    succeed("export", workshop.folder / "run", "-o", output)  # again: the same bytes
    assert all_files(output) == before


def test_the_newest_checkpoint_stands_in_for_a_run_that_was_stopped(
    workshop: Workshop, tmp_path: Path
) -> None:
    stopped = tmp_path / "stopped"
    shutil.copytree(workshop.folder / "run", stopped)
    shutil.rmtree(stopped / "final")
    shutil.rmtree(stopped / "checkpoints/step-00000006")
    report = export(plan_export(stopped), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES  # no optimiser
    record = read_record(tmp_path / "out")
    assert record is not None
    assert (record.steps_done, record.max_steps) == (4, 6)
    assert "step 4 of 6 (a checkpoint" in (tmp_path / "out/README.md").read_text()
    assert report.max_difference == 0


def test_weights_and_moments_of_few_bits(workshop: Workshop, tmp_path: Path) -> None:
    student = {**workshop.config()["student"], "dtype": "bfloat16"}
    low = run(workshop, "low-bit", student=student, optimizer={"state": "8bit"}, precision="bf16")
    for source in (low, low / "checkpoints/step-00000004"):
        output = tmp_path / source.name
        assert export(plan_export(source), output).max_difference == 0
        stored = load_file(output / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    wide = export(plan_export(low, dtype="float32"), tmp_path / "wide")
    assert wide.max_difference == 0
    assert {t.dtype for t in load_file(tmp_path / "wide/model.safetensors").values()} == {
        torch.float32
    }


@pytest.mark.slow
def test_a_run_whose_weights_were_spread_over_ranks(workshop: Workshop, tmp_path: Path) -> None:
    config = workshop.write_config(
        output=str(tmp_path / "run"), max_steps=4, checkpoints={"every": 2}
    )
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [
            *(sys.executable, *launch, "-m", "tests.watched_training"),
            *(str(config), "--cache", str(workshop.cache), "--json"),
        ],
        cwd=PROJECT_ROOT,
        env={**os.environ, "SHARDED": "1", "OMP_NUM_THREADS": "1", "KILL_BEHIND": "0"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for source in (tmp_path / "run", tmp_path / "run/checkpoints/step-00000002"):
        report = export(plan_export(source), tmp_path / "out")
        assert report.max_difference == 0
        record = read_record(tmp_path / "out")
        assert record is not None
        assert record.num_ranks == 2


def test_benchmarks_go_into_the_card(workshop: Workshop, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"results": {"bbh": {"acc": 0.5}}}))
    output = tmp_path / "out"
    succeed("export", workshop.folder / "run", "-o", output, "--results", results)
    assert "| bbh | - | acc | 0.5000 |" in (output / "README.md").read_text()


def test_a_folder_with_other_files_is_left_alone(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = command("export", workshop.folder / "run", "-o", tmp_path)
    assert done.returncode == 2
    assert "holds files that are no export's (first: thesis.tex)" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    for output in (workshop.folder / "run/final", workshop.folder / "run", workshop.folder):
        with pytest.raises(ConfigError, match="holds the student that is exported"):
            export(plan_export(workshop.folder / "run"), output)


def test_weights_that_are_no_numbers_are_not_handed_on(workshop: Workshop, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(workshop.folder / "run/final", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TideError, match=r"logits differ from the checkpoint's by nan .*nothing"):
        export(plan_export(broken), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("spoil", "error", "told"),
    [
        ({"model_type": "qwen3"}, CompatibilityError, "model_type: expected 'a2d-qwen3', got"),
        ({"hidden_size": 8}, CompatibilityError, "tensors do not fit config.json"),
        ({"dtype": "float16"}, CompatibilityError, "dtype: expected float32 or bfloat16"),
        (None, ConfigError, "holds no student"),
    ],
)
def test_what_is_no_student_is_refused(
    workshop: Workshop,
    tmp_path: Path,
    spoil: dict[str, Any] | None,
    error: type[TideError],
    told: str,
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(workshop.folder / "run/final", folder)
    path = folder / "config.json"
    if spoil is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **spoil}))
    with pytest.raises(error, match=told):
        plan_export(folder)


def test_training_needs_no_word_for_itself(workshop: Workshop) -> None:
    shown = command("--help").stdout
    for words in ("export", "Train a student from a teacher cache, or go on", "--cache", "--plan"):
        assert words in shown
    config = workshop.write_config()
    plain = command(config, "--cache", workshop.cache, "--dry-run", "--json")
    named = command("train", config, "--cache", workshop.cache, "--dry-run", "--json")
    leading = command("--cache", workshop.cache, config, "--dry-run", "--json")
    assert plain.returncode == 0, plain.stderr
    assert json.loads(plain.stdout)["max_steps"] == 12
    assert plain.stdout == named.stdout == leading.stdout


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    with hub_server(tmp_path / "hub") as environment:
        yield environment


def commits(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "commits.jsonl").read_text().splitlines()]


def test_weights_first_config_and_card_last_and_back(
    workshop: Workshop, hub: dict[str, str], tmp_path: Path
) -> None:
    arguments = ("export", workshop.folder / "run", "-o", tmp_path / "out", "--push", URL)
    succeed(*arguments, "--dry-run", environment=hub)
    assert not (tmp_path / "hub/created.json").exists()
    facts = succeed(*arguments, environment=hub)
    assert facts["push"]["num_to_send"] == len(FILES)
    assert_same_files(tmp_path / "hub/files", tmp_path / "out")
    made = commits(tmp_path / "hub")
    assert sorted(made[-1]["files"]) == ["file README.md", "file config.json"]
    assert "file config.json" not in made[0]["files"]
    created = json.loads((tmp_path / "hub/created.json").read_text())
    assert created.get("private") or created.get("visibility") == "private"
    assert created["name"] == "student"
    assert created.get("type", "model") == "model"
    assert 'name = "lab/student"' in (tmp_path / "hub/files/README.md").read_text()
    again = succeed(*arguments, environment=hub)
    assert again["push"]["num_to_send"] == 0
    assert len(commits(tmp_path / "hub")) == len(made)
    # A run that names it begins with it.
    config = workshop.write_config(
        output=str(tmp_path / "second"), student={"init": "lab/student"}, max_steps=1
    )
    summary = succeed(config, "--cache", workshop.cache, environment=hub)
    config = workshop.write_config(
        output=str(tmp_path / "third"), student={"init": str(tmp_path / "out")}, max_steps=1
    )
    third = succeed(config, "--cache", workshop.cache)
    assert summary["last_metrics"]["loss"] == third["last_metrics"]["loss"]
    card = (tmp_path / "second/final/README.md").read_text()
    assert "base_model: lab/student" in card
    assert "- initial weights lab/student: those-of-its-sources" in card


def test_a_push_that_the_hub_refuses_half_way_goes_on(
    workshop: Workshop, hub: dict[str, str], tmp_path: Path
) -> None:
    arguments = ("export", workshop.folder / "run", "-o", tmp_path / "out", "--push", URL)
    (tmp_path / "hub/refuse").write_text("Config")
    done = command(*arguments, environment=hub)
    assert done.returncode == 1
    assert f"{URL}/config.json: the hub refuses or does not answer" in done.stderr
    assert "hf_secret" not in done.stderr + done.stdout
    assert not (tmp_path / "hub/files/config.json").exists()
    facts = succeed(*arguments, "--public", environment=hub)
    assert facts["push"]["num_to_send"] == 2  # card and config: nothing is sent twice
    assert_same_files(tmp_path / "hub/files", tmp_path / "out")


def test_another_student_is_replaced_when_asked(
    workshop: Workshop, hub: dict[str, str], tmp_path: Path
) -> None:
    run_folder = workshop.folder / "run"
    succeed("export", run_folder, "-o", tmp_path / "a", "--push", "lab/student", environment=hub)
    other = ("export", run_folder / "checkpoints/step-00000004", "-o", tmp_path / "b")
    done = command(*other, "--push", URL, environment=hub)
    assert done.returncode == 1
    assert "files there have other bytes" in done.stderr
    assert_same_files(tmp_path / "hub/files", tmp_path / "a")
    num_before = len(commits(tmp_path / "hub"))
    succeed(*other, "--push", URL, "--replace", environment=hub)
    assert_same_files(tmp_path / "hub/files", tmp_path / "b")
    # Between the two nobody finds half of each: the config goes first and comes last.
    later = commits(tmp_path / "hub")[num_before:]
    assert later[0]["files"] == ["deletedFile config.json"]
    assert "file config.json" in later[-1]["files"]


@pytest.mark.parametrize("place", ["lab", "hf://datasets/lab/student", "s3://lab/student", "a//b"])
def test_places_that_are_no_model_of_the_hub(place: str) -> None:
    with pytest.raises(ConfigError, match="expected hf://USER/NAME"):
        open_hub(place)
