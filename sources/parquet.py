"""Documents of a parquet file, as those of the same records in JSON: a row is a record.

Only a text is a text: of other columns (numbers, dates, lists) a row has none. Memory is bounded by
the largest page: only so many rows are taken at a time that they would fit even if each held a
text as large as that. Row groups with a page that is too large itself are skipped and counted.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from sources.pages import largest_page
from sources.records import Document, Skipped, Within
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
    def once(self):
        """Whether a text that stands in many rows is in memory once."""
        return self.is_map or pa.types.is_dictionary(self.kind)

    @property
    def name(self):
        """As pyarrow has it, of one column or of all below it."""
        return ".".join(self.path)


def parquet_documents(raw, name, cfg, default, bar):
    """An open file -> its documents; default: the domain of those without one. bar: is moved on.
    Raises UserError where the file is none, is damaged, or has no column for the text."""
    with explained(name):
        file, text, domain = open_parquet(raw, name, cfg)
        record = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            for document in group_documents(raw, file, group, text, domain, cfg):
                number = document.text.number if isinstance(document.text, Skipped) else 1
                yield document._replace(source=name, record=record, default=default)
                record += number
            if bar.total:
                bar.update(bar.total * rows / file.metadata.num_rows)


@contextmanager
def explained(name):
    """What pyarrow says of a file, as UserError."""
    try:
        yield
    except pa.ArrowNotImplementedError as e:
        what = f"{name} is written in a way that pyarrow cannot read ({short(e)})"
        raise UserError(f"{what}: write it anew with another program") from e
    except (OSError, pa.ArrowException) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise  # of the disk, not of the file
        if "crypt" in str(e):
            raise UserError(f"{name} is encrypted: decrypt it first") from e
        raise UserError(f"{name} is damaged or cut short ({short(e)}): fetch it again") from e


def open_parquet(raw, name, cfg):
    """-> pyarrow's ParquetFile, the Column of the text and that of the domain, or None."""
    raw.seek(0)
    begin = raw.read(4)
    raw.seek(0, 2)
    raw.seek(max(0, raw.tell() - 8))
    length, end = int.from_bytes(raw.read(4), "little"), raw.read(4)
    if begin == b"PARE" or end == b"PARE":
        raise UserError(f"{name} is encrypted: decrypt it first")
    if begin != b"PAR1":
        what = f"is no parquet file (it begins with {begin!r})"
        raise UserError(f"{name} {what}: name it as what it is, or fetch it again")
    options = dict(pre_buffer=False, buffer_size=MB, arrow_extensions_enabled=False)
    options["page_checksum_verification"] = True
    file = pa.parquet.ParquetFile(raw, **options)
    if length == file.metadata.serialized_size + SIGNATURE:
        raise UserError(f"{name} is encrypted: decrypt it first")
    text = locate(list(file.schema_arrow), cfg.text_key, name)
    if text is None:
        have = listed(file.schema_arrow.names)
        raise UserError(f"{name} has no column {cfg.text_key!r}: write --text_key=<one of {have}>")
    domain = locate(list(file.schema_arrow), cfg.domain_key, name)
    maps = [column for column in (text, domain) if column and column.is_map]
    if maps:  # of a map a row can have any number of entries: each text is kept once
        paths = [file.schema.column(i).path for column in maps for i in leaves(file, column)]
        file = pa.parquet.ParquetFile(raw, read_dictionary=paths, **options)
    return file, text, domain


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


def leaves(file, column):
    """The numbers of the columns, as they are stored, that a Column consists of."""
    paths = [file.schema.column(i).path for i in range(file.metadata.num_columns)]
    below = f"{column.name}."
    return [i for i, path in enumerate(paths) if path == column.name or path.startswith(below)]


def group_documents(raw, file, group, text, domain, cfg):
    """A row group -> its documents, all but their source, record and default."""
    longest = cfg.max_document_mb * MB
    most = 4 * longest + 2 * ROOM
    about = file.metadata.row_group(group)
    text_page = page_of(raw, file, about, text, longest)
    domain_page = page_of(raw, file, about, domain, longest) if domain else 0
    if text_page > most:
        yield Document("", 0, None, Skipped("too_long", about.num_rows))
        return
    pages = {text: text_page}
    if domain and domain_page <= most:
        pages[domain] = domain_page
    many = [max(1, page) for column, page in pages.items() if not column.once]
    rows = min([ROWS_ONCE, *(min(ROWS, (longest + ROOM) // page) for page in many)])
    options = dict(row_groups=[group], columns=[column.name for column in pages])
    for batch in file.iter_batches(max(1, rows), use_threads=False, **options):
        texts = [only_text(cell) for cell in column_cells(batch, text, longest)]
        if domain in pages:
            names = column_cells(batch, domain, longest)
        else:
            names = [TOO_LONG if domain else None] * len(texts)
        for cell, name in zip(texts, names):
            yield Document("", 0, name, cell)


def page_of(raw, file, about, column, longest):
    """The bytes of a Column's largest page in a row group, or more. A small column's pages are
    not looked at where that means to fetch them: they are smaller than the column."""
    largest = 0
    for i in leaves(file, column):
        chunk = about.column(i)
        size = chunk.total_uncompressed_size
        if size > longest + ROOM or hasattr(raw, "fileno"):
            try:
                size = largest_page(raw, chunk)
            except (ValueError, RecursionError) as e:
                raise pa.ArrowInvalid(short(e)) from e
        largest = max(largest, size)
    return largest


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
    if any(is_type(kind) for is_type in TEXT_TYPES):
        found = texts(array, longest)
        return [Within(cell, rest) if rest and isinstance(cell, bytes) else cell for cell in found]
    if not rest and any(is_type(kind) for is_type in NUMBER_TYPES):
        return array.to_pylist()
    if not rest and any(is_type(kind) for is_type in PRINTED_TYPES):
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
