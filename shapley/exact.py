"""The slow truth: each chunk's gradient, and what a step's values ought to be.

Autograd, loops and float64; no ledger, no directions, nothing shared with valuation.py. (rules.py
has the rules' own definitions.)

    Step(...), shapley(step, B)      the true Shapley values of that step's game, by running the
                                     optimizer for every subset
    monte_carlo, leave_one_out

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

ENUMERATE = 12  # players up to which solve runs through every subset

# --- gradients ----------------------------------------------------------------


def batch_loss(X, Y):
    """The loss of a language model on X, Y (B, T): of any model whose call model(X, Y) returns
    (anything, mean token loss)."""

    def loss(model):
        return model(X, Y)[1]

    return loss


def gradient(model, loss):
    """The gradient of loss(model): a list of tensors, one for each parameter (zeros where it is not
    used)."""
    params = list(model.parameters())
    grads = torch.autograd.grad(loss(model), params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params)]


def example_gradients(model, losses):
    """x_i = grad losses[i](model) / B for each of the B players of a step: a list of B lists of
    float64 tensors."""
    twin = copy.deepcopy(model).double().eval()
    x = []
    for loss in losses:
        x.append([g / len(losses) for g in gradient(twin, loss)])
    return x


def chunk_gradients(model, X, Y):
    """example_gradients of a language model's chunks X, Y (B, T)."""
    return example_gradients(model, [batch_loss(X[i : i + 1], Y[i : i + 1]) for i in range(len(X))])


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
        self.params = list(self.twin.parameters())
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
