"""The documents of one file as tokens, read and tokenized as prepare_pile.py does it."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from pile.documents import file_documents, jobs
from pile.encode import Encoder
from pile.tokenizers import token_type


@dataclass
class Reading:
    """The options of prepare_pile.py that say how a file is read."""

    text_key: str
    domain_key: str
    max_document_mb: int
    source: str = ""  # a file
    domains: str = ""  # all
    val_fraction: float = 0.0
    prompt_key: str = ""  # with answer_key: the records are pairs, of block_size tokens at most
    answer_key: str = ""
    block_size: int = 0


def file_tokens(name, reading, tokenizer):
    """A file -> [(its tokens (n,), with <eot> at their end, and where in them the answer of
    a pair begins)] of its documents, and a Counter {reason: records that were skipped}.

    Raises UserError where the file is damaged or not what its name says, and OSError."""
    encoder = Encoder(reading, tokenizer)
    documents = []
    skipped = Counter()
    for job in jobs(file_documents(name, reading)):
        rows, notes = encoder(job)
        for row in rows:
            _, _, _, _, tokens, answer = row
            documents.append((np.frombuffer(tokens, token_type(tokenizer.n_vocab)), answer))
        for _, key, number in notes:
            if key[0] == "skipped":
                skipped[key[1]] += number
    return documents, skipped
