"""The truth that values are held against: training again without some visits.

A visit is a chunk's use in a step, numbered step * B + slot, as the rows of ledger.npy. Of n random
sets of visits each is left out of a training, which begins where the first of them could be, and
the target's loss at the end is compared with that of the training as it was. What the values
predict is the sum of those left out. (The linear datamodeling score, LDS, of Park et al., arXiv
2303.14186, with visits in the place of examples.)
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from shapley.replay import put_back


def draw_sets(n_sets, visits, fraction, seed):
    """n_sets random sets, each of the same fraction of some visits (int64, at least 1), sorted."""
    size = max(1, round(fraction * len(visits)))
    rng = np.random.default_rng((seed, n_sets, size))
    return [np.sort(rng.choice(visits, size, replace=False)) for _ in range(n_sets)]


def train_without(training, state, visits, first, end, check=lambda: None, weight=0.0):
    """Takes the training from a state before step `first` to step `end`, without some visits.
    check: called before each step. weight: what their gradients count, if not 0."""
    put_back(training, state)
    slots_of_step = {}
    for visit in visits:
        step, slot = divmod(int(visit), training.n_chunks)
        slots_of_step.setdefault(step, []).append(slot)
    for step in range(first, end):
        check()
        training.take(step, slots_of_step.get(step, ()), weight)


@dataclass
class Agreement:
    """How well values predict what leaving visits out does to a loss."""

    n_sets: int
    pearson: float  # LDS
    low: float  # its 95 % interval (Fisher), over sets
    high: float
    spearman: float
    slope: float  # true change per unit predicted: 1 if the scores are nats, and right
    slope_error: float  # its standard error

    @property
    def standard_error(self):
        """Of the correlation: a quarter of its interval, about."""
        return (self.high - self.low) / 3.92


def agreement(predicted, true):
    """predicted, true (n_sets,): of each set the rise of the loss without it. All figures are NaN
    where either is the same for all sets, or not finite for one. Raises ValueError for fewer than 4
    sets, of which no interval can be told."""
    if len(true) < 4:
        raise ValueError(f"{len(true)} sets: an interval needs 4")
    if not (varies(predicted) and varies(true)):
        return Agreement(len(true), *[math.nan] * 6)
    pearson = stats.pearsonr(predicted, true)
    low, high = pearson.confidence_interval()
    line = stats.linregress(predicted, true)
    return Agreement(
        n_sets=len(true),
        pearson=float(pearson.statistic),
        low=float(low),
        high=float(high),
        spearman=float(stats.spearmanr(predicted, true).statistic),
        slope=float(line.slope),
        slope_error=float(line.stderr),
    )


def varies(x):
    return np.isfinite(x).all() and np.ptp(x) > 0


def sums_of_sets(scores, sets):
    """scores (n_visits,), by the visits' numbers -> their sum over each set (n_sets,), float64. A
    NaN, of a visit that has no score, counts as 0."""
    scores = np.asarray(scores, np.float64)
    scores = np.where(np.isnan(scores), 0, scores)
    return np.array([scores[visits].sum() for visits in sets])
