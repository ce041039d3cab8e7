"""What the benchmarks share: a clock, and the line of JSON that ends what they print."""

import json
import os
import platform
import subprocess
import time
from pathlib import Path

# As train.py does. torch reads it when it first asks for memory, not when it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

ROOT = Path(__file__).resolve().parents[1]


def timed(function, *arguments):
    """Calls a function. Returns its seconds and its result."""
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def machine_name(device):
    """The graphics card, or the kind of CPU and the number of torch's threads."""
    import torch

    if "cuda" in device:
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def print_json(cfg, rows, **about):
    """The last line: what is known of the machine and the code, the options, the rows."""
    git = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    print(json.dumps({**about, "commit": commit, **vars(cfg), "rows": rows}))
