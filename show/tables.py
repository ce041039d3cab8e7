"""The tables that prepare_pile.py and train.py end with, and the figures in them."""

import bisect
import itertools
import math
import unicodedata

import numpy as np

from pile.domains import LONGEST
from pile.files import explain_left_out
from system.store import AUDIT_ENTRIES, BOOK_ENTRIES
from system.terminal import visible


def domains(total, used, data, names):
    """The run as the lines of a table: by domain the chunks used and, per target, their mean and median value and the share of negative
    ones. The median is what a single step with a gradient far above its history cannot move."""
    lines = [
        "",
        "Values of the chunks used, in 1e-6 nats (positive: it lowered the target's loss), and share of negative ones",
    ]
    lines += [f"{'':32}" + "".join("  " + fit(name, 26, right=True) for name in names)]
    lines += [f"{'domain':24}{'chunks':>8}" + f"{'mean':>12}{'median':>10}{'< 0':>6}" * len(names)]
    ids = np.flatnonzero(used)
    total, domain = total[ids], data.train.domain[ids]
    rows = [(name, domain == d) for d, name in enumerate(data.domains)]
    rows = sorted(
        (row for row in rows if row[1].any()), key=lambda row: -np.median(total[row[1], 0])
    )
    for name, chosen in [*rows, ("all", domain >= 0)]:
        cells = "".join(
            f"{1e6 * v.mean():>+12.1f}{1e6 * np.median(v):>+10.1f}{(v < 0).mean():>6.0%}"
            for v in total[chosen].T
        )
        lines.append(f"{fit(name, 23)} {chosen.sum():>8,}{cells}")
    return lines


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
    return entries[np.isfinite(entries["residual"]).all(1)]


def booked(entries, k):
    """The books' entries -> what they say of target k over the measured steps, in nats; accounted: the share of the drop. None without one."""
    entries = measured(entries)
    if not len(entries):
        return None
    total = {key: float(entries[key][:, k].sum(dtype=np.float64)) for key in BOOK_ENTRIES}
    drop = total.pop("before") - total.pop("after")
    return dict(
        measured_steps=len(entries),
        drop=drop,
        accounted=ratio(drop - total["residual"], drop),
        **total,
    )


def accounted(name, total):
    if not total:
        return f"{name}: no step was measured yet"
    parts = ", ".join(
        f"{key} {ratio(total[key], total['drop']):.1%}" for key in ("data", "momentum", "decay")
    )
    known = f"{total['accounted']:.1%} of the drop of {total['drop']:.4f} nats in {total['measured_steps']} measured steps"
    return f"{name}: accounted for {known} ({parts})"


def audited(audits, k):
    """The audit's entries -> how close target k's values came to the truth; sum_error is of the truth's sum. None without one."""
    if not len(audits):
        return None
    a = {key: audits[key][:, k].astype(float) for key in AUDIT_ENTRIES}
    found = dict(
        steps=len(audits),
        rel_l2=float(np.median(a["rel_l2"])),
        sum_error=ratio(a["efficiency_gap"].sum(), a["utility"].sum()),
    )
    found |= {
        name: float(figure)
        for key in ("pearson", "spearman")
        for name, figure in ((key, a[key].mean()), (f"{key}_lowest", a[key].min()))
    }
    return found | dict(loo_pearson=float(a["loo_pearson"].mean()))


def compared(name, a):
    spread = ", ".join(
        f"{key.capitalize()} {a[key]:.4f} (lowest {a[key + '_lowest']:.4f})"
        for key in ("pearson", "spearman")
    )
    sums = f"relative L2 {a['rel_l2']:.1%} (median), sum {a['sum_error']:+.1%} of the truth"
    return f"{name}: audit of {a['steps']} steps: {spread}, {sums}, leave-one-out Pearson {a['loo_pearson']:.4f}"


def ratio(part, whole):
    return float(part / whole) if whole else math.nan


MOST_DOMAINS = 40  # rows of the table of a prepared data folder


def prepared(meta):
    """A data folder as the lines of a table, from its meta.json, and what became of the rest."""
    by_domain, total = meta["by_domain"], sum(meta["tokens"].values())
    tokens = {name: tokens_of(splits) for name, splits in by_domain.items()}
    largest = sorted(tokens, key=lambda name: -tokens[name])[:MOST_DOMAINS]
    told = [name for name in by_domain if name in set(largest)]  # in their own order
    width = min(28, max(map(len, ["domain", *map(visible, told)])))
    head = f"{'documents':>10} {'train chunks':>13} {'val chunks':>11} {'tokens':>14} {'share':>6}"
    lines = [f"{'domain':<{width}} {head}"]
    for name in told:
        train, val = by_domain[name]["train"], by_domain[name]["val"]
        documents = f"{train['documents'] + val['documents']:>10,}"
        chunks = f"{train['chunks']:>13,} {val['chunks']:>11,}"
        share = f"{tokens[name]:>14,} {tokens[name] / total:>6.1%}"
        lines.append(f"{fit(name, width)} {documents} {chunks} {share}")
    if len(told) < len(by_domain):
        rest = total - sum(tokens[name] for name in told)
        lines.append(f"and {len(by_domain) - len(told):,} smaller domains: {rest:,} tokens")
    dropped = f"{meta['dropped_tokens']:,} tokens, {meta['dropped_documents']:,} whole documents"
    lines.append(f"dropped at the ends of domains: {dropped}")
    return [*lines, *set_aside(meta)]


def tokens_of(splits):
    """{split: its counts} -> tokens of all of them."""
    return sum(counts["tokens"] for counts in splits.values())


def set_aside(meta):
    """What a data folder's source held that is not in it, or not as it was meant to be."""
    lines, settings = explain_left_out(meta["left_out"]), meta["config"]
    fallback = "under their file's name"
    if meta["no_domain"]:
        documents = counted(meta["no_domain"], "document")
        lines.append(f"{documents} without {settings['domain_key']}, {fallback}")
    if meta["long_domain"]:
        documents = counted(meta["long_domain"], "document")
        lines.append(f"{documents} with a domain of over {LONGEST} characters, {fallback}")
    if meta["skipped"]["too_long"]:
        records = counted(meta["skipped"]["too_long"], "record")
        limit = f"--max_document_mb={settings['max_document_mb']}"
        lines.append(f"{records} longer than {limit}: a larger one reads more, and needs memory")
    skipped = ", ".join(f"{n} {why}" for why, n in meta["skipped"].items() if n)
    return [*lines, f"{meta['documents']:,} documents; skipped: {skipped or 'nothing'}"]


def counted(n, what):
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def fit(text, cells, right=False):
    """Padded or cut to a width in the cells of a terminal, where a Chinese character takes two."""
    text = visible(text)
    ends = list(itertools.accumulate(map(cells_of, text))) or [0]
    if ends[-1] > cells:
        cut = bisect.bisect_right(ends, cells - 1)
        text, ends = text[:cut] + "\u2026", [ends[cut - 1] + 1 if cut else 1]
    blank = " " * (cells - ends[-1])
    return blank + text if right else text + blank


def cells_of(character):
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


# --- figures of values ------------------------------------------------------------


def spread(v):
    """Values (n,) -> their mean and its standard error, standard deviation, percentiles, and the share of negative ones."""
    p5, median, p95 = map(float, np.percentile(v, (5, 50, 95)))
    sd = float(v.std(ddof=1)) if len(v) > 1 else math.nan
    return dict(
        mean=float(v.mean()),
        standard_error=sd / len(v) ** 0.5,
        sd=sd,
        p5=p5,
        median=median,
        p95=p95,
        negative=float((v < 0).mean()),
    )
