"""
Whose words are these? The rank of a text's source among all training chunks, where the text is a
part of the source word for word, a paraphrase, a paraphrase in other words and another order, or
only a text on a similar topic.

    pip install -r requirements-experiments.txt               for BM25
    python experiments/paraphrase.py                          on the text every Python installation
                                                              carries
    python experiments/paraphrase.py --source=minipile.jsonl.zst --out=results/paraphrase
    python experiments/paraphrase.py --quick                  all of it, tiny: half a minute
    python experiments/paraphrase.py --part=report --out=...  tables and figure, from rows.jsonl

Place in the paper: Wang et al., arXiv 2406.11011, section 5 and its appendix: sources found under
paraphrase, and ranked far above BM25's rank where a text shares only its topic. paraphrase.json
beside this file holds sets of five texts, written for it: a source and the four texts above. Each
source is planted as one chunk, a domain of its own, among the chunks of --source. A run is one pass
over them and values all for all texts at once.

Ranks (1 = best) of the sources among all chunks by
- the run's values, summed as the paper does; the same without the steps that the ledger marks as
  early; as shares of their step's values, and as z-scores within their step, for values shrink
  while a model learns;
- the smoothed scores of --target_smoothing, as shares;
- hindsight (revalue.py) for all texts, summed and as shares: what the visit did for the text's loss
  at the end of the run;
- TracIn at the last checkpoint, <g_chunk, g_text>;
- the influence function there, <g_chunk, (G + damping I)^-1 g_text> with the Gauss-Newton matrix G
  of some chunks, by conjugate gradients;
- BM25 (k1 1.5, b .75) on words.
Control: the other sets' sources for the same text, which share its register and not its topic.
Seeds move the first weights and the order, and with it the step in which a source is met. The
chunks are the same.

Two cores, idle: a seed takes 10 minutes of one core for the run and the gradients, and an hour for
hindsight of all 20 texts.
Expected on minipile, mean rank among 1995: verbatim and paraphrase 1 by every score but the sums
(7, for chunks of the first step stand before); significant paraphrase 160 summed, 44 as shares,
6.5 by TracIn and the influence function, 23 by BM25. The other sets' sources rank little lower: at
this size what is found there is mostly the register.
"""

import json
import re
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import config
import revalue
import train
from data import open_dataset, parse_targets
from experiments.common import (
    begin,
    column,
    finish,
    get_options,
    json_line,
    markdown,
    numbers,
    prepare,
    pyplot,
    read_documents,
    read_rows,
    save_figure,
    select,
    set_options,
    shown,
    side_by_side,
)
from pile.tokenizers import TOKENIZERS, GPT2Tokenizer, tokenizer
from show.run import open_run
from system.checkpoints import read_checkpoint
from system.errors import UserError

KINDS = ("partial exact", "paraphrase", "significant paraphrase", "similar topic")
FORMS = ("", ", early steps out", ", share of step", ", z in step")
OF_VALUES = [f"in-run{form}" for form in FORMS]
OF_VALUES += ["smoothed, share of step", "hindsight", "hindsight, share of step"]
METHODS = (*OF_VALUES, "TracIn", "influence function", "BM25")
CUT = 2000  # characters of a document that go into the corpus: more documents for the same chunks
QUICK = {
    "source": "python",
    "seeds": "1,2",
    "sets": 2,
    "chunks": 160,
    "vocab": 1024,
    "block_size": 224,
    "n_layer": 2,
    "n_head": 1,
    "n_embd": 32,
    "curvature_chunks": 2,
}
AT_LEAST_ONE = (
    "chunks",
    "batch_size",
    "micro_batches",
    "epochs",
    "curvature_chunks",
    "cg_iterations",
)
GPU = torch.cuda.is_available()


@dataclass
class Config:
    source: str = "python"  # as prepare_pile.py's; its first documents, as many as chunks need
    # a file {set: {"source" and the four kinds: text}}; empty: paraphrase.json beside this one
    texts: str = ""
    sets: int = 0  # of them, the first; 0: all
    seeds: str = "1,2,3"
    chunks: int = 2000  # about as many are used and ranked
    vocab: int = 8192  # GPT-2's first tokens, a sixth of the head's cost; 50257: all of them
    # tokens of a chunk: each source has as many or more, each text as many or fewer; 128 with
    # --vocab=50257
    block_size: int = 160
    rule: Literal["sgd", "sgd2", "adamw_linear", "adamw", "adamw2"] = "adamw2"
    n_layer: int = 4
    n_head: int = 2
    n_embd: int = 64
    batch_size: int = 16  # chunks of a step
    # that it is cut into: with this many targets repeating the forward is cheaper for two-pass
    # rules
    micro_batches: int = 2
    learning_rate: float = 1e-3  # falls to a tenth
    target_smoothing: float = 0.9
    epochs: int = 1  # passes over the chunks
    damping: float = 0.01  # of the influence function
    curvature_chunks: int = 8  # its Gauss-Newton matrix is of
    cg_iterations: int = 10
    device: str = "cuda" if GPU else "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16" if GPU else "float32"  # of runs
    workers: int = 0  # runs side by side; 0: one a core
    data: str = "data/paraphrase"  # chunks, targets and runs, made when missing
    out: str = "out/paraphrase"
    quick: bool = False  # all of it, tiny
    part: Literal["all", "report"] = "all"  # report: only the tables and the figure

    def __post_init__(self):
        if self.quick:
            set_options(self, QUICK)
            self.data += "-quick"
        config.check(self, at_least=dict.fromkeys(AT_LEAST_ONE, 1))
        if self.batch_size % self.micro_batches:
            batch = f"--batch_size={self.batch_size}"
            raise UserError(f"{batch} is not a multiple of --micro_batches={self.micro_batches}")


# --- GPT-2's first tokens -----------------------------------------------------------


def vocabulary(cfg):
    """The name of the tokenizer, which is known by it from here on. GPT-2's first merges are a BPE
    of their own."""

    class First(GPT2Tokenizer):
        n_vocab = cfg.vocab
        eot = cfg.vocab - 1
        bpe = None

        def __init__(self):
            if First.bpe is None:  # once: there is a target for every text
                import tiktoken

                pieces = GPT2Tokenizer().bpe._mergeable_ranks.items()
                ranks = {piece: rank for piece, rank in pieces if rank < self.eot}
                First.bpe = tiktoken.Encoding(
                    "first", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens={}
                )

    name = f"gpt2-{cfg.vocab}"
    TOKENIZERS.setdefault(name, First)
    return name


# --- the corpus: the source's documents, and each set's source as one chunk -------


def read_sets(cfg):
    """{set: {kind: text}}, each source cut to the tokens that fill a chunk with <|endoftext|>.

    Raises UserError where a text is missing, or does not fit --block_size.
    """
    path = Path(cfg.texts or Path(__file__).with_suffix(".json"))
    tok = tokenizer(vocabulary(cfg))
    block = f"--block_size={cfg.block_size}"
    sets = {}
    for name, texts in json.loads(path.read_text(encoding="utf-8")).items():
        if cfg.sets and len(sets) == cfg.sets:
            break
        missing = {"source", *KINDS} - texts.keys()
        if missing:
            raise UserError(f"{path}: {name!r} has no {', '.join(sorted(missing))}")
        source = tok.decode(tok.encode(texts["source"])[: cfg.block_size])
        fills = len(tok.encode(source)) == cfg.block_size
        if not fills or texts["partial exact"] not in source:
            raise UserError(
                f"{path}: the source of {name!r} fills no chunk of {block}, "
                "or does not hold its part there"
            )
        if max(len(tok.encode(texts[kind])) for kind in KINDS) > cfg.block_size:
            raise UserError(f"{path}: a text of {name!r} is longer than {block} tokens")
        sets[name] = {**texts, "source": source}
    return sets


def planted_domain(name):
    return f"planted: {name}"


def write_corpus(cfg, sets, path, tokens):
    """The planted sources, then as many of the --source's documents as make this many tokens."""
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for name, texts in sets.items():
            file.write(json_line(texts["source"], planted_domain(name)))
        for source, domain, text in read_documents(cfg.source):
            text = text[:CUT]
            file.write(json_line(text, str(domain or Path(source).stem)))
            written += len(text)
            if written > 8 * tokens:  # more than enough: a token is some 4 characters
                break


def plant(cfg, sets):
    """Writes the chunks to cfg.data/chunks, and the texts to cfg.data/texts.

    Raises UserError where the chunks there are of other texts.
    """
    folder = Path(cfg.data)
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    tokens = cfg.chunks * (cfg.block_size + 1)
    if not (folder / "chunks/meta.json").is_file():
        write_corpus(cfg, sets, folder / "corpus.jsonl", tokens)
    name = vocabulary(cfg)
    data = prepare(
        folder / "chunks",
        folder / "corpus.jsonl",
        tokenizer=name,
        block_size=cfg.block_size,
        val_fraction=0.0,
        limit_tokens=tokens,
        workers=1,
    )
    find_sources(data, tokenizer(name), sets)
    for i, (name, kind) in enumerate(product(sets, KINDS)):
        (folder / f"texts/{i}.txt").write_text(sets[name][kind], encoding="utf-8")


def find_sources(data, tok, sets):
    """{set: the chunk that its source is}, read back. Raises UserError where it is another text."""
    sources = {}
    for name, texts in sets.items():
        planted = np.zeros(0, int)
        if planted_domain(name) in data.domains:
            domain = data.domains.index(planted_domain(name))
            planted = np.flatnonzero(data.train.domain == domain)
        if len(planted) != 1 or tok.decode(data.train.rows[planted[0], :-1]) != texts["source"]:
            raise UserError(
                f"{data.path} was made of other texts: remove it, or write another --data"
            )
        sources[name] = int(planted[0])
    return sources


# --- scores: (chunks, texts), larger = more of a source ----------------------------


def train_and_value(cfg, data, targets, seed):
    """Trains over the chunks and values them. Returns the run."""
    steps = -(-len(data.train.rows) * cfg.epochs // cfg.batch_size)
    options = get_options(
        cfg,
        "rule",
        "block_size",
        "n_layer",
        "n_head",
        "n_embd",
        "learning_rate",
        "device",
        "dtype",
    )
    settings = train.Config(
        **options,
        data_dir=str(data.path),
        out_dir=f"{cfg.data}/runs/{seed}",
        seed=seed,
        init_from="auto",
        targets=targets,
        batch_size=cfg.batch_size // cfg.micro_batches,
        gradient_accumulation_steps=cfg.micro_batches,
        max_iters=steps,
        warmup_iters=steps // 20,
        min_lr=cfg.learning_rate / 10,
        eval_interval=0,
        book_interval=steps,
        target_smoothing=cfg.target_smoothing,
        keep_checkpoints=1,
    )
    train.train(settings)
    return open_run(settings.out_dir)


def value_scores(cfg, run):
    """{method: scores} of the run's values and its smoothed scores."""
    smoothed = scores_of(cfg, run, "smoothed", "smoothed")
    name = "smoothed, share of step"
    return {**scores_of(cfg, run, "value", "in-run"), name: smoothed[name]}


def hindsight_scores(cfg, run):
    """{method: scores} of what the visits did for the texts' losses at the end."""
    folder = run.path / "revalued" / "hindsight"
    if not revalue.is_done(folder):
        revalue.revalue(revalue.Config(run=str(run.path), hindsight=True, name=folder.name))
    scores = scores_of(cfg, open_run(folder), "value", "hindsight")
    return {name: of_method for name, of_method in scores.items() if name in METHODS}


def scores_of(cfg, run, column, name):
    """{name and form: scores} of a column of the ledger: its sums, those without the steps that the
    ledger marks as early, and normalised within each step."""
    B = cfg.batch_size
    n = len(run.values)
    visits = run.visits[: n * cfg.epochs]  # not those of another pass that fill up the last step
    raw = visits[column].reshape(len(visits), -1).astype(float)
    steps = np.split(raw, range(B, len(raw), B))
    late = ~visits["early"].astype(bool)[:, None]
    shares = [v / abs(v).sum(0) for v in steps]
    z_scores = [(v - v.mean(0)) / np.maximum(v.std(0), 1e-30) for v in steps]
    scores = {}
    for form, weights in zip(
        FORMS, (raw, raw * late, np.concatenate(shares), np.concatenate(z_scores))
    ):
        scores[name + form] = np.zeros((n, raw.shape[1]))
        np.add.at(scores[name + form], visits["chunk"], weights)
    return scores


def gradient_scores(cfg, run, data, targets):
    """TracIn and the influence function at the run's checkpoint: {method: scores}. And how far
    conjugate gradients came: |residual| / |g| of each text."""
    settings = config.load(train.Config, [str(run.path / "config.json")])
    model = train.build_model(settings, data, cfg.device).eval()
    model.load_state_dict(read_checkpoint(run.path / "ckpt.pt")["model"])
    params = list(model.parameters())
    n = len(data.train.rows)

    def tensors(X, Y):
        return torch.as_tensor(X, device=cfg.device), torch.as_tensor(Y, device=cfg.device)

    gradients = []
    for target in targets:
        loss = model(*tensors(*target.batch([0])))[1]
        gradients.append(flat(torch.autograd.grad(loss, params)))
    rng = np.random.default_rng(settings.seed)
    sample = rng.choice(n, min(n, cfg.curvature_chunks), replace=False)
    X, Y = tensors(*data.train.batch(sample, cfg.block_size))
    solved, residuals = solve(cfg, model, X, Y, gradients)
    # as the ledger's directions: a chunk's <gradient, direction> comes out of its own backward
    directions = torch.stack([*gradients, *solved]).split([p.numel() for p in params], 1)
    for p, h in zip(params, directions):
        p.h = h.reshape(-1, *p.shape)
    products = []
    for ids in np.split(np.arange(n), range(cfg.batch_size, n, cfg.batch_size)):
        X, Y = tensors(*data.train.batch(ids, cfg.block_size))
        ledger = torch.zeros(len(ids), 2 * len(targets), device=cfg.device, requires_grad=True)
        model(X, Y, ledger)[1].backward()
        products.append(ledger.grad.double().cpu().numpy() * len(ids))
        model.zero_grad(set_to_none=True)
    tracin, influence = np.split(np.concatenate(products), 2, 1)
    return {"TracIn": tracin, "influence function": influence}, residuals


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def solve(cfg, model, X, Y, gradients):
    """(G + damping I)^-1 g of each g, by conjugate gradients, and |residual| / |g| of each.

    G = J^T H J / tokens, H = diag(p) - p p^T of each token of X, Y.
    """
    from scipy.sparse.linalg import LinearOperator, cg
    from torch.nn.attention import SDPBackend, sdpa_kernel

    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the one that can be differentiated twice
        logits = model(X, Y)[0].flatten(0, 1)
        u = torch.zeros_like(logits, requires_grad=True)
        # J^T u: linear in u, so its derivative is J
        pulled = flat(torch.autograd.grad(logits, params, u, create_graph=True))
    p = logits.detach().softmax(1)

    def damped(v):
        v = torch.as_tensor(v, dtype=pulled.dtype, device=pulled.device)
        jv = torch.autograd.grad(pulled, u, v, retain_graph=True)[0]
        hjv = p * (jv - (p * jv).sum(1, keepdim=True)) / len(p)
        gv = flat(torch.autograd.grad(logits, params, hjv, retain_graph=True))
        return (gv + cfg.damping * v).cpu().numpy()

    system = LinearOperator((len(pulled), len(pulled)), damped, dtype=np.float32)
    solved = []
    residuals = []
    for g in gradients:
        b = g.cpu().numpy()
        x, _ = cg(system, b, rtol=1e-3, maxiter=cfg.cg_iterations)
        solved.append(torch.as_tensor(x, dtype=g.dtype, device=g.device))
        residuals.append(float(np.linalg.norm(damped(x) - b) / np.linalg.norm(b)))
    return solved, residuals


def words(text):
    return re.findall(r"\w+", text.lower())


def bm25_scores(data, tok, texts):
    from rank_bm25 import BM25Okapi

    chunks = [words(tok.decode(row[row != tok.eot])) for row in data.train.rows]
    bm25 = BM25Okapi(chunks, k1=1.5, b=0.75)
    return np.stack([bm25.get_scores(words(text)) for text in texts], 1)


# --- a run and its rows ---------------------------------------------------------------


def rank(scores, chunk):
    """Of a chunk, 1 = the largest score; among equal ones the middle."""
    above = (scores > scores[chunk]).sum()
    equal = (scores == scores[chunk]).sum()
    return float(above + (equal + 1) / 2)


def judge(cfg, seed):
    """One run: a row for every set, kind and method."""
    sets = read_sets(cfg)
    tok = tokenizer(vocabulary(cfg))
    data = open_dataset(f"{cfg.data}/chunks")
    sources = find_sources(data, tok, sets)
    asked = list(product(sets, KINDS))
    targets = ",".join(f"{k}={cfg.data}/texts/{k}.txt" for k in range(len(asked)))
    run = train_and_value(cfg, data, targets, seed)
    texts = [sets[name][kind] for name, kind in asked]
    of_gradients, residuals = gradient_scores(
        cfg, run, data, parse_targets(targets, data, cfg.block_size)
    )
    scores = {
        **value_scores(cfg, run),
        **hindsight_scores(cfg, run),
        **of_gradients,
        "BM25": bm25_scores(data, tok, texts),
    }
    values = run.visits["value"].reshape(-1, len(asked))
    rows = []
    for k, (name, kind) in enumerate(asked):
        chunk = sources[name]
        step = run.visits_of([chunk])[0]["step"]
        in_step = run.visits["step"] == step
        batch_values = values[in_step, k]
        own_value = batch_values[run.visits["chunk"][in_step] == chunk][0]
        about = {
            "seed": seed,
            "rule": cfg.rule,
            "chunks": len(data.train.rows),
            "steps": run.info["committed_step"],
            "batch": cfg.batch_size,
            "set": name,
            "kind": kind,
            "chunk": chunk,
            "step": int(step),
            "in_step": 1 + int((batch_values > own_value).sum()),
            "loss": float(run.visits["loss"][-10 * cfg.batch_size :].mean()),
            "residual": residuals[k],
        }
        for method, of_method in scores.items():
            ranks = {other: rank(of_method[:, k], place) for other, place in sources.items()}
            own_rank = ranks.pop(name)
            rows.append(
                {
                    **about,
                    "method": method,
                    "rank": own_rank,
                    "others": list(ranks.values()),
                    "score": float(of_method[chunk, k]),
                }
            )
    return rows


# --- tables -------------------------------------------------------------------------


def set_ranks(rows):
    """The mean rank of each set over the seeds: what the standard error is taken over, for BM25
    knows no seed."""
    names = sorted(set(column(rows, "set")))
    return [np.mean(column(select(rows, set=name), "rank")) for name in names]


def rank_cell(rows):
    return f"{shown(set_ranks(rows), 1)} ({np.median(column(rows, 'rank')):g})"


def percent_cell(rows):
    """The chunks ranked before the source, in percent of all: median and highest."""
    ranks = column(rows, "rank")
    n = rows[0]["chunks"]
    median, highest = (100 * (rank - 1) / n for rank in (np.median(ranks), max(ranks)))
    return f"{median:.2f} ({highest:.2f})"


def control_cell(rows):
    return f"{np.median(column(rows, 'others')):g}"


def first_cell(rows):
    """How often the source stands before all other sets' sources."""
    first = [row["rank"] < min(row["others"], default=np.inf) for row in rows]
    return f"{np.mean(first):.0%}"


def method_table(rows, cell):
    """A line a method, a column a kind of text. cell: the function from rows to text."""
    lines = []
    for method in METHODS:
        of_method = select(rows, method=method)
        lines.append([method, *(cell(select(of_method, kind=kind)) for kind in KINDS)])
    return markdown(["score", *KINDS], lines)


def step_table(rows):
    """The source among the chunks of its own step, by the run's values."""
    cells = []
    for kind in KINDS:
        places = np.array(column(select(rows, method="in-run", kind=kind), "in_step"))
        cells.append(f"{np.mean(places):.2f} ({np.mean(places == 1):.0%})")
    return markdown(["", *KINDS], [[f"of {rows[0]['batch']}", *cells]])


def third_table(rows):
    """Median ranks by when the source was met, in thirds of the run."""
    lines = []
    for method, (third, name) in product(OF_VALUES, enumerate(("first", "second", "last"))):
        met = []
        for row in select(rows, method=method):
            if int(3 * row["step"] / row["steps"]) == third:
                met.append(row)
        if met:
            line = [f"{method}, {name} third", len(met) // len(KINDS)]
            for kind in KINDS:
                line.append(f"{np.median(column(select(met, kind=kind), 'rank')):g}")
            lines.append(line)
    return markdown(["score, source met in the", "sets x seeds", *KINDS], lines)


def tables(rows):
    n = rows[0]["chunks"]
    seeds = len(set(column(rows, "seed")))
    sets = len(set(column(rows, "set")))
    random_order = ["random order"] + [f"{(n + 1) / 2:.1f}"] * len(KINDS)
    return [
        f"Rank of the source among {n} chunks (1 = best), {sets} sets x {seeds} seeds, "
        f"rule {rows[0]['rule']}:",
        "mean ± standard error over the sets (each the mean of its seeds), and median over all.",
        "",
        *method_table(rows, rank_cell),
        *markdown(random_order, [])[:1],
        "",
        "The same in percent of the chunks ranked before the source, median over all (highest).",
        "",
        *method_table(rows, percent_cell),
        "",
        "Control: the other sets' sources for the same texts, median rank over all.",
        "",
        *method_table(rows, control_cell),
        "",
        f"How often the source stands before all {sets - 1} of them; by chance {1 / sets:.0%}.",
        "",
        *method_table(rows, first_cell),
        "",
        f"In-run: rank of the source among the {rows[0]['batch']} chunks of its own step: mean, "
        "and how often it is first.",
        "",
        *step_table(rows),
        "",
        "In-run: median rank by when the source was met, in thirds of the run.",
        "",
        *third_table(rows),
    ]


# --- figure -------------------------------------------------------------------------


def figure(rows, path):
    """Every set and seed a dot, by kind and method, on a logarithmic axis; a bar at the median."""
    plt = pyplot()
    fig, axes = plt.subplots(1, len(KINDS), figsize=(12, 3.8), sharey=True)
    rng = np.random.default_rng(0)
    for ax, kind in zip(axes, KINDS):
        for i, method in enumerate(METHODS):
            ranks = column(select(rows, kind=kind, method=method), "rank")
            x = i + rng.uniform(-0.25, 0.25, len(ranks))
            ax.plot(x, ranks, "o", color=f"C{i}", markersize=4, alpha=0.6)
            ax.plot([i - 0.35, i + 0.35], [np.median(ranks)] * 2, color=f"C{i}", linewidth=2)
        ax.axhline((rows[0]["chunks"] + 1) / 2, color="gray", linestyle="--", linewidth=1)
        ax.set_title(kind)
        ax.set_yscale("log")
        ax.set_xticks(range(len(METHODS)), METHODS, rotation=40, ha="right", fontsize=8)
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel(f"rank of the source among {rows[0]['chunks']}")
    save_figure(fig, path)


def main(cfg):
    out = Path(cfg.out)
    if cfg.part == "all":
        begin(cfg)
        plant(cfg, read_sets(cfg))
        jobs = [(cfg, seed) for seed in numbers(cfg.seeds, int)]
        side_by_side(judge, jobs, out / "rows.jsonl", cfg.workers)
    rows = read_rows(out / "rows.jsonl")
    figure(rows, out / "paraphrase.png")
    finish(out, tables(rows))


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
