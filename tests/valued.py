"""What a valuation found, before it is rounded to what goes on disk."""

import torch

from valuation import host


def settled(valuation):
    """The last step's values (B, K) and losses (B,), float64."""
    step = valuation.pending[-1]
    return finished(valuation, step.values), torch.from_numpy(host(step.losses))


def smoothed(valuation):
    """The last step's scores by the smoothed directions, float64 (B, K)."""
    return finished(valuation, valuation.pending[-1].smoothed)


def finished(valuation, values):
    step = valuation.pending[-1]
    products = None if step.products is None else host(step.products)
    return torch.from_numpy(valuation.finished(step, host(values), products))
