"""Where the prompts of a batch and their blocks lie in the slots of the cache.

A row's position p stands in slot p + shift, with a shift that makes the first blocks of all rows
begin in one slot. From there on blocks lie side by side, so that a forward writes one range of
slots whatever the prompts' lengths, and who sees whom is a matter of slots alone: a block sees its
own slots and earlier ones, from the row's first slot to its last.

Pure functions of lengths and settings, and no model. Shapes: B rows, Q queries, S slots seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stage2_student.sampling.blocks import first_block_start
from stage2_student.sampling.settings import GenerationSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLayout:
    """One row, in slots: its prompt, its blocks (the new tokens in them), its plan for each."""

    prompt_start: int
    prompt_end: int
    blocks: list[tuple[int, int]]
    reveal_plans: list[tuple[int, ...]]

    @property
    def end(self) -> int:
        """The slot behind the last new token."""
        return self.blocks[-1][1]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLayout:
    """A batch. `first_block` is the slot where every row's first block begins."""

    rows: list[RowLayout]
    first_block: int
    block_size: int

    @property
    def num_slots(self) -> int:
        """Slots that the cache needs."""
        return max(row.end for row in self.rows)

    @property
    def num_blocks(self) -> int:
        """Blocks of the row that has most."""
        return max(len(row.blocks) for row in self.rows)

    def block_start(self, block: int) -> int:
        """Return the slot where a block begins, prompt tokens in it included."""
        return self.first_block + block * self.block_size

    def needs_mask(self, rows: Sequence[int], start: int, end: int) -> bool:
        """Whether any query in slots [start, end) must not see all from the first to `end`."""
        first = self.first_slot(rows)
        is_one_block = self._block_of(start) == self._block_of(end - 1)
        return not is_one_block or any(
            self.rows[r].prompt_start > first or self.rows[r].end < end for r in rows
        )

    def first_slot(self, rows: Sequence[int]) -> int:
        """Return the first slot that any of these rows uses."""
        return min(self.rows[r].prompt_start for r in rows)

    def visible(self, rows: Sequence[int], start: int, end: int, *, width: int) -> Tensor:
        """Build the bool mask (B, Q, S) of queries in slots [start, end).

        Seen slots count from `first_slot(rows)` to `width`. Slots outside a row see themselves as
        well, because a softmax over nothing is not a number.
        """
        key_S = torch.arange(self.first_slot(rows), width)
        query_Q = torch.arange(start, end)
        is_earlier_QS = self._blocks_of(key_S)[None, :] <= self._blocks_of(query_Q)[:, None]
        first_B = torch.tensor([self.rows[r].prompt_start for r in rows])[:, None]
        end_B = torch.tensor([self.rows[r].end for r in rows])[:, None]
        is_own_BS = (key_S >= first_B) & (key_S < end_B)
        is_self_QS = key_S[None, :] == query_Q[:, None]
        return (is_earlier_QS[None] & is_own_BS[:, None]) | is_self_QS

    def _block_of(self, slot: int) -> int:
        return (slot - self.first_block) // self.block_size

    def _blocks_of(self, slot_S: Tensor) -> Tensor:
        return (slot_S - self.first_block) // self.block_size


def lay_out(prompt_lengths: Sequence[int], settings: GenerationSettings) -> BatchLayout:
    """Plan a batch of prompts of these lengths; with guidance a twin of each row behind them."""
    origins = [
        first_block_start(length, settings.block_size, settings.block_origin)
        for length in prompt_lengths
    ]
    first_block = max(origins)
    rows = [
        _lay_out_row(length, first_block - origin, settings)
        for length, origin in zip(prompt_lengths, origins, strict=True)
    ]
    if settings.cfg_scale > 0:
        rows *= 2
    return BatchLayout(rows=rows, first_block=first_block, block_size=settings.block_size)


def _lay_out_row(prompt_length: int, shift: int, settings: GenerationSettings) -> RowLayout:
    bounds = settings.bounds(prompt_length)
    return RowLayout(
        prompt_start=shift,
        prompt_end=shift + prompt_length,
        blocks=[(start + shift, end + shift) for start, end in bounds],
        reveal_plans=[settings.reveal_plan(end - start, len(bounds)) for start, end in bounds],
    )
