"""
Mixture weights from values: train once on the natural mixture, value the domains, train again on a mixture that follows the values.

    python experiments/domains.py                                 on the text every Python installation carries
    python experiments/domains.py --source=minipile.jsonl.zst --data=data/minipile --out=results/domains
    python experiments/domains.py --part=report --out=...         tables and figure again, from natural.jsonl and rows.jsonl
    python experiments/domains.py --quick                         all of it tiny, under a minute

The claim is the one that values by domain invite, and which the papers (arXiv 2406.11011, 2602.00329) leave open, for they drop single chunks:
that a domain worth more per token should be met more often. Two targets at once: `broad`, the average over the domains of held-out text, each
as much, and `narrow`, that of one domain. Of every second held-out document the targets are made, and of the others the test, which is
read from the runs' checkpoints; no document is in both.
The rule, fixed before any test: a domain's score is the median over its chunks of value / mean |value| in the step (no step outweighs
another); its weight is (1 - FLOOR) x its part of the sum of the positive scores + FLOOR x uniform. Every mixture has as many tokens, steps x B chunks
in one pass, drawn by its weights to the chunk: without repetition while a domain lasts, then in further passes over it, PASSES at most; what
is missing then goes to the other domains by their weights. Seeds are of everything: the natural run, so its values, weights, draws, initial weights.
Arms: natural (the run that was valued), uniform, by value and inverted (weights proportional to 1 / those by value) for either target, and
for `narrow` its domain alone. Writes natural.jsonl, rows.jsonl, table.md, domains.png.
Two CPU cores: about a quarter of an hour with minipile. Expected there (results/domains), test loss minus the natural mixture's:
narrow by value -.09, inverted +.33, its own domain alone -.22; broad by value +.003, inverted +.012, uniform -.007: no gain there.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config
from data import open_dataset, tokenizer
from experiments.common import (
    begin,
    finish,
    forget_run,
    markdown,
    mean_se,
    prepare,
    pyplot,
    read_rows,
    shown,
    side_by_side,
)
from system.errors import UserError

FLOOR, PASSES = 0.1, 4
ARMS = {
    "natural": None,
    "uniform": None,
    "broad: by value": "broad",
    "broad: inverted": "broad",
}  # arm -> the target it is for
ARMS |= {"narrow: by value": "narrow", "narrow: inverted": "narrow", "narrow: own domain": "narrow"}
QUICK = dict(
    seeds="1,2",
    steps=24,
    evaluations=2,
    test_chunks=6,
    target_chunks=6,
    batch_size=8,
    target_batch=1,
    block_size=64,
)
QUICK |= dict(n_layer=2, n_embd=32, warmup_iters=10)


@dataclass
class Config:
    source: str = "python"  # as in prepare_pile.py
    narrow: str = "Python code"  # the domain of the narrow target
    seeds: str = "1,2,3"
    evaluations: int = 8  # of each run, evenly spaced
    test_chunks: int = 32  # of each domain, evenly spread over its test documents
    target_chunks: int = 64  # of each domain in a target, about as many from each of its documents
    # the runs
    rule: Literal["sgd", "sgd2", "adamw_linear", "adamw", "adamw2"] = "adamw2"
    steps: int = 240
    batch_size: int = 16
    target_batch: int = 8
    tokenizer: Literal["byte", "gpt2"] = "byte"
    block_size: int = 128
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 96
    learning_rate: float = 1e-3
    warmup_iters: int = 40
    # the rest
    data: str = "data/domains"  # the prepared chunks, made when missing
    out: str = "out/domains"
    workers: int = 0  # runs side by side; 0: a core each
    quick: bool = False  # the whole of it tiny
    part: Literal["all", "report"] = "all"  # report: only the tables and the figure


# --- held-out documents: every second one for the targets, the others for the test --------


def split_heldout(cfg):
    """Writes the targets' texts. Returns {domain: test chunks (n,)}; a domain with fewer than two documents has no part in either."""
    import pyarrow.parquet as pq

    data, width = open_dataset(cfg.data), cfg.block_size + 1
    if data.meta["block_size"] != cfg.block_size:
        raise UserError(
            f"{cfg.data} was prepared with --block_size={data.meta['block_size']}: type that, or another --data"
        )
    docs, decode = (
        pq.read_table(data.path / "val_docs.parquet").to_pylist(),
        tokenizer(data.meta["tokenizer"]).decode,
    )
    texts, test = {}, {}
    for d, name in enumerate(data.domains):
        ids = np.flatnonzero(data.val.domain == d)
        stream, free, pieces = (
            np.asarray(data.val.rows[ids]).reshape(-1),
            np.ones(len(ids), bool),
            [],
        )
        chosen = [doc for doc in docs if doc["domain"] == name][1::2]
        for doc in chosen:
            start = int(np.searchsorted(ids, doc["first_chunk"])) * width + doc["first_token"]
            free[start // width : (start + doc["n_tokens"]) // width + 1] = False
            pieces.append(
                stream[
                    start : start
                    + min(doc["n_tokens"], -(-cfg.target_chunks // len(chosen)) * cfg.block_size)
                ]
            )
        if pieces and free.any():
            texts[name] = decode(np.concatenate(pieces)[: cfg.target_chunks * cfg.block_size])
            n = min(cfg.test_chunks, free.sum())
            test[name] = ids[free][np.linspace(0, free.sum() - 1, n).astype(int)]
    if cfg.narrow not in test:
        raise UserError(
            f"--narrow={cfg.narrow}: {cfg.data} has held-out documents of {', '.join(test)}"
        )
    size = min(map(len, texts.values()))
    Path(f"{cfg.data}-broad.txt").write_text(
        "".join(text[:size] for text in texts.values()), encoding="utf-8"
    )
    Path(f"{cfg.data}-narrow.txt").write_text(texts[cfg.narrow], encoding="utf-8")
    return test


# --- a run on a mixture -----------------------------------------------------------


def draw(weights, n, domain, seed):
    """n chunks, a domain's part by its weight, to the chunk (largest remainders): sorted ids. Draws of one seed are nested, arm for arm."""
    held = np.bincount(domain, minlength=len(weights))
    counts, closed = np.zeros(len(weights)), np.zeros(len(weights), bool)
    while not closed.all():  # what a small domain cannot give goes to the others
        open_weights = np.where(closed, 0, weights)
        if not open_weights.sum():
            raise UserError(
                f"the chosen domains hold {held[weights > 0].sum()} chunks, too few for {n} in {PASSES} passes: take fewer --steps"
            )
        counts[~closed] = ((n - counts[closed].sum()) * open_weights / open_weights.sum())[~closed]
        over = ~closed & (counts > PASSES * held)
        if not over.any():
            break
        counts[over], closed = PASSES * held[over], closed | over
    whole = np.floor(counts).astype(int)
    whole[np.argsort(whole - counts, kind="stable")[: n - whole.sum()]] += 1
    chosen = []
    for d in np.flatnonzero(whole):
        order = np.random.default_rng((seed, int(d))).permutation(np.flatnonzero(domain == d))
        chosen.append(np.resize(order, whole[d]))  # pass after pass
    return np.sort(np.concatenate(chosen))


def run(cfg, arm, weights, seed, test):
    """Trains on a mixture (natural: and values it). Returns a row: what it was trained on, its test losses, and the domains' scores."""
    from train import Config as TrainConfig
    from train import train

    data, out = (
        open_dataset(cfg.data),
        Path(cfg.out, f"run-{arm.replace(': ', '-').replace(' ', '-')}-{seed}"),
    )
    out.mkdir(parents=True, exist_ok=True)
    keep = draw(np.asarray(weights), cfg.steps * cfg.batch_size, data.train.domain, seed)
    np.save(out / "keep.npy", keep)
    keys = "batch_size target_batch block_size n_layer n_head n_embd learning_rate warmup_iters".split()
    options = {key: getattr(cfg, key) for key in keys} | dict(
        min_lr=cfg.learning_rate / 10, max_iters=cfg.steps, seed=seed, keep=str(out / "keep.npy")
    )
    options |= dict(
        checkpoint_interval=-(-cfg.steps // cfg.evaluations),
        keep_checkpoints=cfg.evaluations,
        eval_interval=0,
        book_interval=10**9,
    )
    options |= dict(
        rule=cfg.rule if arm == "natural" else "off",
        targets=f"broad={cfg.data}-broad.txt,narrow={cfg.data}-narrow.txt",
    )
    options = TrainConfig(**options, data_dir=cfg.data, out_dir=str(out), overwrite=True)
    train(options)
    used = np.bincount(data.train.domain[keep], minlength=len(data.domains))
    row = dict(
        seed=seed,
        arm=arm,
        chunks=dict(zip(data.domains, used.tolist())),
        repeated=len(keep) - len(np.unique(keep)),
    )
    row |= dict(narrow=cfg.narrow, evaluations=test_losses(out, data, test, options))
    if arm == "natural":
        row |= dict(scores=scores(out, data))
    forget_run(out)
    return [row]


def scores(out, data):
    """{target: {domain: median of value / mean |value| in its step}}, NaN where the run met none."""
    from show.run import open_run

    found = open_run(out)
    visits = found.visits[found.visits["early"] == 0]
    values = visits["value"].astype(float).reshape(-1, found.info["batch"], len(found.names))
    relative = (values / abs(values).mean(1, keepdims=True)).reshape(-1, len(found.names))
    domain = data.train.domain[visits["chunk"]]
    median = [
        [
            float(np.median(relative[domain == d, k])) if (domain == d).any() else np.nan
            for d in range(len(data.domains))
        ]
        for k in (0, 1)
    ]
    return {name: dict(zip(data.domains, row)) for name, row in zip(found.names, median)}


@torch.no_grad()
def test_losses(out, data, test, options):
    """Of every checkpoint: {"step", "loss": {domain: nats per token}}."""
    from model import GPT, GPTConfig
    from system.checkpoints import find_checkpoints, read_checkpoint

    evaluations = []
    for path in reversed(find_checkpoints(out)):
        checkpoint, losses = read_checkpoint(path), {}
        model = GPT(GPTConfig(**checkpoint["model_args"])).to(options.device).eval()
        model.load_state_dict(checkpoint["model"])
        for name, ids in test.items():
            batches = np.split(ids, range(options.batch_size, len(ids), options.batch_size))
            found = [
                float(
                    model(
                        *(
                            torch.as_tensor(a).to(options.device)
                            for a in data.val.batch(b, options.block_size)
                        )
                    )[1]
                )
                for b in batches
            ]
            losses[name] = float(np.average(found, weights=list(map(len, batches))))
        evaluations.append(dict(step=checkpoint["iter_num"], loss=losses))
    return evaluations


def mixtures(cfg, scores, held):
    """{arm: weight of each domain (D,)}. held: {domain: chunks}."""
    n, names = len(held), list(held)
    weights = {
        "natural": np.array(list(held.values())) / sum(held.values()),
        "uniform": np.full(n, 1 / n),
    }
    for target, score in scores.items():
        positive = np.nan_to_num([score[d] for d in names]).clip(min=0)
        chosen = (1 - FLOOR) * positive / max(positive.sum(), 1e-9) + FLOOR / n
        weights |= {
            f"{target}: by value": chosen,
            f"{target}: inverted": (1 / chosen) / (1 / chosen).sum(),
        }
    return weights | {"narrow: own domain": np.array([float(d == cfg.narrow) for d in names])}


# --- tables and figure ---------------------------------------------------------


def losses(row, target, narrow):
    """(steps, the target's test loss after them)."""
    kind = (
        (lambda loss: loss[narrow])
        if target == "narrow"
        else (lambda loss: float(np.mean(list(loss.values()))))
    )
    return np.array([e["step"] for e in row["evaluations"]]), np.array(
        [kind(e["loss"]) for e in row["evaluations"]]
    )


def reached(steps, curve, loss):
    """The step at which a curve, straight between its points, is first at loss; inf if never, the first step if before."""
    below = np.flatnonzero(curve <= loss)
    if not len(below) or not below[0]:
        return float(steps[0]) if len(below) else np.inf
    i = below[0]
    return float(
        steps[i - 1] + (steps[i] - steps[i - 1]) * (curve[i - 1] - loss) / (curve[i - 1] - curve[i])
    )


def loss_table(runs, arms, seeds, target, narrow):
    head = [
        "mixture",
        "test loss",
        "minus natural's",
        "minus uniform's",
        "steps to natural's last loss (1: as many)",
        "seeds that got there",
    ]
    lines, last = (
        [],
        {(arm, s): losses(runs[arm, s], target, narrow)[1][-1] for arm in arms for s in seeds},
    )
    for arm in arms:
        finals = [
            shown([last[arm, s] - (last[base, s] if base else 0) for s in seeds], 4)
            for base in (None, "natural", "uniform")
        ]
        steps = [
            reached(*losses(runs[arm, s], target, narrow), last["natural", s])
            / runs[arm, s]["evaluations"][-1]["step"]
            for s in seeds
        ]
        there = [x for x in steps if np.isfinite(x)]
        lines.append(
            [arm, *finals, shown(there, 2) if there else "never", f"{len(there)} of {len(seeds)}"]
        )
    return markdown(head, lines)


def domain_tables(runs, arms, seeds):
    tested = runs["natural", seeds[0]]["evaluations"][-1]["loss"]
    head, lines = ["test loss minus natural's", "natural's", *arms[1:]], []
    for d in tested:
        last = {(arm, s): runs[arm, s]["evaluations"][-1]["loss"][d] for arm in arms for s in seeds}
        gaps = [shown([last[arm, s] - last["natural", s] for s in seeds]) for arm in arms[1:]]
        lines.append([d, shown([last["natural", s] for s in seeds]), *gaps])
    yield from markdown(head, lines)
    yield ""
    head, lines = ["share of the chunks, %", *arms, "score, broad", "score, narrow"], []
    for d in runs["natural", seeds[0]]["chunks"]:
        shares = [
            shown(
                [
                    100 * runs[arm, s]["chunks"][d] / sum(runs[arm, s]["chunks"].values())
                    for s in seeds
                ],
                1,
            )
            for arm in arms
        ]
        lines.append(
            [
                d,
                *shares,
                *(
                    shown([runs["natural", s]["scores"][k][d] for s in seeds], 2)
                    for k in ("broad", "narrow")
                ),
            ]
        )
    yield from markdown(head, lines)
    yield ""
    yield "Chunks met again, of all: " + ", ".join(
        f"{arm} {max(runs[arm, s]['repeated'] for s in seeds)}" for arm in arms
    )


def report(rows, out):
    narrow, runs, arms = (
        rows[0]["narrow"],
        {(r["arm"], r["seed"]): r for r in rows},
        [arm for arm in ARMS if any(r["arm"] == arm for r in rows)],
    )
    seeds = sorted({r["seed"] for r in rows})
    cases = {
        target: [arm for arm in arms if ARMS[arm] in (None, target)]
        for target in ("broad", "narrow")
    }
    lines = [
        f"Mean ± standard error over {len(seeds)} seeds; differences within a seed. Test loss in nats per token, on documents that no target holds."
    ]
    for target, of in cases.items():
        what = "average over the domains" if target == "broad" else narrow
        lines += ["", f"## {target}: {what}", "", *loss_table(runs, of, seeds, target, narrow)]
    lines += ["", "## By domain", "", *domain_tables(runs, arms, seeds)]
    figure(runs, cases, seeds, narrow, out / "domains.png")
    finish(out, lines)


def figure(runs, cases, seeds, narrow, path):
    plt = pyplot()
    fig, axes = plt.subplots(2, 2, figsize=(12, 9), width_ratios=(1, 1.4))
    colours = {
        "natural": "black",
        "uniform": "0.6",
        "by value": "crimson",
        "inverted": "C0",
        "own domain": "C2",
    }
    for (left, right), (target, arms) in zip(axes, cases.items()):
        for arm in arms:
            colour = colours[arm.split(": ")[-1]]
            curves = np.array(
                [
                    losses(runs[arm, s], target, narrow)[1]
                    - losses(runs["natural", s], target, narrow)[1]
                    for s in seeds
                ]
            )
            steps = losses(runs[arm, seeds[0]], target, narrow)[0]
            mean, error = np.array([mean_se(c) for c in curves.T]).T
            left.plot(steps, mean, color=colour, marker=".", label=arm)
            left.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.2, lw=0)
        left.set(
            title=f"{target}: {'average over the domains' if target == 'broad' else narrow}",
            xlabel="step",
            ylabel="test loss minus natural's, nats per token",
        )
        left.legend(fontsize=8)
        names, mixed = (
            list(runs["natural", seeds[0]]["chunks"]),
            [arm for arm in arms if not arm.endswith("own domain")],
        )
        for i, arm in enumerate(mixed):
            shares = np.array(
                [
                    [
                        100 * runs[arm, s]["chunks"][d] / sum(runs[arm, s]["chunks"].values())
                        for s in seeds
                    ]
                    for d in names
                ]
            )
            mean, error = np.array([mean_se(row) for row in shares]).T
            where = np.arange(len(names)) + (i - 1.5) / 5
            right.bar(
                where,
                mean,
                0.2,
                yerr=np.nan_to_num(error),
                color=colours[arm.split(": ")[-1]],
                label=arm,
                error_kw=dict(lw=0.7),
            )
        right.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        right.set(ylabel="share of the chunks, %")
        right.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main(cfg):
    if cfg.quick:
        cfg = replace(cfg, **QUICK, data=f"{cfg.data}-quick")
    out = Path(cfg.out)
    if cfg.part == "all":
        out = begin(cfg)
        data = prepare(
            cfg.data,
            cfg.source,
            tokenizer=cfg.tokenizer,
            block_size=cfg.block_size,
            val_fraction=0.05,
            limit_tokens=4_000_000 * cfg.quick,
        )
        test, held = (
            split_heldout(cfg),
            dict(
                zip(
                    data.domains,
                    np.bincount(data.train.domain, minlength=len(data.domains)).tolist(),
                )
            ),
        )
        natural, seeds = (
            np.array(list(held.values())) / sum(held.values()),
            [int(s) for s in cfg.seeds.split(",")],
        )
        valued = side_by_side(
            run,
            [(cfg, "natural", natural, seed, test) for seed in seeds],
            out / "natural.jsonl",
            cfg.workers,
        )
        jobs = [
            (cfg, arm, w, r["seed"], test)
            for r in valued
            for arm, w in mixtures(cfg, r["scores"], held).items()
            if arm != "natural"
        ]
        side_by_side(run, jobs, out / "rows.jsonl", cfg.workers)
    report(read_rows(out / "natural.jsonl") + read_rows(out / "rows.jsonl"), out)


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
