"""system/pretrained.py and --init_from=hf:<folder>: models of transformers, read without it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import run

import config
import export
import prepare_pile
import revalue
import sample
import train
from model import GPT, GPTConfig
from pile.tokenizers import tokenizer
from shapley import exact, ghost
from show.run import open_run
from system import pretrained, store
from system.errors import UserError

os.environ["HF_HUB_OFFLINE"] = "1"
safetensors = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

VOCAB, LONGEST = 263, 40


def gpt2(**options):
    sizes = dict(vocab_size=VOCAB, n_positions=LONGEST, n_layer=2, n_head=2, n_embd=16)
    ends = dict(bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends, **options))


def pythia(**options):
    sizes = dict(
        vocab_size=VOCAB,
        max_position_embeddings=LONGEST,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_size=16,
        intermediate_size=64,
    )
    config = transformers.GPTNeoXConfig(
        **sizes, **{"rotary_pct": 0.5, "bos_token_id": 0, "eos_token_id": 0, **options}
    )
    return transformers.GPTNeoXForCausalLM(config)


MODELS = {
    "gpt2": lambda: gpt2(),
    "gpt2 untied": lambda: gpt2(tie_word_embeddings=False),
    "gpt2 exact gelu": lambda: gpt2(activation_function="gelu"),
    "pythia": lambda: pythia(),
    "pythia tied, in sequence": lambda: pythia(
        tie_word_embeddings=True, use_parallel_residual=False, rotary_pct=0.25
    ),
}


@pytest.fixture(params=MODELS)
def theirs(request, tmp_path):
    """A model of theirs with large weights, so that the kind of GELU shows, and its folder."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model, saved(model, tmp_path / "theirs")


def saved(model, folder, of="byte"):
    """A model of theirs in its folder, whose tokens are those of a tokenizer of ours."""
    model.save_pretrained(folder)
    (folder / "nanoshapley.json").write_text(json.dumps({"tokenizer": of}))
    return folder


def loaded(folder, **more):
    found = pretrained.read(folder)
    model = GPT(GPTConfig(**{**found.model_args, **more})).eval()
    pretrained.put_weights(model, found)
    return model


def logits(model, idx):
    """Of model.GPT, all of them."""
    return model(idx, idx)[0]


def tokens(n_chunks, length):
    return torch.randint(VOCAB, (n_chunks, length), generator=torch.Generator().manual_seed(1))


def relative(a, b):
    return float((a - b).norm() / b.norm())


# --- the same numbers -------------------------------------------------------------


@torch.no_grad()
def test_logits_are_those_of_transformers(theirs):
    model, folder = theirs
    idx = tokens(3, LONGEST)
    assert relative(logits(loaded(folder), idx), model(idx).logits) < 1e-5
    shorter = loaded(folder, block_size=7)
    assert relative(logits(shorter, idx[:, :7]), model(idx[:, :7]).logits) < 1e-5


@torch.no_grad()
def test_the_kind_of_gelu_shows(tmp_path):
    """Else the test above could not tell it."""
    torch.manual_seed(0)
    model = gpt2()
    for p in model.parameters():
        p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    idx = tokens(3, LONGEST)
    assert relative(logits(loaded(tmp_path, gelu="none"), idx), model.eval()(idx).logits) > 1e-5


def test_values_are_those_of_autograd(theirs):
    model = loaded(theirs[1]).double()
    X, Y = tokens(3, 12), tokens(6, 12)[3:]
    players = exact.chunk_gradients(model, X, Y)
    torch.manual_seed(2)
    for p in model.parameters():
        p.h = torch.randn(2, *p.shape).double()
    ledger = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    model(X, Y, ledger)[1].backward()
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for i, x in enumerate(players):
        for k in range(2):
            expected[i, k] = sum((g * p.h[k]).sum() for g, p in zip(x, model.parameters()))
    assert relative(ledger.grad, expected) < 1e-12
    tape = ghost.Tape()
    model(X, Y, tape)[1].backward()
    assert relative(tape.values(), expected) < 1e-12


# --- training ---------------------------------------------------------------------


def test_a_run_begins_there_and_comes_back(theirs, python_data, tmp_path):
    """From the folder through training and a resumption to a folder that transformers loads."""
    _, folder = theirs
    short = [f"--init_from=hf:{folder}", *SHORT]
    whole = tmp_path / "whole"
    train.train(config.load(train.Config, [*options(python_data, whole), *short]))
    settings = json.loads((whole / "config.json").read_text())["config"]
    assert len(settings["pretrained_sha256"]) == 64
    # stopped on the way, the folder gone: it ends in the same bytes
    parts = tmp_path / "parts"
    train.train(config.load(train.Config, [*options(python_data, parts), *short, "--max_iters=2"]))
    moved = folder.rename(tmp_path / "moved")
    resume = [str(parts / "config.json"), "--init_from=resume", "--max_iters=4"]
    train.train(config.load(train.Config, resume))
    assert (parts / "values.npy").read_bytes() == (whole / "values.npy").read_bytes()
    moved.rename(folder)

    exported = export.export(export.Config(run=str(whole)))
    again = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    trained = GPT.from_checkpoint(torch.load(whole / "ckpt.pt", weights_only=True)).eval()
    idx = tokens(2, 32)
    with torch.no_grad():
        assert relative(logits(trained, idx), again(idx).logits) < 1e-5
        assert relative(logits(loaded(exported), idx), logits(trained, idx)) < 1e-6
    sample.sample(sample.Config(run=f"hf:{exported}", max_new_tokens=5, num_samples=1))


SHORT = ["--max_iters=4", "--lr_decay_iters=4", "--checkpoint_interval=2"]


def options(data_dir, out, *more):
    return [
        f"--data_dir={data_dir}",
        f"--out_dir={out}",
        "--batch_size=2",
        "--warmup_iters=1",
        "--learning_rate=1e-3",
        "--eval_interval=0",
        "--targets=val:Python code",
        "--device=cpu",
        "--dtype=float32",
        *more,
    ]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    return saved(gpt2(), tmp_path / "theirs")


def test_it_is_taken_again_for_a_replay_and_hindsight(folder, python_data, tmp_path):
    out = tmp_path / "run"
    argv = [*options(python_data, out), *SHORT, f"--init_from=hf:{folder}"]
    train.train(config.load(train.Config, argv))
    replayed = revalue.revalue(revalue.Config(run=str(out), replay=True, name="again"))
    ours = store.read(out)["value"]
    np.testing.assert_array_equal(store.read(replayed)["value"], ours)
    looked = revalue.revalue(revalue.Config(run=str(out), hindsight=True))
    assert np.isfinite(store.read(looked)["value"]).all()
    again = revalue.Config(run=str(out), hindsight=True, overwrite=True)
    change(folder, n_head=4)  # the same weights of another model
    with pytest.raises(UserError, match=r"that the run began with \(n_head in config.json\)"):
        revalue.revalue(again)
    change(folder, n_head=2)
    revalue.revalue(again)
    gpt2().save_pretrained(folder)
    with pytest.raises(UserError, match=r"that the run began with \(their sha256\)"):
        revalue.revalue(again)


def test_a_start_that_may_be_killed_is_one_command(folder, python_data, tmp_path):
    """--init_from=auto --pretrained=hf:<folder>: typed again, it goes on to the same bytes."""
    found = {}
    for name, stops in (("at once", [4]), ("twice", [2, 4])):
        out = tmp_path / name
        argv = [*options(python_data, out), *SHORT, "--init_from=auto"]
        argv.append(f"--pretrained=hf:{folder}")
        for stop in stops:
            train.train(config.load(train.Config, [*argv, f"--max_iters={stop}"]))
        found[name] = (out / "values.npy").read_bytes(), torch.load(out / "ckpt.pt")["model"]
    assert found["at once"][0] == found["twice"][0]
    for key, w in found["at once"][1].items():
        assert torch.equal(w, found["twice"][1][key])
    gpt2().save_pretrained(folder)
    with pytest.raises(UserError, match="pretrained_sha256"):
        train.train(config.load(train.Config, argv))


def test_a_padded_vocabulary_would_raise_the_loss(folder):
    """Why it is as in the checkpoint: rows of zeros take part in the softmax."""
    model = loaded(folder)
    weights = pretrained.read_weights(pretrained.read(folder))
    padded = GPT(GPTConfig(**{**pretrained.read(folder).model_args, "vocab_size": 320})).eval()
    own = padded.state_dict()
    for name, x in weights.items():
        own[name].zero_()
        own[name][: len(x)] = x
    idx = tokens(2, 20)
    with torch.no_grad():
        assert float(padded(idx, idx)[1] - model(idx, idx)[1]) > 0.05


# --- what is refused --------------------------------------------------------------


def change(folder, **entries):
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, **entries}))


def change_weights(folder, **weights):
    """weights: {name: what becomes of it}. A new name gets what becomes of the embedding."""
    path = folder / "model.safetensors"
    content = safetensors.load_file(path)
    for name, become in weights.items():
        content[name] = become(content.get(name, content["transformer.wte.weight"].clone()))
    safetensors.save_file(content, path, metadata={"format": "pt"})


def cut_up(folder, names):
    """Puts an index that names other files in the place of the weights."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    content = {"weight_map": dict(enumerate(names))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def weights_of(name, become):
    return lambda folder: change_weights(folder, **{f"transformer.{name}": become})


WRONG = {
    "no such model": (lambda f: change(f, model_type="llama"), "type 'llama'"),
    "a type that is none": (lambda f: change(f, model_type=["gpt2"]), "'model_type' is a list"),
    "another activation": (lambda f: change(f, activation_function="relu"), "none of gelu"),
    "no activation": (lambda f: change(f, activation_function=["gelu"]), "none of gelu"),
    "another option": (lambda f: change(f, scale_attn_by_inverse_layer_idx=True), "something else"),
    "another epsilon": (lambda f: change(f, layer_norm_epsilon=1e-6), "something else"),
    "quantized": (lambda f: change(f, quantization_config={"bits": 8}), "something else"),
    "no flag": (lambda f: change(f, tie_word_embeddings="no"), "neither true nor false"),
    "heads of no width": (lambda f: change(f, n_head=3), "no multiple of its heads"),
    "a missing layer": (lambda f: change(f, n_layer=3), "no weight transformer.h.2"),
    "a billion layers": (lambda f: change(f, n_layer=10**9), "speaks of 1000000000 layers"),
    "one too many": (lambda f: change(f, n_layer=1), "does not have: transformer.h.1"),
    "another width": (lambda f: change(f, vocab_size=300), "is (263, 16), not (300, 16)"),
    "no size": (lambda f: change(f, n_embd="16"), "n_embd is no size"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "must be in safetensors"),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "is damaged"),
    "no config": (lambda f: (f / "config.json").unlink(), "name a folder that save_pretrained"),
    "not finite": (weights_of("wpe.weight", lambda x: x / 0), "wpe.weight is not finite"),
    "whole numbers": (weights_of("wpe.weight", lambda x: x.int()), "is of I32"),
    "another shape": (weights_of("h.0.attn.c_attn.bias", lambda x: x[1:]), "is (47,), not (48,)"),
    "transposed": (weights_of("h.0.mlp.c_fc.weight", lambda x: x.t().contiguous()), "is (64, 16)"),
    "a weight twice": (lambda f: change_weights(f, **{"wte.weight": abs}), "stands twice"),
    # transformers does not tie such a head, whatever the config says
    "a head of its own": (
        lambda f: change_weights(f, **{"lm_head.weight": torch.negative}),
        "is not the embedding's matrix",
    ),
    "a piece elsewhere": (lambda f: cut_up(f, ["../model.safetensors"]), "than files beside it"),
    "a piece of no name": (lambda f: cut_up(f, [["x"]]), "than files beside it"),
    "a missing piece": (
        lambda f: cut_up(f, ["model-2.safetensors"]),
        "model-2.safetensors: the weights",
    ),
    "a piece too few": (lambda f: cut_up(f, []), "there are 0 weights"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_that_is_not_understood_is_refused(case, folder, python_data, tmp_path):
    spoil, answer = WRONG[case]
    spoil(folder)
    argv = [*options(python_data, tmp_path / "run"), *SHORT, f"--init_from=hf:{folder}"]
    with pytest.raises(UserError) as error:
        train.train(config.load(train.Config, argv))
    assert answer in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def turned(**rope):
    return {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.5} | rope


WRONG_TURNS = {
    "a flag that is none": ({"use_parallel_residual": "yes"}, "neither true nor false"),
    "no list of keys": ({"rope_parameters": [1]}, "no list of keys"),
    "another kind": ({"rope_parameters": turned(rope_type="dynamic")}, "something else"),
    "another base": ({"rope_parameters": turned(rope_theta=1e6)}, "something else"),
    "an older base": ({"rotary_emb_base": 500}, "something else"),
    "half a pair": ({"rope_parameters": turned(partial_rotary_factor=0.4)}, "turns no pairs"),
    "nothing turned": ({"rope_parameters": turned(partial_rotary_factor=0.01)}, "turns no pairs"),
    "no part": ({"rope_parameters": turned(partial_rotary_factor="x")}, "turns no pairs"),
    "no biases": ({"attention_bias": False}, "something else"),
}


def test_positions_that_are_not_understood_are_refused(tmp_path):
    pythia().save_pretrained(tmp_path)
    whole = (tmp_path / "config.json").read_text()
    for entries, answer in WRONG_TURNS.values():
        change(tmp_path, **entries)
        with pytest.raises(UserError, match=answer):
            pretrained.read(tmp_path)
        (tmp_path / "config.json").write_text(whole)
    pretrained.read(tmp_path)


@torch.no_grad()
def test_pieces_and_low_precision_are_read(tmp_path):
    torch.manual_seed(0)
    model = pythia().to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    idx = tokens(2, 20)
    assert relative(logits(loaded(tmp_path), idx), model.float()(idx).logits) < 1e-5


def test_options_that_are_not_the_models_are_refused(folder, python_data, tmp_path):
    argv = [*options(python_data, tmp_path / "run"), f"--init_from=hf:{folder}"]
    with pytest.raises(UserError, match=r"--n_layer=5, but .* has n_layer=2: leave it out"):
        train.train(config.load(train.Config, [*argv, "--n_layer=5"]))
    with pytest.raises(UserError, match="knows 40 positions: write --block_size=40"):
        train.train(config.load(train.Config, [*argv, "--block_size=41"]))
    with pytest.raises(UserError, match="choose one of scratch, resume, auto, hf:<folder>, gpt2"):
        config.load(train.Config, ["--init_from=gpt3"])


def test_sizes_that_no_model_has_are_refused(python_data, tmp_path):
    """Positions would be lost, or tokens have no row."""
    for part in (0.05, 0.4, 1.5):  # of 8 numbers: none, three, more than there are
        with pytest.raises(UserError, match=f"--rotary_pct={part} turns no pairs of the 8 numbers"):
            config.load(train.Config, ["--n_head=2", "--n_embd=16", f"--rotary_pct={part}"])
    argv = [*options(python_data, tmp_path / "run"), "--n_head=2", "--n_embd=16", "--n_layer=1"]
    with pytest.raises(UserError, match=r"--vocab_size=255, but .* has 256 tokens"):
        train.train(config.load(train.Config, [*argv, "--vocab_size=255"]))


def test_a_name_of_the_hub_without_a_network_says_what_to_type():
    with pytest.raises(UserError, match=r"cannot be fetched .* write --init_from=hf:<its folder>"):
        pretrained.locate("pythia-70m")


def test_more_tokens_than_the_weights_know_are_refused(python_data, tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=100, n_positions=40, n_layer=1, n_head=1, n_embd=8)
    small = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    )
    saved(small, tmp_path / "small")
    argv = [*options(python_data, tmp_path / "run"), f"--init_from=hf:{tmp_path / 'small'}"]
    with pytest.raises(UserError, match=r"256 tokens, .* know 100"):
        train.train(config.load(train.Config, argv))


def test_an_export_is_never_written_over(python_data, tmp_path):
    run(python_data, tmp_path / "run", "--max_iters=1", "--rule=off", "--eval_interval=0")
    folder = export.export(export.Config(run=str(tmp_path / "run")))
    with pytest.raises(UserError, match="is not empty"):
        export.export(export.Config(run=str(tmp_path / "run")))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()  # without biases
    trained = GPT.from_checkpoint(torch.load(tmp_path / "run/ckpt.pt", weights_only=True)).eval()
    idx = tokens(2, 20) % 256
    with torch.no_grad():
        assert relative(logits(trained, idx), model(idx).logits) < 1e-5


def test_weights_whose_tokens_nobody_knows_are_refused(folder, python_data, tmp_path):
    argv = [*options(python_data, tmp_path / "run"), *SHORT, f"--init_from=hf:{folder}"]
    about = folder / "nanoshapley.json"
    about.unlink()
    for answer in ("so that nobody knows its tokens", "names a tokenizer that is not known"):
        with pytest.raises(UserError, match=answer):
            train.train(config.load(train.Config, argv))
        with pytest.raises(UserError, match=answer):
            sample.sample(sample.Config(run=f"hf:{folder}"))
        about.write_text('{"tokenizer": "klingon"}')
    about.write_text('{"tokenizer": "gpt2"}')
    with pytest.raises(UserError, match="has other tokens than the weights"):
        train.train(config.load(train.Config, argv))


# --- their tokenizers ---------------------------------------------------------------

TEXT = "def main():\n    return 'naïve 中文'  # <|endoftext|> is text here\n" * 40


@pytest.fixture
def tokenizer_file(tmp_path):
    """A byte-level BPE of 300 tokens, as GPT-NeoX has it: the end of a text is the first."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator([TEXT], trainer)
    path = tmp_path / "tokenizer.json"
    bpe.save(str(path))
    return path


def test_a_tokenizer_of_theirs_cuts_as_theirs_does_and_comes_back(tokenizer_file):
    ours = tokenizer(str(tokenizer_file))
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    plain = TEXT.replace("<|endoftext|>", "the end")
    assert ours.encode(plain).tolist() == theirs.encode(plain).ids
    assert ours.eot not in ours.encode(TEXT)
    assert ours.decode(ours.encode(TEXT)) == TEXT
    pieces = [ours.decode_bytes([token]) for token in ours.encode(TEXT)]
    assert b"".join(pieces) == TEXT.encode()
    assert ours.n_vocab == theirs.get_vocab_size()


def test_from_text_by_their_tokenizer_to_a_sample(tokenizer_file, tmp_path, capsys):
    """prepare_pile.py, train.py from their weights, sample.py: the data folder has all it takes."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=300, n_positions=40, n_layer=1, n_head=1, n_embd=8)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    )
    model.save_pretrained(tmp_path / "theirs")
    shutil.copy(tokenizer_file, tmp_path / "theirs")
    source = tmp_path / "mine.jsonl"
    source.write_text("".join(json.dumps({"text": f"{i} {TEXT}"}) + "\n" for i in range(30)))
    data_dir = tmp_path / "data"
    prepared = dict(source=str(source), block_size=16, val_fraction=0.3, workers=1)
    prepare_pile.prepare(
        prepare_pile.Config(**prepared, data_dir=str(data_dir), tokenizer=str(tokenizer_file))
    )
    expected = tokenizer_file.read_bytes()
    tokenizer_file.write_bytes(expected + b" ")
    with pytest.raises(UserError, match="another content of"):
        prepare_pile.prepare(
            prepare_pile.Config(**prepared, data_dir=str(data_dir), tokenizer=str(tokenizer_file))
        )
    tokenizer_file.unlink()
    out = tmp_path / "run"
    argv = [*options(data_dir, out), *SHORT, f"--init_from=hf:{tmp_path / 'theirs'}"]
    argv = [a for a in argv if not a.startswith("--targets")]
    train.train(config.load(train.Config, argv))
    run = open_run(out)
    assert "def main" in run.text(int(run.used[0])) + run.text(int(run.used[1]))
    capsys.readouterr()
    for name in (str(out), f"hf:{tmp_path / 'theirs'}"):
        sample.sample(sample.Config(run=name, max_new_tokens=5, num_samples=1))
        assert "-" * 80 in capsys.readouterr().out
    bytes_dir = str(tmp_path / "bytes")
    prepare_pile.prepare(prepare_pile.Config(**prepared, data_dir=bytes_dir, tokenizer="byte"))
    argv[argv.index(f"--data_dir={data_dir}")] = f"--data_dir={bytes_dir}"
    argv[argv.index(f"--out_dir={out}")] = f"--out_dir={tmp_path / 'other'}"
    with pytest.raises(UserError, match="has other tokens than the weights"):
        train.train(config.load(train.Config, argv))
    (data_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged, its sha256"):
        open_run(out)


def test_the_file_of_gpt2_gives_the_tokens_of_gpt2(tmp_path):
    """So that a data set of `gpt2` goes with GPT-2's folder."""
    ours = tokenizer("gpt2")
    ours.save(tmp_path / "tokenizer.json")
    theirs = tokenizer(str(tmp_path / "tokenizer.json"))
    text = Path(__file__).read_text() + "  \n\t naïve 中文 \U0001f600 don't  x" + TEXT
    np.testing.assert_array_equal(theirs.encode(text), ours.encode(text))
    assert (theirs.eot, theirs.n_vocab) == (ours.eot, ours.n_vocab)
    assert theirs.decode(theirs.encode(text)) == text


def test_added_tokens_keep_their_numbers(tokenizer_file):
    """Special tokens are text in a text, and the others come after them all the same."""
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    theirs.add_special_tokens(["<|one|>", "<|two|>"])
    theirs.add_tokens(["<tool>"])
    theirs.save(str(tokenizer_file))
    ours = tokenizer(str(tokenizer_file))
    assert ours.encode("a <tool>").tolist() == theirs.encode("a <tool>").ids
    assert theirs.token_to_id("<tool>") in ours.encode("a <tool>")
    text = "<|one|> <tool> <|endoftext|>"
    assert not {theirs.token_to_id("<|one|>"), ours.eot} & {*ours.encode(text).tolist()}
    assert ours.decode(ours.encode(text)) == text


def edited(path, edit):
    """The tokenizer of a tokenizer.json after edit(its content)."""
    content = json.loads(path.read_text())
    edit(content)
    other = path.with_name(f"edited-{path.name}")
    other.write_text(json.dumps(content))
    tokenizer.cache_clear()
    return tokenizer(str(other))


def test_tokens_cut_or_ended_otherwise_are_refused(tokenizer_file, tmp_path):
    """Each by itself: another end, tokens of other bytes, the same tokens cut otherwise."""
    source = tmp_path / "mine.jsonl"
    source.write_text("".join(json.dumps({"text": f"{i} {TEXT}"}) + "\n" for i in range(30)))
    prepared = dict(source=str(source), block_size=16, val_fraction=0.3, workers=1)
    data_dir = str(tmp_path / "data")
    prepare_pile.prepare(
        prepare_pile.Config(**prepared, data_dir=data_dir, tokenizer=str(tokenizer_file))
    )
    sizes = dict(vocab_size=301, n_positions=40, n_layer=1, n_head=1, n_embd=8)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    model.save_pretrained(tmp_path / "theirs")
    argv = [*options(data_dir, tmp_path / "run"), "--targets=val", "--max_iters=1"]
    argv.append(f"--init_from=hf:{tmp_path / 'theirs'}")

    def of_other_bytes(content):  # two that SAMPLE does not need
        vocab = content["model"]["vocab"]
        vocab["~"], vocab["|"] = vocab["|"], vocab["~"]

    def cut_otherwise(content):
        content["model"]["merges"] = []

    def ended_otherwise(content):
        content["added_tokens"] = [{**ADDED, "content": "</s>", "id": 300}]
        content["model"]["vocab"]["</s>"] = 300

    for edit in (of_other_bytes, cut_otherwise, ended_otherwise):
        edited(tokenizer_file, edit)
        edited_file = tokenizer_file.with_name(f"edited-{tokenizer_file.name}")
        shutil.copy(edited_file, tmp_path / "theirs" / "tokenizer.json")
        tokenizer.cache_clear()
        with pytest.raises(UserError, match="has other tokens than the weights"):
            train.train(config.load(train.Config, argv))
    shutil.copy(tokenizer_file, tmp_path / "theirs" / "tokenizer.json")
    tokenizer.cache_clear()
    train.train(config.load(train.Config, argv))


def test_a_character_without_a_token_is_never_left_out_in_silence(tokenizer_file, tmp_path):
    def without_z(content):
        content["model"]["vocab"].pop("z")

    tok = edited(tokenizer_file, without_z)
    assert tok.decode(tok.encode("abc")) == "abc"
    with pytest.raises(UserError, match="no token of its tokenizer"):
        tok.encode("abz")
    source = tmp_path / "mine.jsonl"
    texts = ["a lazy dog " * 20, *[f"{i} the quick brown fox " * 20 for i in range(30)]]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data_dir = tmp_path / "data"
    prepared = dict(source=str(source), block_size=16, val_fraction=0.3, workers=1)
    path = str(tokenizer_file.with_name(f"edited-{tokenizer_file.name}"))
    prepare_pile.prepare(prepare_pile.Config(**prepared, data_dir=str(data_dir), tokenizer=path))
    assert json.loads((data_dir / "meta.json").read_text())["skipped"]["not_tokenized"] == 1


def large(content):
    """Makes "e" the last of 70,000 tokens."""
    vocab = content["model"]["vocab"]
    content["model"]["merges"] = []
    vocab["e"] = 69_999


def test_a_large_vocabulary_has_wider_chunks(tokenizer_file, tmp_path):
    """From text to values: the numbers of tokens do not fit 16 bits."""
    tok = edited(tokenizer_file, large)
    assert tok.n_vocab == 70_000
    path = str(tokenizer_file.with_name(f"edited-{tokenizer_file.name}"))
    pairs = [
        {"prompt": f"{i} fee", "answer": "free beer", "text": f"{i} {TEXT}"} for i in range(40)
    ]
    source = tmp_path / "mine.jsonl"
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    keys = dict(prompt_key="prompt", answer_key="answer")
    for name, more in (("texts", {}), ("pairs", keys)):
        data_dir = tmp_path / name
        prepared = dict(source=str(source), block_size=24, val_fraction=0.3, workers=1, **more)
        prepare_pile.prepare(
            prepare_pile.Config(**prepared, data_dir=str(data_dir), tokenizer=path)
        )
        rows = np.load(data_dir / "train.npy")
        assert rows.dtype == np.uint32
        assert rows.max() == 69_999
        out = tmp_path / f"run-{name}"
        argv = ["--n_layer=1", "--n_head=1", "--n_embd=4", "--max_iters=1"]
        argv = [*options(data_dir, out), f"--targets=mine={source}", *argv]
        train.train(config.load(train.Config, argv))
        run = open_run(out)
        shown = "".join(run.text(int(chunk)) for chunk in run.used)
        assert "return" in shown if name == "texts" else "free beer" in shown


def damage(*keys, to):
    """A function that puts something into a tokenizer.json."""

    def edit(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return edit


PANIC = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}  # the library would end the process
REGEX = {"type": "Split", "pattern": {"Regex": "(a+$("}, "behavior": "Isolated", "invert": False}
SPLIT = {"type": "Sequence", "pretokenizers": [REGEX, {"type": "ByteLevel"}]}
ADDED = {"content": "<x>", "special": True, "single_word": False, "lstrip": False}
ADDED |= {"rstrip": False, "normalized": False}
WRONG_TOKENIZERS = {
    "of another kind": (damage("model", "type", to="Unigram"), "no byte-level BPE"),
    "no vocabulary": (damage("model", "vocab", to=[]), "no byte-level BPE"),
    "a number that is none": (damage("model", "vocab", "a", to="1"), "no byte-level BPE"),
    "a huge number": (damage("model", "vocab", "a", to=10**9), "1,048,576 are read"),
    "a number twice": (damage("model", "vocab", "a", to=70), "two tokens have one number"),
    "tokens at random": (damage("model", "dropout", to=0.5), "dropout is '0.5'"),
    "marks in words": (damage("model", "end_of_word_suffix", to="</w>"), "end_of_word_suffix"),
    "no bytes": (damage("pre_tokenizer", to={"type": "Whitespace"}), "not known here"),
    "no stage": (damage("pre_tokenizer", to=[3]), "not known here"),
    "changed text": (damage("normalizer", to=PANIC), "not known here"),
    "no pattern": (damage("pre_tokenizer", to=SPLIT), "is damaged"),
    "no end": (damage("added_tokens", to=[]), "is an added token of it"),
    "an added token that is none": (damage("added_tokens", to=[{"id": 3}]), "added token is none"),
    "a merge of nothing": (damage("model", "merges", to=[["zz", "qq"]]), "is damaged"),
}


def test_the_tokenizer_goes_with_an_export(tokenizer_file, tmp_path):
    """transformers.AutoTokenizer gives the tokens that prepare_pile.py gave."""
    source = tmp_path / "mine.jsonl"
    source.write_text("".join(json.dumps({"text": f"{i} {TEXT}"}) + "\n" for i in range(30)))
    plain = TEXT.replace("<|endoftext|>", "the end")
    for name in (str(tokenizer_file), "gpt2", "byte"):
        data_dir = tmp_path / f"data-{Path(name).stem}"
        prepared = dict(source=str(source), block_size=16, val_fraction=0.3, workers=1)
        prepare_pile.prepare(
            prepare_pile.Config(**prepared, data_dir=str(data_dir), tokenizer=name)
        )
        run(data_dir, tmp_path / "run", "--max_iters=1", "--rule=off", "--overwrite")
        out = str(tmp_path / "exported")
        exported = export.export(export.Config(run=str(tmp_path / "run"), out=out, overwrite=True))
        sample.sample(sample.Config(run=f"hf:{exported}", max_new_tokens=2, num_samples=1))
        assert (exported / "tokenizer.json").is_file() == (name != "byte")
        if name != "byte":
            theirs = transformers.AutoTokenizer.from_pretrained(exported)
            ours = tokenizer(name)
            assert theirs(plain)["input_ids"] == ours.encode(plain).tolist()
            assert theirs.eos_token_id == ours.eot
            assert theirs.decode(ours.encode(TEXT)) == TEXT


@pytest.mark.parametrize("case", WRONG_TOKENIZERS)
def test_another_tokenizer_is_refused(case, tokenizer_file):
    edit, answer = WRONG_TOKENIZERS[case]
    with pytest.raises(UserError, match=answer) as error:
        edited(tokenizer_file, edit)
    assert "\n" not in str(error.value)


def test_an_added_token_of_another_number_is_refused(tokenizer_file):
    def far(content):
        content["added_tokens"].append({**ADDED, "id": 5000})

    with pytest.raises(UserError, match=r"the number of '<x>' is not its own"):
        edited(tokenizer_file, far)


def test_a_tokenizer_that_is_no_json_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    for content, answer in (("[", "is damaged"), ('{"model": 3}', "'model' is a int")):
        path.write_text(content)
        with pytest.raises(UserError, match=answer):
            tokenizer(str(path))
