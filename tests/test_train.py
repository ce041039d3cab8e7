"""train.py for real: whole runs on real text, killed, resumed, starved of disk, and compared with the rules' definitions."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import config
import shapley.head
import train as train_module
from data import global_batch, open_dataset, parse_targets
from model import GPT, GPTConfig
from shapley import exact, ghost, rules
from system.checkpoints import Checkpoints
from system.files import write_json
from system.folder import RunFolder
from system.store import add_visits, read
from train import Config, train
from valuation import NoValuation

SMALL = "--n_layer=2 --n_head=2 --n_embd=16 --batch_size=2 --gradient_accumulation_steps=2 --warmup_iters=5 --learning_rate=5e-3 "
SMALL += "--eval_chunks=2 --log_interval=1 --device=cpu --dtype=float32 --grad_clip=0.5"
TWO = "--targets=val:Python code,val:Docstrings"


def arguments(data_dir, out_dir, *more):
    return [
        *SMALL.split(),
        f"--data_dir={data_dir}",
        f"--out_dir={out_dir}",
        "--max_iters=12",
        "--checkpoint_interval=5",
        *more,
    ]


def run(data_dir, out_dir, *more):
    return train(config.load(Config, arguments(data_dir, out_dir, *more)))


def refused_argv(capsys, argv):
    """The one line that train.py leaves on stderr when it ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: train(config.load(Config, argv)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def refused(capsys, data_dir, out_dir, *more):
    """As refused_argv, of a run with the tests' own options."""
    return refused_argv(capsys, arguments(data_dir, out_dir, *more))


def in_process(target, *args):
    """A process that has everything imported: forked from a server that never computed anything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "torch.distributed.fsdp"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def quiet_run(argv, log):
    torch.set_num_threads(1)
    for fd in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    config.main(lambda: train(config.load(Config, argv)))


def read_bytes(out_dir):
    return {path.name: path.read_bytes() for path in Path(out_dir).glob("*.npy")}


def weights(out_dir):
    return torch.load(Path(out_dir, "ckpt.pt"), weights_only=True)["model"]


def assert_same_weights(one, other):
    """The newest checkpoints of two runs hold the same weights, to the bit."""
    theirs = weights(other)
    ours = weights(one)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


# --- what a run leaves behind -------------------------------------------------


def test_values_are_the_sum_of_the_ledger_and_map_to_documents(python_data, tmp_path, capsys):
    import pyarrow.parquet

    run(python_data, tmp_path / "run", TWO, "--book_interval=3")
    table = capsys.readouterr().out
    data = open_dataset(python_data)
    values, visits, books = (
        np.load(tmp_path / "run" / f"{name}.npy") for name in ("values", "ledger", "books")
    )
    n = len(data.train.rows)
    assert values.shape == (n, 2)
    assert values.dtype == np.float32
    assert visits.dtype.names == ("step", "chunk", "loss", "value", "grad_norm", "early")
    assert len(visits) == 12 * 4
    assert (visits["step"] == np.repeat(np.arange(12), 4)).all()
    assert len(set(visits["chunk"])) == len(visits)  # without replacement
    assert (
        visits["chunk"] == np.concatenate([global_batch(s, 4, n, 1337) for s in range(12)])
    ).all()
    total = np.zeros((n, 2))
    for visit in visits:
        total[visit["chunk"]] += visit["value"]
    used = np.isin(np.arange(n), visits["chunk"])
    assert np.isnan(values[~used]).all()
    assert (values[used] == total[used].astype(np.float32)).all()
    assert np.isfinite(values[used]).all()
    # the books: the data column is the sum of the step's values; what is not computed is NaN
    assert np.allclose(books["data"], visits["value"].reshape(12, 4, 2).sum(1), rtol=1e-5)
    assert np.allclose(books["loss"], visits["loss"].reshape(12, 4).mean(1), rtol=1e-5)
    assert (visits["early"] == (visits["step"] < 3)).all()
    assert (visits["grad_norm"] > 0).all()
    measured = books["step"] % 3 == 0
    for name in ("after", "momentum", "decay", "residual"):
        assert (np.isfinite(books[name]) == measured[:, None]).all()
    drop = books["data"] + books["momentum"] + books["decay"] + books["residual"]
    assert np.allclose((books["before"] - books["after"])[measured], drop[measured], atol=1e-6)
    assert (
        f"Python code: accounted for {1 - books['residual'][measured, 0].sum() / (books['before'] - books['after'])[measured, 0].sum():.1%}"
        in table
    )
    assert (books["kappa"] <= 1).all()
    assert (books["kappa"] < 1).any()
    about = json.loads((tmp_path / "run" / "values.json").read_text())
    assert about["committed_step"] == 12
    assert about["unit"] == "nats"
    assert about["data_hash"] == data.hash
    assert [t["name"] for t in about["targets"]] == ["Python code", "Docstrings"]
    # the table on the terminal says the same
    for d, name in enumerate(data.domains):
        chosen = used & (data.train.domain == d)
        line = next(
            (
                line
                for line in table.splitlines()
                if line.startswith(f"{name} ") and line.endswith("%")
            ),
            None,
        )
        assert bool(line) == chosen.any()
        if line:
            assert int(line[24:32]) == chosen.sum()
            mean, median, negative = line.split()[-6:-3]
            assert float(mean) == pytest.approx(1e6 * total[chosen, 0].mean(), abs=0.06)
            assert float(median) == pytest.approx(1e6 * np.median(total[chosen, 0]), abs=0.06)
            assert negative == f"{(total[chosen, 0] < 0).mean():.0%}"
    # chunk -> domain and document -> chunk
    docs = pyarrow.parquet.read_table(python_data / "train_docs.parquet").to_pylist()
    chunk = int(visits["chunk"][0])
    in_domain = np.flatnonzero(data.train.domain == data.train.domain[chunk])
    holders = []
    for doc in docs:
        first = np.searchsorted(in_domain, doc["first_chunk"])
        span = in_domain[first : first + -(-(doc["first_token"] + doc["n_tokens"] + 1) // 33)]
        if doc["domain"] == data.domains[data.train.domain[chunk]] and chunk in span:
            holders.append(doc["doc"])
    assert holders


@pytest.mark.parametrize("rule", ["sgd", "sgd2", "adamw_linear", "adamw", "adamw2"])
def test_a_step_of_a_run_is_what_exact_says(python_data, tmp_path, rule):
    """From the checkpoint of step 5 the ledger's rows of step 5: order of chunks, drawn targets, clipping, accumulation."""
    out = tmp_path / "run"
    argv = (
        TWO + f",own={tmp_path / 'own.txt'}",
        f"--rule={rule}",
        "--dtype=float64",
        "--target_batch=3",
    )
    (tmp_path / "own.txt").write_text("def main():\n    return 'a short text, padded and masked'\n")
    run(python_data, out, *argv, "--max_iters=5", "--lr_decay_iters=12")
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    run(python_data, out, *argv, "--max_iters=7", "--lr_decay_iters=12", "--init_from=resume")
    visits, books = np.load(out / "ledger.npy"), np.load(out / "books.npy")

    data = open_dataset(python_data)
    model = GPT(GPTConfig(**checkpoint["model_args"])).double()
    model.load_state_dict(checkpoint["model"])
    optimizer = model.configure_optimizers(0.1, 0.0, (0.9, 0.95), "cpu")
    optimizer.load_state_dict(checkpoint["optimizer"])
    ids = global_batch(5, 4, len(data.train.rows), 1337)
    X, Y = map(torch.from_numpy, data.train.batch(ids, 32))
    chosen = []
    for k, target in enumerate(parse_targets(argv[0].removeprefix("--targets="), data, 32)):
        picks = np.random.default_rng((1337, k, 5)).choice(
            len(target), min(3, len(target)), replace=False
        )
        chosen.append(tuple(map(torch.from_numpy, target.batch(picks))))
    x, known, losses = (
        exact.chunk_gradients(model, X, Y),
        rules.known_rows(model, X, Y),
        [exact.batch_loss(*pair) for pair in chosen],
    )
    truth = rules.rule_values(
        model,
        optimizer,
        x,
        losses,
        rule,
        float(books["lr"][5].astype(np.float64)),
        0.5,
        known=known,
    )
    rows = visits[5 * 4 : 6 * 4]
    assert (rows["chunk"] == ids).all()
    assert np.linalg.norm(rows["value"] - truth.numpy()) < 1e-6 * np.linalg.norm(
        truth
    )  # the ledger's float32
    assert books["kappa"][5] < 1


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-4)])
def test_valuation_leaves_training_alone(python_data, tmp_path, dtype, tolerance):
    """50 steps with and without: the valued backward adds the chunks' weight gradients in another order, so float32 differs in
    its last bits and 50 steps make that grow; 1e-4 is far above it and far below anything a user would see."""
    more = (f"--dtype={dtype}", "--max_iters=50", "--checkpoint_interval=50", "--dropout=0.1", TWO)
    plain = run(python_data, tmp_path / "off", *more, "--rule=off")
    valued = run(python_data, tmp_path / "on", *more)
    assert len(plain) == len(valued) == 50
    assert max(abs(a - b) for (_, a), (_, b) in zip(plain, valued)) < tolerance
    assert not (tmp_path / "off" / "values.npy").exists()


@pytest.mark.parametrize("rule", ["adamw", "adamw2"])
def test_the_batch_may_be_cut_in_any_way(python_data, tmp_path, rule):
    """The same global batch as 1, 2 and 4 micro-steps: equal values for equal chunks, in equal rows."""
    runs = []
    for n in (1, 2, 4):
        run(
            python_data,
            tmp_path / str(n),
            "--dtype=float64",
            f"--rule={rule}",
            f"--batch_size={4 // n}",
            f"--gradient_accumulation_steps={n}",
        )
        runs.append(np.load(tmp_path / str(n) / "ledger.npy"))
    for other in runs[1:]:
        assert (other["chunk"] == runs[0]["chunk"]).all()
        assert np.linalg.norm(other["value"] - runs[0]["value"]) < 1e-6 * np.linalg.norm(
            runs[0]["value"]
        )


def test_a_second_epoch_adds_to_the_first(python_data, tmp_path):
    """With more visits than chunks every chunk has one, and values sum over both epochs."""
    data = open_dataset(python_data)
    n = len(data.train.rows)
    B, steps = 512, -(-n // 512) + 2
    run(
        python_data,
        tmp_path / "run",
        f"--batch_size={B}",
        "--gradient_accumulation_steps=1",
        f"--max_iters={steps}",
        "--n_layer=1",
    )
    visits, values = read(tmp_path / "run"), np.load(tmp_path / "run" / "values.npy")
    assert len(set(visits["chunk"][:n])) == n
    total, used = np.zeros((n, 1)), np.zeros(n, bool)
    add_visits(visits, total, used)
    assert used.all()
    assert (values == total[:, 0].astype(np.float32)).all()


@pytest.mark.parametrize(
    "more",
    [
        ("--rule=adamw2", "--dropout=0.2"),
        ("--batch_size=7", "--audit_permutations=20"),
        ("--grad_clip=0",),
    ],
)
def test_an_audit_disturbs_nothing(python_data, tmp_path, capsys, more):
    """The same losses and files with the audit on and off, dropout and 14 chunks a step (permutations) included."""
    more = (TWO, "--max_iters=9", "--book_interval=3", *more)
    plain = run(python_data, tmp_path / "plain", *more)
    audited = run(python_data, tmp_path / "audited", *more, "--audit_interval=4")
    assert audited == plain
    files = read_bytes(tmp_path / "audited")
    audits = np.load(tmp_path / "audited" / "audit.npy")
    assert files.pop("audit.npy")
    assert files == read_bytes(tmp_path / "plain")
    assert list(audits["step"]) == [3, 7]
    for name in ("pearson", "spearman", "loo_pearson"):
        assert (np.abs(audits[name]) <= 1).all()
    assert (audits["rel_l2"] > 0).all()
    assert np.isfinite(audits["efficiency_gap"]).all()
    permuted = "--batch_size=7" in more
    assert ((audits["standard_error"] > 0) == permuted).all()
    if (
        "--dropout=0.2" not in more and not permuted
    ):  # with dropout the target is free of it, and 20 permutations are few
        assert (
            audits["pearson"][-1].min() > 0.8
        )  # the first audit is of the fourth step, where every rule is rough
    assert (
        f"Docstrings: audit of 2 steps: Pearson {audits['pearson'][:, 1].mean():.4f}"
        in capsys.readouterr().out
    )


# --- kill and resume ----------------------------------------------------------


KILLED = [
    (0, 5, ("--rule=adamw_linear",)),
    (1, 1, ("--book_interval=2",)),
    (
        2,
        4,
        (
            "--rule=adamw2",
            "--dropout=0.2",
            "--book_interval=3",
            "--audit_interval=15",
        ),
    ),
]


@pytest.mark.parametrize("seed, interval, more", KILLED)
def test_killed_runs_end_like_one_that_was_not(python_data, tmp_path, seed, interval, more):
    """SIGKILL at random moments (6 in each of three settings; with a checkpoint every step, mostly while one is written)."""
    more = (TWO, "--max_iters=40", f"--checkpoint_interval={interval}", "--eval_interval=10", *more)
    log = tmp_path / "log"
    in_process(int).join()  # the server's imports are no part of the duration
    began = time.monotonic()
    whole = in_process(quiet_run, arguments(python_data, tmp_path / "whole", *more), log)
    whole.join()
    duration = time.monotonic() - began
    assert whole.exitcode == 0, log.read_text()

    rng, kills, out = random.Random(seed), 0, tmp_path / "killed"
    while kills < 6:
        resume = ["--init_from=resume"] if out.exists() else []
        process = in_process(quiet_run, arguments(python_data, out, *more, *resume), log)
        process.join(rng.uniform(0.3, 1.0) * duration * (0.5 if kills else 0.8))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0, log.read_text()
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
    if not (out / "config.json").exists():
        out.mkdir(exist_ok=True)
        final = in_process(quiet_run, arguments(python_data, out, *more), log)
    else:
        final = in_process(quiet_run, arguments(python_data, out, *more, "--init_from=resume"), log)
    final.join()
    assert final.exitcode == 0, log.read_text()
    assert read_bytes(out) == read_bytes(tmp_path / "whole")
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(out).values(), weights(tmp_path / "whole").values())
    )


def test_the_files_of_a_killed_run_agree(python_data, tmp_path):
    """Right after a kill, and after the resumption's first moment, values.npy is the sum of the rows that ledger.npy shows."""
    out, log = tmp_path / "run", tmp_path / "log"
    process = in_process(
        quiet_run, arguments(python_data, out, "--max_iters=4000", "--checkpoint_interval=3"), log
    )
    while not (out / "ckpt.pt").exists():
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    run(
        python_data,
        out,
        "--init_from=resume",
        f"--max_iters={checkpoint['iter_num']}",
        "--lr_decay_iters=4000",
    )
    visits, values = read(out), np.load(out / "values.npy")
    assert len(visits) == 4 * checkpoint["iter_num"]
    total, used = np.zeros((len(values), 1)), np.zeros(len(values), bool)
    add_visits(visits, total, used)
    assert np.array_equal(
        values, np.where(used, total[:, 0], np.nan).astype(np.float32), equal_nan=True
    )


# --- what goes wrong ----------------------------------------------------------


def test_wrong_input_is_one_line_and_exit_code_2(python_data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n")
    latin.write_bytes("café".encode("latin-1"))
    cases = {
        "--batch_sise=3": "did you mean 'batch_size'",
        "--learning_rate=fast": "--learning_rate=<float>",
        "--max_iters=2.5": "--max_iters=<int>",
        "--rule=adamw3": "choose one of off, sgd, sgd2, adamw_linear",
        "--block_size=64": "type --block_size=32",
        "--targets=val:Nothing": "it has Topics, Python code",
        "--targets=Python code": "write val, val:<domain> or <name>=<file.txt>",
        "--targets=val,val": "a name stands twice",
        f"--targets=x={tmp_path}/none.txt": "No such file",
        f"--targets=x={empty}": "holds no text",
        f"--targets=x={latin}": "cannot be read as UTF-8 text ('utf-8' codec can't decode byte",
        "--data_dir=nowhere": "python prepare_pile.py --data_dir=nowhere",
        "--n_head=3": "not a multiple",
        "--batch_size=0": "at least 1",
        "--learning_rate=nan": "not a float",
        "--optimizer=sgd": "write --rule=sgd",
        "--device=cuda:7": "--device=cpu",
        "--init_from=resume": "nothing to resume",
    }
    for argument, answer in cases.items():
        assert answer in refused(capsys, python_data, out, argument), argument
        assert not out.exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs a C++ compiler" in refused(capsys, python_data, out, "--compile")
    assert not out.exists()


def test_a_command_line_with_an_error(tmp_path):
    """As typed in a shell: the config file's typo is found too, and nothing is written."""
    (tmp_path / "mine.py").write_text("from configs.demo import *\nlearing_rate = 1\n")
    root = Path(config.__file__).parent
    done = subprocess.run(
        [sys.executable, root / "train.py", "mine.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: unknown key 'learing_rate' in mine.py: did you mean 'learning_rate'?\n"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.py"]


def test_a_run_is_not_overwritten_and_resumes_only_as_it_was(python_data, tmp_path, capsys):
    out = tmp_path / "run"
    run(python_data, out)
    before = read_bytes(out)
    assert "--init_from=resume goes on, --overwrite starts over" in refused(
        capsys, python_data, out
    )
    for argument, had in {
        "--rule=sgd": "rule=adamw",
        "--n_embd=32": "n_embd=16",
        "--batch_size=4": "batch_size=2",
        "--seed=1": "seed=1337",
        TWO: "targets=val",
    }.items():
        assert f"was run with {had}: type --{had}" in refused(
            capsys, python_data, out, "--init_from=resume", argument
        )
    from prepare_pile import Config as Prepare
    from prepare_pile import prepare

    prepare(
        Prepare(
            source="python",
            tokenizer="byte",
            block_size=32,
            val_fraction=0.1,
            limit_tokens=300_000,
            data_dir=str(tmp_path / "other"),
        )
    )
    capsys.readouterr()
    assert "is not the data of" in refused(capsys, tmp_path / "other", out, "--init_from=resume")
    assert read_bytes(out) == before
    run(python_data, out, "--init_from=resume")
    assert "already at step 12" in capsys.readouterr().out
    assert read_bytes(out) == before
    run(python_data, out, "--overwrite", "--max_iters=3")
    assert len(read(out)) == 12
    # config.json runs again, and a run asked for more steps goes on
    train(config.load(Config, [str(out / "config.json"), "--init_from=resume", "--max_iters=4"]))
    assert len(read(out)) == 16


@pytest.mark.parametrize("rule", ["sgd", "off"])
def test_a_loss_that_is_not_finite_stops_the_run(python_data, tmp_path, capsys, rule):
    """The step and the chunks are named, and the checkpoint before it stays whole."""
    out = tmp_path / "run"
    more = ("--optimizer=sgd", f"--rule={rule}", "--grad_clip=0", "--decay_lr=False")
    run(python_data, out, *more, "--max_iters=3", "--learning_rate=1e-3", "--lr_decay_iters=3")
    state = torch.load(out / "ckpt.pt", weights_only=True)
    state["model"]["transformer.ln_f.weight"][0] = (
        3e38  # the weights diverge: the next losses overflow
    )
    state["config"]["max_iters"] = 9
    with RunFolder(out) as folder:
        Checkpoints(folder, 1, False, out / "ckpt.pt", 3).write(3, state)
    spoiled = (out / "ckpt.pt").read_bytes()
    line = refused(
        capsys,
        python_data,
        out,
        *more,
        "--max_iters=9",
        "--learning_rate=1e-3",
        "--lr_decay_iters=3",
        "--init_from=resume",
    )
    ids = global_batch(3, 4, len(open_dataset(python_data).train.rows), 1337)
    assert "not finite" in line
    assert "step" in line
    if rule == "sgd":
        assert line.startswith("error: step 3: the loss of chunks")
        assert all(str(i) in line for i in ids)
        assert len(read(out)) == 12
    assert (out / "ckpt.pt").read_bytes() == spoiled


# --- runs of earlier versions ---------------------------------------------------


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


def test_a_run_of_an_earlier_version_goes_on_to_the_same_bytes(python_data, tmp_path):
    out = tmp_path / "run"
    run(python_data, tmp_path / "whole", TWO, "--book_interval=3")
    run(python_data, out, TWO, "--book_interval=3", "--max_iters=5", "--lr_decay_iters=12")
    as_earlier_version(out, **REMOVED)
    argv = [str(out / "config.json"), "--init_from=resume", "--max_iters=12"]
    train(config.load(Config, argv))
    assert read_bytes(out) == read_bytes(tmp_path / "whole")
    assert_same_weights(out, tmp_path / "whole")
    assert not REMOVED.keys() & json.loads((out / "config.json").read_text())["config"].keys()


@pytest.mark.parametrize("named_by", ["config.json", "ckpt.pt"])
def test_a_run_that_used_a_removed_setting_is_refused_by_its_name(
    python_data, tmp_path, capsys, named_by
):
    """By config.json where the settings come from there, else by the checkpoint."""
    out = tmp_path / "run"
    run(python_data, out, "--max_iters=2", "--n_layer=1")
    as_earlier_version(out, **{**REMOVED, "target_interval": 4})
    before = (out / "ckpt.pt").read_bytes()
    argv = arguments(python_data, out, "--max_iters=2", "--n_layer=1", "--init_from=resume")
    if named_by == "config.json":
        argv = [str(out / "config.json"), "--init_from=resume"]
    line = refused_argv(capsys, argv)
    assert f"{out}/{named_by} is of a run with --target_interval=4" in line
    assert (out / "ckpt.pt").read_bytes() == before


# --- a full disk, a folder that cannot be written, damaged data -------------------


def starved_run(argv, log, limit):
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit)
    )  # no file may grow beyond it, as on a full disk
    quiet_run(argv, log)


def test_a_full_disk_loses_nothing(python_data, tmp_path):
    """Refused in the middle of a checkpoint: one line, exit code 2, the checkpoint before is whole and the run goes on from it."""
    out, log = tmp_path / "run", tmp_path / "log"
    run(python_data, tmp_path / "whole")
    run(python_data, out, "--max_iters=5", "--lr_decay_iters=12")
    size = (out / "ckpt.pt").stat().st_size
    more = ("--init_from=resume", "--lr_decay_iters=12")
    for limit in (size // 2, 200):  # in the checkpoint, in the ledger
        log.unlink(missing_ok=True)
        process = in_process(
            starved_run,
            arguments(python_data, out, *more),
            log,
            max(limit, 100_000 if limit == size // 2 else 2_000),
        )
        process.join()
        assert process.exitcode == 2
        last = log.read_text().strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert "File too large" in last
        assert torch.load(out / "ckpt.pt", weights_only=True)["iter_num"] == 5
        assert not list(out.glob("*.tmp"))
    run(python_data, out, *more)
    assert read_bytes(out) == read_bytes(tmp_path / "whole")


def test_a_read_only_out_folder(python_data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, python_data, tmp_path / "file" / "run")
    assert "/proc/run" in refused(capsys, python_data, "/proc/run")


def test_damaged_data_is_named(python_data, tmp_path, capsys):
    import shutil

    for name, damage, answer in [
        ("train.npy", lambda b: b[: len(b) // 2], "train.npy is missing or damaged"),
        ("val_domain.npy", None, "val_domain.npy is missing or damaged (No such file"),
        ("meta.json", lambda b: b[:50], "meta.json is damaged"),
        (
            "meta.json",
            lambda b: b.replace(b'"block_size": 32', b'"block_size": 31'),
            "its checksum does not fit",
        ),
    ]:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        shutil.copytree(python_data, tmp_path / "data")
        path = tmp_path / "data" / name
        content = path.read_bytes()
        path.unlink()
        if damage:
            path.write_bytes(damage(content))
        assert answer in refused(capsys, tmp_path / "data", tmp_path / "run")
        assert not (tmp_path / "run").exists()


# --- the rest of the trainer --------------------------------------------------


def test_plain_sgd_wins_nothing_by_chance(python_data, tmp_path):
    """SGD trains, its values add up to most of what the target's loss fell by."""
    out = tmp_path / "run"
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(40)))
    more = (
        "--optimizer=sgd",
        "--rule=sgd",
        "--decay_lr=False",
        "--learning_rate=0.05",
        "--dtype=float64",
    )
    run(
        python_data,
        out,
        *more,
        f"--targets=t={text}",
        "--target_batch=1000",
        "--target_sampling=fixed",
        "--max_iters=60",
        "--batch_size=8",
    )
    books = np.load(out / "books.npy")
    drop = books["before"][0, 0] - books["before"][-1, 0]
    assert drop > 0.1
    assert books["data"][:-1].sum() == pytest.approx(drop, rel=0.15)


@pytest.mark.parametrize(
    "rule, head", [("adamw", "chunked"), ("adamw", "whole"), ("adamw2", "chunked")]
)
def test_compiled_values_equal_eager_ones(python_data, tmp_path, monkeypatch, rule, head):
    """In float64: in float32 AdamW's first step takes the sign of elements that are zero but for rounding, which the two round differently.
    After three steps nothing is compiled again, a graph break is an error (fullgraph), and two-pass rules read their tape, as in eager."""
    monkeypatch.setattr(shapley.head, "FORM", head)
    torch._dynamo.reset()  # its limit of 8 graphs a function is for all tests together
    graphs, get_lr = [], train_module.get_lr
    monkeypatch.setattr(
        train_module,
        "get_lr",
        lambda *args: graphs.append(counters["stats"]["unique_graphs"]) or get_lr(*args),
    )
    more = (
        f"--rule={rule}",
        "--n_layer=1",
        "--max_iters=8",
        "--book_interval=2",
        "--batch_size=4",
        "--gradient_accumulation_steps=1",
    )
    more += ("--eval_interval=0", "--dtype=float64", TWO)
    run(python_data, tmp_path / "eager", *more)
    graphs.clear()
    read_tape, reads = ghost.Tape.values, []
    monkeypatch.setattr(
        ghost.Tape, "values", lambda tape: reads.append(len(tape.ops)) or read_tape(tape)
    )
    run(python_data, tmp_path / "compiled", *more, "--compile")
    assert len(graphs) == 8
    assert 0 < graphs[3] == graphs[-1]
    assert len(reads) == (8 if rule == "adamw2" else 0)
    assert len(set(reads)) <= 1
    eager, compiled = read(tmp_path / "eager"), read(tmp_path / "compiled")
    assert np.linalg.norm(compiled["value"] - eager["value"]) < 1e-6 * np.linalg.norm(
        eager["value"]
    )  # of what float32 on disk holds
    assert not any(key.startswith("_orig_mod") for key in weights(tmp_path / "compiled"))


def test_bfloat16_trains(python_data, tmp_path):
    history = run(python_data, tmp_path / "run", "--dtype=bfloat16", "--max_iters=30")
    assert history[-1][1] < history[0][1]
    assert weights(tmp_path / "run")["lm_head.weight"].dtype == torch.float32


def test_wandb_goes_offline_without_a_login(python_data, tmp_path, monkeypatch):
    """The real wandb, with an empty home: it says so, and its files hold what was logged."""
    for key in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    root, out = Path(config.__file__).parent, tmp_path / "run"
    argv = arguments(
        python_data,
        out,
        TWO,
        "--wandb_log",
        "--wandb_histogram_interval=4",
        "--audit_interval=6",
    )
    done = subprocess.run(
        [sys.executable, root / "train.py", *argv], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "no login found, so this run is logged offline" in done.stdout
    logged = next(out.glob("wandb/offline-run-*/run-*.wandb")).read_bytes()
    scalars, histograms, curves, tables = (
        [
            "train/loss",
            "train/lr",
            "overhead/mfu",
            "overhead/valuation_share",
            "val/loss",
            "val_loss/Python code",
        ],
        [],
        [],
        [],
    )
    scalars += ["val_loss/Python code", "val_loss/Docstrings"]
    for name in ("Python code", "Docstrings"):
        scalars += [f"books/{name}/{x}" for x in ("drop", "data", "momentum", "residual")] + [
            f"audit/{name}/{x}" for x in ("pearson", "rel_l2")
        ]
        scalars += [f"value/{name}/{x}" for x in ("mean", "p5", "p95", "negative")] + [
            f"value_by_domain/{name}/Topics"
        ]
        histograms += [f"histogram/{name}"]
        curves += [f"domains/{name}"]
        tables += [f"chunks/{name}/top", f"chunks/{name}/bottom"]
    assert [
        key for key in [*scalars, *histograms, *curves, *tables] if key.encode() not in logged
    ] == []

    values, data = np.load(out / "values.npy"), open_dataset(python_data)
    best = int(np.nanargmax(values[:, 0]))
    found = [
        json.loads(path.read_text())
        for path in out.glob(
            "wandb/offline-run-*/files/media/table/chunks/Python code/top_*.table.json"
        )
    ]
    assert len(found) == 3  # one a checkpoint
    last = next(
        table
        for table in found
        if table["data"][0][0] == best and abs(table["data"][0][2] - values[best, 0]) < 1e-6
    )
    tokens = data.train.rows[best]
    assert last["data"][0][1] == data.domains[data.train.domain[best]]
    assert last["data"][0][3] == bytes(tokens[tokens < 255].tolist()).decode(errors="replace")


@pytest.mark.parametrize("n_chunks", [1, 7, 8, 12, 30])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 12, 64])
def test_micro_batches_are_equal_and_as_few_as_the_batch_size_allows(n_chunks, batch_size):
    slices = train_module.micro_batches(n_chunks, batch_size)
    rows = [list(range(n_chunks))[rows] for rows in slices]
    assert sum(rows, []) == list(range(n_chunks))
    sizes = {len(chunks) for chunks in rows}
    assert len(sizes) == 1
    assert max(sizes) <= batch_size
    for fewer in range(1, len(slices)):
        assert n_chunks % fewer or n_chunks // fewer > batch_size


def test_the_order_is_a_pure_function_of_seed_and_step():
    n, B = 1000, 48
    ids = np.concatenate([global_batch(s, B, n, 7) for s in range(42)])
    assert sorted(ids[:n]) == list(range(n))
    assert sorted(ids[n : 2 * n]) == list(range(n))
    assert (ids[:n] != ids[n : 2 * n]).mean() > 0.9  # each epoch anew
    assert (global_batch(17, B, n, 7) == ids[17 * B : 18 * B]).all()
    assert (global_batch(17, B, n, 8) != ids[17 * B : 18 * B]).any()
    assert (
        np.concatenate([global_batch(s, 2 * B, n, 7) for s in range(21)]) == ids
    ).all()  # not of B
    began = time.perf_counter()
    far = global_batch(10**6, 480, 300_000_000, 1)
    assert time.perf_counter() - began < 1
    assert far.min() >= 0
    assert far.max() < 300_000_000
    # as even as chance: the halves of the set meet in every batch
    share = np.mean([(global_batch(s, 100, 10_000, 1) < 5000).mean() for s in range(100)])
    assert share == pytest.approx(0.5, abs=0.01)


def test_no_valuation_does_nothing():
    valuation = NoValuation()
    valuation.begin_step(0, 1.0)
    assert valuation.new_ledger(np.arange(4), None, None) is None
    valuation.before_update()
    valuation.end_step()
    valuation.commit()
    assert valuation.flush().visits is None
    assert valuation.state_dict() == {}
