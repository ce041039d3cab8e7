"""The machine and the process that a run is on."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import timeit

import numpy as np
import torch

from system.errors import UserError


def check_device(name):
    """Raises UserError where this machine has no device of this name."""
    kind, _, number = name.partition(":")
    here = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    wanted = int(number) + 1 if number.isdigit() else 1
    if (number and not number.isdigit()) or wanted > here.get(kind, 0):
        raise UserError(f"--device={name} is not on this machine: write --device=cpu")


def check_size(cfg):
    """Raises UserError where the machine's memory cannot hold the model, its gradient and moments.
    A layer's own objects count too: there may be a billion layers of nothing."""
    parameters = 12 * cfg.n_layer * cfg.n_embd**2 + 256 * cfg.n_embd
    needed = 16 * parameters + 20_000 * cfg.n_layer
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if cfg.device.startswith("cuda"):
        memory = torch.cuda.get_device_properties(cfg.device).total_memory
    if needed > memory * int(os.environ.get("WORLD_SIZE", "1")):
        what = f"--n_layer={cfg.n_layer} --n_embd={cfg.n_embd} make {parameters:.1e} parameters"
        room = f"over {needed / 1e9:,.0f} GB, and here are {memory / 1e9:,.0f}"
        raise UserError(f"{what}, with their moments {room}: write smaller numbers")


def check_package(name, key):
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"--{key} needs the package {name}: type pip install {name}, or leave it out"
        )


def check_system(cfg):
    check_device(cfg.device)
    check_size(cfg)
    if cfg.wandb_log:
        check_package("wandb", "wandb_log")
    if cfg.tensorboard_log:
        check_package("tensorboard", "tensorboard_log")
    kind = cfg.device.split(":")[0]
    if cfg.shard and "RANK" not in os.environ:
        raise UserError(
            "--shard is for several processes: type torchrun --nproc_per_node=<number of GPUs> train.py ..."
        )
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if cfg.compile and kind == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError(
            "--compile needs a C++ compiler and found neither g++ nor clang++: install one, or leave out --compile"
        )


def describe_run(settings, processes, data_hash, root):
    """What config.json says: enough to run it again. root: of the code."""
    git = (
        subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
        if shutil.which("git")
        else None
    )
    commit = git.stdout.strip() if git and git.returncode == 0 else None
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)
    run = dict(
        config=settings,
        command=" ".join(["python", *sys.argv]),
        processes=processes,
        git_commit=commit,
    )
    return run | dict(versions=versions, data_hash=data_hash)


def peak_flops(device, dtype):
    """What MFU is a share of: the data sheet's dense bf16 rate for GPUs known here, else what a large matmul reaches
    (in float32 on a CPU: bfloat16 is slower there)."""
    name = torch.cuda.get_device_name(device) if "cuda" in device else ""
    for known, peak in (("H200", 989e12), ("H100", 989e12), ("A100", 312e12)):
        if known in name:
            return peak
    a = torch.ones(1024, 1024, device=device, dtype=dtype if name else torch.float32)
    return (
        2 * 1024**3 / min(timeit.repeat(lambda: float((a @ a)[0, 0]), number=1, repeat=3))
    )  # reading a number waits for the device


class Interrupted(list):
    """Empty until SIGTERM or SIGINT asks the run to end after its step; a second one raises KeyboardInterrupt."""

    def __init__(self):
        self.before = {
            number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)
        }

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
