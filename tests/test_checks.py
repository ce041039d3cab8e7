"""shapley/checks.py: what would give wrong values in silence is right, or refused with a cure."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from experiments import models
from shapley.wrap import Examples, Net
from valuation import Settings, Valuation

B, CLASSES = 4, 3


def loss_of(net):
    def loss(X, Y, ledger=None):
        return net(X, Y, ledger)[1]

    return loss


def labels():
    return torch.arange(B) % CLASSES


def start(model, X, rule="sgd", optimizer=None, lr=1e-2, **settings):
    """A valuation of a wrapped model, and its loss."""
    net = Net(model, F.cross_entropy)
    if optimizer is None:
        kind = torch.optim.AdamW if rule.startswith("adamw") else torch.optim.SGD
        optimizer = kind([p for p in net.parameters() if p.requires_grad], lr)
    loss = loss_of(net)
    targets = [Examples("target", X.numpy(), labels().numpy())]
    settings = Settings(rule=rule, batch=B, target_batch=B, **settings)
    return Valuation(net, optimizer, loss, targets, settings), loss


def take_step(valuation, loss, X, micro_steps=1, step=0, clip_coef=1.0, lr=1e-2):
    valuation.begin_step(step, lr, tokens=X)
    for ids in np.split(np.arange(B), micro_steps):
        ledger = valuation.new_ledger(ids, X[ids], labels()[ids])
        (loss(X[ids], labels()[ids], ledger) / micro_steps).backward()
    valuation.before_update(clip_coef)
    valuation.weights.optimizer.step()
    valuation.weights.optimizer.zero_grad()
    valuation.end_step()
    return valuation.pending[-1]


class Model(nn.Module):
    """A layer, something in between, and a head."""

    def __init__(self, between=None):
        super().__init__()
        self.between = between
        self.layer = nn.Linear(B, B)
        self.norm = nn.LayerNorm(B)
        if between is turn:
            self.other = nn.Linear(B, B)
        self.head = nn.Linear(B, CLASSES)

    def forward(self, X):
        x = self.norm(torch.tanh(self.layer(X)))
        if self.between:
            x = self.between(self, x)
        return self.head(x if x.dim() == 2 else x.mean(1))


def inputs(*shape):
    return torch.randn(B, *shape, generator=torch.Generator().manual_seed(1))


# --- the first steps of a wrapped model ----------------------------------------------


class Hidden(torch.autograd.Function):
    """x * w, of which no mode sees anything."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, gy):
        x, w = ctx.saved_tensors
        return gy * w, (gy * x).sum(0)


def hide(model, x):
    return Hidden.apply(x, model.layer.bias)


def turn(model, x):
    """Every row becomes a column, and nothing says so."""
    return torch.einsum("btc->tbc", model.other(torch.einsum("btc->tbc", x)))


GENERATOR = np.random.default_rng(0)


def draw(model, x):
    return x * torch.from_numpy(GENERATOR.random(x.shape, np.float32))


def mix(model, x):
    return x - x.mean(0)


def reenter(model, x):
    return checkpoint(model.layer, x, use_reentrant=True)


@pytest.mark.parametrize("rule", ["sgd", "adamw", "adamw2"])
@pytest.mark.parametrize(
    "between, shape, message",
    [
        (hide, (B,), r"not those of their gradients, in model.layer.bias first \(a custom"),
        (turn, (B, B), "not those of their gradients, in model.other.*first dimension only looks"),
        (draw, (B,), "random numbers that are not torch's"),
        (mix, (B,), "an example's loss is .* in its batch, and .* alone"),
        (reenter, (B,), "checkpointing with use_reentrant=True .*: pass use_reentrant=False"),
    ],
)
def test_a_model_whose_values_would_be_wrong_is_refused(between, shape, message, rule):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        take_step(*start(Model(between), inputs(*shape), rule), inputs(*shape))
    if between is not reenter:
        return
    model = Model()  # it is told to later
    valuation, loss = start(model, inputs(*shape), rule)
    model.between = reenter
    with pytest.raises(ValueError, match=message):
        take_step(valuation, loss, inputs(*shape))


def test_a_way_that_comes_up_later_is_checked_when_it_does():
    """Rows that look like the batch only where there are as many of them."""
    torch.manual_seed(0)
    valuation, loss = start(Model(turn), inputs(3, B))
    for step in range(3):
        take_step(valuation, loss, inputs(3, B), step=step)
    assert not valuation.unchecked
    with pytest.raises(ValueError, match="not those of their gradients"):
        take_step(valuation, loss, inputs(B, B), step=3)


@pytest.mark.parametrize("rule", ["sgd", "adamw", "adamw2"])
def test_a_forgotten_clip_coefficient_is_refused(rule):
    torch.manual_seed(0)
    valuation, loss = start(Model(), inputs(B), rule)
    valuation.begin_step(0, 1e-2)
    loss(inputs(B), labels(), valuation.new_ledger(np.arange(B), inputs(B), labels())).backward()
    torch.nn.utils.clip_grad_norm_(valuation.model.parameters(), 1e-3)
    with pytest.raises(ValueError, match="add up to"):
        valuation.before_update()


def test_the_checks_leave_no_trace():
    """Weights, gradients and values are those of an unchecked run, to the bit."""
    found = []
    for unchecked in (0, 2):
        torch.manual_seed(0)
        model = Model(lambda model, x: F.dropout(x, 0.2, model.training))
        valuation, loss = start(model, inputs(B), "adamw2")
        valuation.unchecked = unchecked
        valuation.checked_ways = {None} if unchecked else CheckedAll()
        for step in range(3):
            take_step(valuation, loss, inputs(B), step=step)
        weights = [p.detach().clone() for p in model.parameters()]
        found.append([*weights, *[step.found.values for step in valuation.pending]])
    assert all(torch.equal(a, b) for a, b in zip(*found))


class CheckedAll(set):
    def __ge__(self, other):
        return True


# --- random numbers, modes, frozen parameters -------------------------------------------


@pytest.mark.parametrize("rule", ["sgd2", "adamw2"])
def test_random_numbers_that_no_module_tells_of_are_replayed(rule):
    """F.dropout in a second pass, and in an audit."""
    torch.manual_seed(0)
    model = Model(lambda model, x: F.dropout(x, 0.5)).double()
    X = inputs(B).double()
    valuation, loss = start(model, X, rule)
    valuation.begin_step(0, 1e-2)
    for ids in np.split(np.arange(B), 2):
        ledger = valuation.new_ledger(ids, X[ids], labels()[ids])
        (loss(X[ids], labels()[ids], ledger) / 2).backward()
    valuation.before_update()
    values = torch.cat([m.values[:, 0] for m in valuation.step.micro_batches])
    sums = [(p.grad * p.h[0]).sum() for p in valuation.weights.params]
    assert float(values.sum()) == pytest.approx(float(sum(sums)), rel=1e-9)
    parts = [valuation.audit.gradient_of(valuation.step, np.arange(B) == i) for i in range(B)]
    for part, p in zip(zip(*parts), valuation.weights.params):
        assert torch.allclose(sum(part), p.grad, rtol=1e-9, atol=1e-12)


def test_evaluating_leaves_each_module_in_its_own_mode():
    """A part that the user put into evaluation, as a frozen batch norm, stays there."""
    model = Model()
    model.norm.eval()
    valuation, _ = start(model, inputs(B))
    with valuation.targets.evaluating():
        assert not model.training
    assert model.training
    assert model.head.training
    assert not model.norm.training


@pytest.mark.parametrize("rule", ["adamw", "adamw2", "sgd"])
def test_a_model_with_frozen_parameters_is_audited(rule):
    torch.manual_seed(0)
    model = Model()
    model.layer.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    valuation, loss = start(model, inputs(B), rule, lr=1e-4, audit_interval=8)
    for step in range(8):
        take_step(valuation, loss, inputs(B), step=step, lr=1e-4)
    (audit,) = valuation.flush().audit
    assert audit["pearson"][0] > (0.99 if rule == "adamw2" else 0.9)
    assert audit["utility"][0] > 0


# --- optimizers --------------------------------------------------------------------


def optimizers(params):
    adamw, adam, sgd = torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD
    yield torch.optim.NAdam(params), "adamw", "do not know the step of NAdam"
    yield torch.optim.RAdam(params), "adamw2", "do not know the step of RAdam"
    yield torch.optim.Adafactor(params), "adamw", "do not know the step of Adafactor"
    yield torch.optim.Adagrad(params), "sgd", "do not know the step of Adagrad"
    yield adamw(params, amsgrad=True), "adamw", "AdamW with amsgrad=True"
    yield adamw(params, maximize=True), "adamw2", "AdamW with maximize=True"
    yield sgd(params, 0.1, momentum=0.9), "sgd", "SGD with momentum=0.9"
    yield sgd(params, 0.1, maximize=True), "sgd", "SGD with maximize=True"
    yield sgd(params, 0.1, weight_decay=0.1), "sgd2", "sgd2 does not know SGD's weight_decay"
    yield sgd(params, 0.1), "adamw", "speaks of AdamW's step, not of SGD's"
    yield adam(params, weight_decay=0.1), "adamw", "Adam adds weight_decay to the gradient"
    yield adamw(params, betas=(0.9, 0.0)), "adamw", "beta2 of AdamW above 0"
    yield adamw(params[:-1]), "adamw", "does not hold model.head.bias"


def test_an_optimizer_whose_step_no_rule_knows_is_refused():
    model = Model()
    cases = list(optimizers(list(model.parameters())))
    assert len(cases) == 13
    for optimizer, rule, message in cases:
        with pytest.raises(ValueError, match=message):
            start(model, inputs(B), rule, optimizer)


def test_optimizers_that_the_rules_know_are_taken():
    params = list(Model().parameters())
    model = Model()
    params = list(model.parameters())
    for optimizer, rule in (
        (torch.optim.Adam(params, 1e-2), "adamw"),
        (torch.optim.Adam(params, 1e-2, weight_decay=0.1, decoupled_weight_decay=True), "adamw2"),
        (torch.optim.SGD(params, 1e-2, weight_decay=0.1), "sgd"),
        (torch.optim.AdamW(params, 1e-2), "sgd"),
    ):
        start(model, inputs(B), rule, optimizer)


def test_learning_rates_that_a_value_does_not_know_are_refused():
    model = Model()
    groups = [{"params": list(model.head.parameters()), "lr": 1e-3}]
    groups += [{"params": [*model.layer.parameters(), *model.norm.parameters()]}]
    valuation, _ = start(model, inputs(B), "adamw", torch.optim.AdamW(groups, 1e-2))
    with pytest.raises(ValueError, match=r"several learning rates, \[0.001, 0.01\]"):
        valuation.begin_step(0, 1e-2)
    valuation, _ = start(model, inputs(B), "adamw")
    with pytest.raises(ValueError, match=r"given lr=0.1, and the optimizer steps with 0.01"):
        valuation.begin_step(0, 0.1)


# --- tokens, adapters ------------------------------------------------------------------


def train(made, rule, steps, rates, tokens=True):
    """Steps of AdamW on a model of experiments/models.py; its valuation."""
    net = Net(made.model, made.loss)
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, 1e-3, betas=(0.9, 0.95))
    n = len(made.Y)
    X = {name: tensor.numpy() for name, tensor in made.X.items()}
    target = Examples("target", X, made.Y.numpy())
    settings = Settings(rule=rule, batch=n, target_batch=n, audit_interval=steps)
    valuation = Valuation(net, optimizer, loss_of(net), [target], settings)
    for step, lr in zip(range(steps), rates):
        optimizer.param_groups[0]["lr"] = lr
        valuation.begin_step(step, lr, tokens=made.X if tokens else None)
        ledger = valuation.new_ledger(np.arange(n), made.X, made.Y)
        net(made.X, made.Y, ledger)[1].backward()
        valuation.before_update()
        optimizer.step()
        optimizer.zero_grad()
        valuation.end_step()
    return valuation


def test_token_rows_are_found_without_a_mark():
    pytest.importorskip("transformers")
    made = models.build("Llama")
    valuation = train(made, "adamw", 6, [1e-3] * 6)
    assert valuation.first_rule.token_weights == {made.model.model.embed_tokens.weight}
    assert valuation.flush().audit["pearson"][0, 0] > 0.99
    with pytest.raises(ValueError, match=r"pass begin_step\(step, lr, tokens=X\)"):
        train(models.build("Llama"), "adamw", 1, [1e-3], tokens=False)


@pytest.mark.parametrize("rule", ["adamw", "adamw_linear", "adamw2"])
@pytest.mark.parametrize("warm_up", [0, 2])
def test_values_of_an_adapters_first_steps_are_as_large_as_what_they_did(rule, warm_up):
    """B is 0 at first, so that A has no gradient, nor a second moment when it gets one; longer,
    where the learning rate begins with 0. These steps are marked early."""
    pytest.importorskip("peft")
    made = models.build("Llama", lora=True)
    for name, p in made.model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    rates = [0.0] * warm_up + [1e-3] * 7
    valuation = train(made, rule, len(rates), rates)
    flushed = valuation.flush()
    values = flushed.visits["value"].reshape(len(rates), -1).astype(float)
    fell = (flushed.books["before"] - flushed.books["after"])[:, 0]
    assert (abs(values.sum(1)) < 5 * abs(fell).max()).all()
    is_early = flushed.visits["early"].reshape(len(rates), -1)[:, 0].astype(bool)
    first_of_A = warm_up + 1  # its number of step: B is no longer 0
    assert is_early[: first_of_A + 3].all()
    assert not is_early[first_of_A + 3 :].any()
    assert copy.copy(valuation.weights.young) == set()
