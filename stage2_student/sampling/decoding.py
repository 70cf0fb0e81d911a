"""The fast sampler's loop over one batch: block after block, step after step.

What has no keys in the cache yet waits: the prompt before the first block, then always the block
that was finished last. It is computed in the same forward as the next block's first step, so that a
block costs its steps and no forward more. The output head sees the masks of the block at work
alone, a slice of them at a time. With guidance each row has a twin whose prompt is masks.

Rows drop out of a block's forwards once nothing is left to commit, and for good after an EOS token.

Shapes: B rows in a forward, N slots of the block at work, P masks among them, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stage2_student.sampling.commit import choose, commit, gumbel_noise
from stage2_student.sampling.forward import Forward
from stage2_student.sampling.layout import BatchLayout
from stage2_student.sampling.settings import GenerationSettings

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

_LOGITS_AT_ONCE = 2**26  # 256 MB of float32: 441 positions at 151,936 ids

# Row, slots of the block at work, whether it is finished.
OnStep = Callable[[int, tuple[int, int], bool], None]


@dataclass(slots=True)
class RowCost:
    """What one row has cost so far, see `settings.Generation`."""

    num_forwards: int = 0
    num_positions: int = 0


class BatchDecoding:
    """The state of one batch. `ids_RS` int64: a row per prompt, its twins behind them."""

    def __init__(
        self,
        model: "Qwen3ForCausalLM",
        forward: Forward,
        layout: BatchLayout,
        prompts: Sequence[Sequence[int]],
        *,
        mask_token_id: int,
        eos_token_id: int | None,
        settings: GenerationSettings,
        generators: Sequence[torch.Generator],
    ) -> None:
        self._model = model
        self._forward = forward
        self._layout = layout
        self._mask_token_id = mask_token_id
        self._eos_token_id = eos_token_id
        self._settings = settings
        self._generators = generators
        self._num_twins = len(prompts) if settings.cfg_scale > 0 else 0
        self.ids_RS = _fill(layout, prompts, self._num_twins, mask_token_id).to(model.device)
        self.ends = [row.end for row in layout.rows]
        self.costs = [RowCost() for _ in prompts]

    def run(self, on_step: OnStep | None = None) -> None:
        """Generate until every row has stopped."""
        rows = list(range(len(self.costs)))
        waiting_from = 0
        for block in range(self._layout.num_blocks):
            rows = [r for r in rows if block < len(self._layout.rows[r].blocks)]
            if not rows:
                return
            self._denoise(block, rows, waiting_from, on_step)
            rows = self._still_running(block, rows)
            waiting_from = self._layout.block_start(block)

    def _denoise(
        self, block: int, rows: list[int], waiting_from: int, on_step: OnStep | None
    ) -> None:
        """Commit one block of some rows."""
        start = self._layout.block_start(block)
        end = max(self._layout.rows[r].blocks[block][1] for r in rows)
        step, compute_from = 0, waiting_from
        while rows:
            hidden_BND = self._compute(rows, compute_from, start, end)
            plans = [self._layout.rows[r].reveal_plans[block] for r in rows]
            self._commit(block, rows, hidden_BND, [plan[step] for plan in plans], (start, end))
            step, compute_from = step + 1, start
            left = self._unfinished(block, rows, plans, step, (start, end))
            if on_step is not None:
                for row in rows:
                    on_step(row, self._layout.rows[row].blocks[block], row not in left)
            rows = left

    def _compute(self, rows: list[int], compute_from: int, start: int, end: int) -> Tensor:
        """Return the hidden states (B or 2 B, N, D) of the block at work."""
        asked = rows + [self._num_twins + r for r in rows if self._num_twins]
        ids_BQ = self.ids_RS[asked, compute_from:end]
        for row in rows:
            place, cost = self._layout.rows[row], self.costs[row]
            num_own = min(end, place.end) - max(compute_from, place.prompt_start)
            cost.num_forwards += 1
            cost.num_positions += num_own * (len(asked) // len(rows))
        return self._forward(ids_BQ, asked, compute_from, end)[:, start - compute_from :]

    def _commit(
        self,
        block: int,
        rows: list[int],
        hidden_BND: Tensor,
        num_reveal: list[int],
        slots: tuple[int, int],
    ) -> None:
        """Put tokens in the place of each row's surest masks, in its twin too."""
        block_BN = self.ids_RS[rows, slots[0] : slots[1]]
        masked_BN = self._masked(block, rows, slots)
        noise_PV = self._noise(block, rows, masked_BN, slots)
        chosen_P, confidence_P = self._choose(hidden_BND, masked_BN, noise_PV)
        committed_BN = commit(
            block_BN,
            block_BN.masked_scatter(masked_BN, chosen_P),
            torch.zeros_like(block_BN, dtype=torch.float32).masked_scatter(masked_BN, confidence_P),
            masked_BN=masked_BN,
            num_reveal_B=torch.tensor(num_reveal, device=block_BN.device),
            threshold=self._settings.threshold,
        )
        self.ids_RS[rows, slots[0] : slots[1]] = committed_BN
        if self._num_twins:
            twins = [self._num_twins + r for r in rows]
            unchanged_BN = self.ids_RS[twins, slots[0] : slots[1]]
            self.ids_RS[twins, slots[0] : slots[1]] = torch.where(
                masked_BN, committed_BN, unchanged_BN
            )

    def _choose(
        self, hidden_BND: Tensor, masked_BN: Tensor, noise_PV: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Choose a token for each mask, from a slice of logits at a time."""
        num_rows = masked_BN.shape[0]
        hidden_PD = hidden_BND[:num_rows][masked_BN]
        twin_PD = hidden_BND[num_rows:][masked_BN] if self._num_twins else None
        at_once = max(1, _LOGITS_AT_ONCE // self._model.config.vocab_size)
        found = []
        for first in range(0, len(hidden_PD), at_once):
            part = slice(first, first + at_once)
            logits_PV = self._model.lm_head(hidden_PD[part]).float()
            if twin_PD is not None:
                unprompted_PV = self._model.lm_head(twin_PD[part]).float()
                scale = self._settings.cfg_scale + 1
                logits_PV = unprompted_PV + scale * (logits_PV - unprompted_PV)
            found.append(
                choose(
                    logits_PV,
                    temperature=self._settings.temperature,
                    noise_PV=None if noise_PV is None else noise_PV[part],
                )
            )
        chosen, confidence = zip(*found, strict=True)
        return torch.cat(chosen), torch.cat(confidence)

    def _noise(
        self, block: int, rows: list[int], masked_BN: Tensor, slots: tuple[int, int]
    ) -> Tensor | None:
        """Draw for all new tokens of each row's block from its own stream; keep the masks' part."""
        if self._settings.temperature == 0:
            return None
        parts = []
        for row, masked_N in zip(rows, masked_BN, strict=True):
            first, last = self._layout.rows[row].blocks[block]
            shape = (last - first, self._model.config.vocab_size)
            drawn = gumbel_noise(shape, self._generators[row])
            parts.append(drawn[masked_N[first - slots[0] : last - slots[0]]])
        return torch.cat(parts)

    def _masked(self, block: int, rows: list[int], slots: tuple[int, int]) -> Tensor:
        """Return which slots of the block hold a mask to be filled, bool (B, N)."""
        bounds = torch.tensor([self._layout.rows[r].blocks[block] for r in rows])
        slot_N = torch.arange(*slots)
        is_new_BN = (slot_N >= bounds[:, :1]) & (slot_N < bounds[:, 1:])
        block_BN = self.ids_RS[rows, slots[0] : slots[1]]
        return is_new_BN.to(block_BN.device) & (block_BN == self._mask_token_id)

    def _unfinished(
        self,
        block: int,
        rows: list[int],
        plans: list[tuple[int, ...]],
        step: int,
        slots: tuple[int, int],
    ) -> list[int]:
        """Return the rows whose block needs another forward."""
        left = [row for row, plan in zip(rows, plans, strict=True) if step < len(plan)]
        if self._settings.threshold is None or not left:
            return left
        has_masks = self._masked(block, left, slots).any(1).tolist()
        return [row for row, has in zip(left, has_masks, strict=True) if has]

    def _still_running(self, block: int, rows: list[int]) -> list[int]:
        """Return the rows without an EOS token; note where the others end."""
        if self._eos_token_id is None:
            return rows
        running = []
        for row in rows:
            first, last = self._layout.rows[row].blocks[block]
            if self._eos_token_id in self.ids_RS[row, first:last].tolist():
                self.ends[row] = last
            else:
                running.append(row)
        return running


def _fill(
    layout: BatchLayout, prompts: Sequence[Sequence[int]], num_twins: int, mask_token_id: int
) -> Tensor:
    """Return the ids before the first step: masks, and the prompts in all rows but the twins."""
    ids_RS = torch.full((len(prompts) + num_twins, layout.num_slots), mask_token_id)
    for row, (place, prompt) in enumerate(zip(layout.rows, prompts, strict=False)):
        ids_RS[row, place.prompt_start : place.prompt_end] = torch.tensor(list(prompt))
    return ids_RS
