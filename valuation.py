"""The accountant: what did each chunk of this step's batch do to the targets' loss?

A step is a game whose players are the chunks of the global batch; chunk i's value for target k is <x_i, h_k> nats, where x_i is the gradient of
its share of the training loss and h_k the rule's direction, times lr (shapley/directions.py). Positive: it lowered the target's loss. The first
EARLY steps are marked in the ledger: every rule is rough there.

Clipping depends on the whole batch, so a chunk has a part in it. Two-pass rules know it; `adamw` corrects its values d_i afterwards, with
q_i = <x_i, g> over what was kept of each chunk's gradient (it does as well as over all weights: experiments/fidelity.py), kappa the clip coefficient:
    value_i = kappa (1 + ln(1/kappa)) d_i - kappa ln(1/kappa) (sum_j d_j) q_i / sum_j q_j

Books, of measured steps and per target, in nats:
    before - after = data + momentum + decay + residual,  data = sum_i value_i, momentum = lr <g_k, D(0)>, decay = lr wd <g_k, w>
with g_k halfway between w and w_empty in the last two. A measured step costs the targets' pass once more, and two forwards.

Works on any nn.Module made of ghost.py's ops; shapley/wrap.py makes one. Shape suffixes: B chunks of the global batch, b of a micro-batch, K targets.
"""

import contextlib
import time
from functools import partial, wraps
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from shapley import exact, ghost
from shapley.directions import TWO_PASS, Directions
from shapley.sweeps import TINY, displacement
from system import files, parallel, store, terminal
from system.errors import UserError
from system.files import crc32
from system.machine import replaying, rng_state
from system.parallel import local

EARLY = 3


def accounted(method):
    """Nothing happens where valuation is off; else its seconds count."""

    @wraps(method)
    def timed(self, *args, **kwargs):
        if self.on:
            began = time.perf_counter()
            method(self, *args, **kwargs)
            self.seconds += time.perf_counter() - began

    return timed


def host(x):
    return torch.as_tensor(x).double().cpu().numpy()


def checksum_of(target):
    """Of a target whose chunks may change under its name; None of any other."""
    return target.checksum() if hasattr(target, "checksum") else None


def settle(columns, K, lr, kappa):
    """What a step left, (B, K + 1 or K + 3): <x_i, h_k>, losses, and of kept rows <x_i, g> and |x_i|^2 -> values (B, K) nats, losses (B,),
    |x_i|^2 (B,) or NaN."""
    values, losses = columns[:, :K] * (lr * kappa), columns[:, K]
    if columns.shape[1] == K + 1:
        return values, losses, np.nan
    q, squares = columns[:, K + 1 :].T
    return (
        values - np.log(kappa) * (values - values.sum(0) * (q / max(q.sum(), TINY))[:, None]),
        losses,
        squares,
    )


class Valuation:
    def __init__(
        self, model, optimizer, loss, targets, rule, batch, n_chunks, run,
        target_batch=1, target_sampling="redraw", target_interval=1, micro_batch=0, seed=0, grad_clip=0.0, compile=False,
        book_interval=1, audit_interval=0, audit_permutations=200, domains=None, info=None, step=0, state=None,
    ):  # fmt: skip
        """model: built of ghost ops; loss(X, Y, ledger=None) -> its mean loss on a batch of a target, a scalar tensor. targets: objects with name,
        ids, len() and batch(picks) -> arrays X, Y (n, ...), of -1 or NaN where there is no label (data.Target, shapley/wrap.Examples). batch: B. run:
        the folder written to, or None. A target's gradient comes from target_batch of its chunks, in slices of micro_batch (0: at once), every
        target_interval steps (0: where .grads is None). compile: the model is compiled, and so are the sweeps. The books are measured every
        book_interval steps (0: never), the step audited every audit_interval (0: never; by every subset up to 12 chunks, else by
        audit_permutations), clipping by grad_clip. domains: per chunk of the training data its domain, if momentum is to be credited to domains.
        info: more entries for values.json. step, state: where to go on (state_dict's), reading the ledger back up to there.
        """
        self.model, self.optimizer, self.loss, self.targets, self.rule = (
            model,
            optimizer,
            loss,
            targets,
            rule,
        )
        self.batch, self.run, self.seed, self.step, self.grad_clip, self.compile = (
            batch,
            run,
            seed,
            step,
            grad_clip,
            compile,
        )
        self.target_batch, self.sampling, self.interval, self.micro_batch = (
            target_batch,
            target_sampling,
            target_interval,
            micro_batch,
        )
        self.book_interval, self.audit_interval, self.audit_permutations = (
            book_interval,
            audit_interval,
            audit_permutations,
        )
        self.on = rule != "off"
        self.records, self.total, self.used = {}, None, None
        self.seconds = 0.0  # spent in open, before_step and close
        self.micro, self.pending, self.ops = (
            [],
            [],
            {},
        )  # micro-batches of this step, closed steps, a tape's ops by the shape of X
        if not self.on:
            return
        self.directions = d = Directions(
            model, optimizer, rule, batch, len(targets) == target_interval == 1, compile
        )
        self.params, self.seen, self.sharded = d.params, d.seen, d.sharded
        self.groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        self.dropout = any(
            isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
        )
        self.domains, n_domains = domains, 0 if domains is None else int(domains.max()) + 1
        K = len(targets)
        self.dtypes = dict(
            ledger=store.visit_dtype(K),
            books=store.book_dtype(K, n_domains),
            audit=store.audit_dtype(K),
        )
        if run and parallel.rank() == 0:  # the one that writes
            counted, names = (
                state["records"] if state else {},
                ["ledger", "books", "audit"][: 3 if audit_interval else 2],
            )
            self.records = {
                name: store.Records(run / f"{name}.npy", self.dtypes[name], counted.get(name))
                for name in names
            }
            self.total, self.used = np.zeros((n_chunks, K)), np.zeros(n_chunks, bool)
            if step:
                store.add_visits(store.read(run), self.total, self.used)
            self.files = (
                {"chunks.npy": crc32(run / "chunks.npy")} if (run / "chunks.npy").is_file() else {}
            )
        self.info = dict(
            schema=store.SCHEMA,
            sign="positive = lowered the target's loss",
            unit="nats",
            rule=rule,
            batch=batch,
            **(info or {}),
        )
        self.info |= (
            dict(
                grad_norm_over=[
                    n + ", rows of the batch's tokens" * hasattr(p, "tokens")
                    for n, p in d.keeping.items()
                ]
            )
            if d.keeping
            else {}
        )
        self.info["targets"] = [self.describe(k) for k in range(K)]
        self.grads = None  # per parameter (K, *shape): the targets' gradients; the directions themselves unless reused
        self.domain_momentum = (
            [p.new_zeros(n_domains, *p.shape) for p in self.params] if n_domains else None
        )
        if state:
            self.domain_momentum, grads = (
                [t.to(self.params[0].device) for t in state[key] or ()]
                for key in ("domain_momentum", "grads")
            )
            self.grads = [
                g[:, parallel.mine(g.shape[1])] if self.sharded else g for g in grads
            ] or None
        if step:
            self.commit()  # a crash between values.npy and the checkpoint left them apart

    # --- targets --------------------------------------------------------------

    def picks(self, k, step):
        """Which of target k's chunks speak for it at a step: a pure function of (seed, k, step)."""
        n = len(self.targets[k])
        draw = step if self.sampling == "redraw" else 0
        return np.random.default_rng((self.seed, k, draw)).choice(
            n, min(n, self.target_batch), replace=False
        )

    def describe(self, k):
        target = self.targets[k]
        entry = dict(
            name=target.name,
            chunks=len(target),
            source=getattr(target, "source", "text" if target.ids is None else "val.npy"),
        )
        entry["crc32"] = checksum_of(target)
        if self.sampling == "fixed":
            picks = self.picks(k, 0)
            return entry | dict(ids=(picks if target.ids is None else target.ids[picks]).tolist())
        how = f"numpy.random.default_rng(({self.seed}, {k}, step)).choice({len(target)}, {min(len(target), self.target_batch)}, replace=False)"
        return entry | dict(
            drawn=f"where step % {self.interval} == 0: {how} of the target's chunks, in order of their ids"
        )

    def target_batches(self, k):
        """This rank's part of the chunks that speak for target k at this step, in slices, each with its share of all their labels.
        Every rank has as many slices, for sharded models compute in step: where chunks are wanting, some of share 0."""
        X, Y = self.targets[k].batch(self.picks(k, self.step - self.step % max(1, self.interval)))
        labels = (
            (Y >= 0 if Y.dtype.kind in "iu" else Y == Y).reshape(len(Y), -1).sum(1)
        )  # of each chunk: -1 or NaN is none
        part = parallel.mine(len(X) + -len(X) % parallel.size())
        for i in range(part.start, part.stop, size := self.micro_batch or len(X)):
            own = slice(i, min(i + size, part.stop))
            share = labels[own].sum() / labels.sum()
            own = own if share else [labels.argmax()]
            yield X[own], Y[own], share

    @contextlib.contextmanager
    def evaluating(self):
        was_training = self.model.training
        self.model.eval()
        yield
        self.model.train(was_training)

    @torch.no_grad()
    def target_losses(self):
        """(K,) at the weights as they are."""
        with self.evaluating():
            losses = [
                sum(self.loss(X, Y) * share for X, Y, share in self.target_batches(k))
                for k in range(len(self.targets))
            ]
        return parallel.add([torch.stack(losses)])[0]

    def target_gradient(self, k):
        """Target k's loss at the weights as they are, and its gradient, a tensor a parameter. Leaves no .grad behind; dropout off."""
        total = 0.0
        with self.evaluating():
            for X, Y, share in self.target_batches(k):
                loss = self.loss(X, Y) * share
                (
                    loss * parallel.size() if self.sharded else loss
                ).backward()  # sharded gradients are the ranks' mean already
                total = total + loss.detach()
        grads = [local(g) for g in self.take_grads()]
        parallel.add([total, *([] if self.sharded else grads)])
        return total, grads

    def take_grads(self):
        """The parameters' .grad, which they lose. Raises ValueError if one has none."""
        if unused := [
            name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None
        ]:
            raise UserError(
                f"the loss does not depend on {', '.join(unused)}: freeze it with requires_grad_(False)"
            )
        grads = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        return grads

    def target_gradients(self):
        """Sets self.grads, per parameter (K, *shape), in place of the old directions; returns the losses (K,)."""
        self.grads = None
        for p in self.params if not self.sharded else ():
            p.h = None
        losses, gradients = zip(*map(self.target_gradient, range(len(self.targets))))
        of_one = (
            zip(*gradients)
            if len(gradients) == 1
            else ([g.pop(0) for g in gradients] for _ in self.params)
        )  # never all of them twice
        self.grads = [g[0][None] if len(g) == 1 else torch.stack(g) for g in of_one]
        return torch.stack(losses)

    # --- directions -----------------------------------------------------------

    @contextlib.contextmanager
    def weights_at(self, places):
        """The model with other weights, one tensor a parameter; then, to the bit, its own."""
        weights = [local(p.data).clone() if self.sharded else p.data for p in self.params]
        self.put(places)
        try:
            yield weights
        finally:
            self.put(weights)

    def put(self, weights):
        for p, w in zip(self.params, weights):
            if self.sharded:
                local(p.data).copy_(w)  # FSDP gathers from this memory
            else:
                p.data = w

    def aim(self, batch=None):
        """The targets' gradients where the rule wants them -> each parameter's .h (K, *shape).
        batch: what the optimizer will take, kappa g, a tensor a parameter, for two-pass rules."""
        if self.grads is None or (self.interval and self.step % self.interval == 0):
            if self.rule in TWO_PASS:
                with self.weights_at(self.directions.landings(batch=batch)):
                    self.target_gradients()
            elif self.rule == "adamw" and self.directions.t > 1:
                with self.weights_at(self.directions.landings()):
                    self.target_gradients()
            else:
                self.book["before"] = self.target_gradients()
        for p, g in zip(
            self.params, self.grads
        ):  # directions take the place of gradients, unless these serve again
            if self.sharded:
                p.h.copy_(g)
            else:
                p.h = g if self.interval == 1 or self.rule == "sgd" else g.clone()
        self.directions.of_two(
            batch, self.kappa
        ) if self.rule in TWO_PASS else self.directions.of_one(self.grads)

    def credit(self):
        """What momentum and decay do to the targets' losses at this step, into the book: by the target's gradient halfway between
        the weights and where those two alone would land, so that data's part (from there on) and theirs add up to third order."""
        with self.weights_at(self.directions.landings(0.5)) as weights:
            credits = [
                self.credit_of(self.target_gradient(k)[1], weights)
                for k in range(len(self.targets))
            ]
        self.book |= {
            name: torch.stack(of)
            for name, of in zip(("momentum", "decay", "momentum_by_domain"), zip(*credits))
        }

    @torch.no_grad()
    def credit_of(self, gradients, weights):
        """lr <g_k, D(0)>, lr wd <g_k, w>, and the first by domain where it is followed, for one target's gradient."""
        momentum = decay = by_domain = weights[0].new_zeros(())
        for i, (p, g, w) in enumerate(zip(self.params, gradients, weights)):
            group, g = self.groups[p], self.lr * g.flatten()
            decay = decay + group["weight_decay"] * (g @ w.flatten())
            if not (q := self.directions.scalars(group)):
                continue
            m, v = self.directions.moments(p)
            momentum = momentum + g @ displacement(q, m, v).flatten()
            if self.domain_momentum:
                g = g * displacement(q, torch.ones_like(m), v).flatten()  # a / (sqrt(c v) + eps)
                by_domain = by_domain + self.domain_momentum[i].flatten(1) @ g
        return [
            self.directions.over_ranks(x)
            for x in ((momentum, decay, by_domain) if self.domain_momentum else (momentum, decay))
        ]

    # --- a step: open, one ledger for each micro-batch, before_step, close ----

    @accounted
    def open(self, step, lr, tokens=None):
        """Before the step's first backward: one-pass rules take the targets' gradients and set the directions.
        tokens: the global batch's, an integer array of any shape, for `adamw`; without them it predicts every secant."""
        self.step, self.lr, self.kappa, self.truth = step, lr, 1.0, None
        self.directions.begin(lr, tokens)
        self.book, self.measured = {}, self.book_interval > 0 and step % self.book_interval == 0
        if self.measured:
            self.credit()
        if self.rule not in TWO_PASS:
            self.aim()
        if self.measured and "before" not in self.book:
            self.book["before"] = self.target_losses()

    def ledger(self, ids, X, Y):
        """The next micro-batch's ids (b,) and tokens X, Y (b, T) -> what its forward takes as ledger: zeros (b, K) whose gradient
        will be the values; for two-pass rules a Tape, or None if they will repeat the forward; None when off."""
        if not self.on:
            return None
        self._collect()
        if self.rule in TWO_PASS:
            ledger = (
                None if self.sharded or len(ids) * parallel.size() < self.batch else self.tape(X, Y)
            )
        else:
            ledger = self.zeros(len(ids), len(self.targets))
            for p, g in self.directions.kept.items():
                self.seen[p].each, self.seen[p].rows = (
                    self.zeros(len(ids), *g.shape[1:]),
                    self.directions.rows[p],
                )
        part = SimpleNamespace(
            ids=ids,
            X=X,
            Y=Y,
            ledger=ledger,
            losses=None,
            values=None,
            rng=rng_state() if self.dropout else None,
        )
        part.each, part.added, part.products, part.squares = (
            {},
            0.0,
            0.0,
            0.0,
        )  # of the kept weights
        self.micro.append(part)
        return ledger

    def tape(self, X, Y):
        """For a forward of X, Y. A compiled one's needs the ops, which a tape has seen in eager when the first batch of such a shape comes."""
        if self.compile and X.shape not in self.ops:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), replaying(rng_state()):
                self.loss(X, Y, tape := ghost.Tape())
            self.ops[X.shape] = tape.ops
        return ghost.Tape(self.ops.get(X.shape, ()))

    def zeros(self, *shape):
        p = self.params[0]
        return torch.zeros(shape, dtype=p.dtype, device=p.device, requires_grad=True)

    def _collect(self):
        """What the micro-batch just done left behind, before the next one replaces it."""
        if self.micro and self.micro[-1].ledger is not None and self.micro[-1].losses is None:
            self.micro[-1].losses = self.model.chunk_loss
            self.micro[-1].each = {p: self.seen[p].each.grad for p in self.directions.kept}
            for p in self.directions.kept:
                self.seen[p].each = self.seen[p].rows = None

    @accounted
    def before_step(self, kappa=1.0):
        """Between clipping and the optimizer's step. kappa: the clip coefficient, a number or a tensor. Two-pass rules look at
        the batch's gradient, as the optimizer will take it, and value the chunks; an audit finds the truth of this step."""
        self._collect()
        self.check_batch()
        self.kappa = kappa
        self.directions.value_kept(self.micro)
        if self.rule in TWO_PASS:
            batch = self.take_grads()
            self.aim([local(g) for g in batch])
            self.second_pass()
            for p, g in zip(self.params, batch):
                p.grad = g
        if self.audit_interval and (self.step + 1) % self.audit_interval == 0:
            self.truth = self.solve()
        if self.domain_momentum:
            self.follow_momentum()

    def check_batch(self):
        """Raises UserError where the step's micro-batches are not the batch: a row too few would be
        written as several, with as many times its value."""
        found, wanted = sum(len(part.ids) for part in self.micro), self.batch // parallel.size()
        if found != wanted:
            examples = "1 example" if found == 1 else f"{found} examples"
            cure = "leave a rest out, or give Valuation the batch of this step"
            raise UserError(f"a step of {examples}, but batch={wanted}: {cure}")

    def second_pass(self):
        """The chunks' values under directions that their own backward did not know: from the tape, or forward and backward again."""
        for part in self.micro:
            if part.ledger is not None:
                part.values = part.ledger.values() / parallel.size()
                continue
            for p in self.seen.values():
                p.requires_grad_(False)
            with replaying(part.rng):
                ledger = self.zeros(len(part.ids), len(self.targets))
                loss = self.loss(part.X, part.Y, ledger) * (len(part.ids) / self.batch)
                (part.values,) = torch.autograd.grad(loss, ledger)
                part.losses = self.model.chunk_loss
            for p in self.seen.values():
                p.requires_grad_(True)

    def gradient_of(self, chosen):
        """sum of x_i over the chosen chunks, bool (B,), as in this step's own backward: one tensor a parameter."""
        total, start = [torch.zeros_like(p) for p in self.params], parallel.mine(self.batch).start
        for part in self.micro:
            these = torch.from_numpy(chosen[start : start + len(part.ids)])
            start += len(part.ids)
            if not these.any():
                continue
            these = these.to(part.Y.device)
            with replaying(part.rng):
                # dropout's masks belong to the whole micro-batch
                nothing, others = (
                    np.nan if part.Y.is_floating_point() else -1,
                    ~these.view(-1, *[1] * (part.Y.dim() - 1)),
                )
                X, Y = (
                    (part.X, part.Y.masked_fill(others, nothing))
                    if self.dropout
                    else (part.X[these], part.Y[these])
                )
                loss = self.loss(X, Y)
                grads = torch.autograd.grad(loss * (these.sum() / self.batch), self.params)
            torch._foreach_add_(total, grads)
        return parallel.add(total)

    def solve(self):
        """The truth of this step (exact.py), by the optimizer's own step in float64."""
        progress = partial(terminal.progress, desc=f"audit of step {self.step}", leave=False)
        x = [self.gradient_of(np.arange(self.batch) == i) for i in range(self.batch)]
        drawn, device = self.step - self.step % self.interval, self.params[0].device
        batches = [target.batch(self.picks(k, drawn)) for k, target in enumerate(self.targets)]
        losses = [
            exact.batch_loss(*(torch.as_tensor(a, device=device) for a in batch))
            for batch in batches
        ]
        step = exact.Step(self.model, self.optimizer, x, losses, self.grad_clip)
        values, errors = exact.solve(
            step, self.batch, self.audit_permutations, seed=self.step, progress=progress
        )
        return SimpleNamespace(
            values=values,
            errors=errors,
            alone=exact.leave_one_out(step, self.batch),
            whole=step(np.ones(self.batch, bool)),
        )

    def follow_momentum(self):
        """One AdamW first moment a domain, from the gradient of its chunks: they add up to the optimizer's own."""
        beta1 = self.optimizer.param_groups[0]["betas"][0]
        domains = self.domains[
            parallel.gather(
                torch.from_numpy(np.concatenate([part.ids for part in self.micro]))
            ).numpy()
        ]
        for m in self.domain_momentum:
            m.mul_(beta1)
        for d in np.unique(domains):
            for m, g in zip(self.domain_momentum, self.gradient_of(domains == d)):
                m[d].add_(g * self.kappa, alpha=1 - beta1)

    @accounted
    def close(self):
        """After the optimizer's step. Nothing is read off the device yet."""
        self._collect()
        self.check_batch()
        columns = [
            part.ledger.grad / parallel.size() + part.added if part.values is None else part.values
            for part in self.micro
        ]
        columns = [torch.cat(columns), torch.cat([part.losses for part in self.micro])[:, None]]
        columns += [
            torch.cat([getattr(part, name) for part in self.micro])[:, None]
            for name in ("products", "squares")
            if self.directions.kept
        ]
        if self.measured:
            self.book["after"] = self.target_losses()
        closed = SimpleNamespace(
            step=self.step,
            t=self.directions.t,
            lr=self.lr,
            kappa=self.kappa,
            book=self.book,
            truth=self.truth,
        )
        closed.ids, closed.columns = (
            np.concatenate([part.ids for part in self.micro]),
            torch.cat(columns, 1),
        )
        self.pending.append(closed)
        self.micro = []
        self.step += 1

    def flush(self):
        """Takes the closed steps off the devices of all ranks; returns their visits, books and audits, each an array, None where there
        are none. Raises ValueError at the first loss or value that is not finite."""
        new, K = SimpleNamespace(ledger=[], books=[], audit=[]), len(self.targets)
        if self.pending:  # (steps, B, K + 1 or 3)
            columns = host(
                parallel.gather(torch.stack([closed.columns for closed in self.pending]), 1)
            )
            ids = parallel.gather(
                torch.from_numpy(np.stack([closed.ids for closed in self.pending])), 1
            ).numpy()
        for i, closed in enumerate(self.pending):
            visits = np.zeros(self.batch, self.dtypes["ledger"])
            values, visits["loss"], squares = settle(
                columns[i], K, closed.lr, kappa := float(closed.kappa)
            )
            visits["step"], visits["chunk"], visits["early"] = (
                closed.step,
                ids[i],
                self.rule.startswith("adamw") and closed.t <= EARLY,
            )
            visits["value"], visits["grad_norm"] = values, self.batch * squares**0.5
            bad = ~(np.isfinite(visits["loss"]) & np.isfinite(visits["value"]).all(1))
            if bad.any():
                what = "loss" if not np.isfinite(visits["loss"]).all() else "value"
                chunks = ", ".join(map(str, ids[i][bad]))
                raise UserError(
                    f"step {closed.step}: the {what} of chunks {chunks} is not finite. Lower --learning_rate, or look at these chunks"
                )
            entries = {name: host(x) for name, x in closed.book.items()}
            entries |= dict(
                data=visits["value"].sum(0, dtype=np.float64),
                loss=visits["loss"].mean(dtype=np.float64),
            )
            entries |= dict(step=closed.step, lr=closed.lr, kappa=kappa)
            if "after" in entries:
                entries["residual"] = (
                    entries["before"]
                    - entries["after"]
                    - sum(entries[name] for name in ("data", "momentum", "decay"))
                )
            book = store.empty(self.dtypes["books"])
            for name, x in entries.items():
                book[name] = x
            new.ledger.append(visits)
            new.books.append(book)
            new.audit += [self.compare(closed, values)] if closed.truth else []
        self.pending = []
        for name, records in vars(new).items():
            setattr(new, name, np.concatenate(records) if records else None)
            if records and name in self.records:
                self.records[name].pending.append(getattr(new, name))
        if self.records and new.ledger is not None:
            store.add_visits(new.ledger, self.total, self.used)
        return new

    def compare(self, closed, values):
        """An audited step's record: its values beside the truth, target by target."""
        audit, truth = store.empty(self.dtypes["audit"]), closed.truth
        audit["step"], audit["utility"], audit["efficiency_gap"] = (
            closed.step,
            truth.whole,
            values.sum(0) - truth.whole,
        )
        audit["standard_error"] = np.sqrt((truth.errors**2).mean(0) / (truth.values**2).mean(0))
        for k in range(len(self.targets)):
            for name, figure in exact.agreement(values[:, k], truth.values[:, k]).items():
                audit[name][0, k] = figure
            for name in ("pearson", "spearman"):
                audit["loo_" + name][0, k] = exact.agreement(values[:, k], truth.alone[:, k])[name]
        return audit

    # --- what a checkpoint needs ----------------------------------------------

    def commit(self):
        """Puts everything closed so far on disk: ledger.npy, books.npy, then values.npy and values.json, which speak of it."""
        if not self.on:
            return
        self.flush()
        for records in self.records.values():
            records.commit()
        if self.records:
            sums = {f"{name}.npy": records.counted() for name, records in self.records.items()}
            sums["values.npy"] = store.write_values(self.run, self.total, self.used)
            info = dict(self.info, committed_step=self.step, files=self.files | sums)
            files.write_json(self.run / "values.json", info)

    def state_dict(self):
        """What cannot be recomputed from the weights at the next step: gradients still to be reused, the domains' momentum."""
        if not self.on:
            return {}
        grads = (
            [parallel.gather(g, 1) if self.sharded else g for g in self.grads]
            if self.interval > 1
            else None
        )
        records = {name: records.counted() for name, records in self.records.items()}
        targets = {target.name: checksum_of(target) for target in self.targets}
        return dict(
            grads=grads, domain_momentum=self.domain_momentum, records=records, targets=targets
        )
