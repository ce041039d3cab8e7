"""AdamW's update and what the rules make of it, swept over all parameters in place.

The formulas are written out in directions.py. Here they have few operations, for on a CPU each is a
pass over memory. Under torch.compile a whole sweep is one graph.

Every function below `land` is a sweep's work: numbers first, then tensors of one shape, the last of
them one for each target.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

TINY = torch.finfo(torch.float32).tiny
BLOCK = 2**19  # elements worked on at a time on CPU, so that the passes over them stay in cache


class Coefficients(NamedTuple):
    """The numbers of AdamW's coming update, by the names of directions.py."""

    a: float
    b: float
    c: float
    d: float
    ad: float  # a d
    mean: float  # mean * m is the bias-corrected m before the update
    square: float  # square * v is the bias-corrected v before the update
    eps: float


def add_scaled(x, scale, y):
    """x <- x + scale y. scale: a number, or in compiled code a tensor, for a new number would be
    compiled anew."""
    if isinstance(scale, float):
        return x.add_(y, alpha=scale)
    return x.add_(y * scale)


# --- AdamW's displacement, its secant and its slope, of flat tensors --------------


def displacement_of_nothing(coef, m, v):
    """D(0)."""
    return (m * coef.a).div_((v * coef.c).sqrt_().add_(coef.eps))


def displacement(coef, m, v, g):
    """D(g)."""
    numerator = add_scaled(m * coef.a, coef.b, g)
    return numerator.div_(add_scaled(v * coef.c, coef.d, g * g).sqrt_().add_(coef.eps))


def secant(coef, m, v, g):
    """sec(g); where r + r0 = 0 its second term is 0."""
    r0 = v * coef.c
    r = add_scaled(r0.clone(), coef.d, g * g).sqrt_()
    second = (m * g).mul_(coef.ad)
    second = second.div_((r0.sqrt_() + r).clamp_(min=TINY)).div_(r0.add_(coef.eps))
    return second.neg_().add_(coef.b).div_(r.add_(coef.eps))


def slope(coef, m, v, g):
    """D'(g) = b / s - (a m + b g) d g / (r s^2); where r = 0 its second term is 0."""
    r = add_scaled(v * coef.c, coef.d, g * g).sqrt_()
    second = add_scaled(m * coef.a, coef.b, g).mul_(g).mul_(coef.d)
    second = second.div_(r.clamp(min=TINY)).div_(r.add_(coef.eps))
    return second.neg_().add_(coef.b).div_(r)


# --- what is swept over all parameters ----------------------------------------------


def land(shrink, scale, eps, out, w, m, v):
    """out <- shrink w + scale m / (sqrt(v) + eps)."""
    root = v.sqrt().add_(eps)
    add_scaled(torch.mul(w, shrink, out=out), scale, torch.div(m, root, out=root))


def land_wholly(coef, shrink, scale, out, w, m, v, g):
    """out <- shrink w + scale D(g)."""
    add_scaled(torch.mul(w, shrink, out=out), scale, displacement(coef, m, v, g))


def land_halfway(coef, shrink, scale, out, w, m, v, g):
    """out <- shrink w + scale (D(0) + D(g))."""
    both = displacement_of_nothing(coef, m, v).add_(displacement(coef, m, v, g))
    add_scaled(torch.mul(w, shrink, out=out), scale, both)


def scale_linear(scale, eps, floor, v, *g):
    """g <- g / (scale sqrt(max(v, floor)) + eps)."""
    divisor = v.clamp(min=floor).sqrt_().mul_(scale).add_(eps)
    for g_k in g:
        g_k.div_(divisor)


def scale_expected(scale1, eps1, scale2, eps2, floor, m, v, *g):
    """g <- g (1 + scale1 m^2 / (v + eps1 sqrt(v))) / (scale2 sqrt(v) + eps2), v at least floor."""
    v = v.clamp(min=floor)
    root = v.sqrt()
    factor = (m * m).div_(add_scaled(v, eps1, root)).mul_(scale1).add_(1.0)
    factor = factor.div_(root.mul_(scale2).add_(eps2))
    for g_k in g:
        g_k.mul_(factor)


def scale_secant_and_slope(coef, m, v, clipped_grad, *g):
    """The first half of g <- g sec, the second half <- g D', both at clipped_grad."""
    half = len(g) // 2
    factor = secant(coef, m, v, clipped_grad)
    for g_k in g[:half]:
        g_k.mul_(factor)
    factor = slope(coef, m, v, clipped_grad)
    for g_k in g[half:]:
        g_k.mul_(factor)


# --- the sweep --------------------------------------------------------------------


class Job(NamedTuple):
    """A sweep's work for some parameters: work(*numbers, *tensors) for the tensors of each."""

    numbers: tuple  # floats, Coefficients, None, or tensors of no dimension
    rows: list  # of each parameter its tensors, of one shape, or of no dimension


def sweep(work: Callable, jobs: list[Job], compile=False) -> list:
    """Does the jobs: in one compiled call, whose kernels read and write everything once, or
    on CPU by blocks that fit in cache. Returns what the calls of work returned."""
    jobs = [flattened(job) for job in jobs if job.rows]
    if compile and jobs:
        return compiled(work)([with_tensors(job) for job in jobs])
    results = []
    for job in jobs:
        for row in job.rows:
            for block in blocks(row):
                results.append(work(*job.numbers, *block))
    return results


def flattened(job):
    rows = []
    for row in job.rows:
        rows.append([x.view(-1) if x.dim() else x for x in row])
    return Job(job.numbers, rows)


def blocks(row):
    """One parameter's flat tensors, block by block on CPU, else all at once."""
    n = len(row[-1])
    size = BLOCK if row[-1].device.type == "cpu" else max(1, n)
    for start in range(0, n, size):
        yield [x[start : start + size] if x.dim() else x for x in row]


@cache
def compiled(work):
    """The work of all jobs as one graph: a call for each parameter would keep a GPU waiting for the
    host."""

    def all_jobs(jobs):
        results = []
        for numbers, rows in jobs:
            for row in rows:
                results.append(work(*numbers, *row))
        return results

    return torch.compile(all_jobs, fullgraph=True, dynamic=False)


def with_tensors(job):
    return Job([as_tensors(number) for number in job.numbers], job.rows)


def as_tensors(x):
    """Numbers as tensors on the host, for compiled code, where they meet only larger tensors.
    Anything else as it is."""
    if isinstance(x, Coefficients):
        return Coefficients(*[as_tensors(number) for number in x])
    return torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else x
