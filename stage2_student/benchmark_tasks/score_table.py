"""The table at the end of a run: our scores beside the paper's, as text, rich and Markdown."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from stage2_student.benchmark_tasks.paper_figures import ROWS, SOURCE, paper_row
from stage2_student.benchmark_tasks.protocol import BENCHMARKS
from stage2_student.benchmark_tasks.results import BenchmarkResults, Score

_MISSING = "-"


def print_table(results: BenchmarkResults, console: Console) -> None:
    """Print the table and the notes under it."""
    head, *rows = table_cells(results)
    table = Table(title=results.model, title_justify="left", box=None)
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes(results):
        console.print(note, markup=False, highlight=False)


def as_markdown(results: BenchmarkResults) -> str:
    """Return the table and its notes as Markdown."""
    head, *rows = table_cells(results)
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    listed = "\n".join(f"- {note}" for note in notes(results))
    return f"# {results.model}\n\n{table}\n\n{listed}\n"


def table_cells(results: BenchmarkResults) -> list[list[str]]:
    """Return the table's cells, the header first. A limited score carries a star."""
    head = ["benchmark", "score", "s.e.", "questions"]
    if results.row:
        head += ["paper", "difference"]
    rows = [_cells(results, score) for score in results.scores]
    if results.average is not None:
        average = ["Average", f"{results.average:.2f}", _MISSING, _MISSING]
        rows.append(average + _beside(results, "Avg", results.average))
    return [head, *rows]


def notes(results: BenchmarkResults) -> list[str]:
    """Return what a reader must know to read the table."""
    return list(_notes(results))


def _cells(results: BenchmarkResults, score: Score) -> list[str]:
    questions = f"{score.num_samples:,}"
    if score.is_limited:
        questions += f" of {score.num_rows:,}*"
    cells = [
        score.title,
        f"{score.score:.2f}",
        _MISSING if score.stderr is None else f"{score.stderr:.2f}",
        questions,
    ]
    return cells + _beside(results, score.title, None if score.is_limited else score.score)


def _beside(results: BenchmarkResults, title: str, ours: float | None) -> list[str]:
    """Return the paper's figure and the difference, or nothing if no row was asked for."""
    if not results.row:
        return []
    paper = paper_row(results.row)[title]
    return [f"{paper:.2f}", _MISSING if ours is None else f"{ours - paper:+.2f}"]


def _notes(results: BenchmarkResults) -> Iterator[str]:
    if any(score.is_limited for score in results.scores):
        yield "* not all questions were asked (--limit): not comparable with the paper"
    if results.row:
        yield f"paper: {results.row} of {SOURCE}, which gives no standard errors"
    else:
        yield f"for the paper's figures beside these: --row NAME, one of {', '.join(ROWS)}"
    named = ", ".join(f"{score.title} {score.metric}" for score in results.scores)
    yield f"metrics, and the filter in front of each: {named}"
    unsure = [s.title for s in results.scores if not BENCHMARKS[s.task].metric_is_certain]
    if unsure:
        yield f"the paper does not name its metric for {', '.join(unsure)}; results.json has all"
    for task, reason in results.left_out.items():
        yield f"{task}: {reason}"
