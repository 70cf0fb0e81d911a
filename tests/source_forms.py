"""Chat data of one content in every form that sources are read from."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from stage1_teacher.sources import Dropped, Source
from tests.support import PROJECT_ROOT

ROWS = [
    {
        "prompt": f"Question {i}: où?",
        "response": "007" if i == 3 else f"Answer {i}\r\n",
        "lang": ["python", "go", "rust"][i % 3],
        "level": i // 4,
        "checked": i % 2 == 0,
    }
    for i in range(12)
]

Open = Callable[..., Source]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(source: Source) -> list[Any]:
    """Prompt and response of every row, or its reason to be dropped."""
    read = [source.conversation(index) for index in range(len(source))]
    return [
        row.reason if isinstance(row, Dropped) else tuple(m["content"] for m in row.messages)
        for row in read
    ]


def pairs(rows: list[dict[str, Any]]) -> list[Any]:
    return [(row["prompt"], row["response"]) for row in rows]


def as_jsonl(folder: Path) -> Path:
    return write_jsonl(folder / "chat.jsonl", ROWS)


def as_gzip(folder: Path) -> Path:
    path = folder / "chat.jsonl.gz"
    path.write_bytes(gzip.compress(as_jsonl(folder).read_bytes()))
    return path


def as_zstd(folder: Path) -> Path:
    path = folder / "chat.jsonl.zst"
    path.write_bytes(zstandard.compress(as_jsonl(folder).read_bytes()))
    return path


def as_json_document(folder: Path) -> Path:
    path = folder / "chat.json"
    path.write_text(json.dumps(ROWS, indent=1))
    return path


def as_parquet(folder: Path) -> Path:
    path = folder / "chat.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def as_csv(folder: Path) -> Path:
    path = folder / "chat.csv"
    datasets.Dataset.from_list(ROWS).to_pandas().to_csv(path, index=False, lineterminator="\n")
    return path


def as_tsv(folder: Path) -> Path:
    path = folder / "chat.tsv"
    frame = datasets.Dataset.from_list(ROWS).to_pandas()
    frame.to_csv(path, index=False, sep="\t", lineterminator="\n")
    return path


def as_arrow(folder: Path) -> Path:
    path = folder / "chat.arrow"
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def as_saved_dataset(folder: Path) -> Path:
    path = folder / "saved"
    datasets.Dataset.from_list(ROWS).with_format("numpy").save_to_disk(str(path))
    return path


def as_saved_dict(folder: Path) -> Path:
    path = folder / "saved"
    splits = {
        "train": datasets.Dataset.from_list(ROWS),
        "test": datasets.Dataset.from_list(ROWS[:1]),
    }
    datasets.DatasetDict(splits).save_to_disk(str(path))
    return path


def as_folder_of_jsonl(folder: Path) -> Path:
    write_jsonl(folder / "chat" / "train-00.jsonl", ROWS[:5])
    write_jsonl(folder / "chat" / "train-01.jsonl", ROWS[5:])
    write_jsonl(folder / "chat" / "test.jsonl", ROWS[:1])
    return folder / "chat"


def as_folder_of_tsv(folder: Path) -> Path:
    (folder / "chat").mkdir()
    as_tsv(folder / "chat")
    return folder / "chat"


def as_folder_of_parquet(folder: Path) -> Path:
    (folder / "chat" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "chat/data/train-00000-of-00001.parquet")
    return folder / "chat"


FORMS = [
    as_jsonl,
    as_gzip,
    as_zstd,
    as_json_document,
    as_parquet,
    as_csv,
    as_tsv,
    as_arrow,
    as_saved_dataset,
    as_saved_dict,
    as_folder_of_jsonl,
    as_folder_of_tsv,
    as_folder_of_parquet,
]


CARD = """---
license: apache-2.0
configs:
- config_name: easy
  data_files: easy.jsonl
- config_name: hard
  data_files: hard.jsonl
---
# A card
"""


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=PROJECT_ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
