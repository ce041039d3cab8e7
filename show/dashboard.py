"""What wandb is told."""

import os
import time
from pathlib import Path

import numpy as np

from ledger import AUDIT_ENTRIES


def start(cfg, run_id):
    """-> the run, and its id for the checkpoint, under which a resumed run goes on."""
    import wandb

    run_id = run_id or f"{Path(cfg.out_dir).name}-{time.time_ns():x}"
    settings = dict(project=cfg.wandb_project, name=cfg.wandb_run_name or Path(cfg.out_dir).name, id=run_id, dir=cfg.out_dir)
    settings.update(config=vars(cfg), resume="allow")
    if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
        print("wandb: no login found, so this run is logged offline; `wandb login` and `wandb sync` send it later")
        settings["mode"] = "offline"
    return wandb.init(**settings), run_id


def value_metrics(recent, targets, data, histogram):
    """Dashboard entries for what was flushed since the last log: per target the spread of the values and their sum by domain,
    what the measured steps' drop was made of, and how close the audited steps' values came to the truth."""
    import wandb

    metrics, visits = {}, recent.ledger
    measured = recent.books[np.isfinite(recent.books["residual"]).all(1)]
    for k, target in enumerate(targets):
        if len(measured):
            drop = measured["before"][:, k] - measured["after"][:, k]
            metrics |= {f"books/{target.name}/drop": float(drop.sum())}
            metrics |= {f"books/{target.name}/{key}": float(measured[key][:, k].sum()) for key in ("data", "momentum", "decay", "residual")}
        if recent.audit is not None:
            metrics |= {f"audit/{target.name}/{key}": float(recent.audit[key][-1, k]) for key in AUDIT_ENTRIES}
        v = visits["value"][:, k]
        low, high = np.percentile(v, (5, 95))
        entries = dict(mean=v.mean(), p5=low, p95=high, negative=(v < 0).mean())
        metrics |= {f"value/{target.name}/{key}": float(x) for key, x in entries.items()}
        sums = np.bincount(data.train.domain[visits["chunk"]], v, len(data.domains))
        metrics |= {f"value_by_domain/{target.name}/{d}": float(s) for d, s in zip(data.domains, sums)}
        if histogram:
            metrics[f"histogram/{target.name}"] = wandb.Histogram(v)
    return metrics
