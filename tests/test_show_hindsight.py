"""What is shown of hindsight by values.py, the end of revalue.py and curate.py: of a real run that
was looked back on and checked, and of folders that strangers wrote."""

import csv
import io
import json
import random
import re
import shlex
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import runs
from sealed import change, replace_records

import config
import curate
import prepare_pile
import revalue
import show.curated
import train
import values
from show import findings, hindsight, tables
from show.run import open_run
from show.scores import chunk_scores
from system import store, terminal
from system.errors import UserError

SCHEMA = json.loads(Path(config.ROOT, "show", "values.schema.json").read_text())
EVIL = "\x1b]0;owned\x07\x1b[31mred\r\u202eback"
EARLY = 5  # the steps that are marked early where a test says which


WORDS = {"code": ("{}", "1+1", ";;"), "prose": ("to", "be", "or"), "other": ("?", "!")}


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """Text with few validation chunks, for all of a target's are looked at."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    lines = []
    for i, domain in enumerate(rng.choices(list(WORDS), k=90)):
        text = f"{i} " + " ".join(rng.choices(WORDS[domain], k=40))
        lines.append(json.dumps({"text": text, "meta": {"pile_set_name": domain}}) + "\n")
    (folder / "texts.jsonl").write_text("".join(lines))
    options = {"source": str(folder / "texts.jsonl"), "data_dir": str(folder / "small")}
    options.update(tokenizer="byte", block_size=32, val_fraction=0.2, workers=1)
    prepare_pile.prepare(prepare_pile.Config(**options))
    return folder / "small"


@pytest.fixture(scope="module")
def run(small_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("looked") / "run"
    runs.run(
        small_data, out, "--targets=val:code,val:prose", "--keep_checkpoints=9", "--eval_interval=6"
    )
    return out


def look_back(run, *more):
    """Types revalue.py --hindsight. Returns the folder."""
    cfg = config.load(revalue.Config, [str(run), "--hindsight", *more])
    revalue.main(cfg)
    return run / "revalued" / cfg.name


@pytest.fixture(scope="module")
def checked(run):
    """Hindsight, held against four trainings without 10 % of the visits."""
    return look_back(run, "--name=checked", "--check=4", "--check_fraction=.1")


@pytest.fixture(scope="module")
def unchecked(run):
    return look_back(run, "--name=unchecked")


@pytest.fixture(scope="module")
def ahead(run):
    return look_back(run, "--name=ahead", "--horizon=3")


@pytest.fixture
def copied(checked, tmp_path):
    """A copy of the folder, in a folder of its run's name."""
    return shutil.copytree(checked, tmp_path / "run" / "revalued" / "checked")


@pytest.fixture
def marked(copied):
    """The copy, of whose steps the first ones alone are early."""
    visits = np.load(copied / "ledger.npy")
    visits["early"] = visits["step"] < EARLY
    replace_records(copied, "ledger", visits)
    return copied


def info(folder):
    return json.loads((folder / "values.json").read_text())


def as_one_line(text):
    return " ".join(text.split())


# --- values.py summary ------------------------------------------------------------------


def test_summary_says_first_what_the_number_is(checked, run, typed):
    text = typed("summary", checked)
    assert text.startswith(f"{checked}: hindsight of {run}, steps 0 to 11, 4 chunks a step\n")
    words = as_one_line(text)
    assert words.index("the drop of the target's loss at the run's end") < words.index("early:")
    assert "they do not add up" in words
    assert "their sum is about 0 and about half of them are negative" in words
    assert "horizon: to the end; loss at the end: code" in words
    for name, loss in info(checked)["loss_at_end"].items():
        assert f"{name} {loss:.4f} nats" in words


def test_summary_has_no_books_and_no_audit(checked, typed):
    text = typed("summary", checked)
    assert "books" not in text
    assert "audit" not in text
    assert "momentum" not in text


def test_summary_counts_the_early_steps_and_shows_where_the_adjoint_is_large(marked, typed):
    text = typed("summary", marked)
    visits = np.load(marked / "ledger.npy")
    size = np.abs(visits["value"].astype(float))
    shares = size[visits["step"] < EARLY].sum(0) / size.sum(0)
    held = f"{shares[0]:.1%} and {shares[1]:.1%} of the size of all values"
    expected = f"early: {EARLY} steps before step {EARLY} of steps 0 to 11, with {held}."
    assert expected in as_one_line(text)
    (head,) = [line for line in text.splitlines() if line.startswith("|dL/dw| after step")]
    (row,) = [line for line in text.splitlines() if re.match(r"prose .*\d$", line)][:1]
    norms = np.load(marked / "adjoint.npy")["norm"][:, 1]
    steps = [int(cell) for cell in head.split()[3:]]
    assert steps == [0, EARLY // 2, EARLY - 1, EARLY, (EARLY + 12) // 2, 11]
    assert [float(cell) for cell in row.split()[1:]] == pytest.approx(norms[steps], rel=6e-3)


def test_summary_says_where_no_step_is_early(copied, typed):
    visits = np.load(copied / "ledger.npy")
    visits["early"] = 0
    replace_records(copied, "ledger", visits)
    assert "early: none of steps 0 to 11, for |dL/dw| is never large" in typed("summary", copied)


def test_summary_has_a_row_for_each_score_of_the_check(checked, typed):
    lines = typed("summary", checked).splitlines()
    check = info(checked)["check"]
    assert any("4 trainings, each without another 10% of the visits of steps" in x for x in lines)
    for name, entries in check["targets"].items():
        (start,) = [i for i, line in enumerate(lines) if line.startswith(f"for {name}, loss at")]
        rows = {line[:24].strip(): line[24:].split() for line in lines[start + 2 : start + 6]}
        assert list(rows) == [
            "hindsight",
            "value in its step",
            "share of its step",
            "training loss",
        ]
        for score, cells in rows.items():
            entry = entries[score]
            assert cells[0] == f"{entry['pearson']:+.2f}"
            assert cells[1:4] == [f"{entry['low']:+.2f}", "to", f"{entry['high']:+.2f}"]
            assert cells[4] == f"{entry['spearman']:+.2f}"
            if "slope" in entry:
                assert float(cells[5]) == pytest.approx(entry["slope"], rel=6e-3)
                assert float(cells[6]) == pytest.approx(entry["slope_error"], rel=0.06)
            else:
                assert cells[5:] == ["-", "-"]


def test_without_a_check_summary_has_the_command_that_makes_one(unchecked, run, typed):
    """Typed as it stands, but for fewer trainings, it adds a check to the same values."""
    line = [line for line in typed("summary", unchecked).splitlines() if "To see it, type:" in line]
    words = shlex.split(line[0].partition("type: ")[2])
    assert words[:3] == ["python", "revalue.py", str(run)]
    folder = shutil.copytree(unchecked, run / "revalued" / "later")
    values_before = (folder / "values.npy").read_bytes()
    argv = [word.replace("--check=40", "--check=4") for word in words[2:]]
    argv = [word.replace("--name=unchecked", "--name=later") for word in argv]
    revalue.revalue(config.load(revalue.Config, argv))
    assert (folder / "values.npy").read_bytes() == values_before
    assert hindsight.read(open_run(folder))["check"]["sets"] == 4


def test_a_horizon_is_told_by_its_steps(ahead, typed):
    text = as_one_line(typed("summary", ahead))
    assert "the drop of the target's loss up to 3 steps later" in text
    assert "horizon: up to 3 steps ahead" in text
    assert "run's end" not in text


# --- the other commands -----------------------------------------------------------------

AT_END = "it lowered the target's loss at the run's end"
IN_WORDS = {  # what a command says of the number
    "summary": AT_END,
    "domains": AT_END,
    "top": AT_END,
    "bottom": AT_END,
    "docs": AT_END,
    "chunk": AT_END,
    "doc": AT_END,
    "tokens": "hindsight of step",
    "compare": "that loss is in a the one in each step, in b the one at the run's end",
}


def arguments(command, run, checked):
    opened = open_run(checked)
    used = int(opened.used[0])
    more = {
        "top": ["--n=3"],
        "bottom": ["--n=3"],
        "docs": ["--n=3"],
        "chunk": [used],
        "doc": [values.Documents(opened).of_chunk(used)[0]["doc"]],
        "tokens": [f"--chunk={used}"],
    }
    return [run, checked, "--n=2"] if command == "compare" else [checked, *more.get(command, [])]


@pytest.mark.parametrize("command", IN_WORDS)
def test_every_command_says_which_loss_its_values_speak_of(command, run, checked, typed):
    assert IN_WORDS[command] in typed(command, *arguments(command, run, checked))


@pytest.mark.parametrize("command", ["domains", "top", "chunk", "doc", "tokens"])
def test_values_in_their_steps_say_nothing_of_the_end(command, run, typed):
    assert "run's end" not in typed(command, *arguments(command, run, run))


@pytest.mark.parametrize("command", IN_WORDS)
def test_json_fits_the_schema(command, run, checked, typed):
    printed = typed(command, *arguments(command, run, checked), "--json")
    result = json.loads(printed, parse_constant=pytest.fail)
    jsonschema.validate(result, SCHEMA | {"$ref": f"#/$defs/{command}"})
    if command == "compare":
        assert result["horizons"] == [None, 0]
    else:
        assert result["horizon"] == 0


def test_json_has_the_whole_adjoint_and_the_check(checked, typed):
    beside = json.loads(typed("summary", checked, "--json"))["hindsight"]
    adjoint = np.load(checked / "adjoint.npy")
    assert [row["step"] for row in beside["adjoint"]] == adjoint["step"].tolist()
    norms = [list(row["norm"].values()) for row in beside["adjoint"]]
    np.testing.assert_allclose(norms, adjoint["norm"])
    found = info(checked)["check"]["targets"]["prose"]["hindsight"]
    (row,) = [r for r in beside["check"]["targets"]["prose"] if r["score"] == "hindsight"]
    assert row == {"score": "hindsight", **found}


def test_csv_of_the_summary_has_a_row_for_each_target(marked, typed):
    visits = np.load(marked / "ledger.npy")
    visits["value"][-1, 0] = 1.0
    replace_records(marked, "ledger", visits)
    rows = list(csv.DictReader(io.StringIO(typed("summary", marked, "--csv"))))
    assert [row["target"] for row in rows] == ["code", "prose"]
    assert "alone holds" in rows[0]["cautions"]


def test_export_has_the_values_of_hindsight(checked, typed, tmp_path):
    import pyarrow.parquet as pq

    typed("export", checked, tmp_path / "values.parquet")
    table = pq.read_table(tmp_path / "values.parquet")
    opened = open_run(checked)
    assert table["chunk"].to_pylist() == opened.used.tolist()
    column = table["value:prose"].to_numpy()
    np.testing.assert_array_equal(column, opened.values[opened.used, 1])
    assert table.schema.metadata[b"rule"] == b"hindsight"


def test_compare_correlates_a_run_with_its_hindsight(run, checked, typed):
    result = json.loads(typed("compare", run, checked, "--json"))
    a, b = open_run(run), open_run(checked)
    # a chunk whose only visits were early has no value in hindsight
    common = np.intersect1d(a.used, b.used)
    expected = np.corrcoef(a.values[common, 0], b.values[common, 0])[0, 1]
    assert result["targets"][0]["pearson"] == pytest.approx(expected)


def test_losses_leads_to_the_run(run, checked, refused, typed):
    answer = refused("losses", checked)
    command = shlex.split(answer.partition("type: ")[2])
    assert command == ["python", "values.py", "losses", str(run)]
    assert "after step 12" in typed(*command[2:])


def test_query_of_a_folder_asks_its_run(run, checked, typed):
    text = typed("query", checked, "--text=to be or to be", "--n=2")
    assert "The chunks that helped most, for query" in text
    assert not (checked / "revalued").exists()
    assert list((run / "revalued").glob("query-*.txt"))


@pytest.mark.parametrize(
    "path, expected",
    [
        ("out/run/revalued/mine", "out/run"),
        ("out/run", "out/run"),
        ("out/run/revalued/other/../mine", None),
    ],
)
def test_the_run_of_a_folder_is_found_by_its_path(path, expected):
    from show.run import original_of

    found = original_of(Path(path))
    assert found == (Path(expected) if expected else Path("out/run").resolve())


# --- the end of revalue.py ----------------------------------------------------------------


def test_looking_back_ends_with_the_findings_and_the_check(run, checked, capsys):
    """Typed again it makes a check alone."""
    capsys.readouterr()
    look_back(run, "--name=checked", "--check=4", "--check_fraction=.1")
    lines = capsys.readouterr().out.splitlines()
    beside = hindsight.read(open_run(checked))
    found = findings.of_opened(open_run(checked))
    assert lines[-1].endswith(f"next: python values.py top {checked}")
    assert lines[-3:-1] == [of_target.finding for of_target in found]
    assert lines[-3].startswith("for code at the run's end: ")
    text = "\n".join(lines)
    for name in ("code", "prose"):
        table = list(tables.predictions(beside["check"]["targets"][name]))
        assert "\n".join(table) in text
    assert "median        +-   < 0" in text
    assert "books" not in text


def test_looking_back_without_a_check_says_how_to_make_one(unchecked):
    beside = hindsight.read(open_run(unchecked))
    lines = tables.end_of_hindsight(findings.of_opened(open_run(unchecked)), beside)
    assert any(beside["to_check"] in line for line in lines)


def test_a_check_of_other_targets_is_refused(run, checked):
    before = (checked / "values.json").read_bytes()
    options = {"hindsight": True, "name": "checked", "check": 4, "targets": "val:other"}
    with pytest.raises(UserError, match="holds other values than hindsight for other"):
        revalue.revalue(revalue.Config(run=str(run), **options))
    assert (checked / "values.json").read_bytes() == before


def test_a_check_of_a_walk_is_refused(run):
    revalue.revalue(revalue.Config(run=str(run), name="walked", end=2))
    with pytest.raises(UserError, match="holds other values than hindsight"):
        revalue.revalue(revalue.Config(run=str(run), name="walked", hindsight=True, check=4))


def test_a_run_without_values_has_hindsight_too(small_data, tmp_path, capsys, typed):
    """Its check knows nothing of values in their steps."""
    out = tmp_path / "off"
    runs.run(small_data, out, "--targets=val:code", "--keep_checkpoints=9", "--rule=off")
    capsys.readouterr()
    folder = look_back(out, "--name=later", "--check=4", "--check_fraction=.1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("for code at the run's end: ")
    scores = hindsight.read(open_run(folder))["check"]["targets"]["code"]
    assert [row["score"] for row in scores] == ["hindsight", "training loss"]
    assert "approximate: a run with --rule=off has no ledger" in typed("summary", folder)


# --- a run, and how well its own values predict -------------------------------------------


def test_of_the_checks_below_a_run_the_one_by_the_most_sets_is_taken(run, checked, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "revalued")
    assert hindsight.check_beside(open_run(copy)) is None
    for name, sets in (("a", 4), ("b", 9), ("c", 6)):
        folder = shutil.copytree(checked, copy / "revalued" / name)
        change(folder / "values.json", check=info(folder)["check"] | {"sets": sets})
    assert hindsight.check_beside(open_run(copy))["sets"] == 9


def test_a_damaged_folder_below_a_run_is_passed_over(run, checked, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "revalued")
    shutil.copytree(checked, copy / "revalued" / "a")
    damaged = shutil.copytree(checked, copy / "revalued" / "b")
    change(damaged / "values.json", check={"sets": "many"})
    assert hindsight.check_beside(open_run(copy))["sets"] == 4
    assert "passed over:" in capsys.readouterr().out


def made_check(pearson, low, high, slope=1.0):
    row = {"pearson": pearson, "low": low, "high": high, "spearman": 0.5, "slope": slope}
    of_step = {**row, "score": hindsight.OF_STEP, "pearson": 0.59, "slope_error": 0.1}
    rows = [{**row, "score": hindsight.OWN, "slope_error": 0.1}, of_step]
    return {"sets": 40, "fraction": 0.02, "first_step": 5, "end": 12, "targets": {"x": rows}}


@pytest.mark.parametrize(
    "low, sentence",
    [
        (0.65, "a correlation of 0.93 (0.65 to 0.99); the values in their steps with 0.59"),
        (-0.1, "a correlation of 0.93 (-0.10 to 0.99), not clearly above 0; the values in"),
        (np.nan, "a correlation of 0.93 (- to 0.99), not clearly above 0; the values in"),
    ],
)
def test_a_check_in_a_sentence(low, sentence):
    check = made_check(0.93, low, 0.99)
    words = hindsight.predicted(check, "x", hindsight.OWN, hindsight.OF_STEP)
    begin = "in 40 trainings without 2% of the visits each, hindsight predicted the change of the"
    assert words.startswith(begin)
    assert sentence in words
    assert hindsight.predicted(check, "y", hindsight.OWN, hindsight.OF_STEP) is None


# --- curate.py ----------------------------------------------------------------------------


def curated(folder, out, **options):
    """-> what keep.json holds, and the lines that curate.py prints."""
    about = curate.curate(curate.Config(run=str(folder), out=str(out), **options))
    return about, list(show.curated.lines(about))


def test_hindsight_is_curated_by_its_value_in_late_steps(marked, small_data, tmp_path):
    options = {"by": "chunk", "data_dir": str(small_data), "list": str(tmp_path / "list.jsonl")}
    about, lines = curated(marked, tmp_path / "kept", **options)
    visits = np.load(marked / "ledger.npy")
    late = visits[visits["step"] >= EARLY]
    total = {}
    for visit in late:
        chunk = int(visit["chunk"])
        total[chunk] = total.get(chunk, 0) + float(visit["value"][0])
    worst = sorted(total, key=total.get)[: round(0.25 * len(total))]
    dropped = np.load(tmp_path / "kept" / "dropped.npy")
    assert about["config"]["score"] == "value"
    assert dropped["chunk"].tolist() == worst
    np.testing.assert_allclose(dropped["score"], [total[chunk] for chunk in worst])
    listed = (tmp_path / "list.jsonl").read_text().splitlines()
    assert [json.loads(line)["chunk"] for line in listed] == worst
    assert f"{4 * EARLY} of 48 visits are of early steps and do not count: there" in lines


def test_a_run_is_curated_by_share_with_all_its_visits(run, tmp_path):
    about, lines = curated(run, tmp_path / "kept", by="chunk")
    assert about["config"]["score"] == "share"
    assert about["visits_scored"] == 48
    assert not any("do not count" in line for line in lines)


def test_early_visits_do_not_count_in_hindsight(marked, run, small_data):
    opened = open_run(marked, small_data)
    for score in ("value", "share", "loss"):
        assert chunk_scores(opened, 0, score).visits.sum() == 48 - 4 * EARLY
    assert chunk_scores(open_run(run, small_data), 0, "share").visits.sum() == 48
    counted = np.concatenate(list(opened.counted()))
    assert counted["step"].min() == EARLY


def test_curate_says_what_is_known_of_hindsight(checked, tmp_path):
    _, lines = curated(checked, tmp_path / "kept", by="chunk")
    text = as_one_line(" ".join(lines))
    assert "hindsight put last, the same training ended .082 +- .006 nats lower" in text
    results = (Path(config.__file__).parent / "results/counterfactual/README.md").read_text()
    assert "-0.082 \u00b1 0.006" in results
    assert "-0.021 \u00b1 0.003" in results
    narrow = (Path(config.__file__).parent / "results/curation/narrow/README.md").read_text()
    assert "-.0355 \u00b1 .0027" in narrow
    assert "-.0273 \u00b1 .0058" in narrow
    assert AT_END in text


def test_curate_names_the_command_for_hindsight_where_there_is_none(run, checked, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    command = f"python revalue.py {copy} --hindsight"
    _, lines = curated(copy, tmp_path / "kept", by="chunk")
    assert not any(command in line for line in lines)
    shutil.rmtree(copy / "revalued")
    _, lines = curated(copy, tmp_path / "kept", by="chunk", overwrite=True)
    assert any(line.endswith(command) for line in lines)


def test_the_commands_after_curating_by_hindsight_train_beside_the_run(run, checked, tmp_path):
    """Typed as they stand. No run is put among the values that came later."""
    copy = shutil.copytree(run, tmp_path / "run")
    folder = copy / "revalued" / "checked"
    _, lines = curated(folder, tmp_path / "kept", by="chunk", drop_fraction=0.4)
    control, train_control, losses = [line for line in lines if line.startswith("  python")]
    curate.main(config.load(curate.Config, shlex.split(control)[2:]))
    for command in (train_control, lines[-1].removeprefix("next: ")):
        argv = [*shlex.split(command)[2:], "--max_iters=2", "--eval_interval=1"]
        train.train(config.load(train.Config, argv))
    folders = shlex.split(losses)[3:]
    assert folders == [f"{copy}_checked_control", f"{copy}_checked_kept"]
    assert all(Path(folder, "evaluations.jsonl").exists() for folder in folders)
    assert len(list((copy / "revalued").iterdir())) == len(list((run / "revalued").iterdir()))


def test_curating_within_a_folder_does_not_keep_it_from_a_check(run, unchecked):
    folder = shutil.copytree(unchecked, run / "revalued" / "kept-inside")
    curate.curate(curate.Config(run=str(folder), by="chunk"))
    options = {"hindsight": True, "name": "kept-inside", "check": 4}
    revalue.revalue(revalue.Config(run=str(run), **options))
    assert (folder / "keep.npy").exists()
    assert hindsight.read(open_run(folder))["check"]["sets"] == 4


# --- folders of strangers -------------------------------------------------------------------


def renamed_score(check):
    """The same check with a score that means harm."""
    targets = {}
    for name, entries in check["targets"].items():
        targets[name] = {EVIL if key == "training loss" else key: e for key, e in entries.items()}
    return check | {"targets": targets}


def renamed_target(folder):
    """The folder, whose first target has a name that means harm."""
    text = (folder / "values.json").read_text()
    entries = json.loads(text.replace('"code"', json.dumps(EVIL)))
    change(folder / "values.json", **{key: x for key, x in entries.items() if key != "crc32"})


@pytest.mark.parametrize("command", ["summary", "domains", "top"])
def test_no_text_of_a_strangers_folder_reaches_a_terminal_raw(copied, small_data, typed, command):
    change(copied / "values.json", meaning=EVIL, check=renamed_score(info(copied)["check"]))
    renamed_target(copied)
    text = typed(command, copied, f"--data_dir={small_data}")
    assert text.count("\\x1b]0;owned") > (6 if command == "summary" else 1)
    assert not set(text) & (set(map(chr, range(32))) - {"\n"})
    assert "\u202e" not in text


def test_the_end_of_looking_back_has_no_control_character(copied, small_data, capsys):
    renamed_target(copied)
    opened = open_run(copied, small_data)
    capsys.readouterr()
    for line in tables.end_of_hindsight(findings.of_opened(opened), hindsight.read(opened)):
        terminal.say(line)
    text = capsys.readouterr().out
    assert text.count("\\x1b]0;owned") > 3
    assert not set(text) & (set(map(chr, range(32))) - {"\n"})
    assert "\u202e" not in text


def without(entries, key):
    return {name: entry for name, entry in entries.items() if name != key}


DAMAGED = {
    "no sets": lambda check: without(check, "sets"),
    "sets in words": lambda check: check | {"sets": "many"},
    "sets beyond all numbers": lambda check: check | {"sets": float("inf")},
    "no targets": lambda check: check | {"targets": {}},
    "a list of targets": lambda check: check | {"targets": [1, 2]},
    "scores in words": lambda check: (
        check | {"targets": {name: {"hindsight": {"pearson": "high"}} for name in check["targets"]}}
    ),
    "no dict": lambda check: "fine",
    "a number of 400 digits": lambda check: check | {"fraction": 10**400},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_check_is_refused_in_one_line(copied, small_data, refused, kind):
    change(copied / "values.json", check=DAMAGED[kind](info(copied)["check"]))
    assert "values.json is damaged (its check)" in refused(
        "summary", copied, f"--data_dir={small_data}"
    )


@pytest.mark.parametrize(
    "entries, answer",
    [
        ({"horizon": "far"}, "'horizon' is a str"),
        ({"loss_at_end": {}}, "it has no 'code'"),
        ({"meaning": 3}, "'meaning' is a int"),
    ],
)
def test_damaged_entries_are_refused_in_one_line(copied, small_data, refused, entries, answer):
    change(copied / "values.json", **entries)
    assert answer in refused("summary", copied, f"--data_dir={small_data}")


def test_an_adjoint_of_other_steps_is_refused(copied, small_data, refused):
    adjoint = np.load(copied / "adjoint.npy")
    adjoint["step"] += 1
    replace_records(copied, "adjoint", adjoint)
    answer = refused("summary", copied, f"--data_dir={small_data}")
    assert "adjoint.npy has other steps than books.npy" in answer


def test_a_damaged_adjoint_is_refused(copied, small_data, refused):
    raw = bytearray((copied / "adjoint.npy").read_bytes())
    raw[-1] ^= 1
    (copied / "adjoint.npy").write_bytes(raw)
    answer = refused("summary", copied, f"--data_dir={small_data}")
    assert "adjoint.npy is missing or damaged" in answer
    run, name = str(copied.parent.parent), f"--name={copied.name}"
    assert f"revalue.py {run} {name} --overwrite" in answer
    assert "train.py" not in answer


def test_a_check_with_a_score_that_nobody_knows_yet_is_shown(copied, small_data, typed):
    check = info(copied)["check"]
    for entries in check["targets"].values():
        entries["a new score"] = entries["training loss"]
    change(copied / "values.json", check=check)
    assert "\na new score" in typed("summary", copied, f"--data_dir={small_data}")


def test_figures_that_are_no_numbers_are_shown_as_none(copied, small_data, typed):
    """As where all values are equal, which correlate with nothing."""
    check = info(copied)["check"]
    check["targets"]["code"]["hindsight"]["pearson"] = float("nan")
    change(copied / "values.json", check=check)
    assert re.search(r"\nhindsight +- ", typed("summary", copied, f"--data_dir={small_data}"))
    printed = typed("summary", copied, f"--data_dir={small_data}", "--json")
    rows = json.loads(printed)["hindsight"]["check"]["targets"]["code"]
    assert rows[0]["pearson"] is None


def test_the_file_of_the_adjoint_is_one_of_the_formats():
    assert store.adjoint_dtype(2).names == ("step", "norm")
