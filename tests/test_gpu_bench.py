"""bench/gpu.py, every part of it tiny on the CPU: so that nothing is met for the first time on a
card."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu
from system.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PARTS = "values,kernels,steps,target,accumulation,nanogpt,training,memory"


def command(folder, python_data, *more):
    words = [sys.executable, "bench/gpu.py", "--device=cpu", f"--out={folder}", f"--parts={PARTS}"]
    # a model.py with nanoGPT's interface
    return [*words, f"--data_dir={python_data}", f"--nanogpt={ROOT / 'model.py'}", *more]


def parts_of(folder):
    return gpu.read_parts(folder)


def test_every_part_runs_and_a_killed_call_keeps_what_was_done(tmp_path, python_data):
    folder = tmp_path / "gpu"
    killed = subprocess.Popen(
        command(folder, python_data), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    while not parts_of(folder):
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = parts_of(folder)
    assert [part["state"] for part in before.values()] == ["done"]
    assert "adamw2" in (folder / "summary.md").read_text()

    done = subprocess.run(command(folder, python_data), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "values: is there already" in done.stdout
    parts = parts_of(folder)
    assert list(parts) == PARTS.split(",")
    assert {part["state"] for part in parts.values()} == {"done"}
    assert parts["values"] == before["values"]
    summary = (folder / "summary.md").read_text()
    for name in parts:
        assert f"## {name}: done" in summary
    assert "our throughput over nanoGPT's" in summary
    printed = (folder / "values.txt").read_text().splitlines()
    rows = json.loads(printed[-1])["rows"]
    assert len(rows) == 10
    for row in rows:
        assert row["rel_l2"] < (1e-5 if row["dtype"] == "float32" else 1e-2)
    assert (folder / "run" / "values.npy").exists()


def test_what_fails_or_takes_too_long_is_said_and_tried_again(tmp_path, capsys):
    missing = str(tmp_path / "missing.py")
    cfg = gpu.Config(out=str(tmp_path), device="cpu", parts="nanogpt", nanogpt=missing)
    for _ in range(2):
        with pytest.raises(UserError, match=r"nanogpt: see the \.txt files"):
            gpu.main(cfg)
        assert parts_of(tmp_path)["nanogpt"]["state"] == "failed: exit status 2"
    assert "no such file" in (tmp_path / "nanogpt.txt").read_text()
    cfg = gpu.Config(out=str(tmp_path), device="cpu", parts="values,kernels,training", minutes=0.01)
    with pytest.raises(UserError, match="nanogpt, values: see"):
        gpu.main(cfg)
    assert parts_of(tmp_path)["values"]["state"] == "stopped: the time was over"
    said = capsys.readouterr().out
    assert "kernels: left for the next time" in said
    assert "training: left out: no data: name a prepared folder" in said
    cfg = gpu.Config(out=str(tmp_path), device="cpu", parts="kernels", minutes=5)
    with pytest.raises(UserError, match="nanogpt, values: see"):
        gpu.main(cfg)
    assert parts_of(tmp_path)["kernels"]["state"] == "done"


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid)
child.wait()
"""


def runs(pid):
    """Whether a process runs: one that has ended may be listed until its parent asks for it."""
    try:
        return "State:\tZ" not in Path("/proc", pid, "status").read_text()
    except FileNotFoundError:
        return False


def test_a_part_is_stopped_with_all_that_it_started(tmp_path):
    printed = tmp_path / "part.txt"
    state = gpu.run_part(["-c", PARENT], printed, seconds=2)
    assert state == "stopped: the time was over"
    child = printed.read_text().strip()
    end = time.monotonic() + 10
    while runs(child):
        assert time.monotonic() < end, "what the part started runs on"
        time.sleep(0.1)


BARE = """
import sys
for name in ("zstandard", "pyarrow", "tiktoken", "scipy", "wandb", "datasets", "safetensors"):
    sys.modules[name] = None
import bench.kernels, bench.overhead, train
from bench import gpu
gpu.check_values(gpu.Config(device="cpu"))
"""


def test_a_machine_with_torch_numpy_and_tqdm_will_do():
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "adamw2        float32" in done.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parts": "kernels,speed"}, "--parts=speed: choose from values, kernels"),
        ({"minutes": -1.0}, "--minutes=-1.0: it must be at least 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        gpu.Config(**options)
