"""Sources for the tests of preparing, and what became of them."""

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
    """[(domain, text)]: domain "a" has words of a's, and so on, so that a chunk shows whose it is;
    every tenth text is long."""
    rng = random.Random(seed)
    found = []
    for i in range(n):
        domain = rng.choice(domains)
        length = rng.randrange(1, words * (8 if i % 10 == 9 else 1))
        said = [domain * rng.randrange(1, 9) for _ in range(length)]
        found.append((domain, f"{domain}{' '.join(said)} {i}"))
    return found


def record(domain, text):
    return {"text": text, "meta": {"pile_set_name": domain}}


def lines(documents):
    return b"".join(json.dumps(record(*document)).encode() + b"\n" for document in documents)


def run(folder, source, **options):
    """Prepares folder/out from a source -> the open dataset."""
    defaults = {"tokenizer": "byte", "block_size": 64, "val_fraction": 0.3, "workers": 1}
    options = {**defaults, "data_dir": str(folder / "out"), **options}
    prepare(Config(source=str(source), **options))
    return data.open_dataset(options["data_dir"])


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def table(dataset, split):
    with open(dataset.path / f"{split}_docs.parquet", "rb") as file:
        return pq.read_table(file).to_pylist()


def streams(dataset, split):
    """{domain: (numbers of its chunks, their tokens one after another)}."""
    part = getattr(dataset, split)
    chunks = {name: np.flatnonzero(part.domain == d) for d, name in enumerate(dataset.domains)}
    return {name: (own, part.rows[own].reshape(-1)) for name, own in chunks.items()}


def found_text(dataset, split, row, stream=None):
    """The tokens of a document, by its row of the table: from its first chunk on, through the
    chunks of its domain. -> (tokens, whole?)"""
    width, eot = dataset.meta["block_size"] + 1, dataset.meta["eot"]
    own, stream = (stream or streams(dataset, split))[row["domain"]]
    assert row["first_chunk"] in own
    start = int(np.searchsorted(own, row["first_chunk"])) * width + row["first_token"]
    end = start + row["n_tokens"]
    assert start == 0 or stream[start - 1] == eot
    assert end >= len(stream) or stream[end] == eot
    return stream[start:end], end <= len(stream)


def digest(folder, names=ARRAYS + TABLES):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def contents(dataset):
    """The documents of a dataset of bytes without validation set -> [(domain, text)], as they were
    read. What does not fill a domain's last row is missing."""
    found, stream = [], streams(dataset, "train")
    for row in sorted(table(dataset, "train"), key=lambda row: row["doc"]):
        tokens, _ = found_text(dataset, "train", row, stream)
        found.append((row["domain"], bytes(tokens.tolist()).decode()))
    return found


def parquet(path, documents, dtype=None):
    path.parent.mkdir(exist_ok=True)
    columns = {
        "n": pa.array(range(len(documents))),
        "meta": pa.array([{"pile_set_name": domain} for domain, _ in documents]),
        "text": pa.array([text for _, text in documents], dtype),
    }
    pq.write_table(pa.table(columns), path, row_group_size=40)
