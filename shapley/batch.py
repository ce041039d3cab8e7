"""A batch's inputs: a tensor or array, or a nest of them (a dict, a tuple), of which those with as
many rows as there are examples hold an example a row."""

from collections.abc import Mapping

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only


def tensors_in(nest):
    return [t for t in tree_leaves(nest) if isinstance(t, torch.Tensor)]


def plain(nest):
    """A mapping of any kind as a dict; everything else as it is."""
    return dict(nest) if isinstance(nest, Mapping) else nest


def rows_of(nest, rows, n):
    """Some examples of n. rows: a slice, numbers, or a mask."""

    def picked(t):
        return t[rows] if t.ndim and len(t) == n else t

    return tree_map_only((torch.Tensor, np.ndarray), picked, plain(nest))


def as_tensors(nest, device, dtype=None):
    """Arrays become tensors on a device. dtype: floats become that."""

    def moved(t):
        t = torch.as_tensor(t, device=device)
        return t.to(dtype) if dtype and t.is_floating_point() else t

    return tree_map_only((torch.Tensor, np.ndarray), moved, plain(nest))


def integers_in(nest):
    """All integers in a nest, each once: int64 (n,), sorted. What may be a token of it."""
    found = [np.empty(0, np.int64)]
    for t in tree_leaves(plain(nest)):
        t = t.cpu().numpy() if isinstance(t, torch.Tensor) else np.asarray(t)
        if t.dtype.kind in "iu":
            found.append(np.unique(t).astype(np.int64))
    return np.unique(np.concatenate(found))
