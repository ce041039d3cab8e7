"""Logging never ends a run: real wandb, with names that it refuses, without a network, and
killed."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import ROOT
from test_lost import arguments

import train
from data import open_dataset
from show import dashboard
from system import store
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
    for name in (b"value_chunks/_/top", b"value/_", b"value_domains/", b"train/loss"):
        assert name in content
    tables = list(out.glob("wandb/offline-run-*/files/media/table/value_chunks/*/top_*.table.json"))
    assert len(tables) == len(NAMES)
    assert not list(tmp_path.parent.rglob("evil*"))
    assert np.isfinite(np.load(out / "values.npy")).any()


# --- the workspace -------------------------------------------------------------------


@dataclass
class Logged:
    """What wandb wrote of an offline run."""

    folder: Path  # of the run
    printed: str
    files: Path
    names: set = field(default_factory=set)  # of all metrics
    hidden: set = field(default_factory=set)  # of those without a panel
    summary: dict = field(default_factory=dict)  # the first part of each name -> its last value
    charts: set = field(default_factory=set)


TARGETS = ("Python code", "Docstrings")


@pytest.fixture(scope="module")
def logged(python_data, tmp_path_factory):
    """A run of two targets by the real wandb, in a process with an empty home."""
    home = tmp_path_factory.mktemp("logged")
    targets = ",".join(f"val:{name}" for name in TARGETS)
    argv = arguments(python_data, home / "run", f"--targets={targets}", "--wandb_log")
    argv += ["--max_iters=6", "--eval_interval=3", "--audit_interval=3", "--book_interval=1"]
    argv += ["--wandb_histogram_interval=2", "--checkpoint_interval=3", "--log_interval=1"]
    command = [sys.executable, ROOT / "train.py", *argv]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, env=environment(home))
    assert done.returncode == 0, done.stderr
    assert "wandb failed" not in done.stderr
    (path,) = (home / "run").glob("wandb/offline-run-*/run-*.wandb")
    found = Logged(home / "run", done.stdout, path.parent / "files")
    for record in records(path.read_bytes()):
        collect(found, record)
    return found


def collect(found, record):
    if record.WhichOneof("record_type") == "metric" and record.metric.options.hidden:
        found.hidden.add(record.metric.name)
    for item in record.history.item:
        name = item.nested_key[0] if item.nested_key else item.key
        if not name.startswith("_"):
            found.names.add(name)
    for item in record.summary.update:
        name = item.nested_key[0] if item.nested_key else item.key
        if not name.startswith("_"):
            found.summary[name] = json.loads(item.value_json)
    for item in record.config.update:
        if item.nested_key[:2] == ["_wandb", "visualize"]:
            found.charts.add(item.nested_key[2])


def records(content):
    """wandb's file: a header of 7 bytes, then blocks of 32 KiB of pieces of records (LevelDB's
    log format)."""
    from wandb.proto import wandb_internal_pb2

    place = 7
    piece = b""
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        place += 7 + length
        piece += content[place - length : place]
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(piece)
            yield record
            piece = b""


def test_wandb_goes_offline_without_a_login(logged):
    assert "no login found, so this run is logged offline" in logged.printed


def test_wandb_has_every_metric_by_its_name(logged):
    names = ["train/loss", "train/lr", "valuing/valuation_share", "val/loss", "val/by_domain"]
    for target in ("Python code", "Docstrings"):
        names.append(f"val_domain/{target}")
        names += [f"value_books/{target}/{x}" for x in ("drop", "data", "momentum", "residual")]
        names += [f"value_audit/{target}/{x}" for x in ("pearson", "rel_l2")]
        names += [f"value/{target}/{x}" for x in ("median_1e-6", "p5_1e-6", "p95_1e-6", "negative")]
        names += [f"value_histogram/{target}", f"value_domains/{target}"]
        names += [f"value_chunks/{target}/top", f"value_chunks/{target}/bottom"]
    (path,) = logged.folder.glob("wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    missing = [name for name in names if name.encode() not in content]
    assert missing == []


def test_wandb_has_a_table_of_the_best_chunks_for_each_checkpoint(logged, python_data):
    values = np.load(logged.folder / "values.npy")
    dataset = open_dataset(python_data)
    best = int(np.nanargmax(values[:, 0]))
    tables = "wandb/offline-run-*/files/media/table/value_chunks/Python code/top_*.table.json"
    first_rows = []
    for path in logged.folder.glob(tables):
        first_rows.append(json.loads(path.read_text())["data"][0])
    assert len(first_rows) == 2  # after steps 3 and 6
    tokens = dataset.train.rows[best]
    domain = dataset.domains[dataset.train.domain[best]]
    text = bytes(tokens[tokens < 255].tolist()).decode(errors="replace")
    expected = [best, domain, pytest.approx(1e6 * values[best, 0], abs=1), text]
    assert expected in [row[:4] for row in first_rows]


def test_wandb_shows_few_panels_the_losses_first(logged):
    panels = sorted(logged.names - logged.hidden)
    expected = ["train/loss", "train/lr", "train/tokens_per_s", "val/loss"]
    of_target = ["value/{}/median_1e-6", "value/{}/negative", "value_audit/{}/pearson"]
    of_target += ["value_books/{}/drop", "value_books/{}/explained", "value_histogram/{}"]
    of_target += ["value_chunks/{}/top", "value_chunks/{}/bottom"]
    for target in TARGETS:
        expected += [name.format(target) for name in of_target]
    expected.append("valuing/valuation_share")
    assert panels == sorted(expected)  # as wandb sorts them
    sections = list(dict.fromkeys(name.split("/")[0] for name in panels))
    assert sections[:3] == ["train", "val", "value"]


def test_wandb_draws_the_domains_in_one_chart_each(logged, python_data):
    """The losses of the domains in one, their shares of the values in one for each target."""
    assert logged.charts == {"val/by_domain", *(f"value_domains/{target}" for target in TARGETS)}
    domains = set(open_dataset(python_data).domains)
    for chart in logged.charts:
        tables = sorted(logged.files.glob(f"media/table/{chart}_table_*.json"))
        assert tables
        rows = json.loads(tables[-1].read_text())["data"]
        shown = {row[1] for row in rows}
        assert shown <= domains
        assert len(shown) >= 2


def test_wandb_keeps_what_it_hides(logged):
    hidden = {"val_domain/Docstrings", "value_books/Docstrings/momentum"}
    hidden |= {"value/Docstrings/mean_1e-6", "value_audit/Python code/rel_l2"}
    assert hidden <= logged.names
    assert hidden <= logged.hidden


def test_the_summary_of_a_run_is_its_losses(logged):
    """And what charts and tables are drawn from."""
    drawn = {f"{chart}_table" for chart in logged.charts}
    for target in TARGETS:
        drawn |= {f"value_chunks/{target}/top", f"value_chunks/{target}/bottom"}
    assert set(logged.summary) - drawn == {"train/loss", "val/loss"}
    assert drawn <= set(logged.summary)
    assert set(logged.summary["val/loss"]) == {"min", "last"}


@pytest.mark.parametrize("name", [*NAMES, "*", "a*b", "notes.txt", "*?["])
def test_no_name_keeps_wandb_from_hiding_a_metric(name, tmp_path):
    """wandb refuses to define a name with a star in it."""
    import wandb

    metric = dashboard.metric_name(name)
    assert "*" not in metric
    run = wandb.init(mode="disabled", dir=tmp_path)
    run.define_metric(f"value/{metric}/mean", hidden=True, summary="none")
    run.finish()


def test_a_domains_share_counts_each_step_the_same(monkeypatch):
    """One step of a thousand times the size does not turn its chart round."""
    monkeypatch.setattr(dashboard.Board, "open", lambda board, cfg: None)
    visits = np.zeros(12, store.visit_dtype(1))
    visits["step"] = np.repeat(np.arange(6), 2)
    visits["chunk"] = np.tile([0, 1], 6)
    visits["value"][:, 0] = np.tile([3.0, -1.0], 6)
    visits["value"][4:6, 0] = [-1000.0, 3000.0]
    train_set = SimpleNamespace(domain=np.array([0, 1]), rows=np.zeros((2, 3), int))
    meta = {"eot": 0}
    data = SimpleNamespace(domains=["code", "prose"], train=train_set, meta=meta)
    cfg = SimpleNamespace(
        batch_size=2, gradient_accumulation_steps=1, checkpoint_interval=3, out_dir="out/x"
    )
    target = SimpleNamespace(name="t")
    board = dashboard.Board(cfg, "id", data, [target], decode=str, visits=visits)
    total = np.array([[15.0], [-5.0]])
    metrics = board.totals(total, np.array([True, True]), step=6)
    chart = metrics["value_domains/t"]
    assert chart.x == [3, 6, 6]
    assert chart.lines["code"][-1] == pytest.approx((5 * 0.75 - 0.25) / 6)
    assert chart.lines["prose"][-1] == pytest.approx((5 * -0.25 + 0.75) / 6)


# --- what goes wrong -----------------------------------------------------------------


def test_a_wandb_that_cannot_start_is_told_once_and_the_run_goes_on(monkeypatch, capsys):
    def broken(board, cfg):
        raise TypeError("an old protobuf")

    monkeypatch.setattr(dashboard.Board, "open", broken)
    cfg = SimpleNamespace(batch_size=1, gradient_accumulation_steps=1, checkpoint_interval=1)
    board = dashboard.Board(cfg, "id", SimpleNamespace(domains=[]), targets=[], decode=None)
    board.log({"train/loss": 1.0}, 1)
    board.finish()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["wandb failed (TypeError: an old protobuf); the run goes on without it"]


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
    process.send_signal(signal.SIGTERM)
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
        self.curves += [x for name, x in metrics.items() if name.startswith("value_domains/")]

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
