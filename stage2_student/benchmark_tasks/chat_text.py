"""From messages to the text that the student continues, and from its tokens to an answer.

The published harness appends an empty think block to every prompt that does not hold one yet:
Qwen3's own way to say that the answer comes at once. Where a task prefills the beginning of the
answer (HumanEval, MBPP), Qwen3's chat template puts the block in front of that beginning, and so
does `render`, also for templates that know no think block. (The published code would append it
behind the beginning there; its comment says that it meant this.)
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_BLOCK = "<think>\n\n</think>\n\n"
_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)

Messages = Sequence[dict[str, str]]


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Messages,
    *,
    add_generation_prompt: bool,
    think_block: bool,
) -> str:
    """Return the prompt's text: chat template once, then the empty think block.

    Without `add_generation_prompt` the last message is the beginning of the answer and stays open.
    """
    if add_generation_prompt:
        text = _template(tokenizer, messages, add_generation_prompt=True)
        return text + THINK_BLOCK if think_block and THINK_BLOCK not in text else text
    text = _template(tokenizer, messages, continue_final_message=True)
    if not think_block or THINK_BLOCK in text:
        return text
    head = _template(tokenizer, messages[:-1], add_generation_prompt=True)
    if THINK_BLOCK not in head:
        head += THINK_BLOCK
    return head + messages[-1]["content"].lstrip("\n")


def cut_answer(text: str, until: Sequence[str]) -> str:
    """Return an answer without its thoughts, up to the first of the stop strings."""
    text = _THOUGHT.sub("", text)
    for stop in until:
        text = text.partition(stop)[0] if stop else text
    return text


def _template(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Messages,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    text = tokenizer.apply_chat_template(
        list(messages),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )
    assert isinstance(text, str)
    return text
