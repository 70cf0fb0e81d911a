"""One forward of the fast sampler: some rows, one range of slots, the final hidden states.

`EagerForward` runs the rows that are asked for and no other. `stage2_student.sampling.graphs` has
the same on static buffers, for a GPU.

Shapes: B rows asked for, Q slots computed, N of them in the block at work, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from stage2_student.sampling.kv_cache import BlockCache, Place
from stage2_student.sampling.layout import BatchLayout

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM


class Forward(Protocol):
    """Computes slots of some rows of a batch and leaves their keys in the cache."""

    def __call__(self, ids_BQ: Tensor, rows: Sequence[int], start: int, end: int) -> Tensor:
        """Return the final hidden states (B, Q, D) of slots [start, end) of `rows`, ascending."""


class EagerForward:
    """Runs the model on the rows asked for, in the shape that they have."""

    def __init__(self, model: "Qwen3ForCausalLM", layout: BatchLayout, cache: BlockCache) -> None:
        self._model = model
        self._layout = layout
        self._cache = cache
        self._place_of: tuple[tuple[int, ...], int, int] | None = None

    def __call__(self, ids_BQ: Tensor, rows: Sequence[int], start: int, end: int) -> Tensor:
        """See `Forward`."""
        # All steps of a block but the first stand in the same place.
        if self._place_of != (tuple(rows), start, end):
            self._place_of = (tuple(rows), start, end)
            self._place = self._find_place(rows, start, end)
            self._positions_BQ = positions(self._layout, rows, start, end).to(ids_BQ.device)
        self._cache.place = self._place
        return run_body(self._model, self._cache, ids_BQ, self._positions_BQ)

    def _find_place(self, rows: Sequence[int], start: int, end: int) -> Place:
        mask = None
        if self._layout.needs_mask(rows, start, end):
            visible_BQS = self._layout.visible(rows, start, end, width=end)
            mask = pack_mask(visible_BQS, self._model).to(self._model.device)
        return Place(
            spans=spans_of(rows),
            first=self._layout.first_slot(rows),
            start=start,
            end=end,
            mask=mask,
        )


def run_body(
    model: "Qwen3ForCausalLM", cache: BlockCache, ids_BQ: Tensor, positions_BQ: Tensor
) -> Tensor:
    """Run all layers at the cache's place; returns the normalised hidden states (B, Q, D)."""
    hidden_BQD: Tensor = model.model(
        input_ids=ids_BQ,
        attention_mask={"full_attention": None},  # the place has it
        position_ids=positions_BQ,
        past_key_values=cache,
        use_cache=True,
        place=cache.place,
    ).last_hidden_state
    return hidden_BQD


def positions(layout: BatchLayout, rows: Sequence[int], start: int, end: int) -> Tensor:
    """Return the positions, int64 (B, Q), of slots [start, end); 0 in front of a prompt."""
    first_B = torch.tensor([layout.rows[r].prompt_start for r in rows])
    return (torch.arange(start, end)[None, :] - first_B[:, None]).clamp(min=0)


def pack_mask(visible_BQS: Tensor, model: "Qwen3ForCausalLM") -> Tensor:
    """Repeat a bool mask for the query heads that share a key head: (B, 1, G Q, S).

    One row of queries is kept where all queries see the same.
    """
    num_groups = model.config.num_attention_heads // model.config.num_key_value_heads
    if (visible_BQS == visible_BQS[:, :1]).all():
        return visible_BQS[:, None, :1]
    return visible_BQS[:, None].repeat(1, 1, num_groups, 1)


def spans_of(rows: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return ascending row numbers as half-open ranges of neighbours."""
    spans: list[tuple[int, int]] = []
    for row in rows:
        if spans and spans[-1][1] == row:
            spans[-1] = (spans[-1][0], row + 1)
        else:
            spans.append((row, row + 1))
    return tuple(spans)
