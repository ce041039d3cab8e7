"""The house rules of imports: arrows go down, and no two modules need each other.

A module is named by its path, as shapley.ghost. A name in ARROWS stands for a module, or for a
folder and all that is in it. A module of a folder may import its neighbours, if no circle comes of
it; within shapley/ only those that METHOD names.
"""

import ast
import shutil
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("system", "shapley", "pile", "show")

ARROWS = {  # what may import what
    "system": (),
    "shapley": ("system.errors", "system.machine", "system.parallel", "system.terminal"),
    "pile": ("system",),
    "show": ("system", "data", "pile"),
    "config": ("system",),
    "data": ("system", "pile"),
    "model": ("shapley.ghost", "shapley.head"),
    "valuation": ("shapley", "system"),
    "sample": ("config", "data", "model", "pile.tokenizers", "system"),
    "export": ("config", "data", "pile.tokenizers", "system"),
    "prepare_pile": ("config", "data", "pile", "show.prepared", "system"),
    "train": (
        "config",
        "data",
        "model",
        "pile.tokenizers",
        "valuation",
        "shapley.labels",
        "show",
        "system",
    ),
    "trainer": ("config", "data", "valuation", "shapley", "show", "system"),
    "lookback": ("data", "train", "valuation", "shapley", "system"),
    "revalue": ("config", "data", "lookback", "show", "train", "valuation", "shapley", "system"),
    "values": ("config", "data", "revalue", "show", "system"),
    "report": ("config", "revalue", "show", "system"),
    "curate": ("config", "show", "system"),
}

METHOD = {  # what a module of shapley/ may import of its neighbours
    "kernel": (),
    "contract": ("kernel",),
    "ghost": ("contract",),
    "head": ("contract", "ghost"),
    "batch": (),
    "intercept": ("batch", "contract", "ghost"),
    "wrap": ("batch", "ghost", "intercept"),
    "checks": ("batch", "ghost", "intercept"),
    "sweeps": (),
    "weights": (),
    "step": ("ghost",),
    "clipping": (),
    "labels": (),
    "targets": ("batch", "labels"),
    "smoothing": (),
    "directions": ("batch", "contract", "sweeps"),
    "books": ("directions", "sweeps"),
    "replay": ("weights",),
    "hindsight": ("replay",),
    "counterfactual": ("replay",),
    "exact": (),
    "rules": ("clipping", "exact"),
    "audit": ("batch", "exact"),
}


def modules(root):
    """{name: path} of the modules of the product."""
    paths = [*root.glob("*.py")]
    for folder in FOLDERS:
        paths += (root / folder).glob("*.py")
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}


def imports(path, names):
    """Which of the modules `names` a file imports, wherever in it an import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        candidates = []
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            candidates = [node.module]
            candidates += [f"{node.module}.{alias.name}" for alias in node.names]
        found.update(name for name in candidates if name in names)
    return found


def violations(root):
    """The arrows that ARROWS does not know, as "importer -> imported"; raises CycleError where
    modules need each other."""
    paths = modules(root)
    graph = {name: imports(path, paths) for name, path in paths.items()}
    list(TopologicalSorter(graph).static_order())
    found = []
    for name, below in graph.items():
        found += [f"{name} -> {other}" for other in below if not is_allowed(name, other)]
    return sorted(found)


def is_allowed(name, other):
    folder, _, module = name.partition(".")
    other_folder, _, other_module = other.partition(".")
    if module and folder == other_folder:
        return folder != "shapley" or other_module in METHOD[module]
    arrows = ARROWS.get(folder, ())
    return other in arrows or other_folder in arrows


def test_arrows_go_down():
    assert violations(ROOT) == []


def test_every_module_has_its_arrows():
    names = {name.partition(".") for name in modules(ROOT)}
    assert {folder for folder, _, _ in names} == set(ARROWS)
    assert {module for folder, _, module in names if folder == "shapley"} == set(METHOD)


@pytest.fixture
def copy(tmp_path):
    for path in modules(ROOT).values():
        to = tmp_path / path.relative_to(ROOT)
        to.parent.mkdir(exist_ok=True)
        shutil.copy(path, to)
    return tmp_path


def add(path, line):
    path.write_text(path.read_text() + "\n" + line + "\n")


@pytest.mark.parametrize(
    "module, line, arrow",
    [
        ("shapley/ghost.py", "from show import tables", "shapley.ghost -> show.tables"),
        ("shapley/ghost.py", "import show.tables", "shapley.ghost -> show.tables"),
        ("system/machine.py", "from shapley import exact", "system.machine -> shapley.exact"),
        ("system/machine.py", "from shapley.exact import dot", "system.machine -> shapley.exact"),
        ("shapley/sweeps.py", "from shapley import exact", "shapley.sweeps -> shapley.exact"),
        ("pile/records.py", "def f():\n    import shapley.exact", "pile.records -> shapley.exact"),
    ],
)
def test_an_arrow_up_is_seen(copy, module, line, arrow):
    add(copy / module, line)
    assert arrow in violations(copy)


def test_a_circle_within_a_folder_is_seen(copy):
    add(copy / "shapley" / "kernel.py", "def f():\n    from shapley import ghost")
    with pytest.raises(CycleError, match="ghost"):
        violations(copy)
