"""Generating with a student: what one calls from Python.

    from stage2_student.sampler import GenerationSettings, Sampler, load_for_generation

    student = load_for_generation("runs/wedlm/student/final")
    sampler = Sampler(
        student.model,
        mask_token_id=student.mask_token_id,
        eos_token_id=student.eos_token_id,
        settings=GenerationSettings(max_new_tokens=256, threshold=0.9),
    )
    ids = student.tokenizer("Once upon a time")["input_ids"]
    (answer,) = sampler.generate([ids])
    print(student.tokenizer.decode(answer.text_ids))

A prompt is run once, fused with the first step of the first block, and every finished block once
more, fused with the first step of the next one; all other forwards compute the block at work alone
against keys and values that lie in a buffer (`sampling.kv_cache`). Tokens at temperature 0 are
those of `sampling.reference`, which computes the whole prefix at every step: 256 tokens after 100,
one a forward, take 256 forwards of 32 to 132 positions here and of 132 to 356 there. That holds in
float32. In bfloat16 neighbouring probabilities are often equal, and which of two comes first
depends on the shapes that were multiplied: a few answers in a hundred may differ.

`sampling/` has the parts: settings, blocks, layout, kv_cache, forward, decoding, graphs, commit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stage2_student.sampling.blocks import BlockOrigin, cut_at_eos
from stage2_student.sampling.commit import row_generator
from stage2_student.sampling.decoding import BatchDecoding, OnStep
from stage2_student.sampling.forward import EagerForward, Forward
from stage2_student.sampling.graphs import (
    Capture,
    GraphedForward,
    StaticSteps,
    capture_cuda_graph,
)
from stage2_student.sampling.kv_cache import BlockCache, reading_block_cache
from stage2_student.sampling.layout import BatchLayout, lay_out
from stage2_student.sampling.loading import LoadedStudent, load_for_generation
from stage2_student.sampling.preconditions import (
    check_batch_size,
    check_numbers,
    check_prompts,
    evaluating,
)
from stage2_student.sampling.settings import Generation, GenerationSettings

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

__all__ = [
    "BlockOrigin",
    "DenoisingStep",
    "Generation",
    "GenerationSettings",
    "LoadedStudent",
    "Sampler",
    "cut_at_eos",
    "load_for_generation",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoisingStep:
    """The state of one prompt after a forward, for whoever watches.

    `prompt_index` counts in `prompts`; `ids` are the new ids so far, those of the block at work
    with the mask token where nothing is committed yet; `block_start` is where that block begins in
    `ids`; `is_block_finished`: it is not touched again.
    """

    prompt_index: int
    ids: list[int]
    block_start: int
    is_block_finished: bool


class Sampler:
    """Generates with one model under one set of settings.

    On a GPU each shape of a step is captured once as a CUDA graph, and kept with its cache for the
    next batches (`capture`: how; on other devices, by default, the model is simply called).
    """

    def __init__(
        self,
        model: "Qwen3ForCausalLM",
        *,
        mask_token_id: int,
        eos_token_id: int | None,
        settings: GenerationSettings,
        capture: Capture | None = None,
    ) -> None:
        self.model = model
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id
        self.settings = settings
        is_on_gpu = model.device.type == "cuda"
        self._capture = capture_cuda_graph if capture is None and is_on_gpu else capture
        self._steps: StaticSteps | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        batch_size: int = 32,
        prompt_numbers: Sequence[int] | None = None,
        on_step: Callable[[DenoisingStep], None] | None = None,
    ) -> list[Generation]:
        """Generate after prompts of any lengths, in their order.

        At temperature 0 a result depends on its prompt alone; above 0 also on the seed and on the
        prompt's number (`prompt_numbers`; default: its index), never on the company in its batch.
        Prompts of like length share a batch. `on_step` is called after each forward for each prompt
        that took part in it. Raises ConfigError or DataError, naming what cannot be followed.
        """
        check_prompts(
            prompts,
            max_length=self.model.config.max_position_embeddings,
            max_new_tokens=self.settings.max_new_tokens,
        )
        check_batch_size(batch_size)
        check_numbers(prompt_numbers, len(prompts))
        numbers = range(len(prompts)) if prompt_numbers is None else prompt_numbers
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: dict[int, Generation] = {}
        with torch.no_grad(), evaluating(self.model), reading_block_cache(self.model):
            for first in range(0, len(by_length), batch_size):
                indices = by_length[first : first + batch_size]
                batch = [prompts[i] for i in indices]
                layout = lay_out([len(prompt) for prompt in batch], self.settings)
                decoding = self._start(layout, batch, [numbers[i] for i in indices])
                decoding.run(
                    None if on_step is None else _watch(decoding, layout, indices, on_step)
                )
                for row, index in enumerate(indices):
                    found[index] = self._result(decoding, layout, row)
        return [found[index] for index in range(len(prompts))]

    def _start(
        self, layout: BatchLayout, prompts: Sequence[Sequence[int]], numbers: Sequence[int]
    ) -> BatchDecoding:
        return BatchDecoding(
            self.model,
            self._make_forward(layout),
            layout,
            prompts,
            mask_token_id=self.mask_token_id,
            eos_token_id=self.eos_token_id,
            settings=self.settings,
            generators=[row_generator(self.settings.seed, n, self.model.device) for n in numbers],
        )

    def _make_forward(self, layout: BatchLayout) -> Forward:
        if self._capture is None:
            cache = BlockCache(
                self.model.config,
                num_rows=len(layout.rows),
                num_slots=layout.num_slots,
                dtype=self.model.dtype,
                device=self.model.device,
            )
            return EagerForward(self.model, layout, cache)
        if self._steps is None or not self._steps.fits(layout):
            self._steps = StaticSteps(
                self.model,
                num_rows=len(layout.rows),
                num_slots=layout.num_slots,
                capture=self._capture,
            )
        eager = EagerForward(self.model, layout, self._steps.cache)
        return GraphedForward(layout, self._steps, eager=eager)

    def _result(self, decoding: BatchDecoding, layout: BatchLayout, row: int) -> Generation:
        new = slice(layout.rows[row].prompt_end, decoding.ends[row])
        return Generation(
            ids=decoding.ids_RS[row, new].tolist(),
            eos_token_id=self.eos_token_id,
            num_forwards=decoding.costs[row].num_forwards,
            num_positions=decoding.costs[row].num_positions,
        )


def _watch(
    decoding: BatchDecoding,
    layout: BatchLayout,
    indices: Sequence[int],
    on_step: Callable[[DenoisingStep], None],
) -> OnStep:
    """Return a callback in rows and slots that tells of prompts and new ids."""

    def tell(row: int, slots: tuple[int, int], is_finished: bool) -> None:
        first = layout.rows[row].prompt_end
        on_step(
            DenoisingStep(
                prompt_index=indices[row],
                ids=decoding.ids_RS[row, first : slots[1]].tolist(),
                block_start=slots[0] - first,
                is_block_finished=is_finished,
            )
        )

    return tell
