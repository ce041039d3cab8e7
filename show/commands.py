"""A script's commands: functions of plain arguments that return plain dicts. Their signatures become the command line's options, what they
return becomes JSON, CSV, or text for people.

What stands in the data may be anything: only in JSON, where it is escaped, are control characters kept; else they are made visible.
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
import sys

from show import tables
from show.tables import fit
from system import terminal
from system.errors import UserError
from system.terminal import visible

HELP = dict(
    run="a run's folder, as out/demo",
    other="another run's folder",
    data_dir="where the run's data is now, if it moved",
    n="how many chunks",
    target="one of the run's targets; default: its first",
    domain="only chunks of this domain",
    chars="characters of each chunk's text",
    bottom="from the other end",
    chunk="a chunk's number: its row in train.npy",
    doc="a document's number, as `chunk` and `top` show it",
    path="the .parquet file to write",
    text="the text",
    file="a file with the text, UTF-8",
    json="everything, as show/values.schema.json describes it; null: no number",
    csv="the rows",
)
ROWS = dict(
    summary="targets",
    top="chunks",
    bottom="chunks",
    domains="domains",
    chunk="visits",
    doc="chunks",
    compare="moved",
)  # for --csv
ROWS |= dict(tokens="tokens", query="chunks")

# --- the command line -> arguments ----------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; type: {self.prog} --help")


def count(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def parse(doc, functions, argv=None):
    """-> (the function named, "json" or "csv" or None, data_dir, {parameter: value}). doc: the script's, with an example a line."""
    name = doc[doc.index("python ") :].split()[1]
    looks = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = Parser(prog=f"python {name}", description=doc, **looks)
    subparsers = parser.add_subparsers(
        dest="command", required=True, metavar="command", title="commands"
    )
    for function in functions:
        command, about = function.__name__, inspect.getdoc(function)
        examples = "\n".join(line for line in doc.splitlines() if f"{name} {command} " in line)
        sub = subparsers.add_parser(
            command, help=about, description=about, epilog=examples, **looks
        )
        for key, p in inspect.signature(function).parameters.items():
            if p.default is False:
                sub.add_argument(f"--{key}", action="store_true", help=HELP[key])
            elif p.default is p.empty:
                kind, required = (
                    str if p.annotation is p.empty else p.annotation,
                    {"required": True} if p.kind is p.KEYWORD_ONLY else {},
                )
                sub.add_argument(
                    f"--{key}" if required else key, type=kind, help=HELP[key], **required
                )
            else:
                shown = HELP[key] + f" ({p.default})" * bool(p.default)
                sub.add_argument(
                    f"--{key}",
                    type=count if isinstance(p.default, int) else str,
                    default=p.default,
                    metavar=key.upper(),
                    help=shown,
                )
        sub.add_argument("--data_dir", default="", metavar="PATH", help=HELP["data_dir"])
        style = sub.add_mutually_exclusive_group()
        for kind in ("json", "csv")[: 1 + (command in ROWS)]:
            style.add_argument(
                f"--{kind}", dest="style", action="store_const", const=kind, help=HELP[kind]
            )
    options = vars(parser.parse_args(argv))
    function = {function.__name__: function for function in functions}[options.pop("command")]
    return function, options.pop("style"), options.pop("data_dir"), options


# --- what they return -> text ------------------------------------------------------


class Text(str):
    """A line of a text, whose tabs stay."""


class Coloured(list):
    """[(a piece of a text, a number from -1, hurt, to 1, helped)], printed in colours."""


def show(command, result, style):
    if style == "json":
        print(json.dumps(plain(result), indent=1, allow_nan=False))
    elif style == "csv":
        print(as_csv(result[ROWS[command]]), end="")
    else:
        say_lines(SHOWN[command](result))


def say_lines(lines):
    for line in lines:
        if isinstance(line, Coloured):
            sys.stdout.write_as_it_is("".join(coloured(*piece) for piece in line) + "\n")
        elif isinstance(line, Text):
            terminal.say_text(line)
        else:
            terminal.say(line)


def plain(x):
    """NaN, which JSON does not know, becomes None."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list):
        return [plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def as_csv(rows):
    """A column a key; of a dict's, `key:its key`; of documents their numbers."""
    file, flat = io.StringIO(), []
    for row in plain(rows):
        flat.append({})
        for key, x in row.items():
            cells = (
                {f"{key}:{inner}": value for inner, value in x.items()}
                if isinstance(x, dict)
                else {key: x}
            )
            flat[-1] |= {
                k: " ".join(str(doc["doc"]) for doc in v) if isinstance(v, list) else v
                for k, v in cells.items()
            }
    writer = csv.writer(file, lineterminator="\n")
    for cells in [list(flat[0]) if flat else [], *(row.values() for row in flat)]:
        writer.writerow([as_cell(cell) if isinstance(cell, str) else cell for cell in cells])
    return file.getvalue()


def as_cell(text):
    """A text that a spreadsheet takes for one, not for a formula."""
    return visible("'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text)


LEFT = ("target", "domain", "source", "token", "text")  # columns of words; all others are numbers


def table(head, rows):
    """head: names of columns; rows: lists of strings -> aligned lines. Words are cut to 28 cells, a last column of words to the line's end."""
    rows = [
        [
            visible(" ".join(cell.split()) if name == "text" else cell)
            for name, cell in zip(head, row)
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    widths = [min(w, 28) if name in LEFT else w for name, w in zip(head, widths)]
    if head[-1] in LEFT:
        widths[-1] = max(
            20, shutil.get_terminal_size((160, 0)).columns - sum(widths[:-1]) - 2 * len(head)
        )
    return [
        "  ".join(
            fit(cell, w, name not in LEFT) for name, w, cell in zip(head, widths, row)
        ).rstrip()
        for row in [head, *rows]
    ]


def micro(x, unit=1e6):
    return "-" if math.isnan(x) else f"{unit * x:+,.1f}"


def number(x):
    return "-" if math.isnan(x) else f"{x:,.4g}" if abs(x) < 1 else f"{x:,.3f}"


SIGN = "positive: it lowered the target's loss"


def show_summary(r):
    state = "finished" if r["finished"] else "not finished, or under way"
    yield f"{r['run']}: step {r['steps']:,} of {r['max_iters']:,} ({state}), rule {r['rule']}, {r['batch']} chunks a step"
    used = f"{r['chunks_used']:,} of {r['chunks']:,} chunks used, in {r['visits']:,} visits"
    yield (
        f"{used}; {r['early_steps']} early steps, whose values are rough"
        + f"; approximate: {r['approximate']}" * bool(r["approximate"])
    )
    yield f"Values of the chunks used, in 1e-6 {r['unit']} ({SIGN}); sum in {r['unit']}"
    yield ""
    head = ["target", "mean", "+-", "sd", "p5", "median", "p95", "< 0", "sum"]
    keys = ("mean", "standard_error", "sd", "p5", "median", "p95")
    yield from table(
        head,
        [
            [
                t["target"],
                *(micro(t[key]) for key in keys),
                f"{t['negative']:.0%}",
                f"{t['sum']:+.4f}",
            ]
            for t in r["targets"]
        ],
    )
    yield ""
    for t in r["targets"]:
        yield tables.accounted(t["target"], t["books"])
    for t in r["targets"]:
        if t["audit"]:
            yield tables.compared(t["target"], t["audit"])


def show_ranked(r):
    what = "smallest" if r["order"] == "bottom" else "largest"
    if r["approximate"]:
        yield f"Approximate: {r['approximate']}"
    yield f"{r['target']}: the chunks with the {what} values, in 1e-6 {r['unit']} ({SIGN})"
    yield ""
    head = ["rank", "chunk", "value", "visits", "first step", "loss", "documents", "domain", "text"]
    rows = []
    for c in r["chunks"]:
        docs = [str(doc["doc"]) for doc in c["documents"]]
        docs = ", ".join(docs[:1]) + f" +{len(docs) - 1}" * (len(docs) > 1)
        figures = [
            str(c["rank"]),
            str(c["chunk"]),
            micro(c["value"]),
            str(c["visits"]),
            str(c["first_step"]),
            number(c["loss"]),
        ]
        rows.append([*figures, docs, c["domain"], c["text"]])
    yield from table(head, rows)


def show_domains(r):
    yield f"Values per token, in 1e-9 {r['unit']} ({SIGN}), of the chunks used; sum in {r['unit']}"
    head = [
        "domain",
        "chunks",
        "tokens",
        "share",
        "mean",
        "+-",
        "p5",
        "median",
        "p95",
        "< 0",
        "sum",
        "share of sum",
    ]
    for target, rows in itertools.groupby(r["domains"], key=lambda row: row["target"]):
        yield ""
        yield f"{target}:"
        cells = []
        for d in sorted(rows, key=lambda row: -row["median"]):
            figures = [
                micro(d[key], 1e9) for key in ("mean", "standard_error", "p5", "median", "p95")
            ]
            used = [f"{d['chunks']:,}", f"{d['tokens']:,}", f"{d['share']:.1%}"]
            cells.append(
                [
                    d["domain"],
                    *used,
                    *figures,
                    f"{d['negative']:.0%}",
                    f"{d['sum']:+.4f}",
                    f"{d['share_of_sum']:.1%}",
                ]
            )
        yield from table(head, cells)


def show_text(text):
    yield from ("", "-" * 72, *map(Text, text.split("\n")), "-" * 72)


def show_chunk(r):
    names = list(r["value"])
    yield f"chunk {r['chunk']}, {r['domain']}"
    yield ""
    docs = [
        [str(d[key]) for key in ("doc", "begins", "n_tokens", "record", "source")]
        for d in r["documents"]
    ]
    yield from table(["document", "begins at token", "tokens", "record", "source"], docs)
    yield ""
    if not r["used"]:
        yield "never used: it has no value"
    else:
        yield f"Every visit, values in 1e-6 {r['unit']} ({SIGN})"
        head = [
            "step",
            "loss",
            *(terminal.shorten(visible(name), 28) for name in names),
            "gradient norm",
            "early",
        ]
        visits = [
            (
                [str(v["step"])],
                v["loss"],
                v["value"],
                [number(v["grad_norm"]), "early" * bool(v["early"])],
            )
            for v in r["visits"]
        ]
        rows = [
            [*step, number(loss), *(micro(value[name]) for name in names), *rest]
            for step, loss, value, rest in visits
        ]
        yield from table(
            head, [*rows, ["sum", "", *(micro(r["value"][name]) for name in names), "", ""]]
        )
    yield from show_text(r["text"])


def show_doc(r):
    names = list(r["value"])
    yield f"document {r['doc']}, {r['domain']}: record {r['record']} of {r['source']}, {r['n_tokens']:,} tokens"
    cut = "" if r["whole"] else "; its end fills no chunk and is not in the data"
    yield f"{r['chunks_used']} of its {len(r['chunks'])} chunks used{cut}. Values in 1e-6 {r['unit']} ({SIGN})"
    yield "Its own: the sum over its chunks of a chunk's value times the document's share of the chunk's tokens"
    yield ""
    head = [
        "chunk",
        "begins at token",
        "tokens",
        "share",
        *(terminal.shorten(visible(name), 28) for name in names),
    ]
    rows = [
        [
            str(c["chunk"]),
            str(c["begins"]),
            str(c["tokens"]),
            f"{c['share']:.1%}",
            *map(micro, c["value"].values()),
        ]
        for c in r["chunks"]
    ]
    yield from table(head, [*rows, ["its own", "", "", "", *map(micro, r["value"].values())]])
    yield from show_text(r["text"])


def show_export(r):
    yield f"{r['path']}: {r['rows']:,} rows of {', '.join(r['columns'])}"


def show_compare(r):
    a, b = r["runs"]
    yield f"a: {a}, b: {b}: {r['chunks']:,} chunks used by both. Values in 1e-6 {r['unit']} ({SIGN})"
    yield ""
    figures = [
        [
            t["target"],
            *(number(t[key]) for key in ("spearman", "pearson")),
            f"{t['equal_signs']:.1%}",
        ]
        for t in r["targets"]
    ]
    yield from table(["target", "Spearman", "Pearson", "equal signs"], figures)
    yield ""
    means = [
        [d["target"], d["domain"], f"{d['chunks']:,}", micro(d["mean_a"]), micro(d["mean_b"])]
        for d in r["domains"]
    ]
    yield from table(["target", "domain", "chunks", "mean in a", "mean in b"], means)
    yield ""
    head = [
        "chunk",
        "rank in a",
        "rank in b",
        "value in a",
        "value in b",
        "target",
        "domain",
        "text",
    ]
    rows = [
        [
            *(f"{m[key]:,.0f}" for key in ("rank_a", "rank_b")),
            *(micro(m[key]) for key in ("value_a", "value_b")),
        ]
        for m in r["moved"]
    ]
    yield "The chunks that moved most in rank"
    yield from table(
        head,
        [
            [str(m["chunk"]), *row, m["target"], m["domain"], m["text"]]
            for m, row in zip(r["moved"], rows)
        ],
    )


def show_curated(r):
    """Of curate.py: what keep.json holds."""
    cfg, out = r["config"], r["config"]["out"] or r["run"]
    which = (
        "at random, "
        if cfg["random"]
        else f"those with the {'largest' if cfg['invert'] else 'smallest'} {cfg['score']} for {cfg['target']}, "
    )
    which += ("by domain, " if cfg["per_domain"] else "") + f"a {cfg['by']} each"
    if not cfg["drop_fraction"]:
        which += (
            ": as many as are negative"
            + f" beyond {cfg['confidence']:g} standard errors" * bool(cfg["confidence"])
        )
    yield f"{r['run']}: {r['units_dropped']:,} of {r['units_scored']:,} dropped, {which}"
    yield f"{r['units_negative']:,} of them have a negative score; {r['chunks_unused']:,} of {r['chunks']:,} chunks were never used"
    yield f"kept: {r['chunks_kept']:,} chunks, {r['tokens_kept']:,} tokens, {r['chunks_kept'] / r['chunks']:.1%}; values are sums in nats ({SIGN})"
    yield ""
    rows = []
    for d in sorted(r["domains"], key=lambda d: d["kept"] / d["chunks"]):
        counts = [
            f"{d['chunks']:,}",
            f"{d['used']:,}",
            f"{d['kept']:,}",
            f"{d['kept'] / d['chunks']:.1%}",
        ]
        rows.append([d["domain"], *counts, f"{d['value']:+.4f}", f"{d['value_kept']:+.4f}"])
    yield from table(
        ["domain", "chunks", "used", "kept", "share kept", "value", "value kept"], rows
    )
    yield ""
    yield f"-> {out}/keep.npy, keep.json, dropped.npy" + f", {cfg['export']}" * bool(cfg["export"])
    keep = terminal.command(f"--keep={out}/keep.npy")
    yield f"next: python train.py <config file> {keep} --out_dir=out/curated"


def show_tokens(r):
    yield f"chunk {r['chunk']}, {r['domain']}: what each token did for {r['target']} at step {r['step']}, in 1e-6 {r['unit']} ({SIGN})"
    yield f"sum: {micro(r['sum'])}"
    yield ""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        yield from table(
            ["position", "value", "token"],
            [[str(t["position"]), micro(t["value"]), t["token"]] for t in r["tokens"]],
        )
        return
    known = [abs(t["value"]) for t in r["tokens"] if not math.isnan(t["value"])]
    most = (
        sorted(known)[int(0.98 * (len(known) - 1))] or 1.0
    )  # a single token far out would leave all others white
    yield Coloured((t["token"], t["value"] / most) for t in r["tokens"])
    yield Coloured(
        [
            (" hurt ", -1),
            (" nothing ", 0),
            (" helped ", 1),
            (f": the darkest are {micro(most)} and beyond", math.nan),
        ]
    )


def coloured(text, x):
    """On red (-1), white (0), blue (1); without a number, plain."""
    text = visible(text, "\n\t")
    if math.isnan(x):
        return text
    x = max(-1.0, min(1.0, x))
    red, green, blue = (
        round(255 + (end - 255) * abs(x)) for end in ((88, 146, 255) if x > 0 else (255, 105, 92))
    )
    lines = (
        f"\x1b[48;2;{red};{green};{blue};38;2;0;0;0m{line}\x1b[0m" if line else ""
        for line in text.split("\n")
    )
    return "\n".join(lines)  # no colour runs on to the margin


SHOWN = dict(
    summary=show_summary,
    top=show_ranked,
    bottom=show_ranked,
    query=show_ranked,
    domains=show_domains,
    chunk=show_chunk,
)
SHOWN |= dict(doc=show_doc, export=show_export, compare=show_compare, tokens=show_tokens)
