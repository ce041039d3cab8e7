"""A run's line of progress: the clocks behind it, and what it says."""

import contextlib
import math
import time
from datetime import timedelta

import torch

from system import parallel
from system.errors import UserError


class Progress:
    """The steps since the last line: their losses and their time, without pauses."""

    def __init__(self, model, cfg, iter_num, peak_flops):
        """model: has estimate_mfu. iter_num: steps done before. peak_flops: of all processes."""
        self.model, self.cfg, self.peak_flops = model, cfg, peak_flops
        self.history = []  # [(steps done, mean loss in nats since the line before)]
        self.began = time.perf_counter()
        self.start_line(iter_num)

    def start_line(self, iter_num):
        self.iter_num = iter_num  # of the last line
        self.losses = []
        self.paused = 0.0  # seconds that are not training
        self.t0 = time.perf_counter()

    @contextlib.contextmanager
    def pause(self):
        t0 = time.perf_counter()
        yield
        self.paused += time.perf_counter() - t0

    def line(self, iter_num, valuation, visits):
        """Ends the line: returns its text, and its numbers by their names on a dashboard.

        visits: the records of the steps since the last line, or None. Raises UserError where the
        loss is not finite. Every rank must call.
        """
        cfg = self.cfg
        loss = parallel.mean(torch.stack(self.losses).mean())
        if not math.isfinite(loss):
            what = f"the loss is not finite in steps {self.iter_num} to {iter_num - 1}"
            raise UserError(f"{what}: lower --learning_rate. The last checkpoint is whole")
        self.history.append((iter_num, loss))
        seconds = time.perf_counter() - self.t0 - self.paused
        dt = seconds / (iter_num - self.iter_num)
        share = valuation.seconds / seconds
        valuation.seconds = 0.0
        mfu = self.model.estimate_mfu(cfg.batch, dt, self.peak_flops)
        tokens_per_s = cfg.batch * cfg.block_size / dt
        parts = [
            f"step {iter_num}/{cfg.max_iters}",
            f"loss {loss:.4f}",
            f"{dt * 1e3:.0f} ms",
            f"{tokens_per_s:,.0f} tok/s",
            f"mfu {mfu:.1%}",
        ]
        if visits is not None:
            parts.append(f"negative {(visits['value'] < 0).mean():.0%}")
            parts.append(f"valuation {share:.0%}")
        left = timedelta(seconds=int(dt * (cfg.max_iters - iter_num)))
        parts.append(f"{left} left")
        metrics = {
            "train/loss": loss,
            "train/tokens_per_s": tokens_per_s,
            "overhead/ms_per_step": dt * 1e3,
            "overhead/mfu": mfu,
            "overhead/valuation_share": share,
        }
        self.start_line(iter_num)
        return " | ".join(parts), metrics

    def took(self):
        """The time since the start, as text."""
        return str(timedelta(seconds=int(time.perf_counter() - self.began)))
