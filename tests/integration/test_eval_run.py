"""`tide-eval run` as a user runs it: a real process, a tiny student, local files, no network."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stage2_student.benchmark_tasks.paper_figures import ROWS, paper_row
from stage2_student.benchmark_tasks.plan import BenchmarkConfig, plan_benchmarks
from stage2_student.benchmark_tasks.progress import NoProgress
from stage2_student.benchmark_tasks.protocol import BENCHMARKS, choose_benchmarks
from stage2_student.benchmark_tasks.runner import run_benchmarks
from tests import benchmark_rows as rows
from tests.builders import command_environment
from tests.scripted_students import write_student
from tests.support import PROJECT_ROOT
from tide_cache.errors import ConfigError

FOUR = "gsm8k_cot,bbh,humaneval_instruct,mbpp_instruct"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student"))


def tide_eval(*arguments: str | Path) -> list[str]:
    """The command line of `tide-eval run`, of this checkout rather than of what is installed."""
    start = "from stage2_student.eval_cli import main; main()"
    return [sys.executable, "-c", start, "run", *map(str, arguments)]


def environment() -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "100"}
    return {**command_environment(), **offline, "PYTHONPATH": str(PROJECT_ROOT)}


def finish(*arguments: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        tide_eval(*arguments),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == expect, done.stderr
    return done


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Said(NoProgress):
    """Keeps what a run says, and of each benchmark how many prompts were answered before."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def start(self, num_kept: int, num_prompts: int) -> None:
        self.said.append(f"{num_kept} of {num_prompts}")


@pytest.mark.slow
def test_four_benchmarks_run_from_local_files(
    student: Path, shared_dir: Path, tmp_path: Path
) -> None:
    # A threshold of 0 commits a block a forward: 8 forwards an answer, where the protocol has 256.
    done = finish(
        *("--model", student, "--output", tmp_path, "--tasks", FOUR, "--limit", "2"),
        *("--data", shared_dir / "data", "--run-generated-code", "--batch-size", "9"),
        *("--threshold", "0", "--row", "TIDE-Shared (shared)", "--json"),
    )
    results = json.loads(done.stdout)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["format"] == "tide-eval-results"
    assert [b["task"] for b in results["benchmarks"]] == FOUR.split(",")
    counts = {b["title"]: (b["num_samples"], b["num_rows"]) for b in results["benchmarks"]}
    assert counts == {
        "GSM8K": (2, 1319),
        "BBH": (54, 6511),
        "HumanEval": (2, 164),
        "MBPP": (2, 500),
    }
    for benchmark in results["benchmarks"]:
        assert benchmark["is_limited"]
        assert 0 <= benchmark["score"] <= 100
        assert 0 < benchmark["num_forwards"] <= 8 * benchmark["num_samples"]
        assert benchmark["paper_score"] == paper_row("TIDE-Shared (shared)")[benchmark["title"]]
        samples = lines(tmp_path / "samples" / f"{benchmark['task']}.jsonl")
        assert all(sample["prompt"].count("<think>\n\n</think>\n\n") == 1 for sample in samples)
    assert results["average"] is None
    table = (tmp_path / "results.md").read_text()
    assert "| MBPP | " in table and "2 of 500* | 37.80 | - |" in table
    assert "not all questions were asked (--limit)" in table


@pytest.mark.slow
def test_the_published_number_of_steps_is_taken(student: Path, tmp_path: Path) -> None:
    rows.write_gsm8k(tmp_path / "data")
    config = BenchmarkConfig(
        model=str(student), output=tmp_path, tasks="gsm8k_cot", data=tmp_path / "data", limit=1
    )
    (score,) = run_benchmarks(config).scores
    # No block of this student ends with EOS: 8 blocks of 32 tokens, a forward each token.
    assert score.num_new_tokens % 32 == 0
    assert score.num_forwards >= score.num_new_tokens


@pytest.mark.slow
def test_a_killed_run_goes_on(student: Path, tmp_path: Path) -> None:
    rows.write_gsm8k(tmp_path / "data", num_rows=4)
    arguments = ("--model", student, "--tasks", "gsm8k_cot", "--data", tmp_path / "data")
    journal = tmp_path / "killed" / "answers" / "gsm8k_cot.jsonl"
    process = subprocess.Popen(
        tide_eval(*arguments, "--output", tmp_path / "killed"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline_s = time.monotonic() + 300
    while not journal.exists() or len(journal.read_bytes().splitlines()) < 2:
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "tasks").exists()
    kept = journal.read_bytes()
    whole = kept[: kept.rfind(b"\n") + 1]
    num_kept = len(whole.splitlines())
    assert 2 <= num_kept < 4

    again = finish(*arguments, "--output", tmp_path / "killed")
    assert f"GSM8K: 4 prompts, {num_kept} answered before" in again.stderr
    # What was finished stands as it was, and only the rest was generated.
    assert journal.read_bytes().startswith(whole)
    assert Counter(line["key"] for line in lines(journal)).most_common(1)[0][1] == 1

    finish(*arguments, "--output", tmp_path / "whole", "--batch-size", "4")
    for name in ("killed", "whole"):
        assert len(lines(tmp_path / name / "answers" / "gsm8k_cot.jsonl")) == 4
    assert (tmp_path / "killed" / "samples" / "gsm8k_cot.jsonl").read_bytes() == (
        tmp_path / "whole" / "samples" / "gsm8k_cot.jsonl"
    ).read_bytes()

    third = finish(*arguments, "--output", tmp_path / "killed")
    assert "gsm8k_cot: finished before" in third.stderr
    assert "prompts" not in third.stderr


@pytest.mark.slow
def test_two_devices_give_the_answers_of_one(student: Path, tmp_path: Path) -> None:
    rows.write_hellaswag(tmp_path / "data", 9)
    config = {"model": str(student), "tasks": "hellaswag_gen", "data": tmp_path / "data"}
    found = {}
    for devices in (("cpu",), ("cpu", "cpu")):
        output = tmp_path / str(len(devices))
        results = run_benchmarks(
            BenchmarkConfig(output=output, devices=devices, batch_size=2, **config)  # type: ignore[arg-type]
        )
        samples = (output / "samples" / "hellaswag_gen.jsonl").read_bytes()
        found[devices] = (results.scores[0].score, results.scores[0].num_forwards, samples)
    assert found["cpu",] == found["cpu", "cpu"]


def test_another_setting_or_data_is_scored_anew(student: Path, tmp_path: Path) -> None:
    def said(**changes: Any) -> list[str]:
        progress = Said()
        config = BenchmarkConfig(
            model=str(student),
            output=tmp_path,
            data=tmp_path / "data",
            tasks="hellaswag_gen",
            **changes,
        )
        run_benchmarks(config, progress=progress)
        return progress.said

    path = tmp_path / "tasks" / "hellaswag_gen.json"
    changed = f"hellaswag_gen: {path} is of other settings or data; run again"
    rows.write_hellaswag(tmp_path / "data", 4)
    assert said(limit=2) == ["0 of 2"]
    # The answers to the first questions are still right ones.
    assert said() == [changed, "2 of 4"]
    rows.write_hellaswag(tmp_path / "data", 5)
    assert said() == [changed, "4 of 5"]
    assert said(threshold=0.5) == [changed, "0 of 5"]
    assert said(threshold=0.5, batch_size=3)[0].startswith("hellaswag_gen: finished before")


def test_code_is_left_out_unless_asked_for(shared_dir: Path, tmp_path: Path) -> None:
    arguments = ("--model", "none/x", "--output", tmp_path, "--data", shared_dir / "data")
    plan = finish(*arguments, "--tasks", "gsm8k_cot,mbpp_instruct", "--dry-run", "--json")
    facts = json.loads(plan.stdout)
    assert [b["task"] for b in facts["benchmarks"]] == ["gsm8k_cot"]
    assert facts["benchmarks"][0]["rows"] == 1319
    assert "add --run-generated-code" in facts["left_out"]["mbpp_instruct"]
    refused = finish(*arguments, "--tasks", "mbpp_instruct", "--dry-run", expect=2)
    assert "runs programs that the student wrote" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_all_eight_are_planned(shared_dir: Path, tmp_path: Path) -> None:
    config = BenchmarkConfig(model="none", output=tmp_path, run_generated_code=True)
    planned = [p.as_json() for p in plan_benchmarks(config).planned]
    assert [(p["task"], p["new_tokens"], p["fewshot"], p["sub_tasks"]) for p in planned] == [
        ("gsm8k_cot", 256, 0, 1),
        ("minerva_math", 256, 0, 7),
        ("bbh", 256, 3, 27),
        ("mmlu_pro", 256, 0, 14),
        ("hellaswag_gen", 3, 0, 1),
        ("mmlu_generative_dream", 3, 0, 57),
        ("humaneval_instruct", 256, 0, 1),
        ("mbpp_instruct", 256, 0, 1),
    ]


def test_without_data_the_download_that_fails_is_explained(student: Path, tmp_path: Path) -> None:
    failed = finish("--model", student, "--output", tmp_path, "--tasks", "gsm8k_cot", expect=1)
    assert "gsm8k_cot: lm-eval cannot get its data set" in failed.stderr
    assert "give the files with --data DIR" in failed.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "gsm8k"}, r"no benchmark 'gsm8k' \(did you mean 'gsm8k_cot'\?\)"),
        ({"tasks": " , "}, "expected 'paper' or task names, got none"),
        ({"row": "TIDE-Shared"}, "Table 1 has no row 'TIDE-Shared'"),
        ({"limit": 0}, "limit: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"threshold": 2.0}, "threshold: expected"),
        ({"block_size": 0}, "block_size: expected at least 1, got 0"),
        ({"dtype": "float8"}, "dtype: expected one of auto, float32"),
    ],
)
def test_what_cannot_be_followed_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchmarkConfig(model="m", output="o", **changes)


@pytest.mark.parametrize(
    ("device", "message"), [("tpu9", "no such device: 'tpu9'"), ("cuda:99", "'cuda:99' is not")]
)
def test_a_device_that_is_not_there_is_named(
    student: Path, tmp_path: Path, device: str, message: str
) -> None:
    rows.write_hellaswag(tmp_path / "data", 1)
    config = BenchmarkConfig(
        model=str(student),
        output=tmp_path,
        data=tmp_path / "data",
        tasks="hellaswag_gen",
        devices=(device,),
    )
    with pytest.raises(ConfigError, match=message):
        run_benchmarks(config)


def test_the_papers_averages_follow_from_its_rows() -> None:
    assert len(ROWS) == 8
    for name in ROWS:
        row = paper_row(name)
        assert set(row) == {b.title for b in BENCHMARKS.values()} | {"Avg"}
        mean = sum(row[b.title] for b in BENCHMARKS.values()) / 8
        assert mean == pytest.approx(row["Avg"], abs=0.0051)


def test_paper_and_names_may_be_mixed() -> None:
    assert choose_benchmarks("paper") == tuple(BENCHMARKS.values())
    assert [b.task for b in choose_benchmarks("bbh, gsm8k_cot,bbh")] == ["bbh", "gsm8k_cot"]
