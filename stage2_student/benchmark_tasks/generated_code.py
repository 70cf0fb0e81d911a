"""The two code benchmarks' own parts: which program an answer means, and whether it passes.

lm-eval's definitions load a metric from the hub and run it when they are imported, so that they
cannot even be read without a network. Their prompts are used by reference; filter and metric are
replaced by these.
"""

import re
from collections.abc import Sequence
from typing import Any

from stage2_student.benchmark_tasks.code_execution import passes

_FENCE = "```"
# The prompt has opened a fence already. A language tag counts only if it has its line to itself:
# lm-eval's filter takes the answer's first word for one, and so loses the `def` of an answer that
# does not begin with a line break.
_FENCED = re.compile(r"```(?:\w*\n)?(.*?)\n?```", re.DOTALL)


def humaneval_programs(
    answers: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]
) -> list[list[str]]:
    """Complete each prompt (imports, signature, docstring) by the answer up to its first fence."""
    return [
        [doc["prompt"] + answer.partition(_FENCE)[0] for answer in of_doc]
        for of_doc, doc in zip(answers, docs, strict=True)
    ]


def mbpp_programs(
    answers: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]
) -> list[list[str]]:
    """Take each answer's first fenced block. An answer that never closes it is an empty program."""
    return [[fenced_block(answer) for answer in of_doc] for of_doc in answers]


def fenced_block(answer: str) -> str:
    """Return the block that the prompt's fence opened, or an empty text if it is not closed."""
    found = _FENCED.search(_FENCE + answer)
    return found[1] if found else ""


def pass_at_1(references: Sequence[str], predictions: Sequence[Sequence[str]]) -> float:
    """Return the share of problems whose first program passes its tests."""
    results = [
        passes(programs[0], tests) for programs, tests in zip(predictions, references, strict=True)
    ]
    return sum(results) / len(results)
