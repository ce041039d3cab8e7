"""prepare_pile.py as people run it: every kind of source, documents found again in chunks, kills,
damaged input, wrong arguments."""

import gzip
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from piles import (
    ARRAYS,
    TABLES,
    digest,
    document_tokens,
    json_lines,
    lines,
    parquet,
    record,
    run,
    streams,
    table,
    texts,
    write,
)

import config
import data
from pile.pack import Split
from prepare_pile import Config, prepare
from system.files import write_json

SCRIPT = Path(config.__file__).parent / "prepare_pile.py"


# --- what is written ----------------------------------------------------------


def write_texts(folder, documents):
    """A .txt for each document, in a folder named as its domain; every third one is packed."""
    for i, (domain, text) in enumerate(documents):
        if i % 3 == 0:
            write(folder / domain / f"{i:04}.txt.gz", gzip.compress(text.encode()))
        else:
            write(folder / domain / f"{i:04}.txt", text.encode())


def rows_without_place(dataset):
    """The tables of documents, without where in the source each of them stood."""
    rows = []
    for split in ("train", "val"):
        for row in table(dataset, split):
            del row["source"], row["record"]
            rows.append(row)
    return rows


def test_every_format_gives_the_same_chunks(tmp_path):
    documents = sorted(texts(), key=lambda d: d[0])  # as a folder of .txt is read: folder by folder
    raw = lines(documents)
    half = raw.index(b"\n", len(raw) // 2) - 7  # frames may end in the middle of a line
    first = raw[:half]
    second = raw[half:]
    write(tmp_path / "d.jsonl", raw)
    write(tmp_path / "d.json", raw)
    write(tmp_path / "d.jsonl.zst", zstandard.compress(first) + zstandard.compress(second))
    write(tmp_path / "d.jsonl.gz", gzip.compress(first) + gzip.compress(second))
    write(tmp_path / "d.json.gz", gzip.compress(raw))
    parquet(tmp_path / "d.parquet", documents)
    parquet(tmp_path / "large" / "d.parquet", documents, pa.large_string())
    write_texts(tmp_path / "txt", documents)
    for i in range(0, len(documents), 40):
        write(tmp_path / "glob" / f"{i:04}.jsonl", lines(documents[i : i + 40]))
    write(tmp_path / "glob" / "notes.md", b"not to be read")
    sources = [
        "d.json",
        "d.jsonl.zst",
        "d.jsonl.gz",
        "d.json.gz",
        "d.parquet",
        "large/d.parquet",
        "txt",
        "glob",
        "glob/*.jsonl",
    ]
    expected = run(tmp_path, tmp_path / "d.jsonl")
    assert len(rows_without_place(expected)) > 140
    for i, source in enumerate(sources):
        dataset = run(tmp_path, tmp_path / source, data_dir=str(tmp_path / f"out{i}"))
        assert digest(dataset.path, ARRAYS) == digest(expected.path, ARRAYS), source
        assert rows_without_place(dataset) == rows_without_place(expected), source
        assert dataset.domains == expected.domains, source


@dataclass
class Packed:
    """A split as it should be."""

    rows: list = field(default_factory=list)
    domains: list = field(default_factory=list)
    table: list = field(default_factory=list)  # (first_chunk, first_token, doc, domain, n_tokens)


def hash_fraction(text):
    """Where in [0, 1) the hash of a text lies, which decides on its split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def packed_one_by_one(documents, tok, width, val_fraction):
    """The rule in the plainest words -> {split: Packed}."""
    splits = {"train": Packed(), "val": Packed()}
    tails = {}  # {(split, domain): (tokens of no row yet, [(start, doc, domain, n_tokens)])}
    for doc, (domain, text) in enumerate(documents):
        name = "val" if hash_fraction(text) < val_fraction else "train"
        split = splits[name]
        tail, starts = tails.setdefault((name, domain), ([], []))
        tokens = tok.encode(text).tolist()
        starts.append((len(tail), doc, domain, len(tokens)))
        tail += [*tokens, tok.eot]
        while len(tail) >= width:
            later = []
            for start, *rest in starts:
                if start < width:
                    split.table.append((len(split.rows), start, *rest))
                else:
                    later.append((start - width, *rest))
            starts[:] = later
            split.rows.append(tail[:width])
            split.domains.append(domain)
            del tail[:width]
    return splits


@pytest.mark.parametrize(
    "tokenizer, n, words, block_size",
    [
        ("byte", 1000, 400, 3000),  # several jobs
        ("gpt2", 300, 60, 64),
    ],
)
def test_documents_are_found_again_in_the_chunks(tmp_path, tokenizer, n, words, block_size):
    documents = texts(n, words=words)
    source = write(tmp_path / "d.jsonl", lines(documents))
    dataset = run(tmp_path, source, tokenizer=tokenizer, block_size=block_size)
    width = block_size + 1
    tok = data.tokenizer(tokenizer)
    n_spread = 0  # documents that go on behind chunks of other domains
    for split, expected in packed_one_by_one(documents, tok, width, 0.3).items():
        part = getattr(dataset, split)
        by_domain = streams(dataset, split)
        assert part.rows.tolist() == expected.rows
        assert [dataset.domains[d] for d in part.domain] == expected.domains
        entries = []
        for row in table(dataset, split):
            keys = ("first_chunk", "first_token", "doc", "domain", "n_tokens")
            entries.append(tuple(row[key] for key in keys))
            assert row["source"] == str(source)
            assert row["record"] == row["doc"]
            tokens, is_whole = document_tokens(dataset, split, row, by_domain)
            text = documents[row["doc"]][1]
            assert text.startswith(tok.decode(tokens))
            assert not is_whole or tok.decode(tokens) == text
            last_chunk = row["first_chunk"] + (row["first_token"] + len(tokens) - 1) // width
            n_spread += len({*part.domain[row["first_chunk"] : last_chunk + 1]}) > 1
        assert entries == sorted(expected.table)
    assert n_spread > 5


def test_meta_json_counts_every_document_and_token(tmp_path):
    documents = texts(300)
    dataset = run(tmp_path, write(tmp_path / "d.jsonl", lines(documents)))
    meta = dataset.meta
    n_listed = len(table(dataset, "train")) + len(table(dataset, "val"))
    assert meta["documents"] == 300
    assert n_listed + meta["dropped_documents"] == 300
    n_tokens = sum(len(text) + 1 for _, text in documents)
    assert sum(meta["tokens"].values()) + meta["dropped_tokens"] == n_tokens
    n_documents = 0
    for split in ("train", "val"):
        counts = [meta["by_domain"][domain][split] for domain in meta["domains"]]
        n_documents += sum(count["documents"] for count in counts)
        assert meta["chunks"][split] == len(getattr(dataset, split).rows)
        assert meta["chunks"][split] == sum(count["chunks"] for count in counts)
        assert meta["tokens"][split] == sum(count["tokens"] for count in counts)
        assert meta["tokens"][split] == meta["chunks"][split] * 65
    assert n_documents == 300


def test_a_chunk_has_one_domain_and_equal_texts_are_in_one_split(tmp_path):
    documents = texts(300)
    for i, (_, text) in enumerate(documents[:]):  # the same texts in other domains
        documents.append((random.Random(i).choice("xy"), text))
    dataset = run(tmp_path, write(tmp_path / "d.jsonl", lines(documents)), val_fraction=0.5)
    for part in (dataset.train, dataset.val):
        for row, domain in zip(part.rows, part.domain, strict=True):
            text = bytes(t for t in row.tolist() if t != 255).decode()
            letters = set(text) & set("abc")
            name = dataset.domains[domain]
            assert name in "xy" or letters <= {name}
    texts_of_split = {}
    for split in ("train", "val"):
        texts_of_split[split] = {documents[row["record"]][1] for row in table(dataset, split)}
        assert len(texts_of_split[split]) > 100
    assert not texts_of_split["train"] & texts_of_split["val"]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.9])
def test_the_split_follows_the_hash_and_has_the_size_asked_for(tmp_path, fraction):
    documents = texts(2000, words=20)
    source = write(tmp_path / "d.jsonl", lines(documents))
    dataset = run(tmp_path, source, val_fraction=fraction)
    n_val = sum(counts["val"]["documents"] for counts in dataset.meta["by_domain"].values())
    assert abs(n_val / 2000 - fraction) < 0.03
    assert bool(len(dataset.val.rows)) == bool(fraction)
    for row in table(dataset, "val"):
        assert hash_fraction(documents[row["record"]][1]) < fraction


def big(path, n=120, size=40_000):
    """A file of n documents, about n * size / 2 bytes: several jobs."""
    rng = random.Random(1)
    words = [f"w{rng.randrange(10**6)}" for _ in range(500)]
    documents = []
    for i in range(n):
        domain = rng.choice("ABCDE")
        text = " ".join(rng.choices(words, k=rng.randrange(size // 4)))
        documents.append((domain, f"{text} {i}"))
    return write(path, lines(documents))


def test_any_number_of_workers_writes_the_same_files(tmp_path):
    source = big(tmp_path / "big.jsonl", 100)
    expected = digest(run(tmp_path, source, workers=1).path)
    for n in (2, 3):
        dataset = run(tmp_path, source, workers=n, data_dir=str(tmp_path / f"out{n}"))
        assert digest(dataset.path) == expected


def test_a_data_set_consists_of_the_files_that_the_readme_describes(tmp_path):
    dataset = run(tmp_path, write(tmp_path / "d.jsonl", lines(texts())))
    names = sorted(path.name for path in dataset.path.iterdir())
    assert names == sorted([*ARRAYS, *TABLES, "meta.json"])
    for name in ARRAYS:
        array = np.load(dataset.path / name)
        content = (dataset.path / name).read_bytes()
        assert dataset.meta["sha256"][name] == hashlib.sha256(content).hexdigest()
        assert array.flags.c_contiguous
        assert array.dtype == np.uint16
    assert dataset.meta["schema"] == data.SCHEMA
    assert dataset.meta["vocab_size"] == 256
    assert dataset.meta["eot"] == 255
    for name in TABLES:
        schema = pq.read_schema(dataset.path / name)
        assert {field.name: str(field.type) for field in schema} == {
            "doc": "int64",
            "domain": "string",
            "source": "string",
            "record": "int64",
            "first_chunk": "int64",
            "first_token": "int32",
            "n_tokens": "int64",
        }


def test_endoftext_in_a_text_is_encoded_as_characters(tmp_path):
    text = "one <|endoftext|> two " * 40
    source = write(tmp_path / "d.jsonl", lines([("a", text)]))
    dataset = run(tmp_path, source, tokenizer="gpt2", val_fraction=0)
    (row,) = table(dataset, "train")
    tokens, _ = document_tokens(dataset, "train", row)
    decoded = data.tokenizer("gpt2").decode(tokens)
    assert dataset.meta["eot"] not in tokens
    assert text.startswith(decoded)
    assert "<|endoftext|>" in decoded


def test_limit_tokens_stops_after_the_document_that_reaches_it(tmp_path):
    documents = texts(300)
    source = write(tmp_path / "d.jsonl", lines(documents))
    length = np.cumsum([len(text) + 1 for _, text in documents])
    options = {"val_fraction": 0, "block_size": 1, "overwrite": True}
    for limit in (1, 5_000, int(length[99]), int(length[99]) + 1):
        dataset = run(tmp_path, source, limit_tokens=limit, **options)
        n = 1 + np.searchsorted(length, limit)
        assert dataset.meta["documents"] == n
        assert max(row["doc"] for row in table(dataset, "train")) == n - 1
        n_tokens = sum(dataset.meta["tokens"].values()) + dataset.meta["dropped_tokens"]
        assert n_tokens == length[n - 1]


def test_limit_tokens_gives_the_same_files_with_any_number_of_workers(tmp_path):
    source = big(tmp_path / "big.jsonl", 100)  # more of its jobs are begun with more workers
    one = run(tmp_path, source, limit_tokens=1_500_000, workers=1)
    three = run(tmp_path, source, limit_tokens=1_500_000, workers=3, data_dir=str(tmp_path / "3"))
    assert one.hash == three.hash


def test_domains_keeps_only_documents_of_these_domains(tmp_path):
    documents = texts(300)
    source = write(tmp_path / "d.jsonl", lines(documents))
    dataset = run(tmp_path, source, domains="c, a")
    assert sorted(dataset.domains) == ["a", "c"]
    assert dataset.meta["documents"] == sum(domain in "ac" for domain, _ in documents)
    assert {documents[row["record"]][0] for row in table(dataset, "train")} == {"a", "c"}


# --- sources ------------------------------------------------------------------


def test_unusable_records_are_skipped_and_counted(tmp_path):
    good = texts(200)
    bad = [
        b"\xff\xfe\n",
        b'{"text": "caf\xe9"}\n',
        b'{"text": \n',
        b"[1, 2]\n",
        b"null\n",
        b'{"text": 7}\n',
        b'{"meta": {}}\n',
        b'{"text": ""}\n',
    ]
    bad += [b'{"text": " \\n "}\n', b'{"text": "half \\ud800"}\n', b"[" * 100_000 + b"\n", b"\n"]
    parts = [lines([document]) for document in good]
    for i, line in enumerate(bad):
        parts.insert(5 + 10 * i, line)
    raw = b"".join(parts)
    dataset = run(tmp_path, write(tmp_path / "d.jsonl", raw[:-1]))  # the last line has no end
    assert dataset.meta["skipped"] == {
        "not_utf8": 2,
        "not_json": 2,
        "no_text": 4,
        "empty": 2,
        "lone_surrogate": 1,
        "too_long": 0,
        "not_tokenized": 0,
    }
    assert dataset.meta["documents"] == len(good)
    numbered = raw.split(b"\n")
    for row in table(dataset, "train"):
        assert (
            json.loads(numbered[row["record"]])["text"]
            .encode()
            .startswith(bytes(document_tokens(dataset, "train", row)[0].tolist()))
        )
    clean = run(
        tmp_path, write(tmp_path / "clean.jsonl", lines(good)), data_dir=str(tmp_path / "clean")
    )
    assert clean.hash == dataset.hash


def test_bad_utf8_in_parquet_and_txt_is_skipped_and_counted(tmp_path):
    good = texts(100, domains="a")
    raw = [text.encode() for _, text in good]
    raw[3:3] = [b"\xff", None, b""]
    column = pa.array(raw, pa.binary())
    column = pa.Array.from_buffers(
        pa.string(), len(raw), column.buffers(), column.null_count
    )  # pyarrow does not look at the bytes
    (tmp_path / "a").mkdir()
    pq.write_table(pa.table({"text": column}), tmp_path / "a" / "p.parquet")
    dataset = run(tmp_path, tmp_path / "a" / "p.parquet")
    assert dataset.domains == ["p"]
    assert dataset.meta["documents"] == 100
    assert {k: n for k, n in dataset.meta["skipped"].items() if n} == {
        "not_utf8": 1,
        "no_text": 1,
        "empty": 1,
    }
    assert {row["record"] for row in table(dataset, "train")} & {3, 4, 5} == set()
    for i, text in enumerate(raw):
        write(tmp_path / "b" / f"{i:03}.txt", text or b" ")
    dataset = run(tmp_path, tmp_path / "b", data_dir=str(tmp_path / "txt"))
    assert dataset.domains == ["b"]
    assert dataset.meta["skipped"]["not_utf8"] == 1
    assert dataset.meta["skipped"]["empty"] == 2


def test_a_long_txt_is_cut_at_lines(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(60_000))
    dataset = run(
        tmp_path,
        write(tmp_path / "books" / "long.txt.zst", zstandard.compress(text.encode())),
        val_fraction=0,
    )
    rows = table(dataset, "train")
    sizes = [row["n_tokens"] for row in rows]
    assert len(rows) > 10
    assert max(sizes) < (64 << 10) + 20
    assert dataset.domains == ["books"]
    assert [row["record"] for row in rows] == list(range(len(rows)))
    found = [bytes(document_tokens(dataset, "train", row)[0].tolist()) for row in rows]
    assert all(piece.endswith(b"\n") for piece in found[:-1])
    assert text.encode().startswith(b"".join(found))


def test_dotted_keys_find_texts_and_domains_inside_records(tmp_path):
    values = ["x", 7, None, "", True]
    records = [
        {"doc": {"body": text, "kind": value}} for (_, text), value in zip(texts(200), values * 40)
    ]
    source = write(
        tmp_path / "my.file.jsonl", b"".join(json.dumps(r).encode() + b"\n" for r in records)
    )
    dataset = run(tmp_path, source, text_key="doc.body", domain_key="doc.kind")
    assert set(dataset.domains) == {"x", "7", "my.file", "True"}
    pq.write_table(
        pa.Table.from_pylist(
            [{"doc": {"body": text, "kind": i % 2}} for i, (_, text) in enumerate(texts(200))]
        ),
        tmp_path / "p.parquet",
    )
    dataset = run(
        tmp_path, tmp_path / "p.parquet", text_key="doc.body", domain_key="doc.kind", overwrite=True
    )
    assert set(dataset.domains) == {"0", "1"}


def test_a_file_cut_short_is_refused(tmp_path):
    raw = lines(texts(500))
    for name, zipped in (
        ("d.jsonl.zst", zstandard.compress(raw)),
        ("d.jsonl.gz", gzip.compress(raw)),
    ):
        with pytest.raises(ValueError, match="damaged or cut short"):
            run(tmp_path, write(tmp_path / name, zipped[: len(zipped) // 2]))
        with pytest.raises(ValueError, match="damaged or cut short"):
            run(tmp_path, write(tmp_path / name, b"no such format"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl.gz", "d.jsonl.zst"]


def test_the_installed_text_gives_the_same_chunks_every_time(tmp_path):
    first = run(tmp_path, "python", limit_tokens=600_000, val_fraction=0.2, workers=2)
    again = run(tmp_path, "python", limit_tokens=600_000, val_fraction=0.2, overwrite=True)
    assert first.hash == again.hash
    assert sorted(first.domains) == ["Docstrings", "Licences", "Python code", "Readmes", "Topics"]
    code = {row["source"]: row for row in table(again, "train") if row["domain"] == "Python code"}
    checked = 0
    for name, row in code.items():
        text, whole = document_tokens(again, "train", row)
        if whole and "def " in (source := bytes(text.tolist()).decode()):
            lines = Path(name).read_text(encoding="utf-8").splitlines()
            kept = iter(lines)
            assert all(line in kept for line in source.splitlines())  # its own lines, in order
            checked += len(lines) - len(source.splitlines())
    assert checked > 100  # lines of docstrings that are gone


def test_a_dataset_with_keys_that_appear_later_is_read_whole(tmp_path):
    records = [record(domain, text * 30) for domain, text in texts(400)]
    for i, r in enumerate(records):
        r["meta"] |= {"extra": {"n": i}} if i > 300 else {}
        r |= {"id": i} if i > 350 else {}
    del records[7]["meta"]
    raw = b"".join(json.dumps(r).encode() + b"\n" for r in records)
    write(
        tmp_path / "set" / "00.jsonl.zst",
        zstandard.compress(raw[: raw.index(b"\n", len(raw) // 2) + 1]),
    )
    write(
        tmp_path / "set" / "01.jsonl.zst",
        zstandard.compress(raw[raw.index(b"\n", len(raw) // 2) + 1 :]),
    )
    hub = run(tmp_path, "", dataset=str(tmp_path / "set"), data_dir=str(tmp_path / "hub"))
    files = run(tmp_path, tmp_path / "set")
    assert {*hub.domains} == {*"abc", "set"}
    assert {*files.domains} == {
        *"abc",
        "00",
    }
    assert hub.hash == files.hash
    assert hub.meta["source"] == str(tmp_path / "set")
    assert hub.meta["documents"] == 400
    assert {Path(row["source"]).name for row in table(hub, "train")} == {
        "00.jsonl.zst",
        "01.jsonl.zst",
    }
    parquet(tmp_path / "p.parquet", texts(100))
    write(tmp_path / "set2" / "p.parquet", (tmp_path / "p.parquet").read_bytes())
    hub = run(tmp_path, "", dataset=str(tmp_path / "set2"), overwrite=True)
    assert hub.hash == run(tmp_path, tmp_path / "p.parquet", overwrite=True).hash


# --- runs that end otherwise --------------------------------------------------


def command(folder, source, *options, **popen):
    arguments = [
        sys.executable,
        SCRIPT,
        f"--source={source}",
        f"--data_dir={folder / 'out'}",
        "--block_size=64",
        "--val_fraction=0.3",
        *options,
    ]
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


def wait_for(condition, process=None):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end and (process is None or process.poll() is None), (
            process and process.communicate()
        )
        time.sleep(0.002)


def children(pid):
    return [
        int(p)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for p in (task / "children").read_text().split()
    ]


def gone(pid):
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A source that takes some seconds, and its undisturbed result."""
    folder = tmp_path_factory.mktemp("slow")
    source = big(folder / "big.jsonl", 360)
    return source, digest(run(folder, source, tokenizer="gpt2", workers=1).path)


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGKILL, -9),
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        ("worker", 2),
        ("answering worker", 2),
    ],
)
def test_a_run_cut_off_leaves_no_data_dir_and_no_workers(tmp_path, slow, number, code):
    source, undisturbed = slow
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = command(tmp_path, source, "--workers=1", start_new_session=True, preexec_fn=listen)
    partial = tmp_path / "out.parts" / "1-of-1.partial"
    wait_for(lambda: any(path.stat().st_size > 1000 for path in partial.glob("*.arrow")), process)
    workers = children(process.pid)
    assert workers
    with pytest.raises(ValueError, match=r"another process is writing"):
        run(tmp_path, source)
    if number in ("worker", "answering worker"):
        if (
            number == "answering worker"
        ):  # with the parent stopped, it stands still in the midst of an answer that no pipe holds whole
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(1)
        os.kill(workers[0], signal.SIGKILL)
        os.kill(process.pid, signal.SIGCONT)
    elif number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        os.kill(process.pid, number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code and not (tmp_path / "out").exists(), errors
    wait_for(lambda: all(map(gone, workers)))
    if code == 2:
        assert errors.count("\n") == 1
        assert errors.startswith("error: a worker process was killed")
    else:
        assert not errors
    assert [path.name for path in tmp_path.iterdir()] == ["out.parts"] * (number == signal.SIGKILL)
    if number == signal.SIGKILL:
        assert [path.name for path in (tmp_path / "out.parts").iterdir()] == ["1-of-1.partial"]
        process = command(tmp_path, source, "--workers=2")
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "next: python train.py" in output
        assert digest(tmp_path / "out") == undisturbed
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_finished_folder_is_kept_until_overwrite(tmp_path, capsys):
    source = write(tmp_path / "d.jsonl", lines(texts()))
    old = run(tmp_path, source)
    before = digest(old.path, (*ARRAYS, *TABLES, "meta.json"))
    capsys.readouterr()
    run(tmp_path, source, workers=2)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"prepared with --block_size=64 --val_fraction=0.3: add --overwrite"
    ):
        run(tmp_path, source, block_size=32, val_fraction=0.4)
    with pytest.raises(ValueError, match="no document of 'z'"):
        run(tmp_path, source, domains="z", overwrite=True)
    assert digest(old.path, (*ARRAYS, *TABLES, "meta.json")) == before
    new = run(tmp_path, source, block_size=32, overwrite=True)
    assert new.meta["block_size"] == 32
    assert new.hash != old.hash
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "out"]
    with open(new.path / "train.npy", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="damaged"):  # not "already prepared"
        run(tmp_path, source, block_size=32)
    assert run(tmp_path, source, block_size=32, overwrite=True).hash == new.hash


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    source = write(tmp_path / "d.jsonl", lines(texts()))
    write(tmp_path / "out" / "thesis.tex", b"years of work")
    with pytest.raises(ValueError, match=r"did not write \(thesis.tex\): write another --data_dir"):
        run(tmp_path, source, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_bytes() == b"years of work"


@pytest.mark.parametrize(
    "source, options, answer",
    [
        ("nowhere", {}, "nothing to read there"),
        ("*.nothing", {}, "nothing to read there"),
        ("d.csv", {}, "cannot read"),
        ("bad.parquet", {}, "bad.parquet is damaged or cut short (Parquet magic bytes"),
        ("d.parquet", {"text_key": "body"}, "write --text_key=<one of n, meta, text>"),
        ("array.json", {}, "write a record a line, as `jq"),
        ("empty.jsonl", {}, "no document in"),
        ("d.jsonl", {"text_key": "body"}, "150 no_text"),
        ("d.jsonl", {"domains": "a,z"}, "no document of 'z'; there is a, b, c"),
        ("d.jsonl", {"block_size": 10**6}, "fill no chunk of train.npy"),
        ("d.jsonl", {"val_fraction": 1e-9}, "raise --val_fraction"),
        ("d.jsonl", {"val_fraction": 1.0}, "--val_fraction=1.0: it must be below 1"),
        ("d.jsonl", {"block_size": 0}, "--block_size=0: it must be at least 1"),
        ("d.jsonl", {"limit_tokens": -1}, "--limit_tokens=-1: it must be at least 0"),
        ("d.jsonl", {"shard": "5/4"}, "write --shard=<i>/<n, i from 1 to n>"),
        ("d.jsonl", {"shard": "0/4"}, "write --shard=<i>/<n, i from 1 to n>"),
        ("d.jsonl", {"shard": "x"}, "write --shard=<i>/<n, i from 1 to n>"),
        (
            "d.jsonl",
            {"shard": "1/2", "merge": True},
            "neither --merge nor --limit_tokens nor --source=python",
        ),
        (
            "d.jsonl",
            {"shard": "1/2", "limit_tokens": 5},
            "neither --merge nor --limit_tokens nor --source=python",
        ),
        ("python", {"shard": "1/2"}, "neither --merge nor --limit_tokens nor --source=python"),
        (
            "d.jsonl",
            {"merge": True},
            "1 of 1 parts are missing, unfinished or of other files or options (d.jsonl): type: python prepare_pile.py",
        ),
        ("d.jsonl", {"verify": True}, "no prepared data in"),
        ("d.jsonl", {"data_dir": "d.jsonl"}, "Not a directory"),
        ("d.jsonl", {"data_dir": "d.jsonl/under"}, "Not a directory"),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, source, options, answer
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", lines(texts()))
    write(tmp_path / "d.csv", b"text\n")
    write(tmp_path / "bad.parquet", b"PAR1 no more")
    write(tmp_path / "array.json", b'[{"text": "a"}]')
    write(tmp_path / "empty.jsonl", b"")
    parquet(tmp_path / "d.parquet", texts())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: run(tmp_path, source, **options))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert answer in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_ends_with_one_line_and_leaves_nothing(tmp_path):
    source = big(tmp_path / "big.jsonl")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    process = command(tmp_path, source, "--tokenizer=byte", "--workers=1", preexec_fn=limit)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors.startswith("error: ")
    assert "too large" in errors
    assert errors.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["big.jsonl"]


def test_the_hub_without_a_network_ends_with_what_to_type(tmp_path):
    process = command(tmp_path, "", env={**os.environ, "HF_HUB_OFFLINE": "1"})
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count("\n") == 1
    assert "--source=python" in errors
    assert "monology/pile-uncopyrighted" in errors
    assert not list(tmp_path.iterdir())


def test_local_sources_import_neither_datasets_nor_torch(tmp_path):
    write(tmp_path / "d.jsonl", lines(texts()))
    code = "import sys, prepare_pile as p; p.prepare(p.Config(source='d.jsonl', tokenizer='byte', block_size=64, val_fraction=.3, data_dir='out'))"
    code += "; print([m for m in ('datasets', 'torch', 'tiktoken', 'wandb') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


# --- shards, and going on -----------------------------------------------------


SMALL_PARTS = "import sys, config, prepare_pile as p; p.PART = 1; config.main(lambda: p.prepare(config.load(p.Config)))"  # a part a file


def small_parts(folder, *options):
    """prepare_pile.py as a process, with a part for each of the small files a test has."""
    arguments = [
        sys.executable,
        "-c",
        SMALL_PARTS,
        f"--source={folder / 'pile'}",
        f"--data_dir={folder / 'out'}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    return subprocess.Popen(
        [*arguments, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def pile(folder, files, n=60, **options):
    """A folder of files, each a text of its own, and the digest of what one undisturbed run makes of it, all in one part."""
    for i in range(files):
        write(
            folder / "pile" / f"{i:02}.jsonl",
            lines(texts(n, seed=i, words=300, domains="abcd"[i % 2 :])),
        )  # "a" is not met first everywhere
    dataset = run(folder, folder / "pile", data_dir=str(folder / "one"), **options)
    return digest(dataset.path), dataset


@pytest.mark.parametrize("n", [1, 3, 7])
def test_shards_and_a_merge_write_the_same_files_as_one_run(tmp_path, monkeypatch, capsys, n):
    undisturbed, one = pile(tmp_path, 5)
    monkeypatch.setattr("prepare_pile.PART", 1)
    for i in reversed(range(1, n + 1)):  # whichever comes first
        prepare(
            Config(
                source=str(tmp_path / "pile"),
                tokenizer="byte",
                block_size=64,
                val_fraction=0.3,
                data_dir=str(tmp_path / "out"),
                workers=1,
                shard=f"{i}/{n}",
            )
        )
        done = {part for k in range(i, n + 1) for part in range(k, 6, n)}
        assert not (tmp_path / "out").exists()
        assert {int(path.name[:5]) for path in tmp_path.glob("out.parts/*")} == done
    assert "--merge" in capsys.readouterr().out
    merged = run(tmp_path, tmp_path / "pile", merge=True, workers=2)
    assert digest(merged.path) == undisturbed
    assert {**merged.meta, "command": 0} == {**one.meta, "command": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "pile"]
    run(tmp_path, tmp_path / "pile")
    assert "already prepared" in capsys.readouterr().out


def test_merge_names_the_shard_that_is_missing(tmp_path, monkeypatch):
    undisturbed, _ = pile(tmp_path, 4)
    monkeypatch.setattr("prepare_pile.PART", 1)
    options = dict(
        source=str(tmp_path / "pile"),
        tokenizer="byte",
        block_size=64,
        val_fraction=0.3,
        data_dir=str(tmp_path / "out"),
    )
    for i, other in (
        (1, {}),
        (2, {"block_size": 32}),
        (4, {}),
    ):  # the second is of other options, the third is not there
        prepare(Config(**{**options, **other}, workers=1, shard=f"{i}/4"))
    write(
        tmp_path / "out.parts" / "3-of-4.partial" / "00003-0123456789abcdef.arrow", b"ARROW1"
    )  # and was not finished
    with pytest.raises(ValueError, match="2 of 4 parts are missing") as error:
        prepare(Config(**options, merge=True))
    assert "01.jsonl, " in str(error.value)
    assert "02.jsonl)" in str(error.value)
    assert "00.jsonl" not in str(error.value)
    for _ in range(2):  # what it says is what helps
        python, script, *arguments = str(error.value).partition("type: ")[2].split()
        assert (python, script) == ("python", "prepare_pile.py")
        prepare(config.load(Config, arguments))
        if _ == 0:
            with pytest.raises(ValueError, match="1 of 4 parts are missing") as error:
                prepare(Config(**options, merge=True))
    prepare(Config(**options, merge=True))
    assert digest(tmp_path / "out") == undisturbed
    pile(tmp_path, 3, overwrite=True)
    write(
        tmp_path / "pile" / "00.jsonl", lines(texts(9))
    )  # a source that has changed is another source
    with pytest.raises(ValueError, match=r"4 of 4 parts are missing.*--shard=1/4"):
        prepare(Config(**options, merge=True, overwrite=True))
    assert digest(tmp_path / "out") == undisturbed


def test_a_shard_killed_at_any_moment_goes_on_after_its_last_part(tmp_path):
    undisturbed, _ = pile(tmp_path, 6, n=250, tokenizer="gpt2")
    rng, kills, whole, options = (
        random.Random(3),
        0,
        {},
        ["--block_size=64", "--val_fraction=0.3", "--workers=1"],
    )
    while len(whole) < 6:
        assert kills < 20
        process = small_parts(tmp_path, "--shard=1/1", *options)
        while len([*tmp_path.glob("out.parts/*.arrow")]) == len(whole) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        now = {
            path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in tmp_path.glob("out.parts/*.arrow")
        }
        assert whole.items() <= now.items()  # what was whole was not written again
        whole = now
    assert kills >= 2
    process = small_parts(tmp_path, "--merge", *options)
    wait_for(lambda: any(tmp_path.glob("out.parts/1-of-1.partial/train.npy")), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert whole == {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in tmp_path.glob("out.parts/*.arrow")
    }
    process = small_parts(tmp_path, "--merge", *options)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "6 of 6 parts are there already" in output
    assert digest(tmp_path / "out") == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "pile"]


def test_a_damaged_file_leaves_the_parts_before_it(tmp_path, monkeypatch, capsys):
    undisturbed, _ = pile(tmp_path, 3)
    monkeypatch.setattr("prepare_pile.PART", 1)
    good = (tmp_path / "pile" / "02.jsonl").read_bytes()
    (tmp_path / "pile" / "02.jsonl").rename(tmp_path / "pile" / "02.jsonl.gz")
    with pytest.raises(ValueError, match=r"02.jsonl.gz is damaged or cut short"):
        run(tmp_path, tmp_path / "pile")
    assert not (tmp_path / "out").exists()
    (tmp_path / "pile" / "02.jsonl.gz").unlink()
    write(tmp_path / "pile" / "02.jsonl", good)
    run(tmp_path, tmp_path / "pile")
    assert "2 of 3 parts are there already" in capsys.readouterr().out
    assert digest(tmp_path / "out") == undisturbed


def test_limit_tokens_counts_over_several_parts(tmp_path, monkeypatch):
    _, one = pile(tmp_path, 4, limit_tokens=150_000)
    monkeypatch.setattr("prepare_pile.PART", 1)
    assert digest(run(tmp_path, tmp_path / "pile", limit_tokens=150_000).path) == digest(one.path)
    assert one.meta["documents"] < 240
    assert len({row["source"] for row in table(one, "train")}) > 1


def test_split_counts_chunks_beyond_32_bits(tmp_path):
    """The packer in the middle of a set of 2^33 chunks, which no test can write."""
    n = 1 << 33
    split = Split(tmp_path, "train", dict(block_size=7, chunks={"train": n + 2}, domains=["a"]))
    split.n = n
    split.add((n + 5, "a", "file", n + 6), np.arange(18, dtype="<u2"))
    split.write_table()
    split.table.close()
    split.rows.file.close()
    (row,) = pq.read_table(tmp_path / "train_docs.parquet").to_pylist()
    assert (row["first_chunk"], row["doc"], row["record"], row["n_tokens"]) == (n, n + 5, n + 6, 17)
    with open(tmp_path / "train.npy", "rb") as file:
        np.lib.format.read_magic(file)
        assert np.lib.format.read_array_header_1_0(file)[0] == (n + 2, 8)
        assert np.fromfile(file, "<u2").tolist() == [*range(16)]


def test_too_many_domains_are_refused(tmp_path):
    source = write(
        tmp_path / "d.jsonl",
        b"".join(
            b'{"text": "a", "meta": {"pile_set_name": %d}}\n' % i for i in range((1 << 16) + 1)
        ),
    )
    with pytest.raises(ValueError, match=r"--domain_key=meta\.pile_set_name has 65537 values"):
        run(tmp_path, source, block_size=1, val_fraction=0)


def test_the_commands_for_large_data_in_the_readme_work(tmp_path):
    """The section's own lines, typed one after another where a folder named pile is."""
    section = (
        (SCRIPT.parent / "docs" / "data.md")
        .read_text()
        .partition("## Data at the Pile's size")[2]
        .partition("\n## ")[0]
    )
    commands = [
        line.partition("#")[0].split()
        for line in section.partition("```sh\n")[2].partition("```")[0].splitlines()
    ]
    assert [command[-1] for command in commands] == [
        "--source=pile",
        "--shard=1/2",
        "--shard=2/2",
        "--merge",
        "--verify",
    ]
    big(tmp_path / "pile" / "00.jsonl", 400, 8_000)
    write(tmp_path / "pile" / "01.jsonl", (tmp_path / "pile" / "00.jsonl").read_bytes())
    digests = []
    for python, script, *arguments in commands:
        assert (python, script) == ("python", "prepare_pile.py")
        done = subprocess.run(
            [sys.executable, SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        if "--shard=1/2" in arguments or "--merge" in arguments:
            assert "already prepared" not in done.stdout
        if "--shard" not in arguments[-1]:
            digests.append(digest(tmp_path / "data" / "pile"))
        if len(digests) == 1 and (tmp_path / "data" / "pile").exists():
            (tmp_path / "data" / "pile").rename(
                tmp_path / "alone"
            )  # the second way starts from nothing
    assert digests[0] == digests[1] == digests[2]
    assert "as it was written" in done.stdout


def test_300_million_chunks_need_no_more_memory_than_a_few(tmp_path):
    """Their order and their rows cost no more than those of a few: bench/scale.py prints how much."""
    sys.path.insert(0, str(SCRIPT.parent / "bench"))
    import scale

    n, before = 300_000_000, scale.memory()
    scale.sparse_set(tmp_path, n, 1024)
    assert (tmp_path / "train.npy").stat().st_size == 128 + n * 2050
    seconds, dataset = scale.timed(data.open_dataset, tmp_path)
    assert seconds < 1
    assert dataset.train.rows.shape == (n, 1025)
    for step in (0, 1000, 1_000_000, 5 * n // 1024):
        seconds, ids = scale.timed(data.global_batch, step, 512, n, 1337)
        assert seconds < 0.1
        assert len(np.unique(ids)) == 512
        assert 0 <= ids.min()
        assert n // 2 < ids.max() < n
        seconds, (X, _) = scale.timed(dataset.train.batch, ids, 1024)
        assert seconds < 1
        assert X.shape == (
            512,
            1024,
        )
    assert sum(scale.memory()) - sum(before) < 1 << 30


# --- the reader ---------------------------------------------------------------


@pytest.mark.parametrize(
    "damage, answer",
    [
        (
            lambda path, meta: (path / "train.npy").write_bytes(
                (path / "train.npy").read_bytes()[:-1]
            ),
            "train.npy is missing or damaged",
        ),
        (
            lambda path, meta: (path / "val_domain.npy").write_bytes(b""),
            "val_domain.npy is missing or damaged",
        ),
        (
            lambda path, meta: (path / "train_domain.npy").unlink(),
            "train_domain.npy is missing or damaged",
        ),
        (
            lambda path, meta: meta["chunks"].update(train=meta["chunks"]["train"] + 1),
            "its shape is",
        ),
        (lambda path, meta: meta.update(block_size=63), "its shape is"),
        (lambda path, meta: meta.update(schema=0), "schema 0"),
        (lambda path, meta: (path / "meta.json").unlink(), "no prepared data"),
    ],
)
def test_the_reader_refuses_a_damaged_data_set(tmp_path, damage, answer):
    dataset = run(tmp_path, write(tmp_path / "d.jsonl", lines(texts())))
    before = json.dumps(dataset.meta)
    damage(dataset.path, dataset.meta)
    if json.dumps(dataset.meta) != before:
        write_json(dataset.path / "meta.json", dataset.meta)
    with pytest.raises(ValueError, match=answer):
        data.open_dataset(dataset.path)


def test_a_flipped_bit_is_found(tmp_path, monkeypatch):
    dataset = run(tmp_path, write(tmp_path / "d.jsonl", lines(texts())))
    for name in ARRAYS:
        good = (dataset.path / name).read_bytes()
        (dataset.path / name).write_bytes(good[:-9] + bytes([good[-9] ^ 4]) + good[-8:])
        with pytest.raises(
            ValueError, match=rf"{name} is damaged.*type: python prepare_pile.py .*--overwrite"
        ):
            data.open_dataset(dataset.path)
        if name == "train.npy":
            process = subprocess.run(
                [sys.executable, SCRIPT, "--verify", f"--data_dir={dataset.path}"],
                capture_output=True,
                text=True,
            )
            assert process.returncode == 2
            assert process.stderr.count("\n") == 1
            assert f"{name} is damaged" in process.stderr
            with monkeypatch.context() as patch:
                patch.setattr(data, "CHECKED", 0)  # too large to be read whenever it is opened
                with pytest.raises(ValueError, match="is damaged"):
                    data.open_dataset(dataset.path).verify()
        (dataset.path / name).write_bytes(good)
    data.open_dataset(dataset.path).verify()


def test_the_scale_benchmark_ends_with_one_line_of_json(tmp_path):
    source = write(tmp_path / "d.jsonl", lines(texts(300, words=400)))
    arguments = [
        f"--source={source}",
        "--tokenizer=byte",
        "--rounds=1",
        "--chunks=5000",
        "--steps=0,7",
        f"--folder={tmp_path}",
    ]
    done = subprocess.run(
        [sys.executable, SCRIPT.parent / "bench" / "scale.py", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["stage"] for row in rows[5:]] == [
        "read",
        "parse",
        "tokenize",
        "write",
        "pack",
    ]
    assert len(rows) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]
