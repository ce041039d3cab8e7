"""Files that are whole at any moment and carry a checksum, and folders of one process.

- Claim makes a folder one process's. atomic() writes a file that appears whole or not at all.
- write_json() seals what it writes: the last entry, "crc32", is the checksum of all others.
  read_json() refuses a file that does not fit its seal. The same goes for lines of JSON.
- load_array() maps a .npy file. A damaged header is one line for the user.
- plain_name() and remove_folder() guard what is removed: only a folder below its parent, and only
  files with names that this program gives.

Nothing is written through a symbolic link: a stranger may have planted it.
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

# what numpy raises for a .npy file with a damaged header
UNREADABLE = (
    ValueError,
    TypeError,
    EOFError,
    SyntaxError,
    OverflowError,
    MemoryError,
    RecursionError,
    tokenize.TokenError,
)

# --- a folder of one process ----------------------------------------------------


class Claim:
    """A folder that belongs to this process until release(), or as a context.

    The claim is a lock on the folder's file `lock`. It ends with the process, however that ends.
    It is fcntl.lockf's, which child processes do not inherit as they do that of fcntl.flock."""

    def __init__(self, folder, key):
        """Makes the folder if it is missing.

        Raises UserError where another process has claimed it: write another --key."""
        self.folder = Path(folder)
        self.path = self.folder / "lock"
        self.made_folder = not self.folder.is_dir()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.made_lock = not self.path.exists()
        self.lock = None
        while self.lock is None:
            self.lock = self.open_lock(key)

    def open_lock(self, key):
        """The lock's open file. None where its former owner has just removed it: try again."""
        lock = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(lock)
            what = f"another process is writing {self.folder}"
            raise UserError(f"{what}: wait for it, or write another --{key}") from e
        if self.path.exists() and os.path.samestat(os.fstat(lock), self.path.stat()):
            return lock
        os.close(lock)
        return None

    def release(self, undo=False):
        """Ends the claim.

        undo: also removes the lock that it made, and the folder that it made if that is empty."""
        if self.lock is None:
            return
        if undo and self.made_lock:
            self.path.unlink(missing_ok=True)
        if undo and self.made_folder:
            with contextlib.suppress(OSError):  # the folder is not empty
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
    """As a context, a binary file to write that appears under `path` whole or not at all.

    keep: the name that a file of this path takes instead of being replaced. Raises OSError, with
    the path."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # a killed process left it, or it is a planted link
    try:
        with named(path), open(temporary, "x+b") as file:  # "x" follows no link
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
    """Gives the path to an OSError that has none, as that of a write."""
    try:
        yield
    except OSError as e:
        if e.filename is None and e.errno is not None:
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise


def sync(path):
    """Waits until a file or a folder is on the disk."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def write_json(path, content):
    """Writes a dict, sealed, as JSON."""
    with atomic(path) as file:
        file.write((json.dumps(sealed(content), indent=2) + "\n").encode())


def write_lines(path, rows):
    """Writes dicts, each sealed, as a line of JSON each."""
    with atomic(path) as file:
        for row in rows:
            file.write((json.dumps(sealed(row)) + "\n").encode())


def sealed(content):
    """A dict with its checksum as its last entry."""
    return {**content, "crc32": seal_of(content)}


def seal_of(content):
    """The checksum of a dict, as text: eight hexadecimal digits."""
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def write_array(path, array):
    """Writes a .npy file. Returns the file's CRC-32."""
    with atomic(path) as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(array).data)
        file.flush()
        return crc32(file.name)


# --- reading --------------------------------------------------------------------

LARGEST_JSON = 1 << 28  # bytes
BLOCK = 1 << 20  # bytes that are read at a time


def read_json(path, cure, keys=(), unsealed=False):
    """A file of write_json() -> its dict, without the seal.

    cure: what the user can do where it is damaged. keys: {entry: its type} that it must have.
    unsealed: a missing seal is no damage, but a wrong one is. Raises UserError."""
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
    """Raises UserError where an entry is missing or is of another type. keys: {entry: type}."""
    for key, kind in dict(keys).items():
        if key not in content:
            raise UserError(f"{path} is damaged (it has no {key!r}): {cure}")
        value = content[key]
        wrong_bool = isinstance(value, bool) and kind is not bool
        if wrong_bool or not isinstance(value, kind):
            what = f"{key!r} is a {type(value).__name__}"
            raise UserError(f"{path} is damaged ({what}): {cure}")


def read_lines(path):
    """A file of write_lines() -> its dicts. Raises UserError, which names the damaged line."""
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
    """A .npy file -> its array, memory-mapped.

    Raises UserError where it is missing, its header is damaged, it is shorter than the header says,
    or it does not have this dtype and shape."""
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
    """The first line of an exception's message, or the exception's type."""
    lines = str(error).splitlines() or [""]
    return lines[0] or type(error).__name__


def crc32(path, start=0, size=None):
    """The CRC-32 of a file's bytes from `start` on: of `size` bytes, or of all."""
    crc = 0
    left = os.path.getsize(path) - start if size is None else size
    with open(path, "rb") as file:
        file.seek(start)
        while left > 0:
            block = file.read(min(BLOCK, left))
            if not block:  # the file is shorter
                break
            crc = zlib.crc32(block, crc)
            left -= len(block)
    return crc


def footer_crc32(path):
    """The CRC-32 of a parquet file's footer. The file's pages have checksums of their own."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(size - 8)
        length = int.from_bytes(file.read(4), "little")
    return crc32(path, max(0, size - 8 - length))


# --- names, and what may be removed -----------------------------------------------


def plain_name(name, key):
    """Returns a name that is one plain component of a path. Raises UserError for any other."""
    plain = name not in ("", ".", "..") and "/" not in name and name.isprintable()
    if not plain or len(name.encode()) > 200:
        raise UserError(f"--{key}={name!r} is no name of a folder: write letters and digits")
    return name


def name_for(text):
    """A plain name for any text: the text itself, or its plain characters and a hash."""
    plain = re.sub(r"[^\w.+=@,() -]", "_", text).lstrip(". ").rstrip()
    plain = plain.encode()[:80].decode(errors="ignore")
    if plain and plain == text:
        return text
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()
    return f"{plain}-{digest[:8]}".lstrip("-")


def strangers(folder, known):
    """The names in a folder that this program did not write: they fit no pattern of known."""
    return [name for name in sorted(os.listdir(folder)) if not fits(name, known)]


def fits(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def refuse_strangers(folder, known, cure):
    """Raises UserError where a folder holds files that this program did not write."""
    names = strangers(folder, known)
    if names:
        first = ", ".join([*names[:5], "..."] if len(names) > 5 else names)
        raise UserError(f"{folder} holds files that this program did not write ({first}): {cure}")


def remove_folder(folder, known, cure):
    """Removes a folder whose files fit the patterns of known.

    Raises UserError, before anything is removed, where it holds other files."""
    folder = Path(folder)
    refuse_strangers(folder, known, cure)
    for name in os.listdir(folder):
        (folder / name).unlink()
    folder.rmdir()


def data_of(run, data_dir):
    """The folder of a run's data. A relative data_dir counts from where one stands, or else from a
    folder above the run's, in which the run was started."""
    if Path(data_dir).is_dir():
        return Path(data_dir)
    for above in Path(run).resolve().parents:
        if (above / data_dir / "meta.json").is_file():
            return above / data_dir
    return Path(data_dir)
