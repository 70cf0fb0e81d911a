"""Noised rows packed end to end: only the tokens that a loss or another query needs.

A noised block without a masked position feeds no loss and no other block; a clean block is seen by
the blocks behind it alone, so those from a row's last live block on are seen by nobody who counts.
Both are left out, which changes neither logits nor gradients (a test holds them against the plain
layout [xt, x0] of 2 L positions). Rows lie behind each other without padding; where the kernel
wants whole tiles the last one is filled up, at most 127 tokens a batch.

Shapes: B rows, L positions, N packed tokens, P masked positions of all rows (row by row).
"""

from dataclasses import dataclass

import numpy as np

from stage2_student.aligned_rows import NoisedRows
from stage2_student.attention import TokenPlaces
from stage2_student.columns import BoolArray, Int64Array


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedRows:
    """`ids_N` and `position_N` int64; `masked_index_P` int64 into N; where each token comes from.

    `num_filled`: tokens at the end that are nobody's.
    """

    ids_N: Int64Array
    position_N: Int64Array
    masked_index_P: Int64Array
    places: TokenPlaces
    num_filled: int


def pack_rows(
    noised: NoisedRows, *, block_size: int, mask_token_id: int, tile: int = 1
) -> PackedRows:
    """Pack rows, clean tokens first, into a multiple of `tile` tokens, at least one.

    Where nothing is masked in any row the first token of the first row stays, so that there is
    something to run a forward on.
    """
    masked_BL = noised.masked_BL
    live_BL, clean_BL = _needed(noised, block_size)
    if not live_BL.any():
        clean_BL[0, 0] = True
    kept_B2L = np.stack([clean_BL, live_BL], axis=1)
    row_N, half_N, position_N = np.nonzero(kept_B2L)
    is_clean_N = half_N == 0
    ids_N = noised.ids_BL[row_N, position_N]
    is_masked_N = ~is_clean_N & masked_BL[row_N, position_N]
    num_filled = -len(row_N) % tile
    return PackedRows(
        ids_N=np.pad(np.where(is_masked_N, mask_token_id, ids_N), (0, num_filled)),
        position_N=np.pad(position_N, (0, num_filled)),
        masked_index_P=np.flatnonzero(is_masked_N),
        places=TokenPlaces(
            row_N=np.pad(row_N, (0, num_filled), constant_values=-1),
            block_N=np.concatenate([position_N // block_size, np.arange(num_filled)]),
            is_clean_N=np.pad(is_clean_N, (0, num_filled)),
            num_clean_B=clean_BL.sum(axis=1),
            num_noised_B=live_BL.sum(axis=1),
        ),
        num_filled=num_filled,
    )


def _needed(noised: NoisedRows, block_size: int) -> tuple[BoolArray, BoolArray]:
    """Say which noised and which clean positions anybody needs, bool (B, L) each."""
    num_rows, num_positions = noised.masked_BL.shape
    num_blocks = -(-num_positions // block_size)
    padded_BL = np.zeros((num_rows, num_blocks * block_size), dtype=bool)
    padded_BL[:, :num_positions] = noised.masked_BL
    live_BK = padded_BL.reshape(num_rows, num_blocks, block_size).any(axis=2)
    # Blocks before the last live one.
    is_before_BK = np.flip(np.flip(live_BK, axis=1).cumsum(axis=1), axis=1) - live_BK > 0
    real_BL = np.arange(num_positions) < noised.length_B[:, None]
    live_BL, clean_BL = (
        np.repeat(wanted_BK, block_size, axis=1)[:, :num_positions] & real_BL
        for wanted_BK in (live_BK, is_before_BK)
    )
    return live_BL, clean_BL
