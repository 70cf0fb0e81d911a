"""Which rows a premasked set is made of, decided before the first one is encoded.

One pass over every source gives the identity of each conversation, so that duplicates go before the
mixture is drawn (a cap of 1000 means 1000 different conversations) and every later figure is exact.
Tasks are ranges of the mixture's order. A plan travels to worker processes: 20 bytes a row.

Shapes: R rows, of a source or of the mixture.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stage1_teacher.chat import REFUSALS
from stage1_teacher.conversation_rows import ConversationRows
from stage1_teacher.conversations import DROP_REASONS as ROW_REASONS
from stage1_teacher.encode import DROP_REASONS as ENCODER_REASONS
from stage1_teacher.encode import Encoder
from stage1_teacher.mixture import plan_mixture, source_labels
from stage1_teacher.prepare_config import PrepareConfig
from stage1_teacher.published_alignment import ALIGNMENT_FAULTS
from stage1_teacher.published_alignment import DROP_REASONS as PUBLISHED_REASONS
from stage1_teacher.sources import Source, SourceScan, open_source
from stage1_teacher.task_rows import RowMaker
from tide_cache.errors import DataError
from tide_cache.manifest import SourceFacts

DROP_REASONS: Mapping[str, str] = {
    "duplicate": "the same conversation stands earlier in the data",
    "mixture_cap": "left out by a source's cap",
    "mixture_weight": "left out by the weights of the mixture",
    "over_max_samples": "beyond max_samples",
    **ENCODER_REASONS,
    **REFUSALS,
    **ROW_REASONS,
    **PUBLISHED_REASONS,
}
"""Every reason for which `prepare` drops a row, in words."""

_ADVICE: Mapping[str, str] = {
    "prompt_too_long": "raise student.max_length",
    "teacher_prompt_too_long": "raise teacher.max_length",
    "template_refused": "name a template that allows these roles in chat_template",
    "duplicate": "take the source out: its rows stand in earlier ones",
    "ids_outside_vocabulary": "name the tokenizers that the data was made with",
    **dict.fromkeys(
        ALIGNMENT_FAULTS, "name the tokenizers and chat templates that the data was made with"
    ),
    "nothing_aligned": "raise teacher.max_length, or use templates that do not rewrite the reply",
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowPlan:
    """The rows to encode, in order: row r is row `row_index_R[r]` of `sources[source_index_R[r]]`.

    `facts` and `dropped` say what was taken of each source and what was dropped before encoding.
    """

    sources: tuple[Source, ...]
    source_index_R: npt.NDArray[np.int32]
    row_index_R: npt.NDArray[np.int64]
    facts: tuple[SourceFacts, ...]
    dropped: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.row_index_R)

    def row_maker(self, config: PrepareConfig, encoder: Encoder) -> RowMaker:
        """Return the function that encodes and masks a range of these rows."""
        return ConversationRows(self, config, encoder).make


def task_range(task: int, samples_per_shard: int, num_rows: int) -> range:
    """Return the rows of a plan that a task covers."""
    start = task * samples_per_shard
    return range(start, min(start + samples_per_shard, num_rows))


def plan_rows(config: PrepareConfig) -> RowPlan:
    """Open and scan all sources of a config and draw the mixture.

    Raises DataError for a source without usable rows, and what `open_source` raises.
    """
    assert config.sources is not None
    labels = source_labels(config.sources)
    sources = tuple(
        open_source(source, name=label)
        for source, label in zip(config.sources, labels, strict=True)
    )
    scans = [source.scan() for source in sources]
    unique = unique_rows(scans)
    dropped: Counter[str] = Counter()
    for label, scan, rows in zip(labels, scans, unique, strict=True):
        num_duplicates = int(scan.usable_R.sum()) - len(rows)
        mine = Counter(scan.num_dropped) + Counter(duplicate=num_duplicates)
        if not len(rows):
            raise no_rows_left(label, mine)
        dropped += mine
    mixture = plan_mixture([len(rows) for rows in unique], config.sources, config.seed)
    for share in mixture.shares:
        dropped += Counter(mixture_cap=share.num_over_cap, mixture_weight=share.num_over_weight)
    num_rows = len(mixture.row_index_R)
    num_taken = min(num_rows, config.max_samples or num_rows)
    dropped += Counter(over_max_samples=num_rows - num_taken)
    source_index_R = mixture.source_index_R[:num_taken]
    return RowPlan(
        sources=sources,
        source_index_R=source_index_R,
        row_index_R=_rows_of_sources(unique, source_index_R, mixture.row_index_R[:num_taken]),
        facts=_facts(sources, scans, source_index_R),
        dropped=dropped,
    )


def unique_rows(scans: Sequence[SourceScan]) -> list[npt.NDArray[np.int64]]:
    """Return per source its usable rows whose conversation stands nowhere before them, ascending.

    Sources come in the order given: of two copies the one in the earlier source stays.
    """
    usable = [np.flatnonzero(scan.usable_R) for scan in scans]
    ids_R = np.concatenate([s.sample_id_R[rows] for s, rows in zip(scans, usable, strict=True)])
    _, first = np.unique(ids_R, return_index=True)
    is_first_R = np.zeros(len(ids_R), dtype=bool)
    is_first_R[first] = True
    bounds = np.cumsum([len(rows) for rows in usable])[:-1]
    kept = np.split(is_first_R, bounds)
    return [rows[keep].astype(np.int64) for rows, keep in zip(usable, kept, strict=True)]


def no_rows_left(where: str, dropped: Mapping[str, int]) -> DataError:
    """Return the error for data of which every row was dropped: the counts and what to change."""
    counts = ", ".join(
        f"{reason} {count} ({DROP_REASONS[reason]})" for reason, count in sorted(dropped.items())
    )
    commonest = max(dropped, key=lambda reason: dropped[reason], default="")
    return DataError(
        f"{where}: no rows left: dropped {counts or 'none, and there were none'}",
        hint=_ADVICE.get(
            commonest,
            "check that the columns and roles of the data are what the config says "
            "(messages_column, or prompt_column and response_column)",
        ),
        reason="no_rows_left",
    )


def _rows_of_sources(
    unique: Sequence[npt.NDArray[np.int64]],
    source_index_R: npt.NDArray[np.int32],
    row_index_R: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Turn places among the unique rows of a source into places among all its rows."""
    rows_R = np.empty_like(row_index_R)
    for index, rows in enumerate(unique):
        mine_R = source_index_R == index
        rows_R[mine_R] = rows[row_index_R[mine_R]]
    return rows_R


def _facts(
    sources: Sequence[Source], scans: Sequence[SourceScan], source_index_R: npt.NDArray[np.int32]
) -> tuple[SourceFacts, ...]:
    num_taken = np.bincount(source_index_R, minlength=len(sources)).tolist()
    return tuple(
        SourceFacts(
            name=source.name,
            fingerprint=scan.fingerprint,
            licence=source.license,
            num_rows=len(source),
            num_rows_taken=taken,
        )
        for source, scan, taken in zip(sources, scans, num_taken, strict=True)
    )
