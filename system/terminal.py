"""The one way from data and files to a terminal.

Texts, names of domains, files and targets, and the messages of other libraries are written by
strangers. A terminal obeys some of their characters (ESC), shows others as nothing (zero-width
spaces), or turns lines round (U+202E). Here they become visible: \\x1b, \\u200b, \\u202e.

- say() prints one line: a newline within it is made visible too, so that no name forges a line.
- say_text() prints a text of several lines.
- guarded() stands behind both: while a command runs, whatever reaches stdout or stderr, by print,
  by a progress bar, by a warning or as a traceback, goes through visible().
"""

import contextlib
import functools
import re
import shlex
import sys
import traceback
import unicodedata

from tqdm import tqdm

ODD = re.compile(r"[^ -~]")  # all but ASCII's letters, digits and signs: to be looked at


def visible(text, keep=""):
    """Text with what a terminal would obey, or would not show, written out; keep: but not these."""
    return ODD.sub(lambda found: found[0] if found[0] in keep else shown(found[0]), text)


@functools.cache
def shown(character):
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode()


def say(line):
    """Prints one line, at once."""
    print(visible(line), flush=True)


def say_text(text):
    """Prints a text: its line breaks and tabs stay."""
    print(visible(text, "\n\t"), flush=True)


def warn(line):
    """Prints one line on stderr."""
    print(visible(line), file=sys.stderr, flush=True)


def listed(names, most=20):
    """Names as a sentence has them: the first few, each cut where it is long."""
    shown_names = [shorten(visible(name), 60) for name in names[:most]]
    return ", ".join(shown_names) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def command(*words):
    """What to type, quoted for a shell: a word may be anything, as a folder's name."""
    return " ".join(map(quoted, words))


def quoted(word):
    if word.isprintable():
        return shlex.quote(word)
    word = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + ODD.sub(lambda found: for_shell(found[0]), word) + "'"


def for_shell(character):
    """A character as bash takes it between $' and '."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def progress(things=None, desc="", **options):
    """tqdm's bar, none where stderr is no terminal. desc may be anything, as a file's name."""
    return tqdm(things, desc=shorten(visible(desc), 40), disable=None, **options)


def shorten(text, limit):
    """Text of at most so many characters."""
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


class Guarded:
    """A stream that shows what it cannot write, or what a terminal would obey, as escapes."""

    def __init__(self, stream, bars=False):
        """bars: progress bars are drawn on it, each with a carriage return in front."""
        self.stream, self.bars = stream, bars
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what its encoding does not have

    def write(self, text):
        begin = "\r" if self.bars and text.startswith("\r") else ""
        self.stream.write(begin + visible(text[len(begin) :], "\n\t"))
        return len(text)

    def write_as_it_is(self, text):
        """For colours of our own."""
        self.stream.write(text)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def guarded():
    """Meanwhile all that is printed goes through visible()."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Guarded(sys.stdout), Guarded(sys.stderr, bars=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def show_bug(kind, error, trace):
    """sys.excepthook: a traceback quotes what stood in the data."""
    warn_text = "".join(traceback.format_exception(kind, error, trace))
    print(visible(warn_text, "\n"), file=sys.stderr, end="")


# --- lists on the command line ---------------------------------------------------


def cut_at_comma(text):
    """ "a\\,b,c" -> "a,b", ",", "c": at the first comma that is none of a name's."""
    head, comma, rest = text.partition(",")
    while comma and head.endswith("\\"):
        more, comma, rest = rest.partition(",")
        head = f"{head[:-1]},{more}"
    return head, comma, rest


def with_commas(text):
    """A name or a path as --targets takes it."""
    return text.replace(",", "\\,")
