"""Rows of the benchmarks in the forms of their releases and hub repositories, made up in small."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
MMLU_PRO_CATEGORIES = (
    "biology",
    "business",
    "chemistry",
    "computer science",
    "economics",
    "engineering",
    "health",
    "history",
    "law",
    "math",
    "other",
    "philosophy",
    "physics",
    "psychology",
)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_gsm8k(data: Path, num_rows: int = 6) -> None:
    rows = [
        {"question": f"Ada has {n} clips and finds {n}.", "answer": f"{n}+{n}\n#### {2 * n}"}
        for n in range(1, num_rows + 1)
    ]
    write_jsonl(data / "gsm8k" / "test.jsonl", rows)


def hellaswag_rows(num_rows: int) -> list[dict[str, Any]]:
    return [
        {
            "activity_label": "Baking [header]",
            "ctx_a": f"Row {n}: a man bakes [title] Bread",
            "ctx_b": "he then",
            "endings": [f"ending {n} {letter} [step] x" for letter in "wxyz"],
            "label": str(n % 4),
        }
        for n in range(num_rows)
    ]


def write_hellaswag(data: Path, num_rows: int) -> None:
    path = data / "hellaswag" / "data" / "validation-00000-of-00001.parquet"
    write_parquet(path, hellaswag_rows(num_rows))


def mmlu_rows(subject: str, num_rows: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f" {subject} number {n}? ",
            "subject": subject,
            "choices": [f"{n} {word}" for word in ("one", "two", "three", "four")],
            "answer": n % 4,
        }
        for n in range(num_rows)
    ]


def write_mmlu(data: Path, subjects: Iterable[str], num_rows: int) -> None:
    for subject in subjects:
        path = data / "mmlu" / subject / "test-00000-of-00001.parquet"
        write_parquet(path, mmlu_rows(subject, num_rows))


def write_mmlu_pro(data: Path, categories: Iterable[str] = MMLU_PRO_CATEGORIES) -> None:
    rows = [
        {
            "question": f"What of {category}?",
            "options": [f"{category} {letter} " for letter in "abcdefghij"],
            "answer": "ABCDEFGHIJ"[n % 10],
            "category": category,
            "cot_content": "A: Let's think step by step. The answer is (A).",
        }
        for n, category in enumerate(categories)
    ]
    write_parquet(data / "mmlu_pro" / "data" / "test-00000-of-00001.parquet", rows)


def write_math(data: Path, num_rows: int) -> None:
    for subject in MATH_SUBJECTS:
        rows = [
            {
                "problem": f"{subject} {n}: what is $\\frac{{{n}}}{{7}}$?",
                "solution": f"It is $\\boxed{{\\frac{{{n}}}{{7}}}}$.",
                "level": "Level 1",
                "type": subject,
            }
            for n in range(1, num_rows + 1)
        ]
        write_jsonl(data / "math" / subject / "test.jsonl", rows)
