import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage1_teacher.content_spans import ContentSpan, locate_contents
from tide_cache.errors import DataError


def shown(contents, render):
    """What every span shows, after checking that it is what it says it is."""
    text, spans = locate_contents(contents, render)
    assert text == render(contents)
    for content, span in zip(contents, spans, strict=True):
        length = span.end - span.start
        assert text[span.start : span.end] == content[span.content_start :][:length]
    return [text[span.start : span.end] for span in spans]


def verbatim(contents):
    return "".join(f"1:{content}\n" for content in contents)


def trimmed(contents):
    return "".join(f"1:{content.strip()}\n" for content in contents)


SPACES = st.text(" \n\r\t\u00a0", max_size=3)
CORES = st.sampled_from(["", "1", "1:1", "a b", "\n", "é🙂", "\ue000\ue001", "x\n\ny"])
CONTENTS = st.lists(st.builds("{}{}{}".format, SPACES, CORES, SPACES), min_size=1, max_size=4)


@given(contents=CONTENTS)
def test_verbatim_contents_are_found_whole_and_in_place(contents: list[str]) -> None:
    _, spans = locate_contents(contents, verbatim)
    at = 0
    for content, span in zip(contents, spans, strict=True):
        assert span == ContentSpan(start=at + 2, end=at + 2 + len(content), content_start=0)
        at += len(content) + 3


@given(contents=CONTENTS)
def test_trimmed_contents_are_found_exactly(contents: list[str]) -> None:
    _, spans = locate_contents(contents, trimmed)
    at = 0
    for content, span in zip(contents, spans, strict=True):
        core = content.strip()
        if core:
            start = len(content) - len(content.lstrip())
            assert span == ContentSpan(start=at + 2, end=at + 2 + len(core), content_start=start)
        else:
            assert span.start == span.end
        at += len(core) + 3


@pytest.mark.parametrize(
    "trim",
    [
        lambda text: text.strip("\n"),
        lambda text: text.lstrip(),
        lambda text: text.rstrip(),
        lambda text: text.rstrip("\n"),
        lambda text: text.removeprefix(" "),
    ],
)
@given(contents=CONTENTS)
def test_partly_trimmed_contents_are_found_exactly(trim, contents: list[str]) -> None:
    # The template's own whitespace around must never be taken for the content's.
    def render(texts):
        return "".join(f"\n \n{trim(text)}\n \n" for text in texts)

    expected = [trim(content) for content in contents]
    for want, got in zip(expected, shown(contents, render), strict=True):
        assert got == want or (not want.strip() and not got)


def test_only_some_roles_trimmed() -> None:
    def render(texts):
        return f"<{texts[0].strip()}>\n<{texts[1]}>\n<{texts[2].strip()}>"

    assert shown([" a\n", " b\n", "\tc "], render) == ["a", " b\n", "c"]


def test_blank_content_that_a_template_leaves_out_has_an_empty_span() -> None:
    def render(texts):
        return "".join(f"<{text}>" for text in texts if text.strip())

    text, spans = locate_contents(["a", "", " \n", "b"], render)
    assert text == "<a><b>"
    assert [(span.start, span.end) for span in spans] == [(1, 2), (2, 2), (2, 2), (4, 5)]


def test_marks_avoid_every_character_in_use() -> None:
    contents = ["".join(map(chr, range(0xE000, 0xE100))), "\ue100\ue101"]
    assert shown(contents, lambda texts: "\ue102" + verbatim(texts)) == contents


def test_think_block_that_is_cut_from_a_content() -> None:
    def render(texts):
        return "".join(f"<{text.split('</think>')[-1].lstrip(chr(10))}>" for text in texts)

    contents = ["<think>\n1\n</think>\n\n1\n", "1", "<think>1</think> 1"]
    assert shown(contents, render) == ["1\n", "1", " 1"]
    nothing_else = ["<think>2</think>", "<think>2</think>\n\n", "</think> \n "]
    assert shown(nothing_else, render) == ["", "", " \n "]


def test_template_that_looks_at_how_a_content_begins_and_ends() -> None:
    def render(texts):
        is_result = [text.startswith("<result>") and text.endswith("</result>") for text in texts]
        return "".join(
            f"({'tool' if result else 'user'})\n{text}\n"
            for text, result in zip(texts, is_result, strict=True)
        )

    contents = ["<result>1</result>", "1", "<result>1</result>"]
    assert shown(contents, render) == contents
    assert shown(["1", "<result>\n</result>"], render) == ["1", "<result>\n</result>"]


def refused(contents, render):
    with pytest.raises(DataError) as caught:
        locate_contents(contents, render)
    return caught.value.reason, str(caught.value)


def test_dropped_content_is_refused() -> None:
    reason, text = refused(["be kind", "hi"], lambda texts: f"<{texts[1]}>")
    assert reason == "content_dropped"
    assert "message 1 of 2 ('be kind'): the chat template leaves it out" in text
    assert "or drop the row" in text


def test_repeated_content_is_refused() -> None:
    reason, text = refused(["hi"], lambda texts: f"<{texts[0]}><{texts[0]}>")
    assert reason == "content_repeated"
    assert "writes it more than once" in text


@pytest.mark.parametrize(
    "rewrite",
    [
        str.upper,
        lambda text: text.replace("\n", " "),
        lambda text: text.replace("\n", "\n> "),
        ascii,
        lambda text: text[:4],
        lambda text: text[4:],
    ],
)
def test_rewritten_content_is_refused(rewrite) -> None:
    reason, text = refused(
        ["hi", "some\ntext é"], lambda texts: f"<{texts[0]}><{rewrite(texts[1])}>"
    )
    assert reason == "content_rewritten"
    assert "message 2 of 2" in text and "does not write it verbatim" in text


@pytest.mark.parametrize("contents", [["a", "b"], ["1", "1"]])
def test_reordered_contents_are_refused_even_if_equal(contents: list[str]) -> None:
    reason, text = refused(contents, lambda texts: "".join(f"<{text}>" for text in texts[::-1]))
    assert reason == "content_reordered"
    assert "message 2 of 2: the chat template writes it before message 1" in text


def test_long_contents_are_shortened_in_errors() -> None:
    _, text = refused(["x" * 500], lambda texts: "")
    assert len(text) < 250
