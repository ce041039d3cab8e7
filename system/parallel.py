"""Several processes, started by torchrun, on one machine or many: who takes what, what is summed, who writes.

PyTorch's own engines do the work: DDP, where every process holds the whole model, or FSDP2 (`fully_shard`), where each
holds a slice of every parameter, of its moments and of its directions. Run alone, every function here does nothing.
"""

import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from system.errors import UserError

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
    store = dist.PrefixStore(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store
    )  # which may hold what processes before a restart left
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
        raise UserError(
            f"{size()} processes cannot share {n} chunks evenly: change --batch_size or --gradient_accumulation_steps"
        )
    return slice(rank() * each, (rank() + 1) * each)


def add(tensors):
    """Sums each tensor over the ranks, in place, the small ones in one message. Returns them."""
    if size() > 1:
        small, large = (
            [t for t in tensors if (t.numel() < SMALL) == is_small] for is_small in (True, False)
        )
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
        except (UserError, OSError) as e:
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
    from torch.distributed.fsdp import (
        fully_shard,
    )  # takes seconds to import, as whatever of torch knows DTensor
    from torch.distributed.tensor import Shard

    directions, olds = {}, dict(model.named_parameters())
    for name, p in olds.items():
        if len(p) % size():
            raise UserError(
                f"--shard: {size()} processes cannot share the {len(p)} rows of {name}: choose sizes that are multiples of {size()}"
            )
        if K:
            directions[p] = nn.Parameter(p.new_zeros(K, *p.shape), requires_grad=False)
    for module in list(model.modules()) if K else ():
        for name, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(name + "_h", directions[p])
    wholes, of_direction = {}, {id(h) for h in directions.values()}
    for module in (*blocks, model):
        fully_shard(
            module,
            reshard_after_forward=True,
            shard_placement_fn=lambda p: Shard(1) if id(p) in of_direction else None,
        )
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
