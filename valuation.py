"""What did each chunk of a step's batch do to the targets' loss? A valuation is four calls a step.

    valuation = Valuation(model, optimizer, loss, targets, Settings(rule="adamw", batch=8))
    for step in range(max_iters):
        valuation.begin_step(step, lr)                  # one-pass rules set their directions
        ledger = valuation.new_ledger(ids, X, Y)        # goes through the forward, to be valued
        loss(X, Y, ledger).backward()
        valuation.before_update(clip_coef)              # two-pass rules value the chunks now
        optimizer.step()
        optimizer.zero_grad()
        valuation.end_step()
    valuation.commit()

A step is a game whose players are the chunks of the global batch. Its loss is a weighted mean of
theirs (shapley/labels.py). Chunk i's value for target k is <x_i, h_k> nats: x_i is the gradient of
its part of the step's loss, h_k the rule's direction times lr (shapley/directions.py). Positive: it
lowered the target's loss. The first EARLY steps of Adam-aware rules are marked in the ledger, for
there every rule is rough.

`adamw` foresees the step before it knows the batch. So it is checked: the values of a step should
add up to what the batch did to the target's loss, which costs one forward of the target's chunks to
measure. Where that leaves a gap of more than `tolerance` times the sum of a target's values' sizes,
the step is valued for it again, in two passes, as by `adamw2`. So it is where the step was clipped
harder than one pass can tell the chunks' parts in. books.npy says how large the gap was, and how
many passes a step took.

With Settings(target_smoothing=.9) each target has a second direction, of its gradient's mean over
the steps (shapley/smoothing.py), and each chunk a score by it, `smoothed`, beside its value.

Works on any nn.Module made of shapley/ghost.py's ops; shapley/wrap.py makes one. A step may have
fewer than B chunks, as the last one of an epoch: what is left of its rows in the ledger is empty.
B chunks of the global batch, b of a micro-batch, K targets.
"""

import functools
import time
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import nn

from shapley import ghost
from shapley.audit import Audit, compare
from shapley.books import Books, residual
from shapley.checks import (
    check_examples,
    check_learning_rates,
    check_optimizer,
    check_sum,
    same,
    tolerance,
)
from shapley.clipping import clipped_values
from shapley.directions import RULES
from shapley.smoothing import Smoothing
from shapley.step import InnerProducts, MicroBatch, Step
from shapley.targets import Targets
from shapley.weights import Weights
from shapley.wrap import Net
from system import parallel, store
from system.errors import UserError
from system.machine import replaying, rng_state
from system.parallel import local

# About how far one pass's values are off in a step that is clipped to kappa, in sizes of 1 - kappa
# (relative L2, results/fidelity): where the rows of tokens tell of clipping, and where they do not
CLIPPING_BY_ROWS = 0.1
CLIPPING_UNKNOWN = 0.5
EARLY = 3  # AdamW's first updates, whose moments are too young for any rule


@dataclass
class Settings:
    rule: str = "adamw"  # one of shapley.directions.RULES
    batch: int = 1  # B: chunks of a step, of all processes; the most, where steps differ
    target_batch: int = 1  # chunks of each target that speak for it in a step
    target_sampling: str = "redraw"  # or "fixed": the same target chunks all along
    # beta of the mean of a target's gradients over the steps, a second direction; 0: none
    target_smoothing: float = 0.0
    micro_batch: int = 0  # target chunks of one forward and backward; 0: all at once
    seed: int = 0  # of the draws of target chunks
    # of the rule `adamw`: the part of its values' size that they may leave unexplained in a step,
    # or may be off by clipping, beyond which it is valued in two passes; 0: not checked
    tolerance: float = 0.05
    # relative rounding error of a target's loss, below which no gap is seen: of float32
    loss_rounding: float = 5e-7
    grad_clip: float = 0.0  # the norm gradients are clipped to, for the audit; 0: none
    compile: bool = False  # the model is compiled, and so are the rules' sweeps
    book_interval: int = 1  # steps between those that the books measure; 0: never
    audit_interval: int = 0  # steps between audits; 0: never
    audit_permutations: int = 200  # for audits of more than 12 chunks
    exact_rows: bool = True  # `adamw`: value token rows and norms by the true gradient


@dataclass
class Flushed:
    """The records of some steps (system/store.py). None where there are none."""

    visits: np.ndarray | None = None  # (steps * B,)
    books: np.ndarray | None = None  # (steps,)
    audit: np.ndarray | None = None


def count_directions(rule, n_targets, smoothed, tolerance=0.0):
    """How many directions a parameter has: one a target, with smoothed ones two, which come after
    the others; as many slopes, where the rule has some; and in two-pass rules the batch's
    gradient. 0 of no rule ("off"). tolerance: where steps are checked, of the step that has most.
    """
    if rule not in RULES:
        return 0
    rules = [RULES[rule]]
    if tolerance and RULES[rule].instead:
        rules.append(RULES[rule].instead)
    n = n_targets * (2 if smoothed else 1)
    return max(n * (2 if rule.has_slopes else 1) + rule.two_pass for rule in rules)


def do_nothing():
    pass


def timed(method):
    """Adds the time that a method takes to self.seconds."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        began = time.perf_counter()
        result = method(self, *args, **kwargs)
        self.seconds += time.perf_counter() - began
        return result

    return wrapper


class Valuation:
    """See the module's docstring for the calls and their order."""

    def __init__(
        self, model, optimizer, loss, targets, settings, writer=None, step=0, check=do_nothing
    ):
        """model: built of ghost ops. loss(X, Y, ledger=None) -> its mean loss on a batch, a scalar
        tensor. targets: see shapley/targets.py. writer: a system.writer.Writer, or None. step: the
        number of steps that were valued before, of a run that goes on. check: called before each
        forward that a valuation adds to a step, and for each subset of an audit. What it raises
        before the optimizer's step gives the step up: what is committed is as if it never began."""
        self.model, self.loss, self.settings, self.writer = model, loss, settings, writer
        self.check = check
        if writer:
            assert writer.n_targets == len(targets), "Writer(n_targets=...) has another number"
            is_smoothed = settings.target_smoothing > 0
            assert writer.smoothed == is_smoothed, f"Writer(smoothed={is_smoothed})"
            assert "audit" in writer.records or not settings.audit_interval, "Writer(audits=True)"
        self.step_number = step
        self.weights = Weights(model, optimizer)
        named = zip(self.weights.names, self.weights.params)
        check_optimizer(optimizer, settings.rule, named)
        self.is_wrapped = isinstance(model, Net)
        if self.is_wrapped and targets:
            model.survey(*targets[0].batch(np.arange(min(2, len(targets[0])))))
        self.unchecked = 2 if self.is_wrapped else 0  # steps whose values are checked in any case
        self.checked_ways = set()  # see Net.ways
        self.targets = Targets(targets, self.weights, loss, settings, check)
        self.first_rule = RULES[settings.rule](self.weights, settings, len(targets))
        self.rule = self.first_rule  # of the step that is under way
        self.checks = settings.tolerance > 0 and self.rule.instead is not None
        if self.checks:
            self.rule_instead = self.rule.instead(self.weights, settings, len(targets))
        self.smoothing = None
        if settings.target_smoothing:
            self.smoothing = Smoothing(self.weights, len(targets), settings.target_smoothing)
        self.books = Books(self.weights, self.targets, settings)
        is_random = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        self.audit = Audit(self.weights, self.targets, loss, settings, is_random, check)
        self.first_update = 0  # the newest t that was the first update of some parameter
        self.updates_done = None  # of the optimizer: read once, then counted
        self.frozen_gradients = None  # see freeze_targets
        self.is_frozen = False
        self.seconds = 0.0  # spent in begin_step, before_update and end_step
        self.check_seconds = 0.0  # of these in checks, and in the second passes of such rules
        self.tape_ops = {}  # a tape's ops by the shape of X, for compiled models
        self.pending = []  # steps that are not flushed yet
        self.step = None
        if step:
            self.commit()  # values.npy and the checkpoint may be apart after a crash

    @property
    def two_pass(self):
        return self.rule.two_pass

    @property
    def checks_step(self):
        """Whether the step's first pass will be checked."""
        return self.checks and not self.two_pass and not self.is_frozen

    @property
    def is_adam_aware(self):
        return self.settings.rule.startswith("adamw")

    @property
    def n_directions(self):
        n = self.n_scores * (2 if self.rule.has_slopes else 1)
        return n + self.two_pass

    @property
    def n_scores(self):
        """K, or 2K with smoothed scores, which come after the values."""
        return len(self.targets) * (2 if self.smoothing else 1)

    @property
    def n_columns(self):
        """Of a ledger: a column for each direction, and in two-pass rules one for the squares of
        the chunks' gradients."""
        return self.n_directions + self.two_pass

    # --- a step: begin_step, a new_ledger for each micro-batch, before_update, end_step ---------

    @timed
    def begin_step(self, step, lr, tokens=None):
        """Before the step's first backward: one-pass rules set their directions.

        tokens: the global batch's, an integer array of any shape, for `adamw`. Without them it
        values no row of a token exactly."""
        if self.updates_done is None or self.is_frozen:
            self.updates_done = self.weights.updates_done()
        self.updates_done += 1
        self.step_number = step
        check_learning_rates(self.weights.optimizer, lr if self.is_wrapped else None)
        self.step = Step(number=step, lr=lr, t=self.updates_done)
        self.rule = self.first_rule
        if self.is_adam_aware:
            self.weights.look_for_young(self.step.t, may_be_late=self.is_wrapped)
        if self.is_wrapped and self.rule.token_weights and tokens is None:
            what = f"rule {self.settings.rule} values the rows of the batch's own tokens exactly"
            raise UserError(f"{what}: pass begin_step(step, lr, tokens=X), X of the whole batch")
        self.rule.begin(tokens)
        self.books.begin(self.step)
        if not self.two_pass:
            self.set_directions()
        self.books.before(self.step)

    def new_ledger(self, ids, X, Y, share=None):
        """A micro-batch's ids (b,) and tensors X, Y -> what its forward takes as ledger.

        share: what the step's loss multiplies the micro-batch's mean loss by, as the backward does,
        counted over all ranks: shares of 1/4 on each of two ranks are losses / 2 under DDP, whose
        gradients are the ranks' mean. Without it b over the step's chunks. It has to be given where
        the losses are weighted otherwise, as by labels.

        That is: of a one-pass rule zeros (b, K), whose gradient will be the values; (b, 2K) with
        smoothed directions. If a check may ask for a second pass, and the micro-batch is the whole
        batch, a Tape that holds these zeros. Of a two-pass rule a Tape if the micro-batch is the
        whole batch, else None. Where there is no Tape a second pass repeats the forward."""
        self.collect()
        ledger = tape = None
        if not self.two_pass:
            ledger = self.weights.zeros(len(ids), self.n_directions)
            self.ask_for_exact_rows(len(ids))
        is_whole = len(ids) * parallel.size() == self.settings.batch
        if is_whole and not self.weights.sharded and (self.two_pass or self.checks_step):
            tape = self.new_tape(X, Y, ledger)
        if share is not None and not 0 <= share < np.inf:
            what = f"share={share} of the step's loss"
            raise UserError(f"{what}: give what the micro-batch's mean loss is multiplied by")
        self.step.micro_batches.append(MicroBatch(ids, X, Y, ledger, tape, rng_state(), share))
        return tape or ledger

    @timed
    def before_update(self, clip_coef=1.0):
        """Between clipping and the optimizer's step: two-pass rules know the batch's gradient now.

        clip_coef: what the gradients were multiplied by, a number or a tensor."""
        self.collect()
        self.check_batch()
        self.set_shares()
        self.step.clip_coef = clip_coef
        self.rule.add_exact_rows(self.step)
        began = time.perf_counter()
        if self.two_pass:
            self.value_in_two_passes()
        if self.is_wrapped:
            self.check_values()
        if self.checks_step:
            self.check_step()
        if self.checks:
            self.check_seconds += time.perf_counter() - began
        if self.is_wrapped and self.is_adam_aware and self.weights.is_first_update():
            self.first_update = self.step.t
        n_updates = self.step.t - self.first_update + 1
        self.step.is_early = self.is_adam_aware and min(self.step.t, n_updates) <= EARLY
        if self.audit.audits(self.step):
            self.step.truth = self.audit.solve(self.step)

    @timed
    def end_step(self):
        """After the optimizer's step. Nothing is read off the device yet."""
        self.collect()
        self.check_batch()
        step, micro_batches = self.step, self.step.micro_batches
        step.ids = np.concatenate([micro_batch.ids for micro_batch in micro_batches])
        step.losses = torch.cat([micro_batch.losses for micro_batch in micro_batches])
        step.weights = torch.cat([micro_batch.weights() for micro_batch in micro_batches])
        step.found = self.inner_products()
        self.books.after(step)
        self.unchecked = max(0, self.unchecked - 1)
        step.passes = 2 if self.two_pass else 1
        step.micro_batches = []
        self.pending.append(step)
        self.step_number += 1

    # --- the parts of a step ----------------------------------------------------

    def value_in_two_passes(self):
        batch = self.weights.take_gradients()
        self.set_directions([local(gradient) for gradient in batch])
        self.second_pass()
        self.weights.set_gradients(batch)

    def check_step(self):
        """Measures what one pass left unexplained, and values the step in two passes where that is
        too much. A target for which one pass holds keeps its values, so that they are the same
        beside any other target. On a GPU this waits for the device."""
        step = self.step
        drop = self.measure_drop()
        step.gap, step.holds = self.compare(drop)
        step.holds &= self.knows_clipping()
        step.left = step.gap
        if bool(step.holds.all()):
            for micro_batch in step.micro_batches:
                micro_batch.tape = None  # frees its memory for the optimizer
            return
        step.first_found = self.inner_products()
        self.rule = self.rule_instead
        self.value_in_two_passes()
        if self.is_wrapped:
            self.check_values()
        gap, holds_now = self.compare(drop)
        step.left = torch.where(step.holds, step.gap, gap)
        step.failed = 1 if bool((step.holds | holds_now).all()) else 2

    def measure_drop(self):
        """What the batch does to the targets' losses in the coming step: (K,) nats, positive where
        it lowers them."""
        batch = self.weights.take_gradients()
        places = self.rule.landing(self.step, [local(gradient) for gradient in batch])
        with self.weights.at(places):
            self.weights.forget_directions()
            losses_after = self.targets.losses(self.step.number)
        self.weights.set_gradients(batch)
        return self.step.losses_before - losses_after

    def compare(self, drop):
        """What the step's values, as they are now, leave unexplained of the drop, as a part of
        their size: (K,). And for which targets that is within the tolerance: (K,) bool."""
        step, K = self.step, len(self.targets)
        values = self.inner_products().values[:, :K].detach() * step.lr * step.clip_coef
        total, size = parallel.add([values.sum(0), values.abs().sum(0)])
        gap = drop - total
        rounding = self.settings.loss_rounding * step.losses_before.abs()
        is_within = gap.abs() <= self.settings.tolerance * size + rounding
        return gap / size, is_within & gap.isfinite()

    def knows_clipping(self):
        """Whether one pass knows well enough what clipping makes of each chunk's value. The gap
        does not say, for their sum stays the same. A bool, or a tensor ()."""
        error = CLIPPING_BY_ROWS if self.rule.token_weights else CLIPPING_UNKNOWN
        return error * (1 - self.step.clip_coef) <= self.settings.tolerance

    def set_directions(self, batch=None):
        """The targets' gradients, taken where the rule wants them, become directions.

        batch: what the optimizer will take, kappa g, one tensor a parameter, for two-pass rules.
        """
        gradients = self.frozen_gradients
        if gradients is None:
            places = self.rule.where(self.step, batch)
            with self.weights.at(places):
                self.weights.forget_directions()
                losses, gradients = self.targets.gradients(self.step.number)
            if places is None:
                self.step.book["before"] = losses
            if not self.two_pass:
                self.step.losses_before = losses
            places = None  # frees their memory for the directions
        if self.is_frozen:
            self.frozen_gradients = gradients
            gradients = [gradient.clone() for gradient in gradients]
        if self.smoothing:
            self.smoothing.join(self.step, gradients)
        if self.two_pass:
            for i, clipped_grad in enumerate(batch):
                twice = [gradients[i]] * (2 if self.rule.has_slopes else 1)
                gradients[i] = torch.cat([*twice, clipped_grad[None]])
        self.weights.set_directions(gradients)
        self.rule.direct(self.step, batch)

    def freeze_targets(self):
        """From the next step on the targets' gradients are taken once, and serve until this is
        called again."""
        self.is_frozen, self.frozen_gradients = True, None

    def ask_for_exact_rows(self, n_chunks):
        """Zeros on the weights, whose gradients will be those of each chunk alone."""
        for p, gradient in self.rule.exact_gradients.items():
            whole = self.weights.whole[p]
            whole.per_chunk = self.weights.zeros(n_chunks, *gradient.shape[1:])
            whole.exact_rows = self.rule.exact_rows[p]

    def new_tape(self, X, Y, first):
        """For a forward of X, Y. first: see ghost.Tape. A compiled forward needs a tape that knows
        its ops: an eager one sees them when the first batch of such a shape comes."""
        if not self.settings.compile:
            return ghost.Tape(first=first)
        if X.shape not in self.tape_ops:
            tape = ghost.Tape()
            eager = torch.compiler.set_stance("force_eager")
            with torch.no_grad(), eager, replaying(rng_state()):
                self.loss(X, Y, tape)
            self.tape_ops[X.shape] = tape.ops
        return ghost.Tape(self.tape_ops[X.shape], first)

    def collect(self):
        """Takes what the last micro-batch left behind, before the next one replaces it."""
        if not self.step.micro_batches:
            return
        micro_batch = self.step.micro_batches[-1]
        if not self.audit.is_random:  # by a function, say, that nn.Dropout knows nothing of
            self.audit.is_random = not same(micro_batch.rng, rng_state())
        had_ledger = micro_batch.ledger is not None or micro_batch.tape is not None
        if not had_ledger or micro_batch.losses is not None:
            return
        self.take_losses(micro_batch)
        for p in self.rule.exact_gradients:
            whole = self.weights.whole[p]
            micro_batch.per_chunk[p] = self.own_gradients(p, whole.per_chunk)
            whole.per_chunk = whole.exact_rows = None

    def take_losses(self, micro_batch):
        """What a forward with a ledger left on the model."""
        micro_batch.losses = self.model.chunk_loss
        counts = getattr(self.model, "chunk_weight", None)
        micro_batch.counts = torch.ones_like(micro_batch.losses) if counts is None else counts

    def own_gradients(self, p, per_chunk):
        """The gradients of a parameter for each chunk alone, which the backward left."""
        if per_chunk.grad is None:
            name = self.weights.name_of[p]
            what = f"rule {self.settings.rule} needs each example's own gradient of {name}"
            cure = "which this forward does not give: set exact_rows=False, or take rule adamw2"
            raise UserError(f"{what}, {cure}")
        return per_chunk.grad

    def check_batch(self):
        """Raises UserError where the step has no chunk, or more than the ledger has rows for."""
        n_chunks, batch = self.step.n_chunks(), self.settings.batch
        if 0 < n_chunks * parallel.size() <= batch:
            return
        cure = "call new_ledger for each micro-batch, and let Settings(batch=...) be the largest"
        raise UserError(f"a step of {n_chunks} examples a process, but batch={batch}: {cure}")

    def set_shares(self):
        """The shares that were not given, where the step's micro-batches are all known."""
        micro_batches = self.step.micro_batches
        given = [micro_batch.share is not None for micro_batch in micro_batches]
        if any(given) != all(given):
            what = f"step {self.step.number}: share=... was given for some micro-batches"
            raise UserError(f"{what}: give it for all of them, or for none")
        for micro_batch in micro_batches:
            if micro_batch.share is None:
                n_chunks = self.step.n_chunks() * parallel.size()
                micro_batch.share = len(micro_batch.ids) / n_chunks

    def second_pass(self):
        """The chunks' values under directions that their own backward did not know: from the tape,
        or by forward and backward again."""
        for micro_batch in self.step.micro_batches:
            if micro_batch.tape:
                columns = micro_batch.tape.values(squares=True)
                # a rank's loss is the mean of its own chunks
                columns = columns / parallel.size()
                columns[:, -1] /= parallel.size()
            else:
                columns = self.repeated(micro_batch)
            micro_batch.values = columns[:, : self.n_directions - 1]
            micro_batch.products, micro_batch.squares = columns[:, -2:].unbind(1)

    def repeated(self, micro_batch):
        """A micro-batch's forward and backward again, without weight gradients: (b, n_columns)."""
        ledger = self.weights.zeros(len(micro_batch.ids), self.n_columns)
        self.check()
        with self.weights.frozen(), replaying(micro_batch.rng):
            loss = self.loss(micro_batch.X, micro_batch.Y, ledger) * micro_batch.share
            (columns,) = torch.autograd.grad(loss, ledger)
        self.take_losses(micro_batch)
        return columns

    def check_values(self):
        """Raises UserError where the values of a wrapped model's first steps are not those of its
        gradients, or its examples mix. Later, of a step in which a parameter met the batch in a way
        that is new (Net.ways)."""
        if not self.unchecked and self.model.ways <= self.checked_ways:
            return
        uses_tape = self.two_pass and self.step.micro_batches[0].tape is not None
        evaluating = self.targets.evaluating
        check_examples(self.model, self.weights, self.loss, self.step, uses_tape, evaluating)
        exact_rows = self.first_rule.exact_rows
        check_sum(self.weights, self.step, exact_rows, tolerance(self.model))
        self.checked_ways |= self.model.ways

    def inner_products(self):
        """What the last pass found out about this rank's chunks."""
        micro_batches = self.step.micro_batches
        columns = torch.cat([self.columns_of(micro_batch) for micro_batch in micro_batches])
        found = InnerProducts(columns[:, : self.n_scores])
        if self.rule.has_slopes:
            found.slopes = columns[:, self.n_scores :]
        if self.two_pass or self.rule.exact_gradients:
            found.products = torch.cat([micro_batch.products for micro_batch in micro_batches])
            found.squares = torch.cat([micro_batch.squares for micro_batch in micro_batches])
        return found

    def columns_of(self, micro_batch):
        """(b, n) <x_i, h>, of all directions but the batch's own, on the device."""
        if micro_batch.values is not None:
            return micro_batch.values
        return micro_batch.ledger.grad / parallel.size() + micro_batch.exact_values

    # --- from the device to the records -------------------------------------------

    def flush(self):
        """Takes the steps so far off the devices of all ranks; returns them as Flushed, and gives
        them to the writer. Raises UserError at the first loss or value that is not finite."""
        steps, self.pending = self.pending, []
        if not steps:
            return Flushed()
        ids = self.gathered([torch.from_numpy(step.ids) for step in steps], store.NO_CHUNK)
        losses = self.gathered([step.losses for step in steps])
        weights = self.gathered([step.weights for step in steps])
        found = self.gathered_products([step.found for step in steps])
        first_found = self.gathered_products([step.first_found for step in steps])
        K = len(self.targets)
        visits, books, audits = [], [], []
        for i, step in enumerate(steps):
            clip_coef = float(step.clip_coef)
            if not weights[i].any():
                what = f"step {step.number}: no example has a label"
                raise UserError(f"{what}, so nothing was learned: leave such batches out")
            scores = self.scores_of(step, found[i], first_found[i], ids[i])
            squares = (first_found[i] or found[i]).squares
            of_visits = (ids[i], losses[i], scores[:, :K], weights[i], squares)
            records = self.visit_records(step, *of_visits)
            if self.smoothing:
                records["smoothed"] = scores[:, K:]
            check_finite(records)
            visits.append(records)
            books.append(self.book_record(step, clip_coef, visits[-1], weights[i]))
            if step.truth:
                is_chunk = ids[i] != store.NO_CHUNK
                audits.append(self.audit_record(step, scores[is_chunk, :K]))
        flushed = Flushed(np.concatenate(visits), np.concatenate(books))
        if audits:
            flushed.audit = np.concatenate(audits)
        if self.writer:
            self.writer.add(flushed.visits, flushed.books, flushed.audit)
        return flushed

    def scores_of(self, step, found, first_found, ids):
        """The step's values, and its smoothed scores where there are some: float64 (B, K or 2K).
        found, first_found: of all ranks' chunks, see Step. ids: (B,) the chunks'."""
        scores = self.finished(step, found, ids)
        if first_found is None:
            return scores
        holds = np.tile(step.holds.cpu().numpy(), self.n_scores // len(self.targets))
        return np.where(holds, self.finished(step, first_found, ids), scores)

    def finished(self, step, found, ids):
        """What a pass found -> with lr, kappa and what clipping makes of it."""
        kappa = float(step.clip_coef)
        values = found.values * (step.lr * kappa)
        if found.products is None:
            return values
        slopes = values if found.slopes is None else found.slopes * (step.lr * kappa)
        products = found.products / kappa
        order = np.argsort(ids, kind="stable")  # whichever process had them
        in_order = [x[order] for x in (values, slopes)]
        in_order += [kappa, products[order], found.squares[order]]
        finished = np.empty_like(values)
        finished[order] = clipped_values(*in_order)
        return finished

    def gathered(self, tensors, filler=0):
        """One tensor a step, of this rank's chunks (n, ...) -> an array (steps, B, ...) of all
        ranks' chunks: float64, or int64 of integers. filler: stands in rows without a chunk."""
        n_rows = self.settings.batch // parallel.size()
        filled = []
        for tensor in tensors:
            rest = tensor.new_full((n_rows - len(tensor), *tensor.shape[1:]), filler)
            filled.append(torch.cat([tensor, rest]) if len(rest) else tensor)
        tensors = parallel.gather(torch.stack(filled), 1)
        return host(tensors) if tensors.is_floating_point() else tensors.cpu().numpy()

    def gathered_products(self, found):
        """The InnerProducts of each step, or None where it has none -> those of all ranks."""
        gathered = [None if of_step is None else InnerProducts() for of_step in found]
        for field in fields(InnerProducts):
            tensors = [getattr(of_step, field.name, None) for of_step in found]
            known = [i for i, tensor in enumerate(tensors) if tensor is not None]
            if not known:
                continue
            arrays = self.gathered([tensors[i] for i in known])
            for i, array in zip(known, arrays):
                setattr(gathered[i], field.name, array)
        return gathered

    def visit_records(self, step, ids, losses, values, weights, squares):
        """A step's records for ledger.npy (B,)."""
        dtype = store.visit_dtype(len(self.targets), smoothed=bool(self.smoothing))
        visits = np.zeros(self.settings.batch, dtype)
        visits["step"] = step.number
        visits["chunk"] = ids
        visits["loss"] = losses
        visits["value"] = values
        visits["early"] = step.is_early
        visits["grad_norm"] = np.nan
        if squares is not None:  # of the chunk's loss, not of its part of the step's
            np.divide(squares**0.5, weights, out=visits["grad_norm"], where=weights > 0)
        return visits

    def book_record(self, step, clip_coef, visits, weights):
        """A step's record for books.npy (1,)."""
        entries = {name: host(x) for name, x in step.book.items()}
        entries["data"] = visits["value"].sum(0, dtype=np.float64)
        entries["loss"] = weights @ visits["loss"].astype(np.float64)
        entries["step"] = step.number
        entries["lr"] = step.lr
        entries["kappa"] = clip_coef
        if "after" in entries:
            entries["residual"] = residual(entries)
        entries["passes"], entries["failed"] = step.passes, step.failed
        if step.gap is not None:
            entries["gap"], entries["left"] = host(step.gap), host(step.left)
        return store.record(store.book_dtype(len(self.targets)), entries)

    def audit_record(self, step, values):
        """An audited step's record for audit.npy (1,)."""
        entries = compare(values, step.truth)
        entries["step"] = step.number
        return store.record(store.audit_dtype(len(self.targets)), entries)

    # --- a commit, and what a checkpoint needs ---------------------------------------

    def commit(self):
        """Puts every step so far on disk, where there is a writer."""
        self.flush()
        if self.writer:
            self.writer.commit(self.step_number, self.describe())

    def describe(self):
        """What values.json says of the valuation."""
        info = {"rule": self.settings.rule, "batch": self.settings.batch}
        if self.first_rule.exact_names:
            info["grad_norm_over"] = list(self.first_rule.exact_names)
        if self.checks:
            info["tolerance"] = self.settings.tolerance
        if self.first_rule.two_pass:
            info["grad_norm_over"] = ["all weights"]
        if self.smoothing:
            info["target_smoothing"] = self.settings.target_smoothing
        info["targets"] = [self.targets.describe(k) for k in range(len(self.targets))]
        return info

    def state_dict(self):
        """What a checkpoint says of the values: how far the files go, of which targets, and the
        means of their gradients where there are some."""
        counted = self.writer.counted() if self.writer else {}
        state = {"records": counted, "targets": self.targets.checksums()}
        if self.smoothing:
            state["smoothing"] = self.smoothing.state_dict()
        return state

    def load_state_dict(self, state):
        """state: what state_dict() said where a run goes on. Without means in it, of a run that had
        other targets, they begin here."""
        if self.smoothing and "smoothing" in state:
            self.smoothing.load_state_dict(state["smoothing"])


class NoValuation:
    """In Valuation's place where nothing is valued: training is nanoGPT's to the bit."""

    seconds = 0.0
    writer = None

    def begin_step(self, step, lr, tokens=None):
        pass

    def new_ledger(self, ids, X, Y, share=None):
        return None

    def before_update(self, clip_coef=1.0):
        pass

    def end_step(self):
        pass

    def flush(self):
        return Flushed()

    def commit(self):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def check_finite(visits):
    """Raises UserError at a loss or a value of a step's records that is not finite."""
    finite = np.isfinite(visits["loss"]) & np.isfinite(visits["value"]).all(1)
    if "smoothed" in visits.dtype.names:
        finite &= np.isfinite(visits["smoothed"]).all(1)
    if finite.all():
        return
    what = "value" if np.isfinite(visits["loss"]).all() else "loss"
    chunks = ", ".join(map(str, visits["chunk"][~finite]))
    step = visits["step"][0]
    cure = "Lower --learning_rate, or look at these chunks"
    raise UserError(f"step {step}: the {what} of chunks {chunks} is not finite. {cure}")


def host(x):
    """A tensor, or numbers, as a float64 array in the host's memory."""
    return torch.as_tensor(x).double().cpu().numpy()
