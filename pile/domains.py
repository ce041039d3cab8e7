"""The domain of a document, and the domains that --domains asks for."""

import functools

from pile.files import stem
from pile.records import Skipped
from system.terminal import cut_at_comma, listed

LONGEST = 200  # characters of a domain's name


def domain_of(document):
    """Returns the name of a document's domain, and why it is a default, or "" where it is not.

    The reason is "no_domain" or "long_domain". Raises UnicodeDecodeError."""
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
    """The domain of a document that has none itself, or none that can be used."""
    return document.default or printable(stem(document.source))


@functools.lru_cache(1)  # a file has many documents
def printable(path):
    """A file's name as text. Bytes that are not UTF-8 are written out, as in caf\\xe9."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


class Wanted:
    """The domains that --domains asks for; all of them where it is empty.

    A comma separates two names, and a comma within a name is written \\,. Pieces between commas may
    also be one name: "cs.CL, cs.LG" asks for "cs.CL", for "cs.LG" and for "cs.CL, cs.LG"."""

    def __init__(self, spec):
        self.pieces = []
        comma = ","
        while comma:
            piece, comma, spec = cut_at_comma(spec)
            self.pieces.append(piece)
        self.places = {}  # {name: the ranges of pieces that spell it}
        for first in range(len(self.pieces)):
            for end in range(first + 1, len(self.pieces) + 1):
                name = ",".join(self.pieces[first:end]).strip()
                if len(name) > LONGEST:
                    break
                self.places.setdefault(name, []).append(range(first, end))
        self.places.pop("", None)

    def has(self, name):
        return not self.places or name in self.places

    def missing(self, domains):
        """The names asked for that none of these domains answers, sorted."""
        answered = set()  # numbers of pieces
        for name in domains:
            for pieces in self.places.get(name, ()):
                answered.update(pieces)
        missing = set()
        for i, piece in enumerate(self.pieces):
            if i not in answered and piece.strip():
                missing.add(piece.strip())
        return sorted(missing)

    def explain(self, missing, domains):
        """The line that says which names are missing, and which domains there are."""
        asked = listed([repr(name) for name in missing])
        there = listed(domains) or "none"
        escape = "within a name a comma is written \\,"
        return f"--domains: no document of {asked}; there is {there} ({escape})"
