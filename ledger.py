"""What a run leaves on disk: the one place that knows the formats.

    ledger.npy   one record a visit: step, chunk, loss (nats), value (nats, one per target), grad_norm, early; row = step * B + slot
    books.npy    one record a step: lr, kappa, loss, and per target what its loss did and why (NaN: not computed)
    audit.npy    one record an audited step: per target how close its values came to the truth
    values.npy   float32 (n_chunks,) or (n_chunks, K): the sum of the ledger's rows, chunk by chunk; NaN = never used
    values.json  sign, unit, rule, the targets, the committed step
    evaluations.jsonl  one line an evaluation: {"step": steps done, "loss": {"val": nats, <domain>: nats, ...}}
    chunks.npy   int64 (n,): the chunks it was trained on, where not all

A value is positive where the chunk lowered the target's loss. Every file is whole at any moment: values.npy, values.json and
checkpoints are written under another name and renamed; ledger.npy and books.npy only grow, and their header counts the rows
of the last commit, so what a crash left behind them does not show, and the next commit overwrites it.
"""

import contextlib
import fcntl
import io
import json
import os
import zlib
from pathlib import Path

import numpy as np

SCHEMA = 1  # of values.json


def visit_dtype(K):
    """grad_norm: the chunk's gradient norm over the weights values.json names, NaN if not computed. early: 1 where AdamW's moments
    are too young for its rules to be trusted."""
    return np.dtype([("step", "<i4"), ("chunk", "<i8"), ("loss", "<f4"), ("value", "<f4", (K,)), ("grad_norm", "<f4"), ("early", "u1")])


BOOK_ENTRIES = ("before", "after", "data", "momentum", "decay", "residual")  # of each target, in nats


def book_dtype(K, domains=0):
    per_target = [(name, "<f4", (K,)) for name in BOOK_ENTRIES]
    if domains:
        per_target.append(("momentum_by_domain", "<f4", (K, domains)))
    return np.dtype([("step", "<i4"), ("lr", "<f4"), ("kappa", "<f4"), ("loss", "<f4"), *per_target])


# Of each target: the values beside the exact Shapley values (rmse in nats; rel_l2 = |values - truth| / |truth|); utility: what the whole batch
# did, loss where momentum and decay alone land - loss where the step lands; efficiency_gap: sum of the values - utility; standard_error of
# the truth, if by permutations: root mean square, relative; loo_: the values beside leave-one-out.
AUDIT_ENTRIES = ("pearson", "spearman", "rmse", "rel_l2", "efficiency_gap", "utility", "standard_error", "loo_pearson", "loo_spearman")


def audit_dtype(K):
    return np.dtype([("step", "<i4"), *((name, "<f4", (K,)) for name in AUDIT_ENTRIES)])


def empty(dtype):
    """One record with nothing computed yet, shape (1,): NaN, and 0 for integers."""
    record = np.zeros(1, dtype)
    for name in dtype.names:
        if dtype[name].base.kind == "f":
            record[name] = np.nan
    return record


# --- writing ------------------------------------------------------------------


def claim(folder, key):
    """Makes the folder, and makes it this process's as long as the file returned is open. Raises ValueError, which says to give another
    --key, if it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise ValueError(f"another process is writing {folder}: wait for it, or write another --{key}") from e
    return lock


@contextlib.contextmanager
def atomic(path, keep=None):
    """A binary file to write that appears under `path` whole or not at all; what was there takes the name `keep`."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)  # the rename itself


def sync(path):
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def write_json(path, content):
    with atomic(path) as f:
        f.write((json.dumps(content, indent=2) + "\n").encode())


def write_lines(path, rows):
    """A line of JSON for each of them."""
    with atomic(path) as f:
        f.writelines((json.dumps(row) + "\n").encode() for row in rows)


def write_array(path, array):
    """A .npy."""
    with atomic(path) as f:
        np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(array))
        f.write(np.ascontiguousarray(array).data)


class Records:
    """A .npy of records that grows by commits; opened with `rows` it forgets what lies beyond them. crc: the CRC-32 of all its rows."""

    def __init__(self, path, dtype, rows=0, crc=0):
        self.dtype, self.rows, self.crc, self.pending = dtype, rows, crc, []
        self.file = open(path, "r+b" if rows else "w+b")
        self._header()
        self.file.truncate(self.start + rows * dtype.itemsize)

    def _header(self):
        header = io.BytesIO()
        fields = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.rows,)}
        np.lib.format.write_array_header_1_0(header, fields)  # numpy pads it so that the count can grow in place
        self.start = len(header.getvalue())
        os.pwrite(self.file.fileno(), header.getvalue(), 0)

    def counted(self):
        """What a checkpoint says of it."""
        return self.rows, self.crc, self.start, self.dtype.itemsize

    def commit(self):
        """Rows first, then the header that counts them."""
        if self.pending:
            new = np.concatenate(self.pending).tobytes()
            self.file.seek(self.start + self.rows * self.dtype.itemsize)
            self.file.write(new)
            self.file.flush()
            os.fsync(self.file.fileno())
            self.rows, self.crc, self.pending = self.rows + len(new) // self.dtype.itemsize, zlib.crc32(new, self.crc), []
        self._header()
        os.fsync(self.file.fileno())


def write_values(run, total, used):
    """total float64 (n_chunks, K), used bool (n_chunks,) -> values.npy."""
    shape = total.shape if total.shape[1] > 1 else total.shape[:1]
    with atomic(Path(run, "values.npy")) as f:  # np.save would hide why a disk refuses, and want the whole array
        np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for part in (slice(start, start + 2**20) for start in range(0, len(total), 2**20)):
            f.write(np.where(used[part, None], total[part], np.nan).astype("<f4").data)


# --- reading ------------------------------------------------------------------


def read(run, name="ledger"):
    """The committed rows of a run's ledger, books or audit, memmapped."""
    return np.load(Path(run, name + ".npy"), mmap_mode="r")


def check(run, counted):
    """Raises ValueError if the rows of a file of the run are not those that {its name: Records.counted()} speaks of."""
    for name, (rows, crc, start, itemsize) in counted.items():
        path = Path(run, name + ".npy")
        if not path.is_file() or crc32(path, start, rows * itemsize) != crc:
            raise ValueError(f"{path} is missing or damaged: it does not hold the {rows} rows that were counted")


def crc(ids):
    """CRC-32 of an array of integers, whatever their type; None of None."""
    return None if ids is None else zlib.crc32(np.ascontiguousarray(ids, "<i8"))


def crc32(path, start=0, size=None):
    """Of a file's bytes from start on: size of them, or all."""
    crc, end = 0, os.path.getsize(path) if size is None else start + size
    with open(path, "rb") as f:
        f.seek(start)
        while block := f.read(max(0, min(1 << 20, end - f.tell()))):
            crc = zlib.crc32(block, crc)
    return crc


def add_visits(visits, total, used):
    """Adds visits to total float64 (n_chunks, K) and marks their chunks in used, in place: row after row, in float64, so
    that a sum picked up half-way ends in the same bits."""
    np.add.at(total, visits["chunk"], visits["value"].astype(np.float64))
    used[visits["chunk"]] = True
