"""From measured runs to figures: means and spreads of cells, and each ordering in each setting.

A setting says which cell and which weight stands for a method: answers as published (KL, CALM and
TIDE-Cross from a teacher without CompDemo) or all from the one cache; weight 1 as in the paper, or
the weight chosen for each method on validation prompts.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any, Literal

from examples.paper.cells import ABLATIONS, METHODS, PipelineName
from examples.paper.mini_runs import AR_CELL, Run
from examples.paper.orderings import Comparison, Ordering, compare, paper_orderings

Figure = Literal["nll", "kl", "exact_match"]
FIGURES: tuple[Figure, ...] = ("nll", "kl", "exact_match")
BySeed = dict[int, float]
# By cell and weight, then by figure and seed.
Table = dict[tuple[str, float], dict[Figure, BySeed]]
# By cell and weight: NLL on validation prompts.
Tried = dict[str, dict[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Which runs stand for the methods."""

    as_published: bool
    chosen_weights: bool

    @property
    def name(self) -> str:
        """Words for it."""
        caches = "caches as published" if self.as_published else "one cache"
        return f"{caches}, {'chosen weight' if self.chosen_weights else 'weight 1'}"

    def run_of(
        self, label: str, pipeline: PipelineName, weights: Mapping[str, float]
    ) -> tuple[str, float]:
        """Return the cell and weight behind a row of table 1 or 2."""
        if label == "AR":
            return AR_CELL, 1.0
        cell = _cell_of(label, pipeline, as_published=self.as_published)
        return cell, weights.get(cell, 1.0) if self.chosen_weights else 1.0


SETTINGS = tuple(
    Setting(as_published=published, chosen_weights=chosen)
    for published in (True, False)
    for chosen in (False, True)
)


def figures_of(
    measured: Mapping[Run, Mapping[str, Any]],
    *,
    teachers: Mapping[PipelineName, Mapping[str, Any]],
    tried: Tried,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Return everything that is printed, as JSON values."""
    table, weights = table_of(measured), chosen_weights(tried)
    return {
        "runs": [
            {"cell": run.cell, "weight": run.weight, "seed": run.seed, **figures}
            for run, figures in measured.items()
        ],
        "cells": [
            {"cell": cell, "weight": weight, **{name: summary(row[name]) for name in FIGURES}}
            for (cell, weight), row in table.items()
        ],
        "weights": weights,
        "tried": {
            cell: {f"{weight:g}": round(nll, 4) for weight, nll in by_weight.items()}
            for cell, by_weight in tried.items()
        },
        "teachers": {name: dict(values) for name, values in teachers.items()},
        "orderings": orderings_of(table, weights),
        "seconds": dict(seconds),
    }


def chosen_weights(tried: Tried) -> dict[str, float]:
    """Return by cell the weight with the lowest NLL."""
    return {cell: min(by_weight, key=lambda w: by_weight[w]) for cell, by_weight in tried.items()}


def table_of(measured: Mapping[Run, Mapping[str, Any]]) -> Table:
    """Return the figures of every cell and weight by seed; one that is not measured is left out."""
    table: Table = {}
    for run, figures in sorted(measured.items(), key=lambda item: item[0].seed):
        row = table.setdefault((run.cell, run.weight), {name: {} for name in FIGURES})
        for name in FIGURES:
            value = figures.get(name)
            if value is not None:
                row[name][run.seed] = value["all"] if name == "exact_match" else value
    return dict(sorted(table.items()))


def orderings_of(table: Table, weights: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return each of the paper's orderings with what NLL and exact match say in each setting."""
    return [
        {
            **asdict(ordering),
            "settings": {
                setting.name: {
                    "nll": _compare(ordering, setting, "nll", table, weights).as_json(),
                    "exact_match": _compare(
                        ordering, setting, "exact_match", table, weights
                    ).as_json(),
                }
                for setting in SETTINGS
            },
        }
        for ordering in paper_orderings()
    ]


def summary(values: BySeed) -> dict[str, Any] | None:
    """Return every seed's value, their mean and standard deviation; None without any."""
    if not values:
        return None
    found = list(values.values())
    return {
        "values": {str(seed): round(value, 4) for seed, value in values.items()},
        "mean": round(mean(found), 4),
        "sd": round(stdev(found), 4) if len(found) > 1 else None,
    }


def _compare(
    ordering: Ordering,
    setting: Setting,
    figure: Figure,
    table: Table,
    weights: Mapping[str, float],
) -> Comparison:
    better, worse = (
        table.get(setting.run_of(label, ordering.pipeline, weights), {}).get(figure, {})
        for label in (ordering.better, ordering.worse)
    )
    return compare(better, worse, higher_is_better=figure == "exact_match")


def _cell_of(label: str, pipeline: PipelineName, *, as_published: bool) -> str:
    if label == "BD3LM":
        return f"{pipeline}/ce"
    for name, cell in ABLATIONS:
        if name == label:
            return cell
    method = next(m for m in METHODS if (m.pipeline, m.label) == (pipeline, label))
    return method.as_published if as_published else method.one_cache
