"""Who attends to whom among packed rows, in the forms that attention kernels take.

A batch is one sequence of N tokens: of each row its clean tokens, then its noised ones. `by_rows`
runs sdpa twice a row (clean queries over clean keys, noised ones over both), so that nothing is
spent on pairs of rows or on what clean tokens never see; short rows share a call, where the call
costs more than the pairs. flex_attention gets a BlockMask over all N (compiled, so for GPUs). The
dense mask is the slow, obvious form of both; stock sdpa takes it.

Shapes: N packed tokens, B rows, G groups of rows, C clean and X noised tokens of a group, Q tiles.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tide_cache.geometry import block_visible

Attention = Literal["auto", "sdpa", "flex"]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

BY_ROWS = "tide_by_rows"
FLEX = "flex_attention"
# flex_attention works in tiles of so many tokens.
FLEX_TILE = 128
# Rows share a call of sdpa up to so many tokens: below, the call costs more than the pairs of rows.
_SHARED_TOKENS = 256


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenPlaces:
    """Where each packed token comes from: its row, its block there, and which copy it is of.

    `row_N`, `block_N` int64, `is_clean_N` bool; `num_clean_B` and `num_noised_B` int64 count each
    row's tokens, clean ones first. Tokens that fill up the last tile have row -1, each its own
    block.
    """

    row_N: Int64Array
    block_N: Int64Array
    is_clean_N: BoolArray
    num_clean_B: Int64Array
    num_noised_B: Int64Array


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowMask:
    """The mask of packed rows for `by_rows`, by groups of neighbouring tokens.

    `sizes`: of each group the number of its first part C and of its second X, flat. `first`: bool
    (C, C), None where C = 0; `second`: bool (X, C + X). Rows are queries. A long row is a group of
    its own, clean tokens first; short rows share one, all of it in the second part.
    """

    sizes: tuple[int, ...]
    first: tuple[Tensor | None, ...]
    second: tuple[Tensor, ...]


AttentionMask: TypeAlias = Tensor | RowMask | BlockMask


def attention_implementation(wanted: Attention, device: torch.device) -> str:
    """Return the name by which transformers knows the implementation for this device."""
    if wanted == "auto":
        wanted = "flex" if device.type == "cuda" else "sdpa"
    return {"sdpa": BY_ROWS, "flex": FLEX}[wanted]


def tile_size(implementation: str) -> int:
    """Return of what the number of packed tokens has to be a multiple."""
    return FLEX_TILE if implementation == FLEX else 1


def make_mask(places: TokenPlaces, *, implementation: str, device: torch.device) -> AttentionMask:
    """Return the mask of packed rows for an implementation: `by_rows`, flex, or any that takes
    a bool tensor (1, 1, N, N).
    """
    if implementation == BY_ROWS:
        return row_mask(places, device)
    if implementation == FLEX:
        return flex_mask(places, device)
    return torch.from_numpy(dense_mask(places))[None, None].to(device)


def dense_mask(places: TokenPlaces) -> BoolArray:
    """Say for each pair of packed tokens whether the second is visible to the first, bool (N, N).

    The definition: same row, and what block diffusion shows (`tide_cache.geometry`).
    """
    row_N = places.row_N
    same_row_NN = row_N[:, None] == row_N[None]
    in_row_NN = _visible_pairs(places)
    fills_N = row_N < 0
    visible_NN: BoolArray = same_row_NN & in_row_NN & (~fills_N | np.eye(len(row_N), dtype=bool))
    return visible_NN


def _visible_pairs(places: TokenPlaces) -> BoolArray:
    """Say for each pair whether the second is visible to the first if both are of one row."""
    block_N, is_clean_N = places.block_N, places.is_clean_N
    return block_visible(block_N[:, None], block_N[None], is_clean_N[:, None], is_clean_N[None])


def row_mask(places: TokenPlaces, device: torch.device) -> RowMask:
    """Build the masks of each group."""
    sizes: list[int] = []
    first: list[Tensor | None] = []
    second: list[Tensor] = []
    for start, middle, stop in _groups(places):
        is_short = middle == start
        part = _part(places, start, stop)
        mask = dense_mask(part) if is_short else _noised_mask(part.block_N, middle - start)
        sizes += [middle - start, stop - middle]
        first.append(None if is_short else _clean_mask(places.block_N[start:middle], device))
        second.append(torch.from_numpy(mask).to(device))
    return RowMask(sizes=tuple(sizes), first=tuple(first), second=tuple(second))


def _groups(places: TokenPlaces) -> list[tuple[int, int, int]]:
    """Return [start, middle, stop) of each group; middle is start where short rows share one."""
    found: list[tuple[int, int, int]] = []
    start = stop = 0
    for num_clean, num_noised in zip(
        places.num_clean_B.tolist(), places.num_noised_B.tolist(), strict=True
    ):
        row_start, row_stop = stop, stop + num_clean + num_noised
        if row_stop - start > _SHARED_TOKENS and row_start > start:
            found.append((start, start, row_start))
            start = row_start
        if row_stop - start > _SHARED_TOKENS:
            found.append((start, start + num_clean, row_stop))
            start = row_stop
        stop = row_stop
    if stop > start:
        found.append((start, start, stop))
    return found


def _part(places: TokenPlaces, start: int, stop: int) -> TokenPlaces:
    return replace(
        places,
        row_N=places.row_N[start:stop],
        block_N=places.block_N[start:stop],
        is_clean_N=places.is_clean_N[start:stop],
    )


def _clean_mask(block_C: Int64Array, device: torch.device) -> Tensor:
    return torch.from_numpy(block_C[None] <= block_C[:, None]).to(device)


def _noised_mask(block_S: Int64Array, num_clean: int) -> BoolArray:
    clean_C, noised_X = block_S[:num_clean], block_S[num_clean:]
    earlier_XC = clean_C[None] < noised_X[:, None]
    return np.concatenate([earlier_XC, noised_X[None] == noised_X[:, None]], axis=1)


def attend_by_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend row by row: what transformers calls for each layer under the name `BY_ROWS`.

    `query` (1, heads, N, head size), `key` and `value` with the key heads; returns (1, N, heads,
    head size). Any other mask than a `RowMask` goes to stock sdpa.
    """
    if not isinstance(attention_mask, RowMask):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    # One split for all rows: its backward is one concatenation, that of slices would be a zeroed
    # copy of everything for each row.
    sizes = list(attention_mask.sizes)
    pieces = [torch.split(tensor, sizes, dim=2) for tensor in (query, key, value)]
    shares_keys = query.shape[1] != key.shape[1]
    outputs = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
        attended = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=shares_keys
        )
        outputs.append(attended)

    for group, (first, second) in enumerate(
        zip(attention_mask.first, attention_mask.second, strict=True)
    ):
        (q_first, q_second), (k_first, k_second), (v_first, v_second) = (
            piece[2 * group : 2 * group + 2] for piece in pieces
        )
        if first is not None:
            attend(q_first, k_first, v_first, first)
            k_second = torch.cat([k_first, k_second], dim=2)
            v_second = torch.cat([v_first, v_second], dim=2)
        attend(q_second, k_second, v_second, second)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(BY_ROWS, attend_by_rows)


def flex_mask(places: TokenPlaces, device: torch.device) -> BlockMask:
    """Build the mask for flex_attention from the pairs within rows: no (N, N) is ever made.

    N must be a multiple of `FLEX_TILE`. Tiles that hold no visible pair are skipped by the kernel,
    those in which every pair is visible are not masked.
    """
    num_tiles = len(places.row_N) // FLEX_TILE
    visible_QQ = np.zeros((num_tiles, num_tiles), dtype=np.int64)
    start = 0
    for num_clean, num_noised in zip(
        places.num_clean_B.tolist(), places.num_noised_B.tolist(), strict=True
    ):
        stop = start + num_clean + num_noised
        if stop > start:
            _count_visible(visible_QQ, places, start, stop)
        start = stop
    for index in range(start, len(places.row_N)):
        visible_QQ[index // FLEX_TILE, index // FLEX_TILE] += 1
    is_full_QQ = visible_QQ == FLEX_TILE * FLEX_TILE
    row_N = torch.from_numpy(places.row_N).to(device)
    block_N = torch.from_numpy(places.block_N).to(device)
    is_clean_N = torch.from_numpy(places.is_clean_N).to(device)

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # The ground floor's predicate is operators only, so it takes tensors as it takes arrays.
        in_row: Any = block_visible(
            block_N[query],  # type: ignore[arg-type]
            block_N[key],  # type: ignore[arg-type]
            is_clean_N[query],  # type: ignore[arg-type]
            is_clean_N[key],  # type: ignore[arg-type]
        )
        result: Tensor = (row_N[query] == row_N[key]) & in_row
        return result

    return BlockMask.from_kv_blocks(
        *_tile_lists((visible_QQ > 0) & ~is_full_QQ, device),
        *_tile_lists(is_full_QQ, device),
        BLOCK_SIZE=FLEX_TILE,
        mask_mod=visible,
        seq_lengths=(len(places.row_N), len(places.row_N)),
    )


def _count_visible(visible_QQ: Int64Array, places: TokenPlaces, start: int, stop: int) -> None:
    """Add the visible pairs of one row's tokens [start, stop) to the tiles that they lie in."""
    block_S, is_clean_S = places.block_N[start:stop], places.is_clean_N[start:stop]
    visible_SS = block_visible(
        block_S[:, None], block_S[None], is_clean_S[:, None], is_clean_S[None]
    )
    first, last = start // FLEX_TILE, (stop - 1) // FLEX_TILE
    edges = np.maximum(np.arange(first, last + 1) * FLEX_TILE - start, 0)
    counts = np.add.reduceat(visible_SS.astype(np.int32), edges, axis=0)
    visible_QQ[first : last + 1, first : last + 1] += np.add.reduceat(counts, edges, axis=1)


def _tile_lists(is_wanted_QQ: BoolArray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how many tiles each row of tiles wants and which, wanted ones first: int32."""
    number_Q = is_wanted_QQ.sum(axis=1).astype(np.int32)
    order_QQ = np.argsort(~is_wanted_QQ, axis=1, kind="stable").astype(np.int32)
    return (
        torch.from_numpy(number_Q)[None, None].to(device),
        torch.from_numpy(order_QQ)[None, None].to(device),
    )
