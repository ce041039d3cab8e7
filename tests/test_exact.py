"""exact.py is the truth the rest is held to: here it is held to the axioms, to real optimizer steps and to explicit Hessians."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shapley import exact, rules


def problem(kind, seed=0, players=6):
    """A small model of no ghost ops, its players' losses and a target's loss: classification or regression."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    X, target_X = torch.randn(players, 5).double(), torch.randn(9, 5).double()
    if kind == "classification":
        y, target_y, criterion = (
            torch.randint(3, (players,)),
            torch.randint(3, (9,)),
            F.cross_entropy,
        )
    else:
        y, target_y, criterion = (
            torch.randn(players, 3).double(),
            torch.randn(9, 3).double(),
            F.mse_loss,
        )
    losses = [
        lambda model, i=i: criterion(model(X[i : i + 1]), y[i : i + 1]) for i in range(players)
    ]
    return model, losses, lambda model: criterion(model(target_X), target_y)


def warm(model, losses, optimizer, steps=4):
    for i in range(steps):
        losses[i % len(losses)](model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# --- games --------------------------------------------------------------------


def test_shapley_of_known_games():
    worth = np.array([3.0, -1.0, 0.0, 2.0])
    additive = lambda members: worth @ members
    assert np.allclose(exact.shapley(additive, 4), worth)
    # gloves: player 0 has the left one, 1 and 2 right ones; a pair is worth 1
    gloves = lambda members: float(members[0] and members[1:].any())
    assert np.allclose(exact.shapley(gloves, 3), [2 / 3, 1 / 6, 1 / 6])
    two = lambda members: np.array([worth @ members, gloves(members)])
    assert np.allclose(exact.shapley(two, 4)[:, 0], worth)
    assert np.allclose(exact.leave_one_out(gloves, 3), [1, 0, 0])
    assert np.allclose(rules.leave_one_in(gloves, 3), [0, 0, 0])
    with pytest.raises(ValueError, match="monte_carlo"):
        exact.shapley(additive, 21)


def test_shapley_by_every_permutation():
    """The definition itself, on a game without structure."""
    table = dict(
        zip(itertools.product([False, True], repeat=5), np.random.default_rng(0).normal(size=32))
    )
    game = lambda members: table[tuple(map(bool, members))] - table[(False,) * 5]
    total = np.zeros(5)
    for order in itertools.permutations(range(5)):
        members = np.zeros(5, bool)
        for i in order:
            before = game(members)
            members[i] = True
            total[i] += game(members) - before
    assert np.allclose(exact.shapley(game, 5), total / math.factorial(5))


def test_monte_carlo_finds_the_exact_values_within_its_errors():
    rng = np.random.default_rng(1)
    table = rng.normal(size=(256, 2))
    table[0] = 0
    game = lambda members: table[int(members @ 2 ** np.arange(8))]
    truth = exact.shapley(game, 8)
    values, errors = exact.monte_carlo(game, 8, permutations=2000, seed=3)
    assert np.allclose(
        values.sum(0), game(np.ones(8, bool))
    )  # efficiency holds permutation by permutation
    z = (values - truth) / errors
    assert 0.4 < np.sqrt(np.mean(z**2)) < 1.8
    few, _ = exact.monte_carlo(game, 8, permutations=2000, tolerance=10.0, seed=3)
    calls = []
    exact.monte_carlo(lambda m: calls.append(1) or game(m), 8, permutations=2000, tolerance=10.0)
    assert len(calls) < 8 * 2 * 8 + 2
    assert not np.allclose(few, values)
    additive, error = exact.monte_carlo(lambda m: m @ np.arange(8.0), 8, 4)
    assert np.allclose(additive, np.arange(8))
    assert np.allclose(error, 0)


# --- steps --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("make", ["adamw", "first adamw", "sgd", "sgd momentum"])
def test_a_step_is_the_optimizers_own(kind, make):
    """Everybody's landing is where the real optimizer goes, with clipping; nobody's is a step on a zero gradient; nothing moves."""
    model, losses, target = problem(kind)
    if "adamw" in make:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), 1e-1, momentum=0.9 if "momentum" in make else 0.0
        )
    if make != "first adamw":
        warm(model, losses, optimizer)
    x = exact.example_gradients(model, losses)
    weights = [p.detach().clone() for p in model.parameters()]
    step = exact.Step(model, optimizer, x, [target, losses[0]], grad_clip=0.05)
    values = exact.shapley(step, len(x))
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    everybody = step(np.ones(len(x), bool))
    assert np.allclose(values.sum(0), everybody, rtol=1e-9)  # efficiency
    assert np.allclose(step(np.zeros(len(x), bool)), 0)
    (sum(loss(model) for loss in losses) / len(losses)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    assert norm > 0.05
    optimizer.step()
    landed = step.nobody - np.array([target(model).item(), losses[0](model).item()])
    assert np.allclose(everybody, landed, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_rules_approach_the_truth_as_the_step_shrinks(kind):
    """Of models without ghost ops: adamw2's relative error falls at least 3 times when lr is halved, down to a per mille."""
    model, losses, target = problem(kind)
    optimizer = warm(
        model, losses, torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.9, 0.95)), 40
    )
    x, errors = exact.example_gradients(model, losses), []
    for lr in (1e-2, 5e-3, 2.5e-3):
        for group in optimizer.param_groups:
            group["lr"] = lr
        truth = exact.shapley(exact.Step(model, optimizer, x, [target]), len(x))
        values = rules.rule_values(model, optimizer, x, [target], "adamw2", lr).numpy()
        errors.append(
            abs(values.sum() / truth.sum() - 1)
        )  # the sum: the shares have an error of their own, in the secant
        assert exact.agreement(values[:, 0], truth[:, 0])["pearson"] > 0.99
    assert errors[2] < errors[1] / 3 < errors[0] / 9
    with pytest.raises(ValueError, match="choose sgd"):
        rules.rule_values(model, optimizer, x, [target], "adam", 1e-3)


def test_hvp_is_the_hessian_times_the_vector():
    model, _, target = problem("regression")
    params = list(model.parameters())
    vector = [torch.randn_like(p) for p in params]
    product = rules.hvp(model, target, vector)
    ahead, behind = (
        rules.displaced(model, [1e-5 * v for v in vector]),
        rules.displaced(model, [-1e-5 * v for v in vector]),
    )
    for p, a, b in zip(product, exact.gradient(ahead, target), exact.gradient(behind, target)):
        assert torch.allclose(p, (a - b) / 2e-5, rtol=1e-6, atol=1e-9)
    flat = torch.cat([v.flatten() for v in vector])
    shapes, sizes = [p.shape for p in params], [p.numel() for p in params]

    def loss(w):
        pieces = dict(
            zip(
                (n for n, _ in model.named_parameters()),
                (t.view(s) for t, s in zip(w.split(sizes), shapes)),
            )
        )
        return target(lambda X: torch.func.functional_call(model, pieces, X))

    hessian = torch.autograd.functional.hessian(
        loss, torch.cat([p.detach().flatten() for p in params])
    )
    assert torch.allclose(
        hessian @ flat, torch.cat([p.flatten() for p in product]), rtol=1e-9, atol=1e-12
    )
