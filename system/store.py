"""What a run leaves on disk: the one place that knows the formats.

    ledger.npy   one record a visit: step, chunk, loss (nats), value (nats, one per target),
                 grad_norm, early; row = step * B + slot
    books.npy    one record a step: lr, kappa, loss, and per target what its loss did and why (NaN:
                 not computed)
    audit.npy    one record an audited step: per target how close its values came to the truth
    values.npy   float32 (n_chunks,) or (n_chunks, K): the sum of the ledger's rows, chunk by chunk;
                 NaN = never used
    values.json  sign, unit, rule, the targets, the committed step, the checksums of the files above
    evaluations.jsonl  one line an evaluation: {"step": steps done, "val": mean loss in nats,
                       "loss": {<domain>: nats, ...}}
    chunks.npy   int64 (n,): the chunks it was trained on, where not all

A value is positive where the chunk lowered the target's loss. Every file is whole at any moment:
values.npy, values.json and checkpoints are written under another name and renamed; ledger.npy and
books.npy only grow, and their header counts the rows of the last commit, so what a crash left
behind them does not show, and the next commit overwrites it.

Every file has a checksum, which its readers look at: values.json's "files" has the CRC-32 of
values.npy and chunks.npy, and one of every BLOCK records of the others; .json and .jsonl files end
in their own (system/files.py), and so do checkpoints (system/checkpoints.py).
"""

import io
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from system.errors import UserError
from system.files import atomic, check_entries, crc32, load_array, named

SCHEMA = 2  # of values.json
BLOCK = 1 << 16  # records that have one checksum


def visit_dtype(K):
    """grad_norm: the chunk's gradient norm over the weights values.json names, NaN if not computed. early: 1 where AdamW's moments
    are too young for its rules to be trusted."""
    return np.dtype(
        [
            ("step", "<i4"),
            ("chunk", "<i8"),
            ("loss", "<f4"),
            ("value", "<f4", (K,)),
            ("grad_norm", "<f4"),
            ("early", "u1"),
        ]
    )


BOOK_ENTRIES = (
    "before",
    "after",
    "data",
    "momentum",
    "decay",
    "residual",
)  # of each target, in nats


def book_dtype(K, domains=0):
    per_target = [(name, "<f4", (K,)) for name in BOOK_ENTRIES]
    if domains:
        per_target.append(("momentum_by_domain", "<f4", (K, domains)))
    return np.dtype(
        [("step", "<i4"), ("lr", "<f4"), ("kappa", "<f4"), ("loss", "<f4"), *per_target]
    )


# Of each target: the values beside the exact Shapley values (rmse in nats; rel_l2 = |values - truth| / |truth|); utility: what the whole batch
# did, loss where momentum and decay alone land - loss where the step lands; efficiency_gap: sum of the values - utility; standard_error of
# the truth, if by permutations: root mean square, relative; loo_: the values beside leave-one-out.
AUDIT_ENTRIES = (
    "pearson",
    "spearman",
    "rmse",
    "rel_l2",
    "efficiency_gap",
    "utility",
    "standard_error",
    "loo_pearson",
    "loo_spearman",
)


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


class Records:
    """A .npy of records that grows by commits.

    sums: the CRC-32 of every BLOCK of its records, the last of which need not be full. What a
    process that was killed left behind the last commit does not count.
    """

    def __init__(self, path, dtype, counted=None):
        """counted: what counted() said when a checkpoint was written: what lies beyond is
        forgotten. None: a new file."""
        self.path, self.dtype, self.pending = Path(path), dtype, []
        if counted:
            self.rows, self.sums, flags = counted["rows"], list(counted["sums"]), os.O_RDWR
        else:
            self.rows, self.sums, flags = 0, [], os.O_RDWR | os.O_CREAT | os.O_EXCL
            self.path.unlink(missing_ok=True)  # not emptied: a reader may have it mapped
        self.file = open(os.open(path, flags | os.O_NOFOLLOW, 0o666), "r+b")
        self.write_header()
        self.file.truncate(self.start + self.rows * dtype.itemsize)

    def write_header(self):
        header = io.BytesIO()
        fields = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        fields["shape"] = (self.rows,)  # numpy pads it so that the count can grow in place
        np.lib.format.write_array_header_1_0(header, fields)
        self.start = len(header.getvalue())
        os.pwrite(self.file.fileno(), header.getvalue(), 0)

    def counted(self):
        """What a checkpoint and values.json say of it."""
        sums = list(self.sums)
        return dict(rows=self.rows, sums=sums, start=self.start, itemsize=self.dtype.itemsize)

    def commit(self):
        """Rows first, then the header that counts them."""
        with named(self.path):
            if self.pending:
                new, itemsize = np.concatenate(self.pending).tobytes(), self.dtype.itemsize
                self.file.seek(self.start + self.rows * itemsize)
                self.file.write(new)
                self.file.flush()
                os.fsync(self.file.fileno())
                add_sums(self.sums, self.rows * itemsize, new, BLOCK * itemsize)
                self.rows += len(new) // itemsize
                self.pending = []
            self.write_header()
            os.fsync(self.file.fileno())


def add_sums(sums, size, new, block):
    """Brings the checksums of a file's blocks, of so many bytes each, up to date, in place: new
    bytes were added to the size there were."""
    start = 0
    while start < len(new):
        filled = (size + start) % block
        piece = new[start : start + block - filled]
        if filled:
            sums[-1] = zlib.crc32(piece, sums[-1])
        else:
            sums.append(zlib.crc32(piece))
        start += len(piece)


def write_values(run, total, used):
    """total float64 (n_chunks, K), used bool (n_chunks,) -> values.npy; returns its file's CRC-32."""
    shape = total.shape if total.shape[1] > 1 else total.shape[:1]
    with atomic(
        Path(run, "values.npy")
    ) as f:  # np.save would hide why a disk refuses, and want the whole array
        np.lib.format.write_array_header_1_0(
            f, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        for part in (slice(start, start + 2**20) for start in range(0, len(total), 2**20)):
            f.write(np.where(used[part, None], total[part], np.nan).astype("<f4").data)
        f.flush()
        return crc32(f.name)


# --- reading ------------------------------------------------------------------


def read(run, name="ledger"):
    """The committed rows of a run's ledger, books or audit, memmapped."""
    return load_array(
        Path(run, name + ".npy"), "type: python train.py --verify --out_dir=<the run>"
    )


COUNTED = {"rows": int, "sums": list, "start": int, "itemsize": int}


def check(run, counted, cure="the checkpoint before it may help"):
    """Raises UserError where a run's records are not those that {name: Records.counted()} counts."""
    for name, of in counted.items():
        path = Path(run, name + ".npy")
        bad = damaged_blocks(path, of, cure)
        if bad:
            rows = which_rows(bad, of["rows"])
            what = f"{path} is missing or damaged, {rows} are not as they were written"
            raise UserError(f"{what}: {cure}")


def damaged_blocks(path, counted, cure="take another checkpoint"):
    """The numbers of a file's blocks of BLOCK records that are not as they were counted: all of
    them where there is no file. On all cores. Raises UserError where `counted` is none of ours."""
    if not isinstance(counted, dict):
        raise UserError(f"{path} was counted by another version: {cure}")
    check_entries(counted, COUNTED, path, cure)
    if min(counted["rows"], counted["start"], counted["itemsize"]) < 0:
        raise UserError(f"{path} was counted wrongly: {cure}")
    itemsize, sums = counted["itemsize"], counted["sums"]
    block, end = BLOCK * itemsize, counted["start"] + counted["rows"] * itemsize
    if not path.is_file():
        return [*range(len(sums))]

    def is_damaged(i):
        start = counted["start"] + i * block
        return crc32(path, start, min(block, end - start)) != sums[i]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(is_damaged, range(len(sums)))
        return [i for i, bad in enumerate(found) if bad]


def which_rows(blocks, rows):
    """Some blocks' numbers -> "rows 0 to 65535"."""
    parts = [f"{i * BLOCK} to {min(rows, (i + 1) * BLOCK) - 1}" for i in blocks[:3]]
    return "rows " + ", ".join(parts) + (", ..." if len(blocks) > 3 else "")


def crc(ids):
    """CRC-32 of an array of integers, whatever their type; None of None."""
    return None if ids is None else zlib.crc32(np.ascontiguousarray(ids, "<i8"))


def add_visits(visits, total, used):
    """Adds visits to total float64 (n_chunks, K) and marks their chunks in used, in place: row after row, in float64, so
    that a sum picked up half-way ends in the same bits."""
    np.add.at(total, visits["chunk"], visits["value"].astype(np.float64))
    used[visits["chunk"]] = True
