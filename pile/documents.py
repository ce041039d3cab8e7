"""Where documents come from: files, the hub, the text this Python installation carries.

cfg: prepare_pile.Config. What a file's records hold is left to the workers (pile/records.py).
"""

import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pile.domains import printable
from pile.files import find_files, stem, suffixes
from pile.installed import installed_text
from pile.parquet import parquet_documents
from pile.records import BOM, Document, Lines, Skipped, Within, lookup, opened
from pile.unpack import unpacked
from system.errors import UserError
from system.files import short
from system.terminal import progress, quoted

MB = 1 << 20
TXT = 64 << 10  # a .txt is one document; one longer than this is several, cut at ends of lines
HEAD = 100  # bytes of a line that is too long, for a look at what it is
JOB = MB >> 3  # bytes of text that a worker is given at a time, at the least
OVERHEAD = 32  # bytes that a document counts for beside its text


@dataclass
class Source:
    names: list  # of its files
    read: Callable  # name -> documents
    left_out: dict = field(default_factory=dict)  # of a folder: Found.summary()


def find_source(cfg, ours=()):
    """-> Source. ours: folders that this program writes. Raises UserError where there is nothing
    to read."""
    if cfg.source == "python":
        return Source(["python"], lambda name: installed_text())
    if not cfg.source:
        return find_on_hub(cfg)
    found = find_files(cfg.source, cfg.follow_links, ours)
    return Source(found.names, lambda name: file_documents(name, cfg), found.summary())


def open_source(cfg):
    """-> the names of a source's files, and a function: name -> documents."""
    source = find_source(cfg)
    return source.names, source.read


def records(documents, cfg, held):
    """Documents -> (file's name, record, domain or None, text as a str or bytes). held: a Counter
    of what is skipped."""
    for document in opened(documents, cfg):
        if isinstance(document.text, Skipped):
            held["skipped", document.text.why] += document.text.number
        else:
            domain = document.domain or document.default or None
            yield document.source, document.record, domain, document.text


def file_documents(name, cfg, default="", opener=open):
    """The documents of one file. default: the domain of those without one; empty: the file's
    name. Raises UserError where the file is none of its kind, or damaged."""
    kind, packed = suffixes(name)
    size = os.path.getsize(name) if os.path.isfile(name) else None
    label = Path(name).name
    bar = progress(desc=label, total=size, unit="B", unit_scale=True, delay=1)
    # the bar is not put around the file: pyarrow asks that for `closed` and swallows the Ctrl-C
    # that comes while Python answers
    with opener(name, "rb") as raw, bar:
        if kind == ".parquet":
            yield from parquet_documents(raw, name, cfg, default, bar)
            return
        stream = unpacked(raw, name, packed)
        read = text_documents if kind == ".txt" else line_documents
        for document in read(stream, name, cfg, default):
            yield document
            bar.update(raw.tell() - bar.n)


def line_documents(stream, name, cfg, default):
    """Lines of JSON -> documents, each of many lines."""
    record, nothing_yet = 0, True
    for content, number in whole_lines(stream, cfg.max_document_mb * MB):
        if nothing_yet:
            begin = content.lstrip()
            nothing_yet = not begin
            if begin.startswith(b"["):
                refuse_array(name)
        text = Lines(content) if number else Skipped("too_long")
        yield Document(name, record, None, text, default)
        record += number or 1


def refuse_array(name):
    target = quoted(f"{stem(name)}.jsonl")
    cure = f"`jq -c '.[]' {quoted(str(name))} > {target}`"
    raise UserError(f"{name} is one JSON array: write a record a line, as {cure} does")


def text_documents(stream, name, cfg, default):
    """A text -> documents of a domain that is called as the file's folder."""
    domain = printable(os.path.basename(os.path.dirname(os.path.abspath(name)))) or default
    record, piece = 0, bytearray()
    for content, number in whole_lines(stream, cfg.max_document_mb * MB):
        if not number:
            yield Document(name, record, domain, Skipped("too_long"))
            continue
        for line in io.BytesIO(content):
            piece += line
            if len(piece) > TXT:
                yield Document(name, record, domain, bytes(piece))
                record, piece = record + 1, bytearray()
    if piece:
        yield Document(name, record, domain, bytes(piece))


def whole_lines(stream, longest):
    """A stream of bytes -> (whole lines, how many) again and again, about a megabyte each; (its
    beginning, 0) for a line of more than `longest` bytes, which is never in memory as a whole.
    longest: a megabyte or more. A byte order mark at the beginning is no text: it is left out."""
    begun, dropped = bytearray(), False  # the line that has no end yet; whether it is too long
    block = stream.read(MB).removeprefix(BOM)
    while block:
        end, last = block.find(b"\n") + 1, block.rfind(b"\n") + 1
        if end and (dropped or len(begun) + end - 1 > longest):
            yield bytes(begun[:HEAD]), 0
            begun, dropped = bytearray(), False
            block = block[end:] or stream.read(MB)
            continue
        if end:
            content = b"".join((begun, block[:last]))
            begun = bytearray(block[last:])
            yield content, content.count(b"\n")
        elif not dropped:
            begun += block
        if len(begun) > longest:
            begun, dropped = begun[:HEAD], True
        block = stream.read(MB)
    if dropped:
        yield bytes(begun), 0
    elif begun:
        yield bytes(begun), 1


# --- the hub ------------------------------------------------------------------------


def find_on_hub(cfg):
    """A dataset that the datasets library knows. JSON is not left to it: it stops where `meta`
    gains a key or a line is no JSON. Other kinds are one file."""
    import datasets
    from datasets.utils.file_utils import xopen

    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)  # every retry would be a line
    try:
        builder = datasets.load_dataset_builder(cfg.dataset)
        names = list((builder.config.data_files or {}).get("train", []))
        kinds = {suffixes(name)[0] for name in names}
        if kinds and kinds <= {".jsonl", ".ndjson", ".json", ".parquet"}:
            default = Path(cfg.dataset).name
            return Source(names, lambda name: file_documents(name, cfg, default, xopen))
        stream = datasets.load_dataset(cfg.dataset, split="train", streaming=True)
    except (OSError, ValueError) as e:
        why = short(e)
        cure = "type --source=python for text that needs no network, or --source=PATH"
        raise UserError(f"--dataset={cfg.dataset}: {why}; {cure}") from e
    return Source([cfg.dataset], lambda name: hub_documents(stream, name, cfg))


def hub_documents(stream, name, cfg):
    """The records of a stream of the datasets library -> documents."""
    for number, record in enumerate(stream):
        domain, text = lookup(record, cfg.domain_key), lookup(record, cfg.text_key)
        if isinstance(text, str) and len(text) > cfg.max_document_mb * MB:
            text = Skipped("too_long")
        yield Document(name, number, domain, text)


# --- for the workers ----------------------------------------------------------------


def jobs(documents):
    """Documents -> lists of them, of JOB bytes or more."""
    job, size = [], 0
    for document in documents:
        job.append(document)
        size += OVERHEAD + size_of(document.text) + size_of(document.domain)
        if size >= JOB:
            yield job
            job, size = [], 0
    yield job


def size_of(cell):
    if isinstance(cell, (Lines, Within)):
        cell = cell.content
    return len(cell) if isinstance(cell, (str, bytes)) else 0
