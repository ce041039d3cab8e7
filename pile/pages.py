"""How large the pages of a parquet file become when they are unpacked, which pyarrow does not say.

A page is unpacked as a whole, so a small file can fill any memory with one. A page's header is a
struct of Thrift's compact protocol (github.com/apache/thrift, thrift-compact-protocol.md). Its
fields 2 and 3 are the page's bytes unpacked and packed (github.com/apache/parquet-format).
"""

import io

HEADER = 1 << 14  # bytes that are read for a header at first
LARGEST_HEADER = 1 << 24

# types of a field in the protocol
BOOLEANS = (1, 2)  # true and false: the type itself is the value
BYTE = 3
INTEGERS = (4, 5, 6)
DOUBLE = 7
BINARY = 8
LISTS = (9, 10)
STRUCT = 12

# fields of a page's header
UNPACKED = 2
PACKED = 3


class Damaged(ValueError):
    """The bytes are not a page's header."""


def largest_page(file, column):
    """The bytes of the largest page of a column in a row group, unpacked.

    file: open, to be read in bytes. column: pyarrow's ColumnChunkMetaData. Raises Damaged and
    OSError."""
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    end = start + column.total_compressed_size
    largest = 0
    while start < end:
        fields, length = read_header(file, start)
        unpacked = fields.get(UNPACKED, -1)
        packed = fields.get(PACKED, -1)
        if unpacked < 0 or packed < 0:
            raise Damaged("a page's header has no sizes")
        largest = max(largest, unpacked)
        start += length + packed
    return largest


def read_header(file, start):
    """The page's header that begins there -> {field: its integer}, and the header's length."""
    size = HEADER
    while size <= LARGEST_HEADER:
        file.seek(start)
        header = io.BytesIO(file.read(size))
        try:
            return read_struct(header), header.tell()
        except EOFError:  # the header goes on, with long statistics
            size *= 16
    raise Damaged("a page's header has no end")


def read_struct(file):
    """A struct of the protocol -> {field: value} of its fields that are integers."""
    fields = {}
    number = 0
    while True:
        head = read_byte(file)
        if not head:
            return fields
        step = head >> 4
        kind = head & 15
        number = number + step if step else read_integer(file)
        if kind in INTEGERS:
            fields[number] = read_integer(file)
        elif kind not in BOOLEANS:
            skip(file, kind)


def skip(file, kind):
    """Goes past a value of a type of the protocol."""
    if kind in (BYTE, *BOOLEANS):  # in a list a boolean has a byte of its own
        skip_bytes(file, 1)
    elif kind in INTEGERS:
        read_varint(file)
    elif kind == DOUBLE:
        skip_bytes(file, 8)
    elif kind == BINARY:
        skip_bytes(file, read_varint(file))
    elif kind in LISTS:
        head = read_byte(file)
        count = head >> 4
        if count == 15:  # the count follows
            count = read_varint(file)
        for _ in range(count):
            skip(file, head & 15)
    elif kind == STRUCT:
        read_struct(file)
    else:  # a map, which no page's header has
        raise Damaged("a page's header has a field of an unknown type")


def skip_bytes(file, n):
    if n > LARGEST_HEADER:
        raise Damaged("a page's header is longer than any")
    if len(file.read(n)) < n:
        raise EOFError


def read_byte(file):
    byte = file.read(1)
    if not byte:
        raise EOFError
    return byte[0]


def read_varint(file):
    """An integer in groups of seven bits, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        group = read_byte(file)
        value += (group & 127) << shift
        if group < 128:
            return value
    raise Damaged("a page's header has a number without end")


def read_integer(file):
    """A signed integer in zigzag coding: 0, -1, 1, -2, ... are written as 0, 1, 2, 3, ..."""
    value = read_varint(file)
    return (value >> 1) ^ -(value & 1)
