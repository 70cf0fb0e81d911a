"""The paper's tables in miniature as a process: killed with students in the making, and run again.

Real teachers, caches and students, with a few rows and steps each. What was measured before the
kill is kept to the byte, and what is finished is not done again. (That a training which is stopped
comes to the same bits is the business of test_resume.)
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.paper.cells import read_cell
from stage2_student.config import TrainConfig
from tests.builders import command_environment
from tests.support import PROJECT_ROOT
from tide_cache.config import load_config

SMALL = {
    "data": {"teacher_rows": 120, "student_rows": 40, "held_out_rows": 12, "prompts": 6},
    "masking": {"num_views": 2},
    "teacher_train": {"max_steps": 3},
    "build": {"fidelity": 0.5, "fidelity_positions": 64},
    "student_train": {"max_steps": 3, "stream": {"batch_size": 8}},
}
CELLS = ["shared/ce", "shared/no_comp_demo", "cross/ce", "cross/calm"]


def write_configs(folder: Path) -> Path:
    """The demos' configs with small numbers laid over them, and a miniature of four cells."""
    for name in ("demo", "demo_cross"):
        build = SMALL["build"] if name == "demo" else {}
        values = {
            "base": str(PROJECT_ROOT / f"examples/{name}.yaml"),
            "demo": {**SMALL, "build": build},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    mini = {
        "pipelines": {"shared": "demo.yaml", "cross": "demo_cross.yaml"},
        "seeds": [1],
        "weights": {"grid": [1.0, 2.0], "seed": 11},
        "cells": CELLS,
    }
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump(mini))
    return path


def start(config: Path, output: Path, *more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "examples.paper.mini", config, "-o", output, "--json", *more],
        cwd=PROJECT_ROOT,
        env=command_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> dict[str, Any]:
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    figures: dict[str, Any] = json.loads(output)
    return figures


def kill_once_measured(process: "subprocess.Popen[str]", output: Path) -> dict[Path, bytes]:
    """Kill the process when a reported student is measured. Returns what it had measured."""
    deadline_s = time.monotonic() + 500
    while process.poll() is None and time.monotonic() < deadline_s:
        found = list(output.rglob("report.json"))
        if found:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            return {path: path.read_bytes() for path in found}
        time.sleep(0.05)
    raise AssertionError(f"nothing was measured: {process.communicate()[1]}")


@pytest.mark.slow
def test_killed_and_run_again_it_goes_on_to_the_tables(tmp_path: Path) -> None:
    config = write_configs(tmp_path)
    killed = tmp_path / "killed"
    kept = kill_once_measured(start(config, killed), killed)
    figures = finish(start(config, killed))
    for path, content in kept.items():
        assert path.read_bytes() == content
    assert {run["seed"] for run in figures["runs"]} == {1}

    cells = {(row["cell"], row["weight"]) for row in figures["cells"]}
    assert {(cell, 1.0) for cell in [*CELLS, "shared/ar"]} <= cells
    assert set(figures["weights"]) == {"shared/no_comp_demo", "cross/calm"}
    assert json.loads((killed / "figures.json").read_text()) == figures
    text = (killed / "tables.md").read_text()
    assert "## Table 2, shared tokenizer" in text
    assert "cross: BD3LM > CALM (+0.42)" in text

    # What a student was trained by is what tide-train reads, from the cache its cell names.
    path = killed / "shared/no_comp_demo/weight-1/seed-1/train.yaml"
    written = load_config(path, TrainConfig)
    assert written.objective == read_cell("shared/no_comp_demo").train.objective
    assert written.max_steps == SMALL["student_train"]["max_steps"]
    summary = json.loads((path.parent / "summary.json").read_text())
    plain = json.loads((killed / "shared/cache-plain/manifest.json").read_text())
    assert plain["comp_demo"] is False
    assert summary["steps"] == 3

    # Run once more it has nothing to do; with other pipelines it does not mix figures.
    again = start(config, killed)
    assert finish(again)["cells"] == figures["cells"]
    values = yaml.safe_load((tmp_path / "demo.yaml").read_text())
    values["demo"]["data"]["student_rows"] += 1
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(values))
    process = start(config, killed)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "was begun with other pipelines" in errors
