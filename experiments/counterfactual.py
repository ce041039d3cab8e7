"""
Which score of a chunk's visit predicts what happens when one trains without it?

    python experiments/counterfactual.py --source=minipile.jsonl.zst --out=results/counterfactual
    python experiments/counterfactual.py --quick             tiny, on the text every Python
                                                             installation carries
    python experiments/counterfactual.py --part=report --out=...   tables and figure again
    python experiments/counterfactual.py --part=twins --twins=1 --out=...    only the twins of a
                                                                   truth that is there
    python experiments/counterfactual.py --part=draws --out=...    one-step values of more or fewer
                                                                   target chunks, same truth

A run; then, for random sets of its visits (a chunk's use in a step), the same run without them.
Visits of the steps before which |dL/dw| explodes (shapley/hindsight.py) are never left out. True is
what the loss of the target's chunks rises by at the end, and that of as many held-out chunks of the
same kind. A score predicts the sum of the visits left out. LDS is the correlation of the two over
the sets. Slope: nats of true rise per nat predicted.

Settings: <data>-<target>-<start>. Data: clean, or junk (a fifth of the chunks have their bytes
shuffled). Target: broad (validation chunks of all domains), or narrow (of one). Start: scratch
(from random weights), or tuned (from a model that was trained on other chunks first). `twins`: a
seed trained again from other weights, in the same order and without the same sets: two truths agree
on what is the data's. A score that knows the run itself can reach more. A training is on disk as
soon as it is done, so the same command goes on after an interruption.
"""

import json
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from scipy import stats
from torch.nn import functional as F

import config
from data import Target, global_batch
from experiments.common import (
    begin,
    finish,
    markdown,
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
from model import GPT, GPTConfig
from shapley import hindsight
from shapley.counterfactual import agreement, draw_sets, sums_of_sets, train_without
from shapley.replay import Training, state_of
from shapley.targets import Targets
from system.errors import UserError
from system.files import atomic
from train import get_lr
from valuation import Settings, Valuation

DROP_BY = (
    "hindsight",
    "value, adamw2",
    "share of step",
    "smoothed 0.9",
    "training loss",
    "gradient dot, last model",
)
QUICK = {
    "settings": "junk-narrow-scratch,clean-broad-tuned",
    "narrow": "Docstrings",
    "seeds": "1,2",
    "twins": "1",
    "fractions": ".03:4",
    "horizons": "1,5,0",
    "dropped": ".25",
    "longer": "1.5",
    "firsts": "2,6",
    "weights": ".9",
    "why_sets": 4,
    "iters": 12,
    "tuned_iters": 8,
    "pretrain_iters": 10,
    "warmup_iters": 4,
    "n_embd": 16,
    "target_chunks": 16,
    "limit_tokens": 600_000,
}


@dataclass
class Config:
    source: str = "python"  # as in prepare_pile.py
    narrow: str = "Python code"  # the domain of narrow targets
    data: str = "data/counterfactual"  # the prepared chunks, made when missing
    out: str = "out/counterfactual"
    settings: str = (
        "junk-broad-scratch,clean-narrow-scratch,junk-broad-tuned,clean-narrow-tuned,"
        "clean-broad-scratch,junk-narrow-scratch,clean-broad-tuned,junk-narrow-tuned"
    )
    seeds: str = "1,2,3"  # each draws weights, order, junk, targets and sets
    twins: str = ""  # seeds that are trained again from other weights
    fractions: str = ".03:100"  # share of the visits that a set leaves out : number of sets
    rules: str = "sgd,sgd2,adamw_linear,adamw,adamw2"  # of one-step values
    smoothing: str = "0.5,0.9,0.97,0.99"  # strengths of smoothed values
    horizons: str = "10,30,100,0"  # steps that hindsight looks ahead; 0: to the end
    dropped: str = ".1,.25"  # shares of the visits that are dropped at once, those of least score
    longer: str = "1.1,1.25,1.5"  # runs with all visits, of so many times the steps
    # of the part `why`: sets of visits from these steps on, and sets that keep a part of the weight
    firsts: str = "50,60,70,80,100,150"
    weights: str = ".9,.5"
    why_sets: int = 40
    limit_tokens: int = 6_000_000
    block_size: int = 64
    batch_size: int = 8
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 64
    iters: int = 300
    warmup_iters: int = 50
    # visits of earlier steps are never left out; -1: those before which hindsight explodes
    first: int = -1
    learning_rate: float = 1e-3
    grad_clip: float = 1.0
    beta2: float = 0.95
    eps: float = 1e-8  # AdamW's
    pretrain_iters: int = 600  # of the model that a tuned run starts from
    tuned_iters: int = 150
    tuned_learning_rate: float = 3e-4
    target_chunks: int = 256  # and as many held out
    target_batch: int = 16  # of one-step values
    target_batches: str = "1,4,16,64"  # of the part `draws`
    workers: int = 0  # jobs side by side; 0: a core each
    quick: bool = False
    # why: how far the correlation depends on where the sets begin and on their weight
    # draws: how far one-step values depend on the number of target chunks; reads the truth in --out
    part: Literal["all", "twins", "why", "draws", "report"] = "all"

    def __post_init__(self):
        if self.quick:
            set_options(self, QUICK)
            self.first = self.warmup_iters // 2
            self.data += "-quick"
            self.out += "-quick"


# --- text ---------------------------------------------------------------------------


def text_of(cfg, setting, seed):
    """-> the training chunks (n, T + 1), which of them are junk (n,), and the target's and the
    held-out chunks (target_chunks, T + 1)."""
    data = prepare(
        cfg.data,
        cfg.source,
        tokenizer="byte",
        block_size=cfg.block_size,
        val_fraction=0.2,
        limit_tokens=cfg.limit_tokens,
        workers=1,
    )
    rng = np.random.default_rng(seed)
    rows = np.array(data.train.rows)
    is_junk = np.zeros(len(rows), bool)
    if setting.startswith("junk"):
        is_junk = rng.random(len(rows)) < 0.2
        rows[is_junk] = rng.permuted(rows[is_junk], axis=1)
    wanted = np.ones(len(data.val.rows), bool)
    if "narrow" in setting:
        if cfg.narrow not in data.domains:
            raise UserError(f"no domain {cfg.narrow!r}: {', '.join(data.domains)}")
        wanted = data.val.domain == data.domains.index(cfg.narrow)
    pools = [[], []]  # of each domain the first half of its chunks, and the second: other documents
    for domain in np.unique(data.val.domain[wanted]):
        for pool, half in zip(pools, np.array_split(np.flatnonzero(data.val.domain == domain), 2)):
            pool.extend(half)
    picks = []
    for pool in pools:
        if len(pool) < cfg.target_chunks:
            what = f"{len(pool)} chunks for a {setting} target"
            raise UserError(f"{what}: lower --target_chunks, or raise --limit_tokens")
        picks.append(np.sort(rng.choice(pool, cfg.target_chunks, replace=False)))
    target, held_out = (np.array(data.val.rows[ids]) for ids in picks)
    return rows, is_junk, target, held_out


# --- a run ----------------------------------------------------------------------------


class Run:
    """The model, its text and its training, of a setting and seed."""

    def __init__(self, cfg, setting, seed, init=0):
        """init: other first weights, with everything else as it was."""
        self.cfg, self.seed = cfg, seed
        self.tuned = setting.endswith("tuned")
        self.rows, self.is_junk, target, held_out = text_of(cfg, setting, seed)
        self.targets = [Target("target", target, None), Target("held out", held_out, None)]
        self.n_steps = cfg.tuned_iters if self.tuned else cfg.iters
        torch.manual_seed(1000 * init + seed)
        self.model = GPT(
            GPTConfig(
                block_size=cfg.block_size,
                vocab_size=256,
                n_layer=cfg.n_layer,
                n_head=cfg.n_head,
                n_embd=cfg.n_embd,
                bias=False,
            )
        )
        # a tuned run's own chunks are the second half of an order, its past is the first
        self.offset = 0
        if self.tuned:
            self.pretrain()
        self.start_over(self.n_steps)
        self.state = state_of(self.training)

    def pretrain(self):
        schedule = self.schedule(self.cfg.pretrain_iters, self.cfg.learning_rate)
        training = self.training_of(schedule)
        for step in range(self.cfg.pretrain_iters):
            training.take(step)
        self.offset = self.cfg.pretrain_iters

    def start_over(self, n_steps):
        lr = self.cfg.tuned_learning_rate if self.tuned else self.cfg.learning_rate
        self.training = self.training_of(self.schedule(n_steps, lr))

    def schedule(self, n_steps, learning_rate):
        """train.py's: warm-up, then a cosine down to a tenth."""
        from train import Config as TrainConfig

        settings = TrainConfig(
            learning_rate=learning_rate,
            min_lr=learning_rate / 10,
            warmup_iters=min(self.cfg.warmup_iters, n_steps // 5),
            max_iters=n_steps,
        )
        return lambda step: get_lr(settings, step)

    def training_of(self, lr):
        betas = (0.9, self.cfg.beta2)
        optimizer = self.model.configure_optimizers(0.1, self.cfg.learning_rate, betas, "cpu")
        for group in optimizer.param_groups:
            group["eps"] = self.cfg.eps
        return Training(
            self.model,
            optimizer,
            self.chunk_losses,
            self.batch,
            lr,
            self.cfg.batch_size,
            self.cfg.grad_clip,
        )

    def batch(self, step):
        ids = global_batch(step + self.offset, self.cfg.batch_size, len(self.rows), self.seed)
        rows = self.rows[ids].astype(np.int64)
        return ids, rows[:, :-1], rows[:, 1:]

    def chunk_losses(self, X, Y):
        """(b,) nats, float64: the mean of a chunk's token losses."""
        logits, _ = self.model(torch.as_tensor(X), torch.as_tensor(Y))
        flat = F.cross_entropy(logits.flatten(0, 1), torch.as_tensor(Y).flatten(), reduction="none")
        return flat.view(Y.shape).double().mean(1)

    def loss(self, X, Y, ledger=None):
        return self.model(torch.as_tensor(X), torch.as_tensor(Y), ledger)[1]

    @torch.no_grad()
    def losses(self):
        """The losses of the target and of the held-out chunks now (2,), nats."""
        losses = []
        for target in self.targets:
            X, Y = target.batch(np.arange(len(target)))
            of_chunk = [
                self.chunk_losses(X[i : i + 64], Y[i : i + 64]) for i in range(0, len(X), 64)
            ]
            losses.append(float(torch.cat(of_chunk).mean()))
        return np.array(losses)

    def target_gradient(self):
        """The gradient of the target's loss, all chunks, at the weights as they are."""
        settings = Settings(target_batch=len(self.targets[0]), micro_batch=64)
        weights = self.training.weights
        targets = Targets(self.targets[:1], weights, self.loss, settings, lambda: None)
        return targets.gradient(0, 0)[1]


# --- scores of visits -------------------------------------------------------------------


def one_step(run, rule, smoothing=0.0, target_batch=0):
    """The run with its values by a rule: records of its visits (n_visits,). target_batch: 0 for the
    experiment's own."""
    fresh(run)
    cfg, training = run.cfg, run.training
    settings = Settings(
        rule=rule,
        batch=cfg.batch_size,
        target_batch=target_batch or cfg.target_batch,
        target_smoothing=smoothing,
        seed=run.seed,
        grad_clip=cfg.grad_clip,
        book_interval=0,
    )
    optimizer = training.optimizer
    valuation = Valuation(run.model, optimizer, run.loss, run.targets[:1], settings)
    for step in range(run.n_steps):
        lr = training.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        ids, X, Y = run.batch(step)
        X, Y = torch.as_tensor(X), torch.as_tensor(Y)
        valuation.begin_step(step, lr, tokens=(X, Y))
        run.loss(X, Y, valuation.new_ledger(ids, X, Y)).backward()
        clip_coef = 1.0
        if cfg.grad_clip:
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), cfg.grad_clip)
            clip_coef = (cfg.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        valuation.before_update(clip_coef)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        valuation.end_step()
    return valuation.flush().visits


def share_of_step(run, values):
    """Of each visit's value (n_visits,), relative to the size of all values of its step."""
    by_step = values.reshape(run.n_steps, -1)
    return (by_step / np.abs(by_step).sum(1, keepdims=True)).ravel()


def fresh(run, n_steps=None):
    """The run's training at its first step, its optimizer without moments. n_steps: of its
    schedule, if it is another."""
    for p, weight in zip(run.training.weights.params, run.state["weights"]):
        p.data.copy_(weight)
    run.start_over(n_steps or run.n_steps)


def sweep(run, past, horizon):
    """Hindsight of all visits (n_steps, B), and |dL/dw| by step (n_steps,). horizon: steps that it
    looks ahead; 0: to the end."""
    values = np.zeros((run.n_steps, run.cfg.batch_size))
    norms = np.zeros(run.n_steps)
    own = [p.data.clone() for p in run.training.weights.params]
    after = own
    for step in reversed(range(run.n_steps)):
        if step == run.n_steps - 1 or (horizon and (run.n_steps - 1 - step) % horizon == 0):
            with run.training.weights.at(after):
                gradient = run.target_gradient()
            adjoint = hindsight.Adjoint.of_end(gradient, has_moments=True)
        norms[step] = adjoint.norm()
        values[step] = hindsight.back(run.training, past[step], adjoint)
        after = past[step].weights
    return values, norms


def scores_of(run):
    """{name: a score of each visit (n_visits,)}, high where the chunk should help the target, and
    {name: |dL/dw| by step} of hindsight's horizons."""
    scores, norms, seconds = {}, {}, {}
    for rule in run.cfg.rules.split(","):
        began = time.process_time()
        visits = one_step(run, rule)
        seconds[rule] = time.process_time() - began
        values = visits["value"][:, 0].astype(float)
        by_step = values.reshape(run.n_steps, -1)
        scores[f"value, {rule}"] = values
        if rule == "adamw2":
            scores["share of step"] = share_of_step(run, values)
            scores["centred in step"] = (by_step - by_step.mean(1, keepdims=True)).ravel()
        if rule == "adamw":
            scores["gradient norm"] = -visits["grad_norm"].astype(float)
        scores["training loss"] = -visits["loss"].astype(float)
    for beta in numbers(run.cfg.smoothing):
        visits = one_step(run, "adamw2", beta)
        values = visits["smoothed"][:, 0].astype(float)
        scores[f"smoothed {beta}"] = values
        scores[f"share of smoothed {beta}"] = share_of_step(run, values)
    fresh(run)
    began = time.process_time()
    past = [run.training.record(step) for step in range(run.n_steps)]
    seconds["replay"] = time.process_time() - began
    scores["gradient dot, last model"] = last_dot(run)
    for horizon in numbers(run.cfg.horizons, int):
        name = f"hindsight, {horizon} steps" if horizon else "hindsight"
        began = time.process_time()
        values, norms[name] = sweep(run, past, horizon)
        seconds[name] = time.process_time() - began
        scores[name] = values.ravel()
    scores["BM25"] = bm25(run)
    return scores, norms, seconds


def last_dot(run):
    """<gradient of the chunk, gradient of the target> at the last weights, for each visit."""
    gradient = run.target_gradient()
    weights = run.training.weights
    e = 1e-3 * hindsight.norm([p.data for p in weights.params]) / hindsight.norm(gradient)
    losses = []
    for sign in (1, -1):
        places = torch._foreach_add(
            [p.data for p in weights.params], gradient, alpha=float(sign * e)
        )
        with weights.at(places), torch.no_grad():
            of_step = [run.chunk_losses(*run.batch(step)[1:]) for step in range(run.n_steps)]
        losses.append(torch.cat(of_step))
    return ((losses[0] - losses[1]) / float(2 * e)).numpy()


def bm25(run):
    """Each visit's chunk against all words of the target."""
    from rank_bm25 import BM25Okapi

    ids = np.concatenate([run.batch(step)[0] for step in range(run.n_steps)])
    chunks = [bytes(row).decode(errors="replace").split() for row in run.rows[ids].astype(np.uint8)]
    query = " ".join(
        bytes(row).decode(errors="replace") for row in run.targets[0].rows.astype(np.uint8)
    ).split()
    return BM25Okapi(chunks, k1=1.5, b=0.75).get_scores(query)


# --- the truth ------------------------------------------------------------------------


class Truth:
    """Trainings of a run without some visits, none of them before a step."""

    def __init__(self, run, first):
        self.run, self.first = run, first
        fresh(run)
        for step in range(first):
            run.training.take(step)
        self.state = state_of(run.training)
        self.with_all = self.losses_without(())

    def losses_without(self, left_out, weight=0.0):
        """The target's and the held-out loss at the end (2,), of a training in which the gradients
        of some visits have a weight."""
        training, n_steps = self.run.training, self.run.n_steps
        train_without(training, self.state, left_out, self.first, n_steps, weight=weight)
        return self.run.losses()

    def visits(self):
        """All that may be left out."""
        batch = self.run.cfg.batch_size
        return np.arange(self.first * batch, self.run.n_steps * batch)

    def of_sets(self, kept, name, fraction, n_sets, weight=0.0):
        """Puts random sets (n_sets, size) into kept["sets/<name>"], and into kept["rises/<name>"]
        the losses' rises without each (n_sets, 2), where they are not there yet."""
        sets = draw_sets(n_sets, self.visits(), fraction, self.run.seed)
        kept[f"sets/{name}"] = np.int32(sets)
        rises = list(kept.get(f"rises/{name}", ()))
        for left_out in sets[len(rises) :]:
            rises.append(self.losses_without(left_out, weight) - self.with_all)
            kept[f"rises/{name}"] = np.array(rises)

    def of_dropping(self, kept, fraction):
        """Puts into kept["dropped/<fraction>/<score>"] the losses' rises (2,) without the visits
        that have the least of a score; "random": the mean over three draws."""
        visits = self.visits()
        size = round(fraction * len(visits))
        to_drop = {}
        for name in DROP_BY:
            order = visits[np.argsort(kept[f"score/{name}"][visits], kind="stable")]
            to_drop[name] = [np.sort(order[:size])]
        to_drop["random"] = draw_sets(3, visits, fraction, self.run.seed + 1000)
        for name, sets in to_drop.items():
            if f"dropped/{fraction}/{name}" not in kept:
                rises = [self.losses_without(left_out) - self.with_all for left_out in sets]
                kept[f"dropped/{fraction}/{name}"] = np.mean(rises, 0)


def losses_of_longer(run):
    """The losses (n, 2) at the ends of runs with all visits, of cfg.longer times the steps."""
    losses = []
    for factor in numbers(run.cfg.longer):
        n_steps = round(factor * run.n_steps)
        fresh(run, n_steps)
        for step in range(n_steps):
            run.training.take(step)
        losses.append(run.losses())
    return np.array(losses)


class Kept(dict):
    """Arrays by name, for a file, on disk as soon as they are here: a job that was interrupted goes
    on, and one that was done is not done again."""

    def __init__(self, path, settings):
        """settings: text; what is there of other settings is begun anew."""
        super().__init__()
        self.path, self.part, self.settings = path, path.with_suffix(".part.npz"), settings
        self.is_done = self.read(path)
        if not self.is_done:
            self.read(self.part)

    def read(self, path):
        """Whether there is a file of these settings, whose arrays are here then."""
        if not path.is_file():
            return False
        there = dict(np.load(path))
        if str(there.pop("settings", "")) != self.settings:
            return False
        self.update(there)
        return True

    def __setitem__(self, name, array):
        super().__setitem__(name, array)
        with atomic(self.part) as file:
            np.savez(file, settings=self.settings, **self)

    def finish(self):
        """The job is done."""
        with atomic(self.path) as file:
            np.savez_compressed(file, settings=self.settings, **self)
        self.part.unlink()


WITHOUT_EFFECT = ("source", "data", "out", "workers", "quick", "part", "settings", "seeds", "twins")


def known_by(settings):
    """The settings that what a job keeps depends on, as text."""
    return json.dumps(
        {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}
    )


def job(settings, setting, seed, init):
    """One run, its scores and its truth, to a file. Returns a row about it."""
    cfg = Config(**settings)
    kept = Kept(file_of(cfg, setting, seed, init), known_by(settings))
    if not kept.is_done:
        find_truth(cfg, kept, setting, seed, init)
        kept.finish()
    losses, seconds = kept["losses"].tolist(), json.loads(str(kept["seconds"]))
    return [dict(setting=setting, seed=seed, init=init, losses=losses, seconds=seconds)]


def find_truth(cfg, kept, setting, seed, init):
    run = Run(cfg, setting, seed, init)
    if "seconds" not in kept:
        seconds = {}
        if not init:
            scores, norms, seconds = scores_of(run)
            for name, values in scores.items():
                kept[f"score/{name}"] = np.float32(values)
            for name, values in norms.items():
                kept[f"norm/{name}"] = values
            ids = np.concatenate([run.batch(step)[0] for step in range(run.n_steps)])
            kept["is_junk"] = run.is_junk[ids]
        kept["seconds"] = np.array(json.dumps(seconds))
    first = cfg.first
    if first < 0 and init:
        first = int(np.load(file_of(cfg, setting, seed))["first"])
    elif first < 0:
        first = int(hindsight.early(kept["norm/hindsight"][:, None]).sum())
    truth = Truth(run, first)
    kept["first"], kept["losses"] = np.array(first), truth.with_all
    for part in cfg.fractions.split(","):
        fraction, n_sets = part.split(":")
        truth.of_sets(kept, float(fraction), float(fraction), int(n_sets))
    if not init:
        for fraction in numbers(cfg.dropped):
            truth.of_dropping(kept, fraction)
        kept["factors"], kept["longer"] = np.array(numbers(cfg.longer)), losses_of_longer(run)


def why(settings, setting, seed):
    """How well hindsight predicts sets of other places and weights, to a file."""
    cfg = Config(**settings)
    kept = Kept(file_of_why(cfg, setting, seed), known_by(settings))
    if not kept.is_done:
        find_why(cfg, kept, setting, seed)
        kept.finish()
    return [dict(setting=setting, seed=seed, part="why")]


def find_why(cfg, kept, setting, seed):
    run = Run(cfg, setting, seed)
    if "values" not in kept:
        fresh(run)
        past = [run.training.record(step) for step in range(run.n_steps)]
        values, kept["norms"] = sweep(run, past, 0)
        kept["values"] = values.ravel()
    first = cfg.first
    if first < 0:
        first = int(hindsight.early(kept["norms"][:, None]).sum())
    kept["first"] = np.array(first)
    firsts = numbers(cfg.firsts, int)
    cases = [(step, 0.0) for step in [*firsts, first]]
    for weight in numbers(cfg.weights):
        cases += [(first, weight), (firsts[0], weight)]
    for step, weight in cases:
        Truth(run, step).of_sets(kept, f"{step}/{weight}", 0.03, cfg.why_sets, weight)


def file_of_why(cfg, setting, seed):
    return Path(cfg.out, f"why-{setting}-{seed}.npz")


def draws(settings, setting, seed):
    """Rows: how well values of so many target chunks a step predict the truth that a job left."""
    cfg = Config(**settings)
    found = Found(setting, seed, dict(np.load(file_of(cfg, setting, seed))))
    fraction = float(cfg.fractions.split(":")[0])
    run = Run(cfg, setting, seed)
    rows = []
    for target_batch in numbers(cfg.target_batches, int):
        values = one_step(run, "adamw2", target_batch=target_batch)["value"][:, 0].astype(float)
        row = {"setting": setting, "seed": seed, "target_batch": target_batch}
        for name, score in (("value", values), ("share", share_of_step(run, values))):
            found.arrays["score/drawn"] = score
            row[name] = agreements(found, fraction)["drawn"][0].pearson
            row[f"AUROC, {name}"] = auroc(found, "drawn") if found.has_junk() else None
        rows.append(row)
    return rows


def file_of(cfg, setting, seed, init=0):
    twin = "-twin" if init else ""
    return Path(cfg.out, f"{setting}-{seed}{twin}.npz")


def compute(cfg):
    text_of(cfg, cfg.settings.split(",")[0], 1)  # prepares the chunks once, refuses what is missing
    settings = {**vars(cfg), "quick": False}
    if cfg.part in ("why", "draws"):
        pairs = product(cfg.settings.split(","), numbers(cfg.seeds, int))
        jobs = [(settings, setting, seed) for setting, seed in pairs]
        work = why if cfg.part == "why" else draws
        side_by_side(work, jobs, Path(cfg.out, f"{cfg.part}.jsonl"), cfg.workers)
        return
    runs = []
    twins = []
    for setting in cfg.settings.split(","):
        runs += [(settings, setting, seed, 0) for seed in numbers(cfg.seeds, int)]
        twins += [(settings, setting, seed, 1) for seed in numbers(cfg.twins or "0", int) if seed]
    if cfg.part == "twins":
        check_twins(cfg, twins)
        side_by_side(job, twins, Path(cfg.out, "twins.jsonl"), cfg.workers)
    else:
        side_by_side(job, runs + twins, Path(cfg.out, "rows.jsonl"), cfg.workers)


def check_twins(cfg, twins):
    """Raises UserError where there are none, or one has no first run in --out."""
    if not twins:
        raise UserError("--part=twins: name the seeds with --twins=1,2")
    for _, setting, seed, _ in twins:
        if not file_of(cfg, setting, seed).is_file():
            what = f"no {setting} of seed {seed} in {cfg.out}"
            raise UserError(f"--part=twins: {what}: run without --part first")


# --- tables and figures -----------------------------------------------------------------


@dataclass
class Found:
    """What a job left: of a setting and a seed."""

    setting: str
    seed: int
    arrays: dict

    def batch(self):
        """Visits of a step."""
        return len(self.arrays["is_junk"]) // len(self.arrays["norm/hindsight"])

    def has_junk(self):
        return bool(self.arrays["is_junk"].any())

    def of_kind(self, kind):
        """{name: array} of the arrays whose name begins with kind/."""
        prefix = kind + "/"
        return {
            name.removeprefix(prefix): array
            for name, array in self.arrays.items()
            if name.startswith(prefix)
        }


def read_found(cfg, is_twin=False):
    """What is there of the settings and seeds asked for."""
    found = []
    for setting in cfg.settings.split(","):
        for seed in numbers(cfg.seeds, int):
            path = file_of(cfg, setting, seed, is_twin)
            if path.exists():
                found.append(Found(setting, seed, dict(np.load(path))))
    if not found and not is_twin:
        raise UserError(f"no results in {cfg.out}: leave out --part=report")
    return found


def agreements(found, fraction):
    """{score: its Agreement with the rise of the target's loss, and of the held-out loss}."""
    sets, rises = found.arrays[f"sets/{fraction}"], found.arrays[f"rises/{fraction}"]
    agreed = {}
    for name, score in found.of_kind("score").items():
        predicted = sums_of_sets(score, sets)
        agreed[name] = [agreement(predicted, rises[:, k]) for k in range(2)]
    return agreed


def auroc(job, name):
    """Of a junk visit having a lower score than another. Visits before the first that may be left
    out do not count."""
    step = np.arange(len(job.arrays["is_junk"])) // job.batch()
    counts = step >= job.arrays["first"]
    score, is_junk = job.arrays[f"score/{name}"][counts], job.arrays["is_junk"][counts]
    wins = stats.mannwhitneyu(-score[is_junk], -score[~is_junk]).statistic
    return float(wins / is_junk.sum() / (~is_junk).sum())


def table(cfg, setting, jobs, twins, fraction):
    """Lines of Markdown: how well each score predicts."""
    with_sets = [job for job in jobs if f"sets/{fraction}" in job.arrays]
    if not with_sets:
        return []
    agreed = [agreements(job, fraction) for job in with_sets]
    n_sets = len(with_sets[0].arrays[f"sets/{fraction}"])
    seeds = ", ".join(str(job.seed) for job in with_sets)
    lines = ["", f"### {setting}, {fraction:.0%} left out, {n_sets} sets, seeds {seeds}", ""]
    rows = []
    for name in agreed[0]:
        row = [name]
        for k in range(2):
            row.append(shown([of_job[name][k].pearson for of_job in agreed], 2))
        row.append(", ".join(f"{of_job[name][0].pearson:.2f}" for of_job in agreed))
        in_nats = name.startswith(("value", "hindsight"))
        row.append(shown([of_job[name][0].slope for of_job in agreed], 2) if in_nats else "")
        if setting.startswith("junk"):
            row.append(shown([auroc(job, name) for job in with_sets], 3))
        rows.append(row)
    head = ["score", "LDS", "held out", "of each seed", "slope"]
    if setting.startswith("junk"):
        head.append("AUROC of junk")
    lines += markdown(head, rows)
    for job in with_sets:
        for twin in twins:
            has_sets = f"rises/{fraction}" in twin.arrays
            if (twin.setting, twin.seed) == (setting, job.seed) and has_sets:
                rises = [one.arrays[f"rises/{fraction}"][:, 0] for one in (job, twin)]
                lines += [
                    "",
                    f"Seed {job.seed} and its twin agree to {np.corrcoef(*rises)[0, 1]:.2f}.",
                ]
    return lines


def times_the_steps(job, rise):
    """How many times the steps a run with all visits takes to the held-out loss, as text."""
    factors = [1.0, *job.arrays["factors"]]
    reached = [0.0, *(job.arrays["longer"][:, 1] - job.arrays["losses"][1])]
    if rise > 0:
        return "< 1"
    if rise < min(reached):
        return f"> {factors[-1]:g}"
    return f"{np.interp(-rise, -np.array(reached), factors):.2f}"


def drop_table(setting, jobs, fraction):
    """Lines of Markdown: what dropping the visits of least score does."""
    jobs = [job for job in jobs if f"dropped/{fraction}/random" in job.arrays]
    if not jobs:
        return []
    names = [*DROP_BY, "random"]
    rises = {name: [job.arrays[f"dropped/{fraction}/{name}"] for job in jobs] for name in names}
    seeds = ", ".join(str(job.seed) for job in jobs)
    rows = []
    for name in names:
        row = [name]
        for k in range(2):
            row.append(shown([rise[k] for rise in rises[name]], 4))
        less = [own[1] - other[1] for own, other in zip(rises[name], rises["random"])]
        row.append("" if name == "random" else shown(less, 4))
        worth = [times_the_steps(job, rise[1]) for job, rise in zip(jobs, rises[name])]
        row.append(", ".join(worth))
        rows.append(row)
    head = [
        "dropped by",
        "rise of the target's loss",
        "held out",
        "less than at random, held out",
        "held out, as good as all visits in so many times the steps",
    ]
    title = f"### {setting}, the {fraction:.0%} of least score dropped at once, seeds {seeds}"
    return ["", title, "", *markdown(head, rows)]


KINDS = {"value, adamw2": "value in its step", "hindsight": "value in hindsight"}


def draw_predictions(axes, jobs, fraction):
    """True rise of the target's loss against the predicted one, a dot for each set, for each kind
    of value."""
    for ax, (score, kind) in zip(axes, KINDS.items()):
        correlations = []
        for job in jobs:
            sets, rises = job.arrays[f"sets/{fraction}"], job.arrays[f"rises/{fraction}"][:, 0]
            predicted = sums_of_sets(job.arrays[f"score/{score}"], sets)
            correlations.append(agreement(predicted, rises).pearson)
            ax.plot(1e3 * predicted, 1e3 * rises, ".", label=f"seed {job.seed}", alpha=0.6)
        ax.set_title(f"{kind}: correlation {np.mean(correlations):.2f}", fontsize=10)
        ax.set_xlabel("sum of the values left out, 1e-3 nats")
    axes[0].set_ylabel("rise of the final loss without them")


def figure(cfg, found, path):
    """A row for each setting: how well either kind of value predicts, and |dL/dw| by step. And the
    first two panels of the first row by themselves, two_kinds.png."""
    settings = list(dict.fromkeys(job.setting for job in found))
    fraction = float(cfg.fractions.split(":")[0])
    plt = pyplot()
    shape = (len(settings), len(KINDS) + 1)
    fig, axes = plt.subplots(*shape, figsize=(11, 3.2 * len(settings)), squeeze=False)
    for row, setting in zip(axes, settings):
        jobs = [job for job in found if job.setting == setting]
        draw_predictions(row, jobs, fraction)
        row[0].set_ylabel(f"{setting}\nrise of the final loss without them")
        for job in jobs:
            row[-1].semilogy(job.of_kind("norm")["hindsight"])
        row[-1].set_title("|dL/dw| after each step", fontsize=10)
        row[-1].set_xlabel("step")
    axes[0, 0].legend(fontsize=8)
    save_figure(fig, path)
    fig, axes = plt.subplots(1, len(KINDS), figsize=(8, 3.2), sharey=True)
    draw_predictions(axes, [job for job in found if job.setting == settings[0]], fraction)
    axes[0].legend(fontsize=8)
    save_figure(fig, path.with_name("two_kinds.png"))


def figure_of_why(cfg):
    """Left: the correlation against the step from which on visits are left out, for each seed, and
    |dL/dw| there. Right: against the part of the weight that the visits lose."""
    plt = pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    lines = []
    setting = cfg.settings.split(",")[0]
    norms_axis = left.twinx()
    for i, seed in enumerate(numbers(cfg.seeds, int)):
        found = np.load(file_of_why(cfg, setting, seed))
        by_case = {}
        for name in found.files:
            if name.startswith("sets/"):
                step, weight = name.split("/")[1:]
                rises = found[f"rises/{step}/{weight}"][:, 0] / (1 - float(weight))
                agreed = agreement(sums_of_sets(found["values"], found[name]), rises)
                by_case[int(step), float(weight)] = agreed
                lines.append([seed, step, weight, f"{agreed.pearson:.2f}", f"{agreed.slope:.2f}"])
        whole = sorted(step for step, weight in by_case if not weight)
        color = f"C{i}"
        left.plot(whole, [by_case[step, 0.0].pearson for step in whole], "o-", color=color)
        left.axvline(int(found["first"]), linestyle="--", color=color, linewidth=1)
        steps = np.arange(whole[0], whole[-1] + 1)
        norms_axis.semilogy(steps, found["norms"][steps], color=color, linewidth=0.7)
        for step in sorted({step for step, weight in by_case if weight}):
            weights = sorted(weight for at, weight in by_case if at == step)
            style = "o-" if step == int(found["first"]) else "x:"
            of_weight = [by_case[step, weight].pearson for weight in weights]
            label = f"seed {seed}, from step {step}"
            right.plot(1 - np.array(weights), of_weight, style, color=color, label=label)
    left.set_xlabel("visits of steps from here on are left out (dashed: no longer early)")
    left.set_ylabel("correlation (dots)")
    norms_axis.set_ylabel("|dL/dw| (lines)")
    right.set_xlabel("part of their weight that they lose")
    right.legend(fontsize=7, loc="center right")
    save_figure(fig, Path(cfg.out, "why.png"))
    head = ["seed", "from step", "weight kept", "LDS", "slope"]
    text = "\n".join([*markdown(head, lines), "", *table_of_rest(cfg, setting)])
    Path(cfg.out, "why.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def table_of_rest(cfg, setting):
    """Lines of Markdown: what the sum of the values leaves of a set's rise, where no step is early,
    by the part of their weight that the visits lose. If it is of second order, it is the same for
    all parts, divided by the part's square."""
    lines = []
    for seed in numbers(cfg.seeds, int):
        found = np.load(file_of_why(cfg, setting, seed))
        first = int(found["first"])
        predicted = sums_of_sets(found["values"], found[f"sets/{first}/0.0"])
        of_all = found[f"rises/{first}/0.0"][:, 0] - predicted
        for kept in (0.0, *sorted(numbers(cfg.weights))):
            part = 1 - kept
            rest = (found[f"rises/{first}/{kept}"][:, 0] - part * predicted) / part**2
            line = [seed, f"{part:.1f}", f"{1e3 * rest.mean():.2f} ± {1e3 * rest.std():.2f}"]
            line.append(f"{np.corrcoef(rest, of_all)[0, 1]:.2f}")
            lines.append(line)
    head = ["seed", "part of the weight lost", "rest / part^2, 1e-3 nats ± spread of the sets"]
    head.append("its correlation with the rest of all the weight")
    return markdown(head, lines)


def table_of_draws(cfg):
    rows = read_rows(Path(cfg.out, "draws.jsonl"))
    columns = ("value", "share", "AUROC, value", "AUROC, share")
    lines = []
    cases = [(row["setting"], row["target_batch"]) for row in rows]
    for setting, target_batch in dict.fromkeys(cases):
        of_case = select(rows, setting=setting, target_batch=target_batch)
        line = [setting, target_batch, len(of_case)]
        for column in columns:
            found = [row[column] for row in of_case if row[column] is not None]
            line.append(shown(found, 2) if found else "")
        lines.append(line)
    head = ["setting", "target chunks a step", "seeds", "LDS of value", "LDS of share"]
    head += ["AUROC of value", "AUROC of share"]
    table = "\n".join(markdown(head, lines))
    Path(cfg.out, "draws.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def report(cfg):
    found, twins = read_found(cfg), read_found(cfg, is_twin=True)
    lines = [
        "Correlation of predicted and true rise of the loss: mean over seeds ± standard error."
    ]
    for setting in dict.fromkeys(job.setting for job in found):
        jobs = [job for job in found if job.setting == setting]
        for part in cfg.fractions.split(","):
            lines += table(cfg, setting, jobs, twins, float(part.split(":")[0]))
        for fraction in numbers(cfg.dropped):
            lines += drop_table(setting, jobs, fraction)
    finish(Path(cfg.out), lines)
    figure(cfg, found, Path(cfg.out, "counterfactual.png"))


def main(cfg):
    if cfg.part != "report":
        begin(cfg)
        compute(cfg)
    if cfg.part == "why":
        figure_of_why(cfg)
    elif cfg.part == "draws":
        table_of_draws(cfg)
    else:
        report(cfg)


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
