"""Rows out of the file forms in which benchmark data sets are released."""

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tide_cache.errors import FormatError, StorageError

# The release of MMLU has no header: question, four choices, the letter of the right one.
_MMLU_COLUMNS = 6


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a parquet, JSON-lines (gzipped or not), JSON or MMLU's CSV file as a list of rows.

    A JSON file holds a list of rows, one row, or `{"examples": [rows]}` as BIG-Bench Hard has it.
    Raises FormatError on what cannot be parsed, StorageError on what cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            return _parquet(path)
        if path.suffix == ".csv":
            return list(_csv(path))
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot read it ({error})") from error
    except (UnicodeDecodeError, EOFError) as error:
        raise FormatError(f"{path}: {error}") from error
    return _json(text, path) if path.suffix == ".json" else list(_json_lines(text, path))


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise FormatError(f"{path}: not a parquet file: {error}") from error
    return rows


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        for number, cells in enumerate(csv.reader(file), 1):
            if len(cells) != _MMLU_COLUMNS or cells[5] not in ("A", "B", "C", "D"):
                raise FormatError(
                    f"{path}: line {number}: expected question, four choices and A to D, "
                    f"got {len(cells)} cells"
                )
            answer = "ABCD".index(cells[5])
            yield {"question": cells[0], "choices": cells[1:5], "answer": answer}


def _json(text: str, path: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise FormatError(f"{path}: not JSON: {error}") from error
    if isinstance(value, dict):
        value = value.get("examples", [value])
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise FormatError(
            f'{path}: expected a list of objects, an object, or {{"examples": [...]}}'
        )
    return value


def _json_lines(text: str, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FormatError(f"{path}: line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise FormatError(f"{path}: line {number}: expected an object")
        yield row
