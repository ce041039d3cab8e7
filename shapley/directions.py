"""What a rule makes of the targets' gradients: the directions that the chunks' gradients meet, in each parameter's .h (K, *shape).

    rule          passes  direction, times lr                                          source
    sgd           one     kappa g_k(w)                                                 Wang et al., arXiv 2406.11011, eq. 5
    sgd2          two     kappa g_k(w - lr kappa g / 2)                                their second order, without a Hessian
    adamw_linear  one     kappa b g_k(w) / (sqrt(c max(v, floor)) + eps)               Ding et al., arXiv 2602.00329, with a floor
    adamw         one     g_k(w_empty) E[sec(g)], and valuation.py's correction        look-ahead and predicted secant
    adamw2        two     kappa g_k(w_mid) sec(kappa g), and the clip path below       Aumann-Shapley of the step itself

g_k is the target's gradient, g the batch's before clipping, kappa the step's clip coefficient, m and v AdamW's moments before
the step; with t = 1, 2, ... a = b1 / (1 - b1^t), b = (1 - b1) / (1 - b1^t), c = b2 / (1 - b2^t), d = (1 - b2) / (1 - b2^t).

    D(g)    = (a m + b g) / (sqrt(c v + d g^2) + eps)           AdamW lands on w+ - lr D(kappa g), w+ = (1 - lr wd) w
    sec(g)  = (D(g) - D(0)) / g = b / s - a m d g / (s s0 (r + r0)),  r0 = sqrt(c v), r = sqrt(c v + d g^2), s0, s = r0, r + eps
    w_empty = w+ - lr D(0)                                       where momentum and decay alone would land
    w_mid   = w+ - lr (D(0) + D(kappa g)) / 2                    the middle of what the batch moves

Floor: v is at least 1e-2 (`adamw_linear`) or 1e-4 (`adamw`) x its mean over the tensor, for where it is near zero (rare embedding
rows, dead units) these formulas are unbounded. At t = 1 there is no v: both take the target's own gradient for the batch's, the
denominator being sqrt(d max(g_k^2, 1e-2 mean g_k^2)) + eps. Every rule is rough in the first steps.

`adamw` predicts the secant from m and v, but a rare word's row moves as nothing before foretold. For the rows of the batch's own
tokens (in weights with an attribute `tokens`) and for the LayerNorms' weights, each chunk's own gradient is kept and, after the
backward, contracted with lr g_k(w_empty) sec(kappa g): at most ROWS elements, those of the largest predicted directions.

Clipping depends on the whole batch, so a chunk has a part in it. Two passes take the path of the clipped step exactly:
    h = lr {kappa g_k sec(kappa g) + kappa ln(1/kappa) (p - u <u, p>)},  p = g_k D'(kappa g), u = g / |g|     (sgd2: sec = D' = 1)
one pass corrects the values afterwards (valuation.py). lr and kappa multiply the values, not the direction.

Works on this rank's slices where the model is sharded. K targets, B chunks of the global batch, R kept rows of a parameter.
"""

import numpy as np
import torch

from shapley.sweeps import (
    TINY,
    Scalars,
    land,
    land_halfway,
    scale_expected,
    scale_linear,
    scale_secant,
    secant,
    subtract,
    sweep,
)
from system import parallel
from system.parallel import local

RULES = ("off", "sgd", "sgd2", "adamw_linear", "adamw", "adamw2")
TWO_PASS = ("sgd2", "adamw2")
FLOORS = dict(adamw_linear=1e-2, adamw=1e-4)
ROWS = 2**27


def join(tensors):
    """Side by side along their last dimension; one stays as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, -1)


class Directions:
    def __init__(self, model, optimizer, rule, batch, spend, compile):
        """spend: the old directions' room may be used, for nobody needs them in the next step."""
        assert rule in RULES
        self.optimizer, self.rule, self.batch, self.spend, self.compile = (
            optimizer,
            rule,
            batch,
            spend,
            compile,
        )
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.seen = {p: getattr(p, "seen", p) for p in self.params}  # as the layers see them
        self.sharded = any(p is not whole for p, whole in self.seen.items())
        norm = {
            n: p for n, p in model.named_parameters() if p.dim() == 1 and n.endswith("weight")
        }  # the LayerNorms'
        token = {n: p for n, p in model.named_parameters() if hasattr(p, "tokens")}
        self.keeping = norm | token if rule == "adamw" else {}  # of these each chunk's own gradient
        self.t = None  # the optimizer's step

    def begin(self, lr, tokens):
        """A step: its learning rate, and the global batch's tokens or None."""
        self.lr = lr
        if self.t is None:  # read once, then counted: on a GPU the optimizer's own count lies there
            self.t = next(
                (int(state["step"]) for state in self.optimizer.state.values() if "step" in state),
                0,
            )
        self.t += 1
        seen = None
        if tokens is not None and self.keeping:
            seen = torch.from_numpy(np.unique(tokens))
            seen = (
                seen.pin_memory().to(self.params[0].device, non_blocking=True)
                if self.params[0].is_cuda
                else seen
            )
        whole = (lambda p: torch.arange(len(p), device=p.device)) if self.sharded else lambda p: ...
        rows = {p: seen if hasattr(p, "tokens") else whole(p) for p in self.keeping.values()}
        self.rows, self.kept = {p: of for p, of in rows.items() if of is not None}, {}

    def scalars(self, group):
        """Of AdamW's coming step; None where the optimizer is SGD."""
        if "betas" not in group:
            return None
        (beta1, beta2), t = group["betas"], self.t
        one, two = 1 - beta1**t, 1 - beta2**t
        mean, square = (1 / (1 - beta ** (t - 1)) if t > 1 else 0.0 for beta in (beta1, beta2))
        a, b, c, d = beta1 / one, (1 - beta1) / one, beta2 / two, (1 - beta2) / two
        return Scalars(a, b, c, d, a * d, mean, square, group["eps"])

    def moments(self, p):
        """AdamW's, before the coming step."""
        state = self.optimizer.state.get(p)
        return [
            local(state[key]) if state else torch.zeros_like(local(p.data))
            for key in ("exp_avg", "exp_avg_sq")
        ]

    def by_group(self):
        """The optimizer's groups, each with its Scalars and those of its parameters that train."""
        return [
            (group, self.scalars(group), [p for p in group["params"] if p in self.seen])
            for group in self.optimizer.param_groups
        ]

    def over_ranks(self, x):
        """The sum of what each rank found in its slices; where none are sliced, x."""
        return parallel.add([x])[0] if self.sharded else x

    def rows_of(self, x, rows, dim=0):
        """These rows (...: all) of a tensor laid out as the parameters are: on every rank."""
        if not self.sharded:
            return x if rows is ... else x.index_select(dim, rows)
        here, inside = self.here(rows, n := x.shape[dim])
        return parallel.add(
            [
                x.index_select(dim, here.clamp(0, n - 1))
                * inside.view(-1, *[1] * (x.dim() - dim - 1))
            ]
        )[0]

    def here(self, rows, n):
        """Where rows lie in this rank's slice of n rows, and whether they do."""
        here = rows - parallel.rank() * n
        return here, (here >= 0) & (here < n)

    @torch.no_grad()
    def landings(self, part=1.0, batch=None):
        """Where momentum and decay alone take each parameter, w_empty, or part of the way there; with batch, kappa g, w_mid."""
        taken, places, jobs = dict(zip(self.params, batch or ())), {}, []
        for group, q, params in self.by_group():
            shrink = 1 - part * self.lr * group["weight_decay"]
            for p in params:  # the old direction's room, where nobody needs that any more
                spent = self.spend and getattr(p, "h", None) is not None
                places[p] = p.h[0] if spent else torch.empty_like(local(p.data))
                if self.rule == "sgd2" and batch:
                    torch.add(local(p.data), taken[p], alpha=-self.lr / 2, out=places[p])
                elif not q:  # SGD, without momentum
                    torch.mul(local(p.data), shrink, out=places[p])
            if q and not batch:
                scalars = shrink, -part * self.lr * q.a / q.c**0.5, q.eps / q.c**0.5
                jobs.append(
                    (scalars, [(places[p], local(p.data), *self.moments(p)) for p in params])
                )
            elif q and self.rule != "sgd2":
                jobs.append(
                    (
                        (q, shrink, -part * self.lr / 2),
                        [(places[p], local(p.data), *self.moments(p), taken[p]) for p in params],
                    )
                )
        sweep(land_halfway if batch else land, jobs, self.compile)
        return [places[p] for p in self.params]

    @torch.no_grad()
    def of_one(self, grads):
        """The targets' gradients in .h -> directions, before lr and kappa."""
        kept = {
            p: self.rows_of(g, rows, 1)
            for p, g in zip(self.params, grads)
            if (rows := self.rows.get(p)) is not None
        }
        kept = {p: g.clone() if self.rows[p] is ... else g for p, g in kept.items()}
        jobs = []
        for _, q, params in self.by_group() if self.rule != "sgd" else ():
            params = [p for p in params if self.rows.get(p) is not ...]  # of those nothing is left
            if self.t == 1:
                for h in (h_k for p in params for h_k in p.h):
                    floors = self.floors([v := h.square()], "adamw_linear")
                    sweep(scale_linear, [((q.d**0.5 / q.b, q.eps / q.b), [(*floors, v, h)])])
            elif params:
                m, v = zip(*map(self.moments, params))
                floors, h = self.floors(v, self.rule), [p.h.unbind() for p in params]
                if self.rule == "adamw":
                    # sec with E[g] for the batch's gradient and E[g^2] for its square: r0 and r are multiples of sqrt(v), at0 and at
                    at0, at = q.c**0.5, (q.c + q.d * q.square) ** 0.5
                    scalars = (
                        -q.ad * q.mean / ((at0 + at) * at0 * q.b),
                        q.eps / at0,
                        at / q.b,
                        q.eps / q.b,
                    )
                    jobs.append((scalars, [(*row, *h_K) for *row, h_K in zip(floors, m, v, h)]))
                else:
                    jobs.append(
                        (
                            (q.c**0.5 / q.b, q.eps / q.b),
                            [(*row, *h_K) for *row, h_K in zip(floors, v, h)],
                        )
                    )
        sweep(scale_expected if self.rule == "adamw" else scale_linear, jobs, self.compile)
        for p, g in kept.items():
            self.keep(p, g)

    def floors(self, v, rule):
        """The least v that counts, of each of these tensors: a number. A weight that never had a gradient gets TINY: 0 / TINY."""
        means = self.over_ranks(torch.stack([v_p.mean() for v_p in v])) / (
            parallel.size() if self.sharded else 1
        )
        return (FLOORS[rule] * means + TINY).unbind()

    def keep(self, p, g):
        """Takes p's rows that are kept, whose targets' gradient is g (K, R, ...), out of its direction: theirs comes after the backward."""
        rows, most = self.rows[p], max(1, ROWS // (self.batch * p[0].numel()))
        if rows is not ... and len(rows) > most:
            chosen = (
                self.rows_of(p.h, rows, 1)
                .abs()
                .flatten(2)
                .sum((0, 2))
                .topk(most)
                .indices.sort()
                .values
            )
            self.rows[p], g = rows[chosen], g[:, chosen]
        here, inside = (
            self.here(self.rows[p], p.h.shape[1]) if self.sharded else (self.rows[p], ...)
        )
        p.h[:, here if here is ... else here[inside]] = 0
        self.kept[p] = g

    @torch.no_grad()
    def value_kept(self, micro):
        """What the kept rows add to the chunks' values, now that the optimizer's gradient is known; and <x_i, g>, |x_i|^2 over them."""
        for _, q, params in self.by_group() if self.kept else ():
            kept = [p for p in params if p in self.kept]
            tokens, norms = (
                [p for p in kept if hasattr(p, "tokens") == of_tokens]
                for of_tokens in (True, False)
            )
            for weights in (
                [*([p] for p in tokens), norms] if norms else [[p] for p in tokens]
            ):  # many LayerNorms are one vector: fewer operations
                moments = (
                    [
                        self.rows_of(x, self.rows[p]).flatten()
                        for x in (*self.moments(p), local(p.grad))
                    ]
                    for p in weights
                )
                m, v, taken = map(join, zip(*moments))
                h = join([self.kept[p].flatten(1) for p in weights]) * secant(q, m, v, taken)
                for part in micro:
                    each = (
                        join([part.each[p].flatten(1) for p in weights]) / parallel.size()
                    )  # a rank's loss is the mean of its own chunks
                    part.added = part.added + each @ h.t()
                    part.products, part.squares = (
                        part.products + each @ taken,
                        part.squares + each.square().sum(1),
                    )

    @torch.no_grad()
    def of_two(self, batch, kappa):
        """The targets' gradients in .h -> directions, before lr and kappa. batch: kappa g, a tensor a parameter."""
        clipped, taken = torch.is_tensor(kappa) or kappa < 1, dict(zip(self.params, batch))
        weight = (
            -torch.as_tensor(kappa).log() if clipped else None
        )  # ln(1/kappa); not looked at, for that would wait for the device
        jobs = []
        for _, q, params in self.by_group():
            of = {
                p: self.moments(p) if self.rule == "adamw2" else (taken[p], taken[p])
                for p in params
            }
            jobs.append(
                (
                    (q if self.rule == "adamw2" else None, weight),
                    [(*of[p], taken[p], *p.h.unbind()) for p in params],
                )
            )
        found = sweep(scale_secant, jobs, self.compile)
        if clipped:
            along = self.over_ranks(
                torch.stack([x for part in found for x in part])
                .view(-1, len(self.params[0].h))
                .sum(0)
            )  # <u, p_k> |batch|
            square = self.over_ranks(torch.stack(torch._foreach_norm(batch)).square().sum()).clamp(
                min=TINY
            )
            rows = [
                [(c, h_k, g) for h_k, c in zip(p.h.unbind(), weight * along / square)]
                for p, g in zip(self.params, batch)
            ]
            sweep(subtract, [((), [row for of in rows for row in of])], self.compile)
