"""Checkpoints: whole tensors, so that any number of ranks can go on, sharded or not."""

import contextlib
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from system import store
from system.errors import UserError
from system.files import atomic, check_entries, crc32, data_of, read_json, short
from system.parallel import full, is_sharded, rank
from system.terminal import command, say, warn
from system.trainers import refuse_trainers

STARTS = ("init_from", "overwrite", "verify", "out_dir")  # settings of a start, not of a run
NONE = type(None)
ENTRIES = {  # of a checkpoint, and their types
    "model": dict,
    "optimizer": dict,
    "model_args": dict,
    "iter_num": int,
    "best_val_loss": float,
    "config": dict,
    "valuation": dict,
    "data_hash": str,
    "tokenizer": str,
    "keep": (int, NONE),
    "rng": list,
    "evaluations": str,
    "wandb_id": (str, NONE),
}
OF_VALUATION = {"records": dict, "targets": dict}
CURE = "take another checkpoint, or one from a source you trust"
BATCH = ("batch_size", "gradient_accumulation_steps")
MALFORMED = (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError)

# --- reading ----------------------------------------------------------------------


def find_checkpoints(run):
    """ckpt.pt, the newest, and ckpt-<step>.pt, those before it: paths, the newest first."""
    older = [path for path in run.glob("ckpt-*.pt") if path.stem[5:].isdigit()]
    older.sort(key=lambda path: -int(path.stem[5:]))
    return [path for path in (run / "ckpt.pt", *older) if path.is_file()]


def write_tensors(file, content):
    """Writes a nest of dicts, lists and tensors into an open file, its checksum last."""
    torch.save(content, file)
    file.flush()
    file.write(b"%08x" % crc32(file.name))  # behind the zip file's end, unseen by torch.load
    file.flush()


def read_tensors(path):
    """What write_tensors wrote, memmapped. Raises UserError where a byte of it is not what was
    written (torch.load would not always see that), or a stranger made it of something else."""
    size = path.stat().st_size - 8
    with open(path, "rb") as f:
        f.seek(max(0, size))
        if f.read() != b"%08x" % crc32(path, size=size):
            raise UserError(f"{path} is damaged: its checksum does not fit")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as e:  # its text says how to load it all the same: not here
        what = "holds more than weights and numbers: loading it would run code of whoever made it"
        raise UserError(f"{path} {what}. It is not loaded: {CURE}") from e
    except (*MALFORMED, EOFError, OSError) as e:
        raise UserError(f"{path} is no checkpoint ({short(e)}): {CURE}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} is no checkpoint (it holds a {type(content).__name__}): {CURE}")
    return content


def read_checkpoint(path):
    """What Checkpoints wrote, memmapped. Raises UserError as read_tensors does, and where it is no
    checkpoint of this program."""
    content = read_tensors(path)
    check_entries(content, ENTRIES, path, CURE)
    if content["valuation"]:  # it is empty with --rule=off
        check_entries(content["valuation"], OF_VALUATION, path, CURE)
    if not all_finite(content["model"]):
        raise UserError(f"{path} has weights that are not finite: {CURE}")
    return content


def all_finite(weights):
    return all(bool(torch.isfinite(w).all()) for w in weights.values() if torch.is_tensor(w))


@contextlib.contextmanager
def fitting(path):
    """What cannot be made of a checkpoint's content becomes one line for the user."""
    try:
        yield
    except UserError:
        raise
    except MALFORMED as e:
        raise UserError(f"{path} does not fit this program ({short(e)}): {CURE}") from e


def load_optimizer(optimizer, state):
    """An optimizer's state_dict of whole tensors -> the optimizer's, laid out as its parameters."""
    optimizer.load_state_dict(state)
    for p, entries in optimizer.state.items():
        for name, t in entries.items():
            if is_sharded(p) and t.shape == p.shape:
                from torch.distributed.tensor import distribute_tensor

                entries[name] = distribute_tensor(
                    t, p.device_mesh, p.placements, src_data_rank=None
                )


# --- writing ----------------------------------------------------------------------


def whole(x, copy, done):
    """A nest of dicts, lists and tensors with every tensor whole, and numpy's numbers as Python's.
    A sharded tensor is put together in the memory of rank 0's host. copy: so are all others.
    done: {}."""
    if isinstance(x, dict):
        return {key: whole(value, copy, done) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [whole(value, copy, done) for value in x]
    if isinstance(x, np.generic):  # torch.load refuses them
        return x.item()
    if not torch.is_tensor(x):
        return x
    if id(x) not in done:  # tied weights are one tensor
        done[id(x)] = whole_tensor(x, copy)
    return done[id(x)]


def whole_tensor(t, copy):
    gathered = full(t.detach())
    if rank():
        return None
    if copy or is_sharded(t):
        return gathered.to("cpu", copy=copy)
    return gathered


class Checkpoints:
    """Writes a run's checkpoints, each whole or not at all, and keeps the last few."""

    def __init__(self, folder, keep, background, used=None, step=0):
        """folder: system.folder.RunFolder. keep: how many; None: all. used: the checkpoint of that
        step which the run goes on from, if any; those that came after it, or all, are none of this
        run's. background: copy to the host's memory, and go on while a thread writes."""
        self.folder, self.run = folder, folder.path
        self.keep, self.step = keep, step
        self.writing = None
        self.pool = ThreadPoolExecutor(1) if background else None
        folder.wait = self.wait
        if rank() == 0:
            self.forget_others(used)

    def forget_others(self, used):
        if used:
            os.replace(used, self.run / "ckpt.pt")
        for path in find_checkpoints(self.run):
            if not used or (path.stem != "ckpt" and int(path.stem[5:]) >= self.step):
                path.unlink()

    def write(self, step, content):
        """content: what to save, a nest of dicts, lists and tensors; every rank must call. Raises
        OSError if this one, or the one that was still being written, does not fit; what is on disk
        stays whole."""
        self.wait()
        content = whole(content, self.pool is not None, {})
        if rank():
            return
        if self.pool:
            self.writing = self.pool.submit(self.write_one, step, content)
        else:
            self.write_one(step, content)

    def wait(self):
        if self.writing:
            self.writing.result()

    def write_one(self, step, content):
        if not all_finite(content["model"]):
            what = f"the weights are not finite after step {step}: lower --learning_rate"
            raise UserError(f"{what}. The last checkpoint is whole")
        try:
            with atomic(self.run / "ckpt.pt", keep=self.run / f"ckpt-{self.step}.pt") as f:
                write_tensors(f, content)
                read_checkpoint(Path(f.name))  # before one that can be read is forgotten
        except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
            cause = e if isinstance(e, OSError) else e.__context__
            if not isinstance(cause, OSError):
                raise
            what = f"no checkpoint of step {step}; the one before it is whole"
            text = f"{cause.strerror}. {what[0].upper()}{what[1:]}"
            raise OSError(cause.errno, text, str(self.run / "ckpt.pt")) from e
        self.step = step
        too_many = find_checkpoints(self.run)[self.keep :] if self.keep else []
        for path in too_many:
            path.unlink()
        self.folder.forget_before()


# --- which to go on from ----------------------------------------------------------

# may differ between a run and its resumption; everything else would make the values belong to
# another run
MAY_CHANGE = (
    "out_dir",
    "data_dir",
    "pretrained",
    "keep",
    "max_iters",
    "eval_interval",
    "eval_chunks",
    "log_interval",
    "checkpoint_interval",
    "keep_checkpoints",
    "hindsight",
    "background",
    "wandb_log",
    "wandb_project",
    "wandb_run_name",
    "wandb_histogram_interval",
    "device",
    "compile",
    "shard",
)


def settings_of(path):
    """A run's config.json -> its settings, for the folder it lies in now. Where it is damaged they
    come from the newest checkpoint that is whole. Raises UserError where there is none."""
    folder = path.parent
    try:
        settings = read_json(path, "name another", {"config": dict}, unsealed=True)["config"]
    except UserError as e:
        settings = saved_settings(folder)
        if settings is None:
            raise
        warn(f"{e.args[0].rpartition(':')[0]}: its settings are those of the checkpoint beside it")
    settings = store.ADDED | store.without_removed(settings, path)
    for key in STARTS:
        settings.pop(key, None)
    settings["out_dir"] = str(folder)
    if settings.get("data_dir"):
        settings["data_dir"] = str(data_of(folder, settings["data_dir"]))
    if settings.get("keep") and (folder / "chunks.npy").is_file():
        settings["keep"] = str(folder / "chunks.npy")
    return settings


def saved_settings(folder):
    for path in find_checkpoints(folder):
        with contextlib.suppress(UserError):
            return read_checkpoint(path)["config"]
    return None


def find_checkpoint(cfg, data, targets):
    """Refuses what would be lost. Returns the path of the checkpoint to go on from, the newest that
    is whole, or None."""
    out = Path(cfg.out_dir)
    checkpoints = find_checkpoints(out)
    has_config = (out / "config.json").is_file()
    starts = cfg.init_from == "scratch" or (cfg.init_from == "auto" and not has_config)
    if starts:
        holds_run = checkpoints or (out / "values.npy").exists()
        if holds_run and not cfg.overwrite:
            ways = "--init_from=resume goes on, --overwrite starts over"
            raise UserError(f"{out} already holds a run: {ways}, --out_dir=... goes elsewhere")
        return None
    if not has_config and not checkpoints:
        cure = "name the run's folder with --out_dir=..., or leave out --init_from"
        raise UserError(f"nothing to resume in {out}: {cure}")
    refuse_trainers(out, "with which train.py cannot go on")
    for path in checkpoints:
        try:
            checkpoint = read_checkpoint(path)
            store.check(out, checkpoint["valuation"].get("records", {}))
        except UserError as e:
            say(f"{path} cannot be used ({e}): trying the one before it")
            continue
        check_resumption(cfg, data, targets, checkpoint, path)
        return path
    if checkpoints:
        cure = repair_or_start_over(out, checkpoints)
        raise UserError(f"no checkpoint in {out} is whole, or the rows it counts on: {cure}")
    say(f"{out} has no checkpoint yet: starting at step 0")
    return None


def repair_or_start_over(out, checkpoints):
    """What to type where no checkpoint can be used: if one is whole, only rows are damaged."""
    for path in checkpoints:
        with contextlib.suppress(UserError):
            step = read_checkpoint(path)["iter_num"]
            repair = command("python", "revalue.py", str(out), "--repair")
            what = f"the weights of step {step} are whole"
            return f"{what}; type: {repair}, which makes those rows again"
    return "--overwrite starts over"


def check_resumption(cfg, data, targets, checkpoint, path):
    """Raises UserError where this configuration would go on with another run's values."""
    out = cfg.out_dir
    settings = store.ADDED | store.without_removed(checkpoint["config"], path)
    may_change = {*MAY_CHANGE, *STARTS}
    if cfg.rule != "adamw":
        may_change.add("tolerance")  # which says nothing of other rules
    with fitting(path):
        if np.prod([settings.get(key) for key in BATCH]) == cfg.batch:
            may_change.update(BATCH)
    for key, had in settings.items():
        if not hasattr(cfg, key):
            what = f"{path} was written by another version (it has a setting {key!r})"
            raise UserError(f"{what}: {CURE}")
        now = getattr(cfg, key)
        if now != had and key not in may_change:
            what = f"--{key}={now}, but {out} was run with {key}={had}"
            raise UserError(f"{what}: type --{key}={had}, or another --out_dir")
    if checkpoint["data_hash"] != data.hash:
        what = f"{data.path} is not the data of {out} (its hash differs)"
        raise UserError(f"{what}: name the run's data with --data_dir=...")
    if checkpoint["keep"] != store.crc(data.keep):
        what = f"--keep={cfg.keep} does not name the chunks that {out} was trained on"
        raise UserError(f"{what}: type --keep={settings.get('keep', '')}")
    check_targets(targets, checkpoint["valuation"].get("targets", {}), out)


def check_targets(targets, had, out):
    """Raises UserError where a target's text has changed. had: {name: checksum} of a run."""
    for target in targets:
        if target.checksum() != had.get(target.name):
            what = f"the text of the target {target.name!r} is not the one that {out} was run with"
            raise UserError(f"{what}: put the old one back, or write another --out_dir")
