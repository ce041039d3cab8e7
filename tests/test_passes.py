"""`adamw` checks what it foresaw: the gap between a step's values and what the batch did is
measured, and where it is too large the step is valued in two passes."""

import numpy as np
import pytest
import torch
from runs import TWO_TARGETS, assert_same_run, read_bytes, run, weights
from test_valuation import B, relative, target_losses, text
from test_valuation import Run as FullRun
from valued import settled, smoothed

import valuation
from experiments import common, fidelity, models
from shapley import exact, rules
from shapley.wrap import Examples, Net
from show import tables
from system import store
from system.errors import UserError
from system.files import crc32
from valuation import Settings, Valuation

ALWAYS = 1e-12  # a tolerance that no step keeps
NEVER = 1e12  # one that every step keeps


class Run(FullRun):
    """In float64. `step` returns the step's values, and what rules.py says `adamw` and `adamw2`
    give; the step's true gap is left in .gap."""

    def __init__(self, tmp_path, **options):
        super().__init__(tmp_path, torch.float64, "adamw", loss_rounding=0.0, **options)

    def step(self, step, lr=1e-2, clip=0.0, micro_steps=1):
        rows = torch.from_numpy(text(B, 100 + step).astype(np.int64))
        X, Y = rows[:, :-1], rows[:, 1:]
        x, known = exact.chunk_gradients(self.model, X, Y), rules.known_rows(self.model, X, Y)
        losses = target_losses(self)
        what = (self.model, self.optimizer, x, losses)
        one = rules.rule_values(*what, "adamw", lr, clip, known=known)
        squares = rules.squares_by_use(self.model, X, Y)
        two = rules.rule_values(*what, "adamw2", lr, clip, squares=squares)
        before_clipping = rules.rule_values(*what, "adamw", lr, clip, known=known, products=False)
        empty = self.losses_at_empty(losses, lr, x) if step else None
        self.train(step, rows, lr, clip, micro_steps)
        if step:
            after = torch.stack([loss(self.model.eval()).detach() for loss in losses])
            self.model.train()
            self.gap = (empty - after - one.sum(0)) / before_clipping.abs().sum(0)
        return settled(self.valuation)[0], one, two

    def losses_at_empty(self, losses, lr, x):
        """The targets' losses where momentum and decay alone land."""
        g = [sum(players) for players in zip(*x)]
        situation = rules.Situation(self.model, self.optimizer, losses[0], lr, g, 1.0)
        to_empty = situation.to_empty(rules.updates(self.model, self.optimizer))
        twin = rules.displaced(self.model, to_empty)
        return torch.stack([loss(twin).detach() for loss in losses])


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("tolerance", [ALWAYS, NEVER])
def test_values_equal_the_definition_of_one_pass_or_of_two(tmp_path, tolerance, tie, K):
    """Clipping off and on, 1, 2 and 4 micro-batches; steps of two passes with a check before, and
    without."""
    torch.manual_seed(0)
    valued = Run(tmp_path, tolerance=tolerance, K=K, tie=tie)
    passes = []
    for step, (clip, micro_steps) in enumerate(
        [(0.0, 1), (0.05, 2), (0.05, 4), (0.0, 1), (0.05, 1)]
    ):
        values, one, two = valued.step(step, clip=clip, micro_steps=micro_steps)
        expected = one if tolerance == NEVER else two
        assert relative(values, expected) < 1e-9, step
        assert relative(one, two) > 1e-3
        passes.append(valued.valuation.pending[-1].passes)
        # to so many digits no rule explains a step
        assert valued.valuation.pending[-1].failed == (0 if tolerance == NEVER else 2)
    assert set(passes) == {1 if tolerance == NEVER else 2}


@pytest.mark.parametrize("exact_rows", [True, False])
def test_a_step_that_is_clipped_harder_than_one_pass_can_tell_takes_two(
    tmp_path, monkeypatch, exact_rows
):
    """The game of clipping leaves the sum of the values as it is, so no gap says how well it is
    known: from the tokens' rows, or not at all."""
    tenfold = 10  # so small a model leaves larger gaps than the tolerance of a run
    for name in ("CLIPPING_BY_ROWS", "CLIPPING_UNKNOWN"):
        monkeypatch.setattr(valuation, name, tenfold * getattr(valuation, name))
    valued = Run(tmp_path, tolerance=tenfold * 0.05, exact_rows=exact_rows)
    young = 10  # steps, whose moments one pass cannot go by
    for step in range(young):
        valued.train(step, torch.from_numpy(text(B, 100 + step).astype(np.int64)), 1e-4, 0.0, 1)
    passes = []
    for step, kappa in enumerate([1.0, 0.95, 0.7, 0.4], young):
        rows = torch.from_numpy(text(B, 100 + step).astype(np.int64))
        x = exact.chunk_gradients(valued.model, rows[:, :-1], rows[:, 1:])
        g = [sum(players) for players in zip(*x)]
        clip = kappa * float(exact.dot(g, g).sqrt()) if kappa < 1 else 0.0
        values, one, two = valued.step(step, lr=1e-4, clip=clip)
        passes.append(valued.valuation.pending[-1].passes)
        assert valued.valuation.pending[-1].gap.abs().max() < tenfold * 0.05
        if exact_rows or passes[-1] == 2:
            assert relative(values, one if passes[-1] == 1 else two) < 1e-9
        assert kappa == 1 or relative(one, two) > 1e-3
    assert passes == ([1, 1, 1, 2] if exact_rows else [1, 1, 2, 2])


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("tie", [True, False])
def test_a_second_pass_repeats_a_forward_only_where_there_is_no_tape(
    tmp_path, monkeypatch, tie, micro_steps
):
    repeated = []
    repeat = Valuation.repeated

    def counting(valuation, micro_batch):
        repeated.append(micro_batch)
        return repeat(valuation, micro_batch)

    monkeypatch.setattr(Valuation, "repeated", counting)
    valued = Run(tmp_path, tolerance=ALWAYS, tie=tie)
    for step in range(3):
        valued.step(step, micro_steps=micro_steps)
    assert len(repeated) == (0 if micro_steps == 1 else 3 * micro_steps)


@pytest.mark.parametrize("smoothing", [0.0, 0.9])
def test_a_tape_changes_no_digit_of_a_first_pass(tmp_path, smoothing):
    """It is kept in case a check fails."""
    found = []
    for tolerance in (0.0, NEVER):
        options = {"target_smoothing": smoothing, "K": 2}
        valued = Run(tmp_path / str(tolerance), tolerance=tolerance, **options)
        for step in range(3):
            valued.step(step, clip=0.05)
        scores = [step.found for step in valued.valuation.pending]
        found.append([*valued.model.parameters(), *[s.values for s in scores]])
        found[-1] += [s.products for s in scores]
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("K", [1, 2])
def test_the_gap_is_what_the_step_did_less_what_the_values_say(tmp_path, K):
    valued = Run(tmp_path, tolerance=NEVER, K=K, target_batch=3)
    for step in range(4):
        valued.step(step, clip=0.05, micro_steps=2)
        if step:
            found = valued.valuation.pending[-1].gap
            torch.testing.assert_close(found, valued.gap, rtol=1e-7, atol=1e-9)
            assert found.abs().min() > 1e-3
    visits, books = valued.valuation.pending, valued.valuation.flush().books
    assert not visits or len(books)
    assert (books["passes"] == 1).all()
    assert not books["failed"].any()
    assert np.isfinite(books["gap"]).all()


def test_a_step_fails_where_the_gap_of_some_target_is_too_large(tmp_path):
    first = Run(tmp_path / "a", tolerance=NEVER, K=2)
    for step in range(3):
        first.step(step)
    gaps = first.gap.abs()
    for factor, has_failed in ((0.99, True), (1.01, False)):
        tolerance = float(gaps.max()) * factor
        again = Run(tmp_path / str(factor), tolerance=NEVER, K=2)
        for step in range(3):
            again.valuation.settings.tolerance = tolerance if step == 2 else NEVER
            again.step(step)
        assert (again.valuation.pending[-1].failed > 0) == has_failed
        assert gaps.min() < tolerance


@pytest.mark.parametrize("smoothing", [0.0, 0.9])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_target_keeps_its_values_where_another_fails(tmp_path, clip, smoothing):
    """As if it were alone, to the bit; so do its smoothed scores."""
    options = {"tolerance": NEVER, "K": 2, "target_smoothing": smoothing}
    first = Run(tmp_path / "first", **options)
    for step in range(3):
        values_of_one, _, _ = first.step(step, clip=clip)
    gaps = first.gap.abs()
    fails = gaps == gaps.max()
    again = Run(tmp_path / "again", **options)
    for step in range(3):
        again.valuation.settings.tolerance = float(gaps.mean()) if step == 2 else NEVER
        values, _, two = again.step(step, clip=clip)
    assert relative(values[:, fails], two[:, fails]) < 1e-9
    assert torch.equal(values[:, ~fails], values_of_one[:, ~fails])
    if smoothing:
        found, of_one = smoothed(again.valuation), smoothed(first.valuation)
        assert torch.equal(found[:, ~fails], of_one[:, ~fails])
        assert not torch.equal(found[:, fails], of_one[:, fails])
    step = again.valuation.pending[-1]
    assert step.holds.tolist() == (~fails).tolist()
    assert torch.equal(step.left[~fails], step.gap[~fails])
    assert step.left[fails].abs() < step.gap[fails].abs()


def test_smoothed_scores_of_two_passes_are_of_the_first_passes_gradients(tmp_path):
    """The mean holds each step's gradient as the first pass took it; the secant is the true one."""
    beta = 0.9
    valued = Run(tmp_path, tolerance=ALWAYS, target_smoothing=beta)
    (loss,) = target_losses(valued)
    total = 0.0
    for step in range(3):
        rows = torch.from_numpy(text(B, 100 + step).astype(np.int64))
        x = exact.chunk_gradients(valued.model, rows[:, :-1], rows[:, 1:])
        g = [sum(players) for players in zip(*x)]
        situation = rules.Situation(valued.model, valued.optimizer, loss, 1e-2, g, 1.0)
        coming = rules.updates(valued.model, valued.optimizer)
        if step:
            gradient = situation.gradient_at(situation.to_empty(coming))
        else:
            gradient = situation.gradient_here()
        flat = torch.cat([g_k.flatten() for g_k in gradient])
        total = beta * total + (1 - beta) * flat
        secants = [update.secant(g_p) for update, g_p in zip(coming, g)]
        secant = torch.cat([secant.flatten() for secant in secants])
        h = 1e-2 * secant * total / (1 - beta ** (step + 1))
        players = [torch.cat([part.flatten() for part in x_i]) for x_i in x]
        expected = [player @ h for player in players]
        valued.step(step)
        found = smoothed(valued.valuation)[:, 0]
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-8, atol=1e-12)


def test_a_value_that_is_not_finite_is_computed_again(tmp_path):
    """One pass overflows where eps is 0 and a moment is 0."""
    valued = Run(tmp_path, tolerance=NEVER)
    valued.step(0)
    add = valued.valuation.rule.add_exact_rows

    def spoil(step):
        add(step)
        step.micro_batches[0].exact_values = step.micro_batches[0].exact_values + torch.inf

    valued.valuation.first_rule.add_exact_rows = spoil
    values, _, two = valued.step(1)
    assert relative(values, two) < 1e-9


def test_what_rounding_can_do_is_no_gap(tmp_path):
    valued = Run(tmp_path, tolerance=ALWAYS)
    valued.valuation.settings.loss_rounding = 1.0  # as large as the loss
    for step in range(2):
        valued.step(step)
        assert not valued.valuation.pending[-1].failed


# --- in a run -----------------------------------------------------------------

OPTIONS = [TWO_TARGETS, "--book_interval=3", "--lr_decay_iters=12", "--learning_rate=1e-2"]


@pytest.fixture(scope="module")
def whole(python_data, tmp_path_factory):
    """Twelve steps, of which some are valued in one pass and some in two."""
    folder = tmp_path_factory.mktemp("passes") / "whole"
    run(python_data, folder, *OPTIONS, "--tolerance=.2")
    return folder


def test_a_run_says_how_its_steps_were_valued(whole, python_data, tmp_path, capsys):
    run(python_data, tmp_path / "run", *OPTIONS, "--tolerance=.2")
    said = capsys.readouterr().out
    books = store.read(whole, "books")
    n_two = np.count_nonzero(books["passes"] == 2)
    assert 0 < n_two < 12
    assert f"passes: {n_two} of 12 steps were valued in two" in said
    assert "passes: checks and second passes took" in said
    assert "| two passes 100% |" in said
    assert set(books["passes"]) == {1, 2}
    assert np.isfinite(books["gap"]).all()
    assert ((books["passes"] == 2) == (books["failed"] > 0)).all()
    largest = abs(books["gap"]).max(1)
    left = abs(books["left"]).max(1)
    assert ((left > 0.2 + 1e-3) <= (books["failed"] == 2)).all()
    assert (books["left"][books["failed"] == 0] == books["gap"][books["failed"] == 0]).all()
    assert left[books["failed"] > 0].sum() < 0.5 * largest[books["failed"] > 0].sum()
    assert (largest[books["failed"] > 0] > 0.2).all()
    assert (largest[books["passes"] == 1] <= 0.2 + 1e-3).all()


def test_values_of_two_passes_are_those_of_adamw2(whole, python_data, tmp_path):
    run(python_data, tmp_path / "two", *OPTIONS, "--rule=adamw2")
    in_two = np.repeat(abs(store.read(whole, "books")["gap"]) > 0.2, 4, axis=0)
    values, others = store.read(whole)["value"], store.read(tmp_path / "two")["value"]
    np.testing.assert_allclose(values[in_two], others[in_two], rtol=1e-3, atol=1e-7)
    assert not np.allclose(values[~in_two], others[~in_two], rtol=1e-3, atol=1e-7)


def test_two_passes_change_nothing_but_values(whole, python_data, tmp_path):
    """grad_norm stays that of the rows which one pass keeps, in every step."""
    run(python_data, tmp_path / "one", *OPTIONS, "--tolerance=0")
    visits, others = store.read(whole), store.read(tmp_path / "one")
    for name in ("step", "chunk", "loss", "grad_norm", "early"):
        assert visits[name].tobytes() == others[name].tobytes(), name
    books, of_one = store.read(whole, "books"), store.read(tmp_path / "one", "books")
    for name in ("before", "after", "momentum", "decay", "kappa"):
        measured = np.arange(12) % 3 == 0
        assert books[name][measured].tobytes() == of_one[name][measured].tobytes(), name
    for name, weight in weights(tmp_path / "one").items():
        assert torch.equal(weights(whole)[name], weight), name


@pytest.mark.parametrize("stop", [5, 7])
def test_a_run_that_goes_on_is_checked_as_before(whole, python_data, tmp_path, stop):
    out = tmp_path / "run"
    run(python_data, out, *OPTIONS, "--tolerance=.2", f"--max_iters={stop}")
    run(python_data, out, *OPTIONS, "--tolerance=.2", "--init_from=resume")
    assert_same_run(out, whole)


def test_another_tolerance_is_refused_where_a_run_goes_on(python_data, tmp_path):
    out = tmp_path / "run"
    run(python_data, out, "--max_iters=1", "--n_layer=1")
    with pytest.raises(
        UserError, match=r"--tolerance=0.1, but .* was run with tolerance=0.05: type"
    ):
        run(python_data, out, "--tolerance=.1", "--init_from=resume", "--n_layer=1")


@pytest.mark.parametrize("rule, more", [("adamw", ["--tolerance=0"]), ("adamw2", [])])
def test_a_run_of_an_earlier_version_goes_on(python_data, tmp_path, monkeypatch, rule, more):
    """Its books have no such fields, and get none."""
    out, options = tmp_path / "run", [f"--rule={rule}", *OPTIONS]
    old = store.book_dtype(2, passes=False)
    with monkeypatch.context() as patch:
        patch.setattr(store, "book_dtype", lambda K, passes=True: old)
        run(python_data, out, "--max_iters=5", *options, "--tolerance=0")
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    del checkpoint["config"]["tolerance"]
    with open(out / "ckpt.pt", "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        file.write(b"%08x" % crc32(file.name))
    run(python_data, out, *options, *more, "--init_from=resume")
    books = store.read(out, "books")
    assert len(books) == 12
    assert books.dtype == old
    run(python_data, tmp_path / "new", *options, "--tolerance=0")
    assert read_bytes(out)["ledger.npy"] == read_bytes(tmp_path / "new")["ledger.npy"]
    assert tables.count_passes(books) is None


def test_a_step_whose_values_were_wild_is_not(python_data, tmp_path):
    """One pass gave the chunks of a step far more than the target's whole loss."""
    options = ["--learning_rate=3e-2", "--warmup_iters=0", "--max_iters=30", "--book_interval=1"]
    run(python_data, tmp_path / "one", *options, "--tolerance=0")
    run(python_data, tmp_path / "checked", *options)
    sizes = {}
    for name in ("one", "checked"):
        visits = store.read(tmp_path / name)
        sizes[name] = abs(visits["value"]).max()
    assert sizes["one"] > 5
    assert sizes["checked"] < 1


@pytest.mark.parametrize("kappa", [1.0, 0.7])
def test_adapters_are_valued_as_their_steps_were(kappa):
    """LoRA's A has no gradient as long as B is 0, so one pass knows nothing of its first steps; nor
    of clipping, for no row of a token learns."""
    peft = pytest.importorskip("peft")
    accounted, passes = {}, {}
    for tolerance in (0.0, 0.05):
        made = models.build("GPT-2, tied")
        targets = models.LORA["GPT-2, tied"]
        lora = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=True)
        net = Net(peft.get_peft_model(made.model, lora).float(), made.loss)
        params = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, 3e-2, betas=(0.9, 0.95))
        target = Examples("target", *as_arrays(*models.batch_of("GPT-2, tied")[:2]))
        settings = Settings(batch=models.B, target_batch=models.B, tolerance=tolerance)

        def compute_loss(X, Y, ledger=None, net=net):
            return net(X, Y, ledger)[1]

        valuation = Valuation(net, optimizer, compute_loss, [target], settings)
        for step in range(12):
            X, Y, _ = models.batch_of("GPT-2, tied")
            valuation.begin_step(step, 3e-2, tokens=X)
            ledger = valuation.new_ledger(np.arange(models.B), X, Y)
            compute_loss(X, Y, ledger).backward()
            for p in params:
                p.grad *= kappa
            valuation.before_update(kappa)
            optimizer.step()
            optimizer.zero_grad()
            valuation.end_step()
        books = valuation.flush().books
        accounted[tolerance] = tables.booked(books, 0)["accounted"]
        passes[tolerance] = books["passes"].tolist()
    assert accounted[0.0] > (2 if kappa == 1 else 1.5)
    assert set(passes[0.0]) == {1}
    assert set(passes[0.05]) == ({1, 2} if kappa == 1 else {2})
    assert accounted[0.05] == pytest.approx(1, abs=0.05)


def as_arrays(*nests):
    return [torch.utils._pytree.tree_map(torch.Tensor.numpy, nest) for nest in nests]


# --- the experiment that the tables of trust come from ------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_every_rule_is_judged_by_the_exact_values_of_a_step(tmp_path, clip):
    """Where the rules leave a gap, the checked one has the values of two passes."""
    valued = Run(tmp_path, tolerance=0.0)
    for step in range(2):
        valued.step(step, clip=clip)
    rows = torch.from_numpy(text(B, 9).astype(np.int64))
    X, Y = rows[:, :-1], rows[:, 1:]
    (loss,) = target_losses(valued)
    what = (valued.model, valued.optimizer, X, Y, loss, 1e-2, clip, 10)
    rows = fidelity.checked(fidelity.judge_step(*what))
    judged = {row["name"]: row for row in rows}
    assert set(judged) == {*fidelity.RULES, fidelity.CHECKED, fidelity.LEAVE_ONE_OUT}
    assert judged["adamw2"]["pearson"] > 0.9  # a second step, and a long one
    assert judged["adamw2"]["rel_l2"] < judged["adamw"]["rel_l2"]
    assert (judged["adamw"]["kappa"] < 1) == (clip > 0)
    assert abs(judged["adamw"]["gap"]) > fidelity.TOLERANCE
    for name in ("pearson", "rel_l2", "sum_ratio"):
        assert judged[fidelity.CHECKED][name] == judged["adamw2"][name]


def test_an_experiment_refuses_chunks_of_another_text_or_cut(tmp_path):
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(f"{name} " * 400)
    data, one, two = (str(tmp_path / name) for name in ("data", "one.txt", "two.txt"))
    cut = {"tokenizer": "byte", "block_size": 16, "val_fraction": 0.0, "workers": 1}
    made = common.prepare(data, one, **cut)
    again = common.prepare(data, one, **{**cut, "workers": 2})  # which changes no chunk
    assert (again.train.rows == made.train.rows).all()
    with pytest.raises(UserError, match=r"two\.txt: give another folder as --data"):
        common.prepare(data, two, **cut)
    with pytest.raises(UserError, match="--block_size=16, asked for is 32"):
        common.prepare(data, one, **{**cut, "block_size": 32})
