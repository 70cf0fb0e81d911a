"""What a teacher says about a masked position, and how it is stored: one module a payload or codec.

A codec has `fields`, `encode` and `decode`, which work on the answers of many rows end to end.
Each payload has so many entries a row, which follow from the row alone (`num_entries`), so that a
length never has to be believed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tide_cache.alignment import chunk_active, payload_positions
from tide_cache.codec_files import Tensors, read_tensors
from tide_cache.errors import FormatError
from tide_cache.manifest import CacheHeader, CacheManifest
from tide_cache.payload_facts import (
    CandidatesFacts,
    HiddenFacts,
    PayloadFacts,
    RankedFacts,
)
from tide_cache.payloads.candidates import (
    CODEC_FILE,
    MAX_LOGIT,
    MEAN_LOGITS_TENSOR,
    RANKS_TENSOR,
    Candidates,
    check_masses,
)
from tide_cache.payloads.candidates_ranked import RankedCandidates, ranked_fields
from tide_cache.payloads.candidates_raw import RawCandidates
from tide_cache.payloads.chunks import RawChunks
from tide_cache.payloads.flat import Float32Array, Int64Array
from tide_cache.payloads.hidden import (
    HEAD_FILE,
    TRANSFORM_FILE,
    HiddenCodec,
    Transform,
    read_head,
)
from tide_cache.rows import AlignmentKind, PremaskedRow
from tide_cache.store import Store

CandidatesCodec = RawCandidates | RankedCandidates
_CELLS_AT_ONCE = 1 << 22
Codec = CandidatesCodec | RawChunks | HiddenCodec


@dataclass(frozen=True, kw_only=True, slots=True)
class Codecs:
    """The codecs of a cache, those that it has."""

    candidates: CandidatesCodec | None = None
    chunks: RawChunks | None = None
    hidden: HiddenCodec | None = None

    @property
    def present(self) -> list[Codec]:
        """The codecs in the order in which payloads follow each other in a row."""
        return [codec for codec in (self.candidates, self.chunks, self.hidden) if codec is not None]

    def fields(self) -> list[pa.Field]:
        """Return the Arrow fields that the payloads add to a row."""
        return [field for codec in self.present for field in codec.fields()]


def make_codecs(payloads: Sequence[PayloadFacts], candidate_tensors: Tensors | None) -> Codecs:
    """Make the codecs of the given payloads; `ranked` needs the tensors of its file."""
    made: dict[str, Any] = {}
    for facts in payloads:
        if isinstance(facts, RankedFacts):
            ranks = (candidate_tensors or {}).get(RANKS_TENSOR)
            if ranks is None:
                raise FormatError(f"{CODEC_FILE}: expected a tensor {RANKS_TENSOR!r}, got none")
            made["candidates"] = RankedCandidates(facts, ranks)
        elif isinstance(facts, CandidatesFacts):
            made["candidates"] = RawCandidates(facts)
        elif isinstance(facts, HiddenFacts):
            made["hidden"] = HiddenCodec(facts)
        else:
            made["chunks"] = RawChunks(facts)
    return Codecs(**made)


def open_codecs(store: Store, manifest: CacheManifest) -> Codecs:
    """Make the codecs of a finished cache, its codec files checked against the manifest.

    Raises FormatError where a file is damaged, missing or not what the payloads need.
    """
    tensors = None
    if any(isinstance(facts, RankedFacts) for facts in manifest.payloads):
        tensors = read_tensors(store, manifest.files, CODEC_FILE)
    return make_codecs(manifest.payloads, tensors)


def check_codec_files(store: Store, manifest: CacheManifest) -> None:
    """Raise FormatError unless every codec file that the payloads need is there and sound."""
    for path in codec_paths(manifest.payloads):
        where = f"{store.url}/{path}"
        tensors = read_tensors(store, manifest.files, path)
        for facts in manifest.payloads:
            if path == CODEC_FILE and isinstance(facts, CandidatesFacts):
                if facts.mean_logits_positions:
                    read_mean_logits(tensors, facts, where=where)
                make_codecs([facts], tensors)
            elif path == TRANSFORM_FILE and isinstance(facts, HiddenFacts):
                Transform.from_tensors(facts, tensors)
            elif path == HEAD_FILE and isinstance(facts, HiddenFacts):
                read_head(tensors, facts, where=where)


def payload_fields(header: CacheHeader) -> list[pa.Field]:
    """Return the Arrow fields that the payloads of a cache add to a row, in order."""
    return [field for facts in header.payloads for field in _field_source(facts)]


def codec_paths(payloads: Sequence[PayloadFacts]) -> tuple[str, ...]:
    """Return the codec files that a cache of these payloads has."""
    paths: list[str] = []
    for facts in payloads:
        if isinstance(facts, HiddenFacts):
            paths += [HEAD_FILE, TRANSFORM_FILE]
        elif isinstance(facts, RankedFacts) or (
            isinstance(facts, CandidatesFacts) and facts.mean_logits_positions
        ):
            paths.append(CODEC_FILE)
    return tuple(sorted(paths))


def read_mean_logits(tensors: Tensors, facts: CandidatesFacts, *, where: str) -> Float32Array:
    """Return the teacher's mean logits, float32 (V,). Raises FormatError unless they are sound."""
    mean_V = tensors.get(MEAN_LOGITS_TENSOR)
    if mean_V is None or mean_V.shape != (facts.vocab_size,) or mean_V.dtype != np.float32:
        raise FormatError(f"{where}: {MEAN_LOGITS_TENSOR}: expected float32 ({facts.vocab_size},)")
    if not (np.abs(mean_V) <= MAX_LOGIT).all():  # NaN is not, either
        raise FormatError(f"{where}: {MEAN_LOGITS_TENSOR}: expected finite numbers")
    return mean_V


def num_entries(row: PremaskedRow, alignment: AlignmentKind) -> int:
    """Return how many entries each payload of a row has: payload positions or active chunks."""
    if alignment == "positions":
        return len(payload_positions(row.student_mask_L, row.alignment_RX))
    return int(chunk_active(row.student_mask_L, row.alignment_RX, row.prompt_length).sum())


def check_payloads(table: pa.Table, codecs: Codecs, num_entries_B: Int64Array) -> list[str]:
    """Return a line for every row whose payloads do not decode within their bounds.

    A few rows at a time, so that what is decoded of a row group never lies in memory as a whole.
    """
    problems = []
    for codec in codecs.present:
        for start, stop in _slices(num_entries_B * _width(codec)):
            num_B = num_entries_B[start:stop]
            try:
                _check(codec, table.slice(start, stop - start), num_B)
            except FormatError:
                problems += _row_by_row(table.slice(start, stop - start), codec, num_B)
    return problems


def _check(codec: Codec, table: pa.Table, num_entries_B: Int64Array) -> None:
    found = codec.decode(table, num_entries_B)
    if isinstance(found, Candidates):
        assert isinstance(codec, RawCandidates | RankedCandidates)
        check_masses(found, codec.facts)


def _row_by_row(table: pa.Table, codec: Codec, num_entries_B: Int64Array) -> list[str]:
    problems = []
    for row in range(table.num_rows):
        try:
            _check(codec, table.slice(row, 1), num_entries_B[row : row + 1])
        except FormatError as error:
            sample, view = table["sample_id"][row], table["view"][row]
            problems.append(f"sample {sample} view {view}: {error.message}")
    return problems


def _width(codec: Codec) -> int:
    """Return how many numbers an entry has when it is decoded."""
    if isinstance(codec, HiddenCodec):
        return codec.facts.num_components
    return 1 if isinstance(codec, RawChunks) else codec.facts.k


def _slices(size_B: Int64Array) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of at most `_CELLS_AT_ONCE` numbers; a larger row stands alone."""
    start = total = 0
    for row, size in enumerate(size_B.tolist()):
        if row > start and total + size > _CELLS_AT_ONCE:
            yield start, row
            start, total = row, 0
        total += size
    if start < len(size_B):
        yield start, len(size_B)


def _field_source(facts: PayloadFacts) -> list[pa.Field]:
    if isinstance(facts, RankedFacts):
        return ranked_fields(facts)
    return make_codecs([facts], None).fields()
