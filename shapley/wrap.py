"""Any model as valuation.py wants it.

    net = Net(model, loss)
    outputs, mean_loss = net(X, Y, ledger)          # the contract of model.GPT

The model is an ordinary nn.Module, unmodified: of PyTorch, of Hugging Face, with adapters or
without. Its parameters give values wherever they meet the data (intercept.py): in one backward
where the operation has a fast form, else by forward-mode passes, one for each target.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from shapley import ghost
from shapley.batch import as_tensors, rows_of
from shapley.intercept import GENERAL, Along, Ghosts, refuse_reentrant
from system.errors import UserError
from system.machine import replaying, rng_state


class Net(nn.Module):
    """A model and its loss.

    X: a tensor or array; a dict of them, as a tokenizer gives it, for the model's keywords; or a
    tuple, for its arguments. Those with as many rows as Y are the batch. Floats are taken in the
    model's precision. Y: labels (B, ...), a tensor or array. A label below 0 (-1, or -100), or NaN
    where labels are floats, is none.

    loss(outputs, Y, reduction="none"): F.cross_entropy, F.mse_loss, token_loss, causal_lm_loss, or
    a function of your own: a number for each label, (B, ...), or for each example, (B,). outputs:
    the model's, of a Hugging Face model its .logits. An example's loss is the mean over its labels.

    mean: what the batch's loss is the mean over. "examples": those that have a label, each counts
    alike. "labels": all labels, so an example counts as many as it has.

    The names in state_dict() are the model's own behind `model.`. Where examples have unequal
    numbers of labels and count alike, let a target be one slice (micro_batch=0, one process).
    """

    def __init__(self, model, loss, mean="examples"):
        super().__init__()
        assert mean in ("examples", "labels"), mean
        self.model, self.loss, self.mean = model, loss, mean
        # set by a forward with a ledger: see ghost.py
        self.chunk_loss = self.chunk_weight = None
        self.ways = set()  # where its weights met the batch so far (intercept.py)
        self.precision = None  # the dtype that the last forward with a ledger computed in

    def forward(self, X, Y, ledger=None):
        X, Y = self.as_inputs(X), self.as_inputs(Y)
        if ledger is None:
            outputs = self.call(X)
            return outputs, weighted_mean(*self.example_losses(outputs, Y))
        X = tree_map_only(torch.Tensor, torch.Tensor.detach, X)
        rng = rng_state()
        with Ghosts(self.model, X, len(Y), ledger) as ghosts:
            outputs = self.call(X)
        self.ways |= ghosts.ways
        self.precision = self.dtype_now(Y.device.type)
        losses, weights = self.example_losses(outputs, Y)
        self.chunk_loss, self.chunk_weight = losses.detach(), weights
        loss = weighted_mean(losses, weights)
        if any(way == GENERAL for _, _, way in ghosts.ways):
            loss = ghost.with_values(loss, ledger, self.along_directions(X, Y, rng))
        return outputs, loss

    def call(self, X):
        if isinstance(X, dict):
            return self.model(**X)
        return self.model(*X) if isinstance(X, tuple) else self.model(X)

    def as_inputs(self, nest):
        like = next(p for p in self.parameters() if p.is_floating_point())
        return as_tensors(nest, like.device, like.dtype)

    def dtype_now(self, device):
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return next(p for p in self.parameters() if p.is_floating_point()).dtype

    def example_losses(self, outputs, Y):
        """Each example's loss (B,), 0 of one without labels; and what it counts in the batch's,
        but for a common factor: int64 (B,), 0 of one without labels."""
        outputs = getattr(outputs, "logits", outputs)
        if self.loss is causal_lm_loss:
            Y = next_tokens(Y)
        has_label = ~Y.isnan() if Y.is_floating_point() else Y >= 0
        losses = self.loss(outputs, Y.masked_fill(~has_label, 0), reduction="none")
        if has_label.shape != losses.shape:  # one loss for several labels, as class probabilities
            has_label = has_label.flatten(1).any(1)
        if has_label.shape != losses.shape:
            what = f"the loss gives {tuple(losses.shape)} numbers for labels {tuple(Y.shape)}"
            raise UserError(f"{what}: let it give one for each label or each example")
        n_labels = has_label.reshape(len(Y), -1).sum(1)
        summed = torch.where(has_label, losses, 0).reshape(len(Y), -1).sum(1)
        weights = n_labels if self.mean == "labels" else n_labels.clamp(max=1)
        return summed / n_labels.clamp(min=1), weights

    # --- the general way (intercept.py) -----------------------------------------------

    def along_directions(self, X, Y, rng):
        """What finds the derivatives of each example's share of the loss along the directions, of
        weights that meet the batch in a general way: a function -> (B, K)."""
        device = Y.device.type
        precision = torch.get_autocast_dtype(device)
        autocast = torch.autocast(device, precision, enabled=torch.is_autocast_enabled(device))

        def find():
            h = next(p.h for p in self.parameters() if getattr(p, "h", None) is not None)
            with autocast:
                return torch.stack([self.along(X, Y, rng, k) for k in range(len(h))], 1)

        return find

    def along(self, X, Y, rng, k):
        """(B,): the derivatives along direction k, by one pass in forward mode. Where an operation
        has none, by a central difference of two passes."""
        try:
            # other attention has no forward mode
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
                losses = self.losses_along(X, Y, rng, k)
                primal, tangent = forward_ad.unpack_dual(losses)
                return torch.zeros_like(primal) if tangent is None else tangent.detach()
        except NotImplementedError:
            size = self.difference(k)
            ahead = self.losses_along(X, Y, rng, k, size)
            behind = self.losses_along(X, Y, rng, k, -size)
            return (ahead - behind) / (2 * size)

    def difference(self, k):
        """How far along direction k a central difference goes: by a small part of the weights'
        length."""
        params = [p for p in self.parameters() if getattr(p, "h", None) is not None]
        weights = torch.stack(torch._foreach_norm([p.detach() for p in params])).norm()
        direction = torch.stack(torch._foreach_norm([p.h[k] for p in params])).norm()
        # rounding and curvature are of one size there
        part = torch.finfo(weights.dtype).eps ** (1 / 3)
        return part * weights / direction if direction else torch.ones_like(weights)

    def losses_along(self, X, Y, rng, k, difference=None):
        X = tree_map_only(torch.Tensor, torch.Tensor.detach, X)
        # with gradients on, the model's own no_grad is seen; there is nothing to take one of
        with replaying(rng), torch.enable_grad(), Along(self.model, X, len(Y), k, difference):
            outputs = self.call(X)
        losses, weights = self.example_losses(outputs, Y)
        return losses * weights / weights.sum().clamp(min=1)

    def survey(self, X, Y):
        """Runs the model once as it is, and says on its parameters how they meet the batch: .tokens
        of one whose rows the batch's integers look up, .indirect of one whose gradient of each
        example alone is not to be had. Raises UserError where a part can have no values."""
        X, Y = self.as_inputs(X), self.as_inputs(Y)
        X = tree_map_only(torch.Tensor, torch.Tensor.detach, X)
        with replaying(rng_state()), Ghosts(self.model, X, len(Y), ghost.Tape()) as ghosts:
            refuse_reentrant(self.call(X))
        for p, name in ghosts.names.items():
            p.indirect = name in ghosts.indirect
            if p in ghosts.tokens and not p.indirect:
                p.tokens = True


def weighted_mean(losses, weights):
    """losses (B,), weights int64 (B,) -> a scalar; 0 where all weights are."""
    return (losses * weights).sum() / weights.sum().clamp(min=1)


@dataclass
class Examples:
    """A target: arrays that hold an example a row; X may be a dict or a tuple of them."""

    name: str
    X: np.ndarray  # (n, ...)
    Y: np.ndarray  # (n,) or (n, ...)
    ids: np.ndarray | None = None
    source: str = "examples"

    def batch(self, picks):
        return rows_of(self.X, picks, len(self)), self.Y[picks]

    def __len__(self):
        return len(self.Y)


# --- losses of language models ------------------------------------------------------


def token_loss(logits, Y, reduction="none"):
    """Cross-entropy of logits (B, T, V) with labels Y (B, T), which stand at the position that
    predicts them: of masked language models, encoder-decoders, and chunks as data.py gives them.
    (B, T)."""
    return F.cross_entropy(logits.mT, Y, reduction=reduction)


def causal_lm_loss(logits, Y, reduction="none"):
    """token_loss for labels as Hugging Face has them: Y (B, T) are the inputs' own tokens, or -100,
    and the one at position t is predicted at t - 1. Net moves them there."""
    return token_loss(logits, Y, reduction)


def next_tokens(Y):
    """Labels (B, T) at the positions that predict them; the last one has none."""
    return torch.cat([Y[:, 1:], torch.full_like(Y[:, :1], -100)], 1)
