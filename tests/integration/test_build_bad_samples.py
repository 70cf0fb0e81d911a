"""Samples that the teacher cannot answer: named, set aside, or left out and counted; never written.

The teacher is real: one row of its embedding is NaN, so every sample with that token gives NaN.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.build_grounds import NUM_TASKS, NUM_VIEWS, BuildGround
from tests.builders import all_files, run_command
from tide_cache.cache import open_cache
from tide_cache.store import Store
from tide_cache.verify import verify_set


@pytest.fixture(scope="module")
def poisoned(build_ground: BuildGround, tmp_path_factory: pytest.TempPathFactory) -> "Poisoned":
    """A teacher that a rare token of the set makes answer NaN."""
    folder = tmp_path_factory.mktemp("poisoned") / "teacher"
    shutil.copytree(build_ground.folder / "teacher", folder)
    premasked = open_cache(build_ground.premasked)
    table = premasked.read_rows(0, range(premasked.num_samples), ["sample_id", "teacher_ids"])
    samples = dict(
        zip(table["sample_id"].to_pylist(), table["teacher_ids"].to_pylist(), strict=True)
    )
    used = Counter(token for ids in samples.values() for token in set(ids))
    token = min((token for token, count in used.items() if count >= 2), key=used.__getitem__)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    return Poisoned(folder, {name for name, ids in samples.items() if token in ids}, len(samples))


class Poisoned:
    def __init__(self, teacher: Path, samples: set[str], num_samples: int) -> None:
        self.teacher, self.samples, self.num_samples = teacher, samples, num_samples


def test_bad_samples_are_named_and_everything_else_is_built(
    build_ground: BuildGround, poisoned: Poisoned, tmp_path: Path
) -> None:
    output = tmp_path / "cache"
    arguments = (
        *build_ground.arguments(output),
        *("--set", f"teacher.model={poisoned.teacher}", "--workers", "1"),
        # Nothing is fitted: the teacher is first asked by a task.
        *("--set", "candidates.ranks=corpus", "--set", "candidates.mean_logits_positions=0"),
    )
    done = run_command(*arguments)
    assert done.returncode == 1
    assert "tasks failed and were set aside" in done.stderr
    assert any(f"sample {name}" in done.stderr for name in poisoned.samples)
    assert "NaN or infinity" in done.stderr
    assert "set bad_samples: drop" in done.stderr
    assert "Traceback" not in done.stderr
    told = json.loads(run_command("status", output, "--json").stdout)
    assert told["state"] == "building"
    aside = told["set_aside"]
    assert 1 <= len(aside) <= len(poisoned.samples)
    assert told["num_tasks_done"] == NUM_TASKS - len(aside)
    assert all("NaN or infinity" in one["error"] for one in aside)
    assert "failed" in run_command("status", output).stdout
    # Another setting would write other bytes beside what stands there.
    again = run_command(*arguments, "--set", "bad_samples=drop")
    assert again.returncode == 1
    assert "holds another set; differing: build_config.bad_samples" in again.stderr


def test_bad_samples_are_left_out_where_that_is_asked_for(
    build_ground: BuildGround, poisoned: Poisoned, tmp_path: Path
) -> None:
    outputs = [tmp_path / "one", tmp_path / "two"]
    for output, workers in zip(outputs, ("1", "2"), strict=True):
        done = run_command(
            *build_ground.arguments(output),
            *("--set", f"teacher.model={poisoned.teacher}", "--set", "bad_samples=drop"),
            *("--workers", workers, "--json"),
        )
        assert done.returncode == 0, done.stderr
        assert "left out" in done.stderr
    assert all_files(outputs[0]) == all_files(outputs[1])
    report = verify_set(Store(outputs[0]))
    assert report.ok, report.problems
    cache = open_cache(outputs[0])
    assert cache.manifest.dropped["nonfinite_logits"] == len(poisoned.samples)
    kept = poisoned.num_samples - len(poisoned.samples)
    assert cache.num_samples == cache.manifest.counts["num_samples"] == kept
    for view in range(NUM_VIEWS):
        found = cache.read_rows(view, range(kept), ["sample_id"])["sample_id"].to_pylist()
        assert len(found) == len(set(found)) == kept
        assert not poisoned.samples & set(found)
    events = Path(f"{outputs[0]}.events.jsonl").read_text().splitlines()
    notes = [event["note"] for line in events if (event := json.loads(line))["event"] == "note"]
    assert len(notes) == len(poisoned.samples)
    assert {name for name in poisoned.samples for note in notes if name in note} == poisoned.samples


def test_a_finished_cache_without_them_can_be_measured(
    build_ground: BuildGround, poisoned: Poisoned, tmp_path: Path
) -> None:
    """Rows of cache and premasked set are matched by sample, not by number."""
    options = (
        *("--set", f"teacher.model={poisoned.teacher}", "--set", "bad_samples=drop"),
        *("--set", "fidelity_positions=64"),
    )
    done = run_command(*build_ground.arguments(tmp_path / "cache"), *options, "--workers", "1")
    assert done.returncode == 0, done.stderr
    done = run_command(
        "calibrate",
        build_ground.config,
        *("-p", build_ground.premasked, "--cache", tmp_path / "cache", "--json"),
        *options,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    # Rows matched to other samples would keep nothing of the promise.
    assert measured["largest_difference"] < 0.2, measured
