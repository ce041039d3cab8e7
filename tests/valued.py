"""What a valuation found, before it is rounded to what goes on disk."""

import torch

from valuation import host


def settled(valuation):
    """The last step's values (B, K) and losses (B,), float64."""
    step = valuation.pending[-1]
    clip_coef = float(step.clip_coef)
    products = None if step.products is None else host(step.products)
    values = valuation.rule.correct(host(step.values) * (step.lr * clip_coef), clip_coef, products)
    return torch.from_numpy(values), torch.from_numpy(host(step.losses))
