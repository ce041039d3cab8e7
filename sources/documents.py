"""Where documents come from: files, the hub, the text this Python installation carries.

A document is (source, record, domain or None, text), where text is a str, or bytes not looked at yet, or a list of lines of JSON (the record is
the first of them): what a worker can do is left to the workers, who open it up with `records`. cfg: prepare_pile.Config.
"""

import ast
import glob
import hashlib
import io
import json
import logging
import os
import re
import sys
import sysconfig
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from sources.tokenizers import tokenizer
from system.errors import UserError
from system.terminal import progress

MB = 1 << 20
TXT = 64 << 10  # a .txt is one document; one longer than this is several, cut at ends of lines
CODE = "Python code"  # of --source=python: its docstrings become a domain of their own
ZIPPED = {"": None, ".gz": "gzip", ".zst": "zstd"}


def open_source(cfg):
    """-> the names of its files, and a function: name -> documents. Raises ValueError where there is nothing to read."""
    if cfg.source == "python":
        return ["python"], lambda name: installed_text()
    if cfg.source:
        return find_files(cfg.source), lambda name: file_documents(name, cfg)
    return open_hub(cfg)


def suffixes(name):
    """A file's name -> (kind, compression), as (".jsonl", ".zst"); ("", "") for a kind that cannot be read."""
    found = re.search(r"(\.jsonl?|\.txt)(\.gz|\.zst|)$|(\.parquet)()$", name)
    return (found[1] or found[3], found[2] or "") if found else ("", "")


def find_files(source):
    """A file, a folder or a glob -> sorted names."""
    path = Path(source)
    paths = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else map(Path, sorted(glob.glob(source, recursive=True)))
    paths = [p for p in paths if p.is_file() and (suffixes(p.name)[0] or not path.is_dir())]
    strange = [p for p in paths if not suffixes(p.name)[0]]
    if strange or not paths:
        what = f"cannot read {strange[0]}" if strange else f"{source}: nothing to read there"
        raise UserError(f"--source {what}: it reads .parquet, .jsonl, .json and .txt, the last three also .gz or .zst; --source=python needs no file")
    return list(map(str, paths))


def file_documents(name, cfg, domain=None, opener=open):
    """The documents of one file; domain: of those that have none themselves, where it is not to be the file's name."""
    (kind, zipped), size, record = suffixes(name), os.path.getsize(name) if os.path.isfile(name) else None, 0
    bar = progress(desc=Path(name).name, total=size, unit="B", unit_scale=True, delay=1)
    # the bar is not put around the file: pyarrow asks that for `closed` and swallows the Ctrl-C that comes while Python answers
    with opener(name, "rb") as raw, bar:
        try:
            if kind == ".parquet":
                yield from parquet_documents(raw, name, cfg, domain, bar)
                return
            stream, txt = io.BufferedReader(pa.input_stream(raw, ZIPPED[zipped]), MB), kind == ".txt"
            domain = Path(name).resolve().parent.name if txt else domain
            while lines := stream.readlines(TXT if txt else MB):
                if not txt and not record and lines[0].lstrip().startswith(b"["):
                    raise UserError(f"{name} is one JSON array: write a record a line, as `jq -c '.[]' {name} > {Path(name).stem}.jsonl` does")
                yield name, record, domain, b"".join(lines) if txt else lines
                bar.update(raw.tell() - bar.n)
                record += 1 if txt else len(lines)
        except (OSError, pa.ArrowException) as e:
            raise UserError(f"{name} is damaged or cut short ({str(e).partition(chr(10))[0]}): fetch it again") from e


def parquet_documents(raw, name, cfg, default, bar):
    def column(batch, key):
        """A list of bytes, so that one text that is not UTF-8 spoils no other; None where there is no such column."""
        try:
            array = pa.compute.struct_field(batch.to_struct_array(), key.split("."))
        except pa.ArrowInvalid:
            return None
        return array.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()

    file, record = pa.parquet.ParquetFile(raw), 0
    for batch in file.iter_batches(batch_size=256, columns=[cfg.text_key, cfg.domain_key]):
        texts = column(batch, cfg.text_key)
        if texts is None:
            raise UserError(f"{name} has no column {cfg.text_key!r}: write --text_key=<one of {', '.join(file.schema_arrow.names)}>")
        for text, domain in zip(texts, column(batch, cfg.domain_key) or [None] * len(texts)):
            yield name, record, domain or default, text
            record += 1
        bar.update((bar.total or 0) * len(texts) / file.metadata.num_rows)


def open_hub(cfg):
    """A dataset the datasets library knows. JSON is not left to it: it stops where `meta` gains a key or a line is no JSON. Other kinds: one file."""
    import datasets
    from datasets.utils.file_utils import xopen

    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)  # every retry would be a line
    try:
        names = list((datasets.load_dataset_builder(cfg.dataset).config.data_files or {}).get("train", []))
        if names and all(suffixes(name)[0] in (".json", ".jsonl", ".parquet") for name in names):
            return names, lambda name: file_documents(name, cfg, Path(cfg.dataset).name, xopen)
        stream = datasets.load_dataset(cfg.dataset, split="train", streaming=True)
    except (OSError, ValueError) as e:
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"--dataset={cfg.dataset}: {why}; type --source=python for text that needs no network, or --source=PATH") from e
    return [cfg.dataset], lambda name: ((name, i, lookup(record, cfg.domain_key), lookup(record, cfg.text_key)) for i, record in enumerate(stream))


def installed_text():
    """What every Python installation carries -> documents, in an order that mixes the domains and is always the same."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    modules = [p for name in sys.stdlib_module_names for p in (library / f"{name}.py", *(library / name).rglob("*.py")) if p.is_file()]
    found = [(str(p), 0, CODE, p.read_bytes()) for p in modules if not {"pydoc_data", "test", "tests", "idle_test"} & set(p.parts)]
    found += [(f"pydoc_data.topics:{name}", 0, "Topics", text) for name, text in topics.items()]
    paths = {p for folder in sys.path for p in Path(folder).glob("*.dist-info/**/*")} | set(library.iterdir())
    licences = [p for p in sorted(paths) if p.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")) and p.is_file()]
    found += {text: (str(p), 0, "Licences", text) for p in licences for text in [p.read_bytes()]}.values()
    readmes = {d.metadata["Name"]: d.metadata.get("Description", "") for d in metadata.distributions()}
    found += [(f"readme:{name}", 0, "Readmes", text) for name, text in readmes.items()]
    # by the end of the path, which is the same wherever Python is installed
    return iter(sorted(found, key=lambda document: hashlib.blake2b("/".join(document[0].split("/")[-3:]).encode(errors="replace")).digest()))


def jobs(documents):
    """Documents -> lists of them, of 128 KB of text or more."""
    job, size = [], 0
    for document in documents:
        job.append(document)
        size += sum(map(len, document[3])) if isinstance(document[3], list) else len(document[3] or "")
        if size >= MB >> 3:
            yield job
            job, size = [], 0
    yield job


# --- in a worker: a job -> documents in tokens ------------------------------------


def worker(cfg):
    global CFG, TOKENIZER
    CFG, TOKENIZER = cfg, tokenizer(cfg.tokenizer)
    return encode


def encode(job):
    """A list of documents -> rows of a part, and what was counted: [(split, domain, source, record, tokens as bytes, with <eot>)], Counter."""
    wanted, documents, held = CFG.wanted(), [], Counter()
    for source, record, domain, text in records(job, CFG, held):
        try:
            text, domain = (x.decode() if isinstance(x, bytes) else x for x in (text, domain))
            domain = Path(source).name.removesuffix("".join(suffixes(source))) if domain in (None, "") else str(domain)
            if wanted and domain not in wanted:
                held["left out", domain] += 1
            elif not isinstance(text, str) or not text or text.isspace():
                held["skipped", "empty" if isinstance(text, str) else "no_text"] += 1
            else:
                utf8, _ = text.encode(), domain.encode()
                hashed = int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest(), "big") / 2**64
                split, source = "val" if hashed < CFG.val_fraction else "train", source.encode(errors="replace").decode()
                documents.append((split, domain, source, record, np.append(TOKENIZER.encode(text), np.uint16(TOKENIZER.eot)).tobytes()))
        except ValueError as e:
            held["skipped", {UnicodeDecodeError: "not_utf8", UnicodeEncodeError: "lone_surrogate"}.get(type(e), "not_tokenized")] += 1
    return documents, held


def records(job, cfg, held):
    """A job's documents, the lines and the Python code among them opened up; counts the lines that are no JSON."""
    for source, first, domain, text in job:
        if cfg.source == "python" and domain == CODE:
            yield from ((source, first, *part) for part in zip((CODE, "Docstrings"), cut_docstrings(text)))
        elif not isinstance(text, list):
            yield source, first, domain, text
        else:
            for number, line in enumerate(text, first):
                if line.isspace():
                    continue
                try:
                    record = json.loads(line.decode())
                except (ValueError, RecursionError) as e:
                    held["skipped", "not_utf8" if isinstance(e, UnicodeDecodeError) else "not_json"] += 1
                else:
                    found = lookup(record, cfg.domain_key)
                    yield source, number, domain if found in (None, "") else found, lookup(record, cfg.text_key)


def lookup(record, key):
    for name in key.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record


def cut_docstrings(source):
    """A Python file's bytes -> its lines without those of docstrings, as bytes, and the docstrings, one text."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source, ""
    lines, docstrings = source.splitlines(keepends=True), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
            docstrings.append(text)
            for i in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                lines[i] = b""
    return b"".join(lines), "\n\n".join(docstrings)
