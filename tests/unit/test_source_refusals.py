"""What cannot be used as chat data is refused by its own error, naming file and line."""

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.source_forms import ROWS, Open, as_gzip, as_jsonl, run_python, write_jsonl
from tide_cache.errors import DataError


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "d.jsonl: empty source (no rows)"),
        ("d.jsonl", b" \n\n", "d.jsonl: empty source (no rows)"),
        ("d.json", b"[]", "d.json: empty source (no rows)"),
        ("d.csv", b"", "d.csv: empty source (no rows)"),
        ("d.csv", b"prompt,response\n", "d.csv: empty source (no rows)"),
        (
            "d.jsonl",
            b'{"prompt":"a","response":"b"}\n\n{"prompt":"a","resp\n{"prompt":"a"}\n',
            "d.jsonl, line 3: not valid JSON: ",
        ),
        (
            "d.jsonl",
            b'{"prompt":"a","response":"b"}\n{"prompt":"a","response":',
            "d.jsonl, line 2: not valid JSON: Expecting value (column 26)",
        ),
        (
            "d.jsonl",
            b'{"prompt":"a","response":"b"}\n["a","b"]\n',
            "d.jsonl, line 2: expected a JSON object per line, got list",
        ),
        (
            "d.jsonl",
            b'{"prompt":"a","response":"b"}\n{"prompt":"\\ud800","response":"b"}\n',
            "d.jsonl, line 2: an escape such as \\ud800 that is half a character",
        ),
        (
            "d.json",
            b'[\n{"prompt":"a","response":"b"},\n{"prompt":"a" "response":"b"}\n]',
            "d.json, line 3: not valid JSON: Expecting ',' delimiter",
        ),
        (
            "d.json",
            b'{"prompt":"a","response":"b"}\n{"prompt":"a"',
            "d.json, line 2: not valid JSON",
        ),
        ("d.jsonl.gz", b"no gzip", "d.jsonl.gz"),
        ("d.csv", b"prompt,response\na,b\na,b,c\n", "cannot be read: Error tokenizing data."),
        ("d.parquet", b"garbage", "d.parquet: cannot be read: Parquet file size is 7 bytes"),
        ("d.arrow", b"garbage", "d.arrow: cannot be read: "),
        ("d.txt", b"hello", "d.txt: unknown kind of file '.txt', expected .jsonl, .json,"),
        ("d.jsonl", b'{"text":"a"}\n', "expected one pair of chat columns, found none among text"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_line(
    tmp_path: Path, open_here: Open, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        open_here(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))
    assert message in str(error.value)


def test_the_broken_file_of_a_folder_is_named(tmp_path: Path, open_here: Open) -> None:
    write_jsonl(tmp_path / "d/train-00.jsonl", ROWS)
    (tmp_path / "d/train-01.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    with pytest.raises(DataError, match=r"d/train-01\.jsonl, line 2: not valid JSON"):
        open_here(tmp_path / "d")


def test_a_truncated_gzip_file_is_named(tmp_path: Path, open_here: Open) -> None:
    path = as_gzip(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"chat\.jsonl\.gz.*(end-of-stream|EOF)"):
        open_here(path)


def test_tables_without_rows_are_empty_sources(tmp_path: Path, open_here: Open) -> None:
    schema = pa.schema([("prompt", pa.string()), ("response", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "d.parquet")
    empty = datasets.Dataset.from_dict({"prompt": [], "response": []})
    empty.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text("\n")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "train.csv").write_text("prompt,response\na,b\n")
    (tmp_path / "splits" / "test.csv").write_text("prompt,response\n")
    for name, split in [("d.parquet", None), ("saved", None), ("folder", None), ("splits", "test")]:
        with pytest.raises(DataError, match=rf"{name}: empty source") as error:
            open_here(tmp_path / name, split=split)
        assert error.value.reason == "empty_source"


def test_a_missing_path_is_named_with_its_neighbours(tmp_path: Path, open_here: Open) -> None:
    as_jsonl(tmp_path)
    with pytest.raises(DataError, match=r"no such file or folder \(did you mean 'chat\.jsonl'\?\)"):
        open_here(tmp_path / "chta.jsonl")
    with pytest.raises(DataError, match=r"missing does not exist\)$"):
        open_here(tmp_path / "missing" / "chat.jsonl")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none: no data files found"):
        open_here(tmp_path / "none")


def test_a_folder_that_looks_like_a_pattern_is_explained(tmp_path: Path, open_here: Open) -> None:
    write_jsonl(tmp_path / "we[ir]d" / "d.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no data files found; its name holds one of .*rename it"):
        open_here(tmp_path / "we[ir]d")


FULL_DISK = """
import resource, sys
from pathlib import Path
from stage1_teacher.mixture import SourceConfig
from stage1_teacher.sources import open_source
from tide_cache.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    open_source(SourceConfig(path=sys.argv[1]), cache_dir=Path(sys.argv[2]))
except StorageError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_a_storage_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "big.jsonl", ROWS * 2000)
    done = run_python(FULL_DISK, str(path), str(tmp_path / "cache"))
    assert done.stdout.startswith(f"{path}: File too large (")
    assert "set HF_DATASETS_CACHE to a folder with room" in done.stdout
