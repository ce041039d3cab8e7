"""The weight gradient of a Linear with each chunk's inner products, in one Triton kernel.

Reference: ghost.weight_grad(gy_BTO, x_BTI, h_KOI, "matmul"). gw_OI = sum_b gy_b^T x_b in float32; where a chunk's tokens end, the accumulator
meets the K directions, and what that reading has grown by is the chunk's part. tests/test_kernel.py compares with float64.

A block takes one tile of the weight and one of SPLITS ranges of all tokens, so that small weights fill a GPU too; the ranges' sums are added
afterwards, in a fixed order. bench/assemble.py shows what the compiler makes of it, also where there is no GPU.
"""

from collections import namedtuple

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a machine without a GPU
    triton = None

# O and I of a block's tile, tokens of a step. tma: tiles come and go by Hopper's copy engine and cost no registers for addresses. One block of
# 128 x 256 fills a multiprocessor; of 128 x 128 two fit, and one multiplies while the other meets the directions.
Tiling = namedtuple("Tiling", "TILE_O TILE_I TILE_T num_warps num_stages tma")
TILINGS = (
    Tiling(128, 128, 64, 8, 3, True), Tiling(128, 128, 64, 4, 3, True), Tiling(128, 256, 64, 8, 4, True), Tiling(256, 128, 64, 8, 4, True),
    Tiling(128, 128, 32, 8, 3, True), Tiling(128, 128, 64, 8, 3, False), Tiling(128, 128, 32, 8, 4, False), Tiling(64, 64, 32, 4, 3, False),
)  # fmt: skip
GROUP = 8  # rows of tiles that share their inputs in L2


def interpreted():
    return triton is not None and triton.knobs.runtime.interpret


def tilings(gy_BTO, x_BTI, h_KOI):
    """Those of TILINGS that such operands can have. The copy engine is Hopper's, and wants rows of a multiple of 16 bytes."""
    tensors, old = (
        (gy_BTO, x_BTI, h_KOI),
        x_BTI.is_cuda and torch.cuda.get_device_capability(x_BTI.device) < (9, 0),
    )
    odd = any(
        t.shape[-1] * t.element_size() % 16 or t.data_ptr() % 16 or not t.is_contiguous()
        for t in tensors
    )
    return [tiling for tiling in TILINGS if not (tiling.tma and (old or odd))]


def best_splits(tiles, tokens, processors):
    """Blocks run in waves of one a processor: the fewest idle ones, against 8 bytes for each split and weight written and read again, which cost
    an H100 what its tensor cores do in 900 tokens."""
    return min(
        range(1, 9),
        key=lambda n: (
            -(-tiles * n // processors) * processors / (tiles * n) + (n > 1) * n * 900 / tokens
        ),
    )


def fused(gy_BTO, x_BTI, h_KOI, tiling=None, splits=None):
    """ghost.weight_grad by the kernel below, with this tiling if such operands can have it, else the first they can. Raises ValueError on a CPU."""
    if triton is None or not (x_BTI.is_cuda or interpreted()) or h_KOI.dtype != torch.float32:
        raise ValueError(
            f'ghost.FORM = "fused" needs triton, a GPU and float32 weights, not {h_KOI.dtype} on {x_BTI.device}: write "auto"'
        )
    gy_BTO, x_BTI, h_KOI = gy_BTO.contiguous(), x_BTI.contiguous(), h_KOI.contiguous()
    (K, O, I), (B, T, _) = h_KOI.shape, x_BTI.shape
    able = tilings(gy_BTO, x_BTI, h_KOI)
    TILE_O, TILE_I, TILE_T, num_warps, num_stages, tma = tiling if tiling in able else able[0]
    tiles = (-(-O // TILE_O)) * (-(-I // TILE_I))
    if splits is None:
        splits = best_splits(
            tiles,
            B * T,
            torch.cuda.get_device_properties(x_BTI.device).multi_processor_count
            if x_BTI.is_cuda
            else 4,
        )
    gw, part = h_KOI.new_empty(splits, O, I), h_KOI.new_zeros(tiles, splits, B, K)
    operands = [gy_BTO, x_BTI, h_KOI, gw]
    if tma:
        tile = ([1, TILE_T, TILE_O], [1, TILE_T, TILE_I], [1, TILE_O, TILE_I], [1, TILE_O, TILE_I])
        operands = [TensorDescriptor.from_tensor(x, of) for x, of in zip(operands, tile)]
    options = dict(
        TILE_O=TILE_O,
        TILE_I=TILE_I,
        TILE_T=TILE_T,
        TMA=tma,
        WIDEN=interpreted(),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    options |= dict(
        K_UP=triton.next_power_of_2(K),
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
    )
    _fused[tiles, splits](*operands, part, B, T, O, I, splits, K, **options)
    return gw[0] if splits == 1 else gw.sum(0), part.sum(
        (0, 1)
    )  # sums in a fixed order: no atomics


if triton is not None:

    @triton.jit
    def _load(
        x,
        b,
        row,
        column,
        rows,
        columns,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        TMA: tl.constexpr,
    ):
        """A tile of x[b], which is (rows, columns); 0 beyond its edges."""
        if TMA:
            return x.load([b, row, column]).reshape(ROWS, COLUMNS)
        else:
            r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
            x += (tl.cast(b, tl.int64) * rows + row) * columns + column
            return tl.load(x + (r * columns + c), (r < rows - row) & (c < columns - column), 0.0)

    @triton.jit
    def _store(
        x,
        tile,
        b,
        row,
        column,
        rows,
        columns,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        TMA: tl.constexpr,
    ):
        if TMA:
            x.store([b, row, column], tile.reshape(1, ROWS, COLUMNS))
        else:
            r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
            x += (tl.cast(b, tl.int64) * rows + row) * columns + column
            tl.store(x + (r * columns + c), tile, (r < rows - row) & (c < columns - column))

    @triton.jit
    def _fused(
        gy, x, h, gw, part, B, T, O, I, SPLITS, K: tl.constexpr, K_UP: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
        TILE_T: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, WIDEN: tl.constexpr, GROUP: tl.constexpr = GROUP,
    ):  # fmt: skip
        """gw (SPLITS, O, I), part (tiles, SPLITS, B, K), zero before: of this tile and range the weight gradient, and of each chunk <gradient, h>."""
        tile, split, across = tl.program_id(0), tl.program_id(1), tl.cdiv(I, TILE_I)
        group = tile // (GROUP * across) * GROUP
        high = min(tl.cdiv(O, TILE_O) - group, GROUP)
        o = (group + tile % (GROUP * across) % high) * TILE_O
        i = tile % (GROUP * across) // high * TILE_I
        steps = tl.cdiv(T, TILE_T)  # of a chunk
        first, last = B * steps * split // SPLITS, B * steps * (split + 1) // SPLITS
        sum_OI, k, before = (
            tl.zeros((TILE_O, TILE_I), tl.float32),
            tl.arange(0, K_UP),
            tl.zeros((K_UP,), tl.float32),
        )
        for b in range(first // steps, tl.cdiv(last, steps)):
            for step in range(max(first, b * steps), min(last, b * steps + steps)):
                t = (step - b * steps) * TILE_T
                gy_TO, x_TI = (
                    _load(gy, b, t, o, T, O, TILE_T, TILE_O, TMA),
                    _load(x, b, t, i, T, I, TILE_T, TILE_I, TMA),
                )
                if WIDEN:  # the interpreter's bfloat16 products are wrong
                    gy_TO, x_TI = gy_TO.to(tl.float32), x_TI.to(tl.float32)
                sum_OI = tl.dot(gy_TO.T, x_TI, sum_OI, input_precision=PRECISION)
            now = before
            for j in range(K):
                h_OI = _load(h, j, o, i, O, I, TILE_O, TILE_I, TMA)
                now = tl.where(k == j, tl.sum(tl.sum(sum_OI * h_OI, 1), 0), now)
            tl.store(part + ((tile * SPLITS + split) * B + b) * K + k, now - before, k < K)
            before = now
        _store(gw, sum_OI, split, o, i, O, I, TILE_O, TILE_I, TMA)
