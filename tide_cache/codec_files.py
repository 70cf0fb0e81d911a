"""What the codecs need once per cache: tensors in `codec/*.safetensors`, checked before use.

Read by the low-level call of safetensors, which knows shapes and types and runs nothing. bfloat16,
which numpy lacks, is widened to float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize

from tide_cache.canonical import sha256_hex
from tide_cache.errors import FormatError
from tide_cache.manifest import FileFacts
from tide_cache.store import Store

Tensors = Mapping[str, npt.NDArray[Any]]
# An output head of 262,144 ids and 16,384 numbers each in bfloat16 takes half of it.
MAX_CODEC_BYTES = 1 << 34
_DTYPES = {"F32": "<f4", "F16": "<f2", "I32": "<i4"}


def read_codec_bytes(store: Store, files: Sequence[FileFacts], path: str) -> bytes:
    """Return a listed file's bytes. Raises FormatError unless size and sha256 are as listed."""
    where = f"{store.url}/{path}"
    hint = f"run 'tide-cache verify {store.url}'"
    facts = next((facts for facts in files if facts.path == path), None)
    if facts is None:
        raise FormatError(f"{where}: not in the manifest's files", hint=hint)
    if facts.size_bytes > MAX_CODEC_BYTES:
        raise FormatError(f"{where}: expected at most {MAX_CODEC_BYTES} bytes")
    size_bytes = store.size_bytes(path)
    if size_bytes != facts.size_bytes:
        raise FormatError(
            f"{where}: expected {facts.size_bytes} bytes, got {size_bytes}", hint=hint
        )
    data = store.read_bytes(path, max_bytes=facts.size_bytes)
    if sha256_hex(data) != facts.sha256:
        raise FormatError(
            f"{where}: sha256 mismatch (expected {facts.sha256[:12]}…, got "
            f"{sha256_hex(data)[:12]}…)",
            hint=hint,
        )
    return data


def read_tensors(store: Store, files: Sequence[FileFacts], path: str) -> Tensors:
    """Return the tensors of a listed codec file, checked against the list. Raises FormatError."""
    return parse_tensors(read_codec_bytes(store, files, path), where=f"{store.url}/{path}")


def parse_tensors(data: bytes, *, where: str) -> Tensors:
    """Return the tensors of a safetensors file by name. Raises FormatError when it is not one."""
    try:
        found = deserialize(data)  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise FormatError(f"{where}: not a safetensors file: {error}") from error
    return {name: _as_array(tensor, f"{where}: {name}") for name, tensor in found}


def _as_array(tensor: Mapping[str, Any], where: str) -> npt.NDArray[Any]:
    dtype, shape, data = tensor["dtype"], tensor["shape"], tensor["data"]
    if dtype == "BF16":
        wide = np.frombuffer(data, dtype="<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).reshape(shape)
    if dtype not in _DTYPES:
        raise FormatError(f"{where}: expected one of BF16, {', '.join(_DTYPES)}, got {dtype}")
    return np.frombuffer(data, dtype=_DTYPES[dtype]).reshape(shape)
