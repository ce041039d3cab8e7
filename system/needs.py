"""What a run needs of its machine, estimated before it begins: data, memory, disk.

Memory is estimated from below, so that nothing is refused that would work: weights, gradients,
AdamW's moments, the targets' directions, the means of their gradients, what a micro-batch keeps for
its backward pass, and the tokens of a step. A run takes more than that, often twice as much.
"""

import os
import shutil
from pathlib import Path

import torch

from system import store
from system.errors import UserError

GB = 1e9
KEPT = 8  # numbers that a layer keeps for its backward, for each token and each of its n_embd
LAYER = 20_000  # bytes of a layer's own objects: there may be a billion layers of nothing
CGROUP = Path("/sys/fs/cgroup/memory.max")  # the limit of a container


def parameters(cfg, vocab_size):
    """How many numbers a train.Config's model has, but for biases and norms."""
    tables = 1 if cfg.tie_weights else 2
    embeddings = (tables * vocab_size + cfg.block_size) * cfg.n_embd
    return embeddings + 12 * cfg.n_layer * cfg.n_embd**2


def memory(cfg, vocab_size, n_targets, processes):
    """The bytes that each process needs on its device, at least."""
    word = 8 if cfg.dtype == "float64" else 4
    copies = 2  # weights and gradients
    if cfg.optimizer == "adamw":
        copies += 2  # its moments
    copies += n_targets
    if cfg.rule in ("sgd2", "adamw2"):
        copies += 1  # the batch's gradient beside the targets'
    if cfg.target_smoothing:
        copies += 2 * n_targets  # the means of their gradients, and the directions of these
    of_weights = word * copies * parameters(cfg, vocab_size)
    if cfg.shard:
        of_weights //= processes
    micro_batch = min(cfg.batch_size, cfg.batch // processes)
    kept_word = 2 if cfg.dtype == "bfloat16" else word
    per_token = kept_word * KEPT * cfg.n_layer * cfg.n_embd
    of_tokens = 2 * 8 * cfg.batch * cfg.block_size  # X and Y, int64
    of_micro_batch = micro_batch * cfg.block_size * per_token
    return of_weights + of_micro_batch + of_tokens + LAYER * cfg.n_layer


def n_processes():
    """As torchrun says it, before they have met."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def memory_here(device):
    """The bytes of a device's memory: a GPU's, or what this process may use of the machine's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CGROUP.is_file():
        limit = CGROUP.read_text().strip()
        if limit.isdigit():  # else "max"
            here = min(here, int(limit))
    return here


def check_memory(cfg, vocab_size=0, n_targets=0):
    """Raises UserError where the device cannot hold the run. vocab_size: 0 while it is unknown."""
    needed = memory(cfg, vocab_size, n_targets, n_processes())
    here = memory_here(cfg.device)
    if needed <= here:
        return
    sizes = f"--n_layer={cfg.n_layer} --n_embd={cfg.n_embd} --batch_size={cfg.batch_size}"
    room = f"over {needed / GB:,.0f} GB of memory, and {cfg.device} has {here / GB:,.0f}"
    cure = "write smaller numbers, or begin with configs/small.py"
    raise UserError(f"{sizes} needs {room}: {cure}")


def check_batch(cfg, n_chunks):
    """Raises UserError where a step holds more chunks than there are to train on."""
    if cfg.batch <= n_chunks:
        return
    options = f"--batch_size={cfg.batch_size}"
    if cfg.gradient_accumulation_steps > 1:
        options += f" --gradient_accumulation_steps={cfg.gradient_accumulation_steps}"
    what = f"{options}: a step of {cfg.batch:,} chunks, and there are {n_chunks:,} to train on"
    cure = f"write --batch_size={max(1, n_chunks // 8)}"
    if cfg.gradient_accumulation_steps > 1:
        cure += " --gradient_accumulation_steps=1"
    raise UserError(f"{what}, so that one would be in it twice: {cure}, or prepare more text")


def disk(cfg, vocab_size, n_targets, n_chunks):
    """The bytes that a run's folder holds at most, after all its steps."""
    word = 8 if cfg.dtype == "float64" else 4
    copies = 3 if cfg.optimizer == "adamw" else 1  # weights and moments
    if cfg.target_smoothing:
        copies += n_targets  # the means of their gradients
    checkpoint = word * copies * parameters(cfg, vocab_size)
    kept = cfg.keep_checkpoints
    if cfg.hindsight:
        kept = -(-cfg.max_iters // cfg.checkpoint_interval)
    total = checkpoint * (kept + 1)  # one more while it is written
    if n_targets:
        visits = store.visit_dtype(n_targets, cfg.target_smoothing > 0).itemsize * cfg.batch
        books = store.book_dtype(n_targets).itemsize
        total += (visits + books) * cfg.max_iters
        total += 2 * 4 * n_targets * n_chunks  # values.npy, twice while it is written
    return total


def expected(cfg, folder, vocab_size, n_targets, n_chunks):
    """Lines that say what a run will need, and a warning where the disk has no room for it.

    folder: the run's, which is there."""
    needed = memory(cfg, vocab_size, n_targets, n_processes())
    here = memory_here(cfg.device)
    on_disk = disk(cfg, vocab_size, n_targets, n_chunks)
    there = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    free = shutil.disk_usage(folder).free
    of_memory = f"at least {size(needed)} of memory ({size(here)} here)"
    of_disk = f"up to {size(on_disk)} of disk ({size(free)} free)"
    lines = [f"needs {of_memory}, {of_disk}"]
    if on_disk - there > free:
        cure = "make room, or write --keep_checkpoints=1, fewer --max_iters, another --out_dir"
        lines.append(f"warning: the disk of {folder} will be full before the run ends: {cure}")
    return lines


def size(n_bytes):
    """Bytes as people say them: 3 MB, 1.5 GB, 240 GB."""
    if n_bytes < GB:
        return f"{max(1, round(n_bytes / 1e6))} MB"
    if n_bytes < 10 * GB:
        return f"{n_bytes / GB:.1f} GB"
    return f"{n_bytes / GB:,.0f} GB"
