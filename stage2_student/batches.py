"""Arrow rows into the tensors of one forward: decoded by column, checked before any gather.

Only the columns that the losses need are read, and every number that becomes an index (ids, masks,
lengths, alignment) is held against its bounds first. A row that fails is read again whole, so that
the format's own check names what is wrong with it.

Shapes: B rows, L positions, N packed tokens, P masked positions of all rows (row by row).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from stage2_student.aligned_rows import NoisedRows
from stage2_student.attention import AttentionMask, make_mask, tile_size
from stage2_student.columns import Int64Array, bit_masks, list_values, require
from stage2_student.packing import pack_rows
from stage2_student.teacher_rows import TeacherReading, TeacherRows, decode_teacher
from tide_cache.cache import Cache
from tide_cache.errors import FormatError
from tide_cache.payloads import check_payloads, num_entries
from tide_cache.rows import MAX_POSITIONS, table_to_rows
from tide_cache.shard_checks import check_row_of

ROW_COLUMNS = ("sample_id", "student_ids", "prompt_length", "student_mask", "timestep")


@dataclass(frozen=True, kw_only=True, slots=True)
class InputForm:
    """In which form a student takes its input: mask token, blocks, attention and device.

    `attention` is the name by which transformers knows the implementation (`attention`).
    """

    block_size: int
    mask_token_id: int
    attention: str
    device: torch.device


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """What one forward and its losses need.

    `input_ids_1N` and `position_ids_1N` int64, rows packed end to end (`packing`);
    `masked_index_P` int64 into N; `labels_P` int64; `timestep_P` float32; `row_P` int64 into B;
    `labelled_per_row_B` int64 counts maskable positions; `teacher` is what it said of them.
    `num_tokens` counts the positions of the rows, `num_filled` those of N that are nobody's.
    """

    input_ids_1N: Tensor
    position_ids_1N: Tensor
    attention_mask: AttentionMask
    masked_index_P: Tensor
    labels_P: Tensor
    timestep_P: Tensor
    row_P: Tensor
    labelled_per_row_B: Tensor
    teacher: TeacherRows
    num_tokens: int
    num_filled: int

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
        form: InputForm,
        teacher: TeacherReading | None,
    ) -> None:
        self._cache = cache
        self._form = form
        self._teacher = teacher
        self._columns = (*ROW_COLUMNS, *(teacher.columns if teacher is not None else ()))

    def read(self, view: int, rows: Int64Array) -> Batch:
        """Read some rows of a view as one batch, in the order given; at least one row.

        Raises DataError or FormatError naming the sample and field of a row out of bounds.
        """
        table = self._cache.read_rows(view, rows, self._columns)
        try:
            noised = decode_rows(table, num_ids=self._cache.manifest.student.vocab_size)
            teacher = TeacherRows.none()
            if self._teacher is not None:
                teacher = decode_teacher(table, noised, self._teacher)
        except FormatError:
            self._explain(view, rows)
            raise
        return assemble(noised, teacher, self._form)

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


def assemble(noised: NoisedRows, teacher: TeacherRows, form: InputForm) -> Batch:
    """Put rows and what the teacher said of them into one batch, packed."""
    masked_BL = noised.masked_BL
    packed = pack_rows(
        noised,
        block_size=form.block_size,
        mask_token_id=form.mask_token_id,
        tile=tile_size(form.attention),
    )
    row_P = np.nonzero(masked_BL)[0]
    return Batch(
        input_ids_1N=torch.from_numpy(packed.ids_N)[None],
        position_ids_1N=torch.from_numpy(packed.position_N)[None],
        attention_mask=make_mask(packed.places, implementation=form.attention, device=form.device),
        masked_index_P=torch.from_numpy(packed.masked_index_P),
        labels_P=torch.from_numpy(noised.ids_BL[masked_BL]),
        timestep_P=torch.from_numpy(noised.timestep_B[row_P]),
        row_P=torch.from_numpy(row_P),
        labelled_per_row_B=torch.from_numpy(noised.labelled_B),
        teacher=teacher,
        num_tokens=int(noised.length_B.sum()),
        num_filled=packed.num_filled,
    )


def decode_rows(table: pa.Table, *, num_ids: int) -> NoisedRows:
    """Decode the columns `ROW_COLUMNS`. L is the length of the longest row.

    Raises FormatError for any id, length, mask or timestep out of its bounds.
    """
    ids, id_count_B = list_values(table["student_ids"])
    prompt_B = table["prompt_length"].to_numpy().astype(np.int64)
    timestep_B = table["timestep"].to_numpy().astype(np.float32)
    require((id_count_B > 0).all(), "student_ids: a row without ids")
    require((id_count_B <= MAX_POSITIONS).all(), f"student_ids: more than {MAX_POSITIONS} ids")
    require(ids.min() >= 0 and ids.max() < num_ids, f"student_ids: ids outside 0..{num_ids - 1}")
    require(
        ((prompt_B >= 0) & (prompt_B <= id_count_B)).all(), "prompt_length: outside the sequence"
    )
    require(((timestep_B > 0) & (timestep_B <= 1)).all(), "timestep: outside (0, 1]")
    num_positions = int(id_count_B.max())
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
