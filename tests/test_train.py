"""train.py for real: whole runs on real text, killed, resumed, starved of disk, and compared with
the rules by their definitions."""

import contextlib
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import piles
import pytest
import torch
from runs import (
    TWO_TARGETS,
    arguments,
    assert_same_run,
    in_process,
    quiet_run,
    read_bytes,
    run,
    server,
    wait_for,
    weights,
)
from torch._dynamo.utils import counters

import config
import data
import prepare_pile
import shapley.head
import train
from model import GPT, GPTConfig
from pile.installed import installed_text
from pile.records import opened
from shapley import exact, ghost, rules, sweeps
from show import progress
from system import machine, needs
from system.checkpoints import Checkpoints
from system.errors import UserError
from system.files import write_json
from system.folder import RunFolder
from system.store import read
from valuation import NoValuation, Valuation

SCRIPT = Path(train.__file__)


def run_argv(argv):
    return train.train(config.load(train.Config, argv))


def refused_argv(capsys, argv):
    """The one line that train.py leaves on stderr when it ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: run_argv(argv))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def refused(capsys, data_dir, out_dir, *more):
    """As refused_argv, of a small run."""
    return refused_argv(capsys, arguments(data_dir, out_dir, *more))


def relative_distance(values, truth):
    return np.linalg.norm(values - truth) / np.linalg.norm(truth)


def summed(visits, n_chunks):
    """The values that visits add up to, as values.npy has them: float32 (n_chunks, K),
    NaN where a chunk was never used."""
    total = np.full((n_chunks, *visits["value"].shape[1:]), np.nan)
    for visit in visits:
        before = np.nan_to_num(total[visit["chunk"]])
        total[visit["chunk"]] = before + visit["value"]
    return total.astype(np.float32)


# --- what a run leaves behind -------------------------------------------------


@dataclass
class ValuedRun:
    """Twelve steps of four chunks, for two targets, every third step measured."""

    folder: Path
    printed: list  # lines
    data: data.Dataset

    @property
    def values(self):
        return np.load(self.folder / "values.npy")

    @property
    def visits(self):
        return np.load(self.folder / "ledger.npy")

    @property
    def books(self):
        return np.load(self.folder / "books.npy")

    @property
    def measured(self):
        books = self.books
        return books[books["step"] % 3 == 0]


@pytest.fixture(scope="module")
def valued(python_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("valued") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(python_data, folder, TWO_TARGETS, "--book_interval=3")
    return ValuedRun(folder, printed.getvalue().splitlines(), data.open_dataset(python_data))


def test_the_ledger_has_a_row_for_each_chunk_of_each_step(valued):
    visits = valued.visits
    n_chunks = len(valued.data.train.rows)
    batches = [data.global_batch(step, 4, n_chunks, 1337) for step in range(12)]
    assert visits.dtype.names == ("step", "chunk", "loss", "value", "grad_norm", "early")
    assert (visits["step"] == np.repeat(np.arange(12), 4)).all()
    assert (visits["chunk"] == np.concatenate(batches)).all()
    assert (visits["grad_norm"] > 0).all()


def test_the_ledger_marks_the_first_three_steps_as_early(valued):
    visits = valued.visits
    assert (visits["early"] == (visits["step"] < 3)).all()


def test_values_are_the_sum_of_the_ledger(valued):
    n_chunks = len(valued.data.train.rows)
    values = valued.values
    assert values.shape == (n_chunks, 2)
    assert values.dtype == np.float32
    assert np.array_equal(values, summed(valued.visits, n_chunks), equal_nan=True)


def test_chunks_have_a_value_exactly_where_they_were_used(valued):
    values = valued.values
    used = np.isin(np.arange(len(values)), valued.visits["chunk"])
    assert (np.isfinite(values) == used[:, None]).all()


def test_books_have_the_sums_of_each_step(valued):
    visits = valued.visits
    books = valued.books
    assert np.allclose(books["data"], visits["value"].reshape(12, 4, 2).sum(1), rtol=1e-5)
    assert np.allclose(books["loss"], visits["loss"].reshape(12, 4).mean(1), rtol=1e-5)


def test_books_are_complete_in_measured_steps_only(valued):
    books = valued.books
    is_measured = books["step"] % 3 == 0
    for name in ("after", "momentum", "decay", "residual"):
        assert (np.isfinite(books[name]) == is_measured[:, None]).all(), name


def test_books_account_for_the_whole_drop(valued):
    measured = valued.measured
    parts = [measured[name] for name in ("data", "momentum", "decay", "residual")]
    assert np.allclose(measured["before"] - measured["after"], sum(parts), atol=1e-6)


def test_books_have_the_clip_coefficients(valued):
    kappa = valued.books["kappa"]
    assert (kappa <= 1).all()
    assert (kappa < 1).any()


def test_values_json_describes_the_values(valued):
    about = json.loads((valued.folder / "values.json").read_text())
    assert about["committed_step"] == 12
    assert about["unit"] == "nats"
    assert about["data_hash"] == valued.data.hash
    assert [target["name"] for target in about["targets"]] == ["Python code", "Docstrings"]


def test_the_end_of_a_run_prints_the_share_of_the_drop_that_is_accounted_for(valued):
    measured = valued.measured
    drop = (measured["before"] - measured["after"])[:, 0].sum()
    share = 1 - measured["residual"][:, 0].sum() / drop
    beginning = "books, Python code: values, momentum and weight decay add up to"
    beginning += f" {share:.1%} of the measured drop"
    assert any(line.startswith(beginning) for line in valued.printed)


def test_the_end_of_a_run_prints_the_values_of_each_domain(valued):
    """A table for each target. A line: the domain, its chunks, the median and its error, the share
    of negatives, the share of the steps' values, the mean and the sum."""
    values = valued.values.astype(float)
    used = np.isfinite(values[:, 0])
    for number, name in enumerate(valued.data.domains):
        of_domain = values[used & (valued.data.train.domain == number)]
        lines = [line for line in valued.printed if line.startswith(f"{name:24}")]
        assert len(lines) == (2 if len(of_domain) else 0)
        for line, v in zip(lines, of_domain.T):
            chunks, median, _, negative, _, mean, total = line[24:].replace(",", "").split()
            assert int(chunks) == len(v)
            assert float(median) == pytest.approx(1e6 * np.median(v), abs=0.06)
            assert negative == f"{(v < 0).mean():.0%}"
            assert float(mean.rstrip("*")) == pytest.approx(1e6 * v.mean(), abs=0.06)
            assert float(total) == pytest.approx(v.sum(), abs=1e-4)


def test_a_finished_run_ends_with_the_command_to_type_next(valued):
    assert valued.printed[-1] == f"next: python report.py {valued.folder}"
    assert valued.printed[-2].startswith(f"written to {valued.folder} in ")
    assert not any(line.startswith("stopped") for line in valued.printed)


def test_a_run_says_what_it_needs_and_what_it_is_about_to_do_before_it_does(valued):
    printed = valued.printed
    beginnings = ["needs at least", "evaluating ", "step 0: val"]
    beginnings += ["step 1/12 |", "step 2/12 |", "step 3/12 |", "about "]
    places = []
    for beginning in beginnings:
        places += [i for i, line in enumerate(printed) if line.startswith(beginning)][:1]
    assert len(places) == len(beginnings)
    assert places == sorted(places)
    assert printed[places[-1]].endswith("for all 12 steps at this speed")


def test_lines_of_a_run_on_a_cpu_have_no_mfu(valued):
    assert not any("mfu" in line or "nan" in line for line in valued.printed)


def source_texts(rows):
    """The texts of documents as the source has them, bytes by (domain, source). rows: of the table
    of documents."""
    wanted = {(row["domain"], row["source"]) for row in rows}
    texts = {}
    for document in opened(installed_text(), prepare_pile.Config(source="python")):
        key = (document.domain, document.source)
        if key in wanted:
            text = document.text
            texts[key] = text if isinstance(text, bytes) else text.encode()
        if len(texts) == len(wanted):
            break
    return texts


def laid_out(dataset):
    """What train.npy must hold: the documents' bytes where the table of documents places them, an
    <eot> behind each, -1 elsewhere."""
    rows = piles.table(dataset, "train")
    texts = source_texts(rows)
    width = dataset.train.rows.shape[1]
    expected = np.full(dataset.train.rows.shape, -1)
    for number, domain in enumerate(dataset.domains):
        chunks = np.flatnonzero(dataset.train.domain == number)
        stream = np.full(len(chunks) * width, -1)
        for row in rows:
            if row["domain"] == domain:
                start = np.searchsorted(chunks, row["first_chunk"]) * width + row["first_token"]
                tokens = [*texts[domain, row["source"]][: row["n_tokens"]], dataset.meta["eot"]]
                end = min(len(stream), start + len(tokens))
                stream[start:end] = tokens[: end - start]
        expected[chunks] = stream.reshape(-1, width)
    return expected


def test_chunks_of_the_ledger_hold_the_tokens_of_their_documents(valued):
    expected = laid_out(valued.data)
    chunks = valued.visits["chunk"]
    assert len(chunks) == 48
    np.testing.assert_array_equal(valued.data.train.rows[chunks], expected[chunks])


# --- what the values are ------------------------------------------------------


def tensors(arrays):
    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("rule", ["sgd", "sgd2", "adamw_linear", "adamw", "adamw2"])
def test_values_of_a_run_equal_the_rule_by_its_definition(python_data, tmp_path, rule):
    """The ledger's rows of step 5, computed from the checkpoint of step 5: the order of chunks,
    drawn targets, clipping and accumulation are as documented."""
    text = tmp_path / "own.txt"
    text.write_text("def main():\n    return 'a short text, padded and masked'\n")
    targets = f"val:Python code,val:Docstrings,own={text}"
    options = [f"--targets={targets}", f"--rule={rule}", "--dtype=float64", "--target_batch=3"]
    options += ["--lr_decay_iters=12", "--tolerance=0"]
    out = tmp_path / "run"
    run(python_data, out, *options, "--max_iters=5")
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    run(python_data, out, *options, "--max_iters=7", "--init_from=resume")
    books = np.load(out / "books.npy")

    dataset = data.open_dataset(python_data)
    model = GPT(GPTConfig(**checkpoint["model_args"])).double()
    model.load_state_dict(checkpoint["model"])
    optimizer = model.configure_optimizers(0.1, 0.0, (0.9, 0.95), "cpu")
    optimizer.load_state_dict(checkpoint["optimizer"])
    ids = data.global_batch(5, 4, len(dataset.train.rows), 1337)
    X, Y = tensors(dataset.train.batch(ids, 32))
    losses = []
    for k, target in enumerate(data.parse_targets(targets, dataset, 32)):
        rng = np.random.default_rng((1337, k, 5))
        picks = rng.choice(len(target), min(3, len(target)), replace=False)
        losses.append(exact.batch_loss(*tensors(target.batch(picks))))
    truth = rules.rule_values(
        model,
        optimizer,
        exact.chunk_gradients(model, X, Y),
        losses,
        rule,
        lr=float(books["lr"][5]),
        grad_clip=0.5,
        known=rules.known_rows(model, X, Y),
        squares=None if rule == "adamw" else rules.squares_by_use(model, X, Y),
    )
    rows = np.load(out / "ledger.npy")[5 * 4 : 6 * 4]
    assert books["kappa"][5] < 1
    assert (rows["chunk"] == ids).all()
    # the ledger is float32
    assert relative_distance(rows["value"], truth.numpy()) < 1e-6


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-4)])
def test_training_with_values_has_the_losses_of_training_without(
    python_data, tmp_path, dtype, tolerance
):
    """Over 50 steps. The valued backward adds the chunks' weight gradients in another order, so
    float32 differs in its last bits, which 50 steps let grow."""
    options = [f"--dtype={dtype}", "--max_iters=50", "--checkpoint_interval=50", "--dropout=0.1"]
    plain = run(python_data, tmp_path / "off", *options, TWO_TARGETS, "--rule=off")
    valued = run(python_data, tmp_path / "on", *options, TWO_TARGETS)
    assert len(plain) == 50
    assert [step for step, _ in plain] == [step for step, _ in valued]
    differences = np.array(plain) - np.array(valued)
    assert np.abs(differences).max() < tolerance


def test_training_without_values_writes_none(python_data, tmp_path, capsys):
    run(python_data, tmp_path / "run", "--rule=off", "--max_iters=2", "--n_layer=1")
    assert capsys.readouterr().out.endswith(f"next: python sample.py {tmp_path}/run\n")
    assert (tmp_path / "run" / "ckpt.pt").exists()
    assert not list((tmp_path / "run").glob("*.npy"))
    assert not (tmp_path / "run" / "values.json").exists()


def test_a_run_on_chosen_chunks_is_compared_with_the_one_they_were_chosen_from(tmp_path):
    (tmp_path / "evaluations.jsonl").write_text("")
    curated = train.Config(rule="off", keep=f"{tmp_path}/keep.npy", out_dir="out/curated")
    expected = f"python values.py losses {tmp_path} out/curated"
    assert train.next_command(curated) == expected
    resumed = train.Config(rule="off", keep=f"{tmp_path}/chunks.npy", out_dir=str(tmp_path))
    assert train.next_command(resumed) == f"python sample.py {tmp_path}"


@pytest.mark.parametrize("rule", ["adamw", "adamw2"])
def test_values_do_not_depend_on_how_a_batch_is_cut(python_data, tmp_path, rule):
    """The same global batch as 1, 2 and 4 micro-batches: the same rows of the ledger."""
    ledgers = []
    for n in (1, 2, 4):
        cut = [f"--batch_size={4 // n}", f"--gradient_accumulation_steps={n}"]
        run(python_data, tmp_path / str(n), "--dtype=float64", f"--rule={rule}", *cut)
        ledgers.append(np.load(tmp_path / str(n) / "ledger.npy"))
    for ledger in ledgers[1:]:
        assert (ledger["chunk"] == ledgers[0]["chunk"]).all()
        assert relative_distance(ledger["value"], ledgers[0]["value"]) < 1e-6


def test_values_sum_over_epochs(python_data, tmp_path):
    """Of a run with more visits than there are chunks, which meets every chunk."""
    n_chunks = len(data.open_dataset(python_data).train.rows)
    batch = 512
    steps = -(-n_chunks // batch) + 2
    cut = [f"--batch_size={batch}", "--gradient_accumulation_steps=1"]
    run(python_data, tmp_path / "run", *cut, f"--max_iters={steps}", "--n_layer=1")
    visits = read(tmp_path / "run")
    assert len(set(visits["chunk"][:n_chunks])) == n_chunks
    assert len(visits) > n_chunks
    values = np.load(tmp_path / "run" / "values.npy")
    np.testing.assert_array_equal(values, summed(visits, n_chunks))


def test_values_of_plain_sgd_sum_to_the_drop_of_the_loss_within_15_percent(python_data, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(40)))
    options = ["--optimizer=sgd", "--rule=sgd", "--decay_lr=False", "--learning_rate=0.05"]
    options += [f"--targets=t={text}", "--target_batch=1000", "--target_sampling=fixed"]
    options += ["--dtype=float64", "--max_iters=60", "--batch_size=8"]
    run(python_data, tmp_path / "run", *options)
    books = np.load(tmp_path / "run" / "books.npy")
    drop = books["before"][0, 0] - books["before"][-1, 0]
    assert drop > 0.1
    assert books["data"][:-1].sum() == pytest.approx(drop, rel=0.15)


# --- audits -------------------------------------------------------------------

DROPOUT = ["--rule=adamw2", "--dropout=0.2"]
# fourteen chunks a step: the truth is found by permutations
PERMUTED = ["--batch_size=7", "--audit_permutations=20"]
ENUMERATED = ["--grad_clip=0"]
BY_NAME = {"dropout": DROPOUT, "permuted": PERMUTED, "enumerated": ENUMERATED}


@dataclass
class AuditedRun:
    """Nine steps, two of them audited, and the same run without audits."""

    folder: Path
    history: list
    printed: str
    plain_folder: Path
    plain_history: list

    @property
    def audits(self):
        return np.load(self.folder / "audit.npy")


@pytest.fixture(scope="module", params=BY_NAME)
def audited(request, python_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audited")
    options = [TWO_TARGETS, "--max_iters=9", "--book_interval=3", *BY_NAME[request.param]]
    plain = run(python_data, folder / "plain", *options)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        history = run(python_data, folder / "audited", *options, "--audit_interval=4")
    return AuditedRun(folder / "audited", history, printed.getvalue(), folder / "plain", plain)


def test_an_audit_leaves_the_losses_and_files_of_a_run_as_they_are(audited):
    assert audited.history == audited.plain_history
    files = read_bytes(audited.folder)
    del files["audit.npy"]
    assert files == read_bytes(audited.plain_folder)


def test_audits_have_a_row_for_each_audited_step(audited):
    audits = audited.audits
    assert list(audits["step"]) == [3, 7]
    for name in ("pearson", "spearman", "loo_pearson"):
        assert (np.abs(audits[name]) <= 1).all(), name
    assert (audits["rel_l2"] > 0).all()
    assert np.isfinite(audits["efficiency_gap"]).all()


def test_an_audit_is_summed_up_at_the_end_of_a_run(audited):
    mean = audited.audits["pearson"][:, 1].mean()
    what = "audit, Docstrings: the values of 2 steps beside the exact ones"
    assert f"{what}: Pearson {mean:.4f} " in audited.printed


@pytest.mark.parametrize("audited", ["dropout", "enumerated"], indirect=True)
def test_the_truth_of_an_audit_has_no_error_where_all_subsets_are_tried(audited):
    assert (audited.audits["standard_error"] == 0).all()


@pytest.mark.parametrize("audited", ["permuted"], indirect=True)
def test_the_truth_of_an_audit_has_an_error_where_permutations_are_drawn(audited):
    assert (audited.audits["standard_error"] > 0).all()


@pytest.mark.parametrize("audited", ["enumerated"], indirect=True)
def test_audited_values_correlate_with_the_truth(audited):
    """In the last audit, for the first one is of the fourth step, where every rule is rough."""
    assert audited.audits["pearson"][-1].min() > 0.8


# --- stop and resume ----------------------------------------------------------

STOPPABLE = [
    TWO_TARGETS,
    "--rule=adamw2",
    "--dropout=0.2",
    "--book_interval=2",
    "--eval_interval=3",
]
STOPPABLE += ["--audit_interval=4", "--max_iters=5", "--lr_decay_iters=5", "--n_layer=1"]


def run_with_check(monkeypatch, check, python_data, out, *more):
    """A run whose Interrupted.check is another one."""
    with monkeypatch.context() as patch:
        patch.setattr(machine.Interrupted, "check", check)
        run(python_data, out, *STOPPABLE, *more)


@pytest.fixture(scope="module")
def undisturbed(python_data, tmp_path_factory):
    """A whole run, and how often it looked whether to stop."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    looked = []
    with pytest.MonkeyPatch.context() as patch:
        run_with_check(patch, lambda interrupted: looked.append(1), python_data, out)
    return out, len(looked)


def stopped_and_resumed(monkeypatch, is_asked, python_data, out):
    """A run that is asked to end when it looks and is_asked(interrupted); then it goes on."""
    check = machine.Interrupted.check

    def asked(interrupted):
        interrupted.is_asked = interrupted.is_asked or is_asked(interrupted)
        check(interrupted)

    run_with_check(monkeypatch, asked, python_data, out)
    run_argv([str(out / "config.json"), "--init_from=resume"])


def assert_same_run_and_evaluations(one, other):
    assert_same_run(one, other)
    evaluations = [path / "evaluations.jsonl" for path in (one, other)]
    assert evaluations[0].read_bytes() == evaluations[1].read_bytes()


# in steps, in an audit, in the last evaluation; the first step is another test
@pytest.mark.parametrize("share", [0.25, 0.4, 0.6, 0.8, 0.99])
def test_a_run_stopped_anywhere_goes_on_to_the_bytes_of_an_undisturbed_one(
    python_data, tmp_path, monkeypatch, undisturbed, share
):
    """The step that was under way leaves nothing behind, its random numbers neither."""
    whole, looks = undisturbed
    left = iter(range(int(share * looks)))
    out = tmp_path / "run"
    stopped_and_resumed(monkeypatch, lambda _: next(left, None) is None, python_data, out)
    assert_same_run_and_evaluations(out, whole)


def test_a_run_stopped_while_the_books_follow_an_update_keeps_both(
    python_data, tmp_path, monkeypatch, capsys, undisturbed
):
    """Weights and values move together: the stop waits until the step is whole."""
    out = tmp_path / "run"
    stopped_and_resumed(monkeypatch, lambda run: run.is_held, python_data, out)
    assert "stopped after step 1; to go on" in capsys.readouterr().out
    assert_same_run_and_evaluations(out, undisturbed[0])


def test_a_run_looks_whether_to_stop_before_every_forward(python_data, tmp_path, monkeypatch):
    """Of the evaluation, the targets, the step and the second pass; an audit has more."""
    forwards = [0]
    forward = GPT.forward

    def counted(model, *args):
        forwards[-1] += 1
        return forward(model, *args)

    monkeypatch.setattr(GPT, "forward", counted)
    run_with_check(
        monkeypatch,
        lambda _: forwards.append(0),
        python_data,
        tmp_path / "run",
        "--audit_interval=0",
    )
    assert len(forwards) > 50
    assert max(forwards) == 1


def test_a_run_stopped_before_its_first_step_ends_at_once(
    python_data, tmp_path, monkeypatch, capsys
):
    def asked(interrupted):
        interrupted.is_stopped = True
        raise machine.Stopped

    with pytest.raises(KeyboardInterrupt):
        run_with_check(monkeypatch, asked, python_data, tmp_path / "run")
    assert "nothing is saved" in capsys.readouterr().out.splitlines()[-1]
    assert not list((tmp_path / "run").glob("*.pt"))
    run(python_data, tmp_path / "run", *STOPPABLE)


def test_a_stopped_run_says_how_to_go_on_and_not_that_it_is_done(
    python_data, tmp_path, monkeypatch, capsys
):
    end_step = Valuation.end_step

    def ask(valuation):
        os.kill(os.getpid(), signal.SIGINT)
        end_step(valuation)

    monkeypatch.setattr(Valuation, "end_step", ask)
    run(python_data, tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    resume = f"python train.py {tmp_path}/run/config.json --init_from=resume"
    assert lines[-2] == f"stopped after step 1; to go on: {resume}"
    assert lines[-1] == f"next: python report.py {tmp_path}/run"
    assert "done" not in " ".join(lines).lower()


# --- kill and resume ----------------------------------------------------------

KILLED = [
    (0, 5, ["--rule=adamw_linear"]),
    (1, 1, ["--book_interval=2"]),
    (2, 4, ["--rule=adamw2", "--dropout=0.2", "--book_interval=3", "--audit_interval=15"]),
]


@pytest.mark.parametrize("seed, interval, more", KILLED)
def test_a_run_killed_six_times_ends_in_the_bytes_of_an_undisturbed_one(
    python_data, tmp_path, seed, interval, more
):
    """SIGKILL at random moments. With a checkpoint every step most of them are while one is
    written."""
    options = [TWO_TARGETS, "--max_iters=24", "--eval_interval=10", *more]
    options += [f"--checkpoint_interval={interval}"]
    log = tmp_path / "log"
    server()  # its imports are no part of the duration
    began = time.monotonic()
    undisturbed = in_process(quiet_run, arguments(python_data, tmp_path / "whole", *options), log)
    undisturbed.join()
    duration = time.monotonic() - began
    assert undisturbed.exitcode == 0, log.read_text()

    rng = random.Random(seed)
    out = tmp_path / "killed"
    argv = arguments(python_data, out, *options, "--init_from=auto")
    kills = 0
    while kills < 6:
        # a run that goes on has less to do than the first
        share = rng.uniform(0.15, 0.5) if kills else rng.uniform(0.24, 0.8)
        process = in_process(quiet_run, argv, log)
        process.join(share * duration)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        else:
            # it was done before it was killed: begin anew
            assert process.exitcode == 0, log.read_text()
            shutil.rmtree(out)
    last = in_process(quiet_run, argv, log)
    last.join()
    assert last.exitcode == 0, log.read_text()
    assert_same_run(out, tmp_path / "whole")


def test_values_of_a_killed_run_are_the_sum_of_its_ledger(python_data, tmp_path):
    """As of its last checkpoint, from which the run goes on without a step."""
    out = tmp_path / "run"
    log = tmp_path / "log"
    argv = arguments(python_data, out, "--max_iters=4000", "--checkpoint_interval=3")
    process = in_process(quiet_run, argv, log)
    wait_for(out / "ckpt.pt", process, log)
    time.sleep(0.3)  # some checkpoints later, at any moment
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    step = torch.load(out / "ckpt.pt", weights_only=True)["iter_num"]
    options = ["--init_from=resume", f"--max_iters={step}", "--lr_decay_iters=4000"]
    run(python_data, out, *options)
    visits = read(out)
    values = np.load(out / "values.npy")
    assert len(visits) == 4 * step
    assert np.array_equal(values, summed(visits, len(values)), equal_nan=True)


# --- a folder that holds a run already ----------------------------------------


@pytest.fixture(scope="module")
def finished(python_data, tmp_path_factory):
    """A run of twelve steps. Tests that write take a copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(python_data, folder)
    return folder


@pytest.fixture(scope="module")
def stopped(python_data, tmp_path_factory):
    """The first five steps of the same run."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(python_data, folder, "--max_iters=5", "--lr_decay_iters=12")
    return folder


@pytest.fixture
def finished_copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "finished")


@pytest.fixture
def stopped_copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "stopped")


def test_a_new_run_is_refused_in_the_folder_of_another(python_data, finished, capsys):
    before = read_bytes(finished)
    line = refused(capsys, python_data, finished)
    assert "--init_from=resume goes on, --overwrite starts over" in line
    assert read_bytes(finished) == before


@pytest.mark.parametrize(
    "argument, had",
    [
        ("--rule=sgd", "rule=adamw"),
        ("--n_embd=32", "n_embd=16"),
        ("--batch_size=4", "batch_size=2"),
        ("--seed=1", "seed=1337"),
        (TWO_TARGETS, "targets=val"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(python_data, finished, capsys, argument, had):
    before = read_bytes(finished)
    line = refused(capsys, python_data, finished, "--init_from=resume", argument)
    assert f"was run with {had}: type --{had}" in line
    assert read_bytes(finished) == before


def test_a_run_does_not_go_on_with_other_data(finished, tmp_path, capsys):
    options = {"tokenizer": "byte", "block_size": 32, "val_fraction": 0.1}
    other = prepare_pile.Config(
        source="python", limit_tokens=300_000, data_dir=str(tmp_path / "other"), **options
    )
    prepare_pile.prepare(other)
    capsys.readouterr()
    before = read_bytes(finished)
    line = refused(capsys, tmp_path / "other", finished, "--init_from=resume")
    assert "is not the data of" in line
    assert read_bytes(finished) == before


def test_a_finished_run_stays_as_it_is_when_it_is_resumed(python_data, finished_copy, capsys):
    before = read_bytes(finished_copy)
    run(python_data, finished_copy, "--init_from=resume")
    lines = capsys.readouterr().out.splitlines()
    resume = f"python train.py {finished_copy}/config.json --init_from=resume"
    assert lines[-2] == f"already at step 12; to go on: {resume} --max_iters=24"
    assert read_bytes(finished_copy) == before


def test_overwrite_starts_over(python_data, finished_copy):
    run(python_data, finished_copy, "--overwrite", "--max_iters=3")
    assert len(read(finished_copy)) == 12


def test_a_finished_run_goes_on_by_its_config_json_with_more_steps(finished_copy):
    run_argv([str(finished_copy / "config.json"), "--init_from=resume", "--max_iters=13"])
    assert len(read(finished_copy)) == 52


# --- runs of earlier versions -------------------------------------------------

REMOVED = {"target_interval": 1, "domain_momentum": False, "tensorboard_log": False}


def as_earlier_version(out, **removed):
    """Rewrites a run's config.json and newest checkpoint as an earlier version left them: with
    settings that are gone, and with entries of the valuation that nobody reads now."""
    content = torch.load(out / "ckpt.pt", weights_only=True)
    content["config"] = {**content["config"], **removed}
    content["valuation"] = {**content["valuation"], "grads": None, "domain_momentum": None}
    step = content["iter_num"]
    with RunFolder(out) as folder:
        Checkpoints(folder, 2, False, out / "ckpt.pt", step).write(step, content)
    about = json.loads((out / "config.json").read_text())
    del about["crc32"]
    about["config"] = {**about["config"], **removed}
    write_json(out / "config.json", about)


def test_a_run_of_an_earlier_version_goes_on_to_the_same_bytes(stopped_copy, finished):
    as_earlier_version(stopped_copy, **REMOVED)
    run_argv([str(stopped_copy / "config.json"), "--init_from=resume", "--max_iters=12"])
    assert_same_run(stopped_copy, finished)
    settings = json.loads((stopped_copy / "config.json").read_text())["config"]
    assert not REMOVED.keys() & settings.keys()


@pytest.mark.parametrize("read_from", ["config.json", "ckpt.pt"])
def test_a_run_that_needs_a_removed_setting_is_refused_by_its_name(
    python_data, stopped_copy, capsys, read_from
):
    """Where the settings come from config.json, and where only the checkpoint has it."""
    as_earlier_version(stopped_copy, **{**REMOVED, "target_interval": 4})
    before = (stopped_copy / "ckpt.pt").read_bytes()
    argv = [str(stopped_copy / "config.json"), "--init_from=resume"]
    if read_from == "ckpt.pt":
        argv = arguments(python_data, stopped_copy, "--init_from=resume")
    line = refused_argv(capsys, argv)
    assert f"{stopped_copy}/{read_from} is of a run with --target_interval=4" in line
    assert (stopped_copy / "ckpt.pt").read_bytes() == before


# --- wrong input --------------------------------------------------------------

WRONG = [
    ("--batch_sise=3", "did you mean 'batch_size'"),
    ("--learning_rate=fast", "--learning_rate=<float>"),
    ("--max_iters=2.5", "--max_iters=<int>"),
    ("--rule=adamw3", "choose one of off, sgd, sgd2, adamw_linear"),
    ("--block_size=64", "type --block_size=32"),
    ("--targets=val:Nothing", "it has Topics, Python code"),
    ("--targets=Python code", "write val, val:<domain> or <name>=<file.txt>"),
    ("--targets=val,val", "a name stands twice"),
    ("--targets=x={folder}/none.txt", "No such file"),
    ("--targets=x={folder}/empty.txt", "holds no text"),
    ("--targets=x={folder}/latin.txt", "UTF-8 text ('utf-8' codec can't decode byte"),
    ("--data_dir=nowhere", "python prepare_pile.py --data_dir=nowhere"),
    ("--n_head=3", "not a multiple"),
    ("--batch_size=0", "at least 1"),
    ("--learning_rate=nan", "not a float"),
    ("--optimizer=sgd", "write --rule=sgd"),
    ("--device=cuda:7", "--device=cpu"),
    ("--init_from=resume", "nothing to resume"),
]


@pytest.mark.parametrize("argument, answer", WRONG)
def test_wrong_input_is_answered_in_one_line(python_data, tmp_path, capsys, argument, answer):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    argument = argument.format(folder=tmp_path)
    assert answer in refused(capsys, python_data, tmp_path / "run", argument)
    assert not (tmp_path / "run").exists()


def test_compile_without_a_compiler_is_answered_in_one_line(
    python_data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    line = refused(capsys, python_data, tmp_path / "run", "--compile")
    assert "needs a C++ compiler" in line
    assert not (tmp_path / "run").exists()


def test_a_config_file_with_a_typo_is_refused_in_a_shell(tmp_path):
    (tmp_path / "mine.py").write_text("from configs.demo import *\nlearing_rate = 1\n")
    done = subprocess.run(
        [sys.executable, SCRIPT, "mine.py"], cwd=tmp_path, capture_output=True, text=True
    )
    answer = "unknown key 'learing_rate' in mine.py: did you mean 'learning_rate'?"
    assert done.returncode == 2
    assert done.stderr == f"error: {answer}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_a_folder_that_cannot_be_made_is_named(python_data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, python_data, tmp_path / "file" / "run")
    assert "/proc/run" in refused(capsys, python_data, "/proc/run")


def half(content):
    return content[: len(content) // 2]


def another_block_size(content):
    return content.replace(b'"block_size": 32', b'"block_size": 31')


@pytest.mark.parametrize(
    "name, damage, answer",
    [
        ("train.npy", half, "train.npy is missing or damaged"),
        ("val_domain.npy", None, "val_domain.npy is missing or damaged (No such file"),
        ("meta.json", half, "meta.json is damaged"),
        ("meta.json", another_block_size, "its checksum does not fit"),
    ],
)
def test_damaged_data_is_named(python_data, tmp_path, capsys, name, damage, answer):
    folder = shutil.copytree(python_data, tmp_path / "data")
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage:
        (folder / name).write_bytes(damage(content))
    assert answer in refused(capsys, folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- what does not fit ---------------------------------------------------------

LARGE = [
    ("--batch_size=1e9", "write --batch_size="),
    ("--gradient_accumulation_steps=100000", "--gradient_accumulation_steps=1"),
    ("--n_embd=1000000", "GB of memory"),
    ("--n_embd=20000", "GB of memory"),
    ("--n_layer=1000000000", "GB of memory"),
]


@pytest.mark.parametrize("argument, answer", LARGE)
def test_what_no_memory_or_data_can_hold_is_refused_before_anything_is_written(
    python_data, tmp_path, capsys, monkeypatch, argument, answer
):
    monkeypatch.setattr(needs, "memory_here", lambda device: 24e9)
    assert answer in refused(capsys, python_data, tmp_path / "run", argument)
    assert not (tmp_path / "run").exists()


def test_a_run_whose_memory_ends_says_what_to_type(python_data, tmp_path, capsys, monkeypatch):
    """Where the estimate was too low. Another error of torch keeps its traceback."""

    def allocate(*args):
        return torch.empty(2**60)

    def multiply(*args):
        return torch.ones(2, 3) @ torch.ones(2, 3)

    monkeypatch.setattr(GPT, "forward", allocate)
    line = refused(capsys, python_data, tmp_path / "run")
    assert "the memory of the device is full: halve --batch_size" in line
    monkeypatch.setattr(GPT, "forward", multiply)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(python_data, tmp_path / "run")


def test_a_step_may_hold_all_chunks_once(python_data):
    n_chunks = len(data.open_dataset(python_data).train.rows)
    needs.check_batch(train.Config(batch_size=n_chunks), n_chunks)
    with pytest.raises(UserError, match="one would be in it twice"):
        needs.check_batch(train.Config(batch_size=n_chunks + 1), n_chunks)


def test_a_batch_that_no_memory_can_hold_is_refused():
    cfg = config.load(train.Config, ["configs/gpt2_inrun.py", "--device=cpu"])
    needs.check_memory(cfg, 50304, 1)
    cfg.batch_size = 10**6
    with pytest.raises(UserError, match="write smaller numbers"):
        needs.check_memory(cfg, 50304, 1)


def test_the_estimate_of_memory_is_below_what_a_model_takes():
    """Else a run would be refused that works: weights, gradients, moments and a direction."""
    cfg = config.load(train.Config, ["configs/small.py", "--block_size=64", "--device=cpu"])
    cfg.batch_size, cfg.rule = 1, "adamw"

    class Data:
        meta = {"vocab_size": 256}

    model = train.build_model(cfg, Data, "cpu")
    taken = 4 * 5 * sum(p.numel() for p in model.parameters())
    estimate = needs.memory(cfg, 256, n_targets=1, processes=1)
    assert 0.8 * taken < estimate < 1.2 * taken


def test_the_estimate_of_disk_is_what_a_run_leaves(valued):
    cfg = config.load(train.Config, [str(valued.folder / "config.json")])
    vocab_size = weights(valued.folder)["lm_head.weight"].shape[0]
    n_chunks = len(valued.data.train.rows)
    kept = sum(path.stat().st_size for path in valued.folder.iterdir() if path.is_file())
    estimate = needs.disk(cfg, vocab_size, 2, n_chunks)
    assert 0.5 * kept < estimate < 3 * kept


def test_a_run_warns_of_a_disk_that_will_be_full(valued, monkeypatch):
    cfg = config.load(train.Config, [str(valued.folder / "config.json")])
    lines = needs.expected(cfg, valued.folder, 256, 2, 1000)
    assert len(lines) == 1
    usage = shutil.disk_usage(valued.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=0))
    cfg.max_iters = 10**6
    lines = needs.expected(cfg, valued.folder, 256, 2, 1000)
    assert lines[1].startswith("warning: the disk of")


# --- lines of a run -------------------------------------------------------------


@pytest.mark.parametrize("n_domains", [1, 6, 20, 200])
def test_lines_of_an_evaluation_fit_100_columns(n_domains):
    losses = {f"{i} a long name of a domain": 9.0 - i / 100 for i in range(n_domains)}
    lines = progress.evaluation_lines(250, 4.12341, losses)
    assert lines[0] == "step 250: val loss 4.1234"
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 3
    told = " ".join(lines)
    if n_domains <= 6:
        assert all(f"{loss:.3f}" in told for loss in losses.values())
    else:
        assert lines[1].startswith(f"  lowest: {n_domains - 1} a long")
        assert lines[2].startswith("  highest: 0 a long")


def test_a_domain_in_a_line_of_an_evaluation_moves_no_cursor():
    assert "\x1b" not in "".join(progress.evaluation_lines(0, 1.0, {"\x1b[2J": 1.0}))


@pytest.mark.parametrize(
    "seconds, text",
    [(3.2, "3 s"), (89, "89 s"), (720, "12 min"), (7800, "2 h 10 min"), (273_600, "3 days 4 h")],
)
def test_times_are_told_as_people_say_them(seconds, text):
    assert progress.duration(seconds) == text


def test_a_run_of_days_names_a_smaller_one():
    cfg = config.load(train.Config, ["configs/gpt2_inrun.py", "--device=cpu"])
    line = progress.Progress(None, cfg, 0, float("nan")).estimate(60.0)
    assert line.startswith("about 347 days 5 h for all 500,000 steps")
    assert line.endswith("For a first look: python train.py configs/small.py --data_dir=data/pile")


# --- losses that are not finite, a full disk ----------------------------------

STEEP = ["--optimizer=sgd", "--grad_clip=0", "--decay_lr=False", "--learning_rate=1e-3"]
STEEP += ["--lr_decay_iters=3"]


def overflowing(python_data, out, *more):
    """A run of three steps whose next losses overflow: its weights are as if they had diverged."""
    run(python_data, out, *STEEP, *more, "--max_iters=3")
    content = torch.load(out / "ckpt.pt", weights_only=True)
    content["model"]["transformer.ln_f.weight"][0] = 3e38
    content["config"]["max_iters"] = 9
    with RunFolder(out) as folder:
        Checkpoints(folder, 1, False, out / "ckpt.pt", 3).write(3, content)


@pytest.mark.parametrize("rule", ["sgd", "off"])
def test_a_loss_that_is_not_finite_leaves_the_checkpoint_before_it(
    python_data, tmp_path, capsys, rule
):
    out = tmp_path / "run"
    overflowing(python_data, out, f"--rule={rule}")
    before = (out / "ckpt.pt").read_bytes()
    options = [*STEEP, f"--rule={rule}", "--max_iters=9", "--init_from=resume"]
    line = refused(capsys, python_data, out, *options)
    assert "not finite" in line
    assert "step" in line
    assert (out / "ckpt.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_is_refused_with_its_chunks(python_data, tmp_path, capsys):
    out = tmp_path / "run"
    overflowing(python_data, out, "--rule=sgd")
    options = [*STEEP, "--rule=sgd", "--max_iters=9", "--init_from=resume"]
    line = refused(capsys, python_data, out, *options)
    n_chunks = len(data.open_dataset(python_data).train.rows)
    assert line.startswith("error: step 3: the loss of chunks")
    for chunk in data.global_batch(3, 4, n_chunks, 1337):
        assert str(chunk) in line
    assert len(read(out)) == 12


def starved_run(argv, log, limit):
    """No file may grow beyond a limit, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    quiet_run(argv, log)


@pytest.mark.parametrize("full", ["in the checkpoint", "in the ledger"])
def test_a_full_disk_loses_nothing(python_data, stopped_copy, finished, tmp_path, full):
    """One line and exit code 2. The checkpoint before is whole, and the run goes on from it."""
    log = tmp_path / "log"
    limit = 2_000
    if full == "in the checkpoint":
        limit = max((stopped_copy / "ckpt.pt").stat().st_size // 2, 100_000)
    options = ["--init_from=resume", "--lr_decay_iters=12"]
    argv = arguments(python_data, stopped_copy, *options)
    process = in_process(starved_run, argv, log, limit)
    process.join()
    last_line = log.read_text().strip().splitlines()[-1]
    assert process.exitcode == 2
    assert last_line.startswith("error: ")
    assert "File too large" in last_line
    assert torch.load(stopped_copy / "ckpt.pt", weights_only=True)["iter_num"] == 5
    assert not list(stopped_copy.glob("*.tmp"))
    run(python_data, stopped_copy, *options)
    assert_same_run(stopped_copy, finished)


# --- compiled, in low precision -----------------------------------------------


def backend(monkeypatch, name):
    """Compiles by another backend: aot_eager has the graphs of inductor and no C++ to compile."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=name))
    monkeypatch.setattr(sweeps, "compiled", functools.cache(sweeps.compiled.__wrapped__))


@pytest.mark.parametrize(
    "rule, head, beta, compiler, tolerance",
    [
        ("adamw", "whole", 0, "inductor", 0),
        ("adamw2", "chunked", 0.9, "inductor", 0),
        ("adamw", "chunked", 0.9, "aot_eager", 0),
        ("adamw2", "chunked", 0, "aot_eager", 0),
        ("adamw", "whole", 0.9, "aot_eager", 1e-9),  # each step is valued in two passes
        ("adamw", "chunked", 0, "aot_eager", 1e-9),
    ],
)
def test_a_compiled_run_equals_an_eager_one_and_compiles_nothing_after_three_steps(
    python_data, tmp_path, monkeypatch, rule, head, beta, compiler, tolerance
):
    """In float64, for in float32 AdamW's first step takes the sign of elements that are zero but
    for rounding, which the two round differently. A graph break is an error (fullgraph). Second
    passes read a tape in each step, as in eager mode."""
    options = [f"--rule={rule}", TWO_TARGETS, "--n_layer=1", "--max_iters=8", "--book_interval=2"]
    options += ["--batch_size=4", "--gradient_accumulation_steps=1"]
    options += ["--eval_interval=0", "--dtype=float64", f"--target_smoothing={beta}"]
    options += [f"--tolerance={tolerance}"]
    graphs = []  # how many there are at the beginning of each step
    tapes = []  # how many operations has each tape that is read
    get_lr = train.get_lr
    tape_values = ghost.Tape.values

    def counting_graphs(cfg, iter_num):
        graphs.append(counters["stats"]["unique_graphs"])
        return get_lr(cfg, iter_num)

    def counting_ops(tape, **options):
        tapes.append(len(tape.ops))
        return tape_values(tape, **options)

    torch._dynamo.reset()  # its limit of 8 graphs a function is for all tests together
    monkeypatch.setattr(shapley.head, "FORM", head)
    run(python_data, tmp_path / "eager", *options)
    monkeypatch.setattr(train, "get_lr", counting_graphs)
    monkeypatch.setattr(ghost.Tape, "values", counting_ops)
    backend(monkeypatch, compiler)
    run(python_data, tmp_path / "compiled", *options, "--compile")

    eager = read(tmp_path / "eager")
    compiled = read(tmp_path / "compiled")
    for column in ["value", "smoothed"] if beta else ["value"]:  # the ledger is float32
        assert relative_distance(compiled[column], eager[column]) < 1e-6
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "eager").keys()
    assert len(graphs) == 8 + 1  # the last time is after the last step
    assert graphs[3] > 0
    assert graphs[3] == graphs[-1]
    assert len(tapes) == (8 if rule == "adamw2" or tolerance else 0)
    assert len(set(tapes)) <= 1


def test_bfloat16_trains_float32_weights(python_data, tmp_path):
    history = run(python_data, tmp_path / "run", "--dtype=bfloat16", "--max_iters=30")
    assert history[-1][1] < history[0][1]
    assert weights(tmp_path / "run")["lm_head.weight"].dtype == torch.float32


# --- the order of chunks, and how a batch is cut ------------------------------


def order(steps, batch, n_chunks, seed=7):
    """The chunks of the first steps, one after another."""
    return np.concatenate([data.global_batch(s, batch, n_chunks, seed) for s in range(steps)])


def test_each_epoch_is_another_permutation_of_all_chunks():
    ids = order(steps=42, batch=48, n_chunks=1000)
    first = ids[:1000]
    second = ids[1000:2000]
    assert sorted(first) == list(range(1000))
    assert sorted(second) == list(range(1000))
    assert (first != second).mean() > 0.9


def test_the_order_does_not_depend_on_the_batch():
    assert (order(42, 48, 1000) == order(21, 96, 1000)).all()


def test_the_order_depends_on_the_seed():
    assert (order(42, 48, 1000, seed=8) != order(42, 48, 1000)).mean() > 0.9


def test_a_late_step_of_a_large_set_costs_no_more_than_the_first(monkeypatch):
    """A position walks through the network until it lands in the set: in 8 rounds each time, and on
    the average at most 4 times."""
    mixed = []
    mix = data.mix

    def counting_mix(z):
        mixed.append(len(z))
        return mix(z)

    monkeypatch.setattr(data, "mix", counting_mix)
    ids = data.global_batch(10**6, 480, 300_000_000, 1)
    assert ids.min() >= 0
    assert ids.max() < 300_000_000
    assert 8 * 480 <= sum(mixed) < 8 * 480 * 5


def test_batches_are_as_even_as_chance():
    """Each has about as many chunks of the first half of the set as of the second."""
    ids = order(steps=100, batch=100, n_chunks=10_000, seed=1).reshape(100, 100)
    share = (ids < 5000).mean(1)
    assert share.mean() == pytest.approx(0.5, abs=0.01)
    assert share.std() < 0.1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 12, 64])
def test_micro_batches_are_equal_and_as_few_as_the_batch_size_allows(batch_size):
    for n_chunks in range(1, 31):
        chunks = np.arange(n_chunks)
        micro_batches = [chunks[rows] for rows in train.micro_batches(n_chunks, batch_size)]
        sizes = {len(micro_batch) for micro_batch in micro_batches}
        assert (np.concatenate(micro_batches) == chunks).all()
        assert len(sizes) == 1
        assert max(sizes) <= batch_size
        for fewer in range(1, len(micro_batches)):
            is_equal = n_chunks % fewer == 0
            assert not is_equal or n_chunks // fewer > batch_size


def test_no_valuation_does_nothing():
    valuation = NoValuation()
    valuation.begin_step(0, 1.0)
    assert valuation.new_ledger(np.arange(4), None, None) is None
    valuation.before_update()
    valuation.end_step()
    valuation.commit()
    assert valuation.flush().visits is None
    assert valuation.state_dict() == {}
