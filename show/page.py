"""What a report shows of a run, as one dict for JSON: numbers binned, points sampled, texts cut, so
that a page holds it.

A value is in nats of the target's mean token loss, positive where the chunk lowered it; the page
writes it in 1e-6 nats. Arrays (K, D, ...) are of the targets and of the domains that are shown.
None stands where there is no number.
"""

import itertools
import json
import math

import numpy as np

from show import findings, hindsight, tables
from show.losses import common_steps
from system import store
from system.store import AUDIT_ENTRIES, BOOK_ENTRIES
from system.terminal import command

# at most:
DOMAINS = 60  # by name
CELLS = 1200  # targets times domains: with many targets fewer domains are named
BINS = 60  # columns of a chart
BARS = 16  # bars of a chart
CAUTIONS = 2  # sentences
EVALUATIONS = 40  # rows of a table of losses
LOSSES = 400  # points of a curve of losses
VALUE = 7  # digits of a value that is written out, as float32 has them
NUMBERS = 24_000  # of a chart, for all targets and domains together
POINTS = 4000
CHUNKS = 600
NORMS = 400  # points of a curve of |dL/dw|
DOCUMENTS = 6  # named of a chunk
PAGE = 1_800_000  # bytes of the whole content
TEXTS = 700_000  # bytes of all the texts together
TOKENS = 800_000  # bytes of all the coloured tokens

GOOD = 0.9  # an audited step's Pearson below this is a warning

RULES = {
    "sgd": "first order, as if plain SGD trained",
    "sgd2": "second order without a Hessian, as if plain SGD trained",
    "adamw_linear": "AdamW's step, linearised",
    "adamw": "AdamW's step, predicted before the batch is seen",
    "adamw2": "the step that AdamW really took",
    "hindsight": "the derivative of the loss at the end by each visit's weight",
}


def gather(run, documents, runs=(), lookback=None, check=None):
    """The content of a page, from a Run and its Documents, by three passes over the visits.

    runs: of show.losses, whose validation losses are shown; the first is the run's own. lookback:
    what hindsight.read() gives. check: what hindsight.check_beside() gives.
    """
    names, slots = domains(run)
    used = run.used
    values = run.values[used]
    D = len(names)
    sizes, shares = findings.over_steps(run.blocks(), run.info["batch"], slots, D)
    sums = Sums(run, slots, D, sizes)
    for visits in run.blocks():
        sums.add(visits)
    score = sums.mean_of_visits(sums.score)  # (n, K)
    smoothed = None
    if run.is_smoothed:
        smoothed = sums.mean_of_visits(sums.smoothed)
    shown = choose(score, values, slots[used], D, smoothed)
    content = {
        "run": describe(run, sums),
        "targets": [short(name) for name in run.names],
        "domains": names,
        "next": next_command(run, lookback),
        "trust": trust(run, sums.early),
        "hindsight": looked_back(run, lookback),
        "check": checked(run, lookback, check),
        "spread": spread(values, used, slots[used], shares),
        "time": over_time(run, sums),
        "losses": beside(runs),
        "histogram": histograms(values, slots[used], D),
        "points": points(run, slots),
        "chunks": chunks(run, documents, used[shown], score[shown], slots, sums),
        "smoothed": run.is_smoothed,
    }
    if run.is_smoothed:
        for row, of_chunk in zip(content["chunks"], smoothed[shown]):
            row["smoothed"] = num(of_chunk)
    content["findings"] = found(run, score, sizes, content["trust"], content["check"])
    room_for_texts = min(TEXTS, PAGE - TOKENS - len(encode(content)))
    add_texts(content["chunks"], run, max(0, room_for_texts) // len(shown))
    return content


# --- JSON -------------------------------------------------------------------------


def encode(content):
    """-> JSON, bytes, that cannot end a script element. A lone surrogate becomes JSON's escape."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    escapes = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
    return text.translate(escapes).encode("utf-8", "backslashreplace")


def num(x, digits=4):
    """An array as nested lists of numbers with so many digits; None where it is not finite."""
    x = np.asarray(x, float)
    numbers = np.empty(x.size, object)
    for i, number in enumerate(x.ravel().tolist()):
        numbers[i] = float(f"{number:.{digits}g}") if math.isfinite(number) else None
    return numbers.reshape(x.shape).tolist()


def short(name, limit=120):
    return name if len(name) <= limit else name[: limit - 1] + "\u2026"


def fit(text, limit):
    """A text cut so that its JSON takes no more than so many bytes."""
    size = len(encode(text))
    while size > limit + 2:
        text = text[: min(len(text) - 1, int(len(text) * limit / size))]
        size = len(encode(text))
    return text


# --- what is shown ------------------------------------------------------------------


def domains(run):
    """-> the names shown, the largest domain first, and slots, int16 (n_chunks,): the number of the
    shown name that each chunk is of. Where there are many, the smallest are put together. Chunks of
    domains that the run did not use have 0."""
    domain = np.asarray(run.data.train.domain)
    size = np.bincount(domain[run.used], minlength=len(run.domains))
    order = [d for d in np.argsort(-size, kind="stable") if size[d]]
    names = [short(run.domains[d]) for d in order]
    most = min(DOMAINS, max(8, CELLS // len(run.names)))
    slot_of = np.zeros(len(size), np.int16)
    slot_of[order] = np.minimum(np.arange(len(order)), most - 1)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} other domains"]
    return names, slot_of[domain]


def choose(score, values, slots, D, smoothed=None):
    """The chunks to show, as positions in values: the most extreme of every target first, by score,
    by value and by smoothed score, then those of every domain by score.

    score, values: (n, K); smoothed too, if there is one. slots: (n,), the shown domains.
    """
    K = values.shape[1]
    n_overall = max(5, min(50, 100 // K))
    n_of_domain = max(1, min(3, 150 // (K * D)))
    orders = [np.argsort(score[:, k], kind="stable") for k in range(K)]
    ends = []
    for k, order in enumerate(orders):
        by_target = [order, np.argsort(values[:, k], kind="stable")]
        if smoothed is not None:
            by_target.append(np.argsort(smoothed[:, k], kind="stable"))
        for ranked in by_target:
            ends.append(ranked[::-1][:n_overall])
            ends.append(ranked[:n_overall])
    positions = np.stack(ends, 1).ravel().tolist()  # in turns: a target's best, its worst
    for order in orders:
        ranked = slots[order]
        for d in range(D):
            members = order[ranked == d]
            positions += members[::-1][:n_of_domain].tolist()
            positions += members[:n_of_domain].tolist()
    most = max(100, 40 * CHUNKS // (K + 40))
    return np.array(list(dict.fromkeys(positions)))[:most]


class Columns:
    """A chart's columns over the steps, and for each what the domains' chunks brought there."""

    def __init__(self, edges, K, D):
        """edges: the steps that the columns begin with, and the step after the last."""
        self.edges = np.asarray(edges)
        self.sums = np.zeros((K, len(self.edges) - 1, D))

    def add(self, steps, slot, amounts):
        """Of whole steps (s,): the domains of their visits (n,), and what each brings the targets
        (n, K)."""
        n_columns, D = self.sums.shape[1:]
        column = np.searchsorted(self.edges, steps, "right") - 1
        column = np.repeat(column, len(slot) // len(steps))
        inside = (column >= 0) & (column < n_columns)
        cell = (column * D + slot)[inside]
        for sums, of_target in zip(self.sums, amounts.T):
            added = np.bincount(cell, of_target[inside], n_columns * D)
            sums += added.reshape(n_columns, D)

    def per_step(self):
        """The mean over a column's steps: (K, columns, D)."""
        return self.sums / np.diff(self.edges)[:, None]


class Sums:
    """What is summed up over a run's visits, a block at a time."""

    def __init__(self, run, slots, D, sizes):
        """slots: (n_chunks,), the shown domain of each chunk, of D. sizes: (K, steps), of each
        step the sum of its values without sign."""
        self.run = run
        self.slots = slots
        self.K = len(run.names)
        self.first = run.first_step
        self.steps = run.info["committed_step"] - self.first
        self.sizes = sizes
        self.step = self.first  # the next to be summed up
        bins = min(BINS, max(10, NUMBERS // (self.K * D)))
        self.cumulative = Columns(self.equal_columns(bins), self.K, D)
        self.bars = Columns(self.equal_columns(min(bins, BARS)), self.K, D)
        # the columns of the loss drop: at least four measured steps each, or the scatter of their
        # drops would not be known
        self.measured = run.books["step"][is_measured(run.books)]
        n_groups = max(1, min(bins // 2, len(self.measured) // 4))
        groups = np.array_split(self.measured, n_groups)
        self.groups = [group for group in groups if len(group)]
        starts = [group[0] for group in self.groups]
        self.drops = Columns([*starts, self.first + self.steps], self.K, D)
        # of each chunk
        n_chunks = len(slots)
        self.count = np.zeros(n_chunks, np.int32)
        self.score = np.zeros((self.K, n_chunks))  # values over the mean size of their step's
        self.smoothed = np.zeros((self.K, n_chunks))  # the same of smoothed scores, where there are
        self.early = set()
        self.early_size = np.zeros(self.K)

    def equal_columns(self, n):
        """Edges of at most n columns of about equal width."""
        edges = np.linspace(0, self.steps, min(self.steps, n) + 1).astype(int)
        return self.first + np.unique(edges)

    def add(self, visits):
        """visits: of whole steps."""
        batch = self.run.info["batch"]
        steps = np.arange(self.step, self.step + len(visits) // batch)
        self.step += len(steps)
        chunk = visits["chunk"]
        slot = self.slots[chunk]
        values = visits["value"].astype(float)
        sizes = np.maximum(self.sizes[:, steps - self.first], findings.TINY).T  # (steps, K)
        shares = values / np.repeat(sizes, batch, axis=0)
        self.cumulative.add(steps, slot, values)
        self.drops.add(steps, slot, values)
        self.bars.add(steps, slot, shares)
        n_visits = store.visits_of_steps(visits, batch)
        for score, share in zip(self.score, shares.T):
            np.add.at(score, chunk, np.repeat(n_visits, batch) * share)
        if self.run.is_smoothed:
            smoothed = visits["smoothed"].astype(float)
            size = np.abs(smoothed).reshape(-1, batch, self.K).sum(1) / n_visits[:, None]
            smoothed /= np.repeat(np.maximum(size, findings.TINY), batch, axis=0)
            for score, of_target in zip(self.smoothed, smoothed.T):
                np.add.at(score, chunk, of_target)
        np.add.at(self.count, store.filled(visits)["chunk"], 1)
        early = visits["early"] > 0
        self.early.update(np.unique(np.repeat(steps, batch)[early]).tolist())
        self.early_size += abs(values[early]).sum(0)

    def mean_of_visits(self, score):
        """score (K, n_chunks), summed over the visits -> of the chunks used the mean (n, K)."""
        used = self.run.used
        return (score[:, used] / np.maximum(self.count[used], 1)).T


def is_measured(books):
    """bool (n,): the records of books.npy whose step's drop was measured."""
    return np.isfinite([books[name] for name in BOOK_ENTRIES]).all((0, 2))


# --- the parts of the content ---------------------------------------------------------


def describe(run, sums):
    """The run itself: its settings, its data, how far it is."""
    cfg = run.cfg
    meta = run.data.meta
    vocabulary = -(-meta["vocab_size"] // 64) * 64
    width = cfg["n_embd"]
    embeddings = 1 if cfg["tie_weights"] else 2
    return {
        "n_layer": cfg["n_layer"],
        "n_head": cfg["n_head"],
        "n_embd": cfg["n_embd"],
        "max_iters": cfg["max_iters"],
        "optimizer": cfg["optimizer"],
        "learning_rate": cfg["learning_rate"],
        "warmup_iters": cfg["warmup_iters"],
        "grad_clip": cfg["grad_clip"],
        "target_batch": cfg["target_batch"],
        "book_interval": cfg["book_interval"],
        "audit_interval": cfg["audit_interval"],
        "name": short(run.path.resolve().name),
        "data": short(run.data.path.name),
        "tokenizer": meta["tokenizer"],
        "size": vocabulary * width * embeddings + 12 * cfg["n_layer"] * width**2,
        "width": run.width,
        "rule": run.info["rule"],
        "rule_is": RULES.get(run.info["rule"], ""),
        "batch": run.info["batch"],
        "visits": len(run.visits),
        "step": run.info["committed_step"],
        "first": sums.first,
        "used": len(run.used),
        "chunks": len(run.values),
        "hash": run.data.hash[:12],
        "approximate": run.info.get("approximate"),
        "early": len(sums.early),
        "early_share": num(sums.early_size / np.maximum(sums.sizes.sum(1), findings.TINY)),
    }


def trust(run, early):
    """For each target: what the drop of its loss over the measured steps was made of, and how close
    the audited steps came to the truth. early: the steps marked early."""
    books = run.books[is_measured(run.books)]
    late = ~np.isin(books["step"], list(early))
    rows = []
    for k in range(len(run.names)):
        entries = {name: books[name][:, k].astype(float) for name in BOOK_ENTRIES}
        audit = {name: run.audit[name][:, k] for name in AUDIT_ENTRIES}
        row = shares_of_drop(entries, late)
        row["audit"] = compare(audit) if len(run.audit) else None
        row["passes"] = tables.count_passes(run.books)
        drop = (entries["before"] - entries["after"]).sum()
        row["bad_books"] = bool(len(books)) and not tables.closes(drop, entries["residual"].sum())
        row["bad_audit"] = bool(len(run.audit)) and not audit["pearson"].min() >= GOOD
        rows.append(row)
    return rows


def shares_of_drop(books, late):
    """The shares of a target's drop. books: {entry: (n,)}, of the measured steps. late: bool (n,),
    the steps that are not marked early."""
    drop = books["before"] - books["after"]
    total = drop.sum()
    parts = dict.fromkeys(("data", "momentum", "decay", "residual"))
    rest = None  # the residual's share where the early steps are left out
    if total > 0:
        parts = {name: num(books[name].sum() / total) for name in parts}
        late_drop = drop[late].sum()
        if late_drop > 0:
            rest = num(books["residual"][late].sum() / late_drop)
    return {
        "steps": len(drop),
        "drop": num(total),
        "parts": parts,
        "rest": rest,
        "early": int((~late).sum()),
    }


def compare(audit):
    """audit: {entry: (n,)} of the audited steps. A correlation: its mean and its lowest."""
    return {
        "steps": len(audit["pearson"]),
        "rel_l2": num(np.median(audit["rel_l2"])),
        "loo": num(audit["loo_pearson"].mean()),
        "pearson": num([audit["pearson"].mean(), audit["pearson"].min()]),
        "spearman": num([audit["spearman"].mean(), audit["spearman"].min()]),
    }


def next_command(run, lookback):
    if lookback and not lookback["check"]:
        return lookback["to_check"]
    return command("python", "curate.py", str(run.path))


def looked_back(run, lookback):
    """What the page shows of hindsight alone, None of other values. lookback: what hindsight.read()
    gives. Arrays (K, points): |dL/dw| after some steps."""
    if lookback is None:
        return None
    rows = lookback["adjoint"]
    places = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), NORMS)).astype(int))
    shown = [rows[i] for i in places]
    losses = [lookback["loss_at_end"][name] for name in run.names]
    return {
        "horizon": run.horizon,
        "when": findings.when(run.horizon),
        "meaning": hindsight.meaning(run.horizon),
        "why_early": hindsight.WHY_EARLY,
        "loss_at_end": num(losses, 6),
        "first_late": lookback["first_late_step"],
        "steps": [row["step"] for row in shown],
        "norms": num([[row["norm"][name] for row in shown] for name in run.names]),
    }


def checked(run, lookback, check):
    """How well values predict training again, for the page: for each target a sentence and the
    rows of a table, or the command that finds it. lookback, check: see gather()."""
    first, second = hindsight.OF_STEP, hindsight.OWN
    make = hindsight.to_look_back(run)
    if lookback is not None:
        first, second = second, first
        make, check = lookback["to_check"], lookback["check"]
    if check is None:
        return {"command": make, "words": [None] * len(run.names), "rows": [[]] * len(run.names)}
    words, rows = [], []
    for name in run.names:
        words.append(hindsight.predicted(check, name, first, second))
        rows.append([check_row(row) for row in check["targets"].get(name, ())])
    return {
        "command": make,
        "words": words,
        "rows": rows,
        "first_step": check["first_step"],
        "end": check["end"],
    }


def check_row(row):
    figures = {key: num(row[key]) for key in hindsight.FIGURES}
    return {"score": short(row["score"]), **figures}


def found(run, score, sizes, trusted, predicted):
    """For each target what its values say, in words: found, stood_out, cautions and trust.

    score: (n, K), of the chunks used. sizes: (K, steps). trusted: what trust() gives. predicted:
    what checked() gives.
    """
    used = run.used
    domain = np.asarray(run.data.train.domain)[used]
    answers = []
    for k, name in enumerate(run.names):
        values = run.values[used, k]
        rows = findings.by_domain(values, domain)
        target = findings.short(name)  # it stands above the sentences already
        sentence = findings.found(name, rows, run.domains, run.horizon)
        cautions = findings.cautions(
            name, values, used, run.domain_of, sizes[k], first_step=run.first_step
        )
        answers.append(
            {
                "found": sentence.removeprefix(f"for {target}{findings.when(run.horizon)}: "),
                "stood_out": stood_out(run, values, score[:, k]),
                "cautions": first_cautions(cautions, f"caution, {target}: "),
                "trust": trust_in_words(run, trusted[k], predicted["words"][k]),
            }
        )
    return answers


def first_cautions(lines, prefix):
    """Of findings.cautions()' lines the few that a first screen has room for, without their prefix.
    A step comes before the chunks that it may have brought."""
    sentences = [line.removeprefix(prefix) for line in lines]
    sentences.sort(key=lambda sentence: not sentence.startswith("step "))  # else they keep order
    more = len(sentences) - CAUTIONS
    if more > 0:
        what = "1 more chunk or step holds" if more == 1 else f"{more} more chunks or steps hold"
        sentences[CAUTIONS:] = [f"{what} over a tenth each"]
    return sentences


def stood_out(run, values, score):
    """A sentence on the share of negative chunks, and on the best and the worst chunk.

    values, score: (n,), of the chunks used."""
    chunks = "1 chunk used has" if len(values) == 1 else f"{len(values):,} chunks used have"
    negative = f"{(values < 0).mean():.0%} of the {chunks} a negative value"
    best, worst = (int(run.used[i]) for i in (score.argmax(), score.argmin()))
    best = f"chunk {best} ({findings.short(run.domain_of(best))})"
    worst = f"chunk {worst} ({findings.short(run.domain_of(worst))})"
    return f"{negative}. Relative to its step, {best} helped most, {worst} least."


def trust_in_words(run, row, predicted):
    """How far to trust a target's values. row: of trust(). predicted: the sentence on how well
    values predict training again, or None."""
    if run.horizon is None:
        return in_words(row)
    if predicted is None:
        return "Trust: it was not tried how well these values predict a training without visits."
    return f"Trust: {predicted}."


def in_words(row):
    """How far to trust a target's values, in a sentence. row: of trust()."""
    steps = row["steps"]
    measured = "1 measured step" if steps == 1 else f"{steps} measured steps"
    residual = row["parts"]["residual"]
    if not steps:
        books = "no step was measured, so it is not known how well the values add up"
    elif residual is None:
        books = f"the loss did not fall over {measured}, so there is no drop to add up to"
    else:
        drop = f"the loss drop of {row['drop']:.4f} nats in {measured}"
        books = f"values, momentum and weight decay make {1 - residual:.0%} of {drop}"
    audit = "no step was compared with exact Shapley values"
    if row["audit"]:
        steps = row["audit"]["steps"]
        audited = "1 audited step" if steps == 1 else f"{steps} audited steps"
        pearson = [decimals(x) for x in row["audit"]["pearson"]]
        audit = f"in {audited} they correlate with exact Shapley values by {pearson[0]}"
        audit += f" (lowest {pearson[1]})"
    order = ""
    if row["bad_books"] or row["bad_audit"]:
        order = ". Read them as a rough order, not as amounts"
    passes = ""
    if row["passes"]:
        counts = row["passes"]
        passes = f"; {counts['in_two']:,} of {counts['steps']:,} steps were valued in two passes, "
        passes += f"for {counts['failed']:,} of {counts['checks']:,} checks found that one is not"
        passes += " enough"
    return f"Trust: {books}; {audit}{passes}{order}."


def decimals(x):
    """A correlation as a text."""
    return "-" if x is None else f"{x:.4f}"


def spread(values, used, slots, shares):
    """For each target and domain, in lists (K, D): chunks; their median and its error, five
    quantiles, mean and sum (nats); the share below 0; the share of the steps' values; and where one
    chunk holds much of the sum, its number and its part.

    values: (n, K). used, slots: (n,), the chunks' numbers and shown domains. shares: (K, D).
    """
    columns = {}
    for k, v in enumerate(values.T.astype(float)):
        rows = sorted(findings.by_domain(v, slots), key=lambda row: row.domain)
        cells = [domain_cells(row, v[slots == row.domain], used) for row in rows]
        for d, cell in enumerate(cells):
            cell["share"] = num(shares[k, d])
        for name in cells[0]:
            columns.setdefault(name, []).append([cell[name] for cell in cells])
    return columns


def domain_cells(row, values, used):
    """What the page has of a domain. row: its findings.DomainValues. values: of its chunks."""
    p5, p95 = np.percentile(values, (5, 95))
    return {
        "chunks": row.chunks,
        "few": row.is_few,
        "median": num(row.median, VALUE),
        "error": num(row.error, VALUE),
        "quantiles": num([p5, row.p25, row.median, row.p75, p95]),
        "negative": num(row.negative),
        "mean": num(row.mean, VALUE),
        "sum": num(row.sum),
        "heavy": int(used[row.largest]) if row.is_lopsided else None,
        "heavy_share": num(row.largest_share),
    }


def standard_error(x, unknown):
    """Of the mean of x (n,); unknown, where there are not two."""
    return x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else unknown


def over_time(run, sums):
    """The values over the steps, for three charts: {name: {edges, values (K, D, columns)}}. edges:
    the steps that the columns begin with, and the last step.

    share: the share of a step's values, as a mean over the column's steps. drop: a domain's values
    of a step over the measured drop of a step, both averaged over the column's steps; None where
    the drop is not above twice its standard error. sum: summed up from the first step, in nats.
    """
    index = np.searchsorted(run.books["step"], sums.measured)
    drops = (run.books["before"] - run.books["after"])[index].astype(float).T  # (K, measured)
    bounds = np.cumsum([0, *map(len, sums.groups)])
    of_drop = []
    for k, per_step in enumerate(sums.drops.per_step()):
        groups = [drops[k, start:end] for start, end in itertools.pairwise(bounds)]
        mean = np.array([group.mean() for group in groups])
        error = np.array([standard_error(group, np.inf) for group in groups])
        is_clear = mean > 2 * error
        share = per_step.T / np.where(is_clear, mean, 1)
        of_drop.append(np.where(is_clear, share, np.nan))
    share = sums.bars.per_step()
    size = np.add.reduceat(sums.sizes, sums.bars.edges[:-1] - sums.first, 1)  # (K, bars)
    share[size == 0] = np.nan
    summed = sums.cumulative.sums.cumsum(1)
    return {
        "share": chart(sums.bars, share.transpose(0, 2, 1)),
        "drop": chart(sums.drops, of_drop),
        "sum": chart(sums.cumulative, summed.transpose(0, 2, 1)),
    }


def chart(columns, values):
    return {"edges": columns.edges.tolist(), "values": num(values)}


def beside(runs):
    """The validation losses of some runs, of show.losses, or None where there are none: the runs'
    names, their curves, and at common steps tables of numbers in nats, a column a run."""
    if not runs:
        return None
    steps = common_steps(runs)
    places = np.linspace(0, len(steps) - 1, min(len(steps), EVALUATIONS)).astype(int)
    shown = steps[places].tolist()
    last = shown[-1]
    curves = []
    for run in runs:
        few = np.linspace(0, len(run.steps) - 1, min(len(run.steps), LOSSES)).astype(int)
        curves.append({"steps": run.steps[few].tolist(), "val": num(run.val[few], 6)})
    at_steps = []
    for step in shown:
        at_steps.append([num(run.at(step), 6) for run in runs])
    names, rows = [], []  # targets that were files, then domains
    for name in runs[0].by_target:
        names.append(f"target {short(name)}")
        rows.append([num(run.at(last, target=name), 6) for run in runs])
    for name in list(runs[0].by_domain)[:DOMAINS]:
        names.append(short(name))
        rows.append([num(run.at(last, name), 6) for run in runs])
    return {
        "runs": [short(run.name) for run in runs],
        "curves": curves,
        "steps": shown,
        "at": at_steps,
        "domains": names,
        "by_domain": rows,
    }


def scale(values):
    """Values (n,) -> s: an axis of asinh(value / s) is linear for the small ones and logarithmic on
    both sides."""
    small = np.quantile(np.abs(values), 0.25)
    return 10.0 ** math.floor(math.log10(small)) if small > 0 else 1e-9


def histograms(values, slots, D):
    """For each target: s, the bins' width on asinh(value / s), where they start (0 is an edge), and
    counts (D, bins)."""
    columns = min(44, max(12, NUMBERS // (values.shape[1] * D)))
    charts = []
    for v in values.T.astype(float):
        s = scale(v)
        t = np.arcsinh(v / s)
        width = max(np.ptp(t), 1e-6) / columns
        column = np.floor(t / width).astype(int)
        first = column.min()
        n = np.ptp(column) + 1
        counts = np.bincount(slots * n + column - first, minlength=D * n).reshape(D, n)
        chart = {"s": s, "width": float(width), "first": int(first), "counts": counts.tolist()}
        charts.append(chart)
    return charts


def points(run, slots):
    """A sample of the visits, evenly over the run: domain (n,), training loss (n,) and values
    (K, n)."""
    n = min(len(run.visits), POINTS, 5 * POINTS // len(run.names))
    visits = store.filled(run.visits[np.linspace(0, len(run.visits) - 1, n).astype(int)])
    return {
        "domain": slots[visits["chunk"]].tolist(),
        "loss": num(visits["loss"]),
        "values": num(visits["value"].T, 3),
    }


# --- chunks -------------------------------------------------------------------------


def chunks(run, documents, shown, score, slots, sums):
    """A dict for each chunk shown (n,): its score (n, K), its values, its documents, its visits."""
    rows = [None] * len(shown)
    visits = run.visits_of(shown)
    visits = visits[np.argsort(visits["chunk"], kind="stable")]  # of each chunk the first one first
    begins = np.searchsorted(visits["chunk"], shown)
    for i in np.argsort(shown):  # in the documents' order
        chunk = int(shown[i])
        inside = documents.of_chunk(chunk)
        named = [[doc["doc"], fit(doc["source"], 100), doc["record"]] for doc in inside[:DOCUMENTS]]
        own = visits[begins[i] : begins[i] + sums.count[chunk]]
        first_visit = int(own["step"][0])
        rows[i] = {
            "chunk": chunk,
            "domain": int(slots[chunk]),
            "score": num(score[i]),
            "values": num(run.values[chunk], VALUE),
            "documents": named,
            "more": len(inside) - len(named),
            "visits": int(sums.count[chunk]),
            "step": first_visit,
            "early": first_visit in sums.early,
            "loss": num(own["loss"].mean(dtype=float)),
        }
    return rows


def add_texts(rows, run, limit):
    """Gives each chunk its text, in so many bytes; `cut` where that is not all of it."""
    for row in rows:
        text = run.text(row["chunk"])
        row["text"] = fit(text, limit)
        row["cut"] = len(row["text"]) < len(text)


def room(run):
    """How many chunks' coloured tokens a page has room for."""
    return max(1, TOKENS // (run.width * (16 + 5 * len(run.names))))


def add_tokens(content, run, step, values):
    """Gives the first chunks their pieces and, for each target, a value for each piece: in
    thousandths of the chunk's largest, which stands beside them in nats.

    values: (n, width, K), of the tokens read, computed with the weights after `step` steps.
    """
    content["token_step"] = step
    for row, of_chunk in zip(content["chunks"], np.nan_to_num(np.asarray(values, float))):
        largest = np.abs(of_chunk).max(0)  # (K,)
        parts = np.rint(1000 * of_chunk / np.where(largest > 0, largest, 1)).astype(int)
        row["tokens"] = {
            "pieces": run.pieces(row["chunk"])[: len(of_chunk)],
            "largest": num(largest),
            "sum": num(of_chunk.sum(0), VALUE),
            "parts": parts.T.tolist(),
        }
