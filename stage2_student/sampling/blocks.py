"""The geometry of generation: which blocks there are, who sees whom, how many masks a step commits.

Pure functions of lengths. Blocks are counted from the prompt's end, as the published sampler does:
where the prompt's length is no multiple of the block size it is the prompt's *first* block that is
short, and generation starts on a boundary. Training counts from the first position;
`sequence_start` generates in that geometry, so that the first new block completes the prompt's last
one, whose prompt tokens see the new ones and are computed again with them.

Shapes: L positions so far.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

BlockOrigin = Literal["prompt_end", "sequence_start"]


def block_bounds(
    prompt_length: int, max_new_tokens: int, block_size: int, block_origin: BlockOrigin
) -> list[tuple[int, int]]:
    """Return (start, end) of the blocks to generate, in positions of prompt + new tokens."""
    end = prompt_length + max_new_tokens
    first = first_block_start(prompt_length, block_size, block_origin)
    starts = range(first, end, block_size)
    return [(max(s, prompt_length), min(s + block_size, end)) for s in starts]


def first_block_start(prompt_length: int, block_size: int, block_origin: BlockOrigin) -> int:
    """Return where the block of the first new token begins: at the prompt's end or before it."""
    return prompt_length - (prompt_length % block_size if block_origin == "sequence_start" else 0)


def staircase_mask(num_positions: int, block_size: int, offset: int) -> Tensor:
    """Build the bool (L, L) mask of generation: each position sees its own and earlier blocks.

    `offset` positions are missing from the first block. Rows are queries. It is the clean half of
    `tide_cache.geometry.block_diffusion_mask`: committed tokens are clean, and the block at work
    sees the blocks before it and itself.
    """
    block_L = (torch.arange(num_positions) + offset) // block_size
    return block_L[None, :] <= block_L[:, None]


def reveal_counts(num_masked: int, num_steps: int) -> tuple[int, ...]:
    """Plan how many of `num_masked` positions each forward commits, over at most `num_steps`.

    With r steps left a share 1/r of what is still masked is committed, rounded half to even; steps
    that would commit nothing are left out. The counts add up to `num_masked`. The share is formed
    in float32 in the published order of operations: at a tie its rounding error decides (32 in 5
    steps), and only so do the steps agree.
    """
    one = np.float32(1)
    counts: list[int] = []
    for steps_left in range(num_steps, 0, -1):
        now = one - (one - np.float32(steps_left / num_steps))
        after = one - (one - np.float32((steps_left - 1) / num_steps))
        share = 1.0 - float(after / now)
        counts.append(min(round(num_masked * share), num_masked))
        num_masked -= counts[-1]
    return tuple(count for count in counts if count)


def cut_at_eos(new_ids: Sequence[int], eos_token_id: int) -> list[int]:
    """Return the ids before the first `eos_token_id`, or all of them if there is none."""
    ids = list(new_ids)
    return ids[: ids.index(eos_token_id)] if eos_token_id in ids else ids
