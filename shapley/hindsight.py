"""Hindsight: what each visit of a chunk did for the loss of the model that came out in the end.

Players are the visits (step t, chunk i) of a run; s_ti is the weight of chunk i's gradient in step
t, 1 in the run as it was. The value of a visit is -dL/ds_ti, where L is the target's loss at the
run's end: the nats that the final loss would rise by without it, to first order. Positive: it
helped. All later steps are in it, with their moments, clipping, decay and schedule.

The recursion goes from the last step to the first. It carries the adjoint of a step's outcome, the
derivative of L by weights and moments, and needs of each step two forward and backward passes, at
w + e h and w - e h: their chunks' losses differ by the values, their gradients by H h. (Engstrom et
al., arXiv 2503.13751, and MAGIC, Ilyas & Engstrom, arXiv 2504.16430, differentiate the same thing
by automatic differentiation; central differences in its place are this project's.)

Compute it in float32 or float64, and the chunks' losses in float64 from the logits on, or at least
their means: in bfloat16 the differences drown in rounding.
"""

from dataclasses import dataclass

import numpy as np
import torch

from shapley.replay import copied

EPSILON = 2e-4  # |e h| / |w|: see results/hindsight for errors against it


@dataclass
class Adjoint:
    """The derivative of a target's loss at the end by the state that a step leaves: lists of
    tensors, one a parameter. m, v: of AdamW's moments; empty for SGD."""

    w: list
    m: list
    v: list

    @classmethod
    def of_end(cls, gradient, has_moments):
        """Where the run ends, the loss depends on the weights alone. gradient: the target's."""
        nothing = [torch.zeros_like(g) for g in gradient] if has_moments else []
        return cls(copied(gradient), nothing, copied(nothing))

    def norm(self):
        """|dL/dw|, a float."""
        return float(norm(self.w))


# times the calm |dL/dw|. Trainings without visits of later steps were predicted with .78 to .90
# where it is 1.5; where it was 10 times the median of all steps, with .25 to .73
# (results/counterfactual)
CALM = 1.5
CALM_AHEAD = 10.0  # with a horizon: |dL/dw| jumps where the target's gradient is taken anew


def early(norms, horizon=0):
    """Which steps come before the adjoint is calm. In the first steps of a training everything
    depends on everything: small changes grow, |dL/dw| is large, and the derivative holds for
    changes only that are smaller than a chunk.

    norms: |dL/dw| by step (n, K). Returns bool (n, K): every step up to the last one of the first
    half whose norm is more than CALM (CALM_AHEAD) times the median of the second half, or no finite
    number."""
    half = (len(norms) + 1) // 2
    is_finite = np.isfinite(norms)
    later = np.where(is_finite, norms, np.nan)[half:]
    # of a single step there is no second half
    calm = np.nanmedian(later, axis=0) if len(later) else np.full(norms.shape[1], np.inf)
    is_large = ~is_finite | (norms > (CALM_AHEAD if horizon else CALM) * calm)
    is_large[half:] = False
    return np.flip(np.logical_or.accumulate(np.flip(is_large, 0), 0), 0)


def norm(tensors):
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def dot(a, b):
    return sum((x * y).sum() for x, y in zip(a, b))


def back(training, past, adjoint, epsilon=EPSILON):
    """Takes a step back.

    adjoint: of the state that the step left; becomes, in place, that of the state before it.
    Returns the values (b,) of this process's chunks, nats, float64.
    """
    h = direction(training, past, adjoint)
    values, curvature = differences(training, past, h, epsilon)
    torch._foreach_add_(adjoint.w, curvature)
    return values


def direction(training, past, adjoint):
    """Takes an adjoint back through a step, in place, but for what the batch's gradient brings.
    Returns the adjoint of that gradient, one tensor a parameter: the step's direction h."""
    if past.moments:
        a = through_adamw(training.weights, past, adjoint)
    else:
        a = through_sgd(training.weights, past, adjoint)
    return through_clipping(training.grad_clip, past, a)


@torch.no_grad()
def through_adamw(weights, past, adjoint):
    """Takes an adjoint back through AdamW's update. Returns the adjoint of the gradient that the
    optimizer took, one tensor a parameter."""
    a = []
    for i, p in enumerate(weights.params):
        group = weights.groups[p]
        beta1, beta2 = group["betas"]
        correction1, correction2 = 1 - beta1**past.t, 1 - beta2**past.t
        (m, v), g = past.moments[i], past.gradients[i]
        root = (v / correction2).sqrt()
        denominator = root + group["eps"]
        # m after the step moves w
        of_m = adjoint.m[i] - past.lr * adjoint.w[i] / (correction1 * denominator)
        # so does v, but where it is 0
        slope = past.lr * m / (correction1 * denominator**2 * 2 * root * correction2)
        of_v = adjoint.v[i] + adjoint.w[i] * torch.where(root > 0, slope, 0)
        a.append((1 - beta1) * of_m + 2 * (1 - beta2) * g * of_v)
        adjoint.w[i] *= 1 - past.lr * group["weight_decay"]
        adjoint.m[i] = beta1 * of_m
        adjoint.v[i] = beta2 * of_v
    return a


@torch.no_grad()
def through_sgd(weights, past, adjoint):
    """The same of SGD without momentum: w' = w - lr (g + weight_decay w)."""
    a = []
    for i, p in enumerate(weights.params):
        a.append(-past.lr * adjoint.w[i])
        adjoint.w[i] *= 1 - past.lr * weights.groups[p]["weight_decay"]
    return a


@torch.no_grad()
def through_clipping(grad_clip, past, a):
    """The adjoint of the batch's gradient g, of which the optimizer took kappa g, where kappa =
    grad_clip / (|g| + 1e-6) if that is below 1."""
    kappa = past.clip_coef
    if kappa == 1.0:
        return a
    taken = norm(past.gradients)  # kappa |g|
    along = dot(past.gradients, a) / taken**2
    along *= taken / grad_clip  # |g| / (|g| + 1e-6)
    return [kappa * (x - along * g) for x, g in zip(a, past.gradients)]


def differences(training, past, h, epsilon):
    """-<x_i, h> of this process's chunks (b,), float64, and H h, one tensor a parameter: from the
    batch's losses and gradients on either side of the step's weights."""
    size = norm(h)
    if size == 0:
        return torch.zeros(len(past.losses), dtype=torch.float64), [torch.zeros_like(x) for x in h]
    e = float(epsilon * norm(past.weights) / size)
    ahead = torch._foreach_add(past.weights, h, alpha=e)
    curvature, losses_ahead = training.gradient_at(ahead, past)
    behind = torch._foreach_add(past.weights, h, alpha=-e)
    gradient_behind, losses_behind = training.gradient_at(behind, past)
    torch._foreach_sub_(curvature, gradient_behind)
    torch._foreach_div_(curvature, 2 * e)
    drops = losses_behind.double() - losses_ahead.double()
    shares = torch.as_tensor(past.shares[training.mine], device=drops.device)
    return drops * shares / (2 * e), curvature
