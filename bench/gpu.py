"""
What has not been measured on a GPU yet, in order of worth: one command, for the first card that
comes.

    python bench/gpu.py                                      ten minutes; writes results/gpu_<card>/
    python bench/gpu.py --data_dir=data/pile --nanogpt=nanoGPT/model.py
                                                             with 100 real steps of GPT-2 124M, and
                                                             a step of nanoGPT's own beside ours
    python bench/gpu.py --parts=kernels,values --again       only these, although they are there
    python bench/gpu.py --device=cpu --data_dir=data/demo    every part, tiny: does it still work?

    values        values on the card against the rules' definitions in float64 there
    kernels       is the Triton kernel right, and how fast beside cuBLAS (bench/kernels.py)
    steps         GPT-2 small, compiled, T 1024, B 16: plain, plain + target, every rule
    target        the same with 8 target chunks a step
    accumulation  the same in 30 micro-batches
    nanogpt       our plain step beside that of the model.py named with --nanogpt
    training      100 steps of configs/gpt2_inrun.py, with their books and an audit
    memory        the peak of plain steps, `adamw` and `adamw2`, each in a process of its own
    tests         tests/test_kernel.py, which tests on the card what it can

Each part is a process of its own. What it prints goes to <part>.txt as it comes; summary.md and
parts.json are written again after each part. A part that is there, made by the same command, is not
done again, so after an interruption the same command goes on. When --minutes are over, what runs is
stopped, and the others are left for the next time. A bare machine will do: Python, torch, numpy and
tqdm, without a network. The data is prepared beforehand (python prepare_pile.py) and carried there.
"""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import config
from bench.common import ROOT, machine_name, print_json, timed
from data import Target
from model import GPT, GPTConfig
from shapley import exact, rules
from system.errors import UserError
from system.files import read_json, write_json
from system.terminal import say
from valuation import Settings, Valuation

GPU = torch.cuda.is_available()
DONE = "done"
LAST_LINES = 60  # of what a part printed, in the summary


@dataclass
class Config:
    out: str = ""  # empty: results/gpu_<card>
    data_dir: str = ""  # prepared chunks of 1024 GPT-2 tokens, for the part training
    nanogpt: str = ""  # nanoGPT's model.py, for the part nanogpt
    parts: str = ""  # comma-separated; empty: all
    again: bool = False  # also what is there
    minutes: float = 10.0  # for all parts
    device: str = "cuda" if GPU else "cpu"
    # what a part's own process does, of those that this file does itself
    only: Literal["", "values", "nanogpt"] = ""

    def __post_init__(self):
        config.check(self, at_least={"minutes": 0})
        for name in self.parts.split(",") if self.parts else []:
            if name not in PARTS:
                raise UserError(f"--parts={name}: choose from {', '.join(PARTS)}")
        if self.device == "cuda" and not GPU:
            raise UserError("--device=cuda: torch finds no GPU here; --device=cpu tries every part")


# --- the parts --------------------------------------------------------------------


def is_cpu(cfg):
    return cfg.device == "cpu"


def overhead(cfg, *options):
    """bench/overhead.py of GPT-2 small as it is trained; on a CPU of a model of next to nothing."""
    if is_cpu(cfg):
        shape = ["--shapes=tiny", "--rounds=1", "--dtype=float32"]
    else:
        shape = ["--shapes=gpt2-small-1024", "--compile", "--dtype=bfloat16"]
    return ["bench/overhead.py", *shape, f"--device={cfg.device}", *options]


def of_values(cfg):
    return ["bench/gpu.py", "--only=values", f"--device={cfg.device}"]


def of_kernels(cfg):
    tiny = ["--layers=32x64", "--chunks=2x16", "--heads=16x64", "--rounds=1"]
    return ["bench/kernels.py", f"--device={cfg.device}", *(tiny if is_cpu(cfg) else [])]


def of_steps(cfg):
    return overhead(cfg, "--memory=False")


def of_target(cfg):
    return overhead(cfg, "--target=8", "--rules=sgd,adamw,adamw+checked,adamw2", "--memory=False")


def of_accumulation(cfg):
    more = "--accumulation=2" if is_cpu(cfg) else "--accumulation=30"
    rules = "--rules=adamw,adamw+checked,adamw2"
    return overhead(cfg, more, "--rounds=3", rules, "--memory=False")


def of_nanogpt(cfg):
    if not cfg.nanogpt:
        return "no nanoGPT: name its model.py with --nanogpt="
    return ["bench/gpu.py", "--only=nanogpt", f"--nanogpt={cfg.nanogpt}", f"--device={cfg.device}"]


def of_training(cfg):
    if not cfg.data_dir:
        return "no data: name a prepared folder with --data_dir="
    steps = 4 if is_cpu(cfg) else 100
    command = ["train.py", "configs/gpt2_inrun.py", f"--data_dir={cfg.data_dir}"]
    command += [f"--out_dir={folder_of(cfg) / 'run'}", "--overwrite", f"--device={cfg.device}"]
    command += [f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--warmup_iters={steps // 4}"]
    command += ["--book_interval=1", f"--audit_interval={steps // 2}", "--audit_permutations=16"]
    command += ["--eval_interval=0", "--log_interval=1", f"--checkpoint_interval={steps}"]
    if is_cpu(cfg):
        command += ["--n_layer=1", "--n_head=2", "--n_embd=16", "--batch_size=2"]
        command += ["--block_size=16", "--compile=False", "--dtype=float32"]
    return command


def of_memory(cfg):
    return overhead(cfg, "--rounds=1", "--rules=adamw,adamw2")


def of_tests(cfg):
    if not importlib.util.find_spec("pytest"):
        return "pytest is not installed here"
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernel.py"]


PARTS = {  # in the order in which they are run: a part's command, or why it has none
    "values": of_values,
    "kernels": of_kernels,
    "steps": of_steps,
    "target": of_target,
    "accumulation": of_accumulation,
    "nanogpt": of_nanogpt,
    "training": of_training,
    "memory": of_memory,
    "tests": of_tests,
}


# --- running them -----------------------------------------------------------------


def folder_of(cfg):
    card = re.sub(r"[^a-z0-9]+", "_", machine_name(cfg.device).lower()).strip("_")
    return Path(cfg.out) if cfg.out else ROOT / "results" / f"gpu_{card}"


def read_parts(folder):
    """What earlier calls did: {part: {command, state, seconds}}."""
    path = folder / "parts.json"
    return read_json(path, f"remove {path}") if path.is_file() else {}


def run_part(command, path, seconds):
    """Runs a part, whose output goes to a file as it comes. Returns how it ended, in words."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with open(path, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group, to be stopped with all that it started
        )
        try:
            status = process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return "stopped: the time was over"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return DONE if status == 0 else f"failed: exit status {status}"


def run_all(cfg):
    """Runs the parts. Returns {part: how it ended}, of all that are there."""
    folder = folder_of(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * cfg.minutes
    parts = read_parts(folder)
    for name in cfg.parts.split(",") if cfg.parts else PARTS:
        command = PARTS[name](cfg)
        if isinstance(command, str):
            say(f"{name}: left out: {command}")
            parts.setdefault(name, {"command": [], "state": f"left out: {command}"})
            continue
        there = parts.get(name, {})
        if there.get("command") == command and there.get("state") == DONE and not cfg.again:
            say(f"{name}: is there already")
            continue
        left = end - time.monotonic()
        if left <= 0:
            say(f"{name}: left for the next time, the {cfg.minutes:g} minutes are over")
            continue
        say(f"{name}: python {' '.join(command)}")
        seconds, state = timed(run_part, command, folder / f"{name}.txt", left)
        say(f"{name}: {state}, {seconds:.0f} s")
        parts[name] = {"command": command, "state": state, "seconds": round(seconds, 1)}
        write_summary(cfg, folder, parts)
        write_json(folder / "parts.json", parts)
    write_summary(cfg, folder, parts)
    return {name: part["state"] for name, part in parts.items()}


def write_summary(cfg, folder, parts):
    """What there is, for a reader: of each part its command and the last it printed."""
    lines = [f"# Measured on {machine_name(cfg.device)}, torch {torch.__version__}", ""]
    lines.append("Written by `python bench/gpu.py`. Random tokens, but in `training`.")
    for name in PARTS:
        part = parts.get(name)
        if not part:
            continue
        lines += ["", f"## {name}: {part['state']}"]
        if part["command"]:
            lines[-1] += f", {part['seconds']:g} s"
            printed = (folder / f"{name}.txt").read_text(encoding="utf-8", errors="replace")
            shown = [line.rstrip() for line in printed.replace("\r", "\n").splitlines()]
            shown = [line for line in shown if line and not line.startswith("{")]
            lines += ["", f"    python {' '.join(part['command'])}", "", "```"]
            lines += [*shown[-LAST_LINES:], "```"]
    (folder / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- values against float64 -----------------------------------------------------------

STEPS = 12  # before the one that is judged
WORDS = 512


def values_on_card(cfg, rule, dtype):
    """A step's values on the device (B, K), and the rule's definition in float64 there."""
    torch.manual_seed(0)
    T, B = (16, 4) if is_cpu(cfg) else (256, 16)
    width = 32 if is_cpu(cfg) else 256
    model = GPT(GPTConfig(T, WORDS, n_layer=3, n_head=4, n_embd=width, bias=False)).to(cfg.device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), cfg.device)
    rng = np.random.default_rng(0)

    def loss(X, Y, ledger=None):
        X, Y = (torch.as_tensor(x).to(cfg.device) for x in (X, Y))
        with torch.autocast(cfg.device, torch.bfloat16, enabled=dtype == "bfloat16"):
            return model(X, Y, ledger)[1]

    def words(n):
        """Like text, a few words again and again."""
        return np.minimum(rng.zipf(1.3, (n, T + 1)), WORDS) - 1

    targets = [Target("target", words(4), None)]
    settings = Settings(
        rule=rule,
        batch=B,
        target_batch=4,
        target_sampling="fixed",
        tolerance=0.0,
        grad_clip=1.0,
        book_interval=0,
    )
    valuation = Valuation(model, optimizer, loss, targets, settings)
    for step in range(STEPS + 1):
        rows = torch.from_numpy(words(B)).to(cfg.device)
        X, Y = rows[:, :-1], rows[:, 1:]
        if step == STEPS:
            truth = definition(model, optimizer, rule, X, Y, targets[0])
        valuation.begin_step(step, 1e-3, rows)
        loss(X, Y, valuation.new_ledger(np.arange(B), X, Y)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        valuation.before_update((1.0 / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        optimizer.zero_grad()
        valuation.end_step()
    found = valuation.flush().visits["value"][-B:, 0].astype(float)
    return found, truth[:, 0].cpu().numpy()


def definition(model, optimizer, rule, X, Y, target):
    """The rule's values of a step that is to come."""
    X_target, Y_target = target.batch(np.arange(len(target)))
    X_target, Y_target = (torch.from_numpy(x).to(X.device) for x in (X_target, Y_target))
    x = exact.chunk_gradients(model, X, Y)
    losses = [exact.batch_loss(X_target, Y_target)]
    known = rules.known_rows(model, X, Y)
    what = (model, optimizer, x, losses, rule, 1e-3, 1.0)
    squares = None if rule == "adamw" else rules.squares_by_use(model, X, Y)
    return rules.rule_values(*what, squares=squares, known=known)


def check_values(cfg):
    rows = []
    print(f"{'rule':14}{'dtype':10}{'relative L2':>12}{'Pearson':>10}")
    for rule in rules.RULES:
        for dtype in ("float32", "bfloat16"):
            found, truth = values_on_card(cfg, rule, dtype)
            distance = float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
            pearson = float(np.corrcoef(found, truth)[0, 1])
            print(f"{rule:14}{dtype:10}{distance:12.1e}{pearson:10.6f}")
            rows.append({"rule": rule, "dtype": dtype, "rel_l2": distance, "pearson": pearson})
    print_json(cfg, rows, machine=machine_name(cfg.device), torch=torch.__version__)


# --- nanoGPT's own step -----------------------------------------------------------------


def load_module(path):
    """A Python file that the user named, as a module."""
    if not os.path.isfile(path):
        raise UserError(f"--nanogpt={path}: no such file; name nanoGPT's model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compare_with_nanogpt(cfg):
    """Seconds of plain steps, ours and nanoGPT's, in turn in one process."""
    module = load_module(cfg.nanogpt)
    if is_cpu(cfg):
        B, T, rounds = 2, 16, 2
        size = dict(block_size=T, vocab_size=64, n_layer=1, n_head=2, n_embd=16, bias=False)
    else:
        B, T, rounds = 16, 1024, 15
        size = dict(block_size=T, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, bias=False)
    tokens = torch.randint(size["vocab_size"], (B, T + 1), device=cfg.device)
    steps = {}
    models = {
        "ours": GPT(GPTConfig(**size, dropout=0.0)),
        "nanoGPT": module.GPT(module.GPTConfig(**size, dropout=0.0)),
    }
    for name, model in models.items():
        model.to(cfg.device)
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), cfg.device)
        steps[name] = plain_step(cfg, model, optimizer, tokens)
    seconds = {name: [] for name in steps}
    for i in range(rounds + 3):
        for name, step in steps.items():
            took, _ = timed(step)
            if i >= 3:  # the first ones compile
                seconds[name].append(took)
    ratios = np.array(seconds["nanoGPT"]) / np.array(seconds["ours"])
    for name, times in seconds.items():
        print(f"{name:10}{1e3 * np.median(times):9.1f} ms a step")
    print(f"our throughput over nanoGPT's: {np.median(ratios):.3f} ({rounds} rounds)")
    rows = [{"ratio": float(ratio)} for ratio in ratios]
    print_json(cfg, rows, machine=machine_name(cfg.device), torch=torch.__version__)


def plain_step(cfg, model, optimizer, tokens):
    """A function that trains a model by a step and waits for it."""
    run = model if is_cpu(cfg) else torch.compile(model)
    X, Y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step():
        with torch.autocast(cfg.device, torch.bfloat16, enabled=not is_cpu(cfg)):
            loss = run(X, Y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not is_cpu(cfg):
            torch.cuda.synchronize()

    return step


def main(cfg):
    if cfg.only:
        {"values": check_values, "nanogpt": compare_with_nanogpt}[cfg.only](cfg)
        return
    states = run_all(cfg)
    bad = [name for name, state in states.items() if state.startswith(("failed", "stopped"))]
    say(f"{folder_of(cfg) / 'summary.md'} has what was measured")
    if bad:
        raise UserError(f"{', '.join(bad)}: see the .txt files there; the same command tries again")


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
