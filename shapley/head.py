"""The head and its mean cross-entropy, a chunk at a time: its logits, their gradient at once, and the values. So the logits of a whole batch, the
largest tensor of a step, never exist. Without it: ghost.linear, then F.cross_entropy.

Shape suffixes as in ghost.py: B chunks, T tokens of a chunk, I in-features, O words, K targets, R kept rows of the weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from shapley.ghost import Tape, accumulate, linear_values, opaque, tiles

# chunked: as above; whole: as any Linear. auto: chunked on CPU from 2^24 logits on (a fifth less time: bench/kernels.py), else whole, for nobody
# has timed it on a GPU yet.
FORM = "auto"


def logit_grads(x_BTI, w_OI, y_BT, dtype):
    """Chunk by chunk its mean loss, the gradient of the sum of its token losses with respect to its logits, (T, O) in the same
    memory each time, and its x (T, I)."""
    token, logits = (
        torch.arange(y_BT.shape[1], device=x_BTI.device),
        x_BTI.new_empty(y_BT.shape[1], len(w_OI)),
    )
    for x_TI, y_T in zip(x_BTI, y_BT):
        torch.mm(x_TI, w_OI.t(), out=logits)
        p = logits.to(dtype)
        torch.log_softmax(p, 1, out=p)
        loss = F.nll_loss(p, y_T)  # which also refuses a y that is no word
        p.exp_()[token, y_T] -= 1
        yield loss, p.to(x_BTI.dtype), x_TI


def head_grad(
    x_BTI: Tensor, w_OI: Tensor, y_BT: Tensor, h_KOI: Tensor, rows: Tensor | None
) -> list[Tensor]:
    """Each chunk's mean loss (B,), and what the backward of the sum of all token losses will be: of x, of W, the values
    (B, K), and of each chunk alone the rows (R,) of W's, (B, R, I), empty without rows.

    The gradient is computed in the forward, for the loss is a scalar that only scales it; so do Liger Kernel and Wijmans et al. (arXiv 2411.09009).
    """
    w_low = w_OI.to(x_BTI.dtype)
    loss_B, gx_BTI, gw_OI, after_BK, each = _head_fake(x_BTI, w_OI, y_BT, h_KOI, rows)
    after_BK.zero_()
    for b, (loss, gy_TO, x_TI) in enumerate(logit_grads(x_BTI, w_low, y_BT, h_KOI.dtype)):
        loss_B[b] = loss
        torch.mm(gy_TO, w_low, out=gx_BTI[b])
        if rows is not None:
            each[b] = gy_TO[:, rows].t() @ x_TI
        for o, tile, h_K in tiles(gw_OI, h_KOI):
            for k, product in enumerate(accumulate(tile, gy_TO[:, o].t(), x_TI, h_K, b == 0)):
                after_BK[b, k] += product
    return [
        loss_B,
        gx_BTI,
        gw_OI,
        torch.diff(after_BK, dim=0, prepend=torch.zeros_like(after_BK[:1])),
        each,
    ]


def _head_fake(x_BTI, w_OI, y_BT, h_KOI, rows):
    (B, _, I), new = x_BTI.shape, h_KOI.new_empty
    each = new(
        0 if rows is None else (B, rows.shape[0], I)
    )  # len(rows) would compile anew for every number of them
    return [new(B), torch.empty_like(x_BTI), new(w_OI.shape), new(B, h_KOI.shape[0]), each]


head = opaque(head_grad, _head_fake)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, y, h, ledger, each, rows):
        chunk_loss, *grads = head(x, w, y, h, rows)
        ctx.save_for_backward(*grads)
        ctx.tokens = y.numel()
        ctx.mark_non_differentiable(chunk_loss)
        return chunk_loss.mean(), chunk_loss

    @staticmethod
    def backward(ctx, g, _):
        grads = (
            *ctx.saved_tensors[:2],
            None,
            None,
            *ctx.saved_tensors[2:],
            None,
        )  # of x, w, ledger, each
        return tuple(
            grad * (g / ctx.tokens) if needed else None
            for grad, needed in zip(grads, ctx.needs_input_grad)
        )


def chunked(x, weight, ledger):
    """Whether `loss` below is to be used: FORM's choice, where there is a ledger."""
    assert FORM in ("auto", "chunked", "whole"), FORM
    large = x.device.type == "cpu" and x[..., 0].numel() * len(weight) > 2**24
    return ledger is not None and (FORM == "chunked" or (FORM == "auto" and large))


def loss(x, weight, y, ledger):
    """F.cross_entropy(F.linear(x, weight), y) of x (B, T, I), y (B, T) in [0, O), and each chunk's mean loss (B,), of which no
    gradient is taken; with the values as in `linear`."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if isinstance(ledger, Tape):
        loss, chunk_loss = _Head.apply(
            x, weight, y, weight.new_empty(0, *weight.shape), None, None, None
        )

        def values(g, x, y):  # the logits once more, which costs less than keeping them
            chunks = logit_grads(x, weight.to(x.dtype), y, weight.dtype)
            return torch.cat(
                [linear_values(gy[None], x_TI[None], weight.h, None) for _, gy, x_TI in chunks]
            ) * (g / y.numel())

        return ledger.watch(loss, values, x, y), chunk_loss
    return _Head.apply(
        x, weight, y, weight.h, ledger, getattr(weight, "each", None), getattr(weight, "rows", None)
    )
