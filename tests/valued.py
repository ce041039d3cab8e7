"""What a valuation found, before it is rounded to what goes on disk."""

import torch

from system import store
from valuation import host


def settled(valuation):
    """The last step's values (B, K) and losses (B,), float64."""
    values = scores(valuation)[:, : len(valuation.targets)]
    return values, torch.from_numpy(host(valuation.pending[-1].losses))


def smoothed(valuation):
    """The last step's scores by the smoothed directions, float64 (B, K)."""
    return scores(valuation)[:, len(valuation.targets) :]


def scores(valuation):
    step = valuation.pending[-1]
    (found,) = valuation.gathered_products([step.found])
    (first_found,) = valuation.gathered_products([step.first_found])
    (ids,) = valuation.gathered([torch.from_numpy(step.ids)], store.NO_CHUNK)
    of_step = valuation.scores_of(step, found, first_found, ids)
    return torch.from_numpy(of_step[: len(step.ids)])
