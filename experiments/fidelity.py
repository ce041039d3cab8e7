"""
How far to trust a value: each rule against the step that the optimizer really takes, and cheaper
targets against dearer ones.

    python experiments/fidelity.py                  on the text every Python installation carries
    python experiments/fidelity.py --source=minipile.jsonl.zst --out=results/fidelity
    python experiments/fidelity.py --part=clipping --out=...  where clipping bites hard
    python experiments/fidelity.py --part=report --out=...    tables and figure again, from
                                                              rows.jsonl and targets.jsonl

Rules: for every setting a small GPT is trained by AdamW. At some of its steps the game of that very
step (B chunks, one target) is solved: by all 2^B subsets for B = 8, by antithetic permutations for
B = 16, the optimizer's own step run for each subset in float64. The rules' values come from
shapley/rules.py, which the tests hold equal to what a run computes. `adamw, checked` is the default
of a run: where the values of `adamw` leave a gap (rules.gap), or the step was clipped harder than
they can know, those of `adamw2` stand in for them. The tables choose.

Clipping: every step of a training is clipped to a share kappa of its gradient's norm, from not at
all to a thirtieth, as happens in fine-tuning. Trained are that GPT by AdamW and by SGD, in steps of
8, 16 and 64 chunks; and, in steps of 8, one that had learned the other domains is fine-tuned on the
target's, whole or by LoRA's adapters (which needs requirements-hf.txt). Besides the rules as they
are, what two-pass values were if the chunks' gradients were parallel (`of_parallel`), the simpler
formula. Slope: nats of value per nat of exact Shapley value, by least squares. Writes
clipping.jsonl, clipping.md.

Targets: whole runs of train.py that differ in --target_batch and --target_sampling only. The
weights go the same way in all of them, so their values.npy can be compared chunk by chunk with a
run whose target is REFERENCE chunks a step. (The rows in results/fidelity also have runs whose
target's gradient served for several steps, an option that this showed to be the worst saving.)
Writes rows.jsonl, targets.jsonl, table.md, fidelity.png.

Two CPU cores: about an hour for the rules, one for clipping, a quarter for the targets.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

import config
import train
import valuation
from data import global_batch, open_dataset
from experiments.common import (
    begin,
    column,
    finish,
    forget_run,
    markdown,
    numbers,
    prepare,
    pyplot,
    read_rows,
    save_figure,
    select,
    side_by_side,
)
from model import GPT, GPTConfig
from shapley import exact, rules
from system.errors import UserError

T = 64
WARMUP = 100
REFERENCE = 64  # target chunks a step, of the run that cheaper targets are held to
RUN_STEPS = 200  # of the runs that compare targets
SHAPES = {  # by vocabulary; the head is tied in both
    "byte": {"n_layer": 3, "n_head": 4, "n_embd": 96},
    "gpt2": {"n_layer": 3, "n_head": 2, "n_embd": 32},
}


@dataclass
class Config:
    source: str = "python"  # as in prepare_pile.py
    target: str = "Python code"  # domain of the target
    target_batch: int = 1  # its chunks, the same in the rule and in the truth
    lrs: str = "3e-4,6e-4,5e-3"
    clips: str = "1.0,0"  # 0: no clipping
    kappas: str = "1,.7,.4,.2,.1,.03"  # of the part clipping
    trainings: str = "fine-tuning,LoRA,AdamW,SGD"  # and whose
    sizes: str = "8,16,64"  # and with how many chunks a step, of those that a training has
    seeds: str = "1,2"
    vocabs: str = "byte,gpt2"  # of the part rules
    steps: str = "20,110,200,300"  # judged; 20 is in the warm-up of 100 steps
    permutations: int = 200  # above B = 8, at most
    data: str = "data/fidelity"  # the prepared chunks, made when missing
    out: str = "out/fidelity"
    workers: int = os.cpu_count() or 1
    # report: only the tables and the figure
    part: Literal["all", "rules", "targets", "clipping", "report"] = "all"

    def __post_init__(self):
        for name in self.trainings.split(","):
            if name not in TRAININGS:
                raise UserError(f"--trainings={name}: choose from {', '.join(TRAININGS)}")
        for size in self.sizes.split(","):
            if size not in ("8", "16", "64"):
                raise UserError(f"--sizes={size}: choose from 8, 16, 64")


def prepare_vocab(cfg, vocab):
    """The chunks of a vocabulary, made when missing."""
    return prepare(
        f"{cfg.data}-{vocab}", cfg.source, tokenizer=vocab, block_size=T, val_fraction=0.02
    )


# --- the rules and their parts --------------------------------------------------


def three_point_secant(update):
    """E[secant(g)] for g ~ N(mhat, vhat - mhat^2), by three Gauss-Hermite points: instead of the
    mean field. update: rules.Update."""
    v = torch.maximum(update.v, rules.FLOORS["adamw"] * update.v.mean())
    update = replace(update, v=v)
    mhat = update.m / (1 - update.beta1 ** (update.t - 1))
    vhat = update.v / (1 - update.beta2 ** (update.t - 1))
    sd = (vhat - mhat**2).clamp(min=0).sqrt()
    mean = 0.0
    for weight, z in ((2 / 3, 0.0), (1 / 6, 3**0.5), (1 / 6, -(3**0.5))):
        mean = mean + weight * update.secant(mhat + z * sd)
    return mean


def secant_floor_1e_2(update):
    return rules.expected_secant(update, 1e-2)


def secant_no_floor(update):
    return rules.expected_secant(update, 0.0)


# What the game of clipping goes by, <x_i, g> and |x_i|^2 (2, B), or False and None: no game. x is
# what exact.chunk_gradients returns, known what rules.known_rows returns.


def no_products(x, known):
    return False, None


def norm_products(x, known):
    """Over the LayerNorms' weights."""
    norms = [rows if g.dim() == 1 else None for g, rows in zip(x[0], known)]
    return rules.inner_products(x, norms)


def whole_products(x, known):
    """Over all weights."""
    return rules.inner_products(x, [torch.ones_like(g, dtype=bool) for g in x[0]])


def squared_norms(x, known):
    """As if the chunks' gradients were orthogonal."""
    squares = torch.stack([exact.dot(g, g) for g in x])
    return squares, squares


# name -> arguments of rules.rule_values; "products" is a function here, which finds squares too
RULES = {
    "sgd": {"rule": "sgd"},
    "sgd2": {"rule": "sgd2"},
    "adamw_linear, no floor": {"rule": "adamw_linear", "floor": 0.0},
    "adamw_linear": {"rule": "adamw_linear"},
    "adamw": {"rule": "adamw"},
    "adamw, no look-ahead": {"rule": "adamw", "lookahead": False},
    "adamw, no secant": {"rule": "adamw", "expected": rules.linearised, "known": None},
    "adamw, every secant predicted": {"rule": "adamw", "known": None},
    "adamw, floor 1e-2": {"rule": "adamw", "expected": secant_floor_1e_2},
    "adamw, no floor": {"rule": "adamw", "expected": secant_no_floor},
    "adamw, 3-point secant": {"rule": "adamw", "expected": three_point_secant},
    "adamw, no clip correction": {"rule": "adamw", "products": no_products},
    "adamw, clip by LayerNorms alone": {"rule": "adamw", "products": norm_products},
    "adamw, clip by all weights": {"rule": "adamw", "products": whole_products},
    "adamw, clip by squared norms": {"rule": "adamw", "products": squared_norms},
    "adamw2": {"rule": "adamw2"},
}
LEAVE_ONE_OUT = "leave-one-out"
CHECKED = "adamw, checked"  # the default of a run: adamw2's values where adamw's leave a gap
TOLERANCE = train.Config.tolerance
# what tells the rows of one judged step from those of others
OF_STEP = ("vocab", "lr", "clip", "training", "kappa", "B", "seed", "step")
MAIN = ("sgd", "sgd2", "adamw_linear, no floor", "adamw_linear", "adamw")
MAIN += (CHECKED, "adamw2", LEAVE_ONE_OUT)


def judge_step(model, optimizer, X, Y, loss, lr, clip, permutations):
    """One row a rule: its values of the coming step against the truth."""
    x = exact.chunk_gradients(model, X, Y)
    known = rules.known_rows(model, X, Y)
    step = exact.Step(model, optimizer, x, [loss], clip)
    truth, errors = exact.solve(step, len(x), permutations, tolerance=0.02)
    truth = truth[:, 0]
    rms = float(np.sqrt(np.mean(truth**2)))
    values = {}
    for name, parts in RULES.items():
        arguments = {"known": known, **parts}
        find_products = arguments.pop("products", None)
        if find_products:
            arguments["products"], arguments["squares"] = find_products(x, known)
        what = (model, optimizer, x, [loss])
        by_rule = rules.rule_values(*what, lr=lr, grad_clip=clip, **arguments)
        values[name] = by_rule[:, 0].numpy()
    one_pass = torch.from_numpy(values["adamw"])[:, None]
    gap = float(rules.gap(model, optimizer, x, [loss], one_pass, lr, clip))
    values[LEAVE_ONE_OUT] = exact.leave_one_out(step, len(x))[:, 0]
    rows = []
    for name, v in values.items():
        rows.append(
            {
                "name": name,
                "gap": gap,
                "kappa": rules.clip_coefficient([sum(g) for g in zip(*x)], clip),
                "truth_rms": rms,
                "truth_error": float(np.sqrt(np.mean(errors[:, 0] ** 2)) / rms),
                "sum_ratio": float(v.sum() / truth.sum()),
                **exact.agreement(v, truth),
            }
        )
    return rows


def batch_of(split, ids):
    """X, Y of some chunks, as tensors."""
    X, Y = split.batch(ids, T)
    return torch.from_numpy(X), torch.from_numpy(Y)


def steps_of(data, optimizer, lr_max, B, seed, last, pool=None, warmup=WARMUP):
    """Yields the number of each step up to the last, its rate, which the optimizer then has, and
    its chunks X, Y. pool: numbers of the chunks that they are drawn from; None: of all."""
    pool = np.arange(len(data.train.rows)) if pool is None else pool
    for step in range(last + 1):
        lr = lr_max * min(1.0, (step + 1) / (warmup + 1))
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        ids = pool[global_batch(step, B, len(pool), seed)]
        yield step, lr, *batch_of(data.train, ids)


def train_and_judge(cfg, vocab, lr_max, clip, B, seed):
    """One training. Returns a row for every rule and every judged step."""
    torch.set_num_threads(1)
    data = open_dataset(f"{cfg.data}-{vocab}")
    torch.manual_seed(seed)
    vocab_size = -(-data.meta["vocab_size"] // 64) * 64
    model = GPT(GPTConfig(T, vocab_size, bias=False, **SHAPES[vocab]))
    optimizer = model.configure_optimizers(0.1, lr_max, (0.9, 0.95), "cpu")
    target_ids = np.flatnonzero(data.val.domain == data.domains.index(cfg.target))
    judged = numbers(cfg.steps, int)
    rows = []
    for step, lr, X, Y in steps_of(data, optimizer, lr_max, B, seed, max(judged)):
        if step in judged:
            rng = np.random.default_rng((seed, step))
            picks = rng.choice(target_ids, cfg.target_batch, replace=False)
            loss = exact.batch_loss(*batch_of(data.val, picks))
            began = time.perf_counter()
            judgements = judge_step(model, optimizer, X, Y, loss, lr, clip, cfg.permutations)
            about = {
                "vocab": vocab,
                "lr": lr_max,
                "clip": clip,
                "B": B,
                "seed": seed,
                "step": step,
                "seconds": time.perf_counter() - began,
            }
            rows += [{**about, **row} for row in judgements]
        training_loss = model(X, Y)[1]
        training_loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    for row in rows:
        row["last_loss"] = training_loss.item()
    return rows


def judge_rules(cfg, out):
    vocabs = cfg.vocabs.split(",")
    seeds = numbers(cfg.seeds, int)
    jobs = []
    for vocab in reversed(vocabs):  # the longest first
        prepare_vocab(cfg, vocab)
        jobs.append((cfg, vocab, 6e-4, 1.0, 16, seeds[0]))
    for seed in seeds:
        for vocab in vocabs:
            for lr in numbers(cfg.lrs):
                for clip in numbers(cfg.clips):
                    jobs.append((cfg, vocab, lr, clip, 8, seed))
    side_by_side(train_and_judge, jobs, out / "rows.jsonl", cfg.workers)


def checked(rows):
    """The rows, and of each step that has values of one pass and of two also CHECKED's: what a run
    takes (Valuation.check_step)."""
    steps = {}
    for row in rows:
        key = tuple(row.get(name) for name in OF_STEP)
        steps.setdefault(key, {})[row["name"]] = row
    result = []
    for of_step in steps.values():
        of_step.pop(CHECKED, None)  # earlier versions of this file chose before they wrote
        result += of_step.values()
        if "adamw" in of_step:
            name = "adamw" if one_pass_stands(of_step["adamw"]) else "adamw2"
            result.append({**of_step[name], "name": CHECKED})
    return result


def one_pass_stands(row):
    """Whether a run lets the values of one pass stand. row: of `adamw`."""
    knows_rows = not (row.get("training") and TRAININGS[row["training"]].lora)
    unknown = valuation.CLIPPING_BY_ROWS if knows_rows else valuation.CLIPPING_UNKNOWN
    return max(abs(row["gap"]), unknown * (1 - row["kappa"])) <= TOLERANCE


# --- hard clipping ------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A training whose every step is clipped."""

    lr: float
    rules: tuple = ("adamw", "adamw2")  # judged; the last one's values also as of parallel ones
    warmup: int = WARMUP
    steps: tuple = ()  # judged; empty: those of the option, after the warm-up
    sizes: tuple = (8,)  # B
    pretrained: bool = False
    lora: bool = False


FINE_TUNING = {
    "rules": ("sgd", "adamw_linear", "adamw", "adamw2"),
    "warmup": 10,
    "steps": (15, 40, 100),
    "pretrained": True,
}
TRAININGS = {
    "fine-tuning": Training(1e-4, **FINE_TUNING),
    "LoRA": Training(1e-3, **FINE_TUNING, lora=True),
    "AdamW": Training(1e-3, sizes=(8, 16, 64)),
    "SGD": Training(0.05, rules=("sgd2",), sizes=(8, 16, 64)),
}
TARGET_CHUNKS = 4
PRETRAINING = 1000  # steps of 16 chunks


def of_parallel(d, q, kappa):
    """The closed form that takes the chunks' gradients to be parallel, so that half a batch has
    half its gradient's norm. d_i = <x_i, direction>, q_i = <x_i, g>."""
    own = kappa * (1 + np.log(1 / kappa))
    return own * d + (kappa - own) * d.sum() * q / q.sum()


def judge_clipped_step(model, optimizer, X, Y, loss, lr, kappa, permutations, judged_rules):
    """Rows: values of the coming step, clipped to kappa of its norm, against the truth."""
    x = exact.chunk_gradients(model, X, Y)
    known = rules.known_rows(model, X, Y)
    g = [sum(players) for players in zip(*x)]
    q = np.array([float(exact.dot(x_i, g)) for x_i in x])
    squares = np.array([float(exact.dot(x_i, x_i)) for x_i in x])
    rho = squares.sum() / q.sum()
    clip = kappa * np.sqrt(q.sum()) if kappa < 1 else 0.0
    step = exact.Step(model, optimizer, x, [loss], clip)
    truth, errors = exact.solve(step, len(x), permutations, tolerance=0.02)
    truth = truth[:, 0]
    truth_error = float(np.linalg.norm(errors) / np.linalg.norm(truth))
    values = {}
    for rule in judged_rules:
        of_rule = rules.rule_values(model, optimizer, x, [loss], rule, lr, clip, known=known)
        values[rule] = of_rule[:, 0].numpy()
    gap = 0.0
    if "adamw" in values:
        one_pass = torch.from_numpy(values["adamw"])[:, None]
        gap = float(rules.gap(model, optimizer, x, [loss], one_pass, lr, clip))
    two_pass = judged_rules[-1]
    what = (model, optimizer, x, [loss], two_pass, lr, clip)
    alike = rules.rule_values(*what, products=False)[:, 0].numpy()
    values[f"{two_pass}, clipped alike"] = alike
    values[f"{two_pass}, parallel"] = of_parallel(alike / kappa, q, kappa)
    if any(rows is not None for rows in known):
        products, squares = rules.inner_products(x, known)
        by_rows = rules.rule_values(*what, products=products, squares=squares)
        values[f"{two_pass}, by known rows"] = by_rows[:, 0].numpy()
    rows = []
    for name, v in values.items():
        slope = float(np.polyfit(truth, v, 1)[0])
        rows.append(
            {
                "name": name,
                "gap": gap,
                "rho": rho,
                "truth_error": truth_error,
                "sum_ratio": float(v.sum() / truth.sum()),
                "slope": slope,
                **exact.agreement(v, truth),
            }
        )
    return rows


def clipped_step(model, optimizer, X, Y, kappa):
    """A step of the optimizer, of a gradient that is clipped to kappa of its norm."""
    params = exact.learning(model)
    model(X, Y)[1].backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    torch.nn.utils.clip_grads_with_norm_(params, kappa * float(norm), norm)
    optimizer.step()
    optimizer.zero_grad()


def pretrain(model, data, pool, seed):
    """Trains the model on the chunks of pool."""
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    for *_, X, Y in steps_of(data, optimizer, 1e-3, 16, seed, PRETRAINING, pool):
        clipped_step(model, optimizer, X, Y, kappa=1)


def with_adapters(model):
    """The model with LoRA's adapters, which alone learn."""
    import peft

    adapters = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"])
    return peft.inject_adapter_in_model(adapters, model)


def build(training, data, domain, seed):
    """-> the model as the training finds it, its optimizer, and the chunks that the training draws
    from (None: all). domain: the target's number."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(T, 256, bias=False, **SHAPES["byte"]))
    pool = None
    if training.pretrained:
        pretrain(model, data, np.flatnonzero(data.train.domain != domain), seed)
        pool = np.flatnonzero(data.train.domain == domain)
    if training.lora:
        model = with_adapters(model)
    if "sgd2" in training.rules:
        return model, torch.optim.SGD(model.parameters(), lr=training.lr), pool
    return model, model.configure_optimizers(0.1, training.lr, (0.9, 0.95), "cpu"), pool


def train_clipped(cfg, name, kappa, B, seed):
    """One training of which every step is clipped by kappa. Rows of its judged steps."""
    torch.set_num_threads(1)
    training = TRAININGS[name]
    data = open_dataset(f"{cfg.data}-byte")
    domain = data.domains.index(cfg.target)
    target_ids = np.flatnonzero(data.val.domain == domain)
    model, optimizer, pool = build(training, data, domain, seed)
    judged = training.steps
    if not judged:
        judged = [step for step in numbers(cfg.steps, int) if step > training.warmup]
    options = {"last": max(judged), "pool": pool, "warmup": training.warmup}
    rows = []
    for step, lr, X, Y in steps_of(data, optimizer, training.lr, B, seed, **options):
        if step in judged:
            rng = np.random.default_rng((seed, step))
            picks = rng.choice(target_ids, TARGET_CHUNKS, replace=False)
            loss = exact.batch_loss(*batch_of(data.val, picks))
            what = (X, Y, loss, lr, kappa, cfg.permutations, training.rules)
            about = {"training": name, "kappa": kappa, "B": B, "seed": seed, "step": step}
            rows += [{**about, **row} for row in judge_clipped_step(model, optimizer, *what)]
        clipped_step(model, optimizer, X, Y, kappa)
    return rows


def judge_clipping(cfg, out):
    prepare_vocab(cfg, "byte")
    jobs = []
    for B in numbers(cfg.sizes, int):
        seeds = numbers(cfg.seeds, int)
        if B == 64:  # it takes long
            seeds = seeds[:1]
        names = [name for name in cfg.trainings.split(",") if B in TRAININGS[name].sizes]
        for name, seed, kappa in product(names, seeds, numbers(cfg.kappas)):
            jobs.append((cfg, name, kappa, B, seed))
    side_by_side(train_clipped, jobs, out / "clipping.jsonl", cfg.workers)
    report_clipping(out)


def report_clipping(out):
    table = clipping_table(checked(read_rows(out / "clipping.jsonl")))
    (out / "clipping.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))


def clipping_table(rows):
    """Of each training, B and kappa how close each rule is."""
    table = []
    rows = sorted(rows, key=lambda row: (row["training"], row["B"], -row["kappa"]))
    cases = [(row["training"], row["B"], row["kappa"], row["name"]) for row in rows]
    for training, B, kappa, name in dict.fromkeys(cases):
        of_case = select(rows, training=training, B=B, kappa=kappa, name=name)
        line = [training, B, kappa, name, len(of_case)]
        line.append(f"{np.median(column(of_case, 'rho')):.2f}")
        pearson = column(of_case, "pearson")
        line.append(f"{np.mean(pearson):.4f} ({min(pearson):.3f})")
        line.append(f"{np.mean(column(of_case, 'slope')):.2f}")
        l2 = column(of_case, "rel_l2")
        line.append(f"{np.median(l2):.0%} ({max(l2):.0%})")
        line.append(f"{np.median(column(of_case, 'sum_ratio')):.2f}")
        line.append(f"{np.median(column(of_case, 'truth_error')):.1%}")
        table.append(line)
    head = ["training", "B", "kappa", "rule", "steps", "rho", "Pearson, mean (lowest)", "slope"]
    head += ["relative L2, median (largest)", "sum / truth, median"]
    head += ["the truth's own error, median"]
    return markdown(head, table)


# --- cheaper targets ----------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """How a run takes its target: options of train.py."""

    target_batch: int
    target_sampling: str


SETTINGS = (
    Target(1, "redraw"),
    Target(4, "redraw"),
    Target(16, "redraw"),
    Target(1, "fixed"),
    Target(4, "fixed"),
    Target(16, "fixed"),
)


def run_once(cfg, out, seed, **options):
    """One run of train.py on bytes. Returns its values, None without valuation, and its seconds."""
    settings = train.Config(
        **SHAPES["byte"],
        **options,
        data_dir=f"{cfg.data}-byte",
        out_dir=str(out),
        seed=seed,
        batch_size=8,
        max_iters=RUN_STEPS,
        warmup_iters=WARMUP // 2,
        eval_interval=0,
        log_interval=RUN_STEPS,
        targets=f"val:{cfg.target}",
        book_interval=10**9,
        checkpoint_interval=RUN_STEPS,
        overwrite=True,
        device="cpu",
        dtype="float32",
    )
    began = time.perf_counter()
    train.train(settings)
    seconds = time.perf_counter() - began
    values = np.load(out / "values.npy") if settings.rule != "off" else None
    forget_run(out)
    return values, seconds


def judge_targets(cfg, out):
    """Writes a row a setting and seed: agreement of its values with the reference's, chunk by chunk
    and by domain, and its pace."""
    data = prepare_vocab(cfg, "byte")
    with open(out / "targets.jsonl", "w", encoding="utf-8") as file:
        for seed in numbers(cfg.seeds, int):
            runs = tqdm(total=2 + len(SETTINGS), unit="run")
            _, plain_seconds = run_once(cfg, out / "run", seed, rule="off")
            runs.update()
            reference, _ = run_once(cfg, out / "run", seed, target_batch=REFERENCE)
            runs.update()
            used = np.flatnonzero(np.isfinite(reference))
            domain = data.train.domain[used]
            for setting in SETTINGS:
                values, seconds = run_once(cfg, out / "run", seed, **vars(setting))
                runs.update()
                by_domain = exact.agreement(
                    domain_means(values[used], domain), domain_means(reference[used], domain)
                )
                row = {
                    **vars(setting),
                    "seed": seed,
                    "pace": plain_seconds / seconds,
                    **exact.agreement(values[used], reference[used]),
                    "domains": by_domain["spearman"],
                }
                file.write(json.dumps(row) + "\n")
                file.flush()
            runs.close()


def domain_means(values, domain):
    return np.array([values[domain == d].mean() for d in np.unique(domain)])


# --- tables -----------------------------------------------------------------------


def is_clipped(row):
    return row["kappa"] < 1


def after_warmup(rows):
    return [row for row in rows if row["step"] > WARMUP]


def mean_and_spread(rows, key):
    """Mean ± standard deviation (lowest), as text."""
    values = np.array(column(rows, key))
    spread = values.std(ddof=1) if len(values) > 1 else 0
    return f"{values.mean():.4f} ± {spread:.4f} ({values.min():.3f})"


def steps_in(rows):
    """The number of steps that rows judge."""
    return len(select(rows, name="sgd"))


def summary(rows):
    """The main rules over every judged step of B = 8 after the warm-up, and of those the clipped
    and the others."""
    rows = after_warmup(select(rows, B=8))
    if not rows:
        return []
    groups = {}
    for vocab in sorted(set(column(rows, "vocab"))):
        of_vocab = select(rows, vocab=vocab)
        groups[f"{vocab}, all"] = of_vocab
        groups[f"{vocab}, not clipped"] = [row for row in of_vocab if not is_clipped(row)]
        groups[f"{vocab}, clipped"] = [row for row in of_vocab if is_clipped(row)]
    table = []
    for name in MAIN:
        line = [name]
        for group in groups.values():
            of_rule = select(group, name=name)
            if of_rule:
                pearson = np.array(column(of_rule, "pearson"))
                l2 = np.median(column(of_rule, "rel_l2"))
                line.append(f"{pearson.mean():.4f} ({pearson.min():.3f}), {l2:.0%}")
            else:
                line.append("-")
        table.append(line)
    titles = [f"{title}: {steps_in(group)} steps" for title, group in groups.items()]
    return [
        "### After the warm-up, B = 8: mean Pearson (lowest), median relative L2",
        "",
        *markdown(["rule", *titles], table),
        "",
    ]


def rule_table(rows):
    """All rules over some steps: mean ± standard deviation over steps and seeds (lowest) of
    Pearson, and more."""
    head = [
        "rule",
        "Pearson, mean ± sd (lowest)",
        "Spearman",
        "RMSE, 1e-6 nats",
        "relative L2, median",
        "sum / truth, median",
    ]
    table = []
    for name in (*RULES, CHECKED, LEAVE_ONE_OUT):
        of_rule = select(rows, name=name)
        table.append(
            [
                name,
                mean_and_spread(of_rule, "pearson"),
                f"{np.mean(column(of_rule, 'spearman')):.3f}",
                f"{1e6 * np.mean(column(of_rule, 'rmse')):.1f}",
                f"{np.median(column(of_rule, 'rel_l2')):.1%}",
                f"{np.median(column(of_rule, 'sum_ratio')):.2f}",
            ]
        )
    return markdown(head, table)


def setting_table(rows):
    """The main rules by vocabulary, learning rate and clipping."""
    settings = sorted({(row["vocab"], row["lr"], row["clip"]) for row in select(rows, B=8)})
    titles = [f"{vocab}, {lr:g}, clip {clip:g}" for vocab, lr, clip in settings]
    table = []
    for name in MAIN:
        line = [name]
        for vocab, lr, clip in settings:
            of_setting = select(rows, name=name, vocab=vocab, lr=lr, clip=clip, B=8)
            pearson = column(after_warmup(of_setting), "pearson")
            line.append(f"{np.mean(pearson):.4f} ({min(pearson):.3f})" if pearson else "-")
        table.append(line)
    return markdown(["rule", *titles], table)


def rule_tables(rows):
    lines = summary(rows)
    for vocab in sorted(set(column(rows, "vocab"))):
        for B in sorted(set(column(rows, "B"))):
            for clipped in (False, True):
                late = after_warmup(select(rows, vocab=vocab, B=B))
                judged = [row for row in late if is_clipped(row) == clipped]
                if not judged:
                    continue
                kappa = min(column(judged, "kappa"))
                how = f"clipping active (kappa down to {kappa:.2f})" if clipped else "not clipped"
                title = f"### {vocab} vocabulary, B = {B}, {how}: {steps_in(judged)} steps"
                lines += [title, "", *rule_table(judged), ""]
    lines += ["### By setting (B = 8, after the warm-up): mean Pearson (lowest)", ""]
    lines += setting_table(rows)
    early = [row for row in select(rows, B=8) if row["step"] < WARMUP]
    if early:
        title = f"### In the warm-up (B = 8, step {early[0]['step']}): mean Pearson ± sd (lowest)"
        table = [[name, mean_and_spread(select(early, name=name), "pearson")] for name in MAIN]
        lines += ["", title, "", *markdown(["rule", "Pearson"], table)]
    return lines


def target_table(rows):
    head = [
        "target_batch",
        "sampling",
        "Pearson, chunks",
        "Spearman, chunks",
        "Spearman, domains",
        "pace",
        "bound",
    ]
    table = []
    for setting in SETTINGS:
        judged = select(rows, **vars(setting))
        of_setting = [row for row in judged if row.get("target_interval", 1) == 1]
        if of_setting:
            line = list(vars(setting).values())
            for key in ("pearson", "spearman", "domains", "pace"):
                line.append(f"{np.mean(column(of_setting, key)):.3f}")
            line.append(f"{8 / (8 + setting.target_batch):.2f}")
            table.append(line)
    return [
        "",
        "### Cheaper targets (byte vocabulary, B = 8, rule adamw)",
        "",
        f"Values of the whole run ({RUN_STEPS} steps) against those of a run with {REFERENCE} "
        "target chunks a step.",
        "",
        "Pace: throughput of the run, over that of one without valuation, whole commands timed; "
        "bound: B / (B + batch).",
        "",
        *markdown(head, table),
    ]


# --- figure -----------------------------------------------------------------------


def draw_vocab(ax, rows, vocab):
    """1 - Pearson of the main rules, every judged step a dot, on a logarithmic axis."""
    for clipped, marker, shift in ((False, "o", -0.12), (True, "x", 0.12)):
        label = "clipped step" if clipped else "unclipped step"
        for i, name in enumerate(MAIN):
            of_rule = after_warmup(select(rows, vocab=vocab, name=name))
            apart = [max(1 - r["pearson"], 1e-6) for r in of_rule if is_clipped(r) == clipped]
            ax.plot(
                [i + shift] * len(apart),
                apart,
                marker,
                color=f"C{int(clipped)}",
                markersize=4,
                alpha=0.6,
                label=label if i == 0 else None,
            )
    ax.set_yscale("log")
    ax.set_title(f"{vocab} vocabulary")
    ax.set_xticks(range(len(MAIN)), MAIN, rotation=30, ha="right")
    ax.grid(axis="y", alpha=0.3)


def figure(rows, path):
    plt = pyplot()
    vocabs = sorted(set(column(rows, "vocab")))
    fig, axes = plt.subplots(
        1, len(vocabs), figsize=(5 * len(vocabs), 3.6), sharey=True, squeeze=False
    )
    for ax, vocab in zip(axes[0], vocabs):
        draw_vocab(ax, rows, vocab)
    axes[0, 0].set_ylabel("1 - Pearson with exact Shapley")
    axes[0, 0].legend()
    save_figure(fig, path)


def read_if_there(path):
    return read_rows(path) if path.is_file() else []


def main(cfg):
    out = Path(cfg.out)
    if cfg.part == "report":
        read_rows(out / "rows.jsonl")  # says so where it is missing
        if (out / "clipping.jsonl").is_file():
            report_clipping(out)
    else:
        begin(cfg)
    if cfg.part in ("all", "rules"):
        judge_rules(cfg, out)
    if cfg.part in ("all", "targets"):
        judge_targets(cfg, out)
    if cfg.part == "clipping":
        judge_clipping(cfg, out)
        return
    rows = read_if_there(out / "rows.jsonl")
    targets = read_if_there(out / "targets.jsonl")
    lines = []
    if rows:
        rows = checked(rows)
        lines += rule_tables(rows)
        figure(rows, out / "fidelity.png")
    if targets:
        lines += target_table(targets)
    finish(out, lines)


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
