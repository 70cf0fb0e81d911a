"""Local data sets: every documented form is found, and what is wrong with one is said in time."""

import csv
import gzip
import json
import shutil
from pathlib import Path

import pytest

from stage2_student.benchmark_tasks.local_data import LAYOUTS, load_local_rows
from stage2_student.benchmark_tasks.plan import BenchmarkConfig, plan_benchmarks
from stage2_student.benchmark_tasks.protocol import BENCHMARKS
from tests import benchmark_rows as rows
from tide_cache.errors import DataError, FormatError, MissingFileError, TideError

MBPP = {"task_id": 11, "text": "Write f.", "test_list": ["a", "b", "c"]}
HUMANEVAL = {"prompt": "def f():", "test": "x", "entry_point": "f"}


def plan(data: Path, task: str) -> int:
    config = BenchmarkConfig(
        model="none", output=data / "out", tasks=task, data=data, run_generated_code=True
    )
    (planned,) = plan_benchmarks(config).planned
    assert planned.rows is not None
    return planned.rows.num_rows


def test_every_benchmark_has_a_layout() -> None:
    assert set(LAYOUTS) == set(BENCHMARKS)


def test_the_releases_are_found(shared_dir: Path) -> None:
    data = shared_dir / "data"
    assert plan(data, "gsm8k_cot") == 1319
    assert plan(data, "bbh") == 6511
    assert plan(data, "humaneval_instruct") == 164
    assert plan(data, "mbpp_instruct") == 500


def test_hub_forms_are_found(tmp_path: Path) -> None:
    rows.write_parquet(
        tmp_path / "gsm8k/main/test-00000-of-00001.parquet", [{"question": "q", "answer": "#### 1"}]
    )
    rows.write_parquet(
        tmp_path / "humaneval/openai_humaneval/test-00000-of-00001.parquet", [HUMANEVAL]
    )
    rows.write_parquet(tmp_path / "mbpp/full/test-00000-of-00001.parquet", [MBPP])
    rows.write_hellaswag(tmp_path, 3)
    rows.write_mmlu_pro(tmp_path)
    rows.write_math(tmp_path, 2)
    found = {"gsm8k_cot": 1, "humaneval_instruct": 1, "mbpp_instruct": 1, "hellaswag_gen": 3}
    found |= {"mmlu_pro": 14, "minerva_math": 14}
    assert {task: plan(tmp_path, task) for task in found} == found


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "hellaswag" / "data"
    whole = rows.hellaswag_rows(5)
    rows.write_parquet(folder / "validation-00001-of-00002.parquet", whole[3:])
    rows.write_parquet(folder / "validation-00000-of-00002.parquet", whole[:3])
    assert load_local_rows("hellaswag_gen", tmp_path, [""]).rows[""] == whole


def test_releases_of_another_form_are_found(tmp_path: Path) -> None:
    path = tmp_path / "humaneval" / "HumanEval.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode()))
    assert plan(tmp_path, "humaneval_instruct") == 1
    for number in (1, 2):
        problem = {"problem": f"{number}?", "solution": f"\\boxed{{{number}}}"}
        path = tmp_path / "math" / "test" / "algebra" / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(problem))
    assert load_local_rows("minerva_math", tmp_path, ["algebra"]).num_rows == 2
    path = tmp_path / "mmlu" / "test" / "anatomy_test.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerow(["What, now?", "w", "x", "y", "z", "C"])
    (row,) = load_local_rows("mmlu_generative_dream", tmp_path, ["anatomy"]).rows["anatomy"]
    assert row == {"question": "What, now?", "choices": ["w", "x", "y", "z"], "answer": 2}


def test_one_file_of_all_subjects_is_split(tmp_path: Path) -> None:
    whole = [*rows.mmlu_rows("anatomy", 2), *rows.mmlu_rows("virology", 3)]
    rows.write_parquet(tmp_path / "mmlu" / "all" / "test-00000-of-00001.parquet", whole)
    local = load_local_rows("mmlu_generative_dream", tmp_path, ["anatomy", "virology"])
    assert [len(part) for part in local.rows.values()] == [2, 3]
    with pytest.raises(DataError, match=r"expected rows of 'astronomy', found none"):
        load_local_rows("mmlu_generative_dream", tmp_path, ["astronomy"])


def test_mbpp_keeps_its_test_split(tmp_path: Path) -> None:
    path = tmp_path / "mbpp" / "mbpp.jsonl"
    rows.write_jsonl(path, [{**MBPP, "task_id": number} for number in (2, 10, 11, 510, 511)])
    local = load_local_rows("mbpp_instruct", tmp_path, [""])
    assert [row["task_id"] for row in local.rows[""]] == [11, 510]


def test_the_hash_is_over_the_bytes(tmp_path: Path) -> None:
    rows.write_gsm8k(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    rows.write_gsm8k(tmp_path / "c", num_rows=7)
    a, b, c = (load_local_rows("gsm8k_cot", tmp_path / x, [""]).sha256 for x in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, MissingFileError, r"gsm8k_cot: no data in .*gsm8k: looked for test\.jsonl, main/"),
        ("", DataError, r"test\.jsonl: expected rows, found none"),
        ("{", FormatError, r"test\.jsonl: line 1: not JSON"),
        ("[1]", FormatError, r"test\.jsonl: line 1: expected an object"),
        (
            '{"question": "q", "answer": "1"}\n{"question": "q", "target": "1"}',
            DataError,
            r"test\.jsonl: row 2: expected the fields question, answer; missing: answer",
        ),
    ],
)
def test_bad_data_is_named(
    tmp_path: Path, content: str | None, kind: type[TideError], message: str
) -> None:
    if content is not None:
        (tmp_path / "gsm8k").mkdir()
        (tmp_path / "gsm8k" / "test.jsonl").write_text(content)
    with pytest.raises(kind, match=message):
        plan(tmp_path, "gsm8k_cot")


def test_the_hint_says_how_to_get_the_data(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError) as caught:
        plan(tmp_path, "mmlu_pro")
    assert caught.value.hint is not None
    assert "hf download --repo-type dataset TIGER-Lab/MMLU-Pro" in caught.value.hint


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k" / "main" / "test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(FormatError, match="not a parquet file"):
        plan(tmp_path, "gsm8k_cot")
