"""A script's commands: functions of plain arguments that return plain dicts. Their signatures
become the command line's options. What they return becomes JSON, CSV, or text for people.

What stands in the data may be anything. In JSON it is escaped; in CSV and text its control
characters are made visible.
"""

import argparse
import csv
import inspect
import io
import json
import math
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from typing import get_args

from show import hindsight, tables
from show.findings import UNIT, micro, short, when, worth
from show.tables import fit
from system import terminal
from system.errors import UserError
from system.terminal import visible

# --- the command line -> arguments ----------------------------------------------

HELP = {
    "hindsight": "what they did for the model at the end of the run (slow)",
    "run": "a run's folder, as out/demo",
    "other": "another run's folder",
    "data_dir": "where the run's data is now, if it moved",
    "runs": "folders of runs, as out/control out/curated",
    "n": "how many of them",
    "target": "one of the run's targets, which `summary` lists; default: its first",
    "domain": "only those of this domain; `domains` lists them",
    "score": "share, of the size of its step's values; value, in nats; smoothed: as share, by the "
    "target's gradient's mean over the steps",
    "chars": "characters of each text",
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
    data_dir ("" for a command that reads no data), and the function's {parameter: value}.

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
    return function, options.pop("style"), options.pop("data_dir", ""), options


def add_command(subparsers, function, examples):
    about = " ".join(inspect.getdoc(function).split())
    parser = subparsers.add_parser(
        function.__name__, help=about, description=about, epilog=examples, **LOOKS
    )
    parameters = inspect.signature(function).parameters
    for key, parameter in parameters.items():
        add_option(parser, key, parameter)
    if "run" in parameters:
        parser.add_argument("--data_dir", default="", metavar="PATH", help=HELP["data_dir"])
    styles = ("json", "csv") if function.__name__ in ROWS else ("json",)
    group = parser.add_mutually_exclusive_group()
    for style in styles:
        group.add_argument(
            f"--{style}", dest="style", action="store_const", const=style, help=HELP[style]
        )


def add_option(parser, key, parameter):
    """A parameter without a default is required: by its place, or by its name if only that is
    allowed. False is the default of a switch. A Literal lists what may be written."""
    choices = get_args(parameter.annotation) or None
    if parameter.default is False:
        parser.add_argument(f"--{key}", action="store_true", help=HELP[key])
    elif parameter.default is not parameter.empty:
        shown = f" ({parameter.default})" if parameter.default else ""
        parser.add_argument(
            f"--{key}",
            type=count if isinstance(parameter.default, int) else str,
            choices=choices,
            default=parameter.default,
            metavar="|".join(choices) if choices else key.upper(),
            help=HELP[key] + shown,
        )
    elif parameter.kind is parameter.VAR_POSITIONAL:
        parser.add_argument(key, nargs="+", metavar="run", help=HELP[key])
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
    "docs": "documents",
    "domains": "domains",
    "chunk": "visits",
    "doc": "chunks",
    "compare": "moved",
    "losses": "losses",
    "tokens": "tokens",
    "query": "chunks",
}


def show(command, result, style, data_dir=""):
    """Prints what a command returned. style: "json", "csv", or None for text. data_dir: as the user
    wrote it, for what to type next."""
    if style == "json":
        print(json.dumps(plain(result), indent=1, allow_nan=False))
    elif style == "csv":
        print(as_csv(result[ROWS[command]]), end="")
    else:
        say_lines(SHOWN[command](result), data_dir)


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
    """Documents become their numbers, sentences a text; a text becomes one that a spreadsheet does
    not take for a formula."""
    if isinstance(x, list):
        x = " ".join(item if isinstance(item, str) else str(item["doc"]) for item in x)
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


@dataclass
class Next:
    """What to type next: words of a command that reads the run."""

    words: list


def say_lines(lines, data_dir=""):
    """Prints strings, TextLines, Coloured and Next."""
    for line in lines:
        if isinstance(line, Next):
            moved = [f"--data_dir={data_dir}"] if data_dir else []
            terminal.say("next: " + terminal.command("python", *line.words, *moved))
        elif isinstance(line, Coloured):
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


def effects(values, horizon):
    """{target: nats} -> in words, what they did. horizon: see sign()."""
    told = []
    for target, value in values.items():
        verb = "raised" if value < 0 else "lowered"
        what = f"{verb} the loss of {short(target)}{when(horizon)}"
        told.append(f"{what} by {worth(abs(value)).lstrip('+')}")
    return ", ".join(told)


def number(x):
    if math.isnan(x):
        return "-"
    return f"{x:,.4g}" if abs(x) < 1 else f"{x:,.3f}"


def column_names(targets):
    """A column for each target, named by it."""
    return [terminal.shorten(visible(name), MOST_CELLS) for name in targets]


# --- lines of each command ----------------------------------------------------------

SIGN = "positive: it lowered the target's loss"


def sign(horizon):
    """SIGN, and which loss that is. horizon: of a show.run.Run."""
    return SIGN + when(horizon)


def show_summary(r):
    if r["hindsight"]:
        yield from show_hindsight(r)
        return
    state = "finished" if r["finished"] else "not finished, or under way"
    step = f"step {r['steps']:,} of {r['max_iters']:,} ({state})"
    yield f"{r['run']}: {step}, rule {r['rule']}, {r['batch']} chunks a step"
    used = f"{r['chunks_used']:,} of {r['chunks']:,} chunks used, in {r['visits']:,} visits"
    early = f"{r['early_steps']} early steps, whose values are rough"
    approximate = f"; approximate: {r['approximate']}" if r["approximate"] else ""
    yield f"{used}; {early}{approximate}"
    yield ""
    yield from tables.heading()
    yield ""
    yield from tables.figure_table("target", [(t["target"], t) for t in r["targets"]])
    for t in r["targets"]:
        yield from t["cautions"]
    books = [t["books"] for t in r["targets"]]
    yield ""
    for t in r["targets"]:
        yield tables.accounted(t["target"], t["books"])
    yield from tables.explain_parts(books)
    yield from tables.unclosed([t["target"] for t in r["targets"]], books, r["rule"])
    yield from tables.passes(r["passes"])
    for t in r["targets"]:
        if t["audit"]:
            yield tables.compared(t["target"], t["audit"])
    yield ""
    for t in r["targets"]:
        yield t["finding"]
    yield Next(["values.py", "domains", r["run"]])


def show_hindsight(r):
    """The summary of hindsight: what the number is, where it is early, the check."""
    beside, names = r["hindsight"], [t["target"] for t in r["targets"]]
    steps = f"steps {beside['first_step']:,} to {beside['last_step']:,}"
    yield f"{r['run']}: hindsight of {beside['of']}, {steps}, {r['batch']} chunks a step"
    yield from tables.paragraph(hindsight.meaning(r["horizon"]))
    ahead = f"up to {tables.counted(r['horizon'], 'step')} ahead" if r["horizon"] else "to the end"
    losses = [f"{short(name)} {beside['loss_at_end'][name]:.4f} nats" for name in names]
    yield f"horizon: {ahead}; loss at the end: {', '.join(losses)}"
    approximate = f"; approximate: {r['approximate']}" if r["approximate"] else ""
    used = f"{r['chunks_used']:,} of {r['chunks']:,} chunks used, in {r['visits']:,} visits"
    yield f"{used}{approximate}"
    yield ""
    yield from tables.early_steps(beside, names)
    yield ""
    yield from tables.checked(beside, names)
    yield ""
    yield from tables.heading(r["horizon"])
    yield ""
    yield from tables.figure_table("target", [(t["target"], t) for t in r["targets"]])
    for t in r["targets"]:
        yield from t["cautions"]
    yield ""
    for t in r["targets"]:
        yield t["finding"]
    yield Next(["values.py", "domains", r["run"]])


def show_domains(r):
    if r["approximate"]:
        yield f"Approximate: {r['approximate']}"
    yield from tables.heading(r["horizon"])
    if r["score"] == "smoothed":
        yield tables.SMOOTHED
    for t in r["targets"]:
        rows = [row for row in r["domains"] if row["target"] == t["target"]]
        yield from tables.domain_table(t["target"], rows, t)
        yield from t["cautions"]
    yield ""
    for t in r["targets"]:
        yield t["finding"]
    first = r["domains"][0]
    words = ["values.py", "top", r["run"], f"--domain={first['domain']}"]
    words.append(f"--target={first['target']}")
    if r["score"] == "smoothed":
        words.append("--score=smoothed")
    yield Next(words)


ORDERS = {
    "share": "share of their steps' values",
    "value": "value",
    "smoothed": "smoothed score",
}
SMOOTHED = "smoothed: as share, by the direction of the target's gradient's mean over the steps"
SHARE = "share: a visit's value over the mean size of its step's values; the mean of its visits"
STEP = "step, loss: the step of its first visit, its mean training loss in nats"


def ordered_how(r, what):
    """The lines above a ranking of chunks or documents."""
    if r["approximate"]:
        yield f"Approximate: {r['approximate']}"
    end = "helped least, or hurt" if r["order"] == "bottom" else "helped most"
    yield f"The {what} that {end}, for {short(r['target'])}, by {ORDERS[r['score']]}"
    yield f"value: in {UNIT}, summed over visits ({sign(r['horizon'])})"


def show_ranked(r):
    yield from ordered_how(r, "chunks")
    yield SHARE
    relative = ["share"]
    if r["score"] == "smoothed":
        yield SMOOTHED
        relative = ["smoothed", "share"]
    yield STEP
    yield ""
    figures = [*relative, "value", "visits", "step", "loss"]
    rows = []
    for c in r["chunks"]:
        rows.append(
            [
                str(c["rank"]),
                str(c["chunk"]),
                *[f"{c[name]:+,.2f}" for name in relative],
                micro(c["value"]),
                str(c["visits"]),
                str(c["first_step"]),
                number(c["loss"]),
                first_document(c["documents"]),
                c["domain"],
                c["text"],
            ]
        )
    yield from table(["rank", "chunk", *figures, "document", "domain", "text"], rows)
    yield ""
    if not r["chunks"]:
        yield "no chunk of this domain was used yet"
        return
    c = r["chunks"][0]
    times = f"{abs(c['share']):.1f} times the mean size of a value in its steps"
    effect = effects({r["target"]: c["value"]}, r["horizon"])
    yield f"chunk {c['chunk']} ({short(c['domain'])}) {effect}, {times}"
    yield Next(["values.py", "chunk", r["run"], str(c["chunk"])])


def first_document(documents):
    """The first one's number, and how many more there are."""
    if not documents:
        return ""
    more = f" (+{len(documents) - 1} more)" if len(documents) > 1 else ""
    return f"{documents[0]['doc']}{more}"


def show_docs(r):
    yield from ordered_how(r, "documents")
    if r["score"] == "value":
        yield f"score: the value, by the visits; +-: its standard error; both in {UNIT}"
    else:
        if r["score"] == "smoothed":
            yield SMOOTHED
        yield "score: a visit's value over the mean size of its step's values, times the document's"
        yield "part of the chunk; the mean of its visits. +-: the standard error of that mean"
    yield ""
    rows = []
    for d in r["documents"]:
        rows.append(
            [
                str(d["rank"]),
                str(d["doc"]),
                scored(d["score"], r["score"]),
                scored(d["error"], r["score"]).lstrip("+"),
                micro(d["value"]),
                str(d["visits"]),
                f"{d['chunks_used']} of {d['chunks']}",
                str(d["record"]),
                ending(d["source"]),
                d["domain"],
                d["text"],
            ]
        )
    figures = ["score", "+-", "value", "visits", "chunks used", "record"]
    yield from table(["rank", "document", *figures, "source", "domain", "text"], rows)
    yield ""
    if not r["documents"]:
        yield "no document of this domain was used yet"
        return
    d = r["documents"][0]
    effect = effects({r["target"]: d["value"]}, r["horizon"])
    sure = "more" if abs(d["score"]) > 2 * d["error"] else "not more"
    visits = tables.counted(d["visits"], "visit")
    clear = f"its score is {sure} than two errors from 0"
    if d["visits"] < 2:
        clear = "of one visit no error is known"
    yield f"document {d['doc']} ({short(d['domain'])}) {effect}, in {visits}; {clear}"
    yield Next(["values.py", "doc", r["run"], str(d["doc"])])


def ending(path):
    """The end of a path, which tells files apart."""
    path = visible(path)
    return path if len(path) <= MOST_CELLS else "\u2026" + path[1 - MOST_CELLS :]


def scored(x, score):
    """A score of show/scores.py as text."""
    if score == "value":
        return micro(x)
    return "-" if math.isnan(x) else f"{x:+,.3f}"


def begins(token):
    """Where a document begins, seen from a chunk, in words."""
    return f"token {token:,}" if token >= 0 else f"earlier, {-token:,} tokens before"


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
    rows = []
    for doc in r["documents"]:
        place = [str(doc["doc"]), begins(doc["begins"]), f"{doc['n_tokens']:,}"]
        rows.append([*place, str(doc["record"]), doc["source"]])
    yield from table(["document", "begins", "tokens", "record", "source"], rows)
    yield ""
    if r["used"]:
        yield f"Every visit, values in {UNIT} ({sign(r['horizon'])})"
        yield from table(*visits_of_chunk(r, targets))
    else:
        yield "never used: it has no value"
    yield from show_text(r["text"])
    if r["used"]:
        yield f"chunk {r['chunk']} {effects(r['value'], r['horizon'])}"
        yield Next(["values.py", "tokens", r["run"], f"--chunk={r['chunk']}"])


def visits_of_chunk(r, targets):
    """The head and the rows of a chunk's visits, and their sum."""
    kinds = ["value", "smoothed"] if "smoothed" in r["visits"][0] else ["value"]
    head = ["step", "loss", *column_names(targets)]
    if "smoothed" in kinds:
        head += [f"{name}, smoothed" for name in column_names(targets)]
    rows = []
    for v in r["visits"]:
        figures = [micro(v[kind][target]) for kind in kinds for target in targets]
        early = "early" if v["early"] else ""
        rows.append([str(v["step"]), number(v["loss"]), *figures, number(v["grad_norm"]), early])
    sums = [micro(r["value"][target]) for target in targets]
    unsummed = [""] * (len(kinds) - 1) * len(targets)
    rows.append(["sum", "", *sums, *unsummed, "", ""])
    return [*head, "gradient norm", "early"], rows


def show_doc(r):
    source = f"record {r['record']} of {r['source']}, {r['n_tokens']:,} tokens"
    yield f"document {r['doc']}, {r['domain']}: {source}"
    cut = "" if r["whole"] else "; its end fills no chunk and is not in the data"
    used = f"{r['chunks_used']} of its {len(r['chunks'])} chunks used{cut}"
    yield f"{used}. Values in {UNIT} ({sign(r['horizon'])})"
    rule = "a chunk's value times the document's share of the chunk's tokens"
    yield f"Its own: the sum over its chunks of {rule}"
    yield ""
    rows = []
    for c in r["chunks"]:
        place = [str(c["chunk"]), begins(c["begins"]), str(c["tokens"]), f"{c['share']:.1%}"]
        rows.append([*place, *map(micro, c["value"].values())])
    rows.append(["its own", "", "", "", *map(micro, r["value"].values())])
    head = ["chunk", "begins", "tokens", "share", *column_names(r["value"])]
    yield from table(head, rows)
    yield from show_text(r["text"])
    if r["chunks_used"]:
        yield f"document {r['doc']} {effects(r['value'], r['horizon'])}"
        yield Next(["values.py", "chunk", r["run"], str(most_telling(r["chunks"])["chunk"])])


def most_telling(chunks):
    """Of a document's chunks the one that gives it the largest part of its value for the first
    target, without sign."""

    def size(chunk):
        part = next(iter(chunk["value"].values())) * chunk["share"]
        return -1.0 if math.isnan(part) else abs(part)

    return max(chunks, key=size)


def show_export(r):
    yield f"{r['path']}: {r['rows']:,} rows of {', '.join(r['columns'])}"


def show_compare(r):
    a, b = r["runs"]
    used = f"{r['chunks']:,} chunks used by both"
    yield f"a: {a}, b: {b}: {used}. Values in {UNIT} ({SIGN})"
    if r["horizons"] != [None, None]:
        kinds = [when(horizon).strip() or "in each step" for horizon in r["horizons"]]
        yield f"that loss is in a the one {kinds[0]}, in b the one {kinds[1]}"
    yield ""
    rows = []
    for t in r["targets"]:
        figures = [number(t["spearman"]), number(t["pearson"]), f"{t['equal_signs']:.1%}"]
        rows.append([t["target"], *figures])
    yield from table(["target", "Spearman", "Pearson", "equal signs"], rows)
    yield ""
    rows = []
    for d in r["domains"]:
        figures = [f"{d['chunks']:,}"]
        for key in ("median_a", "median_b", "mean_a", "mean_b"):
            figures.append(micro(d[key]))
        rows.append([d["target"], d["domain"], *figures])
    figures = ["median in a", "median in b", "mean in a", "mean in b"]
    yield from table(["target", "domain", "chunks", *figures], rows)
    yield ""
    yield "The chunks that moved most in rank"
    figures = ["rank in a", "rank in b", "value in a", "value in b"]
    rows = []
    for m in r["moved"]:
        ranks = [f"{m['rank_a']:,.0f}", f"{m['rank_b']:,.0f}"]
        values = [micro(m["value_a"]), micro(m["value_b"])]
        rows.append([str(m["chunk"]), *ranks, *values, m["target"], m["domain"], m["text"]])
    yield from table(["chunk", *figures, "target", "domain", "text"], rows)
    yield ""
    for t in r["targets"]:
        agree = f"the ranks of the chunks correlate by {number(t['spearman'])}"
        signs = f"{t['equal_signs']:.0%} of them have the same sign in both runs"
        yield f"for {short(t['target'])}: {agree}; {signs}"
    yield Next(["values.py", "chunk", a, str(r["moved"][0]["chunk"])])


def show_losses(r):
    """Of two runs a difference; of more, each one's to the first."""
    names = [run["name"] for run in r["runs"]]
    step = r["last_common_step"]
    yield "Validation losses in nats, of the same validation chunks for every run"
    for run in r["runs"]:
        yield f"{run['name']}: {run['run']}, seed {run['seed']}"
    yield ""
    shown = column_names(names)
    differences = ["difference"] if len(names) == 2 else [f"{name} - first" for name in shown[1:]]
    by_step = [row for row in r["losses"] if row["domain"] is None and row["target"] is None]
    rows = [[str(row["step"]), *loss_cells(row)] for row in by_step]
    yield from table(["step", *shown, *differences], rows)
    yield ""
    yield f"after step {step:,}:"
    at_end = [row for row in r["losses"] if row["step"] == step]
    rows = []
    for row in at_end[1:]:
        rows.append([row["domain"] or f"target {row['target']}", *loss_cells(row)])
    rows.append(["all validation chunks", *loss_cells(at_end[0])])
    yield from table(["domain", *shown, *differences], rows)
    yield ""
    if len(names) == 2:
        yield "difference: the second run's loss less the first one's; negative: it is lower"
    yield from losses_in_words(r, at_end)


def loss_cells(row):
    cells = []
    for loss in row["loss"].values():
        cells.append("-" if math.isnan(loss) else f"{loss:.4f}")
    for difference in row["difference"].values():
        cells.append("-" if math.isnan(difference) else f"{difference:+.4f}")
    return cells


def losses_in_words(r, at_end):
    """at_end: the rows of the last step that the runs have in common. The sentences speak of the
    targets that were files, or else of all validation chunks."""
    of_targets = []
    for row in at_end:
        if row["target"] is not None and all(map(math.isfinite, row["loss"].values())):
            of_targets.append(row)
    first = r["runs"][0]
    for row in of_targets or at_end[:1]:
        what = "loss" if row["target"] is None else f"loss on {short(row['target'])}"
        if len(r["runs"]) == 1:
            loss = row["loss"][first["name"]]
            yield f"{short(first['name'])}: {what} {loss:.4f} nats after step {row['step']:,}"
        for run in r["runs"][1:]:
            yield difference_in_words(row, what, run["name"], first["name"])
    if len(r["runs"]) == 1:
        return
    if len({run["seed"] for run in r["runs"]}) > 1:
        yield "Their seeds differ: part of the difference may be that of the seeds."
    yield "One run each does not tell how far runs with other seeds lie apart: it may be chance."
    for run in r["runs"]:
        seed = (run["seed"] or 0) + 1
        config = f"{run['run']}/config.json"
        yield Next(["train.py", config, f"--seed={seed}", f"--out_dir={run['run']}-seed{seed}"])


def difference_in_words(row, what, name, first):
    """Of a row of losses: how the run called name differs from the first one."""
    by = f"({row['loss'][name]:.4f} against {row['loss'][first]:.4f} after step {row['step']:,})"
    difference = round(row["difference"][name], 4)
    amount = f"{abs(difference):.4f} nats {'lower' if difference < 0 else 'higher'} than"
    how = amount if difference else "the same as"
    return f"{short(name)}: its {what} is {how} that of {short(first)} {by}"


def show_tokens(r):
    what = f"what each token does for {r['target']} in a step, in {UNIT} ({SIGN})"
    if r["horizon"] is None:
        what = f"what each token did for {r['target']}, in {UNIT} ({SIGN})"
    yield f"chunk {r['chunk']}, {r['domain']}: {what}"
    yield ""
    rows = []
    worth_of = "worth in step {}, with the weights of that step"
    differ = "The two differ, for the weights do: read the tokens below against each other."
    if r["horizon"] is not None:
        worth_of = f"hindsight of step {{}}: worth for the loss{when(r['horizon'])}"
        differ = "The two are different things: read the tokens below against each other."
    for v in r["visits"]:
        rows.append([worth_of.format(v["step"]), micro(v["value"])])
    by = f"sum of its tokens at step {r['step']}, with the newest checkpoint's weights"
    rows.append([by, micro(r["sum"])])
    width = max(len(words) for words, _ in rows)
    for words, value in rows:
        yield f"{words:<{width}}  {value:>14}"
    if r["visits"]:
        yield differ
    else:
        yield "No step has used this chunk: it has no value in the run."
    yield ""
    yield from token_lines(r["tokens"])
    yield ""
    known = [token for token in r["tokens"] if not math.isnan(token["value"])]
    best = max(known, key=lambda token: token["value"])
    worst = min(known, key=lambda token: token["value"])
    largest = f"{best['token']!r} at position {best['position']} ({micro(best['value'])})"
    smallest = f"{worst['token']!r} at {worst['position']} ({micro(worst['value'])})"
    yield f"the largest value has {largest}, the smallest {smallest}"
    yield Next(["report.py", r["run"]])


def token_lines(tokens):
    """Coloured on a terminal, else a table."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        rows = [[str(t["position"]), micro(t["value"]), t["token"]] for t in tokens]
        yield from table(["position", "value", "token"], rows)
        return
    sizes = sorted(abs(t["value"]) for t in tokens if not math.isnan(t["value"]))
    # not the largest: a single token far out would leave all others white
    most = sizes[int(0.98 * (len(sizes) - 1))] or 1.0
    yield Coloured([(t["token"], t["value"] / most) for t in tokens])
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
    "docs": show_docs,
    "domains": show_domains,
    "chunk": show_chunk,
    "doc": show_doc,
    "export": show_export,
    "compare": show_compare,
    "losses": show_losses,
    "tokens": show_tokens,
}
