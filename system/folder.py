"""A run's folder: whose it is, and what becomes of the run that lay there before.

Nothing of an older run is removed before the new one's first commit is whole. Until then its files
lie in the folder `before`, and a start that comes to nothing puts them back: at once, or, where the
process was killed, at the next start. While files are on their way there or back the folder is
called `before.partial`, which tells a start that was killed then what is still missing.
"""

import fnmatch
import os
from pathlib import Path

from system.errors import UserError
from system.files import Claim, read_json, remove_folder, strangers
from system.parallel import on_rank_0, rank

# what train.py leaves in a run's folder, beside what it logs
RUN_FILES = ["config.json", "ckpt.pt", "ckpt-*.pt", "values.npy", "values.json", "ledger.npy"]
RUN_FILES += ["books.npy", "audit.npy", "evaluations.jsonl", "chunks.npy"]
REVALUATION = "revaluation.json"  # revalue.py writes it first into every folder it makes
REVALUATION_FILES = [*RUN_FILES, REVALUATION, "lock", "*.tmp", "report.html"]
# of hindsight: its own records, and what it has until it is done (lookback.py)
REVALUATION_FILES += ["adjoint.npy", "check.npz", "sweep.pt", "state-*.pt", "segment-*.npz"]


class RunFolder:
    """A run's folder, this process's as a context. On an exception before forget_before() the
    folder is as it was found."""

    def __init__(self, path):
        """Of several ranks the first one takes it, for it writes everything. Raises UserError where
        another process writes there."""
        self.path = Path(path)
        self.before, self.partial = self.path / "before", self.path / "before.partial"
        self.wait = lambda: None  # for what is still being written (Checkpoints)
        on_rank_0(self.take)

    def take(self):
        for part in (self.path, *self.path.parents):
            if part.exists() and not part.is_dir():
                what = f"--out_dir={self.path}: {part} is a file, and a run needs a folder"
                raise UserError(f"{what}: write another --out_dir")
        self.claim = Claim(self.path, "out_dir")
        if self.before.is_dir() and (self.path / "ckpt.pt").exists():
            self.forget_before()
        else:
            self.put_back()

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if rank():
            return
        try:
            self.wait()
        finally:
            if error:
                self.put_back()
            self.claim.release(undo=error is not None)

    def set_aside(self):
        """Moves the run that lies here, if there is one, into `before`."""
        if not own_files(self.path):
            return
        self.partial.mkdir()
        for path in [*own_files(self.path), self.path / "revalued"]:
            if path.exists():
                path.rename(self.partial / path.name)
        self.partial.rename(self.before)

    def put_back(self):
        """Whatever lies in `before` takes the place of what lies here."""
        if self.before.is_dir():
            for path in own_files(self.path):
                path.unlink()
            self.before.rename(self.partial)
        if self.partial.is_dir():
            for path in list(self.partial.iterdir()):
                path.rename(self.path / path.name)
            self.partial.rmdir()

    def forget_before(self):
        """The first commit is whole: the run before it goes, but for what this program did not
        write."""
        if not self.before.is_dir():
            return
        for path in own_files(self.before):
            path.unlink()
        revalued = self.before / "revalued"
        for folder in list(revalued.iterdir()) if revalued.is_dir() else ():
            if is_revaluation(folder):
                remove_revaluation(folder)
        for folder in (revalued, self.before):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def own_files(folder):
    """The files in a folder whose names a run gives."""
    names = [n for n in os.listdir(folder) if any(fnmatch.fnmatchcase(n, p) for p in RUN_FILES)]
    return [folder / name for name in sorted(names)]


# --- below revalued/ --------------------------------------------------------------


def is_revaluation(folder):
    """Whether revalue.py wrote a folder, and nobody else anything into it."""
    try:
        read_json(folder / REVALUATION, "", {"method": str})
    except UserError:
        return False
    return not strangers(folder, REVALUATION_FILES)


def remove_revaluation(folder):
    """Removes a folder that revalue.py wrote. Raises UserError where anybody else wrote there."""
    cure = "move them away, or choose another --name"
    try:
        read_json(folder / REVALUATION, cure, {"method": str})
    except UserError as e:
        raise UserError(f"{folder} is not revalue.py's to replace, {e}") from e
    remove_folder(folder, REVALUATION_FILES, cure)
