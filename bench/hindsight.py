"""
What hindsight costs, in plain training steps: taking a step again with a record of it, and taking
it back for each target.

    python bench/hindsight.py --run=out/demo                        the run's own targets
    python bench/hindsight.py --run=out/demo "--targets=val"        one target

In one process: some plain steps (forward, backward, clipping, AdamW), the same steps recorded, then
taken back, and again for several rounds. Processor time, as ratios to the plain steps: median,
least and most of the rounds. The targets' gradients at the end, taken once in a run, are not in it.
Last one JSON line.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import config
import lookback
import revalue
from bench.common import machine_name, print_json
from data import parse_targets
from shapley import hindsight


@dataclass
class Config:
    run: str = ""  # its folder
    targets: str = ""  # as revalue.py's; empty: the run's own
    steps: int = 20
    rounds: int = 7


def take_plain_step(rerun, step):
    _, X, Y = rerun.batch(step)
    rerun.loss(X, Y).backward()
    torch.nn.utils.clip_grad_norm_(rerun.model.parameters(), 1.0)
    rerun.optimizer.step()
    rerun.optimizer.zero_grad(set_to_none=True)


def seconds_of(rerun, n_steps):
    """Processor seconds of plain steps, of recording as many, and of taking these back."""
    began = time.process_time()
    for step in range(n_steps):
        take_plain_step(rerun, step)
    plain = time.process_time() - began
    began = time.process_time()
    past = [rerun.training.record(step) for step in range(n_steps)]
    recorded = time.process_time() - began
    gradients = [rerun.targets.gradient(k, 0)[1] for k in range(rerun.n_targets)]
    adjoints = [hindsight.Adjoint.of_end(g, bool(past[0].moments)) for g in gradients]
    began = time.process_time()
    for step in reversed(past):
        for adjoint in adjoints:
            hindsight.back(rerun.training, step, adjoint)
    return plain, recorded, time.process_time() - began


def main(cfg):
    asked = revalue.Config(run=cfg.run, targets=cfg.targets, hindsight=True)
    original = revalue.read(asked)
    data = revalue.open_data(original)
    targets = parse_targets(original.options.targets, data, original.options.block_size)
    with tempfile.TemporaryDirectory() as folder:
        rerun = lookback.Rerun(original, data, targets, Path(folder))
    rerun.enter(0)
    seconds = np.array([seconds_of(rerun, cfg.steps) for _ in range(cfg.rounds)])
    plain = seconds[:, 0]
    parts = {"record": seconds[:, 1], "back": seconds[:, 2], "both": seconds[:, 1:].sum(1)}
    rows = []
    print(f"{len(targets)} targets; a plain step takes {1e3 * np.median(plain) / cfg.steps:.1f} ms")
    for name, part in parts.items():
        ratios = part / plain
        figures = {"median": np.median(ratios), "least": ratios.min(), "most": ratios.max()}
        print(f"{name:8}" + "".join(f"{key:>9} {value:.2f}" for key, value in figures.items()))
        rows.append({"part": name, **{key: float(value) for key, value in figures.items()}})
    machine = machine_name(original.options.device)
    print_json(cfg, rows, machine=machine, n_targets=len(targets), torch=torch.__version__)


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
