"""
Which pairs hurt a fine-tuning?

    python experiments/finetune.py --source=minipile.jsonl.zst --out=results/finetune
    python experiments/finetune.py                           on the text every Python installation
                                                             carries
    python experiments/finetune.py --quick                   tiny
    python experiments/finetune.py --part=report --out=...   the table again, from rows.jsonl
    python experiments/finetune.py --part=trainer --out=...  the valued run of the first seed again,
                                                             by transformers.Trainer (trainer.py)

A small GPT-2 is trained on half of the domains, written out for transformers (export.py) and read
again (--init_from=hf:...). It is then fine-tuned on pairs from the other domains: the beginning of
a paragraph is the prompt, what follows the answer, and only that has labels. A fifth of the pairs
is junk: the characters of the answer are in another order (--junk=shuffled), or it is the answer of
another pair (swapped). The target is a set of true pairs, the test another.

Asked: do values tell the junk pairs from the true ones (AUROC; each pair is met once), and does
fine-tuning without the fifth of the pairs of least score help: by hindsight, by share of the step,
by training loss, as many at random, and without the junk itself. Every arm makes the same number of
steps, in an order of its own. Seeds move the order, the junk and the draws; the model that the
fine-tuning begins with is the same.
"""

import json
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from scipy import stats

import config
import curate
import export
import prepare_pile
import revalue
import train
from data import open_dataset, parse_targets
from experiments.common import (
    begin,
    column,
    finish,
    forget_run,
    json_line,
    markdown,
    numbers,
    read_documents,
    read_rows,
    select,
    set_options,
    shown,
    side_by_side,
)
from model import GPT
from show.run import open_run
from show.scores import chunk_scores
from system.checkpoints import read_checkpoint
from system.errors import UserError
from system.files import remove_folder
from system.folder import RUN_FILES

TRUE, JUNK = "true pairs", "junk pairs"
SCORES = ("hindsight", "value", "share", "loss")
DROPPED = 0.2
QUICK = {"pairs": 160, "text": 200_000, "seeds": "1,2", "pretrain_iters": 30, "n_embd": 16}


@dataclass
class Config:
    source: str = "python"  # as in prepare_pile.py
    data: str = "data/finetune"  # text, pairs and runs
    out: str = "out/finetune"
    seeds: str = "1,2,3"
    text: int = 3_000_000  # bytes to pretrain on
    pairs: int = 2400  # to fine-tune on, with the junk; a tenth as many are target, and test
    junk: Literal["shuffled", "swapped"] = "shuffled"
    prompt: int = 60  # bytes of a prompt at most
    answer: int = 90  # of an answer
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 64
    pretrain_iters: int = 1500
    batch_size: int = 8
    learning_rate: float = 3e-4  # of the fine-tuning
    workers: int = 0  # runs side by side; 0: a core each
    quick: bool = False
    part: Literal["all", "report", "trainer"] = "all"

    def __post_init__(self):
        if self.quick:
            set_options(self, QUICK)
            self.data += "-quick"
            self.out += "-quick"

    @property
    def block_size(self):
        return self.prompt + self.answer + 2


# --- text and pairs -----------------------------------------------------------------


def halves(cfg):
    """-> texts of the domains to pretrain on, [(domain, text)], and prompts and answers of the
    others."""
    by_domain = {}
    for file, domain, text in read_documents(cfg.source):
        by_domain.setdefault(domain or file, []).append(text)
    names = sorted(by_domain, key=lambda name: -sum(map(len, by_domain[name])))
    documents, pairs = [], []
    for name in names[::2]:
        documents += [(name, text) for text in by_domain[name]]
    for name in names[1::2]:
        for text in by_domain[name]:
            pairs += cut(cfg, text)
    return documents, pairs


def cut(cfg, text):
    """The prompts and answers of a text's long paragraphs."""
    for paragraph in text.split("\n\n"):
        words = paragraph.encode("ascii", "ignore").decode().strip()
        if len(words) >= cfg.prompt + cfg.answer:
            yield words[: cfg.prompt], words[cfg.prompt : cfg.prompt + cfg.answer]


def write_pairs(path, pairs, kinds):
    with open(path, "w", encoding="utf-8") as file:
        for (prompt, answer), kind in zip(pairs, kinds):
            record = {"prompt": prompt, "answer": answer, "meta": {"pile_set_name": kind}}
            file.write(json.dumps(record) + "\n")


def write_text(cfg, folder):
    """The text to pretrain on, prepared, and the pairs: all that seeds share."""
    folder.mkdir(parents=True, exist_ok=True)
    documents, pairs = halves(cfg)
    n_more = cfg.pairs // 10
    if len(pairs) < cfg.pairs + 2 * n_more:
        what = f"{cfg.source} has {len(pairs)} pairs"
        raise UserError(f"{what}: lower --pairs, or take a larger source")
    room = cfg.text
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for domain, text in documents:
            room -= len(text)
            file.write(json_line(text, domain))
            if room < 0:
                break
    order = np.random.default_rng(0).permutation(len(pairs))
    shuffled = iter([pairs[i] for i in order])
    for name in ("target", "test"):
        chosen = list(islice(shuffled, n_more))
        write_pairs(folder / f"{name}.jsonl", chosen, [TRUE] * n_more)
    prepare_pile.prepare(
        prepare_pile.Config(
            source=str(folder / "text.jsonl"),
            data_dir=str(folder / "text"),
            tokenizer="byte",
            block_size=cfg.block_size,
            val_fraction=0.05,
        )
    )
    return list(islice(shuffled, cfg.pairs))


def prepare_pairs(cfg, folder, pairs, seed):
    """The pairs of a seed, a fifth of them junk, as a data set."""
    rng = np.random.default_rng(seed)
    is_junk = np.zeros(len(pairs), bool)
    is_junk[rng.choice(len(pairs), len(pairs) // 5, replace=False)] = True
    answers = [answer for _, answer in pairs]
    junk = np.flatnonzero(is_junk)
    for i, j in zip(junk, np.roll(junk, 1)):
        if cfg.junk == "swapped":
            answers[i] = pairs[j][1]
        else:
            answers[i] = "".join(rng.permutation(list(answers[i])))
    mixed = [(prompt, answer) for (prompt, _), answer in zip(pairs, answers)]
    source = folder / f"pairs-{seed}.jsonl"
    write_pairs(source, mixed, np.where(is_junk, JUNK, TRUE).tolist())
    prepare_pile.prepare(
        prepare_pile.Config(
            source=str(source),
            data_dir=str(folder / f"pairs-{seed}"),
            tokenizer="byte",
            block_size=cfg.block_size,
            prompt_key="prompt",
            answer_key="answer",
            val_fraction=0,
            workers=1,
        )
    )


# --- runs ---------------------------------------------------------------------------


def pretrain(cfg, folder):
    """-> the folder of its weights."""
    run = folder / "pretrained"
    options = dict(data_dir=str(folder / "text"), out_dir=str(run), overwrite=True, rule="off")
    sizes = dict(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd)
    train.train(
        train.Config(
            **options,
            **sizes,
            bias=True,
            batch_size=16,
            max_iters=cfg.pretrain_iters,
            learning_rate=1e-3,
            min_lr=1e-4,
            warmup_iters=cfg.pretrain_iters // 15,
            checkpoint_interval=10**9,
            eval_interval=0,
            log_interval=100,
        )
    )
    return export.export(export.Config(run=str(run), overwrite=True))


def fine_tune(cfg, folder, seed, out, weights, steps, **options):
    train.train(
        train.Config(
            data_dir=str(folder / f"pairs-{seed}"),
            out_dir=str(out),
            overwrite=True,
            init_from=f"hf:{weights}",
            targets=f"target={folder / 'target.jsonl'}",
            seed=seed,
            batch_size=cfg.batch_size,
            max_iters=steps,
            learning_rate=cfg.learning_rate,
            min_lr=cfg.learning_rate / 10,
            warmup_iters=steps // 10,
            book_interval=10**9,
            checkpoint_interval=10**9,
            eval_interval=0,
            log_interval=100,
            **options,
        )
    )


@torch.no_grad()
def test_loss(cfg, folder, seed, run):
    """Nats a token of the answers of the test."""
    data = open_dataset(folder / f"pairs-{seed}")
    (target,) = parse_targets(f"test={folder / 'test.jsonl'}", data, cfg.block_size)
    model = GPT.from_checkpoint(read_checkpoint(run / "ckpt.pt")).eval()
    X, Y = (torch.as_tensor(x) for x in target.batch(np.arange(len(target))))
    return float(model(X, Y)[1])


def auroc(score, is_junk):
    """Of a junk pair standing below a true one."""
    wins = stats.mannwhitneyu(-score[is_junk], -score[~is_junk]).statistic
    return float(wins / is_junk.sum() / (~is_junk).sum())


def job(settings, folder, weights, seed):
    """The fine-tuning of a seed, its values, and the arms. Returns rows."""
    cfg, folder = Config(**settings), Path(folder)
    steps = cfg.pairs // cfg.batch_size  # each pair once
    out = folder / f"run-{seed}"
    options = {"rule": "adamw2", "target_batch": 16}
    fine_tune(cfg, folder, seed, out, weights, steps, **options)
    name = "hindsight"
    looked = revalue.revalue(
        revalue.Config(run=str(out), hindsight=True, name=name, overwrite=True)
    )
    data = open_dataset(folder / f"pairs-{seed}")
    is_junk = data.train.domain == data.domains.index(JUNK)
    rows = []
    for score in SCORES:
        run = open_run(looked if score == "hindsight" else out)
        units = chunk_scores(run, 0, "value" if score == "hindsight" else score)
        of_pair, _ = curate.score_and_error(units, summed=score in ("hindsight", "value"))
        used = units.visits > 0
        found = auroc(of_pair[used], is_junk[used])
        rows.append({"seed": seed, "score": score, "auroc": found})
    rows.append({"seed": seed, "arm": "all", "loss": test_loss(cfg, folder, seed, out)})
    for arm in ("hindsight", "share", "loss", "at random", "the junk itself"):
        again = folder / f"run-{seed}-{arm.replace(' ', '-')}"
        again.mkdir(parents=True, exist_ok=True)
        keep = again / "keep.npy"
        if arm == "the junk itself":
            np.save(keep, np.flatnonzero(~is_junk))
        else:
            of_score = {"score": "value" if arm == "hindsight" else arm}
            curate.curate(
                curate.Config(
                    run=str(looked if arm == "hindsight" else out),
                    by="chunk",
                    drop_fraction=DROPPED,
                    out=str(again),
                    overwrite=True,
                    seed=seed,
                    **({"random": True} if arm == "at random" else of_score),
                )
            )
        kept = np.load(keep)
        spared = 1 - is_junk[kept].sum() / is_junk.sum()
        fine_tune(cfg, folder, seed, again, weights, steps, rule="off", keep=str(keep))
        loss = test_loss(cfg, folder, seed, again)
        rows.append({"seed": seed, "arm": arm, "loss": loss, "junk dropped": float(spared)})
        forget_run(again)
    return rows


# --- by transformers.Trainer ---------------------------------------------------------


def by_trainer(cfg, folder, seed):
    """The valued run of a seed again: same weights at first, same chunks in the same order, same
    learning rates. Returns lines that compare it with train.py's."""
    import transformers

    from trainer import Chunks, ValuationTrainer

    first = folder / f"run-{seed}"
    options = train.Config(**train.Config.of_run(first / "config.json"))

    class InTrainsOrder(ValuationTrainer):
        def _get_train_sampler(self, dataset=None):
            data, steps = self.chunks.data, range(options.max_iters)
            return np.concatenate([data.ids(i, options.batch, seed) for i in steps]).tolist()

        def create_scheduler(self, num_training_steps, optimizer=None):
            def part(step):
                return train.get_lr(options, step) / options.learning_rate

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, part)
            return self.lr_scheduler

    again = folder / f"trainer-{seed}"
    args = transformers.TrainingArguments(
        str(again),
        per_device_train_batch_size=options.batch_size,
        max_steps=options.max_iters,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        max_grad_norm=options.grad_clip,
        seed=seed,
        save_strategy="no",
        report_to=[],
    )
    trainer = InTrainsOrder(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "pretrained" / "hf"),
        args,
        train_dataset=Chunks(options.data_dir),
        data_collator=transformers.default_data_collator,
        targets=options.targets,
        rule=options.rule,
        target_batch=options.target_batch,
        book_interval=options.book_interval,
        run=str(again / "values"),
    )
    if (again / "values").exists():
        remove_folder(again / "values", RUN_FILES, "move it away")
    trainer.train()
    return compare(open_run(first), open_run(again / "values"))


def compare(first, again):
    """Lines: how far the values of two runs with the same visits agree."""
    ours, theirs = again.visits, first.visits
    if not np.array_equal(ours["chunk"], theirs["chunk"]):
        raise UserError(f"{first.path} and {again.path} met other pairs: begin with --part=all")
    late = theirs["early"] == 0
    ours_late, theirs_late = ours["value"][late, 0], theirs["value"][late, 0]
    pearson = np.corrcoef(ours_late, theirs_late)[0, 1]
    relative = np.linalg.norm(ours_late - theirs_late) / np.linalg.norm(theirs_late)
    is_junk = first.data.train.domain == first.data.domains.index(JUNK)
    lines = [f"{len(ours):,} visits; those after the early steps: Pearson {pearson:.6f},"]
    lines.append(f"relative L2 of the difference {relative:.1e}")
    for run, name in ((first, "train.py"), (again, "Trainer")):
        shares, _ = curate.score_and_error(chunk_scores(run, 0, "share"), summed=False)
        found = auroc(shares[run.used], is_junk[run.used])
        lines.append(f"{name}: AUROC of a junk pair by share {found:.4f}")
    return lines


# --- the table ----------------------------------------------------------------------


def table(rows):
    of_scores = [row for row in rows if "score" in row]
    of_arms = [row for row in rows if "arm" in row]
    found = []
    for score in SCORES:
        found.append([score, shown(column(select(of_scores, score=score), "auroc"))])
    lines = [*markdown(["score", "AUROC of a junk pair"], found), ""]
    with_all = {row["seed"]: row["loss"] for row in select(of_arms, arm="all")}
    found = []
    for arm in dict.fromkeys(column(of_arms, "arm")):
        of_arm = select(of_arms, arm=arm)
        less = [row["loss"] - with_all[row["seed"]] for row in of_arm]
        dropped = [row["junk dropped"] for row in of_arm if "junk dropped" in row]
        losses = shown(column(of_arm, "loss"), 4)
        found.append([arm, losses, shown(less, 4), shown(dropped, 2) if dropped else ""])
    head = ["a fifth dropped by", "test loss, nats a token", "less that of all", "of the junk"]
    return lines + markdown(head, found)


def main(cfg):
    out = Path(cfg.out)
    if cfg.part == "all":
        begin(cfg)
        folder = Path(cfg.data)
        pairs = write_text(cfg, folder)
        weights = pretrain(cfg, folder)
        seeds = numbers(cfg.seeds, int)
        for seed in seeds:
            prepare_pairs(cfg, folder, pairs, seed)
        settings = {**vars(cfg), "quick": False}
        jobs = [(settings, str(folder), str(weights), seed) for seed in seeds]
        side_by_side(job, jobs, out / "rows.jsonl", cfg.workers)
    if cfg.part == "trainer":
        lines = by_trainer(cfg, Path(cfg.data), numbers(cfg.seeds, int)[0])
        (out / "trainer.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print("\n".join(lines))
        return
    finish(out, table(read_rows(out / "rows.jsonl")))


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
