"""The layers that give values, in a model that knows nothing of them: ghost.py's ops take the place of PyTorch's while a forward lasts.

A mode of PyTorch sees every operation of that forward, so a parameter that meets the data where no value comes from is found, and refused
with a ValueError that says what to do: its part would be missing from the values. Nothing is left behind when the forward ends.
"""

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from shapley import ghost
from system.errors import UserError

INSTEAD = "take nn.Linear, nn.Embedding, nn.LayerNorm or nn.Conv2d in its place, or freeze it with requires_grad_(False)"


class Ghosts(TorchFunctionMode):
    """While it is entered the model's parameters meet ghost.py's ops, and nothing else."""

    def __init__(self, model, X, ledger):
        super().__init__()
        self.names = {
            p: name for name, p in model.named_parameters() if p.requires_grad or hasattr(p, "h")
        }  # h: frozen for a second pass
        self.B, self.ledger = len(X), ledger
        X.of_batch = True  # and whatever is computed from it

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        params = [t for t in given if t in self.names]
        if func is F.batch_norm and (kwargs.get("training") or args[5:6] == (True,)):
            raise UserError(
                f"batch norm ({', '.join(map(self.names.get, params))}) mixes examples: take nn.LayerNorm in its place, or its eval()"
            )
        result = (
            OPS[func](self, *args, **kwargs) if params and func in OPS else func(*args, **kwargs)
        )
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if (
            params
            and func not in OPS
            and any(t.requires_grad or not params[0].requires_grad for t in made)
        ):
            raise UserError(
                f"{self.names[params[0]]} meets {func.__name__}, which gives no values: {INSTEAD}"
            )
        if any(hasattr(t, "of_batch") for t in given):
            for t in made:
                t.of_batch = True
        return result

    def check(self, input, *params, because=""):
        """params: a layer's weight and bias, or None. because: what speaks against this layer, if anything."""
        name = next(self.names[p] for p in (input, *params) if p in self.names)
        if input in self.names or any(p is not None and p not in self.names for p in params):
            because = (
                because
                or "the rest of its layer is frozen, or made from it: train the whole layer as it is, or freeze it all"
            )
        if because:
            raise UserError(f"{name}: {because}")
        if input.dim() == 0 or len(input) != self.B:
            raise UserError(
                f"{name} meets a tensor {tuple(input.shape)} in a batch of {self.B}: each example needs its own, as in x.expand(B, ...)"
            )

    def linear(self, input, weight, bias=None):
        self.check(input, weight, bias)
        return ghost.linear(input, weight, bias, self.ledger)

    def layer_norm(self, input, normalized_shape, weight=None, bias=None, eps=1e-5):
        self.check(
            input,
            weight,
            bias,
            because="nn.LayerNorm over several dimensions: flatten them first" * (weight.dim() > 1),
        )
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
        odd = padding_idx is not None or max_norm or scale_grad_by_freq or sparse
        because = (
            "nn.Embedding with padding_idx, max_norm, scale_grad_by_freq or sparse: leave them out, and mask padding in the model"
            * bool(odd)
        )
        if input.dim() == 1 and self.B > 1 and not hasattr(input, "of_batch") and input.stride(0):
            because = "its indices (positions?) are not made from the batch: give each example its own, as in torch.arange(T).expand(B, T)"
        self.check(input, weight, because=because)
        return ghost.embedding(input, weight, self.ledger)

    def conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        because = "nn.Conv2d with groups: take groups=1" * (
            groups != 1
        ) or "nn.Conv2d of one image: add a batch dimension" * (input.dim() != 4)
        self.check(input, weight, bias, because=because)
        stride, dilation = ((a, a) if isinstance(a, int) else a for a in (stride, dilation))
        if padding == "same":
            high, wide = (d * (size - 1) for d, size in zip(dilation, weight.shape[2:]))
            input, padding = F.pad(input, (0, wide % 2, 0, high % 2)), (high // 2, wide // 2)
        padding = (
            (0, 0)
            if padding == "valid"
            else (padding, padding)
            if isinstance(padding, int)
            else padding
        )
        return conv2d(input, weight, bias, stride, padding, dilation, self.ledger)


OPS = {
    F.linear: Ghosts.linear,
    F.layer_norm: Ghosts.layer_norm,
    F.embedding: Ghosts.embedding,
    F.conv2d: Ghosts.conv2d,
}


def conv2d(x, weight, bias, stride, padding, dilation, ledger):
    """F.conv2d of x (B, I, H, W) in one group, stride, padding and dilation pairs, with the values as in ghost.linear: a Linear over patches."""

    def patches(x):
        return F.unfold(
            x, weight.shape[2:], dilation, padding, stride
        ).mT  # (B, places, I * height * width)

    if isinstance(ledger, ghost.Tape):  # which keeps x, for the patches are larger

        def values(gy, x):
            return ghost.linear_values(
                gy.flatten(2).mT, patches(x), weight.h.flatten(2), getattr(bias, "h", None)
            )

        return ledger.watch(F.conv2d(x, weight, bias, stride, padding, dilation), values, x)
    high = (x.shape[2] + 2 * padding[0] - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1
    return ghost.linear(patches(x), weight, bias, ledger).mT.unflatten(2, (high, -1))
