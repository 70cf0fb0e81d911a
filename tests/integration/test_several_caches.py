"""`tide-train` over several caches: shares, resuming, remote ones, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stage2_student.config import TrainConfig
from stage2_student.metrics import MEASURED_KEYS, read_metrics
from stage2_student.plan import describe, open_run
from stage2_student.trainer import TrainSummary, train
from tests.cache_builders import SetShape, Workshop, make_workshop, write_cache, write_premasked
from tests.integration.test_resume import StopAfter, Stopped
from tide_cache.cache import open_cache
from tide_cache.errors import CompatibilityError, ConfigError


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A workshop whose `cache` has 40 samples; beside it `other` of 24 and k = 6, `chunks`."""
    folder = tmp_path_factory.mktemp("workshop")
    workshop = make_workshop(folder, SetShape(num_samples=40))
    write_premasked(folder / "pre-other", workshop.tokenizer, SetShape(num_samples=24, ragged=True))
    write_cache(folder / "other", folder / "pre-other", k=6, mean_logits=True)
    write_premasked(folder / "pre-blocks", workshop.tokenizer, SetShape(block_size=8))
    write_cache(folder / "blocks", folder / "pre-blocks")
    return workshop


def caches(workshop: Workshop) -> list[str]:
    return [str(workshop.cache), str(workshop.folder / "other")]


def run(workshop: Workshop, output: Path, **changes: Any) -> TrainSummary:
    config = TrainConfig.model_validate(workshop.config(output=str(output), **changes))
    return train(config, caches(workshop))


def lines_of(output: Path) -> list[dict[str, Any]]:
    lines = read_metrics(output / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in MEASURED_KEYS} for line in lines]


def test_each_step_reads_one_cache_by_weight(workshop: Workshop, tmp_path: Path) -> None:
    summary = run(workshop, tmp_path, max_steps=12, cache_weights=[2, 1])
    lines = lines_of(tmp_path)
    read = [line["cache"] for line in lines]
    assert (read.count(0), read.count(1)) == (8, 4)
    assert all(read[i : i + 3].count(1) == 1 for i in range(0, 12, 3))
    # The second cache has 3 steps an epoch and is in its second; the first has 5.
    assert [line["epoch"] for line in lines if line["cache"] == 1] == [0, 0, 0, 1]
    assert [line["epoch"] for line in lines if line["cache"] == 0] == [0] * 5 + [1] * 3
    first = open_cache(caches(workshop)[0]).identity
    assert summary.cache_identity not in (first, open_cache(caches(workshop)[1]).identity)


def test_a_cache_trains_on_the_rows_that_it_has_alone(workshop: Workshop, tmp_path: Path) -> None:
    run(workshop, tmp_path / "both", max_steps=10)
    config = TrainConfig.model_validate(
        workshop.config(output=str(tmp_path / "alone"), max_steps=5)
    )
    train(config, workshop.cache)
    both = [line for line in lines_of(tmp_path / "both") if line["cache"] == 0]
    keys = ("num_masked", "num_candidates", "num_tokens", "num_computed")
    alone = lines_of(tmp_path / "alone")
    assert [[line[key] for key in keys] for line in both[:5]] == [
        [line[key] for key in keys] for line in alone
    ]


def test_epochs_read_both_as_often(workshop: Workshop, tmp_path: Path) -> None:
    run(workshop, tmp_path, max_steps=None, epochs=2)
    lines = lines_of(tmp_path)
    assert len(lines) == 2 * (5 + 3)
    for cache, steps in ((0, 5), (1, 3)):
        epochs = [line["epoch"] for line in lines if line["cache"] == cache]
        assert epochs == [0] * steps + [1] * steps


def test_a_stopped_run_goes_on_to_the_same_bits(workshop: Workshop, tmp_path: Path) -> None:
    run(workshop, tmp_path / "straight", max_steps=12)
    config = TrainConfig.model_validate(
        workshop.config(output=str(tmp_path / "stopped"), max_steps=12)
    )
    with pytest.raises(Stopped):
        train(config, caches(workshop), progress=StopAfter(8))
    assert train(config, caches(workshop)).resumed_from_step == 5
    assert lines_of(tmp_path / "stopped") == lines_of(tmp_path / "straight")
    with pytest.raises(CompatibilityError, match=r"begun with the cache .*another"):
        train(config, caches(workshop)[::-1])


def test_the_plan_names_each_cache(workshop: Workshop, tmp_path: Path) -> None:
    values = workshop.config(output=str(tmp_path), max_steps=12, cache_weights=[3, 1])
    with_both = describe(open_run(TrainConfig.model_validate(values), caches(workshop)))
    json.dumps(with_both)
    assert with_both["cache"] == caches(workshop)
    assert [part["steps"] for part in with_both["caches"]] == [9, 3]
    assert [part["epochs"] for part in with_both["caches"]] == [1.8, 1.0]
    assert with_both["num_samples"] == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_weights": [1]}, r"cache_weights: expected one for each --cache \(2\), got 1"),
        ({"cache_weights": [1, 2], "epochs": 2, "max_steps": None}, "epochs: with cache_weights"),
    ],
)
def test_weights_that_do_not_fit(
    workshop: Workshop, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(workshop, tmp_path, **changes)


def test_caches_that_do_not_fit(workshop: Workshop, tmp_path: Path) -> None:
    config = TrainConfig.model_validate(workshop.config(output=str(tmp_path)))
    copy = tmp_path / "copy"
    shutil.copytree(workshop.cache, copy)
    with pytest.raises(CompatibilityError, match="copy: the same cache as"):
        open_run(config, [str(workshop.cache), str(copy)])
    with pytest.raises(CompatibilityError, match=r"blocks: block_size: .* made for 4, .* for 8"):
        open_run(config, [str(workshop.cache), str(workshop.folder / "blocks")])
    with pytest.raises(CompatibilityError, match="'tidal' needs a teacher's answers"):
        open_run(config, [str(workshop.cache), str(workshop.premasked)])
