"""The documents of a parquet file. A row is a record, and reads as the same record does in JSON.

A row whose text column holds something else (a number, a date, a list) has no text. Memory stays
bounded: so few rows are read at a time that each could hold a text as large as the largest page.
Row groups with a page that is itself too large are skipped and counted.
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
ROWS = 256  # read at a time, at the most
ROWS_ONCE = 1 << 14  # the same, where equal texts are in memory only once
ROOM = 32 * MB  # for the rows read at a time, beside max_document_mb
SIGNATURE = 28  # bytes behind a readable footer if some columns are encrypted
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


class MissingColumn(UserError):
    """A file has no column for the text."""


def parquet_documents(raw, name, cfg, default, bar):
    """An open file -> its documents. default: the domain of those without one.

    bar: the progress bar to move on. Raises UserError where the file is damaged, is not parquet, or
    has no column for the text."""
    with explained(name):
        rows = Rows(raw, name, cfg)
        metadata = rows.file.metadata
        record = 0
        for group in range(metadata.num_row_groups):
            for domain, text in rows.cells(group):
                yield Document(name, record, domain, text, default)
                record += text.number if isinstance(text, Skipped) else 1
            if bar.total and metadata.num_rows:
                bar.update(bar.total * metadata.row_group(group).num_rows / metadata.num_rows)


@contextmanager
def explained(name):
    """Turns pyarrow's errors about a file into UserErrors."""
    try:
        yield
    except pa.ArrowNotImplementedError as e:
        what = f"{name} is written in a way that pyarrow cannot read ({short(e)})"
        raise UserError(f"{what}: write it anew with another program") from e
    except pa.ArrowMemoryError as e:
        raise UserError(f"{name} needs more memory than this machine has ({short(e)})") from e
    except (OSError, pa.ArrowException) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise  # the disk fails, not the file's content
        if "crypt" in str(e):
            raise UserError(f"{name} is encrypted: decrypt it first") from e
        raise UserError(f"{name} is damaged or cut short ({short(e)}): fetch it again") from e


@dataclass(frozen=True)
class Column:
    """Where a key such as meta.pile_set_name leads."""

    path: tuple  # names, from a column of the file down through its structs
    rest: str  # of the key: to be looked up in a map or a text of JSON there
    kind: pa.DataType  # of what stands there

    @property
    def is_map(self):
        return pa.types.is_map(self.kind)

    @property
    def has_text(self):
        """Whether a text may stand there."""
        return is_any(TEXT_TYPES, values_of(self.kind)) or bool(self.is_map and self.rest)

    @property
    def has_name(self):
        """Whether the name of a domain may stand there: a text, a number or a date."""
        printable = is_any(NUMBER_TYPES + PRINTED_TYPES, values_of(self.kind))
        return self.has_text or (printable and not self.rest)

    @property
    def keeps_once(self):
        """Whether a text that stands in many rows is in memory only once."""
        return self.is_map or pa.types.is_dictionary(self.kind)

    @property
    def name(self):
        """pyarrow's name of the column, or of the struct with columns below it."""
        return ".".join(self.path)


def is_any(tests, kind):
    return any(test(kind) for test in tests)


def values_of(kind):
    """The type of a column's values, also where it is a dictionary or an extension type."""
    if isinstance(kind, pa.BaseExtensionType):  # arrow.json, for one, is a text
        kind = kind.storage_type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


class Rows:
    """The rows of an open parquet file."""

    def __init__(self, raw, name, cfg):
        self.raw = raw
        self.name = name
        self.is_local = os.path.isfile(name)  # every look at a file far away takes time
        self.longest = cfg.max_document_mb * MB  # bytes of a text
        self.too_large = 4 * self.longest + 2 * ROOM  # bytes of a page
        footer = self.look_at_ends()
        self.file = self.open()
        if footer == self.file.metadata.serialized_size + SIGNATURE:
            raise UserError(f"{name} is encrypted: decrypt it first")
        fields = list(self.file.schema_arrow)
        self.text = locate(fields, cfg.text_key, name)
        if self.text is None:
            cure = f"write --text_key=<one of {listed(self.file.schema_arrow.names)}>"
            raise MissingColumn(f"{name} has no column {cfg.text_key!r}: {cure}")
        self.leaves = {self.text: self.find_leaves(self.text)}  # {Column: {number: name}}
        self.domain = locate(fields, cfg.domain_key, name)
        if self.domain and not self.domain.has_name:
            self.domain = None
        if self.domain:
            self.leaves[self.domain] = self.find_leaves(self.domain)
        in_maps = []  # a row can have any number of entries: each text is kept once
        for column, leaves in self.leaves.items():
            if column.is_map:
                in_maps += leaves.values()
        if in_maps:
            self.file = self.open(in_maps)

    def look_at_ends(self):
        """Returns the bytes of the footer. Raises UserError where this is not a parquet file."""
        self.raw.seek(0)
        begin = self.raw.read(4)
        self.raw.seek(0, os.SEEK_END)
        self.raw.seek(max(0, self.raw.tell() - 8))
        footer = self.raw.read(4)
        end = self.raw.read(4)
        if b"PARE" in (begin, end):
            raise UserError(f"{self.name} is encrypted: decrypt it first")
        if begin != b"PAR1":
            what = f"is no parquet file (it begins with {begin!r})"
            raise UserError(f"{self.name} {what}: name it as what it is, or fetch it again")
        return int.from_bytes(footer, "little")

    def open(self, once=None):
        """Returns pyarrow's file. once: the columns whose equal texts are to be in memory once."""
        return pa.parquet.ParquetFile(
            self.raw,
            read_dictionary=once,
            pre_buffer=False,
            buffer_size=MB,
            page_checksum_verification=True,
            arrow_extensions_enabled=False,
        )

    def find_leaves(self, column):
        """The stored columns that a Column consists of, as {number: name}."""
        leaves = {}
        for i in range(self.file.metadata.num_columns):
            path = self.file.schema.column(i).path
            if path == column.name or path.startswith(f"{column.name}."):
                leaves[i] = path
        return leaves

    def cells(self, group):
        """The (domain, text) cells of a row group, row by row.

        One Skipped stands for all the rows where none has a text, or a page is too large."""
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
        batches = self.file.iter_batches(
            self.rows_at_once(pages),
            row_groups=[group],
            columns=[column.name for column in pages],
            use_threads=False,
        )
        for batch in batches:
            texts = column_cells(batch, self.text, self.longest)
            if self.domain in pages:
                domains = column_cells(batch, self.domain, self.longest)
            else:
                domains = [TOO_LONG if self.domain else None] * len(texts)
            for domain, text in zip(domains, texts, strict=True):
                yield domain, text if isinstance(text, (bytes, Within, Skipped)) else None

    def rows_at_once(self, pages):
        """How many rows fit into memory even if each holds a text as large as the largest page.

        pages: {Column: bytes of its largest page}."""
        rows = ROWS_ONCE
        for column, page in pages.items():
            if not column.keeps_once:
                rows = min(rows, ROWS, (self.longest + ROOM) // max(1, page))
        return max(1, rows)

    def largest_page(self, group, column):
        """A bound on the bytes of a Column's largest page in a row group.

        It is exact, except for small columns of a file far away, whose pages would have to be
        fetched: there it is the bytes of all their pages."""
        largest = 0
        for i in self.leaves[column]:
            chunk = self.file.metadata.row_group(group).column(i)
            size = chunk.total_uncompressed_size
            if self.is_local or size > self.longest + ROOM:
                try:
                    size = largest_page(self.raw, chunk)
                except (ValueError, RecursionError) as e:
                    # pyarrow says better what is wrong, if it can read that much
                    if size > self.too_large:
                        raise pa.ArrowInvalid(short(e)) from e
            largest = max(largest, size)
        return largest


def locate(fields, key, name, path=()):
    """The Column to which a key leads, or None.

    fields: pyarrow's, below the path. name: the file's. Raises UserError where two fields have the
    key's name."""
    for first, rest in splits_of_key(key):
        matches = [field for field in fields if field.name == first]
        if len(matches) > 1:
            raise UserError(f"{name} has {len(matches)} columns {first!r}: rename all but one")
        if not matches:
            continue
        kind = matches[0].type
        if rest and pa.types.is_struct(kind):
            return locate(list(kind), rest, name, (*path, first))
        return Column((*path, first), rest, kind)
    return None


# --- cells --------------------------------------------------------------------------


def column_cells(batch, column, longest):
    """A Column's cells in a record batch: a list of bytes, numbers, Within, TOO_LONG and None."""
    array = batch.column(batch.schema.get_field_index(column.path[0]))
    for name in column.path[1:]:
        array = pa.compute.struct_field(array, [array.type.get_field_index(name)])
    return cells(array, column.rest, longest)


def cells(array, rest, longest):
    """The cells of an array, as a list. rest: of the key, to be looked up in each of them.

    Texts are bytes, so that one which is not UTF-8 spoils no other."""
    if isinstance(array.type, pa.BaseExtensionType):  # arrow.json, for one, is a text
        array = array.storage
    kind = array.type
    if pa.types.is_dictionary(kind):
        values = cells(array.dictionary, rest, longest)
        return [None if i is None else values[i] for i in array.indices.to_pylist()]
    if pa.types.is_map(kind) and rest:
        return map_cells(array, rest, longest)
    if pa.types.is_struct(kind) and rest:  # in a map: locate() has gone into all others
        for first, deeper in splits_of_key(rest):
            i = kind.get_field_index(first)
            if i >= 0:
                return cells(pa.compute.struct_field(array, [i]), deeper, longest)
    if is_any(TEXT_TYPES, kind):
        texts = text_cells(array, longest)
        if not rest:
            return texts
        return [Within(text, rest) if isinstance(text, bytes) else text for text in texts]
    if not rest and is_any(NUMBER_TYPES, kind):
        return array.to_pylist()
    if not rest and is_any(PRINTED_TYPES, kind):
        if pa.types.is_timestamp(kind):
            array = array.cast(pa.timestamp(kind.unit))  # without its zone, which may be unknown
        return array.cast(pa.string()).to_pylist()
    return [None] * len(array)  # lists and structs


def text_cells(array, longest):
    """An array of texts -> bytes, None, and TOO_LONG for a text of more than `longest` bytes."""
    array = array.cast(pa.large_binary())
    if array.nbytes <= longest:
        return array.to_pylist()
    texts = []
    lengths = pa.compute.binary_length(array).to_pylist()
    for length, scalar in zip(lengths, array, strict=True):
        if length is not None and length > longest:
            texts.append(TOO_LONG)
        else:
            texts.append(scalar.as_py())
    return texts


def map_cells(array, key, longest):
    """An array of maps -> what each map has under a key, or None.

    The whole key is looked up first, then the rest of the key below its part before the first
    dot."""
    map_keys = cells(array.keys, "", longest)
    offsets = array.offsets.to_pylist()
    results = [None] * len(array)
    for first, rest in splits_of_key(key):
        items = cells(array.items, rest, longest)
        for row, (begin, end) in enumerate(pairwise(offsets)):
            for i in range(begin, end):
                if results[row] is None and map_keys[i] == first.encode():
                    results[row] = items[i]
    return results


def splits_of_key(key):
    """The ways to read "a.b": [("a.b", ""), ("a", "b")], a name and the rest of the key."""
    first, dot, rest = key.partition(".")
    return [(key, ""), (first, rest)] if dot else [(key, "")]
