"""Several processes, started by torchrun, on one machine or many: who takes what, what is summed, who writes.

PyTorch's own engines do the work: DDP, where every process holds the whole model, or FSDP2 (`fully_shard`), where each
holds a slice of every parameter, of its moments and of its directions. Run alone, every function here does nothing.
"""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ledger import atomic, claim, crc32

SMALL = 2**20  # elements


def start(device):
    """Joins torchrun's other processes, if there are any. Returns the device of this one."""
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    kind = device.split(":")[0]
    if kind == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # NCCL for the GPUs, gloo for what never leaves the host, as whether to stop; a rank that is slow for an hour is only slow
    backend, timeout = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timedelta(hours=1)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # which may hold what processes before a restart left
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return device


def stop():
    """After the last use of the model: gloo sometimes aborts at exit where DDP's reducer outlives the group."""
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(n):
    """This rank's slice of 0..n-1: the slices in the order of the ranks are the whole. Raises ValueError where they would not be equal."""
    each, left = divmod(n, size())
    if left:
        raise ValueError(f"{size()} processes cannot share {n} chunks evenly: change --batch_size or --gradient_accumulation_steps")
    return slice(rank() * each, (rank() + 1) * each)


def add(tensors):
    """Sums each tensor over the ranks, in place, the small ones in one message. Returns them."""
    if size() > 1:
        small, large = ([t for t in tensors if (t.numel() < SMALL) == is_small] for is_small in (True, False))
        flat = [torch.cat([t.flatten() for t in small])] if small else []
        for work in [dist.all_reduce(t, async_op=True) for t in flat + large]:
            work.wait()
        for t, summed in zip(small, flat[0].split([t.numel() for t in small])) if small else ():
            t.copy_(summed.view_as(t))
    return tensors


def gather(tensor, dim=0):
    """The ranks' tensors, equal in shape, joined along dim in the order of the ranks: on every rank."""
    if size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)


def gather_objects(x):
    """[each rank's x], on every rank."""
    found = [x] * size()
    if size() > 1:
        dist.all_gather_object(found, x)
    return found


def on_rank_0(work):
    """What work() returns on rank 0, or the user's error that it raises there: on every rank."""
    result = error = None
    if rank() == 0:
        try:
            result = work()
        except (ValueError, OSError) as e:
            error = e
    result, error = gather_objects((result, error))[0]
    if error:
        raise error
    return result


def any_of(flag):
    """Whether the flag is up on some rank. On the host: no GPU is waited for."""
    return bool(add([torch.tensor(int(bool(flag)))])[0])


# --- the model ----------------------------------------------------------------


def replicate(model):
    """DDP: the gradients of the last micro-batch's backward become the ranks' mean."""
    if size() == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def shard(model, blocks, K):
    """FSDP2, in place: each rank keeps a slice of the rows of every parameter and of its direction, and the whole of a block exists
    only while it computes. K: the number of directions.

    A sharded parameter p has p.h, this rank's slice of its direction (K, rows, ...), and p.seen, the whole parameter as the
    layers see it, whose own .h is the whole direction. Raises ValueError where the ranks cannot share the rows evenly.
    """
    from torch.distributed.fsdp import fully_shard  # takes seconds to import, as whatever of torch knows DTensor
    from torch.distributed.tensor import Shard

    directions, olds = {}, dict(model.named_parameters())
    for name, p in olds.items():
        if len(p) % size():
            raise ValueError(f"--shard: {size()} processes cannot share the {len(p)} rows of {name}: choose sizes that are multiples of {size()}")
        if K:
            directions[p] = nn.Parameter(p.new_zeros(K, *p.shape), requires_grad=False)
    for module in list(model.modules()) if K else ():
        for name, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(name + "_h", directions[p])
    wholes, of_direction = {}, {id(h) for h in directions.values()}
    for module in (*blocks, model):
        fully_shard(module, reshard_after_forward=True, shard_placement_fn=lambda p: Shard(1) if id(p) in of_direction else None)
    sharded = dict(model.named_parameters())
    for module in (*blocks, model):
        module.unshard()
        wholes |= {name: p for name, p in model.named_parameters() if not is_sharded(p)}
        module.reshard()
    for name, old in olds.items():
        p, whole = sharded[name], wholes[name]
        for new in (p, whole):
            new.__dict__.update(old.__dict__)
        p.seen = whole
        if K:
            p.h, whole.h = local(sharded[name + "_h"]), wholes[name + "_h"]


def is_sharded(t):
    return hasattr(t, "to_local")  # it is a DTensor


@torch.no_grad()
def local(t):
    """This rank's slice of a sharded tensor; any other as it is."""
    return t.to_local() if is_sharded(t) else t


def full(t):
    """The whole of a sharded tensor, on every rank, which all must ask for it; any other as it is."""
    return t.full_tensor() if is_sharded(t) else t


# --- checkpoints: whole tensors, so that any number of ranks can go on, sharded or not


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
