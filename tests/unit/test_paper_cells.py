"""Every YAML of examples/paper is a config that the product reads, and differs in what it must."""

import re
from pathlib import Path

import pytest

from examples.paper.cells import ABLATIONS, FOLDER, METHODS, PIPELINES, cell_names, read_cell
from examples.paper.mini_config import read_mini
from stage1_teacher.payload_config import BuildConfig
from stage1_teacher.prepare_config import PrepareConfig
from stage2_student.config import TrainConfig
from tide_cache.config import load_config
from tide_cache.errors import ConfigError

LOSSES = {
    "shared/kl": "kl",
    "shared/tide_cross": "reverse_kl",
    "shared/tide_shared": "tidal",
    "cross/calm": "calm",
    "cross/tide_cross": "reverse_calm",
    "cross/tide_shared": "calm_tidal",
}
CONFIGS = sorted(path for name in PIPELINES for path in (FOLDER / name).glob("*.yaml"))


def test_every_config_is_a_cell_or_a_pipeline() -> None:
    expected = {f"{name}.yaml" for name in cell_names()}
    expected |= {f"{name}/pipeline.yaml" for name in PIPELINES}
    assert {str(path.relative_to(FOLDER)) for path in CONFIGS} == expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_config_reads_as_all_three_and_carries_the_papers_settings(path: Path) -> None:
    prepare = load_config(path, PrepareConfig, section="prepare")
    build = load_config(path, BuildConfig, section="build")
    train = load_config(path, TrainConfig, section="train")
    assert (prepare.block_size, prepare.student.max_length, prepare.demo_ratio) == (32, 512, 0.5)
    assert prepare.published is not None
    assert build.teacher.attention == "published"
    assert (train.optimizer.learning_rate, train.epochs, train.precision) == (5e-5, 10, "bf16")
    objective = train.objective
    assert (objective.lambda_init, objective.lambda_max, objective.schedule) == (0.1, 0.9, "cosine")
    assert (objective.temperature, objective.timestep_weight) == (2.0, "midrange")


@pytest.mark.parametrize("name", cell_names())
def test_a_cell_has_its_loss_with_weight_1_and_an_output_of_its_own(name: str) -> None:
    cell = read_cell(name)
    base = name.removesuffix("_as_published")
    base = (
        "shared/tide_shared" if base in ("shared/no_comp_demo", "shared/no_timestep_axis") else base
    )
    assert cell.loss == LOSSES.get(base)
    assert set(cell.train.objective.weights.values()) == {1.0}
    assert cell.train.output == f"runs/paper/{name}"
    assert (cell.train.objective.axis == "training_only") == (name == "shared/no_timestep_axis")


def test_methods_use_the_one_cache_and_were_published_with_comp_demo_only_as_tide_shared() -> None:
    for method in METHODS:
        assert read_cell(method.one_cache).cache == "cache"
        published = read_cell(method.as_published)
        assert published.build.comp_demo == (method.label == "TIDE-Shared")
        differing = published.train.model_dump(exclude={"output"})
        assert differing == read_cell(method.one_cache).train.model_dump(exclude={"output"})


def test_cells_of_one_cache_ask_for_the_same_cache() -> None:
    builds = {}
    for cell in map(read_cell, cell_names()):
        assert builds.setdefault((cell.pipeline, cell.cache), cell.build) == cell.build
    assert len(builds) == 4


def test_an_ablation_changes_one_thing() -> None:
    full = read_cell(ABLATIONS[-1][1])
    without_axis, without_demo = read_cell(ABLATIONS[1][1]), read_cell(ABLATIONS[2][1])
    assert without_axis.build == full.build
    changed = full.train.objective.model_dump() | {"axis": "training_only"}
    assert without_axis.train.objective.model_dump() == changed
    assert without_demo.build.model_dump() == full.build.model_dump() | {"comp_demo": False}
    assert without_demo.train.objective == full.train.objective


def test_the_miniature_reads_both_demos_and_refuses_what_cannot_be_fair() -> None:
    config, pipelines = read_mini(FOLDER / "mini.yaml", [])
    assert config.chosen_cells == cell_names()
    assert config.seeds == (1, 2, 3)
    assert [values.is_shared for values in pipelines.values()] == [True, False]
    assert pipelines["shared"].student_train == pipelines["cross"].student_train
    with pytest.raises(ConfigError, match=r"weights.seed: 2 is one of the reported seeds"):
        read_mini(FOLDER / "mini.yaml", ["weights.seed=2"])
    with pytest.raises(ConfigError, match=r"no cell 'shared/k' \(did you mean 'shared/kl'\?\)"):
        read_mini(FOLDER / "mini.yaml", ["cells=[shared/k]"])


def test_the_page_names_cells_that_exist() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:shared|cross)/\w+)`", text))
    assert named == {name for name in cell_names() if "as_published" not in name} - {"cross/ce"}
