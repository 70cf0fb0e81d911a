"""The commands behind the paper's tables: complete, in order, each what its program reads."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.paper.cells import FOLDER
from examples.paper.projection import training_flops
from examples.paper.run import run_step
from examples.paper.steps import Options, Step, evaluated_models, plan_steps
from examples.paper.tables import markdown, read_scores, read_table_3
from stage1_teacher.payload_config import BuildConfig
from stage2_student.benchmark_tasks.protocol import BENCHMARKS
from stage2_student.config import TrainConfig
from stage2_student.memory_plan import model_size
from tests.builders import command_environment
from tests.support import PROJECT_ROOT
from tide_cache.config import load_config
from tide_cache.errors import FormatError, TideError

OUTPUT = Path("runs/paper")


def names(options: Options, stage: str) -> list[str]:
    return [step.name for step in plan_steps(options) if step.stage == stage]


def after(step: Step, option: str) -> str:
    return step.command[step.command.index(option) + 1]


def test_one_cache_per_pipeline_serves_all_students_of_table_1() -> None:
    options = Options(output=OUTPUT, tables=(1,))
    assert names(options, "build") == ["shared: cache", "cross: cache"]
    training = [step for step in plan_steps(options) if step.stage == "train"]
    assert len(training) == 6
    assert {after(step, "--cache") for step in training} == {
        "runs/paper/shared/cache",
        "runs/paper/cross/cache",
    }
    assert names(options, "evaluate") == [
        "AR, gsm8k_cot,minerva_math,mmlu_pro,hellaswag_gen,mmlu_generative_dream",
        "AR, bbh",
        "BD3LM",
        *("shared: KL", "shared: TIDE-Cross", "shared: TIDE-Shared"),
        *("cross: CALM", "cross: TIDE-Shared", "cross: TIDE-Cross"),
    ]


def test_tables_as_published_bring_the_plain_caches_of_the_same_premasked_sets() -> None:
    options = Options(output=OUTPUT, tables=(1, 2), caches="both")
    builds = [step for step in plan_steps(options) if step.stage == "build"]
    assert [step.name for step in builds] == [
        "shared: cache",
        "shared: cache-plain",
        "cross: cache",
        "cross: cache-plain",
    ]
    for step in builds:
        assert after(step, "-p") == f"runs/paper/{step.pipeline}/premasked"
        config = load_config(PROJECT_ROOT / step.command[2], BuildConfig, section="build")
        assert config.comp_demo == (not after(step, "-o").endswith("plain"))
    assert len(names(options, "train")) == 13


def test_every_step_comes_behind_what_it_reads() -> None:
    made: set[str] = set()
    for step in plan_steps(Options(output=OUTPUT, tables=(1, 2, 3), caches="both")):
        words = set(step.command)
        if step.stage == "build":
            assert after(step, "-p") in made
            made.add(after(step, "-o"))
        elif step.stage == "prepare":
            made.add(after(step, "-o"))
        elif step.stage == "train":
            assert after(step, "--cache") in made
            config = load_config(PROJECT_ROOT / step.command[1], TrainConfig, section="train")
            assert config.epochs == 10
            made.add(after(step, "--set").removeprefix("output=") + "/final")
        elif step.command[0] == "tide-eval" and after(step, "--model").startswith("runs"):
            assert words & made


def test_released_students_are_evaluated_without_any_training() -> None:
    steps = plan_steps(Options(output=OUTPUT, tables=(1,), released=True))
    assert {step.stage for step in steps} == {"evaluate"}
    assert sum("TIDE-dllm/" in step.text for step in steps) == 6


def test_overrides_reach_the_commands_of_their_section_and_pipeline() -> None:
    options = Options(
        output=OUTPUT,
        tables=(1,),
        overrides=("prepare.max_samples=9", "cross.build.teacher.model=here", "train.epochs=1"),
    )
    for step in plan_steps(options):
        assert ("max_samples=9" in step.command) == (step.stage == "prepare")
        is_cross_build = step.stage == "build" and step.pipeline == "cross"
        assert ("teacher.model=here" in step.command) == is_cross_build
        assert ("epochs=1" in step.command) == (step.stage == "train")


def test_the_plan_prints_without_weights_data_or_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.paper.run", "all", "--dry-run", "--json"]
    result = subprocess.run(
        [*command, "-o", str(tmp_path)],
        cwd=PROJECT_ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert len(plan) == len(plan_steps(Options(output=tmp_path)))
    by_stage = {step["stage"]: step for step in plan}
    assert by_stage["build"]["note"] == "not before its set is prepared, which needs no GPU"
    assert by_stage["evaluate"]["gpu_hours"] == pytest.approx(44.8, abs=0.1)
    assert list(tmp_path.iterdir()) == []


def write_results(folder: Path, score: float, **changes: Any) -> None:
    folder.mkdir(parents=True)
    rows = [
        {"title": benchmark.title, "score": score, "is_limited": False} | changes
        for benchmark in BENCHMARKS.values()
    ]
    (folder / "results.json").write_text(json.dumps({"benchmarks": rows}))


def test_tables_put_scores_beside_the_papers(tmp_path: Path) -> None:
    options = Options(output=tmp_path, pipelines=("shared",), tables=(1, 2))
    write_results(tmp_path / "scores/shared/kl", 31.5)
    write_results(tmp_path / "scores/shared/tide_shared", 33.0)
    write_results(tmp_path / "scores/shared/no_comp_demo", 30.0, is_limited=True)
    part = tmp_path / "scores/AR/part-0/model"
    part.mkdir(parents=True)
    results = {"gsm8k_cot": {"exact_match,flexible-extract": 0.6, "alias": "gsm8k_cot"}}
    (part / "results_2026.json").write_text(json.dumps({"results": results}))
    scored = {row.model.folder.name: row for row in read_scores(options)}
    assert scored["kl"].average == 31.5
    assert scored["AR"].scores == {"GSM8K": 60.0}
    assert scored["no_comp_demo"].scores == {}  # not all questions were asked
    text = " ".join(markdown(list(scored.values()), options).replace("|", " ").split())
    assert "GSM8K 60.00 (59.60) - (45.56) 31.50 (43.97) - (45.03) 33.00 (48.98)" in text
    assert "Average - (40.91) - (32.67) 31.50 (30.55) - (30.79) 33.00 (33.55)" in text
    second = text[text.index("## Table 2") :]
    assert second.count("TIDE-Shared") == 1
    assert "Average - - - 33.00 (33.55)" in second


def test_a_foreign_results_file_is_named(tmp_path: Path) -> None:
    options = Options(output=tmp_path, pipelines=("shared",), tables=(1,))
    folder = tmp_path / "scores/shared/kl"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    with pytest.raises(FormatError, match=r"kl/results.json: expected what tide-eval run writes"):
        read_scores(options)


def test_rows_of_both_tables_are_evaluated_once() -> None:
    folders = [m.folder for m in evaluated_models(Options(output=OUTPUT, caches="both"))]
    assert len(folders) == len(set(folders)) == 2 + 10 + 3


def test_a_command_that_fails_stops_the_run_and_says_how_to_go_on() -> None:
    step = Step(stage="verify", name="a cache", command=("python", "-c", "raise SystemExit(3)"))
    with pytest.raises(TideError, match=r"verify a cache: the command ended with 3; run the same"):
        run_step(step)


def test_lm_evals_finished_runs_are_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/results_1.json").write_text("{}")
    command = ("python", "-c", "raise SystemExit(3)")
    run_step(Step(stage="evaluate", name="AR", command=command, results=tmp_path))


def test_training_operations_of_a_small_student_are_those_that_torch_counts() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=320, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    ids = torch.randint(320, (1, 32))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    # 32 tokens are both halves of 16 positions, and the head reads all of them.
    counted = training_flops(model_size(config), num_positions=16, num_masked=32)
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.05)


def test_table_3_is_measured_once_and_its_output_kept(tmp_path: Path) -> None:
    (step,) = (s for s in plan_steps(Options(output=tmp_path, tables=(3,))) if s.stage == "measure")
    assert step.text.endswith(f"--table3 --preset real --json > {tmp_path / 'table3.json'}")
    row = {
        "name": "student, fast sampler",
        "parameters": 596049920,
        "peak_bytes": 1.4e9,
        "latency_s": 6.25,
        "tokens_per_s": 40.96,
        "ratio_to_ar": 0.8,
    }
    program = f"print({json.dumps(json.dumps([row]))})"
    run_step(replace(step, command=("python", "-c", program)))
    run_step(replace(step, command=("python", "-c", "raise SystemExit(3)")))  # done before
    options = Options(output=tmp_path, tables=(3,))
    rows = read_table_3(options)
    assert rows == [row]
    text = " ".join(markdown([], options, rows).replace("|", " ").split())
    assert "student, fast sampler 596,049,920 1.4 6.25 41.0 0.80" in text


def test_the_sizes_for_projections_hold_no_more_than_a_config() -> None:
    files = [path.name for path in sorted((FOLDER / "sizes").rglob("*")) if path.is_file()]
    assert files == ["config.json", "config.json"]
