"""The licence of a teacher's weights reaches the cache's card, from its own card or the config."""

import json
from pathlib import Path

import pytest

from tests.builders import run_command
from tests.pipelines import write_pipeline
from tests.teacher_checkpoints import make_model


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("license")
    model = make_model("qwen3", vocab_size=448, max_position_embeddings=512)
    build = {
        "payloads": ["candidates"],
        "candidates": {"codec": "raw", "mean_logits_positions": 0},
        "fidelity_positions": 0,
    }
    config = write_pipeline(folder, model, num_rows=8, prepare={}, build=build)
    done = run_command("prepare", config, "-o", folder / "premasked", "--workers", "1")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("card", "settings", "expected"),
    [
        ("---\nlicense: mit\n---\n# A teacher\n", (), "mit"),
        ("---\nlicense: [mit, other]\n---\n", (), "mit, other"),
        ("---\nlicense: mit\n---\n", ("--set", "teacher.license=apache-2.0"), "apache-2.0"),
        ("no block\n", (), None),
        (None, (), None),
    ],
)
def test_the_licence_is_recorded(
    ground: Path, tmp_path: Path, card: str | None, settings: tuple[str, ...], expected: str | None
) -> None:
    readme = ground / "teacher" / "README.md"
    readme.unlink(missing_ok=True)
    if card is not None:
        readme.write_text(card)
    config = ground / "pipeline.yaml"
    arguments = ("build", config, "-p", ground / "premasked", "-o", tmp_path / "cache", *settings)
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    assert manifest["build_config"]["teacher"].get("license") == expected
    assert ("license" in manifest["build_config"]["teacher"]) == (expected is not None)
    shown = expected or "not recorded (that model's own)"
    assert f"licence {shown}" in (tmp_path / "cache/README.md").read_text()
    assert run_command(*arguments).returncode == 0  # again: the finished set is accepted
