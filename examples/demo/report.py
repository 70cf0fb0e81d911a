"""The demo's table: mean and spread over seeds of every figure, and what the cache cost."""

from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.demo.config import DemoConfig

_FIGURES = ("nll", "kl", "exact_match")


def table_of(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by student and figure the value of each seed, their mean and standard deviation."""
    table: dict[str, dict[str, Any]] = {}
    for run in figures["students"]:
        row = table.setdefault(run["name"], {figure: [] for figure in (*_FIGURES, "seconds")})
        for figure in ("nll", "kl", "seconds"):
            if run[figure] is not None:
                row[figure].append(run[figure])
        row["exact_match"].append(run["exact_match"]["all"])
    return {
        name: {figure: _summary(values) for figure, values in row.items() if values}
        for name, row in table.items()
    }


def print_table(figures: dict[str, Any], config: DemoConfig) -> None:
    """Print the table and the costs on stdout."""
    console = Console(soft_wrap=True, highlight=False)
    table = Table(
        title=f"{config.data.held_out_rows} held-out rows masked at t = 0.5, "
        f"{config.data.prompts} prompts to answer; mean ± sd over seeds {list(config.seeds)}",
        title_justify="left",
    )
    kl = "KL to the teacher" if config.is_shared else "chunk KL to the teacher"
    for column in ("student", "NLL", kl, "exact match", "s to train"):
        table.add_column(column, justify="left" if column == "student" else "right")
    for name, row in figures["table"].items():
        table.add_row(
            name,
            _text(row.get("nll"), 3),
            _text(row.get("kl"), 3),
            _text(row["exact_match"], 3),
            _text(row["seconds"], 0),
        )
    teacher = figures["teacher"]
    table.add_row(
        "the teacher",
        f"{teacher['nll']:.3f}" if "nll" in teacher else "",
        f"{abs(teacher['kl']):.3f}" if "kl" in teacher else "",  # 0 up to rounding, on either side
        f"{teacher['exact_match']['all']:.3f}",
        f"{figures['seconds']['teacher']:.0f}",
    )
    console.print(table)
    console.print(
        f"cache: {figures['bytes_per_masked_position']} bytes per masked position "
        f"({figures['cache_bytes'] / 1e6:.2f} MB for {figures['num_masked_positions']:,}), "
        f"{figures['bytes_per_masked_position'] / 1e3:.3f} GB per million"
    )
    for text in figures["fidelity"]:
        console.print(f"payload: {text}")
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in figures["seconds"].items())
    console.print(f"seconds: {stages}; {sum(figures['seconds'].values()):.0f} in all")


def _summary(values: list[float]) -> dict[str, Any]:
    return {
        "values": [round(value, 4) for value in values],
        "mean": round(mean(values), 4),
        "sd": round(stdev(values), 4) if len(values) > 1 else None,
    }


def _text(summary: dict[str, Any] | None, digits: int) -> str:
    if summary is None:
        return ""
    spread = "" if summary["sd"] is None else f" ± {summary['sd']:.{digits}f}"
    return f"{summary['mean']:.{digits}f}{spread}"
