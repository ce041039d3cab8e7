"""Which labels count, and what each example's loss counts in the step's.

A label of -1, or NaN where labels are floats, is none. The objective of a step is a weighted mean
of the losses of its micro-batches, whose weights are their shares (Valuation.new_ledger), and the
loss of a micro-batch is a weighted mean of its examples' (the model's .chunk_weight, ghost.py).
"""


def count(Y):
    """The labels of each example of Y (b, ...), an array or a tensor: int64 (b,)."""
    is_float = Y.is_floating_point() if hasattr(Y, "is_floating_point") else Y.dtype.kind == "f"
    has_label = Y == Y if is_float else Y >= 0  # NaN is not equal to itself
    return has_label.reshape(len(Y), -1).sum(1)


def shares(n_labels):
    """What the mean loss of each example, over its own labels, counts in the mean over all labels:
    float64 (b,), whose sum is 1; all 0 where there is none. n_labels: count() of an array."""
    return n_labels / max(1, int(n_labels.sum()))
