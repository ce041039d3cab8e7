"""The slow truth: each chunk's gradient, and what the values of a step, or of a whole run, ought
to be.

Autograd, loops and float64; no ledger, no directions, nothing shared with valuation.py and
hindsight.py. (rules.py has the rules' own definitions.)

    Step(...), shapley(step, B)      the true Shapley values of that step's game, by running the
                                     optimizer for every subset
    monte_carlo, leave_one_out
    hindsight(model, ...)            what each visit of a run did for the losses at its end, by
                                     differentiating the whole run

Models and losses are anything: a loss is a function loss(model) -> scalar tensor. For a language
model and chunks X, Y (B, T):

    x = exact.chunk_gradients(model, X, Y)                     # before the step
    losses = [exact.batch_loss(X_target, Y_target)]
    step = exact.Step(model, optimizer, x, losses, grad_clip=1.0)
    exact.shapley(step, len(x))                 # (B, K) nats, positive = lowers the target's loss
"""

import copy
import math

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ENUMERATE = 12  # players up to which solve runs through every subset

# --- gradients ----------------------------------------------------------------


def batch_loss(X, Y):
    """The loss of a language model on X, Y (B, T): of any model whose call model(X, Y) returns
    (anything, mean token loss)."""

    def loss(model):
        return model(X, Y)[1]

    return loss


def gradient(model, loss):
    """The gradient of loss(model): a list of tensors, one for each parameter that learns (zeros
    where it is not used)."""
    params = learning(model)
    grads = torch.autograd.grad(loss(model), params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params)]


def learning(model):
    """The parameters that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def example_gradients(model, losses, weights=None):
    """x_i = weights[i] grad losses[i](model) for each of the B players of a step: a list of B lists
    of float64 tensors. weights: what each loss counts in the step's; without them 1 / B. A weight
    of 0 is a gradient of 0, whatever the loss is."""
    twin = copy.deepcopy(model).double().eval()
    x = []
    for i, loss in enumerate(losses):
        weight = 1 / len(losses) if weights is None else float(weights[i])
        if weight == 0:
            x.append([torch.zeros_like(p) for p in twin.parameters()])
        else:
            x.append([g * weight for g in gradient(twin, loss)])
    return x


def chunk_gradients(model, X, Y, weights=None):
    """example_gradients of a language model's chunks X, Y (B, T)."""
    losses = [batch_loss(X[i : i + 1], Y[i : i + 1]) for i in range(len(X))]
    return example_gradients(model, losses, weights)


def label_weights(Y):
    """What each chunk's mean loss counts in the mean over all labels of Y (B, T), of which -1 is
    none: (B,) float64."""
    n_labels = (Y >= 0).sum(1).double()
    return n_labels / n_labels.sum()


def dot(a, b):
    return sum((x * y).sum() for x, y in zip(a, b))


# --- games --------------------------------------------------------------------
#
# utility(members) -> a number or an array (K,). members: a bool array (n,). Nobody's utility is 0.


class Step:
    """The game of one optimizer step: what the targets' losses would have fallen by, had only the
    members contributed.

    step(members) = losses where nobody's step lands - losses where the members' step lands, float64
    (K,), in nats. The step is the optimizer's own, on copies: its state, lr and weight decay as
    they are now, clipping by the norm of the members' gradient. x: example_gradients' result, any
    float dtype. losses: K functions of a model. Nothing given is changed.
    """

    def __init__(self, model, optimizer, x, losses, grad_clip=0.0):
        # copied together, so that the copied optimizer steps the copied model
        self.twin, self.optimizer = copy.deepcopy((model, optimizer))
        self.twin.double().eval()
        self.params = learning(self.twin)
        self.x, self.losses, self.grad_clip = x, losses, grad_clip
        self.is_young = not self.optimizer.state  # no step was taken yet
        self.moving = [p.data for p in self.params]  # what a step changes
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if key != "step" and torch.is_tensor(value):
                    state[key] = value.double()
            self.moving += [value for value in state.values() if torch.is_tensor(value)]
        self.start = [t.clone() for t in self.moving]
        self.members = np.zeros(len(x), bool)
        self.g = [torch.zeros_like(p) for p in self.params]
        self.nobody = self.losses_at(self.members)

    def land(self, members):
        """Puts the twin where the members' step lands."""
        for i in np.flatnonzero(members != self.members):
            sign = 1 if members[i] else -1
            torch._foreach_add_(self.g, [g.double() for g in self.x[i]], alpha=sign)
        self.members = members.copy()
        torch._foreach_copy_(self.moving, self.start)
        if self.is_young:
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
        if not members.any():
            return np.zeros(len(self.losses))
        return self.nobody - self.losses_at(members)


def shapley(utility, n, progress=iter):
    """Exact Shapley values by all 2^n subsets, each differing from the last by one player: (n,) or
    (n, K).

    progress: wraps the iteration over subsets (tqdm, say). Raises ValueError above 20 players.
    """
    if n > 20:
        raise ValueError(f"{n} players have 2^{n} subsets: use monte_carlo")
    codes = np.arange(2**n) ^ (np.arange(2**n) >> 1)  # Gray code
    is_member = (codes[:, None] >> np.arange(n)) & 1 == 1
    nothing = np.asarray(utility(is_member[0]), float)
    table = np.zeros((2**n, *nothing.shape))
    for code, members in progress(list(zip(codes, is_member))):
        table[code] = utility(members)
    subsets = np.arange(2**n)
    sizes = np.bitwise_count(subsets)
    values = np.zeros((n, *nothing.shape))
    for i in range(n):
        without = subsets[subsets >> i & 1 == 0]
        weight = np.array([1 / (n * math.comb(n - 1, size)) for size in sizes[without]])
        values[i] = np.tensordot(weight, table[without | 1 << i] - table[without], 1)
    return values


def monte_carlo(utility, n, permutations=1000, tolerance=0.0, seed=0, progress=iter):
    """Shapley values from random permutations, each followed by its reverse (antithetic): (values,
    standard errors), (n,) or (n, K).

    Stops early, after at least 8 pairs, once the standard errors' root mean square is below
    tolerance times the values'.
    """
    rng = np.random.default_rng(seed)
    everybody = np.asarray(utility(np.ones(n, bool)), float)
    pairs = []
    for _ in progress(range(max(2, permutations // 2))):
        order = rng.permutation(n)
        forth = additions(utility, order, everybody)
        back = additions(utility, order[::-1], everybody)
        pairs.append((forth + back) / 2)
        values = np.mean(pairs, 0)
        errors = np.inf
        if len(pairs) > 1:
            errors = np.std(pairs, 0, ddof=1) / math.sqrt(len(pairs))
        root_mean_square = np.sqrt(np.mean(errors**2))
        if len(pairs) >= 8 and root_mean_square < tolerance * np.sqrt(np.mean(values**2)):
            break
    return values, errors


def additions(utility, order, everybody):
    """What each player adds to those before it in an order: (n,) or (n, K). everybody: all players'
    utility."""
    n = len(order)
    added = np.zeros((n, *everybody.shape))
    members = np.zeros(n, bool)
    before = np.zeros_like(everybody)
    for i in order:
        members[i] = True
        after = everybody if members.all() else np.asarray(utility(members), float)
        added[i] = after - before
        before = after
    return added


def leave_one_out(utility, n):
    """What each player adds to all the others: (n,) or (n, K)."""
    everybody = np.ones(n, bool)
    added = []
    for i in range(n):
        added.append(utility(everybody) - utility(np.arange(n) != i))
    return np.stack(added)


def solve(utility, n, permutations=200, tolerance=0.0, seed=0, progress=iter):
    """(values, standard errors) of shapley for up to ENUMERATE players, where the errors are 0, and
    of monte_carlo above."""
    if n > ENUMERATE:
        return monte_carlo(utility, n, permutations, tolerance, seed, progress)
    values = shapley(utility, n, progress)
    return values, np.zeros_like(values)


# --- a run --------------------------------------------------------------------


def chunk_losses(model, X, Y):
    """Each chunk's mean token loss (b,), in nats, of X, Y (b, T), where -1 is no label: of any
    model whose call model(X, Y) returns (logits (b, T, V), anything)."""
    logits, _ = model(X, Y)
    losses = F.cross_entropy(logits.flatten(0, 1), Y.flatten(), ignore_index=-1, reduction="none")
    return losses.view(Y.shape).sum(1) / (Y >= 0).sum(1).clamp(min=1)


def hindsight(model, optimizer, steps, losses, grad_clip=0.0, micro_batch=0):
    """-d losses[k] / d s_ti where the run ends: (N, B, K) nats, float64, positive = the visit
    lowered the target's loss. s_ti, 1 in the run as it is, multiplies chunk i's gradient in step t.

    The run is written out and differentiated as a whole, so memory grows with it. model, optimizer:
    where it begins; AdamW or SGD without momentum, of no step yet. Neither is changed. steps: N of
    (X, Y (B, T), lr); the loss of each is the mean over its labels. losses: K functions of a model,
    which is then in evaluation. micro_batch: chunks of one forward; 0: all. Dropout draws the
    random numbers that the real run would.
    """
    twin = copy.deepcopy(model).double()
    weights = {name: p.detach().requires_grad_() for name, p in twin.named_parameters()}
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    groups = [group_of[p] for p in model.parameters()]
    is_adamw = isinstance(optimizer, torch.optim.AdamW)
    m = [torch.zeros_like(w) for w in weights.values()]
    v = [torch.zeros_like(w) for w in weights.values()]

    def with_weights(*inputs):
        return torch.func.functional_call(twin, weights, inputs)

    n_chunks = len(steps[0][0])
    s = torch.ones(len(steps), n_chunks, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):  # the one that has second derivatives
        for t, (X, Y, lr) in enumerate(steps):
            loss = 0
            of_labels = label_weights(Y)
            for rows in torch.arange(n_chunks).split(micro_batch or n_chunks):
                of_chunk = chunk_losses(with_weights, X[rows], Y[rows])
                loss = loss + (s[t, rows] * of_labels[rows]) @ of_chunk
            g = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            g = clipped(g, grad_clip)
            for i, (name, w) in enumerate(weights.items()):
                if is_adamw:
                    weights[name], m[i], v[i] = adamw(w, m[i], v[i], g[i], t + 1, lr, groups[i])
                else:
                    weights[name] = w - lr * (g[i] + groups[i]["weight_decay"] * w)
        twin.eval()
        values = []
        for loss in losses:
            (derivative,) = torch.autograd.grad(loss(with_weights), s, retain_graph=True)
            values.append(-derivative.numpy())
    return np.stack(values, -1)


def clipped(g, grad_clip):
    """A gradient as torch's clip_grad_norm_ leaves it. grad_clip 0: as it is."""
    if not grad_clip:
        return g
    norm = dot(g, g).sqrt()
    return [(grad_clip / (norm + 1e-6)).clamp(max=1.0) * part for part in g]


def adamw(w, m, v, g, t, lr, group):
    """AdamW's update number t (from 1) of a parameter. Returns w, m, v after it."""
    beta1, beta2 = group["betas"]
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    # a root has no derivative at 0
    root = torch.where(v > 0, v, 1).sqrt() * (v > 0) / math.sqrt(1 - beta2**t)
    w = (1 - lr * group["weight_decay"]) * w - lr * m / (1 - beta1**t) / (root + group["eps"])
    return w, m, v


def along(losses, params, h):
    """What a step's chunks bring along a direction: <x_i, h> (B,) and H h, one tensor a parameter.

    losses (B,): the chunks', with their graph; x_i = grad losses[i] / B, and H is the Hessian of
    their mean. params, h: lists of tensors. Attention needs SDPBackend.MATH, as above.
    """
    s = torch.ones_like(losses, requires_grad=True)
    g = torch.autograd.grad((s * losses).mean(), params, create_graph=True)
    products, *curvature = torch.autograd.grad(dot(g, h), [s, *params])
    return products, curvature


# --- how close values are -----------------------------------------------------


def agreement(values, truth):
    """How close values (n,) are to the truth (n,): Pearson, Spearman, root mean square error,
    relative L2 distance."""
    from scipy import stats

    return {
        "pearson": float(stats.pearsonr(values, truth).statistic),
        "spearman": float(stats.spearmanr(values, truth).statistic),
        "rmse": float(np.sqrt(np.mean((values - truth) ** 2))),
        "rel_l2": float(np.linalg.norm(values - truth) / np.linalg.norm(truth)),
    }
