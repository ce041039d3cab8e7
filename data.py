"""Numbered chunks in memmapped arrays, the order they are trained in, and the targets' chunks.

A data folder holds train.npy and val.npy, uint16 (n_chunks, block_size + 1), one domain a chunk (train_domain.npy,
val_domain.npy), one row a document (train_docs.parquet, val_docs.parquet) and meta.json; prepare_pile.py writes it.
Row i of train.npy is chunk i everywhere else: in the ledger, in values.npy, in a report.
"""

import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sources.targets import Target, parse_targets  # noqa: F401
from sources.tokenizers import tokenizer  # noqa: F401

SCHEMA = 2  # of meta.json
CHECKED = 128 << 20  # bytes of arrays that open_dataset() compares with their sha256: it takes a blink

# --- a prepared data folder ---------------------------------------------------


@dataclass
class Split:
    rows: np.ndarray  # uint16 (n_chunks, block_size + 1), memmapped
    domain: np.ndarray  # uint16 (n_chunks,), index into Dataset.domains

    def batch(self, ids, block_size):
        """ids (b,) -> X, Y int64 (b, block_size): the first block_size tokens of each chunk, and the tokens after them."""
        rows = self.rows[ids, : block_size + 1].astype(np.int64)
        return rows[:, :-1], rows[:, 1:]


@dataclass
class Dataset:
    path: Path
    meta: dict
    train: Split
    val: Split
    keep: np.ndarray | None = None  # int64: the chunks to train on, where not all; one that stands twice is met twice in a pass

    @property
    def domains(self):
        return self.meta["domains"]

    @property
    def hash(self):
        """One sha256 for the whole set: what a run's values belong to."""
        return hashlib.sha256(json.dumps(self.meta["sha256"], sort_keys=True).encode()).hexdigest()

    def ids(self, step, batch, seed):
        """The ids (batch,) of step's chunks: each pass meets every chunk, or every kept one, in an order of its own."""
        if self.keep is None:
            return global_batch(step, batch, len(self.train.rows), seed)
        return np.asarray(self.keep[global_batch(step, batch, len(self.keep), seed)], np.int64)

    def verify(self):
        """Reads the arrays' files. Raises ValueError, saying what to type, if one is not as it was written."""
        for name, written in self.meta["sha256"].items():
            with open(self.path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != written:
                    raise ValueError(f"{self.path}/{name} is damaged, its sha256 is not meta.json's: type: {self.meta['command']} --overwrite")


def open_dataset(data_dir, keep=""):
    """Opens a data folder; keep: a file that says which chunks to train on (curate.py). Raises ValueError, saying what to type, where
    the folder is missing, unfinished or does not fit its meta.json, or keep does not fit the folder."""
    path = Path(data_dir)
    again = f"type: python prepare_pile.py --data_dir={data_dir}"
    if not (path / "meta.json").is_file():
        raise ValueError(f"no prepared data in {path}: {again}")
    try:
        meta = json.loads((path / "meta.json").read_text())
    except ValueError as e:
        raise ValueError(f"{path}/meta.json is damaged ({e}): {again} --overwrite") from e
    if meta.get("schema") != SCHEMA:
        raise ValueError(f"{path}/meta.json has schema {meta.get('schema')}, this code reads {SCHEMA}: {again} --overwrite")
    again, splits = f"type: {meta['command']}", []
    for split in ("train", "val"):
        arrays = []
        for name, shape in ((f"{split}.npy", (meta["chunks"][split], meta["block_size"] + 1)), (f"{split}_domain.npy", (meta["chunks"][split],))):
            try:
                array = np.load(path / name, mmap_mode="r")
            except (OSError, ValueError, EOFError) as e:  # no file, no header, or fewer bytes than it promises
                raise ValueError(f"{path}/{name} is missing or damaged ({e}): {again} --overwrite") from e
            if array.shape != shape or array.dtype != np.uint16:
                raise ValueError(f"{path}/{name} is {array.dtype} {array.shape} but meta.json says uint16 {shape}: {again} --overwrite")
            arrays.append(array)
        arrays[0].base.madvise(mmap.MADV_RANDOM)  # else the system reads ahead of every row, on some machines 8 MB for 2 KB
        splits.append(Split(*arrays))
    dataset = Dataset(path, meta, *splits)
    if sum(array.nbytes for split in splits for array in (split.rows, split.domain)) <= CHECKED:
        dataset.verify()
    if keep:
        dataset.keep = read_keep(Path(keep), dataset)
    return dataset


def read_keep(path, dataset):
    """keep.npy -> the chunks' numbers (n,), memmapped. The keep.json that curate.py writes beside it says of which data they are."""
    try:
        ids = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as e:
        raise ValueError(f"--keep={path} is missing or damaged ({e}): name a file that curate.py wrote") from e
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids) or not 0 <= ids.min() <= ids.max() < len(dataset.train.rows):
        what = f"is {ids.dtype} {ids.shape}; it must hold numbers of chunks, integers from 0 to {len(dataset.train.rows) - 1}"
        raise ValueError(f"--keep={path} {what}: name a file that curate.py wrote for {dataset.path}")
    about = path.with_suffix(".json")
    if about.is_file() and json.loads(about.read_text()).get("data_hash", dataset.hash) != dataset.hash:
        raise ValueError(f"--keep={path} names chunks of other data than {dataset.path} (its hash differs): name the run's data with --data_dir=...")
    return ids


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
            z = (right + k) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64's mixing; arrays wrap around silently
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
