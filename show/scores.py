"""What a run's visits say of each chunk, or of each document: how many there were, and the sum and the sum of squares of what they brought."""

import numpy as np

from show.documents import Documents


def chunk_scores(run, k, score):
    """Over the visits of each chunk: how many, the sum and the sum of squares of what they bring, three float64 (n_chunks,)."""
    count, total, squares = np.zeros((3, len(run.values)))
    for visits in run.parts():
        each = (
            -visits["loss"].astype(float)
            if score == "loss"
            else visits["value"][:, k].astype(float)
        )
        if score == "share":
            steps = each.reshape(-1, run.info["batch"])
            each = (
                steps / np.maximum(np.abs(steps).mean(1, keepdims=True), np.finfo("f4").tiny)
            ).ravel()
        for of, x in ((count, 1), (total, each), (squares, each**2)):
            np.add.at(of, visits["chunk"], x)
    return count, total, squares


def document_scores(run, moments):
    """The same of documents (D,), each visit of a chunk by the document's part of its tokens; the documents' numbers and domains (D,); and
    where they lie: int64 (m,) of document (0 to D - 1), chunk, tokens."""
    found, about, lie, number = [], [], [], {name: d for d, name in enumerate(run.domains)}
    for columns, document, chunk, begin, end in Documents(run).pieces():
        part = (end - begin) / run.data.train.rows.shape[1]
        found.append(
            [
                np.bincount(document, of[chunk] * part**power, len(columns["doc"]))
                for power, of in enumerate(moments)
            ]
        )
        lie.append([document + sum(len(doc) for doc, _ in about), chunk, end - begin])
        about.append([columns["doc"], [number[name] for name in columns["domain"]]])
    return np.concatenate(found, 1), *np.concatenate(about, 1), np.concatenate(lie, 1)


def score_and_error(count, total, squares, summed):
    """The sum over the visits, or their mean, and its standard error: NaN of a single visit."""
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
        error = np.sqrt(
            np.maximum(squares / count - mean**2, 0) / np.where(count > 1, count - 1, np.nan)
        )
    return (total, error * count) if summed else (mean, error)
