"""The errors that a user of the project can meet, and nothing else.

Each carries one sentence of what is wrong (file, field, expected, got) and, where there is one, the
next command to run as `hint`. Commands print `message` and `hint` without a traceback and exit
with `exit_code`; anything that is not a `TideError` is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class TideError(Exception):
    """Base of all errors that a user can cause or must act on."""

    exit_code = 1
    # True where the error is about some rows, so that other rows can still be worked on.
    is_about_rows = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}; {hint}")
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments would be lost on the way out of a worker process.
        return _rebuild, (type(self), self.message, self.hint, self.__dict__)


class ConfigError(TideError):
    """A config file or command line that cannot be understood."""

    exit_code = 2


class DataError(TideError):
    """Input data (chat rows, premasked rows, logits) that cannot be used.

    `reason` is a slug under which dropped rows are counted.
    """

    is_about_rows = True

    def __init__(self, message: str, *, hint: str | None = None, reason: str = "bad_data") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class FormatError(TideError):
    """A file of the format that is truncated, changed, hostile or of an unknown version."""

    is_about_rows = True


class CompatibilityError(TideError):
    """Two artefacts (cache and student, cache and config) that do not fit together."""


class StorageError(TideError):
    """A file system that is full, gone or refuses."""


class MissingFileError(StorageError):
    """A file that a reachable file system does not have."""


def _rebuild(
    kind: type[TideError], message: str, hint: str | None, state: dict[str, object]
) -> TideError:
    error = kind(message, hint=hint)
    error.__dict__.update(state)
    return error


def printable(text: str) -> str:
    """Return a text with its control characters spelt out.

    Names and messages may come from a stranger's set; a terminal would act on them.
    """
    return "".join(
        char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
