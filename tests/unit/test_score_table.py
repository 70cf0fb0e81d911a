"""The table at the end: our scores beside the paper's, and what it says of them."""

from io import StringIO

from rich.console import Console

from stage2_student.benchmark_tasks.protocol import BENCHMARKS
from stage2_student.benchmark_tasks.results import BenchmarkResults, Score
from stage2_student.benchmark_tasks.score_table import (
    as_markdown,
    notes,
    print_table,
    table_cells,
)


def make_score(task: str, value: float, *, num_samples: int = 100) -> Score:
    benchmark = BENCHMARKS[task]
    return Score(
        task=task,
        title=benchmark.title,
        metric=benchmark.metric,
        score=value,
        stderr=1.25,
        num_samples=num_samples,
        num_rows=100,
        metrics={benchmark.metric: {"score": value, "stderr": 1.25}},
        num_new_tokens=5,
        num_forwards=5,
        seconds=1.0,
    )


def make_results(*scores: Score, row: str | None = "TIDE-Cross (cross)") -> BenchmarkResults:
    return BenchmarkResults(
        model="m",
        model_sha256="0",
        row=row,
        settings={},
        versions={},
        scores=scores,
        left_out={"mbpp_instruct": "left out"},
    )


def test_a_score_stands_beside_the_papers() -> None:
    head, row = table_cells(make_results(make_score("gsm8k_cot", 50.0)))
    assert head == ["benchmark", "score", "s.e.", "questions", "paper", "difference"]
    assert row == ["GSM8K", "50.00", "1.25", "100", "52.24", "-2.24"]


def test_a_limited_score_is_marked_and_not_compared() -> None:
    results = make_results(make_score("gsm8k_cot", 50.0, num_samples=2))
    assert table_cells(results)[1] == ["GSM8K", "50.00", "1.25", "2 of 100*", "52.24", "-"]
    assert notes(results)[0].startswith("* not all questions were asked (--limit)")


def test_all_eight_have_an_average() -> None:
    scores = [make_score(task, 30.0 + number) for number, task in enumerate(BENCHMARKS)]
    results = make_results(*scores)
    assert results.average == 33.5
    assert table_cells(results)[-1] == ["Average", "33.50", "-", "-", "34.20", "-0.70"]
    assert results.as_json()["paper_average"] == 34.2
    assert make_results(*scores[1:]).average is None
    few = make_score("gsm8k_cot", 30.0, num_samples=2)
    assert make_results(few, *scores[1:]).average is None


def test_without_a_row_the_rows_are_named() -> None:
    results = make_results(make_score("bbh", 27.0), row=None)
    assert table_cells(results)[1] == ["BBH", "27.00", "1.25", "100"]
    assert any("--row NAME, one of AR, BD3LM, KL (shared)" in note for note in notes(results))
    assert results.as_json()["benchmarks"][0]["paper_score"] is None


def test_both_forms_say_the_same() -> None:
    results = make_results(make_score("minerva_math", 13.0))
    stream = StringIO()
    print_table(results, Console(file=stream, width=80))
    printed = stream.getvalue()
    written = as_markdown(results)
    for text in ("MATH", "13.00", "13.20", "-0.20", "does not name its metric for MATH"):
        assert text in printed and text in written
    assert "mbpp_instruct: left out" in printed and "mbpp_instruct: left out" in written
