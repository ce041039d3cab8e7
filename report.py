"""One page that shows what the training data was worth: out/<run>/report.html. It opens from disk;
the run may still be going on.

python report.py out/demo
python report.py out/demo --tokens=0     # without coloured tokens, which take a checkpoint
"""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

import jinja2

import config
from show import page as payload
from show.documents import Documents
from show.run import open_run
from system.errors import UserError
from system.files import atomic
from system.terminal import say


@dataclass
class Config:
    run: str = ""  # the run's folder; needs no --run=
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
    content = payload.gather(run, Documents(run))
    if cfg.tokens:
        colour_tokens(content, run, cfg.tokens)
    page = render(content)
    out = cfg.out or run.path / "report.html"
    with atomic(out) as file:
        file.write(page)
    say(f"{out}: {len(page) / 1e6:.2f} MB; open it in a browser")


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
    values = {"data": payload.encode(content).decode()}
    for kind in ("html", "css", "js"):
        text = Path(config.ROOT, "show", f"report.{kind}").read_text(encoding="utf-8")
        digest = hashlib.sha256(text.encode()).digest()
        values[kind] = text
        values[f"{kind}_hash"] = base64.b64encode(digest).decode()
    template = jinja2.Template(values["html"], autoescape=True)
    return template.render(values).encode()


if __name__ == "__main__":
    config.main(lambda: report(config.load(Config)))
