"""The words in which a mixture of sources is written on one line, read and written.

    data/chat.jsonl + openai/gsm8k[name:main,split:train] + code[lang:python,cap:20000,weight:2]

    mixture := term ("+" term)*
    term    := path ("[" option ("," option)* "]")?
    option  := key ":" value        key: an option of the source (split, cap, ...), else a column
    path, key, value                bare, or in single quotes where they hold + [ ] , : ' or spaces
                                    at an end; '' is one quote; a quoted key is always a column

A hand-written scanner, because every error can then name the column where reading stopped.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

_SPECIAL = frozenset("+[],:'")
_QUOTED = re.compile(r"'((?:[^']|'')*)'")


def scan_mixture(text: str, option_keys: Collection[str]) -> tuple[dict[str, Any], ...]:
    """Read `text` into one mapping per term: `path`, the options given and `filters` by column.

    Raises ValueError that names the column of `text` and what was expected there.
    """
    return _Scanner(text, option_keys).mixture()


def format_term(path: str, options: Sequence[str]) -> str:
    """Write a term from its path and its options, which are formatted already."""
    return format_word(path) + (f"[{','.join(options)}]" if options else "")


def format_word(word: str, *, reserved: Collection[str] = ()) -> str:
    """Write a path, key or value, in quotes where the grammar asks for them.

    `reserved` are the option keys when the word is the key of a filter.
    """
    if word and word == word.strip() and _SPECIAL.isdisjoint(word) and word not in reserved:
        return word
    return "'" + word.replace("'", "''") + "'"


class _Scanner:
    """Reads the grammar of the module docstring from left to right."""

    def __init__(self, text: str, option_keys: Collection[str]) -> None:
        self.text = text
        self.option_keys = option_keys
        self.at = 0

    def mixture(self) -> tuple[dict[str, Any], ...]:
        terms = [self.term()]
        while self.take("+"):
            terms.append(self.term())
        if self.at < len(self.text):
            raise self.error("expected '+' or the end of the mixture")
        return tuple(terms)

    def term(self) -> dict[str, Any]:
        values: dict[str, Any] = {"path": self.word("a path or hub name", stops="+[")[0]}
        filters: dict[str, str] = {}
        if self.take("["):
            self.option(values, filters)
            while self.take(","):
                self.option(values, filters)
            if not self.take("]"):
                raise self.error("expected ',' or ']'")
        return values | ({"filters": filters} if filters else {})

    def option(self, values: dict[str, Any], filters: dict[str, str]) -> None:
        self.skip_spaces()
        start = self.at
        key, is_quoted = self.word("a key", stops=":,]+")
        if not self.take(":"):
            raise self.error(f"expected ':' and a value after {key!r}, as in [lang:python]")
        value, _ = self.word(f"a value for {key!r}", stops=",]")
        target = values if key in self.option_keys and not is_quoted else filters
        if key in target:
            self.at = start
            raise self.error(f"{key!r} is given twice")
        target[key] = value

    def word(self, what: str, *, stops: str) -> tuple[str, bool]:
        """Return the next word and whether it was quoted."""
        self.skip_spaces()
        if self.text.startswith("'", self.at):
            return self.quoted(), True
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in stops:
            if self.text[self.at] in "[]'":
                raise self.error(f"{what} that holds {self.text[self.at]} must be in single quotes")
            self.at += 1
        word = self.text[start : self.at].strip()
        if not word:
            self.at = start
            raise self.error(f"expected {what}")
        return word, False

    def quoted(self) -> str:
        match = _QUOTED.match(self.text, self.at)
        if match is None:
            raise self.error("this quote is never closed")
        self.at = match.end()
        return match[1].replace("''", "'")

    def take(self, symbol: str) -> bool:
        self.skip_spaces()
        found = self.text.startswith(symbol, self.at)
        self.at += found
        return found

    def skip_spaces(self) -> None:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1

    def error(self, problem: str) -> ValueError:
        return ValueError(f"column {self.at + 1}: {problem}")
