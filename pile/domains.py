"""Domains: a document's own, and those that are asked for."""

import functools

from pile.files import stem
from pile.records import Skipped
from system.terminal import cut_at_comma, listed

LONGEST = 200  # characters of a domain's name


def domain_of(document):
    """A document -> its domain's name, and why that is not its own: "no_domain", "long_domain", or
    "". Raises UnicodeDecodeError."""
    domain = document.domain
    if isinstance(domain, bytes):
        domain = domain.decode()
    if isinstance(domain, Skipped):
        return default_domain(document), "long_domain"
    if domain in (None, "") or isinstance(domain, (list, dict)):
        return default_domain(document), "no_domain"
    name = str(domain)
    if len(name) > LONGEST:
        return default_domain(document), "long_domain"
    return name, ""


def default_domain(document):
    return document.default or printable(stem(document.source))


@functools.lru_cache(1)  # a file has many documents
def printable(path):
    """A file's name as text: bytes that are no UTF-8 are written out, as in caf\\xe9."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


class Wanted:
    """The domains that --domains asks for, all where it is empty.

    A comma parts two names; within a name it is written \\,. A name that is known whole, with its
    commas, needs none: "cs.CL, cs.LG" asks for "cs.CL", for "cs.LG" and for "cs.CL, cs.LG"."""

    def __init__(self, spec):
        self.parts, comma = [], True
        while comma:
            part, comma, spec = cut_at_comma(spec)
            self.parts.append(part)
        self.places = {}  # {a name: where it stands, as [(first part, behind the last)]}
        for first in range(len(self.parts)):
            for end in range(first + 1, len(self.parts) + 1):
                name = ",".join(self.parts[first:end]).strip()
                if len(name) > LONGEST:
                    break
                self.places.setdefault(name, []).append((first, end))
        self.places.pop("", None)

    def has(self, name):
        return not self.places or name in self.places

    def missing(self, found):
        """The names asked for that are none of those found, nor parts of one of them."""
        covered = set()
        for name in found:
            for first, end in self.places.get(name, ()):
                covered.update(range(first, end))
        rest = [part.strip() for i, part in enumerate(self.parts) if i not in covered]
        return sorted({name for name in rest if name})

    def explain(self, missing, have):
        """The line that says which names are missing, and what there is."""
        asked = listed([repr(name) for name in missing])
        there = listed(have) or "none"
        escape = "within a name a comma is written \\,"
        return f"--domains: no document of {asked}; there is {there} ({escape})"
