"""
Which of 1,000 images are mislabeled? In-run values beside what else one could pay for, each with
its price.

    python experiments/mislabeled.py                  Fashion-MNIST, from Debian's package:
                                                      apt-get install dataset-fashion-mnist
    python experiments/mislabeled.py --data=digits    scikit-learn's digits, no download
    python experiments/mislabeled.py --quick          the whole experiment, tiny, on digits
    python experiments/mislabeled.py --part=report --out=...

Claim: values computed in the training run itself find wrong labels as well as methods that cost as
much, and retraining on the best images loses little. Place: the classification table of "Data
Shapley in One Training Run" (CIFAR-10 and a pretrained ResNet18 there; a small model from scratch
here, by AdamW 1e-3, decay 1e-4, batch 64, 50 epochs, label smoothing .1). A tenth of the labels is
wrong, another class at random.

AUROC: of a wrong label standing below a right one. Accuracy: on test images, after training anew,
with the same options, on the best 20 to 80 %. Cost: CPU seconds on one thread beyond the one
training that every method may use (its checkpoints, its last model). The tables have it twice, of
all epochs, as the paper, and stopped where the validation loss was lowest. Each method is also
judged by the ranks of its values among the images of the same label, for a label that the target
asks for lifts all of its images.

Hindsight takes the same steps again and says what each visit did for the validation loss at their
end (shapley/hindsight.py); `smoothed` is the score of --target_smoothing.

In-run values are summed over the run. Their target at each step is the whole clean validation set,
which KNN-Shapley, TracIn, influence functions and the retraining methods look at too. TracIn and
influence functions come from dattri (pip install -r requirements-experiments.txt). KNN-Shapley is
written out here, for dattri's, which gives the same, loops in Python. Retraining Shapley:
permutations cut into blocks whose examples share the block's gain. Empirical influence: random
halves with and without the example. Both train --retrainings models for a tenth of the epochs, many
at once, and look at the validation loss.

Expected (results/mislabeled, four seeds): in-run AUROC .75, as TracIn and last-layer influence at
the price of several trainings, far above retraining (.52, .67), behind KNN-Shapley (.88 to .95) and
the mean training loss of the run (.97), which cost next to nothing; .85 (`sgd`) and .81 (`adamw2`)
where the training stops at its lowest validation loss. Hindsight .58 and .74, smoothed .78 and .79.
Keeping 80 % by value: accuracy .755 where all images give .730.
Writes rows.jsonl, table.md, mislabeled.png. Four seeds (images, flips, weights). A core: 10 minutes
(--workers=2: 5), --quick 30 seconds.
"""

import contextlib
import gzip
import importlib
import io
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
    column,
    curve,
    finish,
    markdown,
    mean_se,
    numbers,
    pyplot,
    read_rows,
    save_figure,
    select,
    set_options,
    shown,
    side_by_side,
)
from shapley import hindsight
from shapley.replay import Training
from shapley.wrap import Examples, Net
from system.errors import UserError
from system.writer import Writer
from valuation import NoValuation, Settings, Valuation

PACKAGE = "/usr/share/datasets/fashion-mnist"
FRACTIONS = (20, 40, 60, 80)
# Of the Hessian: of .01, .03, .1, .3 and 1 the only one where conjugate gradients met no negative
# curvature and converged.
DAMPING = 1.0
RULES = ("sgd", "adamw", "adamw2")
IN_RUN = tuple(f"in-run {rule}" for rule in RULES)
STOPPED = ", stopped"  # ends the name of a method that looks at the training that stops early
RAW = "the values as they are"
BY_LABEL = "their ranks among the images of the same label"
SMOOTHED = "in-run adamw2, smoothed"
HINDSIGHT = "hindsight"
OF_A_TRAINING = (  # methods that look at a training, or at what it leaves
    *IN_RUN,
    SMOOTHED,
    HINDSIGHT,
    "KNN-Shapley, features",
    "TracIn, 10 checkpoints",
    "TracIn, last checkpoint",
    "influence, all weights (CG)",
    "influence, last layer",
    "training loss, last",
    "training loss, mean of the run",
)
OF_NONE = (  # methods that do not
    "KNN-Shapley, pixels",
    "retraining Shapley",
    "empirical influence",
    "loss of a model of the validation set",
)
THEIRS = (  # the paper's table: method, AUROC, accuracy by fraction
    ("random", None, 0.350, 0.461, 0.525, 0.559),
    ("retraining Shapley", 0.582, 0.317, 0.468, 0.527, 0.570),
    ("empirical influence", 0.552, 0.342, 0.466, 0.530, 0.568),
    ("KNN-Shapley, features", 0.760, 0.354, 0.478, 0.525, 0.563),
    ("influence", 0.654, 0.320, 0.450, 0.530, 0.580),
    ("in-run, 1st order", 0.678, 0.344, 0.472, 0.541, 0.580),
    ("in-run, 2nd order", 0.680, 0.342, 0.473, 0.544, 0.580),
)
QUICK = {
    "data": "digits",
    "seeds": "1,2",
    "workers": 2,
    "train": 300,
    "val": 200,
    "epochs": 10,
    "retrainings": 40,
}


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
    target_smoothing: float = 0.9  # over steps, of the target's gradient
    retrainings: int = 200  # of each retraining method
    blocks: int = 20  # of a permutation of retraining Shapley
    workers: int = 1
    quick: bool = False  # tiny, on digits
    part: Literal["all", "report"] = "all"

    def __post_init__(self):
        if self.quick:
            set_options(self, QUICK)


def library(name):
    """A module that not everybody has. Raises UserError where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        cure = "pip install -r requirements-experiments.txt"
        raise UserError(f"{name} is missing ({e}): {cure}") from e


# --- images ---------------------------------------------------------------------


@dataclass
class Data:
    X: np.ndarray  # float32 (n, 1, height, width): the images to be valued
    Y: np.ndarray  # int64 (n,): their labels
    wrong: np.ndarray  # bool (n,): which labels are wrong
    val: tuple  # (X, Y), clean
    test: tuple  # (X, Y), clean


def read_idx(cfg, name, skip):
    """The bytes of one of Fashion-MNIST's files after its header. Raises UserError without it."""
    path = Path(cfg.data, f"{name}-ubyte")
    packed = path.with_name(path.name + ".gz")
    if path.is_file():
        raw = path.read_bytes()
    elif packed.is_file():
        raw = gzip.decompress(packed.read_bytes())
    else:
        raise UserError(
            f"no {path.name}[.gz] in {cfg.data}: apt-get install dataset-fashion-mnist, "
            "or write --data=<its folder> or digits"
        )
    return np.frombuffer(raw, np.uint8, offset=skip)


def images(cfg):
    """Two pools [(X, Y), ...], X uint8 (n, 1, height, width), Y (n,): to draw train and validation
    images from, and test images. There may be but one."""
    if cfg.data == "digits":
        digits = library("sklearn.datasets").load_digits()
        return [((digits.images[:, None] * 15.9).astype(np.uint8), digits.target)]
    pools = []
    for pool in ("train", "t10k"):
        X = read_idx(cfg, f"{pool}-images-idx3", 16).reshape(-1, 1, 28, 28)
        pools.append((X, read_idx(cfg, f"{pool}-labels-idx1", 8)))
    return pools


def draw(cfg, seed):
    """The Data of a seed."""
    rng = np.random.default_rng(seed)
    pools = images(cfg)
    X, Y = pools[0]
    if cfg.train + cfg.val >= len(X):
        asked = f"--train={cfg.train} and --val={cfg.val}"
        raise UserError(f"{asked} leave nothing of {len(X)} images: make them smaller")
    order = rng.permutation(len(X))
    train, val, rest = np.split(order, [cfg.train, cfg.train + cfg.val])
    test_X, test_Y = pools[1] if len(pools) > 1 else (X[rest], Y[rest])
    test = rng.permutation(len(test_X))[: cfg.test]
    mean = X[train].mean()
    std = X[train].std()

    def scaled(x):
        return ((x - mean) / std).astype(np.float32)

    wrong = np.zeros(cfg.train, bool)
    wrong[rng.choice(cfg.train, round(cfg.wrong * cfg.train), replace=False)] = True
    noisy = Y[train].astype(np.int64)
    noisy[wrong] = (noisy[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    return Data(
        X=scaled(X[train]),
        Y=noisy,
        wrong=wrong,
        val=(scaled(X[val]), Y[val].astype(np.int64)),
        test=(scaled(test_X[test]), test_Y[test].astype(np.int64)),
    )


# --- training ---------------------------------------------------------------------


def build(cfg, pixels, seed):
    """The model, with the first weights of a seed, for images of pixels x pixels."""
    torch.manual_seed(seed)
    last = [nn.LayerNorm(cfg.hidden), nn.GELU(), nn.Linear(cfg.hidden, 10)]
    if cfg.model == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels**2, cfg.hidden), *last)
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(16, cfg.hidden, kernel_size=3, stride=2, padding=1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        *last,
    )


def loss_function(cfg):
    return partial(F.cross_entropy, label_smoothing=cfg.smoothing)


def build_optimizer(cfg, params):
    return torch.optim.AdamW(params, cfg.learning_rate, weight_decay=cfg.weight_decay)


def build_valuation(cfg, net, optimizer, val, rule, n, folder):
    """Values n images by the loss on all of val. rule "off": none of its calls does anything."""
    if rule == "off":
        return NoValuation()

    def compute_loss(x, y, ledger=None):
        return net(x, y, ledger)[1]

    settings = Settings(
        rule=rule,
        batch=cfg.batch,
        target_batch=cfg.val,
        target_sampling="fixed",
        book_interval=10,
        target_smoothing=cfg.target_smoothing,
    )
    target = Examples("validation", *val)
    writer = Writer(folder, n, smoothed=cfg.target_smoothing > 0)
    return Valuation(net, optimizer, compute_loss, [target], settings, writer)


def train(cfg, X, Y, val, seed, steps=0, rule="off", folder=None):
    """One training, of cfg.epochs or of so many steps. With a rule, folder gets the run's files.

    Returns the model, ten checkpoints (its state_dicts), and CPU seconds.
    """
    net = Net(build(cfg, X.shape[-1], seed), loss_function(cfg))
    optimizer = build_optimizer(cfg, net.parameters())
    valuation = build_valuation(cfg, net, optimizer, val, rule, len(X), folder)
    steps = steps or cfg.epochs * len(X) // cfg.batch
    checkpoints = []
    began = time.process_time()
    for step in range(steps):
        ids = global_batch(step, cfg.batch, len(X), seed)
        x = torch.from_numpy(X[ids])
        y = torch.from_numpy(Y[ids])
        valuation.begin_step(step, cfg.learning_rate)
        ledger = valuation.new_ledger(ids, x, y)
        net(x, y, ledger)[1].backward()
        valuation.before_update()
        optimizer.step()
        optimizer.zero_grad()
        valuation.end_step()
        if (step + 1) * 10 // steps > step * 10 // steps:
            weights = net.model.state_dict()
            checkpoints.append({name: p.detach().clone() for name, p in weights.items()})
    valuation.commit()
    return net.model, checkpoints, time.process_time() - began


def look_back(cfg, data, seed, steps):
    """What each image's visits did for the validation loss at the end of the same training; those
    of early steps do not count."""
    model = build(cfg, data.X.shape[-1], seed)
    criterion = partial(loss_function(cfg), reduction="none")

    def losses(X, Y):
        return criterion(model(torch.from_numpy(X)).double(), torch.from_numpy(Y))

    def batch(step):
        ids = global_batch(step, cfg.batch, len(data.X), seed)
        return ids, data.X[ids], data.Y[ids]

    optimizer = build_optimizer(cfg, model.parameters())
    training = Training(model, optimizer, losses, batch, lambda step: cfg.learning_rate, cfg.batch)
    past = [training.record(step) for step in range(steps)]
    gradient = torch.autograd.grad(losses(*data.val).mean(), training.weights.params)
    adjoint = hindsight.Adjoint.of_end(gradient, has_moments=True)
    norms = np.zeros(steps)
    values = np.zeros((steps, cfg.batch))
    for step in reversed(past):
        norms[step.number] = adjoint.norm()
        values[step.number] = hindsight.back(training, step, adjoint)
    values[hindsight.early(norms[:, None])[:, 0]] = 0
    ids = np.concatenate([step.ids for step in past])
    return np.bincount(ids, values.ravel(), len(data.X))


def order_of(ids, steps, batch, rng):
    """Epoch after epoch, each a permutation of ids: (steps, batch)."""
    epochs = -(-steps * batch // len(ids))
    order = np.concatenate([ids[rng.permutation(len(ids))] for _ in range(epochs)])
    return order[: steps * batch].reshape(steps, batch)


def train_many(cfg, X, Y, subsets, steps, seed, together=32):
    """Trains a model for each subset of the images, `together` at a time, from the same first
    weights. Yields functions X -> logits (models, n, 10)."""
    X = torch.from_numpy(X)
    Y = torch.from_numpy(Y)
    for start in range(0, len(subsets), together):
        group = subsets[start : start + together]
        model = build(cfg, X.shape[-1], seed)
        rng = np.random.default_rng(seed)
        orders = np.stack([order_of(ids, steps, cfg.batch, rng) for ids in group], 1)
        params = {}
        for name, p in model.named_parameters():
            params[name] = p.detach().expand(len(group), *p.shape).clone().requires_grad_()
        optimizer = build_optimizer(cfg, params.values())
        apply = torch.func.vmap(partial(torch.func.functional_call, model))
        for ids in torch.from_numpy(orders):
            logits = apply(params, X[ids])
            mean_loss = loss_function(cfg)(logits.flatten(0, 1), Y[ids].flatten())
            (mean_loss * len(group)).backward()  # each model's own mean loss, summed
            optimizer.step()
            optimizer.zero_grad()
        yield partial(predict, apply, params, len(group))


@torch.no_grad()
def predict(apply, params, models, x):
    return apply(params, torch.from_numpy(x).expand(models, *x.shape))


# --- the methods: values (n,), the larger the better ---------------------------------


def knn_shapley(x, y, val_x, val_y, K=5):
    """Exact Shapley values of the K-nearest-neighbour classifier (Jia et al., 2019), by their
    recursion from the farthest point on."""
    order = torch.cdist(torch.as_tensor(val_x), torch.as_tensor(x)).argsort(1).numpy()
    n = len(x)
    match = (y[order] == val_y[:, None]).astype(float)
    ranks = np.arange(1, n)
    steps = (match[:, :-1] - match[:, 1:]) / K * np.minimum(K, ranks) / ranks
    to_the_farthest = np.cumsum(steps[:, ::-1], 1)[:, ::-1]
    farthest = np.zeros((len(order), 1))
    sorted_values = np.concatenate([to_the_farthest, farthest], 1) + match[:, -1:] / n
    values = np.zeros_like(sorted_values)
    np.put_along_axis(values, order, sorted_values, 1)
    return values.mean(0)


def attribution(cfg, data, model, checkpoints):
    """dattri's task and loaders: every training image, and the validation set as one example whose
    loss is its mean."""
    shape = data.X.shape[1:]

    def loss(params, batch):
        x, y = batch
        logits = torch.func.functional_call(model, params, x.reshape(-1, *shape))
        return loss_function(cfg)(logits, y.reshape(-1))

    val_X, val_Y = data.val
    rows = torch.utils.data.TensorDataset(torch.from_numpy(data.X), torch.from_numpy(data.Y))
    target = torch.utils.data.TensorDataset(
        torch.from_numpy(val_X)[None], torch.from_numpy(val_Y)[None]
    )
    task = library("dattri.task").AttributionTask(loss, model, checkpoints)
    row_loader = torch.utils.data.DataLoader(rows, batch_size=len(rows))
    return task, row_loader, torch.utils.data.DataLoader(target, batch_size=1)


def tracin(cfg, data, model, checkpoints):
    task, rows, target = attribution(cfg, data, model, checkpoints)
    rates = torch.full((len(checkpoints),), cfg.learning_rate)
    attributor = library("dattri.algorithm").TracInAttributor(task, rates, normalized_grad=False)
    attributor.projector_kwargs = None  # or gradients are projected to 512 dimensions
    return attributor.attribute(rows, target)[:, 0].numpy()


def influence(cfg, data, model, checkpoint, **options):
    """Positive: leaving the image out would raise the validation loss."""
    task, rows, target = attribution(cfg, data, model, [checkpoint])
    algorithm = library("dattri.algorithm")
    if "layer_name" in options:
        attributor = algorithm.IFAttributorExplicit(task, **options)
    else:
        attributor = algorithm.IFAttributorCG(task, **options)
    attributor.cache(rows)
    return attributor.attribute(rows, target)[:, 0].detach().numpy()


def utilities(cfg, data, subsets, seed):
    """How far a short training on each subset brings the validation loss down: (subsets,)."""
    x, y = data.val
    y = torch.from_numpy(y)
    loss = loss_function(cfg)
    steps = max(1, cfg.epochs * cfg.train // cfg.batch // 10)
    losses = []
    for predict_group in train_many(cfg, data.X, data.Y, subsets, steps, seed):
        for logits in predict_group(x):
            losses.append(float(loss(logits, y)))
    with torch.no_grad():
        untrained = float(loss(build(cfg, x.shape[-1], seed)(torch.from_numpy(x)), y))
    return untrained - np.array(losses)


def retraining_shapley(cfg, data, seed):
    rng = np.random.default_rng(seed)
    n = cfg.train
    orders = [rng.permutation(n) for _ in range(cfg.retrainings // cfg.blocks)]
    ends = np.arange(1, cfg.blocks + 1) * n // cfg.blocks
    subsets = []
    for order in orders:
        subsets += [order[:end] for end in ends]
    gains = utilities(cfg, data, subsets, seed).reshape(len(orders), cfg.blocks)
    sizes = np.diff(ends, prepend=0)
    values = np.zeros(n)
    for order, gain in zip(orders, np.diff(gains, axis=1, prepend=0)):
        values[order] += np.repeat(gain / sizes, sizes)
    return values / len(orders)


def empirical_influence(cfg, data, seed):
    rng = np.random.default_rng(seed)
    n = cfg.train
    inside = np.stack([rng.permutation(n) < n // 2 for _ in range(cfg.retrainings)])
    gains = utilities(cfg, data, [np.flatnonzero(row) for row in inside], seed)
    return (gains @ inside) / inside.sum(0) - (gains @ ~inside) / (~inside).sum(0)


@torch.no_grad()
def low_loss(model, X, Y):
    """Minus a model's loss on each example."""
    logits = model(torch.from_numpy(X))
    return -F.cross_entropy(logits, torch.from_numpy(Y), reduction="none").numpy()


def low_loss_of_val_model(cfg, data, seed):
    model, _, _ = train(cfg, *data.val, data.val, seed)
    return low_loss(model, data.X, data.Y)


# --- values and how they are judged ---------------------------------------------------


def auroc(values, wrong):
    """The chance that a wrong label stands below a right one; equal values count half."""
    right = values[~wrong]
    below = values[wrong][:, None] < right
    equal = values[wrong][:, None] == right
    return float((below + 0.5 * equal).mean())


def summed(visits, n, weights):
    """The sum of each image's weights (visits,) over its visits: (n,)."""
    values = np.zeros(n)
    np.add.at(values, visits["chunk"], weights)
    return values


def in_run_variants(cfg, visits, labels):
    """Other sums of the same ledger: {name: values}. Of every step's values also the rank among
    them, and the share of their absolute sum."""
    v = visits["value"][:, 0].astype(float)
    n = len(labels)
    steps = v.reshape(-1, cfg.batch)
    epoch = np.arange(len(v)) // n
    ranks = (steps.argsort(1).argsort(1) / (cfg.batch - 1) - 0.5).ravel()
    shares = (steps / abs(steps).sum(1, keepdims=True)).ravel()
    half = cfg.epochs // 2
    weights = {"all epochs": v}
    for last in (1, 2, 5, 10, 20):
        weights[f"epochs 1 to {last}"] = v * (epoch < last)
    weights[f"the later half, epochs {half + 1} to {cfg.epochs}"] = v * (epoch >= half)
    weights["ranks within the step"] = ranks
    weights["shares of the step"] = shares
    weights["signs"] = np.sign(v)
    weights["ranks, epochs 1 to 10"] = ranks * (epoch < 10)
    return {name: summed(visits, n, w) for name, w in weights.items()}


def among_its_label(values, labels):
    """Each image's rank among those of its (given) label, from 0 to 1: a label that the target asks
    for lifts all of its images alike."""
    ranks = np.zeros(len(values))
    for label in np.unique(labels):
        same = labels == label
        ranks[same] = values[same].argsort().argsort() / same.sum()
    return ranks


def accuracies(cfg, data, values, seed):
    """values: {key: (n,)}. {key: {fraction: test accuracy after training on the best images}}.

    The models of a fraction are trained all at once.
    """
    accuracy = {key: {} for key in values}
    x, y = data.test
    y = torch.from_numpy(y)
    for fraction in FRACTIONS:
        n = cfg.train * fraction // 100
        subsets = [np.sort(np.argsort(-v, kind="stable")[:n]) for v in values.values()]
        steps = max(1, cfg.epochs * n // cfg.batch)
        scores = []
        for predict_group in train_many(cfg, data.X, data.Y, subsets, steps, seed):
            for logits in predict_group(x):
                scores.append(float((logits.argmax(-1) == y).float().mean()))
        for key, score in zip(values, scores):
            accuracy[key][str(fraction)] = score
    return accuracy


# --- one seed -------------------------------------------------------------------------


def timed(method, *arguments, **options):
    """A method's values and its CPU seconds."""
    began = time.process_time()
    with contextlib.redirect_stderr(io.StringIO()):  # dattri's progress bars
        values = np.asarray(method(*arguments, **options), float)
    return {"values": values, "seconds": time.process_time() - began}


@dataclass
class ValuedRun:
    """A training with valuation."""

    model: nn.Module
    seconds: float
    visits: np.ndarray  # the ledger
    books: np.ndarray  # of the steps that the books measured

    def shares(self):
        """What the data did, and what the books account for, as shares of the loss's drop."""
        drop = float((self.books["before"] - self.books["after"]).sum())
        return {
            "data": float(self.books["data"].sum() / drop),
            "accounted": 1 - float(self.books["residual"].sum() / drop),
        }

    def lowest(self):
        """The steps taken until the validation loss was lowest."""
        return int(self.books["step"][self.books["before"][:, 0].argmin()])


def value(cfg, data, seed, steps, rule):
    """A ValuedRun by a rule."""
    with tempfile.TemporaryDirectory() as folder:
        model, _, seconds = train(cfg, data.X, data.Y, data.val, seed, steps, rule, Path(folder))
        visits = np.load(Path(folder, "ledger.npy"))
        books = np.load(Path(folder, "books.npy"))
    return ValuedRun(model, seconds, visits, books[np.isfinite(books["residual"][:, 0])])


def in_run_rows(cfg, data, rule, visits, variants):
    """Rows of the AUROC of other sums of the ledger, and of its sum after each epoch."""
    n = cfg.train
    rows = []
    for name, values in variants.items():
        area = auroc(values, data.wrong)
        rows.append({"kind": "variant", "name": name, "rule": rule, "auroc": area})
    for epoch in range(1, len(visits) // n + 1):
        so_far = visits[: epoch * n]
        values = summed(so_far, n, so_far["value"][:, 0].astype(float))
        area = auroc(values, data.wrong)
        rows.append({"kind": "epoch", "rule": rule, "epoch": epoch, "auroc": area})
    return rows


def look_at_training(cfg, data, model, checkpoints):
    """{method: values and seconds}, of the methods that look at what a training leaves."""
    with torch.no_grad():
        features = model[:-1](torch.from_numpy(data.X)).numpy()
        val_features = model[:-1](torch.from_numpy(data.val[0])).numpy()
    library("dattri.algorithm")  # its import is nobody's cost
    last = checkpoints[-1]
    last_layer = [name for name, _ in model.named_parameters()][-2:]  # weight and bias
    return {
        "KNN-Shapley, features": timed(knn_shapley, features, data.Y, val_features, data.val[1]),
        "TracIn, 10 checkpoints": timed(tracin, cfg, data, model, checkpoints),
        "TracIn, last checkpoint": timed(tracin, cfg, data, model, [last]),
        "influence, all weights (CG)": timed(
            influence, cfg, data, model, last, max_iter=20, regularization=DAMPING
        ),
        "influence, last layer": timed(
            influence, cfg, data, model, last, layer_name=last_layer, regularization=0.01
        ),
        "training loss, last": timed(low_loss, model, data.X, data.Y),
    }


def distance(model, other):
    """The largest relative difference of a weight."""
    pairs = zip(model.state_dict().values(), other.state_dict().values())
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


def judge_by_training(cfg, data, seed, steps=0):
    """What one training, and what it leaves, says of its images.

    Returns {method: values, seconds, and what is known of the training}; rows of the in-run sums;
    and the steps until the validation loss was lowest, an epoch at least.
    """
    n = cfg.train
    model, checkpoints, seconds = train(cfg, data.X, data.Y, data.val, seed, steps)
    methods = {}
    rows = []
    for rule in RULES:
        run = value(cfg, data, seed, steps, rule)
        variants = in_run_variants(cfg, run.visits, data.Y)
        methods[f"in-run {rule}"] = {
            "values": variants["all epochs"],
            "seconds": run.seconds - seconds,
            **run.shares(),
        }
        rows += in_run_rows(cfg, data, rule, run.visits, variants)
        if SMOOTHED.startswith(f"in-run {rule},"):
            smoothed = summed(run.visits, n, run.visits["smoothed"][:, 0].astype(float))
            methods[SMOOTHED] = {"values": smoothed, "seconds": run.seconds - seconds}
    n_steps = len(run.visits) // cfg.batch
    methods[HINDSIGHT] = timed(look_back, cfg, data, seed, n_steps)
    methods.update(look_at_training(cfg, data, model, checkpoints))
    # the training losses, and what follows, are the last rule's run's: its weights go the same way
    mean_loss = summed(run.visits, n, run.visits["loss"].astype(float))
    methods["training loss, mean of the run"] = {"values": -mean_loss, "seconds": 0.0}
    test_X, test_Y = data.test
    with torch.no_grad():
        right = model(torch.from_numpy(test_X)).argmax(1).numpy() == test_Y
    about = {
        "all": float(right.mean()),
        "train_seconds": seconds,
        "steps": n_steps,
        "moved": distance(model, run.model),
    }
    methods = {name: {**method, **about} for name, method in methods.items()}
    return methods, rows, max(run.lowest(), n // cfg.batch)


def judge_without_training(cfg, data, seed):
    """{method: values and seconds}, of the methods that look at no training."""
    flat = data.X.reshape(cfg.train, -1)
    val_flat = data.val[0].reshape(cfg.val, -1)
    return {
        "KNN-Shapley, pixels": timed(knn_shapley, flat, data.Y, val_flat, data.val[1]),
        "retraining Shapley": timed(retraining_shapley, cfg, data, seed),
        "empirical influence": timed(empirical_influence, cfg, data, seed),
        "loss of a model of the validation set": timed(low_loss_of_val_model, cfg, data, seed),
    }


def one_seed(cfg, seed):
    """A row a method and how its values are looked at, with kind "method"; and rows of in-run
    variants and of the AUROC epoch by epoch."""
    torch.set_num_threads(1)
    data = draw(cfg, seed)
    rng = np.random.default_rng(seed + 10**6)
    methods, rows, lowest = judge_by_training(cfg, data, seed)
    stopped, _, _ = judge_by_training(cfg, data, seed, lowest)
    for name, method in stopped.items():
        methods[name + STOPPED] = method
    methods.update(judge_without_training(cfg, data, seed))
    methods["random"] = {"values": rng.random(cfg.train)}
    methods["oracle"] = {"values": np.where(data.wrong, -1, rng.random(cfg.train))}
    values = {}
    for name, method in methods.items():
        values[name, RAW] = method.pop("values")
        values[name, BY_LABEL] = among_its_label(values[name, RAW], data.Y)
    accuracy = accuracies(cfg, data, values, seed)
    for (name, how), v in values.items():
        rows.append(
            {
                "kind": "method",
                "name": name,
                "how": how,
                "auroc": auroc(v, data.wrong),
                "accuracy": accuracy[name, how],
                **methods[name],
            }
        )
    return [{"seed": seed, **row} for row in rows]


# --- tables -----------------------------------------------------------------------------

ENDS = {  # of a method's name -> the training that it looks at
    "": "a training of {epochs} epochs",
    STOPPED: "a training that stops where the validation loss is lowest",
}


def full_name(method, end):
    """Of a method, for one of the two trainings if it looks at one."""
    return method + end if method in OF_A_TRAINING else method


def by_method(rows):
    """{(method, how): its rows, one a seed}."""
    methods = {}
    for row in select(rows, kind="method"):
        methods.setdefault((row["name"], row["how"]), []).append(row)
    return methods


def accuracy_of(rows, fraction):
    return column(column(rows, "accuracy"), str(fraction))


def method_line(name, rows):
    known = name not in ("random", "oracle")  # which have no AUROC to speak of and no cost
    line = [name, shown(column(rows, "auroc")) if known else "-"]
    for fraction in FRACTIONS:
        line.append(shown(accuracy_of(rows, fraction)))
    line.append(shown(column(rows, "seconds"), 1) if known else "-")
    return line


def method_table(methods, how, names):
    head = ["method", "AUROC of wrong labels"]
    head += [f"accuracy, best {fraction} %" for fraction in FRACTIONS]
    lines = [method_line(name, methods[name, how]) for name in names]
    return markdown([*head, "cost, s"], lines)


def method_tables(cfg, methods, how):
    """All methods, by their values or by ranks within a label."""
    lines = []
    for end, title in ENDS.items():
        rows = methods["in-run adamw2" + end, how]
        lines += [f"### By {how}: {title.format(epochs=cfg.epochs)}", ""]
        steps = shown(column(rows, "steps"), 0)
        seconds = shown(column(rows, "train_seconds"), 1)
        accuracy = shown(column(rows, "all"))
        lines += [f"{steps} steps, accuracy {accuracy}, {seconds} CPU seconds.", ""]
        lines += method_table(methods, how, [name + end for name in OF_A_TRAINING])
        lines.append("")
    lines += [f"### By {how}: without that training", ""]
    lines += [*method_table(methods, how, (*OF_NONE, "random", "oracle")), ""]
    return lines


def less_table(methods):
    """AUROC of the best in-run rule less each other's, a column for each way to look at values and
    each training."""
    titles = []
    cells = {name: [] for name in (*OF_A_TRAINING, *OF_NONE)}
    for how in (RAW, BY_LABEL):
        for end in ENDS:
            of_rules = {name: column(methods[name + end, how], "auroc") for name in IN_RUN}
            means = {name: np.mean(areas) for name, areas in of_rules.items()}
            best = max(means, key=means.get)
            titles.append(f"{best}{end}, {'by label' if how == BY_LABEL else 'as it is'}")
            for name, line in cells.items():
                other = column(methods[full_name(name, end), how], "auroc")
                gaps = np.subtract(of_rules[best], other)
                line.append("-" if name == best else shown(gaps))
    return markdown(["less", *titles], [[name, *line] for name, line in cells.items()])


def variant_table(rows):
    variants = select(rows, kind="variant")
    lines = []
    for name in dict.fromkeys(column(variants, "name")):
        of_variant = select(variants, name=name)
        line = [shown(column(select(of_variant, rule=rule), "auroc")) for rule in RULES]
        lines.append([name, *line])
    return markdown(["sum of", *RULES], lines)


def book_table(methods):
    lines = []
    for end in ENDS:
        for name in IN_RUN:
            rows = methods[name + end, RAW]
            shares = [shown(column(rows, key), 2) for key in ("data", "accounted")]
            lines.append([name + end, *shares])
    return markdown(["rule", "data", "accounted for"], lines)


def their_table():
    head = ["method", "AUROC of wrong labels"]
    head += [f"accuracy, best {fraction} %" for fraction in FRACTIONS]
    lines = []
    for name, *figures in THEIRS:
        lines.append([name, *("-" if x is None else f"{x:.3f}" for x in figures)])
    return markdown(head, lines)


def tables(cfg, rows):
    methods = by_method(rows)
    images_of = "digits" if cfg.data == "digits" else "Fashion-MNIST"
    seeds = len(methods["random", RAW])
    moved = max(column(methods["in-run adamw2", RAW], "moved"))
    return [
        f"{images_of}, {cfg.model}: {cfg.train} images, {cfg.wrong:.0%} wrong labels, {seeds} "
        "seeds; mean ± standard error. Cost: CPU seconds beyond the training that a method looks "
        "at.",
        "",
        *method_tables(cfg, methods, RAW),
        *method_tables(cfg, methods, BY_LABEL),
        "### AUROC of the best in-run rule less each other's, seed by seed "
        "(positive: in-run is better)",
        "",
        *less_table(methods),
        "",
        f"### Other sums of the same ledger of {cfg.epochs} epochs: AUROC",
        "",
        *variant_table(rows),
        "",
        "### The books: share of the measured drop of the validation loss",
        "",
        *book_table(methods),
        "",
        "Weights of the `adamw2` run against the plain one: relative difference "
        f"{moved:.0e} at most.",
        "",
        "### Theirs (CIFAR-10, pretrained ResNet18, 1000 images, 3 runs; arXiv 2406.11011), "
        "not ours",
        "",
        *their_table(),
    ]


# --- figure -----------------------------------------------------------------------------


def draw_costs(ax, methods, end):
    """What AUROC costs: a point a method."""
    for i, name in enumerate((*OF_A_TRAINING, *OF_NONE)):
        rows = methods[full_name(name, end), RAW]
        mean, error = mean_se(column(rows, "auroc"))
        ax.errorbar(
            max(0.01, float(np.median(column(rows, "seconds")))),
            mean,
            error,
            fmt="s" if name in IN_RUN else "o^"[i % 2],
            color=f"C{i % 10}",
            capsize=2,
            label=name,
        )
    ax.set(
        xscale="log",
        xlabel="CPU seconds beyond the training",
        ylabel="AUROC of wrong labels",
        ylim=(0.45, 1.0),
    )
    ax.grid(alpha=0.3)


def draw_epochs(ax, rows):
    """The in-run AUROC after each epoch."""
    for i, rule in enumerate(RULES):
        of_rule = select(rows, kind="epoch", rule=rule)
        epochs = sorted(set(column(of_rule, "epoch")))
        mean, error = curve([column(select(of_rule, epoch=e), "auroc") for e in epochs])
        ax.plot(epochs, mean, color=f"C{i}")
        ax.fill_between(epochs, mean - error, mean + error, color=f"C{i}", alpha=0.2)
    ax.set(xlabel="epochs summed", title="the in-run sum so far", ylim=(0.45, 1.0))
    ax.grid(alpha=0.3)


def figure(cfg, rows, path):
    """Left: what AUROC costs. Right: the in-run AUROC after each epoch."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 3, figsize=(16, 5.4), width_ratios=(1.2, 1.2, 1))
    methods = by_method(rows)
    draw_costs(axes[0], methods, "")
    axes[0].set_title(f"{cfg.epochs} epochs")
    draw_costs(axes[1], methods, STOPPED)
    axes[1].set_title("stopped at the lowest validation loss")
    draw_epochs(axes[2], rows)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncols=5, fontsize=9)
    save_figure(fig, path, rect=(0, 0.14, 1, 1))


def main(cfg):
    out = Path(cfg.out)
    if cfg.part == "all":
        # what is missing is said before anything runs
        images(cfg)
        library("dattri.task")
        library("sklearn")
        begin(cfg)
        jobs = [(cfg, seed) for seed in numbers(cfg.seeds, int)]
        side_by_side(one_seed, jobs, out / "rows.jsonl", cfg.workers)
    rows = sorted(read_rows(out / "rows.jsonl"), key=lambda row: row["seed"])
    finish(out, tables(cfg, rows))
    figure(cfg, rows, out / "mislabeled.png")


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
