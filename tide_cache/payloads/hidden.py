"""The `hidden` payload: what the teacher's output head reads, transform-coded, to be replayed.

At T = 2 the tail of an uncertain teacher is most of its signal, and no short list of ids holds it;
the hidden state holds all of it in d numbers. A linear transform turns it into components whose
errors matter equally for the softmax and that are uncorrelated, all are rounded with one step, and
those that always round to zero are left out (the fit stands in stage 1). Components are stored
one after the other within a row (all positions of the first, then of the second), in columns by
how large they get, so that a column holds symbols of one kind. 18 bytes a position at a
gradient cosine of .9995 (d = 256: `python -m benchmarks.gradients`).

Shapes: B rows, P payload positions of all rows, R components kept, D hidden size, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tide_cache.errors import FormatError
from tide_cache.payload_facts import HiddenFacts
from tide_cache.payloads.flat import (
    Int64Array,
    Part,
    bytes_column,
    bytes_field,
    check_checksums,
    checksums,
    crc_field,
    read_bytes,
)

Float32Array = npt.NDArray[np.float32]
Int16Array = npt.NDArray[np.int16]

CRC = "hidden_crc32"
TRANSFORM_FILE = "codec/hidden.safetensors"
HEAD_FILE = "codec/head.safetensors"
NARROW_MAX, WIDE_MAX = 127, 32767
# Their products, 2^16 of them in a sum, stay within float32 (3e38), divided by a temperature too.
_MAX_HIDDEN, MAX_WEIGHT = 1e15, 1e12


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Transform:
    """Hidden states to components and back: the slow, obvious form of what stages run on a GPU.

    `analysis_RD` and `synthesis_DR` float32, `mean_D` float32; `limit_R` int16: how large a code of
    each component may be.
    """

    analysis_RD: Float32Array
    synthesis_DR: Float32Array
    mean_D: Float32Array
    limit_R: Int16Array
    step: float

    @classmethod
    def from_tensors(cls, facts: HiddenFacts, tensors: Mapping[str, Any]) -> "Transform":
        """Take the tensors of `codec/hidden.safetensors`. Raises FormatError unless they fit."""
        size, kept = facts.hidden_size, facts.num_components
        shapes = {"analysis": (kept, size), "synthesis": (size, kept), "mean": (size,)}
        for name, shape in shapes.items():
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != shape or tensor.dtype != np.float32:
                found = None if tensor is None else (tensor.dtype, tensor.shape)
                raise FormatError(
                    f"{TRANSFORM_FILE}: {name}: expected float32 {shape}, got {found}"
                )
            if not np.isfinite(tensor).all():
                raise FormatError(f"{TRANSFORM_FILE}: {name}: expected finite numbers")
        limit_R = limits(facts)
        # Codes within their limits must not decode to infinity, nor their products with a head.
        largest_D = np.abs(tensors["mean"], dtype=np.float64)
        largest_D += np.abs(tensors["synthesis"], dtype=np.float64) @ (limit_R * facts.step)
        if largest_D.max() > _MAX_HIDDEN:
            raise FormatError(
                f"{TRANSFORM_FILE}: synthesis: expected hidden states within {_MAX_HIDDEN:g}, got "
                f"up to {largest_D.max():g}"
            )
        return cls(
            analysis_RD=tensors["analysis"],
            synthesis_DR=tensors["synthesis"],
            mean_D=tensors["mean"],
            limit_R=limit_R,
            step=facts.step,
        )

    def to_codes(self, hidden_PD: Float32Array) -> Int16Array:
        """Return the nearest codes, int16 (P, R); beyond a component's limit they are cut."""
        component_PR = (hidden_PD - self.mean_D) @ self.analysis_RD.T
        code_PR = np.rint(component_PR / np.float32(self.step))
        return np.clip(code_PR, -self.limit_R, self.limit_R).astype(np.int16)

    def to_hidden(self, code_PR: Int16Array) -> Float32Array:
        """Return the hidden states that codes stand for, float32 (P, D)."""
        component_PR = code_PR.astype(np.float32) * np.float32(self.step)
        return np.asarray(component_PR @ self.synthesis_DR.T + self.mean_D, dtype=np.float32)


def limits(facts: HiddenFacts) -> Int16Array:
    """Return how large a code of each component may be, int16 (R,)."""
    limit_R = np.full(facts.num_components, NARROW_MAX, dtype=np.int16)
    limit_R[: facts.num_wide] = WIDE_MAX
    return limit_R


class HiddenCodec:
    """Codec `transform`, version 1: codes to columns and back. Needs no tensors."""

    def __init__(self, facts: HiddenFacts) -> None:
        self.facts = facts
        self._edges = np.cumsum([0, *facts.bands])

    def fields(self) -> list[pa.Field]:
        """Return the Arrow fields that this payload adds to a row."""
        high = [bytes_field("hidden_high")] if self.facts.num_wide else []
        bands = [bytes_field(f"hidden_{band}") for band in range(len(self.facts.bands))]
        return [*bands, *high, crc_field(CRC)]

    def encode(self, code_PR: Int16Array, num_positions_B: Int64Array) -> list[pa.Array]:
        """Encode the codes of B rows, end to end. Raises FormatError beyond a limit."""
        facts = self.facts
        if code_PR.shape[1:] != (facts.num_components,) or code_PR.dtype != np.int16:
            raise FormatError(
                f"hidden codes: expected int16 (P, {facts.num_components}), got {code_PR.dtype} "
                f"{code_PR.shape}"
            )
        narrow = code_PR[:, facts.num_wide :]
        if len(code_PR) and (narrow.min(initial=0) < -128 or narrow.max(initial=0) > 127):
            raise FormatError("hidden codes: expected narrow components within int8")
        low_PR = code_PR.astype(np.uint16).astype(np.uint8)
        high_PW = (code_PR[:, : facts.num_wide].astype(np.uint16) >> 8).astype(np.uint8)
        pieces = [low_PR[:, a:b] for a, b in zip(self._edges, self._edges[1:], strict=False)]
        if facts.num_wide:
            pieces.append(high_PW)
        parts = [
            Part(
                values=_component_major(piece_PX, num_positions_B),
                counts_B=piece_PX.shape[1] * num_positions_B,
            )
            for piece_PX in pieces
        ]
        columns = [bytes_column(part.values, part.counts_B) for part in parts]
        return [*columns, pa.array(checksums(parts, len(num_positions_B)), pa.uint32())]

    def decode(self, table: pa.Table, num_positions_B: Int64Array) -> Int16Array:
        """Decode rows of `num_positions_B` payload positions each. Returns int16 (P, R).

        Raises FormatError on a wrong length or checksum; any code within its bytes is a number.
        """
        facts = self.facts
        widths = {f"hidden_{band}": width for band, width in enumerate(facts.bands)}
        if facts.num_wide:
            widths["hidden_high"] = facts.num_wide
        parts = {
            name: Part(
                values=read_bytes(table, name, width * num_positions_B),
                counts_B=width * num_positions_B,
            )
            for name, width in widths.items()
        }
        check_checksums(table, CRC, list(parts.values()))
        code_PR = np.empty((int(num_positions_B.sum()), facts.num_components), dtype=np.int16)
        for band, (start, stop) in enumerate(zip(self._edges, self._edges[1:], strict=False)):
            low_PX = _position_major(parts[f"hidden_{band}"].values, stop - start, num_positions_B)
            code_PR[:, start:stop] = low_PX.view(np.int8)
        if facts.num_wide:
            wide = slice(0, facts.num_wide)
            high_PW = _position_major(parts["hidden_high"].values, facts.num_wide, num_positions_B)
            low_PW = code_PR[:, wide].view(np.uint16) & np.uint16(0xFF)
            code_PR[:, wide] = (low_PW | high_PW.astype(np.uint16) << np.uint16(8)).view(np.int16)
        return code_PR


def read_head(
    tensors: Mapping[str, npt.NDArray[Any]], facts: HiddenFacts, *, where: str
) -> tuple[Float32Array, Float32Array | None]:
    """Return the output head's weight (V, D) and bias (V,), float32, of `codec/head.safetensors`.

    Raises FormatError where a tensor is missing, of another shape or not finite.
    """
    found: list[Float32Array | None] = []
    for name, shape in (
        ("weight", (facts.vocab_size, facts.hidden_size)),
        ("bias", (facts.vocab_size,)),
    ):
        tensor = tensors.get(name)
        if tensor is None and name == "bias":
            found.append(None)
            continue
        if tensor is None or tensor.shape != shape or tensor.dtype.kind != "f":
            raise FormatError(f"{where}: {name}: expected floats of shape {shape}")
        if not float(np.abs(tensor).max()) <= MAX_WEIGHT:  # NaN is not, either
            raise FormatError(f"{where}: {name}: expected finite numbers within {MAX_WEIGHT:g}")
        found.append(tensor.astype(np.float32, copy=False))
    weight_VD, bias_V = found
    assert weight_VD is not None
    return weight_VD, bias_V


def replay_reference(
    hidden_PD: Float32Array, weight_VD: Float32Array, bias_V: Float32Array | None
) -> Float32Array:
    """Apply the output head, float32 (P, V)."""
    logits_PV = hidden_PD @ weight_VD.T
    return logits_PV if bias_V is None else logits_PV + bias_V


def _component_major(
    code_PX: npt.NDArray[np.uint8], num_positions_B: Int64Array
) -> npt.NDArray[np.uint8]:
    """Write each row's (positions, components) as components after components."""
    out = np.empty(code_PX.size, dtype=np.uint8)
    width, start = code_PX.shape[1], 0
    for num in num_positions_B.tolist():
        block = out[start * width : (start + num) * width].reshape(width, num)
        block[:] = code_PX[start : start + num].T
        start += num
    return out


def _position_major(
    data: npt.NDArray[np.uint8], width: int, num_positions_B: Int64Array
) -> npt.NDArray[np.uint8]:
    out = np.empty((int(num_positions_B.sum()), width), dtype=np.uint8)
    start = 0
    for num in num_positions_B.tolist():
        block = data[start * width : (start + num) * width].reshape(width, num)
        out[start : start + num] = block.T
        start += num
    return out
