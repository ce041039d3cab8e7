"""One grammar for every script: a config file, then --key=value.

    python train.py config/gpt2_inrun.py --max_iters=100 --compile

A script's options are the fields of a flat dataclass; where the first is `run`, a run's folder stands in the config file's place. A config file
is Python, run in a namespace of its own; its names are the dataclass's fields, `_names` are scratch, and it builds on another by
`from configs.gpt2_inrun import *`. A run's config.json is a config file too.
"""

import difflib
import inspect
import json
import os
import re
import runpy
import sys
import traceback
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent
FOLDERS = ("ops", "sources", "show", "bench", "experiments")


def load(cls, argv=None):
    """argv (default: the command line) -> an instance of the dataclass `cls`.

    A field called out_dir that nobody set becomes out/<the config file's name>.
    Raises ValueError, with what to type, on an unknown key, a wrong type, a missing file.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print(describe(cls))
        raise SystemExit(0)
    hints = typing.get_type_hints(cls)
    files = argv[:1] if argv and not argv[0].startswith("-") else []
    settings = {} if not files else {"run": files[0]} if next(iter(hints)) == "run" else read_file(find(files[0]), hints)
    pairs = argv[len(files) :]
    for arg, after in zip(pairs, [*pairs[1:], "--"]):
        if not arg.startswith("--"):
            raise ValueError(f"{arg!r} is out of place: one config file first, then --key=value")
        key, eq, text = arg.removeprefix("--").partition("=")
        known(key, hints, "the command line")
        if not eq and hints[key] is not bool:
            raise ValueError(f"--{key} needs a value: write --{key}={'...' if after.startswith('--') else after}")
        settings[key] = parse(key, text if eq else "True", hints[key])
    if "out_dir" in hints and not settings.get("out_dir"):
        settings["out_dir"] = str(Path("out", Path(files[0]).stem if files else "run"))
    return cls(**settings)


def find(name):
    """The path if it exists, else configs/<stem>.py beside this file."""
    for path in (Path(name), ROOT / "configs" / f"{Path(name).stem}.py"):
        if path.is_file():
            return path
    have = ", ".join(sorted(p.stem for p in (ROOT / "configs").glob("*.py")))
    raise ValueError(f"no config file {name!r}: name a file, or one of {have}")


def read_file(path, hints):
    if path.suffix == ".json":
        names = json.loads(path.read_text())["config"]
    else:
        sys.path.insert(0, str(ROOT))  # for `from configs.x import *`
        try:
            names = runpy.run_path(str(path))
        except (SyntaxError, NameError, ImportError) as e:
            raise ValueError(f"{path}: {type(e).__name__}: {e}") from e
        finally:
            sys.path.remove(str(ROOT))
    settings = {}
    for key, value in names.items():
        if key.startswith("_") or isinstance(value, types.ModuleType):
            continue
        known(key, hints, path)
        settings[key] = parse(key, value, hints[key])
    return settings


def known(key, hints, where):
    if key not in hints:
        near = difflib.get_close_matches(key, hints, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists every key"
        raise ValueError(f"unknown key {key!r} in {where}: {hint}")


def parse(key, value, kind):
    """A config file's value, or a command line's text, as the type its field was declared with."""
    choices = typing.get_args(kind)
    if choices:  # Literal["a", "b"]
        if value not in choices:
            raise ValueError(f"--{key}={value}: choose one of {', '.join(map(str, choices))}")
        return value
    if kind is bool:
        if value in (True, False):
            return bool(value)
        if str(value).lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"--{key}={value}: write --{key}=True or --{key}=False")
        return str(value).lower() in ("true", "1")
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)  # "1e9" and "100_000" are whole numbers too
            if kind is float:
                return number
            if number.is_integer():
                return int(value) if not isinstance(value, str) or value.strip("+-").isdigit() else int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise ValueError(f"--{key}={value!r} is not {'an int' if kind is int else f'a {kind.__name__}'}: write --{key}=<{kind.__name__}>")


def describe(cls):
    """Help: the module's docstring, then every key with its default and its comment, as the source has them."""
    lines = [(inspect.getmodule(cls).__doc__ or "").strip(), ""]
    for line in inspect.getsource(cls).splitlines():
        field = re.match(r"\s+(\w+): [^=]*= *(.*?)\s*(?:#\s*(.*))?$", line)
        if field and field[1] in cls.__dataclass_fields__:
            lines.append(f"  --{field[1] + '=' + field[2]:<42} {field[3] or ''}".rstrip())
        elif re.match(r"    # ", line):
            lines.append("\n" + line.strip()[2:])
        elif re.match(r"\s+def ", line):
            break
    return "\n".join(lines)


def positive(cfg, *keys):
    for key in keys:
        if getattr(cfg, key) < 1:
            raise ValueError(f"--{key}={getattr(cfg, key)}: it must be at least 1")


def main(run):
    """Call run(); what the user can mend becomes one line on stderr and exit code 2: a ValueError raised by this project's own lines,
    the operating system's refusals (disk full, read-only, no such file). A ValueError from inside a library is a bug and keeps its traceback."""
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as e:
        where = Path(traceback.extract_tb(e.__traceback__)[-1].filename).resolve()
        if not isinstance(e, OSError) and where.parent not in (ROOT, *(ROOT / folder for folder in FOLDERS)):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(e, OSError):  # under torchrun once a machine, but for a rank's own
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
