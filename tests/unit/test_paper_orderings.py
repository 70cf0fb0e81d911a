"""Known figures in, right verdicts out; and the orderings are those of the published averages."""

from typing import Any

import pytest

from examples.demo.config import PipelineConfig
from examples.paper.mini_config import read_mini
from examples.paper.mini_figures import SETTINGS, chosen_weights, figures_of, orderings_of, table_of
from examples.paper.mini_report import markdown
from examples.paper.mini_runs import AR_CELL, Run
from examples.paper.orderings import compare, paper_orderings
from tests.support import PROJECT_ROOT

SEEDS = (1, 2, 3)


def by_seed(*values: float) -> dict[int, float]:
    return dict(zip(SEEDS, values, strict=False))


@pytest.mark.parametrize(
    ("better", "worse", "higher", "verdict", "num_as_paper"),
    [
        ((0.6, 0.7, 0.8), (0.5, 0.6, 0.65), True, "appears", 3),
        ((0.6, 0.7, 0.8), (0.5, 0.6, 0.65), False, "reversed", 0),
        ((0.30, 0.31, 0.32), (0.40, 0.42, 0.41), False, "appears", 3),
        # Two of three, however far: not in every seed.
        ((0.9, 0.9, 0.49), (0.5, 0.5, 0.5), True, "within the spread", 2),
        # Three of three, but the mean (.0367) is below its sd (.0551).
        ((0.505, 0.505, 0.6), (0.5, 0.5, 0.5), True, "within the spread", 3),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), True, "within the spread", 0),
        ((0.9,), (0.5,), True, "within the spread", 1),  # one seed has no spread
        ((), (0.5, 0.5, 0.5), True, "not measured", 0),
    ],
)
def test_verdicts(
    better: tuple[float, ...],
    worse: tuple[float, ...],
    higher: bool,
    verdict: str,
    num_as_paper: int,
) -> None:
    found = compare(by_seed(*better), by_seed(*worse), higher_is_better=higher)
    assert (found.verdict, found.num_as_paper) == (verdict, num_as_paper)
    assert found.num_seeds == len(better)


def test_differences_are_paired_by_seed() -> None:
    found = compare({1: 0.2, 3: 0.9, 4: 0.0}, {3: 0.7, 1: 0.1, 2: 5.0}, higher_is_better=True)
    assert found.values == (0.1, 0.2)
    assert found.mean == 0.15
    assert found.sd == pytest.approx(0.0707, abs=1e-4)


def test_orderings_are_those_of_the_published_averages() -> None:
    found = {(o.pipeline, o.better, o.worse): o.gap for o in paper_orderings()}
    assert len(found) == 15
    assert found["shared", "TIDE-Shared", "KL"] == 3.0
    assert found["shared", "TIDE-Shared", "TIDE-Cross"] == 2.76
    assert found["cross", "TIDE-Cross", "TIDE-Shared"] == 0.37
    assert found["cross", "TIDE-Shared", "CALM"] == 1.58
    assert found["cross", "TIDE-Cross", "BD3LM"] == 1.53
    assert found["shared", "BD3LM", "KL"] == 2.12
    assert found["shared", "AR", "BD3LM"] == 8.24
    assert found["shared", "TIDE-Shared, full", "without CompDemo"] is None


def measured(cell: str, weight: float, nlls: tuple[float, ...]) -> dict[Run, dict[str, Any]]:
    return {
        Run(cell=cell, weight=weight, seed=seed, purpose="report"): {
            "nll": nll,
            "kl": nll / 2,
            "exact_match": {"all": 1 - nll, "by_task": {}},
        }
        for seed, nll in zip(SEEDS, nlls, strict=True)
    }


RUNS = {
    **measured("shared/ce", 1.0, (0.50, 0.51, 0.52)),
    **measured("shared/kl", 1.0, (0.30, 0.31, 0.32)),
    **measured("shared/kl", 4.0, (0.20, 0.21, 0.22)),
    **measured("shared/kl_as_published", 1.0, (0.60, 0.61, 0.62)),
    **measured("shared/tide_shared", 1.0, (0.40, 0.41, 0.42)),
    **measured("shared/tide_shared", 0.25, (0.55, 0.56, 0.56)),
}
TRIED = {
    "shared/kl": {1.0: 0.4, 4.0: 0.3},
    "shared/kl_as_published": {1.0: 0.41, 4.0: 0.42},
    "shared/tide_shared": {1.0: 0.5, 0.25: 0.49},
}
WEIGHTS = {"shared/kl": 4.0, "shared/kl_as_published": 1.0, "shared/tide_shared": 0.25}


def test_a_weight_is_chosen_by_its_validation_nll() -> None:
    assert chosen_weights(TRIED) == WEIGHTS


def test_each_setting_compares_its_own_cells_and_weights() -> None:
    found = orderings_of(table_of(RUNS), WEIGHTS)
    ordering = next(o for o in found if (o["better"], o["worse"]) == ("TIDE-Shared", "KL"))
    means = {name: values["nll"]["mean"] for name, values in ordering["settings"].items()}
    assert means == {
        "caches as published, weight 1": 0.2,
        "caches as published, chosen weight": pytest.approx(0.0533, abs=1e-4),
        "one cache, weight 1": -0.1,
        "one cache, chosen weight": pytest.approx(-0.3467, abs=1e-4),
    }
    assert [ordering["settings"][s.name]["exact_match"]["verdict"] for s in SETTINGS] == [
        "appears",
        "appears",
        "reversed",
        "reversed",
    ]


def test_the_report_shows_every_seed_and_the_spread() -> None:
    _, pipelines = read_mini(PROJECT_ROOT / "examples/paper/mini.yaml", [])
    ar = Run(cell=AR_CELL, weight=1.0, seed=1, purpose="report")
    runs = {**RUNS, ar: {"exact_match": {"all": 0.9, "by_task": {}}, "next_token_nll": 1.234}}
    teacher = {"nll": 0.1, "kl": 0.0, "exact_match": {"all": 0.8}}
    figures = figures_of(
        runs, teachers={"shared": teacher}, tried=TRIED, seconds={"students": 60.0}
    )
    shared: dict[Any, PipelineConfig] = {"shared": pipelines["shared"]}
    lines = [
        " ".join(line.replace("|", " ").split()) for line in markdown(figures, shared).splitlines()
    ]
    assert "KL without CompDemo 1 0.610 ± 0.010 0.305 ± 0.005 0.390 ± 0.010 30.55" in lines
    assert "KL with CompDemo 4 0.210 ± 0.010 0.105 ± 0.005 0.790 ± 0.010 30.55" in lines
    assert "shared/kl 4 0.200, 0.210, 0.220 0.100, 0.105, 0.110 0.800, 0.790, 0.780" in lines
    assert "shared/kl 0.400 0.300 4" in lines
    assert "AR none 0.900 40.91" in lines  # no NLL: another quantity
    assert any("1.234 nats, is another quantity" in line for line in lines)
    assert any(line.startswith("shared: AR > BD3LM (+8.24)") for line in lines)
    assert "Seconds: students 60; 60 in all (1.0 minutes)." in lines
