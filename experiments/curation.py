"""
Does training without the chunks of negative value help? The paper's curation experiment, with the
controls that its comparison lacks.

    python experiments/curation.py --source=minipile.jsonl.zst --foreign="Handbook de+fr+es" \\
        --out=results/curation
    python experiments/curation.py --quick                   tiny, on the text every Python
                                                             installation carries
    python experiments/curation.py --part=report --out=...   tables and figure again, from
                                                             rows.jsonl and values.jsonl

Claim (Wang et al., arXiv 2406.11011, section 5.1): of GPT-2 on the Pile, training without the 16 %
of chunks whose value is negative reaches a given test loss in about 25 % fewer iterations. Public
attempts to repeat it found no gain.

Here: a value run on all chunks, then train.py from scratch on what curate.py keeps: all; without
the chunks of negative value (the paper's arm); without the documents of negative share; without a
fraction of the documents by share, by value, by training loss, the most positive (the reverse), and
at random. Twice: on clean text, and with a fifth of planted junk: shuffled tokens, base64, copies
of three documents, another language. The target is held-out clean documents, the test others.
Every arm trains for the same number of iterations. That of all chunks then goes on for as many as
the value run took (`equal tokens`: the value run is not free). The learning rate is constant after
a warm-up, so that every point of a curve may be compared. Test losses are the mean of the last
three evaluations.

Two cores: 75 minutes for everything (81 runs of about 40 s of one core, 6 value runs of 3 minutes).
Expected: with junk, a quarter of the documents by share .03 nats below as many at random; AUROC by
document .96 and .97 for shuffled tokens and base64; on clean text nothing beyond two standard
errors.
"""

import base64
import hashlib
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy import stats

import config
import curate
import train
from data import open_dataset
from experiments.common import (
    begin,
    column,
    curve,
    finish,
    forget_run,
    get_options,
    json_line,
    markdown,
    numbers,
    prepare,
    pyplot,
    read_documents,
    read_rows,
    save_figure,
    select,
    set_options,
    shown,
    side_by_side,
)
from pile.tokenizers import tokenizer
from show.run import open_run
from system.errors import UserError

SHUFFLED = "shuffled tokens"
BASE64 = "base64"
DUPLICATES = "duplicates"
FOREIGN = "wrong language"
JUNK = (SHUFFLED, BASE64, DUPLICATES, FOREIGN)
ALL = "all"  # the arm that drops nothing
ORACLE = "the junk itself"  # the arm that knows what is junk
QUICK = {
    "tokens": 60_000,
    "value_iters": 20,
    "iters": 20,
    "seeds": "1,2",
    "fractions": ".2",
    "eval_interval": 5,
    "eval_chunks": 2,
    "n_embd": 32,
    "target_batch": 4,
}


@dataclass
class Config:
    source: str = "python"  # as in prepare_pile.py
    # the domain that is the wrong language, and no part of the clean text; empty: junk without it
    foreign: str = ""
    data: str = "data/curation"  # the prepared chunks, made when missing
    out: str = "out/curation"
    conditions: str = "clean,junk"
    fractions: str = ".1,.25"  # of the documents
    arms: str = ""  # comma-separated: only these, named as in the tables; empty: all
    seeds: str = "1,2,3"
    tokens: int = 480_000  # of the training set
    junk: float = 0.2  # its share of planted junk
    document: int = 1500  # a document is cut to so many characters, so that there are many
    tokenizer: Literal["gpt2", "byte"] = "byte"
    block_size: int = 256
    batch_size: int = 8
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    learning_rate: float = 3e-3
    rule: str = "adamw2"
    target_batch: int = 16
    value_iters: int = 500  # of the value run: two passes
    iters: int = 500  # of the others
    eval_interval: int = 25
    eval_chunks: int = 12  # of each domain
    workers: int = 0  # runs side by side; 0: a core each
    quick: bool = False
    # retrain: the value runs are there; report: only the tables and the figure
    part: Literal["all", "retrain", "report"] = "all"

    def __post_init__(self):
        if self.quick:
            set_options(self, QUICK)
            self.data += "-quick"
            self.out += "-quick"


# --- the text -----------------------------------------------------------------------


def documents(cfg):
    """(domain, text) of the source, each cut to cfg.document characters."""
    for _, domain, text in read_documents(cfg.source):
        if len(text) > 200:
            yield domain, text[: cfg.document]


def chance(text):
    """A number from 0 to 1 that depends on the text alone."""
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def shuffled(cfg, texts, codec):
    """Each text with its tokens, of the byte tokenizer its characters, in another order."""
    rng = np.random.default_rng(0)
    for text in texts:
        if cfg.tokenizer == "gpt2":
            yield codec.decode(rng.permutation(codec.encode(text)))
        else:
            yield "".join(rng.permutation(list(text)))


def encoded(texts):
    for text in texts:
        yield base64.b64encode(text.encode()).decode()


def copies(texts):
    """The first three texts, again and again, each time under another number."""
    for i in count():
        yield f"{i}\n{texts[i % 3]}"


def take(items, tokens, cfg, codec):
    """As many of the items, (domain, text), as have this many tokens.

    Raises UserError where they have fewer.
    """
    taken = []
    for domain, text in items:
        tokens -= len(codec.encode(text))
        taken.append((domain, text))
        if tokens < 0:
            return taken
    what = f"--source={cfg.source} has too little text for --tokens={cfg.tokens}"
    raise UserError(f"{what}: lower --tokens")


def write_corpus(cfg, folder):
    """Writes clean.jsonl, junk.jsonl (the same documents and a cfg.junk share of junk, a domain a
    kind) and target.txt, all of different documents."""
    folder.mkdir(parents=True, exist_ok=True)
    codec = tokenizer(cfg.tokenizer)
    in_order = sorted(set(documents(cfg)), key=lambda document: chance(document[1]))
    clean = iter([document for document in in_order if document[0] != cfg.foreign])
    target = take(clean, cfg.tokens // 12, cfg, codec)
    kept = take(clean, int(cfg.tokens * 1.12), cfg, codec)  # a tenth of it will be the test's
    spare = [text for _, text in take(clean, cfg.tokens // 2, cfg, codec)]

    kinds = {
        SHUFFLED: shuffled(cfg, spare, codec),
        BASE64: encoded(spare[::-1]),
        DUPLICATES: copies(spare),
    }
    if cfg.foreign:
        kinds[FOREIGN] = [text for domain, text in in_order if domain == cfg.foreign]
    tokens_each = cfg.tokens * cfg.junk / (1 - cfg.junk) / len(kinds) * 1.1
    junk = []
    for kind, texts in kinds.items():
        junk += take(((kind, text) for text in texts), tokens_each, cfg, codec)

    for name, chosen in (("clean", kept), ("junk", kept + junk)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for domain, text in chosen:
                file.write(json_line(text, domain))
    (folder / "target.txt").write_text("\n\n".join(text for _, text in target), encoding="utf-8")


# --- the arms -------------------------------------------------------------------------


@dataclass
class Arm:
    options: dict | None = None  # of curate.py; None: without it
    control: str = ""  # the arm that drops as many at random


def arms(cfg, condition):
    """{name: Arm}: those of cfg.arms."""
    chunks = {"by": "chunk", "score": "value", "drop": "negative"}
    documents = {"by": "document", "score": "share", "drop": "negative"}
    every = {
        ALL: Arm(),
        "negative chunks": Arm(chunks, "as many chunks at random"),
        "as many chunks at random": Arm({**chunks, "random": True}),
        "negative documents": Arm(documents, "as many documents at random"),
        "as many documents at random": Arm({**documents, "random": True}),
    }
    scores = {
        "share": {"score": "share"},
        "value": {"score": "value"},
        "loss": {"score": "loss"},
        "largest": {"score": "share", "invert": True},
    }
    fractions = numbers(cfg.fractions)
    for fraction in fractions:
        control = f"{fraction:.0%} at random"
        common = {"by": "document", "drop_fraction": fraction}
        names = scores if fraction == fractions[-1] else ("share", "loss")
        for name in names:
            every[f"{fraction:.0%} by {name}"] = Arm({**common, **scores[name]}, control)
        every[control] = Arm({**common, "random": True})
    if condition == "junk":
        every[ORACLE] = Arm()
    if not cfg.arms:
        return every
    chosen = cfg.arms.split(",")
    return {name: arm for name, arm in every.items() if name in chosen}


# --- the runs -------------------------------------------------------------------------


def run_folder(cfg, condition, seed, arm=""):
    """Of a run of an arm, or of the value run."""
    name = f"{condition}-{seed}"
    return Path(cfg.data, "runs", f"{name}-{arm}".replace(" ", "_") if arm else name)


def train_run(cfg, condition, seed, out, **options):
    """One run of train.py. options: its options beside those that all runs have."""
    shared = get_options(
        cfg,
        "batch_size",
        "n_layer",
        "n_head",
        "n_embd",
        "block_size",
        "learning_rate",
        "eval_chunks",
    )
    train.train(
        train.Config(
            **shared,
            data_dir=f"{cfg.data}/{condition}",
            out_dir=str(out),
            overwrite=True,
            seed=seed,
            targets=f"clean={cfg.data}/target.txt",
            min_lr=cfg.learning_rate,
            warmup_iters=cfg.iters // 15,
            book_interval=10**9,
            checkpoint_interval=10**9,
            log_interval=100,
            **options,
        )
    )


def is_junk(data):
    """Of each chunk, bool (n,)."""
    kinds = [d for d, name in enumerate(data.domains) if name in JUNK]
    return np.isin(data.train.domain, kinds)


def value(cfg, condition, seed):
    """The value run. Rows: how well each score tells each kind of junk from text, by chunk and by
    document."""
    out = run_folder(cfg, condition, seed)
    train_run(
        cfg,
        condition,
        seed,
        out,
        rule=cfg.rule,
        target_batch=cfg.target_batch,
        max_iters=cfg.value_iters,
        eval_interval=0,
    )
    run = open_run(out)
    names = np.array(run.domains)
    rows = []
    for score in ("value", "share", "loss"):
        chunks = curate.chunk_scores(run, 0, score)
        documents = curate.document_scores(run, chunks)
        for unit, units in (("chunk", chunks), ("document", documents)):
            about = {"condition": condition, "seed": seed, "unit": unit, "score": score}
            figures = judge_score(units, names[units.domains], summed=score == "value")
            rows.append({**about, **figures})
    return rows


def judge_score(units, kinds, summed):
    """How well a score tells junk from text: shares of negative scores, and the AUROC of a small
    score, of each kind of junk against text.

    units: of show/scores.py. kinds (n,): their domains.
    """
    used = units.visits > 0
    scores, _ = curate.score_and_error(units, summed=summed)
    scores = scores[used]
    kinds = kinds[used]
    text = ~np.isin(kinds, JUNK)
    row = {
        "negative, text": float((scores[text] < 0).mean()),
        "negative, junk": None if text.all() else float((scores[~text] < 0).mean()),
    }
    for kind in (*JUNK, "any"):
        junk = ~text if kind == "any" else kinds == kind
        if junk.any():
            wins = stats.mannwhitneyu(-scores[junk], -scores[text]).statistic
            row[kind] = float(wins / junk.sum() / text.sum())
    return row


def choose_chunks(cfg, condition, seed, arm, options, data, out):
    """Writes what an arm keeps into its run's folder. Returns the file's path, "" for all chunks,
    and which chunks it keeps, bool (n,)."""
    if arm == ALL:
        return "", np.ones(len(data.train.rows), bool)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "keep.npy"
    if arm == ORACLE:
        np.save(path, np.flatnonzero(~is_junk(data)))
    else:
        valued = run_folder(cfg, condition, seed)
        curate.curate(
            curate.Config(run=str(valued), out=str(out), overwrite=True, seed=seed, **options)
        )
    kept = np.zeros(len(data.train.rows), bool)
    kept[np.load(path)] = True
    return str(path), kept


def retrain(cfg, condition, seed, arm, options):
    """One run on what is kept. Returns [row]: its test losses, on clean text, and how much of each
    kind of junk it was spared."""
    out = run_folder(cfg, condition, seed, arm)
    data = open_dataset(f"{cfg.data}/{condition}")
    path, kept = choose_chunks(cfg, condition, seed, arm, options, data, out)
    train_run(
        cfg,
        condition,
        seed,
        out,
        keep=path,
        rule="off",
        max_iters=cfg.iters + (cfg.value_iters if arm == ALL else 0),
        eval_interval=cfg.eval_interval,
    )
    junk = is_junk(data)
    row = {
        "condition": condition,
        "seed": seed,
        "arm": arm,
        "kept": float(kept.mean()),
        "junk_left": float(junk[kept].mean()),
        "curve": clean_losses(data, read_rows(out / "evaluations.jsonl")),
    }
    for d, name in enumerate(data.domains):
        if name in JUNK:
            row[f"dropped: {name}"] = float((~kept[data.train.domain == d]).mean())
    row["dropped: text"] = float((~kept[~junk]).mean())
    forget_run(out)
    return [row]


def clean_losses(data, evaluations):
    """(step, test loss) of each evaluation, over the domains that are no junk."""
    sizes = np.bincount(data.val.domain, minlength=len(data.domains))
    clean = {}
    for name, size in zip(data.domains, sizes):
        if size and name not in JUNK:
            clean[name] = size
    losses = []
    for evaluation in evaluations:
        of_domains = [evaluation["loss"][name] for name in clean]
        loss = np.average(of_domains, weights=list(clean.values()))
        losses.append((evaluation["step"], float(loss)))
    return losses


# --- tables -----------------------------------------------------------------------


def loss_at(row, step):
    """A run's test loss: the mean of the last three evaluations up to a step."""
    losses = [loss for at, loss in row["curve"] if at <= step]
    return float(np.mean(losses[-3:]))


def reached(row, loss):
    """The iterations after which three evaluations in a row average at most this; NaN: never."""
    steps, losses = zip(*row["curve"])
    for i in range(2, len(losses)):
        if np.mean(losses[i - 2 : i + 1]) <= loss:
            return float(steps[i])
    return np.nan


def less(losses, others):
    """Losses less others, {seed: loss} both, of the seeds that have both, as text."""
    return shown([losses[seed] - others[seed] for seed in losses if seed in others], 4)


def loss_table(cfg, condition, by_arm):
    """by_arm: {arm: {seed: row}}."""
    final = {}
    for arm, by_seed in by_arm.items():
        final[arm] = {seed: loss_at(row, cfg.iters) for seed, row in by_seed.items()}
    of_all = final[ALL]
    seeds = len(of_all)
    longer = {}
    for seed, row in by_arm[ALL].items():
        longer[seed] = loss_at(row, cfg.iters + cfg.value_iters)
    table = [
        ["all", seeds, "", shown(list(of_all.values()), 4), "", "", "", "", ""],
        [
            "all, equal tokens",
            seeds,
            "",
            shown(list(longer.values()), 4),
            less(longer, of_all),
            "",
            "",
            "",
            "",
        ],
    ]
    for arm, plan in arms(cfg, condition).items():
        if arm == ALL or arm not in by_arm:
            continue
        rows = by_arm[arm].values()
        saved = []
        for row in rows:
            saved.append(1 - reached(row, of_all.get(row["seed"], np.nan)) / cfg.iters)
        there = np.array(saved)[np.isfinite(saved)]
        table.append(
            [
                arm,
                len(rows),
                f"{np.mean([1 - row['kept'] for row in rows]):.1%}",
                shown(list(final[arm].values()), 4),
                less(final[arm], of_all),
                less(final[arm], final[plan.control]) if plan.control in final else "",
                f"{len(there)} of {len(saved)}",
                shown(there, 2) if len(there) else "",
                shown([loss_at(row, cfg.iters * row["kept"]) for row in rows], 4),
            ]
        )
    head = [
        "dropped",
        "seeds",
        "of the chunks",
        "test loss",
        "less: all",
        "less: as many at random",
        "reach the loss with all",
        "iterations they save",
        "test loss after as many passes as with all",
    ]
    return markdown(head, table)


def dropped_table(by_arm):
    """What each arm dropped of each kind of junk, and of the text."""
    first = next(iter(by_arm[ALL].values()))
    kinds = [key for key in first if key.startswith("dropped: ")]
    table = []
    for arm, by_seed in by_arm.items():
        if arm != ALL:
            rows = list(by_seed.values())
            table.append([arm, *(f"{np.mean(column(rows, kind)):.0%}" for kind in kinds)])
    return markdown(["arm", *(kind.removeprefix("dropped: ") for kind in kinds)], table)


def score_table(scores):
    """The value runs' rows, by condition, unit and score."""
    kinds = []
    for kind in (*JUNK, "any", "negative, text", "negative, junk"):
        if any(row.get(kind) is not None for row in scores):
            kinds.append(kind)
    table = []
    for condition, unit, score in sorted({(r["condition"], r["unit"], r["score"]) for r in scores}):
        rows = select(scores, condition=condition, unit=unit, score=score)
        line = [condition, unit, score]
        for kind in kinds:
            known = rows[0].get(kind) is not None
            line.append(shown(column(rows, kind)) if known else "")
        table.append(line)
    return markdown(["condition", "unit", "score", *kinds], table)


def tables(cfg, rows, scores):
    lines = []
    for condition in dict.fromkeys(column(rows, "condition")):
        by_arm = {}
        for arm in arms(cfg, condition):
            of_arm = select(rows, condition=condition, arm=arm)
            by_seed = {row["seed"]: row for row in of_arm}
            if by_seed:
                by_arm[arm] = dict(sorted(by_seed.items()))
        lines += [f"### {condition}: nats a token", "", *loss_table(cfg, condition, by_arm), ""]
        if condition == "junk":
            title = "### What each arm dropped, of the chunks"
            lines += [title, "", *dropped_table(by_arm), ""]
    lines += [
        "### Value run: AUROC of a small score, junk of each kind against text; "
        "share of negative scores",
        "",
        *score_table(scores),
    ]
    return lines


# --- figure -----------------------------------------------------------------------


def line_style(arm):
    if "random" in arm:
        return "--"
    return ":" if "loss" in arm or "largest" in arm else "-"


def smoothed(losses):
    """Each with the mean of itself and the two before."""
    return [losses[max(0, j - 2) : j + 1].mean() for j in range(len(losses))]


def draw_condition(ax, cfg, rows, condition):
    of_all = {}
    for row in select(rows, condition=condition, arm=ALL):
        of_all[row["seed"]] = dict(row["curve"])
    others = [arm for arm in arms(cfg, condition) if arm != ALL]
    for i, arm in enumerate(others):
        of_arm = select(rows, condition=condition, arm=arm)
        steps = [step for step, _ in of_arm[0]["curve"] if step > cfg.iters // 10]
        gaps = []
        for row in of_arm:
            losses = dict(row["curve"])
            base = of_all[row["seed"]]
            gaps.append(smoothed(np.array([losses[step] - base[step] for step in steps])))
        mean, error = curve(np.array(gaps).T)
        error = np.nan_to_num(error)
        ax.plot(steps, mean, line_style(arm), color=f"C{i % 10}", label=arm)
        ax.fill_between(steps, mean - error, mean + error, color=f"C{i % 10}", alpha=0.15)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_title(f"{condition}: test loss less that of all chunks")
    ax.set_xlabel("iterations")
    ax.legend(fontsize=7)


def figure(cfg, rows, path):
    plt = pyplot()
    conditions = list(dict.fromkeys(column(rows, "condition")))
    fig, axes = plt.subplots(
        1, len(conditions), figsize=(6.5 * len(conditions), 4.2), squeeze=False
    )
    for ax, condition in zip(axes[0], conditions):
        draw_condition(ax, cfg, rows, condition)
    axes[0, 0].set_ylabel("nats a token (below 0: better than all)")
    save_figure(fig, path)


def train_all(cfg, out):
    begin(cfg)
    folder = Path(cfg.data)
    conditions = cfg.conditions.split(",")
    if not (folder / "target.txt").is_file():
        write_corpus(cfg, folder)
    for condition in conditions:
        prepare(
            folder / condition,
            folder / f"{condition}.jsonl",
            tokenizer=cfg.tokenizer,
            block_size=cfg.block_size,
            val_fraction=0.1,
        )
    value_jobs = []
    jobs = []
    for seed in numbers(cfg.seeds, int):
        for condition in conditions:
            value_jobs.append((cfg, condition, seed))
            for name, arm in arms(cfg, condition).items():
                jobs.append((cfg, condition, seed, name, arm.options))
    if cfg.part == "all":
        side_by_side(value, value_jobs, out / "values.jsonl", cfg.workers)
    side_by_side(retrain, jobs, out / "rows.jsonl", cfg.workers)


def main(cfg):
    out = Path(cfg.out)
    if cfg.part != "report":
        train_all(cfg, out)
    rows = read_rows(out / "rows.jsonl")
    finish(out, tables(cfg, rows, read_rows(out / "values.jsonl")))
    figure(cfg, rows, out / "curation.png")


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
