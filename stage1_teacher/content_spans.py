"""Where the contents of a conversation stand in a template's rendering, without searching for them.

Searching for a message's text finds the wrong place whenever the text also occurs earlier (a "1",
a repeated question). Here the contents are rendered a second time between private-use characters
that occur nowhere else; if removing them gives back the plain rendering, their places are the
spans, with no guess left. That is one extra rendering (35 us). Where it is not so (a template
trims, or cuts a think block, or looks at how a content begins), each message is probed by itself,
with the marks further inside, until the outermost place is found that leaves the rendering as it
was.

Works on plain strings and a `render(contents) -> text` function, so it needs no tokenizer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from tide_cache.errors import DataError

Render = Callable[[Sequence[str]], str]
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_THINK_TAGS = ("<think>", "</think>")


@dataclass(frozen=True, kw_only=True, slots=True)
class ContentSpan:
    """Characters [start, end) of the rendering are the content from `content_start` on.

    What a template trims off a content lies in no span: the span is the part that was rendered,
    verbatim. A content of which nothing was rendered has an empty span.
    """

    start: int
    end: int
    content_start: int


def locate_contents(contents: Sequence[str], render: Render) -> tuple[str, tuple[ContentSpan, ...]]:
    """Render `contents` and return the text with the exact span of each of them.

    `render` must be a pure function. Raises DataError whose `reason` is `content_dropped`,
    `content_repeated`, `content_rewritten` or `content_reordered` when the rendering does not hold
    every content verbatim (whitespace at its ends and a leading think block aside), once, in order.
    """
    plain = render(contents)
    template = _Template(contents, render, plain, _unused_marks(plain, contents))
    found = template.probe({index: (0, len(text)) for index, text in enumerate(contents)})
    spans: list[ContentSpan] = []
    if isinstance(found, _Misfit):
        for index in range(len(contents)):
            spans.append(_locate_one(template, index, after=spans[-1].end if spans else 0))
    else:
        spans = found
    _check_order(spans)
    return plain, tuple(spans)


@dataclass(frozen=True, slots=True)
class _Misfit:
    """A rendering whose marks cannot be read: how often they occur, and what else it has more."""

    num_marks: int
    excess: int
    is_plain: bool


@dataclass(frozen=True, slots=True)
class _Template:
    contents: Sequence[str]
    render: Render
    plain: str
    marks: Sequence[str]

    def probe(self, cuts: Mapping[int, tuple[int, int]]) -> list[ContentSpan] | _Misfit:
        """Put marks around the given parts of the given contents and read their places back."""
        marked = self.render(
            [self._wrap(index, cuts.get(index)) for index in range(len(self.contents))]
        )
        marks = [mark for index in cuts for mark in self._pair(index)]
        places = [marked.find(mark) for mark in marks]
        num_marks = sum(map(marked.count, marks))
        unmarked = _without(marked, marks)
        misfit = _Misfit(num_marks, len(unmarked) - len(self.plain), unmarked == self.plain)
        if num_marks != len(marks) or places != sorted(places) or not misfit.is_plain:
            return misfit
        spans = []
        for order, (index, (cut_start, cut_end)) in enumerate(cuts.items()):
            start, end = places[2 * order] - 2 * order, places[2 * order + 1] - 2 * order - 1
            if self.plain[start:end] != self.contents[index][cut_start:cut_end]:
                return misfit
            spans.append(ContentSpan(start=start, end=end, content_start=cut_start))
        return spans

    def probe_one(self, index: int, start: int, end: int) -> ContentSpan | _Misfit:
        found = self.probe({index: (start, end)})
        return found if isinstance(found, _Misfit) else found[0]

    def _pair(self, index: int) -> Sequence[str]:
        return self.marks[2 * index : 2 * index + 2]

    def _wrap(self, index: int, cut: tuple[int, int] | None) -> str:
        text = self.contents[index]
        if cut is None:
            return text
        opening, closing = self._pair(index)
        return text[: cut[0]] + opening + text[cut[0] : cut[1]] + closing + text[cut[1] :]


def _locate_one(template: _Template, index: int, *, after: int) -> ContentSpan:
    """Find the outermost part of one content that the template renders verbatim."""
    content = template.contents[index]
    core_end = len(content.rstrip())
    if core_end == 0:
        found = template.probe_one(index, 0, len(content))
        # Blank, and trimmed or left out: an empty span has no bytes to speak of.
        empty = ContentSpan(start=after, end=after, content_start=0)
        return empty if isinstance(found, _Misfit) else found
    inner = None
    for base in _left_bases(content):
        space = len(content) - base - len(content[base:].lstrip())
        # Behind a think block there may be nothing: then both marks stand at the very end.
        inner = _outermost(lambda at: template.probe_one(index, at, max(at, core_end)), base, space)
        if inner is not None:
            break
    inner = inner or _around_middle(template, index)
    if inner is None:
        raise _refusal(template, index)
    start, length = inner.content_start, len(content)
    whole = _outermost(lambda at: template.probe_one(index, start, at), length, core_end - length)
    return whole or inner


def _left_bases(content: str) -> list[int]:
    """Return where a rendered content may begin: at its start, or behind a think tag."""
    return [0] + [content.rfind(tag) + len(tag) for tag in _THINK_TAGS if tag in content]


def _outermost(
    probe: Callable[[int], ContentSpan | _Misfit], base: int, space: int
) -> ContentSpan | None:
    """Probe at `base`, then as far inward as the template trims, then behind all of `space`.

    `space` is the whitespace that can be trimmed, negative when inward is to the left. A mark
    outside whitespace protects it, so the surplus of that rendering is what the template trims.
    """
    first = probe(base)
    if isinstance(first, ContentSpan):
        return first
    inward = 1 if space > 0 else -1
    for num_trimmed in dict.fromkeys((first.excess, abs(space))):
        if 0 < num_trimmed <= abs(space):
            found = probe(base + inward * num_trimmed)
            if isinstance(found, ContentSpan):
                return found
    return None


def _around_middle(template: _Template, index: int) -> ContentSpan | None:
    """Find a content by its middle, for templates that look at how a content begins or ends.

    Whitespace at its ends is left out of the span, since it could be the template's own.
    """
    content = template.contents[index]
    core = content.strip()
    core_start = content.index(core)
    middle = core_start + len(core) // 2
    found = template.probe_one(index, middle, middle)
    if isinstance(found, _Misfit):
        return None
    start = found.start - (middle - core_start)
    if start < 0 or template.plain[start : start + len(core)] != core:
        return None
    return ContentSpan(start=start, end=start + len(core), content_start=core_start)


def _refusal(template: _Template, index: int) -> DataError:
    content = template.contents[index]
    core_start = len(content) - len(content.lstrip())
    found = template.probe_one(index, core_start, len(content.rstrip()))
    assert isinstance(found, _Misfit)  # else the content would have been located
    if found.num_marks == 0 and found.is_plain:
        reason, what = "content_dropped", "leaves it out"
    elif found.num_marks > 2:
        reason, what = "content_repeated", "writes it more than once"
    else:
        reason, what = "content_rewritten", "does not write it verbatim"
    return DataError(
        f"message {index + 1} of {len(template.contents)} ({_shorten(content)}): the chat template "
        f"{what}, so its tokens cannot be told from the template's",
        hint="use a template that writes every content once and unchanged, or drop the row",
        reason=reason,
    )


def _check_order(spans: Sequence[ContentSpan]) -> None:
    for index in range(1, len(spans)):
        if spans[index].start < spans[index - 1].end:
            raise DataError(
                f"message {index + 1} of {len(spans)}: the chat template writes it before message "
                f"{index}",
                hint="use a template that keeps the order of the messages",
                reason="content_reordered",
            )


def _unused_marks(plain: str, contents: Sequence[str]) -> list[str]:
    """Return two private-use characters per content that occur in no text."""
    used = set(plain).union(*contents)
    free = (chr(code) for codes in _PRIVATE_USE for code in codes if chr(code) not in used)
    marks = list(islice(free, 2 * len(contents)))
    if len(marks) < 2 * len(contents):
        raise DataError(
            f"{len(contents)} messages: expected {2 * len(contents)} private-use characters that "
            f"do not occur in them, got {len(marks)}",
            hint="drop the row",
            reason="content_rewritten",
        )
    return marks


def _without(text: str, marks: Sequence[str]) -> str:
    for mark in marks:
        text = text.replace(mark, "")
    return text


def _shorten(text: str, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
