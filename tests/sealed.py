"""Files as this program would have written them, with other content: their checksums fit."""

import json

import numpy as np

from system import store
from system.files import crc32, write_json


def change(path, **entries):
    """Other entries in a sealed file."""
    content = json.loads(path.read_text())
    del content["crc32"]
    write_json(path, content | entries)


def replace_array(run, name, array):
    """Another values.npy, say, of a run, that values.json knows."""
    np.save(run / name, array)
    files = json.loads((run / "values.json").read_text())["files"]
    change(run / "values.json", files=files | {name: crc32(run / name)})


def as_of_step(run, step):
    """values.json as the commit of an earlier step wrote it."""
    about = json.loads((run / "values.json").read_text())
    files = about["files"] | {"values.npy": 0}  # that commit's is gone
    for name in {"ledger.npy", "books.npy", "audit.npy"} & files.keys():
        records = np.load(run / name)
        records = records[records["step"] < step]
        sums = []
        store.add_sums(sums, 0, records.tobytes(), store.BLOCK * records.dtype.itemsize)
        files[name] = files[name] | {"rows": len(records), "sums": sums}
    change(run / "values.json", committed_step=step, files=files)


def replace_records(run, name, records):
    """Another ledger.npy, say, of a run, that values.json knows."""
    file = store.Records(run / f"{name}.npy", records.dtype)
    file.pending = [records]
    file.commit()
    files = json.loads((run / "values.json").read_text())["files"]
    change(run / "values.json", files=files | {f"{name}.npy": file.counted()})
