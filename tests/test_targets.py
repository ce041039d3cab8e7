"""The user's own targets: files of records and of text, what is said of them, what is refused."""

import bz2
import gzip
import lzma
import shlex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from commands import run as run_command
from piles import json_lines, lines, record, run, texts, write
from test_lost import arguments

from data import parse_targets
from system.errors import UserError

ROW = 16  # tokens of a row
DOCUMENTS = [("a", f"document {i}, of its own words") for i in range(40)]
PACKINGS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Data of domains a and b, whose text stands under "text". Domain b is not in val.npy."""
    folder = tmp_path_factory.mktemp("targets")
    documents = [*texts(60, domains="a"), ("b", "one text only, and long enough for a chunk")]
    return run(folder, write(folder / "d.jsonl", lines(documents)), block_size=ROW)


def target_of(spec, dataset):
    (target,) = parse_targets(spec, dataset, ROW)
    return target


def predicted(target):
    """The tokens that a target's rows predict, one after another."""
    tokens = target.rows[:, 1:].reshape(-1)
    return tokens[tokens >= 0].tolist()


def expected_rows(text, dataset):
    """The rows of a text of bytes, built one token after another."""
    stream = [dataset.meta["eot"], *text.encode()]
    rows = []
    for start in range(0, len(stream) - 1, ROW):
        row = stream[start : start + ROW + 1]
        rows.append(row + [-1] * (ROW + 1 - len(row)))
    return np.array(rows, np.int32)


def write_records(path, documents, key="text"):
    """[(domain, text)] -> a file of records, of the kind that its name says."""
    rows = [{key: text, "meta": {"pile_set_name": domain}} for domain, text in documents]
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    pack = PACKINGS.get(path.suffix, bytes)
    return write(path, pack(json_lines(rows)))


# --- files of records ---------------------------------------------------------------

NAMES = ["v.jsonl", "v.ndjson", "v.json", "v.JSONL", "v.parquet"]
NAMES += [f"v.jsonl{packing}" for packing in PACKINGS if packing]


@pytest.mark.parametrize("name", NAMES)
def test_a_target_of_records_has_the_tokens_that_training_would_have(dataset, tmp_path, name):
    path = write_records(tmp_path / name, DOCUMENTS)
    options = {"val_fraction": 0, "block_size": ROW}
    trained = run(tmp_path, path, **options).train.rows.reshape(-1).tolist()
    tokens = predicted(target_of(f"mine={path}", dataset))
    assert len(trained) > 1000
    assert tokens[: len(trained)] == trained
    eot = bytes([dataset.meta["eot"]])
    assert bytes(tokens) == b"".join(text.encode() + eot for _, text in DOCUMENTS)


def test_a_target_of_records_begins_with_eot(dataset, tmp_path):
    path = write_records(tmp_path / "v.jsonl", DOCUMENTS)
    assert target_of(f"mine={path}", dataset).rows[0, 0] == dataset.meta["eot"]


def test_the_text_key_of_the_data_is_the_text_key_of_a_target(tmp_path):
    documents = [{"body": {"text": text}} for _, text in texts(60)]
    source = write(tmp_path / "d.jsonl", json_lines(documents))
    dataset = run(tmp_path, source, text_key="body.text")
    path = write(tmp_path / "v.jsonl", json_lines([{"body": {"text": "t" * 200}, "text": "no"}]))
    assert predicted(target_of(f"mine={path}", dataset)) == [*b"t" * 200, 255]


@pytest.mark.parametrize("name", ["v.jsonl", "v.jsonl.gz", "v.parquet"])
def test_a_target_without_the_key_names_its_keys_and_what_to_type_works(dataset, tmp_path, name):
    path = write_records(tmp_path / "lr=1,b=2" / name, DOCUMENTS, key="a, question")
    spec = str(path).replace(",", "\\,")
    with pytest.raises(UserError) as error:
        target_of(f"mine={spec}", dataset)
    message = str(error.value)
    assert "the records have the keys 'a, question', 'meta.pile_set_name'" in message
    assert name.endswith("parquet") or "skipped: 40 no_text;" in message
    (typed,) = shlex.split(message.partition(": type ")[2])
    named = target_of(typed.removeprefix("--targets="), dataset)
    same = write_records(tmp_path / "same.jsonl", DOCUMENTS)
    assert named.name == "mine"
    assert named.checksum() == target_of(f"mine={same}", dataset).checksum()


def test_records_of_a_target_that_are_skipped_are_counted(dataset, tmp_path):
    content = json_lines([record(*document) for document in DOCUMENTS])
    path = write(tmp_path / "v.jsonl", content + b'{"a": 1}\nnot json\n')
    notes = target_of(f"mine={path}", dataset).notes
    assert notes == (f"mine: skipped in {path}: 1 no_text, 1 not_json",)


@pytest.mark.parametrize(
    "name, content, answer",
    [
        ("empty.jsonl", b"", "it is empty"),
        ("array.json", b'[{"text": "a"}]', "write a record a line"),
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9],
            "damaged or cut short",
        ),
        ("none.jsonl", None, "No such file"),
        ("none.jsonl:text", None, "none.jsonl: No such file"),
        ("none.txt", None, "No such file"),
        (".", None, "name a file"),
    ],
)
def test_a_file_that_cannot_be_a_target_is_refused_in_a_line(
    python_data, tmp_path, name, content, answer
):
    if content is not None:
        write(tmp_path / name, content)
    argv = arguments(python_data, tmp_path / "run", f"--targets=mine={tmp_path / name}")
    outcome = run_command("train.py", argv)
    assert outcome.is_refusal(), outcome
    assert answer in outcome.err
    assert not (tmp_path / "run").exists()


def test_keys_of_strangers_reach_a_terminal_as_escapes(python_data, tmp_path):
    evil = "key\x1b[31m\nerror: forged\u202e"
    path = write(tmp_path / "v.jsonl", json_lines([{evil: "some text"}] * 9))
    argv = arguments(python_data, tmp_path / "run", f"--targets=mine={path}")
    outcome = run_command("train.py", argv)
    assert outcome.is_refusal(), outcome
    assert "'key\\x1b[31m" in outcome.err
    assert "\x1b" not in outcome.err


# --- files of text ------------------------------------------------------------------

TEXT = "A text,\r\nwith lines\n\nand {braces}: \u00e9.\n" * 7


@pytest.mark.parametrize("name", ["t.txt", "notes.md", "thesis", "t.jsonl.txt", "v.jsonl:text"])
def test_a_plain_text_is_read_as_it_is(dataset, tmp_path, name):
    path = write(tmp_path / name, TEXT.encode())
    target = target_of(f"mine={path}", dataset)
    assert target.rows.dtype == np.int32
    assert np.array_equal(target.rows, expected_rows(TEXT, dataset))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_text_is_the_text(dataset, tmp_path, packing):
    path = write(tmp_path / f"t.txt{packing}", PACKINGS[packing](TEXT.encode()))
    plain = expected_rows(TEXT, dataset)
    assert np.array_equal(target_of(f"mine={path}", dataset).rows, plain)


# --- what is said of a target ---------------------------------------------------------


@pytest.mark.parametrize("n, what", [(1, "1 token"), (2, "2 tokens"), (99, "99 tokens")])
def test_a_short_target_says_that_it_is_short(dataset, tmp_path, n, what):
    path = write(tmp_path / "t.txt", b"x" * n)
    notes = target_of(f"mine={path}", dataset).notes
    assert notes == (f"mine: {what}: values for so short a text are mostly noise",)


def test_a_target_that_is_long_enough_says_nothing(dataset, tmp_path):
    path = write(tmp_path / "t.txt", b"x" * 100)
    assert target_of(f"mine={path}", dataset).notes == ()
    assert target_of("val:a", dataset).notes == ()


def test_train_prints_what_is_to_be_known_of_its_targets(python_data, tmp_path):
    path = write(tmp_path / "t.txt", b"ab")
    targets = f"--targets=mine={path},val"
    outcome = run_command("train.py", arguments(python_data, tmp_path / "run", targets))
    assert outcome.code == 0, outcome.err
    assert "\nmine: 2 tokens: values for so short a text are mostly noise\n" in outcome.out


def test_val_says_which_domains_it_does_not_speak_of(dataset):
    (note,) = target_of("val", dataset).notes
    assert note.startswith("val: 1 of 2 domains has no validation chunk (b): ")
    assert "more than --val_fraction=0.3" in note


def test_a_domain_without_validation_chunks_is_refused_with_what_to_change(dataset):
    with pytest.raises(UserError, match=r"no chunk in .* more than --val_fraction=0\.3"):
        target_of("val:b", dataset)


def test_an_unknown_domain_is_answered_with_the_domains_as_they_are_typed(tmp_path):
    names = {"a": "cs.CL, cs.LG", "b": "plain"}
    documents = [(names[domain], text) for domain, text in texts(60, domains="ab")]
    dataset = run(tmp_path, write(tmp_path / "d.jsonl", lines(documents)))
    with pytest.raises(UserError) as error:
        target_of("val:cs.XX", dataset)
    assert r"cs.CL\, cs.LG" in str(error.value)
    assert r"(a comma within a name is written \,)" in str(error.value)
    assert target_of(r"val:cs.CL\, cs.LG", dataset).name == "cs.CL, cs.LG"
