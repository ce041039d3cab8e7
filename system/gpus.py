"""Which GPUs a machine has, found without torch, which takes seconds to be imported."""

import shutil
import subprocess

ASK = ("--query-gpu=memory.total", "--format=csv,noheader,nounits")
MIB = 1 << 20
PATIENCE = 20  # seconds: a driver may be starting, or hang


def largest_gpu():
    """The memory of the largest of NVIDIA's GPUs here, in GB; 0.0 where there is none."""
    program = shutil.which("nvidia-smi")
    if not program:
        return 0.0
    try:
        answer = subprocess.run([program, *ASK], capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return 0.0
    sizes = [0.0]
    for line in answer.stdout.splitlines():
        if line.strip().isdigit():  # else "[N/A]", or a message
            sizes.append(int(line) * MIB / 1e9)
    return max(sizes)
