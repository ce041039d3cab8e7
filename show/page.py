"""What a report shows of a run, as one dict for JSON: numbers binned, points sampled, texts cut, so that a page holds it.

A value is in nats of the target's mean token loss, positive where the chunk lowered it; per token: over the tokens trained on, visits * width.
Arrays (K, D, ...) are of the targets and the domains that are shown; None stands where there is no number.
"""

import json
import math

import numpy as np

from system.store import AUDIT_ENTRIES, BOOK_ENTRIES

# at most: domains by name, columns of a chart, points, documents named of a chunk, chunks
DOMAINS, BINS, POINTS, DOCUMENTS, CHUNKS = 60, 60, 4000, 6, 600
CELLS = 1200  # targets times domains: with many targets fewer domains are named
NUMBERS = 24_000  # of a chart, for all targets and domains together
PAGE = 1_800_000  # bytes of the whole content
TEXTS, TOKENS = 700_000, 800_000  # bytes: of all the texts together, of all the coloured tokens
BAD, GOOD = (
    0.1,
    0.9,
)  # a residual above this share of the drop, an audited step's Pearson below this: a warning
LONE = 0.2  # a step with more than this share of the size of all values: sums, means and shares leave it out, and the page says so
RULES = {
    "sgd": "first order, as if plain SGD trained",
    "sgd2": "second order without a Hessian, as if plain SGD trained",
    "adamw_linear": "AdamW's step, linearised",
    "adamw": "AdamW's step, predicted before the batch is seen",
    "adamw2": "the step that AdamW really took",
}


def gather(run, documents):
    """A Run, and its Documents -> dict(run, targets, domains, trust, spread, time, histogram, points, chunks); one pass over the ledger."""
    used, names, of = run.used, *domains(run)
    values, K, D = run.values[used], len(run.names), len(names)  # (n, K)
    chosen = choose(values, of[used], K, D)[: max(100, 40 * CHUNKS // (K + 40))]
    passed = Pass(run, of, D, used[chosen])
    for visits in run.parts():
        passed.add(visits)
    lone = passed.leave_out()
    tokens = passed.count[used] * run.width
    content = dict(
        run=describe(run, passed),
        targets=[short(name) for name in run.names],
        domains=names,
        lone=lone,
    )
    content |= dict(
        trust=trust(run, passed.early),
        spread=spread(values, tokens, of[used], passed.left[:, used]),
        time=over_time(run, passed),
    )
    content |= dict(histogram=histograms(values, of[used], D), points=points(run, of))
    shown = dict(chunks=chunks(run, documents, used[chosen], values[chosen], of, passed))
    room_for_texts = min(TEXTS, PAGE - TOKENS - len(encode(content | shown)))
    add_texts(shown["chunks"], run, max(0, room_for_texts) // len(chosen))
    return content | shown


def encode(content):
    """-> JSON, bytes, that cannot end a script element; a lone surrogate becomes JSON's escape for it."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}).encode(
        "utf-8", "backslashreplace"
    )


def num(x, digits=4):
    """An array as nested lists of numbers with so many digits; None where it is not finite."""
    x = np.asarray(x, float)
    flat = [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in x.ravel().tolist()]
    return np.array([*flat, None], object)[:-1].reshape(x.shape).tolist()


def short(name, limit=120):
    return name if len(name) <= limit else name[: limit - 1] + "\u2026"


def domains(run):
    """-> the names shown, largest first, the smallest put together where there are many; int16 (n_chunks,): which of them a chunk is of."""
    all_of = np.asarray(run.data.train.domain)
    size = np.bincount(all_of[run.used], minlength=len(run.domains))
    order = [d for d in np.argsort(-size, kind="stable") if size[d]]
    names, slot = [short(run.domains[d]) for d in order], np.full(len(size), -1, np.int16)
    most = min(DOMAINS, max(8, CELLS // len(run.names)))
    slot[order] = np.minimum(np.arange(len(order)), most - 1)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} other domains"]
    return names, slot[all_of]


def choose(values, of, K, D):
    """values (n, K), of (n,) -> positions of the chunks to show, the most extreme of every target first, then those of every domain."""
    overall, each, lists = max(5, min(50, 100 // K)), max(1, min(3, 150 // (K * D))), []
    orders = [np.argsort(values[:, k], kind="stable") for k in range(K)]
    ends = [end[:overall] for order in orders for end in (order[::-1], order)]
    for order in orders:
        ranked = of[order]
        for d in range(D):
            members = order[ranked == d]
            lists += [*members[::-1][:each], *members[:each]]
    return np.array(list(dict.fromkeys([*np.stack(ends, 1).ravel().tolist(), *map(int, lists)])))


class Pass:
    """What is summed up over the ledger's visits, a slice at a time."""

    def __init__(self, run, of, D, chosen):
        self.run, self.of, self.D, K = run, of, D, len(run.names)
        self.first = run.first_step
        self.row = 0  # of the ledger, the next to be summed up
        steps = run.info["committed_step"] - self.first
        bins = min(BINS, max(10, NUMBERS // (K * D)))
        columns = np.linspace(0, steps, min(steps, bins) + 1).astype(int)
        self.edges = self.first + np.unique(columns)  # of the cumulative chart
        entries = [run.books[name] for name in BOOK_ENTRIES]
        self.measured = run.books["step"][np.isfinite(entries).all((0, 2))]
        # columns of the normalised chart: at least four measured steps each, or the scatter of their drops would not be known
        self.groups = np.array_split(self.measured, max(1, min(bins // 2, len(self.measured) // 4)))
        self.group_edges = np.array(
            [*(group[0] for group in self.groups if len(group)), self.first + steps]
        )
        self.count = np.zeros(len(of), np.int32)
        self.position = np.full(len(of), -1, np.int32)
        self.position[chosen] = np.arange(len(chosen))
        self.met, self.loss = np.full(len(chosen), np.iinfo("i4").max), np.zeros(len(chosen))
        self.sums = np.zeros((K, len(self.edges) - 1, D))
        self.group_sums = np.zeros((K, max(0, len(self.group_edges) - 1), D))
        self.early, self.early_size, self.sizes = set(), np.zeros(K), np.zeros((K, steps))
        self.left = np.zeros((K, len(of)), bool)  # chunks met in a step that is left out

    def add(self, visits):
        rows = np.arange(self.row, self.row + len(visits))
        step = self.first + rows // self.run.info["batch"]
        self.row += len(visits)
        chunk, values, early = visits["chunk"], visits["value"].astype(float), visits["early"] > 0
        np.add.at(self.count, chunk, 1)
        for k in range(values.shape[1]):
            self.into_columns(k, step, chunk, values[:, k])
            first = step[0] - self.first
            size = np.bincount(step - step[0], abs(values[:, k]))
            self.sizes[k, first : first + len(size)] += size
        self.early |= set(np.unique(step[early]).tolist())
        self.early_size += abs(values[early]).sum(0)
        where = self.position[chunk]
        shown = where >= 0
        np.minimum.at(self.met, where[shown], step[shown])
        np.add.at(self.loss, where[shown], visits["loss"][shown])

    def into_columns(self, k, step, chunk, values):
        for sums, edges in ((self.sums[k], self.edges), (self.group_sums[k], self.group_edges)):
            column = np.searchsorted(edges, step, "right") - 1
            inside = (column >= 0) & (column < len(sums))
            sums += np.bincount(
                (column * self.D + self.of[chunk])[inside], values[inside], sums.size
            ).reshape(sums.shape)

    def leave_out(self):
        """Takes steps that outweigh all others out of the sums over time and marks their chunks -> per target [[step, share of the size of all
        values, sum in nats]]: where a rule overshoots, one step can be larger than the loss ever was, and nothing else would be seen."""
        found, B, self.total = [], self.run.info["batch"], self.sizes.sum(1)
        for k, sizes in enumerate(self.sizes):
            found.append([])
            for i in (
                np.flatnonzero(sizes > LONE * self.total[k]) if len(sizes) >= 1 / LONE**2 else ()
            ):
                rows = self.run.visits[i * B : (i + 1) * B]
                self.into_columns(
                    k, rows["step"], rows["chunk"], -rows["value"][:, k].astype(float)
                )
                self.left[k, rows["chunk"]] = True
                sizes[i], share = 0, sizes[i] / self.total[k]
                found[k].append(
                    [int(i) + self.first, num(share), num(rows["value"][:, k].sum(dtype=float))]
                )
        return found


def describe(run, passed):
    cfg, meta = run.cfg, run.data.meta
    vocab, width = -(-meta["vocab_size"] // 64) * 64, cfg["n_embd"]
    size = vocab * width * (1 if cfg["tie_weights"] else 2) + 12 * cfg["n_layer"] * width**2
    keys = "n_layer n_head n_embd max_iters optimizer learning_rate warmup_iters grad_clip target_batch book_interval audit_interval".split()
    found = {key: cfg[key] for key in keys}
    found |= dict(
        name=short(run.path.resolve().name),
        data=short(run.data.path.name),
        tokenizer=meta["tokenizer"],
        size=size,
        width=run.width,
    )
    found |= dict(
        rule=run.info["rule"],
        rule_is=RULES.get(run.info["rule"], ""),
        batch=run.info["batch"],
        visits=len(run.visits),
    )
    found |= dict(
        step=run.info["committed_step"],
        first=passed.first,
        used=len(run.used),
        chunks=len(run.values),
        hash=run.data.hash[:12],
    )
    found |= dict(approximate=run.info.get("approximate"))
    return found | dict(
        early=len(passed.early),
        early_share=num(passed.early_size / np.maximum(passed.total, 1e-300)),
    )


def trust(run, early):
    """Of each target: what the drop of its loss over the measured steps was made of, and how close the audited steps came to the truth."""
    entries = run.books[np.isfinite([run.books[name] for name in BOOK_ENTRIES]).all((0, 2))]
    late, found = ~np.isin(entries["step"], list(early)), []
    for k in range(len(run.names)):
        of = {name: entries[name][:, k].astype(float) for name in BOOK_ENTRIES}
        drop = of["before"] - of["after"]
        total, known = drop.sum(), drop.sum() > 0
        parts = {
            name: of[name].sum() / total if known else np.nan
            for name in ("data", "momentum", "decay", "residual")
        }
        rest = (
            of["residual"][late].sum() / drop[late].sum()
            if known and drop[late].sum() > 0
            else np.nan
        )
        row = dict(
            steps=len(drop),
            drop=num(total),
            parts={name: num(x) for name, x in parts.items()},
            rest=num(rest),
            early=int((~late).sum()),
        )
        audit = {name: run.audit[name][:, k] for name in AUDIT_ENTRIES}
        row["audit"] = None
        if len(run.audit):
            row["audit"] = dict(
                steps=len(run.audit),
                rel_l2=num(np.median(audit["rel_l2"])),
                loo=num(audit["loo_pearson"].mean()),
            )
            row["audit"] |= {
                name: num([audit[name].mean(), audit[name].min()])
                for name in ("pearson", "spearman")
            }
        row["bad_books"] = bool(len(drop)) and not (known and abs(parts["residual"]) <= BAD)
        row["bad_audit"] = bool(len(run.audit)) and not audit["pearson"].min() >= GOOD
        found.append(row)
    return found


def spread(values, tokens, of, left):
    """Per target and domain: tokens; of the chunks not left out the sum (nats), and per token the mean and its standard error; of all the five
    quantiles per token and the share below 0. exponent: a power of ten that suits them."""
    found = dict(tokens=[], sum=[], mean=[], error=[], quantiles=[], negative=[])
    members = [np.flatnonzero(of == d) for d in range(of.max() + 1)]
    for v, out in zip(values.T.astype(float), left):
        each, kept = v / tokens, [m[~out[m]] for m in members]
        sums, sizes = (np.array([x[m].sum() for m in kept]) for x in (v, tokens))
        found["tokens"].append(sizes.tolist())
        found["sum"].append(num(sums))
        found["mean"].append(num(sums / np.where(sizes, sizes, np.nan)))
        found["error"].append(
            num([each[m].std(ddof=1) / math.sqrt(len(m)) if len(m) > 1 else np.nan for m in kept])
        )
        found["quantiles"].append(
            num([np.quantile(each[m], (0.05, 0.25, 0.5, 0.75, 0.95)) for m in members])
        )
        found["negative"].append(num([(v[m] < 0).mean() for m in members]))
    sizes = np.abs(np.array(found["quantiles"], float))
    typical = float(np.median(sizes[sizes > 0])) if (sizes > 0).any() else 1.0
    return found | dict(exponent=3 * math.floor(math.log10(typical) / 3))


def over_time(run, passed):
    """Cumulative (K, D, columns) in nats, size (K, columns) the same of all domains without signs, and share (K, D, groups): the domain's values
    of a step over the measured drop of a step, both averaged over the group's steps; None where the drop is not above twice its standard error."""
    index = np.searchsorted(run.books["step"], passed.measured)
    drops = (run.books["before"] - run.books["after"])[index].astype(float).T  # (K, measured)
    share, mean, error = [], [], []
    for k in range(len(run.names)):
        groups = [
            g for g in np.split(drops[k], np.cumsum([len(g) for g in passed.groups])[:-1]) if len(g)
        ]
        mean.append([g.mean() for g in groups])
        error.append([g.std(ddof=1) / math.sqrt(len(g)) if len(g) > 1 else np.inf for g in groups])
        clear = np.array(mean[k]) > 2 * np.array(error[k])
        per_step = (
            passed.group_sums[k] / np.diff(passed.group_edges)[:, None]
            if len(groups)
            else passed.group_sums[k]
        )
        share.append(
            np.where(clear, per_step.T / np.where(clear, mean[k], 1), np.nan)
            if len(groups)
            else np.zeros((passed.D, 0))
        )
    found = dict(
        edges=passed.edges.tolist(),
        cumulative=num(passed.sums.cumsum(1).transpose(0, 2, 1)),
        groups=passed.group_edges.tolist(),
    )
    ends = np.add.reduceat(passed.sizes, passed.edges[:-1] - passed.first, 1).cumsum(1)
    return found | dict(size=num(ends), share=num(share, 3), drop=num(mean), error=num(error))


def scale(values):
    """Values (n,) -> s: an axis of asinh(value / s) is linear for the small ones and logarithmic on both sides."""
    small = np.quantile(np.abs(values), 0.25)
    return 10.0 ** math.floor(math.log10(small)) if small > 0 else 1e-9


def histograms(values, of, D):
    """Of each target: s, the bins' width on asinh(value / s), where they start (0 is an edge), and counts (D, bins)."""
    found, columns = [], min(44, max(12, NUMBERS // (values.shape[1] * D)))
    for v in values.T.astype(float):
        s = scale(v)
        t = np.arcsinh(v / s)
        step = max(np.ptp(t), 1e-6) / columns
        column = np.floor(t / step).astype(int)
        first, n = column.min(), np.ptp(column) + 1
        counts = np.bincount(of * n + column - first, minlength=D * n).reshape(D, n)
        found.append(dict(s=s, width=float(step), first=int(first), counts=counts.tolist()))
    return found


def points(run, of):
    """A sample of the visits, evenly over the ledger: domain (n,), training loss (n,), values (K, n)."""
    n = min(len(run.visits), POINTS, 5 * POINTS // len(run.names))
    rows = run.visits[np.linspace(0, len(run.visits) - 1, n).astype(int)]
    return dict(
        domain=of[rows["chunk"]].tolist(), loss=num(rows["loss"]), values=num(rows["value"].T, 3)
    )


def fit(text, limit):
    """A text cut so that its JSON takes no more than so many bytes."""
    while (size := len(encode(text))) > limit + 2:
        text = text[: min(len(text) - 1, int(len(text) * limit / size))]
    return text


def chunks(run, documents, chosen, values, of, passed):
    """One dict a chunk: its values and documents."""
    found = [None] * len(chosen)
    for i in np.argsort(chosen):  # in the documents' order
        chunk = int(chosen[i])
        docs = documents.of_chunk(chunk)
        shown = [[doc["doc"], fit(doc["source"], 100), doc["record"]] for doc in docs[:DOCUMENTS]]
        row = dict(chunk=chunk, domain=int(of[chunk]), values=num(values[i]))
        row |= dict(documents=shown, more=len(docs) - len(shown))
        row |= dict(
            visits=int(passed.count[chunk]),
            step=int(passed.met[i]),
            early=int(passed.met[i]) in passed.early,
        )
        found[i] = row | dict(loss=num(passed.loss[i] / passed.count[chunk]))
    return found


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
    """Gives the first chunks their pieces and, per target, a value for each: in thousandths of the chunk's largest, which stands beside them in nats.

    values (n, width, K): of the tokens read, computed with the weights after `step` steps."""
    content["token_step"] = step
    for row, of in zip(content["chunks"], np.nan_to_num(np.asarray(values, float))):
        largest = np.abs(of).max(0)  # (K,)
        parts = np.rint(1000 * of / np.where(largest > 0, largest, 1)).astype(int)
        row["tokens"] = dict(
            pieces=run.pieces(row["chunk"])[: len(of)], largest=num(largest), parts=parts.T.tolist()
        )
