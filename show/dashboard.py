"""What wandb and TensorBoard are shown while a run goes on. Their names group it: train, val_loss, overhead, and of each target
value, histogram, domains, chunks, books and audit."""

import os
import time
from pathlib import Path

import numpy as np

from ledger import AUDIT_ENTRIES
from system.errors import UserError
from system.terminal import say


class Board:
    """Takes floats, arrays (shown as histograms), Tables and Curves."""

    def __init__(self, cfg, wandb_id, data, targets, decode):
        """wandb_id: under which a resumed run goes on, or None. data: data.Dataset. targets: what has a .name. decode: tokens -> text."""
        self.data, self.targets, self.decode, self.curves = data, targets, decode, []
        self.wandb = self.writer = None
        self.wandb_id = wandb_id
        if cfg.wandb_log:
            self.wandb_id = wandb_id or f"{Path(cfg.out_dir).name}-{time.time_ns():x}"
            self.wandb = start_wandb(cfg, self.wandb_id)
        if cfg.tensorboard_log:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as e:
                raise UserError(f"--tensorboard_log needs TensorBoard ({e}): type pip install tensorboard") from e
            self.writer = SummaryWriter(str(Path(cfg.out_dir, "tensorboard")))

    def log(self, metrics, step):
        if self.wandb:
            self.wandb.log({name: for_wandb(x) for name, x in metrics.items()}, step=step)
        for name, x in metrics.items() if self.writer else ():
            if isinstance(x, np.ndarray):
                self.writer.add_histogram(name, x, step)
            elif isinstance(x, Table):
                self.writer.add_text(
                    name, "\n".join("    " + "  ".join(map(repr, row)) for row in [x.columns, *x.rows]), step
                )  # indented: markdown's code
            elif not isinstance(x, Curves):  # whose points it has as scalars
                self.writer.add_scalar(name, x, step)

    def finish(self):
        if self.wandb:
            self.wandb.finish()
        if self.writer:
            self.writer.close()

    def values(self, recent, histogram):
        """Of what was flushed since the last log: per target the spread of the values and their sum by domain, what the measured
        steps' drop was made of, and how close the audited steps' values came to the truth."""
        metrics, visits = {}, recent.ledger
        measured = recent.books[np.isfinite(recent.books["residual"]).all(1)]
        for k, target in enumerate(self.targets):
            if len(measured):
                drop = measured["before"][:, k] - measured["after"][:, k]
                metrics |= {f"books/{target.name}/drop": float(drop.sum())}
                metrics |= {f"books/{target.name}/{key}": float(measured[key][:, k].sum()) for key in ("data", "momentum", "decay", "residual")}
            if recent.audit is not None:
                metrics |= {f"audit/{target.name}/{key}": float(recent.audit[key][-1, k]) for key in AUDIT_ENTRIES}
            v = visits["value"][:, k]
            low, high = np.percentile(v, (5, 95))
            metrics |= {f"value/{target.name}/{key}": float(x) for key, x in dict(mean=v.mean(), p5=low, p95=high, negative=(v < 0).mean()).items()}
            sums = np.bincount(self.data.train.domain[visits["chunk"]], v, len(self.data.domains))
            metrics |= {f"value_by_domain/{target.name}/{d}": float(s) for d, s in zip(self.data.domains, sums)}
            if histogram:
                metrics[f"histogram/{target.name}"] = v
        return metrics

    def totals(self, total, used, step, n=10):
        """Of the whole run so far: per target the domains' values over time, in one chart, and the n top and bottom chunks with their text.
        total (n_chunks, K) nats, used (n_chunks,) bool."""
        metrics, ids = {}, np.flatnonzero(used)
        domain = self.data.train.domain[ids]
        self.curves.append((step, [np.bincount(domain, of_target, len(self.data.domains)) for of_target in total[ids].T]))
        steps, sums = zip(*self.curves)
        present = np.flatnonzero(np.bincount(domain, minlength=len(self.data.domains)))
        for k, target in enumerate(self.targets):
            lines = {self.data.domains[d]: [float(of[k][d]) for of in sums] for d in present}
            metrics[f"domains/{target.name}"] = Curves(list(steps), lines, f"value so far, nats, for {target.name}")
            order = ids[np.argsort(-total[ids, k])]
            for name, chunks in (("top", order[:n]), ("bottom", order[::-1][:n])):
                rows = [[int(c), self.data.domains[self.data.train.domain[c]], float(total[c, k]), self.text(c)] for c in chunks]
                metrics[f"chunks/{target.name}/{name}"] = Table(["chunk", "domain", "value (nats)", "text"], rows)
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


def for_wandb(x):
    import wandb

    if isinstance(x, np.ndarray):
        return wandb.Histogram(x)
    if isinstance(x, Table):
        return wandb.Table(x.columns, x.rows)
    if isinstance(x, Curves):
        return wandb.plot.line_series(x.x, list(x.lines.values()), list(x.lines), x.title, "step")
    return x


def start_wandb(cfg, run_id):
    import wandb

    settings = dict(project=cfg.wandb_project, name=cfg.wandb_run_name or Path(cfg.out_dir).name, id=run_id, dir=cfg.out_dir)
    settings.update(config=vars(cfg), resume="allow")
    if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
        say("wandb: no login found, so this run is logged offline; `wandb login` and `wandb sync` send it later")
        settings["mode"] = "offline"
    run = wandb.init(**settings)
    run.define_metric("value_by_domain/*", hidden=True)  # a panel for each domain and target would bury the rest: domains/ has them in one
    return run
