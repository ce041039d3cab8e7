"""The ops under the model's layers: forward as usual, and a backward that also values each chunk of the batch.

Every rule values chunk i by <x_i, h>, where x_i is the gradient of the chunk's share of the loss and h a direction in
parameter space (one per target). That is the directional derivative along h, so a zero tensor `ledger` that scales h
chunk by chunk has the values as its gradient, and autograd sums them over layers, tied weights and repeated uses:

    ledger = torch.zeros(B, K, requires_grad=True);  model(X, Y, ledger)[1].backward();  ledger.grad  # (B, K)

The direction of a parameter `w` is the attribute `w.h`, shape (K, *w.shape). It belongs to the parameter, not to one
use of it: that is why a tied wte / lm_head comes out right.

Where the direction is not known before the backward, a Tape stands in for the ledger and is read when it is. Where an op
finds zeros `w.each` on its weight, their gradient will be the weight gradient of each chunk alone: (B, C) for a LayerNorm, and for a
Linear or Embedding (B, R, I), of the rows `w.rows` (R,), sorted.

Shape suffixes: B chunks, T tokens of a chunk, I in-features, O out-features, C channels, K targets.
Source: In-Run Data Shapley (Wang et al., arXiv 2406.11011), section 4, restated as a gradient.
"""

import contextlib
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from shapley import kernel

TILE = (
    2**21
)  # elements of the weight gradient worked on at a time on CPU: a tile and its direction stay in cache
# How Linear contracts. running: reads the values off the weight gradient as it accumulates, chunk after chunk; fused: the same in one Triton
# kernel; matmul: one more matmul of the layer's size. auto: what `choose` finds the fastest.
FORM = "auto"


class Tape:
    """Takes the place of the ledger in a forward: keeps what each op's contraction needs, for `values` after the backward.

    An op's output gets a hook, or in compiled code, where there are none, a mark of its shape: zeros whose gradient is the output's. So that
    wants the `ops` of a tape that went through the same forward in eager.
    """

    def __init__(self, ops=()):
        self.ops, self.inputs, self.gy, self.marks = list(ops), [], {}, []
        for i, (_, shape, dtype, device) in enumerate(ops):
            mark = torch.zeros((), dtype=dtype, device=device, requires_grad=True).expand(
                shape
            )  # takes no memory
            mark.register_hook(partial(self.gy.__setitem__, i))
            self.marks.append(mark)

    def watch(self, y, values, *inputs):
        """y, whose gradient gy will be kept for values(gy, *inputs)."""
        i = len(self.inputs)
        self.inputs.append([x.detach() for x in inputs])
        if self.marks:
            return _Mark.apply(y, self.marks[i])
        self.ops.append((values, y.shape, y.dtype, y.device))
        if y.requires_grad:
            y.register_hook(partial(self.gy.__setitem__, i))
        return y

    @torch.no_grad()
    def values(self, each_token=False):
        """(B, K): each chunk's <gradient, direction>, the directions now on the parameters; or (B * T, K), what each token's position
        contributes to that. Forgets what was kept."""
        total = 0
        while self.gy:
            i, gy = self.gy.popitem()
            inputs, self.inputs[i] = self.inputs[i], None
            if each_token:  # then it is a chunk of its own
                gy, *inputs = (
                    t.flatten(0, 1)[:, None] if t.dim() > 1 else t for t in (gy, *inputs)
                )
            total = total + self.ops[i][0](gy, *inputs)
        return total


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, mark):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gy):
        return gy, gy


# --- the contraction: summed weight gradient and each chunk's <gradient, direction>


def weight_grad(gy_BTO: Tensor, x_BTI: Tensor, h_KOI: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Gradient of y = x W^T with respect to W, and its inner products with the directions, chunk by chunk.

    Returns gw_OI = sum_b gy_b^T x_b and v_BK = <gy_b^T x_b, h_k>, both of the direction's dtype.
    """
    (K, O, I), B = h_KOI.shape, len(x_BTI)
    form, tiling = choose(gy_BTO, x_BTI, h_KOI) if form == "auto" else (form, None)
    assert form in ("running", "fused", "matmul"), form
    if form == "fused":
        return kernel.fused(gy_BTO, x_BTI, h_KOI, tiling)
    if form == "matmul":
        gw_OI = (gy_BTO.flatten(0, 1).t() @ x_BTI.flatten(0, 1)).to(h_KOI.dtype)
        return gw_OI, linear_values(gy_BTO, x_BTI, h_KOI, None)
    x_B = x_BTI.to(h_KOI.dtype).unbind()
    gy_BTO = gy_BTO.to(h_KOI.dtype)
    gw_OI = h_KOI.new_empty(O, I)
    seen = []  # <tile, direction> after 1, 2, ... B chunks, for each tile and target
    for o, tile, h_K in tiles(gw_OI, h_KOI):
        for b, gy_OT in enumerate(gy_BTO[:, :, o].mT.unbind()):
            seen += accumulate(tile, gy_OT, x_B[b], h_K, b == 0)
    after_BK = torch.stack(seen).view(-1, B, K).sum(0)
    return gw_OI, torch.diff(after_BK, dim=0, prepend=after_BK.new_zeros(1, K))


def tiles(gw_OI, h_KOI):
    """Pieces of the weight gradient, cache-sized on CPU: the rows (a slice), the piece and the directions' flat ones."""
    O = len(gw_OI)
    rows = -(-O // -(-gw_OI.numel() // TILE)) if gw_OI.device.type == "cpu" else O
    for o in (slice(start, start + rows) for start in range(0, O, rows)):
        yield o, gw_OI[o], [h_OI[o].view(-1) for h_OI in h_KOI.unbind()]


def accumulate(tile, gy_OT, x_TI, h_K, first):
    """Adds a chunk's gy^T x to the tile, which holds nothing before the first; returns <tile, direction> of each target."""
    if x_TI.dtype == tile.dtype:
        tile.addmm_(gy_OT, x_TI, beta=0 if first else 1)  # beta 0 ignores what was there
    else:
        (tile.copy_ if first else tile.add_)(gy_OT @ x_TI)
    return [torch.dot(tile.view(-1), h) for h in h_K]


CHOSEN = {}  # on a GPU: for which operands which form, and its tiling


def choose(gy_BTO, x_BTI, h_KOI):
    """The fastest form for such operands, and its tiling. On a GPU each that can run and is right is timed the first time they come."""
    (_, O, I), T, key = (
        h_KOI.shape,
        x_BTI.shape[1],
        (gy_BTO.shape, x_BTI.shape, len(h_KOI), x_BTI.dtype, x_BTI.device),
    )
    if (
        x_BTI.device.type == "cpu"
    ):  # a chunk's inner product costs what the matmul does for 9 tokens, its calls for 2^20 / (O I): bench/kernels.py
        return "running" if (T - 9) * O * I > 2**20 else "matmul", None
    if key not in CHOSEN:
        forms = {("matmul", None): lambda: weight_grad(gy_BTO, x_BTI, h_KOI, "matmul")}
        truth = forms["matmul", None]()[0]
        for tiling in (
            kernel.tilings(gy_BTO, x_BTI, h_KOI)
            if kernel.triton and h_KOI.dtype == torch.float32
            else ()
        ):
            with contextlib.suppress(
                kernel.triton.OutOfResources, kernel.triton.CompilationError
            ):  # not on this GPU; FORM = "fused" says why
                fused = partial(kernel.fused, gy_BTO, x_BTI, h_KOI, tiling)
                if torch.linalg.norm(fused()[0] - truth) < 1e-2 * torch.linalg.norm(truth):
                    forms["fused", tiling] = fused
        CHOSEN[key] = (
            min(forms, key=lambda form: kernel.triton.testing.do_bench(forms[form], rep=20))
            if len(forms) > 1
            else ("matmul", None)
        )
    return CHOSEN[key]


def token_values(gy_BTO, x_BTI, h_OI):
    """What each token's term of the weight gradient contributes along h: (B, T), of h's dtype."""
    if x_BTI.shape[-1] < gy_BTO.shape[-1]:  # the smaller side keeps the temporary small
        return ((gy_BTO @ h_OI.to(gy_BTO.dtype)) * x_BTI).sum(-1, dtype=h_OI.dtype)
    return ((x_BTI @ h_OI.t().to(x_BTI.dtype)) * gy_BTO).sum(-1, dtype=h_OI.dtype)


def opaque(function, fake):
    """The function itself in eager; one operator, which torch.compile does not look into, while it traces."""
    op = torch.library.custom_op(f"nanoshapley::{function.__name__}", function, mutates_args=())
    op.register_fake(fake)
    return lambda *args: (op if torch.compiler.is_compiling() else function)(*args)


contract = opaque(
    weight_grad,
    lambda gy_BTO, x_BTI, h_KOI, form: (
        h_KOI.new_empty(h_KOI.shape[1:]),
        h_KOI.new_empty(len(x_BTI), len(h_KOI)),
    ),
)


# --- y = x W^T + b ------------------------------------------------------------


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, hw, hb, ledger, each, rows, form):
        w_low = w.to(
            x.dtype
        )  # under autocast x is low precision; w stays whole and gets its gradient whole
        ctx.save_for_backward(x, w_low, hw, hb, rows)
        ctx.form = form
        return F.linear(x, w_low, None if b is None else b.to(x.dtype))

    @staticmethod
    def backward(ctx, gy):
        x, w_low, hw, hb, rows = ctx.saved_tensors
        gx, gb, each = gy @ w_low if ctx.needs_input_grad[0] else None, None, None
        if not ctx.needs_input_grad[1]:
            return gx, None, None, None, None, linear_values(gy, x, hw, hb), None, None, None
        x, gy = x.reshape(len(x), -1, x.shape[-1]), gy.reshape(len(gy), -1, gy.shape[-1])
        gw, values = contract(gy, x, hw, ctx.form)
        if hb is not None:
            gb_BO = gy.sum(1, dtype=hb.dtype)
            gb, values = gb_BO.sum(0), values + gb_BO @ hb.t()
        if ctx.needs_input_grad[6]:
            each = (gy[..., rows].mT @ x.to(gy.dtype)).to(hw.dtype)
        return gx, gw, gb, None, None, values, each, None, None


def linear_values(gy, x, hw, hb):
    """(B, K) without the weight gradient: one matmul of the layer's size for each target."""
    x, gy = x.reshape(len(x), -1, x.shape[-1]).to(gy.dtype), gy.reshape(len(gy), -1, gy.shape[-1])
    values = torch.stack([token_values(gy, x, h).sum(1) for h in hw], 1)
    return values if hb is None else values + gy.sum(1, dtype=hb.dtype) @ hb.t()


def linear(x, weight, bias, ledger):
    """F.linear for x (B, ..., I); the gradient of ledger (B, K) gains <weight and bias gradient of chunk b, direction k>. A weight of
    more dimensions (O, ...) stands for the matrix it flattens to (shapley/wrap.py: convolutions)."""
    if isinstance(ledger, Tape):
        return ledger.watch(
            F.linear(x, weight, bias),
            lambda gy, x: linear_values(gy, x, weight.h, getattr(bias, "h", None)),
            x,
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    each, rows = getattr(weight, "each", None), getattr(weight, "rows", None)
    return _Linear.apply(
        x,
        weight.flatten(1),
        bias,
        weight.h.flatten(2),
        getattr(bias, "h", None),
        ledger,
        each,
        rows,
        FORM,
    )


# --- y = W[idx] ---------------------------------------------------------------


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, idx, w, h, ledger, each, rows):
        ctx.save_for_backward(idx, h, rows)
        return F.embedding(idx, w)

    @staticmethod
    def backward(ctx, gy):
        idx, h, rows = ctx.saved_tensors
        gy, idx = gy.reshape(len(idx), -1, gy.shape[-1]), idx.reshape(len(idx), -1)
        gw, each = (
            torch.ops.aten.embedding_dense_backward(gy, idx, h.shape[1], -1, False)
            if ctx.needs_input_grad[1]
            else None,
            None,
        )
        if ctx.needs_input_grad[4]:
            place = torch.searchsorted(rows, idx.contiguous()).clamp(max=len(rows) - 1)  # (B, T)
            found = (rows[place] == idx)[..., None]
            place = (
                place + len(rows) * torch.arange(len(idx), device=idx.device)[:, None]
            )  # each chunk has rows of its own
            each = gy.new_zeros(len(idx) * len(rows), gy.shape[-1]).index_add_(
                0, place.flatten(), (gy * found).flatten(0, 1)
            )
            each = each.view(len(idx), len(rows), -1)
        return None, gw, None, embedding_values(gy, idx, h), each, None


def embedding_values(gy, idx, h):
    """(B, K): the rows of the direction that the chunk used, against the gradient of what it read."""
    return torch.stack(
        [torch.linalg.vecdot(F.embedding(idx, h_k).flatten(1), gy.flatten(1)) for h_k in h], 1
    )


def embedding(idx, weight, ledger):
    """F.embedding for idx (B, ...), with the values as in `linear`."""
    if isinstance(ledger, Tape):
        return ledger.watch(
            F.embedding(idx, weight), lambda gy, idx: embedding_values(gy, idx, weight.h), idx
        )
    return _Embedding.apply(
        idx, weight, weight.h, ledger, getattr(weight, "each", None), getattr(weight, "rows", None)
    )


# --- y = (x - mean) / std * w + b ---------------------------------------------


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, hw, hb, ledger, each, eps):
        y, mean, rstd = torch.native_layer_norm(x, w.shape, w, b, eps)
        ctx.save_for_backward(x, mean, rstd, w, b, hw, hb)
        return y

    @staticmethod
    def backward(ctx, gy):
        x, mean, rstd, w, b, hw, hb = ctx.saved_tensors
        gx = torch.ops.aten.native_layer_norm_backward(
            gy.contiguous(), x, w.shape, mean, rstd, w, b, [True, False, False]
        )[0]
        gw_BC = layer_norm_grad(gy, x, mean, rstd)
        values, gb = gw_BC @ hw.t(), None
        if b is not None:
            gb_BC = over_tokens(gy)
            gb, values = gb_BC.sum(0), values + gb_BC @ hb.t()
        return (
            gx,
            gw_BC.sum(0),
            gb,
            None,
            None,
            values,
            gw_BC if ctx.needs_input_grad[6] else None,
            None,
        )


def layer_norm_grad(gy, x, mean, rstd):
    """The weight's gradient of each chunk, (B, C)."""
    return over_tokens(torch.sub(x, mean).mul_(rstd).mul_(gy))


def over_tokens(x):
    """(B, ..., C) -> (B, C)"""
    return x.reshape(len(x), -1, x.shape[-1]).sum(1)


def layer_norm(x, weight, bias, eps, ledger):
    """F.layer_norm over the last dimension of x (B, ..., C), with the values as in `linear`. Runs in the weight's dtype.
    The gradient of weight.each (B, C), if there is one, gains the weight gradient of each chunk."""
    if isinstance(ledger, Tape):
        x = x.to(weight.dtype)
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)

        def values(gy, x, mean, rstd):
            of_weight = layer_norm_grad(gy, x, mean, rstd) @ weight.h.t()
            return of_weight if bias is None else of_weight + over_tokens(gy) @ bias.h.t()

        return ledger.watch(y, values, x, mean, rstd)
    return _LayerNorm.apply(
        x.to(weight.dtype),
        weight,
        bias,
        weight.h,
        getattr(bias, "h", None),
        ledger,
        getattr(weight, "each", None),
        eps,
    )
