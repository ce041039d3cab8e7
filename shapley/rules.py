"""The rules by their definitions, formula by formula, slow and plain: a function a rule.

    sgd           first order                           Wang et al., arXiv 2406.11011, eq. 5
    sgd2          second order                          their second order, without a Hessian
    adamw_linear  Adam-aware, first order, linearised   Ding et al., arXiv 2602.00329, with a floor
    adamw         Adam-aware, first order               look-ahead and expected secant
    adamw2        Adam-aware, second order              the step that AdamW really takes

The value of chunk i for a target is <x_i, h>, where x_i is the gradient of its share of the batch's
loss, and h the rule's direction. Tests hold the fast rules of directions.py, which explains all
symbols, to these. Nothing is shared with them. Of a step that is to come:

    x = exact.chunk_gradients(model, X, Y)
    losses = [exact.batch_loss(X_target, Y_target)]
    rules.rule_values(model, optimizer, x, losses, "adamw2", lr, grad_clip=1.0)     # (B, K) nats

Everything is float64 and has one tensor a parameter. g is the batch's gradient before clipping,
kappa the clip coefficient, g_k the gradient of target k.
"""

import copy
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from shapley.clipping import ENUMERATE, orders
from shapley.exact import chunk_gradients, dot, gradient, learning

FLOORS = {"adamw_linear": 1e-2, "adamw": 1e-4}  # of v, as a share of its mean over the tensor


# --- AdamW's coming update of one parameter ---------------------------------------


@dataclass
class Update:
    """AdamW's t-th update of a parameter, t = 1, 2, ...: it lands on
    (1 - lr wd) w - lr D(kappa g)."""

    m: torch.Tensor
    v: torch.Tensor
    t: int
    beta1: float
    beta2: float
    eps: float
    wd: float

    def __post_init__(self):
        self.a = self.beta1 / (1 - self.beta1**self.t)
        self.b = (1 - self.beta1) / (1 - self.beta1**self.t)
        self.c = self.beta2 / (1 - self.beta2**self.t)
        self.d = (1 - self.beta2) / (1 - self.beta2**self.t)

    def displacement(self, g):
        """D(g) = (a m + b g) / (sqrt(c v + d g^2) + eps)."""
        return (self.a * self.m + self.b * g) / (self.root(g) + self.eps)

    def root(self, g):
        """r = sqrt(c v + d g^2)."""
        return (self.c * self.v + self.d * g**2).sqrt()

    def secant(self, g):
        """(D(g) - D(0)) / g without the division: b / s - a m d g / (s s0 (r + r0))."""
        r0 = (self.c * self.v).sqrt()
        r = self.root(g)
        s0 = r0 + self.eps
        s = r + self.eps
        second = self.a * self.m * self.d * g / (s * s0 * (r + r0))
        return self.b / s - torch.where(r + r0 > 0, second, 0.0)

    def slope(self, g):
        """D'(g) = b / s - (a m + b g) d g / (r s^2)."""
        r = self.root(g)
        s = r + self.eps
        second = (self.a * self.m + self.b * g) * self.d * g / (r * s**2)
        return self.b / s - torch.where(r > 0, second, 0.0)


def updates(model, optimizer):
    """The coming Update of each parameter, in float64."""
    groups = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            groups[p] = group
    result = []
    for p in learning(model):
        state = optimizer.state.get(p)
        zeros = torch.zeros_like(p, dtype=torch.float64)
        beta1, beta2 = groups[p]["betas"]
        update = Update(
            m=state["exp_avg"].double() if state else zeros,
            v=state["exp_avg_sq"].double() if state else zeros,
            t=1 + (int(state["step"]) if state else 0),
            beta1=beta1,
            beta2=beta2,
            eps=groups[p]["eps"],
            wd=groups[p]["weight_decay"],
        )
        result.append(update)
    return result


def expected_secant(update, floor=FLOORS["adamw"]):
    """The secant as it is expected before the batch is seen, in mean field: the bias-corrected
    moments stand for g and g^2."""
    m = update.m
    v = torch.maximum(update.v, floor * update.v.mean())
    m_hat = m / (1 - update.beta1 ** (update.t - 1))
    v_hat = v / (1 - update.beta2 ** (update.t - 1))
    r0 = (update.c * v).sqrt()
    r = (update.c * v + update.d * v_hat).sqrt()
    s0 = r0 + update.eps
    s = r + update.eps
    return update.b / s - update.a * m * update.d * m_hat / (s * s0 * (r + r0))


def linearised(update, g_k=0.0, floor=FLOORS["adamw_linear"]):
    """The secant at g = 0, with a floor. Where v = 0, at t = 1 or because there was no gradient
    until now, the target's own gradient stands for the batch's."""
    if update.v.any():
        square = update.c * torch.maximum(update.v, floor * update.v.mean())
    else:
        v = g_k**2
        square = update.d * torch.maximum(v, floor * v.mean())
    return update.b / (square.sqrt() + update.eps)


# --- the rules: each target's direction, one tensor a parameter ---------------------


@dataclass
class Situation:
    """A step that is to come, and one target. Model and optimizer are as before the step."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: object  # the target's: loss(model) -> scalar tensor
    lr: float
    g: list
    kappa: float

    def gradient_at(self, steps):
        """g_k where each parameter has moved by a tensor."""
        return gradient(displaced(self.model, steps), self.loss)

    def gradient_here(self):
        return self.gradient_at([torch.zeros_like(g_p) for g_p in self.g])

    def to_empty(self, updates):
        """How far momentum and decay alone move the parameters: -lr (wd w + D(0))."""
        steps = []
        for p, update in zip(learning(self.model), updates):
            nothing = update.displacement(torch.zeros_like(update.m))
            steps.append(-self.lr * (update.wd * p.detach().double() + nothing))
        return steps


def first_order(situation):
    """sgd: lr g_k(w)."""
    return [situation.lr * g_k for g_k in situation.gradient_here()]


def second_order(situation):
    """sgd2: the target's gradient in the middle of the step, w - lr kappa g / 2."""
    lr, kappa, g = situation.lr, situation.kappa, situation.g
    half_way = [-lr * kappa * g_p / 2 for g_p in g]
    return [lr * g_k for g_k in situation.gradient_at(half_way)]


def adam_aware_linear(situation, floor=FLOORS["adamw_linear"]):
    """adamw_linear: lr g_k(w) b / (sqrt(c max(v, floor)) + eps)."""
    directions = []
    for g_k, update in zip(
        situation.gradient_here(), updates(situation.model, situation.optimizer)
    ):
        directions.append(situation.lr * g_k * linearised(update, g_k, floor))
    return directions


def adam_aware(situation, known=None, lookahead=True, expected=expected_secant):
    """adamw: lr g_k(w_empty) E[sec(g)]; of the known rows lr g_k(w_empty) sec(kappa g).

    known: per parameter None, or a bool tensor of the rows whose secant is taken at kappa g.
    lookahead=False takes g_k at w; expected: another secant of an Update.
    """
    coming = updates(situation.model, situation.optimizer)
    is_first = coming[0].t == 1
    if lookahead and not is_first:
        gradients = situation.gradient_at(situation.to_empty(coming))
    else:
        gradients = situation.gradient_here()
    known = known or [None] * len(coming)
    directions = []
    for g_k, g_p, update, rows in zip(gradients, situation.g, coming, known):
        is_young = not update.v.any()  # of all at t = 1
        secant = linearised(update, g_k) if is_young else expected(update)
        if rows is not None:
            secant[rows] = update.secant(situation.kappa * g_p)[rows]
        directions.append(situation.lr * g_k * secant)
    return directions


def adam_aware_second_order(situation):
    """adamw2: lr g_k sec(kappa g), the target's gradient in the middle of what the batch moves,
    w_empty - lr sec(kappa g) kappa g / 2. And the same with D'(kappa g) in the secant's place."""
    coming = updates(situation.model, situation.optimizer)
    clipped = [situation.kappa * g_p for g_p in situation.g]
    secants = [update.secant(g_p) for update, g_p in zip(coming, clipped)]
    to_middle = []
    for empty, secant, g_p in zip(situation.to_empty(coming), secants, clipped):
        to_middle.append(empty - situation.lr * secant * g_p / 2)
    directions, of_slope = [], []
    gradients = situation.gradient_at(to_middle)
    for g_k, g_p, secant, update in zip(gradients, clipped, secants, coming):
        directions.append(situation.lr * g_k * secant)
        of_slope.append(situation.lr * g_k * update.slope(g_p))
    return directions, of_slope


RULES = {
    "sgd": first_order,
    "sgd2": second_order,
    "adamw_linear": adam_aware_linear,
    "adamw": adam_aware,
    "adamw2": adam_aware_second_order,
}


# --- values -----------------------------------------------------------------------


def rule_values(
    model,
    optimizer,
    x,
    losses,
    rule,
    lr,
    grad_clip=0.0,
    products=None,
    squares=None,
    known=None,
    **parts,
):
    """The rule's values of the players x (example_gradients' result) for K losses: float64 (B, K).

    products, squares: (B,) <x_i, g> and |x_i|^2 of the game of clipping; by default over all
    weights in two-pass rules, over the known rows in `adamw`, and products=False, or no known rows:
    no game, as in the other rules. known and other parts: see adam_aware, adam_aware_linear. Model
    and optimizer are as before the step, and stay so. Raises ValueError for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is unknown here: choose {', '.join(RULES)}")
    g = [sum(players) for players in zip(*x)]
    kappa = clip_coefficient(g, grad_clip)
    if rule == "adamw":
        parts["known"] = known
    columns, slopes = [], []
    for loss in losses:
        h = RULES[rule](Situation(model, optimizer, loss, lr, g, kappa), **parts)
        h, of_slope = h if rule == "adamw2" else (h, h)
        columns.append(kappa * torch.stack([dot(x_i, h) for x_i in x]))
        slopes.append(kappa * torch.stack([dot(x_i, of_slope) for x_i in x]))
    values, slopes = torch.stack(columns, 1), torch.stack(slopes, 1)
    if rule == "adamw":
        has_game = any(rows is not None for rows in known or [])
    else:
        has_game = rule in ("sgd2", "adamw2")
    if products is False or not has_game or kappa == 1:
        return values
    rows = known if rule == "adamw" else [torch.ones_like(p, dtype=torch.bool) for p in x[0]]
    found = inner_products(x, rows)
    products = found[0] if products is None else products
    squares = found[1] if squares is None else squares
    return clipping_game(values, slopes, kappa, products, squares)


def gap(model, optimizer, x, losses, values, lr, grad_clip=0.0):
    """What values (B, K) of `adamw`, as rule_values() gives them, leave unexplained of what the
    batch does to the K losses, as a part of their size: (K,). The loss where momentum and decay
    alone land, less that where the step lands, less the sum of the values."""
    g = [sum(players) for players in zip(*x)]
    kappa = clip_coefficient(g, grad_clip)
    coming = updates(model, optimizer)
    to_empty = Situation(model, optimizer, None, lr, g, kappa).to_empty(coming)
    to_landing = []
    for empty, update, g_p in zip(to_empty, coming, g):
        data = update.displacement(kappa * g_p) - update.displacement(torch.zeros_like(g_p))
        to_landing.append(empty - lr * data)
    with torch.no_grad():
        before = [loss(displaced(model, to_empty)) for loss in losses]
        after = [loss(displaced(model, to_landing)) for loss in losses]
    drop = torch.stack(before) - torch.stack(after)
    return (drop - values.sum(0)) / values.abs().sum(0)


def clipping_game(values, slopes, kappa, products, squares):
    """The Shapley values (B, K) of the game in which a subset S of the chunks that have a gradient
    is paid the sum over S of kappa d_i + (c(S) - kappa) d'_i, where values = kappa d and slopes =
    kappa d' (clipping.py). By all subsets where they are few, else by the orders of clipping.py."""
    values, slopes, products, squares = map(np.asarray, (values, slopes, products, squares))
    players = np.flatnonzero(squares > 0)
    n = len(players)
    if n < 2:
        return torch.from_numpy(values)
    rest = products - squares
    if n == 2:
        shared = rest / 2
    else:
        shared = (rest - rest[players].sum() / (2 * (n - 1))) / (n - 2)
    limit = kappa * math.sqrt(products[players].sum())

    def paid(subset):
        subset = list(subset)
        square = squares[subset].sum() + 2 * (len(subset) - 1) * shared[subset].sum()
        length = math.sqrt(square) if square > 0 else 0.0
        clipped = limit / length if length > limit else 1.0
        return (values[subset] + (clipped - kappa) / kappa * slopes[subset]).sum(0)

    result = np.zeros_like(values)
    if n <= ENUMERATE:
        for i in players:
            others = [j for j in players if j != i]
            for size in range(n):
                subsets = list(itertools.combinations(others, size))
                added = [paid((*subset, i)) - paid(subset) for subset in subsets]
                result[i] += np.mean(added, 0) / n
        return torch.from_numpy(result)
    for order in orders(n):
        joined = players[order]
        for place, i in enumerate(joined):
            result[i] += (paid(joined[: place + 1]) - paid(joined[:place])) / len(orders(n))
    return torch.from_numpy(result)


def clip_coefficient(gradients, grad_clip):
    """What torch.nn.utils.clip_grad_norm_ multiplies the summed gradient by; 1 where grad_clip is
    0."""
    if not grad_clip:
        return 1.0
    norm = float(torch.sqrt(dot(gradients, gradients)))
    return min(1.0, grad_clip / (norm + 1e-6))


def inner_products(x, rows):
    """<x_i, g> and |x_i|^2 over some rows, bool, of each parameter (None: of none): (2, B)."""
    vectors = []
    for x_i in x:
        parts = [g_p[mask].flatten() for g_p, mask in zip(x_i, rows) if mask is not None]
        vectors.append(torch.cat(parts))
    vectors = torch.stack(vectors)
    return torch.stack([vectors @ vectors.sum(0), vectors.square().sum(1)])


def known_rows(model, X, Y):
    """Per parameter the rows whose gradient a run keeps chunk by chunk, bool: of weights whose rows
    are tokens (attribute `tokens`) those of the tokens in X or Y, of one-dimensional weights
    (LayerNorm's) all; None for the others."""
    tokens = torch.cat([X.flatten(), Y[Y >= 0]])
    rows = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if hasattr(p, "tokens"):
            rows.append(torch.zeros(len(p), dtype=torch.bool).index_fill_(0, tokens, True))
        elif p.dim() == 1 and name.endswith("weight"):
            rows.append(torch.ones(len(p), dtype=torch.bool))
        else:
            rows.append(None)
    return rows


def squares_by_use(model, X, Y, weights=None):
    """|x_i|^2 (B,) as two-pass rules know it: a GPT's tied head and table count as two weights, so
    that the product of their gradients is left out. weights: see exact.chunk_gradients."""
    apart = copy.deepcopy(model)
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight.detach().clone())
    x = chunk_gradients(apart, X, Y, weights)
    return torch.stack([dot(x_i, x_i) for x_i in x])


# --- around them ------------------------------------------------------------------


def displaced(model, steps):
    """A float64 copy of the model, its parameters moved by one tensor each."""
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for p, step in zip(learning(twin), steps):
            p += step
    return twin


def hvp(model, loss, vector):
    """The Hessian of loss(model) times vector (one tensor a parameter), by differentiating
    twice."""
    params = learning(model)
    # flash attention has no second derivative
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        grads = torch.autograd.grad(loss(model), params, create_graph=True)
        return list(torch.autograd.grad(dot(grads, vector), params))


def leave_one_in(utility, n):
    """What each player does alone: (n,) or (n, K)."""
    return np.stack([np.asarray(utility(np.arange(n) == i), float) for i in range(n)])
