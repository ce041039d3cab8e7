"""README.md and docs/: their code runs, their links lead somewhere, their commands exist."""

import ast
import inspect
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import config
import curate
import prepare_pile
import report
import revalue
import sample
import train
import values

ROOT = Path(config.__file__).parent
README = ROOT / "README.md"
# what tells a newcomer what to type
GUIDES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md"]
PAGES = [*GUIDES, *sorted((ROOT / "results").glob("*/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def blocks(path, language):
    """The code blocks of a page in one language."""
    return [code for kind, code in FENCE.findall(path.read_text()) if kind == language]


def spans(path):
    """The pieces of code within a page's sentences and tables."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", path.read_text()))


def run_block(code, names):
    """Runs a block of a page with these names defined. Returns all names defined after it."""
    exec(compile(code, "a block of a page", "exec"), names)
    return names


def test_the_pages_are_there():
    assert names(GUIDES) == [
        "README.md",
        "docs/after_the_run.md",
        "docs/any_model.md",
        "docs/cluster.md",
        "docs/data.md",
        "docs/files.md",
        "docs/first_hour.md",
        "docs/method.md",
        "docs/models.md",
        "docs/pretrained.md",
        "docs/questions.md",
        "docs/trainer.md",
        "results/README.md",
    ]
    assert len(PAGES) >= len(GUIDES) + 16


def test_the_readme_stays_short():
    assert len(README.read_text().splitlines()) <= 186


# --- python blocks ----------------------------------------------------------------


def test_the_readme_has_the_blocks_that_run_here():
    assert len(blocks(README, "python")) == 2


def test_the_ledger_of_the_readme_gives_autograds_number(capsys):
    torch.manual_seed(0)
    found = run_block(blocks(README, "python")[0], {})
    assert found["ledger"].grad.shape == (found["B"], found["K"])
    assert found["value"] != 0
    assert torch.allclose(found["value"], found["ledger"].grad[2, 0], rtol=1e-4, atol=1e-9)
    assert "tensor" in capsys.readouterr().out


@pytest.mark.parametrize("targets", [1, 3], ids=["one target", "three targets"])
def test_the_readme_reads_values(tmp_path, monkeypatch, targets):
    rng = np.random.default_rng(0)
    of_chunks = rng.normal(size=(40, targets)).astype(np.float32)
    of_chunks[5:25] = np.nan  # never used
    tokens = rng.integers(256, size=(40, 9)).astype(np.uint16)
    for folder, name, array in (
        ("out/gpt2_inrun", "values.npy", of_chunks),
        ("data/pile", "train.npy", tokens),
    ):
        (tmp_path / folder).mkdir(parents=True)
        np.save(tmp_path / folder / name, array)
    monkeypatch.chdir(tmp_path)
    found = run_block(blocks(README, "python")[1], {})
    first = of_chunks[:, 0]
    best = sorted(found["used"], key=lambda chunk: -first[chunk])[:10]
    assert set(found["used"]) == {*range(5), *range(25, 40)}
    assert found["best"].tolist() == best
    assert np.array_equal(found["chunks"], tokens[best])


def test_the_loop_for_any_model_runs(tmp_path, monkeypatch):
    (code,) = blocks(ROOT / "docs" / "any_model.md", "python")
    rng = np.random.default_rng(0)
    X = rng.normal(size=(80, 6)).astype(np.float32)
    Y = (X[:, 0] > 0).astype(np.int64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
    given = {"model": model, "lr": 1e-2, "steps": 5, "seed": 1}
    given.update(X_train=X, Y_train=Y, X_val=X[:60], Y_val=Y[:60])
    monkeypatch.chdir(tmp_path)
    run_block(code, given)
    of_examples = np.load("out/mine/values.npy")
    assert of_examples.shape == (80, 1)
    assert np.isfinite(of_examples).sum() == 40


def test_every_python_block_is_python():
    found = [code for path in PAGES for code in blocks(path, "python")]
    assert len(found) >= 4
    for code in found:
        ast.parse(code)


# --- links -----------------------------------------------------------------------


def links(path):
    """The relative links and pictures of a page."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text()))
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    return [link for link in found if "://" not in link]


def headings(path):
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.M)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("name", names(GUIDES))
def test_every_guide_links_to_others(name):
    assert links(ROOT / name)


@pytest.mark.parametrize("name", names(PAGES))
def test_every_link_leads_to_a_file(name):
    page = ROOT / name
    for link in links(page):
        path, _, anchor = link.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name} links to {link}"
        if anchor:
            assert anchor in headings(file), f"{name} links to {link}"


@pytest.mark.parametrize("name", names(GUIDES[1:]))
def test_the_readme_leads_to_every_guide(name):
    assert name in links(README)


def test_every_picture_of_docs_is_shown():
    pictures = names(sorted((ROOT / "docs").glob("*.png")))
    assert len(pictures) >= 2
    shown = [str((page.parent / link).resolve()) for page in PAGES for link in links(page)]
    for name in pictures:
        assert str(ROOT / name) in shown


# --- commands ---------------------------------------------------------------------


@dataclass
class Typed:
    """A script with its arguments as a page has them."""

    page: str
    script: str
    arguments: list


def commands(path):
    """What a page's sh blocks and the code within its sentences have to type, word by word."""
    found = []
    for code in blocks(path, "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            found.append(shlex.split(line, comments=True))
    for code in spans(path):
        if "'" not in code:
            found.append(shlex.split(code))
    return [words for words in found if words]


def typed_scripts():
    found = []
    for path in GUIDES:
        for words in commands(path):
            places = [i for i, word in enumerate(words) if word.endswith(".py")]
            if not places:
                continue
            before, arguments = words[: places[0]], words[places[0] + 1 :]
            is_run = {"python", "torchrun"} & {Path(word).name for word in before}
            if is_run or (not before and arguments):
                found.append(Typed(path.name, words[places[0]], arguments))
    return found


def options_of(script):
    """The keys that a script takes, as its Config has them, or one of values.py's commands."""
    for node in ast.parse((ROOT / script).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            return {field.target.id for field in fields} | {"help"}
    raise AssertionError(f"{script} has no Config")


def options_of_values(command):
    functions = {function.__name__: function for function in values.COMMANDS}
    parameters = inspect.signature(functions[command]).parameters
    return {*parameters, "data_dir", "json", "csv", "help"}


def keys(arguments):
    return [word[2:].partition("=")[0] for word in arguments if word.startswith("--")]


def test_every_script_named_is_there():
    typed = typed_scripts()
    assert len(typed) >= 50
    assert {command.page for command in typed} >= {path.name for path in GUIDES[:5]}
    for command in typed:
        assert (ROOT / command.script).is_file(), command


def test_every_option_named_is_known():
    with_options = [command for command in typed_scripts() if keys(command.arguments)]
    assert len(with_options) >= 30
    for command in with_options:
        if command.script == "values.py":
            known = options_of_values(command.arguments[0])
        else:
            known = options_of(command.script)
        assert set(keys(command.arguments)) <= known, command


CONFIGS = {
    "train.py": train.Config,
    "prepare_pile.py": prepare_pile.Config,
    "sample.py": sample.Config,
    "report.py": report.Config,
    "curate.py": curate.Config,
    "revalue.py": revalue.Config,
}


@pytest.mark.parametrize("script", CONFIGS)
def test_every_command_is_taken_by_its_script(script):
    """Types, choices and what goes together, too. Not where a shell or a run fills something in."""
    typed = [command for command in typed_scripts() if command.script == script]
    assert typed
    for command in typed:
        text = " ".join(command.arguments)
        if "$" not in text and "config.json" not in text:
            config.load(CONFIGS[script], command.arguments)


def test_every_command_of_values_is_named():
    of_values = [command for command in typed_scripts() if command.script == "values.py"]
    told = {command.arguments[0] for command in of_values if command.arguments}
    assert told == {function.__name__ for function in values.COMMANDS}


def test_every_config_file_named_is_there():
    trained = [c.arguments[0] for c in typed_scripts() if c.script == "train.py" and c.arguments]
    files = [name for name in trained if name.endswith(".py")]
    assert len(files) >= 8
    for name in files:
        assert name.startswith("configs/")
        assert (ROOT / name).is_file(), name


SCRIPTS = ["train.py", "prepare_pile.py", "sample.py", "report.py", "revalue.py", "curate.py"]
SCRIPTS += ["bench/overhead.py", "experiments/any_model.py"]
OF_OTHERS = {"key", "mem", "signal", "long"}  # a placeholder, and options of SLURM and zstd


def test_every_option_named_alone_is_one_of_some_script():
    known = set(OF_OTHERS)
    for script in SCRIPTS:
        known |= options_of(script)
    for function in values.COMMANDS:
        known |= options_of_values(function.__name__)
    alone = []
    for path in GUIDES:
        for code in spans(path):
            if code.startswith("--"):
                alone.append((path.name, code))
    assert len(alone) >= 40
    for page, code in alone:
        assert set(keys(code.split())) <= known, (page, code)


def test_every_make_target_named_is_there():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = []
    for path in GUIDES:
        named += [words[1] for words in commands(path) if words[0] == "make" and len(words) > 1]
    assert {"demo", "test"} <= set(named)
    assert set(named) <= set(targets)


OUR_FOLDERS = [path.name for path in ROOT.iterdir() if path.is_dir()]
NOT_IN_GIT = ("data", "out", ".venv")


def test_every_file_named_is_there():
    found = []
    for path in GUIDES:
        for code in spans(path):
            folder, slash, _ = code.partition("/")
            if slash and folder in OUR_FOLDERS and folder not in NOT_IN_GIT:
                found.append((path.name, code.split()[0]))
    assert len(found) >= 15
    for page, name in found:
        assert (ROOT / name).exists(), (page, name)


# --- the tree ---------------------------------------------------------------------


def test_the_readmes_tree_is_there():
    (tree,) = [code for code in blocks(README, "") if code.startswith("train.py")]
    # a line's names stand before its first two blanks that are followed by what they are
    named = []
    for line in tree.splitlines():
        named += re.findall(r"(?<!\S)[\w.]+(?:\.py|/)(?!\S)", line[:31])
    assert len(named) >= 18
    for name in named:
        assert (ROOT / name).exists(), name
