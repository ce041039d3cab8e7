"""values.py for real: a small run on documents that are known, read by every command and held
against plain loops over its ledger."""

import csv
import hashlib
import io
import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sealed import as_of_step, change, replace_array
from torch.nn import functional as F

import config
import data
import prepare_pile
import revalue
import train
import values
from model import GPT
from show import findings
from system import store, terminal
from system.files import read_lines, write_lines

ROOT = Path(config.__file__).parent
SCHEMA = json.loads((ROOT / "show" / "values.schema.json").read_text())
# sets a title, colours, clears, overwrites, turns the text round
EVIL = "\x1b]0;owned\x07\x1b[31mred\x9b2J\r\u202eback\x7f"
DOMAINS = ("prose", "code", "漢字", "bad\x1b[31mname")
SMALL = [
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=16",
    "--batch_size=4",
    "--warmup_iters=5",
    "--learning_rate=5e-3",
    "--eval_interval=0",
    "--device=cpu",
    "--dtype=float32",
]


def texts():
    """[(domain, text)]: short and long ones, of ASCII, of two cells a character, and with what a
    terminal would obey."""
    rng = random.Random(0)
    pairs = []
    for i in range(120):
        domain = rng.choice(DOMAINS)
        words = ["to", "be", "or", EVIL if i % 9 == 0 else "not"]
        if domain == "漢字":
            words = ["漢字", "かな"]
        n = rng.randrange(1, 90 if i % 7 == 0 else 25)
        chosen = [rng.choice(words) for _ in range(n)]
        pairs.append((domain, f"{i} " + " ".join(chosen)))
    return pairs


def prepare(folder, data_dir, block_size=64):
    prepare_pile.prepare(
        prepare_pile.Config(
            source=str(folder / "texts.jsonl"),
            tokenizer="byte",
            block_size=block_size,
            val_fraction=0.2,
            workers=1,
            data_dir=str(data_dir),
        )
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("values")
    records = [{"text": text, "meta": {"pile_set_name": domain}} for domain, text in texts()]
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "texts.jsonl").write_text("".join(lines))
    prepare(folder, folder / "data")
    return folder


def trained(prepared, name, *more):
    argv = [*SMALL, f"--data_dir={prepared / 'data'}", f"--out_dir={prepared / name}"]
    train.train(config.load(train.Config, [*argv, "--max_iters=60", *more]))
    return prepared / name


@pytest.fixture(scope="module")
def folder(prepared):
    argv = ["--targets=val:prose,val:code", "--book_interval=7", "--audit_interval=20"]
    return trained(prepared, "run", *argv, "--checkpoint_interval=20")


@pytest.fixture(scope="module")
def other(prepared):
    argv = ["--targets=val:code,val", "--rule=sgd", "--seed=2", "--max_iters=15"]
    return trained(prepared, "other", *argv)


def by_loops(folder):
    """{chunk: [(step, loss, value (K,))]}, out of ledger.npy."""
    visits = {}
    for visit in np.load(folder / "ledger.npy"):
        entry = (int(visit["step"]), float(visit["loss"]), visit["value"].astype(float))
        visits.setdefault(int(visit["chunk"]), []).append(entry)
    return visits


def totals(visits):
    """by_loops() -> {chunk: its value (K,), float32}"""
    total = {}
    for chunk, entries in visits.items():
        total[chunk] = np.float32(sum(value for _, _, value in entries))
    return total


def documents_by_eot(prepared):
    """{chunk: [doc]}: the domain's stream of tokens, cut at every <eot>, against the documents in
    their order."""
    dataset = data.open_dataset(prepared / "data")
    table = document_table(prepared)
    documents = {}
    for d, domain in enumerate(dataset.domains):
        docs = iter([row["doc"] for row in table if row["domain"] == domain])
        doc = next(docs, None)
        for chunk in np.flatnonzero(dataset.train.domain == d).tolist():
            documents[chunk] = []
            for token in dataset.train.rows[chunk]:
                if doc not in documents[chunk]:
                    documents[chunk].append(doc)
                if token == dataset.meta["eot"]:
                    doc = next(docs, None)
    return documents


def document_table(prepared):
    return pq.read_table(prepared / "data" / "train_docs.parquet").to_pylist()


# --- the numbers ----------------------------------------------------------------


def shares_by_loops(folder, k):
    """{chunk: the mean over its visits of its value over the mean size of its step's values}"""
    ledger = np.load(folder / "ledger.npy")
    shares = {}
    for step in np.unique(ledger["step"]):
        visits = ledger[ledger["step"] == step]
        size = np.abs(visits["value"][:, k].astype(float)).mean()
        for visit in visits:
            shares.setdefault(int(visit["chunk"]), []).append(visit["value"][k] / size)
    return {chunk: np.mean(of_chunk) for chunk, of_chunk in shares.items()}


@pytest.mark.parametrize("order", ["top", "bottom"])
def test_top_and_bottom_by_value_rank_chunks_by_the_sums_of_the_ledger(folder, order):
    run = values.open_run(folder)
    total = totals(by_loops(folder))
    sign = -1 if order == "top" else 1
    assert len(run.names) == 2
    for k, target in enumerate(run.names):
        expected = sorted(total, key=lambda chunk: (sign * total[chunk][k], chunk))
        result = getattr(values, order)(run, n=9, target=target, score="value")
        assert result["order"] == order
        assert [row["chunk"] for row in result["chunks"]] == expected[:9]
        for row in result["chunks"]:
            assert row["value"] == total[row["chunk"]][k]


@pytest.mark.parametrize("order", ["top", "bottom"])
def test_top_and_bottom_rank_chunks_by_their_shares_of_their_steps(folder, order):
    run = values.open_run(folder)
    sign = -1 if order == "top" else 1
    for k, target in enumerate(run.names):
        shares = shares_by_loops(folder, k)
        expected = sorted(shares, key=lambda chunk: sign * shares[chunk])
        result = getattr(values, order)(run, n=9, target=target)
        assert result["score"] == "share"
        assert [row["chunk"] for row in result["chunks"]] == expected[:9]
        for row in result["chunks"]:
            assert row["share"] == pytest.approx(shares[row["chunk"]])


def documents_by_loops(folder, k, score):
    """{doc: [what each visit of its chunks brought it]}, by values.doc's parts of chunks."""
    run = values.open_run(folder)
    ledger = np.load(folder / "ledger.npy")
    brought = {}
    for row in document_table(folder.parent):
        for entry in values.doc(run, row["doc"])["chunks"]:
            for visit in ledger[ledger["chunk"] == entry["chunk"]]:
                gain = float(visit["value"][k])
                if score == "share":
                    step = ledger[ledger["step"] == visit["step"]]
                    gain /= np.abs(step["value"][:, k].astype(float)).mean()
                brought.setdefault(row["doc"], []).append(gain * entry["share"])
    return brought


@pytest.mark.parametrize("bottom", [False, True], ids=["best", "worst"])
@pytest.mark.parametrize("score", ["share", "value"])
def test_docs_ranks_documents_by_what_the_visits_of_their_chunks_brought(folder, score, bottom):
    run = values.open_run(folder)
    brought = documents_by_loops(folder, 1, score)
    merge = np.sum if score == "value" else np.mean
    scores = {doc: merge(gains) for doc, gains in brought.items()}
    expected = sorted(scores.values(), reverse=not bottom)
    result = values.docs(run, n=12, target="code", score=score, bottom=bottom)
    assert [row["score"] for row in result["documents"]] == pytest.approx(expected[:12])
    some_error = False
    for row in result["documents"]:
        gains = brought[row["doc"]]
        assert row["score"] == pytest.approx(scores[row["doc"]])
        assert row["visits"] == len(gains)
        if len(gains) > 1:
            error = np.std(gains, ddof=1) / len(gains) ** 0.5
            error *= len(gains) if score == "value" else 1
            assert row["error"] == pytest.approx(error, rel=1e-4)
            some_error = True
        else:
            assert np.isnan(row["error"])
    assert some_error


def test_docs_says_of_each_document_what_doc_says(folder):
    run = values.open_run(folder)
    rows = values.docs(run, n=10**6, chars=12)["documents"]
    assert len(rows) > 50
    for row in rows:
        document = values.doc(run, row["doc"])
        for key in ("domain", "source", "record", "chunks_used"):
            assert row[key] == document[key]
        assert row["chunks"] == len(document["chunks"])
        assert row["value"] == pytest.approx(document["value"]["prose"])
        assert row["text"].rstrip("\u2026") == document["text"][:12]


def test_docs_of_a_domain_has_all_its_documents_and_no_other(folder):
    run = values.open_run(folder)
    rows = values.docs(run, n=10**6)["documents"]
    inside = values.docs(run, n=10**6, domain="code")["documents"]
    expected = [row["doc"] for row in rows if row["domain"] == "code"]
    assert [row["doc"] for row in inside] == expected
    assert 0 < len(inside) < len(rows)


def test_documents_count_only_the_tokens_that_were_trained_on(folder, prepared):
    """A run on the first half of every chunk: what lies in the second half has no visit."""
    half = trained(prepared, "half", "--block_size=32", "--max_iters=30", "--targets=val:code")
    run = values.open_run(half)
    rows = values.docs(run, n=10**6, score="value")["documents"]
    assert rows
    for row in rows:
        document = values.doc(run, row["doc"])
        assert sum(entry["tokens"] for entry in document["chunks"]) > 0
        assert row["score"] == pytest.approx(document["value"]["code"], rel=1e-4, abs=1e-12)


def test_top_says_of_each_chunk_what_the_ledger_says(prepared, folder):
    run = values.open_run(folder)
    visits = by_loops(folder)
    documents = documents_by_eot(prepared)
    rows = values.top(run, n=10**6)["chunks"]
    assert len(rows) == len(visits)
    assert max(row["visits"] for row in rows) > 1
    for row in rows:
        entries = visits[row["chunk"]]
        losses = [loss for _, loss, _ in entries]
        assert row["visits"] == len(entries)
        assert row["first_step"] == min(step for step, _, _ in entries)
        assert row["loss"] == pytest.approx(np.mean(losses))
        assert [doc["doc"] for doc in row["documents"]] == documents[row["chunk"]]


def test_top_of_a_domain_has_all_its_chunks_and_no_other(folder):
    run = values.open_run(folder)
    rows = values.top(run, n=10**6)["chunks"]
    inside = values.top(run, n=10**6, domain="code")["chunks"]
    assert [row["chunk"] for row in inside] == [
        row["chunk"] for row in rows if row["domain"] == "code"
    ]
    assert 0 < len(inside) < len(rows)


def test_chunk_shows_every_visit_and_the_text(folder):
    run = values.open_run(folder)
    visits = by_loops(folder)
    for chunk in list(visits)[:10]:
        result = values.chunk(run, chunk)
        assert result["used"]
        assert len(result["visits"]) == len(visits[chunk])
        for shown, (step, loss, value) in zip(result["visits"], visits[chunk]):
            assert shown["step"] == step
            assert shown["loss"] == loss
            assert list(shown["value"].values()) == list(value)
        total = sum(value for _, _, value in visits[chunk])
        assert list(result["value"].values()) == pytest.approx(list(total), rel=1e-6)
        pieces = "".join(run.pieces(chunk))
        separator = "\n<|endoftext|>\n"
        assert result["text"].replace(separator, "") == pieces.replace(separator, "")


def test_summary_counts_the_visits_of_the_ledger(folder):
    run = values.open_run(folder)
    result = values.summary(run)
    assert result["steps"] == 60
    assert result["max_iters"] == 60
    assert result["finished"]
    assert result["visits"] == 240
    assert result["chunks_used"] == len(by_loops(folder))
    assert result["early_steps"] == 3
    assert result["chunks"] == len(run.data.train.rows)


def check_figures(figures, v, shares):
    """v: the values of the chunks that the figures are of. shares: of the steps' values."""
    p25, median, p75 = np.percentile(v, (25, 50, 75))
    assert figures["chunks"] == len(v)
    assert figures["median"] == pytest.approx(median)
    assert figures["error"] == pytest.approx(0.929 * (p75 - p25) / len(v) ** 0.5)
    assert figures["negative"] == (v < 0).mean()
    assert figures["mean"] == pytest.approx(v.mean())
    assert figures["sum"] == pytest.approx(v.sum())
    assert figures["share"] == pytest.approx(np.mean(shares))
    assert figures["largest_share"] == pytest.approx(abs(v).max() / abs(v).sum())


def steps_shares(folder, k, inside):
    """Of every step, the sum of the values of the chunks inside over the size of all."""
    ledger = np.load(folder / "ledger.npy")
    shares = []
    for step in np.unique(ledger["step"]):
        visits = ledger[ledger["step"] == step]
        v = visits["value"][:, k].astype(float)
        shares.append(v[np.isin(visits["chunk"], inside)].sum() / abs(v).sum())
    return shares


def test_summary_has_the_figures_of_all_values(folder):
    total = totals(by_loops(folder))
    targets = values.summary(values.open_run(folder))["targets"]
    assert len(targets) == 2
    for k, target in enumerate(targets):
        v = np.array([value[k] for value in total.values()], float)
        check_figures(target, v, steps_shares(folder, k, list(total)))
        assert abs(total[target["largest_chunk"]][k]) == abs(v).max()


def test_summary_closes_the_books_and_repeats_the_audit(folder):
    run = values.open_run(folder)
    measured = np.load(folder / "books.npy")[::7]
    assert len(run.audit) == 3
    for k, target in enumerate(values.summary(run)["targets"]):
        books = target["books"]
        drop = (measured["before"] - measured["after"])[:, k].sum(dtype=float)
        explained = books["data"] + books["momentum"] + books["decay"]
        assert books["measured_steps"] == len(measured) == 9
        assert books["drop"] == pytest.approx(drop)
        assert books["accounted"] == pytest.approx(explained / drop, abs=1e-4)
        assert target["audit"]["steps"] == 3
        assert target["audit"]["pearson_lowest"] == run.audit["pearson"][:, k].min()


def test_domains_have_the_figures_of_their_chunks(folder):
    run = values.open_run(folder)
    total = totals(by_loops(folder))
    rows = values.domains(run)["domains"]
    assert len(rows) == len(run.names) * len(DOMAINS)
    for row in rows:
        k = run.names.index(row["target"])
        inside = [chunk for chunk in total if run.domain_of(chunk) == row["domain"]]
        v = np.array([total[chunk][k] for chunk in inside], float)
        check_figures(row, v, steps_shares(folder, k, inside))
        assert row["tokens"] == 64 * len(v)
        assert abs(total[row["largest_chunk"]][k]) == abs(v).max()


def test_domains_begin_with_the_largest_median(folder):
    result = values.domains(values.open_run(folder))
    assert len(result["targets"]) == 2
    for target in result["targets"]:
        rows = [row for row in result["domains"] if row["target"] == target["target"]]
        medians = [row["median"] for row in rows if row["chunks"] >= 5]
        assert len(medians) > 1
        assert medians == sorted(medians, reverse=True)
        first = terminal.visible(rows[0]["domain"])
        assert target["finding"].startswith(f"for {target['target']}: {first} ")


def test_doc_has_the_text_of_its_record_and_the_chunks_that_it_lies_in(prepared, folder):
    run = values.open_run(folder)
    by_chunk = documents_by_eot(prepared)
    source = texts()
    whole = 0
    for row in document_table(prepared):
        result = values.doc(run, row["doc"])
        expected = [chunk for chunk, docs in by_chunk.items() if row["doc"] in docs]
        assert [entry["chunk"] for entry in result["chunks"]] == expected
        domain, text = source[result["record"]]
        assert result["domain"] == domain
        assert text.startswith(result["text"])
        if result["whole"]:
            assert result["text"] == text
            whole += 1
    assert whole > 40


def test_values_of_documents_are_their_shares_of_the_values_of_their_chunks(prepared, folder):
    run = values.open_run(folder)
    shares = dict.fromkeys(documents_by_eot(prepared), 0.0)
    total = 0.0
    for row in document_table(prepared):
        result = values.doc(run, row["doc"])
        for entry in result["chunks"]:
            shares[entry["chunk"]] += entry["share"]
        used = [e for e in result["chunks"] if not np.isnan(e["value"]["code"])]
        assert result["chunks_used"] == len(used)
        if used:
            value = sum(entry["share"] * entry["value"]["code"] for entry in used)
            assert result["value"]["code"] == pytest.approx(value)
            total += value
        else:
            assert np.isnan(result["value"]["code"])
    assert list(shares.values()) == pytest.approx([1.0] * len(shares))
    assert total == pytest.approx(np.nansum(run.values[:, 1], dtype=float))


def test_documents_of_a_chunk_begin_where_their_texts_begin(prepared, folder):
    run = values.open_run(folder)
    source = texts()
    documents = values.Documents(run)
    for chunk, docs in documents_by_eot(prepared).items():
        listed = documents.of_chunk(chunk)
        assert [doc["doc"] for doc in listed] == docs
        content = bytes(run.data.train.rows[chunk].astype(np.uint8))
        for doc in listed:
            if doc["begins"] >= 0:
                text = source[doc["record"]][1].encode()
                begin = content[doc["begins"] :]
                assert begin.startswith(text[: len(begin)])


@pytest.fixture(scope="module")
def data_in_many_groups(prepared, tmp_path_factory):
    """The data, with a row group of documents for each chunk, as prepare_pile.py never parts it."""
    copy = shutil.copytree(prepared / "data", tmp_path_factory.mktemp("groups") / "data")
    path = copy / "train_docs.parquet"
    docs = pq.read_table(path)
    first = docs["first_chunk"].to_numpy()
    with pq.ParquetWriter(path, docs.schema) as file:
        for chunk in np.unique(first):
            file.write_table(docs.filter(pa.array(first == chunk)))
    assert pq.ParquetFile(path).num_row_groups > 8
    digests = json.loads((copy / "meta.json").read_text())["sha256"]
    digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    change(copy / "meta.json", sha256=digests)
    return copy


@pytest.mark.parametrize("groups", ["one", "many"])
def test_export_has_a_row_for_every_chunk_used(
    prepared, folder, data_in_many_groups, typed, tmp_path, groups
):
    run = values.open_run(folder)
    visits = by_loops(folder)
    documents = documents_by_eot(prepared)
    data_dir = {"one": prepared / "data", "many": data_in_many_groups}[groups]
    typed("export", folder, tmp_path / "v.parquet", f"--data_dir={data_dir}")
    rows = pq.read_table(tmp_path / "v.parquet").to_pylist()
    assert [row["chunk"] for row in rows] == sorted(visits)
    for row in rows:
        entries = visits[row["chunk"]]
        assert row["domain"] == run.domain_of(row["chunk"])
        assert row["docs"] == documents[row["chunk"]]
        assert row["visits"] == len(entries)
        assert row["first_step"] == entries[0][0]
        assert row["loss"] == pytest.approx(np.mean([loss for _, loss, _ in entries]))
        assert [row["value:prose"], row["value:code"]] == run.values[row["chunk"]].tolist()


def test_export_says_what_its_values_are(folder, typed, tmp_path):
    run = values.open_run(folder)
    typed("export", folder, tmp_path / "v.parquet")
    schema = pq.read_schema(tmp_path / "v.parquet")
    assert schema.metadata[b"sign"] == run.info["sign"].encode()
    assert schema.metadata[b"unit"] == b"nats"
    assert schema.metadata[b"rule"] == b"adamw"
    assert schema.field("docs").type == pa.list_(pa.int64())


def test_documents_of_a_chunk_are_found_in_many_row_groups(prepared, folder, data_in_many_groups):
    documents = values.Documents(values.open_run(folder, data_in_many_groups))
    for chunk, docs in documents_by_eot(prepared).items():
        assert [doc["doc"] for doc in documents.of_chunk(chunk)] == docs


@pytest.fixture
def common(folder, other):
    """The values of "code" of two runs on the chunks that both used, and those chunks."""
    a = values.open_run(folder)
    b = values.open_run(other)
    chunks = sorted(set(by_loops(folder)) & set(by_loops(other)))
    return a.values[chunks, 1].astype(float), b.values[chunks, 0].astype(float), chunks


def test_compare_correlates_the_values_of_common_targets(folder, other, common):
    from scipy import stats

    x, y, chunks = common
    result = values.compare(values.open_run(folder), values.open_run(other))
    (target,) = result["targets"]
    assert result["chunks"] == len(chunks)
    assert target["target"] == "code"
    assert target["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert target["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert target["equal_signs"] == np.mean((x > 0) == (y > 0))


def test_compare_names_the_chunks_that_moved_most_in_rank(folder, other, common):
    from scipy import stats

    x, y, _ = common
    result = values.compare(values.open_run(folder), values.open_run(other), n=4)
    expected = sorted(abs(stats.rankdata(-x) - stats.rankdata(-y)), reverse=True)
    assert [abs(m["rank_a"] - m["rank_b"]) for m in result["moved"]] == expected[:4]


def test_compare_has_the_medians_and_means_of_each_domain(folder, other, common):
    x, y, chunks = common
    a = values.open_run(folder)
    rows = values.compare(a, values.open_run(other))["domains"]
    assert len(rows) == len(DOMAINS)
    for row in rows:
        inside = [i for i, chunk in enumerate(chunks) if a.domain_of(chunk) == row["domain"]]
        assert row["median_a"] == pytest.approx(np.median(x[inside]))
        assert row["median_b"] == pytest.approx(np.median(y[inside]))
        assert row["mean_a"] == pytest.approx(x[inside].mean())
        assert row["mean_b"] == pytest.approx(y[inside].mean())
        assert row["chunks"] == len(inside)


def test_compare_finds_a_run_equal_to_itself(folder):
    run = values.open_run(folder)
    for target in values.compare(run, run)["targets"]:
        assert target["spearman"] == pytest.approx(1)


# --- tokens and query: revalue.py computes, values.py shows -------------------------


def test_tokens_shows_what_revalue_computes(folder, typed, refused):
    run = values.open_run(folder)
    result = json.loads(typed("tokens", folder, "--chunk", "7", "--target=code", "--json"))
    jsonschema.validate(result, SCHEMA | {"$ref": "#/$defs/tokens"})
    step, computed = revalue.tokens(run, [7])
    assert [t["token"] for t in result["tokens"]] == run.pieces(7)
    assert len(result["tokens"]) == 65
    assert [t["value"] for t in result["tokens"]] == [*computed[0, :, 1], None]
    assert result["step"] == step == 60
    assert result["sum"] == pytest.approx(computed[0, :, 1].sum())
    assert "chunks 0 to" in refused("tokens", folder, "--chunk=123456")
    assert "--chunk" in refused("tokens", folder)


def test_query_shows_what_revalue_computes(folder, typed, tmp_path):
    run = values.open_run(folder)
    (tmp_path / "q.txt").write_text("to be or not to be")
    valued = values.open_run(revalue.query(run, "to be or not to be"))
    best = [row["chunk"] for row in values.top(valued, n=3)["chunks"]]
    for text in ("--text=to be or not to be", f"--file={tmp_path / 'q.txt'}"):
        result = json.loads(typed("query", folder, text, "--n=3", "--json"))
        jsonschema.validate(result, SCHEMA | {"$ref": "#/$defs/query"})
        assert [row["chunk"] for row in result["chunks"]] == best
        assert result["target"] == "query"
        assert "nearest checkpoint" in result["approximate"]


@pytest.mark.parametrize("argv", [(), ("--text=a", "--file=b"), ("--file=nowhere.txt",)])
def test_query_without_one_text_is_refused(folder, refused, argv):
    refused("query", folder, *argv)


def test_query_finds_a_domain_by_its_words(folder):
    """Text made of the words of one domain is helped most by that domain's chunks, by mean."""
    run = values.open_run(folder)
    valued = values.open_run(revalue.query(run, "漢字 かな " * 20))
    mean = {row["domain"]: row["mean"] for row in values.domains(valued)["domains"]}
    assert max(mean, key=mean.get) == "漢字", mean


@pytest.fixture
def evil_chunk(folder):
    """The number of a chunk used whose text a terminal would obey."""
    run = values.open_run(folder)
    return next(chunk for chunk in run.used.tolist() if "\x1b" in run.text(chunk))


def test_tokens_are_coloured_on_a_terminal(folder, evil_chunk, monkeypatch, typed):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = typed("tokens", folder, f"--chunk={evil_chunk}")
    assert "\\x1b" in coloured
    escapes = coloured.replace("\x1b[0m", "").split("\x1b")[1:]
    assert len(escapes) > 10
    for escape in escapes:
        assert escape.startswith("[48;2;")


def test_tokens_are_a_table_with_no_color_or_without_a_terminal(
    folder, evil_chunk, monkeypatch, typed
):
    printed = typed("tokens", folder, f"--chunk={evil_chunk}")
    (head,) = [line for line in printed.splitlines() if line.split()[:2] == ["position", "value"]]
    table = printed[printed.index(head) :].split("\n\n")[0]
    assert len(table.splitlines()) == 1 + 65
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in typed("tokens", folder, f"--chunk={evil_chunk}")


# --- losses ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(prepared):
    """Two runs that were evaluated, the second one without values, on other steps."""
    first = trained(prepared, "first", "--eval_interval=10", "--max_iters=20", "--targets=val:code")
    off = ["--rule=off", "--eval_interval=5", "--max_iters=15", "--seed=2"]
    return first, trained(prepared, "control", *off)


def evaluations(folder):
    """{step: {domain: loss}}, where None stands for all domains."""
    by_step = {}
    for line in (folder / "evaluations.jsonl").read_text().splitlines():
        row = json.loads(line)
        by_step[row["step"]] = {None: row["val"], **row["loss"]}
    return by_step


def test_losses_puts_the_evaluations_of_runs_side_by_side(evaluated):
    result = values.losses(*evaluated)
    first, control = map(evaluations, evaluated)
    assert sorted(first) == [0, 10, 20]
    assert sorted(control) == [0, 5, 10, 15]
    rows = result["losses"]
    assert [(row["step"], row["domain"]) for row in rows] == [
        (step, domain) for step in (0, 5, 10, 15, 20) for domain in first[0]
    ]
    for row in rows:
        for name, of_run in (("first", first), ("control", control)):
            expected = of_run.get(row["step"], {}).get(row["domain"], np.nan)
            assert row["loss"][name] == pytest.approx(expected, nan_ok=True)
        expected = row["loss"]["control"] - row["loss"]["first"]
        assert row["difference"] == pytest.approx({"control": expected}, nan_ok=True)


def test_losses_compares_at_the_last_step_that_all_runs_have(evaluated, typed):
    first, control = [evaluations(folder)[10] for folder in evaluated]
    assert values.losses(*evaluated)["last_common_step"] == 10
    said = typed("losses", *evaluated)
    difference = round(control[None] - first[None], 4)
    how = "lower" if difference < 0 else "higher"
    amount = f"control: its loss is {abs(difference):.4f} nats {how} than that of first"
    assert f"{amount} ({control[None]:.4f} against {first[None]:.4f} after step 10)" in said
    assert "Their seeds differ" in said
    assert "it may be chance" in said
    table = said.split("after step 10:\n")[1].split("\n\n")[0]
    for domain, loss in first.items():
        line = next(x for x in table.splitlines() if x.startswith(visible_start(domain)))
        cells = [f"{loss:.4f}", f"{control[domain]:.4f}", f"{control[domain] - loss:+.4f}"]
        assert line.split()[-3:] == cells


def visible_start(domain):
    """What the line of a domain begins with, in a table."""
    return "all " if domain is None else terminal.visible(domain) + " "


def test_losses_of_runs_of_one_name_are_told_apart_by_their_paths(evaluated, tmp_path):
    copy = shutil.copytree(evaluated[0], tmp_path / "first")
    result = values.losses(evaluated[0], copy)
    assert list(result["losses"][0]["loss"]) == [str(evaluated[0]), str(copy)]
    assert result["losses"][0]["difference"] == {str(copy): 0.0}


@pytest.fixture(scope="module")
def judged(prepared):
    """A run for a target of a file, and one without values beside it."""
    text = prepared / "mine.jsonl"
    text.write_text(json.dumps({"text": "the quick brown fox " * 60}) + "\n")
    targets = f"--targets=mine={text}"
    first = trained(prepared, "kept", "--eval_interval=10", "--max_iters=20", targets)
    off = ["--rule=off", "--eval_interval=10", "--max_iters=20", "--seed=2", targets]
    return first, trained(prepared, "beside", *off)


def loss_on(folder, target):
    """The mean token loss of a run's last model on a target, in nats, chunk by chunk."""
    model = GPT.from_checkpoint(torch.load(folder / "ckpt.pt", weights_only=True)).eval()
    losses = 0.0
    n_tokens = 0
    for i in range(len(target)):
        X, Y = map(torch.as_tensor, target.batch(np.array([i])))
        with torch.no_grad():
            logits = model(X, Y)[0][0]
        known = Y[0] >= 0
        losses += float(F.cross_entropy(logits[known], Y[0][known], reduction="sum"))
        n_tokens += int(known.sum())
    return losses / n_tokens


def test_losses_on_targets_of_files_are_compared_also_without_values(prepared, judged, typed):
    dataset = data.open_dataset(prepared / "data")
    options = json.loads((judged[0] / "config.json").read_text())["config"]
    (target,) = data.parse_targets(options["targets"], dataset, options["block_size"])
    result = values.losses(*judged)
    (row,) = [r for r in result["losses"] if r["step"] == 20 and r["target"] == "mine"]
    expected = {folder.name: loss_on(folder, target) for folder in judged}
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    said = typed("losses", *judged)
    how = "lower" if expected["beside"] < expected["kept"] else "higher"
    amount = f"{abs(row['difference']['beside']):.4f} nats {how}"
    assert f"beside: its loss on mine is {amount} than that of kept" in said
    assert "beside: its loss is" not in said


def test_losses_that_an_earlier_version_did_not_measure_are_none(judged, tmp_path):
    copy = shutil.copytree(judged[0], tmp_path / "resumed")
    rows = read_lines(copy / "evaluations.jsonl")
    del rows[0]["target"]
    write_lines(copy / "evaluations.jsonl", rows)
    of_target = [row for row in values.losses(copy)["losses"] if row["target"] == "mine"]
    assert [np.isnan(row["loss"]["resumed"]) for row in of_target] == [True, False, False]


def test_losses_on_other_targets_of_the_same_name_are_not_compared(prepared, judged):
    text = prepared / "other.txt"
    text.write_text("some other text " * 60)
    argv = ["--rule=off", "--eval_interval=10", "--max_iters=20", f"--targets=mine={text}"]
    result = values.losses(judged[0], trained(prepared, "otherwise", *argv))
    assert {row["target"] for row in result["losses"]} == {None}


def test_losses_of_one_run_are_shown_alone(evaluated, typed):
    said = typed("losses", evaluated[0])
    assert "difference" not in said
    assert f"first: loss {evaluations(evaluated[0])[20][None]:.4f} nats after step 20" in said


def test_losses_refuses_runs_that_cannot_be_compared(evaluated, folder, on_other_data, refused):
    again = f"python train.py {folder}/config.json --overwrite --eval_interval="
    assert again in refused("losses", evaluated[0], folder)
    other = on_other_data / "evaluations.jsonl"
    shutil.copy(evaluated[0] / "evaluations.jsonl", other)
    assert "were trained on different data" in refused("losses", evaluated[0], on_other_data)
    assert "named twice" in refused("losses", evaluated[0], evaluated[0])


def test_losses_refuses_runs_with_other_validation_chunks(evaluated, prepared, refused):
    few = ["--rule=off", "--eval_interval=5", "--max_iters=5", "--eval_chunks=2"]
    few = trained(prepared, "few", *few)
    assert "--eval_chunks=2" in refused("losses", evaluated[0], few)


def test_losses_refuses_runs_without_a_step_in_common(evaluated, tmp_path, refused):
    copy = shutil.copytree(evaluated[0], tmp_path / "shifted")
    rows = read_lines(copy / "evaluations.jsonl")
    write_lines(copy / "evaluations.jsonl", [row | {"step": row["step"] + 1} for row in rows])
    assert "train them with the same --eval_interval" in refused("losses", evaluated[0], copy)


@pytest.mark.parametrize("entries", [{"val": "low"}, {"loss": [1.0]}, {"loss": {}}, {"step": None}])
def test_losses_refuses_damaged_evaluations(evaluated, tmp_path, refused, entries):
    copy = shutil.copytree(evaluated[0], tmp_path / "damaged")
    *rows, last = read_lines(copy / "evaluations.jsonl")
    write_lines(copy / "evaluations.jsonl", [*rows, last | entries])
    assert "evaluations.jsonl is damaged" in refused("losses", copy)
    write_lines(copy / "evaluations.jsonl", [])
    assert "evaluations.jsonl is damaged" in refused("losses", copy)


# --- in words --------------------------------------------------------------------------


def test_text_ends_with_what_was_found_and_what_to_type_next(arguments, typed):
    """The last line is a command of this project, which works; the one before is the finding."""
    assert len(arguments) == 10
    for command, argv in arguments.items():
        if command == "export":  # its file is for other programs
            continue
        lines = typed(command, *argv).splitlines()
        assert lines[-1].startswith("next: python "), command
        script, *words = shlex.split(lines[-1].removeprefix("next: python "))
        before = [line for line in lines if not line.startswith("next: ")][-1]
        assert not before.startswith(("-", " ")), command
        if script == "values.py":
            assert typed(*words).strip(), command
        else:
            assert script in ("train.py", "report.py"), command


def test_next_quotes_what_a_shell_would_read(prepared, typed):
    evil = trained(prepared, "run $(touch pwned); x", "--max_iters=2", "--targets=val:code")
    line = typed("summary", evil).splitlines()[-1]
    assert shlex.split(line) == ["next:", "python", "values.py", "domains", str(evil)]


def test_tokens_shows_the_value_of_the_run_beside_that_of_the_checkpoint(folder, typed):
    ledger = np.load(folder / "ledger.npy")
    chunk = int(ledger["chunk"][0])
    visits = ledger[ledger["chunk"] == chunk]
    said = typed("tokens", folder, f"--chunk={chunk}")
    for visit in visits:
        value = findings.micro(visit["value"][0])
        assert re.search(rf"worth in step {visit['step']}, .* {re.escape(value)}\n", said)
    _, computed = revalue.tokens(values.open_run(folder), [chunk])
    total = findings.micro(computed[0, :, 0].sum())
    assert re.search(rf"sum of its tokens at step 60, .* {re.escape(total)}\n", said)
    assert "the weights do" in said


def test_tokens_of_a_chunk_never_used_says_so(short, typed):
    run = values.open_run(short)
    chunk = int(np.setdiff1d(np.arange(len(run.values)), run.used)[0])
    assert "No step has used this chunk" in typed("tokens", short, f"--chunk={chunk}")
    result = json.loads(typed("tokens", short, f"--chunk={chunk}", "--json"))
    jsonschema.validate(result, SCHEMA | {"$ref": "#/$defs/tokens"})
    assert result["value"] is None
    assert result["visits"] == []


def test_a_document_that_began_in_an_earlier_chunk_is_said_to(prepared, folder, typed):
    run = values.open_run(folder)
    documents = values.Documents(run)
    for chunk in range(len(run.values)):
        first = documents.of_chunk(chunk)[0]
        if first["begins"] < 0:
            break
    said = typed("chunk", folder, chunk)
    assert f"earlier, {-first['begins']} tokens before" in said
    shown = json.loads(typed("chunk", folder, chunk, "--json"))["documents"][0]
    assert shown["begins"] == first["begins"]


def test_a_documents_number_does_not_read_like_a_count(folder, typed):
    run = values.open_run(folder)
    row = values.top(run, n=1)["chunks"][0]
    more = len(row["documents"]) - 1
    assert more > 0
    said = typed("top", folder, "--n=1")
    assert f" {row['documents'][0]['doc']} (+{more} more) " in said
    assert "documents" not in said


@pytest.mark.parametrize("command", ["top", "bottom", "docs", "query"])
def test_help_lists_the_scores(typed, capsys, command):
    with pytest.raises(SystemExit):
        typed(command, "--help")
    assert "--score share|value" in capsys.readouterr().out


# --- where a run is ----------------------------------------------------------------------


def test_a_run_is_read_from_within_its_folder(folder, prepared, tmp_path, typed, monkeypatch):
    """Its data is named as seen from where it was trained, above the folder of the run."""
    shutil.copytree(prepared / "data", tmp_path / "data" / "mine")
    inside = shutil.copytree(folder, tmp_path / "out" / "run")
    cfg = json.loads((folder / "config.json").read_text())["config"]
    change(inside / "config.json", config=cfg | {"data_dir": "data/mine"})
    monkeypatch.chdir(inside)
    said = typed("domains", ".")
    assert said.splitlines()[:-1] == typed("domains", folder).splitlines()[:-1]
    assert "next: python values.py top . " in said


def test_a_folder_of_runs_names_them(folder, tmp_path, refused):
    shutil.copytree(folder, tmp_path / "one")
    assert f"name one of {tmp_path / 'one'}" in refused("summary", tmp_path)


# --- what is printed ---------------------------------------------------------------

READING = (
    "summary",
    "top",
    "bottom",
    "docs",
    "domains",
    "chunk",
    "doc",
    "losses",
    "compare",
    "export",
)
ROWS = {
    "summary": "targets",
    "top": "chunks",
    "bottom": "chunks",
    "docs": "documents",
    "domains": "domains",
    "chunk": "visits",
    "doc": "chunks",
    "losses": "losses",
    "compare": "moved",
}


@pytest.fixture
def arguments(folder, other, evaluated, tmp_path):
    """{command: its arguments}, of all that need no model."""
    run = values.open_run(folder)
    used = int(run.used[0])
    return {
        "summary": (folder,),
        "top": (folder, "--n=5"),
        "bottom": (folder, "--n", "5", "--domain=code", "--chars=9"),
        "docs": (folder, "--n=6", "--bottom", "--score=value"),
        "domains": (folder,),
        "losses": evaluated,
        "chunk": (folder, used),
        "doc": (folder, values.Documents(run).of_chunk(used)[0]["doc"]),
        "compare": (folder, other, "--n=2"),
        "export": (folder, tmp_path / "v.parquet"),
    }


@pytest.mark.parametrize("command", READING)
def test_json_fits_the_schema_and_nothing_more_does(arguments, typed, command):
    printed = typed(command, *arguments[command], "--json")
    result = json.loads(printed, parse_constant=pytest.fail)  # NaN, Infinity
    schema = SCHEMA | {"$ref": f"#/$defs/{command}"}
    jsonschema.Draft202012Validator(schema).validate(result)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(result | {"more": 1}, schema)


@pytest.mark.parametrize("command", READING)
def test_text_has_no_control_character(arguments, typed, command):
    text = typed(command, *arguments[command])
    assert text.strip()
    assert not set(text) & (set(map(chr, range(32))) - {"\n", "\t"})


@pytest.mark.parametrize("command", ROWS)
def test_csv_has_the_rows_of_the_json(arguments, typed, command):
    result = json.loads(typed(command, *arguments[command], "--json"))
    rows = list(csv.DictReader(io.StringIO(typed(command, *arguments[command], "--csv"))))
    expected_rows = result[ROWS[command]]
    assert len(rows) == len(expected_rows) > 0
    for row, expected in zip(rows, expected_rows):
        for key, x in expected.items():
            if isinstance(x, dict) and key in ("value", "loss", "difference"):
                for name, value in x.items():
                    assert row[f"{key}:{name}"] == ("" if value is None else repr(value))
            elif key == "documents":
                assert row[key].split() == [str(doc["doc"]) for doc in x]
            elif isinstance(x, int | float) and not isinstance(x, bool):
                assert float(row[key]) == x


def test_schema_names_every_command():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert len(values.COMMANDS) == 12
    for command in values.COMMANDS:
        assert command.__name__ in SCHEMA["$defs"]


def test_help_lists_every_command(typed, capsys):
    with pytest.raises(SystemExit):
        typed("--help")
    listed = capsys.readouterr().out
    for command in values.COMMANDS:
        assert f"    {command.__name__} " in listed


@pytest.mark.parametrize("command", [command.__name__ for command in values.COMMANDS])
def test_help_of_a_command_has_its_options_and_an_example(typed, capsys, command):
    with pytest.raises(SystemExit) as stop:
        typed(command, "--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert ("--data_dir" in out) == (command != "losses")  # it reads no data
    if command != "bottom":  # it is named in the example of top
        assert f"python values.py {command} " in out


@pytest.fixture(scope="module")
def short(prepared):
    """A run of two steps, which used few chunks."""
    return trained(prepared, "short", "--max_iters=2", "--targets=val:code")


def test_a_chunk_never_used_has_a_text_and_no_value(short, typed):
    run = values.open_run(short)
    chunk = int(np.setdiff1d(np.arange(len(run.values)), run.used)[0])
    out = typed("chunk", short, chunk)
    assert "never used" in out
    assert terminal.visible(run.text(chunk), "\n\t") in out
    result = json.loads(typed("chunk", short, chunk, "--json"))
    jsonschema.validate(result, SCHEMA | {"$ref": "#/$defs/chunk"})
    assert result["value"] == {"code": None}
    assert not result["used"]
    assert result["visits"] == []


def test_a_document_never_used_fits_the_schema(short, typed):
    run = values.open_run(short)
    chunk = int(np.setdiff1d(np.arange(len(run.values)), run.used)[0])
    documents = values.Documents(run).of_chunk(chunk)
    assert documents
    for doc in documents:
        result = json.loads(typed("doc", short, doc["doc"], "--json"))
        jsonschema.validate(result, SCHEMA | {"$ref": "#/$defs/doc"})


def test_summary_of_a_run_without_an_audit_has_none(short, typed):
    assert json.loads(typed("summary", short, "--json"))["targets"][0]["audit"] is None


# --- on a terminal --------------------------------------------------------------------


def test_preparing_and_training_print_no_escape_code(prepared, tmp_path, capsys):
    prepare(prepared, tmp_path / "data")
    trained(prepared, tmp_path / "run", "--max_iters=5", "--targets=val:bad\x1b[31mname")
    out = capsys.readouterr().out
    assert out.count("bad\\x1b[31mname") >= 3
    assert "\x1b" not in out


def on_terminal(*argv):
    """What a command prints on a pseudo-terminal, 110 cells wide."""
    ours, theirs = pty.openpty()
    command = [sys.executable, ROOT / "values.py", *map(str, argv)]
    size = {"COLUMNS": "110", "LINES": "24"}
    process = subprocess.Popen(command, stdout=theirs, env=os.environ | size)
    os.close(theirs)
    content = b""
    while True:
        try:
            content += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait() == 0
    return content.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("command", ["top", "chunk", "doc"])
def test_texts_reach_a_terminal_without_control_characters(folder, evil_chunk, command):
    documents = values.Documents(values.open_run(folder)).of_chunk(evil_chunk)
    argument = {"top": "--n=999", "chunk": evil_chunk, "doc": documents[-1]["doc"]}[command]
    text = on_terminal(command, folder, argument)
    obeyed = {*map(chr, [*range(9), *range(11, 32), *range(127, 160)]), "\u202e"}
    assert text.strip()
    assert not set(text) & obeyed


def test_a_table_keeps_its_columns_and_the_width_of_the_terminal(folder):
    text = on_terminal("top", folder, "--n=999")
    assert "\\x1b" in text
    assert "bad\\x1b[31mname" in text
    table = text.split("\n\n")[1]
    head, *rows = table.splitlines()
    assert any("漢字" in row for row in rows)
    begin_of_words = head.index("domain")
    for row in rows:
        cells = [1 + (ord(character) > 0x2E7F) for character in row]
        assert sum(cells) <= 110
        assert re.search(r"(\d| more\))$", row[:begin_of_words].rstrip())


def test_an_error_has_no_escape_code(folder, refused):
    assert "\x1b" not in refused("top", folder, "--domain=nowhere")


def test_documents_are_read_without_threads_of_arrow(folder):
    """They sometimes abort the process as it ends, after all is printed (apache/arrow#34314)."""
    code = """
import os, sys, values
run = values.open_run(sys.argv[1])
import pyarrow
before = len(os.listdir("/proc/self/task"))
documents = values.Documents(run)
(first, *_) = documents.of_chunk(int(run.used[0]))
assert documents.find(first["doc"])["source"]
assert len(list(documents.pieces()))
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = in_a_process(code, folder)
    assert done.stdout == "0\n", done.stderr


def in_a_process(code, *argv):
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# --- what goes wrong -------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, answer",
    [
        ((), "command"),
        (("tops", "RUN"), "invalid choice: 'tops'"),
        (("top",), "required: run"),
        (("top", "RUN", "--n=0"), "--n: 0 is not 1 or more"),
        (("compare", "RUN", "RUN", "--n=-3"), "--n: -3 is not 1 or more"),
        (("top", "RUN", "--n=x"), "'x'"),
        (("top", "RUN", "--tar=code"), "unrecognized arguments: --tar=code"),
        (("top", "RUN", "--target=nix"), "has 'prose', 'code'"),
        (("top", "RUN", "--domain=nix"), "'漢字'"),
        (("top", "RUN", "--json", "--csv"), "not allowed with"),
        (("export", "RUN", "v.parquet", "--csv"), "unrecognized"),
        (("chunk", "RUN", "999999"), "chunks 0 to "),
        (("chunk", "RUN", "-1"), "chunks 0 to "),
        (("chunk", "RUN", "x"), "invalid int value: 'x'"),
        (("doc", "RUN", 10**6), "document 1000000"),
        (("doc", "RUN", 10**30), "document 1"),
        (("export", "RUN", "nowhere/v.parquet"), "in a folder that exists"),
        (("export", "RUN", "values.npy"), "a .parquet file"),
        (("summary", "nowhere"), "does not exist"),
        (("summary", "."), ". is no run's folder (it has no config.json)"),
        (("losses", "."), ". is no run's folder (it has no config.json)"),
        (("losses", "RUN", "nowhere"), "nowhere does not exist: name a run's folder"),
        (("losses", "RUN", "--data_dir=."), "unrecognized arguments"),
        (("losses",), "required: run"),
        (("top", "RUN", "--score=sum"), "invalid choice: 'sum' (choose from"),
        (("docs", "RUN", "--domain=nix"), "'漢字'"),
        (("docs", "RUN", "--target=nix"), "has 'prose', 'code'"),
        (("summary", "RUN", "--data_dir=."), "no prepared data in"),
        (("summary", "RUN", "--data_dir=nowhere"), "name the folder it is in with --data_dir"),
    ],
)
def test_wrong_arguments_say_what_to_type(folder, refused, tmp_path, monkeypatch, argv, answer):
    monkeypatch.chdir(tmp_path)
    argv = [folder if word == "RUN" else word for word in argv]
    assert answer in refused(*argv)
    assert not list(tmp_path.iterdir())


def test_a_chunk_beyond_the_last_one_is_refused(folder, refused):
    n = len(values.open_run(folder).values)
    assert f"chunks 0 to {n - 1}" in refused("chunk", folder, n)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "run")


FILES = ("values.npy", "ledger.npy", "books.npy", "audit.npy", "values.json", "config.json")


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_refused(copied, refused, name):
    whole = (copied / name).read_bytes()
    for broken in (whole[: len(whole) // 2], b"", whole[:50]):
        (copied / name).write_bytes(broken)
        assert f"{copied / name} is " in refused("summary", copied)


@pytest.mark.parametrize("name", ["values.npy", "ledger.npy", "books.npy"])
def test_a_missing_file_is_refused(copied, refused, name):
    (copied / name).unlink()
    assert f"{copied / name} is missing" in refused("summary", copied)


@pytest.mark.parametrize("name", ["values.json", "config.json"])
def test_json_of_another_kind_is_refused(copied, refused, name):
    for content in ("[]", "{}", "null", "3"):
        (copied / name).write_text(content)
        assert "damaged" in refused("summary", copied)


def test_values_of_another_length_are_refused(copied, folder, refused):
    replace_array(copied, "values.npy", np.load(folder / "values.npy")[:-1])
    assert "values.npy is damaged, it has" in refused("top", copied)


def test_another_schema_is_refused(copied, refused):
    change(copied / "values.json", schema=99)
    assert "schema 99" in refused("top", copied)


def test_runs_without_values_are_refused(copied, prepared, refused):
    change(copied / "values.json", committed_step=0)
    assert "has no values yet" in refused("summary", copied)
    (copied / "values.json").unlink()
    assert "after 20 steps" in refused("summary", copied)
    off = trained(prepared, "off", "--rule=off", "--max_iters=1")
    assert "--rule=off" in refused("summary", off)


@pytest.fixture
def on_other_data(prepared, tmp_path):
    """A run on the same texts in shorter chunks; its data lies beside it."""
    prepare(prepared, tmp_path / "data", block_size=32)
    argv = [f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'run'}", "--max_iters=1"]
    train.train(config.load(train.Config, [*SMALL, *argv]))
    return tmp_path / "run"


def test_other_data_is_refused(folder, on_other_data, refused):
    data_dir = on_other_data.parent / "data"
    assert "its hash differs" in refused("summary", folder, f"--data_dir={data_dir}")
    assert "different data" in refused("compare", folder, on_other_data)


def test_compare_refuses_runs_without_a_common_target(folder, prepared, refused):
    third = trained(prepared, "third", "--targets=val", "--max_iters=1")
    assert "no target in common" in refused("compare", folder, third)


def test_a_table_of_documents_cut_short_is_refused(on_other_data, refused):
    path = on_other_data.parent / "data" / "train_docs.parquet"
    whole = path.read_bytes()
    for broken in (b"", whole[:-9]):
        path.write_bytes(broken)
        assert "train_docs.parquet is damaged" in refused("chunk", on_other_data, 0)


def test_a_moved_run_reads_the_same_from_moved_data(copied, folder, prepared, tmp_path, typed):
    shutil.copytree(prepared / "data", tmp_path / "data")
    cfg = json.loads((folder / "config.json").read_text())["config"]
    change(copied / "config.json", config=cfg | {"data_dir": "nowhere"})
    place = f"--data_dir={tmp_path / 'data'}"
    moved = typed("top", copied, place)
    assert moved.endswith(f" {place}\n")  # what to type next reads the same data
    unmoved = typed("top", folder).replace(str(folder), str(copied))
    assert moved == unmoved.removesuffix("\n") + f" {place}\n"


def test_a_commit_cut_off_after_values_npy_reads_as_the_one_before(copied, folder):
    """Ledger, books and values.npy are of step 60, values.json still speaks of step 40: so must the
    values."""
    as_of_step(copied, 40)
    run = values.open_run(copied)
    total = np.zeros(run.values.shape)
    for visit in np.load(folder / "ledger.npy")[: 40 * 4]:
        total[visit["chunk"]] += visit["value"]
    assert len(run.visits) == 160
    assert len(run.books) == 40
    assert len(run.audit) == 2
    assert (np.nan_to_num(run.values) == total.astype(np.float32)).all()
    assert set(run.used) == set(run.visits["chunk"])
    assert not values.summary(run)["finished"]


# --- processes -----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["summary", "top"])
def test_reading_values_needs_no_torch(folder, command):
    code = "import sys, values; values.main(); sys.exit('torch' in sys.modules)"
    done = in_a_process(code, command, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_closed_pipe_ends_it_quietly(folder):
    printing = (
        f"{sys.executable} {ROOT / 'values.py'} top {folder} --n=100000 --chars=100000 --json"
    )
    command = f"set -o pipefail; {printing} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "{\n"
    assert not done.stderr
    assert done.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_export_is_whole_or_not_there(folder, tmp_path, number):
    """Stopped with its file half-written, behind the first row group."""
    code = """
import runpy, time, pyarrow.parquet as pq
class Slow(pq.ParquetWriter):
    def write_table(self, *args):
        super().write_table(*args)
        print("half", flush=True)
        time.sleep(60)
pq.ParquetWriter = Slow
runpy.run_path("values.py", run_name="__main__")
"""
    path = tmp_path / "v.parquet"
    path.write_text("an older one")
    command = [sys.executable, "-c", code, "export", folder, path]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half\n"
    process.send_signal(number)
    process.wait(30)
    process.stdout.close()
    assert path.read_text() == "an older one"
    if number != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == [path]
    # what a kill left is no hindrance
    subprocess.run([sys.executable, ROOT / "values.py", "export", folder, path], check=True)
    assert pq.read_table(path).num_rows == len(by_loops(folder))
    assert list(tmp_path.iterdir()) == [path]


NOT_YET = ("no values yet", "does not exist", "is no run's folder")


def test_a_live_run_is_always_read_as_of_one_commit(prepared, typed):
    """It trains and commits every step while it is read, again and again."""
    out = prepared / "live"
    argv = [f"--data_dir={prepared / 'data'}", f"--out_dir={out}", "--max_iters=100000"]
    argv += ["--checkpoint_interval=1", "--targets=val:code,val:prose"]
    command = [sys.executable, ROOT / "train.py", *SMALL, *argv]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=alone)
    steps = [0]
    try:
        while len(set(steps)) <= 10:
            assert process.poll() is None
            try:
                run = values.open_run(out)
            except ValueError as e:
                assert any(reason in str(e) for reason in NOT_YET), e
                time.sleep(0.05)
                continue
            check_commit(run)
            assert run.info["committed_step"] >= steps[-1]
            steps.append(run.info["committed_step"])
        assert "not finished" in typed("summary", out)
    finally:
        process.terminate()
        process.wait()
    assert values.open_run(out).info["committed_step"] >= steps[-1]


def check_commit(run):
    """All of a run's arrays are of the step that values.json names."""
    total = np.zeros(run.values.shape)
    used = np.zeros(len(run.values), bool)
    store.add_visits(run.visits, total, used)
    assert (np.nan_to_num(run.values) == total.astype(np.float32)).all()
    assert (np.flatnonzero(used) == run.used).all()
    step = run.info["committed_step"]
    assert len(run.visits) == 4 * step
    assert len(run.books) == step
