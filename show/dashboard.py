"""What wandb is shown while a run goes on. The names of the metrics group them: train, val_loss,
overhead, and for each target value, histogram, domains, chunks, books and audit.

A run never ends because of its logging. Where wandb refuses something, dies or has no network, a
line says so, and the run goes on without it.
"""

import contextlib
import hashlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from show import tables
from system.files import short
from system.store import AUDIT_ENTRIES
from system.terminal import say, shorten, visible, warn

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
        self.history = self.past_sums(visits, cfg.checkpoint_interval)
        self.wandb_id = wandb_id or f"{slug(out_name(cfg))}-{time.time_ns():x}"
        self.failures = 0
        self.logger = None  # none yet, while attempt() opens it
        self.logger = self.attempt(self.open, cfg)

    # --- logging that never ends a run -------------------------------------------------

    def open(self, cfg):
        return Wandb(cfg, self.wandb_id)

    def log(self, metrics, step):
        if self.logger is not None:
            self.attempt(self.logger.log, metrics, step)

    def finish(self):
        if self.logger is not None:
            self.attempt(self.logger.finish)

    def attempt(self, work, *arguments):
        """Returns what work(*arguments) returns, or None where it fails, which a line says.

        After PATIENCE failures, or where wandb's process is gone, nothing more is logged.
        """
        try:
            return work(*arguments)
        except Exception as e:  # of a library that only logs: whatever it is, the run goes on
            self.failures += 1
            is_last = isinstance(e, OSError) or self.failures == PATIENCE
            end = "; the run goes on without it" if is_last else ""
            warn(f"wandb failed ({type(e).__name__}: {short(e)}){end}")
            if is_last and self.logger is not None:
                self.logger.abandon(e)
                self.logger = None
            return None

    # --- metrics ------------------------------------------------------------------------

    def past_sums(self, visits, interval):
        """[(step, values summed by target and domain so far (K, D))] at the checkpoints of a run
        that is resumed: its charts go on from them."""
        history = []
        n_domains = len(self.data.domains)
        sums = np.zeros((len(self.targets), n_domains))
        rows = interval * self.batch
        for start in range(0, len(visits), rows):
            block = visits[start : start + rows]
            domain = self.data.train.domain[block["chunk"]]
            for k in range(len(sums)):
                sums[k] += np.bincount(domain, block["value"][:, k], n_domains)
            last_step = int(block["step"][-1])
            history.append((last_step + 1, sums.copy()))
        return history

    def values(self, recent, histogram):
        """Metrics of the steps since the last log, for each target: the spread of the values and
        their sum by domain, what the drop of the measured steps was made of, and how close the last
        audited step's values came to the truth.

        recent: a Flushed, with the records visits, books and audit, which may be None. histogram:
        whether all the values are logged too.
        """
        metrics = {}
        measured = tables.measured(recent.books)
        domain = self.data.train.domain[recent.visits["chunk"]]
        for k, target in enumerate(self.targets):
            if len(measured):
                drop = measured["before"][:, k] - measured["after"][:, k]
                metrics[f"books/{target}/drop"] = float(drop.sum())
                for key in ("data", "momentum", "decay", "residual"):
                    metrics[f"books/{target}/{key}"] = float(measured[key][:, k].sum())
            if recent.audit is not None:
                for key in AUDIT_ENTRIES:
                    metrics[f"audit/{target}/{key}"] = float(recent.audit[key][-1, k])
            values = recent.visits["value"][:, k]
            p5, p95 = np.percentile(values, (5, 95))
            metrics[f"value/{target}/mean"] = float(values.mean())
            metrics[f"value/{target}/p5"] = float(p5)
            metrics[f"value/{target}/p95"] = float(p95)
            metrics[f"value/{target}/negative"] = float((values < 0).mean())
            sums = np.bincount(domain, values, len(self.domains))
            for name, domain_sum in zip(self.domains, sums):
                metrics[f"value_by_domain/{target}/{name}"] = float(domain_sum)
            if histogram:
                metrics[f"histogram/{target}"] = values
        return metrics

    def totals(self, total, used, step, n=10):
        """Metrics of the whole run so far, for each target: a chart of the domains' values over
        time, and the n chunks with the largest and the smallest values, with their text.

        total: the chunks' values (n_chunks, K), nats. used: bool (n_chunks,).
        """
        chunks = np.flatnonzero(used)
        domain = self.data.train.domain[chunks]
        n_domains = len(self.data.domains)
        sums = [np.bincount(domain, values, n_domains) for values in total[chunks].T]
        self.history.append((step, np.stack(sums)))
        present = np.unique(domain)
        metrics = {}
        for k, target in enumerate(self.targets):
            metrics[f"domains/{target}"] = self.domain_curves(k, present)
            order = chunks[np.argsort(-total[chunks, k])]
            metrics[f"chunks/{target}/top"] = self.chunk_table(order[:n], total[:, k])
            metrics[f"chunks/{target}/bottom"] = self.chunk_table(order[::-1][:n], total[:, k])
        return metrics

    def domain_curves(self, k, domains):
        """Target k's values over time, a line for each of the domains, given by number."""
        steps = [step for step, _ in self.history]
        lines = {}
        for d in domains:
            lines[self.data.domains[d]] = [float(sums[k, d]) for _, sums in self.history]
        return Curves(steps, lines, f"value so far, nats, for {self.targets[k]}")

    def chunk_table(self, chunks, values):
        rows = []
        for chunk in chunks:
            domain = self.data.domains[self.data.train.domain[chunk]]
            rows.append([int(chunk), domain, float(values[chunk]), self.text(chunk)])
        return Table(["chunk", "domain", "value (nats)", "text"], rows)

    def text(self, chunk):
        tokens = self.data.train.rows[chunk]
        return self.decode(tokens[tokens != self.data.meta["eot"]])[:1000]


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

    def __init__(self, cfg, run_id):
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
        # a panel for each domain and target would bury the rest: domains/ has them in one
        self.run.define_metric("value_by_domain/*", hidden=True)
        if not self.run.offline:
            say(f"wandb: {self.run.url}")

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
    """The name of a domain or target as one part of a metric's name: no path, and of at most `most`
    bytes, because wandb makes names of files of it."""
    cleaned = re.sub(r"/|^\.+", "_", visible(name))
    if len(cleaned.encode()) <= most:
        return cleaned
    kept = cleaned.encode()[: most - 9].decode(errors="ignore")
    return f"{kept}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"
