"""A valuation's visits, books and audits -> the files of a run (store.py), commit by commit."""

from pathlib import Path

import numpy as np
from numpy.lib import recfunctions as structured

from system import store
from system.files import crc32, write_json


class Writer:
    """Writes ledger.npy, books.npy, audit.npy, values.npy and values.json into a run's folder.

    total: float64 (n_chunks, K), nats, the sum of each chunk's values so far; used: bool
    (n_chunks,). Of several processes only the first one has a Writer.
    """

    def __init__(
        self,
        run,
        n_chunks,
        n_targets=1,
        audits=False,
        about=None,
        step=0,
        counted=None,
        adjoints=False,
        smoothed=False,
    ):
        """run: the folder. audits: whether there will be an audit.npy. adjoints: whether there will
        be an adjoint.npy, as of hindsight, where early visits do not count in values.npy. about:
        further entries of values.json. step, counted: where a run goes on, and what
        Writer.counted() said there. smoothed: whether the ledger has that column
        (Settings.target_smoothing)."""
        self.run, self.n_targets, self.smoothed = Path(run), n_targets, smoothed
        self.is_hindsight = adjoints
        self.run.mkdir(parents=True, exist_ok=True)
        self.about = about or {}
        dtypes = {
            "ledger": store.visit_dtype(n_targets, smoothed),
            "books": store.book_dtype(n_targets),
        }
        if counted and counted["books"]["itemsize"] != dtypes["books"].itemsize:
            dtypes["books"] = store.book_dtype(n_targets, passes=False)
        if audits:
            dtypes["audit"] = store.audit_dtype(n_targets)
        if adjoints:
            dtypes["adjoint"] = store.adjoint_dtype(n_targets)
        self.records = {}
        for name, dtype in dtypes.items():
            path = self.run / f"{name}.npy"
            self.records[name] = store.Records(path, dtype, (counted or {}).get(name))
        self.total = np.zeros((n_chunks, n_targets))
        self.used = np.zeros(n_chunks, bool)
        if step:
            store.add_visits(store.read(self.run), self.total, self.used)
        self.checksums = {}
        if (self.run / "chunks.npy").is_file():
            self.checksums["chunks.npy"] = crc32(self.run / "chunks.npy")

    def add(self, visits, books, audit=None, adjoint=None):
        """Arrays of records, in the order of the steps. They are on disk after the next commit."""
        self.records["ledger"].pending.append(visits)
        written = list(self.records["books"].dtype.names)
        self.records["books"].pending.append(structured.repack_fields(books[written]))
        if audit is not None:
            self.records["audit"].pending.append(audit)
        if adjoint is not None:
            self.records["adjoint"].pending.append(adjoint)
        counted = store.late(visits) if self.is_hindsight else visits
        store.add_visits(counted, self.total, self.used)

    def counted(self):
        """How far the files go, for the next checkpoint: {name: Records.counted()}."""
        return {name: records.counted() for name, records in self.records.items()}

    def commit(self, step, info):
        """Puts everything on disk: the rows first, then values.npy and values.json, which speak of
        them. step: how many were valued. info: what the valuation says of itself."""
        for records in self.records.values():
            records.commit()
        checksums = dict(self.checksums)
        for name, counted in self.counted().items():
            checksums[f"{name}.npy"] = counted
        checksums["values.npy"] = store.write_values(self.run, self.total, self.used)
        content = {
            "schema": store.SCHEMA,
            "sign": "positive = lowered the target's loss",
            "unit": "nats",
            **self.about,
            **info,
            "committed_step": step,
            "files": checksums,
        }
        write_json(self.run / "values.json", content)
