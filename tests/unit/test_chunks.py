"""Chunks on the ground floor: which are active, whole in masks and halves, and their payload."""

import dataclasses

import numpy as np
import pytest

from tests.set_builders import random_row
from tide_cache.alignment import chunk_active, chunk_masked, fill, positions_within
from tide_cache.errors import CompatibilityError, DataError, FormatError
from tide_cache.manifest import ChunksFacts
from tide_cache.payloads import num_entries
from tide_cache.payloads.chunks import decode, encode
from tide_cache.rows import check_row, rows_to_table, table_to_rows

FACTS = ChunksFacts(codec="raw", codec_version=1)
CHUNKS = np.array([[2, 4, 1, 2], [4, 7, 2, 6], [7, 8, 6, 8], [9, 12, 8, 9]], dtype=np.int32)


def flags(*positions: int) -> np.ndarray:
    mask = np.zeros(12, dtype=bool)
    mask[list(positions)] = True
    return mask


ROW = dataclasses.replace(
    random_row(3, 1),
    student_mask_L=flags(4, 5, 6, 8, 9, 10, 11),
    half_a_L=flags(9, 10, 11),
    alignment_RX=CHUNKS,
)


def check(**changes: object) -> None:
    check_row(
        dataclasses.replace(ROW, **changes),  # type: ignore[arg-type]
        alignment="chunks",
        student_vocab_size=40,
        teacher_vocab_size=40,
        num_views=2,
    )


def test_masked_and_active_chunks() -> None:
    assert chunk_masked(ROW.student_mask_L, CHUNKS).tolist() == [False, True, False, True]
    assert chunk_masked(flags(3), CHUNKS).tolist() == [True, False, False, False]
    everything = np.ones(12, dtype=bool)
    assert chunk_active(everything, CHUNKS, 4).tolist() == [False, True, True, True]
    assert num_entries(ROW, "chunks") == 2
    assert positions_within(CHUNKS[:2, 2], CHUNKS[:2, 3]).tolist() == [1, 2, 3, 4, 5]
    assert np.flatnonzero(
        fill(np.array([1, 0, 0, 1], bool), CHUNKS[:, 0], CHUNKS[:, 1], 12)
    ).tolist() == [2, 3, 9, 10, 11]


def test_a_row_of_whole_chunks_passes_and_survives_arrow() -> None:
    check()
    (back,) = table_to_rows(rows_to_table([ROW], "chunks"), "chunks")
    np.testing.assert_array_equal(back.alignment_RX, CHUNKS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student_mask_L": flags(4, 5, 8), "half_a_L": flags()},
            "student_mask: expected whole ch",
        ),
        ({"half_a_L": flags(9)}, "half_a: expected whole chunks"),
        ({"alignment_RX": CHUNKS[[1, 0]]}, "out of order"),
        ({"alignment_RX": np.array([[9, 13, 0, 1]], np.int32)}, r"outside \[0, 12\)"),
        ({"alignment_RX": np.array([[9, 12, 0, 13]], np.int32)}, r"outside \[0, 12\)"),
    ],
)
def test_bounds(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check(**changes)


def test_the_payload_round_trips_and_refuses_what_is_no_logprob() -> None:
    logprob = np.array([-0.5, -1e4, 0.0], dtype=np.float32)
    columns = encode(logprob, FACTS, where="row")
    np.testing.assert_array_equal(decode(columns, FACTS, 3, where="row"), logprob)
    with pytest.raises(FormatError, match="row 7: chunk_logprob: expected 8 bytes, got 12"):
        decode(columns, FACTS, 2, where="row 7")
    for bad in (np.nan, -np.inf, 0.5):
        data = {"chunk_logprob": np.array([bad], "<f4").tobytes()}
        with pytest.raises(FormatError, match="expected finite log-probabilities"):
            decode(data, FACTS, 1, where="row")
    with pytest.raises(CompatibilityError, match="codec 'small' version 1"):
        decode(columns, ChunksFacts(codec="small", codec_version=1), 3, where="row")
