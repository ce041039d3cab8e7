"""The text that every Python installation carries."""

import hashlib
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from pile.records import CODE, Document

TESTS = {"pydoc_data", "test", "tests", "idle_test"}  # folders without text worth reading
LICENCES = ("LICENSE", "LICENCE", "COPYING")


def installed_text():
    """-> documents, in an order that mixes the domains and is always the same."""
    found = [*code(), *topics(), *licences(), *readmes()]
    return iter(sorted(found, key=place))


def place(document):
    """A number by the end of the path, which is the same wherever Python is installed."""
    end = "/".join(document.source.split("/")[-3:])
    return hashlib.blake2b(end.encode(errors="replace")).digest()


def library():
    return Path(sysconfig.get_path("stdlib"))


def code():
    for name in sys.stdlib_module_names:
        for path in (library() / f"{name}.py", *(library() / name).rglob("*.py")):
            if path.is_file() and not TESTS & set(path.parts):
                yield Document(str(path), 0, CODE, path.read_bytes())


def topics():
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document(f"pydoc_data.topics:{name}", 0, "Topics", text)


def licences():
    """Each text once, from the last place where it stands."""
    paths = set(library().iterdir())
    for folder in sys.path:
        paths.update(Path(folder).glob("*.dist-info/**/*"))
    found = {}
    for path in sorted(paths):
        if path.name.upper().startswith(LICENCES) and path.is_file():
            text = path.read_bytes()
            found[text] = Document(str(path), 0, "Licences", text)
    return found.values()


def readmes():
    texts = {}
    for package in metadata.distributions():
        texts[package.metadata["Name"]] = package.metadata.get("Description", "")
    for name, text in texts.items():
        yield Document(f"readme:{name}", 0, "Readmes", text)
