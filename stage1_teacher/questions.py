"""Rows as questions to a teacher, and its answers back at the payload entries they are for.

Shapes: P positions of a stream or of a row, C chunks of a row, K candidates, T temperatures.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from stage1_teacher.premask import teacher_streams
from stage1_teacher.teachers.base import FloatArray, ScoreRequest, Scores, ScoreSpec, Stream
from tide_cache.alignment import payload_positions
from tide_cache.cache import Cache
from tide_cache.payload_facts import CandidatesFacts, RankedFacts
from tide_cache.payloads.candidates import Candidates, keep_top_p
from tide_cache.rows import PremaskedRow, table_to_rows
from tide_cache.shard_checks import check_row_of


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SampleQuestion:
    """All views of one sample as one request, and where each stream's answers belong.

    `slots[s]` = (view, payload entry of each wanted position (P,)) of stream s.
    """

    request: ScoreRequest
    slots: tuple[tuple[int, np.ndarray], ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One stream's answers for a row, and the payload entry that each of them feeds."""

    entry_P: np.ndarray
    scores: Scores


def checked_rows(table: pa.Table, premasked: Cache, view: int) -> list[PremaskedRow]:
    """Take the rows out of a table and check every field. Raises DataError naming the sample."""
    rows = table_to_rows(table, premasked.manifest.alignment)
    for row in rows:
        check_row_of(row, premasked.manifest, view)
    return rows


def ask(views: Sequence[PremaskedRow], *, comp_demo: bool) -> SampleQuestion:
    """Put all views of a sample into one request: one stream per CompDemo half that has answers."""
    streams, slots = [], []
    for view, row in enumerate(views):
        for part in teacher_streams(row, comp_demo=comp_demo):
            if len(part.payload_P):
                streams.append(Stream(masked_L=part.masked_L, wanted_P=part.wanted_P))
                slots.append((view, part.payload_P))
    request = ScoreRequest(
        clean_ids_L=views[0].teacher_ids_L,
        streams=tuple(streams),
        name=f"sample {views[0].sample_id}",
    )
    return SampleQuestion(request=request, slots=tuple(slots))


def ask_student(row: PremaskedRow) -> ScoreRequest:
    """Ask a student about a row's payload positions as training does: all of M masked."""
    wanted_P = payload_positions(row.student_mask_L, row.alignment_RX)
    return ScoreRequest(
        clean_ids_L=row.student_ids_L,
        streams=(Stream(masked_L=row.student_mask_L, wanted_P=wanted_P),),
        name=f"sample {row.sample_id}",
    )


def parts_of(question: SampleQuestion, streams: Sequence[Scores], view: int) -> list[Part]:
    """Return the answers of those streams that belong to a view."""
    return [
        Part(entry_P=entry_P, scores=scores)
        for (of_view, entry_P), scores in zip(question.slots, streams, strict=True)
        if of_view == view
    ]


def merge(parts: Sequence[Part], spec: ScoreSpec, num_positions: int) -> Scores:
    """Put the answers of a row's streams at the payload positions they are for.

    Every position is answered by exactly one stream: the pass in which it was masked.
    """
    together = Scores.concatenate([part.scores for part in parts], spec)
    order_P = entry_order([part.entry_P for part in parts])
    assert len(order_P) == num_positions
    return together.take(order_P)


def entry_order(entries: Sequence[np.ndarray]) -> np.ndarray:
    """Return the order that puts answers, stream after stream, at payload entries 0, 1, 2, …."""
    entry_P = np.concatenate([np.empty(0, np.int64), *entries])
    order_P = np.argsort(entry_P)
    assert np.array_equal(entry_P[order_P], np.arange(len(entry_P)))
    return order_P


def sum_logprobs(parts: Sequence[Part], num_chunks: int) -> FloatArray:
    """Sum log p(true token) over the teacher tokens of each active chunk. Returns float32 (C,).

    Every chunk is answered by exactly one stream, by all its tokens together.
    """
    total_C = np.zeros(num_chunks, dtype=np.float64)
    for part in parts:
        np.add.at(total_C, part.entry_P, part.scores.label_logprob_P)
    return total_C.astype(np.float32)


def as_candidates(scores: Scores, facts: CandidatesFacts) -> Candidates:
    """Return the teacher's answer as codecs take it: `facts.k` ids, or fewer under `top_p`."""
    candidates = Candidates(
        ids_PK=scores.topk_ids_PK[:, : facts.k],
        logits_PK=scores.topk_logits_PK[:, : facts.k],
        logsumexp_PT=scores.logsumexp_PT,
        label_logprob_P=np.minimum(scores.label_logprob_P, 0.0),
    )
    if isinstance(facts, RankedFacts) and facts.top_p is not None and facts.min_k is not None:
        return keep_top_p(
            candidates,
            top_p=facts.top_p,
            min_k=facts.min_k,
            temperature_index=facts.temperatures.index(1.0),
        )
    return candidates
