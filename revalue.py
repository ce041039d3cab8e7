"""Values for targets that nobody knew of while the run trained, beside the run's own.

    python revalue.py out/demo --targets=mine=notes.txt              walk: each checkpoint stands for the steps around it (approximate)
    python revalue.py out/demo --targets=mine=notes.txt --replay     train again, through the same steps, and value for these targets (exact)
    python revalue.py out/demo --targets=mine=notes.txt --replay --start=500     exact too, from the checkpoint of step 500 on
    python revalue.py out/demo --repair                              makes again what is damaged of the run's own files

Leaves out/demo/revalued/mine, which values.py and report.py read as they read a run; its values.json says what is approximate.

A replay is train.py's own loop: the order of chunks and all randomness are functions of the step, so on the same machine the weights go the
same way to the bit, and the ledger's losses are held against the run's to prove it. A walk takes weights and moments from the nearest
checkpoint, learning rate and clip coefficient from the books, --target_batch chunks of a target, and a one-pass rule; more
checkpoints (train.py --keep_checkpoints=20) make it better. It costs a forward and backward of every chunk valued, a replay the training.

A repair trains again through the steps whose rows are damaged, from the checkpoint before them, and puts the rows back where their checksum
shows that they are the same to the bit. The rest is made from the newest checkpoint: config.json, evaluations.jsonl, values.npy, values.json.
"""

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import config
import train
from data import open_dataset, parse_targets
from pile.targets import with_commas
from shapley import ghost
from system import files, store
from system.checkpoints import (
    Checkpoints,
    check_targets,
    find_checkpoints,
    fitting,
    read_checkpoint,
)
from system.errors import UserError
from system.files import refuse_strangers
from system.folder import (
    REVALUATION,
    REVALUATION_FILES,
    RunFolder,
    is_revaluation,
    remove_revaluation,
)
from system.machine import check_system, describe_run
from system.terminal import command, progress, say
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
    repair: bool = False  # only make again what is damaged of the run's own files
    data_dir: str = ""  # where the run's data is now, if it moved
    device: str = ""  # empty: the run's

    def __post_init__(self):
        config.check(self, at_least={"target_batch": 1, "start": 0, "end": 0})
        if self.name:
            files.plain_name(self.name, "name")


def revalue(cfg):
    """Values chunks of cfg.run for cfg.targets. Returns the folder that holds them. Raises
    UserError and OSError, with what to type."""
    of, options, checkpoints, newest = read(cfg)
    data = open_data(of, options, newest)
    targets = parse_targets(options.targets, data, options.block_size)
    if not cfg.targets:
        check_targets(targets, newest["valuation"].get("targets", {}), of)
    name = cfg.name or files.name_for("+".join(target.name for target in targets))
    folder, last = of / "revalued" / name, max(checkpoints)
    end = cfg.end or last
    if not 0 <= cfg.start < end <= last:
        what = f"--start={cfg.start} --end={end}: the newest checkpoint is of step {last}"
        raise UserError(f"{what}: 0 <= start < end <= {last}")
    if folder.exists() and any(folder.iterdir()) and not is_revaluation(folder):
        raise UserError(f"{folder} holds files that revalue.py did not write: write another --name")
    if is_done(folder) and not cfg.overwrite:
        ways = "--overwrite makes them again, --name=... puts these elsewhere"
        raise UserError(f"{folder} holds values already: {ways}")
    method = "replay" if cfg.replay else "walk"
    about = dict(of=str(of), method=method, targets=[target.name for target in targets])
    work = replay if cfg.replay else walk
    approximate = work(cfg, of, options, checkpoints, data, targets, folder, end, about)
    info = files.read_json(folder / "values.json", "type it again")
    info |= dict(of=str(of), method=method, approximate=approximate)
    files.write_json(folder / "values.json", info)
    return folder


def read(cfg):
    """-> the run's folder, its train.Config with cfg's targets, {step: path of its checkpoint},
    and what the newest of them holds."""
    of = Path(cfg.run)
    if not cfg.run or not (of / "config.json").is_file():
        what = cfg.run or "no run given"
        raise UserError(f"{what}: name the folder of a run, as out/<the config's name>")
    options = config.load(train.Config, [str(of / "config.json")])
    if options.rule == "off":
        raise UserError(f"{of} was trained with --rule=off: train it with another --rule")
    for key in ("targets", "data_dir", "device"):
        setattr(options, key, getattr(cfg, key) or getattr(options, key))
    options.shard = options.wandb_log = options.tensorboard_log = False  # here is one process
    check_system(options)
    path, *older = find_checkpoints(of) or [None]
    if path is None:
        steps = min(options.checkpoint_interval, options.max_iters)
        raise UserError(f"{of} has no checkpoint yet: train.py writes one after {steps} steps")
    newest = read_checkpoint(path)
    checkpoints = {int(path.stem[5:]): path for path in older} | {newest["iter_num"]: path}
    return of, options, checkpoints, newest


def open_data(of, options, newest):
    """-> the run's data. Raises UserError where the newest checkpoint is not of it."""
    data = open_dataset(options.data_dir, options.keep)
    if newest["data_hash"] != data.hash:
        what = f"{data.path} is not the data of {of} (its hash differs)"
        raise UserError(f"{what}: name the run's data with --data_dir=...")
    if newest["keep"] != store.crc(data.keep):
        raise UserError(f"{options.keep} does not name the chunks that {of} was trained on")
    options.block_size = options.block_size or data.meta["block_size"]
    if newest["model_args"] != train.model_args(options, data):
        what = f"{of}/config.json is of another model than its newest checkpoint"
        raise UserError(f"{what}: take the run's own")
    return data


def is_done(folder):
    if not (folder / "values.json").is_file():
        return False
    return "method" in files.read_json(folder / "values.json", "write another --name")


# --- exactly: train again ---------------------------------------------------------


def replay(cfg, of, options, checkpoints, data, targets, folder, end, about):
    """Returns None where the replay's losses are the run's to the bit, else what is approximate."""
    changed = dict(targets=options.targets, out_dir=str(folder), max_iters=end, keep_checkpoints=1)
    changed |= dict(eval_interval=0, audit_interval=0, domain_momentum=False)
    anew = cfg.overwrite and folder.exists()
    changed |= dict(init_from="scratch", overwrite=True) if anew else dict(init_from="auto")
    again = train.Config(**vars(options) | changed)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / REVALUATION, about)
    try:
        if cfg.start and (anew or not (folder / "config.json").exists()):
            state = {"records": {}, "grads": None, "domain_momentum": None, "targets": {}}
            branch(checkpoints, cfg.start, again, folder, state)
            again.init_from, again.overwrite = "auto", False
        train.train(again)
    finally:
        if sorted(os.listdir(folder)) == [REVALUATION]:  # it came to nothing
            remove_revaluation(folder)
    for path in find_checkpoints(folder):  # of the weights that the run has
        path.unlink()
    was, now = store.read(of), store.read(folder)
    same = was[np.searchsorted(was["step"], cfg.start) :][: len(now)]
    off = np.abs(now["loss"] - same["loss"]).max()
    alike = np.array_equal(now["chunk"], same["chunk"]) and off == 0
    how = "to the bit" if alike else f"within {off:.1e} nats"
    say(f"replayed {len(now):,} visits: their losses are the run's {how}")
    return None if alike else f"the replay's losses differ from the run's by up to {off:.1e} nats"


def branch(checkpoints, step, again, folder, valuation):
    """A folder for train.py to go on in from a run's checkpoint, with no values yet. valuation:
    what the accountant goes on from."""
    if step not in checkpoints:
        have = f"there are checkpoints of steps {', '.join(map(str, sorted(checkpoints)))}"
        raise UserError(f"--start={step}: {have}, and 0 needs none")
    if valuation["grads"] is None and step % again.target_interval:
        cure = f"choose a multiple of --target_interval={again.target_interval}"
        raise UserError(f"--start={step} lies between two gradients of the target: {cure}")
    content = read_checkpoint(checkpoints[step])
    content |= dict(config=train.settings(again), wandb_id=None, valuation=valuation)
    with RunFolder(folder) as run_folder:
        run_folder.set_aside()
        Checkpoints(run_folder, 1, background=False, step=step).write(step, content)
        files.write_json(folder / "config.json", dict(config=train.settings(again)))


# --- repair -----------------------------------------------------------------------


def repair(cfg):
    """Makes again what is damaged of a run's own files. Raises UserError where that cannot be, and
    leaves everything as it is then."""
    of, options, checkpoints, newest = read(cfg)
    data = open_data(of, options, newest)
    last, batch = max(checkpoints), options.batch_size * options.gradient_accumulation_steps
    counted = newest["valuation"].get("records", {})
    damaged = {name: store.damaged_blocks(of / f"{name}.npy", counted[name]) for name in counted}
    damaged = {name: blocks for name, blocks in damaged.items() if blocks}
    targets = parse_targets(options.targets, data, options.block_size)
    check_targets(targets, newest["valuation"].get("targets", {}), of)
    if damaged:
        per_step = {"ledger": batch, "books": 1, "audit": 1 / max(1, options.audit_interval)}
        first = min(blocks[0] * store.BLOCK // per_step[n] for n, blocks in damaged.items())
        end = max((blocks[-1] + 1) * store.BLOCK / per_step[n] for n, blocks in damaged.items())
        first, end = int(first), min(last, int(np.ceil(end)))
        for name, blocks in damaged.items():
            rows = store.which_rows(blocks, counted[name]["rows"])
            say(f"{of}/{name}.npy is damaged: {rows}")
        say(f"training again through steps {first} to {end}")
        folder = of / "revalued" / "repair"
        try:
            replay_steps(folder, of, options, checkpoints, first, end)
            start = store.read(folder, "books")["step"][0]
            for name, blocks in damaged.items():
                rows, skipped = store.read(folder, name), int(start * per_step[name])
                put_rows(of / f"{name}.npy", counted[name], blocks, rows, skipped)
        finally:
            remove_revaluation(folder)
    restore(of, options, newest)
    say(f"{of} is whole as of step {last}")


def replay_steps(folder, of, options, checkpoints, first, end):
    """Trains again through some steps, as the run did, which leaves their rows in a folder."""
    changed = dict(out_dir=str(folder), max_iters=end, keep_checkpoints=1, eval_interval=0)
    again = train.Config(**vars(options) | changed | dict(init_from="scratch", overwrite=True))
    folder.mkdir(parents=True, exist_ok=True)
    refuse_strangers(folder, REVALUATION_FILES, "move them away")
    files.write_json(folder / REVALUATION, dict(of=str(of), method="repair"))
    earlier = [step for step in checkpoints if 0 < step <= first]
    if earlier:
        state = read_checkpoint(checkpoints[max(earlier)])["valuation"]
        branch(checkpoints, max(earlier), again, folder, state | {"records": {}})
        again.init_from, again.overwrite = "resume", False
    train.train(again)


def put_rows(path, counted, blocks, rows, skipped):
    """Writes a file's damaged blocks anew. rows: its records from number `skipped` on. Raises
    UserError before it writes where they are not those that were there."""
    new = {}
    for i in blocks:
        begin, end = i * store.BLOCK, min(counted["rows"], (i + 1) * store.BLOCK)
        part = rows[begin - skipped : end - skipped].tobytes()
        if zlib.crc32(part) != counted["sums"][i]:
            what = f"the rows of {path} came out otherwise, of another machine or number of threads"
            raise UserError(f"{what}: repair it where the run was made")
        new[counted["start"] + begin * counted["itemsize"]] = part
    path.touch()
    records = store.Records(path, rows.dtype, counted)  # with a new header
    for start, part in new.items():
        os.pwrite(records.file.fileno(), part, start)
    os.fsync(records.file.fileno())
    records.file.close()


def restore(of, options, newest):
    """What follows from the newest checkpoint and the rows: the other files."""
    with fitting(of / "ckpt.pt"):
        evaluations = json.loads(newest["evaluations"])
    if evaluations:
        files.write_lines(of / "evaluations.jsonl", evaluations)
    try:
        about = files.read_json(of / "config.json", "")
    except UserError:
        about = describe_run(newest["config"], 1, newest["data_hash"], config.ROOT)
    resumed = dict(out_dir=str(of), init_from="resume", max_iters=newest["iter_num"])
    train.train(train.Config(**vars(options) | resumed))  # no step, but a commit
    files.write_json(of / "config.json", about)


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
            return self.model(
                *(torch.as_tensor(a, device=self.options.device) for a in (X, Y)), ledger
            )[1]

    def restore(self, path, book):
        """The weights and moments of a checkpoint, and there the targets' gradients, for the learning rate of the book."""
        state = read_checkpoint(path)
        with fitting(path):
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
        for micro, X, Y in zip(
            *(np.split(a, self.options.gradient_accumulation_steps) for a in (ids, *tokens))
        ):
            X, Y = (torch.as_tensor(a, device=self.options.device) for a in (X, Y))
            loss = self.loss(X, Y, self.valuation.ledger(micro, X, Y))
            (loss / self.options.gradient_accumulation_steps).backward()
        for p in self.model.parameters():
            p.grad.mul_(float(book["kappa"]))  # as the run clipped it
        self.valuation.before_step(float(book["kappa"]))
        self.optimizer.zero_grad(set_to_none=True)
        self.valuation.close()


def walk(cfg, of, options, checkpoints, data, targets, folder, end, about):
    """Returns what is approximate."""
    books = store.read(of, "books")
    partial = folder.with_name(folder.name + ".partial")
    with files.Claim(partial, "name") as claim:
        refuse_strangers(partial, REVALUATION_FILES, "write another --name")
        for path in {*partial.iterdir()} - {partial / "lock"}:  # of a walk that was killed
            path.unlink()
        files.write_json(partial / REVALUATION, about)
        frozen = Frozen(options, data, targets, cfg.target_batch, partial, cfg.start)
        at, used = None, []
        for step in progress(range(cfg.start, end), "walk", unit="step"):
            near = min(checkpoints, key=lambda other: abs(other - step))
            if near != at:
                at = near
                frozen.restore(checkpoints[near], books[min(near, len(books) - 1)])
                used.append(near)
            frozen.value(step, books[step], data.ids(step, frozen.batch, options.seed))
            if (step + 1) % 100 == 0 or step + 1 == end:
                frozen.valuation.commit()
        options.out_dir = str(folder)
        files.write_json(partial / "config.json", dict(config=train.settings(options)))
        if folder.exists():
            remove_revaluation(folder)
        partial.rename(folder)
        claim.folder = folder
    (folder / "lock").unlink()
    near = f"those of the nearest checkpoint (steps {', '.join(map(str, used))})"
    return f"weights and moments are {near}"


def query(run, text):
    """A text (str) as the target of a walk of the run (show.run.Run) -> the folder with its values:
    made once for a text and newest checkpoint."""
    name = "query-" + hashlib.sha256(text.encode()).hexdigest()[:12]
    path = run.path / "revalued" / (name + ".txt")
    targets = f"query={with_commas(str(path))}"
    cfg = Config(str(run.path), targets, name, overwrite=True, data_dir=str(run.data.path))
    _, _, checkpoints, _ = read(cfg)
    folder = path.with_suffix("")
    if is_revaluation(folder) and is_done(folder):
        info = files.read_json(folder / "values.json", "", {"committed_step": int})
        if info["committed_step"] == max(checkpoints):
            return folder
    path.parent.mkdir(exist_ok=True)
    with files.atomic(path) as f:
        f.write(text.encode())
    return revalue(cfg)


def tokens(run, chunks):
    """What each token of these chunks (of a show.run.Run) did to the targets, at the newest checkpoint: its step, and float64 (n, T, K) nats.

    Position t has read token t and predicts the next. A chunk's sum is its value in a step there, <x_i, h>, before what `adamw`
    corrects for by the batch. Two-pass rules, which need one, are stood in for by the one-pass rule of their optimizer."""
    of = run.path.parent.parent if run.path.parent.name == "revalued" else run.path
    cfg = Config(run=str(of), targets=run.cfg["targets"], data_dir=str(run.data.path))
    of, options, checkpoints, newest = read(cfg)
    open_data(of, options, newest)
    targets = parse_targets(options.targets, run.data, options.block_size)
    frozen, book = (
        Frozen(options, run.data, targets, cfg.target_batch),
        store.read(of, "books")[(step := max(checkpoints)) - 1],
    )
    frozen.valuation.directions.keeping = {}  # the rows that `adamw` values by the whole batch's gradient
    frozen.restore(checkpoints[step], book)
    frozen.model.eval()
    found = []
    for chunk in progress(chunks, "tokens", unit="chunk", leave=False, delay=2):
        tape = ghost.Tape()
        frozen.loss(*run.data.train.batch([chunk], options.block_size), tape).backward()
        found.append(
            tape.values(each_token=True).double().cpu().numpy()
            * float(book["lr"] * book["kappa"])
            / frozen.batch
        )
        frozen.optimizer.zero_grad(set_to_none=True)
    return step, np.stack(found)


def main(cfg):
    if cfg.repair:
        return repair(cfg)
    folder = revalue(cfg)
    following = command("python", "values.py", "top", str(folder))
    say(f"values for {cfg.targets or 'its own targets'} -> {folder}; next: {following}")


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
