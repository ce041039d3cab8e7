"""trainer.py: transformers.Trainer with values, beside Trainer itself, train.py and the truth."""

import os
import re
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from commands import run as command
from runs import in_process, run
from test_pairs import pairs  # noqa: F401 (a fixture)

import data
import export
from shapley import exact
from show.run import open_run
from system import store
from system.errors import UserError

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import trainer  # noqa: E402 (needs transformers)
from trainer import Chunks, ValuationTrainer  # noqa: E402

VOCAB = 61
N = 22  # examples: the last batch of an epoch is ragged


def examples(n, seed):
    """Texts of 6 to 13 tokens, whose first ones have no label."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(n):
        tokens = rng.integers(VOCAB, size=rng.integers(6, 14)).tolist()
        n_prompt = rng.integers(1, 4)
        labels = [-100] * n_prompt + tokens[n_prompt:]
        drawn.append({"input_ids": tokens, "labels": labels})
    return drawn


def padded(features):
    longest = max(len(feature["input_ids"]) for feature in features)

    def column(name, padding):
        rows = [f[name] + [padding] * (longest - len(f[name])) for f in features]
        return torch.tensor(rows)

    features = [{**f, "attention_mask": [1] * len(f["input_ids"])} for f in features]
    fillings = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {name: column(name, padding) for name, padding in fillings.items()}


def gpt2(dropout=0.1, adapter=False):
    torch.manual_seed(0)
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes = dict(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    ends = dict(bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends, **drops))
    if not adapter:
        return model
    targets = ["c_attn", "c_fc"]
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, fan_in_fan_out=True)
    return peft.get_peft_model(model, lora)


def arguments(folder, **options):
    usual = dict(
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-3,
        warmup_steps=2,
        adam_epsilon=1e-5,  # else AdamW makes much of a gradient that is 0 but for rounding
        max_grad_norm=0.5,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return transformers.TrainingArguments(str(folder), **{**usual, **options})


def valued(folder, model=None, kind=ValuationTrainer, **options):
    """A ValuationTrainer on examples. options: its own, and those of TrainingArguments."""
    own = {key: options.pop(key) for key in list(options) if key in OWN}
    given = dict(train_dataset=examples(N, 1), eval_dataset=examples(9, 2), data_collator=padded)
    given |= dict(targets={"held out": examples(12, 3)}) | own
    return kind(model or gpt2(), arguments(folder, **options), **given)


OWN = ("targets", "rule", "train_dataset", "data_collator", "audit_interval", "target_batch")
OWN += ("eval_dataset", "loss", "callbacks", "compute_loss_func", "book_interval")


def plain(folder, model, **options):
    """Trainer itself, trained. Returns its weights."""
    given = dict(train_dataset=examples(N, 1), eval_dataset=examples(9, 2), data_collator=padded)
    transformers.Trainer(model, arguments(folder, **options), **given).train()
    return list(model.parameters())


def ledger(folder):
    return store.read(folder / "values")


def farthest(weights, others):
    return max(float((a - b).abs().max()) for a, b in zip(weights, others, strict=True))


# --- Trainer's training -----------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("adapter", [False, True])
def test_weights_are_trainers_own_and_each_example_is_visited_once_an_epoch(
    tmp_path, accumulation, adapter
):
    """With padding, prompts without labels, dropout, clipping, a ragged last step, evaluations."""
    often = dict(eval_strategy="steps", eval_steps=2, gradient_accumulation_steps=accumulation)
    model = gpt2(adapter=adapter)
    valued(tmp_path / "ours", model, **often).train()
    others = plain(tmp_path / "theirs", gpt2(adapter=adapter), **often)
    assert farthest(model.parameters(), others) < 1e-6
    moved = farthest(model.parameters(), gpt2(adapter=adapter).parameters())
    assert moved > 1e-3
    visits = store.filled(ledger(tmp_path / "ours"))
    assert (np.bincount(visits["chunk"], minlength=N) == 2).all()
    values = np.load(tmp_path / "ours/values/values.npy")
    assert values.shape == (N, 1)
    assert np.isfinite(values).all()


@pytest.mark.parametrize("column", ["text", "number", "example_number"])
def test_columns_that_the_model_has_no_use_for_are_left_out(tmp_path, column):
    """Of a dataset of Hugging Face, in training, evaluation and targets; also of such a name."""

    def collate(features):
        assert set(features[0]) == {"input_ids", "labels"}
        return padded(features)

    def with_text(n, seed):
        return datasets.Dataset.from_list([{**e, column: 7} for e in examples(n, seed)])

    options = dict(train_dataset=with_text(N, 1), targets={"t": with_text(12, 3)})
    options |= dict(eval_dataset=with_text(9, 2), data_collator=collate)
    valued(tmp_path / "ours", **options, eval_strategy="epoch").train()
    valued(tmp_path / "plain", eval_strategy="epoch").train()
    assert ledger(tmp_path / "ours").tobytes() == ledger(tmp_path / "plain").tobytes()


OPTIONS = [{"gradient_checkpointing": True}, {"neftune_noise_alpha": 5.0}]
OPTIONS += [{"train_sampling_strategy": "group_by_length"}, {"optim": "adamw_torch_fused"}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_trainers_options_do_what_they_do(tmp_path, options):
    model, options = gpt2(), {**options, "max_steps": 4}
    valued(tmp_path / "ours", model, **options).train()
    assert farthest(model.parameters(), plain(tmp_path / "theirs", gpt2(), **options)) < 1e-6


def test_bfloat16_is_trainers(tmp_path):
    model = gpt2()
    valued(tmp_path / "ours", model, bf16=True).train()
    others = plain(tmp_path / "theirs", gpt2(), bf16=True)
    assert farthest(model.parameters(), others) < 1e-4
    valued(tmp_path / "exact").train()
    of_half, of_float = ledger(tmp_path / "ours")["value"], ledger(tmp_path / "exact")["value"]
    assert np.corrcoef(of_half[:, 0], of_float[:, 0])[0, 1] > 0.99
    assert not np.array_equal(of_half, of_float)


# --- the truth ----------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_a_value_is_the_step_along_the_examples_own_gradient(tmp_path, accumulation):
    """SGD's first step: lr kappa <gradient of the example's part of the loss, the target's>."""
    model, before = gpt2(dropout=0.0), gpt2(dropout=0.0)
    sgd = dict(optim="sgd", rule="sgd", learning_rate=0.1, warmup_steps=0, max_steps=1)
    made = valued(tmp_path, model, **sgd, gradient_accumulation_steps=accumulation, target_batch=12)
    made.train()
    visits = ledger(tmp_path)
    of_run = examples(N, 1)
    batch = padded([of_run[i] for i in visits["chunk"]])

    def gradient(batch):
        """Of the sum over its labels."""
        logits = before(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        summed = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        return torch.autograd.grad(summed, list(before.parameters()))

    target = padded(examples(12, 3))
    n_target = int((target["labels"][:, 1:] >= 0).sum())
    # Trainer counts the first labels too, where the class of a model names no loss
    n_step = int((batch["labels"] != -100).sum())
    h = gradient(target)
    kappa = min(1.0, 0.5 / float(torch.cat([g.flatten() for g in gradient(batch)]).norm() / n_step))
    for row, value in enumerate(visits["value"][:, 0]):
        own = gradient({name: rows[[row]] for name, rows in batch.items()})
        expected = 0.1 * kappa * float(exact.dot(own, h)) / n_step / n_target
        assert abs(value - expected) < 1e-5 * np.abs(visits["value"]).max()


@pytest.mark.parametrize("adapter", [False, True])
def test_values_are_those_of_the_exact_game_of_the_step(tmp_path, adapter):
    options = dict(audit_interval=2, num_train_epochs=4, max_grad_norm=0.0)
    options |= dict(gradient_accumulation_steps=2, book_interval=1)
    valued(tmp_path, gpt2(dropout=0.0, adapter=adapter), **options).train()
    audits = store.read(tmp_path / "values", "audit")
    late = audits[audits["step"] > 3]
    assert len(late) > 2
    assert (late["pearson"] > 0.99).all()
    assert (late["rel_l2"] < 0.1).all()


class Classifier(torch.nn.Module):
    """A model that knows nothing of num_items_in_batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        sizes |= dict(intermediate_size=32, max_position_embeddings=32, num_labels=3)
        self.config = transformers.BertConfig(**sizes)
        self.bert = transformers.BertForSequenceClassification(self.config)

    def forward(self, input_ids, attention_mask, labels=None):
        return self.bert(input_ids, attention_mask=attention_mask, labels=labels)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_classifier_is_valued(tmp_path, wrapped):
    """One label an example. Where the model does not know how many a step has, its loss is the mean
    of its micro-batches' means, of which the last ones are smaller."""
    classes = [{**example, "labels": i % 3} for i, example in enumerate(examples(N, 1))]

    def collate(features):
        batch = padded([{**f, "labels": f["input_ids"]} for f in features])
        batch["labels"] = torch.tensor([f["labels"] for f in features])
        return batch

    model, other = Classifier(), Classifier()
    if not wrapped:
        model, other = model.bert, other.bert
    options = dict(gradient_accumulation_steps=2)
    given = dict(train_dataset=classes, data_collator=collate)
    own = dict(targets={"some": classes[:5]}, book_interval=1)
    valued(tmp_path / "ours", model, **options, **given, **own).train()
    transformers.Trainer(other, arguments(tmp_path / "theirs", **options), **given).train()
    assert farthest(model.parameters(), other.parameters()) < 1e-6
    books = store.read(tmp_path / "ours/values", "books")
    change = books["before"] - books["after"]
    assert np.abs(books["residual"]).max() < 0.05 * np.abs(change).max()


# --- a run that goes on ---------------------------------------------------------------------


class Killed(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(folder):
    torch.set_num_threads(1)
    valued(folder, save_strategy="steps", save_steps=3, callbacks=[Killed()]).train()


def test_a_killed_run_goes_on_with_the_same_values(tmp_path):
    often = dict(save_strategy="steps", save_steps=3)
    valued(tmp_path / "whole", **often).train()
    process = in_process(train_until_killed, tmp_path / "killed")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(UserError, match=r"holds the values of a run: .*resume_from_checkpoint"):
        valued(tmp_path / "killed", **often).train()
    with pytest.raises(UserError, match="has target_batch=4, and not 5: go on as it began"):
        valued(tmp_path / "killed", **often, target_batch=5).train(resume_from_checkpoint=True)
    valued(tmp_path / "killed", **often).train(resume_from_checkpoint=True)
    for name in ("values.npy", "ledger.npy"):
        whole = (tmp_path / "whole/values" / name).read_bytes()
        assert (tmp_path / "killed/values" / name).read_bytes() == whole, name


# --- chunks of prepare_pile.py ----------------------------------------------------------------


@pytest.fixture(scope="module")
def started(pairs, tmp_path_factory):  # noqa: F811
    """A model that train.py trained on pairs for some steps, as a folder of transformers."""
    out = tmp_path_factory.mktemp("started")
    run(pairs, out / "run", "--max_iters=12", "--rule=off", "--eval_interval=0")
    export.export(export.Config(run=str(out / "run"), out=str(out / "hf")))
    return out / "hf"


class InTrainsOrder(ValuationTrainer):
    """Meets the chunks in the order of train.py."""

    def _get_train_sampler(self, dataset=None):
        steps = range(self.args.max_steps)
        ids = [self.chunks.data.ids(step, 4, self.args.seed) for step in steps]
        return np.concatenate(ids).tolist()


def on_chunks(folder, started, chunks, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(started)
    given = dict(train_dataset=chunks, data_collator=transformers.default_data_collator)
    given |= dict(targets="val", kind=InTrainsOrder, weight_decay=0.1, adam_beta2=0.95)
    return valued(folder, model, **{**given, **options})


def test_values_are_those_of_train_py(tmp_path, pairs, started):  # noqa: F811
    both = dict(learning_rate=1e-3, max_steps=8, seed=3)
    options = [f"--{key}={value}" for key, value in both.items() if key != "max_steps"]
    options += ["--max_iters=8", "--decay_lr=False", "--grad_clip=0.5", "--batch_size=2"]
    options += ["--gradient_accumulation_steps=2", "--rule=adamw2", "--book_interval=20"]
    run_options = [*options, f"--init_from=hf:{started}", "--eval_interval=0"]
    run(pairs, tmp_path / "theirs", *run_options, "--bias=True")
    on_chunks(
        tmp_path,
        started,
        Chunks(pairs),
        **both,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_epsilon=1e-8,
    ).train()
    ours, theirs = ledger(tmp_path), store.read(tmp_path / "theirs")
    assert np.array_equal(ours["chunk"], theirs["chunk"])
    assert np.abs(ours["loss"] - theirs["loss"]).max() < 1e-4
    late = theirs["early"] == 0
    assert late.sum() == 20
    difference = np.abs(ours["value"] - theirs["value"])[late]
    assert difference.max() < 1e-3 * np.abs(theirs["value"][late]).max()


def test_its_folder_is_read_like_a_run_and_feeds_the_next(tmp_path, pairs, started):  # noqa: F811
    options = dict(max_steps=15, kind=ValuationTrainer, per_device_train_batch_size=8)
    on_chunks(tmp_path / "first", started, Chunks(pairs), **options).train()
    folder = tmp_path / "first/values"
    found = open_run(folder)
    assert found.names == ["val"]
    assert len(found.used) == len(found.values)
    for script, argv in (
        ("values.py", ["summary", folder]),
        ("values.py", ["top", folder]),
        ("values.py", ["domains", folder]),
        ("report.py", [folder]),
        ("curate.py", [folder, "--drop_fraction=.2", "--by=chunk"]),
    ):
        outcome = command(script, list(map(str, argv)))
        assert outcome.code == 0, outcome.err
    assert "ask" in command("values.py", ["top", str(folder)]).out
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for script, argv in (
        ("train.py", [folder / "config.json", "--init_from=resume"]),
        ("revalue.py", [folder, "--hindsight"]),
    ):
        outcome = command(script, list(map(str, argv)))
        assert outcome.is_refusal(), outcome
        assert "ValuationTrainer" in outcome.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    chosen = command("curate.py", [str(folder), "--drop_fraction=.2", "--by=chunk", "--overwrite"])
    assert f"with Chunks(..., keep='{folder}/keep.npy')" in chosen.out
    assert "train.py" not in chosen.out
    kept = Chunks(pairs, keep=folder / "keep.npy")
    assert len(kept) == round(0.8 * len(found.values))
    on_chunks(tmp_path / "second", started, kept, **options).train()
    visits = store.filled(ledger(tmp_path / "second"))
    assert set(visits["chunk"]) == set(np.load(folder / "keep.npy"))


def test_the_example_of_the_page_runs(tmp_path, monkeypatch, pairs, started):  # noqa: F811
    page = (Path(trainer.__file__).parent / "docs/trainer.md").read_text()
    example = re.search(r"^```python\n(.*?)^```$", page, re.M | re.S).group(1)
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/pairs").symlink_to(pairs)
    Path("model").symlink_to(started)
    exec(compile(example, "docs/trainer.md", "exec"), {})
    assert len(open_run("out/tuned/values").used) == len(Chunks(pairs))


def test_chunks_are_those_of_train_py(pairs):  # noqa: F811
    item = Chunks(pairs)[5]
    X, Y = data.open_dataset(pairs).train.batch([5], 24)
    assert np.array_equal(item["input_ids"], X[0])
    assert np.array_equal(np.where(item["shift_labels"] == -100, -1, item["shift_labels"]), Y[0])
    with pytest.raises(UserError, match=r"the chunks of .* hold 24: write block_size=0"):
        Chunks(pairs, block_size=25)


# --- what is refused ---------------------------------------------------------------------------


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    often = dict(save_strategy="steps", save_steps=3)
    plain(tmp_path, gpt2(), **often)
    with pytest.raises(UserError, match=r"has no valuation.pt: .* Begin anew"):
        valued(tmp_path, **often).train(resume_from_checkpoint=True)


class Doubled(transformers.GPT2LMHeadModel):
    """A model with a loss of its own."""

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        if outputs.loss is not None:
            outputs.loss = 2 * outputs.loss
        return outputs


def test_what_has_no_sure_values_is_refused(tmp_path):
    for options, message in (
        (dict(label_smoothing_factor=0.1), "label_smoothing_factor=0.1: .* leave it out"),
        (dict(torch_compile=True), "torch_compile=True"),
        (dict(compute_loss_func=lambda *_, **__: 0), "pass loss="),
        (dict(targets="val"), "write {name: dataset}"),
        (dict(targets={}), "at least one"),
        (dict(train_dataset=iter(examples(3, 1)), max_steps=3), "needs a length"),
    ):
        with pytest.raises(UserError, match=message):
            valued(tmp_path, **options)
    with pytest.raises(UserError, match="do not know the step of Adafactor"):
        valued(tmp_path, optim="adafactor").train()
    with pytest.raises(UserError, match=r"the model's own loss is .*: pass loss="):
        valued(tmp_path, Doubled(gpt2().config)).train()
    assert not (tmp_path / "values/values.npy").exists()


def test_targets_draw_no_numbers_of_the_training(tmp_path):
    """A collator that masks at random sees the same masks at every step, and the training sees the
    same random numbers as without a target."""
    drawn = []

    def collate(features):
        drawn.append(float(torch.rand(())))
        return padded(features)

    target = trainer.Target("t", examples(3, 1), collate, lambda batch: (batch, 0), seed=1)
    for _ in range(2):
        torch.rand(())  # of the training
        state = torch.get_rng_state()
        target.batch([0, 1])
        assert torch.equal(state, torch.get_rng_state())
    assert drawn[0] == drawn[1]
