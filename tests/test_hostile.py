"""What strangers write, on a real terminal: texts, names of domains, targets, files and folders.
A terminal would obey them, they forge lines, they lead elsewhere. Through every command."""

import itertools
import json
import re
import shutil
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_damage
from commands import on_terminal, readers, run

from system import files, terminal
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
SMALL = [
    "--n_layer=1",
    "--n_head=1",
    "--n_embd=8",
    "--batch_size=8",
    "--max_iters=8",
    "--warmup_iters=2",
    "--checkpoint_interval=4",
    "--eval_interval=4",
    "--eval_chunks=1",
    "--device=cpu",
]


def is_component(text):
    """Whether a text can be one folder's name."""
    return text not in ("", ".", "..") and "/" not in text


@dataclass
class Made:
    """A corpus and runs of hostile names. prepared, trained: the bytes that a terminal was sent."""

    top: Path
    folder: Path  # deep in top: data, run, other, t.txt
    prepared: bytes
    trained: bytes


def write_corpus(folder):
    """A file and a domain for each of STRINGS."""
    folder.mkdir(parents=True)
    for i, name in enumerate(STRINGS):
        inside = name.replace(FORGED, "forged within a text")
        texts = [f"{inside} number {i} of {n} " * 5 for n in range(3)]
        records = [{"text": text, "meta": {"pile_set_name": name}} for text in texts]
        stem = name if is_component(name) else str(i)
        path = folder / f"x{stem[:100]}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    top = tmp_path_factory.mktemp("hostile")
    folder = top.joinpath(*filter(is_component, STRINGS[:16]))
    write_corpus(folder / "source")
    (folder / "t.txt").write_text("to be or not to be, that is the question")
    path = with_commas(str(folder / "t.txt"))
    targets = [f"{with_commas(name)}={path}" for name in STRINGS if "=" not in name]
    options = ["--tokenizer=byte", "--block_size=32", "--val_fraction=.3", "--workers=1"]
    argv = [f"--source={folder}/source", f"--data_dir={folder}/data", *options]
    prepared = printed_by("prepare_pile.py", argv)
    argv = [*SMALL, f"--data_dir={folder}/data", "--targets=" + ",".join(targets)]
    trained = printed_by("train.py", [*argv, f"--out_dir={folder}/run"])
    trained += printed_by("train.py", [*argv, f"--out_dir={folder}/other", "--seed=2"])
    return Made(top, folder, prepared, trained)


def printed_by(script, argv):
    """What a command that ends well sends to a terminal."""
    code, printed = on_terminal(script, argv)
    assert code == 0, (script, argv, printed.decode()[-500:])
    return printed


def check(printed, name=""):
    """No character that a terminal obeys, but for line ends, tabs, and colours of our own; and no
    line that was forged."""
    text = re.sub(r"\x1b\[48;2;\d+;\d+;\d+;38;2;0;0;0m|\x1b\[0m", "", printed.decode())
    obeyed = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs")}
    assert obeyed <= set("\r\n\t"), (name, obeyed)
    for line in re.split(r"[\r\n]+", text):
        assert not line.startswith(FORGED), (name, line)


def paths_below(folder, but=None):
    """What lies in a folder, but for what lies in a folder inside it."""
    return {path for path in folder.rglob("*") if but not in path.parents}


# --- tests ------------------------------------------------------------------------


def test_the_hostile_strings_are_thirty_different_ones():
    assert len(set(STRINGS)) >= 30


def test_preparing_prints_hostile_names_as_escapes(made):
    check(made.prepared)
    assert b"\\x1b[31mred" in made.prepared


def test_training_prints_hostile_names_as_escapes(made):
    check(made.trained)
    assert b"\\x1b[31mred" in made.trained


@pytest.mark.parametrize("third", range(3))
def test_every_reader_prints_hostile_text_as_escapes_and_writes_nowhere_else(made, tmp_path, third):
    before = paths_below(made.top)
    work = tmp_path.joinpath(*filter(is_component, STRINGS[5:8]))
    shutil.copytree(made.folder, work)
    outside = paths_below(tmp_path, but=work)
    chosen = readers(work / "run", work / "other", work / "data", work)[third::3]
    assert len(chosen) > 4
    for script, argv in chosen:
        if script == "values.py" and argv[0] == "query":
            argv = ["query", argv[1], f"--text={STRINGS[0]}", "--n=3"]
        check(printed_by(script, argv), f"{script} {argv[0]}")
    assert paths_below(made.top) == before
    assert paths_below(tmp_path, but=work) == outside
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("command", ["domains", "top"])
def test_csv_has_no_formula(made, command):
    outcome = run("values.py", [command, str(made.folder / "run"), "--csv"])
    assert outcome.code == 0
    cells = re.split(r"[,\n]", outcome.out)
    assert len(cells) > 50
    assert not [cell for cell in cells if cell.lstrip('"').startswith(("=", "@"))]
    assert not [cell for cell in cells if cell.startswith(("-rf", "--overwrite"))]


@pytest.mark.parametrize("name", ["run/values.json", "run/config.json", "data/meta.json"])
def test_readers_print_texts_of_a_received_file_as_escapes(folders, name):
    """Every text in the files of a received run and data folder, whose checksums fit."""
    folders.restore()
    path = folders.work / name
    content = files.read_json(path, "")
    entries = content["config"] if name == "run/config.json" else content
    turns = itertools.cycle(range(6))
    n_changed = 0
    for key, value in list(entries.items()):
        changed = hostile(value)
        if changed is None:
            continue
        n_changed += 1
        entries[key] = changed
        files.write_json(path, content)
        folders.made.mkdir(exist_ok=True)
        for script, argv in folders.readers[next(turns) :: 6]:
            outcome = run(script, argv)
            assert outcome.code == 0 or outcome.is_refusal(), (key, script, argv, outcome)
            check((outcome.err + outcome.out).encode(), (key, script, argv))
        entries[key] = value
    assert n_changed > 2


def hostile(value):
    """A file's entry with hostile texts in the place of its own; None where it has none."""
    evil = "".join(STRINGS[:12])
    if isinstance(value, str):
        return evil
    if not isinstance(value, list) or not value:
        return None
    if isinstance(value[0], str):
        return [f"{evil}{i}" for i in range(len(value))]
    if isinstance(value[0], dict):
        return [row | {"name": f"{evil}{i}"} for i, row in enumerate(value)]
    return None


OPTIONS = {
    "train.py": ["data_dir", "keep", "targets", "device", "max_iters", "rule"],
    "prepare_pile.py": ["source", "domains", "shard", "text_key", "block_size"],
    "sample.py": ["out_dir", "device", "top_k"],
    "report.py": ["run", "data_dir", "tokens"],
    "curate.py": ["run", "target", "export", "score"],
    "revalue.py": ["run", "targets", "name", "start", "device"],
}


@pytest.mark.parametrize("script", OPTIONS)
def test_hostile_arguments_are_answered_in_one_line(made, script, tmp_path, monkeypatch):
    """In this process, where a line is what reaches the terminal behind the guard."""
    monkeypatch.chdir(tmp_path)
    run_dir = str(made.folder / "run")
    others = {
        "train.py": [f"--data_dir={tmp_path}/none"],
        "prepare_pile.py": [
            f"--source={made.folder}/t.txt",
            f"--data_dir={tmp_path}/data",
            "--tokenizer=byte",
            "--block_size=8",
            "--val_fraction=0",
            "--workers=1",
        ],
        "sample.py": [],
        "report.py": [run_dir, "--tokens=0", f"--out={tmp_path}/r.html"],
        "curate.py": [run_dir],
        "revalue.py": [run_dir],
    }
    every = 3 if script in ("revalue.py", "prepare_pile.py") else 1
    for key in OPTIONS[script]:
        for text in STRINGS[::every]:
            outcome = run(script, [*others[script], f"--{key}={text}"])
            assert outcome.code == 0 or outcome.is_refusal(), (key, text, outcome)
            check((outcome.err + outcome.out).encode(), (key, text))
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("script", OPTIONS)
def test_a_hostile_config_or_run_is_refused_in_one_line(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in STRINGS:
        if text.startswith("--"):
            continue
        outcome = run(script, [text])
        assert outcome.is_refusal(), (text, outcome)
        check(outcome.err.encode(), text)


@pytest.mark.parametrize("text", STRINGS)
def test_values_py_answers_hostile_arguments_in_one_line(made, text):
    run_dir = str(made.folder / "run")
    for argv in ([text], ["summary", text], ["top", run_dir, f"--target={text}"]):
        outcome = run("values.py", argv)
        assert outcome.code == 0 or outcome.is_refusal(), (argv, outcome)
        check(outcome.err.encode(), argv)
    for argv in (["top", run_dir, f"--domain={text}x"], ["chunk", run_dir, text]):
        outcome = run("values.py", argv)
        assert outcome.is_refusal(), outcome
        check(outcome.err.encode(), argv)


def test_a_command_to_type_is_quoted_for_a_shell():
    assert terminal.command("python", "a b;c") == "python 'a b;c'"


def test_curate_quotes_what_is_to_be_typed_next(made):
    argv = [str(made.folder / "run"), f"--out={made.folder}/kept", "--drop_fraction=.1"]
    outcome = run("curate.py", argv)
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("next: ")]
    assert "\\u001b[31mred" in line
    assert "$'" in line
