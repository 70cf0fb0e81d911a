"""Block-diffusion masks against a predicate written out by hand, and dead blocks."""

import numpy as np
import pytest

from tide_cache.errors import ConfigError
from tide_cache.geometry import block_diffusion_mask, live_blocks


def by_hand(num_positions: int, block_size: int, order: str) -> np.ndarray:
    mask = np.zeros((2 * num_positions, 2 * num_positions), dtype=bool)
    for query in range(2 * num_positions):
        for key in range(2 * num_positions):
            query_clean = (query < num_positions) == (order == "x0_xt")
            key_clean = (key < num_positions) == (order == "x0_xt")
            query_block = query % num_positions // block_size
            key_block = key % num_positions // block_size
            if query_clean:
                mask[query, key] = key_clean and key_block <= query_block
            elif key_clean:
                mask[query, key] = key_block < query_block
            else:
                mask[query, key] = key_block == query_block
    return mask


@pytest.mark.parametrize("order", ["xt_x0", "x0_xt"])
@pytest.mark.parametrize(("num_positions", "block_size"), [(8, 4), (10, 4), (5, 8), (6, 1), (1, 1)])
def test_mask_is_the_predicate(num_positions: int, block_size: int, order: str) -> None:
    mask = block_diffusion_mask(num_positions, block_size, order)
    np.testing.assert_array_equal(mask, by_hand(num_positions, block_size, order))


def test_zero_positions_give_an_empty_mask() -> None:
    assert block_diffusion_mask(0, 4).shape == (0, 0)


def test_a_wrong_order_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"concat_order.*'xt_xo'.*did you mean 'xt_x0'"):
        block_diffusion_mask(4, 2, "xt_xo")
    with pytest.raises(ConfigError, match=r"block_size.*got 0"):
        block_diffusion_mask(4, 0)


def test_live_blocks_are_those_with_a_masked_position() -> None:
    masked = np.array([0, 0, 1, 0, 0, 0, 0, 0, 0, 1], dtype=bool)
    np.testing.assert_array_equal(live_blocks(masked, 4), [True, False, True])
