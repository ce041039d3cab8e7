"""Values that come later: a replay is the run again, a walk is right where its checkpoints are, and tokens add up to their chunk."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config
import revalue
import shapley.head
import train
from shapley import ghost
from show.run import open_run
from system import store

SCRIPT = Path(revalue.__file__)
SMALL = dict(
    n_layer=2,
    n_head=2,
    n_embd=16,
    batch_size=2,
    gradient_accumulation_steps=2,
    max_iters=24,
    warmup_iters=5,
    learning_rate=5e-3,
)
SMALL |= dict(
    eval_interval=6,
    eval_chunks=2,
    checkpoint_interval=6,
    keep_checkpoints=9,
    book_interval=4,
    grad_clip=0.5,
    device="cpu",
    dtype="float32",
)
TARGETS = "val:Python code,val:Docstrings"


def trained(python_data, folder, rule):
    """A run with everything that random numbers and moments can do wrong."""
    options = SMALL | dict(rule=rule, targets=TARGETS, dropout=0.1, target_batch=2)
    train.train(train.Config(**options, data_dir=str(python_data), out_dir=str(folder / rule)))
    (folder / "later.txt").write_text("def later(text):\n    return text.strip()\n" * 3)
    return folder / rule


@pytest.fixture(scope="module")
def run(python_data, tmp_path_factory):
    return trained(python_data, tmp_path_factory.mktemp("revalue"), "adamw")


@pytest.fixture(scope="module")
def run2(python_data, tmp_path_factory):
    return trained(python_data, tmp_path_factory.mktemp("revalue"), "adamw2")


def column(folder, name):
    return store.read(folder)[name]


@pytest.mark.parametrize("of", ["run", "run2"])
def test_a_replay_is_the_run_to_the_byte(request, of):
    run = request.getfixturevalue(of)
    folder = revalue.revalue(revalue.Config(run=str(run), replay=True, name="again"))
    for name in ("values.npy", "ledger.npy", "books.npy"):
        assert (folder / name).read_bytes() == (run / name).read_bytes(), name
    info = json.loads((folder / "values.json").read_text())
    assert (info["method"], info["approximate"], info["of"]) == ("replay", None, str(run))
    assert not (folder / "ckpt.pt").exists()


def test_a_new_target_does_not_disturb_the_old_ones(run):
    later = f"later={run.parent}/later.txt"
    folder = revalue.revalue(
        revalue.Config(run=str(run), replay=True, targets=f"{TARGETS},{later}", name="three")
    )
    assert column(folder, "loss").tobytes() == column(run, "loss").tobytes()
    np.testing.assert_array_equal(column(folder, "value")[:, :2], column(run, "value"))
    alone = revalue.revalue(revalue.Config(run=str(run), replay=True, targets=later))
    assert alone.name == "later"
    assert open_run(alone).names == ["later"]
    assert np.isfinite(np.load(alone / "values.npy")[open_run(run).used]).all()


def test_a_replay_from_a_checkpoint_is_the_runs_end(run, capsys):
    folder = revalue.revalue(revalue.Config(run=str(run), replay=True, start=12, name="end"))
    assert "48 visits: their losses are the run's to the bit" in capsys.readouterr().out
    assert column(folder, "step")[0] == 12
    assert store.read(folder).tobytes() == store.read(run)[48:].tobytes()
    opened = open_run(folder)
    assert len(opened.visits) == 48
    assert len(opened.books) == 12
    total, used = np.zeros((len(opened.values), 2)), np.zeros(len(opened.values), bool)
    store.add_visits(store.read(run)[48:], total, used)
    np.testing.assert_array_equal(opened.used, np.flatnonzero(used))
    np.testing.assert_array_equal(opened.values[used], total[used].astype(np.float32))


def test_a_replay_for_a_new_text_from_a_checkpoint_has_the_rows_of_the_whole_replay(run):
    mine = f"mine={run.parent}/later.txt"
    whole = revalue.revalue(
        revalue.Config(run=str(run), replay=True, targets=mine, name="mine-whole")
    )
    end = revalue.revalue(revalue.Config(run=str(run), replay=True, targets=mine, start=12))
    assert end.name == "mine"
    rows = store.read(whole)
    assert store.read(end).tobytes() == rows[rows["step"] >= 12].tobytes()
    assert column(end, "step")[0] == 12


def test_a_replay_killed_goes_on(run):
    command = [sys.executable, SCRIPT, f"{run}", "--replay", "--name=killed"]
    folder = run / "revalued" / "killed"
    alone = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # as the run was: several threads sum in another order
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=alone
    )
    while not (folder / "ckpt.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    assert (
        done.returncode == 0 and "96 visits: their losses are the run's to the bit" in done.stdout
    ), done.stderr
    assert (folder / "values.npy").read_bytes() == (run / "values.npy").read_bytes()


def test_a_replay_that_went_another_way_says_so(run, capsys):
    """A run whose losses were other ones: of another machine, say."""
    path = run / "ledger.npy"
    was = path.read_bytes()
    rows = np.load(path)
    rows["loss"][7] *= 1 + 1e-6
    try:
        np.save(path, rows)
        folder = revalue.revalue(revalue.Config(run=str(run), replay=True, name="other"))
    finally:
        path.write_bytes(was)
    assert re.search(
        r"losses differ from the run's by up to \d\.\de-0[5-7] nats",
        json.loads((folder / "values.json").read_text())["approximate"],
    )


@pytest.mark.parametrize("rule", ["adamw", "adamw_linear", "sgd"])
def test_a_walk_is_exact_where_its_checkpoints_are(rule, python_data, tmp_path):
    """With the same chunks of the target in every step of the run, as a walk has it."""
    options = dict(
        targets=f"val:Docstrings,text={tmp_path}/text.txt",
        target_batch=5,
        target_sampling="fixed",
        data_dir=str(python_data),
        out_dir=str(tmp_path / "run"),
    )
    (tmp_path / "text.txt").write_text("import os\n" * 9)
    train.train(train.Config(**SMALL | options, rule=rule))
    folder = revalue.revalue(revalue.Config(run=str(tmp_path / "run"), target_batch=5))
    was, now = store.read(tmp_path / "run"), store.read(folder)
    np.testing.assert_array_equal(was["chunk"], now["chunk"])
    at = np.isin(was["step"], (6, 12, 18))  # the checkpoint of step 24 comes after the last
    assert np.abs(was["value"] - now["value"])[at].max() < 1e-5 * np.abs(was["value"][at]).max()
    assert (
        np.abs(was["value"] - now["value"])[~at].max() > 1e-3 * np.abs(was["value"][~at]).max()
    )  # and approximate elsewhere
    info = json.loads((folder / "values.json").read_text())
    assert info["method"] == "walk"
    assert "steps 6, 12, 18, 24" in info["approximate"]
    assert folder.name == "Docstrings+text"
    part = revalue.revalue(
        revalue.Config(run=str(tmp_path / "run"), start=10, end=15, name="part", target_batch=5)
    )
    assert store.read(part).tobytes() == now[(now["step"] >= 10) & (now["step"] < 15)].tobytes()
    assert len(open_run(part).visits) == 20


def test_a_query_is_made_once(run, capsys):
    of = open_run(run)
    first = revalue.query(of, "def strip(text):\n    return text\n")
    before = (first / "values.npy").stat().st_mtime_ns
    assert revalue.query(of, "def strip(text):\n    return text\n") == first
    assert (first / "values.npy").stat().st_mtime_ns == before
    assert revalue.query(of, "other") != first
    opened = open_run(first)
    assert opened.names == ["query"]
    assert len(opened.used) == 96
    assert opened.info["method"] == "walk"


# --- tokens ---------------------------------------------------------------------


@pytest.mark.parametrize("of, head", [("run", "whole"), ("run2", "chunked")])
def test_tokens_add_up_to_their_chunk(request, of, head, monkeypatch):
    run = request.getfixturevalue(of)
    monkeypatch.setattr(shapley.head, "FORM", head)
    opened = open_run(run)
    chunks = opened.used[:5].tolist()
    step, found = revalue.tokens(opened, chunks)
    assert (step, found.shape) == (24, (5, 32, 2))
    # the same weights and directions, but each chunk's gradient by autograd
    original = revalue.read(revalue.Config(run=str(run)))
    options, checkpoints = original.options, original.checkpoints
    targets = revalue.parse_targets(options.targets, opened.data, options.block_size)
    frozen = revalue.Frozen(options, opened.data, targets, 64, exact_rows=False)
    book = opened.books[23]
    frozen.restore(checkpoints[24], book)
    frozen.model.eval()
    for chunk, of_tokens in zip(chunks, found):
        loss = frozen.loss(*opened.data.train.batch([chunk], 32))
        gradients = torch.autograd.grad(loss, list(frozen.model.parameters()))
        value = sum(
            (p.h * g).flatten(1).sum(1, dtype=torch.float64)
            for p, g in zip(frozen.model.parameters(), gradients)
        )
        value = value.numpy() * book["lr"] * book["kappa"] / 4
        np.testing.assert_allclose(
            of_tokens.sum(0), value, rtol=1e-5, atol=1e-5 * np.abs(of_tokens).sum(0).max()
        )
        assert np.abs(of_tokens).min() > 0
        assert (of_tokens.std(0) > 0.1 * np.abs(of_tokens).mean(0)).all()


@pytest.mark.parametrize("op", ["linear", "embedding", "layer_norm"])
def test_a_tokens_value_is_the_derivative_by_its_own_scale(op):
    """math: y_t = x_t (W + eps_t H)^T, dL / d eps_t."""
    torch.manual_seed(1)
    B, T, I, O = 2, 3, 5, 4
    x, idx, eps = (
        torch.randn(B, T, I).double(),
        torch.randint(0, O, (B, T)),
        torch.zeros(B, T, 1, requires_grad=True, dtype=torch.float64),
    )
    shape = dict(linear=(O, I), embedding=(O, I), layer_norm=(I,))[op]
    weight, bias = (
        torch.randn(shape).double().requires_grad_(),
        torch.randn(shape[0]).double().requires_grad_(),
    )
    weight.h, bias.h, tape = (
        torch.randn(1, *shape).double(),
        torch.randn(1, shape[0]).double(),
        ghost.Tape(),
    )
    if op == "linear":
        y, scaled = (
            ghost.linear(x, weight, bias, tape),
            F.linear(x, weight, bias) + eps * F.linear(x, weight.h[0], bias.h[0]),
        )
    elif op == "embedding":
        y, scaled = (
            ghost.embedding(idx, weight, tape),
            F.embedding(idx, weight) + eps * F.embedding(idx, weight.h[0]),
        )
    else:
        normed = F.layer_norm(x, (I,))
        y, scaled = (
            ghost.layer_norm(x, weight, bias, 1e-5, tape),
            normed * weight + bias + eps * (normed * weight.h[0] + bias.h[0]),
        )
    z = torch.randn_like(y)
    (y.tanh() * z).sum().backward()
    (expected,) = torch.autograd.grad((scaled.tanh() * z).sum(), eps)
    torch.testing.assert_close(tape.values(each_token=True).view(B, T, 1), expected)


# --- what cannot be done ----------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, answer",
    [
        ([], "no run given"),
        (["{run}/nowhere"], "name the folder of a run"),
        (["{run}", "--targets=val:Nix"], "no domain 'Nix'"),
        (["{run}", "--targets=x=nowhere.txt"], "cannot be read"),
        (["{run}", "--end=25"], "the newest checkpoint is of step 24"),
        (["{run}", "--replay", "--start=7"], "there are checkpoints of steps 6, 12, 18, 24"),
        (["{run}", "--data_dir={run}"], "no prepared data"),
        (["{run}", "--device=tpu"], "is not on this machine"),
    ],
)
def test_what_cannot_be_done_says_what_to_type(run, arguments, answer, capsys):
    with pytest.raises(SystemExit) as stop:
        config.main(
            lambda: revalue.main(
                config.load(revalue.Config, [argument.format(run=run) for argument in arguments])
            )
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert answer in error
    assert error.count("\n") == 1
    assert not (run / "revalued" / "x").exists()


def test_a_run_without_checkpoint_or_with_values_already(run, tmp_path, capsys):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        revalue.revalue(revalue.Config(run=str(tmp_path)))
    revalue.revalue(revalue.Config(run=str(run), name="twice", end=2))
    with pytest.raises(ValueError, match="--overwrite makes them again"):
        revalue.revalue(revalue.Config(run=str(run), name="twice"))
    revalue.revalue(revalue.Config(run=str(run), name="twice", end=3, overwrite=True))
    assert len(store.read(run / "revalued" / "twice")) == 12
