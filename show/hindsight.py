"""What lies beside the values of hindsight (lookback.py): which steps are early, and how well the
values predict what training again without some of the visits does.

A folder may be a stranger's, so what is read here is checked. What is returned are plain dicts, as
values.py --json prints them; a float may be NaN.
"""

import math

import numpy as np

from show.findings import TINY, when
from show.run import again, open_run, read_records
from system import store
from system.errors import UserError
from system.files import check_entries
from system.terminal import command, say

OWN = "hindsight"  # the score of a check that is the values of hindsight themselves
OF_STEP = "value in its step"  # the one that is the run's own values
ORDER = (OWN, OF_STEP, "share of its step", "training loss")  # of scores, others after them
FIGURES = ("pearson", "low", "high", "spearman", "slope", "slope_error")
MOST_SCORES = 12  # of a check
SETS = 40  # of the check that is proposed


def read(run):
    """What lies beside a run's values; None where they are no hindsight. Raises UserError where it
    is damaged.

    early_steps: how many are marked early; first_late_step: the one after the last of them.
    early_share: the part of the values' size that they hold. adjoint: a dict a step, norm: |dL/dw|,
    w the weights that the step left. check: see read_check(). to_check: the command that makes one.
    """
    if run.horizon is None:
        return None
    file = run.path / "values.json"
    losses = run.info["loss_at_end"]
    check_entries(losses, dict.fromkeys(run.names, float), file, again(run.path))
    adjoints = read_adjoints(run)
    steps = adjoints["step"].tolist()
    is_early, early_size, size = early_steps(run)
    late = [step for step, early in zip(steps, is_early) if early]
    norms = []
    for step, norm in zip(steps, adjoints["norm"]):
        norms.append({"step": step, "norm": run.named(norm)})
    return {
        "of": str(run.original),
        "meaning": run.info["meaning"],
        "first_step": steps[0],
        "last_step": steps[-1],
        "early_steps": len(late),
        "first_late_step": late[-1] + 1 if late else steps[0],
        "early_share": run.named(early_size / np.maximum(size, TINY)),
        "loss_at_end": run.named([losses[name] for name in run.names]),
        "adjoint": norms,
        "check": read_check(run),
        "to_check": to_check(run),
    }


def read_adjoints(run):
    """The records of adjoint.npy, one a step."""
    counted = run.info["files"]
    file = run.path / "values.json"
    check_entries(counted, {"adjoint.npy": dict}, file, again(run.path))
    dtypes = [store.adjoint_dtype(len(run.names))]
    adjoints = read_records(run.path, "adjoint", dtypes, counted)
    if not np.array_equal(adjoints["step"], run.books["step"]):
        what = "adjoint.npy has other steps than books.npy"
        raise UserError(f"{file} is damaged ({what}): {again(run.path)}")
    return adjoints


def early_steps(run):
    """Which steps are marked early, bool (n,), and the sizes (K,) of the values of those, and of
    all."""
    flags, early_size, size = [], 0.0, 0.0
    for visits in run.blocks():
        is_early = visits["early"] > 0
        sizes = np.abs(visits["value"].astype(float))
        flags.append(is_early[:: run.info["batch"]])
        early_size = early_size + sizes[is_early].sum(0)
        size = size + sizes.sum(0)
    return np.concatenate(flags), early_size, size


def to_check(run):
    """The command that holds a folder's values against training again."""
    words = ["python", "revalue.py", str(run.original), "--hindsight", f"--check={SETS}"]
    words.append(f"--name={run.path.resolve().name}")
    if run.cfg["targets"]:
        words.append(f"--targets={run.cfg['targets']}")
    return command(*words)


def to_look_back(run):
    """The command that gives a run its hindsight, and checks it."""
    return command("python", "revalue.py", str(run.original), "--hindsight", f"--check={SETS}")


# --- the check ------------------------------------------------------------------------


def read_check(run):
    """How well scores of the visits predict what leaving sets of them out of a training does to
    the targets' losses, as a folder's values.json says it; None where that was not tried.

    fraction: of the visits from first_step on, in a set. end: the step after the last. targets:
    {target: [a dict for each score]}.
    """
    found = run.info.get("check")
    if found is None:
        return None
    try:
        return {
            "sets": int(number(found["sets"])),
            "fraction": number(found["fraction"]),
            "first_step": int(number(found["first_step"])),
            "end": run.info["committed_step"],
            "targets": {name: scores(found["targets"][name]) for name in run.names},
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        file = run.path / "values.json"
        raise UserError(f"{file} is damaged (its check): {again(run.path)}") from e


def scores(found):
    """A target's entries of a check -> [{score, pearson, its 95 % interval low to high, spearman,
    slope, slope_error}]. slope: nats of change per nat predicted; NaN of what is not in nats."""
    rows = []
    for name, entry in found.items():
        if isinstance(entry, dict):  # beside them stands a loss
            figures = {key: number(entry.get(key, math.nan)) for key in FIGURES}
            rows.append({"score": name, **figures})
    rows.sort(key=lambda row: ORDER.index(row["score"]) if row["score"] in ORDER else len(ORDER))
    return rows[:MOST_SCORES]


def number(x):
    """As a float. Raises TypeError for what is no number in JSON."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"a number was expected, not a {type(x).__name__}")
    return float(x)


def score_of(check, target, name):
    """A target's dict by a score, None where there is none."""
    for row in check["targets"].get(target, ()):
        if row["score"] == name:
            return row
    return None


def check_beside(run):
    """-> of the folders below a run's the check by the most sets that looked at the run's own
    values, or None. What cannot be read is named and passed over."""
    best = None
    for path in sorted(run.path.glob("revalued/*/adjoint.npy")):
        try:
            check = read_check(open_run(path.parent, run.data.path))
        except UserError as e:
            say(f"passed over: {e}")
            continue
        if check is None or not any(score_of(check, name, OF_STEP) for name in run.names):
            continue
        if best is None or check["sets"] > best["sets"]:
            best = check
    return best


# --- in words -------------------------------------------------------------------------

NAMED = {OWN: "hindsight", OF_STEP: "the values in their steps"}


def predicted(check, target, first, second):
    """A sentence: how well the score called first predicted what happens to a target's loss, and
    beside it the second. None where the check has not the first."""
    own, other = score_of(check, target, first), score_of(check, target, second)
    if own is None:
        return None
    how = f"in {check['sets']:,} trainings without {share(check['fraction'])} of the visits each"
    what = f"{NAMED[first]} predicted the change of the loss with a correlation of"
    sure = "" if own["low"] > 0 else ", not clearly above 0"
    sentence = f"{how}, {what} {figure(own['pearson'])} {interval(own)}{sure}"
    if other is None:
        return sentence
    return f"{sentence}; {NAMED[second]} with {figure(other['pearson'])} {interval(other)}"


def interval(row):
    return f"({figure(row['low'])} to {figure(row['high'])})"


def figure(x):
    """A correlation as a text."""
    return "-" if math.isnan(x) else f"{x:.2f}"


def share(x):
    return f"{100 * x:.3g}%"


WHY_EARLY = (
    "There |dL/dw| is far above what it is later: changes grow, and the derivative holds for "
    "changes only that are smaller than a chunk."
)
CHECKED = (
    "how well the sum of a score over the visits left out predicts what that does to the target's "
    "loss at the end."
)


def meaning(horizon):
    """What the values of hindsight are, in sentences. horizon: of a show.run.Run."""
    return (
        f"Hindsight: a value is the drop of the target's loss{when(horizon)} that the visits of a "
        "chunk are worth, at the margin, with all later steps as they were. Values rank, they do "
        "not add up: AdamW undoes a common scaling of all gradients, so their sum is about 0 and "
        "about half of them are negative."
    )
