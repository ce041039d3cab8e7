"""What curate.py drops, as people read it: where each document or chunk came from, and how its text
begins."""

import itertools
import json
import math
from pathlib import Path

import numpy as np

from show.documents import Documents, text_of
from system.errors import UserError
from system.files import atomic
from system.terminal import progress, shorten

BEGINNING = 200  # characters of a text
BYTES_A_CHARACTER = 4  # at most; a token of any tokenizer is a byte or more
AT_ONCE = 1 << 16  # units whose sources are in memory at a time


def first_rows(run, units, dropped, n):
    """The first n dropped units as dropped_rows() has them. Chunks come without a source, for that
    takes the table of documents."""
    if units.pieces is not None:
        return list(itertools.islice(dropped_rows(run, units, dropped[:n]), n))
    found = []
    for chunk, domain in zip(units.numbers[dropped[:n]].tolist(), units.domains[dropped[:n]]):
        text = run.text(chunk, BEGINNING)
        found.append({"chunk": chunk, "domain": run.domains[domain], "text": text})
    return found


def dropped_rows(run, units, dropped):
    """Yields a dict for each dropped unit, in their order: chunk (where the units are chunks),
    document, source, record, domain, text (its beginning).

    units: of show/scores.py. dropped: int64 (n,), which of them. A chunk has the document that
    holds most of it. Raises UserError where the table of documents is missing or damaged.
    """
    documents = Documents(run)
    for start in range(0, len(dropped), AT_ONCE):
        some = dropped[start : start + AT_ONCE]
        if units.pieces is None:
            yield from chunk_rows(documents, units, some)
        else:
            yield from document_rows(documents, units, some)


def chunk_rows(documents, units, dropped):
    run = documents.run
    sources = sources_of_chunks(documents, units.numbers[dropped])
    for unit in dropped.tolist():
        chunk = int(units.numbers[unit])
        domain = run.domains[units.domains[unit]]
        text = run.text(chunk, BEGINNING)
        yield {"chunk": chunk, **sources[chunk], "domain": domain, "text": text}


def document_rows(documents, units, dropped):
    run = documents.run
    sources = sources_of_documents(documents, dropped)
    for unit in dropped.tolist():
        domain = run.domains[units.domains[unit]]
        yield {**sources[unit], "domain": domain, "text": beginning(run, units.pieces, unit)}


def beginning(run, pieces, document):
    """How the text of a document begins, given by its row in the table."""
    first, end = np.searchsorted(pieces.document, (document, document + 1))
    tokens = np.cumsum(pieces.tokens[first:end])
    enough = first + 1 + int(np.searchsorted(tokens, BYTES_A_CHARACTER * BEGINNING))
    return shorten(text_of(run, pieces, range(first, min(enough, end))), BEGINNING)


def sources_of_documents(documents, numbers):
    """Rows of the table of documents, int64 (n,) -> {row: {document, source, record}}."""
    numbers = np.sort(numbers)
    found = {}
    rows_before = 0
    for i in range(documents.file.num_row_groups):
        rows_after = rows_before + documents.file.metadata.row_group(i).num_rows
        first, end = np.searchsorted(numbers, (rows_before, rows_after))
        for row in numbers[first:end].tolist():
            found[row] = source_of(documents.group(i), row - rows_before)
        rows_before = rows_after
    return found


def sources_of_chunks(documents, chunks):
    """Chunks, int64 (n,) -> {chunk: {document, source, record}} of the document that holds most of
    it."""
    is_asked = np.zeros(len(documents.run.values), bool)
    is_asked[chunks] = True
    most = np.zeros(len(is_asked), int)  # tokens of a chunk that one document holds
    found = {}
    for columns, pieces in documents.pieces():
        tokens = pieces.tokens
        for entry in np.flatnonzero(is_asked[pieces.chunk]):
            chunk = int(pieces.chunk[entry])
            if tokens[entry] > most[chunk]:
                most[chunk] = tokens[entry]
                found[chunk] = source_of(columns, pieces.document[entry])
    return found


def source_of(columns, row):
    return {
        "document": int(columns["doc"][row]),
        "source": str(columns["source"][row]),
        "record": int(columns["record"][row]),
    }


# --- the list -----------------------------------------------------------------------


def check_list(path):
    """Raises UserError where write_list cannot write."""
    path = Path(path)
    if path.suffix != ".jsonl" or not path.parent.is_dir():
        raise UserError(f"--list={path}: write the name of a .jsonl file, in a folder that exists")


def write_list(path, described, score, error):
    """Writes a line of JSON for each row, with its score and standard_error (null: not known).

    described: of dropped_rows(). score, error: float64 (n,), in the same order.
    """
    described = progress(described, "list", unit="row", delay=1, total=len(score))
    with atomic(path) as file:
        for row, own_score, own_error in zip(described, score.tolist(), error.tolist()):
            known_error = None if math.isnan(own_error) else own_error
            text = row.pop("text")
            row.update(score=own_score, standard_error=known_error, text=text)
            file.write((json.dumps(row) + "\n").encode())
