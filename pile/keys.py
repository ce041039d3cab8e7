"""Which keys the records of a source have, so that a message can name them.

Only the first records are looked at, and nothing here fails: what is wrong with a file is said by
the code that reads it.
"""

import contextlib
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet

from pile.documents import MB, whole_lines
from pile.files import suffixes
from pile.parquet import TEXT_TYPES, is_any, locate, values_of
from pile.records import BOM, is_text, lookup, parse, text_of
from pile.unpack import unpacked
from system.errors import UserError
from system.terminal import listed

RECORDS = 100  # that are looked at, at the most
FILES = 10  # in which they are looked for
DEEPEST = 3  # names in a key, as in meta.source.name
MOST_KEYS = 1000  # that are kept
NAMED = 10  # keys that a message names
UNREADABLE = (UserError, OSError, ValueError, RecursionError, pa.ArrowException)


@dataclass
class Keys:
    """What the first records have."""

    records: int = 0  # looked at
    with_text: int = 0  # records with a text under the key for texts, or under both for pairs
    with_domain: int = 0  # records with anything under the key for domains
    texts: dict = field(default_factory=dict)  # {key: characters of text under it}

    def named(self):
        """The keys, as the end of a sentence; empty where there is none."""
        if not self.texts:
            return ""
        names = listed([repr(key) for key in self.texts], NAMED)
        return f"the records have the {'keys' if len(self.texts) > 1 else 'key'} {names}"

    def longest_text(self):
        """The key with the most text, or "" where none has any."""
        key = max(self.texts, key=self.texts.get, default="")
        return key if self.texts.get(key) else ""

    def take_record(self, record, cfg):
        """Counts a record of JSON."""
        self.records += 1
        self.with_text += is_text(text_of(record, cfg))
        self.with_domain += lookup(record, cfg.domain_key) is not None
        for key, value in entries(record):
            if key in self.texts or len(self.texts) < MOST_KEYS:
                length = len(value) if isinstance(value, str) else 0
                self.texts[key] = self.texts.get(key, 0) + length

    def take_schema(self, file, cfg, name):
        """Counts the rows of a parquet file by their columns. file: pyarrow's."""
        rows = min(file.metadata.num_rows, RECORDS - self.records)
        fields = list(file.schema_arrow)
        text = locate(fields, cfg.text_key, name)
        self.records += rows
        self.with_text += rows if text and text.has_text else 0
        self.with_domain += rows if locate(fields, cfg.domain_key, name) else 0
        for key, kind in columns(fields):
            is_text = is_any(TEXT_TYPES, values_of(kind))
            self.texts[key] = self.texts.get(key, 0) + (rows if is_text else 0)


def look(names, cfg, opener=open):
    """The Keys of the first records of files.

    cfg: has text_key, prompt_key, answer_key and domain_key. opener: open(), or its like for the
    hub."""
    keys = Keys()
    for name in names[:FILES]:
        kind, packed = suffixes(name)
        if keys.records >= RECORDS or kind in ("", ".txt"):
            continue
        with contextlib.suppress(*UNREADABLE), opener(name, "rb") as raw:
            if kind == ".parquet":
                keys.take_schema(pa.parquet.ParquetFile(raw), cfg, name)
            else:
                take_lines(keys, unpacked(raw, name, packed), cfg)
    return keys


def take_lines(keys, stream, cfg):
    """Counts the first records of a stream of lines of JSON. Very long lines are left out."""
    for content, n_lines in whole_lines(stream, MB):
        for line in content.split(b"\n") if n_lines else []:
            record = None
            with contextlib.suppress(ValueError, RecursionError):
                record = parse(line.removeprefix(BOM).decode())
            if isinstance(record, dict):
                keys.take_record(record, cfg)
            if keys.records >= RECORDS:
                return


def entries(record, path=()):
    """A record -> (key, value) of all that stands in it, as ("meta.source", "a book")."""
    for name, value in record.items():
        here = (*path, name)
        if isinstance(value, dict) and len(here) < DEEPEST:
            yield from entries(value, here)
        else:
            yield ".".join(here), value


def columns(fields, path=()):
    """pyarrow's fields -> (key, type) of all columns, also of those within structs."""
    for column in fields:
        here = (*path, column.name)
        if pa.types.is_struct(column.type) and len(here) < DEEPEST:
            yield from columns(list(column.type), here)
        else:
            yield ".".join(here), column.type
