"""Logging never ends a run: real wandb, with names that it refuses, without a network, and
killed."""

import os
import signal
import subprocess
import sys
import time
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from commands import ROOT
from test_lost import arguments

import train
from show import dashboard
from system.terminal import with_commas

NOWHERE = "http://127.0.0.1:9"  # where nothing listens


def environment(tmp_path, **more):
    """Without a login, and without what this process's environment says of wandb."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return kept | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"} | more


NAMES = ["n" * 129, "..", "../../evil", "?#:;", "\x1b[31mred\nerror: forged", " x "]


def test_a_run_ends_well_where_wandb_refuses_its_names_and_has_no_network(python_data, tmp_path):
    """Names of 129 characters, of dots, of characters that wandb refuses; and a login that cannot
    be reached. What was logged lies in the run's folder."""
    (tmp_path / "t.txt").write_text("def main():\n    return 1\n")
    out = tmp_path / f"lr=1e-3,bs=2:;?#'{'n' * 129}"
    path = with_commas(str(tmp_path / "t.txt"))
    targets = ",".join(f"{with_commas(name)}={path}" for name in NAMES)
    argv = arguments(python_data, out, f"--targets={targets}", "--wandb_log")
    argv += ["--wandb_project=../a?b#c:", "--wandb_run_name=" + "r" * 200, "--max_iters=4"]
    key = environment(tmp_path, WANDB_API_KEY="a" * 40, WANDB_BASE_URL=NOWHERE)
    command = [sys.executable, ROOT / "train.py", *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=key)
    assert done.returncode == 0, done.stderr
    assert "so this run is logged offline" in done.stdout
    assert "the project is called ..-a-b-c-" in done.stdout
    assert "wandb failed" not in done.stderr
    control = {c for c in done.stdout + done.stderr if unicodedata.category(c) == "Cc"}
    assert control <= set("\n\t")
    (logged,) = out.glob("wandb/offline-run-*/run-*.wandb")
    content = logged.read_bytes()
    for name in (b"chunks/_/top", b"value/_", b"domains/", b"train/loss"):
        assert name in content
    tables = list(out.glob("wandb/offline-run-*/files/media/table/chunks/*/top_*.table.json"))
    assert len(tables) == len(NAMES)
    assert not list(tmp_path.parent.rglob("evil*"))
    assert np.isfinite(np.load(out / "values.npy")).any()


def test_a_run_goes_on_without_wandb_when_its_process_is_killed(python_data, tmp_path):
    argv = arguments(python_data, tmp_path / "run", "--wandb_log", "--max_iters=3000")
    argv += ["--log_interval=5", "--checkpoint_interval=500", "--eval_interval=0"]
    command = [sys.executable, ROOT / "train.py", *argv]
    log = tmp_path / "log"
    with open(log, "w") as file:
        offline = environment(tmp_path, WANDB_MODE="offline")
        process = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file, env=offline)
    wait_for("step 5/", log, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    assert children.stdout
    for pid in children.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    wait_for("goes on without it", log, process)
    process.send_signal(signal.SIGTERM)  # which lets the step finish
    assert process.wait(60) == 0, log.read_text()
    lines = log.read_text().splitlines()
    assert len([line for line in lines if line.startswith("wandb failed")]) == 1
    assert not [line for line in lines if "Traceback" in line]
    assert any(line.startswith("stopped after step") for line in lines)


def wait_for(text, log, process):
    """Waits until a text stands in a log, while the process runs."""
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)


class Recorder:
    """A logger that keeps the charts of the domains."""

    def __init__(self):
        self.curves = []

    def log(self, metrics, step):
        self.curves += [x for name, x in metrics.items() if name.startswith("domains/")]

    def finish(self):
        pass


def test_the_charts_of_a_resumed_run_have_the_points_from_before(
    python_data, tmp_path, monkeypatch
):
    recorders = []

    def record(board, cfg):
        recorders.append(Recorder())
        return recorders[-1]

    monkeypatch.setattr(train.dashboard.Board, "open", record)
    argv = ["--wandb_log", "--targets=val", "--checkpoint_interval=2"]
    for out, more in (
        ("resumed", ["--max_iters=4"]),
        ("resumed", ["--max_iters=8", "--init_from=resume"]),
        ("whole", ["--max_iters=8"]),
    ):
        options = arguments(python_data, tmp_path / out, *argv, *more)
        train.train(train.config.load(train.Config, options))
    _, resumed, whole = [recorder.curves[-1] for recorder in recorders]
    assert resumed.x == [2, 4, 6, 8]
    assert whole.x == [2, 4, 6, 8]
    assert resumed.lines.keys() == whole.lines.keys()
    for name, line in whole.lines.items():
        assert resumed.lines[name] == pytest.approx(line)


class Refusing:
    """A logger that refuses everything."""

    def __init__(self):
        self.asked = 0
        self.abandoned = 0

    def log(self, metrics, step):
        self.asked += 1
        raise ValueError(f"no {metrics}")

    def abandon(self, error):
        self.abandoned += 1


def test_a_board_asks_no_more_after_so_many_failures(monkeypatch, capsys):
    refusing = Refusing()
    monkeypatch.setattr(dashboard.Board, "open", lambda board, cfg: refusing)
    cfg = SimpleNamespace(batch_size=1, gradient_accumulation_steps=1, checkpoint_interval=1)
    board = dashboard.Board(cfg, "id", SimpleNamespace(domains=[]), targets=[], decode=None)
    for step in range(dashboard.PATIENCE + 5):
        board.log({"train/loss": 1.0}, step)
    board.finish()
    lines = capsys.readouterr().err.splitlines()
    assert refusing.asked == dashboard.PATIENCE
    assert refusing.abandoned == 1
    assert len(lines) == dashboard.PATIENCE
    assert lines[-1].endswith("the run goes on without it")
