"""
What Triton's compiler and NVIDIA's assembler make of the fused kernel for a GPU that need not be
here: registers, spills, shared memory, blocks that fit a multiprocessor, tensor-core instructions.
Not how long it takes: that is bench/kernels.py, on the GPU.

    python bench/assemble.py                     Hopper (H100, H200), bfloat16, one target
    python bench/assemble.py --arch=80 --K=3     A100, which has no copy engine; three targets

A spilled register costs a trip to memory each time. A tiling that does not fit a multiprocessor
(0 blocks) is not chosen there. Prints a table and last one JSON line.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: here it compiles

import config
from shapley import kernel
from system.errors import UserError


@dataclass
class Processor:
    """A multiprocessor of a GPU."""

    registers: int
    shared: int  # bytes


PROCESSORS = {"80": Processor(65536, 167936), "90": Processor(65536, 233472)}
RESERVED = 1024  # bytes of shared memory that a block takes beyond what it asks for
WARP = 32  # threads


@dataclass
class Config:
    arch: Literal["80", "90"] = "90"  # compute capability times ten
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of activations and their gradients
    K: int = 1  # targets

    def __post_init__(self):
        config.check(self, at_least={"K": 1})


def describe_arguments(tiling, dtype, K):
    """The kernel's arguments as a launch would give them: {name: type}, of those fixed while it is
    compiled "constexpr"; {name: value} of the fixed ones; and the attributes {(i,): ...} of the
    arguments that 16 divides."""
    low = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    tensors = {
        "gy": (low, tiling.TILE_T, tiling.TILE_O),
        "x": (low, tiling.TILE_T, tiling.TILE_I),
        "h": ("fp32", tiling.TILE_O, tiling.TILE_I),
        "gw": ("fp32", tiling.TILE_O, tiling.TILE_I),
    }
    types = {}
    for name, (element, rows, columns) in tensors.items():
        types[name] = f"tensordesc<{element}[1,{rows},{columns}]>" if tiling.tma else f"*{element}"
    types["part"] = "*fp32"
    for name in ("B", "T", "O", "I", "SPLITS"):
        types[name] = "i32"
    divisible = {}
    for i, (name, kind) in enumerate(types.items()):
        if kind.startswith("*") or name in ("T", "O", "I"):
            divisible[(i,)] = [["tt.divisibility", 16]]
    fixed = {
        "K": K,
        "K_UP": kernel.triton.next_power_of_2(K),
        "TILE_O": tiling.TILE_O,
        "TILE_I": tiling.TILE_I,
        "TILE_T": tiling.TILE_T,
        "PRECISION": "tf32",
        "TMA": tiling.tma,
        "WIDEN": False,
        "GROUP": kernel.GROUP,
    }
    types.update(dict.fromkeys(fixed, "constexpr"))
    return types, fixed, divisible


def disassemble(binary):
    """What NVIDIA's tools say of a compiled kernel: its use of resources, and its instructions."""
    tools = Path(kernel.triton.__path__[0], "backends/nvidia/bin")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        usage = run_tool(tools / "cuobjdump", "-res-usage", path)
        return usage, run_tool(tools / "nvdisasm", path)


def run_tool(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def assemble(tiling, arch, dtype, K):
    """What one of kernel.TILINGS becomes: a dict. Raises triton.CompilationError where it cannot be
    compiled."""
    from triton.backends.compiler import GPUTarget

    types, fixed, divisible = describe_arguments(tiling, dtype, K)
    compiled = kernel.triton.compile(
        kernel.triton.compiler.ASTSource(kernel._fused, types, fixed, divisible),
        target=GPUTarget("cuda", int(arch), WARP),
        options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
    )
    usage, code = disassemble(compiled.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    registers_of_block = -(-registers // 8) * 8 * WARP * tiling.num_warps
    shared = compiled.metadata.shared
    processor = PROCESSORS[arch]
    return {
        **tiling._asdict(),
        "registers": registers,
        "stack": stack,
        "shared": shared,
        "blocks": min(
            processor.registers // registers_of_block,
            processor.shared // (shared + RESERVED),
        ),
        "products": sorted(set(re.findall(r"\b(HG?MMA\.\w+)", code))),
    }


def main(cfg):
    if kernel.triton is None:
        raise UserError("triton is not installed: type pip install -r requirements-dev.txt")
    print(f"{'tiling':38}{'registers':>10}{'stack bytes':>12}{'shared':>9}{'blocks':>8}  products")
    rows = []
    for tiling in kernel.TILINGS:
        if tiling.tma and cfg.arch != "90":
            continue
        rows.append(assemble(tiling, cfg.arch, cfg.dtype, cfg.K))
    for row in rows:
        title = f"{row['TILE_O']} x {row['TILE_I']} x {row['TILE_T']}, {row['num_warps']} warps, "
        title += f"{row['num_stages']} stages"
        if row["tma"]:
            title += ", tma"
        line = f"{title:38}{row['registers']:10}{row['stack']:12}{row['shared']:9,}"
        print(f"{line}{row['blocks']:8}  {', '.join(row['products'])}")
    print(json.dumps({"triton": kernel.triton.__version__, **vars(cfg), "rows": rows}))


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
