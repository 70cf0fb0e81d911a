from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage1_teacher.chat import render_chat
from stage1_teacher.positions import align_positions, positions_to_runs, runs_to_positions
from tests.small_tokenizers import CHATML, PLAIN_TAGS, THINKING, TRIMMING, byte_level
from tests.unit.test_chat import assistant, conversations, system, user
from tide_cache.alignment import check_runs, teacher_partners
from tide_cache.errors import DataError

BOS_CHATML = "{{ '<|mask|>' }}" + CHATML
NO_LINE_FEED = CHATML.replace("<|im_end|>\n", "<|im_end|>")
TEMPLATES = st.sampled_from([CHATML, BOS_CHATML, TRIMMING, PLAIN_TAGS, THINKING])


def pairs_of(messages, template_a, template_b):
    chat_a, chat_b = (render_chat(messages, byte_level(t)) for t in (template_a, template_b))
    a_P, b_P = align_positions(chat_a, chat_b)
    assert a_P.dtype == b_P.dtype == np.int32
    return chat_a, chat_b, a_P, b_P


def paired_text(messages, template_a, template_b):
    chat_a, _, a_P, _ = pairs_of(messages, template_a, template_b)
    text = chat_a.text.encode()
    parts = [text[chat_a.bounds_M[at] : chat_a.bounds_M[at + 1]] for at in a_P]
    return b"".join(parts).decode()


@settings(deadline=None, max_examples=150)
@given(template_a=TEMPLATES, template_b=TEMPLATES, turns=conversations())
def test_pairs_carry_the_same_token_of_the_same_content(template_a, template_b, turns) -> None:
    messages = [{"role": role, "content": text} for role, text in turns]
    chat_a, chat_b, a_P, b_P = pairs_of(messages, template_a, template_b)
    runs_R3 = positions_to_runs(a_P, b_P)
    check_runs(runs_R3, chat_a.ids_L, chat_b.ids_L, where="test")
    if chat_a.text == chat_b.text:
        assert a_P.tolist() == b_P.tolist() == list(range(len(chat_a.ids_L)))
        return
    # By brute force: every token inside a content, against every one of the other side.
    expected = [
        (i, j)
        for span_a, span_b in zip(chat_a.messages, chat_b.messages, strict=True)
        for i in range(len(chat_a.ids_L))
        for j in range(len(chat_b.ids_L))
        if chat_a.ids_L[i] == chat_b.ids_L[j]
        and span_a.byte_start <= chat_a.bounds_M[i] < chat_a.bounds_M[i + 1] <= span_a.byte_end
        and span_b.byte_start <= chat_b.bounds_M[j] < chat_b.bounds_M[j + 1] <= span_b.byte_end
        and chat_a.bounds_M[i] - span_a.byte_start + span_a.content_byte_start
        == chat_b.bounds_M[j] - span_b.byte_start + span_b.content_byte_start
    ]
    num_inside = len(expected)
    got = list(zip(a_P.tolist(), b_P.tolist(), strict=True))
    assert got[:num_inside] == expected
    # The rest is one run of equal tokens that follows the reply and could not be longer.
    tail = got[num_inside:]
    for earlier, later in pairwise(tail):
        assert later == (earlier[0] + 1, earlier[1] + 1)
    if tail:
        i, j = tail[-1][0] + 1, tail[-1][1] + 1
        at_end = i == len(chat_a.ids_L) or j == len(chat_b.ids_L)
        assert at_end or chat_a.ids_L[i] != chat_b.ids_L[j]
        reply_end = chat_a.messages[-1].byte_end
        assert chat_a.bounds_M[tail[0][0] + 1] > reply_end >= chat_a.bounds_M[tail[0][0]]


MESSAGES = [system("be kind"), user("1?"), assistant("yes 1\n"), user("1?"), assistant("yes 1")]


def test_identical_renderings_pair_up_whole() -> None:
    chat_a, _, a_P, b_P = pairs_of(MESSAGES, CHATML, CHATML)
    assert positions_to_runs(a_P, b_P).tolist() == [[0, 0, len(chat_a.ids_L)]]
    assert a_P is not b_P


def test_contents_and_the_end_of_turn_pair_up() -> None:
    everything = "be kind1?yes 1\n1?yes 1<|im_end|>\n"
    assert paired_text(MESSAGES, CHATML, BOS_CHATML) == everything
    assert paired_text(MESSAGES, CHATML, THINKING) == everything
    assert paired_text(MESSAGES, CHATML, NO_LINE_FEED) == everything.removesuffix("\n")
    # Here the template's line feeds merge with the first reply's.
    assert paired_text(MESSAGES, CHATML, PLAIN_TAGS) == "be kind1?yes 11?yes 1"


def test_end_of_turn_pairs_up_behind_a_reply_that_one_side_trims() -> None:
    messages = [user("hi"), assistant(" yes 1 \t")]
    assert paired_text(messages, CHATML, TRIMMING).endswith("<|im_end|>\n")


def test_token_that_merges_reply_and_end_pairs_up_if_both_sides_merge() -> None:
    # ".\r\n" is one token; "." alone is another.
    merging = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\\r\\n' }}{% endfor %}"
    shifted = "{{ '<|mask|>' }}" + merging
    messages = [user("hi"), assistant("Yes.")]
    assert paired_text(messages, merging, shifted) == "hiYes.\r\n"
    assert paired_text(messages, merging, PLAIN_TAGS).startswith("hi")
    assert not paired_text(messages, merging, CHATML).endswith("\n")


def test_token_that_lies_in_the_reply_on_one_side_only_has_no_partner() -> None:
    # "\n\n": once the reply's and the template's line feed, once the template's alone.
    two_of_template = TRIMMING.replace("<|im_end|>\n", "\\n\\n")
    one_of_template = CHATML.replace("<|im_end|>\n", "\\n")
    messages = [user("hi"), assistant("q\n")]
    assert paired_text(messages, one_of_template, two_of_template) == "hiq"


def test_partners_of_the_student_are_found_through_the_rows_own_table() -> None:
    chat_a, _, a_P, b_P = pairs_of(MESSAGES, THINKING, BOS_CHATML)
    partner_L = teacher_partners(positions_to_runs(a_P, b_P), len(chat_a.ids_L))
    assert partner_L[a_P].tolist() == b_P.tolist()
    assert (partner_L >= 0).sum() == len(a_P)


def test_renderings_of_different_lengths_are_refused() -> None:
    one = render_chat(MESSAGES, byte_level(CHATML))
    other = render_chat(MESSAGES[1:], byte_level(CHATML))
    with pytest.raises(DataError, match="expected as many messages, got 5 and 4") as caught:
        align_positions(one, other)
    assert caught.value.reason == "bytes_differ"


@given(
    steps=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=30),
    start=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_runs_and_positions_are_the_same_pairs(steps, start) -> None:
    pairs = np.cumsum([start, *steps], axis=0)[: len(steps)].astype(np.int32).reshape(-1, 2)
    runs_R3 = positions_to_runs(pairs[:, 0], pairs[:, 1])
    assert runs_R3.dtype == np.int32 and runs_R3.shape[1] == 3
    a_P, b_P = runs_to_positions(runs_R3)
    assert a_P.dtype == b_P.dtype == np.int32
    assert a_P.tolist() == pairs[:, 0].tolist() and b_P.tolist() == pairs[:, 1].tolist()
    # As few runs as possible: no run continues the one before.
    ends = runs_R3[:-1, :2] + runs_R3[:-1, 2:]
    assert not (ends == runs_R3[1:, :2]).all(axis=1).any()


def test_runs_table() -> None:
    a_P, b_P = np.array([0, 1, 2, 5, 6, 7]), np.array([3, 4, 5, 8, 9, 11])
    assert positions_to_runs(a_P, b_P).tolist() == [[0, 3, 3], [5, 8, 2], [7, 11, 1]]
