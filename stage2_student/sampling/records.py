"""Answers as JSON lines in a file that grows: what is there is not generated again.

Each line carries the key of what it answers: model, settings and prompt ids. A line whose key
differs is refused, so that one file never mixes two runs; a line that was cut off by a kill is
dropped and generated again.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stage2_student.json_files import JsonLines
from stage2_student.sampling.settings import Generation, GenerationSettings
from tide_cache.canonical import canonical_json
from tide_cache.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One prompt's answer, as `tide-eval generate` writes it."""

    number: int
    key: str
    prompt: str
    text: str
    ids: list[int]
    is_stopped: bool
    num_forwards: int
    num_positions: int

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def make_answer(generation: Generation, *, number: int, key: str, prompt: str, text: str) -> Answer:
    """Return what a prompt of this number was answered."""
    return Answer(
        number=number,
        key=key,
        prompt=prompt,
        text=text,
        ids=generation.ids,
        is_stopped=generation.is_stopped,
        num_forwards=generation.num_forwards,
        num_positions=generation.num_positions,
    )


def answer_key(model: str, settings: GenerationSettings, prompt_ids: list[int], dtype: str) -> str:
    """Return what an answer depends on, as 16 hex digits."""
    values = {"model": model, "settings": asdict(settings), "ids": prompt_ids, "dtype": dtype}
    return hashlib.sha256(canonical_json(values)).hexdigest()[:16]


class AnswerFile:
    """A file of answers, read when it is opened and appended to from then on."""

    def __init__(self, path: Path, keys: list[str]) -> None:
        """Read what is there. `keys` by prompt number. Raises DataError where they differ."""
        self.path = path
        self._keys = keys
        self._lines = JsonLines(path)
        self.answers: dict[int, Answer] = {}
        for number, values in enumerate(self._lines.found, start=1):
            answer = self._parse(values, f"{path}: line {number}")
            self.answers[answer.number] = answer

    def append(self, answers: list[Answer]) -> None:
        """Write answers behind those that are there, and to the disk before it returns."""
        self._lines.append(answer.as_json() for answer in answers)
        self.answers.update({answer.number: answer for answer in answers})

    def _parse(self, values: dict[str, Any], where: str) -> Answer:
        try:
            answer = Answer(**values)
        except TypeError as error:
            raise DataError(
                f"{where}: not an answer of this command: {error}", hint="name another file with -o"
            ) from error
        if answer.number >= len(self._keys) or self._keys[answer.number] != answer.key:
            raise DataError(
                f"{where}: answers prompt {answer.number} of another run: its model, settings or "
                "prompt differ",
                hint="name another file with -o, or remove this one",
            )
        return answer
