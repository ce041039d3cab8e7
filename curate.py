"""
A run's values -> keep.npy: the chunks to train on next, and what was dropped, and why.

    python curate.py out/gpt2_inrun                                        drops every chunk whose value is negative
    python curate.py out/gpt2_inrun --random --out=out/random              its control: as many at random (--invert: those with the largest values)
    python curate.py out/gpt2_inrun --out=out/b --drop_fraction=.16 --per_domain       the 16 % of each domain with the smallest values
    python curate.py out/gpt2_inrun --out=out/c --confidence=2             only what is negative beyond two standard errors of its visits
    python curate.py out/gpt2_inrun --out=out/d --by=document --export=kept.jsonl.zst  whole documents; the text of those kept for other trainers
    python train.py config/gpt2_curated.py                                 trains on out/gpt2_inrun/keep.npy

Leaves keep.npy (int64, numbers of chunks, ascending), keep.json (how it was made, and counts by domain) and dropped.npy (chunk, score,
standard_error, in the order in which they were dropped). Chunks that the run never used have no value: they stay, unless --unused=drop.

What has the smallest score is dropped. --score=value: a chunk's value, the sum over its visits, in nats. share: the mean over its visits of the value
relative to the mean absolute value of that step's chunks, so that early steps, where all values are large, count no more than later ones. loss: for
comparison, minus the mean loss of its visits. A document's score takes each visit of its chunks by the document's part of the chunk's tokens; a chunk
goes with the documents that hold most of them.
"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import config
from show import commands
from show.documents import Documents, check_export, write_texts
from show.run import open_run
from show.scores import chunk_scores, document_scores, score_and_error
from system import files
from system.errors import UserError


@dataclass
class Config:
    run: str = ""  # the run's folder
    drop: Literal["negative"] = "negative"  # what goes, where no --drop_fraction says how much
    drop_fraction: float = (
        0.0  # drop this share of the units that have a score, those with the smallest
    )
    confidence: float = 0.0  # drop only what is negative beyond so many standard errors; a single visit has none, and stays
    per_domain: bool = False  # this share of each domain, so that the mixture stays as it is
    by: Literal["chunk", "document"] = "chunk"  # the unit that is kept or dropped
    score: Literal["value", "share", "loss"] = "value"  # what the smallest of is dropped, see above
    target: str = ""  # one of the run's targets; empty: its first
    invert: bool = False  # a control: as many, with the largest scores
    random: bool = False  # a control: as many, at random
    seed: int = 1337  # of --random
    unused: Literal["keep", "drop"] = "keep"  # chunks that the run never used
    out: str = ""  # the folder for keep.npy; empty: the run's
    overwrite: bool = False  # replace a keep.npy that is there
    export: str = ""  # the texts kept, for other trainers: a .jsonl.zst, .jsonl or .parquet file
    data_dir: str = ""  # where the run's data is now, if it moved

    def __post_init__(self):
        least = {"drop_fraction": 0, "confidence": 0, "seed": 0}
        config.check(self, at_least=least, below={"drop_fraction": 1})
        if self.drop_fraction and self.confidence:
            raise UserError(
                "--drop_fraction says how many are dropped, --confidence which: write one of them"
            )
        if not self.drop_fraction and (self.per_domain or self.score == "loss"):
            raise UserError(
                f"{'--per_domain' if self.per_domain else '--score=loss'} needs a --drop_fraction: write --drop_fraction=.16"
            )
        if self.invert and self.random:
            raise UserError("--invert drops the largest, --random any: write one of them")


# --- the choice -------------------------------------------------------------------


def choose(cfg, score, error, domain):
    """Units with their score, its standard error and their domain, each (n,) -> those dropped, the first to go first."""
    if cfg.confidence:
        score = np.nan_to_num(score + cfg.confidence * error, nan=np.inf)
    groups = (
        [np.flatnonzero(domain == d) for d in np.unique(domain)]
        if cfg.per_domain
        else [np.arange(len(score))]
    )
    counts = [
        round(cfg.drop_fraction * len(group)) if cfg.drop_fraction else np.count_nonzero(score < 0)
        for group in groups
    ]
    order = (
        np.random.default_rng(cfg.seed).permutation(len(score))
        if cfg.random
        else np.argsort(-score if cfg.invert else score, kind="stable")
    )
    place = np.argsort(order)
    dropped = np.concatenate(
        [group[np.argsort(place[group])[:n]] for group, n in zip(groups, counts)]
    )
    return dropped[np.argsort(place[dropped])]


def curate(cfg):
    """Writes keep.npy, keep.json and dropped.npy. Returns what keep.json holds and a sample of the chunks dropped. Raises ValueError and
    OSError, with what to type, before anything is written."""
    if not cfg.run:
        raise UserError("no run given: name the folder of a run, as out/<the config's name>")
    if cfg.export:
        check_export(cfg.export)
    run = open_run(cfg.run, cfg.data_dir)
    out, k, domain = (
        Path(cfg.out or cfg.run),
        run.target(cfg.target),
        np.asarray(run.data.train.domain),
    )
    if (out / "keep.npy").exists() and not cfg.overwrite:
        raise UserError(
            f"{out}/keep.npy is there already: --overwrite replaces it, --out=... puts this one elsewhere"
        )
    moments, numbers, of_domain, lie = (
        chunk_scores(run, k, cfg.score),
        np.arange(len(domain)),
        domain,
        None,
    )
    if cfg.by == "document":
        moments, numbers, of_domain, lie = document_scores(run, moments)
    scored = np.flatnonzero(moments[0])
    score, error = score_and_error(*(of[scored] for of in moments), summed=cfg.score == "value")
    chosen = choose(cfg, score, error, of_domain[scored])
    stays = np.ones(len(of_domain), bool)
    stays[scored[chosen]] = False
    kept = (
        stays
        if lie is None
        else np.bincount(lie[1], np.where(stays[lie[0]], lie[2], -lie[2]), len(domain)) >= 0
    )
    if cfg.unused == "drop":
        kept = kept & ~np.isnan(run.values[:, k])
    if not kept.any():
        raise UserError(
            "nothing would be left to train on: write --drop_fraction=.16, or another --target"
        )
    found = dict(
        run=str(run.path),
        data_hash=run.data.hash,
        committed_step=run.info["committed_step"],
        config=vars(cfg) | dict(target=run.names[k]),
    )
    found |= dict(
        units=len(stays),
        units_scored=len(scored),
        units_negative=int((score < 0).sum()),
        units_dropped=len(chosen),
    )
    found |= dict(
        chunks=len(kept),
        chunks_kept=int(kept.sum()),
        chunks_unused=len(kept) - len(run.used),
        tokens_kept=int(kept.sum()) * run.width,
    )
    found |= dict(domains=by_domain(run, kept, k))
    if cfg.export:
        write_texts(cfg.export, Documents(run), stays if lie is not None else None, kept)
    dropped = np.zeros(len(chosen), [(cfg.by, "<i8"), ("score", "<f8"), ("standard_error", "<f8")])
    for name, column in zip(dropped.dtype.names, (numbers[scored], score, error)):
        dropped[name] = column[chosen]
    out.mkdir(parents=True, exist_ok=True)
    found["files"] = {"dropped.npy": files.write_array(out / "dropped.npy", dropped)}
    found["files"]["keep.npy"] = files.write_array(out / "keep.npy", np.flatnonzero(kept))
    files.write_json(out / "keep.json", found)
    return found


def by_domain(run, kept, k):
    """What becomes of each domain's chunks; value: the sum over them, in nats."""
    domain, values = run.data.train.domain, run.values[:, k].astype(float)
    count = dict(chunks=kept >= 0, used=~np.isnan(values), kept=kept)
    count = {
        key: np.bincount(domain[of], minlength=len(run.domains)).tolist()
        for key, of in count.items()
    }
    total = dict(value=np.nan_to_num(values), value_kept=np.nan_to_num(values) * kept)
    total = {key: np.bincount(domain, x, len(run.domains)).tolist() for key, x in total.items()}
    rows = [
        dict(domain=name) | {key: x[d] for key, x in (count | total).items()}
        for d, name in enumerate(run.domains)
    ]
    return [row for row in rows if row["chunks"]]


def main(cfg):
    commands.say_lines(commands.show_curated(curate(cfg)))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # the way out of Ctrl-C: no file is left half-written
    config.main(lambda: main(config.load(Config)))
