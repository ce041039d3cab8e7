"""
How far central differences in float32 are from derivatives, by how far they reach: what EPSILON of
shapley/hindsight.py should be.

    python bench/differences.py                     two minutes on two cores
    python bench/differences.py --out=results/hindsight

A small GPT is trained in float32 on the text every Python installation carries, by AdamW and by
SGD. Its first steps and its last ones are taken back, with differences at many epsilons and with
exact double backward in float64, both along the same recorded steps. The error is the relative L2
distance of the two segments' values. Chunk losses, whose differences are the values, are taken as
float32; as float64 means of float32 token losses; with cross-entropy in float64. Draws
differences.png, prints a table and last one JSON line.
"""

import dataclasses
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import config
import prepare_pile
from bench.common import machine_name, print_json
from data import global_batch, open_dataset
from model import GPT, GPTConfig
from shapley import exact, hindsight
from shapley.replay import Training
from system.machine import replaying

OPTIMIZERS = ("adamw", "sgd")
SEGMENTS = ("early", "late")
LOSSES = ("float32", "float64 means", "float64 cross-entropy")


@dataclass
class Config:
    data: str = "data/differences"  # the prepared chunks, made when missing
    out: str = "out/differences"
    epsilons: str = "1e-5,2e-5,5e-5,1e-4,1.5e-4,2e-4,3e-4,5e-4,1e-3,2e-3,5e-3,1e-2"
    iters: int = 600
    segment: int = 20  # steps that are taken back, at either end of the run
    block_size: int = 64
    batch_size: int = 8
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 64
    warmup_iters: int = 20  # then the rate is constant
    learning_rate: float = 1e-3
    sgd_learning_rate: float = 0.3
    grad_clip: float = 1.0
    target_chunks: int = 64
    seed: int = 0

    def epsilon_list(self):
        return [float(word) for word in self.epsilons.split(",")]


# --- the truth ------------------------------------------------------------------------


def in_float64(past, gradient):
    """Recorded steps, and the target's gradient after them, in float64."""

    def doubled(tensors):
        return [tensor.double() for tensor in tensors]

    steps = []
    for step in past:
        new = {"weights": doubled(step.weights), "gradients": doubled(step.gradients)}
        new["moments"] = [tuple(doubled(pair)) for pair in step.moments]
        steps.append(dataclasses.replace(step, **new))
    return steps, doubled(gradient)


def exact_back(training, past, adjoint):
    """What hindsight.back does, with double backward in the place of differences. The step must
    have been one forward."""
    h = hindsight.direction(training, past, adjoint)
    _, X, Y = training.batch(past.number)
    params = training.weights.params
    with training.weights.at(past.weights), replaying(past.rng), sdpa_kernel(SDPBackend.MATH):
        products, curvature = exact.along(training.chunk_losses(X, Y), params, h)
    torch._foreach_add_(adjoint.w, curvature)
    return -products


# --- a run ----------------------------------------------------------------------------


class Run:
    """A training on real text, and the target's gradient."""

    def __init__(self, cfg, kind, text, dtype=torch.float32):
        self.cfg, self.text = cfg, text
        torch.manual_seed(cfg.seed)
        sizes = (cfg.block_size, 256, cfg.n_layer, cfg.n_head, cfg.n_embd)
        self.model = GPT(GPTConfig(*sizes, bias=False)).to(dtype)
        self.optimizer = self.model.configure_optimizers(0.1, 1.0, (0.9, 0.95), "cpu")
        self.learning_rate = cfg.learning_rate
        if kind == "sgd":
            self.optimizer = torch.optim.SGD(self.optimizer.param_groups)
            self.learning_rate = cfg.sgd_learning_rate

    def training(self, losses):
        """losses: one of LOSSES."""
        cfg = self.cfg

        def chunk_losses(X, Y):
            return losses_of_chunks(self.model, X, Y, losses)

        what = (self.model, self.optimizer, chunk_losses, self.batch, self.lr)
        return Training(*what, cfg.batch_size, cfg.grad_clip)

    def lr(self, step):
        return self.learning_rate * min(1, (step + 1) / (self.cfg.warmup_iters + 1))

    def batch(self, step):
        rows = self.text.train.rows
        ids = global_batch(step, self.cfg.batch_size, len(rows), self.cfg.seed)
        tokens = rows[ids].astype(np.int64)
        return ids, tokens[:, :-1], tokens[:, 1:]

    def target_gradient(self):
        """Of the first validation chunks, at the weights as they are."""
        tokens = self.text.val.rows[: self.cfg.target_chunks].astype(np.int64)
        losses = losses_of_chunks(self.model, tokens[:, :-1], tokens[:, 1:], "float64 means")
        return list(torch.autograd.grad(losses.mean(), list(self.model.parameters())))


def losses_of_chunks(model, X, Y, losses):
    """The mean loss of each chunk's tokens (b,), nats, with its graph; of one of LOSSES."""
    X, Y = torch.as_tensor(X), torch.as_tensor(Y)
    logits, _ = model(X, Y)
    if losses == "float64 cross-entropy":
        logits = logits.double()
    of_tokens = F.cross_entropy(logits.flatten(0, 1), Y.flatten(), reduction="none").view(Y.shape)
    if losses == "float64 means":
        of_tokens = of_tokens.double()
    return of_tokens.mean(1)


def sweep(training, past, gradient, back, **options):
    """The values (n, B) of recorded steps, for the target of that gradient after the last."""
    adjoint = hindsight.Adjoint.of_end(gradient, bool(past[0].moments))
    values = []
    for step in reversed(past):
        values.append(back(training, step, adjoint, **options).numpy())
    return np.stack(values[::-1])


def segments(run):
    """Takes all steps. Returns {segment: (its recorded steps, the target's gradient after them)}"""
    cfg = run.cfg
    training = run.training("float64 means")
    past = [training.record(step) for step in range(cfg.segment)]
    found = {"early": (past, run.target_gradient())}
    for step in range(cfg.segment, cfg.iters - cfg.segment):
        training.take(step)
    past = [training.record(step) for step in range(cfg.iters - cfg.segment, cfg.iters)]
    found["late"] = (past, run.target_gradient())
    return found


def measure(cfg, kind, text):
    """The rows of an optimizer."""
    run = Run(cfg, kind, text)
    twin = Run(cfg, kind, text, torch.float64)
    rows = []
    for segment, (past, gradient) in segments(run).items():
        exact_past, exact_gradient = in_float64(past, gradient)
        truth = sweep(twin.training("float32"), exact_past, exact_gradient, exact_back)
        for losses, epsilon in itertools.product(LOSSES, cfg.epsilon_list()):
            training = run.training(losses)
            values = sweep(training, past, gradient, hindsight.back, epsilon=epsilon)
            error = float(np.linalg.norm(values - truth) / np.linalg.norm(truth))
            row = dict(optimizer=kind, segment=segment, losses=losses, epsilon=epsilon, error=error)
            rows.append(row)
    return rows


# --- what is shown ----------------------------------------------------------------------


def curves(rows):
    """{(optimizer, segment, losses): [error by epsilon]}"""
    found = {}
    for row in rows:
        key = (row["optimizer"], row["segment"], row["losses"])
        found.setdefault(key, []).append(row["error"])
    return found


def show(cfg, rows):
    head = f"{'optimizer':11}{'steps':7}{'chunk losses':23}"
    print(head + "".join(f"{epsilon:9.1e}" for epsilon in cfg.epsilon_list()))
    for (optimizer, segment, losses), errors in curves(rows).items():
        line = f"{optimizer:11}{segment:7}{losses:23}"
        print(line + "".join(f"{error:9.1e}" for error in errors))


def draw(cfg, rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shape = (len(OPTIMIZERS), len(SEGMENTS))
    fig, axes = plt.subplots(*shape, figsize=(9, 7), sharex=True, sharey=True)
    for (optimizer, segment, losses), errors in curves(rows).items():
        ax = axes[OPTIMIZERS.index(optimizer), SEGMENTS.index(segment)]
        ax.loglog(cfg.epsilon_list(), errors, marker="o", markersize=3, label=losses)
        ax.set_title(f"{optimizer}, {segment} steps")
    for ax in axes.flat:
        ax.axvline(hindsight.EPSILON, color="grey", linewidth=0.8, linestyle=":")
        ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("epsilon: |e h| / |w|")
    for ax in axes[:, 0]:
        ax.set_ylabel("error of the values, relative L2")
    axes[0, 0].legend(title="chunk losses")
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def prepared(cfg):
    """The dataset."""
    if not Path(cfg.data, "meta.json").is_file():
        options = dict(source="python", tokenizer="byte", val_fraction=0.1, limit_tokens=2_000_000)
        options.update(block_size=cfg.block_size, data_dir=cfg.data, workers=1)
        prepare_pile.prepare(prepare_pile.Config(**options))
    return open_dataset(cfg.data)


def main(cfg):
    text = prepared(cfg)
    rows = []
    for kind in OPTIMIZERS:
        rows += measure(cfg, kind, text)
    show(cfg, rows)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    draw(cfg, rows, out / "differences.png")
    print_json(cfg, rows, machine=machine_name("cpu"), torch=torch.__version__)


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
