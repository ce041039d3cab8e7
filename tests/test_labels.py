"""A step's loss is the mean over its labels: chunks have different numbers of them, or none, and
steps different numbers of chunks. Values are held against autograd, chunk by chunk, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import run as train_run
from test_valuation import RULES, relative, target_losses, text
from test_valuation import Run as FullRun
from torch import nn
from torch.nn import functional as F
from valued import settled

from model import GPT, GPTConfig
from shapley import contract, exact, head, labels, rules
from shapley.ghost import Tape
from shapley.wrap import Examples, Net
from show.exports import count_visits
from show.findings import over_steps
from show.page import Sums
from show.run import open_run
from show.scores import chunk_scores
from system import store
from system.errors import UserError
from system.writer import Writer
from valuation import Settings, Valuation

T, B, VOCAB = 12, 6, 61
STEPS = [(0.0, 1), (0.05, 2), (0.05, 3), (0.0, 6)]  # clipping, micro-batches


@pytest.fixture(autouse=True)
def auto_form():
    yield
    contract.FORM = head.FORM = "auto"


def ragged(n, seed):
    """n chunks X, Y (n, T): full, padded, with gaps, with a single label, and with none."""
    rows = torch.from_numpy(text(n, seed).astype(np.int64))
    X, Y = rows[:, :-1].clone(), rows[:, 1:].clone()
    Y[1, 7:] = -1
    Y[2, [0, 3, 4]] = -1
    Y[3] = -1
    if n > 4:
        Y[4, :-1] = -1
    return X, Y


def build(tie=True):
    torch.manual_seed(1)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, bias=True, tie_weights=tie)
    return GPT(GPTConfig(T, VOCAB, **sizes)).double()


# --- one forward and backward ---------------------------------------------------------


@pytest.mark.parametrize("form", ["chunked", "whole"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_value_is_the_gradient_of_the_chunks_part_of_the_mean_over_all_labels(form, tie):
    head.FORM = form
    model = build(tie)
    X, Y = ragged(B, 0)
    logits, loss = model(X, Y)
    plain = F.cross_entropy(logits.flatten(0, 1), Y.flatten(), ignore_index=-1)
    assert torch.equal(loss, plain)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    x = exact.chunk_gradients(model, X, Y, exact.label_weights(Y))
    for p in model.parameters():
        p.h = torch.randn(2, *p.shape, dtype=p.dtype)
    truth = torch.zeros(B, 2, dtype=torch.float64)
    for i, of_chunk in enumerate(x):
        for g, p in zip(of_chunk, model.parameters()):
            truth[i] += (p.h.detach() * g).flatten(1).sum(1)

    ledger = torch.zeros(B, 2, dtype=torch.float64, requires_grad=True)
    with_values = model(X, Y, ledger)[1]
    with_values.backward()
    assert relative(ledger.grad, truth) < 1e-12
    assert (ledger.grad[3] == 0).all()
    assert abs(float(with_values - plain)) < 1e-12
    for p, gradient in zip(model.parameters(), expected):
        assert relative(p.grad, gradient) < 1e-12
    for i in range(B):
        own = float(model(X[i : i + 1], Y[i : i + 1])[1])  # 0 of the chunk without a label
        assert abs(float(model.chunk_loss[i]) - own) < 1e-12
    assert model.chunk_weight.tolist() == [12, 7, 9, 0, 1, 12]

    tape = Tape()
    model(X, Y, tape)[1].backward()
    assert relative(tape.values(), truth) < 1e-12


@pytest.mark.parametrize("form", ["chunked", "whole"])
def test_a_micro_batch_without_a_label_has_loss_0_and_gradients_of_0(form):
    head.FORM = form
    model = build()
    X, Y = ragged(B, 0)
    for p in model.parameters():
        p.h = torch.randn(1, *p.shape, dtype=p.dtype)
    for ledger in (None, torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)):
        loss = model(X[3:4], Y[3:4], ledger)[1]
        loss.backward()
        assert float(loss) == 0
        for p in model.parameters():
            assert (p.grad == 0).all()
    assert float(ledger.grad) == 0


@pytest.mark.parametrize("form", ["chunked", "whole"])
def test_a_label_below_minus_1_is_refused(form):
    """-100 is what others mean by no label."""
    head.FORM = form
    model = build()
    X, Y = ragged(B, 0)
    for p in model.parameters():
        p.h = torch.zeros(1, *p.shape, dtype=p.dtype)
    with pytest.raises(IndexError):
        model(X, Y.masked_fill(Y < 0, -100), torch.zeros(B, 1, requires_grad=True).double())


def test_labels_are_counted_in_arrays_and_tensors():
    Y = np.array([[1, -1, 0], [-1, -1, -1]])
    assert labels.count(Y).tolist() == [2, 0]
    assert labels.count(torch.from_numpy(Y)).tolist() == [2, 0]
    numbers = np.array([[1.5, np.nan, -1.0], [np.nan, np.nan, np.nan]])
    assert labels.count(numbers).tolist() == [2, 0]
    assert labels.count(torch.from_numpy(numbers)).tolist() == [2, 0]
    assert labels.count(np.array([3, -1])).tolist() == [1, 0]
    assert labels.shares(np.array([3, 0, 1])).tolist() == [0.75, 0, 0.25]
    assert labels.shares(np.array([0, 0])).tolist() == [0, 0]


# --- a valuation -------------------------------------------------------------------


class Run(FullRun):
    """Of steps whose chunks have unequal numbers of labels."""

    def __init__(self, tmp_path, rule, K=1, batch=B, **options):
        super().__init__(tmp_path, torch.float64, rule, K)
        audits = options.get("audit_interval", 0) > 0
        self.writer = Writer(tmp_path, 100, K, audits=audits)
        options = {"target_batch": 3, "target_sampling": "fixed", "tolerance": 0.0, **options}
        settings = Settings(rule=rule, batch=batch, **options)
        what = (self.model, self.optimizer, self.loss, self.targets, settings, self.writer)
        self.valuation = Valuation(*what)

    def step(self, step, clip=0.0, micro_steps=1, n=B, lr=1e-2):
        """-> the step's values (n, K), and what rules.py says they are."""
        X, Y = ragged(n, 100 + step)
        x = exact.chunk_gradients(self.model, X, Y, exact.label_weights(Y))
        known = rules.known_rows(self.model, X, Y)
        what = (self.model, self.optimizer, x, target_losses(self), self.rule, lr, clip)
        squares = None
        if self.rule != "adamw":
            squares = rules.squares_by_use(self.model, X, Y, exact.label_weights(Y))
        truth = rules.rule_values(*what, known=known, squares=squares)
        self.players = x
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.valuation.begin_step(step, lr, (X.numpy(), Y.numpy()))
        for ids in np.split(np.arange(n), micro_steps):
            share = float((Y[ids] >= 0).sum() / (Y >= 0).sum().double())
            ledger = self.valuation.new_ledger(ids, X[ids], Y[ids], share)
            (self.loss(X[ids], Y[ids], ledger) * share).backward()
        for p, of_chunk in zip(self.model.parameters(), zip(*x)):
            assert relative(p.grad, sum(of_chunk)) < 1e-10  # it is the mean over all labels
        kappa = 1.0
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            kappa = (clip / (norm + 1e-6)).clamp(max=1.0)
        self.valuation.before_update(kappa)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.valuation.end_step()
        return settled(self.valuation)[0], truth


@pytest.mark.parametrize("rule", RULES)
def test_values_equal_the_definition_with_any_labels_and_micro_batches(tmp_path, rule):
    run = Run(tmp_path, rule, K=2)
    for step, (clip, micro_steps) in enumerate(STEPS):
        values, truth = run.step(step, clip, micro_steps)
        assert relative(values, truth) < 1e-9, (clip, micro_steps)
        assert (values[3] == 0).all()
        assert truth[[0, 1, 2, 4, 5]].abs().min() > 0


@pytest.mark.parametrize("rule", ["adamw", "adamw2"])
def test_a_step_of_fewer_chunks_is_a_step_of_its_own_size(tmp_path, rule):
    """As the last one of an epoch: its values are the definition's, and the rows left are empty."""
    run = Run(tmp_path, rule, batch=8)
    for step, (n, micro_steps) in enumerate([(8, 2), (6, 1), (6, 3), (8, 1)]):
        values, truth = run.step(step, 0.05, micro_steps, n)
        assert len(values) == n
        assert relative(values, truth) < 1e-9, n
    run.valuation.commit()
    visits = store.read(tmp_path).reshape(4, 8)
    assert visits["chunk"][1].tolist() == [0, 1, 2, 3, 4, 5, store.NO_CHUNK, store.NO_CHUNK]
    assert visits["step"].tolist() == [[step] * 8 for step in range(4)]
    empty = visits[1:3, 6:]
    assert not empty["value"].any()
    assert not empty["loss"].any()
    total = np.zeros((8, 1))
    np.add.at(total, visits["chunk"][visits["chunk"] >= 0], visits["value"][visits["chunk"] >= 0])
    found = np.load(tmp_path / "values.npy")
    np.testing.assert_allclose(found[:8], total, rtol=1e-6)
    assert np.isnan(found[8:]).all()  # the empty rows are no chunk's, the last one's either
    again = Writer(tmp_path, 100, 1, step=4, counted=run.writer.counted())
    assert np.array_equal(again.total, run.writer.total)  # as a run that is resumed reads them
    assert np.array_equal(again.used, run.writer.used)


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_the_audit_plays_the_game_of_the_labels(tmp_path, micro_steps):
    """Its truth is that of the gradients of exact.py, and adamw2's values add up to the utility."""
    run = Run(tmp_path, "adamw2", batch=8, audit_interval=4, grad_clip=0.5)
    twin = Run(tmp_path / "twin", "adamw2", batch=8)
    for step in range(3):
        run.step(step, lr=1e-3)
        twin.step(step, lr=1e-3)
    values, _ = run.step(3, 0.5, micro_steps, lr=1e-3)
    found = run.valuation.pending[-1].truth
    game = exact.Step(twin.model, twin.optimizer, run.players, target_losses(twin), 0.5)
    truth = exact.shapley(game, B)
    assert relative(torch.from_numpy(found.values), torch.from_numpy(truth)) < 1e-9
    assert abs(found.values[3, 0]) < 1e-15
    assert np.corrcoef(values[:, 0], truth[:, 0])[0, 1] > 0.99
    audit = run.valuation.flush().audit[0]
    assert audit["pearson"] > 0.99


def test_the_books_close_and_the_loss_in_them_is_the_mean_over_all_labels(tmp_path):
    run = Run(tmp_path, "adamw2")
    for step, (clip, micro_steps) in enumerate(STEPS):
        X, Y = ragged(B, 100 + step)
        logits, _ = run.model(X, Y)
        loss = float(F.cross_entropy(logits.flatten(0, 1), Y.flatten(), ignore_index=-1))
        run.step(step, clip, micro_steps, lr=1e-3)
        book = run.valuation.flush().books[0]
        assert abs(book["loss"] - loss) < 1e-6
        assert np.abs(book["residual"]).max() < 0.05 * np.abs(book["before"] - book["after"]).max()


def test_grad_norm_is_of_the_chunks_own_loss(tmp_path):
    """Not of its part of the step's, which depends on the others' labels."""
    run = Run(tmp_path, "adamw")
    X, Y = ragged(B, 100)
    known = rules.known_rows(run.model, X, Y)
    norms = []
    for i in range(B):
        if not (Y[i] >= 0).any():
            norms.append(np.nan)
            continue
        square = 0.0
        gradient = exact.gradient(run.model, exact.batch_loss(X[i : i + 1], Y[i : i + 1]))
        for g, rows in zip(gradient, known):
            square += 0.0 if rows is None else float(g[rows].square().sum())
        norms.append(square**0.5)
    run.step(0, micro_steps=3)
    found = run.valuation.flush().visits["grad_norm"]
    np.testing.assert_allclose(found, norms, rtol=1e-5)


@pytest.mark.parametrize("score", ["value", "share", "loss"])
def test_readers_leave_out_the_rows_that_a_step_leaves_empty(python_data, tmp_path, score):
    """A run that had a step of 3 chunks less is scored as the one whose rows those are."""
    train_run(python_data, tmp_path, "--rule=sgd", "--optimizer=sgd", "--max_iters=3")
    opened = open_run(tmp_path)
    visits = np.array(opened.visits)  # of three steps of 4
    visits[5:8]["chunk"] = store.NO_CHUNK
    visits[5:8]["value"] = visits[5:8]["loss"] = 0
    fewer = replace(opened, visits=visits)
    counts, _, losses = count_visits(fewer)
    assert counts.sum() == 9
    assert abs(losses.sum() - visits["loss"].sum()) < 1e-4
    found = chunk_scores(fewer, 0, score)
    total = np.zeros(len(opened.values))
    for step in (visits[:4], visits[4:5], visits[8:]):
        values = step["value"][:, 0].astype(float)
        gains = {"value": values, "loss": -step["loss"].astype(float)}
        gains["share"] = values / np.abs(values).mean()
        np.add.at(total, step["chunk"], gains[score])
    np.testing.assert_allclose(found.total, total, atol=1e-12)
    assert found.visits.sum() == 9
    sizes = Sums(
        fewer, opened.data.train.domain, 3, over_steps([visits], 4, np.zeros(10**6, int), 1)[0]
    )
    sizes.add(visits)
    assert sizes.count.sum() == 9
    visits[6]["value"] = 1
    with pytest.raises(UserError, match="has values of no chunk"):
        list(fewer.blocks())


# --- what is refused, or follows from what is given -----------------------------------


def small_net():
    torch.manual_seed(0)
    net = Net(nn.Linear(3, 2).double(), F.cross_entropy)
    return net, torch.optim.AdamW(net.parameters(), 1e-2)


def valued_net(rule="adamw2", batch=4):
    net, optimizer = small_net()
    X = np.random.default_rng(0).normal(size=(8, 3))
    Y = (X[:, 0] > 0).astype(int)
    settings = Settings(rule=rule, batch=batch, book_interval=0)
    targets = [Examples("t", X, Y)]
    valuation = Valuation(net, optimizer, lambda *b: net(*b)[1], targets, settings)
    return net, optimizer, valuation, torch.from_numpy(X), torch.from_numpy(Y)


def net_step(net, optimizer, valuation, batches, shares):
    valuation.begin_step(0, 1e-2)
    for (ids, X, Y), share in zip(batches, shares):
        ledger = valuation.new_ledger(ids, X, Y, share)
        factor = 1 / len(batches) if share is None else share
        (net(X, Y, ledger)[1] * factor).backward()
    valuation.before_update()
    optimizer.step()
    optimizer.zero_grad()
    valuation.end_step()
    return settled(valuation)[0]


def test_without_a_share_a_rest_counts_as_the_step_it_is():
    """A loop of one micro-batch a step backs its mean loss up as it is, also of the last 3."""
    net, optimizer, valuation, X, Y = valued_net()
    x = exact.chunk_gradients(net, X[:3], Y[:3])
    losses = [exact.batch_loss(*valuation.targets.batch(0, 0))]
    truth = rules.rule_values(net, optimizer, x, losses, "adamw2", 1e-2, 0.0)
    values = net_step(net, optimizer, valuation, [(np.arange(3), X[:3], Y[:3])], [None])
    assert relative(values, truth) < 1e-9


def test_unequal_micro_batches_have_the_shares_that_are_declared():
    """3 and 1 examples, each mean loss by 1/2: so a loop that divides by its micro-batches."""
    net, optimizer, valuation, X, Y = valued_net()
    x = exact.chunk_gradients(net, X[:4], Y[:4], [1 / 6, 1 / 6, 1 / 6, 1 / 2])
    losses = [exact.batch_loss(*valuation.targets.batch(0, 0))]
    truth = rules.rule_values(net, optimizer, x, losses, "adamw2", 1e-2, 0.0)
    parts = [(np.arange(3), X[:3], Y[:3]), (np.arange(3, 4), X[3:4], Y[3:4])]
    assert relative(net_step(net, optimizer, valuation, parts, [0.5, 0.5]), truth) < 1e-9


def test_an_example_without_a_label_counts_nothing_in_a_net():
    net, optimizer, valuation, X, Y = valued_net()
    Y[1] = -1
    x = exact.chunk_gradients(net, X[:4], Y[:4], [1 / 3, 0, 1 / 3, 1 / 3])
    losses = [exact.batch_loss(*valuation.targets.batch(0, 0))]
    truth = rules.rule_values(net, optimizer, x, losses, "adamw2", 1e-2, 0.0)
    values = net_step(net, optimizer, valuation, [(np.arange(4), X[:4], Y[:4])], [None])
    assert relative(values, truth) < 1e-9
    assert (values[1] == 0).all()


@pytest.mark.parametrize("rule", ["sgd", "adamw2"])
def test_a_step_in_which_no_example_has_a_label_is_refused(rule):
    net, optimizer, valuation, X, Y = valued_net(rule)
    Y = torch.full_like(Y, -1)
    parts = [(np.arange(2), X[:2], Y[:2]), (np.arange(2, 4), X[2:4], Y[2:4])]
    values = net_step(net, optimizer, valuation, parts, [None, None])
    assert (values == 0).all()
    with pytest.raises(UserError, match="step 0: no example has a label"):
        valuation.flush()


def test_a_target_without_a_label_in_a_step_is_refused():
    _, _, valuation, _, _ = valued_net()
    valuation.targets.targets[0].Y[:] = -1
    with pytest.raises(UserError, match="target 't': none of its examples in step 0 has a label"):
        valuation.targets.losses(0)


@pytest.mark.parametrize("share", [-0.5, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(share):
    _, _, valuation, X, Y = valued_net()
    valuation.begin_step(0, 1e-2)
    with pytest.raises(UserError, match="of the step's loss: give what"):
        valuation.new_ledger(np.arange(4), X[:4], Y[:4], share)


def test_shares_are_given_for_all_micro_batches_or_for_none():
    net, optimizer, valuation, X, Y = valued_net()
    parts = [(np.arange(2), X[:2], Y[:2]), (np.arange(2, 4), X[2:4], Y[2:4])]
    with pytest.raises(UserError, match="give it for all of them, or for none"):
        net_step(net, optimizer, valuation, parts, [0.5, None])
