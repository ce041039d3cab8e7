"""One page that shows what the training data was worth: out/<run>/report.html. It opens from disk;
the run may still be going on.

python report.py out/demo
python report.py out/demo --against=out/control   # validation losses beside those of another run
python report.py out/demo --tokens=0              # no coloured tokens, which take a checkpoint
"""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

import jinja2

import config
from show import findings, hindsight
from show import page as payload
from show.documents import Documents
from show.losses import losses, side_by_side
from show.run import open_run
from system.errors import UserError
from system.files import atomic
from system.terminal import say

MOST_RUNS = 8  # whose losses a page has room for
# one script, in this order
SCRIPTS = ("report_basics.js", "report_charts.js", "report_chunks.js", "report.js")


@dataclass
class Config:
    run: str = ""  # the run's folder; needs no --run=
    against: str = ""  # other runs, with commas between, whose validation losses stand beside
    tokens: int = 20  # chunks of which each token is coloured by its value; 0: none
    out: str = ""  # where the page goes; default <run>/report.html
    data_dir: str = ""  # where the run's data is now, if it moved


def report(cfg):
    """Writes the page of a run."""
    run = open_run(cfg.run, cfg.data_dir)
    room = payload.room(run)
    if not 0 <= cfg.tokens <= room:
        what = f"--tokens={cfg.tokens}: a page has room for the tokens of {room} chunks"
        raise UserError(f"{what}: type --tokens={room}")
    out = place(cfg.out) if cfg.out else run.path / "report.html"
    beside, check = hindsight.read(run), None
    if beside is None:
        check = hindsight.check_beside(run)
    losses_shown = validation(run, cfg.against)
    content = payload.gather(run, Documents(run), losses_shown, beside, check)
    if cfg.tokens:
        colour_tokens(content, run, cfg.tokens)
    page = render(content)
    try:
        with atomic(out) as file:
            file.write(page)
    except OSError as e:  # it names the temporary file, which nobody typed
        raise OSError(e.errno, e.strerror, str(out)) from e
    say(f"{out}: {len(page) / 1e6:.2f} MB; open it in a browser")
    of = findings.short(run.names[0]) + findings.when(run.horizon)
    say(f"for {of}: {content['findings'][0]['found']}")
    say(f"next: {content['next']}")


def place(out):
    """--out as a path. Raises UserError where no file can be written there."""
    path = Path(out)
    if path.is_dir():
        raise UserError(f"--out={out} is a folder: name a file in it, as --out={path}/report.html")
    if not path.parent.is_dir():
        what = f"--out={out}: there is no folder {path.parent}"
        raise UserError(f"{what}: make it first, or name a file in another")
    return path


def validation(run, against):
    """The validation losses to show: [show.losses.Losses], the run's own first. Without other runs
    none need be there."""
    others = [path for path in against.split(",") if path]
    if len(others) >= MOST_RUNS:
        what = f"--against names {len(others)} runs"
        raise UserError(f"{what}: a page has room for {MOST_RUNS - 1}, name fewer")
    if others:
        return side_by_side([run.path, *others])
    if not (run.path / "evaluations.jsonl").is_file():
        return []
    try:
        return [losses(run.path)]
    except UserError as e:
        say(f"the page is without validation losses: {e}")
        return []


def colour_tokens(content, run, n):
    """Adds the values of the tokens of the first n chunks, where a checkpoint is there."""
    import revalue

    chunks = [row["chunk"] for row in content["chunks"][:n]]
    try:
        step, values = revalue.tokens(run, chunks)
    except UserError as e:
        say(f"the page is without coloured tokens: {e}")
        return
    payload.add_tokens(content, run, step, values)


def render(content):
    """The page with its content, bytes. Its policy allows its own style and script alone, by their
    hashes."""
    template = read("report.html")
    parts = {"css": read("report.css"), "js": "\n".join(map(read, SCRIPTS))}
    values = {"data": payload.encode(content).decode()}
    for kind, text in parts.items():
        digest = hashlib.sha256(text.encode()).digest()
        values[kind] = text
        values[f"{kind}_hash"] = base64.b64encode(digest).decode()
    return jinja2.Template(template, autoescape=True).render(values).encode()


def read(name):
    """A file of the page, as text."""
    return Path(config.ROOT, "show", name).read_text(encoding="utf-8")


if __name__ == "__main__":
    config.main(lambda: report(config.load(Config)))
