"""Rows become conversations without guessing; whatever is not usable is dropped under its name."""

import hashlib
import unicodedata
from typing import Any

import pytest

from stage1_teacher.conversations import (
    DROP_REASONS,
    Conversation,
    Dropped,
    MessagesLayout,
    PairLayout,
    choose_layout,
    sample_id,
    text_columns,
)
from stage1_teacher.mixture import SourceConfig
from tide_cache.errors import ConfigError, DataError


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


def read_messages(messages: Any) -> Conversation | Dropped:
    return MessagesLayout(column="messages").read({"messages": messages})


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "no_messages"),
        ([], "no_messages"),
        ("hello", "messages_not_a_list"),
        ({"role": "user"}, "messages_not_a_list"),
        (["hello"], "messages_not_a_list"),
        ([user("q"), {"role": "tool", "content": "x"}, assistant("a")], "unsupported_role"),
        ([user("q"), {"content": "x"}], "unsupported_role"),
        ([user("q"), {"role": 3, "content": "x"}], "unsupported_role"),
        ([user("q"), assistant(None)], "content_null"),
        ([user("q"), {"role": "assistant"}], "content_null"),
        ([user([{"type": "text", "text": "q"}]), assistant("a")], "content_parts"),
        ([user(3), assistant("a")], "content_not_text"),
        ([user({"text": "q"}), assistant("a")], "content_not_text"),
        ([user("q\ud800"), assistant("a")], "content_invalid_unicode"),
        ([user(" \n"), assistant("a")], "content_blank"),
        ([user("q"), assistant("")], "content_blank"),
        ([user("q"), assistant("a") | {"tool_calls": [{"name": "f"}]}], "tool_calls"),
        ([user("q"), assistant(None) | {"function_call": {"name": "f"}}], "tool_calls"),
        ([user("q")], "no_assistant_turn"),
        ([system("s")], "no_assistant_turn"),
        ([system("s"), assistant("a")], "no_user_turn"),
        ([user("q"), assistant("a"), user("q")], "last_turn_not_assistant"),
    ],
)
def test_messages_that_cannot_be_used_are_dropped(messages: Any, reason: str) -> None:
    assert read_messages(messages) == Dropped(reason=reason)
    assert reason in DROP_REASONS


def test_messages_keep_their_text_in_nfc_and_lose_other_keys() -> None:
    turns = [system("s"), user("  Ou\u0301? \r\n") | {"name": "me"}, assistant("a"), user("b")]
    messages = [*turns, assistant("c") | {"tool_calls": None}]
    assert read_messages(messages) == Conversation(
        messages=(system("s"), user("  O\u00fa? \r\n"), assistant("a"), user("b"), assistant("c"))
    )


def test_an_empty_system_prompt_is_none() -> None:
    assert read_messages([system(" "), user("q"), assistant("a")]) == Conversation(
        messages=(user("q"), assistant("a"))
    )


def test_sharegpt_turns_are_mapped() -> None:
    turns = [("system", "s"), ("human", "q"), ("gpt", "a")]
    # Arrow gives every turn all keys that any turn has.
    rows = [{"from": role, "value": text, "role": None, "content": None} for role, text in turns]
    expected = Conversation(messages=(system("s"), user("q"), assistant("a")))
    assert read_messages(rows) == expected
    assert read_messages([{"from": role, "value": text} for role, text in turns]) == expected
    assert read_messages([{"from": "observation", "value": "x"}]) == Dropped(
        reason="unsupported_role"
    )


PAIR = PairLayout(prompt="p", input="i", response="r", system="s")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (("q", "more", "a", "s"), (system("s"), user("q\n\nmore"), assistant("a"))),
        (("q", "", "a", ""), (user("q"), assistant("a"))),
        (("q", None, "a", None), (user("q"), assistant("a"))),
        (("q", 3, "a", None), "content_not_text"),
        ((None, "more", "a", None), "content_null"),
        (("q", "", None, None), "content_null"),
        (("q", "", "a", ["s"]), "content_parts"),
        ((["q"], "", "a", None), "content_parts"),
        (("q", "", 42, None), "content_not_text"),
        (("q", "", " ", None), "content_blank"),
    ],
)
def test_pairs_become_two_or_three_messages(row: tuple[Any, ...], expected: Any) -> None:
    read = PAIR.read(dict(zip(("p", "i", "r", "s"), row, strict=True)))
    if isinstance(expected, str):
        assert read == Dropped(reason=expected)
    else:
        assert read == Conversation(messages=expected)


NOTHING = SourceConfig(path="d")


@pytest.mark.parametrize(
    ("config", "columns", "expected"),
    [
        (NOTHING, ["id", "messages"], MessagesLayout(column="messages")),
        (NOTHING, ["conversations", "id"], MessagesLayout(column="conversations")),
        (NOTHING, ["prompt", "response", "messages"], MessagesLayout(column="messages")),
        (NOTHING, ["prompt", "response"], PairLayout(prompt="prompt", response="response")),
        (NOTHING, ["question", "answer"], PairLayout(prompt="question", response="answer")),
        (
            NOTHING,
            ["instruction", "output", "system"],
            PairLayout(prompt="instruction", response="output", system="system"),
        ),
        (
            NOTHING,
            ["instruction", "input", "output"],
            PairLayout(prompt="instruction", input="input", response="output"),
        ),
        (NOTHING, ["prompt", "completion"], PairLayout(prompt="prompt", response="completion")),
        (
            SourceConfig(path="d", messages_column="chat"),
            ["messages", "chat"],
            MessagesLayout(column="chat"),
        ),
        (
            SourceConfig(path="d", prompt_column="text", response_column="code"),
            ["text", "code", "messages"],
            PairLayout(prompt="text", response="code"),
        ),
    ],
)
def test_the_layout_is_named_or_found(
    config: SourceConfig, columns: list[str], expected: MessagesLayout | PairLayout
) -> None:
    layout = choose_layout(config, columns)
    assert layout == expected
    assert set(layout.columns) <= set(columns)
    assert all(repr(column) in layout.describe() for column in layout.columns)


@pytest.mark.parametrize(
    ("config", "columns", "kind", "message"),
    [
        (
            NOTHING,
            ["text", "label"],
            DataError,
            "d: expected one pair of chat columns, found none among text, label; name them:",
        ),
        (
            NOTHING,
            ["prompt", "response", "completion"],
            DataError,
            "found prompt/response, prompt/completion",
        ),
        (
            SourceConfig(path="d", messages_column="mesages"),
            ["id", "messages"],
            ConfigError,
            "d: messages_column: no column 'mesages' (did you mean 'messages'?); columns: id,",
        ),
        (
            SourceConfig(path="d", prompt_column="q", response_column="b"),
            ["q", "a"],
            ConfigError,
            "d: response_column: no column 'b'; columns: q, a",
        ),
        (
            SourceConfig(path="d", prompt_column="q", response_column="a", input_column="inputs"),
            ["q", "a", "input"],
            ConfigError,
            "d: input_column: no column 'inputs' (did you mean 'input'?)",
        ),
    ],
)
def test_missing_and_ambiguous_columns_are_refused(
    config: SourceConfig, columns: list[str], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as error:
        choose_layout(config, columns)
    assert message in str(error.value)


def test_text_columns_are_all_that_may_hold_text() -> None:
    config = SourceConfig(path="d", prompt_column="my_q", response_column="my_a")
    assert {"my_q", "my_a", "answer", "output", "input", "system"} <= set(text_columns(config))


def test_the_sample_id_is_a_pinned_function_of_roles_and_texts() -> None:
    messages = [user("Où?"), assistant("Là.")]
    # Spelt out, because masks are drawn from it: another value would be another premasked set.
    spelt = '[{"content":"Où?","role":"user"},{"content":"Là.","role":"assistant"}]\n'.encode()
    assert sample_id(messages) == hashlib.blake2b(spelt, digest_size=16).hexdigest()
    nfd = [m | {"content": unicodedata.normalize("NFD", m["content"])} for m in messages]
    assert nfd != messages
    assert sample_id(nfd) == sample_id(messages)
    assert sample_id([m | {"extra": 1} for m in messages]) == sample_id(messages)


@pytest.mark.parametrize(
    "other",
    [
        [user("Où?"), assistant("Là")],
        [user("Où?"), user("Là.")],
        [assistant("Là."), user("Où?")],
        [user("Où?Là."), assistant("")],
        [user("Où?")],
    ],
)
def test_the_sample_id_tells_conversations_apart(other: list[dict[str, str]]) -> None:
    assert sample_id(other) != sample_id([user("Où?"), assistant("Là.")])
