"""Documents -> numbered chunks of one domain each, written to data_dir for data.py to read.

    python prepare_pile.py                                          the Pile, streamed from the hub
    python prepare_pile.py --source=python --data_dir=data/python   the text this Python installation carries: no download
    python prepare_pile.py --source=pile/00.jsonl.zst               a file, a folder or a glob: .parquet, or .jsonl .json .txt,
                                                                    each also .gz or .zst

Split: by the hash of a document's text, so equal texts are on one side. Chunks: each domain of a split is one stream of
tokens, <eot> after every document, cut into rows of block_size + 1 tokens; a row takes its split's next number when it is
full. So a document that begins in chunk c goes on in the NEXT CHUNK OF ITS DOMAIN, next in np.flatnonzero(domain == d), and
chunks of other domains may stand between. What does not fill a domain's last row is dropped and counted.

train_docs.parquet and val_docs.parquet, sorted by first_chunk and first_token, hold every document that has a token in a chunk:
doc (its number in reading order), domain, source and record (file and line or row, from 0), first_chunk, first_token (where
in that chunk's row), n_tokens (without <eot>). Records that are no use are skipped and counted: not_utf8, not_json, no_text
(no string under text_key), empty (or only white space), lone_surrogate (half a character), not_tokenized (a million blanks).

The files are the same whatever --workers is. They are built in data_dir.partial, which is renamed once it is whole.
"""

import ast
import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

import config
import data


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

    def __post_init__(self):
        rules = [("block_size", self.block_size >= 1, "1 or more"), ("val_fraction", 0 <= self.val_fraction < 1, "0 or more, below 1")]
        rules += [(key, getattr(self, key) >= 0, "0 or more") for key in ("limit_tokens", "workers")]
        rules += [(key, getattr(self, key), "a name") for key in ("dataset", "text_key", "domain_key", "data_dir")]
        for key, ok, wanted in rules:
            if not ok:
                raise ValueError(f"--{key}={getattr(self, key)}: write --{key}=<{wanted}>")


# --- sources: documents (source, record, domain or None, text), where text is a str or bytes not looked at yet, or
# Lines (the record is the first of them), or a Path of Python code: what a worker can do is left to the workers

MB = 1 << 20
TXT = 64 << 10  # a .txt longer than this becomes several documents
ZIPPED = {".gz": "gzip", ".zst": "zstd"}


class Lines(bytes):
    """Lines of JSON, whole."""


def open_source(cfg, bar):
    """-> an iterator of documents, which moves the bar. Raises ValueError where there is nothing to read."""
    if cfg.source == "python":
        return installed_text()
    if not cfg.source:
        return hub_documents(cfg, bar)
    paths = find_files(cfg.source)
    bar.total = sum(path.stat().st_size for path in paths)
    return (document for path in paths for document in file_documents(str(path), cfg, bar))


def suffixes(name):
    """A file's name -> (kind, compression), as (".jsonl", ".zst"); ("", "") for a kind that cannot be read."""
    found = re.search(r"(\.jsonl?|\.txt)(\.gz|\.zst|)$|(\.parquet)()$", name)
    return (found[1] or found[3], found[2] or "") if found else ("", "")


def find_files(source):
    """A file, a folder or a glob -> sorted paths."""
    path = Path(source)
    paths = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else map(Path, sorted(glob.glob(source, recursive=True)))
    paths = [p for p in paths if p.is_file() and (suffixes(p.name)[0] or not path.is_dir())]
    kinds = "it reads .parquet, .jsonl, .json and .txt, the last three also .gz or .zst"
    for p in paths:
        if not suffixes(p.name)[0]:
            raise ValueError(f"--source cannot read {p}: {kinds}")
    if not paths:
        raise ValueError(f"--source={source}: nothing to read there; {kinds}, and --source=python needs no file")
    return paths


def file_documents(name, cfg, bar, domain=None, opener=open):
    """The documents of one file; domain: of those that have none themselves, where it is not to be the file's name."""
    import pyarrow as pa

    kind, zipped = suffixes(name)
    with opener(name, "rb") as raw:
        if kind == ".parquet":
            yield from parquet_documents(raw, name, cfg, bar)
            return
        try:
            pieces = whole_lines(pa.CompressedInputStream(raw, ZIPPED[zipped]) if zipped else raw, raw, bar)
            yield from txt_documents(pieces, name) if kind == ".txt" else json_lines(pieces, name, domain)
        except OSError as e:
            raise ValueError(f"{name} is damaged or cut short ({e}): fetch it again") from e


def whole_lines(stream, raw, bar):
    """A stream -> pieces of about 1 MB, each ending where a line ends; the bar moves with the raw file under it."""
    parts, size, at = [], 0, 0
    while block := stream.read(MB):
        bar.update(raw.tell() - at)
        at = raw.tell()
        parts.append(block)
        size += len(block)
        if size >= MB and b"\n" in block:
            piece = b"".join(parts)
            end = piece.rfind(b"\n") + 1
            yield piece[:end]
            parts, size = [piece[end:]], len(piece) - end
    if size:
        yield b"".join(parts)


def json_lines(pieces, name, domain):
    first = 0
    for piece in pieces:
        if not first and piece.lstrip().startswith(b"["):
            raise ValueError(f"{name} is one JSON array: write a record a line, as `jq -c '.[]' {name} > {Path(name).stem}.jsonl` does")
        yield name, first, domain, Lines(piece)
        first += piece.count(b"\n")


def txt_documents(pieces, name):
    """A .txt is one document; over 64 KiB it is several, cut at ends of lines."""
    domain, record = Path(name).resolve().parent.name, 0
    for piece in pieces:
        start = 0
        while start < len(piece):
            end = piece.find(b"\n", start + TXT - 1) + 1 or len(piece)
            yield name, record, domain, piece[start:end]
            start, record = end, record + 1


def parquet_documents(raw, name, cfg, bar):
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.parquet

    def column(batch, key):
        """A list of bytes, so that one text that is not UTF-8 spoils no other; None where there is no such column."""
        try:
            array = pa.compute.struct_field(batch.to_struct_array(), key.split("."))
        except pa.ArrowInvalid:
            return None
        return array.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()

    try:
        file, size, record = pa.parquet.ParquetFile(raw), raw.seek(0, os.SEEK_END), 0
        for batch in file.iter_batches(batch_size=256, columns=[cfg.text_key, cfg.domain_key]):
            texts = column(batch, cfg.text_key)
            if texts is None:
                raise ValueError(f"{name} has no column {cfg.text_key!r}: write --text_key=<one of {', '.join(file.schema_arrow.names)}>")
            for text, domain in zip(texts, column(batch, cfg.domain_key) or [None] * len(texts)):
                yield name, record, domain, text
                record += 1
            bar.update(size * len(texts) / file.metadata.num_rows)
    except pa.ArrowException as e:
        raise ValueError(f"{name} cannot be read as parquet: {str(e).splitlines()[0]}") from e


def hub_documents(cfg, bar):
    """A dataset the datasets library knows. Its JSON files are read as the lines they are: the library's own reader takes its
    schema from the first lines and stops where `meta` later gains a key, or where a line is no JSON."""
    import datasets
    from datasets.utils.file_utils import xopen

    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)  # every retry would be a line
    try:
        files = (datasets.load_dataset_builder(cfg.dataset).config.data_files or {}).get("train", [])
        if files and all(suffixes(name)[0] in (".json", ".jsonl") for name in files):
            for name in files:
                yield from file_documents(name, cfg, bar, Path(cfg.dataset).name, xopen)
        else:
            for i, record in enumerate(datasets.load_dataset(cfg.dataset, split="train", streaming=True)):
                yield cfg.dataset, i, lookup(record, cfg.domain_key), lookup(record, cfg.text_key)
    except (OSError, ValueError) as e:
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"--dataset={cfg.dataset}: {why}; type --source=python for text that needs no network, or --source=PATH") from e


def installed_text():
    """What every Python installation carries -> documents, in an order that mixes the domains and is always the same."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    modules = [p for name in sys.stdlib_module_names for p in (library / f"{name}.py", *(library / name).rglob("*.py")) if p.is_file()]
    found = [(str(p), 0, None, p) for p in modules if not {"pydoc_data", "test", "tests", "idle_test"} & set(p.parts)]
    found += [(f"pydoc_data.topics:{name}", 0, "Topics", text) for name, text in topics.items()]
    paths = {p for folder in sys.path for p in Path(folder).glob("*.dist-info/**/*")} | set(library.iterdir())
    licences = [p for p in sorted(paths) if p.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")) and p.is_file()]
    found += {text: (str(p), 0, "Licences", text) for p in licences for text in [p.read_bytes()]}.values()
    readmes = {d.metadata["Name"]: d.metadata.get("Description", "") for d in metadata.distributions()}
    found += [(f"readme:{name}", 0, "Readmes", text) for name, text in readmes.items()]
    # by the end of the path, which is the same wherever Python is installed
    return iter(sorted(found, key=lambda document: hashlib.blake2b("/".join(document[0].split("/")[-3:]).encode(errors="replace")).digest()))


def jobs(documents):
    """Documents -> lists of them, of about 1 MB of text at most."""
    job, size = [], 0
    for document in documents:
        text = document[3]
        job.append(document)
        size += 4 * text.stat().st_size if isinstance(text, Path) else len(text or "")  # to parse Python takes its time
        if size >= MB >> 1:  # whole_lines() gives a little less than 1 MB
            yield job
            job, size = [], 0
    if job:
        yield job


# --- in a worker: a job -> documents in tokens -------------------------


def start_worker(cfg):
    global CFG, TOKENIZER, EOT
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=die_with_parent, daemon=True).start()
    CFG, TOKENIZER = cfg, data.tokenizer(cfg.tokenizer)
    EOT = np.array([TOKENIZER.eot], np.uint16)


def die_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def encode(job):
    """A list of documents -> documents [(split, domain, source, record, tokens uint16 (n,) with <eot>, bytes of text)], skipped, left_out:
    the domains there are but that --domains does not name."""
    wanted, documents, skipped, left_out = set(comma_list(CFG.domains)), [], Counter(), set()
    for source, record, domain, text in records(job, skipped):
        try:
            text, domain = (x.decode() if isinstance(x, bytes) else x for x in (text, domain))
            domain = Path(source).name.removesuffix("".join(suffixes(source))) if domain in (None, "") else str(domain)
            if wanted and domain not in wanted:
                left_out.add(domain)
                continue
            if not isinstance(text, str) or not text or text.isspace():
                skipped["empty" if isinstance(text, str) else "no_text"] += 1
                continue
            utf8, _ = text.encode(), domain.encode()
            tokens = np.append(TOKENIZER.encode(text), EOT)
        except ValueError as e:
            skipped[{UnicodeDecodeError: "not_utf8", UnicodeEncodeError: "lone_surrogate"}.get(type(e), "not_tokenized")] += 1
            continue
        hashed = int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest(), "big") / 2**64
        documents.append(("val" if hashed < CFG.val_fraction else "train", domain, source, record, tokens, len(utf8)))
    return documents, skipped, left_out


def records(job, skipped):
    """A job's documents, the Lines and Paths among them opened up; counts the lines that are no JSON."""
    for source, first, domain, text in job:
        if isinstance(text, Path):
            code, docstrings = cut_docstrings(text.read_bytes())
            yield source, first, "Python code", code
            yield source, first, "Docstrings", docstrings
        elif not isinstance(text, Lines):
            yield source, first, domain, text
        else:
            for number, line in enumerate(text.split(b"\n"), first):
                if not line or line.isspace():
                    continue
                try:
                    record = json.loads(line.decode())
                except UnicodeDecodeError:
                    skipped["not_utf8"] += 1
                except (ValueError, RecursionError):
                    skipped["not_json"] += 1
                else:
                    found = lookup(record, CFG.domain_key)
                    yield source, number, domain if found in (None, "") else found, lookup(record, CFG.text_key)


def lookup(record, key):
    for name in key.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record


def comma_list(text):
    return [name.strip() for name in text.split(",") if name.strip()]


def cut_docstrings(source):
    """A Python file's bytes -> its lines without those of docstrings, as bytes, and the docstrings, one text."""
    try:
        nodes = [ast.parse(source)]
    except (SyntaxError, ValueError):
        return source, ""
    lines, docstrings = source.splitlines(keepends=True), []
    for node in nodes:  # grows as it goes
        if text := ast.get_docstring(node):
            docstrings.append(text)
            for i in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                lines[i] = b""
        nodes.extend(n for n in node.body if isinstance(n, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)))
    return b"".join(lines), "\n\n".join(docstrings)


# --- in the parent: tokens -> rows -> files -----------------------------------


class Rows:
    """A uint16 .npy file that is written row by row; its header is written again when their number is known."""

    def __init__(self, path, row_shape):
        self.file, self.row_shape, self.n, self.sha256 = open(path, "wb"), row_shape, 0, hashlib.sha256()
        self.header()

    def header(self):
        """numpy pads it so that any number of rows fits."""
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, {"descr": "<u2", "fortran_order": False, "shape": (self.n, *self.row_shape)})

    def append(self, rows):
        rows = np.ascontiguousarray(rows, "<u2")
        self.file.write(rows)
        self.sha256.update(rows.view(np.uint8).reshape(-1))
        self.n += len(rows)

    def close(self):
        self.header()
        self.file.close()
        return self.sha256.hexdigest()


class Split:
    """Packs one split's documents into rows and writes its three files."""

    def __init__(self, folder, name, width):
        import pyarrow as pa
        import pyarrow.parquet

        i4, i8, text = pa.int32(), pa.int64(), pa.string()
        columns = dict(doc=i8, domain=text, source=text, record=i8, first_chunk=i8, first_token=i4, n_tokens=i8)
        self.table = pa.parquet.ParquetWriter(folder / f"{name}_docs.parquet", pa.schema(columns))
        self.rows, self.domain = Rows(folder / f"{name}.npy", (width,)), Rows(folder / f"{name}_domain.npy", ())
        self.width, self.tokens, self.listed, self.entries = width, 0, 0, []
        self.waiting = {}  # by domain: arrays of tokens that fill no row yet, how many, and (first token, document) of those that begin there
        self.documents, self.chunks = Counter(), Counter()  # by domain

    def add(self, number, tokens, document):
        """A document of the domain with this number; document: its doc, domain, source and record."""
        self.tokens += len(tokens)
        self.documents[number] += 1
        arrays, size, begun = self.waiting.get(number, ([], 0, []))
        arrays.append(tokens)
        begun.append((size, (*document, len(tokens) - 1)))
        size += len(tokens)
        if n := size // self.width:
            tokens, rest = np.concatenate(arrays), []
            for at, (*document, n_tokens) in begun:
                row, first_token = divmod(at, self.width)
                if row < n:
                    self.entries.append((*document, self.rows.n + row, first_token, n_tokens))
                else:
                    rest.append((at - n * self.width, (*document, n_tokens)))
            self.rows.append(tokens[: n * self.width].reshape(n, self.width))
            self.domain.append(np.full(n, number))
            self.chunks[number] += n
            arrays, size, begun = [tokens[n * self.width :].copy()], size - n * self.width, rest
        self.waiting[number] = arrays, size, begun
        if len(self.entries) >= 1 << 14:
            self.write_table()

    def write_table(self):
        """The entries, as one row group."""
        import pyarrow as pa

        columns = zip(*self.entries) if self.entries else [()] * len(self.table.schema)
        self.table.write_table(pa.table([pa.array(c, of.type) for c, of in zip(columns, self.table.schema)], schema=self.table.schema))
        self.listed, self.entries = self.listed + len(self.entries), []


class Packer:
    """Takes encoded jobs in reading order and writes the arrays and tables of both splits."""

    def __init__(self, folder, cfg):
        self.cfg, self.documents, self.tokens, self.n_bytes, self.domains, self.full = cfg, 0, 0, 0, {}, False  # domains: {name: number}
        self.splits = {name: Split(folder, name, cfg.block_size + 1) for name in ("train", "val")}
        self.skipped, self.left_out = Counter(not_utf8=0, not_json=0, no_text=0, empty=0, lone_surrogate=0, not_tokenized=0), set()

    def add(self, documents, skipped, left_out):
        """What encode() gave for the next job; up to and with the document that reaches --limit_tokens."""
        self.skipped.update(skipped)
        self.left_out |= left_out
        for split, domain, source, record, tokens, n_bytes in documents:
            number = self.domains.setdefault(domain, len(self.domains))
            if number >= 1 << 16:
                raise ValueError(f"--domain_key={self.cfg.domain_key} has over {1 << 16} values: name a key with fewer")
            self.splits[split].add(number, tokens, (self.documents, domain, source.encode(errors="replace").decode(), record))
            self.documents, self.tokens, self.n_bytes = self.documents + 1, self.tokens + len(tokens), self.n_bytes + n_bytes
            self.full = 0 < self.cfg.limit_tokens <= self.tokens
            if self.full:
                break

    def finish(self):
        """Checks that there is something of everything asked for, ends the files, -> what meta.json holds."""
        cfg, chunks = self.cfg, {name: split.rows.n for name, split in self.splits.items()}
        have = sorted(self.left_out | set(self.domains))
        if missing := sorted(set(comma_list(cfg.domains)) - set(have)):
            raise ValueError(f"--domains: no document of {', '.join(map(repr, missing))}; there is {', '.join(have) or 'none'}")
        if not self.documents:
            raise ValueError(f"no document in {cfg.source or cfg.dataset} (skipped: {counts(self.skipped)}): see --source and --text_key")
        if not chunks["train"] or (cfg.val_fraction and not chunks["val"]):
            name, how = ("val", "raise") if chunks["train"] else ("train", "lower")
            cure = f"{how} --val_fraction={cfg.val_fraction}, lower --block_size={cfg.block_size}, or read more text"
            raise ValueError(f"{self.splits[name].tokens} tokens fill no chunk of {name}.npy: {cure}")
        sha256 = {}
        for name, split in self.splits.items():
            split.write_table()
            split.table.close()
            sha256 |= {f"{name}.npy": split.rows.close(), f"{name}_domain.npy": split.domain.close()}
        width, tok, by_domain = cfg.block_size + 1, data.TOKENIZERS[cfg.tokenizer], {domain: {} for domain in self.domains}
        for (domain, i), (name, split) in product(self.domains.items(), self.splits.items()):
            by_domain[domain][name] = dict(documents=split.documents[i], tokens=split.chunks[i] * width, chunks=split.chunks[i])
        meta = dict(schema=data.SCHEMA, tokenizer=cfg.tokenizer, vocab_size=tok.n_vocab, eot=tok.eot, block_size=cfg.block_size)
        meta |= dict(domains=list(self.domains), chunks=chunks, by_domain=by_domain, documents=self.documents, skipped=dict(self.skipped))
        meta["tokens"] = {name: n * width for name, n in chunks.items()}  # in the arrays, with <eot>
        meta["dropped_tokens"] = self.tokens - sum(chunks.values()) * width
        meta["dropped_documents"] = self.documents - sum(split.listed for split in self.splits.values())  # those with no token in a chunk
        # sha256: of each array's data, without its header
        return meta | dict(source=cfg.source or cfg.dataset, config=vars(cfg), sha256=sha256)


def counts(counter):
    return ", ".join(f"{n} {name}" for name, n in counter.items() if n) or "nothing"


# --- the run ------------------------------------------------------------------


def prepare(cfg):
    """Writes cfg.data_dir, or nothing where it is there already. Raises ValueError and OSError, and then leaves it as it was."""
    started, folder = time.perf_counter(), Path(cfg.data_dir).resolve()
    if is_prepared(folder, cfg):
        print(f"{cfg.data_dir} is already prepared; --overwrite prepares it again")
        return
    workers = cfg.workers or os.cpu_count()
    tqdm.monitor_interval = 0  # no thread of its own, which the workers would be forked beside
    bar = tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc="read", delay=1, disable=None)
    documents = open_source(cfg, bar)
    partial = folder.with_name(folder.name + ".partial")
    with claim(partial), bar:
        pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(cfg,))
        try:
            pool.submit(os.getpid)  # starts the workers now, while this process has no threads of other libraries
            packer = Packer(partial, cfg)
            for encoded in in_order(pool, jobs(documents), ahead=2 * workers + 1):
                packer.add(*encoded)
                bar.set_postfix_str(speed(packer, time.perf_counter() - started), refresh=False)
                if packer.full:
                    break
            meta = packer.finish()
            (partial / "meta.json").write_text(json.dumps(meta, indent=1))
            publish(partial, folder, cfg.overwrite)
        except BrokenProcessPool as e:
            raise ValueError(f"a worker process was killed, perhaps for want of memory: try --workers={max(1, workers // 2)}") from e
        finally:
            pool.shutdown(cancel_futures=True)
    report(cfg, meta, packer, time.perf_counter() - started)


def in_order(pool, jobs, ahead):
    """Jobs -> what encode() makes of them, in their order; at most `ahead` are waited for, so memory stays constant."""
    waiting = deque()
    for job in jobs:
        waiting.append(pool.submit(encode, job))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def is_prepared(folder, cfg):
    """Whether `folder` is what this configuration makes. Raises ValueError where it is anything else."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "meta.json").is_file():
        raise ValueError(f"{cfg.data_dir} holds files that this program did not write: write another --data_dir")
    if cfg.overwrite:
        return False
    was, now = data.open_dataset(folder).meta["config"], vars(cfg)
    differ = [key for key in now if key not in ("data_dir", "workers", "overwrite") and was.get(key) != now[key]]
    if differ:
        had = " ".join(f"--{key}={was.get(key)}" for key in differ)
        raise ValueError(f"{cfg.data_dir} was prepared with {had}: add --overwrite to replace it, or write another --data_dir")
    return True


@contextlib.contextmanager
def claim(partial):
    """Makes `partial` ours and empty; an error takes it away again. A second run is refused, however the first one ends."""
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by the workers
        except BlockingIOError as e:
            raise ValueError(f"another prepare_pile.py is writing {partial}: wait for it, or write another --data_dir") from e
        if found := [path for path in partial.iterdir() if path.name != "lock"]:
            print(f"found {partial} of a run that was interrupted: starting over")
        for path in found:
            path.unlink()
        try:
            yield
        except (ValueError, OSError):
            shutil.rmtree(partial, ignore_errors=True)
            raise


def publish(partial, folder, overwrite):
    """The whole new folder takes its name; an old one is deleted after that."""
    for path in [*partial.iterdir(), partial]:
        sync(path)
    old = overwrite and folder.exists() and folder.rename(tempfile.mkdtemp(prefix=folder.name + ".old-", dir=folder.parent))
    partial.rename(folder)  # refused where somebody else has put a folder meanwhile
    sync(folder.parent)
    (folder / "lock").unlink()
    if old:
        shutil.rmtree(old)


def sync(path):
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def speed(packer, seconds):
    megabytes = packer.n_bytes / 1e6
    return f"{megabytes:,.1f} MB of text, {packer.tokens:,} tokens: {megabytes / seconds:.1f} MB/s, {packer.tokens / seconds:,.0f} tokens/s"


def report(cfg, meta, packer, seconds):
    width = max(map(len, ["domain", *meta["domains"]]))
    print(f"{'domain':<{width}} {'documents':>10} {'train chunks':>13} {'val chunks':>11} {'tokens':>14} {'share':>6}")
    for domain, of in meta["by_domain"].items():
        documents, tokens = (of["train"][key] + of["val"][key] for key in ("documents", "tokens"))
        chunks = f"{of['train']['chunks']:>13,} {of['val']['chunks']:>11,}"
        print(f"{domain:<{width}} {documents:>10,} {chunks} {tokens:>14,} {tokens / sum(meta['tokens'].values()):>6.1%}")
    print(f"{meta['documents']:,} documents in {seconds:.1f} s, {speed(packer, seconds)}")
    print(f"dropped at the ends of domains: {meta['dropped_tokens']:,} tokens, {meta['dropped_documents']:,} whole documents")
    print(f"skipped: {counts(meta['skipped'])}\n\nnext: python train.py --data_dir={cfg.data_dir}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the way out of Ctrl-C: the workers go too
    config.main(lambda: prepare(config.load(Config)))
