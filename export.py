"""
A run's model as a folder that transformers loads: config.json and model.safetensors.

    python export.py out/demo --out=out/demo-hf
    python sample.py hf:out/demo-hf                       it is read like published weights
    python train.py --init_from=hf:out/demo-hf ...        and trained on

A model with learned positions becomes a GPT2LMHeadModel, one with rotary positions a
GPTNeoXForCausalLM. nanoshapley.json beside it says which run, step and tokenizer it is of: the
tokenizer itself does not go with it. Nothing is said of values there.
"""

from dataclasses import dataclass
from pathlib import Path

import config
from system import pretrained
from system.checkpoints import fitting, read_checkpoint
from system.errors import UserError
from system.terminal import say


@dataclass
class Config:
    run: str = ""  # the run's folder; needs no --run=
    out: str = ""  # the new folder; empty: <run>/hf
    overwrite: bool = False  # replace what is there


def export(cfg):
    """Writes the model of a run's newest checkpoint. Returns its folder. Raises UserError where
    there is none, or something else where it would go."""
    path = Path(cfg.run, "ckpt.pt")
    if not path.is_file():
        what = f"no checkpoint {path}" if cfg.run else "no run given"
        raise UserError(f"{what}: name a run's folder first, as python export.py out/demo")
    folder = Path(cfg.out or Path(cfg.run, "hf"))
    if folder.exists() and any(folder.iterdir()) and not cfg.overwrite:
        raise UserError(f"{folder} is not empty: write --overwrite, or another --out")
    checkpoint = read_checkpoint(path)
    about = {
        "run": cfg.run,
        "step": checkpoint["iter_num"],
        "tokenizer": checkpoint["tokenizer"],
    }
    with fitting(path):
        pretrained.write(folder, checkpoint["model_args"], checkpoint["model"], about)
    say(f"written to {folder}: the model after step {checkpoint['iter_num']:,}")
    say("next: transformers.AutoModelForCausalLM.from_pretrained on that folder, or")
    say(f"      python sample.py {pretrained.PREFIX}{folder}")
    return folder


if __name__ == "__main__":
    config.main(lambda: export(config.load(Config)))
