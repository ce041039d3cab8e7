"""The folders that prepare_pile.py writes, data_dir and data_dir.parts, and how one data set
replaces another.

data_dir.parts holds the parts of a source and a folder for each process that is writing one. While
a data_dir is replaced, the old one lies there too. A folder is used only if this program knows
every name in it; otherwise it is refused. Nothing is removed except files with names
that this program gives.
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
WHOLE = "1-of-1.partial"  # where a data set is packed, by one process at a time
REPLACED = "replaced"
# names that only a data set has: they prove that it is one where its meta.json is damaged
UNMISTAKABLE = ("train_domain.npy", "val_domain.npy", "train_docs.parquet", "val_docs.parquet")
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

    def ours(self):
        """The two folders that this program writes: they are never read as a source."""
        return self.folder, self.parts

    @contextlib.contextmanager
    def partial_folder(self, i, n):
        """As a context, an empty folder for this process, which writes shard i of n.

        In the end it is removed, and data_dir.parts too if that is empty. Raises UserError where
        another process is writing this shard."""
        folder = self.parts / f"{i}-of-{n}.partial"
        with Claim(folder, "data_dir"):
            try:
                self.empty(folder, keep=["lock"])
                yield folder
            finally:
                self.remove(folder)
                remove_empty(self.parts)

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
        """The names in a folder that are not files of a data set, sorted."""
        names = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name not in self.files or entry.is_dir(follow_symlinks=False):
                    names.append(entry.name)
        return sorted(names)

    def strange_parts(self):
        """The names in data_dir.parts, and in the folders there, that are not ours."""
        names = []
        for path in sorted(self.parts.iterdir()):
            is_ours = PARTIAL.fullmatch(path.name) or path.name == REPLACED
            if is_ours and path.is_dir() and not path.is_symlink():
                for name in self.strangers(path):
                    if not is_part(path / name):
                        names.append(f"{path.name}/{name}")
            elif not is_part(path):
                names.append(path.name)
        return names

    # --- removing what is ours --------------------------------------------------------

    def empty(self, folder, keep=()):
        """Removes the files of a folder that are ours, except those with a name in keep."""
        if not folder.is_dir() or folder.is_symlink():
            return
        for path in list(folder.iterdir()):
            if path.name in keep or path.is_dir():
                continue
            if path.name in self.files or PART.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def remove(self, folder):
        """Removes the files of a folder that are ours, and then the folder if it is empty."""
        self.empty(folder)
        remove_empty(folder)

    def clear(self):
        """Removes data_dir.parts, except the folders in which other processes are writing.

        Also removes the lock that a run leaves in data_dir if it is killed at its very end."""
        (self.folder / "lock").unlink(missing_ok=True)
        if not self.parts.is_dir() or self.parts.is_symlink():
            return
        for path in list(self.parts.iterdir()):
            if is_part(path):
                path.unlink(missing_ok=True)
            elif PARTIAL.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                # another process may be writing there, or removing the folder itself
                with contextlib.suppress(UserError, FileNotFoundError), Claim(path, "data_dir"):
                    self.remove(path)
        remove_empty(self.parts)

    # --- replacing ------------------------------------------------------------------

    def publish(self, partial, overwrite):
        """Gives the finished folder partial the name data_dir.

        An old data_dir lies in data_dir.parts meanwhile and is removed after that. Where the
        process is killed in between, recover() mends what it leaves."""
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
        """Gives the old data set the name data_dir again, unless a new one has it."""
        if self.replaced.is_dir() and (not self.folder.exists() or is_empty(self.folder)):
            self.replaced.rename(self.folder)
            sync(self.folder.parent)

    def recover(self):
        """Mends what a run leaves that was killed while it replaced data_dir.

        The old data set takes its place again; where the new one is there already, the old one is
        removed. Raises UserError where that run is still alive."""
        if not self.replaced.is_dir() or self.replaced.is_symlink():
            return
        if self.strangers(self.replaced):  # check() will refuse it
            return
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
    """Whether a folder without strangers is a data set: its meta.json or its other names tell."""
    try:
        read_json(folder / "meta.json", "", ENTRIES)
    except UserError:
        return any((folder / name).exists() for name in UNMISTAKABLE)
    return True


def is_part(path):
    return PART.fullmatch(path.name) and not path.is_dir()


def is_empty(folder):
    return folder.is_dir() and not any(folder.iterdir())


def remove_empty(folder):
    """Removes a folder if it is empty."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def refuse(folder, strange):
    """Raises UserError if there are strange names in a folder."""
    if strange:
        names = listed(strange, 5)
        raise UserError(f"{folder} holds files that this program did not write ({names}): {CURE}")
