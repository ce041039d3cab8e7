"""
Train a GPT-2 on numbered chunks and value every chunk in the same run.

    python train.py configs/small.py --data_dir=data/mine       text of your own, on a CPU
    python train.py configs/gpt2_inrun.py                       the paper's run
    python train.py configs/demo.py --max_iters=100             a config file, then --key=value
    python train.py out/demo/config.json --init_from=resume     go on where a run stopped
    python train.py out/demo/config.json --verify               are its files as they were written?
    torchrun --nproc_per_node=8 train.py configs/gpt2_inrun.py  eight GPUs: same batches and values

Leaves in out_dir: ckpt.pt, values.npy (a value for every chunk of train.npy), ledger.npy,
books.npy, audit.npy, values.json, config.json.
SIGTERM or Ctrl-C gives up the step under way, writes a checkpoint of the last whole one and says
how to go on; a second one stops at once.
"""

import contextlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

# on a CPU: large tensors in huge pages, or half the time goes into page faults
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch

import config
from data import open_dataset, own_targets, parse_targets
from model import GPT, GPTConfig
from pile.tokenizers import FILE, are_same, tokenizer_beside
from shapley import labels
from show import dashboard, findings, tables
from show.progress import Progress, evaluation_lines
from system import files, machine, needs, parallel, pretrained, store, terminal
from system.checkpoints import (
    STARTS,
    Checkpoints,
    find_checkpoint,
    fitting,
    load_optimizer,
    settings_of,
)
from system.errors import UserError
from system.folder import REVALUATION, RUN_FILES, RunFolder
from system.verify import verify
from system.writer import Writer
from valuation import NoValuation, Settings, Valuation, count_directions

ON_GPU = torch.cuda.is_available()
STARTS_FROM = ("scratch", "resume", "auto")  # or published weights
TARGET_CHUNKS = 64  # of a target of one's own that an evaluation uses, at most

# -----------------------------------------------------------------------------
# default config values designed to train a gpt2 (124M) on the Pile


@dataclass
class Config:
    # --- input and output
    data_dir: str = "data/pile"  # what prepare_pile.py wrote
    keep: str = ""  # keep.npy of curate.py: train on these chunks only
    out_dir: str = ""  # where the run goes; default out/<name of the config file>
    # scratch; resume: go on from out_dir's checkpoint; auto: if there is one; published weights to
    # begin with: hf:<folder>, or gpt2, gpt2-medium, ..., pythia-410m, ... from the hub
    init_from: str = "scratch"
    # start over in an out_dir that holds a run; that one goes with the first new checkpoint
    overwrite: bool = False
    verify: bool = False  # only check the files in out_dir against their checksums
    seed: int = 1337  # initial weights, order of chunks, draws of target chunks
    # --- valuation
    # what a value is: README, and docs/method.md
    rule: Literal["off", "sgd", "sgd2", "adamw_linear", "adamw", "adamw2"] = "adamw"
    targets: str = "val"  # comma-separated: val | val:<domain> | <name>=<file>
    # chunks of each target that speak for it in a step: more of them, less noise, more time
    target_batch: int = 4
    # the same target chunks all along, or new ones at every step
    target_sampling: Literal["fixed", "redraw"] = "redraw"
    # beta of a mean of the targets' gradients over the steps: a second score of every chunk, the
    # column `smoothed` of ledger.npy, beside its value; try .97. 0: none
    target_smoothing: float = 0.0
    # rule adamw: a step's values that leave more than this part of their size unexplained, or are
    # put in doubt as much by clipping, are computed again, in two passes; 0: not checked
    tolerance: float = 0.05
    # steps between those whose change of the targets' losses is measured and accounted for
    book_interval: int = 20
    # steps between those whose values are compared with the exact truth; 0: never, for it is slow
    audit_interval: int = 0
    audit_permutations: int = 200  # for the truth where a step has more than 12 chunks
    # --- evaluation, logging, checkpoints
    eval_interval: int = 250  # steps between evaluations, by domain; 0: never
    eval_chunks: int = 16  # validation chunks of each domain it uses
    log_interval: int = 10  # steps between progress lines
    checkpoint_interval: int = 250  # steps between checkpoints; a run that ends writes one
    keep_checkpoints: int = 2  # ckpt.pt and older ones, ckpt-<step>.pt
    # keep all of them: revalue.py --hindsight goes back from one to the one before
    hindsight: bool = False
    background: bool = ON_GPU  # copy a checkpoint to host memory, and train while it is written
    wandb_log: bool = False  # offline when there is no login
    wandb_project: str = "nanoshapley"
    wandb_run_name: str = ""  # default: the name of out_dir
    wandb_histogram_interval: int = 100  # steps between histograms of the values
    # --- batch
    batch_size: int = 12  # chunks of a micro-batch
    # micro-batches of a step; the global batch is their product, whatever the number of processes
    gradient_accumulation_steps: int = 1
    block_size: int = 0  # tokens of a chunk to train on; 0: all
    # --- model
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # for pretraining 0 is good, for finetuning try 0.1+
    bias: bool = False  # do we use bias inside LayerNorm and Linear layers?
    tie_weights: bool = True  # wte and lm_head are one matrix
    gelu: Literal["none", "tanh"] = "none"  # its approximation; GPT-2's weights want tanh
    rotary_pct: float = 0.0  # part of each head that rotary positions turn, instead of wpe; 0: none
    parallel_residual: bool = False  # attention and MLP side by side, as in Pythia
    vocab_size: int = 0  # 0: the data's, rounded up to a multiple of 64
    # published weights to begin with, beside --init_from=auto: with another start the same as there
    pretrained: str = ""
    pretrained_sha256: str = ""  # of these weights; written by the run
    # --- optimizer
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 6e-4  # max learning rate
    max_iters: int = 600000  # total number of training iterations
    weight_decay: float = 1e-1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # clip gradients at this value, or disable if == 0.0
    # --- learning rate decay settings
    decay_lr: bool = True  # whether to decay the learning rate
    warmup_iters: int = 2000  # how many steps to warm up for
    lr_decay_iters: int = 0  # should be ~= max_iters per Chinchilla; 0: max_iters
    min_lr: float = 6e-5  # minimum learning rate, should be ~= learning_rate/10 per Chinchilla
    # --- system
    device: str = "cuda" if ON_GPU else "cpu"  # examples: cpu, cuda, cuda:0
    # bfloat16: autocast
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16" if ON_GPU else "float32"
    compile: bool = False  # torch.compile the model
    # under torchrun: FSDP2, every process holds a slice of the model, instead of DDP
    shard: bool = False

    @property
    def batch(self):
        """Chunks of a step, of all processes."""
        return self.batch_size * self.gradient_accumulation_steps

    def __post_init__(self):
        self.lr_decay_iters = self.lr_decay_iters or self.max_iters
        published = self.init_from.startswith(pretrained.PREFIX) or self.init_from in pretrained.HUB
        if self.init_from not in STARTS_FROM and not published:
            known = ", ".join([*STARTS_FROM, "hf:<folder>", *pretrained.HUB])
            raise UserError(f"--init_from={self.init_from}: choose one of {known}")
        config.check(self, at_least=AT_LEAST, above={"learning_rate": 0}, below=BELOW)
        if self.n_embd % self.n_head:
            raise UserError(f"--n_embd={self.n_embd} is not a multiple of --n_head={self.n_head}")
        if self.rotary_pct and not pretrained.is_pairs(self.n_embd // self.n_head, self.rotary_pct):
            head_size = self.n_embd // self.n_head
            what = f"--rotary_pct={self.rotary_pct} turns no pairs of the {head_size} numbers"
            raise UserError(f"{what} of a head: write a part of them that is even, up to 1")
        if self.optimizer == "adamw" and not self.beta2 > 0:
            what = f"--beta2={self.beta2}: AdamW's formulas need it above 0"
            raise UserError(f"{what}: write --beta2=0.95")
        if self.optimizer != "adamw" and self.rule.startswith("adamw"):
            what = f"--rule={self.rule} speaks of AdamW's step"
            cure = f"with --optimizer={self.optimizer} write --rule=sgd or --rule=sgd2"
            raise UserError(f"{what}: {cure}")
        if self.shard and (self.compile or self.audit_interval):
            what = "--shard knows no --compile, and no whole gradients, as --audit_interval does"
            raise UserError(f"{what}: leave those out")
        if self.audit_interval and self.batch < 2:
            what = f"--audit_interval={self.audit_interval} correlates the chunks of a step"
            raise UserError(f"{what}, and there is one: raise --batch_size")

    @classmethod
    def of_run(cls, path):
        """A run's config.json -> its settings (config.py)."""
        return settings_of(path)


AT_LEAST = {
    "target_batch": 1,
    "target_smoothing": 0,
    "tolerance": 0,
    "book_interval": 1,
    "audit_interval": 0,
    "audit_permutations": 1,
    "eval_interval": 0,
    "eval_chunks": 1,
    "log_interval": 1,
    "checkpoint_interval": 1,
    "keep_checkpoints": 1,
    "wandb_histogram_interval": 1,
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "block_size": 0,
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 1,
    "rotary_pct": 0,
    "vocab_size": 0,
    "dropout": 0,
    "max_iters": 1,
    "weight_decay": 0,
    "beta1": 0,
    "beta2": 0,
    "grad_clip": 0,
    "warmup_iters": 0,
    "lr_decay_iters": 0,
    "min_lr": 0,
    "seed": 0,
}
BELOW = {"dropout": 1, "beta1": 1, "beta2": 1, "target_smoothing": 1}


@dataclass
class State:
    """Where a run stands, beside its weights: saved and restored as one."""

    iter_num: int = 0
    best_val_loss: float = math.inf
    evaluations: list = field(default_factory=list)  # the lines of evaluations.jsonl
    wandb_id: str | None = None

    @classmethod
    def of_checkpoint(cls, checkpoint):
        return cls(
            iter_num=checkpoint["iter_num"],
            best_val_loss=checkpoint["best_val_loss"],
            evaluations=json.loads(checkpoint["evaluations"]),
            wandb_id=checkpoint["wandb_id"],
        )

    def to_checkpoint(self):
        return asdict(self) | {"evaluations": json.dumps(self.evaluations)}


# -----------------------------------------------------------------------------
# what a run is made of


def get_model_args(cfg, data):
    """GPTConfig's, as checkpoints have them."""
    return {
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_embd": cfg.n_embd,
        "block_size": cfg.block_size,
        "bias": cfg.bias,
        "dropout": cfg.dropout,
        "tie_weights": cfg.tie_weights,
        "gelu": cfg.gelu,
        "rotary_pct": cfg.rotary_pct,
        "parallel_residual": cfg.parallel_residual,
        # rounded up for efficiency
        "vocab_size": cfg.vocab_size or -(-data.meta["vocab_size"] // 64) * 64,
    }


def build_model(cfg, data, device, is_first=True):
    """Its first weights are a function of the seed, or published ones. is_first: whether these are
    wanted, and not a checkpoint's in their place."""
    torch.manual_seed(cfg.seed)
    model = GPT(GPTConfig(**get_model_args(cfg, data)))
    if cfg.pretrained and is_first:
        found = pretrained.read(cfg.pretrained)
        check_pretrained(cfg, found, data)
        pretrained.put_weights(model, found)
    model.to(device)
    return model.double() if cfg.dtype == "float64" else model


def begin_pretrained(cfg):
    """Published weights to begin with, by --init_from or --pretrained: the sizes of the model
    become theirs. Raises UserError where they are not there, or an option says something else."""
    if cfg.init_from not in STARTS_FROM:
        cfg.pretrained = cfg.init_from
        cfg.init_from = "scratch"
    found = pretrained.read(pretrained.locate(cfg.pretrained))
    folder = found.folder
    longest = found.model_args["block_size"]
    if cfg.block_size > longest:
        what = f"--block_size={cfg.block_size}, but {folder} knows {longest} positions"
        raise UserError(f"{what}: write --block_size={longest}")
    for key, value in found.sizes().items():
        default = Config.__dataclass_fields__[key].default
        if getattr(cfg, key) not in (default, value):
            what = f"--{key}={getattr(cfg, key)}, but {folder} has {key}={value}"
            raise UserError(f"{what}: leave it out, and out of the config file")
        setattr(cfg, key, value)
    cfg.pretrained = str(folder.resolve())
    cfg.pretrained_sha256 = found.sha256()


def check_pretrained(cfg, found, data):
    """Raises UserError where published weights are not those that the run began with, or do not
    know the data's tokens or places."""
    folder = found.folder
    changed = [key for key, value in found.sizes().items() if getattr(cfg, key) != value]
    if changed or cfg.pretrained_sha256 != found.sha256():
        of = f"{changed[0]} in config.json" if changed else "their sha256"
        what = f"the weights in {folder} are not those that the run began with ({of})"
        raise UserError(f"{what}: put those back")
    n_tokens, known = data.meta["vocab_size"], found.model_args["vocab_size"]
    if n_tokens > known:
        what = f"{data.path} has {n_tokens} tokens, the weights in {folder} know {known}"
        raise UserError(f"{what}: prepare the text with their tokenizer")
    if not are_same(data.tokenizer, tokenizer_beside(folder)):
        what = f"{data.path} has other tokens than the weights in {folder}"
        raise UserError(f"{what}: prepare the text with --tokenizer={folder / FILE}")
    longest = found.model_args["block_size"]
    if cfg.block_size > longest:
        what = f"{data.path} has chunks of {cfg.block_size} tokens, {folder} knows {longest}"
        raise UserError(f"{what} positions: write --block_size={longest}")


def build_optimizer(cfg, model):
    if cfg.optimizer == "adamw":
        betas = (cfg.beta1, cfg.beta2)
        device_type = cfg.device.split(":")[0]
        return model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, betas, device_type)
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(params, lr=cfg.learning_rate)


def run_settings(cfg):
    """The settings of the run, not of this start, as config.json and checkpoints hold them."""
    return {key: value for key, value in vars(cfg).items() if key not in STARTS}


# how far rounding may take a target's loss, relatively. Measured on small GPTs, 1,024 labels: the
# change of a loss in a step was off by 2e-7 of the loss in float32, and by 3e-4 in bfloat16
LOSS_ROUNDING = {"float64": 1e-14, "float32": 5e-7, "bfloat16": 5e-4}


def valuation_settings(cfg):
    return Settings(
        rule=cfg.rule,
        batch=cfg.batch,
        target_batch=cfg.target_batch,
        target_sampling=cfg.target_sampling,
        target_smoothing=cfg.target_smoothing,
        tolerance=cfg.tolerance,
        loss_rounding=LOSS_ROUNDING[cfg.dtype],
        micro_batch=cfg.batch_size,
        seed=cfg.seed,
        grad_clip=cfg.grad_clip,
        compile=cfg.compile,
        book_interval=cfg.book_interval,
        audit_interval=cfg.audit_interval,
        audit_permutations=cfg.audit_permutations,
    )


def build_writer(cfg, out_dir, data, targets, state, counted):
    """counted: how far the run's files went at its checkpoint, None for a new run."""
    return Writer(
        out_dir,
        len(data.train.rows),
        len(targets),
        audits=cfg.audit_interval > 0,
        about={"data_hash": data.hash},
        step=state.iter_num,
        counted=counted,
        smoothed=cfg.target_smoothing > 0,
    )


def micro_batches(n_chunks, batch_size):
    """n_chunks in as few equal micro-batches as batch_size allows: slices. (8, 3) -> 4 slices of 2
    chunks."""
    micro_steps = -(-n_chunks // batch_size)
    while n_chunks % micro_steps:
        micro_steps += 1
    size = n_chunks // micro_steps
    return [slice(start, start + size) for start in range(0, n_chunks, size)]


def count_labels(Y, iter_num):
    """The labels of each chunk of a step, int64 (B,). Raises UserError where there is none."""
    n_labels = labels.count(Y)
    if not n_labels.any():
        what = f"step {iter_num}: none of its {len(Y)} chunks has a label within --block_size"
        raise UserError(f"{what}: raise --block_size or --batch_size")
    return n_labels


# learning rate decay scheduler (cosine with warmup)
def get_lr(cfg, it):
    if not cfg.decay_lr:
        return cfg.learning_rate
    # 1) linear warmup for warmup_iters steps
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    # 2) if it > lr_decay_iters, return min learning rate
    if it > cfg.lr_decay_iters:
        return cfg.min_lr
    # 3) in between, use cosine decay down to min learning rate
    decay_ratio = (it - cfg.warmup_iters) / max(1, cfg.lr_decay_iters - cfg.warmup_iters)
    assert 0 <= decay_ratio <= 1
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))  # coeff ranges 0..1
    return cfg.min_lr + coeff * (cfg.learning_rate - cfg.min_lr)


def evaluation_batches(data, cfg):
    """The validation chunks that an evaluation uses, the same every time: [(domain, ids)]."""
    batches = []
    has_label = data.val.n_labels(cfg.block_size) > 0
    for domain in np.unique(data.val.domain[has_label]):
        ids = np.flatnonzero((data.val.domain == domain) & has_label)
        # spread over the domain, for the first ones would be of one document
        ids = ids[:: max(1, len(ids) // cfg.eval_chunks)][: cfg.eval_chunks]
        for some in np.split(ids, range(cfg.batch_size, len(ids), cfg.batch_size)):
            batches.append((domain, some))
    return batches


# helps estimate an arbitrarily accurate loss over the validation set, by domain
@torch.no_grad()
def estimate_loss(model, compute_loss, data, cfg, check):
    """Losses of the same validation chunks every time, in nats -> the mean over the domains,
    weighted by their size, and {domain: mean loss}. check: called before each batch."""
    has_label = data.val.n_labels(cfg.block_size) > 0
    n_chunks = np.bincount(data.val.domain[has_label], minlength=len(data.domains))
    batches = evaluation_batches(data, cfg)
    losses = torch.zeros(len(batches))
    sizes = torch.zeros(len(batches), dtype=torch.float64)  # labels, in chunks full of them
    n_padded = len(batches) + -len(batches) % parallel.size()  # as many for every rank
    model.eval()
    for i in range(parallel.rank(), n_padded, parallel.size()):
        check()
        _, ids = batches[min(i, len(batches) - 1)]
        X, Y = data.val.batch(ids, cfg.block_size)
        loss = float(compute_loss(X, Y))
        if i < len(batches):
            losses[i] = loss
            sizes[i] = labels.count(Y).sum() / cfg.block_size
    model.train()
    losses, sizes = parallel.add([losses, sizes])
    total = np.zeros(len(n_chunks))
    count = np.zeros(len(n_chunks))
    for (domain, _), loss, size in zip(batches, losses.tolist(), sizes.tolist()):
        total[domain] += loss * size
        count[domain] += size
    domains = np.flatnonzero(n_chunks)
    by_domain = total[domains] / count[domains]
    mean = np.average(by_domain, weights=n_chunks[domains])
    names = [data.domains[domain] for domain in domains]
    return float(mean), dict(zip(names, by_domain.tolist()))


@torch.no_grad()
def estimate_target_losses(model, compute_loss, targets, cfg, check):
    """The mean token loss of each of some targets, in nats, over up to TARGET_CHUNKS of its chunks,
    the same every time: {name: loss}. Every process computes all of it. check: called before each
    batch."""
    model.eval()
    losses = {}
    for target in targets:
        picks = np.arange(len(target))
        picks = picks[:: max(1, len(picks) // TARGET_CHUNKS)][:TARGET_CHUNKS]
        total = n_tokens = 0
        for some in np.split(picks, range(cfg.batch_size, len(picks), cfg.batch_size)):
            check()
            X, Y = target.batch(some)
            n_labels = int(labels.count(Y).sum())
            total += float(compute_loss(X, Y)) * n_labels
            n_tokens += n_labels
        losses[target.name] = total / n_tokens
    model.train()
    return losses


def clip_gradients(model, grad_clip):
    """Clips the gradients' norm. Returns what they were multiplied by: 1.0, or a tensor."""
    if grad_clip == 0.0:
        return 1.0
    norm = parallel.full(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip))
    return (grad_clip / (norm + 1e-6)).clamp(max=1.0)


# -----------------------------------------------------------------------------


def train(cfg):
    """One run, from cfg to the files in cfg.out_dir. Returns its progress, [(steps done, mean loss
    in nats since the line before)].

    Raises UserError or OSError, with what to type: before it writes anything where the input is
    wrong; later (a loss that is not finite, a full disk) with the last checkpoint whole.
    """
    if cfg.verify:
        return verify(cfg.out_dir)
    is_new = cfg.pretrained and not cfg.pretrained_sha256
    if is_new or cfg.init_from not in STARTS_FROM:
        begin_pretrained(cfg)
    machine.check_system(cfg)
    device = parallel.start(cfg.device)
    data = open_dataset(cfg.data_dir, cfg.keep)
    longest = data.meta["block_size"]
    if cfg.block_size > longest:
        what = f"--block_size={cfg.block_size} is more than the chunks of {data.path} hold"
        cure = f"type --block_size={longest}, or prepare_pile.py --block_size={cfg.block_size}"
        raise UserError(f"{what}: {cure}")
    cfg.block_size = cfg.block_size or longest
    if cfg.rule == "off":
        targets = []
        texts = own_targets(cfg.targets, data, cfg.block_size)
    else:
        targets = parse_targets(cfg.targets, data, cfg.block_size)
        texts = [target for target in targets if target.ids is None]
    needs.check_batch(cfg, len(data.train.rows if data.keep is None else data.keep))
    n_tokens = data.meta["vocab_size"]
    if 0 < cfg.vocab_size < n_tokens and not cfg.pretrained:
        what = f"--vocab_size={cfg.vocab_size}, but {data.path} has {n_tokens} tokens"
        raise UserError(f"{what}: leave it out")
    needs.check_memory(cfg, cfg.vocab_size or n_tokens, len(targets))
    parallel.mine(cfg.batch)  # raises where the processes cannot share a step
    with RunFolder(cfg.out_dir) as folder, machine.memory_told():
        return run(cfg, folder, device, data, targets, texts)


def run(cfg, folder, device, data, targets, texts):  # noqa: C901 (one flat function, as nanoGPT's)
    """The run in its folder, from the newest checkpoint or from nothing. texts: the targets of the
    user's own, whose losses an evaluation measures too."""
    # various inits, derived attributes, I/O setup
    out_dir = folder.path
    ddp_world_size = parallel.size()
    master_process = parallel.rank() == 0  # this process will do logging, checkpointing etc.
    print0 = terminal.say if master_process else lambda line: None
    torch.backends.cuda.matmul.allow_tf32 = True  # allow tf32 on matmul
    torch.backends.cudnn.allow_tf32 = True  # allow tf32 on cudnn
    device_type = device.split(":")[0]  # for later use in torch.autocast
    interrupted = machine.Interrupted()
    my_rows = parallel.mine(cfg.batch)  # this process's part of a step's chunks
    micro_rows = micro_batches(my_rows.stop - my_rows.start, cfg.batch_size)
    micro_steps = len(micro_rows)

    # data loader: the chunks of a step are a function of (seed, iter_num) alone
    def get_batch(iter_num):
        ids = data.ids(iter_num, cfg.batch, cfg.seed)
        return ids, *data.train.batch(ids, cfg.block_size)

    def to_device(X, Y):
        x, y = torch.as_tensor(X), torch.as_tensor(Y)
        if device_type == "cuda" and not x.is_cuda:
            # pin arrays x,y, which allows us to move them to GPU asynchronously (non_blocking=True)
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    # model init
    state = State()
    checkpoint = None
    ckpt_path = parallel.on_rank_0(lambda: find_checkpoint(cfg, data, targets))
    raw_model = build_model(cfg, data, device, is_first=not ckpt_path)
    if ckpt_path:
        # resume training from a checkpoint.
        checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
        with fitting(ckpt_path):
            raw_model.load_state_dict(checkpoint["model"])
            state = State.of_checkpoint(checkpoint)
    if cfg.shard:
        is_smoothed = cfg.target_smoothing > 0
        n_directions = count_directions(cfg.rule, len(targets), is_smoothed, cfg.tolerance)
        parallel.shard(raw_model, raw_model.transformer.h, n_directions)

    # optimizer
    optimizer = build_optimizer(cfg, raw_model)
    if checkpoint:
        with fitting(ckpt_path):
            load_optimizer(optimizer, checkpoint["optimizer"])

    # compile the model
    model = machine.compile_model(raw_model) if cfg.compile else raw_model

    def compute_loss(X, Y, ledger=None, model=model):
        with torch.amp.autocast(device_type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            # the logits are not kept: they are the largest tensor of the step
            return model(*to_device(X, Y), ledger)[1]

    # wrap model into DDP container
    if not cfg.shard:

        def example_loss(replica):
            ids = np.zeros(cfg.batch // ddp_world_size // micro_steps, int)
            return compute_loss(*data.train.batch(ids, cfg.block_size), model=replica)

        model = parallel.replicate(model, example_loss)

    # the run's folder: from here on something is written
    if master_process and not checkpoint:
        folder.set_aside()  # an older run, until the first commit of this one
        if cfg.keep:  # the file may be gone tomorrow
            files.write_array(out_dir / "chunks.npy", data.keep)
    n_kept = None if cfg.hindsight else cfg.keep_checkpoints
    checkpoints = Checkpoints(folder, n_kept, cfg.background, ckpt_path, state.iter_num)
    if master_process:
        about = machine.describe_run(run_settings(cfg), ddp_world_size, data.hash, config.ROOT)
        files.write_json(out_dir / "config.json", about)

    # valuation
    counted = checkpoint["valuation"].get("records") if checkpoint else None
    valuation = NoValuation()
    if targets:
        writer = None
        if master_process:
            writer = build_writer(cfg, out_dir, data, targets, state, counted)
        settings = valuation_settings(cfg)
        valuation = Valuation(
            raw_model,
            optimizer,
            compute_loss,
            targets,
            settings,
            writer,
            step=state.iter_num,
            check=interrupted.check,
        )
    if checkpoint:
        with fitting(ckpt_path):
            valuation.load_state_dict(checkpoint["valuation"])

    # logging
    board = None
    if cfg.wandb_log and master_process:
        visits = store.read(out_dir) if targets and state.iter_num else ()
        decode = data.tokenizer.decode
        board = dashboard.Board(cfg, state.wandb_id, data, targets, decode, visits)
        state.wandb_id = board.wandb_id

    can_evaluate = len(evaluation_batches(data, cfg)) > 0

    def is_evaluated(iter_num):
        """Whether the validation loss is due after so many steps, and was not found before."""
        if not cfg.eval_interval or not can_evaluate:
            return False
        is_due = iter_num % cfg.eval_interval == 0 or iter_num == cfg.max_iters
        return is_due and iter_num not in [e["step"] for e in state.evaluations]

    def evaluate(iter_num):
        if iter_num == first_iter_num:
            print0(describe_evaluation(cfg, data))
        check = interrupted.check
        loss, by_domain = estimate_loss(raw_model, compute_loss, data, cfg, check)
        state.best_val_loss = min(state.best_val_loss, loss)
        state.evaluations = [e for e in state.evaluations if e["step"] < iter_num]
        evaluation = {"step": iter_num, "val": loss, "loss": by_domain}
        by_target = estimate_target_losses(raw_model, compute_loss, texts, cfg, check)
        if by_target:
            evaluation["target"] = by_target
        state.evaluations.append(evaluation)
        for line in evaluation_lines(iter_num, loss, by_domain, by_target):
            print0(line)
        if master_process:
            files.write_lines(out_dir / "evaluations.jsonl", state.evaluations)
        if board:
            board.evaluated(state.evaluations)

    def save_checkpoint():
        valuation.commit()  # the values first, then the checkpoint that counts on them
        weights = raw_model.state_dict(keep_vars=True)
        checkpoint = {
            "model": {name: p for name, p in weights.items() if p.requires_grad},
            "optimizer": optimizer.state_dict(),
            "model_args": vars(raw_model.config),
            **state.to_checkpoint(),
            "config": run_settings(cfg),
            "valuation": valuation.state_dict(),
            "data_hash": data.hash,
            "keep": store.crc(data.keep),
            "tokenizer": data.meta["tokenizer"],
            "rng": parallel.gather_objects(machine.rng_state()),
        }
        checkpoints.write(state.iter_num, checkpoint)
        if board and targets:
            totals = board.totals(valuation.writer.total, valuation.writer.used, state.iter_num)
            board.log(totals, step=state.iter_num)

    names = [target.name for target in targets]
    print0(describe_start(cfg, raw_model, data, device))
    valued = f"rule {cfg.rule}, targets: {', '.join(names) or 'none'}"
    print0(f"steps {state.iter_num} to {cfg.max_iters}, {valued} -> {out_dir}")
    if master_process:
        vocab_size = raw_model.config.vocab_size
        n_chunks = len(data.train.rows)
        for line in needs.expected(cfg, out_dir, vocab_size, len(targets), n_chunks):
            print0(line)
    for target in targets:
        for note in target.notes:
            print0(note)

    # random numbers (dropout): of each process its own, and on a resumption those that would follow
    if not master_process:
        torch.manual_seed(cfg.seed + parallel.rank())
    if checkpoint and parallel.rank() < len(checkpoint["rng"]):
        with fitting(ckpt_path):
            machine.set_rng_state(checkpoint["rng"][parallel.rank()])
    checkpoint = None  # free up memory

    # training loop
    first_iter_num = saved_iter_num = state.iter_num
    peak_flops = ddp_world_size * machine.peak_flops(device)
    progress = Progress(raw_model, cfg, first_iter_num, peak_flops)
    interrupted.listen()
    with contextlib.suppress(machine.Stopped):  # by Ctrl-C: the step under way is given up
        for iter_num in range(first_iter_num, cfg.max_iters + 1):
            # what a step that is given up has drawn is drawn again when the run goes on
            rng = machine.rng_state()

            # determine and set the learning rate for this iteration
            lr = get_lr(cfg, iter_num)
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr

            # evaluate the loss on the validation set
            if is_evaluated(iter_num):
                with progress.pause():
                    evaluate(iter_num)
            # termination conditions
            if iter_num == cfg.max_iters:
                break

            # forward backward update, with gradient accumulation to simulate larger batch size
            ids, X, Y = get_batch(iter_num)
            n_labels = count_labels(Y, iter_num)
            # one-pass rules: the targets' gradients become directions
            valuation.begin_step(iter_num, lr, tokens=(X, Y))
            ids, X, Y, my_labels = ids[my_rows], X[my_rows], Y[my_rows], n_labels[my_rows]
            for micro_step in range(micro_steps):
                interrupted.check()
                rows = micro_rows[micro_step]
                x, y = to_device(X[rows], Y[rows])
                # the step's loss is the mean over all its labels: what this mean counts in it
                share = my_labels[rows].sum() / n_labels.sum()
                # zeros (b, K); its gradient: the values
                ledger = valuation.new_ledger(ids[rows], x, y, share)
                # in DDP training we only need to sync gradients at the last micro step.
                model.require_backward_grad_sync = micro_step == micro_steps - 1
                loss = compute_loss(x, y, ledger, model)
                # scale the loss to account for gradient accumulation; gradients are the ranks' mean
                scale = share * ddp_world_size
                (loss * scale).backward()
                progress.losses.append(loss.detach() * (scale * micro_steps))
            # clip the gradient
            clip_coef = clip_gradients(raw_model, cfg.grad_clip)
            # two-pass rules: now the batch's gradient is known
            valuation.before_update(clip_coef)
            with interrupted.held():  # weights and values move together
                # step the optimizer
                optimizer.step()
                # flush the gradients as soon as we can, no need for this memory anymore
                optimizer.zero_grad(set_to_none=True)
                valuation.end_step()
                state.iter_num = iter_num + 1

            # timing and logging
            is_last = state.iter_num == cfg.max_iters
            is_saved = state.iter_num % cfg.checkpoint_interval == 0 and not is_last
            if is_last or is_saved or progress.is_due(state.iter_num):
                recent = valuation.flush()  # names the chunks if a loss or a value is not finite
                since = progress.iter_num
                lines, metrics = progress.lines(state.iter_num, valuation, recent)
                for line in lines:
                    print0(line)
                if board:
                    metrics["train/lr"] = lr
                    if targets:
                        interval = cfg.wandb_histogram_interval
                        is_due = state.iter_num % interval < state.iter_num - since
                        metrics.update(board.values(recent, histogram=is_due))
                    board.log(metrics, step=state.iter_num)
            if is_saved:
                save_checkpoint()
                saved_iter_num = state.iter_num

    # the last checkpoint: of the last whole step
    if interrupted.is_stopped:
        machine.set_rng_state(rng)
    if state.iter_num > saved_iter_num:
        save_checkpoint()
    checkpoints.wait()
    if board:
        board.finish()
    interrupted.restore()
    if interrupted.is_stopped and not state.iter_num:
        print0("stopped before the end of the first step: nothing is saved")
        raise KeyboardInterrupt

    # the end: what was found, and what to type
    if valuation.writer and valuation.writer.used.any():
        for line in end_table(cfg, valuation.writer, data, names):
            print0(line)
        if valuation.check_seconds:
            part = progress.share(valuation.check_seconds)
            print0(f"passes: checks and second passes took {part:.0%} of this run's time")
    written = [name for name in RUN_FILES if (out_dir / name).exists()]
    print0("")
    print0(f"written to {out_dir} in {progress.took()}: {', '.join(written)}")
    if interrupted.is_stopped:
        print0(f"stopped after step {state.iter_num}; to go on: {resume_command(out_dir)}")
    elif first_iter_num >= cfg.max_iters:
        more = f"--max_iters={2 * first_iter_num}"
        print0(f"already at step {first_iter_num}; to go on: {resume_command(out_dir)} {more}")
    if not (out_dir / REVALUATION).exists():  # else revalue.py says what is next
        print0(f"next: {next_command(cfg)}")
    return progress.history


def describe_start(cfg, model, data, device):
    """The run in a line: its size, its data, where it runs."""
    size = f"{model.get_num_params() / 1e6:.2f}M parameters"
    chunks = f"{len(data.train.rows):,} chunks"
    if cfg.keep:
        chunks = f"{len(data.keep):,} of {chunks}"
    devices = device if parallel.size() == 1 else f"{device} x {parallel.size()}"
    return f"{size}, {chunks} of {cfg.block_size} tokens, B = {cfg.batch}, {devices} {cfg.dtype}"


def describe_evaluation(cfg, data):
    """What the first evaluation is about to do, for it may take a while."""
    n_chunks = sum(len(ids) for _, ids in evaluation_batches(data, cfg))
    n_domains = len({domain for domain, _ in evaluation_batches(data, cfg)})
    chunks = f"{n_chunks:,} validation chunks of {n_domains} domains"
    return f"evaluating {chunks}; every domain's loss goes to {cfg.out_dir}/evaluations.jsonl"


def end_table(cfg, writer, data, names):
    """The lines that say what was found: values by domain, the books, the audit."""
    books = store.read(writer.run, "books")
    audits = store.read(writer.run, "audit") if cfg.audit_interval else []
    visits = store.read(writer.run)
    found = findings.of_run(writer.total, writer.used, [visits], cfg.batch, data, names)
    return tables.end_of_run(found, books, audits, cfg.rule)


def next_command(cfg):
    """What to type after a run: look at its values. Without values, compare it with the run that
    its chunks were chosen from, or see what it writes."""
    if cfg.rule != "off" and cfg.hindsight:
        return terminal.command("python", "revalue.py", cfg.out_dir, "--hindsight")
    if cfg.rule != "off":
        return terminal.command("python", "report.py", cfg.out_dir)
    chosen_from = Path(cfg.keep).parent
    is_another_run = chosen_from.resolve() != Path(cfg.out_dir).resolve()
    if cfg.keep and is_another_run and (chosen_from / "evaluations.jsonl").exists():
        folders = [str(chosen_from), cfg.out_dir]
        return terminal.command("python", "values.py", "losses", *folders)
    return terminal.command("python", "sample.py", cfg.out_dir)


def resume_command(out_dir):
    """What to type for a run to go on."""
    program = ["python"]
    if parallel.size() > 1:
        program = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    return terminal.command(*program, "train.py", f"{out_dir}/config.json", "--init_from=resume")


if __name__ == "__main__":
    config.main(lambda: train(config.load(Config)), leave=parallel.leave)
