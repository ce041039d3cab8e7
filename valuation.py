"""The accountant: what did each chunk of this step's batch do to the targets' loss?

A step is a game whose players are the chunks of the global batch; chunk i's value for target k is <x_i, h_k> nats, where
x_i is the gradient of its share of the training loss and h_k the rule's direction (positive: it lowered the target's loss):

    rule          direction                                          source
    sgd           lr kappa g_k                                       Wang et al., arXiv 2406.11011, eq. 5
    adamw_linear  lr kappa b g_k / (sqrt(c max(v, floor)) + eps)     Ding et al., arXiv 2602.00329, with a floor on v

g_k is the target's gradient at the weights before the step, kappa the step's clip coefficient, v AdamW's second moment
before the step, and with t = 1, 2, ... b = (1 - b1) / (1 - b1^t), c = b2 / (1 - b2^t), d = (1 - b2) / (1 - b2^t).
floor = 1e-2 x the mean of v over the tensor: where v is near zero (rare embedding rows, dead units) the formula is unbounded.
At t = 1 there is no v at all. The target's own gradient stands in for the batch's: the denominator is
sqrt(d max(g_k^2, floor)) + eps, with floor = 1e-2 x the mean of g_k^2, which is the step AdamW would take on g_k.

The scalars (lr, b, kappa) multiply the values, not the direction: kappa is known only after the backward.
Works on any nn.Module made of ghost.py's ops. Shape suffixes: B chunks of the global batch, b of a micro-batch, K targets.
"""

import time

import numpy as np
import torch

import ledger as books

RULES = ("off", "sgd", "adamw_linear")
FLOOR = 1e-2
BLOCK = 2**18  # elements of a direction worked on at a time on CPU, so that its passes stay in cache


def denominator(v, scale, floor, eps):
    """sqrt(scale * max(v, floor)) + eps, for a block of the second moment."""
    return v.clamp(min=floor).mul_(scale).sqrt_().add_(eps)


def blocks(*tensors):
    """Matching flat pieces of equally shaped tensors: cache-sized on CPU, whole elsewhere (a kernel launch costs more)."""
    size = BLOCK if tensors[0].device.type == "cpu" else max(1, tensors[0].numel())
    return zip(*(t.view(-1).split(size) for t in tensors))


class Valuation:
    def __init__(
        self,
        model,
        optimizer,
        loss,
        targets,
        rule,
        batch,
        n_chunks,
        run,
        target_batch=1,
        target_sampling="redraw",
        target_interval=1,
        micro_batch=0,
        seed=0,
        info=None,
        step=0,
        state=None,
    ):
        """model: built of ghost ops; loss(X, Y) -> its mean token loss on a batch of a target, a scalar tensor.
        targets: objects with name, ids, len() and batch(picks) -> X, Y (data.Target). batch: B. run: the folder written to.
        A target's gradient comes from target_batch of its chunks, in slices of micro_batch (0: at once), every target_interval
        steps. info: more entries for values.json. step, state: where to go on (state_dict's), reading the ledger back up to there.
        """
        assert rule in RULES
        self.model, self.optimizer, self.loss, self.targets, self.rule = model, optimizer, loss, targets, rule
        self.batch, self.run, self.seed, self.step = batch, run, seed, step
        self.target_batch, self.sampling, self.interval, self.micro_batch = target_batch, target_sampling, target_interval, micro_batch
        self.on = rule != "off"
        self.seconds = 0.0  # spent in open and close since take_seconds
        self.micro, self.pending, self.recent = [], [], []  # micro-batches of this step, closed steps, visits flushed
        if not self.on:
            return
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        K = len(targets)
        self.visits = books.Records(run / "ledger.npy", books.visit_dtype(K), step * batch)
        self.books = books.Records(run / "books.npy", books.book_dtype(K), step)
        self.total, self.used = np.zeros((n_chunks, K)), np.zeros(n_chunks, bool)
        if step:
            books.add_visits(books.read_visits(run), self.total, self.used)
        self.info = dict(schema=books.SCHEMA, sign="positive = lowered the target's loss", unit="nats", rule=rule, batch=batch, **(info or {}))
        self.info["targets"] = [self.describe(k) for k in range(K)]
        self.before = None  # (K,) the targets' losses where their gradients were taken
        self.grads = None  # per parameter (K, *shape): the targets' gradients; the directions themselves unless reused
        if state:
            self.before, self.grads = state["before"], state["grads"]
        if step:
            self.commit()  # a crash between values.npy and the checkpoint left them apart

    # -------------------------------------------------------------------------
    # targets and directions

    def picks(self, k, step):
        """Which of target k's chunks speak for it at a step: a pure function of (seed, k, step)."""
        n = len(self.targets[k])
        draw = step if self.sampling == "redraw" else 0
        return np.random.default_rng((self.seed, k, draw)).choice(n, min(n, self.target_batch), replace=False)

    def describe(self, k):
        target = self.targets[k]
        entry = dict(name=target.name, chunks=len(target), source="text" if target.ids is None else "val.npy")
        if self.sampling == "fixed":
            picks = self.picks(k, 0)
            entry["ids"] = (picks if target.ids is None else target.ids[picks]).tolist()
        else:
            every = f"every {self.interval} steps " if self.interval > 1 else "every step "
            how = f"numpy.random.default_rng(({self.seed}, {k}, step)).choice({len(target)}, {min(len(target), self.target_batch)}, replace=False)"
            entry["drawn"] = every + how + " of the target's chunks, in order of their ids"
        return entry

    def target_gradients(self, step):
        """Sets self.grads, per parameter (K, *shape), and self.before (K,). Leaves no .grad behind, and dropout off meanwhile."""
        K, losses, grads = len(self.targets), [], None
        was_training = self.model.training
        self.model.eval()
        if K == 1:  # the new gradients take the place of the old directions
            self.grads = None
            for p in self.params:
                p.h = None
        for k, target in enumerate(self.targets):
            X, Y = target.batch(self.picks(k, step))
            tokens, size, total = (Y >= 0).sum(), self.micro_batch or len(X), 0.0
            for i in range(0, len(X), size):
                share = (Y[i : i + size] >= 0).sum() / tokens
                loss = self.loss(X[i : i + size], Y[i : i + size])
                (loss * share).backward()
                total = total + loss.detach() * share
            losses.append(total)
            if K == 1:
                grads = [p.grad[None] for p in self.params]
            else:
                grads = grads or self.grads or [p.new_empty(K, *p.shape) for p in self.params]
                for g, p in zip(grads, self.params):
                    g[k] = p.grad
            for p in self.params:
                p.grad = None
        self.model.train(was_training)
        self.grads, self.before = grads, torch.stack(losses)

    def directions(self):
        """Sets each parameter's .h, (K, *shape), from self.grads; returns the scalar to multiply the values by, but lr and kappa."""
        if self.rule == "sgd":
            for p, g in zip(self.params, self.grads):
                p.h = g
            return 1.0
        group = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        t = 1 + next((int(state["step"]) for state in self.optimizer.state.values()), 0)
        b, c, d = (1 - beta1) / (1 - beta1**t), beta2 / (1 - beta2**t), (1 - beta2) / (1 - beta2**t)
        for p, g in zip(self.params, self.grads):
            h = g  # in place, unless the gradient serves again
            if self.interval > 1:
                h = p.h if getattr(p, "h", None) is not None else torch.empty_like(g)
            eps, state = self.groups[p]["eps"], self.optimizer.state.get(p)
            v = state["exp_avg_sq"] if state else None
            for k in range(len(self.targets)):
                if v is not None:
                    floor = FLOOR * v.mean()
                    for h_n, g_n, v_n in blocks(h[k], g[k], v):
                        torch.div(g_n, denominator(v_n, c, floor, eps), out=h_n)
                else:
                    floor = FLOOR * g[k].square().mean()
                    for h_n, g_n in blocks(h[k], g[k]):
                        torch.div(g_n, denominator(g_n.square(), d, floor, eps), out=h_n)
            p.h = h
        return b

    # -------------------------------------------------------------------------
    # a step: open, one ledger for each micro-batch, close

    def open(self, step, lr):
        """Before the step's first backward: the targets' gradients at the present weights -> directions."""
        if not self.on:
            return
        began = time.perf_counter()
        self.step, self.lr = step, lr
        if self.grads is None or step % self.interval == 0:
            self.target_gradients(step)
        self.scale = lr * self.directions()
        self.seconds += time.perf_counter() - began

    def ledger(self, ids):
        """ids (b,) of the next micro-batch -> zeros (b, K) for the model, whose gradient will be the values; None when off."""
        if not self.on:
            return None
        self._collect()
        p = self.params[0]
        ledger = torch.zeros(len(ids), len(self.targets), dtype=p.dtype, device=p.device, requires_grad=True)
        self.micro.append([ids, ledger, None])
        return ledger

    def _collect(self):
        """The chunks' losses of the micro-batch just done, before the next forward replaces them."""
        if self.micro:
            self.micro[-1][2] = self.model.chunk_loss

    def close(self, kappa=1.0):
        """After the optimizer's step. kappa: the clip coefficient, a number or a tensor. Nothing is read off the device yet."""
        if not self.on:
            return
        began = time.perf_counter()
        self._collect()
        ids = np.concatenate([m[0] for m in self.micro])
        values = torch.cat([m[1].grad for m in self.micro]) * (self.scale * kappa)
        losses = torch.cat([m[2] for m in self.micro])
        self.pending.append((self.step, self.lr, kappa, ids, losses, values, self.before))
        self.micro = []
        self.step += 1
        self.seconds += time.perf_counter() - began

    def flush(self):
        """Takes the closed steps off the device. Raises ValueError at the first loss or value that is not finite."""
        for step, lr, kappa, ids, losses, values, before in self.pending:
            visits = np.zeros(len(ids), self.visits.dtype)
            visits["step"], visits["chunk"] = step, ids
            visits["loss"], visits["value"] = losses.float().cpu().numpy(), values.float().cpu().numpy()
            bad = ~(np.isfinite(visits["loss"]) & np.isfinite(visits["value"]).all(1))
            if bad.any():
                what = "loss" if not np.isfinite(visits["loss"]).all() else "value"
                raise ValueError(
                    f"step {step}: the {what} of chunks {', '.join(map(str, ids[bad]))} is not finite. Lower --learning_rate, or look at these chunks"
                )
            book = books.empty_book(len(self.targets))
            book["step"], book["lr"], book["kappa"], book["loss"] = step, lr, float(kappa), visits["loss"].mean(dtype=np.float64)
            book["before"], book["data"] = before.float().cpu().numpy(), visits["value"].sum(0, dtype=np.float64)
            self.visits.append(visits)
            self.books.append(book)
            self.recent.append(visits)
            books.add_visits(visits, self.total, self.used)
        self.pending = []

    def take_recent(self):
        """The visits flushed since the last call."""
        recent, self.recent = self.recent, []
        return np.concatenate(recent) if recent else None

    def take_seconds(self):
        """Seconds spent in open and close since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    # -------------------------------------------------------------------------
    # what a checkpoint needs

    def commit(self):
        """Puts everything closed so far on disk: ledger.npy, books.npy, then values.npy and values.json, which speak of it."""
        if not self.on:
            return
        self.flush()
        self.visits.commit()
        self.books.commit()
        books.write_values(self.run, self.total, self.used)
        books.write_json(self.run / "values.json", dict(self.info, committed_step=self.step))

    def state_dict(self):
        """What cannot be recomputed from the weights at the next step: gradients that are still to be reused."""
        return dict(before=self.before, grads=self.grads) if self.on and self.interval > 1 else {}
