"""What the experiments share: their text, their runs side by side, their rows, tables and figures.

An experiment is a script: it puts the project's root on sys.path, then imports this file.
"""

import json
import math
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

# As train.py does. torch reads it when it first asks for memory, not when it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
from tqdm import tqdm

import prepare_pile
from data import open_dataset
from pile.documents import open_source, records
from system.errors import UserError
from system.files import remove_folder
from system.folder import RUN_FILES
from system.machine import describe_run

ROOT = Path(__file__).resolve().parents[1]

# --- options --------------------------------------------------------------------


def numbers(text, kind=float):
    """An option such as "1,2,3" -> [1, 2, 3], of the kind given."""
    return [kind(word) for word in text.split(",") if word]


def set_options(cfg, settings):
    """Gives options of cfg other values: what --quick does."""
    for name, value in settings.items():
        setattr(cfg, name, value)


def get_options(cfg, *names):
    """{name: value} of some options of cfg: those that train.py has under the same names."""
    return {name: getattr(cfg, name) for name in names}


# --- folders --------------------------------------------------------------------


def begin(cfg):
    """Makes the folder cfg.out and writes run.json there: command, options, versions, commit.

    Returns the folder.
    """
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    about = {
        **describe_run(vars(cfg), 1, None, ROOT),
        "cpus": os.cpu_count(),
        "machine": os.uname().machine,
    }
    (out / "run.json").write_text(json.dumps(about, indent=1) + "\n")
    return out


def forget_run(out):
    """Removes a run's folder, once the run has said what it was made for.

    Raises UserError where anything else lies there.
    """
    remove_folder(out, [*RUN_FILES, "lock", "keep.npy", "keep.json", "dropped.npy"], "move it away")


# --- text -----------------------------------------------------------------------


def prepare(data_dir, source, **options):
    """Makes chunks for an experiment where data_dir holds none yet. Returns the open dataset.

    options: those of prepare_pile.Config. Raises UserError where the chunks that lie there are of
    another text, or were cut otherwise: figures would be of what nobody asked for.
    """
    wanted = prepare_pile.Config(source=str(source), data_dir=str(data_dir), **options)
    if not Path(data_dir, "meta.json").is_file():
        prepare_pile.prepare(wanted)
    data = open_dataset(data_dir)
    held = data.meta["config"]
    for name, value in wanted.makes().items():
        was = held.get(name, value)  # of an earlier version, which had no such option
        is_same = was == value
        if name == "source":
            is_same = os.path.realpath(was) == os.path.realpath(value)
        if not is_same:
            what = f"the chunks in {data_dir} were made with --{name}={was}"
            raise UserError(f"{what}, asked for is {value}: give another folder as --data")
    return data


def read_documents(source):
    """Yields (file's name, domain or None, text) of a --source. The text of a record without any
    is empty."""
    options = prepare_pile.Config(source=source)
    names, read = open_source(options)
    skipped = Counter()
    for name in names:
        for document in read(name):
            for file, _, domain, text in records([document], options, skipped):
                if isinstance(text, bytes):
                    text = text.decode(errors="replace")
                yield file, domain, text or ""


def json_line(text, domain):
    """A document as a line of JSON that prepare_pile.py reads."""
    return json.dumps({"text": text, "meta": {"pile_set_name": domain}}) + "\n"


# --- runs and their rows ----------------------------------------------------------


def start_worker(threads):
    """In a new process: its share of the cores; what its runs print is thrown away."""
    torch.set_num_threads(threads)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")


def side_by_side(function, jobs, path, workers=0):
    """Calls function(*job) for all jobs, in `workers` processes (0: one a core).

    function returns a list of rows (dicts). They are written to path (.jsonl) as they come.
    Returns the rows of all jobs.
    """
    workers = min(workers or os.cpu_count(), len(jobs))
    threads = max(1, os.cpu_count() // workers)
    rows = []
    with (
        open(path, "w", encoding="utf-8") as file,
        ProcessPoolExecutor(workers, initializer=start_worker, initargs=(threads,)) as pool,
    ):
        futures = [pool.submit(function, *job) for job in jobs]
        for future in tqdm(as_completed(futures), total=len(futures), unit="run", smoothing=0):
            for row in future.result():
                rows.append(row)
                file.write(json.dumps(row) + "\n")
            file.flush()
    return rows


def read_rows(path):
    """The rows of a .jsonl file. Raises UserError where there is no such file."""
    if not Path(path).is_file():
        raise UserError(f"no {path}: leave out --part=report")
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def select(rows, **wanted):
    """The rows that have all of these values."""
    chosen = []
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()):
            chosen.append(row)
    return chosen


def column(rows, key):
    return [row[key] for row in rows]


# --- numbers and tables -----------------------------------------------------------


def mean_se(values):
    """The mean of some values and its standard error, which is NaN of a single value."""
    values = np.asarray(values, float)
    error = math.nan
    if len(values) > 1:
        error = float(values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()), error


def curve(points):
    """points: for each point of a curve its values, one a seed. Returns their means and standard
    errors, two arrays (points,)."""
    mean, error = np.array([mean_se(values) for values in points]).T
    return mean, error


def shown(values, digits=3):
    """Mean ± standard error, as text."""
    mean, error = mean_se(values)
    text = f"{mean:.{digits}f}"
    return f"{text} ± {error:.{digits}f}" if math.isfinite(error) else text


def markdown(head, rows):
    """Lines of a Markdown table."""
    lines = []
    for row in (head, ["---"] * len(head), *rows):
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return lines


def finish(out, lines):
    """Prints the tables and writes them to out/table.md."""
    text = "\n".join(lines)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


# --- figures --------------------------------------------------------------------


def pyplot():
    """matplotlib's pyplot, for a machine without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save_figure(fig, path, rect=None):
    """rect: the part of the figure that the axes fill, as matplotlib's tight_layout takes it."""
    fig.tight_layout(rect=rect)
    fig.savefig(path, dpi=110)
