"""
Any model of PyTorch, valued while it trains.
The loop to copy is in main.

    python experiments/any_model.py                  a small CNN on drawn images, a tenth of them
                                                     with a wrong label
    python experiments/any_model.py --rule=sgd --seed=2

It shows how shapley/wrap.py and valuation.py are used without train.py. It measures nothing:
experiments/mislabeled.py does. One core: 15 s.
Writes values.npy, ledger.npy, books.npy and values.json into --out. Expected: of the ten lowest
values 9 belong to wrong labels (seed 2: 6), where 1 in 10 would by chance, and the books account
for 99.9 % of what the validation loss fell by.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import config
from data import global_batch
from shapley.wrap import Examples, Net
from show import tables
from system.writer import Writer
from valuation import Settings, Valuation


@dataclass
class Config:
    # what a value is (math in shapley/directions.py)
    rule: Literal["sgd", "sgd2", "adamw_linear", "adamw", "adamw2"] = "adamw2"
    steps: int = 500
    batch: int = 20  # examples of a step
    learning_rate: float = 3e-3
    seed: int = 1
    out: str = "out/any_model"


def draw(n, seed):
    """n noisy images of a bar, upright (kind 0) or lying (1), a cross (2) or a square (3).

    Returns the images, float32 (n, 1, 8, 8), and their kinds, int (n,).
    """
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 0.4, (n, 1, 8, 8)).astype(np.float32)
    kinds = rng.integers(4, size=n)
    rows, columns = rng.integers(1, 5, (2, n))
    for image, kind, y, x in zip(images[:, 0], kinds, rows, columns):
        if kind in (0, 2):
            image[y : y + 3, x + 1] += 1
        if kind in (1, 2):
            image[y + 1, x : x + 3] += 1
        if kind == 3:
            image[y : y + 3, x : x + 3] += 1
    return images, kinds


def build():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.GELU(),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.GELU(),
        nn.Flatten(),
        nn.LayerNorm(64),
        nn.Linear(64, 4),
    )


def main(cfg):
    torch.set_num_threads(1)  # more would only get into each other's way in a model this small
    X, Y = draw(1000, cfg.seed)
    wrong = np.arange(len(Y)) < 100
    Y[wrong] = (Y[wrong] + 1) % 4
    torch.manual_seed(cfg.seed)
    model = build()
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)

    # from here on: any model, any loss that takes reduction="none", any arrays X, Y
    net = Net(model, F.cross_entropy)
    optimizer = torch.optim.AdamW(net.parameters(), cfg.learning_rate, betas=(0.9, 0.95))
    target = Examples("validation", *draw(200, cfg.seed + 1000))

    def compute_loss(x, y, ledger=None):
        return net(x, y, ledger)[1]

    settings = Settings(
        rule=cfg.rule,
        batch=cfg.batch,
        target_batch=50,  # a step's target: 50 of the 200 examples, drawn anew
        grad_clip=1.0,
    )
    writer = Writer(out, len(X))
    valuation = Valuation(net, optimizer, compute_loss, [target], settings, writer)
    for step in range(cfg.steps):
        ids = global_batch(step, cfg.batch, len(X), cfg.seed)
        x = torch.from_numpy(X[ids])
        y = torch.from_numpy(Y[ids])
        # a warm-up, or the first steps would outweigh all others
        lr = cfg.learning_rate * min(1.0, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = lr

        valuation.begin_step(step, lr)
        ledger = valuation.new_ledger(ids, x, y)
        compute_loss(x, y, ledger).backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        # what the gradients were multiplied by; a loop without clipping leaves it out
        valuation.before_update((1.0 / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        optimizer.zero_grad()
        valuation.end_step()
    valuation.commit()  # in a long run, now and then

    show(np.load(out / "values.npy")[:, 0], wrong)
    books = np.load(out / "books.npy")
    print("\n".join(tables.account(books, [], [target.name], cfg.rule)))


def show(values, wrong):
    """Prints the ten lowest and highest values (n,): nats, positive = lowered the target's loss."""
    used = np.count_nonzero(np.isfinite(values))
    order = np.argsort(values)[:used]  # NaN, sorted last: never used
    for name, ids in (("lowest", order[:10]), ("highest", order[:-11:-1])):
        texts = []
        for i in ids:
            label = " (wrong label)" if wrong[i] else ""
            texts.append(f"{i}{label} {values[i]:+.4f}")
        print(f"{name}: {', '.join(texts)}")


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
