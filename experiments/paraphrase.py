"""
Whose words are these? The rank of a text's source among all training chunks, where the text is a part of the source word for word, a paraphrase,
a paraphrase in other words and another order, or only a text on a similar topic.

    pip install -r requirements-experiments.txt                              for BM25
    python experiments/paraphrase.py                                         on the text every Python installation carries
    python experiments/paraphrase.py --source=minipile.jsonl.zst --out=results/paraphrase
    python experiments/paraphrase.py --quick                                 all of it, tiny: half a minute
    python experiments/paraphrase.py --part=report --out=...                 tables and figure again, from rows.jsonl

Place in the paper: Wang et al., arXiv 2406.11011, section 5 and its appendix: sources found under paraphrase, and ranked far above BM25's rank where
a text shares only its topic. paraphrase.json beside this file holds sets of five texts, written for it: a source and the four texts above. Each
source is planted as one chunk, a domain of its own, among the chunks of --source; a run is one pass over them and values all for all texts at once.
Ranks (1 = best) of the sources among all chunks by: the run's values, summed as the paper does; the same without the steps that the ledger marks
as early; as shares of their step's values, and as z-scores within their step, for values shrink while a model learns; TracIn at the last checkpoint,
<g_chunk, g_text>; the influence function there, <g_chunk, (G + damping I)^-1 g_text> with the Gauss-Newton matrix G of some chunks, by conjugate
gradients; BM25 (k1 1.5, b .75) on words. Control: the other sets' sources for the same text, which share its register and not its topic.
Seeds move the first weights and the order, and with it the step in which a source is met; the chunks are the same.

Two cores, idle: 20 minutes (a seed takes 7 of one core for the run and 3 for the gradients). Expected on minipile, mean rank among 1995: verbatim
and paraphrase 1 by every score but the sums (7, for chunks of the first step stand before); significant paraphrase 160 summed, 44 as shares, 6.5 by
TracIn and the influence function, 23 by BM25. The other sets' sources rank little lower: at this size what is found there is mostly the register.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import config
import prepare_pile
import train
from data import open_dataset, parse_targets
from experiments.common import (
    begin,
    finish,
    markdown,
    prepare,
    pyplot,
    read_rows,
    shown,
    side_by_side,
)
from pile.documents import open_source, records
from pile.tokenizers import TOKENIZERS, GPT2Tokenizer, tokenizer
from show.run import open_run
from system.checkpoints import read_checkpoint
from system.errors import UserError

KINDS = ("partial exact", "paraphrase", "significant paraphrase", "similar topic")
METHODS = (
    "in-run",
    "in-run, early steps out",
    "in-run, share of step",
    "in-run, z in step",
    "TracIn",
    "influence function",
    "BM25",
)
TINY = dict(
    source="python",
    seeds="1,2",
    sets=2,
    chunks=160,
    vocab=1024,
    block_size=224,
    n_layer=2,
    n_head=1,
    n_embd=32,
    curvature_chunks=2,
)
CUT = 2000  # characters of a document that go into the corpus: more documents for the same chunks


@dataclass
class Config:
    source: str = "python"  # as prepare_pile.py's; its first documents, as many as chunks need
    texts: str = ""  # a file {set: {"source" and the four kinds: text}}; empty: paraphrase.json beside this one
    sets: int = 0  # of them, the first; 0: all
    seeds: str = "1,2,3"
    chunks: int = 2000  # about as many are used and ranked
    vocab: int = 8192  # GPT-2's first tokens, a sixth of the head's cost; 50257: all of them
    block_size: int = 160  # tokens of a chunk: each source has as many or more, each text as many or fewer; 128 with --vocab=50257
    rule: Literal["sgd", "sgd2", "adamw_linear", "adamw", "adamw2"] = "adamw2"
    n_layer: int = 4
    n_head: int = 2
    n_embd: int = 64
    batch_size: int = 16  # chunks of a step
    micro_batches: int = 2  # that it is cut into: with this many targets repeating the forward is cheaper for two-pass rules
    learning_rate: float = 1e-3  # falls to a tenth
    epochs: int = 1  # passes over the chunks
    damping: float = 0.01  # of the influence function
    curvature_chunks: int = 8  # its Gauss-Newton matrix is of
    cg_iterations: int = 10
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] = (
        "bfloat16" if torch.cuda.is_available() else "float32"
    )  # of the runs
    workers: int = 0  # runs side by side; 0: one a core
    data: str = "data/paraphrase"  # chunks, targets and runs, made when missing
    out: str = "out/paraphrase"
    quick: bool = False  # all of it, tiny
    part: Literal["all", "report"] = (
        "all"  # report: only the tables and the figure, from rows.jsonl
    )

    def __post_init__(self):
        if self.quick:
            vars(self).update(TINY, data=self.data + "-quick")
        for key in "chunks batch_size micro_batches epochs curvature_chunks cg_iterations".split():
            if getattr(self, key) < 1:
                raise UserError(f"--{key}={getattr(self, key)}: it must be at least 1")
        if self.batch_size % self.micro_batches:
            raise UserError(
                f"--batch_size={self.batch_size} is not a multiple of --micro_batches={self.micro_batches}"
            )


# --- GPT-2's first tokens -----------------------------------------------------------


def vocabulary(cfg):
    """The name of the tokenizer, which is known by it from here on. GPT-2's first merges are a BPE of their own."""

    class First(GPT2Tokenizer):
        n_vocab, eot, bpe = cfg.vocab, cfg.vocab - 1, None

        def __init__(self):
            if First.bpe is None:  # once: there is a target for every text
                import tiktoken

                ranks = {
                    piece: rank
                    for piece, rank in GPT2Tokenizer().bpe._mergeable_ranks.items()
                    if rank < self.eot
                }
                First.bpe = tiktoken.Encoding(
                    "first", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens={}
                )

    TOKENIZERS.setdefault(name := f"gpt2-{cfg.vocab}", First)
    return name


# --- the corpus: the source's documents, and each set's source as one chunk -------


def read_sets(cfg):
    """{set: {kind: text}}, each source cut to the tokens that fill a chunk with <|endoftext|>."""
    path, tok = Path(cfg.texts or Path(__file__).with_suffix(".json")), tokenizer(vocabulary(cfg))
    sets = dict(list(json.loads(path.read_text(encoding="utf-8")).items())[: cfg.sets or None])
    for name, texts in sets.items():
        if missing := {"source", *KINDS} - texts.keys():
            raise UserError(f"{path}: {name!r} has no {', '.join(sorted(missing))}")
        texts["source"] = tok.decode(tok.encode(texts["source"])[: cfg.block_size])
        if (
            len(tok.encode(texts["source"])) != cfg.block_size
            or texts["partial exact"] not in texts["source"]
        ):
            raise UserError(
                f"{path}: the source of {name!r} fills no chunk of --block_size={cfg.block_size}, or does not hold its part there"
            )
        if max(len(tok.encode(texts[kind])) for kind in KINDS) > cfg.block_size:
            raise UserError(
                f"{path}: a text of {name!r} is longer than --block_size={cfg.block_size} tokens"
            )
    return sets


def plant(cfg, sets):
    """The chunks -> cfg.data/chunks, and the texts -> cfg.data/texts. Raises ValueError where the chunks there are of other texts."""
    folder = Path(cfg.data)
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    tokens = cfg.chunks * (cfg.block_size + 1)
    if not (folder / "chunks/meta.json").is_file():
        pile, written = prepare_pile.Config(source=cfg.source), 0
        names, read = open_source(pile)
        with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
            for name, texts in sets.items():
                file.write(
                    json.dumps(
                        dict(text=texts["source"], meta=dict(pile_set_name=f"planted: {name}"))
                    )
                    + "\n"
                )
            for source, _, domain, text in chain.from_iterable(
                records([d], pile, Counter()) for d in chain.from_iterable(map(read, names))
            ):
                text = (text.decode(errors="replace") if isinstance(text, bytes) else text or "")[
                    :CUT
                ]
                file.write(
                    json.dumps(
                        dict(text=text, meta=dict(pile_set_name=str(domain or Path(source).stem)))
                    )
                    + "\n"
                )
                if (
                    written := written + len(text)
                ) > 8 * tokens:  # more than enough: a token is some 4 characters
                    break
    options = dict(
        tokenizer=(name := vocabulary(cfg)),
        block_size=cfg.block_size,
        val_fraction=0.0,
        limit_tokens=tokens,
        workers=1,
    )
    find_sources(
        prepare(folder / "chunks", folder / "corpus.jsonl", **options), tokenizer(name), sets
    )
    for i, (name, kind) in enumerate(product(sets, KINDS)):
        (folder / f"texts/{i}.txt").write_text(sets[name][kind], encoding="utf-8")


def find_sources(data, tok, sets):
    """{set: its source's chunk}, read back."""
    found = {}
    for name, texts in sets.items():
        planted = (
            np.flatnonzero(data.train.domain == data.domains.index(f"planted: {name}"))
            if f"planted: {name}" in data.domains
            else []
        )
        if len(planted) != 1 or tok.decode(data.train.rows[planted[0], :-1]) != texts["source"]:
            raise UserError(
                f"{data.path} was made of other texts: remove it, or write another --data"
            )
        found[name] = int(planted[0])
    return found


# --- scores: (chunks, texts), larger = more of a source ----------------------------


def train_and_value(cfg, data, targets, seed):
    """Returns the run."""
    n, B = len(data.train.rows), cfg.batch_size
    options = {
        key: getattr(cfg, key)
        for key in "rule block_size n_layer n_head n_embd learning_rate device dtype".split()
    }
    options |= dict(
        data_dir=str(data.path),
        out_dir=f"{cfg.data}/runs/{seed}",
        seed=seed,
        init_from="auto",
        targets=targets,
    )
    options |= dict(
        batch_size=B // cfg.micro_batches,
        gradient_accumulation_steps=cfg.micro_batches,
        max_iters=(steps := -(-n * cfg.epochs // B)),
    )
    options |= dict(
        warmup_iters=steps // 20,
        min_lr=cfg.learning_rate / 10,
        eval_interval=0,
        book_interval=steps,
        keep_checkpoints=1,
    )
    train.train(train.Config(**options))
    return open_run(options["out_dir"])


def value_scores(cfg, run):
    """{method: scores} of the run's values: their sums, those without the steps that the ledger marks as early, and normalised within each step."""
    B, n = cfg.batch_size, len(run.values)
    visits = run.visits[
        : n * cfg.epochs
    ]  # without those of one more pass that fill up the last step
    raw, scores = visits["value"].reshape(len(visits), -1).astype(float), []
    steps = np.split(raw, range(B, len(raw), B))
    share = np.concatenate([v / abs(v).sum(0) for v in steps])
    z = np.concatenate([(v - v.mean(0)) / np.maximum(v.std(0), 1e-30) for v in steps])
    for v in (raw, raw * ~visits["early"].astype(bool)[:, None], share, z):
        scores.append(np.zeros((n, raw.shape[1])))
        np.add.at(scores[-1], visits["chunk"], v)
    return dict(zip(METHODS[:4], scores))


def gradient_scores(cfg, run, data, targets):
    """TracIn and the influence function at the run's checkpoint; and how far conjugate gradients came, |residual| / |g| by text."""
    options = config.load(train.Config, [str(run.path / "config.json")])
    model = train.build_model(options, data, cfg.device).eval()
    model.load_state_dict(read_checkpoint(run.path / "ckpt.pt")["model"])
    params, n = list(model.parameters()), len(data.train.rows)

    def tensors(X, Y):
        return torch.as_tensor(X, device=cfg.device), torch.as_tensor(Y, device=cfg.device)

    gradients = [
        flat(torch.autograd.grad(model(*tensors(*target.batch([0])))[1], params))
        for target in targets
    ]
    sample = np.random.default_rng(options.seed).choice(
        n, min(n, cfg.curvature_chunks), replace=False
    )
    solved, residuals = solve(
        cfg, model, *tensors(*data.train.batch(sample, cfg.block_size)), gradients
    )
    directions = torch.stack([*gradients, *solved]).split([p.numel() for p in params], 1)
    for p, h in zip(params, directions):
        p.h = h.reshape(
            -1, *p.shape
        )  # the ledger's: a chunk's <gradient, direction> comes out of its own backward
    scores = []
    for ids in np.split(np.arange(n), range(cfg.batch_size, n, cfg.batch_size)):
        ledger = torch.zeros(len(ids), 2 * len(targets), device=cfg.device, requires_grad=True)
        model(*tensors(*data.train.batch(ids, cfg.block_size)), ledger)[1].backward()
        scores.append(ledger.grad.double().cpu().numpy() * len(ids))
        model.zero_grad(set_to_none=True)
    return dict(zip(METHODS[4:6], np.split(np.concatenate(scores), 2, 1))), residuals


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def solve(cfg, model, X, Y, gradients):
    """(G + damping I)^-1 g of each g, by conjugate gradients. G = J^T H J / tokens, H = diag(p) - p p^T of each token of X, Y."""
    from scipy.sparse.linalg import LinearOperator, cg
    from torch.nn.attention import SDPBackend, sdpa_kernel

    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the one that can be differentiated twice
        logits = model(X, Y)[0].flatten(0, 1)
        u = torch.zeros_like(logits, requires_grad=True)
        pulled = flat(
            torch.autograd.grad(logits, params, u, create_graph=True)
        )  # J^T u: linear in u, so its derivative is J
    p = logits.detach().softmax(1)

    def damped(v):
        v = torch.as_tensor(v, dtype=pulled.dtype, device=pulled.device)
        jv = torch.autograd.grad(pulled, u, v, retain_graph=True)[0]
        hjv = p * (jv - (p * jv).sum(1, keepdim=True)) / len(p)
        return (
            (flat(torch.autograd.grad(logits, params, hjv, retain_graph=True)) + cfg.damping * v)
            .cpu()
            .numpy()
        )

    system, solved, residuals = LinearOperator((len(pulled),) * 2, damped, dtype=np.float32), [], []
    for g in gradients:
        b = g.cpu().numpy()
        x, _ = cg(system, b, rtol=1e-3, maxiter=cfg.cg_iterations)
        solved.append(torch.as_tensor(x, dtype=g.dtype, device=g.device))
        residuals.append(float(np.linalg.norm(damped(x) - b) / np.linalg.norm(b)))
    return solved, residuals


def bm25_scores(data, tok, texts):
    from rank_bm25 import BM25Okapi

    words = partial(re.findall, r"\w+")
    chunks = [tok.decode(row[row != tok.eot]) for row in data.train.rows]
    bm25 = BM25Okapi([words(text.lower()) for text in chunks], k1=1.5, b=0.75)
    return np.stack([bm25.get_scores(words(text.lower())) for text in texts], 1)


def rank(scores, chunk):
    """Of a chunk, 1 = the largest score; among equal ones the middle."""
    return float((scores > scores[chunk]).sum() + ((scores == scores[chunk]).sum() + 1) / 2)


def judge(cfg, seed):
    """One run: a row for every set, kind and method."""
    sets = read_sets(cfg)
    tok, data = tokenizer(vocabulary(cfg)), open_dataset(f"{cfg.data}/chunks")
    planted, asked = find_sources(data, tok, sets), list(product(sets, KINDS))
    spec = ",".join(f"{i}={cfg.data}/texts/{i}.txt" for i in range(len(asked)))
    run = train_and_value(cfg, data, spec, seed)
    scores = value_scores(cfg, run)
    of_gradients, residuals = gradient_scores(
        cfg, run, data, parse_targets(spec, data, cfg.block_size)
    )
    scores |= of_gradients | {
        "BM25": bm25_scores(data, tok, [sets[name][kind] for name, kind in asked])
    }
    rows, about = (
        [],
        dict(
            seed=seed,
            rule=cfg.rule,
            chunks=len(data.train.rows),
            steps=run.info["committed_step"],
            batch=cfg.batch_size,
        ),
    )
    for k, (name, kind) in enumerate(asked):
        visit = run.visits_of([planted[name]])[0]
        batch, own = (
            run.visits[run.visits["step"] == visit["step"]]["value"].reshape(-1, len(asked))[:, k],
            visit["value"].reshape(-1)[k],
        )
        about |= dict(
            set=name,
            kind=kind,
            chunk=planted[name],
            step=int(visit["step"]),
            in_step=1 + int((batch > own).sum()),
        )
        about |= dict(
            loss=float(run.visits["loss"][-10 * cfg.batch_size :].mean()), residual=residuals[k]
        )
        for method, s in scores.items():
            ranks = {other: rank(s[:, k], chunk) for other, chunk in planted.items()}
            rows.append(
                dict(
                    about,
                    method=method,
                    rank=ranks.pop(name),
                    others=[*ranks.values()],
                    score=float(s[planted[name], k]),
                )
            )
    return rows


# --- tables and figure -------------------------------------------------------------


def select(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def of_sets(rows):
    """The mean rank of each set over the seeds: what the standard error is taken over, for BM25 knows no seed."""
    return [
        np.mean([row["rank"] for row in select(rows, set=name)])
        for name in sorted({row["set"] for row in rows})
    ]


def tables(rows):
    n, seeds, sets = (
        rows[0]["chunks"],
        len({r["seed"] for r in rows}),
        len({r["set"] for r in rows}),
    )
    random = "random order", *[f"{(n + 1) / 2:.1f}"] * len(KINDS)
    lines = [
        f"Rank of the source among {n} chunks (1 = best), {sets} sets x {seeds} seeds, rule {rows[0]['rule']}:"
    ]
    lines += [
        "mean ± standard error over the sets (each the mean of its seeds), and median over all.",
        "",
    ]

    def table(cell):
        return markdown(
            ["score", *KINDS],
            [[m, *(cell(select(rows, method=m, kind=kind)) for kind in KINDS)] for m in METHODS],
        )

    lines += table(lambda of: f"{shown(of_sets(of), 1)} ({np.median([r['rank'] for r in of]):g})")
    lines += markdown(random, [])[:1]
    lines += [
        "",
        "The same in percent of the chunks ranked before the source, median over all (highest).",
        "",
    ]
    lines += table(
        lambda of: "{:.2f} ({:.2f})".format(
            *(100 * (f([r["rank"] for r in of]) - 1) / n for f in (np.median, max))
        )
    )
    lines += ["", "Control: the other sets' sources for the same texts, median rank over all.", ""]
    lines += table(lambda of: f"{np.median([r['others'] for r in of]):g}")
    lines += [
        "",
        f"How often the source stands before all {sets - 1} of them; by chance {1 / sets:.0%}.",
        "",
    ]
    lines += table(
        lambda of: f"{np.mean([r['rank'] < min(r['others'], default=np.inf) for r in of]):.0%}"
    )
    B, of = rows[0]["batch"], select(rows, method="in-run")
    lines += [
        "",
        f"In-run: rank of the source among the {B} chunks of its own step: mean, and how often it is first.",
        "",
    ]
    first = [[r["in_step"] for r in select(of, kind=kind)] for kind in KINDS]
    lines += markdown(
        ["", *KINDS],
        [[f"of {B}", *(f"{np.mean(x):.2f} ({np.mean(np.array(x) == 1):.0%})" for x in first)]],
    )
    lines += ["", "In-run: median rank by when the source was met, in thirds of the run.", ""]
    cells = []
    for method, (third, name) in product(METHODS[:4], enumerate(("first", "second", "last"))):
        met = [r for r in select(rows, method=method) if int(3 * r["step"] / r["steps"]) == third]
        if met:
            runs = len(met) // len(KINDS)
            cells.append(
                [
                    f"{method}, {name} third",
                    runs,
                    *(f"{np.median([r['rank'] for r in select(met, kind=k)]):g}" for k in KINDS),
                ]
            )
    return [*lines, *markdown(["score, source met in the", "sets x seeds", *KINDS], cells)]


def figure(rows, path):
    """Every set and seed a dot, by kind and method, on a logarithmic axis; a bar at the median."""
    plt = pyplot()
    fig, axes = plt.subplots(1, len(KINDS), figsize=(12, 3.8), sharey=True)
    rng = np.random.default_rng(0)
    for ax, kind in zip(axes, KINDS):
        for x, method in enumerate(METHODS):
            ranks = [row["rank"] for row in select(rows, kind=kind, method=method)]
            ax.plot(
                x + rng.uniform(-0.25, 0.25, len(ranks)),
                ranks,
                "o",
                color=f"C{x}",
                markersize=4,
                alpha=0.6,
            )
            ax.plot([x - 0.35, x + 0.35], [np.median(ranks)] * 2, color=f"C{x}", linewidth=2)
        ax.axhline((rows[0]["chunks"] + 1) / 2, color="gray", linestyle="--", linewidth=1)
        ax.set_title(kind)
        ax.set_yscale("log")
        ax.set_xticks(range(len(METHODS)), METHODS, rotation=40, ha="right", fontsize=8)
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel(f"rank of the source among {rows[0]['chunks']}")
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main(cfg):
    path = Path(cfg.out, "rows.jsonl")
    if cfg.part == "all":
        begin(cfg)
        plant(cfg, read_sets(cfg))
        side_by_side(judge, [(cfg, int(seed)) for seed in cfg.seeds.split(",")], path, cfg.workers)
    rows = read_rows(path)
    figure(rows, path.with_name("paraphrase.png"))
    finish(path.parent, tables(rows))


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
