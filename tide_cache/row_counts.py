"""What a manifest counts of rows: samples, rows, positions, masks, payload entries."""

from collections import Counter
from collections.abc import Sequence

from tide_cache.alignment import chunk_active, payload_positions
from tide_cache.rows import PremaskedRow


def count_rows(rows_V: Sequence[Sequence[PremaskedRow]]) -> Counter[str]:
    """Count what a manifest says of rows: samples, rows, positions, masks, payload entries."""
    counts: Counter[str] = Counter(num_samples=len(rows_V[0]))
    for row in (row for rows in rows_V for row in rows):
        counts["num_rows"] += 1
        counts["num_positions"] += len(row.student_ids_L)
        counts["num_labelled_positions"] += len(row.student_ids_L) - row.prompt_length
        counts["num_masked_positions"] += int(row.student_mask_L.sum())
        counts["num_rows_without_mask"] += not row.student_mask_L.any()
        if row.alignment_RX.shape[1] == 3:
            positions_P = payload_positions(row.student_mask_L, row.alignment_RX)
            counts["num_payload_positions"] += len(positions_P)
        else:
            active_C = chunk_active(row.student_mask_L, row.alignment_RX, row.prompt_length)
            counts["num_active_chunks"] += int(active_C.sum())
    return counts
