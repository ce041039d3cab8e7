"""A run, as its last commit left it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data import Dataset, open_dataset
from system import store, terminal
from system.errors import UserError
from system.files import check_entries, crc32, data_of, load_array, read_json
from system.trainers import CURE as TRAINERS_CURE
from system.trainers import is_trainers

END_OF_TEXT = "\n<|endoftext|>\n"  # what stands between two documents of a chunk
LONGEST_CHARACTER = 4  # tokens that a character is cut up into, at most


@dataclass
class Run:
    path: Path
    cfg: dict  # config.json's "config": train.py's options
    info: dict  # values.json: sign, unit, rule, targets, committed_step
    data: Dataset
    values: np.ndarray  # float32 (n_chunks, K), nats; NaN = never used
    visits: np.ndarray  # of ledger.npy, memmapped: records as of store.visit_dtype()
    books: np.ndarray  # one row a step
    audit: np.ndarray  # one row an audited step; of length 0 where there was none

    @property
    def names(self):
        """The targets' names."""
        return [target["name"] for target in self.info["targets"]]

    @property
    def horizon(self):
        """Of hindsight: how many steps ahead the loss is that its values speak of, at most; 0: the
        run's end. None where values are of their own steps."""
        return self.info["horizon"] if self.info.get("method") == "hindsight" else None

    @property
    def original(self):
        """The folder of the run: another one where these are values that came later."""
        return original_of(self.path)

    @property
    def domains(self):
        """The domains' names."""
        return self.data.domains

    @property
    def width(self):
        """Tokens of a chunk that were trained on; the row holds one more."""
        return self.cfg["block_size"] or self.data.meta["block_size"]

    @property
    def first_step(self):
        """The step of the first visit. It is not 0 where a replay or a walk began later."""
        return self.info["committed_step"] - len(self.visits) // self.info["batch"]

    @cached_property
    def used(self):
        """int64: the chunks that have a value, in ascending order."""
        return np.flatnonzero(~np.isnan(self.values[:, 0]))

    @property
    def is_smoothed(self):
        """Whether its visits have the column `smoothed`."""
        return "smoothed" in self.visits.dtype.names

    def check_smoothed(self):
        """Raises UserError where there is no column `smoothed`."""
        if self.is_smoothed:
            return
        cure = "train with --target_smoothing=.9"
        if self.info.get("method") == "walk":
            cure = "a walk has none"
        raise UserError(f"{self.path} has no smoothed scores: {cure}, or choose another --score")

    def sums(self, column):
        """What each chunk's visits add up to, in nats: (n_chunks, K), NaN = never used.

        column: "value" or "smoothed"."""
        if column == "value":
            return self.values
        self.check_smoothed()
        total = np.zeros(self.values.shape)
        for visits in self.blocks():
            np.add.at(total, visits["chunk"], visits[column].astype(float))
        return np.where(np.isnan(self.values), np.nan, total)

    @cached_property
    def tokenizer(self):
        return self.data.tokenizer

    def target(self, name=""):
        """A target's number; the first target's without a name. Raises UserError for a name that no
        target has."""
        if not name:
            return 0
        if name not in self.names:
            known = ", ".join(map(repr, self.names))
            raise UserError(f"--target={name!r}: {self.path} has {known}")
        return self.names.index(name)

    def domain(self, name):
        """A domain's number. Raises UserError for a name that no domain has."""
        if name not in self.domains:
            known = ", ".join(map(repr, self.domains))
            raise UserError(f"--domain={name!r}: {self.data.path} has {known}")
        return self.domains.index(name)

    def domain_of(self, chunk):
        """The name of a chunk's domain. Raises UserError for a number that no chunk has."""
        last = len(self.values) - 1
        if not 0 <= chunk <= last:
            raise UserError(f"chunk {chunk}: {self.data.path} has chunks 0 to {last}")
        return self.domains[int(self.data.train.domain[chunk])]

    def named(self, values):
        """(K,) -> {target: value}"""
        return dict(zip(self.names, map(float, values)))

    def blocks(self):
        """Yields the visits, some whole steps at a time, with the rows that a step of fewer chunks
        leaves empty (store.filled() leaves those out): they have chunk -1 and value 0."""
        return checked_blocks(self.path, self.visits, self.info["batch"], len(self.values))

    def counted(self):
        """Yields the visits that count in the chunks' values, some whole steps at a time: all, but
        of hindsight not those of early steps."""
        for visits in self.blocks():
            counted = visits if self.horizon is None else store.late(visits)
            if len(counted):
                yield counted

    def visits_of(self, chunks):
        """The visits of some chunks, in the order of the steps."""
        selected = [self.visits[:0]]
        for visits in self.blocks():
            selected.append(visits[np.isin(visits["chunk"], chunks)])
        return np.concatenate(selected)

    def pieces(self, chunk):
        """What stands in a chunk, token by token: width + 1 strings. Where a character is cut up by
        tokens, the last of them has it, and the others have nothing, nor has what fills up a pair's
        row."""
        train = self.data.train
        tokens = train.rows[chunk, : self.width + 1].tolist()
        text_end = train.text(chunk).stop
        n_shown = len(tokens) if text_end is None else min(text_end + 1, len(tokens))
        pieces = []
        while len(pieces) < n_shown:
            following = tokens[len(pieces) : min(len(pieces) + LONGEST_CHARACTER, n_shown)]
            n, text = self.first_piece(following)
            pieces += [""] * (n - 1)
            pieces.append(text)
        return pieces + [""] * (len(tokens) - n_shown)

    def first_piece(self, tokens):
        """-> how many of the tokens make the first whole characters, and those characters."""
        eot = self.data.meta["eot"]
        if tokens[0] == eot:
            return 1, END_OF_TEXT
        if eot in tokens:
            tokens = tokens[: tokens.index(eot)]
        for n in range(1, len(tokens) + 1):
            text = self.tokenizer.decode(tokens[:n])
            if not text.endswith("\ufffd"):
                return n, text
        return 1, self.tokenizer.decode(tokens[:1])  # the chunk begins within a character

    def text(self, chunk, limit=None):
        """A chunk's text, cut to limit characters. Between documents stands <|endoftext|>, on a
        line of its own."""
        train = self.data.train
        tokens = train.rows[chunk, : self.width + 1][train.text(chunk)]
        eot = self.data.meta["eot"]
        documents = np.split(tokens, np.flatnonzero(tokens == eot))
        texts = [self.tokenizer.decode(document[document != eot]) for document in documents]
        text = END_OF_TEXT.join(texts)
        if limit is None or len(text) <= limit:
            return text
        return text[:limit] + "\u2026"


def original_of(path):
    """The folder of the run that a folder's values are of."""
    is_clear = len(path.parts) > 2 and ".." not in path.parts
    whole = path if is_clear else path.resolve()
    return whole.parent.parent if whole.parent.name == "revalued" else path


# what readers take from config.json
SETTINGS = {
    "rule": str,
    "block_size": int,
    "data_dir": str,
    "targets": str,
    "max_iters": int,
    "checkpoint_interval": int,
    "n_layer": int,
    "n_head": int,
    "n_embd": int,
    "tie_weights": bool,
    "optimizer": str,
    "learning_rate": (int, float),
    "warmup_iters": int,
    "grad_clip": (int, float),
    "target_batch": int,
    "book_interval": int,
    "audit_interval": int,
}
# what they take from values.json
ENTRIES = {
    "rule": str,
    "unit": str,
    "sign": str,
    "batch": int,
    "data_hash": str,
    "targets": list,
    "files": dict,
}
# and of hindsight
HINDSIGHT = {
    "horizon": int,
    "steps": list,
    "loss_at_end": dict,
    "meaning": str,
}


def open_run(path, data_dir=""):
    """A run's folder -> Run. data_dir: where the run's data is now, if it moved.

    Raises UserError, saying what to type, where there is no run, none of its values are written
    yet, or a file is not as it was written.
    """
    path = Path(path)
    cfg = read_config(path)
    info, (values, visits, books, audit) = read_commit(path, cfg)
    folder = Path(data_dir) if data_dir else data_of(path, cfg["data_dir"])
    if not folder.is_dir():
        what = f"the data of {path} is not in {folder}"
        raise UserError(f"{what}: name the folder it is in with --data_dir=...")
    data = open_dataset(folder)
    if data.hash != info["data_hash"]:
        what = f"{data.path} is not the data of {path} (its hash differs)"
        raise UserError(f"{what}: name the run's data with --data_dir=...")
    if len(values) != len(data.train.rows):
        what = f"it has {len(values)} values, {data.path} has {len(data.train.rows)} chunks"
        raise UserError(f"{path}/values.npy is damaged, {what}: {again(path)}")
    if not 0 <= cfg["block_size"] <= data.meta["block_size"]:
        raise UserError(f"{path}/config.json is damaged (its block_size): {again(path)}")
    return Run(path, cfg, info, data, values, visits, books, audit)


MOST_NAMED = 5  # runs, where a folder that holds several is none itself


def check_folder(path):
    """Raises UserError, saying what to type, where a path is no run's folder."""
    if (path / "config.json").is_file():
        return
    if not path.is_dir():
        what = f"{path} is a file" if path.is_file() else f"{path} does not exist"
        raise UserError(f"{what}: name a run's folder, as out/<the config's name>")
    runs = sorted(file.parent for file in path.glob("*/config.json"))
    if runs:
        names = ", ".join(terminal.quoted(str(run)) for run in runs[:MOST_NAMED])
        more = f", ... ({len(runs)} in all)" if len(runs) > MOST_NAMED else ""
        raise UserError(f"{path} is no run's folder, but it holds some: name one of {names}{more}")
    cure = "name one that train.py wrote, as out/<the config's name>"
    raise UserError(f"{path} is no run's folder (it has no config.json): {cure}")


def read_config(path):
    """The options of a run that was valued, from its config.json."""
    file = path / "config.json"
    check_folder(path)
    cfg = read_json(file, again(path), {"config": dict}, unsealed=True)["config"]
    check_entries(cfg, SETTINGS, file, again(path))
    if cfg["rule"] == "off" and not (path / "values.json").is_file():  # hindsight came later
        what = f"{path} was trained with --rule=off and has no values"
        losses = terminal.command("python", "values.py", "losses", str(path))
        raise UserError(f"{what}: train it with another --rule; for its losses type: {losses}")
    return cfg


def read_commit(path, cfg):
    """-> values.json and the arrays of one commit, though the run may go on committing."""
    while True:
        info = read_info(path, cfg)
        arrays = read_arrays(path, info)
        if read_info(path, cfg) == info:  # else the run committed in between
            return info, arrays


def read_info(path, cfg):
    """values.json, of the last commit."""
    file = path / "values.json"
    cure = again(path)
    if not file.is_file():
        info = {"schema": store.SCHEMA, "committed_step": 0}
    else:
        info = read_json(file, cure, {"schema": int, "committed_step": int})
    if info["schema"] != store.SCHEMA:
        what = f"{file} has schema {info['schema']}, this code reads {store.SCHEMA}"
        raise UserError(f"{what}: run train.py again")
    if not info["committed_step"]:
        steps = min(cfg["checkpoint_interval"], cfg["max_iters"])
        when = f"train.py writes them with its first checkpoint, after {steps} steps"
        raise UserError(f"{path} has no values yet: {when}")
    check_entries(info, ENTRIES, file, cure)
    if info.get("method") == "hindsight":
        check_entries(info, HINDSIGHT, file, cure)
    for target in info["targets"]:
        if not isinstance(target, dict) or not isinstance(target.get("name"), str):
            raise UserError(f"{file} is damaged (its targets): {cure}")
    if info["batch"] < 1 or info["committed_step"] < 1 or not info["targets"]:
        raise UserError(f"{file} is damaged (its numbers): {cure}")
    return info


def read_arrays(path, info):
    """-> values (n_chunks, K), visits, books and audit as values.json speaks of them, each compared
    with its checksum."""
    K = len(info["targets"])
    files = info["files"]
    cure = again(path)
    check_entries(files, {"values.npy": int, "ledger.npy": dict, "books.npy": dict}, path, cure)
    ledgers = [store.visit_dtype(K), store.visit_dtype(K, smoothed=True)]
    visits = read_records(path, "ledger", ledgers, files)
    of_books = [store.book_dtype(K), store.book_dtype(K, passes=False)]
    books = read_records(path, "books", of_books, files)
    if "audit.npy" in files:
        audit = read_records(path, "audit", [store.audit_dtype(K)], files)
    else:
        audit = np.zeros(0, store.audit_dtype(K))
    if len(visits) != len(books) * info["batch"]:
        what = f"ledger.npy has {len(visits)} visits, books.npy {len(books)} steps"
        raise UserError(f"{path}/values.json is damaged ({what}): {cure}")
    values = load_array(path / "values.npy", cure, np.float32)
    n_chunks = len(values)
    # an earlier version wrote (n_chunks,) for one target
    if values.shape not in ((n_chunks, K), (n_chunks,)) or values.size != n_chunks * K:
        raise UserError(f"{path}/values.npy does not fit values.json, {values.shape}: {cure}")
    values = values.reshape(n_chunks, K)
    if crc32(path / "values.npy") != files["values.npy"]:
        if len(store.read(path)) == len(visits):
            raise UserError(f"{path}/values.npy is damaged (its checksum does not fit): {cure}")
        # a commit is under way, or was cut off, and values.npy is ahead of values.json
        values = sum_up(path, visits, info, len(values))
    return values, visits, books, audit


def sum_up(path, visits, info, n_chunks):
    """The chunks' values (n_chunks, K) as sums over their visits; NaN = never used."""
    total = np.zeros((n_chunks, visits["value"].shape[1]))
    used = np.zeros(n_chunks, bool)
    for block in checked_blocks(path, visits, info["batch"], n_chunks):
        counted = store.late(block) if info.get("method") == "hindsight" else block
        store.add_visits(counted, total, used)
    return np.where(used[:, None], total, np.nan).astype(np.float32)


def read_records(path, name, dtypes, files):
    """The records of <name>.npy that values.json counts, memmapped. dtypes: those it may have."""
    cure = repair(path)
    file = path / f"{name}.npy"
    counted = files[file.name]
    store.check(path, {name: counted}, cure)
    written = store.read(path, name).dtype
    if "momentum_by_domain" in (written.names or ()):
        what = f"{file} has momentum by domain, which this version does not read"
        raise UserError(f"{what}: go on with the version that made it, or train again")
    records = load_array(file, cure, written if written in dtypes else dtypes[0])
    if len(records) < counted["rows"] or records.dtype.itemsize != counted["itemsize"]:
        what = f"{records.dtype} {records.shape} does not fit values.json"
        raise UserError(f"{file} is damaged, {what}: {cure}")
    return records[: counted["rows"]]


def checked_blocks(path, visits, batch, n_chunks):
    """Yields the visits, some whole steps at a time, with the rows that a step of fewer chunks
    leaves empty. Raises UserError where a stranger wrote some of chunks that are not there, or a
    value into an empty row."""
    size = -(-(2**20) // batch) * batch
    for start in range(0, len(visits), size):
        block = visits[start : start + size]
        chunks = store.filled(block)["chunk"]
        if len(chunks) and not 0 <= chunks.min() <= chunks.max() < n_chunks:
            raise UserError(f"{path}/ledger.npy speaks of chunks that are not there: {again(path)}")
        empty = block[block["chunk"] == store.NO_CHUNK]
        if empty["value"].any() or ("smoothed" in empty.dtype.names and empty["smoothed"].any()):
            raise UserError(f"{path}/ledger.npy has values of no chunk: {again(path)}")
        yield block


def is_revaluation(path):
    """Whether a folder is one that revalue.py made, below its run."""
    return Path(path).parent.name == "revalued"


def again(path):
    """What to type where a file of a run, or of a revaluation, is damaged."""
    path = Path(path)
    if is_revaluation(path):
        options = [f"--name={path.name}", "--overwrite"]
        revalue = terminal.command("python", "revalue.py", str(path.parent.parent), *options)
        return f"type: {revalue}, with the --targets and the method that it was made with"
    if is_trainers(path):
        return TRAINERS_CURE
    resume = terminal.command("python", "train.py", f"{path}/config.json", "--init_from=resume")
    return f"type: {resume}, which writes it again or says what is lost"


def repair(path):
    """What to type where records are damaged: those of a run of train.py can be repaired, others
    are made again."""
    path = Path(path)
    if is_revaluation(path) or is_trainers(path):
        return again(path)
    return "type: " + terminal.command("python", "revalue.py", str(path), "--repair")
