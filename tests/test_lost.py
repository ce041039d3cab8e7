"""Nothing is lost around a run: beside it, before its first commit, after damage, and when somebody
else's hand was at its folder."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from runs import SMALL, in_process
from sealed import change

import config
import data
import revalue
import train
from prepare_pile import Config as Prepare
from prepare_pile import prepare
from show.run import open_run
from system import checkpoints, files, store
from system.checkpoints import Checkpoints, read_checkpoint
from system.errors import UserError
from system.folder import RunFolder

MORE = ("--max_iters=8", "--checkpoint_interval=4", "--eval_interval=4", "--book_interval=2")
MORE += ("--lr_decay_iters=20",)


def arguments(data_dir, out_dir, *more):
    return [*SMALL, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *MORE, *more]


def run(data_dir, out_dir, *more):
    train.train(config.load(train.Config, arguments(data_dir, out_dir, *more)))
    return out_dir


def everything(path):
    """{name: content} of all files below a folder."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def whole_run(path):
    """What a run's folder holds, but for its lock."""
    return {name: content for name, content in everything(path).items() if name != "lock"}


# --- a domain called val ------------------------------------------------------------


def test_a_domain_called_val_is_one_like_any_other(tmp_path, capsys):
    """As val.jsonl gives its records: its loss stands beside the mean, and checkpoints load."""
    (tmp_path / "s").mkdir()
    for name, of in (("train", str.lower), ("val", str.upper)):
        records = [{"text": of(f"document number {i}")} for i in range(40)]
        lines = "".join(json.dumps(r) + "\n" for r in records)
        (tmp_path / "s" / f"{name}.jsonl").write_text(lines)
    options = dict(tokenizer="byte", block_size=8, val_fraction=0.3, workers=1)
    prepare(Prepare(source=str(tmp_path / "s"), data_dir=str(tmp_path / "d"), **options))
    out = run(tmp_path / "d", tmp_path / "run", "--targets=val,val:train")
    dataset = data.open_dataset(tmp_path / "d")
    n_chunks = np.bincount(dataset.val.domain)
    last = files.read_lines(out / "evaluations.jsonl")[-1]
    assert {*last["loss"]} == {"train", "val"}
    expected = np.average([last["loss"][name] for name in dataset.domains], weights=n_chunks)
    assert last["val"] == pytest.approx(expected)
    assert f"val loss {expected:.4f}" in capsys.readouterr().out
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    assert type(checkpoint["best_val_loss"]) is float
    run(tmp_path / "d", out, "--targets=val,val:train", "--init_from=resume", "--max_iters=9")
    assert len(store.read(out)) == 9 * 4


def test_a_checkpoint_that_cannot_be_read_again_replaces_none(python_data, tmp_path):
    """Of a number that torch.save takes and torch.load does not, say."""
    out = run(python_data, tmp_path / "run", "--keep_checkpoints=1")
    before = whole_run(out)
    content = torch.load(out / "ckpt.pt", weights_only=True)
    with RunFolder(out) as run_folder:
        writer = Checkpoints(run_folder, 1, False, out / "ckpt.pt", 8)
        with pytest.raises(UserError, match="would run code"):
            writer.write(9, content | {"more": np.zeros(3)})
        writer.write(9, content | {"best_val_loss": np.float64(3.5)})  # a number is made plain
    assert read_checkpoint(out / "ckpt.pt")["best_val_loss"] == 3.5
    (out / "ckpt.pt").write_bytes(before["ckpt.pt"])
    assert whole_run(out) == before


# --- names, and what may be removed ---------------------------------------------------


@pytest.fixture(scope="module")
def plain_run(python_data, tmp_path_factory):
    """Tests that write take a copy."""
    return run(python_data, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(
    "name", ["..", ".", "../..", "../../other", "/tmp", "a/b", "a\nb", "x" * 300]
)
def test_a_revaluation_is_one_folder_below_its_run(plain_run, tmp_path, name):
    out = shutil.copytree(plain_run, tmp_path / "out" / "run")
    shutil.copytree(out, tmp_path / "out" / "other")
    before = everything(tmp_path)
    with pytest.raises(UserError, match="is no name of a folder"):
        revalue.Config(run=str(out), targets="val:Topics", name=name)
    for target in (f"{name}=t.txt".replace(",", "\\,"),):
        (tmp_path / "t.txt").write_text("to be or not to be")
        spec = target.replace("t.txt", str(tmp_path / "t.txt"))
        made = revalue.revalue(revalue.Config(run=str(out), targets=spec, end=1))
        assert made.parent == out / "revalued"
    after = everything(tmp_path)
    assert {k: after.get(k) for k in before} == before


def test_revalue_leaves_files_it_did_not_write(python_data, tmp_path):
    out = run(python_data, tmp_path / "run")
    thesis = out / "revalued" / "mine" / "thesis.tex"
    for file in (thesis, out / "revalued" / "walk.partial" / "notes.md"):
        file.parent.mkdir(parents=True)
        file.write_text("years")
    for name in ("mine", "walk"):
        with pytest.raises(UserError, match="did not write"):
            revalue.revalue(revalue.Config(run=str(out), name=name, end=1, overwrite=True))
    made = revalue.revalue(revalue.Config(run=str(out), name="ours", end=1))
    (made / "thesis.tex").write_text("more years")
    with pytest.raises(UserError, match="did not write"):
        revalue.revalue(revalue.Config(run=str(out), name="ours", end=1, overwrite=True))
    assert thesis.read_text() == "years"
    assert (made / "thesis.tex").read_text() == "more years"
    with pytest.raises(UserError, match="is no target"):
        revalue.revalue(revalue.Config(run=str(out), targets=f"={thesis}", end=1))


# --- settings of a start, and a run that was moved --------------------------------------


def test_a_run_started_over_does_not_start_over_again(python_data, tmp_path):
    out = run(python_data, tmp_path / "run")
    run(python_data, out, "--overwrite")
    for settings in (
        json.loads((out / "config.json").read_text())["config"],
        torch.load(out / "ckpt.pt", weights_only=True)["config"],
    ):
        assert not {"overwrite", "init_from", "verify", "out_dir"} & settings.keys()
    before = whole_run(out)
    about = json.loads((out / "config.json").read_text())
    sticky = about["config"] | {"overwrite": True, "init_from": "scratch", "out_dir": "elsewhere"}
    change(out / "config.json", config=sticky)
    cfg = config.load(train.Config, [str(out / "config.json")])
    assert (cfg.overwrite, cfg.out_dir) == (False, str(out))
    with pytest.raises(UserError, match="already holds a run"):
        train.train(cfg)
    assert whole_run(out) | {"config.json": 0} == before | {"config.json": 0}


def test_a_copied_run_goes_on_by_itself(python_data, tmp_path):
    """Copied, and renamed; with chunks of its own, too."""
    np.save(tmp_path / "keep.npy", np.arange(100))
    out = run(python_data, tmp_path / "run", f"--keep={tmp_path}/keep.npy")
    os.remove(tmp_path / "keep.npy")
    before = whole_run(out)
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    more = ["--init_from=resume", "--max_iters=10"]
    train.train(config.load(train.Config, [str(copy / "config.json"), *more]))
    assert len(store.read(copy)) == 40
    assert whole_run(out) == before
    copy.rename(tmp_path / "renamed")
    more = ["--init_from=resume", "--max_iters=11"]
    train.train(config.load(train.Config, [str(tmp_path / "renamed" / "config.json"), *more]))
    assert not copy.exists()


# --- the run before, until the first commit ----------------------------------------------


DIVERGING = ["--optimizer=sgd", "--rule=sgd", "--learning_rate=1e30", "--grad_clip=0"]
DIVERGING += ["--decay_lr=False"]
FAILING = [
    (["--wandb_log"], "pip install wandb"),
    (["--data_dir=nowhere"], "no prepared data"),
    (["--targets=val:Nothing"], "no domain"),
    (DIVERGING, "not finite"),
]


def without_wandb(monkeypatch):
    """As on a machine where the package is not installed."""
    find_spec = importlib.util.find_spec

    def find(name, *package):
        return None if name == "wandb" else find_spec(name, *package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.fixture(scope="module")
def revalued_run(python_data, tmp_path_factory):
    out = run(python_data, tmp_path_factory.mktemp("old") / "run")
    revalue.revalue(revalue.Config(run=str(out), name="walk", end=1))
    return out


@pytest.mark.parametrize("options, answer", FAILING)
def test_a_refused_or_failing_overwrite_leaves_the_old_run_as_it_was(
    python_data, revalued_run, tmp_path, monkeypatch, options, answer
):
    out = Path(shutil.copytree(revalued_run, tmp_path / "run"))
    old = whole_run(out)
    without_wandb(monkeypatch)
    with pytest.raises(UserError, match=answer):
        run(python_data, out, "--overwrite", *options)
    assert whole_run(out) == old
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["revalued"]


def test_an_overwrite_replaces_the_old_run_and_its_revaluations(
    python_data, revalued_run, tmp_path
):
    out = Path(shutil.copytree(revalued_run, tmp_path / "run"))
    run(python_data, out, "--overwrite", "--seed=5", "--max_iters=4")
    assert len(store.read(out)) == 16
    assert not (out / "revalued" / "walk").exists()
    assert not (out / "before").exists()


EVERY = 4  # of the moments; 1 takes half a minute


def killed_at(number, argv):
    """Trains, and kills itself in place of the rename or removal of that number."""
    left = iter(range(number))

    def or_die(work):
        def counted(*args, **kwargs):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*args, **kwargs)

        return counted

    for owner, name in ((Path, "rename"), (Path, "unlink"), (Path, "rmdir"), (os, "replace")):
        setattr(owner, name, or_die(getattr(owner, name)))
    with contextlib.redirect_stdout(io.StringIO()):
        train.train(config.load(train.Config, argv))


def test_overwriting_may_be_killed_at_any_moment(python_data, tmp_path):
    """Either run is whole at the next start: the old one, or the new one as of its first commit."""
    old = run(python_data, tmp_path / "old")
    new = run(python_data, tmp_path / "new", "--seed=5", "--max_iters=4")
    values = {whole_run(path)["values.npy"]: path.name for path in (old, new)}
    argv = ["--seed=5", "--max_iters=4", "--overwrite"]
    ended, number = [], 0
    while True:
        out = tmp_path / "run"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old, out)
        process = in_process(killed_at, number, arguments(python_data, out, *argv))
        process.join()
        with RunFolder(out):
            pass
        found = whole_run(out)
        name = values[found["values.npy"]]
        expected = whole_run(tmp_path / name)
        arrays = [key for key in expected if key.endswith(".npy")]
        assert {key: found.get(key) for key in arrays} == {key: expected[key] for key in arrays}
        assert read_checkpoint(out / "ckpt.pt")["iter_num"] == {"old": 8, "new": 4}[name]
        assert not [p for p in out.iterdir() if p.name.startswith("before")], number
        ended.append(name)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        number += EVERY
    assert ended[0] == "old"
    assert ended[-1] == "new"
    assert ended == sorted(ended, reverse=True)  # once new, it stays so
    assert len(ended) > 15 // EVERY


def test_a_folder_is_claimed_before_it_is_looked_at(python_data, tmp_path, monkeypatch):
    """Two starts: the second one learns that the first is there before it reads or decides."""
    out, looked = tmp_path / "run", []

    def look(*args):
        code = f"from system.files import Claim; Claim({str(out)!r}, 'out_dir')"
        done = subprocess.run([sys.executable, "-c", code], cwd=commands.ROOT, capture_output=True)
        looked.append(b"another process is writing" in done.stderr)
        return checkpoints.find_checkpoint(*args)

    monkeypatch.setattr(train, "find_checkpoint", look)
    run(python_data, out)
    assert looked == [True]


def test_a_refused_start_leaves_no_folder(python_data, tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        run(python_data, tmp_path / "run", "--init_from=resume")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="nothing to resume"):
        run(python_data, tmp_path / "mine", "--init_from=resume")
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "mine").iterdir())


# --- damage, and its repair ---------------------------------------------------------------


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def flip_row(path, row):
    """A bit in a record of a .npy."""
    records = np.load(path)
    start = path.stat().st_size - records.nbytes
    flip(path, start + row * records.dtype.itemsize + 13)


STEADY = ["--max_iters=20", "--keep_checkpoints=9", "--dropout=.1", "--audit_interval=2"]
STEADY += ["--batch_size=1", "--rule=adamw2"]


@pytest.fixture(scope="module")
def steady_run(python_data, tmp_path_factory):
    """Twenty steps whose rows have checksums of eight each, as in a run of thousands of steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "BLOCK", 8)
        return run(python_data, tmp_path_factory.mktemp("steady") / "run", *STEADY)


@pytest.mark.parametrize(
    "damage, steps",
    [
        ({"ledger": [1]}, "0 to 4"),
        ({"ledger": [37]}, "16 to 20"),
        ({"ledger": [18], "books": [11]}, "8 to 16"),
        ({"audit": [9]}, "16 to 20"),
    ],
)
def test_damaged_rows_are_made_again(steady_run, tmp_path, monkeypatch, capsys, damage, steps):
    """Those that every checkpoint counts on: the run says what to type, and that helps."""
    monkeypatch.setattr(store, "BLOCK", 8)
    out = shutil.copytree(steady_run, tmp_path / "run")
    before = whole_run(out)
    for name, rows in damage.items():
        for row in rows:
            flip_row(out / f"{name}.npy", row)
    (out / "ckpt-16.pt").unlink()  # else a resumed run makes the late rows again by itself
    with pytest.raises(UserError) as error:
        open_run(out)
    assert f"python revalue.py {out} --repair" in str(error.value)
    if "ledger" in damage and damage["ledger"][0] < 8:
        with pytest.raises(UserError, match=r"the weights of step 20 are whole.*--repair"):
            train.train(config.load(train.Config, [str(out / "config.json"), "--init_from=resume"]))
    capsys.readouterr()
    revalue.repair(revalue.Config(run=str(out)))
    assert f"training again through steps {steps}" in capsys.readouterr().out
    del before["ckpt-16.pt"]
    assert whole_run(out) == before


def test_repair_makes_again_the_files_that_follow_from_checkpoint_and_rows(python_data, tmp_path):
    out = run(python_data, tmp_path / "run")
    before = whole_run(out)
    for name, at in (("values.npy", -3), ("values.json", 40), ("evaluations.jsonl", 30)):
        flip(out / name, at)
    (out / "books.npy").unlink()
    revalue.repair(revalue.Config(run=str(out)))
    assert whole_run(out) == before
    flip(out / "config.json", 60)
    revalue.repair(revalue.Config(run=str(out)))
    settings = json.loads((out / "config.json").read_text())["config"]
    assert settings == json.loads(before["config.json"])["config"]


def test_a_repair_that_comes_out_otherwise_writes_nothing(python_data, tmp_path, monkeypatch):
    """On another machine, say: the rows' checksum shows it."""
    out = run(python_data, tmp_path / "run")
    flip_row(out / "ledger.npy", 3)
    before = whole_run(out)
    monkeypatch.setattr(train, "get_lr", lambda *_: 1e-3)
    with pytest.raises(UserError, match="came out otherwise"):
        revalue.repair(revalue.Config(run=str(out)))
    assert whole_run(out) == before


def test_a_damaged_config_is_read_from_the_checkpoint(python_data, tmp_path, capsys):
    out = run(python_data, tmp_path / "run")
    before = (out / "config.json").read_bytes()
    for content in (before[:50], before.replace(b'"seed": 1337', b'"seed": 1336'), b""):
        (out / "config.json").write_bytes(content)
        argv = [str(out / "config.json"), "--init_from=resume"]
        train.train(config.load(train.Config, argv))
        assert "settings are those of the checkpoint" in capsys.readouterr().err
        settings = files.read_json(out / "config.json", "")["config"]
        assert settings == json.loads(before)["config"]


def test_chunks_are_there_at_any_moment(python_data, tmp_path, monkeypatch):
    """The file that says what a run was trained on, while it is overwritten by one on others."""
    for name, ids in (("a", np.arange(100)), ("b", np.arange(50, 90))):
        np.save(tmp_path / f"{name}.npy", ids)
    out = run(python_data, tmp_path / "run", f"--keep={tmp_path}/a.npy")
    write_array = files.write_array

    def seen(path, array):
        places = [out / "chunks.npy", out / "before" / "chunks.npy"]
        assert [len(np.load(p)) for p in places if p.exists()] == [100]
        return write_array(path, array)

    monkeypatch.setattr(files, "write_array", seen)
    run(python_data, out, f"--keep={tmp_path}/b.npy", "--overwrite")
    assert len(np.load(out / "chunks.npy")) == 40


def test_a_target_whose_text_has_changed_is_refused(python_data, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("to be or not to be")
    out = run(python_data, tmp_path / "run", f"--targets=mine={text},val")
    before = everything(out)
    text.write_text("to be, or what else?")
    for work in (
        lambda: run(python_data, out, f"--targets=mine={text},val", "--init_from=resume"),
        lambda: revalue.revalue(revalue.Config(run=str(out), replay=True)),
        lambda: revalue.repair(revalue.Config(run=str(out))),
    ):
        with pytest.raises(UserError, match="text of the target 'mine' is not the one"):
            work()
    assert everything(out) == before
    text.write_text("to be or not to be")
    run(python_data, out, f"--targets=mine={text},val", "--init_from=resume", "--max_iters=9")
    revalue.revalue(revalue.Config(run=str(out), targets=f"mine={text}", end=1))  # its own name


def test_weights_that_are_not_finite_make_no_checkpoint(python_data, tmp_path):
    """Without values, whose losses would tell: the last step's update is seen by no loss."""
    out = run(python_data, tmp_path / "run", "--rule=off", "--max_iters=4")
    before = whole_run(out)
    explode = ["--init_from=resume", "--rule=off", "--max_iters=5", "--eval_interval=0"]

    def step(optimizer, *args):
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(np.inf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(UserError, match="weights are not finite after step 5"):
            run(python_data, out, *explode)
    assert whole_run(out)["ckpt.pt"] == before["ckpt.pt"]


# --- what is cut short while it is read ------------------------------------------------------


def test_a_data_file_cut_short_is_named(python_data, tmp_path):
    """Before the run, and while it reads; and behind the last look, what dies says where."""
    shutil.copytree(python_data, tmp_path / "data")
    path = tmp_path / "data" / "train.npy"
    dataset = data.open_dataset(tmp_path / "data")
    os.truncate(path, path.stat().st_size // 2)
    n = len(dataset.train.rows)
    with pytest.raises(UserError, match=r"train.npy was cut short"):
        dataset.train.batch(np.array([n - 1]), 32)
    with pytest.raises(UserError, match=r"train.npy is missing or damaged"):
        data.open_dataset(tmp_path / "data")
    code = f"""
import os, config, data
dataset = data.open_dataset({str(python_data)!r})
rows = data.np.memmap({str(tmp_path / "cut.npy")!r}, "u1", "w+", shape=1 << 20)
os.truncate({str(tmp_path / "cut.npy")!r}, 0)
config.main(lambda: rows.sum())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=commands.ROOT, capture_output=True)
    assert done.returncode == -signal.SIGBUS
    assert b"Bus error" in done.stderr


# --- links that somebody planted ---------------------------------------------------------------


def test_planted_links_are_not_followed(python_data, tmp_path):
    """Under every name that a run or a revaluation writes to, and under that of its lock."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    out = tmp_path / "run"
    names = ["config.json", "ckpt.pt", "values.npy", "values.json", "ledger.npy", "books.npy"]
    names += ["evaluations.jsonl", "report.html", "keep.npy"]
    out.mkdir()
    for name in names:
        (out / f"{name}.tmp").symlink_to(victim)
        if name.endswith((".npy", ".jsonl", ".html")):
            (out / name).symlink_to(victim)
    run(python_data, out, "--overwrite")
    digest = hashlib.sha256(b"a text").hexdigest()
    planted = out / "revalued" / f"query-{digest[:12]}.txt"
    planted.parent.mkdir()
    planted.symlink_to(victim)
    revalue.query(open_run(out), "a text")
    assert not planted.is_symlink()
    link = tmp_path / "ledger.npy"
    link.symlink_to(victim)
    store.Records(link, store.visit_dtype(1)).commit()  # as for a model of one's own
    assert not link.is_symlink()
    assert victim.read_text() == "mine"
    (out / "lock").unlink()
    (out / "lock").symlink_to(victim)
    outcome = commands.run("train.py", [str(out / "config.json"), "--init_from=resume"])
    assert outcome.is_refusal()
    assert "lock: Too many levels of symbolic links: it is a symbolic link" in outcome.err
    assert victim.read_text() == "mine"
