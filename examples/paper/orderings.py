"""Which of the paper's orderings a set of runs shows: computed from paired seeds, nothing by hand.

Both sides of an ordering are trained with the same seeds (initial weights, order of rows), so the
seeds are pairs. An ordering *appears* where the difference has the paper's sign in every seed and
its mean exceeds its standard deviation, is *reversed* where that holds the other way round, and is
*within the spread* otherwise. With three seeds this is a coarse rule: three of three signs alone
happen by chance in a quarter of the cases where there is no difference at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any, Literal

from examples.paper.cells import METHODS, PipelineName
from stage2_student.benchmark_tasks.paper_figures import paper_row

Verdict = Literal["appears", "reversed", "within the spread", "not measured"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ordering:
    """`better` scores above `worse` in the paper, by `gap` points of its average where known."""

    pipeline: PipelineName
    better: str
    worse: str
    gap: float | None
    table: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Paired differences, positive where they have the paper's sign."""

    verdict: Verdict
    num_as_paper: int
    num_seeds: int
    mean: float | None
    sd: float | None
    values: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def paper_orderings() -> tuple[Ordering, ...]:
    """Return the orderings that the averages of table 1 state, and the two of table 2.

    Table 2's are the claim that each component helps; its figures are not in the public README.
    """
    found = []
    for pipeline in ("shared", "cross"):
        scores = {m.label: m.published_average for m in METHODS if m.pipeline == pipeline}
        scores["BD3LM"] = paper_row("BD3LM")["Avg"]
        ranked = sorted(scores, key=lambda label: -scores[label])
        found += [
            Ordering(
                pipeline=pipeline,
                better=better,
                worse=worse,
                gap=round(scores[better] - scores[worse], 2),
                table=1,
            )
            for place, better in enumerate(ranked)
            for worse in ranked[place + 1 :]
        ]
    ar = Ordering(
        pipeline="shared",
        better="AR",
        worse="BD3LM",
        gap=round(paper_row("AR")["Avg"] - paper_row("BD3LM")["Avg"], 2),
        table=1,
    )
    ablations = [
        Ordering(pipeline="shared", better="TIDE-Shared, full", worse=worse, gap=None, table=2)
        for worse in ("without timestep axis", "without CompDemo")
    ]
    return (*found, ar, *ablations)


def compare(
    better: Mapping[int, float], worse: Mapping[int, float], *, higher_is_better: bool
) -> Comparison:
    """Compare two rows of figures by seed over the seeds that both have."""
    sign = 1.0 if higher_is_better else -1.0
    seeds = sorted(better.keys() & worse.keys())
    values = tuple(sign * (better[seed] - worse[seed]) for seed in seeds)
    spread = stdev(values) if len(values) > 1 else None
    return Comparison(
        verdict=_verdict(values, spread),
        num_as_paper=sum(value > 0 for value in values),
        num_seeds=len(values),
        mean=round(mean(values), 4) if values else None,
        sd=None if spread is None else round(spread, 4),
        values=tuple(round(value, 4) for value in values),
    )


def _verdict(values: Sequence[float], spread: float | None) -> Verdict:
    if not values:
        return "not measured"
    if spread is None or abs(mean(values)) <= spread:
        return "within the spread"
    if all(value > 0 for value in values):
        return "appears"
    if all(value < 0 for value in values):
        return "reversed"
    return "within the spread"
