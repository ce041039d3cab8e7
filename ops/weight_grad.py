"""The weight gradient of a Linear with each chunk's inner products, in one Triton kernel.

Reference: ghost.weight_grad(gy_BTO, x_BTI, h_KOI, "matmul"). gw_OI = sum_b gy_b^T x_b in float32; after each chunk the accumulator meets the
K directions, so chunk b's value is the difference of two readings. tests/test_kernel.py compares with float64.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU
    triton = None


def fused(gy_BTO, x_BTI, h_KOI, tiling):
    """ghost.weight_grad by the kernel below, with one of TILINGS. Raises ValueError where it cannot run."""
    interpreted = triton is not None and triton.knobs.runtime.interpret
    if triton is None or not (x_BTI.is_cuda or interpreted) or h_KOI.dtype != torch.float32:
        raise ValueError(f'ghost.FORM = "fused" needs triton, a GPU and float32 weights, not {h_KOI.dtype} on {x_BTI.device}: write "auto"')
    (K, O, I), (B, T, _) = h_KOI.shape, x_BTI.shape
    TILE_O, TILE_I, TILE_T, num_warps, num_stages = tiling
    tiles = (-(-O // TILE_O)) * (-(-I // TILE_I))
    gw_OI, seen = h_KOI.new_empty(O, I), h_KOI.new_empty(tiles, B, K)
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    options = dict(TILE_O=TILE_O, TILE_I=TILE_I, TILE_T=TILE_T, PRECISION=precision, WIDEN=interpreted, num_warps=num_warps, num_stages=num_stages)
    _fused[(tiles,)](gy_BTO.contiguous(), x_BTI.contiguous(), h_KOI.contiguous(), gw_OI, seen, B, T, O, I, K, **options)
    return gw_OI, torch.diff(seen.sum(0), dim=0, prepend=seen.new_zeros(1, K))  # a sum in a fixed order: no atomics


# of the weight, O and I; tokens a step; warps; stages. The last for GPUs with little shared memory
TILINGS = ((128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 32, 8, 4), (64, 128, 32, 4, 3))
GROUP = 8  # rows of tiles that share their inputs in L2

if triton is not None:

    @triton.jit
    def _fused(
        gy, x, h, gw, seen, B, T, O, I, K: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr, TILE_T: tl.constexpr,
        PRECISION: tl.constexpr, WIDEN: tl.constexpr, GROUP: tl.constexpr = GROUP,
    ):  # fmt: skip
        """A tile of the weight gradient, chunk after chunk in one float32 accumulator; after each, its inner product with the directions."""
        tile, across = tl.program_id(0), tl.cdiv(I, TILE_I)
        first = tile // (GROUP * across) * GROUP
        high = min(tl.cdiv(O, TILE_O) - first, GROUP)
        o = (first + tile % (GROUP * across) % high) * TILE_O + tl.arange(0, TILE_O)
        i = tile % (GROUP * across) // high * TILE_I + tl.arange(0, TILE_I)
        inside, place = (o[:, None] < O) & (i[None, :] < I), o[:, None].to(tl.int64) * I + i[None, :]
        sum_OI = tl.zeros((TILE_O, TILE_I), tl.float32)
        for b in range(B):
            for start in range(0, T, TILE_T):
                t = start + tl.arange(0, TILE_T)
                token = (tl.cast(b, tl.int64) * T + t)[:, None]
                gy_TO = tl.load(gy + token * O + o[None, :], (t[:, None] < T) & (o[None, :] < O), 0.0)
                x_TI = tl.load(x + token * I + i[None, :], (t[:, None] < T) & (i[None, :] < I), 0.0)
                if WIDEN:  # the interpreter's bfloat16 products are wrong
                    gy_TO, x_TI = gy_TO.to(tl.float32), x_TI.to(tl.float32)
                sum_OI = tl.dot(gy_TO.T, x_TI, sum_OI, input_precision=PRECISION)
            for k in tl.static_range(K):
                h_OI = tl.load(h + tl.cast(k, tl.int64) * O * I + place, inside, 0.0)
                tl.store(seen + (tile * B + b) * K + k, tl.sum(tl.sum(sum_OI * h_OI, 1), 0))
        tl.store(gw + place, sum_OI, inside)
