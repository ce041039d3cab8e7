"""Values for targets that nobody knew of while the run trained, beside the run's own.

    python revalue.py out/demo --targets=mine=notes.txt              walk: each checkpoint stands for the steps around it (approximate)
    python revalue.py out/demo --targets=mine=notes.txt --replay     train again, through the same steps, and value for these targets (exact)
    python revalue.py out/demo --targets=mine=notes.txt --replay --start=500     exact too, from the checkpoint of step 500 on

Leaves out/demo/revalued/mine, which values.py and report.py read as they read a run; its values.json says what is approximate.

A replay is train.py's own loop: the order of chunks and all randomness are functions of the step, so on the same machine the weights go the
same way to the bit, and the ledger's losses are held against the run's to prove it. A walk takes weights and moments from the nearest
checkpoint, learning rate and clip coefficient from the books, --target_batch chunks of a target, and a one-pass rule; more
checkpoints (train.py --keep_checkpoints=20) make it better. It costs a forward and backward of every chunk valued, a replay the training.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import ghost
import ledger
import train
from data import open_dataset, parse_targets
from ops.checkpoints import Checkpoints, find_checkpoints, read_checkpoint
from ops.machine import check_system
from valuation import Valuation

ONE_PASS = {"sgd2": "sgd", "adamw2": "adamw"}  # for a chunk without its batch


@dataclass
class Config:
    run: str = ""  # the run's folder
    targets: str = ""  # as train.py's: val | val:<domain> | <name>=<file.txt>, comma-separated; empty: the run's own
    name: str = ""  # of the folder under <run>/revalued; empty: the targets' names
    replay: bool = False  # train again and be exact, instead of walking the checkpoints
    start: int = 0  # the first step to value; with --replay a checkpoint's
    end: int = 0  # the step after the last; 0: the newest checkpoint's
    target_batch: int = 64  # of a walk: chunks that speak for each target, the same all along
    overwrite: bool = False  # do it again where it was done
    data_dir: str = ""  # where the run's data is now, if it moved
    device: str = ""  # empty: the run's

    def __post_init__(self):
        if self.target_batch < 1:
            raise ValueError(f"--target_batch={self.target_batch}: it must be at least 1")


def revalue(cfg):
    """Values chunks of cfg.run for cfg.targets. Returns the folder that holds them. Raises ValueError and OSError, with what to type."""
    of, options, checkpoints = read(cfg)
    data = open_dataset(options.data_dir, options.keep)
    targets = parse_targets(options.targets, data, options.block_size)
    folder = of / "revalued" / (cfg.name or "+".join(target.name for target in targets).replace("/", "-"))
    end = cfg.end or max(checkpoints)
    if not 0 <= cfg.start < end <= max(checkpoints):
        raise ValueError(
            f"--start={cfg.start} --end={end}: the newest checkpoint is of step {max(checkpoints)}: 0 <= start < end <= {max(checkpoints)}"
        )
    if is_done(folder) and not cfg.overwrite:
        raise ValueError(f"{folder} holds values already: --overwrite makes them again, --name=... puts these elsewhere")
    approximate = (replay if cfg.replay else walk)(cfg, of, options, checkpoints, data, targets, folder, end)
    info = json.loads((folder / "values.json").read_text())
    info |= dict(of=str(of), method="replay" if cfg.replay else "walk", approximate=approximate)
    ledger.write_json(folder / "values.json", info)
    return folder


def read(cfg):
    """-> the run's folder, its train.Config with cfg's targets, {step: path of its checkpoint}."""
    of = Path(cfg.run)
    if not cfg.run or not (of / "config.json").is_file():
        raise ValueError(f"{cfg.run or 'no run given'}: name the folder of a run, as out/<the config's name>")
    options = config.load(train.Config, [str(of / "config.json"), f"--out_dir={of}"])
    if options.rule == "off":
        raise ValueError(f"{of} was trained with --rule=off: train it with another --rule")
    for key in ("targets", "data_dir", "device"):
        setattr(options, key, getattr(cfg, key) or getattr(options, key))
    options.keep = options.keep and str(of / "chunks.npy")
    options.shard = False  # here is one process
    check_system(options)
    newest, *older = find_checkpoints(of) or [None]
    if newest is None:
        raise ValueError(f"{of} has no checkpoint yet: train.py writes one after {min(options.checkpoint_interval, options.max_iters)} steps")
    return of, options, {int(path.stem[5:]): path for path in older} | {read_checkpoint(newest)["iter_num"]: newest}


def is_done(folder):
    return (folder / "values.json").is_file() and "method" in json.loads((folder / "values.json").read_text())


# --- exactly: train again ---------------------------------------------------------


def replay(cfg, of, options, checkpoints, data, targets, folder, end):
    """Returns None where the replay's losses are the run's to the bit, else what is approximate."""
    changed = dict(targets=options.targets, out_dir=str(folder), init_from="auto", overwrite=False, max_iters=end, eval_interval=0, audit_interval=0)
    changed |= dict(keep_checkpoints=1, wandb_log=False, tensorboard_log=False, domain_momentum=False)
    again = train.Config(**vars(options) | changed)
    if cfg.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    if cfg.start and not (folder / "config.json").exists():
        branch(checkpoints, cfg.start, again, folder)
    train.train(again)
    for path in find_checkpoints(folder):  # of the weights that the run has
        path.unlink()
    was, now = ledger.read(of), ledger.read(folder)
    same = was[np.searchsorted(was["step"], cfg.start) :][: len(now)]
    off = np.abs(now["loss"] - same["loss"]).max()
    alike = np.array_equal(now["chunk"], same["chunk"]) and off == 0
    print(f"replayed {len(now):,} visits: their losses are the run's {'to the bit' if alike else f'within {off:.1e} nats'}")
    return None if alike else f"the replay's losses differ from the run's by up to {off:.1e} nats"


def branch(checkpoints, step, again, folder):
    """A folder for train.py to go on in, from a run's checkpoint, with other targets and no values yet."""
    if step not in checkpoints:
        raise ValueError(f"--start={step}: there are checkpoints of steps {', '.join(map(str, sorted(checkpoints)))}, and 0 needs none")
    if step % again.target_interval:
        raise ValueError(f"--start={step} lies between two gradients of the target: choose a multiple of --target_interval={again.target_interval}")
    content = read_checkpoint(checkpoints[step])
    content |= dict(config=vars(again), wandb_id=None, valuation={"records": {}, "grads": None, "domain_momentum": None})
    Checkpoints(folder, 1, background=False, step=step).write(step, content)
    ledger.write_json(folder / "config.json", dict(config=vars(again)))


# --- approximately: at checkpoints ------------------------------------------------


class Frozen:
    """A run's model and optimizer as they were at a checkpoint, and a Valuation of them by a one-pass rule. Nothing is trained."""

    def __init__(self, options, data, targets, target_batch, folder=None, step=0):
        """folder: where the values go, from step on; None: nowhere. target_batch: chunks that speak for a target, once a checkpoint."""
        self.options, self.data = options, data
        self.batch = options.batch_size * options.gradient_accumulation_steps
        self.model = train.build_model(options, data, options.device)
        self.optimizer = train.build_optimizer(options, self.model)
        self.valuation = Valuation(
            self.model, self.optimizer, self.loss, targets, ONE_PASS.get(options.rule, options.rule), self.batch, len(data.train.rows), folder,
            target_batch, "fixed", 0, max(8, options.batch_size), options.seed, book_interval=0, info=dict(data_hash=data.hash), step=step,
        )  # fmt: skip

    def loss(self, X, Y, ledger=None):
        device = self.options.device.split(":")[0]
        with torch.amp.autocast(device, torch.bfloat16, enabled=self.options.dtype == "bfloat16"):
            return self.model(*(torch.as_tensor(a, device=self.options.device) for a in (X, Y)), ledger)[1]

    def restore(self, path, book):
        """The weights and moments of a checkpoint, and there the targets' gradients, for the learning rate of the book."""
        state = read_checkpoint(path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.valuation.grads = None
        self.open(0, book)

    def open(self, step, book, tokens=None):
        self.valuation.directions.t = None  # the moments' age is the checkpoint's
        self.valuation.open(step, float(book["lr"]), tokens)

    def value(self, step, book, ids):
        """The step's chunks, as if the run had been at these weights then."""
        tokens = self.data.train.batch(ids, self.options.block_size)
        self.open(step, book, tokens)
        for micro, X, Y in zip(*(np.split(a, self.options.gradient_accumulation_steps) for a in (ids, *tokens))):
            X, Y = (torch.as_tensor(a, device=self.options.device) for a in (X, Y))
            loss = self.loss(X, Y, self.valuation.ledger(micro, X, Y))
            (loss / self.options.gradient_accumulation_steps).backward()
        for p in self.model.parameters():
            p.grad.mul_(float(book["kappa"]))  # as the run clipped it
        self.valuation.before_step(float(book["kappa"]))
        self.optimizer.zero_grad(set_to_none=True)
        self.valuation.close()


def walk(cfg, of, options, checkpoints, data, targets, folder, end):
    """Returns what is approximate."""
    books = ledger.read(of, "books")
    partial = folder.with_name(folder.name + ".partial")
    with ledger.claim(partial, "name"):
        for path in {*partial.iterdir()} - {partial / "lock"}:  # of a walk that was killed
            path.unlink()
        ledger.Records(partial / "ledger.npy", ledger.visit_dtype(len(targets))).commit()  # which a Valuation that begins at cfg.start reads
        frozen, at, used = Frozen(options, data, targets, cfg.target_batch, partial, cfg.start), None, []
        for step in tqdm(range(cfg.start, end), desc="walk", unit="step", disable=None):
            near = min(checkpoints, key=lambda other: abs(other - step))
            if near != at:
                frozen.restore(checkpoints[at := near], books[min(near, len(books) - 1)])
                used.append(near)
            frozen.value(step, books[step], data.ids(step, frozen.batch, options.seed))
            if (step + 1) % 100 == 0 or step + 1 == end:
                frozen.valuation.commit()
        options.out_dir = str(folder)
        ledger.write_json(partial / "config.json", dict(config=vars(options)))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    (folder / "lock").unlink()
    return f"weights and moments are those of the nearest checkpoint (steps {', '.join(map(str, used))})"


def query(run, text):
    """A text (str) as the target of a walk of the run (show.run.Run) -> the folder with its values: made once for a text and newest checkpoint."""
    name = "query-" + hashlib.sha256(text.encode()).hexdigest()[:12]
    path = run.path / "revalued" / (name + ".txt")
    cfg = Config(run=str(run.path), targets=f"query={path}", name=name, overwrite=True, data_dir=str(run.data.path))
    _, _, checkpoints = read(cfg)
    if is_done(folder := path.with_suffix("")) and json.loads((folder / "values.json").read_text())["committed_step"] == max(checkpoints):
        return folder
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return revalue(cfg)


def tokens(run, chunks):
    """What each token of these chunks (of a show.run.Run) did to the targets, at the newest checkpoint: its step, and float64 (n, T, K) nats.

    Position t has read token t and predicts the next. A chunk's sum is its value in a step there, <x_i, h>, before what `adamw`
    corrects for by the batch. Two-pass rules, which need one, are stood in for by the one-pass rule of their optimizer."""
    of = run.path.parent.parent if run.path.parent.name == "revalued" else run.path
    cfg = Config(run=str(of), targets=run.cfg["targets"], data_dir=str(run.data.path))
    of, options, checkpoints = read(cfg)
    targets = parse_targets(options.targets, run.data, options.block_size)
    frozen, book = Frozen(options, run.data, targets, cfg.target_batch), ledger.read(of, "books")[(step := max(checkpoints)) - 1]
    frozen.valuation.directions.keeping = {}  # the rows that `adamw` values by the whole batch's gradient
    frozen.restore(checkpoints[step], book)
    frozen.model.eval()
    found = []
    for chunk in tqdm(chunks, desc="tokens", unit="chunk", leave=False, delay=2, disable=None):
        tape = ghost.Tape()
        frozen.loss(*run.data.train.batch([chunk], options.block_size), tape).backward()
        found.append(tape.values(each_token=True).double().cpu().numpy() * float(book["lr"] * book["kappa"]) / frozen.batch)
        frozen.optimizer.zero_grad(set_to_none=True)
    return step, np.stack(found)


def main(cfg):
    folder = revalue(cfg)
    print(f"values for {cfg.targets or 'its own targets'} -> {folder}; next: python values.py top {folder}")


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
