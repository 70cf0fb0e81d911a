"""JSON on disk as this stage uses it: a file with one object, and a file of lines that grows."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tide_cache.errors import ConfigError, DataError, FormatError, StorageError


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises ConfigError where the file cannot be read, FormatError where it is something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it ({error.strerror})") from error
    except ValueError as error:
        raise FormatError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


class JsonLines:
    """A file of JSON objects, a line each, that one process appends to.

    `found` are the objects that were there when it was opened. What a kill left of a last line is
    not among them and is written over by the next append. Raises DataError, naming the line, where
    a whole line is no object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[dict[str, Any]] = []
        self._end_bytes = 0
        if path.is_file():
            self._read()

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add objects; they are on disk when this returns. Raises StorageError if that fails."""
        lines = b"".join(map(_line, rows))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("r+b" if self.path.is_file() else "wb") as file:
                file.truncate(self._end_bytes)
                file.seek(self._end_bytes)
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
                self._end_bytes = file.tell()
        except OSError as error:
            raise StorageError(f"{self.path}: cannot write it ({error.strerror})") from error

    def _read(self) -> None:
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                return
            self.found.append(self._parse(line, number))
            self._end_bytes += len(line)

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{self.path}: line {number}: not JSON: {error}", hint="move the file away"
            ) from error
        if not isinstance(value, dict):
            raise DataError(
                f"{self.path}: line {number}: expected an object, got {type(value).__name__}",
                hint="move the file away",
            )
        return value


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        return json.dumps(row).encode() + b"\n"
