"""
The contraction under a Linear's backward, and the head with its cross-entropy, form by form: first whether it is right, then how
long it takes.

    python bench/kernels.py                                   on a CPU: a small GPT's layers, many chunk lengths
    python bench/kernels.py --device=cuda --dtype=bfloat16    on a GPU: GPT-2 small's four Linear shapes and its head

Right: the weight gradient and each chunk's <gradient, direction> against float64; a form's relative error may be at most MARGIN
times that of the plain product (values: of each chunk's gradient by its own plain product, times the direction) in the same dtype;
for more than 16 chunks times sqrt(B / 16), for a value is the difference of two sums of up to B chunks. bf16 h: what rounding the
direction to bfloat16 would add to the values' error, relative.
Time: the fastest of the rounds, over the plain weight gradient alone (one matmul), or over F.linear and F.cross_entropy, forward and
backward, without values. Prints tables and last one JSON line.
"""

import itertools
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as train.py does

import torch

import config
from shapley import ghost, head
from system.errors import UserError

MARGIN = 4.0
HEADS = ("whole", "chunked")
FORMS = ("running", "matmul", *(("fused",) if torch.cuda.is_available() else ()))
CPU_LAYERS = "96x384,384x1152,384x1536,1536x384,96x50304"
GPU_LAYERS = "768x2304,768x768,768x3072,3072x768,768x50304"


@dataclass
class Config:
    layers: str = ""  # comma-separated, in x out features; default: a small GPT's on a CPU, GPT-2 small's on a GPU
    chunks: str = ""  # comma-separated, chunks x tokens of a micro-batch; default 8x32,8x64,8x128,8x256,2x512 on a CPU, 16x1024 on a GPU
    heads: str = (
        ""  # comma-separated, in x words; default: 384x256,384x50304 on a CPU, 768x50304 on a GPU
    )
    K: int = 1  # targets
    rounds: int = 9
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "bfloat16"] = (
        "bfloat16" if torch.cuda.is_available() else "float32"
    )  # of activations and their gradients

    def __post_init__(self):
        config.check(self, at_least={"K": 1, "rounds": 1})


def sizes(text):
    try:
        return [tuple(map(int, pair.split("x"))) for pair in text.split(",")]
    except ValueError:
        raise UserError(f"{text!r}: write pairs of numbers, as 384x1536,96x384") from None


def error(x, truth):
    return float((x.double() - truth).norm() / truth.norm())


def plain(gy, x):
    return gy.flatten(0, 1).t() @ x.flatten(0, 1)


def check(gy, x, h):
    """The worst form's error over the plain product's, of the weight gradient and of the values."""
    truth = torch.stack([g.double().t() @ c.double() for g, c in zip(gy, x)])
    values = truth.flatten(1) @ h.double().flatten(1).t()
    each = (
        torch.stack([(g.t() @ c).to(h.dtype) for g, c in zip(gy, x)]).flatten(1) @ h.flatten(1).t()
    )
    worst = 0.0
    for form in FORMS:
        gw, v = ghost.weight_grad(gy, x, h, form)
        ratio = max(
            error(gw, truth.sum(0)) / error(plain(gy, x), truth.sum(0)),
            error(v, values) / error(each, values),
        )
        assert ratio < MARGIN * max(1.0, len(x) / 16) ** 0.5, (
            f"{form}: {ratio:.2f} times the plain product's error at {tuple(gy.shape)} {tuple(x.shape)}"
        )
        worst = max(worst, ratio)
    return worst


def fastest(work, rounds, device):
    """Seconds a call of each of the functions in work, {name: function}, in turn."""
    best = {}
    for _ in range(rounds + 1):  # the first round warms up
        for name, function in work.items():
            if "cuda" in device:
                torch.cuda.synchronize()
            began = time.perf_counter()
            function()
            if "cuda" in device:
                torch.cuda.synchronize()
            best.setdefault(name, []).append(time.perf_counter() - began)
    return {name: min(times[1:]) for name, times in best.items()}


def heads(cfg, words, chunks):
    """Rows of the second table: the loss and its whole backward."""
    import torch.nn.functional as F

    rows = []
    print(
        f"\n{'in x words':14}{'B x T':>10}{'plain ms':>10}{'error':>18}"
        + "".join(f"{form:>10}" for form in HEADS)
    )
    for (inputs, outputs), (B, T) in itertools.product(words, chunks):
        torch.manual_seed(0)
        x, w = (
            torch.randn(B, T, inputs, device=cfg.device),
            torch.randn(outputs, inputs, device=cfg.device) * 0.02,
        )
        x, w = (t.requires_grad_() for t in (x.to(getattr(torch, cfg.dtype)), w))
        w.h, y = (
            torch.randn(cfg.K, outputs, inputs, device=cfg.device),
            torch.randint(outputs, (B, T), device=cfg.device),
        )
        ledger = torch.zeros(B, cfg.K, device=cfg.device, requires_grad=True)

        def plain(x=x, w=w, y=y):
            loss = F.cross_entropy(F.linear(x, w.to(x.dtype)).flatten(0, 1).float(), y.flatten())
            return torch.autograd.grad(loss, (x, w))

        def whole(x=x, w=w, y=y, ledger=ledger):
            loss = F.cross_entropy(
                ghost.linear(x, w, None, ledger).flatten(0, 1).float(), y.flatten()
            )
            return torch.autograd.grad(loss, (x, w, ledger))

        def chunked(x=x, w=w, y=y, ledger=ledger):
            return torch.autograd.grad(head.loss(x, w, y, ledger)[0], (x, w, ledger))

        apart = max(error(a, b.double()) for a, b in zip(chunked(), whole()))
        assert apart < (2e-2 if x.dtype == torch.bfloat16 else 1e-4), (
            f"the two heads differ by {apart:.1e}"
        )
        seconds = fastest(dict(plain=plain, whole=whole, chunked=chunked), cfg.rounds, cfg.device)
        row = dict(
            head=f"{inputs}x{outputs}", B=B, T=T, plain_ms=1e3 * seconds["plain"], error=apart
        )
        rows.append(row | {form: seconds[form] / seconds["plain"] for form in HEADS})
        over = "".join(f"{rows[-1][form]:10.2f}" for form in HEADS)
        print(
            f"{row['head']:14}{f'{B} x {T}':>10}{row['plain_ms']:10.2f}{apart:18.1e}{over}",
            flush=True,
        )
    return rows


def main(cfg):
    gpu, rows = "cuda" in cfg.device, []
    layers = sizes(cfg.layers or (GPU_LAYERS if gpu else CPU_LAYERS))
    print(
        f"{'in x out':14}{'B x T':>10}{'plain ms':>10}{'TFLOP/s':>9}{'error':>8}{'bf16 h':>10}"
        + "".join(f"{form:>10}" for form in FORMS)
    )
    for inputs, outputs in layers:
        for B, T in sizes(cfg.chunks or ("16x1024" if gpu else "8x32,8x64,8x128,8x256,2x512")):
            torch.manual_seed(0)
            dtype = getattr(torch, cfg.dtype)
            gy, x = (
                torch.randn(B, T, n, device=cfg.device, dtype=dtype) for n in (outputs, inputs)
            )
            h = torch.randn(cfg.K, outputs, inputs, device=cfg.device)
            small = min(outputs, 4096)  # the truth keeps every chunk's gradient
            ratio = check(gy[..., :small], x, h[:, :small].contiguous())
            work = {"plain": lambda gy=gy, x=x: plain(gy, x)}
            work |= {
                form: lambda gy=gy, x=x, h=h, form=form: ghost.weight_grad(gy, x, h, form)
                for form in FORMS
            }
            seconds = fastest(work, cfg.rounds, cfg.device)
            values = ghost.weight_grad(gy, x, h, "matmul")[1].double()
            rounded = error(ghost.weight_grad(gy, x, h.bfloat16().float(), "matmul")[1], values)
            row = dict(
                layer=f"{inputs}x{outputs}",
                B=B,
                T=T,
                plain_ms=1e3 * seconds["plain"],
                error=ratio,
                bf16_h=rounded,
            )
            row |= {form: seconds[form] / seconds["plain"] for form in FORMS}
            rows.append(row)
            rate = 2 * B * T * inputs * outputs / seconds["plain"] / 1e12
            over = "".join(f"{row[form]:10.2f}" for form in FORMS)
            print(
                f"{row['layer']:14}{f'{B} x {T}':>10}{row['plain_ms']:10.2f}{rate:9.2f}{ratio:8.2f}{rounded:10.1e}{over}",
                flush=True,
            )
    rows += heads(
        cfg,
        sizes(cfg.heads or ("768x50304" if gpu else "384x256,384x50304")),
        [(16, 1024) if gpu else (8, 256)],
    )
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    device = (
        torch.cuda.get_device_name()
        if gpu
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    print(
        json.dumps(
            {
                "device": device,
                "torch": torch.__version__,
                "commit": commit,
                **vars(cfg),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    config.main(lambda: main(config.load(Config)))
