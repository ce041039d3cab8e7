"""curate.py and train.py --keep for real: choices held against loops over the ledger, and runs on
what was kept."""

import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard

import config
import curate
import data
import prepare_pile
import revalue
import show.curated
import train
import values
from show import dropped as show_dropped
from show.run import open_run
from system import store
from system.files import write_json

ROOT = Path(config.__file__).parent
SMALL = [
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=16",
    "--batch_size=4",
    "--block_size=32",
    "--warmup_iters=5",
    "--learning_rate=5e-3",
    "--device=cpu",
    "--dtype=float32",
]
WORDS = {"prose": ("to", "be", "or"), "code": ("{}", "1+1", ";;")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run over two and a half passes of documents that are known, some longer than a chunk, some
    much shorter."""
    path = tmp_path_factory.mktemp("curate")
    rng = random.Random(0)
    records = []
    for i, domain in enumerate(rng.choices(list(WORDS), k=60)):
        words = rng.choices(WORDS[domain], k=rng.choice((2, 9, 60)))
        records.append({"text": f"{i} " + " ".join(words), "meta": {"pile_set_name": domain}})
    write_records(path / "texts.jsonl", records)
    prepare(path / "texts.jsonl", path / "data", val_fraction=0.2)
    n = len(data.open_dataset(path / "data").train.rows)
    steps = f"--max_iters={5 * n // 8}"
    run(path, "run", "--targets=val:code,val:prose", steps, "--eval_interval=0")
    return path


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def prepare(source, data_dir, tokenizer="byte", block_size=32, **options):
    prepare_pile.prepare(
        prepare_pile.Config(
            source=str(source),
            data_dir=str(data_dir),
            tokenizer=tokenizer,
            block_size=block_size,
            workers=1,
            **options,
        )
    )


def run(folder, name, *more):
    """Trains on a folder's data -> the run's folder."""
    argv = [*SMALL, f"--data_dir={folder / 'data'}", f"--out_dir={folder / name}", *more]
    train.train(config.load(train.Config, argv))
    return folder / name


def curated(folder, out, **options):
    """-> keep.npy, keep.json and dropped.npy."""
    curate.curate(curate.Config(run=str(folder / "run"), out=str(out), **options))
    about = json.loads((out / "keep.json").read_text())
    return np.load(out / "keep.npy"), about, np.load(out / "dropped.npy")


# the paper's choice: chunks of negative value
NEGATIVE = {"by": "chunk", "score": "value", "drop": "negative"}
BY_CHUNK = {"by": "chunk", "score": "value"}


def gains_by_loops(folder, k, score="value"):
    """{chunk: [what each visit brings]}, by a loop over ledger.npy."""
    gains = {}
    for step in np.load(folder / "run" / "ledger.npy").reshape(-1, 4):
        scale = np.mean([abs(float(visit["value"][k])) for visit in step])
        for visit in step:
            value = float(visit["value"][k])
            by_score = {"value": value, "share": value / scale, "loss": -float(visit["loss"])}
            gains.setdefault(int(visit["chunk"]), []).append(by_score[score])
    return gains


def values_of(folder, k):
    return np.load(folder / "run" / "values.npy")[:, k]


# --- the choice -------------------------------------------------------------------


def test_drop_negative_drops_the_chunks_of_negative_value(folder, tmp_path):
    keep, _, dropped = curated(folder, tmp_path, target="code", **NEGATIVE)
    values = values_of(folder, 0)
    np.testing.assert_array_equal(keep, np.flatnonzero(~(values < 0)))
    assert set(dropped["chunk"]) == set(np.flatnonzero(values < 0))
    assert 0 < len(dropped) < len(values)


def test_dropped_npy_has_the_smallest_score_first(folder, tmp_path):
    _, _, dropped = curated(folder, tmp_path, target="code", **NEGATIVE)
    values = values_of(folder, 0)
    assert (np.diff(dropped["score"]) >= 0).all()
    np.testing.assert_allclose(dropped["score"], values[dropped["chunk"]], rtol=1e-5)


def test_keep_json_counts_what_is_kept(folder, tmp_path):
    keep, about, dropped = curated(folder, tmp_path, target="code", **NEGATIVE)
    assert about["units_dropped"] == len(dropped)
    assert about["units_negative"] == len(dropped)
    assert about["units_dropped_negative"] == len(dropped)
    assert about["chunks_kept"] == len(keep)
    assert sum(d["kept"] for d in about["domains"]) == len(keep)
    assert about["tokens_kept"] == 32 * len(keep)
    assert about["config"]["target"] == "code"


@pytest.mark.parametrize("score", ["value", "share", "loss"])
def test_drop_fraction_drops_the_smallest_by_each_score(folder, tmp_path, score):
    keep, _, dropped = curated(folder, tmp_path, by="chunk", drop_fraction=0.25, score=score)
    total = np.sum if score == "value" else np.mean
    scores = {chunk: total(gains) for chunk, gains in gains_by_loops(folder, 0, score).items()}
    worst = sorted(scores, key=scores.get)[: round(0.25 * len(scores))]
    assert dropped["chunk"].tolist() == worst
    assert not set(worst) & set(keep.tolist())
    np.testing.assert_allclose(dropped["score"], [scores[chunk] for chunk in worst], rtol=1e-6)


def test_per_domain_drops_the_fraction_of_each_domain(folder, tmp_path):
    _, about, dropped = curated(folder, tmp_path, per_domain=True, **BY_CHUNK)
    domain = open_run(folder / "run").data.train.domain
    values = values_of(folder, 0)
    assert len(about["domains"]) == 2
    for d in about["domains"]:
        assert d["chunks"] - d["kept"] == round(0.25 * d["used"])
    for d in np.unique(domain):
        gone = dropped["chunk"][domain[dropped["chunk"]] == d]
        stayed = np.setdiff1d(np.flatnonzero(domain == d), gone)
        assert values[gone].max() <= values[stayed].min()


def test_controls_drop_as_many_as_are_negative(folder, tmp_path):
    n = len(curated(folder, tmp_path / "negative", **NEGATIVE)[2])
    largest = np.argsort(-values_of(folder, 0))[:n]
    inverted = curated(folder, tmp_path / "inverted", invert=True, **NEGATIVE)[2]["chunk"]
    assert set(inverted) == set(largest)
    for seed in (1, 2):
        assert len(dropped_at_random(folder, tmp_path / f"{seed}", seed)) == n


def test_random_drops_by_its_seed(folder, tmp_path):
    one = dropped_at_random(folder, tmp_path / "one", seed=1)
    again = dropped_at_random(folder, tmp_path / "again", seed=1)
    other = dropped_at_random(folder, tmp_path / "other", seed=2)
    assert one == again
    assert one != other


def dropped_at_random(folder, out, seed):
    return set(curated(folder, out, random=True, seed=seed, **NEGATIVE)[2]["chunk"])


def test_confidence_drops_only_what_is_negative_beyond_its_standard_error(folder, tmp_path):
    _, _, dropped = curated(folder, tmp_path, confidence=1.0, **NEGATIVE)
    expected = set()
    for chunk, gains in gains_by_loops(folder, 0).items():
        if len(gains) > 1 and sum(gains) + np.std(gains, ddof=1) * len(gains) ** 0.5 < 0:
            expected.add(chunk)
    assert set(dropped["chunk"].tolist()) == expected
    assert 0 < len(expected) < (values_of(folder, 0) < 0).sum()
    assert np.isfinite(dropped["standard_error"]).all()


def documents_of(folder):
    """{doc: {chunk: tokens}} by walking each domain's stream of tokens."""
    opened = data.open_dataset(folder / "data")
    documents = {}
    for row in pq.read_table(folder / "data" / "train_docs.parquet").to_pylist():
        stream = np.flatnonzero(opened.train.domain == opened.domains.index(row["domain"])).tolist()
        start = stream.index(row["first_chunk"]) * 33 + row["first_token"]
        end = min(start + row["n_tokens"] + 1, len(stream) * 33)
        tokens = documents.setdefault(row["doc"], {})
        for place in range(start, end):
            chunk = stream[place // 33]
            tokens[chunk] = tokens.get(chunk, 0) + 1
    return documents


@pytest.mark.parametrize("score", ["value", "share"])
def test_by_document_drops_whole_documents(folder, tmp_path, score):
    options = {"by": "document", "drop_fraction": 0.3, "score": score, "target": "code"}
    _, _, dropped = curated(folder, tmp_path, **options)
    gains = gains_by_loops(folder, 0, score)
    scores = {}
    for doc, chunks in documents_of(folder).items():
        brought = []
        for chunk, tokens in chunks.items():
            brought += [gain * tokens / 33 for gain in gains.get(chunk, [])]
        if brought:
            scores[doc] = sum(brought) if score == "value" else np.mean(brought)
    worst = sorted(scores, key=scores.get)[: round(0.3 * len(scores))]
    assert set(dropped["document"].tolist()) == set(worst)


def test_a_chunk_goes_with_the_documents_that_hold_most_of_it(folder, tmp_path):
    keep, about, dropped = curated(folder, tmp_path, drop_fraction=0.3, target="code")
    gone = set(dropped["document"].tolist())
    balance = np.zeros(about["chunks"])
    for doc, chunks in documents_of(folder).items():
        for chunk, tokens in chunks.items():
            balance[chunk] += -tokens if doc in gone else tokens
    assert keep.tolist() == np.flatnonzero(balance >= 0).tolist()
    assert len(keep) < about["chunks"]


def test_the_default_drops_a_quarter_of_the_documents_by_share(folder, tmp_path):
    _, about, dropped = curated(folder, tmp_path / "default")
    written_out = {"by": "document", "score": "share", "drop": "fraction", "drop_fraction": 0.25}
    same = curated(folder, tmp_path / "written_out", **written_out)[2]
    assert dropped.tolist() == same.tolist()
    assert len(dropped) == round(0.25 * about["units_scored"])
    assert (np.diff(dropped["score"]) >= 0).all()


def test_medians_of_a_domain_are_those_of_its_chunks(folder, tmp_path):
    keep, about, _ = curated(folder, tmp_path, target="prose", **NEGATIVE)
    opened = open_run(folder / "run")
    values = values_of(folder, 1)
    for d in about["domains"]:
        own = opened.data.train.domain == opened.domains.index(d["domain"])
        is_kept = own & np.isin(np.arange(len(own)), keep)
        assert d["median"] == pytest.approx(np.nanmedian(values[own]))
        assert d["median_kept"] == pytest.approx(np.nanmedian(values[is_kept]))
        assert d["used"] == np.isfinite(values[own]).sum()
        assert d["value_kept"] == pytest.approx(np.nansum(values[is_kept]), rel=1e-4)


# --- what is dropped, listed ----------------------------------------------------------


def listed(folder, tmp_path, **options):
    """-> the rows of --list, and dropped.npy."""
    path = tmp_path / "dropped.jsonl"
    _, _, dropped = curated(folder, tmp_path / "out", list=str(path), **options)
    return [json.loads(line) for line in path.read_text().splitlines()], dropped


def test_list_has_every_dropped_document_with_its_source(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(show_dropped, "BEGINNING", 40)
    rows, dropped = listed(folder, tmp_path, drop_fraction=0.5)
    table = {
        row["doc"]: row for row in pq.read_table(folder / "data/train_docs.parquet").to_pylist()
    }
    assert [row["document"] for row in rows] == dropped["document"].tolist()
    assert [row["score"] for row in rows] == dropped["score"].tolist()
    source = source_texts(folder)
    n_cut = 0
    for row, error in zip(rows, dropped["standard_error"]):
        known = table[row["document"]]
        place = {"source": row["source"], "record": row["record"], "domain": row["domain"]}
        assert place == {key: known[key] for key in place}
        assert row["standard_error"] == (None if np.isnan(error) else error)
        assert source[row["record"]].startswith(row["text"].removesuffix("\u2026"))
        n_cut += row["text"].endswith("\u2026")
    assert n_cut > 0


def test_list_by_chunk_names_the_document_that_holds_most_of_it(folder, tmp_path):
    rows, dropped = listed(folder, tmp_path, **NEGATIVE)
    holders = {}
    for doc, chunks in documents_of(folder).items():
        for chunk, tokens in chunks.items():
            holders.setdefault(chunk, {})[doc] = tokens
    table = {
        row["doc"]: row for row in pq.read_table(folder / "data/train_docs.parquet").to_pylist()
    }
    assert [row["chunk"] for row in rows] == dropped["chunk"].tolist()
    opened = open_run(folder / "run")
    for row in rows:
        tokens = holders[row["chunk"]]
        assert tokens[row["document"]] == max(tokens.values())
        assert row["record"] == table[row["document"]]["record"]
        assert row["text"] == opened.text(row["chunk"], 200)
    assert any(len(holders[row["chunk"]]) > 1 for row in rows)


def test_a_list_is_the_same_looked_up_few_at_a_time(folder, tmp_path, monkeypatch):
    whole, _ = listed(folder, tmp_path)
    monkeypatch.setattr(show_dropped, "AT_ONCE", 3)
    few, _ = listed(folder, tmp_path, overwrite=True)
    assert len(whole) > 6
    assert few == whole


# --- what it says ---------------------------------------------------------------------


def said(folder, tmp_path, **options):
    """The lines that curate.py prints."""
    cfg = curate.Config(run=str(folder / "run"), out=str(tmp_path), **options)
    return list(show.curated.lines(curate.curate(cfg)))


def test_what_is_dropped_first_is_named_with_its_source_and_text(folder, tmp_path):
    lines = said(folder, tmp_path, drop_fraction=0.3)
    dropped_first = np.load(tmp_path / "dropped.npy")["document"][:5]
    (head,) = [i for i, line in enumerate(lines) if line.startswith("document ")]
    source = source_texts(folder)
    for line, doc in zip(lines[head + 1 :], dropped_first):
        number, record, file, _, _, *words = line.split()
        assert int(number) == doc
        assert file.endswith("texts.jsonl")
        assert source[int(record)].startswith(words[0])


@pytest.mark.parametrize(
    "options, told",
    [
        ({}, "beat as many at random by .033 +- .011 nats"),
        ({}, "--score=loss) did as well or better. On clean text no gain was found"),
        (NEGATIVE, "was not found better than as many at random"),
        ({"score": "loss"}, "by .048 +- .014 nats"),
        ({"score": "value"}, "by .021 +- .003 nats"),
        ({"invert": True}, "cost .021 +- .010 nats"),
        ({"by": "chunk"}, "The choice best measured is another"),
        ({"drop_fraction": 0.5}, "The choice best measured is another"),
        ({"random": True}, "worth as much as what it keeps"),
    ],
)
def test_curate_says_what_is_known_of_the_choice(folder, tmp_path, options, told):
    text = " ".join(line.strip() for line in said(folder, tmp_path, **options))
    assert told in text


def test_what_is_known_is_what_the_results_say():
    results = (ROOT / "results/curation/README.md").read_text()
    every = [show.curated.NEGATIVE, show.curated.LARGEST, *show.curated.MEASURED.values()]
    figures = set(re.findall(r"\.\d+ \+- \.\d+", " ".join(every)))
    assert len(figures) == 4
    for figure in figures:
        assert figure.replace("+-", "\u00b1") in results, figure


def test_the_commands_it_prints_train_the_kept_and_its_control(tmp_path, folder, monkeypatch):
    """Typed as they stand: runs of equal length, on as many documents, that can be compared."""
    shutil.copytree(folder / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for options in ({"drop_fraction": 0.4}, NEGATIVE):
        cfg = curate.Config(run="run", out="kept", overwrite=True, **options)
        lines = list(show.curated.lines(curate.curate(cfg)))
        control, train_control, losses = [line for line in lines if line.startswith("  python")]
        curate.main(config.load(curate.Config, [*shlex.split(control)[2:], "--overwrite"]))
        for command in (train_control, lines[-1].removeprefix("next: ")):
            argv = [*shlex.split(command)[2:], "--max_iters=6", "--eval_interval=3", "--overwrite"]
            train.train(config.load(train.Config, argv))
        assert losses.split() == ["python", "values.py", "losses", "run_control", "run_kept"]
        evaluated = [(Path(run) / "evaluations.jsonl").read_text() for run in losses.split()[3:]]
        assert [text.count("\n") for text in evaluated] == [3, 3]
        assert len(np.load("kept/dropped.npy")) == len(np.load("run_random/dropped.npy"))
        assert set(np.load("run_control/chunks.npy")) == set(np.load("run_random/keep.npy"))
        assert not np.array_equal(np.load("run_random/keep.npy"), np.load("kept/keep.npy"))


def test_a_control_says_how_to_train_and_compare_it(folder, tmp_path):
    lines = said(folder, tmp_path, random=True)
    run_dir = folder / "run"
    assert lines[-2].endswith(f"python values.py losses {run_dir}_control {run_dir}_kept")
    assert lines[-1].startswith(f"next: python train.py {run_dir}/config.json --rule=off ")
    assert f"--keep={tmp_path}/keep.npy --out_dir={run_dir}_control" in lines[-1]


def test_it_says_what_becomes_of_chunks_that_were_never_used(folder, tmp_path):
    """A document's chunks go with it, whether or not the run used them."""
    short = run(folder, "little", "--max_iters=3", "--eval_interval=0")
    about = curate.curate(curate.Config(run=str(short), out=str(tmp_path), drop_fraction=0.5))
    keep = np.load(tmp_path / "keep.npy")
    values = np.load(short / "values.npy")[:, 0]
    unused_gone = set(np.flatnonzero(np.isnan(values))) - set(keep)
    assert unused_gone
    text = "\n".join(show.curated.lines(about))
    assert f"{len(unused_gone):,} of them go with their documents" in text
    assert "caution: the run used" in text


def test_it_says_where_short_documents_keep_chunks_from_going():
    counts = {"chunks": 100, "chunks_unused": 0, "chunks_used_dropped": 5}
    for by, told in (("document", True), ("chunk", False)):
        lines = list(show.curated.cautions({"config": {"by": by}, **counts}, part=0.25))
        assert any("only 5.0% of the chunks used go" in line for line in lines) == told


def test_no_documents_table_is_answered_with_by_chunk(folder, tmp_path, capsys):
    shutil.copytree(folder / "data", tmp_path / "data")
    os.remove(tmp_path / "data" / "train_docs.parquet")
    moved = [str(folder / "run"), f"--data_dir={tmp_path}/data", f"--out={tmp_path}/out"]

    def command(*more):
        curate.main(config.load(curate.Config, [*moved, *more]))

    assert "write --by=chunk" in refused(capsys, command)
    assert not (tmp_path / "out").exists()
    command("--by=chunk")
    assert "next: python train.py" in capsys.readouterr().out


# --- texts for other trainers -------------------------------------------------------


def source_texts(folder):
    lines = (folder / "texts.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize("name", ["kept.jsonl.zst", "kept.jsonl", "kept.parquet"])
def test_export_by_document_writes_the_kept_documents_whole(folder, tmp_path, name):
    options = {"by": "document", "drop_fraction": 0.3, "export": str(tmp_path / name)}
    _, _, dropped = curated(folder, tmp_path / "out", **options)
    gone = set(dropped["document"].tolist())
    table = pq.read_table(folder / "data" / "train_docs.parquet").to_pylist()
    stayed = [row["doc"] for row in table if row["doc"] not in gone]
    records = read_texts(tmp_path / name)
    assert [record["meta"]["doc"] for record in records] == stayed
    source = source_texts(folder)
    n_cut = 0
    for record in records:
        text = source[record["meta"]["record"]]
        assert text.startswith(record["text"])
        assert record["meta"]["part"] == 0
        n_cut += text != record["text"]
    assert n_cut <= 2  # of each domain the last one, whose end fills no chunk


def read_texts(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    content = path.read_bytes()
    if path.suffix == ".zst":
        content = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)).read()
    return [json.loads(line) for line in content.decode().splitlines()]


def test_export_by_chunk_writes_the_kept_stretches_of_documents(folder, tmp_path):
    keep, _, _ = curated(folder, tmp_path / "out", export=str(tmp_path / "kept.jsonl"), **NEGATIVE)
    opened = data.open_dataset(folder / "data")
    records = read_texts(tmp_path / "kept.jsonl")
    n_characters = sum(len(record["text"]) for record in records)
    assert n_characters == np.sum(opened.train.rows[keep] != opened.meta["eot"])
    source = source_texts(folder)
    documents = documents_of(folder)
    for record in records:
        assert record["text"] in source[record["meta"]["record"]]
        assert set(documents[record["meta"]["doc"]]) & set(keep.tolist())
    assert max(record["meta"]["part"] for record in records) > 0


def test_prepare_pile_reads_an_export(folder, tmp_path):
    curated(folder, tmp_path / "out", export=str(tmp_path / "kept.jsonl"), **NEGATIVE)
    prepare(tmp_path / "kept.jsonl", tmp_path / "again", val_fraction=0.1)
    assert len(data.open_dataset(tmp_path / "again").train.rows) > 0


@pytest.mark.parametrize("tokenizer, block_size", [("byte", 7), ("gpt2", 5)])
def test_export_cuts_no_character(tmp_path, tokenizer, block_size):
    """Of text whose characters lie across the ends of chunks."""
    out, texts = run_on_characters(tmp_path, tokenizer, block_size)
    export = str(tmp_path / "kept.jsonl")
    options = {"by": "chunk", "drop_fraction": 0.4, "export": export}
    curate.curate(curate.Config(str(out), out=str(tmp_path), **options))
    records = read_texts(tmp_path / "kept.jsonl")
    assert len(records) > 20
    for record in records:
        assert "\ufffd" not in record["text"]
        assert record["text"] in texts[record["meta"]["record"]]


@pytest.mark.parametrize("tokenizer, block_size", [("byte", 7), ("gpt2", 5)])
def test_a_document_is_shown_without_the_character_that_is_cut_at_its_end(
    tmp_path, tokenizer, block_size
):
    out, texts = run_on_characters(tmp_path, tokenizer, block_size)
    opened = open_run(out)
    rows = pq.read_table(tmp_path / "data" / "train_docs.parquet").to_pylist()
    assert len(rows) > 20
    for row in rows:
        assert texts[row["record"]].startswith(values.doc(opened, row["doc"])["text"])


def run_on_characters(folder, tokenizer, block_size):
    """-> the run's folder and its source's texts."""
    texts = [f"{'漢字かな混じり文 🎉 é à la carte, ünïcödé ' * 3}{i}" for i in range(30)]
    write_records(folder / "t.jsonl", [{"text": text} for text in texts])
    prepare(folder / "t.jsonl", folder / "data", tokenizer, block_size, val_fraction=0.2)
    argv = [f"--block_size={block_size}", "--max_iters=20", "--eval_interval=0"]
    return run(folder, "run", *argv), texts


# --- training on what is kept ----------------------------------------------------------


def test_unused_chunks_stay_unless_unused_is_drop(folder, tmp_path):
    short = run(folder, "short", "--max_iters=5", "--eval_interval=0")
    kept = {}
    for unused in ("keep", "drop"):
        options = {"out": str(tmp_path / unused), "unused": unused, **NEGATIVE}
        curate.curate(curate.Config(run=str(short), **options))
        kept[unused] = set(np.load(tmp_path / unused / "keep.npy").tolist())
    values = np.load(short / "values.npy")[:, 0]
    assert kept["drop"] == set(np.flatnonzero(values >= 0))
    assert kept["keep"] - kept["drop"] == set(np.flatnonzero(np.isnan(values)))


@pytest.fixture(scope="module")
def kept_run(folder, tmp_path_factory):
    """-> a run of two passes over kept chunks, and their numbers. Its keep.npy is gone since."""
    cut = tmp_path_factory.mktemp("kept") / "cut"
    keep, _, _ = curated(folder, cut, **NEGATIVE)
    argv = [f"--keep={cut}/keep.npy", f"--max_iters={two_passes(keep)}", "--eval_interval=9"]
    out = run(folder, "kept", *argv, "--eval_chunks=2", "--checkpoint_interval=7")
    os.remove(cut / "keep.npy")
    return out, keep


def two_passes(keep):
    """Steps of four chunks."""
    return -(-2 * len(keep) // 4)


def test_a_run_on_kept_chunks_meets_each_of_them_once_a_pass(kept_run):
    out, keep = kept_run
    visits = store.read(out)
    n = len(keep)
    for start in (0, n):
        assert sorted(visits["chunk"][start : start + n]) == keep.tolist()
    assert set(np.flatnonzero(np.isfinite(np.load(out / "values.npy")))) == set(keep)
    assert np.array_equal(np.load(out / "chunks.npy"), keep)


def test_a_run_on_kept_chunks_is_evaluated_on_every_domain(kept_run):
    out, keep = kept_run
    steps = two_passes(keep)
    lines = (out / "evaluations.jsonl").read_text().splitlines()
    evaluations = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in evaluations] == [*range(0, steps, 9), steps]
    assert set(evaluations[-1]["loss"]) == {"prose", "code"}


def test_a_run_on_kept_chunks_is_revalued_on_the_same_chunks(kept_run, tmp_path):
    out = shutil.copytree(kept_run[0], tmp_path / "run")
    first_chunks = store.read(out)["chunk"][:28]
    revalue.revalue(revalue.Config(str(out), targets="val:prose", replay=True, end=7, name="again"))
    assert np.array_equal(store.read(out / "revalued" / "again")["chunk"], first_chunks)
    revalue.revalue(revalue.Config(str(out), targets="val:code", end=7, name="walk"))
    assert np.array_equal(store.read(out / "revalued" / "walk")["chunk"], first_chunks)


def test_a_run_on_kept_chunks_is_curated_again_and_goes_on(kept_run, tmp_path):
    out = shutil.copytree(kept_run[0], tmp_path / "run")
    curate.curate(curate.Config(run=str(out)))  # into its own folder
    resume = [str(out / "config.json"), "--init_from=resume"]
    steps = two_passes(kept_run[1]) + 3
    argv = [*resume, f"--max_iters={steps}", "--eval_interval=0"]
    train.train(config.load(train.Config, argv))
    visits = store.read(out)
    assert visits["step"][-1] == steps - 1
    assert set(visits["chunk"]) == set(kept_run[1].tolist())
    with pytest.raises(ValueError, match="does not name the chunks"):
        train.train(config.load(train.Config, [*resume, f"--keep={out}/keep.npy"]))


def test_a_chunk_that_keep_npy_names_three_times_is_met_three_times_a_pass(folder, tmp_path):
    np.save(tmp_path / "keep.npy", [3, 3, 3, 5])
    argv = [f"--keep={tmp_path}/keep.npy", "--max_iters=4", "--eval_interval=0"]
    out = run(folder, "thrice", *argv)
    visits = store.read(out)
    assert np.bincount(visits["chunk"])[[3, 5]].tolist() == [12, 4]
    total = visits["value"][visits["chunk"] == 3].sum(dtype=float)
    np.testing.assert_allclose(np.load(out / "values.npy")[3], total, rtol=1e-5)


# --- what goes wrong -------------------------------------------------------------------


WRONG_KEEP = {
    "nowhere": "missing",
    "far": "numbers of chunks",
    "mask": "numbers of chunks",
    "none": "numbers of chunks",
    "text": "damaged",
    "other": "other data",
}


@pytest.fixture
def wrong_keeps(tmp_path):
    """A folder of the files of WRONG_KEEP, all but nowhere.npy."""
    np.save(tmp_path / "far.npy", [1, 10**6])
    np.save(tmp_path / "mask.npy", [True, False])
    np.save(tmp_path / "none.npy", np.zeros(0, int))
    (tmp_path / "text.npy").write_text("1 2 3")
    np.save(tmp_path / "other.npy", [1, 2])
    write_json(tmp_path / "other.json", {"data_hash": "abc", "files": {}})
    return tmp_path


@pytest.mark.parametrize("name", WRONG_KEEP)
def test_train_refuses_a_wrong_keep_in_one_line(folder, wrong_keeps, capsys, name):
    line = refused(capsys, lambda: run(folder, "refused", f"--keep={wrong_keeps}/{name}.npy"))
    assert WRONG_KEEP[name] in line
    assert not (folder / "refused").exists()


@pytest.mark.parametrize(
    "argv, answer",
    [
        (["RUN", "--drop=positive"], "choose one of fraction, negative"),
        (["RUN", "--drop_fraction=16"], "it must be below 1"),
        (["RUN", "--drop_fraction=0"], "it must be above 0"),
        (["RUN", "--drop_fraction=.001"], "documents is none: write --by=chunk"),
        (["RUN", "--drop_fraction=.001", "--by=chunk"], "chunks is none: write a larger fraction"),
        (["RUN", "--confidence=2"], "write --drop=negative --confidence=2"),
        (["RUN", "--drop_fraction=.1", "--drop=negative"], "write one of them"),
        (["RUN", "--per_domain", "--drop=negative"], "write one of them"),
        (["RUN", "--score=loss", "--drop=negative"], "write --drop=fraction"),
        (["RUN", "--list=dropped.txt"], "a .jsonl file"),
        (["RUN", "--list=no/folder/dropped.jsonl"], "a folder that exists"),
        (["RUN", "--list=a.jsonl", "--export=a.jsonl"], "write two names"),
        (["RUN", "--invert", "--random"], "write one of them"),
        (["RUN", "--target=Prose"], "'code', 'prose'"),
        (["RUN", "--export=kept.txt"], ".jsonl.zst"),
        (["RUN", "--export=no/folder/kept.jsonl"], "a folder that exists"),
        ([], "no run given"),
        (["."], "no run's folder"),
    ],
)
def test_curate_refuses_wrong_arguments_in_one_line(folder, capsys, argv, answer):
    argv = [str(folder / "run") if word == "RUN" else word for word in argv]
    line = refused(capsys, lambda: curate.curate(config.load(curate.Config, argv)))
    assert answer in line
    assert not (folder / "run" / "keep.npy").exists()


def refused(capsys, command):
    """The one line that a command leaves on stderr when it ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        config.main(command)
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert line.count("\n") == 1, line
    return line


def test_curate_replaces_keep_npy_only_with_overwrite(folder, tmp_path):
    curated(folder, tmp_path)
    before = (tmp_path / "keep.npy").read_bytes()
    with pytest.raises(ValueError, match="--overwrite replaces it"):
        curated(folder, tmp_path, random=True)
    assert (tmp_path / "keep.npy").read_bytes() == before
    curated(folder, tmp_path, random=True, overwrite=True)
    assert (tmp_path / "keep.npy").read_bytes() != before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_killed_export_leaves_nothing_half_written(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    export = tmp_path / "kept.jsonl"
    begun = tmp_path / "kept.jsonl.tmp"
    command = [sys.executable, str(ROOT / "curate.py"), str(tmp_path / "run")]
    command += [f"--export={export}", "--by=document"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not begun.exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert export.exists() == (process.returncode == 0)
    assert not begun.exists()
    subprocess.run([*command, "--overwrite"], check=True, capture_output=True)
    assert len(read_texts(export)) > 10


def counts_of(domain, chunks, kept):
    """A domain as keep.json has it."""
    return {"domain": domain, "chunks": chunks, "kept": kept, "used": chunks} | dict.fromkeys(
        ("median", "median_kept")
    )


def test_domains_of_few_chunks_come_last_and_are_no_finding():
    domains = [counts_of("one", 1, 0), counts_of("half", 10, 5), counts_of("most", 10, 9)]
    named = [line.split()[0] for line in show.curated.domain_table(domains)]
    assert named == ["domain", "half", "most", "one"]
    words = show.curated.found({"domains": domains})
    assert words == (
        "found: half lost the largest part (50.0% of its chunks), most the smallest (10.0%)"
    )
