"""The rules, fast: what each makes of the targets' gradients. rules.py has the same formulas, slow.

A chunk's value is <x_i, h_k>: its gradient against a direction of target k. A rule says where in
weight space the target's gradient is taken (`where`), and turns it into the direction (`direct`),
in each parameter's .h (K, *shape).

    rule          order   passes  direction, times lr
    sgd           first   one     kappa g_k(w)
    sgd2          second  two     kappa g_k(w - lr kappa g / 2)
    adamw_linear  first   one     kappa b g_k(w) / (sqrt(c max(v, floor)) + eps)     Adam-aware
    adamw         first   one     g_k(w_empty) E[sec(g)]                             Adam-aware
    adamw2        second  two     kappa g_k(w_mid) sec(kappa g)                      Adam-aware

g_k is the target's gradient, g the batch's before clipping, kappa the clip coefficient, m and v are
AdamW's moments before the step. In the t-th update, t = 1, 2, ...

    a = b1 / (1 - b1^t),  b = (1 - b1) / (1 - b1^t)
    c = b2 / (1 - b2^t),  d = (1 - b2) / (1 - b2^t)

    D(g)    = (a m + b g) / (sqrt(c v + d g^2) + eps)    AdamW lands on w+ - lr D(kappa g)
    w+      = (1 - lr wd) w                              after weight decay
    w_empty = w+ - lr D(0)                               where momentum and decay alone would land
    w_mid   = w+ - lr (D(0) + D(kappa g)) / 2            the middle of what the batch moves
    sec(g)  = (D(g) - D(0)) / g = b / s - a m d g / (s s0 (r + r0)),
              r0 = sqrt(c v), r = sqrt(c v + d g^2), s0 = r0 + eps, s = r + eps

Where v is near zero (rows of rare words, dead units) the one-pass formulas are unbounded, so v is
taken to be at least FLOOR_LINEAR or FLOOR_EXPECTED times its mean over the tensor. At t = 1 there
is no v, nor later in a tensor that had no gradient yet (LoRA's A, as long as B is 0). There
one-pass rules take the target's own gradient for the batch's, with the denominator
sqrt(d max(g_k^2, FLOOR_LINEAR mean g_k^2)) + eps. Every rule is rough in the first steps.

Clipping depends on the whole batch, so each chunk has a part in it (shapley/clipping.py). That
needs <x_i, g> and |x_i|^2: two-pass rules have a direction more, kappa g, and find both beside
their values. `adamw2` has also, of each target, g_k D'(kappa g). `adamw` knows <x_i, g> and |x_i|^2
over the rows that it values exactly. `sgd` and `adamw_linear` only multiply by kappa.

    D'(g) = b / s - (a m + b g) d g / (r s^2)

lr and kappa multiply the values, not the directions. All of it runs on this rank's slices where the
model is sharded. K targets, b chunks of a micro-batch, R exact rows of a parameter.

Sources. First order: Wang et al., arXiv 2406.11011, eq. 5; second order: their section 4, here
without a Hessian. Adam-aware: Ding et al., arXiv 2602.00329 (`adamw_linear`, here with a floor).
"""

import torch

from shapley.batch import integers_in
from shapley.contract import against
from shapley.sweeps import (
    TINY,
    Coefficients,
    Job,
    land,
    land_halfway,
    land_wholly,
    scale_expected,
    scale_linear,
    scale_secant_and_slope,
    secant,
    sweep,
)
from system.parallel import local

FLOOR_LINEAR = 1e-2
FLOOR_EXPECTED = 1e-4
EXACT_ELEMENTS = 2**27  # at most so many elements of chunks' own gradients are kept for a weight


# --- AdamW's coming update --------------------------------------------------------


def coefficients(group, t):
    """Of AdamW's t-th update, for a parameter group; None where the optimizer is SGD."""
    if "betas" not in group:
        return None
    beta1, beta2 = group["betas"]
    one = 1 - beta1**t
    two = 1 - beta2**t
    a = beta1 / one
    d = (1 - beta2) / two
    return Coefficients(
        a=a,
        b=(1 - beta1) / one,
        c=beta2 / two,
        d=d,
        ad=a * d,
        mean=1 / (1 - beta1 ** (t - 1)) if t > 1 else 0.0,
        square=1 / (1 - beta2 ** (t - 1)) if t > 1 else 0.0,
        eps=group["eps"],
    )


@torch.no_grad()
def landing(weights, step, part, reuse_memory, compile):
    """Where momentum and decay alone take the parameters (w_empty), or part of the way there: one
    tensor a parameter.

    reuse_memory: write over the last step's directions. With one target they have the room.
    """
    places, jobs = {}, []
    for group, params in weights.by_group():
        shrink = 1 - part * step.lr * group["weight_decay"]
        coef = coefficients(group, step.t)
        rows = []
        for p in params:
            places[p] = room(p, reuse_memory)
            if coef is None:  # SGD without momentum
                torch.mul(local(p.data), shrink, out=places[p])
            else:
                rows.append((places[p], local(p.data), *weights.moments(p)))
        if rows:
            root_c = coef.c**0.5
            numbers = (shrink, -part * step.lr * coef.a / root_c, coef.eps / root_c)
            jobs.append(Job(numbers, rows))
    sweep(land, jobs, compile)
    return [places[p] for p in weights.params]


@torch.no_grad()
def landing_with_data(rule, step, batch, work, part):
    """Where AdamW's step takes the parameters if their gradients are batch (land_wholly, part 1),
    or the middle of what the batch moves (land_halfway, part 1/2): one tensor a parameter."""
    weights, places, jobs = rule.weights, {}, []
    clipped_grads = dict(zip(weights.params, batch))
    for group, params in weights.by_group():
        rows = []
        for p in params:
            places[p] = room(p, rule.reuse_memory)
            m, v = weights.moments(p)
            rows.append((places[p], local(p.data), m, v, clipped_grads[p]))
        shrink = 1 - step.lr * group["weight_decay"]
        jobs.append(Job((coefficients(group, step.t), shrink, -step.lr * part), rows))
    sweep(work, jobs, rule.compile)
    return [places[p] for p in weights.params]


def room(p, reuse_memory):
    """Memory for one tensor like p: new, or that of p's old direction."""
    if reuse_memory and getattr(p, "h", None) is not None:
        return p.h[0]
    return torch.empty_like(local(p.data))


# --- what several rules do ----------------------------------------------------------


def floors(weights, second_moments, share):
    """The smallest second moment that counts, per tensor: share times its mean. TINY where the
    tensor never had a gradient, for 0 / TINY is 0."""
    means = weights.mean_over_ranks(torch.stack([v.mean() for v in second_moments]))
    return (share * means + TINY).unbind()


def direct_first_update(weights, coef, params):
    """The directions of one-pass Adam-aware rules where v = 0, at t = 1 or where a parameter had no
    gradient until now: the target's own gradient stands for the batch's."""
    numbers = (coef.d**0.5 / coef.b, coef.eps / coef.b)
    for p in params:
        for h_k in p.h:
            square = h_k.square()
            (floor,) = floors(weights, [square], FLOOR_LINEAR)
            sweep(scale_linear, [Job(numbers, [(floor, square, h_k)])])


# --- the rules ----------------------------------------------------------------------


class Rule:
    """What a rule may say. weights: Weights. settings: Settings of valuation.py."""

    two_pass = False  # whether the direction needs the whole batch's gradient
    instead = None  # the two-pass rule of the same step, for steps that one pass does not foresee
    has_slopes = False  # whether there are directions by D' too
    exact_names = ()  # names of the parameters that are valued by each chunk's own gradient
    exact_gradients = {}  # {p: the targets' gradients (K, R, ...) of its exact rows}
    exact_rows = {}  # {p: their numbers, int64 (R,)}
    token_weights = frozenset()  # parameters whose exact rows are the batch's tokens

    def __init__(self, weights, settings, n_targets):
        self.weights, self.settings = weights, settings
        self.compile = settings.compile
        self.n_targets = n_targets  # the first directions; smoothed ones come after them
        self.reuse_memory = n_targets == 1 and not settings.target_smoothing

    def begin(self, tokens):
        """A step begins. tokens: the global batch's, an integer array of any shape, or None."""

    def where(self, step, batch=None):
        """The weights at which the targets' gradients are taken, one tensor a parameter; None: the
        model's own. batch: kappa g, one tensor a parameter, for two-pass rules."""
        return None

    def direct(self, step, batch=None):
        """Turns the targets' gradients, which lie in each parameter's .h, into directions. Where a
        rule has slopes they lie there twice, the second time for those. In two-pass rules the last
        one is kappa g, which stays."""

    def add_exact_rows(self, step):
        """After the backward: adds to each micro-batch what its exact rows are worth."""

    def landing(self, step, batch):
        """Where the coming step takes the weights, one tensor a parameter. batch: kappa g. Of rules
        with another one `instead`. Writes over the directions."""


class FirstOrder(Rule):
    """`sgd`. The direction is the target's gradient at the weights as they are."""


class SecondOrder(Rule):
    """`sgd2`. The target's gradient is taken in the middle of the step, which is its second-order
    term without a Hessian."""

    two_pass = True

    def where(self, step, batch=None):
        places = []
        for p, clipped_grad in zip(self.weights.params, batch):
            place = room(p, self.reuse_memory)
            torch.add(local(p.data), clipped_grad, alpha=-step.lr / 2, out=place)
            places.append(place)
        return places


class AdamAwareLinear(Rule):
    """`adamw_linear`. First order, with AdamW's preconditioner linearised at zero and a floor under
    v."""

    @torch.no_grad()
    def direct(self, step, batch=None):
        jobs = []
        for group, params in self.weights.by_group():
            coef = coefficients(group, step.t)
            direct_first_update(self.weights, coef, self.weights.young_of(params))
            params = self.weights.grown_of(params)
            if params:
                second_moments = [self.weights.moments(p)[1] for p in params]
                least = floors(self.weights, second_moments, FLOOR_LINEAR)
                rows = []
                for floor, v, p in zip(least, second_moments, params):
                    rows.append((floor, v, *p.h.unbind()))
                jobs.append(Job((coef.c**0.5 / coef.b, coef.eps / coef.b), rows))
        sweep(scale_linear, jobs, self.compile)


class AdamAwareSecondOrder(Rule):
    """`adamw2`. The step AdamW really takes: the target's gradient in its middle, and the exact
    secant between the step without data and the step with it."""

    two_pass = True
    has_slopes = True

    def where(self, step, batch=None):
        return landing_with_data(self, step, batch, land_halfway, 0.5)

    @torch.no_grad()
    def direct(self, step, batch=None):
        clipped_grads = dict(zip(self.weights.params, batch))
        jobs = []
        for group, params in self.weights.by_group():
            rows = []
            for p in params:
                m, v = self.weights.moments(p)
                *targets, _ = p.h.unbind()  # and kappa g
                rows.append((m, v, clipped_grads[p], *targets))
            jobs.append(Job((coefficients(group, step.t),), rows))
        sweep(scale_secant_and_slope, jobs, self.compile)


class AdamAware(Rule):
    """`adamw`, the default. The step AdamW really takes, predicted before the batch is seen: the
    target's gradient at w_empty, and the secant expected from m and v.

    The moments do not foretell how a rare word's row will move. So for the rows of the batch's own
    tokens (in weights with an attribute `tokens`) and for the LayerNorms' weights each chunk's own
    gradient is kept. After the backward it meets g_k(w_empty) sec(kappa g), exactly. Of a large
    weight only the rows with the largest predicted directions are exact.
    """

    instead = AdamAwareSecondOrder

    def __init__(self, weights, settings, n_targets):
        super().__init__(weights, settings, n_targets)
        self.norms, self.token_weights, self.exact_names = set(), set(), []
        named = list(weights.model.named_parameters()) if settings.exact_rows else []
        named = [(name, p) for name, p in named if self.has_rows_of_its_own(p)]
        for name, p in named:
            if p.dim() == 1 and name.endswith("weight"):
                self.norms.add(p)
                self.exact_names.append(name)
        for name, p in named:
            if hasattr(p, "tokens"):
                self.token_weights.add(p)
                self.exact_names.append(f"{name}, rows of the batch's tokens")
        # [(the optimizer's group, parameters)], whose exact rows are joined: fewer operations
        self.exact_groups = []
        for group, params in weights.by_group():
            for p in params:
                if p in self.token_weights:
                    self.exact_groups.append((group, [p]))
            norms = [p for p in params if p in self.norms]
            if norms:
                self.exact_groups.append((group, norms))

    def has_rows_of_its_own(self, p):
        """Whether a parameter's gradient of each chunk alone can be kept."""
        return p in self.weights.whole and not getattr(p, "indirect", False)

    def begin(self, tokens):
        self.exact_rows, self.exact_gradients = {}, {}
        for p in self.norms:
            self.exact_rows[p] = torch.arange(len(p), device=p.device)
        if tokens is None or not self.token_weights:
            return
        tokens = integers_in(tokens)
        device = self.weights.params[0].device
        for p in self.token_weights:
            n_rows = len(p)
            # what is below 0 is no label; what is above is a token of another table
            rows = torch.from_numpy(tokens[(tokens >= 0) & (tokens < n_rows)])
            if not len(rows):
                continue
            if device.type == "cuda":  # pinned, so that the copy does not wait
                rows = rows.pin_memory().to(device, non_blocking=True)
            self.exact_rows[p] = rows

    def where(self, step, batch=None):
        if step.t == 1:
            return None
        return landing(self.weights, step, 1.0, self.reuse_memory, self.compile)

    def landing(self, step, batch):
        return landing_with_data(self, step, batch, land_wholly, 1.0)

    @torch.no_grad()
    def direct(self, step, batch=None):
        gradients = {}
        for p in self.weights.params:
            if p in self.exact_rows:
                gradients[p] = self.weights.take_rows(p.h, self.exact_rows[p], dim=1)
        jobs = []
        for group, params in self.weights.by_group():
            coef = coefficients(group, step.t)
            params = [p for p in params if p not in self.norms]  # of a norm nothing is left
            direct_first_update(self.weights, coef, self.weights.young_of(params))
            params = self.weights.grown_of(params)
            if params:
                jobs.append(self.expected_secant(coef, params))
        sweep(scale_expected, jobs, self.compile)
        for p, gradient in gradients.items():
            self.set_aside(p, gradient)

    def expected_secant(self, coef, params):
        """sec with E[g] for the batch's gradient and E[g^2] for its square. r0 and r are the
        multiples root0 and root of sqrt(v)."""
        moments = [self.weights.moments(p) for p in params]
        least = floors(self.weights, [v for _, v in moments], FLOOR_EXPECTED)
        rows = []
        for floor, (m, v), p in zip(least, moments, params):
            rows.append((floor, m, v, *p.h.unbind()))
        root0 = coef.c**0.5
        root = (coef.c + coef.d * coef.square) ** 0.5
        scale1 = -coef.ad * coef.mean / ((root0 + root) * root0 * coef.b)
        return Job((scale1, coef.eps / root0, root / coef.b, coef.eps / coef.b), rows)

    def set_aside(self, p, gradient):
        """Zeroes the direction of p's exact rows: add_exact_rows() values them after the backward.
        gradient: the targets' (K, R, ...) of these rows."""
        most = max(1, EXACT_ELEMENTS // (self.settings.batch * p[0].numel()))
        rows = self.exact_rows[p]
        if p in self.token_weights and len(rows) > most:
            predicted = self.weights.take_rows(p.h[: self.n_targets], rows, dim=1)
            sizes = predicted.abs().flatten(2).sum((0, 2))
            largest = sizes.topk(most).indices.sort().values
            rows = rows[largest]
            gradient = gradient[:, largest]
            self.exact_rows[p] = rows
        self.weights.zero_rows(p, rows)
        self.exact_gradients[p] = gradient

    @torch.no_grad()
    def add_exact_rows(self, step):
        for group, params in self.exact_groups:
            params = [p for p in params if p in self.exact_gradients]
            if not params:
                continue
            m = self.joined_rows([self.weights.moments(p)[0] for p in params], params)
            v = self.joined_rows([self.weights.moments(p)[1] for p in params], params)
            clipped_grad = self.joined_rows([local(p.grad) for p in params], params)
            gradient = joined([self.exact_gradients[p].flatten(1) for p in params])
            direction = gradient * secant(coefficients(group, step.t), m, v, clipped_grad)
            for micro_batch in step.micro_batches:
                x = joined([micro_batch.per_chunk[p].flatten(1) for p in params])
                x = x / self.weights.n_ranks  # a rank's loss is the mean of its own chunks
                micro_batch.exact_values = micro_batch.exact_values + against(x, direction)
                micro_batch.products = micro_batch.products + x @ clipped_grad
                micro_batch.squares = micro_batch.squares + x.square().sum(1)

    def joined_rows(self, tensors, params):
        """The exact rows of one tensor a parameter, as one vector."""
        rows = []
        for x, p in zip(tensors, params):
            rows.append(self.weights.take_rows(x, self.exact_rows[p]).flatten())
        return joined(rows)


def joined(tensors):
    """Side by side along their last dimension; one stays as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, -1)


RULES = {
    "sgd": FirstOrder,
    "sgd2": SecondOrder,
    "adamw_linear": AdamAwareLinear,
    "adamw": AdamAware,
    "adamw2": AdamAwareSecondOrder,
}
