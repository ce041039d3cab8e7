"""What the experiments share: the folder they write to, runs side by side, mean and spread."""

import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # an experiment is run as a script, from anywhere
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as train.py does

import numpy as np
import torch
from tqdm import tqdm

from system.errors import UserError
from system.files import remove_folder
from system.folder import RUN_FILES
from system.machine import describe_run


def begin(cfg):
    """cfg.out, made, with run.json in it: the command, its options, versions, commit."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    about = describe_run(vars(cfg), 1, None, ROOT) | dict(
        cpus=os.cpu_count(), machine=os.uname().machine
    )
    (out / "run.json").write_text(json.dumps(about, indent=1) + "\n")
    return out


def forget_run(out):
    """Removes the folder of a run that has said what it was made for. Raises UserError where
    anything else lies there."""
    remove_folder(out, [*RUN_FILES, "lock", "keep.npy", "keep.json", "dropped.npy"], "move it away")


def prepare(data_dir, source, **options):
    """Chunks for an experiment, made where data_dir holds none yet. options: prepare_pile.Config's. Returns the open dataset."""
    from data import open_dataset
    from prepare_pile import Config
    from prepare_pile import prepare as prepare_pile

    if not Path(data_dir, "meta.json").is_file():
        prepare_pile(Config(source=str(source), data_dir=str(data_dir), **options))
    return open_dataset(data_dir)


def start(threads):
    """In a worker: its share of the cores, and no progress lines of its runs among those of the others."""
    torch.set_num_threads(threads)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")


def side_by_side(function, jobs, path, workers=0):
    """function(*job) -> a list of rows (dicts), the jobs in `workers` processes (0: a core each). Returns all rows; they are also
    written to path (.jsonl) as they come."""
    workers, rows = min(workers or os.cpu_count(), len(jobs)), []
    with (
        open(path, "w", encoding="utf-8") as file,
        ProcessPoolExecutor(
            workers, initializer=start, initargs=(max(1, os.cpu_count() // workers),)
        ) as pool,
    ):
        futures = [pool.submit(function, *job) for job in jobs]
        for future in tqdm(as_completed(futures), total=len(futures), unit="run", smoothing=0):
            rows += future.result()
            file.writelines(json.dumps(row) + "\n" for row in future.result())
            file.flush()
    return rows


def read_rows(path):
    if not Path(path).is_file():
        raise UserError(f"no {path}: leave out --part=report")
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def mean_se(values):
    """(mean, its standard error; NaN of a single value)."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(
        values
    ) > 1 else math.nan


def shown(values, digits=3):
    """Mean ± standard error, as text."""
    mean, error = mean_se(values)
    return (
        f"{mean:.{digits}f} ± {error:.{digits}f}" if math.isfinite(error) else f"{mean:.{digits}f}"
    )


def markdown(head, rows):
    """Lines of a Markdown table."""
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]


def finish(out, lines):
    """The tables, printed and in out/table.md."""
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
