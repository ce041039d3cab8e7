"""Hindsight of a run on disk: the same whatever the memory, killed or not, alone or with others;
and what it says of itself."""

import os
import random
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import become_rank, free_port, in_process
from test_revalue import SMALL, info, quiet_revalue, revalued

import config
import lookback
import revalue
import train
from data import open_dataset, parse_targets
from lookback import Segment, plan
from shapley.counterfactual import agreement
from show.hindsight import read_check
from system import parallel, store
from system.errors import UserError

DROPOUT = {"dropout": 0.1, "rule": "adamw", "target_batch": 2}
DOUBLE = {"dtype": "float64", "rule": "sgd"}
TEXTS = {  # the targets
    "code": "def least(numbers):\n    return sorted(numbers)[0]\n" * 3,
    "prose": "It returns the least of the numbers, if there is one.\n" * 3,
}


def trained(python_data, folder, **options):
    """A run of 24 steps in a folder, with a checkpoint at every sixth and two targets."""
    targets = []
    for name, text in TEXTS.items():
        path = folder.parent / f"{name}.txt"
        path.write_text(text)
        targets.append(f"{name}={path}")
    options = {**SMALL, "eval_interval": 0, "targets": ",".join(targets), **options}
    train.train(train.Config(**options, data_dir=str(python_data), out_dir=str(folder)))
    return folder


def targets_of(run):
    return train.Config.of_run(run / "config.json")["targets"]


@pytest.fixture(scope="module")
def run(python_data, tmp_path_factory):
    return trained(python_data, tmp_path_factory.mktemp("lookback") / "run", **DROPOUT)


@pytest.fixture(scope="module")
def whole(run):
    """The folder of its hindsight."""
    return revalued(run, hindsight=True, name="whole")


def everything(folder):
    """{name: content} of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def memory_of(steps, run, n_targets=2):
    """GB that so many steps take."""
    weights = torch.load(run / "ckpt.pt", weights_only=True)["model"]
    size = sum(p.numel() for name, p in weights.items() if name != "lm_head.weight")  # it is wte's
    return (4 * size * (3 * n_targets + 4) + steps * 16 * size) / 1e9 * 1.001


# --- segments -----------------------------------------------------------------------


def test_segments_begin_at_states_that_are_on_disk():
    assert plan(0, 10, [0], 100) == [Segment(0, 10, 0)]
    assert plan(0, 10, [0, 6], 100) == [Segment(0, 6, 0), Segment(6, 10, 6)]
    assert plan(2, 7, [0, 6], 3) == [Segment(2, 5, 0), Segment(5, 6, 0), Segment(6, 7, 6)]
    assert plan(0, 10, [0, 6], 100)[:1] == plan(0, 6, [0, 6], 100)  # after the first was taken back
    assert plan(3, 3, [0], 5) == []


def test_what_must_be_laid():
    assert lookback.steps_to_lay(plan(0, 24, [0, 6, 12, 18], 6)) == 0
    assert lookback.steps_to_lay(plan(0, 24, [0], 6)) == 18
    assert lookback.steps_to_lay(plan(0, 24, [0, 12], 5)) == 10 + 10
    assert lookback.steps_to_lay(plan(9, 24, [0], 100)) == 9


# --- one result -----------------------------------------------------------------------


def test_the_memory_changes_nothing_but_the_cost(run, whole):
    small = revalued(run, hindsight=True, name="small", memory=memory_of(2, run))
    for name in ("ledger.npy", "books.npy", "values.npy", "adjoint.npy"):
        assert (small / name).read_bytes() == (whole / name).read_bytes(), name
    assert info(whole)["passes_per_step"] == 5  # with two targets
    assert info(small)["passes_per_step"] == 5 + 4 * 4 / 24  # from each checkpoint, 4 steps to lay
    assert not list(run.glob("revalued/*.partial"))
    with pytest.raises(UserError, match=r"a step needs [\d.e-]+ GB here: write more"):
        revalued(run, hindsight=True, name="none", memory=memory_of(0.5, run))


def test_its_steps_are_the_runs(run, whole):
    rows, own = store.read(whole), store.read(run)
    assert np.array_equal(rows["chunk"], own["chunk"])
    assert np.array_equal(rows["step"], own["step"])
    np.testing.assert_allclose(rows["loss"], own["loss"], rtol=1e-5)
    assert info(whole)["approximate"] is None
    assert np.array_equal(store.read(whole, "books")["lr"], store.read(run, "books")["lr"])


def test_steps_that_came_out_otherwise_are_told(run, whole, monkeypatch):
    monkeypatch.setattr(lookback, "CLOSE", 0.0)
    folder = revalued(run, hindsight=True, name="told")
    assert "only within" in info(folder)["approximate"]


def test_two_targets_are_as_each_alone(run, whole):
    both = store.read(whole)["value"]
    for k, target in enumerate(targets_of(run).split(",")):
        alone = revalued(run, hindsight=True, name=f"alone-{k}", targets=target)
        assert store.read(alone)["value"].tobytes() == both[:, [k]].tobytes()


def test_a_run_that_was_stopped_and_went_on(python_data, tmp_path, run, whole):
    out = tmp_path / "run"
    trained(python_data, out, **DROPOUT, max_iters=12, lr_decay_iters=24)
    trained(python_data, out, **DROPOUT, lr_decay_iters=24, init_from="resume")
    again = revalued(out, hindsight=True)
    assert again.name == "code+prose-hindsight"
    assert store.read(again).tobytes() == store.read(whole).tobytes()


def test_a_run_of_kept_chunks(python_data, tmp_path):
    n_chunks = len(open_dataset(python_data).train.rows)
    keep = np.arange(0, n_chunks, 3)
    np.save(tmp_path / "keep.npy", keep)
    out = trained(python_data, tmp_path / "run", **DROPOUT, keep=str(tmp_path / "keep.npy"))
    rows = store.read(revalued(out, hindsight=True))
    assert np.isin(rows["chunk"], keep).all()
    assert np.isfinite(rows["value"]).all()


def test_a_run_without_values(python_data, tmp_path, run, whole):
    """It takes the same steps but for rounding, and hindsight needs no values of it."""
    out = trained(python_data, tmp_path / "run", dropout=0.1, rule="off")
    folder = revalued(out, hindsight=True)
    np.testing.assert_allclose(store.read(folder)["loss"], store.read(whole)["loss"], rtol=1e-4)
    assert "no ledger" in info(folder)["approximate"]


def test_a_part_of_the_run(run, whole):
    """The steps before --start change nothing; those after --end are none."""
    late = revalued(run, hindsight=True, name="late", start=9)
    rows = store.read(whole)
    assert store.read(late)["value"].tobytes() == rows["value"][rows["step"] >= 9].tobytes()
    early = revalued(run, hindsight=True, name="early", end=14)
    assert store.read(early)["step"].max() == 13
    assert not np.array_equal(store.read(early)["value"], rows["value"][rows["step"] < 14])


def test_a_horizon(run, whole):
    """Of all steps it is the whole; of one, the target's gradient after each step."""
    full = revalued(run, hindsight=True, name="full", horizon=24)
    assert store.read(full)["value"].tobytes() == store.read(whole)["value"].tobytes()
    assert info(full)["horizon"] == 24
    one = store.read(revalued(run, hindsight=True, name="one", horizon=1))
    rows = store.read(whole)
    last = rows["step"] == 23
    assert np.array_equal(one["value"][last], rows["value"][last])
    assert not np.allclose(one["value"][~last], rows["value"][~last])
    # where nothing is ahead but the step itself, it is nearly its one-step value
    own = store.read(run)
    correlation = np.corrcoef(one["value"][40:, 0], own["value"][40:, 0])[0, 1]
    assert correlation > 0.5


def test_a_step_has_the_value_of_its_absence(python_data, tmp_path):
    """Leaving a visit out changes the loss by its value, to first order: with it a quarter of the
    step's gradient goes, and what is of second order is a rise, so the values are a little low."""
    out = trained(python_data, tmp_path / "run", **DOUBLE, learning_rate=1e-3)
    folder = revalued(out, hindsight=True)
    rows = store.read(folder)
    cfg = revalue.Config(run=str(out), hindsight=True)
    original = revalue.read(cfg)
    data = open_dataset(python_data)
    targets = parse_targets(original.options.targets, data, 32)
    about = {"sets": 12, "fraction": 0, "first_step": 12}
    visits = np.flatnonzero(rows["step"] >= 12)[::4]
    sets = [[visit] for visit in visits]
    with_all, rises = lookback.retrain(original, data, targets, folder, about, sets, 24)
    assert with_all == pytest.approx(list(info(folder)["loss_at_end"].values()))
    for k in range(2):
        predicted = rows["value"][visits, k]
        assert np.corrcoef(predicted, rises[:, k])[0, 1] > 0.98
        assert 0.8 < np.polyfit(predicted, rises[:, k], 1)[0] < 1.2


# --- killed -----------------------------------------------------------------------------


def test_killed_at_random_moments_it_ends_in_the_same_bytes(run, tmp_path):
    """With checks, whose trainings are not done twice."""
    more = ["--hindsight", f"--memory={memory_of(1, run)}", "--check=5", "--check_fraction=.2"]
    log = tmp_path / "log"
    process = in_process(quiet_revalue, run, log, [*more, "--name=undisturbed"])
    began = time.monotonic()
    process.join()
    took = time.monotonic() - began
    assert process.exitcode == 0, log.read_text()
    killed = 0
    rng = random.Random(0)
    for _ in range(10):
        process = in_process(quiet_revalue, run, log, [*more, "--name=killed"])
        process.join(rng.uniform(0.05, 0.6) * took)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
    assert killed >= 3
    process = in_process(quiet_revalue, run, log, [*more, "--name=killed"])
    process.join()
    assert process.exitcode == 0, log.read_text()
    expected = everything(run / "revalued" / "undisturbed")
    found = everything(run / "revalued" / "killed")
    assert found.keys() == expected.keys()
    for name, content in found.items():
        assert content == expected[name], name
    assert "check" in info(run / "revalued" / "killed")


# --- several processes --------------------------------------------------------------------


def rank_look_back(rank, world, port, run, more, log):
    become_rank(rank, world, port)
    quiet_revalue(run, log, more)
    parallel.leave()


def test_two_processes_look_back_as_one(python_data, tmp_path):
    out = trained(python_data, tmp_path / "run", **DOUBLE, optimizer="adamw")
    more = ["--hindsight", "--check=4", "--check_fraction=.1"]
    alone = revalue.revalue(config.load(revalue.Config, [str(out), *more, "--name=one"]))
    log = tmp_path / "log"
    port = free_port()
    ranks = []
    for rank in range(2):
        args = (rank, 2, port, out, [*more, "--name=two"], log)
        ranks.append(in_process(rank_look_back, *args))
    for process in ranks:
        process.join()
    assert {process.exitcode for process in ranks} == {0}, log.read_text()
    both = out / "revalued" / "two"
    np.testing.assert_allclose(
        store.read(both)["value"], store.read(alone)["value"], rtol=1e-4, atol=1e-9
    )
    for name in TEXTS:
        one = info(alone)["check"]["targets"][name]["hindsight"]
        two = info(both)["check"]["targets"][name]["hindsight"]
        assert two == pytest.approx(one, rel=1e-3)


def test_only_hindsight_is_for_several_processes(run, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="leave out torchrun"):
        revalued(run, name="walk")


# --- the check ------------------------------------------------------------------------------


def test_a_check_can_follow(run, whole):
    before = everything(whole)
    revalued(run, hindsight=True, name="whole", check=6, check_fraction=0.1)
    after = everything(whole)
    assert {name for name in after if after[name] != before.get(name)} == {"values.json"}
    check = info(whole)["check"]
    rows = store.read(whole)
    first = rows["step"][rows["early"] == 1].max() + 1 if rows["early"].any() else 0
    assert (check["sets"], check["fraction"], check["first_step"]) == (6, 0.1, first)
    for name in TEXTS:
        found = check["targets"][name]
        assert found["loss"] == pytest.approx(info(whole)["loss_at_end"][name])
        assert {*found} == {
            "loss",
            "hindsight",
            "value in its step",
            "share of its step",
            "training loss",
        }
        hindsight = found["hindsight"]
        assert hindsight["low"] <= hindsight["pearson"] <= hindsight["high"]
        assert "slope" in found["value in its step"]
        assert "slope" not in found["training loss"]


def test_a_new_target_is_checked_too(run, tmp_path):
    text = tmp_path / "later.txt"
    text.write_text("def later(text):\n    return text.strip()\n" * 9)
    folder = revalued(run, hindsight=True, targets=f"later={text}", check=4, check_fraction=0.1)
    assert folder.name == "later-hindsight"
    assert {*info(folder)["check"]["targets"]["later"]} == {"loss", "hindsight", "training loss"}


@pytest.mark.parametrize(
    "options, answer",
    [
        ({"horizon": 5}, "is of hindsight: add --hindsight"),
        ({"check": 9}, "is of hindsight: add --hindsight"),
        ({"hindsight": True, "replay": True}, "write one of them"),
        ({"hindsight": True, "check": 3}, "at least 4"),
        ({"hindsight": True, "check": 9, "check_fraction": 1.5}, "check_fraction"),
        ({"hindsight": True, "horizon": -1}, "horizon"),
    ],
)
def test_wrong_input(run, options, answer):
    with pytest.raises(UserError, match=answer):
        revalued(run, **options)


def test_a_damaged_sweep_is_told(run, tmp_path):
    """Not taken for what was found so far."""
    partial = run / "revalued" / "damaged.partial"
    more = ["--hindsight", f"--memory={memory_of(1, run)}", "--name=damaged"]
    process = in_process(quiet_revalue, run, tmp_path / "log", more)
    while not (partial / lookback.SWEEP).exists():
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    content = bytearray((partial / lookback.SWEEP).read_bytes())
    content[len(content) // 2] ^= 1
    (partial / lookback.SWEEP).write_bytes(content)
    with pytest.raises(UserError, match="is damaged: its checksum does not fit"):
        revalued(run, hindsight=True, name="damaged")


# --- checkpoints that are kept -----------------------------------------------------------------


def test_a_run_for_hindsight_keeps_its_checkpoints(python_data, tmp_path, capsys):
    out = tmp_path / "run"
    trained(python_data, out, **{**DROPOUT, "keep_checkpoints": 1, "hindsight": True})
    assert {path.name for path in out.glob("ckpt*.pt")} == {
        "ckpt.pt",
        "ckpt-6.pt",
        "ckpt-12.pt",
        "ckpt-18.pt",
    }
    assert f"next: python revalue.py {out} --hindsight" in capsys.readouterr().out
    assert info(revalued(out, hindsight=True))["passes_per_step"] == 5


def test_values_are_the_sums_of_what_is_not_early(run, whole, monkeypatch):
    """As where the adjoint is large before step 7."""
    monkeypatch.setattr(
        lookback.hindsight, "early", lambda norms, horizon: np.arange(len(norms))[:, None] < [7, 3]
    )
    folder = revalued(run, hindsight=True, name="marked")
    rows = store.read(folder)
    assert np.array_equal(rows["early"], rows["step"] < 7)
    assert rows["value"].tobytes() == store.read(whole)["value"].tobytes()
    values = np.load(folder / "values.npy")
    late = rows[rows["step"] >= 7]
    expected = np.full(values.shape, np.nan)
    expected[late["chunk"]] = 0
    np.add.at(expected, late["chunk"], late["value"].astype(float))
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_a_score_that_does_not_vary_has_no_correlation(run, whole):
    """What is no number is left out, and the folder can be read."""
    found = agreement(np.zeros(5), np.arange(5.0))
    assert np.isnan(found.pearson)
    assert "pearson" not in lookback.as_entry(found, "hindsight")
    assert "slope" not in lookback.as_entry(found, "training loss")
    about = info(whole)
    entry = {"hindsight": lookback.as_entry(found, "hindsight")}
    targets = dict.fromkeys(TEXTS, entry)
    check = {"sets": 5, "fraction": 0.1, "first_step": 3, "targets": targets}
    opened = SimpleNamespace(info={**about, "check": check}, names=list(TEXTS), path=whole)
    read = read_check(opened)
    assert np.isnan(read["targets"]["code"][0]["pearson"])
