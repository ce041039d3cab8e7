"""Whose loss the values speak of: which chunks of each target speak at a step, their loss, and its
gradient.

A target is an object with .name, .ids (its chunks' numbers, or None), len() and
.batch(picks) -> arrays X, Y (n, ...). A label of -1, or NaN where labels are floats, is none
(data.Target, shapley.wrap.Examples).
"""

import contextlib

import numpy as np
import torch

from shapley import labels
from shapley.batch import rows_of
from system import parallel
from system.errors import UserError
from system.parallel import local


class Targets:
    def __init__(self, targets, weights, loss, settings, check):
        """weights: Weights. loss(X, Y) -> mean loss, a scalar tensor. settings: Settings of
        valuation.py, of which target_batch, target_sampling, micro_batch and seed count here.
        check: see Valuation."""
        self.targets, self.weights, self.loss, self.settings = targets, weights, loss, settings
        self.check = check
        self.model = weights.model

    def __len__(self):
        return len(self.targets)

    # --- which chunks -----------------------------------------------------------

    def picks(self, k, step):
        """Which of target k's chunks speak for it at a step: a pure function of (seed, k, step)."""
        n_chunks = len(self.targets[k])
        n_picks = min(n_chunks, self.settings.target_batch)
        draw = step if self.settings.target_sampling == "redraw" else 0
        rng = np.random.default_rng((self.settings.seed, k, draw))
        return rng.choice(n_chunks, n_picks, replace=False)

    def batch(self, k, step):
        """The chunks that speak for target k at a step: arrays X, Y (n, ...)."""
        return self.targets[k].batch(self.picks(k, step))

    def slices(self, k, step):
        """This rank's part of batch(k, step), in slices of micro_batch chunks: yields X, Y, and the
        slice's share of all labels of the batch.

        Every rank yields as many slices, for sharded models compute in step. A rank that has no
        chunk left repeats one with share 0.
        """
        X, Y = self.batch(k, step)
        n_labels = labels.count(np.asarray(Y))
        if not n_labels.any():
            what = (
                f"target {self.targets[k].name!r}: none of its examples in step {step} has a label"
            )
            raise UserError(f"{what}: leave such examples out of it")
        padded = len(Y) + -len(Y) % parallel.size()
        mine = parallel.mine(padded)
        size = self.settings.micro_batch or len(Y)
        for start in range(mine.start, mine.stop, size):
            chunks = slice(start, min(start + size, mine.stop))
            share = n_labels[chunks].sum() / n_labels.sum()
            if not share:
                chunks = [n_labels.argmax()]
            self.check()
            yield rows_of(X, chunks, len(Y)), Y[chunks], share

    # --- losses and gradients ---------------------------------------------------

    @contextlib.contextmanager
    def evaluating(self):
        """The model without dropout. Then each of its modules is in the mode that it was in."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    @torch.no_grad()
    def losses(self, step):
        """The targets' losses at the weights as they are: (K,) nats."""
        losses = []
        with self.evaluating():
            for k in range(len(self.targets)):
                losses.append(sum(self.loss(X, Y) * share for X, Y, share in self.slices(k, step)))
        return parallel.add([torch.stack(losses)])[0]

    def gradient(self, k, step):
        """Target k's loss at the weights as they are, and its gradient, one tensor a parameter."""
        total = 0.0
        with self.evaluating():
            for X, Y, share in self.slices(k, step):
                loss = self.loss(X, Y) * share
                if self.weights.sharded:  # FSDP's gradients are the ranks' mean, not their sum
                    (loss * parallel.size()).backward()
                else:
                    loss.backward()
                total = total + loss.detach()
        gradient = [local(g) for g in self.weights.take_gradients()]
        parallel.add([total] if self.weights.sharded else [total, *gradient])
        return total, gradient

    def gradients(self, step):
        """All targets' losses (K,), and per parameter their gradients (K, *shape)."""
        losses, of_target = [], []
        for k in range(len(self.targets)):
            loss, gradient = self.gradient(k, step)
            losses.append(loss)
            of_target.append(gradient)
        stacked = []
        for i in range(len(self.weights.params)):
            one_parameter = [gradient[i] for gradient in of_target]
            for gradient in of_target:
                gradient[i] = None  # freed, so that all of them never exist twice
            # a single target's gradient is not copied
            stacked.append(
                one_parameter[0][None] if len(of_target) == 1 else torch.stack(one_parameter)
            )
        return torch.stack(losses), stacked

    # --- values.json --------------------------------------------------------------

    def describe(self, k):
        """What values.json says of target k: enough to find its chunks again."""
        target = self.targets[k]
        source = "text" if target.ids is None else "val.npy"
        entry = {
            "name": target.name,
            "chunks": len(target),
            "source": getattr(target, "source", source),
            "crc32": checksum_of(target),
        }
        if self.settings.target_sampling == "fixed":
            picks = self.picks(k, 0)
            entry["ids"] = (picks if target.ids is None else target.ids[picks]).tolist()
            return entry
        n_picks = min(len(target), self.settings.target_batch)
        generator = f"numpy.random.default_rng(({self.settings.seed}, {k}, step))"
        draw = f"{generator}.choice({len(target)}, {n_picks}, replace=False)"
        entry["drawn"] = f"at every step: {draw} of the target's chunks, in order of their ids"
        return entry

    def checksums(self):
        """{name: CRC-32 of a text that may change under its name; None of chunks of val.npy}."""
        return {target.name: checksum_of(target) for target in self.targets}


def checksum_of(target):
    return target.checksum() if hasattr(target, "checksum") else None
