"""A run's lines while it trains: its progress, the time it will take, its evaluations."""

import contextlib
import math
import time

import torch

from system import parallel
from system.errors import UserError
from system.terminal import command, shorten, visible

SOON = (1, 3)  # steps of a start after which there is a line, whatever log_interval is
DAY = 86400  # seconds
MOST_DOMAINS = 6  # whose losses are all printed
IN_A_ROW = 3  # domains in a line of 100 columns
LONGEST_NAME = 22  # characters of a domain's name in such a line


class Progress:
    """The steps since the last line: their losses and their time, without pauses."""

    def __init__(self, model, cfg, iter_num, peak_flops):
        """model: has estimate_mfu. iter_num: steps done before. peak_flops: of all processes, NaN
        where it is not known."""
        self.model, self.cfg, self.peak_flops = model, cfg, peak_flops
        self.history = []  # [(steps done, mean loss in nats since the line before)]
        self.first_iter_num = iter_num
        self.began = time.perf_counter()
        self.pause_seconds = 0.0  # of the last pause
        self.start_line(iter_num)

    def start_line(self, iter_num):
        self.iter_num = iter_num  # of the last line
        self.losses = []
        self.paused = 0.0  # seconds that are not training
        self.t0 = time.perf_counter()

    @contextlib.contextmanager
    def pause(self):
        """Within it the clock of the steps stands still: an evaluation."""
        t0 = time.perf_counter()
        yield
        self.pause_seconds = time.perf_counter() - t0
        self.paused += self.pause_seconds

    def is_due(self, iter_num):
        """Whether a line is due after so many steps. The first ones come soon, so that something
        is seen."""
        is_soon = iter_num - self.first_iter_num in SOON
        return is_soon or iter_num % self.cfg.log_interval == 0

    def lines(self, iter_num, valuation, recent):
        """Ends the line: returns its text, with one line more where the time of all steps can be
        told, as a list, and its numbers by their names on a dashboard.

        recent: valuation.Flushed, the records of the steps since the last line. Raises UserError
        where the loss is not finite. Every rank must call.
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
        ]
        metrics = {
            "train/loss": loss,
            "train/tokens_per_s": tokens_per_s,
            "valuing/ms_per_step": dt * 1e3,
            "valuing/valuation_share": share,
        }
        if not math.isnan(mfu):
            parts.append(f"mfu {mfu:.1%}")
            metrics["valuing/mfu"] = mfu
        if recent.visits is not None:
            parts.append(f"negative {(recent.visits['value'] < 0).mean():.0%}")
            parts.append(f"valuation {share:.0%}")
            if valuation.checks:
                in_two = float((recent.books["passes"] == 2).mean())
                parts.append(f"two passes {in_two:.0%}")
                metrics["valuing/two_passes"] = in_two
        parts.append(f"{duration(dt * (cfg.max_iters - iter_num))} left")
        lines = [" | ".join(parts)]
        if iter_num - self.first_iter_num == SOON[-1]:
            lines.append(self.estimate(dt))
        self.start_line(iter_num)
        return lines, metrics

    def estimate(self, dt):
        """A line: how long this start will take. dt: seconds of a step."""
        cfg = self.cfg
        steps = cfg.max_iters - self.first_iter_num
        evaluations = steps // cfg.eval_interval + 1 if cfg.eval_interval else 0
        seconds = dt * steps + self.pause_seconds * evaluations
        line = f"about {duration(seconds)} for all {steps:,} steps at this speed"
        if seconds < DAY:
            return line
        smaller = "configs/small.py" if cfg.device == "cpu" else "configs/medium.py"
        first_look = command("python", "train.py", smaller, f"--data_dir={cfg.data_dir}")
        return f"{line}. For a first look: {first_look}"

    def share(self, seconds):
        """A time as a part of that since the start."""
        return seconds / (time.perf_counter() - self.began)

    def took(self):
        """The time since the start, as text."""
        return duration(time.perf_counter() - self.began)


def duration(seconds):
    """A time as people say it: "4 s", "12 min", "2 h 10 min", "3 days 4 h"."""
    seconds = round(seconds)
    minutes = round(seconds / 60)
    hours = minutes // 60
    if seconds < 90:
        return f"{seconds} s"
    if minutes < 90:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24:,} days {hours % 24} h"


# --- evaluations --------------------------------------------------------------------


def evaluation_lines(iter_num, loss, by_domain, by_target=None):
    """What an evaluation found, in lines of at most 100 columns: the mean, the losses of targets of
    one's own, and of all domains if they are few, else the lowest and the highest ones.

    by_domain, by_target: {name: nats}."""
    lines = [f"step {iter_num}: val loss {loss:.4f}"]
    targets = list(by_target or {})
    for start in range(0, len(targets), IN_A_ROW):
        lines.append(f"  targets: {row_of(targets[start : start + IN_A_ROW], by_target)}")
    names = list(by_domain)
    if len(names) <= MOST_DOMAINS:
        for start in range(0, len(names), IN_A_ROW):
            lines.append(f"  {row_of(names[start : start + IN_A_ROW], by_domain)}")
        return lines
    names.sort(key=by_domain.get)
    lines.append(f"  lowest: {row_of(names[:IN_A_ROW], by_domain)}")
    lines.append(f"  highest: {row_of(names[: -IN_A_ROW - 1 : -1], by_domain)}")
    return lines


def row_of(names, losses):
    cells = []
    for name in names:
        cells.append(f"{shorten(visible(name), LONGEST_NAME)} {losses[name]:.3f}")
    return ", ".join(cells)
