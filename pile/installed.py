"""The text that every Python installation carries: code, help, licences, readmes."""

import hashlib
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from pile.records import CODE, Document
from system.terminal import progress

LEFT_OUT = {"pydoc_data", "test", "tests", "idle_test"}  # folders without text worth reading
LICENCES = ("LICENSE", "LICENCE", "COPYING")


def installed_text():
    """Its documents, in an order that mixes the domains and is always the same."""
    documents = [*code(), *topics(), *licences(), *readmes()]
    return iter(progress(sorted(documents, key=sort_key), "python", unit="file", delay=1))


def sort_key(document):
    """A hash of the path's end, which is the same wherever Python is installed."""
    end = "/".join(document.source.split("/")[-3:])
    return hashlib.blake2b(end.encode(errors="replace")).digest()


def library():
    return Path(sysconfig.get_path("stdlib"))


def code():
    """The modules of the standard library."""
    for name in sys.stdlib_module_names:
        for path in (library() / f"{name}.py", *(library() / name).rglob("*.py")):
            if path.is_file() and not LEFT_OUT & set(path.parts):
                yield Document(str(path), 0, CODE, path.read_bytes())


def topics():
    """What help() says of the language's topics."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document(f"pydoc_data.topics:{name}", 0, "Topics", text)


def licences():
    """Licences of Python and of the installed packages: each text once, from its last file."""
    paths = set(library().iterdir())
    for folder in sys.path:
        paths.update(Path(folder).glob("*.dist-info/**/*"))
    documents = {}  # {text: its document}
    for path in sorted(paths):
        if path.name.upper().startswith(LICENCES) and path.is_file():
            text = path.read_bytes()
            documents[text] = Document(str(path), 0, "Licences", text)
    return documents.values()


def readmes():
    """The descriptions of the installed packages."""
    texts = {}
    for package in metadata.distributions():
        texts[package.metadata["Name"]] = package.metadata.get("Description", "")
    for name, text in texts.items():
        yield Document(f"readme:{name}", 0, "Readmes", text)
