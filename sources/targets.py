"""Whose loss the values speak of: chunks of the validation set, or a text of the user's own."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sources.tokenizers import tokenizer


@dataclass
class Target:
    """Chunks whose mean token loss the values speak of."""

    name: str
    rows: np.ndarray  # (n, block_size + 1) integers; -1 where there is no token (a short text's padding)
    ids: np.ndarray | None  # (n,) chunk ids in val.npy, None for a text of the user's own

    def batch(self, picks):
        """picks (b,) of its rows -> X, Y int64 (b, block_size); Y is -1 where nothing is to be predicted."""
        rows = self.rows[picks if self.ids is None else self.ids[picks]].astype(np.int64)
        return rows[:, :-1].clip(min=0), rows[:, 1:]

    def __len__(self):
        return len(self.rows if self.ids is None else self.ids)


def parse_targets(spec, dataset, block_size):
    """ "val", "val:Python code,val:Literature", "name=file.txt", or a mixture -> [Target, ...], names unique.

    Raises ValueError for an unknown domain, a missing or empty text, a name used twice."""
    targets = []
    for part in map(str.strip, spec.split(",")):
        rows = dataset.val.rows[:, : block_size + 1]
        if part == "val":
            targets.append(Target("val", rows, np.arange(len(rows))))
        elif part.startswith("val:"):
            domain = part.removeprefix("val:")
            if domain not in dataset.domains:
                raise ValueError(f"--targets: no domain {domain!r} in {dataset.path}; it has {', '.join(dataset.domains)}")
            targets.append(Target(domain, rows, np.flatnonzero(dataset.val.domain == dataset.domains.index(domain))))
        elif "=" in part:
            name, path = part.split("=", 1)
            targets.append(Target(name, text_rows(path, tokenizer(dataset.meta["tokenizer"]), block_size), None))
        else:
            raise ValueError(f"--targets: {part!r} is no target: write val, val:<domain> or <name>=<file.txt>")
        if not len(targets[-1]):
            raise ValueError(f"--targets: {part} has no chunk in {dataset.path}/val.npy: prepare with a larger --val_fraction")
    names = [t.name for t in targets]
    if len(set(names)) < len(names):
        raise ValueError(f"--targets: a name stands twice in {', '.join(names)}")
    return targets


def text_rows(path, tok, block_size):
    """A text file -> int32 (n, block_size + 1): every token predicted once, from <|endoftext|> on, the last row padded with -1."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"--targets: {path} cannot be read as UTF-8 text ({e}): write <name>=<file.txt>") from e
    if not text.strip():
        raise ValueError(f"--targets: {path} holds no text")
    tokens = tok.encode(text).astype(np.int32)
    n = -(-len(tokens) // block_size)
    stream = np.concatenate([[tok.eot], tokens, np.full(n * block_size - len(tokens), -1)]).astype(np.int32)
    return np.lib.stride_tricks.sliding_window_view(stream, block_size + 1)[::block_size].copy()
