"""Values that come later: a replay is the run again, a walk is right where its checkpoints are, and
tokens add up to their chunk."""

import json
import os
import re
import shutil
import signal
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import in_process, wait_for

import config
import revalue
import shapley.head
import train
from data import parse_targets
from shapley import ghost
from show.run import open_run
from system import store
from system.errors import UserError

SMALL = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_iters": 24,
    "warmup_iters": 5,
    "learning_rate": 5e-3,
    "eval_interval": 6,
    "eval_chunks": 2,
    "checkpoint_interval": 6,
    "keep_checkpoints": 9,
    "book_interval": 4,
    "grad_clip": 0.5,
    "device": "cpu",
    "dtype": "float32",
}
TARGETS = "val:Python code,val:Docstrings"


def trained(python_data, folder, rule, **more):
    """A run with everything that random numbers and moments can do wrong, and beside it a text for
    a new target. Returns the run's folder."""
    options = {**SMALL, "rule": rule, "targets": TARGETS, "dropout": 0.1, "target_batch": 2}
    options |= more
    out = folder / rule
    train.train(train.Config(**options, data_dir=str(python_data), out_dir=str(out)))
    (folder / "later.txt").write_text("def later(text):\n    return text.strip()\n" * 3)
    return out


@pytest.fixture(scope="module")
def run(python_data, tmp_path_factory):
    return trained(python_data, tmp_path_factory.mktemp("revalue"), "adamw")


@pytest.fixture(scope="module")
def run_of_two_passes(python_data, tmp_path_factory):
    return trained(python_data, tmp_path_factory.mktemp("revalue"), "adamw2")


def revalued(run, **options):
    """The folder that revalue.py leaves."""
    return revalue.revalue(revalue.Config(run=str(run), **options))


def later_target(run, name="later"):
    return f"{name}={run.parent}/later.txt"


def column(folder, name):
    return store.read(folder)[name]


def info(folder):
    return json.loads((folder / "values.json").read_text())


# --- a replay ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "run_of_two_passes"])
def test_a_replay_has_the_bytes_of_the_run(request, name):
    run = request.getfixturevalue(name)
    folder = revalued(run, replay=True, name="again")
    for array in ("values.npy", "ledger.npy", "books.npy"):
        assert (folder / array).read_bytes() == (run / array).read_bytes(), array
    assert info(folder)["of"] == str(run)
    assert info(folder)["method"] == "replay"
    assert info(folder)["approximate"] is None
    assert not (folder / "ckpt.pt").exists()


def test_a_replay_with_a_new_target_has_the_same_values_for_the_old_ones(run):
    """Also in steps whose check fails for some of the targets only."""
    targets = f"{TARGETS},{later_target(run)}"
    folder = revalued(run, replay=True, targets=targets, name="three")
    assert column(folder, "loss").tobytes() == column(run, "loss").tobytes()
    np.testing.assert_array_equal(column(folder, "value")[:, :2], column(run, "value"))


def test_a_replay_for_a_new_target_values_every_chunk_that_was_used(run):
    folder = revalued(run, replay=True, targets=later_target(run))
    used = open_run(run).used
    assert folder.name == "later"
    assert open_run(folder).names == ["later"]
    assert len(used) == 96
    assert np.isfinite(np.load(folder / "values.npy")[used]).all()


def test_a_replay_from_a_checkpoint_has_the_last_rows_of_the_run(run, capsys):
    folder = revalued(run, replay=True, start=12, name="end")
    assert "48 visits: their losses are the run's to the bit" in capsys.readouterr().out
    assert column(folder, "step")[0] == 12
    assert store.read(folder).tobytes() == store.read(run)[48:].tobytes()


def test_a_replay_from_a_checkpoint_is_read_as_a_run(run):
    opened = open_run(revalued(run, replay=True, start=12, name="end-read"))
    total = np.zeros((len(opened.values), 2))
    used = np.zeros(len(opened.values), bool)
    store.add_visits(store.read(run)[48:], total, used)
    assert len(opened.visits) == 48
    assert len(opened.books) == 12
    np.testing.assert_array_equal(opened.used, np.flatnonzero(used))
    np.testing.assert_array_equal(opened.values[used], total[used].astype(np.float32))


def test_a_replay_for_a_text_from_a_checkpoint_has_the_last_rows_of_the_whole_replay(run):
    mine = later_target(run, "mine")
    rows = store.read(revalued(run, replay=True, targets=mine, name="mine-whole"))
    end = revalued(run, replay=True, targets=mine, start=12)
    assert end.name == "mine"
    assert column(end, "step")[0] == 12
    assert store.read(end).tobytes() == rows[rows["step"] >= 12].tobytes()


def quiet_revalue(run, log, more):
    """Types revalue.py in this process, which then says everything to the end of a file."""
    torch.set_num_threads(1)  # as the run was: several threads sum in another order
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    config.main(lambda: revalue.main(config.load(revalue.Config, [str(run), *more])))


def test_a_replay_killed_goes_on_to_the_values_of_the_run(run, tmp_path):
    log = tmp_path / "log"
    folder = run / "revalued" / "killed"
    process = in_process(quiet_revalue, run, log, ["--replay", "--name=killed"])
    wait_for(folder / "ckpt.pt", process, log)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = in_process(quiet_revalue, run, log, ["--replay", "--name=killed"])
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert "96 visits: their losses are the run's to the bit" in log.read_text()
    assert (folder / "values.npy").read_bytes() == (run / "values.npy").read_bytes()


def test_a_replay_says_by_how_much_its_losses_differ(run, tmp_path):
    """As where the run was made on another machine."""
    other = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("revalued"))
    rows = np.load(other / "ledger.npy")
    rows["loss"][7] *= 1 + 1e-6
    np.save(other / "ledger.npy", rows)
    approximate = info(revalued(other, replay=True, name="again"))["approximate"]
    answer = r"losses differ from the run's by up to \d\.\de-0[5-7] nats"
    assert re.search(answer, approximate)


# --- a walk -----------------------------------------------------------------------


def trained_as_walked(python_data, folder, rule):
    """A run as a walk supposes it: with the same chunks of a target in every step, and without
    dropout. Returns its folder."""
    text = folder / "text.txt"
    text.write_text("import os\n" * 9)
    options = {
        **SMALL,
        "rule": rule,
        "tolerance": 0.0,
        "targets": f"val:Docstrings,text={text}",
        "target_batch": 5,
        "target_sampling": "fixed",
    }
    run = folder / "run"
    train.train(train.Config(**options, data_dir=str(python_data), out_dir=str(run)))
    return run


@pytest.mark.parametrize("rule", ["adamw", "adamw_linear", "sgd"])
def test_a_walk_is_exact_where_its_checkpoints_are(rule, python_data, tmp_path):
    run = trained_as_walked(python_data, tmp_path, rule)
    visits = store.read(run)
    walked = store.read(revalued(run, target_batch=5))
    np.testing.assert_array_equal(walked["chunk"], visits["chunk"])
    difference = np.abs(walked["value"] - visits["value"])
    # the checkpoint of step 24 comes after the last
    is_at = np.isin(visits["step"], (6, 12, 18))
    assert difference[is_at].max() < 1e-5 * np.abs(visits["value"][is_at]).max()
    assert difference[~is_at].max() > 1e-3 * np.abs(visits["value"][~is_at]).max()


def test_a_walk_says_that_it_is_approximate(run):
    folder = revalued(run, targets=f"val:Docstrings,{later_target(run)}")
    assert folder.name == "Docstrings+later"
    assert info(folder)["method"] == "walk"
    assert "steps 6, 12, 18, 24" in info(folder)["approximate"]


def test_a_walk_of_some_steps_has_their_rows_of_the_whole_walk(python_data, tmp_path):
    run = trained_as_walked(python_data, tmp_path, "adamw")
    whole = store.read(revalued(run))
    part = revalued(run, name="part", start=10, end=15)
    inside = (whole["step"] >= 10) & (whole["step"] < 15)
    assert store.read(part).tobytes() == whole[inside].tobytes()
    assert len(open_run(part).visits) == 20


def test_a_query_is_a_walk_for_its_text(run):
    opened = open_run(revalue.query(open_run(run), "def strip(text):\n    return text\n"))
    assert opened.names == ["query"]
    assert len(opened.used) == 96
    assert opened.info["method"] == "walk"


def test_a_query_is_made_once(run):
    opened = open_run(run)
    first = revalue.query(opened, "the same text")
    written = (first / "values.npy").stat().st_mtime_ns
    assert revalue.query(opened, "the same text") == first
    assert (first / "values.npy").stat().st_mtime_ns == written
    assert revalue.query(opened, "another text") != first


# --- tokens -----------------------------------------------------------------------


def chunk_values(run, opened, chunks):
    """The values of chunks at the newest checkpoint, each from its gradient by autograd, in a step
    of four chunks that have as many labels as all have on average: an array (K,) a chunk."""
    original = revalue.read(revalue.Config(run=str(run)))
    options = original.options
    targets = parse_targets(options.targets, opened.data, options.block_size)
    frozen = revalue.Frozen(options, opened.data, targets, 64, exact_rows=False)
    book = opened.books[original.last - 1]
    frozen.restore(original.checkpoints[original.last], book)
    frozen.model.eval()
    params = list(frozen.model.parameters())
    n_labels = opened.data.train.n_labels(options.block_size)
    values = []
    for chunk in chunks:
        loss = frozen.loss(*opened.data.train.batch([chunk], options.block_size))
        gradients = torch.autograd.grad(loss, params)
        products = [
            (p.h * gradient).flatten(1).sum(1, dtype=torch.float64)
            for p, gradient in zip(params, gradients)
        ]
        share = n_labels[chunk] / n_labels.mean() / 4
        values.append(sum(products).numpy() * book["lr"] * book["kappa"] * share)
    return values


@pytest.mark.parametrize("name, head", [("run", "whole"), ("run_of_two_passes", "chunked")])
def test_values_of_tokens_add_up_to_the_value_of_their_chunk(request, name, head, monkeypatch):
    run = request.getfixturevalue(name)
    monkeypatch.setattr(shapley.head, "FORM", head)
    opened = open_run(run)
    chunks = opened.used[:5].tolist()
    step, values = revalue.tokens(opened, chunks)
    assert step == 24
    assert values.shape == (5, 32, 2)
    for of_tokens, of_chunk in zip(values, chunk_values(run, opened, chunks)):
        scale = np.abs(of_tokens).sum(0).max()
        np.testing.assert_allclose(of_tokens.sum(0), of_chunk, rtol=1e-5, atol=1e-5 * scale)


def test_values_of_tokens_differ_within_a_chunk(run):
    opened = open_run(run)
    _, values = revalue.tokens(opened, opened.used[:5].tolist())
    size = np.abs(values)
    assert size.min() > 0
    assert (values.std(1) > 0.1 * size.mean(1)).all()


@dataclass
class Layer:
    """A layer, and the same layer whose weights at token t are W + eps_t H."""

    output: torch.Tensor
    scaled: torch.Tensor


def made_layer(op, tape, eps, weight, bias):
    """Its input is random. weight and bias have their directions in .h, with one target."""
    B, T, _ = eps.shape
    if op == "embedding":
        idx = torch.randint(0, len(weight), (B, T))
        scaled = F.embedding(idx, weight) + eps * F.embedding(idx, weight.h[0])
        return Layer(ghost.embedding(idx, weight, tape), scaled)
    x = torch.randn(B, T, weight.shape[-1]).double()
    if op == "linear":
        scaled = F.linear(x, weight, bias) + eps * F.linear(x, weight.h[0], bias.h[0])
        return Layer(ghost.linear(x, weight, bias, tape), scaled)
    normed = F.layer_norm(x, weight.shape)
    scaled = normed * weight + bias + eps * (normed * weight.h[0] + bias.h[0])
    return Layer(ghost.layer_norm(x, weight, bias, 1e-5, tape), scaled)


@pytest.mark.parametrize(
    "op, shape", [("linear", (4, 5)), ("embedding", (4, 5)), ("layer_norm", (5,))]
)
def test_the_value_of_a_token_is_the_derivative_of_the_loss_along_its_weights(op, shape):
    """By definition: token t reads W + eps_t H, and its value is dL / d eps_t."""
    torch.manual_seed(1)
    eps = torch.zeros(2, 3, 1, requires_grad=True, dtype=torch.float64)
    weight = torch.randn(shape).double().requires_grad_()
    bias = torch.randn(shape[0]).double().requires_grad_()
    weight.h = torch.randn(1, *shape).double()
    bias.h = torch.randn(1, shape[0]).double()
    tape = ghost.Tape()
    layer = made_layer(op, tape, eps, weight, bias)
    z = torch.randn_like(layer.output)
    (layer.output.tanh() * z).sum().backward()
    (expected,) = torch.autograd.grad((layer.scaled.tanh() * z).sum(), eps)
    torch.testing.assert_close(tape.values(each_token=True).view(2, 3, 1), expected)


# --- refusals ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, answer",
    [
        ([], "no run given"),
        (["{run}/nowhere"], "name the folder of a run"),
        (["{run}", "--targets=val:Nix"], "no domain 'Nix'"),
        (["{run}", "--targets=x=nowhere.txt"], "nowhere.txt: No such file"),
        (["{run}", "--end=25"], "the newest checkpoint is of step 24"),
        (["{run}", "--replay", "--start=7"], "there are checkpoints of steps 6, 12, 18, 24"),
        (["{run}", "--data_dir={run}"], "no prepared data"),
        (["{run}", "--device=tpu"], "is not on this machine"),
    ],
)
def test_wrong_input_is_answered_in_one_line(run, arguments, answer, capsys):
    argv = [argument.format(run=run) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: revalue.main(config.load(revalue.Config, argv)))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert answer in error
    assert error.count("\n") == 1
    assert not (run / "revalued" / "x").exists()


def test_a_run_without_a_checkpoint_is_refused(run, tmp_path):
    shutil.copy(run / "config.json", tmp_path)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        revalued(tmp_path)


def test_values_are_made_again_with_overwrite_only(run):
    revalued(run, name="twice", end=2)
    with pytest.raises(UserError, match="--overwrite makes them again"):
        revalued(run, name="twice", end=3)
    assert len(store.read(run / "revalued" / "twice")) == 8
    revalued(run, name="twice", end=3, overwrite=True)
    assert len(store.read(run / "revalued" / "twice")) == 12
