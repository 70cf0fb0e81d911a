"""One self-contained page about a set: recipe, fidelity, plots, and a few rows to read.

No network, no fonts, no library: the plots are SVG text, the only script shows a masked token's
candidates when it is pointed at. A cache may come from a stranger, so every text of it is escaped,
and the page's own policy lets no other script run (its hash is named) and nothing be fetched.
"""

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from tide_cache.cache import Cache
from tide_cache.inspect import lines, summary
from tide_cache.report_data import ReportData, ShownRow
from tide_cache.report_svg import Series, bar_chart, line_chart, safe

_MOST_BARS = 16
_MOST_TOKENS = 1500
_PACKAGE = "tide_cache"
_RESOLUTION = 1e-6


def page(
    cache: Cache,
    data: ReportData,
    *,
    names: Mapping[int, str] | None = None,
    beside: ReportData | None = None,
) -> str:
    """Return the page as HTML. `names` holds the text of ids, where a tokenizer is at hand.

    `beside`: another set whose teacher's curves are drawn beside this one's.
    """
    facts = summary(cache.manifest, url=cache.url)
    style = (resources.files(_PACKAGE) / "report.css").read_text(encoding="utf-8")
    script = (resources.files(_PACKAGE) / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    title = "Teacher cache" if facts["kind"] == "cache" else "Premasked set"
    sections = [
        _section("Recipe", _facts(lines(facts)), kind="wide"),
        *_fidelity(facts),
        *_plots(data, beside),
        *_rows(data, names, cache.manifest.student.mask_token_id),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{safe(title)} {safe(facts['identity'][:12])}</title>"
        f"<style>{style}</style></head><body><main>"
        f"<h1>{safe(title)}</h1><p class='where'>{safe(cache.url)}</p>"
        f"<p class='note'>Plots are drawn from {data.num_rows:,} of "
        f"{facts['counts'].get('num_rows', 0):,} rows. They show what the files say; whether the "
        "files are sound is what <code>tide-cache verify</code> says.</p>"
        f"<div class='grid'>{''.join(sections)}</div></main>"
        "<div id='tip' role='status' hidden></div>"
        f"<script>{script}</script></body></html>\n"
    )


def _section(title: str, body: str, *, kind: str = "", note: str = "") -> str:
    told = f"<p class='note'>{safe(note)}</p>" if note else ""
    return f"<section class='{kind}'><h2>{safe(title)}</h2>{body}{told}</section>"


def _facts(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{safe(label)}</dt><dd>{safe(text)}</dd>" for label, text in pairs)
    return f"<dl>{rows}</dl>"


def _fidelity(facts: dict[str, Any]) -> list[str]:
    """A table of what was measured, one row a loss."""
    found = []
    for measured in facts.get("fidelity") or []:
        head = "".join(
            f"<th>{safe(name)}</th>"
            for name in ("loss", "lambda", "T", "gradient cosine", "relative error")
        )
        body = "".join(
            f"<tr><td>{safe(loss['loss'])}</td>"
            f"<td>{'' if loss['weight'] is None else format(loss['weight'], 'g')}</td>"
            f"<td>{loss['temperature']:g}</td><td>{loss['cosine']:.4f}</td>"
            f"<td>{loss['relative_error']:.4f}</td></tr>"
            for loss in measured["losses"]
        )
        note = (
            f"{measured['setting']}, tail {measured['tail']}, against a {measured['student']} on "
            f"{measured['num_positions']:,} positions"
        )
        table = f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>"
        found.append(_section("Fidelity", table, kind="wide", note=note))
    return found


def _plots(data: ReportData, beside: ReportData | None) -> list[str]:
    found = []
    drawn = [data] if beside is None else [data, beside]
    if data.num_positions:
        found += _candidate_plots(data, drawn)
    if data.num_chunks:
        chart = line_chart(
            _lines(drawn, ("p(true chunk)", "chunk_prob")),
            x_label="timestep (masked fraction)",
            y_label="mean p(true chunk)",
        )
        note = f"{data.num_chunks:,} active chunks, {data.sight}; temperature 1."
        found.append(_section("Chunk probability", chart, note=note))
    if any(data.chunk_lengths):
        found.append(_section("Chunk lengths", _chunk_lengths(data), note="Tokens of a chunk."))
    sizes = sorted(data.bytes_by_column.items(), key=lambda item: -item[1])
    unit, scale = ("MB", 1e6) if sizes and sizes[0][1] >= 1e6 else ("kB", 1e3)
    bars = [(name, round(size / scale, 1)) for name, size in sizes]
    chart = bar_chart(_most(bars), unit=f" {unit}", label="bytes by column")
    note = "Compressed, of all shards."
    found.append(_section("Bytes by column", chart, kind="tall", note=note))
    rows = sorted(data.rows_by_source.items(), key=lambda item: -item[1])
    chart = bar_chart(_most([(name, float(n)) for name, n in rows]), unit="", label="by source")
    found.append(_section("Rows by source", chart, note="Conversations taken of each source."))
    return found


def _lines(drawn: Sequence[ReportData], *quantities: tuple[str, str]) -> list[Series]:
    """Return a line for each set and each (name, field of ReportData)."""
    found = []
    for data in drawn:
        for name, field in quantities:
            points = getattr(data, field).points()
            if points:
                shown = f"{name}, {data.sight}" if len(drawn) > 1 else name
                found.append(Series(name=shown, points=points))
    return found


def _candidate_plots(data: ReportData, drawn: Sequence[ReportData]) -> list[str]:
    time = "timestep (masked fraction)"
    accuracy = line_chart(
        _lines(
            drawn,
            ("most likely id is the true one", "accuracy"),
            ("mean p(true id)", "label_prob"),
        ),
        x_label=time,
        y_label="share",
    )
    entropy = line_chart(_lines(drawn, ("entropy", "entropy")), x_label=time, y_label="nats")
    tail = line_chart(
        [
            Series(name=f"T = {temperature:g}", points=_thinned(points))
            for temperature, points in sorted(data.tail.items())
        ],
        x_label="k, candidates kept",
        y_label="mass outside",
        log_x=True,
        log_y=True,
    )
    of = f"{data.num_positions:,} masked positions"
    return [
        _section("Teacher accuracy", accuracy, note=f"{of}, {data.sight}."),
        _section(
            "Teacher entropy",
            entropy,
            note=f"At T = {data.temperature:g}, what is outside the candidates as one outcome: "
            "the least that it can be.",
        ),
        _section("Tail mass", tail, note="Mean mass outside the k likeliest ids."),
    ]


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Return the points at about eight places a decade; the last one always.

    What is left of a mass of 1 in float32 is no figure.
    """
    wanted = {round(10 ** (n / 8)) for n in range(8 * 6)} | {points[-1][0]}
    return [(float(k), mass) for k, mass in points if k in wanted and mass > _RESOLUTION]


def _chunk_lengths(data: ReportData) -> str:
    series = []
    for name, lengths in zip(("student", "teacher"), data.chunk_lengths, strict=True):
        total = sum(lengths.values()) or 1
        folded: Counter[int] = Counter()
        for length, count in lengths.items():
            folded[min(length, 12)] += count
        points = [(float(n), folded[n] / total) for n in range(1, max(folded, default=1) + 1)]
        series.append(Series(name=name, points=points))
    return line_chart(
        series, x_label="tokens (12: or more)", y_label="share of chunks", whole_x=True
    )


def _most(bars: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    shown = list(bars[:_MOST_BARS])
    rest = bars[_MOST_BARS:]
    if rest:
        shown.append((f"{len(rest)} more", sum(value for _, value in rest)))
    return shown


def _rows(data: ReportData, names: Mapping[int, str] | None, mask_id: int | None) -> list[str]:
    if not data.shown:
        return []
    key = (
        "<p class='legend'><span class='t a'>masked, half A</span><span class='t b'>masked, half B"
        "</span><span class='t'>reply</span><span class='t p'>prompt</span></p>"
    )
    how = "Point at a masked token, or touch it, for what the teacher said." + (
        "" if names is not None else " Ids, as no tokenizer was given (--tokenizer)."
    )
    rows = "".join(_row(shown, names) for shown in data.shown)
    return [_section("Rows", key + rows, kind="wide", note=how)]


def _row(shown: ShownRow, names: Mapping[int, str] | None) -> str:
    row = shown.row
    tokens = []
    for position, number in enumerate(row.student_ids_L[:_MOST_TOKENS].tolist()):
        kind = "t"
        if position < row.prompt_length:
            kind = "t p"
        elif row.student_mask_L[position]:
            kind = "t a" if row.half_a_L[position] else "t b"
        text = safe(_name(number, names))
        told = _told(shown, position, names)
        said = f' tabindex="0" data-said="{safe(told)}"' if told else ""
        tokens.append(f'<span class="{kind}"{said}>{text}</span>')
    cut = len(row.student_ids_L) - _MOST_TOKENS
    more = f"<p class='note'>{cut:,} more tokens</p>" if cut > 0 else ""
    head = (
        f"sample {row.sample_id}, source {row.source}, view {row.view}, timestep {row.timestep:.3f}"
    )
    gap = " ids" if names is None else ""
    return f"<h3>{safe(head)}</h3><div class='tokens{gap}' dir='auto'>{''.join(tokens)}</div>{more}"


def _told(shown: ShownRow, position: int, names: Mapping[int, str] | None) -> str:
    parts = []
    guess = shown.guesses.get(position)
    if guess is not None:
        parts.append(f"true: p = {math.exp(guess.label_logprob):.3f}")
        parts += [f"{_name(number, names)}  {prob:.3f}" for number, prob in guess.candidates]
    if position in shown.chunk_logprobs:
        parts.append(f"chunk: p = {math.exp(shown.chunk_logprobs[position]):.3f}")
    return " | ".join(parts)


def _name(number: int, names: Mapping[int, str] | None) -> str:
    if names is None or number not in names:
        return str(number)
    return names[number].replace("\n", "↵").replace("\t", "⇥")
