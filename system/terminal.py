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

ODD = re.compile(r"[^ -~]")  # every character that is not a letter, digit or sign of ASCII


def visible(text, keep=""):
    """Text in which characters that a terminal obeys, or does not show, are written as escapes.

    keep: characters that stay as they are."""

    def replace(match):
        return match[0] if match[0] in keep else shown(match[0])

    return ODD.sub(replace, text)


@functools.cache
def shown(character):
    """A character as a terminal may have it: itself, or its escape."""
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode()


def say(line):
    """Prints one line, and flushes it."""
    print(visible(line), flush=True)


def say_text(text):
    """Prints a text. Its line breaks and tabs stay as they are."""
    print(visible(text, "\n\t"), flush=True)


def warn(line):
    """Prints one line on stderr."""
    print(visible(line), file=sys.stderr, flush=True)


def listed(names, most=20):
    """Names for a sentence: the first few of them, and each cut where it is long."""
    first = ", ".join(shorten(visible(name), 60) for name in names[:most])
    if len(names) > most:
        return f"{first}, ... ({len(names)} in all)"
    return first


def command(*words):
    """What to type: any words, as names of folders are, quoted for a shell."""
    return " ".join(map(quoted, words))


def quoted(word):
    """A word quoted for a shell, with escapes where it cannot be printed."""
    if word.isprintable():
        return shlex.quote(word)
    word = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{ODD.sub(shell_escape, word)}'"


def shell_escape(match):
    """A matched character as bash takes it between $' and '."""
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


LOG_INTERVAL = 30  # seconds between two lines of progress in a log


def progress(things=None, desc="", **options):
    """tqdm's progress bar; where stderr is no terminal, a line every LOG_INTERVAL seconds instead,
    and none for what takes less. desc: any text."""
    options["desc"] = shorten(visible(desc), 40)
    if not sys.stderr.isatty():
        options["file"] = LogLines(sys.stderr)
        options["ascii"] = True
        options["delay"] = LOG_INTERVAL
        options["mininterval"] = LOG_INTERVAL
        options["miniters"] = 1  # else tqdm guesses from the speed when to look at the clock
    return tqdm(things, **options)


class LogLines:
    """A stream for a progress bar that writes each state of it as a line of its own."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        """Bars begin with a carriage return. tqdm's other texts move a terminal's cursor."""
        state = text.strip()
        if text.startswith("\r") and state:
            self.stream.write(state + "\n")

    def flush(self):
        self.stream.flush()


def shorten(text, limit):
    """Text cut to at most `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


class Guarded:
    """A stream that writes as escapes what a terminal would obey, or its encoding lacks."""

    def __init__(self, stream, bars=False):
        """bars: progress bars are drawn on it, which begin with a carriage return."""
        self.stream = stream
        self.bars = bars
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for what its encoding does not have

    def write(self, text):
        begin = "\r" if self.bars and text.startswith("\r") else ""
        self.stream.write(begin + visible(text.removeprefix(begin), "\n\t"))
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
    """As a context: all that is printed meanwhile goes through visible()."""
    stdout = sys.stdout
    stderr = sys.stderr
    sys.stdout = Guarded(stdout)
    sys.stderr = Guarded(stderr, bars=True)
    try:
        yield
    finally:
        sys.stdout = stdout
        sys.stderr = stderr


def show_bug(kind, error, trace):
    """For sys.excepthook: prints a traceback, which may quote what stood in the data."""
    text = "".join(traceback.format_exception(kind, error, trace))
    print(visible(text, "\n"), file=sys.stderr, end="")


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
