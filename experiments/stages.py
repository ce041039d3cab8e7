"""
What each domain does for a narrow target, and how that changes while the model trains.

    python experiments/stages.py                                  on the text every Python installation carries
    python experiments/stages.py --source=minipile.jsonl.zst "--targets=Python code,Bible KJV,Handbook de+fr+es" --seeds=1,2,3,4 \
        --data=data/minipile --out=results/stages
    python experiments/stages.py --part=report --out=...          tables and figure again, from rows.jsonl
    python experiments/stages.py --quick                          all of it tiny, under a minute

The claim (Wang et al., arXiv 2406.11011, section on the stages of training): for a maths target ArXiv contributes far beyond its share of the
Pile; Pile-CC, which is general text, goes from positive to negative and then to 0; magnitudes shrink as training goes on.
Here: runs of train.py with a few domains as targets. Their ledgers are cut into stretches of steps, each twice as long as the one before,
and in each the chunks' values are added up by domain. Values fall by orders of magnitude, and one step may outweigh a thousand, so beside sums
there is the *lift*: a chunk's value over the mean magnitude |value| of its own step's chunks. Every step weighs the same in it. 1: its
domain helps as a typical chunk of the step moves; 0: nothing; below 0: it hurts. A domain that gave what its share of tokens is would
have the lift of `all`, the whole batch. AdamW's first three steps, marked early in the ledger, are left out.
Writes rows.jsonl, table.md, stages.png.
Two CPU cores: about ten minutes with minipile and four seeds. Expected there (results/stages): in the last half of the run the own domain,
7, 4 and 3 % of the tokens, has 77, 25 and 18 % of the sum of values, its lift 1.6 to 2.0 above the others'; half of the other domains help Python
code at first and hinder it later; magnitudes fall five- to sevenfold after the warm-up, about twofold beyond the learning rate's own fall.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config
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

CERTAIN = 3.3  # standard errors: two-sided p of .001, for a table has hundreds of cells
QUICK = dict(
    seeds="1,2",
    steps=64,
    batch_size=8,
    target_batch=1,
    block_size=64,
    n_layer=2,
    n_embd=32,
    warmup_iters=10,
    stretches=3,
)


@dataclass
class Config:
    source: str = "python"  # as in prepare_pile.py
    targets: str = (
        "Python code,Docstrings"  # domains: each one's validation chunks are a narrow target
    )
    seeds: str = "1,2,3"  # of weights, order of chunks, draws of target chunks
    stretches: int = 6  # of the run, each as long as all before it
    # the runs
    rule: Literal["sgd", "sgd2", "adamw_linear", "adamw", "adamw2"] = "adamw2"
    steps: int = 480
    batch_size: int = 16
    target_batch: int = 4
    tokenizer: Literal["byte", "gpt2"] = "byte"
    block_size: int = 128
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 96
    learning_rate: float = 1e-3
    warmup_iters: int = 40
    # the rest
    data: str = "data/stages"  # the prepared chunks, made when missing
    out: str = "out/stages"
    workers: int = 0  # runs side by side; 0: a core each
    quick: bool = False  # the whole of it tiny
    part: Literal["all", "report"] = "all"  # report: only the tables and the figure


def run(cfg, seed):
    """One run, and what its ledger says: a row for every target, stretch and domain, and for `all` of them."""
    from data import open_dataset
    from show.run import open_run
    from train import Config as TrainConfig
    from train import train

    out = Path(cfg.out, f"run-{seed}")
    targets = ",".join(f"val:{name}" for name in cfg.targets.split(","))
    keys = "rule batch_size target_batch block_size n_layer n_head n_embd learning_rate warmup_iters".split()
    options = {key: getattr(cfg, key) for key in keys} | dict(
        min_lr=cfg.learning_rate / 10, max_iters=cfg.steps, checkpoint_interval=cfg.steps
    )
    train(
        TrainConfig(
            **options,
            targets=targets,
            seed=seed,
            data_dir=cfg.data,
            out_dir=str(out),
            eval_interval=0,
            book_interval=10**9,
            overwrite=True,
        )
    )
    found, data = open_run(out), open_dataset(cfg.data)
    rows = by_stretch(
        found.visits,
        found.books["lr"],
        data.train.domain,
        data.domains,
        found.names,
        found.width,
        cfg.stretches,
    )
    forget_run(out)
    return [dict(seed=seed, **row) for row in rows]


def by_stretch(visits, lrs, domain_of, domains, targets, width, stretches):
    """The ledger's visits, B a step in the order of the steps -> rows. Values are per token, in nats."""
    steps = int(visits["step"][-1]) + 1
    values = visits["value"].astype(float).reshape(steps, -1, len(targets)) / width
    domain = domain_of[visits["chunk"]].reshape(steps, -1)
    first = int(np.argmin(visits["early"].reshape(steps, -1)[:, 0]))
    edges = [first, *sorted({steps >> i for i in range(stretches) if steps >> i > first})]
    for k, target in enumerate(targets):
        v = values[:, :, k]
        size = abs(v).mean(1, keepdims=True)
        for i, (a, b) in enumerate(pairwise(edges)):
            common = dict(
                target=target, stretch=i, start=int(a), end=int(b), lr=float(lrs[a:b].mean())
            )
            common |= dict(
                largest_step=float(size[a:b].max() / size[a:b].sum())
            )  # its share of the stretch's |value|
            everyone = np.ones((b - a, v.shape[1]), bool)
            for d, mine in [
                ("all", everyone),
                *((name, domain[a:b] == d) for d, name in enumerate(domains)),
            ]:
                n, own = mine.sum(1), v[a:b][mine]
                if n.sum():
                    relative = np.where(mine, v[a:b] / size[a:b], 0).sum(1)
                    lift = relative.sum() / n.sum()
                    error = (
                        math.sqrt(((relative - lift * n) ** 2).sum()) / n.sum()
                    )  # steps are what is independent
                    row = dict(
                        domain=d,
                        visits=len(own),
                        share=float(mine.mean()),
                        mean=own.mean(),
                        median=np.median(own),
                    )
                    row |= dict(
                        size=abs(own).mean(),
                        median_size=np.median(abs(own)),
                        lift=lift,
                        error=error,
                    )
                    row |= dict(
                        share_of_sum=own.sum() / v[a:b].sum(),
                        share_of_size=abs(own).sum() / abs(v[a:b]).sum(),
                    )
                    yield common | {
                        key: float(x) if isinstance(x, np.floating) else x for key, x in row.items()
                    }


# --- tables and figure ---------------------------------------------------------


def cell(rows, **of):
    return [r for r in rows if all(r[key] == value for key, value in of.items())]


def sign(rows):
    """Of one domain in one stretch, a row a seed: "+" or "-" where every seed agrees and all their steps together are certain of it, else "0"."""
    lift, error = (
        np.mean([r["lift"] for r in rows]),
        math.sqrt(sum(r["error"] ** 2 for r in rows)) / len(rows),
    )
    agree = len({r["lift"] > 0 for r in rows}) == 1
    return "0" if not agree or abs(lift) < CERTAIN * error else "+" if lift > 0 else "-"


def over_seeds(rows, target, stretch, value, needs="all"):
    """value(rows of one seed, by domain) of every seed whose stretch met the domain it needs."""
    found = [
        {r["domain"]: r for r in cell(rows, target=target, stretch=stretch, seed=seed)}
        for seed in sorted({r["seed"] for r in rows})
    ]
    return [value(of) for of in found if needs in of]


def gap(own, of):
    """Lift of a domain over that of all other tokens of the stretch."""
    share = of[own]["share"]
    return of[own]["lift"] - (of["all"]["lift"] - share * of[own]["lift"]) / (1 - share)


def own_table(rows, target, stretches):
    head = [
        "steps",
        "own share of tokens",
        "of the sum",
        "of the sum of magnitudes",
        "own lift",
        "lift of all",
        "own - the others'",
        "p",
        "median own - others'",
    ]
    lines = []
    for s, (a, b) in stretches:
        figures = partial(over_seeds, rows, target, s, needs=target)
        gaps = figures(partial(gap, target))
        mean, error = mean_se(gaps)
        p = stats.t.sf(mean / error, len(gaps) - 1) if len(gaps) > 1 else math.nan
        medians = figures(lambda of: (of[target]["median"] - of["all"]["median"]) * 1e6)
        shares = [
            shown([100 * x for x in figures(lambda of, key=key: of[target][key])], 1) + " %"
            for key in ("share", "share_of_sum", "share_of_size")
        ]
        lifts = [shown(figures(lambda of, d=d: of[d]["lift"]), 2) for d in (target, "all")]
        lines.append(
            [f"{a}-{b - 1}", *shares, *lifts, shown(gaps, 2), f"{p:.2g}", shown(medians, 2)]
        )
    return markdown(head, lines)


def size_table(rows, targets, stretches):
    head = [
        "target",
        "steps",
        "mean magnitude",
        "median magnitude",
        "median over lr, first stretch = 1",
        "largest step's share of the stretch",
    ]
    lines = []
    for target in targets:
        first = over_seeds(rows, target, 0, lambda of: of["all"]["median_size"] / of["all"]["lr"])
        for s, (a, b) in stretches:
            figures = partial(over_seeds, rows, target, s)
            rates = np.divide(figures(lambda of: of["all"]["median_size"] / of["all"]["lr"]), first)
            sizes = [
                shown([1e6 * x for x in figures(lambda of, key=key: of["all"][key])], 2)
                for key in ("size", "median_size")
            ]
            lines.append(
                [
                    target,
                    f"{a}-{b - 1}",
                    *sizes,
                    shown(rates),
                    f"{max(figures(lambda of: of['all']['largest_step'])):.0%}",
                ]
            )
    return markdown(head, lines)


def domain_table(rows, target, stretches):
    """Every domain's lift by stretch with its sign, sorted by the last one; the domains that are certain of both signs; the means in nats."""
    names = {r["domain"] for r in cell(rows, target=target)}
    mean = {
        d: {
            s: np.mean(
                [r["lift"] for r in cell(rows, target=target, domain=d, stretch=s)] or math.nan
            )
            for s, _ in stretches
        }
        for d in names
    }
    lines, changing, means = [], [], []
    for d in sorted(names, key=lambda d: -mean[d][stretches[-1][0]]):
        found = [cell(rows, target=target, domain=d, stretch=s) for s, _ in stretches]
        signs = "".join(sign(f) if f else " " for f in found)
        title = f"**{d}**" if d == target else d
        lines.append(
            [title, *(shown([r["lift"] for r in f], 2) if f else "" for f in found), f"`{signs}`"]
        )
        means.append([title, *(shown([1e6 * r["mean"] for r in f], 2) if f else "" for f in found)])
        if "+" in signs and "-" in signs:
            changing.append(f"{d} `{signs}`")
    steps = [f"{a}-{b - 1}" for _, (a, b) in stretches]
    changed = f"Certain of both signs: {', '.join(changing) or 'none'}."
    return [
        *markdown(["lift", *steps, "sign"], lines),
        "",
        changed,
        "",
        *markdown(["mean value per token, 1e-6 nats", *steps], means),
    ]


def report(rows, out):
    targets, stretches = (
        list(dict.fromkeys(r["target"] for r in rows)),
        sorted({r["stretch"]: (r["start"], r["end"]) for r in rows}.items()),
    )
    n = len({r["seed"] for r in rows})
    lines = [
        f"Mean ± standard error over {n} seeds. Lift: value over the mean magnitude of its step. p: one-sided t over the seeds."
    ]
    for target in targets:
        lines += [
            "",
            f"## {target}: the target's own domain",
            "",
            *own_table(rows, target, stretches),
        ]
    lines += [
        "",
        "(Last column: 1e-6 nats per token.)",
        "",
        "## Magnitudes, 1e-6 nats per token, all domains",
        "",
        *size_table(rows, targets, stretches),
    ]
    for target in targets:
        lines += ["", f"## {target}: domain by domain", "", *domain_table(rows, target, stretches)]
    lines += [
        "",
        f"Sign: + or - where all seeds agree and the steps of all seeds are {CERTAIN} standard errors from 0, else 0.",
    ]
    figure(rows, targets, stretches, out / "stages.png")
    finish(out, lines)


def figure(rows, targets, stretches, path):
    """The lifts, the mean values in nats, and the magnitudes. Named: the own domain, the whole batch, those that end highest and lowest."""
    plt = pyplot()
    fig, axes = plt.subplots(
        3, len(targets), figsize=(5 * len(targets), 12), sharex=True, sharey="row", squeeze=False
    )
    middles = [math.sqrt(a * b) for _, (a, b) in stretches]
    for (above, middle, below), target in zip(axes.T, targets):
        names = [
            d
            for d in {r["domain"] for r in cell(rows, target=target)}
            if all(cell(rows, target=target, domain=d, stretch=s) for s, _ in stretches)
        ]
        curve = {
            d: np.array(
                [
                    mean_se([r["lift"] for r in cell(rows, target=target, domain=d, stretch=s)])
                    for s, _ in stretches
                ]
            )
            for d in names
        }
        others = sorted(set(names) - {target, "all"}, key=lambda d: (curve[d][-1, 0], d))
        named = dict.fromkeys([target, "all", *others[:-4:-1], *others[:3]])
        colours = dict(zip(named, ["crimson", "black", *(f"C{i}" for i in (0, 2, 4, 5, 1, 9))]))
        for d in others:
            above.plot(middles, curve[d][:, 0], color="0.85", lw=0.8, zorder=0)
        for d, colour in colours.items():
            mean, error = curve[d].T
            above.plot(
                middles,
                mean,
                color=colour,
                lw=2.2 if d in (target, "all") else 1.2,
                ls="--" if d == "all" else "-",
                marker=".",
                label=d,
            )
            above.fill_between(middles, mean - error, mean + error, color=colour, alpha=0.15, lw=0)
            nats = np.array(
                [
                    mean_se(
                        [1e6 * r["mean"] for r in cell(rows, target=target, domain=d, stretch=s)]
                    )
                    for s, _ in stretches
                ]
            )
            middle.errorbar(
                middles,
                *nats.T,
                color=colour,
                lw=2.2 if d in (target, "all") else 1.2,
                ls="--" if d == "all" else "-",
                marker=".",
            )
        for ax in (above, middle):
            ax.axhline(0, color="0.5", lw=0.8)
        middle.set_yscale("symlog", linthresh=1)
        middle.set_ylabel("mean value per token, 1e-6 nats (linear within 1)")
        above.set(
            title=f"target: {target}", xscale="log", ylabel="lift: value / mean |value| of its step"
        )
        above.legend(fontsize=7, ncols=2, framealpha=0.6)
        for d in (target, "all"):
            size = np.array(
                [
                    mean_se(
                        [
                            1e6 * r["median_size"]
                            for r in cell(rows, target=target, domain=d, stretch=s)
                        ]
                    )
                    for s, _ in stretches
                ]
            )
            below.errorbar(
                middles,
                *size.T,
                color=colours[d],
                ls="--" if d == "all" else "-",
                marker=".",
                label=d,
            )
        below.set(yscale="log", xlabel="step", ylabel="median |value| per token, 1e-6 nats")
        below.legend(fontsize=7)
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(low, high + 0.35 * (high - low))  # room for the legend
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main(cfg):
    if cfg.quick:
        cfg = replace(cfg, **QUICK, data=f"{cfg.data}-quick")
    if cfg.part == "all":
        out = begin(cfg)
        prepare(
            cfg.data,
            cfg.source,
            tokenizer=cfg.tokenizer,
            block_size=cfg.block_size,
            val_fraction=0.05,
            limit_tokens=4_000_000 * cfg.quick,
        )
        side_by_side(
            run,
            [(cfg, int(seed)) for seed in cfg.seeds.split(",")],
            out / "rows.jsonl",
            cfg.workers,
        )
    report(read_rows(Path(cfg.out, "rows.jsonl")), Path(cfg.out))


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
