"""A run, as its last commit left it."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

import ledger
from data import Dataset, open_dataset
from sources.tokenizers import tokenizer


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
            raise ValueError(f"--target={name!r}: {self.path} has {', '.join(map(repr, self.names))}")
        return self.names.index(name) if name else 0

    def domain(self, name):
        if name not in self.domains:
            raise ValueError(f"--domain={name!r}: {self.data.path} has {', '.join(map(repr, self.domains))}")
        return self.domains.index(name)

    def domain_of(self, chunk):
        """A chunk's domain, by name. Raises ValueError for a number that is no chunk's."""
        if not 0 <= chunk < len(self.values):
            raise ValueError(f"chunk {chunk}: {self.data.path} has chunks 0 to {len(self.values) - 1}")
        return self.domains[int(self.data.train.domain[chunk])]

    def named(self, values):
        """(K,) -> {target: value}"""
        return dict(zip(self.names, map(float, values)))

    def parts(self):
        """The visits, some whole steps at a time."""
        size = -(-(2**20) // self.info["batch"]) * self.info["batch"]
        return (self.visits[start : start + size] for start in range(0, len(self.visits), size))

    def visits_of(self, chunks):
        """The visits of some chunks, in the order of the steps."""
        return np.concatenate([self.visits[:0], *(part[np.isin(part["chunk"], chunks)] for part in self.parts())])

    def pieces(self, chunk):
        """What stands in a chunk, token by token: width + 1 strings. Where a character is cut up by tokens, its last one has it."""
        tokens, texts, start = [*self.data.train.rows[chunk, : self.width + 1].tolist(), eot := self.data.meta["eot"]], [], 0
        while start < len(tokens) - 1:
            ends = range(start + 1, min(start + 4, tokens.index(eot, start)) + 1)
            tried = [self.tokenizer.decode(tokens[start:end]) for end in ends] or ["\n<|endoftext|>\n"]
            n = next((n for n, text in enumerate(tried, 1) if not text.endswith("\ufffd")), 1)  # 1: the chunk begins within a character
            texts += [""] * (n - 1) + [tried[n - 1]]
            start += n
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
    cfg = read(path, "config", "config")["config"]
    if cfg["rule"] == "off":
        raise ValueError(f"{path} was trained with --rule=off: it has no values; train it with another --rule")
    while True:
        info = read(path, "values", "committed_step") if (path / "values.json").is_file() else dict(schema=ledger.SCHEMA, committed_step=0)
        if info.get("schema") != ledger.SCHEMA:
            raise ValueError(f"{path}/values.json has schema {info.get('schema')}, this code reads {ledger.SCHEMA}: run train.py again")
        if not info["committed_step"]:
            when = f"train.py writes them with its first checkpoint, after {min(cfg['checkpoint_interval'], cfg['max_iters'])} steps"
            raise ValueError(f"{path} has no values yet: {when}")
        K, rows = len(info["targets"]), info["committed_step"] * info["batch"]
        values, visits, books = (read(path, name) for name in ("values", "ledger", "books"))
        audit = read(path, "audit") if (path / "audit.npy").is_file() else np.zeros(0, ledger.audit_dtype(K))
        if read(path, "values", "committed_step") == info:  # else the run committed in between
            break
    folder = Path(data_dir or cfg["data_dir"])
    if not folder.is_dir():
        raise ValueError(f"the data of {path} is not in {folder}: name the folder it is in with --data_dir=...")
    data = open_dataset(folder)
    if data.hash != info["data_hash"]:
        raise ValueError(f"{data.path} is not the data of {path} (its hash differs): name the run's data with --data_dir=...")
    n = len(data.train.rows)
    if len(visits) and visits.dtype.names:
        rows -= int(visits["step"][0]) * info["batch"]  # of a replay or a walk that began there
    for name, array, fits in (
        ("values", values, values.dtype == np.float32 and values.shape == ((n, K) if K > 1 else (n,))),
        ("ledger", visits, visits.dtype == ledger.visit_dtype(K) and len(visits) >= rows),
        ("books", books, books.dtype.names is not None and len(books) * info["batch"] >= rows),
        ("audit", audit, audit.dtype == ledger.audit_dtype(K)),
    ):
        if not fits:
            raise ValueError(f"{path}/{name}.npy is damaged, {array.dtype} {array.shape} does not fit values.json: {again(path)}")
    if len(visits) > rows:  # a commit is under way, or was cut off: values.npy may be ahead of values.json
        total, used = np.zeros((n, K)), np.zeros(n, bool)
        ledger.add_visits(visits[:rows], total, used)
        values = np.where(used[:, None], total, np.nan).astype(np.float32)
    books, audit = books[: rows // info["batch"]], audit[audit["step"] < info["committed_step"]]
    return Run(path, cfg, info, data, values.reshape(-1, K), visits[:rows], books, audit)


def again(path):
    return f"type: python train.py {path}/config.json --init_from=resume, which writes it again or says what is lost"


def read(path, name, key=None):
    """The records of <name>.npy, memmapped; with a key, what <name>.json holds: a dict that has it."""
    try:
        if key is None:
            return ledger.read(path, name)
        content = json.loads((path / f"{name}.json").read_text())
        return content | {key: content[key]}
    except (OSError, ValueError, EOFError, LookupError, TypeError) as e:
        raise ValueError(f"{path}/{name}.{'json' if key else 'npy'} is missing or damaged ({e!r}): {again(path)}") from e
