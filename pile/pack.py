"""Documents in tokens -> parts of a source -> rows of one domain each, in the arrays and tables
that data.py reads."""

import hashlib
import json
import os
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from system.errors import UserError
from system.files import footer_crc32, short, sync
from system.terminal import progress

MB = 1 << 20
SPLITS = ("train", "val")
MOST_DOMAINS = 1 << 16  # as many as a uint16 can tell apart
TABLE_ROWS = 1 << 14  # of a row group of a table of documents

DOCUMENTS = pa.schema(  # of train_docs.parquet and val_docs.parquet
    {
        "doc": pa.int64(),
        "domain": pa.string(),
        "source": pa.string(),
        "record": pa.int64(),
        "first_chunk": pa.int64(),
        "first_token": pa.int32(),
        "n_tokens": pa.int64(),
    }
)
COLUMNS = pa.schema(  # of a part; tokens: uint16 as bytes, of which a document may have over 2^31
    {
        "split": pa.string(),
        "domain": pa.string(),
        "source": pa.string(),
        "record": pa.int64(),
        "tokens": pa.large_binary(),
    }
)

# --- parts ----------------------------------------------------------------------


def write_part(path, encoded, limit):
    """What Encoder gives, up to and with the document that reaches the limit of tokens -> a file.

    A batch has what came of a job. The last one has none, but what the part holds, a Counter of
    "tokens", ("documents", split, domain), ("tokens", split, domain), ("skipped", reason),
    ("left out", domain), "no_domain" and "long_domain"."""
    held = Counter()
    with opened(path, "wb") as sink, pa.ipc.new_file(sink, COLUMNS) as file:
        for rows, notes in encoded:
            kept = rows_within(rows, limit - held["tokens"])
            for split, domain, _, _, tokens in kept:
                n = len(tokens) // 2
                held.update({"tokens": n, ("tokens", split, domain): n})
                held["documents", split, domain] += 1
            for rows_before, key, number in notes:
                if len(kept) == len(rows) or rows_before < len(kept):
                    held[key] += number
            if len(held) > 4 * MOST_DOMAINS:  # it would grow without end
                what = f"--domain_key has over {MOST_DOMAINS} values"
                raise UserError(f"{what}: name a key with fewer")
            file.write_batch(batch_of(kept))
            if held["tokens"] >= limit:
                break
        counts = json.dumps(list(held.items()))
        file.write_batch(batch_of([]), custom_metadata={"held": counts})
    sync(path)


def rows_within(rows, limit):
    """The first rows, up to and with the one that makes it `limit` tokens."""
    lengths = [len(tokens) // 2 for _, _, _, _, tokens in rows]
    return rows[: np.searchsorted(np.cumsum(lengths), limit) + 1]


def batch_of(rows):
    columns = list(zip(*rows)) or [[] for _ in COLUMNS]
    return pa.record_batch(columns, schema=COLUMNS)


def opened(path, mode):
    """A file for pyarrow, which takes a name that is no UTF-8 only as bytes."""
    return pa.OSFile(os.fsencode(path), mode)


def open_part(file, path):
    """An open file of write_part() -> pyarrow's reader. Raises UserError where it is damaged."""
    try:
        return pa.ipc.open_file(file)
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{path} is damaged ({short(e)}): remove it, and start again") from e


def read_held(path):
    """What a part holds, as write_part() has counted it."""
    with opened(path, "rb") as source:
        part = open_part(source, path)
        last = part.get_batch_with_custom_metadata(part.num_record_batches - 1)
        counts = json.loads(last.custom_metadata[b"held"])
    held = Counter()
    for key, number in counts:
        held[tuple(key) if isinstance(key, list) else key] = number
    return held


# --- rows -----------------------------------------------------------------------


class Array:
    """A uint16 .npy file written from front to back, and its sha256."""

    def __init__(self, path, shape):
        self.file, self.sha256 = open(path, "wb", MB), hashlib.sha256()
        header = {"descr": "<u2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self, header)

    def write(self, data):
        self.file.write(data)
        self.sha256.update(data)


class Split:
    """Packs one split's documents into rows and writes its three files."""

    def __init__(self, folder, name, meta):
        self.path = folder / f"{name}_docs.parquet"
        self.table_file = opened(self.path, "wb")
        self.table = pa.parquet.ParquetWriter(self.table_file, DOCUMENTS, write_page_checksum=True)
        self.width, n = meta["block_size"] + 1, meta["chunks"][name]
        self.rows = Array(folder / f"{name}.npy", (n, self.width))
        self.domain = Array(folder / f"{name}_domain.npy", (n,))
        self.numbers = {domain: i for i, domain in enumerate(meta["domains"])}
        self.n = 0  # rows written
        self.entries = []  # of the table, not written yet
        # by domain: tokens that fill no row yet, and (place, document, tokens) of those documents
        # that begin there
        self.waiting = {}

    def add(self, document, tokens):
        """document: its doc, domain, source and record. tokens: uint16 (n,), with <eot>."""
        domain = document[1]
        waiting, begun = self.waiting.get(domain, (tokens[:0], []))
        begun.append((len(waiting), document, len(tokens) - 1))
        stream = np.concatenate([waiting, tokens])
        n = len(stream) // self.width
        if n:
            full = n * self.width
            for at, about, length in begun:
                if at < full:
                    chunk, token = self.n + at // self.width, at % self.width
                    self.entries.append((*about, chunk, token, length))
            begun = [(at - full, about, length) for at, about, length in begun if at >= full]
            self.rows.write(stream[:full])
            self.domain.write(np.full(n, self.numbers[domain], "<u2"))
            self.n += n
            stream = stream[full:].copy()
        self.waiting[domain] = stream, begun
        if len(self.entries) >= TABLE_ROWS:
            self.write_table()

    def write_table(self):
        """The entries, as one row group."""
        columns = list(zip(*self.entries)) or [[] for _ in DOCUMENTS]
        self.table.write_batch(pa.record_batch(columns, schema=DOCUMENTS))
        self.entries = []

    def close(self):
        self.write_table()
        self.table.close()
        for file in (self.table_file, self.rows.file, self.domain.file):
            file.close()


def pack(parts, folder, meta):
    """The documents of the parts, in order -> both splits' files; adds to meta what is known after
    that."""
    splits = {name: Split(folder, name, meta) for name in SPLITS}
    doc = 0
    for path in progress(parts, "pack", unit="part", delay=1):
        with opened(path, "rb") as source:
            for split, domain, name, record, tokens in part_rows(source, path):
                splits[split].add((doc, domain, name, record), np.frombuffer(tokens, "<u2"))
                doc += 1
    dropped = 0  # documents with no token in a chunk
    for name, split in splits.items():
        dropped += sum(len(begun) for _, begun in split.waiting.values())
        split.close()
        meta["sha256"][f"{name}.npy"] = split.rows.sha256.hexdigest()
        meta["sha256"][f"{name}_domain.npy"] = split.domain.sha256.hexdigest()
        with open(split.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        meta["sha256"][split.path.name] = digest.hexdigest()
        meta["footers"][split.path.name] = footer_crc32(split.path)
    meta["dropped_documents"] = dropped


def part_rows(source, path):
    """An open part -> its rows, as Encoder gave them."""
    part = open_part(source, path)
    for i in range(part.num_record_batches):
        columns = [column.to_pylist() for column in part.get_batch(i).columns]
        yield from zip(*columns)
