"""The report, made of real runs and of large and hostile ones, and used in a real browser as a person would."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sealed import replace_records

import config
import data
import prepare_pile
import revalue
import train
from pile.pack import DOCUMENTS
from report import Config, report
from show import page as payload
from show import tables
from show.documents import Documents
from show.run import open_run
from system import store
from system.files import write_json

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

# --- runs made by hand, in the formats of ledger.py and data.py -----------------


def make_data(folder, n, width=16, domains=20, a_document=10):
    """n train chunks of random bytes; every document fills so many chunks, and the domains take turns."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    rng, of = np.random.default_rng(0), (np.arange(n) // a_document % domains).astype(np.uint16)
    arrays = {"train.npy": rng.integers(97, 123, (n, width + 1), np.uint16), "train_domain.npy": of}
    arrays |= {
        "val.npy": arrays["train.npy"][:domains],
        "val_domain.npy": np.arange(domains, dtype=np.uint16),
    }
    for name, array in arrays.items():
        np.save(folder / name, array)
    names = [
        f"Domain {d} of a rather long name, as people give them" if d % 3 else f"D{d}"
        for d in range(domains)
    ]
    first = np.arange(0, n, a_document)
    columns = dict(
        doc=np.arange(len(first)),
        domain=[names[of[chunk]] for chunk in first],
        source=["some/file.jsonl"] * len(first),
    )
    columns |= dict(
        record=np.arange(len(first)), first_chunk=first, first_token=np.zeros(len(first), np.int32)
    )
    columns |= dict(n_tokens=np.full(len(first), a_document * (width + 1) - 1))
    table = pyarrow.table(columns, DOCUMENTS)
    for split in ("train", "val"):
        pyarrow.parquet.write_table(table, folder / f"{split}_docs.parquet", row_group_size=1 << 20)
    meta = dict(schema=data.SCHEMA, tokenizer="byte", vocab_size=256, eot=255, block_size=width)
    meta |= dict(domains=names, config={}, footers={}, chunks=dict(train=n, val=domains))
    meta["tokens"] = {"train": n * (width + 1), "val": domains * (width + 1)}
    digests = {path.name: hashlib.sha256(path.read_bytes()) for path in folder.iterdir()}
    meta["sha256"] = {name: digest.hexdigest() for name, digest in digests.items()}
    write_json(folder / "meta.json", meta)
    return folder


def make_run(
    out, data_dir, steps, B=8, targets=("first", "second"), measured=True, audits=0, overshoot=None
):
    """A run as train.py leaves it: values of heavy tails, larger at first, a tenth of the loss drop momentum's."""
    out.mkdir()
    opened, K, rng = data.open_dataset(data_dir), len(targets), np.random.default_rng(1)
    n = len(opened.train.rows)
    cfg = vars(
        train.Config(
            data_dir=str(data_dir),
            out_dir=str(out),
            max_iters=2 * steps,
            n_layer=2,
            n_embd=64,
            n_head=2,
            batch_size=B,
        )
    )
    write_json(out / "config.json", dict(config=cfg))
    visits, books = (
        store.Records(out / "ledger.npy", store.visit_dtype(K)),
        store.Records(out / "books.npy", store.book_dtype(K)),
    )
    total, used = np.zeros((n, K)), np.zeros(n, bool)
    for start in range(0, steps, 1 << 16):
        step = np.arange(start, min(steps, start + (1 << 16)))
        rows = np.repeat(store.empty(visits.dtype), len(step) * B)
        rows["step"], rows["chunk"] = (
            np.repeat(step, B),
            np.arange(start * B, start * B + len(rows)) * 7919 % n,
        )
        rows["value"] = (
            (rng.standard_t(2, (len(rows), K)) + 0.5) * 1e-4 / (1 + rows["step"][:, None] / steps)
        )
        rows["loss"], rows["early"] = rng.normal(5, 1, len(rows)), rows["step"] < 3
        if overshoot in step:
            rows["value"][rows["step"] == overshoot, 0] = 9
        book = np.repeat(store.empty(books.dtype), len(step))
        book["step"], book["data"] = step, rows["value"].reshape(len(step), B, K).sum(1)
        at = step % 20 == 0 if measured else step < 0
        book["momentum"][at], book["decay"][at], book["residual"][at], book["before"][at] = (
            0.001,
            0,
            0.0001,
            5,
        )
        book["after"][at] = 5 - book["data"][at] - 0.0011
        visits.pending, books.pending = [rows], [book]
        visits.commit(), books.commit()
        store.add_visits(rows, total, used)
    files = {
        "values.npy": store.write_values(out, total, used),
        "ledger.npy": visits.counted(),
        "books.npy": books.counted(),
    }
    if audits:
        audit = np.repeat(store.empty(store.audit_dtype(K)), audits)
        for name in store.AUDIT_ENTRIES:
            audit[name] = np.linspace(0.5, 0.9, audits)[:, None]
        records = store.Records(out / "audit.npy", audit.dtype)
        records.pending = [audit]
        records.commit()
        files["audit.npy"] = records.counted()
    info = dict(
        schema=store.SCHEMA,
        rule="adamw",
        batch=B,
        data_hash=opened.hash,
        committed_step=steps,
        targets=[dict(name=t) for t in targets],
    )
    info |= dict(sign="positive = lowered the target's loss", unit="nats", files=files)
    write_json(out / "values.json", info)
    return out


# --- the browser ----------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import Error, sync_playwright

    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )  # or else playwright's own
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error:
            if path:
                raise
            pytest.skip(
                "no chromium, chromium-browser or google-chrome on the PATH, and none of playwright's own: see tests/browser.sh"
            )
        yield started
        started.close()


@pytest.fixture
def visit(browser):
    """visit(path, width) -> an open page; at the test's end nothing may have been asked for but the file, and nothing have gone wrong."""
    opened = []

    def go(path, width=1280, **options):
        context = browser.new_context(viewport=dict(width=width, height=900), **options)
        context.set_default_timeout(8000)
        tab = context.new_page()
        asked, wrong = [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on(
            "console",
            lambda message: (
                wrong.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        tab.goto(path.as_uri())
        opened.append((context, asked, wrong, path.as_uri()))
        return tab

    yield go
    for context, asked, wrong, uri in opened:
        context.close()
        assert (asked, wrong) == (
            [uri],
            [],
        )  # a breach of the content security policy is an error on the console


@pytest.fixture(scope="module")
def trained(python_data, tmp_path_factory):
    """A real run: bytes, two targets, books and an audit; and its report."""
    out = tmp_path_factory.mktemp("out") / "run"
    argv = "--n_layer=2 --n_head=2 --n_embd=16 --batch_size=4 --warmup_iters=5 --learning_rate=5e-3 --eval_interval=0 --device=cpu --dtype=float32"
    argv += f" --max_iters=60 --book_interval=3 --audit_interval=20 --checkpoint_interval=30 --out_dir={out} --data_dir={python_data}"
    train.train(
        config.load(train.Config, [*argv.split(), "--targets=val:Python code,val:Docstrings"])
    )
    return out


@pytest.fixture
def written(trained, tmp_path):
    report(Config(run=str(trained), out=str(tmp_path / "report.html")))
    return tmp_path / "report.html"


def cells(tab, table, column):
    return tab.locator(f"{table} tbody tr:not(.detail) td:nth-child({column})").all_inner_texts()


def numbers(texts):
    return [float(text.replace("\u2212", "-").replace(",", "").rstrip("%")) for text in texts]


# --- what the page says -----------------------------------------------------------


def test_the_page_says_what_the_files_say(trained, written, visit):
    run, tab = open_run(trained), visit(written)
    facts = tab.locator("#facts").inner_text()
    assert "of 60 (100%), 4 chunks each" in facts
    assert f"of {len(run.values):,}" in facts
    assert "adamw" in facts
    assert "trained to its end" in tab.locator("#lead").inner_text()
    # the books and the audit, as the end table has them
    told = "\n".join(tables.account(run.books, run.audit, run.names))
    for k, card in enumerate(tab.locator(".card").all_inner_texts()):
        known = float(told.split(f"{run.names[k]}: accounted for ")[1].split("%")[0])
        assert abs(numbers([card.split(" of the drop")[0].split()[-1]])[0] - known) <= 0.51
        assert f"lowest {run.audit['pearson'][:, k].min():.4f}".rstrip("0") in card
        assert "3 audited steps" in card
    assert "3 steps are marked early" in tab.locator("#warnings").inner_text()
    # domains: mean per token and the median, of the first target; sorted by the median
    assert "10\u207b" in tab.locator(".unit").first.inner_text()
    tab.locator("summary").click()
    exponent = payload.gather(run, Documents(run))["spread"]["exponent"]
    size = np.bincount(run.visits["step"], np.abs(run.visits["value"][:, 0]))
    lone = np.flatnonzero(size > 0.2 * size.sum())  # means leave such a step out
    for name, mean, median in zip(*(cells(tab, "#domain-table", c) for c in (1, 5, 9))):
        of = run.used[run.data.train.domain[run.used] == run.domain(name)]
        kept = of[~np.isin(of, run.visits["chunk"][np.isin(run.visits["step"], lone)])]
        for text, truth in (
            (mean, run.values[kept, 0].mean()),
            (median, np.median(run.values[of, 0])),
        ):
            assert numbers([text])[0] == pytest.approx(
                truth / run.width / 10**exponent, rel=6e-3, abs=1e-3
            ), name
    # the chunk at the top is the best one, that at the bottom the worst
    best = [int(np.nanargmax(run.values[:, 0])), int(np.nanargmin(run.values[:, 0]))]
    assert numbers(cells(tab, "#chunk-table", 3))[0] == best[0]
    tab.locator("#chunk-table").get_by_role("button", name="Value").click()
    assert numbers(cells(tab, "#chunk-table", 3))[0] == best[1]
    tab.locator("#chunk-table .open").first.click()
    detail = tab.locator(".detail:visible")
    assert "document" in detail.inner_text()
    assert detail.locator("bdi").first.is_visible()
    counts = json.loads(tab.locator("#data").text_content())["histogram"][0]["counts"]
    assert sum(map(sum, counts)) == len(run.used)


def test_shares_of_the_drop_are_the_values_over_the_measured_drop(tmp_path):
    """By hand, from the ledger and the books."""
    run = open_run(make_run(tmp_path / "run", make_data(tmp_path / "data", 500, domains=3), 400))
    run.books.flags.writeable = False
    found = payload.gather(run, Documents(run))["time"]
    assert found["groups"] == [0, 80, 160, 240, 320, 400]
    for k in (0, 1):
        for g, start in enumerate(range(0, 400, 80)):
            rows, books = (
                run.visits[start * 8 : (start + 80) * 8],
                run.books[start : start + 80 : 20],
            )
            drop = (books["before"] - books["after"])[:, k].astype(float)
            for d in range(3):
                mean = (
                    rows["value"][run.data.train.domain[rows["chunk"]] == d, k].sum(dtype=float)
                    / 80
                )
                if drop.mean() > 2 * drop.std(ddof=1) / 2:
                    slot = payload.domains(run)[1][np.flatnonzero(run.data.train.domain == d)[0]]
                    assert found["share"][k][slot][g] == pytest.approx(mean / drop.mean(), rel=1e-2)
                else:
                    assert found["share"][k][d][g] is None
    sums = np.array(found["cumulative"])[:, :, -1].sum(1)
    assert sums == pytest.approx(run.visits["value"].sum(0, dtype=float), rel=1e-3)


def test_a_step_that_outweighs_all_others_is_left_out_and_named(tmp_path, visit):
    run = make_run(
        tmp_path / "run", make_data(tmp_path / "data", 4000), 200, overshoot=77, audits=3
    )
    report(Config(run=str(run), tokens=0))
    tab = visit(run / "report.html")
    warnings = tab.locator("#warnings").inner_text()
    assert "Step 77 alone holds" in warnings
    assert "+72 nats together" in warnings
    assert "correlate only 0.5" in warnings
    content = json.loads(tab.locator("#data").text_content())
    kept = np.load(run / "values.npy")[np.load(run / "ledger.npy")["chunk"], 0]
    assert np.sum(content["spread"]["sum"][0]) == pytest.approx(kept[kept < 9 - 1].sum(), rel=1e-2)
    assert content["lone"][1] == []
    assert max(map(max, content["time"]["cumulative"][0])) < 1


def test_a_short_run_has_a_report_too(tmp_path, visit):
    """One step, nothing measured, one target, chunks used more than once: no number is made up."""
    run = make_run(
        tmp_path / "run",
        make_data(tmp_path / "data", 5, domains=1),
        1,
        targets=("only",),
        measured=False,
    )
    report(Config(run=str(run), tokens=1))
    tab = visit(run / "report.html")
    assert "after 1 of 2 steps" in tab.locator("#lead").inner_text()  # of a run that goes on
    assert "No step was measured yet" in tab.locator("#trust").inner_text()
    tab.get_by_label("share of the loss drop").check()
    assert "No step of this run was measured yet" in tab.locator("#time-note").inner_text()
    assert tab.locator("#time svg").count() == 0
    assert tab.locator("#heat-part").is_hidden()
    assert len(cells(tab, "#chunk-table", 1)) == 5


# --- the page in use ----------------------------------------------------------------


def test_every_control_does_what_it_says(trained, written, visit):
    run, tab = open_run(trained), visit(written)
    drawn = lambda chart: tab.locator(chart).inner_html()
    # the target: all charts and the list follow
    before = {
        chart: drawn(chart)
        for chart in (
            "#spread",
            "#shares",
            "#time",
            "#histogram",
            "#scatter",
            "#domain-table",
            "#chunk-table",
        )
    }
    tab.get_by_label("Target").select_option("Docstrings")
    assert all(drawn(chart) != was for chart, was in before.items())
    assert numbers(cells(tab, "#chunk-table", 3))[0] == int(np.nanargmax(run.values[:, 1]))
    assert tab.locator("b.target").first.inner_text() == "Docstrings"
    # over training: three ways, and own scales
    for label, unit in (
        ("summed up, in nats", ""),
        ("share of the loss drop", "%"),
        ("share of the values of the same steps", "%"),
    ):
        was, _ = drawn("#time"), tab.get_by_label(label).check()
        assert drawn("#time") != was
        assert tab.locator("#time .tick").first.text_content().endswith(unit)
    was, _ = drawn("#time"), tab.get_by_label("a scale of its own").check()
    assert drawn("#time") != was
    # single values of one domain
    count = lambda: int(tab.locator("#histogram-note").inner_text().split()[0])
    assert count() == len(run.used)
    tab.locator("#look").select_option("Python code")
    assert count() == (run.data.train.domain[run.used] == run.domain("Python code")).sum()
    # the list: filters and search
    tab.locator("#domain").select_option("Docstrings")
    assert set(cells(tab, "#chunk-table", 2)) == {"Docstrings"}
    tab.locator("#sign").select_option("raised it")
    assert max(numbers(cells(tab, "#chunk-table", 1))) < 0
    tab.locator("#sign").select_option("all shown")
    tab.locator("#domain").select_option("all")
    content = json.loads(tab.locator("#data").text_content())
    some = content["chunks"][11]
    tab.get_by_role("searchbox").fill(str(some["chunk"]))
    assert some["chunk"] in numbers(cells(tab, "#chunk-table", 3))
    word = max(some["text"].split(), key=len)
    tab.get_by_role("searchbox").fill(word.upper())
    sought = [
        [row["text"], *(source for _, source, _ in row["documents"])]
        for row in content["chunks"]
        if str(row["chunk"]) != word
    ]
    n = (
        len(content["chunks"])
        - len(sought)
        + sum(any(word.lower() in x.lower() for x in texts) for texts in sought)
    )
    assert tab.locator("#found").inner_text().startswith(f"{n} chunk")
    assert n > 0
    tab.get_by_role("searchbox").press("Enter")
    tab.get_by_role("searchbox").fill("no such text anywhere")
    assert cells(tab, "#chunk-table", 1) == []
    assert tab.locator("#more").is_hidden()
    tab.get_by_role("searchbox").fill("")
    while tab.locator("#more").is_visible():
        tab.locator("#more").click()
    assert len(cells(tab, "#chunk-table", 1)) == len(content["chunks"])
    # the theme: the page's colour changes, and back
    colour = lambda: tab.evaluate("getComputedStyle(document.body).backgroundColor")
    light = colour()
    tab.get_by_role("button", name="Dark").click()
    assert colour() != light
    assert tab.locator("#theme").get_attribute("aria-pressed") == "true"
    tab.get_by_role("button", name="Dark").click()
    assert colour() == light
    was = drawn("#spread")
    tab.set_viewport_size(dict(width=500, height=800))
    tab.wait_for_function("was => document.querySelector('#spread').innerHTML !== was", arg=was)


def test_the_keyboard_reaches_and_sorts(written, visit):
    tab = visit(written, color_scheme="dark")
    assert tab.locator("#theme").get_attribute("aria-pressed") == "true"
    reached = []
    for _ in range(60):
        tab.keyboard.press("Tab")
        reached.append(
            tab.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
        ring = tab.evaluate(
            "[getComputedStyle(document.activeElement).outlineStyle, document.activeElement.matches(':focus-visible')]"
        )
        assert ring[1] and ring[0] != "none", reached[-1]
        if reached[-1] == "Chunk":
            break
    assert {"target", "theme", "own", "look", "search", "domain", "sign", "Chunk"} <= set(reached)
    for direction, ordered in (
        ("descending", lambda x: sorted(x, reverse=True)),
        ("ascending", sorted),
    ):
        tab.keyboard.press("Enter")
        assert (
            tab.locator("#chunk-table th", has_text="Chunk").get_attribute("aria-sort") == direction
        )
        assert tab.locator("#chunk-table [aria-sort]").count() == 1
        found = numbers(cells(tab, "#chunk-table", 3))
        assert found == ordered(found)
        assert len(found) > 5
    assert (
        tab.evaluate("document.activeElement.textContent") == "Chunk"
    )  # the header keeps the focus
    for title, column in (("Domain", 2), ("Loss", 5), ("Step", 4)):
        tab.locator("#chunk-table").get_by_role("button", name=title).click()
        found = cells(tab, "#chunk-table", column)
        found = found if column == 2 else numbers(text.split()[0] for text in found)
        assert found == sorted(found, key=str.lower if column == 2 else float, reverse=column != 2)


def test_tokens_are_coloured_and_named(trained, written, visit, tmp_path):
    run, tab = open_run(trained), visit(written)
    content = json.loads(tab.locator("#data").text_content())
    assert sum("tokens" in row for row in content["chunks"]) == 20
    assert content["token_step"] == 60
    tab.locator("#chunk-table .open").first.click()
    spans = tab.locator(".tokens span")
    chunk = int(numbers(cells(tab, "#chunk-table", 3))[0])
    assert spans.count() == run.width
    assert chunk == content["chunks"][0]["chunk"]
    assert "".join(spans.all_text_contents()) == "".join(run.pieces(chunk)[:-1])
    _, expected = revalue.tokens(run, [chunk])  # (1, 32, 2)

    def shown(span):
        """A token's value as its title says it, as "+26 . 10^-6 nats", and its colour, from -5 to 5."""
        figure, *power = span.get_attribute("title").removesuffix(" nats").split(" \u00b7 10")
        power = (
            power[0].translate(
                str.maketrans(
                    "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079",
                    "-0123456789",
                )
            )
            if power
            else "0"
        )
        return float(figure.replace("\u2212", "-").replace(",", "") + "e" + power), int(
            (span.get_attribute("class") or "").removeprefix("v") or 0
        )

    for k, target in enumerate(
        run.names
    ):  # an open chunk stays open and is coloured for the other target
        tab.get_by_label("Target").select_option(target)
        tab.get_by_role("searchbox").fill(str(chunk))
        largest = np.abs(expected[0, :, k]).max()
        for t in range(run.width):
            value, level = shown(spans.nth(t))
            assert value == pytest.approx(
                expected[0, t, k], rel=0.05, abs=1e-3 * largest
            )  # two digits, of thousandths of the largest
            assert level == 0 or (level > 0) == (value > 0)
    assert "after step 60" in tab.locator(".detail:visible").inner_text()
    tab.locator(".tokens").focus()
    tab.keyboard.press("ArrowRight")
    assert "Token 1 of 32" in tab.locator("output").inner_text()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowLeft")
    assert "Token 10 of 32" in tab.locator("output").inner_text()
    spans.nth(20).hover()
    assert "Token 21 of 32" in tab.locator("output").inner_text()
    tab.get_by_role("button", name=f"Whole text of chunk {chunk}").click()
    assert tab.locator(".tokens").count() == 0
    # none asked for, or no checkpoint: the page goes without
    report(Config(run=str(trained), out=str(tmp_path / "none.html"), tokens=0))
    assert visit(tmp_path / "none.html").locator(".open", has_text="coloured").count() == 0


def test_without_a_checkpoint_the_page_goes_without_tokens(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("ckpt*"))
    report(Config(run=str(tmp_path / "run")))
    assert "without coloured tokens: " in capsys.readouterr().out
    assert b'"tokens":{' not in (tmp_path / "run" / "report.html").read_bytes()


def test_a_drop_of_early_steps_alone(tmp_path, visit):
    """The loss fell in the early steps and rose after them: there is no share of the later drop to speak of."""
    run = make_run(tmp_path / "run", make_data(tmp_path / "data", 3000), 400)
    books = np.load(run / "books.npy")
    books["after"][0], books["after"][20:] = 1, books["before"][20:] + 0.01
    replace_records(run, "books", books)
    report(Config(run=str(run)))
    cards = visit(run / "report.html").locator("#trust").inner_text()
    assert "of the drop is what values" in cards
    assert not any(word in cards for word in ("null", "undefined", "NaN", "marked early"))


@pytest.mark.parametrize("replay", [True, False])
def test_values_that_came_later_have_a_report_too(trained, tmp_path, visit, replay):
    folder = revalue.revalue(
        revalue.Config(
            run=str(trained), replay=replay, start=30, target_batch=2, name=f"later-{replay}"
        )
    )
    report(Config(run=str(folder), out=str(tmp_path / "report.html")))
    tab = visit(tmp_path / "report.html")
    warnings = tab.locator(".warning").all_inner_texts()
    assert (
        any(
            "approximate: weights and moments are those of the nearest checkpoint" in text
            for text in warnings
        )
        != replay
    )
    content = json.loads(tab.locator("#data").text_content())
    assert content["run"]["first"] == 30
    assert min(row["step"] for row in content["chunks"]) >= 30
    assert content["token_step"] == 60
    total = np.nansum(open_run(folder).values, 0)
    np.testing.assert_allclose(
        np.array(content["time"]["cumulative"])[:, :, -1].sum(1), total, rtol=1e-3
    )


COLLISIONS = """() => [...document.querySelectorAll("svg")].flatMap((svg) => {
  const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")].map((t) => [t.textContent, t.getBoundingClientRect()]);
  const over = (a, b, from, to) => Math.min(a[to], b[to]) - Math.max(a[from], b[from]);
  const out = texts.filter(([, b]) => b.left < frame.left - 2 || b.right > frame.right + 2 || b.bottom > frame.bottom + 3).map(([t]) => "out: " + t);
  return out.concat(texts.flatMap(([t, a], i) => texts.slice(i + 1)
    .filter(([, b]) => over(a, b, "left", "right") > 1 && over(a, b, "top", "bottom") > 3).map(([u]) => t + " | " + u)));
})"""


@pytest.mark.parametrize("width", [1280, 390])
def test_labels_do_not_collide(tmp_path, visit, width):
    """Twenty domains, most with long names: no two texts of a chart overlap, none leaves it, and the page does not scroll sideways."""
    run = make_run(
        tmp_path / "run",
        make_data(tmp_path / "data", 3000),
        400,
        targets=("a target with a long name, as it happens", "b"),
    )
    report(Config(run=str(run), tokens=3))
    tab = visit(run / "report.html", width)
    for label in (
        "share of the loss drop",
        "summed up, in nats",
        "share of the values of the same steps",
    ):
        tab.get_by_label(label).check()
        bad = tab.evaluate(COLLISIONS)
        assert bad == []
    assert tab.locator("svg text").count() > 100
    assert (
        tab.evaluate(
            "[...document.querySelectorAll('th')].filter((head) => head.scrollWidth > head.clientWidth + 1).length"
        )
        == 0
    )
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_without_scripts_a_line_says_so(written, browser):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(written.as_uri())
    assert tab.locator("noscript p").is_visible()
    assert "allow scripts" in tab.locator("noscript p").inner_text()
    context.close()


# --- text that means harm -----------------------------------------------------------


def test_hostile_text_is_shown_as_text(tmp_path, visit):
    documents = [dict(text=text * 40, meta=dict(pile_set_name=text)) for text in HOSTILE] * 8
    documents += [dict(text="x" * 1_000_000, meta=dict(pile_set_name="a line of a megabyte"))]
    source = tmp_path / "<img src=y onerror=window.hit=1>.jsonl"
    source.write_text("".join(json.dumps(document) + "\n" for document in documents))
    options = dict(
        tokenizer="byte",
        block_size=61,
        val_fraction=0.1,
        data_dir=str(tmp_path / "data"),
        workers=1,
    )
    prepare_pile.prepare(prepare_pile.Config(source=str(source), **options))
    run = make_run(tmp_path / "run", tmp_path / "data", 600, B=40, targets=HOSTILE[:2])
    report(Config(run=str(run), tokens=40))
    text = (run / "report.html").read_text(encoding="utf-8")
    assert text.count("<script") == 2
    assert text.count("</script") == 2
    assert "<img" not in text
    assert "\u2028" not in text
    tab = visit(run / "report.html")
    while tab.locator("#more").is_visible():
        tab.locator("#more").click()
    for button in tab.locator("#chunk-table .open").all()[:60]:
        button.click()
    tab.get_by_label("Target").select_option(index=1)
    tab.get_by_role("searchbox").fill("window.hit = 1")
    assert len(cells(tab, "#chunk-table", 1)) > 3
    for _ in range(2):
        assert tab.locator("img, iframe, object, link, svg script, td script, bdi *").count() == 0
        assert tab.evaluate("window.hit") is None
        tab.get_by_role("searchbox").fill("")
    names = tab.locator("#heat th[scope=row]").all_inner_texts()
    assert HOSTILE[0] in names
    assert HOSTILE[1] in names
    assert any("[U+202E]" in name and "\u2400" in name and "\u202e" not in name for name in names)
    shown = tab.locator("body").inner_text()
    assert not {"\u202e", "\u2066", "\x00", "\x07"} & set(shown)
    assert "\ufffd" in shown
    tab.locator("#chunk-table .open").first.click()
    tab.locator("#chunk-table .open").last.click()
    assert tab.locator(".detail:visible bdi", has_text="<img src=y").count() > 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1280


def test_what_the_policy_forbids_does_not_run(written, tmp_path, browser):
    """The policy itself, against a page that was tampered with: another script, a style attribute and an image are refused."""
    harm = '<script>window.hit = 1</script><p id="styled" style="color: rgb(1, 2, 3)">x</p>'
    harm += '<img src="https://example.org/x.png" onerror="window.hit = 1">'
    (tmp_path / "bad.html").write_text(written.read_text().replace("</main>", harm + "</main>"))
    tab, refused = browser.new_page(), []
    tab.on("console", lambda message: refused.append(message.text))
    tab.goto((tmp_path / "bad.html").as_uri())
    assert tab.evaluate("window.hit") is None
    assert tab.evaluate("getComputedStyle(styled).color") != "rgb(1, 2, 3)"
    assert sum("Content Security Policy" in text for text in refused) >= 3
    tab.close()


def test_json_that_ends_no_script_element():
    text = "</script>\u2028\u2029&\ud800\x00é"
    encoded = payload.encode(dict(a=text))
    assert json.loads(encoded) == dict(a=text)
    assert not set(b"<>&") & set(encoded)
    assert encoded.decode().count("\u2028") == 0
    assert payload.num([[1 / 3, np.nan], [np.inf, 2]]) == [[0.3333, None], [None, 2.0]]
    assert len(payload.encode(payload.fit("<\x00é" * 1000, 500))) <= 502
    assert payload.fit("abc", 500) == "abc"


# --- the command ---------------------------------------------------------------------


def test_the_command_line(trained, tmp_path, capsys):
    """In a process of its own: it says where the page is; what is wrong is one line and exit code 2."""
    command = [sys.executable, ROOT / "report.py", str(trained), "--tokens=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"{trained}/report.html: 0."), (
        done.stderr
    )
    assert b"tokens_step" not in (trained / "report.html").read_bytes()
    assert not list(trained.glob("*.tmp"))
    for argv, answer in {
        (): "name one that train.py wrote",
        (str(tmp_path / "none"),): "does not exist",
        (str(trained), "--tokens=100000"): "type --tokens=",
        (str(trained), f"--data_dir={tmp_path}"): "no prepared data",
        (str(trained), "--tokes=1"): "did you mean 'tokens'",
        (str(trained), "--tokens=0", f"--out={tmp_path}/none/x.html"): "No such file",
    }.items():
        with pytest.raises(SystemExit) as stop:
            config.main(lambda argv=argv: report(config.load(Config, argv)))
        line = capsys.readouterr().err
        assert stop.value.code == 2 and answer in line and line.count("\n") == 1, line


def test_the_page_has_one_style_no_style_attribute_and_parses_nothing(written):
    text = written.read_text()
    assert text.count("<style") == 1
    assert " style=" not in text.split("<script>")[0]
    assert "default-src 'none'" in text
    source = (ROOT / "show" / "report.js").read_text()
    assert not any(
        word in source
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "Function(",
        )
    )


def test_ten_million_visits_of_a_million_chunks(tmp_path):
    """Within 20 s and 1 GB, and a page below 2 MB. The peak is the new process's own: getrusage's would begin with that of this one."""
    run = make_run(
        tmp_path / "run", make_data(tmp_path / "data", 1_000_000), 625_000, B=16, audits=4
    )
    code = f"import report; report.report(report.Config(run={str(run)!r}, tokens=0)); "
    code += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    took = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    peak, size = int(done.stdout.split()[-1]) / 1e6, (run / "report.html").stat().st_size / 1e6
    assert took < 20 and peak < 1 and size < 2, (took, peak, size)


def test_the_page_stays_small_with_long_chunks_and_many_targets(tmp_path):
    run = open_run(
        make_run(
            tmp_path / "run",
            make_data(tmp_path / "data", 3000, width=1024),
            400,
            targets=[f"target {k}" for k in range(8)],
        )
    )
    content = payload.gather(run, Documents(run))
    payload.add_tokens(
        content, run, 7, np.random.default_rng(2).normal(size=(payload.room(run), run.width, 8))
    )  # of no model: their size counts
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
