"""What a report shows of a run, as one dict for JSON: numbers binned, points sampled, texts cut, so
that a page holds it.

A value is in nats of the target's mean token loss, positive where the chunk lowered it. A value per
token is over the tokens trained on: visits * width. Arrays (K, D, ...) are of the targets and of
the domains that are shown. None stands where there is no number.
"""

import itertools
import json
import math

import numpy as np

from system.store import AUDIT_ENTRIES, BOOK_ENTRIES

# at most:
DOMAINS = 60  # by name
CELLS = 1200  # targets times domains: with many targets fewer domains are named
BINS = 60  # columns of a chart
NUMBERS = 24_000  # of a chart, for all targets and domains together
POINTS = 4000
CHUNKS = 600
DOCUMENTS = 6  # named of a chunk
PAGE = 1_800_000  # bytes of the whole content
TEXTS = 700_000  # bytes of all the texts together
TOKENS = 800_000  # bytes of all the coloured tokens

BAD = 0.1  # a residual above this share of the drop is a warning
GOOD = 0.9  # an audited step's Pearson below this is a warning
LONE = 0.2  # a step with more than this share of the size of all values is left out of the sums

RULES = {
    "sgd": "first order, as if plain SGD trained",
    "sgd2": "second order without a Hessian, as if plain SGD trained",
    "adamw_linear": "AdamW's step, linearised",
    "adamw": "AdamW's step, predicted before the batch is seen",
    "adamw2": "the step that AdamW really took",
}


def gather(run, documents):
    """The content of a page, from a Run and its Documents, by one pass over the visits: dict(run,
    targets, domains, lone, trust, spread, time, histogram, points, chunks)."""
    names, slots = domains(run)
    used = run.used
    values = run.values[used]
    K = len(run.names)
    D = len(names)
    shown = choose(values, slots[used], K, D)
    shown = shown[: max(100, 40 * CHUNKS // (K + 40))]
    sums = Sums(run, slots, D, used[shown])
    for visits in run.blocks():
        sums.add(visits)
    lone = sums.leave_out()
    tokens = sums.count[used] * run.width
    content = {
        "run": describe(run, sums),
        "targets": [short(name) for name in run.names],
        "domains": names,
        "lone": lone,
        "trust": trust(run, sums.early),
        "spread": spread(values, tokens, slots[used], sums.left_out[:, used]),
        "time": over_time(run, sums),
        "histogram": histograms(values, slots[used], D),
        "points": points(run, slots),
        "chunks": chunks(run, documents, used[shown], values[shown], slots, sums),
    }
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
    shown name that each chunk is of. Where there are many, the smallest are put together."""
    domain = np.asarray(run.data.train.domain)
    size = np.bincount(domain[run.used], minlength=len(run.domains))
    order = [d for d in np.argsort(-size, kind="stable") if size[d]]
    names = [short(run.domains[d]) for d in order]
    most = min(DOMAINS, max(8, CELLS // len(run.names)))
    slot_of = np.full(len(size), -1, np.int16)
    slot_of[order] = np.minimum(np.arange(len(order)), most - 1)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} other domains"]
    return names, slot_of[domain]


def choose(values, slots, K, D):
    """The chunks to show, as positions in values: the most extreme of every target first, then
    those of every domain.

    values: (n, K). slots: (n,), the shown domains.
    """
    n_overall = max(5, min(50, 100 // K))
    n_of_domain = max(1, min(3, 150 // (K * D)))
    orders = [np.argsort(values[:, k], kind="stable") for k in range(K)]
    ends = []
    for order in orders:
        ends.append(order[::-1][:n_overall])
        ends.append(order[:n_overall])
    positions = np.stack(ends, 1).ravel().tolist()  # in turns: a target's best, its worst
    for order in orders:
        ranked = slots[order]
        for d in range(D):
            members = order[ranked == d]
            positions += members[::-1][:n_of_domain].tolist()
            positions += members[:n_of_domain].tolist()
    return np.array(list(dict.fromkeys(positions)))


class Sums:
    """What is summed up over a run's visits, a block at a time."""

    def __init__(self, run, slots, D, shown):
        """slots: (n_chunks,), the shown domain of each chunk, of D. shown: numbers of chunks."""
        self.run = run
        self.slots = slots
        self.D = D
        self.K = len(run.names)
        self.first = run.first_step
        self.steps = run.info["committed_step"] - self.first
        self.row = 0  # the next visit to be summed up
        bins = min(BINS, max(10, NUMBERS // (self.K * D)))
        # the columns of the cumulative chart
        columns = np.linspace(0, self.steps, min(self.steps, bins) + 1).astype(int)
        self.edges = self.first + np.unique(columns)
        self.sums = np.zeros((self.K, len(self.edges) - 1, D))
        # the columns of the normalised chart: at least four measured steps each, or the scatter of
        # their drops would not be known
        self.measured = run.books["step"][is_measured(run.books)]
        n_groups = max(1, min(bins // 2, len(self.measured) // 4))
        groups = np.array_split(self.measured, n_groups)
        self.groups = [group for group in groups if len(group)]
        starts = [group[0] for group in self.groups]
        self.group_edges = np.array([*starts, self.first + self.steps])
        self.group_sums = np.zeros((self.K, len(self.groups), D))
        # of each chunk
        n_chunks = len(slots)
        self.count = np.zeros(n_chunks, np.int32)
        self.left_out = np.zeros((self.K, n_chunks), bool)  # met in a step that is left out
        # of those shown
        self.position = np.full(n_chunks, -1, np.int32)
        self.position[shown] = np.arange(len(shown))
        self.first_visit = np.full(len(shown), np.iinfo("i4").max)
        self.loss = np.zeros(len(shown))
        # of each step the size of its values, without sign
        self.sizes = np.zeros((self.K, self.steps))
        self.early = set()
        self.early_size = np.zeros(self.K)

    def add(self, visits):
        rows = np.arange(self.row, self.row + len(visits))
        step = self.first + rows // self.run.info["batch"]
        self.row += len(visits)
        chunk = visits["chunk"]
        values = visits["value"].astype(float)
        early = visits["early"] > 0
        np.add.at(self.count, chunk, 1)
        for k in range(self.K):
            self.add_to_columns(k, step, chunk, values[:, k])
            start = step[0] - self.first
            size = np.bincount(step - step[0], abs(values[:, k]))
            self.sizes[k, start : start + len(size)] += size
        self.early.update(np.unique(step[early]).tolist())
        self.early_size += abs(values[early]).sum(0)
        position = self.position[chunk]
        is_shown = position >= 0
        np.minimum.at(self.first_visit, position[is_shown], step[is_shown])
        np.add.at(self.loss, position[is_shown], visits["loss"][is_shown])

    def add_to_columns(self, k, step, chunk, values):
        charts = ((self.sums[k], self.edges), (self.group_sums[k], self.group_edges))
        for sums, edges in charts:
            column = np.searchsorted(edges, step, "right") - 1
            inside = (column >= 0) & (column < len(sums))
            cell = column * self.D + self.slots[chunk]
            added = np.bincount(cell[inside], values[inside], sums.size)
            sums += added.reshape(sums.shape)

    def leave_out(self):
        """Takes steps that outweigh all others out of the sums, and marks their chunks.

        Where a rule overshoots, one step can be larger than the loss ever was, and nothing else
        would be seen. Returns for each target [[step, its share of the size of all values, its sum
        in nats]].
        """
        self.total = self.sizes.sum(1)
        lone = []
        for k in range(self.K):
            outliers = []
            if self.steps >= 1 / LONE**2:
                outliers = np.flatnonzero(self.sizes[k] > LONE * self.total[k])
            lone.append([self.leave_out_step(k, i) for i in outliers])
        return lone

    def leave_out_step(self, k, i):
        """i: the step, counted from the first."""
        B = self.run.info["batch"]
        visits = self.run.visits[i * B : (i + 1) * B]
        values = visits["value"][:, k]
        self.add_to_columns(k, visits["step"], visits["chunk"], -values.astype(float))
        self.left_out[k, visits["chunk"]] = True
        share = self.sizes[k, i] / self.total[k]
        self.sizes[k, i] = 0
        return [int(i) + self.first, num(share), num(values.sum(dtype=float))]


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
        "early_share": num(sums.early_size / np.maximum(sums.total, 1e-300)),
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
        row["bad_books"] = bool(len(books)) and not closes(entries)
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


def closes(books):
    """Whether the books leave but a small part of the drop unexplained."""
    drop = (books["before"] - books["after"]).sum()
    return drop > 0 and abs(books["residual"].sum() / drop) <= BAD


def compare(audit):
    """audit: {entry: (n,)} of the audited steps. A correlation: its mean and its lowest."""
    return {
        "steps": len(audit["pearson"]),
        "rel_l2": num(np.median(audit["rel_l2"])),
        "loo": num(audit["loo_pearson"].mean()),
        "pearson": num([audit["pearson"].mean(), audit["pearson"].min()]),
        "spearman": num([audit["spearman"].mean(), audit["spearman"].min()]),
    }


def spread(values, tokens, slots, left_out):
    """For each target and domain: tokens; of the chunks not left out the sum (nats), and per token
    the mean and its standard error; of all, five quantiles per token and the share below 0.

    values: (n, K). tokens: (n,). slots: (n,). left_out: bool (K, n). exponent: a power of ten that
    suits the values per token.
    """
    columns = {"tokens": [], "sum": [], "mean": [], "error": [], "quantiles": [], "negative": []}
    members = [np.flatnonzero(slots == d) for d in range(slots.max() + 1)]
    for v, is_out in zip(values.T.astype(float), left_out):
        per_token = v / tokens
        kept = [rows[~is_out[rows]] for rows in members]
        sums = np.array([v[rows].sum() for rows in kept])
        sizes = np.array([tokens[rows].sum() for rows in kept])
        errors = [standard_error(per_token[rows], np.nan) for rows in kept]
        probabilities = (0.05, 0.25, 0.5, 0.75, 0.95)
        quantiles = [np.quantile(per_token[rows], probabilities) for rows in members]
        columns["tokens"].append(sizes.tolist())
        columns["sum"].append(num(sums))
        columns["mean"].append(num(sums / np.where(sizes, sizes, np.nan)))
        columns["error"].append(num(errors))
        columns["quantiles"].append(num(quantiles))
        columns["negative"].append(num([(v[rows] < 0).mean() for rows in members]))
    sizes = np.abs(np.array(columns["quantiles"], float))
    typical = float(np.median(sizes[sizes > 0])) if (sizes > 0).any() else 1.0
    columns["exponent"] = 3 * math.floor(math.log10(typical) / 3)
    return columns


def standard_error(x, unknown):
    """Of the mean of x (n,); unknown, where there are not two."""
    return x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else unknown


def over_time(run, sums):
    """The values over the steps, for two charts.

    cumulative: (K, D, columns), nats. size: (K, columns), the same of all domains without signs.
    share: (K, D, groups), a domain's values of a step over the measured drop of a step, both
    averaged over the group's steps; None where the drop is not above twice its standard error.
    edges and groups: the steps that the columns and the groups begin with, and the last step.
    drop and error: (K, groups), the mean drop and its standard error.
    """
    index = np.searchsorted(run.books["step"], sums.measured)
    drops = (run.books["before"] - run.books["after"])[index].astype(float).T  # (K, measured)
    bounds = np.cumsum([0, *map(len, sums.groups)])
    shares, means, errors = [], [], []
    for k in range(len(run.names)):
        groups = [drops[k, start:end] for start, end in itertools.pairwise(bounds)]
        mean = np.array([group.mean() for group in groups])
        error = np.array([standard_error(group, np.inf) for group in groups])
        is_clear = mean > 2 * error
        per_step = sums.group_sums[k] / np.diff(sums.group_edges)[:, None]
        share = per_step.T / np.where(is_clear, mean, 1)
        shares.append(np.where(is_clear, share, np.nan))
        means.append(mean)
        errors.append(error)
    sizes = np.add.reduceat(sums.sizes, sums.edges[:-1] - sums.first, 1)
    return {
        "edges": sums.edges.tolist(),
        "cumulative": num(sums.sums.cumsum(1).transpose(0, 2, 1)),
        "groups": sums.group_edges.tolist(),
        "size": num(sizes.cumsum(1)),
        "share": num(shares, 3),
        "drop": num(means),
        "error": num(errors),
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
    visits = run.visits[np.linspace(0, len(run.visits) - 1, n).astype(int)]
    return {
        "domain": slots[visits["chunk"]].tolist(),
        "loss": num(visits["loss"]),
        "values": num(visits["value"].T, 3),
    }


# --- chunks -------------------------------------------------------------------------


def chunks(run, documents, shown, values, slots, sums):
    """A dict for each chunk shown (n,): its values (n, K), its documents, its visits."""
    rows = [None] * len(shown)
    for i in np.argsort(shown):  # in the documents' order
        chunk = int(shown[i])
        inside = documents.of_chunk(chunk)
        named = [[doc["doc"], fit(doc["source"], 100), doc["record"]] for doc in inside[:DOCUMENTS]]
        first_visit = int(sums.first_visit[i])
        rows[i] = {
            "chunk": chunk,
            "domain": int(slots[chunk]),
            "values": num(values[i]),
            "documents": named,
            "more": len(inside) - len(named),
            "visits": int(sums.count[chunk]),
            "step": first_visit,
            "early": first_visit in sums.early,
            "loss": num(sums.loss[i] / sums.count[chunk]),
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
            "parts": parts.T.tolist(),
        }
