"""The four layouts as prompts of an engine that knows positions 0, 1, 2, … and no mask.

A prompt holds one copy of each position, so [x0 | xt] is cut up: a noised block sees clean blocks
before it and itself, hence clean ids up to the block, then the noised block, is all that its
answers depend on. Every layout is then one of two attentions over a prompt in natural order:

  layout           prompts                                      attention
  block_diffusion  one per live block: clean before it, noised  block by block
  observed_first   the same                                     causal, masked tokens moved last
  bidirectional    one per stream: noised                       all see all
  block_causal     the same, up to the last wanted block        block by block

The price of [x0 | xt] is that every live block runs its clean prefix again. With 4 views, both
halves and blocks of 32: 7,470 tokens instead of the 1,470 of one shared clean half at 256 positions
(100 of prompt), 120,000 instead of 6,700 at 1,024 (300 of prompt). So these two layouts are for
short samples, and for teachers that only an engine can run; the other two cost what they cost
anywhere. In observed_first a masked token is the id after the vocabulary, which no text can hold:
the model moves those and puts the mask id in.

Shapes: L positions of the sample, N tokens of a prompt, P wanted positions.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from stage1_teacher.teachers.base import IntArray, ScoreRequest, Stream
from stage1_teacher.teachers.layouts import Int32Array, Layout


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One run of the engine: a part of a stream's wanted positions, from number `start` on.

    `ids_N` int32; `rows_P` int, ascending: the tokens whose prediction is wanted, which stand at
    their own positions.
    """

    request_index: int
    stream_index: int
    start: int
    ids_N: Int32Array
    rows_P: IntArray


def plan_prompts(
    requests: Sequence[ScoreRequest], layout: Layout, *, block_size: int, masked_id: int
) -> list[Prompt]:
    """Cut every stream into prompts, in the order of its wanted positions; a pure function.

    `masked_id` stands at masked positions: the mask id, or in observed_first the vocabulary's size.
    """
    return [
        prompt
        for request_index, request in enumerate(requests)
        for stream_index, stream in enumerate(request.streams)
        if len(stream.wanted_P)
        for prompt in _prompts(
            request_index, stream_index, request, stream, layout, block_size, masked_id
        )
    ]


def num_tokens(prompts: Sequence[Prompt]) -> int:
    """Count the tokens that the engine runs."""
    return sum(len(prompt.ids_N) for prompt in prompts)


def _prompts(
    request_index: int,
    stream_index: int,
    request: ScoreRequest,
    stream: Stream,
    layout: Layout,
    block_size: int,
    masked_id: int,
) -> Iterator[Prompt]:
    clean_L = request.clean_ids_L.astype(np.int32)
    noised_L = np.where(stream.masked_L, np.int32(masked_id), clean_L)
    wanted_P = stream.wanted_P
    if not layout.has_clean_half:
        end = len(noised_L)
        if layout is Layout.BLOCK_CAUSAL:
            end = min(end, (int(wanted_P[-1]) // block_size + 1) * block_size)
        yield Prompt(
            request_index=request_index,
            stream_index=stream_index,
            start=0,
            ids_N=noised_L[:end],
            rows_P=wanted_P,
        )
        return
    blocks, starts = np.unique(wanted_P // block_size, return_index=True)
    stops = [*starts[1:], len(wanted_P)]
    for block, start, stop in zip(blocks, starts, stops, strict=True):
        first = int(block) * block_size
        yield Prompt(
            request_index=request_index,
            stream_index=stream_index,
            start=int(start),
            ids_N=np.concatenate([clean_L[:first], noised_L[first : first + block_size]]),
            rows_P=wanted_P[start:stop],
        )
