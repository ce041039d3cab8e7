"""Small trainings of a GPT with a tied head, as tests of hindsight take them: whole or without some
visits."""

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, GPTConfig
from shapley import hindsight
from shapley.replay import Training

B, T, VOCAB = 4, 8, 32


class Run:
    """A training, its targets, and what it takes to do all of it again in float64."""

    def __init__(
        self,
        dtype=torch.float64,
        kind="adamw",
        grad_clip=0.5,
        dropout=0.0,
        micro_batch=0,
        weight_decay=0.1,
        lr=None,
        pool=40,
        n_steps=6,
        n_chunks=B,
    ):
        """pool: chunks that the batches are drawn from. n_chunks: of a batch."""
        self.n_steps, self.n_chunks = n_steps, n_chunks
        self.grad_clip, self.micro_batch = grad_clip, micro_batch
        torch.manual_seed(0)
        sizes = dict(block_size=T + 2, vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=16)
        self.model = GPT(GPTConfig(**sizes, dropout=dropout, bias=False)).to(dtype)
        rng = np.random.default_rng(0)
        self.rows = rng.integers(0, VOCAB, (pool, T + 1))
        self.targets = rng.integers(0, VOCAB, (2, 5, T + 1))  # K chunks' tokens
        self.optimizer = self.model.configure_optimizers(weight_decay, 1.0, (0.9, 0.95), "cpu")
        self.peak = lr or 5e-3
        if kind == "sgd":
            self.optimizer = torch.optim.SGD(self.optimizer.param_groups)
            self.peak = lr or 0.5
        what = (self.model, self.optimizer, self.chunk_losses, self.batch, self.lr)
        self.training = Training(*what, n_chunks, grad_clip, micro_batch)

    def lr(self, step):
        """It warms up."""
        return self.peak * min(1, (step + 1) / 4)

    def batch(self, step):
        ids = np.random.default_rng(step).choice(len(self.rows), self.n_chunks, replace=False)
        return ids, self.rows[ids, :-1], self.rows[ids, 1:]

    def chunk_losses(self, X, Y):
        """In float64 from the logits on."""
        X, Y = torch.as_tensor(X), torch.as_tensor(Y)
        logits, _ = self.model(X, Y)
        losses = F.cross_entropy(logits.double().flatten(0, 1), Y.flatten(), reduction="none")
        return losses.view(Y.shape).mean(1)

    def steps(self):
        """As exact.hindsight takes them."""
        steps = []
        for number in range(self.n_steps):
            _, X, Y = self.batch(number)
            steps.append((torch.as_tensor(X), torch.as_tensor(Y), self.lr(number)))
        return steps

    def target_loss(self, k):
        """A loss that any model of these weights can be asked for."""
        X, Y = torch.as_tensor(self.targets[k, :, :-1]), torch.as_tensor(self.targets[k, :, 1:])
        return lambda model: model(X, Y)[1]

    def target_gradient(self, k):
        """At the weights as they are, without dropout."""
        self.model.eval()
        loss = self.target_loss(k)(self.model)
        self.model.train()
        return list(torch.autograd.grad(loss, self.training.weights.params))

    def final_loss(self, k=0):
        """Without dropout, at the weights as they are."""
        self.model.eval()
        with torch.no_grad():
            loss = float(self.target_loss(k)(self.model))
        self.model.train()
        return loss

    def record(self, seed=5):
        """Takes all steps."""
        torch.manual_seed(seed)
        with sdpa_kernel(SDPBackend.MATH):
            return [self.training.record(step) for step in range(self.n_steps)]

    def sweep(self, past, gradient, back=hindsight.back, **options):
        """The values (N, b) of the steps in past, for the target of that gradient at their end."""
        adjoint = hindsight.Adjoint.of_end(gradient, bool(past[0].moments))
        values = []
        with sdpa_kernel(SDPBackend.MATH):
            for step in reversed(past):
                values.insert(0, back(self.training, step, adjoint, **options).numpy())
        return np.stack(values)


def distance(values, truth):
    """Relative, L2."""
    return np.linalg.norm(values - truth) / np.linalg.norm(truth)
