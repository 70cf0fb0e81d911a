"""The student's attention masks: block diffusion over [xt, x0], built once per shape and kept.

Qwen3's own classes take an explicit mask: a bool tensor for sdpa, a BlockMask for flex_attention
(which skips the three quarters of the square that nobody sees; compiled, so for GPUs). Rows that
fill whole blocks share one mask whatever their length, because padding behind them forms blocks of
its own that no real position sees. A row that ends inside a block needs its own keys cut, and then
the batch gets a mask per row. Padding always sees itself: a query that sees nothing is NaN.

Shapes: B rows, L positions, S = 2 L for [xt, x0].
"""

from collections import OrderedDict
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tide_cache.geometry import block_diffusion_mask, block_visible

Attention = Literal["auto", "sdpa", "flex"]
AttentionMask: TypeAlias = Tensor | BlockMask
_MASKS_KEPT = 8


def attention_implementation(wanted: Attention, device: torch.device) -> str:
    """Return the name by which transformers knows the implementation for this device."""
    if wanted == "auto":
        wanted = "flex" if device.type == "cuda" else "sdpa"
    return {"sdpa": "sdpa", "flex": "flex_attention"}[wanted]


class AttentionMasks:
    """Makes the masks of batches for one block size, one implementation and one device."""

    def __init__(self, *, block_size: int, implementation: str, device: torch.device) -> None:
        self.block_size = block_size
        self._flex = implementation == "flex_attention"
        self._device = device
        self._shared: OrderedDict[int, AttentionMask] = OrderedDict()

    def padded_length(self, longest: int) -> int:
        """Return L for a batch whose longest row has this many positions: whole blocks."""
        return -(-longest // self.block_size) * self.block_size

    def of(self, length_B: np.ndarray[Any, np.dtype[np.integer]], num_positions: int) -> Any:
        """Return the mask of rows of these lengths, padded to `num_positions`.

        A bool tensor (1 or B, 1, S, S), rows are queries; or a BlockMask.
        """
        if (length_B % self.block_size).any():
            return self._per_row(length_B, num_positions)
        if num_positions not in self._shared:
            self._shared[num_positions] = self._of_whole_blocks(num_positions)
            if len(self._shared) > _MASKS_KEPT:
                self._shared.popitem(last=False)
        self._shared.move_to_end(num_positions)
        return self._shared[num_positions]

    def _of_whole_blocks(self, num_positions: int) -> AttentionMask:
        if self._flex:
            return flex_mask(None, num_positions, self.block_size, self._device)
        visible_SS = block_diffusion_mask(num_positions, self.block_size)
        return torch.from_numpy(visible_SS)[None, None].to(self._device)

    def _per_row(
        self, length_B: np.ndarray[Any, np.dtype[np.integer]], num_positions: int
    ) -> AttentionMask:
        if self._flex:
            return flex_mask(length_B, num_positions, self.block_size, self._device)
        visible_SS = torch.from_numpy(block_diffusion_mask(num_positions, self.block_size))
        real_BS = torch.from_numpy(_real_keys(length_B, num_positions))
        itself_SS = torch.eye(2 * num_positions, dtype=torch.bool)
        visible_B1SS = visible_SS & (real_BS[:, None, None, :] | itself_SS)
        return visible_B1SS.to(self._device)


def flex_mask(
    length_B: np.ndarray[Any, np.dtype[np.integer]] | None,
    num_positions: int,
    block_size: int,
    device: torch.device,
) -> BlockMask:
    """Build the same mask for flex_attention: one for any number of rows where lengths are None.

    Such a mask must not look at the row: the kernel asks it about all of them.
    """
    index_S = torch.arange(2 * num_positions, device=device)
    block_S = index_S % num_positions // block_size
    is_clean_S = index_S >= num_positions

    def in_layout(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # The ground floor's predicate is operators only, so it takes tensors as it takes arrays.
        visible: Any = block_visible(
            block_S[query],  # type: ignore[arg-type]
            block_S[key],  # type: ignore[arg-type]
            is_clean_S[query],  # type: ignore[arg-type]
            is_clean_S[key],  # type: ignore[arg-type]
        )
        layout: Tensor = visible
        return layout

    num_keys = 2 * num_positions
    if length_B is None:
        return create_block_mask(in_layout, None, None, num_keys, num_keys, device=str(device))
    real_BS = torch.from_numpy(_real_keys(length_B, num_positions)).to(device)

    def in_row(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        result: Tensor = in_layout(row, head, query, key) & (real_BS[row, key] | (query == key))
        return result

    num_rows = len(length_B)
    return create_block_mask(in_row, num_rows, None, num_keys, num_keys, device=str(device))


def _real_keys(
    length_B: np.ndarray[Any, np.dtype[np.integer]], num_positions: int
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Say for each row which of the 2 L keys are no padding. Returns bool (B, S)."""
    real_BL = np.arange(num_positions) < length_B[:, None]
    return np.concatenate([real_BL, real_BL], axis=1)
