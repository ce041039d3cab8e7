"""The lines that curate.py ends with: what it dropped, what is known of such a choice, and how to
see whether it helped."""

import math
import textwrap
from pathlib import Path

from show.commands import ending, scored, sign, table
from show.findings import FEW, UNIT, micro, short
from system import terminal

QUARTER = 0.25  # the fraction of the documents that was measured
SCORES = {
    "share": "the mean of a visit's value over the mean size of its step's values; no unit",
    "value": f"the sum of its visits' values, in {UNIT}",
    "smoothed": "as share, of the smoothed scores (train.py --target_smoothing); no unit",
    "loss": "minus the mean training loss of its visits, in nats",
}


def lines(r):
    """Of what keep.json holds, r."""
    cfg = r["config"]
    yield from counts(r)
    yield ""
    positive = sign(r["horizon"])
    yield f"Median values of used chunks for {short(cfg['target'])}, in {UNIT} ({positive})"
    yield from domain_table(r["domains"])
    yield ""
    if r["dropped_first"]:
        yield f"Dropped first; {cfg['score']}: {SCORES[cfg['score']]}"
        yield from first_table(r["dropped_first"], cfg)
        yield ""
    yield f"-> {', '.join(files_of(r))}"
    yield ""
    yield found(r)
    yield from known(cfg, r["horizon"])
    yield from comparison(r)


def counts(r):
    cfg = r["config"]
    dropped = f"dropped {r['units_dropped']:,} of {r['units_scored']:,} scored {cfg['by']}s"
    part = r["units_dropped"] / r["units_scored"]
    yield f"{r['run']}: {dropped} ({part:.1%}): {chosen_how(cfg)}"
    negative = f"{r['units_dropped_negative']:,} of those dropped have a negative score"
    yield f"{negative}, {r['units_negative']:,} of all {r['units_scored']:,}"
    share = r["chunks_kept"] / r["chunks"]
    kept = f"{r['chunks_kept']:,} of {r['chunks']:,} chunks ({share:.1%})"
    yield f"kept: {kept}, {r['tokens_kept']:,} tokens"
    if r["chunks_unused"]:
        yield f"never used by the run: {r['chunks_unused']:,} chunks; {fate_of_unused(r)}"
    early = r["visits"] - r["visits_scored"]
    if early:
        yield f"{early:,} of {r['visits']:,} visits are of early steps and do not count: there"
        yield "hindsight does not say what a visit did"
    yield from cautions(r, part)


def fate_of_unused(r):
    """In words: what becomes of chunks that have no value."""
    gone = r["chunks"] - r["chunks_kept"] - r["chunks_used_dropped"]
    if r["config"]["unused"] == "drop":
        return "they go"
    if not gone:
        return "they stay"
    return f"{gone:,} of them go with their documents, the others stay"


def cautions(r, part):
    """part: the share of the scored units that is dropped."""
    if r["config"]["by"] == "chunk":
        return
    used = r["chunks"] - r["chunks_unused"]
    if used < r["chunks"] / 2:
        seen = f"{used / r['chunks']:.1%} of the chunks"
        yield f"caution: the run used {seen}, so each document is judged by a small part of it:"
        yield "train for a pass over the data, or write --by=chunk"
    if r["chunks_used_dropped"] / used < part / 2:
        why = "a chunk goes with the documents that hold most of it, and here they are short"
        yield f"caution: only {r['chunks_used_dropped'] / used:.1%} of the chunks used go: {why};"
        yield "--by=chunk drops the share of the chunks that you name"


def chosen_how(cfg):
    """In words: which chunks or documents curate.py dropped."""
    if cfg["random"]:
        words = "as many at random"
    else:
        end = "largest" if cfg["invert"] else "smallest"
        score = "smoothed score" if cfg["score"] == "smoothed" else cfg["score"]
        words = f"those with the {end} {score} for {short(cfg['target'])}"
    if cfg["per_domain"]:
        words += ", by domain"
    if cfg["drop"] == "negative":
        words += ", as many as are negative"
        if cfg["confidence"]:
            words += f" beyond {cfg['confidence']:g} standard errors"
    return words


def domain_table(domains):
    rows = []
    for d in sorted(domains, key=lambda d: (d["chunks"] < FEW, d["kept"] / d["chunks"])):
        rows.append(
            [
                d["domain"],
                f"{d['chunks']:,}",
                f"{d['used']:,}",
                f"{d['kept']:,}",
                f"{d['kept'] / d['chunks']:.1%}",
                micro(as_number(d["median"])),
                micro(as_number(d["median_kept"])),
            ]
        )
    head = ["domain", "chunks", "used", "kept", "share kept", "median", "median of kept"]
    return table(head, rows)


def as_number(x):
    """null of a JSON file -> NaN."""
    return math.nan if x is None else x


def first_table(dropped, cfg):
    rows = []
    for row in dropped:
        figures = [
            scored(as_number(row["score"]), cfg["score"]),
            scored(as_number(row["standard_error"]), cfg["score"]).lstrip("+"),
        ]
        if cfg["by"] == "document":
            place = [str(row["document"]), str(row["record"]), ending(row["source"])]
        else:
            place = [str(row["chunk"]), row["domain"]]
        rows.append([*place, *figures, row["text"]])
    place = ["document", "record", "source"] if cfg["by"] == "document" else ["chunk", "domain"]
    return table([*place, cfg["score"], "+-", "text"], rows)


def files_of(r):
    out = out_of(r)
    written = [f"{out}/keep.npy", "keep.json", "dropped.npy"]
    return [*written, *(r["config"][key] for key in ("list", "export") if r["config"][key])]


def out_of(r):
    return r["config"]["out"] or r["run"]


# --- what it says -------------------------------------------------------------------


def found(r):
    """In a sentence: which domains lost most, of those that are no single chunks."""
    large = [d for d in r["domains"] if d["chunks"] >= FEW] or r["domains"]
    shares = {d["domain"]: 1 - d["kept"] / d["chunks"] for d in large}
    most = max(shares, key=shares.get)
    least = min(shares, key=shares.get)
    if shares[most] == shares[least]:
        return f"found: every domain lost {shares[most]:.1%} of its chunks"
    first = f"{short(most)} lost the largest part ({shares[most]:.1%} of its chunks)"
    return f"found: {first}, {short(least)} the smallest ({shares[least]:.1%})"


JUNK = "With a fifth of planted junk, a quarter of the documents"
BEST = f"{JUNK} by share beat as many at random by .033 +- .011 nats (six seeds)."
CLEAN = "On clean text no gain was found."
MEASURED = {  # a quarter of the documents by a score
    "share": f"{BEST} Dropping by training loss (--score=loss) did as well or better. {CLEAN}",
    "value": f"{JUNK} by value beat as many at random by .021 +- .003 nats (three seeds), by share "
    f".033 +- .011 (six seeds). {CLEAN}",
    "smoothed": f"Dropping by smoothed score was not measured. {BEST} {CLEAN}",
    "loss": f"{JUNK} by loss beat as many at random by .048 +- .014 nats (six seeds). It takes for "
    f"junk what is hard to learn, and a fifth of the clean text went with it. {CLEAN}",
}
NEGATIVE = (
    "Dropping what is negative was not found better than as many at random, with planted junk or "
    f"without. {BEST} {CLEAN}"
)
LARGEST = (
    "With a fifth of planted junk, dropping a quarter of the documents of the largest share cost "
    ".021 +- .010 nats against as many at random (three seeds)."
)
OTHER = f"The choice best measured is another. {BEST} {CLEAN}"
CONTROL = "What a control drops is worth as much as what it keeps, but for chance."


IN_HINDSIGHT = (
    "Known from small models (results/counterfactual): without the tenth of the visits that "
    "hindsight put last, the same training ended .082 +- .006 nats lower for a narrow target, by "
    "share .021 +- .003. Without a quarter of the documents (results/curation/narrow) it was .0355 "
    "+- .0027 below as many at random, by share .0273 +- .0058 (five seeds)."
)


def known(cfg, horizon=None):
    """What the project's own measurements say of such a choice, in lines. horizon: of a
    show.run.Run."""
    words = f"Known from small models (results/curation): {measured(cfg)}"
    if horizon is not None and not cfg["random"]:
        words = IN_HINDSIGHT
    return textwrap.wrap(words, 98, subsequent_indent="  ")


def measured(cfg):
    if cfg["random"]:
        return CONTROL
    if cfg["drop"] == "negative":
        return OTHER if cfg["invert"] else NEGATIVE
    if cfg["by"] == "chunk" or cfg["per_domain"] or cfg["drop_fraction"] != QUARTER:
        return OTHER
    if cfg["invert"]:
        return LARGEST if cfg["score"] == "share" else OTHER
    return MEASURED[cfg["score"]]


def comparison(r):
    """The commands that train on what is kept and on its control, and compare the two."""
    cfg = r["config"]
    base = stem(r)
    if r["by_trainer"]:
        if not cfg["random"]:
            yield "Whether it helped here, only a control says, which drops as many at random:"
            yield f"  {control_command(r, f'{base}_random')}"
        keep = f"{out_of(r)}/keep.npy"
        yield f"next: by Trainer, with Chunks(..., keep={keep!r}): docs/trainer.md"
        return
    losses = terminal.command("python", "values.py", "losses", f"{base}_control", f"{base}_kept")
    if not r["val_chunks"]:
        yield "caution: this data has no validation set, so that two runs on it cannot be compared:"
        yield "prepare it again with --val_fraction=.01"
    if cfg["random"]:
        yield f"To compare it with the run on what is kept: {losses}"
        yield f"next: {train_command(r, out_of(r), f'{base}_control')}"
        return
    if not r["has_hindsight"]:
        look_back = terminal.command("python", "revalue.py", r["of"], "--hindsight")
        yield f"What visits did for the model at the run's end, to curate by it: {look_back}"
    yield "Whether it helped here, only a control says. After the command below, type these:"
    yield f"  {control_command(r, f'{base}_random')}"
    yield f"  {train_command(r, f'{base}_random', f'{base}_control')}"
    yield f"  {losses}"
    yield f"next: {train_command(r, out_of(r), f'{base}_kept')}"


def stem(r):
    """A run's folder as the beginning of other folders' names. Values that came later lie within
    it, and other runs are put beside it."""
    path = Path(r["of"])
    if r["of"] != r["run"]:
        path = path.with_name(f"{path.name}_{Path(r['run']).name}")
    return str(path.resolve() if path.name in ("", "..") else path)


def train_command(r, kept, out):
    """Trains as the run did, without valuing, on what is kept. kept: the folder of keep.npy."""
    words = ["python", "train.py", f"{r['run']}/config.json", "--rule=off"]
    words += [f"--keep={kept}/keep.npy", f"--out_dir={out}"]
    if r["config"]["data_dir"]:
        words.append(f"--data_dir={r['config']['data_dir']}")
    if not r["eval_interval"]:
        words.append("--eval_interval=100")  # the run itself was never evaluated
    return terminal.command(*words)


def control_command(r, out):
    """What drops as many at random."""
    cfg = r["config"]
    words = ["python", "curate.py", r["run"], "--random", f"--out={out}"]
    # how many go: by a score they depend on it, and on its target
    keys = ["by", "drop", "score", "target", "confidence"]
    if cfg["drop"] == "fraction":
        keys = ["by", "drop_fraction", "per_domain"]
    for key in keys:
        if cfg[key]:
            words.append(f"--{key}={cfg[key]}")
    if cfg["unused"] == "drop":
        words.append("--unused=drop")
    if cfg["data_dir"]:
        words.append(f"--data_dir={cfg['data_dir']}")
    return terminal.command(*words)
