"""How the clipping of a step is shared among its chunks: exactly, in a game that stands for it.

Clipping multiplies the gradient g_S of a subset S of the batch by c(S) = min(1, C / |g_S|), so what
a chunk brings depends on who else is there. Small subsets have short gradients and are clipped
less: k of n nearly orthogonal ones are sqrt(k / n) as long as all n, parallel ones k / n.

The game: with kappa = c of the whole batch a subset is paid

    sum_(i in S) kappa d_i + (c(S) - kappa) d'_i

d_i is the rule's inner product, the chunk's effect in the step as it is, and d'_i how that grows
with a longer gradient: by D' where the rule knows AdamW's step (directions.py), else d_i itself.
Its Shapley values are computed: over all subsets where there are up to ENUMERATE chunks, else over
the same ORDERS random orders in every step, half of them the reverse of another. That leaves an
error of up to .4 % of the values' length at kappa .5 and 3 % at .1, and with 512 chunks, for which
fewer orders have to do, 6 %. The values add up to kappa sum_i d_i, as they should. Of parallel
gradients they are the Aumann-Shapley values of the clipped step.

It needs |g_S| of any subset, and knows |x_i|^2 and <x_i, g>. The chunks' inner products are taken
to be sums of two numbers, one of either chunk: <x_i, x_j> = a_i + a_j, which fits both,

    |g_S|^2 = sum_(i in S) |x_i|^2 + 2 (|S| - 1) sum_(i in S) a_i
    a_i = (r_i - A) / (n - 2),  r_i = <x_i, g> - |x_i|^2,  A = sum_j r_j / (2 (n - 1))

It is this project's own. Against exact Shapley values of clipped steps: results/fidelity.
n chunks with labels, K targets. Everything is float64, on the host.
"""

from functools import cache

import numpy as np

ENUMERATE = 12  # chunks up to which all subsets are visited
ORDERS = 4096
MOST = 2**19  # places in all orders together: from 128 chunks on there are fewer


def clipped_values(values, slopes, kappa, products, squares):
    """What clipping makes of a step's values: float64 (n, K) like values, and with their sum.

    values, slopes: (n, K) kappa d_i and kappa d'_i, of chunks in an order that does not depend on
    how the batch was cut. kappa: the clip coefficient. products: (n,) <x_i, g>. squares: (n,)
    |x_i|^2; 0 of a chunk without labels, which does not play.
    """
    plays = squares > 0
    n = np.count_nonzero(plays)
    total = products[plays].sum()  # |g|^2
    if kappa == 1 or n < 2 or total <= 0:
        return values
    solve = over_subsets if n <= ENUMERATE else over_orders
    shared = shared_parts(products[plays], squares[plays])
    game = (squares[plays], shared, kappa, kappa * np.sqrt(total))
    result = values.copy()
    result[plays] += solve(slopes[plays] / kappa, *game)
    return result


def shared_parts(products, squares):
    """a_i (n,)."""
    n = len(products)
    rest = products - squares
    if n == 2:
        return rest / 2
    return (rest - rest.sum() / (2 * (n - 1))) / (n - 2)


def gained(size, square, shared, kappa, limit):
    """c(S) - kappa of subsets. size, square, shared: |S| and the sums over S of |x_i|^2 and a_i,
    arrays of one shape. limit: C."""
    length = np.sqrt(np.maximum(square + 2 * (size - 1) * shared, np.finfo(float).tiny))
    return np.minimum(1, limit / length) - kappa


def over_subsets(d, squares, shared, kappa, limit):
    """The Shapley values (n, K) of the payoff (c(S) - kappa) sum d'_i, exactly."""
    n = len(d)
    members, weights = subsets(n)
    size = members.sum(1)
    factor = gained(size, members @ squares, members @ shared, kappa, limit)
    values = np.empty_like(d)
    for k, effect in enumerate(d.T):  # a target's digits do not depend on how many there are
        paid = factor * (members @ effect)
        for i in range(n):
            without = np.flatnonzero(members[:, i] == 0)
            added = paid[without + 2**i] - paid[without]
            values[i, k] = weights[size[without].astype(int)] @ added
    return values


@cache
def subsets(n):
    """Members (2^n, n), 1 or 0, of all subsets of n; and what a player's joining one of size k
    counts, for k = 0 ... n - 1: k! (n - 1 - k)! / n!."""
    numbers = np.arange(2**n)[:, None]
    members = (numbers >> np.arange(n) & 1).astype(float)
    weights = [1 / n]
    for k in range(1, n):
        weights.append(weights[-1] * k / (n - k))
    return members, np.array(weights)


def over_orders(d, squares, shared, kappa, limit):
    """The Shapley values (n, K) of the payoff, estimated."""
    n = len(d)
    players = orders(n)
    size = np.arange(1, n + 1)
    sums = (squares[players].cumsum(1), shared[players].cumsum(1))
    factor = gained(size, *sums, kappa, limit)
    values = []
    for effect in d.T:
        paid = factor * effect[players].cumsum(1)
        added = np.diff(paid, axis=1, prepend=0)
        values.append(np.bincount(players.ravel(), added.ravel()) / len(players))
    return np.stack(values, 1)


@cache
def orders(n):
    """(orders, n): random orders of n players, and their reverses."""
    rng = np.random.default_rng(n)
    n_pairs = max(1, min(ORDERS, MOST // n) // 2)
    half = rng.permuted(np.tile(np.arange(n), (n_pairs, 1)), axis=1)
    return np.concatenate([half, half[:, ::-1]])
