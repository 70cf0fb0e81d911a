"""What the teacher said about the rows of a batch: payload columns into tensors.

Which masked positions a payload speaks of follows from the row alone (its mask and its alignment),
so no length is believed; codecs check every value they decode. With a shared tokenizer a payload
entry stands for one masked position, with two for a chunk of them.

Shapes: B rows, L positions, P masked positions of all rows (row by row), Q those with a payload
entry, K candidates, T temperatures, V vocabulary, R runs, C active chunks, E positions in them.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from stage2_student.columns import BoolArray, Int64Array, list_values, require
from stage2_student.losses import Tail, TeacherCandidates
from tide_cache.cache import Cache
from tide_cache.canonical import sha256_hex
from tide_cache.errors import FormatError
from tide_cache.manifest import CandidatesFacts, ChunksFacts
from tide_cache.payloads import candidates, chunks
from tide_cache.rows import AlignmentKind

_ALIGNMENT_COLUMN: dict[AlignmentKind, str] = {"positions": "align_runs", "chunks": "chunks"}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NoisedRows:
    """Rows as arrays. Positions behind a row's `length_B` are padding: id 0, never masked."""

    ids_BL: Int64Array
    length_B: Int64Array
    masked_BL: BoolArray
    labelled_B: Int64Array
    timestep_B: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CandidatesReading:
    """How a `candidates` payload is read: its tail, and the mean logits that `mean` needs."""

    facts: CandidatesFacts
    tail: Tail
    mean_logits_V: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherReading:
    """Which payloads of a set are read, and how; those that no loss needs are None."""

    alignment: AlignmentKind
    candidates: CandidatesReading | None = None
    chunks: ChunksFacts | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that have to be read."""
        found: tuple[str, ...] = ()
        if self.candidates is not None:
            found += candidates.COLUMNS
        if self.chunks is not None:
            found += chunks.COLUMNS
        return (_ALIGNMENT_COLUMN[self.alignment], *found) if found else ()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChunkTargets:
    """The active chunks of a batch.

    `index_E` int64 into P: the masked positions that lie in active chunks; `chunk_E` int64: which;
    `logprob_C` float32: the teacher's; `timestep_C` float32.
    """

    index_E: Tensor
    chunk_E: Tensor
    logprob_C: Tensor
    timestep_C: Tensor

    def to(self, device: torch.device) -> "ChunkTargets":
        """Return the same chunks on `device`."""
        return ChunkTargets(**{name: getattr(self, name).to(device) for name in self.__slots__})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherRows:
    """The teacher's answers. `index_Q` int64 into P: the positions that `candidates` speaks of."""

    index_Q: Tensor
    candidates: TeacherCandidates | None
    chunks: ChunkTargets | None

    @classmethod
    def none(cls) -> "TeacherRows":
        """Return the answers where nobody asked."""
        return cls(index_Q=torch.empty(0, dtype=torch.int64), candidates=None, chunks=None)

    def to(self, device: torch.device) -> "TeacherRows":
        """Return the same answers on `device`."""
        return TeacherRows(
            index_Q=self.index_Q.to(device),
            candidates=None if self.candidates is None else self.candidates.to(device),
            chunks=None if self.chunks is None else self.chunks.to(device),
        )

    def emptied(self) -> "TeacherRows":
        """Return answers of the same kinds about no position."""
        empty = (
            {name: getattr(self.chunks, name)[:0] for name in ChunkTargets.__slots__}
            if (self.chunks is not None)
            else None
        )
        return replace(
            self,
            index_Q=self.index_Q[:0],
            candidates=None if self.candidates is None else self.candidates.slice(0, 0),
            chunks=None if empty is None else ChunkTargets(**empty),
        )


def decode_teacher(table: pa.Table, noised: NoisedRows, reading: TeacherReading) -> TeacherRows:
    """Decode what `reading` asks for.

    Raises FormatError when an alignment or a payload is out of its bounds or of another size.
    """
    if reading.alignment == "chunks":
        assert reading.candidates is None  # a set of two vocabularies holds none
        tokens = _chunk_tokens(table, noised)
    else:
        tokens = _single_tokens(decode_partners(table, noised), noised)
    index_Q = torch.from_numpy(tokens.index_E)
    return TeacherRows(
        index_Q=index_Q if reading.alignment == "positions" else index_Q[:0],
        candidates=None
        if reading.candidates is None
        else _decode_candidates(table, reading.candidates, tokens.num_entries_B),
        chunks=None
        if reading.chunks is None
        else _decode_chunks(table, reading.chunks, tokens, noised),
    )


def decode_partners(table: pa.Table, noised: NoisedRows) -> BoolArray:
    """Say which student positions have a teacher position, from the column `align_runs`. (B, L).

    The same as `tide_cache.alignment.teacher_partners`, all rows at once. That runs pair equal
    tokens is `verify`'s business: training reads no teacher tokens.
    """
    runs_R3, row_R = _alignment(table, "align_runs", 3)
    start_R, end_R = runs_R3[:, 0], runs_R3[:, 0] + runs_R3[:, 2]
    _require_intervals("align_runs", start_R, end_R, noised.length_B[row_R])
    edges_BL = np.zeros((len(noised.ids_BL), noised.ids_BL.shape[1] + 1), dtype=np.int32)
    np.add.at(edges_BL, (row_R, start_R), 1)
    np.add.at(edges_BL, (row_R, end_R), -1)
    return np.asarray(edges_BL[:, :-1].cumsum(axis=1) > 0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Tokens:
    """The masked positions behind payload entries: index into P and entry of each, row counts."""

    index_E: Int64Array
    entry_E: Int64Array
    row_of_entry_C: Int64Array
    num_entries_B: Int64Array


def _single_tokens(partnered_BL: BoolArray, noised: NoisedRows) -> _Tokens:
    wanted_BL = noised.masked_BL & partnered_BL
    index_E = np.flatnonzero(partnered_BL[noised.masked_BL])
    return _Tokens(
        index_E=index_E,
        entry_E=np.arange(len(index_E)),
        row_of_entry_C=np.nonzero(wanted_BL)[0],
        num_entries_B=wanted_BL.sum(axis=1),
    )


def _chunk_tokens(table: pa.Table, noised: NoisedRows) -> _Tokens:
    """Find the positions of active chunks: masked, and behind the prompt (`chunk_active`)."""
    chunks_C4, row_C = _alignment(table, "chunks", 4)
    start_C, end_C = chunks_C4[:, 0], chunks_C4[:, 1]
    _require_intervals("chunks", start_C, end_C, noised.length_B[row_C])
    num_rows, num_positions = noised.ids_BL.shape
    before_BL = np.zeros((num_rows, num_positions + 1), dtype=np.int64)
    np.cumsum(noised.masked_BL, axis=1, out=before_BL[:, 1:])
    num_masked_C = before_BL[row_C, end_C] - before_BL[row_C, start_C]
    prompt_B = noised.length_B - noised.labelled_B
    active_C = (num_masked_C > 0) & (start_C >= prompt_B[row_C])
    size_C, row_C, start_C = (end_C - start_C)[active_C], row_C[active_C], start_C[active_C]
    # A chunk with a token in sight has no log-prob to compare.
    require((num_masked_C[active_C] == size_C).all(), "student_mask: a part of a chunk")
    entry_E = np.repeat(np.arange(len(size_C)), size_C)
    within_E = np.arange(len(entry_E)) - np.repeat(np.cumsum(size_C) - size_C, size_C)
    position_E = start_C[entry_E] + within_E
    masked_before_B = np.concatenate([[0], np.cumsum(before_BL[:, -1])])[:-1]
    return _Tokens(
        index_E=masked_before_B[row_C[entry_E]] + before_BL[row_C[entry_E], position_E],
        entry_E=entry_E,
        row_of_entry_C=row_C,
        num_entries_B=np.bincount(row_C, minlength=num_rows),
    )


def _decode_candidates(
    table: pa.Table, reading: CandidatesReading, num_positions_B: Int64Array
) -> TeacherCandidates:
    rows = [
        candidates.decode(
            dict(zip(candidates.COLUMNS, values, strict=True)),
            reading.facts,
            num_positions,
            where=f"sample {sample_id}",
        )
        for sample_id, num_positions, *values in zip(
            table["sample_id"].to_pylist(),
            num_positions_B.tolist(),
            *(table[name].to_pylist() for name in candidates.COLUMNS),
            strict=True,
        )
    ]
    ids_QK = np.concatenate([row.ids_PK for row in rows]).astype(np.int64)
    return TeacherCandidates(
        ids_PK=torch.from_numpy(ids_QK),
        logits_PK=torch.from_numpy(np.concatenate([row.logits_PK for row in rows])),
        logsumexp_PT=torch.from_numpy(np.concatenate([row.logsumexp_PT for row in rows])),
        temperatures=reading.facts.temperatures,
        vocab_size=reading.facts.vocab_size,
        mean_logits_V=reading.mean_logits_V,
        tail=reading.tail,
    )


def _decode_chunks(
    table: pa.Table, facts: ChunksFacts, tokens: _Tokens, noised: NoisedRows
) -> ChunkTargets:
    (column,) = chunks.COLUMNS
    logprobs = [
        chunks.decode({column: data}, facts, num_chunks, where=f"sample {sample_id}")
        for sample_id, num_chunks, data in zip(
            table["sample_id"].to_pylist(),
            tokens.num_entries_B.tolist(),
            table[column].to_pylist(),
            strict=True,
        )
    ]
    return ChunkTargets(
        index_E=torch.from_numpy(tokens.index_E),
        chunk_E=torch.from_numpy(tokens.entry_E),
        logprob_C=torch.from_numpy(np.concatenate(logprobs)),
        timestep_C=torch.from_numpy(noised.timestep_B[tokens.row_of_entry_C]),
    )


def read_mean_logits(cache: Cache, facts: CandidatesFacts) -> Tensor:
    """Read the teacher's mean logits of a cache, float32 (V,), checked against the manifest.

    Raises FormatError when the file is damaged or its tensor is not what the manifest says.
    """
    path, name = candidates.MEAN_LOGITS_FILE, candidates.MEAN_LOGITS_TENSOR
    where = f"{cache.url}/{path}"
    listed = {file.path: file.sha256 for file in cache.manifest.files}
    data = cache.store.read_bytes(path)
    if listed.get(path) != sha256_hex(data):
        raise FormatError(
            f"{where}: sha256 mismatch (expected {(listed.get(path) or 'none listed')[:12]}…, got "
            f"{sha256_hex(data)[:12]}…)",
            hint=f"run 'tide-cache verify {cache.url}'",
        )
    try:
        mean_V: Tensor | None = load(data).get(name)
    except SafetensorError as error:
        raise FormatError(f"{where}: not a safetensors file: {error}") from error
    if mean_V is None or mean_V.shape != (facts.vocab_size,) or mean_V.dtype != torch.float32:
        raise FormatError(f"{where}: {name}: expected float32 ({facts.vocab_size},)")
    if not torch.isfinite(mean_V).all():
        raise FormatError(f"{where}: {name}: expected finite numbers")
    return mean_V


def _alignment(table: pa.Table, column: str, width: int) -> tuple[Int64Array, Int64Array]:
    """Return the entries of an alignment column, (N, width), and the row of each."""
    values, count_B = list_values(table[column])
    require(not (count_B % width).any(), f"{column}: expected groups of {width} numbers")
    row = np.repeat(np.arange(len(count_B)), count_B // width)
    return values.reshape(-1, width), row


def _require_intervals(column: str, start: Int64Array, end: Int64Array, length: Int64Array) -> None:
    good = (start >= 0) & (end > start) & (end <= length)
    require(good.all(), f"{column}: an entry outside the sequence")
