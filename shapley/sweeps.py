"""AdamW's step and what the rules make of it, for flat pieces of parameters (formulas: directions.py). q: the step's scalars.

land... and scale... are swept over all parameters, in place.
"""

from collections import namedtuple
from functools import cache, partial

import torch

TINY = torch.finfo(torch.float32).tiny
BLOCK = 2**19  # elements worked on at a time on CPU, so that the passes over them stay in cache
Scalars = namedtuple(
    "Scalars", "a b c d ad mean square eps"
)  # ad = a d; mean * m, square * v: the bias-corrected moments before the step


def plus(x, c, y):
    """x <- x + c y. c: a number, or a tensor in compiled code, which a new number would have compiled anew."""
    return x.add_(y, alpha=c) if isinstance(c, float) else x.add_(y * c)


def displacement(q, m, v, g=None):
    """D(g), or D(0) without g."""
    if g is None:
        return (m * q.a).div_((v * q.c).sqrt_().add_(q.eps))
    return plus(m * q.a, q.b, g).div_(plus(v * q.c, q.d, g * g).sqrt_().add_(q.eps))


def secant(q, m, v, g):
    """sec(g); where r + r0 = 0 the second term is 0."""
    r0 = v * q.c
    r = plus(r0.clone(), q.d, g * g).sqrt_()
    second = (m * g).mul_(q.ad).div_((r0.sqrt_() + r).clamp_(min=TINY)).div_(r0.add_(q.eps))
    return second.neg_().add_(q.b).div_(r.add_(q.eps))


def slope(q, m, v, g):
    """D'(g) = b / s - (a m + b g) d g / (r s^2); where r = 0 the second term is 0."""
    r = plus(v * q.c, q.d, g * g).sqrt_()
    second = plus(m * q.a, q.b, g).mul_(g).mul_(q.d).div_(r.clamp(min=TINY)).div_(r.add_(q.eps))
    return second.neg_().add_(q.b).div_(r)


# What is swept over all parameters: the last tensor for each target. Few operations, for on a CPU each is a pass.


def land(shrink, c, eps, out, w, m, v):
    """out <- shrink w + c m / (sqrt(v) + eps)."""
    root = v.sqrt().add_(eps)
    plus(torch.mul(w, shrink, out=out), c, torch.div(m, root, out=root))


def land_halfway(q, shrink, c, out, w, m, v, g):
    """out <- shrink w + c (D(0) + D(g))."""
    plus(torch.mul(w, shrink, out=out), c, displacement(q, m, v).add_(displacement(q, m, v, g)))


def scale_linear(c, eps, floor, v, *g):
    """g <- g / (c sqrt(max(v, floor)) + eps)."""
    under = v.clamp(min=floor).sqrt_().mul_(c).add_(eps)
    for g_k in g:
        g_k.div_(under)


def scale_expected(c1, eps1, c2, eps2, floor, m, v, *g):
    """g <- g (1 + c1 m^2 / (v + eps1 sqrt(v))) / (c2 sqrt(v) + eps2), v at least floor."""
    v = v.clamp(min=floor)
    root = v.sqrt()
    factor = (m * m).div_(plus(v, eps1, root)).mul_(c1).add_(1.0).div_(root.mul_(c2).add_(eps2))
    for g_k in g:
        g_k.mul_(factor)


def scale_secant(q, weight, m, v, taken, *g):
    """g <- g (sec(taken) + weight D'(taken)); returns <g, D'(taken) taken> for each. Without q, of SGD: sec = D' = 1.
    Without a weight, which is ln(1/kappa), only g <- g sec(taken)."""
    factor = secant(q, m, v, taken) if q else torch.ones_like(taken)
    along = []
    if weight is not None:
        steep = slope(q, m, v, taken) if q else torch.ones_like(taken)
        factor, steep = factor + weight * steep, steep * taken
        along = [torch.dot(steep, g_k) for g_k in g]
    for g_k in g:
        g_k.mul_(factor)
    return along


def subtract(c, h, g):
    """h <- h - c g."""
    plus(h, -c, g)


# --- the sweep --------------------------------------------------------------------


def sweep(work, jobs, compile=False):
    """work(*scalars, *tensors) for each (scalars, [tensors of a parameter, ...]) of jobs; a list of what it returned. All in one compiled call,
    whose kernels read and write everything once, or on CPU by cache-sized pieces. Tensors of a parameter are equally shaped or numbers."""
    flat = [
        (scalars, [[x.view(-1) if x.dim() else x for x in row] for row in rows])
        for scalars, rows in jobs
        if rows
    ]
    if compile and flat:
        return compiled(work)([(list(map(tensors, scalars)), rows) for scalars, rows in flat])
    found = []
    for scalars, row in ((scalars, row) for scalars, rows in flat for row in rows):
        size = BLOCK if row[-1].device.type == "cpu" else max(1, len(row[-1]))
        found += [
            work(*scalars, *(x[i : i + size] if x.dim() else x for x in row))
            for i in range(0, len(row[-1]), size)
        ]
    return found


@cache
def compiled(work):
    """As one graph: a call for each parameter would keep a GPU waiting for the host."""
    return torch.compile(
        lambda jobs: [work(*scalars, *row) for scalars, rows in jobs for row in rows],
        fullgraph=True,
        dynamic=False,
    )


def tensors(x):
    """Numbers as tensors on the host, for compiled code, where they meet none but larger tensors; what is none, as it is."""
    number = partial(torch.tensor, dtype=torch.float64)
    return (
        Scalars(*map(number, x))
        if isinstance(x, Scalars)
        else number(x)
        if isinstance(x, float)
        else x
    )
