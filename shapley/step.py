"""What is known of an optimizer step while it is valued. K targets, b chunks of a micro-batch."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from shapley.ghost import Tape


@dataclass
class MicroBatch:
    """A rank's part of a micro-batch, and what its forward and backward left behind."""

    ids: np.ndarray  # (b,) numbers of its chunks
    X: object  # a tensor, or a nest of them (batch.py)
    Y: Tensor
    # zeros, whose gradient will be the values of one pass; None of a two-pass rule
    ledger: Tensor | None
    tape: Tape | None  # for a second pass; None where that repeats the forward
    rng: object  # the random numbers' state before its forward
    share: float | None = None  # what its mean loss counts in the step's, of all ranks
    losses: Tensor | None = None  # (b,) nats
    # (b,) what each chunk's loss counts in the micro-batch's mean loss, but for a common factor
    counts: Tensor | None = None
    # where a second pass found them: (b, n), of all directions but the batch's own. Then products
    # and squares are over all weights
    values: Tensor | None = None
    # the rows that `adamw` values exactly (directions.py)
    per_chunk: dict = field(default_factory=dict)  # {p: each chunk's gradient (b, R, ...)}
    exact_values: Tensor | float = 0.0  # (b, K or 2K), what they add to the values
    products: Tensor | float = 0.0  # (b,) <x_i, kappa g>
    squares: Tensor | float = 0.0  # (b,) |x_i|^2

    def weights(self):
        """What each chunk's loss counts in the step's, of all ranks: (b,) float64."""
        counts = self.counts.double()
        return counts * (self.share / counts.sum().clamp(min=1e-300))


@dataclass
class InnerProducts:
    """What a pass over the batch found out about a step's chunks: tensors of this rank's n chunks,
    or arrays of the B of all ranks. None of what the rule does not find out."""

    # <x_i, h>, before lr, kappa and clipping's game, of K or 2K directions h (smoothed ones after
    # the others)
    values: object = None  # (n, K or 2K)
    slopes: object = None  # (n, K or 2K) the same by D' (clipping.py)
    products: object = None  # (n,) <x_i, kappa g>
    squares: object = None  # (n,) |x_i|^2


@dataclass
class Step:
    """One step of the optimizer."""

    number: int
    lr: float
    t: int  # the optimizer's coming update is its t-th: 1, 2, ...
    clip_coef: float | Tensor = 1.0  # kappa: what clipping multiplied the gradients by
    micro_batches: list[MicroBatch] = field(default_factory=list)
    book: dict = field(default_factory=dict)  # of a measured step: {entry: (K,) nats}
    truth: object = None  # of an audited step: audit.Truth
    # of rules that check what they foresaw (valuation.py)
    losses_before: Tensor | None = None  # (K,) the targets', where one-pass rules take gradients
    # (K,) what one pass left unexplained of the measured change, as a part of its values' size
    gap: Tensor | None = None
    left: Tensor | None = None  # (K,) the same of the values that stand
    failed: int = 0  # 1 where one pass left too much, 2 where two passes did so too
    passes: int = 1  # over the batch
    is_early: bool = False  # one of the first updates of some parameter, where rules are rough
    # after the step, of this rank's chunks in their order
    ids: np.ndarray | None = None  # (n,)
    losses: Tensor | None = None  # (n,) nats
    weights: Tensor | None = None  # (n,) what each chunk's loss counts in the step's
    found: InnerProducts | None = None  # by the step's last pass
    first_found: InnerProducts | None = None  # by the first pass, where its check failed
    holds: Tensor | None = None  # (K,) bool, the targets for which what it found stands then

    def n_chunks(self):
        """Chunks of this rank."""
        return sum(len(micro_batch.ids) for micro_batch in self.micro_batches)
