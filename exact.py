"""The slow truth: values by their definition, from a plain loop of autograd in float64.

No ledger, no directions on parameters, nothing shared with valuation.py: what the fast path is tested against. For a user:

    import exact
    exact.values(model, optimizer, X, Y, [(X_target, Y_target)], rule="adamw_linear", lr=6e-4, grad_clip=1.0)  # (B, K) nats

Any model will do whose call model(X, Y) returns (anything, mean loss over the unmasked tokens).
"""

import copy

import torch


def gradient(model, X, Y):
    """The gradient of model's mean loss on X, Y: a list of tensors, one for each parameter (zeros where it is not used)."""
    params = list(model.parameters())
    grads = torch.autograd.grad(model(X, Y)[1], params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params)]


def chunk_gradients(model, X, Y):
    """X, Y (B, T) -> x_i = grad l_i / B for each chunk i of the global batch: a list of B lists of float64 tensors."""
    model = copy.deepcopy(model).double().eval()
    return [[g / len(X) for g in gradient(model, X[i : i + 1], Y[i : i + 1])] for i in range(len(X))]


def clip_coefficient(gradients, grad_clip):
    """What torch.nn.utils.clip_grad_norm_ multiplies the summed gradient by; 1 where grad_clip is 0."""
    norm = torch.sqrt(sum((g**2).sum() for g in gradients))
    return min(1.0, grad_clip / (float(norm) + 1e-6)) if grad_clip else 1.0


def direction(model, optimizer, X, Y, rule, lr):
    """The rule's direction for a target X, Y before clipping, one float64 tensor a parameter; see valuation.py for the formulas.

    optimizer: the state before the step. Raises ValueError for a rule not known here.
    """
    twin = copy.deepcopy(model).double().eval()
    target_gradient = gradient(twin, X, Y)
    if rule == "sgd":
        return [lr * g for g in target_gradient]
    if rule != "adamw_linear":
        raise ValueError(f"rule {rule!r} is unknown here: choose sgd or adamw_linear")
    hyper = {p: group for group in optimizer.param_groups for p in group["params"]}
    h = []
    for p, g in zip(model.parameters(), target_gradient):
        beta1, beta2 = hyper[p]["betas"]
        state = optimizer.state.get(p)
        t = 1 + (int(state["step"]) if state else 0)
        b = (1 - beta1) / (1 - beta1**t)
        if state:
            v, scale = state["exp_avg_sq"].double(), beta2 / (1 - beta2**t)
        else:
            v, scale = g**2, (1 - beta2) / (1 - beta2**t)
        v = torch.maximum(v, 1e-2 * v.mean())
        h.append(lr * b * g / ((scale * v) ** 0.5 + hyper[p]["eps"]))
    return h


def values(model, optimizer, X, Y, targets, rule, lr, grad_clip=0.0):
    """The values of the step on the global batch X, Y (B, T): float64 (B, K), nats, positive = lowers the target's loss.

    targets: K pairs (X, Y), Y = -1 where nothing is predicted. Model and optimizer as they are before the step, untouched.
    """
    x = chunk_gradients(model, X, Y)
    kappa = clip_coefficient([sum(parts) for parts in zip(*x)], grad_clip)
    columns = []
    for target in targets:
        h = direction(model, optimizer, *target, rule, lr)
        columns.append(torch.stack([kappa * sum((g * d).sum() for g, d in zip(x_i, h)) for x_i in x]))
    return torch.stack(columns, 1)
