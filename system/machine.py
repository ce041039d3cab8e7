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
    """Raises UserError where this machine cannot do what a train.Config asks for."""
    check_device(cfg.device)
    check_size(cfg)
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


def peak_flops(device, dtype):
    """The operations a second that MFU is a share of: of a GPU known here the data sheet's, else
    what a large matmul reaches (in float32 on a CPU, where bfloat16 is slower)."""
    on_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if on_gpu else ""
    for known, peak in PEAK_FLOPS.items():
        if known in name:
            return peak
    a = torch.ones(1024, 1024, device=device, dtype=dtype if on_gpu else torch.float32)

    def multiply():
        return float((a @ a)[0, 0])  # reading a number waits for the device

    return 2 * 1024**3 / min(timeit.repeat(multiply, number=1, repeat=3))


def compile_model(model):
    """torch.compile, for a model that is valued."""
    # `adamw` has another number of exact rows at every step
    torch._dynamo.config.force_parameter_static_shapes = False
    # training, targets, evaluation, second pass and audit have graphs of their own
    torch._dynamo.config.recompile_limit = 32
    return torch.compile(model, fullgraph=True)


class Interrupted:
    """Whether SIGTERM or SIGINT has asked the run to end after its step. A second signal raises
    KeyboardInterrupt."""

    def __init__(self):
        self.is_asked = False
        self.handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True

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
