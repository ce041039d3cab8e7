"""Values for targets that nobody knew of while the run trained, beside the run's own.

    python revalue.py out/demo --targets=mine=notes.txt             walk: approximate
    python revalue.py out/demo --targets=mine=notes.txt --replay    exact: train again
    python revalue.py out/demo --targets=mine=notes.txt --replay --start=500
    python revalue.py out/demo --repair              makes again what is damaged of the run's files
    python revalue.py out/demo --hindsight           for the model that came out in the end
    python revalue.py out/demo --hindsight --check=40      and train without some, as a proof
    torchrun --nproc_per_node=2 revalue.py out/demo --hindsight

Leaves out/demo/revalued/mine, which values.py and report.py read as they read a run. Its
values.json says what is approximate.

A walk lets each checkpoint stand for the steps around it. It takes weights and moments from the
nearest checkpoint, learning rate and clip coefficient from the books, --target_batch chunks of a
target, and a one-pass rule. More checkpoints (train.py --keep_checkpoints=20) make it better. It
costs a forward and backward of every chunk valued.

A replay is train.py's own loop, through the same steps or from a checkpoint's on (--start). The
order of chunks and all randomness are functions of the step, so on the same machine the weights go
the same way to the bit. The ledger's losses are held against the run's to prove it. It costs what
the training did.

Hindsight is another question (lookback.py): not what a chunk did in its step, but what it did for
the model at the run's end. Its values rank chunks, and their sum is about 0. It costs a forward and
backward of every step, and two more for each target. --hindsight may be killed and typed again. The
check trains again from the first visit that may be left out, --check times.

A repair trains again through the steps whose rows are damaged, from the checkpoint before them. It
puts rows back where their checksum shows that they are the same to the bit. The rest is made from
the newest checkpoint: config.json, evaluations.jsonl, values.npy, values.json.
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
import lookback
import train
from data import open_dataset, parse_targets
from shapley import ghost, labels
from show import findings, hindsight, tables
from show.run import open_run
from system import files, parallel, store, terminal
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
from system.terminal import command, progress, say, with_commas
from system.trainers import refuse_trainers
from system.writer import Writer
from valuation import Settings, Valuation

# the rule for a chunk without its batch
ONE_PASS = {
    "sgd": "sgd",
    "sgd2": "sgd",
    "adamw_linear": "adamw_linear",
    "adamw": "adamw",
    "adamw2": "adamw",
}


@dataclass
class Config:
    run: str = ""  # the run's folder
    # as train.py's: val | val:<domain> | <name>=<file.txt>, comma-separated; empty: the run's own
    targets: str = ""
    name: str = ""  # of the folder under <run>/revalued; empty: the targets' names
    replay: bool = False  # train again and be exact, instead of walking the checkpoints
    hindsight: bool = False  # what each visit did for the model at the end of the run
    horizon: int = 0  # of hindsight: steps that it looks ahead; 0: to the end
    # of hindsight: train again so many times without a random set of visits, and say how well it
    # predicts what that does to the targets' losses
    check: int = 0
    check_fraction: float = 0.02  # the share of the visits in such a set
    memory: float = 0.0  # of hindsight: GB for the steps it holds; 0: a quarter of the device's
    start: int = 0  # the first step to value; with --replay a checkpoint's
    end: int = 0  # the step after the last; 0: the newest checkpoint's
    target_batch: int = 64  # of a walk: chunks that speak for each target, the same all along
    overwrite: bool = False  # do it again where it was done
    repair: bool = False  # only make again what is damaged of the run's own files
    data_dir: str = ""  # where the run's data is now, if it moved
    device: str = ""  # empty: the run's

    def __post_init__(self):
        config.check(
            self, at_least=AT_LEAST, above={"check_fraction": 0}, below={"check_fraction": 1}
        )
        if self.hindsight and (self.replay or self.repair):
            what = "--hindsight, --replay and --repair are three things"
            raise UserError(f"{what}: write one of them")
        for key in ("horizon", "check", "memory"):
            value = getattr(self, key)
            if value and not self.hindsight:
                raise UserError(f"--{key}={value} is of hindsight: add --hindsight")
        if 0 < self.check < 4:
            raise UserError(f"--check={self.check}: write at least 4, for a correlation")
        if self.name:
            files.plain_name(self.name, "name")


AT_LEAST = {"target_batch": 1, "start": 0, "end": 0, "horizon": 0, "memory": 0, "check": 0}


@dataclass
class Original:
    """The run that is valued again."""

    path: Path
    options: train.Config  # its own, with the targets, data_dir and device that are wanted now
    checkpoints: dict  # {steps done: path}
    newest: dict  # what the newest checkpoint holds

    @property
    def last(self):
        return max(self.checkpoints)


def revalue(cfg):
    """Values chunks of cfg.run for cfg.targets. Returns the folder that holds them. Raises
    UserError and OSError, with what to type."""
    original = read(cfg)
    data = open_data(original)
    targets = parse_targets(original.options.targets, data, original.options.block_size)
    if cfg.targets:
        for target in targets:
            for note in target.notes:
                say(note)
    elif original.options.rule != "off":
        check_run_targets(original, targets)
    name = cfg.name or files.name_for("+".join(target.name for target in targets))
    if cfg.hindsight and not cfg.name:
        name += f"-hindsight-{cfg.horizon}" if cfg.horizon else "-hindsight"
    folder = original.path / "revalued" / name
    end = cfg.end or original.last
    if not 0 <= cfg.start < end <= original.last:
        what = f"the newest checkpoint is of step {original.last}"
        wanted = f"0 <= start < end <= {original.last}"
        raise UserError(f"--start={cfg.start} --end={end}: {what}: {wanted}")
    look_at(cfg, folder, targets)
    about = {
        "of": str(original.path),
        "method": method(cfg),
        "targets": [target.name for target in targets],
    }
    if cfg.hindsight:
        look_back(cfg, original, data, targets, folder, end, about)
        return folder
    work = replay if cfg.replay else walk
    approximate = work(cfg, original, data, targets, folder, end, about)
    info = files.read_json(folder / "values.json", "type it again")
    info.update(of=about["of"], method=about["method"], approximate=approximate)
    files.write_json(folder / "values.json", info)
    return folder


def look_back(cfg, original, data, targets, folder, end, about):
    """Hindsight where it is missing, then its check."""
    try:
        if cfg.overwrite or not is_done(folder):
            lookback.look_back(cfg, original, data, targets, folder, end, about)
        if cfg.check:
            lookback.check(cfg, original, data, targets, folder)
    except KeyboardInterrupt:
        say("stopped: what was done is kept; type the same again, and it goes on")
        raise


def method(cfg):
    if cfg.hindsight:
        return "hindsight"
    return "replay" if cfg.replay else "walk"


def read(cfg):
    """-> the Original that cfg names."""
    path = Path(cfg.run)
    if not cfg.run or not (path / "config.json").is_file():
        what = cfg.run or "no run given"
        raise UserError(f"{what}: name the folder of a run, as out/<the config's name>")
    options = config.load(train.Config, [str(path / "config.json")])
    if options.rule == "off" and not cfg.hindsight:
        cure = "train it with another --rule, or look back with --hindsight"
        raise UserError(f"{path} was trained with --rule=off: {cure}")
    options.targets = cfg.targets or options.targets
    options.data_dir = cfg.data_dir or options.data_dir
    options.device = cfg.device or options.device
    options.shard = options.wandb_log = False
    check_system(options)
    if cfg.hindsight:
        options.device = parallel.start(options.device)
    elif "RANK" in os.environ:
        raise UserError("only --hindsight is for several processes: leave out torchrun")
    paths = find_checkpoints(path)
    if not paths:
        refuse_trainers(path, "and no checkpoint that can be replayed")
        steps = min(options.checkpoint_interval, options.max_iters)
        raise UserError(f"{path} has no checkpoint yet: train.py writes one after {steps} steps")
    newest = read_checkpoint(paths[0])
    checkpoints = {int(older.stem[5:]): older for older in paths[1:]}
    checkpoints[newest["iter_num"]] = paths[0]
    return Original(path, options, checkpoints, newest)


def open_data(original):
    """-> the run's data. Raises UserError where the newest checkpoint is not of it."""
    options, newest = original.options, original.newest
    data = open_dataset(options.data_dir, options.keep)
    if newest["data_hash"] != data.hash:
        what = f"{data.path} is not the data of {original.path} (its hash differs)"
        raise UserError(f"{what}: name the run's data with --data_dir=...")
    if newest["keep"] != store.crc(data.keep):
        what = "does not name the chunks"
        raise UserError(f"{options.keep} {what} that {original.path} was trained on")
    options.block_size = options.block_size or data.meta["block_size"]
    defaults = vars(train.GPTConfig())  # of what was added since
    wanted = defaults | train.get_model_args(options, data)
    if defaults | newest["model_args"] != wanted:
        what = f"{original.path}/config.json is of another model than its newest checkpoint"
        raise UserError(f"{what}: take the run's own")
    return data


def check_run_targets(original, targets):
    had = original.newest["valuation"].get("targets", {})
    check_targets(targets, had, original.path)


def look_at(cfg, folder, targets):
    """Raises UserError where a folder holds what is not to be replaced."""
    if cfg.hindsight and cfg.check and not cfg.overwrite and is_done(folder):
        return check_same(folder, targets)  # what else lies there stays
    if folder.exists() and any(folder.iterdir()) and not is_revaluation(folder):
        raise UserError(f"{folder} holds files that revalue.py did not write: write another --name")
    if is_done(folder) and not cfg.overwrite:
        ways = "--overwrite makes them again, --name=... puts these elsewhere"
        raise UserError(f"{folder} holds values already: {ways}")


def check_same(folder, targets):
    """Raises UserError where a folder to be checked holds no hindsight for these targets."""
    about = files.read_json(folder / REVALUATION, "write another --name", {"method": str})
    names = [target.name for target in targets]
    if about["method"] != "hindsight" or about.get("targets") != names:
        what = f"{folder} holds other values than hindsight for {terminal.listed(names)}"
        raise UserError(f"{what}: write another --name, or --overwrite")


def is_done(folder):
    if not (folder / "values.json").is_file():
        return False
    return "method" in files.read_json(folder / "values.json", "write another --name")


# --- exactly: train again ---------------------------------------------------------


def changed(options, **settings):
    """A train.Config with some settings changed."""
    return train.Config(**{**vars(options), **settings})


def replay(cfg, original, data, targets, folder, end, about):
    """Returns None where the replay's losses are the run's to the bit, else what is approximate."""
    anew = cfg.overwrite and folder.exists()
    again = changed(
        original.options,
        out_dir=str(folder),
        max_iters=end,
        keep_checkpoints=1,
        hindsight=False,
        eval_interval=0,
        audit_interval=0,
        init_from="scratch" if anew else "auto",
        overwrite=anew,
    )
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / REVALUATION, about)
    try:
        if cfg.start and (anew or not (folder / "config.json").exists()):
            checksums = None  # the run's own targets
            if cfg.targets:
                checksums = {target.name: target.checksum() for target in targets}
            branch(original.checkpoints, cfg.start, again, folder, checksums)
            again.init_from = "auto"
            again.overwrite = False
        train.train(again)
        check_whole(folder, end)
    finally:
        if sorted(os.listdir(folder)) == [REVALUATION]:  # it came to nothing
            remove_revaluation(folder)
    for path in find_checkpoints(folder):  # of the weights that the run has
        path.unlink()
    run_visits = store.read(original.path)
    first = np.searchsorted(run_visits["step"], cfg.start)
    visits = store.read(folder)
    run_visits = run_visits[first : first + len(visits)]
    difference = np.abs(visits["loss"] - run_visits["loss"]).max()
    is_same = difference == 0 and np.array_equal(visits["chunk"], run_visits["chunk"])
    how = "to the bit" if is_same else f"within {difference:.1e} nats"
    say(f"replayed {len(visits):,} visits: their losses are the run's {how}")
    if is_same:
        return None
    return f"the replay's losses differ from the run's by up to {difference:.1e} nats"


def branch(checkpoints, step, again, folder, checksums=None):
    """A folder for train.py to go on in from a run's checkpoint, with no values yet. checksums:
    {name: checksum} of other targets than the run's. The means of their gradients begin here."""
    if step not in checkpoints:
        steps = ", ".join(map(str, sorted(checkpoints)))
        raise UserError(f"--start={step}: there are checkpoints of steps {steps}, and 0 needs none")
    content = read_checkpoint(checkpoints[step])
    content["config"] = train.run_settings(again)
    content["wandb_id"] = None
    content["valuation"]["records"] = {}
    if checksums is not None:
        content["valuation"] = {"records": {}, "targets": checksums}
    with RunFolder(folder) as run_folder:
        run_folder.set_aside()
        Checkpoints(run_folder, 1, background=False, step=step).write(step, content)
        files.write_json(folder / "config.json", {"config": train.run_settings(again)})


# --- repair -----------------------------------------------------------------------


def repair(cfg):
    """Makes again what is damaged of a run's own files. Raises UserError where that cannot be, and
    leaves everything as it is then."""
    original = read(cfg)
    data = open_data(original)
    counted = original.newest["valuation"].get("records", {})
    damaged = {}  # {name of a file: its damaged blocks}
    for name, counted_file in counted.items():
        blocks = store.damaged_blocks(original.path / f"{name}.npy", counted_file)
        if blocks:
            damaged[name] = blocks
    targets = parse_targets(original.options.targets, data, original.options.block_size)
    check_run_targets(original, targets)
    if damaged:
        repair_rows(original, counted, damaged)
    restore(original)
    say(f"{original.path} is whole as of step {original.last}")


def repair_rows(original, counted, damaged):
    """Trains again through the steps of damaged rows, and puts the rows back."""
    options = original.options
    rows_of_step = {
        "ledger": options.batch,
        "books": 1,
        "audit": 1 / max(1, options.audit_interval),
    }
    first, end = original.last, 0
    for name, blocks in damaged.items():
        first = min(first, int(blocks[0] * store.BLOCK // rows_of_step[name]))
        end = max(end, int(np.ceil((blocks[-1] + 1) * store.BLOCK / rows_of_step[name])))
        rows = store.which_rows(blocks, counted[name]["rows"])
        say(f"{original.path}/{name}.npy is damaged: {rows}")
    end = min(original.last, end)
    say(f"training again through steps {first} to {end}")
    folder = original.path / "revalued" / "repair"
    try:
        replay_steps(folder, original, first, end)
        start = store.read(folder, "books")["step"][0]
        for name, blocks in damaged.items():
            rows = store.read(folder, name)
            skipped = int(start * rows_of_step[name])
            put_rows(original.path / f"{name}.npy", counted[name], blocks, rows, skipped)
    finally:
        remove_revaluation(folder)


def replay_steps(folder, original, first, end):
    """Trains again through some steps, as the run did, which leaves their rows in a folder."""
    again = changed(
        original.options,
        out_dir=str(folder),
        max_iters=end,
        keep_checkpoints=1,
        hindsight=False,
        eval_interval=0,
        init_from="scratch",
        overwrite=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    refuse_strangers(folder, REVALUATION_FILES, "move them away")
    files.write_json(folder / REVALUATION, {"of": str(original.path), "method": "repair"})
    earlier = [step for step in original.checkpoints if 0 < step <= first]
    if earlier:
        branch(original.checkpoints, max(earlier), again, folder)
        again.init_from = "resume"
        again.overwrite = False
    train.train(again)
    check_whole(folder, end)


def check_whole(folder, end):
    """Raises UserError where a training in a folder was stopped before it had done `end` steps."""
    done = read_checkpoint(folder / "ckpt.pt")["iter_num"]
    if done < end:
        raise UserError(f"stopped after step {done} of {end}: type the same again")


def put_rows(path, counted, blocks, rows, skipped):
    """Writes a file's damaged blocks anew. rows: its records from number `skipped` on. Raises
    UserError before it writes where they are not those that were there."""
    new = {}  # {where in the file: bytes}
    for i in blocks:
        begin = i * store.BLOCK
        end = min(counted["rows"], begin + store.BLOCK)
        block = rows[begin - skipped : end - skipped].tobytes()
        if zlib.crc32(block) != counted["sums"][i]:
            what = f"the rows of {path} came out otherwise, of another machine or number of threads"
            raise UserError(f"{what}: repair it where the run was made")
        new[counted["start"] + begin * counted["itemsize"]] = block
    path.touch()
    records = store.Records(path, rows.dtype, counted)  # with a new header
    for start, block in new.items():
        os.pwrite(records.file.fileno(), block, start)
    os.fsync(records.file.fileno())
    records.file.close()


def restore(original):
    """What follows from the newest checkpoint and the rows: the other files."""
    path, newest = original.path, original.newest
    with fitting(path / "ckpt.pt"):
        evaluations = json.loads(newest["evaluations"])
    if evaluations:
        files.write_lines(path / "evaluations.jsonl", evaluations)
    try:
        about = files.read_json(path / "config.json", "")
    except UserError:
        about = describe_run(newest["config"], 1, newest["data_hash"], config.ROOT)
    resumed = changed(
        original.options, out_dir=str(path), init_from="resume", max_iters=newest["iter_num"]
    )
    train.train(resumed)  # no step, but a commit
    files.write_json(path / "config.json", about)


# --- approximately: at checkpoints ------------------------------------------------


class Frozen:
    """A run's model and optimizer as they were at a checkpoint, and a Valuation of them by a
    one-pass rule. Nothing is trained."""

    def __init__(self, options, data, targets, target_batch, writer=None, exact_rows=True):
        """target_batch: chunks that speak for a target. writer: where the values go, or None.
        exact_rows: see valuation.Settings."""
        self.options, self.data = options, data
        self.model = train.build_model(options, data, options.device, is_first=False)
        self.optimizer = train.build_optimizer(options, self.model)
        settings = Settings(
            rule=ONE_PASS[options.rule],
            batch=options.batch,
            target_batch=target_batch,
            target_sampling="fixed",
            micro_batch=max(8, options.batch_size),
            seed=options.seed,
            book_interval=0,
            tolerance=0.0,  # nothing is trained, so nothing is to be measured
            exact_rows=exact_rows,
        )
        self.valuation = Valuation(self.model, self.optimizer, self.loss, targets, settings, writer)

    def to_device(self, *arrays):
        return [torch.as_tensor(a, device=self.options.device) for a in arrays]

    def loss(self, X, Y, ledger=None):
        device_type = self.options.device.split(":")[0]
        is_low = self.options.dtype == "bfloat16"
        with torch.amp.autocast(device_type, torch.bfloat16, enabled=is_low):
            return self.model(*self.to_device(X, Y), ledger)[1]

    def restore(self, path, book):
        """The weights and moments of a checkpoint, and there the targets' gradients, for the
        learning rate of the book."""
        checkpoint = read_checkpoint(path)
        with fitting(path):
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.valuation.freeze_targets()
        self.valuation.begin_step(0, float(book["lr"]))

    def value(self, step, book, ids):
        """The step's chunks, as if the run had been at these weights then."""
        X, Y = self.data.train.batch(ids, self.options.block_size)
        self.valuation.begin_step(step, float(book["lr"]), tokens=(X, Y))
        n_labels = labels.count(Y)
        for rows in train.micro_batches(len(ids), self.options.batch_size):
            x, y = self.to_device(X[rows], Y[rows])
            share = n_labels[rows].sum() / n_labels.sum()
            loss = self.loss(x, y, self.valuation.new_ledger(ids[rows], x, y, share))
            (loss * share).backward()
        clip_coef = float(book["kappa"])
        for p in self.model.parameters():
            p.grad.mul_(clip_coef)  # as the run clipped it
        self.valuation.before_update(clip_coef)
        self.optimizer.zero_grad(set_to_none=True)
        self.valuation.end_step()


def walk(cfg, original, data, targets, folder, end, about):
    """Returns what is approximate."""
    options, checkpoints = original.options, original.checkpoints
    books = store.read(original.path, "books")
    partial = folder.with_name(folder.name + ".partial")
    with files.Claim(partial, "name") as claim:
        refuse_strangers(partial, REVALUATION_FILES, "write another --name")
        for path in list(partial.iterdir()):  # of a walk that was killed
            if path.name != "lock":
                path.unlink()
        files.write_json(partial / REVALUATION, about)
        n_chunks = len(data.train.rows)
        writer = Writer(partial, n_chunks, len(targets), about={"data_hash": data.hash})
        frozen = Frozen(options, data, targets, cfg.target_batch, writer)
        nearest, used = None, []
        for step in progress(range(cfg.start, end), "walk", unit="step"):
            checkpoint = min(checkpoints, key=lambda other: abs(other - step))
            if checkpoint != nearest:
                nearest = checkpoint
                frozen.restore(checkpoints[nearest], books[min(nearest, len(books) - 1)])
                used.append(nearest)
            frozen.value(step, books[step], data.ids(step, options.batch, options.seed))
            if (step + 1) % 100 == 0 or step + 1 == end:
                frozen.valuation.commit()
        options.out_dir = str(folder)
        options.target_smoothing = 0.0  # a step's mean needs the steps before it
        files.write_json(partial / "config.json", {"config": train.run_settings(options)})
        if folder.exists():
            remove_revaluation(folder)
        partial.rename(folder)
        claim.folder = folder
    (folder / "lock").unlink()
    steps = ", ".join(map(str, used))
    return f"weights and moments are those of the nearest checkpoint (steps {steps})"


def query(run, text, hindsight=False):
    """A text (str) as the target of a walk of the run (show.run.Run), or of hindsight -> the folder
    with its values: made once for a text and newest checkpoint."""
    name = "query-" + hashlib.sha256(text.encode()).hexdigest()[:12]
    path = run.original / "revalued" / (name + ".txt")
    if hindsight:
        name += "-hindsight"
    cfg = Config(
        run=str(run.original),
        targets=f"query={with_commas(str(path))}",
        name=name,
        hindsight=hindsight,
        overwrite=True,
        data_dir=str(run.data.path),
    )
    last = read(cfg).last
    folder = path.with_name(name)
    if is_revaluation(folder) and is_done(folder):
        info = files.read_json(folder / "values.json", "", {"committed_step": int})
        if info["committed_step"] == last:
            return folder
    path.parent.mkdir(exist_ok=True)
    with files.atomic(path) as f:
        f.write(text.encode())
    return revalue(cfg)


def tokens(run, chunks):
    """What each token of these chunks (of a show.run.Run) did to the targets, at the newest
    checkpoint: its step, and float64 (n, T, K) nats.

    Position t has read token t and predicts the next. A chunk's sum is its value in a step there,
    <x_i, h>, before what `adamw` corrects for by the batch; of pairs, in a step of chunks that have
    as many labels as all have on average. Two-pass rules need a batch: the
    one-pass rule of their optimizer stands for them.
    """
    cfg = Config(run=str(run.original), targets=run.cfg["targets"], data_dir=str(run.data.path))
    original = read(cfg)
    open_data(original)
    options, step = original.options, original.last
    targets = parse_targets(options.targets, run.data, options.block_size)
    book = store.read(original.path, "books")[step - 1]
    frozen = Frozen(options, run.data, targets, cfg.target_batch, exact_rows=False)
    frozen.restore(original.checkpoints[step], book)
    frozen.model.eval()
    scale = float(book["lr"] * book["kappa"])
    # what a label counts in a step of chunks that have as many labels as all have on average
    mean_labels = run.data.train.n_labels(options.block_size).mean()
    label_share = 1 / (options.batch * mean_labels)
    of_chunk = []
    for chunk in progress(chunks, "tokens", unit="chunk", leave=False, delay=2):
        tape = ghost.Tape()
        X, Y = run.data.train.batch([chunk], options.block_size)
        frozen.loss(X, Y, tape).backward()
        values = tape.values(each_token=True).double().cpu().numpy()
        share = labels.count(Y).sum() * label_share
        of_chunk.append(values * (scale * share))
        frozen.optimizer.zero_grad(set_to_none=True)
    return step, np.stack(of_chunk)


def main(cfg):
    if cfg.repair:
        return repair(cfg)
    folder = revalue(cfg)
    if parallel.rank():
        return
    following = command("python", "values.py", "top", str(folder))
    if cfg.hindsight:
        run = open_run(folder, cfg.data_dir)
        for line in tables.end_of_hindsight(findings.of_opened(run), hindsight.read(run)):
            say(line)
    say(f"values for {cfg.targets or 'its own targets'} -> {folder}; next: {following}")


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)), leave=parallel.leave)
