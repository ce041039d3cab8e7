"""
What each domain does for a narrow target, and how that changes while the model trains.

    python experiments/stages.py                    on the text every Python installation carries
    python experiments/stages.py --source=minipile.jsonl.zst --seeds=1,2,3,4 \\
        "--targets=Python code,Bible KJV,Handbook de+fr+es" \\
        --data=data/minipile --out=results/stages
    python experiments/stages.py --part=report --out=...      tables and figure, from rows.jsonl
    python experiments/stages.py --quick                      all of it tiny, under a minute

The claim (Wang et al., arXiv 2406.11011, section on the stages of training): for a maths target
ArXiv contributes far beyond its share of the Pile; Pile-CC, which is general text, goes from
positive to negative and then to 0; magnitudes shrink as training goes on.

Here: runs of train.py with a few domains as targets. Their ledgers are cut into stretches of steps,
each twice as long as the one before. In each stretch the chunks' values are added up by domain.
Values fall by orders of magnitude, and one step may outweigh a thousand. So beside sums there is
the *lift*: a chunk's value over the mean magnitude |value| of its own step's chunks. Every step
weighs the same in it. A lift of 1: the domain helps as a typical chunk of the step moves; 0:
nothing; below 0: it hurts. A domain that gave what its share of tokens is would have the lift of
`all`, the whole batch. AdamW's first three steps, marked early in the ledger, are left out.
Writes rows.jsonl, table.md, stages.png.

Two CPU cores: about ten minutes with minipile and four seeds. Expected there (results/stages): in
the last half of the run the own domain, 7, 4 and 3 % of the tokens, has 77, 25 and 18 % of the sum
of values, its lift 1.6 to 2.0 above the others'. Half of the other domains help Python code at
first and hinder it later. Magnitudes fall five- to sevenfold after the warm-up, about twofold
beyond the learning rate's own fall.
"""

import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy import stats

import config
import train
from data import open_dataset
from experiments.common import (
    begin,
    column,
    curve,
    finish,
    forget_run,
    get_options,
    markdown,
    mean_se,
    numbers,
    prepare,
    pyplot,
    read_rows,
    save_figure,
    select,
    set_options,
    shown,
    side_by_side,
)
from show.run import open_run

CERTAIN = 3.3  # standard errors: two-sided p of .001, for a table has hundreds of cells
NATS = 1e6  # values are shown in 1e-6 nats per token
QUICK = {
    "seeds": "1,2",
    "steps": 64,
    "batch_size": 8,
    "target_batch": 1,
    "block_size": 64,
    "n_layer": 2,
    "n_embd": 32,
    "warmup_iters": 10,
    "stretches": 3,
}


@dataclass
class Config:
    source: str = "python"  # as in prepare_pile.py
    # domains: each one's validation chunks are a narrow target
    targets: str = "Python code,Docstrings"
    seeds: str = "1,2,3"  # of weights, order of chunks, draws of target chunks
    stretches: int = 6  # of the run, each as long as all before it
    # --- the runs
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
    # --- the rest
    data: str = "data/stages"  # the prepared chunks, made when missing
    out: str = "out/stages"
    workers: int = 0  # runs side by side; 0: a core each
    quick: bool = False  # the whole of it tiny
    part: Literal["all", "report"] = "all"  # report: only the tables and the figure

    def __post_init__(self):
        if self.quick:
            set_options(self, QUICK)
            self.data += "-quick"


# --- a run and its rows ---------------------------------------------------------


def run(cfg, seed):
    """Trains once. Returns rows: what the ledger says of each target, stretch and domain."""
    out = Path(cfg.out, f"run-{seed}")
    names = [f"val:{name}" for name in cfg.targets.split(",")]
    options = get_options(
        cfg,
        "rule",
        "batch_size",
        "target_batch",
        "block_size",
        "n_layer",
        "n_head",
        "n_embd",
        "learning_rate",
        "warmup_iters",
    )
    train.train(
        train.Config(
            **options,
            min_lr=cfg.learning_rate / 10,
            max_iters=cfg.steps,
            checkpoint_interval=cfg.steps,
            targets=",".join(names),
            seed=seed,
            data_dir=cfg.data,
            out_dir=str(out),
            eval_interval=0,
            book_interval=10**9,
            overwrite=True,
        )
    )
    result = open_run(out)
    data = open_dataset(cfg.data)
    rows = by_stretch(
        result.visits,
        result.books["lr"],
        data.train.domain,
        data.domains,
        result.names,
        result.width,
        cfg.stretches,
    )
    forget_run(out)
    return [{"seed": seed, **row} for row in rows]


def by_stretch(visits, lrs, domain_of, domains, targets, width, stretches):
    """The ledger's visits, B a step in the order of the steps -> rows, a row for every target,
    stretch and domain, and one for `all` domains. Values are per token, in nats.

    lrs (steps,): learning rates. domain_of (chunks,): a chunk's index into domains. width: tokens
    of a chunk.
    """
    steps = int(visits["step"][-1]) + 1
    values = visits["value"].astype(float).reshape(steps, -1, len(targets)) / width
    domain = domain_of[visits["chunk"]].reshape(steps, -1)
    first = int(np.argmin(visits["early"].reshape(steps, -1)[:, 0]))
    halvings = {steps >> i for i in range(stretches)}
    edges = [first, *sorted(edge for edge in halvings if edge > first)]
    rows = []
    for k, target in enumerate(targets):
        for i, (start, end) in enumerate(pairwise(edges)):
            v = values[start:end, :, k]
            size = abs(v).mean(1, keepdims=True)
            about = {
                "target": target,
                "stretch": i,
                "start": int(start),
                "end": int(end),
                "lr": float(lrs[start:end].mean()),
                # the largest step's share of the stretch's |value|
                "largest_step": float(size.max() / size.sum()),
            }
            groups = [("all", np.ones(v.shape, bool))]
            for d, name in enumerate(domains):
                groups.append((name, domain[start:end] == d))
            for name, members in groups:
                if members.any():
                    rows.append({**about, "domain": name, **describe(v, size, members)})
    return rows


def describe(v, size, members):
    """What a stretch's values v (steps, B) say of some chunks, those in members, bool (steps, B).

    size (steps, 1): the mean magnitude of each step. Returns a part of a row, a dict.
    """
    values = v[members]
    n = members.sum(1)
    relative = np.where(members, v / size, 0).sum(1)
    lift = relative.sum() / n.sum()
    # of the lift; steps are what is independent
    error = math.sqrt(((relative - lift * n) ** 2).sum()) / n.sum()
    return {
        "visits": len(values),
        "share": float(members.mean()),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "size": float(abs(values).mean()),
        "median_size": float(np.median(abs(values))),
        "lift": float(lift),
        "error": float(error),
        "share_of_sum": float(values.sum() / v.sum()),
        "share_of_size": float(abs(values).sum() / abs(v).sum()),
    }


# --- tables ---------------------------------------------------------------------


@dataclass(order=True, frozen=True)
class Stretch:
    index: int
    start: int  # its first step
    end: int  # the step after its last

    def title(self):
        return f"{self.start}-{self.end - 1}"

    def middle(self):
        """On a logarithmic axis."""
        return math.sqrt(self.start * self.end)


def find_stretches(rows):
    return sorted({Stretch(row["stretch"], row["start"], row["end"]) for row in rows})


def sign(rows):
    """rows: of one domain in one stretch, a row a seed. "+" or "-" where every seed agrees and all
    their steps together are certain of it, else "0"."""
    lifts = column(rows, "lift")
    lift = np.mean(lifts)
    error = math.sqrt(sum(row["error"] ** 2 for row in rows)) / len(rows)
    agree = len({x > 0 for x in lifts}) == 1
    if not agree or abs(lift) < CERTAIN * error:
        return "0"
    return "+" if lift > 0 else "-"


def by_seed(rows, target, stretch, needs="all"):
    """[{domain: row}, ...] of a stretch, for every seed that met the domain it needs."""
    seeds = []
    for seed in sorted({row["seed"] for row in rows}):
        stretch_rows = select(rows, target=target, stretch=stretch.index, seed=seed)
        by_domain = {row["domain"]: row for row in stretch_rows}
        if needs in by_domain:
            seeds.append(by_domain)
    return seeds


def gap(own, everyone):
    """Lift of a domain over that of all other tokens of the stretch. Both arguments are rows."""
    share = own["share"]
    others = (everyone["lift"] - share * own["lift"]) / (1 - share)
    return own["lift"] - others


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
    for stretch in stretches:
        seeds = by_seed(rows, target, stretch, needs=target)
        own_rows = column(seeds, target)
        all_rows = column(seeds, "all")
        shares = []
        for key in ("share", "share_of_sum", "share_of_size"):
            shares.append(shown(100 * np.array(column(own_rows, key)), 1) + " %")
        gaps = [gap(*pair) for pair in zip(own_rows, all_rows)]
        mean, error = mean_se(gaps)
        p = stats.t.sf(mean / error, len(gaps) - 1) if len(gaps) > 1 else math.nan
        medians = np.subtract(column(own_rows, "median"), column(all_rows, "median")) * NATS
        lines.append(
            [
                stretch.title(),
                *shares,
                shown(column(own_rows, "lift"), 2),
                shown(column(all_rows, "lift"), 2),
                shown(gaps, 2),
                f"{p:.2g}",
                shown(medians, 2),
            ]
        )
    return markdown(head, lines)


def size_over_lr(rows):
    """The median magnitude over the learning rate: (rows,)."""
    return np.divide(column(rows, "median_size"), column(rows, "lr"))


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
        first = size_over_lr(column(by_seed(rows, target, stretches[0]), "all"))
        for stretch in stretches:
            all_rows = column(by_seed(rows, target, stretch), "all")
            lines.append(
                [
                    target,
                    stretch.title(),
                    shown(NATS * np.array(column(all_rows, "size")), 2),
                    shown(NATS * np.array(column(all_rows, "median_size")), 2),
                    shown(size_over_lr(all_rows) / first),
                    f"{max(column(all_rows, 'largest_step')):.0%}",
                ]
            )
    return markdown(head, lines)


def domain_table(rows, target, stretches):
    """Every domain's lift by stretch with its sign, sorted by the last one; the domains that are
    certain of both signs; the mean values in nats."""
    last = stretches[-1].index
    last_lift = {}
    for name in sorted(set(column(select(rows, target=target), "domain"))):
        lifts = column(select(rows, target=target, domain=name, stretch=last), "lift")
        last_lift[name] = -np.mean(lifts or math.nan)
    lifts = []
    means = []
    changing = []
    for name in sorted(last_lift, key=last_lift.get):
        title = f"**{name}**" if name == target else name
        lift_cells = []
        mean_cells = []
        signs = ""
        for stretch in stretches:
            met = select(rows, target=target, domain=name, stretch=stretch.index)
            lift_cells.append(shown(column(met, "lift"), 2) if met else "")
            mean_cells.append(shown(NATS * np.array(column(met, "mean")), 2) if met else "")
            signs += sign(met) if met else " "
        lifts.append([title, *lift_cells, f"`{signs}`"])
        means.append([title, *mean_cells])
        if "+" in signs and "-" in signs:
            changing.append(f"{name} `{signs}`")
    steps = [stretch.title() for stretch in stretches]
    return [
        *markdown(["lift", *steps, "sign"], lifts),
        "",
        f"Certain of both signs: {', '.join(changing) or 'none'}.",
        "",
        *markdown(["mean value per token, 1e-6 nats", *steps], means),
    ]


def report(rows, out):
    targets = list(dict.fromkeys(column(rows, "target")))
    stretches = find_stretches(rows)
    n = len({row["seed"] for row in rows})
    lines = [
        f"Mean ± standard error over {n} seeds. Lift: value over the mean magnitude of its step. "
        "p: one-sided t over the seeds."
    ]
    for target in targets:
        lines += ["", f"## {target}: the target's own domain", ""]
        lines += own_table(rows, target, stretches)
    lines += ["", "(Last column: 1e-6 nats per token.)", ""]
    lines += ["## Magnitudes, 1e-6 nats per token, all domains", ""]
    lines += size_table(rows, targets, stretches)
    for target in targets:
        lines += ["", f"## {target}: domain by domain", ""]
        lines += domain_table(rows, target, stretches)
    lines += [
        "",
        "Sign: + or - where all seeds agree and the steps of all seeds are "
        f"{CERTAIN} standard errors from 0, else 0.",
    ]
    figure(rows, targets, stretches, out / "stages.png")
    finish(out, lines)


# --- figure ---------------------------------------------------------------------


def domain_curve(rows, name, stretches, key):
    """Mean and standard error, by stretch, of a key of one domain's rows."""
    points = []
    for stretch in stretches:
        points.append(column(select(rows, domain=name, stretch=stretch.index), key))
    return curve(points)


def always_met(rows, stretches):
    """The domains that every stretch met."""
    names = set(column(rows, "domain"))
    for stretch in stretches:
        names &= set(column(select(rows, stretch=stretch.index), "domain"))
    return sorted(names)


def figure(rows, targets, stretches, path):
    """The lifts, the mean values in nats, and the magnitudes. Named: the own domain, the whole
    batch, those that end highest and lowest."""
    plt = pyplot()
    fig, axes = plt.subplots(
        3, len(targets), figsize=(5 * len(targets), 12), sharex=True, sharey="row", squeeze=False
    )
    for target, column_axes in zip(targets, axes.T):
        draw_target(column_axes, select(rows, target=target), target, stretches)
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(low, high + 0.35 * (high - low))  # room for the legend
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    save_figure(fig, path)


def draw_target(axes, rows, target, stretches):
    """The three axes of one target, from its rows."""
    above, middle, below = axes
    middles = [stretch.middle() for stretch in stretches]
    lifts = {}
    for name in always_met(rows, stretches):
        lifts[name] = domain_curve(rows, name, stretches, "lift")
    last_lift = {name: (mean[-1], name) for name, (mean, _) in lifts.items()}
    others = sorted(lifts.keys() - {target, "all"}, key=last_lift.get)
    named = dict.fromkeys([target, "all", *others[:-4:-1], *others[:3]])
    colours = dict(zip(named, ["crimson", "black", "C0", "C2", "C4", "C5", "C1", "C9"]))
    for name in others:
        above.plot(middles, lifts[name][0], color="0.85", lw=0.8, zorder=0)
    for name, colour in colours.items():
        style = {
            "color": colour,
            "lw": 2.2 if name in (target, "all") else 1.2,
            "ls": "--" if name == "all" else "-",
            "marker": ".",
        }
        mean, error = lifts[name]
        above.plot(middles, mean, label=name, **style)
        above.fill_between(middles, mean - error, mean + error, color=colour, alpha=0.15, lw=0)
        mean, error = domain_curve(rows, name, stretches, "mean")
        middle.errorbar(middles, NATS * mean, NATS * error, **style)
    for name in (target, "all"):
        mean, error = domain_curve(rows, name, stretches, "median_size")
        style = {"color": colours[name], "ls": "--" if name == "all" else "-", "marker": "."}
        below.errorbar(middles, NATS * mean, NATS * error, label=name, **style)
    for ax in (above, middle):
        ax.axhline(0, color="0.5", lw=0.8)
    above.set(
        title=f"target: {target}", xscale="log", ylabel="lift: value / mean |value| of its step"
    )
    above.legend(fontsize=7, ncols=2, framealpha=0.6)
    middle.set_yscale("symlog", linthresh=1)
    middle.set_ylabel("mean value per token, 1e-6 nats (linear within 1)")
    below.set(yscale="log", xlabel="step", ylabel="median |value| per token, 1e-6 nats")
    below.legend(fontsize=7)


def main(cfg):
    out = Path(cfg.out)
    if cfg.part == "all":
        begin(cfg)
        prepare(
            cfg.data,
            cfg.source,
            tokenizer=cfg.tokenizer,
            block_size=cfg.block_size,
            val_fraction=0.05,
            limit_tokens=4_000_000 if cfg.quick else 0,
        )
        jobs = [(cfg, seed) for seed in numbers(cfg.seeds, int)]
        side_by_side(run, jobs, out / "rows.jsonl", cfg.workers)
    report(read_rows(out / "rows.jsonl"), out)


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
