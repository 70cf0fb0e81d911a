"""Real masked positions to fit codecs on and to measure them with: rows, hidden states, labels.

Rows come in bit-reversed order of their number, which visits a set evenly however early one stops.
The first are fitted on, the next measured on, those after them are for whoever checks a finished
cache: never the same positions twice.

Shapes: P positions, D hidden size, V shared vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stage1_teacher.hidden_fit import Head
from stage1_teacher.questions import ask, ask_student, checked_rows, entry_order
from stage1_teacher.teachers.base import DROP_HINT, NonFiniteLogitsError, OpenTeacher
from tide_cache.alignment import payload_positions
from tide_cache.cache import Cache
from tide_cache.rows import PremaskedRow, table_to_rows

_ROWS_PER_READ = 64
_VIEW = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChosenRows:
    """Rows of view 0, ascending, and how many payload positions they hold."""

    rows: tuple[int, ...]
    num_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """The teacher at P payload positions, row after row.

    `hidden_PD`: what its head reads, on the CPU; `labels_P` int64 the true ids; `num_positions_B`
    int64 the positions of each row.
    """

    hidden_PD: Tensor
    labels_P: Tensor
    num_positions_B: npt.NDArray[np.int64]

    @property
    def num_positions(self) -> int:
        """P, the number of positions."""
        return len(self.labels_P)


def choose_rows(premasked: Cache, wanted: Sequence[int], *, skip: int = 0) -> list[ChosenRows]:
    """Choose disjoint groups of rows that hold at least `wanted[i]` payload positions each.

    The first `skip` rows of the order are left out. A group may take half of the rows that are
    left and no more, unless it is the last; where a set is too small, groups stay short or empty.
    """
    order = sorted(range(premasked.num_samples), key=lambda row: (_bit_reversed(row), row))[skip:]
    groups: list[ChosenRows] = []
    at = 0
    for number, num_wanted in enumerate(wanted):
        left = len(order) - at
        is_last = number == len(wanted) - 1
        limit = left if is_last else -(-left // 2)
        chosen: list[int] = []
        found = 0
        for row, count in _counts(premasked, order[at : at + limit]):
            if found >= num_wanted:
                break
            chosen.append(row)
            found += count
        at += len(chosen)
        kept = tuple(sorted(chosen)) if found else ()
        groups.append(ChosenRows(rows=kept, num_positions=found))
    return groups


def read_rows(premasked: Cache, chosen: ChosenRows) -> list[PremaskedRow]:
    """Read the chosen rows and check every field."""
    if not chosen.rows:
        return []
    return checked_rows(premasked.read_rows(_VIEW, chosen.rows), premasked, _VIEW)


def sample_teacher(
    teacher: OpenTeacher,
    rows: Sequence[PremaskedRow],
    *,
    comp_demo: bool,
    bad_samples: Literal["fail", "drop"] = "fail",
) -> tuple[Sample, list[PremaskedRow]]:
    """Ask the teacher about rows as a build does; answers in the order of payload entries.

    Returns them with the rows that they are for: without those of which the teacher makes NaN or
    infinity, where these are dropped. Raises NonFiniteLogitsError where they are not.
    """
    questions = [ask([row], comp_demo=comp_demo) for row in rows]
    answers = teacher.hidden_states([question.request for question in questions])
    hidden, labels, counts, kept = [], [], [], []
    for row, question, streams in zip(rows, questions, answers, strict=True):
        order_P = entry_order([entry_P for _, entry_P in question.slots])
        request = question.request
        ids = [request.clean_ids_L[stream.wanted_P] for stream in request.streams]
        if streams:
            hidden_PD = torch.cat(list(streams))
            if not bool(torch.isfinite(hidden_PD).all()):
                if bad_samples == "drop":
                    continue
                raise NonFiniteLogitsError(
                    f"{request.name}: the teacher's hidden states hold NaN or infinity",
                    hint=DROP_HINT,
                )
            hidden.append(hidden_PD[torch.from_numpy(order_P)])
            labels.append(np.concatenate(ids)[order_P])
        counts.append(len(order_P))
        kept.append(row)
    sample = Sample(
        hidden_PD=torch.cat(hidden) if hidden else torch.empty((0, teacher.hidden_size)),
        labels_P=torch.from_numpy(
            np.concatenate([np.empty(0, np.int64), *labels]).astype(np.int64)
        ),
        num_positions_B=np.asarray(counts, dtype=np.int64),
    )
    return sample, kept


def sample_student(student: OpenTeacher, rows: Sequence[PremaskedRow]) -> Tensor:
    """Return what a student's head reads at the same positions, (P, D') on the CPU.

    The student sees its own rendering with the whole mask, as in training.
    """
    answers = student.hidden_states([ask_student(row) for row in rows])
    return torch.cat([streams[0] for streams in answers])


def shared_head(teacher: OpenTeacher, vocab_size: int) -> Head:
    """Return the output head over the shared ids."""
    weight_VD, bias_V = teacher.head()
    return Head(
        weight_VD=weight_VD[:vocab_size],
        bias_V=None if bias_V is None else bias_V[:vocab_size],
    )


def corpus_counts(premasked: Cache, vocab_size: int) -> npt.NDArray[np.int64]:
    """Count how often each id below `vocab_size` stands in the conversations, int64 (V,)."""
    total_V = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, premasked.num_samples, 1024):
        rows = range(start, min(start + 1024, premasked.num_samples))
        column = premasked.read_rows(_VIEW, rows, ["student_ids"])["student_ids"].combine_chunks()
        ids = column.flatten().to_numpy()
        total_V += np.bincount(ids[ids < vocab_size], minlength=vocab_size)
    return total_V


def _counts(premasked: Cache, order: Sequence[int]) -> Iterator[tuple[int, int]]:
    for start in range(0, len(order), _ROWS_PER_READ):
        rows = order[start : start + _ROWS_PER_READ]
        table = premasked.read_rows(_VIEW, rows)
        for row, content in zip(rows, table_to_rows(table, "positions"), strict=True):
            yield row, len(payload_positions(content.student_mask_L, content.alignment_RX))


def _bit_reversed(row: int) -> int:
    return int(f"{row:032b}"[::-1], 2)
