"""The head and its mean cross-entropy, a chunk at a time: its logits, their gradient, the values.

So the logits of a whole batch, the largest tensor of a step, never exist. Without it:
ghost.linear, then F.cross_entropy. The gradient is computed in the forward, for the loss is a
scalar that only scales it; so do Liger Kernel and Wijmans et al. (arXiv 2411.09009).

Shape suffixes as in ghost.py: B chunks, T tokens of a chunk, I in-features, O words, K targets,
R exact rows of the weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from shapley.contract import accumulate, linear_products, linear_values, opaque, tiles
from shapley.ghost import Tape, autocast, direction, has_squares

# chunked: as above; whole: as any Linear. auto: chunked on CPU from 2^24 logits on, where it takes
# a fifth less time (bench/kernels.py), else whole, for nobody has timed it on a GPU yet
FORM = "auto"


def logit_grads(x_BTI, w_OI, y_BT, dtype):
    """Yields for each chunk the sum of its token losses, its gradient with respect to the logits
    (T, O), in the same memory each time, and the chunk's x (T, I)."""
    T = y_BT.shape[1]
    token = torch.arange(T, device=x_BTI.device)
    logits = x_BTI.new_empty(T, len(w_OI))
    for x_TI, y_T in zip(x_BTI, y_BT):
        torch.mm(x_TI, w_OI.t(), out=logits)
        p = logits.to(dtype)
        torch.log_softmax(p, 1, out=p)
        # it also refuses a y that is no word
        loss = F.nll_loss(p, y_T, ignore_index=-1, reduction="sum")
        p.exp_()[token, y_T] -= 1
        p[y_T < 0] = 0
        yield loss, p.to(x_BTI.dtype), x_TI


def head_grad(
    x_BTI: Tensor,
    w_OI: Tensor,
    y_BT: Tensor,
    h_KOI: Tensor,
    exact_rows: Tensor | None,
    squares: bool,
) -> list[Tensor]:
    """The sum of each chunk's token losses (B,), and what the backward of the sum of them all will
    be: of x, of W, of the ledger (B, K), and of each chunk alone the exact rows of W's (B, R, I),
    empty without exact rows. squares: the ledger is (B, K + 1), as in a second pass, and W's is
    empty."""
    w_low = w_OI.to(x_BTI.dtype)
    results = empty_head_grad(x_BTI, w_OI, y_BT, h_KOI, exact_rows, squares)
    sum_B, gx_BTI, gw_OI, values_BK, per_chunk = results
    after_BK = values_BK.zero_()  # what the values of the chunks so far add up to
    chunks = logit_grads(x_BTI, w_low, y_BT, h_KOI.dtype)
    for b, (loss, gy_TO, x_TI) in enumerate(chunks):
        sum_B[b] = loss
        torch.mm(gy_TO, w_low, out=gx_BTI[b])
        if exact_rows is not None:
            per_chunk[b] = gy_TO[:, exact_rows].t() @ x_TI
        if squares:
            values_BK[b] = linear_products(gy_TO[None], x_TI[None], h_KOI)[0]
            continue
        for rows, h_K in tiles(h_KOI):
            products = accumulate(gw_OI[rows], gy_TO[:, rows].t(), x_TI, h_K, is_first=b == 0)
            for k, product in enumerate(products):
                after_BK[b, k] += product
    if not squares:
        values_BK = torch.diff(after_BK, dim=0, prepend=torch.zeros_like(after_BK[:1]))
    return [sum_B, gx_BTI, gw_OI, values_BK, per_chunk]


def empty_head_grad(x_BTI, w_OI, y_BT, h_KOI, exact_rows, squares):
    B, _, I = x_BTI.shape
    K = h_KOI.shape[0]
    # len(exact_rows) would compile anew for every number of them
    per_chunk_shape = 0 if exact_rows is None else (B, exact_rows.shape[0], I)
    return [
        h_KOI.new_empty(B),
        torch.empty_like(x_BTI),
        h_KOI.new_empty(0 if squares else w_OI.shape),
        h_KOI.new_empty(B, K + squares),
        h_KOI.new_empty(per_chunk_shape),
    ]


head = opaque(head_grad, empty_head_grad)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, y, h, ledger, per_chunk, exact_rows):
        ctx.squares = ledger is not None and has_squares(ledger, h)
        chunk_sum, *grads = head(x, w, y, h, exact_rows, ctx.squares)
        ctx.save_for_backward(*grads)
        n_labels = (y >= 0).sum(1)
        ctx.n_labels = n_labels.sum().clamp(min=1)
        chunk_loss = chunk_sum / n_labels.clamp(min=1)
        ctx.mark_non_differentiable(chunk_loss)
        return chunk_sum.sum() / ctx.n_labels, chunk_loss

    @staticmethod
    def backward(ctx, g, _):
        gx, gw, values, per_chunk = ctx.saved_tensors
        scale = g / ctx.n_labels
        if ctx.squares:
            values = torch.cat([values[:, :-1], values[:, -1:] * scale], 1)
            return gx * scale, None, None, None, values * scale, None, None
        grads = (gx, gw, None, None, values, per_chunk, None)
        scaled = [
            grad * scale if needed else None for grad, needed in zip(grads, ctx.needs_input_grad)
        ]
        return tuple(scaled)


def is_chunked(x, weight, ledger):
    """Whether `loss` below is to be used: FORM's choice, where there is a ledger."""
    assert FORM in ("auto", "chunked", "whole"), FORM
    if ledger is None or FORM == "whole":
        return False
    n_logits = x[..., 0].numel() * len(weight)
    return FORM == "chunked" or (x.device.type == "cpu" and n_logits > 2**24)


def loss(x, weight, y, ledger):
    """F.cross_entropy(F.linear(x, weight), y) of x (B, T, I), y (B, T) in [0, O), or -1 where
    nothing is to be predicted, and each chunk's mean loss (B,), of which no gradient is taken; both
    are 0 where there is no label. With the values as in ghost.linear."""
    x = autocast(x)
    if ledger is None:
        no_direction = weight.new_empty(0, *weight.shape)
        return _Head.apply(x, weight, y, no_direction, None, None, None)
    if isinstance(ledger, Tape):
        of_batch, of_chunks = loss(x, weight, y, ledger.first)

        def values(g, x, y, squares):  # the logits once more, which costs less than keeping them
            scale = g / (y >= 0).sum().clamp(min=1)
            of_chunk = []
            for _, gy, x_TI in logit_grads(x, weight.to(x.dtype), y, weight.dtype):
                gy = (gy * scale)[None]
                of_chunk.append(linear_values(gy, x_TI[None], direction(weight), None, squares))
            return torch.cat(of_chunk)

        return ledger.watch(of_batch, values, x, y), of_chunks
    per_chunk = getattr(weight, "per_chunk", None)
    exact_rows = getattr(weight, "exact_rows", None)
    return _Head.apply(x, weight, y, direction(weight), ledger, per_chunk, exact_rows)
