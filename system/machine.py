"""The machine and the process that a run is on."""

import contextlib
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import torch

from system import needs, parallel
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


def check_package(name, key):
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"--{key} needs the package {name}: type pip install {name}, or leave it out"
        )


def check_system(cfg):
    """Raises UserError where this machine cannot do what a train.Config asks for."""
    check_device(cfg.device)
    needs.check_memory(cfg)
    if cfg.wandb_log:
        check_package("wandb", "wandb_log")
    if cfg.shard and "RANK" not in os.environ:
        cure = "type torchrun --nproc_per_node=<number of GPUs> train.py ..."
        raise UserError(f"--shard is for several processes: {cure}")
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    is_cpu = cfg.device.split(":")[0] == "cpu"
    if cfg.compile and is_cpu and not any(shutil.which(name) for name in compilers):
        what = "--compile needs a C++ compiler and found neither g++ nor clang++"
        raise UserError(f"{what}: install one, or leave out --compile")


def describe_run(settings, processes, data_hash, root):
    """What config.json says: enough to run it again. root: of the code."""
    return {
        "config": settings,
        "command": " ".join(["python", *sys.argv]),
        "processes": processes,
        "git_commit": git_commit(root),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "data_hash": data_hash,
    }


def git_commit(root):
    """The commit of the code, None where git does not know it."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", root, "rev-parse", "HEAD"]
    git = subprocess.run(command, capture_output=True, text=True)
    return git.stdout.strip() if git.returncode == 0 else None


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16, of the data sheets


def peak_flops(device):
    """The operations a second that MFU is a share of, by the device's data sheet. NaN where there
    is none, as for a CPU: a share of what a matmul reaches at some moment would say nothing."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    for known, peak in PEAK_FLOPS.items():
        if known in name:
            return peak
    return math.nan


def compile_model(model):
    """torch.compile, for a model that is valued."""
    # `adamw` has another number of exact rows at every step
    torch._dynamo.config.force_parameter_static_shapes = False
    # training, targets, evaluation, second pass and audit have graphs of their own
    torch._dynamo.config.recompile_limit = 32
    return torch.compile(model, fullgraph=True)


@contextlib.contextmanager
def memory_told():
    """Where memory ends within it, a UserError says what to type."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:  # torch's own error of a GPU is a RuntimeError
        if not ends_memory(e):
            raise
        what = "the memory of the device is full"
        cure = "halve --batch_size and double --gradient_accumulation_steps: it is the same step"
        raise UserError(f"{what}: {cure}. Or write a smaller --n_embd") from e


def ends_memory(error):
    """Whether an exception says that there is no more memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error)  # torch's, on a CPU


class Stopped(Exception):
    """The run was asked to end, and gives up the step that is under way."""


class Interrupted:
    """Whether SIGTERM or SIGINT has asked the run to end. A second signal raises
    KeyboardInterrupt."""

    def __init__(self):
        self.is_asked = False  # of this process
        self.is_stopped = False  # whether check() has raised Stopped
        self.is_held = False
        self.handlers = {}

    def listen(self):
        """From here on to restore() the two signals ask, and do not kill."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True

    def check(self):
        """Raises Stopped where any process was asked to end. Every process must call."""
        if not self.is_held and parallel.any_of(self.is_asked):
            self.is_stopped = True
            raise Stopped

    @contextlib.contextmanager
    def held(self):
        """Within it check() does nothing: what stands there is done as a whole."""
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False

    def restore(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


# --- random numbers -----------------------------------------------------------


def rng_state():
    gpu_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), gpu_state


def set_rng_state(state):
    cpu_state, gpu_state = state
    torch.set_rng_state(cpu_state)
    if torch.cuda.is_available() and gpu_state is not None:
        torch.cuda.set_rng_state(gpu_state)


@contextlib.contextmanager
def replaying(state):
    """Random numbers (dropout) as they were at a state, without disturbing those to come. None:
    there is nothing to replay."""
    if state is None:
        yield
        return
    with torch.random.fork_rng():
        set_rng_state(state)
        yield
