"""Any model as valuation.py wants it.

    net = Net(model, loss)
    outputs, mean_loss = net(X, Y, ledger)          # the contract of model.GPT

The model is an ordinary nn.Module. Its trainable parameters meet the data in nn.Linear,
nn.Embedding, nn.LayerNorm and nn.Conv2d only (or F.linear and its like), on inputs that have the
batch first; ties and repeated uses are fine. Anything else is refused with a UserError: its part
would be missing from the values. While a forward lasts, a mode of PyTorch sees each of its
operations, and ghost.py's ops take the place of PyTorch's. Nothing is left behind in the model.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from shapley import ghost
from shapley.contract import linear_values
from system.errors import UserError


class Net(nn.Module):
    """A model and its loss.

    loss: F.cross_entropy, F.mse_loss or anything that is called like them, with reduction="none".
    An example's loss is the mean over its labels (0 without one), the batch's the mean over its
    examples that have one. A label of -1, or NaN where labels are floats, is none. X and Y are
    tensors or arrays; floats are taken in the model's precision. The names in state_dict() are the
    model's own behind `model.`.

    Where examples have unequal numbers of labels, let a target be one slice (micro_batch=0, one
    process).
    """

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss
        # set by a forward with a ledger: see ghost.py
        self.chunk_loss = self.chunk_weight = None

    def forward(self, X, Y, ledger=None):
        X, Y = self.as_input(X), self.as_input(Y)
        if ledger is None:
            outputs = self.model(X)
        else:
            X = X.detach()
            with Ghosts(self.model, X, ledger):
                outputs = self.model(X)
        has_label = ~Y.isnan() if Y.is_floating_point() else Y >= 0
        losses = self.loss(outputs, Y.masked_fill(~has_label, 0), reduction="none")
        if has_label.shape != losses.shape:  # of class probabilities: one loss for several labels
            has_label = has_label.flatten(1).any(1)
        n_labels = has_label.reshape(len(Y), -1).sum(1)
        summed = torch.where(has_label, losses, 0).reshape(len(Y), -1).sum(1)
        of_example = summed / n_labels.clamp(min=1)
        counts = n_labels > 0
        if ledger is not None:
            self.chunk_loss, self.chunk_weight = of_example.detach(), counts
        return outputs, of_example.sum() / counts.sum().clamp(min=1)

    def as_input(self, data):
        like = next(self.parameters())
        data = torch.as_tensor(data, device=like.device)
        return data.to(like.dtype) if data.is_floating_point() else data


@dataclass
class Examples:
    """A target: arrays that hold an example a row."""

    name: str
    X: np.ndarray  # (n, ...)
    Y: np.ndarray  # (n,) or (n, ...)
    ids: np.ndarray | None = None
    source: str = "examples"

    def batch(self, picks):
        return self.X[picks], self.Y[picks]

    def __len__(self):
        return len(self.X)


# --- the layers that give values ----------------------------------------------------

INSTEAD = (
    "take nn.Linear, nn.Embedding, nn.LayerNorm or nn.Conv2d in its place, "
    "or freeze it with requires_grad_(False)"
)


class Ghosts(TorchFunctionMode):
    """While it is entered the model's parameters meet ghost.py's ops, and nothing else."""

    def __init__(self, model, X, ledger):
        super().__init__()
        # a parameter that is frozen for a second pass still has a direction
        self.names = {
            p: name for name, p in model.named_parameters() if p.requires_grad or hasattr(p, "h")
        }
        self.B, self.ledger = len(X), ledger
        X.of_batch = True  # and whatever is computed from it

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        params = [t for t in inputs if t in self.names]
        if func is F.batch_norm:
            self.refuse_batch_norm(params, args, kwargs)
        if params and func in OPS:
            result = OPS[func](self, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        outputs = tensors_in(result)
        if params and func not in OPS:
            frozen = not params[0].requires_grad
            if any(t.requires_grad or frozen for t in outputs):
                what = f"{self.names[params[0]]} meets {func.__name__}, which gives no values"
                raise UserError(f"{what}: {INSTEAD}")
        if any(hasattr(t, "of_batch") for t in inputs):
            for t in outputs:
                t.of_batch = True
        return result

    def refuse_batch_norm(self, params, args, kwargs):
        if kwargs.get("training") or args[5:6] == (True,):
            names = ", ".join(self.names[p] for p in params)
            cure = "take nn.LayerNorm in its place, or its eval()"
            raise UserError(f"batch norm ({names}) mixes examples: {cure}")

    def check(self, input, *params, problem=""):
        """params: a layer's weight and bias, or None. problem: what speaks against the layer."""
        tensors = (input, *params)
        name = next(self.names[t] for t in tensors if t in self.names)
        not_ours = any(p is not None and p not in self.names for p in params)
        if not problem and (input in self.names or not_ours):
            what = "the rest of its layer is frozen, or made from it"
            problem = f"{what}: train the whole layer as it is, or freeze it all"
        if problem:
            raise UserError(f"{name}: {problem}")
        if input.dim() == 0 or len(input) != self.B:
            what = f"{name} meets a tensor {tuple(input.shape)} in a batch of {self.B}"
            raise UserError(f"{what}: each example needs its own, as in x.expand(B, ...)")

    def linear(self, input, weight, bias=None):
        self.check(input, weight, bias)
        return ghost.linear(input, weight, bias, self.ledger)

    def layer_norm(self, input, normalized_shape, weight=None, bias=None, eps=1e-5):
        problem = ""
        if weight.dim() > 1:
            problem = "nn.LayerNorm over several dimensions: flatten them first"
        self.check(input, weight, bias, problem=problem)
        return ghost.layer_norm(input, weight, bias, eps, self.ledger)

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
        problem = ""
        if padding_idx is not None or max_norm or scale_grad_by_freq or sparse:
            what = "nn.Embedding with padding_idx, max_norm, scale_grad_by_freq or sparse"
            problem = f"{what}: leave them out, and mask padding in the model"
        is_shared = input.dim() == 1 and not hasattr(input, "of_batch")
        if is_shared and self.B > 1 and input.stride(0):
            what = "its indices (positions?) are not made from the batch"
            problem = f"{what}: give each example its own, as in torch.arange(T).expand(B, T)"
        self.check(input, weight, problem=problem)
        return ghost.embedding(input, weight, self.ledger)

    def conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        problem = ""
        if groups != 1:
            problem = "nn.Conv2d with groups: take groups=1"
        elif input.dim() != 4:
            problem = "nn.Conv2d of one image: add a batch dimension"
        self.check(input, weight, bias, problem=problem)
        dilation = as_pair(dilation)
        if padding == "same":
            high, wide = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:])]
            input = F.pad(input, (0, wide % 2, 0, high % 2))
            padding = (high // 2, wide // 2)
        elif padding == "valid":
            padding = 0
        args = (as_pair(stride), as_pair(padding), dilation)
        return conv2d(input, weight, bias, *args, self.ledger)


OPS = {
    F.linear: Ghosts.linear,
    F.layer_norm: Ghosts.layer_norm,
    F.embedding: Ghosts.embedding,
    F.conv2d: Ghosts.conv2d,
}


def tensors_in(nest):
    return [t for t in tree_leaves(nest) if isinstance(t, torch.Tensor)]


def as_pair(x):
    return (x, x) if isinstance(x, int) else x


def conv2d(x, weight, bias, stride, padding, dilation, ledger):
    """F.conv2d of x (B, I, H, W) in one group, with the values as in ghost.linear: a Linear over
    patches. stride, padding and dilation are pairs."""

    def patches(x):  # (B, places, I * height * width)
        return F.unfold(x, weight.shape[2:], dilation, padding, stride).mT

    if isinstance(ledger, ghost.Tape):  # it keeps x, for the patches are larger

        def values(gy, x):
            h = weight.h.flatten(2)
            return linear_values(gy.flatten(2).mT, patches(x), h, getattr(bias, "h", None))

        y = F.conv2d(x, weight, bias, stride, padding, dilation)
        return ledger.watch(y, values, x)
    covered = x.shape[2] + 2 * padding[0] - dilation[0] * (weight.shape[2] - 1) - 1
    height = covered // stride[0] + 1
    y = ghost.linear(patches(x), weight, bias, ledger)
    return y.mT.unflatten(2, (height, -1))
