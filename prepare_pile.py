"""Documents -> numbered chunks of one domain each, written to data_dir for data.py to read.

    python prepare_pile.py                                  the Pile, streamed from the hub
    python prepare_pile.py --source=python --data_dir=data/python
                                                            the text that Python comes with, offline
    python prepare_pile.py --source=pile                    a file, a folder or a glob
    python prepare_pile.py --source=pile --shard=3/30       a job of an array: tokenizes every 30th
                                                            file from the third on
    python prepare_pile.py --source=pile --merge            after them: what a run without --shard
                                                            would have made, to the byte
    python prepare_pile.py --source=pairs.jsonl --prompt_key=prompt --answer_key=answer
                                                            a pair a chunk: only answers are learned
                                                            (--pairs_per_chunk=8: up to eight)
    python prepare_pile.py --verify                         is every array as it was written?

Sources: .parquet; .jsonl, .ndjson and .json with a record a line; .txt. All but .parquet may be
packed as .gz, .zst, .bz2 or .xz. Text is UTF-8. A folder is read with everything below it, except
hidden files, files of other kinds and symbolic links (--follow_links reads those). The last lines
printed say what was left out, which domains are too small, and what to type next.

First every source file is tokenized into a part in data_dir.parts (small files share one, up to
64 MB): a run that was killed goes on after its last part. Then the parts are packed, in their
order, into a folder that takes the name data_dir when it is whole. The files are therefore the same
with any number of workers, with any number of shards, and after any interruption. Until the end the
disk holds each token twice. A data_dir that holds other files is never replaced, and only files
that this program wrote are ever removed.

Memory: 0.3 GB and 0.2 GB a worker for ordinary text. Whatever the text is, no more than
1 GB + workers * (0.2 GB + 80 * max_document_mb MB), with a tokenizer.json 350 in place of 80. On
top comes what a packed file asks for itself (2 GB after zstd --long=31), and in the end 4 *
block_size bytes a domain.

Split: by the hash of a document's text, so equal texts are on one side. Chunks: each domain of a
split is one stream of tokens, <eot> after every document, cut into rows of block_size + 1 tokens;
a row takes its split's next number when it is full. So a document that begins in chunk c goes on
in the NEXT CHUNK OF ITS DOMAIN, next in np.flatnonzero(domain == d), and chunks of other domains
may stand between. Tokens that do not fill a domain's last row are dropped and counted.

train_docs.parquet and val_docs.parquet, sorted by first_chunk and first_token, hold every document
that has a token in a chunk: doc (its number in reading order), domain, source (its file), record
(line or row of the file, from 0), first_chunk, first_token (where in that chunk's row) and n_tokens
(without <eot>).

A domain is a text, a number or a date. It may also stand in a text of JSON, under a flat key with
dots, or in a map. A record without one, or with one of over 200 characters, takes its file's name
as its domain, and is counted. Records that cannot be used are skipped and counted: not_utf8,
not_json, no_text (no string under text_key, or under both keys of a pair), empty (or only white
space), lone_surrogate (half a character), too_long (for max_document_mb; of a parquet file also all
rows of a group with a much larger page), not_tokenized.

Pairs (--prompt_key, --answer_key; .jsonl and its like): each has a chunk of its own, <eot> prompt
answer <eot>, filled up with <eot>, and only the answer and the <eot> behind it are labels. With
--pairs_per_chunk=n a chunk holds up to n pairs of its domain, one <eot> between two of them, as
many as fit in whole. train_answer.npy and val_answer.npy, uint32 (n_chunks, 2 n), hold where in its
row each answer begins, and the token after its <eot>; 0, 0 where there are fewer pairs. Prompt and
answer are tokenized apart and joined as they are: what is to stand between them has to stand in one
of them. Also skipped and counted are no_answer (an answer of white space) and too_many_tokens (more
than a chunk holds): no pair is cut.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain

from tqdm import tqdm

import config
import data
from pile import workers
from pile.documents import find_source, jobs
from pile.domains import Wanted
from pile.encode import worker
from pile.files import changes, end_of, explain_left_out, find_files, inventory, stated
from pile.folders import Folders
from pile.keys import RECORDS, look
from pile.pack import (
    MB,
    MOST_DOMAINS,
    SPLITS,
    count_pair_rows,
    pack,
    read_held,
    write_part,
)
from pile.tokenizers import FILE, TOKENIZERS, token_type, tokenizer
from show import prepared
from system.errors import UserError
from system.files import write_json
from system.gpus import largest_gpu
from system.terminal import command, listed, progress, say

PART = 64 * MB  # bytes of source files that share a part
WORKERS_A_CORE = 4  # more would only wait for each other
SKIPPED = (  # why a record becomes no document, in the order in which meta.json has the reasons
    "not_utf8",
    "not_json",
    "no_text",
    "empty",
    "lone_surrogate",
    "too_long",
    "not_tokenized",
)
PAIR_SKIPPED = ("no_answer", "too_many_tokens")  # and why a pair does not

# --- options ----------------------------------------------------------------------

AT_LEAST = {
    "block_size": 1,
    "pairs_per_chunk": 1,
    "val_fraction": 0,
    "limit_tokens": 0,
    "workers": 0,
    "max_document_mb": 1,
}
BELOW = {
    "block_size": 2**31,
    "pairs_per_chunk": 1025,
    "val_fraction": 1,
    "max_document_mb": 2**20,
}
NEVER_EMPTY = ("dataset", "text_key", "domain_key", "data_dir")
# options that do not change what the files contain
WITHOUT_EFFECT = ("data_dir", "overwrite", "workers", "shard", "merge", "verify")


@dataclass
class Config:
    source: str = ""  # python | a file, a folder or a glob; empty: the hub
    dataset: str = "monology/pile-uncopyrighted"  # on the hub, or a folder for `datasets`
    text_key: str = "text"  # where a record has its text; a dot goes one level down
    prompt_key: str = ""  # with answer_key: of pairs
    answer_key: str = ""  # only what stands here is learned
    pairs_per_chunk: int = 1  # at most; more: trained faster, but valued together
    domain_key: str = "meta.pile_set_name"  # where it has its domain; else its file's name
    domains: str = ""  # comma-separated: only these; empty: all. A comma within a name: \,
    follow_links: bool = False  # also read what symbolic links in a folder lead to
    max_document_mb: int = 64  # longer records are skipped and counted; memory grows with it
    data_dir: str = "data/pile"  # what to write
    overwrite: bool = False  # replace a data_dir prepared otherwise, once the new one is whole
    # gpt2: 50,257 tokens; byte: 256, for small models; or a model's tokenizer.json, by its path
    tokenizer: str = "gpt2"
    block_size: int = 1024  # a chunk is block_size + 1 tokens
    val_fraction: float = 0.01  # of the documents, to val.npy
    limit_tokens: int = 0  # stop after the document that makes it this many; 0: all
    workers: int = 0  # processes that tokenize, at most 4 a core; 0: one a core
    shard: str = ""  # i/n: only tokenize the source's parts i, i + n, i + 2n, ...
    merge: bool = False  # only pack what the shards have tokenized; other keys as they had them
    verify: bool = False  # only check data_dir's arrays against the sha256 in its meta.json

    def __post_init__(self):
        config.check(self, at_least=AT_LEAST, below=BELOW)
        most_workers = WORKERS_A_CORE * count_cores()
        if self.workers > most_workers:
            most = f"{most_workers}, {WORKERS_A_CORE} for each core of this machine"
            raise UserError(f"--workers={self.workers}: it must be at most {most}")
        for key in NEVER_EMPTY:
            if not getattr(self, key):
                raise UserError(f"--{key}=: write --{key}=<a name>")
        if self.tokenizer not in TOKENIZERS and not self.tokenizer.endswith(".json"):
            known = f"{', '.join(TOKENIZERS)}, or the path of a tokenizer.json"
            raise UserError(f"--tokenizer={self.tokenizer}: choose one of {known}")
        if bool(self.prompt_key) != bool(self.answer_key):
            raise UserError(
                "--prompt_key and --answer_key name the two parts of a pair: write both"
            )
        if self.is_pairs and self.source in ("", "python"):
            what = "--prompt_key and --answer_key are of records of your own"
            raise UserError(f"{what}: name a .jsonl file with --source=...")
        if self.pairs_per_chunk > 1 and not self.is_pairs:
            what = f"--pairs_per_chunk={self.pairs_per_chunk} is of pairs"
            raise UserError(f"{what}: name their parts with --prompt_key and --answer_key")
        self.shard_numbers()
        if self.shard and (self.merge or self.limit_tokens or self.source == "python"):
            others = "neither --merge nor --limit_tokens nor --source=python"
            raise UserError(f"--shard={self.shard} goes with {others}: write one or the other")

    @property
    def tokenizer_sha256(self):
        """Of a tokenizer that is a file; "" of one that has a name."""
        if self.tokenizer in TOKENIZERS:
            return ""
        if not os.path.isfile(self.tokenizer):
            raise UserError(f"no {self.tokenizer}: name the tokenizer.json of a model")
        with open(self.tokenizer, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def is_pairs(self):
        return bool(self.answer_key)

    def shard_numbers(self):
        """Returns i, n of --shard=i/n, or 1, 1 without --shard. Raises UserError."""
        if not self.shard:
            return 1, 1
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", self.shard)
        if match:
            i = int(match[1])
            n = int(match[2])
            if 1 <= i <= n:
                return i, n
        raise UserError(f"--shard={self.shard}: write --shard=<i>/<n, i from 1 to n>")

    def makes(self):
        """The options that decide what the files contain, as a dict."""
        return {key: value for key, value in vars(self).items() if key not in WITHOUT_EFFECT}

    def command(self, *more):
        """What to type for these options, and for the arguments in more."""
        options = {"data_dir": self.data_dir, **self.makes()}
        arguments = []
        for key, value in options.items():
            if value != getattr(Config, key):
                arguments.append(f"--{key}={value}")
        return command("python", "prepare_pile.py", *arguments, *more)


def count_cores():
    return os.cpu_count() or 1


def prepare(cfg):
    """Writes cfg.data_dir, or the parts of one shard.

    Raises UserError and OSError. data_dir then stays as it was, and finished parts are kept."""
    folders = Folders(cfg.data_dir, [*data.DATA_FILES, *data.ANSWERS, FILE])
    folders.recover()
    if cfg.verify:
        data.open_dataset(cfg.data_dir).verify()
        say(f"{cfg.data_dir}: every array is as it was written")
        return
    folders.check()
    if is_prepared(cfg, folders):
        folders.clear()  # a run that was killed at its very end leaves its parts
        say(f"{cfg.data_dir} is already prepared; --overwrite prepares it again")
        return
    source = find_source(cfg, folders.ours())
    files = stated(source.names)
    parts = plan(cfg, files, folders.parts)
    count_parts(cfg, parts)
    if not cfg.merge:
        warn_of_keys(cfg, source)
    i, n = cfg.shard_numbers()
    with folders.partial_folder(i, n) as partial:
        counts = tokenize(cfg, parts[i - 1 :: n], source.read, partial)
        if not cfg.shard:
            meta = write_data_set(cfg, counts, source, files, folders, partial)
    if cfg.shard:
        say(f"shard {cfg.shard} is done; when all are: {cfg.command('--merge')}")
        return
    for line in [*prepared.table(meta), *cautions(cfg, meta, source)]:
        say(line)
    say("")
    say_next(cfg, meta)


# --- what is to be done -------------------------------------------------------------


def is_prepared(cfg, folders):
    """Whether data_dir already is what this configuration makes of its source.

    Raises UserError where it holds a data set of other options or of other files, unless
    --overwrite is given."""
    folder = folders.folder
    if cfg.overwrite or not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "meta.json").exists():
        what = f"{cfg.data_dir} is damaged (its meta.json is missing)"
        raise UserError(f"{what}: add --overwrite to prepare it again")
    meta = data.open_dataset(folder).meta
    before = {**data.PREPARED_BY, **meta["config"]}
    cure = "add --overwrite to replace it, or write another --data_dir"
    different = []
    for key, value in cfg.makes().items():
        if before[key] != value:
            different.append(f"--{key}={before[key]}")
    if different:
        raise UserError(f"{cfg.data_dir} was prepared with {' '.join(different)}: {cure}")
    if meta["sha256"].get(FILE, "") != cfg.tokenizer_sha256:
        what = f"{cfg.data_dir} was prepared with another content of {cfg.tokenizer}"
        raise UserError(f"{what}: {cure}")
    changed = source_changes(cfg, meta, folders)
    if changed:
        what = f"{cfg.data_dir} was prepared from other contents of {cfg.source} ({changed})"
        raise UserError(f"{what}: {cure}")
    return True


def source_changes(cfg, meta, folders):
    """Says how the source differs from the one that the data was prepared from.

    Empty where it is the same, and where it is not there any more."""
    if cfg.source in ("", "python") or not isinstance(meta.get("files"), dict):
        return ""
    try:
        listing = find_files(cfg.source, cfg.follow_links, folders.ours())
    except (UserError, OSError):
        return ""
    return changes(meta["files"], inventory(cfg.source, stated(listing.names)))


def plan(cfg, files, folder):
    """Groups the source's files into parts of about PART bytes.

    files: [(name, bytes, time of change)], as stated() gives them. Returns [(path, names)]: where
    a part lies in the folder, and the files it is made of. The path holds a hash of these files and
    of the options, so that a part made of anything else is never taken for this one."""
    groups = {}  # {number of a stretch of PART bytes: files that end in it}
    total = 0
    for name, size, changed in files:
        size = PART if size is None else size
        total += size
        groups.setdefault((total - 1) // PART, []).append((name, size, changed))
    parts = []
    tokenizer_sha256 = cfg.tokenizer_sha256
    for number, group in enumerate(groups.values(), 1):
        made_of = json.dumps([data.SCHEMA, cfg.makes(), group]) + tokenizer_sha256
        key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
        names = [name for name, _, _ in group]
        parts.append((folder / f"{number:05}-{key}.arrow", names))
    return parts


def count_parts(cfg, parts):
    """Says how many parts are there already. Raises UserError where a merge lacks one."""
    missing = {}  # {number of a part: the first of its files}
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


def warn_of_keys(cfg, source):
    """Says it before hours of work where the first records have nothing under the keys."""
    keys = look(source.names, cfg, source.opener)
    if keys.records < RECORDS:  # a short source: what is wrong with it is said in a moment
        return
    first = f"caution: none of the first {keys.records} records has a"
    if not keys.with_text and cfg.is_pairs:
        say(f"{first} pair under {cfg.prompt_key!r} and {cfg.answer_key!r}; {keys.named()}")
    elif not keys.with_text:
        cure = command(f"--text_key={keys.longest_text() or '<one of them>'}")
        say(f"{first} text under {cfg.text_key!r}; {keys.named()}: type {cure}")
    elif not keys.with_domain:
        say(f"{first} domain under {cfg.domain_key!r}; {explain_domain_key(cfg, keys)}")


def explain_domain_key(cfg, keys):
    """Which keys there are, and how to name one that has the domain."""
    others = [key for key in keys.texts if key != cfg.text_key]
    if not others:
        return f"{keys.named()} alone: each file is one domain"
    key = others[0] if len(others) == 1 else "<one of them>"
    return f"{keys.named()}: type {command(f'--domain_key={key}')}"


# --- first pass: source files -> parts ------------------------------------------------


def tokenize(cfg, parts, read, partial):
    """Writes the parts that are missing, up to the one in which --limit_tokens is reached.

    parts: what plan() gives. read: a file's name -> its documents. partial: the folder in which a
    part lies until it is whole. Returns {path of a part: its counts}, see write_part()."""
    limit = cfg.limit_tokens or float("inf")
    token_bytes = token_type(tokenizer(cfg.tokenizer).n_vocab).itemsize
    counts = {}
    tqdm.monitor_interval = 0  # a progress bar starts no thread: workers are forked
    # before other libraries have started their threads
    pool = workers.start(cfg.workers or count_cores(), worker, cfg)
    try:
        for path, names in parts:
            if not path.exists():
                if len(names) > 1:
                    names = progress(names, "files", unit="file", delay=1)
                documents = chain.from_iterable(map(read, names))
                encoded = workers.ordered(pool, jobs(documents))
                write_part(partial / path.name, encoded, limit, token_bytes)
                (partial / path.name).rename(path)
            counts[path] = read_held(path)
            limit -= counts[path]["tokens"]
            if limit <= 0:
                break
    except BrokenPipeError as e:
        cure = f"try --workers={max(1, len(pool) // 2)}, or a lower --max_document_mb"
        raise UserError(f"a worker process was killed, perhaps for want of memory: {cure}") from e
    finally:
        workers.stop(pool)
    return counts


# --- second pass: parts -> data_dir -----------------------------------------------------


def write_data_set(cfg, counts, source, files, folders, partial):
    """Packs the parts into the folder partial, which then takes data_dir's place.

    counts: what tokenize() returns. Returns the content of meta.json."""
    total = Counter()
    for part_counts in counts.values():
        total.update(part_counts)
    if cfg.is_pairs:
        total.update(count_pair_rows(counts, cfg))
    try:
        meta = describe(cfg, total, source, files)
    except UserError:
        folders.clear()  # other options will need other parts
        raise
    pack(counts, partial, meta, cfg.pairs_per_chunk if cfg.is_pairs else 0)
    if meta["tokenizer"] == FILE:
        shutil.copyfile(cfg.tokenizer, partial / FILE)
        meta["sha256"][FILE] = cfg.tokenizer_sha256
    write_json(partial / "meta.json", meta)
    folders.publish(partial, cfg.overwrite)
    folders.clear()
    return meta


def describe(cfg, counts, source, files):
    """The content of meta.json, except what pack() adds. counts: the sum over all parts.

    Raises UserError where a split or a domain that was asked for has no document."""
    reasons = [*SKIPPED, *(PAIR_SKIPPED if cfg.is_pairs else ())]
    skipped = {reason: counts["skipped", reason] for reason in reasons}
    by_domain = count_domains(counts, cfg.block_size + 1, cfg.is_pairs)
    check_domains(cfg, counts, by_domain)
    if not by_domain:
        refuse_nothing(cfg, skipped, source)
    chunks = {}
    tokens = {}
    for split in SPLITS:
        chunks[split] = sum(splits[split]["chunks"] for splits in by_domain.values())
        tokens[split] = sum(splits[split]["tokens"] for splits in by_domain.values())
    check_splits(cfg, counts["tokens"], chunks)
    return {
        "schema": data.PAIRS if cfg.is_pairs else data.SCHEMA,
        "tokenizer": cfg.tokenizer if cfg.tokenizer in TOKENIZERS else FILE,
        "vocab_size": tokenizer(cfg.tokenizer).n_vocab,
        "eot": tokenizer(cfg.tokenizer).eot,
        "block_size": cfg.block_size,
        "domains": list(by_domain),
        "chunks": chunks,
        "by_domain": by_domain,
        "skipped": skipped,
        "no_domain": counts["no_domain"],  # documents under their file's name
        "long_domain": counts["long_domain"],  # the same
        "left_out": source.left_out,  # files of a folder
        "documents": sum(n for key, n in counts.items() if key[0] == "documents"),
        "dropped_tokens": counts["tokens"] - sum(tokens.values()),
        # in the arrays, with <eot>; of pairs those of each, with the <eot> around it
        "tokens": tokens,
        "source": cfg.source or cfg.dataset,
        "files": inventory(cfg.source, files),
        "config": cfg.makes(),
        "sha256": {},
        "footers": {},
    }


def count_domains(counts, width, is_pairs=False):
    """Counts of the parts -> {domain: {split: its documents, tokens and chunks}}.

    The domains are in the order in which they were met. width: tokens of a chunk. is_pairs: the
    chunks are counted too."""
    by_domain = {}
    for key in counts:
        if key[0] == "documents":
            by_domain[key[2]] = {}
    for domain, splits in by_domain.items():
        for split in SPLITS:
            tokens = counts["tokens", split, domain]
            documents = counts["documents", split, domain]
            if is_pairs:
                chunks = counts["chunks", split, domain]
            else:
                chunks = tokens // width
                tokens = chunks * width
            splits[split] = {"documents": documents, "tokens": tokens, "chunks": chunks}
    return by_domain


def check_domains(cfg, counts, by_domain):
    """Raises UserError where --domains asks for one that is missing, or there are too many."""
    wanted = Wanted(cfg.domains)
    missing = wanted.missing(by_domain)
    if missing:
        not_asked_for = [key[1] for key in counts if key[0] == "left out"]
        raise UserError(wanted.explain(missing, sorted({*not_asked_for, *by_domain})))
    if len(by_domain) > MOST_DOMAINS:
        what = f"--domain_key={cfg.domain_key} has {len(by_domain)} values, over {MOST_DOMAINS}"
        raise UserError(f"{what}: name a key with fewer")


def refuse_nothing(cfg, skipped, source):
    """Raises the UserError of a source without a single document."""
    numbers = [f"{n} {reason}" for reason, n in skipped.items() if n]
    reasons = [", ".join(numbers) or "nothing", *explain_left_out(source.left_out)]
    cure = f"see --source and {'--prompt_key, --answer_key' if cfg.is_pairs else '--text_key'}"
    if skipped["no_text"]:
        keys = look(source.names, cfg, source.opener)
        if keys.texts:
            reasons.append(keys.named())
        if keys.longest_text() and not keys.with_text and not cfg.is_pairs:
            cure = f"type {command(f'--text_key={keys.longest_text()}')}"
    if skipped["too_long"]:
        cure = f"{cure}, or raise --max_document_mb={cfg.max_document_mb}"
    if skipped.get("too_many_tokens"):
        cure = f"{cure}, or raise --block_size={cfg.block_size}"
    what = f"no document in {cfg.source or cfg.dataset} (skipped: {'; '.join(reasons)})"
    raise UserError(f"{what}: {cure}")


def check_splits(cfg, tokens, chunks):
    """Raises UserError where a split that is to have chunks has none. chunks: {split: number}."""
    if not chunks["train"]:
        split = "train"
        change = "lower"
    elif cfg.val_fraction and not chunks["val"]:
        split = "val"
        change = "raise"
    else:
        return
    cure = f"{change} --val_fraction={cfg.val_fraction}, lower --block_size={cfg.block_size}"
    what = f"{tokens} tokens in all fill no chunk of {split}.npy"
    raise UserError(f"{what}: {cure}, or read more text")


# --- the last lines -----------------------------------------------------------------------


def cautions(cfg, meta, source):
    """Lines on what makes the data hard to use, each with what to type."""
    lines = []
    if meta["no_domain"] == meta["documents"]:
        keys = look(source.names, cfg, source.opener)
        if keys.texts:
            lines.append(f"no record has {cfg.domain_key!r}; {explain_domain_key(cfg, keys)}")
    lines.append(prepared.few_chunks(meta))
    missing = prepared.not_validated(meta)
    if missing and cfg.val_fraction:
        lines.append(prepared.explain_not_validated(meta, missing))
        fraction = prepared.larger_fraction(meta, missing)
        if fraction:
            again = replace(cfg, val_fraction=fraction, merge=False).command("--overwrite")
            lines.append(f"for more of them to have one, type: {again}")
    return [line for line in lines if line]


def say_next(cfg, meta):
    """Says what to type for a run on the data."""
    chosen = prepared.choose_config(meta, largest_gpu())
    name = os.path.basename(os.path.normpath(cfg.data_dir))
    words = ["python", "train.py", chosen.config, f"--data_dir={cfg.data_dir}"]
    words.append(f"--out_dir={os.path.join('out', name)}")  # a folder of its own for each data set
    if not meta["chunks"]["val"]:
        say("no validation set (--val_fraction=0): the target is a text of your own")
        words.append("--targets=mine=<a file>")
    say(chosen.reason)
    say(f"next: {command(*words)}")


def end_by_signal(number, frame):
    """As Ctrl-C ends the program, so that the workers end too."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_by_signal)
    config.main(lambda: prepare(config.load(Config)))
