"""A second reader of caches, written from schemas/ alone: it must never import `tide_cache`.

Slow and plain on purpose. `read_set(folder)` gives the manifest, the tensors of the codec files and
every row as Python values, in the manifest's order: what the format's prose promises, and no check
beyond the checksums. A test compares it with the product's reader.
"""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

Row = dict[str, Any]
NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4"}


def read_set(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], list[Row]]:
    """Return manifest, tensors by name (`hidden.step` is in the manifest) and decoded rows."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    tensors: dict[str, np.ndarray] = {}
    for path in sorted((folder / "codec").glob("*.safetensors")):
        tensors |= {f"{path.stem}.{k}": v for k, v in safetensors(path.read_bytes()).items()}
    rows = []
    for shard in manifest["shards"]:
        file = pq.ParquetFile(folder / shard["path"])
        stamp = json.loads(file.schema_arrow.metadata[b"tide_cache"])
        assert (stamp["task"], stamp["view"]) == (shard["task"], shard["view"])
        rows += [decode(row, manifest, tensors) for row in file.read().to_pylist()]
    return manifest, tensors, rows


def decode(stored: Row, manifest: dict[str, Any], tensors: dict[str, np.ndarray]) -> Row:
    row = {name: stored[name] for name in ("sample_id", "source", "view", "timestep")}
    row["prompt_length"] = stored["prompt_length"]
    for name in ("student_ids", "teacher_ids"):
        row[name] = np.array(stored[name], "<i4")
    num = len(row["student_ids"])
    for name in ("student_mask", "half_a"):
        row[name] = bits(stored[name], num)
    if manifest["alignment"] == "positions":
        row["align_runs"] = np.array(stored["align_runs"], "<i4").reshape(-1, 3)
        in_run = np.zeros(num, bool)
        for start, _, length in row["align_runs"]:
            in_run[start : start + length] = True
        num_positions = num_chunks = int((row["student_mask"] & in_run).sum())
    else:
        row["chunks"] = np.array(stored["chunks"], "<i4").reshape(-1, 4)
        active = [row["student_mask"][a:b].any() and a >= row["prompt_length"]
                  for a, b, _, _ in row["chunks"]]  # fmt: skip
        num_positions, num_chunks = 0, sum(active)
    for facts in manifest.get("payloads", []):
        cells = Cells(stored)
        if facts["name"] == "chunks":
            row["chunk_logprob"] = cells.take("chunk_logprob", "<f4", num_chunks)
        elif facts["name"] == "hidden":
            row["hidden"] = hidden(cells, num_positions, facts, tensors)
        else:
            read: Callable[..., Row] = raw if facts["codec"] == "raw" else ranked
            row |= read(cells, num_positions, facts, tensors)
        prefix = {"chunks": "chunk", "hidden": "hidden", "candidates": "cand"}[facts["name"]]
        if facts["codec"] != "raw" or facts["codec_version"] >= 2:
            assert stored[f"{prefix}_crc32"] == cells.crc, f"{row['sample_id']}: {prefix}_crc32"
    return row


class Cells:
    """The payload columns of one row, each taken once; `crc` is over what was taken, in order."""

    def __init__(self, stored: Row) -> None:
        self.stored, self.crc = stored, 0

    def take(self, name: str, dtype: str, *shape: int) -> np.ndarray:
        cell = self.stored[name]
        data = cell if isinstance(cell, bytes) else np.array(cell, "<f4").tobytes()
        self.crc = zlib.crc32(data, self.crc)
        return np.frombuffer(data, dtype).reshape(shape)


def raw(cells: Cells, num: int, facts: Row, _: dict[str, np.ndarray]) -> Row:
    k, num_t = facts["k"], len(facts["temperatures"])
    return {
        "cand_ids": list(cells.take("cand_ids", "<i4", num, k)),
        "cand_logits": list(cells.take("cand_logits", "<f4", num, k)),
        "cand_logsumexp": cells.take("cand_logsumexp", "<f4", num, num_t),
        "cand_label_logprob": cells.take("cand_label_logprob", "<f4", num),
    }


def ranked(cells: Cells, num: int, facts: Row, tensors: dict[str, np.ndarray]) -> Row:
    k, num_t, top_code = facts["k"], len(facts["temperatures"]), 2 ** facts["bits"] - 1
    counts = np.full(num, k)
    if facts["top_p"] is not None:
        counts = cells.take("cand_counts", "<u2", num).astype(int)
    gaps = np.zeros(counts.sum(), np.int64)
    num_planes = max(1, -(-(facts["vocab_size"] - 1).bit_length() // 8))
    for plane in range(num_planes):
        gaps += cells.take(f"cand_gaps_{plane}", "u1", len(gaps)).astype(np.int64) << 8 * plane
    codes = cells.take("cand_codes", "u1", len(gaps))
    low, extent = (cells.take(name, "<f4", num) for name in ("cand_low", "cand_range"))
    ids, logits = [], []
    ends = np.cumsum(counts)
    for position in range(num):
        here = slice(ends[position] - counts[position], ends[position])
        ranks = np.cumsum(gaps[here] + 1) - 1
        ids.append(tensors["candidates.id_of_rank"][ranks])
        step = np.float32(extent[position] / np.float32(top_code - 1))
        value = codes[here].astype("<f4") * step + low[position]
        logits.append(np.where(codes[here] == top_code, np.float32(-np.inf), value))
    return {
        "cand_ids": ids,
        "cand_logits": logits,
        "cand_logsumexp": cells.take("cand_logsumexp", "<f4", num, num_t),
        "cand_tail": cells.take("cand_tail", "<f4", num, num_t),
        "cand_label_logprob": cells.take("cand_label_logprob", "<f4", num),
    }


def hidden(cells: Cells, num: int, facts: Row, tensors: dict[str, np.ndarray]) -> np.ndarray:
    low = [cells.take(f"hidden_{b}", "i1", width, num) for b, width in enumerate(facts["bands"])]
    codes = np.concatenate(low).astype(np.int64)
    if facts["num_wide"]:
        high = cells.take("hidden_high", "i1", facts["num_wide"], num).astype(np.int64)
        codes[: facts["num_wide"]] = (codes[: facts["num_wide"]] & 0xFF) + 256 * high
    components = codes.T.astype("<f4") * np.float32(facts["step"])
    return components @ tensors["hidden.synthesis"].T + tensors["hidden.mean"]


def bits(data: bytes, num: int) -> np.ndarray:
    return np.array([data[p // 8] >> p % 8 & 1 for p in range(num)], bool)


def safetensors(data: bytes) -> dict[str, np.ndarray]:
    """Eight bytes of header length, a JSON header, then the tensors."""
    (size,) = struct.unpack("<Q", data[:8])
    found = {}
    for name, facts in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            start, stop = (8 + size + at for at in facts["data_offsets"])
            values = np.frombuffer(data[start:stop], NUMPY_TYPES[facts["dtype"]])
            if facts["dtype"] == "BF16":
                values = (values.astype("<u4") << 16).view("<f4")
            found[name] = values.reshape(facts["shape"])
    return found
