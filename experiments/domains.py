"""
Mixture weights from values: train once on the natural mixture, value the domains, train again on a
mixture that follows the values.

    python experiments/domains.py                   on the text every Python installation carries
    python experiments/domains.py --source=minipile.jsonl.zst --data=data/minipile \\
        --out=results/domains
    python experiments/domains.py --part=report --out=...     tables and figure again, from
                                                              natural.jsonl and rows.jsonl
    python experiments/domains.py --quick                     all of it tiny, under a minute

The claim is the one that values by domain invite, and which the papers (arXiv 2406.11011,
2602.00329) leave open, for they drop single chunks: that a domain worth more per token should be
met more often. Two targets at once: `broad`, the average over the domains of held-out text, each
as much, and `narrow`, that of one domain. Every second held-out document goes into the targets.
The others are the test, on which the runs' checkpoints are judged. No document is in both.

The rule, fixed before any test: a domain's score is the median over its chunks of value / mean
|value| in the step (no step outweighs another). Its weight is (1 - FLOOR) x its part of the sum of
the positive scores + FLOOR x uniform. Every mixture has as many tokens, steps x B chunks in one
pass, drawn by its weights to the chunk: without repetition while a domain lasts, then in further
passes over it, PASSES at most. What is missing then goes to the other domains by their weights.
Seeds are of everything: the natural run, so its values, weights, draws, initial weights.
Arms: natural (the run that was valued), uniform, by value and inverted (weights proportional to
1 / those by value) for either target, and for `narrow` its domain alone. By smoothed: the same rule
with the scores of --target_smoothing. By hindsight: the score of a domain is the mean over its
visits of their values in hindsight (revalue.py), for these say at the margin what one more chunk
does to the final loss; the rest of the rule is the same.
Writes natural.jsonl, rows.jsonl, table.md, domains.png.

Two CPU cores: about a quarter of an hour with minipile. Expected there (results/domains), test loss
minus the natural mixture's: narrow by value -.09, by smoothed scores -.14, by hindsight -.20,
inverted +.33, its own domain alone -.22; broad by value +.003, by hindsight +.011, inverted +.012,
uniform -.007: no gain there.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow.parquet as pq
import torch

import config
import revalue
import train
from data import open_dataset, tokenizer
from experiments.common import (
    begin,
    column,
    curve,
    finish,
    forget_run,
    get_options,
    markdown,
    numbers,
    prepare,
    pyplot,
    read_rows,
    save_figure,
    set_options,
    shown,
    side_by_side,
)
from model import GPT, GPTConfig
from show.run import open_run
from system.checkpoints import find_checkpoints, read_checkpoint
from system.errors import UserError
from system.folder import remove_revaluation

FLOOR = 0.1  # of the weights, the part that is uniform
PASSES = 4  # over a domain, at most
TARGETS = ("broad", "narrow")
ARMS = {  # arm -> the target it is for, None: both
    "natural": None,
    "uniform": None,
    "broad: by value": "broad",
    "broad: inverted": "broad",
    "broad: by smoothed": "broad",
    "broad: by hindsight": "broad",
    "narrow: by value": "narrow",
    "narrow: inverted": "narrow",
    "narrow: by smoothed": "narrow",
    "narrow: by hindsight": "narrow",
    "narrow: own domain": "narrow",
}
COLOURS = {
    "natural": "black",
    "uniform": "0.6",
    "by value": "crimson",
    "inverted": "C0",
    "by smoothed": "C1",
    "by hindsight": "C4",
    "own domain": "C2",
}
QUICK = {
    "seeds": "1,2",
    "steps": 24,
    "evaluations": 2,
    "test_chunks": 6,
    "target_chunks": 6,
    "batch_size": 8,
    "target_batch": 1,
    "block_size": 64,
    "n_layer": 2,
    "n_embd": 32,
    "warmup_iters": 10,
}


@dataclass
class Config:
    source: str = "python"  # as in prepare_pile.py
    narrow: str = "Python code"  # the domain of the narrow target
    seeds: str = "1,2,3"
    evaluations: int = 8  # of each run, evenly spaced
    test_chunks: int = 32  # of each domain, evenly spread over its test documents
    target_chunks: int = 64  # of each domain in a target, about as many from each of its documents
    # --- the runs
    rule: Literal["sgd", "sgd2", "adamw_linear", "adamw", "adamw2"] = "adamw2"
    steps: int = 240
    batch_size: int = 16
    target_batch: int = 8
    target_smoothing: float = 0.9
    tokenizer: Literal["byte", "gpt2"] = "byte"
    block_size: int = 128
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 96
    learning_rate: float = 1e-3
    warmup_iters: int = 40
    # --- the rest
    data: str = "data/domains"  # the prepared chunks, made when missing
    out: str = "out/domains"
    workers: int = 0  # runs side by side; 0: a core each
    quick: bool = False  # the whole of it tiny
    part: Literal["all", "report"] = "all"  # report: only the tables and the figure

    def __post_init__(self):
        if self.quick:
            set_options(self, QUICK)
            self.data += "-quick"


# --- held-out documents: every second one for the targets, the others for the test --------


def split_heldout(cfg):
    """Writes the targets' texts. Returns {domain: test chunks (n,)}.

    A domain with fewer than two documents has no part in either. Raises UserError where the chunks
    have another length, or the narrow target's domain no test.
    """
    data = open_dataset(cfg.data)
    if data.meta["block_size"] != cfg.block_size:
        made = f"{cfg.data} was prepared with --block_size={data.meta['block_size']}"
        raise UserError(f"{made}: type that, or another --data")
    documents = pq.read_table(data.path / "val_docs.parquet").to_pylist()
    decode = tokenizer(data.meta["tokenizer"]).decode
    texts = {}
    test = {}
    for d, name in enumerate(data.domains):
        ids = np.flatnonzero(data.val.domain == d)
        of_domain = [document for document in documents if document["domain"] == name]
        tokens, free = take_documents(cfg, data, ids, of_domain[1::2])
        if len(tokens) and free.any():
            texts[name] = decode(tokens)
            n = min(cfg.test_chunks, free.sum())
            test[name] = ids[free][np.linspace(0, free.sum() - 1, n).astype(int)]
    if cfg.narrow not in test:
        have = f"{cfg.data} has held-out documents of {', '.join(test)}"
        raise UserError(f"--narrow={cfg.narrow}: {have}")
    size = min(map(len, texts.values()))
    broad = "".join(text[:size] for text in texts.values())
    Path(f"{cfg.data}-broad.txt").write_text(broad, encoding="utf-8")
    Path(f"{cfg.data}-narrow.txt").write_text(texts[cfg.narrow], encoding="utf-8")
    return test


def take_documents(cfg, data, ids, documents):
    """The beginnings of some documents of one domain, whose held-out chunks are ids (n,).

    Returns their tokens, cfg.target_chunks chunks of them at most, and which of the chunks hold
    nothing of these documents, bool (n,).
    """
    width = cfg.block_size + 1
    stream = np.asarray(data.val.rows[ids]).reshape(-1)
    free = np.ones(len(ids), bool)
    if not documents:
        return stream[:0], free
    chunks_each = -(-cfg.target_chunks // len(documents))
    pieces = []
    for document in documents:
        first = int(np.searchsorted(ids, document["first_chunk"]))
        start = first * width + document["first_token"]
        end = start + document["n_tokens"]
        free[start // width : end // width + 1] = False
        pieces.append(stream[start : min(end, start + chunks_each * cfg.block_size)])
    return np.concatenate(pieces)[: cfg.target_chunks * cfg.block_size], free


# --- mixtures ---------------------------------------------------------------------


def mixtures(cfg, scores, held):
    """{arm: weight of each domain (D,)}, of all arms but the natural one.

    scores: {kind: {target: {domain: score}}}. held: {domain: chunks}.
    """
    n = len(held)
    names = list(held)
    weights = {"uniform": np.full(n, 1 / n)}
    for kind, of_kind in scores.items():
        for target, score in of_kind.items():
            positive = np.nan_to_num([score[name] for name in names]).clip(min=0)
            by_score = (1 - FLOOR) * positive / max(positive.sum(), 1e-9) + FLOOR / n
            weights[f"{target}: by {kind}"] = by_score
            if kind == "value":
                weights[f"{target}: inverted"] = (1 / by_score) / (1 / by_score).sum()
    weights["narrow: own domain"] = np.array([float(name == cfg.narrow) for name in names])
    return weights


def share_out(weights, n, held):
    """How many of n chunks are of each domain (D,): by its weight, PASSES over a domain at most.
    What a small domain cannot give goes to the others, by their weights.

    Raises UserError where all of them together cannot give n chunks.
    """
    counts = np.zeros(len(weights))
    full = np.zeros(len(weights), bool)  # domains that give all they can
    while not full.all():
        open_weights = np.where(full, 0, weights)
        if not open_weights.sum():
            have = f"the chosen domains hold {held[weights > 0].sum()} chunks"
            raise UserError(f"{have}, too few for {n} in {PASSES} passes: take fewer --steps")
        wanted = (n - counts[full].sum()) * open_weights / open_weights.sum()
        counts[~full] = wanted[~full]
        over = ~full & (counts > PASSES * held)
        if not over.any():
            break
        counts[over] = PASSES * held[over]
        full = full | over
    # to the chunk: the largest remainders are rounded up
    whole = np.floor(counts).astype(int)
    whole[np.argsort(whole - counts, kind="stable")[: n - whole.sum()]] += 1
    return whole


def draw(weights, n, domain, seed):
    """The ids of n chunks, sorted, of each domain by its weight. domain (chunks,): their domains.

    Draws of one seed are nested, arm for arm.
    """
    counts = share_out(weights, n, np.bincount(domain, minlength=len(weights)))
    chosen = []
    for d in np.flatnonzero(counts):
        order = np.random.default_rng((seed, int(d))).permutation(np.flatnonzero(domain == d))
        chosen.append(np.resize(order, counts[d]))  # pass after pass
    return np.sort(np.concatenate(chosen))


# --- a run on a mixture -----------------------------------------------------------


def run(cfg, arm, weights, seed, test):
    """Trains on a mixture, and values it if it is the natural one.

    Returns [row]: what it was trained on, its test losses, and the domains' scores.
    """
    data = open_dataset(cfg.data)
    label = arm.replace(": ", "-").replace(" ", "-")
    out = Path(cfg.out, f"run-{label}-{seed}")
    out.mkdir(parents=True, exist_ok=True)
    chosen = draw(np.asarray(weights), cfg.steps * cfg.batch_size, data.train.domain, seed)
    np.save(out / "keep.npy", chosen)
    options = get_options(
        cfg,
        "batch_size",
        "target_batch",
        "block_size",
        "n_layer",
        "n_head",
        "n_embd",
        "learning_rate",
        "warmup_iters",
    )
    is_valued = arm == "natural"
    settings = train.Config(
        **options,
        min_lr=cfg.learning_rate / 10,
        max_iters=cfg.steps,
        seed=seed,
        keep=str(out / "keep.npy"),
        checkpoint_interval=-(-cfg.steps // cfg.evaluations),
        keep_checkpoints=cfg.evaluations,
        eval_interval=0,
        book_interval=10**9,
        rule=cfg.rule if is_valued else "off",
        target_smoothing=cfg.target_smoothing if is_valued else 0.0,
        targets=f"broad={cfg.data}-broad.txt,narrow={cfg.data}-narrow.txt",
        data_dir=cfg.data,
        out_dir=str(out),
        overwrite=True,
    )
    train.train(settings)
    chunks = np.bincount(data.train.domain[chosen], minlength=len(data.domains))
    row = {
        "seed": seed,
        "arm": arm,
        "chunks": dict(zip(data.domains, chunks.tolist())),
        "repeated": len(chosen) - len(np.unique(chosen)),
        "narrow": cfg.narrow,
        "evaluations": test_losses(out, data, test, settings),
    }
    if is_valued:
        folder = revalue.revalue(revalue.Config(run=str(out), hindsight=True, name="hindsight"))
        row["scores"] = {
            "value": domain_scores(open_run(out), data, "value"),
            "smoothed": domain_scores(open_run(out), data, "smoothed"),
            "hindsight": domain_scores(open_run(folder), data, "hindsight"),
        }
        remove_revaluation(folder)
        folder.parent.rmdir()
    forget_run(out)
    return [row]


def domain_scores(result, data, kind):
    """{target: {domain: score}}, NaN of a domain not met. kind: value or smoothed, of which it is
    the median of score / mean |score| in its step; or hindsight, of which it is the mean."""
    visits = result.visits[result.visits["early"] == 0]
    values = visits["smoothed" if kind == "smoothed" else "value"].astype(float)
    summary = np.mean
    if kind != "hindsight":
        by_step = values.reshape(-1, result.info["batch"], len(result.names))
        values = (by_step / abs(by_step).mean(1, keepdims=True)).reshape(values.shape)
        summary = np.median
    domain = data.train.domain[visits["chunk"]]
    scores = {}
    for k, target in enumerate(result.names):
        scores[target] = {}
        for d, name in enumerate(data.domains):
            of_domain = values[domain == d, k]
            scores[target][name] = float(summary(of_domain)) if len(of_domain) else np.nan
    return scores


@torch.no_grad()
def test_losses(out, data, test, settings):
    """Of every checkpoint: {"step", "loss": {domain: nats per token}}."""
    evaluations = []
    for path in reversed(find_checkpoints(out)):
        checkpoint = read_checkpoint(path)
        model = GPT(GPTConfig(**checkpoint["model_args"])).to(settings.device).eval()
        model.load_state_dict(checkpoint["model"])
        losses = {}
        for name, ids in test.items():
            batches = np.split(ids, range(settings.batch_size, len(ids), settings.batch_size))
            batch_losses = []
            for batch in batches:
                X, Y = data.val.batch(batch, settings.block_size)
                X = torch.as_tensor(X).to(settings.device)
                Y = torch.as_tensor(Y).to(settings.device)
                batch_losses.append(float(model(X, Y)[1]))
            losses[name] = float(np.average(batch_losses, weights=list(map(len, batches))))
        evaluations.append({"step": checkpoint["iter_num"], "loss": losses})
    return evaluations


# --- tables -----------------------------------------------------------------------


class Results:
    """The rows of all runs, by arm and seed."""

    def __init__(self, rows):
        self.narrow = rows[0]["narrow"]  # the domain of the narrow target
        self.runs = {(row["arm"], row["seed"]): row for row in rows}
        self.seeds = sorted(set(column(rows, "seed")))
        trained = set(column(rows, "arm"))
        self.arms = [arm for arm in ARMS if arm in trained]

    def of_arm(self, arm):
        """Its rows, one a seed."""
        return [self.runs[arm, seed] for seed in self.seeds]

    def arms_for(self, target):
        return [arm for arm in self.arms if ARMS[arm] in (None, target)]

    def title(self, target):
        return f"{target}: {'average over the domains' if target == 'broad' else self.narrow}"

    def losses(self, row, target):
        """The target's test loss after each evaluation."""
        losses = column(row["evaluations"], "loss")
        if target == "narrow":
            return np.array(column(losses, self.narrow))
        return np.array([float(np.mean(list(loss.values()))) for loss in losses])

    def last_losses(self, arm, target):
        """The target's last test loss, of each seed (S,)."""
        return np.array([self.losses(row, target)[-1] for row in self.of_arm(arm)])

    def last_domain_losses(self, arm, domain):
        return np.array([row["evaluations"][-1]["loss"][domain] for row in self.of_arm(arm)])

    def shares(self, arm, domain):
        """Percent of the chunks that are of a domain, of each seed."""
        rows = self.of_arm(arm)
        return [100 * row["chunks"][domain] / sum(row["chunks"].values()) for row in rows]


def steps_of(row):
    return np.array(column(row["evaluations"], "step"))


def reached(steps, losses, loss):
    """The step at which the curve of losses, straight between its points, is first at loss; inf if
    never, the first step if before."""
    below = np.flatnonzero(losses <= loss)
    if not len(below):
        return np.inf
    i = below[0]
    if i == 0:
        return float(steps[0])
    share = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
    return float(steps[i - 1] + (steps[i] - steps[i - 1]) * share)


def loss_table(results, target):
    head = [
        "mixture",
        "test loss",
        "minus natural's",
        "minus uniform's",
        "steps to natural's last loss (1: as many)",
        "seeds that got there",
    ]
    natural = results.last_losses("natural", target)
    uniform = results.last_losses("uniform", target)
    lines = []
    for arm in results.arms_for(target):
        last = results.last_losses(arm, target)
        there = []  # steps, of the seeds that reach natural's last loss
        for row, loss in zip(results.of_arm(arm), natural):
            steps = steps_of(row)
            share = reached(steps, results.losses(row, target), loss) / steps[-1]
            if np.isfinite(share):
                there.append(share)
        lines.append(
            [
                arm,
                shown(last, 4),
                shown(last - natural, 4),
                shown(last - uniform, 4),
                shown(there, 2) if there else "never",
                f"{len(there)} of {len(results.seeds)}",
            ]
        )
    return markdown(head, lines)


def domain_loss_table(results):
    """Every domain's test loss, and how much each mixture's differs."""
    others = results.arms[1:]
    tested = results.of_arm("natural")[0]["evaluations"][-1]["loss"]
    lines = []
    for domain in tested:
        natural = results.last_domain_losses("natural", domain)
        line = [domain, shown(natural)]
        for arm in others:
            line.append(shown(results.last_domain_losses(arm, domain) - natural))
        lines.append(line)
    return markdown(["test loss minus natural's", "natural's", *others], lines)


def share_table(results):
    """What every mixture has of each domain, and the domains' scores."""
    natural = results.of_arm("natural")
    lines = []
    for domain in natural[0]["chunks"]:
        line = [domain]
        for arm in results.arms:
            line.append(shown(results.shares(arm, domain), 1))
        for target in TARGETS:
            for kind, factor in (("value", 1), ("hindsight", 1e6)):
                scores = [factor * row["scores"][kind][target][domain] for row in natural]
                line.append(shown(scores, 2))
        lines.append(line)
    head = ["share of the chunks, %", *results.arms]
    for target in TARGETS:
        head += [f"score, {target}", f"hindsight of a visit, {target}, 1e-6 nats"]
    return markdown(head, lines)


def report(rows, out):
    results = Results(rows)
    lines = [
        f"Mean ± standard error over {len(results.seeds)} seeds; differences within a seed. "
        "Test loss in nats per token, on documents that no target holds."
    ]
    for target in TARGETS:
        lines += ["", f"## {results.title(target)}", "", *loss_table(results, target)]
    lines += ["", "## By domain", "", *domain_loss_table(results)]
    lines += ["", *share_table(results), ""]
    repeated = []
    for arm in results.arms:
        repeated.append(f"{arm} {max(column(results.of_arm(arm), 'repeated'))}")
    lines.append(f"Chunks met again, of all: {', '.join(repeated)}")
    figure(results, out / "domains.png")
    finish(out, lines)


# --- figure -----------------------------------------------------------------------


def colour_of(arm):
    return COLOURS[arm.split(": ")[-1]]


def draw_losses(ax, results, target):
    natural = [results.losses(row, target) for row in results.of_arm("natural")]
    for arm in results.arms_for(target):
        rows = results.of_arm(arm)
        gaps = np.array([results.losses(row, target) for row in rows]) - natural
        mean, error = curve(gaps.T)
        steps = steps_of(rows[0])
        ax.plot(steps, mean, color=colour_of(arm), marker=".", label=arm)
        ax.fill_between(steps, mean - error, mean + error, color=colour_of(arm), alpha=0.2, lw=0)
    ax.set(
        title=results.title(target),
        xlabel="step",
        ylabel="test loss minus natural's, nats per token",
    )
    ax.legend(fontsize=8)


def draw_shares(ax, results, target):
    names = list(results.of_arm("natural")[0]["chunks"])
    mixed = [arm for arm in results.arms_for(target) if not arm.endswith("own domain")]
    for i, arm in enumerate(mixed):
        mean, error = curve([results.shares(arm, name) for name in names])
        ax.bar(
            np.arange(len(names)) + (i - 2.5) / 7,
            mean,
            1 / 7,
            yerr=np.nan_to_num(error),
            color=colour_of(arm),
            label=arm,
            error_kw={"lw": 0.7},
        )
    ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    ax.set(ylabel="share of the chunks, %")
    ax.legend(fontsize=8)


def figure(results, path):
    plt = pyplot()
    fig, axes = plt.subplots(2, 2, figsize=(12, 9), width_ratios=(1, 1.4))
    for (left, right), target in zip(axes, TARGETS):
        draw_losses(left, results, target)
        draw_shares(right, results, target)
    save_figure(fig, path)


def train_all(cfg, out):
    """The natural runs, then the others by what those say of the domains."""
    data = prepare(
        cfg.data,
        cfg.source,
        tokenizer=cfg.tokenizer,
        block_size=cfg.block_size,
        val_fraction=0.05,
        limit_tokens=4_000_000 if cfg.quick else 0,
    )
    test = split_heldout(cfg)
    counts = np.bincount(data.train.domain, minlength=len(data.domains)).tolist()
    held = dict(zip(data.domains, counts))
    natural = np.array(counts) / sum(counts)
    jobs = [(cfg, "natural", natural, seed, test) for seed in numbers(cfg.seeds, int)]
    valued = side_by_side(run, jobs, out / "natural.jsonl", cfg.workers)
    jobs = []
    for row in valued:
        for arm, weights in mixtures(cfg, row["scores"], held).items():
            jobs.append((cfg, arm, weights, row["seed"], test))
    side_by_side(run, jobs, out / "rows.jsonl", cfg.workers)


def main(cfg):
    out = Path(cfg.out)
    if cfg.part == "all":
        begin(cfg)
        train_all(cfg, out)
    report(read_rows(out / "natural.jsonl") + read_rows(out / "rows.jsonl"), out)


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
