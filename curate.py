"""
A run's values -> keep.npy: the chunks to train on next, and what was dropped, and why.

    python curate.py out/gpt2_inrun
        drops every chunk whose value is negative
    python curate.py out/gpt2_inrun --random --out=out/random
        its control: as many at random (--invert: those with the largest values)
    python curate.py out/gpt2_inrun --out=out/b --drop_fraction=.16 --per_domain
        the 16 % of each domain with the smallest values
    python curate.py out/gpt2_inrun --out=out/c --confidence=2
        only what is negative beyond two standard errors of its visits
    python curate.py out/gpt2_inrun --out=out/d --by=document --export=kept.jsonl.zst
        whole documents; the text of those kept for other trainers
    python train.py configs/gpt2_curated.py
        trains on out/gpt2_inrun/keep.npy

Leaves three files. keep.npy: int64, the numbers of chunks, ascending. keep.json: how it was made,
and counts by domain. dropped.npy: chunk, score, standard_error, in the order in which they were
dropped. Chunks that the run never used have no value: they stay, unless --unused=drop.

What has the smallest score is dropped. --score says what that is:
    value    a chunk's value: the sum over its visits, in nats
    share    the mean over its visits of the value relative to the mean absolute value of that
             step's chunks, so that early steps, where all values are large, count no more than
             later ones
    loss     for comparison: minus the mean loss of its visits
A document's score takes each visit of its chunks by the document's part of the chunk's tokens; a
chunk goes with the documents that hold most of them. The standard error of a single visit is not
known: with --confidence it stays.
"""

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
    drop_fraction: float = 0.0  # drop this share of the units with a score: those with the smallest
    confidence: float = 0.0  # drop only what is negative beyond so many standard errors
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
        at_least = {"drop_fraction": 0, "confidence": 0, "seed": 0}
        config.check(self, at_least=at_least, below={"drop_fraction": 1})
        if self.drop_fraction and self.confidence:
            what = "--drop_fraction says how many are dropped, --confidence which"
            raise UserError(f"{what}: write one of them")
        if not self.drop_fraction and (self.per_domain or self.score == "loss"):
            option = "--per_domain" if self.per_domain else "--score=loss"
            raise UserError(f"{option} needs a --drop_fraction: write --drop_fraction=.16")
        if self.invert and self.random:
            raise UserError("--invert drops the largest, --random any: write one of them")


# --- the choice -------------------------------------------------------------------


def choose(cfg, score, error, domain):
    """Units with their score, its standard error and their domain, each (n,) -> the indices of
    those that are dropped, the first to go first."""
    if cfg.confidence:
        score = np.nan_to_num(score + cfg.confidence * error, nan=np.inf)
    if cfg.random:
        order = np.random.default_rng(cfg.seed).permutation(len(score))
    elif cfg.invert:
        order = np.argsort(-score, kind="stable")
    else:
        order = np.argsort(score, kind="stable")
    if cfg.per_domain:
        groups = [order[domain[order] == d] for d in np.unique(domain)]
    else:
        groups = [order]
    is_dropped = np.zeros(len(score), bool)
    for group in groups:  # of each, the first to go
        if cfg.drop_fraction:
            count = round(cfg.drop_fraction * len(group))
        else:
            count = np.count_nonzero(score[group] < 0)
        is_dropped[group[:count]] = True
    return order[is_dropped[order]]


def kept_chunks(units, stays, n_chunks):
    """bool (n_chunks,): whether each chunk is kept, if of the units those stay, bool (n,)."""
    pieces = units.pieces
    if pieces is None:  # the units are the chunks
        return stays
    votes = np.where(stays[pieces.document], pieces.tokens, -pieces.tokens)
    # a chunk goes with the documents that hold most of it
    return np.bincount(pieces.chunk, votes, n_chunks) >= 0


def curate(cfg):
    """Writes keep.npy, keep.json and dropped.npy; returns what keep.json holds. Raises UserError,
    with what to type, and OSError, before anything is written."""
    if not cfg.run:
        raise UserError("no run given: name the folder of a run, as out/<the config's name>")
    if cfg.export:
        check_export(cfg.export)
    run = open_run(cfg.run, cfg.data_dir)
    out = Path(cfg.out or cfg.run)
    k = run.target(cfg.target)
    if (out / "keep.npy").exists() and not cfg.overwrite:
        cure = "--overwrite replaces it, --out=... puts this one elsewhere"
        raise UserError(f"{out}/keep.npy is there already: {cure}")
    units = chunk_scores(run, k, cfg.score)
    if cfg.by == "document":
        units = document_scores(run, units)
    scored = np.flatnonzero(units.visits)
    score, error = score_and_error(units, summed=cfg.score == "value")
    chosen = choose(cfg, score[scored], error[scored], units.domains[scored])
    dropped = scored[chosen]
    stays = np.ones(len(units.numbers), bool)
    stays[dropped] = False
    kept = kept_chunks(units, stays, len(run.values))
    if cfg.unused == "drop":
        kept = kept & ~np.isnan(run.values[:, k])
    if not kept.any():
        cure = "write --drop_fraction=.16, or another --target"
        raise UserError(f"nothing would be left to train on: {cure}")
    about = {
        "run": str(run.path),
        "data_hash": run.data.hash,
        "committed_step": run.info["committed_step"],
        "config": vars(cfg) | {"target": run.names[k]},
        "units": len(stays),
        "units_scored": len(scored),
        "units_negative": int((score[scored] < 0).sum()),
        "units_dropped": len(dropped),
        "chunks": len(kept),
        "chunks_kept": int(kept.sum()),
        "chunks_unused": len(kept) - len(run.used),
        "tokens_kept": int(kept.sum()) * run.width,
        "domains": by_domain(run, kept, k),
    }
    if cfg.export:
        write_texts(cfg.export, Documents(run), stays if cfg.by == "document" else None, kept)
    rows = np.zeros(len(dropped), [(cfg.by, "<i8"), ("score", "<f8"), ("standard_error", "<f8")])
    rows[cfg.by] = units.numbers[dropped]
    rows["score"] = score[dropped]
    rows["standard_error"] = error[dropped]
    out.mkdir(parents=True, exist_ok=True)
    about["files"] = {
        "dropped.npy": files.write_array(out / "dropped.npy", rows),
        "keep.npy": files.write_array(out / "keep.npy", np.flatnonzero(kept)),
    }
    files.write_json(out / "keep.json", about)
    return about


def by_domain(run, kept, k):
    """What becomes of each domain's chunks; value and value_kept: sums over them, in nats."""
    domain = run.data.train.domain
    n = len(run.domains)
    values = run.values[:, k].astype(float)
    known = np.nan_to_num(values)
    chunks = np.bincount(domain, minlength=n)
    used = np.bincount(domain[~np.isnan(values)], minlength=n)
    chunks_kept = np.bincount(domain[kept], minlength=n)
    value = np.bincount(domain, known, n)
    value_kept = np.bincount(domain, known * kept, n)
    rows = []
    for d in np.flatnonzero(chunks).tolist():
        rows.append(
            {
                "domain": run.domains[d],
                "chunks": int(chunks[d]),
                "used": int(used[d]),
                "kept": int(chunks_kept[d]),
                "value": float(value[d]),
                "value_kept": float(value_kept[d]),
            }
        )
    return rows


def main(cfg):
    commands.say_lines(commands.show_curated(curate(cfg)))


if __name__ == "__main__":
    commands.obey_signals()
    config.main(lambda: main(config.load(Config)))
