"""The tables that train.py ends with, and the figures in them."""

import bisect
import itertools
import math
import unicodedata

import numpy as np

from show import findings
from system.store import AUDIT_ENTRIES, BOOK_ENTRIES
from system.terminal import visible


def domains(total, used, visits, batch, data, names):
    """The lines that say what a run found: for each target a table of the domains by the median
    value of their chunks, what to beware of, and the finding in a sentence.

    total: the chunks' values (n_chunks, K), nats. used: bool (n_chunks,). visits: the records of
    ledger.npy, batch of them a step. names: of the targets.
    """
    chunks = np.flatnonzero(used)
    domain = data.train.domain[chunks]
    sizes, _ = findings.over_steps([visits], batch, data.train.domain, len(data.domains))
    first_step = int(visits["step"][0])

    def domain_of(chunk):
        return data.domains[data.train.domain[chunk]]

    lines = ["", f"Values of the chunks used, in {findings.UNIT} (positive: it lowered the loss)"]
    sentences = []
    for k, name in enumerate(names):
        values = total[chunks, k]
        rows = findings.by_domain(values, domain)
        lines += domain_table(name, rows, values, data.domains)
        lines += findings.cautions(name, values, chunks, domain_of, sizes[k], first_step)
        sentences.append(findings.found(name, rows, data.domains))
    return [*lines, "", *sentences]


def domain_table(target, rows, values, domain_names):
    """rows: of findings.by_domain(). values (n,): of all domains, nats."""
    head = f"{'chunks':>8}{'median':>12}{'+-':>10}{'< 0':>6}{'mean':>14}"
    lines = ["", f"for {fit(target, 60).rstrip()}:", f"{'domain':24}{head}"]
    for row in rows:
        lines.append(domain_line(domain_names[row.domain], row))
    everything = findings.of_domain(-1, values, np.arange(len(values)))
    lines.append(domain_line("all", everything))
    if any(row.is_lopsided for row in [*rows, everything]):
        lines.append("*: one chunk holds over a tenth of the size of these values; see the median")
    if any(row.is_few for row in rows):
        lines.append(f"-: fewer than {findings.FEW} chunks, too few to say how sure the median is")
    return lines


def domain_line(name, row):
    mark = "*" if row.is_lopsided else " "
    line = f"{fit(name, 23)} {row.chunks:>8,}{findings.micro(row.median):>12}"
    line += f"{findings.micro(row.error).lstrip('+'):>10}{row.negative:>6.0%}"
    return f"{line}{findings.micro(row.mean):>13}{mark}".rstrip()


def account(entries, audits, names):
    """The lines that follow the table of values: for each target, how much of the measured drop of
    its loss the books account for, and how close the audited steps' values came to the truth.

    entries, audits: the records of books.npy and audit.npy, the latter of length 0 where there was
    no audit. names: the targets.
    """
    lines = [""]
    for k, name in enumerate(names):
        lines.append(accounted(name, booked(entries, k)))
    if len(audits):
        for k, name in enumerate(names):
            lines.append(compared(name, audited(audits, k)))
    return lines


def measured(entries):
    """The records of books.npy whose step's drop was measured."""
    return entries[np.isfinite(entries["residual"]).all(1)]


def booked(entries, k):
    """What the books say of target k's loss over the measured steps, or None where there is none.

    drop, data, momentum, decay and residual are in nats; accounted is a share of the drop.
    """
    entries = measured(entries)
    if not len(entries):
        return None
    total = {key: float(entries[key][:, k].sum(dtype=np.float64)) for key in BOOK_ENTRIES}
    drop = total.pop("before") - total.pop("after")
    accounted_for = ratio(drop - total["residual"], drop)
    return {"measured_steps": len(entries), "drop": drop, "accounted": accounted_for, **total}


def accounted(name, total):
    """The line of booked()."""
    if not total:
        return f"{name}: no step was measured yet"
    shares = []
    for key in ("data", "momentum", "decay"):
        shares.append(f"{key} {ratio(total[key], total['drop']):.1%}")
    drop = f"the drop of {total['drop']:.4f} nats in {total['measured_steps']} measured steps"
    return f"{name}: accounted for {total['accounted']:.1%} of {drop} ({', '.join(shares)})"


def audited(audits, k):
    """How close target k's values came to the truth, by the records of audit.npy, or None where
    there are none.

    rel_l2: the median over the steps. sum_error: the error of the values' sum, as a share of the
    truth's. The correlations: means over the steps, and the lowest.
    """
    if not len(audits):
        return None
    column = {key: audits[key][:, k].astype(float) for key in AUDIT_ENTRIES}
    return {
        "steps": len(audits),
        "rel_l2": float(np.median(column["rel_l2"])),
        "sum_error": ratio(column["efficiency_gap"].sum(), column["utility"].sum()),
        "pearson": float(column["pearson"].mean()),
        "pearson_lowest": float(column["pearson"].min()),
        "spearman": float(column["spearman"].mean()),
        "spearman_lowest": float(column["spearman"].min()),
        "loo_pearson": float(column["loo_pearson"].mean()),
    }


def compared(name, audit):
    """The line of audited()."""
    pearson = f"Pearson {audit['pearson']:.4f} (lowest {audit['pearson_lowest']:.4f})"
    spearman = f"Spearman {audit['spearman']:.4f} (lowest {audit['spearman_lowest']:.4f})"
    l2 = f"relative L2 {audit['rel_l2']:.1%} (median)"
    sums = f"sum {audit['sum_error']:+.1%} of the truth"
    one_out = f"leave-one-out Pearson {audit['loo_pearson']:.4f}"
    return (
        f"{name}: audit of {audit['steps']} steps: {pearson}, {spearman}, {l2}, {sums}, {one_out}"
    )


def ratio(amount, whole):
    """NaN where the whole is 0."""
    return float(amount / whole) if whole else math.nan


# --- text in cells ------------------------------------------------------------------


def fit(text, cells, right=False):
    """Padded or cut to a width in the cells of a terminal, where a Chinese character takes two."""
    text = visible(text)
    ends = list(itertools.accumulate(map(cells_of, text)))  # where each character ends
    width = ends[-1] if ends else 0
    if width > cells:
        count = bisect.bisect_right(ends, cells - 1)
        text = text[:count] + "\u2026"
        width = ends[count - 1] + 1 if count else 1
    blank = " " * (cells - width)
    return blank + text if right else text + blank


def cells_of(character):
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


# --- figures of values ------------------------------------------------------------


def spread(v):
    """Values (n,) -> their mean and its standard error, standard deviation, percentiles, and the
    share of negative ones. NaN: of a single value there is no deviation."""
    p5, median, p95 = np.percentile(v, (5, 50, 95))
    sd = float(v.std(ddof=1)) if len(v) > 1 else math.nan
    return {
        "mean": float(v.mean()),
        "standard_error": sd / len(v) ** 0.5,
        "sd": sd,
        "p5": float(p5),
        "median": float(median),
        "p95": float(p95),
        "negative": float((v < 0).mean()),
    }
