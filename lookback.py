"""Hindsight for a run on disk: its steps are taken again, segment by segment from the last one to
the first, and each is taken back (shapley/hindsight.py).

A segment is as many steps as the memory that the user allows can hold. Its first state comes from a
checkpoint of the run, or from a state that was laid on the way there. What is done lies in the
folder `<name>.partial`: the records of each segment, and the adjoints at the border. So a process
that was killed at any moment goes on there, and ends in the same bytes.

The steps are taken without the values of the run (ghost ops add up in another order), in the run's
own precision. How far their losses are from the run's is said. The differences are in float32, or
in float64 where the run is.
"""

import json
import time
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import torch
from torch.nn import functional as F

import train
from shapley import hindsight, labels
from shapley.counterfactual import agreement, draw_sets, sums_of_sets, train_without
from shapley.replay import Training, state_of
from shapley.targets import Targets
from system import files, parallel, store
from system.checkpoints import (
    fitting,
    load_optimizer,
    read_checkpoint,
    read_tensors,
    write_tensors,
)
from system.errors import UserError
from system.folder import REVALUATION, REVALUATION_FILES, remove_revaluation
from system.machine import rng_state, set_rng_state
from system.needs import memory_here
from system.terminal import progress, say
from system.writer import Writer
from valuation import Settings

GB = 1e9
SHARE = 0.25  # of the device's memory that steps may take, where --memory does not say
SWEEP = "sweep.pt"  # the adjoints where the sweep stands
CHECK = "check.npz"  # the losses that a check has found so far
LEFTOVERS = [SWEEP, "state-*.pt", "segment-*.npz"]  # of a sweep, once it is done
TOKENS = 2**14  # of a target that are computed at a time
CLOSE = 1e-4  # nats: losses of float32, added up in another order
MEANING = (
    "the drop of the target's loss {when} that each visit is worth, at the margin, with the steps "
    "in between as they were; they rank visits, and their sum says nothing: AdamW undoes a common "
    "scaling of all gradients, so it is about 0"
)


@dataclass
class Segment:
    """Steps that are recorded and taken back together."""

    first: int
    end: int
    base: int  # the checkpoint that its first state comes from


def plan(start, end, bases, n_steps):
    """The segments of steps start to end, in their order. bases: steps whose states are on disk;
    n_steps: the most that a segment may hold."""
    segments = []
    borders = sorted({start, end, *(base for base in bases if start < base < end)})
    for first, last in pairwise(borders):
        base = max(base for base in bases if base <= first)
        for begin in range(first, last, n_steps):
            segments.append(Segment(begin, min(begin + n_steps, last), base))
    return segments


class WholeTargets(Targets):
    """Targets of which all chunks speak, in their order."""

    def picks(self, k, step):
        return np.arange(len(self.targets[k]))

    def describe(self, k):
        return {**super().describe(k), "drawn": "all of the target's chunks"}


class Rerun:
    """A run's training, to be entered at any state that is on disk, and its targets, of which all
    chunks speak."""

    def __init__(self, original, data, targets, folder):
        """original: revalue.Original. folder: where states are laid."""
        self.original, self.data, self.folder = original, data, folder
        self.options = options = original.options
        self.device_type = options.device.split(":")[0]
        torch.backends.cuda.matmul.allow_tf32 = False  # differences would drown in rounding
        torch.backends.cudnn.allow_tf32 = False
        self.model = train.build_model(options, data, options.device)
        self.first_rng = rng_state()  # as train.py's after the same call
        self.optimizer = train.build_optimizer(options, self.model)
        is_low = options.dtype == "bfloat16"
        self.training = Training(
            self.model,
            self.optimizer,
            lambda X, Y: self.chunk_losses(X, Y, is_low),
            self.batch,
            lambda step: train.get_lr(options, step),
            options.batch,
            options.grad_clip,
            options.batch_size,
            precise_losses=self.chunk_losses,
            shares=lambda Y: labels.shares(labels.count(Y)),
        )
        self.n_targets = len(targets)
        settings = Settings(micro_batch=max(options.batch_size, TOKENS // options.block_size))
        weights = self.training.weights
        self.targets = WholeTargets(targets, weights, self.loss, settings, lambda: None)
        self.initial = [p.data.cpu().clone() for p in weights.params]

    def batch(self, step):
        ids = self.data.ids(step, self.options.batch, self.options.seed)
        return ids, *self.data.train.batch(ids, self.options.block_size)

    def to_device(self, *arrays):
        return [torch.as_tensor(a, device=self.options.device) for a in arrays]

    def chunk_losses(self, X, Y, is_low=False):
        """Each chunk's mean token loss (b,), float64: in float32 the mean would be rounded. 0 of a
        chunk without a label."""
        x, y = self.to_device(X, Y)
        with torch.amp.autocast(self.device_type, torch.bfloat16, enabled=is_low):
            logits = self.model.lm_head(self.model.features(x))
            of_token = F.cross_entropy(
                logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none"
            )
        return of_token.view(y.shape).double().sum(1) / labels.count(y).clamp(min=1)

    def loss(self, X, Y):
        return self.model(*self.to_device(X, Y))[1]

    # --- states -------------------------------------------------------------------

    def laid(self, step):
        return self.folder / f"state-{step}.pt"

    def enter(self, step):
        """The training as it stood before a step: of a checkpoint, of a state that was laid, or of
        the run's beginning."""
        if step == 0:
            for p, weight in zip(self.training.weights.params, self.initial):
                p.data.copy_(weight)
            self.optimizer.state.clear()
            set_rng_state(self.first_rng)
            if parallel.rank():
                torch.manual_seed(self.options.seed + parallel.rank())
            return
        path = self.original.checkpoints.get(step)
        if path:
            content = read_checkpoint(path)
        else:
            path = self.laid(step)
            content = read_tensors(path)
        with fitting(path):
            self.model.load_state_dict(content["model"])
            load_optimizer(self.optimizer, content["optimizer"])
            if parallel.rank() < len(content["rng"]):
                set_rng_state(content["rng"][parallel.rank()])

    def lay(self, step):
        """Writes the state as it is now, before a step."""
        rng = parallel.gather_objects(rng_state())
        if parallel.rank():
            return
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": rng,
        }
        with files.atomic(self.laid(step)) as file:
            write_tensors(file, content)

    def has(self, step):
        return step == 0 or step in self.original.checkpoints or self.laid(step).exists()

    def bytes_of_step(self):
        """What the record of a step takes."""
        copies = 4 if self.options.optimizer == "adamw" else 2
        return copies * sum(p.nbytes for p in self.training.weights.params)

    def steps_in(self, memory):
        """How many steps a segment may hold. memory: bytes for steps and adjoints. Raises
        UserError where it is not one."""
        weights = sum(p.nbytes for p in self.training.weights.params)
        adjoints = (3 * self.n_targets + 4) * weights  # and h, two places, a gradient
        n_steps = int((memory - adjoints) // self.bytes_of_step())
        if n_steps < 1:
            needed = (adjoints + self.bytes_of_step()) / GB
            given = memory / GB
            raise UserError(f"--memory={given:.3g}: a step needs {needed:.3g} GB here: write more")
        return n_steps


# --- the sweep --------------------------------------------------------------------


class Sweep:
    """How far back the sweep has come: what of it is on disk after every segment.

    step: the steps before it are left. adjoints: of each target (shapley.hindsight.Adjoint), of the
    state before that step; empty at the run's end. loss: the targets' at the end (K,), nats.
    """

    def __init__(self, rerun, end):
        self.path = rerun.folder / SWEEP
        self.step, self.adjoints, self.loss = end, [], None
        if self.path.exists():
            content = read_tensors(self.path)
            self.step, self.loss = content["step"], content["loss"]
            for of_target in content["adjoints"]:
                moved = {name: rerun.to_device(*tensors) for name, tensors in of_target.items()}
                self.adjoints.append(hindsight.Adjoint(**moved))

    def save(self, step):
        self.step = step
        if parallel.rank():
            return
        content = {"step": step, "loss": self.loss, "adjoints": [vars(a) for a in self.adjoints]}
        with files.atomic(self.path) as file:
            write_tensors(file, content)


def look_back(cfg, original, data, targets, folder, end, about):
    """Hindsight of the run's visits from cfg.start to end, into a folder. Returns what values.json
    says of it, beside what every revaluation says."""
    began = time.monotonic()
    partial = folder.with_name(folder.name + ".partial")
    question = {
        **about,
        "steps": [cfg.start, end],
        "horizon": cfg.horizon,
        "checksums": [target.checksum() for target in targets],
    }
    claim = SharedClaim(partial)
    parallel.on_rank_0(lambda: begin(partial, question))
    rerun = Rerun(original, data, targets, partial)
    n_steps = rerun.steps_in(cfg.memory * GB or SHARE * memory_here(rerun.options.device))
    sweep = Sweep(rerun, end)
    bases = [base for base in (0, *original.checkpoints) if base < end]
    segments = plan(cfg.start, sweep.step, bases, n_steps)
    n_passes = (1 + 2 * rerun.n_targets) * (sweep.step - cfg.start) + steps_to_lay(segments)
    with progress(total=n_passes, desc="looking back", unit="pass", disable=is_quiet()) as bar:
        for i in reversed(range(len(segments))):
            segment = segments[i]
            if not rerun.has(segment.first):
                lay_states(rerun, segments[: i + 1], bar)
            take_back(rerun, segment, sweep, end, cfg.horizon, bar)
            if parallel.rank() == 0:
                rerun.laid(segment.end).unlink(missing_ok=True)
    # of a sweep that nobody killed: forward and backward passes for each step of the run
    whole = steps_to_lay(plan(cfg.start, end, bases, n_steps))
    passes = 1 + 2 * rerun.n_targets + whole / (end - cfg.start)
    info = {
        "of": about["of"],
        "method": about["method"],
        "horizon": cfg.horizon,
        "steps": [cfg.start, end],
        "passes_per_step": passes,
        "loss_at_end": dict(zip(about["targets"], sweep.loss)),
        "meaning": meaning(cfg.horizon),
    }
    info = parallel.on_rank_0(lambda: finish(rerun, partial, folder, info))
    claim.release(folder)
    took = time.monotonic() - began
    if parallel.rank() == 0:
        say(f"{passes:.2f} forward and backward passes a step, {took:.0f} s")
    return info


def meaning(horizon):
    when = f"up to {horizon} steps later" if horizon else "at the end of the run"
    return MEANING.format(when=when)


def is_quiet():
    return parallel.rank() > 0


class SharedClaim:
    """The first process's claim on a folder, with the others waiting for it (files.Claim)."""

    def __init__(self, folder):
        self.claim = None
        parallel.on_rank_0(lambda: self.take(folder))

    def take(self, folder):
        self.claim = files.Claim(folder, "name")

    def release(self, folder):
        """folder: where it is now."""
        if self.claim:
            self.claim.release()
            (folder / "lock").unlink()


def begin(partial, question):
    """The folder of what is not finished. What another question left there is removed."""
    files.refuse_strangers(partial, REVALUATION_FILES, "write another --name")
    path = partial / REVALUATION
    if not path.exists() or files.read_json(path, "remove its folder") != question:
        for old in list(partial.iterdir()):
            if old.name != "lock":
                old.unlink()
        files.write_json(path, question)


def steps_to_lay(segments):
    """How many steps are taken only to reach the states that segments begin with."""
    last = {}  # {base: the last state that is reached from it}
    for segment in segments:
        last[segment.base] = segment.first
    return sum(first - base for base, first in last.items())


def lay_states(rerun, segments, bar):
    """Lays the states that segments begin with which have the base of the last of them."""
    last = segments[-1]
    wanted = {segment.first for segment in segments if segment.base == last.base}
    rerun.enter(last.base)
    for step in range(last.base, last.first):
        if step in wanted and not rerun.has(step):
            rerun.lay(step)
        rerun.training.take(step)
        bar.update()
    rerun.lay(last.first)


def take_back(rerun, segment, sweep, end, horizon, bar):
    """Records a segment's steps and takes them back. Leaves their records on disk."""
    training, weights = rerun.training, rerun.training.weights
    rerun.enter(segment.first)
    past = []
    for step in range(segment.first, segment.end):
        past.append(training.record(step))
        bar.update()
    after = [p.data.clone() for p in weights.params]
    visits, books, norms = [], [], []
    while past:
        step = past.pop()
        if not sweep.adjoints or (horizon and (end - 1 - step.number) % horizon == 0):
            with weights.at(after):
                start_adjoints(rerun, sweep, bool(step.moments))
        norms.append([adjoint.norm() for adjoint in sweep.adjoints])
        values = []
        for adjoint in sweep.adjoints:
            values.append(parallel.gather(hindsight.back(training, step, adjoint)).cpu().numpy())
            bar.update(2)
        losses = parallel.gather(step.losses).cpu().numpy()
        visits.append(visit_records(step, losses, np.stack(values, 1)))
        books.append(book_record(step, step.shares @ losses, rerun.n_targets))
        after = step.weights
    if parallel.rank() == 0:
        with files.atomic(rerun.folder / f"segment-{segment.first}.npz") as file:
            np.savez(
                file,
                visits=np.concatenate(visits[::-1]),
                books=np.concatenate(books[::-1]),
                norms=np.array(norms[::-1]),
            )
    sweep.save(segment.first)


def start_adjoints(rerun, sweep, has_moments):
    """The adjoints anew, from the targets' gradients at the weights as they are."""
    sweep.adjoints, losses = [], []
    for k in range(rerun.n_targets):
        loss, gradient = rerun.targets.gradient(k, 0)
        sweep.adjoints.append(hindsight.Adjoint.of_end(gradient, has_moments))
        losses.append(float(loss))
    if sweep.loss is None:
        sweep.loss = losses


def visit_records(step, losses, values):
    """A step's records for ledger.npy (B,). losses (B,), values (B, K)."""
    visits = np.zeros(len(step.ids), store.visit_dtype(values.shape[1]))
    visits["step"] = step.number
    visits["chunk"] = step.ids
    visits["loss"] = losses
    visits["value"] = values
    visits["grad_norm"] = np.nan
    if not np.isfinite(values).all():
        what = f"hindsight of step {step.number} is not finite: |dL/dw| has exploded"
        raise UserError(f"{what}. Look back less far: --start={step.number + 1}, or --horizon=100")
    return visits


def book_record(step, loss, n_targets):
    """A step's record for books.npy (1,). loss: of the batch."""
    entries = {
        "step": step.number,
        "lr": step.lr,
        "kappa": step.clip_coef,
        "loss": loss,
    }
    return store.record(store.book_dtype(n_targets), entries)


def finish(rerun, partial, folder, info):
    """The segments become the files of a revaluation, in its folder. Returns info, with what is
    approximate."""
    parts = [np.load(path) for path in partial.glob("segment-*.npz")]
    parts.sort(key=lambda part: part["visits"]["step"][0])
    visits = np.concatenate([part["visits"] for part in parts])
    books = np.concatenate([part["books"] for part in parts])
    norms = np.concatenate([part["norms"] for part in parts])
    is_early = hindsight.early(norms, info["horizon"]).any(1)
    visits["early"] = np.repeat(is_early, rerun.options.batch)
    info["approximate"] = compared(rerun.original, visits)
    n_chunks = len(rerun.data.train.rows)
    about = {"data_hash": rerun.data.hash}
    writer = Writer(partial, n_chunks, rerun.n_targets, about=about, adjoints=True)
    writer.add(visits, books, adjoint=adjoint_records(books["step"], norms))
    described = [rerun.targets.describe(k) for k in range(rerun.n_targets)]
    rule = {"rule": "hindsight", "batch": rerun.options.batch, "targets": described}
    writer.commit(info["steps"][1], {**rule, **info})
    settings = train.run_settings(rerun.options)
    files.write_json(partial / "config.json", {"config": settings})
    if folder.exists():
        remove_revaluation(folder)
    partial.rename(folder)
    # last, for without them what is written would have to be computed again
    for pattern in LEFTOVERS:
        for path in folder.glob(pattern):
            path.unlink()
    return info


def adjoint_records(steps, norms):
    """Records for adjoint.npy (n_steps,). norms (n_steps, K)."""
    records = np.zeros(len(steps), store.adjoint_dtype(norms.shape[1]))
    records["step"] = steps
    records["norm"] = norms
    return records


def compared(original, visits):
    """What values.json says is approximate, where the steps as taken again had other losses than
    the run's, or nothing is known of them."""
    if original.options.rule == "off":
        return "a run with --rule=off has no ledger to hold the steps taken again against"
    rows = store.read(original.path)
    first = np.searchsorted(rows["step"], visits["step"][0])
    rows = rows[first : first + len(visits)]
    if not np.array_equal(rows["chunk"], visits["chunk"]):
        raise UserError(f"{original.path}/ledger.npy names other chunks than the steps taken again")
    difference = float(np.abs(rows["loss"] - visits["loss"]).max())
    close = f"within {difference:.1e} nats"
    say(f"took {len(visits):,} visits again: their losses are the run's {close}")
    if difference < CLOSE:
        return None
    return f"the losses of the steps as they were taken again are the run's only {close}"


# --- the truth ----------------------------------------------------------------------


def check(cfg, original, data, targets, folder):
    """Trains again without cfg.check random sets of visits, and says in the folder's values.json
    how well hindsight predicts what that does to the targets' losses; and beside it what the run
    itself knew of its visits. Returns that."""
    info = files.read_json(folder / "values.json", "type it again without --check", {"steps": list})
    _, end = info["steps"]
    rows = store.read(folder)
    first = int(rows["step"][0])
    if rows["early"].any():
        first = int(rows["step"][rows["early"] == 1].max()) + 1
    batch = original.options.batch
    visits = np.arange(first * batch, end * batch)
    about = {"sets": cfg.check, "fraction": cfg.check_fraction, "first_step": first}
    sets = draw_sets(cfg.check, visits, cfg.check_fraction, original.options.seed)
    with_all, rises = retrain(original, data, targets, folder, about, sets, end)
    offset = int(rows["step"][0]) * batch  # of the folder's first row among the run's visits
    found = {}
    for k, target in enumerate(targets):
        scores = scores_of(original, rows, k, target.name)
        found[target.name] = {"loss": with_all[k]}
        for name, of_visit in scores.items():
            predicted = sums_of_sets(of_visit, [some - offset for some in sets])
            found[target.name][name] = as_entry(agreement(predicted, rises[:, k]), name)
    info["check"] = {**about, "targets": found}
    parallel.on_rank_0(lambda: files.write_json(folder / "values.json", info))
    parallel.on_rank_0(lambda: (folder / CHECK).unlink(missing_ok=True))
    return info


def retrain(original, data, targets, folder, about, sets, end):
    """-> the targets' losses at the end (K,), and their rises without each set (n_sets, K)."""
    claim = SharedClaim(folder)
    rerun = Rerun(original, data, targets, folder)
    first = about["first_step"]
    base = max(base for base in (0, *original.checkpoints) if base <= first)
    rerun.enter(base)
    for step in range(base, first):
        rerun.training.take(step)
    state = state_of(rerun.training)
    losses = read_losses(folder / CHECK, about)  # without nothing, then without each set
    for left_out in progress(
        [(), *sets][len(losses) :],
        "training again",
        initial=len(losses),
        total=1 + len(sets),
        unit="run",
        disable=is_quiet(),
    ):
        train_without(rerun.training, state, left_out, first, end)
        losses.append(rerun.targets.losses(0).tolist())
        if parallel.rank() == 0:
            with files.atomic(folder / CHECK) as file:
                np.savez(file, losses=np.array(losses), about=json.dumps(about))
    claim.release(folder)
    return losses[0], np.array(losses[1:]) - losses[0]


def read_losses(path, about):
    """The losses that a check which was killed had found, [] if it was none of this question."""
    if not path.exists():
        return []
    saved = np.load(path)
    return saved["losses"].tolist() if str(saved["about"]) == json.dumps(about) else []


def scores_of(original, rows, k, name):
    """{name: score of each visit (n_visits,)} that is held against the truth: the hindsight in
    rows, and what the run itself knew of the same visits."""
    scores = {"hindsight": rows["value"][:, k], "training loss": -rows["loss"]}
    if original.options.rule == "off":
        return scores
    own = store.read(original.path)
    first = np.searchsorted(own["step"], rows["step"][0])
    own = own[first : first + len(rows)]
    names = list(original.newest["valuation"].get("targets", {}))
    if name in names:
        values = own["value"][:, names.index(name)].astype(float)
        by_step = np.abs(values.reshape(-1, original.options.batch)).sum(1)
        scores["value in its step"] = values
        scores["share of its step"] = values / np.repeat(by_step, original.options.batch)
    return scores


def as_entry(found, name):
    """An Agreement for values.json. Only what is in nats has a slope, and JSON knows no NaN."""
    entry = {key: value for key, value in asdict(found).items() if not np.isnan(value)}
    del entry["n_sets"]
    if name in ("share of its step", "training loss"):
        entry.pop("slope", None)
        entry.pop("slope_error", None)
    return entry
