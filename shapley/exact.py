"""The slow truth: each chunk's gradient, and what a step's values ought to be. Autograd, loops and float64.

No ledger, no directions on parameters, nothing shared with valuation.py. (The rules' own definitions: shapley/rules.py.)

    Step(...), shapley(step, B)      the true Shapley values of that step's game, by running the optimizer for every subset
    monte_carlo, leave_one_out

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
        self.twin, self.optimizer = copy.deepcopy(
            (model, optimizer)
        )  # the copied optimizer steps the copied model
        self.twin.double().eval()
        self.params, self.x, self.losses, self.grad_clip = (
            list(self.twin.parameters()),
            x,
            losses,
            grad_clip,
        )
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if key != "step" and torch.is_tensor(value):
                    state[key] = value.double()
        self.young = not self.optimizer.state  # no step was taken yet
        self.moving = [
            *(p.data for p in self.params),
            *(v for s in self.optimizer.state.values() for v in s.values() if torch.is_tensor(v)),
        ]
        self.start = [t.clone() for t in self.moving]
        self.members = np.zeros(len(x), bool)
        self.g = [torch.zeros_like(p) for p in self.params]
        self.nobody = self.losses_at(self.members)

    def land(self, members):
        """Puts the twin where the members' step lands."""
        for i in np.flatnonzero(members != self.members):
            torch._foreach_add_(
                self.g, [g.double() for g in self.x[i]], alpha=1 if members[i] else -1
            )
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
        return (
            self.nobody - self.losses_at(members) if members.any() else np.zeros(len(self.losses))
        )


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
        values, errors = (
            np.mean(pairs, 0),
            np.std(pairs, 0, ddof=1) / math.sqrt(len(pairs)) if len(pairs) > 1 else np.inf,
        )
        if len(pairs) >= 8 and np.sqrt(np.mean(errors**2)) < tolerance * np.sqrt(
            np.mean(values**2)
        ):
            break
    return values, errors


def leave_one_out(utility, n):
    """What each player adds to all the others: (n,) or (n, K)."""
    everybody = np.ones(n, bool)
    return np.stack(
        [utility(everybody) - utility(everybody & (np.arange(n) != i)) for i in range(n)]
    )


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
