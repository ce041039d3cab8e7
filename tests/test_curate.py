"""curate.py and train.py --keep for real: choices held against loops over the ledger, and runs on what was kept."""

import io
import json
import os
import random
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
import train
import values
from show.run import open_run
from system import store
from system.files import write_json

ROOT = Path(config.__file__).parent
SMALL = "--n_layer=1 --n_head=2 --n_embd=16 --batch_size=4 --block_size=32 --warmup_iters=5 --learning_rate=5e-3 --device=cpu --dtype=float32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run over two and a half passes of documents that are known, some longer than a chunk, some much shorter."""
    path, rng = tmp_path_factory.mktemp("curate"), random.Random(0)
    words = dict(prose=("to", "be", "or"), code=("{}", "1+1", ";;"))
    texts = [
        (name, f"{i} " + " ".join(rng.choices(words[name], k=rng.choice((2, 9, 60)))))
        for i, name in enumerate(rng.choices(list(words), k=60))
    ]
    (path / "texts.jsonl").write_text(
        "".join(
            json.dumps({"text": text, "meta": {"pile_set_name": domain}}) + "\n"
            for domain, text in texts
        )
    )
    options = dict(
        source=str(path / "texts.jsonl"),
        tokenizer="byte",
        block_size=32,
        val_fraction=0.2,
        workers=1,
        data_dir=str(path / "data"),
    )
    prepare_pile.prepare(prepare_pile.Config(**options))
    n = len(data.open_dataset(path / "data").train.rows)
    run(
        path,
        "run",
        "--targets=val:code,val:prose",
        f"--max_iters={5 * n // 8}",
        "--eval_interval=0",
    )
    return path


def run(folder, name, *more):
    train.train(
        config.load(
            train.Config,
            [*SMALL.split(), f"--data_dir={folder / 'data'}", f"--out_dir={folder / name}", *more],
        )
    )
    return folder / name


def curated(folder, out, **options):
    curate.curate(curate.Config(run=str(folder / "run"), out=str(out), **options))
    return (
        np.load(out / "keep.npy"),
        json.loads((out / "keep.json").read_text()),
        np.load(out / "dropped.npy"),
    )


def contributions(folder, k, score="value"):
    """{chunk: [what each visit brings]}, by a loop over ledger.npy."""
    found = {}
    for step in np.load(folder / "run" / "ledger.npy").reshape(-1, 4):
        scale = np.mean([abs(float(v["value"][k])) for v in step])
        for v in step:
            each = {
                "value": float(v["value"][k]),
                "share": float(v["value"][k]) / scale,
                "loss": -float(v["loss"]),
            }
            found.setdefault(int(v["chunk"]), []).append(each[score])
    return found


def test_negative_chunks_go_and_keep_json_counts_them(folder, tmp_path):
    keep, about, dropped = curated(folder, tmp_path, target="code")
    values = np.load(folder / "run" / "values.npy")
    np.testing.assert_array_equal(keep, np.flatnonzero(~(values[:, 0] < 0)))
    assert (
        0
        < len(dropped)
        == np.sum(values[:, 0] < 0)
        == about["units_dropped"]
        == about["units_negative"]
        < len(values)
    )
    assert (np.diff(dropped["score"]) >= 0).all()
    assert (dropped["score"] < 0).all()
    np.testing.assert_allclose(dropped["score"], values[dropped["chunk"], 0], rtol=1e-5)
    assert sum(d["kept"] for d in about["domains"]) == len(keep) == about["chunks_kept"]
    assert about["tokens_kept"] == 32 * len(keep)
    assert about["config"]["target"] == "code"


@pytest.mark.parametrize("score", ["value", "share", "loss"])
def test_a_fraction_goes_by_each_score(folder, tmp_path, score):
    keep, _, dropped = curated(folder, tmp_path, drop_fraction=0.25, score=score)
    by_loop = {
        chunk: (sum if score == "value" else np.mean)(each)
        for chunk, each in contributions(folder, 0, score).items()
    }
    worst = sorted(by_loop, key=by_loop.get)[: round(0.25 * len(by_loop))]
    assert dropped["chunk"].tolist() == worst
    assert not set(worst) & set(keep.tolist())
    np.testing.assert_allclose(dropped["score"], [by_loop[chunk] for chunk in worst], rtol=1e-6)


def test_of_each_domain_its_own_fraction(folder, tmp_path):
    _, about, dropped = curated(folder, tmp_path, drop_fraction=0.25, per_domain=True)
    domain, values = (
        open_run(folder / "run").data.train.domain,
        np.load(folder / "run" / "values.npy")[:, 0],
    )
    for d in about["domains"]:
        assert d["chunks"] - d["kept"] == round(0.25 * d["used"])
    for d in np.unique(domain):
        gone = dropped["chunk"][domain[dropped["chunk"]] == d]
        assert values[gone].max() <= np.delete(values, gone)[np.delete(domain, gone) == d].min()


def test_controls_drop_as_many(folder, tmp_path):
    values, n = (
        np.load(folder / "run" / "values.npy")[:, 0],
        len(curated(folder, tmp_path / "a")[2]),
    )
    assert set(curated(folder, tmp_path / "b", invert=True)[2]["chunk"]) == set(
        np.argsort(-values)[:n]
    )
    one, two, again = (
        curated(folder, tmp_path / name, random=True, seed=seed)[2]["chunk"]
        for name, seed in (("c", 1), ("d", 2), ("e", 1))
    )
    assert len(one) == len(two) == n
    assert set(one) == set(again) != set(two)


def test_only_what_is_negative_beyond_its_spread(folder, tmp_path):
    _, _, dropped = curated(folder, tmp_path, confidence=1.0)
    expected = set()
    for chunk, each in contributions(folder, 0).items():
        if len(each) > 1 and sum(each) + np.std(each, ddof=1) * len(each) ** 0.5 < 0:
            expected.add(chunk)
    assert set(dropped["chunk"].tolist()) == expected
    assert 0 < len(expected) < (np.load(folder / "run" / "values.npy")[:, 0] < 0).sum()
    assert np.isfinite(dropped["standard_error"]).all()


def documents_of(folder):
    """{doc: {chunk: tokens}} by walking each domain's stream of tokens."""
    opened, found = data.open_dataset(folder / "data"), {}
    for row in pq.read_table(folder / "data" / "train_docs.parquet").to_pylist():
        stream = np.flatnonzero(opened.train.domain == opened.domains.index(row["domain"])).tolist()
        place = stream.index(row["first_chunk"]) * 33 + row["first_token"]
        for p in range(place, min(place + row["n_tokens"] + 1, len(stream) * 33)):
            lies = found.setdefault(row["doc"], {})
            lies[stream[p // 33]] = lies.get(stream[p // 33], 0) + 1
    return found


@pytest.mark.parametrize("score", ["value", "share"])
def test_whole_documents(folder, tmp_path, score):
    keep, about, dropped = curated(
        folder, tmp_path, by="document", drop_fraction=0.3, score=score, target="code"
    )
    visits, scores, lies = contributions(folder, 0, score), {}, documents_of(folder)
    for doc, chunks in lies.items():
        each = [x * tokens / 33 for chunk, tokens in chunks.items() for x in visits.get(chunk, [])]
        if each:
            scores[doc] = sum(each) if score == "value" else np.mean(each)
    gone = set(sorted(scores, key=scores.get)[: round(0.3 * len(scores))])
    assert set(dropped["document"].tolist()) == gone
    for chunk in range(about["chunks"]):
        held = {doc: chunks[chunk] for doc, chunks in lies.items() if chunk in chunks}
        assert (chunk in keep) == (
            sum(n for doc, n in held.items() if doc not in gone)
            >= sum(n for doc, n in held.items() if doc in gone)
        )


@pytest.mark.parametrize("name", ["kept.jsonl.zst", "kept.jsonl", "kept.parquet"])
def test_the_documents_kept_are_written_whole(folder, tmp_path, name):
    _, _, dropped = curated(
        folder, tmp_path / "out", by="document", drop_fraction=0.3, export=str(tmp_path / name)
    )
    source = [json.loads(line)["text"] for line in open(folder / "texts.jsonl")]
    table, found = (
        pq.read_table(folder / "data" / "train_docs.parquet").to_pylist(),
        read_texts(tmp_path / name),
    )
    gone = set(dropped["document"].tolist())
    assert [r["meta"]["doc"] for r in found] == [
        row["doc"] for row in table if row["doc"] not in gone
    ]
    ends = 0
    for r in found:
        assert source[r["meta"]["record"]].startswith(r["text"])
        assert r["meta"]["part"] == 0
        ends += source[r["meta"]["record"]] != r["text"]
    assert ends <= 2  # of each domain the last one, whose end fills no chunk


def read_texts(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    content = path.read_bytes()
    content = (
        zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)).read()
        if path.suffix == ".zst"
        else content
    )
    return [json.loads(line) for line in content.decode().splitlines()]


def test_the_stretches_kept_of_documents(folder, tmp_path):
    keep, _, _ = curated(folder, tmp_path / "out", export=str(tmp_path / "kept.jsonl"))
    opened, found, lies = (
        data.open_dataset(folder / "data"),
        read_texts(tmp_path / "kept.jsonl"),
        documents_of(folder),
    )
    total = sum(len(r["text"]) for r in found)
    assert total == np.sum(opened.train.rows[keep] != opened.meta["eot"])
    source = [json.loads(line)["text"] for line in open(folder / "texts.jsonl")]
    for r in found:
        assert r["text"] in source[r["meta"]["record"]]
        assert set(lies[r["meta"]["doc"]]) & set(keep.tolist())
    assert max(r["meta"]["part"] for r in found) > 0
    again = dict(
        source=str(tmp_path / "kept.jsonl"),
        tokenizer="byte",
        block_size=32,
        workers=1,
        data_dir=str(tmp_path / "again"),
    )
    prepare_pile.prepare(prepare_pile.Config(**again))  # which reads what it wrote


@pytest.mark.parametrize("tokenizer, block_size", [("byte", 7), ("gpt2", 5)])
def test_an_export_cuts_no_character(tmp_path, tokenizer, block_size):
    """Of text whose characters lie across the ends of chunks."""
    texts = ["漢字かな混じり文 🎉 é à la carte, ünïcödé " * 3 + str(i) for i in range(30)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = dict(
        source=str(tmp_path / "t.jsonl"),
        tokenizer=tokenizer,
        block_size=block_size,
        val_fraction=0.2,
        workers=1,
    )
    prepare_pile.prepare(prepare_pile.Config(**options, data_dir=str(tmp_path / "data")))
    out = run(tmp_path, "run", f"--block_size={block_size}", "--max_iters=20", "--eval_interval=0")
    export = tmp_path / "kept.jsonl"
    curate.curate(
        curate.Config(run=str(out), out=str(tmp_path), drop_fraction=0.4, export=str(export))
    )
    found = read_texts(export)
    assert len(found) > 20
    for row in found:
        assert "\ufffd" not in row["text"]
        assert row["text"] in texts[row["meta"]["record"]]
    opened = open_run(out)
    for number in range(10):
        try:
            text = values.doc(opened, number)["text"]
        except ValueError:  # it is of the validation set
            continue
        assert texts[number].startswith(text)


def test_unused_chunks(folder, tmp_path):
    short = run(folder, "short", "--max_iters=5", "--eval_interval=0")
    kept = {}
    for unused in ("keep", "drop"):
        curate.curate(curate.Config(run=str(short), out=str(tmp_path / unused), unused=unused))
        kept[unused] = set(np.load(tmp_path / unused / "keep.npy").tolist())
    values = np.load(short / "values.npy")
    assert kept["drop"] == set(np.flatnonzero(values >= 0))
    assert kept["keep"] - kept["drop"] == set(np.flatnonzero(np.isnan(values)))


def test_a_run_on_what_is_kept(folder, tmp_path):
    keep, _, _ = curated(folder, tmp_path / "cut")
    n = len(keep)
    argv = [
        f"--keep={tmp_path}/cut/keep.npy",
        f"--max_iters={n // 2}",
        "--eval_interval=9",
        "--eval_chunks=2",
        "--checkpoint_interval=7",
    ]
    out = run(folder, "kept", *argv)
    visits, values = store.read(out), np.load(out / "values.npy")
    for passed in range(len(visits) // n):
        assert sorted(visits["chunk"][passed * n : (passed + 1) * n]) == keep.tolist()
    assert set(np.flatnonzero(np.isfinite(values))) == set(keep)
    assert np.array_equal(np.load(out / "chunks.npy"), keep)
    lines = [json.loads(line) for line in open(out / "evaluations.jsonl")]
    assert [e["step"] for e in lines] == [*range(0, n // 2, 9), n // 2]
    assert {
        "prose",
        "code",
    } == set(lines[-1]["loss"])

    os.remove(tmp_path / "cut" / "keep.npy")  # the run has its own
    config.main(
        lambda: revalue.main(
            config.load(revalue.Config, [str(out), "--targets=val:prose", "--replay", "--end=7"])
        )
    )
    assert np.array_equal(store.read(out / "revalued" / "prose")["chunk"], visits["chunk"][:28])
    revalue.revalue(revalue.Config(str(out), targets="val:code", end=7, name="walk"))
    assert np.array_equal(store.read(out / "revalued" / "walk")["chunk"], visits["chunk"][:28])

    curate.curate(curate.Config(run=str(out)))  # and can be curated again, into its own folder
    again = config.load(
        train.Config,
        [
            str(out / "config.json"),
            "--init_from=resume",
            f"--max_iters={n // 2 + 3}",
            "--eval_interval=0",
        ],
    )
    train.train(again)
    assert set(store.read(out)["chunk"]) == set(keep.tolist())
    with pytest.raises(ValueError, match="does not name the chunks"):
        train.train(
            config.load(
                train.Config,
                [str(out / "config.json"), "--init_from=resume", f"--keep={out}/keep.npy"],
            )
        )


def test_a_chunk_that_stands_twice_is_met_twice(folder, tmp_path):
    np.save(tmp_path / "keep.npy", [3, 3, 3, 5])
    out = run(folder, "twice", f"--keep={tmp_path}/keep.npy", "--max_iters=4", "--eval_interval=0")
    assert np.bincount(store.read(out)["chunk"])[[3, 5]].tolist() == [12, 4]
    visits, values = store.read(out), np.load(out / "values.npy")
    np.testing.assert_allclose(
        values[3], visits["value"][visits["chunk"] == 3].sum(dtype=float), rtol=1e-5
    )


def refusals(tmp_path, folder):
    np.save(tmp_path / "far.npy", [1, 10**6])
    np.save(tmp_path / "mask.npy", [True, False])
    np.save(tmp_path / "none.npy", np.zeros(0, int))
    (tmp_path / "text.npy").write_text("1 2 3")
    np.save(tmp_path / "other.npy", [1, 2])
    write_json(tmp_path / "other.json", dict(data_hash="abc", files={}))
    for name, answer in dict(
        nowhere="missing",
        far="numbers of chunks",
        mask="numbers of chunks",
        none="numbers of chunks",
        text="damaged",
        other="other data",
    ).items():
        yield "train", [f"--keep={tmp_path}/{name}.npy"], answer
    yield "curate", [], "no run given"
    yield "curate", [str(tmp_path)], "no run's folder"
    yield "curate", [str(folder / "run"), "--drop=positive"], "choose one of negative"
    yield "curate", [str(folder / "run"), "--drop_fraction=16"], "it must be below 1"
    yield (
        "curate",
        [str(folder / "run"), "--drop_fraction=.1", "--confidence=2"],
        "write one of them",
    )
    yield "curate", [str(folder / "run"), "--per_domain"], "write --drop_fraction=.16"
    yield "curate", [str(folder / "run"), "--score=loss"], "write --drop_fraction=.16"
    yield "curate", [str(folder / "run"), "--invert", "--random"], "write one of them"
    yield "curate", [str(folder / "run"), "--target=Prose"], "'code', 'prose'"
    yield "curate", [str(folder / "run"), "--export=kept.txt"], ".jsonl.zst"
    yield (
        "curate",
        [str(folder / "run"), f"--export={tmp_path}/no/kept.jsonl"],
        "a folder that exists",
    )


def test_wrong_input_is_one_line(folder, tmp_path, capsys):
    for script, argv, answer in refusals(tmp_path, folder):
        with pytest.raises(SystemExit) as stop:
            if script == "train":
                config.main(lambda argv=argv: run(folder, "refused", *argv))
            else:
                config.main(lambda argv=argv: curate.curate(config.load(curate.Config, argv)))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and answer in err and err.count("\n") == 1, (argv, err)
    assert not (folder / "refused").exists()
    assert not (folder / "run" / "keep.npy").exists()


def test_nothing_is_replaced_unasked(folder, tmp_path):
    curated(folder, tmp_path)
    with pytest.raises(ValueError, match="--overwrite replaces it"):
        curated(folder, tmp_path, random=True)
    curated(folder, tmp_path, random=True, overwrite=True)
    assert not list(tmp_path.glob("*.tmp"))


def test_an_export_that_is_killed_leaves_nothing_half_written(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    command = [
        sys.executable,
        ROOT / "curate.py",
        tmp_path / "run",
        f"--export={tmp_path}/kept.jsonl",
        "--by=document",
    ]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE)
    while not (tmp_path / "kept.jsonl.tmp").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert (tmp_path / "kept.jsonl").exists() == (process.returncode == 0)
    assert not (tmp_path / "kept.jsonl.tmp").exists()
    subprocess.run(list(map(str, [*command, "--overwrite"])), check=True, capture_output=True)
    assert len(read_texts(tmp_path / "kept.jsonl")) > 10
