"""What a teacher says about a masked position, and how it is stored: one module a payload.

A payload module has `COLUMNS`, `payload_fields`, `encode` and `decode`. Each payload has so many
entries a row, which follow from the row alone (`num_entries`), so that a length never has to be
believed.
"""

import pyarrow as pa

from tide_cache.alignment import chunk_active, payload_positions
from tide_cache.manifest import CacheHeader, CandidatesFacts, ChunksFacts
from tide_cache.payloads import candidates, chunks
from tide_cache.rows import AlignmentKind, PremaskedRow


def payload_fields(header: CacheHeader) -> list[pa.Field]:
    """Return the Arrow fields that the payloads of a cache add to a row, in order."""
    fields: list[pa.Field] = []
    for facts in header.payloads:
        module = candidates if isinstance(facts, CandidatesFacts) else chunks
        fields += module.payload_fields()
    return fields


def num_entries(row: PremaskedRow, alignment: AlignmentKind) -> int:
    """Return how many entries each payload of a row has: payload positions or active chunks."""
    if alignment == "positions":
        return len(payload_positions(row.student_mask_L, row.alignment_RX))
    return int(chunk_active(row.student_mask_L, row.alignment_RX, row.prompt_length).sum())


def check_payload(
    columns: dict[str, bytes], facts: CandidatesFacts | ChunksFacts, num: int, *, where: str
) -> None:
    """Raise FormatError unless a row's payload of `num` entries decodes within its bounds."""
    if isinstance(facts, CandidatesFacts):
        candidates.decode(columns, facts, num, where=where)
    else:
        chunks.decode(columns, facts, num, where=where)
