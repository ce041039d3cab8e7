"""Read a run's values: which chunks and documents helped, which hurt, and what the values are worth.

python values.py summary out/demo                        what was valued, how far the run is, how far to trust it
python values.py top out/demo --domain=Licences --n=5    chunks by value, with their text; `bottom` from the other end
python values.py domains out/demo --csv                  value, spread and share by domain
python values.py chunk out/demo 17                       one chunk: its text, documents, every visit
python values.py doc out/demo 203                        one document: its chunks, its value, its text
python values.py export out/demo values.parquet          all of it as a table
python values.py compare out/demo out/other              the same data valued twice: rank correlation, who moved
python values.py tokens out/demo --chunk=17              a chunk's value, token by token
python values.py query out/demo --text="To be"           which chunks helped the model to write this (approximate)

Values are in nats, positive where the chunk lowered the target's loss; tables show 1e-6 nats. The run may still be under way.
--json gives all of it in full, as show/values.schema.json says; --csv the rows alone.
"""

import signal
import sys

import numpy as np

import config
from data import read_text
from pile.tokenizers import whole_characters
from show import commands, tables
from show.documents import Documents
from show.exports import compare, export
from show.run import open_run
from system.errors import UserError

# --- the commands: (run, options) -> plain dicts and lists; a float may be NaN ------


def summary(run):
    """What was valued, how far the run is, and how far to trust its values: the books and the audit."""
    values, done, most, batch = (
        run.values[run.used].astype(float),
        run.info["committed_step"],
        run.cfg["max_iters"],
        run.info["batch"],
    )
    found = dict(
        run=str(run.path),
        steps=done,
        max_iters=most,
        finished=done >= most,
        **{key: run.info[key] for key in ("rule", "sign", "unit")},
    )
    found |= dict(
        batch=batch, chunks=len(run.values), chunks_used=len(values), visits=len(run.visits)
    )
    found |= dict(
        approximate=run.info.get("approximate"),
        early_steps=int(np.count_nonzero(run.visits["early"][::batch])),
        targets=[],
    )
    for k, name in enumerate(run.names):
        trust = dict(books=tables.booked(run.books, k), audit=tables.audited(run.audit, k))
        found["targets"].append(
            dict(target=name, **tables.spread(values[:, k]), sum=float(values[:, k].sum()), **trust)
        )
    return found


def top(run, n=10, target="", domain="", chars=200, bottom=False):
    """The chunks with the largest values for a target, with their text: those that helped it most."""
    k, ids = run.target(target), run.used
    ids = ids[run.data.train.domain[ids] == run.domain(domain)] if domain else ids
    best = ids[np.argsort(run.values[ids, k] * (1 if bottom else -1), kind="stable")[:n]]
    documents, visits, rows = Documents(run), run.visits_of(best), []
    for rank, chunk in enumerate(best.tolist(), 1):
        own = visits[visits["chunk"] == chunk]
        row = dict(
            rank=rank,
            chunk=chunk,
            value=float(run.values[chunk, k]),
            domain=run.domain_of(chunk),
            visits=len(own),
        )
        row |= dict(
            first_step=int(own["step"].min()),
            loss=float(own["loss"].mean(dtype=float)),
            text=run.text(chunk, chars),
        )
        rows.append(row | dict(documents=documents.of_chunk(chunk)))
    found = dict(
        target=run.names[k], unit=run.info["unit"], approximate=run.info.get("approximate")
    )
    return found | dict(order="bottom" if bottom else "top", chunks=rows)


def bottom(run, n=10, target="", domain="", chars=200):
    """The chunks with the smallest values for a target: where negative, those that hurt it most."""
    return top(run, n, target, domain, chars, bottom=True)


def domains(run):
    """By domain and target, of the chunks used: mean to p95 are of the value per token, a chunk's value by its tokens; the sum is in nats."""
    domain, rows = run.data.train.domain[run.used], []
    order = np.argsort(domain, kind="stable")
    found, starts = np.unique(domain[order], return_index=True)
    for k, name in enumerate(run.names):
        values = run.values[run.used[order], k].astype(float)
        for d, v in zip(found, np.split(values, starts[1:])):
            row = dict(
                target=name,
                domain=run.domains[d],
                chunks=len(v),
                tokens=len(v) * run.width,
                share=len(v) / len(values),
            )
            rows.append(
                row
                | tables.spread(v / run.width)
                | dict(sum=float(v.sum()), share_of_sum=float(v.sum() / values.sum()))
            )
    return dict(unit=run.info["unit"], domains=rows)


def chunk(run, chunk: int):
    """One chunk: its text, its documents, its values, and every visit."""
    found, fields = (
        dict(chunk=chunk, domain=run.domain_of(chunk), unit=run.info["unit"]),
        ("step", "loss", "grad_norm", "early"),
    )
    visits = [
        {key: v[key].item() for key in fields} | dict(value=run.named(v["value"]))
        for v in run.visits_of([chunk])
    ]
    found |= dict(used=bool(visits), value=run.named(run.values[chunk]), visits=visits)
    return found | dict(documents=Documents(run).of_chunk(chunk), text=run.text(chunk))


def doc(run, doc: int):
    """One document: its chunks, its text, its value: the sum over its chunks used of a chunk's value times the document's share of its tokens."""
    documents, (_, W), tokens, chunks = Documents(run), run.data.train.rows.shape, [], []
    row = documents.find(doc)
    stream, total, n = (
        documents.stream(run.domain(row["domain"])),
        np.zeros(len(run.names)),
        row["n_tokens"] + 1,
    )  # with its <eot>
    for i, chunk in enumerate(
        stream[np.searchsorted(stream, row["first_chunk"]) :][
            : -(-(row["first_token"] + n) // W)
        ].tolist()
    ):
        begins = row["first_token"] - i * W
        inside = slice(max(begins, 0), min(begins + n, W))
        held = max(
            0, min(inside.stop, run.width + 1) - inside.start
        )  # of those that were trained on
        tokens.append(run.data.train.rows[chunk, inside])
        chunks.append(
            dict(
                chunk=chunk,
                begins=begins,
                tokens=held,
                share=held / (run.width + 1),
                value=run.named(run.values[chunk]),
            )
        )
        total += np.nan_to_num(run.values[chunk].astype(float)) * chunks[-1]["share"]
    used, tokens = (
        [c for c in chunks if not np.isnan(c["value"][run.names[0]])],
        np.concatenate(tokens),
    )
    found = {key: row[key] for key in ("doc", "domain", "source", "record", "n_tokens")} | dict(
        unit=run.info["unit"], chunks_used=len(used)
    )
    found |= dict(
        value=run.named(total if used else total * np.nan), chunks=chunks, whole=len(tokens) == n
    )
    utf8 = run.tokenizer.decode_bytes(tokens[tokens != run.data.meta["eot"]])
    return found | dict(text=whole_characters(utf8))


def tokens(run, *, chunk: int, target=""):
    """A chunk's value token by token, at a checkpoint of the run: of the token read at each position. The last one is only predicted."""
    k, domain = run.target(target), run.domain_of(chunk)
    import revalue

    step, values = revalue.tokens(run, [chunk])
    values = [*values[0, :, k].tolist(), np.nan]
    rows = [
        dict(position=t, token=piece, value=v)
        for t, (piece, v) in enumerate(zip(run.pieces(chunk), values))
    ]
    return dict(
        chunk=chunk,
        domain=domain,
        target=run.names[k],
        unit=run.info["unit"],
        step=step,
        sum=sum(values[:-1]),
        tokens=rows,
    )


def query(run, text="", file="", n=10, domain="", chars=200, bottom=False):
    """Which training chunks helped the model to write a text, approximately, with --text or --file; with --bottom, which hinder it."""
    if bool(text) == bool(file):
        raise UserError("query needs a text: write --text=... or --file=PATH, and not both")
    text = text or read_text(file, "--file")
    if not text.strip() or any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError("query needs a text of UTF-8 that is more than blanks: write --text=...")
    import revalue  # and torch with it, which reading values needs not

    return top(open_run(revalue.query(run, text), run.data.path), n, "", domain, chars, bottom)


COMMANDS = (summary, top, bottom, domains, chunk, doc, export, compare, tokens, query)


def main():
    command, style, data_dir, options = commands.parse(__doc__, COMMANDS)
    runs = {key: open_run(options.pop(key), data_dir) for key in ("run", "other") if key in options}
    commands.show(command.__name__, command(**runs, **options), style)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # the way out of Ctrl-C: no file is left half-written
    config.main(main)
