"""Read a run's values: which chunks and documents helped, which hurt, and what they are worth.

python values.py summary out/demo                     what was valued, how far to trust its values
python values.py domains out/demo --csv               which domains helped, by their median chunks
python values.py top out/demo --domain=Licences       the best chunks, with text; or `bottom`
python values.py docs out/demo --bottom               the worst documents; without it the best
python values.py chunk out/demo 17                    one chunk: its text, documents, every visit
python values.py doc out/demo 203                     one document: its chunks, value, text
python values.py tokens out/demo --chunk=17           a chunk's value, token by token
python values.py losses out/control out/curated       validation losses of runs, side by side
python values.py compare out/demo out/other           the same data valued twice: who moved
python values.py export out/demo values.parquet       all of it as a table
python values.py query out/demo --text="To be"        chunks that helped to write this (approximate)

Values are in nats, positive where the chunk lowered the target's loss; tables show 1e-6 nats.
The run may still be under way.
--json gives all of it in full, as show/values.schema.json says; --csv the rows alone.
"""

from typing import Literal

import numpy as np

import config
from data import read_text
from show import commands, findings, hindsight, tables
from show.documents import Documents, text_of, trained_tokens
from show.exports import compare, export
from show.losses import common_steps, side_by_side
from show.run import open_run
from show.scores import chunk_scores, document_scores, score_and_error
from system import store
from system.errors import UserError

Score = Literal["share", "value", "smoothed"]

# The commands: functions of a run and options, which return plain dicts and lists; a float may be
# NaN. Their docstrings are the help.


def summary(run):
    """What was valued, how far the run is, and how far to trust its values: the books and the
    audit; of hindsight the check."""
    batch = run.info["batch"]
    targets = []
    for k, found in enumerate(findings.of_opened(run)):
        targets.append(
            {
                "target": found.target,
                **found.everything,
                "cautions": found.cautions,
                "finding": found.finding,
                "books": tables.booked(run.books, k),
                "audit": tables.audited(run.audit, k),
            }
        )
    return {
        "run": str(run.path),
        "steps": run.info["committed_step"],
        "max_iters": run.cfg["max_iters"],
        "finished": run.info["committed_step"] >= run.cfg["max_iters"],
        "rule": run.info["rule"],
        "sign": run.info["sign"],
        "unit": run.info["unit"],
        "batch": batch,
        "chunks": len(run.values),
        "chunks_used": len(run.used),
        "visits": int(np.count_nonzero(run.visits["chunk"] != store.NO_CHUNK)),
        "approximate": run.info.get("approximate"),
        "early_steps": int(np.count_nonzero(run.visits["early"][::batch])),
        "passes": tables.count_passes(run.books),
        "horizon": run.horizon,
        "hindsight": hindsight.read(run),
        "targets": targets,
    }


def domains(run, score: Literal["value", "smoothed"] = "value"):
    """By target and domain: the median value of the chunks used, how sure it is, the share of the
    steps' values, and after these the mean and the sum, which one chunk can turn round. With
    --score=smoothed all of it of the smoothed scores."""
    targets, rows = [], []
    for found in findings.of_opened(run, score):
        targets.append(
            {
                "target": found.target,
                **found.everything,
                "cautions": found.cautions,
                "finding": found.finding,
            }
        )
        for row in found.domains:
            tokens = row["chunks"] * run.width
            rows.append({"target": found.target, **row, "tokens": tokens})
    return {
        "run": str(run.path),
        "unit": run.info["unit"],
        "approximate": run.info.get("approximate"),
        "horizon": run.horizon,
        "score": score,
        "targets": targets,
        "domains": rows,
    }


def top(run, n=10, target="", domain="", score: Score = "share", chars=200, bottom=False):
    """The chunks that helped a target most, with their text: by their share of their steps' values,
    in which every step counts the same, by value, which a single large step can decide, or by their
    smoothed score, of a run that has it (train.py --target_smoothing)."""
    k = run.target(target)
    candidates = run.used
    if domain:
        candidates = candidates[run.data.train.domain[candidates] == run.domain(domain)]
    shares, _ = score_and_error(chunk_scores(run, k, "share"), summed=False)
    scores = {"share": shares, "value": run.values[:, k]}
    if score == "smoothed":
        scores["smoothed"], _ = score_and_error(chunk_scores(run, k, "smoothed"), summed=False)
    by = scores[score][candidates]
    order = np.argsort(by if bottom else -by, kind="stable")
    chosen = candidates[order[:n]]
    visits = run.visits_of(chosen)
    documents = Documents(run)
    rows = []
    for rank, chunk in enumerate(chosen.tolist(), 1):
        chunk_visits = visits[visits["chunk"] == chunk]
        rows.append(
            {
                "rank": rank,
                "chunk": chunk,
                **{name: float(figures[chunk]) for name, figures in scores.items()},
                "domain": run.domain_of(chunk),
                "visits": len(chunk_visits),
                "first_step": int(chunk_visits["step"].min()),
                "loss": float(chunk_visits["loss"].mean(dtype=float)),
                "text": run.text(chunk, chars),
                "documents": documents.of_chunk(chunk),
            }
        )
    return {**ranking(run, k, score, bottom), "chunks": rows}


def ranking(run, k, score, bottom):
    """What top() and docs() say of their order, as entries of their dicts."""
    return {
        "run": str(run.path),
        "target": run.names[k],
        "unit": run.info["unit"],
        "approximate": run.info.get("approximate"),
        "horizon": run.horizon,
        "order": "bottom" if bottom else "top",
        "score": score,
    }


def bottom(run, n=10, target="", domain="", score: Score = "share", chars=200):
    """The chunks that helped a target least: where negative, those that hurt it most."""
    return top(run, n, target, domain, score, chars, bottom=True)


def docs(run, n=10, target="", domain="", score: Score = "share", chars=200, bottom=False):
    """The documents that helped a target most, with the beginning of their text; with --bottom,
    those that hurt it most. A document gets its part of each visit of its chunks."""
    k = run.target(target)
    units = document_scores(run, chunk_scores(run, k, score))
    scores, errors = score_and_error(units, summed=score == "value")
    candidates = np.flatnonzero(units.visits)
    if domain:
        candidates = candidates[units.domains[candidates] == run.domain(domain)]
    by = scores[candidates]
    order = np.argsort(by if bottom else -by, kind="stable")
    chosen = candidates[order[:n]]
    documents = Documents(run)
    records = documents.find_all(units.numbers[chosen])
    rows = []
    for rank, unit in enumerate(chosen.tolist(), 1):
        record = records[int(units.numbers[unit])]
        pieces = documents.pieces_of(record)
        value, used = value_of_document(run, pieces)
        rows.append(
            {
                "rank": rank,
                "doc": int(units.numbers[unit]),
                "score": float(scores[unit]),
                "error": float(errors[unit]),
                "value": float(value[k]),
                "visits": int(units.visits[unit]),
                "chunks": len(pieces.chunk),
                "chunks_used": used,
                "domain": record["domain"],
                "source": record["source"],
                "record": int(record["record"]),
                "text": beginning_of(run, pieces, chars),
            }
        )
    return {**ranking(run, k, score, bottom), "documents": rows}


def beginning_of(run, pieces, chars):
    """The first characters of a document, given by its Pieces."""
    text = ""
    for stop in range(1, len(pieces.chunk) + 1):
        text = text_of(run, pieces, range(stop))
        if len(text) > chars:
            return text[:chars] + "\u2026"
    return text


def chunk(run, chunk: int):
    """One chunk: its text, its documents, its values, and every visit."""
    domain = run.domain_of(chunk)
    visits = []
    for visit in run.visits_of([chunk]):
        entry = {
            "step": visit["step"].item(),
            "loss": visit["loss"].item(),
            "grad_norm": visit["grad_norm"].item(),
            "early": visit["early"].item(),
            "value": run.named(visit["value"]),
        }
        if run.is_smoothed:
            entry["smoothed"] = run.named(visit["smoothed"])
        visits.append(entry)
    return {
        "run": str(run.path),
        "chunk": chunk,
        "domain": domain,
        "unit": run.info["unit"],
        "horizon": run.horizon,
        "used": bool(visits),
        "value": run.named(run.values[chunk]),
        "visits": visits,
        "documents": Documents(run).of_chunk(chunk),
        "text": run.text(chunk),
    }


def doc(run, doc: int):
    """One document: its chunks, its text, its value: the sum over its chunks used of a chunk's
    value times the document's share of its tokens."""
    documents = Documents(run)
    row = documents.find(doc)
    pieces = documents.pieces_of(row)
    chunks = chunks_of_document(run, row["first_token"], pieces)
    value, used = value_of_document(run, pieces)
    return {
        "run": str(run.path),
        "doc": row["doc"],
        "domain": row["domain"],
        "source": row["source"],
        "record": row["record"],
        "n_tokens": row["n_tokens"],
        "unit": run.info["unit"],
        "horizon": run.horizon,
        "chunks_used": used,
        "value": run.named(value),
        "chunks": chunks,
        "whole": int(pieces.tokens.sum()) == row["n_tokens"] + 1,  # with its <eot>
        "text": text_of(run, pieces, range(len(chunks))),
    }


def value_of_document(run, pieces):
    """-> a document's value for each target (K,), nats, NaN where no chunk of it was used; and how
    many of its chunks were used."""
    _, shares = trained_tokens(run, pieces)
    values = run.values[pieces.chunk].astype(float)
    is_used = ~np.isnan(values[:, 0])
    if not is_used.any():
        return np.full(values.shape[1], np.nan), 0
    return shares[is_used] @ values[is_used], int(is_used.sum())


def chunks_of_document(run, first_token, pieces):
    """A dict for each of a document's Pieces.

    begins: the token of the chunk at which the document begins, negative behind its first chunk.
    tokens: those of the chunk that are the document's and were trained on, also as a share.
    """
    tokens, shares = trained_tokens(run, pieces)
    chunks = []
    for i, chunk in enumerate(pieces.chunk.tolist()):
        chunks.append(
            {
                "chunk": chunk,
                "begins": first_token - i * run.data.train.rows.shape[1],
                "tokens": int(tokens[i]),
                "share": float(shares[i]),
                "value": run.named(run.values[chunk]),
            }
        )
    return chunks


def tokens(run, *, chunk: int, target=""):
    """A chunk's value token by token, with the weights of the newest checkpoint: of the token read
    at each position. The last one is only predicted. The chunk's own value is of other steps."""
    k = run.target(target)
    domain = run.domain_of(chunk)
    import revalue

    step, values = revalue.tokens(run, [chunk])
    values = values[0, :, k].tolist()
    visits = []
    for visit in run.visits_of([chunk]):
        visits.append({"step": visit["step"].item(), "value": visit["value"][k].item()})
    rows = []
    for position, (piece, value) in enumerate(zip(run.pieces(chunk), [*values, np.nan])):
        rows.append({"position": position, "token": piece, "value": value})
    return {
        "run": str(run.path),
        "chunk": chunk,
        "domain": domain,
        "target": run.names[k],
        "unit": run.info["unit"],
        "horizon": run.horizon,
        "value": float(run.values[chunk, k]),
        "visits": visits,
        "step": step,
        "sum": sum(values),
        "tokens": rows,
    }


def losses(*runs):
    """Validation losses of runs side by side, also of runs without values: by step, and by domain
    after the last step at which all of them were evaluated. With them the losses of targets that
    were files."""
    compared = side_by_side(runs)
    first = compared[0]
    last = int(common_steps(compared)[-1])
    steps = np.unique(np.concatenate([run.steps for run in compared])).tolist()
    kinds = [{"domain": None, "target": None}]
    kinds += [{"domain": None, "target": name} for name in first.by_target]
    kinds += [{"domain": name, "target": None} for name in first.by_domain]
    rows = []
    for step in steps:
        for of in kinds:
            loss = {run.name: run.at(step, **of) for run in compared}
            difference = {name: loss[name] - loss[first.name] for name in list(loss)[1:]}
            rows.append({"step": step, **of, "loss": loss, "difference": difference})
    described = []
    for run in compared:
        described.append({"name": run.name, "run": str(run.path), "seed": run.cfg.get("seed")})
    return {"unit": "nats", "runs": described, "last_common_step": last, "losses": rows}


def query(
    run,
    text="",
    file="",
    n=10,
    domain="",
    score: Literal["share", "value"] = "share",
    chars=200,
    bottom=False,
    hindsight=False,
):
    """Which training chunks helped the model to write a text, with --text or --file; with --bottom,
    which hinder it. In their step, approximately; with --hindsight for the model at the end, at the
    price of three trainings."""
    if bool(text) == bool(file):
        raise UserError("query needs a text: write --text=... or --file=PATH, and not both")
    text = text or read_text(file, "--file")
    has_surrogate = any("\ud800" <= character <= "\udfff" for character in text)
    if not text.strip() or has_surrogate:
        raise UserError("query needs a text of UTF-8 that is more than blanks: write --text=...")
    import revalue  # and torch with it, which reading values needs not

    valued = open_run(revalue.query(run, text, hindsight), run.data.path)
    return top(valued, n, "", domain, score, chars, bottom)


COMMANDS = (
    summary,
    domains,
    top,
    bottom,
    docs,
    chunk,
    doc,
    tokens,
    losses,
    compare,
    export,
    query,
)


def main():
    command, style, data_dir, options = commands.parse(__doc__, COMMANDS)
    for key in ("run", "other"):
        if key in options:
            options[key] = open_run(options[key], data_dir)
    result = command(*options.pop("runs", ()), **options)
    commands.show(command.__name__, result, style, data_dir)


if __name__ == "__main__":
    commands.obey_signals()
    config.main(main)
