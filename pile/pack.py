"""Tokenized documents -> parts, files that hold them -> the arrays and tables that data.py reads.

A part is an Arrow file with the documents of some source files. A row of an array is a chunk.
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from pile.tokenizers import token_type, tokenizer
from system.errors import UserError
from system.files import footer_crc32, short, sync
from system.terminal import progress

MB = 1 << 20
SPLITS = ("train", "val")
MOST_DOMAINS = 1 << 16  # as many as a uint16 can tell apart
TABLE_ROWS = 1 << 14  # in a row group of a table of documents

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
COLUMNS = pa.schema(  # of a part; tokens: as bytes, which may be over 2^31 in a document
    {
        "split": pa.string(),
        "domain": pa.string(),
        "source": pa.string(),
        "record": pa.int64(),
        "tokens": pa.large_binary(),
        "answer": pa.int64(),  # the token with which the answer of a pair begins; 0 of a text
    }
)

# --- parts ----------------------------------------------------------------------


def write_part(path, encoded, limit, token_bytes):
    """Writes a part, up to and with the document that reaches the limit of tokens.

    token_bytes: the bytes of a token. encoded: (rows, notes) of one job after another, as Encoder
    gives them. Each job becomes a batch of the file. A last, empty batch carries the part's counts:
    a Counter of "tokens", ("documents", split, domain), ("tokens", split, domain),
    ("skipped", reason), ("left out", domain), "no_domain" and "long_domain"."""
    counts = Counter()
    with open_arrow(path, "wb") as sink, pa.ipc.new_file(sink, COLUMNS) as file:
        for rows, notes in encoded:
            lengths = [len(tokens) // token_bytes for _, _, _, _, tokens, _ in rows]
            written = rows_within(rows, lengths, limit - counts["tokens"])
            count_rows(counts, written, lengths)
            for rows_before, key, number in notes:
                # a note behind the limit's document is not counted
                if len(written) == len(rows) or rows_before < len(written):
                    counts[key] += number
            if len(counts) > 4 * MOST_DOMAINS:  # the counts would fill the memory
                what = f"--domain_key has over {MOST_DOMAINS} values"
                raise UserError(f"{what}: name a key with fewer")
            file.write_batch(to_batch(written, COLUMNS))
            if counts["tokens"] >= limit:
                break
        last = {"held": json.dumps(list(counts.items()))}
        file.write_batch(to_batch([], COLUMNS), custom_metadata=last)
    sync(path)


def rows_within(rows, lengths, limit):
    """The first rows, up to and with the one in which their tokens reach the limit."""
    return rows[: np.searchsorted(np.cumsum(lengths), limit) + 1]


def count_rows(counts, rows, lengths):
    """Adds the rows' documents and tokens to the counts of a part."""
    for (split, domain, *_), n in zip(rows, lengths):
        counts["tokens"] += n
        counts["tokens", split, domain] += n
        counts["documents", split, domain] += 1


def to_batch(rows, schema):
    """Rows, tuples in the schema's order -> pyarrow's record batch."""
    columns = list(zip(*rows, strict=True)) if rows else [[] for _ in schema]
    return pa.record_batch(columns, schema=schema)


def open_arrow(path, mode):
    """A file for pyarrow, which takes a name that is not UTF-8 only as bytes."""
    return pa.OSFile(os.fsencode(path), mode)


def open_part(file, path):
    """An open part -> pyarrow's reader. Raises UserError where the part is damaged."""
    try:
        return pa.ipc.open_file(file)
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{path} is damaged ({short(e)}): remove it, and start again") from e


def read_held(path):
    """The counts of a part, as write_part() has made them."""
    with open_arrow(path, "rb") as file:
        part = open_part(file, path)
        last = part.get_batch_with_custom_metadata(part.num_record_batches - 1)
        items = json.loads(last.custom_metadata[b"held"])
    counts = Counter()
    for key, number in items:
        counts[tuple(key) if isinstance(key, list) else key] = number
    return counts


# --- chunks ---------------------------------------------------------------------


class Array:
    """A .npy file written from front to back. sha256: of what is written so far."""

    def __init__(self, path, shape, dtype="<u2"):
        self.file = open(path, "wb", MB)
        self.sha256 = hashlib.sha256()
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self, header)

    def write(self, data):
        self.file.write(data)
        self.sha256.update(data)


@dataclass
class Beginning:
    """A document that begins in a chunk which is not full yet."""

    offset: int  # of its first token in the waiting tokens of its domain
    document: tuple  # its doc, domain, source and record
    n_tokens: int  # without <eot>


class PairRows:
    """Which pairs share a row: those of a domain in their order, as many as fit in whole, but no
    more than a number."""

    def __init__(self, width, most):
        """width: tokens of a row. most: pairs of a row."""
        self.width = width
        self.most = most
        self.last = {}  # {domain: (pairs, tokens) of its last row}

    def begins(self, domain, n_tokens):
        """Whether the next pair of a domain begins a row.

        n_tokens: of the pair, from <eot> to <eot>. Two pairs of a row share the one between them.
        """
        n_pairs, used = self.last.get(domain, (self.most, 0))
        if n_pairs == self.most or used + n_tokens - 1 > self.width:
            self.last[domain] = 1, n_tokens
            return True
        self.last[domain] = n_pairs + 1, used + n_tokens - 1
        return False


def count_pair_rows(parts, cfg):
    """How many chunks the pairs of some parts (paths) make: Counter of ("chunks", split, domain).

    cfg: prepare_pile.py's options."""
    counts = Counter()
    rows = {split: PairRows(cfg.block_size + 1, cfg.pairs_per_chunk) for split in SPLITS}
    token_bytes = token_type(tokenizer(cfg.tokenizer).n_vocab).itemsize
    for path in parts:
        with open_arrow(path, "rb") as file:
            for split, domain, _, _, tokens, _ in part_rows(file, path):
                if rows[split].begins(domain, len(tokens) // token_bytes):
                    counts["chunks", split, domain] += 1
    return counts


class Split:
    """Packs one split's documents into rows, and writes the split's files."""

    def __init__(self, folder, name, meta, pairs_per_chunk=0):
        """pairs_per_chunk: how many pairs a row holds at most; 0: they are texts."""
        n_chunks = meta["chunks"][name]
        self.width = meta["block_size"] + 1
        self.path = folder / f"{name}_docs.parquet"
        self.table_file = open_arrow(self.path, "wb")
        self.table = pa.parquet.ParquetWriter(self.table_file, DOCUMENTS, write_page_checksum=True)
        self.token_type = token_type(meta["vocab_size"])
        self.rows = Array(folder / f"{name}.npy", (n_chunks, self.width), self.token_type.str)
        self.domain = Array(folder / f"{name}_domain.npy", (n_chunks,))
        self.answer = None
        if pairs_per_chunk:
            self.eot = meta["eot"]  # fills up the rows
            shape = (n_chunks, 2 * pairs_per_chunk)
            self.answer = Array(folder / f"{name}_answer.npy", shape, "<u4")
            self.most = pairs_per_chunk
            self.pair_rows = PairRows(self.width, self.most)
            self.pairs = {}  # {domain: [(document, tokens, answer)] of its row that is not written}
        self.numbers = {domain: i for i, domain in enumerate(meta["domains"])}
        self.n = 0  # rows written
        self.entries = []  # of the table, not written yet
        # {domain: (its tokens that fill no row yet, the Beginnings among them)}
        self.waiting = {}

    def add(self, document, tokens):
        """document: its doc, domain, source and record. tokens: (n,), with <eot>."""
        domain = document[1]
        waiting, beginnings = self.waiting.get(domain, (tokens[:0], []))
        beginnings.append(Beginning(len(waiting), document, len(tokens) - 1))
        stream = np.concatenate([waiting, tokens])
        if len(stream) >= self.width:
            stream, beginnings = self.write_rows(domain, stream, beginnings)
        self.waiting[domain] = stream, beginnings
        if len(self.entries) >= TABLE_ROWS:
            self.write_table()

    def add_pair(self, document, tokens, answer):
        """tokens: (n,), from <eot> to <eot>. answer: the first token of the answer, which ends with
        the second <eot>."""
        domain = document[1]
        pairs = self.pairs.setdefault(domain, [])
        if self.pair_rows.begins(domain, len(tokens)):
            self.write_pairs(domain)
        pairs.append((document, tokens, answer))
        if len(pairs) == self.most:
            self.write_pairs(domain)
        if len(self.entries) >= TABLE_ROWS:
            self.write_table()

    def write_pairs(self, domain):
        """Writes the pairs of a domain that wait, if any do, as one row, filled up with <eot>."""
        pairs = self.pairs[domain]
        if not pairs:
            return
        row = np.full(self.width, self.eot, self.token_type)
        answers = np.zeros((self.most, 2), "<u4")
        begin = 0  # of the next pair, with the <eot> before it
        for i, (document, tokens, answer) in enumerate(pairs):
            end = begin + len(tokens)
            row[begin:end] = tokens
            answers[i] = begin + answer, end
            self.entries.append((*document, self.n, begin + 1, len(tokens) - 2))
            begin = end - 1
        self.rows.write(row)
        self.answer.write(answers)
        self.domain.write(np.full(1, self.numbers[domain], "<u2"))
        self.n += 1
        pairs.clear()

    def write_rows(self, domain, stream, beginnings):
        """Writes the full rows of a domain's stream. Returns the stream and Beginnings behind."""
        n = len(stream) // self.width
        full = n * self.width
        rest = []
        for beginning in beginnings:
            if beginning.offset < full:
                chunk = self.n + beginning.offset // self.width
                token = beginning.offset % self.width
                entry = (*beginning.document, chunk, token, beginning.n_tokens)
                self.entries.append(entry)
            else:
                beginning.offset -= full
                rest.append(beginning)
        self.rows.write(stream[:full])
        self.domain.write(np.full(n, self.numbers[domain], "<u2"))
        self.n += n
        return stream[full:].copy(), rest  # a copy: a view would keep the whole stream in memory

    def write_table(self):
        """Writes the entries as one row group."""
        self.table.write_batch(to_batch(self.entries, DOCUMENTS))
        self.entries = []

    def close(self):
        if self.answer:
            for domain in self.pairs:
                self.write_pairs(domain)
        self.write_table()
        self.table.close()
        self.table_file.close()
        self.rows.file.close()
        self.domain.file.close()
        if self.answer:
            self.answer.file.close()


def pack(parts, folder, meta, pairs_per_chunk=0):
    """Writes both splits' files into a folder, from the documents of the parts in their order.

    parts: paths. pairs_per_chunk: see Split. Adds to meta the files' checksums and
    dropped_documents, those with no token in a chunk."""
    splits = {name: Split(folder, name, meta, pairs_per_chunk) for name in SPLITS}
    doc = 0
    for path in progress(parts, "pack", unit="part", delay=1):
        with open_arrow(path, "rb") as file:
            for split, domain, source, record, tokens, answer in part_rows(file, path):
                document = (doc, domain, source, record)
                tokens = np.frombuffer(tokens, token_type(meta["vocab_size"]))
                if pairs_per_chunk:
                    splits[split].add_pair(document, tokens, answer)
                else:
                    splits[split].add(document, tokens)
                doc += 1
    meta["dropped_documents"] = 0
    for name, split in splits.items():
        split.close()
        for _, beginnings in split.waiting.values():
            meta["dropped_documents"] += len(beginnings)
        meta["sha256"][f"{name}.npy"] = split.rows.sha256.hexdigest()
        meta["sha256"][f"{name}_domain.npy"] = split.domain.sha256.hexdigest()
        if pairs_per_chunk:
            meta["sha256"][f"{name}_answer.npy"] = split.answer.sha256.hexdigest()
        with open(split.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        meta["sha256"][split.path.name] = digest.hexdigest()
        meta["footers"][split.path.name] = footer_crc32(split.path)


def part_rows(file, path):
    """An open part -> its rows, as Encoder gave them."""
    part = open_part(file, path)
    for i in range(part.num_record_batches):
        columns = [column.to_pylist() for column in part.get_batch(i).columns]
        yield from zip(*columns, strict=True)
