"""
Does training without the chunks of negative value help? The paper's curation experiment, with the controls that its comparison lacks.

    python experiments/curation.py --source=minipile.jsonl.zst --foreign="Handbook de+fr+es" --out=results/curation
    python experiments/curation.py --quick                     tiny, on the text every Python installation carries
    python experiments/curation.py --part=report --out=...     tables and figure again, from rows.jsonl and values.jsonl

Claim (Wang et al., arXiv 2406.11011, section 5.1): of GPT-2 on the Pile, training without the 16 % of chunks whose value is negative reaches a given
test loss in about 25 % fewer iterations. Public attempts to repeat it found no gain.

Here: a value run on all chunks, then train.py from scratch on what curate.py keeps: all; without the chunks of negative value (the paper's arm);
without the documents of negative share; without a fraction of the documents by share, by value, by training loss, the most positive (the reverse),
and at random. Twice: on clean text, and with a fifth of planted junk: shuffled tokens, base64, copies of three documents, another language. The
target is held-out clean documents, the test others. Every arm trains for the same number of iterations; that of all chunks then goes on for as many
as the value run took (`equal tokens`: the value run is not free). The learning rate is constant after a warm-up, so that every point of a curve may
be compared. Test losses are the mean of the last three evaluations.

Two cores: 75 minutes for everything (81 runs of about 40 s of one core, 6 value runs of 3 minutes). Expected: with junk, a quarter of the documents
by share .03 nats below as many at random; AUROC by document .96 and .97 for shuffled tokens and base64; on clean text nothing beyond two standard
errors.
"""

import base64
import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import config
import curate
import train
from data import open_dataset
from experiments.common import (
    begin,
    finish,
    forget_run,
    markdown,
    prepare,
    pyplot,
    read_rows,
    shown,
    side_by_side,
)
from pile.documents import open_source, records
from pile.tokenizers import tokenizer
from prepare_pile import Config as PileConfig
from show.run import open_run
from system.errors import UserError

JUNK = ("shuffled tokens", "base64", "duplicates", "wrong language")


@dataclass
class Config:
    source: str = "python"  # as in prepare_pile.py
    foreign: str = ""  # the domain that is the wrong language, and no part of the clean text; empty: junk without it
    data: str = "data/curation"  # the prepared chunks, made when missing
    out: str = "out/curation"
    conditions: str = "clean,junk"
    fractions: str = ".1,.25"  # of the documents
    arms: str = ""  # comma-separated: only these, named as in the tables; empty: all
    seeds: str = "1,2,3"
    tokens: int = 480_000  # of the training set
    junk: float = 0.2  # its share of planted junk
    document: int = 1500  # a document is cut to so many characters, so that there are many
    tokenizer: Literal["gpt2", "byte"] = "byte"
    block_size: int = 256
    batch_size: int = 8
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    learning_rate: float = 3e-3
    rule: str = "adamw2"
    target_batch: int = 16
    value_iters: int = 500  # of the value run: two passes
    iters: int = 500  # of the others
    eval_interval: int = 25
    eval_chunks: int = 12  # of each domain
    workers: int = 0  # runs side by side; 0: a core each
    quick: bool = False
    part: Literal["all", "retrain", "report"] = (
        "all"  # retrain: the value runs are there; report: only the tables and the figure
    )

    def __post_init__(self):
        if self.quick:
            (
                self.tokens,
                self.value_iters,
                self.iters,
                self.seeds,
                self.fractions,
                self.eval_interval,
            ) = 60_000, 20, 20, "1,2", ".2", 5
            self.eval_chunks, self.n_embd, self.target_batch, self.data, self.out = (
                2,
                32,
                4,
                f"{self.data}-quick",
                f"{self.out}-quick",
            )


# --- the text -----------------------------------------------------------------------


def documents(cfg):
    """(domain, text) of the source, each cut to cfg.document characters."""
    pile = PileConfig(source=cfg.source)
    names, read = open_source(pile)
    for name in names:
        for document in read(name):
            for _, _, domain, text in records([document], pile, Counter()):
                text = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
                if len(text) > 200:
                    yield domain, text[: cfg.document]


def chance(text):
    return (
        int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=6).digest())
        / 2**48
    )


def write_corpus(cfg, folder):
    """clean.jsonl, junk.jsonl (the same documents and a cfg.junk share of junk, a domain a kind) and target.txt, all of different documents."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, encode = np.random.default_rng(0), tokenizer(cfg.tokenizer)
    found = sorted(set(documents(cfg)), key=lambda d: chance(d[1]))
    foreign = [text for domain, text in found if domain == cfg.foreign]
    clean = [d for d in found if d[0] != cfg.foreign]
    size = lambda text: len(encode.encode(text))

    def up_to(tokens, texts):
        """As many of them as make this many tokens."""
        for item in texts:
            tokens -= size(item if isinstance(item, str) else item[1])
            yield item
            if tokens < 0:
                return
        raise UserError(
            f"--source={cfg.source} has too little text for --tokens={cfg.tokens}: lower --tokens"
        )

    rest = iter(clean)
    target = list(up_to(cfg.tokens // 12, rest))
    kept = list(up_to(int(cfg.tokens * 1.12), rest))  # a tenth of them will be the test's
    spare = [text for _, text in up_to(cfg.tokens // 2, rest)]

    def shuffle(text):
        return (
            encode.decode(rng.permutation(encode.encode(text)))
            if cfg.tokenizer == "gpt2"
            else "".join(rng.permutation(list(text)))
        )

    kinds = {
        JUNK[0]: (shuffle(text) for text in spare),
        JUNK[1]: (base64.b64encode(text.encode()).decode() for text in spare[::-1]),
    }
    kinds[JUNK[2]] = (f"{i}\n{spare[i % 3]}" for i in range(10**9))
    kinds |= {JUNK[3]: iter(foreign)} if cfg.foreign else {}
    each = cfg.tokens * cfg.junk / (1 - cfg.junk) / len(kinds) * 1.1
    junk = [(kind, text) for kind, texts in kinds.items() for text in up_to(each, texts)]
    for name, chosen in (("clean", kept), ("junk", kept + junk)):
        lines = (
            json.dumps(dict(text=text, meta=dict(pile_set_name=domain))) + "\n"
            for domain, text in chosen
        )
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "target.txt").write_text("\n\n".join(text for _, text in target), encoding="utf-8")


# --- the runs -----------------------------------------------------------------------


def settings(cfg, condition, seed, out, **more):
    common = dict(
        data_dir=f"{cfg.data}/{condition}",
        out_dir=str(out),
        overwrite=True,
        seed=seed,
        targets=f"clean={cfg.data}/target.txt",
    )
    common |= dict(
        batch_size=cfg.batch_size,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        n_embd=cfg.n_embd,
        block_size=cfg.block_size,
    )
    common |= dict(
        learning_rate=cfg.learning_rate,
        min_lr=cfg.learning_rate,
        warmup_iters=cfg.iters // 15,
        book_interval=10**9,
        eval_chunks=cfg.eval_chunks,
    )
    return train.Config(**common | dict(checkpoint_interval=10**9, log_interval=100) | more)


def arms(cfg, condition):
    """Name -> (options of curate.py, None for all chunks; the arm that drops as many at random)."""
    documents, found = dict(by="document"), {"all": (None, None)}
    found["negative chunks"] = {}, "as many chunks at random"
    found["as many chunks at random"] = dict(random=True), None
    found["negative documents"] = documents | dict(score="share"), "as many documents at random"
    found["as many documents at random"] = documents | dict(score="share", random=True), None
    for text in cfg.fractions.split(","):
        fraction, common = f"{float(text):.0%}", documents | dict(drop_fraction=float(text))
        for name, options in dict(
            share=dict(score="share"),
            value={},
            loss=dict(score="loss"),
            largest=dict(score="share", invert=True),
        ).items():
            if name in ("share", "loss") or text == cfg.fractions.split(",")[-1]:
                found[f"{fraction} by {name}"] = common | options, f"{fraction} at random"
        found[f"{fraction} at random"] = common | dict(random=True), None
    found |= {"the junk itself": ("oracle", None)} if condition == "junk" else {}
    return {name: arm for name, arm in found.items() if not cfg.arms or name in cfg.arms.split(",")}


def is_junk(data):
    return np.isin(data.train.domain, [d for d, name in enumerate(data.domains) if name in JUNK])


def value(cfg, condition, seed):
    """The value run. Rows: how well each score tells each kind of junk from text, as AUROC, by chunk and by document."""
    from scipy import stats

    out, rows = Path(cfg.data, "runs", f"{condition}-{seed}"), []
    train.train(
        settings(
            cfg,
            condition,
            seed,
            out,
            rule=cfg.rule,
            target_batch=cfg.target_batch,
            max_iters=cfg.value_iters,
            eval_interval=0,
        )
    )
    run = open_run(out)
    names = np.array(run.domains)
    for score in ("value", "share", "loss"):
        moments = curate.chunk_scores(run, 0, score)
        of_documents, _, domain, _ = curate.document_scores(run, moments)
        for unit, (count, *sums), kind_of in (
            ("chunk", moments, names[run.data.train.domain]),
            ("document", of_documents, names[domain.astype(int)]),
        ):
            used = count > 0
            scores, _ = curate.score_and_error(
                count[used], *(x[used] for x in sums), summed=score == "value"
            )
            text, row = (
                ~np.isin(kind_of[used], JUNK),
                dict(condition=condition, seed=seed, unit=unit, score=score),
            )
            row |= {
                "negative, text": float((scores[text] < 0).mean()),
                "negative, junk": float((scores[~text] < 0).mean()) if not text.all() else None,
            }
            for kind in (*JUNK, "any"):
                junk = ~text if kind == "any" else kind_of[used] == kind
                if junk.any():
                    row[kind] = float(
                        stats.mannwhitneyu(-scores[junk], -scores[text]).statistic
                        / junk.sum()
                        / text.sum()
                    )
            rows.append(row)
    return rows


def retrain(cfg, condition, seed, arm, options):
    """One run on what is kept. A row: its test losses, on clean text, and how much of each kind of junk it was spared."""
    valued, out = (
        Path(cfg.data, "runs", f"{condition}-{seed}"),
        Path(cfg.data, "runs", f"{condition}-{seed}-{arm}".replace(" ", "_")),
    )
    data, keep = open_dataset(f"{cfg.data}/{condition}"), ""
    kept = np.ones(len(data.train.rows), bool)
    if options is not None:
        out.mkdir(parents=True, exist_ok=True)
        keep = str(out / "keep.npy")
        if options == "oracle":
            np.save(keep, np.flatnonzero(~is_junk(data)))
        else:
            curate.curate(
                curate.Config(run=str(valued), out=str(out), overwrite=True, seed=seed, **options)
            )
        kept[:] = False
        kept[np.load(keep)] = True
    iters = cfg.iters + (cfg.value_iters if arm == "all" else 0)
    train.train(
        settings(
            cfg,
            condition,
            seed,
            out,
            keep=keep,
            rule="off",
            max_iters=iters,
            eval_interval=cfg.eval_interval,
        )
    )
    lines = [json.loads(line) for line in open(out / "evaluations.jsonl")]
    sizes = np.bincount(data.val.domain, minlength=len(data.domains))
    clean = [(name, n) for name, n in zip(data.domains, sizes) if n and name not in JUNK]
    curve = [
        (
            e["step"],
            float(
                np.average([e["loss"][name] for name, _ in clean], weights=[n for _, n in clean])
            ),
        )
        for e in lines
    ]
    junk = is_junk(data)
    row = dict(
        condition=condition,
        seed=seed,
        arm=arm,
        kept=float(kept.mean()),
        junk_left=float(junk[kept].mean()),
        curve=curve,
    )
    row |= {
        f"dropped: {name}": float((~kept[data.train.domain == d]).mean())
        for d, name in enumerate(data.domains)
        if name in JUNK
    }
    forget_run(out)
    return [row | {"dropped: text": float((~kept[~junk]).mean())}]


# --- tables and figure --------------------------------------------------------------


def at(curve, step):
    """Mean of the last three evaluations up to a step."""
    return float(np.mean([loss for s, loss in curve if s <= step][-3:]))


def reached(curve, loss):
    """The iterations after which three evaluations in a row average at most this; NaN: never."""
    smooth = [
        (curve[i][0], np.mean([x for _, x in curve[i - 2 : i + 1]])) for i in range(2, len(curve))
    ]
    return next((float(step) for step, x in smooth if x <= loss), np.nan)


def tables(cfg, rows, scores):
    lines = []
    for condition in dict.fromkeys(r["condition"] for r in rows):
        of = {(r["arm"], r["seed"]): r for r in rows if r["condition"] == condition}
        named = {
            arm: control
            for arm, (_, control) in arms(cfg, condition).items()
            if any(name == arm for name, _ in of)
        }
        seeds = {arm: sorted(seed for name, seed in of if name == arm) for arm in named}
        final = {key: at(r["curve"], cfg.iters) for key, r in of.items()}
        less = lambda a, b: [final[a, s] - final[b, s] for s in seeds[a] if (b, s) in final]  # noqa: B023
        longer = [at(of["all", s]["curve"], cfg.iters + cfg.value_iters) for s in seeds["all"]]
        gained = shown([x - final["all", s] for x, s in zip(longer, seeds["all"])], 4)
        table = [
            [
                "all",
                len(seeds["all"]),
                "",
                shown([final["all", s] for s in seeds["all"]], 4),
                *[""] * 5,
            ]
        ]
        table += [["all, equal tokens", len(seeds["all"]), "", shown(longer, 4), gained, *[""] * 4]]
        for arm, control in list(named.items())[1:]:
            runs = [of[arm, s] for s in seeds[arm]]
            saved = np.array(
                [
                    1 - reached(r["curve"], final.get(("all", r["seed"]), np.nan)) / cfg.iters
                    for r in runs
                ]
            )
            figures = [
                len(runs),
                f"{np.mean([1 - r['kept'] for r in runs]):.1%}",
                shown([final[arm, s] for s in seeds[arm]], 4),
            ]
            figures.append(shown(less(arm, "all"), 4))
            figures += [
                shown(less(arm, control), 4) if control in named else "",
                f"{np.isfinite(saved).sum()} of {len(saved)}",
            ]
            figures += [shown(saved[np.isfinite(saved)], 2) if np.isfinite(saved).any() else ""]
            table.append(
                [arm, *figures, shown([at(r["curve"], cfg.iters * r["kept"]) for r in runs], 4)]
            )
        head = [
            "dropped",
            "seeds",
            "of the chunks",
            "test loss",
            "less: all",
            "less: as many at random",
            "reach the loss with all",
        ]
        head += ["iterations they save"]
        lines += [
            f"### {condition}: nats a token",
            "",
            *markdown([*head, "test loss after as many passes as with all"], table),
            "",
        ]
        if condition == "junk":
            kinds = [key for key in next(iter(of.values())) if key.startswith("dropped: ")]
            table = [
                [arm, *(f"{np.mean([of[arm, s][kind] for s in seeds[arm]]):.0%}" for kind in kinds)]
                for arm in named
                if arm != "all"
            ]
            head = ["arm", *(kind.removeprefix("dropped: ") for kind in kinds)]
            lines += ["### What each arm dropped, of the chunks", "", *markdown(head, table), ""]
    kinds, table = (
        [
            kind
            for kind in (*JUNK, "any", "negative, text", "negative, junk")
            if any(r.get(kind) is not None for r in scores)
        ],
        [],
    )
    for key in sorted({(r["condition"], r["unit"], r["score"]) for r in scores}):
        same = [r for r in scores if (r["condition"], r["unit"], r["score"]) == key]
        table.append(
            [
                *key,
                *(
                    shown([r[kind] for r in same]) if same[0].get(kind) is not None else ""
                    for kind in kinds
                ),
            ]
        )
    lines += [
        "### Value run: AUROC of a small score, junk of each kind against text; share of negative scores",
        "",
    ]
    return [*lines, *markdown(["condition", "unit", "score", *kinds], table)]


def figure(cfg, rows, path):
    plt = pyplot()
    conditions = list(dict.fromkeys(r["condition"] for r in rows))
    fig, axes = plt.subplots(
        1, len(conditions), figsize=(6.5 * len(conditions), 4.2), squeeze=False
    )
    for ax, condition in zip(axes[0], conditions):
        base = {
            r["seed"]: dict(r["curve"])
            for r in rows
            if r["condition"] == condition and r["arm"] == "all"
        }
        for i, arm in enumerate(arm for arm in arms(cfg, condition) if arm != "all"):
            of = [r for r in rows if (r["condition"], r["arm"]) == (condition, arm)]
            steps = [s for s, _ in of[0]["curve"] if s > cfg.iters // 10]
            gaps = np.array([[dict(r["curve"])[s] - base[r["seed"]][s] for s in steps] for r in of])
            gaps = np.array(
                [[g[max(0, j - 2) : j + 1].mean() for j in range(len(steps))] for g in gaps]
            )
            mean, error = (
                gaps.mean(0),
                gaps.std(0, ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else 0,
            )
            style = "--" if "random" in arm else ":" if "loss" in arm or "largest" in arm else "-"
            ax.plot(steps, mean, style, color=f"C{i % 10}", label=arm)
            ax.fill_between(steps, mean - error, mean + error, color=f"C{i % 10}", alpha=0.15)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_title(f"{condition}: test loss less that of all chunks")
        ax.set_xlabel("iterations")
        ax.legend(fontsize=7)
    axes[0, 0].set_ylabel("nats a token (below 0: better than all)")
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main(cfg):
    out = Path(cfg.out)
    if cfg.part != "report":
        begin(cfg)
        folder, conditions, seeds = (
            Path(cfg.data),
            cfg.conditions.split(","),
            [int(s) for s in cfg.seeds.split(",")],
        )
        if not (folder / "target.txt").is_file():
            write_corpus(cfg, folder)
        for condition in conditions:
            prepare(
                folder / condition,
                folder / f"{condition}.jsonl",
                tokenizer=cfg.tokenizer,
                block_size=cfg.block_size,
                val_fraction=0.1,
            )
        jobs = [(cfg, condition, seed) for seed in seeds for condition in conditions]
        if cfg.part == "all":
            side_by_side(value, jobs, out / "values.jsonl", cfg.workers)
        jobs = [
            (*job, arm, options) for job in jobs for arm, (options, _) in arms(cfg, job[1]).items()
        ]
        side_by_side(retrain, jobs, out / "rows.jsonl", cfg.workers)
    rows, scores = read_rows(out / "rows.jsonl"), read_rows(out / "values.jsonl")
    finish(out, tables(cfg, rows, scores))
    figure(cfg, rows, out / "curation.png")


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
