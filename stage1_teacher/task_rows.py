"""What any kind of input is to `prepare`: a number of rows, and a maker of the rows of a task.

Three kinds exist: conversations (`prepare_plan.RowPlan`), published rows that come tokenised
(`published.PublishedRows`) and rows masked elsewhere (`outside_rows.OutsideRows`). A plan is
decided once and travels to worker processes; each worker makes its own row maker from it.

Shapes: V views, S samples.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from stage1_teacher.encode import EncodedSample, Encoder
from stage1_teacher.premask import Noising, draw_rows
from stage1_teacher.prepare_config import PrepareConfig
from tide_cache.errors import DataError
from tide_cache.manifest import SourceFacts
from tide_cache.rows import PremaskedRow

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskRows:
    """What a worker made of one task: `rows_V[v][s]` is view v of sample s."""

    rows_V: Sequence[Sequence[PremaskedRow]]
    counts: Counter[str]
    dropped: Counter[str]


RowMaker = Callable[[range], TaskRows]


class PlannedRows(Protocol):
    """The rows of an input, decided before the first one is made; picklable."""

    @property
    def facts(self) -> tuple[SourceFacts, ...]:
        """What was taken of each source."""

    @property
    def dropped(self) -> Mapping[str, int]:
        """What was dropped before encoding, by reason."""

    def __len__(self) -> int:
        """How many rows there are to make."""

    def row_maker(self, config: PrepareConfig, encoder: Encoder) -> RowMaker:
        """Return the function that makes a range of these rows."""


class SampleCollector:
    """Encodes samples one by one, draws their views, and counts what cannot be used."""

    def __init__(self, config: PrepareConfig) -> None:
        self._noising = Noising(
            seed=config.seed,
            num_views=config.num_views,
            grid_G=config.timesteps.grid(),
            demo_ratio=config.demo_ratio,
        )
        self._rows_V: list[list[PremaskedRow]] = [[] for _ in range(config.num_views)]
        self._counts: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()

    def add(self, encode: Callable[[], EncodedSample], *, sample_id: str, source: str) -> None:
        """Encode a sample and draw its views; a DataError drops it under its reason."""
        try:
            encoded = encode()
        except DataError as error:
            self._dropped[error.reason] += 1
            logger.info("%s: sample %s dropped (%s): %s", source, sample_id, error.reason, error)
            return
        self._counts += encoded.counts
        for rows, row in zip(self._rows_V, draw_rows(encoded.sample, self._noising), strict=True):
            rows.append(row)

    def collected(self) -> TaskRows:
        """Return everything that was added."""
        return TaskRows(rows_V=self._rows_V, counts=self._counts, dropped=self._dropped)
