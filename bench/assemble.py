"""
What Triton's compiler and NVIDIA's assembler make of the fused kernel for a GPU that need not be here: registers, spills, shared memory, blocks
that fit a multiprocessor, tensor-core instructions. Not how long it takes: that is bench/kernels.py, on the GPU.

    python bench/assemble.py                          Hopper (H100, H200), bfloat16, one target
    python bench/assemble.py --arch=80 --K=3          A100, which has no copy engine; three targets

A spilled register costs a trip to memory each time; a tiling that does not fit a multiprocessor (0 blocks) is not chosen there.
Prints a table and last one JSON line.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)

import config
from shapley import kernel
from system.errors import UserError

# Registers and bytes of shared memory of a multiprocessor; a block's share of the second is 1 KB more than it asks for.
PROCESSOR = {"80": (65536, 167936), "90": (65536, 233472)}


@dataclass
class Config:
    arch: Literal["80", "90"] = "90"  # compute capability times ten
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of activations and their gradients
    K: int = 1  # targets

    def __post_init__(self):
        config.check(self, at_least={"K": 1})


def assemble(tiling, arch, dtype, K):
    """What one of kernel.TILINGS becomes: a dict. Raises triton.CompilationError where it cannot be compiled."""
    import triton
    from triton.backends.compiler import GPUTarget

    TILE_O, TILE_I, TILE_T, num_warps, num_stages, tma = tiling
    low = dict(float32="fp32", bfloat16="bf16")[dtype]
    tiles = dict(
        gy=(low, TILE_T, TILE_O),
        x=(low, TILE_T, TILE_I),
        h=("fp32", TILE_O, TILE_I),
        gw=("fp32", TILE_O, TILE_I),
    )
    signature = {
        name: f"tensordesc<{of}[1,{rows},{columns}]>" if tma else f"*{of}"
        for name, (of, rows, columns) in tiles.items()
    }
    signature |= dict(part="*fp32", **dict.fromkeys(("B", "T", "O", "I", "SPLITS"), "i32"))
    fixed = dict(
        K=K,
        K_UP=triton.next_power_of_2(K),
        TILE_O=TILE_O,
        TILE_I=TILE_I,
        TILE_T=TILE_T,
        PRECISION="tf32",
        TMA=tma,
        WIDEN=False,
    )
    fixed |= dict(GROUP=kernel.GROUP)
    even = [
        i for i, (name, of) in enumerate(signature.items()) if of[0] == "*" or name in "TOI"
    ]  # as a launch finds sizes that 16 divides
    source = triton.compiler.ASTSource(
        kernel._fused,
        signature | dict.fromkeys(fixed, "constexpr"),
        fixed,
        {(i,): [["tt.divisibility", 16]] for i in even},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", int(arch), 32),
        options=dict(num_warps=num_warps, num_stages=num_stages),
    )
    tools = Path(triton.__path__[0], "backends/nvidia/bin")
    with tempfile.TemporaryDirectory() as folder:
        (cubin := Path(folder, "kernel.cubin")).write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run(
                [tools / tool, *argv, cubin], capture_output=True, text=True, check=True
            ).stdout
            for tool, *argv in (("cuobjdump", "-res-usage"), ("nvdisasm",))
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    all_registers, all_shared = PROCESSOR[arch]
    blocks = min(
        all_registers // (-(-registers // 8) * 8 * 32 * num_warps),
        all_shared // (compiled.metadata.shared + 1024),
    )
    products = sorted(set(re.findall(r"\b(HG?MMA\.\w+)", code)))
    return dict(
        **tiling._asdict(),
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        blocks=blocks,
        products=products,
    )


def main(cfg):
    if kernel.triton is None:
        raise UserError("triton is not installed: type pip install -r requirements-dev.txt")
    print(f"{'tiling':38}{'registers':>10}{'stack bytes':>12}{'shared':>9}{'blocks':>8}  products")
    rows = [
        assemble(tiling, cfg.arch, cfg.dtype, cfg.K)
        for tiling in kernel.TILINGS
        if cfg.arch == "90" or not tiling.tma
    ]
    for row in rows:
        what = (
            "{TILE_O} x {TILE_I} x {TILE_T}, {num_warps} warps, {num_stages} stages".format(**row)
            + ", tma" * row["tma"]
        )
        print(
            f"{what:38}{row['registers']:10}{row['stack']:12}{row['shared']:9,}{row['blocks']:8}  {', '.join(row['products'])}"
        )
    print(json.dumps(dict(triton=kernel.triton.__version__, **vars(cfg), rows=rows)))


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
