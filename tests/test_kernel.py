"""The fused kernel against float64, and when it is used.

On a GPU it runs natively, elsewhere in Triton's interpreter (conftest.py switches it on).
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from shapley import contract, kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ASSEMBLE = Path(__file__).resolve().parents[1] / "bench" / "assemble.py"


@dataclass
class Problem:
    """Operands of a contraction, and what it gives in float64."""

    gy: torch.Tensor  # (B, T, O)
    x: torch.Tensor  # (B, T, I)
    h: torch.Tensor  # (K, O, I)
    gradient: torch.Tensor  # (O, I)
    values: torch.Tensor  # (B, K)

    @property
    def operands(self):
        return self.gy, self.x, self.h

    def check(self, found, gradient_within=1e-6, values_within=1e-5):
        """found: (weight gradient, values), within these relative errors."""
        gw, v = found
        assert relative(gw, self.gradient) < gradient_within
        assert relative(v, self.values) < values_within


def problem(B, T, O, I, K, dtype):
    """Random operands; h is float32, the others have the dtype given."""
    torch.manual_seed(B * T + O)
    gy = torch.randn(B, T, O, device=DEVICE).to(dtype)
    x = torch.randn(B, T, I, device=DEVICE).to(dtype)
    h = torch.randn(K, O, I, device=DEVICE)
    chunk_grads = torch.einsum("bto,bti->boi", gy.double(), x.double())
    values = torch.einsum("boi,koi->bk", chunk_grads, h.double())
    return Problem(gy, x, h, chunk_grads.sum(0), values)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- the kernel ---------------------------------------------------------------------

SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 5, 3, 7, 2),
    (3, 70, 130, 257, 1),
    (16, 9, 64, 48, 3),  # tokens that fill no step
    (2, 65, 1100, 33, 1),  # more rows of tiles than a group
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, T, O, I, K", SHAPES)
def test_kernel_matches_float64_for_any_shape(B, T, O, I, K, dtype):
    """Products are of the dtype given, sums in float32."""
    p = problem(B, T, O, I, K, dtype)
    gw, v = contract.weight_grad(*p.operands, "fused")
    assert gw.dtype == torch.float32
    assert v.dtype == torch.float32
    p.check((gw, v))


@pytest.mark.parametrize("B, T, O, I, K", SHAPES[2:])
def test_kernel_gives_the_same_bits_when_it_runs_twice(B, T, O, I, K):
    p = problem(B, T, O, I, K, torch.bfloat16)
    gw, v = contract.weight_grad(*p.operands, "fused")
    gw_again, v_again = contract.weight_grad(*p.operands, "fused")
    assert torch.equal(gw, gw_again)
    assert torch.equal(v, v_again)


@pytest.mark.parametrize("tiling", kernel.TILINGS)
@pytest.mark.parametrize("splits", [1, 3])
def test_every_tiling_matches_float64(tiling, splits):
    """Rows are whole 16 bytes, as the copy engine wants. Edges lie inside tiles; chunks end within
    a range, and ranges within a chunk."""
    p = problem(2, 70, 136, 264, 2, torch.bfloat16)
    assert DEVICE == "cuda" or tiling in kernel.tilings(*p.operands)
    p.check(kernel.fused(*p.operands, tiling, splits))


@pytest.mark.parametrize("tiling", [kernel.TILINGS[0], kernel.TILINGS[-1]])
@pytest.mark.parametrize("splits", [2, 5, 8])
@pytest.mark.parametrize("B, T", [(1, 1), (5, 40), (3, 130)])
def test_values_add_up_however_tokens_are_cut_into_ranges(B, T, splits, tiling):
    """More ranges than steps (some are empty), as many as chunks, several within a chunk."""
    p = problem(B, T, 24, 40, 1, torch.float32)
    p.check(kernel.fused(*p.operands, tiling, splits))


def starts_two_bytes_late(x):
    room = torch.zeros(x.numel() + 1, device=x.device, dtype=x.dtype)
    room[1:] = x.flatten()
    return room[1:].view(x.shape)


def lies_transposed(x):
    return x.mT.contiguous().mT


def test_copy_engine_is_used_where_rows_are_aligned():
    p = problem(2, 9, 24, 40, 1, torch.bfloat16)
    assert DEVICE == "cuda" or kernel.tilings(*p.operands) == list(kernel.TILINGS)


def as_it_is(x):
    return x


MISALIGNED = [(39, as_it_is), (40, starts_two_bytes_late), (40, lies_transposed)]


@pytest.mark.parametrize("inputs, move", MISALIGNED)
def test_copy_engine_is_left_out_where_rows_are_not_aligned(inputs, move):
    """Rows whose length or place is no multiple of 16 bytes, or that do not follow each other. The
    values are right, though the tiling was chosen for others of this shape."""
    p = problem(2, 9, 24, inputs, 1, torch.bfloat16)
    p.x = move(p.x)
    able = kernel.tilings(*p.operands)
    assert able
    assert not any(tiling.tma for tiling in able)
    p.check(kernel.fused(*p.operands, kernel.TILINGS[0]))


# --- on a GPU that need not be here ---------------------------------------------------


def busy(tiles, splits, processors=132):
    """The share of the processors that work at any time."""
    waves = -(-tiles * splits // processors)
    return tiles * splits / (processors * waves)


@pytest.mark.parametrize("tiles", [36, 144])
def test_small_weights_are_split_over_tokens_until_a_gpu_is_busy(tiles):
    """GPT-2 small's layers in tiles of 128, 16 chunks of 1,024 tokens, 132 processors."""
    splits = kernel.best_splits(tiles, 16384, 132)
    assert busy(tiles, 1) < 0.6
    assert busy(tiles, splits) > 0.8


def test_large_weights_are_not_split():
    """GPT-2 small's head fills the processors as it is."""
    assert kernel.best_splits(2358, 16384, 132) == 1


def test_weights_are_not_split_where_adding_up_costs_more_than_few_tokens():
    assert kernel.best_splits(36, 256, 132) == 1


@pytest.mark.parametrize("arch, products", [("90", "HGMMA."), ("80", "HMMA.")])
def test_kernel_spills_no_register_when_compiled_for_a_gpu(arch, products):
    """By NVIDIA's own assembler, in bfloat16, one target: tensor cores multiply, and every tiling
    fits a multiprocessor. In a process of its own, without the interpreter."""
    printed = subprocess.run(
        [sys.executable, ASSEMBLE, f"--arch={arch}"], capture_output=True, text=True, check=True
    ).stdout
    rows = json.loads(printed.splitlines()[-1])["rows"]
    possible = [tiling for tiling in kernel.TILINGS if arch == "90" or not tiling.tma]
    assert len(rows) == len(possible)
    for row in rows:
        assert row["stack"] == 0, row
        assert row["blocks"] >= 1, row
        assert row["products"], row
        assert all(name.startswith(products) for name in row["products"]), row
    if arch == "90":
        # while one block meets the directions, the other multiplies
        assert rows[0]["blocks"] == 2


# --- the choice of a form ---------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the forms are timed")
def test_auto_on_a_cpu_matches_float64_whichever_form_it_chooses():
    """Both forms are met, chunk by chunk for long chunks and one product for short ones, and auto
    gives the bits of the form that it chose."""
    chosen = set()
    for T in (2, 256):
        p = problem(3, T, 96, 128, 2, torch.float32)
        for form in ("running", "matmul"):
            p.check(contract.weight_grad(*p.operands, form))
        form, _ = contract.choose(*p.operands)
        gw, v = contract.weight_grad(*p.operands, form)
        auto_gw, auto_v = contract.weight_grad(*p.operands, "auto")
        assert torch.equal(auto_gw, gw)
        assert torch.equal(auto_v, v)
        chosen.add(form)
    assert chosen == {"running", "matmul"}


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_auto_on_a_gpu_remembers_what_it_timed_and_matches_float64():
    p = problem(4, 256, 768, 768, 1, torch.bfloat16)
    p.check(contract.weight_grad(*p.operands, "auto"), 1e-2, 2e-2)
    assert any(key[0] == p.gy.shape for key in contract.CHOSEN)


def test_fused_form_raises_where_weights_are_not_float32():
    operands = [x.double() for x in problem(1, 5, 3, 7, 1, torch.float32).operands]
    with pytest.raises(ValueError, match="needs triton, a GPU and float32 weights"):
        contract.weight_grad(*operands, "fused")


def test_fused_form_raises_where_triton_is_missing(monkeypatch):
    p = problem(1, 5, 3, 7, 1, torch.float32)
    monkeypatch.setattr(kernel, "triton", None)
    with pytest.raises(ValueError, match="needs triton"):
        contract.weight_grad(*p.operands, "fused")
