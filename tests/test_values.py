"""The values are what exact.py says they are: in float64 to 1e-10, in float32 to 1e-4, for all parameters at once."""

import itertools

import numpy as np
import pytest
import torch

import exact
import ghost
from data import Target
from model import GPT, GPTConfig
from valuation import Valuation

T, B, VOCAB = 12, 4, 61


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def text(n, seed):
    """Chunks as real text has them: a few words again and again, most words hardly ever, one in every chunk once."""
    rng = np.random.default_rng(seed)
    rows = np.minimum(rng.zipf(1.5, (n, T + 1)) - 1, VOCAB - 5)
    rows[:, 5] = VOCAB - 4 + seed % 3
    return rows.astype(np.int32)


def targets(K):
    made = [Target(f"target {k}", text(3, 10 + k), None) for k in range(K)]
    made[-1].rows[1, 7:] = -1  # a short text, padded and masked
    return made


class Run:
    """A model, its optimizer and its accountant, stepped as train.py steps them."""

    def __init__(self, tmp_path, dtype, rule="adamw_linear", K=1, tie=True, bias=False, optimizer="adamw", autocast=False, **options):
        torch.manual_seed(1)
        self.model = GPT(GPTConfig(T, VOCAB, n_layer=2, n_head=2, n_embd=16, bias=bias, tie_weights=tie)).to(dtype)
        adamw = self.model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
        self.optimizer = adamw if optimizer == "adamw" else torch.optim.SGD(self.model.parameters(), lr=1e-2)
        self.targets = targets(K)
        options = {"target_batch": 3, "target_sampling": "fixed", **options}
        self.autocast = autocast
        self.valuation = Valuation(self.model, self.optimizer, self.target_loss, self.targets, rule, B, 100, tmp_path, **options)

    def loss(self, X, Y, ledger=None):
        with torch.amp.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.model(X, Y, ledger)[1]

    def target_loss(self, X, Y):
        return self.loss(torch.from_numpy(X), torch.from_numpy(Y))

    def step(self, step, lr=1e-2, clip=0.0, micro_steps=1):
        """-> the step's values (B, K) and losses (B,), and what exact.py says the values are."""
        rows = torch.from_numpy(text(B, 100 + step).astype(np.int64))
        X, Y = rows[:, :-1], rows[:, 1:]
        pairs = [tuple(map(torch.from_numpy, t.batch(np.arange(3)))) for t in self.targets]
        truth = exact.values(self.model, self.optimizer, X, Y, pairs, self.valuation.rule, lr, clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.valuation.open(step, lr)
        for ids in np.split(np.arange(B), micro_steps):
            ledger = self.valuation.ledger(ids)
            (self.loss(X[ids], Y[ids], ledger) / micro_steps).backward()
        kappa = 1.0
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            kappa = (clip / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.valuation.close(kappa)
        _, _, _, _, losses, values, _ = self.valuation.pending[-1]
        return values, losses, truth


@pytest.fixture(autouse=True)
def auto_form():
    yield
    ghost.set_form("auto")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("form", ["running", "matmul"])
@pytest.mark.parametrize("rule", ["sgd", "adamw_linear"])
@pytest.mark.parametrize("K", [1, 3])
def test_values_equal_the_definition(tmp_path, dtype, tolerance, form, rule, K):
    """First step and later, clip off and on, tied and untied, bias on and off, 1, 2 and 4 micro-steps."""
    ghost.set_form(form)
    for i, (tie, bias) in enumerate(itertools.product([True, False], [True, False])):
        (run_dir := tmp_path / str(i)).mkdir()
        run = Run(run_dir, dtype, rule, K, tie, bias)
        for step, (clip, micro_steps) in enumerate([(0.0, 1), (0.05, 2), (0.05, 4), (0.0, 4), (0.05, 1)]):
            values, _, truth = run.step(step, clip=clip, micro_steps=micro_steps)
            assert relative(values, truth) < tolerance, (tie, bias, step)
            assert truth.abs().min() > 0


@pytest.mark.parametrize("rule", ["sgd", "adamw_linear"])
def test_values_do_not_depend_on_the_micro_batches(tmp_path, rule):
    runs = {}
    for micro_steps in (1, 2, 4):
        (run_dir := tmp_path / str(micro_steps)).mkdir()
        run = Run(run_dir, torch.float64, rule)
        runs[micro_steps] = torch.cat([run.step(s, clip=0.05, micro_steps=micro_steps)[0] for s in range(3)])
    assert relative(runs[2], runs[1]) < 1e-10
    assert relative(runs[4], runs[1]) < 1e-10


@pytest.mark.parametrize("form", ["running", "matmul"])
@pytest.mark.parametrize("tie, bias", [*itertools.product([True, False], [True, False])])
def test_weight_gradients_and_losses_are_those_without_a_ledger(form, tie, bias):
    ghost.set_form(form)
    torch.manual_seed(0)
    model = GPT(GPTConfig(T, VOCAB, n_layer=2, n_head=2, n_embd=16, bias=bias, tie_weights=tie)).double()
    for p in model.parameters():
        p.h = torch.randn(2, *p.shape, dtype=p.dtype)
    rows = torch.from_numpy(text(B, 0).astype(np.int64))
    X, Y = rows[:, :-1], rows[:, 1:]
    logits, loss = model(X, Y)
    plain = torch.autograd.grad(loss, list(model.parameters()))
    ghost_logits, ghost_loss = model(X, Y, torch.zeros(B, 2, dtype=torch.float64, requires_grad=True))
    valued = torch.autograd.grad(ghost_loss, list(model.parameters()))
    assert torch.equal(logits, ghost_logits)
    assert abs(loss.item() - ghost_loss.item()) < 1e-14
    assert max(relative(v, p) for v, p in zip(valued, plain)) < 1e-12
    each = torch.stack([model(X[i : i + 1], Y[i : i + 1])[1] for i in range(B)])
    assert relative(model.chunk_loss, each.detach()) < 1e-14


def test_tiles_of_a_large_weight_add_up(monkeypatch):
    """The running form works through a weight in tiles; their number does not show in the result."""
    gy, x, h = torch.randn(3, 5, 37).double(), torch.randn(3, 5, 11).double(), torch.randn(2, 37, 11).double()
    monkeypatch.setattr(ghost, "TILE", 50)
    gw, values = ghost.weight_grad(gy, x, h, "running")
    truth = torch.einsum("bto,bti->boi", gy, x)
    assert relative(gw, truth.sum(0)) < 1e-14
    assert relative(values, torch.einsum("boi,koi->bk", truth, h)) < 1e-14
    tokens = torch.stack([ghost.token_values(gy, x, h_k) for h_k in h], 2)
    assert tokens.shape == (3, 5, 2)
    assert relative(tokens.sum(1), values) < 1e-12


def test_sgd_values_sum_to_the_first_order_drop(tmp_path):
    """Under plain SGD the values of a small step add up to what the target's loss fell by: the sign is the documented one."""
    run = Run(tmp_path, torch.float64, "sgd", optimizer="sgd")
    batch = tuple(map(torch.from_numpy, run.targets[0].batch(np.arange(3))))
    before = float(run.model(*batch)[1].detach())
    values, _, _ = run.step(0, lr=1e-5)
    drop = before - float(run.model(*batch)[1].detach())
    assert drop > 0
    assert float(values.sum()) == pytest.approx(drop, rel=1e-3)


def test_adamw_values_of_the_first_step_are_of_the_size_of_the_step(tmp_path):
    """At t = 1 there is no second moment; the values must still be nats, not 1 / eps."""
    run = Run(tmp_path, torch.float64, "adamw_linear")
    batch = tuple(map(torch.from_numpy, run.targets[0].batch(np.arange(3))))
    before = float(run.model(*batch)[1].detach())
    values, _, _ = run.step(0, lr=1e-5)
    drop = before - float(run.model(*batch)[1].detach())
    assert 0.5 * drop < float(values.sum()) < 2 * drop


def test_second_moment_floor_bounds_rare_rows(tmp_path):
    """A word that no batch held until now has v = 0: without the floor its values would be about 1 / eps times too large."""
    run = Run(tmp_path, torch.float64, "adamw_linear")
    for step in range(3):
        run.step(step)
    wte = run.model.transformer.wte.weight
    run.optimizer.state[wte]["exp_avg_sq"][7] = 0.0
    values, _, truth = run.step(3)
    assert relative(values, truth) < 1e-10
    floor = 1e-2 * float(run.optimizer.state[wte]["exp_avg_sq"].mean())
    assert float(wte.h[0, 7].abs().max()) < 1 / (0.5 * floor) ** 0.5


@pytest.mark.parametrize("rule", ["sgd", "adamw_linear"])
def test_a_target_gradient_serves_for_an_interval(tmp_path, rule):
    """Between refreshes the direction is the old gradient under the present optimizer state; state_dict carries it over."""
    run = Run(tmp_path, torch.float64, rule, target_interval=2)
    rows = [run.step(s) for s in range(4)]
    for s in (0, 2):
        assert relative(rows[s][0], rows[s][2]) < 1e-10
    for s in (1, 3):
        assert relative(rows[s][0], rows[s][2]) > 1e-6  # not the fresh gradient
        assert np.corrcoef(rows[s][0].ravel(), rows[s][2].ravel())[0, 1] > 0.8
    state = run.valuation.state_dict()
    assert torch.equal(state["grads"][0], run.valuation.grads[0])


def test_micro_batched_targets_have_the_gradient_of_the_whole(tmp_path):
    """Slices of a target count by their tokens, padding left out."""
    for name in "ab":
        (tmp_path / name).mkdir()
    whole = Run(tmp_path / "a", torch.float64, "sgd", K=2).step(0)[0]
    sliced = Run(tmp_path / "b", torch.float64, "sgd", K=2, micro_batch=2).step(0)[0]
    assert relative(sliced, whole) < 1e-12


@pytest.mark.parametrize("form", ["running", "matmul"])
def test_bfloat16_values_stay_close(tmp_path, form):
    """Under autocast the operands have 8 bits; the values keep the float64 truth to a few per cent, in both forms."""
    ghost.set_form(form)
    run = Run(tmp_path, torch.float32, autocast=True)
    for step in range(3):
        values, _, truth = run.step(step)
        assert relative(values, truth) < 5e-2
    assert run.model.lm_head.weight.dtype == torch.float32
