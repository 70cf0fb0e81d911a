"""Progress of a long command on stderr: a bar on a terminal, plain lines elsewhere.

A log file of a cluster job should neither be silent for hours nor hold a redrawn bar, so without a
terminal a line is written at most every `_SECONDS_BETWEEN_LINES`, and one at the end.
"""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class RowProgress:
    """Counts rows that are done; use as a context manager.

    Rows of an earlier run (`advance(..., was_done=True)`) count for the total, not for the speed.
    """

    def __init__(self, title: str, num_rows: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._title = title
        self._num_rows = num_rows
        self._num_done = self._num_skipped = self._num_dropped = 0
        self._num_positions = self._size_bytes = self._num_failed = 0
        self._begun_s = self._last_line_s = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=num_rows, detail="")

    def __enter__(self) -> "RowProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if kind is None and self._num_done:
            self._line()

    def advance(
        self,
        num_rows: int,
        *,
        num_dropped: int = 0,
        num_positions: int = 0,
        size_bytes: int = 0,
        was_done: bool = False,
    ) -> None:
        """Count rows as done, with the masked positions in them and the bytes that they made."""
        self._num_done += num_rows
        self._num_skipped += num_rows if was_done else 0
        self._num_dropped += num_dropped
        self._num_positions += 0 if was_done else num_positions
        self._size_bytes += size_bytes
        self._show()

    def fail(self) -> None:
        """Count a task as failed."""
        self._num_failed += 1
        self._show()

    def _show(self) -> None:
        self._bar.update(self._task, completed=self._num_done, detail=self._detail())
        if not self._console.is_terminal:
            now_s = time.monotonic()
            if now_s - self._last_line_s >= _SECONDS_BETWEEN_LINES:
                self._last_line_s = now_s
                self._line()

    def preparing(self, title: str) -> Callable[[int, int], None]:
        """Return a callback (done, total) that shows work which comes before the first row."""
        said = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal said
            self._bar.update(self._task, detail=f"{title}: {done} of {total} slices")
            now_s = time.monotonic()
            if not self._console.is_terminal and now_s - said >= _SECONDS_BETWEEN_LINES:
                said = now_s
                self._console.print(f"{title}: {done} of {total} slices", highlight=False)
            # Speed counts from the first row on.
            self._begun_s = now_s

        return show

    def _per_s(self, count: int) -> float:
        return count / max(time.monotonic() - self._begun_s, 1e-6)

    def _rows_per_s(self) -> float:
        return self._per_s(self._num_done - self._num_skipped)

    def _detail(self) -> str:
        parts = [f"{self._rows_per_s():,.0f} rows/s"]
        if self._num_positions:
            parts.append(f"{self._per_s(self._num_positions):,.0f} positions/s")
        if self._size_bytes:
            parts.append(f"{self._size_bytes / 1e9:,.3f} GB")
        parts.append(f"{self._num_dropped:,} dropped")
        if self._num_failed:
            parts.append(f"{self._num_failed} tasks failed")
        if self._num_skipped:
            parts.append(f"{self._num_skipped:,} from an earlier run")
        return ", ".join(parts)

    def _line(self) -> None:
        left = self._num_rows - self._num_done
        speed = self._rows_per_s()
        eta = f", {left / speed:,.0f} s left" if left and speed else ""
        self._console.print(
            f"{self._title}: {self._num_done:,} of {self._num_rows:,} rows, {self._detail()}{eta}",
            highlight=False,
            markup=False,
        )


class SliceProgress:
    """Counts slices of work on stderr; use as a context manager, `update(done, total)`."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._title = title
        self._last_line_s = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=None)

    def __enter__(self) -> "SliceProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Say how many slices are done."""
        self._bar.update(self._task, completed=done, total=total)
        now_s = time.monotonic()
        if not self._console.is_terminal and now_s - self._last_line_s >= _SECONDS_BETWEEN_LINES:
            self._last_line_s = now_s
            text = f"{self._title}: {done} of {total} slices"
            self._console.print(text, highlight=False, markup=False)
