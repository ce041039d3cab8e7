"""Any model as valuation.py wants it: net = Net(model, loss); net(X, Y, ledger) -> (outputs, mean loss), the contract of model.GPT.

The model is an ordinary nn.Module whose trainable parameters meet the data in nn.Linear, nn.Embedding, nn.LayerNorm and nn.Conv2d only
(F.linear and its like count too; so do ties and repeated uses), on inputs that have the batch first. Anything else is refused with a
ValueError (shapley/layers.py). Nothing of the model is changed; the names in net.state_dict() are its own behind `model.`.

loss: F.cross_entropy, F.mse_loss or anything that is called like them, with reduction="none". An example's loss is the mean over its
labels, the batch's the mean over its examples; a label of -1, or NaN where they are floats, is none. (Where examples have unequal numbers
of labels, let a target be one slice: micro_batch=0, one process.) X and Y are tensors or arrays, floats taken in the model's precision.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from shapley.layers import Ghosts


class Net(nn.Module):
    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss, self.chunk_loss = (
            model,
            loss,
            None,
        )  # chunk_loss (B,): set by a forward with a ledger

    def forward(self, X, Y, ledger=None):
        like = next(self.parameters())
        X, Y = (torch.as_tensor(a, device=like.device) for a in (X, Y))
        X, Y = (a.to(like.dtype) if a.is_floating_point() else a for a in (X, Y))
        if ledger is None:
            outputs = self.model(X)
        else:
            with Ghosts(self.model, X := X.detach(), ledger):
                outputs = self.model(X)
        known = ~Y.isnan() if Y.is_floating_point() else Y >= 0
        losses = self.loss(outputs, Y.masked_fill(~known, 0), reduction="none")
        if known.shape != losses.shape:  # of class probabilities: one loss for several labels
            known = known.flatten(1).any(1)
        of_each = torch.where(known, losses, 0).reshape(len(Y), -1).sum(1) / (
            labels := known.reshape(len(Y), -1).sum(1)
        ).clamp(min=1)
        if ledger is not None:
            self.chunk_loss = of_each.detach()
        return outputs, of_each.sum() / (labels > 0).sum()


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
