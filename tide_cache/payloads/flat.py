"""Payload columns as flat arrays: all rows of a batch end to end, and how many items each row has.

A row's payload is a run of bytes (binary columns) or of float32 numbers (list columns, whose
Parquet encoding splits them into byte planes and which any tool can read). Codecs work on the
concatenation of all rows, so there is no loop over rows in Python; lengths come from the column's
own offsets and are compared with what the rows say before they shape anything.

Shapes: B rows.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tide_cache.errors import FormatError

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

FLOAT_LIST = pa.list_(pa.field("element", pa.float32(), nullable=False))


def bytes_field(name: str) -> pa.Field:
    """Return the field of a binary payload column."""
    return pa.field(name, pa.binary(), nullable=False)


def floats_field(name: str) -> pa.Field:
    """Return the field of a column of float32 lists."""
    return pa.field(name, FLOAT_LIST, nullable=False)


def crc_field(name: str) -> pa.Field:
    """Return the field of a payload's checksum."""
    return pa.field(name, pa.uint32(), nullable=False)


def bytes_column(values: npt.NDArray[Any], counts_B: Int64Array) -> pa.Array:
    """Make a binary column of which row b holds the next `counts_B[b]` bytes of `values`."""
    data = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    offsets = _offsets(counts_B)
    assert offsets[-1] == len(data)
    return pa.Array.from_buffers(
        pa.binary(), len(counts_B), [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )


def floats_column(values: npt.NDArray[Any], counts_B: Int64Array) -> pa.Array:
    """Make a column of float32 lists of which row b holds the next `counts_B[b]` numbers."""
    flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
    offsets = _offsets(counts_B)
    assert offsets[-1] == len(flat)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=FLOAT_LIST)


def read_bytes(table: pa.Table, name: str, counts_B: Int64Array) -> UInt8Array:
    """Return a binary column end to end. Raises FormatError unless row b has counts_B[b] bytes."""
    array = _one_chunk(table, name, pa.binary())
    offsets = np.frombuffer(array.buffers()[1], dtype=np.int32)
    offsets = offsets[array.offset : array.offset + len(array) + 1].astype(np.int64)
    _require_counts(name, "bytes", np.diff(offsets), counts_B)
    if offsets[0] == offsets[-1]:
        return np.empty(0, dtype=np.uint8)
    return np.frombuffer(array.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]]


def read_floats(table: pa.Table, name: str, counts_B: Int64Array) -> Float32Array:
    """Return a float32 list column end to end. Raises FormatError as `read_bytes` does."""
    array = _one_chunk(table, name, FLOAT_LIST)
    offsets = array.offsets.to_numpy().astype(np.int64)
    _require_counts(name, "numbers", np.diff(offsets), counts_B)
    values = array.values
    if values.null_count:
        raise FormatError(f"{name}: expected numbers, got a missing value")
    flat: Float32Array = values.to_numpy(zero_copy_only=False)
    return flat[offsets[0] : offsets[-1]]


def read_crcs(table: pa.Table, name: str) -> npt.NDArray[np.uint32]:
    """Return a column of checksums."""
    crcs_B: npt.NDArray[np.uint32] = _one_chunk(table, name, pa.uint32()).to_numpy()
    return crcs_B


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One column end to end and the items of each row of it, for a checksum."""

    values: npt.NDArray[Any]
    counts_B: Int64Array


def checksums(parts: Sequence[Part], num_rows: int) -> npt.NDArray[np.uint32]:
    """Return the CRC-32 of each row's bytes, columns in the order given. Returns uint32 (B,).

    Guards what page checksums do not see: a payload that was damaged before it was written or
    after it was read. It is no protection against people; sha256 and signatures are.
    """
    crcs = [0] * num_rows
    for part in parts:
        data = np.ascontiguousarray(part.values).view(np.uint8).reshape(-1).data
        size = part.values.dtype.itemsize
        stops = (np.cumsum(part.counts_B) * size).tolist()
        start = 0
        for row, stop in enumerate(stops):
            crcs[row] = zlib.crc32(data[start:stop], crcs[row])
            start = stop
    return np.asarray(crcs, dtype=np.uint32)


def check_checksums(table: pa.Table, name: str, parts: Sequence[Part]) -> None:
    """Raise FormatError unless each row's checksum in column `name` is that of its bytes."""
    stored_B = read_crcs(table, name)
    found_B = checksums(parts, table.num_rows)
    if not np.array_equal(stored_B, found_B):
        row = int(np.argmax(stored_B != found_B))
        raise FormatError(
            f"{name}: expected {int(stored_B[row]):#010x}, got {int(found_B[row]):#010x}: the "
            "payload was changed"
        )


def _offsets(counts_B: Int64Array) -> npt.NDArray[np.int32]:
    offsets = np.zeros(len(counts_B) + 1, dtype=np.int64)
    np.cumsum(counts_B, out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise FormatError(
            f"a payload column of {offsets[-1]} items: expected at most 2^31 in one batch",
            hint="lower samples_per_batch",
        )
    return offsets.astype(np.int32)


def _one_chunk(table: pa.Table, name: str, expected: pa.DataType) -> Any:
    found = table.schema.field(name).type if name in table.column_names else None
    if found != expected:
        raise FormatError(f"{name}: expected a column of {expected}, got {found}")
    array = table[name].combine_chunks()
    if array.null_count:
        raise FormatError(f"{name}: expected a value in each row, got a missing one")
    return array


def _require_counts(name: str, what: str, found_B: Int64Array, expected_B: Int64Array) -> None:
    if not np.array_equal(found_B, expected_B):
        row = int(np.argmax(found_B != expected_B)) if len(found_B) == len(expected_B) else 0
        raise FormatError(f"{name}: expected {expected_B[row]} {what}, got {found_B[row]}")
