"""What a valuation found, before it is rounded to what goes on disk, and what it is to be."""

import copy

import torch

from shapley import exact
from valuation import host


def settled(valuation):
    """The last step's values (B, K) and losses (B,), float64."""
    step = valuation.pending[-1]
    values = finished(valuation, step.values, step.slopes)
    return values, torch.from_numpy(host(step.losses))


def smoothed(valuation):
    """The last step's scores by the smoothed directions, float64 (B, K)."""
    step = valuation.pending[-1]
    return finished(valuation, step.smoothed, step.smoothed_slopes)


def finished(valuation, values, slopes):
    step = valuation.pending[-1]
    known = [None if part is None else host(part) for part in (step.products, step.squares)]
    scores = valuation.finished(step, host(values), host(slopes), *known, step.ids)
    return torch.from_numpy(scores)


def squares_by_use(model, X, Y, *weights):
    """|x_i|^2 of a GPT's chunks (B,), where a weight that is used twice counts as two: that is what
    two-pass rules know. weights: of the chunks, see exact.chunk_gradients."""
    twin = copy.deepcopy(model)
    twin.lm_head.weight = torch.nn.Parameter(twin.lm_head.weight.detach().clone())
    x = exact.chunk_gradients(twin, X, Y, *weights)
    return torch.stack([exact.dot(x_i, x_i) for x_i in x])
