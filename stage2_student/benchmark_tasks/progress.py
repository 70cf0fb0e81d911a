"""How a run of the benchmarks shows itself on stderr: a bar a benchmark, or plain lines."""

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_INTERVAL_S = 10.0


class BenchmarkProgress(Protocol):
    """What a run tells of its progress."""

    def say(self, text: str) -> None:
        """Say one thing, once."""

    def begin(self, title: str) -> None:
        """Say which benchmark is next."""

    def start(self, num_kept: int, num_prompts: int) -> None:
        """Say how many prompts there are, and how many are answered already."""

    def update(self, num_answered: int) -> None:
        """Say that so many more are answered."""

    def close(self) -> None:
        """Say that it is over, for whatever reason."""


class NoProgress:
    """Says nothing: for use from Python."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def begin(self, title: str) -> None:
        """Say nothing."""

    def start(self, num_kept: int, num_prompts: int) -> None:
        """Say nothing."""

    def update(self, num_answered: int) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Say nothing."""


class BarProgress:
    """A bar a benchmark: prompts answered, time left."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("prompts"),
            TimeRemainingColumn(),
            console=console,
        )
        self._bar.start()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._bar.console.print(text, markup=False, highlight=False)

    def begin(self, title: str) -> None:
        """Add a bar whose length is not known yet."""
        self._task = self._bar.add_task(title, total=None)

    def start(self, num_kept: int, num_prompts: int) -> None:
        """Give the bar its length."""
        self._bar.reset(self._task, total=num_prompts, completed=num_kept)

    def update(self, num_answered: int) -> None:
        """Move the bar."""
        self._bar.advance(self._task, num_answered)

    def close(self) -> None:
        """Leave the bars as they are."""
        self._bar.stop()


class LineProgress:
    """A line every ten seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False)

    def begin(self, title: str) -> None:
        """Remember the title."""
        self._title = title

    def start(self, num_kept: int, num_prompts: int) -> None:
        """Say what there is to do."""
        self._done, self._total = num_kept, num_prompts
        self._said_s = time.monotonic()
        self.say(f"{self._title}: {num_prompts} prompts, {num_kept} answered before")

    def update(self, num_answered: int) -> None:
        """Say how far it is, if it is time."""
        self._done += num_answered
        now_s = time.monotonic()
        if self._done < self._total and now_s - self._said_s < _PLAIN_INTERVAL_S:
            return
        self._said_s = now_s
        self.say(f"{self._title}: {self._done} of {self._total} prompts answered")

    def close(self) -> None:
        """Say nothing more."""


def make_progress() -> BenchmarkProgress:
    """Return the progress that fits stderr."""
    console = Console(stderr=True, soft_wrap=True)
    return BarProgress(console) if console.is_terminal else LineProgress(console)
