"""Every command of the project as a test runs it: in this process, or on a terminal of its own.

What reads strangers' files or prints what stood in them is tested through all of these, so that a
command added later is tested too: test_every_command_is_here fails until it stands below.
"""

import contextlib
import functools
import io
import os
import pty
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import runs
import torch

import config
import curate
import export
import prepare_pile
import report
import revalue
import sample
import train
import values

ROOT = Path(config.__file__).parent
ENTRIES = {  # what each script runs, and the class of its options
    "prepare_pile.py": (prepare_pile.prepare, prepare_pile.Config),
    "train.py": (train.train, train.Config),
    "values.py": (values.main, None),
    "report.py": (report.report, report.Config),
    "curate.py": (curate.main, curate.Config),
    "revalue.py": (revalue.main, revalue.Config),
    "sample.py": (sample.sample, sample.Config),
    "export.py": (export.export, export.Config),
}


def start(script):
    """Runs a script by sys.argv."""
    function, options = ENTRIES[script]
    if options is None:
        function()
    else:
        function(config.load(options))


def readers(run, other, data_dir, folder):
    """[(script, its arguments)]: every way to read a run and a data folder. other: a run on the
    same data. folder: where their output goes. Each of values.py's commands, too."""
    of_values = {
        "summary": [run],
        "top": [run, "--n=3"],
        "bottom": [run, "--n=3"],
        "domains": [run],
        "chunk": [run, "5"],
        "docs": [run, "--n=3"],
        "losses": [run, other],
        "doc": [run, values.Documents(values.open_run(run)).of_chunk(5)[0]["doc"]],
        "export": [run, folder / "values.parquet"],
        "compare": [run, other, "--n=3"],
        "tokens": [run, "--chunk=5"],
        "query": [run, "--text=to be", "--n=3"],
    }
    chosen = [("train.py", [f"--out_dir={run}", "--verify"])]  # before there are revaluations
    chosen += [("values.py", [name, *argv]) for name, argv in of_values.items()]
    chosen += [
        ("report.py", [run, f"--out={folder / 'report.html'}", "--tokens=2"]),
        ("curate.py", [run, f"--out={folder / 'kept'}", "--drop_fraction=.2", "--overwrite"]),
        ("sample.py", [run, "--num_samples=1", "--max_new_tokens=5"]),
        ("export.py", [run, f"--out={folder / 'exported'}", "--overwrite"]),
        ("revalue.py", [run, "--name=walked", "--end=2", "--overwrite"]),
        ("train.py", [run / "config.json", "--init_from=resume"]),
        ("prepare_pile.py", [f"--data_dir={data_dir}", "--verify"]),
    ]
    return [(script, list(map(str, argv))) for script, argv in chosen]


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    def is_refusal(self):
        """One line that says what is wrong, and exit code 2."""
        one_line = self.err.startswith("error: ") and self.err.count("\n") == 1
        return self.code == 2 and one_line


def run(script, argv):
    """A command in this process, whose output knows only ASCII, as old terminals do. An exception
    that it does not expect is raised here."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    err = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    code = 0
    with (
        mock.patch.object(sys, "argv", [script, *argv]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            config.main(functools.partial(start, script))
        except SystemExit as e:
            code = e.code or 0
    return Outcome(code, written_to(out), written_to(err))


def written_to(stream):
    stream.flush()
    return stream.buffer.getvalue().decode()


# --- on a terminal ----------------------------------------------------------------


def on_terminal(script, argv):
    """A command in a process of its own whose terminal is a real one -> exit code, bytes seen."""
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)
    process = runs.server().Process(target=run_there, args=(name, script, argv))
    process.start()
    os.set_blocking(ours, False)
    printed = b""
    while process.is_alive():
        printed += read_all(ours)
        process.join(0.01)
    printed += read_all(ours)
    os.close(ours)
    os.close(theirs)
    return process.exitcode, printed


def read_all(fd):
    """What can be read without waiting."""
    content = b""
    with contextlib.suppress(BlockingIOError):
        block = os.read(fd, 1 << 16)
        while block:
            content += block
            block = os.read(fd, 1 << 16)
    return content


def run_there(terminal, script, argv):
    torch.set_num_threads(1)
    fd = os.open(terminal, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(fd, number)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)
    os.environ.update(COLUMNS="110", LINES="24")
    sys.argv = [script, *argv]
    config.main(functools.partial(start, script))
