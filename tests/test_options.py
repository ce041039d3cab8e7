"""Options as people type them: numbers that cannot work, targets with commas, other line ends."""

import shlex
import shutil
import sys
import typing

import numpy as np
import pytest
import torch
from commands import ENTRIES, run
from piles import lines, texts
from test_lost import arguments

import config
import curate
import data
import export
import prepare_pile
import report
import revalue
import sample
import train
from data import parse_targets, split_targets
from prepare_pile import Config as Prepare
from prepare_pile import prepare
from system.errors import UserError
from system.terminal import with_commas

MODULES = [curate, export, prepare_pile, report, revalue, sample, train]
NUMBERS = ["-1", "-5", "0", "1e30", str(2**64), "1" * 400, "nan", "inf", "-inf", "1e-46", ".5", ""]


def test_every_number_is_taken_or_refused_in_a_line():
    """No other exception, whatever is typed for whatever key of whatever command."""
    asked = 0
    for module in MODULES:
        for key, kind in typing.get_type_hints(module.Config).items():
            if kind not in (int, float):
                continue
            for text in NUMBERS:
                try:
                    cfg = config.load(module.Config, [f"--{key}={text}"])
                except UserError as e:
                    assert str(e).startswith(f"--{key}"), (key, text, e)
                else:
                    value = getattr(cfg, key)
                    assert np.isfinite(value), (key, text)
                    assert kind is float or abs(value) < 2**63, (key, text)
                asked += 1
    assert asked > 300


@pytest.mark.parametrize(
    "argument, answer",
    [
        ("--seed=18446744073709551616", "too large"),
        ("--seed=-1", "at least 0"),
        ("--beta2=0", "AdamW's formulas need it above 0"),
        ("--beta1=1", "below 1"),
        ("--lr_decay_iters=-5", "at least 0"),
        ("--learning_rate=0", "above 0"),
        ("--grad_clip=inf", "finite"),
        ("--device=cuda", "not on this machine"),
        ("--device=foo", "not on this machine"),
        ("--device=cpu:x", "not on this machine"),
    ],
)
def test_numbers_and_devices_that_cannot_work_are_refused(python_data, tmp_path, argument, answer):
    if "cuda" in argument and torch.cuda.is_available():
        pytest.skip("here it works")
    outcome = run("train.py", arguments(python_data, tmp_path / "run", argument))
    assert outcome.is_refusal(), outcome
    assert answer in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "argument",
    ["--device=cuda", "--device=foo", "--seed=1e20", "--top_k=-1", "--temperature=nan"]
    + ["--temperature=1e-46", "--temperature=0", "--num_samples=-1", "--num_samples=0"],
)
def test_options_of_sample_are_checked(argument):
    if "cuda" in argument and torch.cuda.is_available():
        pytest.skip("here it works")
    outcome = run("sample.py", [argument])
    assert outcome.is_refusal(), outcome
    assert argument.split("=")[0] in outcome.err


def test_sample_takes_a_runs_folder_as_the_other_commands_do(python_data, tmp_path):
    out = tmp_path / "run"
    assert run("train.py", arguments(python_data, out, "--max_iters=2")).code == 0
    few = ["--num_samples=1", "--max_new_tokens=3"]
    assert run("sample.py", [str(out), *few]).code == 0
    outcome = run("sample.py", [f"--out_dir={out}", *few])
    assert outcome.is_refusal()
    assert f"write python sample.py {out}" in outcome.err
    outcome = run("sample.py", [])
    assert outcome.is_refusal()
    assert "python sample.py out/demo" in outcome.err


def test_every_reader_takes_the_folder_that_one_is_in(python_data, tmp_path, monkeypatch):
    """Though the run's data_dir is relative to where it was started."""
    shutil.copytree(python_data, tmp_path / "data" / "mine")
    monkeypatch.chdir(tmp_path)
    assert run("train.py", arguments("data/mine", "out/run", "--max_iters=2")).code == 0
    monkeypatch.chdir(tmp_path / "out" / "run")
    readers = {
        "sample.py": [".", "--num_samples=1", "--max_new_tokens=3"],
        "export.py": ["."],
        "report.py": [".", "--tokens=0"],
        "values.py": ["summary", "."],
        "curate.py": ["."],
        "revalue.py": [".", "--end=1", "--name=again"],
        "train.py": ["config.json", "--init_from=resume"],
    }
    assert readers.keys() == ENTRIES.keys() - {"prepare_pile.py"}
    for script, argv in readers.items():
        outcome = run(script, argv)
        assert outcome.code == 0, (script, outcome)


# --- help -----------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_help_lists_the_choices_and_defaults_that_can_be_typed(module):
    lines = config.describe(module.Config).splitlines()
    for key, kind in typing.get_type_hints(module.Config).items():
        (line,) = [line for line in lines if line.startswith(f"  --{key}=")]
        choices = typing.get_args(kind)
        if choices:
            assert line.endswith(f"[{' | '.join(choices)}]")
        shown = line.split()[0].partition("=")[2]
        default = module.Config.__dataclass_fields__[key].default
        if isinstance(default, str) and default.strip():
            assert shlex.split(shown) == [default]
        assert "lambda" not in line
        assert "dataclass" not in line


# --- a file in a config's place ---------------------------------------------------------


def test_text_in_a_configs_place_is_answered_with_the_two_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my corpus.jsonl").write_text("{}")
    outcome = run("train.py", ["my corpus.jsonl"])
    assert outcome.is_refusal()
    prepare = "python prepare_pile.py '--source=my corpus.jsonl' '--data_dir=data/my corpus'"
    train = "python train.py configs/small.py '--data_dir=data/my corpus'"
    assert f"type: {prepare}; then: {train}" in outcome.err


def test_prepared_data_in_a_configs_place_is_answered_with_its_option(python_data):
    outcome = run("train.py", [str(python_data)])
    assert outcome.is_refusal()
    assert f"it is prepared data: write --data_dir={python_data}" in outcome.err


# --- paths that cannot be written to --------------------------------------------------------


def test_a_path_that_cannot_be_written_is_the_one_that_was_typed(python_data, tmp_path):
    """Not the name under which it is written first, and with what to type."""
    out = tmp_path / "run"
    assert run("train.py", arguments(python_data, out, "--max_iters=2")).code == 0
    missing = tmp_path / "nowhere" / "page.html"
    outcome = run("report.py", [str(out), f"--out={missing}", "--tokens=0"])
    assert outcome.is_refusal()
    assert f"{missing}: " in outcome.err
    assert f"there is no folder {missing.parent}: make it" in outcome.err
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        outcome = run("train.py", arguments(python_data, folder))
        assert outcome.is_refusal()
        what = f"--out_dir={folder}: {tmp_path}/file is a file, and a run needs a folder"
        assert what in outcome.err


def test_the_largest_seed_works(python_data, tmp_path):
    more = [f"--seed={2**63 - 1}", "--max_iters=2"]
    assert run("train.py", arguments(python_data, tmp_path / "run", *more)).code == 0


# --- targets ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commas(tmp_path_factory):
    """Data with domains that have commas in their names."""
    folder = tmp_path_factory.mktemp("commas")
    names = {"a": "cs.CL, cs.LG", "b": "cs.CL", "c": "x,y", "d": " blanks "}
    documents = [(names[domain], text) for domain, text in texts(120, domains="abcd")]
    (folder / "d.jsonl").write_bytes(lines(documents))
    options = dict(tokenizer="byte", block_size=16, val_fraction=0.4, workers=1)
    prepare(Prepare(source=str(folder / "d.jsonl"), data_dir=str(folder / "data"), **options))
    return data.open_dataset(folder / "data")


@pytest.mark.parametrize(
    "spec, names",
    [
        ("val:cs.CL, cs.LG", ["cs.CL, cs.LG"]),
        ("val:cs.CL", ["cs.CL"]),
        ("val:cs.CL,val:cs.CL, cs.LG , val:x,y,val", ["cs.CL", "cs.CL, cs.LG", "x,y", "val"]),
        (r"val:cs.CL\, cs.LG", ["cs.CL, cs.LG"]),
        (r"val:x\,y,val:cs.CL", ["x,y", "cs.CL"]),
        ("val: blanks ,val:cs.CL", [" blanks ", "cs.CL"]),
    ],
)
def test_a_domain_may_have_commas(commas, spec, names):
    assert [target.name for target in parse_targets(spec, commas, 16)] == names


def test_a_name_and_a_path_may_have_commas(commas, tmp_path):
    path = tmp_path / "lr=1e-3,bs=2" / "t,1.txt"
    path.parent.mkdir()
    path.write_text("to be or not to be")
    spec = f"{with_commas('a,b')}={with_commas(str(path))},val"
    found = parse_targets(spec, commas, 16)
    assert [target.name for target in found] == ["a,b", "val"]
    assert split_targets(r"a\,b=c\,d , e=f", []) == ["a,b=c,d", "e=f"]


@pytest.mark.parametrize("content", [b"one\r\ntwo\r\n", b"\xef\xbb\xbfone\ntwo\n", b"a\rb\n\rc"])
def test_a_target_is_read_as_training_text_is(tmp_path, content):
    """Line ends as they are, and no byte order mark: the tokens of the training data."""
    (tmp_path / "s").mkdir()
    path = tmp_path / "s" / "a.txt"
    path.write_bytes(content * 20)
    if content.startswith(b"\xef"):
        path.write_bytes(content + content[3:] * 19)
    options = dict(tokenizer="byte", block_size=8, val_fraction=0, workers=1)
    prepare(Prepare(source=str(tmp_path / "s"), data_dir=str(tmp_path / "d"), **options))
    dataset = data.open_dataset(tmp_path / "d")
    (target,) = parse_targets(f"mine={path}", dataset, 8)
    trained = dataset.train.rows.reshape(-1).tolist()
    predicted = target.rows[:, 1:].reshape(-1)
    predicted = predicted[predicted >= 0].tolist()
    n = min(len(trained), len(predicted))
    assert n > 90
    assert predicted[:n] == trained[:n]


def test_every_entry_has_its_module():
    assert {f"{m.__name__}.py" for m in MODULES} | {"values.py"} == set(ENTRIES)
    assert sys.modules["values"]
