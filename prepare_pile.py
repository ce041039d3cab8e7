"""Documents -> numbered chunks of one domain each, written to data_dir for data.py to read.

    python prepare_pile.py                                  the Pile, streamed from the hub
    python prepare_pile.py --source=python --data_dir=data/python
                                                            the text this Python carries: no download
    python prepare_pile.py --source=pile                    a file, a folder or a glob
    python prepare_pile.py --source=pile --shard=3/30       a job of an array: tokenizes every 30th
                                                            file from the third on
    python prepare_pile.py --source=pile --merge            after them: what a run without --shard
                                                            would have made, to the byte
    python prepare_pile.py --verify                         is every array as it was written?

Sources: .parquet, and .jsonl, .ndjson, .json (a record a line) and .txt, the last four also packed
as .gz, .zst, .bz2 or .xz; text is UTF-8. Of a folder everything below it is read, but for hidden
files, files of other kinds and symbolic links (--follow_links reads those). What is left out is
said at the end.

First every source file is tokenized into a part in data_dir.parts (small files together, up to
64 MB): a run that was killed goes on after its last part. Then the parts are packed, in their
order, into a folder that takes its name when it is whole. So the files are the same whatever
--workers is, in however many shards, and however often interrupted. Until then the disk holds each
token twice. A folder that holds anything else is never replaced, and nothing else is ever removed.

Memory: 0.3 GB and 0.2 GB a worker for ordinary text. Whatever the text is, no more than
1 GB + workers * (0.2 GB + 80 * max_document_mb MB). On top comes what a packed file asks for itself
(2 GB after zstd --long=31), and in the end 4 * block_size bytes a domain.

Split: by the hash of a document's text, so equal texts are on one side. Chunks: each domain of a
split is one stream of tokens, <eot> after every document, cut into rows of block_size + 1 tokens;
a row takes its split's next number when it is full. So a document that begins in chunk c goes on
in the NEXT CHUNK OF ITS DOMAIN, next in np.flatnonzero(domain == d), and chunks of other domains
may stand between. What does not fill a domain's last row is dropped and counted.

train_docs.parquet and val_docs.parquet, sorted by first_chunk and first_token, hold every document
that has a token in a chunk: doc (its number in reading order), domain, source and record (file and
line or row, from 0), first_chunk, first_token (where in that chunk's row), n_tokens (without <eot>).

A domain is a text, a number or a date. It may also stand in a text of JSON, under a flat key with
dots, or in a map. A record without one, or with one of over 200 characters, is under its file's
name, and counted. Records that are no use are skipped and counted: not_utf8, not_json, no_text (no
string under text_key), empty (or only white space), lone_surrogate (half a character), too_long
(for max_document_mb; of a parquet file also all rows of a group with a much larger page),
not_tokenized.
"""

import hashlib
import json
import os
import re
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from tqdm import tqdm

import config
import data
from pile import workers
from pile.documents import find_source, jobs
from pile.domains import Wanted
from pile.encode import worker
from pile.files import changes, end_of, explain_left_out, find_files, inventory, stated
from pile.folders import Folders
from pile.pack import MB, MOST_DOMAINS, SPLITS, pack, read_held, write_part
from pile.tokenizers import TOKENIZERS
from show import tables
from system.errors import UserError
from system.files import Claim, write_json
from system.terminal import command, listed, say

WORKERS_A_CORE = 4  # no more: they would only wait for each other
SKIPPED = ("not_utf8", "not_json", "no_text", "empty", "lone_surrogate", "too_long")
SKIPPED += ("not_tokenized",)


@dataclass
class Config:
    source: str = ""  # python | a file, a folder or a glob; empty: the hub
    dataset: str = "monology/pile-uncopyrighted"  # on the hub, or a folder for `datasets`
    text_key: str = "text"  # where a record has its text; a dot goes one level down
    domain_key: str = "meta.pile_set_name"  # where it has its domain; else its file's name
    domains: str = ""  # comma-separated: only these; empty: all. A comma within a name: \,
    follow_links: bool = False  # also read what symbolic links in a folder lead to
    max_document_mb: int = 64  # longer records are skipped and counted; memory grows with it
    data_dir: str = "data/pile"  # what to write
    overwrite: bool = False  # replace a data_dir prepared otherwise, once the new one is whole
    tokenizer: Literal["gpt2", "byte"] = "gpt2"  # gpt2: 50,257 tokens; byte: 256, for small models
    block_size: int = 1024  # a chunk is block_size + 1 tokens
    val_fraction: float = 0.01  # of the documents, to val.npy
    limit_tokens: int = 0  # stop after the document that makes it this many; 0: all
    workers: int = 0  # processes that tokenize, at most 4 a core; 0: one a core
    shard: str = ""  # i/n: only tokenize the source's parts i, i + n, i + 2n, ...
    merge: bool = False  # only pack what the shards have tokenized; other keys as they had them
    verify: bool = False  # only check data_dir's arrays against the sha256 in its meta.json

    def __post_init__(self):
        at_least = {"block_size": 1, "val_fraction": 0, "limit_tokens": 0, "workers": 0}
        at_least["max_document_mb"] = 1
        below = {"block_size": 2**31, "val_fraction": 1, "max_document_mb": 2**20}
        config.check(self, at_least=at_least, below=below)
        cores = os.cpu_count() or 1
        if self.workers > WORKERS_A_CORE * cores:
            most = f"{WORKERS_A_CORE * cores}, {WORKERS_A_CORE} for each core of this machine"
            raise UserError(f"--workers={self.workers}: it must be at most {most}")
        for key in ("dataset", "text_key", "domain_key", "data_dir"):
            if not getattr(self, key):
                raise UserError(f"--{key}=: write --{key}=<a name>")
        self.shard_numbers()
        if self.shard and (self.merge or self.limit_tokens or self.source == "python"):
            others = "neither --merge nor --limit_tokens nor --source=python"
            raise UserError(f"--shard={self.shard} goes with {others}: write one or the other")

    def shard_numbers(self):
        """-> i, n of the shard; 1, 1 where all is one. Raises UserError."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", self.shard or "1/1")
        i, n = map(int, found.groups()) if found else (0, 0)
        if not 1 <= i <= n:
            raise UserError(f"--shard={self.shard}: write --shard=<i>/<n, i from 1 to n>")
        return i, n

    def makes(self):
        """The options that what is written depends on."""
        others = ("data_dir", "overwrite", "workers", "shard", "merge", "verify")
        return {key: value for key, value in vars(self).items() if key not in others}

    def command(self, *more):
        """What to type for these options."""
        options = {"data_dir": self.data_dir, **self.makes()}
        given = []
        for key, value in options.items():
            if value != getattr(Config, key):
                given.append(f"--{key}={value}")
        return command("python", "prepare_pile.py", *given, *more)


# --- in the parent: jobs -> parts -> rows -> files --------------------------------

PART = 64 * MB  # of source files, at the least


def plan(cfg, files, folder):
    """The source's files, [(name, bytes, time of change)], -> [(path of a part, names)], a part
    wherever another PART bytes are full. The path tells what the part is made of, so that one made
    of other files, or with other options, is never taken for it."""
    groups, total = {}, 0
    for name, size, changed in files:
        size = PART if size is None else size
        total += size
        groups.setdefault((total - 1) // PART, []).append((name, size, changed))
    parts = []
    for i, group in enumerate(groups.values(), 1):
        made_of = json.dumps([data.SCHEMA, cfg.makes(), group])
        key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
        parts.append((folder / f"{i:05}-{key}.arrow", [name for name, _, _ in group]))
    return parts


def tokenize(cfg, parts, read, partial):
    """Writes the parts that are not there yet, up to the one in which --limit_tokens is reached.
    -> {path: what it holds}"""
    limit, done = cfg.limit_tokens or float("inf"), {}
    # now, before this process has more threads of other libraries
    pool = workers.start(cfg.workers or os.cpu_count() or 1, worker, cfg)
    try:
        for path, names in parts:
            if not path.exists():
                documents = chain.from_iterable(map(read, names))
                encoded = workers.ordered(pool, jobs(documents))
                write_part(partial / path.name, encoded, limit)
                (partial / path.name).rename(path)
            done[path] = read_held(path)
            limit -= done[path]["tokens"]
            if limit <= 0:
                break
    except BrokenPipeError as e:
        cure = f"try --workers={max(1, len(pool) // 2)}, or a lower --max_document_mb"
        raise UserError(f"a worker process was killed, perhaps for want of memory: {cure}") from e
    finally:
        workers.stop(pool)
    return done


def describe(cfg, held, source, files):
    """meta.json, but for what pack() adds, from what the parts hold. Raises UserError where there
    is nothing of something asked for."""
    skipped = {why: held["skipped", why] for why in SKIPPED}
    by_domain = count_domains(held, cfg.block_size + 1)
    check_domains(cfg, held, by_domain, skipped, source.left_out)
    chunks = {}
    for name in SPLITS:
        chunks[name] = sum(splits[name]["chunks"] for splits in by_domain.values())
    if not chunks["train"] or (cfg.val_fraction and not chunks["val"]):
        name, how = ("val", "raise") if chunks["train"] else ("train", "lower")
        cure = f"{how} --val_fraction={cfg.val_fraction}, lower --block_size={cfg.block_size}"
        what = f"{held['tokens']} tokens in all fill no chunk of {name}.npy"
        raise UserError(f"{what}: {cure}, or read more text")
    tokens = {name: n * (cfg.block_size + 1) for name, n in chunks.items()}
    return {
        "schema": data.SCHEMA,
        "tokenizer": cfg.tokenizer,
        "vocab_size": TOKENIZERS[cfg.tokenizer].n_vocab,
        "eot": TOKENIZERS[cfg.tokenizer].eot,
        "block_size": cfg.block_size,
        "domains": list(by_domain),
        "chunks": chunks,
        "by_domain": by_domain,
        "skipped": skipped,
        "no_domain": held["no_domain"],  # documents under their file's name
        "long_domain": held["long_domain"],  # the same
        "left_out": source.left_out,  # files of a folder
        "documents": sum(n for key, n in held.items() if key[0] == "documents"),
        "dropped_tokens": held["tokens"] - sum(tokens.values()),
        "tokens": tokens,  # in the arrays, with <eot>
        "source": cfg.source or cfg.dataset,
        "files": inventory(cfg.source, files),
        "config": cfg.makes(),
        "sha256": {},
        "footers": {},
    }


def count_domains(held, width):
    """What the parts hold -> {domain: {split: its documents, tokens and chunks}}, in the order in
    which the domains were met. width: tokens of a chunk."""
    by_domain = {}
    for key in held:
        if key[0] == "documents":
            by_domain[key[2]] = {}
    for domain, splits in by_domain.items():
        for name in SPLITS:
            chunks = held["tokens", name, domain] // width
            documents = held["documents", name, domain]
            splits[name] = {"documents": documents, "tokens": chunks * width, "chunks": chunks}
    return by_domain


def check_domains(cfg, held, by_domain, skipped, left_out):
    """Raises UserError where there is no document, not of each domain asked for, or where there
    are too many domains."""
    others = [key[1] for key in held if key[0] == "left out"]
    wanted = Wanted(cfg.domains)
    missing = wanted.missing(by_domain)
    if missing:
        raise UserError(wanted.explain(missing, sorted({*others, *by_domain})))
    if not by_domain:
        told = [f"{n} {why}" for why, n in skipped.items() if n]
        reasons = "; ".join([", ".join(told) or "nothing", *explain_left_out(left_out)])
        what = f"no document in {cfg.source or cfg.dataset} (skipped: {reasons})"
        cure = "see --source and --text_key"
        if skipped["too_long"]:
            cure = f"{cure}, or raise --max_document_mb={cfg.max_document_mb}"
        raise UserError(f"{what}: {cure}")
    if len(by_domain) > MOST_DOMAINS:
        what = f"--domain_key={cfg.domain_key} has {len(by_domain)} values, over {MOST_DOMAINS}"
        raise UserError(f"{what}: name a key with fewer")


# --- the run ------------------------------------------------------------------


def prepare(cfg):
    """Writes cfg.data_dir, or a shard's parts. Raises UserError and OSError: data_dir is as it was
    then, and parts that are whole stay."""
    folders = Folders(cfg.data_dir, data.DATA_FILES)
    folders.recover()
    if cfg.verify:
        data.open_dataset(cfg.data_dir).verify()
        return say(f"{cfg.data_dir}: every array is as it was written")
    folders.check()
    if is_prepared(cfg, folders):
        folders.clear()  # of a run that was killed when it had only this left to do
        return say(f"{cfg.data_dir} is already prepared; --overwrite prepares it again")
    tqdm.monitor_interval = 0  # no thread of its own, which the workers would be forked beside
    source = find_source(cfg, folders.ours())
    files = stated(source.names)
    parts = plan(cfg, files, folders.parts)
    count_parts(cfg, parts)
    i, n = cfg.shard_numbers()
    partial = folders.partial(i, n)
    # a second run is refused, however the first one ends; unlike by flock, the workers do not
    # inherit it
    with Claim(partial, "data_dir"):
        try:
            folders.empty(partial, keep=["lock"])
            done = tokenize(cfg, parts[i - 1 :: n], source.read, partial)
            if cfg.shard:
                merge = cfg.command("--merge")
                return say(f"shard {cfg.shard} is done; when all are: {merge}")
            meta = write_data_set(cfg, done, source, files, folders, partial)
        finally:
            folders.remove(partial)
            folders.remove_parts_folder()
    for line in tables.prepared(meta):
        say(line)
    say("")
    say(f"next: {command('python', 'train.py', f'--data_dir={cfg.data_dir}')}")


def count_parts(cfg, parts):
    """Says how many parts are there already. Raises UserError where a merge misses one."""
    missing = {}
    for number, (path, names) in enumerate(parts, 1):
        if not path.exists():
            missing[number] = end_of(names[0])
    if cfg.merge and missing:
        what = f"{len(missing)} of {len(parts)} parts are missing"
        what = f"{what}, unfinished or of other files or options ({listed([*missing.values()])})"
        cure = cfg.command(f"--shard={min(missing)}/{len(parts)}")
        raise UserError(f"{what}: type: {cure}")
    if len(missing) < len(parts):
        say(f"{len(parts) - len(missing)} of {len(parts)} parts are there already")


def write_data_set(cfg, done, source, files, folders, partial):
    """The parts -> cfg.data_dir. Returns its meta.json."""
    held = Counter()
    for of_part in done.values():
        held.update(of_part)
    try:
        meta = describe(cfg, held, source, files)
    except UserError:
        folders.clear()  # with the options changed, other parts will be needed
        raise
    pack(done, partial, meta)
    write_json(partial / "meta.json", meta)
    folders.publish(partial, cfg.overwrite)
    folders.clear()
    return meta


def is_prepared(cfg, folders):
    """Whether data_dir, which is ours, is what this configuration makes of its source as it is
    now. Raises UserError where it is anything else."""
    folder = folders.folder
    if cfg.overwrite or not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "meta.json").exists():
        what = f"{cfg.data_dir} is damaged (its meta.json is missing)"
        raise UserError(f"{what}: add --overwrite to prepare it again")
    meta = data.open_dataset(folder).meta
    was, now = {**data.PREPARED_BY, **meta["config"]}, cfg.makes()
    cure = "add --overwrite to replace it, or write another --data_dir"
    different = [f"--{key}={was[key]}" for key in now if was[key] != now[key]]
    if different:
        raise UserError(f"{cfg.data_dir} was prepared with {' '.join(different)}: {cure}")
    told = source_changes(cfg, meta, folders)
    if told:
        what = f"{cfg.data_dir} was prepared from other contents of {cfg.source} ({told})"
        raise UserError(f"{what}: {cure}")
    return True


def source_changes(cfg, meta, folders):
    """What is different in the source since the data was prepared, in words; empty: nothing, or it
    is not there any more."""
    if cfg.source in ("", "python") or not isinstance(meta.get("files"), dict):
        return ""
    try:
        found = find_files(cfg.source, cfg.follow_links, folders.ours())
    except (UserError, OSError):
        return ""
    return changes(meta["files"], inventory(cfg.source, stated(found.names)))


if __name__ == "__main__":
    # the way out of Ctrl-C: the workers go too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    config.main(lambda: prepare(config.load(Config)))
