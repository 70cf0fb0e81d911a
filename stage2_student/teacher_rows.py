"""What the teacher said about the rows of a batch: payload columns into tensors.

Which masked positions a payload speaks of follows from the row alone (`aligned_rows`), so no length
is believed; codecs check every value they decode. With a shared tokenizer a payload entry stands
for one masked position, with two for a chunk of them.

Shapes: B rows, P masked positions of all rows (row by row), Q those with a payload entry, K
candidates, T temperatures, V vocabulary, C active chunks, E positions in them.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from stage2_student.aligned_rows import (
    AlignedTokens,
    NoisedRows,
    chunk_tokens,
    count_draws,
    decode_chunks,
    decode_partners,
    partnered_tokens,
)
from stage2_student.columns import Int64Array
from stage2_student.losses import Tail, TeacherCandidates
from tide_cache.cache import Cache
from tide_cache.canonical import sha256_hex
from tide_cache.errors import FormatError
from tide_cache.manifest import CandidatesFacts, ChunksFacts
from tide_cache.payloads import candidates, chunks
from tide_cache.rows import AlignmentKind

_ALIGNMENT_COLUMN: dict[AlignmentKind, str] = {"positions": "align_runs", "chunks": "chunks"}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CandidatesReading:
    """How a `candidates` payload is read: its tail, and the mean logits that `mean` needs."""

    facts: CandidatesFacts
    tail: Tail
    mean_logits_V: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherReading:
    """Which payloads of a set are read, and how; those that no loss needs are None.

    `num_draws`: whether to count the draws behind each mask, which only chunks make more than one.
    """

    alignment: AlignmentKind
    candidates: CandidatesReading | None = None
    chunks: ChunksFacts | None = None
    num_draws: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that have to be read."""
        found: tuple[str, ...] = ()
        if self.candidates is not None:
            found += candidates.COLUMNS
        if self.chunks is not None:
            found += chunks.COLUMNS
        if not found and not self.num_draws:
            return ()
        return (_ALIGNMENT_COLUMN[self.alignment], *found)


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
    """The teacher's answers, and what its tokenizer did to the masks.

    `index_Q` int64 into P: the positions that `candidates` speaks of. `num_draws_P` int64: of how
    many tokens a draw hides each masked position; None where nobody asked, or where it is always 1.
    """

    index_Q: Tensor
    candidates: TeacherCandidates | None
    chunks: ChunkTargets | None
    num_draws_P: Tensor | None = None

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
            num_draws_P=None if self.num_draws_P is None else self.num_draws_P.to(device),
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
            num_draws_P=None if self.num_draws_P is None else self.num_draws_P[:0],
        )


def decode_teacher(table: pa.Table, noised: NoisedRows, reading: TeacherReading) -> TeacherRows:
    """Decode what `reading` asks for, which may be nothing.

    Raises FormatError when an alignment or a payload is out of its bounds or of another size.
    """
    if not reading.columns:
        return TeacherRows.none()
    num_draws_P = None
    if reading.alignment == "chunks":
        assert reading.candidates is None  # a set of two vocabularies holds none
        row_chunks = decode_chunks(table, noised)
        tokens = chunk_tokens(row_chunks, noised)
        if reading.num_draws:
            num_draws_BL = count_draws(row_chunks, noised)
            num_draws_P = torch.from_numpy(num_draws_BL[noised.masked_BL])
    else:
        tokens = partnered_tokens(decode_partners(table, noised), noised)
    index_Q = torch.from_numpy(tokens.index_E)
    return TeacherRows(
        index_Q=index_Q if reading.alignment == "positions" else index_Q[:0],
        candidates=None
        if reading.candidates is None
        else _decode_candidates(table, reading.candidates, tokens.num_entries_B),
        chunks=None
        if reading.chunks is None
        else _decode_chunks(table, reading.chunks, tokens, noised),
        num_draws_P=num_draws_P,
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
    table: pa.Table, facts: ChunksFacts, tokens: AlignedTokens, noised: NoisedRows
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
