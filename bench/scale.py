"""
Data at the Pile's size: what opening 300 million chunks and drawing a batch of them costs, and what
each stage of preparing costs.

    python bench/scale.py                                     the first: about 615 GB of holes in a
                                                              temporary folder
    python bench/scale.py --source=data/minipile.jsonl.zst    and the second, on one core;
                                                              --tokenizer=byte for bytes

The arrays are sparse files: they have their full size and no contents, so the time of a read is
that of numpy and the file system's index, not of a disk. Memory is anonymous memory and that of the
files' pages (RssAnon and RssFile) above what Python had before.
Stages: read (decompress, cut into lines), parse (JSON, UTF-8, split by hash), tokenize, write (a
part), pack (a part -> chunks). Prints a table and last one JSON line.
"""

import hashlib
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow.parquet

import config
import data
import prepare_pile
from bench.common import print_json, timed
from pile.documents import find_source, size_of
from pile.encode import Encoder
from pile.files import stated
from pile.pack import DOCUMENTS, pack, read_held, write_part
from system.files import footer_crc32, write_json


@dataclass
class Config:
    chunks: int = 300_000_000
    block_size: int = 1024
    batch: int = 512
    steps: str = "0,1,1000,1000000,1464843"  # comma-separated; an epoch is 585,937.5 steps
    source: str = ""  # a file of text: measure the stages of preparing it
    tokenizer: Literal["gpt2", "byte"] = "gpt2"
    rounds: int = 3  # of the stages; the table has the best and the median
    folder: str = ""  # where the temporary folder goes; empty: the system's


# --- a data folder of holes -------------------------------------------------------


def sparse_set(folder, chunks, block_size):
    """Writes a data folder of that many chunks of holes, with a meta.json that fits; one val chunk,
    and no documents."""
    folder = Path(folder)
    counts = {"train": chunks, "val": 1}
    footers = {}
    for name, n in counts.items():
        table = folder / f"{name}_docs.parquet"
        pyarrow.parquet.write_table(DOCUMENTS.empty_table(), table)
        footers[table.name] = footer_crc32(table)
        write_holes(folder / f"{name}.npy", (n, block_size + 1))
        write_holes(folder / f"{name}_domain.npy", (n,))
    meta = {
        "schema": data.SCHEMA,
        "tokenizer": "gpt2",
        "vocab_size": 50257,
        "eot": 50256,
        "block_size": block_size,
        "domains": ["none"],
        "chunks": counts,
        "config": {},
        "tokens": {name: n * (block_size + 1) for name, n in counts.items()},
        "sha256": {path.name: sha256(path) for path in folder.iterdir()},
        "footers": footers,
    }
    write_json(folder / "meta.json", meta)


def sha256(path):
    """A file's; of one that is too large for open_dataset() to look at, nothing."""
    if path.stat().st_size > data.CHECKED:
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_holes(path, shape):
    """A uint16 .npy of a shape, without contents."""
    header = {"descr": "<u2", "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2 * int(np.prod(shape, dtype=object)))


def memory():
    """Bytes: [this process's own, of files' pages]."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return [1024 * int(status[key].split()[0]) for key in ("RssAnon", "RssFile")]


class Table:
    """Rows of time and memory, printed as they come. before: memory() as it was."""

    def __init__(self, before):
        self.before = before
        self.rows = []
        print(f"{'what':24}{'ms':>10}{'own MB':>10}{'file MB':>10}")

    def add(self, what, seconds):
        own, files = np.subtract(memory(), self.before) / 1e6
        row = {
            "what": what,
            "ms": 1e3 * seconds,
            "own_mb": float(own),
            "file_mb": float(files),
        }
        self.rows.append(row)
        print(f"{what:24}{row['ms']:10.2f}{own:10.1f}{files:10.1f}", flush=True)


def measure_chunks(cfg):
    before = memory()
    with tempfile.TemporaryDirectory(dir=cfg.folder or None) as folder:
        sparse_set(folder, cfg.chunks, cfg.block_size)
        sizes = [path.stat() for path in Path(folder).iterdir()]
        gigabytes = sum(size.st_size for size in sizes) / 1e9
        on_disk = sum(512 * size.st_blocks for size in sizes)
        print(f"{cfg.chunks:,} chunks: {gigabytes:,.1f} GB, {on_disk:,} bytes of them on disk")
        table = Table(before)
        seconds, dataset = timed(data.open_dataset, folder)
        table.add("open", seconds)
        for step in map(int, cfg.steps.split(",")):
            seconds, ids = timed(data.global_batch, step, cfg.batch, cfg.chunks, 1337)
            assert len(np.unique(ids)) >= cfg.batch - 1
            assert 0 <= ids.min()
            assert ids.max() < cfg.chunks
            table.add(f"order, step {step}", seconds)
            seconds, (X, _) = timed(dataset.train.batch, ids, cfg.block_size)
            assert X.shape == (cfg.batch, cfg.block_size)
            assert not X.any()
            table.add(f"rows, step {step}", seconds)
    return table.rows


# --- the stages of preparing --------------------------------------------------------


@dataclass
class Round:
    """Every stage once."""

    seconds: dict  # {stage: seconds}
    megabytes: float  # of text
    tokens: int


def prepare_once(cfg, folder):
    """A Round, in this process, one stage after another."""
    folder = Path(folder)
    options = prepare_pile.Config(
        source=cfg.source,
        tokenizer=cfg.tokenizer,
        data_dir=str(folder / "data"),
        workers=1,
    )
    source = find_source(options)
    read, documents = timed(read_all, source)
    parse, _ = timed(encode, Encoder(options, NoTokenizer), documents)
    tokenize, encoded = timed(encode, Encoder(options, data.tokenizer(cfg.tokenizer)), documents)
    part = folder / "part.arrow"
    n_vocab = data.tokenizer(cfg.tokenizer).n_vocab
    write, _ = timed(write_part, part, encoded, float("inf"), data.token_type(n_vocab).itemsize)
    held = read_held(part)
    meta = prepare_pile.describe(options, held, source, stated(source.names))
    packing, _ = timed(pack, [part], folder, meta)
    for path in folder.glob("*.*"):
        path.unlink()
    seconds = {
        "read": read,
        "parse": parse,
        "tokenize": tokenize - parse,
        "write": write,
        "pack": packing,
    }
    text = sum(size_of(document.text) for document in documents)
    return Round(seconds, text / 1e6, held["tokens"])


def read_all(source):
    documents = []
    for name in source.names:
        documents += source.read(name)
    return documents


def encode(encoder, documents):
    return [encoder([document]) for document in documents]


class NoTokenizer:
    eot = 0

    @staticmethod
    def encode(text):
        return np.empty(0, np.uint16)


def measure_stages(cfg):
    with tempfile.TemporaryDirectory(dir=cfg.folder or None) as folder:
        rounds = [prepare_once(cfg, folder) for _ in range(cfg.rounds)]
    megabytes = rounds[0].megabytes
    print(
        f"{cfg.source}: {megabytes:.1f} MB, {rounds[0].tokens:,} tokens ({cfg.tokenizer}), "
        f"one core, {cfg.rounds} rounds"
    )
    print(f"{'stage':12}{'best MB/s':>12}{'median MB/s':>14}{'share of the best':>20}")
    best = {}
    for stage in rounds[0].seconds:
        best[stage] = min(r.seconds[stage] for r in rounds)
    rows = []
    for stage in best:
        median = float(np.median([r.seconds[stage] for r in rounds]))
        row = {
            "stage": stage,
            "best_mb_s": megabytes / best[stage],
            "median_mb_s": megabytes / median,
            "share": best[stage] / sum(best.values()),
        }
        rows.append(row)
        print(f"{stage:12}{row['best_mb_s']:12.1f}{row['median_mb_s']:14.1f}{row['share']:20.1%}")
    return rows


def main(cfg):
    rows = measure_chunks(cfg)
    if cfg.source:
        rows += measure_stages(cfg)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print_json(cfg, rows, machine=machine, numpy=np.__version__)


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
