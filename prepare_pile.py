"""Documents -> numbered chunks of one domain each, written to data_dir for data.py to read.

    python prepare_pile.py                                          the Pile, streamed from the hub
    python prepare_pile.py --source=python --data_dir=data/python   the text this Python installation carries: no download
    python prepare_pile.py --source=pile                            a file, a folder or a glob: .parquet, or .jsonl .json .txt, also .gz .zst
    python prepare_pile.py --source=pile --shard=3/30               a job of an array: tokenizes every 30th file from the third on
    python prepare_pile.py --source=pile --merge                    after them: what a run without --shard would have made, to the byte
    python prepare_pile.py --verify                                 reads every array again: is each as it was written?

First every source file is tokenized into a part in data_dir.parts (small files together, up to 64 MB): a run that was killed goes on
after its last part. Then the parts are packed, in their order, into a folder that takes its name when it is whole. So the files are
the same whatever --workers is, in however many shards, and however often interrupted. Until then the disk holds each token twice.

Split: by the hash of a document's text, so equal texts are on one side. Chunks: each domain of a split is one stream of
tokens, <eot> after every document, cut into rows of block_size + 1 tokens; a row takes its split's next number when it is
full. So a document that begins in chunk c goes on in the NEXT CHUNK OF ITS DOMAIN, next in np.flatnonzero(domain == d), and
chunks of other domains may stand between. What does not fill a domain's last row is dropped and counted.

train_docs.parquet and val_docs.parquet, sorted by first_chunk and first_token, hold every document that has a token in a chunk:
doc (its number in reading order), domain, source and record (file and line or row, from 0), first_chunk, first_token (where
in that chunk's row), n_tokens (without <eot>). Records that are no use are skipped and counted: not_utf8, not_json, no_text
(no string under text_key), empty (or only white space), lone_surrogate (half a character), not_tokenized (a million blanks).
"""

import hashlib
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

import config
import data
from show import tables
from sources import workers
from sources.documents import jobs, open_source, worker
from sources.rows import MB, SPLITS, pack, write_part
from sources.tokenizers import TOKENIZERS
from system.errors import UserError
from system.files import Claim, sync, write_json
from system.terminal import command, say


@dataclass
class Config:
    source: str = ""  # python | a file, a folder or a glob; empty: the hub
    dataset: str = "monology/pile-uncopyrighted"  # without a source: a name on the hub, or a folder the datasets library can read
    text_key: str = "text"  # where a record has its text; a dot goes one level down
    domain_key: str = "meta.pile_set_name"  # where it has its domain; a record without one gets its file's name
    domains: str = ""  # comma-separated: only these; empty: all
    data_dir: str = "data/pile"  # what to write
    overwrite: bool = False  # replace a data_dir that was prepared otherwise, once the new one is whole
    tokenizer: Literal["gpt2", "byte"] = "gpt2"  # gpt2: 50,257 tokens; byte: 256, for small models
    block_size: int = 1024  # a chunk is block_size + 1 tokens
    val_fraction: float = 0.01  # of the documents, to val.npy
    limit_tokens: int = 0  # stop after the document that makes it this many; 0: all
    workers: int = 0  # processes that tokenize; 0: one a core
    shard: str = ""  # i/n: only tokenize the source's parts (large files, or small ones together) i, i + n, i + 2n, ...
    merge: bool = False  # only pack what the shards have tokenized, with every other key as they had it
    verify: bool = False  # only check data_dir's arrays against the sha256 in its meta.json

    def __post_init__(self):
        i, n = map(int, self.shard.split("/")) if re.fullmatch(r"\d+/\d+", self.shard) else (0, 0)
        rules = [(key, getattr(self, key) >= least, f"{least} or more") for key, least in dict(block_size=1, limit_tokens=0, workers=0).items()]
        rules += [
            ("val_fraction", 0 <= self.val_fraction < 1, "0 or more, below 1"),
            ("shard", not self.shard or 1 <= i <= n, "i>/<n, i from 1 to n"),
        ]
        rules += [(key, getattr(self, key), "a name") for key in ("dataset", "text_key", "domain_key", "data_dir")]
        for key, ok, wanted in rules:
            if not ok:
                raise UserError(f"--{key}={getattr(self, key)}: write --{key}=<{wanted}>")
        if self.shard and (self.merge or self.limit_tokens or self.source == "python"):
            raise UserError(f"--shard={self.shard} goes with neither --merge nor --limit_tokens nor --source=python: write one or the other")

    def wanted(self):
        return {name.strip() for name in self.domains.split(",")} - {""}

    def makes(self):
        """The options that what is written depends on."""
        return {key: value for key, value in vars(self).items() if key not in ("data_dir", "overwrite", "workers", "shard", "merge", "verify")}

    def command(self, *more):
        """What to type for these options."""
        given = (f"--{key}={value}" for key, value in {"data_dir": self.data_dir, **self.makes()}.items() if value != getattr(Config, key))
        return command("python", "prepare_pile.py", *given, *more)


# --- in the parent: jobs -> parts -> rows -> files --------------------------------

PART = 64 * MB  # of source files, at the least


def plan(cfg, names, folder):
    """The source's files -> [(path of a part, [(file, its size)])], a part wherever another PART bytes are full. The path tells what the part
    is made of, so that one made of other files, or with other options, is never taken for it."""
    sizes = [os.path.getsize(name) if os.path.isfile(name) else PART for name in names]
    groups = groupby(zip(names, sizes, accumulate(sizes)), key=lambda file: (file[2] - 1) // PART)
    groups = [[(name, size) for name, size, _ in files] for _, files in groups]
    keys = [hashlib.sha256(json.dumps([data.SCHEMA, cfg.makes(), files]).encode()).hexdigest()[:16] for files in groups]
    return [(folder / f"{i:05}-{key}.arrow", files) for i, (key, files) in enumerate(zip(keys, groups), 1)]


def tokenize(cfg, parts, read, partial):
    """Writes the parts that are not there yet, up to the one in which --limit_tokens is reached. -> {path: what it holds}"""
    limit, done = cfg.limit_tokens or float("inf"), {}
    pool = workers.start(cfg.workers or os.cpu_count(), worker, cfg)  # now, before this process has more threads of other libraries
    try:
        for path, files in parts:
            if not path.exists():
                documents = (document for name, _ in files for document in read(name))
                write_part(partial / path.name, workers.ordered(pool, jobs(documents)), limit)
                (partial / path.name).rename(path)
            file = pa.ipc.open_file(path)
            held = json.loads(file.get_batch_with_custom_metadata(file.num_record_batches - 1).custom_metadata[b"held"])
            done[path] = Counter({tuple(key) if isinstance(key, list) else key: n for key, n in held})
            limit -= done[path]["tokens"]
            if limit <= 0:
                break
    except BrokenPipeError as e:
        raise UserError(f"a worker process was killed, perhaps for want of memory: try --workers={max(1, len(pool) // 2)}") from e
    finally:
        workers.stop(pool)
    return done


def describe(cfg, held):
    """meta.json, but for what pack() adds, from what the parts hold. Raises ValueError where there is nothing of something asked for."""
    width, tok, by_domain, left_out = cfg.block_size + 1, TOKENIZERS[cfg.tokenizer], {}, [key[1] for key in held if key[0] == "left out"]
    for domain in dict.fromkeys(key[2] for key in held if key[0] == "documents"):  # in the order met
        chunks = {name: held["tokens", name, domain] // width for name in SPLITS}
        by_domain[domain] = {name: dict(documents=held["documents", name, domain], tokens=n * width, chunks=n) for name, n in chunks.items()}
    chunks = {name: sum(of[name]["chunks"] for of in by_domain.values()) for name in SPLITS}
    skipped = {why: held["skipped", why] for why in ("not_utf8", "not_json", "no_text", "empty", "lone_surrogate", "not_tokenized")}
    have, why = sorted({*left_out, *by_domain}), ", ".join(f"{n} {why}" for why, n in skipped.items() if n) or "nothing"
    if missing := sorted(cfg.wanted() - {*have}):
        raise UserError(f"--domains: no document of {', '.join(map(repr, missing))}; there is {', '.join(have) or 'none'}")
    if not by_domain:
        raise UserError(f"no document in {cfg.source or cfg.dataset} (skipped: {why}): see --source and --text_key")
    if len(by_domain) > 1 << 16:
        raise UserError(f"--domain_key={cfg.domain_key} has {len(by_domain)} values, over {1 << 16}: name a key with fewer")
    if not chunks["train"] or (cfg.val_fraction and not chunks["val"]):
        name, how = ("val", "raise") if chunks["train"] else ("train", "lower")
        cure = f"{how} --val_fraction={cfg.val_fraction}, lower --block_size={cfg.block_size}, or read more text"
        raise UserError(f"{held['tokens']} tokens in all fill no chunk of {name}.npy: {cure}")
    meta = dict(schema=data.SCHEMA, tokenizer=cfg.tokenizer, vocab_size=tok.n_vocab, eot=tok.eot, block_size=cfg.block_size)
    meta |= dict(domains=list(by_domain), chunks=chunks, by_domain=by_domain, skipped=skipped)
    meta |= dict(documents=sum(n for key, n in held.items() if key[0] == "documents"), dropped_tokens=held["tokens"] - width * sum(chunks.values()))
    meta["tokens"] = {name: n * width for name, n in chunks.items()}  # in the arrays, with <eot>
    return meta | dict(source=cfg.source or cfg.dataset, config=cfg.makes(), sha256={}, footers={})


# --- the run ------------------------------------------------------------------


def prepare(cfg):
    """Writes cfg.data_dir, or a shard's parts. Raises ValueError and OSError: data_dir is as it was then, and parts that are whole stay."""
    folder = Path(cfg.data_dir).resolve()
    lying = folder.with_name(folder.name + ".parts")
    if cfg.verify:
        data.open_dataset(cfg.data_dir).verify()
        return say(f"{cfg.data_dir}: every array is as it was written")
    if is_prepared(folder, cfg):
        shutil.rmtree(lying, ignore_errors=True)  # of a run that was killed when it had only this left to do
        return say(f"{cfg.data_dir} is already prepared; --overwrite prepares it again")
    tqdm.monitor_interval = 0  # no thread of its own, which the workers would be forked beside
    names, read = open_source(cfg)
    parts, (i, n) = plan(cfg, names, lying), map(int, (cfg.shard or "1/1").split("/"))
    missing = {number: files[0][0] for number, (path, files) in enumerate(parts, 1) if not path.exists()}
    if cfg.merge and missing:
        what = f"{len(missing)} of {len(parts)} parts are missing, unfinished or of other files or options"
        raise UserError(f"{what} ({', '.join(missing.values())}): type: {cfg.command(f'--shard={min(missing)}/{len(parts)}')}")
    if len(missing) < len(parts):
        say(f"{len(parts) - len(missing)} of {len(parts)} parts are there already")
    partial = lying / f"{i}-of-{n}.partial"
    with Claim(partial, "data_dir"):  # a second run is refused, however the first one ends; unlike by flock, not inherited by the workers
        for path in {*partial.iterdir()} - {partial / "lock"}:
            path.unlink()
        try:
            done = tokenize(cfg, parts[i - 1 :: n], read, partial)
            if cfg.shard:
                return say(f"shard {cfg.shard} is done; when all are: {cfg.command('--merge')}")
            try:
                meta = describe(cfg, sum(done.values(), Counter()))
            except UserError:
                shutil.rmtree(lying)  # with the options changed, other parts will be needed
                raise
            pack(done, partial, meta)
            write_json(partial / "meta.json", meta)
            publish(partial, folder, cfg.overwrite)
            shutil.rmtree(lying)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if lying.exists() and not any(lying.iterdir()):
                lying.rmdir()
    for line in tables.prepared(meta):
        say(line)
    say("")
    say(f"next: {command('python', 'train.py', f'--data_dir={cfg.data_dir}')}")


def is_prepared(folder, cfg):
    """Whether `folder` is what this configuration makes. Raises ValueError where it is anything else."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "meta.json").is_file():
        raise UserError(f"{cfg.data_dir} holds files that this program did not write: write another --data_dir")
    if cfg.overwrite:
        return False
    was, now = data.open_dataset(folder).meta["config"], cfg.makes()
    if had := " ".join(f"--{key}={was.get(key)}" for key in now if was.get(key) != now[key]):
        raise UserError(f"{cfg.data_dir} was prepared with {had}: add --overwrite to replace it, or write another --data_dir")
    return True


def publish(partial, folder, overwrite):
    """The whole new folder takes its name; an old one is deleted after that."""
    for path in [*partial.iterdir(), partial]:
        sync(path)
    old = overwrite and folder.exists() and folder.rename(folder.with_name(f"{folder.name}.old-{os.getpid()}"))
    partial.rename(folder)  # refused where somebody else has put a folder meanwhile
    sync(folder.parent)
    (folder / "lock").unlink()
    if old:
        shutil.rmtree(old)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the way out of Ctrl-C: the workers go too
    config.main(lambda: prepare(config.load(Config)))
