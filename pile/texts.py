"""The documents of one file as tokens, read and tokenized as prepare_pile.py does it."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from pile.documents import file_documents, jobs
from pile.encode import Encoder


@dataclass
class Reading:
    """The options of prepare_pile.py that say how a file is read."""

    text_key: str
    domain_key: str
    max_document_mb: int
    source: str = ""  # a file
    domains: str = ""  # all
    val_fraction: float = 0.0


def file_tokens(name, reading, tokenizer):
    """A file -> its documents' tokens, uint16 (n,), with <eot> after each document, and a Counter
    {reason: records that were skipped}.

    Raises UserError where the file is damaged or not what its name says, and OSError."""
    encoder = Encoder(reading, tokenizer)
    tokens = []
    skipped = Counter()
    for job in jobs(file_documents(name, reading)):
        rows, notes = encoder(job)
        for row in rows:
            tokens.append(np.frombuffer(row[-1], np.uint16))
        for _, key, number in notes:
            if key[0] == "skipped":
                skipped[key[1]] += number
    return np.concatenate([*tokens, np.empty(0, np.uint16)]), skipped
