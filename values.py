"""Read a run's values: which chunks and documents helped, which hurt, and what they are worth.

python values.py summary out/demo                     what was valued, how far to trust its values
python values.py top out/demo --domain=Licences       chunks by value, with their text; or `bottom`
python values.py domains out/demo --csv               value, spread and share by domain
python values.py chunk out/demo 17                    one chunk: its text, documents, every visit
python values.py doc out/demo 203                     one document: its chunks, value, text
python values.py export out/demo values.parquet       all of it as a table
python values.py compare out/demo out/other           the same data valued twice: who moved
python values.py tokens out/demo --chunk=17           a chunk's value, token by token
python values.py query out/demo --text="To be"        chunks that helped to write this (approximate)

Values are in nats, positive where the chunk lowered the target's loss; tables show 1e-6 nats.
The run may still be under way.
--json gives all of it in full, as show/values.schema.json says; --csv the rows alone.
"""

import numpy as np

import config
from data import read_text
from show import commands, tables
from show.documents import Documents, text_of
from show.exports import compare, export
from show.run import open_run
from system.errors import UserError

# The commands: functions of a run and options, which return plain dicts and lists; a float may be
# NaN. Their docstrings are the help.


def summary(run):
    """What was valued, how far the run is, and how far to trust its values: the books and the
    audit."""
    values = run.values[run.used].astype(float)
    batch = run.info["batch"]
    targets = []
    for k, name in enumerate(run.names):
        targets.append(
            {
                "target": name,
                **tables.spread(values[:, k]),
                "sum": float(values[:, k].sum()),
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
        "chunks_used": len(values),
        "visits": len(run.visits),
        "approximate": run.info.get("approximate"),
        "early_steps": int(np.count_nonzero(run.visits["early"][::batch])),
        "targets": targets,
    }


def top(run, n=10, target="", domain="", chars=200, bottom=False):
    """The chunks with the largest values for a target, with their text: those that helped it
    most."""
    k = run.target(target)
    candidates = run.used
    if domain:
        candidates = candidates[run.data.train.domain[candidates] == run.domain(domain)]
    values = run.values[candidates, k]
    order = np.argsort(values if bottom else -values, kind="stable")
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
                "value": float(run.values[chunk, k]),
                "domain": run.domain_of(chunk),
                "visits": len(chunk_visits),
                "first_step": int(chunk_visits["step"].min()),
                "loss": float(chunk_visits["loss"].mean(dtype=float)),
                "text": run.text(chunk, chars),
                "documents": documents.of_chunk(chunk),
            }
        )
    return {
        "target": run.names[k],
        "unit": run.info["unit"],
        "approximate": run.info.get("approximate"),
        "order": "bottom" if bottom else "top",
        "chunks": rows,
    }


def bottom(run, n=10, target="", domain="", chars=200):
    """The chunks with the smallest values for a target: where negative, those that hurt it most."""
    return top(run, n, target, domain, chars, bottom=True)


def domains(run):
    """By domain and target, of the chunks used: mean to p95 are of the value per token, a chunk's
    value by its tokens; the sum is in nats."""
    domain = run.data.train.domain[run.used]
    order = np.argsort(domain, kind="stable")
    present, starts = np.unique(domain[order], return_index=True)
    rows = []
    for k, name in enumerate(run.names):
        values = run.values[run.used[order], k].astype(float)
        for d, domain_values in zip(present, np.split(values, starts[1:])):
            rows.append(
                {
                    "target": name,
                    "domain": run.domains[d],
                    "chunks": len(domain_values),
                    "tokens": len(domain_values) * run.width,
                    "share": len(domain_values) / len(values),
                    **tables.spread(domain_values / run.width),
                    "sum": float(domain_values.sum()),
                    "share_of_sum": float(domain_values.sum() / values.sum()),
                }
            )
    return {"unit": run.info["unit"], "domains": rows}


def chunk(run, chunk: int):
    """One chunk: its text, its documents, its values, and every visit."""
    domain = run.domain_of(chunk)
    visits = []
    for visit in run.visits_of([chunk]):
        visits.append(
            {
                "step": visit["step"].item(),
                "loss": visit["loss"].item(),
                "grad_norm": visit["grad_norm"].item(),
                "early": visit["early"].item(),
                "value": run.named(visit["value"]),
            }
        )
    return {
        "chunk": chunk,
        "domain": domain,
        "unit": run.info["unit"],
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
    total = np.zeros(len(run.names))
    used = 0
    for entry in chunks:
        values = run.values[entry["chunk"]].astype(float)
        if not np.isnan(values[0]):
            used += 1
            total += values * entry["share"]
    return {
        "doc": row["doc"],
        "domain": row["domain"],
        "source": row["source"],
        "record": row["record"],
        "n_tokens": row["n_tokens"],
        "unit": run.info["unit"],
        "chunks_used": used,
        "value": run.named(total if used else np.full(len(total), np.nan)),
        "chunks": chunks,
        "whole": int(pieces.tokens.sum()) == row["n_tokens"] + 1,  # with its <eot>
        "text": text_of(run, pieces, range(len(chunks))),
    }


def chunks_of_document(run, first_token, pieces):
    """A dict for each of a document's Pieces.

    begins: the token of the chunk at which the document begins, negative behind its first chunk.
    tokens: those of the chunk that are the document's and were trained on, also as a share.
    """
    trained = run.width + 1  # tokens of a chunk that were read or predicted
    chunks = []
    for i, chunk in enumerate(pieces.chunk.tolist()):
        tokens = max(0, min(int(pieces.end[i]), trained) - int(pieces.begin[i]))
        chunks.append(
            {
                "chunk": chunk,
                "begins": first_token - i * run.data.train.rows.shape[1],
                "tokens": tokens,
                "share": tokens / trained,
                "value": run.named(run.values[chunk]),
            }
        )
    return chunks


def tokens(run, *, chunk: int, target=""):
    """A chunk's value token by token, at a checkpoint of the run: of the token read at each
    position. The last one is only predicted."""
    k = run.target(target)
    domain = run.domain_of(chunk)
    import revalue

    step, values = revalue.tokens(run, [chunk])
    values = values[0, :, k].tolist()
    rows = []
    for position, (piece, value) in enumerate(zip(run.pieces(chunk), [*values, np.nan])):
        rows.append({"position": position, "token": piece, "value": value})
    return {
        "chunk": chunk,
        "domain": domain,
        "target": run.names[k],
        "unit": run.info["unit"],
        "step": step,
        "sum": sum(values),
        "tokens": rows,
    }


def query(run, text="", file="", n=10, domain="", chars=200, bottom=False):
    """Which training chunks helped the model to write a text, approximately, with --text or --file;
    with --bottom, which hinder it."""
    if bool(text) == bool(file):
        raise UserError("query needs a text: write --text=... or --file=PATH, and not both")
    text = text or read_text(file, "--file")
    has_surrogate = any("\ud800" <= character <= "\udfff" for character in text)
    if not text.strip() or has_surrogate:
        raise UserError("query needs a text of UTF-8 that is more than blanks: write --text=...")
    import revalue  # and torch with it, which reading values needs not

    valued = open_run(revalue.query(run, text), run.data.path)
    return top(valued, n, "", domain, chars, bottom)


COMMANDS = (summary, top, bottom, domains, chunk, doc, export, compare, tokens, query)


def main():
    command, style, data_dir, options = commands.parse(__doc__, COMMANDS)
    for key in ("run", "other"):
        if key in options:
            options[key] = open_run(options[key], data_dir)
    commands.show(command.__name__, command(**options), style)


if __name__ == "__main__":
    commands.obey_signals()
    config.main(main)
