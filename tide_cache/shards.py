"""Parquet shards: fixed writer options, so that the same rows give the same bytes.

zstd, page checksums, a page index and content-defined chunking (an upload of a changed shard sends
the changed pages only). Int lists are delta-packed: ascending position tables shrink to almost
nothing; float lists are split into byte planes, of which the exponents compress. The header of the
set stands in the file's metadata under `tide_cache`.
"""

import io
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from tide_cache.canonical import canonical_json
from tide_cache.errors import FormatError
from tide_cache.manifest import Header
from tide_cache.parquet_pages import check_groups
from tide_cache.store import Store

METADATA_KEY = b"tide_cache"
ROWS_PER_GROUP = 256
# What hostile bytes raise: a name in a footer that is not UTF-8 is a ValueError.
_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError)
_ZSTD_LEVEL = 3
_DICTIONARY_COLUMNS = ["source", "timestep"]


def shard_bytes(table: pa.Table, header: Header, *, task: int, view: int) -> bytes:
    """Write a table as the bytes of a shard."""
    stamp = {"header": header.model_dump(mode="json"), "task": task, "view": view}
    return table_bytes(table.replace_schema_metadata({METADATA_KEY: canonical_json(stamp)}))


def table_bytes(table: pa.Table) -> bytes:
    """Write any table as Parquet with the options of a shard."""
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=_ZSTD_LEVEL,
        row_group_size=ROWS_PER_GROUP,
        use_dictionary=_DICTIONARY_COLUMNS,
        column_encoding=_encodings(table.schema),
        write_page_checksum=True,
        write_page_index=True,
        # The least and the largest blob of a payload column, whole, tell nobody anything: 1.2 bytes
        # a position.
        write_statistics=[field.name for field in table.schema if not _is_blob(field.type)],
        use_content_defined_chunking=True,
        store_schema=True,
    )
    return sink.getvalue()


def _is_blob(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_list(kind))


def compressed_column_bytes(table: pa.Table) -> dict[str, int]:
    """Return what each column of a table would take in a shard, pages and dictionaries included."""
    return column_bytes(pq.ParquetFile(io.BytesIO(table_bytes(table))).metadata)


def column_bytes(metadata: pq.FileMetaData) -> dict[str, int]:
    """Return the compressed size of each top-level column of a Parquet file."""
    sizes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            name = column.path_in_schema.split(".")[0]
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes


class ShardFile(pq.ParquetFile):  # type: ignore[misc]
    """An open shard, with the file that it is read from."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, page_checksum_verification=True)
        self.file = file
        # Read here, where what a footer says wrongly is turned into an error of ours.
        self.schema_found = self.schema_arrow
        groups = range(self.metadata.num_row_groups)
        self.group_sizes = [self.metadata.row_group(group).num_rows for group in groups]


def open_shard(store: Store, path: str) -> ShardFile:
    """Open a shard for reading by row group, with page checksums verified.

    Raises FormatError when it is truncated or not Parquet, StorageError when it is missing.
    """
    return open_parquet(store.open(path), f"{store.url}/{path}", url=store.url)


def open_parquet(file: BinaryIO, where: str, *, url: str) -> ShardFile:
    """Open a shard's bytes as `open_shard` does; closes `file` when they are no Parquet."""
    try:
        return ShardFile(file)
    except _ARROW_ERRORS as error:
        file.close()
        raise FormatError(
            f"{where}: not a readable Parquet file ({_first_line(error)})",
            hint=f"run 'tide-cache verify {url}' to see what else is damaged",
        ) from error


def group_sizes(num_rows: int) -> list[int]:
    """Return the number of rows of each row group of a shard of so many rows."""
    whole, rest = divmod(num_rows, ROWS_PER_GROUP)
    return [ROWS_PER_GROUP] * whole + ([rest] if rest else [])


def read_shard(store: Store, path: str, columns: list[str] | None = None) -> pa.Table:
    """Read a whole shard. Raises FormatError when a page is damaged."""
    with open_shard(store, path) as file:
        return read_row_groups(store, path, file, None, columns)


def read_row_groups(
    store: Store,
    path: str,
    file: ShardFile,
    groups: list[int] | None,
    columns: list[str] | None = None,
) -> pa.Table:
    """Read some row groups (None: all) of an open shard, naming the shard when a page is bad.

    Raises FormatError, before it allocates anything, for pages that declare far more than there is.
    """
    if groups is None:
        groups = list(range(file.num_row_groups))
    try:
        check_groups(file.file, file.metadata, groups, columns)
        return file.read_row_groups(groups, columns=columns, use_threads=False)
    except (*_ARROW_ERRORS, FormatError) as error:
        raise FormatError(
            f"{store.url}/{path}: damaged data ({_first_line(error)})",
            hint=f"run 'tide-cache verify {store.url}' to see what else is damaged",
        ) from error


def _encodings(schema: pa.Schema) -> dict[str, str]:
    encodings = {}
    for field in schema:
        if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type):
            encodings[f"{field.name}.list.element"] = "BYTE_STREAM_SPLIT"
        elif pa.types.is_list(field.type):
            encodings[f"{field.name}.list.element"] = "DELTA_BINARY_PACKED"
        elif pa.types.is_binary(field.type):
            # Lengths apart, so that only like bytes stand beside each other.
            encodings[field.name] = "DELTA_LENGTH_BYTE_ARRAY"
        elif pa.types.is_signed_integer(field.type):
            encodings[field.name] = "DELTA_BINARY_PACKED"
    return encodings


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
