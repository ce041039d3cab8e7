"""Numbered chunks in memmapped arrays, the order they are trained in, and the targets' chunks.

A data folder holds train.npy and val.npy, uint16 (n_chunks, block_size + 1), or uint32 where the
tokenizer has more than 65,536 tokens; one domain a chunk (train_domain.npy, val_domain.npy), one
row a document (train_docs.parquet, val_docs.parquet) and meta.json; prepare_pile.py writes it. Of
pairs of prompt and answer it also holds where in its row each answer lies (train_answer.npy,
val_answer.npy), for only answers have labels. Row i of train.npy is chunk i everywhere else: in the
ledger, in values.npy, in a report.
"""

import hashlib
import json
import mmap
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pile.files import suffixes
from pile.tokenizers import FILE, TOKENIZERS, token_type, tokenizer
from system import terminal
from system.errors import UserError, explain
from system.files import check_entries, crc32, data_of, footer_crc32, load_array, read_json

SCHEMA = 3  # of meta.json
PAIRS = 4  # the same of a data set of pairs, which earlier versions would learn the prompts of
CHECKED = 128 << 20  # bytes that are compared with their sha256 at every start: a blink
ARRAYS = ("train.npy", "val.npy", "train_domain.npy", "val_domain.npy")
ANSWERS = ("train_answer.npy", "val_answer.npy")  # of a data set of pairs
DATA_FILES = [*ARRAYS, "train_docs.parquet", "val_docs.parquet", "meta.json"]
ENTRIES = {"schema": int, "tokenizer": str, "vocab_size": int, "eot": int, "block_size": int}
ENTRIES |= {"domains": list, "chunks": dict, "sha256": dict, "config": dict, "tokens": dict}
ENTRIES |= {"footers": dict}

# --- a prepared data folder ---------------------------------------------------


@dataclass
class Split:
    rows: np.ndarray  # uint16 or uint32 (n_chunks, block_size + 1), memmapped
    domain: np.ndarray  # uint16 (n_chunks,), index into Dataset.domains
    file: object  # the open file of rows
    # of pairs, uint32 (n_chunks, 2 * pairs_per_chunk), memmapped: a row's tokens from the first to
    # before the second are an answer and its <eot>, those from the third to before the fourth are
    # the next one; 0, 0 where a row has no more
    answer: np.ndarray | None = None

    def batch(self, ids, block_size):
        """ids (b,) -> X, Y int64 (b, block_size): the first block_size tokens of each chunk, and
        the tokens after them; of pairs -1 for those that are not of an answer. Raises UserError
        where the file was cut short meanwhile: reading behind its end would kill the process."""
        if os.fstat(self.file.fileno()).st_size < self.rows.offset + self.rows.nbytes:
            raise UserError(f"{self.file.name} was cut short while it was read: prepare it again")
        rows = self.rows[ids, : block_size + 1].astype(np.int64)
        answer = None if self.answer is None else self.answer[ids]
        return rows[:, :-1], labels_of(rows, answer)

    def n_labels(self, block_size, ids=slice(None)):
        """How many labels the chunks ids (all of them) have in batch(): int64 (n,)."""
        if self.answer is None:
            return np.full(len(self.domain[ids]), block_size)
        first, end = bounds(self.answer[ids])
        return (np.minimum(end, block_size + 1) - first).clip(min=0).sum(1)

    def text(self, chunk):
        """Which tokens of a chunk's row are text, a slice: of pairs not what stands around them."""
        if self.answer is None:
            return slice(0, None)
        return slice(1, int(self.answer[chunk].max()) - 1)


def bounds(answer):
    """answer (b, 2 n) -> where the answers begin, and where they end, int64 (b, n) each."""
    answer = np.asarray(answer, np.int64)
    return answer[:, 0::2], answer[:, 1::2]


def labels_of(rows, answer):
    """rows int64 (b, T + 1) -> what they predict, Y (b, T): all tokens but the first, or, where
    answer (b, 2 n) says where the answers lie, only theirs, and -1 for the others."""
    if answer is None:
        return rows[:, 1:]
    place = np.arange(1, rows.shape[1])
    first, end = (bound[:, :, None] for bound in bounds(answer))
    is_label = ((first <= place) & (place < end)).any(1)
    return np.where(is_label, rows[:, 1:], -1)


@dataclass
class Dataset:
    path: Path
    meta: dict
    train: Split
    val: Split
    # int64: the chunks to train on, where not all. One that stands twice is met twice in a pass
    keep: np.ndarray | None = None

    @property
    def domains(self):
        return self.meta["domains"]

    @property
    def is_pairs(self):
        """Whether its chunks are pairs of prompt and answer."""
        return self.meta["schema"] == PAIRS

    @property
    def tokenizer(self):
        name = self.meta["tokenizer"]
        return tokenizer(str(self.path / FILE) if name == FILE else name)

    @property
    def hash(self):
        """One sha256 for the arrays: what a run's values belong to."""
        sums = {name: self.meta["sha256"][name] for name in sorted(arrays(self.meta))}
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()

    def ids(self, step, batch, seed):
        """The ids (batch,) of step's chunks. Each pass meets every chunk, or every kept one, in an
        order of its own."""
        if self.keep is None:
            return global_batch(step, batch, len(self.train.rows), seed)
        positions = global_batch(step, batch, len(self.keep), seed)
        return np.asarray(self.keep[positions], np.int64)

    def verify(self, names=None):
        """Reads files of the folder, all by default. Raises UserError, saying what to type, if one
        is not as it was written."""
        for name in self.meta["sha256"] if names is None else names:
            with open(self.path / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.meta["sha256"][name]:
                what = f"{self.path}/{name} is damaged, its sha256 is not meta.json's"
                raise UserError(f"{what}: {self.prepare_again()}")

    def check_table(self, name):
        """Raises UserError where a table of documents is not as it was written: by its sha256, or,
        where it is large, by its footer's checksum (its pages have their own)."""
        path = self.path / name
        try:
            if path.stat().st_size <= CHECKED:
                self.verify([name])
            elif footer_crc32(path) != self.meta["footers"].get(name):
                raise UserError(f"{path} is damaged (its footer): {self.prepare_again()}")
        except OSError as e:
            what = f"{path} is missing or damaged ({e.strerror})"
            raise UserError(f"{what}: {self.prepare_again()}") from e

    def prepare_again(self):
        """What to type where a file is damaged."""
        return prepare_again(self.path, self.meta)


def open_dataset(data_dir, keep=""):
    """Opens a data folder; keep: a file that says which chunks to train on (curate.py). Raises
    UserError, saying what to type, where the folder is missing, unfinished or does not fit its
    meta.json, or keep does not fit the folder."""
    path = Path(data_dir)
    again = terminal.command("python", "prepare_pile.py", f"--data_dir={data_dir}")
    if not (path / "meta.json").is_file():
        raise UserError(f"no prepared data in {path}: type: {again}")
    meta = read_json(path / "meta.json", f"type: {again} --overwrite", {"schema": int})
    if meta["schema"] not in (SCHEMA, PAIRS):
        what = f"{path}/meta.json has schema {meta['schema']}, this code reads {SCHEMA} and {PAIRS}"
        raise UserError(f"{what}: type: {again} --overwrite")
    check_meta(meta, path, f"type: {again} --overwrite")
    dataset = Dataset(path, meta, open_split(path, meta, "train"), open_split(path, meta, "val"))
    checked = small_arrays(path, meta)
    dataset.verify([*checked, FILE] if meta["tokenizer"] == FILE else checked)
    for split, name in ((dataset.train, "train_domain.npy"), (dataset.val, "val_domain.npy")):
        if name in checked and (split.domain >= len(meta["domains"])).any():
            what = f"{path}/{name} is damaged, a chunk has a domain that meta.json does not name"
            raise UserError(f"{what}: {prepare_again(path, meta)}")
    if keep:
        dataset.keep = read_keep(Path(keep), dataset)
    return dataset


def arrays(meta):
    """The names of a data folder's arrays."""
    return (*ARRAYS, *ANSWERS) if meta["schema"] == PAIRS else ARRAYS


def tokenizer_of_run(run, checkpoint):
    """The tokenizer of a run's data, by a checkpoint of it. Raises UserError where it came as a
    file, and the data that has a copy of it is not there any more."""
    name = checkpoint["tokenizer"]
    if name != FILE:
        return tokenizer(name)
    dataset = open_dataset(data_of(run, str(checkpoint["config"].get("data_dir", ""))))
    if dataset.hash != checkpoint["data_hash"]:
        what = f"{dataset.path} is not the data of {run} (its hash differs)"
        raise UserError(f"{what}: put the run's data back, for its tokenizer")
    return dataset.tokenizer


def small_arrays(path, meta):
    """The arrays that are compared with their sha256 whenever a data folder is opened: the smallest
    ones, CHECKED bytes in all."""
    sizes = {name: (path / name).stat().st_size for name in arrays(meta)}
    found, total = [], 0
    for name in sorted(sizes, key=sizes.get):
        total += sizes[name]
        if total <= CHECKED:
            found.append(name)
    return found


def check_meta(meta, path, cure):
    """Raises UserError where an entry of meta.json is missing or of another type."""
    check_entries(meta, ENTRIES, path / "meta.json", cure)
    for key in ("chunks", "tokens"):
        check_entries(meta[key], {"train": int, "val": int}, path / "meta.json", cure)
    names = [*arrays(meta), *DATA_FILES[len(ARRAYS) : -1]]
    check_entries(meta["sha256"], dict.fromkeys(names, str), path / "meta.json", cure)
    if not all(isinstance(name, str) for name in meta["domains"]):
        raise UserError(f"{path}/meta.json is damaged (a domain is no text): {cure}")
    if meta["tokenizer"] == FILE:
        check_entries(meta["sha256"], {FILE: str}, path / "meta.json", cure)
    elif meta["tokenizer"] not in TOKENIZERS:
        have = ", ".join(TOKENIZERS)
        raise UserError(f"{path} is of a tokenizer {meta['tokenizer']!r}; there is {have}: {cure}")


def open_split(path, meta, name):
    cure = prepare_again(path, meta)
    n = meta["chunks"][name]
    shape = (n, meta["block_size"] + 1)
    rows = load_array(path / f"{name}.npy", cure, token_type(meta["vocab_size"]), shape)
    # else the system reads ahead of every row, on some machines 8 MB for 2 KB
    rows.base.madvise(mmap.MADV_RANDOM)
    domain = load_array(path / f"{name}_domain.npy", cure, np.uint16, (n,))
    answer = None
    if meta["schema"] == PAIRS:
        columns = 2 * prepared_with(meta, "pairs_per_chunk")
        answer = load_array(path / f"{name}_answer.npy", cure, np.uint32, (n, columns))
        if not lie_within(answer, shape[1]):
            what = f"{path}/{name}_answer.npy is damaged, an answer is not within its row"
            raise UserError(f"{what}: {cure}")
    return Split(rows, domain, open(path / f"{name}.npy", "rb"), answer)


def lie_within(answer, width):
    """Whether each row of answer (n, 2 m) holds one answer or more, one behind the other and none
    behind the row's width tokens, and zeros after them."""
    first, end = bounds(answer)
    is_used = np.arange(first.shape[1]) < np.count_nonzero(end, axis=1)[:, None]
    before = np.pad(end, ((0, 0), (1, 0)), constant_values=1)[:, :-1]  # where the last one ended
    is_right = (before <= first) & (first < end) & (end <= width)
    is_right = np.where(is_used, is_right, (first == 0) & (end == 0))
    return bool(is_right.all() and is_used[:, 0].all())


# the options of prepare_pile.py that decide what is written, with their defaults
PREPARED_BY = {"source": "", "dataset": "monology/pile-uncopyrighted", "text_key": "text"}
PREPARED_BY |= {"domain_key": "meta.pile_set_name", "domains": "", "tokenizer": "gpt2"}
PREPARED_BY |= {"block_size": 1024, "val_fraction": 0.01, "limit_tokens": 0}
PREPARED_BY |= {"prompt_key": "", "answer_key": "", "pairs_per_chunk": 1}
PREPARED_BY |= {"follow_links": False, "max_document_mb": 64}


def prepared_with(meta, key):
    """An option that a data folder was prepared with; its default where meta.json has none, or one
    of another type."""
    default = PREPARED_BY[key]
    value = meta["config"].get(key, default)
    return value if type(value) is type(default) else default


def prepare_again(path, meta):
    """What to type for a data folder to be prepared again, from the options that made it. It is put
    together here, for meta.json may come from a stranger."""
    words = [f"--data_dir={path}"]
    for key, default in PREPARED_BY.items():
        value = prepared_with(meta, key)
        if value != default:
            words.append(f"--{key}={value}")
    return "type: " + terminal.command("python", "prepare_pile.py", *words, "--overwrite")


KEEP_CURE = "name a file that curate.py wrote"


def read_keep(path, dataset):
    """keep.npy -> the chunks' numbers (n,), memmapped. The keep.json that curate.py writes beside
    it says of which data they are, and its checksum."""
    ids = load_array(path, KEEP_CURE)
    n = len(dataset.train.rows)
    is_list = ids.ndim == 1 and ids.dtype.kind in "iu" and len(ids)
    if not is_list or not 0 <= ids.min() <= ids.max() < n:
        wanted = f"it must hold numbers of chunks, integers from 0 to {n - 1}"
        what = f"is {ids.dtype} {ids.shape}; {wanted}"
        raise UserError(f"--keep={path} {what}: {KEEP_CURE} for {dataset.path}")
    about = path.with_suffix(".json")
    if about.is_file():
        check_keep(path, read_json(about, KEEP_CURE, {"data_hash": str, "files": dict}), dataset)
    return ids


def check_keep(path, about, dataset):
    if about["data_hash"] != dataset.hash:
        what = f"--keep={path} names chunks of other data than {dataset.path} (its hash differs)"
        raise UserError(f"{what}: name the run's data with --data_dir=...")
    if about["files"].get(path.name) != crc32(path):
        raise UserError(f"--keep={path} is damaged: its checksum does not fit: {KEEP_CURE}")


# --- the order of chunks ------------------------------------------------------


def permute(positions, n, key):
    """Positions in 0..n-1 -> the chunks that stand there in the key's pseudo-random permutation of
    0..n-1.

    positions: int array; key: tuple of ints. A Feistel network over the next power of four, walked
    until it lands below n. Any position costs the same and nothing is stored, for a hundred chunks
    or for 300 million.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(key).generate_state(8, np.uint64)

    def network(x):
        left, right = x >> half, x & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right + round_key) & mask)
        return left << half | right

    x = network(np.asarray(positions, np.uint64))
    outside = x >= n
    while outside.any():
        x[outside] = network(x[outside])
        outside = x >= n
    return x.astype(np.int64)


def mix(z):
    """splitmix64's mixing of uint64 arrays, which wrap around silently."""
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return z ^ (z >> np.uint64(32))


def global_batch(step, batch, n, seed):
    """The ids (batch,) of step's chunks: a pure function of its arguments. Each epoch is a
    permutation of all n chunks."""
    epoch, position = np.divmod(np.arange(step * batch, (step + 1) * batch), n)
    ids = np.empty(batch, np.int64)
    for e in np.unique(epoch):
        ids[epoch == e] = permute(position[epoch == e], n, (seed, int(e)))
    return ids


# --- targets: whose loss the values speak of ----------------------------------


@dataclass
class Target:
    """Chunks whose mean token loss the values speak of."""

    name: str
    rows: np.ndarray  # (n, block_size + 1) integers; -1: no token (a short text's padding)
    ids: np.ndarray | None  # (n,) chunk ids in val.npy, None for a text of the user's own
    notes: tuple = ()  # lines that a reader of its values should know, mostly none
    answer: np.ndarray | None = None  # of pairs, where in each of rows the answer lies: see Split

    def batch(self, picks):
        """picks (b,) of its rows -> X, Y int64 (b, block_size); Y is -1 where nothing is to be
        predicted."""
        places = picks if self.ids is None else self.ids[picks]
        rows = self.rows[places].astype(np.int64)
        answer = None if self.answer is None else self.answer[places]
        return rows[:, :-1].clip(min=0), labels_of(rows, answer)

    def checksum(self):
        """CRC-32 of a text, whose file may change; None of chunks of val.npy, which the data's hash
        covers."""
        if self.ids is not None:
            return None
        answers = b"" if self.answer is None else self.answer.tobytes()
        return zlib.crc32(self.rows.tobytes() + answers)

    def __len__(self):
        return len(self.rows if self.ids is None else self.ids)


def own_targets(spec, dataset, block_size):
    """Of the targets that parse_targets() makes, those of files."""
    files = [part for part in split_targets(spec, dataset.domains) if is_file_target(part)]
    return [parse_target(part, dataset, block_size) for part in files]


def is_file_target(part):
    return part != "val" and not part.startswith("val:")


def parse_targets(spec, dataset, block_size):
    """ "val", "val:Python code,val:Literature", "name=file.jsonl", or a mixture -> [Target, ...],
    names unique.

    A comma parts two targets; within a name or a path it is written \\,. A domain that is known by
    its commas needs none. Raises UserError for an unknown domain, a missing or empty text, a name
    used twice."""
    targets = []
    for part in split_targets(spec, dataset.domains):
        target = parse_target(part, dataset, block_size)
        if not len(target):
            before = prepared_with(dataset.meta, "val_fraction")
            cure = f"prepare with more than --val_fraction={before}"
            raise UserError(f"--targets: {part} has no chunk in {dataset.path}/val.npy: {cure}")
        targets.append(target)
    names = [target.name for target in targets]
    if len(set(names)) < len(names):
        raise UserError(f"--targets: a name stands twice in {', '.join(names)}")
    return targets


def parse_target(part, dataset, block_size):
    if part == "val":
        ids = np.arange(len(dataset.val.rows))
        return validation_target("val", ids, dataset, block_size, validation_notes(dataset))
    if part.startswith("val:"):
        domain = part.removeprefix("val:")
        if domain not in dataset.domains:
            there = terminal.listed([terminal.with_commas(name) for name in dataset.domains])
            have = f"{dataset.path}; it has {there} (a comma within a name is written \\,)"
            raise UserError(f"--targets: no domain {domain!r} in {have}")
        ids = np.flatnonzero(dataset.val.domain == dataset.domains.index(domain))
        return validation_target(domain, ids, dataset, block_size)
    name, equals, file = part.partition("=")
    if not name or not equals:
        ways = (
            "write val, val:<domain> or <name>=<file.txt> (also .jsonl, .parquet; a comma as \\,)"
        )
        raise UserError(f"--targets: {part!r} is no target: {ways}")
    return file_target(name, file, dataset, block_size)


def validation_target(name, ids, dataset, block_size, notes=()):
    """The target of some chunks of val.npy: of those that have a label."""
    val = dataset.val
    has_label = val.n_labels(block_size, ids) > 0
    if not has_label.all():
        n = np.count_nonzero(~has_label)
        what = f"{name}: {n} of {len(ids)} chunks have no label within --block_size={block_size}"
        notes = (*notes, f"{what}: they are left out")
    return Target(name, val.rows[:, : block_size + 1], ids[has_label], notes, val.answer)


def validation_notes(dataset):
    """What to know of the target val: which domains it does not speak of."""
    chunks = np.bincount(dataset.val.domain, minlength=len(dataset.domains))
    missing = [dataset.domains[i] for i in np.flatnonzero(chunks == 0)]
    if not missing:
        return ()
    have = "has" if len(missing) == 1 else "have"
    of_all = f"{len(missing)} of {len(dataset.domains)} domains {have} no validation chunk"
    before = prepared_with(dataset.meta, "val_fraction")
    cure = f"for them to be in it, prepare with more than --val_fraction={before}"
    return (f"val: {of_all} ({terminal.listed(missing, 5)}): {cure}",)


def split_targets(spec, domains):
    """The targets' texts, parted at commas: not at those written \\,, and not within the longest
    name of a domain that stands there."""
    parts = []
    comma = ","
    while comma:
        at_domain = cut_at_domain(spec.lstrip(), domains)
        if at_domain:  # a domain's blanks are its own
            part, comma, spec = at_domain
        else:
            part, comma, spec = terminal.cut_at_comma(spec)
            part = part.strip()
        parts.append(part)
    return parts


def cut_at_domain(text, domains):
    """ "val:a, b,val" -> "val:a, b", ",", "val" where "a, b" is a domain; None where there is none
    at the beginning."""
    for domain in sorted(domains, key=len, reverse=True):
        name = f"val:{domain}"
        before, comma, rest = text[len(name) :].partition(",")
        if text.startswith(name) and not before.strip():
            return name, comma, rest
    return None


# --- targets of the user's own ------------------------------------------------

FEW_TOKENS = 100  # the loss of so short a text is mostly noise


def file_target(name, file, dataset, block_size):
    """The target called name, of a file: "notes.txt", "val.jsonl", or "val.jsonl:content" where the
    texts stand under another key than in the data. Raises UserError."""
    path, key = cut_at_key(file)
    skipped = ""
    answer = None
    try:
        if holds_records(path):
            documents, skipped = record_documents(name, path, key, dataset, block_size)
            if dataset.is_pairs:
                rows, answer = rows_of_pairs(documents, block_size, dataset.tokenizer)
            else:
                tokens = np.concatenate([tokens for tokens, _ in documents])
                rows = rows_of_stream(behind_eot(tokens, dataset.tokenizer), block_size)
        else:
            rows = rows_of_stream(text_stream(path, dataset.tokenizer), block_size)
    except OSError as e:
        raise UserError(f"--targets: {explain(e)}") from e
    notes = []
    if skipped:
        notes.append(f"{name}: skipped in {path}: {skipped}")
    target = Target(name, rows, None, answer=answer)
    n_labels = np.count_nonzero(target.batch(np.arange(len(rows)))[1] >= 0)
    if n_labels < FEW_TOKENS:
        tokens = "1 token" if n_labels == 1 else f"{n_labels} tokens"
        notes.append(f"{name}: {tokens}: values for so short a text are mostly noise")
    target.notes = tuple(notes)
    return target


def holds_records(path):
    """Whether a file's name says that it holds records, with their texts under a key."""
    return suffixes(path)[0] not in ("", ".txt")


def cut_at_key(file):
    """ "val.jsonl:content" -> "val.jsonl", "content". The key is empty where there is none."""
    path, colon, key = file.rpartition(":")
    if colon and holds_records(path) and not os.path.exists(file):
        return path, key
    return file, ""


def record_documents(name, path, key, dataset, block_size):
    """A file of records -> [(tokens, answer)] of its documents, as pile.texts.file_tokens() makes
    them, and what was skipped, in words. Raises UserError and OSError."""
    # not above: pyarrow takes its time, and most runs have no such target
    from pile.parquet import MissingColumn
    from pile.texts import Reading, file_tokens

    reading = Reading(
        text_key=key or prepared_with(dataset.meta, "text_key"),
        domain_key=prepared_with(dataset.meta, "domain_key"),
        max_document_mb=prepared_with(dataset.meta, "max_document_mb"),
    )
    if dataset.is_pairs:
        if key:
            what = f"--targets: {path}:{key} names one key, and {dataset.path} is of pairs"
            raise UserError(f"{what}: leave :{key} out; the keys are those of the data")
        reading.prompt_key = prepared_with(dataset.meta, "prompt_key")
        reading.answer_key = prepared_with(dataset.meta, "answer_key")
        reading.block_size = block_size
    try:
        documents, skipped = file_tokens(path, reading, dataset.tokenizer)
    except MissingColumn:
        documents, skipped = [], {}
    reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.items())
    if not documents:
        refuse_textless(name, path, reading, reasons)
    return documents, reasons


def refuse_textless(name, path, reading, reasons):
    """Raises the UserError of a target's file without a text under the key."""
    from pile.keys import look

    keys = look([path], reading)
    parts = [f"skipped: {reasons}" if reasons else "", keys.named()]
    known = "; ".join(part for part in parts if part) or "it is empty"
    if reading.answer_key:
        pair = f"{reading.prompt_key!r} and {reading.answer_key!r}"
        raise UserError(f"--targets: {path} has no pair under {pair} ({known}): name another file")
    cure = "name another file"
    key = keys.longest_text()
    if key and not keys.with_text:
        target = "=".join([name, f"{path}:{key}"])
        cure = f"type {terminal.command('--targets=' + terminal.with_commas(target))}"
    raise UserError(f"--targets: {path} has no text under {reading.text_key!r} ({known}): {cure}")


def text_stream(path, tok):
    """A text file -> int32 (n,): its tokens behind an <eot>. Raises UserError and OSError."""
    text = read_text(path, "--targets")
    if not text.strip():
        raise UserError(f"--targets: {path} holds no text")
    return behind_eot(tok.encode(text), tok)


def behind_eot(tokens, tok):
    """Tokens (n,) -> int32 (n + 1,)."""
    stream = np.empty(len(tokens) + 1, np.int32)
    stream[0] = tok.eot
    stream[1:] = tokens
    return stream


def rows_of_stream(stream, block_size):
    """Tokens int32 (n,) -> int32 (rows, block_size + 1): every token but the first is predicted
    once, the last row padded with -1."""
    n = -(-(len(stream) - 1) // block_size)
    padding = np.full(n * block_size - (len(stream) - 1), -1, np.int32)
    stream = np.concatenate([stream, padding])
    windows = np.lib.stride_tricks.sliding_window_view(stream, block_size + 1)
    return windows[::block_size].copy()


def rows_of_pairs(documents, block_size, tok):
    """Pairs [(tokens, answer)] -> int32 (n, block_size + 1), each a row filled up with <eot>, and
    where the answers lie, int64 (n, 2): see Split."""
    rows = np.full((len(documents), block_size + 1), tok.eot, np.int32)
    answers = np.empty((len(documents), 2), np.int64)
    for i, (tokens, answer) in enumerate(documents):
        rows[i, : len(tokens)] = tokens
        answers[i] = answer, len(tokens)
    return rows, answers


def read_text(path, key):
    """A UTF-8 file's text as training text is read: with its line ends, without a byte order mark,
    unpacked where it is a packed .txt. Raises UserError, which names the option it was given to."""
    # not above: to train on prepared chunks Python, torch and numpy do
    from pile.unpack import unpacked

    kind, packed = suffixes(str(path))
    try:
        with open(path, "rb") as raw:
            content = unpacked(raw, path, packed if kind == ".txt" else "").read()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{key}: {path} cannot be read as UTF-8 text ({e})") from e
    except OSError as e:
        raise UserError(f"{key}: {explain(e)}") from e
