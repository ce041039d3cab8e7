"""Documents, and the records of JSON from which they come.

The process that reads the files leaves the records closed. The workers open them: opened().
"""

import ast
import json
from decimal import Decimal
from typing import NamedTuple

CODE = "Python code"  # a domain of --source=python; docstrings become one of their own
BOM = b"\xef\xbb\xbf"  # a byte order mark, which Windows' editors write: not text


class Document(NamedTuple):
    source: str  # its file's name
    record: int  # its line or row in the file, from 0
    domain: object  # str, UTF-8 bytes, a number, Within or Skipped; None: it has none
    text: object  # str, UTF-8 bytes, Pair, Within, Lines or Skipped; anything else is not a text
    default: str = ""  # its domain where it has none itself; empty: its file's name


class Pair(NamedTuple):
    """The text of a document of which only the answer is to be learned."""

    prompt: object  # a str; anything else is not a text
    answer: object


class Lines(NamedTuple):
    """Many documents that are not parsed yet."""

    content: bytes  # whole lines, a record of JSON each


class Within(NamedTuple):
    """A text that is not taken out of its record yet."""

    content: bytes  # of JSON
    key: str  # what to look up in it


class Skipped(NamedTuple):
    """Stands for records that become no document."""

    why: str  # as meta.json calls the reason
    number: int = 1  # of records


def opened(job, cfg):
    """Documents -> documents without Lines and Within. A line that is not JSON becomes Skipped."""
    for document in job:
        if isinstance(document.text, Lines):
            yield from open_lines(document, cfg)
        elif cfg.source == "python" and document.domain == CODE:
            code, docstrings = cut_docstrings(document.text)
            yield document._replace(text=code)
            yield document._replace(domain="Docstrings", text=docstrings)
        elif isinstance(document.text, Within) or isinstance(document.domain, Within):
            domain = look_within(document.domain)
            text = look_within(document.text)
            yield document._replace(domain=domain, text=text)
        else:
            yield document


def open_lines(document, cfg):
    """A document that is many lines of JSON -> one document a line."""
    for number, line in enumerate(document.text.content.split(b"\n"), document.record):
        line = line.removeprefix(BOM)  # several files may have been joined into one
        if not line or line.isspace():
            continue
        domain = None
        try:
            record = parse(line.decode())
        except UnicodeDecodeError:
            text = Skipped("not_utf8")
        except (ValueError, RecursionError):
            text = Skipped("not_json")
        else:
            domain = lookup(record, cfg.domain_key)
            text = text_of(record, cfg)
        yield Document(document.source, number, domain, text, document.default)


def text_of(record, cfg):
    """What a record has under the key for texts, or under those for pairs, where there are some."""
    if cfg.answer_key:
        return Pair(lookup(record, cfg.prompt_key), lookup(record, cfg.answer_key))
    return lookup(record, cfg.text_key)


def is_text(text):
    """Whether text_of() has found what it looked for."""
    return all(isinstance(part, str) for part in (text if isinstance(text, Pair) else [text]))


def parse(text):
    """JSON -> what it says. Raises ValueError and RecursionError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer of more than 4,300 digits, somewhere in the record
        return json.loads(text, parse_int=Decimal)


def look_within(cell):
    """A cell; for a Within, what its text of JSON has under the key."""
    if isinstance(cell, Within):
        return lookup(cell.content.decode(errors="replace"), cell.key)
    return cell


def lookup(record, key):
    """What a record has under a key, or None.

    The whole key is looked up first, then the rest of the key below its part before the first dot.
    A text of JSON counts as what it says."""
    if isinstance(record, str) and record.lstrip().startswith("{"):
        try:
            record = parse(record)
        except (ValueError, RecursionError):
            return None
    if not isinstance(record, dict):
        return None
    if record.get(key) is not None:
        return record[key]
    name, dot, rest = key.partition(".")
    return lookup(record.get(name), rest) if dot else None


def cut_docstrings(source):
    """A Python file's bytes -> its lines except docstrings, as bytes, and the docstrings, a str."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source, ""
    lines = source.splitlines(keepends=True)
    docstrings = []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        docstring = ast.get_docstring(node) if isinstance(node, documented) else None
        if docstring:
            docstrings.append(docstring)
            for i in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                lines[i] = b""
    return b"".join(lines), "\n\n".join(docstrings)
