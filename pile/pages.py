"""The pages of a parquet file's columns, of which pyarrow does not tell: how large each becomes.

A page is unpacked whole, so a file of some bytes can fill any memory with one. A page's header is a
struct of Thrift's compact protocol, described at github.com/apache/thrift, thrift-compact-protocol;
its fields 2 and 3 are the page's bytes unpacked and packed (github.com/apache/parquet-format).
"""

import io

HEADER = 1 << 14  # bytes of a file that are read for a header at first
LARGEST_HEADER = 1 << 24
BOOLEANS = (1, 2)  # of the protocol's types: the value lies in the type itself
BYTE, INTEGERS, DOUBLE, BINARY = 3, (4, 5, 6), 7, 8
LISTS, STRUCT = (9, 10), 12


class Damaged(ValueError):
    """What should be a page is none."""


def largest_page(file, column):
    """An open file and pyarrow's ColumnChunkMetaData -> bytes of its largest page, unpacked.
    Raises Damaged and OSError."""
    at = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        at = min(at, column.dictionary_page_offset)
    end = at + column.total_compressed_size
    largest = 0
    while at < end:
        fields, length = read_header(file, at)
        unpacked, packed = fields.get(2), fields.get(3)
        if unpacked is None or packed is None or min(unpacked, packed) < 0:
            raise Damaged("a page's header has no sizes")
        largest = max(largest, unpacked)
        at += length + packed
    return largest


def read_header(file, at):
    """A page's header at a place of a file -> {field: its integer}, and how long the header is."""
    size = HEADER
    while size <= LARGEST_HEADER:
        file.seek(at)
        header = io.BytesIO(file.read(size))
        try:
            return read_struct(header), header.tell()
        except EOFError:  # a header with long statistics
            size *= 16
    raise Damaged("a page's header has no end")


def read_struct(file):
    """A struct of the protocol -> {field: value} of those of its fields that are integers."""
    fields, number = {}, 0
    while True:
        head = byte(file)
        if not head:
            return fields
        step, kind = head >> 4, head & 15
        number = number + step if step else zigzag(file)
        if kind in INTEGERS:
            fields[number] = zigzag(file)
        elif kind not in BOOLEANS:
            skip(file, kind)


def skip(file, kind):
    if kind in (BYTE, *BOOLEANS):  # in a list a truth value has a byte of its own
        skip_bytes(file, 1)
    elif kind in INTEGERS:
        varint(file)
    elif kind == DOUBLE:
        skip_bytes(file, 8)
    elif kind == BINARY:
        skip_bytes(file, varint(file))
    elif kind in LISTS:
        head = byte(file)
        count = head >> 4
        if count == 15:
            count = varint(file)
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


def byte(file):
    found = file.read(1)
    if not found:
        raise EOFError
    return found[0]


def varint(file):
    """An integer in groups of seven bits, the lowest first."""
    value = shift = 0
    while True:
        group = byte(file)
        value |= (group & 127) << shift
        shift += 7
        if group < 128:
            return value
        if shift > 63:
            raise Damaged("a page's header has a number without end")


def zigzag(file):
    """A signed integer: 0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    value = varint(file)
    return (value >> 1) ^ -(value & 1)
