"""The slow truth: what a step's values are by definition, and what they ought to be. Autograd, loops and float64.

No ledger, no directions on parameters, nothing shared with valuation.py: what the fast path is tested against. Three things:

    rule_values(...)                 a rule's values of one step, formula by formula
    Step(...), shapley(step, B)      the true Shapley values of that step's game, by running the optimizer for every subset
    monte_carlo, leave_one_out, leave_one_in, hvp

Models and losses are anything: a loss is a function loss(model) -> scalar tensor. For a language model and chunks X, Y (B, T):

    x = exact.chunk_gradients(model, X, Y)                                   # before the step
    step = exact.Step(model, optimizer, x, [exact.batch_loss(X_target, Y_target)], grad_clip=1.0)
    exact.shapley(step, len(x))                                              # (B, K) nats, positive = lowers the target's loss
"""

import copy
import math

import numpy as np
import torch

ENUMERATE = 12  # players up to which solve runs through every subset
FLOORS = dict(adamw_linear=1e-2, adamw=1e-4)  # of the second moment, as a share of its mean over the tensor

# --- gradients ----------------------------------------------------------------


def batch_loss(X, Y):
    """The loss of a language model on X, Y (B, T): any model whose call model(X, Y) returns (anything, mean token loss)."""
    return lambda model: model(X, Y)[1]


def gradient(model, loss):
    """The gradient of loss(model): a list of tensors, one for each parameter (zeros where it is not used)."""
    params = list(model.parameters())
    grads = torch.autograd.grad(loss(model), params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params)]


def example_gradients(model, losses):
    """x_i = grad losses[i](model) / B for each of the B players of a step: a list of B lists of float64 tensors."""
    twin = copy.deepcopy(model).double().eval()
    return [[g / len(losses) for g in gradient(twin, loss)] for loss in losses]


def chunk_gradients(model, X, Y):
    """example_gradients of a language model's chunks X, Y (B, T)."""
    return example_gradients(model, [batch_loss(X[i : i + 1], Y[i : i + 1]) for i in range(len(X))])


def hvp(model, loss, vector):
    """The Hessian of loss(model) times vector (one tensor a parameter), by differentiating twice."""
    params = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # flash attention has no second derivative
        grads = torch.autograd.grad(loss(model), params, create_graph=True)
        return list(torch.autograd.grad(sum((g * v).sum() for g, v in zip(grads, vector)), params))


def dot(a, b):
    return sum((x * y).sum() for x, y in zip(a, b))


# --- games: utility(members) -> a number or (K,) array, members a bool array (n,), utility of nobody = 0


class Step:
    """The game of one optimizer step: what the targets' losses would have fallen by, had only the members contributed.

    step(members) = losses where nobody's step lands - losses where the members' step lands, float64 (K,), in nats. The step is
    the optimizer's own, on copies: its state, lr and weight decay as they are now, clipping by the norm of the members' gradient.
    x: example_gradients' result, any float dtype. losses: K functions of a model. Nothing given is changed.
    """

    def __init__(self, model, optimizer, x, losses, grad_clip=0.0):
        self.twin, self.optimizer = copy.deepcopy((model, optimizer))  # the copied optimizer steps the copied model
        self.twin.double().eval()
        self.params, self.x, self.losses, self.grad_clip = list(self.twin.parameters()), x, losses, grad_clip
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if key != "step" and torch.is_tensor(value):
                    state[key] = value.double()
        self.young = not self.optimizer.state  # no step was taken yet
        self.moving = [*(p.data for p in self.params), *(v for s in self.optimizer.state.values() for v in s.values() if torch.is_tensor(v))]
        self.start = [t.clone() for t in self.moving]
        self.members = np.zeros(len(x), bool)
        self.g = [torch.zeros_like(p) for p in self.params]
        self.nobody = self.losses_at(self.members)

    def land(self, members):
        """Puts the twin where the members' step lands."""
        for i in np.flatnonzero(members != self.members):
            torch._foreach_add_(self.g, [g.double() for g in self.x[i]], alpha=1 if members[i] else -1)
        self.members = members.copy()
        torch._foreach_copy_(self.moving, self.start)
        if self.young:
            self.optimizer.state.clear()
        for p, g in zip(self.params, self.g):
            p.grad = g.clone()
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.params, self.grad_clip)
        self.optimizer.step()

    @torch.no_grad()
    def losses_at(self, members):
        self.land(members)
        return np.array([float(loss(self.twin)) for loss in self.losses])

    def __call__(self, members):
        return self.nobody - self.losses_at(members) if members.any() else np.zeros(len(self.losses))


def shapley(utility, n, progress=iter):
    """Exact Shapley values by all 2^n subsets, each differing from the last by one player: (n,) or (n, K).

    progress: wraps the iteration over subsets (tqdm, say). Raises ValueError above 20 players.
    """
    if n > 20:
        raise ValueError(f"{n} players have 2^{n} subsets: use monte_carlo")
    codes = np.arange(2**n) ^ (np.arange(2**n) >> 1)  # Gray code
    bits = (codes[:, None] >> np.arange(n)) & 1 == 1
    first = np.asarray(utility(bits[0]), float)
    table = np.zeros((2**n, *first.shape))
    for code, members in progress(list(zip(codes, bits))):
        table[code] = utility(members)
    subsets = np.arange(2**n)
    sizes = np.bitwise_count(subsets)
    values = np.zeros((n, *first.shape))
    for i in range(n):
        without = subsets[subsets >> i & 1 == 0]
        weight = np.array([1 / (n * math.comb(n - 1, s)) for s in sizes[without]])
        values[i] = np.tensordot(weight, table[without | 1 << i] - table[without], 1)
    return values


def monte_carlo(utility, n, permutations=1000, tolerance=0.0, seed=0, progress=iter):
    """Shapley values from random permutations, each followed by its reverse (antithetic): (values, standard errors), (n,) or (n, K).

    Stops early, after at least 8 pairs, once the standard errors' root mean square is below tolerance times the values'.
    """
    rng, everybody = np.random.default_rng(seed), np.asarray(utility(np.ones(n, bool)), float)
    pairs = []
    for _ in progress(range(max(2, permutations // 2))):
        order, pair = rng.permutation(n), np.zeros((n, *everybody.shape))
        for one in (order, order[::-1]):
            members, before = np.zeros(n, bool), np.zeros_like(everybody)
            for i in one:
                members[i] = True
                after = np.asarray(utility(members), float) if not members.all() else everybody
                pair[i] += (after - before) / 2
                before = after
        pairs.append(pair)
        values, errors = np.mean(pairs, 0), np.std(pairs, 0, ddof=1) / math.sqrt(len(pairs)) if len(pairs) > 1 else np.inf
        if len(pairs) >= 8 and np.sqrt(np.mean(errors**2)) < tolerance * np.sqrt(np.mean(values**2)):
            break
    return values, errors


def leave_one_out(utility, n):
    """What each player adds to all the others: (n,) or (n, K)."""
    everybody = np.ones(n, bool)
    return np.stack([utility(everybody) - utility(everybody & (np.arange(n) != i)) for i in range(n)])


def leave_one_in(utility, n):
    """What each player does alone: (n,) or (n, K)."""
    return np.stack([np.asarray(utility(np.arange(n) == i), float) for i in range(n)])


def solve(utility, n, permutations=200, tolerance=0.0, seed=0, progress=iter):
    """(values, standard errors) of shapley for up to ENUMERATE players, where the errors are 0, and of monte_carlo above."""
    if n > ENUMERATE:
        return monte_carlo(utility, n, permutations, tolerance, seed, progress)
    values = shapley(utility, n, progress)
    return values, np.zeros_like(values)


def agreement(values, truth):
    """How close values (n,) are to the truth (n,): Pearson, Spearman, root mean square error, relative L2 distance."""
    from scipy import stats

    return dict(
        pearson=float(stats.pearsonr(values, truth).statistic),
        spearman=float(stats.spearmanr(values, truth).statistic),
        rmse=float(np.sqrt(np.mean((values - truth) ** 2))),
        rel_l2=float(np.linalg.norm(values - truth) / np.linalg.norm(truth)),
    )


# --- the rules, by their definitions; formulas and sources in valuation.py ----


def adamw_pieces(model, optimizer):
    """Per parameter, in float64: m, v, the scalars a, b, c, d of the coming update t, t itself, eps and weight decay."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    pieces = []
    for p in model.parameters():
        (beta1, beta2), state = groups[p]["betas"], optimizer.state.get(p)
        t = 1 + (int(state["step"]) if state else 0)
        m, v = (state["exp_avg"].double(), state["exp_avg_sq"].double()) if state else (torch.zeros_like(p, dtype=torch.float64),) * 2
        one, two = 1 - beta1**t, 1 - beta2**t
        scalars = dict(a=beta1 / one, b=(1 - beta1) / one, c=beta2 / two, d=(1 - beta2) / two, beta1=beta1, beta2=beta2)
        pieces.append(dict(m=m, v=v, t=t, eps=groups[p]["eps"], wd=groups[p]["weight_decay"], **scalars))
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
    return q["b"] / s - torch.where(r > 0, (q["a"] * q["m"] + q["b"] * g) * q["d"] * g / (r * s**2), 0.0)


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


def directions(model, optimizer, loss, rule, lr, g, kappa=1.0, lookahead=True, expected=expected_secant, floor=FLOORS["adamw_linear"], known=None):
    """The rule's direction for the target loss(model), one float64 tensor a parameter: what <x_i, .> is to be taken with.

    g: the batch's gradient before clipping, kappa the clip coefficient; it is in the direction of two-pass rules, not of one-pass ones.
    floor: of `adamw_linear`. lookahead, expected, known: the parts of `adamw`; expected: from adamw_pieces of a parameter its secant,
    known: per parameter None or a bool tensor of the rows whose secant is taken at kappa g. ValueError for an unknown rule.
    """
    params = [p.detach().double() for p in model.parameters()]
    here = displaced(model, [torch.zeros_like(p) for p in params])
    if rule == "sgd":
        return [lr * g_k for g_k in gradient(here, loss)]
    if rule == "sgd2":
        g_k = gradient(displaced(model, [-lr * kappa * g_p / 2 for g_p in g]), loss)
        return clip_path(lr, kappa, g, g_k, [1.0] * len(g), [1.0] * len(g))
    q, taken = adamw_pieces(model, optimizer), [kappa * g_p for g_p in g]
    empty = [-lr * (q_p["wd"] * p + step_direction(q_p, torch.zeros_like(p))) for q_p, p in zip(q, params)]
    first = q[0]["t"] == 1
    if rule == "adamw_linear":
        return [lr * g_p * linearised(q_p, g_p, floor) for q_p, g_p in zip(q, gradient(here, loss))]
    if rule == "adamw":
        g_k = gradient(displaced(model, empty) if lookahead and not first else here, loss)
        factors = [linearised(q_p, g_p) if first else expected(q_p) for q_p, g_p in zip(q, g_k)]
        for factor, q_p, g_p, rows in zip(factors, q, taken, known or [None] * len(q)):
            if rows is not None:
                factor[rows] = secant(q_p, g_p)[rows]
        return [lr * g_p * factor for g_p, factor in zip(g_k, factors)]
    if rule == "adamw2":
        to_mid = [e - lr * secant(q_p, g_p) * g_p / 2 for e, q_p, g_p in zip(empty, q, taken)]
        g_k = gradient(displaced(model, to_mid), loss)
        return clip_path(lr, kappa, g, g_k, [secant(q_p, g_p) for q_p, g_p in zip(q, taken)], [slope(q_p, g_p) for q_p, g_p in zip(q, taken)])
    raise ValueError(f"rule {rule!r} is unknown here: choose sgd, sgd2, adamw, adamw_linear or adamw2")


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
    return min(1.0, grad_clip / (float(torch.sqrt(dot(gradients, gradients))) + 1e-6)) if grad_clip else 1.0


def inner_products(x, rows):
    """q_i = <x_i, g> over the rows, bool, of each parameter (None: none of it): what the clip correction goes by."""
    x = [torch.cat([g[r].flatten() for g, r in zip(x_i, rows) if r is not None]) for x_i in x]
    return torch.stack(x) @ sum(x)


def rule_values(model, optimizer, x, losses, rule, lr, grad_clip=0.0, products=None, known=None, **parts):
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
        mask = torch.zeros(len(p), dtype=torch.bool).index_fill_(0, seen, True) if hasattr(p, "tokens") else torch.ones(len(p), dtype=torch.bool)
        rows.append(mask if norm or hasattr(p, "tokens") else None)
    return rows
