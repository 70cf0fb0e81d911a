"""What every sampler asks of its caller and of the model before it starts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tide_cache.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM


def check_batch_size(batch_size: int) -> None:
    """Raise ConfigError unless at least one prompt fits a batch."""
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, got {batch_size}")


def check_numbers(prompt_numbers: Sequence[int] | None, num_prompts: int) -> None:
    """Raise ConfigError unless there is a number for each prompt, or none at all."""
    if prompt_numbers is not None and len(prompt_numbers) != num_prompts:
        raise ConfigError(
            f"prompt_numbers: expected {num_prompts}, one a prompt, got {len(prompt_numbers)}"
        )


def check_prompts(
    prompts: Sequence[Sequence[int]], *, max_length: int, max_new_tokens: int
) -> None:
    """Raise DataError, naming the prompt, where one is empty or leaves no room for an answer."""
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise DataError(f"prompts[{index}]: expected at least one token, got none")
        if len(prompt) + max_new_tokens > max_length:
            raise DataError(
                f"prompts[{index}]: {len(prompt)} tokens and {max_new_tokens} new ones are more "
                f"than the model's {max_length} positions (max_position_embeddings)",
                hint="shorten the prompt, or ask for fewer new tokens",
            )


@contextmanager
def evaluating(model: "Qwen3ForCausalLM") -> Iterator[None]:
    """Switch dropout off, and restore the model's mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
