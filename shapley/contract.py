"""The weight gradient of a Linear, and each chunk's inner product with the directions, together.

Three forms give the same numbers:

    running  reads the values off the weight gradient as it accumulates, chunk after chunk
    fused    the same in one Triton kernel (kernel.py)
    matmul   one more matmul of the layer's size for each target

Where the weight gradient is known already, `linear_values` finds the inner products alone, and if
asked |x_i|^2 of each chunk with them.

Shape suffixes: B chunks, T tokens of a chunk, I in-features, O out-features, K targets.
"""

import contextlib
from functools import partial

import torch
from torch import Tensor

from shapley import kernel

TILE = (
    2**21
)  # elements of a tile on CPU: a tile of the weight gradient and its direction stay in cache
GROUP = 2**28  # elements of chunks' own gradients that exist at once on a GPU
FORM = "auto"  # running, fused, matmul, or auto: what `choose` finds the fastest


def weight_grad(gy_BTO: Tensor, x_BTI: Tensor, h_KOI: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """The gradient of y = x W^T with respect to W, and its inner products with the directions.

    Returns gw_OI = sum_b gy_b^T x_b and values_BK = <gy_b^T x_b, h_k>, of the direction's dtype.
    """
    tiling = None
    if form == "auto":
        form, tiling = choose(gy_BTO, x_BTI, h_KOI)
    assert form in ("running", "fused", "matmul"), form
    if form == "fused":
        return kernel.fused(gy_BTO, x_BTI, h_KOI, tiling)
    if form == "running":
        return running(gy_BTO, x_BTI, h_KOI)
    gw_OI = (gy_BTO.flatten(0, 1).t() @ x_BTI.flatten(0, 1)).to(h_KOI.dtype)
    return gw_OI, linear_values(gy_BTO, x_BTI, h_KOI, None)


# --- running ------------------------------------------------------------------


def running(gy_BTO, x_BTI, h_KOI):
    """A chunk's value is what <weight gradient, direction> grows by when the chunk is added."""
    K, O, I = h_KOI.shape
    B = len(x_BTI)
    x_B = x_BTI.to(h_KOI.dtype).unbind()
    gy_BTO = gy_BTO.to(h_KOI.dtype)
    gw_OI = h_KOI.new_empty(O, I)
    products = []  # <tile, direction> after 1, 2, ... B chunks, for each tile and target
    for rows, h_K in tiles(h_KOI):
        for b, gy_OT in enumerate(gy_BTO[:, :, rows].mT.unbind()):
            products += accumulate(gw_OI[rows], gy_OT, x_B[b], h_K, is_first=b == 0)
    of_target = torch.stack(products).view(-1, B, K).unbind(2)
    after_BK = torch.stack([of_tiles.contiguous().sum(0) for of_tiles in of_target], 1)
    return gw_OI, torch.diff(after_BK, dim=0, prepend=after_BK.new_zeros(1, K))


def tiles(h_KOI):
    """A weight in tiles, which on CPU fit in cache. Yields their rows (a slice), and the
    directions' flat tiles."""
    n_rows = size = h_KOI.shape[1]
    if h_KOI.device.type == "cpu":
        n_tiles = -(-n_rows * h_KOI.shape[2] // TILE)
        size = -(-n_rows // n_tiles)
    for start in range(0, n_rows, size):
        rows = slice(start, min(start + size, n_rows))
        yield rows, [h_OI[rows].view(-1) for h_OI in h_KOI.unbind()]


def accumulate(tile, gy_OT, x_TI, h_K, is_first):
    """Adds a chunk's gy^T x to the tile, which holds nothing before the first. Returns
    <tile, direction> of each target."""
    if x_TI.dtype == tile.dtype:
        tile.addmm_(gy_OT, x_TI, beta=0 if is_first else 1)  # beta 0 ignores what was there
    elif is_first:
        tile.copy_(gy_OT @ x_TI)
    else:
        tile.add_(gy_OT @ x_TI)
    return [torch.dot(tile.view(-1), h) for h in h_K]


# --- matmul -------------------------------------------------------------------


def linear_values(gy, x, hw, hb, squares=False):
    """(B, K) without the weight gradient: one matmul of the layer's size for each target.

    gy (B, ..., O); x (B, ..., I); hw (K, O, I), hb (K, O) or None: the directions. squares: (B,
    K + 1), the last of them the square of the gradient's norm; by one matmul for all.
    """
    x = x.reshape(len(x), -1, x.shape[-1]).to(gy.dtype)
    gy = gy.reshape(len(gy), -1, gy.shape[-1])
    if squares:
        values = products(gy, x, hw)
    else:
        values = torch.stack([token_values(gy, x, h).sum(1) for h in hw], 1)
    if hb is None:
        return values
    return values + gradient_values(gy.sum(1, dtype=hb.dtype), hb, squares)


def gradient_values(gradient, h, squares):
    """The same of chunks' gradients that exist: gradient (B, ...), h (K, ...)."""
    gradient = gradient.flatten(1)
    values = against(gradient, h.flatten(1))
    if not squares:
        return values
    return torch.cat([values, gradient.square().sum(1, keepdim=True)], 1)


def linear_products(gy_BTO: Tensor, x_BTI: Tensor, h_KOI: Tensor) -> Tensor:
    """(B, K + 1): each chunk's <gy^T x, h_k>, and |gy^T x|^2."""
    if gy_BTO.device.type != "cpu":
        return products_by_groups(gy_BTO, x_BTI, h_KOI)
    K, _, I = h_KOI.shape
    B = len(x_BTI)
    found = []
    for rows, h_K in tiles(h_KOI):
        tile = h_KOI.new_empty(rows.stop - rows.start, I)
        for gy_OT, x_TI in zip(gy_BTO[:, :, rows].mT, x_BTI):
            found += accumulate(tile, gy_OT, x_TI, h_K, is_first=True)
            found.append(torch.dot(tile.view(-1), tile.view(-1)))
    return torch.stack(found).view(-1, B, K + 1).sum(0)


def products_by_groups(gy_BTO, x_BTI, h_KOI):
    """linear_products for a GPU, which is to have few and large operations."""
    _, O, I = h_KOI.shape
    size = max(1, GROUP // (O * I))
    found = []
    for gy, x in zip(gy_BTO.split(size), x_BTI.split(size)):
        found.append(gradient_values((gy.mT @ x).to(h_KOI.dtype), h_KOI, squares=True))
    return torch.cat(found)


def token_values(gy_BTO, x_BTI, h_OI):
    """What each token's term of the weight gradient contributes along h: (B, T), of h's dtype."""
    # the smaller side keeps the temporary small
    if x_BTI.shape[-1] < gy_BTO.shape[-1]:
        return ((gy_BTO @ h_OI.to(gy_BTO.dtype)) * x_BTI).sum(-1, dtype=h_OI.dtype)
    return ((x_BTI @ h_OI.t().to(x_BTI.dtype)) * gy_BTO).sum(-1, dtype=h_OI.dtype)


def against(x, h):
    """The inner products of vectors x (B, C) with the directions h (K, C): (B, K).

    A direction at a time: of one matrix product the bits would depend on how many there are."""
    return torch.stack([x @ h_k for h_k in h], 1)


# --- which form ---------------------------------------------------------------

CHOSEN = {}  # on a GPU: for which operands which form, and its tiling


def choose(gy_BTO, x_BTI, h_KOI):
    """The fastest form for such operands, and its tiling."""
    if x_BTI.device.type == "cpu":
        # a chunk's inner product costs what the matmul does for 9 tokens, and its calls what it
        # does for 2^20 / (O I) (bench/kernels.py)
        _, O, I = h_KOI.shape
        T = x_BTI.shape[1]
        return ("running" if (T - 9) * O * I > 2**20 else "matmul"), None
    key = (gy_BTO.shape, x_BTI.shape, len(h_KOI), x_BTI.dtype, x_BTI.device)
    if key not in CHOSEN:
        CHOSEN[key] = fastest(gy_BTO, x_BTI, h_KOI)
    return CHOSEN[key]


def fastest(gy_BTO, x_BTI, h_KOI):
    """Times, on a GPU, each form that can run and is right, the first time such operands come."""
    matmul = partial(weight_grad, gy_BTO, x_BTI, h_KOI, "matmul")
    if not kernel.triton or h_KOI.dtype != torch.float32:
        return "matmul", None
    truth, _ = matmul()
    forms = {("matmul", None): matmul}
    for tiling in kernel.tilings(gy_BTO, x_BTI, h_KOI):
        fused = partial(kernel.fused, gy_BTO, x_BTI, h_KOI, tiling)
        # a tiling may not fit on this GPU; FORM = "fused" says why
        errors = (kernel.triton.OutOfResources, kernel.triton.CompilationError)
        with contextlib.suppress(*errors):
            error = torch.linalg.norm(fused()[0] - truth)
            if error < 1e-2 * torch.linalg.norm(truth):
                forms["fused", tiling] = fused
    if len(forms) == 1:
        return "matmul", None
    times = {form: kernel.triton.testing.do_bench(run, rep=20) for form, run in forms.items()}
    return min(times, key=times.get)


# --- under torch.compile ------------------------------------------------------


def opaque(function, fake):
    """A function that is itself in eager, and one operator while torch.compile traces, which does
    not look into it. fake: makes empty results of the right shapes."""
    name = f"nanoshapley::{function.__name__}"
    operator = torch.library.custom_op(name, function, mutates_args=())
    operator.register_fake(fake)

    def either(*args):
        return (operator if torch.compiler.is_compiling() else function)(*args)

    return either


def empty_weight_grad(gy_BTO, x_BTI, h_KOI, form):
    return h_KOI.new_empty(h_KOI.shape[1:]), h_KOI.new_empty(len(x_BTI), len(h_KOI))


def empty_products(gy_BTO, x_BTI, h_KOI):
    return h_KOI.new_empty(len(x_BTI), len(h_KOI) + 1)


contract = opaque(weight_grad, empty_weight_grad)
products = opaque(linear_products, empty_products)
