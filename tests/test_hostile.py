"""What strangers write, on a real terminal: texts, names of domains, targets, files and folders that
a terminal would obey, that forge lines, that lead elsewhere. Through every command."""

import itertools
import json
import re
import shutil
import unicodedata

import pytest
import test_damage
from commands import on_terminal, readers, run

import train
from system import files
from system.terminal import with_commas

FORGED = "error: forged"
folders = test_damage.folders  # the fixture
STRINGS = [
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b2Jcleared",
    "\u202eturned round",
    "\u200bnothing\u2060to see",
    "\ufeffmark",
    f"one\n{FORGED}",
    f"two\r\n{FORGED}",
    f"zero\r{FORGED}",
    f"three\u2028{FORGED}",
    f"four\x0b\x0c\x85{FORGED}",
    "\x08\x08\x08back",
    "bell\x07",
    "\x7fdel",
    "tab\tbed",
    "\U000e0041tag",
    "..",
    "../../evil",
    "/evil",
    "~/evil",
    "$(touch evil)",
    "`touch evil`",
    "; touch evil",
    "'\"\\",
    "=1+1",
    "-rf",
    "--overwrite",
    "%s%n{0}{}",
    "<script>alert(1)</script>",
    "[bold red]markup[/]",
    "a,b",
    "val",
    "all",
    "*?[",
    " blanks ",
    "漢字 é 🎉",
    "x" * 180,
]
SMALL = "--n_layer=1 --n_head=1 --n_embd=8 --batch_size=8 --max_iters=8 --warmup_iters=2"
SMALL += " --checkpoint_interval=4 --eval_interval=4 --eval_chunks=1 --device=cpu"


def is_component(text):
    """Whether a text can be one folder's name."""
    return text not in ("", ".", "..") and "/" not in text


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus and a run of hostile names, made on a terminal. -> its folders and what was seen."""
    top = tmp_path_factory.mktemp("hostile")
    deep = top.joinpath(*filter(is_component, STRINGS[:16]))
    (deep / "source").mkdir(parents=True)
    for i, name in enumerate(STRINGS):
        inside = name.replace(FORGED, "forged within a text")
        texts = [f"{inside} number {i} of {n} " * 5 for n in range(3)]
        records = [{"text": text, "meta": {"pile_set_name": name}} for text in texts]
        stem = name if is_component(name) else str(i)
        path = deep / "source" / f"x{stem[:100]}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (deep / "t.txt").write_text("to be or not to be, that is the question")
    path = with_commas(str(deep / "t.txt"))
    targets = [f"{with_commas(name)}={path}" for name in STRINGS if "=" not in name]
    options = ["--tokenizer=byte", "--block_size=32", "--val_fraction=.3", "--workers=1"]
    seen = []
    seen += on_terminal(
        "prepare_pile.py", [f"--source={deep}/source", f"--data_dir={deep}/data", *options]
    )
    argv = [*SMALL.split(), f"--data_dir={deep}/data"]
    several = "--targets=" + ",".join(targets)
    seen += on_terminal("train.py", [*argv, f"--out_dir={deep}/run", several])
    seen += on_terminal("train.py", [*argv, f"--out_dir={deep}/other", several, "--seed=2"])
    assert seen[::2] == [0, 0, 0], seen
    return top, deep, seen[1::2]


def check(seen, name="", text=False):
    """No character that a terminal obeys, but for line ends, tabs, and colours of our own. text:
    it holds a text, whose lines may be anything."""
    shown = re.sub(r"\x1b\[48;2;\d+;\d+;\d+;38;2;0;0;0m|\x1b\[0m", "", seen.decode())
    obeyed = {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs")}
    assert obeyed <= set("\r\n\t"), (name, obeyed)
    for line in re.split(r"[\r\n]+", shown):
        assert text or not line.startswith(FORGED), (name, line)


def test_there_are_thirty_of_them():
    assert len(set(STRINGS)) >= 30


def test_preparing_and_training_obey_none_of_it(made):
    _, _, seen = made
    for shown in seen:
        check(shown)
    prepared, trained, _ = (shown.decode() for shown in seen)
    assert "\\x1b[31mred" in prepared
    assert "\\x1b[31mred" in trained


@pytest.mark.parametrize("part", range(3))
def test_every_reader_obeys_none_of_it(made, tmp_path, part):
    top, deep, _ = made
    before = {path for path in top.rglob("*") if path.is_file()}
    work = tmp_path.joinpath(*filter(is_component, STRINGS[5:8]))
    shutil.copytree(deep, work)
    outside = {path for path in tmp_path.rglob("*") if work not in path.parents}
    chosen = readers(work / "run", work / "other", work / "data", work)[part::3]
    for script, argv in chosen:
        if script == "values.py" and argv[0] == "query":
            argv = [a if not a.startswith("--text=") else "--text=" + STRINGS[0] for a in argv]
        code, seen = on_terminal(script, argv)
        assert code == 0, (script, argv, seen.decode()[-500:])
        check(seen, f"{script} {argv[0]}")
    assert {path for path in top.rglob("*") if path.is_file()} == before
    assert {path for path in tmp_path.rglob("*") if work not in path.parents} == outside
    assert not list(tmp_path.rglob("evil"))


def test_a_csv_has_no_formula(made):
    _, deep, _ = made
    for command in ("domains", "top"):
        outcome = run("values.py", [command, str(deep / "run"), "--csv"])
        assert outcome.code == 0
        cells = [cell for line in outcome.out.splitlines() for cell in line.split(",")]
        assert not [cell for cell in cells if cell.lstrip('"').startswith(("=", "@"))]
        assert not [cell for cell in cells if cell.startswith(("-rf", "--overwrite"))]


@pytest.mark.parametrize("name", ["run/values.json", "run/config.json", "data/meta.json"])
def test_a_strangers_entries_obey_nothing(folders, name):
    """Every text in the files of a received run and data folder, whose checksums fit."""
    folders.restore()
    path = folders.work / name
    content = files.read_json(path, "")
    inner = content["config"] if name == "run/config.json" else content
    turns = itertools.cycle(range(6))
    evil = "".join(STRINGS[:12])
    for key, value in list(inner.items()):
        if isinstance(value, str):
            inner[key] = evil
        elif isinstance(value, list) and value and isinstance(value[0], str):
            inner[key] = [f"{evil}{i}" for i in range(len(value))]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            inner[key] = [row | {"name": f"{evil}{i}"} for i, row in enumerate(value)]
        else:
            continue
        files.write_json(path, content)
        folders.made.mkdir(exist_ok=True)
        for script, argv in folders.readers[next(turns) :: 6]:
            outcome = run(script, argv)
            assert outcome.code == 0 or outcome.is_refusal(), (key, script, argv, outcome)
            check((outcome.err + outcome.out).encode(), (key, script, argv))
        inner[key] = value


OPTIONS = {
    "train.py": ["data_dir", "keep", "targets", "device", "max_iters", "rule"],
    "prepare_pile.py": ["source", "domains", "shard", "text_key", "block_size"],
    "sample.py": ["out_dir", "device", "top_k"],
    "report.py": ["run", "data_dir", "tokens"],
    "curate.py": ["run", "target", "export", "score"],
    "revalue.py": ["run", "targets", "name", "start", "device"],
}


@pytest.mark.parametrize("script", OPTIONS)
def test_wrong_arguments_are_one_line_that_forges_none(made, script, tmp_path, monkeypatch):
    """In this process, where a line is what reaches the terminal behind the guard."""
    _, deep, _ = made
    monkeypatch.chdir(tmp_path)
    first = {"curate.py": [str(deep / "run")], "revalue.py": [str(deep / "run")]}
    first["report.py"] = [str(deep / "run"), "--tokens=0", f"--out={tmp_path}/r.html"]
    options = ["--tokenizer=byte", "--block_size=8", "--val_fraction=0", "--workers=1"]
    first["prepare_pile.py"] = [f"--source={deep}/t.txt", f"--data_dir={tmp_path}/data", *options]
    first["train.py"] = [f"--data_dir={tmp_path}/none"]
    start = first.get(script, [])
    for key in OPTIONS[script]:
        for text in STRINGS[:: 3 if script in ("revalue.py", "prepare_pile.py") else 1]:
            outcome = run(script, [*start, f"--{key}={text}"])
            assert outcome.code == 0 or outcome.is_refusal(), (key, text, outcome)
            check((outcome.err + outcome.out).encode(), (key, text))
    for text in STRINGS:
        if text.startswith("--"):
            continue
        outcome = run(script, [text])
        assert outcome.is_refusal(), (text, outcome)
        check(outcome.err.encode(), text)
    assert not list(tmp_path.rglob("*evil*"))


def test_wrong_arguments_of_values_are_one_line(made):
    _, deep, _ = made
    run_dir = str(deep / "run")
    for text in STRINGS:
        for argv in ([text], ["summary", text], ["top", run_dir, f"--target={text}"]):
            outcome = run("values.py", argv)
            assert outcome.code == 0 or outcome.is_refusal(), (argv, outcome)
            check(outcome.err.encode(), argv)
        outcome = run("values.py", ["top", run_dir, f"--domain={text}x"])
        assert outcome.is_refusal(), outcome
        outcome = run("values.py", ["chunk", run_dir, text])
        assert outcome.is_refusal(), outcome
        check(outcome.err.encode(), text)


def test_what_is_to_be_typed_is_quoted(made):
    """As the shell takes it: the line that train.py and curate.py end with."""
    _, deep, _ = made
    assert train.terminal.command("python", "a b;c") == "python 'a b;c'"
    outcome = run("curate.py", [str(deep / "run"), f"--out={deep}/kept", "--drop_fraction=.1"])
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("next: ")]
    assert "\\u001b[31mred" in line
    assert "$'" in line
