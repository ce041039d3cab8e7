"""Documents -> tokens: the work of a worker process."""

import hashlib

import numpy as np

from pile.domains import Wanted, domain_of, printable
from pile.records import Pair, Skipped, is_text, opened
from pile.tokenizers import tokenizer


class Skip(Exception):
    """Raised for records that become no document. key: what they are counted as."""

    def __init__(self, *key, number=1):
        self.key = key
        self.number = number


class Encoder:
    """Makes rows of documents, by prepare_pile.py's options."""

    def __init__(self, cfg, tokenizer):
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.wanted = Wanted(cfg.domains)

    def __call__(self, job):
        """Documents -> rows and notes.

        rows: [(split, domain, source, record, tokens as bytes, with <eot>, answer)]. answer: the
        token with which the answer of a pair begins; 0 of a text.
        notes: [(number of rows before it, what is counted, how many)]. They count records that
        became no row, and rows that have their file's name as their domain."""
        rows = []
        notes = []
        for document in opened(job, self.cfg):
            try:
                row, default_reason = self.row(document)
            except Skip as e:
                notes.append((len(rows), e.key, e.number))
                continue
            if default_reason:
                notes.append((len(rows), default_reason, 1))
            rows.append(row)
        return rows, notes

    def row(self, document):
        """Returns a document's row, and why its domain is a default, or "". Raises Skip."""
        text = document.text
        if isinstance(text, Skipped):
            raise Skip("skipped", text.why, number=text.number)
        try:
            text = text.decode() if isinstance(text, bytes) else text
            domain, default_reason = domain_of(document)
        except UnicodeDecodeError as e:
            raise Skip("skipped", "not_utf8") from e
        if not self.wanted.has(domain):
            raise Skip("left out", domain)
        if not is_text(text):
            raise Skip("skipped", "no_text")
        is_pair = isinstance(text, Pair)
        learned = text.answer if is_pair else text
        if not learned or learned.isspace():
            raise Skip("skipped", "no_answer" if is_pair else "empty")
        try:
            split = self.split(text.prompt + text.answer if is_pair else text)
            domain.encode()
        except UnicodeEncodeError as e:
            raise Skip("skipped", "lone_surrogate") from e
        try:
            tokens, answer = self.pair(text) if is_pair else (self.tokenizer.encode(text), 0)
        except ValueError as e:
            raise Skip("skipped", "not_tokenized") from e
        tokens = np.append(tokens, tokens.dtype.type(self.tokenizer.eot))
        if is_pair and len(tokens) > self.cfg.block_size + 1:
            raise Skip("skipped", "too_many_tokens")
        source = printable(document.source)
        return (split, domain, source, document.record, tokens.tobytes(), answer), default_reason

    def pair(self, text):
        """A Pair -> its tokens behind an <eot>, and the number of that with which its answer
        begins. Raises ValueError where it cannot be tokenized."""
        prompt = self.tokenizer.encode(text.prompt)
        eot = np.array([self.tokenizer.eot], prompt.dtype)
        answer = self.tokenizer.encode(text.answer)
        return np.concatenate([eot, prompt, answer]), 1 + len(prompt)

    def split(self, text):
        """ "train" or "val", by the hash of a text. Raises UnicodeEncodeError."""
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        share = int.from_bytes(digest, "big") / 2**64
        return "val" if share < self.cfg.val_fraction else "train"


def worker(cfg):
    """Called once in each worker process: the function that it will apply to its jobs."""
    return Encoder(cfg, tokenizer(cfg.tokenizer))
