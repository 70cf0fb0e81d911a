"""Chat rows whose answers can be checked exactly, small enough for a model of 100k parameters.

A prompt is a word and its argument (`sort dbca`, `2nd kqzt`, `odd 38291`). Six kinds, two of them
with several valid answers, so that a teacher's distribution says more than one sampled reply does.
With the demo's template every row fits 16 tokens, which is what lets a teacher learn all kinds in
about a minute; sums, counting and look-ups did not get learnt in that time and are left out.

Four sets of prompts (teacher, student, validation, test) are disjoint by construction: a hash of
the prompt says which set it belongs to, so no list has to be kept and no seed can mix them.
"""

import hashlib
import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from tide_cache.draws import generator
from tide_cache.errors import ConfigError, DataError

Split = Literal["teacher", "student", "validation", "test"]
# Of 100 hash cells, where each set ends. The teacher sees the most, as a large teacher has.
_SPLIT_ENDS: tuple[tuple[Split, int], ...] = (
    ("teacher", 60),
    ("student", 80),
    ("validation", 90),
    ("test", 100),
)
_ORDINALS = ("1st", "2nd", "3rd", "4th")
_DIGIT_SETS = {"even": "02468", "odd": "13579", "low": "01234", "big": "56789"}
_MAX_REDRAWS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One kind of question: the words that ask it, its argument, and all answers that count."""

    name: str
    words: tuple[str, ...]
    draw_argument: Callable[[np.random.Generator], str]
    answers: Callable[[str, str], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRow:
    """A prompt and a reply to it, right or (label noise) wrong."""

    prompt: str
    answer: str

    def as_chat(self) -> dict[str, list[dict[str, str]]]:
        """Return the row as chat messages."""
        return {
            "messages": [
                {"role": "user", "content": self.prompt},
                {"role": "assistant", "content": self.answer},
            ]
        }


def _distinct_letters(count: int) -> Callable[[np.random.Generator], str]:
    def draw(random: np.random.Generator) -> str:
        return "".join(string.ascii_lowercase[i] for i in random.permutation(26)[:count])

    return draw


def _letters(count: int) -> Callable[[np.random.Generator], str]:
    def draw(random: np.random.Generator) -> str:
        return "".join(string.ascii_lowercase[i] for i in random.integers(0, 26, size=count))

    return draw


def _digits(count: int) -> Callable[[np.random.Generator], str]:
    def draw(random: np.random.Generator) -> str:
        return "".join(string.digits[i] for i in random.integers(0, 10, size=count))

    return draw


def _sorted(word: str, argument: str) -> tuple[str, ...]:
    return ("".join(sorted(argument)),)


def _next_letters(word: str, argument: str) -> tuple[str, ...]:
    following = string.ascii_lowercase[1:] + string.ascii_lowercase[0]
    return (argument.translate(str.maketrans(string.ascii_lowercase, following)),)


def _item(word: str, argument: str) -> tuple[str, ...]:
    return (argument[_ORDINALS.index(word)],)


def _largest(word: str, argument: str) -> tuple[str, ...]:
    return (max(argument),)


def _pick(word: str, argument: str) -> tuple[str, ...]:
    return tuple(sorted(set(argument) & set(_DIGIT_SETS[word])))


def _any_two(word: str, argument: str) -> tuple[str, ...]:
    # In the order given. Free order was learnt worse: the most likely first and second letter of
    # a model that does not yet look at its own first choice are the same letter.
    return tuple("".join(pair) for pair in combinations(argument, 2))


TASKS: tuple[Task, ...] = (
    Task(name="sort", words=("sort",), draw_argument=_distinct_letters(4), answers=_sorted),
    Task(name="next", words=("next",), draw_argument=_letters(3), answers=_next_letters),
    Task(name="item", words=_ORDINALS, draw_argument=_distinct_letters(4), answers=_item),
    Task(name="max", words=("max",), draw_argument=_digits(4), answers=_largest),
    Task(name="pick", words=tuple(_DIGIT_SETS), draw_argument=_digits(5), answers=_pick),
    Task(name="two", words=("two",), draw_argument=_distinct_letters(5), answers=_any_two),
)
_TASK_BY_WORD = {word: task for task in TASKS for word in task.words}


def task_of(prompt: str) -> Task:
    """Return the task that a prompt asks. Raises DataError on a prompt of no task."""
    word = prompt.partition(" ")[0]
    if word not in _TASK_BY_WORD:
        raise DataError(f"prompt: expected to begin with one of {', '.join(_TASK_BY_WORD)}, "
                        f"got {prompt!r}")  # fmt: skip
    return _TASK_BY_WORD[word]


def valid_answers(prompt: str) -> tuple[str, ...]:
    """Return every answer that counts as right, without duplicates."""
    word, _, argument = prompt.partition(" ")
    return task_of(prompt).answers(word, argument)


def check(prompt: str, answer: str) -> bool:
    """Say whether the answer is exactly one of those that count as right."""
    return answer in valid_answers(prompt)


def split_of(prompt: str) -> Split:
    """Return the set a prompt belongs to: a function of its text alone."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8, person=b"tide demo").digest()
    cell = int.from_bytes(digest, "little") % 100
    return next(split for split, end in _SPLIT_ENDS if cell < end)


def generate_rows(
    split: Split, num_rows: int, *, seed: int, wrong_fraction: float = 0.0
) -> list[TaskRow]:
    """Generate rows of one set, no prompt twice, all kinds equally often, in random order.

    Where several answers are right one is drawn evenly. `wrong_fraction` of the rows (rounded to
    whole rows) get a wrong reply of the right length and alphabet. The same arguments give the same
    rows. Raises ConfigError if the set holds too few prompts or an argument is out of range.
    """
    if split not in get_args(Split):
        raise ConfigError(f"split: expected one of {', '.join(get_args(Split))}, got {split!r}")
    if num_rows < 0 or not 0 <= wrong_fraction <= 1:
        raise ConfigError(
            f"rows: expected num_rows >= 0 and wrong_fraction in [0, 1], got {num_rows} and "
            f"{wrong_fraction}"
        )
    random = generator(seed, split, -1, "demo rows")
    tasks = [TASKS[i % len(TASKS)] for i in random.permutation(num_rows)]
    is_wrong = random.permutation(num_rows) < round(wrong_fraction * num_rows)
    taken: set[str] = set()
    rows: list[TaskRow] = []
    for task, wrong in zip(tasks, is_wrong, strict=True):
        prompt = _draw_prompt(task, split, taken, random)
        taken.add(prompt)
        answer = _wrong_answer(prompt, random) if wrong else _right_answer(prompt, random)
        rows.append(TaskRow(prompt=prompt, answer=answer))
    return rows


def write_jsonl(path: Path, rows: Sequence[TaskRow]) -> None:
    """Write rows as JSON Lines with one `messages` list each."""
    lines = (json.dumps(row.as_chat(), ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def _draw_prompt(task: Task, split: Split, taken: set[str], random: np.random.Generator) -> str:
    """Draw prompts until one is answerable, of the set and new."""
    for _ in range(_MAX_REDRAWS):
        word = task.words[int(random.integers(len(task.words)))]
        prompt = f"{word} {task.draw_argument(random)}"
        if prompt not in taken and split_of(prompt) == split and valid_answers(prompt):
            return prompt
    raise ConfigError(
        f"num_rows: the {split} set has no more prompts of kind {task.name!r} after "
        f"{len(taken)} rows",
        hint="ask for fewer rows",
    )


def _right_answer(prompt: str, random: np.random.Generator) -> str:
    answers = valid_answers(prompt)
    return answers[int(random.integers(len(answers)))]


def _wrong_answer(prompt: str, random: np.random.Generator) -> str:
    """Draw characters of the answer's kind until they are no right answer."""
    right = valid_answers(prompt)
    alphabet = string.digits if right[0].isdigit() else string.ascii_lowercase
    while True:
        picks = random.integers(0, len(alphabet), size=len(right[0]))
        answer = "".join(alphabet[i] for i in picks)
        if answer not in right:
            return answer
