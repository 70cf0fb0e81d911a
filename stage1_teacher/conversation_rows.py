"""The rows of planned conversations: read from their sources, encoded and masked, range by range.

Reading goes source by source, since a source reads many rows at a time much faster than one by
one; the mixture's order is restored before encoding, so that a task's rows stand in that order.
"""

from typing import TYPE_CHECKING

import numpy as np

from stage1_teacher.encode import Encoder
from stage1_teacher.prepare_config import PrepareConfig
from stage1_teacher.sources import Conversation, Dropped, sample_id
from stage1_teacher.task_rows import SampleCollector, TaskRows

if TYPE_CHECKING:
    from stage1_teacher.prepare_plan import RowPlan


class ConversationRows:
    """Reads, encodes and masks ranges of a row plan; one per worker."""

    def __init__(self, rows: "RowPlan", config: PrepareConfig, encoder: Encoder) -> None:
        self._rows = rows
        self._config = config
        self._encoder = encoder

    def make(self, rows: range) -> TaskRows:
        """Return the rows of a range of the plan; rows that cannot be encoded are counted."""
        collector = SampleCollector(self._config)
        for source, conversation in self._read(rows):
            assert isinstance(conversation, Conversation)  # the plan holds usable rows only
            messages, identity = conversation.messages, sample_id(conversation.messages)
            collector.add(
                lambda m=messages, i=identity, s=source: self._encoder.encode(  # type: ignore[misc]
                    m, sample_id=i, source=s
                ),
                sample_id=identity,
                source=source,
            )
        return collector.collected()

    def _read(self, rows: range) -> list[tuple[str, Conversation | Dropped]]:
        """Read rows of the plan in order, each source's together."""
        source_index_R = self._rows.source_index_R[rows.start : rows.stop]
        row_index_R = self._rows.row_index_R[rows.start : rows.stop]
        found: list[tuple[str, Conversation | Dropped]] = [("", Dropped(reason=""))] * len(rows)
        for index in np.unique(source_index_R).tolist():
            source = self._rows.sources[index]
            places = np.flatnonzero(source_index_R == index)
            conversations = source.conversations(row_index_R[places].tolist())
            for place, conversation in zip(places.tolist(), conversations, strict=True):
                found[place] = (source.name, conversation)
        return found
