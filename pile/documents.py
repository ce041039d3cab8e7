"""Reads documents: from files, from the hub, or from the text that Python comes with.

cfg is a prepare_pile.Config everywhere. This process only cuts files into lines and rows; the
workers look into the records (pile/records.py).
"""

import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
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
TXT = 64 << 10  # bytes; a longer .txt becomes several documents, cut at ends of lines
HEAD = 100  # bytes that are kept of a line that is too long, to see what it is
JOB = MB >> 3  # bytes of text in a worker's job, at the least
OVERHEAD = 32  # bytes that a document counts for beside its text


@dataclass
class Source:
    names: list  # of its files
    read: Callable  # a file's name -> its documents
    left_out: dict = field(default_factory=dict)  # of a folder: FileList.summary()
    opener: Callable = open  # of its files


def find_source(cfg, ours=()):
    """The Source that --source names. ours: folders that this program writes, which are not read.

    Raises UserError where there is nothing to read."""
    if cfg.source == "python":
        return Source(["python"], lambda name: installed_text())
    if not cfg.source:
        return find_on_hub(cfg)
    listing = find_files(cfg.source, cfg.follow_links, ours)
    return Source(listing.names, partial(file_documents, cfg=cfg), listing.summary())


def open_source(cfg):
    """Returns the names of a source's files, and a function: a name -> its documents."""
    source = find_source(cfg)
    return source.names, source.read


def records(documents, cfg, counts):
    """Documents -> (file's name, record, domain or None, text as a str or bytes).

    counts: a Counter that gets the skipped records, under ("skipped", reason)."""
    for document in opened(documents, cfg):
        if isinstance(document.text, Skipped):
            counts["skipped", document.text.why] += document.text.number
        else:
            domain = document.domain or document.default or None
            yield document.source, document.record, domain, document.text


def file_documents(name, cfg, default="", opener=open):
    """The documents of one file, as a generator.

    default: the domain of documents without one; empty: the file's name. opener: open(), or its
    like for the hub. Raises UserError where the file is damaged, or is not what its name says."""
    kind, packed = suffixes(name)
    if cfg.answer_key and kind in (".parquet", ".txt"):
        what = f"{name}: pairs are read from .jsonl, .ndjson and .json files, packed or not"
        raise UserError(f"{what}: write it as one, or leave out --prompt_key and --answer_key")
    size = os.path.getsize(name) if os.path.isfile(name) else None
    label = Path(name).name
    # leave: below a bar over many files it vanishes at the file's end
    bar = progress(desc=label, total=size, unit="B", unit_scale=True, delay=1, leave=None)
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
    """Lines of JSON -> documents, each of which is Lines: about a megabyte of them."""
    record = 0
    only_blanks = True
    for content, n_lines in whole_lines(stream, cfg.max_document_mb * MB):
        if only_blanks:
            begin = content.lstrip()
            only_blanks = not begin
            if begin.startswith(b"["):
                refuse_array(name)
        text = Lines(content) if n_lines else Skipped("too_long")
        yield Document(name, record, None, text, default)
        record += n_lines or 1


def refuse_array(name):
    """Raises the UserError of a file that is one array instead of a record a line."""
    target = quoted(f"{stem(name)}.jsonl")
    cure = f"`jq -c '.[]' {quoted(str(name))} > {target}`"
    raise UserError(f"{name} is one JSON array: write a record a line, as {cure} does")


def text_documents(stream, name, cfg, default):
    """A plain text -> documents of about TXT bytes. Their domain is the name of its folder."""
    folder = os.path.dirname(os.path.abspath(name))
    domain = printable(os.path.basename(folder)) or default
    record = 0
    piece = bytearray()
    for content, n_lines in whole_lines(stream, cfg.max_document_mb * MB):
        if not n_lines:
            yield Document(name, record, domain, Skipped("too_long"))
            continue
        for line in io.BytesIO(content):
            piece += line
            if len(piece) > TXT:
                yield Document(name, record, domain, bytes(piece))
                record += 1
                piece = bytearray()
    if piece:
        yield Document(name, record, domain, bytes(piece))


def whole_lines(stream, longest):
    """A stream of bytes -> (whole lines, their number), about a megabyte at a time.

    A line of more than `longest` bytes is (its first HEAD bytes, 0): it is never in memory as a
    whole. longest: a megabyte or more. A byte order mark at the beginning is left out."""
    line = bytearray()  # the beginning of a line whose end is not read yet
    too_long = False  # whether it has more than `longest` bytes already
    block = stream.read(MB).removeprefix(BOM)
    while block:
        first_end = block.find(b"\n") + 1
        last_end = block.rfind(b"\n") + 1
        if first_end and (too_long or len(line) + first_end - 1 > longest):
            yield bytes(line[:HEAD]), 0
            line = bytearray()
            too_long = False
            block = block[first_end:] or stream.read(MB)
            continue
        if first_end:
            content = b"".join((line, block[:last_end]))
            line = bytearray(block[last_end:])
            yield content, content.count(b"\n")
        elif not too_long:
            line += block
        if len(line) > longest:
            line = line[:HEAD]
            too_long = True
        block = stream.read(MB)
    if too_long:
        yield bytes(line), 0
    elif line:
        yield bytes(line), 1


# --- the hub ------------------------------------------------------------------------


def find_on_hub(cfg):
    """The Source of --dataset, which the library `datasets` finds.

    Of JSON and parquet it gives only the files' names, and we read them: it stops where `meta`
    gains a key, or where a line is not JSON. A dataset of other files counts as one file, which
    the library reads. Raises UserError where there is no such dataset."""
    import datasets
    from datasets.utils.file_utils import xopen

    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)  # every retry would be a line
    try:
        builder = datasets.load_dataset_builder(cfg.dataset)
        files = builder.config.data_files or {}
        names = list(files.get("train", []))
        kinds = {suffixes(name)[0] for name in names}
        if kinds and kinds <= {".jsonl", ".ndjson", ".json", ".parquet"}:
            default = Path(cfg.dataset).name
            read = partial(file_documents, cfg=cfg, default=default, opener=xopen)
            return Source(names, read, opener=xopen)
        stream = datasets.load_dataset(cfg.dataset, split="train", streaming=True)
    except (OSError, ValueError) as e:
        cure = "type --source=python for text that needs no network, or --source=PATH"
        raise UserError(f"--dataset={cfg.dataset}: {short(e)}; {cure}") from e
    return Source([cfg.dataset], partial(hub_documents, stream=stream, cfg=cfg))


def hub_documents(name, stream, cfg):
    """The records of a stream of the datasets library -> documents."""
    for number, record in enumerate(stream):
        domain = lookup(record, cfg.domain_key)
        text = lookup(record, cfg.text_key)
        if isinstance(text, str) and len(text) > cfg.max_document_mb * MB:
            text = Skipped("too_long")
        yield Document(name, number, domain, text)


# --- for the workers ----------------------------------------------------------------


def jobs(documents):
    """Documents -> lists of them, of JOB bytes or more."""
    job = []
    size = 0
    for document in documents:
        job.append(document)
        size += OVERHEAD + size_of(document.text) + size_of(document.domain)
        if size >= JOB:
            yield job
            job = []
            size = 0
    yield job


def size_of(cell):
    """Characters or bytes of a text, open or closed; 0 for anything else."""
    if isinstance(cell, (Lines, Within)):
        cell = cell.content
    return len(cell) if isinstance(cell, (str, bytes)) else 0
