"""Errors that a user can mend, as opposed to bugs."""

import errno
import os


class UserError(ValueError):
    """An error that the user can mend: it says what is wrong and what to do.

    config.main() prints it as one line. Other exceptions are bugs and keep their traceback, except
    an OSError, of which explain() makes a line.
    """


CURES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or use another disk",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOENT: "look whether the path is right",
    errno.ENOTDIR: "a part of that path is a file: choose another place",
    errno.EISDIR: "name a file in it",
    errno.EEXIST: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "it is a symbolic link, which is not followed here: remove it",
    errno.EMFILE: "raise the number of files that may be open (ulimit -n)",
    errno.EIO: "the disk fails: copy what can be read to another one",
}


def explain(error):
    """An OSError -> one line: the path that the user named, what the system says, what to do."""
    text = error.strerror or str(error) or type(error).__name__
    cure = CURES.get(error.errno)
    if error.filename is not None:
        # files are written under another name first (files.atomic), which nobody typed
        path = str(error.filename).removesuffix(".tmp")
        folder = os.path.dirname(path)
        if error.errno == errno.ENOENT and folder and not os.path.isdir(folder):
            cure = f"there is no folder {folder}: make it, or choose another place"
        text = f"{path}: {text}"
    return f"{text}: {cure}" if cure else text
