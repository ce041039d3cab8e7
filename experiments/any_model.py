"""
Any model of nn.Linear, nn.Embedding, nn.LayerNorm and nn.Conv2d, valued while it trains: the loop to copy is in main.

    python experiments/any_model.py                       a small CNN on drawn images, a tenth of them with a wrong label
    python experiments/any_model.py --rule=sgd --seed=2

It shows how shapley/wrap.py and valuation.py are used without train.py; it measures nothing (experiments/mislabeled.py does). One core: 15 s.
Writes values.npy, ledger.npy, books.npy and values.json into --out. Expected: of the ten lowest values 9 belong to wrong labels (seed 2: 6),
where 1 in 10 would by chance, and the books account for 99.9 % of what the validation loss fell by.
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
from valuation import Valuation


@dataclass
class Config:
    rule: Literal["sgd", "sgd2", "adamw_linear", "adamw", "adamw2"] = (
        "adamw2"  # what a value is (math in shapley/directions.py)
    )
    steps: int = 500
    batch: int = 20  # examples of a step
    learning_rate: float = 3e-3
    seed: int = 1
    out: str = "out/any_model"


def draw(n, seed):
    """n images (1, 8, 8) of a bar, upright or lying, a cross or a square, in noise, and which of the four it is."""
    rng = np.random.default_rng(seed)
    images, kinds = rng.normal(0, 0.4, (n, 1, 8, 8)).astype(np.float32), rng.integers(4, size=n)
    for (image,), kind, y, x in zip(images, kinds, *rng.integers(1, 5, (2, n))):
        image[y : y + 3, x + 1] += kind in (0, 2)
        image[y + 1, x : x + 3] += kind in (1, 2)
        image[y : y + 3, x : x + 3] += kind == 3
    return images, kinds


def main(cfg):
    torch.set_num_threads(1)  # more would only get into each other's way in a model this small
    X, Y = draw(1000, cfg.seed)
    wrong = np.arange(len(Y)) < 100
    Y[wrong] = (Y[wrong] + 1) % 4
    torch.manual_seed(cfg.seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.GELU(),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.GELU(),
        nn.Flatten(),
        nn.LayerNorm(64),
        nn.Linear(64, 4),
    )

    # from here on: any model, any loss that takes reduction="none", any arrays X, Y
    net, out = Net(model, F.cross_entropy), Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(net.parameters(), cfg.learning_rate, betas=(0.9, 0.95))
    target = Examples("validation", *draw(200, cfg.seed + 1000))
    options = dict(target_batch=50, grad_clip=1.0)  # a step's target: 50 of the 200, drawn anew
    valuation = Valuation(
        net,
        optimizer,
        lambda *batch: net(*batch)[1],
        [target],
        cfg.rule,
        cfg.batch,
        len(X),
        out,
        **options,
    )
    for step in range(cfg.steps):
        ids = global_batch(step, cfg.batch, len(X), cfg.seed)
        x, y = torch.from_numpy(X[ids]), torch.from_numpy(Y[ids])
        lr = optimizer.param_groups[0]["lr"] = cfg.learning_rate * min(
            1.0, (step + 1) / 100
        )  # warm-up, or the first steps outweigh all others
        valuation.open(step, lr)
        net(x, y, valuation.ledger(ids, x, y))[1].backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        valuation.before_step(
            (1.0 / (norm + 1e-6)).clamp(max=1.0)
        )  # what the gradients were multiplied by; without clipping: before_step()
        optimizer.step()
        optimizer.zero_grad()
        valuation.close()
    valuation.commit()  # in a long run, now and then

    values = np.load(out / "values.npy")  # (n,): nats, positive = lowered the validation loss
    order = np.argsort(values)[
        : np.count_nonzero(np.isfinite(values))
    ]  # NaN, sorted last: never used
    for name, ids in (("lowest", order[:10]), ("highest", order[:-11:-1])):
        print(
            f"{name}: "
            + ", ".join(f"{i}{' (wrong label)' if wrong[i] else ''} {values[i]:+.4f}" for i in ids)
        )
    print(tables.account(np.load(out / "books.npy"), [], [target.name], []))


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
