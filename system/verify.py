"""Every file of a run against its checksum."""

from pathlib import Path

from system import store
from system.checkpoints import find_checkpoints, read_checkpoint
from system.errors import UserError
from system.files import crc32, read_json, read_lines
from system.folder import RUN_FILES
from system.terminal import command, say

KNOWN = {*RUN_FILES, "keep.npy", "dropped.npy"}


def verify(run):
    """Reads every file of a run and of its revaluations, and says which are as they were written.
    Raises UserError, which names the others."""
    run = Path(run)
    if not (run / "config.json").is_file() and not find_checkpoints(run):
        raise UserError(f"{run} is no run's folder: name one with --out_dir=...")
    folders = [run, *sorted(path.parent for path in run.glob("revalued/*/values.json"))]
    whole, damaged = [], []
    for folder in folders:
        for path, check in checks(folder):
            try:
                check()
            except UserError as e:
                damaged.append(str(e))
            except OSError as e:
                damaged.append(f"{path} is missing or cannot be read ({e.strerror})")
            else:
                whole.append(str(path))
    for path in whole:
        say(f"{path} is as it was written")
    if damaged:
        raise UserError("; ".join(dict.fromkeys(damaged)))


def checks(folder):
    """[(path, what raises where it is damaged)], of every file that a run may have."""
    repair = "type: " + command("python", "revalue.py", str(folder), "--repair")
    for name in ("config.json", "values.json", "keep.json"):
        path = folder / name
        if not path.is_file():
            continue
        yield path, lambda path=path: read_json(path, repair)
        try:
            files = read_json(path, repair, {"files": dict})["files"]
        except UserError:
            continue
        for inner, counted in files.items():
            yield folder / inner, lambda n=inner, c=counted: check_file(folder / n, c, repair)
    if (folder / "evaluations.jsonl").is_file():
        path = folder / "evaluations.jsonl"
        yield path, lambda path=path: read_lines(path)
    for path in find_checkpoints(folder):
        yield path, lambda path=path: check_checkpoint(folder, path, repair)


def check_file(path, counted, cure):
    """counted: the CRC-32 of the file, or what store.Records.counted() said of it."""
    if path.name not in KNOWN:
        raise UserError(f"{path.parent} speaks of a file {path.name!r}, which a run does not have")
    if isinstance(counted, dict):
        check_records(path.parent, path.stem, counted, cure)
    elif crc32(path) != counted:
        raise UserError(f"{path} is damaged (its checksum does not fit): {cure}")


def check_records(folder, name, counted, cure):
    store.check(folder, {name: counted}, cure)
    store.read(folder, name)  # its header


def check_checkpoint(folder, path, cure):
    """The checkpoint itself, and the rows that it counts on."""
    for name, counted in read_checkpoint(path)["valuation"].get("records", {}).items():
        check_records(folder, name, counted, cure)
