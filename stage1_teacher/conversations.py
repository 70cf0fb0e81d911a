"""From a row of a chat data set to a conversation: its messages, or the reason why it has none.

Two layouts are read: one column of messages (`role`/`content`, or ShareGPT's `from`/`value`) and
named prompt and response columns. Every text is normalised to NFC here, once, because Qwen3's
tokenizer normalises too and byte alignment would otherwise fail on 1% of real texts. A row that
cannot be used is never repaired by guessing: it becomes `Dropped`, and prepare counts the reasons.
"""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from stage1_teacher.mixture import SourceConfig
from tide_cache.canonical import canonical_json
from tide_cache.errors import ConfigError, DataError, did_you_mean

DROP_REASONS: Mapping[str, str] = {
    "no_messages": "the messages are missing or empty",
    "messages_not_a_list": "the messages are no list of mappings",
    "unsupported_role": "a role other than system, user or assistant",
    "tool_calls": "a message calls tools",
    "content_null": "a message, prompt or response is null",
    "content_parts": "a content is a list of parts (images, files), not text",
    "content_not_text": "a content is neither text nor null",
    "content_invalid_unicode": "a text is not valid Unicode",
    "content_blank": "a user or assistant message is empty or only spaces",
    "no_user_turn": "no message of the user",
    "no_assistant_turn": "no message of the assistant",
    "last_turn_not_assistant": "the last message is not the assistant's",
}
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_MESSAGES_COLUMNS = ("messages", "conversations")
_PAIRS = (
    ("prompt", None, "response"),
    ("question", None, "answer"),
    ("instruction", "input", "output"),
    ("prompt", None, "completion"),
)
_SYSTEM_COLUMNS = ("system", "system_prompt")


class Message(TypedDict):
    """One message as chat templates take it; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Messages in NFC, at least one of the user, ending with one of the assistant."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """A row that cannot be used; `reason` is a key of `DROP_REASONS`."""

    reason: str


def sample_id(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the identity of a conversation: 32 hex digits that depend on roles and texts alone.

    blake2b-16 over the canonical JSON of the messages, texts in NFC.
    """
    content = [{"role": m["role"], "content": _nfc(m["content"])} for m in messages]
    return hashlib.blake2b(canonical_json(content), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class MessagesLayout:
    """Rows with one column of messages."""

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read."""
        return (self.column,)

    def describe(self) -> str:
        """Return the layout for log and manifest."""
        return f"messages in {self.column!r}"

    def read(self, row: Mapping[str, Any]) -> Conversation | Dropped:
        """Return the conversation of one row, or why there is none."""
        turns = row[self.column]
        if not turns:
            return Dropped(reason="no_messages")
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            return Dropped(reason="messages_not_a_list")
        return _conversation([_turn(turn) for turn in turns])


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLayout:
    """Rows with a prompt column and a response column.

    `input` is text that belongs to the prompt and follows it after a blank line; `system` is a
    system prompt. Both may be null or blank in a row: then the row has none.
    """

    prompt: str
    response: str
    input: str | None = None
    system: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read."""
        names = (self.system, self.prompt, self.input, self.response)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def describe(self) -> str:
        """Return the layout for log and manifest."""
        parts = {
            "prompt": self.prompt,
            "input": self.input,
            "response": self.response,
            "system": self.system,
        }
        return ", ".join(f"{part} in {name!r}" for part, name in parts.items() if name)

    def read(self, row: Mapping[str, Any]) -> Conversation | Dropped:
        """Return the conversation of one row, or why there is none."""
        prompt, response = row[self.prompt], row[self.response]
        if self.input is not None and not _is_absent(row[self.input]):
            if (problem := _text_problem(prompt) or _text_problem(row[self.input])) is not None:
                return Dropped(reason=problem)
            prompt = f"{prompt}\n\n{row[self.input]}"
        turns = [("user", prompt), ("assistant", response)]
        if self.system is not None and not _is_absent(row[self.system]):
            turns.insert(0, ("system", row[self.system]))
        return _conversation(turns)


Layout = MessagesLayout | PairLayout


def choose_layout(config: SourceConfig, columns: Sequence[str]) -> Layout:
    """Decide how rows with these columns become conversations.

    Named columns are taken as named. Otherwise a column `messages` or `conversations` comes first,
    then the pairs prompt/response, question/answer, instruction(+input)/output, prompt/completion,
    with `system` or `system_prompt` where present. Raises ConfigError for a named column that is
    missing, DataError if nothing is found or two pairs are.
    """
    if config.messages_column is not None:
        _check_named(config, "messages_column", columns)
        return MessagesLayout(column=config.messages_column)
    if config.prompt_column is not None and config.response_column is not None:
        for field in ("prompt_column", "input_column", "response_column", "system_column"):
            _check_named(config, field, columns)
        return PairLayout(
            prompt=config.prompt_column,
            input=config.input_column,
            response=config.response_column,
            system=config.system_column,
        )
    return _detect_layout(config, columns)


def text_columns(config: SourceConfig) -> tuple[str, ...]:
    """Return every column that could hold text of a conversation, whether it exists or not."""
    named = (
        config.prompt_column,
        config.input_column,
        config.response_column,
        config.system_column,
    )
    usual = (name for pair in _PAIRS for name in pair)
    return tuple(dict.fromkeys(n for n in (*named, *usual, *_SYSTEM_COLUMNS) if n is not None))


def _check_named(config: SourceConfig, field: str, columns: Sequence[str]) -> None:
    name = getattr(config, field)
    if name is not None and name not in columns:
        raise ConfigError(
            f"{config.path}: {field}: no column {name!r}{did_you_mean(name, columns)}",
            hint=f"columns: {', '.join(columns)}",
        )


def _detect_layout(config: SourceConfig, columns: Sequence[str]) -> Layout:
    for name in _MESSAGES_COLUMNS:
        if name in columns:
            return MessagesLayout(column=name)
    pairs = [pair for pair in _PAIRS if pair[0] in columns and pair[2] in columns]
    if len(pairs) != 1:
        found = ", ".join(f"{prompt}/{response}" for prompt, _, response in pairs)
        raise DataError(
            f"{config.path}: expected one pair of chat columns, found {found or 'none'}"
            f" among {', '.join(columns)}",
            hint="name them: messages_column, or prompt_column and response_column",
            reason="no_chat_columns",
        )
    prompt, extra, response = pairs[0]
    system = next((name for name in _SYSTEM_COLUMNS if name in columns), None)
    return PairLayout(
        prompt=prompt,
        response=response,
        input=extra if extra in columns else None,
        system=system,
    )


def _turn(turn: Mapping[str, Any]) -> tuple[Any, Any] | Dropped:
    if turn.get("tool_calls") or turn.get("function_call"):
        return Dropped(reason="tool_calls")
    # Arrow gives every message all keys that any message has: an absent key reads as null.
    if turn.get("role") is not None:
        return turn["role"], turn.get("content")
    return turn.get("from"), turn.get("value")


def _conversation(turns: Sequence[tuple[Any, Any] | Dropped]) -> Conversation | Dropped:
    messages: list[Message] = []
    for turn in turns:
        message = turn if isinstance(turn, Dropped) else _message(*turn)
        if isinstance(message, Dropped):
            return message
        if message["content"].strip():
            messages.append(message)
        elif message["role"] != "system":  # an empty system prompt is none
            return Dropped(reason="content_blank")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return Dropped(reason="no_assistant_turn")
    if "user" not in roles:
        return Dropped(reason="no_user_turn")
    if roles[-1] != "assistant":
        return Dropped(reason="last_turn_not_assistant")
    return Conversation(messages=tuple(messages))


def _message(role: Any, content: Any) -> Message | Dropped:
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        return Dropped(reason="unsupported_role")
    if (problem := _text_problem(content)) is not None:
        return Dropped(reason=problem)
    return Message(role=known, content=_nfc(content))


def _text_problem(content: Any) -> str | None:
    if content is None:
        return "content_null"
    if isinstance(content, list):
        return "content_parts"
    if not isinstance(content, str):
        return "content_not_text"
    try:
        content.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        return "content_invalid_unicode"
    return None


def _is_absent(text: Any) -> bool:
    return text is None or (isinstance(text, str) and not text.strip())


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
