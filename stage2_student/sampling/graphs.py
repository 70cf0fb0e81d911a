"""Forwards as captured CUDA graphs: a step is a function of static buffers, replayed by shape.

A forward of 28 layers at batch 1 takes an H100 0.4 ms of memory traffic and its host 24 ms of
launches, so launches are what there is to save. The steps of a batch have few shapes: one block, or
two (the finished block fused with the next one's first step), each against a view of the cache that
grows by buckets of slots. Each shape is captured on first use and replayed from then on; inputs are
copied into its buffers. All rows of the batch are computed, those that have stopped as well:
shapes stay, and a stopped row's keys are seen by nobody. The prompt, which has any length, and
blocks that are cut short by the number of new tokens go through the eager forward.

Capture is the one thing that needs a GPU. What is captured, and the bookkeeping, is the same with
`call_again`, which runs the step instead: so it is tested where there is none.

Shapes: B rows of the batch, Q slots computed, S slots seen, D hidden.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stage2_student.sampling.forward import Forward, pack_mask, positions, run_body
from stage2_student.sampling.kv_cache import BlockCache, Place
from stage2_student.sampling.layout import BatchLayout

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

_BUCKET = 128  # slots

# Takes a function without arguments and returns what repeats it.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def capture_cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Capture what `step` launches on the current device and return its replay.

    It is run three times before, on a stream of its own, so that libraries set themselves up.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


def call_again(step: Callable[[], None]) -> Callable[[], None]:
    """Capture nothing: repeat the step by calling it."""
    return step


class StaticSteps:
    """The cache and the captured steps for batches of one number of rows; outlives a batch."""

    def __init__(
        self, model: "Qwen3ForCausalLM", *, num_rows: int, num_slots: int, capture: Capture
    ) -> None:
        self.num_rows = num_rows
        self.num_slots = -(-num_slots // _BUCKET) * _BUCKET
        self.cache = BlockCache(
            model.config,
            num_rows=num_rows,
            num_slots=self.num_slots,
            dtype=model.dtype,
            device=model.device,
        )
        self._model = model
        self._capture = capture
        self._steps: dict[tuple[int, int], _StaticStep] = {}

    @property
    def captured_shapes(self) -> list[tuple[int, int]]:
        """What was captured: slots computed, slots seen."""
        return sorted(self._steps)

    def fits(self, layout: BatchLayout) -> bool:
        """Whether a batch can be run in these buffers."""
        return len(layout.rows) == self.num_rows and layout.num_slots <= self.num_slots

    def step_for(self, num_queries: int, end: int) -> "_StaticStep":
        """Return the step of a shape, captured if it is the first of its shape."""
        shape = (num_queries, -(-end // _BUCKET) * _BUCKET)
        if shape not in self._steps:
            self._steps[shape] = _StaticStep(
                self._model, self.cache, self.num_rows, *shape, self._capture
            )
        return self._steps[shape]


class GraphedForward:
    """Runs the steps of a batch from captured graphs, everything else through `eager`."""

    def __init__(self, layout: BatchLayout, steps: StaticSteps, *, eager: Forward) -> None:
        self._layout = layout
        self._steps = steps
        self._eager = eager

    def __call__(self, ids_BQ: Tensor, rows: Sequence[int], start: int, end: int) -> Tensor:
        """See `forward.Forward`."""
        size = self._layout.block_size
        if end - start not in (size, 2 * size) or start < self._layout.first_block:
            return self._eager(ids_BQ, rows, start, end)
        step = self._steps.step_for(end - start, end)
        step.stand_at(self._layout, start, end)
        step.ids_BQ[list(rows)] = ids_BQ
        step.run()
        return step.hidden_BQD[list(rows)]


class _StaticStep:
    """One shape of a step: buffers that stay where they are, and the function of them alone."""

    def __init__(
        self,
        model: "Qwen3ForCausalLM",
        cache: BlockCache,
        num_rows: int,
        num_queries: int,
        width: int,
        capture: Capture,
    ) -> None:
        config, device = model.config, model.device
        num_groups = config.num_attention_heads // config.num_key_value_heads
        self._model = model
        self._cache = cache
        self._capture = capture
        self._stands_at: tuple[BatchLayout, int, int] | None = None
        self._replay: Callable[[], None] | None = None
        self.ids_BQ = torch.zeros((num_rows, num_queries), dtype=torch.int64, device=device)
        self.positions_BQ = torch.zeros_like(self.ids_BQ)
        self.slots_Q = torch.zeros(num_queries, dtype=torch.int64, device=device)
        self.mask = torch.zeros(
            (num_rows, 1, num_groups * num_queries, width), dtype=torch.bool, device=device
        )
        self.hidden_BQD = torch.zeros(
            (num_rows, num_queries, config.hidden_size), dtype=model.dtype, device=device
        )
        self._place = Place(
            spans=((0, num_rows),),
            first=0,
            start=0,
            end=width,
            mask=self.mask,
            slots=self.slots_Q,
        )

    def stand_at(self, layout: BatchLayout, start: int, end: int) -> None:
        """Fill positions, slots and mask for slots [start, end), unless they are there already."""
        if self._stands_at == (layout, start, end):
            return
        self._stands_at = (layout, start, end)
        rows = range(len(layout.rows))
        width = self.mask.shape[-1]
        first = layout.first_slot(rows)
        visible_BQS = layout.visible(rows, start, end, width=width)
        self.mask[..., :first] = False
        self.mask[..., first:].copy_(pack_mask(visible_BQS, self._model))
        self.positions_BQ.copy_(positions(layout, rows, start, end))
        self.slots_Q.copy_(torch.arange(start, end))

    def run(self) -> None:
        """Compute `hidden_BQD` from the buffers."""
        if self._replay is None:
            self._replay = self._capture(self._step)
        self._replay()

    def _step(self) -> None:
        self._cache.place = self._place
        self.hidden_BQD.copy_(run_body(self._model, self._cache, self.ids_BQ, self.positions_BQ))
