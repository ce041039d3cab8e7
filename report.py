"""One page that shows what the training data was worth: out/<run>/report.html. It opens from disk; the run may still be going on.

python report.py out/demo
python report.py out/demo --tokens=0     # without coloured tokens, which take a checkpoint and some seconds
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
    run = open_run(cfg.run, cfg.data_dir)
    if not 0 <= cfg.tokens <= payload.room(run):
        raise UserError(
            f"--tokens={cfg.tokens}: a page has room for the tokens of {payload.room(run)} chunks: type --tokens={payload.room(run)}"
        )
    content = payload.gather(run, Documents(run))
    if cfg.tokens:
        import revalue

        try:
            payload.add_tokens(
                content,
                run,
                *revalue.tokens(run, [row["chunk"] for row in content["chunks"][: cfg.tokens]]),
            )
        except UserError as e:
            say(f"the page is without coloured tokens: {e}")
    parts = {
        name: Path(config.ROOT, "show", f"report.{name}").read_text(encoding="utf-8")
        for name in ("html", "css", "js")
    }
    hashes = {
        f"{name}_hash": base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in parts.items()
    }
    page = (
        jinja2.Template(parts["html"], autoescape=True)
        .render(parts | hashes, data=payload.encode(content).decode())
        .encode()
    )
    with atomic(out := cfg.out or run.path / "report.html") as f:
        f.write(page)
    say(f"{out}: {len(page) / 1e6:.2f} MB; open it in a browser")


if __name__ == "__main__":
    config.main(lambda: report(config.load(Config)))
