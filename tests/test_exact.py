"""exact.py is the truth that the rest is held to. Here it is held to the axioms, to real optimizer
steps and to explicit Hessians; and the slow formulas of rules.py are held to it."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shapley import exact, rules

KINDS = ["classification", "regression"]


def problem(kind, seed=0, players=6):
    """A small model of no ghost ops, its players' losses and a target's loss."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    X = torch.randn(players, 5).double()
    target_X = torch.randn(9, 5).double()
    if kind == "classification":
        criterion = F.cross_entropy
        y = torch.randint(3, (players,))
        target_y = torch.randint(3, (9,))
    else:
        criterion = F.mse_loss
        y = torch.randn(players, 3).double()
        target_y = torch.randn(9, 3).double()

    def loss_on(X, y):
        return lambda model: criterion(model(X), y)

    losses = [loss_on(X[i : i + 1], y[i : i + 1]) for i in range(players)]
    return model, losses, loss_on(target_X, target_y)


def warm(model, losses, optimizer, steps=4):
    """The optimizer after some steps, each on one player."""
    for i in range(steps):
        losses[i % len(losses)](model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# --- games --------------------------------------------------------------------

WORTH = np.array([3.0, -1.0, 0.0, 2.0])


def additive(members):
    return WORTH @ members


def gloves(members):
    """Player 0 has a left glove, the others right ones. A pair is worth 1."""
    return float(members[0] and members[1:].any())


def random_game(players, seed=0, columns=()):
    """A game without structure; nobody's worth is 0."""
    table = np.random.default_rng(seed).normal(size=(2**players, *columns))
    table[0] = 0
    return lambda members: table[int(members @ 2 ** np.arange(players))]


def test_shapley_values_of_an_additive_game_are_what_each_player_adds():
    assert np.allclose(exact.shapley(additive, 4), WORTH)


def test_shapley_values_of_the_glove_game_are_the_known_ones():
    assert np.allclose(exact.shapley(gloves, 3), [2 / 3, 1 / 6, 1 / 6])


def test_shapley_values_of_several_targets_are_those_of_each():
    values = exact.shapley(lambda members: np.array([additive(members), gloves(members)]), 4)
    assert np.allclose(values[:, 0], WORTH)
    assert np.allclose(values[:, 1], exact.shapley(gloves, 4))


def test_shapley_values_are_the_mean_over_every_permutation():
    """The definition itself, on a game without structure."""
    game = random_game(5)
    total = np.zeros(5)
    for order in itertools.permutations(range(5)):
        members = np.zeros(5, bool)
        for i in order:
            before = game(members)
            members[i] = True
            total[i] += game(members) - before
    assert np.allclose(exact.shapley(game, 5), total / math.factorial(5))


def test_shapley_names_monte_carlo_when_there_are_too_many_subsets():
    with pytest.raises(ValueError, match="monte_carlo"):
        exact.shapley(lambda members: 0.0, 21)


def test_leave_one_out_is_what_a_player_adds_to_all_others():
    assert np.allclose(exact.leave_one_out(gloves, 3), [1, 0, 0])


def test_leave_one_in_is_what_a_player_does_alone():
    assert np.allclose(rules.leave_one_in(gloves, 3), [0, 0, 0])
    assert np.allclose(rules.leave_one_in(additive, 4), WORTH)


def test_monte_carlo_finds_the_exact_values_within_its_errors():
    game = random_game(8, seed=1, columns=(2,))
    truth = exact.shapley(game, 8)
    values, errors = exact.monte_carlo(game, 8, permutations=2000, seed=3)
    z = (values - truth) / errors
    assert 0.4 < np.sqrt(np.mean(z**2)) < 1.8


def test_monte_carlo_values_sum_to_what_everybody_is_worth():
    """Efficiency holds permutation by permutation."""
    game = random_game(8, seed=1, columns=(2,))
    values, _ = exact.monte_carlo(game, 8, permutations=4)
    assert np.allclose(values.sum(0), game(np.ones(8, bool)))


def test_monte_carlo_stops_early_when_its_errors_are_below_the_tolerance():
    calls = []
    game = random_game(8, seed=1)

    def counted(members):
        calls.append(1)
        return game(members)

    exact.monte_carlo(counted, 8, permutations=2000, tolerance=10.0)
    eight_pairs = 8 * 2 * 8
    assert len(calls) < eight_pairs + 2


def test_monte_carlo_has_no_error_when_the_game_is_additive():
    values, errors = exact.monte_carlo(lambda members: members @ np.arange(8.0), 8, 4)
    assert np.allclose(values, np.arange(8))
    assert np.allclose(errors, 0)


# --- steps --------------------------------------------------------------------

CLIP = 0.05  # below the norm of every gradient here
OPTIMIZERS = ["adamw", "first adamw", "sgd", "sgd momentum"]


def step_problem(kind, make):
    """A model, its players' losses, two targets' losses, and an optimizer that took some steps, or,
    as "first adamw", none."""
    model, losses, target = problem(kind)
    if "adamw" in make:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    else:
        momentum = 0.9 if "momentum" in make else 0.0
        optimizer = torch.optim.SGD(model.parameters(), 1e-1, momentum=momentum)
    if make != "first adamw":
        warm(model, losses, optimizer)
    return model, losses, [target, losses[0]], optimizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_everybodys_step_lands_where_the_real_optimizer_goes(kind, make):
    """With clipping."""
    model, losses, targets, optimizer = step_problem(kind, make)
    x = exact.example_gradients(model, losses)
    step = exact.Step(model, optimizer, x, targets, grad_clip=CLIP)
    everybody = step(np.ones(len(x), bool))
    (sum(loss(model) for loss in losses) / len(losses)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    assert norm > CLIP
    optimizer.step()
    landed = step.nobody - np.array([target(model).item() for target in targets])
    assert np.allclose(everybody, landed, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_steps_values_sum_to_what_everybodys_step_does(kind, make):
    """And nobody's step is worth nothing."""
    model, losses, targets, optimizer = step_problem(kind, make)
    x = exact.example_gradients(model, losses)
    step = exact.Step(model, optimizer, x, targets, grad_clip=CLIP)
    values = exact.shapley(step, len(x))
    assert np.allclose(values.sum(0), step(np.ones(len(x), bool)), rtol=1e-9)
    assert np.allclose(step(np.zeros(len(x), bool)), 0)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_playing_a_steps_game_moves_no_weight_of_the_model(make):
    model, losses, targets, optimizer = step_problem("regression", make)
    weights = [p.detach().clone() for p in model.parameters()]
    x = exact.example_gradients(model, losses)
    exact.shapley(exact.Step(model, optimizer, x, targets, grad_clip=CLIP), len(x))
    for before, after in zip(weights, model.parameters()):
        assert torch.equal(before, after)


# --- the slow formulas ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_adamw2_approaches_the_truth_as_the_step_shrinks(kind):
    """The relative error of the sum falls at least 3 times when lr is halved. The shares have an
    error of their own, in the secant; they agree throughout."""
    model, losses, target = problem(kind)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.9, 0.95))
    warm(model, losses, optimizer, 40)
    x = exact.example_gradients(model, losses)
    errors = []
    for lr in (1e-2, 5e-3, 2.5e-3):
        for group in optimizer.param_groups:
            group["lr"] = lr
        truth = exact.shapley(exact.Step(model, optimizer, x, [target]), len(x))
        values = rules.rule_values(model, optimizer, x, [target], "adamw2", lr).numpy()
        errors.append(abs(values.sum() / truth.sum() - 1))
        assert exact.agreement(values[:, 0], truth[:, 0])["pearson"] > 0.99
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


def test_an_unknown_rule_is_told_which_there_are():
    model, losses, target = problem("regression")
    optimizer = warm(model, losses, torch.optim.AdamW(model.parameters(), 1e-2))
    x = exact.example_gradients(model, losses)
    with pytest.raises(ValueError, match="choose sgd"):
        rules.rule_values(model, optimizer, x, [target], "adam", 1e-3)


def test_hvp_is_the_difference_of_gradients_along_the_vector():
    model, _, target = problem("regression")
    vector = [torch.randn_like(p) for p in model.parameters()]
    product = rules.hvp(model, target, vector)
    ahead = exact.gradient(rules.displaced(model, [1e-5 * v for v in vector]), target)
    behind = exact.gradient(rules.displaced(model, [-1e-5 * v for v in vector]), target)
    for p, a, b in zip(product, ahead, behind):
        assert torch.allclose(p, (a - b) / 2e-5, rtol=1e-6, atol=1e-9)


def test_hvp_is_the_explicit_hessian_times_the_vector():
    model, _, target = problem("regression")
    named = dict(model.named_parameters())
    vector = [torch.randn_like(p) for p in named.values()]
    product = rules.hvp(model, target, vector)

    def loss(weights):
        pieces = weights.split([p.numel() for p in named.values()])
        params = {name: piece.view_as(named[name]) for name, piece in zip(named, pieces)}
        return target(lambda X: torch.func.functional_call(model, params, X))

    hessian = torch.autograd.functional.hessian(loss, flat(named.values()).detach())
    assert torch.allclose(hessian @ flat(vector), flat(product), rtol=1e-9, atol=1e-12)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])
