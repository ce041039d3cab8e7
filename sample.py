"""
Write text with a trained model.

    python sample.py --out_dir=out/demo --start="def main("
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import config
from data import tokenizer
from model import GPT, GPTConfig


@dataclass
class Config:
    out_dir: str = ""  # the run's folder; default out/run
    start: str = "\n"  # the text to go on from
    num_samples: int = 3
    max_new_tokens: int = 200  # of each sample
    temperature: float = 0.8  # below 1: less random
    top_k: int = 200  # keep only the most likely tokens; 0: all
    seed: int = 1337
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"--temperature={self.temperature}: it must be above 0")


def sample(cfg):
    path = Path(cfg.out_dir, "ckpt.pt")
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}: name a run's folder with --out_dir=...")
    checkpoint = torch.load(path, map_location=cfg.device, weights_only=True)
    model = GPT(GPTConfig(**checkpoint["model_args"])).to(cfg.device)
    model.load_state_dict(checkpoint["model"])
    model.eval()
    tok = tokenizer(checkpoint["tokenizer"])
    torch.manual_seed(cfg.seed)
    prompt = torch.tensor([tok.eot, *tok.encode(cfg.start).tolist()], device=cfg.device)
    with torch.amp.autocast("cuda", torch.bfloat16, enabled="cuda" in cfg.device):
        out = model.generate(prompt.expand(cfg.num_samples, -1), cfg.max_new_tokens, cfg.temperature, cfg.top_k or None)
    for tokens in out.tolist():
        known = [t for t in tokens[1:] if t < tok.n_vocab]  # the vocabulary is padded to a multiple of 64
        print(tok.decode(known), "\n" + "-" * 80)


if __name__ == "__main__":
    config.main(lambda: sample(config.load(Config)))
