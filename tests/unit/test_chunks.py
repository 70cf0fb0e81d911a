"""Chunks on the ground floor: which are active, whole in masks and halves, and their payload."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.payload_builders import damaged, encode, resealed, sizes, to_cells
from tests.set_builders import random_row
from tide_cache.alignment import chunk_active, chunk_masked, fill, positions_within
from tide_cache.errors import DataError, FormatError
from tide_cache.payload_facts import ChunksFacts
from tide_cache.payloads import num_entries
from tide_cache.payloads.chunks import RawChunks
from tide_cache.rows import check_row, rows_to_table, table_to_rows

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


@pytest.mark.parametrize("version", [1, 2])
@given(
    num=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    draw=st.data(),
)
def test_the_payload_round_trips(version: int, num: list[int], draw: st.DataObject) -> None:
    codec = RawChunks(ChunksFacts(codec_version=version))
    logprobs = st.floats(min_value=float(np.float32(-1e30)), max_value=0.0, width=32)
    values = draw.draw(st.lists(logprobs, min_size=sum(num), max_size=sum(num)))
    logprob_C = np.array(values, dtype=np.float32)
    table = encode(codec, logprob_C, sizes(*num))
    found_C = codec.decode(table, sizes(*num))
    np.testing.assert_array_equal(found_C, logprob_C)
    assert found_C.dtype == np.float32
    last_C = codec.decode(table.slice(len(num) - 1, 1), sizes(num[-1]))
    np.testing.assert_array_equal(last_C, logprob_C[sum(num[:-1]) :])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf, 0.5])
def test_what_is_no_logprob_is_neither_written_nor_read(version: int, bad: float) -> None:
    codec = RawChunks(ChunksFacts(codec_version=version))
    logprob_C = np.array([-0.5, bad], dtype=np.float32)
    with pytest.raises(FormatError, match="chunk_logprob: expected finite log-probabilities"):
        encode(codec, logprob_C, sizes(2))
    table = encode(codec, np.zeros(2, dtype=np.float32), sizes(2))
    cells = to_cells(table) | {"chunk_logprob": [logprob_C.tobytes()]}
    with pytest.raises(FormatError, match="chunk_logprob: expected finite log-probabilities"):
        codec.decode(resealed(cells, table.schema), sizes(2))


def test_a_wrong_length_or_damaged_byte_of_the_payload_is_noticed() -> None:
    codec = RawChunks(ChunksFacts())
    logprob_C = np.array([-0.5, -1e4, 0.0], dtype=np.float32)
    table = encode(codec, logprob_C, sizes(2, 0, 1))
    with pytest.raises(FormatError, match="chunk_logprob: expected 4 bytes, got 8"):
        codec.decode(table, sizes(1, 1, 1))
    for what, spoilt in damaged(table):
        with pytest.raises(FormatError):
            codec.decode(spoilt, sizes(2, 0, 1))
            pytest.fail(what)
