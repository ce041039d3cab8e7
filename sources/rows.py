"""Documents in tokens -> parts of a source -> rows of one domain each, in the arrays and tables that data.py reads."""

import hashlib
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from system.errors import UserError
from system.files import footer_crc32, sync
from system.terminal import progress

MB = 1 << 20
SPLITS = ("train", "val")
DOCUMENTS = dict(doc=pa.int64(), domain=pa.string(), source=pa.string(), record=pa.int64())
DOCUMENTS |= dict(first_chunk=pa.int64(), first_token=pa.int32(), n_tokens=pa.int64())
DOCUMENTS = pa.schema(DOCUMENTS)  # of train_docs.parquet and val_docs.parquet
COLUMNS = pa.schema(dict(split=pa.string(), domain=pa.string(), source=pa.string(), record=pa.int64(), tokens=pa.binary()))


def write_part(path, encoded, limit):
    """What encode() gives, up to and with the document that reaches the limit -> a file: a batch a job, and in the last one what it holds:
    "tokens", ("documents", split, domain), ("tokens", split, domain), ("skipped", reason), ("left out", domain)."""
    held, nothing = Counter(), [[] for _ in COLUMNS]
    with pa.ipc.new_file(path, COLUMNS) as file:
        for documents, skipped in encoded:
            held.update(skipped)
            ends = held["tokens"] + np.cumsum([len(tokens) // 2 for *_, tokens in documents])
            documents = documents[: np.searchsorted(ends, limit) + 1]
            for split, domain, *_, tokens in documents:
                held.update({"tokens": len(tokens) // 2, ("tokens", split, domain): len(tokens) // 2, ("documents", split, domain): 1})
            if len(held) > 1 << 18:  # it would grow without end
                raise UserError(f"--domain_key has over {1 << 16} values: name a key with fewer")
            file.write_batch(pa.record_batch([*zip(*documents)] or nothing, schema=COLUMNS))
            if held["tokens"] >= limit:
                break
        file.write_batch(pa.record_batch(nothing, schema=COLUMNS), custom_metadata={"held": json.dumps([*held.items()])})
    sync(path)


class Array:
    """A uint16 .npy file written from front to back, and its sha256."""

    def __init__(self, path, shape):
        self.file, self.sha256 = open(path, "wb", MB), hashlib.sha256()
        np.lib.format.write_array_header_1_0(self, {"descr": "<u2", "fortran_order": False, "shape": shape})

    def write(self, data):
        self.file.write(data)
        self.sha256.update(data)


class Split:
    """Packs one split's documents into rows and writes its three files."""

    def __init__(self, folder, name, meta):
        self.path = folder / f"{name}_docs.parquet"
        self.table = pa.parquet.ParquetWriter(self.path, DOCUMENTS, write_page_checksum=True)
        self.width, self.n, n = meta["block_size"] + 1, 0, meta["chunks"][name]
        self.rows, self.domain = Array(folder / f"{name}.npy", (n, self.width)), Array(folder / f"{name}_domain.npy", (n,))
        self.numbers, self.entries = {domain: i for i, domain in enumerate(meta["domains"])}, []
        self.waiting = {}  # by domain: tokens that fill no row yet, and (place, document) of those that begin there

    def add(self, document, tokens):
        """document: its doc, domain, source and record."""
        waiting, begun = self.waiting.get(domain := document[1], (tokens[:0], []))
        begun.append((len(waiting), document, len(tokens) - 1))
        stream = np.concatenate([waiting, tokens])
        if n := len(stream) // self.width:
            full = n * self.width
            self.entries += [(*of, self.n + at // self.width, at % self.width, length) for at, of, length in begun if at < full]
            begun = [(at - full, of, length) for at, of, length in begun if at >= full]
            self.rows.write(stream[:full])
            self.domain.write(np.full(n, self.numbers[domain], "<u2"))
            self.n += n
            stream = stream[full:].copy()
        self.waiting[domain] = stream, begun
        if len(self.entries) >= 1 << 14:
            self.write_table()

    def write_table(self):
        """The entries, as one row group."""
        self.table.write_batch(pa.record_batch([*zip(*self.entries)] or [[]] * len(self.table.schema), schema=self.table.schema))
        self.entries = []


def pack(parts, folder, meta):
    """The documents of the parts, in order -> both splits' files; adds to meta what is known after that."""
    splits, doc = {name: Split(folder, name, meta) for name in SPLITS}, 0
    for path in progress(parts, "pack", unit="part", delay=1):
        file = pa.ipc.open_file(path)
        for i in range(file.num_record_batches):
            for split, *of, tokens in zip(*(column.to_pylist() for column in file.get_batch(i))):
                splits[split].add((doc, *of), np.frombuffer(tokens, "<u2"))
                doc += 1
    meta["dropped_documents"] = sum(len(begun) for split in splits.values() for _, begun in split.waiting.values())  # with no token in a chunk
    for name, split in splits.items():
        split.write_table()
        split.table.close()
        for end, array in (("", split.rows), ("_domain", split.domain)):
            array.file.close()
            meta["sha256"][f"{name}{end}.npy"] = array.sha256.hexdigest()
        with open(split.path, "rb") as file:
            meta["sha256"][split.path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        meta["footers"][split.path.name] = footer_crc32(split.path)
