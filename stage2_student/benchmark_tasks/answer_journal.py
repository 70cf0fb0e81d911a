"""Answers on disk while a benchmark runs, so that a killed run goes on where it stopped.

One JSON line an answer, appended and synced a batch at a time. A line is found again by a hash over
everything that decides it: model, generation settings and the prompt itself. So a run with another
`--limit` finds its answers too, and a run with another model or setting finds none; nothing is ever
deleted. A line that a kill tore is written over.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stage2_student.json_files import JsonLines
from tide_cache.canonical import fingerprint
from tide_cache.errors import DataError


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
        self._file = None if path is None else JsonLines(path)
        self._answers: dict[str, Answer] = {}
        for number, values in enumerate(self._file.found if self._file else [], start=1):
            answer = _parse(values, f"{path}: line {number}")
            self._answers[answer.key] = answer

    def get(self, key: str) -> Answer | None:
        """Return the answer kept under `key`, or None."""
        return self._answers.get(key)

    def add(self, answers: Iterable[Answer]) -> None:
        """Keep answers; they are on disk when this returns. Raises StorageError if that fails."""
        answers = list(answers)
        self._answers.update({answer.key: answer for answer in answers})
        if self._file is not None:
            self._file.append(asdict(answer) for answer in answers)


def _parse(values: dict[str, Any], where: str) -> Answer:
    try:
        return Answer(**values)
    except TypeError as error:
        raise DataError(
            f"{where} is not an answer ({error})",
            hint="move the file away to generate these answers anew",
        ) from error
