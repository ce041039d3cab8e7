"""What a worker does: documents -> tokens."""

import hashlib

import numpy as np

from pile.domains import Wanted, domain_of, printable
from pile.records import Skipped, opened
from pile.tokenizers import tokenizer


class Skip(Exception):
    """A record that becomes no document: what it is counted as, and how many there are."""

    def __init__(self, *key, number=1):
        self.key, self.number = key, number


class Encoder:
    """Makes rows of a part of documents, by prepare_pile.py's options."""

    def __init__(self, cfg, tokenizer):
        self.cfg, self.tokenizer = cfg, tokenizer
        self.wanted = Wanted(cfg.domains)

    def __call__(self, job):
        """Documents -> rows and notes.

        rows: [(split, domain, source, record, tokens as bytes, with <eot>)]. notes: [(how many rows
        stand before it, what is counted, how many)], of records that became no row and of rows
        under their file's name."""
        rows, notes = [], []
        for document in opened(job, self.cfg):
            try:
                row, why = self.row(document)
            except Skip as e:
                notes.append((len(rows), e.key, e.number))
                continue
            if why:
                notes.append((len(rows), why, 1))
            rows.append(row)
        return rows, notes

    def row(self, document):
        """A document -> its row, and why its domain is not its own, or "". Raises Skip."""
        text = document.text
        if isinstance(text, Skipped):
            raise Skip("skipped", text.why, number=text.number)
        try:
            text = text.decode() if isinstance(text, bytes) else text
            domain, why = domain_of(document)
        except UnicodeDecodeError as e:
            raise Skip("skipped", "not_utf8") from e
        if not self.wanted.has(domain):
            raise Skip("left out", domain)
        if not isinstance(text, str):
            raise Skip("skipped", "no_text")
        if not text or text.isspace():
            raise Skip("skipped", "empty")
        try:
            split = self.split(text)
            domain.encode()
        except UnicodeEncodeError as e:
            raise Skip("skipped", "lone_surrogate") from e
        try:
            tokens = self.tokenizer.encode(text)
        except ValueError as e:
            raise Skip("skipped", "not_tokenized") from e
        tokens = np.append(tokens, np.uint16(self.tokenizer.eot)).tobytes()
        return (split, domain, printable(document.source), document.record, tokens), why

    def split(self, text):
        """ "train" or "val", by the hash of a text. Raises UnicodeEncodeError."""
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        share = int.from_bytes(digest, "big") / 2**64
        return "val" if share < self.cfg.val_fraction else "train"


def worker(cfg):
    """In a worker, once: what it will apply to its jobs."""
    return Encoder(cfg, tokenizer(cfg.tokenizer))
