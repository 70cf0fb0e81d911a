"""Backend vllm where vLLM is not needed: what is refused before it starts, and calibration."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from stage1_teacher import cli
from stage1_teacher.build import default_num_build_workers
from stage1_teacher.teachers import load_teacher, open_config
from stage1_teacher.teachers.base import TeacherConfig
from stage1_teacher.teachers.checkpoint import open_checkpoint
from stage1_teacher.teachers.families import find_family
from stage1_teacher.teachers.layouts import Layout, LayoutSpec
from stage1_teacher.teachers.vllm_engine import check_weights, start_engine, write_served_folder
from stage1_teacher.teachers.vllm_plugin import SETTINGS_FIELD
from tests.pipelines import write_pipeline
from tests.teacher_checkpoints import FAMILIES, MASK_ID, edit_config, make_model, write_checkpoint
from tide_cache.errors import CompatibilityError, ConfigError

HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a teacher, a premasked set and a config."""
    folder = tmp_path_factory.mktemp("vllm")
    model = make_model("qwen3", vocab_size=448, num_layers=1, max_position_embeddings=512)
    write_pipeline(
        folder,
        model,
        num_rows=16,
        prepare={"num_views": 1, "samples_per_shard": 16},
        build={"candidates": {"k": 4, "mean_logits_positions": 16}, "fidelity_positions": 16},
    )
    cli.prepare(folder / "pipeline.yaml", output=str(folder / "premasked"), workers=1)
    return folder


def arguments(ground: Path, *overrides: str) -> dict[str, Any]:
    return {
        "premasked": str(ground / "premasked"),
        "overrides": ["teacher.backend=vllm", *overrides],
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [],
            r"teacher.backend: vllm: payloads \(default\): expected \[candidates\] or \[chunks\], "
            r"got hidden: vllm gives no hidden states; set payloads: \[candidates\]",
        ),
        (["payloads=[hidden]"], r"vllm: payloads: expected \[candidates\] or \[chunks\]"),
        (
            ["payload=auto"],
            r"payload: auto may choose hidden, and vllm gives no hidden states; look at the table",
        ),
    ],
)
def test_payloads_of_hidden_states_are_refused(
    ground: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(CompatibilityError, match=message):
        cli.build(
            ground / "pipeline.yaml",
            output=str(tmp_path / "cache"),
            workers=1,
            **arguments(ground, *overrides),
        )
    assert not (tmp_path / "cache").exists()


def test_calibrate_asks_transformers(ground: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table that a refused `payload: auto` points at."""
    named = arguments(ground, "payload=auto", "hidden.fit_positions=256")
    cli.calibrate(ground / "pipeline.yaml", json_output=True, **named)
    assert "hidden" in json.dumps(json.loads(capsys.readouterr().out))


@pytest.mark.skipif(HAS_VLLM, reason="vllm is installed here")
def test_an_absent_engine_is_named_with_its_install_command(ground: Path) -> None:
    config = TeacherConfig(
        model=str(ground / "teacher"), backend="vllm", mask_token_id=1, dtype="float32"
    )
    with pytest.raises(ConfigError, match=r"vllm is not installed.*pip install 'tide-cache\[vllm"):
        load_teacher(config)


def test_the_same_teacher_under_transformers() -> None:
    config = TeacherConfig(model="x", backend="vllm", vllm={"tensor_parallel_size": 4})
    opened = open_config(config)
    assert (opened.backend, opened.vllm, opened.device_map) == ("hf", None, "auto")
    assert open_config(opened) is opened
    one = TeacherConfig(model="x", backend="vllm", device="cpu")
    assert open_config(one).device_map is None
    assert default_num_build_workers(one) == 1


# --- what the engine is given


def layout_spec() -> LayoutSpec:
    return LayoutSpec(layout=Layout.BLOCK_CAUSAL, block_size=4, mask_token_id=MASK_ID, shared=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_served_folder_is_a_stock_checkpoint(tmp_path: Path, family: str) -> None:
    folder = write_checkpoint(tmp_path / "model", family, make_model(family), num_files=2)
    (folder / "other.safetensors").write_bytes(b"not the model's")
    checkpoint = open_checkpoint(str(folder))
    found = find_family(checkpoint)
    stock = found.read_config(checkpoint.config, checkpoint.config_path)
    check_weights(checkpoint, found, stock)
    served = tmp_path / "served"
    served.mkdir()
    config = TeacherConfig(model=str(folder), backend="vllm")
    write_served_folder(served, checkpoint, found, stock, config, layout_spec())
    values = json.loads((served / "config.json").read_text())
    assert values["model_type"] == stock.model_type
    assert values["architectures"][0].startswith("Tide")
    assert values[SETTINGS_FIELD]["layout"] == "block_causal"
    assert sorted(path.name for path in served.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_weights_that_do_not_fit_are_refused_before_the_engine_starts(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "wedlm", make_model("wedlm"))
    edit_config(folder, num_hidden_layers=3)
    checkpoint = open_checkpoint(str(folder))
    config = TeacherConfig(model=str(folder), backend="vllm")
    with pytest.raises(CompatibilityError, match="the weights do not fit the config: nothing"):
        start_engine(config, checkpoint, find_family(checkpoint), layout_spec())


def test_another_head_under_a_tied_config_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama", make_model("llama"))
    edit_config(folder, tie_word_embeddings=True)
    checkpoint = open_checkpoint(str(folder))
    config = TeacherConfig(model=str(folder), backend="vllm")
    with pytest.raises(CompatibilityError, match=r"lm_head\.weight differs from the embedding"):
        start_engine(config, checkpoint, find_family(checkpoint), layout_spec())
