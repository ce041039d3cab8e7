"""The books: why a target's loss changed in a step.

    before - after = data + momentum + decay + residual        per target, in nats
    data     = sum_i value_i
    momentum = lr <g_k, D(0)>       what the optimizer would have done without data
    decay    = lr wd <g_k, w>       what weight decay did

g_k is the target's gradient halfway between the weights and where momentum and decay alone would
land, so that these two and the data's part, which begins there, add up to third order. Only
measured steps have all entries: they cost the targets' pass once more, and two forwards.
"""

import torch

from shapley.directions import coefficients, landing
from shapley.sweeps import displacement_of_nothing


class Books:
    """Fills step.book, {entry: (K,) nats}, of the measured steps."""

    def __init__(self, weights, targets, settings):
        self.weights, self.targets, self.settings = weights, targets, settings

    def measures(self, step):
        """Whether a step is one of those that are measured."""
        interval = self.settings.book_interval
        return interval > 0 and step.number % interval == 0

    def begin(self, step):
        """Before the step's directions are set."""
        if not self.measures(step):
            return
        momentum, decay = [], []
        reuse_memory = len(self.targets) == 1
        places = landing(self.weights, step, 0.5, reuse_memory, self.settings.compile)
        with self.weights.at(places) as weights:
            for k in range(len(self.targets)):
                _, gradient = self.targets.gradient(k, step.number)
                of_momentum, of_decay = self.without_data(step, gradient, weights)
                momentum.append(of_momentum)
                decay.append(of_decay)
        step.book["momentum"] = torch.stack(momentum)
        step.book["decay"] = torch.stack(decay)

    @torch.no_grad()
    def without_data(self, step, gradient, weights):
        """lr <g_k, D(0)> and lr wd <g_k, w>, for one target's gradient; two scalar tensors."""
        momentum = decay = weights[0].new_zeros(())
        for p, g, w in zip(self.weights.params, gradient, weights):
            group = self.weights.groups[p]
            g = step.lr * g.flatten()
            decay = decay + group["weight_decay"] * (g @ w.flatten())
            coef = coefficients(group, step.t)
            if coef is not None:
                m, v = self.weights.moments(p)
                momentum = momentum + g @ displacement_of_nothing(coef, m, v).flatten()
        return self.weights.sum_over_ranks(momentum), self.weights.sum_over_ranks(decay)

    def before(self, step):
        """When the directions are set: the losses before the step, unless the rule has them."""
        if self.measures(step) and "before" not in step.book:
            step.book["before"] = self.targets.losses(step.number)

    def after(self, step):
        """After the optimizer's step."""
        if self.measures(step):
            step.book["after"] = self.targets.losses(step.number)


def residual(book):
    """What the other entries of a measured step leave unexplained."""
    explained = book["data"] + book["momentum"] + book["decay"]
    return book["before"] - book["after"] - explained
