"""Documents of a parquet file, as those of the same records in JSON: a row is a record.

Only a text is a text: of other columns (numbers, dates, lists) a row has none. Memory is bounded by
the largest page: only so many rows are taken at a time that they would fit even if each held a
text as large as that. Row groups with a page that is too large itself are skipped and counted.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from pile.pages import largest_page
from pile.records import Document, Skipped, Within
from system.errors import UserError
from system.files import short
from system.terminal import listed

MB = 1 << 20
ROWS = 256  # at a time, at the most
ROWS_ONCE = 1 << 14  # at a time, where equal texts are in memory once
ROOM = 32 * MB  # for the rows at a time, beside what max_document_mb asks for
SIGNATURE = 28  # bytes behind a footer that can be read though columns are encrypted
TOO_LONG = Skipped("too_long")
TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)
NUMBER_TYPES = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating)
PRINTED_TYPES = (pa.types.is_temporal, pa.types.is_decimal)


def parquet_documents(raw, name, cfg, default, bar):
    """An open file -> its documents; default: the domain of those without one. bar: is moved on.
    Raises UserError where the file is none, is damaged, or has no column for the text."""
    with explained(name):
        source = Rows(raw, name, cfg)
        record = 0
        for group in range(source.file.num_row_groups):
            for domain, text in source.cells(group):
                yield Document(name, record, domain, text, default)
                record += text.number if isinstance(text, Skipped) else 1
            about = source.file.metadata
            if bar.total and about.num_rows:
                bar.update(bar.total * about.row_group(group).num_rows / about.num_rows)


@contextmanager
def explained(name):
    """What pyarrow says of a file, as UserError."""
    try:
        yield
    except pa.ArrowNotImplementedError as e:
        what = f"{name} is written in a way that pyarrow cannot read ({short(e)})"
        raise UserError(f"{what}: write it anew with another program") from e
    except pa.ArrowMemoryError as e:
        raise UserError(f"{name} needs more memory than this machine has ({short(e)})") from e
    except (OSError, pa.ArrowException) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise  # of the disk, not of the file
        if "crypt" in str(e):
            raise UserError(f"{name} is encrypted: decrypt it first") from e
        raise UserError(f"{name} is damaged or cut short ({short(e)}): fetch it again") from e


@dataclass(frozen=True)
class Column:
    """Where a key leads."""

    path: tuple  # of fields' names, from the file's column down
    rest: str  # of the key: to be looked up in what stands there, a map or a text of JSON
    kind: pa.DataType

    @property
    def is_map(self):
        return pa.types.is_map(self.kind)

    @property
    def has_text(self):
        """Whether a text may stand there."""
        return is_any(TEXT_TYPES, values_of(self.kind)) or bool(self.is_map and self.rest)

    @property
    def has_name(self):
        """Whether a name may stand there, of which a number is one too."""
        printed = is_any(NUMBER_TYPES + PRINTED_TYPES, values_of(self.kind))
        return self.has_text or (printed and not self.rest)

    @property
    def once(self):
        """Whether a text that stands in many rows is in memory once."""
        return self.is_map or pa.types.is_dictionary(self.kind)

    @property
    def name(self):
        """As pyarrow has it, of one column or of all below it."""
        return ".".join(self.path)


def is_any(tests, kind):
    return any(test(kind) for test in tests)


def values_of(kind):
    """A type -> that of the values, where they are in a dictionary or of a type of their own."""
    if isinstance(kind, pa.BaseExtensionType):  # as arrow.json is a text
        kind = kind.storage_type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


class Rows:
    """An open parquet file."""

    def __init__(self, raw, name, cfg):
        self.raw, self.name = raw, name
        self.here = os.path.isfile(name)  # or far away, where every look at it takes time
        self.longest = cfg.max_document_mb * MB  # bytes of a text
        self.too_large = 4 * self.longest + 2 * ROOM  # bytes of a page
        footer = self.look_at_ends()
        self.file = self.open()
        if footer == self.file.metadata.serialized_size + SIGNATURE:
            raise UserError(f"{name} is encrypted: decrypt it first")
        fields = list(self.file.schema_arrow)
        self.text = locate(fields, cfg.text_key, name)
        self.domain = locate(fields, cfg.domain_key, name)
        if self.text is None:
            have = listed(self.file.schema_arrow.names)
            cure = f"write --text_key=<one of {have}>"
            raise UserError(f"{name} has no column {cfg.text_key!r}: {cure}")
        if self.domain and not self.domain.has_name:
            self.domain = None
        self.leaves, once = {}, []
        for column in filter(None, (self.text, self.domain)):
            self.leaves[column] = self.find_leaves(column)
            if column.is_map:  # a row can have any number of entries: each text is kept once
                once += self.leaves[column].values()
        if once:
            self.file = self.open(once)

    def look_at_ends(self):
        """-> the bytes of the footer. Raises UserError where the file is no parquet file."""
        self.raw.seek(0)
        begin = self.raw.read(4)
        self.raw.seek(0, 2)
        self.raw.seek(max(0, self.raw.tell() - 8))
        footer, end = self.raw.read(4), self.raw.read(4)
        if b"PARE" in (begin, end):
            raise UserError(f"{self.name} is encrypted: decrypt it first")
        if begin != b"PAR1":
            what = f"is no parquet file (it begins with {begin!r})"
            raise UserError(f"{self.name} {what}: name it as what it is, or fetch it again")
        return int.from_bytes(footer, "little")

    def open(self, once=None):
        """-> pyarrow's file. once: the columns of which equal texts are to be in memory once."""
        return pa.parquet.ParquetFile(
            self.raw,
            read_dictionary=once,
            pre_buffer=False,
            buffer_size=MB,
            page_checksum_verification=True,
            arrow_extensions_enabled=False,
        )

    def find_leaves(self, column):
        """The columns, as they are stored, that a Column consists of: {number: name}."""
        found, schema = {}, self.file.schema
        for i in range(self.file.metadata.num_columns):
            path = schema.column(i).path
            if path == column.name or path.startswith(f"{column.name}."):
                found[i] = path
        return found

    def cells(self, group):
        """A row group -> (cell of the domain, cell of the text) of each row; a Skipped stands for
        all of them where there is no room for the texts."""
        rows = self.file.metadata.row_group(group).num_rows
        if not rows:
            return
        if not self.text.has_text:
            yield None, Skipped("no_text", rows)
            return
        text_page = self.largest_page(group, self.text)
        if text_page > self.too_large:
            yield None, Skipped("too_long", rows)
            return
        pages = {self.text: text_page}
        if self.domain:
            domain_page = self.largest_page(group, self.domain)
            if domain_page <= self.too_large:
                pages[self.domain] = domain_page
        names = [column.name for column in pages]
        options = dict(row_groups=[group], columns=names, use_threads=False)
        for batch in self.file.iter_batches(self.rows_at_once(pages), **options):
            texts = column_cells(batch, self.text, self.longest)
            if self.domain in pages:
                domains = column_cells(batch, self.domain, self.longest)
            else:
                domains = [TOO_LONG if self.domain else None] * len(texts)
            yield from zip(domains, map(only_text, texts))

    def rows_at_once(self, pages):
        """{Column: bytes of its largest page} -> as many rows as fit even if each held a text as
        large as that."""
        rows = ROWS_ONCE
        for column, page in pages.items():
            if not column.once:
                rows = min(rows, ROWS, (self.longest + ROOM) // max(1, page))
        return max(1, rows)

    def largest_page(self, group, column):
        """Bytes of a Column's largest page in a row group, or more: a small column's pages are not
        looked at where that means to fetch them."""
        largest = 0
        for i in self.leaves[column]:
            chunk = self.file.metadata.row_group(group).column(i)
            size = chunk.total_uncompressed_size
            if self.here or size > self.longest + ROOM:
                try:
                    size = largest_page(self.raw, chunk)
                except (ValueError, RecursionError) as e:
                    if size > self.too_large:  # else pyarrow may see what is wrong with it
                        raise pa.ArrowInvalid(short(e)) from e
            largest = max(largest, size)
        return largest


def locate(fields, key, name, path=()):
    """pyarrow's fields and a key -> a Column, or None. Raises UserError where two have its name."""
    for wanted, rest in ways(key):
        same = [field for field in fields if field.name == wanted]
        if len(same) > 1:
            raise UserError(f"{name} has {len(same)} columns {wanted!r}: rename all but one")
        if not same:
            continue
        here = (*path, wanted)
        if rest and pa.types.is_struct(same[0].type):
            return locate(list(same[0].type), rest, name, here)
        return Column(here, rest, same[0].type)
    return None


# --- cells --------------------------------------------------------------------------


def only_text(cell):
    return cell if isinstance(cell, (bytes, Within, Skipped)) else None


def column_cells(batch, column, longest):
    """A record batch -> a Column's cells, a list of bytes, numbers, Within, TOO_LONG and None."""
    array = batch.column(batch.schema.get_field_index(column.path[0]))
    for name in column.path[1:]:
        array = pa.compute.struct_field(array, [array.type.get_field_index(name)])
    return cells(array, column.rest, longest)


def cells(array, rest, longest):
    """An array -> a list. Bytes, so that one text that is not UTF-8 spoils no other."""
    if isinstance(array.type, pa.BaseExtensionType):  # as arrow.json is a text
        array = array.storage
    kind = array.type
    if pa.types.is_dictionary(kind):
        known = cells(array.dictionary, rest, longest)
        return [None if i is None else known[i] for i in array.indices.to_pylist()]
    if pa.types.is_map(kind) and rest:
        return map_cells(array, rest, longest)
    if pa.types.is_struct(kind) and rest:  # in a map; others are gone into before
        for name, deeper in ways(rest):
            i = kind.get_field_index(name)
            if i >= 0:
                return cells(pa.compute.struct_field(array, [i]), deeper, longest)
    if is_any(TEXT_TYPES, kind):
        found = texts(array, longest)
        return [Within(cell, rest) if rest and isinstance(cell, bytes) else cell for cell in found]
    if not rest and is_any(NUMBER_TYPES, kind):
        return array.to_pylist()
    if not rest and is_any(PRINTED_TYPES, kind):
        if pa.types.is_timestamp(kind):
            array = array.cast(pa.timestamp(kind.unit))  # without a zone, which may be unknown
        return array.cast(pa.string()).to_pylist()
    return [None] * len(array)  # lists and structs


def texts(array, longest):
    """An array of texts -> bytes, None, and TOO_LONG for one of more than `longest` bytes."""
    array = array.cast(pa.large_binary())
    if array.nbytes <= longest:
        return array.to_pylist()
    found = []
    for length, scalar in zip(pa.compute.binary_length(array).to_pylist(), array):
        found.append(TOO_LONG if length is not None and length > longest else scalar.as_py())
    return found


def map_cells(array, key, longest):
    """An array of maps -> what each has under a key: under the whole key, else below the key's
    part in front of its first dot."""
    keys = cells(array.keys, "", longest)
    offsets = array.offsets.to_pylist()
    found = [None] * len(array)
    for wanted, rest in ways(key):
        items = cells(array.items, rest, longest)
        for row, (begin, end) in enumerate(pairwise(offsets)):
            for i in range(begin, end):
                if found[row] is None and keys[i] == wanted.encode():
                    found[row] = items[i]
    return found


def ways(key):
    """A key -> a name and the rest of the key, whole first: "a.b" and "", then "a" and "b"."""
    first, dot, rest = key.partition(".")
    return [(key, ""), (first, rest)] if dot else [(key, "")]
