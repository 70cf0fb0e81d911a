"""`verify --against-teacher`: an honest cache agrees with its teacher, an altered row is named."""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.builders import run_command
from tests.hostile_parquet import rehash
from tests.pipelines import write_pipeline
from tests.teacher_checkpoints import make_model
from tide_cache.cache import open_cache
from tide_cache.manifest import CacheManifest
from tide_cache.payloads import num_entries, open_codecs
from tide_cache.payloads.candidates import Candidates
from tide_cache.rows import table_to_rows
from tide_cache.shards import table_bytes
from tide_cache.store import Store
from tide_cache.verify import verify_set

BUILDS: dict[str, dict[str, Any]] = {
    "hidden": {"candidates": {"mean_logits_positions": 64}, "hidden": {"fit_positions": 256}},
    "chunks": {"payloads": ["chunks"]},
    "top-p": {
        "payloads": ["candidates"],
        "candidates": {"k": 64, "top_p": 0.9, "min_k": 4, "mean_logits_positions": 0},
    },
    "hidden-bfloat16": {
        "candidates": {"mean_logits_positions": 64},
        "hidden": {"fit_positions": 256},
        "teacher.dtype": "bfloat16",
    },
    "chunks-bfloat16": {"payloads": ["chunks"], "teacher.dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ground")
    model = make_model("qwen3", vocab_size=448, max_position_embeddings=512)
    model.lm_head.weight.data *= 3
    build = {"fidelity_positions": 0}
    config = write_pipeline(folder, model, num_rows=64, prepare={}, build=build)
    done = run_command("prepare", config, "-o", folder / "premasked", "--workers", "1")
    assert done.returncode == 0, done.stderr
    for name, settings in BUILDS.items():
        overrides = [
            word
            for key, value in settings.items()
            for word in ("--set", f"{key}={json.dumps(value)}")
        ]
        arguments = ("build", config, "-p", folder / "premasked", "-o", folder / name)
        done = run_command(*arguments, "--workers", "1", *overrides)
        assert done.returncode == 0, done.stderr
    return folder


def check(cache: Path, teacher: Path, *more: str) -> tuple[int, Any]:
    arguments = ("verify", cache, "--against-teacher", teacher, "--json", *more)
    done = run_command(*arguments)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("kind", BUILDS)
def test_an_honest_cache_agrees(ground: Path, kind: str) -> None:
    code, report = check(ground / kind, ground / "teacher", "--samples", "20")
    assert code == 0, report["problems"]
    found = report["teacher_check"]
    assert (found["num_samples"], found["num_rows"]) == (20, 40)
    assert found["num_entries"] > 100
    assert found["num_rows_differing"] == 0


@pytest.mark.parametrize("kind", BUILDS)
def test_rows_that_were_altered_are_named(ground: Path, tmp_path: Path, kind: str) -> None:
    """One row in a hundred holds the answers of its positions in another order; all else is right.

    Hashes, checksums and bounds are: nothing but the teacher can tell.
    """
    cache = shutil.copytree(ground / kind, tmp_path / "cache")
    altered = alter(cache, share=0.01)
    assert 1 <= len(altered) <= 4
    assert verify_set(Store(cache)).ok
    code, report = check(cache, ground / "teacher", "--samples", "1000")
    assert code == 1
    found = report["teacher_check"]
    assert found["num_samples"] == 64
    assert {(row["sample_id"], row["view"]) for row in found["rows"]} == altered
    assert found["num_rows_differing"] == len(altered)
    sample, view = sorted(altered)[0]
    told = [f"sample {sample} view {view}: " in problem for problem in report["problems"]]
    assert any(told)


def test_another_teacher_is_refused(ground: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(ground / "teacher", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    code, report = check(ground / "hidden", other)
    assert code == 2
    assert "teacher_model.weights_sha256: expected" in report["problems"][0]


def alter(folder: Path, *, share: float) -> set[tuple[str, int]]:
    """Turn the order of the answers around in some rows, as a forger would; returns the rows."""
    cache = open_cache(folder)
    manifest = cache.manifest
    assert isinstance(manifest, CacheManifest)
    codecs = open_codecs(cache.store, manifest)
    altered = set()
    seen = 0
    for shard in manifest.shards:
        path = folder / shard.path
        table = pq.read_table(io.BytesIO(path.read_bytes()))
        for index, row in enumerate(table_to_rows(table, manifest.alignment)):
            num = num_entries(row, manifest.alignment)
            if num < 6:
                continue
            seen += 1
            if seen % round(1 / share) != 30:
                continue
            altered.add((row.sample_id, row.view))
            num_B = np.array([num], dtype=np.int64)
            for codec in codecs.present:
                answers = turned(codec.decode(table.slice(index, 1), num_B))  # type: ignore[arg-type]
                for field, cell in zip(codec.fields(), codec.encode(answers, num_B), strict=True):
                    values = table[field.name].to_pylist()
                    values[index] = cell.to_pylist()[0]
                    at = table.schema.get_field_index(field.name)
                    table = table.set_column(at, field, pa.array(values, field.type))
        path.write_bytes(table_bytes(table))
    rehash(folder)
    return altered


def turned(answers: Candidates | np.ndarray) -> Any:
    if isinstance(answers, np.ndarray):
        return answers[::-1].copy()
    fields = {field.name: getattr(answers, field.name) for field in dataclasses.fields(answers)}
    made = {name: None if v is None else v[::-1].copy() for name, v in fields.items()}
    return Candidates(**{**made, "error_P": None})
