"""Checkpoints: whole tensors, so that any number of ranks can go on, sharded or not."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import ledger
from ledger import atomic, claim, crc32
from parallel import full, is_sharded, on_rank_0, rank


def load_optimizer(optimizer, state):
    """An optimizer's state_dict of whole tensors -> the optimizer's, laid out as its parameters are."""
    optimizer.load_state_dict(state)
    for p, entries in optimizer.state.items():
        for name, t in entries.items():
            if is_sharded(p) and t.shape == p.shape:
                from torch.distributed.tensor import distribute_tensor

                entries[name] = distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)


def find_checkpoints(run):
    """ckpt.pt, the newest, and ckpt-<step>.pt, those before it: paths, the newest first."""
    older = [path for path in run.glob("ckpt-*.pt") if path.stem[5:].isdigit()]
    return [path for path in (run / "ckpt.pt", *sorted(older, key=lambda path: -int(path.stem[5:]))) if path.is_file()]


def read_checkpoint(path):
    """What Checkpoints wrote. Raises ValueError if a byte of it is not what was written: torch.load would not always see that."""
    size = path.stat().st_size - 8
    with open(path, "rb") as f:
        f.seek(max(0, size))
        if f.read() != b"%08x" % crc32(path, size=size):
            raise ValueError("it is damaged: its checksum does not fit")
    return torch.load(path, map_location="cpu", weights_only=True)


def whole(x, copied, done):
    """A nest of dicts, lists and tensors with every tensor whole: sharded ones on rank 0's host only, a copy on the host if copied. done: {}."""
    if isinstance(x, dict):
        return {key: whole(value, copied, done) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [whole(value, copied, done) for value in x]
    if not torch.is_tensor(x):
        return x
    if id(x) not in done:  # tied weights are one tensor
        t = full(x.detach())
        done[id(x)] = None if rank() else t.to("cpu", copy=copied) if copied or is_sharded(x) else t
    return done[id(x)]


class Checkpoints:
    """Takes a run's folder, writes its checkpoints, each whole or not at all, and keeps the last few."""

    def __init__(self, run, keep, background, used=None, step=0):
        """used: the checkpoint the run goes on from, of that step, if any; those that came after it, or all, are none of this run's.
        background: copy to the host's memory, and go on while a thread writes. Raises ValueError if another process has the folder."""
        self.run, self.keep, self.step, self.writing = run, keep, step, None
        self.pool = ThreadPoolExecutor(1) if background else None
        on_rank_0(lambda: self._take(used))

    def _take(self, used):
        self.lock = claim(self.run, "out_dir")  # as long as this object lives
        if used:
            os.replace(used, self.run / "ckpt.pt")
        for path in find_checkpoints(self.run):
            if not used or (path.stem != "ckpt" and int(path.stem[5:]) >= self.step):
                path.unlink()

    def write(self, step, content):
        """content: what to save, a nest of dicts, lists and tensors; every rank must call. Raises OSError if this one, or the one that was
        still being written, does not fit; what is on disk stays whole."""
        self.wait()
        content = whole(content, self.pool is not None, {})
        if rank() == 0:
            self.writing = self.pool.submit(self._write, step, content) if self.pool else self._write(step, content)

    def wait(self):
        if self.writing:
            self.writing.result()

    def _write(self, step, content):
        try:
            with atomic(self.run / "ckpt.pt", keep=self.run / f"ckpt-{self.step}.pt") as f:
                torch.save(content, f)
                f.flush()
                f.write(b"%08x" % crc32(f.name))  # behind the zip file's end, where torch.load does not look
        except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
            cause = e if isinstance(e, OSError) else e.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(f"{cause}. No checkpoint of step {step}; the one before it is whole: make room, then --init_from=resume") from e
        self.step = step
        for path in find_checkpoints(self.run)[self.keep :]:
            path.unlink()


# --- which to go on from ----------------------------------------------------------

# may differ between a run and its resumption; everything else would make the values belong to another run
MAY_CHANGE = """
out_dir data_dir keep init_from overwrite max_iters eval_interval eval_chunks log_interval checkpoint_interval keep_checkpoints background
wandb_log wandb_project wandb_run_name wandb_histogram_interval tensorboard_log device compile shard""".split()


def find_checkpoint(cfg, data):
    """Refuses what would be lost. Returns the path of the checkpoint to go on from, the newest that is whole, or None."""
    out, resume = Path(cfg.out_dir), cfg.init_from != "scratch"
    found = find_checkpoints(out)
    if cfg.init_from == "auto":
        resume = (out / "config.json").is_file()
    if not resume:
        if (found or (out / "values.npy").exists()) and not cfg.overwrite:
            raise ValueError(f"{out} already holds a run: --init_from=resume goes on, --overwrite starts over, --out_dir=... goes elsewhere")
        return None
    if not (out / "config.json").is_file():
        raise ValueError(f"nothing to resume in {out}: name the run's folder with --out_dir=..., or leave out --init_from")
    for path in found:
        try:
            checkpoint = read_checkpoint(path)
            ledger.check(out, checkpoint["valuation"].get("records", {}))
        except ValueError as e:
            print(f"{path} cannot be used, {e}: trying the one before it")
            continue
        check_resumption(cfg, data, checkpoint)
        return path
    if found:
        raise ValueError(f"no checkpoint in {out} is whole: --overwrite starts over")
    print(f"{out} has no checkpoint yet: starting at step 0")


def check_resumption(cfg, data, checkpoint):
    """Raises ValueError where this configuration would go on with another run's values."""
    was, product = checkpoint["config"], lambda had: had["batch_size"] * had["gradient_accumulation_steps"]
    free = [*MAY_CHANGE, *("batch_size gradient_accumulation_steps".split() if product(was) == product(vars(cfg)) else ())]
    for key, had in was.items():
        if getattr(cfg, key) != had and key not in free:
            raise ValueError(f"--{key}={getattr(cfg, key)}, but {cfg.out_dir} was run with {key}={had}: type --{key}={had}, or another --out_dir")
    if checkpoint["data_hash"] != data.hash:
        raise ValueError(f"{data.path} is not the data of {cfg.out_dir} (its hash differs): name the run's data with --data_dir=...")
    if checkpoint.get("keep") != ledger.crc(data.keep):
        raise ValueError(f"--keep={cfg.keep} does not name the chunks that {cfg.out_dir} was trained on: type --keep={was.get('keep', '')}")
