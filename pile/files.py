"""The files of a source: which there are, which are left out and why, and whether they changed.

Of a folder, files are read whose names say that they can be, and nothing else: no name that begins
with a dot, and no symbolic link, unless links are to be followed. What is left out is counted.
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

# why something is left out, as meta.json calls it: what one is, what many are, and what helps
REASONS = {
    "links": ("symbolic link", "symbolic links", ": --follow_links reads them"),
    "repeated": ("link to what is read already", "links to what is read already", ""),
    "hidden": ("hidden file or folder", "hidden files or folders", ""),
    "other_kinds": ("file of another kind", "files of another kind", ""),
    "folders": ("folder", "folders", ": name one as a --source, or write a glob with **"),
}
FIRST = 5  # names that are told
LISTED = 1000  # files that meta.json has by name


def suffixes(name):
    """A file's name -> its kind and its packing, as (".jsonl", ".zst"), in small letters; ("", "")
    for a kind that cannot be read."""
    found = KIND.search(name)
    if not found:
        return "", ""
    packed = found["packed"] or ""
    return found[0].lower().removesuffix(packed.lower()), packed.lower()


def stem(name):
    """A file's name without folders, kind and packing."""
    name = os.path.basename(name)
    found = KIND.search(name)
    return name[: found.start()] if found else name


# --- finding them ---------------------------------------------------------------


@dataclass
class Found:
    """names: of the files to be read, in their order. left_out: {reason: names}."""

    names: list = field(default_factory=list)
    left_out: dict = field(default_factory=dict)

    def leave_out(self, reason, name):
        self.left_out.setdefault(reason, []).append(str(name))

    def summary(self):
        """What is left out, for meta.json: {reason: {"number": n, "names": the first few}}."""
        told = {}
        for reason in REASONS:
            names = sorted(self.left_out.get(reason, ()))
            if names:
                told[reason] = {"number": len(names), "names": names[:FIRST]}
        return told


def end_of(name, most=60):
    """A file's name, without its beginning where it is long."""
    return name if len(name) <= most else "\u2026" + name[1 - most :]


def explain_left_out(summary):
    """Found.summary() -> a line for each reason."""
    lines = []
    for reason, told in summary.items():
        number = told["number"]
        one, many, cure = REASONS[reason]
        what = one if number == 1 else many
        names = listed([end_of(name) for name in told["names"]], FIRST)
        more = ", ..." if number > len(told["names"]) else ""
        lines.append(f"left out: {number:,} {what} ({names}{more}){cure}")
    return lines


def find_files(source, follow_links=False, ours=()):
    """A file, a folder or a glob -> Found. ours: folders that this program writes, which are no
    source. Raises UserError where there is nothing to read, or a link leads nowhere."""
    path = Path(source)
    if path.is_dir():
        refuse_ours(source, [path], ours)
        found = Walk(follow_links, ours).go(path)
    elif path.exists():
        found = Found([source])
    else:
        found = match(source, follow_links)
    for name in found.names:
        if not suffixes(name)[0]:
            raise UserError(f"--source cannot read {name}: {READS}; --source=python needs no file")
        if not path.is_dir() and not os.path.isfile(name):
            raise UserError(f"--source cannot read {name}: it is no file")
    if not found.names:
        reasons = "".join(f"; {line}" for line in explain_left_out(found.summary()))
        what = f"--source {source}: nothing to read there{reasons}"
        raise UserError(f"{what}; {READS}; --source=python needs no file")
    refuse_ours(source, {Path(name).parent for name in found.names}, ours)
    return found


class Walk:
    """Goes through a folder. Links come last, so that what is read without them keeps its name;
    nothing is read twice, so that no link leads round in a circle."""

    def __init__(self, follow_links, ours):
        self.found, self.links = Found(), []
        self.follow_links = follow_links
        self.seen = {identity(folder) for folder in ours if os.path.isdir(folder)}

    def go(self, top):
        """A folder -> Found, sorted folder by folder."""
        self.enter(top)
        while self.links:
            self.follow(self.links.pop(0))
        self.found.names = [str(path) for path in sorted(map(Path, self.found.names))]
        return self.found

    def enter(self, top):
        folders = [top]
        while folders:
            folder = folders.pop()
            if identity(folder) in self.seen:  # this program's own, or behind a link too
                continue
            self.seen.add(identity(folder))
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    path = Path(entry.path)
                    if entry.name.startswith("."):
                        self.found.leave_out("hidden", path)
                    elif entry.is_symlink():
                        self.links.append(path)
                    elif entry.is_dir():
                        folders.append(path)
                    else:
                        self.take(path)

    def follow(self, link):
        if not self.follow_links:
            self.found.leave_out("links", link)
        elif not link.exists():
            raise UserError(f"--follow_links: {link} is a symbolic link that leads nowhere")
        elif identity(link) in self.seen:
            self.found.leave_out("repeated", link)
        elif link.is_dir():
            self.enter(link)
        else:
            self.take(link)

    def take(self, path):
        """Takes a file that can be read, and leaves out any other."""
        if not suffixes(path.name)[0] or not path.is_file():
            self.found.leave_out("other_kinds", path)
            return
        self.found.names.append(str(path))
        if self.follow_links:
            self.seen.add(identity(path))


def match(pattern, follow_links):
    """A glob -> Found. Links that it finds, or goes through, are links of its folder."""
    found = Found()
    parts = Path(pattern).parts
    wild = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    for name in sorted(glob.glob(pattern, recursive=True)):
        below = [Path(*Path(name).parts[: i + 1]) for i in range(wild, len(Path(name).parts))]
        through_link = any(path.is_symlink() for path in below)
        if through_link and not follow_links:
            found.leave_out("links", name)
        elif not os.path.exists(name):
            raise UserError(f"--follow_links: {name} is a symbolic link that leads nowhere")
        elif not os.path.isdir(name):
            found.names.append(name)
        elif "**" not in pattern:
            found.leave_out("folders", name)
    return found


def identity(path):
    """What tells a file or a folder from all others, whatever it is called."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def refuse_ours(source, folders, ours):
    """Raises UserError where a source lies in a folder that this program writes."""
    places = {Path(folder).resolve() for folder in folders}
    for own in map(Path, ours):
        for place in places:
            if place == own or own in place.parents:
                what = f"--source={source} lies in {own}, which this program writes"
                raise UserError(f"{what}: write another --data_dir")


# --- whether they have changed -----------------------------------------------------


def stated(names):
    """Names of files -> [(name, bytes, time of the last change in ns)]; (name, None, 0) for what
    is no file here."""
    found = []
    for name in names:
        status = os.stat(name) if os.path.isfile(name) else None
        if status and stat.S_ISREG(status.st_mode):
            found.append((name, status.st_size, status.st_mtime_ns))
        else:
            found.append((name, None, 0))
    return found


def inventory(source, files):
    """What stated() gives -> what meta.json keeps of it, by names below the source: how many files
    there are, their bytes, a digest; and each of them, unless they are too many."""
    folder = os.path.isdir(source)
    rows = []
    for name, size, changed in files:
        if folder:
            name = os.path.relpath(name, source)
        elif name == source:
            name = os.path.basename(name)
        rows.append([name, size, changed])
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    told = {"number": len(rows), "bytes": sum(size or 0 for _, size, _ in rows)}
    told["sha256"] = digest
    if len(rows) <= LISTED:
        told["names"] = {name: [size, changed] for name, size, changed in rows}
    return told


def changes(was, now):
    """Two inventories -> what is different, in words; empty: nothing."""
    if was.get("sha256") == now["sha256"]:
        return ""
    if "names" not in was or "names" not in now:
        return f"some of its {now['number']:,} files have changed"
    told = []
    for name in {**was["names"], **now["names"]}:
        before, after = was["names"].get(name), now["names"].get(name)
        if after is None:
            told.append(f"{end_of(name, 40)} is gone")
        elif before is None:
            told.append(f"{end_of(name, 40)} is new")
        elif before != after:
            told.append(f"{end_of(name, 40)} has changed")
    return listed(told, FIRST) or "their order has changed"
