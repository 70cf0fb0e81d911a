"""Answers of a made-up teacher, and payload tables that are damaged or forged cell by cell.

A cell is one row of one column as bytes: of a binary column its value, of a float list its float32
numbers, of the checksum its four bytes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tide_cache.payloads import Codec
from tide_cache.payloads.candidates import NO_ID, Candidates
from tide_cache.payloads.flat import Int64Array, Part, checksums

Cells = dict[str, list[bytes]]
TEMPERATURES = (1.0, 2.0)
SCALARS = (0.0, -0.0, 1.0, -1.0, 1e-40, 4e30, -4e30, 3e38, -3e38, np.inf, -np.inf, np.nan)


def sizes(*num_positions: int) -> Int64Array:
    """How many positions each row has."""
    return np.array(num_positions, dtype=np.int64)


def logsumexp(values_PX: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """In float64, -inf where all are -inf."""
    wide_PX = np.asarray(values_PX, dtype=np.float64)
    peak_P1 = wide_PX.max(axis=1, keepdims=True, initial=-np.inf)
    anchor_P1 = np.where(np.isfinite(peak_P1), peak_P1, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(anchor_P1[:, 0] + np.log(np.exp(wide_PX - anchor_P1).sum(axis=1)))


def top_candidates(
    logits_PV: npt.NDArray[np.floating],
    k: int,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
) -> Candidates:
    """The k likeliest ids of each position in descending order, and what goes with them."""
    logits_PV = logits_PV.astype(np.float32)
    ids_PK = np.argsort(-logits_PV, axis=1, kind="stable")[:, :k].astype(np.int32)
    total_PT = np.stack([logsumexp(logits_PV / t) for t in temperatures], axis=1)
    return Candidates(
        ids_PK=ids_PK,
        logits_PK=np.take_along_axis(logits_PV, ids_PK, axis=1),
        logsumexp_PT=total_PT.astype(np.float32),
        label_logprob_P=-np.random.default_rng(seed).exponential(size=len(ids_PK)).astype("f4"),
    )


def random_logits(seed: int, num_positions: int, vocab_size: int, scale: float = 3.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.normal(size=(num_positions, vocab_size)) * scale).astype(np.float32)


def encode(codec: Codec, answers: Any, num_B: Int64Array) -> pa.Table:
    """The payload columns of a codec as a table."""
    return pa.table(codec.encode(answers, num_B), schema=pa.schema(codec.fields()))


def by_id(found: Candidates) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logits with ids ascending in each position, missing ones first."""
    order_PK = np.argsort(found.ids_PK, axis=1, kind="stable")
    return (
        np.take_along_axis(found.ids_PK, order_PK, axis=1),
        np.take_along_axis(found.logits_PK, order_PK, axis=1),
    )


def to_cells(table: pa.Table) -> Cells:
    """Take a table apart."""
    cells: Cells = {}
    for name in table.column_names:
        values = table[name].to_pylist()
        if pa.types.is_binary(table.schema.field(name).type):
            cells[name] = values
        else:
            dtype = "<u4" if name.endswith("crc32") else "<f4"
            cells[name] = [np.atleast_1d(np.array(v, dtype=dtype)).tobytes() for v in values]
    return cells


def from_cells(cells: Cells, schema: pa.Schema) -> pa.Table:
    """Put a table together again; float lists and checksums need whole numbers."""
    columns = []
    for field in schema:
        rows = cells[field.name]
        if pa.types.is_binary(field.type):
            columns.append(pa.array(rows, pa.binary()))
        elif pa.types.is_list(field.type):
            # Not through Python's floats: a NaN must keep its bits.
            offsets = np.cumsum([0, *(len(row) // 4 for row in rows)]).astype(np.int32)
            flat = np.frombuffer(b"".join(rows), "<f4")
            columns.append(
                pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=field.type)
            )
        else:
            columns.append(pa.array(np.frombuffer(b"".join(rows), "<u4"), pa.uint32()))
    return pa.table(columns, schema=schema)


def resealed(cells: Cells, schema: pa.Schema) -> pa.Table:
    """Put a table together with the checksums that its cells ask for: what a forger would do."""
    crc = next((name for name in cells if name.endswith("crc32")), None)
    if crc is None:
        return from_cells(cells, schema)
    parts = [
        Part(
            values=np.frombuffer(b"".join(rows), np.uint8),
            counts_B=np.array([len(row) for row in rows], dtype=np.int64),
        )
        for name, rows in cells.items()
        if name != crc
    ]
    sums_B = checksums(parts, len(cells[crc]))
    return from_cells({**cells, crc: [value.tobytes() for value in sums_B]}, schema)


def damaged(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Every table in which one byte of one cell is another, missing, or one too many.

    Of float lists a whole number is missing or too many.
    """
    cells = to_cells(table)
    for name, rows in cells.items():
        is_bytes = pa.types.is_binary(table.schema.field(name).type)
        unit = 1 if is_bytes else 4
        for row, cell in enumerate(rows):
            changes = {
                f"{name}[{row}]: byte {at} flipped": cell[:at]
                + bytes([cell[at] ^ (1 << (at % 8))])
                + cell[at + 1 :]
                for at in range(len(cell))
            }
            if not name.endswith("crc32"):
                for at in range(0, len(cell) + 1, unit):
                    extra = cell[at : at + unit] or bytes(unit)
                    changes[f"{name}[{row}]: longer at {at}"] = cell[:at] + extra + cell[at:]
                    if at < len(cell):
                        changes[f"{name}[{row}]: shorter at {at}"] = cell[:at] + cell[at + unit :]
            for what, changed in changes.items():
                spoilt = {**cells, name: [*rows[:row], changed, *rows[row + 1 :]]}
                yield what, from_cells(spoilt, table.schema)


def forged(table: pa.Table, seed: int) -> pa.Table:
    """A table with a few cells changed at random and the checksums made right."""
    random = np.random.default_rng(seed)
    cells = {name: list(rows) for name, rows in to_cells(table).items()}
    names = [name for name in cells if not name.endswith("crc32")]
    for _ in range(int(random.integers(1, 4))):
        name = names[random.integers(len(names))]
        row = int(random.integers(len(cells[name])))
        is_bytes = pa.types.is_binary(table.schema.field(name).type)
        cells[name][row] = _forge(random, cells[name][row], 1 if is_bytes else 4)
    return resealed(cells, table.schema)


def _forge(random: np.random.Generator, cell: bytes, unit: int) -> bytes:
    if not cell or random.random() < 0.1:
        return random.bytes(unit * int(random.integers(0, 2 * len(cell) // unit + 2)))
    if random.random() < 0.2:
        return random.bytes(len(cell))
    changed = bytearray(cell)
    at = unit * int(random.integers(len(cell) // unit))
    as_float = np.array([SCALARS[random.integers(len(SCALARS))]], "<f4").tobytes()
    as_byte = bytes([int(random.choice([0, 1, 62, 63, 64, 127, 128, 254, 255]))])
    changed[at : at + unit] = as_float if unit == 4 else as_byte
    return bytes(changed)


def assert_within_bounds(found: Candidates, *, k: int, vocab_size: int, num_positions: int) -> None:
    """What every reader may rely on, whoever wrote the bytes."""
    assert found.ids_PK.shape == found.logits_PK.shape == (num_positions, k)
    assert found.ids_PK.dtype == np.int32
    assert found.logits_PK.dtype == np.float32
    assert ((found.ids_PK >= NO_ID) & (found.ids_PK < vocab_size)).all()
    for ids_K in found.ids_PK:
        kept = ids_K[ids_K != NO_ID]
        assert len(np.unique(kept)) == len(kept)
        assert (ids_K[len(kept) :] == NO_ID).all()
    assert not np.isnan(found.logits_PK).any()
    assert (found.logits_PK < np.inf).all()
    assert np.isneginf(found.logits_PK[found.ids_PK == NO_ID]).all()
    assert np.isfinite(found.logsumexp_PT).all()
    assert (found.label_logprob_P < 0.001).all()
    if found.tail_logshare_PT is not None:
        assert (found.tail_logshare_PT <= 0).all()
    if found.error_P is not None:
        assert (np.isfinite(found.error_P) & (found.error_P >= 0)).all()
