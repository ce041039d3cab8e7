"""The folders that prepare_pile.py writes, data_dir and data_dir.parts, and how one data set
replaces another.

data_dir.parts holds the parts of a source, a folder for each process that is writing some, and,
while a data_dir is replaced, the old one. Both are this program's only where it knows every name in
them: else they are refused. Nothing is removed but files of names that this program gives.
"""

import contextlib
import os
import re
from pathlib import Path

from system.errors import UserError
from system.files import Claim, read_json, sync
from system.terminal import listed

PART = re.compile(r"\d{5,}-[0-9a-f]{16}\.arrow")
PARTIAL = re.compile(r"\d+-of-\d+\.partial")
WHOLE = "1-of-1.partial"  # of the process that packs, of which there can be one
REPLACED = "replaced"
TELLING = ("train_domain.npy", "val_domain.npy", "train_docs.parquet", "val_docs.parquet")
ENTRIES = {"schema": int, "tokenizer": str, "config": dict, "sha256": dict}
CURE = "write another --data_dir"


class Folders:
    """data_dir and what lies beside it."""

    def __init__(self, data_dir, files):
        """files: the names of a data set's files."""
        self.folder = Path(data_dir).resolve()
        if not self.folder.name:
            raise UserError(f"--data_dir={data_dir} is no folder of its own: {CURE}")
        self.parts = self.folder.with_name(self.folder.name + ".parts")
        self.replaced = self.parts / REPLACED
        self.files = {*files, *(f"{name}.tmp" for name in files), "lock"}

    def partial(self, i, n):
        """The folder of a process that writes shard i of n."""
        return self.parts / f"{i}-of-{n}.partial"

    def ours(self):
        """The folders that are written, which are no source."""
        return self.folder, self.parts

    # --- what is not ours -----------------------------------------------------------

    def check(self):
        """Raises UserError where one of the folders holds anything that is not ours."""
        if self.folder.exists():
            strange = self.strangers(self.folder)
            if not strange and not is_empty(self.folder) and not is_data_set(self.folder):
                strange = sorted(os.listdir(self.folder))
            refuse(self.folder, strange)
        if self.parts.is_symlink():
            raise UserError(f"{self.parts} is a symbolic link: remove it, or {CURE}")
        if self.parts.exists():
            refuse(self.parts, self.strange_parts())

    def strangers(self, folder):
        """The names in a folder of a data set that are none of a data set's files."""
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.name not in self.files or is_folder(e))

    def strange_parts(self):
        found = []
        for path in sorted(self.parts.iterdir()):
            of_processes = PARTIAL.fullmatch(path.name) or path.name == REPLACED
            if of_processes and path.is_dir() and not path.is_symlink():
                for name in self.strangers(path):
                    if not PART.fullmatch(name) or (path / name).is_dir():
                        found.append(f"{path.name}/{name}")
            elif not PART.fullmatch(path.name) or path.is_dir():
                found.append(path.name)
        return found

    # --- removing what is ours --------------------------------------------------------

    def empty(self, folder, keep=()):
        """Removes the files of a folder that are ours, but for those of the names to keep."""
        if not folder.is_dir() or folder.is_symlink():
            return
        for path in list(folder.iterdir()):
            ours = path.name in self.files or PART.fullmatch(path.name)
            if ours and path.name not in keep and not path.is_dir():
                path.unlink(missing_ok=True)

    def remove(self, folder):
        """Removes the files of a folder that are ours, and then the folder, if it is empty."""
        self.empty(folder)
        remove_empty(folder)

    def remove_parts_folder(self):
        """If it is empty."""
        remove_empty(self.parts)

    def clear(self):
        """Removes data_dir.parts, but for what other processes are writing there, and the lock that
        a run leaves in data_dir if it is killed at its very end."""
        (self.folder / "lock").unlink(missing_ok=True)
        if not self.parts.is_dir() or self.parts.is_symlink():
            return
        for path in list(self.parts.iterdir()):
            if PART.fullmatch(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)
            elif PARTIAL.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                # not where another process is writing, or removes it itself
                with contextlib.suppress(UserError, FileNotFoundError), Claim(path, "data_dir"):
                    self.remove(path)
        remove_empty(self.parts)

    # --- replacing ------------------------------------------------------------------

    def publish(self, partial, overwrite):
        """The whole new folder takes data_dir's name. An old one lies in data_dir.parts meanwhile,
        and is removed after that; recover() puts right what a kill in between leaves."""
        for path in [*partial.iterdir(), partial]:
            sync(path)
        try:
            if self.folder.exists():
                self.check()  # somebody may have written there since the beginning
                if any(self.folder.iterdir()) and not overwrite:
                    raise UserError(f"{self.folder} was written by another process: {CURE}")
                self.folder.rename(self.replaced)
                sync(self.parts)
            partial.rename(self.folder)
        finally:
            self.put_back()
        sync(self.folder.parent)
        (self.folder / "lock").unlink(missing_ok=True)
        self.remove(self.replaced)

    def put_back(self):
        """The old data set takes data_dir's name again, where no other has it."""
        if self.replaced.is_dir() and (not self.folder.exists() or is_empty(self.folder)):
            self.replaced.rename(self.folder)
            sync(self.folder.parent)

    def recover(self):
        """After a run that was killed while it replaced data_dir: the old data set takes its place
        again, or, where the new one has it already, is removed. Raises UserError where that run is
        still alive."""
        if not self.replaced.is_dir() or self.replaced.is_symlink():
            return
        if self.strangers(self.replaced):
            return  # check() refuses it
        claim = Claim(self.parts / WHOLE, "data_dir")
        try:
            self.put_back()
            if self.replaced.is_dir():
                self.check()
                (self.folder / "lock").unlink(missing_ok=True)
                self.remove(self.replaced)
        finally:
            claim.release(undo=True)
        remove_empty(self.parts)


def is_data_set(folder):
    """Whether a folder, all of whose names are a data set's, is one: by its meta.json, or, where
    that is damaged, by names that only a data set has."""
    try:
        read_json(folder / "meta.json", "", ENTRIES)
    except UserError:
        return any((folder / name).exists() for name in TELLING)
    return True


def is_folder(entry):
    return entry.is_dir(follow_symlinks=False)


def is_empty(folder):
    return folder.is_dir() and not any(folder.iterdir())


def remove_empty(folder):
    with contextlib.suppress(OSError):  # there is something in it
        folder.rmdir()


def refuse(folder, strange):
    if strange:
        names = listed(strange, 5)
        raise UserError(f"{folder} holds files that this program did not write ({names}): {CURE}")
