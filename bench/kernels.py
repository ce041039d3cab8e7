"""
The contraction under a Linear's backward, and the head with its cross-entropy, form by form: first
whether it is right, then how long it takes.

    python bench/kernels.py                                   on a CPU: a small GPT's layers, many
                                                              chunk lengths
    python bench/kernels.py --device=cuda --dtype=bfloat16    on a GPU: GPT-2 small's four Linear
                                                              shapes and its head

Right: the weight gradient and each chunk's <gradient, direction> against float64. A form's relative
error may be at most MARGIN times that of the plain product (values: of each chunk's gradient by its
own plain product, times the direction) in the same dtype. For more than 16 chunks it may be
sqrt(B / 16) times more, for a value is the difference of two sums of up to B chunks.
bf16 h: what rounding the direction to bfloat16 would add to the values' error, relative.
Time: the fastest of the rounds, over the plain weight gradient alone (one matmul), or over F.linear
and F.cross_entropy, forward and backward, without values. Prints tables and last one JSON line.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

import config
from bench.common import machine_name, print_json, timed
from shapley import contract, ghost, head
from system.errors import UserError

GPU = torch.cuda.is_available()
MARGIN = 4.0
HEADS = ("whole", "chunked")
FORMS = ("running", "matmul", "fused") if GPU else ("running", "matmul")
CPU_LAYERS = "96x384,384x1152,384x1536,1536x384,96x50304"
GPU_LAYERS = "768x2304,768x768,768x3072,3072x768,768x50304"
CPU_CHUNKS = "8x32,8x64,8x128,8x256,2x512"
GPU_CHUNKS = "16x1024"
CPU_HEADS = "384x256,384x50304"
GPU_HEADS = "768x50304"


@dataclass
class Config:
    # comma-separated, in x out features; default: a small GPT's on a CPU, GPT-2 small's on a GPU
    layers: str = ""
    # comma-separated, chunks x tokens of a micro-batch; default 8x32,8x64,8x128,8x256,2x512 on a
    # CPU, 16x1024 on a GPU
    chunks: str = ""
    # comma-separated, in x words; default: 384x256,384x50304 on a CPU, 768x50304 on a GPU
    heads: str = ""
    K: int = 1  # targets
    rounds: int = 9
    device: str = "cuda" if GPU else "cpu"
    # of activations and their gradients
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if GPU else "float32"

    def __post_init__(self):
        config.check(self, at_least={"K": 1, "rounds": 1})


def sizes(text):
    """Pairs of numbers, as in "384x1536,96x384". Raises UserError where it is something else."""
    pairs = []
    for word in text.split(","):
        try:
            a, b = map(int, word.split("x"))
        except ValueError:
            raise UserError(f"{text!r}: write pairs of numbers, as 384x1536,96x384") from None
        pairs.append((a, b))
    return pairs


def relative_error(x, truth):
    return float((x.double() - truth).norm() / truth.norm())


def fastest(work, rounds, device):
    """Seconds a call of each of the functions in work, {name: function}, in turn."""
    seconds = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, function in work.items():
            seconds[name].append(time_once(function, device))
    return {name: min(times[1:]) for name, times in seconds.items()}  # the first round warms up


def time_once(function, device):
    def call():
        function()
        if "cuda" in device:
            torch.cuda.synchronize()

    if "cuda" in device:
        torch.cuda.synchronize()
    seconds, _ = timed(call)
    return seconds


# --- layers -----------------------------------------------------------------------


def plain_product(gy, x):
    """The weight gradient alone: gy (B, T, O), x (B, T, I) -> (O, I)."""
    return gy.flatten(0, 1).t() @ x.flatten(0, 1)


def check(gy, x, h):
    """The worst form's error over the plain product's, of the weight gradient and of the values."""
    chunk_grads = torch.stack([g.double().t() @ c.double() for g, c in zip(gy, x)])
    truth = chunk_grads.sum(0)
    values = chunk_grads.flatten(1) @ h.double().flatten(1).t()
    plain_grads = torch.stack([(g.t() @ c).to(h.dtype) for g, c in zip(gy, x)])
    plain_values = plain_grads.flatten(1) @ h.flatten(1).t()
    plain_error = relative_error(plain_product(gy, x), truth)
    plain_value_error = relative_error(plain_values, values)
    worst = 0.0
    for form in FORMS:
        gw, v = contract.weight_grad(gy, x, h, form)
        ratio = max(
            relative_error(gw, truth) / plain_error,
            relative_error(v, values) / plain_value_error,
        )
        shapes = f"{tuple(gy.shape)} {tuple(x.shape)}"
        assert ratio < MARGIN * max(1.0, len(x) / 16) ** 0.5, (
            f"{form}: {ratio:.2f} times the plain product's error at {shapes}"
        )
        worst = max(worst, ratio)
    return worst


def measure_layer(cfg, inputs, outputs, B, T):
    """A row of the first table."""
    torch.manual_seed(0)
    dtype = getattr(torch, cfg.dtype)
    gy = torch.randn(B, T, outputs, device=cfg.device, dtype=dtype)
    x = torch.randn(B, T, inputs, device=cfg.device, dtype=dtype)
    h = torch.randn(cfg.K, outputs, inputs, device=cfg.device)
    small = min(outputs, 4096)  # the truth keeps every chunk's gradient
    worst = check(gy[..., :small], x, h[:, :small].contiguous())
    work = {"plain": partial(plain_product, gy, x)}
    for form in FORMS:
        work[form] = partial(contract.weight_grad, gy, x, h, form)
    seconds = fastest(work, cfg.rounds, cfg.device)
    _, values = contract.weight_grad(gy, x, h, "matmul")
    _, rounded = contract.weight_grad(gy, x, h.bfloat16().float(), "matmul")
    row = {
        "layer": f"{inputs}x{outputs}",
        "B": B,
        "T": T,
        "plain_ms": 1e3 * seconds["plain"],
        "error": worst,
        "bf16_h": relative_error(rounded, values.double()),
    }
    for form in FORMS:
        row[form] = seconds[form] / seconds["plain"]
    return row


def measure_layers(cfg):
    head = f"{'in x out':14}{'B x T':>10}{'plain ms':>10}{'TFLOP/s':>9}{'error':>8}{'bf16 h':>10}"
    print(head + "".join(f"{form:>10}" for form in FORMS))
    gpu = "cuda" in cfg.device
    rows = []
    for inputs, outputs in sizes(cfg.layers or (GPU_LAYERS if gpu else CPU_LAYERS)):
        for B, T in sizes(cfg.chunks or (GPU_CHUNKS if gpu else CPU_CHUNKS)):
            row = measure_layer(cfg, inputs, outputs, B, T)
            rows.append(row)
            rate = 2 * B * T * inputs * outputs / (row["plain_ms"] / 1e3) / 1e12
            line = f"{row['layer']:14}{f'{B} x {T}':>10}{row['plain_ms']:10.2f}{rate:9.2f}"
            line += f"{row['error']:8.2f}{row['bf16_h']:10.1e}"
            print(line + "".join(f"{row[form]:10.2f}" for form in FORMS), flush=True)
    return rows


# --- heads ------------------------------------------------------------------------


def plain_head(x, w, y, ledger):
    """The gradients of x and w, without values."""
    loss = F.cross_entropy(F.linear(x, w.to(x.dtype)).flatten(0, 1).float(), y.flatten())
    return torch.autograd.grad(loss, (x, w))


def whole_head(x, w, y, ledger):
    logits = ghost.linear(x, w, None, ledger).flatten(0, 1).float()
    return torch.autograd.grad(F.cross_entropy(logits, y.flatten()), (x, w, ledger))


def chunked_head(x, w, y, ledger):
    loss = head.loss(x, w, y, ledger)[0]
    return torch.autograd.grad(loss, (x, w, ledger))


def measure_head(cfg, inputs, outputs, B, T):
    """A row of the second table: the loss and its whole backward."""
    torch.manual_seed(0)
    dtype = getattr(torch, cfg.dtype)
    x = torch.randn(B, T, inputs, device=cfg.device).to(dtype).requires_grad_()
    w = torch.randn(outputs, inputs, device=cfg.device).mul(0.02).requires_grad_()
    w.h = torch.randn(cfg.K, outputs, inputs, device=cfg.device)
    y = torch.randint(outputs, (B, T), device=cfg.device)
    ledger = torch.zeros(B, cfg.K, device=cfg.device, requires_grad=True)
    pairs = zip(chunked_head(x, w, y, ledger), whole_head(x, w, y, ledger))
    apart = max(relative_error(a, b.double()) for a, b in pairs)
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-4
    assert apart < limit, f"the two heads differ by {apart:.1e}"
    work = {
        "plain": partial(plain_head, x, w, y, ledger),
        "whole": partial(whole_head, x, w, y, ledger),
        "chunked": partial(chunked_head, x, w, y, ledger),
    }
    seconds = fastest(work, cfg.rounds, cfg.device)
    row = {
        "head": f"{inputs}x{outputs}",
        "B": B,
        "T": T,
        "plain_ms": 1e3 * seconds["plain"],
        "error": apart,
    }
    for form in HEADS:
        row[form] = seconds[form] / seconds["plain"]
    return row


def measure_heads(cfg):
    head = f"\n{'in x words':14}{'B x T':>10}{'plain ms':>10}{'error':>18}"
    print(head + "".join(f"{form:>10}" for form in HEADS))
    gpu = "cuda" in cfg.device
    B, T = (16, 1024) if gpu else (8, 256)
    rows = []
    for inputs, outputs in sizes(cfg.heads or (GPU_HEADS if gpu else CPU_HEADS)):
        row = measure_head(cfg, inputs, outputs, B, T)
        rows.append(row)
        line = f"{row['head']:14}{f'{B} x {T}':>10}{row['plain_ms']:10.2f}{row['error']:18.1e}"
        print(line + "".join(f"{row[form]:10.2f}" for form in HEADS), flush=True)
    return rows


def main(cfg):
    rows = measure_layers(cfg)
    rows += measure_heads(cfg)
    print_json(cfg, rows, machine=machine_name(cfg.device), torch=torch.__version__)


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
