"""The fused kernel against float64: on a GPU natively, elsewhere in Triton's interpreter (conftest.py switches it on)."""

import pytest
import torch

import ghost
from ops import weight_grad as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def problem(B, T, O, I, K, dtype):
    torch.manual_seed(B * T + O)
    gy, x = torch.randn(B, T, O, device=DEVICE).to(dtype), torch.randn(B, T, I, device=DEVICE).to(dtype)
    h = torch.randn(K, O, I, device=DEVICE)
    truth = torch.einsum("bto,bti->boi", gy.double(), x.double())
    return gy, x, h, truth.sum(0), torch.einsum("boi,koi->bk", truth, h.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, T, O, I, K", [(1, 1, 1, 1, 1), (1, 5, 3, 7, 2), (3, 70, 130, 257, 1), (16, 9, 64, 48, 3), (2, 65, 1100, 33, 1)])
def test_the_kernel_is_right_for_any_shape(B, T, O, I, K, dtype):
    """Products of the dtype given, sums in float32; twice the same bits. More rows of tiles than a group, tokens that fill no step."""
    gy, x, h, gradient, values = problem(B, T, O, I, K, dtype)
    gw, v = ghost.weight_grad(gy, x, h, "fused")
    assert gw.dtype == v.dtype == torch.float32
    assert relative(gw, gradient) < 1e-6 and relative(v, values) < 1e-5
    again = ghost.weight_grad(gy, x, h, "fused")
    assert torch.equal(gw, again[0]) and torch.equal(v, again[1])


@pytest.mark.parametrize("tiling", kernel.TILINGS)
def test_every_tiling_is_right(tiling):
    gy, x, h, gradient, values = problem(2, 70, 140, 270, 2, torch.bfloat16)
    gw, v = kernel.fused(gy, x, h, tiling)
    assert relative(gw, gradient) < 1e-6 and relative(v, values) < 1e-5


def test_auto_takes_the_running_form_but_for_tiny_chunks():
    cpu = [torch.device("cpu")]
    forms = {T: ghost.choose(*(t.to(*cpu) for t in problem(2, T, 384, 384, 1, torch.float32)[:3]))[0] for T in (4, 16, 17, 64)}
    assert forms == {4: "matmul", 16: "matmul", 17: "running", 64: "running"}


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_on_a_gpu_auto_takes_what_it_timed_and_is_right():
    gy, x, h, gradient, values = problem(4, 256, 768, 768, 1, torch.bfloat16)
    gw, v = ghost.weight_grad(gy, x, h, "auto")
    assert relative(gw, gradient) < 1e-2 and relative(v, values) < 2e-2
    assert any(key[0] == gy.shape for key in ghost.CHOSEN)


def test_what_cannot_run_says_so(monkeypatch):
    gy, x, h, _, _ = problem(1, 5, 3, 7, 1, torch.float32)
    with pytest.raises(ValueError, match="needs triton, a GPU and float32 weights"):
        ghost.weight_grad(gy.double(), x.double(), h.double(), "fused")
    monkeypatch.setattr(kernel, "triton", None)
    with pytest.raises(ValueError, match="needs triton"):
        ghost.weight_grad(gy, x, h, "fused")
