"""Damage is named, or shown to be harmless: flipped bits in every file that a command reads, files
that hold something else, checkpoints and headers of another make."""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import time

import numpy as np
import pytest
import torch
from commands import ENTRIES, ROOT, readers, run
from piles import lines, texts

import config
import curate
import data
import train
import values
from prepare_pile import Config as Prepare
from prepare_pile import prepare
from system.errors import UserError
from system.files import crc32, read_json, write_json

SMALL = "--n_layer=1 --n_head=1 --n_embd=8 --batch_size=4 --warmup_iters=2 --learning_rate=5e-3"
SMALL += " --eval_chunks=2 --eval_interval=4 --checkpoint_interval=4 --audit_interval=4"
SMALL += " --device=cpu --dtype=float32 --targets=val:a,val:b --max_iters=12 --book_interval=2"


class Folders:
    """A data folder, two runs on it, and what curate.py made of one; and where they are damaged."""

    def __init__(self, whole, work):
        self.whole, self.work = whole, work
        self.run, self.other, self.data = work / "run", work / "other", work / "data"
        self.made = work / "made"
        argv = [*map(str, [self.run / "config.json", f"--keep={work}/kept/keep.npy"])]
        argv += [f"--out_dir={self.made}/next", "--max_iters=1", "--lr_decay_iters=1"]
        self.readers = [("train.py", argv), *readers(self.run, self.other, self.data, self.made)]

    def restore(self):
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.whole, self.work)

    def files(self):
        """All that a command may read."""
        found = [path for path in self.whole.rglob("*") if path.is_file()]
        return sorted(p.relative_to(self.whole) for p in found if p.name not in ("lock", "d.jsonl"))

    def outcomes(self, numbers=None):
        """What each reader says and makes -> [(outcome, digest of what it made)]."""
        found = []
        for i, (script, argv) in enumerate(self.readers):
            if numbers is not None and i not in numbers:
                found.append(None)
                continue
            self.made.mkdir(exist_ok=True)
            before = {*self.run.glob("revalued/*/*.npy")}
            outcome = run(script, argv)
            made = [*self.made.rglob("*"), *({*self.run.glob("revalued/*/*.npy")} - before)]
            if script == "train.py":
                made += self.run.glob("*.npy")
            made = [path for path in sorted(made) if path.suffix in (".npy", ".html", ".parquet")]
            found.append((outcome, {path: digest(path) for path in made}))
            shutil.rmtree(self.made)
        return found


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    whole, work = (tmp_path_factory.mktemp(name) / "here" for name in ("whole", "work"))
    work.mkdir(parents=True)
    (work / "d.jsonl").write_bytes(lines(texts(60)))
    options = dict(source=str(work / "d.jsonl"), tokenizer="byte", block_size=32, workers=1)
    prepare(Prepare(**options, val_fraction=0.3, data_dir=str(work / "data")))
    argv = [*SMALL.split(), f"--data_dir={work}/data"]
    train.train(config.load(train.Config, [*argv, f"--out_dir={work}/other", "--seed=2"]))
    cut = curate.Config(run=str(work / "other"), out=str(work / "kept"), drop_fraction=0.3)
    curate.curate(cut)
    more = [f"--keep={work}/kept/keep.npy", f"--out_dir={work}/run"]
    train.train(config.load(train.Config, [*argv, *more]))
    shutil.copytree(work, whole)
    return Folders(whole, work)


@pytest.fixture(scope="module")
def undamaged(folders):
    folders.restore()
    found = folders.outcomes()
    for outcome, _ in found:
        assert outcome.code == 0, outcome
    return found


def test_every_command_is_here(folders):
    scripts = {p.name for p in ROOT.glob("*.py") if "\n    config.main(" in p.read_text()}
    assert scripts == set(ENTRIES)
    assert scripts == {script for script, _ in folders.readers}
    of_values = {argv[0] for script, argv in folders.readers if script == "values.py"}
    assert of_values == {command.__name__ for command in values.COMMANDS}


# --- flipped bits -------------------------------------------------------------------


def believed(folders, undamaged, path, numbers=None):
    """The commands for which a damaged file neither changes anything nor is named."""
    found = []
    outcomes = folders.outcomes(numbers)
    for (script, argv), now, before in zip(folders.readers, outcomes, undamaged):
        if now is None:
            continue
        outcome, made = now
        same = (outcome.code, said(outcome), made) == (0, said(before[0]), before[1])
        named = path.name in outcome.err + outcome.out
        one_line = outcome.code == 0 or outcome.is_refusal()
        if not (same or named) or not one_line:
            found.append((script, argv, outcome))
    return found


def said(outcome):
    """What a command printed, but for its speed and the disk's room."""
    varying = re.compile(
        r".* ms \||about .* for all |needs at least |written to |"
        "passes: checks and second passes took "
    )
    return [line for line in outcome.out.splitlines() if not varying.match(line)]


def flip(path, at, bit):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("seed", range(5))
def test_random_flips_are_named_or_harmless(folders, undamaged, seed):
    """Ten of fifty: any bit of any file. A quarter of the commands each time, in turn."""
    rng = random.Random(seed)
    for i in range(10):
        folders.restore()
        name = rng.choice(folders.files())
        path = folders.work / name
        at, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, at, bit)
        numbers = range((seed + i) % 4, len(folders.readers), 4)
        assert not believed(folders, undamaged, path, numbers), (name, at, bit)


def position(text, offset=0):
    """Where a text begins in a file, and so many bytes on."""
    return lambda content: content.index(text.encode()) + offset


TARGETED = [
    ("run/values.npy", position("<f4")),
    ("run/values.npy", position("False")),
    ("run/values.npy", lambda content: 9),  # the header's length
    ("run/values.npy", lambda content: 128 + 4 * 20 + 3),  # a value's exponent
    ("run/values.npy", lambda content: len(content) - 2),
    ("run/values.json", position('"rule"', 9)),
    ("run/values.json", position('"sign"', 9)),
    ("run/values.json", position('"batch"', 9)),
    ("run/values.json", position('"committed_step"', 18)),
    ("run/values.json", position('"name"', 9)),
    ("run/values.json", position('"data_hash"', 14)),
    ("run/values.json", position('"crc32"', 3)),
    ("run/config.json", position('"n_layer"', 11)),
    ("run/config.json", position('"rule"', 9)),
    ("run/config.json", position('"data_dir"', 14)),
    ("run/config.json", position('"block_size"', 14)),
    ("run/config.json", position('"max_iters"', 13)),
    ("run/config.json", position('"learning_rate"', 17)),
    ("run/config.json", position('"targets"', 14)),
    ("run/ledger.npy", lambda content: len(content) - 3 * 33 + 1),
    ("run/ledger.npy", lambda content: len(content) - 4 * 33 + 5),
    ("run/ledger.npy", lambda content: len(content) - 5 * 33 + 13),
    ("run/ledger.npy", lambda content: len(content) - 1),  # early
    ("run/ledger.npy", position("'<i8'", 2)),
    ("run/ledger.npy", position("'shape': (", 10)),
    ("run/books.npy", lambda content: len(content) - 7),
    ("run/audit.npy", lambda content: len(content) - 7),
    ("run/chunks.npy", lambda content: len(content) - 8),
    ("run/evaluations.jsonl", position("val", 7)),
    ("run/ckpt.pt", lambda content: len(content) - 4),  # its checksum
    ("run/ckpt.pt", lambda content: len(content) // 2),
    ("run/ckpt.pt", position("iter_num", 12)),
    ("data/meta.json", position('"domains"', 22)),  # a domain's name
    ("data/meta.json", position('"eot"', 8)),
    ("data/meta.json", position('"vocab_size"', 15)),
    ("data/meta.json", position('"tokenizer"', 15)),
    ("data/train.npy", lambda content: len(content) - 33),
    ("data/train.npy", position("<u2")),
    ("data/train_domain.npy", lambda content: len(content) - 9),
    ("data/train_docs.parquet", lambda content: 60),
    ("data/train_docs.parquet", lambda content: len(content) - 40),
    ("data/train_docs.parquet", lambda content: len(content) - 6),
    ("kept/keep.npy", lambda content: len(content) - 8),
    ("kept/keep.json", position('"data_hash"', 15)),
]


@pytest.mark.parametrize("part", range(4))
def test_targeted_flips_are_named_or_harmless(folders, undamaged, part):
    assert len(TARGETED) >= 40
    for name, find in TARGETED[part::4]:
        folders.restore()
        path = folders.work / name
        at = find(path.read_bytes())
        flip(path, at, 0)
        assert not believed(folders, undamaged, path), (name, at)


# --- what is no such file at all ------------------------------------------------------

MALFORMED = ["", "{", "[]", "{}", "null", "3", '"text"', "NaN", "[" * 100_000, "1" * 5000]
MALFORMED += ['{"crc32": "00000000"}', "\ufeff{}", "{}{}"]


@pytest.mark.parametrize(
    "name", ["run/values.json", "run/config.json", "data/meta.json", "kept/keep.json"]
)
def test_foreign_json_is_refused_in_one_line(folders, undamaged, name):
    path = folders.work / name
    for i, content in enumerate(MALFORMED):
        folders.restore()
        path.write_text(content)
        numbers = range(i % 4, len(folders.readers), 4)
        assert not believed(folders, undamaged, path, numbers), content[:20]
    folders.restore()
    path.write_bytes(b"\xff\xfe\x00")
    assert not believed(folders, undamaged, path, range(0, len(folders.readers), 3))


WRONG = {str: 3, int: "x", float: "x", list: {}, dict: [], bool: "perhaps", type(None): []}


def ends_well(outcome):
    return outcome.code == 0 or outcome.is_refusal()


@pytest.mark.parametrize("name", ["run/values.json", "run/config.json", "data/meta.json"])
def test_entries_missing_or_of_another_type_are_one_line(folders, name):
    """A stranger's files, whose checksums fit."""
    folders.restore()
    path = folders.work / name
    content = read_json(path, "")
    inner = content["config"] if name == "run/config.json" else content
    turns = itertools.cycle(range(11))  # every eleventh command each time
    for key, value in list(inner.items()):
        for other in (None, WRONG[type(value)], -(10**30)):
            inner[key] = other
            write_json(path, content)
            assert_all_end_well(folders.readers[next(turns) :: 11], folders)
        del inner[key]
        write_json(path, content)
        assert_all_end_well(folders.readers[next(turns) :: 11], folders)
        inner[key] = value


def assert_all_end_well(chosen, folders):
    folders.made.mkdir(exist_ok=True)
    for script, argv in chosen:
        outcome = run(script, argv)
        assert ends_well(outcome), (script, argv, outcome)
    shutil.rmtree(folders.made)


class Evil:
    """Whose pickle runs a command when it is loaded."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def write_checkpoint(path, content):
    """As Checkpoints does, but for its checks."""
    with open(path, "wb") as file:
        torch.save(content, file)
        file.flush()
        file.write(b"%08x" % crc32(path))


OF_A_CHECKPOINT = ["sample.py", "revalue.py", "report.py", "train.py", "values.py tokens"]
OF_A_CHECKPOINT += ["values.py query", "revalue.py --repair"]


def read_checkpoint_by_all(folders, turn=slice(None)):
    """The outcomes of all commands that load a checkpoint, or of those whose turn it is."""
    folders.made.mkdir(exist_ok=True)
    chosen = [("revalue.py", [str(folders.run), "--repair"])]
    for script, argv in folders.readers:
        if f"{script} {argv[0]}" in OF_A_CHECKPOINT or script in OF_A_CHECKPOINT:
            chosen.append((script, argv))
    assert len(chosen) >= 8
    return [(script, argv, run(script, argv)) for script, argv in chosen[turn]]


def test_code_in_a_foreign_checkpoint_is_not_run(folders, tmp_path):
    """torch's own message says how to load it all the same; ours does not."""
    folders.restore()
    (folders.run / "ckpt-8.pt").unlink()
    content = torch.load(folders.run / "ckpt.pt", weights_only=True)
    for evil in (Evil(tmp_path / "made"), content | {"more": Evil(tmp_path / "made")}):
        write_checkpoint(folders.run / "ckpt.pt", evil)
        for script, argv, outcome in read_checkpoint_by_all(folders):
            assert ends_well(outcome), (script, argv, outcome)
            told = outcome.out + outcome.err
            assert "weights_only" not in told
            reads_it = script in ("sample.py", "revalue.py") or "tokens" in argv
            assert "would run code" in told or not reads_it, (script, outcome)
            assert not (tmp_path / "made").exists()


def test_a_checkpoint_of_another_make_is_one_line(folders):
    whole = torch.load(folders.whole / "run" / "ckpt.pt", weights_only=True)
    changed = {key: {k: v for k, v in whole.items() if k != key} for key in whole}
    for key, value in whole.items():
        changed[f"{key} of another type"] = whole | {key: WRONG[type(value)]}
    args = whole["model_args"]
    changed["a billion layers"] = whole | {"model_args": args | {"n_layer": 10**9}}
    changed["wide"] = whole | {"model_args": args | {"n_embd": 10**7}}
    changed["an argument more"] = whole | {"model_args": args | {"more": 1}}
    changed["no arguments"] = whole | {"model_args": {}}
    changed["weights"] = whole | {"model": {"x": torch.zeros(3)}}
    changed["no weights"] = whole | {"model": {name: 3 for name in whole["model"]}}
    nan = {name: w * np.nan for name, w in whole["model"].items()}
    changed["not finite"] = whole | {"model": nan}
    changed["moments"] = whole | {"optimizer": {"state": {}, "param_groups": []}}
    changed["evaluations"] = whole | {"evaluations": "["}
    changed["random numbers"] = whole | {"rng": [3]}
    changed["a setting more"] = whole | {"config": whole["config"] | {"more": 1}}
    changed["records"] = whole | {"valuation": whole["valuation"] | {"records": {"ledger": 3}}}
    for key, value in whole["valuation"].items():
        other = whole["valuation"] | {key: WRONG[type(value)]}
        changed[f"{key} of another type"] = whole | {"valuation": other}
    changed["targets"] = whole | {"valuation": whole["valuation"] | {"targets": {3: [], "a": []}}}
    for i, (what, content) in enumerate(changed.items()):
        folders.restore()
        (folders.run / "ckpt-8.pt").unlink()
        write_checkpoint(folders.run / "ckpt.pt", content)
        for script, argv, outcome in read_checkpoint_by_all(folders, slice(i % 2, None, 2)):
            assert ends_well(outcome), (what, script, argv, outcome)


@pytest.mark.parametrize("key, value", [("n_layer", 10**9), ("n_layer", 10**5), ("n_embd", 10**7)])
def test_a_model_that_no_machine_holds_is_refused_at_once(folders, key, value):
    """In a received config.json: nobody begins to build it."""
    folders.restore()
    content = read_json(folders.run / "config.json", "")
    content["config"][key] = value
    write_json(folders.run / "config.json", content)
    began = time.monotonic()
    folders.made.mkdir()
    for script, argv in folders.readers[1:]:  # the first one would train such a model anew
        reads_weights = script in ("train.py", "revalue.py") or argv[0] in ("tokens", "query")
        outcome = run(script, argv)
        assert ends_well(outcome)
        if reads_weights and "--verify" not in argv:
            assert outcome.code == 2, (script, argv, outcome)
    anew = [str(folders.run / "config.json"), f"--out_dir={folders.made}/new"]
    assert value == 10**5 or run("train.py", anew).is_refusal()
    assert time.monotonic() - began < 20


# --- one file each, wherever it is damaged -------------------------------------------------


def test_a_file_without_its_checksum_is_refused(folders):
    """But for config.json, which people write by hand."""
    for name in ("run/values.json", "data/meta.json", "kept/keep.json"):
        folders.restore()
        path = folders.work / name
        path.write_text(json.dumps(read_json(path, "")))
        with pytest.raises(UserError, match="it has no checksum"):
            values.open_run(folders.run)
            data.open_dataset(folders.data, folders.work / "kept" / "keep.npy")


@pytest.mark.parametrize("large", [False, True])
def test_a_table_of_documents_is_checked_wherever_it_is_damaged(folders, monkeypatch, large):
    """Where it is too large to be read whenever it is opened: its footer, and each page."""
    folders.restore()
    run = values.open_run(folders.run)
    path = folders.data / "train_docs.parquet"
    content = path.read_bytes()
    monkeypatch.setattr(data, "CHECKED", 0 if large else 1 << 20)
    whole = everything_in(values.Documents(run))
    assert len(whole) > 20
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    found = 0
    for at in [*range(4, footer, 23), *range(footer, len(content), 11)]:
        flip(path, at, 3)
        try:
            assert everything_in(values.Documents(run)) == whole, at
        except UserError as e:
            assert "train_docs.parquet is" in str(e)
            found += 1
        path.write_bytes(content)
    assert found > 50


@pytest.mark.parametrize("name", ["val_domain.npy", "train_domain.npy", "val.npy"])
def test_small_arrays_beside_a_large_one_are_checked(folders, monkeypatch, name):
    folders.restore()
    monkeypatch.setattr(data, "CHECKED", (folders.data / "train.npy").stat().st_size)
    flip(folders.data / name, -1, 0)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        data.open_dataset(folders.data)
    folders.restore()
    flip(folders.data / "train.npy", -1, 0)
    data.open_dataset(folders.data)  # the large one: README says so
    with pytest.raises(UserError, match=r"train\.npy is damaged"):
        data.open_dataset(folders.data).verify()


def everything_in(documents):
    found = []
    for columns, *_ in documents.pieces():
        found += [[*map(str, row)] for row in zip(*columns.values())]
    return found


def test_chunks_to_train_on_are_checked(folders):
    folders.restore()
    path = folders.work / "kept" / "keep.npy"
    n = len(np.load(path))
    for at in range(path.stat().st_size - 8 * n, path.stat().st_size, 97):
        flip(path, at, 0)
        with pytest.raises(UserError, match=r"keep.npy (is damaged|is int64)"):
            data.open_dataset(folders.data, path)
        flip(path, at, 0)
    assert len(data.open_dataset(folders.data, path).keep) == n


def test_a_line_to_type_is_built_from_checked_options_only(folders):
    """Not from a stranger's meta.json, which may say anything."""
    folders.restore()
    content = read_json(folders.data / "meta.json", "")
    content["command"] = "rm -rf ~"
    content["config"] = {"source": "x; rm -rf ~", "evil": "$(touch evil)", "block_size": "4;5"}
    write_json(folders.data / "meta.json", content)
    flip(folders.data / "train.npy", -1, 0)
    outcome = run("values.py", ["summary", str(folders.run)])
    assert outcome.is_refusal()
    typed = f"python prepare_pile.py --data_dir={folders.data} '--source=x; rm -rf ~' --overwrite"
    assert outcome.err.endswith(f"type: {typed}\n")
