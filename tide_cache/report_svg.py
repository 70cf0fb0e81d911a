"""Plots as SVG text: lines over a number, bars by name. Colours and fonts are the page's own CSS.

Every text that goes in is escaped here; numbers are written with a fixed number of digits, so that
the same data gives the same bytes.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 520, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 14, 44
_BAR = 22
_NAME_WIDTH = 168
_SHOWN = 26
# Marks that reorder or hide text, and everything that is no character at all.
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line: its name and its points."""

    name: str
    points: Sequence[tuple[float, float]]


def safe(text: str) -> str:
    """Return a text of a stranger's for HTML: escaped, and nothing in it that hides or reorders."""
    shown = "".join(
        f"<U+{ord(letter):04X}>" if unicodedata.category(letter) in _HIDDEN else letter
        for letter in text
    )
    return escape(shown, quote=True)


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    whole_x: bool = False,
) -> str:
    """Draw lines with a dot at each point, whose values show under the pointer.

    `whole_x`: only whole numbers are marked. A linear y begins at 0.
    """
    points = [point for line in series for point in line.points]
    if log_y:
        points = [(x, y) for x, y in points if y > 0]
    if not points:
        return '<p class="none">nothing to draw</p>'
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_axis = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT, log=log_x, whole=whole_x)
    low = min(ys) if log_y else min(0.0, *ys, 0.0)
    y_axis = _Axis(low, max(ys), _HEIGHT - _BOTTOM, _TOP, log=log_y)
    parts = [_frame(x_axis, y_axis, x_label, y_label)]
    for number, line in enumerate(series):
        placed = [(x_axis.at(x), y_axis.at(y), x, y) for x, y in line.points if y > 0 or not log_y]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in placed)
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
        for x, y, x_value, y_value in placed:
            told = f"{line.name}: {_number(y_value)} at {_number(x_value)}"
            parts.append(
                f'<circle class="dot s{number}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
                f"<title>{safe(told)}</title></circle>"
            )
    return _svg(_HEIGHT, parts, f"{y_label} over {x_label}") + _legend(series)


def bar_chart(bars: Sequence[tuple[str, float]], *, unit: str, label: str) -> str:
    """Draw a bar a name, the values beside them."""
    if not bars:
        return '<p class="none">nothing to draw</p>'
    most = max(value for _, value in bars) or 1.0
    room = _WIDTH - _NAME_WIDTH - 84
    parts = []
    for number, (name, value) in enumerate(bars):
        y = _TOP + number * _BAR
        width = room * max(0.0, value) / most
        cut = name if len(name) <= _SHOWN else f"{name[: _SHOWN - 1]}…"
        told = f"{_number(value)}{unit}"
        parts.append(
            f"<g><title>{safe(f'{name}: {told}')}</title>"
            f'<text class="name" x="{_NAME_WIDTH - 6}" y="{y + 11}">{safe(cut)}</text>'
            f'<rect class="bar" x="{_NAME_WIDTH}" y="{y}" width="{width:.1f}" height="15" rx="2"/>'
            f'<text class="value" x="{_NAME_WIDTH + width + 5:.1f}" y="{y + 11}">'
            f"{safe(told)}</text>"
            "</g>"
        )
    return _svg(_TOP + len(bars) * _BAR + 4, parts, label)


class _Axis:
    """Where values stand, linear or logarithmic, and which of them are marked."""

    def __init__(
        self,
        low: float,
        high: float,
        start: float,
        end: float,
        *,
        log: bool,
        whole: bool = False,
    ) -> None:
        self.log = log
        if log:
            low, high = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
        if high - low < 1e-12:
            high = low + 1.0
        if log:
            self.marks = [10.0**power for power in range(int(low), int(high) + 1)]
        else:
            step = _step((high - low) / 5)
            step = max(1.0, step) if whole else step
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
            self.marks = [low + n * step for n in range(round((high - low) / step) + 1)]
        self._low, self._high, self._start, self._end = low, high, start, end

    def at(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self._start + (value - self._low) / (self._high - self._low) * (
            self._end - self._start
        )


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    parts = []
    for mark in y_axis.marks:
        y = y_axis.at(mark)
        parts.append(
            f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="mark y" x="{_LEFT - 6}" y="{y + 4:.1f}">{_number(mark)}</text>'
        )
    for mark in x_axis.marks:
        x = x_axis.at(mark)
        parts.append(
            f'<text class="mark x" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}">{_number(mark)}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    height = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text class="label" x="{middle:.0f}" y="{_HEIGHT - 8}">{safe(x_label)}</text>'
        f'<text class="label" transform="translate(13 {height:.0f}) rotate(-90)">{safe(y_label)}'
        "</text>"
    )
    return "".join(parts)


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    names = "".join(
        f'<span><i class="key s{number}"></i>{safe(line.name)}</span>'
        for number, line in enumerate(series)
    )
    return f'<p class="legend">{names}</p>'


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{safe(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= rough - 1e-12)


def _number(value: float) -> str:
    if value and (abs(value) < 0.001 or abs(value) >= 1e6):
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return f"{value:,.3f}".rstrip("0").rstrip(".")
