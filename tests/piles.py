"""Sources for the tests of prepare_pile.py, and ways to look at what it wrote."""

import hashlib
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import data
from prepare_pile import Config, prepare

ARRAYS = ("train.npy", "val.npy", "train_domain.npy", "val_domain.npy")
TABLES = ("train_docs.parquet", "val_docs.parquet")


def texts(n=150, seed=0, domains="abc", words=60):
    """[(domain, text)]. The words of domain "a" are of a's, and so on, so that a chunk shows its
    domain. Every tenth text is long."""
    rng = random.Random(seed)
    documents = []
    for i in range(n):
        domain = rng.choice(domains)
        length = rng.randrange(1, words * (8 if i % 10 == 9 else 1))
        text = " ".join(domain * rng.randrange(1, 9) for _ in range(length))
        documents.append((domain, f"{domain}{text} {i}"))
    return documents


def record(domain, text):
    """A record as the Pile has it."""
    return {"text": text, "meta": {"pile_set_name": domain}}


def json_lines(records):
    """Records -> bytes, a line of JSON each."""
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def lines(documents):
    """[(domain, text)] -> bytes, a line of JSON each."""
    return json_lines(record(domain, text) for domain, text in documents)


def run(folder, source, **options):
    """Prepares folder/out from a source. Returns the open dataset."""
    defaults = {"tokenizer": "byte", "block_size": 64, "val_fraction": 0.3, "workers": 1}
    options = {**defaults, "data_dir": str(folder / "out"), **options}
    prepare(Config(source=str(source), **options))
    return data.open_dataset(options["data_dir"])


def write(path, content):
    """Writes bytes to a file, and makes its folder. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def table(dataset, split):
    """The rows of a split's table of documents, as dicts."""
    with open(dataset.path / f"{split}_docs.parquet", "rb") as file:
        return pq.read_table(file).to_pylist()


def streams(dataset, split):
    """{domain: (numbers of its chunks, their tokens one after another)}."""
    part = getattr(dataset, split)
    by_domain = {}
    for number, domain in enumerate(dataset.domains):
        chunks = np.flatnonzero(part.domain == number)
        by_domain[domain] = chunks, part.rows[chunks].reshape(-1)
    return by_domain


def document_tokens(dataset, split, row, by_domain=None):
    """The tokens of a document, by its row of the table: from its first chunk on, through the
    chunks of its domain. by_domain: of streams(). Returns (tokens, whether these are all)."""
    width = dataset.meta["block_size"] + 1
    eot = dataset.meta["eot"]
    by_domain = by_domain or streams(dataset, split)
    chunks, stream = by_domain[row["domain"]]
    assert row["first_chunk"] in chunks
    start = int(np.searchsorted(chunks, row["first_chunk"])) * width + row["first_token"]
    end = start + row["n_tokens"]
    assert start == 0 or stream[start - 1] == eot
    assert end >= len(stream) or stream[end] == eot
    return stream[start:end], end <= len(stream)


def digest(folder, names=ARRAYS + TABLES):
    """{name: sha256 of the file}."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def contents(dataset):
    """The documents of a dataset of bytes without validation set, [(domain, text)] as read.

    Tokens that do not fill a domain's last row are missing."""
    documents = []
    by_domain = streams(dataset, "train")
    for row in sorted(table(dataset, "train"), key=lambda row: row["doc"]):
        tokens, _ = document_tokens(dataset, "train", row, by_domain)
        documents.append((row["domain"], bytes(tokens.tolist()).decode()))
    return documents


def parquet(path, documents, dtype=None):
    """Writes [(domain, text)] as a parquet file in groups of 40 rows. dtype: of the texts."""
    path.parent.mkdir(exist_ok=True)
    columns = {
        "n": pa.array(range(len(documents))),
        "meta": pa.array([{"pile_set_name": domain} for domain, _ in documents]),
        "text": pa.array([text for _, text in documents], dtype),
    }
    pq.write_table(pa.table(columns), path, row_group_size=40)
