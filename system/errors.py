"""What a person can mend, told apart from a bug."""

import errno


class UserError(ValueError):
    """Something that whoever typed the command can mend: it says what is wrong and what helps.

    config.main() prints it as one line; every other exception is a bug and keeps its traceback.
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
    errno.EISDIR: "name a file",
    errno.EEXIST: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "it is a symbolic link, which is not followed here: remove it",
    errno.EMFILE: "raise the number of files that may be open (ulimit -n)",
    errno.EIO: "the disk fails: copy what can be read to another one",
}


def explain(error):
    """An OSError -> one sentence: the path, what the system says, and what helps."""
    text = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        text = f"{error.filename}: {text}"
    cure = CURES.get(error.errno)
    return f"{text}: {cure}" if cure else text
