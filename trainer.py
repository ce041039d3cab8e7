"""
transformers.Trainer that values every training example in the same run.

    from trainer import Chunks, ValuationTrainer

    data = Chunks("data/mine")                     # as prepare_pile.py wrote them
    trainer = ValuationTrainer(model, args, train_dataset=data, targets="val")
    trainer.train()                                # python values.py <output_dir>/values

Or with a dataset of your own, and a dataset for each target:

    trainer = ValuationTrainer(
        model, args, train_dataset=train, data_collator=collate, targets={"validation": held_out}
    )

The weights are those that transformers.Trainer ends with. The folder <output_dir>/values has a
value for each example of the training set, in its order: docs/trainer.md. A target's examples go
through the data_collator, and its loss is of the same kind as the training's.

What a step is: gradient_accumulation_steps micro-batches, whose loss is the mean over all their
labels where the model heeds num_items_in_batch, as language models do. Else it is the mean of the
micro-batches' means; but of models that take that number and ignore it, Trainer adds them up.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

import config
from data import open_dataset, parse_targets
from shapley import labels
from shapley.wrap import Net, next_tokens
from show import findings, tables
from system import machine, store, terminal
from system.errors import UserError
from system.files import write_array, write_json
from system.machine import replaying, rng_state
from system.trainers import MADE_BY
from system.writer import Writer
from valuation import Settings, Valuation

NUMBER = "example_number"  # its place in the training set, beside its inputs
SHIFTED = "shift_labels"  # as transformers call labels where they are predicted
STATE = "valuation.pt"  # of a valuation, in a checkpoint of the Trainer
AGREE = 1e-3  # the relative difference of two losses that are one


class Chunks(torch.utils.data.Dataset):
    """The training chunks of a data folder of prepare_pile.py, for causal language models:
    input_ids, and what follows each of them, shift_labels, int64 (block_size,). -100 is no label.
    Raises UserError as open_dataset() does.

    keep: a file of curate.py, of the chunks to train on. block_size: tokens of a chunk to train on;
    0: all."""

    def __init__(self, data_dir, keep="", block_size=0):
        self.data = open_dataset(data_dir, keep)
        longest = self.data.meta["block_size"]
        if not 0 <= block_size <= longest:
            what = f"block_size={block_size}, but the chunks of {self.data.path} hold {longest}"
            raise UserError(f"{what}: write block_size=0 for all")
        self.block_size = block_size or longest

    def __len__(self):
        data = self.data
        return len(data.train.rows if data.keep is None else data.keep)

    def __getitem__(self, i):
        chunk = int(i if self.data.keep is None else self.data.keep[i])
        X, Y = self.data.train.batch([chunk], self.block_size)
        following = np.where(Y[0] < 0, -100, Y[0])
        # a model computes no loss without labels; they are not read where shift_labels are
        return {"input_ids": X[0], "labels": X[0], SHIFTED: following, NUMBER: chunk}


class Numbered(torch.utils.data.Dataset):
    """A dataset whose items are dicts, with their numbers in it."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return {**self.dataset[i], NUMBER: int(i)}


@dataclass
class NumberedCollator:
    """A data_collator that hands on the examples' numbers, where they have some."""

    collate: object

    def __call__(self, features):
        features = [dict(feature) for feature in features]
        numbers = [feature.pop(NUMBER, None) for feature in features]
        batch = dict(self.collate(features))
        if None not in numbers:
            batch[NUMBER] = torch.tensor(numbers)
        return batch


class ValuationTrainer(transformers.Trainer):
    """See the module's docstring. Raises UserError for what has no values that can be trusted."""

    def __init__(
        self,
        *args,
        targets,
        run="",
        rule="adamw2",
        target_batch=4,
        target_smoothing=0.0,
        tolerance=0.05,
        book_interval=20,
        audit_interval=0,
        loss=None,
        **kwargs,
    ):
        """targets: whose loss the values speak of, {name: dataset}; of Chunks what train.py's
        --targets takes, as "val". run: the folder for values; empty: values in output_dir. rule,
        target_batch, target_smoothing, tolerance, book_interval, audit_interval: train.py's options
        of these names. loss(outputs, Y, reduction="none"): of the examples, as in shapley/wrap.py,
        where it is not the mean cross-entropy of the model's labels. The others are
        transformers.Trainer's."""
        super().__init__(*args, **kwargs)
        check_arguments(self.args, self.train_dataset, self.compute_loss_func)
        self.run_folder = Path(run or Path(self.args.output_dir, "values"))
        self.loss_is_known = loss is not None
        self.ignores_count = False  # whether the model takes num_items_in_batch and ignores it
        self.example_loss = loss or cross_entropy
        self.loss_is_scaled_for_ga = True  # by compute_loss below
        self.predicts_next = predicts_next(self.model)
        self.data_collator = NumberedCollator(self.data_collator)
        self.chunks = self.train_dataset if isinstance(self.train_dataset, Chunks) else None
        self.targets_text = targets if isinstance(targets, str) else ""
        self.targets = self.read_targets(targets)
        if self.chunks:
            self.n_examples = len(self.chunks.data.train.rows)
        else:
            self.n_examples = len(self.train_dataset)
            self.train_dataset = Numbered(self.train_dataset)
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self.settings = Settings(
            rule=rule,
            batch=batch,
            target_batch=target_batch,
            target_smoothing=target_smoothing,
            tolerance=tolerance,
            seed=self.args.seed,
            grad_clip=self.args.max_grad_norm or 0.0,
            book_interval=book_interval,
            audit_interval=audit_interval,
        )
        self.valuation = self.resumed = None
        self.add_callback(Calls(self))

    def read_targets(self, targets):
        if self.chunks:
            if not self.targets_text:
                raise UserError("of Chunks the targets are a text, as train.py's: write 'val'")
            return parse_targets(targets, self.chunks.data, self.chunks.block_size)
        if not isinstance(targets, dict) or not targets:
            raise UserError("targets: write {name: dataset}, at least one")
        # without what the model has no use for, as Trainer leaves it out of training and evaluation
        collate = self._get_collator_with_removed_columns(self.data_collator)
        return [
            Target(name, dataset, collate, self.inputs_and_labels, self.args.seed)
            for name, dataset in targets.items()
        ]

    # --- a run ------------------------------------------------------------------------

    def begin_valuation(self):
        """Before the first step, with the optimizer and, of a run that goes on, its state there."""
        step = self.state.global_step
        if not step and (self.run_folder / "values.json").exists():
            cure = "move it away, name another run, or go on with resume_from_checkpoint=True"
            raise UserError(f"{self.run_folder} holds the values of a run: {cure}")
        if step:
            self.check_resumed(step)
        writer = Writer(
            self.run_folder,
            self.n_examples,
            len(self.targets),
            audits=self.settings.audit_interval > 0,
            about={"data_hash": self.chunks.data.hash if self.chunks else ""},
            step=step,
            counted=self.resumed["valuation"]["records"] if step else None,
            smoothed=self.settings.target_smoothing > 0,
        )
        self.net = Net(self.model, self.example_loss, mean="labels")
        self.valuation = Valuation(
            self.net,
            self.optimizer.optimizer,
            self.net_loss,
            self.targets,
            self.settings,
            writer,
            step=step,
        )
        if step:
            self.valuation.load_state_dict(self.resumed["valuation"])
        if self.chunks:
            self.describe_run()

    def identity(self):
        """What has to stay the same where a run goes on."""
        return {
            "rule": self.settings.rule,
            "batch": self.settings.batch,
            "target_batch": self.settings.target_batch,
            "target_smoothing": self.settings.target_smoothing,
            "tolerance": self.settings.tolerance if self.settings.rule == "adamw" else 0.0,
            "seed": self.settings.seed,
            "examples": self.n_examples,
            "data_hash": self.chunks.data.hash if self.chunks else "",
            "targets": [target.name for target in self.targets],
        }

    def check_resumed(self, step):
        """Raises UserError where the checkpoint of a step is not one of this run."""
        if not self.resumed:
            what = f"the checkpoint of step {step} has no {STATE}"
            raise UserError(f"{what}: it is not of a ValuationTrainer. Begin anew")
        for name, value in self.identity().items():
            before = self.resumed["of"].get(name, store.ADDED.get(name))
            if before != value:
                what = f"the checkpoint of step {step} has {name}={before}, and not {value}"
                raise UserError(f"{what}: go on as it began, or begin anew")

    def describe_run(self):
        """config.json, which values.py, report.py and curate.py read."""
        args, of_model = self.args, self.model.config
        settings = {
            "rule": self.settings.rule,
            "targets": self.targets_text,
            "target_batch": self.settings.target_batch,
            "book_interval": self.settings.book_interval,
            "audit_interval": self.settings.audit_interval,
            "data_dir": str(self.chunks.data.path),
            "block_size": self.chunks.block_size,
            "batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "max_iters": self.state.max_steps,
            "checkpoint_interval": self.state.save_steps or self.state.max_steps,
            "optimizer": type(self.optimizer.optimizer).__name__.lower(),
            "learning_rate": args.learning_rate,
            "warmup_iters": args.get_warmup_steps(self.state.max_steps),
            "grad_clip": args.max_grad_norm or 0.0,
            "seed": args.seed,
            "n_layer": getattr(of_model, "num_hidden_layers", 0),
            "n_head": getattr(of_model, "num_attention_heads", 0),
            "n_embd": getattr(of_model, "hidden_size", 0),
            "tie_weights": bool(getattr(of_model, "tie_word_embeddings", False)),
        }
        about = machine.describe_run(settings, 1, self.chunks.data.hash, config.ROOT)
        about["made_by"] = MADE_BY
        write_json(self.run_folder / "config.json", about)
        if self.chunks.data.keep is not None:
            write_array(self.run_folder / "chunks.npy", self.chunks.data.keep)

    def end_valuation(self):
        self.valuation.commit()
        writer = self.valuation.writer
        if self.chunks and writer.used.any():
            names = [target.name for target in self.targets]
            visits, books = store.read(writer.run), store.read(writer.run, "books")
            audits = store.read(writer.run, "audit") if "audit" in writer.records else []
            data, batch = self.chunks.data, self.settings.batch
            found = findings.of_run(writer.total, writer.used, [visits], batch, data, names)
            for line in tables.end_of_run(found, books, audits, self.settings.rule):
                terminal.say(line)
        terminal.say(f"values of {np.count_nonzero(writer.used):,} examples in {self.run_folder}")
        if self.chunks:
            report = terminal.command("python", "report.py", str(self.run_folder))
            terminal.say(f"next: {report}")
        self.valuation = None

    # --- a step -----------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Before a step's first forward, where all of its examples are known."""
        batches, n_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            missing = [batch for batch in batches if NUMBER not in batch]
            if missing:
                raise UserError("examples without numbers: let the data loader be the Trainer's")
            tokens = [self.inputs_and_labels(batch)[0] for batch in batches]
            lr = self.optimizer.param_groups[0]["lr"]
            self.valuation.begin_step(self.state.global_step, lr, tokens=tokens)
            self.clip_coef = 1.0
        return batches, n_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """What a micro-batch adds to its step's loss. Of an evaluation Trainer's own."""
        inputs = dict(inputs)
        numbers = inputs.pop(NUMBER, None)
        if not model.training or numbers is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        X, Y = self.inputs_and_labels(inputs)
        self.look_at_loss(inputs, X, Y, num_items_in_batch)
        share = self.share(Y, num_items_in_batch)
        ledger = self.valuation.new_ledger(numbers.cpu().numpy(), X, Y, share)
        with self.accelerator.autocast():
            outputs, loss = self.net(X, Y, ledger)
        return (loss * share, outputs) if return_outputs else loss * share

    def inputs_and_labels(self, batch):
        """A batch -> the model's inputs, and the labels where the outputs predict them."""
        beside = ("labels", SHIFTED, NUMBER)
        inputs = {name: value for name, value in batch.items() if name not in beside}
        if "labels" not in batch:
            raise UserError("the data_collator gives no labels: see docs/trainer.md")
        if self.predicts_next and SHIFTED in batch:
            return inputs, batch[SHIFTED]
        return inputs, next_tokens(batch["labels"]) if self.predicts_next else batch["labels"]

    def net_loss(self, X, Y, ledger=None):
        with self.accelerator.autocast():
            return self.net(X, Y, ledger)[1]

    def share(self, Y, num_items_in_batch):
        """What a micro-batch's mean loss counts in its step's, as Trainer has it."""
        if num_items_in_batch is None:
            return 1 / self.current_gradient_accumulation_steps
        if self.ignores_count:
            return 1.0
        return float(labels.count(Y).sum() / num_items_in_batch)

    @torch.no_grad()
    def look_at_loss(self, inputs, X, Y, num_items_in_batch):
        """In the first micro-batch with labels: does the model make anything of the number of the
        step's labels? Raises UserError where the loss that is valued is not its own."""
        if self.loss_is_known or not labels.count(Y).any():
            return
        self.loss_is_known = True
        own = self.own_loss(inputs)
        with replaying(rng_state()):
            valued = self.net_loss(X, Y)
        if not agree(own, valued):
            what = f"the model's own loss is {own:.6g}, the mean cross-entropy {valued:.6g}"
            raise UserError(f"{what}: pass loss=..., of single examples (docs/trainer.md)")
        if num_items_in_batch is not None:
            n_labels = labels.count(Y).sum()
            halved = self.own_loss({**inputs, "num_items_in_batch": 2 * n_labels})
            self.ignores_count = agree(halved, own)
            if not self.ignores_count and not agree(2 * halved, own):
                what = f"with twice as many labels in its step a micro-batch's loss is {halved:.6g}"
                raise UserError(f"{what}, alone it is {own:.6g}: pass loss=..., of single examples")

    def own_loss(self, inputs):
        """The model's, on a batch."""
        with replaying(rng_state()):
            return self.model(**inputs)["loss"]

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        self.clip_coef = (self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    # --- Trainer's own, with numbers and values ----------------------------------------

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        missing = {NUMBER, SHIFTED}.difference(self._signature_columns)
        self._signature_columns.extend(sorted(missing))

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.valuation:
            self.valuation.commit()  # the values first, then the checkpoint that counts on them
            state = {"of": self.identity(), "valuation": self.valuation.state_dict()}
            torch.save(state, Path(output_dir, STATE))
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint or "", STATE)
        if checkpoint and path.is_file():
            self.resumed = torch.load(path, map_location="cpu", weights_only=True)


class Calls(transformers.TrainerCallback):
    """The calls of a valuation that Trainer has events for."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_valuation()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.valuation.before_update(self.trainer.clip_coef)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.valuation.end_step()

    def on_log(self, args, state, control, **kwargs):
        if self.trainer.valuation:
            self.trainer.valuation.flush()  # names the examples if a value is not finite

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.end_valuation()


@dataclass
class Target:
    """A dataset whose loss the values speak of (shapley/targets.py)."""

    name: str
    dataset: object
    collate: object
    inputs_and_labels: object
    seed: int
    ids: np.ndarray | None = None
    source: str = "examples"

    def batch(self, picks):
        with replaying(rng_state()):
            torch.manual_seed(self.seed)  # for collators that draw masks
            batch = self.collate([self.dataset[int(i)] for i in picks])
        return self.inputs_and_labels(batch)

    def __len__(self):
        return len(self.dataset)


def cross_entropy(outputs, Y, reduction="none"):
    """Of classes (B, C) with Y (B,), or of tokens (B, T, C) with Y (B, T), in float32 at least."""
    if outputs.dtype in (torch.bfloat16, torch.float16):
        outputs = outputs.float()
    return F.cross_entropy(outputs.mT if Y.dim() > 1 else outputs, Y, reduction=reduction)


def agree(loss, other):
    return bool(abs(loss - other) <= AGREE * abs(loss))


def predicts_next(model):
    """Whether a model's labels are the inputs' own tokens, each predicted at the one before it."""
    if hasattr(model, "get_base_model"):  # of an adapter
        model = model.get_base_model()
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    return getattr(model, "loss_function", None) is ForCausalLMLoss and not is_encoder_decoder


def check_arguments(args, dataset, loss):
    """Raises UserError for arguments of Trainer that a valuation does not know."""
    if args.world_size > 1 or args.n_gpu > 1:
        raise UserError("a valuation by Trainer runs in one process, on one device")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UserError("the training set needs a length and numbered examples: no iterable one")
    unknown = ["fp16", "torch_compile", "auto_find_batch_size", "label_smoothing_factor"]
    unknown += ["deepspeed", "fsdp", "use_liger_kernel"]
    for name in unknown:
        if getattr(args, name, None):
            value = getattr(args, name)
            raise UserError(
                f"{name}={value}: a valuation by Trainer does not know it, leave it out"
            )
    if loss is not None:
        raise UserError("compute_loss_func gives no losses of single examples: pass loss=...")
    if not math.isfinite(args.max_grad_norm or 0.0):
        raise UserError(f"max_grad_norm={args.max_grad_norm}: write 0 for none")
