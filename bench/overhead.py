"""
What valuing costs: plain steps, plain steps and the target's own forward and backward, valued
steps; one process, in turn.

    python bench/overhead.py                                  the three CPU shapes, a few minutes
                                                              each
    python bench/overhead.py --shapes=byte --rounds=21        one shape, more rounds
    python bench/overhead.py --device=cuda --dtype=bfloat16 --shapes=gpt2-small-1024
    python bench/overhead.py --rules=adamw,adamw+smoothed     what --target_smoothing adds
    python bench/overhead.py --rules=adamw,adamw+checked,adamw+failed,adamw2
                                                              what a check of a step adds, where it
                                                              holds and where it does not
                                                              (train.py --tolerance)
    torchrun --nproc_per_node=2 bench/overhead.py --shapes=byte --target=2
                                                              the same global batch by two processes

A step is forward, backward, clipping and AdamW. Ratios are of throughput, round by round, then
their median: above 1 is faster. /best compares each arm's fastest step with the fastest step of
plain + target, which other users of a shared machine spoil least. Peak memory is each arm's own, of
a process of its own (not measured under torchrun). Prints a table and last one JSON line.
"""

import math
import statistics
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import config
from bench.common import machine_name, print_json, timed
from data import Target
from model import GPT, GPTConfig
from shapley import contract
from shapley.directions import RULES
from system import parallel
from system.errors import UserError
from system.machine import peak_flops
from valuation import Settings, Valuation


@dataclass
class Shape:
    n_layer: int
    n_head: int
    n_embd: int
    T: int
    vocab: int
    B: int


SHAPES = {
    "byte": Shape(6, 6, 384, 256, 256, 8),
    "gpt2": Shape(6, 6, 384, 256, 50304, 8),
    "gpt2-small": Shape(12, 12, 768, 512, 50304, 2),
    "gpt2-small-1024": Shape(12, 12, 768, 1024, 50304, 16),
    "gpt2-medium": Shape(24, 16, 1024, 1024, 50304, 8),
    "tiny": Shape(2, 2, 64, 32, 256, 4),
    # twelve layers of next to nothing: what is left is the host's own work, which a GPU has to
    # wait for
    "thin": Shape(12, 2, 16, 8, 256, 2),
}
# behind `adamw`: with the check of every step, which holds, or which always fails
CHECKED, FAILED = "+checked", "+failed"
TOLERANCES = {CHECKED: 1e12, FAILED: 1e-30}
SMOOTHED = "+smoothed"  # behind a rule's name: with the means of the targets' gradients
PLAIN = "plain"
TARGET = "plain + target"
GPU = torch.cuda.is_available()


@dataclass
class Config:
    shapes: str = "byte,gpt2,gpt2-small"  # comma-separated; see SHAPES
    rules: str = "sgd,adamw_linear,adamw,sgd2,adamw2"  # comma-separated
    target: int = 1  # chunks of the target a step
    K: int = 1  # targets
    accumulation: int = 1  # micro-batches of a step, each of the shape's B chunks
    rounds: int = 9  # each arm once a round
    form: Literal["auto", "running", "matmul", "fused"] = "auto"  # of the contraction
    device: str = "cuda" if GPU else "cpu"
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if GPU else "float32"
    compile: bool = False
    memory: bool = True  # measure peak memory too, each arm in a process of its own
    arm: str = ""  # run only this arm, of one shape, and print its peak memory in bytes

    def __post_init__(self):
        for shape in self.shapes.split(","):
            if shape not in SHAPES:
                raise UserError(f"--shapes={shape}: choose from {', '.join(SHAPES)}")
        for rule in self.rules.split(","):
            if split_rule(rule)[0] not in RULES:
                raise UserError(f"--rules={rule}: choose from {', '.join(RULES)}")
        config.check(self, at_least={"target": 1, "K": 1, "accumulation": 1, "rounds": 1})


def split_rule(arm):
    """A valued arm's rule, and the tolerance of its checks (0: none)."""
    rule = arm.removesuffix(SMOOTHED)
    for suffix, tolerance in TOLERANCES.items():
        if rule.endswith(suffix):
            return rule.removesuffix(suffix), tolerance
    return rule, 0.0


def arms_of(cfg):
    return [PLAIN, TARGET, *cfg.rules.split(",")]


class Bench:
    """One model and, for every arm, a step() that leaves it trained by one step."""

    def __init__(self, cfg, shape, arms):
        self.cfg = cfg
        self.T = shape.T
        self.B = shape.B
        self.device_type = cfg.device.split(":")[0]
        torch.manual_seed(0)
        contract.FORM = cfg.form
        self.raw_model = GPT(
            GPTConfig(shape.T, shape.vocab, shape.n_layer, shape.n_head, shape.n_embd, bias=False)
        ).to(cfg.device)
        torch._dynamo.config.force_parameter_static_shapes = False  # as train.py does
        self.model = self.raw_model
        if cfg.compile:
            self.model = torch.compile(self.raw_model, fullgraph=True)
        self.replica = parallel.replicate(self.model)
        self.optimizer = self.raw_model.configure_optimizers(
            0.1, 1e-4, (0.9, 0.95), self.device_type
        )
        self.ctx = nullcontext()
        if cfg.dtype == "bfloat16":
            self.ctx = torch.amp.autocast(self.device_type, torch.bfloat16)

        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, shape.vocab, (self.B, self.T + 1))  # the global batch
        self.rank_ids = np.arange(self.B)[parallel.mine(self.B)]  # this rank's chunks of it
        self.X, self.Y = self.to_device(self.tokens[self.rank_ids])
        targets = []
        self.target_batches = []
        for k in range(cfg.K):
            rows = rng.integers(0, shape.vocab, (cfg.target, self.T + 1))
            targets.append(Target(str(k), rows, None))
            self.target_batches.append(self.to_device(rows[parallel.mine(cfg.target)]))
        self.steps = 0  # so far, of all arms
        self.valuations = {}
        for rule in set(arms) - {PLAIN, TARGET}:
            self.valuations[rule] = self.build_valuation(rule, targets)

    def build_valuation(self, arm, targets):
        rule, tolerance = split_rule(arm)
        settings = Settings(
            rule=rule,
            target_smoothing=0.97 if arm.endswith(SMOOTHED) else 0.0,
            tolerance=tolerance,
            loss_rounding=0.0,
            batch=self.B * self.cfg.accumulation,
            target_batch=self.cfg.target,
            target_sampling="fixed",
            compile=self.cfg.compile,
            book_interval=0,
        )
        return Valuation(self.raw_model, self.optimizer, self.target_loss, targets, settings)

    def to_device(self, rows):
        """Chunks (n, T + 1), an array -> X, Y on the device."""
        rows = torch.from_numpy(rows).to(self.cfg.device)
        return rows[:, :-1], rows[:, 1:]

    def compute_loss(self, model, X, Y, ledger=None):
        with self.ctx:
            return model(X, Y, ledger)[1]

    def target_loss(self, X, Y, ledger=None):
        """As a valuation calls it: X and Y may be arrays."""
        X = torch.as_tensor(X).to(self.cfg.device)
        Y = torch.as_tensor(Y).to(self.cfg.device)
        return self.compute_loss(self.model, X, Y, ledger)

    def step(self, arm):
        if arm == TARGET:
            self.backward_targets()
        valuation = self.valuations.get(arm)
        self.steps += 1
        if valuation:
            valuation.begin_step(self.steps, 1e-4, self.tokens)
        micro_steps = self.cfg.accumulation
        for micro_step in range(micro_steps):
            ledger = None
            if valuation:
                ledger = valuation.new_ledger(self.rank_ids, self.X, self.Y)
            self.replica.require_backward_grad_sync = micro_step == micro_steps - 1
            loss = self.compute_loss(self.replica, self.X, self.Y, ledger)
            (loss / micro_steps).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), 1.0)
        if valuation:
            valuation.before_update((1.0 / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if valuation:
            valuation.end_step()
            valuation.pending.clear()  # the flush is the disk's business

    def backward_targets(self):
        """The targets' own forward and backward."""
        for X, Y in self.target_batches:
            self.compute_loss(self.model, X, Y).backward()
            parallel.add([p.grad for p in self.raw_model.parameters()])
            self.optimizer.zero_grad()

    def timed_step(self, arm):
        """Seconds."""
        self.wait()
        seconds, _ = timed(self.step_and_wait, arm)
        return seconds

    def step_and_wait(self, arm):
        self.step(arm)
        self.wait()

    def wait(self):
        if "cuda" in self.cfg.device:
            torch.cuda.synchronize()
        parallel.any_of(False)  # for the slowest rank

    def mfu(self, seconds):
        """The share of the device's peak that a step of so many seconds makes use of. None where
        the peak is not known, as of a CPU."""
        peak = parallel.size() * peak_flops(self.cfg.device)
        if math.isnan(peak):
            return None
        chunks = self.B * self.cfg.accumulation
        return self.raw_model.estimate_mfu(chunks, seconds, peak_flops=peak)

    def parameter_bytes(self):
        return sum(p.numel() * p.element_size() for p in self.raw_model.parameters())


# --- memory -----------------------------------------------------------------------


def peak_memory(cfg, shape, arm):
    """Bytes, from a process that runs nothing but this arm."""
    command = [sys.executable, __file__, f"--shapes={shape}", f"--arm={arm}"]
    for key in ("target", "K", "accumulation", "form", "device", "dtype", "compile"):
        command.append(f"--{key}={getattr(cfg, key)}")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_peak_memory(cfg):
    """What that process does."""
    bench = Bench(cfg, SHAPES[cfg.shapes], [cfg.arm])
    for _ in range(3):
        bench.step(cfg.arm)
    if "cuda" in cfg.device:
        print(torch.cuda.max_memory_allocated())
    else:
        # not ru_maxrss: on Linux a child starts from its parent's
        status = Path("/proc/self/status").read_text()
        print(1024 * int(status.split("VmHWM:")[1].split()[0]))


# --- time -------------------------------------------------------------------------


def time_arms(bench, arms, rounds):
    """Seconds of each step, {arm: [one a round]}."""
    for arm in arms:
        bench.step(arm)
    seconds = {arm: [] for arm in arms}
    for i in range(rounds):
        first = i % len(arms)  # no arm always comes after the same one
        for arm in arms[first:] + arms[:first]:
            seconds[arm].append(bench.timed_step(arm))
    return seconds


def speed_up(seconds, arm, base):
    """The throughput of an arm over a base's: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(seconds[arm], seconds[base]))


def measure(cfg, name):
    """The rows of a shape."""
    arms = arms_of(cfg)
    bench = Bench(cfg, SHAPES[name], arms)
    seconds = time_arms(bench, arms, cfg.rounds)
    medians = {arm: statistics.median(times) for arm, times in seconds.items()}
    mfu = {arm: bench.mfu(median) for arm, median in medians.items()}
    parameter_bytes = bench.parameter_bytes()
    del bench
    memory = {}
    if cfg.memory:
        memory = {arm: peak_memory(cfg, name, arm) for arm in arms}
    chunks = SHAPES[name].B * cfg.accumulation
    limit = chunks / (chunks + cfg.target * cfg.K)
    rows = []
    for arm in arms:
        to_plain = speed_up(seconds, arm, PLAIN)
        row = {
            "shape": name,
            "arm": arm,
            "ms": 1e3 * medians[arm],
            "tokens_per_s": chunks * SHAPES[name].T / medians[arm],
            "to_plain": to_plain,
            "to_plain_target": speed_up(seconds, arm, TARGET),
            "to_limit": to_plain / limit,
            "best_to_plain_target": min(seconds[TARGET]) / min(seconds[arm]),
            "mfu": mfu[arm],
        }
        if memory:
            row["peak_mb"] = memory[arm] / 1e6
            row["above_plain_in_params"] = (memory[arm] - memory[PLAIN]) / parameter_bytes
        rows.append(row)
    return rows


def show(rows):
    head = f"{'shape':16}{'arm':16}{'ms':>9}{'tok/s':>10}{'mfu':>7}{'/plain':>9}{'/+target':>10}"
    print(f"{head}{'/best':>8}{'/limit':>8}{'peak MB':>9}{'+params':>9}")
    for r in rows:
        line = f"{r['shape']:16}{r['arm']:16}{r['ms']:9.1f}{r['tokens_per_s']:10,.0f}"
        line += "      -" if r["mfu"] is None else f"{r['mfu']:7.1%}"
        line += f"{r['to_plain']:9.3f}{r['to_plain_target']:10.3f}"
        line += f"{r['best_to_plain_target']:8.3f}{r['to_limit']:8.3f}"
        if "peak_mb" in r:
            line += f"{r['peak_mb']:9.0f}{r['above_plain_in_params']:9.2f}"
        print(line, flush=True)


def check_processes(cfg):
    """Raises UserError where the processes cannot share a batch evenly."""
    processes = parallel.size()
    batches = [SHAPES[name].B for name in cfg.shapes.split(",")]
    if any(n % processes for n in (cfg.target, *batches)):
        raise UserError(
            f"{processes} processes cannot share --target={cfg.target} or a shape's B evenly: "
            f"write --target={processes}"
        )


def main(cfg):
    if cfg.arm:
        print_peak_memory(cfg)
        return
    cfg.device = parallel.start(cfg.device)
    check_processes(cfg)
    cfg.memory = cfg.memory and parallel.size() == 1
    rows = []
    for name in cfg.shapes.split(","):
        of_shape = measure(cfg, name)
        rows += of_shape
        if parallel.rank() == 0:
            show(of_shape)
    if parallel.rank() == 0:
        print_json(
            cfg,
            rows,
            machine=machine_name(cfg.device),
            processes=parallel.size(),
            torch=torch.__version__,
        )


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)), leave=parallel.leave)
