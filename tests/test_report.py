"""The report, made of real runs and of large and hostile ones, and used in a real browser as a
person would."""

import hashlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from sealed import change, replace_array, replace_records

import config
import data
import prepare_pile
import revalue
import train
from pile.pack import DOCUMENTS
from report import SCRIPTS, Config, report
from show import findings, tables
from show import page as payload
from show.documents import Documents
from show.losses import losses
from show.run import open_run
from show.scores import chunk_scores, score_and_error
from system import store
from system.errors import UserError
from system.files import write_json, write_lines

ROOT = Path(config.__file__).parent
HOSTILE = [
    "</script><script>window.hit = 1</script>",
    '<img src=x onerror="window.hit = 1">',
    "<!--<script>\u2028\u2029&lt;b&gt;",
    "\"'`${window.hit = 1}\\",
    "a\u202eright to left\u202c \u2066b\u0000\u0007\u001b[31m\ufeff",
    "é日本語😀 " * 9,
    "style=background:url(//example.org/x) javascript:window.hit=1",
]

# --- runs made by hand, in the formats of system/store.py and data.py ------------------


def make_data(folder, n, width=16, domains=20, a_document=10):
    """n train chunks of random bytes. Every document fills so many chunks, and the domains take
    turns."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    domain = (np.arange(n) // a_document % domains).astype(np.uint16)
    rows = rng.integers(97, 123, (n, width + 1), np.uint16)
    np.save(folder / "train.npy", rows)
    np.save(folder / "train_domain.npy", domain)
    np.save(folder / "val.npy", rows[:domains])
    np.save(folder / "val_domain.npy", np.arange(domains, dtype=np.uint16))
    names = []
    for d in range(domains):
        long_name = f"Domain {d} of a rather long name, as people give them"
        names.append(long_name if d % 3 else f"D{d}")
    first = np.arange(0, n, a_document)
    columns = {
        "doc": np.arange(len(first)),
        "domain": [names[domain[chunk]] for chunk in first],
        "source": ["some/file.jsonl"] * len(first),
        "record": np.arange(len(first)),
        "first_chunk": first,
        "first_token": np.zeros(len(first), np.int32),
        "n_tokens": np.full(len(first), a_document * (width + 1) - 1),
    }
    table = pyarrow.table(columns, DOCUMENTS)
    for split in ("train", "val"):
        pyarrow.parquet.write_table(table, folder / f"{split}_docs.parquet", row_group_size=1 << 20)
    digests = {path.name: hashlib.sha256(path.read_bytes()) for path in folder.iterdir()}
    meta = {
        "schema": data.SCHEMA,
        "tokenizer": "byte",
        "vocab_size": 256,
        "eot": 255,
        "block_size": width,
        "domains": names,
        "config": {},
        "footers": {},
        "chunks": {"train": n, "val": domains},
        "tokens": {"train": n * (width + 1), "val": domains * (width + 1)},
        "sha256": {name: digest.hexdigest() for name, digest in digests.items()},
    }
    write_json(folder / "meta.json", meta)
    return folder


def make_run(
    out, data_dir, steps, B=8, targets=("first", "second"), measured=True, audits=0, overshoot=None
):
    """A run as train.py leaves it: values of heavy tails, larger at first; momentum has a tenth of
    the loss drop.

    measured: whether every 20th step is. audits: how many steps are audited. overshoot: the step
    that outweighs all others.
    """
    out.mkdir()
    opened = data.open_dataset(data_dir)
    K = len(targets)
    n = len(opened.train.rows)
    rng = np.random.default_rng(1)
    options = {"n_layer": 2, "n_embd": 64, "n_head": 2, "batch_size": B, "max_iters": 2 * steps}
    cfg = train.Config(data_dir=str(data_dir), out_dir=str(out), **options)
    write_json(out / "config.json", {"config": vars(cfg)})
    visits = store.Records(out / "ledger.npy", store.visit_dtype(K))
    books = store.Records(out / "books.npy", store.book_dtype(K))
    total = np.zeros((n, K))
    used = np.zeros(n, bool)
    for start in range(0, steps, 1 << 16):
        step = np.arange(start, min(steps, start + (1 << 16)))
        rows = made_visits(visits.dtype, step, B, steps, n, rng)
        if overshoot in step:
            rows["value"][rows["step"] == overshoot, 0] = 9
        book = made_books(books.dtype, step, rows, measured)
        visits.pending = [rows]
        visits.commit()
        books.pending = [book]
        books.commit()
        store.add_visits(rows, total, used)
    files = {
        "values.npy": store.write_values(out, total, used),
        "ledger.npy": visits.counted(),
        "books.npy": books.counted(),
    }
    if audits:
        audit = np.repeat(store.record(store.audit_dtype(K), {}), audits)
        for name in store.AUDIT_ENTRIES:
            audit[name] = np.linspace(0.5, 0.9, audits)[:, None]
        records = store.Records(out / "audit.npy", audit.dtype)
        records.pending = [audit]
        records.commit()
        files["audit.npy"] = records.counted()
    info = {
        "schema": store.SCHEMA,
        "rule": "adamw",
        "batch": B,
        "data_hash": opened.hash,
        "committed_step": steps,
        "targets": [{"name": name} for name in targets],
        "sign": "positive = lowered the target's loss",
        "unit": "nats",
        "files": files,
    }
    write_json(out / "values.json", info)
    return out


def made_visits(dtype, step, B, steps, n_chunks, rng):
    """The visits of some of a run's steps (n,)."""
    rows = np.repeat(store.record(dtype, {}), len(step) * B)
    first = step[0] * B
    rows["step"] = np.repeat(step, B)
    rows["chunk"] = np.arange(first, first + len(rows)) * 7919 % n_chunks
    scatter = rng.standard_t(2, rows["value"].shape) + 0.5
    rows["value"] = scatter * 1e-4 / (1 + rows["step"][:, None] / steps)
    rows["loss"] = rng.normal(5, 1, len(rows))
    rows["early"] = rows["step"] < 3
    return rows


def made_books(dtype, step, visits, measured):
    book = np.repeat(store.record(dtype, {}), len(step))
    by_step = visits["value"].reshape(len(step), -1, visits["value"].shape[1])
    book["step"] = step
    book["data"] = by_step.sum(1)
    if measured:
        at = step % 20 == 0
        book["momentum"][at] = 0.001
        book["decay"][at] = 0
        book["residual"][at] = 0.0001
        book["before"][at] = 5
        book["after"][at] = 5 - book["data"][at] - 0.0011
    return book


# --- the browser ----------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import Error, sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    installed = [shutil.which(name) for name in names if shutil.which(name)]
    path = installed[0] if installed else None  # else playwright's own
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error:
            if path:
                raise
            what = f"no {' or '.join(names)} on the PATH, and none of playwright's own"
            pytest.skip(f"{what}: see tests/browser.sh")
        yield started
        started.close()


@pytest.fixture
def visit(browser):
    """visit(path, width) -> an open page. At the test's end nothing may have been asked for but the
    file, and nothing may have gone wrong: a breach of the content security policy is an error."""
    opened = []

    def go(path, width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        context.set_default_timeout(8000)
        tab = context.new_page()
        asked = []
        wrong = []

        def listen(message):
            if message.type in ("error", "warning"):
                wrong.append(message.text)

        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("console", listen)
        tab.goto(path.as_uri())
        opened.append((context, asked, wrong, path.as_uri()))
        return tab

    yield go
    for context, asked, wrong, uri in opened:
        context.close()
        assert asked == [uri]
        assert wrong == []


@pytest.fixture(scope="module")
def trained(python_data, tmp_path_factory):
    """A real run: bytes, two targets, books and an audit; and its report."""
    out = tmp_path_factory.mktemp("out") / "run"
    argv = [
        f"--out_dir={out}",
        f"--data_dir={python_data}",
        "--targets=val:Python code,val:Docstrings",
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=16",
        "--batch_size=4",
        "--warmup_iters=5",
        "--learning_rate=5e-3",
        "--max_iters=60",
        "--book_interval=3",
        "--audit_interval=20",
        "--checkpoint_interval=30",
        "--eval_interval=0",
        "--device=cpu",
        "--dtype=float32",
    ]
    train.train(config.load(train.Config, argv))
    return out


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    report(Config(run=str(trained), out=str(path)))
    return path


def cells(tab, table, column):
    return tab.locator(f"{table} tbody tr:not(.detail) td:nth-child({column})").all_inner_texts()


def numbers(texts):
    return [number(text) for text in texts]


def number(text):
    return float(text.replace("\u2212", "-").replace(",", "").rstrip("%"))


def content_of(tab):
    """The page's data."""
    return json.loads(tab.locator("#data").text_content())


# --- what the page says -----------------------------------------------------------


def test_the_first_screen_has_three_findings_and_the_medians(trained, written, visit):
    """As the command line words them, for the target that is chosen."""
    run = open_run(trained)
    tab = visit(written)
    domain = np.asarray(run.data.train.domain)[run.used]
    for k, target in enumerate(run.names):
        tab.get_by_label("Target").select_option(target)
        values = run.values[run.used, k]
        expected = findings.found(target, findings.by_domain(values, domain), run.domains)
        words = tab.locator("#findings li").all_inner_texts()
        assert len(words) == 3
        assert f"for {target}: {words[0]}".replace("\u2011", "-") == expected
        assert f"{(values < 0).mean():.0%} of the {len(values)} chunks used" in words[1]
        assert "20 measured steps; in 3 audited steps" in words[2]
    assert tab.locator("#next").inner_text() == f"python curate.py {trained}"
    for part in ("#findings", "#medians svg", "#next"):
        box = tab.locator(part).bounding_box()
        assert box["y"] + box["height"] < 900, part


def test_the_first_screen_names_the_best_and_the_worst_chunk_within_their_steps(
    trained, written, visit
):
    run = open_run(trained)
    score, _ = score_and_error(chunk_scores(run, 0, "share"), summed=False)
    words = visit(written).locator("#findings li").nth(1).inner_text()
    assert f"chunk {np.nanargmax(score)} (" in words.split(" helped most")[0]
    assert f"chunk {np.nanargmin(score)} (" in words.split(" helped most")[1]


def test_trust_comes_after_the_findings_and_the_facts_of_the_run_last(trained, written, visit):
    tab = visit(written)
    heads = tab.locator("h2").all_inner_texts()
    assert heads[0].startswith("What helped")
    assert heads[1] == "How far to trust the values"
    assert heads[-1] == "The run"
    assert not tab.locator("#reading p").first.is_visible()
    facts = tab.locator("#facts").inner_text()
    assert "of 60 (100%), 4 chunks each" in facts
    assert f"of {len(open_run(trained).values):,}" in facts
    assert "4 chunks speak for each in a step" in facts
    assert "trained to its end" in tab.locator("#lead").inner_text()
    assert "3 steps are marked early" in tab.locator("#warnings").inner_text()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "make 90% of the loss drop of 0.5000 nats in 7 measured steps; no step was compared"),
        ({"steps": 1}, "in 1 measured step;"),
        ({"steps": 0}, "no step was measured"),
        ({"parts": {"residual": None}}, "the loss did not fall over 7 measured steps"),
        ({"bad_books": True}, "Read them as a rough order, not as amounts."),
        ({"audit": {"steps": 1, "pearson": [0.98, 0.9]}}, "in 1 audited step they correlate with"),
        ({"audit": {"steps": 2, "pearson": [None, 0.9]}}, "by - (lowest 0.9000)"),
        (
            {"passes": {"steps": 1200, "in_two": 7, "checks": 1200, "failed": 7, "rough": 0}},
            "7 of 1,200 steps were valued in two passes, for 7 of 1,200 checks found",
        ),
    ],
)
def test_trust_in_a_sentence(changes, words):
    row = {"steps": 7, "drop": 0.5, "parts": {"residual": 0.1}, "audit": None}
    row |= {"bad_books": False, "bad_audit": False, "passes": None}
    assert words in payload.in_words(row | changes)


def test_the_cards_say_what_the_end_table_says_of_books_and_audit(trained, written, visit):
    run = open_run(trained)
    told = "\n".join(tables.account(run.books, run.audit, run.names, "adamw"))
    cards = visit(written).locator(".card").all_inner_texts()
    assert len(cards) == len(run.names)
    for k, card in enumerate(cards):
        line = told.split(f"books, {run.names[k]}: ")[1]
        in_table = float(line.split("add up to ")[1].split("%")[0])
        on_card = number(card.split(" of the drop")[0].split()[-1])
        assert abs(on_card - in_table) <= 0.51
        assert f"lowest {run.audit['pearson'][:, k].min():.4f}".rstrip("0") in card
        assert "3 audited steps" in card


def test_the_table_of_domains_has_medians_and_means_in_one_unit(trained, written, visit):
    run = open_run(trained)
    tab = visit(written)
    tab.locator("summary", has_text="These numbers").click()
    columns = [cells(tab, "#domain-table", column) for column in (1, 3, 9, 10)]
    assert len(columns[0]) == 3
    medians = numbers(columns[1])
    assert medians == sorted(medians, reverse=True)
    for name, median, mean, total in zip(*columns):
        chunks = run.used[run.data.train.domain[run.used] == run.domain(name)]
        values = run.values[chunks, 0].astype(float)
        assert median == findings.micro(np.median(values)).replace("-", MINUS)
        assert number(mean) == pytest.approx(1e6 * values.mean(), rel=1e-5, abs=0.06)
        assert number(total) == pytest.approx(values.sum(), rel=1e-3, abs=6e-5)


MINUS = "\u2212"


def test_values_are_in_one_unit_all_over_the_page(coloured):
    """A value of a chunk reads like the terminal's, and no power of ten stands anywhere."""
    tab, chunk = coloured
    content = content_of(tab)
    for button in tab.locator("summary:visible").all():
        button.click()
    text = tab.locator("body").inner_text() + " ".join(tab.locator("svg").all_text_contents())
    for word in ("10\u207b", "\u00b7 10", "per token"):
        assert word not in text
    assert text.count("1e-6 nats") > 8
    (row,) = [row for row in content["chunks"] if row["chunk"] == chunk]
    expected = findings.micro(row["values"][0]).replace("-", MINUS)
    assert cells(tab, "#chunk-table", 1)[0] == expected


@pytest.mark.parametrize("nats", [0.886, -1.5e-5, 9.99e-7, 0, -3e-8, 4e-11])
def test_a_value_is_written_as_the_terminal_writes_it(written, visit, nats):
    shown = visit(written).evaluate("nats => micro(nats)", nats)
    if nats == 0:
        assert shown == "0.0"
    else:
        assert number(shown) == number(findings.micro(nats))
        assert shown[0] == "+" if nats > 0 else MINUS


def test_the_list_of_chunks_begins_with_the_best_within_its_step(trained, written, visit):
    run = open_run(trained)
    tab = visit(written)
    score, _ = score_and_error(chunk_scores(run, 0, "share"), summed=False)
    assert numbers(cells(tab, "#chunk-table", 4))[0] == np.nanargmax(score)
    assert number(cells(tab, "#chunk-table", 2)[0]) == pytest.approx(np.nanmax(score), abs=6e-3)
    head = tab.locator("#chunk-table")
    head.get_by_role("button", name="Share").click()
    assert numbers(cells(tab, "#chunk-table", 4))[0] == np.nanargmin(score)


def test_the_list_of_chunks_has_the_largest_and_the_smallest_value(trained, written, visit):
    run = open_run(trained)
    tab = visit(written)
    head = tab.locator("#chunk-table").get_by_role("button", name="Value")
    head.click()
    assert numbers(cells(tab, "#chunk-table", 4))[0] == np.nanargmax(run.values[:, 0])
    head.click()
    assert numbers(cells(tab, "#chunk-table", 4))[0] == np.nanargmin(run.values[:, 0])


def test_an_open_chunk_shows_its_documents(written, visit):
    tab = visit(written)
    tab.locator("#chunk-table .open").first.click()
    detail = tab.locator(".detail:visible")
    assert "document" in detail.inner_text()
    assert detail.locator("bdi").first.is_visible()


def test_the_histogram_counts_every_chunk_used(trained, written, visit):
    counts = content_of(visit(written))["histogram"][0]["counts"]
    assert sum(map(sum, counts)) == len(open_run(trained).used)


def test_shares_of_the_drop_are_the_values_over_the_measured_drop(tmp_path):
    """By loops, from the ledger and the books."""
    run = open_run(make_run(tmp_path / "run", make_data(tmp_path / "data", 500, domains=3), 400))
    chart = payload.gather(run, Documents(run))["time"]["drop"]
    assert chart["edges"] == [0, 80, 160, 240, 320, 400]
    slots = payload.domains(run)[1]
    n_shares = 0
    for k, g, d in itertools.product(range(2), range(5), range(3)):
        start = 80 * g
        visits = run.visits[start * 8 : (start + 80) * 8]
        books = run.books[start : start + 80 : 20]
        drop = (books["before"] - books["after"])[:, k].astype(float)
        inside = run.data.train.domain[visits["chunk"]] == d
        per_step = visits["value"][inside, k].sum(dtype=float) / 80
        slot = slots[np.flatnonzero(run.data.train.domain == d)[0]]
        share = chart["values"][k][slot][g]
        if drop.mean() > 2 * drop.std(ddof=1) / 2:
            assert share == pytest.approx(per_step / drop.mean(), rel=1e-2)
            n_shares += 1
        else:
            assert share is None
    assert n_shares > 0


def test_the_cumulative_chart_ends_with_the_sum_of_all_values(tmp_path):
    run = open_run(make_run(tmp_path / "run", make_data(tmp_path / "data", 500, domains=3), 400))
    time_charts = payload.gather(run, Documents(run))["time"]
    cumulative = np.array(time_charts["sum"]["values"])
    expected = run.visits["value"].sum(0, dtype=float)
    assert cumulative[:, :, -1].sum(1) == pytest.approx(expected, rel=1e-3)


def test_shares_of_the_values_are_means_over_the_steps(tmp_path):
    """By loops, from the ledger: in all, and of each bar."""
    run = open_run(make_run(tmp_path / "run", make_data(tmp_path / "data", 500, domains=3), 64))
    content = payload.gather(run, Documents(run))
    slots = payload.domains(run)[1]
    bars = content["time"]["share"]["edges"]
    assert len(bars) == 17
    for k, d in itertools.product(range(2), range(3)):
        shares = []
        for step in range(64):
            visits = run.visits[8 * step : 8 * step + 8]
            values = visits["value"][:, k].astype(float)
            shares.append(values[slots[visits["chunk"]] == d].sum() / abs(values).sum())
        assert content["spread"]["share"][k][d] == pytest.approx(np.mean(shares), rel=1e-3)
        for bar, (start, end) in enumerate(itertools.pairwise(bars)):
            shown = content["time"]["share"]["values"][k][d][bar]
            assert shown == pytest.approx(np.mean(shares[start:end]), rel=1e-3)


@pytest.fixture(scope="module")
def overshot(tmp_path_factory):
    """The report of a run of which step 77 outweighs all others, for the first target."""
    folder = tmp_path_factory.mktemp("overshot")
    data_dir = make_data(folder / "data", 4000)
    run = make_run(folder / "run", data_dir, 200, overshoot=77, audits=3)
    report(Config(run=str(run), tokens=0))
    return run


def test_a_step_that_outweighs_all_others_is_named_on_the_first_screen(overshot, visit):
    tab = visit(overshot / "report.html")
    cautions = tab.locator("#cautions").inner_text()
    assert "step 77 alone holds" in cautions
    assert "medians do not" in cautions
    assert "more chunks or steps hold over a tenth each" in cautions
    tab.get_by_label("Target").select_option("second")
    assert "step 77" not in tab.locator("#cautions").inner_text()
    assert "correlate only 0.5" in tab.locator("#warnings").inner_text()


def test_a_step_that_outweighs_all_others_turns_no_figure_round(overshot, tmp_path, visit):
    """Medians and shares are nearly those of the same run without that step."""
    calm = make_run(tmp_path / "run", overshot.parent / "data", 200, audits=3)
    contents = []
    for path in (overshot, calm):
        run = open_run(path)
        contents.append(payload.gather(run, Documents(run)))
    with_step, without = (content["spread"] for content in contents)
    assert np.allclose(with_step["median"][0], without["median"][0], atol=3e-5)
    assert np.allclose(with_step["share"][0], without["share"][0], atol=2 / 200)
    assert max(map(abs, with_step["sum"][0])) > 5  # while the sums speak of it
    tab = visit(overshot / "report.html")
    notes = [text for text in tab.locator("#shares text").all_text_contents() if "\u2192" in text]
    shares = numbers(text.split("\u2192 ")[1] for text in notes)
    assert len(shares) == 20
    assert max(map(abs, shares)) <= 100


def test_where_one_chunk_holds_much_of_a_domain_it_is_named_in_the_table(overshot, visit):
    tab = visit(overshot / "report.html")
    tab.locator("summary", has_text="These numbers").click()
    named = [text for text in cells(tab, "#domain-table", 11) if text]
    assert len(named) > 4
    values = np.load(overshot / "values.npy")[:, 0]
    domain = np.load(overshot.parent / "data" / "train_domain.npy")
    for text in named:
        chunk, _, share = text.removeprefix("chunk ").partition(": ")
        sizes = np.abs(np.where(domain == domain[int(chunk)], values, np.nan))
        assert sizes[int(chunk)] == np.nanmax(sizes)
        assert number(share) == pytest.approx(100 * np.nanmax(sizes) / np.nansum(sizes), abs=0.51)
        assert number(share) >= 10


def test_a_median_within_two_errors_of_0_is_grey(tmp_path, visit):
    """One domain is clearly above 0, one clearly below, one neither; its mean is far above."""
    run = make_run(tmp_path / "run", make_data(tmp_path / "data", 300, domains=3), 60, B=5)
    visits = np.load(run / "ledger.npy")
    domain = np.load(tmp_path / "data" / "train_domain.npy")[visits["chunk"]]
    rng = np.random.default_rng(3)
    visits["value"] = rng.normal(0, 1e-5, visits["value"].shape)
    visits["value"][domain == 0] += 1e-4
    visits["value"][domain == 1] -= 1e-4
    visits["value"][domain == 2] -= np.median(visits["value"][domain == 2], 0) + 1e-7
    visits["value"][np.flatnonzero(domain == 2)[0]] = 1
    replace_visits(run, visits)
    report(Config(run=str(run), tokens=0))
    tab = visit(run / "report.html")
    for chart in ("#medians", "#spread"):
        sides = tab.locator(f"{chart} svg > g").evaluate_all(
            "nodes => nodes.map(n => n.classList[0])"
        )
        assert sides == ["help", "even", "hurt"], chart
    assert tab.locator("#shares svg > g").nth(1).get_attribute("class") == "even"
    row = tab.locator("#heat tbody tr", has_text="Domain 2")
    for cell in row.locator("td").all():
        assert cell.get_attribute("class") == "num even"
    colours = tab.locator("#heat tbody tr", has_text="D0").locator("td").first
    assert colours.get_attribute("class") == "num v5"


def replace_visits(run, visits):
    """Writes a run's ledger anew, and the values that are its sums."""
    total = np.zeros((len(np.load(run / "values.npy")), visits["value"].shape[1]))
    used = np.zeros(len(total), bool)
    store.add_visits(visits, total, used)
    store.write_values(run, total, used)
    replace_array(run, "values.npy", np.load(run / "values.npy"))
    replace_records(run, "ledger", visits)


def test_a_part_of_the_drop_below_0_is_explained_on_its_card(tmp_path, visit):
    run = make_run(tmp_path / "run", make_data(tmp_path / "data", 3000), 400)
    books = np.load(run / "books.npy")
    at = books["step"] % 20 == 0
    books["momentum"][at] = -0.0005
    books["after"][at] = books["before"][at] - 0.001
    books["data"][at] = 0.0015
    books["residual"][at] = 0
    replace_records(run, "books", books)
    report(Config(run=str(run), tokens=0))
    card = visit(run / "report.html").locator(".card").first.inner_text()
    assert "150%" in card
    assert "\u221250%" in card
    assert "the momentum of earlier chunks pulls against the chunks of the step" in card


def test_a_run_of_one_step_has_a_report_without_made_up_numbers(tmp_path, visit):
    """Nothing measured, one target, chunks used more than once."""
    data_dir = make_data(tmp_path / "data", 5, domains=1)
    run = make_run(tmp_path / "run", data_dir, 1, targets=("only",), measured=False)
    report(Config(run=str(run), tokens=1))
    tab = visit(run / "report.html")
    assert "after 1 of 2 steps" in tab.locator("#lead").inner_text()  # of a run that goes on
    assert "No step was measured yet" in tab.locator("#trust").inner_text()
    assert tab.get_by_label("share of the loss drop").is_disabled()
    assert "no step of this run was measured yet" in tab.locator("#time-off").inner_text()
    assert tab.locator("#time svg").count() == 1
    assert tab.locator("#heat-part").is_hidden()
    assert len(cells(tab, "#chunk-table", 1)) == 5


def test_a_measure_without_data_is_off_for_that_target_alone(tmp_path, visit):
    """The drop of the first target is noise. The page opens on bars, and turning to it from the
    other target's share of the drop leaves none empty."""
    run = make_run(tmp_path / "run", make_data(tmp_path / "data", 3000), 400)
    books = np.load(run / "books.npy")
    books["after"][::20, 0] = 5 + np.where(np.arange(20) % 2, 0.01, -0.01)
    books["after"][::20, 1] = 4.99
    replace_records(run, "books", books)
    report(Config(run=str(run), tokens=0))
    tab = visit(run / "report.html")
    drop = tab.get_by_label("share of the loss drop")
    bars = tab.locator("#time rect.help, #time rect.hurt")
    assert bars.count() > 100
    assert drop.is_disabled()
    assert "this target's mean drop" in tab.locator("#time-off").inner_text()
    tab.get_by_label("Target").select_option("second")
    assert tab.locator("#time-off").is_hidden()
    drop.check()
    assert bars.count() > 20
    tab.get_by_label("Target").select_option("first")
    assert not drop.is_checked()
    assert bars.count() > 100


# --- the page in use ----------------------------------------------------------------


CHARTS = (
    "#findings",
    "#medians",
    "#spread",
    "#shares",
    "#time",
    "#histogram",
    "#scatter",
    "#domain-table",
    "#chunk-table",
)


def drawn(tab, chart):
    return tab.locator(chart).inner_html()


def test_another_target_redraws_all_charts_and_the_list(trained, written, visit):
    run = open_run(trained)
    tab = visit(written)
    before = {chart: drawn(tab, chart) for chart in CHARTS}
    tab.get_by_label("Target").select_option("Docstrings")
    for chart in CHARTS:
        assert drawn(tab, chart) != before[chart], chart
    score, _ = score_and_error(chunk_scores(run, 1, "share"), summed=False)
    assert numbers(cells(tab, "#chunk-table", 4))[0] == np.nanargmax(score)
    assert tab.locator("b.target").first.inner_text() == "Docstrings"


UNITS = {
    "summed up, in nats": "",
    "share of the loss drop": "%",
    "share of the values of the same steps": "%",
}


def test_the_chart_over_time_has_three_measures_each_in_its_unit(written, visit):
    tab = visit(written)
    drawings = set()
    for label, unit in UNITS.items():
        tab.get_by_label(label).check()
        assert tab.locator("#time .tick").first.text_content().endswith(unit)
        drawings.add(drawn(tab, "#time"))
    assert len(drawings) == len(UNITS)


def test_the_charts_over_time_have_scales_of_their_own_when_asked(written, visit):
    tab = visit(written)
    before = drawn(tab, "#time")
    tab.get_by_label("a scale of its own").check()
    assert drawn(tab, "#time") != before


def test_the_histogram_of_one_domain_counts_its_chunks(trained, written, visit):
    run = open_run(trained)
    tab = visit(written)
    note = tab.locator("#histogram-note")
    assert int(note.inner_text().split()[0]) == len(run.used)
    tab.locator("#look").select_option("Python code")
    inside = run.data.train.domain[run.used] == run.domain("Python code")
    assert int(note.inner_text().split()[0]) == inside.sum()


def test_the_list_is_filtered_by_domain_and_sign(written, visit):
    tab = visit(written)
    tab.locator("#domain").select_option("Docstrings")
    assert set(cells(tab, "#chunk-table", 3)) == {"Docstrings"}
    tab.locator("#sign").select_option("raised it")
    assert max(numbers(cells(tab, "#chunk-table", 1))) < 0


def test_the_search_finds_a_chunk_by_its_number(written, visit):
    tab = visit(written)
    chunk = content_of(tab)["chunks"][11]["chunk"]
    tab.get_by_role("searchbox").fill(str(chunk))
    assert chunk in numbers(cells(tab, "#chunk-table", 4))


def test_the_search_finds_words_in_any_case(written, visit):
    tab = visit(written)
    rows = content_of(tab)["chunks"]
    word = max(rows[11]["text"].split(), key=len)
    tab.get_by_role("searchbox").fill(word.upper())
    n = 0
    for row in rows:
        texts = [row["text"], *(source for _, source, _ in row["documents"])]
        n += str(row["chunk"]) == word or any(word.lower() in text.lower() for text in texts)
    assert n > 0
    assert tab.locator("#found").inner_text().startswith(f"{n} chunk")


def test_a_search_for_nothing_there_finds_no_chunk_and_an_empty_one_all(written, visit):
    tab = visit(written)
    n = len(content_of(tab)["chunks"])
    tab.get_by_role("searchbox").fill("no such text anywhere")
    tab.get_by_role("searchbox").press("Enter")
    assert cells(tab, "#chunk-table", 1) == []
    assert tab.locator("#more").is_hidden()
    tab.get_by_role("searchbox").fill("")
    while tab.locator("#more").is_visible():
        tab.locator("#more").click()
    assert len(cells(tab, "#chunk-table", 1)) == n


def test_the_button_says_what_it_does_and_changes_the_colour_and_changes_it_back(written, visit):
    tab = visit(written)
    colour = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(colour)
    tab.get_by_role("button", name="Dark").click()
    assert tab.evaluate(colour) != light
    tab.get_by_role("button", name="Light").click()
    assert tab.evaluate(colour) == light
    assert tab.get_by_role("button", name="Dark").is_visible()


# the contrast (WCAG) of the button's text with its ground, and of its edge with the page
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((x) => x / 255);
    const [r, g, b] = parts.map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const button = getComputedStyle(document.getElementById("theme"));
  const page = getComputedStyle(document.body).backgroundColor;
  return [
    contrast(button.color, button.backgroundColor),
    contrast(button.borderTopColor, page),
  ];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_button_stands_out_in_both_themes(written, visit, scheme):
    text, edge = visit(written, color_scheme=scheme).evaluate(CONTRASTS)
    assert text > 7
    assert edge > 3


def test_the_charts_are_drawn_again_for_another_width(written, visit):
    tab = visit(written)
    before = drawn(tab, "#spread")
    tab.set_viewport_size({"width": 500, "height": 800})
    changed = "before => document.querySelector('#spread').innerHTML !== before"
    tab.wait_for_function(changed, arg=before)


def tab_to(tab, name):
    """Presses Tab until the focus is on a thing of this id or text -> those that had it."""
    focused = []
    while name not in focused:
        assert len(focused) < 60, focused
        tab.keyboard.press("Tab")
        focused.append(
            tab.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
    return focused


def test_the_keyboard_reaches_every_control(written, visit):
    focused = tab_to(visit(written), "Chunk")
    controls = {"target", "theme", "own", "look", "search", "domain", "sign", "Chunk"}
    assert controls <= set(focused)


def test_what_has_the_focus_has_a_ring(written, visit):
    tab = visit(written, color_scheme="dark")
    assert tab.locator("#theme").inner_text() == "Light"
    for _ in range(20):
        tab.keyboard.press("Tab")
        style = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style != "none"
        assert tab.evaluate("document.activeElement.matches(':focus-visible')")


def test_the_keyboard_sorts_the_list_both_ways_and_keeps_the_focus(written, visit):
    tab = visit(written)
    tab_to(tab, "Chunk")
    for direction in ("descending", "ascending"):
        tab.keyboard.press("Enter")
        head = tab.locator("#chunk-table th", has_text="Chunk")
        assert head.get_attribute("aria-sort") == direction
        assert tab.locator("#chunk-table [aria-sort]").count() == 1
        chunks = numbers(cells(tab, "#chunk-table", 4))
        assert chunks == sorted(chunks, reverse=direction == "descending")
        assert len(chunks) > 5
    assert tab.evaluate("document.activeElement.textContent") == "Chunk"


def test_a_click_on_a_head_sorts_the_list_by_it(written, visit):
    tab = visit(written)
    head = tab.locator("#chunk-table")
    head.get_by_role("button", name="Domain").click()
    domains = cells(tab, "#chunk-table", 3)
    assert domains == sorted(domains, key=str.lower)
    for title, column in (("Loss", 6), ("Step", 5)):
        head.get_by_role("button", name=title).click()
        figures = numbers(text.split()[0] for text in cells(tab, "#chunk-table", column))
        assert figures == sorted(figures, reverse=True)


@pytest.fixture
def coloured(trained, written, visit):
    """-> the page with the tokens of its first chunk open, and that chunk's number."""
    tab = visit(written)
    tab.locator("#chunk-table .open").first.click()
    return tab, int(numbers(cells(tab, "#chunk-table", 4))[0])


def test_twenty_chunks_have_coloured_tokens(trained, coloured):
    run = open_run(trained)
    tab, chunk = coloured
    content = content_of(tab)
    assert sum("tokens" in row for row in content["chunks"]) == 20
    assert content["token_step"] == 60
    assert content["chunks"][0]["chunk"] == chunk
    pieces = tab.locator(".tokens span").all_text_contents()
    assert len(pieces) == run.width
    assert "".join(pieces) == "".join(run.pieces(chunk)[:-1])
    assert "after step 60" in tab.locator(".detail:visible").inner_text()


def value_in_title(span):
    """A token's value in nats, as its title says it, as "+26.4 (1e-6 nats)"."""
    return 1e-6 * number(span.get_attribute("title").removesuffix(" (1e-6 nats)"))


def level(span):
    """A token's colour, from -5 to 5."""
    name = span.get_attribute("class") or ""
    return int(name.removeprefix("v") or 0)


def test_tokens_have_the_values_of_the_chosen_target(trained, coloured):
    """An open chunk stays open and is coloured for the other target."""
    run = open_run(trained)
    tab, chunk = coloured
    _, expected = revalue.tokens(run, [chunk])  # (1, 32, 2)
    for k, target in enumerate(run.names):
        tab.get_by_label("Target").select_option(target)
        tab.get_by_role("searchbox").fill(str(chunk))
        largest = np.abs(expected[0, :, k]).max()
        for t in range(run.width):
            span = tab.locator(".tokens span").nth(t)
            value = value_in_title(span)
            # two digits, of thousandths of the largest
            assert value == pytest.approx(expected[0, t, k], rel=0.05, abs=1e-3 * largest)
            assert level(span) == 0 or (level(span) > 0) == (value > 0)


def test_the_tokens_sum_stands_beside_the_chunks_value(trained, coloured):
    """With the steps that both are of, for they are of different weights."""
    run = open_run(trained)
    tab, chunk = coloured
    step = run.visits["step"][run.visits["chunk"] == chunk][0]
    _, values = revalue.tokens(run, [chunk])
    words = tab.locator(".detail:visible").inner_text()
    there, own = tab.locator(".detail:visible b").all_inner_texts()
    assert number(there) == pytest.approx(1e6 * values[0, :, 0].sum(), rel=1e-3, abs=0.1)
    assert number(own) == pytest.approx(1e6 * run.values[chunk, 0], rel=1e-5, abs=0.06)
    assert "with the weights after step 60" in words
    assert f"in its own step, {step}" in words


def test_keys_and_the_mouse_name_a_token(coloured):
    tab, _ = coloured
    output = tab.locator("output")
    tab.locator(".tokens").focus()
    tab.keyboard.press("ArrowRight")
    assert "Token 1 of 32" in output.inner_text()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowLeft")
    assert "Token 10 of 32" in output.inner_text()
    tab.locator(".tokens span").nth(20).hover()
    assert "Token 21 of 32" in output.inner_text()


def test_the_whole_text_takes_the_place_of_coloured_tokens(coloured):
    tab, chunk = coloured
    tab.get_by_role("button", name=f"Whole text of chunk {chunk}").click()
    assert tab.locator(".tokens").count() == 0


def test_no_tokens_are_coloured_where_none_are_asked_for(trained, visit, tmp_path):
    report(Config(run=str(trained), out=str(tmp_path / "none.html"), tokens=0))
    tab = visit(tmp_path / "none.html")
    assert tab.locator(".open").count() > 0
    assert tab.locator(".open", has_text="coloured").count() == 0


def test_no_tokens_are_coloured_without_a_checkpoint(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("ckpt*"))
    report(Config(run=str(tmp_path / "run")))
    assert "without coloured tokens: " in capsys.readouterr().out
    assert b'"tokens":{' not in (tmp_path / "run" / "report.html").read_bytes()


def test_a_loss_that_fell_in_early_steps_alone_has_no_share_of_the_later_drop(tmp_path, visit):
    run = make_run(tmp_path / "run", make_data(tmp_path / "data", 3000), 400)
    books = np.load(run / "books.npy")
    books["after"][0] = 1
    books["after"][20:] = books["before"][20:] + 0.01
    replace_records(run, "books", books)
    report(Config(run=str(run)))
    cards = visit(run / "report.html").locator("#trust").inner_text()
    assert "of the drop is what values" in cards
    for word in ("null", "undefined", "NaN", "marked early"):
        assert word not in cards


@pytest.mark.parametrize("replay", [True, False])
def test_values_that_came_later_have_a_report_too(trained, tmp_path, visit, replay):
    options = {"replay": replay, "start": 30, "target_batch": 2, "name": f"later-{replay}"}
    folder = revalue.revalue(revalue.Config(run=str(trained), **options))
    report(Config(run=str(folder), out=str(tmp_path / "report.html")))
    tab = visit(tmp_path / "report.html")
    warnings = " ".join(tab.locator(".warning").all_inner_texts())
    nearest = "approximate: weights and moments are those of the nearest checkpoint"
    assert (nearest in warnings) == (not replay)
    content = content_of(tab)
    assert content["run"]["first"] == 30
    assert min(row["step"] for row in content["chunks"]) >= 30
    assert content["token_step"] == 60
    total = np.nansum(open_run(folder).values, 0)
    shown = np.array(content["time"]["sum"]["values"])[:, :, -1].sum(1)
    np.testing.assert_allclose(shown, total, rtol=1e-3)


# --- hindsight ------------------------------------------------------------------------

SCORES = {  # what a check found: correlation, its interval, slope and its error
    "hindsight": (0.93, 0.65, 0.99, 1.417, 0.229),
    "value in its step": (0.59, -0.2, 0.91, 0.00562, 0.00314),
    "training loss": (0.28, -0.53, 0.82, None, None),
}


def made_check(targets):
    entries = {}
    for score, (pearson, low, high, slope, error) in SCORES.items():
        entries[score] = {"pearson": pearson, "low": low, "high": high, "spearman": pearson}
        if slope is not None:
            entries[score] |= {"slope": slope, "slope_error": error}
    of_target = {"loss": 3.25, **entries}
    return {
        "sets": 40,
        "fraction": 0.02,
        "first_step": 30,
        "targets": {name: of_target for name in targets},
    }


def look_back(run, name, n_early=30, check=True):
    """What revalue.py --hindsight leaves below a run that was made by hand. Returns the folder."""
    folder = run / "revalued" / name
    ignored = shutil.ignore_patterns("revalued", "report.html")
    shutil.copytree(run, folder, ignore=ignored)
    about = json.loads((folder / "values.json").read_text())
    targets = [target["name"] for target in about["targets"]]
    K, steps = len(targets), about["committed_step"]
    adjoint = np.zeros(steps, store.adjoint_dtype(K))
    adjoint["step"] = np.arange(steps)
    adjoint["norm"] = np.where(np.arange(steps) < n_early, 5000.0, 0.7)[:, None]
    records = store.Records(folder / "adjoint.npy", adjoint.dtype)
    records.pending = [adjoint]
    records.commit()
    change(folder / "values.json", files=about["files"] | {"adjoint.npy": records.counted()})
    books = np.load(folder / "books.npy")
    for entry in store.BOOK_ENTRIES:
        books[entry] = np.nan
    replace_records(folder, "books", books)
    visits = np.load(folder / "ledger.npy")
    visits["early"] = visits["step"] < n_early
    replace_records(folder, "ledger", visits)
    change(
        folder / "values.json",
        rule="hindsight",
        method="hindsight",
        of=str(run),
        horizon=0,
        steps=[0, steps],
        meaning="of the loss at the end",
        loss_at_end=dict.fromkeys(targets, 3.25),
        check=made_check(targets) if check else None,
    )
    return folder


def page_of(folder, out):
    report(Config(run=str(folder), out=str(out), tokens=0))
    return out


@pytest.fixture(scope="module")
def looked_back(tmp_path_factory):
    """A run, and beside it its hindsight: the folder of the latter."""
    path = tmp_path_factory.mktemp("looked_back")
    run = make_run(path / "run", make_data(path / "data", 800, domains=4), 120)
    return look_back(run, "checked")


def test_the_first_screen_says_which_kind_of_value_it_shows(looked_back, tmp_path, visit):
    run = looked_back.parent.parent
    lead = visit(page_of(looked_back, tmp_path / "a.html")).locator("#lead").inner_text()
    assert "Values in hindsight: what the visits of a chunk are worth" in lead
    assert lead.endswith("for the target's loss at the run's end.")
    lead = visit(page_of(run, tmp_path / "b.html")).locator("#lead").inner_text()
    assert lead.endswith(
        "Values in their steps: what a chunk did to the target's loss in the steps that trained "
        "on it."
    )


def test_the_trust_in_hindsight_is_its_check(looked_back, tmp_path, visit):
    tab = visit(page_of(looked_back, tmp_path / "a.html"))
    trust = tab.locator("#findings li").nth(2).inner_text()
    assert trust == (
        "Trust: in 40 trainings without 2% of the visits each, hindsight predicted the change of "
        "the loss with a correlation of 0.93 (0.65 to 0.99); the values in their steps with 0.59 "
        "(-0.20 to 0.91)."
    )
    card = tab.locator("#trust .card").first
    assert "Its loss at the end is 3.2500 nats." in card.inner_text()
    assert "(visits of steps 30 to 119)" in card.inner_text()
    rows = card.locator("tbody tr").all_inner_texts()
    assert [row.split("\t") for row in rows] == [
        ["hindsight", "0.93", "0.65 to 0.99", "1.4 \u00b1 0.23"],
        ["value in its step", "0.59", "\u22120.20 to 0.91", "0.0056 \u00b1 0.0031"],
        ["training loss", "0.28", "\u22120.53 to 0.82", "\u2013"],
    ]


def test_a_page_of_hindsight_has_no_books_and_no_audit(looked_back, tmp_path, visit):
    tab = visit(page_of(looked_back, tmp_path / "a.html"))
    tab.locator("#reading summary").click()
    words = tab.locator("main").inner_text()
    assert "measured step" not in words
    assert "audit" not in words
    assert "momentum" not in words
    assert "their sum is about 0" in tab.locator("#reading").inner_text()
    assert "hindsight" in tab.locator("#time-off").inner_text()


def test_the_adjoint_is_drawn_with_its_early_part_shaded(looked_back, tmp_path, visit):
    tab = visit(page_of(looked_back, tmp_path / "a.html"))
    note = tab.locator("#adjoint-note").inner_text()
    assert "Shaded: 30 early steps. There |dL/dw| is far above" in note
    shade = tab.locator("#adjoint rect.gap").bounding_box()
    curve = tab.locator("#adjoint path.curve").bounding_box()
    assert shade["x"] == pytest.approx(curve["x"], abs=6)
    assert shade["width"] == pytest.approx(curve["width"] * 30 / 119, rel=0.03)
    ticks = tab.locator("#adjoint .tick").all_text_contents()
    assert {"0.1", "1", "10", "100", "1,000", "10,000"} <= set(ticks)
    assert content_of(tab)["hindsight"]["norms"][1] == [5000] * 30 + [0.7] * 90
    warnings = " ".join(tab.locator("#warnings .warning").all_inner_texts())
    assert "30 steps are marked early. There |dL/dw| is far above" in warnings


def test_where_the_adjoint_is_calm_nothing_is_shaded(looked_back, tmp_path, visit):
    run = shutil.copytree(looked_back.parent.parent, tmp_path / "run")
    tab = visit(page_of(look_back(run, "calm", n_early=0), tmp_path / "a.html"))
    assert "It is never large in the first half" in tab.locator("#adjoint-note").inner_text()
    assert tab.locator("#adjoint rect.gap").count() == 0


def test_a_run_has_no_chart_of_the_adjoint(looked_back, tmp_path, visit):
    tab = visit(page_of(looked_back.parent.parent, tmp_path / "a.html"))
    assert not tab.locator("#adjoint-part").is_visible()


def test_the_report_of_a_run_says_how_well_its_own_values_predict(looked_back, tmp_path, visit):
    tab = visit(page_of(looked_back.parent.parent, tmp_path / "a.html"))
    for card in tab.locator("#trust .card").all():
        assert (
            "In 40 trainings without 2% of the visits each, the values in their steps predicted "
            "the change of the loss with a correlation of 0.59 (-0.20 to 0.91), not clearly above "
            "0; hindsight with 0.93 (0.65 to 0.99) (visits of steps 30 to 119)."
        ) in card.inner_text()
        assert card.locator("tbody tr").count() == 3


@pytest.mark.parametrize("is_hindsight", [True, False])
def test_without_a_check_the_page_has_the_command_that_makes_one(tmp_path, visit, is_hindsight):
    run = make_run(tmp_path / "run", make_data(tmp_path / "data", 800, domains=4), 60)
    folder = look_back(run, "other", check=False)
    tab = visit(page_of(folder if is_hindsight else run, tmp_path / "a.html"))
    card = tab.locator("#trust .card").first.inner_text()
    command = f"python revalue.py {run} --hindsight --check=40"
    command += " --name=other --targets=val" if is_hindsight else ""
    assert f"predict a training without visits: {command}" in card
    narrow = visit(tmp_path / "a.html", 390)  # however long the command is
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 390
    assert (tab.locator("#next").inner_text() == command) == is_hindsight
    if is_hindsight:
        trust = tab.locator("#findings li").nth(2).inner_text()
        assert trust.startswith("Trust: it was not tried how well these values predict")


def test_a_hostile_score_of_a_check_is_shown_as_text(looked_back, tmp_path, visit):
    run = shutil.copytree(looked_back.parent.parent, tmp_path / "run")
    folder = run / "revalued" / "checked"
    check = made_check(["first", "second"])
    for entries in check["targets"].values():
        entries[HOSTILE[1]] = entries["training loss"]
    change(folder / "values.json", check=check, meaning=HOSTILE[0])
    for path in (folder, run):
        tab = visit(page_of(path, tmp_path / "a.html"))
        assert "<img src=x onerror" in tab.locator("#trust .card").first.inner_text()
        assert tab.locator("img").count() == 0
        assert tab.evaluate("window.hit") is None


@pytest.mark.parametrize("width", [1280, 390])
def test_labels_of_hindsight_do_not_collide(looked_back, tmp_path, visit, width):
    tab = visit(page_of(looked_back, tmp_path / "a.html"), width)
    assert tab.evaluate(COLLISIONS) == []
    assert tab.evaluate(CUT_HEADS) == 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


# texts of a chart that overlap, or that leave it
COLLISIONS = """() => [...document.querySelectorAll("svg")].flatMap((svg) => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].map(
    (text) => [text.textContent, text.getBoundingClientRect()]);
  const overlap = (a, b, from, to) => Math.min(a[to], b[to]) - Math.max(a[from], b[from]);
  const collide = (a, b) =>
    overlap(a, b, "left", "right") > 1 && overlap(a, b, "top", "bottom") > 3;
  const isOut = (box) =>
    box.left < frame.left - 2 || box.right > frame.right + 2 || box.bottom > frame.bottom + 3;
  const out = texts.filter(([, box]) => isOut(box)).map(([text]) => "out: " + text);
  return out.concat(texts.flatMap(([text, box], i) =>
    texts.slice(i + 1).filter(([, other]) => collide(box, other))
      .map(([other]) => text + " | " + other)));
})"""
CUT_HEADS = """[...document.querySelectorAll("th")]
  .filter((head) => head.scrollWidth > head.clientWidth + 1).length"""


@pytest.mark.parametrize("width", [1280, 390])
def test_labels_do_not_collide(tmp_path, visit, width):
    """Twenty domains, most with long names: no two texts of a chart overlap, none leaves it, and
    the page does not scroll sideways."""
    data_dir = make_data(tmp_path / "data", 3000)
    targets = ("a target with a long name, as it happens", "b")
    run = make_run(tmp_path / "run", data_dir, 400, targets=targets)
    report(Config(run=str(run), tokens=3))
    tab = visit(run / "report.html", width)
    assert tab.locator("svg text").count() > 100
    for label in UNITS:
        tab.get_by_label(label).check()
        assert tab.evaluate(COLLISIONS) == []
    assert tab.evaluate(CUT_HEADS) == 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_a_page_without_scripts_says_that_it_needs_them(written, browser):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(written.as_uri())
    assert tab.locator("noscript p").is_visible()
    assert "allow scripts" in tab.locator("noscript p").inner_text()
    context.close()


# --- text that means harm -----------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page of a run whose texts and names mean harm."""
    folder = tmp_path_factory.mktemp("hostile")
    documents = [{"text": text * 40, "meta": {"pile_set_name": text}} for text in HOSTILE] * 8
    long_name = {"pile_set_name": "a line of a megabyte"}
    documents.append({"text": "x" * 1_000_000, "meta": long_name})
    source = folder / "<img src=y onerror=window.hit=1>.jsonl"
    source.write_text("".join(json.dumps(document) + "\n" for document in documents))
    options = {"tokenizer": "byte", "block_size": 61, "val_fraction": 0.1, "workers": 1}
    prepare_pile.prepare(
        prepare_pile.Config(source=str(source), data_dir=str(folder / "data"), **options)
    )
    run = make_run(folder / "run", folder / "data", 600, B=40, targets=HOSTILE[:2])
    report(Config(run=str(run), tokens=40))
    return run / "report.html"


def test_hostile_text_adds_no_element_to_the_source_of_the_page(hostile):
    text = hostile.read_text(encoding="utf-8")
    assert text.count("<script") == 2
    assert text.count("</script") == 2
    assert "<img" not in text
    assert "\u2028" not in text


def test_hostile_text_adds_no_element_to_the_page_in_use(hostile, visit):
    tab = visit(hostile)
    while tab.locator("#more").is_visible():
        tab.locator("#more").click()
    for button in tab.locator("#chunk-table .open").all()[:60]:
        button.click()
    tab.get_by_label("Target").select_option(index=1)
    tab.get_by_role("searchbox").fill("window.hit = 1")
    assert len(cells(tab, "#chunk-table", 1)) > 3
    for search in ("window.hit = 1", ""):
        tab.get_by_role("searchbox").fill(search)
        assert tab.locator("img, iframe, object, link, svg script, td script, bdi *").count() == 0
        assert tab.evaluate("window.hit") is None
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1280


def test_hostile_names_are_shown_with_their_control_characters_made_visible(hostile, visit):
    tab = visit(hostile)
    names = tab.locator("#heat th[scope=row]").all_inner_texts()
    assert HOSTILE[0] in names
    assert HOSTILE[1] in names
    (turned,) = [name for name in names if "[U+202E]" in name]
    assert "\u2400" in turned
    assert "\u202e" not in turned


def test_hostile_text_of_chunks_is_shown_as_text(hostile, visit):
    tab = visit(hostile)
    while tab.locator("#more").is_visible():
        tab.locator("#more").click()
    for button in tab.locator("#chunk-table .open").all()[:60]:
        button.click()
    text = tab.locator("body").inner_text()
    assert not {"\u202e", "\u2066", "\x00", "\x07"} & set(text)
    assert "\ufffd" in text
    assert tab.locator(".detail:visible bdi", has_text="<img src=y").count() > 0


def test_the_policy_refuses_another_script_a_style_attribute_and_an_image(
    written, tmp_path, browser
):
    """The policy itself, against a page that was tampered with."""
    harm = '<script>window.hit = 1</script><p id="styled" style="color: rgb(1, 2, 3)">x</p>'
    harm += '<img src="https://example.org/x.png" onerror="window.hit = 1">'
    (tmp_path / "bad.html").write_text(written.read_text().replace("</main>", harm + "</main>"))
    tab = browser.new_page()
    refused = []
    tab.on("console", lambda message: refused.append(message.text))
    tab.goto((tmp_path / "bad.html").as_uri())
    assert tab.evaluate("window.hit") is None
    assert tab.evaluate("getComputedStyle(styled).color") != "rgb(1, 2, 3)"
    assert sum("Content Security Policy" in text for text in refused) >= 3
    tab.close()


def test_encoded_json_ends_no_script_element():
    text = "</script>\u2028\u2029&\ud800\x00é"
    encoded = payload.encode({"a": text})
    assert json.loads(encoded) == {"a": text}
    assert not set(b"<>&") & set(encoded)
    assert "\u2028" not in encoded.decode()


def test_numbers_have_four_digits_and_none_stands_for_no_number():
    assert payload.num([[1 / 3, np.nan], [np.inf, 2]]) == [[0.3333, None], [None, 2.0]]


def test_a_text_is_cut_to_the_bytes_of_its_json():
    assert len(payload.encode(payload.fit("<\x00é" * 1000, 500))) <= 502
    assert payload.fit("abc", 500) == "abc"


# --- the command ---------------------------------------------------------------------


def test_report_says_where_the_page_is_the_finding_and_what_is_next(trained):
    """In a process of its own."""
    command = [sys.executable, ROOT / "report.py", str(trained), "--tokens=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where, finding, following = done.stdout.splitlines()
    assert where.startswith(f"{trained}/report.html: 0.")
    assert finding.startswith("for Python code: ")
    assert "(median chunk " in finding
    assert following == f"next: python curate.py {trained}"
    assert b"tokens_step" not in (trained / "report.html").read_bytes()
    assert not list(trained.glob("*.tmp"))


@pytest.mark.parametrize(
    "argv, answer",
    [
        ([], "name one that train.py wrote"),
        (["nowhere"], "does not exist"),
        (["RUN", "--tokens=100000"], "type --tokens="),
        (["RUN", "--data_dir=."], "no prepared data"),
        (["RUN", "--tokes=1"], "did you mean 'tokens'"),
        (["RUN", "--tokens=0", "--out=none/x.html"], "--out=none/x.html: there is no folder none"),
        (["RUN", "--tokens=0", "--out=."], "--out=. is a folder: name a file in it"),
        (["RUN", "--against=nowhere"], "nowhere does not exist"),
        (["RUN", "--against=a,b,c,d,e,f,g,h"], "room for 7, name fewer"),
    ],
)
def test_report_refuses_wrong_arguments_in_one_line(
    trained, tmp_path, monkeypatch, capsys, argv, answer
):
    monkeypatch.chdir(tmp_path)
    argv = [str(trained) if word == "RUN" else word for word in argv]
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: report(config.load(Config, argv)))
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert answer in line
    assert line.count("\n") == 1, line


def test_the_page_has_one_style_element_and_no_style_attribute(written):
    text = written.read_text()
    assert text.count("<style") == 1
    assert " style=" not in text.split("<script>")[0]
    assert "default-src 'none'" in text


PARSING = ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(")


@pytest.mark.parametrize("word", PARSING)
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_of_the_page_parse_nothing(script, word):
    assert word not in (ROOT / "show" / script).read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_of_the_page_have_lines_of_100_columns(script):
    lines = (ROOT / "show" / script).read_text().splitlines()
    assert len(lines) > 50
    assert max(map(len, lines)) <= 100


def test_a_page_that_cannot_be_written_is_named_as_it_was_typed(trained, tmp_path, monkeypatch):
    """Not by the temporary file, which nobody typed."""
    out = tmp_path / ("x" * 250 + ".html")  # with .tmp it is longer than a name may be
    with pytest.raises(OSError) as error:
        report(Config(run=str(trained), tokens=0, out=str(out)))
    assert error.value.filename == str(out)


# --- losses beside those of other runs -------------------------------------------------


def add_losses(run, steps, loss):
    """Gives a run evaluations: loss(step) of the first domain, a nat more of the second."""
    lines = []
    for step in steps:
        by_domain = {"one": loss(step), "</script>two": loss(step) + 1}
        lines.append({"step": step, "val": loss(step) + 0.5, "loss": by_domain})
    write_lines(run / "evaluations.jsonl", lines)


@pytest.fixture
def two_runs(tmp_path):
    data_dir = make_data(tmp_path / "data", 300, domains=3)
    run = make_run(tmp_path / "run", data_dir, 40)
    control = make_run(tmp_path / "control", data_dir, 40)
    add_losses(run, range(0, 41, 10), lambda step: 5 - step / 20)
    add_losses(control, range(0, 61, 20), lambda step: 5 - step / 25)
    return run, control


def test_losses_stand_beside_those_of_another_run_at_common_steps(two_runs, visit):
    run, control = two_runs
    report(Config(run=str(run), against=str(control), tokens=0))
    tab = visit(run / "report.html")
    section = tab.locator("#losses")
    assert section.locator("h2").inner_text() == "Validation loss beside control"
    note = tab.locator("#losses-note").inner_text()
    assert "After 40 steps" in note
    assert "3.5000 nats for run, 3.9000 for control (0.4000 higher)" in note
    assert "says nothing about the spread over seeds" in note
    assert tab.locator("#losses-key .key").all_inner_texts() == ["run", "control"]
    assert section.locator("#losses-chart path").count() == 2
    section.locator("summary").click()
    assert cells(tab, "#losses-steps", 1) == ["0", "20", "40"]
    assert cells(tab, "#losses-steps", 2) == ["5.5000", "4.5000", "3.5000"]
    assert cells(tab, "#losses-steps", 3) == ["5.5000", "4.7000", "3.9000"]
    assert cells(tab, "#losses-steps", 4) == ["0.0000", "+0.2000", "+0.4000"]
    assert set(cells(tab, "#losses-domains", 1)) == {"one", "</script>two"}
    assert cells(tab, "#losses-domains", 4) == ["+0.4000", "+0.4000"]


def test_another_run_that_is_not_there_is_an_error(two_runs):
    run, _ = two_runs
    with pytest.raises(UserError, match="nowhere does not exist"):
        report(Config(run=str(run), against="nowhere", tokens=0))
    assert not (run / "report.html").exists()


def test_without_other_runs_the_runs_own_losses_are_shown(trained, two_runs, visit):
    run, _ = two_runs
    report(Config(run=str(run), tokens=0))
    tab = visit(run / "report.html")
    assert tab.locator("#losses h2").inner_text() == "Validation loss"
    assert "seeds" not in tab.locator("#losses-note").inner_text()
    assert tab.locator("#losses-chart path").count() == 1


def test_a_run_without_losses_has_no_part_for_them(written, visit):
    assert visit(written).locator("#losses").is_hidden()


def test_damaged_losses_cost_the_page_its_losses_alone(two_runs, capsys):
    run, _ = two_runs
    (run / "evaluations.jsonl").write_text('{"step": 1}\n')
    report(Config(run=str(run), tokens=0))
    assert "without validation losses: " in capsys.readouterr().out
    assert (run / "report.html").is_file()


def test_many_evaluations_are_thinned_and_the_last_stays(two_runs):
    run, _ = two_runs
    add_losses(run, range(2001), lambda step: 5 - step / 1000)
    content = payload.beside([losses(run)])
    assert len(content["steps"]) == payload.EVALUATIONS
    assert content["steps"][-1] == 2000
    assert len(content["curves"][0]["steps"]) == payload.LOSSES


# --- how large a page gets ------------------------------------------------------------


def test_ten_million_visits_of_a_million_chunks_are_shown_in_20_s_and_1_gb(tmp_path):
    """And on a page below 2 MB. The peak is the new process's own: getrusage's would begin with
    that of this one."""
    data_dir = make_data(tmp_path / "data", 1_000_000)
    run = make_run(tmp_path / "run", data_dir, 625_000, B=16, audits=4)
    code = f"import report; report.report(report.Config(run={str(run)!r}, tokens=0)); "
    code += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of one processor, for other tests run beside this one
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0, done.stderr
    kilobytes = int(done.stdout.split()[-1])
    assert seconds < 20
    assert kilobytes < 1e6
    assert (run / "report.html").stat().st_size < 2e6


def test_the_page_stays_small_with_long_chunks_and_many_targets(tmp_path):
    data_dir = make_data(tmp_path / "data", 3000, width=1024)
    targets = [f"target {k}" for k in range(8)]
    run = open_run(make_run(tmp_path / "run", data_dir, 400, targets=targets))
    content = payload.gather(run, Documents(run))
    shape = (payload.room(run), run.width, 8)
    values = np.random.default_rng(2).normal(size=shape)  # of no model: their size counts
    payload.add_tokens(content, run, 7, values)
    assert 0.5e6 < len(payload.encode(content)) < 1.9e6


@pytest.mark.parametrize("n_targets, n_domains", [(30, 60), (100, 60)])
def test_the_page_stays_small_whatever_the_targets_and_domains(tmp_path, n_targets, n_domains):
    targets = [f"target {k} of a long name" for k in range(n_targets)]
    data_dir = make_data(tmp_path / "data", 3000, width=1024, domains=n_domains)
    run = open_run(make_run(tmp_path / "run", data_dir, 400, targets=targets))
    content = payload.gather(run, Documents(run))
    most = min(20, payload.room(run))
    payload.add_tokens(content, run, 7, np.ones((most, run.width, n_targets)))
    assert len(content["chunks"]) >= 100
    assert len(payload.encode(content)) < 1.9e6
