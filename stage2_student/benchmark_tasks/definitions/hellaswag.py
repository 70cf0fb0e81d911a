"""Rows of HellaSwag as a question with lettered endings, for `hellaswag_gen.yaml`."""

import re
from typing import Any

LETTERS = "ABCD"


def lettered_endings(dataset: Any) -> Any:
    """Map rows of the data set to context, lettered endings and the letter of the right one."""
    return dataset.map(question, remove_columns=dataset.column_names)


def question(row: dict[str, Any]) -> dict[str, str]:
    """Return context, `lettered` (a line each) and `answer` (a to d) of a row of HellaSwag."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [clean(ending) for ending in row["endings"]]
    return {
        "context": clean(context),
        "lettered": "\n".join(f"{a}. {b}" for a, b in zip(LETTERS, endings, strict=True)),
        "answer": LETTERS[int(row["label"])].lower(),
    }


def clean(text: str) -> str:
    """Remove the marks in brackets that the WikiHow part of the data set left in its texts."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
