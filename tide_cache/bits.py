"""Masks as bits: one bit a position, little-endian inside each byte, zero bits at the end.

512 positions take 64 bytes before compression. Reading checks the length and the trailing bits,
so that two different byte strings never mean the same mask.
"""

import numpy as np

from tide_cache.errors import FormatError
from tide_cache.geometry import BoolArray


def pack_bits(mask_L: BoolArray) -> bytes:
    """Pack a bool array (L,) into ceil(L / 8) bytes."""
    return np.packbits(np.asarray(mask_L, dtype=bool), bitorder="little").tobytes()


def unpack_bits(data: bytes, num_positions: int) -> BoolArray:
    """Unpack `num_positions` bits. Returns bool (L,). Raises FormatError on a wrong length."""
    expected = -(-num_positions // 8)
    if len(data) != expected:
        raise FormatError(
            f"bit mask of {num_positions} positions: expected {expected} bytes, got {len(data)}"
        )
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
    if bits[num_positions:].any():
        raise FormatError(f"bit mask of {num_positions} positions: bits set behind the last one")
    return bits[:num_positions].astype(bool)
