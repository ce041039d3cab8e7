"""What a run leaves on disk: the one place that knows the formats.

    ledger.npy   one record a visit: step, chunk, loss (nats), value (nats, one per target),
                 grad_norm, early; row = step * B + slot. A step of fewer than B chunks leaves rows
                 empty: chunk -1, loss and value 0. With train.py --target_smoothing also
                 smoothed (nats, one per target), beside the value
    books.npy    one record a step: lr, kappa, loss, and per target what its loss did and why (NaN:
                 not computed)
    audit.npy    one record an audited step: per target how close its values came to the truth
    adjoint.npy  of hindsight, one record a step: |dL/dw| per target, L its loss at the run's end, w
                 the weights that the step left
    values.npy   float32 (n_chunks, K): the sum of the ledger's rows, chunk by chunk, for each of K
                 targets, in their order in values.json; NaN = never used. Of hindsight the sum of
                 those rows that are not early
    values.json  sign, unit, rule, the targets, the committed step, the checksums of the files above
    evaluations.jsonl  one line an evaluation: {"step": steps done, "val": mean loss in nats,
                       "loss": {<domain>: nats, ...}, "target": {<name>: nats, ...}}, the last
                       of targets that are files, where there are any
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
NO_CHUNK = -1  # in the ledger's rows that a step of fewer chunks leaves empty


# --- what the records hold ----------------------------------------------------

VISIT_FIELDS = [
    ("step", "<i4"),
    ("chunk", "<i8"),
    ("loss", "<f4"),
    # ("value", "<f4", (K,)) stands here, and ("smoothed", "<f4", (K,)) of runs that have it
    ("grad_norm", "<f4"),  # over the weights that values.json names, NaN if not computed
    ("early", "u1"),  # 1 where AdamW's moments are too young for any rule
]
BOOK_FIELDS = [("step", "<i4"), ("lr", "<f4"), ("kappa", "<f4"), ("loss", "<f4")]
# what checks of one-pass steps found (valuation.py). Books of earlier versions have none of it
PASSES_FIELDS = [
    ("passes", "u1"),  # over the batch, for its values; 0: it was not valued
    # 1 where one pass was not enough for some target, 2 where two passes leave too much of it, too
    ("failed", "u1"),
    # of each target what was left unexplained, as a part of the size of the values; NaN of rules
    # that have no checks: ("gap", "<f4", (K,)) by one pass, ("left", "<f4", (K,)) by the values
    # that are in the ledger
]
# of each target, in nats (shapley/books.py)
BOOK_ENTRIES = ("before", "after", "data", "momentum", "decay", "residual")
# of each target: the values beside the exact Shapley values of the step
AUDIT_ENTRIES = (
    "pearson",
    "spearman",
    "rmse",  # nats
    "rel_l2",  # |values - truth| / |truth|
    "efficiency_gap",  # sum of the values - utility
    # what the whole batch did: the loss where momentum and decay alone land - where the step lands
    "utility",
    "standard_error",  # of the truth, if by permutations: root mean square, relative
    "loo_pearson",  # the values beside leave-one-out
    "loo_spearman",
)


def visit_dtype(K, smoothed=False):
    """Of ledger.npy. smoothed: of a run with --target_smoothing."""
    of_targets = [("value", "<f4", (K,))]
    if smoothed:
        of_targets.append(("smoothed", "<f4", (K,)))
    return np.dtype([*VISIT_FIELDS[:3], *of_targets, *VISIT_FIELDS[3:]])


def book_dtype(K, passes=True):
    """Of books.npy. passes: False of runs that an earlier version began, which have no such
    fields."""
    fields = BOOK_FIELDS + [(name, "<f4", (K,)) for name in BOOK_ENTRIES]
    if passes:
        fields += [*PASSES_FIELDS, ("gap", "<f4", (K,)), ("left", "<f4", (K,))]
    return np.dtype(fields)


def audit_dtype(K):
    """Of audit.npy."""
    return np.dtype([("step", "<i4")] + [(name, "<f4", (K,)) for name in AUDIT_ENTRIES])


def adjoint_dtype(K):
    """Of adjoint.npy."""
    return np.dtype([("step", "<i4"), ("norm", "<f4", (K,))])


def record(dtype, entries):
    """One record, shape (1,), of {field: value}; of the fields that are not named floats are NaN,
    for they were not computed, and integers 0."""
    made = np.zeros(1, dtype)
    for name in dtype.names:
        if name in entries:
            made[name] = entries[name]
        elif dtype[name].base.kind == "f":
            made[name] = np.nan
    return made


# --- earlier versions ---------------------------------------------------------

# settings of earlier versions, and the values of them that change nothing
REMOVED = {
    "target_interval": (1,),
    "domain_momentum": (False,),
    "tensorboard_log": (False, True),
}

# settings that change what a run writes, and what earlier versions did, which had none
ADDED = {
    "target_smoothing": 0.0,
    "tolerance": 0.0,
    "gelu": "none",
    "rotary_pct": 0.0,
    "parallel_residual": False,
    "vocab_size": 0,
    "pretrained": "",
    "pretrained_sha256": "",
}


def without_removed(settings, path):
    """A run's settings, which an earlier version may have written. Raises UserError where the run
    needs what this version does not have."""
    for key, harmless in REMOVED.items():
        if key in settings and settings[key] not in harmless:
            what = f"{path} is of a run with --{key}={settings[key]}, which this version has not"
            cure = "go on with the version that made it, or start over without it"
            raise UserError(f"{what}: {cure}")
    return {key: value for key, value in settings.items() if key not in REMOVED}


# --- writing ------------------------------------------------------------------


class Records:
    """A .npy of records that grows by commits.

    sums: the CRC-32 of every BLOCK of its records, the last of which need not be full. What a
    process that was killed left behind the last commit does not count.
    """

    def __init__(self, path, dtype, counted=None):
        """counted: what counted() said when a checkpoint was written: what lies beyond is
        forgotten. None: a new file."""
        self.path, self.dtype = Path(path), dtype
        self.pending = []
        flags = os.O_RDWR | os.O_NOFOLLOW
        if counted:
            self.rows = counted["rows"]
            self.sums = list(counted["sums"])
        else:
            self.rows = 0
            self.sums = []
            flags |= os.O_CREAT | os.O_EXCL
            self.path.unlink(missing_ok=True)  # not emptied: a reader may have it mapped
        self.file = open(os.open(path, flags, 0o666), "r+b")
        self.write_header()
        self.file.truncate(self.start + self.rows * dtype.itemsize)

    def write_header(self):
        fields = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.rows,),  # numpy pads it so that the count can grow in place
        }
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, fields)
        self.start = len(header.getvalue())
        os.pwrite(self.file.fileno(), header.getvalue(), 0)

    def counted(self):
        """What a checkpoint and values.json say of it."""
        return {
            "rows": self.rows,
            "sums": list(self.sums),
            "start": self.start,
            "itemsize": self.dtype.itemsize,
        }

    def commit(self):
        """Rows first, then the header that counts them."""
        with named(self.path):
            if self.pending:
                self.append(np.concatenate(self.pending).tobytes())
                self.pending = []
            self.write_header()
            os.fsync(self.file.fileno())

    def append(self, new):
        """new: bytes of whole records."""
        itemsize = self.dtype.itemsize
        self.file.seek(self.start + self.rows * itemsize)
        self.file.write(new)
        self.file.flush()
        os.fsync(self.file.fileno())
        add_sums(self.sums, self.rows * itemsize, new, BLOCK * itemsize)
        self.rows += len(new) // itemsize


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


def add_visits(visits, total, used):
    """Adds visits to total float64 (n_chunks, K) and marks their chunks in used, in place: row
    after row, so that a sum picked up half-way ends in the same bits."""
    visits = filled(visits)
    np.add.at(total, visits["chunk"], visits["value"].astype(np.float64))
    used[visits["chunk"]] = True


def filled(visits):
    """The visits without the rows that a step of fewer than B chunks leaves empty."""
    is_empty = visits["chunk"] == NO_CHUNK
    return visits[~is_empty] if is_empty.any() else visits


def visits_of_steps(visits, batch):
    """How many visits each of some whole steps has, int64 (steps,). batch: the rows of a step."""
    return (visits["chunk"] != NO_CHUNK).reshape(-1, batch).sum(1)


def late(visits):
    """The visits that are not marked early: in hindsight only these count (shapley/hindsight.py).
    Steps are early as a whole."""
    return visits[visits["early"] == 0]


def write_values(run, total, used):
    """total float64 (n_chunks, K), used bool (n_chunks,) -> values.npy. Returns its CRC-32."""
    header = {"descr": "<f4", "fortran_order": False, "shape": total.shape}
    piece = 2**20
    # np.save would hide why a disk refuses, and want the whole array
    with atomic(Path(run, "values.npy")) as f:
        np.lib.format.write_array_header_1_0(f, header)
        for start in range(0, len(total), piece):
            chunks = slice(start, start + piece)
            values = np.where(used[chunks, None], total[chunks], np.nan)
            f.write(values.astype("<f4").data)
        f.flush()
        return crc32(f.name)


# --- reading ------------------------------------------------------------------


def read(run, name="ledger"):
    """The committed rows of a run's ledger, books or audit, memmapped."""
    cure = "type: python train.py --verify --out_dir=<the run>"
    return load_array(Path(run, f"{name}.npy"), cure)


def check(run, counted, cure="the checkpoint before it may help"):
    """counted: {name: Records.counted()}. Raises UserError where a run's records are others."""
    for name, counted_file in counted.items():
        path = Path(run, f"{name}.npy")
        damaged = damaged_blocks(path, counted_file, cure)
        if damaged:
            rows = which_rows(damaged, counted_file["rows"])
            what = f"{path} is missing or damaged, {rows} are not as they were written"
            raise UserError(f"{what}: {cure}")


COUNTED = {"rows": int, "sums": list, "start": int, "itemsize": int}


def damaged_blocks(path, counted, cure="take another checkpoint"):
    """The numbers of a file's blocks of BLOCK records that are not as they were counted: all of
    them where there is no file. On all cores. Raises UserError where `counted` is not what
    Records.counted() makes."""
    if not isinstance(counted, dict):
        raise UserError(f"{path} was counted by another version: {cure}")
    check_entries(counted, COUNTED, path, cure)
    if min(counted["rows"], counted["start"], counted["itemsize"]) < 0:
        raise UserError(f"{path} was counted wrongly: {cure}")
    blocks = range(len(counted["sums"]))
    if not path.is_file():
        return list(blocks)
    block_size = BLOCK * counted["itemsize"]
    end = counted["start"] + counted["rows"] * counted["itemsize"]

    def is_damaged(i):
        start = counted["start"] + i * block_size
        return crc32(path, start, min(block_size, end - start)) != counted["sums"][i]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        answers = pool.map(is_damaged, blocks)
        return [i for i, damaged in zip(blocks, answers) if damaged]


def which_rows(blocks, rows):
    """Some blocks' numbers -> "rows 0 to 65535"."""
    ranges = []
    for i in blocks[:3]:
        last = min(rows, (i + 1) * BLOCK) - 1
        ranges.append(f"{i * BLOCK} to {last}")
    if len(blocks) > 3:
        ranges.append("...")
    return "rows " + ", ".join(ranges)


def crc(ids):
    """CRC-32 of an array of integers, whatever their type; None of None."""
    return None if ids is None else zlib.crc32(np.ascontiguousarray(ids, "<i8"))
