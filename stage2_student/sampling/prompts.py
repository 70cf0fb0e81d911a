"""What is asked: prompts from a command line, a file or a pipe, as the student's token ids."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tide_cache.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMPTY_THINK_BLOCK = "<think>\n\n</think>\n\n"
Message = dict[str, str]


def read_prompts(path: Path) -> list[list[Message]]:
    """Read a file of prompts, one a line, each as a conversation.

    In a `.jsonl` file a line is a string, an object with `prompt`, or one with `messages`; in any
    other it is the prompt itself. Empty lines are left out. Raises ConfigError for a file that
    cannot be read, DataError for a line that cannot.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read it ({error})") from error
    is_json = path.suffix == ".jsonl"
    return [
        _parse(line, f"{path}: line {number}") if is_json else as_conversation(line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def read_stdin() -> list[Message]:
    """Read one prompt from a pipe. Raises ConfigError where there is none."""
    if sys.stdin.isatty() or not (text := sys.stdin.read().strip("\n")):
        raise ConfigError(
            "PROMPT: expected a prompt, got none",
            hint="give it as an argument, through a pipe, or many in a file with --prompts",
        )
    return as_conversation(text)


def as_conversation(text: str) -> list[Message]:
    """Return a user's single turn."""
    return [{"role": "user", "content": text}]


def check_chat_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ConfigError where the tokenizer cannot render a conversation."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            "tokenizer: expected a chat template, got none",
            hint="generate from the text as it is with --raw",
        )


def render(
    tokenizer: "PreTrainedTokenizerBase",
    conversation: Sequence[Message],
    *,
    is_raw: bool,
    has_empty_think_block: bool,
) -> list[int]:
    """Return a prompt's token ids: through the chat template, or raw the contents as they are.

    `has_empty_think_block` appends what the published evaluation appends, so that a student of
    Qwen3 answers without thinking. Raises DataError where the template refuses.
    """
    if is_raw:
        text = "".join(message["content"] for message in conversation)
    else:
        try:
            text = tokenizer.apply_chat_template(
                list(conversation), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise whatever they like
            raise DataError(f"the chat template refuses the conversation: {error}") from error
    if has_empty_think_block:
        text += EMPTY_THINK_BLOCK
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _parse(line: str, where: str) -> list[Message]:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if isinstance(value, str):
        return as_conversation(value)
    if isinstance(value, dict) and isinstance(value.get("prompt"), str):
        return as_conversation(value["prompt"])
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise DataError(
            f"{where}: expected a string, or an object with 'prompt' (a text) or 'messages' (each "
            f"with the texts 'role' and 'content'), got {line[:80]!r}"
        )
    return messages


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) for name in ("role", "content")
    )
