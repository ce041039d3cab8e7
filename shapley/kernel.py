"""The weight gradient of a Linear with each chunk's inner products, in one Triton kernel.

Reference: contract.weight_grad(gy_BTO, x_BTI, h_KOI, "matmul"); tests/test_kernel.py compares both
with float64. gw_OI = sum_b gy_b^T x_b is added up in float32, chunk after chunk. Where a chunk's
tokens end, the sum's inner products with the K directions are taken. What they have grown by since
the chunk before are the chunk's values.

A block takes one tile of the weight and one of SPLITS ranges of all tokens, so that small weights
fill a GPU too. The ranges' sums are added afterwards, in a fixed order. bench/assemble.py shows
what the compiler makes of it, also where there is no GPU.

Suffixes: B chunks, T tokens of a chunk, O outputs, I inputs, K targets.
"""

from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a machine without a GPU
    triton = None


class Tiling(NamedTuple):
    TILE_O: int  # rows and columns of a block's tile of the weight
    TILE_I: int
    TILE_T: int  # tokens of a step
    num_warps: int
    num_stages: int
    # whether Hopper's copy engine moves the tiles, which costs no registers for addresses
    tma: bool


# One block of 128 x 256 fills a multiprocessor. Of 128 x 128 two fit: one multiplies while the
# other meets the directions.
TILINGS = (
    Tiling(128, 128, 64, 8, 3, True),
    Tiling(128, 128, 64, 4, 3, True),
    Tiling(128, 256, 64, 8, 4, True),
    Tiling(256, 128, 64, 8, 4, True),
    Tiling(128, 128, 32, 8, 3, True),
    Tiling(128, 128, 64, 8, 3, False),
    Tiling(128, 128, 32, 8, 4, False),
    Tiling(64, 64, 32, 4, 3, False),
)
GROUP = 8  # rows of tiles that share their inputs in L2
MAX_SPLITS = 8


def interpreted():
    """Whether Triton's interpreter runs the kernel, on the CPU."""
    return triton is not None and triton.knobs.runtime.interpret


def tilings(gy_BTO, x_BTI, h_KOI):
    """Those of TILINGS that such operands can have. The copy engine is Hopper's, and wants rows
    that begin at, and are long, a multiple of 16 bytes."""
    copy_engine = True
    if x_BTI.is_cuda:
        copy_engine = torch.cuda.get_device_capability(x_BTI.device) >= (9, 0)
    for tensor in (gy_BTO, x_BTI, h_KOI):
        row_bytes = tensor.shape[-1] * tensor.element_size()
        if row_bytes % 16 or tensor.data_ptr() % 16 or not tensor.is_contiguous():
            copy_engine = False
    return [tiling for tiling in TILINGS if copy_engine or not tiling.tma]


def count_processors(device):
    """A GPU's multiprocessors; for the interpreter a few."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_cost(tiles, splits, tokens, processors):
    """The time of a split kernel, relative: 1 where all processors work all the time.

    Blocks run in waves of one a processor. And each split and weight is 8 bytes written and read
    again, which cost an H100 what its tensor cores do in 900 tokens.
    """
    blocks = tiles * splits
    waves = -(-blocks // processors)
    adding_up = splits * 900 / tokens if splits > 1 else 0
    return waves * processors / blocks + adding_up


def best_splits(tiles, tokens, processors):
    """The cheapest number of ranges that all tokens are cut into, for a weight of so many tiles."""
    costs = {}
    for splits in range(1, MAX_SPLITS + 1):
        costs[splits] = split_cost(tiles, splits, tokens, processors)
    return min(costs, key=costs.get)


def fused(gy_BTO, x_BTI, h_KOI, tiling=None, splits=None):
    """contract.weight_grad by the kernel below: gw_OI and v_BK, float32.

    tiling: used if such operands can have it, else the first that they can. splits: the number of
    ranges of tokens; default: best_splits. Raises ValueError on a CPU without the interpreter,
    without triton, and where h_KOI is not float32.
    """
    if triton is None or not (x_BTI.is_cuda or interpreted()) or h_KOI.dtype != torch.float32:
        raise ValueError(
            'contract.FORM = "fused" needs triton, a GPU and float32 weights, '
            f'not {h_KOI.dtype} on {x_BTI.device}: write "auto"'
        )
    gy_BTO = gy_BTO.contiguous()
    x_BTI = x_BTI.contiguous()
    h_KOI = h_KOI.contiguous()
    K, O, I = h_KOI.shape
    B, T, _ = x_BTI.shape
    able = tilings(gy_BTO, x_BTI, h_KOI)
    if tiling not in able:
        tiling = able[0]
    tiles = triton.cdiv(O, tiling.TILE_O) * triton.cdiv(I, tiling.TILE_I)
    if splits is None:
        splits = best_splits(tiles, B * T, count_processors(x_BTI.device))
    gw = h_KOI.new_empty(splits, O, I)
    part = h_KOI.new_zeros(tiles, splits, B, K)
    operands = [gy_BTO, x_BTI, h_KOI, gw]
    if tiling.tma:
        operands = [
            TensorDescriptor.from_tensor(gy_BTO, [1, tiling.TILE_T, tiling.TILE_O]),
            TensorDescriptor.from_tensor(x_BTI, [1, tiling.TILE_T, tiling.TILE_I]),
            TensorDescriptor.from_tensor(h_KOI, [1, tiling.TILE_O, tiling.TILE_I]),
            TensorDescriptor.from_tensor(gw, [1, tiling.TILE_O, tiling.TILE_I]),
        ]
    _fused[tiles, splits](
        *operands,
        part,
        B,
        T,
        O,
        I,
        splits,
        K,
        K_UP=triton.next_power_of_2(K),
        TILE_O=tiling.TILE_O,
        TILE_I=tiling.TILE_I,
        TILE_T=tiling.TILE_T,
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        TMA=tiling.tma,
        WIDEN=interpreted(),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    # sums in a fixed order: no atomics
    gw_OI = gw[0] if splits == 1 else gw.sum(0)
    return gw_OI, part.sum((0, 1))


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
        gy, x, h, gw, part, B, T, O, I, SPLITS, K: tl.constexpr, K_UP: tl.constexpr,
        TILE_O: tl.constexpr, TILE_I: tl.constexpr, TILE_T: tl.constexpr, PRECISION: tl.constexpr,
        TMA: tl.constexpr, WIDEN: tl.constexpr, GROUP: tl.constexpr = GROUP,
    ):  # fmt: skip
        """gw (SPLITS, O, I), part (tiles, SPLITS, B, K), zero before: of this tile and range the
        weight gradient, and of each chunk <gradient, h>."""
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
