"""What wandb and TensorBoard are shown while a run goes on. Their names group it: train, val_loss,
overhead, and of each target value, histogram, domains, chunks, books and audit.

A run never ends because of its logging: where one of them refuses something, dies or has no
network, a line says so, and the run goes on without it.
"""

import contextlib
import hashlib
import os
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np

from system.files import short
from system.store import AUDIT_ENTRIES
from system.terminal import say, shorten, visible, warn

PATIENCE = 3  # failures of a logger that a run puts up with


class Board:
    """Takes floats, arrays (shown as histograms), Tables and Curves."""

    def __init__(self, cfg, wandb_id, data, targets, decode, visits=()):
        """wandb_id: under which a resumed run goes on, or None. data: data.Dataset. targets: what
        has a .name. decode: tokens -> text. visits: those of a run that is resumed."""
        self.data, self.decode = data, decode
        self.targets = [metric_name(target.name) for target in targets]
        self.domains = [metric_name(name) for name in data.domains]
        self.batch = cfg.batch_size * cfg.gradient_accumulation_steps
        self.curves = self.past_curves(visits, cfg.checkpoint_interval)
        self.wandb_id = wandb_id
        self.sinks, self.failures = {}, Counter()
        if cfg.wandb_log:
            self.wandb_id = wandb_id or f"{slug(out_name(cfg))}-{time.time_ns():x}"
            self.open("wandb", lambda: Wandb(cfg, self.wandb_id))
        if getattr(cfg, "tensorboard_log", False):
            self.open("tensorboard", lambda: TensorBoard(cfg))

    def open(self, name, make):
        sink = self.tried(name, make)
        if sink:
            self.sinks[name] = sink

    def log(self, metrics, step):
        for name, sink in list(self.sinks.items()):
            self.tried(name, lambda sink=sink: sink.log(metrics, step))

    def finish(self):
        for name, sink in list(self.sinks.items()):
            self.tried(name, sink.finish)

    def tried(self, name, work):
        """What work() returns, None where it fails: a line says so then. After PATIENCE failures,
        or where its process is gone, nothing more is logged there."""
        try:
            return work()
        except Exception as e:  # of a library that only logs: whatever it is, the run goes on
            self.failures[name] += 1
            gone = isinstance(e, OSError) or self.failures[name] == PATIENCE
            end = "; the run goes on without it" if gone else ""
            warn(f"{name} failed ({type(e).__name__}: {short(e)}){end}")
            if gone and name in self.sinks:
                self.sinks.pop(name).abandon(e)
            return None

    def past_curves(self, visits, interval):
        """[(step, [each domain's value so far, of each target])] at the checkpoints of a run that
        is resumed, for its chart goes on."""
        curves, n = [], len(self.data.domains)
        total = np.zeros((len(self.targets), n))
        rows = interval * self.batch
        for start in range(0, len(visits), rows):
            part = visits[start : start + rows]
            domain = self.data.train.domain[part["chunk"]]
            for k in range(len(total)):
                total[k] += np.bincount(domain, part["value"][:, k], n)
            curves.append((int(part["step"][-1]) + 1, list(total.copy())))
        return curves

    def values(self, recent, histogram):
        """Of what was flushed since the last log: per target the spread of the values and their sum by domain, what the measured
        steps' drop was made of, and how close the audited steps' values came to the truth."""
        metrics, visits = {}, recent.visits
        measured = recent.books[np.isfinite(recent.books["residual"]).all(1)]
        for k, name in enumerate(self.targets):
            if len(measured):
                drop = measured["before"][:, k] - measured["after"][:, k]
                metrics |= {f"books/{name}/drop": float(drop.sum())}
                metrics |= {
                    f"books/{name}/{key}": float(measured[key][:, k].sum())
                    for key in ("data", "momentum", "decay", "residual")
                }
            if recent.audit is not None:
                metrics |= {
                    f"audit/{name}/{key}": float(recent.audit[key][-1, k]) for key in AUDIT_ENTRIES
                }
            v = visits["value"][:, k]
            low, high = np.percentile(v, (5, 95))
            metrics |= {
                f"value/{name}/{key}": float(x)
                for key, x in dict(mean=v.mean(), p5=low, p95=high, negative=(v < 0).mean()).items()
            }
            sums = np.bincount(self.data.train.domain[visits["chunk"]], v, len(self.data.domains))
            metrics |= {f"value_by_domain/{name}/{d}": float(s) for d, s in zip(self.domains, sums)}
            if histogram:
                metrics[f"histogram/{name}"] = v
        return metrics

    def totals(self, total, used, step, n=10):
        """Of the whole run so far: per target the domains' values over time, in one chart, and the n top and bottom chunks with their text.
        total (n_chunks, K) nats, used (n_chunks,) bool."""
        metrics, ids = {}, np.flatnonzero(used)
        domain = self.data.train.domain[ids]
        self.curves.append(
            (
                step,
                [
                    np.bincount(domain, of_target, len(self.data.domains))
                    for of_target in total[ids].T
                ],
            )
        )
        steps, sums = zip(*self.curves)
        present = np.flatnonzero(np.bincount(domain, minlength=len(self.data.domains)))
        for k, name in enumerate(self.targets):
            lines = {self.data.domains[d]: [float(of[k][d]) for of in sums] for d in present}
            metrics[f"domains/{name}"] = Curves(
                list(steps), lines, f"value so far, nats, for {name}"
            )
            order = ids[np.argsort(-total[ids, k])]
            for end, chunks in (("top", order[:n]), ("bottom", order[::-1][:n])):
                rows = [
                    [
                        int(c),
                        self.data.domains[self.data.train.domain[c]],
                        float(total[c, k]),
                        self.text(c),
                    ]
                    for c in chunks
                ]
                metrics[f"chunks/{name}/{end}"] = Table(
                    ["chunk", "domain", "value (nats)", "text"], rows
                )
        return metrics

    def text(self, chunk):
        tokens = self.data.train.rows[chunk]
        return self.decode(tokens[tokens != self.data.meta["eot"]])[:1000]


class Table:
    def __init__(self, columns, rows):
        self.columns, self.rows = columns, rows


class Curves:
    def __init__(self, x, lines, title):
        self.x, self.lines, self.title = x, lines, title


# --- where it goes -----------------------------------------------------------------


class Wandb:
    """wandb's run. Offline where there is no login, and where there is no network."""

    def __init__(self, cfg, run_id):
        import wandb

        self.wandb = wandb
        options = dict(project=project_name(cfg.wandb_project), id=run_id, dir=cfg.out_dir)
        options["name"] = shorten(visible(cfg.wandb_run_name or out_name(cfg)), 128)
        options.update(config=vars(cfg), resume="allow", settings=wandb.Settings(**QUIET))
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
            self.run = wandb.init(**options | {"mode": "offline"})
        # a panel for each domain and target would bury the rest: domains/ has them in one
        self.run.define_metric("value_by_domain/*", hidden=True)
        if not self.run.offline:
            say(f"wandb: {self.run.url}")

    def refused(self):
        """Why nobody is logged in; empty where somebody is."""
        try:
            return "" if self.wandb.login(prompt=False) else "no login found"
        except (self.wandb.Error, ValueError) as e:  # a key that is none, or no network
            return short(e)

    def log(self, metrics, step):
        self.run.log({name: self.shown(x) for name, x in metrics.items()}, step=step)

    def shown(self, x):
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
        """Where its process died, nothing is left to be told to it when this one ends."""
        if isinstance(error, OSError):
            with contextlib.suppress(Exception):  # it says that it cannot be told
                self.wandb.teardown()


# what it prints would have escape codes, and names that a stranger gave
QUIET = {"silent": True, "init_timeout": 30.0, "finish_timeout": 300.0}


class TensorBoard:
    def __init__(self, cfg):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(Path(cfg.out_dir, "tensorboard")))

    def log(self, metrics, step):
        for name, x in metrics.items():
            if isinstance(x, np.ndarray):
                self.writer.add_histogram(name, x, step)
            elif isinstance(x, Table):
                rows = ["    " + "  ".join(map(repr, row)) for row in [x.columns, *x.rows]]
                self.writer.add_text(name, "\n".join(rows), step)  # indented: markdown's code
            elif not isinstance(x, Curves):  # whose points it has as scalars
                self.writer.add_scalar(name, x, step)

    def finish(self):
        self.writer.close()

    def abandon(self, error):
        pass


# --- names -------------------------------------------------------------------------


def out_name(cfg):
    return Path(cfg.out_dir).resolve().name


def slug(text, most=16):
    """Letters, digits, - and _, which may stand in a run's id."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:most] or "run"


def project_name(name):
    """wandb's projects have none of /\\#?%: in their names, and at most 128 characters."""
    cleaned = re.sub(r"[/\\#?%:]", "-", visible(name))[:128] or "nanoshapley"
    if cleaned != name:
        say(f"wandb: the project is called {cleaned}, for {name!r} is no name there")
    return cleaned


def metric_name(name, most=40):
    """A domain's or a target's name as a part of a metric's, which wandb makes names of files of:
    one part, no path, and not too long."""
    cleaned = re.sub(r"/|^\.+", "_", visible(name))
    if len(cleaned.encode()) <= most:
        return cleaned
    kept = cleaned.encode()[: most - 9].decode(errors="ignore")
    return f"{kept}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"
