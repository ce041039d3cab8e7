"""
Data at the Pile's size: what opening 300 million chunks and drawing a batch of them costs, and what each stage of preparing costs.

    python bench/scale.py                                           the first: about 615 GB of holes in a temporary folder
    python bench/scale.py --source=data/minipile.jsonl.zst          and the second, on one core; --tokenizer=byte for bytes

The arrays are sparse files: they have their full size and no contents, so the time of a read is that of numpy and the file system's
index, not of a disk. Memory is anonymous memory and that of the files' pages (RssAnon and RssFile) above what Python had before.
Stages: read (decompress, cut into lines), parse (JSON, UTF-8, split by hash), tokenize, write (a part), pack (a part -> chunks).
Prints a table and last one JSON line.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

import config
import data
import prepare_pile
import sources.documents


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


def sparse_set(folder, chunks, block_size):
    """A data folder of that many chunks of holes, with a meta.json that fits; one val chunk."""
    for name, shape in (("train", (chunks, block_size + 1)), ("train_domain", (chunks,)), ("val", (1, block_size + 1)), ("val_domain", (1,))):
        with open(Path(folder, f"{name}.npy"), "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": shape})
            file.truncate(file.tell() + 2 * int(np.prod(shape, dtype=object)))
    meta = dict(schema=data.SCHEMA, tokenizer="gpt2", vocab_size=50257, eot=50256, block_size=block_size, domains=["none"])
    meta |= dict(chunks=dict(train=chunks, val=1), sha256={}, command="python bench/scale.py")
    Path(folder, "meta.json").write_text(json.dumps(meta))


def memory():
    """Bytes: (this process's own, of files' pages)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [1024 * int(status[key].split()[0]) for key in ("RssAnon", "RssFile")]


def timed(function, *arguments):
    """-> (seconds, what it returned)"""
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def measure_chunks(cfg):
    rows, before = [], memory()
    with tempfile.TemporaryDirectory(dir=cfg.folder or None) as folder:
        sparse_set(folder, cfg.chunks, cfg.block_size)
        gigabytes = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e9
        on_disk = sum(512 * path.stat().st_blocks for path in Path(folder).iterdir())
        print(f"{cfg.chunks:,} chunks: {gigabytes:,.1f} GB, {on_disk:,} bytes of them on disk")
        print(f"{'what':24}{'ms':>10}{'own MB':>10}{'file MB':>10}")

        def show(what, seconds):
            own, files = (now - then for now, then in zip(memory(), before))
            rows.append(dict(what=what, ms=1e3 * seconds, own_mb=own / 1e6, file_mb=files / 1e6))
            print(f"{what:24}{1e3 * seconds:10.2f}{own / 1e6:10.1f}{files / 1e6:10.1f}", flush=True)

        seconds, dataset = timed(data.open_dataset, folder)
        show("open", seconds)
        for step in map(int, cfg.steps.split(",")):
            seconds, ids = timed(data.global_batch, step, cfg.batch, cfg.chunks, 1337)
            assert len(np.unique(ids)) >= cfg.batch - 1 and 0 <= ids.min() and ids.max() < cfg.chunks
            show(f"order, step {step}", seconds)
            seconds, (X, _) = timed(dataset.train.batch, ids, cfg.block_size)
            assert X.shape == (cfg.batch, cfg.block_size) and not X.any()
            show(f"rows, step {step}", seconds)
    return rows


def stages(cfg, folder):
    """-> {stage: (seconds, MB of text)} of one round, in this process, one stage after another."""
    options = prepare_pile.Config(source=cfg.source, tokenizer=cfg.tokenizer, data_dir=str(Path(folder, "data")), workers=1)
    names, read = prepare_pile.open_source(options)
    seconds = {}
    seconds["read"], documents = timed(lambda: [document for name in names for document in read(name)])
    sources.documents.CFG, sources.documents.TOKENIZER = options, NoTokenizer
    seconds["parse"], _ = timed(lambda: [sources.documents.encode([document]) for document in documents])
    sources.documents.TOKENIZER = data.tokenizer(cfg.tokenizer)
    total, encoded = timed(lambda: [sources.documents.encode([document]) for document in documents])
    seconds["tokenize"] = total - seconds["parse"]
    part = Path(folder, "part.arrow")
    seconds["write"], _ = timed(prepare_pile.write_part, part, encoded, float("inf"))
    held = sum((Counter({("documents", d[0], d[1]): 1, ("tokens", d[0], d[1]): len(d[4]) // 2}) for e in encoded for d in e[0]), Counter())
    held["tokens"] = sum(n for key, n in held.items() if key[0] == "tokens")
    meta = prepare_pile.describe(options, held)
    seconds["pack"], _ = timed(prepare_pile.pack, [part], Path(folder), meta)
    text = sum(len(line) for document in documents for line in document[3])
    for path in Path(folder).glob("*.*"):
        path.unlink()
    return seconds, text / 1e6, held["tokens"]


class NoTokenizer:
    eot = 0

    @staticmethod
    def encode(text):
        return np.empty(0, np.uint16)


def measure_stages(cfg):
    with tempfile.TemporaryDirectory(dir=cfg.folder or None) as folder:
        found = [stages(cfg, folder) for _ in range(cfg.rounds)]
    rows, (_, megabytes, tokens) = [], found[0]
    print(f"{cfg.source}: {megabytes:.1f} MB, {tokens:,} tokens ({cfg.tokenizer}), one core, {cfg.rounds} rounds")
    print(f"{'stage':12}{'best MB/s':>12}{'median MB/s':>14}{'share of the best':>20}")
    best = {stage: min(seconds[stage] for seconds, *_ in found) for stage in found[0][0]}
    for stage in best:
        median = float(np.median([seconds[stage] for seconds, *_ in found]))
        rows.append(dict(stage=stage, best_mb_s=megabytes / best[stage], median_mb_s=megabytes / median, share=best[stage] / sum(best.values())))
        print(f"{stage:12}{rows[-1]['best_mb_s']:12.1f}{rows[-1]['median_mb_s']:14.1f}{rows[-1]['share']:20.1%}")
    return rows


def main(cfg):
    rows = measure_chunks(cfg)
    if cfg.source:
        rows += measure_stages(cfg)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        json.dumps({"machine": f"{platform.machine()}, {os.cpu_count()} cores", "numpy": np.__version__, "commit": commit, **vars(cfg), "rows": rows})
    )


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
