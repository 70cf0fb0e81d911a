import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage1_teacher.chat import REFUSALS, render_chat
from stage1_teacher.token_bytes import token_bytes
from tests.small_tokenizers import (
    CHATML,
    EXPECTED_TEXT,
    PLAIN_TAGS,
    THINKING,
    TRIMMING,
    byte_level,
    lower_casing,
    meta_space,
)
from tide_cache.errors import ConfigError, DataError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def contents_of(chat):
    return [chat.text[span.char_start : span.char_end] for span in chat.messages]


def labelled_text(chat, tokenizer):
    return token_bytes(tokenizer).spell(chat.ids_L[chat.prompt_length :].tolist()).decode()


FRAGMENTS = st.sampled_from(
    [
        *("1", "\n", "\n\n", " ", "\r\n", "\t", "user", "assistant", "[user]"),
        *("e\u0301", "\u0338", "\u1112\u1161", "日本", "🙂", "👩\u200d👩\u200d👧"),
        *("<|im_end|>", "<|im_start|>user\n", "\ue000", "\ue001"),
    ]
)
# Unassigned characters are left out: what NFC makes of them depends on the Unicode version.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
CONTENT = st.lists(FRAGMENTS | st.text(CHARACTERS, max_size=6), max_size=5).map("".join)


@st.composite
def conversations(draw):
    """Turns of any roles whose last is a reply that is not blank."""
    roles = draw(st.lists(st.sampled_from(["system", "user", "assistant"]), max_size=4))
    turns = [(role, draw(CONTENT)) for role in roles]
    return [*turns, ("assistant", draw(CONTENT.filter(str.strip)))]


@settings(deadline=None, max_examples=150)
@given(template=st.sampled_from(list(EXPECTED_TEXT)), turns=conversations())
def test_text_spans_and_bounds_are_those_of_the_template(template: str, turns) -> None:
    tokenizer = byte_level(template)
    chat = render_chat([{"role": role, "content": text} for role, text in turns], tokenizer)
    normal = [(role, unicodedata.normalize("NFC", text)) for role, text in turns]
    text = ""
    for (role, _), span, piece in zip(
        normal, chat.messages, EXPECTED_TEXT[template](normal), strict=True
    ):
        before, shown, after = piece
        text += before
        assert span.role == role
        if shown.strip() or template != TRIMMING:
            assert (span.char_start, span.char_end) == (len(text), len(text) + len(shown))
            assert span.byte_start == len(text.encode())
            assert span.byte_end == len((text + shown).encode())
        text += shown + after
    assert chat.text == text
    assert token_bytes(tokenizer).spell(chat.ids_L.tolist()) == text.encode()
    pieces = [token_bytes(tokenizer).pieces[token] for token in chat.ids_L.tolist()]
    assert chat.bounds_M.tolist() == [len(b"".join(pieces[:i])) for i in range(len(pieces) + 1)]
    assert chat.ids_L.dtype == np.int32


def test_parts_that_a_template_trims_are_counted_in_bytes() -> None:
    chat = render_chat([user("\u2003é "), assistant(" 1\n")], byte_level(TRIMMING))
    first, reply = chat.messages
    assert contents_of(chat) == ["é", "1"]
    assert (first.content_byte_start, first.content_byte_end, first.num_content_bytes) == (3, 5, 6)
    assert (reply.content_byte_start, reply.content_byte_end, reply.num_content_bytes) == (1, 2, 3)


def test_short_answers_are_found_in_their_own_message() -> None:
    messages = [system("Answer 1 or 2."), user("1"), assistant("1"), user("1"), assistant("1")]
    chat = render_chat(messages, byte_level(CHATML))
    before = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages[:-1])
    assert contents_of(chat) == [m["content"] for m in messages]
    assert chat.messages[-1].char_start == len(before) + len("<|im_start|>assistant\n")


def test_contents_are_normalised_to_nfc() -> None:
    chat = render_chat([user("e\u0301"), assistant("\u1112\u1161\u11ab")], byte_level(CHATML))
    assert contents_of(chat) == ["é", "한"]


def test_ids_are_those_of_the_chat_template() -> None:
    for tokenizer in (byte_level(THINKING), byte_level(CHATML), meta_space(CHATML)):
        messages = [user("hi\n"), assistant("\nSure!\n"), user("é🙂"), assistant("<|im_end|>\n1")]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert render_chat(messages, tokenizer).ids_L.tolist() == ids


class TestLabelledPart:
    def test_runs_from_the_generation_prompt_to_the_end(self) -> None:
        tokenizer = byte_level(CHATML)
        chat = render_chat([user("hi"), assistant("yes")], tokenizer)
        assert chat.prompt_edge == "generation_prompt"
        assert labelled_text(chat, tokenizer) == "yes<|im_end|>\n"

    def test_holds_what_the_template_puts_before_the_reply(self) -> None:
        tokenizer = byte_level(THINKING)
        chat = render_chat([user("hi"), assistant("yes")], tokenizer)
        assert labelled_text(chat, tokenizer) == "<think>\n\n</think>\n\nyes<|im_end|>\n"

    def test_template_kwargs_reach_the_generation_prompt(self) -> None:
        tokenizer = byte_level(THINKING)
        chat = render_chat(
            [user("hi"), assistant("yes")], tokenizer, template_kwargs={"enable_thinking": False}
        )
        assert chat.prompt_edge == "generation_prompt"
        assert labelled_text(chat, tokenizer) == "yes<|im_end|>\n"

    def test_a_token_across_the_edge_belongs_to_the_prompt(self) -> None:
        tokenizer = byte_level(CHATML)
        chat = render_chat([user("hi"), assistant("\nSure!\n\nOK")], tokenizer)
        across = chat.ids_L[chat.prompt_length - 1]
        assert token_bytes(tokenizer).pieces[across] == b"assistant\n\nSure!\n\n"
        assert labelled_text(chat, tokenizer) == "OK<|im_end|>\n"

    def test_begins_at_the_content_where_the_prompt_is_no_prefix(self) -> None:
        template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>bot\n'")
        tokenizer = byte_level(template)
        chat = render_chat([user("hi"), assistant("yes")], tokenizer)
        assert chat.prompt_edge == "content"
        assert labelled_text(chat, tokenizer) == "yes<|im_end|>\n"

    def test_may_begin_inside_the_content(self) -> None:
        # The template opens the think block that the reply opens as well.
        template = CHATML.replace("assistant\n'", "assistant\n<think>'")
        tokenizer = byte_level(template)
        chat = render_chat([user("hi"), assistant("<think>1</think>2")], tokenizer)
        assert contents_of(chat)[-1] == "<think>1</think>2"
        assert labelled_text(chat, tokenizer) == "1</think>2<|im_end|>\n"

    def test_a_reply_alone_begins_at_its_content(self) -> None:
        tokenizer = byte_level(CHATML)
        chat = render_chat([assistant("yes")], tokenizer)
        assert chat.prompt_edge == "content"
        assert labelled_text(chat, tokenizer) == "yes<|im_end|>\n"

    def test_template_that_cannot_render_the_prompt_alone(self) -> None:
        template = (
            "{% if messages[-1].role != 'assistant' %}{{ raise_exception('no reply') }}{% endif %}"
            + CHATML
        )
        chat = render_chat([user("hi"), assistant("yes")], byte_level(template))
        assert chat.prompt_edge == "content"

    def test_reply_inside_the_prompts_last_token_is_refused(self) -> None:
        # "assistant\n\nSure!\n\n" is one token of the small vocabulary.
        template = "{% for m in messages %}{{ m.role + '\n' + m.content }}{% endfor %}" + (
            "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
        )
        with pytest.raises(DataError, match="the reply is part of the prompt's last token") as e:
            render_chat([user("hi"), assistant("\nSure!\n\n")], byte_level(template))
        assert e.value.reason == "no_labelled_token"


class TestThinkBlocks:
    def test_are_cut_from_earlier_replies_and_kept_in_the_last(self) -> None:
        think = "<think>\nwhy 1\n</think>\n\n1"
        messages = [user("1"), assistant(think), user("1"), assistant(think)]
        chat = render_chat(messages, byte_level(THINKING))
        # The last block's opening tag is the template's own, whatever the reply said.
        assert contents_of(chat) == ["1", "1", "1", "why 1\n</think>\n\n1"]
        assert chat.messages[1].content_byte_start == think.index("</think>") + len("</think>\n\n")

    def test_rewritten_block_leaves_the_answer(self) -> None:
        messages = [user("1"), assistant("<think>why</think>1\n")]
        chat = render_chat(messages, byte_level(THINKING))
        assert "<think>\nwhy\n</think>\n\n1\n<|im_end|>" in chat.text
        assert contents_of(chat) == ["1", "1\n"]

    def test_line_feeds_that_the_template_trims_are_not_its_own(self) -> None:
        chat = render_chat([user("1"), assistant("\n\n yes\n")], byte_level(THINKING))
        reply = chat.messages[-1]
        assert contents_of(chat)[-1] == " yes\n"
        assert reply.content_byte_start == 2


class TestTrailingMessages:
    def test_user_turns_are_cut_and_counted(self) -> None:
        tokenizer = byte_level(CHATML)
        messages = [user("hi"), assistant("yes"), user("thanks"), user("bye")]
        chat = render_chat(messages, tokenizer)
        whole = render_chat(messages[:2], tokenizer)
        assert (chat.num_turns_cut, whole.num_turns_cut) == (2, 0)
        assert chat.ids_L.tolist() == whole.ids_L.tolist()

    def test_other_turns_are_refused(self) -> None:
        with pytest.raises(DataError, match="got user, tool behind it") as caught:
            render_chat(
                [assistant("yes"), user("x"), {"role": "tool", "content": "1"}], byte_level(CHATML)
            )
        assert caught.value.reason == "trailing_messages"
        assert "message" in str(caught.value) and "only user turns are cut" in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "reason", "text"),
    [
        ([], "no_assistant_turn", "conversation of 0 messages: expected one with role 'assistant'"),
        ([user("hi")], "no_assistant_turn", r"got roles \['user'\]; rename the roles"),
        ([user("hi"), assistant("")], "empty_reply", "message 2 of 2: expected a reply, got a bl"),
        ([user("hi"), assistant(" \n"), user("?")], "empty_reply", "message 2 of 3"),
        (["hi"], "bad_message", "message 1 of 1: expected a mapping with .*, got str"),
        ([{"role": "user"}], "bad_message", "message 1 of 1: content: expected a text, got NoneT"),
        ([user([{"text": "x"}])], "bad_message", "content: expected a text, got list; flatten"),
        ([{"content": "x"}], "bad_message", "message 1 of 1: role: expected a text, got NoneType"),
        ([user("\ud83d"), assistant("x")], "invalid_unicode", "message 1 of 2: .* half of a surr"),
    ],
)
def test_unusable_conversations_are_refused(messages, reason: str, text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        render_chat(messages, byte_level(CHATML))
    assert caught.value.reason == reason
    assert reason in REFUSALS


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            CHATML.replace("in messages %}", "in messages if m.role != 'system' %}"),
            "content_dropped",
        ),
        (CHATML.replace("m.content", "m.content + m.content"), "content_repeated"),
        (CHATML.replace("m.content", "m.content | upper"), "content_rewritten"),
        (CHATML.replace("in messages", "in messages | reverse"), "content_reordered"),
        ("{{ raise_exception('no system here') }}", "template_refused"),
        ("{{ messages[7].content }}", "template_refused"),
    ],
)
def test_templates_that_cannot_be_measured_are_refused(template: str, reason: str) -> None:
    messages = [system("be kind"), user("hi"), assistant("yes")]
    with pytest.raises(DataError) as caught:
        render_chat(messages, byte_level(template))
    assert caught.value.reason == reason
    assert reason in REFUSALS


def test_template_errors_are_passed_on() -> None:
    tokenizer = byte_level("{{ raise_exception('no system here') }}")
    tokenizer.name_or_path = "some/model"
    with pytest.raises(DataError) as caught:
        render_chat([user("hi"), assistant("yes")], tokenizer)
    assert (
        "conversation (user, assistant): the chat template of 'some/model' refuses it: no"
        in str(caught.value)
    )


def test_a_tokenizer_without_template_is_a_config_error() -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"expected a chat_template, got none; put chat_template"):
        render_chat([user("hi"), assistant("yes")], tokenizer)


def test_a_tokenizer_that_rewrites_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        render_chat([user("Hi"), assistant("yes")], lower_casing(CHATML))
    assert caught.value.reason == "bytes_differ"


def test_a_tokenizer_that_normalises_across_the_edge_is_refused() -> None:
    # ">" and a combining stroke become one character; its bytes belong to neither.
    template = "{% for m in messages %}{{ '<r>' + m.content }}{% endfor %}"
    messages = [user("\u0338"), assistant("yes")]
    assert render_chat(messages, byte_level(template)).text == "<r>\u0338<r>yes"
    with pytest.raises(DataError) as caught:
        render_chat(messages, byte_level(template, nfc=True))
    assert caught.value.reason == "bytes_differ"


def test_control_tokens_typed_by_a_user_keep_their_bytes() -> None:
    tokenizer = byte_level(CHATML)
    chat = render_chat([user("a<|im_end|>b"), assistant("<|im_start|>")], tokenizer)
    assert contents_of(chat) == ["a<|im_end|>b", "<|im_start|>"]
    assert chat.ids_L.tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3


def test_an_input_is_left_as_it_was() -> None:
    messages = [user("e\u0301"), assistant("yes"), user("bye")]
    render_chat(messages, byte_level(PLAIN_TAGS))
    assert messages == [user("e\u0301"), assistant("yes"), user("bye")]
