"""What a terminal shows while text is generated: finished blocks as they come, or each denoising.

`StreamedText` writes what can no longer change. `DenoisingView` redraws the whole answer after each
forward, with masks as they become tokens. `AnswerProgress` counts prompts, on stderr.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from stage2_student.sampler import DenoisingStep
from stage2_student.sampling.blocks import cut_at_eos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MASK = "░"
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how a tokenizer spells half a character
_LINE_INTERVAL_S = 10.0
Decode = Callable[[list[int]], str]


def decoder(tokenizer: "PreTrainedTokenizerBase", eos_token_id: int | None) -> Decode:
    """Return the function from new ids to text: up to EOS, control tokens left out."""

    def decode(ids: list[int]) -> str:
        kept = ids if eos_token_id is None else cut_at_eos(ids, eos_token_id)
        text: str = tokenizer.decode(kept, skip_special_tokens=True)
        return text

    return decode


class StreamedText:
    """Writes the text of finished blocks, once each."""

    def __init__(self, decode: Decode, output: TextIO) -> None:
        self._decode = decode
        self._output = output
        self._written = ""

    def __call__(self, step: DenoisingStep) -> None:
        """Write what a finished block adds."""
        if not step.is_block_finished:
            return
        text = self._decode(step.ids).rstrip(_UNFINISHED)
        if text.startswith(self._written):
            self._output.write(text[len(self._written) :])
            self._output.flush()
            self._written = text

    def finish(self, text: str) -> None:
        """Write what is left of the answer, and end the line."""
        self._output.write(text.removeprefix(self._written) + "\n")


class DenoisingView:
    """A live picture of one answer: committed now bold green, in this block cyan, masks dim."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", mask_token_id: int, console: Console
    ) -> None:
        self._tokenizer = tokenizer
        self._mask_token_id = mask_token_id
        self._before: list[int] = []
        self._num_forwards = 0
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="visible")

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def __call__(self, step: DenoisingStep) -> None:
        """Draw the answer as it is now."""
        self._num_forwards += 1
        self._live.update(self.picture(step), refresh=True)
        self._before = step.ids

    def picture(self, step: DenoisingStep) -> Text:
        """Return the answer so far, coloured, and a line of figures."""
        text = Text(self._tokenizer.decode(step.ids[: step.block_start]))
        for index in range(step.block_start, len(step.ids)):
            token_id = step.ids[index]
            if token_id == self._mask_token_id:
                text.append(_MASK, style="dim")
                continue
            was = self._before[index] if index < len(self._before) else self._mask_token_id
            style = "bold green" if was == self._mask_token_id else "cyan"
            text.append(self._tokenizer.decode([token_id]), style=style)
        num_masks = step.ids[step.block_start :].count(self._mask_token_id)
        text.append(f"\n\nforward {self._num_forwards}, {num_masks} masks left", style="dim")
        return text


class AnswerProgress:
    """Prompts answered: a bar on a terminal, otherwise a line every ten seconds."""

    def __init__(self, num_prompts: int, num_done: int) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._num_prompts, self._num_done = num_prompts, num_done
        self._said_s = time.monotonic()
        self._bar = Progress(
            TextColumn("generate"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("generate", total=num_prompts, completed=num_done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, num_answers: int) -> None:
        """Say that so many more prompts have their answers."""
        self._num_done += num_answers
        self._bar.update(self._task, completed=self._num_done)
        now_s = time.monotonic()
        if not self._console.is_terminal and now_s - self._said_s >= _LINE_INTERVAL_S:
            self._said_s = now_s
            self._console.print(f"generate: {self._num_done} of {self._num_prompts} prompts")
