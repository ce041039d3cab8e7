"""The machine and the process that a run is on."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import timeit

import numpy as np
import torch


def check_system(cfg):
    kind = cfg.device.split(":")[0]
    if kind not in ("cpu", "cuda", "mps") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device={cfg.device} is not on this machine: write --device=cpu")
    if cfg.shard and "RANK" not in os.environ:
        raise ValueError("--shard is for several processes: type torchrun --nproc_per_node=<number of GPUs> train.py ...")
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if cfg.compile and kind == "cpu" and not any(map(shutil.which, compilers)):
        raise ValueError("--compile needs a C++ compiler and found neither g++ nor clang++: install one, or leave out --compile")


def describe_run(cfg, processes, data_hash, root):
    """What config.json says: enough to run it again. root: of the code."""
    git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True) if shutil.which("git") else None
    commit = git.stdout.strip() if git and git.returncode == 0 else None
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)
    run = dict(config=vars(cfg), command=" ".join(["python", *sys.argv]), processes=processes, git_commit=commit)
    return run | dict(versions=versions, data_hash=data_hash)


def peak_flops(device, dtype):
    """What MFU is a share of: the data sheet's dense bf16 rate for GPUs known here, else what a large matmul reaches
    (in float32 on a CPU: bfloat16 is slower there)."""
    name = torch.cuda.get_device_name(device) if "cuda" in device else ""
    for known, peak in (("H200", 989e12), ("H100", 989e12), ("A100", 312e12)):
        if known in name:
            return peak
    a = torch.ones(1024, 1024, device=device, dtype=dtype if name else torch.float32)
    return 2 * 1024**3 / min(timeit.repeat(lambda: float((a @ a)[0, 0]), number=1, repeat=3))  # reading a number waits for the device


class Interrupted(list):
    """Empty until SIGTERM or SIGINT asks the run to end after its step; a second one raises KeyboardInterrupt."""

    def __init__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(self, number, frame):
        if self:
            raise KeyboardInterrupt
        self.append(number)

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def rng_state():
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_rng_state(state):
    torch.set_rng_state(state[0])
    if torch.cuda.is_available() and state[1] is not None:
        torch.cuda.set_rng_state(state[1])


@contextlib.contextmanager
def replaying(state):
    """Random numbers (dropout) as they were at state, without disturbing those to come; None: nothing to replay."""
    with torch.random.fork_rng(enabled=state is not None):
        if state is not None:
            set_rng_state(state)
        yield
