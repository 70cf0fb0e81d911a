"""What went wrong when a source could not be read, in words that name file, line and next step.

`datasets` wraps whatever a parser said ("An error occurred while generating the dataset") and has
no word for an empty file. Here, once reading has failed and only then, the files are looked at
again: is there anything in them, and which line is the broken one? Slow (one pass of Python's own
JSON parser), but paid only by input that is wrong.
"""

import difflib
import errno
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow.parquet as pq
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DatasetGenerationCastError, DatasetGenerationError

from stage1_teacher.mixture import file_kind
from tide_cache.errors import DataError, StorageError, TideError

_STORAGE_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
}


@contextmanager
def explained(path: str, files: Sequence[str | Path], cache_dir: Path) -> Iterator[None]:
    """Turn whatever the reading of `files` raises into a TideError that says what is wrong.

    Raises DataError for the data and StorageError for a full, read-only or failing disk.
    """
    try:
        yield
    except TideError:
        raise
    except Exception as error:  # the parsers behind `datasets` share no base class
        local_files = [Path(file) for file in files if Path(file).is_file()]
        raise _explain(path, error, local_files, cache_dir) from error


def missing_path(path: Path) -> DataError:
    """Return the error for a path that does not exist, with names close to it."""
    parent = path.parent
    if not parent.is_dir():
        return DataError(f"{path}: no such file or folder ({parent} does not exist)")
    names = sorted(entry.name for entry in parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    also = f" (did you mean {', '.join(repr(name) for name in close)}?)" if close else ""
    return DataError(f"{path}: no such file or folder{also}")


def empty_source(path: str) -> DataError:
    """Return the error for a source without a single row."""
    return DataError(f"{path}: empty source (no rows)", reason="empty_source")


def _explain(path: str, error: Exception, files: Sequence[Path], cache_dir: Path) -> TideError:
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in _STORAGE_ERRNOS:
            return StorageError(
                f"{path}: {cause.strerror} ({cause.filename or cache_dir}) while"
                f" `datasets` made its copy of the data",
                hint="free some space, or set HF_DATASETS_CACHE to a folder with room",
            )
    if isinstance(error, EmptyDatasetError):
        hint = "its name holds one of [ ] * ?, which `datasets` reads as a pattern: rename it"
        is_pattern = any(symbol in path for symbol in "[]*?")
        return DataError(f"{path}: no data files found", hint=hint if is_pattern else None)
    if files and all(_is_empty(file) for file in files):
        return empty_source(path)
    for file in files:
        if file_kind(file.name) == "json" and (found := find_bad_line(file)) is not None:
            line, problem = found
            return DataError(f"{file}, line {line}: {problem}", reason="broken_line")
    return DataError(f"{path}: cannot be read: {summary(error)}")


def summary(error: BaseException) -> str:
    """Return what an error of `datasets` says, without its wrapping, in one line."""
    if isinstance(error, DatasetGenerationError) and not isinstance(
        error, DatasetGenerationCastError
    ):
        *_, error = _causes(error)
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def find_bad_line(file: Path) -> tuple[int, str] | None:
    """Return the number (from 1) of the first line that is no JSON object, and what it is instead.

    A `.json` file may also be one document over many lines. Returns None if all is well.
    """
    with _open_text(file) as lines:
        found = _first_bad_line(lines)
    if found is None or ".jsonl" in file.name or ".ndjson" in file.name:
        return found
    with _open_text(file) as document:
        try:
            value = json.loads(document.read())
        except (ValueError, EOFError, OSError) as error:
            # Rows that were fine before this line: it is JSON lines after all.
            return found if found[0] > 1 else (_error_line(error) or 1, _describe(error))
    return None if isinstance(value, list | dict) else found


def _first_bad_line(lines: IO[bytes]) -> tuple[int, str] | None:
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            if line.strip() and (problem := _line_problem(line.removeprefix(b"\xef\xbb\xbf"))):
                return number, problem
    except (EOFError, OSError) as error:  # a compressed file that was cut off or damaged
        return number + 1, _describe(error)
    return None


def _line_problem(line: bytes) -> str | None:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "an escape such as \\ud800 that is half a character (unpaired surrogate)"
    except ValueError as error:
        return _describe(error)
    if not isinstance(row, dict):
        return f"expected a JSON object per line, got {type(row).__name__}"
    return None


def _describe(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not valid UTF-8 (byte {error.start + 1})"
    return f"cannot be read: {error}"


def _error_line(error: Exception) -> int | None:
    return error.lineno if isinstance(error, json.JSONDecodeError) else None


def _open_text(file: Path) -> Any:
    return fsspec.open(str(file), "rb", compression="infer", expand=False)


def _is_empty(file: Path) -> bool:
    kind = file_kind(file.name)
    try:
        if kind == "parquet":
            return int(pq.read_metadata(file).num_rows) == 0
        if kind not in ("json", "csv", "tsv"):
            return file.stat().st_size == 0
        with _open_text(file) as lines:
            # A CSV file starts with a line of names; `[]` is a JSON file without rows.
            filled = [line for line, _ in zip(_filled(lines), range(2), strict=False)]
    except (OSError, EOFError, ValueError):  # unreadable is not empty
        return False
    allowed = [b"[]"] if kind == "json" else filled[:1]
    return not filled or filled == allowed


def _filled(lines: IO[bytes]) -> Iterator[bytes]:
    return (line.strip() for line in lines if line.strip())
