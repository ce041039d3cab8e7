"""What a run's visits say of each chunk, or of each document: how many there were, and the sum and
the sum of squares of what each of them brought."""

from dataclasses import dataclass

import numpy as np

from show.documents import Documents, Pieces, trained_tokens
from system import store

TINY = np.finfo("f4").tiny


@dataclass
class Units:
    """What is kept or dropped: all chunks, or all documents. Arrays (n,)."""

    numbers: np.ndarray  # int64: the chunks' or the documents' own
    domains: np.ndarray  # int: which of the run's domains each is of
    visits: np.ndarray  # float64: how many there were
    total: np.ndarray  # float64: the sum of what the visits brought
    squares: np.ndarray  # float64: the sum of its squares
    pieces: Pieces | None = None  # of documents: the chunks they lie in; their rows are these


def chunk_scores(run, k, score):
    """Units of a run's chunks.

    k: a target's number. score: "value", what a visit brings is its value in nats; "share", its
    value relative to the mean absolute value of its step; "smoothed", the same of its smoothed
    score; "loss", minus its loss. Raises UserError where a run has no smoothed scores.
    """
    if score == "smoothed":
        run.check_smoothed()
    column = "smoothed" if score == "smoothed" else "value"
    n_chunks = len(run.values)
    count, total, squares = np.zeros((3, n_chunks))
    for visits in run.counted():
        if score == "loss":
            gains = -visits["loss"].astype(float)
        else:
            gains = visits[column][:, k].astype(float)
        if score in ("share", "smoothed"):
            steps = gains.reshape(-1, run.info["batch"])
            n_visits = store.visits_of_steps(visits, run.info["batch"])[:, None]
            size = np.abs(steps).sum(1, keepdims=True) / n_visits
            gains = (steps / np.maximum(size, TINY)).ravel()
        gains = gains[visits["chunk"] != store.NO_CHUNK]
        chunk = store.filled(visits)["chunk"]
        np.add.at(count, chunk, 1)
        np.add.at(total, chunk, gains)
        np.add.at(squares, chunk, gains**2)
    domains = np.asarray(run.data.train.domain)
    return Units(np.arange(n_chunks), domains, count, total, squares)


def document_scores(run, chunks):
    """Units of a run's documents, of those of its chunks: what a visit of a chunk brings a document
    is in proportion to the chunk's tokens that are the document's."""
    number_of = {name: d for d, name in enumerate(run.domains)}
    numbers, domains, moments, places = [], [], [], []
    rows_before = 0
    for columns, pieces in Documents(run).pieces():
        n = len(columns["doc"])
        tokens, share = trained_tokens(run, pieces)
        visits = np.bincount(pieces.document, chunks.visits[pieces.chunk] * (tokens > 0), n)
        total = np.bincount(pieces.document, chunks.total[pieces.chunk] * share, n)
        squares = np.bincount(pieces.document, chunks.squares[pieces.chunk] * share**2, n)
        moments.append(np.stack([visits, total, squares]))
        document = pieces.document + rows_before
        places.append(np.stack([document, pieces.chunk, pieces.begin, pieces.end]))
        numbers.append(columns["doc"])
        domains.append(np.array([number_of[name] for name in columns["domain"]], int))
        rows_before += n
    visits, total, squares = np.concatenate(moments, axis=1)
    pieces = Pieces(*np.concatenate(places, axis=1))
    return Units(
        np.concatenate(numbers), np.concatenate(domains), visits, total, squares, pieces=pieces
    )


def score_and_error(units, summed):
    """The score of each unit and its standard error, float64 (n,): the sum over its visits, or
    their mean. NaN: there is no error of a single visit, and no mean of none."""
    count = units.visits
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = units.total / count
        variance = np.maximum(units.squares / count - mean**2, 0)
        error = np.sqrt(variance / np.where(count > 1, count - 1, np.nan))
        return (units.total, error * count) if summed else (mean, error)
