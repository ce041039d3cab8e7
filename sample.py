"""
Write text with a trained model.

    python sample.py out/demo --start="def main("
    python sample.py hf:models/pythia-70m          published weights: their folder
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import config
from data import tokenizer_of_run
from model import GPT, GPTConfig
from pile.tokenizers import tokenizer_beside
from system import pretrained
from system.checkpoints import fitting, read_checkpoint
from system.errors import UserError
from system.machine import check_device
from system.terminal import say, say_text


@dataclass
class Config:
    run: str = ""  # the run's folder; needs no --run=
    start: str = "\n"  # the text to go on from
    num_samples: int = 3
    max_new_tokens: int = 200  # of each sample
    temperature: float = 0.8  # below 1: less random
    top_k: int = 200  # keep only the most likely tokens; 0: all
    seed: int = 1337
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self):
        at_least = {
            "num_samples": 1,
            "max_new_tokens": 0,
            "top_k": 0,
            "seed": 0,
            "temperature": 1e-4,  # --top_k=1 takes the most likely token
        }
        config.check(self, at_least)
        check_device(self.device)


def sample(cfg):
    """Prints texts that the model of a run writes."""
    if cfg.run.startswith(pretrained.PREFIX) or cfg.run in pretrained.HUB:
        model, tok = published(cfg.run)
    else:
        model, tok = of_run(cfg.run)
    model.to(cfg.device).eval()
    torch.manual_seed(cfg.seed)
    prompt = torch.tensor([tok.eot, *tok.encode(cfg.start).tolist()], device=cfg.device)
    prompts = prompt.expand(cfg.num_samples, -1)
    with torch.amp.autocast("cuda", torch.bfloat16, enabled="cuda" in cfg.device):
        out = model.generate(prompts, cfg.max_new_tokens, cfg.temperature, cfg.top_k or None)
    for tokens in out.tolist():
        known = [t for t in tokens[1:] if t < tok.n_vocab]  # the vocabulary is padded up
        say_text(tok.decode(known))
        say("-" * 80)


def of_run(run):
    """-> the model of a run's newest checkpoint, and its tokenizer."""
    path = Path(run, "ckpt.pt")
    if not path.is_file():
        what = f"no checkpoint {path}" if run else "no run given"
        raise UserError(f"{what}: name a run's folder first, as python sample.py out/demo")
    checkpoint = read_checkpoint(path)
    with fitting(path):
        model = GPT.from_checkpoint(checkpoint)
    return model, tokenizer_of_run(run, checkpoint)


def published(name):
    """-> the model of published weights, and the tokenizer beside them."""
    found = pretrained.read(pretrained.locate(name))
    model = GPT(GPTConfig(**found.model_args))
    pretrained.put_weights(model, found)
    return model, tokenizer_beside(found.folder)


if __name__ == "__main__":
    config.main(lambda: sample(config.load(Config)))
