"""What a valuation refuses, rather than write values that may be wrong.

    check_optimizer         at construction: is the optimizer's step one that the rules know?
    check_learning_rates    at every step
    check_examples          in the first steps of a wrapped model (wrap.py): do the values of single
                            examples equal those of their own gradients, and do examples not mix?
    check_sum               likewise: do the step's values add up to <g, h>?

Each raises UserError with what is wrong and what to do. B examples, K targets.
"""

import numpy as np
import torch

from shapley import ghost
from shapley.batch import rows_of
from shapley.intercept import refuse_reentrant
from system.errors import UserError
from system.machine import replaying, rng_state

KNOWN = "take torch.optim.AdamW, or torch.optim.SGD without momentum"


def check_optimizer(optimizer, rule, named_parameters):
    """rule: its name. named_parameters: of the model, those that learn."""
    kind = type(optimizer)
    if kind not in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        raise UserError(f"the rules do not know the step of {kind.__name__}: {KNOWN}")
    if rule.startswith("adamw") and kind is torch.optim.SGD:
        raise UserError(f"rule {rule} speaks of AdamW's step, not of SGD's: take rule sgd or sgd2")
    for group in optimizer.param_groups:
        check_group(group, kind, rule)
    held = set()
    for group in optimizer.param_groups:
        held.update(group["params"])
    missing = [name for name, p in named_parameters if p not in held]
    if missing:
        what = f"the optimizer does not hold {', '.join(missing)}"
        raise UserError(f"{what}: give it all parameters that learn, or freeze these")


def check_group(group, kind, rule):
    name = kind.__name__
    for option in ("amsgrad", "maximize", "momentum", "nesterov"):
        if group.get(option):
            what = f"{name} with {option}={group[option]}"
            raise UserError(f"the rules do not know the step of {what}: leave {option} out")
    is_decoupled = group.get("decoupled_weight_decay", True)
    decays = group["weight_decay"] != 0
    if kind is torch.optim.Adam and decays and not is_decoupled:
        what = "Adam adds weight_decay to the gradient, which the rules do not know"
        raise UserError(f"{what}: take torch.optim.AdamW")
    if kind is torch.optim.SGD and decays and rule == "sgd2":
        what = "rule sgd2 does not know SGD's weight_decay"
        raise UserError(f"{what}: take rule sgd, or weight_decay=0")
    if "betas" in group and kind is not torch.optim.SGD and not group["betas"][1] > 0:
        raise UserError("the rules need beta2 of AdamW above 0: try betas=(0.9, 0.95)")


def check_learning_rates(optimizer, lr=None):
    """lr: what the step is valued with; None: it may be another than the optimizer's."""
    rates = [float(group["lr"]) for group in optimizer.param_groups if group["params"]]
    if any(rate != rates[0] for rate in rates):
        what = f"the optimizer's groups have several learning rates, {rates}"
        raise UserError(f"{what}, and a value knows one: give all of them the same")
    if lr is not None and abs(rates[0] - lr) > 1e-6 * abs(lr):
        what = f"begin_step was given lr={lr}, and the optimizer steps with {rates[0]}"
        raise UserError(f'{what}: set group["lr"] before begin_step, and pass the same')


# --- the values of a step ------------------------------------------------------------


def tolerance(model):
    """How far a number may be from itself, computed in another way, relatively."""
    return min(10 * torch.finfo(model.precision).eps ** 0.5, 0.05)


@torch.no_grad()
def check_sum(weights, step, exact_rows, tolerance):
    """After the step's backward: sum_i <x_i, h_k> against <g, h_k>. The rows that are valued by
    each chunk's own gradient (exact_rows: {p: numbers}) are not in it: of them sum_i x_i against
    g."""
    for p in step.micro_batches[0].per_chunk:
        total = sum(m.per_chunk[p].sum(0) for m in step.micro_batches) * step.clip_coef
        g = weights.take_rows(p.grad, exact_rows[p])
        if not (total - g).norm() <= tolerance * (total.norm() + g.norm()):
            name = weights.name_of[p]
            what = f"step {step.number}: gradients of examples do not add up to the batch's"
            cure = "pass before_update what clipping multiplied by; or take rule adamw2"
            raise UserError(f"{what} in {name}: {cure}")
    values = [m.ledger.grad if m.values is None else m.values for m in step.micro_batches]
    values = torch.cat(values).double()
    params = [p for p in weights.params if p.grad is not None]
    products = torch.stack([(p.h * p.grad).flatten(1).sum(1) for p in params]).double()
    products = products[:, : values.shape[1]]  # without the batch's own, of two-pass rules
    products = products / torch.as_tensor(step.clip_coef).to(products)
    missing = (values.sum(0) - products.sum(0)).abs()
    scale = values.abs().sum(0) + products.abs().sum(0)
    if (missing > tolerance * scale).any():
        what = f"step {step.number}: the values add up to {numbers(values.sum(0))}, and the batch's"
        what += f" gradient gives {numbers(products.sum(0))}"
        cure = "pass new_ledger every micro-batch, and before_update what clipping multiplied by"
        raise UserError(f"{what}: {cure}")


def numbers(tensor):
    return ", ".join(f"{x:.4g}" for x in tensor.tolist())


class Probe:
    """Values of one micro-batch under directions of our own, against the gradients of two of its
    examples.

    The direction of each parameter is the first example's gradient, scaled so that the parameter
    brings 1 to its value. So one that is missed shows, however small its part in the step is."""

    def __init__(self, model, weights, loss, micro_batch, uses_tape):
        self.model, self.weights, self.loss = model, weights, loss
        self.X, self.Y, self.rng = micro_batch.X, micro_batch.Y, micro_batch.rng
        self.B, self.uses_tape = len(micro_batch.ids), uses_tape
        labeled = has_label(self.Y).reshape(self.B, -1).any(1).nonzero().flatten().tolist()
        self.examples = sorted({labeled[0], labeled[-1]}) if labeled else []

    def only(self, i):
        """The labels with those of all other examples struck out."""
        no_label = torch.nan if self.Y.is_floating_point() else -1
        others = torch.arange(self.B, device=self.Y.device) != i
        return self.Y.masked_fill(others.view(-1, *[1] * (self.Y.dim() - 1)), no_label)

    def gradient(self, i):
        """An example's gradient within its batch, one tensor a parameter."""
        with replaying(self.rng):
            loss = self.loss(self.X, self.only(i))
        refuse_reentrant(loss)
        gradient = torch.autograd.grad(loss, self.weights.params, allow_unused=True)
        params = self.weights.params
        return [torch.zeros_like(p) if g is None else g for g, p in zip(gradient, params)]

    def values(self, directions):
        """(B,) <gradient of the example's loss, direction>, as a step's backward finds them."""
        for p, h in zip(self.weights.params, directions):
            p.h = h[None]
        ledger = ghost.Tape() if self.uses_tape else self.weights.zeros(self.B, 1)
        with replaying(self.rng):
            loss = self.loss(self.X, self.Y, ledger)
        if self.uses_tape:
            torch.autograd.grad(loss, self.weights.params, allow_unused=True)
            values = ledger.values()
        else:
            (values,) = torch.autograd.grad(loss, ledger)
        # of the batch's mean, in which an example counts its weight: of its own loss
        weights = self.model.chunk_weight.double()
        return values[:, 0].double() * (weights.sum() / weights.clamp(min=1))

    def check_values(self):
        """The examples' values by the ledger against those by their gradients."""
        gradients = [self.gradient(i) for i in self.examples]
        norms = torch.stack(torch._foreach_norm(gradients[0]))
        # what is noise beside the others stays small
        noise = torch.finfo(self.model.precision).eps ** 0.5 * norms.max()
        scales = 1 / (norms.square() + noise.square()).clamp(min=1e-30)
        directions = [g * scale for g, scale in zip(gradients[0], scales)]
        # (examples, parameters): what each parameter brings
        truth = [[(g * h).sum() for g, h in zip(of_one, directions)] for of_one in gradients]
        truth = torch.tensor(truth, dtype=torch.float64)
        everything = range(len(directions))
        if self.is_right(directions, truth, everything):
            return
        name = self.weights.names[self.blame(directions, truth, everything)]
        what = f"the values of examples are not those of their gradients, in {name} first"
        cause = "a custom autograd.Function, or a tensor whose first dimension only looks like the"
        cause += " batch"
        cure = "give each example rows of its own, or freeze it with requires_grad_(False)"
        raise UserError(f"{what} ({cause}?): {cure}")

    def is_right(self, directions, truth, some):
        """Whether the values are right along the directions of some parameters (their numbers)."""
        some_directions = [torch.zeros_like(h) for h in directions]
        for i in some:
            some_directions[i] = directions[i]
        values = self.values(some_directions)[self.examples].cpu()
        truth = truth[:, list(some)]
        error = (values - truth.sum(1)).abs()
        # NaN is not right
        return bool((error <= tolerance(self.model) * truth.norm(dim=1).clamp(min=1e-3)).all())

    def blame(self, directions, truth, some):
        """The number of a parameter that makes the values wrong: the half is halved that is."""
        while len(some) > 1:
            half = len(some) // 2
            some = some[:half] if not self.is_right(directions, truth, some[:half]) else some[half:]
        return some[0]

    @torch.no_grad()
    def check_mixing(self, evaluating):
        """An example's loss alone against its loss in the batch. evaluating: a context of the model
        without dropout, whose masks belong to the batch."""
        if self.is_random():
            with evaluating():
                if not self.is_random():
                    self.check_alone()
        else:
            self.check_alone()

    def is_random(self):
        """Whether a forward draws random numbers. Raises UserError where they are not torch's."""
        losses = []
        for _ in range(2):
            with replaying(self.rng):
                state = rng_state()
                losses.append(float(self.loss(self.X, self.Y)))
                is_random = not same(state, rng_state())
        # on a GPU the order of a sum may differ, which is a rounding
        rounding = 1000 * torch.finfo(self.model.precision).eps
        if abs(losses[0] - losses[1]) > min(rounding, 0.05) * abs(losses[0]):
            what = f"a batch's loss is {losses[0]:.6g}, and then {losses[1]:.6g}"
            cause = "the model draws random numbers that are not torch's"
            raise UserError(f"{what}: {cause}, and a value needs the same ones twice")
        return is_random

    def check_alone(self):
        for i in self.examples:
            in_batch, alone = self.losses_of(i)
            if not abs(in_batch - alone) <= tolerance(self.model) * (abs(alone) + 1e-3):
                what = f"an example's loss is {in_batch:.6g} in its batch, and {alone:.6g} alone"
                cause = "a layer mixes examples, or a tensor's first dimension only looks like the"
                raise UserError(f"{what} ({cause} batch): values need one that does not")

    def losses_of(self, i):
        rows = slice(i, i + 1)
        in_batch = self.loss(self.X, self.only(i))
        return float(in_batch), float(self.loss(rows_of(self.X, rows, self.B), self.Y[rows]))


def check_examples(model, weights, loss, step, uses_tape, evaluating):
    """Of the step's first micro-batch. Everything is left as it was."""
    micro_batch = step.micro_batches[0]
    directions = [p.h for p in weights.params]
    chunk_loss = model.chunk_loss
    probe = Probe(model, weights, loss, micro_batch, uses_tape)
    if not probe.examples:
        return
    try:
        probe.check_mixing(evaluating)
        probe.check_values()
    finally:
        model.chunk_loss = chunk_loss
        weights.set_directions(directions)


def has_label(Y):
    return ~Y.isnan() if Y.is_floating_point() else Y >= 0


def same(state, other):
    """Whether two states of the random numbers (system/machine.py) are one."""
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(state, other) if a is not None]
    return all(np.array_equal(a, b) for a, b in pairs)
