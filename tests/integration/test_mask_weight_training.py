"""`objective.mask_weight` through whole runs of `tide-train` on tiny sets of two tokenizers."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stage2_student.config import TrainConfig, deciding_keys
from stage2_student.metrics import MEASURED_KEYS, read_metrics
from stage2_student.trainer import train
from tests.cache_builders import SetShape, Workshop, make_workshop
from tests.support import PROJECT_ROOT
from tide_cache.errors import CompatibilityError

SHAPE = SetShape(num_samples=24, ragged=True, alignment="chunks")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("chunks"), SHAPE, payloads=("chunks",))


def metrics_of(output: Path) -> list[dict[str, Any]]:
    lines = read_metrics(output / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in MEASURED_KEYS} for line in lines]


def run(
    workshop: Workshop, output: Path, mask_weight: str, *, cache: Path, **changes: Any
) -> list[dict[str, Any]]:
    objective = {"losses": ["ce"], "mask_weight": mask_weight, **changes.pop("objective", {})}
    values = workshop.config(output=str(output), objective=objective, max_steps=6, **changes)
    train(TrainConfig.model_validate(values), cache)
    return metrics_of(output)


def test_the_command_trains_unbiased_on_a_premasked_set(workshop: Workshop, tmp_path: Path) -> None:
    """Cross entropy alone, no payload: the chunks are read for their lengths."""
    config = workshop.write_config(
        output=str(tmp_path / "run"), objective={"losses": ["ce"]}, max_steps=6
    )
    subprocess.run(
        [
            *(sys.executable, "-m", "stage2_student", str(config)),
            *("--cache", str(workshop.premasked), "--json"),
            *("--set", "objective.mask_weight=unbiased"),
        ],
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )
    unbiased = metrics_of(tmp_path / "run")
    assert len(unbiased) == 6
    # The same rows as a cache, in this process: the same numbers to the bit.
    assert run(workshop, tmp_path / "cache", "unbiased", cache=workshop.cache) == unbiased
    published = run(workshop, tmp_path / "published", "published", cache=workshop.premasked)
    first, other = unbiased[0], published[0]
    assert first["num_masked"] == other["num_masked"]
    assert 0 < first["loss/ce"] < 0.95 * other["loss/ce"]  # the same weights, rows and masks
    assert published[-1]["grad_norm"] != unbiased[-1]["grad_norm"]


def test_accumulated_batches_count_the_same_draws(workshop: Workshop, tmp_path: Path) -> None:
    both = {"losses": {"ce": 1.0, "reverse_calm": 1.0}}
    lines = [
        run(
            workshop,
            tmp_path / name,
            "unbiased",
            cache=workshop.cache,
            objective=both,
            stream=stream,
        )
        for name, stream in (
            ("whole", {"batch_size": 8}),
            ("parts", {"batch_size": 8, "micro_batch_size": 3}),
        )
    ]
    for whole, parts in zip(*lines, strict=True):
        for key in ("loss/ce", "loss/reverse_calm", "grad_norm"):
            assert math.isclose(whole[key], parts[key], rel_tol=1e-4), (whole["step"], key)


def test_with_one_tokenizer_both_weights_are_one_run(tmp_path: Path) -> None:
    shared = make_workshop(tmp_path, SetShape(num_samples=24, ragged=True, lone_share=0.3))
    tidal = {"losses": ["ce", "tidal"]}
    runs = [
        run(shared, tmp_path / weight, weight, cache=shared.cache, objective=tidal)
        for weight in ("published", "unbiased")
    ]
    assert runs[0] == runs[1]


def test_another_weight_is_another_run(workshop: Workshop, tmp_path: Path) -> None:
    config = TrainConfig.model_validate(workshop.config())
    assert deciding_keys(config)["objective.mask_weight"] == "published"
    run(workshop, tmp_path / "run", "published", cache=workshop.cache)
    message = r"objective.mask_weight \(begun with 'published', now 'unbiased'\)"
    with pytest.raises(CompatibilityError, match=message):
        run(workshop, tmp_path / "run", "unbiased", cache=workshop.cache)
