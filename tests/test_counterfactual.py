"""counterfactual.py: the truth of leaving visits out, and how well values predict it."""

import math

import numpy as np
import pytest
import torch
from trainings import Run, distance

from shapley.counterfactual import agreement, draw_sets, sums_of_sets, train_without
from shapley.replay import state_of

# --- sets ---------------------------------------------------------------------

VISITS = np.arange(100, 300)


def test_sets_are_a_function_of_their_arguments():
    sets = draw_sets(5, VISITS, 0.1, 7)
    np.random.default_rng().random()  # whatever else is drawn
    np.testing.assert_array_equal(sets, draw_sets(5, VISITS, 0.1, 7))
    assert not np.array_equal(sets, draw_sets(5, VISITS, 0.1, 8))


@pytest.mark.parametrize("fraction, size", [(0.1, 20), (0.0, 1), (1.0, 200)])
def test_sets_have_the_size_of_the_fraction_and_no_visit_twice(fraction, size):
    sets = draw_sets(5, VISITS, fraction, 7)
    assert len(sets) == 5
    for visits in sets:
        assert len(visits) == size
        assert (np.diff(visits) > 0).all()
        assert np.isin(visits, VISITS).all()


def test_sets_differ_and_reach_all_visits():
    sets = draw_sets(100, VISITS, 0.1, 7)
    assert len({tuple(visits) for visits in sets}) == 100
    counts = np.bincount(np.concatenate(sets), minlength=300)[100:]
    assert counts.min() > 0
    assert counts.max() < 25  # of 10 on average


# --- training without ---------------------------------------------------------


def test_leaving_nothing_out_gives_the_run_to_the_bit():
    """From its middle, with dropout and clipping."""
    run = Run(dtype=torch.float32, dropout=0.2)
    for step in range(2):
        run.training.take(step)
    state = state_of(run.training)
    for step in range(2, 6):
        run.training.take(step)
    expected = [p.detach().clone() for p in run.model.parameters()]
    train_without(run.training, state, (), 2, 6)
    for p, weight in zip(run.model.parameters(), expected):
        assert torch.equal(p, weight)


@pytest.mark.parametrize(
    "options, limit",
    [
        ({"kind": "sgd", "lr": 0.02, "grad_clip": 0.0}, 0.01),
        ({"kind": "sgd", "lr": 0.02, "grad_clip": 0.1}, 0.05),
        ({"lr": 1e-3, "grad_clip": 0.0}, 0.05),
        ({"lr": 1e-3, "grad_clip": 0.1}, 0.05),
    ],
)
def test_without_a_visit_the_final_loss_rises_by_its_value(options, limit):
    """Of 32 chunks a step, and AdamW with an eps that small gradients do not outgrow: clipping and
    AdamW's root are far from linear where a visit is much of what they are of."""
    run = Run(**options, n_chunks=32)
    for group in run.optimizer.param_groups:
        group["eps"] = 0.1
    first, end = 2, 5
    for step in range(first):
        run.training.take(step)
    state = state_of(run.training)
    past = [run.training.record(step) for step in range(first, end)]
    with_all = run.final_loss()
    assert all((step.clip_coef < 1) == bool(run.grad_clip) for step in past)
    values = run.sweep(past, run.target_gradient(0), epsilon=1e-5).ravel()
    visits = np.random.default_rng(0).choice(len(values), 12, replace=False)
    rises = []
    for visit in 32 * first + visits:
        train_without(run.training, state, [visit], first, end)
        rises.append(run.final_loss() - with_all)
    assert distance(values[visits], np.array(rises)) < limit


def test_a_small_part_of_a_visits_weight_is_worth_that_part_of_its_value():
    """Of 4 chunks a step, clipped, and AdamW as it is: whole visits are too much for a derivative
    there, a ten-thousandth is not."""
    run = Run()
    first, end = 2, 5
    for step in range(first):
        run.training.take(step)
    state = state_of(run.training)
    past = [run.training.record(step) for step in range(first, end)]
    with_all = run.final_loss()
    values = run.sweep(past, run.target_gradient(0), epsilon=1e-5).ravel()
    errors = {}
    for part in (1, 1e-4):
        rises = []
        for visit in range(4 * first, 4 * end):
            train_without(run.training, state, [visit], first, end, weight=1 - part)
            rises.append((run.final_loss() - with_all) / part)
        errors[part] = distance(values, np.array(rises))
    assert errors[1] > 0.05
    assert errors[1e-4] < 1e-3


def test_a_check_is_made_before_each_step():
    """As where a run is asked to end."""
    run = Run()
    state = state_of(run.training)
    calls = []
    train_without(run.training, state, [5], 0, 3, check=lambda: calls.append(1))
    assert len(calls) == 3


# --- agreement ----------------------------------------------------------------


def made_up(slope, noise, n=50):
    """Predictions of mean 0 and variance 1; truth = slope * prediction + noise * something of the
    same size that is uncorrelated with it."""
    rng = np.random.default_rng(3)
    predicted, other = rng.normal(size=(2, n))
    predicted = (predicted - predicted.mean()) / predicted.std()
    other -= other.mean() + predicted * (predicted @ other) / n
    return predicted, slope * predicted + noise * other / other.std() + 0.2


@pytest.mark.parametrize("slope, noise", [(2.0, 1.0), (-0.5, 1.0), (0.0, 1.0), (1.0, 0.01)])
def test_agreement_is_that_of_numbers_made_so(slope, noise):
    predicted, true = made_up(slope, noise)
    found = agreement(predicted, true)
    r = slope / math.hypot(slope, noise)
    assert found.n_sets == 50
    assert found.pearson == pytest.approx(r)
    assert found.slope == pytest.approx(slope)
    assert found.slope_error == pytest.approx(noise / math.sqrt(48))
    half = 1.959964 / math.sqrt(47)  # Fisher's
    assert found.low == pytest.approx(math.tanh(math.atanh(r) - half), abs=1e-6)
    assert found.high == pytest.approx(math.tanh(math.atanh(r) + half), abs=1e-6)
    assert found.standard_error == pytest.approx((1 - r**2) / math.sqrt(47), rel=0.1)


def test_spearman_looks_at_ranks_alone():
    predicted, _ = made_up(1.0, 0.0)
    found = agreement(predicted, np.exp(3 * predicted))
    assert found.spearman == pytest.approx(1)
    assert found.pearson < 0.9


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_set_whose_loss_is_no_number_leaves_no_figure(number):
    """A training that diverged is no data point, and no 0."""
    predicted, true = made_up(1.0, 0.1)
    true[7] = number
    found = agreement(predicted, true)
    assert found.n_sets == 50
    for name in ("pearson", "low", "high", "spearman", "slope", "slope_error"):
        assert math.isnan(getattr(found, name)), name


@pytest.mark.filterwarnings("error")
def test_scores_that_are_all_the_same_predict_nothing():
    _, true = made_up(1.0, 0.1)
    assert math.isnan(agreement(np.ones(50), true).pearson)


def test_three_sets_are_too_few():
    with pytest.raises(ValueError, match="3 sets: an interval needs 4"):
        agreement(np.arange(3.0), np.arange(3.0))


def test_sums_are_of_the_visits_left_out():
    scores = np.array([1, 2, math.nan, 8], np.float32)
    sets = [np.array([0, 1]), np.array([1, 2, 3]), np.array([2])]
    np.testing.assert_array_equal(sums_of_sets(scores, sets), [3, 10, 0])


def test_an_infinite_score_stays_one():
    assert sums_of_sets([math.inf, 1.0], [np.array([0, 1])])[0] == math.inf
