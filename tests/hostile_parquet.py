"""Shards that declare or hold far more than they should, behind hashes that are right."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tide_cache.canonical import sha256_hex
from tide_cache.parquet_pages import parse_header
from tide_cache.shards import METADATA_KEY


def rewrite_shard(path: Path, table: pa.Table, **options: Any) -> bytes:
    """Write a table over a shard, with the shard's own metadata and any options of Parquet."""
    metadata = pq.read_schema(path).metadata
    sink = io.BytesIO()
    kept = {METADATA_KEY: metadata[METADATA_KEY]}
    pq.write_table(table.replace_schema_metadata(kept), sink, row_group_size=256, **options)
    path.write_bytes(sink.getvalue())
    return sink.getvalue()


def rehash(folder: Path) -> None:
    """Make sizes and hashes of the manifest those of the files: what a forger would do."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    try:
        for listed in (*values["shards"], *values["files"]):
            data = (folder / listed["path"]).read_bytes()
            listed["size_bytes"], listed["sha256"] = len(data), sha256_hex(data)
        values["counts"]["size_bytes"] = sum(shard["size_bytes"] for shard in values["shards"])
    except (KeyError, TypeError, ValueError, OSError):
        return  # the manifest itself is forged beyond this
    path.write_text(json.dumps(values))


def first_page_header(data: bytes, column: str) -> tuple[int, int, int]:
    """Where the first page header of a column begins, ends, and where its page ends."""
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    group = metadata.row_group(0)
    for index in range(metadata.num_columns):
        facts = group.column(index)
        if facts.path_in_schema.split(".")[0] == column:
            start = facts.data_page_offset
            if facts.has_dictionary_page:
                start = min(start, facts.dictionary_page_offset)
            page, size = parse_header(data[start : start + 4096])
            return start, start + size, start + size + page.compressed_bytes
    raise KeyError(column)


def declare_page_bytes(data: bytes, column: str, decompressed_bytes: int) -> bytes:
    """Let the first page of a column declare another decompressed size, of as many digits.

    The number's varint keeps its length, so that nothing else moves.
    """
    start, stop, _ = first_page_header(data, column)
    header = data[start:stop]
    # Field 1 (i32 type), field 2 (i32 uncompressed size): 0x15 type 0x15 size.
    assert header[0] == 0x15 and header[2] == 0x15
    end = 3
    while header[end] & 0x80:
        end += 1
    length = end + 1 - 3
    value = decompressed_bytes << 1
    padded = bytes(
        [(value >> 7 * i & 0x7F) | (0x80 if i < length - 1 else 0) for i in range(length)]
    )
    assert value < 1 << 7 * length, "the honest size has too few digits for this one"
    return data[:start] + header[:3] + padded + header[end + 1 :] + data[stop:]
