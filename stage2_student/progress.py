"""How a run shows itself on stderr: a rich bar on a terminal, plain lines anywhere else.

Both get the same calls, a few a second at most, because each one needs the loss off the device.
"""

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_INTERVAL_S = 10.0


class TrainProgress(Protocol):
    """What the trainer tells of its progress."""

    def start(self, first_step: int, max_steps: int) -> None:
        """Say that steps `first_step` to `max_steps` are to be done."""

    def update(self, steps_done: int, loss: float, tokens_per_s: float) -> None:
        """Say how far it is."""

    def close(self) -> None:
        """Say that it is over, for whatever reason."""


class NoProgress:
    """Says nothing: for use from Python."""

    def start(self, first_step: int, max_steps: int) -> None:
        """Say nothing."""

    def update(self, steps_done: int, loss: float, tokens_per_s: float) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Say nothing."""


class BarProgress:
    """A bar with step, loss, tokens/s and time left."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
        )

    def start(self, first_step: int, max_steps: int) -> None:
        """Show the bar."""
        self._bar.start()
        self._task = self._bar.add_task(
            "train", total=max_steps, completed=first_step, loss=float("nan"), speed=0.0
        )

    def update(self, steps_done: int, loss: float, tokens_per_s: float) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=steps_done, loss=loss, speed=tokens_per_s)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()


class LineProgress:
    """A line every ten seconds, and one for the last step."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self, first_step: int, max_steps: int) -> None:
        """Say where the run begins."""
        self._first, self._max = first_step, max_steps
        self._began_s = self._said_s = time.monotonic()
        self._console.print(f"train: step {first_step} of {max_steps}", highlight=False)

    def update(self, steps_done: int, loss: float, tokens_per_s: float) -> None:
        """Say how far it is, if it is time."""
        now_s = time.monotonic()
        if steps_done < self._max and now_s - self._said_s < _PLAIN_INTERVAL_S:
            return
        self._said_s = now_s
        per_step_s = (now_s - self._began_s) / max(steps_done - self._first, 1)
        left_s = per_step_s * (self._max - steps_done)
        self._console.print(
            f"train: step {steps_done} of {self._max}, loss {loss:.4f}, {tokens_per_s:,.0f} "
            f"tokens/s, {left_s:,.0f} s left",
            highlight=False,
        )

    def close(self) -> None:
        """Say nothing more."""


def make_progress() -> TrainProgress:
    """Return the progress that fits stderr."""
    console = Console(stderr=True, soft_wrap=True)
    return BarProgress(console) if console.is_terminal else LineProgress(console)
