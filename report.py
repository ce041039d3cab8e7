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
from ledger import atomic
from show import payload
from values import Documents, open_run


@dataclass
class Config:
    run: str = ""  # the run's folder; needs no --run=
    tokens: int = 20  # chunks of which each token is coloured by its value; 0: none
    out: str = ""  # where the page goes; default <run>/report.html
    data_dir: str = ""  # where the run's data is now, if it moved


def report(cfg):
    """Writes the page, whole or not at all, and says where it is."""
    run = open_run(cfg.run, cfg.data_dir)
    if not 0 <= cfg.tokens <= payload.room(run):
        raise ValueError(f"--tokens={cfg.tokens}: a page has room for the tokens of {payload.room(run)} chunks: type --tokens={payload.room(run)}")
    content = payload.gather(run, Documents(run))
    if cfg.tokens:
        from revalue import tokens

        try:
            payload.add_tokens(content, run, *tokens(run, [row["chunk"] for row in content["chunks"][: cfg.tokens]]))
        except ValueError as e:
            print(f"the page is without coloured tokens: {e}")
    out = Path(cfg.out or Path(cfg.run, "report.html"))
    with atomic(out) as f:
        f.write(page(content))
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB; open it in a browser")


def page(content):
    """-> HTML, bytes: nothing may run or be loaded but the script and the style that stand in it."""
    parts = {name: (config.ROOT / "show" / f"report.{name}").read_text() for name in ("css", "js")}
    hashes = {f"{name}_hash": base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in parts.items()}
    template = jinja2.Template((config.ROOT / "show" / "report.html").read_text(), autoescape=True)
    return template.render(**parts, **hashes, data=payload.encode(content).decode()).encode()


if __name__ == "__main__":
    config.main(lambda: report(config.load(Config)))
