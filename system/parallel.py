"""Several processes, started by torchrun, on one machine or many: who takes what, what is summed,
who writes.

PyTorch's own engines do the work. With DDP every process holds the whole model. With FSDP2
(`fully_shard`) each holds a slice of every parameter, of its moments and of its directions. Where
there is one process, every function here does nothing.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from system.errors import UserError

SMALL = 2**20  # elements of a tensor that is summed in one message with others


def start(device):
    """Joins torchrun's other processes, if there are any. Returns the device of this one."""
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    backend = "gloo"
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        # NCCL for the GPUs, gloo for what never leaves the host, as whether to stop
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(hours=1)  # a rank that is slow for an hour is only slow
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    # the store may hold what processes before a restart left
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(restarts, store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    return device


def leave(code=0):
    """Ends this process with an exit code where it is one of several, with all files written.

    gloo's threads outlive the group where DDP was used, whose reducer is never freed. One that
    still drops a message's tensor while the interpreter shuts down would abort the process. So the
    interpreter is not shut down.
    """
    if not dist.is_initialized():
        return
    if code == 0:  # else the others may be waiting in the group
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(n):
    """This rank's slice of 0..n-1. The slices in the order of the ranks are the whole. Raises
    UserError where they would not be equal."""
    n_mine, left = divmod(n, size())
    if left:
        what = f"{size()} processes cannot share {n} chunks evenly"
        raise UserError(f"{what}: change --batch_size or --gradient_accumulation_steps")
    return slice(rank() * n_mine, (rank() + 1) * n_mine)


# --- sums and messages --------------------------------------------------------


def add(tensors):
    """Sums each tensor over the ranks, in place, the small ones in one message. Returns them."""
    if size() == 1:
        return tensors
    small = [t for t in tensors if t.numel() < SMALL]
    large = [t for t in tensors if t.numel() >= SMALL]
    messages = list(large)
    if small:
        joined = torch.cat([t.flatten() for t in small])
        messages.insert(0, joined)
    for work in [dist.all_reduce(t, async_op=True) for t in messages]:
        work.wait()
    if small:
        for t, summed in zip(small, joined.split([t.numel() for t in small])):
            t.copy_(summed.view_as(t))
    return tensors


def gather(tensor, dim=0):
    """The ranks' tensors, equal in shape, joined along dim in the order of the ranks: on every
    rank."""
    if size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)


def gather_objects(x):
    """[each rank's x], on every rank."""
    objects = [x] * size()
    if size() > 1:
        dist.all_gather_object(objects, x)
    return objects


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


def mean(x):
    """The mean over the ranks of a scalar tensor, as a float."""
    return float(add([x])[0]) / size()


# --- the model ----------------------------------------------------------------


def replicate(model, example_loss=None):
    """DDP: the gradients of the last micro-batch's backward become the ranks' mean.

    example_loss(model) -> the loss of a micro-batch, for runs that are resumed to the bit. DDP
    orders its buckets by the first backward. If that were a step's, a resumed run would add up in
    another order than the undisturbed one, so it is this one.
    """
    if size() == 1:
        return model
    device = next(model.parameters()).device
    device_ids = [device] if device.type == "cuda" else None
    replica = DistributedDataParallel(model, device_ids=device_ids)
    if example_loss:
        example_loss(replica).backward()
        model.zero_grad(set_to_none=True)
    return replica


def shard(model, blocks, n_directions):
    """FSDP2, in place: each rank keeps a slice of the rows of every parameter and of its direction,
    and the whole of a block exists only while it computes.

    A sharded parameter p has p.h_room, this rank's slice of its directions (n, rows, ...), and
    p.whole, the whole parameter as the layers see it, whose .h holds the whole directions; of these
    the first .n_directions are set. Raises UserError where the ranks cannot share the rows evenly.
    """
    # takes seconds to import, as whatever of torch knows DTensor
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    originals = dict(model.named_parameters())
    directions = register_directions(model, originals, n_directions)
    direction_ids = {id(h) for h in directions.values()}

    def placement(p):
        return Shard(1) if id(p) in direction_ids else None

    for module in (*blocks, model):
        fully_shard(module, reshard_after_forward=True, shard_placement_fn=placement)
    sharded = dict(model.named_parameters())
    wholes = {}
    for module in (*blocks, model):
        module.unshard()
        for name, p in model.named_parameters():
            if not is_sharded(p):
                wholes[name] = p
        module.reshard()
    for name, original in originals.items():
        p, whole = sharded[name], wholes[name]
        p.__dict__.update(original.__dict__)
        whole.__dict__.update(original.__dict__)
        p.whole = whole
        if n_directions:
            p.h = p.h_room = local(sharded[name + "_h"])
            whole.h = wholes[name + "_h"]
            whole.n_directions = n_directions


def register_directions(model, parameters, n_directions):
    """Gives every parameter's module a parameter <name>_h for its direction, so that FSDP shards
    and gathers both. Returns {parameter: direction}, empty without targets."""
    directions = {}
    for name, p in parameters.items():
        if len(p) % size():
            what = f"--shard: {size()} processes cannot share the {len(p)} rows of {name}"
            raise UserError(f"{what}: choose sizes that are multiples of {size()}")
        if n_directions:
            directions[p] = nn.Parameter(p.new_zeros(n_directions, *p.shape), requires_grad=False)
    if directions:
        for module in list(model.modules()):
            for name, p in list(module.named_parameters(recurse=False)):
                module.register_parameter(name + "_h", directions[p])
    return directions


def is_sharded(t):
    """Whether a tensor is FSDP's, a DTensor."""
    return hasattr(t, "to_local")


@torch.no_grad()
def local(t):
    """This rank's slice of a sharded tensor; any other as it is."""
    return t.to_local() if is_sharded(t) else t


def full(t):
    """The whole of a sharded tensor, on every rank, which all must ask for it; any other as it
    is."""
    return t.full_tensor() if is_sharded(t) else t
