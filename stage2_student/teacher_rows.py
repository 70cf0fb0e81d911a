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
from stage2_student.losses import HiddenRows, ReplayHead, Tail, TeacherCandidates
from tide_cache import payloads
from tide_cache.cache import Cache
from tide_cache.codec_files import read_codec_bytes, read_tensors
from tide_cache.errors import FormatError
from tide_cache.payload_facts import CandidatesFacts, HiddenFacts
from tide_cache.payloads import CandidatesCodec, Codecs
from tide_cache.payloads.candidates import CODEC_FILE, NO_ID
from tide_cache.payloads.chunks import RawChunks
from tide_cache.payloads.hidden import (
    HEAD_FILE,
    MAX_WEIGHT,
    TRANSFORM_FILE,
    HiddenCodec,
    Transform,
)
from tide_cache.rows import AlignmentKind

_HEAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT_COLUMN: dict[AlignmentKind, str] = {"positions": "align_runs", "chunks": "chunks"}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CandidatesReading:
    """How a `candidates` payload is read: codec, tail, and what the tail needs.

    `mean_logits_V` for `mean` and `mean_student`; `hidden` and `head`, the codec and the output
    head of the payload beside it, for `hidden`.
    """

    codec: CandidatesCodec
    tail: Tail
    mean_logits_V: Tensor | None
    hidden: HiddenCodec | None = None
    head: ReplayHead | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that have to be read."""
        fields = self.codec.fields() + ([] if self.hidden is None else self.hidden.fields())
        return tuple(field.name for field in fields)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherReading:
    """Which payloads of a set are read, and how; those that no loss needs are None.

    `num_draws`: whether to count the draws behind each mask, which only chunks make more than one.
    """

    alignment: AlignmentKind
    candidates: CandidatesReading | None = None
    chunks: RawChunks | None = None
    num_draws: bool = False

    @property
    def codecs(self) -> Codecs:
        """The codecs of the payloads that are read."""
        candidates = self.candidates
        return Codecs(
            candidates=None if candidates is None else candidates.codec,
            chunks=self.chunks,
            hidden=None if candidates is None else candidates.hidden,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that have to be read."""
        found: tuple[str, ...] = ()
        if self.candidates is not None:
            found += self.candidates.columns
        if self.chunks is not None:
            found += tuple(field.name for field in self.chunks.fields())
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
    found = reading.codec.decode(table, num_positions_B)
    facts, logshare_PT = reading.codec.facts, found.tail_logshare_PT
    ids_QK = found.ids_PK.astype(np.int64)
    ids_QK[ids_QK == NO_ID] = facts.vocab_size
    hidden = None
    if reading.hidden is not None and reading.head is not None:
        code_QR = torch.from_numpy(reading.hidden.decode(table, num_positions_B))
        hidden = HiddenRows(code_PR=code_QR, head=reading.head)
    return TeacherCandidates(
        ids_PK=torch.from_numpy(ids_QK),
        logits_PK=torch.from_numpy(np.array(found.logits_PK)),
        logsumexp_PT=torch.from_numpy(np.array(found.logsumexp_PT)),
        tail_logshare_PT=None if logshare_PT is None else torch.from_numpy(np.array(logshare_PT)),
        temperatures=facts.temperatures,
        vocab_size=facts.vocab_size,
        mean_logits_V=reading.mean_logits_V,
        hidden=hidden,
        tail=reading.tail,
    )


def _decode_chunks(
    table: pa.Table, codec: RawChunks, tokens: AlignedTokens, noised: NoisedRows
) -> ChunkTargets:
    logprob_C = codec.decode(table, tokens.num_entries_B)
    return ChunkTargets(
        index_E=torch.from_numpy(tokens.index_E),
        chunk_E=torch.from_numpy(tokens.entry_E),
        logprob_C=torch.from_numpy(np.array(logprob_C)),
        timestep_C=torch.from_numpy(noised.timestep_B[tokens.row_of_entry_C]),
    )


def read_mean_logits(cache: Cache, facts: CandidatesFacts) -> Tensor:
    """Read the teacher's mean logits of a cache, float32 (V,), checked against the manifest.

    Raises FormatError when the file is damaged or its tensor is not what the manifest says.
    """
    tensors = read_tensors(cache.store, cache.manifest.files, CODEC_FILE)
    mean_V = payloads.read_mean_logits(tensors, facts, where=f"{cache.url}/{CODEC_FILE}")
    return torch.from_numpy(mean_V.copy())


def read_replay_head(cache: Cache, facts: HiddenFacts) -> ReplayHead:
    """Read what replays the hidden states of a cache, checked against the manifest.

    The head stays in the type in which it is stored. Raises FormatError as `read_mean_logits`.
    """
    files, where = cache.manifest.files, f"{cache.url}/{HEAD_FILE}"
    transform = Transform.from_tensors(facts, read_tensors(cache.store, files, TRANSFORM_FILE))
    data = read_codec_bytes(cache.store, files, HEAD_FILE)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a type torch lacks
        raise FormatError(f"{where}: not a safetensors file: {error}") from error
    shapes = {"weight": (facts.vocab_size, facts.hidden_size), "bias": (facts.vocab_size,)}
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None and name == "bias":
            continue
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype not in _HEAD_DTYPES:
            raise FormatError(f"{where}: {name}: expected floats of shape {shape}")
        if not bool((tensor.abs() <= MAX_WEIGHT).all()):  # NaN is not, either
            raise FormatError(f"{where}: {name}: expected finite numbers within {MAX_WEIGHT:g}")
    return ReplayHead(
        weight_VD=tensors["weight"],
        bias_V=tensors.get("bias"),
        synthesis_DR=torch.from_numpy(transform.synthesis_DR.copy()),
        mean_D=torch.from_numpy(transform.mean_D.copy()),
        step=facts.step,
    )
