"""prepare_pile.py as people run it: every kind of source, documents found again in chunks, kills,
damaged input, wrong arguments."""

import contextlib
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
from pile import workers
from pile.pack import Split
from prepare_pile import Config, prepare
from system.errors import UserError
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


def test_a_data_set_consists_of_arrays_tables_and_meta_json(tmp_path):
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
        b"[" * 100_000 + b"\n",
        b"[1, 2]\n",
        b"null\n",
        b'{"text": 7}\n',
        b'{"meta": {}}\n',
        b'{"text": ""}\n',
        b'{"text": " \\n "}\n',
        b'{"text": "half \\ud800"}\n',
        b"\n",
    ]
    mixed = [lines([document]) for document in good]
    for i, line in enumerate(bad):
        mixed.insert(5 + 10 * i, line)
    raw = b"".join(mixed)
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
    for row in table(dataset, "train"):
        text = json.loads(mixed[row["record"]])["text"]
        tokens, _ = document_tokens(dataset, "train", row)
        assert text.encode().startswith(bytes(tokens.tolist()))
    source = write(tmp_path / "clean.jsonl", lines(good))
    clean = run(tmp_path, source, data_dir=str(tmp_path / "clean"))
    assert clean.hash == dataset.hash


def test_bad_utf8_in_parquet_is_skipped_and_counted(tmp_path):
    raw = [text.encode() for _, text in texts(100)]
    raw[3:3] = [b"\xff", None, b""]
    column = pa.array(raw, pa.binary())
    # pyarrow does not look at the bytes
    column = pa.Array.from_buffers(pa.string(), len(raw), column.buffers(), column.null_count)
    pq.write_table(pa.table({"text": column}), tmp_path / "p.parquet")
    dataset = run(tmp_path, tmp_path / "p.parquet")
    assert dataset.domains == ["p"]
    assert dataset.meta["documents"] == 100
    skipped = {reason: n for reason, n in dataset.meta["skipped"].items() if n}
    assert skipped == {"not_utf8": 1, "no_text": 1, "empty": 1}
    records = {row["record"] for row in table(dataset, "train")}
    assert not records & {3, 4, 5}


def test_bad_utf8_in_txt_is_skipped_and_counted(tmp_path):
    for i, (_, text) in enumerate(texts(100)):
        write(tmp_path / "b" / f"{i:03}.txt", text.encode())
    write(tmp_path / "b" / "bad.txt", b"\xff")
    write(tmp_path / "b" / "blank.txt", b" ")
    dataset = run(tmp_path, tmp_path / "b")
    assert dataset.domains == ["b"]
    assert dataset.meta["documents"] == 100
    assert dataset.meta["skipped"]["not_utf8"] == 1
    assert dataset.meta["skipped"]["empty"] == 1


def test_a_long_txt_is_cut_at_lines(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(60_000))
    packed = zstandard.compress(text.encode())
    source = write(tmp_path / "books" / "long.txt.zst", packed)
    dataset = run(tmp_path, source, val_fraction=0)
    rows = table(dataset, "train")
    assert len(rows) > 10
    assert max(row["n_tokens"] for row in rows) < (64 << 10) + 20
    assert dataset.domains == ["books"]
    assert [row["record"] for row in rows] == list(range(len(rows)))
    pieces = []
    for row in rows:
        tokens, _ = document_tokens(dataset, "train", row)
        pieces.append(bytes(tokens.tolist()))
    for piece in pieces[:-1]:
        assert piece.endswith(b"\n")
    assert text.encode().startswith(b"".join(pieces))


def test_dotted_keys_find_texts_and_domains_inside_records(tmp_path):
    kinds = ["x", 7, None, "", True]
    records = []
    for i, (_, text) in enumerate(texts(200)):
        records.append({"doc": {"body": text, "kind": kinds[i % 5]}})
    source = write(tmp_path / "my.file.jsonl", json_lines(records))
    keys = {"text_key": "doc.body", "domain_key": "doc.kind"}
    dataset = run(tmp_path, source, **keys)
    assert set(dataset.domains) == {"x", "7", "my.file", "True"}
    for i, r in enumerate(records):
        r["doc"]["kind"] = i % 2
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "p.parquet")
    dataset = run(tmp_path, tmp_path / "p.parquet", overwrite=True, **keys)
    assert set(dataset.domains) == {"0", "1"}


@pytest.mark.parametrize("suffix, compress", [(".zst", zstandard.compress), (".gz", gzip.compress)])
def test_a_file_cut_short_is_refused(tmp_path, suffix, compress):
    packed = compress(lines(texts(500)))
    for content in (packed[: len(packed) // 2], b"no such format"):
        source = write(tmp_path / f"d.jsonl{suffix}", content)
        with pytest.raises(UserError, match="damaged or cut short"):
            run(tmp_path, source)
    assert [path.name for path in tmp_path.iterdir()] == [f"d.jsonl{suffix}"]


def test_the_installed_text_gives_the_same_chunks_every_time(tmp_path):
    first = run(tmp_path, "python", limit_tokens=600_000, val_fraction=0.2, workers=2)
    again = run(tmp_path, "python", limit_tokens=600_000, val_fraction=0.2, overwrite=True)
    assert first.hash == again.hash
    assert sorted(first.domains) == ["Docstrings", "Licences", "Python code", "Readmes", "Topics"]


def test_installed_code_is_read_without_its_docstrings(tmp_path):
    dataset = run(tmp_path, "python", limit_tokens=600_000, domains="Python code,Docstrings")
    n_removed = 0  # lines of docstrings
    for row in table(dataset, "train"):
        tokens, is_whole = document_tokens(dataset, "train", row)
        if row["domain"] == "Python code" and is_whole:
            lines_read = bytes(tokens.tolist()).decode().splitlines()
            lines_of_file = Path(row["source"]).read_text(encoding="utf-8").splitlines()
            rest = iter(lines_of_file)
            assert all(line in rest for line in lines_read)  # the file's own lines, in order
            n_removed += len(lines_of_file) - len(lines_read)
    assert n_removed > 100


def test_a_dataset_with_keys_that_appear_later_is_read_whole(tmp_path):
    records = [record(domain, text * 30) for domain, text in texts(400)]
    for i, r in enumerate(records):
        if i > 300:
            r["meta"]["extra"] = {"n": i}
        if i > 350:
            r["id"] = i
    del records[7]["meta"]
    names = ["00.jsonl.zst", "01.jsonl.zst"]
    write(tmp_path / "set" / names[0], zstandard.compress(json_lines(records[:200])))
    write(tmp_path / "set" / names[1], zstandard.compress(json_lines(records[200:])))
    hub = run(tmp_path, "", dataset=str(tmp_path / "set"), data_dir=str(tmp_path / "hub"))
    files = run(tmp_path, tmp_path / "set")
    assert {*hub.domains} == {"a", "b", "c", "set"}
    assert {*files.domains} == {"a", "b", "c", "00"}
    assert hub.hash == files.hash
    assert hub.meta["source"] == str(tmp_path / "set")
    assert hub.meta["documents"] == 400
    assert {Path(row["source"]).name for row in table(hub, "train")} == {*names}


def test_a_hub_dataset_of_parquet_is_read_like_its_file(tmp_path):
    parquet(tmp_path / "set" / "p.parquet", texts(100))
    hub = run(tmp_path, "", dataset=str(tmp_path / "set"))
    file = run(tmp_path, tmp_path / "set" / "p.parquet", data_dir=str(tmp_path / "file"))
    assert hub.hash == file.hash


# --- runs that end otherwise --------------------------------------------------


def command(folder, source, *options, **popen):
    """prepare_pile.py as a process that writes folder/out."""
    places = [f"--source={source}", f"--data_dir={folder / 'out'}"]
    arguments = [sys.executable, SCRIPT, *places, "--block_size=64", "--val_fraction=0.3", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(arguments, text=True, **pipes, **popen)


def wait_for(condition, process=None):
    """Until condition() holds. Fails after 30 seconds, or where the process ends before."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.002)


def children(pid):
    pids = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        pids += map(int, (task / "children").read_text().split())
    return pids


def has_ended(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"  # nobody has waited for it


def unfinished_bytes(folder):
    """Bytes of the part that is being written; 0 where there is none."""
    total = 0
    for path in folder.glob("out.parts/*.partial/*.arrow"):
        with contextlib.suppress(FileNotFoundError):  # it is whole meanwhile
            total += path.stat().st_size
    return total


def listen_to_ctrl_c():
    """A shell starts `pytest &` with Ctrl-C ignored, which processes inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A source that takes some seconds, and the digest of an undisturbed run."""
    folder = tmp_path_factory.mktemp("slow")
    source = big(folder / "big.jsonl", 360)
    return source, digest(run(folder, source, tokenizer="gpt2", workers=1).path)


@dataclass
class Started:
    """A process that has written some of its first part."""

    process: subprocess.Popen
    workers: list  # their pids

    def end(self, code):
        """It ends with this exit code, and its workers too. Returns what it wrote on stderr."""
        _, errors = self.process.communicate(timeout=30)
        assert self.process.returncode == code, errors
        wait_for(lambda: all(map(has_ended, self.workers)))
        return errors


@pytest.fixture
def started(tmp_path, slow):
    source, _ = slow
    options = {"start_new_session": True, "preexec_fn": listen_to_ctrl_c}
    process = command(tmp_path, source, "--workers=1", **options)
    wait_for(lambda: unfinished_bytes(tmp_path) > 1000, process)
    pids = children(process.pid)
    assert len(pids) == 1
    with process:
        yield Started(process, pids)
        process.kill()


def test_a_second_run_is_refused_while_the_first_one_writes(tmp_path, slow, started):
    source, _ = slow
    with pytest.raises(UserError, match=r"another process is writing"):
        run(tmp_path, source)


def test_a_killed_run_leaves_its_parts_and_the_next_one_goes_on(tmp_path, slow, started):
    source, undisturbed = slow
    started.process.kill()
    assert started.end(-signal.SIGKILL) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["out.parts"]
    assert [path.name for path in (tmp_path / "out.parts").iterdir()] == ["1-of-1.partial"]
    process = command(tmp_path, source, "--workers=2")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "next: python train.py" in output
    assert digest(tmp_path / "out") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_terminated_run_leaves_nothing(tmp_path, started):
    started.process.terminate()
    assert started.end(143) == ""
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(tmp_path, started):
    os.killpg(started.process.pid, signal.SIGINT)  # as a terminal does
    assert started.end(130) == ""
    assert not list(tmp_path.iterdir())


def test_a_killed_worker_ends_the_run_with_one_line(tmp_path, started):
    os.kill(started.workers[0], signal.SIGKILL)
    errors = started.end(2)
    assert errors.startswith("error: a worker process was killed")
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def answer_with_much():
    """Called in a worker: its answers are longer than any pipe holds."""
    return lambda job: bytes(64 << 20)


def test_a_worker_killed_while_it_answers_is_noticed():
    pool = workers.start(1, answer_with_much)
    ((pipe, worker),) = pool.items()

    def jobs():
        yield "first"
        assert pipe.poll(30)  # the answer has begun, and nobody reads it
        worker.kill()
        worker.join()
        yield "second"

    with pytest.raises(BrokenPipeError, match="a worker process ended"):
        list(workers.ordered(pool, jobs()))
    workers.stop(pool)


def test_a_finished_folder_is_kept_until_overwrite(tmp_path, capsys):
    source = write(tmp_path / "d.jsonl", lines(texts()))
    old = run(tmp_path, source)
    names = (*ARRAYS, *TABLES, "meta.json")
    before = digest(old.path, names)
    capsys.readouterr()
    run(tmp_path, source, workers=2)
    assert "already prepared" in capsys.readouterr().out
    answer = r"prepared with --block_size=64 --val_fraction=0.3: add --overwrite"
    with pytest.raises(UserError, match=answer):
        run(tmp_path, source, block_size=32, val_fraction=0.4)
    with pytest.raises(UserError, match="no document of 'z'"):
        run(tmp_path, source, domains="z", overwrite=True)
    assert digest(old.path, names) == before
    new = run(tmp_path, source, block_size=32, overwrite=True)
    assert new.meta["block_size"] == 32
    assert new.hash != old.hash
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "out"]


def test_a_damaged_folder_is_not_called_prepared(tmp_path):
    source = write(tmp_path / "d.jsonl", lines(texts()))
    before = run(tmp_path, source)
    with open(before.path / "train.npy", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="damaged"):
        run(tmp_path, source)
    assert run(tmp_path, source, overwrite=True).hash == before.hash


MERGE_HELP = (
    "1 of 1 parts are missing, unfinished or of other files or options (d.jsonl): "
    "type: python prepare_pile.py"
)
SHARD_HELP = "neither --merge nor --limit_tokens nor --source=python"


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
        ("d.jsonl", {"shard": "1/2", "merge": True}, SHARD_HELP),
        ("d.jsonl", {"shard": "1/2", "limit_tokens": 5}, SHARD_HELP),
        ("python", {"shard": "1/2"}, SHARD_HELP),
        ("d.jsonl", {"merge": True}, MERGE_HELP),
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


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))


def test_a_full_disk_ends_with_one_line_and_leaves_nothing(tmp_path):
    source = big(tmp_path / "big.jsonl")
    options = ["--tokenizer=byte", "--workers=1"]
    process = command(tmp_path, source, *options, preexec_fn=limit_file_size)
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


PREPARE_AND_LIST_MODULES = """
import sys
import prepare_pile
options = dict(tokenizer="byte", block_size=64, val_fraction=0.3, data_dir="out")
prepare_pile.prepare(prepare_pile.Config(source="d.jsonl", **options))
print([name for name in ("datasets", "torch", "tiktoken", "wandb") if name in sys.modules])
"""


def run_code(folder, code, *arguments):
    """Python code as a process in a folder."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
    )


def test_local_sources_import_neither_datasets_nor_torch(tmp_path):
    write(tmp_path / "d.jsonl", lines(texts()))
    output, errors = run_code(tmp_path, PREPARE_AND_LIST_MODULES).communicate()
    assert output.splitlines()[-1:] == ["[]"], errors


# --- shards, and going on -----------------------------------------------------

# a part for each file, however small, and a disk so slow that a process can be met while it writes
SMALL_PARTS = """
import os, time
import config
import prepare_pile
fsync = os.fsync
os.fsync = lambda file: (time.sleep(0.02), fsync(file))
prepare_pile.PART = 1
config.main(lambda: prepare_pile.prepare(config.load(prepare_pile.Config)))
"""


def small_parts(folder, *options):
    """prepare_pile.py as a process that makes a part of each file in folder/pile."""
    places = [f"--source={folder / 'pile'}", f"--data_dir={folder / 'out'}"]
    return run_code(folder, SMALL_PARTS, *places, *options)


def pile(folder, files, n=60, **options):
    """Writes a folder of files, each a text of its own. Returns the digest of what one undisturbed
    run makes of it, all in one part, and its dataset."""
    for i in range(files):
        # "a" is not met first everywhere
        documents = texts(n, seed=i, words=300, domains="abcd"[i % 2 :])
        write(folder / "pile" / f"{i:02}.jsonl", lines(documents))
    dataset = run(folder, folder / "pile", data_dir=str(folder / "one"), **options)
    return digest(dataset.path), dataset


def shard_options(folder):
    """The options of run(), for a Config."""
    return {
        "source": str(folder / "pile"),
        "tokenizer": "byte",
        "block_size": 64,
        "val_fraction": 0.3,
        "data_dir": str(folder / "out"),
    }


@pytest.mark.parametrize("n", [1, 3, 7])
def test_shards_and_a_merge_write_the_same_files_as_one_run(tmp_path, monkeypatch, capsys, n):
    undisturbed, one = pile(tmp_path, 5)
    monkeypatch.setattr("prepare_pile.PART", 1)
    for i in range(n, 0, -1):  # in any order
        prepare(Config(**shard_options(tmp_path), workers=1, shard=f"{i}/{n}"))
        done = {part for shard in range(i, n + 1) for part in range(shard, 6, n)}
        assert not (tmp_path / "out").exists()
        assert {int(path.name[:5]) for path in tmp_path.glob("out.parts/*")} == done
    assert done == {1, 2, 3, 4, 5}
    assert "--merge" in capsys.readouterr().out
    merged = run(tmp_path, tmp_path / "pile", merge=True, workers=2)
    assert digest(merged.path) == undisturbed
    assert merged.meta == one.meta
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "pile"]
    run(tmp_path, tmp_path / "pile")
    assert "already prepared" in capsys.readouterr().out


def merge_command(options):
    """Merges, which misses parts. Returns the arguments that the error says to type."""
    with pytest.raises(UserError, match="of 4 parts are missing") as error:
        prepare(Config(**options, merge=True))
    python, script, *arguments = str(error.value).partition("type: ")[2].split()
    assert python == "python"
    assert script == "prepare_pile.py"
    return arguments


def test_merge_names_the_shard_that_is_missing(tmp_path, monkeypatch):
    undisturbed, _ = pile(tmp_path, 4)
    monkeypatch.setattr("prepare_pile.PART", 1)
    options = shard_options(tmp_path)
    prepare(Config(**options, workers=1, shard="1/4"))
    prepare(Config(**{**options, "block_size": 32}, workers=1, shard="2/4"))
    unfinished = tmp_path / "out.parts" / "3-of-4.partial"
    write(unfinished / "00003-0123456789abcdef.arrow", b"ARROW1")
    prepare(Config(**options, workers=1, shard="4/4"))
    with pytest.raises(UserError, match="2 of 4 parts are missing") as error:
        prepare(Config(**options, merge=True))
    assert "01.jsonl, " in str(error.value)
    assert "02.jsonl)" in str(error.value)
    assert "00.jsonl" not in str(error.value)
    for shard in ("2/4", "3/4"):
        arguments = merge_command(options)
        assert arguments[-1] == f"--shard={shard}"
        prepare(config.load(Config, arguments))
    prepare(Config(**options, merge=True))
    assert digest(tmp_path / "out") == undisturbed


def test_merge_misses_all_parts_when_the_source_has_changed(tmp_path, monkeypatch):
    pile(tmp_path, 4)
    monkeypatch.setattr("prepare_pile.PART", 1)
    options = shard_options(tmp_path)
    prepare(Config(**options, workers=1, shard="1/1"))
    for path in sorted(tmp_path.glob("pile/*.jsonl")):
        write(path, lines(texts(9)))
    with pytest.raises(UserError, match=r"4 of 4 parts are missing.*--shard=1/4"):
        prepare(Config(**options, merge=True))


def finished_parts(folder):
    """{name of a part: (inode, time of change)}: a part written again has others."""
    parts = {}
    for path in folder.glob("out.parts/*.arrow"):
        status = path.stat()
        parts[path.name] = status.st_ino, status.st_mtime_ns
    return parts


SMALL = ["--block_size=64", "--val_fraction=0.3", "--workers=1"]


def test_a_shard_killed_at_any_moment_goes_on_after_its_last_part(tmp_path):
    undisturbed, _ = pile(tmp_path, 6, n=250, tokenizer="gpt2")
    finished = {}
    for n, size in enumerate([1, 1, 150_000, 1]):  # killed while it writes the part behind n others
        process = small_parts(tmp_path, "--shard=1/1", *SMALL)
        wait_for(lambda n=n: len(finished_parts(tmp_path)) >= n, process)
        wait_for(lambda size=size: unfinished_bytes(tmp_path) >= size, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        before = finished
        finished = finished_parts(tmp_path)
        assert len(finished) >= n
        assert before.items() <= finished.items()  # no part was written again
    process = small_parts(tmp_path, "--shard=1/1", *SMALL)
    process.communicate()
    assert finished.items() <= finished_parts(tmp_path).items()
    process = small_parts(tmp_path, "--merge", *SMALL)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "6 of 6 parts are there already" in output
    assert digest(tmp_path / "out") == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "pile"]


def test_a_killed_merge_keeps_all_parts(tmp_path):
    undisturbed, _ = pile(tmp_path, 6, n=250, tokenizer="gpt2")
    small_parts(tmp_path, "--shard=1/1", *SMALL).communicate()
    finished = finished_parts(tmp_path)
    assert len(finished) == 6
    process = small_parts(tmp_path, "--merge", *SMALL)
    wait_for(lambda: any(tmp_path.glob("out.parts/1-of-1.partial/train.npy")), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert finished_parts(tmp_path) == finished
    small_parts(tmp_path, "--merge", *SMALL).communicate()
    assert digest(tmp_path / "out") == undisturbed


def test_a_damaged_file_leaves_the_parts_before_it(tmp_path, monkeypatch, capsys):
    undisturbed, _ = pile(tmp_path, 3)
    monkeypatch.setattr("prepare_pile.PART", 1)
    good = (tmp_path / "pile" / "02.jsonl").read_bytes()
    (tmp_path / "pile" / "02.jsonl").rename(tmp_path / "pile" / "02.jsonl.gz")
    with pytest.raises(UserError, match=r"02.jsonl.gz is damaged or cut short"):
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
    meta = {"block_size": 7, "chunks": {"train": n + 2}, "domains": ["a"], "vocab_size": 256}
    split = Split(tmp_path, "train", meta)
    split.n = n
    split.add((n + 5, "a", "file", n + 6), np.arange(18, dtype="<u2"))
    split.close()
    (row,) = pq.read_table(tmp_path / "train_docs.parquet").to_pylist()
    assert row["first_chunk"] == n
    assert row["doc"] == n + 5
    assert row["record"] == n + 6
    assert row["n_tokens"] == 17
    with open(tmp_path / "train.npy", "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
        assert shape == (n + 2, 8)
        assert np.fromfile(file, "<u2").tolist() == list(range(16))


def test_too_many_domains_are_refused(tmp_path):
    records = [record(i, "a") for i in range((1 << 16) + 1)]
    source = write(tmp_path / "d.jsonl", json_lines(records))
    with pytest.raises(UserError, match=r"--domain_key=meta\.pile_set_name has 65537 values"):
        run(tmp_path, source, block_size=1, val_fraction=0)


def documented_commands():
    """The lines of the section on large data, each as words."""
    page = (SCRIPT.parent / "docs" / "data.md").read_text()
    section = page.partition("## Data at the Pile's size")[2].partition("\n## ")[0]
    code = section.partition("```sh\n")[2].partition("```")[0]
    return [line.partition("#")[0].split() for line in code.splitlines()]


def test_the_documented_commands_for_large_data_work(tmp_path):
    """Typed one after another in a folder that holds one named pile: first a run of its own, then
    the same in shards, and a check."""
    big(tmp_path / "pile" / "00.jsonl", 400, 8_000)
    write(tmp_path / "pile" / "01.jsonl", (tmp_path / "pile" / "00.jsonl").read_bytes())
    last_words = []
    outputs = []
    for python, script, *arguments in documented_commands():
        assert python == "python"
        assert script == "prepare_pile.py"
        words = [sys.executable, SCRIPT, *arguments]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        last_words.append(arguments[-1])
        outputs.append(done.stdout)
        if len(outputs) == 1:  # the shards start from nothing
            (tmp_path / "data" / "pile").rename(tmp_path / "alone")
    assert last_words == ["--source=pile", "--shard=1/2", "--shard=2/2", "--merge", "--verify"]
    assert "already prepared" not in "".join(outputs)
    assert "as it was written" in outputs[-1]
    assert digest(tmp_path / "data" / "pile") == digest(tmp_path / "alone")


def test_300_million_chunks_need_no_more_memory_than_a_few(tmp_path, monkeypatch):
    """bench/scale.py prints how much time and memory their order and their rows take."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent / "bench"))
    import scale

    n = 300_000_000
    before = sum(scale.memory())
    scale.sparse_set(tmp_path, n, 1024)
    assert (tmp_path / "train.npy").stat().st_size == 128 + n * 2050
    dataset = data.open_dataset(tmp_path)
    assert dataset.train.rows.shape == (n, 1025)
    for step in (0, 1000, 1_000_000, 5 * n // 1024):
        ids = data.global_batch(step, 512, n, 1337)
        assert len(np.unique(ids)) == 512
        assert ids.min() >= 0
        assert n // 2 < ids.max() < n
        X, _ = dataset.train.batch(ids, 1024)
        assert X.shape == (512, 1024)
    assert sum(scale.memory()) - before < 1 << 30


# --- the reader ---------------------------------------------------------------


def change_meta(folder, **entries):
    """Changes entries of a sealed meta.json."""
    meta = json.loads((folder / "meta.json").read_bytes())
    del meta["crc32"]
    write_json(folder / "meta.json", {**meta, **entries})


def cut_last_byte(folder):
    content = (folder / "train.npy").read_bytes()
    (folder / "train.npy").write_bytes(content[:-1])


def promise_one_chunk_more(folder):
    chunks = json.loads((folder / "meta.json").read_bytes())["chunks"]
    change_meta(folder, chunks={**chunks, "train": chunks["train"] + 1})


DAMAGES = {
    "cut short": (cut_last_byte, "train.npy is missing or damaged"),
    "empty": (
        lambda folder: (folder / "val_domain.npy").write_bytes(b""),
        "val_domain.npy is missing or damaged",
    ),
    "missing": (
        lambda folder: (folder / "train_domain.npy").unlink(),
        "train_domain.npy is missing or damaged",
    ),
    "one chunk more": (promise_one_chunk_more, "its shape is"),
    "another block_size": (lambda folder: change_meta(folder, block_size=63), "its shape is"),
    "another schema": (lambda folder: change_meta(folder, schema=0), "schema 0"),
    "no meta.json": (lambda folder: (folder / "meta.json").unlink(), "no prepared data"),
}


@pytest.mark.parametrize("damage, answer", DAMAGES.values(), ids=DAMAGES)
def test_the_reader_refuses_a_damaged_data_set(tmp_path, damage, answer):
    dataset = run(tmp_path, write(tmp_path / "d.jsonl", lines(texts())))
    damage(dataset.path)
    with pytest.raises(UserError, match=answer):
        data.open_dataset(dataset.path)


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ARRAYS)
def test_the_reader_finds_a_flipped_bit_and_says_what_to_type(tmp_path, name):
    dataset = run(tmp_path, write(tmp_path / "d.jsonl", lines(texts())))
    flip_bit(dataset.path / name)
    answer = rf"{name} is damaged.*type: python prepare_pile.py .*--overwrite"
    with pytest.raises(UserError, match=answer):
        data.open_dataset(dataset.path)


def test_verify_finds_a_flipped_bit_in_arrays_too_large_to_read_when_opened(tmp_path, monkeypatch):
    dataset = run(tmp_path, write(tmp_path / "d.jsonl", lines(texts())))
    dataset.verify()
    flip_bit(dataset.path / "train.npy")
    monkeypatch.setattr(data, "CHECKED", 0)
    opened = data.open_dataset(dataset.path)
    with pytest.raises(UserError, match=r"train.npy is damaged"):
        opened.verify()


def test_prepare_pile_verify_ends_with_one_line_about_a_flipped_bit(tmp_path):
    dataset = run(tmp_path, write(tmp_path / "d.jsonl", lines(texts())))
    flip_bit(dataset.path / "train.npy")
    arguments = [sys.executable, SCRIPT, "--verify", f"--data_dir={dataset.path}"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "train.npy is damaged" in done.stderr


def test_the_scale_benchmark_ends_with_one_line_of_json(tmp_path):
    source = write(tmp_path / "d.jsonl", lines(texts(300, words=400)))
    options = ["--tokenizer=byte", "--rounds=1", "--chunks=5000", "--steps=0,7"]
    places = [f"--source={source}", f"--folder={tmp_path}"]
    command = [sys.executable, SCRIPT.parent / "bench" / "scale.py", *places, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    stages = [row["stage"] for row in rows[5:]]
    assert stages == ["read", "parse", "tokenize", "write", "pack"]
    assert len(rows) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]
