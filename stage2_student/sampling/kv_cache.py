"""Keys and values of everything committed, in buffers that are written in place and never copied.

One buffer a layer, allocated once for a batch: rows, heads, slots. A forward writes the keys of
what it computes into their slots and attends to a view of the buffer, so that a step overwrites the
block at work instead of appending to it, and nothing is concatenated, cropped or repeated. Rows
that have stopped are left out: the forward runs on the others, and attention goes over the buffer
in spans of neighbouring rows, each of them a view. Query heads that share a key head are laid side
by side as queries, so that keys need not be repeated for them either.

Qwen3 asks for both through transformers' own interfaces: a `Cache` and a named attention function.

Shapes: B rows of a forward, H heads, K key heads, G = H / K, Q queries, S slots seen, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    from transformers import Qwen3Config, Qwen3ForCausalLM

_ATTENTION = "tide_block_cache"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where in the buffers a forward stands.

    `spans` are the half-open ranges of buffer rows that it computes, in its rows' order; its
    queries stand in slots [start, end) and see slots [first, end) through `mask`, bool
    (B or 1, 1, G Q or 1, S), None where all see all. `slots`, int64 (Q,), says on the device where
    queries stand, for a captured graph; `end` is then how far the view goes.
    """

    spans: tuple[tuple[int, int], ...]
    first: int
    start: int
    end: int
    mask: Tensor | None
    slots: Tensor | None = None


class BlockCache(Cache):  # type: ignore[misc]
    """The buffers of one batch. `place` must be set before each forward."""

    place: Place

    def __init__(
        self,
        config: "Qwen3Config",
        *,
        num_rows: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layers=[])
        shape = (num_rows, config.num_key_value_heads, num_slots, config.head_dim)
        # Zeros: a slot that was never written is masked, and masking does not stop a NaN.
        self.keys, self.values = (
            [
                torch.zeros(shape, dtype=dtype, device=device)
                for _ in range(config.num_hidden_layers)
            ]
            for _ in range(2)
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values (B, K, Q, D); return views (rows, K, S, D)."""
        place = self.place
        seen = []
        for buffer, new in (
            (self.keys[layer_idx], key_states),
            (self.values[layer_idx], value_states),
        ):
            _write(buffer, new, place)
            seen.append(buffer[:, :, place.first : place.end])
        return seen[0], seen[1]


def _write(buffer: Tensor, new: Tensor, place: Place) -> None:
    if place.slots is not None:
        buffer.index_copy_(2, place.slots, new)
        return
    done = 0
    for first, last in place.spans:
        buffer[first:last, :, place.start : place.end].copy_(new[done : done + last - first])
        done += last - first


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    place: Place,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from (B, H, Q, D) to views of the buffers (rows, K, S, D); returns (B, Q, H, D)."""
    num_rows, num_heads, num_queries, head_dim = query.shape
    packed = query.reshape(num_rows, key.shape[1], -1, head_dim)
    outputs = []
    done = 0
    for first, last in place.spans:
        rows = slice(done, done + last - first)
        mask = place.mask
        outputs.append(
            functional.scaled_dot_product_attention(
                packed[rows],
                key[first:last],
                value[first:last],
                attn_mask=mask if mask is None or mask.shape[0] == 1 else mask[rows],
                scale=scaling,
            )
        )
        done = rows.stop
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output.view(num_rows, num_heads, num_queries, head_dim).transpose(
        1, 2
    ).contiguous(), None


@contextmanager
def reading_block_cache(model: "Qwen3ForCausalLM") -> Iterator[None]:
    """Let the model attend through `block_attention`, and give it its own attention back."""
    AttentionInterface.register(_ATTENTION, block_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
