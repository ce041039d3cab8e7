"""The audit: a step's values beside the exact Shapley values of that step (exact.py).

It changes nothing in the run. It needs B copies of the gradient and some of the weights, and a
forward of the targets for every subset of the batch that is looked at.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from shapley import exact
from shapley.batch import as_tensors, rows_of
from system import parallel, terminal
from system.machine import replaying


@dataclass
class Truth:
    """Of one step and K targets, in nats."""

    values: np.ndarray  # (B, K) exact Shapley values
    errors: np.ndarray  # (B, K) their standard errors: 0 where every subset was looked at
    leave_one_out: np.ndarray  # (B, K)
    utility: np.ndarray  # (K,) what the whole batch did


class Audit:
    def __init__(self, weights, targets, loss, settings, is_random, check):
        """is_random: whether a forward draws random numbers. check: see Valuation."""
        self.weights, self.targets, self.loss = weights, targets, loss
        self.settings, self.is_random = settings, is_random
        self.check = check

    def audits(self, step):
        """Whether a step is one of those that are audited."""
        interval = self.settings.audit_interval
        return interval > 0 and (step.number + 1) % interval == 0

    def solve(self, step):
        """The truth of a step, by the optimizer's own update in float64, before it is made."""
        batch = step.n_chunks() * parallel.size()
        device = self.weights.params[0].device
        x = [self.gradient_of(step, np.arange(batch) == i) for i in range(batch)]
        losses = []
        for k in range(len(self.targets)):
            X, Y = self.targets.batch(k, step.number)
            X = as_tensors(X, device)
            losses.append(exact.batch_loss(X, torch.as_tensor(Y, device=device)))
        game = exact.Step(
            self.weights.model, self.weights.optimizer, x, losses, self.settings.grad_clip
        )
        progress = partial(self.progress, name=f"audit of step {step.number}")
        permutations = self.settings.audit_permutations
        values, errors = exact.solve(game, batch, permutations, seed=step.number, progress=progress)
        return Truth(
            values=values,
            errors=errors,
            leave_one_out=exact.leave_one_out(game, batch),
            utility=game(np.ones(batch, bool)),
        )

    def progress(self, things, name):
        """Yields the things, with a progress bar."""
        for thing in terminal.progress(things, desc=name, leave=False):
            self.check()
            yield thing

    def gradient_of(self, step, chosen):
        """The sum of x_i over the chosen chunks of the batch, as in the step's own backward: one
        tensor a parameter. chosen: bool (n,), of all ranks."""
        self.check()
        total = [torch.zeros_like(p) for p in self.weights.params]
        start = parallel.mine(len(chosen)).start
        for micro_batch in step.micro_batches:
            end = start + len(micro_batch.ids)
            mask = torch.from_numpy(chosen[start:end])
            start = end
            mask = mask.to(micro_batch.Y.device)
            share = micro_batch.weights()[mask].sum()
            if not share:  # none of them is here, or has a label
                continue
            with replaying(micro_batch.rng):
                loss = self.loss(*self.only(micro_batch, mask))
                gradient = torch.autograd.grad(loss * share, self.weights.params)
            torch._foreach_add_(total, gradient)
        return parallel.add(total)

    def only(self, micro_batch, mask):
        """X, Y of the chunks in the mask. With random numbers (dropout) the others stay, without
        labels, for its masks belong to the whole micro-batch."""
        X, Y = micro_batch.X, micro_batch.Y
        if not self.is_random:
            return rows_of(X, mask, len(Y)), Y[mask]
        no_label = np.nan if Y.is_floating_point() else -1
        others = ~mask.view(-1, *[1] * (Y.dim() - 1))
        return X, Y.masked_fill(others, no_label)


def compare(values, truth):
    """A step's values (B, K) beside the truth: {entry of store.AUDIT_ENTRIES: (K,)}."""
    entries = {
        "utility": truth.utility,
        "efficiency_gap": values.sum(0) - truth.utility,
        "standard_error": np.sqrt((truth.errors**2).mean(0) / (truth.values**2).mean(0)),
    }
    for k in range(values.shape[1]):
        figures = dict(exact.agreement(values[:, k], truth.values[:, k]))
        beside = exact.agreement(values[:, k], truth.leave_one_out[:, k])
        figures["loo_pearson"] = beside["pearson"]
        figures["loo_spearman"] = beside["spearman"]
        for name, figure in figures.items():
            entries.setdefault(name, []).append(figure)
    return entries
