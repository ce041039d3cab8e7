"""What wandb is shown while a run goes on: one workspace that can be read from top to bottom.

wandb makes a section of the first word of a metric's name, and sorts them. So it shows first train
(loss, learning rate, throughput) and val (loss, and its domains in one chart). Then, for each
target: value, value_audit, value_books, value_chunks, value_domains and value_histogram; at last
valuing, the part of the time that it takes. What only explains these is logged too, but hidden: it
makes no panel of its own. The summary of a run has its losses, not the last of everything else.

A run never ends because of its logging. Where wandb refuses something, dies or has no network, a
line says so, and the run goes on without it.
"""

import contextlib
import hashlib
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from show import findings, tables
from system.files import short
from system.store import AUDIT_ENTRIES
from system.terminal import say, shorten, visible, warn

VAL_DOMAINS = "val/by_domain"  # the chart's name
PARTS = ("data", "momentum", "decay", "residual")  # of a drop in the books
NOT_IN_SUMMARY = (
    "train/lr",
    "train/tokens_per_s",
    "val_domain/*",
    "value/*",
    "value_audit/*",
    "value_books/*",
    "value_histogram/*",
    "valuing/*",
)
PATIENCE = 3  # failures of wandb that a run puts up with


class Board:
    """Turns what a run knows into metrics, and gives them to wandb: floats, arrays (shown as
    histograms), Tables and Curves."""

    def __init__(self, cfg, wandb_id, data, targets, decode, visits=()):
        """Starts wandb.

        cfg: train.py's Config. wandb_id: the id under which a resumed run goes on, or None.
        data: a data.Dataset. targets: objects with a .name. decode: a function from tokens to text.
        visits: the records that a resumed run wrote before, else empty.
        """
        self.data = data
        self.decode = decode
        self.targets = [metric_name(target.name) for target in targets]
        self.domains = [metric_name(name) for name in data.domains]
        self.batch = cfg.batch_size * cfg.gradient_accumulation_steps
        # the sum over the steps so far of the domains' shares of a step's values (K, D)
        self.shares = np.zeros((len(targets), len(data.domains)))
        self.steps = 0
        self.history = []  # [(step, the shares' means over the steps so far)] at the checkpoints
        self.read_past(visits, cfg.checkpoint_interval)
        self.wandb_id = wandb_id or f"{slug(out_name(cfg))}-{time.time_ns():x}"
        self.failures = 0
        self.logger = None  # none yet, while attempt() opens it
        self.logger = self.attempt(self.open, cfg)

    # --- logging that never ends a run -------------------------------------------------

    def open(self, cfg):
        return Wandb(cfg, self.wandb_id, self.hidden())

    def hidden(self):
        """The names of the metrics that make no panel."""
        names = ["valuing/mfu", "valuing/ms_per_step", "valuing/two_passes", f"{VAL_DOMAINS}_table"]
        names += [f"val_domain/{name}" for name in self.domains]
        for target in self.targets:
            names += [f"value/{target}/{key}" for key in ("mean_1e-6", "p5_1e-6", "p95_1e-6")]
            names += [f"value_books/{target}/{key}" for key in PARTS]
            names += [f"value_audit/{target}/{key}" for key in AUDIT_ENTRIES if key != "pearson"]
            names.append(f"value_domains/{target}_table")  # the numbers of the chart
        return names

    def log(self, metrics, step):
        if self.logger is not None:
            self.attempt(self.logger.log, metrics, step)

    def finish(self):
        if self.logger is not None:
            self.attempt(self.logger.finish)

    def attempt(self, work, *arguments):
        """Returns what work(*arguments) returns, or None where it fails, which a line says.

        After PATIENCE failures, or where wandb does not start or its process is gone, nothing more
        is logged.
        """
        try:
            return work(*arguments)
        except Exception as e:  # of a library that only logs: whatever it is, the run goes on
            self.failures += 1
            is_start = self.logger is None
            is_last = is_start or isinstance(e, OSError) or self.failures == PATIENCE
            end = "; the run goes on without it" if is_last else ""
            warn(f"wandb failed ({type(e).__name__}: {short(e)}){end}")
            if is_last and self.logger is not None:
                self.logger.abandon(e)
                self.logger = None
            return None

    # --- metrics ------------------------------------------------------------------------

    def read_past(self, visits, interval):
        """The history up to here of a run that is resumed: its charts go on from it."""
        rows = interval * self.batch
        for start in range(0, len(visits), rows):
            block = visits[start : start + rows]
            self.count(block)
            self.history.append((int(block["step"][-1]) + 1, self.shares / self.steps))

    def count(self, visits):
        """Adds the records of some whole steps to the shares."""
        domains = self.data.train.domain
        sizes, shares = findings.over_steps([visits], self.batch, domains, len(self.domains))
        self.shares += shares * sizes.shape[1]
        self.steps += sizes.shape[1]

    def evaluated(self, evaluations):
        """Logs the newest of the run's evaluations, the lines of evaluations.jsonl."""
        newest = evaluations[-1]
        metrics = {"val/loss": newest["val"]}
        for name, loss in newest.get("target", {}).items():
            metrics[f"val_target/{metric_name(name)}"] = loss
        lines = {}
        for name, loss in newest["loss"].items():
            metrics[f"val_domain/{metric_name(name)}"] = loss
            lines[name] = [entry["loss"].get(name, math.nan) for entry in evaluations]
        if len(lines) > 1:
            steps = [entry["step"] for entry in evaluations]
            metrics[VAL_DOMAINS] = Curves(steps, lines, "validation loss by domain, nats")
        self.log(metrics, step=newest["step"])

    def values(self, recent, histogram):
        """Metrics of the steps since the last log, for each target: the spread of the values, what
        the drop of the measured steps was made of, and how close the last audited step's values
        came to the truth.

        recent: a Flushed, with the records visits, books and audit, which may be None. histogram:
        whether all the values are logged too.
        """
        self.count(recent.visits)
        metrics = {}
        measured = tables.measured(recent.books)
        for k, target in enumerate(self.targets):
            metrics.update(spread(target, recent.visits["value"][:, k]))
            if len(measured):
                metrics.update(booked(target, measured, k))
            if recent.audit is not None:
                for key in AUDIT_ENTRIES:
                    metrics[f"value_audit/{target}/{key}"] = float(recent.audit[key][-1, k])
            if histogram:
                metrics[f"value_histogram/{target}"] = 1e6 * recent.visits["value"][:, k]
        return metrics

    def totals(self, total, used, step, n=10):
        """Metrics of the whole run so far, for each target: a chart of the domains' shares of the
        steps' values, and the n chunks with the largest and the smallest values, with their text.

        total: the chunks' values (n_chunks, K), nats. used: bool (n_chunks,).
        """
        chunks = np.flatnonzero(used)
        self.history.append((step, self.shares / max(self.steps, 1)))
        present = np.unique(self.data.train.domain[chunks])
        metrics = {}
        for k, target in enumerate(self.targets):
            metrics[f"value_domains/{target}"] = self.domain_curves(k, present)
            order = chunks[np.argsort(-total[chunks, k])]
            top = self.chunk_table(order[:n], total[:, k])
            bottom = self.chunk_table(order[::-1][:n], total[:, k])
            metrics[f"value_chunks/{target}/top"] = top
            metrics[f"value_chunks/{target}/bottom"] = bottom
        return metrics

    def domain_curves(self, k, domains):
        """Target k's values over time, a line for each of the domains, given by number. Every step
        counts the same, so no single one can turn the lines round."""
        steps = [step for step, _ in self.history]
        lines = {}
        for d in domains:
            lines[self.data.domains[d]] = [float(shares[k, d]) for _, shares in self.history]
        return Curves(steps, lines, f"share of the steps' values so far, for {self.targets[k]}")

    def chunk_table(self, chunks, values):
        rows = []
        for chunk in chunks:
            domain = self.data.domains[self.data.train.domain[chunk]]
            value = 1e6 * float(values[chunk])
            rows.append([int(chunk), domain, value, self.text(chunk)])
        return Table(["chunk", "domain", f"value ({findings.UNIT})", "text"], rows)

    def text(self, chunk):
        tokens = self.data.train.rows[chunk]
        return self.decode(tokens[tokens != self.data.meta["eot"]])[:1000]


def spread(target, values):
    """Metrics of some visits' values (n,), in 1e-6 nats, and the share of negative ones."""
    p5, median, p95 = np.percentile(values, (5, 50, 95))
    figures = {"median": median, "mean": values.mean(dtype=float), "p5": p5, "p95": p95}
    metrics = {f"value/{target}/{key}_1e-6": 1e6 * float(x) for key, x in figures.items()}
    metrics[f"value/{target}/negative"] = float((values < 0).mean())
    return metrics


def booked(target, measured, k):
    """Metrics of measured steps, in nats: how far target k's loss fell, how much of that the books
    explain, and the parts."""
    drop = measured["before"][:, k] - measured["after"][:, k]
    parts = {key: float(measured[key][:, k].sum()) for key in PARTS}
    figures = {"drop": float(drop.sum()), **parts}
    figures["explained"] = figures["drop"] - figures["residual"]
    return {f"value_books/{target}/{key}": x for key, x in figures.items()}


@dataclass
class Table:
    columns: list
    rows: list


@dataclass
class Curves:
    x: list
    lines: dict  # name -> its y, as long as x
    title: str


# --- wandb -------------------------------------------------------------------------

# what it prints would have escape codes, and names that a stranger gave
QUIET = {"silent": True, "init_timeout": 30.0, "finish_timeout": 300.0}


class Wandb:
    """wandb's run. It is offline where there is no login, and where there is no network."""

    def __init__(self, cfg, run_id, hidden):
        """hidden: the names of the metrics that make no panel."""
        import wandb

        self.wandb = wandb
        options = {
            "project": project_name(cfg.wandb_project),
            "id": run_id,
            "dir": cfg.out_dir,
            "name": shorten(visible(cfg.wandb_run_name or out_name(cfg)), 128),
            "config": vars(cfg),
            "resume": "allow",
            "settings": wandb.Settings(**QUIET),
        }
        refused = "" if "WANDB_MODE" in os.environ else self.refused()
        if refused:
            later = "`wandb login` and `wandb sync` send it later"
            say(f"wandb: {refused}, so this run is logged offline; {later}")
            options["mode"] = "offline"
        try:
            self.run = wandb.init(**options)
        except wandb.Error as e:
            if options.get("mode") == "offline":
                raise
            warn(f"wandb cannot be reached ({short(e)}): this run is logged offline")
            options["mode"] = "offline"
            self.run = wandb.init(**options)
        self.define(hidden)
        if not self.run.offline:
            say(f"wandb: {self.run.url}")

    def define(self, hidden):
        """What makes a panel, and what the run's summary holds. A chart and a table are drawn from
        the summary, so theirs stays."""
        self.run.define_metric("val/loss", summary="min,last")
        for name in NOT_IN_SUMMARY:
            self.run.define_metric(name, summary="none")
        for name in hidden:
            summary = None if name.endswith("_table") else "none"
            self.run.define_metric(name, hidden=True, summary=summary)

    def refused(self):
        """Why nobody is logged in; empty where somebody is."""
        try:
            return "" if self.wandb.login(prompt=False) else "no login found"
        except (self.wandb.Error, ValueError) as e:  # the key is malformed, or there is no network
            return short(e)

    def log(self, metrics, step):
        self.run.log({name: self.shown(x) for name, x in metrics.items()}, step=step)

    def shown(self, x):
        """A metric as wandb takes it."""
        if isinstance(x, np.ndarray):
            return self.wandb.Histogram(x)
        if isinstance(x, Table):
            return self.wandb.Table(x.columns, x.rows)
        if isinstance(x, Curves):
            lines = list(x.lines.values())
            return self.wandb.plot.line_series(x.x, lines, list(x.lines), x.title, "step")
        return x

    def finish(self):
        self.run.finish()

    def abandon(self, error):
        """Keeps wandb from talking to its process when this one ends, where that process died."""
        if isinstance(error, OSError):
            with contextlib.suppress(Exception):  # it says that it cannot be told
                self.wandb.teardown()


# --- names -------------------------------------------------------------------------


def out_name(cfg):
    return Path(cfg.out_dir).resolve().name


def slug(text, most=16):
    """Letters, digits, - and _, which may stand in a run's id."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:most] or "run"


def project_name(name):
    """A name that wandb takes for a project: without /\\#?%: and of at most 128 characters."""
    cleaned = re.sub(r"[/\\#?%:]", "-", visible(name))[:128] or "nanoshapley"
    if cleaned != name:
        say(f"wandb: the project is called {cleaned}, for {name!r} is no name there")
    return cleaned


def metric_name(name, most=40):
    """The name of a domain or target as one part of a metric's name: no path, no pattern, and of at
    most `most` bytes, because wandb makes names of files of it."""
    cleaned = re.sub(r"[/*]|^\.+", "_", visible(name))
    if len(cleaned.encode()) <= most:
        return cleaned
    kept = cleaned.encode()[: most - 9].decode(errors="ignore")
    return f"{kept}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"
