"""What one asks of a sampler, and what it gives back."""

import math
from dataclasses import dataclass

from stage2_student.choices import check_choice
from stage2_student.sampling.blocks import BlockOrigin, block_bounds, cut_at_eos, reveal_counts
from tide_cache.errors import ConfigError

_HIGHEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """How to generate. Raises ConfigError, naming the field, where that cannot be followed.

    `num_steps` forwards are spread over the blocks, ceil(num_steps / number of blocks) each;
    default: as many as new tokens, one token a forward. `threshold` instead commits, at each
    forward, every mask whose token is likelier than it, and at least one (arXiv 2505.22618): the
    number of forwards is then up to the model. `temperature` 0 takes the likeliest token; above 0,
    tokens are drawn from `seed`. `cfg_scale` 0 is no guidance; above it each forward is run again
    on a prompt of masks, and logits move away from those by that factor (arXiv 2502.09992).
    """

    max_new_tokens: int
    num_steps: int | None = None
    block_size: int = 32
    temperature: float = 0.0
    cfg_scale: float = 0.0
    threshold: float | None = None
    seed: int = 0
    block_origin: BlockOrigin = "prompt_end"

    def __post_init__(self) -> None:
        for name in ("block_size", "max_new_tokens", "num_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        for name in ("temperature", "cfg_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ConfigError(
                f"threshold: expected a probability from 0 to 1, got {self.threshold}"
            )
        if self.threshold is not None and self.num_steps is not None:
            raise ConfigError(
                f"num_steps: expected none beside threshold, got {self.num_steps}",
                hint="with a threshold the model's confidence decides how many forwards there are",
            )
        if not 0 <= self.seed <= _HIGHEST_SEED:
            raise ConfigError(f"seed: expected 0 to 2**63 - 1, got {self.seed}")
        check_choice("block_origin", self.block_origin, BlockOrigin)

    def bounds(self, prompt_length: int) -> list[tuple[int, int]]:
        """Return (start, end) of the blocks after a prompt, in positions of prompt + new tokens."""
        return block_bounds(prompt_length, self.max_new_tokens, self.block_size, self.block_origin)

    def reveal_plan(self, num_masked: int, num_blocks: int) -> tuple[int, ...]:
        """Return how many masks each forward of a block commits.

        With a threshold it is at least one each, over at most `num_masked` forwards.
        """
        if self.threshold is not None:
            return (1,) * num_masked
        num_steps = self.max_new_tokens if self.num_steps is None else self.num_steps
        return reveal_counts(num_masked, math.ceil(num_steps / num_blocks))


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What followed one prompt, and what it cost.

    `ids` are all new ids, up to the end of the block of the first EOS token; `text_ids` are those
    before that token. `num_forwards` counts the forwards the prompt took part in, `num_positions`
    the positions that were computed for it: those of guidance's second run, too, but no padding, so
    that neither depends on the company in a batch.
    """

    ids: list[int]
    eos_token_id: int | None
    num_forwards: int
    num_positions: int

    @property
    def text_ids(self) -> list[int]:
        """The ids before the first EOS token, all where there is none."""
        return self.ids if self.eos_token_id is None else cut_at_eos(self.ids, self.eos_token_id)

    @property
    def is_stopped(self) -> bool:
        """Whether an EOS token ended it, and not the number of tokens."""
        return self.eos_token_id is not None and self.eos_token_id in self.ids
