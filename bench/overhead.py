"""
What valuing costs: plain steps, plain steps and the target's own forward and backward, valued steps; one process, in turn.

    python bench/overhead.py                                  the three CPU shapes, a few minutes each
    python bench/overhead.py --shapes=byte --rounds=21        one shape, more rounds
    python bench/overhead.py --device=cuda --dtype=bfloat16 --shapes=gpt2-small-1024
    torchrun --nproc_per_node=2 bench/overhead.py --shapes=byte --target=2          the same global batch by two processes

A step is forward, backward, clipping and AdamW. Ratios are of throughput, round by round, then their median: above 1 is faster;
/best compares each arm's fastest step with the fastest step of plain + target, which other users of a shared machine spoil least.
Peak memory is each arm's own, of a process of its own (not measured under torchrun). Prints a table and last one JSON line.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as train.py does

import numpy as np
import torch

import config
from data import Target
from model import GPT, GPTConfig
from shapley import ghost
from shapley.directions import RULES
from system import parallel
from system.errors import UserError
from system.machine import peak_flops
from valuation import Valuation

SHAPES = {  # n_layer, n_head, n_embd, T, vocab, B
    "byte": (6, 6, 384, 256, 256, 8),
    "gpt2": (6, 6, 384, 256, 50304, 8),
    "gpt2-small": (12, 12, 768, 512, 50304, 2),
    "gpt2-small-1024": (12, 12, 768, 1024, 50304, 16),
    "gpt2-medium": (24, 16, 1024, 1024, 50304, 8),
    "tiny": (2, 2, 64, 32, 256, 4),
    "thin": (
        12,
        2,
        16,
        8,
        256,
        2,
    ),  # twelve layers of next to nothing: what is left is the host's own work, which a GPU has to wait for
}
PLAIN, TARGET = "plain", "plain + target"


@dataclass
class Config:
    shapes: str = "byte,gpt2,gpt2-small"  # comma-separated; see SHAPES
    rules: str = "sgd,adamw_linear,adamw,sgd2,adamw2"  # comma-separated
    target: int = 1  # chunks of the target a step
    K: int = 1  # targets
    accumulation: int = 1  # micro-batches of a step, each of the shape's B chunks
    rounds: int = 9  # each arm once a round
    form: Literal["auto", "running", "matmul", "fused"] = "auto"  # of the contraction
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if torch.cuda.is_available() else "float32"
    compile: bool = False
    memory: bool = True  # measure peak memory too, each arm in a process of its own
    arm: str = ""  # run only this arm, of one shape, and print its peak memory in bytes

    def __post_init__(self):
        for shape in self.shapes.split(","):
            if shape not in SHAPES:
                raise UserError(f"--shapes={shape}: choose from {', '.join(SHAPES)}")
        for rule in self.rules.split(","):
            if rule not in RULES[1:]:
                raise UserError(f"--rules={rule}: choose from {', '.join(RULES[1:])}")
        config.check(self, at_least={"target": 1, "K": 1, "accumulation": 1, "rounds": 1})


class Bench:
    """One model and, for every arm, a step() that leaves it trained by one step."""

    def __init__(self, cfg, shape, arms, folder):
        n_layer, n_head, n_embd, self.T, vocab, self.B = SHAPES[shape]
        torch.manual_seed(0)
        ghost.FORM = cfg.form
        self.cfg, self.device = cfg, cfg.device
        self.raw_model = GPT(GPTConfig(self.T, vocab, n_layer, n_head, n_embd, bias=False)).to(
            cfg.device
        )
        torch._dynamo.config.force_parameter_static_shapes = False  # as train.py does
        self.model = (
            torch.compile(self.raw_model, fullgraph=True) if cfg.compile else self.raw_model
        )
        self.trained = parallel.replicate(self.model)
        self.optimizer = self.raw_model.configure_optimizers(
            0.1, 1e-4, (0.9, 0.95), cfg.device.split(":")[0]
        )
        bf16 = cfg.dtype == "bfloat16"
        self.ctx = (
            torch.amp.autocast(cfg.device.split(":")[0], torch.bfloat16) if bf16 else nullcontext()
        )
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, vocab, (self.B, self.T + 1))
        self.own = np.arange(self.B)[
            parallel.mine(self.B)
        ]  # this rank's chunks of the global batch, and of a target
        self.rows = torch.from_numpy(self.tokens[self.own]).to(cfg.device)
        targets = [
            Target(str(k), rng.integers(0, vocab, (cfg.target, self.T + 1)), None)
            for k in range(cfg.K)
        ]
        self.target = [
            torch.from_numpy(t.rows[parallel.mine(cfg.target)]).to(cfg.device) for t in targets
        ]
        self.valuations = {}
        for rule in set(arms) - {PLAIN, TARGET}:
            (run := Path(folder, rule)).mkdir()
            self.valuations[rule] = Valuation(
                self.raw_model, self.optimizer, self.valuation_loss, targets, rule, self.B * cfg.accumulation, 1000, run,
                cfg.target, "fixed", compile=cfg.compile, book_interval=1000,
            )  # fmt: skip

    def loss(self, X, Y, ledger=None, model=None):
        with self.ctx:
            return (self.model if model is None else model)(X, Y, ledger)[1]

    def valuation_loss(self, X, Y, ledger=None):
        return self.loss(
            torch.as_tensor(X).to(self.device), torch.as_tensor(Y).to(self.device), ledger
        )

    def step(self, arm):
        valuation, X, Y = self.valuations.get(arm), self.rows[:, :-1], self.rows[:, 1:]
        if arm == TARGET:
            for rows in self.target:
                self.loss(rows[:, :-1], rows[:, 1:]).backward()
                parallel.add([p.grad for p in self.raw_model.parameters()])
                self.optimizer.zero_grad()
        if valuation:
            valuation.open(1, 1e-4, self.tokens)  # step 1: not one that the books measure
        for i in range(1, self.cfg.accumulation + 1):
            ledger = valuation.ledger(self.own, X, Y) if valuation else None
            self.trained.require_backward_grad_sync = i == self.cfg.accumulation
            (self.loss(X, Y, ledger, self.trained) / self.cfg.accumulation).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), 1.0)
        if valuation:
            valuation.before_step((1.0 / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if valuation:
            valuation.close()
            valuation.pending.clear()  # the flush is the disk's business

    def timed(self, arm):
        self.wait()
        began = time.perf_counter()
        self.step(arm)
        self.wait()
        return time.perf_counter() - began

    def wait(self):
        if "cuda" in self.device:
            torch.cuda.synchronize()
        parallel.any_of(False)  # for the slowest rank


def peak_memory(cfg, shape, arm):
    """Bytes, from a process that runs nothing but this arm."""
    keys = ("target", "K", "accumulation", "form", "device", "dtype", "compile")
    command = [
        sys.executable,
        __file__,
        f"--shapes={shape}",
        f"--arm={arm}",
        *(f"--{key}={getattr(cfg, key)}" for key in keys),
    ]
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def run_arm(cfg):
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(cfg, cfg.shapes, [cfg.arm], folder)
        for _ in range(3):
            bench.step(cfg.arm)
    if "cuda" in cfg.device:
        print(torch.cuda.max_memory_allocated())
    else:
        status = Path(
            "/proc/self/status"
        ).read_text()  # not ru_maxrss: on Linux a child starts from its parent's
        print(1024 * int(status.split("VmHWM:")[1].split()[0]))


def measure(cfg, shape):
    arms = [PLAIN, TARGET, *cfg.rules.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(cfg, shape, arms, folder)
        for arm in arms:
            bench.step(arm)
        seconds = {arm: [] for arm in arms}
        for i in range(cfg.rounds):
            for arm in (
                arms[i % len(arms) :] + arms[: i % len(arms)]
            ):  # no arm always comes after the same one
                seconds[arm].append(bench.timed(arm))
        B = bench.B * cfg.accumulation
        tokens, mfu_of = (
            B * bench.T,
            partial(
                bench.raw_model.estimate_mfu,
                B,
                peak_flops=parallel.size() * peak_flops(cfg.device, getattr(torch, cfg.dtype)),
            ),
        )
        params = sum(p.numel() * p.element_size() for p in bench.raw_model.parameters())
        del bench
    memory = {arm: peak_memory(cfg, shape, arm) for arm in arms} if cfg.memory else {}
    limit = B / (B + cfg.target * cfg.K)
    rows = []
    for arm in arms:
        ratio = {
            base: statistics.median(b / a for a, b in zip(seconds[arm], seconds[base]))
            for base in (PLAIN, TARGET)
        }
        row = {
            "shape": shape,
            "arm": arm,
            "ms": 1e3 * statistics.median(seconds[arm]),
            "tokens_per_s": tokens / statistics.median(seconds[arm]),
        }
        row |= {
            "to_plain": ratio[PLAIN],
            "to_plain_target": ratio[TARGET],
            "to_limit": ratio[PLAIN] / limit,
        }
        row |= {
            "best_to_plain_target": min(seconds[TARGET]) / min(seconds[arm]),
            "mfu": mfu_of(statistics.median(seconds[arm])),
        }
        if memory:
            row |= {
                "peak_mb": memory[arm] / 1e6,
                "above_plain_in_params": (memory[arm] - memory[PLAIN]) / params,
            }
        rows.append(row)
    return rows


def show(rows):
    print(
        f"{'shape':16}{'arm':16}{'ms':>9}{'tok/s':>10}{'mfu':>7}{'/plain':>9}{'/+target':>10}{'/best':>8}{'/limit':>8}{'peak MB':>9}{'+params':>9}"
    )
    for r in rows:
        memory = f"{r['peak_mb']:9.0f}{r['above_plain_in_params']:9.2f}" if "peak_mb" in r else ""
        ratios = f"{r['to_plain']:9.3f}{r['to_plain_target']:10.3f}{r['best_to_plain_target']:8.3f}{r['to_limit']:8.3f}"
        times = f"{r['ms']:9.1f}{r['tokens_per_s']:10,.0f}{r['mfu']:7.1%}{ratios}"
        print(f"{r['shape']:16}{r['arm']:16}{times}{memory}", flush=True)


def main(cfg):
    if cfg.arm:
        return run_arm(cfg)
    cfg.device, rows = parallel.start(cfg.device), []
    if cfg.target % parallel.size() or any(
        SHAPES[shape][-1] % parallel.size() for shape in cfg.shapes.split(",")
    ):
        raise UserError(
            f"{parallel.size()} processes cannot share --target={cfg.target} or a shape's B evenly: write --target={parallel.size()}"
        )
    cfg.memory = cfg.memory and parallel.size() == 1
    for shape in cfg.shapes.split(","):
        rows += measure(cfg, shape)
        if parallel.rank() == 0:
            show(rows[-2 - len(cfg.rules.split(",")) :])
    if parallel.rank():
        return
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    device = (
        torch.cuda.get_device_name()
        if "cuda" in cfg.device
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    print(
        json.dumps(
            {
                "device": device,
                "processes": parallel.size(),
                "torch": torch.__version__,
                "commit": commit,
                **vars(cfg),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
    parallel.stop()
