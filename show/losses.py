"""The validation losses of runs, side by side, as evaluations.jsonl has them.

A run without values (--rule=off) has losses too: a curated run is judged beside its control.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from show.run import check_folder, original_of
from system.errors import UserError
from system.files import check_entries, read_json, read_lines
from system.terminal import command


@dataclass
class Losses:
    """A run's losses on its validation chunks, which are the same ones at every step."""

    path: Path
    name: str  # the folder's
    cfg: dict  # config.json's "config": train.py's options
    data_hash: str
    steps: np.ndarray  # int64 (n,): steps done, ascending
    val: np.ndarray  # float64 (n,), nats: the mean over the domains, weighted by their size
    by_domain: dict  # {domain: float64 (n,), nats}
    by_target: dict  # the same of the targets that were files

    def at(self, step, domain=None, target=None):
        """The loss after so many steps, in nats: of all validation chunks, of a domain's, or of a
        target. NaN where it was not measured."""
        curve = self.val
        if domain is not None:
            curve = self.by_domain.get(domain)
        if target is not None:
            curve = self.by_target.get(target)
        (places,) = np.nonzero(self.steps == step)
        if curve is None or not len(places):
            return np.nan
        return float(curve[places[0]])


def losses(path):
    """A run's folder -> Losses. Raises UserError, saying what to type, where it holds no run, or no
    losses yet, or damaged ones."""
    path = Path(path)
    check_folder(path)
    file = path / "config.json"
    resume = command("python", "train.py", str(file), "--init_from=resume")
    cure = f"type: {resume}"
    about = read_json(file, cure, {"config": dict}, unsealed=True)
    evaluations = path / "evaluations.jsonl"
    if not evaluations.is_file():
        if original_of(path) != path:
            own = command("python", "values.py", "losses", str(original_of(path)))
            raise UserError(f"{path} holds values alone; for the losses of their run type: {own}")
        again = command("python", "train.py", str(file), "--overwrite", "--eval_interval=50")
        what = f"{path} has no validation losses (no evaluations.jsonl)"
        raise UserError(f"{what}: it has not begun, or never evaluated. To train it again: {again}")
    rows = read_lines(evaluations)
    for row in rows:
        row.setdefault("target", {})  # none of them a file
        entries = {"step": int, "val": float, "loss": dict, "target": dict}
        check_entries(row, entries, evaluations, cure)
        if row["loss"].keys() != rows[0]["loss"].keys():
            raise UserError(f"{evaluations} is damaged (its domains change): {cure}")
        for key in ("loss", "target"):
            check_entries(row[key], dict.fromkeys(row[key], float), evaluations, cure)
    if not rows:
        raise UserError(f"{evaluations} is damaged (it is empty): {cure}")
    return Losses(
        path=path,
        name=path.resolve().name,
        cfg=about["config"],
        data_hash=str(about.get("data_hash", "")),
        steps=np.array([row["step"] for row in rows]),
        val=np.array([row["val"] for row in rows]),
        by_domain=curves_of(rows, "loss"),
        by_target=curves_of(rows, "target"),
    )


def curves_of(rows, key):
    """{name: float64 (n,), nats}, of what stands under a key of evaluations.jsonl. NaN where a row
    has it not: an earlier version, which did not evaluate targets, may have written it."""
    curves = {}
    for name in rows[-1][key]:
        curves[name] = np.array([row[key].get(name, np.nan) for row in rows])
    return curves


def side_by_side(paths):
    """Runs' folders -> [Losses], with a name of its own each. Losses of targets that were files are
    there where all runs have the same --targets.

    Raises UserError where one has no losses, or where two were measured on other validation
    chunks."""
    folders = [Path(path).resolve() for path in paths]
    for path, folder in zip(paths, folders):
        check_folder(Path(path))
        if folders.count(folder) > 1:
            raise UserError(f"{path} is named twice: name each run once")
    runs = [losses(path) for path in paths]
    first = runs[0]
    for run in runs[1:]:
        if run.data_hash != first.data_hash:
            what = f"{first.path} and {run.path} were trained on different data"
            raise UserError(f"{what}: their losses are of different texts, name runs on the same")
        for key in ("eval_chunks", "block_size"):
            if run.cfg.get(key) != first.cfg.get(key):
                what = f"{first.path} has --{key}={first.cfg.get(key)}"
                what += f", {run.path} has --{key}={run.cfg.get(key)}"
                raise UserError(
                    f"{what}: their losses are not comparable, train both with the same"
                )
    if len({run.cfg.get("targets") for run in runs}) > 1:
        for run in runs:  # targets of the same name may be of different files
            run.by_target = {}
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.path)
    return runs


def common_steps(runs):
    """The steps after which every run was evaluated, int64, ascending. Raises UserError where there
    is none."""
    steps = runs[0].steps
    for run in runs[1:]:
        steps = np.intersect1d(steps, run.steps)
    if not len(steps):
        paths = " and ".join(str(run.path) for run in runs)
        what = f"{paths} were never evaluated after the same number of steps"
        raise UserError(f"{what}: train them with the same --eval_interval")
    return steps
