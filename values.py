"""Read a run's values: which chunks and documents helped, which hurt, and what the values are worth.

python values.py summary out/demo                     what was valued, and how far to trust it
python values.py top out/demo --domain=Licences       chunks by value, with their text; `bottom` from the other end
python values.py domains out/demo --csv               value, spread and share by domain
python values.py chunk out/demo 17                    one chunk: its text, documents, every visit; `doc` for a document
python values.py export out/demo values.parquet       all of it as a table
python values.py compare out/demo out/other           the same data valued twice: rank correlation, who moved
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

import ledger
from data import Dataset, open_dataset, tokenizer

# --- a run, as its last commit left it ------------------------------------------


@dataclass
class Run:
    path: Path
    cfg: dict  # config.json's "config": train.py's options
    info: dict  # values.json: sign, unit, rule, targets, committed_step
    data: Dataset
    values: np.ndarray  # float32 (n_chunks, K), nats; NaN = never used
    visits: np.ndarray  # the ledger's committed rows, memmapped: step, chunk, loss, value (K,), grad_norm, early
    books: np.ndarray  # one row a step
    audit: np.ndarray  # one row an audited step; of length 0 where there was none

    @property
    def names(self):
        return [target["name"] for target in self.info["targets"]]

    @property
    def domains(self):
        return self.data.domains

    @property
    def width(self):
        """Tokens of a chunk that were trained on; the row holds one more."""
        return self.cfg["block_size"] or self.data.meta["block_size"]

    @cached_property
    def used(self):
        """int64: the chunks that have a value, in ascending order."""
        return np.flatnonzero(~np.isnan(self.values[:, 0]))

    @cached_property
    def tokenizer(self):
        return tokenizer(self.data.meta["tokenizer"])

    def target(self, name=""):
        """A target's number; of the first without a name. Raises ValueError for a name that is none."""
        if name and name not in self.names:
            raise ValueError(f"--target={name}: {self.path} has {', '.join(self.names)}")
        return self.names.index(name) if name else 0

    def domain(self, name):
        if name not in self.domains:
            raise ValueError(f"--domain={name}: {self.data.path} has {', '.join(self.domains)}")
        return self.domains.index(name)

    def pieces(self, chunk):
        """What stands in a chunk, token by token: width + 1 strings. Where a character is cut up by tokens, its last one has it."""
        tokens, eot, texts, start = self.data.train.rows[chunk, : self.width + 1].tolist(), self.data.meta["eot"], [], 0
        for end in range(1, len(tokens) + 1):
            whole = "\n<|endoftext|>\n" if tokens[end - 1] == eot else self.tokenizer.decode(tokens[start:end])
            cut = whole.endswith("\ufffd") and end < len(tokens) and end - start < 4
            texts.append("" if cut else whole)
            start = start if cut else end
        return texts

    def text(self, chunk, limit=None):
        """A chunk's text, cut to limit characters; documents are parted by <|endoftext|> on a line of its own."""
        tokens, eot = self.data.train.rows[chunk, : self.width + 1], self.data.meta["eot"]
        parts = np.split(tokens, np.flatnonzero(tokens == eot))
        text = "\n<|endoftext|>\n".join(self.tokenizer.decode(part[part != eot]) for part in parts)
        return text if limit is None or len(text) <= limit else text[:limit] + "\u2026"


def open_run(path, data_dir=""):
    """A run's folder -> Run. data_dir: where the run's data is now, if it moved.

    Raises ValueError, saying what to type, where there is no run, none of its values are written yet, or a file is damaged."""
    path = Path(path)
    if not (path / "config.json").is_file():
        what = "is no run's folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}: name one that train.py wrote, as out/<the config's name>")
    cfg = read_json(path / "config.json")["config"]
    if cfg["rule"] == "off":
        raise ValueError(f"{path} was trained with --rule=off: it has no values; train it with another --rule")
    while True:
        if not (path / "values.json").is_file():
            when = f"train.py writes them with its first checkpoint, after {min(cfg['checkpoint_interval'], cfg['max_iters'])} steps"
            raise ValueError(f"{path} has no values yet: {when}")
        info = read_json(path / "values.json")
        if info.get("schema") != ledger.SCHEMA:
            raise ValueError(f"{path}/values.json has schema {info.get('schema')}, this code reads {ledger.SCHEMA}: run train.py again")
        K, rows = len(info["targets"]), info["committed_step"] * info["batch"]
        values, visits, books = (load(path, name) for name in ("values", "ledger", "books"))
        audit = load(path, "audit") if (path / "audit.npy").is_file() else np.zeros(0, ledger.audit_dtype(K))
        if read_json(path / "values.json") == info:  # else the run committed in between
            break
    data = open_dataset(data_dir or cfg["data_dir"])
    if data.hash != info["data_hash"]:
        raise ValueError(f"{data.path} is not the data of {path} (its hash differs): name the run's data with --data_dir=...")
    if len(visits) and visits.dtype.names:
        rows -= int(visits["step"][0]) * info["batch"]  # of a replay or a walk that began there
    for name, array, fits in (
        ("values", values, values.shape[:1] == (len(data.train.rows),) and values[:1].size == K),
        ("ledger", visits, visits.dtype == ledger.visit_dtype(K) and len(visits) >= rows),
        ("books", books, books.dtype.names is not None and len(books) * info["batch"] >= rows),
    ):
        if not fits:
            raise ValueError(f"{path}/{name}.npy is damaged, {array.dtype} {array.shape} does not fit values.json: {again(path)}")
    return Run(path, cfg, info, data, values.reshape(-1, K), visits[:rows], books[: rows // info["batch"]], audit)


def again(path):
    return f"type: python train.py {path}/config.json --init_from=resume, which writes it again or says what is lost"


def read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}): {again(path.parent)}") from e


def load(path, name):
    try:
        return ledger.read(path, name)
    except (OSError, ValueError, EOFError) as e:
        raise ValueError(f"{path}/{name}.npy is missing or damaged ({e}): {again(path)}") from e


# --- chunks and documents ---------------------------------------------------------


class Documents:
    """The table of train_docs.parquet, a row group at a time: a chunk's documents, a document's chunks."""

    def __init__(self, run):
        import pyarrow.parquet

        self.run, self.file, self.cached = run, pyarrow.parquet.ParquetFile(run.data.path / "train_docs.parquet"), {}
        groups, column = range(self.file.num_row_groups), self.file.schema_arrow.names.index("first_chunk")
        of = [self.file.metadata.row_group(i) for i in groups]
        self.first = np.array([group.column(column).statistics.min if group.num_rows else np.iinfo("i8").max for group in of])

    def group(self, i):
        if i not in self.cached:
            self.cached = {i: {name: c.to_numpy() for name, c in zip(self.file.schema_arrow.names, self.file.read_row_group(i).columns)}}
        return self.cached[i]

    def stream(self, d):
        """The chunks of a domain, in their order: documents go on from one to the next."""
        return np.flatnonzero(self.run.data.train.domain == d)

    def of_chunk(self, chunk):
        """[{doc, source, record, n_tokens, begins: token of this chunk, negative where it began in an earlier one}], in order."""
        domain = self.run.domains[int(self.run.data.train.domain[chunk])]
        found, i = [], int(np.searchsorted(self.first, chunk, "right")) - 1
        while i >= 0:
            group = self.group(i)
            before = np.flatnonzero((group["first_chunk"] <= chunk) & (group["domain"] == domain))[::-1]
            for row in before:
                begun, n = int(group["first_chunk"][row]), int(group["n_tokens"][row])
                apart = 0 if begun == chunk else np.count_nonzero(self.run.data.train.domain[begun:chunk] == self.run.data.train.domain[chunk])
                begins = int(group["first_token"][row]) - apart * self.run.data.train.rows.shape[1]
                if begins + n >= 0:  # its <eot>, or more
                    doc, source, record = (group[key][row] for key in ("doc", "source", "record"))
                    found.append(dict(doc=int(doc), source=source, record=int(record), n_tokens=n, begins=int(begins)))
                if begun < chunk:
                    return found[::-1]
            i -= 1
        return found[::-1]
