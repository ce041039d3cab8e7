"""
How far to trust a value: each rule against the step that the optimizer really takes, and cheaper targets against dearer ones.

    python experiments/fidelity.py                                         on the text every Python installation carries
    python experiments/fidelity.py --source=minipile.jsonl.zst --out=results/fidelity
    python experiments/fidelity.py --part=report --out=...                 tables and figure again, from rows.jsonl and targets.jsonl

Rules: for every setting a small GPT is trained by AdamW; at some of its steps the game of that very step (B chunks, one target) is
solved: by all 2^B subsets for B = 8, by antithetic permutations for B = 16, the optimizer's own step run for each subset in float64.
The rules' values come from rules.py beside it, which the tests hold equal to what a run computes.
Targets: whole runs of train.py that differ in --target_batch, --target_interval and --target_sampling only; the weights go the same
way in all of them, so their values.npy can be compared chunk by chunk with a run whose target is REFERENCE chunks a step.
Writes rows.jsonl, targets.jsonl, table.md, fidelity.png. Two CPU cores: about an hour for the rules, a quarter for the targets.
"""

import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as train.py does

import numpy as np
import torch
from tqdm import tqdm

import config
from data import global_batch, open_dataset
from experiments.common import forget_run
from model import GPT, GPTConfig
from shapley import exact, rules
from system.errors import UserError

T, WARMUP = 64, 100
VOCABS = {
    "byte": dict(n_layer=3, n_head=4, n_embd=96),
    "gpt2": dict(n_layer=3, n_head=2, n_embd=32),
}  # tied head in both


@dataclass
class Config:
    source: str = "python"  # as in prepare_pile.py
    target: str = "Python code"  # domain of the target
    target_batch: int = 1  # its chunks, the same in the rule and in the truth
    lrs: str = "3e-4,6e-4,5e-3"
    clips: str = "1.0,0"  # 0: no clipping
    seeds: str = "1,2"
    vocabs: str = "byte,gpt2"
    steps: str = "20,110,200,300"  # judged; 20 is in the warm-up of 100 steps
    permutations: int = 200  # at B = 16
    data: str = "data/fidelity"  # the prepared chunks, made when missing
    out: str = "out/fidelity"
    workers: int = os.cpu_count() or 1
    part: Literal["all", "rules", "targets", "report"] = (
        "all"  # report: only the tables and the figure
    )


def numbers(text, kind=float):
    return [kind(x) for x in text.split(",")]


# --- the rules and their parts: name -> arguments of rules.rule_values --------


def hermite(q):
    """E[secant(g)] for g ~ N(mhat, vhat - mhat^2), by three Gauss-Hermite points: instead of the mean field."""
    q = dict(q, v=torch.maximum(q["v"], rules.FLOORS["adamw"] * q["v"].mean()))
    mhat, vhat = (
        q["m"] / (1 - q["beta1"] ** (q["t"] - 1)),
        q["v"] / (1 - q["beta2"] ** (q["t"] - 1)),
    )
    sd = (vhat - mhat**2).clamp(min=0).sqrt()
    return sum(
        weight * rules.secant(q, mhat + z * sd)
        for z, weight in [(0.0, 2 / 3), (3**0.5, 1 / 6), (-(3**0.5), 1 / 6)]
    )


def floored(floor):
    return lambda q: rules.expected_secant(q, floor)


def norms_only(x, known):
    return rules.inner_products(x, [rows if g.dim() == 1 else None for g, rows in zip(x[0], known)])


def whole(x, known):
    return rules.inner_products(x, [torch.ones_like(g, dtype=bool) for g in x[0]])


RULES = {
    "sgd": dict(rule="sgd"),
    "sgd2": dict(rule="sgd2"),
    "adamw_linear, no floor": dict(rule="adamw_linear", floor=0.0),
    "adamw_linear": dict(rule="adamw_linear"),
    "adamw": dict(rule="adamw"),
    "adamw, no look-ahead": dict(rule="adamw", lookahead=False),
    "adamw, no secant": dict(rule="adamw", expected=rules.linearised, known=None),
    "adamw, every secant predicted": dict(rule="adamw", known=None),
    "adamw, floor 1e-2": dict(rule="adamw", expected=floored(1e-2)),
    "adamw, no floor": dict(rule="adamw", expected=floored(0.0)),
    "adamw, 3-point secant": dict(rule="adamw", expected=hermite),
    "adamw, no clip correction": dict(rule="adamw", products=lambda x, known: False),
    "adamw, clip by LayerNorms alone": dict(rule="adamw", products=norms_only),
    "adamw, clip by all weights": dict(rule="adamw", products=whole),
    "adamw, clip by squared norms": dict(rule="adamw", products=lambda x, known: torch.stack([exact.dot(g, g) for g in x])),
    "adamw2": dict(rule="adamw2"),
}  # fmt: skip
MAIN = ("sgd", "sgd2", "adamw_linear, no floor", "adamw_linear", "adamw", "adamw2", "leave-one-out")


def judge_step(model, optimizer, X, Y, loss, lr, clip, permutations):
    """One row a rule: its values of the coming step against the truth."""
    x, known = exact.chunk_gradients(model, X, Y), rules.known_rows(model, X, Y)
    step = exact.Step(model, optimizer, x, [loss], clip)
    truth, errors = (a[:, 0] for a in exact.solve(step, len(x), permutations, tolerance=0.02))
    rms = float(np.sqrt(np.mean(truth**2)))
    common = dict(
        kappa=rules.clip_coefficient([sum(g) for g in zip(*x)], clip),
        truth_rms=rms,
        truth_error=float(np.sqrt(np.mean(errors**2)) / rms),
    )
    found = {}
    for name, arguments in RULES.items():
        arguments = {"known": known, "products": rules.inner_products, **arguments}
        arguments["products"] = arguments["products"](x, known)
        found[name] = rules.rule_values(
            model, optimizer, x, [loss], lr=lr, grad_clip=clip, **arguments
        )[:, 0].numpy()
    found["leave-one-out"] = exact.leave_one_out(step, len(x))[:, 0]
    return [
        dict(
            name=name, **common, sum_ratio=float(v.sum() / truth.sum()), **exact.agreement(v, truth)
        )
        for name, v in found.items()
    ]


def train_and_judge(cfg, vocab, lr_max, clip, B, seed):
    torch.set_num_threads(1)
    data = open_dataset(f"{cfg.data}-{vocab}")
    torch.manual_seed(seed)
    model = GPT(GPTConfig(T, -(-data.meta["vocab_size"] // 64) * 64, bias=False, **VOCABS[vocab]))
    optimizer = model.configure_optimizers(0.1, lr_max, (0.9, 0.95), "cpu")
    ids = np.flatnonzero(data.val.domain == data.domains.index(cfg.target))
    steps, rows = set(numbers(cfg.steps, int)), []
    for step in range(max(steps) + 1):
        lr = lr_max * min(1.0, (step + 1) / (WARMUP + 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        X, Y = map(
            torch.from_numpy, data.train.batch(global_batch(step, B, len(data.train.rows), seed), T)
        )
        if step in steps:
            picks = np.random.default_rng((seed, step)).choice(ids, cfg.target_batch, replace=False)
            loss = exact.batch_loss(*map(torch.from_numpy, data.val.batch(picks, T)))
            began = time.perf_counter()
            for row in judge_step(model, optimizer, X, Y, loss, lr, clip, cfg.permutations):
                rows.append(
                    dict(
                        vocab=vocab,
                        lr=lr_max,
                        clip=clip,
                        B=B,
                        seed=seed,
                        step=step,
                        seconds=time.perf_counter() - began,
                        **row,
                    )
                )
        training_loss = model(X, Y)[1]
        training_loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    for row in rows:
        row["last_loss"] = training_loss.item()
    return rows


# -----------------------------------------------------------------------------


def prepare(cfg):
    from prepare_pile import Config as PileConfig
    from prepare_pile import prepare

    for vocab in cfg.vocabs.split(","):
        if not Path(f"{cfg.data}-{vocab}", "meta.json").is_file():
            prepare(
                PileConfig(
                    source=cfg.source,
                    tokenizer=vocab,
                    block_size=T,
                    val_fraction=0.02,
                    data_dir=f"{cfg.data}-{vocab}",
                )
            )


def run(cfg):
    prepare(cfg)
    vocabs, seeds = cfg.vocabs.split(","), numbers(cfg.seeds, int)
    jobs = [
        (v, lr, clip, 8, seed)
        for seed, v, lr, clip in product(seeds, vocabs, numbers(cfg.lrs), numbers(cfg.clips))
    ]
    jobs = [(v, 6e-4, 1.0, 16, seeds[0]) for v in vocabs[::-1]] + jobs  # the longest first
    with (
        open(Path(cfg.out, "rows.jsonl"), "w", encoding="utf-8") as f,
        ProcessPoolExecutor(cfg.workers) as pool,
    ):
        futures = [pool.submit(train_and_judge, cfg, *job) for job in jobs]
        for future in tqdm(as_completed(futures), total=len(futures), unit="run", smoothing=0):
            f.writelines(json.dumps(row) + "\n" for row in future.result())
            f.flush()


# --- cheaper targets ----------------------------------------------------------


REFERENCE, RUN_STEPS = 64, 200
SETTINGS = [dict(target_batch=b, target_interval=i, target_sampling=how)
            for b, i, how in [(1, 1, "redraw"), (1, 2, "redraw"), (1, 4, "redraw"), (1, 8, "redraw"), (4, 1, "redraw"), (16, 1, "redraw"),
                              (1, 1, "fixed"), (4, 1, "fixed"), (16, 1, "fixed"), (4, 4, "redraw")]]  # fmt: skip


def run_targets(cfg):
    """One row a setting and seed: agreement of its values with the reference's, chunk by chunk and by domain, and its pace."""
    from train import Config as TrainConfig
    from train import train

    prepare(cfg)
    data = open_dataset(f"{cfg.data}-byte")
    common = dict(
        data_dir=f"{cfg.data}-byte",
        batch_size=8,
        max_iters=RUN_STEPS,
        warmup_iters=WARMUP // 2,
        eval_interval=0,
        log_interval=RUN_STEPS,
    )
    common |= dict(
        targets=f"val:{cfg.target}",
        book_interval=10**9,
        checkpoint_interval=RUN_STEPS,
        overwrite=True,
        device="cpu",
        dtype="float32",
    )
    with open(Path(cfg.out, "targets.jsonl"), "w", encoding="utf-8") as f:
        for seed in numbers(cfg.seeds, int):
            values, seconds = {}, {}
            arms = {"off": dict(rule="off"), "reference": dict(target_batch=REFERENCE)} | {
                json.dumps(s): s for s in SETTINGS
            }
            for name, setting in tqdm(arms.items(), unit="run"):
                out = Path(cfg.out, "run")
                began = time.perf_counter()
                train(
                    TrainConfig(**common, **VOCABS["byte"], **setting, seed=seed, out_dir=str(out))
                )
                seconds[name] = time.perf_counter() - began
                if name != "off":
                    values[name] = np.load(out / "values.npy")
                forget_run(out)
            used = np.flatnonzero(np.isfinite(values["reference"]))
            domain = data.train.domain[used]
            by_domain = {
                name: np.array([v[used][domain == d].mean() for d in np.unique(domain)])
                for name, v in values.items()
            }
            for name, setting in arms.items():
                if name in ("off", "reference"):
                    continue
                row = exact.agreement(values[name][used], values["reference"][used])
                row["domains"] = exact.agreement(by_domain[name], by_domain["reference"])[
                    "spearman"
                ]
                f.write(
                    json.dumps(dict(setting, seed=seed, pace=seconds["off"] / seconds[name], **row))
                    + "\n"
                )
                f.flush()


# --- tables and figure --------------------------------------------------------


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")] if path.is_file() else []


def mean_and_spread(rows, key):
    values = np.array([row[key] for row in rows])
    return f"{values.mean():.4f} ± {values.std(ddof=1) if len(values) > 1 else 0:.4f} ({values.min():.3f})"


def summary(rows):
    """Markdown: the main rules over every judged step of B = 8 after the warm-up, and of those the clipped and the others."""
    rows = [r for r in rows if r["step"] > WARMUP and r["B"] == 8]
    groups = [
        (v, clipped) for v in sorted({r["vocab"] for r in rows}) for clipped in (None, False, True)
    ]
    chosen = {
        g: [r for r in rows if r["vocab"] == g[0] and g[1] in (None, r["kappa"] < 1)]
        for g in groups
    }
    if not rows:
        return []
    lines = ["### After the warm-up, B = 8: mean Pearson (lowest), median relative L2", ""]
    which = {None: "all", False: "not clipped", True: "clipped"}
    titles = [
        f"{v}, {which[c]}: {sum(r['name'] == 'sgd' for r in chosen[v, c])} steps" for v, c in groups
    ]
    lines += ["| rule | " + " | ".join(titles) + " |", "|---" * (1 + len(groups)) + "|"]
    for name in MAIN:
        cells = []
        for g in groups:
            pearson, l2 = (
                np.array([r[key] for r in chosen[g] if r["name"] == name])
                for key in ("pearson", "rel_l2")
            )
            cells.append(
                f"{pearson.mean():.4f} ({pearson.min():.3f}), {np.median(l2):.0%}"
                if len(pearson)
                else "-"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def rule_tables(rows):
    """Markdown: mean ± standard deviation over steps and seeds (lowest) of Pearson, and more, by vocabulary and clipping."""
    lines = summary(rows)
    for vocab, B, clipped in product(
        sorted({r["vocab"] for r in rows}), sorted({r["B"] for r in rows}), (False, True)
    ):
        some = [
            r
            for r in rows
            if (r["vocab"], r["B"]) == (vocab, B)
            and r["step"] > WARMUP
            and (r["kappa"] < 1) == clipped
        ]
        if not some:
            continue
        n = len({(r["lr"], r["clip"], r["seed"], r["step"]) for r in some})
        how = (
            f"clipping active (kappa down to {min(r['kappa'] for r in some):.2f})"
            if clipped
            else "not clipped"
        )
        lines += [f"### {vocab} vocabulary, B = {B}, {how}: {n} steps", ""]
        lines += [
            "| rule | Pearson, mean ± sd (lowest) | Spearman | RMSE, 1e-6 nats | relative L2, median | sum / truth, median |",
            "|---" * 6 + "|",
        ]
        for name in [*RULES, "leave-one-out"]:
            of = [r for r in some if r["name"] == name]
            figures = f"{np.mean([r['spearman'] for r in of]):.3f} | {1e6 * np.mean([r['rmse'] for r in of]):.1f}"
            figures += f" | {np.median([r['rel_l2'] for r in of]):.1%} | {np.median([r['sum_ratio'] for r in of]):.2f}"
            lines.append(f"| {name} | {mean_and_spread(of, 'pearson')} | {figures} |")
        lines.append("")
    lines += ["### By setting (B = 8, after the warm-up): mean Pearson (lowest)", ""]
    settings = sorted({(r["vocab"], r["lr"], r["clip"]) for r in rows if r["B"] == 8})
    lines += [
        "| rule | " + " | ".join(f"{v}, {lr:g}, clip {clip:g}" for v, lr, clip in settings) + " |",
        "|---" * (1 + len(settings)) + "|",
    ]
    for name in MAIN:
        cells = []
        for setting in settings:
            keys = (name, *setting, 8)
            of = [
                r["pearson"]
                for r in rows
                if (r["name"], r["vocab"], r["lr"], r["clip"], r["B"]) == keys
                and r["step"] > WARMUP
            ]
            cells.append(f"{np.mean(of):.4f} ({min(of):.3f})" if of else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    early = [r for r in rows if r["step"] < WARMUP and r["B"] == 8]
    if early:
        lines += [
            "",
            f"### In the warm-up (B = 8, step {early[0]['step']}): mean Pearson ± sd (lowest)",
            "",
            "| rule | Pearson |",
            "|---|---|",
        ]
        lines += [
            f"| {name} | {mean_and_spread([r for r in early if r['name'] == name], 'pearson')} |"
            for name in MAIN
        ]
    return lines


def target_table(rows):
    lines = ["", "### Cheaper targets (byte vocabulary, B = 8, rule adamw)", ""]
    lines += [
        f"Values of the whole run ({RUN_STEPS} steps) against those of a run with {REFERENCE} target chunks a step.",
        "",
    ]
    lines += [
        "Pace: throughput of the run, over that of one without valuation, whole commands timed; bound: B / (B + batch / interval).",
        "",
    ]
    lines += [
        "| target_batch | target_interval | sampling | Pearson, chunks | Spearman, chunks | Spearman, domains | pace | bound |",
        "|---" * 8 + "|",
    ]
    for setting in SETTINGS:
        of = [r for r in rows if all(r[key] == value for key, value in setting.items())]
        if of:
            figures = " | ".join(
                f"{np.mean([r[key] for r in of]):.3f}"
                for key in ("pearson", "spearman", "domains", "pace")
            )
            bound = 8 / (8 + setting["target_batch"] / setting["target_interval"])
            lines.append(
                f"| {setting['target_batch']} | {setting['target_interval']} | {setting['target_sampling']} | {figures} | {bound:.2f} |"
            )
    return lines


def figure(rows, path):
    """1 - Pearson of the main rules, every judged step a dot, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    vocabs = sorted({r["vocab"] for r in rows})
    fig, axes = plt.subplots(
        1, len(vocabs), figsize=(5 * len(vocabs), 3.6), sharey=True, squeeze=False
    )
    for ax, vocab in zip(axes[0], vocabs):
        for x, name in enumerate(MAIN):
            for clipped, marker, shift in ((False, "o", -0.12), (True, "x", 0.12)):
                of = [
                    r
                    for r in rows
                    if (r["vocab"], r["name"], r["kappa"] < 1) == (vocab, name, clipped)
                    and r["step"] > WARMUP
                ]
                of = [max(1 - r["pearson"], 1e-6) for r in of]
                label = ("clipped step" if clipped else "unclipped step") if x == 0 else None
                ax.plot(
                    [x + shift] * len(of),
                    of,
                    marker,
                    color=f"C{int(clipped)}",
                    markersize=4,
                    alpha=0.6,
                    label=label,
                )
        ax.set_yscale("log")
        ax.set_title(f"{vocab} vocabulary")
        ax.set_xticks(range(len(MAIN)), MAIN, rotation=30, ha="right")
        ax.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("1 - Pearson with exact Shapley")
    axes[0, 0].legend()
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main(cfg):
    out = Path(cfg.out)
    if cfg.part == "report" and not (out / "rows.jsonl").is_file():
        raise UserError(f"no rows.jsonl in {out}: leave out --part=report")
    out.mkdir(parents=True, exist_ok=True)
    if cfg.part in ("all", "rules"):
        run(cfg)
    if cfg.part in ("all", "targets"):
        run_targets(cfg)
    rows, targets = read(out / "rows.jsonl"), read(out / "targets.jsonl")
    lines = [*(rule_tables(rows) if rows else []), *(target_table(targets) if targets else [])]
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if rows:
        figure(rows, out / "fidelity.png")
    print("\n".join(lines))


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
