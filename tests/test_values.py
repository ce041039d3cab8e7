"""values.py for real: a small run on documents that are known, read by every command and held against plain loops over its ledger."""

import csv
import hashlib
import io
import json
import os
import pty
import random
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
from sealed import as_of_step, change, replace_array

import config
import data
import prepare_pile
import revalue
import train
import values
from system import store, terminal

ROOT = Path(config.__file__).parent
SCHEMA = json.loads((ROOT / "show" / "values.schema.json").read_text())
EVIL = "\x1b]0;owned\x07\x1b[31mred\x9b2J\r\u202eback\x7f"  # sets a title, colours, clears, overwrites, turns the text round
SMALL = "--n_layer=1 --n_head=2 --n_embd=16 --batch_size=4 --warmup_iters=5 --learning_rate=5e-3 --eval_interval=0 --device=cpu --dtype=float32"


def texts():
    """[(domain, text)]: short and long ones, of ASCII, of two cells a character, and with what a terminal would obey."""
    rng, found = random.Random(0), []
    for i in range(120):
        domain = rng.choice(("prose", "code", "漢字", "bad\x1b[31mname"))
        words = (
            ("漢字", "かな")
            if domain == "漢字"
            else ("to", "be", "or", EVIL if i % 9 == 0 else "not")
        )
        found.append(
            (
                domain,
                f"{i} "
                + " ".join(
                    rng.choice(words) for _ in range(rng.randrange(1, 90 if i % 7 == 0 else 25))
                ),
            )
        )
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("values")
    lines = [
        json.dumps({"text": text, "meta": {"pile_set_name": domain}}) + "\n"
        for domain, text in texts()
    ]
    (folder / "texts.jsonl").write_text("".join(lines))
    prepare_pile.prepare(
        prepare_pile.Config(
            source=str(folder / "texts.jsonl"),
            tokenizer="byte",
            block_size=64,
            val_fraction=0.2,
            workers=1,
            data_dir=str(folder / "data"),
        )
    )
    return folder


def trained(prepared, name, *more):
    argv = [
        *SMALL.split(),
        f"--data_dir={prepared / 'data'}",
        f"--out_dir={prepared / name}",
        "--max_iters=60",
        *more,
    ]
    train.train(config.load(train.Config, argv))
    return prepared / name


@pytest.fixture(scope="module")
def folder(prepared):
    return trained(
        prepared,
        "run",
        "--targets=val:prose,val:code",
        "--book_interval=7",
        "--audit_interval=20",
        "--checkpoint_interval=20",
    )


@pytest.fixture(scope="module")
def other(prepared):
    return trained(
        prepared, "other", "--targets=val:code,val", "--rule=sgd", "--seed=2", "--max_iters=15"
    )


def test_preparing_and_training_print_no_escape_code(prepared, tmp_path, capsys):
    options = dict(
        source=str(prepared / "texts.jsonl"),
        tokenizer="byte",
        block_size=64,
        val_fraction=0.2,
        workers=1,
    )
    prepare_pile.prepare(prepare_pile.Config(**options, data_dir=str(tmp_path / "data")))
    trained(prepared, tmp_path / "run", "--max_iters=5", "--targets=val:bad\x1b[31mname")
    out = capsys.readouterr().out
    assert out.count("bad\\x1b[31mname") >= 3
    assert "\x1b" not in out


@pytest.fixture
def typed(monkeypatch, capsys):
    """typed("top", folder, "--n=3") -> what it prints."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["values.py", *map(str, argv)])
        capsys.readouterr()
        config.main(values.main)
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(typed, capsys):
    """The one line that a command leaves on stderr when it ends with exit code 2."""

    def call(*argv):
        with pytest.raises(SystemExit) as stop:
            typed(*argv)
        out, err = capsys.readouterr()
        assert (
            stop.value.code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
        ), err
        return err

    return call


def by_loops(folder):
    """{chunk: [(step, loss, value (K,))]}, out of ledger.npy."""
    found = {}
    for visit in np.load(folder / "ledger.npy"):
        found.setdefault(int(visit["chunk"]), []).append(
            (int(visit["step"]), float(visit["loss"]), visit["value"].astype(float))
        )
    return found


def documents_by_eot(prepared):
    """{chunk: [doc]}: the domain's stream of tokens, cut at every <eot>, against the documents in their order."""
    dataset, table, found = (
        data.open_dataset(prepared / "data"),
        pq.read_table(prepared / "data" / "train_docs.parquet").to_pylist(),
        {},
    )
    for d, domain in enumerate(dataset.domains):
        docs = iter([row["doc"] for row in table if row["domain"] == domain])
        doc = next(docs, None)
        for chunk in np.flatnonzero(dataset.train.domain == d).tolist():
            found[chunk] = []
            for token in dataset.train.rows[chunk]:
                found[chunk] += [doc] * (doc not in found[chunk])
                if token == dataset.meta["eot"]:
                    doc = next(docs, None)
    return found


# --- the numbers ----------------------------------------------------------------


def test_ranking_and_chunk_are_what_the_ledger_says(prepared, folder):
    run, visits, documents = values.open_run(folder), by_loops(folder), documents_by_eot(prepared)
    assert max(map(len, visits.values())) > 1
    total = {chunk: sum(value for *_, value in of) for chunk, of in visits.items()}
    for k, target in enumerate(run.names):
        best = sorted(total, key=lambda chunk: (-np.float32(total[chunk][k]), chunk))
        for name, found, expected in (
            ("top", values.top, best),
            ("bottom", values.bottom, sorted(total, key=lambda c: (np.float32(total[c][k]), c))),
        ):
            found = found(run, n=9, target=target)
            assert found["order"] == name
            assert [row["chunk"] for row in found["chunks"]] == expected[:9]
            for row in found["chunks"]:
                of = visits[row["chunk"]]
                assert row["value"] == np.float32(total[row["chunk"]][k])
                assert row["visits"] == len(of)
                assert row["first_step"] == min(of)[0]
                assert row["loss"] == pytest.approx(np.mean([loss for _, loss, _ in of]))
                assert [doc["doc"] for doc in row["documents"]] == documents[row["chunk"]]
    mine = values.top(run, n=10**6, domain="code")["chunks"]
    assert [row["chunk"] for row in mine] == [
        chunk
        for chunk in sorted(total, key=lambda c: (-np.float32(total[c][0]), c))
        if run.domain_of(chunk) == "code"
    ]
    for chunk in list(total)[:10]:
        found = values.chunk(run, chunk)
        assert [(v["step"], v["loss"], list(v["value"].values())) for v in found["visits"]] == [
            (s, x, list(v)) for s, x, v in visits[chunk]
        ]
        assert list(found["value"].values()) == pytest.approx(list(total[chunk]), rel=1e-6)
        assert found["used"]
        assert found["text"].replace("\n<|endoftext|>\n", "") == "".join(run.pieces(chunk)).replace(
            "\n<|endoftext|>\n", ""
        )


def test_summary_and_domains_are_what_the_ledger_says(folder):
    run, visits = values.open_run(folder), by_loops(folder)
    found, books = values.summary(run), np.load(folder / "books.npy")
    assert (
        found["steps"],
        found["max_iters"],
        found["finished"],
        found["visits"],
        found["chunks_used"],
    ) == (60, 60, True, 240, len(visits))
    assert (found["early_steps"], found["chunks"]) == (3, len(run.data.train.rows))
    for k, target in enumerate(found["targets"]):
        v = np.array(
            [np.float32(sum(value[k] for *_, value in of)) for of in visits.values()], float
        )
        assert target["mean"] == pytest.approx(v.mean())
        assert target["sd"] == pytest.approx(v.std(ddof=1))
        assert target["sum"] == pytest.approx(v.sum())
        assert (target["median"], target["p95"]) == pytest.approx(
            (np.median(v), np.quantile(v, 0.95))
        )
        assert target["negative"] == (v < 0).mean()
        drop = sum(float(b["before"][k]) - float(b["after"][k]) for b in books[::7])
        assert target["books"]["measured_steps"] == 9
        assert target["books"]["drop"] == pytest.approx(drop)
        rest = sum(target["books"][key] for key in ("data", "momentum", "decay"))
        assert target["books"]["accounted"] == pytest.approx(rest / drop, abs=1e-4)
        assert target["audit"]["steps"] == len(run.audit) == 3
        assert target["audit"]["pearson_lowest"] == run.audit["pearson"][:, k].min()
    rows = values.domains(run)["domains"]
    for row in rows:
        k = run.names.index(row["target"])
        v = np.array(
            [
                sum(value[k] for *_, value in of)
                for chunk, of in visits.items()
                if run.domain_of(chunk) == row["domain"]
            ]
        )
        assert (row["chunks"], row["tokens"]) == (len(v), 64 * len(v))
        assert row["share"] == len(v) / len(visits)
        assert row["mean"] == pytest.approx(v.mean() / 64, rel=1e-5)
        assert row["sum"] == pytest.approx(v.sum(), rel=1e-5)
        assert row["standard_error"] == pytest.approx(v.std(ddof=1) / len(v) ** 0.5 / 64, rel=1e-5)
        assert row["p5"] == pytest.approx(np.quantile(v, 0.05) / 64, rel=1e-5)
    for name in run.names:
        assert sum(row["share_of_sum"] for row in rows if row["target"] == name) == pytest.approx(1)


def test_every_document_is_found_again_in_its_chunks(prepared, folder):
    run, by_chunk, source = values.open_run(folder), documents_by_eot(prepared), texts()
    shares, total = dict.fromkeys(by_chunk, 0.0), 0.0
    for row in pq.read_table(prepared / "data" / "train_docs.parquet").to_pylist():
        found = values.doc(run, row["doc"])
        assert [c["chunk"] for c in found["chunks"]] == [
            chunk for chunk, docs in by_chunk.items() if row["doc"] in docs
        ]
        domain, text = source[found["record"]]
        assert found["domain"] == domain
        if found["whole"]:
            assert found["text"] == text
        else:
            assert text.startswith(found["text"].rstrip("\ufffd"))
        for c in found["chunks"]:
            shares[c["chunk"]] += c["share"]
        known = [c for c in found["chunks"] if not np.isnan(c["value"]["code"])]
        assert found["chunks_used"] == len(known)
        assert known or np.isnan(found["value"]["code"])
        total += sum(c["share"] * c["value"]["code"] for c in known)
        assert not known or found["value"]["code"] == pytest.approx(
            sum(c["share"] * c["value"]["code"] for c in known)
        )
    assert list(shares.values()) == pytest.approx([1.0] * len(shares))
    assert total == pytest.approx(np.nansum(run.values[:, 1], dtype=float))
    for chunk, docs in by_chunk.items():
        found = values.Documents(run).of_chunk(chunk)
        assert [doc["doc"] for doc in found] == docs
        for doc in found:
            text = source[doc["record"]][1].encode()
            assert doc["begins"] < 0 or bytes(run.data.train.rows[chunk].astype(np.uint8))[
                doc["begins"] :
            ].startswith(text[: 65 - doc["begins"]])


def test_export_is_the_same_by_one_row_group_of_documents_or_by_many(
    prepared, folder, typed, tmp_path
):
    run, visits, documents = values.open_run(folder), by_loops(folder), documents_by_eot(prepared)
    (tmp_path / "data").mkdir()
    for path in (prepared / "data").iterdir():
        shutil.copy(path, tmp_path / "data")
    docs = pq.read_table(prepared / "data" / "train_docs.parquet")
    first = docs["first_chunk"].to_numpy()
    with pq.ParquetWriter(
        tmp_path / "data" / "train_docs.parquet", docs.schema
    ) as file:  # a group a chunk, as prepare_pile.py never parts them
        for chunk in np.unique(first):
            file.write_table(docs.filter(pa.array(first == chunk)))
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    digest = hashlib.sha256((tmp_path / "data" / "train_docs.parquet").read_bytes()).hexdigest()
    change(tmp_path / "data" / "meta.json", sha256=meta["sha256"] | {"train_docs.parquet": digest})
    for name, where in (("one", ()), ("many", (f"--data_dir={tmp_path / 'data'}",))):
        typed("export", folder, tmp_path / f"{name}.parquet", *where)
        table = pq.read_table(tmp_path / f"{name}.parquet")
        assert table.schema.metadata[b"sign"] == run.info["sign"].encode()
        assert table.schema.metadata[b"unit"] == b"nats"
        assert table.schema.metadata[b"rule"] == b"adamw"
        assert table.schema.field("docs").type == pa.list_(pa.int64())
        rows = table.to_pylist()
        assert [row["chunk"] for row in rows] == sorted(visits)
        for row in rows:
            of = visits[row["chunk"]]
            assert (row["domain"], row["docs"]) == (
                run.domain_of(row["chunk"]),
                documents[row["chunk"]],
            )
            assert (row["visits"], row["first_step"]) == (len(of), of[0][0])
            assert row["loss"] == pytest.approx(np.mean([loss for _, loss, _ in of]))
            assert [row["value:prose"], row["value:code"]] == run.values[row["chunk"]].tolist()
    many = values.open_run(folder, tmp_path / "data")
    assert all(
        [doc["doc"] for doc in values.Documents(many).of_chunk(chunk)] == documents[chunk]
        for chunk in documents
    )


def test_compare(folder, other, typed):
    from scipy import stats

    a, b = values.open_run(folder), values.open_run(other)
    found = values.compare(a, b, n=4)
    ids = sorted(set(by_loops(folder)) & set(by_loops(other)))
    x, y = a.values[ids, 1].astype(float), b.values[ids, 0].astype(float)  # "code" in both
    (target,) = found["targets"]
    assert found["chunks"] == len(ids)
    assert target["target"] == "code"
    assert target["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert target["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert target["equal_signs"] == np.mean((x > 0) == (y > 0))
    apart = abs(stats.rankdata(-x) - stats.rankdata(-y))
    assert [abs(m["rank_a"] - m["rank_b"]) for m in found["moved"]] == sorted(apart, reverse=True)[
        :4
    ]
    for row in found["domains"]:
        inside = [i for i, chunk in enumerate(ids) if a.domain_of(chunk) == row["domain"]]
        assert (row["mean_a"], row["mean_b"], row["chunks"]) == pytest.approx(
            (x[inside].mean(), y[inside].mean(), len(inside))
        )
    assert values.compare(a, a)["targets"][0]["spearman"] == pytest.approx(1)


# --- tokens and query: revalue.py computes, values.py shows -------------------------


def test_tokens_and_query_show_what_revalue_computes(folder, typed, refused, tmp_path):
    run = values.open_run(folder)
    found = json.loads(typed("tokens", folder, "--chunk", "7", "--target=code", "--json"))
    jsonschema.validate(found, SCHEMA | {"$ref": "#/$defs/tokens"})
    step, computed = revalue.tokens(run, [7])
    assert [t["token"] for t in found["tokens"]] == run.pieces(7)
    assert len(found["tokens"]) == 65
    assert [t["value"] for t in found["tokens"]] == [*computed[0, :, 1], None]
    assert found["step"] == step == 60
    assert found["sum"] == pytest.approx(computed[0, :, 1].sum())
    assert len(typed("tokens", folder, "--chunk=7").splitlines()) == 65 + 4  # no terminal: numbers
    assert "chunks 0 to" in refused("tokens", folder, "--chunk=123456")
    assert "--chunk" in refused("tokens", folder)
    (tmp_path / "q.txt").write_text("to be or not to be")
    for text in ("--text=to be or not to be", f"--file={tmp_path / 'q.txt'}"):
        found = json.loads(typed("query", folder, text, "--n=3", "--json"))
        jsonschema.validate(found, SCHEMA | {"$ref": "#/$defs/query"})
        of = values.open_run(revalue.query(run, "to be or not to be"))
        best = [c["chunk"] for c in values.top(of, n=3)["chunks"]]
        assert [row["chunk"] for row in found["chunks"]] == best
        assert found["target"] == "query"
        assert "nearest checkpoint" in found["approximate"]
    for wrong in ((), ("--text=a", "--file=b"), ("--file=nowhere.txt",)):
        refused("query", folder, *wrong)


def test_a_query_finds_the_prose_for_prose(folder):
    """Text made of the words of one domain is helped most by that domain's chunks, by mean."""
    run = values.open_run(folder)
    of = values.open_run(revalue.query(run, "\u6f22\u5b57 \u304b\u306a " * 20))
    mean = {row["domain"]: row["mean"] for row in values.domains(of)["domains"]}
    assert max(mean, key=mean.get) == "\u6f22\u5b57", mean


def test_tokens_are_coloured_on_a_terminal_only(folder, monkeypatch, typed):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    chunk = next(
        c
        for c, text in ((c, values.open_run(folder).text(c)) for c in range(200))
        if "\x1b" in text
    )
    coloured = typed("tokens", folder, f"--chunk={chunk}")
    assert "\x1b[48;2;" in coloured
    assert "\\x1b" in coloured
    rest = coloured.replace("\x1b[0m", "")
    assert all(part.startswith("[48;2;") for part in rest.split("\x1b")[1:])  # no other escape
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in typed("tokens", folder, f"--chunk={chunk}")


# --- what is printed ---------------------------------------------------------------


def commands(run, folder, other, tmp_path):
    used = int(run.used[0])
    return {
        "summary": (folder,),
        "top": (folder, "--n=5"),
        "bottom": (folder, "--n", "5", "--domain=code", "--chars=9"),
        "domains": (folder,),
        "chunk": (folder, used),
        "doc": (folder, values.Documents(run).of_chunk(used)[0]["doc"]),
        "compare": (folder, other, "--n=2"),
        "export": (folder, tmp_path / "v.parquet"),
    }


def test_json_csv_and_text(folder, other, typed, tmp_path):
    run = values.open_run(folder)
    for command, argv in commands(run, folder, other, tmp_path).items():
        found = json.loads(
            typed(command, *argv, "--json"), parse_constant=pytest.fail
        )  # NaN, Infinity
        jsonschema.Draft202012Validator(SCHEMA | {"$ref": f"#/$defs/{command}"}).validate(found)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(found | {"more": 1}, SCHEMA | {"$ref": f"#/$defs/{command}"})
        text = typed(command, *argv)
        assert text.strip()
        assert not set(text) & (set(map(chr, range(32))) - {"\n", "\t"})
        if command == "export":
            continue
        rows = list(csv.DictReader(io.StringIO(typed(command, *argv, "--csv"))))
        listed = found[
            {
                "top": "chunks",
                "bottom": "chunks",
                "summary": "targets",
                "chunk": "visits",
                "doc": "chunks",
                "compare": "moved",
            }.get(command, command)
        ]
        assert len(rows) == len(listed) > 0
        for row, expected in zip(rows, listed):
            for key, x in expected.items():
                if isinstance(x, int | float) and not isinstance(x, bool):
                    assert float(row[key]) == x
                elif key == "value" and isinstance(x, dict):
                    assert [row[f"value:{name}"] for name in x] == [
                        "" if v is None else repr(v) for v in x.values()
                    ]
                elif key == "documents":
                    assert row[key].split() == [str(doc["doc"]) for doc in x]


def test_schema_is_a_schema_and_names_every_command(typed, capsys):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    with pytest.raises(SystemExit):
        typed("--help")
    listed = capsys.readouterr().out
    for command in "summary top bottom domains chunk doc export compare tokens query".split():
        assert command in SCHEMA["$defs"]
        assert f"    {command} " in listed
        with pytest.raises(SystemExit) as stop:
            typed(command, "--help")
        out = capsys.readouterr().out
        assert stop.value.code == 0
        assert "--data_dir" in out
        assert command == "bottom" or f"python values.py {command} " in out  # an example


def test_a_chunk_never_used_is_no_error(prepared, typed):
    short = trained(prepared, "short", "--max_iters=2", "--targets=val:code")
    run = values.open_run(short)
    chunk = next(c for c in range(len(run.values)) if c not in by_loops(short))
    out = typed("chunk", short, chunk)
    assert "never used" in out
    assert terminal.visible(run.text(chunk), "\n\t") in out
    found = json.loads(typed("chunk", short, chunk, "--json"))
    jsonschema.validate(found, SCHEMA | {"$ref": "#/$defs/chunk"})
    assert found["value"] == {"code": None}
    assert not found["used"]
    assert found["visits"] == []
    for doc in values.Documents(run).of_chunk(chunk):
        jsonschema.validate(
            json.loads(typed("doc", short, doc["doc"], "--json")), SCHEMA | {"$ref": "#/$defs/doc"}
        )
    assert not json.loads(typed("summary", prepared / "short", "--json"))["targets"][0]["audit"]


def test_nothing_in_the_data_reaches_a_terminal_raw(folder, other, tmp_path, refused):
    """A real one: a pseudo-terminal, 80 cells wide. Tables stay in line and in its width."""
    run = values.open_run(folder)
    chunk = next(c for c in run.used.tolist() if "\x1b" in run.text(c))
    typed = {
        **commands(run, folder, other, tmp_path),
        "chunk": (folder, chunk),
        "doc": (folder, values.Documents(run).of_chunk(chunk)[-1]["doc"]),
    }
    typed["top"] = (folder, "--n=999")
    for command, argv in (
        (command, typed[command]) for command in ("top", "chunk", "doc")
    ):  # of the others the test above knows
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, ROOT / "values.py", command, *map(str, argv)],
            stdout=theirs,
            env={**os.environ, "COLUMNS": "110", "LINES": "24"},
        )
        os.close(theirs)
        seen = b""
        while True:
            try:
                seen += os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
        os.close(ours)
        assert process.wait() == 0
        text = seen.decode().replace("\r\n", "\n")
        assert not set(text) & {
            *map(chr, [*range(9), *range(11, 32), *range(127, 160)]),
            "\u202e",
        }, command
        if command == "top":
            assert "\\x1b" in text
            assert "bad\\x1b[31mname" in text
            rows = text.splitlines()[2:]
            cells = [sum(1 + (ord(c) > 0x2E7F) for c in row) for row in rows]
            assert max(cells) <= 110
            assert any("漢字" in row for row in rows)
            for row in rows[1:]:
                assert (
                    row[: rows[0].index("domain")].rstrip()[-1].isdigit()
                )  # the columns of numbers end before that of words begins
    assert "\x1b" not in refused("top", folder, "--domain=nowhere")


def test_documents_are_read_without_threads_of_arrows(folder):
    """They sometimes abort the process as it ends, after all is printed (apache/arrow#34314)."""
    code = """
import os, sys, values
run = values.open_run(sys.argv[1])
import pyarrow
before = len(os.listdir("/proc/self/task"))
documents = values.Documents(run)
assert documents.of_chunk(int(run.used[0]))
assert len(list(documents.pieces()))
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "0\n", done.stderr


# --- what goes wrong -------------------------------------------------------------------


def test_wrong_arguments_say_what_to_type(folder, other, prepared, refused, tmp_path):
    n = len(values.open_run(folder).values)
    for argv, answer in (
        ((), "command"),
        (("tops", folder), "invalid choice: 'tops'"),
        (("top",), "required: run"),
        (("top", folder, "--n=0"), "--n: 0 is not 1 or more"),
        (("compare", folder, other, "--n=-3"), "--n: -3 is not 1 or more"),
        (("top", folder, "--n=x"), "'x'"),
        (("top", folder, "--tar=code"), "unrecognized arguments: --tar=code"),
        (("top", folder, "--target=nix"), "has 'prose', 'code'"),
        (("top", folder, "--domain=nix"), "'漢字'"),
        (("top", folder, "--json", "--csv"), "not allowed with"),
        (("export", folder, tmp_path / "v.parquet", "--csv"), "unrecognized"),
        (("chunk", folder, n), f"chunks 0 to {n - 1}"),
        (("chunk", folder, "-1"), f"chunks 0 to {n - 1}"),
        (("chunk", folder, "x"), "invalid int value: 'x'"),
        (("doc", folder, 10**6), "document 1000000"),
        (("doc", folder, 10**30), "document 1"),
        (("export", folder, tmp_path / "nowhere" / "v.parquet"), "in a folder that exists"),
        (("export", folder, folder / "values.npy"), "a .parquet file"),
        (("summary", prepared / "nowhere"), "does not exist"),
        (("summary", prepared), "is no run's folder"),
        (("summary", folder, f"--data_dir={tmp_path}"), "no prepared data in"),
        (("summary", folder, "--data_dir=nowhere"), "name the folder it is in with --data_dir"),
    ):
        assert answer in refused(*argv), argv
    assert not list(tmp_path.iterdir())


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "run")


def test_damaged_runs_are_refused_with_what_to_type(copied, folder, refused):
    for name in (
        "values.npy",
        "ledger.npy",
        "books.npy",
        "audit.npy",
        "values.json",
        "config.json",
    ):
        whole = (copied / name).read_bytes()
        for broken in (whole[: len(whole) // 2], b"", whole[:50]):
            (copied / name).write_bytes(broken)
            assert f"{copied / name} is " in refused("summary", copied)
            assert not refused("summary", copied).count("Traceback")
        (copied / name).write_bytes(whole)
    for name in ("values.npy", "ledger.npy", "books.npy"):
        (copied / name).rename(copied / "away")
        assert f"{copied / name} is missing" in refused("summary", copied)
        (copied / "away").rename(copied / name)
    for content in ("[]", "{}", "null", "3"):
        for name in ("values.json", "config.json"):
            whole = (copied / name).read_bytes()
            (copied / name).write_text(content)
            assert "damaged" in refused("summary", copied)
            (copied / name).write_bytes(whole)
    info = (copied / "values.json").read_bytes()
    replace_array(copied, "values.npy", np.load(folder / "values.npy")[:-1])
    assert "values.npy is damaged, it has" in refused("top", copied)
    shutil.copy(folder / "values.npy", copied)
    (copied / "values.json").write_bytes(info)
    change(copied / "values.json", schema=99)
    assert "schema 99" in refused("top", copied)


def test_runs_without_values_are_refused(copied, prepared, refused):
    change(copied / "values.json", committed_step=0)
    assert "has no values yet" in refused("summary", copied)
    (copied / "values.json").unlink()
    assert "after 20 steps" in refused("summary", copied)
    off = trained(prepared, "off", "--rule=off", "--max_iters=1")
    assert "--rule=off" in refused("summary", off)


def test_other_data_is_refused(copied, folder, prepared, refused, tmp_path):
    options = dict(
        source=str(prepared / "texts.jsonl"),
        tokenizer="byte",
        block_size=32,
        val_fraction=0.2,
        workers=1,
    )
    prepare_pile.prepare(prepare_pile.Config(**options, data_dir=str(tmp_path / "data")))
    assert "its hash differs" in refused("summary", folder, f"--data_dir={tmp_path / 'data'}")
    train.train(
        config.load(
            train.Config,
            [
                *SMALL.split(),
                f"--data_dir={tmp_path / 'data'}",
                f"--out_dir={tmp_path / 'b'}",
                "--max_iters=1",
            ],
        )
    )
    assert "different data" in refused("compare", folder, tmp_path / "b")
    assert "no target in common" in refused(
        "compare", folder, trained(prepared, "third", "--targets=val", "--max_iters=1")
    )
    whole = (tmp_path / "data" / "train_docs.parquet").read_bytes()
    for broken in (b"", whole[:-9]):
        (tmp_path / "data" / "train_docs.parquet").write_bytes(broken)
        assert "train_docs.parquet is damaged" in refused("chunk", tmp_path / "b", 0)


def test_a_moved_run_and_moved_data(folder, prepared, tmp_path, typed):
    shutil.copytree(folder, tmp_path / "moved")
    shutil.copytree(prepared / "data", tmp_path / "data")
    change(
        tmp_path / "moved" / "config.json",
        config=json.loads((folder / "config.json").read_text())["config"]
        | dict(data_dir="nowhere"),
    )
    assert typed("top", tmp_path / "moved", f"--data_dir={tmp_path / 'data'}") == typed(
        "top", folder
    )


def test_a_commit_cut_off_after_values_npy(copied, folder):
    """Ledger, books and values.npy are of step 60, values.json still speaks of step 40: so must the values."""
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


def script(*argv, **options):
    return subprocess.run(
        [sys.executable, ROOT / "values.py", *map(str, argv)],
        capture_output=True,
        text=True,
        **options,
    )


def test_reading_values_needs_no_torch(folder):
    code = "import sys, values; values.main(); sys.exit(any(m in sys.modules for m in ('torch', 'revalue')))"
    for command in (("summary", folder), ("top", folder)):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, command)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stdout, done.stderr


def test_a_closed_pipe_ends_it_quietly(folder):
    command = f"set -o pipefail; {sys.executable} {ROOT / 'values.py'} top {folder} --n=100000 --chars=100000 --json | head -n 1"
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
    (tmp_path / "v.parquet").write_text("an older one")
    process = subprocess.Popen(
        [sys.executable, "-c", code, "export", folder, tmp_path / "v.parquet"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "half\n"
    process.send_signal(number)
    process.wait(30)
    process.stdout.close()
    assert (tmp_path / "v.parquet").read_text() == "an older one"
    assert number == signal.SIGKILL or [path.name for path in tmp_path.iterdir()] == ["v.parquet"]
    assert (
        script("export", folder, tmp_path / "v.parquet").returncode == 0
    )  # what a kill left is no hindrance
    assert pq.read_table(tmp_path / "v.parquet").num_rows == len(by_loops(folder))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_live_run(prepared, typed):
    """Read again and again while it trains and commits every step: always of one commit."""
    out = prepared / "live"
    argv = [
        *SMALL.split(),
        f"--data_dir={prepared / 'data'}",
        f"--out_dir={out}",
        "--max_iters=100000",
        "--checkpoint_interval=1",
    ]
    command, alone = (
        [sys.executable, ROOT / "train.py", *argv, "--targets=val:code,val:prose"],
        {**os.environ, "OMP_NUM_THREADS": "1"},
    )
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=alone)
    try:
        seen, until, last = set(), time.time() + 60, -1
        while len(seen) < 10 and time.time() < until:
            try:
                run = values.open_run(out)
            except ValueError as e:
                assert (
                    "no values yet" in str(e)
                    or "does not exist" in str(e)
                    or "is no run's folder" in str(e)
                )
                time.sleep(0.2)
                continue
            total, used = np.zeros(run.values.shape), np.zeros(len(run.values), bool)
            store.add_visits(run.visits, total, used)
            assert (np.nan_to_num(run.values) == total.astype(np.float32)).all()
            assert (np.flatnonzero(used) == run.used).all()
            step = run.info["committed_step"]
            assert len(run.visits) == 4 * step
            assert len(run.books) == step >= last
            seen.add(step)
            last = step
        assert len(seen) == 10
        assert "not finished" in typed("summary", out)
    finally:
        process.terminate()
        process.wait()
    assert values.open_run(out).info["committed_step"] >= last
