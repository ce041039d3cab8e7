"""shapley/wrap.py: the values of models that know nothing of the ledger are those of the rules'
definitions, in float64 to 1e-10."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from valued import settled

from experiments import any_model
from shapley import contract, exact, ghost, rules
from shapley.directions import RULES
from shapley.wrap import Examples, Net
from system.writer import Writer
from valuation import Settings, Valuation

B, CLASSES = 5, 4


class Reader(nn.Module):
    """Embeddings of words and places, a LayerNorm, a layer used twice, and a head tied to the
    words."""

    def __init__(self, bias=True):
        super().__init__()
        self.word = nn.Embedding(9, 6)
        self.place = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.twice = nn.Linear(6, 6, bias=bias)

    def forward(self, X):
        x = self.norm(self.word(X) + self.place(torch.arange(X.shape[1]).expand(X.shape)))
        x = x + self.twice(torch.tanh(self.twice(x)))
        return F.linear(x.mean(1), self.word.weight)[:, :CLASSES]


class ReaderOfSingleUses(nn.Module):
    """A Reader whose weights are used once, copies of its own: two-pass rules know |x_i|^2 of each
    use by itself."""

    def __init__(self, reader):
        super().__init__()
        self.reader = copy.deepcopy(reader)
        self.first = copy.deepcopy(reader.twice)
        self.head = nn.Parameter(reader.word.weight.detach().clone())

    def forward(self, X):
        words = self.reader.word(X)
        x = self.reader.norm(words + self.reader.place(torch.arange(X.shape[1]).expand(X.shape)))
        x = x + self.reader.twice(torch.tanh(self.first(x)))
        return F.linear(x.mean(1), self.head)[:, :CLASSES]


def mlp(bias=True):
    return nn.Sequential(
        nn.Linear(6, 8, bias=bias),
        nn.LayerNorm(8, bias=bias),
        nn.GELU(),
        nn.Linear(8, CLASSES, bias=bias),
    )


def cnn(bias=True):
    conv = functools.partial(nn.Conv2d, bias=bias)
    last = conv(5, 3, 3, padding="same", padding_mode="reflect", bias=bias)
    layers = [
        conv(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
        nn.ReLU(),
        conv(4, 5, 2, padding="same", dilation=2),
        nn.Tanh(),
        last,
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 4 * 6, CLASSES, bias=bias))


def images(n, seed):
    return torch.randn(n, 2, 7, 7, generator=torch.Generator().manual_seed(seed)).double()


def mlp_of_tokens(bias=True):
    return nn.Sequential(mlp(bias), nn.Flatten(), nn.Linear(12, CLASSES))


def vectors(n, seed):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)).double()


def three_vectors(n, seed):
    return images(n, seed)[:, 0, :3, :6]


def words(n, seed):
    return torch.randint(9, (n, 7), generator=torch.Generator().manual_seed(seed))


MODELS = {  # name: its class, and what draws its inputs
    "mlp": (mlp, vectors),
    "mlp of tokens": (mlp_of_tokens, three_vectors),
    "reader": (Reader, words),
    "cnn": (cnn, images),
}


def labels(n, seed, loss):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, CLASSES, generator=generator).double()
        if loss is F.mse_loss
        else torch.randint(CLASSES, (n,), generator=generator)
    )


def build(name, loss=F.cross_entropy, bias=True):
    torch.manual_seed(0)
    return Net(MODELS[name][0](bias), loss).double()


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.fixture(autouse=True)
def auto_form():
    yield
    contract.FORM = "auto"


# --- one backward ---------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "loss", [F.cross_entropy, functools.partial(F.cross_entropy, label_smoothing=0.1), F.mse_loss]
)
@pytest.mark.parametrize(
    "K, bias, form", [(1, True, "running"), (3, False, "matmul"), (3, True, "tape")]
)
def test_a_value_is_the_gradient_of_its_example_along_the_direction(name, loss, K, bias, form):
    net, X, Y = build(name, loss, bias), MODELS[name][1](B, 1), labels(B, 2, loss)
    plain, mean = net(X, Y)
    assert torch.equal(plain, net.model(X))
    assert net.chunk_loss is None
    mean.backward()
    grads = [p.grad for p in net.parameters()]
    x = exact.chunk_gradients(net, X, Y)
    for p in net.parameters():
        p.grad = None
        p.h = torch.randn(K, *p.shape).double()
    if form == "tape":
        ledger = ghost.Tape()
    else:
        contract.FORM = form
        ledger = torch.zeros(B, K).double().requires_grad_()
    outputs, valued = net(X, Y, ledger)
    valued.backward()
    values = ledger.values() if form == "tape" else ledger.grad
    truth = torch.stack(
        [
            torch.stack([exact.dot(x_i, [p.h[k] for p in net.parameters()]) for k in range(K)])
            for x_i in x
        ]
    )
    assert relative(values, truth) < 1e-10
    assert relative(outputs, plain) < 1e-12
    assert abs((valued - mean).item()) < 1e-12
    assert max(relative(p.grad, g) for p, g in zip(net.parameters(), grads)) < 1e-10
    assert (
        relative(
            net.chunk_loss, torch.stack([net(X[i : i + 1], Y[i : i + 1])[1] for i in range(B)])
        )
        < 1e-12
    )


def test_missing_labels_do_not_count():
    """-1 among integers, NaN among floats; an example's loss is the mean over its own, and one
    without any counts for nothing."""
    torch.manual_seed(0)
    X, Y = torch.randn(3, 6).double(), torch.randn(3, CLASSES).double()
    Y[0, 1:] = np.nan
    Y[2] = np.nan
    net = Net(mlp().double(), F.mse_loss)
    outputs, loss = net(X, Y)
    assert loss.item() == pytest.approx(
        ((outputs[0, 0] - Y[0, 0]) ** 2 + F.mse_loss(outputs[1], Y[1])).item() / 2
    )
    net = Net(mlp().double(), F.cross_entropy)
    assert net(X, torch.tensor([1, -1, 2]))[1].item() == pytest.approx(
        net(X[[0, 2]], torch.tensor([1, 2]))[1].item()
    )
    sure = F.one_hot(
        torch.tensor([1, 0, 2]), CLASSES
    ).double()  # class probabilities: one loss for an example's four labels
    assert net(X, sure)[1].item() == pytest.approx(net(X, torch.tensor([1, 0, 2]))[1].item())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.model.parameters() if p.grad is not None)


def test_a_wrapped_model_is_copied_and_saved_and_stays_as_it_was():
    net, X, Y = build("cnn"), MODELS["cnn"][1](B, 1), labels(B, 2, F.cross_entropy)
    model, keys = net.model, list(net.model.state_dict())
    for p in net.parameters():
        p.h = torch.ones(1, *p.shape).double()
    ledger = torch.zeros(B, 1).double().requires_grad_()
    net(X, Y, ledger)[1].backward()
    twin = copy.deepcopy(net)
    assert torch.equal(twin(X, Y)[1], net(X, Y)[1])
    assert list(net.state_dict()) == ["model." + key for key in keys]
    assert type(model[0]) is nn.Conv2d
    assert list(model.state_dict()) == keys
    twin.load_state_dict(net.state_dict())
    for p in twin.parameters():
        p.h = torch.ones(1, *p.shape).double()
    other = torch.zeros(B, 1).double().requires_grad_()
    twin(X, Y, other)[1].backward()
    assert torch.equal(other.grad, ledger.grad)


# --- whole steps -----------------------------------------------------------------


def known_rows(net, X):
    """As rules.adam_aware takes them: all rows of the norms' weights, and of embeddings those of
    the words in X; None where there is neither."""
    tokens = X.flatten() if net.model.__class__ is Reader else torch.zeros(0, dtype=torch.int64)
    known = rules.known_rows(net, tokens, tokens)
    return known if any(rows is not None for rows in known) else None


def take_step(net, optimizer, valuation, step, X, Y, lr, clip=0.0, micro_steps=1):
    valuation.begin_step(step, lr, tokens=X)
    for ids in np.split(np.arange(B), [2] if micro_steps == 2 else []):
        (
            net(X[ids], Y[ids], valuation.new_ledger(ids, X[ids], Y[ids]))[1] * len(ids) / B
        ).backward()
    kappa = 1.0
    if clip:
        kappa = (clip / (torch.nn.utils.clip_grad_norm_(net.parameters(), clip) + 1e-6)).clamp(
            max=1.0
        )
    valuation.before_update(kappa)
    optimizer.step()
    optimizer.zero_grad()
    valuation.end_step()
    values, _ = settled(valuation)
    return values


def account(net, loss, name, rule, K=1, run=None, wd=0.1, **options):
    adamw = rule.startswith("adamw")
    optimizer = (
        torch.optim.AdamW(net.parameters(), 1e-2, (0.9, 0.95), weight_decay=wd)
        if adamw
        else torch.optim.SGD(net.parameters(), 1e-2)
    )
    targets = [
        Examples(f"target {k}", MODELS[name][1](6, 20 + k).numpy(), labels(6, 30 + k, loss).numpy())
        for k in range(K)
    ]
    return (
        optimizer,
        targets,
        Valuation(
            net,
            optimizer,
            lambda *batch: net(*batch)[1],
            targets,
            Settings(rule=rule, batch=B, **{"target_batch": 6, "tolerance": 0.0, **options}),
            Writer(run, B, len(targets), audits="audit_interval" in options) if run else None,
        ),
    )


def target_loss(target):
    return exact.batch_loss(torch.from_numpy(target.X), torch.from_numpy(target.Y))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "name, loss, K",
    [("mlp", F.mse_loss, 3), ("reader", F.cross_entropy, 1), ("cnn", F.cross_entropy, 1)],
)
def test_values_of_a_run_equal_the_definitions_of_the_rules(name, loss, K, rule):
    """First steps and later, clipping off and on, one micro-batch and two, the target at once
    and in slices."""
    net = build(name, loss)
    optimizer, targets, valuation = account(
        net, loss, name, rule, K, micro_batch=4 * (name == "mlp")
    )
    for step, (clip, micro_steps) in enumerate([(0.0, 1), (0.05, 2), (0.05, 1)]):
        X, Y = MODELS[name][1](B, 50 + step), labels(B, 60 + step, loss)
        x = exact.chunk_gradients(net, X, Y)
        losses = [target_loss(target) for target in targets]
        known = known_rows(net, X) if rule == "adamw" else None
        squares = None
        if name == "reader" and rule != "adamw":
            of_uses = exact.chunk_gradients(Net(ReaderOfSingleUses(net.model), loss), X, Y)
            squares = torch.stack([exact.dot(x_i, x_i) for x_i in of_uses])
        what = (net, optimizer, x, losses, rule, 1e-2, clip)
        truth = rules.rule_values(*what, known=known, squares=squares)
        values = take_step(net, optimizer, valuation, step, X, Y, 1e-2, clip, micro_steps)
        assert relative(values, truth) < 1e-10, step


@pytest.mark.parametrize("name, loss", [("cnn", F.cross_entropy), ("mlp", F.mse_loss)])
def test_adamw2_is_close_to_the_exact_shapley_values(tmp_path, name, loss):
    """Of the step AdamW took, by all subsets; the audit finds the same truth, and the files hold
    the values."""
    net = build(name, loss)
    optimizer, targets, valuation = account(
        net, loss, name, "adamw2", run=tmp_path, audit_interval=12
    )
    for step in range(12):
        X, Y = MODELS[name][1](B, 50 + step), labels(B, 60 + step, loss)
        if step == 11:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            game = exact.Step(
                net, optimizer, exact.chunk_gradients(net, X, Y), [target_loss(targets[0])]
            )
            truth = exact.shapley(game, B)[:, 0]
        values = take_step(net, optimizer, valuation, step, X, Y, 1e-3 if step == 11 else 1e-2)
    figures = exact.agreement(values[:, 0].numpy(), truth)
    assert figures["pearson"] > 0.999
    assert figures["rel_l2"] < 0.1
    assert values.sum() == pytest.approx(truth.sum(), rel=0.02)
    valuation.commit()
    audit = np.load(tmp_path / "audit.npy")
    books = np.load(tmp_path / "books.npy")
    assert audit["pearson"][0, 0] == pytest.approx(figures["pearson"], rel=1e-4)
    assert abs(books["residual"][-1]) < 0.02 * abs(books["before"] - books["after"])[-1]
    assert np.isfinite(np.load(tmp_path / "values.npy")).all()


@pytest.mark.parametrize("name, loss", [("mlp", F.mse_loss), ("mlp", F.cross_entropy)])
def test_the_audit_replays_the_dropout_masks_of_the_step(name, loss):
    """gradient_of, which audits and momentum by domain rest on: the others' labels are struck
    out, whole rows or single numbers."""
    net = build(name, loss)
    net.model = nn.Sequential(net.model[:3], nn.Dropout(0.5), net.model[3])
    _, _, valuation = account(net, loss, name, "adamw2")
    X, Y = MODELS[name][1](B, 50), labels(B, 60, loss)
    valuation.begin_step(0, 1e-2)
    net(X, Y, valuation.new_ledger(np.arange(B), X, Y))[1].backward()
    valuation.before_update()
    parts = [valuation.audit.gradient_of(valuation.step, np.arange(B) == i) for i in range(B)]
    assert max(relative(sum(part), p.grad) for part, p in zip(zip(*parts), net.parameters())) < 1e-7


# --- what is refused ---------------------------------------------------------------


class With(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, X):
        return self.function(self, X)


def frozen(layer):
    layer.weight.requires_grad_(False)
    return layer


WORDS = torch.zeros(B, B, dtype=torch.int64)
ROWS = torch.randn(B, B)

REFUSED = {  # the message: a model that gets it, and inputs
    "1.weight, 1.bias.*mixes examples: take nn.LayerNorm": (
        nn.Sequential(nn.Linear(B, 3), nn.BatchNorm1d(3)),
        ROWS,
    ),
    "batch norm .*mixes": (nn.Sequential(nn.Linear(B, 3), nn.BatchNorm1d(3, affine=False)), ROWS),
    "nn.Embedding with max_norm": (nn.Embedding(3, 4, max_norm=1.0), WORDS),
    "max_norm, scale_grad_by_freq or sparse": (nn.Embedding(3, 4, sparse=True), WORDS),
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("tape", [False, True])
def test_a_model_with_parts_that_give_no_values_is_refused(message, tape):
    model, X = REFUSED[message]
    net = Net(model, mean_of_outputs)
    for p in net.parameters():
        p.h = torch.ones(1, *p.shape)
    ledger = ghost.Tape() if tape else torch.zeros(len(X), 1, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        net(X, torch.zeros(len(X)), ledger)


# --- what has a fast form, and what has none ------------------------------------------


def mean_of_outputs(outputs, Y, reduction):
    return outputs.flatten(1).sin().mean(1)


def attend(model, X):
    return model.attention(X, X, X)[0]


def recur(model, X):
    return model.lstm(X)[0]


def pool(model, X):
    """A cls token, a table of places, and a scale."""
    x = torch.cat([model.token.expand(len(X), -1, -1), X], 1) + model.places
    return x * model.scale


def turn(model, X):
    """Inside the model the batch is the second dimension."""
    return model.layer(X.transpose(0, 1)).transpose(0, 1)


def pick(model, X):
    """Rows are sent to one of two layers."""
    rows = X.reshape(-1, X.shape[-1])
    first = rows[:, 0] > 0
    y = torch.zeros(len(rows), 3, dtype=X.dtype)
    y = y.index_put((first,), model.one(rows[first]))
    y = y.index_put((~first,), model.two(rows[~first]))
    return y.view(*X.shape[:2], 3)


def lookups(model, X):
    """Positions that the batch shares, and rows that do not learn."""
    words = (X[..., 0] > 0).long()
    return model.word(words) + model.place(torch.arange(X.shape[1]))[None]


def recompute(model, X):
    return checkpoint(model.layer, X, use_reentrant=False)


def with_no_grad(model, X):
    with torch.no_grad():
        cut = model.layer(X, X)
    return model.layer(X, X) * cut


SHAPES = {
    "group norm": (nn.GroupNorm(3, 6), (6, 4, 4)),
    "layer norm of several dimensions": (nn.LayerNorm([4, 6]), (4, 6)),
    "rms norm": (nn.RMSNorm(6), (4, 6)),
    "bare parameters": (
        With(
            pool,
            token=nn.Parameter(torch.randn(1, 1, 6)),
            places=nn.Parameter(torch.randn(1, 5, 6)),
            scale=nn.Parameter(torch.randn(6)),
        ),
        (4, 6),
    ),
    "1 + w": (
        With(lambda m, X: X * (1.0 + m.w), w=nn.Parameter(torch.randn(6))),
        (4, 6),
    ),
    "transposed": (
        With(lambda m, X: X @ m.layer.weight.T, layer=nn.Linear(6, 3, bias=False)),
        (6,),
    ),
    "matmul": (With(lambda m, X: X @ m.w, w=nn.Parameter(torch.randn(6, 3))), (4, 6)),
    "flattened": (
        With(
            lambda m, X: m.norm(m.layer(X.flatten(0, 1))).view(len(X), -1),
            layer=nn.Linear(6, 3),
            norm=nn.LayerNorm(3),
        ),
        (4, 6),
    ),
    "lookups": (
        With(lookups, word=nn.Embedding(2, 3, padding_idx=0), place=nn.Embedding(9, 3)),
        (4, 6),
    ),
    "frozen weight": (nn.Sequential(frozen(nn.Linear(6, 3)), nn.Linear(3, 2)), (6,)),
    "changed in place": (nn.Sequential(nn.Linear(6, 3), nn.ReLU(inplace=True)), (4, 6)),
}
GENERAL = {
    "attention": (With(attend, attention=nn.MultiheadAttention(6, 2, batch_first=True)), (4, 6)),
    "lstm": (With(recur, lstm=nn.LSTM(6, 3, batch_first=True)), (4, 6)),
    "bilinear": (With(lambda m, X: m.layer(X, X), layer=nn.Bilinear(6, 6, 3)), (6,)),
    "groups": (nn.Conv2d(6, 4, 2, groups=2), (6, 4, 4)),
    "conv1d": (nn.Conv1d(6, 4, 2), (6, 4)),
    "batch norm in eval": (nn.BatchNorm1d(6).eval(), (6, 4)),
    "batch second": (With(turn, layer=nn.Linear(6, 3)), (B, 6)),
    "picked rows": (With(pick, one=nn.Linear(6, 3), two=nn.Linear(6, 3)), (4, 6)),
    "recomputed": (With(recompute, layer=nn.Linear(6, 3)), (4, 6)),
    "no grad": (With(with_no_grad, layer=nn.Bilinear(6, 6, 3)), (6,)),
}


@pytest.mark.parametrize("name", [*SHAPES, *GENERAL])
def test_parameters_give_values_however_they_meet_the_batch(name):
    """Fast where a form is known, by a forward-mode pass where none is; frozen for a second pass
    too."""
    torch.manual_seed(0)
    model, shape = copy.deepcopy({**SHAPES, **GENERAL}[name])
    net = Net(model.double(), mean_of_outputs)
    X, Y = torch.randn(B, *shape).double(), torch.zeros(B).double()
    params = [p for p in net.parameters() if p.requires_grad]
    for p in params:
        p.data += torch.randn_like(p) / 3
        p.h = torch.randn(2, *p.shape).double()
    truth = []
    for i in range(B):
        gradient = torch.autograd.grad(net(X[i : i + 1], Y[i : i + 1])[1] / B, params)
        truth.append([exact.dot(gradient, [p.h[k] for p in params]) for k in range(2)])
    truth = torch.tensor(truth).double()
    plain = torch.autograd.grad(net(X, Y)[1], params)
    ledger = torch.zeros(B, 2).double().requires_grad_()
    *gradient, values = torch.autograd.grad(net(X, Y, ledger)[1], [*params, ledger])
    assert relative(values, truth) < 1e-10
    assert max(relative(a, b) for a, b in zip(gradient, plain)) < 1e-10
    assert any(way == "general" for *_, way in net.ways) == (name in GENERAL)
    tape = ghost.Tape()
    net(X, Y, tape)[1].backward()
    assert relative(tape.values(), truth) < 1e-10
    for p in params:
        p.requires_grad_(False)
    (values,) = torch.autograd.grad(net(X, Y, ledger)[1], ledger)
    assert relative(values, truth) < 1e-10


def test_frozen_layers_of_any_kind_are_let_through():
    """Batch norm in eval(), attention, a lone weight: what is frozen needs no values."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm1d(6).eval(), nn.Bilinear(6, 6, 8), nn.Linear(8, CLASSES)
    ).double()
    model = With(lambda m, X: m.s[2](m.s[1](m.s[0](X), X)), s=model)
    for layer in model.s[:2]:
        layer.requires_grad_(False)
    net, ledger = Net(model, F.cross_entropy), torch.zeros(B, 1).double().requires_grad_()
    for p in model.s[2].parameters():
        p.h = torch.ones(1, *p.shape).double()
    net(torch.randn(B, 6).double(), torch.zeros(B).long(), ledger)[1].backward()
    assert float(ledger.grad.sum()) == pytest.approx(
        float(sum(p.grad.sum() for p in model.s[2].parameters()))
    )


def test_an_unused_parameter_is_named():
    net = Net(
        With(lambda m, X: m.used(X), used=nn.Linear(6, CLASSES), unused=nn.Linear(2, 2)),
        F.cross_entropy,
    ).double()
    valuation = account(net, F.cross_entropy, "mlp", "adamw")[2]
    with pytest.raises(ValueError, match=r"model.unused.weight, model.unused.bias: freeze"):
        valuation.begin_step(0, 1e-2)


def test_any_model_runs_and_says_what_it_found(tmp_path, capsys):
    any_model.main(any_model.Config(steps=4, out=str(tmp_path)))
    said = capsys.readouterr().out
    assert "lowest: " in said
    assert "of the measured drop" in said or "of the measured rise" in said
    assert np.isfinite(np.load(tmp_path / "values.npy")).sum() == 80


def test_a_step_of_more_examples_than_the_batch_is_refused():
    """The ledger has no rows for them."""
    torch.manual_seed(0)
    X = np.random.default_rng(0).normal(size=(8, 3)).astype("f4")
    Y = (X[:, 0] > 0).astype(int)
    net = Net(nn.Linear(3, 2), F.cross_entropy)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)

    def loss(*batch):
        return net(*batch)[1]

    for rule in ("sgd", "adamw2"):
        settings = Settings(rule=rule, batch=4)
        valuation = Valuation(net, optimizer, loss, [Examples("t", X, Y)], settings)
        x, y = torch.from_numpy(X), torch.from_numpy(Y)
        valuation.begin_step(0, 1e-2)
        net(x, y, valuation.new_ledger(np.arange(8), x, y))[1].backward()
        with pytest.raises(ValueError, match="a step of 8 examples a process, but batch=4"):
            valuation.before_update()
