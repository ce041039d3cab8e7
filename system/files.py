"""Files that are whole at any moment, that know their own checksum, and that no planted link leads
elsewhere.

- atomic() writes a file that appears whole or not at all; claim() makes a folder one process's.
- write_json() seals what it writes: the last entry, "crc32", is the checksum of all others.
  read_json() refuses what does not fit its seal. The same for lines of JSON.
- load_array() maps a .npy file; a damaged header is one line for the user.
- plain_name() and remove_folder() guard what is removed: only a folder below its parent, only
  files of names that this program gives.

A symbolic link is never followed where something is written: a stranger may have planted it.
"""

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import re
import tokenize
import zlib
from pathlib import Path

import numpy as np

from system.errors import UserError

# what numpy raises of a .npy file with a damaged header
UNREADABLE = (ValueError, TypeError, EOFError, SyntaxError, OverflowError, MemoryError)
UNREADABLE += (RecursionError, tokenize.TokenError)

# --- a folder of one process ----------------------------------------------------


class Claim:
    """A folder that is this process's until release(), also as a context: by a lock on its file
    `lock`, which ends with the process, however that ends."""

    def __init__(self, folder, key):
        """Makes the folder where there is none. Raises UserError, which says to give another
        --key, where it is another process's."""
        self.folder = Path(folder)
        self.made_folder = not self.folder.is_dir()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "lock"
        self.made_lock = not path.exists()
        while True:
            self.lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                os.close(self.lock)
                what = f"another process is writing {folder}"
                raise UserError(f"{what}: wait for it, or write another --{key}") from e
            if path.exists() and os.path.samestat(os.fstat(self.lock), path.stat()):
                return
            os.close(self.lock)  # who had it before removed it

    def release(self, undo=False):
        """undo: and the folder is as it was found, if nothing else was written there."""
        if self.lock is None:
            return
        if undo and self.made_lock:
            (self.folder / "lock").unlink(missing_ok=True)
        if undo and self.made_folder:
            with contextlib.suppress(OSError):  # it holds something
                self.folder.rmdir()
        os.close(self.lock)
        self.lock = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.release()


# --- writing --------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path, keep=None):
    """A binary file to write that appears under `path` whole or not at all; what was there takes
    the name `keep`. Raises OSError, with the path."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed, or a planted link
    try:
        with named(path), open(temporary, "x+b") as file:  # x: it follows no link
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)  # the rename itself


@contextlib.contextmanager
def named(path):
    """Gives an OSError of a write, which knows no path, this one."""
    try:
        yield
    except OSError as e:
        if e.filename is None and e.errno is not None:
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise


def sync(path):
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def write_json(path, content):
    with atomic(path) as file:
        file.write((json.dumps(sealed(content), indent=2) + "\n").encode())


def write_lines(path, rows):
    """A sealed line of JSON for each of them."""
    with atomic(path) as file:
        file.writelines((json.dumps(sealed(row)) + "\n").encode() for row in rows)


def sealed(content):
    """A dict with its checksum as its last entry."""
    return content | {"crc32": seal_of(content)}


def seal_of(content):
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def write_array(path, array):
    """A .npy; returns the CRC-32 of its file."""
    with atomic(path) as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(array).data)
        file.flush()
        return crc32(file.name)


# --- reading --------------------------------------------------------------------

LARGEST_JSON = 1 << 28  # bytes


def read_json(path, cure, keys=(), unsealed=False):
    """A file of write_json() -> its dict, without the seal. cure: what to type where it is damaged.
    keys: {entry: its type} that it must have. unsealed: it may be without a seal, but not with a
    wrong one. Raises UserError."""
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path} is larger than {LARGEST_JSON >> 20} MB: it is no file of ours")
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({short(e)}): {cure}") from e
    except OSError as e:
        raise UserError(f"{path} is missing or cannot be read ({e.strerror}): {cure}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds a {type(content).__name__}): {cure}")
    seal = content.pop("crc32", None)
    if seal is None and not unsealed:
        raise UserError(f"{path} is damaged (it has no checksum): {cure}")
    if seal is not None and seal != seal_of(content):
        raise UserError(f"{path} is damaged (its checksum does not fit): {cure}")
    check_entries(content, keys, path, cure)
    return content


def check_entries(content, keys, path, cure):
    """Raises UserError where a dict has not every one of keys {entry: type}."""
    for key, kind in dict(keys).items():
        if key not in content:
            raise UserError(f"{path} is damaged (it has no {key!r}): {cure}")
        value = content[key]
        wrong_bool = isinstance(value, bool) and kind is not bool
        if wrong_bool or not isinstance(value, kind):
            what = f"{key!r} is a {type(value).__name__}"
            raise UserError(f"{path} is damaged ({what}): {cure}")


def read_lines(path):
    """A file of write_lines() -> dicts. Raises UserError, which names the line."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} is damaged in line {number} ({short(e)})") from e
        if not isinstance(row, dict) or row.pop("crc32", None) != seal_of(row):
            raise UserError(f"{path} is damaged in line {number} (its checksum does not fit)")
        rows.append(row)
    return rows


def load_array(path, cure, dtype=None, shape=None):
    """A .npy file -> its array, memmapped. Raises UserError where it is missing, its header is
    damaged, it is shorter than that says, or it is not of this dtype and shape."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except OSError as e:
        raise UserError(f"{path} is missing or damaged ({e.strerror or e}): {cure}") from e
    except UNREADABLE as e:
        raise UserError(f"{path} is missing or damaged ({short(e)}): {cure}") from e
    if dtype is not None and array.dtype != dtype:
        raise UserError(f"{path} is damaged, it holds {array.dtype}, not {dtype}: {cure}")
    if shape is not None and array.shape != shape:
        raise UserError(f"{path} is damaged, its shape is {array.shape}, not {shape}: {cure}")
    return array


def short(error):
    """The first line of what an exception says, or its type."""
    lines = str(error).splitlines() or [""]
    return lines[0] or type(error).__name__


def crc32(path, start=0, size=None):
    """The CRC-32 of a file's bytes from start on: of size bytes, or of all."""
    crc, end = 0, os.path.getsize(path) if size is None else start + size
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(max(0, min(1 << 20, end - file.tell()))):
            crc = zlib.crc32(block, crc)
    return crc


def footer_crc32(path):
    """Of a parquet file's footer, which says where everything lies: its pages have their own."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(size - 8)
        length = int.from_bytes(file.read(4), "little")
    return crc32(path, max(0, size - 8 - length))


# --- names, and what may be removed -----------------------------------------------


def plain_name(name, key):
    """name, if it is one plain component of a path. Raises UserError."""
    plain = name not in ("", ".", "..") and "/" not in name and name.isprintable()
    if not plain or len(name.encode()) > 200:
        raise UserError(f"--{key}={name!r} is no name of a folder: write letters and digits")
    return name


def name_for(text):
    """A plain name for any text: itself where it is plain, else what is left of it, and a hash."""
    kept = re.sub(r"[^\w.+=@,() -]", "_", text).lstrip(". ").rstrip()
    kept = kept.encode()[:80].decode(errors="ignore")
    if kept and kept == text:
        return text
    return f"{kept}-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]}".lstrip("-")


def strangers(folder, known):
    """Names in a folder that fit none of the patterns of known: what this program did not write."""
    names = sorted(os.listdir(folder))
    return [name for name in names if not any(fnmatch.fnmatchcase(name, p) for p in known)]


def refuse_strangers(folder, known, cure):
    """Raises UserError, before anything is removed, where a folder holds what is not ours."""
    if found := strangers(folder, known):
        names = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise UserError(f"{folder} holds files that this program did not write ({names}): {cure}")


def remove_folder(folder, known, cure):
    """Removes a folder of files whose names fit the patterns of known. Raises UserError, before
    anything is removed, where it holds anything else."""
    folder = Path(folder)
    refuse_strangers(folder, known, cure)
    for name in os.listdir(folder):
        (folder / name).unlink()
    folder.rmdir()
