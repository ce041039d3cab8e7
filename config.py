"""One grammar for every script: a config file, then --key=value.

    python train.py configs/gpt2_inrun.py --max_iters=100 --compile

A script's options are the fields of a flat dataclass; where the first is `run`, a run's folder
stands in the config file's place. A config file is Python, run in a namespace of its own: it is
code, so read one that a stranger sent before you use it. Its names are the dataclass's fields,
`_names` are scratch, and it builds on another by `from configs.gpt2_inrun import *`. A run's
config.json is a config file too: the run's own settings, for the folder it lies in.
"""

import difflib
import faulthandler
import inspect
import math
import os
import re
import runpy
import sys
import traceback
import types
import typing
from pathlib import Path

from system import terminal
from system.errors import UserError, explain
from system.files import read_json

ROOT = Path(__file__).resolve().parent
LARGEST = 2**63  # no int of an option reaches it


def load(cls, argv=None):
    """argv (default: the command line) -> an instance of the dataclass `cls`.

    A field called out_dir that nobody set becomes out/<the config file's name>.
    Raises UserError, with what to type, on an unknown key, a wrong type, a missing file.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print(describe(cls))
        raise SystemExit(0)
    hints = typing.get_type_hints(cls)
    files = argv[:1] if argv and not argv[0].startswith("-") else []
    if not files:
        settings = {}
    elif takes_run(hints):
        settings = {"run": files[0]}
    else:
        settings = read_file(find(files[0], hints), cls, hints)
    pairs = argv[len(files) :]
    for arg, after in zip(pairs, [*pairs[1:], "--"]):
        if not arg.startswith("--"):
            raise UserError(f"{arg!r} is out of place: one config file first, then --key=value")
        key, eq, text = arg.removeprefix("--").partition("=")
        if key == "out_dir" and takes_run(hints):
            script = Path(sys.argv[0]).name
            cure = f"write {terminal.command('python', script, text or '<folder>')}"
            raise UserError(f"--out_dir: the run's folder comes first, without a key: {cure}")
        known(key, hints, "the command line")
        if not eq and hints[key] is not bool:
            example = "..." if after.startswith("--") else after
            raise UserError(f"--{key} needs a value: write --{key}={example}")
        settings[key] = parse(key, text if eq else "True", hints[key])
    if "out_dir" in hints and not settings.get("out_dir"):
        settings["out_dir"] = str(Path("out", Path(files[0]).stem if files else "run"))
    return cls(**settings)


def takes_run(hints):
    """Whether a run's folder stands in the config file's place."""
    return next(iter(hints)) == "run"


# --- config files -----------------------------------------------------------------


def find(name, hints):
    """The path, if it is a config file's, else configs/<stem>.py beside this file."""
    path = Path(name)
    if path.suffix in (".py", ".json") and path.is_file():
        return path
    if path.exists():
        what = f"{name} is no config file (.py or .json)"
        if (path / "config.json").is_file():
            raise UserError(
                f"{what}, it is a run's folder: write {terminal.quoted(str(path / 'config.json'))}"
            )
        if "source" in hints:
            raise UserError(f"{what}, that is data: write {terminal.command(f'--source={name}')}")
        if (path / "meta.json").is_file():
            cure = terminal.command(f"--data_dir={name}")
            raise UserError(f"{what}, it is prepared data: write {cure}")
        if "data_dir" in hints:
            folder = str(Path("data", path.stem))
            source = terminal.command(f"--source={name}", f"--data_dir={folder}")
            first = f"python prepare_pile.py {source}"
            second = f"python train.py configs/small.py {terminal.command(f'--data_dir={folder}')}"
            raise UserError(f"{what}. If it is text to train on, type: {first}; then: {second}")
        raise UserError(f"{what}: name one first, then --key=value")
    ours = ROOT / "configs" / f"{path.stem}.py"
    if path.suffix in ("", ".py") and ours.is_file():
        return ours
    have = ", ".join(sorted(p.stem for p in (ROOT / "configs").glob("*.py")))
    raise UserError(f"no config file {name!r}: name a file, or one of {have}")


def read_file(path, cls, hints):
    names = read_run(path, cls) if path.suffix == ".json" else read_python(path)
    settings = {}
    for key, value in names.items():
        if key.startswith("_") or isinstance(value, types.ModuleType):
            continue
        known(key, hints, path)
        settings[key] = parse(key, value, hints[key])
    return settings


def read_python(path):
    """Runs a config file -> its names. Raises UserError with whatever it raises, and its line."""
    sys.path.insert(0, str(ROOT))  # for `from configs.x import *`
    try:
        return runpy.run_path(str(path))
    except Exception as e:  # of the user's own code: whatever it is, the user can mend it
        lines = [e.lineno] if isinstance(e, SyntaxError) else []
        frames = traceback.extract_tb(e.__traceback__)
        lines += [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f"{path}, line {lines[0]}" if lines else str(path)
        raise UserError(f"{where}: {type(e).__name__}: {e}") from e
    finally:
        sys.path.remove(str(ROOT))


def read_run(path, cls):
    """A run's config.json -> its settings. A class with a function of_run() says what becomes of
    them where the run lies now, and finds them elsewhere if the file is damaged."""
    if hasattr(cls, "of_run"):
        return cls.of_run(path)
    return read_json(path, "name another config file", {"config": dict}, unsealed=True)["config"]


def known(key, hints, where):
    if key not in hints:
        near = difflib.get_close_matches(key, hints, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists every key"
        raise UserError(f"unknown key {key!r} in {where}: {hint}")


# --- values -----------------------------------------------------------------------


def parse(key, value, kind):
    """A config file's value, or a command line's text, as the type its field was declared with."""
    choices = typing.get_args(kind)
    if choices:  # Literal["a", "b"]
        if value not in choices:
            raise UserError(f"--{key}={value}: choose one of {', '.join(map(str, choices))}")
        return value
    if kind is bool:
        if value in (True, False):
            return bool(value)
        if str(value).lower() not in ("true", "false", "1", "0"):
            raise UserError(f"--{key}={value}: write --{key}=True or --{key}=False")
        return str(value).lower() in ("true", "1")
    if kind is str and isinstance(value, str):
        if "\0" in value:
            raise UserError(f"--{key}={value!r} holds a NUL character: write it without")
        return value
    if kind in (int, float) and not isinstance(value, bool):
        number = parse_number(value, kind)
        if kind is int and number is not None and abs(number) >= LARGEST:
            raise UserError(f"--{key}={value} is too large: write a number below 2^63")
        if number is not None:
            return number
    name = "an int" if kind is int else f"a {kind.__name__}"
    raise UserError(f"--{key}={value!r} is not {name}: write --{key}=<{kind.__name__}>")


def parse_number(value, kind):
    """A number or its text -> an int or a float, None where it is neither. "1e9" and "100_000" are
    whole numbers too; NaN is no number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if kind is float:
        return None if math.isnan(number) else number
    if not number.is_integer():
        return None
    if isinstance(value, str) and not value.strip("+-").isdigit():
        return int(number)
    return int(value)


def check(cfg, at_least=(), above=(), below=()):
    """Raises UserError where a number of cfg is infinite, or not in its range. Each of the others
    is a dict {key: bound}."""
    for key, bound in dict(at_least).items():
        if getattr(cfg, key) < bound:
            out_of_range(cfg, key, f"at least {bound}")
    for key, bound in dict(above).items():
        if getattr(cfg, key) <= bound:
            out_of_range(cfg, key, f"above {bound}")
    for key, bound in dict(below).items():
        if getattr(cfg, key) >= bound:
            out_of_range(cfg, key, f"below {bound}")
    for key, value in vars(cfg).items():
        if isinstance(value, float) and not math.isfinite(value):
            out_of_range(cfg, key, "finite")


def out_of_range(cfg, key, wanted):
    raise UserError(f"--{key}={getattr(cfg, key)}: it must be {wanted}")


# --- help, and the way out ----------------------------------------------------------


def describe(cls):
    """Help: the module's docstring, then every key with its default as one types it, its comment,
    and its choices. In the source a comment stands behind a field or on the lines above it;
    `# --- title` begins a section."""
    hints = typing.get_type_hints(cls)
    lines = [(inspect.getmodule(cls).__doc__ or "").strip(), ""]
    above = []
    for line in inspect.getsource(cls).splitlines():
        title = re.match(r"    # --- (.*)", line)
        comment = re.match(r"    # (.*)", line)
        field = re.match(r"    (\w+): .*?(?:  # (.*))?$", line)
        if title:
            lines.append(f"\n{title[1]}")
        elif comment:
            above.append(comment[1])
        elif field and field[1] in cls.__dataclass_fields__:
            if field[2]:
                above.append(field[2])
            option = f"--{field[1]}={typed(cls.__dataclass_fields__[field[1]].default)}"
            choices = typing.get_args(hints[field[1]])
            if choices:
                above.append(f"[{' | '.join(choices)}]")
            lines.append(f"  {option:<44} {' '.join(above)}".rstrip())
            above = []
        elif re.match(r"    (def|@)", line):
            break
    return "\n".join(lines)


def typed(default):
    """A default as it stands on a command line."""
    if not isinstance(default, str):
        return str(default)
    return terminal.quoted(default).replace(r"\u000a", r"\n")


def main(run, leave=None):
    """Calls run(). What the user can mend, a UserError or what the operating system refuses,
    becomes one line on stderr and exit code 2. Every other exception is a bug and keeps its
    traceback. leave(exit code), if given, comes last, for what must not outlive the run.
    Nothing that stood in the data reaches the terminal raw, not even in a traceback."""
    sys.excepthook = terminal.show_bug
    faulthandler.enable(sys.__stderr__)  # a file cut short under a running process: SIGBUS, a line
    with terminal.guarded():
        code = outcome(run)
    if leave:
        leave(code)
    if code:
        sys.exit(code)


def outcome(run):
    """run()'s exit code, and the line that says what went wrong."""
    try:
        run()
    except KeyboardInterrupt:
        return 130
    except UserError as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun once a machine
            terminal.warn(f"error: {e}")
        return 2
    except OSError as e:  # of any rank: its disk is its own
        terminal.warn(f"error: {explain(e)}")
        return 2
    return 0
