"""Numbered chunks in memmapped arrays, the order they are trained in, and the targets' chunks.

A data folder holds train.npy and val.npy, uint16 (n_chunks, block_size + 1), one domain a chunk
(train_domain.npy, val_domain.npy), one row a document (train_docs.parquet, val_docs.parquet) and
meta.json; prepare_pile.py writes it. Row i of train.npy is chunk i everywhere else: in the ledger,
in values.npy, in a report.
"""

import hashlib
import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pile.targets import Target, parse_targets  # noqa: F401
from pile.tokenizers import TOKENIZERS, tokenizer  # noqa: F401
from system import terminal
from system.errors import UserError
from system.files import check_entries, crc32, footer_crc32, load_array, read_json

SCHEMA = 3  # of meta.json
CHECKED = 128 << 20  # bytes that are compared with their sha256 at every start: a blink
ARRAYS = ("train.npy", "val.npy", "train_domain.npy", "val_domain.npy")
DATA_FILES = [*ARRAYS, "train_docs.parquet", "val_docs.parquet", "meta.json"]
ENTRIES = {"schema": int, "tokenizer": str, "vocab_size": int, "eot": int, "block_size": int}
ENTRIES |= {"domains": list, "chunks": dict, "sha256": dict, "config": dict, "tokens": dict}
ENTRIES |= {"footers": dict}

# --- a prepared data folder ---------------------------------------------------


@dataclass
class Split:
    rows: np.ndarray  # uint16 (n_chunks, block_size + 1), memmapped
    domain: np.ndarray  # uint16 (n_chunks,), index into Dataset.domains
    file: object  # the open file of rows

    def batch(self, ids, block_size):
        """ids (b,) -> X, Y int64 (b, block_size): the first block_size tokens of each chunk, and
        the tokens after them. Raises UserError where the file was cut short meanwhile: reading
        behind its end would kill the process."""
        if os.fstat(self.file.fileno()).st_size < self.rows.offset + self.rows.nbytes:
            raise UserError(f"{self.file.name} was cut short while it was read: prepare it again")
        rows = self.rows[ids, : block_size + 1].astype(np.int64)
        return rows[:, :-1], rows[:, 1:]


@dataclass
class Dataset:
    path: Path
    meta: dict
    train: Split
    val: Split
    keep: np.ndarray | None = (
        None  # int64: the chunks to train on, where not all; one that stands twice is met twice in a pass
    )

    @property
    def domains(self):
        return self.meta["domains"]

    @property
    def hash(self):
        """One sha256 for the arrays: what a run's values belong to."""
        sums = {name: self.meta["sha256"][name] for name in sorted(ARRAYS)}
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()

    def ids(self, step, batch, seed):
        """The ids (batch,) of step's chunks: each pass meets every chunk, or every kept one, in an order of its own."""
        if self.keep is None:
            return global_batch(step, batch, len(self.train.rows), seed)
        return np.asarray(self.keep[global_batch(step, batch, len(self.keep), seed)], np.int64)

    def verify(self, names=None):
        """Reads files of the folder, all by default. Raises UserError, saying what to type, if one
        is not as it was written."""
        for name in self.meta["sha256"] if names is None else names:
            with open(self.path / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.meta["sha256"][name]:
                what = f"{self.path}/{name} is damaged, its sha256 is not meta.json's"
                raise UserError(f"{what}: {self.prepare_again()}")

    def check_table(self, name):
        """Raises UserError where a table of documents is not as it was written: by its sha256, or,
        where it is large, by its footer's checksum (its pages have their own)."""
        path = self.path / name
        try:
            if path.stat().st_size <= CHECKED:
                self.verify([name])
            elif footer_crc32(path) != self.meta["footers"].get(name):
                raise UserError(f"{path} is damaged (its footer): {self.prepare_again()}")
        except OSError as e:
            what = f"{path} is missing or damaged ({e.strerror})"
            raise UserError(f"{what}: {self.prepare_again()}") from e

    def prepare_again(self):
        """What to type where a file is damaged."""
        return prepare_again(self.path, self.meta)


def open_dataset(data_dir, keep=""):
    """Opens a data folder; keep: a file that says which chunks to train on (curate.py). Raises
    UserError, saying what to type, where the folder is missing, unfinished or does not fit its
    meta.json, or keep does not fit the folder."""
    path = Path(data_dir)
    again = terminal.command("python", "prepare_pile.py", f"--data_dir={data_dir}")
    if not (path / "meta.json").is_file():
        raise UserError(f"no prepared data in {path}: type: {again}")
    meta = read_json(path / "meta.json", f"type: {again} --overwrite", {"schema": int})
    if meta["schema"] != SCHEMA:
        what = f"{path}/meta.json has schema {meta['schema']}, this code reads {SCHEMA}"
        raise UserError(f"{what}: type: {again} --overwrite")
    check_meta(meta, path, f"type: {again} --overwrite")
    dataset = Dataset(path, meta, open_split(path, meta, "train"), open_split(path, meta, "val"))
    checked = small_arrays(path)
    dataset.verify(checked)
    for split, name in ((dataset.train, "train_domain.npy"), (dataset.val, "val_domain.npy")):
        if name in checked and (split.domain >= len(meta["domains"])).any():
            what = f"{path}/{name} is damaged, a chunk has a domain that meta.json does not name"
            raise UserError(f"{what}: {prepare_again(path, meta)}")
    if keep:
        dataset.keep = read_keep(Path(keep), dataset)
    return dataset


def small_arrays(path):
    """The arrays that are compared with their sha256 whenever a data folder is opened: the smallest
    ones, CHECKED bytes in all."""
    sizes = {name: (path / name).stat().st_size for name in ARRAYS}
    found, total = [], 0
    for name in sorted(ARRAYS, key=sizes.get):
        total += sizes[name]
        if total <= CHECKED:
            found.append(name)
    return found


def check_meta(meta, path, cure):
    """Raises UserError where an entry of meta.json is missing or of another type."""
    check_entries(meta, ENTRIES, path / "meta.json", cure)
    for key in ("chunks", "tokens"):
        check_entries(meta[key], {"train": int, "val": int}, path / "meta.json", cure)
    check_entries(meta["sha256"], dict.fromkeys(DATA_FILES[:-1], str), path / "meta.json", cure)
    if not all(isinstance(name, str) for name in meta["domains"]):
        raise UserError(f"{path}/meta.json is damaged (a domain is no text): {cure}")
    if meta["tokenizer"] not in TOKENIZERS:
        have = ", ".join(TOKENIZERS)
        raise UserError(f"{path} is of a tokenizer {meta['tokenizer']!r}; there is {have}: {cure}")


def open_split(path, meta, name):
    cure, n = prepare_again(path, meta), meta["chunks"][name]
    shape = (n, meta["block_size"] + 1)
    rows = load_array(path / f"{name}.npy", cure, np.uint16, shape)
    # else the system reads ahead of every row, on some machines 8 MB for 2 KB
    rows.base.madvise(mmap.MADV_RANDOM)
    domain = load_array(path / f"{name}_domain.npy", cure, np.uint16, (n,))
    return Split(rows, domain, open(path / f"{name}.npy", "rb"))


# the options of prepare_pile.py that decide what is written, with their defaults
PREPARED_BY = {"source": "", "dataset": "monology/pile-uncopyrighted", "text_key": "text"}
PREPARED_BY |= {"domain_key": "meta.pile_set_name", "domains": "", "tokenizer": "gpt2"}
PREPARED_BY |= {"block_size": 1024, "val_fraction": 0.01, "limit_tokens": 0}
PREPARED_BY |= {"follow_links": False, "max_document_mb": 64}


def prepare_again(path, meta):
    """What to type for a data folder to be prepared again, from the options that made it. It is put
    together here, for meta.json may come from a stranger."""
    words = [f"--data_dir={path}"]
    for key, default in PREPARED_BY.items():
        value = meta["config"].get(key, default)
        if type(value) is type(default) and value != default:
            words.append(f"--{key}={value}")
    return "type: " + terminal.command("python", "prepare_pile.py", *words, "--overwrite")


KEEP_CURE = "name a file that curate.py wrote"


def read_keep(path, dataset):
    """keep.npy -> the chunks' numbers (n,), memmapped. The keep.json that curate.py writes beside
    it says of which data they are, and its checksum."""
    ids = load_array(path, KEEP_CURE)
    n = len(dataset.train.rows)
    is_list = ids.ndim == 1 and ids.dtype.kind in "iu" and len(ids)
    if not is_list or not 0 <= ids.min() <= ids.max() < n:
        wanted = f"it must hold numbers of chunks, integers from 0 to {n - 1}"
        what = f"is {ids.dtype} {ids.shape}; {wanted}"
        raise UserError(f"--keep={path} {what}: {KEEP_CURE} for {dataset.path}")
    about = path.with_suffix(".json")
    if about.is_file():
        check_keep(path, read_json(about, KEEP_CURE, {"data_hash": str, "files": dict}), dataset)
    return ids


def check_keep(path, about, dataset):
    if about["data_hash"] != dataset.hash:
        what = f"--keep={path} names chunks of other data than {dataset.path} (its hash differs)"
        raise UserError(f"{what}: name the run's data with --data_dir=...")
    if about["files"].get(path.name) != crc32(path):
        raise UserError(f"--keep={path} is damaged: its checksum does not fit: {KEEP_CURE}")


# --- the order of chunks ------------------------------------------------------


def permute(positions, n, key):
    """Positions in 0..n-1 -> the chunks that stand there in the key's pseudo-random permutation of 0..n-1.

    positions: int array; key: tuple of ints. A Feistel network over the next power of four, walked until it lands below n:
    any position costs the same and nothing is stored, for a hundred chunks or for 300 million.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(key).generate_state(8, np.uint64)

    def rounds(x):
        left, right = x >> half, x & mask
        for k in keys:
            z = (right + k) * np.uint64(
                0x9E3779B97F4A7C15
            )  # splitmix64's mixing; arrays wrap around silently
            z = (z ^ (z >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((z ^ (z >> np.uint64(32))) & mask)
        return left << half | right

    x = rounds(np.asarray(positions, np.uint64))
    while (outside := x >= n).any():
        x[outside] = rounds(x[outside])
    return x.astype(np.int64)


def global_batch(step, batch, n, seed):
    """The ids (batch,) of step's chunks: a pure function of its arguments, each epoch a permutation of all n chunks."""
    epoch, position = np.divmod(np.arange(step * batch, (step + 1) * batch), n)
    ids = np.empty(batch, np.int64)
    for e in np.unique(epoch):
        ids[epoch == e] = permute(position[epoch == e], n, (seed, int(e)))
    return ids
