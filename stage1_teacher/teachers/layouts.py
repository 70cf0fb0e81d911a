"""What the teacher sees: four attention layouts written as data, from one visibility rule.

Each token of a forward carries three integers beside its id and position id: its stream (0 clean,
1.. noised, -1 padding), its block, and its order. A key is visible under the block-diffusion rule
of `tide_cache.geometry`, with two refinements: a noised stream never sees another one, and inside
a stream only keys of the same or a lower order. Every layout is then a choice of those integers:

  layout           sequence          block of xt   order in xt                 order in x0
  block_diffusion  [x0 | xt ...]     position / B  0                           0
  observed_first   [x0 | xt ...]     position / B  observed before masked      position
  bidirectional    [xt]              0             0                           -
  block_causal     [xt]              0             position / B                -

WeDLM's own query (observed_first) reorders each block physically because its kernels are causal;
with an explicit mask and position ids the reorder is the mask, and the tokens stay where they are.

Two exact savings (MATH: "Two savings"): one clean half serves every noised stream of a sample, and
blocks that no wanted position can see are left out. On 256 positions (100 of prompt, blocks of 32)
with 4 views and both halves that is 1458 tokens on average instead of 4096. `passes="separate"`
keeps the plain, whole sequences as reference.

Shapes: L positions of the sample, N tokens of a teacher sequence, P wanted positions.
"""

import dataclasses
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from stage1_teacher.teachers.base import BoolArray, IntArray, ScoreRequest, Stream
from tide_cache.geometry import block_visible, live_blocks

Int32Array = npt.NDArray[np.int32]

CLEAN_STREAM = 0
PADDING_STREAM = -1


class Layout(StrEnum):
    """How a noised sample is shown to the teacher."""

    BLOCK_DIFFUSION = "block_diffusion"
    OBSERVED_FIRST = "observed_first"
    BIDIRECTIONAL = "bidirectional"
    BLOCK_CAUSAL = "block_causal"

    @property
    def has_clean_half(self) -> bool:
        """Say whether noised blocks see earlier blocks clean, from an x0 half."""
        return self in (Layout.BLOCK_DIFFUSION, Layout.OBSERVED_FIRST)

    @property
    def has_blocks(self) -> bool:
        """Say whether the block size means anything in this layout."""
        return self is not Layout.BIDIRECTIONAL


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """The three integers that decide visibility, as equal-shaped int arrays or tensors."""

    stream: Any
    block: Any
    order: Any


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A run of tokens of one forward: int32 vectors (N,) of ids, position ids and roles."""

    ids_N: Int32Array
    position_ids_N: Int32Array
    stream_N: Int32Array
    block_N: Int32Array
    order_N: Int32Array

    def __len__(self) -> int:
        return len(self.ids_N)

    @property
    def roles(self) -> Roles:
        """The integers that `visible` compares."""
        return Roles(stream=self.stream_N, block=self.block_N, order=self.order_N)

    @classmethod
    def concatenate(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """Join runs in order."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Readout:
    """Where one stream's answer stands: `rows_P` are tokens of the sequence, in wanted order."""

    stream_index: int
    rows_P: IntArray


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSequence:
    """One sequence to run, the request it belongs to, and the streams it answers."""

    request_index: int
    tokens: Tokens
    readouts: tuple[Readout, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayoutSpec:
    """A layout with its parameters; `shared` turns the two savings on."""

    layout: Layout
    block_size: int
    mask_token_id: int
    shared: bool


def visible(query: Roles, key: Roles) -> Any:
    """Say for broadcastable queries and keys (numpy or torch) whether the key is visible.

    Padding sees padding only: no real token sees it, and its rows still have something to attend
    to, since a softmax over nothing is NaN.
    """
    query_is_clean, key_is_clean = query.stream == CLEAN_STREAM, key.stream == CLEAN_STREAM
    in_order = (query.stream == key.stream) & (key.order <= query.order)
    from_clean = key_is_clean & (query.stream > CLEAN_STREAM)
    by_block: Any = block_visible(query.block, key.block, query_is_clean, key_is_clean)
    return by_block & (in_order | from_clean)


def visibility_mask(tokens: Tokens) -> BoolArray:
    """Build the attention mask of one sequence. Returns bool (N, N), rows are queries."""
    roles = tokens.roles
    query = Roles(
        stream=roles.stream[:, None], block=roles.block[:, None], order=roles.order[:, None]
    )
    mask: BoolArray = visible(query, roles)
    return mask


def plan_sequences(
    requests: Sequence[ScoreRequest], spec: LayoutSpec, *, max_tokens: int
) -> list[TeacherSequence]:
    """Lay out every stream that has a wanted position; a pure function of its arguments.

    Streams of a request share a sequence (where the layout and `spec.shared` allow) until it
    would pass `max_tokens`; a single stream may be longer than that and then stands alone.
    """
    sequences = []
    for request_index, request in enumerate(requests):
        noised = [
            _noised(index, stream, spec)
            for index, stream in enumerate(request.streams)
            if len(stream.wanted_P)
        ]
        for group in _share(noised, spec, max_tokens):
            sequences.append(_sequence(request_index, request, group, spec))
    return sequences


def clean_tokens(ids_L: IntArray, spec: LayoutSpec, num_positions: int) -> Tokens:
    """Lay out the first `num_positions` positions of the clean half (x0)."""
    position = np.arange(num_positions, dtype=np.int32)
    causal = spec.layout is Layout.OBSERVED_FIRST
    return Tokens(
        ids_N=ids_L[:num_positions].astype(np.int32),
        position_ids_N=position,
        stream_N=np.full(num_positions, CLEAN_STREAM, np.int32),
        block_N=position // np.int32(spec.block_size),
        order_N=position if causal else np.zeros_like(position),
    )


def noised_tokens(
    ids_L: IntArray, masked_L: BoolArray, spec: LayoutSpec, *, stream: int, kept_L: BoolArray
) -> Tokens:
    """Lay out the kept positions of one noised copy (xt) as stream number `stream` (1..)."""
    position = np.flatnonzero(kept_L).astype(np.int32)
    masked = masked_L[position]
    block = position // np.int32(spec.block_size)
    zeros = np.zeros_like(position)
    match spec.layout:
        case Layout.BLOCK_DIFFUSION:
            roles = (block, zeros)
        case Layout.OBSERVED_FIRST:
            offset = position % np.int32(spec.block_size)
            roles = (block, offset + np.int32(spec.block_size) * masked)
        case Layout.BIDIRECTIONAL:
            roles = (zeros, zeros)
        case Layout.BLOCK_CAUSAL:
            roles = (zeros, block)
    return Tokens(
        ids_N=np.where(masked, spec.mask_token_id, ids_L[position]).astype(np.int32),
        position_ids_N=position,
        stream_N=np.full(len(position), stream, np.int32),
        block_N=roles[0],
        order_N=roles[1].astype(np.int32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Noised:
    """A stream with what must run for it: noised positions, and how many leading clean ones."""

    index: int
    stream: Stream
    kept_L: BoolArray
    num_kept: int
    num_clean: int


def _noised(index: int, stream: Stream, spec: LayoutSpec) -> _Noised:
    num_positions = len(stream.masked_L)
    last_wanted_block = int(stream.wanted_P[-1]) // spec.block_size
    kept_L = np.ones(num_positions, dtype=bool)
    num_clean = num_positions if spec.layout.has_clean_half else 0
    if spec.shared:
        if spec.layout.has_clean_half:
            wanted_L = np.zeros(num_positions, dtype=bool)
            wanted_L[stream.wanted_P] = True
            live = live_blocks(wanted_L, spec.block_size)
            kept_L = np.repeat(live, spec.block_size)[:num_positions]
            num_clean = last_wanted_block * spec.block_size
        elif spec.layout is Layout.BLOCK_CAUSAL:
            kept_L[(last_wanted_block + 1) * spec.block_size :] = False
    return _Noised(
        index=index,
        stream=stream,
        kept_L=kept_L,
        num_kept=int(np.count_nonzero(kept_L)),
        num_clean=num_clean,
    )


def _share(noised: Sequence[_Noised], spec: LayoutSpec, max_tokens: int) -> list[list[_Noised]]:
    """Cut the streams of a request into runs that one sequence serves."""
    if not (spec.shared and spec.layout.has_clean_half):
        return [[one] for one in noised]
    groups: list[list[_Noised]] = []
    num_clean = num_noised = 0
    for one in noised:
        num_clean = max(num_clean, one.num_clean)
        num_noised += one.num_kept
        if groups and num_clean + num_noised <= max_tokens:
            groups[-1].append(one)
        else:
            groups.append([one])
            num_clean, num_noised = one.num_clean, one.num_kept
    return groups


def _sequence(
    request_index: int, request: ScoreRequest, group: Sequence[_Noised], spec: LayoutSpec
) -> TeacherSequence:
    ids_L = request.clean_ids_L
    parts = [clean_tokens(ids_L, spec, max(one.num_clean for one in group))]
    readouts = []
    start = len(parts[0])
    for number, one in enumerate(group, start=1):
        masked_L = one.stream.masked_L
        parts.append(noised_tokens(ids_L, masked_L, spec, stream=number, kept_L=one.kept_L))
        row_of_position_L = start + np.cumsum(one.kept_L) - 1
        rows_P = row_of_position_L[one.stream.wanted_P]
        readouts.append(Readout(stream_index=one.index, rows_P=rows_P))
        start += one.num_kept
    return TeacherSequence(
        request_index=request_index,
        tokens=Tokens.concatenate(parts),
        readouts=tuple(readouts),
    )
