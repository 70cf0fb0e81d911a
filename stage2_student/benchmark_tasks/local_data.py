"""Data sets from local files: which files a benchmark needs, and what their rows must hold.

A folder is given once (`--data DIR`) and holds a sub-folder a benchmark. Both forms that people
have are read: the files of the original release, and the files of the hub repository that lm-eval
would download (`hf download --repo-type dataset REPO --local-dir DIR/NAME`). `LAYOUTS` is the list.
Everything is read and checked before a model is loaded; nothing is written to a data set cache.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage2_student.benchmark_tasks.row_files import read_rows
from tide_cache.errors import DataError, MissingFileError

Row = dict[str, Any]
# MBPP's own split: what its paper evaluates on, among the 974 rows of the one released file.
_MBPP_TEST_IDS = range(11, 511)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the rows of a benchmark lie inside `DIR/folder`.

    `patterns` are tried in order, the first that matches is used; `{part}` stands for a subject or
    sub-task. `fields` are the columns that the task reads. `keep(row, part)` drops rows of other
    parts or splits.
    """

    folder: str
    repository: str
    patterns: tuple[str, ...]
    fields: tuple[str, ...]
    keep: Callable[[Row, str], bool] | None = None


def _is_mbpp_test(row: Row, part: str) -> bool:
    return int(row["task_id"]) in _MBPP_TEST_IDS


def _is_of_subject(row: Row, part: str) -> bool:
    return row.get("subject", part) in (part, "")


LAYOUTS: Mapping[str, Layout] = {
    "gsm8k_cot": Layout(
        folder="gsm8k",
        repository="openai/gsm8k",
        patterns=("test.jsonl", "main/test-*.parquet"),
        fields=("question", "answer"),
    ),
    "minerva_math": Layout(
        folder="math",
        repository="EleutherAI/hendrycks_math",
        patterns=("{part}/test-*.parquet", "{part}/test.jsonl", "test/{part}/*.json"),
        fields=("problem", "solution"),
    ),
    "bbh": Layout(
        folder="bbh",
        repository="SaylorTwift/bbh",
        patterns=("bbh/{part}.json", "{part}.json", "{part}/test-*.parquet"),
        fields=("input", "target"),
    ),
    "mmlu_pro": Layout(
        folder="mmlu_pro",
        repository="TIGER-Lab/MMLU-Pro",
        patterns=("data/test-*.parquet", "test.jsonl"),
        fields=("question", "options", "answer", "category"),
    ),
    "hellaswag_gen": Layout(
        folder="hellaswag",
        repository="Rowan/hellaswag",
        patterns=("hellaswag_val.jsonl", "data/validation-*.parquet"),
        fields=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "mmlu_generative_dream": Layout(
        folder="mmlu",
        repository="cais/mmlu",
        patterns=(
            "{part}/test-*.parquet",
            "{part}/test.jsonl",
            "all/test-*.parquet",
            "test/{part}_test.csv",
        ),
        fields=("question", "choices", "answer"),
        keep=_is_of_subject,
    ),
    "humaneval_instruct": Layout(
        folder="humaneval",
        repository="openai/openai_humaneval",
        patterns=("HumanEval.jsonl", "HumanEval.jsonl.gz", "openai_humaneval/test-*.parquet"),
        fields=("prompt", "test", "entry_point"),
    ),
    "mbpp_instruct": Layout(
        folder="mbpp",
        repository="google-research-datasets/mbpp",
        patterns=("mbpp.jsonl", "full/test-*.parquet"),
        fields=("task_id", "text", "test_list"),
        keep=_is_mbpp_test,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalRows:
    """The checked rows of one benchmark: {part: rows}, and a hash over the files' bytes."""

    rows: Mapping[str, Sequence[Row]]
    files: tuple[Path, ...]
    sha256: str

    @property
    def num_rows(self) -> int:
        """Rows of all parts together."""
        return sum(len(rows) for rows in self.rows.values())


def load_local_rows(task: str, data_dir: Path, parts: Sequence[str]) -> LocalRows:
    """Read and check the rows of a benchmark. `parts` is `[""]` where it has none.

    Raises MissingFileError when a part has no file, FormatError or DataError on what is inside.
    """
    layout = LAYOUTS[task]
    rows: dict[str, list[Row]] = {}
    files: dict[Path, None] = {}
    read: dict[Path, list[Row]] = {}
    for part in parts:
        found = _find(task, data_dir, part)
        for path in found:
            files[path] = None
            if path not in read:
                read[path] = read_rows(path)
                _check_fields(read[path], layout.fields, path)
        kept = [row for path in found for row in read[path] if _keeps(layout, row, part)]
        if not kept:
            what = f"rows of {part!r}" if part else "rows of its test split"
            raise DataError(f"{found[0]}: expected {what}, found none")
        rows[part] = kept
    return LocalRows(rows=rows, files=tuple(files), sha256=_hash_files(list(files)))


def _find(task: str, data_dir: Path, part: str) -> list[Path]:
    layout = LAYOUTS[task]
    folder = data_dir / layout.folder
    for pattern in layout.patterns:
        if found := sorted(folder.glob(pattern.format(part=part))):
            return found
    tried = ", ".join(pattern.format(part=part) for pattern in layout.patterns)
    raise MissingFileError(
        f"{task}: no data in {folder}: looked for {tried}",
        hint=f"put the released files there, or: hf download --repo-type dataset "
        f"{layout.repository} --local-dir {folder}",
    )


def _keeps(layout: Layout, row: Row, part: str) -> bool:
    return layout.keep is None or layout.keep(row, part)


def _check_fields(rows: Sequence[Row], fields: Sequence[str], path: Path) -> None:
    if not rows:
        raise DataError(f"{path}: expected rows, found none")
    for number, row in enumerate(rows, 1):
        missing = [field for field in fields if row.get(field) is None]
        if missing:
            raise DataError(
                f"{path}: row {number}: expected the fields {', '.join(fields)}; "
                f"missing: {', '.join(missing)}"
            )


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
