"""What a valuation found, before it is rounded to what goes on disk."""

import torch

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
    slopes = values if slopes is None else slopes
    known = [None if part is None else host(part) for part in (step.products, step.squares)]
    scores = valuation.finished(step, host(values), host(slopes), *known, step.ids)
    return torch.from_numpy(scores)
