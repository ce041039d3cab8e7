"""The files of a source: which there are, which are left out and why, and whether they changed.

In a folder, only files are read whose names end in a known kind. Names that begin with a dot are
left out, and so are symbolic links, unless links are to be followed. What is left out is counted.
"""

import glob
import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from system.errors import UserError
from system.terminal import listed

KIND = re.compile(
    r"(?P<lines>\.jsonl|\.ndjson|\.json|\.txt)(?P<packed>\.gz|\.zst|\.bz2|\.xz|)$|\.parquet$",
    re.IGNORECASE,
)
READS = "it reads .parquet, .jsonl, .ndjson, .json and .txt, the last four also .gz .zst .bz2 .xz"


@dataclass
class Reason:
    """Why files are left out, in words."""

    one: str
    many: str
    cure: str = ""


REASONS = {  # by the name that meta.json gives it
    "links": Reason("symbolic link", "symbolic links", ": --follow_links reads them"),
    "repeated": Reason("link to what is read already", "links to what is read already"),
    "hidden": Reason("hidden file or folder", "hidden files or folders"),
    "other_kinds": Reason("file of another kind", "files of another kind"),
    "folders": Reason("folder", "folders", ": name one as a --source, or write a glob with **"),
}
FIRST = 5  # names that a message gives
LISTED = 1000  # files that meta.json gives by name, at the most


def suffixes(name):
    """A file's name -> its kind and its packing in small letters, as (".jsonl", ".zst").

    Both are empty for a kind that cannot be read."""
    match = KIND.search(name)
    if not match:
        return "", ""
    packing = (match["packed"] or "").lower()
    return match[0].lower().removesuffix(packing), packing


def stem(name):
    """A file's name without folders, kind and packing."""
    name = os.path.basename(name)
    match = KIND.search(name)
    return name[: match.start()] if match else name


# --- finding them ---------------------------------------------------------------


@dataclass
class FileList:
    """The files to be read, in their order, and what is left out."""

    names: list = field(default_factory=list)
    left_out: dict = field(default_factory=dict)  # {key of REASONS: names}

    def leave_out(self, reason, name):
        self.left_out.setdefault(reason, []).append(str(name))

    def summary(self):
        """What is left out, for meta.json: {reason: {"number": n, "names": the first few}}."""
        summary = {}
        for reason in REASONS:
            names = sorted(self.left_out.get(reason, ()))
            if names:
                summary[reason] = {"number": len(names), "names": names[:FIRST]}
        return summary


def end_of(name, most=60):
    """A file's name, without its beginning where it has more than `most` characters."""
    return name if len(name) <= most else "\u2026" + name[1 - most :]


def explain_left_out(summary):
    """FileList.summary() -> a line for each reason."""
    lines = []
    for key, left_out in summary.items():
        number = left_out["number"]
        reason = REASONS[key]
        what = reason.one if number == 1 else reason.many
        names = listed([end_of(name) for name in left_out["names"]], FIRST)
        if number > len(left_out["names"]):
            names = f"{names}, ..."
        lines.append(f"left out: {number:,} {what} ({names}){reason.cure}")
    return lines


def find_files(source, follow_links=False, ours=()):
    """A file, a folder or a glob -> FileList.

    ours: folders that this program writes, which are never read. Raises UserError where there is
    nothing to read, or where a link leads nowhere."""
    path = Path(source)
    if path.is_dir():
        refuse_ours(source, [path], ours)
        listing = Walk(follow_links, ours).go(path)
    elif path.exists():
        listing = FileList([source])
    else:
        listing = match_glob(source, follow_links)
    for name in listing.names:
        if not suffixes(name)[0]:
            raise UserError(f"--source cannot read {name}: {READS}; --source=python needs no file")
        if not path.is_dir() and not os.path.isfile(name):
            raise UserError(f"--source cannot read {name}: it is no file")
    if not listing.names:
        what = f"--source {source}: nothing to read there"
        reasons = explain_left_out(listing.summary())
        raise UserError("; ".join([what, *reasons, READS, "--source=python needs no file"]))
    refuse_ours(source, {Path(name).parent for name in listing.names}, ours)
    return listing


class Walk:
    """Goes through a folder and everything below it.

    Links come last, so that files which are also read without them keep their names. Nothing is
    read twice, so that links may lead in a circle."""

    def __init__(self, follow_links, ours):
        self.follow_links = follow_links
        self.listing = FileList()
        self.links = []  # to be followed
        self.visited = {identity(folder) for folder in ours if os.path.isdir(folder)}

    def go(self, top):
        """A folder -> FileList, sorted folder by folder."""
        self.enter(top)
        while self.links:
            self.follow(self.links.pop(0))
        paths = sorted(map(Path, self.listing.names))
        self.listing.names = [str(path) for path in paths]
        return self.listing

    def enter(self, top):
        """Takes the files of a folder and of those below it, and puts its links aside."""
        folders = [top]
        while folders:
            folder = folders.pop()
            if identity(folder) in self.visited:  # this program's own, or reached by a link before
                continue
            self.visited.add(identity(folder))
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    path = Path(entry.path)
                    if entry.name.startswith("."):
                        self.listing.leave_out("hidden", path)
                    elif entry.is_symlink():
                        self.links.append(path)
                    elif entry.is_dir():
                        folders.append(path)
                    else:
                        self.take(path)

    def follow(self, link):
        """Takes what a link leads to, or leaves it out."""
        if not self.follow_links:
            self.listing.leave_out("links", link)
        elif not link.exists():
            raise UserError(f"--follow_links: {link} is a symbolic link that leads nowhere")
        elif identity(link) in self.visited:
            self.listing.leave_out("repeated", link)
        elif link.is_dir():
            self.enter(link)
        else:
            self.take(link)

    def take(self, path):
        """Takes a file of a kind that can be read, and leaves out any other."""
        if not suffixes(path.name)[0] or not path.is_file():
            self.listing.leave_out("other_kinds", path)
            return
        self.listing.names.append(str(path))
        if self.follow_links:
            self.visited.add(identity(path))


def match_glob(pattern, follow_links):
    """A glob -> FileList. Links that match, or lie on the way, count as links of a folder."""
    listing = FileList()
    components = Path(pattern).parts
    n_plain = 0  # components in front of the first with a wildcard: links there are followed
    while n_plain < len(components) and not glob.has_magic(components[n_plain]):
        n_plain += 1
    for name in sorted(glob.glob(pattern, recursive=True)):
        if goes_through_link(name, n_plain) and not follow_links:
            listing.leave_out("links", name)
        elif not os.path.exists(name):
            raise UserError(f"--follow_links: {name} is a symbolic link that leads nowhere")
        elif not os.path.isdir(name):
            listing.names.append(name)
        elif "**" not in pattern:
            listing.leave_out("folders", name)
    return listing


def goes_through_link(name, n_plain):
    """Whether a component of a path is a symbolic link, the first n_plain not counted."""
    components = Path(name).parts
    for i in range(n_plain, len(components)):
        if Path(*components[: i + 1]).is_symlink():
            return True
    return False


def identity(path):
    """What tells a file or a folder from all others, by whatever path it is reached."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def refuse_ours(source, folders, ours):
    """Raises UserError where one of the source's folders lies in one that this program writes."""
    resolved = {Path(folder).resolve() for folder in folders}
    for our_folder in map(Path, ours):
        for folder in resolved:
            if folder == our_folder or our_folder in folder.parents:
                what = f"--source={source} lies in {our_folder}, which this program writes"
                raise UserError(f"{what}: write another --data_dir")


# --- whether they have changed -----------------------------------------------------


def stated(names):
    """Names of files -> [(name, bytes, time of the last change in ns)].

    A name that is not a file on this machine gives (name, None, 0)."""
    files = []
    for name in names:
        status = os.stat(name) if os.path.isfile(name) else None
        if status and stat.S_ISREG(status.st_mode):
            files.append((name, status.st_size, status.st_mtime_ns))
        else:
            files.append((name, None, 0))
    return files


def inventory(source, files):
    """Files as stated() gives them -> what meta.json keeps of them.

    That is their number, their bytes and a digest, and each of them by its name below the source,
    unless there are more than LISTED."""
    is_folder = os.path.isdir(source)
    rows = []
    for name, size, changed in files:
        if is_folder:
            name = os.path.relpath(name, source)
        elif name == source:
            name = os.path.basename(name)
        rows.append([name, size, changed])
    content = {
        "number": len(rows),
        "bytes": sum(size or 0 for _, size, _ in rows),
        "sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }
    if len(rows) <= LISTED:
        content["names"] = {name: [size, changed] for name, size, changed in rows}
    return content


def changes(before, now):
    """Two inventories -> what is different, in words; empty where nothing is."""
    if before.get("sha256") == now["sha256"]:
        return ""
    if "names" not in before or "names" not in now:
        return f"some of its {now['number']:,} files have changed"
    differences = []
    for name in {**before["names"], **now["names"]}:
        if name not in now["names"]:
            differences.append(f"{end_of(name, 40)} is gone")
        elif name not in before["names"]:
            differences.append(f"{end_of(name, 40)} is new")
        elif before["names"][name] != now["names"][name]:
            differences.append(f"{end_of(name, 40)} has changed")
    return listed(differences, FIRST) or "their order has changed"
