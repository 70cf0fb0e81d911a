"""Shards of a set that is taken over, whole or in part: read once, checked on the way, counted."""

from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from tide_cache.errors import FormatError
from tide_cache.fetch import fetch_bytes
from tide_cache.manifest import Header, Manifest, ShardFacts
from tide_cache.row_counts import count_rows
from tide_cache.rows import table_to_rows
from tide_cache.set_schema import set_schema
from tide_cache.store import Store


def shards_by_task(manifest: Manifest) -> Iterator[tuple[int, tuple[ShardFacts, ...]]]:
    """Yield each task's number and its shards, view 0 first."""
    tasks: dict[int, list[ShardFacts]] = {}
    for shard in manifest.shards:
        tasks.setdefault(shard.task, []).append(shard)
    for number, shards in tasks.items():
        yield number, tuple(shards)


def read_checked(store: Store, shard: ShardFacts, header: Header) -> tuple[bytes, pa.Table]:
    """Read a shard whole: its bytes, found to be the listed ones, and its rows.

    Raises FormatError when bytes or columns are not those that the manifest promises.
    """
    data = fetch_bytes(store, shard)
    where = f"{store.url}/{shard.path}"
    try:
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{where}: not a readable Parquet file ({error})") from error
    expected = set_schema(header)
    if not table.schema.equals(expected, check_metadata=False):
        raise FormatError(f"{where}: schema: expected {expected.names}, got {table.schema.names}")
    if table.num_rows != shard.num_rows:
        raise FormatError(f"{where}: expected {shard.num_rows} rows, got {table.num_rows}")
    return data, table


def count_tables(tables_V: Sequence[pa.Table], header: Header) -> Counter[str]:
    """Count what a manifest says of the rows of a task."""
    return count_rows([table_to_rows(table, header.alignment) for table in tables_V])
