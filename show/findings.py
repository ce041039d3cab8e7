"""What a run's values say: figures that no single chunk or step can turn round, and sentences.

A step with gradients far above their history can give its chunks more value than all other steps
together. A mean or a sum then speaks of that step alone. So domains are compared by medians over
their chunks and by shares of the steps' values, and a chunk or a step that holds much of the whole
is named.

Values are in nats, positive where a chunk lowered the target's loss. Wherever people read them,
the value of a chunk, a document or a token is written in 1e-6 nats; losses, their drops and sums
over many chunks are in nats.
"""

import math
from dataclasses import dataclass
from itertools import chain

import numpy as np

from system.terminal import shorten, visible

UNIT = "1e-6 nats"
FEW = 5  # a domain with fewer chunks has a median that says little
HEAVY = 0.1  # of the size of all values: what holds more is named
ALONE = 5  # ... if it is so many times the average, for in a short run each step holds much
TINY = np.finfo("f4").tiny


def micro(x):
    """A value in nats -> its text in 1e-6 nats; "-" for NaN."""
    x = 1e6 * float(x)
    if math.isnan(x):
        return "-"
    if x == 0 or abs(x) >= 1:
        return f"{x:+,.1f}"
    return f"{x:+.2g}" if abs(x) >= 1e-4 else f"{x:+.1e}"


def worth(x):
    """micro() with its unit, for a sentence."""
    return f"{micro(x)} x {UNIT}"


def when(horizon):
    """In words: which loss values speak of, behind "it lowered the target's loss". horizon: that of
    a show.run.Run."""
    if horizon is None:
        return ""
    if horizon:
        return f" up to {horizon:,} {'step' if horizon == 1 else 'steps'} later"
    return " at the run's end"


# --- domains ------------------------------------------------------------------------


@dataclass
class DomainValues:
    """The values of a domain's chunks for one target, in nats."""

    domain: int
    chunks: int
    median: float
    error: float  # of the median; NaN where there are fewer than FEW chunks
    p25: float
    p75: float
    negative: float  # share of the chunks
    mean: float
    sum: float
    largest: int  # the position of the chunk with the largest size
    largest_share: float  # its part of the size of the domain's values

    @property
    def is_few(self):
        return self.chunks < FEW

    @property
    def is_lopsided(self):
        """Whether its mean and its sum speak of one chunk."""
        return is_lopsided(self.chunks, self.largest_share)


def is_lopsided(chunks, largest_share):
    """Whether one of so many chunks holds too much of the size of their values for a mean."""
    return largest_share > max(HEAVY, ALONE / chunks)


def by_domain(values, domain):
    """values (n,), nats, and domains (n,), int, of the chunks used -> [DomainValues], the largest
    median first; those of few chunks come last."""
    order = np.argsort(domain, kind="stable")
    present, starts = np.unique(domain[order], return_index=True)
    rows = []
    for d, members in zip(present.tolist(), np.split(order, starts[1:])):
        rows.append(of_domain(d, np.asarray(values, float)[members], members))
    return sorted(rows, key=lambda row: (row.is_few, -row.median))


def of_domain(d, values, members):
    """values: (n,), of the chunks at the positions members."""
    p25, median, p75 = np.percentile(values, (25, 50, 75))
    # of a normal distribution: sd = (p75 - p25) / 1.349, error of the median = 1.2533 sd / sqrt(n)
    error = 0.929 * (p75 - p25) / len(values) ** 0.5 if len(values) >= FEW else math.nan
    sizes = np.abs(values)
    largest = int(sizes.argmax())
    return DomainValues(
        domain=d,
        chunks=len(values),
        median=float(median),
        error=float(error),
        p25=float(p25),
        p75=float(p75),
        negative=float((values < 0).mean()),
        mean=float(values.mean()),
        sum=float(values.sum()),
        largest=int(members[largest]),
        largest_share=float(sizes[largest] / max(sizes.sum(), TINY)),
    )


# --- steps --------------------------------------------------------------------------


def over_steps(blocks, batch, domain, n_domains, column="value"):
    """One pass over a run's visits. Returns

    sizes (K, steps): the sum of the sizes (without sign) of a step's values, in nats;
    shares (K, n_domains): of each domain, the mean over the steps of the sum of its values over
    the step's size. Every step counts the same, so no step can turn them round.

    blocks: of records of ledger.npy, whole steps each. domain: int (n_chunks,). column: which of
    the records' is the value.
    """
    sizes, totals = [], []
    for visits in blocks:
        values = visits[column].astype(float)  # (n, K)
        steps = np.abs(values).reshape(-1, batch, values.shape[1]).sum(1)  # (n / batch, K)
        parts = values / np.maximum(np.repeat(steps, batch, axis=0), TINY)
        of_visit = domain[visits["chunk"]]
        totals.append([np.bincount(of_visit, part, n_domains) for part in parts.T])
        sizes.append(steps)
    sizes = np.concatenate(sizes).T
    return sizes, np.sum(totals, axis=0) / sizes.shape[1]


def heavy(sizes):
    """Which of the sizes (n,) hold more than HEAVY of their sum: [(position, share)], the largest
    first."""
    shares = np.asarray(sizes, float) / max(float(np.sum(sizes)), TINY)
    found = np.flatnonzero(shares > max(HEAVY, ALONE / max(1, len(shares))))
    found = found[np.argsort(-shares[found])]
    return [(int(i), float(shares[i])) for i in found]


# --- sentences ----------------------------------------------------------------------


def cautions(target, values, chunks, domain_of, step_sizes, first_step=0):
    """A sentence for each step and each chunk that holds much of the size of a target's values.

    values (n,): of the chunks used, whose numbers are chunks (n,). domain_of: a chunk's number ->
    its domain's name. step_sizes: (steps,), from over_steps().
    """
    lines = []
    for position, share in heavy(step_sizes):
        lines.append(alone(target, f"step {first_step + position}", share))
    for position, share in heavy(np.abs(values)):
        chunk = int(chunks[position])
        what = f"chunk {chunk} ({short(domain_of(chunk))})"
        lines.append(alone(target, what, share))
    return lines


def alone(target, what, share):
    holds = f"{what} alone holds {share:.0%} of the size of all values"
    return f"caution, {short(target)}: {holds}; means and sums speak of it, medians do not"


def found(target, rows, names, horizon=None):
    """The one finding about a target, in a sentence. rows: what by_domain() gives. names: of the
    domains. horizon: see when()."""
    target = short(target) + when(horizon)
    enough = [row for row in rows if not row.is_few]
    if not enough:
        return f"for {target}: no domain has {FEW} chunks yet, too few to compare"
    best = enough[0]
    first_name = short(names[best.domain])
    if len(enough) == 1:
        what = f"the median chunk of {first_name} was worth {worth(best.median)}"
        return f"for {target}: {what}, and {best.negative:.0%} of its chunks raised the loss"
    worst = enough[-1]
    first = f"{first_name} {verdict(best, 'most', 'first')} (median chunk {worth(best.median)})"
    if len(enough) > 2 and not is_clear(best, enough[1]):
        first += f", not clearly before {short(names[enough[1].domain])}"
    last = f"{short(names[worst.domain])} {verdict(worst, 'least', 'last')} ({micro(worst.median)})"
    if not is_clear(best, worst):
        last += "; the two do not differ clearly"
    return f"for {target}: {first}; {last}"


def verdict(row, degree, place):
    """In words: whether a domain, the first or the last one, helped or hurt."""
    if row.median > 2 * row.error:
        return f"helped {degree}"
    if row.median < -2 * row.error:
        return "hurt most" if degree == "least" else "hurt least"
    return f"is {place}, not clearly off 0"


def is_clear(first, second):
    """Whether two domains' medians differ by more than twice the error of the difference."""
    return first.median - second.median > 2 * math.hypot(first.error, second.error)


def short(name):
    """A name for a sentence."""
    return shorten(visible(name), 60)


# --- all of it for a run ------------------------------------------------------------


@dataclass
class Found:
    """What a run's values say of a target."""

    target: str
    everything: dict  # the figures() of all chunks used
    domains: list  # of dicts {"domain": name, **figures()}, in the order of by_domain()
    cautions: list  # of sentences
    finding: str
    horizon: int | None = None  # see when()


def of_opened(run, column="value"):
    """What the values of a show.run.Run say, or its smoothed scores: [Found], one for each
    target."""
    used = np.zeros(len(run.values), bool)
    used[run.used] = True
    batch = run.info["batch"]
    total = run.sums(column)
    return of_run(total, used, run.counted(), batch, run.data, run.names, run.horizon, column)


def of_run(total, used, blocks, batch, data, targets, horizon=None, column="value"):
    """A run's values -> [Found], one for each target.

    total: the chunks' values (n_chunks, K), nats. used: bool (n_chunks,), at least one. blocks: of
    records of ledger.npy, whole steps each, batch of them a step. data: data.Dataset. targets:
    their names. horizon: see when(). column: which of the records' the total is of.
    """
    blocks = iter(blocks)
    first = next(blocks)
    first_step = int(first["step"][0])
    of_chunk = data.train.domain
    blocks = chain([first], blocks)
    sizes, shares = over_steps(blocks, batch, of_chunk, len(data.domains), column)
    chunks = np.flatnonzero(used)

    def domain_of(chunk):
        return data.domains[of_chunk[chunk]]

    found_of = []
    for k, target in enumerate(targets):
        values = np.asarray(total[chunks, k], float)
        rows = by_domain(values, of_chunk[chunks])
        everything = of_domain(-1, values, np.arange(len(values)))
        domains = []
        for row in rows:
            name = {"domain": data.domains[row.domain]}
            domains.append(name | figures(row, shares[k, row.domain], chunks))
        found_of.append(
            Found(
                target=target,
                everything=figures(everything, shares[k].sum(), chunks),
                domains=domains,
                cautions=cautions(target, values, chunks, domain_of, sizes[k], first_step),
                finding=found(target, rows, data.domains, horizon),
                horizon=horizon,
            )
        )
    return found_of


def figures(row, share, chunks):
    """A row of by_domain() as a dict.

    share: of the steps' values, from over_steps(). chunks: the numbers of the chunks used.
    """
    return {
        "chunks": row.chunks,
        "median": row.median,
        "error": row.error,
        "p25": row.p25,
        "p75": row.p75,
        "negative": row.negative,
        "share": float(share),
        "mean": row.mean,
        "sum": row.sum,
        "largest_chunk": int(chunks[row.largest]),
        "largest_share": row.largest_share,
    }
