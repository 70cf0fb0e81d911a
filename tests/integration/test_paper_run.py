"""The runner of the tables at real size on small models: its own commands, run and run again.

Chats, tokenizer, teacher and students are small ones of the same classes; every step is the process
that a user would start. Evaluation is left out here, it asks the hub for the undistilled models.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.paper.cells import METHODS
from tests.builders import command_environment
from tests.pipelines import write_pipeline
from tests.support import PROJECT_ROOT
from tests.teacher_checkpoints import make_model

METHODS_OF_SHARED = [method for method in METHODS if method.pipeline == "shared"]


def settings(folder: Path) -> list[str]:
    """Everything of the published configs that is about size, made small."""
    tokenizer = folder / "tokenizer"
    shape = "{hidden_size: 32, num_layers: 1, num_heads: 2, head_dim: 16, intermediate_size: 64}"
    values = [
        "prepare.published=null",
        f"prepare.sources={folder / 'chat.jsonl'}",
        f"prepare.student={{tokenizer: {tokenizer}, max_length: 128}}",
        "prepare.teacher=null",
        "prepare.block_size=8",
        f"shared.build.teacher={{model: {folder / 'teacher'}, dtype: float32, block_size: 8}}",
        "build.payload=null",
        "build.payloads=[candidates]",
        "build.candidates={k: 12, mean_logits_positions: 64, temperatures: [1.0, 2.0]}",
        "build.fidelity_positions=0",
        f"train.student={{init: random, tokenizer: {tokenizer}, architecture: {shape}}}",
        "train.stream={batch_size: 4}",
        "train.epochs=null",
        "train.max_steps=2",
        "train.precision=float32",
        "train.device=cpu",
    ]
    return [word for value in values for word in ("--set", value)]


def run(folder: Path, output: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "examples.paper.run", "shared", "-o", str(output)]
    stages = ["--table", "1", "--stages", "prepare,build,verify,train"]
    return subprocess.run(
        [*command, *stages, "--json", *settings(folder)],
        cwd=PROJECT_ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
def test_one_cache_trains_every_student_of_table_1_and_nothing_is_done_twice(
    tmp_path: Path,
) -> None:
    model = make_model("qwen3", vocab_size=448, max_position_embeddings=512)
    write_pipeline(tmp_path, model, num_rows=16, prepare={}, build={})
    output = tmp_path / "paper"
    first = run(tmp_path, output)
    assert first.returncode == 0, first.stderr
    cache = json.loads((output / "shared/cache/manifest.json").read_text())
    assert cache["comp_demo"] is True
    finals = {}
    for method in METHODS_OF_SHARED:
        folder = output / method.one_cache
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["steps"] == 2
        finals[method.label] = (folder / "final/model.safetensors").read_bytes()
    assert len(set(finals.values())) == 3  # three objectives, three students
    figures = json.loads(first.stdout)
    assert [row["label"] for row in figures["models"]] == ["AR", "BD3LM", *finals]
    assert {row["average"] for row in figures["models"]} == {None}

    again = run(tmp_path, output)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == figures
    for method in METHODS_OF_SHARED:
        weights = output / method.one_cache / "final/model.safetensors"
        assert weights.read_bytes() == finals[method.label]

    (output / "shared/cache/manifest.json").write_text("{}")
    broken = run(tmp_path, output)
    assert broken.returncode != 0
    assert "run the same command again" in " ".join(broken.stderr.split())
