"""Where the parameters of an ordinary model meet the data, seen while a forward lasts.

A mode of PyTorch sees each operation of the forward. An operation on parameters alone makes a
weight: it has a direction as they have (ghost.py: Made). Where a weight meets the batch there are
two ways to the values:

    fast      ghost.py's op takes the place of PyTorch's: linear layers (matmul, addmm), embeddings,
              norms, convolutions, and whatever is multiplied or added element by element
    general   the operation runs as it is, whatever it is. The model runs once more for each
              direction, in forward mode, with the weight moved along its direction there

The general way knows nothing of the operation. It needs that examples do not mix, as the fast one
does. Nothing is left behind in the model.

B examples, K directions, m rows of an example where the model has flattened (B, m, C) to (B m, C).
"""

from functools import partial

import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from shapley import ghost
from shapley.batch import tensors_in
from shapley.contract import linear_values
from system.errors import UserError

# how a tensor is computed from the batch, its attribute of_batch
IN_ORDER = "in order"  # dimension 0, or each m rows of it, is the batch as far as it can be told
PICKED = "picked"  # rows were picked by index: which example a row is of cannot be told
TURNED = "turned"  # dimension 0 was moved away, and may come back
LOST = "lost"  # nothing is known

FAST = "fast"
GENERAL = "general"


class Ghosts(TorchFunctionMode):
    """While it is entered, weights that meet the batch give values."""

    def __init__(self, model, X, B, ledger):
        """X: any nest of tensors; those with B rows are the batch."""
        super().__init__()
        # a parameter that is frozen for a second pass still has a direction
        self.names = {
            p: name for name, p in model.named_parameters() if p.requires_grad or hasattr(p, "h")
        }
        self.B, self.ledger = B, ledger
        self.ways = set()  # (name of the parameter, name of the operation, FAST or GENERAL)
        self.tokens = set()  # parameters whose rows the batch's integers look up
        self.indirect = set()  # names of those whose gradient of each chunk alone is not taken
        for t in tensors_in(X):
            if t.dim() and len(t) == B:
                t.of_batch = IN_ORDER

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        weights = [t for t in inputs if self.is_weight(t)]
        is_of_batch = any(hasattr(t, "of_batch") for t in inputs)
        if func is F.batch_norm:
            self.refuse_batch_norm(weights, args, kwargs)
        if not weights:
            result = func(*args, **kwargs)
        elif is_of_batch or func in EXPANDS or func is SETITEM:
            result = self.meet(func, args, kwargs, weights)
        else:
            return self.make(func, args, kwargs)
        if is_of_batch or (weights and func is SETITEM):
            order = order_after(func, args, kwargs)
            for t in outputs_of(func, args, result):
                t.of_batch = order
        return result

    def is_weight(self, t):
        return t in self.names or hasattr(t, "made")

    def name(self, weight):
        """The name of the parameter, or of one that a weight is made of."""
        while weight not in self.names:
            made = weight.made
            weight = next(t for t in tensors_in((made.args, made.kwargs)) if self.is_weight(t))
        return self.names[weight]

    def make(self, func, args, kwargs):
        """An operation on weights, without the batch."""
        result = func(*args, **kwargs)
        inputs = tensors_in((args, kwargs))
        for place, t in enumerate(tree_leaves(result)):
            is_new = isinstance(t, torch.Tensor) and not any(t is known for known in inputs)
            if is_new and self.depends(t, inputs):
                t.made = ghost.Made(func, args, kwargs, place)
        return result

    def depends(self, output, inputs):
        """Whether weights among the inputs learn through an output. In a second pass, where they
        are frozen, all may."""
        if not output.is_floating_point():
            return False
        frozen = not any(t.requires_grad for t in inputs if self.is_weight(t))
        return output.requires_grad or (frozen and torch.is_grad_enabled())

    def meet(self, func, args, kwargs, weights):
        """An operation on weights and the batch."""
        fast = self.fast(func, args, kwargs)
        if fast:
            self.note(func, weights, FAST)
            return fast()
        if func in EXPANDS:
            return self.make(func, args, kwargs)
        result = func(*args, **kwargs)
        inputs = tensors_in((args, kwargs))
        if any(self.depends(t, inputs) for t in outputs_of(func, args, result)):
            self.note(func, weights, GENERAL)
        return result

    def note(self, func, weights, way):
        for weight in weights:
            self.ways.add((self.name(weight), func.__name__, way))
            while self.inner(weight) is not None:
                weight = self.inner(weight)
            is_transposed = OPS.get(func) in (Ghosts.matmul, Ghosts.addmm) and weight.dim() == 2
            if way == GENERAL or is_transposed or weight not in self.names:
                self.indirect.add(self.name(weight))

    def fast(self, func, args, kwargs):
        """What runs the operation by ghost.py's op, or None where there is no fast form."""
        if func not in OPS or is_recomputed():
            return None
        return OPS[func](self, *args, **kwargs)

    def refuse_batch_norm(self, weights, args, kwargs):
        if kwargs.get("training") or args[5:6] == (True,):
            names = ", ".join(self.name(p) for p in weights)
            cure = "take nn.LayerNorm or nn.GroupNorm in its place, or its eval()"
            raise UserError(f"batch norm ({names}) mixes examples: {cure}")

    # --- the batch's layout -------------------------------------------------------

    def examples(self, x, dim=2):
        """x, of at least so many dimensions, with the examples first: itself, or (B, m, C) of a
        flattened (B m, C). None where that cannot be told."""
        order = getattr(x, "of_batch", None)
        if order not in (IN_ORDER, PICKED) or self.is_weight(x) or x.dim() < dim:
            return None
        if order is PICKED and x.dim() <= 2:
            return None
        if len(x) == self.B:
            return x
        if x.dim() == 2 and len(x) and len(x) % self.B == 0:
            return x.unflatten(0, (self.B, -1))
        return None

    def inner(self, weight):
        """The weight that one is an elementwise function of, as w of 1 + w: of the copies of w
        `adamw` may ask for the gradients. None where there is none."""
        made = getattr(weight, "made", None)
        if made and made.func in ELEMENTWISE:
            tensors = tensors_in((made.args, made.kwargs))
            if len(tensors) == 1 and tensors[0].shape == weight.shape:
                return tensors[0]
        return None

    def fits(self, weight, dim):
        """Whether copies of a weight fit to a tensor of so many dimensions."""
        is_small = weight.dim() < dim or (weight.dim() == dim and len(weight) in (1, self.B))
        return dim > 0 and (not self.is_weight(weight) or is_small)

    def copies(self, weight, dim):
        """A weight that fits as a tensor (B, 1, ..., shape) of so many dimensions, of each example
        its own. What is no weight stays as it is."""
        if not self.is_weight(weight):
            return weight
        inner = self.inner(weight)
        if inner is not None:
            made, copies = weight.made, self.copies(inner, dim)
            args, kwargs = tree_map_only(torch.Tensor, lambda t: copies, (made.args, made.kwargs))
            return made.func(*args, **kwargs)
        per_chunk = getattr(weight, "per_chunk", None)
        shape = (1,) * (dim - weight.dim()) + weight.shape
        if per_chunk is not None:
            per_chunk = per_chunk.view(self.B, *shape[1:])
        return ghost.copies(self.reshaped(weight, shape), self.B, self.ledger, per_chunk)

    def reshaped(self, weight, shape):
        if weight.shape == shape:
            return weight
        return self.make(torch.reshape, (weight, shape), {})

    # --- the operations that have a fast form: each gives what runs it, or None ------

    def linear(self, input, weight, bias=None):
        x = self.examples(input)
        if x is None or (self.is_weight(weight) and weight.dim() != 2):
            return None

        def run():
            if self.is_weight(weight) and (bias is None or self.is_weight(bias)):
                y = ghost.linear(x, weight, bias, self.ledger)
            else:
                y = self.partly_frozen(x, weight, bias)
            return y.reshape(*input.shape[:-1], y.shape[-1])

        return run

    def partly_frozen(self, x, weight, bias):
        """A linear layer whose weight or bias does not learn."""
        if not self.is_weight(weight):
            return F.linear(x, weight) + self.copies(bias, x.dim())
        return ghost.linear(x, weight, None, self.ledger) + bias

    def matmul(self, input, other):
        if not self.is_weight(other) or other.dim() != 2:
            return None
        return self.linear(input, self.make(torch.transpose, (other, 0, 1), {}))

    def addmm(self, input, mat1, mat2, *, beta=1, alpha=1):
        if not self.is_weight(mat2) or beta != 1 or alpha != 1 or input.dim() != 1:
            return None
        return self.linear(mat1, self.make(torch.transpose, (mat2, 0, 1), {}), input)

    def embedding(
        self,
        input,
        weight,
        padding_idx=None,
        max_norm=None,
        norm_type=2.0,
        scale_grad_by_freq=False,
        sparse=False,
    ):
        if max_norm or scale_grad_by_freq or sparse:
            what = "nn.Embedding with max_norm, scale_grad_by_freq or sparse"
            raise UserError(f"{self.name(weight)}: {what} is not valued: leave them out")
        is_in_order = getattr(input, "of_batch", None) is IN_ORDER
        if not is_in_order or not input.dim() or len(input) % self.B:
            return None
        if weight in self.names and not input.is_floating_point():
            self.tokens.add(weight)
        if padding_idx is not None:
            padding_idx %= len(weight)
        idx = input if len(input) == self.B else input.unflatten(0, (self.B, -1))

        def run():
            y = ghost.embedding(idx, weight, self.ledger, padding_idx)
            return y.reshape(*input.shape, y.shape[-1])

        return run

    def elementwise(self, func, *args, **kwargs):
        """A weight is added to the batch, or multiplied with it."""
        tensors = [t for t in args[:2] if isinstance(t, torch.Tensor)]
        batch = [t for t in tensors if not self.is_weight(t)]
        if len(batch) != 1 or len(tensors) != 2:
            return None
        x = self.examples(batch[0], dim=1)
        (weight,) = [t for t in tensors if self.is_weight(t)]
        if x is None or (x is not batch[0] and weight.dim() > 1):
            return None
        if not self.fits(weight, x.dim()):
            return None

        def run():
            copies = self.copies(weight, x.dim())
            swapped = [copies if t is weight else x if t is batch[0] else t for t in args]
            y = func(*swapped, **kwargs)
            return y if x is batch[0] else y.flatten(0, 1)

        return run

    def layer_norm(self, input, normalized_shape, weight=None, bias=None, eps=1e-5):
        x = self.examples(input)
        if x is None or not all(self.fits(w, x.dim()) for w in (weight, bias) if w is not None):
            return None

        def run():
            both = self.is_weight(weight) and (bias is None or self.is_weight(bias))
            if both and weight.dim() == 1:
                y = ghost.layer_norm(x, weight, bias, eps, self.ledger)
            else:
                y = F.layer_norm(x, normalized_shape, eps=eps)
                y = self.scaled(y, weight, bias)
            return y.reshape(input.shape)

        return run

    def rms_norm(self, input, normalized_shape, weight=None, eps=None):
        x = self.examples(input)
        if x is None:
            return None

        def run():
            y = F.rms_norm(x, normalized_shape, eps=eps)
            return self.scaled(y, weight, None).reshape(input.shape)

        return run

    def group_norm(self, input, num_groups, weight=None, bias=None, eps=1e-5):
        x = self.examples(input)
        if x is not input:
            return None

        def run():
            y = F.group_norm(x, num_groups, eps=eps)
            return self.scaled(y.movedim(1, -1), weight, bias).movedim(-1, 1)

        return run

    def scaled(self, y, weight, bias):
        """weight * y + bias, of a norm whose channels come last."""
        if weight is not None:
            y = y * self.copies(weight, y.dim())
        if bias is not None:
            y = y + self.copies(bias, y.dim())
        return y

    def conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        is_whole = self.is_weight(weight) and (bias is None or self.is_weight(bias))
        if groups != 1 or not is_whole or input.dim() != 4 or self.examples(input) is None:
            return None
        dilation = as_pair(dilation)
        if padding == "same":
            high, wide = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:])]
            input = F.pad(input, (0, wide % 2, 0, high % 2))
            padding = (high // 2, wide // 2)
        elif padding == "valid":
            padding = 0
        args = (as_pair(stride), as_pair(padding), dilation)
        return partial(conv2d, input, weight, bias, *args, self.ledger)

    def expand(self, weight, *sizes, **kwargs):
        """One row for all examples, as of a cls token: a row for each."""
        sizes = tuple(torch.Size(*sizes)) if len(sizes) == 1 else sizes
        if not sizes or sizes[0] != self.B or kwargs or len(sizes) < weight.dim():
            return None
        if weight.dim() == len(sizes) and len(weight) != 1:
            return None

        def run():
            y = self.copies(weight, len(sizes)).expand(*sizes)
            y.of_batch = IN_ORDER
            return y

        return run


class Along(Ghosts):
    """While it is entered, within a level of forward_ad, weights that meet the batch in a general
    way are moved along direction k, and the others are still.

    difference: how far they are moved instead, where an operation has no forward mode."""

    def __init__(self, model, X, B, k, difference=None):
        super().__init__(model, X, B, ledger=None)
        self.moved = {}
        for p in self.names:
            if difference is None:
                self.moved[p] = forward_ad.make_dual(p.detach(), p.h[k])
            else:
                self.moved[p] = p.detach() + difference * p.h[k]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        if not torch.is_grad_enabled():  # the model cuts the derivative here
            return tree_map_only(torch.Tensor, still, result)
        return result

    def make(self, func, args, kwargs):
        result = super().make(func, args, kwargs)
        made = [t for t in tensors_in(result) if hasattr(t, "made") and t not in self.moved]
        if made:
            moved = tree_leaves(self.with_weights(self.moved.get, func, args, kwargs))
            for t in made:
                self.moved[t] = moved[t.made.place]
        return result

    def meet(self, func, args, kwargs, weights):
        if self.fast(func, args, kwargs):
            result = self.with_weights(torch.Tensor.detach, func, args, kwargs)
            if func in EXPANDS:
                result.of_batch = IN_ORDER
            return result
        if func in EXPANDS:
            return self.make(func, args, kwargs)
        return self.with_weights(self.moved.get, func, args, kwargs)

    def with_weights(self, replace, func, args, kwargs):
        """The operation's result with something else in place of each weight."""

        def replaced(t):
            return replace(t) if self.is_weight(t) else t

        args, kwargs = tree_map_only(torch.Tensor, replaced, (args, kwargs))
        return func(*args, **kwargs)


def still(t):
    """A tensor without its derivative; itself where it has none."""
    primal, tangent = forward_ad.unpack_dual(t)
    if tangent is None:
        return t
    primal.__dict__.update(t.__dict__)
    return primal


def order_after(func, args, kwargs):
    """How the result of an operation on the batch is computed from it."""
    batch = [t for t in tensors_in((args, kwargs)) if hasattr(t, "of_batch")]
    # masks and indices do not say which example a row is of, the numbers do
    batch.sort(key=lambda t: not t.is_floating_point())
    order = batch[0].of_batch if batch else LOST
    if order is LOST or loses_first(func, args, kwargs):
        return LOST
    if func in TURNS and moves_first(func, args, kwargs):
        order = IN_ORDER if order is TURNED else TURNED
    is_picked = func in INDEXES and tensors_in(args[1:])
    if order is IN_ORDER and (is_picked or (func in PICKS and along(func, args, kwargs) == 0)):
        return PICKED
    return order


def loses_first(func, args, kwargs):
    """Whether an operation takes dimension 0 apart, or puts it together in another order."""
    if func in INDEXES:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        first = index[0] if index else Ellipsis
        is_kept = first is Ellipsis or isinstance(first, torch.Tensor)
        return not (is_kept or (isinstance(first, slice) and first == slice(None)))
    return func in REORDERS or (func in SPLITS and along(func, args, kwargs) == 0)


def along(func, args, kwargs):
    """The dimension that an operation works along."""
    place, default = (PICKS | SPLITS)[func]
    return kwargs.get("dim", args[place] if len(args) > place else default)


def moves_first(func, args, kwargs):
    """Whether a transposition moves dimension 0."""
    marked = torch.empty([2] + [1] * (args[0].dim() - 1))
    return func(marked, *args[1:], **kwargs).shape[0] != 2


def refuse_reentrant(outputs):
    """Raises UserError where torch.utils.checkpoint hid a part of the graph of some tensors."""
    nodes = [t.grad_fn for t in tensors_in(outputs) if t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "CheckpointFunctionBackward":
            what = "gradient checkpointing with use_reentrant=True gives no values"
            raise UserError(f"{what}: pass use_reentrant=False")
        found = {below for below, _ in node.next_functions if below is not None} - seen
        seen |= found
        nodes += found


def outputs_of(func, args, result):
    return [args[0]] if func is SETITEM else tensors_in(result)


def is_recomputed():
    """Whether the forward runs within torch.utils.checkpoint: its backward would run the operation
    again, without the mode."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def as_pair(x):
    return (x, x) if isinstance(x, int) else (x * 2 if len(x) == 1 else x)


def conv2d(x, weight, bias, stride, padding, dilation, ledger):
    """F.conv2d of x (B, I, H, W) in one group, with the values as in ghost.linear: a Linear over
    patches. stride, padding and dilation are pairs."""

    def patches(x):  # (B, places, I * height * width)
        return F.unfold(x, weight.shape[2:], dilation, padding, stride).mT

    if ledger is None:
        return F.conv2d(x, weight, bias, stride, padding, dilation)
    if isinstance(ledger, ghost.Tape):  # it keeps x, for the patches are larger

        def values(gy, x, squares):
            h = ghost.direction(weight).flatten(2)
            gy = gy.flatten(2).mT
            return linear_values(gy, patches(x), h, ghost.direction(bias), squares)

        y = conv2d(x, weight, bias, stride, padding, dilation, ledger.first)
        return ledger.watch(y, values, x)
    covered = x.shape[2] + 2 * padding[0] - dilation[0] * (weight.shape[2] - 1) - 1
    height = covered // stride[0] + 1
    y = ghost.linear(patches(x), weight, bias, ledger)
    return y.mT.unflatten(2, (height, -1))


# --- PyTorch's functions ------------------------------------------------------------


def functions(*names):
    """torch.<name>, and the methods <name>, <name>_, __<name>__, __r<name>__ and __i<name>__, those
    that there are."""
    found = {getattr(torch, name) for name in names if hasattr(torch, name)}
    for name in names:
        for method in (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__"):
            if hasattr(torch.Tensor, method):
                found.add(getattr(torch.Tensor, method))
    return found


ARITHMETIC = functions("add", "sub", "mul", "div", "truediv", "rsub", "true_divide")
CASTS = functions("float", "double", "half", "bfloat16", "to", "type_as", "neg", "clone")
ELEMENTWISE = ARITHMETIC | CASTS  # what keeps the shape of a weight (w + 1, w.float())
EXPANDS = functions("expand")
INDEXES = functions("getitem")
SETITEM = torch.Tensor.__setitem__
REORDERS = functions("flip", "roll", "repeat", "tile", "repeat_interleave", "nonzero")


def alike(place, default, *names):
    return dict.fromkeys(functions(*names), (place, default))


# which argument the dimension is, and its default
PICKS = alike(1, None, "gather", "index_select", "take_along_dim")
SPLITS = alike(1, 0, "unbind", "cat", "concat", "stack")
SPLITS |= alike(2, 0, "split", "chunk", "tensor_split")
SPLITS |= alike(1, -1, "sort", "argsort") | alike(2, -1, "topk")
TURNS = functions("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t") | {
    torch.Tensor.T.__get__,
    torch.Tensor.mT.__get__,
}
OPS = {
    F.linear: Ghosts.linear,
    F.layer_norm: Ghosts.layer_norm,
    F.rms_norm: Ghosts.rms_norm,
    F.group_norm: Ghosts.group_norm,
    F.embedding: Ghosts.embedding,
    F.conv2d: Ghosts.conv2d,
    torch.addmm: Ghosts.addmm,
}
OPS.update((func, Ghosts.matmul) for func in functions("matmul"))
OPS.update((func, Ghosts.expand) for func in EXPANDS)


def elementwise(func):
    def find(ghosts, *args, **kwargs):
        return ghosts.elementwise(func, *args, **kwargs)

    return find


OPS.update((func, elementwise(func)) for func in ARITHMETIC)
