"""Logging never ends a run: real wandb, with names that it refuses, without a network, and killed."""

import os
import signal
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
from commands import ROOT
from test_lost import arguments

import train
from system.terminal import with_commas

NOWHERE = "http://127.0.0.1:9"  # where nothing listens


def environment(tmp_path, **more):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return kept | dict(HOME=str(tmp_path), OMP_NUM_THREADS="1") | more


def test_wandb_refuses_names_and_there_is_no_network(python_data, tmp_path):
    """Names of 129 characters, of dots, with what it has none of; and a login that cannot be
    reached. The run ends well, and what was logged lies in its folder."""
    (tmp_path / "t.txt").write_text("def main():\n    return 1\n")
    out = tmp_path / f"lr=1e-3,bs=2:;?#'{'n' * 129}"
    names = ["n" * 129, "..", "../../evil", "?#:;", "\x1b[31mred\nerror: forged", " x "]
    path = with_commas(str(tmp_path / "t.txt"))
    targets = ",".join(f"{with_commas(name)}={path}" for name in names)
    argv = arguments(python_data, out, f"--targets={targets}", "--wandb_log")
    argv += ["--wandb_project=../a?b#c:", "--wandb_run_name=" + "r" * 200, "--max_iters=4"]
    key = environment(tmp_path, WANDB_API_KEY="a" * 40, WANDB_BASE_URL=NOWHERE)
    command = [sys.executable, ROOT / "train.py", *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=key)
    assert done.returncode == 0, done.stderr
    assert "so this run is logged offline" in done.stdout
    assert "the project is called ..-a-b-c-" in done.stdout
    assert "wandb failed" not in done.stderr
    shown = {c for c in done.stdout + done.stderr if unicodedata.category(c) == "Cc"}
    assert shown <= set("\n\t")
    (logged,) = out.glob("wandb/offline-run-*/run-*.wandb")
    content = logged.read_bytes()
    for part in (b"chunks/_/top", b"value/_", b"domains/", b"train/loss"):
        assert part in content, part
    tables = list(out.glob("wandb/offline-run-*/files/media/table/chunks/*/top_*.table.json"))
    assert len(tables) == len(names)
    assert not list(tmp_path.parent.rglob("evil*"))
    values = np.load(out / "values.npy")
    assert np.isfinite(values).any()


def test_wandb_dies(python_data, tmp_path):
    """Its process is killed while the run goes on: a line, and the run ends as if nothing was."""
    argv = arguments(python_data, tmp_path / "run", "--wandb_log", "--max_iters=3000")
    argv += ["--log_interval=5", "--checkpoint_interval=500", "--eval_interval=0"]
    command = [sys.executable, ROOT / "train.py", *argv]
    log = tmp_path / "log"
    with open(log, "w") as file:
        offline = environment(tmp_path, WANDB_MODE="offline")
        process = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file, env=offline)
    while "step 5/" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    for pid in children.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    while "goes on without it" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # which lets the step finish
    assert process.wait(60) == 0, log.read_text()
    lines = log.read_text().splitlines()
    assert len([line for line in lines if line.startswith("wandb failed")]) == 1
    assert not [line for line in lines if "Traceback" in line]
    assert any(line.startswith("stopped after step") for line in lines)


class Recorder:
    """A logger that keeps what it is given."""

    def __init__(self):
        self.curves = []

    def log(self, metrics, step):
        self.curves += [x for name, x in metrics.items() if name.startswith("domains/")]

    def finish(self):
        pass


def test_charts_go_on_after_a_resume(python_data, tmp_path, monkeypatch):
    """The chart of the domains' values so far has the points from before."""
    recorders = []

    def record(board, cfg):
        recorders.append(Recorder())
        return recorders[-1]

    monkeypatch.setattr(train.dashboard.Board, "open", record)
    argv = ["--wandb_log", "--targets=val", "--checkpoint_interval=2"]
    for more in (["--max_iters=4"], ["--max_iters=8", "--init_from=resume"]):
        cfg = train.config.load(
            train.Config, arguments(python_data, tmp_path / "run", *argv, *more)
        )
        train.train(cfg)
    cfg = train.config.load(train.Config, arguments(python_data, tmp_path / "whole", *argv))
    train.train(cfg)
    resumed, whole = recorders[1].curves[-1], recorders[2].curves[-1]
    assert resumed.x == whole.x == [2, 4, 6, 8]
    assert resumed.lines.keys() == whole.lines.keys()
    for name, line in whole.lines.items():
        assert resumed.lines[name] == pytest.approx(line)
