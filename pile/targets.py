"""Whose loss the values speak of: chunks of the validation set, or a text of the user's own."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pile.tokenizers import tokenizer
from system.errors import UserError
from system.terminal import listed


@dataclass
class Target:
    """Chunks whose mean token loss the values speak of."""

    name: str
    rows: np.ndarray  # (n, block_size + 1) integers; -1: no token (a short text's padding)
    ids: np.ndarray | None  # (n,) chunk ids in val.npy, None for a text of the user's own

    def batch(self, picks):
        """picks (b,) of its rows -> X, Y int64 (b, block_size); Y is -1 where nothing is to be
        predicted."""
        rows = self.rows[picks if self.ids is None else self.ids[picks]].astype(np.int64)
        return rows[:, :-1].clip(min=0), rows[:, 1:]

    def checksum(self):
        """Of a text, for its file may change. None of chunks of val.npy: the data's hash says it."""
        return zlib.crc32(self.rows.tobytes()) if self.ids is None else None

    def __len__(self):
        return len(self.rows if self.ids is None else self.ids)


def parse_targets(spec, dataset, block_size):
    """ "val", "val:Python code,val:Literature", "name=file.txt", or a mixture -> [Target, ...],
    names unique.

    A comma parts two targets; within a name or a path it is written \\,. A domain that is known by
    its commas needs none. Raises UserError for an unknown domain, a missing or empty text, a name
    used twice."""
    targets = []
    rows = dataset.val.rows[:, : block_size + 1]
    for part in split_targets(spec, dataset.domains):
        if part == "val":
            targets.append(Target("val", rows, np.arange(len(rows))))
        elif part.startswith("val:"):
            domain = part.removeprefix("val:")
            if domain not in dataset.domains:
                have = f"{dataset.path}; it has {listed(dataset.domains)}"
                raise UserError(f"--targets: no domain {domain!r} in {have}")
            ids = np.flatnonzero(dataset.val.domain == dataset.domains.index(domain))
            targets.append(Target(domain, rows, ids))
        elif part.partition("=")[0] and "=" in part:
            name, _, path = part.partition("=")
            tok = tokenizer(dataset.meta["tokenizer"])
            targets.append(Target(name, text_rows(path, tok, block_size), None))
        else:
            ways = "write val, val:<domain> or <name>=<file.txt> (a comma in a name or path as \\,)"
            raise UserError(f"--targets: {part!r} is no target: {ways}")
        if not len(targets[-1]):
            cure = "prepare with a larger --val_fraction"
            raise UserError(f"--targets: {part} has no chunk in {dataset.path}/val.npy: {cure}")
    names = [t.name for t in targets]
    if len(set(names)) < len(names):
        raise UserError(f"--targets: a name stands twice in {', '.join(names)}")
    return targets


def split_targets(spec, domains):
    """The targets' texts, parted at commas: not at those written \\,, and not within the longest
    name of a domain that stands there."""
    parts, comma = [], ","
    while comma:
        found = cut_at_domain(spec.lstrip(), domains)
        part, comma, spec = found or cut_at_comma(spec)
        parts.append(part if found else part.strip())  # a domain's blanks are its own
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


def cut_at_comma(text):
    """ "a\\,b,c" -> "a,b", ",", "c": at the first comma that is none of a name's."""
    head, comma, rest = text.partition(",")
    while comma and head.endswith("\\"):
        more, comma, rest = rest.partition(",")
        head = f"{head[:-1]},{more}"
    return head, comma, rest


def with_commas(text):
    """A name or a path as --targets takes it."""
    return text.replace(",", "\\,")


def text_rows(path, tok, block_size):
    """A text file -> int32 (n, block_size + 1): every token predicted once, from <|endoftext|> on,
    the last row padded with -1."""
    text = read_text(path, "--targets")
    if not text.strip():
        raise UserError(f"--targets: {path} holds no text")
    return rows_of_text(text, tok, block_size)


def rows_of_text(text, tok, block_size):
    tokens = tok.encode(text).astype(np.int32)
    n = -(-len(tokens) // block_size)
    padding = np.full(n * block_size - len(tokens), -1)
    stream = np.concatenate([[tok.eot], tokens, padding]).astype(np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(stream, block_size + 1)
    return windows[::block_size].copy()


def read_text(path, key):
    """A UTF-8 file's text as training text is read: with its line ends, without a byte order mark.
    Raises UserError, which names the option it was given to."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{key}: {path} cannot be read as UTF-8 text ({e})") from e
    except OSError as e:
        raise UserError(f"{key}: {path} cannot be read as UTF-8 text ({e.strerror})") from e
