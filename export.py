"""
A run's model as a folder that transformers loads: config.json and model.safetensors.

    python export.py out/demo --out=out/demo-hf
    python sample.py hf:out/demo-hf                       it is read like published weights
    python train.py --init_from=hf:out/demo-hf ...        and trained on

A model with learned positions becomes a GPT2LMHeadModel, one with rotary positions a
GPTNeoXForCausalLM. The tokenizer goes with it, for transformers.AutoTokenizer, but for bytes, which
transformers has no tokenizer.json of. nanoshapley.json says which run, step and tokenizer the model
is of. Nothing is said of values there.
"""

from dataclasses import dataclass
from pathlib import Path

import config
from data import tokenizer_of_run
from pile.tokenizers import ABOUT, FILE
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
    tok = tokenizer_of_run(cfg.run, checkpoint)
    args, weights = checkpoint["model_args"], checkpoint["model"]
    with fitting(path):
        pretrained.write(folder, args, weights, tok.eot)
    pretrained.write_settings(folder / ABOUT, about)
    if tok.save(folder / FILE):
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tok.decode([tok.eot]),
            "model_max_length": args["block_size"],
        }
        pretrained.write_settings(folder / "tokenizer_config.json", settings)
    else:  # what --overwrite left there is of another model
        for name in (FILE, "tokenizer_config.json"):
            (folder / name).unlink(missing_ok=True)
    say(f"written to {folder}: the model after step {checkpoint['iter_num']:,}")
    say("next: transformers.AutoModelForCausalLM.from_pretrained on that folder, or")
    say(f"      python sample.py {pretrained.PREFIX}{folder}")
    return folder


if __name__ == "__main__":
    config.main(lambda: export(config.load(Config)))
