"""Where a model's parameters, gradients, moments and directions lie: whole, or this rank's slices.

Under FSDP2 (system/parallel.py: shard) every rank holds a slice of the rows of each parameter, of
its moments and of its direction. The rules' formulas are elementwise, so they run on slices as they
do on whole tensors. What is different is here, and nowhere else in the method.
"""

import contextlib

import torch

from system import parallel
from system.errors import UserError
from system.parallel import local


class Weights:
    """The trainable parameters of a model, with what the optimizer and the method keep for each."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.name_of = dict(zip(self.params, self.names))
        self.whole = {p: getattr(p, "whole", p) for p in self.params}  # as the layers see them
        self.sharded = any(p is not whole for p, whole in self.whole.items())
        self.n_ranks = parallel.size()
        self.young = set(self.params)  # those that had no gradient yet, for their moments are 0
        self.groups = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                self.groups[p] = group

    def by_group(self):
        """The optimizer's parameter groups: [(group, its trainable parameters)]."""
        return [
            (group, [p for p in group["params"] if p in self.whole])
            for group in self.optimizer.param_groups
        ]

    def updates_done(self):
        """How many updates the optimizer has made. On a GPU this waits for the device."""
        counts = [int(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        return counts[0] if counts else 0

    def moments(self, p):
        """AdamW's m and v of a parameter before the coming update; zeros before the first one."""
        state = self.optimizer.state.get(p)
        if not state:
            return torch.zeros_like(local(p.data)), torch.zeros_like(local(p.data))
        return local(state["exp_avg"]), local(state["exp_avg_sq"])

    # --- young parameters: the coming update with a gradient is their first one -----------------

    def look_for_young(self, t, may_be_late):
        """Before the t-th update: leaves in self.young those whose second moment is 0. may_be_late:
        whether there can be some after the first update. On a GPU this waits for the device, as
        long as there are some."""
        if t == 1:
            return
        young = [p for p in self.params if p in self.young]
        if not may_be_late:
            self.young = set()
        elif young:
            squares = torch.stack([self.moments(p)[1].sum() for p in young])
            squares = self.sum_over_ranks(squares).tolist()
            self.young = {p for p, square in zip(young, squares) if square == 0}

    def is_first_update(self):
        """After the backward: whether a young parameter has a gradient."""
        gradients = [local(p.grad) for p in self.young if p.grad is not None]
        return bool(gradients) and any(bool(gradient.any()) for gradient in gradients)

    def young_of(self, params):
        return [p for p in params if p in self.young]

    def grown_of(self, params):
        return [p for p in params if p not in self.young]

    def zeros(self, *shape):
        """Zeros like the parameters, whose gradient will be read."""
        p = self.params[0]
        return torch.zeros(shape, dtype=p.dtype, device=p.device, requires_grad=True)

    # --- gradients ------------------------------------------------------------

    def take_gradients(self):
        """The parameters' .grad, which they lose. Raises UserError where one has none."""
        unused = [
            name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None
        ]
        if unused:
            names = ", ".join(unused)
            raise UserError(
                f"the loss does not depend on {names}: freeze it with requires_grad_(False)"
            )
        gradients = [p.grad for p in self.params]
        self.set_gradients([None] * len(self.params))
        return gradients

    def set_gradients(self, gradients):
        for p, gradient in zip(self.params, gradients):
            p.grad = gradient

    @contextlib.contextmanager
    def frozen(self):
        """Within it a backward makes no weight gradient."""
        for whole in self.whole.values():
            whole.requires_grad_(False)
        try:
            yield
        finally:
            for whole in self.whole.values():
                whole.requires_grad_(True)

    # --- directions -----------------------------------------------------------

    def forget_directions(self):
        """Frees their memory, where it is not FSDP's."""
        if not self.sharded:
            for p in self.params:
                p.h = None

    def set_directions(self, directions):
        """directions: per parameter (K, *shape), or this rank's (K, rows, ...). Each becomes the
        parameter's .h."""
        for p, h in zip(self.params, directions):
            if self.sharded:
                p.h = p.h_room[: len(h)]  # FSDP gathers from this memory
                p.h.copy_(h)
                self.whole[p].n_directions = len(h)
            else:
                p.h = h

    def new_directions(self, n):
        """Zeros, n directions: per parameter (n, *shape), or this rank's (n, rows, ...)."""
        parts = [local(p.data) for p in self.params]
        return [part.new_zeros(n, *part.shape) for part in parts]

    def as_whole(self, directions):
        """Directions as of new_directions() -> tensors that parallel.full() makes whole."""
        if not self.sharded:
            return directions
        from torch.distributed.tensor import DTensor, Shard

        wholes = []
        for p, h in zip(self.params, directions):
            wholes.append(DTensor.from_local(h, p.device_mesh, [Shard(1)], run_check=False))
        return wholes

    def as_parts(self, wholes):
        """Whole directions, per parameter (n, *shape) -> this rank's parts of them."""
        if not self.sharded:
            return wholes
        return [whole.chunk(self.n_ranks, 1)[parallel.rank()] for whole in wholes]

    # --- other weights for a while --------------------------------------------

    @contextlib.contextmanager
    def at(self, places):
        """The model with other weights, one tensor a parameter (None: its own); then, to the bit,
        its own again. Yields its own weights."""
        own = [p.data for p in self.params]
        if places is None:
            yield own
            return
        if self.sharded:
            own = [local(weight).clone() for weight in own]
        self.put(places)
        try:
            yield own
        finally:
            self.put(own)

    def put(self, weights):
        for p, weight in zip(self.params, weights):
            if self.sharded:
                local(p.data).copy_(weight)  # FSDP gathers from this memory
            else:
                p.data = weight

    # --- sums and rows over the ranks -----------------------------------------

    def sum_over_ranks(self, x):
        """The sum of what each rank found in its slices; x itself where nothing is sliced."""
        return parallel.add([x])[0] if self.sharded else x

    def mean_over_ranks(self, x):
        return self.sum_over_ranks(x) / parallel.size() if self.sharded else x

    def take_rows(self, x, rows, dim=0):
        """Some rows of a tensor that is laid out as the parameters are: on every rank.

        rows: int64 (R,), numbers of rows of the whole tensor, which lie along dimension `dim`.
        """
        if not self.sharded:
            return x.index_select(dim, rows)
        n_rows = x.shape[dim]
        place, is_here = self.place_in_slice(rows, n_rows)
        mask = is_here.view(-1, *[1] * (x.dim() - dim - 1))
        return parallel.add([x.index_select(dim, place.clamp(0, n_rows - 1)) * mask])[0]

    def zero_rows(self, p, rows):
        """Sets some rows of a parameter's direction to 0."""
        if self.sharded:
            place, is_here = self.place_in_slice(rows, p.h.shape[1])
            rows = place[is_here]
        p.h[:, rows] = 0

    def place_in_slice(self, rows, n_rows):
        """Numbers of rows of a whole tensor -> their numbers in this rank's slice of n_rows, and
        whether they lie in it."""
        place = rows - parallel.rank() * n_rows
        return place, (place >= 0) & (place < n_rows)
