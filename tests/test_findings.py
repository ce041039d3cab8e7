"""show/findings.py and the tables of the end of a run: what no single chunk or step can turn round,
and what is said of it."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from show import findings, tables
from system import store

DOMAINS = ["prose", "code", "junk"]
CHUNKS = 60  # of each domain
BATCH = 4
WORTH = {"prose": 5e-5, "code": 2e-5, "junk": -3e-5}  # the mean value of a domain's chunks
EVIL = "\x1b]0;owned\x07\x1b[31mred\r\u202eback"


def made_up(seed=0, domains=DOMAINS):
    """A run in which every chunk is used once, in an order of chance: data, visits. The values of
    the second target are those of the first with the other sign."""
    rng = np.random.default_rng(seed)
    domain = np.repeat(np.arange(len(domains)), CHUNKS)
    mean = np.array(list(WORTH.values()))[domain]
    values = mean + rng.normal(0, 4e-5, len(domain))
    visits = np.zeros(len(domain), store.visit_dtype(2))
    visits["step"] = np.arange(len(domain)) // BATCH
    visits["chunk"] = rng.permutation(len(domain))
    visits["value"][:, 0] = values[visits["chunk"]]
    visits["value"][:, 1] = -values[visits["chunk"]]
    data = SimpleNamespace(domains=list(domains), train=SimpleNamespace(domain=domain))
    return data, visits


def scaled_chunk(visits, chunk, factor):
    """The visits, with one chunk's values so many times as large."""
    visits = visits.copy()
    visits["value"][visits["chunk"] == chunk] *= factor
    return visits


def scaled_step(visits, step, factor):
    visits = visits.copy()
    visits["value"][visits["step"] == step] *= factor
    return visits


def summed(visits, n_chunks):
    total = np.zeros((n_chunks, visits["value"].shape[1]))
    used = np.zeros(n_chunks, bool)
    store.add_visits(visits, total, used)
    return total, used


def found(data, visits, targets=("good", "bad")):
    total, used = summed(visits, len(data.train.domain))
    return findings.of_run(total, used, [visits], BATCH, data, list(targets))


def printed(data, visits, targets=("good", "bad")):
    books = np.zeros(0, store.book_dtype(len(targets)))
    return tables.end_of_run(found(data, visits, targets), books, [], "adamw")


def order_of(rows):
    return [row["domain"] for row in rows]


def largest_chunk_of(data, name):
    """A chunk of a domain, whichever."""
    return int(np.flatnonzero(data.train.domain == data.domains.index(name))[7])


# --- one chunk, one step --------------------------------------------------------------


def test_domains_are_ordered_by_the_medians_of_their_chunks():
    good, bad = found(*made_up())
    assert order_of(good.domains) == ["prose", "code", "junk"]
    assert order_of(bad.domains) == ["junk", "code", "prose"]


@pytest.mark.parametrize("sign", [1, -1], ids=["for", "against"])
@pytest.mark.parametrize("name", DOMAINS)
def test_a_chunk_of_1000_times_the_size_moves_no_domain(name, sign):
    """It does turn the means round, or the test says nothing."""
    data, visits = made_up()
    chunk = largest_chunk_of(data, name)
    size = abs(visits["value"][visits["chunk"] == chunk, 0])
    before = found(data, visits)[0]
    planted = scaled_chunk(visits, chunk, 1)
    planted["value"][planted["chunk"] == chunk, 0] = sign * 1000 * max(size, 4e-5)
    after = found(data, planted)[0]
    assert order_of(after.domains) == order_of(before.domains)
    by_mean = sorted(after.domains, key=lambda row: -row["mean"])
    assert by_mean[0 if sign > 0 else -1]["domain"] == name
    for old, new in zip(before.domains, after.domains):
        assert new["median"] == pytest.approx(old["median"], abs=2 * old["error"])
        assert abs(new["share"] - old["share"]) < 2 / 45  # one step of 45


def test_a_chunk_that_holds_much_of_a_sum_is_named():
    data, visits = made_up()
    chunk = largest_chunk_of(data, "code")
    planted = scaled_chunk(visits, chunk, 1)
    planted["value"][planted["chunk"] == chunk, 0] = 0.04
    good, bad = found(data, planted)
    step = int(planted["step"][planted["chunk"] == chunk][0])
    assert len(good.cautions) == 2
    assert re.match(rf"caution, good: step {step} alone holds 8\d%", good.cautions[0])
    assert re.match(rf"caution, good: chunk {chunk} \(code\) alone holds 8\d%", good.cautions[1])
    assert bad.cautions == []
    row = next(row for row in good.domains if row["domain"] == "code")
    assert row["largest_chunk"] == chunk
    assert row["largest_share"] > 0.9


def test_a_mean_that_one_chunk_holds_is_marked_in_the_table():
    data, visits = made_up()
    lines = printed(data, visits)
    assert not any("*" in line for line in lines)
    planted = printed(data, scaled_chunk(visits, largest_chunk_of(data, "code"), 1000))
    marked = [line.split()[0] for line in planted if re.search(r"\d\*", line)]
    assert marked == ["code", "all", "code", "all"]
    assert any(line.startswith("*: one chunk holds over a tenth") for line in planted)


def test_a_step_of_1000_times_the_size_is_named_and_moves_no_domain():
    data, visits = made_up()
    before = found(data, visits)[0]
    after = found(data, scaled_step(visits, 11, 1000))[0]
    assert order_of(after.domains) == order_of(before.domains)
    shares = [row["share"] for row in after.domains]
    assert shares == pytest.approx([row["share"] for row in before.domains], rel=1e-5)
    steps = [line for line in after.cautions if "step" in line.split(":")[1]]
    assert len(steps) == 1
    assert "step 11 alone holds 9" in steps[0]
    assert "medians do not" in steps[0]


def test_a_step_is_named_by_its_number_where_the_first_is_not_0():
    data, visits = made_up()
    planted = scaled_step(visits, 11, 1000)
    planted["step"] += 500
    cautions = found(data, planted)[0].cautions
    assert any("step 511 alone" in line for line in cautions)


def test_an_ordinary_run_is_warned_of_nothing():
    for seed in range(20):
        for of_target in found(*made_up(seed)):
            assert of_target.cautions == []


def test_a_short_run_of_ordinary_chunks_is_warned_of_nothing():
    """In three steps each step holds a third, in eight chunks each holds much: that is no news."""
    data, visits = made_up()
    for steps in (1, 2, 3, 5):
        for of_target in found(data, visits[: steps * BATCH]):
            assert of_target.cautions == []


# --- few chunks -----------------------------------------------------------------------


def test_domains_of_few_chunks_come_last_and_are_marked():
    data, visits = made_up()
    # of the best domain four chunks are left
    few = np.flatnonzero(data.train.domain == 0)[4:]
    visits = visits[~np.isin(visits["chunk"], few)]
    visits = visits[: len(visits) // BATCH * BATCH]
    visits["step"] = np.arange(len(visits)) // BATCH
    good = found(data, visits)[0]
    assert order_of(good.domains) == ["code", "junk", "prose"]
    assert good.domains[-1]["chunks"] == 4
    assert np.isnan(good.domains[-1]["error"])
    assert "prose" not in good.finding
    lines = printed(data, visits)
    line = next(line for line in lines if line.startswith("prose "))
    assert line.split()[3] == "-"
    assert "-: fewer than 5 chunks, too few to say how sure the median is" in lines


def test_a_finding_needs_a_domain_of_five_chunks():
    data, visits = made_up()
    good = found(data, visits[:BATCH])[0]
    assert good.finding == "for good: no domain has 5 chunks yet, too few to compare"


# --- the finding in a sentence --------------------------------------------------------


def rows(*figures):
    """DomainValues of [(median, error)], as by_domain() orders them."""
    made = []
    for number, (median, error) in enumerate(figures):
        made.append(
            findings.DomainValues(
                domain=number,
                chunks=50,
                median=median,
                error=error,
                p25=median,
                p75=median,
                negative=0.25,
                mean=median,
                sum=50 * median,
                largest=0,
                largest_share=0.05,
            )
        )
    return made


@pytest.mark.parametrize(
    "figures, sentence",
    [
        (
            [(9e-6, 1e-6), (5e-6, 1e-6), (-8e-6, 1e-6)],
            "prose helped most (median chunk +9.0 x 1e-6 nats); junk hurt most (-8.0)",
        ),
        (
            [(9e-6, 1e-6), (8e-6, 1e-6), (-1e-6, 1e-6)],
            "prose helped most (median chunk +9.0 x 1e-6 nats), not clearly before code;"
            " junk is last, not clearly off 0 (-1.0)",
        ),
        (
            [(9e-6, 1e-6), (5e-6, 1e-6), (3e-6, 1e-6)],
            "prose helped most (median chunk +9.0 x 1e-6 nats); junk helped least (+3.0)",
        ),
        (
            [(-3e-6, 1e-6), (-9e-6, 1e-6)],
            "prose hurt least (median chunk -3.0 x 1e-6 nats); code hurt most (-9.0)",
        ),
        (
            [(3e-6, 2e-6), (-1e-6, 2e-6)],
            "prose is first, not clearly off 0 (median chunk +3.0 x 1e-6 nats);"
            " code is last, not clearly off 0 (-1.0); the two do not differ clearly",
        ),
        (
            [(3e-6, 1e-6)],
            "the median chunk of prose was worth +3.0 x 1e-6 nats, and 25% of its chunks raised the"
            " loss",
        ),
    ],
)
def test_the_finding_says_what_the_errors_allow(figures, sentence):
    assert findings.found("good", rows(*figures), DOMAINS) == f"for good: {sentence}"


# --- figures --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nats, text",
    [
        (0.003, "+3,000.0"),
        (-1.5e-6, "-1.5"),
        (2.5e-7, "+0.25"),
        (3e-12, "+3.0e-06"),
        (0, "+0.0"),
        (np.nan, "-"),
    ],
)
def test_micro_writes_nats_in_millionths(nats, text):
    assert findings.micro(nats) == text


def test_the_error_of_a_median_is_that_of_many_samples():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(4000, 101))
    errors = [findings.of_domain(0, v, np.arange(101)).error for v in samples[:200]]
    assert np.mean(errors) == pytest.approx(np.median(samples, axis=1).std(), rel=0.05)


def test_shares_of_the_steps_are_means_of_the_shares_of_each_step():
    data, visits = made_up()
    blocks = [visits[:40], visits[40:]]
    sizes, shares = findings.over_steps(blocks, BATCH, data.train.domain, 3)
    expected = np.zeros((2, 3))
    for step in range(45):
        of_step = visits[visits["step"] == step]
        v = of_step["value"].astype(float)
        np.testing.assert_allclose(sizes[:, step], abs(v).sum(0))
        for row, d in zip(v, data.train.domain[of_step["chunk"]]):
            expected[:, d] += row / abs(v).sum(0) / 45
    np.testing.assert_allclose(shares, expected)


def test_a_step_of_zeros_has_no_share_and_no_warning():
    data, visits = made_up()
    visits["value"][:BATCH] = 0
    with np.errstate(all="raise"):
        good = found(data, visits)[0]
    assert np.isfinite(good.everything["share"])


# --- what is printed ------------------------------------------------------------------


def test_the_table_is_at_most_100_columns_wide_and_aligned():
    names = ["a name that is much too long for a column of a table", "漢字かな" * 5, "junk"]
    data, visits = made_up(domains=names)
    visits["value"] *= 1e4
    for block in "\n".join(printed(data, visits)).split("\n\n"):
        table = [line for line in block.splitlines() if re.search(r"%.*%", line)]
        cells = [sum(map(tables.cells_of, line)) for line in table]
        assert len(set(cells)) <= 1
        assert all(width <= 100 for width in cells)


def test_names_from_the_data_cannot_write_on_a_terminal():
    data, visits = made_up(domains=[EVIL, "code", EVIL + "2"])
    planted = scaled_chunk(visits, largest_chunk_of(data, EVIL), 1000)
    lines = printed(data, planted, [EVIL, "a\nb"])
    assert any("\\x1b" in line for line in lines)
    account = tables.account(booked_steps(), [], [EVIL], "adamw")
    for line in [*lines, *account]:
        assert line.isprintable()


# --- the books in words ---------------------------------------------------------------


def booked_steps(data=0.03, momentum=0.012, decay=0.0004, before=2.0, after=1.958):
    """Records of two measured steps, of one target."""
    entries = np.zeros(2, store.book_dtype(1))
    parts = {"data": data, "momentum": momentum, "decay": decay}
    entries["before"] = before
    entries["after"] = after
    entries["kappa"] = 1
    for key, nats in parts.items():
        entries[key] = nats
    entries["residual"] = before - after - sum(parts.values())
    return entries


def test_the_books_say_what_adds_up_to_the_drop():
    (_, line) = tables.account(booked_steps(), [], ["prose"], "adamw")
    assert line == (
        "books, prose: values, momentum and weight decay add up to 101.0% of the measured drop"
        " (0.0840 nats in 2 steps): values +0.0600, momentum +0.0240, decay +0.0008 nats"
    )


@pytest.mark.parametrize("parts", [{"momentum": -0.004, "data": 0.046}, {"decay": -0.0001}])
def test_a_part_that_raised_the_loss_is_explained(parts):
    lines = tables.account(booked_steps(**parts), [], ["prose"], "adamw")
    assert len(lines) == 3
    assert lines[-1].startswith("books: a part below 0 raised the loss; momentum goes on")


def test_a_part_that_is_shown_as_0_is_not_explained():
    lines = tables.account(booked_steps(decay=-1e-6), [], ["prose"], "adamw")
    assert lines[-1].endswith("decay +0.0000 nats")


@pytest.mark.parametrize("data, closes", [(0.0255, True), (0.0245, False), (0.0375, False)])
def test_books_that_leave_a_tenth_of_the_drop_are_no_amounts(data, closes):
    """The drop of a step is .042, of which .0124 are momentum and decay."""
    lines = tables.account(booked_steps(data=data), [], ["prose"], "adamw")
    said = [line for line in lines if line.startswith("caution, prose: the books do not close")]
    assert len(said) == (0 if closes else 1)


def test_a_loss_that_rose_is_called_a_rise():
    entries = booked_steps(data=-0.03, momentum=-0.012, decay=0, before=2.0, after=2.042)
    line = tables.account(entries, [], ["prose"], "adamw")[1]
    assert "add up to 100.0% of the measured rise (0.0840 nats in 2 steps)" in line


@pytest.mark.parametrize(
    "rule, kappa, is_said",
    [
        ("adamw", [0.2, 0.3], True),
        ("adamw", [0.2, 0.6], False),
        ("adamw2", [0.2, 0.3], False),
    ],
)
def test_steps_that_were_clipped_hard_are_no_matter_of_course(rule, kappa, is_said):
    entries = booked_steps()
    entries["kappa"] = kappa
    lines = tables.account(entries, [], ["prose"], rule)
    said = [line for line in lines if line.startswith("caution:")]
    assert len(said) == is_said
    if is_said:
        assert "2 steps of 2 were clipped to less than half" in said[0]
        assert "(on average to 0.25)" in said[0]


def test_checked_steps_that_were_clipped_hard_need_no_caution():
    """Where one pass is rough, the check has found it."""
    entries = np.zeros(2, store.book_dtype(1))
    entries["kappa"] = 0.2
    entries["passes"], entries["gap"] = 1, 0.01
    assert not any("caution:" in line for line in tables.account(entries, [], ["prose"], "adamw"))
    entries["gap"] = np.nan
    assert any("caution:" in line for line in tables.account(entries, [], ["prose"], "adamw"))


def test_books_without_a_measured_step_say_so():
    entries = booked_steps()
    entries["residual"] = np.nan
    lines = tables.account(entries, [], ["prose"], "adamw")
    assert lines == ["", "books, prose: no step was measured yet"]
