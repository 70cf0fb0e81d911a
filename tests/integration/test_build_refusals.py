"""What was begun with one teacher or config is not gone on with under another."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.build_grounds import BuildGround
from tests.builders import all_files, run_command


def test_a_teacher_whose_weights_changed_is_refused_by_hash(
    build_ground: BuildGround, tmp_path: Path
) -> None:
    """One number of one tensor differs; everything else, the name included, is the same."""
    teacher, output = tmp_path / "teacher", tmp_path / "cache"
    shutil.copytree(build_ground.folder / "teacher", teacher)
    arguments = (
        *build_ground.arguments(output),
        *("--set", f"teacher.model={teacher}", "--workers", "1"),
    )
    begun = run_command(*arguments, "--shard-range", "0/3")
    assert begun.returncode == 0, begun.stderr
    before = all_files(output)
    path = teacher / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    done = run_command(*arguments)
    assert done.returncode == 1
    assert "holds another set; differing: teacher_model.weights_sha256" in done.stderr
    assert "write to an empty folder, or restore what this one was begun with" in done.stderr
    assert all_files(output) == before


def test_a_changed_config_is_refused_by_its_keys_while_a_build_is_under_way(
    build_ground: BuildGround, tmp_path: Path
) -> None:
    output = tmp_path / "cache"
    arguments = build_ground.arguments(output)
    begun = run_command(*arguments, "--shard-range", "0/3", "--workers", "1")
    assert begun.returncode == 0, begun.stderr
    done = run_command(*arguments, "--set", "candidates.k=7", "--set", "samples_per_batch=4")
    assert done.returncode == 1
    assert "build_config.candidates.k, build_config.samples_per_batch" in done.stderr
