"""`tide-cache build` through vLLM: the cache that transformers makes."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.builders import command, command_environment, run_command, write_yaml
from tests.pipelines import write_pipeline
from tests.support import PROJECT_ROOT
from tests.teacher_checkpoints import make_model
from tide_cache.cache import Cache, open_cache
from tide_cache.manifest import CacheManifest
from tide_cache.payloads import num_entries, open_codecs
from tide_cache.payloads.candidates import Candidates
from tide_cache.rows import table_to_rows

pytest.importorskip("vllm", reason="vllm is not installed: run 'make test-vllm'")
psutil = pytest.importorskip("psutil")  # vLLM needs it

BUILD: dict[str, Any] = {
    "payloads": ["candidates"],
    "candidates": {"k": 12, "codec": "raw", "mean_logits_positions": 64},
    "fidelity_positions": 64,
}


def succeed(*arguments: str | Path) -> str:
    # The engine in processes of its own, whatever the tests beside this one set.
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    done = run_command(*arguments, timeout_s=900)
    monkeypatch.undo()
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_vllm(config: Path) -> Path:
    values = yaml.safe_load(config.read_text())
    teacher = values["build"]["teacher"]
    teacher |= {"backend": "vllm", "vllm": {"kv_cache_gib": 0.25, "max_model_len": 256}}
    return write_yaml(config.with_name("vllm.yaml"), values)


def stored(cache: Cache, view: int) -> Candidates:
    """The decoded candidates of a view."""
    manifest = cache.manifest
    assert isinstance(manifest, CacheManifest)
    table = cache.read_rows(view=view, rows=range(cache.num_samples))
    codec = open_codecs(cache.store, manifest).candidates
    assert codec is not None
    rows = table_to_rows(table, manifest.alignment)
    return codec.decode(table, np.array([num_entries(row, manifest.alignment) for row in rows]))


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a premasked set and a config."""
    folder = tmp_path_factory.mktemp("build")
    model = make_model("qwen3", vocab_size=448, max_position_embeddings=512, head_dim=32)
    config = write_pipeline(folder, model, num_rows=24, prepare={}, build=BUILD)
    succeed("prepare", config, "-o", folder / "premasked", "--workers", "1")
    return folder


def test_an_engine_does_not_outlive_a_killed_build(ground: Path, tmp_path: Path) -> None:
    config = with_vllm(ground / "pipeline.yaml")
    arguments = ("build", config, "-p", ground / "premasked", "-o", tmp_path / "cache")
    environment = command_environment()
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with subprocess.Popen(
        command(*arguments, "--workers", "1"),
        cwd=PROJECT_ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as build:
        children = wait_for_engine(psutil.Process(build.pid))
        build.kill()
        _, alive = psutil.wait_procs(children, timeout=120)
    for process in alive:
        process.kill()
    assert alive == []


def wait_for_engine(build: Any, timeout_s: float = 600) -> list[Any]:
    """All processes below a build, once its engine has a worker."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        children = build.children(recursive=True)
        if any("VLLM::Worker" in " ".join(cmdline_of(child)) for child in children):
            return list(children)
        time.sleep(0.2)
    raise AssertionError("no engine within the time")


def cmdline_of(process: Any) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def test_the_cache_is_that_of_transformers(ground: Path, tmp_path: Path) -> None:
    config, premasked = ground / "pipeline.yaml", ground / "premasked"
    caches = []
    for name, path in (("hf", config), ("vllm", with_vllm(config))):
        output = tmp_path / name
        printed = succeed("build", path, "-p", premasked, "-o", output, "--workers", "1", "--json")
        json.loads(printed)  # the engine's own output does not mix with it
        succeed("verify", output)
        caches.append(open_cache(output))
    ours, theirs = caches
    facts = [cache.manifest for cache in caches]
    assert [f.teacher_model.backend for f in facts] == ["hf", "vllm"]
    assert any("vllm" in package for package in facts[1].build_provenance["packages"])
    assert facts[0].payloads == facts[1].payloads
    # Calibration asked transformers for both.
    assert facts[0].fidelity == facts[1].fidelity
    assert facts[0].counts == {**facts[1].counts, "size_bytes": facts[0].counts["size_bytes"]}
    for view in range(ours.num_views):
        tables = [cache.read_rows(view=view, rows=range(cache.num_samples)) for cache in caches]
        assert tables[0].schema.equals(tables[1].schema)
        assert tables[0]["sample_id"].equals(tables[1]["sample_id"])
        one, other = stored(ours, view), stored(theirs, view)
        assert len(one.label_logprob_P) > 50
        np.testing.assert_array_equal(one.ids_PK, other.ids_PK)
        for field in ("logits_PK", "logsumexp_PT", "label_logprob_P"):
            mine, its = getattr(one, field), getattr(other, field)
            np.testing.assert_allclose(mine, its, rtol=0, atol=1e-4)
