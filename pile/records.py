"""What a source's files hold: documents, or records with a document inside each.

The process that reads the files leaves the records closed, for the workers to open.
"""

import ast
import json
from decimal import Decimal
from typing import NamedTuple

CODE = "Python code"  # of --source=python: its docstrings become a domain of their own
BOM = b"\xef\xbb\xbf"  # of Windows' editors: no text


class Document(NamedTuple):
    source: str  # its file's name
    record: int  # its line or row in there, from 0
    domain: object  # a text, UTF-8 bytes, a number, Within, Skipped; None: it has none
    text: object  # a text, UTF-8 bytes, Within, Skipped; Lines: of many; anything else: no text
    default: str = ""  # its domain where it has none itself; empty: its file's name


class Lines(NamedTuple):
    content: bytes  # whole lines, a record of JSON each


class Within(NamedTuple):
    content: bytes  # a text of JSON
    key: str  # what to look up in it


class Skipped(NamedTuple):
    why: str
    number: int = 1  # of records


def opened(job, cfg):
    """Documents -> documents without Lines and Within; a line that is no JSON is Skipped."""
    for document in job:
        if isinstance(document.text, Lines):
            yield from open_lines(document, cfg)
        elif cfg.source == "python" and document.domain == CODE:
            code, docstrings = cut_docstrings(document.text)
            yield document._replace(text=code)
            yield document._replace(domain="Docstrings", text=docstrings)
        elif isinstance(document.text, Within) or isinstance(document.domain, Within):
            domain, text = look_within(document.domain), look_within(document.text)
            yield document._replace(domain=domain, text=text)
        else:
            yield document


def open_lines(document, cfg):
    """A document that is many lines of JSON -> one of each."""
    for number, line in enumerate(document.text.content.split(b"\n"), document.record):
        line = line.removeprefix(BOM)  # also between files that were put one behind another
        if not line or line.isspace():
            continue
        try:
            record = parse(line.decode())
        except UnicodeDecodeError:
            domain, text = None, Skipped("not_utf8")
        except (ValueError, RecursionError):
            domain, text = None, Skipped("not_json")
        else:
            domain, text = lookup(record, cfg.domain_key), lookup(record, cfg.text_key)
        yield Document(document.source, number, domain, text, document.default)


def parse(text):
    """JSON -> an object. Raises ValueError and RecursionError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer of more than 4,300 digits, somewhere in the record
        return json.loads(text, parse_int=Decimal)


def look_within(cell):
    """What stands in a cell, or under the key of a text of JSON in it."""
    if isinstance(cell, Within):
        return lookup(cell.content.decode(errors="replace"), cell.key)
    return cell


def lookup(record, key):
    """What a record has under a key, or None: under the whole key, else below the key's part in
    front of its first dot, also where a text of JSON stands there."""
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
    """A Python file's bytes -> its lines without those of docstrings, as bytes, and the
    docstrings, one text."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source, ""
    lines, docstrings = source.splitlines(keepends=True), []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        docstring = ast.get_docstring(node) if isinstance(node, documented) else None
        if docstring:
            docstrings.append(docstring)
            for i in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                lines[i] = b""
    return b"".join(lines), "\n\n".join(docstrings)
