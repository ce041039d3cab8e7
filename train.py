"""
Train a GPT-2 on numbered chunks and value every chunk in the same run.

    python train.py config/gpt2_inrun.py                        the paper's run
    python train.py config/demo.py --max_iters=100              a config file, then --key=value
    python train.py out/demo/config.json --init_from=resume     go on where a run stopped
    python train.py out/demo/config.json --verify               is every file of it as it was written?
    torchrun --nproc_per_node=8 train.py config/gpt2_inrun.py   on eight GPUs: the same batches, the same values

Leaves in out_dir: ckpt.pt, values.npy (a value for every chunk of train.npy), ledger.npy, books.npy, audit.npy, values.json, config.json.
SIGTERM or Ctrl-C lets the step finish, writes a checkpoint and says how to go on; a second one stops at once.
"""

import json
import math
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

os.environ.setdefault(
    "THP_MEM_ALLOC_ENABLE", "1"
)  # CPU: large tensors in huge pages, or half the time goes into page faults

import numpy as np
import torch

import config
from data import open_dataset, parse_targets, tokenizer
from model import GPT, GPTConfig
from show import dashboard, tables
from system import files, parallel, store, terminal
from system.checkpoints import (
    STARTS,
    Checkpoints,
    find_checkpoint,
    fitting,
    load_optimizer,
    settings_of,
)
from system.errors import UserError
from system.folder import RUN_FILES, RunFolder
from system.machine import (
    Interrupted,
    check_system,
    describe_run,
    peak_flops,
    rng_state,
    set_rng_state,
)
from system.verify import verify
from valuation import Valuation

# what a number must be: at least 1, at least 0, below 1
POSITIVE = """
target_batch target_interval book_interval audit_permutations log_interval checkpoint_interval
keep_checkpoints wandb_histogram_interval eval_chunks batch_size gradient_accumulation_steps
n_layer n_head n_embd max_iters""".split()
NOT_NEGATIVE = """
eval_interval audit_interval block_size warmup_iters lr_decay_iters min_lr weight_decay grad_clip
dropout beta1 beta2 seed""".split()
AT_LEAST = dict.fromkeys(POSITIVE, 1) | dict.fromkeys(NOT_NEGATIVE, 0)
BELOW = {"dropout": 1, "beta1": 1, "beta2": 1}


@dataclass
class Config:
    # input and output
    data_dir: str = "data/pile"  # what prepare_pile.py wrote
    keep: str = ""  # keep.npy of curate.py: train on these chunks only
    out_dir: str = ""  # where the run goes; default out/<name of the config file>
    init_from: Literal["scratch", "resume", "auto"] = (
        "scratch"  # resume: go on from out_dir's checkpoint; auto: if there is one
    )
    overwrite: bool = False  # start over in an out_dir that holds a run, which goes with the first checkpoint of the new one
    verify: bool = False  # only check the files in out_dir against their checksums
    seed: int = 1337  # initial weights, order of chunks, draws of target chunks
    # valuation
    rule: Literal["off", "sgd", "sgd2", "adamw_linear", "adamw", "adamw2"] = (
        "adamw"  # what a value is (math in valuation.py)
    )
    targets: str = "val"  # comma-separated: val | val:<domain> | <name>=<file.txt>
    target_batch: int = (
        1  # chunks of each target that speak for it in a step; its cost beside batch chunks
    )
    target_sampling: Literal["fixed", "redraw"] = (
        "redraw"  # the same target chunks all along, or new ones every time
    )
    target_interval: int = 1  # steps for which a target's gradient serves
    book_interval: int = (
        20  # steps between those whose change of the targets' losses is measured and accounted for
    )
    audit_interval: int = 0  # steps between those whose values are compared with the exact truth; 0: never, for it is slow
    audit_permutations: int = 200  # for the truth where a step has more than 12 chunks
    domain_momentum: bool = False  # credit momentum to domains: one copy of the parameters a domain, and forward and backward again
    # evaluation, logging, checkpoints
    eval_interval: int = 250  # steps between evaluations, by domain; 0: never
    eval_chunks: int = 16  # validation chunks of each domain it uses
    log_interval: int = 10  # steps between progress lines
    checkpoint_interval: int = 250  # steps between checkpoints; a run that ends writes one
    keep_checkpoints: int = 2  # ckpt.pt and older ones, ckpt-<step>.pt
    background: bool = (
        torch.cuda.is_available()
    )  # copy a checkpoint to host memory and go on while it is written
    wandb_log: bool = False  # offline when there is no login
    wandb_project: str = "nanoshapley"
    wandb_run_name: str = ""  # default: the name of out_dir
    wandb_histogram_interval: int = 100  # steps between histograms of the values
    tensorboard_log: bool = False  # the same into out_dir/tensorboard, for tensorboard --logdir
    # batch
    batch_size: int = 12  # chunks of a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches of a step; global batch B = their product, whatever the number of processes
    block_size: int = 0  # tokens of a chunk to train on; 0: all
    # model
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False  # bias inside LayerNorm and Linear layers
    tie_weights: bool = True  # wte and lm_head are one matrix
    # optimizer
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 6e-4  # the highest
    max_iters: int = 600000
    weight_decay: float = 1e-1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # 0: no clipping
    # learning rate schedule
    decay_lr: bool = True
    warmup_iters: int = 2000
    lr_decay_iters: int = 0  # 0: max_iters
    min_lr: float = 6e-5
    # system
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] = (
        "bfloat16" if torch.cuda.is_available() else "float32"
    )  # bfloat16: autocast
    compile: bool = False  # torch.compile the model
    shard: bool = (
        False  # under torchrun: FSDP2, every process holds a slice of the model, instead of DDP
    )

    def __post_init__(self):
        self.lr_decay_iters = self.lr_decay_iters or self.max_iters
        config.check(self, at_least=AT_LEAST, above={"learning_rate": 0}, below=BELOW)
        if self.n_embd % self.n_head:
            raise UserError(f"--n_embd={self.n_embd} is not a multiple of --n_head={self.n_head}")
        if self.optimizer == "adamw" and not self.beta2 > 0:
            raise UserError(
                f"--beta2={self.beta2}: AdamW's formulas need it above 0: write --beta2=0.95"
            )
        if self.optimizer != "adamw" and (self.rule.startswith("adamw") or self.domain_momentum):
            what = (
                "--domain_momentum speaks" if self.domain_momentum else f"--rule={self.rule} speaks"
            )
            raise UserError(
                f"{what} of AdamW's step: with --optimizer={self.optimizer} write --rule=sgd or --rule=sgd2, and no --domain_momentum"
            )
        if self.shard and (self.compile or self.audit_interval or self.domain_momentum):
            raise UserError(
                "--shard knows no --compile, and not whole gradients as --audit_interval and --domain_momentum do: leave those out"
            )
        if self.audit_interval and self.batch_size * self.gradient_accumulation_steps < 2:
            raise UserError(
                f"--audit_interval={self.audit_interval} correlates the chunks of a step, and there is one: raise --batch_size"
            )

    @classmethod
    def of_run(cls, path):
        """A run's config.json -> its settings (config.py)."""
        return settings_of(path)


# --- before the first step ----------------------------------------------------


MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout", "tie_weights")


def model_args(cfg, data):
    """GPTConfig's, as checkpoints have them."""
    args = {key: getattr(cfg, key) for key in MODEL_ARGS}
    return args | {"vocab_size": -(-data.meta["vocab_size"] // 64) * 64}  # padded up for efficiency


def build_model(cfg, data, device):
    """Its first weights are a function of the seed."""
    torch.manual_seed(cfg.seed)
    model = GPT(GPTConfig(**model_args(cfg, data))).to(device)
    return model.double() if cfg.dtype == "float64" else model


def build_optimizer(cfg, model):
    if cfg.optimizer == "adamw":
        return model.configure_optimizers(
            cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), cfg.device.split(":")[0]
        )
    return torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=cfg.learning_rate)


def settings(cfg):
    """Those of the run, not of this start, as config.json and checkpoints hold them."""
    return {key: value for key, value in vars(cfg).items() if key not in STARTS}


# --- in the loop --------------------------------------------------------------


def schedule(cfg, step):
    """Learning rate: linear warm-up, then cosine down to min_lr."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if step > cfg.lr_decay_iters:
        return cfg.min_lr
    ratio = (step - cfg.warmup_iters) / max(1, cfg.lr_decay_iters - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (cfg.learning_rate - cfg.min_lr)


@torch.no_grad()
def evaluate(model, loss_of, data, cfg):
    """Losses of the same validation chunks every time -> the mean over the domains, weighted by
    their size, and {domain: mean loss}, in nats."""
    n_chunks = np.bincount(data.val.domain, minlength=len(data.domains))
    domains = np.flatnonzero(n_chunks)
    batches = []
    for d in domains:
        ids = np.flatnonzero(data.val.domain == d)
        ids = ids[:: max(1, len(ids) // cfg.eval_chunks)][
            : cfg.eval_chunks
        ]  # the first ones would be of one document
        batches += [(d, b) for b in np.split(ids, range(cfg.batch_size, len(ids), cfg.batch_size))]
    losses, n, ranks = torch.zeros(len(batches)), len(batches), parallel.size()
    model.eval()
    for i in range(parallel.rank(), n + -n % ranks, ranks):  # as many for every rank
        loss = float(loss_of(*data.val.batch(batches[min(i, n - 1)][1], cfg.block_size)))
        if i < n:
            losses[i] = loss
    model.train()
    total, count = np.zeros(len(n_chunks)), np.zeros(len(n_chunks))
    for (d, ids), loss in zip(batches, parallel.add([losses])[0].tolist()):
        total[d] += loss * len(ids)
        count[d] += len(ids)
    by_domain = total[domains] / count[domains]
    mean = np.average(by_domain, weights=n_chunks[domains])
    names = [data.domains[d] for d in domains]
    return float(mean), dict(zip(names, by_domain.tolist()))


# --- the run -------------------------------------------------------------------


def train(cfg):
    """One run, from cfg to the files in cfg.out_dir. Returns its progress, [(steps done, mean loss in nats since the line before)].

    Raises UserError or OSError, with what to type: before it writes anything where the input is
    wrong; later (a loss that is not finite, a full disk) with the last checkpoint whole.
    """
    if cfg.verify:
        return verify(cfg.out_dir)
    check_system(cfg)
    device = parallel.start(cfg.device)
    data = open_dataset(cfg.data_dir, cfg.keep)
    if cfg.block_size > data.meta["block_size"]:
        fits = f"type --block_size={data.meta['block_size']}, or prepare_pile.py --block_size={cfg.block_size}"
        raise UserError(
            f"--block_size={cfg.block_size} is more than the chunks of {data.path} hold: {fits}"
        )
    cfg.block_size = cfg.block_size or data.meta["block_size"]
    targets = [] if cfg.rule == "off" else parse_targets(cfg.targets, data, cfg.block_size)
    parallel.mine(cfg.batch_size * cfg.gradient_accumulation_steps)  # or they cannot share a step
    with RunFolder(cfg.out_dir) as folder:
        return run(cfg, folder, device, data, targets)


def run(cfg, folder, device, data, targets):
    """The run in its folder, from the newest checkpoint or from nothing."""
    say = terminal.say if parallel.rank() == 0 else lambda line: None
    out, n_chunks, B = (
        folder.path,
        len(data.train.rows),
        cfg.batch_size * cfg.gradient_accumulation_steps,
    )
    own = parallel.mine(B)  # this rank's chunks of a step
    used = parallel.on_rank_0(lambda: find_checkpoint(cfg, data, targets))
    checkpoint = torch.load(used, map_location="cpu", weights_only=True) if used else None
    device_type, dtype = device.split(":")[0], getattr(torch, cfg.dtype)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    # model and optimizer
    raw_model = build_model(cfg, data, device)
    if checkpoint:
        with fitting(used):
            raw_model.load_state_dict(checkpoint["model"])
    if cfg.shard:
        parallel.shard(raw_model, raw_model.transformer.h, len(targets))
    optimizer = build_optimizer(cfg, raw_model)
    start, best_val_loss, wandb_id, valuation_state, evaluations = 0, math.inf, None, None, []
    if checkpoint:
        with fitting(used):
            load_optimizer(optimizer, checkpoint["optimizer"])
            evaluations = json.loads(checkpoint["evaluations"])
        start, best_val_loss, wandb_id, valuation_state = (
            checkpoint[k] for k in ("iter_num", "best_val_loss", "wandb_id", "valuation")
        )
    torch._dynamo.config.force_parameter_static_shapes = (
        False  # `adamw` keeps another number of rows (weight.each) at every step
    )
    torch._dynamo.config.recompile_limit = 32  # training, targets, evaluation, second pass and audit have graphs of their own, some for several sizes
    model = torch.compile(raw_model, fullgraph=True) if cfg.compile else raw_model
    trained = (
        model if cfg.shard else parallel.replicate(model)
    )  # whose backward makes the ranks' gradients one

    def to_device(*arrays):
        tensors = [torch.as_tensor(a) for a in arrays]
        if device_type == "cuda":  # pinned, so that the copy does not wait
            tensors = [t if t.is_cuda else t.pin_memory() for t in tensors]
        return [t.to(device, non_blocking=True) for t in tensors]

    def loss_of(X, Y, ledger=None, model=model):
        with torch.amp.autocast(device_type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(*to_device(X, Y), ledger)[
                1
            ]  # the logits are not kept: they are the largest tensor of the step

    # the run's folder: from here on something is written
    if parallel.rank() == 0 and not checkpoint:
        folder.set_aside()  # an older run, until the first commit of this one
    checkpoints = Checkpoints(folder, cfg.keep_checkpoints, cfg.background, used, start)
    if parallel.rank() == 0:
        if (
            cfg.keep and not checkpoint
        ):  # whatever becomes of the file, the run knows what it was trained on
            files.write_array(out / "chunks.npy", data.keep)
        about = describe_run(settings(cfg), parallel.size(), data.hash, config.ROOT)
        files.write_json(out / "config.json", about)
    valuation = Valuation(
        raw_model, optimizer, loss_of, targets, cfg.rule, B, n_chunks, out,
        cfg.target_batch, cfg.target_sampling, cfg.target_interval, cfg.batch_size, cfg.seed, cfg.grad_clip, cfg.compile,
        cfg.book_interval, cfg.audit_interval, cfg.audit_permutations, data.train.domain if cfg.domain_momentum else None,
        info=dict(data_hash=data.hash), step=start, state=valuation_state,
    )  # fmt: skip
    board = None
    if (cfg.wandb_log or cfg.tensorboard_log) and parallel.rank() == 0:
        visits = store.read(out) if targets and start else ()
        board = dashboard.Board(
            cfg, wandb_id, data, targets, tokenizer(data.meta["tokenizer"]).decode, visits
        )
        wandb_id = board.wandb_id
    peak, ranks = (
        parallel.size() * peak_flops(device, dtype),
        f" x {parallel.size()}" * (parallel.size() > 1),
    )
    chunks = f"{len(data.keep):,} of {n_chunks:,} chunks" if cfg.keep else f"{n_chunks:,} chunks"
    run = f"{chunks} of {cfg.block_size} tokens, B = {B}, {device}{ranks} {cfg.dtype}"
    say(f"{raw_model.get_num_params() / 1e6:.2f}M parameters, {run}")
    say(
        f"steps {start} to {cfg.max_iters}, rule {cfg.rule}, targets: {', '.join(t.name for t in targets) or 'none'} -> {out}"
    )

    def validate(step):
        """A line of evaluations.jsonl (ledger.py), and what the terminal and the board show."""
        nonlocal best_val_loss
        if not len(data.val.rows):
            return
        mean, by_domain = evaluate(raw_model, loss_of, data, cfg)
        best_val_loss = min(best_val_loss, mean)
        earlier = [e for e in evaluations if e["step"] < step]
        evaluations[:] = [*earlier, dict(step=step, val=mean, loss=by_domain)]
        each = ", ".join(f"{name} {loss:.3f}" for name, loss in by_domain.items())
        say(f"step {step}: val loss {mean:.4f} ({each})")
        if parallel.rank() == 0:
            files.write_lines(out / "evaluations.jsonl", evaluations)
        if board:
            board.log(
                {"val/loss": mean}
                | {
                    f"val_loss/{dashboard.metric_name(name)}": loss
                    for name, loss in by_domain.items()
                },
                step=step,
            )

    def save(step):
        """Ledger and values first, then the checkpoint that counts on them."""
        valuation.commit()
        weights = {
            name: p for name, p in raw_model.state_dict(keep_vars=True).items() if p.requires_grad
        }
        content = dict(
            model=weights,
            optimizer=optimizer.state_dict(),
            model_args=vars(raw_model.config),
            iter_num=step,
        )
        content |= dict(
            best_val_loss=best_val_loss,
            config=settings(cfg),
            wandb_id=wandb_id,
            valuation=valuation.state_dict(),
        )
        content |= dict(
            data_hash=data.hash,
            keep=store.crc(data.keep),
            tokenizer=data.meta["tokenizer"],
            rng=parallel.gather_objects(rng_state()),
        )
        content |= dict(evaluations=json.dumps(evaluations))
        checkpoints.write(step, content)

    n = own.stop - own.start  # in as few micro-batches as batch_size allows
    micro_steps = next(m for m in range(1, n + 1) if n % m == 0 and n // m <= cfg.batch_size)
    if (
        trained is not model
    ):  # DDP orders its buckets by the first backward: if that were a step's, a resumed run would add up in another order
        loss_of(
            *data.train.batch(np.zeros(n // micro_steps, int), cfg.block_size), None, trained
        ).backward()
        optimizer.zero_grad(set_to_none=True)
    if parallel.rank():
        torch.manual_seed(cfg.seed + parallel.rank())  # other dropout masks
    if checkpoint and parallel.rank() < len(checkpoint["rng"]):
        with fitting(used):
            set_rng_state(checkpoint["rng"][parallel.rank()])
    del checkpoint

    # training loop
    history, losses, since, clock, paused = [], [], start, time.perf_counter(), 0.0
    began, interrupted = clock, Interrupted()
    for step in range(start, cfg.max_iters):
        if cfg.eval_interval and step % cfg.eval_interval == 0:
            t = time.perf_counter()
            validate(step)
            paused += time.perf_counter() - t

        lr = schedule(cfg, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        ids = data.ids(step, B, cfg.seed)
        tokens = data.train.batch(ids, cfg.block_size)

        valuation.open(step, lr, tokens)  # one-pass rules: the targets' gradients -> directions
        for i, (micro, X, Y) in enumerate(
            zip(*(np.split(a[own], micro_steps) for a in (ids, *tokens))), 1
        ):
            X, Y = to_device(X, Y)
            ledger = valuation.ledger(micro, X, Y)  # zeros (b, K); None when valuation is off
            trained.require_backward_grad_sync = i == micro_steps  # of DDP: only the last
            loss = loss_of(X, Y, ledger, trained)
            (loss / micro_steps).backward()  # ledger.grad is now this micro-batch's values
            losses.append(loss.detach())
        kappa = 1.0
        if cfg.grad_clip:
            norm = parallel.full(
                torch.nn.utils.clip_grad_norm_(raw_model.parameters(), cfg.grad_clip)
            )
            kappa = (cfg.grad_clip / (norm + 1e-6)).clamp(
                max=1.0
            )  # what it multiplied the gradients by
        valuation.before_step(kappa)  # two-pass rules: the batch's gradient is known now
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        valuation.close()  # rows for the ledger

        done, stopping = step + 1, parallel.any_of(interrupted)
        last = stopping or done == cfg.max_iters
        if done % cfg.log_interval == 0 or done % cfg.checkpoint_interval == 0 or last:
            recent = valuation.flush()  # names the chunks if a loss or a value is not finite
            loss = float(parallel.add([torch.stack(losses).mean()])[0]) / parallel.size()
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is not finite in steps {since} to {step}: lower --learning_rate. The last checkpoint is whole"
                )
            history.append((done, loss))
            now = time.perf_counter()
            dt = (now - clock - paused) / (done - since)
            share, valuation.seconds = valuation.seconds / (now - clock - paused), 0.0
            mfu = raw_model.estimate_mfu(B, dt, peak)
            line = f"step {done}/{cfg.max_iters} | loss {loss:.4f} | {dt * 1e3:.0f} ms | {B * cfg.block_size / dt:,.0f} tok/s | mfu {mfu:.1%}"
            if targets:
                line += (
                    f" | negative {(recent.ledger['value'] < 0).mean():.0%} | valuation {share:.0%}"
                )
            say(f"{line} | {timedelta(seconds=int(dt * (cfg.max_iters - done)))} left")
            if board:
                metrics = {
                    "train/loss": loss,
                    "train/lr": lr,
                    "train/tokens_per_s": B * cfg.block_size / dt,
                }
                metrics |= {
                    "overhead/ms_per_step": dt * 1e3,
                    "overhead/mfu": mfu,
                    "overhead/valuation_share": share,
                }
                if targets:
                    metrics |= board.values(
                        recent, histogram=done % cfg.wandb_histogram_interval < done - since
                    )
                board.log(metrics, step=done)
            losses, since, clock, paused = [], done, time.perf_counter(), 0.0
        if cfg.eval_interval and done == cfg.max_iters:
            validate(done)
        if done % cfg.checkpoint_interval == 0 or last:
            save(done)
            if board and targets:
                board.log(board.totals(valuation.total, valuation.used, done), step=done)
        if stopping:
            program = ["python"]
            if parallel.size() > 1:
                program = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
            following = terminal.command(
                *program, "train.py", f"{out}/config.json", "--init_from=resume"
            )
            say(f"stopped after step {done}; to go on: {following}")
            break
    checkpoints.wait()
    interrupted.restore()

    if start >= cfg.max_iters:
        say(f"already at step {start}: raise --max_iters to go on")
    if targets and valuation.used is not None and valuation.used.any():
        names, audits = (
            [t.name for t in targets],
            store.read(out, "audit") if cfg.audit_interval else [],
        )
        end = tables.domains(valuation.total, valuation.used, data, names)
        for line in [*end, *tables.account(store.read(out, "books"), audits, names, data.domains)]:
            say(line)
    written = ", ".join(name for name in RUN_FILES if (out / name).exists())
    say("")
    say(
        f"Done in {timedelta(seconds=int(time.perf_counter() - began))}. Written to {out}: {written}"
    )
    if board:
        board.finish()
    return history


if __name__ == "__main__":
    config.main(lambda: train(config.load(Config)))
    parallel.stop()
