"""How much memory a row group would take, found in its page headers before anything is decoded.

A page may declare two gigabytes and a run of a billion equal values in a few bytes, and Parquet
libraries allocate what a file declares. So before a row group is decoded its page headers are
walked: pages lie within their column and the column within the file, the values that pages declare
are those of the footer, and what all of it takes when decoded stays in proportion to the bytes that
are really there. 25 columns of 256 rows take about a millisecond.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import pyarrow.parquet as pq

from tide_cache.errors import FormatError

# Decoded bytes that a row group may take: so much, and so many times its compressed size.
FREE_BYTES: Final = 64 << 20
MAX_EXPANSION: Final = 32
MAX_GROUP_BYTES: Final = 4 << 30
_MAX_PAGES = 1 << 16
_HEADER_BYTES, _MAX_HEADER_BYTES = 128, 1 << 20
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_DETAILS = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_V2: 8}
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
_LEVEL_BYTES = 4  # a repetition and a definition level of two bytes each
_OFFSET_BYTES = 8
_DELTA_BYTE_ARRAY, _DICTIONARY_ENCODINGS = 7, (2, 8)
# Of the thrift compact protocol.
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 0, 1, 2, 3, 7, 8, 12
_MAX_DEPTH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What a page header declares."""

    kind: int
    compressed_bytes: int
    decompressed_bytes: int
    num_values: int
    encoding: int


def check_groups(
    file: BinaryIO,
    metadata: pq.FileMetaData,
    groups: Sequence[int],
    columns: Sequence[str] | None,
) -> None:
    """Raise FormatError where decoding one of the row groups would take more than it may.

    `columns`: the top-level columns that are going to be read; None: all.
    """
    file_bytes = file.seek(0, io.SEEK_END)
    for number in groups:
        group = metadata.row_group(number)
        decoded_bytes = compressed_bytes = 0
        for index in range(metadata.num_columns):
            column = group.column(index)
            name = column.path_in_schema.split(".")[0]
            if columns is not None and name not in columns:
                continue
            is_repeated = metadata.schema.column(index).max_repetition_level > 0
            if not is_repeated and column.num_values != group.num_rows:
                raise _bad(name, f"{group.num_rows} values", column.num_values)
            compressed_bytes += column.total_compressed_size
            decoded_bytes += _decoded_bytes(file, file_bytes, column, name)
        limit = min(FREE_BYTES + MAX_EXPANSION * compressed_bytes, MAX_GROUP_BYTES)
        if decoded_bytes > limit:
            raise FormatError(
                f"row group {number}: expected at most {limit} bytes when decoded, its "
                f"pages declare {decoded_bytes}"
            )


def _decoded_bytes(file: BinaryIO, file_bytes: int, column: Any, name: str) -> int:
    """Return an upper bound of what a column of a row group takes when decoded."""
    start, size = column.data_page_offset, column.total_compressed_size
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
        start = column.dictionary_page_offset
    if start < 0 or size < 0 or start + size > file_bytes:
        raise _bad(name, f"pages within the {file_bytes} bytes of the file", start + size)
    position, stop = start, start + size
    num_values = plain_bytes = dictionary_bytes = num_pages = 0
    is_repeating = False  # one stored value may be many decoded ones
    while num_values < column.num_values:
        page, header_bytes = _read_header(file, position, stop, name)
        position += header_bytes + page.compressed_bytes
        num_pages += 1
        if position > stop or num_pages > _MAX_PAGES:
            raise _bad(name, f"at most {_MAX_PAGES} pages within {size} bytes", "more")
        plain_bytes += page.decompressed_bytes
        if page.kind == _DICTIONARY_PAGE:
            dictionary_bytes += page.decompressed_bytes
        elif page.kind in (_DATA_PAGE, _DATA_PAGE_V2):
            if page.num_values < 1:
                raise _bad(name, "pages with values", page.num_values)
            num_values += page.num_values
            is_repeating |= page.encoding in (_DELTA_BYTE_ARRAY, *_DICTIONARY_ENCODINGS)
    if num_values != column.num_values:
        raise _bad(name, f"{column.num_values} values", num_values)
    width = _WIDTHS.get(column.physical_type)
    if width is not None:
        return plain_bytes + num_values * (width + _LEVEL_BYTES)
    # No stored string is longer than what its column's pages hold.
    longest = (dictionary_bytes or plain_bytes) if is_repeating else 0
    return plain_bytes + num_values * (longest + _OFFSET_BYTES + _LEVEL_BYTES)


def _read_header(file: BinaryIO, position: int, stop: int, name: str) -> tuple[Page, int]:
    size = _HEADER_BYTES
    while True:
        file.seek(position)
        data = file.read(min(size, stop - position))
        try:
            return parse_header(data)
        except IndexError:  # cut short: the statistics may be long
            if size >= _MAX_HEADER_BYTES or len(data) < size:
                raise _bad(name, "a page header", f"{len(data)} other bytes") from None
            size *= 16
        except ValueError as error:
            raise _bad(name, "a page header", error) from None


def parse_header(data: bytes) -> tuple[Page, int]:
    """Parse a page header, thrift compact; returns it and its length.

    Raises IndexError where `data` ends within it, ValueError where it is none.
    """
    reader = _Compact(data)
    fields = reader.struct()
    kind = fields.get(1)
    # Which of the headers inside counts depends on the kind of page alone.
    details = fields.get(_DETAILS.get(kind, 0), {}) if isinstance(kind, int) else None
    if not isinstance(details, dict):
        raise ValueError("no struct of details")
    encoding = details.get(4 if kind == _DATA_PAGE_V2 else 2, 0)
    numbers = [kind, fields.get(3), fields.get(2), details.get(1, 0), encoding]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("sizes are missing or negative")
    kind, compressed, decompressed, num_values, encoding = numbers
    page = Page(
        kind=kind,
        compressed_bytes=compressed,
        decompressed_bytes=decompressed,
        num_values=num_values,
        encoding=encoding,
    )
    return page, reader.at


class _Compact:
    """As much of the thrift compact protocol as page headers need."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Read a struct; returns integers and structs by field number."""
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != _STOP:
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind == _BYTE:
            return self._byte()
        if _BYTE < kind < _DOUBLE:
            return self._integer()
        if kind == _DOUBLE:
            return self._skip(8)
        if kind == _BINARY:
            return self._skip(self._unsigned())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise ValueError(f"a field of kind {kind}")

    def _byte(self) -> int:
        value = self._data[self.at]
        self.at += 1
        return value

    def _skip(self, size: int) -> None:
        if self.at + size > len(self._data):
            raise IndexError
        self.at += size

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)


def _bad(name: str, expected: str, got: object) -> FormatError:
    return FormatError(f"column {name}: expected {expected}, got {got}")
