"""
A run's values -> keep.npy: the chunks to train on next, and what was dropped, and why.

    python curate.py out/gpt2_inrun
        drops a quarter of the documents: those with the smallest share of their steps' values
    python curate.py out/gpt2_inrun --random --out=out/random
        its control: as many at random (--invert: those with the largest share)
    python curate.py out/gpt2_inrun --out=out/b --drop_fraction=.1 --per_domain --list=dropped.jsonl
        a tenth of each domain's documents; every one of them listed, with its source and text
    python curate.py out/gpt2_inrun --out=out/c --by=chunk --score=value --drop=negative
        every chunk whose value is negative
    python curate.py out/gpt2_inrun --out=out/d --drop=negative --confidence=2
        only documents that are negative beyond two standard errors of their visits
    python curate.py out/gpt2_inrun --out=out/e --export=kept.jsonl.zst
        the text of what is kept, for other trainers
    python curate.py out/gpt2_inrun/revalued/val-hindsight --out=out/f
        by what visits did for the model at the end of the run (revalue.py --hindsight)
    python train.py configs/gpt2_curated.py
        trains on out/gpt2_inrun/keep.npy

What is known of it, from small models (results/curation): on text with planted junk the default
beat dropping as many documents at random by .033 +- .011 nats (six seeds), and dropping by plain
training loss did as well or better. On clean text no gain was found. Dropping what is negative was
not found better than random. So train a control too, and compare: curate.py prints the commands.

Leaves three files. keep.npy: int64, the numbers of chunks, ascending. keep.json: how it was made,
and counts by domain. dropped.npy: document or chunk, score, standard_error, in the order in which
they were dropped. What the run never used has no value: it stays, unless --unused=drop.

What has the smallest score is dropped. --score says what that is:
    share    the mean over its visits of the value relative to the mean absolute value of that
             step's chunks, so that early steps, where all values are large, count no more than
             later ones
    value    the sum over its visits of the value, in nats; the default of values in hindsight
             (revalue.py --hindsight), of which visits in early steps do not count
    smoothed  as share, of the smoothed scores instead of the values: of a run that was trained with
             --target_smoothing
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
from show import commands, curated
from show.documents import Documents, check_export, write_texts
from show.dropped import check_list, dropped_rows, first_rows, write_list
from show.run import open_run
from show.scores import Units, chunk_scores, document_scores, score_and_error
from system import files
from system.errors import UserError
from system.trainers import is_trainers


@dataclass
class Config:
    run: str = ""  # the run's folder
    by: Literal["document", "chunk"] = "document"  # the unit that is kept or dropped
    # what the smallest of is dropped, see above; empty: share, and of hindsight value
    score: Literal["", "share", "value", "smoothed", "loss"] = ""
    drop: Literal["fraction", "negative"] = "fraction"  # a fraction, or all with a negative score
    drop_fraction: float = 0.25  # which fraction of the units with a score
    per_domain: bool = False  # this fraction of each domain, so that the mixture stays as it is
    confidence: float = 0.0  # of --drop=negative: negative beyond so many standard errors
    target: str = ""  # one of the run's targets; empty: its first
    invert: bool = False  # a control: as many, with the largest scores
    random: bool = False  # a control: as many, at random
    seed: int = 1337  # of --random
    unused: Literal["keep", "drop"] = "keep"  # chunks that the run never used
    out: str = ""  # the folder for keep.npy; empty: the run's
    overwrite: bool = False  # replace a keep.npy that is there
    list: str = ""  # what is dropped, with source, score and text: a .jsonl file
    export: str = ""  # the texts kept, for other trainers: a .jsonl.zst, .jsonl or .parquet file
    data_dir: str = ""  # where the run's data is now, if it moved

    def __post_init__(self):
        at_least = {"confidence": 0, "seed": 0}
        config.check(
            self, at_least=at_least, above={"drop_fraction": 0}, below={"drop_fraction": 1}
        )
        if self.drop == "negative":
            self.check_negative()
        elif self.confidence:
            cure = f"write --drop=negative --confidence={self.confidence:g}"
            raise UserError(f"--confidence is of what is negative: {cure}")
        if self.invert and self.random:
            raise UserError("--invert drops the largest, --random any: write one of them")
        if self.list and self.list == self.export:
            raise UserError("--list and --export name the same file: write two names")

    def check_negative(self):
        """Raises UserError for options that do not go with --drop=negative."""
        if self.score == "loss":
            raise UserError("--score=loss is always negative: write --drop=fraction")
        if self.per_domain or self.drop_fraction != Config.drop_fraction:
            option = "--per_domain" if self.per_domain else "--drop_fraction"
            raise UserError(f"{option} says how many, --drop=negative which: write one of them")


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
        if cfg.drop == "fraction":
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


@dataclass
class Choice:
    """What is dropped and what is kept."""

    units: Units
    scored: np.ndarray  # int64: the units that were visited
    score: np.ndarray  # float64, of every unit
    error: np.ndarray  # float64, of every unit: the score's standard error
    dropped: np.ndarray  # int64: units, the first to go first
    stays: np.ndarray  # bool, of every unit
    kept: np.ndarray  # bool, of every chunk
    visits: int  # that the scores are of


def make_choice(cfg, run, k):
    """For target k. Raises UserError where nothing is dropped, or all."""
    units = chunk_scores(run, k, cfg.score)
    visits = int(units.visits.sum())
    if cfg.by == "document":
        units = of_documents(run, units)
    scored = np.flatnonzero(units.visits)
    score, error = score_and_error(units, summed=cfg.score == "value")
    dropped = scored[choose(cfg, score[scored], error[scored], units.domains[scored])]
    if cfg.drop == "fraction" and not len(dropped):
        what = f"--drop_fraction={cfg.drop_fraction:g} of {len(scored)} {cfg.by}s is none"
        other = "a larger fraction" if cfg.by == "chunk" else "--by=chunk, or a larger fraction"
        raise UserError(f"{what}: write {other}")
    stays = np.ones(len(units.numbers), bool)
    stays[dropped] = False
    kept = kept_chunks(units, stays, len(run.values))
    if cfg.unused == "drop":
        kept = kept & ~np.isnan(run.values[:, k])
    if not kept.any():
        raise UserError("nothing would be left to train on: write --drop_fraction=.16")
    return Choice(units, scored, score, error, dropped, stays, kept, visits)


def of_documents(run, chunks):
    """document_scores(); where it finds no table of documents, there is another way out."""
    try:
        return document_scores(run, chunks)
    except UserError as e:
        raise UserError(f"{e}; or write --by=chunk, which needs no documents") from e


# --- the files ----------------------------------------------------------------------


def curate(cfg):
    """Writes keep.npy, keep.json and dropped.npy, and what --list and --export ask for; returns
    what keep.json holds. Raises UserError, with what to type, and OSError, before anything is
    written."""
    if not cfg.run:
        raise UserError("no run given: name the folder of a run, as out/<the config's name>")
    if cfg.export:
        check_export(cfg.export)
    if cfg.list:
        check_list(cfg.list)
    run = open_run(cfg.run, cfg.data_dir)
    if cfg.export:
        check_export(cfg.export, run)
    out = Path(cfg.out or cfg.run)
    k = run.target(cfg.target)
    if not cfg.score:
        cfg.score = "share" if run.horizon is None else "value"
    if (out / "keep.npy").exists() and not cfg.overwrite:
        cure = "--overwrite replaces it, --out=... puts this one elsewhere"
        raise UserError(f"{out}/keep.npy is there already: {cure}")
    choice = make_choice(cfg, run, k)
    about = describe(cfg, run, k, choice)
    write_texts_and_list(cfg, run, choice)
    out.mkdir(parents=True, exist_ok=True)
    about["files"] = {
        "dropped.npy": files.write_array(out / "dropped.npy", dropped_records(cfg, choice)),
        "keep.npy": files.write_array(out / "keep.npy", np.flatnonzero(choice.kept)),
    }
    files.write_json(out / "keep.json", about)
    return about


def describe(cfg, run, k, choice):
    """What keep.json holds, but for its files' checksums."""
    kept = choice.kept
    score = choice.score
    return {
        "run": str(run.path),
        "data_hash": run.data.hash,
        "committed_step": run.info["committed_step"],
        "config": vars(cfg) | {"target": run.names[k]},
        "of": str(run.original),
        "horizon": run.horizon,
        "has_hindsight": any(run.original.glob("revalued/*/adjoint.npy")),
        "visits": len(run.visits),
        "visits_scored": int(choice.visits),
        "units": len(choice.stays),
        "units_scored": len(choice.scored),
        "units_negative": int((score[choice.scored] < 0).sum()),
        "units_dropped": len(choice.dropped),
        "units_dropped_negative": int((score[choice.dropped] < 0).sum()),
        "chunks": len(kept),
        "chunks_kept": int(kept.sum()),
        "chunks_unused": len(kept) - len(run.used),
        "chunks_used_dropped": int((~kept[run.used]).sum()),
        "tokens_kept": int(kept.sum()) * run.width,
        "domains": by_domain(run, kept, k),
        "dropped_first": dropped_first(run, choice),
        "eval_interval": run.cfg.get("eval_interval"),  # what a run to compare with needs
        "val_chunks": len(run.data.val.rows),
        "by_trainer": is_trainers(run.original),
    }


def dropped_first(run, choice, n=5):
    """The first n of what goes, as show/dropped.py names it."""
    rows = first_rows(run, choice.units, choice.dropped, n)
    for row, unit in zip(rows, choice.dropped):
        row["score"] = float(choice.score[unit])
        row["standard_error"] = float_or_none(choice.error[unit])
    return rows


def float_or_none(x):
    """JSON has no NaN."""
    return None if np.isnan(x) else float(x)


def write_texts_and_list(cfg, run, choice):
    if cfg.list:
        described = dropped_rows(run, choice.units, choice.dropped)
        own = choice.dropped
        write_list(cfg.list, described, choice.score[own], choice.error[own])
    if cfg.export:
        stays = choice.stays if cfg.by == "document" else None
        write_texts(cfg.export, Documents(run), stays, choice.kept)


def dropped_records(cfg, choice):
    """dropped.npy: a record for each unit that goes, in this order."""
    dropped = choice.dropped
    dtype = [(cfg.by, "<i8"), ("score", "<f8"), ("standard_error", "<f8")]
    records = np.zeros(len(dropped), dtype)
    records[cfg.by] = choice.units.numbers[dropped]
    records["score"] = choice.score[dropped]
    records["standard_error"] = choice.error[dropped]
    return records


def by_domain(run, kept, k):
    """What becomes of each domain's chunks. median, median_kept: of the values of its used chunks,
    nats, None where there is none. value, value_kept: their sums."""
    domain = run.data.train.domain
    values = run.values[:, k].astype(float)
    used = run.used[np.argsort(domain[run.used], kind="stable")]
    ends = np.searchsorted(domain[used], np.arange(len(run.domains) + 1))
    chunks = np.bincount(domain, minlength=len(run.domains))
    chunks_kept = np.bincount(domain[kept], minlength=len(run.domains))
    found = []
    for d in np.flatnonzero(chunks).tolist():
        own = used[ends[d] : ends[d + 1]]
        own_kept = own[kept[own]]
        found.append(
            {
                "domain": run.domains[d],
                "chunks": int(chunks[d]),
                "used": len(own),
                "kept": int(chunks_kept[d]),
                "median": median(values[own]),
                "median_kept": median(values[own_kept]),
                "value": float(values[own].sum()),
                "value_kept": float(values[own_kept].sum()),
            }
        )
    return found


def median(values):
    return float(np.median(values)) if len(values) else None


def main(cfg):
    commands.say_lines(curated.lines(curate(cfg)))


if __name__ == "__main__":
    commands.obey_signals()
    config.main(lambda: main(config.load(Config)))
