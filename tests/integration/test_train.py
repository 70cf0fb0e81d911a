"""Whole training runs on tiny sets: what is minimised, what is written, what is reported."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import Qwen3ForCausalLM

from stage2_student.attention import BY_ROWS
from stage2_student.batches import Batch, BatchReader, InputForm
from stage2_student.compatibility import teacher_reading
from stage2_student.config import TrainConfig
from stage2_student.evaluate import evaluate
from stage2_student.losses import calm_loss, ce_loss, kl_loss, tidal_loss
from stage2_student.metrics import MEASURED_KEYS, read_metrics
from stage2_student.objective import Objective
from stage2_student.objective_config import ObjectiveConfig
from stage2_student.optimizer import OptimizerConfig, learning_rate
from stage2_student.plan import describe, open_run
from stage2_student.student import Student, load_model
from stage2_student.student_source import read_model_config
from stage2_student.trainer import TrainSummary, train
from tests.cache_builders import (
    MASK_ID,
    SetShape,
    Workshop,
    active_chunks,
    make_workshop,
    teacher_chunk_logprobs,
    teacher_logits,
    write_cache,
    write_premasked,
)
from tests.support import PROJECT_ROOT
from tide_cache.cache import Cache, open_cache
from tide_cache.errors import TideError
from tide_cache.geometry import block_diffusion_mask
from tide_cache.rows import PremaskedRow, table_to_rows

SHAPE = SetShape(num_samples=50, ragged=True, lone_share=0.3)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("workshop"), SHAPE)


def run(workshop: Workshop, output: Path, **changes: Any) -> TrainSummary:
    config = TrainConfig.model_validate(workshop.config(output=str(output), **changes))
    cache = workshop.premasked if "premasked" in output.name else workshop.cache
    return train(config, cache)


def metrics_of(output: Path) -> list[dict[str, Any]]:
    lines = read_metrics(output / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in MEASURED_KEYS} for line in lines]


def load_final(output: Path) -> Qwen3ForCausalLM:
    values = json.loads((output / "final/config.json").read_text())
    config = read_model_config(values, where="final")
    return load_model(
        output / "final", config, dtype=torch.float32, attention_implementation=BY_ROWS
    ).eval()


def test_the_command_trains_and_reports(workshop: Workshop, tmp_path: Path) -> None:
    config = workshop.write_config(output=str(tmp_path / "run"), max_steps=60)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "stage2_student", str(config)),
            *("--cache", str(workshop.cache), "--json"),
            *("--set", "optimizer.learning_rate=0.01", "--set", "checkpoints.keep=1"),
        ],
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    summary = json.loads(result.stdout)  # nothing but the summary on stdout
    assert summary["steps"] == 60
    assert "train: step 60 of 60, loss" in result.stderr
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 61))
    first, later = (
        sum(line["loss/ce"] for line in lines if line["epoch"] == epoch) for epoch in (0, 6)
    )
    assert later < 0.8 * first  # the same view of the same rows
    assert {line["view"] for line in lines if line["epoch"] % 2 == 0} == {0}
    assert {line["view"] for line in lines if line["epoch"] % 2 == 1} == {1}
    assert max(line["epoch"] for line in lines) == 8
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000060"]
    kept = ["checkpoints", "final", "metrics.jsonl", "summary.json"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == kept
    rates = [learning_rate(OptimizerConfig(learning_rate=0.01), step, 60) for step in range(60)]
    assert [line["learning_rate"] for line in lines] == rates


def batch_of(cache: Cache, view: int, rows: Any, loss: str = "tidal") -> Batch:
    form = InputForm(
        block_size=cache.manifest.block_size,
        mask_token_id=MASK_ID,
        attention=BY_ROWS,
        device=torch.device("cpu"),
    )
    reading = teacher_reading(cache, ObjectiveConfig.model_validate({"losses": [loss]}))
    return BatchReader(cache, form=form, teacher=reading).read(view, rows)


@pytest.mark.parametrize("name", ["ce", "tidal", "kl", "reverse_kl"])
@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
def test_each_term_is_the_loss_that_outside_programs_call(
    workshop: Workshop, name: str, norm: str
) -> None:
    """At k = V against the teacher's own logits, which never went through a cache."""
    cache = open_cache(workshop.cache)
    numbers = np.arange(3, 40)
    batch = batch_of(cache, 1, numbers)
    rows = table_to_rows(cache.read_rows(1, numbers), "positions")
    teacher_QV = torch.from_numpy(np.concatenate([teacher_logits(row) for row in rows]))
    generator = torch.Generator().manual_seed(0)
    hidden_PD = torch.randn(batch.num_masked, 16, generator=generator)
    head_VD = torch.randn(40, 16, generator=generator)
    objective = Objective(
        ObjectiveConfig.model_validate({"losses": {name: 3.0}, "loss_norm": norm})
    )
    losses = objective(hidden_PD, head_VD, batch, objective.denominators(batch), progress=0.3)
    logits_PV = hidden_PD @ head_VD.T
    logits_QV = logits_PV[batch.teacher.index_Q]
    timestep_Q = batch.timestep_P[batch.teacher.index_Q]
    online = {
        "ce": lambda: ce_loss(
            logits_PV,
            batch.labels_P,
            batch.timestep_P,
            labelled_per_row_B=batch.labelled_per_row_B,
            row_P=batch.row_P,
            normalization=norm,  # type: ignore[arg-type]
        ),
        "tidal": lambda: tidal_loss(logits_QV, teacher_QV, timestep_Q, progress=0.3),
        "kl": lambda: kl_loss(logits_QV, teacher_QV),
        "reverse_kl": lambda: kl_loss(logits_QV, teacher_QV, direction="reverse"),
    }[name]()
    assert float(online) > 0
    assert torch.allclose(losses.terms[name], online, rtol=1e-6)  # type: ignore[index]
    assert torch.allclose(losses.total, 3.0 * online, rtol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("interpolate", [False, True])
def test_each_chunk_term_is_the_loss_that_outside_programs_call(
    tmp_path: Path, direction: str, interpolate: bool
) -> None:
    """Chunk by chunk from the rows themselves, without the batch's index arithmetic."""
    shape = SetShape(num_samples=20, ragged=True, alignment="chunks")
    cache = open_cache(make_workshop(tmp_path, shape, payloads=("chunks",)).cache)
    name = ("reverse_" if direction == "reverse" else "") + "calm" + "_tidal" * interpolate
    numbers = np.arange(2, 19)
    batch = batch_of(cache, 1, numbers, name)
    rows = table_to_rows(cache.read_rows(1, numbers), "chunks")
    generator = torch.Generator().manual_seed(0)
    hidden_PD = torch.randn(batch.num_masked, 16, generator=generator)
    head_VD = torch.randn(40, 16, generator=generator)
    logprob_PV = (hidden_PD @ head_VD.T).log_softmax(dim=-1)
    student, timesteps, first = [], [], 0
    for row in rows:
        rank = first + np.cumsum(row.student_mask_L) - 1
        for start, end, _, _ in active_chunks(row).tolist():
            ids = row.student_ids_L[start:end].tolist()
            student.append(logprob_PV[rank[start:end].tolist(), ids].sum())
            timesteps.append(row.timestep)
        first += int(row.student_mask_L.sum())
    online = calm_loss(
        torch.stack(student),
        torch.from_numpy(np.concatenate([teacher_chunk_logprobs(row) for row in rows])),
        direction=direction,  # type: ignore[arg-type]
        timestep_C=torch.tensor(timesteps),
        progress=0.3,
        interpolate=interpolate,
    )
    objective = Objective(ObjectiveConfig.model_validate({"losses": {name: 2.0}}))
    losses = objective(hidden_PD, head_VD, batch, objective.denominators(batch), progress=0.3)
    assert torch.allclose(losses.total, 2.0 * online, rtol=1e-5)


def test_a_chunk_cache_trains_with_reverse_calm(tmp_path: Path) -> None:
    shape = SetShape(num_samples=30, alignment="chunks")
    workshop = make_workshop(tmp_path, shape, payloads=("chunks",))
    objective = {"losses": {"ce": 1.0, "reverse_alm": 1.0}, "temperature": 5.0}
    for name, stream in (
        ("whole", {"batch_size": 8}),
        ("parts", {"batch_size": 8, "micro_batch_size": 3}),
    ):
        run(workshop, tmp_path / name, objective=objective, stream=stream, max_steps=6)
    whole, parts = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts")
    for one, other in zip(whole, parts, strict=True):
        assert one["num_chunks"] == other["num_chunks"] > 0
        for key in ("loss/ce", "loss/reverse_calm", "grad_norm"):
            assert math.isclose(one[key], other[key], rel_tol=1e-4), (one["step"], key)


@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
def test_accumulation_changes_the_rounding_alone(
    workshop: Workshop, tmp_path: Path, norm: str
) -> None:
    objective = {"losses": ["ce", {"kl_aligned": 2.0}], "loss_norm": norm}
    for name, stream in (
        ("whole", {"batch_size": 8}),
        ("parts", {"batch_size": 8, "micro_batch_size": 3}),
    ):
        run(workshop, tmp_path / name, objective=objective, stream=stream)
    whole, parts = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts")
    for one, other in zip(whole, parts, strict=True):
        for key in ("loss", "loss/ce", "loss/kl", "grad_norm"):
            assert math.isclose(one[key], other[key], rel_tol=1e-4), (one["step"], key)
        assert one["num_masked"] == other["num_masked"]


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(workshop: Workshop, tmp_path: Path) -> None:
    run(workshop, tmp_path / "one", max_steps=8)
    config = workshop.write_config(output=str(tmp_path / "two"), max_steps=8)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", "-m", "stage2_student"),
            *(str(config), "--cache", str(workshop.cache), "--json"),
        ],
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
        timeout=240,
    )
    assert json.loads(result.stdout)["steps"] == 8  # one rank speaks
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert len(one) == len(two) == 8
    for alone, together in zip(one, two, strict=True):
        # A share of a step without a mask computes one token all the same.
        for key in alone.keys() - {"num_computed", "padding"}:
            value = alone[key]
            assert math.isclose(value, together[key], rel_tol=1e-4), (alone["step"], key)


def test_a_premasked_set_trains_by_cross_entropy(workshop: Workshop, tmp_path: Path) -> None:
    output = tmp_path / "premasked-run"
    summary = run(workshop, output, objective={"losses": {"ce": 1.0, "tidal": 0.0}})
    assert "loss/tidal" not in summary.last_metrics
    # The same rows, masks and order as the cache made of it: the same losses to the bit.
    run(workshop, tmp_path / "cache-run", objective={"losses": ["ce"]})
    keys = ("loss", "grad_norm", "num_masked")
    for line, other in zip(metrics_of(output), metrics_of(tmp_path / "cache-run"), strict=True):
        assert [line[key] for key in keys] == [other[key] for key in keys]


def test_a_trained_student_starts_the_next_run(workshop: Workshop, tmp_path: Path) -> None:
    run(workshop, tmp_path / "first")
    student = {"init": str(tmp_path / "first/final")}
    run(workshop, tmp_path / "second", student=student, max_steps=1)
    batch = batch_of(open_cache(workshop.cache), 0, np.arange(3))
    student_first = Student(load_final(tmp_path / "first"))
    with torch.no_grad():
        hidden = student_first(
            batch.input_ids_1N, batch.position_ids_1N, batch.attention_mask, batch.masked_index_P
        )
    assert torch.isfinite(hidden).all()
    first = metrics_of(tmp_path / "first")[-1]["loss/ce"]
    assert metrics_of(tmp_path / "second")[0]["loss/ce"] != first  # other rows
    # Continuing from trained weights starts below a random student's first loss on the same rows.
    run(workshop, tmp_path / "fresh", max_steps=1)
    fresh = metrics_of(tmp_path / "fresh")[0]
    assert metrics_of(tmp_path / "second")[0]["loss/ce"] < fresh["loss/ce"]


@torch.no_grad()
def figures_by_hand(model: Qwen3ForCausalLM, cache: Cache) -> tuple[float, float, int]:
    """NLL and KL one row and one position at a time, from Qwen3's own logits."""
    nlls, kls = [], []
    for view in range(cache.num_views):
        for row in table_to_rows(cache.read_rows(view, range(cache.num_samples)), "positions"):
            ids = torch.from_numpy(row.student_ids_L.astype(np.int64))
            xt = torch.where(torch.from_numpy(row.student_mask_L), MASK_ID, ids)
            visible = block_diffusion_mask(len(ids), cache.manifest.block_size)
            logits_LV = model(
                input_ids=torch.cat([xt, ids])[None],
                attention_mask={"full_attention": torch.from_numpy(visible)[None, None]},
                position_ids=torch.arange(len(ids)).repeat(2)[None],
            ).logits[0, : len(ids)]
            masked = np.flatnonzero(row.student_mask_L).tolist()
            nlls += [float(-logits_LV[p].log_softmax(-1)[ids[p]]) for p in masked]
            teacher_PV = torch.from_numpy(teacher_logits(row))
            lone = {p for p in masked if not covered(row.alignment_RX.tolist(), p)}
            with_teacher = [p for p in masked if p not in lone]
            for p, z in zip(with_teacher, teacher_PV, strict=True):
                student = logits_LV[p, : len(z)].log_softmax(-1)
                kls.append(float(functional.kl_div(student, z.softmax(-1), reduction="sum")))
    return float(np.mean(nlls)), float(np.mean(kls)), len(nlls)


def covered(runs: list[list[int]], position: int) -> bool:
    return any(start <= position < start + length for start, _, length in runs)


def test_evaluation_by_hand(workshop: Workshop, tmp_path: Path) -> None:
    run(workshop, tmp_path / "run")
    model, cache = load_final(tmp_path / "run"), open_cache(workshop.cache)
    nll, kl, num_positions = figures_by_hand(model, cache)
    figures = evaluate(model, cache, batch_size=7)
    assert figures.num_positions == num_positions
    assert figures.nll == pytest.approx(nll, rel=1e-5)
    assert figures.kl == pytest.approx(kl, rel=1e-5)
    assert sum(part.num_positions for part in figures.by_timestep.values()) == num_positions
    parts = [part for part in figures.by_timestep.values() if part.nll is not None]
    weighted = sum(part.nll * part.num_positions for part in parts if part.nll) / num_positions
    assert weighted == pytest.approx(nll, rel=1e-6)
    # One view, some samples; a set without a teacher has no KL.
    some = evaluate(model, open_cache(workshop.premasked), views=[0], max_samples=5)
    rows = table_to_rows(cache.read_rows(0, range(5)), "positions")
    assert some.num_positions == sum(int(row.student_mask_L.sum()) for row in rows)
    assert some.kl is None


def test_a_build_without_temperature_one_has_no_kl(tmp_path: Path) -> None:
    workshop = make_workshop(tmp_path, SetShape(num_samples=8), temperatures=(2.0,))
    run(workshop, tmp_path / "run", max_steps=1)
    figures = evaluate(load_final(tmp_path / "run"), open_cache(workshop.cache))
    assert figures.kl is None
    assert figures.nll is not None


def test_a_run_is_measured_on_held_out_rows(workshop: Workshop, tmp_path: Path) -> None:
    held_out = make_workshop(tmp_path / "held-out", SetShape(num_samples=6))
    evaluation = {"cache": str(held_out.cache), "every": 5, "batch_size": 4}
    summary = run(workshop, tmp_path / "run", evaluation=evaluation)
    lines = [line for line in metrics_of(tmp_path / "run") if "eval/nll" in line]
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert summary.evaluation is not None
    assert summary.evaluation["nll"] == lines[-1]["eval/nll"]
    figures = evaluate(load_final(tmp_path / "run"), open_cache(held_out.cache))
    assert figures.nll == pytest.approx(lines[-1]["eval/nll"], rel=1e-6)
    assert figures.kl == pytest.approx(lines[-1]["eval/kl"], rel=1e-6)
    # Measuring changes nothing of what is learnt.
    run(workshop, tmp_path / "unmeasured")
    trained = [line for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert trained == metrics_of(tmp_path / "unmeasured")


@pytest.mark.parametrize("mean_logits", [True, False])
def test_few_candidates_train_with_a_rebuilt_tail(
    workshop: Workshop, tmp_path: Path, mean_logits: bool
) -> None:
    few = Workshop(folder=tmp_path)
    write_cache(few.cache, workshop.premasked, k=6, mean_logits=mean_logits)
    config = TrainConfig.model_validate(workshop.config(output=str(tmp_path / "run")))
    opened = teacher_reading(open_run(config, str(few.cache)).cache, config.objective)
    assert opened is not None
    assert opened.candidates is not None
    assert opened.candidates.tail == ("mean" if mean_logits else "uniform")
    summary = train(config, few.cache)
    assert math.isfinite(summary.last_metrics["loss/tidal"])


def test_bf16_trains_close_to_float32(workshop: Workshop, tmp_path: Path) -> None:
    run(workshop, tmp_path / "float32")
    run(workshop, tmp_path / "bf16", precision="bf16")
    pairs = zip(metrics_of(tmp_path / "float32"), metrics_of(tmp_path / "bf16"), strict=True)
    differences = [abs(a["loss"] - b["loss"]) / a["loss"] for a, b in pairs]
    assert 0 < max(differences) < 0.03
    assert load_final(tmp_path / "bf16").dtype == torch.float32  # autocast: the weights stay


def test_the_plan_says_what_the_run_does(workshop: Workshop, tmp_path: Path) -> None:
    values = workshop.config(output=str(tmp_path / "run"), epochs=3, max_steps=None)
    run_plan = open_run(TrainConfig.model_validate(values), str(workshop.cache))
    plan = describe(run_plan)
    assert not (tmp_path / "run").exists()
    summary = train(TrainConfig.model_validate(values), workshop.cache)
    assert plan["max_steps"] == summary.steps == 3 * 7
    model = load_final(tmp_path / "run")
    assert plan["num_parameters"] == sum(p.numel() for p in model.parameters())
    seen = sum(line["num_masked"] for line in metrics_of(tmp_path / "run"))
    # Views 0, 1, 0: the plan goes by the mean over views.
    assert plan["num_masked_positions"] == pytest.approx(seen, rel=0.5)
    assert plan["views_read"] == 2


def test_tensorboard_gets_the_same_numbers(workshop: Workshop, tmp_path: Path) -> None:
    accumulator = import_module("tensorboard.backend.event_processing.event_accumulator")
    run(workshop, tmp_path / "run", metrics={"every": 4, "report_to": ["tensorboard"]})
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    sent = {event.step: event.value for event in events.Scalars("loss")}
    written = {line["step"]: line["loss"] for line in metrics_of(tmp_path / "run")}
    assert list(written) == [4, 5, 8, 10, 12]  # every 4 steps, and at each checkpoint
    assert sent == pytest.approx(written, rel=1e-6)


def test_a_loss_that_is_no_number_stops_the_run(workshop: Workshop, tmp_path: Path) -> None:
    optimizer = {"learning_rate": 1e30, "max_grad_norm": None}
    with pytest.raises(TideError, match=r"step \d+: loss .*(nan|inf)[\s\S]*lower optimizer"):
        run(workshop, tmp_path / "run", optimizer=optimizer, checkpoints={"every": 1})
    saved = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    for folder in saved:  # whatever was saved can be gone on from
        line = metrics_of(tmp_path / "run")[int(folder.name[5:]) - 1]
        assert math.isfinite(line["loss"])
    assert not (tmp_path / "run/final").exists()


def test_lone_masked_positions_count_for_cross_entropy_alone(tmp_path: Path) -> None:
    workshop = make_workshop(tmp_path, SetShape(num_samples=16, lone_share=1.0))
    run(workshop, tmp_path / "run", max_steps=2)
    line = metrics_of(tmp_path / "run")[0]
    assert 0 < line["num_candidates"] < line["num_masked"]


def test_rows_without_a_masked_position_train_on(tmp_path: Path) -> None:
    workshop = Workshop(folder=tmp_path)
    made = make_workshop(tmp_path / "made", SetShape(num_samples=4))

    def unmask(row: PremaskedRow) -> PremaskedRow:
        nothing = np.zeros(len(row.student_mask_L), bool)
        return replace(row, student_mask_L=nothing, half_a_L=nothing)

    write_premasked(workshop.premasked, made.tokenizer, SetShape(num_samples=4), change=unmask)
    write_cache(workshop.cache, workshop.premasked)
    config = made.config(output=str(tmp_path / "run"), max_steps=2, stream={"batch_size": 4})
    train(TrainConfig.model_validate(config), workshop.cache)
    assert [line["loss"] for line in metrics_of(tmp_path / "run")] == [0.0, 0.0]
