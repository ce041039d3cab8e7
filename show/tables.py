"""The tables that train.py ends with, and the figures in them."""

import bisect
import itertools
import math
import textwrap
import unicodedata

import numpy as np

from show import findings, hindsight
from system.store import AUDIT_ENTRIES, BOOK_ENTRIES
from system.terminal import visible


def end_of_run(found, books, audits, rule):
    """The lines that say what a run found: for each target a table of the domains by the median
    value of their chunks, and what to beware of; the books and the audit; last, the findings.

    found: what findings.of_run() gives. books, audits, rule: see account().
    """
    lines = ["", *heading()]
    for of_target in found:
        lines += domain_table(of_target.target, of_target.domains, of_target.everything)
        lines += of_target.cautions
    lines += account(books, audits, [of_target.target for of_target in found], rule)
    return [*lines, "", *[of_target.finding for of_target in found]]


def end_of_hindsight(found, beside):
    """The lines that say what hindsight found: for each target a table of the domains, and what to
    beware of; which steps are early; the check; last, the findings.

    found: what findings.of_run() gives. beside: what hindsight.read() gives.
    """
    horizon = found[0].horizon
    lines = ["", *heading(horizon)]
    for of_target in found:
        lines += domain_table(of_target.target, of_target.domains, of_target.everything)
        lines += of_target.cautions
    names = [of_target.target for of_target in found]
    lines += ["", *early_steps(beside, names)]
    lines += ["", *checked(beside, names)]
    return [*lines, "", *[of_target.finding for of_target in found]]


def heading(horizon=None):
    """The lines above tables of domains. horizon: see findings.when()."""
    sign = f"positive: it lowered the target's loss{findings.when(horizon)}"
    return [
        f"Values of the chunks used, in {findings.UNIT} ({sign}).",
        "share: the sum of a step's values over their size, on average over the steps. sum: in "
        "nats.",
    ]


SMOOTHED = "Of smoothed scores, for the gradient's mean over the steps; the books are not of them."


WIDTHS = {
    "chunks": 8,
    "median": 12,
    "+-": 10,
    "< 0": 6,
    "share": 8,
    "mean ": 14,  # with its mark
    "sum": 11,
}


def domain_table(target, rows, everything):
    """A target's lines. rows, everything: of findings.Found."""
    named = [(row["domain"], row) for row in rows]
    table = figure_table("domain", [*named, ("all", everything)])
    return ["", f"for {fit(target, 60).rstrip()}:", *table]


def figure_table(head, rows):
    """rows: [(a name, what findings.figures() gives)] -> aligned lines, and what their marks
    mean."""
    lines = [f"{head:24}" + "".join(f"{name:>{width}}" for name, width in WIDTHS.items())]
    for name, row in rows:
        lines.append(figure_line(name, row))
    return lines + footnotes([row for _, row in rows])


def figure_line(name, row):
    mark = "*" if findings.is_lopsided(row["chunks"], row["largest_share"]) else " "
    cells = {
        "chunks": f"{row['chunks']:,}",
        "median": findings.micro(row["median"]),
        "+-": findings.micro(row["error"]).lstrip("+"),
        "< 0": f"{row['negative']:.0%}",
        "share": f"{row['share']:+.1%}",
        "mean ": findings.micro(row["mean"]) + mark,
        "sum": f"{row['sum']:+.4f}",
    }
    line = fit(name, 23) + " "
    for key, width in WIDTHS.items():
        line += cells[key].rjust(width)
    return line


def footnotes(rows):
    """What the marks in these rows of a table mean."""
    lines = []
    if any(findings.is_lopsided(row["chunks"], row["largest_share"]) for row in rows):
        lines.append("*: one chunk holds over a tenth of the size of these values; see the median")
    if any(row["chunks"] < findings.FEW for row in rows):
        lines.append(f"-: fewer than {findings.FEW} chunks, too few to say how sure the median is")
    return lines


def account(entries, audits, names, rule):
    """The lines that follow the table of values: for each target, how much of the measured drop of
    its loss the books account for, and how close the audited steps' values came to the truth.

    entries, audits: the records of books.npy and audit.npy, the latter of length 0 where there was
    no audit. names: the targets. rule: that of the values.
    """
    totals = [booked(entries, k) for k in range(len(names))]
    lines = [""]
    for name, total in zip(names, totals):
        lines.append(accounted(name, total))
    lines += explain_parts(totals)
    lines += unclosed(names, totals, rule)
    counts = count_passes(entries)
    lines += passes(counts)
    if rule not in KNOW_CLIPPING and not counts:
        lines += hard_clipping(entries)
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


PARTS = {"data": "values", "momentum": "momentum", "decay": "decay"}  # of a drop, and their names
CLOSED = 0.1  # the books close where what they leave is a smaller part of the drop


def accounted(name, total):
    """The line of booked()."""
    name = findings.short(name)
    if not total:
        return f"books, {name}: no step was measured yet"
    parts = [f"{shown} {nats(total[key])}" for key, shown in PARTS.items()]
    change = "rise" if total["drop"] < 0 else "drop"
    steps = counted(total["measured_steps"], "step")
    whole = f"{total['accounted']:.1%} of the measured {change}"
    size = f"({abs(total['drop']):.4f} nats in {steps})"
    added = "values, momentum and weight decay add up to"
    return f"books, {name}: {added} {whole} {size}: {', '.join(parts)} nats"


def nats(x):
    """A part of a drop, with its sign."""
    return f"{round(x, 4) + 0.0:+.4f}"  # + 0.0, for -0.0 has a sign


def explain_parts(totals):
    """A line on parts below 0, if some of the booked() totals have one."""
    for total in totals:
        if total and any(round(total[key], 4) < 0 for key in PARTS):
            why = "momentum goes on in the direction of earlier chunks"
            return [f"books: a part below 0 raised the loss; {why}"]
    return []


def closes(drop, residual):
    """Whether books, both numbers in nats, leave but a small part of a drop."""
    return drop > 0 and abs(residual) <= CLOSED * drop


def unclosed(names, totals, rule):
    """A line for each target whose booked() total leaves much of the drop, or has no drop."""
    cure = " (adamw2 closes them best)" if rule != "adamw2" else ""
    lines = []
    for name, total in zip(names, totals):
        if not total or closes(total["drop"], total["residual"]):
            continue
        left = f"the books do not close, {nats(total['residual'])} nats are left"
        read = "read its values as a rough order of the chunks, not as amounts"
        lines.append(f"caution, {findings.short(name)}: {left}; {read}{cure}")
    return lines


def count_passes(entries):
    """How the steps of a run were valued, from the records of books.npy: the number of steps, of
    those valued in two passes, of checks, of those that failed, and of steps that two passes do not
    explain either. None of runs without checks."""
    if "passes" not in entries.dtype.names:
        return None
    entries = entries[entries["passes"] > 0]
    is_checked = np.isfinite(entries["gap"]).any(1) | (entries["failed"] > 0)
    if not is_checked.any():
        return None
    return {
        "steps": len(entries),
        "in_two": int(np.count_nonzero(entries["passes"] == 2)),
        "checks": int(np.count_nonzero(is_checked)),
        "failed": int(np.count_nonzero(entries["failed"])),
        "rough": int(np.count_nonzero(entries["failed"] == 2)),
    }


ADAMW2_FASTER = 0.75  # with so many steps in two passes, of one micro-batch (results/overhead)


def passes(counts):
    """The lines of count_passes()."""
    if not counts:
        return []
    steps, checks = counted(counts["steps"], "step"), counted(counts["checks"], "check")
    found = f"{counts['failed']:,} of {checks} found that one is not enough"
    lines = [f"passes: {counts['in_two']:,} of {steps} were valued in two ({found})"]
    if counts["rough"]:
        rough = counted(counts["rough"], "step")
        lines.append(f"passes: two do not explain {rough} either; values there are rough")
    if counts["in_two"] > ADAMW2_FASTER * counts["steps"]:
        faster = "is faster where this many steps need it, and a step is one micro-batch"
        lines.append(f"passes: --rule=adamw2, which takes two in every step, {faster}")
    return lines


HARD = 0.5  # steps that were clipped to a smaller share of their gradient are valued roughly
KNOW_CLIPPING = ("sgd2", "adamw2")  # the rules that always know each chunk's part in it


def hard_clipping(entries):
    """A line where most steps were clipped hard, for values of one pass that nothing checks are
    rough there."""
    kappa = entries["kappa"]
    n_hard = np.count_nonzero(kappa < HARD)
    if 2 * n_hard <= len(entries):
        return []
    steps = counted(n_hard, "step")
    what = f"{steps} of {len(entries)} were clipped to less than half of their gradient"
    how = f"on average to {np.mean(kappa):.2f}"
    read = "values of one pass are rough there, those of adamw2 are not"
    return [f"caution: {what} ({how}); {read} (docs/method.md, Clipping)"]


def percent(amount, whole, sign="-"):
    """A share as text, to a tenth of a percent. sign: "+" where positive ones have theirs."""
    share = round(ratio(amount, whole), 3) + 0.0  # + 0.0, for -0.0 has a sign
    return f"{share:{sign}.1%}"


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
    steps = counted(audit["steps"], "step")
    what = f"the values of {steps} beside the exact ones"
    pearson = f"Pearson {audit['pearson']:.4f} (lowest {audit['pearson_lowest']:.4f})"
    spearman = f"Spearman {audit['spearman']:.4f} ({audit['spearman_lowest']:.4f})"
    l2 = f"error {audit['rel_l2']:.1%} of their size"
    sums = f"sum {percent(audit['sum_error'], 1, '+')} off"
    one_out = f"leave-one-out Pearson {audit['loo_pearson']:.4f}"
    figures = f"{pearson}, {spearman}, {l2}, {sums}, {one_out}"
    return f"audit, {findings.short(name)}: {what}: {figures}"


def ratio(amount, whole):
    """NaN where the whole is 0."""
    return float(amount / whole) if whole else math.nan


def counted(n, what):
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


# --- hindsight ----------------------------------------------------------------------


def early_steps(beside, names):
    """The lines that say which steps are early and why, with |dL/dw| at some steps. beside: what
    hindsight.read() gives."""
    first, last, late = beside["first_step"], beside["last_step"], beside["first_late_step"]
    if beside["early_steps"]:
        many = counted(beside["early_steps"], "step")
        parts = [percent(beside["early_share"][name], 1) for name in names]
        held = f"{' and '.join(parts)} of the size of all values"
        which = f"early: {many} before step {late:,} of steps {first:,} to {last:,}, with {held}."
        yield from paragraph(f"{which} {hindsight.WHY_EARLY}")
    else:
        yield f"early: none of steps {first:,} to {last:,}, for |dL/dw| is never large."
    shown = some_of(beside["adjoint"], late - first)
    yield f"{'|dL/dw| after step':24}" + "".join(f"{row['step']:>11,}" for row in shown)
    for name in names:
        yield fit(name, 24) + "".join(f"{row['norm'][name]:>11.3g}" for row in shown)


def some_of(rows, n_early):
    """A few of these rows: the ends, and those around the end of the n_early first ones."""
    n = len(rows)
    places = {0, n_early // 2, n_early - 1, n_early, (n_early + n) // 2, n - 1}
    return [rows[i] for i in sorted(places) if 0 <= i < n]


def checked(beside, names):
    """The lines of the check, or the command that makes one. beside: what hindsight.read()
    gives."""
    check = beside["check"]
    if check is None:
        yield "check: none was made, so it is not known how well these values predict a training"
        yield f"without some of the visits. To see it, type: {beside['to_check']}"
        return
    some = f"each without another {hindsight.share(check['fraction'])} of the visits"
    where = f"of steps {check['first_step']:,} to {check['end'] - 1:,}"
    what = f"check: {check['sets']:,} trainings, {some} {where}: {hindsight.CHECKED}"
    yield from paragraph(what)
    for name in names:
        yield ""
        yield f"for {findings.short(name)}, loss at the end {beside['loss_at_end'][name]:.4f} nats:"
        yield from predictions(check["targets"][name])
    yield "slope: nats of change per nat predicted, 1 is right; -: the score is not in nats"


def predictions(rows):
    """A target's scores of a check -> aligned lines."""
    heads = ["correlation", "95 % interval", "Spearman", "slope", "+-"]
    widths = [12, 18, 10, 12, 10]
    yield f"{'score':24}" + "".join(head.rjust(width) for head, width in zip(heads, widths))
    for row in rows:
        cells = [
            signed(row["pearson"]),
            f"{signed(row['low'])} to {signed(row['high'])}",
            signed(row["spearman"]),
            "-" if math.isnan(row["slope"]) else f"{row['slope']:+.3g}",
            "-" if math.isnan(row["slope_error"]) else f"{row['slope_error']:.2g}",
        ]
        yield fit(row["score"], 24) + "".join(map(str.rjust, cells, widths))


def signed(x):
    return "-" if math.isnan(x) else f"{x:+.2f}"


def paragraph(text):
    """A text of our own in lines."""
    return textwrap.wrap(text, 100)


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
