"""The values are what shapley/rules.py says they are: in float64 to 1e-10, in float32 to 1e-4,
for all parameters at once."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from valued import settled

from data import Target
from model import GPT, GPTConfig
from shapley import contract, directions, exact, head, rules
from system.writer import Writer
from valuation import NoValuation, Settings, Valuation

T, B, VOCAB = 12, 4, 61
RULES = list(directions.RULES)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def text(n, seed):
    """Chunks as real text has them: a few words again and again, most words hardly ever, one in
    every chunk once."""
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

    def __init__(
        self,
        tmp_path,
        dtype,
        rule="adamw_linear",
        K=1,
        tie=True,
        bias=False,
        optimizer="adamw",
        autocast=False,
        **options,
    ):
        torch.manual_seed(1)
        self.model = GPT(
            GPTConfig(T, VOCAB, n_layer=2, n_head=2, n_embd=16, bias=bias, tie_weights=tie)
        ).to(dtype)
        adamw = self.model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
        self.optimizer = (
            adamw if optimizer == "adamw" else torch.optim.SGD(self.model.parameters(), lr=1e-2)
        )
        self.targets = targets(K)
        options = {"target_batch": 3, "target_sampling": "fixed", "tolerance": 0.0, **options}
        self.autocast = autocast
        self.rule = rule
        if rule == "off":
            self.valuation = NoValuation()
            return
        is_smoothed = options.get("target_smoothing", 0) > 0
        writer = Writer(tmp_path, 100, K, smoothed=is_smoothed)
        settings = Settings(rule=rule, batch=B, **options)
        self.valuation = Valuation(
            self.model, self.optimizer, self.loss, self.targets, settings, writer
        )

    def loss(self, X, Y, ledger=None):
        with torch.amp.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.model(torch.as_tensor(X), torch.as_tensor(Y), ledger)[1]

    def step(self, step, lr=1e-2, clip=0.0, micro_steps=1):
        """-> the step's values (B, K) and losses (B,), and what rules.py says the values are."""
        rows = torch.from_numpy(text(B, 100 + step).astype(np.int64))
        X, Y = rows[:, :-1], rows[:, 1:]
        x, known = exact.chunk_gradients(self.model, X, Y), rules.known_rows(self.model, X, Y)
        truth = rules.rule_values(
            self.model,
            self.optimizer,
            x,
            target_losses(self),
            self.rule,
            lr,
            clip,
            known=known,
            squares=None if self.rule == "adamw" else rules.squares_by_use(self.model, X, Y),
        )
        self.train(step, rows, lr, clip, micro_steps)
        return *settled(self.valuation), truth

    def train(self, step, rows, lr, clip, micro_steps):
        """A valued step of the optimizer. rows: its chunks (B, T + 1)."""
        X, Y = rows[:, :-1], rows[:, 1:]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.valuation.begin_step(step, lr, rows.numpy())
        for ids in np.split(np.arange(B), micro_steps):
            ledger = self.valuation.new_ledger(ids, X[ids], Y[ids])
            (self.loss(X[ids], Y[ids], ledger) / micro_steps).backward()
        kappa = 1.0
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            kappa = (clip / (norm + 1e-6)).clamp(max=1.0)
        self.valuation.before_update(kappa)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.valuation.end_step()


# of the contraction, and of the head with its cross-entropy
FORMS = ["running chunked", "running whole", "matmul whole"]


CLIP_AND_MICRO_STEPS = [(0.0, 1), (0.05, 2), (0.05, 4), (0.0, 4), (0.05, 1)]  # step by step


@pytest.fixture(autouse=True)
def auto_form():
    yield
    contract.FORM = head.FORM = "auto"


# dtype, tolerance, targets, and the kinds of model: tied or not, with bias or not
PRECISE = torch.float64, 1e-10, 3, [*itertools.product([True, False], [True, False])]
OTHER_FORM = torch.float64, 1e-10, 3, [(True, False), (False, True)]
ONE_TARGET = torch.float64, 1e-10, 1, [(True, False)]
SINGLE_PRECISION = torch.float32, 1e-4, 3, [(True, False), (False, True)]
CASES = [  # all of the algebra where it shows to 1e-10; the rest where it may differ
    *itertools.product(RULES, FORMS[:1], [PRECISE]),
    *itertools.product(RULES, FORMS[1:], [OTHER_FORM]),
    *itertools.product(RULES, FORMS[:1], [ONE_TARGET]),
    *itertools.product(["adamw", "adamw2"], FORMS, [SINGLE_PRECISION]),
]


@pytest.mark.parametrize("rule, form, case", CASES)
def test_values_equal_the_definition(tmp_path, rule, form, case):
    """First step and later, clip off and on, tied and untied, bias on and off, 1, 2 and 4
    micro-steps."""
    contract.FORM, head.FORM = form.split()
    dtype, tolerance, K, kinds = case
    for i, (tie, bias) in enumerate(kinds):
        run_dir = tmp_path / str(i)
        run = Run(run_dir, dtype, rule, K, tie, bias)
        for step, (clip, micro_steps) in enumerate(CLIP_AND_MICRO_STEPS):
            for group in run.optimizer.param_groups if "adamw" in rule else []:
                # the first step is g / (|g| + eps): in float32 an element that is zero but for
                # rounding has the sign of the noise
                group["eps"] = 1e-3 if step == 0 and dtype == torch.float32 else 1e-8
            values, _, truth = run.step(step, clip=clip, micro_steps=micro_steps)
            assert relative(values, truth) < tolerance, (tie, bias, step)
            assert truth.abs().min() > 0


@pytest.mark.parametrize("rule", RULES)
def test_values_are_the_same_with_any_number_of_micro_batches(tmp_path, rule):
    runs = {}
    for micro_steps in (1, 2, 4):
        run_dir = tmp_path / str(micro_steps)
        run = Run(run_dir, torch.float64, rule)
        runs[micro_steps] = torch.cat(
            [run.step(s, clip=0.05, micro_steps=micro_steps)[0] for s in range(3)]
        )
    assert relative(runs[2], runs[1]) < 1e-10
    assert relative(runs[4], runs[1]) < 1e-10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tie, bias", [*itertools.product([True, False], [True, False])])
def test_a_ledger_changes_no_weight_gradient_and_no_loss(form, tie, bias):
    contract.FORM, head.FORM = form.split()
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(T, VOCAB, n_layer=2, n_head=2, n_embd=16, bias=bias, tie_weights=tie)
    ).double()
    for p in model.parameters():
        p.h = torch.randn(2, *p.shape, dtype=p.dtype)
    rows = torch.from_numpy(text(B, 0).astype(np.int64))
    X, Y = rows[:, :-1], rows[:, 1:]
    logits, loss = model(X, Y)
    plain = torch.autograd.grad(loss, list(model.parameters()))
    ghost_logits, ghost_loss = model(
        X, Y, torch.zeros(B, 2, dtype=torch.float64, requires_grad=True)
    )
    valued = torch.autograd.grad(ghost_loss, list(model.parameters()))
    assert ghost_logits is None if head.FORM == "chunked" else torch.equal(logits, ghost_logits)
    assert abs(loss.item() - ghost_loss.item()) < 1e-14
    assert max(relative(v, p) for v, p in zip(valued, plain)) < 1e-12
    each = torch.stack([model(X[i : i + 1], Y[i : i + 1])[1] for i in range(B)])
    assert relative(model.chunk_loss, each.detach()) < 1e-14


def test_the_chunked_head_refuses_a_label_outside_the_vocabulary():
    x, w = torch.randn(2, 3, 4), torch.randn(5, 4, requires_grad=True)
    w.h = torch.randn(1, 5, 4)
    with pytest.raises(IndexError, match="out of bounds"):
        head.loss(x, w, torch.tensor([[0, 1, 2], [3, 5, 4]]), torch.zeros(2, 1, requires_grad=True))


def test_the_running_form_gives_the_same_in_any_number_of_tiles(monkeypatch):
    """The running form works through a weight in tiles; their number does not show in the
    result."""
    gy = torch.randn(3, 5, 37).double()
    x = torch.randn(3, 5, 11).double()
    h = torch.randn(2, 37, 11).double()
    monkeypatch.setattr(contract, "TILE", 50)
    gw, values = contract.weight_grad(gy, x, h, "running")
    truth = torch.einsum("bto,bti->boi", gy, x)
    assert relative(gw, truth.sum(0)) < 1e-14
    assert relative(values, torch.einsum("boi,koi->bk", truth, h)) < 1e-14
    tokens = torch.stack([contract.token_values(gy, x, h_k) for h_k in h], 2)
    assert tokens.shape == (3, 5, 2)
    assert relative(tokens.sum(1), values) < 1e-12


def test_sgd_values_sum_to_the_first_order_drop(tmp_path):
    """Under plain SGD the values of a small step add up to what the target's loss fell by: the
    sign is the documented one."""
    run = Run(tmp_path, torch.float64, "sgd", optimizer="sgd")
    batch = tuple(map(torch.from_numpy, run.targets[0].batch(np.arange(3))))
    before = float(run.model(*batch)[1].detach())
    values, _, _ = run.step(0, lr=1e-5)
    drop = before - float(run.model(*batch)[1].detach())
    assert drop > 0
    assert float(values.sum()) == pytest.approx(drop, rel=1e-3)


def test_adamw_linear_values_of_the_first_step_are_as_large_as_its_drop(tmp_path):
    """At t = 1 there is no second moment; the values must still be nats, not 1 / eps."""
    run = Run(tmp_path, torch.float64, "adamw_linear")
    batch = tuple(map(torch.from_numpy, run.targets[0].batch(np.arange(3))))
    before = float(run.model(*batch)[1].detach())
    values, _, _ = run.step(0, lr=1e-5)
    drop = before - float(run.model(*batch)[1].detach())
    assert 0.5 * drop < float(values.sum()) < 2 * drop


def test_the_floor_under_v_bounds_the_directions_of_rare_rows(tmp_path):
    """A word that no batch held until now has v = 0: without the floor its values would be about
    1 / eps times too large."""
    run = Run(tmp_path, torch.float64, "adamw_linear")
    for step in range(3):
        run.step(step)
    wte = run.model.transformer.wte.weight
    run.optimizer.state[wte]["exp_avg_sq"][7] = 0.0
    values, _, truth = run.step(3)
    assert relative(values, truth) < 1e-10
    floor = 1e-2 * float(run.optimizer.state[wte]["exp_avg_sq"].mean())
    assert float(wte.h[0, 7].abs().max()) < 1 / (0.5 * floor) ** 0.5


def test_a_target_in_slices_has_the_gradient_of_the_whole_target(tmp_path):
    """Slices of a target count by their tokens, padding left out."""
    whole = Run(tmp_path / "a", torch.float64, "sgd", K=2).step(0)[0]
    sliced = Run(tmp_path / "b", torch.float64, "sgd", K=2, micro_batch=2).step(0)[0]
    assert relative(sliced, whole) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_values_under_autocast_stay_close_to_float64(tmp_path, form):
    """Under autocast the operands have 8 bits; the values keep the float64 truth to a few per
    cent, in both forms."""
    contract.FORM, head.FORM = form.split()
    run = Run(tmp_path, torch.float32, autocast=True)
    for step in range(3):
        values, _, truth = run.step(step)
        assert relative(values, truth) < 5e-2
    assert run.model.lm_head.weight.dtype == torch.float32


# --- two passes, the clip path, the books -------------------------------------


def tokens(run, step):
    rows = torch.from_numpy(text(B, 100 + step).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def target_losses(run):
    return [exact.batch_loss(*map(torch.from_numpy, t.batch(np.arange(3)))) for t in run.targets]


def test_sgd2_equals_the_second_order_value_with_an_explicit_hessian(tmp_path):
    """lr <x_i, g_k> - lr^2 / 2 <x_i, H_k g> (Wang et al., their second order), to O(lr^3):
    halving lr divides the difference by 8."""
    errors = []
    for i, lr in enumerate((0.2, 0.1, 0.05)):
        run_dir = tmp_path / str(i)
        run = Run(run_dir, torch.float64, "sgd2", optimizer="sgd")
        X, Y = tokens(run, 0)
        x = exact.chunk_gradients(run.model, X, Y)
        (loss,) = target_losses(run)
        g = [sum(parts) for parts in zip(*x)]
        g_k = exact.gradient(run.model, loss)
        hessian_g = rules.hvp(run.model, loss, g)
        truth = []
        for x_i in x:
            truth.append(lr * exact.dot(x_i, g_k) - lr**2 / 2 * exact.dot(x_i, hessian_g))
        truth = torch.stack(truth)
        values, _, _ = run.step(0, lr=lr)
        errors.append(float((values[:, 0] - truth).norm()))
    assert 6.5 < errors[0] / errors[1] < 9.5
    assert 7 < errors[1] / errors[2] < 9


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("steps", [0, 5])
def test_adamw2_values_sum_to_the_drop_along_the_gradient_in_the_middle(tmp_path, clip, steps):
    """sum_i value_i = lr <g_k(w_mid), D(kappa g) - D(0)>, from the weights before and after the
    real step. First step: m = v = 0."""
    lr = 1e-2
    run = Run(tmp_path, torch.float64, "adamw2")
    for step in range(steps):
        run.step(step)
    params = list(run.model.parameters())
    (loss,) = target_losses(run)
    # where nobody's step lands: the optimizer on a zero gradient
    nobody = exact.Step(
        run.model,
        run.optimizer,
        exact.chunk_gradients(run.model, *tokens(run, steps)),
        [loss],
        clip,
    )
    nobody.land(np.zeros(B, bool))
    empty = [p.detach().clone() for p in nobody.params]
    values, _, _ = run.step(steps, lr=lr, clip=clip)
    moved = [p.detach() - e for p, e in zip(params, empty)]
    middle = rules.displaced(
        nobody.twin, [e + m / 2 - p.detach() for e, m, p in zip(empty, moved, nobody.params)]
    )
    drop = -exact.dot(exact.gradient(middle, loss), moved)
    assert float(values.sum()) == pytest.approx(float(drop), rel=1e-6)


@pytest.mark.parametrize("rule", ["adamw", "adamw2"])
@pytest.mark.parametrize("clip", [0.0, 1e-4])
def test_first_steps_with_unread_rows_are_finite_and_equal_the_definition(tmp_path, rule, clip):
    """v = 0, kappa = 1 and far below 1, an untied embedding with rows that no chunk read (g =
    0), biases without decay."""
    run = Run(tmp_path, torch.float64, rule, K=3, tie=False, bias=True)
    values, _, truth = run.step(0, clip=clip)
    assert torch.isfinite(values).all()
    assert relative(values, truth) < 1e-10
    assert truth.abs().min() > 0
    wte = run.model.transformer.wte.weight
    unread = torch.ones(VOCAB, dtype=torch.bool)
    unread[tokens(run, 0)[0]] = False
    assert unread.any()
    assert torch.isfinite(wte.h).all()
    state = run.optimizer.state[wte]
    # and again with m = v = 0 in an optimizer that has moved
    assert (state["exp_avg_sq"][unread] == 0).all()
    values, _, truth = run.step(1, clip=clip)
    assert torch.isfinite(values).all()
    assert relative(values, truth) < 1e-10
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.0, 0.1}
    assert all(group["params"] for group in run.optimizer.param_groups)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_adamw2_is_close_to_exact_shapley_and_sgd_is_not(tmp_path, clip):
    """The game of the real step, by all 2^4 subsets, after a warm-up of 20 steps; the clip acts
    on all of the steps judged."""
    agreements, kappas = {}, []
    for rule in ("sgd", "adamw", "adamw2"):
        run_dir = tmp_path / rule
        run = Run(run_dir, torch.float64, rule)
        agreements[rule] = []
        for step in range(26):
            X, Y = tokens(run, step)
            if step >= 20:
                x = exact.chunk_gradients(run.model, X, Y)
                kappas.append(rules.clip_coefficient([sum(parts) for parts in zip(*x)], clip))
                for group in run.optimizer.param_groups:
                    group["lr"] = 1e-3
                game = exact.Step(run.model, run.optimizer, x, target_losses(run), clip)
                truth = exact.shapley(game, B)[:, 0]
            values, _, _ = run.step(step, lr=1e-3, clip=clip)
            if step >= 20:
                agreements[rule].append(exact.agreement(values[:, 0].numpy(), truth))
    l2 = {}
    for rule, figures in agreements.items():
        l2[rule] = np.median([figure["rel_l2"] for figure in figures])
    assert np.mean([a["pearson"] for a in agreements["adamw2"]]) > 0.999
    assert l2["adamw2"] < 0.1
    assert l2["adamw2"] < l2["adamw"] < l2["sgd"]
    assert (max(kappas) < 0.8) == bool(clip)


def test_the_residual_of_the_books_is_of_third_order(tmp_path):
    """before - after = data + momentum + decay up to third order, and momentum and decay are
    what the real optimizer does alone."""
    residuals = []
    for i, lr in enumerate((4e-3, 2e-3)):
        run_dir = tmp_path / str(i)
        run = Run(run_dir, torch.float64, "adamw2", K=3)
        for step in range(4):
            run.step(step, lr=1e-3)
        run.step(4, lr=lr)
        book = run.valuation.pending[-1].book
        values, _ = settled(run.valuation)
        drop = book["before"] - book["after"]
        residual = (drop - values.sum(0) - book["momentum"] - book["decay"]).abs().max()
        assert drop.abs().min() > 20 * residual
        residuals.append(residual)
    assert residuals[0] / residuals[1] > 5


class WaitsForNothing(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU, on any device: reading a number, or a shape
    that depends on numbers."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().split("::")[1].split(".")[0] not in self.WAITING, func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", RULES)
def test_a_step_does_not_wait_for_the_device(tmp_path, rule):
    """Nor does a measured step: values, losses and books are read in flush."""
    run = Run(tmp_path, torch.float32, rule, K=2)
    for step in range(3):
        X, Y = tokens(run, step)
        with WaitsForNothing():
            run.valuation.begin_step(step, 1e-2, torch.cat([X, Y[:, -1:]], 1).numpy())
            for ids in np.split(np.arange(B), 2 if step == 1 else 1):
                ledger = run.valuation.new_ledger(ids, X[ids], Y[ids])
                (run.loss(X[ids], Y[ids], ledger) * len(ids) / B).backward()
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.05)
            run.valuation.before_update((0.05 / (norm + 1e-6)).clamp(max=1.0))
        run.optimizer.step()
        run.optimizer.zero_grad()
        with WaitsForNothing():
            run.valuation.end_step()
        with pytest.raises(AssertionError, match="_local_scalar_dense"), WaitsForNothing():
            run.valuation.flush()


def test_two_pass_rules_train_the_same_weights_as_no_valuation(tmp_path):
    """To the bit, for with a tape the ops are PyTorch's own. (The chunked head adds up in another
    order: test_a_ledger_changes_no_weight_gradient_and_no_loss bounds that.)"""
    head.FORM = "whole"
    weights = []
    for rule in ("off", "adamw2", "sgd2"):
        run_dir = tmp_path / rule
        run = Run(run_dir, torch.float32, rule)
        for step in range(3):
            X, Y = tokens(run, step)
            run.valuation.begin_step(step, 1e-2)
            run.loss(X, Y, run.valuation.new_ledger(np.arange(B), X, Y)).backward()
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.05)
            run.valuation.before_update((0.05 / (norm + 1e-6)).clamp(max=1.0))
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.valuation.end_step()
        weights.append([p.detach().clone() for p in run.model.parameters()])
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other))
