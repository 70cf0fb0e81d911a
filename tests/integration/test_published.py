"""Folders in the shape of the published, tokenised data sets, through `tide-cache prepare`.

Rows are made from conversations by our own renderer and aligner; some alignments are then spoilt in
every way that the published ones go wrong. What comes out must be what the same conversations give
when they are prepared from their text: same ids, same chunks or runs.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from stage1_teacher.align import align_chats, align_positions
from stage1_teacher.chat import RenderedChat, render_chat
from stage1_teacher.tokenizers import load_tokenizer
from tests.builders import (
    all_files,
    chat_rows,
    make_tokenizer,
    run_command,
    write_chat_jsonl,
    write_yaml,
)
from tide_cache.cache import Cache, open_cache
from tide_cache.store import Store
from tide_cache.verify import verify_set

OTHER_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant<|im_start|>{% endif %}"
)
NUM_ROWS = 24
Row = dict[str, Any]


def labels_of(chat: RenderedChat) -> list[int]:
    labels = chat.ids_L.astype(np.int64).copy()
    labels[: chat.prompt_length] = -100
    return list(map(int, labels))


def llada2_row(student: RenderedChat, teacher: RenderedChat) -> Row:
    aligned = align_chats(student, teacher)
    reply = aligned.chunks[aligned.in_response]
    content = [reply[0, 2], reply[-1, 3], reply[0, 0], reply[-1, 1]]
    return {
        "input_ids": student.ids_L.tolist(),
        "labels": labels_of(student),
        "teacher_input_ids": teacher.ids_L.tolist(),
        "teacher_labels": labels_of(teacher),
        "ranges": [list(map(int, content))],
        "prompt_len": student.prompt_length,
    }


def wedlm_row(student: RenderedChat, teacher: RenderedChat) -> Row:
    a_P, b_P = align_positions(student, teacher)
    # The published pairs are those of assistant contents alone.
    content = student.messages[-1]
    start, end = np.searchsorted(
        student.bounds_M, [content.byte_start, content.byte_end], side="left"
    )
    inside_P = (a_P >= start) & (a_P < end)
    return {
        "input_ids": student.ids_L.tolist(),
        "labels": labels_of(student),
        "prompt_len": student.prompt_length,
        "teacher_input_ids": teacher.ids_L.tolist(),
        "align_student": a_P[inside_P].tolist(),
        "align_teacher": b_P[inside_P].tolist(),
    }


def shift(row: Row) -> None:
    row["ranges"][0] = [value + 1 for value in row["ranges"][0]]


def out_of_bounds(row: Row) -> None:
    row["ranges"][0][1] = len(row["teacher_input_ids"]) + 5


def swap_sides(row: Row) -> None:
    a, b, c, d = row["ranges"][0]
    row["ranges"][0] = [c, d, a, b]


def empty(row: Row) -> None:
    row["ranges"][0][1] = row["ranges"][0][0]


def overlapping(row: Row) -> None:
    row["ranges"] = [row["ranges"][0], row["ranges"][0]]


def none_at_all(row: Row) -> None:
    row["ranges"] = []


def on_template(row: Row) -> None:
    row["ranges"][0][3] = len(row["input_ids"])


def shift_pairs(row: Row) -> None:
    row["align_teacher"] = [value + 1 for value in row["align_teacher"]]


def pairs_of_other_lengths(row: Row) -> None:
    row["align_teacher"] = row["align_teacher"][:-1]


def pairs_out_of_bounds(row: Row) -> None:
    row["align_student"] = [value + 10_000 for value in row["align_student"]]


def pairs_backwards(row: Row) -> None:
    row["align_student"] = row["align_student"][::-1]
    row["align_teacher"] = row["align_teacher"][::-1]


SPOIL_RANGES = (shift, out_of_bounds, swap_sides, empty, overlapping, none_at_all, on_template)
SPOIL_PAIRS = (shift_pairs, pairs_of_other_lengths, pairs_out_of_bounds, pairs_backwards)


def prepare(folder: Path, name: str, values: dict[str, Any], workers: int = 1) -> dict[str, Any]:
    config = write_yaml(folder / f"{name}.yaml", values)
    done = run_command("prepare", config, "-o", folder / name, "--workers", str(workers), "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def rows_by_ids(cache: Cache, alignment_column: str) -> dict[tuple[int, ...], dict[str, Any]]:
    columns = ["student_ids", "prompt_length", "teacher_ids", alignment_column]
    rows = cache.read_rows(0, range(cache.num_samples), columns).to_pylist()
    width = {"align_runs": 3, "chunks": 4}[alignment_column]
    for row in rows:
        # What lies in the prompt is never masked; published rows do not speak of it.
        entries = np.array(row[alignment_column]).reshape(-1, width)
        row[alignment_column] = entries[entries[:, 0] >= row["prompt_length"]].tolist()
    return {tuple(row["student_ids"]): row for row in rows}


@pytest.fixture
def sides(tmp_path: Path) -> dict[str, Path]:
    return {
        "student": make_tokenizer(tmp_path, name="student"),
        "other": make_tokenizer(tmp_path, name="other", vocab_size=330, template=OTHER_TEMPLATE),
        "same": make_tokenizer(tmp_path, name="same", template=OTHER_TEMPLATE),
    }


@pytest.mark.parametrize(
    ("alignment", "column", "teacher", "make_row", "spoil"),
    [
        ("chunks", "chunks", "other", llada2_row, SPOIL_RANGES),
        ("positions", "align_runs", "same", wedlm_row, SPOIL_PAIRS),
    ],
)
def test_both_layouts_give_what_their_conversations_give(
    tmp_path: Path,
    sides: dict[str, Path],
    alignment: str,
    column: str,
    teacher: str,
    make_row: Callable[[RenderedChat, RenderedChat], Row],
    spoil: tuple[Callable[[Row], None], ...],
) -> None:
    student_tokenizer = load_tokenizer(str(sides["student"]))
    teacher_tokenizer = load_tokenizer(str(sides[teacher]))
    chats = chat_rows(NUM_ROWS)
    rows = [
        make_row(
            render_chat(chat["messages"], student_tokenizer),
            render_chat(chat["messages"], teacher_tokenizer),
        )
        for chat in chats
    ]
    for row, change in zip(rows, spoil, strict=False):
        change(row)
    rows[-1]["prompt_len"] += 3
    rows.append({**rows[-2], "labels": [-100] * len(rows[-2]["labels"]), "input_ids": [7, 8, 9]})
    rows[-1]["labels"] = [-100, -100, -100]
    rows.append({**rows[-3], "input_ids": [*rows[-3]["input_ids"][:-1], 100_000]})
    rows.append(dict(rows[5]))  # a second copy
    made = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    made.save_to_disk(str(tmp_path / "published"))
    common = {
        "student": {"tokenizer": str(sides["student"]), "max_length": 128},
        "teacher": {"tokenizer": str(sides[teacher]), "max_length": 128},
        "alignment": alignment,
        "block_size": 8,
        "num_views": 2,
        "samples_per_shard": 7,
    }
    published = {**common, "published": f"{tmp_path / 'published'}[split:train]"}
    result = prepare(tmp_path, "from-published", published)
    write_chat_jsonl(tmp_path / "chat.jsonl", chats)
    prepare(tmp_path, "from-text", {**common, "sources": str(tmp_path / "chat.jsonl")})
    one, two = open_cache(tmp_path / "from-published"), open_cache(tmp_path / "from-text")
    assert rows_by_ids(one, column) == rows_by_ids(two, column)
    assert result["counts"]["num_samples"] == NUM_ROWS
    assert result["counts"]["num_rows_repaired"] == len(spoil)
    assert result["counts"]["num_prompt_lengths_corrected"] == 1
    assert result["dropped"] == {"labels_empty": 1, "ids_outside_vocabulary": 1, "duplicate": 1}
    report = verify_set(Store(tmp_path / "from-published"))
    assert report.ok, report.problems
    prepare(tmp_path, "three-workers", published, workers=3)
    assert all_files(tmp_path / "three-workers") == all_files(tmp_path / "from-published")


def test_a_missing_column_is_named(tmp_path: Path, sides: dict[str, Path]) -> None:
    rows = [{"input_ids": [1, 2], "labels": [-100, 2], "prompt_len": 1, "teacher_input_ids": [1]}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "published"))
    config = write_yaml(
        tmp_path / "p.yaml",
        {
            "published": str(tmp_path / "published"),
            "student": {"tokenizer": str(sides["student"]), "max_length": 128},
            "alignment": "positions",
            "block_size": 8,
        },
    )
    done = run_command("prepare", config, "-o", tmp_path / "out")
    assert done.returncode != 0
    assert "align_student" in done.stderr
    assert "Traceback" not in done.stderr
