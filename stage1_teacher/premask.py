"""Noising: which positions of a sample are masked in each view, and what the teacher is shown.

Stage 1 draws every mask once and stores it; building and training only read them. A draw is a pure
function of (seed, sample id, view), so a sample keeps its masks in any mixture, order or worker.
Masks and halves are drawn independently per position (or whole chunk): |A| varies around
demo_ratio |M|, as in the published trainer, instead of being a fixed count.

With two tokenizers the unit is the chunk: one drawn token masks its chunk on both sides, because a
chunk with a token left in sight has no log-prob to compare. Chunk operations use prefix sums
instead of loops: a view of 512 positions costs 45 us with runs and 130 us with 200 chunks.

Shapes: L student positions (L_T teacher), P wanted teacher positions, C chunks, R runs, V views, G
timesteps; X is 3 for runs and 4 for chunks.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tide_cache.alignment import (
    NO_PARTNER,
    Int32Array,
    chunk_active,
    chunk_masked,
    fill,
    payload_positions,
    positions_within,
    teacher_partners,
)
from tide_cache.draws import generator
from tide_cache.geometry import BoolArray
from tide_cache.rows import AlignmentKind, PremaskedRow
from tide_cache.timesteps import FloatArray, draw_timesteps

_CHUNK_WIDTH = 4


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedSample:
    """A conversation as ids of both sides with their alignment, before any mask is drawn.

    The fields mean what they mean in `tide_cache.rows.PremaskedRow`.
    """

    sample_id: str
    source: str
    student_ids_L: Int32Array
    prompt_length: int
    teacher_ids_L: Int32Array
    alignment_RX: Int32Array


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Noising:
    """How masks are drawn: `num_views` timesteps of `grid_G`, and the share of half A."""

    seed: int
    num_views: int
    grid_G: FloatArray
    demo_ratio: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherStream:
    """One noised copy of the teacher's sequence and what is wanted of it.

    `masked_L` bool (L_T,): the teacher sees the mask id there. `wanted_P` int32, ascending: the
    teacher positions to score. `payload_P` int32: the payload entry that each of them feeds, an
    index into `tide_cache.alignment.payload_positions` (runs) or into the active chunks (chunks;
    there all teacher tokens of a chunk feed the same entry).
    """

    masked_L: BoolArray
    wanted_P: Int32Array
    payload_P: Int32Array


def alignment_kind(alignment_RX: Int32Array) -> AlignmentKind:
    """Tell runs (R, 3) from chunks (C, 4)."""
    return "chunks" if alignment_RX.shape[1] == _CHUNK_WIDTH else "positions"


def draw_rows(sample: PreparedSample, noising: Noising) -> list[PremaskedRow]:
    """Draw the timestep, mask and halves of every view of a sample: V rows in order of the views.

    Labelled positions (from `prompt_length` on) are masked with probability t each (TIDE, arXiv
    2604.26951), then masks are spread over chunks.
    """
    timestep_V = draw_timesteps(noising.seed, sample.sample_id, noising.num_views, noising.grid_G)
    return [
        _draw_row(sample, view, timestep, noising)
        for view, timestep in enumerate(timestep_V.tolist())
    ]


def draw_half(
    mask_L: BoolArray,
    alignment_RX: Int32Array,
    *,
    demo_ratio: float,
    seed: int,
    sample_id: str,
    view: int,
) -> BoolArray:
    """Draw CompDemo's half A of a mask: bool (L,), each masked position with `demo_ratio`.

    Chunks go into a half as a whole; masked positions outside all chunks stay out of half A, since
    the teacher never sees them.
    """
    if alignment_kind(alignment_RX) == "positions":
        return mask_L & (_uniform(seed, sample_id, view, "half", len(mask_L)) < demo_ratio)
    in_half_C = _uniform(seed, sample_id, view, "half", len(alignment_RX)) < demo_ratio
    return mask_L & fill(in_half_C, alignment_RX[:, 0], alignment_RX[:, 1], len(mask_L))


def spread_mask(drawn_L: BoolArray, alignment_RX: Int32Array, prompt_length: int) -> BoolArray:
    """Make a drawn mask chunk-consistent: bool (L,).

    Any drawn token of a chunk masks all labelled student tokens of it. Runs leave it as it is.
    """
    if alignment_kind(alignment_RX) == "positions":
        return drawn_L.copy()
    masked_C = chunk_masked(drawn_L, alignment_RX)
    mask_L = drawn_L | fill(masked_C, alignment_RX[:, 0], alignment_RX[:, 1], len(drawn_L))
    mask_L[:prompt_length] = False
    return mask_L


def teacher_mask(row: PremaskedRow) -> BoolArray:
    """Return which teacher positions the whole mask M hides: bool (L_T,).

    A teacher position is masked iff its student partner is, or its chunk is.
    """
    return _stream(row, row.student_mask_L).masked_L


def teacher_streams(row: PremaskedRow, *, comp_demo: bool) -> tuple[TeacherStream, ...]:
    """Return the noised copies of the teacher's sequence that answer a row.

    With CompDemo there are two: the first reveals half A, masks half B and answers for B, the
    second the other way round. Without it one masks all of M. Every payload entry is answered by
    exactly one of them; a stream may want nothing.
    """
    if not comp_demo:
        return (_stream(row, row.student_mask_L),)
    return (
        _stream(row, row.student_mask_L & ~row.half_a_L),
        _stream(row, row.student_mask_L & row.half_a_L),
    )


def _draw_row(sample: PreparedSample, view: int, timestep: float, noising: Noising) -> PremaskedRow:
    num_positions = len(sample.student_ids_L)
    drawn_L = np.zeros(num_positions, dtype=bool)
    num_labelled = num_positions - sample.prompt_length
    drawn_L[sample.prompt_length :] = (
        _uniform(noising.seed, sample.sample_id, view, "mask", num_labelled) < timestep
    )
    mask_L = spread_mask(drawn_L, sample.alignment_RX, sample.prompt_length)
    return PremaskedRow(
        sample_id=sample.sample_id,
        source=sample.source,
        view=view,
        timestep=timestep,
        student_ids_L=sample.student_ids_L,
        prompt_length=sample.prompt_length,
        student_mask_L=mask_L,
        half_a_L=draw_half(
            mask_L,
            sample.alignment_RX,
            demo_ratio=noising.demo_ratio,
            seed=noising.seed,
            sample_id=sample.sample_id,
            view=view,
        ),
        teacher_ids_L=sample.teacher_ids_L,
        alignment_RX=sample.alignment_RX,
    )


def _stream(row: PremaskedRow, part_L: BoolArray) -> TeacherStream:
    """Hide `part_L` (a part of the mask) from the teacher and ask for what it hides."""
    if alignment_kind(row.alignment_RX) == "positions":
        return _stream_of_runs(row, part_L)
    return _stream_of_chunks(row, part_L)


def _stream_of_runs(row: PremaskedRow, part_L: BoolArray) -> TeacherStream:
    partner_L = teacher_partners(row.alignment_RX, len(part_L))
    payload_L = payload_positions(row.student_mask_L, row.alignment_RX)
    payload_P = np.flatnonzero(part_L[payload_L]).astype(np.int32)
    masked_L = np.zeros(len(row.teacher_ids_L), dtype=bool)
    masked_L[partner_L[part_L & (partner_L != NO_PARTNER)]] = True
    wanted_P = partner_L[payload_L[payload_P]]
    return TeacherStream(masked_L=masked_L, wanted_P=wanted_P, payload_P=payload_P)


def _stream_of_chunks(row: PremaskedRow, part_L: BoolArray) -> TeacherStream:
    chunks_C4 = row.alignment_RX
    in_part_C = chunk_masked(part_L, chunks_C4)
    active_C = chunk_active(row.student_mask_L, chunks_C4, row.prompt_length)
    entry_C = np.cumsum(active_C) - 1
    wanted_C = in_part_C & active_C
    start_C, end_C = chunks_C4[:, 2], chunks_C4[:, 3]
    return TeacherStream(
        masked_L=fill(in_part_C, start_C, end_C, len(row.teacher_ids_L)),
        wanted_P=positions_within(start_C[wanted_C], end_C[wanted_C]),
        payload_P=np.repeat(entry_C[wanted_C], (end_C - start_C)[wanted_C]).astype(np.int32),
    )


def _uniform(
    seed: int, sample_id: str, view: int, purpose: str, size: int
) -> npt.NDArray[np.float64]:
    """Draw numbers of [0, 1) from the raw counter output, whose stream numpy never changes."""
    raw = generator(seed, sample_id, view, purpose).bit_generator.random_raw(size)
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53, dtype=np.float64)
