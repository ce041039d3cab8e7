"""The grammar of the command line, and the house rules a program can see."""

import ast
import errno
import functools
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from commands import ENTRIES, run
from runs import in_process

import config
import data
import train
from system.errors import UserError
from system.files import atomic

ROOT = Path(config.__file__).parent


@dataclass
class Small:
    # --- numbers
    rate: float = 0.1  # how fast
    steps: int = 3  # how long
    # --- words
    name: str = "a=b"  # a name
    kind: Literal["x", "y"] = "x"
    fast: bool = False  # no waiting
    out_dir: str = ""


def test_values_take_the_type_of_their_field():
    cfg = config.load(Small, ["--rate=1", "--steps=1e3", "--name=n=3,4", "--kind=y", "--fast"])
    assert (cfg.rate, cfg.steps, cfg.name, cfg.kind, cfg.fast, cfg.out_dir) == (
        1.0,
        1000,
        "n=3,4",
        "y",
        True,
        "out/run",
    )
    assert isinstance(cfg.rate, float)
    assert isinstance(cfg.steps, int)
    assert config.load(Small, ["--fast=False", "--steps=-2", "--steps=12_000"]).steps == 12000


@pytest.mark.parametrize(
    "argument, answer",
    [
        ("--rat=1", "did you mean 'rate'"),
        ("--zzz=1", "--help lists every key"),
        ("--steps=1.5", "not an int"),
        ("--steps=inf", "not an int"),
        ("--rate=much", "write --rate=<float>"),
        ("--rate", "write --rate=..."),
        ("--kind=z", "choose one of x, y"),
        ("--fast=perhaps", "--fast=True or --fast=False"),
        ("nowhere.py", "no config file 'nowhere.py'"),
    ],
)
def test_a_wrong_argument_says_what_to_type(argument, answer):
    with pytest.raises(ValueError, match=None) as error:
        config.load(Small, [argument])
    assert answer in str(error.value)


def test_a_value_behind_a_space_says_what_to_type():
    with pytest.raises(ValueError, match="write --steps=3"):
        config.load(Small, ["--fast", "--steps", "3"])
    with pytest.raises(ValueError, match="one config file first"):
        config.load(Small, ["--fast", "mine.py"])


def test_config_files_are_python_with_a_namespace_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import math\n_half = 0.5\nrate = _half * math.pi\nfast = True\n"
    )
    cfg = config.load(Small, [str(tmp_path / "mine.py"), "--steps=4"])
    assert cfg.rate == pytest.approx(1.5708, abs=1e-4)
    assert cfg.fast
    assert cfg.steps == 4
    assert cfg.out_dir == "out/mine"
    wrong = {
        "rats = 1": "unknown key 'rats' in",
        "steps = 'x'": "not an int",
        "steps = (": "SyntaxError",
        "rate = nix": "NameError",
    }
    for text, answer in wrong.items():
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(ValueError) as error:
            config.load(Small, [str(tmp_path / "mine.py")])
        assert answer in str(error.value)


@pytest.mark.parametrize("name", ["config/gpt2_inrun.py", "configs/gpt2_inrun.py", "gpt2_inrun"])
def test_a_config_is_found_by_any_of_its_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = config.load(train.Config, [name])
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.block_size, cfg.batch_size) == (
        12,
        12,
        768,
        1024,
        16,
    )
    assert (cfg.beta1, cfg.beta2, cfg.weight_decay, cfg.learning_rate, cfg.min_lr) == (
        0.9,
        0.95,
        0.1,
        6e-4,
        6e-5,
    )
    assert (cfg.warmup_iters, cfg.grad_clip, cfg.decay_lr, cfg.out_dir) == (
        2000,
        1.0,
        True,
        "out/gpt2_inrun",
    )


def test_every_config_loads_and_opens_with_its_command():
    paths = list((ROOT / "configs").glob("*.py"))
    assert len(paths) >= 3
    for path in paths:
        config.load(train.Config, [str(path)])
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert f"python train.py configs/{path.name}" in docstring


def test_a_json_config_from_a_run(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"config": {"rate": 0.5, "out_dir": "out/x"}, "git_commit": "abc"})
    )
    assert config.load(Small, [str(tmp_path / "config.json")]).out_dir == "out/x"


def test_a_run_stands_in_the_config_files_place():
    @dataclass
    class OfARun:
        run: str = ""
        rate: float = 0.1

    assert config.load(OfARun, ["out/mine", "--rate=2"]) == OfARun("out/mine", 2.0)
    assert config.load(OfARun, ["--run=out/mine"]) == OfARun("out/mine")
    with pytest.raises(ValueError, match="out of place"):
        config.load(OfARun, ["out/mine", "out/other"])


BENCHES = ["overhead", "kernels", "assemble", "scale", "differences", "hindsight", "gpu"]
SCRIPTS = ["train.py", "prepare_pile.py", "sample.py", "report.py", "revalue.py", "curate.py"]
SCRIPTS += [f"bench/{name}.py" for name in BENCHES]
SCRIPTS += [f"experiments/{path.name}" for path in sorted((ROOT / "experiments").glob("*.py"))]
SCRIPTS = [name for name in SCRIPTS if "config.main(" in (ROOT / name).read_text()]
ASK_ALL = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as e:
        print(f"=== {script} {e.code}")
"""


@dataclass
class Commented:
    # --- numbers
    # how many steps there are,
    # all in all
    steps: int = 3
    rate: float = 6e-4  # how fast
    # --- words
    name: str = "a"


def test_help_shows_the_comments_behind_and_above_a_field():
    lines = [line.split() for line in config.describe(Commented).splitlines()]
    assert ["--steps=3", "how", "many", "steps", "there", "are,", "all", "in", "all"] in lines
    assert ["--rate=0.0006", "how", "fast"] in lines
    assert ["--name=a"] in lines
    assert ["numbers"] in lines


@pytest.fixture(scope="module")
def helps():
    """{script: what its --help prints}, all asked by one process, for torch takes seconds."""
    done = subprocess.run(
        [sys.executable, "-c", ASK_ALL, *SCRIPTS], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    parts = re.split(r"^=== (\S+) 0$", done.stdout, flags=re.M)
    return dict(zip(parts[1::2], parts[0::2]))


def test_help_lists_every_key(helps):
    assert len(SCRIPTS) >= 15
    for script in SCRIPTS:
        shown = helps[script]
        tree = ast.parse((ROOT / script).read_text())
        (options,) = [node for node in tree.body if getattr(node, "name", "") == "Config"]
        for field in options.body:
            if isinstance(field, ast.AnnAssign):
                assert f"--{field.target.id}=" in shown, (script, field.target.id)
        assert f"python {script}" in shown


@pytest.mark.parametrize("script", ["train.py", "prepare_pile.py", "curate.py", "revalue.py"])
def test_help_shows_the_comment_of_every_option(helps, script):
    """An option whose definition is wrapped over several lines would lose it."""
    source = (ROOT / script).read_text().partition("class Config:")[2].partition("    def ")[0]
    fields = re.findall(r"^    \w+: [^#\n]*?(?:  # (.*))?$", source, flags=re.M)
    assert len(fields) == len(re.findall(r"^    \w+: ", source, flags=re.M))
    comments = [comment for comment in fields if comment]
    comments += re.findall(r"^    # (?!---)(.*)$", source, flags=re.M)
    assert len(comments) >= 8
    for comment in comments:
        assert comment in helps[script]


def script_with_aot(argv, out, err):
    """Runs a script in this process, compiled as far as graphs, by the backend aot_eager: inductor
    and a C++ compiler, which test_train.py uses, would take a minute more."""
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    sys.argv = argv
    with open(out, "w") as sys.stdout, open(err, "w") as sys.stderr:
        runpy.run_path(argv[0], run_name="__main__")


@pytest.mark.parametrize(
    "command, rows",
    [
        ("kernels.py --layers=16x24,7x5 --chunks=3x7,1x2 --heads=16x40 --K=2", 5),
        ("overhead.py --shapes=tiny --memory=False", 7),
        ("overhead.py --shapes=tiny --memory=False --compile --rules=sgd2", 3),
    ],
)
def test_benchmarks_end_with_one_line_of_json(tmp_path, command, rows):
    argv = f"{ROOT}/bench/{command} --rounds=1 --device=cpu --dtype=float32".split(" ")
    out, err = tmp_path / "out", tmp_path / "err"
    process = in_process(script_with_aot, argv, out, err)
    process.join()
    assert process.exitcode == 0, err.read_text()
    found = json.loads(out.read_text().splitlines()[-1])
    assert found["torch"]
    assert len(found["rows"]) == rows


def ended(work, capsys):
    """How config.main ends what a command does -> exit code, what it said on stderr."""
    with pytest.raises(SystemExit) as stop:
        config.main(work)
    return stop.value.code, capsys.readouterr().err


def test_an_error_a_user_can_mend_is_one_line(capsys):
    def users():
        raise UserError("no such domain\x1b[31m\nerror: forged")

    assert ended(users, capsys) == (2, "error: no such domain\\x1b[31m\\nerror: forged\n")


BUGS = [lambda: max([]), lambda: int("x"), lambda: [1].index(2), lambda: json.loads("{")]
BUGS += [lambda: np.zeros(3).reshape(2), lambda: config.parse_number("1", int).nothing]


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_keeps_its_traceback(bug):
    """Whatever it raises, and in whatever line, of this project or of C: a ValueError too."""
    with pytest.raises((ValueError, AttributeError)):
        config.main(bug)


def test_a_traceback_shows_control_characters_and_obeys_none(tmp_path):
    code = "import config\ndef bug(): raise RuntimeError('\\x1b[31m')\nconfig.main(bug)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "RuntimeError: \\x1b[31m" in done.stderr
    assert "\x1b" not in done.stderr


def test_output_of_a_library_shows_control_characters_and_obeys_none(capsys):
    """A library's print, which knows nothing of our functions."""

    def library():
        print("one\x1b[31m\ttwo\nthree\r")
        sys.stderr.write("\rbar\r\x9b\n")

    config.main(library)
    out, err = capsys.readouterr()
    assert out == "one\\x1b[31m\ttwo\nthree\\r\n"
    assert err == "\rbar\\r\\x9b\n"  # a bar begins with a carriage return


CURED = {errno.ENOSPC: "make room", errno.EACCES: "permissions", errno.EROFS: "written to"}


@pytest.mark.parametrize("number", CURED)
def test_an_error_of_the_system_has_its_path_and_a_cure(tmp_path, capsys, number):
    """Also of a write, where the system's own error knows no path."""

    def full():
        with atomic(tmp_path / "values.npy"):
            raise OSError(number, os.strerror(number))

    code, error = ended(full, capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: {tmp_path}/values.npy: {os.strerror(number)}: ")
    assert CURED[number] in error
    assert not list(tmp_path.iterdir())


EVIL = 'x = 1\nopen("pwned", "w")\n'
BROKEN = {"1/0": "line 1: ZeroDivisionError", "x = (": "SyntaxError", "import nix": "line 1: Modu"}
BROKEN |= {"a = 1\nraise KeyError(3)": "line 2: KeyError", "def f(): f()\nf()": "RecursionError"}


@pytest.mark.parametrize("script", [name for name in ENTRIES if name != "values.py"])
def test_a_file_that_is_no_config_is_not_run(tmp_path, monkeypatch, script):
    """Data in its place is said to be data; a broken one is a line that says where."""
    monkeypatch.chdir(tmp_path)
    for name in ("my.txt", "my.jsonl", "my.PY", "my", "py", "my.parquet"):
        Path(name).write_text(EVIL)
        outcome = run(script, [name])
        assert outcome.is_refusal(), (name, outcome)
        if script == "prepare_pile.py":
            assert f"that is data: write --source={name}" in outcome.err
    assert not Path("pwned").exists()
    for content, answer in BROKEN.items():
        Path("mine.py").write_text(content)
        outcome = run(script, ["mine.py"])
        assert outcome.is_refusal(), (content, outcome)
        takes_a_run = script in ("report.py", "curate.py", "revalue.py", "sample.py", "export.py")
        assert takes_a_run or answer in outcome.err
    Path("mine.py").write_bytes("caf\xe9 = 1".encode("latin-1"))
    assert run(script, ["mine.py"]).is_refusal()
    for content in ("[]", "{", '{"config": 3}', '{"config": {"nix": 1}}', "null"):
        Path("mine.json").write_text(content)
        assert run(script, ["mine.json"]).is_refusal(), content
    Path("a folder").mkdir()
    assert run(script, ["a folder"]).is_refusal()


def test_training_needs_none_of_the_optional_libraries():
    """datasets, wandb, tiktoken and pyarrow are imported only where they are used: a GPU machine
    may lack them."""
    code = "import sys, train, sample; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    imported = set(done.stdout.split())
    assert "torch" in imported, done.stderr
    optional = {"datasets", "wandb", "tiktoken", "pyarrow", "scipy", "matplotlib", "pandas"}
    assert not imported & optional


def test_the_faster_pattern_gives_the_same_tokens_as_gpt2():
    """Against tiktoken's own pattern, on text of every kind this installation has and on blanks,
    digits, quotes, other scripts."""
    import tiktoken
    from tiktoken_ext import openai_public

    ours = data.tokenizer("gpt2")
    theirs = tiktoken.Encoding(
        "r50k",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=ours.bpe._mergeable_ranks,
        special_tokens={},
    )
    texts = [
        path.read_text(errors="replace")
        for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    ]
    texts += [
        "  \n\n  x \t\n",
        " ",
        "\n" * 50,
        "it's we'll I'M can't'",
        "x" * 3000,
        "1 22  333 4444",
        "日本語のテキスト。 и русский",
        "a\u00a0b\u3000c \r\n",
        "<|endoftext|>",
    ]
    for text in texts:
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode(text)) == text
