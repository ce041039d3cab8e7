"""
Which of 1,000 images are mislabeled? In-run values beside what else one could pay for, each with its price.

    python experiments/mislabeled.py                  Fashion-MNIST, from Debian's package: apt-get install dataset-fashion-mnist
    python experiments/mislabeled.py --data=digits    scikit-learn's digits, no download
    python experiments/mislabeled.py --quick          the whole experiment, tiny, on digits
    python experiments/mislabeled.py --part=report --out=...

Claim: values computed in the training run itself find wrong labels as well as methods that cost as much, and retraining on the best images
loses little. Place: the classification table of "Data Shapley in One Training Run" (CIFAR-10 and a pretrained ResNet18 there; a small model
from scratch here, by AdamW 1e-3, decay 1e-4, batch 64, 50 epochs, label smoothing .1). A tenth of the labels is wrong, another class at random.

AUROC: of a wrong label standing below a right one. Accuracy: on test images, after training anew, with the same options, on the best 20 to 80 %.
Cost: CPU seconds on one thread beyond the one training that every method may use (its checkpoints, its last model); the tables have it twice, of
all epochs, as the paper, and stopped where the validation loss was lowest. Each method is also judged by the ranks of its values among the images
of the same label, for a label that the target asks for lifts all of its images. In-run values are summed over the run. Their target at each step is
the whole clean validation set, which KNN-Shapley, TracIn, influence functions and the retraining methods look at too. TracIn and influence
functions come from dattri (pip install -r requirements-experiments.txt); KNN-Shapley is written out here, for dattri's, which gives the same, loops
in Python. Retraining Shapley: permutations cut into blocks whose examples share the block's gain; empirical influence: random halves with and
without the example; both train --retrainings models for a tenth of the epochs, many at once, and look at the validation loss.
Expected (results/mislabeled, four seeds): in-run AUROC .75, as TracIn and last-layer influence at the price of several trainings, far
above retraining (.52, .67), behind KNN-Shapley (.88 to .95) and the mean training loss of the run (.97), which cost next to nothing; .85 (`sgd`)
and .81 (`adamw2`) where the training stops at its lowest validation loss. Keeping 80 % by value: accuracy .755 where all images give .730.
Writes rows.jsonl, table.md, mislabeled.png. Four seeds (images, flips, weights). A core: 10 minutes (--workers=2: 5), --quick 30 seconds.
"""

import contextlib
import gzip
import io
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import config
from data import global_batch
from experiments.common import (
    begin,
    finish,
    markdown,
    mean_se,
    pyplot,
    read_rows,
    shown,
    side_by_side,
)
from shapley.wrap import Examples, Net
from system.errors import UserError
from valuation import Valuation

PACKAGE = "/usr/share/datasets/fashion-mnist"
FRACTIONS = (20, 40, 60, 80)
DAMPING = 1.0  # of the Hessian: of .01, .03, .1, .3 and 1 the only one where conjugate gradients met no negative curvature and converged
RULES = ("sgd", "adamw", "adamw2")
STOPPED, RAW, BY_LABEL = (
    ", stopped",
    "the values as they are",
    "their ranks among the images of the same label",
)
OF_A_TRAINING = (*(f"in-run {rule}" for rule in RULES), "KNN-Shapley, features",
                 "TracIn, 10 checkpoints", "TracIn, last checkpoint", "influence, all weights (CG)", "influence, last layer",
                 "training loss, last", "training loss, mean of the run")  # fmt: skip
OF_NONE = (
    "KNN-Shapley, pixels",
    "retraining Shapley",
    "empirical influence",
    "loss of a model of the validation set",
)
THEIRS = {"random": (None, 0.350, 0.461, 0.525, 0.559), "retraining Shapley": (0.582, 0.317, 0.468, 0.527, 0.570),
          "empirical influence": (0.552, 0.342, 0.466, 0.530, 0.568), "KNN-Shapley, features": (0.760, 0.354, 0.478, 0.525, 0.563),
          "influence": (0.654, 0.320, 0.450, 0.530, 0.580), "in-run, 1st order": (0.678, 0.344, 0.472, 0.541, 0.580),
          "in-run, 2nd order": (0.680, 0.342, 0.473, 0.544, 0.580)}  # fmt: skip


@dataclass
class Config:
    data: str = PACKAGE  # folder with Fashion-MNIST's four files, or digits
    source: str = ""  # nothing: this experiment reads no text
    out: str = "out/mislabeled"
    seeds: str = "1,2,3,4"  # each draws images and wrong labels, and initialises the model
    model: Literal["mlp", "cnn"] = "mlp"
    hidden: int = 64  # units of the mlp's layer, channels of the cnn's second
    train: int = 1000  # images to be valued
    wrong: float = 0.1  # share of them whose label is wrong
    val: int = 500  # clean images, the target
    test: int = 5000  # at most
    epochs: int = 50
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    smoothing: float = 0.1  # of labels, in training and target
    retrainings: int = 200  # of each retraining method
    blocks: int = 20  # of a permutation of retraining Shapley
    workers: int = 1
    quick: bool = False  # tiny, on digits
    part: Literal["all", "report"] = "all"

    def __post_init__(self):
        if self.quick:
            self.data, self.seeds, self.workers = "digits", "1,2", 2
            self.train, self.val, self.epochs, self.retrainings = 300, 200, 10, 40


# --- images ---------------------------------------------------------------------


def images(cfg):
    """Two pools, to draw train and validation, and test images from: X uint8 (n, 1, height, width), Y (n,). The second may be None."""
    if cfg.data == "digits":
        load_digits = library("sklearn.datasets").load_digits
        return (
            (load_digits().images[:, None] * 15.9).astype(np.uint8),
            load_digits().target,
            None,
            None,
        )
    pools = []
    for part in ("train", "t10k"):
        for kind, skip in (("images-idx3", 16), ("labels-idx1", 8)):
            path = Path(cfg.data, f"{part}-{kind}-ubyte")
            packed = path.with_name(path.name + ".gz")
            if not (path.is_file() or packed.is_file()):
                raise UserError(
                    f"no {path.name}[.gz] in {cfg.data}: apt-get install dataset-fashion-mnist, or write --data=<its folder> or digits"
                )
            raw = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
            pools.append(np.frombuffer(raw, np.uint8, offset=skip))
    return pools[0].reshape(-1, 1, 28, 28), pools[1], pools[2].reshape(-1, 1, 28, 28), pools[3]


def draw(cfg, seed):
    """Train X, Y with wrong labels and which they are, val and test: a function of the seed."""
    rng, (X, Y, other_X, other_Y) = np.random.default_rng(seed), images(cfg)
    if cfg.train + cfg.val >= len(X):
        raise UserError(
            f"--train={cfg.train} and --val={cfg.val} leave nothing of {len(X)} images: make them smaller"
        )
    order = rng.permutation(len(X))
    train, val, rest = np.split(order, [cfg.train, cfg.train + cfg.val])
    if other_X is None:
        other_X, other_Y = X[rest], Y[rest]
    test = rng.permutation(len(other_X))[: cfg.test]
    mean, std = X[train].mean(), X[train].std()
    scaled = lambda x: ((x - mean) / std).astype(np.float32)
    wrong, noisy = np.zeros(cfg.train, bool), Y[train].astype(np.int64)
    wrong[rng.choice(cfg.train, round(cfg.wrong * cfg.train), replace=False)] = True
    noisy[wrong] = (noisy[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    of = dict(
        X=scaled(X[train]), Y=noisy, wrong=wrong, val=(scaled(X[val]), Y[val].astype(np.int64))
    )
    return SimpleNamespace(**of, test=(scaled(other_X[test]), other_Y[test].astype(np.int64)))


def library(name):
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(
            f"{name} is missing ({e}): pip install -r requirements-experiments.txt"
        ) from e


# --- training ---------------------------------------------------------------------


def build(cfg, pixels, seed):
    torch.manual_seed(seed)
    last = nn.LayerNorm(cfg.hidden), nn.GELU(), nn.Linear(cfg.hidden, 10)
    if cfg.model == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels**2, cfg.hidden), *last)
    conv = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1)
    return nn.Sequential(
        conv(1, 16),
        nn.GELU(),
        conv(16, cfg.hidden),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        *last,
    )


def loss_of(cfg):
    return partial(F.cross_entropy, label_smoothing=cfg.smoothing)


def train(cfg, X, Y, val, seed, steps=0, rule="off", run=None):
    """One training, of cfg.epochs or of so many steps -> the model, ten checkpoints, CPU seconds. With a rule, the run's files are in run."""
    net = Net(build(cfg, X.shape[-1], seed), loss_of(cfg))
    optimizer = torch.optim.AdamW(
        net.parameters(), cfg.learning_rate, weight_decay=cfg.weight_decay
    )
    options = dict(target_batch=cfg.val, target_sampling="fixed", book_interval=10)
    valuation = Valuation(
        net,
        optimizer,
        lambda *batch: net(*batch)[1],
        [Examples("validation", *val)],
        rule,
        cfg.batch,
        len(X),
        run,
        **options,
    )
    steps, checkpoints, began = steps or cfg.epochs * len(X) // cfg.batch, [], time.process_time()
    for step in range(steps):
        ids = global_batch(step, cfg.batch, len(X), seed)
        x, y = torch.from_numpy(X[ids]), torch.from_numpy(Y[ids])
        valuation.open(step, cfg.learning_rate)
        net(x, y, valuation.ledger(ids, x, y))[1].backward()
        valuation.before_step()
        optimizer.step()
        optimizer.zero_grad()
        valuation.close()
        if (step + 1) * 10 // steps > step * 10 // steps:
            checkpoints.append(
                {name: p.detach().clone() for name, p in net.model.state_dict().items()}
            )
    valuation.commit()
    return net.model, checkpoints, time.process_time() - began


def train_many(cfg, X, Y, subsets, steps, seed, together=32):
    """A model for each subset of the images, `together` at a time, from the same first weights: yields functions X -> logits (models, n, 10)."""
    X, Y = torch.from_numpy(X), torch.from_numpy(Y)
    for some in (subsets[i : i + together] for i in range(0, len(subsets), together)):
        model, rng, orders = build(cfg, X.shape[-1], seed), np.random.default_rng(seed), []
        for ids in some:  # epoch after epoch, each a permutation of the subset
            epochs = [
                ids[rng.permutation(len(ids))] for _ in range(-(-steps * cfg.batch // len(ids)))
            ]
            orders.append(np.concatenate(epochs)[: steps * cfg.batch].reshape(steps, cfg.batch))
        params = {
            name: p.detach().expand(len(some), *p.shape).clone().requires_grad_()
            for name, p in model.named_parameters()
        }
        optimizer = torch.optim.AdamW(
            params.values(), cfg.learning_rate, weight_decay=cfg.weight_decay
        )
        apply = torch.func.vmap(partial(torch.func.functional_call, model))
        for ids in torch.from_numpy(np.stack(orders, 1)):
            logits, labels = apply(params, X[ids]), Y[ids]
            (
                loss_of(cfg)(logits.flatten(0, 1), labels.flatten()) * len(some)
            ).backward()  # each model's own mean loss, summed
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            yield lambda x, apply=apply, params=params, some=some: apply(
                params, torch.from_numpy(x).expand(len(some), *x.shape)
            )


# --- the methods: values (n,), the larger the better ---------------------------------


def knn_shapley(x, y, val_x, val_y, K=5):
    """Exact Shapley values of the K-nearest-neighbour classifier (Jia et al., 2019), by their recursion from the farthest point on."""
    order = torch.cdist(torch.as_tensor(val_x), torch.as_tensor(x)).argsort(1).numpy()
    n, match = len(x), (y[order] == val_y[:, None]).astype(float)
    ranks = np.arange(1, n)
    steps = (match[:, :-1] - match[:, 1:]) / K * np.minimum(K, ranks) / ranks
    sorted_values = (
        np.concatenate([np.cumsum(steps[:, ::-1], 1)[:, ::-1], np.zeros((len(order), 1))], 1)
        + match[:, -1:] / n
    )
    values = np.zeros_like(sorted_values)
    np.put_along_axis(values, order, sorted_values, 1)
    return values.mean(0)


def gradients(cfg, data, model, checkpoints):
    """dattri's task and loaders: every training image, and the validation set as one example whose loss is its mean."""
    task, shape = library("dattri.task"), data.X.shape[1:]

    def loss(params, batch):
        x, y = batch
        return loss_of(cfg)(
            torch.func.functional_call(model, params, x.reshape(-1, *shape)), y.reshape(-1)
        )

    rows = torch.utils.data.TensorDataset(torch.from_numpy(data.X), torch.from_numpy(data.Y))
    target = torch.utils.data.TensorDataset(*(torch.from_numpy(a)[None] for a in data.val))
    task = task.AttributionTask(loss, model, checkpoints)
    return (
        task,
        torch.utils.data.DataLoader(rows, batch_size=len(rows)),
        torch.utils.data.DataLoader(target, batch_size=1),
    )


def tracin(cfg, data, model, checkpoints):
    task, rows, target = gradients(cfg, data, model, checkpoints)
    rates = torch.full((len(checkpoints),), cfg.learning_rate)
    attributor = library("dattri.algorithm").TracInAttributor(task, rates, normalized_grad=False)
    attributor.projector_kwargs = None  # or gradients are projected to 512 dimensions
    return attributor.attribute(rows, target)[:, 0].numpy()


def influence(cfg, data, model, checkpoint, **options):
    """Positive: leaving the image out would raise the validation loss."""
    task, rows, target = gradients(cfg, data, model, [checkpoint])
    algorithm = library("dattri.algorithm")
    attributor = (
        algorithm.IFAttributorExplicit if "layer_name" in options else algorithm.IFAttributorCG
    )(task, **options)
    attributor.cache(rows)
    return attributor.attribute(rows, target)[:, 0].detach().numpy()


def utilities(cfg, data, subsets, seed):
    """How far a short training on each subset brings the validation loss down."""
    x, y = data.val[0], torch.from_numpy(data.val[1])
    steps, losses = max(1, cfg.epochs * cfg.train // cfg.batch // 10), []
    for logits in train_many(cfg, data.X, data.Y, subsets, steps, seed):
        losses += [float(loss_of(cfg)(one, y)) for one in logits(x)]
    with torch.no_grad():
        return float(
            loss_of(cfg)(build(cfg, x.shape[-1], seed)(torch.from_numpy(x)), y)
        ) - np.array(losses)


def retraining_shapley(cfg, data, seed):
    rng, n = np.random.default_rng(seed), cfg.train
    orders = [rng.permutation(n) for _ in range(cfg.retrainings // cfg.blocks)]
    ends = np.arange(1, cfg.blocks + 1) * n // cfg.blocks
    gains = utilities(cfg, data, [order[:end] for order in orders for end in ends], seed).reshape(
        len(orders), cfg.blocks
    )
    sizes, values = np.diff(ends, prepend=0), np.zeros(n)
    for order, gain in zip(orders, np.diff(gains, axis=1, prepend=0)):
        values[order] += np.repeat(gain / sizes, sizes)
    return values / len(orders)


def empirical_influence(cfg, data, seed):
    rng, n = np.random.default_rng(seed), cfg.train
    inside = np.stack([rng.permutation(n) < n // 2 for _ in range(cfg.retrainings)])
    gains = utilities(cfg, data, [np.flatnonzero(row) for row in inside], seed)
    return (gains @ inside) / inside.sum(0) - (gains @ ~inside) / (~inside).sum(0)


@torch.no_grad()
def example_losses(model, X, Y):
    return F.cross_entropy(
        model(torch.from_numpy(X)), torch.from_numpy(Y), reduction="none"
    ).numpy()


# --- one seed -------------------------------------------------------------------------


def auroc(values, wrong):
    """The chance that a wrong label stands below a right one; equal values count half."""
    right, values = values[~wrong], values[wrong]
    return float(((values[:, None] < right) + 0.5 * (values[:, None] == right)).mean())


def summed(visits, n, weights):
    values = np.zeros(n)
    np.add.at(values, visits["chunk"], weights)
    return values


def in_run_variants(cfg, visits, labels):
    """Other sums of the same ledger: name -> values. Of every step's values also the rank among them, and the share of their absolute sum."""
    v, B, n = visits["value"][:, 0].astype(float), cfg.batch, len(labels)
    steps, epoch = v.reshape(-1, B), np.arange(len(v)) // n
    ranks = (steps.argsort(1).argsort(1) / (B - 1) - 0.5).ravel()
    share = (steps / abs(steps).sum(1, keepdims=True)).ravel()
    found = {"all epochs": v}
    for last in (1, 2, 5, 10, 20):
        found[f"epochs 1 to {last}"] = v * (epoch < last)
    found[f"the later half, epochs {cfg.epochs // 2 + 1} to {cfg.epochs}"] = v * (
        epoch >= cfg.epochs // 2
    )
    found |= {
        "ranks within the step": ranks,
        "shares of the step": share,
        "signs": np.sign(v),
        "ranks, epochs 1 to 10": ranks * (epoch < 10),
    }
    return {name: summed(visits, n, weights) for name, weights in found.items()}


def among_its_label(values, labels):
    """Each image's rank among those of its (given) label, from 0 to 1: a label that the target asks for lifts all of its images alike."""
    ranks = np.zeros(len(values))
    for label in np.unique(labels):
        ranks[labels == label] = (
            values[labels == label].argsort().argsort() / (labels == label).sum()
        )
    return ranks


def accuracies(cfg, data, values, seed):
    """Method -> test accuracy after training on its best 20, 40, 60, 80 %; all methods' models of a fraction at once."""
    names, found = list(values), {name: {} for name in values}
    x, y = data.test[0], torch.from_numpy(data.test[1])
    for fraction in FRACTIONS:
        n = cfg.train * fraction // 100
        subsets = [np.sort(np.argsort(-values[name], kind="stable")[:n]) for name in names]
        models = train_many(cfg, data.X, data.Y, subsets, max(1, cfg.epochs * n // cfg.batch), seed)
        scores = [
            float((one.argmax(-1) == y).float().mean()) for logits in models for one in logits(x)
        ]
        for name, score in zip(names, scores):
            found[name][str(fraction)] = score
    return found


def of_training(cfg, data, seed, steps=0):
    """What one training, and what it leaves, says of its images: method -> values and seconds; rows of the in-run sums; the validation loss's low."""
    n, found, rows = cfg.train, {}, []
    model, checkpoints, plain = train(cfg, data.X, data.Y, data.val, seed, steps)

    def timed(name, work):
        began = time.process_time()
        with contextlib.redirect_stderr(io.StringIO()):  # dattri's progress bars
            values = np.asarray(work(), float)
        found[name] = dict(values=values, seconds=time.process_time() - began)

    for rule in RULES:
        with tempfile.TemporaryDirectory() as run:
            valued_model, _, took = train(
                cfg, data.X, data.Y, data.val, seed, steps, rule, Path(run)
            )
            visits, book = np.load(Path(run, "ledger.npy")), np.load(Path(run, "books.npy"))
        measured = book[np.isfinite(book["residual"][:, 0])]
        drop = float((measured["before"] - measured["after"]).sum())
        books = dict(
            data=float(measured["data"].sum() / drop),
            accounted=1 - float(measured["residual"].sum() / drop),
        )
        variants = in_run_variants(cfg, visits, data.Y)
        found[f"in-run {rule}"] = dict(values=variants["all epochs"], seconds=took - plain, **books)
        rows += [
            dict(kind="variant", name=name, rule=rule, auroc=auroc(v, data.wrong))
            for name, v in variants.items()
        ]
        for epoch in range(1, len(visits) // n + 1):
            some = visits[: epoch * n]
            rows.append(
                dict(
                    kind="epoch",
                    rule=rule,
                    epoch=epoch,
                    auroc=auroc(summed(some, n, some["value"][:, 0].astype(float)), data.wrong),
                )
            )
    with torch.no_grad():
        features = [model[:-1](torch.from_numpy(x)).numpy() for x in (data.X, data.val[0])]
    library("dattri.algorithm")  # its import is nobody's cost
    timed(
        "KNN-Shapley, features", lambda: knn_shapley(features[0], data.Y, features[1], data.val[1])
    )
    timed("TracIn, 10 checkpoints", lambda: tracin(cfg, data, model, checkpoints))
    timed("TracIn, last checkpoint", lambda: tracin(cfg, data, model, checkpoints[-1:]))
    timed(
        "influence, all weights (CG)",
        lambda: influence(cfg, data, model, checkpoints[-1], max_iter=20, regularization=DAMPING),
    )
    last = [name for name, _ in model.named_parameters()][-2:]  # weight and bias
    timed(
        "influence, last layer",
        lambda: influence(cfg, data, model, checkpoints[-1], layer_name=last, regularization=0.01),
    )
    timed("training loss, last", lambda: -example_losses(model, data.X, data.Y))
    found["training loss, mean of the run"] = dict(
        values=-summed(visits, n, visits["loss"].astype(float)), seconds=0.0
    )
    with torch.no_grad():
        accuracy = float(
            (model(torch.from_numpy(data.test[0])).argmax(1).numpy() == data.test[1]).mean()
        )
    moved = max(
        float((a - b).norm() / a.norm())
        for a, b in zip(model.state_dict().values(), valued_model.state_dict().values())
    )
    about = dict(all=accuracy, train_seconds=plain, steps=len(visits) // cfg.batch, moved=moved)
    low = int(measured["step"][measured["before"][:, 0].argmin()])  # steps taken until then
    return {name: of | about for name, of in found.items()}, rows, max(low, n // cfg.batch)


def one_seed(cfg, seed):
    """A row a method, with kind "method"; and rows of in-run variants and of the AUROC epoch by epoch."""
    torch.set_num_threads(1)
    data, n, rng = draw(cfg, seed), cfg.train, np.random.default_rng(seed + 10**6)
    found, rows, low = of_training(cfg, data, seed)
    early, _, _ = of_training(cfg, data, seed, low)
    found |= {name + STOPPED: of for name, of in early.items()}
    flat, flat_val = data.X.reshape(n, -1), data.val[0].reshape(cfg.val, -1)
    for name, work in {
        "KNN-Shapley, pixels": lambda: knn_shapley(flat, data.Y, flat_val, data.val[1]),
        "retraining Shapley": lambda: retraining_shapley(cfg, data, seed),
        "empirical influence": lambda: empirical_influence(cfg, data, seed),
        "loss of a model of the validation set": lambda: (
            -example_losses(train(cfg, *data.val, data.val, seed)[0], data.X, data.Y)
        ),
    }.items():
        began = time.process_time()
        found[name] = dict(values=work(), seconds=time.process_time() - began)
    found["random"] = dict(values=rng.random(n))
    found["oracle"] = dict(values=np.where(data.wrong, -1, rng.random(n)))
    values = {
        (name, how): v
        for name, of in found.items()
        for how, v in ((RAW, of["values"]), (BY_LABEL, among_its_label(of.pop("values"), data.Y)))
    }
    accuracy = accuracies(cfg, data, values, seed)
    for (name, how), v in values.items():
        rows.append(
            dict(
                kind="method",
                name=name,
                how=how,
                auroc=auroc(v, data.wrong),
                accuracy=accuracy[name, how],
                **found[name],
            )
        )
    return [dict(seed=seed, **row) for row in rows]


# --- tables and figure -------------------------------------------------------------------


def tables(cfg, rows):
    methods, of_rule = {}, [f"in-run {rule}" for rule in RULES]
    for row in rows:
        if row["kind"] == "method":
            methods.setdefault((row["name"], row["how"]), []).append(row)
    data, seeds = "digits" if cfg.data == "digits" else "Fashion-MNIST", len(methods["random", RAW])
    lines = [
        f"{data}, {cfg.model}: {cfg.train} images, {cfg.wrong:.0%} wrong labels, {seeds} seeds; mean ± standard error. Cost: CPU seconds",
        "",
    ]
    lines[0] += " beyond the training that a method looks at."
    head = [
        "method",
        "AUROC of wrong labels",
        *(f"accuracy, best {fraction} %" for fraction in FRACTIONS),
        "cost, s",
    ]

    def line(name, how):
        of = methods[name, how]
        cells = [
            shown([row["auroc"] for row in of]),
            *(shown([row["accuracy"][str(fraction)] for row in of]) for fraction in FRACTIONS),
        ]
        return [
            name,
            *(
                ["-", *cells[1:], "-"]
                if name in ("random", "oracle")
                else [*cells, shown([row["seconds"] for row in of], 1)]
            ),
        ]

    for how in (RAW, BY_LABEL):
        for end, title in (
            ("", f"a training of {cfg.epochs} epochs"),
            (STOPPED, "a training that stops where the validation loss is lowest"),
        ):
            of = methods["in-run adamw2" + end, how]
            lines += [f"### By {how}: {title}", ""]
            lines += [f"{shown([row['steps'] for row in of], 0)} steps, accuracy {shown([row['all'] for row in of])}, "
                      f"{shown([row['train_seconds'] for row in of], 1)} CPU seconds.", ""]  # fmt: skip
            lines += [*markdown(head, [line(name + end, how) for name in OF_A_TRAINING]), ""]
        lines += [
            f"### By {how}: without that training",
            "",
            *markdown(head, [line(name, how) for name in (*OF_NONE, "random", "oracle")]),
            "",
        ]
    lines += [
        "### AUROC of the best in-run rule less each other's, seed by seed (positive: in-run is better)",
        "",
    ]
    columns = {(how, end): max(of_rule, key=lambda name: mean_se([row["auroc"] for row in methods[name + end, how]])[0]) for how in (RAW, BY_LABEL)
               for end in ("", STOPPED)}  # fmt: skip

    def less(name, how, end):
        other, mine = (
            methods[name + end * (name in OF_A_TRAINING), how],
            methods[columns[how, end] + end, how],
        )
        return (
            shown([a["auroc"] - b["auroc"] for a, b in zip(mine, other)])
            if mine is not other
            else "-"
        )

    titles = [
        f"{rule}{end}, {'by label' if how == BY_LABEL else 'as it is'}"
        for (how, end), rule in columns.items()
    ]
    lines += markdown(
        ["less", *titles],
        [
            [name, *(less(name, *column) for column in columns)]
            for name in (*OF_A_TRAINING, *OF_NONE)
        ],
    )
    lines += ["", f"### Other sums of the same ledger of {cfg.epochs} epochs: AUROC", ""]
    variants = [row for row in rows if row["kind"] == "variant"]
    pick = lambda name, rule: [
        row["auroc"] for row in variants if (row["name"], row["rule"]) == (name, rule)
    ]
    names = dict.fromkeys(row["name"] for row in variants)
    lines += markdown(
        ["sum of", *RULES], [[name, *(shown(pick(name, rule)) for rule in RULES)] for name in names]
    )
    lines += ["", "### The books: share of the measured drop of the validation loss", ""]
    booked = {name + end: methods[name + end, RAW] for end in ("", STOPPED) for name in of_rule}
    figures = lambda of: [shown([row[key] for row in of], 2) for key in ("data", "accounted")]
    lines += markdown(
        ["rule", "data", "accounted for"], [[name, *figures(of)] for name, of in booked.items()]
    )
    moved = max(row["moved"] for row in methods["in-run adamw2", RAW])
    lines += [
        "",
        f"Weights of the `adamw2` run against the plain one: relative difference {moved:.0e} at most.",
        "",
    ]
    lines += [
        "### Theirs (CIFAR-10, pretrained ResNet18, 1000 images, 3 runs; arXiv 2406.11011), not ours",
        "",
    ]
    return lines + markdown(
        head[:-1],
        [
            [name, *("-" if x is None else f"{x:.3f}" for x in theirs)]
            for name, theirs in THEIRS.items()
        ],
    )


def figure(cfg, rows, path):
    """Left: what AUROC costs. Right: the in-run AUROC after each epoch."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 3, figsize=(16, 5.4), width_ratios=(1.2, 1.2, 1))
    for ax, end, title in zip(
        axes, ("", STOPPED), (f"{cfg.epochs} epochs", "stopped at the lowest validation loss")
    ):
        for i, name in enumerate((*OF_A_TRAINING, *OF_NONE)):
            of = [
                row
                for row in rows
                if row["kind"] == "method"
                and (row["name"], row["how"]) == (name + end * (name in OF_A_TRAINING), RAW)
            ]
            (y, error), x = (
                mean_se([row["auroc"] for row in of]),
                max(0.01, float(np.median([row["seconds"] for row in of]))),
            )
            ax.errorbar(
                x,
                y,
                error,
                fmt="s" if name.startswith("in-run") else "o^"[i % 2],
                color=f"C{i % 10}",
                capsize=2,
                label=name,
            )
        ax.set(
            xscale="log",
            xlabel="CPU seconds beyond the training",
            ylabel="AUROC of wrong labels",
            title=title,
            ylim=(0.45, 1.0),
        )
        ax.grid(alpha=0.3)
    for i, rule in enumerate(RULES):
        of = [row for row in rows if row["kind"] == "epoch" and row["rule"] == rule]
        epochs = sorted({row["epoch"] for row in of})
        means, errors = np.array(
            [mean_se([row["auroc"] for row in of if row["epoch"] == e]) for e in epochs]
        ).T
        axes[2].plot(epochs, means, color=f"C{i}")
        axes[2].fill_between(epochs, means - errors, means + errors, color=f"C{i}", alpha=0.2)
    axes[2].set(xlabel="epochs summed", title="the in-run sum so far", ylim=(0.45, 1.0))
    axes[2].grid(alpha=0.3)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=5, fontsize=9)
    fig.tight_layout(rect=(0, 0.14, 1, 1))
    fig.savefig(path, dpi=110)


def main(cfg):
    if cfg.part == "all":
        (
            images(cfg),
            library("dattri.task"),
            library("sklearn"),
        )  # what is missing is said before anything runs
        out = begin(cfg)
        rows = side_by_side(
            one_seed,
            [(cfg, int(seed)) for seed in cfg.seeds.split(",")],
            out / "rows.jsonl",
            cfg.workers,
        )
    else:
        out = Path(cfg.out)
        rows = read_rows(out / "rows.jsonl")
    rows.sort(key=lambda row: row["seed"])
    finish(out, tables(cfg, rows))
    figure(cfg, rows, out / "mislabeled.png")


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
