"""
Does training without the chunks of least value help? The paper's curation experiment, with the
controls that its comparison lacks, and with values in hindsight.

    python experiments/curation.py --source=minipile.jsonl.zst --foreign="Handbook de+fr+es" \\
        --out=results/curation
    python experiments/curation.py --quick                   tiny, on the text every Python
                                                             installation carries
    python experiments/curation.py --part=report --out=...   tables and figure again, from
                                                             rows.jsonl and values.jsonl

Claim (Wang et al., arXiv 2406.11011, section 5.1): of GPT-2 on the Pile, training without the 16 %
of chunks whose value is negative reaches a given test loss in about 25 % fewer iterations. Public
attempts to repeat it found no gain.

Here: a value run on all chunks, hindsight of it, then train.py from scratch on what curate.py
keeps: all; without the chunks of negative value (the paper's arm); without a fraction of the
documents by hindsight, share, value, smoothed value or training loss, and at random. Three
conditions: clean text; a fifth of planted junk (shuffled tokens, base64, copies of three documents,
another language); a narrow target, one domain of the clean text. Target and test are documents of
the same kind, held out, and different ones.

Every arm trains for the same number of steps, with the schedule of the value run. That of all
chunks is trained for more steps too, with schedules of their own: a test loss is then worth as many
steps as all chunks need to reach it. What valuing costs is told in plain runs.

Found with a narrow target (results/curation/narrow): without a quarter of the documents, by
hindsight, the loss is .036 nats below that of as many at random: what all chunks take 1.27 times
the steps for.
"""

import base64
import hashlib
import sys
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from scipy import stats

import config
import curate
import revalue
import train
from data import open_dataset, parse_targets
from experiments.common import (
    begin,
    column,
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
from model import GPT
from pile.tokenizers import tokenizer
from show.run import open_run
from system.checkpoints import read_checkpoint
from system.errors import UserError

SHUFFLED = "shuffled tokens"
BASE64 = "base64"
DUPLICATES = "duplicates"
FOREIGN = "wrong language"
JUNK = (SHUFFLED, BASE64, DUPLICATES, FOREIGN)
SCORES = ("hindsight", "share", "value", "smoothed", "loss")
ALL = "all"  # the arm that drops nothing
HINDSIGHT = "hindsight"  # the folder of its values, under the value run's
ORACLE = "the junk itself"  # the arm that knows what is junk
QUICK = {
    "tokens": 60_000,
    "value_iters": 20,
    "iters": 20,
    "seeds": "1,2",
    "fractions": ".2",
    "longer": "1.5",
    "narrow": "Docstrings",
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
    conditions: str = "clean,junk,narrow"
    narrow: str = "Python code"  # the domain that is the target of the condition narrow
    fractions: str = ".1,.25"  # of the documents
    longer: str = "1.25,1.5,2"  # runs on all chunks, of so many times the steps
    arms: str = ""  # comma-separated: only these, named as in the tables; empty: all
    seeds: str = "1,2,3,4,5"
    tokens: int = 240_000  # of the training set
    junk: float = 0.2  # its share of planted junk
    document: int = 1000  # a document is cut to so many characters, so that there are many
    tokenizer: Literal["gpt2", "byte"] = "byte"
    block_size: int = 128
    batch_size: int = 8
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    learning_rate: float = 1e-3  # at 3e-3 two orders of the same chunks end .05 nats apart
    rule: str = "adamw2"
    target_batch: int = 16
    target_smoothing: float = 0.9
    value_iters: int = 500  # of the value run: two passes
    iters: int = 500  # of the others
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
    kind), and a target and a test, text.txt each, of all clean domains and of the narrow one. All
    are of different documents."""
    folder.mkdir(parents=True, exist_ok=True)
    codec = tokenizer(cfg.tokenizer)
    in_order = sorted(set(documents(cfg)), key=lambda document: chance(document[1]))
    of_domain = [document for document in in_order if document[0] == cfg.narrow]
    if not of_domain:
        raise UserError(f"--narrow={cfg.narrow}: --source={cfg.source} has no such domain")
    # the narrow texts come from the end of the order, where the others do not get to
    of_domain = iter(of_domain[::-1])
    texts = {}
    for name in ("narrow-target", "narrow-test"):
        texts[name] = take(of_domain, cfg.tokens // 6, cfg, codec)
    reserved = {document for taken in texts.values() for document in taken}
    chosen = [d for d in in_order if d[0] != cfg.foreign and d not in reserved]
    clean = iter(chosen)
    for name in ("target", "test"):
        texts[name] = take(clean, cfg.tokens // 6, cfg, codec)
    kept = take(clean, cfg.tokens, cfg, codec)
    spare = [text for _, text in take(clean, cfg.tokens // 2, cfg, codec)]

    kinds = {
        SHUFFLED: shuffled(cfg, spare, codec),
        BASE64: encoded(spare[::-1]),
        DUPLICATES: copies(spare),
    }
    if cfg.foreign:
        kinds[FOREIGN] = [text for domain, text in in_order if domain == cfg.foreign]
    tokens_each = cfg.tokens * cfg.junk / (1 - cfg.junk) / len(kinds)
    junk = []
    for kind, of_kind in kinds.items():
        junk += take(((kind, text) for text in of_kind), tokens_each, cfg, codec)

    for name, taken in (("clean", kept), ("junk", kept + junk)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for domain, text in taken:
                file.write(json_line(text, domain))
    for name, taken in texts.items():
        text = "\n\n".join(text for _, text in taken)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def data_of(cfg, condition):
    """The folder of its chunks."""
    return Path(cfg.data, "junk" if condition == "junk" else "clean")


def text_of(cfg, condition, kind):
    """The file of its target or test."""
    return Path(cfg.data, f"narrow-{kind}.txt" if condition == "narrow" else f"{kind}.txt")


# --- the arms -------------------------------------------------------------------------


@dataclass
class Arm:
    options: dict | None = None  # of curate.py; None: without it
    control: str = ""  # the arm that drops as many at random
    times: float = 1  # the steps of the others


def arms(cfg, condition):
    """{name: Arm}: those of cfg.arms."""
    chunks = {"by": "chunk", "score": "value", "drop": "negative"}
    every = {ALL: Arm()}
    for times in numbers(cfg.longer):
        every[f"{ALL} {times:g} x the steps"] = Arm(times=times)
    every["negative chunks"] = Arm(chunks, "as many chunks at random")
    every["as many chunks at random"] = Arm({**chunks, "random": True})
    for fraction in numbers(cfg.fractions):
        control = f"{fraction:.0%} at random"
        common = {"by": "document", "drop_fraction": fraction}
        for score in SCORES:
            every[f"{fraction:.0%} by {score}"] = Arm({**common, "score": score}, control)
        every[control] = Arm({**common, "score": "value", "random": True})
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


def train_run(cfg, condition, seed, out, steps, **options):
    """One run of train.py. options: its options beside those that all runs have. Returns the
    seconds of processor time that it took."""
    shared = get_options(
        cfg, "batch_size", "n_layer", "n_head", "n_embd", "block_size", "learning_rate"
    )
    began = time.process_time()
    train.train(
        train.Config(
            **shared,
            data_dir=str(data_of(cfg, condition)),
            out_dir=str(out),
            overwrite=True,
            seed=seed,
            targets=f"target={text_of(cfg, condition, 'target')}",
            max_iters=steps,
            min_lr=cfg.learning_rate / 10,
            warmup_iters=cfg.iters // 15,
            book_interval=10**9,
            checkpoint_interval=10**9,
            eval_interval=0,
            log_interval=100,
            **options,
        )
    )
    return time.process_time() - began


@torch.no_grad()
def test_loss(cfg, condition, out):
    """The mean loss of the test's tokens, of the model that a run left, nats."""
    data = open_dataset(data_of(cfg, condition))
    path = text_of(cfg, condition, "test")
    (target,) = parse_targets(f"test={path}", data, cfg.block_size)
    model = GPT.from_checkpoint(read_checkpoint(out / "ckpt.pt")).eval()
    total = 0.0
    parts = np.array_split(np.arange(len(target)), -(-len(target) // 64))
    for picks in parts:
        X, Y = (torch.as_tensor(x) for x in target.batch(picks))
        total += float(model(X, Y)[1]) * len(picks)
    return total / len(target)


def is_junk(data):
    """Of each chunk, bool (n,)."""
    kinds = [d for d, name in enumerate(data.domains) if name in JUNK]
    return np.isin(data.train.domain, kinds)


def value(cfg, condition, seed):
    """The value run and its hindsight. Rows: how well each score tells each kind of junk from text,
    by chunk and by document; and what they cost, in seconds of processor time."""
    out = run_folder(cfg, condition, seed)
    valued = train_run(
        cfg,
        condition,
        seed,
        out,
        cfg.value_iters,
        rule=cfg.rule,
        target_batch=cfg.target_batch,
        target_smoothing=cfg.target_smoothing,
    )
    began = time.process_time()
    revalue.revalue(revalue.Config(run=str(out), hindsight=True, name=HINDSIGHT, overwrite=True))
    looked_back = time.process_time() - began
    common = {"condition": condition, "seed": seed}
    rows = [{**common, "unit": "run", "value": valued, "hindsight": looked_back}]
    for score in SCORES:
        run = open_run(scored_run(cfg, condition, seed, score))
        names = np.array(run.domains)
        column = "value" if score == "hindsight" else score
        chunks = curate.chunk_scores(run, 0, column)
        documents = curate.document_scores(run, chunks)
        for unit, units in (("chunk", chunks), ("document", documents)):
            figures = judge_score(units, names[units.domains], summed=column == "value")
            rows.append({**common, "unit": unit, "score": score, **figures})
    return rows


def scored_run(cfg, condition, seed, score):
    """The folder whose values are the score."""
    out = run_folder(cfg, condition, seed)
    return out / "revalued" / HINDSIGHT if score == "hindsight" else out


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
    if arm.startswith(ALL):
        return "", np.ones(len(data.train.rows), bool)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "keep.npy"
    if arm == ORACLE:
        np.save(path, np.flatnonzero(~is_junk(data)))
    else:
        options = {**options, "overwrite": True, "seed": seed}
        valued = scored_run(cfg, condition, seed, options["score"])
        if options["score"] == "hindsight":
            options["score"] = "value"
        curate.curate(curate.Config(run=str(valued), out=str(out), **options))
    kept = np.zeros(len(data.train.rows), bool)
    kept[np.load(path)] = True
    return str(path), kept


def retrain(cfg, condition, seed, name, arm):
    """One run on what an arm keeps. Returns [row]: its test loss, and how much of each kind of junk
    it was spared."""
    out = run_folder(cfg, condition, seed, name)
    data = open_dataset(data_of(cfg, condition))
    path, kept = choose_chunks(cfg, condition, seed, name, arm.options, data, out)
    steps = round(arm.times * cfg.iters)
    seconds = train_run(cfg, condition, seed, out, steps, keep=path, rule="off")
    junk = is_junk(data)
    row = {
        "condition": condition,
        "seed": seed,
        "arm": name,
        "times": arm.times,
        "kept": float(kept.mean()),
        "loss": test_loss(cfg, condition, out),
        "seconds": seconds,
    }
    for d, domain in enumerate(data.domains):
        if domain in JUNK:
            row[f"dropped: {domain}"] = float((~kept[data.train.domain == d]).mean())
    row["dropped: text"] = float((~kept[~junk]).mean())
    forget_run(out)
    return [row]


# --- tables -----------------------------------------------------------------------


def worth(of_all, loss):
    """How many times the steps a run on all chunks takes to a loss. of_all: [(times, loss)] of a
    seed. NaN: more than were tried, or less than 1."""
    times, losses = zip(*sorted(of_all))
    return np.interp(-loss, -np.array(losses), times, left=np.nan, right=np.nan)


def less(losses, others):
    """Losses less others, {seed: loss} both, of the seeds that have both, as text."""
    return shown([losses[seed] - others[seed] for seed in losses if seed in others], 4)


def loss_table(cfg, condition, by_arm):
    """by_arm: {arm: {seed: row}}."""
    losses, of_all = {}, {}
    for name, by_seed in by_arm.items():
        losses[name] = {seed: row["loss"] for seed, row in by_seed.items()}
        if name.startswith(ALL):
            for seed, row in by_seed.items():
                of_all.setdefault(seed, []).append((row["times"], row["loss"]))
    table = []
    for name, plan in arms(cfg, condition).items():
        if name not in by_arm:
            continue
        rows = list(by_arm[name].values())
        found = [worth(of_all[row["seed"]], row["loss"]) for row in rows]
        within = [times for times in found if np.isfinite(times)]
        is_all = name.startswith(ALL)
        line = [name, len(rows)]
        line.append("" if is_all else f"{np.mean([1 - row['kept'] for row in rows]):.1%}")
        line.append(shown(list(losses[name].values()), 4))
        line.append("" if name == ALL else less(losses[name], losses[ALL]))
        line.append(less(losses[name], losses[plan.control]) if plan.control in losses else "")
        line.append("" if is_all else f"{len(within)} of {len(rows)}")
        line.append(shown(within, 2) if within and not is_all else "")
        table.append(line)
    head = [
        "dropped",
        "seeds",
        "of the chunks",
        "test loss",
        "less: all",
        "less: as many at random",
        "at least as good as all",
        "as good as all in so many times the steps",
    ]
    return markdown(head, table)


def cost_table(rows, scores):
    """What valuing costs, in plain runs of the same length."""
    table = []
    for condition in dict.fromkeys(column(rows, "condition")):
        plain = {row["seed"]: row["seconds"] for row in select(rows, condition=condition, arm=ALL)}
        costs = select(scores, condition=condition, unit="run")
        costs = [cost for cost in costs if cost["seed"] in plain]
        line = [condition]
        for kind in ("value", "hindsight"):
            line.append(shown([cost[kind] / plain[cost["seed"]] for cost in costs], 2))
        table.append(line)
    return markdown(["condition", "the value run", "hindsight, beside it"], table)


def dropped_table(by_arm):
    """What each arm dropped of each kind of junk, and of the text."""
    first = next(iter(by_arm[ALL].values()))
    kinds = [key for key in first if key.startswith("dropped: ")]
    table = []
    for arm, by_seed in by_arm.items():
        if not arm.startswith(ALL):
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
    judged = [row for row in scores if row["unit"] != "run"]
    for condition, unit, score in sorted({(r["condition"], r["unit"], r["score"]) for r in judged}):
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
        "",
        "### What valuing costs, in runs on all chunks, by processor time",
        "",
        *cost_table(rows, scores),
    ]
    return lines


# --- figure -----------------------------------------------------------------------


def figure(cfg, rows, path):
    """Of each arm the test loss less that of as many at random: each seed, and the mean."""
    plt = pyplot()
    conditions = list(dict.fromkeys(column(rows, "condition")))
    fig, axes = plt.subplots(1, len(conditions), figsize=(4.5 * len(conditions), 4), squeeze=False)
    for ax, condition in zip(axes[0], conditions):
        names = []
        for name, arm in arms(cfg, condition).items():
            control = select(rows, condition=condition, arm=arm.control)
            of_control = {row["seed"]: row["loss"] for row in control}
            own = select(rows, condition=condition, arm=name)
            gaps = [r["loss"] - of_control[r["seed"]] for r in own if r["seed"] in of_control]
            if gaps:
                ax.plot(gaps, [len(names)] * len(gaps), ".", color="C0", alpha=0.5)
                ax.plot(np.mean(gaps), len(names), "|", color="C1", markersize=14)
                names.append(name)
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.invert_yaxis()
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_title(condition)
        ax.set_xlabel("test loss less that of as many at random, nats")
    save_figure(fig, path)


def train_all(cfg, out):
    begin(cfg)
    folder = Path(cfg.data)
    conditions = cfg.conditions.split(",")
    if not (folder / "narrow-test.txt").is_file():
        write_corpus(cfg, folder)
    for data in {data_of(cfg, condition) for condition in conditions}:
        prepare(
            data,
            f"{data}.jsonl",
            tokenizer=cfg.tokenizer,
            block_size=cfg.block_size,
            val_fraction=0,
        )
    value_jobs = []
    jobs = []
    for seed in numbers(cfg.seeds, int):
        for condition in conditions:
            value_jobs.append((cfg, condition, seed))
            for name, arm in arms(cfg, condition).items():
                jobs.append((cfg, condition, seed, name, arm))
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
