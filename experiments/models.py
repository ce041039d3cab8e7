"""
Unmodified models of Hugging Face and PyTorch through shapley/wrap.py: are their values right?

    python experiments/models.py                 every model; writes docs/models.md
    python experiments/models.py --only=Llama    one; prints its line

For each model, tiny and with random weights: the values of a batch under random directions against
those of each example's own gradient, in float64; then some steps of AdamW, the last one with the
exact Shapley values beside those of `adamw2` and `adamw`. It needs requirements-hf.txt. Two cores:
some minutes.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import config
from shapley.wrap import Examples, Net, causal_lm_loss, token_loss
from valuation import Settings, Valuation


@dataclass
class Config:
    only: str = ""  # one model
    steps: int = 30  # of AdamW; the last one is audited
    learning_rate: float = 3e-4


@dataclass
class Made:
    model: nn.Module
    X: object
    Y: torch.Tensor
    loss: object


VOCAB, B, T = 31, 6, 9
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
OPT = {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}
T5 = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
VIT = {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 5}

# name: the class of transformers (None: one below), its configuration's class and numbers
MODELS = {
    "GPT-2, tied": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "GPT-2, untied": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "tie_word_embeddings": False}),
    "Pythia": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
    "Phi": ("PhiForCausalLM", "PhiConfig", SIZES),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 4}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 4}),
    "Mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 3, "experts_implementation": "eager"},
    ),
    "OPT": ("OPTForCausalLM", "OPTConfig", OPT),
    "BERT": ("BertForMaskedLM", "BertConfig", SIZES),
    "RoBERTa": ("RobertaForMaskedLM", "RobertaConfig", SIZES),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
    "ViT": ("ViTForImageClassification", "ViTConfig", VIT),
    "ResNet": (None, None, None),
    "TransformerEncoder": (None, None, None),
}
LORA = {  # name: the layers that get adapters
    "GPT-2, tied": ["c_attn", "c_proj"],
    "Llama": ["q_proj", "v_proj"],
    "Qwen3": ["q_proj", "k_proj", "up_proj"],
    "BERT": ["query", "value"],
}


class ResNet(nn.Module):
    """Two residual blocks with GroupNorm, one of them with grouped convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.plain = self.block(1)
        self.grouped = self.block(2)
        self.head = nn.Linear(8, 5)

    def block(self, groups):
        layers = []
        for _ in range(2):
            layers += [nn.GroupNorm(2, 8), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False)]
        return nn.Sequential(*layers)

    def forward(self, X):
        x = self.stem(X)
        x = x + self.plain(x.clone())
        x = x + self.grouped(x.clone())
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, X):
        return self.head(self.encoder(X).mean(1))


def build(name, lora=False, **options):
    """A tiny model in evaluation, with random weights, and a batch. options: more of its
    configuration."""
    torch.manual_seed(0)
    class_name, config_name, numbers = MODELS[name]
    if class_name:
        import transformers

        kind = getattr(transformers, class_name)
        model = kind(getattr(transformers, config_name)(**{**numbers, **options}))
    else:
        model = ResNet() if name == "ResNet" else Encoder()
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=LORA[name]))
    for p in model.parameters():
        if p.requires_grad:  # so that no weight, bias or adapter is 0
            p.data += torch.randn_like(p) / 10
    return Made(model.eval(), *batch_of(name))


def batch_of(name):
    classes = torch.arange(B) % 5
    if name in ("ViT", "ResNet"):
        return torch.randn(B, 3, 8, 8), classes, F.cross_entropy
    if name == "TransformerEncoder":
        return torch.randn(B, T, 16), classes, F.cross_entropy
    ids = torch.randint(3, VOCAB, (B, T))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0  # padding
    X = {"input_ids": ids, "attention_mask": mask}
    Y = ids.masked_fill(mask == 0, -100)
    Y[2, :3] = -100  # a prompt
    if name == "T5":
        X["decoder_input_ids"] = torch.randint(3, VOCAB, (B, 5))
        return X, torch.randint(3, VOCAB, (B, 5)), token_loss
    return X, Y, token_loss if name in ("BERT", "RoBERTa") else causal_lm_loss


def own_values(net, X, Y, params):
    """<x_i, h_k> (B, K) by autograd, an example at a time, in its batch."""
    values = []
    for i in range(len(Y)):
        only = torch.full_like(Y, -100)
        only[i] = Y[i]
        gradient = torch.autograd.grad(net(X, only)[1] / len(Y), params)
        of_targets = [(g * p.h).flatten(1).sum(1) for g, p in zip(gradient, params)]
        values.append(sum(of_targets))
    return torch.stack(values).detach()


def error(made):
    """Of the values by a ledger against own_values, in float64."""
    net = Net(made.model.double(), made.loss)
    params = [p for p in net.parameters() if p.requires_grad]
    for p in params:
        p.h = torch.randn(1, *p.shape, dtype=p.dtype)
    truth = own_values(net, made.X, made.Y, params)
    ledger = torch.zeros(B, 1, dtype=torch.float64, requires_grad=True)
    (values,) = torch.autograd.grad(net(made.X, made.Y, ledger)[1], ledger)
    general = {name for name, _, way in net.ways if way == "general"}
    return float((values - truth).norm() / truth.norm()), len(general), len(params)


def correlation(name, made, rule, cfg):
    """Pearson with the exact Shapley values of the last step. Each step has a batch of its own, and
    the target is another one."""
    net = Net(made.model.float(), made.loss)
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, cfg.learning_rate, betas=(0.9, 0.95))
    X, Y, _ = batch_of(name)
    X = torch.utils._pytree.tree_map(torch.Tensor.numpy, X)
    target = Examples("another batch", X, Y.numpy())
    settings = Settings(rule=rule, batch=B, target_batch=B, audit_interval=cfg.steps)

    def compute_loss(X, Y, ledger=None):
        return net(X, Y, ledger)[1]

    valuation = Valuation(net, optimizer, compute_loss, [target], settings)
    for step in range(cfg.steps):
        X, Y, _ = batch_of(name)
        valuation.begin_step(step, cfg.learning_rate, tokens=X)
        compute_loss(X, Y, valuation.new_ledger(np.arange(B), X, Y)).backward()
        valuation.before_update()
        optimizer.step()
        optimizer.zero_grad()
        valuation.end_step()
    return float(valuation.flush().audit["pearson"][0, 0])


def line(name, lora, cfg):
    """A model's line of the table."""
    distance, n_general, n_params = error(build(name, lora))
    ways = "fast" if not n_general else f"fast; {n_general} of {n_params} general"
    trained = "LoRA" if lora else "everything"
    figures = [correlation(name, build(name, lora), rule, cfg) for rule in ("adamw2", "adamw")]
    cells = [name, trained, ways, f"{distance:.0e}", *(f"{figure:.4f}" for figure in figures)]
    return f"| {' | '.join(cells)} |"


HEAD = """# Models that were tried

Unmodified models, tiny and with random weights, in evaluation mode. `python experiments/models.py`
writes this page.

- **values** come fast, in the step's one backward, or in part by the general way: a forward-mode
  pass for each target ([any model](any_model.md)).
- **error**: the values of a batch of {B} under a random direction against each example's own
  gradient by autograd, in float64, relative (L2). Gemma 2, Mixtral and T5 compute a part of their
  forward in float32.
- **`adamw2`, `adamw`**: Pearson correlation with the exact Shapley values of the last of {steps}
  steps of AdamW at {lr:g}, each on a batch of {B} of its own. Of so few the correlation is rough.

| model | trains | values | error | `adamw2` | `adamw` |
|---|---|---|---|---|---|
"""


def main(cfg):
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    rows = []
    for name in MODELS:
        for lora in (False, True) if name in LORA else (False,):
            if cfg.only in ("", name):
                rows.append(line(name, lora, cfg))
                print(rows[-1], flush=True)
    if not cfg.only:
        head = HEAD.format(B=B, steps=cfg.steps, lr=cfg.learning_rate)
        (ROOT / "docs" / "models.md").write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
