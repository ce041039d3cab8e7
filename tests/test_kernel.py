"""The fused kernel against float64: on a GPU natively, elsewhere in Triton's interpreter (conftest.py switches it on); and what becomes of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shapley import contract, kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def problem(B, T, O, I, K, dtype):
    torch.manual_seed(B * T + O)
    gy, x = (
        torch.randn(B, T, O, device=DEVICE).to(dtype),
        torch.randn(B, T, I, device=DEVICE).to(dtype),
    )
    h = torch.randn(K, O, I, device=DEVICE)
    truth = torch.einsum("bto,bti->boi", gy.double(), x.double())
    return gy, x, h, truth.sum(0), torch.einsum("boi,koi->bk", truth, h.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "B, T, O, I, K",
    [
        (1, 1, 1, 1, 1),
        (1, 5, 3, 7, 2),
        (3, 70, 130, 257, 1),
        (16, 9, 64, 48, 3),
        (2, 65, 1100, 33, 1),
    ],
)
def test_the_kernel_is_right_for_any_shape(B, T, O, I, K, dtype):
    """Products of the dtype given, sums in float32; twice the same bits. More rows of tiles than a group, tokens that fill no step."""
    gy, x, h, gradient, values = problem(B, T, O, I, K, dtype)
    gw, v = contract.weight_grad(gy, x, h, "fused")
    assert gw.dtype == v.dtype == torch.float32
    assert relative(gw, gradient) < 1e-6
    assert relative(v, values) < 1e-5
    again = contract.weight_grad(gy, x, h, "fused")
    assert torch.equal(gw, again[0])
    assert torch.equal(v, again[1])


@pytest.mark.parametrize("tiling", kernel.TILINGS)
@pytest.mark.parametrize("splits", [1, 3])
def test_every_tiling_is_right(tiling, splits):
    """Rows of whole 16 bytes, as the copy engine wants; edges inside tiles; chunks that end within a range, and ranges within a chunk."""
    gy, x, h, gradient, values = problem(2, 70, 136, 264, 2, torch.bfloat16)
    assert DEVICE == "cuda" or tiling in kernel.tilings(gy, x, h)
    gw, v = kernel.fused(gy, x, h, tiling, splits)
    assert relative(gw, gradient) < 1e-6
    assert relative(v, values) < 1e-5


@pytest.mark.parametrize("splits", [2, 5, 8])
@pytest.mark.parametrize("B, T", [(1, 1), (5, 40), (3, 130)])
def test_any_range_of_tokens_is_a_blocks(B, T, splits):
    """More ranges than steps (some are empty), as many as chunks, several within a chunk: each chunk's value is the sum of its parts."""
    gy, x, h, gradient, values = problem(B, T, 24, 40, 1, torch.float32)
    for tiling in (kernel.TILINGS[0], kernel.TILINGS[-1]):
        gw, v = kernel.fused(gy, x, h, tiling, splits)
        assert relative(gw, gradient) < 1e-6
        assert relative(v, values) < 1e-5


def test_rows_that_the_copy_engine_cannot_take():
    """Whose length or place is no multiple of 16 bytes, or that do not follow each other: tilings without it, or copied first."""
    even, odd = problem(2, 9, 24, 40, 1, torch.bfloat16), problem(2, 9, 24, 39, 1, torch.bfloat16)
    assert kernel.tilings(*even[:3]) == list(kernel.TILINGS)
    x = (
        torch.cat([torch.zeros(1, device=DEVICE), even[1].flatten().float()])
        .bfloat16()[1:]
        .view(2, 9, 40)
    )  # begins 2 bytes later
    for operands in (
        odd[:3],
        (even[0], x, even[2]),
        (even[0], even[1].mT.contiguous().mT, even[2]),
    ):
        found = kernel.tilings(*operands)
        assert found
        assert not any(tiling.tma for tiling in found)
    for operands in (
        odd,
        (even[0], x, *even[2:]),
        (even[0], even[1].mT.contiguous().mT, *even[2:]),
    ):
        gw, v = kernel.fused(*operands[:3], kernel.TILINGS[0])  # chosen for others of this shape
        assert relative(gw, operands[3]) < 1e-6
        assert relative(v, operands[4]) < 1e-5


def test_small_weights_are_split_over_tokens_until_a_gpu_is_busy():
    """GPT-2 small's layers in tiles of 128, 16 chunks of 1,024 tokens, 132 processors: of which over four fifths work at any time, a quarter to
    half without splits. Not its head, which fills them as it is, and not where adding up would cost more than the products of few tokens."""
    for tiles in (36, 144):
        busy = {
            n: tiles * n / (132 * -(-tiles * n // 132))
            for n in (1, kernel.best_splits(tiles, 16384, 132))
        }
        assert min(busy.values()) == busy[1] < 0.6
        assert max(busy.values()) > 0.8
    assert kernel.best_splits(2358, 16384, 132) == kernel.best_splits(36, 256, 132) == 1


@pytest.mark.parametrize("arch, products", [("90", "HGMMA."), ("80", "HMMA.")])
def test_compiled_for_a_gpu_nothing_is_spilled(arch, products):
    """By NVIDIA's own assembler, in bfloat16, one target: no register goes to memory, tensor cores multiply, every tiling fits a multiprocessor.
    In a process of its own, without the interpreter."""
    script = Path(__file__).resolve().parents[1] / "bench" / "assemble.py"
    printed = subprocess.run(
        [sys.executable, script, f"--arch={arch}"], capture_output=True, text=True, check=True
    ).stdout
    rows = json.loads(printed.splitlines()[-1])["rows"]
    assert len(rows) == sum(arch == "90" or not tiling.tma for tiling in kernel.TILINGS)
    for row in rows:
        assert (
            row["stack"] == 0
            and row["blocks"] >= 1
            and row["products"]
            and all(name.startswith(products) for name in row["products"])
        ), row
    assert (
        arch == "80" or rows[0]["blocks"] == 2
    )  # while one meets the directions, the other multiplies


def test_auto_takes_the_running_form_but_for_tiny_chunks():
    cpu = [torch.device("cpu")]
    forms = {
        T: contract.choose(*(t.to(*cpu) for t in problem(2, T, 384, 384, 1, torch.float32)[:3]))[0]
        for T in (4, 16, 17, 64)
    }
    assert forms == {4: "matmul", 16: "matmul", 17: "running", 64: "running"}


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_on_a_gpu_auto_takes_what_it_timed_and_is_right():
    gy, x, h, gradient, values = problem(4, 256, 768, 768, 1, torch.bfloat16)
    gw, v = contract.weight_grad(gy, x, h, "auto")
    assert relative(gw, gradient) < 1e-2
    assert relative(v, values) < 2e-2
    assert any(key[0] == gy.shape for key in contract.CHOSEN)


def test_what_cannot_run_says_so(monkeypatch):
    gy, x, h, _, _ = problem(1, 5, 3, 7, 1, torch.float32)
    with pytest.raises(ValueError, match="needs triton, a GPU and float32 weights"):
        contract.weight_grad(gy.double(), x.double(), h.double(), "fused")
    monkeypatch.setattr(kernel, "triton", None)
    with pytest.raises(ValueError, match="needs triton"):
        contract.weight_grad(gy, x, h, "fused")
