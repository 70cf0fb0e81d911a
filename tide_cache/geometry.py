"""Who attends to whom in block diffusion, as array code without torch.

A sequence of L positions is seen twice: clean (`x0`) and noised (`xt`), both with position ids
0..L-1, cut into blocks of `block_size`. A noised block sees itself and the earlier clean blocks; a
clean block sees itself and the earlier clean blocks. So clean queries never see noise, and noised
blocks never see each other. Teacher and student use the same predicate with the halves in another
order. Source: block diffusion (arXiv 2503.09573), TIDE section 3.
"""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from tide_cache.errors import ConfigError, did_you_mean

ConcatOrder = Literal["xt_x0", "x0_xt"]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.integer]


def block_visible(
    query_block: IntArray, key_block: IntArray, query_is_clean: BoolArray, key_is_clean: BoolArray
) -> BoolArray:
    """Say for broadcastable queries and keys whether the key is visible. Returns bool.

    `*_block` is the block index of the position, `*_is_clean` whether it lies in x0. Noised keys
    are visible to their own block of their own noised copy only; with several noised copies the
    caller must also compare copies (see `stage1_teacher.teachers.layouts`).
    """
    own_block = (query_block == key_block) & (query_is_clean == key_is_clean)
    earlier_clean = (key_block < query_block) & key_is_clean
    visible: BoolArray = own_block | earlier_clean
    return visible


def block_diffusion_mask(
    num_positions: int, block_size: int, concat_order: str = "xt_x0"
) -> BoolArray:
    """Build the attention mask of one clean and one noised copy of a sequence.

    Returns bool (2L, 2L), rows are queries, True means visible; L = `num_positions` need not be a
    multiple of `block_size`. `concat_order` says which half comes first.
    """
    if concat_order not in get_args(ConcatOrder):
        raise ConfigError(
            f"concat_order: expected one of {', '.join(get_args(ConcatOrder))}, got "
            f"{concat_order!r}{did_you_mean(str(concat_order), get_args(ConcatOrder))}"
        )
    if block_size < 1:
        raise ConfigError(f"block_size: expected a positive number of positions, got {block_size}")
    index_S = np.arange(2 * num_positions)
    second_half_S: BoolArray = np.asarray(index_S >= num_positions)
    is_clean_S: BoolArray = second_half_S if concat_order == "xt_x0" else ~second_half_S
    block_S = (index_S % max(num_positions, 1)) // block_size
    return block_visible(block_S[:, None], block_S[None], is_clean_S[:, None], is_clean_S[None])


def live_blocks(masked_L: BoolArray, block_size: int) -> BoolArray:
    """Say for each block whether it holds a masked position. Returns bool (ceil(L / block_size),).

    Noised blocks without one feed no loss and no other query and can be left out.
    """
    num_blocks = -(-len(masked_L) // block_size)
    padded = np.zeros(num_blocks * block_size, dtype=bool)
    padded[: len(masked_L)] = masked_L
    return np.asarray(padded.reshape(num_blocks, block_size).any(axis=1))
