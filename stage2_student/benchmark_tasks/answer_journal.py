"""Answers on disk while a benchmark runs, so that a killed run goes on where it stopped.

One JSON line an answer, appended and synced a batch at a time. A line is found again by a hash over
everything that decides it: model, generation settings and the prompt itself. So a run with another
`--limit` finds its answers too, and a run with another model or setting finds none; nothing is ever
deleted. A line that a kill tore is cut off when the file is opened again.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tide_cache.canonical import fingerprint
from tide_cache.errors import StorageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer: its text before stop strings are applied, and what it cost."""

    key: str
    text: str
    num_new_tokens: int
    num_forwards: int


def answer_key(context: dict[str, object], prompt: str) -> str:
    """Return the hash under which the answer to `prompt` is kept. `context`: model and settings."""
    return fingerprint({"context": context, "prompt": prompt})


class AnswerJournal:
    """The answers of one benchmark. `path` None keeps them in memory only."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._answers: dict[str, Answer] = {}
        if path is not None and path.exists():
            for answer in _read(path):
                self._answers[answer.key] = answer

    def get(self, key: str) -> Answer | None:
        """Return the answer kept under `key`, or None."""
        return self._answers.get(key)

    def add(self, answers: Iterable[Answer]) -> None:
        """Keep answers; they are on disk when this returns. Raises StorageError if that fails."""
        answers = list(answers)
        self._answers.update({answer.key: answer for answer in answers})
        if self._path is None:
            return
        lines = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(lines.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"{self._path}: cannot write it ({error.strerror})") from error


def _read(path: Path) -> list[Answer]:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    answers = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            answers.append(Answer(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise StorageError(
                f"{path}: line {number} is not an answer ({error})",
                hint="move the file away to generate these answers anew",
            ) from error
    return answers
