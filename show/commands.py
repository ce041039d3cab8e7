"""A script's commands: functions of plain arguments that return plain dicts. Their signatures
become the command line's options. What they return becomes JSON, CSV, or text for people.

What stands in the data may be anything. In JSON it is escaped; in CSV and text its control
characters are made visible.
"""

import argparse
import csv
import inspect
import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
from dataclasses import dataclass

from show import tables
from show.findings import micro
from show.tables import fit
from system import terminal
from system.errors import UserError
from system.terminal import visible

# --- the command line -> arguments ----------------------------------------------

HELP = {
    "run": "a run's folder, as out/demo",
    "other": "another run's folder",
    "data_dir": "where the run's data is now, if it moved",
    "n": "how many chunks",
    "target": "one of the run's targets; default: its first",
    "domain": "only chunks of this domain",
    "chars": "characters of each chunk's text",
    "bottom": "from the other end",
    "chunk": "a chunk's number: its row in train.npy",
    "doc": "a document's number, as `chunk` and `top` show it",
    "path": "the .parquet file to write",
    "text": "the text",
    "file": "a file with the text, UTF-8",
    "json": "everything, as show/values.schema.json describes it; null: no number",
    "csv": "the rows",
}
LOOKS = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; type: {self.prog} --help")


def parse(doc, functions, argv=None):
    """argv (default: the command line) -> the function that it names, "json" or "csv" or None,
    data_dir, and the function's {parameter: value}.

    doc: the script's docstring, with an example of each function on a line. Raises UserError.
    """
    script = doc[doc.index("python ") :].split()[1]
    parser = Parser(prog=f"python {script}", description=doc, **LOOKS)
    subparsers = parser.add_subparsers(
        dest="command", required=True, metavar="command", title="commands"
    )
    for function in functions:
        examples = [line for line in doc.splitlines() if f"{script} {function.__name__} " in line]
        add_command(subparsers, function, "\n".join(examples))
    options = vars(parser.parse_args(argv))
    by_name = {function.__name__: function for function in functions}
    function = by_name[options.pop("command")]
    return function, options.pop("style"), options.pop("data_dir"), options


def add_command(subparsers, function, examples):
    about = " ".join(inspect.getdoc(function).split())
    parser = subparsers.add_parser(
        function.__name__, help=about, description=about, epilog=examples, **LOOKS
    )
    for key, parameter in inspect.signature(function).parameters.items():
        add_option(parser, key, parameter)
    parser.add_argument("--data_dir", default="", metavar="PATH", help=HELP["data_dir"])
    styles = ("json", "csv") if function.__name__ in ROWS else ("json",)
    group = parser.add_mutually_exclusive_group()
    for style in styles:
        group.add_argument(
            f"--{style}", dest="style", action="store_const", const=style, help=HELP[style]
        )


def add_option(parser, key, parameter):
    """A parameter without a default is required: by its place, or by its name if only that is
    allowed. False is the default of a switch."""
    if parameter.default is False:
        parser.add_argument(f"--{key}", action="store_true", help=HELP[key])
    elif parameter.default is not parameter.empty:
        shown = f" ({parameter.default})" if parameter.default else ""
        parser.add_argument(
            f"--{key}",
            type=count if isinstance(parameter.default, int) else str,
            default=parameter.default,
            metavar=key.upper(),
            help=HELP[key] + shown,
        )
    else:
        kind = str if parameter.annotation is parameter.empty else parameter.annotation
        if parameter.kind is parameter.KEYWORD_ONLY:
            parser.add_argument(f"--{key}", type=kind, help=HELP[key], required=True)
        else:
            parser.add_argument(key, type=kind, help=HELP[key])


def count(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def obey_signals():
    """`| head` ends a command quietly. SIGTERM ends it as Ctrl-C does: no file is left
    half-written."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, end)


def end(number, frame):
    sys.exit(128 + number)


# --- what they return -> JSON, CSV, lines -----------------------------------------

# of what a command returns, the rows for --csv
ROWS = {
    "summary": "targets",
    "top": "chunks",
    "bottom": "chunks",
    "domains": "domains",
    "chunk": "visits",
    "doc": "chunks",
    "compare": "moved",
    "tokens": "tokens",
    "query": "chunks",
}


def show(command, result, style):
    """Prints what a command returned. style: "json", "csv", or None for text."""
    if style == "json":
        print(json.dumps(plain(result), indent=1, allow_nan=False))
    elif style == "csv":
        print(as_csv(result[ROWS[command]]), end="")
    else:
        say_lines(SHOWN[command](result))


def plain(x):
    """NaN, which JSON does not know, becomes None."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list):
        return [plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def as_csv(rows):
    """Dicts -> CSV with a column for each key; of an inner dict, one for each of its keys."""
    rows = [flat(row) for row in plain(rows)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = rows[0] if rows else {}
    writer.writerow([as_cell(key) for key in head])
    for row in rows:
        writer.writerow([as_cell(x) for x in row.values()])
    return file.getvalue()


def flat(row):
    """{key: {inner: x}} -> {"key:inner": x}"""
    cells = {}
    for key, x in row.items():
        if isinstance(x, dict):
            for inner, value in x.items():
                cells[f"{key}:{inner}"] = value
        else:
            cells[key] = x
    return cells


def as_cell(x):
    """Documents become their numbers; a text one that a spreadsheet does not take for a formula."""
    if isinstance(x, list):
        x = " ".join(str(doc["doc"]) for doc in x)
    if not isinstance(x, str):
        return x
    is_formula = x.startswith(("=", "+", "-", "@", "\t", "\r"))
    return visible("'" + x if is_formula else x)


@dataclass
class TextLine:
    """A line of a text, whose tabs stay."""

    text: str


@dataclass
class Coloured:
    """Text in colours. pieces: [(a text, a number from -1, it hurt, to 1, it helped)]."""

    pieces: list


def say_lines(lines):
    """Prints strings, TextLines and Coloured."""
    for line in lines:
        if isinstance(line, Coloured):
            text = "".join(coloured(piece, x) for piece, x in line.pieces)
            sys.stdout.write_as_it_is(text + "\n")
        elif isinstance(line, TextLine):
            terminal.say_text(line.text)
        else:
            terminal.say(line)


# --- tables and figures -------------------------------------------------------------

LEFT = ("target", "domain", "source", "token", "text")  # columns of words; all others are numbers
MOST_CELLS = 28  # of a word


def table(head, rows):
    """head: names of columns; rows: lists of strings -> aligned lines.

    Words are cut to 28 cells, but a last column of words only at the line's end.
    """
    lines = [head]
    for row in rows:
        cells = []
        for name, cell in zip(head, row):
            cells.append(visible(" ".join(cell.split()) if name == "text" else cell))
        lines.append(cells)
    widths = []
    for name, column in zip(head, zip(*lines)):
        width = max(map(len, column))
        widths.append(min(width, MOST_CELLS) if name in LEFT else width)
    if head[-1] in LEFT:
        taken = sum(widths[:-1]) + 2 * len(head)
        widths[-1] = max(20, shutil.get_terminal_size((160, 0)).columns - taken)
    return [aligned(head, widths, line) for line in lines]


def aligned(head, widths, line):
    cells = []
    for name, width, cell in zip(head, widths, line):
        cells.append(fit(cell, width, right=name not in LEFT))
    return "  ".join(cells).rstrip()


def nano(x):
    """In billionths."""
    return scaled(x, 1e9)


def scaled(x, unit):
    return "-" if math.isnan(x) else f"{unit * x:+,.1f}"


def number(x):
    if math.isnan(x):
        return "-"
    return f"{x:,.4g}" if abs(x) < 1 else f"{x:,.3f}"


def column_names(targets):
    """A column for each target, named by it."""
    return [terminal.shorten(visible(name), MOST_CELLS) for name in targets]


# --- lines of each command ----------------------------------------------------------

SIGN = "positive: it lowered the target's loss"


def show_summary(r):
    state = "finished" if r["finished"] else "not finished, or under way"
    step = f"step {r['steps']:,} of {r['max_iters']:,} ({state})"
    yield f"{r['run']}: {step}, rule {r['rule']}, {r['batch']} chunks a step"
    used = f"{r['chunks_used']:,} of {r['chunks']:,} chunks used, in {r['visits']:,} visits"
    early = f"{r['early_steps']} early steps, whose values are rough"
    approximate = f"; approximate: {r['approximate']}" if r["approximate"] else ""
    yield f"{used}; {early}{approximate}"
    yield f"Values of the chunks used, in 1e-6 {r['unit']} ({SIGN}); sum in {r['unit']}"
    yield ""
    head = ["target", "mean", "+-", "sd", "p5", "median", "p95", "< 0", "sum"]
    rows = []
    for t in r["targets"]:
        rows.append(
            [
                t["target"],
                micro(t["mean"]),
                micro(t["standard_error"]),
                micro(t["sd"]),
                micro(t["p5"]),
                micro(t["median"]),
                micro(t["p95"]),
                f"{t['negative']:.0%}",
                f"{t['sum']:+.4f}",
            ]
        )
    yield from table(head, rows)
    yield ""
    for t in r["targets"]:
        yield tables.accounted(t["target"], t["books"])
    for t in r["targets"]:
        if t["audit"]:
            yield tables.compared(t["target"], t["audit"])


def show_ranked(r):
    which = "smallest" if r["order"] == "bottom" else "largest"
    if r["approximate"]:
        yield f"Approximate: {r['approximate']}"
    yield f"{r['target']}: the chunks with the {which} values, in 1e-6 {r['unit']} ({SIGN})"
    yield ""
    head = ["rank", "chunk", "value", "visits", "first step", "loss", "documents", "domain", "text"]
    rows = []
    for c in r["chunks"]:
        rows.append(
            [
                str(c["rank"]),
                str(c["chunk"]),
                micro(c["value"]),
                str(c["visits"]),
                str(c["first_step"]),
                number(c["loss"]),
                first_document(c["documents"]),
                c["domain"],
                c["text"],
            ]
        )
    yield from table(head, rows)


def first_document(documents):
    """The first one's number, and how many more there are."""
    if not documents:
        return ""
    more = f" +{len(documents) - 1}" if len(documents) > 1 else ""
    return f"{documents[0]['doc']}{more}"


def show_domains(r):
    yield f"Values per token, in 1e-9 {r['unit']} ({SIGN}), of the chunks used; sum in {r['unit']}"
    figures = ["mean", "+-", "p5", "median", "p95", "< 0", "sum", "share of sum"]
    head = ["domain", "chunks", "tokens", "share", *figures]
    for target, domains in itertools.groupby(r["domains"], key=lambda row: row["target"]):
        yield ""
        yield f"{target}:"
        rows = []
        for d in sorted(domains, key=lambda row: -row["median"]):
            rows.append(
                [
                    d["domain"],
                    f"{d['chunks']:,}",
                    f"{d['tokens']:,}",
                    f"{d['share']:.1%}",
                    nano(d["mean"]),
                    nano(d["standard_error"]),
                    nano(d["p5"]),
                    nano(d["median"]),
                    nano(d["p95"]),
                    f"{d['negative']:.0%}",
                    f"{d['sum']:+.4f}",
                    f"{d['share_of_sum']:.1%}",
                ]
            )
        yield from table(head, rows)


def show_text(text):
    yield ""
    yield "-" * 72
    for line in text.split("\n"):
        yield TextLine(line)
    yield "-" * 72


def show_chunk(r):
    targets = list(r["value"])
    yield f"chunk {r['chunk']}, {r['domain']}"
    yield ""
    head = ["document", "begins at token", "tokens", "record", "source"]
    rows = []
    for doc in r["documents"]:
        place = [str(doc["doc"]), str(doc["begins"]), str(doc["n_tokens"])]
        rows.append([*place, str(doc["record"]), doc["source"]])
    yield from table(head, rows)
    yield ""
    if r["used"]:
        yield f"Every visit, values in 1e-6 {r['unit']} ({SIGN})"
        head = ["step", "loss", *column_names(targets), "gradient norm", "early"]
        rows = []
        for v in r["visits"]:
            figures = [micro(v["value"][target]) for target in targets]
            early = "early" if v["early"] else ""
            rows.append(
                [str(v["step"]), number(v["loss"]), *figures, number(v["grad_norm"]), early]
            )
        figures = [micro(r["value"][target]) for target in targets]
        rows.append(["sum", "", *figures, "", ""])
        yield from table(head, rows)
    else:
        yield "never used: it has no value"
    yield from show_text(r["text"])


def show_doc(r):
    source = f"record {r['record']} of {r['source']}, {r['n_tokens']:,} tokens"
    yield f"document {r['doc']}, {r['domain']}: {source}"
    cut = "" if r["whole"] else "; its end fills no chunk and is not in the data"
    used = f"{r['chunks_used']} of its {len(r['chunks'])} chunks used{cut}"
    yield f"{used}. Values in 1e-6 {r['unit']} ({SIGN})"
    rule = "a chunk's value times the document's share of the chunk's tokens"
    yield f"Its own: the sum over its chunks of {rule}"
    yield ""
    head = ["chunk", "begins at token", "tokens", "share", *column_names(r["value"])]
    rows = []
    for c in r["chunks"]:
        place = [str(c["chunk"]), str(c["begins"]), str(c["tokens"]), f"{c['share']:.1%}"]
        rows.append([*place, *map(micro, c["value"].values())])
    rows.append(["its own", "", "", "", *map(micro, r["value"].values())])
    yield from table(head, rows)
    yield from show_text(r["text"])


def show_export(r):
    yield f"{r['path']}: {r['rows']:,} rows of {', '.join(r['columns'])}"


def show_compare(r):
    a, b = r["runs"]
    used = f"{r['chunks']:,} chunks used by both"
    yield f"a: {a}, b: {b}: {used}. Values in 1e-6 {r['unit']} ({SIGN})"
    yield ""
    rows = []
    for t in r["targets"]:
        figures = [number(t["spearman"]), number(t["pearson"]), f"{t['equal_signs']:.1%}"]
        rows.append([t["target"], *figures])
    yield from table(["target", "Spearman", "Pearson", "equal signs"], rows)
    yield ""
    rows = []
    for d in r["domains"]:
        figures = [f"{d['chunks']:,}", micro(d["mean_a"]), micro(d["mean_b"])]
        rows.append([d["target"], d["domain"], *figures])
    yield from table(["target", "domain", "chunks", "mean in a", "mean in b"], rows)
    yield ""
    yield "The chunks that moved most in rank"
    figures = ["rank in a", "rank in b", "value in a", "value in b"]
    rows = []
    for m in r["moved"]:
        ranks = [f"{m['rank_a']:,.0f}", f"{m['rank_b']:,.0f}"]
        values = [micro(m["value_a"]), micro(m["value_b"])]
        rows.append([str(m["chunk"]), *ranks, *values, m["target"], m["domain"], m["text"]])
    yield from table(["chunk", *figures, "target", "domain", "text"], rows)


def show_curated(r):
    """Of curate.py: what keep.json holds."""
    cfg = r["config"]
    out = cfg["out"] or r["run"]
    dropped = f"{r['units_dropped']:,} of {r['units_scored']:,} dropped"
    yield f"{r['run']}: {dropped}, {chosen_how(cfg)}"
    unused = f"{r['chunks_unused']:,} of {r['chunks']:,} chunks were never used"
    yield f"{r['units_negative']:,} of them have a negative score; {unused}"
    share = f"{r['chunks_kept'] / r['chunks']:.1%}"
    kept = f"{r['chunks_kept']:,} chunks, {r['tokens_kept']:,} tokens, {share}"
    yield f"kept: {kept}; values are sums in nats ({SIGN})"
    yield ""
    rows = []
    for d in sorted(r["domains"], key=lambda d: d["kept"] / d["chunks"]):
        rows.append(
            [
                d["domain"],
                f"{d['chunks']:,}",
                f"{d['used']:,}",
                f"{d['kept']:,}",
                f"{d['kept'] / d['chunks']:.1%}",
                f"{d['value']:+.4f}",
                f"{d['value_kept']:+.4f}",
            ]
        )
    head = ["domain", "chunks", "used", "kept", "share kept", "value", "value kept"]
    yield from table(head, rows)
    yield ""
    export = f", {cfg['export']}" if cfg["export"] else ""
    yield f"-> {out}/keep.npy, keep.json, dropped.npy{export}"
    keep = terminal.command(f"--keep={out}/keep.npy")
    yield f"next: python train.py <config file> {keep} --out_dir=out/curated"


def chosen_how(cfg):
    """In words: which chunks or documents curate.py dropped."""
    if cfg["random"]:
        words = "at random, "
    else:
        end = "largest" if cfg["invert"] else "smallest"
        words = f"those with the {end} {cfg['score']} for {cfg['target']}, "
    if cfg["per_domain"]:
        words += "by domain, "
    words += f"a {cfg['by']} each"
    if not cfg["drop_fraction"]:
        words += ": as many as are negative"
        if cfg["confidence"]:
            words += f" beyond {cfg['confidence']:g} standard errors"
    return words


def show_tokens(r):
    what = f"what each token did for {r['target']} at step {r['step']}"
    yield f"chunk {r['chunk']}, {r['domain']}: {what}, in 1e-6 {r['unit']} ({SIGN})"
    yield f"sum: {micro(r['sum'])}"
    yield ""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        rows = [[str(t["position"]), micro(t["value"]), t["token"]] for t in r["tokens"]]
        yield from table(["position", "value", "token"], rows)
        return
    sizes = sorted(abs(t["value"]) for t in r["tokens"] if not math.isnan(t["value"]))
    # not the largest: a single token far out would leave all others white
    most = sizes[int(0.98 * (len(sizes) - 1))] or 1.0
    yield Coloured([(t["token"], t["value"] / most) for t in r["tokens"]])
    legend = [(" hurt ", -1), (" nothing ", 0), (" helped ", 1)]
    legend.append((f": the darkest are {micro(most)} and beyond", math.nan))
    yield Coloured(legend)


RED = (255, 105, 92)
BLUE = (88, 146, 255)


def coloured(text, x):
    """On red (-1), white (0), blue (1); without a number, plain."""
    text = visible(text, "\n\t")
    if math.isnan(x):
        return text
    strength = min(1.0, abs(x))
    darkest = BLUE if x > 0 else RED
    red, green, blue = [round(255 + (shade - 255) * strength) for shade in darkest]
    begin = f"\x1b[48;2;{red};{green};{blue};38;2;0;0;0m"
    # line by line: no colour runs on to the margin
    lines = [f"{begin}{line}\x1b[0m" if line else "" for line in text.split("\n")]
    return "\n".join(lines)


SHOWN = {
    "summary": show_summary,
    "top": show_ranked,
    "bottom": show_ranked,
    "query": show_ranked,
    "domains": show_domains,
    "chunk": show_chunk,
    "doc": show_doc,
    "export": show_export,
    "compare": show_compare,
    "tokens": show_tokens,
}
