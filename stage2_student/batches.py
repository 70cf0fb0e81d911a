"""Arrow rows into the tensors of one forward: decoded by column, checked before any gather.

Only the columns that the losses need are read, and every number that becomes an index (ids, masks,
lengths, alignment) is held against its bounds first. A row that fails is read again whole, so that
the format's own check names what is wrong with it.

Shapes: B rows, L positions, S = 2 L for [xt, x0], P masked positions of all rows (row by row).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from stage2_student.aligned_rows import NoisedRows
from stage2_student.attention import AttentionMask, AttentionMasks
from stage2_student.columns import Int64Array, bit_masks, list_values, require
from stage2_student.teacher_rows import TeacherReading, TeacherRows, decode_teacher
from tide_cache.cache import Cache
from tide_cache.errors import FormatError
from tide_cache.payloads import check_payloads, num_entries
from tide_cache.rows import table_to_rows
from tide_cache.verify import check_row_of

ROW_COLUMNS = ("sample_id", "student_ids", "prompt_length", "student_mask", "timestep")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """What one forward and its losses need.

    `input_ids_BS` int64 [xt, x0]; `position_ids_1S` int64; `masked_index_P` int64 into the
    flattened (B, S); `labels_P` int64; `timestep_P` float32; `row_P` int64 into B;
    `labelled_per_row_B` int64 counts maskable positions; `teacher` is what it said of them.
    `num_tokens` counts the positions that are no padding.
    """

    input_ids_BS: Tensor
    position_ids_1S: Tensor
    attention_mask: AttentionMask
    masked_index_P: Tensor
    labels_P: Tensor
    timestep_P: Tensor
    row_P: Tensor
    labelled_per_row_B: Tensor
    teacher: TeacherRows
    num_tokens: int

    @property
    def num_masked(self) -> int:
        """P, the number of masked positions."""
        return len(self.labels_P)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on `device` (the mask is made there already)."""
        if device.type == "cpu":
            return self
        names = [name for name in self.__slots__ if isinstance(getattr(self, name), Tensor)]
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved, teacher=self.teacher.to(device))

    def without_targets(self) -> "Batch":
        """Return the same rows with nothing masked: a forward that teaches and counts nothing."""
        per_position = ("masked_index_P", "labels_P", "timestep_P", "row_P")
        return replace(
            self,
            **{name: getattr(self, name)[:0] for name in per_position},
            labelled_per_row_B=self.labelled_per_row_B[:0],
            teacher=self.teacher.emptied(),
            num_tokens=0,
        )


class BatchReader:
    """Reads batches from one set. `teacher` is None where only the tokens themselves are needed."""

    def __init__(
        self,
        cache: Cache,
        *,
        masks: AttentionMasks,
        mask_token_id: int,
        teacher: TeacherReading | None,
    ) -> None:
        self._cache = cache
        self._masks = masks
        self._mask_token_id = mask_token_id
        self._teacher = teacher
        self._columns = (*ROW_COLUMNS, *(teacher.columns if teacher is not None else ()))

    def read(self, view: int, rows: Int64Array) -> Batch:
        """Read some rows of a view as one batch, in the order given; at least one row.

        Raises DataError or FormatError naming the sample and field of a row out of bounds.
        """
        table = self._cache.read_rows(view, rows, self._columns)
        try:
            noised = decode_rows(
                table,
                num_ids=self._cache.manifest.student.vocab_size,
                pad_to=self._masks.padded_length,
            )
            teacher = TeacherRows.none()
            if self._teacher is not None:
                teacher = decode_teacher(table, noised, self._teacher)
        except FormatError:
            self._explain(view, rows)
            raise
        return self._batch(noised, teacher)

    def _batch(self, noised: NoisedRows, teacher: TeacherRows) -> Batch:
        ids_BL, masked_BL = noised.ids_BL, noised.masked_BL
        num_positions = ids_BL.shape[1]
        xt_BL = np.where(masked_BL, self._mask_token_id, ids_BL)
        row_P, position_P = np.nonzero(masked_BL)
        position_L = torch.arange(num_positions)
        return Batch(
            input_ids_BS=torch.from_numpy(np.concatenate([xt_BL, ids_BL], axis=1)),
            position_ids_1S=torch.cat([position_L, position_L])[None],
            attention_mask=self._masks.of(noised.length_B, num_positions),
            masked_index_P=torch.from_numpy(row_P * (2 * num_positions) + position_P),
            labels_P=torch.from_numpy(ids_BL[masked_BL]),
            timestep_P=torch.from_numpy(noised.timestep_B[row_P]),
            row_P=torch.from_numpy(row_P),
            labelled_per_row_B=torch.from_numpy(noised.labelled_B),
            teacher=teacher,
            num_tokens=int(noised.length_B.sum()),
        )

    def _explain(self, view: int, rows: Sequence[int] | Int64Array) -> None:
        """Let the format's own check say what is wrong, if it can."""
        manifest = self._cache.manifest
        table = self._cache.read_rows(view, rows)
        whole = table_to_rows(table, manifest.alignment)
        for row in whole:
            check_row_of(row, manifest, view)
        if self._teacher is not None:
            num_entries_B = np.array([num_entries(row, manifest.alignment) for row in whole])
            for problem in check_payloads(table, self._teacher.codecs, num_entries_B):
                raise FormatError(problem)


def decode_rows(table: pa.Table, *, num_ids: int, pad_to: Callable[[int], int] = int) -> NoisedRows:
    """Decode the columns `ROW_COLUMNS`. `pad_to` maps the longest row's length to L.

    Raises FormatError for any id, length, mask or timestep out of its bounds.
    """
    ids, id_count_B = list_values(table["student_ids"])
    prompt_B = table["prompt_length"].to_numpy().astype(np.int64)
    timestep_B = table["timestep"].to_numpy().astype(np.float32)
    require((id_count_B > 0).all(), "student_ids: a row without ids")
    require(ids.min() >= 0 and ids.max() < num_ids, f"student_ids: ids outside 0..{num_ids - 1}")
    require(
        ((prompt_B >= 0) & (prompt_B <= id_count_B)).all(), "prompt_length: outside the sequence"
    )
    require(((timestep_B > 0) & (timestep_B <= 1)).all(), "timestep: outside (0, 1]")
    num_positions = pad_to(int(id_count_B.max()))
    position_L = np.arange(num_positions)
    ids_BL = np.zeros((len(id_count_B), num_positions), dtype=np.int64)
    ids_BL[position_L < id_count_B[:, None]] = ids
    masked_BL = bit_masks(table["student_mask"], id_count_B, num_positions)
    maskable_BL = (position_L >= prompt_B[:, None]) & (position_L < id_count_B[:, None])
    require(not (masked_BL & ~maskable_BL).any(), "student_mask: set outside the labelled part")
    return NoisedRows(
        ids_BL=ids_BL,
        length_B=id_count_B,
        masked_BL=masked_BL,
        labelled_B=id_count_B - prompt_B,
        timestep_B=timestep_B,
    )
