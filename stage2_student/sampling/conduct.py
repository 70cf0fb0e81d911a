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


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Raise DataError, naming the prompt, where one is empty."""
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise DataError(f"prompts[{index}]: expected at least one token, got none")


@contextmanager
def evaluating(model: "Qwen3ForCausalLM") -> Iterator[None]:
    """Switch dropout off, and restore the model's mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
