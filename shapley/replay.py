"""A training whose steps can be taken again, whole or without some chunks.

    training = Training(model, optimizer, chunk_losses, batch, lr, n_chunks=8, grad_clip=1.0)
    training.take(step)                        a step, as the run took it
    training.take(step, left_out=[3, 5])       the same, had these slots of the batch not been there
    past = training.record(step)               a step, and all that hindsight needs of it

Nothing is valued here, and any model will do. B chunks of the global batch, b of this process.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch

from shapley.weights import Weights
from system import parallel
from system.machine import replaying, rng_state, set_rng_state


@dataclass
class Past:
    """A step as it was. Lists hold one tensor a parameter, in the order of Weights.params."""

    number: int
    t: int  # how many updates the optimizer had made with it, from 1
    lr: float
    clip_coef: float  # kappa: what the batch's gradient was multiplied by
    ids: np.ndarray  # (B,) the batch's chunks
    losses: torch.Tensor  # (b,) nats, of this process's chunks
    shares: np.ndarray  # (B,) what each chunk's loss counts in the step's
    weights: list  # before the step
    gradients: list  # what the optimizer took, kappa g
    moments: list  # (m, v) of AdamW after the step; empty for SGD
    rng: tuple  # random numbers before the step's first forward


class Training:
    """See the module's docstring."""

    def __init__(
        self,
        model,
        optimizer,
        chunk_losses,
        batch,
        lr,
        n_chunks,
        grad_clip=0.0,
        micro_batch=0,
        precise_losses=None,
        shares=None,
    ):
        """optimizer: torch's AdamW, or its SGD without momentum. chunk_losses(X, Y) -> each chunk's
        mean token loss (b,), with its graph; float64 is best, for hindsight looks at differences.
        batch(step) -> ids (B,), X, Y (B, ...), a function of the step alone; lr(step) -> its
        learning rate. n_chunks: B. micro_batch: chunks of one forward and backward; 0: all of this
        process. precise_losses: chunk_losses for differences, where those of the steps are of
        lower precision. shares(Y) -> what each chunk's loss counts in the step's (B,), of the whole
        batch's labels; without it 1 / B."""
        self.weights = Weights(model, optimizer)
        self.optimizer, self.chunk_losses = optimizer, chunk_losses
        self.precise_losses = precise_losses or chunk_losses
        self.batch, self.lr, self.n_chunks, self.grad_clip = batch, lr, n_chunks, grad_clip
        self.shares = shares or equal_shares
        self.mine = parallel.mine(n_chunks)
        self.micro_batch = micro_batch or self.mine.stop - self.mine.start

    # --- a step -------------------------------------------------------------------

    def take(self, number, left_out=(), weight=0.0):
        """Takes a step, without some slots of its batch: a chunk left out adds nothing to the
        gradient (or `weight` times what it did), and the others count what they did. Returns the
        batch's ids (B,), the losses of this process's chunks (b,) before the step, kappa, and the
        gradients that the optimizer took."""
        lr = self.lr(number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        ids, X, Y = self.batch(number)
        shares = self.shares(Y)
        shares[list(left_out)] *= weight
        losses = self.backward(self.chunk_losses, X, Y, shares)
        self.weights.set_gradients(parallel.add(self.weights.take_gradients()))
        clip_coef = 1.0
        if self.grad_clip:
            norm = torch.nn.utils.clip_grad_norm_(self.weights.params, self.grad_clip)
            clip_coef = float((self.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        return ids, losses, clip_coef, self.weights.take_gradients()

    def backward(self, chunk_losses, X, Y, shares):
        """Adds the gradient of the batch's loss to the parameters' .grad: this process's part of
        it. X, Y, shares: of the whole batch. Returns this process's losses (b,), no graph."""
        of_chunk = []
        for start in range(self.mine.start, self.mine.stop, self.micro_batch):
            rows = slice(start, min(start + self.micro_batch, self.mine.stop))
            losses = chunk_losses(X[rows], Y[rows])
            share = torch.as_tensor(shares[rows], dtype=losses.dtype, device=losses.device)
            (losses * share).sum().backward()
            of_chunk.append(losses.detach())
        return torch.cat(of_chunk)

    def record(self, number):
        """Takes a step. Returns it as a Past."""
        rng = rng_state()
        before = copied(p.data for p in self.weights.params)
        ids, losses, clip_coef, gradients = self.take(number)
        moments = []
        for p in self.weights.params:
            state = self.optimizer.state.get(p, {})
            if "exp_avg" in state:
                moments.append((state["exp_avg"].clone(), state["exp_avg_sq"].clone()))
        return Past(
            number=number,
            t=self.weights.updates_done(),
            lr=self.lr(number),
            clip_coef=clip_coef,
            ids=ids,
            losses=losses,
            shares=self.shares(self.batch(number)[2]),
            weights=before,
            gradients=gradients,
            moments=moments,
            rng=rng,
        )

    def gradient_at(self, places, past):
        """The batch's gradient at other weights, one tensor a parameter, and the losses of this
        process's chunks there (b,), with the random numbers of the step as it was."""
        _, X, Y = self.batch(past.number)
        with self.weights.at(places), replaying(past.rng):
            losses = self.backward(self.precise_losses, X, Y, past.shares)
            gradients = parallel.add(self.weights.take_gradients())
        return gradients, losses


def equal_shares(Y):
    """Each chunk's share of a step whose loss is the mean of the chunks'."""
    return np.full(len(Y), 1 / len(Y))


def copied(tensors):
    return [tensor.detach().clone() for tensor in tensors]


# --- states -------------------------------------------------------------------------


def state_of(training):
    """Where a training stands: weights, moments, random numbers, as copies."""
    optimizer = training.optimizer.state_dict()
    return {
        "weights": copied(p.data for p in training.weights.params),
        "optimizer": copy.deepcopy(optimizer),
        "rng": rng_state(),
    }


def put_back(training, state):
    """Takes a training to where it stood. The state stays as it is."""
    for p, weight in zip(training.weights.params, state["weights"]):
        p.data.copy_(weight)
    training.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    set_rng_state(state["rng"])
