"""The Arrow schema of the shards of a set, which follows from its header alone."""

import pyarrow as pa

from tide_cache.manifest import CacheHeader, Header
from tide_cache.payloads import payload_fields
from tide_cache.rows import row_fields


def set_schema(header: Header) -> pa.Schema:
    """Return the Arrow schema of the shards that `header` describes."""
    fields = row_fields(header.alignment)
    if isinstance(header, CacheHeader):
        fields = fields + payload_fields(header)
    return pa.schema(fields)
