"""Every YAML in examples/ is what its commands read, and carries the paper's settings."""

from pathlib import Path

import pytest

from examples.demo.config import DemoConfig
from stage1_teacher.build_plan import BuildConfig
from stage1_teacher.prepare_config import PrepareConfig
from stage2_student.config import TrainConfig
from tests.support import PROJECT_ROOT
from tide_cache.config import load_config

EXAMPLES = PROJECT_ROOT / "examples"


@pytest.mark.parametrize("name", ["demo.yaml", "demo_cross.yaml"])
def test_demos_are_read(name: str) -> None:
    config = load_config(EXAMPLES / name, DemoConfig, section="demo")
    assert config.split == "test"
    assert len(config.seeds) >= 2


@pytest.mark.parametrize(
    ("name", "lengths", "alignment", "losses"),
    [
        ("wedlm_to_qwen3.yaml", (512, 768), "positions", {"ce": 1.0, "tidal": 1.0}),
        ("llada2_to_qwen3.yaml", (512, 1024), "chunks", {"ce": 1.0, "reverse_calm": 1.0}),
    ],
)
def test_pipelines_carry_the_papers_settings(
    name: str, lengths: tuple[int, int], alignment: str, losses: dict[str, float]
) -> None:
    path = EXAMPLES / name
    prepare = load_config(path, PrepareConfig, section="prepare")
    assert (prepare.student.max_length, prepare.teacher_side.max_length) == lengths
    assert (prepare.block_size, prepare.demo_ratio, prepare.alignment) == (32, 0.5, alignment)
    build = load_config(path, BuildConfig, section="build")
    assert build.teacher.attention == "published"
    train = load_config(path, TrainConfig, section="train")
    assert train.objective.weights == losses
    assert (train.optimizer.learning_rate, train.epochs) == (5e-5, 10)
    objective = train.objective
    assert (objective.temperature, objective.timestep_weight) == (2.0, "midrange")
    assert (objective.lambda_init, objective.lambda_max, objective.schedule) == (0.1, 0.9, "cosine")


def test_there_is_no_example_that_nothing_reads() -> None:
    assert {path.name for path in Path(EXAMPLES).glob("*.yaml")} == {
        "demo.yaml",
        "demo_cross.yaml",
        "wedlm_to_qwen3.yaml",
        "llada2_to_qwen3.yaml",
    }
