"""What prepare_pile.py says to somebody with a corpus of his own: missing keys, domains too small
to be compared or validated, what to type next; and progress, on a terminal and in a log."""

import io
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import run as run_command
from piles import json_lines, lines, record, run, write

import prepare_pile
from config import ROOT
from pile import keys
from prepare_pile import Config, prepare
from show import prepared
from system import gpus, terminal
from system.errors import UserError
from system.terminal import progress

WORDS = "some words that a document may have, and then some more of them; "


def documents_of(n, domains):
    """[(domain, text)]: n texts that differ, domain by domain in turn."""
    return [(domains[i % len(domains)], f"{i} {WORDS * 5}") for i in range(n)]


def corpus(path, n=200, key="text", domain_key="source"):
    """A file of n records with a text and a domain under these keys, below meta."""
    rows = []
    for domain, text in documents_of(n, ["a", "b"]):
        rows.append({"id": 7, key: text, "meta": {domain_key: domain}})
    return write(path, json_lines(rows))


def printed_by(capsys, tmp_path, source, **options):
    """The lines that preparing a source prints."""
    capsys.readouterr()
    run(tmp_path, source, **options)
    return capsys.readouterr().out.splitlines()


def line_with(text, printed):
    (line,) = [line for line in printed if text in line]
    return line


def typed(line):
    """What a line says is to be typed, as words."""
    return shlex.split(line.partition("type ")[2] or line.partition("type: ")[2])


# --- keys ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson"])
def test_a_source_without_the_text_key_names_its_keys_and_what_to_type(tmp_path, name):
    source = corpus(tmp_path / name, key="content")
    with pytest.raises(UserError) as error:
        run(tmp_path, source)
    counted = "skipped: 200 no_text; the records have the keys 'id', 'content', 'meta.source'"
    assert str(error.value) == f"no document in {source} ({counted}): type --text_key=content"
    key = typed(str(error.value))[0].removeprefix("--text_key=")
    assert run(tmp_path, source, text_key=key).meta["documents"] == 200


def test_a_text_deep_in_a_record_is_suggested_by_its_whole_key(tmp_path):
    rows = [{"title": "t", "body": {"plain": f"{i} {WORDS}"}} for i in range(20)]
    source = write(tmp_path / "x.jsonl", json_lines(rows))
    with pytest.raises(UserError, match=r"type --text_key=body\.plain$"):
        run(tmp_path, source)


def test_records_that_hold_no_text_at_all_are_given_no_key_to_type(tmp_path):
    source = write(tmp_path / "x.jsonl", json_lines([{"id": i} for i in range(9)]))
    with pytest.raises(UserError, match=r"the records have the key 'id'\): see --source and"):
        run(tmp_path, source)


def test_a_wrong_text_key_is_said_before_the_work(tmp_path, capsys, monkeypatch):
    source = corpus(tmp_path / "x.jsonl", key="content")
    monkeypatch.setattr(prepare_pile, "tokenize", lambda *args: pytest.fail("too late"))
    with pytest.raises(pytest.fail.Exception):
        run(tmp_path, source)
    caution = line_with(
        "caution: none of the first 100 records", capsys.readouterr().out.split("\n")
    )
    assert "has a text under 'text'" in caution
    assert caution.endswith("type --text_key=content")


def test_a_source_without_the_domain_key_names_its_keys_in_a_line(tmp_path, capsys):
    source = corpus(tmp_path / "x.jsonl", n=20)
    line = line_with("no record has", printed_by(capsys, tmp_path, source))
    assert "no record has 'meta.pile_set_name'; " in line
    assert "the records have the keys 'id', 'text', 'meta.source': type " in line
    again = printed_by(capsys, tmp_path, source, domain_key="meta.source", overwrite=True)
    assert not [line for line in again if "no record has" in line]


def test_a_source_with_one_record_of_a_domain_says_nothing_of_keys(tmp_path, capsys):
    rows = [{"text": text} for _, text in documents_of(20, "a")]
    source = write(tmp_path / "x.jsonl", json_lines([*rows, record("a", WORDS)]))
    printed = printed_by(capsys, tmp_path, source)
    assert not [line for line in printed if "no record has" in line]


@pytest.mark.parametrize("n", [9, 200])
def test_keys_of_strangers_reach_a_terminal_as_escapes(tmp_path, n):
    evil = "key\x1b[31m\nerror: forged\u202e"
    source = write(tmp_path / "x.jsonl", json_lines([{evil: "some text"}] * n))
    argv = [f"--source={source}", f"--data_dir={tmp_path}/out", "--tokenizer=byte", "--workers=1"]
    outcome = run_command("prepare_pile.py", argv)
    assert outcome.is_refusal(), outcome
    assert "'key\\x1b[31m" in outcome.err
    assert ("caution" in outcome.out) == (n == 200)
    for text in (outcome.out, outcome.err):
        assert "\x1b" not in text
        assert "\nerror: forged" not in text


def test_records_of_text_alone_are_not_given_a_key_for_the_domain(tmp_path, capsys):
    rows = [{"text": text} for _, text in documents_of(20, "a")]
    source = write(tmp_path / "x.jsonl", json_lines(rows))
    line = line_with("no record has", printed_by(capsys, tmp_path, source))
    assert line.endswith("the records have the key 'text' alone: each file is one domain")


def test_keys_are_those_of_the_first_records_of_the_first_files(tmp_path):
    cfg = Config(source="x")
    first = write(tmp_path / "a.jsonl", b'no json\n[1]\n{"first": 1}\n\xff\n')
    second = write(
        tmp_path / "b.jsonl", json_lines([{"text": "abc", f"k{i}": i} for i in range(200)])
    )
    damaged = write(tmp_path / "c.jsonl.gz", b"no gzip")
    missing = tmp_path / "none.parquet"
    found = keys.look(list(map(str, [damaged, missing, first, second])), cfg)
    assert found.records == keys.RECORDS
    assert found.with_text == keys.RECORDS - 1
    assert list(found.texts)[:3] == ["first", "text", "k0"]
    assert found.longest_text() == "text"


# --- domains that are too small -------------------------------------------------------


@pytest.fixture(scope="module")
def twenty():
    """200 documents of 20 domains, and three of two more."""
    names = [f"domain {i}" for i in range(20)]
    return lines([*documents_of(200, names), *documents_of(2, ["x", "y"]), ("y", WORDS * 9)])


def test_domains_without_a_validation_chunk_are_named_and_the_line_to_type_helps(
    tmp_path, capsys, twenty, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "d.jsonl", twenty)
    printed = printed_by(capsys, tmp_path, source, val_fraction=0.01)
    line = line_with("no validation chunk", printed)
    missing = int(line.split(" of 22 domains have no validation chunk: val leaves")[0])
    assert missing >= 15
    assert re.search(r"\((domain \d+, ){5}\.\.\. \(\d+ in all\)\)$", line)
    argv = typed(line_with("for more of them", printed))
    assert argv[:2] == ["python", "prepare_pile.py"]
    done = subprocess.run(
        [sys.executable, prepare_pile.__file__, *argv[2:]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    again = line_with("no validation chunk", done.stdout.splitlines())
    assert int(again.split(" of ")[0]) < missing / 2


@pytest.mark.parametrize("fraction", [0, 0.3])
def test_nothing_is_said_of_validation_where_all_domains_or_none_should_have_it(
    tmp_path, capsys, fraction
):
    source = write(tmp_path / "d.jsonl", lines(documents_of(100, ["a", "b"])))
    printed = printed_by(capsys, tmp_path, source, val_fraction=fraction)
    assert not [line for line in printed if "validation chunk" in line]


def test_domains_of_few_chunks_are_named(tmp_path, capsys, twenty):
    source = write(tmp_path / "d.jsonl", twenty)
    printed = printed_by(capsys, tmp_path, source, val_fraction=0, block_size=256)
    what = "2 domains have fewer than 5 chunks to train on, too few to be compared (x, y)"
    assert line_with("fewer than", printed).startswith(f"{what}: read more text, or lower")
    printed = printed_by(capsys, tmp_path, source, val_fraction=0, block_size=8, overwrite=True)
    assert not [line for line in printed if "fewer than" in line]


@pytest.mark.parametrize(
    "before, documents, chunks, wanted",
    [
        (0.01, 10, 100, 0.3),  # three of ten documents
        (0.01, 100, 100, 0.03),
        (0.01, 100, 50, 0.06),
        (0.01, 1000, 1000, 0.02),  # by chance there was none: twice as much
        (0.2, 10, 10, 0.3),
        (0.3, 10, 10, None),
    ],
)
def test_the_fraction_suggested_follows_the_size_of_the_domains(before, documents, chunks, wanted):
    train = {"documents": documents, "chunks": chunks}
    meta = {"by_domain": {"a": {"train": train}}, "config": {"val_fraction": before}}
    assert prepared.larger_fraction(meta, ["a"]) == wanted


# --- what to type next ----------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, block_size, gpu_gb, config, reason",
    [
        (10**6, 1024, 0, "small", "1,000,000 tokens and no GPU: a small model, a quarter"),
        (10**11, 1024, 0, "small", "no GPU"),
        (10**8, 1024, 6, "small", "a GPU of 6 GB: a small model"),
        (10**6, 1024, 85, "small", "1,000,000 tokens are few"),
        (10**8, 256, 8, "medium", "a GPU of 8 GB: a medium model, about an hour"),
        (10**10, 1024, 24, "medium", "a GPU of 24 GB"),
        (10**10, 512, 85, "medium", "a GPU of 85 GB"),
        (10**10, 1024, 85, "gpt2_inrun", "a GPU of 85 GB: GPT-2 124M"),
    ],
)
def test_the_config_fits_the_data_and_the_machine(tokens, block_size, gpu_gb, config, reason):
    meta = {"tokens": {"train": tokens}, "block_size": block_size}
    chosen = prepared.choose_config(meta, gpu_gb)
    assert chosen.config == f"configs/{config}.py"
    assert Path(ROOT, chosen.config).is_file()
    assert reason in chosen.reason


def test_the_last_line_is_what_to_type_and_the_one_before_says_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_pile, "largest_gpu", lambda: 0.0)
    source = write(tmp_path / "d.jsonl", lines(documents_of(60, "ab")))
    printed = printed_by(capsys, tmp_path, source)
    train = f"python train.py configs/small.py --data_dir={tmp_path}/out --out_dir=out/out"
    assert printed[-1] == f"next: {train}"
    assert "tokens and no GPU" in printed[-2]


def test_without_a_validation_set_the_next_line_asks_for_a_target(tmp_path, capsys):
    source = write(tmp_path / "d.jsonl", lines(documents_of(60, "ab")))
    printed = printed_by(capsys, tmp_path, source, val_fraction=0)
    assert printed[-1].endswith("'--targets=mine=<a file>'")
    assert "no validation set" in printed[-3]


@pytest.mark.parametrize(
    "answer, gb",
    [
        ("echo 81559\necho 24564", 81559 * (1 << 20) / 1e9),
        ("echo '[N/A]'", 0.0),
        ("echo 'no devices were found'; exit 6", 0.0),
        ("exit 1", 0.0),
    ],
)
def test_the_largest_gpu_is_what_nvidia_smi_says(tmp_path, monkeypatch, answer, gb):
    program = write(tmp_path / "bin" / "nvidia-smi", f"#!/bin/sh\n{answer}\n".encode())
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
    assert gpus.largest_gpu() == pytest.approx(gb)


def test_without_nvidia_smi_there_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.largest_gpu() == 0.0


# --- progress ---------------------------------------------------------------------------


class Stream(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


def progress_on(stream, monkeypatch, steps, interval=0.05):
    """What is written while steps of a hundredth of a second go by."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(terminal, "LOG_INTERVAL", interval)
    for _ in progress(range(steps), "a\x1bfile", unit="step"):
        time.sleep(0.01)
    return stream.getvalue()


def test_in_a_log_progress_is_a_line_now_and_then(monkeypatch):
    began = time.perf_counter()
    written = progress_on(Stream(False), monkeypatch, steps=40)
    intervals = (time.perf_counter() - began) / 0.05
    states = written.splitlines()
    assert written.endswith("\n")
    assert "\r" not in written
    assert 2 <= len(states) <= intervals + 1  # and the state at the end
    for state in states:
        assert re.match(r"a\\x1bfile: +\d+%\|[#0-9 ]*\| \d+/40 \[.*step/s\]$", state), state


def test_in_a_log_short_work_says_nothing(monkeypatch):
    assert progress_on(Stream(False), monkeypatch, steps=5, interval=30) == ""


def test_in_a_log_a_second_bar_moves_no_cursor(monkeypatch):
    stream = Stream(False)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(terminal, "LOG_INTERVAL", 0.02)
    for _ in progress(range(3), "files"):
        for _ in progress(range(10), "file", leave=None):
            time.sleep(0.01)
    assert "\x1b" not in stream.getvalue()
    assert {line.partition(":")[0] for line in stream.getvalue().splitlines()} == {"files", "file"}


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    assert "\r" in progress_on(Stream(True), monkeypatch, steps=20)


def test_many_small_files_have_a_bar_of_their_own(tmp_path, monkeypatch):
    for i in range(40):
        write(tmp_path / "s" / f"{i}.jsonl", lines(documents_of(3, "ab")))
    stream = Stream(False)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(terminal, "LOG_INTERVAL", 0.001)
    options = {"tokenizer": "byte", "block_size": 64, "val_fraction": 0.3, "workers": 1}
    prepare(Config(source=str(tmp_path / "s"), data_dir=str(tmp_path / "out"), **options))
    assert re.search(r"^files: .* \d+/40 ", stream.getvalue(), re.M)
