"""The rules by their definitions, formula by formula, in float64: what the tests hold the fast path to.

Nothing here is shared with shapley/directions.py, which has the formulas' sources; gradients come from exact.py. Of a step that is to come:

    x = exact.chunk_gradients(model, X, Y)
    rules.rule_values(model, optimizer, x, [exact.batch_loss(X_target, Y_target)], "adamw2", lr, grad_clip=1.0)    # (B, K) nats
"""

import copy
import math

import numpy as np
import torch

from shapley.exact import dot, gradient

FLOORS = dict(
    adamw_linear=1e-2, adamw=1e-4
)  # of the second moment, as a share of its mean over the tensor


def adamw_pieces(model, optimizer):
    """Per parameter, in float64: m, v, the scalars a, b, c, d of the coming update t, t itself, eps and weight decay."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    pieces = []
    for p in model.parameters():
        (beta1, beta2), state = groups[p]["betas"], optimizer.state.get(p)
        t = 1 + (int(state["step"]) if state else 0)
        m, v = (
            (state["exp_avg"].double(), state["exp_avg_sq"].double())
            if state
            else (torch.zeros_like(p, dtype=torch.float64),) * 2
        )
        one, two = 1 - beta1**t, 1 - beta2**t
        scalars = dict(
            a=beta1 / one,
            b=(1 - beta1) / one,
            c=beta2 / two,
            d=(1 - beta2) / two,
            beta1=beta1,
            beta2=beta2,
        )
        pieces.append(
            dict(m=m, v=v, t=t, eps=groups[p]["eps"], wd=groups[p]["weight_decay"], **scalars)
        )
    return pieces


def step_direction(q, g):
    """D(g) = (a m + b g) / (sqrt(c v + d g^2) + eps)."""
    return (q["a"] * q["m"] + q["b"] * g) / ((q["c"] * q["v"] + q["d"] * g**2).sqrt() + q["eps"])


def secant(q, g):
    """(D(g) - D(0)) / g without the division."""
    r0, r = (q["c"] * q["v"]).sqrt(), (q["c"] * q["v"] + q["d"] * g**2).sqrt()
    s0, s = r0 + q["eps"], r + q["eps"]
    second = q["a"] * q["m"] * q["d"] * g / (s * s0 * (r + r0))
    return q["b"] / s - torch.where(r + r0 > 0, second, 0.0)


def slope(q, g):
    """D'(g) = b / s - (a m + b g) d g / (r s^2)."""
    r = (q["c"] * q["v"] + q["d"] * g**2).sqrt()
    s = r + q["eps"]
    return q["b"] / s - torch.where(
        r > 0, (q["a"] * q["m"] + q["b"] * g) * q["d"] * g / (r * s**2), 0.0
    )


def expected_secant(q, floor=FLOORS["adamw"]):
    """secant(g) as g is expected before the batch is seen, the mean field: from the bias-corrected moments mhat for g, vhat for g^2."""
    m, v = q["m"], torch.maximum(q["v"], floor * q["v"].mean())
    mhat, vhat = m / (1 - q["beta1"] ** (q["t"] - 1)), v / (1 - q["beta2"] ** (q["t"] - 1))
    r0, r = (q["c"] * v).sqrt(), (q["c"] * v + q["d"] * vhat).sqrt()
    s0, s = r0 + q["eps"], r + q["eps"]
    return q["b"] / s - q["a"] * m * q["d"] * mhat / (s * s0 * (r + r0))


def linearised(q, g_k=0.0, floor=FLOORS["adamw_linear"]):
    """The secant at g = 0, with a floor; at t = 1, where v = 0, the target's own gradient stands in for the batch's."""
    scale, v = (q["c"], q["v"]) if q["t"] > 1 else (q["d"], g_k**2)
    return q["b"] / ((scale * torch.maximum(v, floor * v.mean())).sqrt() + q["eps"])


def displaced(model, steps):
    """A float64 copy of the model, its parameters moved by one tensor each."""
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for p, s in zip(twin.parameters(), steps):
            p += s
    return twin


def directions(
    model,
    optimizer,
    loss,
    rule,
    lr,
    g,
    kappa=1.0,
    lookahead=True,
    expected=expected_secant,
    floor=FLOORS["adamw_linear"],
    known=None,
):
    """The rule's direction for the target loss(model), one float64 tensor a parameter: what <x_i, .> is to be taken with.

    g: the batch's gradient before clipping, kappa the clip coefficient; it is in the direction of two-pass rules, not of one-pass ones.
    floor: of `adamw_linear`. lookahead, expected, known: the parts of `adamw`; expected: from adamw_pieces of a parameter its secant,
    known: per parameter None or a bool tensor of the rows whose secant is taken at kappa g. ValueError for an unknown rule.
    """

    def gradient_at(steps):
        return gradient(displaced(model, steps), loss)

    params = [p.detach().double() for p in model.parameters()]
    here = [torch.zeros_like(p) for p in params]
    if rule == "sgd":
        return [lr * g_k for g_k in gradient_at(here)]
    if rule == "sgd2":
        g_k = gradient_at([-lr * kappa * g_p / 2 for g_p in g])
        return clip_path(lr, kappa, g, g_k, [1.0] * len(g), [1.0] * len(g))
    q, taken = adamw_pieces(model, optimizer), [kappa * g_p for g_p in g]
    empty = [
        -lr * (q_p["wd"] * p + step_direction(q_p, torch.zeros_like(p)))
        for q_p, p in zip(q, params)
    ]
    first = q[0]["t"] == 1
    if rule == "adamw_linear":
        return [lr * g_p * linearised(q_p, g_p, floor) for q_p, g_p in zip(q, gradient_at(here))]
    if rule == "adamw":
        g_k = gradient_at(empty if lookahead and not first else here)
        factors = [linearised(q_p, g_p) if first else expected(q_p) for q_p, g_p in zip(q, g_k)]
        for factor, q_p, g_p, rows in zip(factors, q, taken, known or [None] * len(q)):
            if rows is not None:
                factor[rows] = secant(q_p, g_p)[rows]
        return [lr * g_p * factor for g_p, factor in zip(g_k, factors)]
    if rule == "adamw2":
        to_mid = [e - lr * secant(q_p, g_p) * g_p / 2 for e, q_p, g_p in zip(empty, q, taken)]
        g_k = gradient_at(to_mid)
        return clip_path(
            lr,
            kappa,
            g,
            g_k,
            [secant(q_p, g_p) for q_p, g_p in zip(q, taken)],
            [slope(q_p, g_p) for q_p, g_p in zip(q, taken)],
        )
    raise ValueError(
        f"rule {rule!r} is unknown here: choose sgd, sgd2, adamw, adamw_linear or adamw2"
    )


def clip_path(lr, kappa, g, g_k, secants, slopes):
    """h = lr (kappa g_k sec + kappa ln(1/kappa) (p - u <u, p>)), p = g_k D'(kappa g), u = g / ||g||: Aumann-Shapley along the clipped path."""
    h = [lr * kappa * g_p * sec for g_p, sec in zip(g_k, secants)]
    if kappa < 1:
        u, p = [x / torch.sqrt(dot(g, g)) for x in g], [g_p * s for g_p, s in zip(g_k, slopes)]
        along, weight = dot(u, p), lr * kappa * math.log(1 / kappa)
        h = [h_p + weight * (p_p - u_p * along) for h_p, p_p, u_p in zip(h, p, u)]
    return h


def clip_coefficient(gradients, grad_clip):
    """What torch.nn.utils.clip_grad_norm_ multiplies the summed gradient by; 1 where grad_clip is 0."""
    return (
        min(1.0, grad_clip / (float(torch.sqrt(dot(gradients, gradients))) + 1e-6))
        if grad_clip
        else 1.0
    )


def inner_products(x, rows):
    """q_i = <x_i, g> over the rows, bool, of each parameter (None: none of it): what the clip correction goes by."""
    x = [torch.cat([g[r].flatten() for g, r in zip(x_i, rows) if r is not None]) for x_i in x]
    return torch.stack(x) @ sum(x)


def rule_values(
    model, optimizer, x, losses, rule, lr, grad_clip=0.0, products=None, known=None, **parts
):
    """The rule's values of the players x (example_gradients' result) for K losses: float64 (B, K).

    products: q_i (B,) of the clip correction of `adamw`; default the inner_products over the known rows, False (and where none are known):
    no correction. known and other parts: see `directions`. Model and optimizer as they are before the step, untouched.
    """
    g = [sum(parts) for parts in zip(*x)]
    kappa, columns = clip_coefficient(g, grad_clip), []
    if products is None:
        products = inner_products(x, known) if known else False
    for loss in losses:
        h = directions(model, optimizer, loss, rule, lr, g, kappa, known=known, **parts)
        d = torch.stack([dot(x_i, h) for x_i in x])
        if rule in ("sgd", "adamw_linear", "adamw"):
            d = kappa * d
        if rule == "adamw" and products is not False:
            d = d + math.log(1 / kappa) * (d - d.sum() * products / products.sum())
        columns.append(d)
    return torch.stack(columns, 1)


def known_rows(model, X, Y):
    """Per parameter which rows' gradient a run keeps chunk by chunk, bool: of weights whose rows are tokens (attribute `tokens`)
    those of the tokens in X or Y, of one-dimensional weights (LayerNorm's) all; None for the others."""
    seen, rows = torch.cat([X.flatten(), Y.flatten()]), []
    for name, p in model.named_parameters():
        norm = p.dim() == 1 and name.endswith("weight")
        mask = (
            torch.zeros(len(p), dtype=torch.bool).index_fill_(0, seen, True)
            if hasattr(p, "tokens")
            else torch.ones(len(p), dtype=torch.bool)
        )
        rows.append(mask if norm or hasattr(p, "tokens") else None)
    return rows


def hvp(model, loss, vector):
    """The Hessian of loss(model) times vector (one tensor a parameter), by differentiating twice."""
    params = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(
        torch.nn.attention.SDPBackend.MATH
    ):  # flash attention has no second derivative
        grads = torch.autograd.grad(loss(model), params, create_graph=True)
        return list(torch.autograd.grad(sum((g * v).sum() for g, v in zip(grads, vector)), params))


def leave_one_in(utility, n):
    """What each player does alone: (n,) or (n, K)."""
    return np.stack([np.asarray(utility(np.arange(n) == i), float) for i in range(n)])
