"""train.py --target_smoothing: the column `smoothed` is what the mean of the targets' gradients makes
of it, and nothing else in a run changes by it."""

import shutil

import numpy as np
import pytest
import torch
from runs import TWO_TARGETS, assert_same_run, read_bytes, run, weights
from test_valuation import RULES, Run, relative, tokens
from valued import smoothed

import train
from shapley import rules
from system import needs, store
from system.errors import UserError

BETA = 0.9
SMOOTHED = [TWO_TARGETS, f"--target_smoothing={BETA}", "--book_interval=3", "--lr_decay_iters=12"]
PLAIN = [option for option in SMOOTHED if "smoothing" not in option]


# --- against the slow truth ---------------------------------------------------


class SlowMeans(rules.Situation):
    """The rules' definitions with s_k / (1 - beta^n) for g_k, added up by hand."""

    sums = {}  # {number of the target: beta^(n - 1) (1 - beta) g_1 + ... + (1 - beta) g_n}
    steps = {}

    def gradient_at(self, steps):
        k = self.loss.target
        g = super().gradient_at(steps)
        before = self.sums.get(k, [0.0] * len(g))
        self.sums[k] = [BETA * s + (1 - BETA) * g_p for s, g_p in zip(before, g)]
        self.steps[k] = self.steps.get(k, 0) + 1
        return [s / (1 - BETA ** self.steps[k]) for s in self.sums[k]]


def slow_scores(monkeypatch, made, step, clip):
    """What rules.py says of the coming step with means for the targets' gradients: (B, K)."""
    X, Y = tokens(made, step)
    losses = []
    for k, target in enumerate(made.targets):
        X_k, Y_k = map(torch.from_numpy, target.batch(made.valuation.targets.picks(k, step)))

        def loss(model, X_k=X_k, Y_k=Y_k):
            return model(X_k, Y_k)[1]

        loss.target = k
        losses.append(loss)
    x = rules_x(made, X, Y)
    known = rules.known_rows(made.model, X, Y)
    with monkeypatch.context() as patch:
        patch.setattr(rules, "Situation", SlowMeans)
        return rules.rule_values(
            made.model, made.optimizer, x, losses, made.rule, 1e-2, clip, known=known
        )


def rules_x(made, X, Y):
    """Each chunk's share of the batch's gradient, by autograd: [one tensor a parameter]."""
    shares = []
    for i in range(len(X)):
        loss = made.model(X[i : i + 1], Y[i : i + 1])[1] / len(X)
        shares.append(torch.autograd.grad(loss, list(made.model.parameters())))
    return shares


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tie", [True, False])
def test_the_smoothed_score_equals_the_definition(monkeypatch, tmp_path, rule, tie):
    """Two targets with other chunks at every step; clipping off and on, 1, 2 and 4 micro-batches."""
    monkeypatch.setattr(SlowMeans, "sums", {})
    monkeypatch.setattr(SlowMeans, "steps", {})
    options = {"target_smoothing": BETA, "target_sampling": "redraw", "target_batch": 2}
    made = Run(tmp_path, torch.float64, rule, K=2, tie=tie, **options)
    plain = Run(
        tmp_path / "plain", torch.float64, rule, K=2, tie=tie, **options | {"target_smoothing": 0}
    )
    for step, (clip, micro_steps) in enumerate(
        [(0.0, 1), (0.05, 2), (0.05, 4), (0.0, 4), (0.05, 1)]
    ):
        truth = slow_scores(monkeypatch, made, step, clip)
        values, _, _ = made.step(step, clip=clip, micro_steps=micro_steps)
        expected, _, _ = plain.step(step, clip=clip, micro_steps=micro_steps)
        assert relative(smoothed(made.valuation), truth) < 1e-10, step
        assert torch.equal(values, expected)
        if step:
            assert relative(values, truth) > 1e-2  # another score than the value
    assert float(made.valuation.pending[-1].clip_coef) < 1
