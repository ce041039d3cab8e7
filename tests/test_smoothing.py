"""train.py --target_smoothing: the column `smoothed` is what a rule makes of the mean of a target's
gradients, and nothing else in a run changes by it."""

import json
import re
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from runs import TWO_TARGETS, assert_same_run, read_bytes, run, weights
from test_valuation import RULES, Run, relative, tokens
from valued import smoothed

import config
import curate
import report
import revalue
import train
import values
from shapley import directions, rules
from show import curated, page
from show.documents import Documents
from show.run import open_run
from system import machine, needs, store
from system.errors import UserError
from system.files import crc32
from valuation import Valuation, check_finite

BETA = 0.9
SMOOTHED = [TWO_TARGETS, f"--target_smoothing={BETA}", "--book_interval=3", "--lr_decay_iters=12"]
SMOOTHED += ["--tolerance=0"]  # one pass, whatever it leaves unexplained
PLAIN = [option for option in SMOOTHED if "smoothing" not in option]


# --- against the slow truth ---------------------------------------------------


class SlowMeans(rules.Situation):
    """The rules' definitions with s_k / (1 - beta^n) for g_k, added up by hand."""

    sums = {}  # {number of the target: beta^(n - 1) (1 - beta) g_1 + ... + (1 - beta) g_n}
    steps = {}

    def gradient_at(self, steps):
        k = self.loss.target
        g = super().gradient_at(steps)
        before = self.sums.get(k, [0.0] * len(g))
        self.sums[k] = [BETA * s + (1 - BETA) * g_p for s, g_p in zip(before, g)]
        self.steps[k] = self.steps.get(k, 0) + 1
        return [s / (1 - BETA ** self.steps[k]) for s in self.sums[k]]


def slow_scores(monkeypatch, made, step, clip):
    """What rules.py says of the coming step with means for the targets' gradients: (B, K)."""
    X, Y = tokens(made, step)
    losses = []
    for k, target in enumerate(made.targets):
        X_k, Y_k = map(torch.from_numpy, target.batch(made.valuation.targets.picks(k, step)))

        def loss(model, X_k=X_k, Y_k=Y_k):
            return model(X_k, Y_k)[1]

        loss.target = k
        losses.append(loss)
    x = rules_x(made, X, Y)
    known = rules.known_rows(made.model, X, Y)
    with monkeypatch.context() as patch:
        patch.setattr(rules, "Situation", SlowMeans)
        what = (made.model, made.optimizer, x, losses, made.rule, 1e-2, clip)
        squares = None if made.rule == "adamw" else rules.squares_by_use(made.model, X, Y)
        return rules.rule_values(*what, known=known, squares=squares)


def rules_x(made, X, Y):
    """Each chunk's share of the batch's gradient, by autograd: [one tensor a parameter]."""
    shares = []
    for i in range(len(X)):
        loss = made.model(X[i : i + 1], Y[i : i + 1])[1] / len(X)
        shares.append(torch.autograd.grad(loss, list(made.model.parameters())))
    return shares


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tie", [True, False])
def test_the_smoothed_score_equals_the_definition(monkeypatch, tmp_path, rule, tie):
    """Two targets, other chunks at every step; clipped and not; 1, 2 and 4 micro-batches."""
    monkeypatch.setattr(SlowMeans, "sums", {})
    monkeypatch.setattr(SlowMeans, "steps", {})
    options = {"target_smoothing": BETA, "target_sampling": "redraw", "target_batch": 2}
    made = Run(tmp_path, torch.float64, rule, K=2, tie=tie, **options)
    plain = Run(
        tmp_path / "plain", torch.float64, rule, K=2, tie=tie, **options | {"target_smoothing": 0}
    )
    for step, (clip, micro_steps) in enumerate(
        [(0.0, 1), (0.05, 2), (0.05, 4), (0.0, 4), (0.05, 1)]
    ):
        truth = slow_scores(monkeypatch, made, step, clip)
        values, _, _ = made.step(step, clip=clip, micro_steps=micro_steps)
        expected, _, _ = plain.step(step, clip=clip, micro_steps=micro_steps)
        assert relative(smoothed(made.valuation), truth) < 1e-10, step
        assert torch.equal(values, expected)
        if step:
            assert relative(values, truth) > 1e-2  # another score than the value
    assert float(made.valuation.pending[-1].clip_coef) < 1


def given_up(made, step):
    """A step that is begun, and left before the optimizer's. Another Valuation goes on."""
    X, Y = tokens(made, step)
    rows = torch.cat([X, Y[:, -1:]], 1).numpy()
    made.valuation.begin_step(step, 1e-2, rows)
    made.loss(X, Y, made.valuation.new_ledger(np.arange(len(X)), X, Y)).backward()
    made.valuation.before_update(1.0)
    made.optimizer.zero_grad()
    given = made.valuation
    arguments = (made.model, made.optimizer, made.loss, made.targets, given.settings)
    made.valuation = Valuation(*arguments, step=step)  # as when a run goes on
    made.valuation.load_state_dict(given.state_dict())


@pytest.mark.parametrize("rule", ["adamw", "adamw2"])
def test_a_step_that_is_given_up_and_done_again_is_in_the_mean_once(tmp_path, rule):
    options = {"target_smoothing": BETA, "target_sampling": "redraw", "target_batch": 2}
    whole = Run(tmp_path / "whole", torch.float32, rule, K=2, **options)
    broken = Run(tmp_path / "broken", torch.float32, rule, K=2, **options)
    for step in range(3):
        whole.step(step)
        given_up(broken, step)
        broken.step(step)
        assert torch.equal(smoothed(broken.valuation), smoothed(whole.valuation))


def test_a_smoothed_score_that_is_not_finite_is_refused():
    visits = np.zeros(2, store.visit_dtype(1, smoothed=True))
    visits["chunk"] = [7, 8]
    check_finite(visits)
    visits["smoothed"][1] = np.inf
    with pytest.raises(UserError, match="step 0: the value of chunks 8 is not finite"):
        check_finite(visits)


# --- in a run -----------------------------------------------------------------


def means(out_dir):
    """What the newest checkpoint holds of the means of the targets' gradients."""
    return torch.load(out_dir / "ckpt.pt", weights_only=True)["valuation"]["smoothing"]


CASES = {
    "adamw": [],
    "one target": ["--targets=val"],
    "few exact rows": [],
    "untied": ["--tie_weights=False", "--bias", "--dropout=0.1"],
    "adamw2": ["--rule=adamw2"],
    "one micro-batch": ["--rule=adamw2", "--batch_size=4", "--gradient_accumulation_steps=1"],
    "adamw_linear": ["--rule=adamw_linear", "--audit_interval=6"],
    "sgd2": ["--rule=sgd2"],
    "sgd": ["--rule=sgd", "--optimizer=sgd", "--dropout=0.1"],
}


@pytest.mark.parametrize("case", CASES)
def test_smoothing_changes_no_other_byte_of_a_run(python_data, tmp_path, monkeypatch, case):
    if case == "few exact rows":  # chosen by the size of the directions, of which there are more
        monkeypatch.setattr(directions, "EXACT_ELEMENTS", 4 * 16 * 9)
    run(python_data, tmp_path / "plain", *PLAIN, "--max_iters=6", *CASES[case])
    run(python_data, tmp_path / "smoothed", *SMOOTHED, "--max_iters=6", *CASES[case])
    arrays = read_bytes(tmp_path / "smoothed")
    expected = read_bytes(tmp_path / "plain")
    assert arrays.keys() == expected.keys() >= {"values.npy", "books.npy", "ledger.npy"}
    for name in arrays.keys() - {"ledger.npy"}:
        assert arrays[name] == expected[name], name
    visits = store.read(tmp_path / "smoothed")
    plain = store.read(tmp_path / "plain")
    n_targets = plain["value"].shape[1]
    assert plain.dtype == store.visit_dtype(n_targets)
    assert visits.dtype == store.visit_dtype(n_targets, smoothed=True)
    for name in plain.dtype.names:
        assert visits[name].tobytes() == plain[name].tobytes(), name
    for name, weight in weights(tmp_path / "plain").items():
        assert torch.equal(weights(tmp_path / "smoothed")[name], weight), name
    # in the first step the mean is the gradient itself
    first = visits["step"] == 0
    assert np.allclose(visits["smoothed"][first], visits["value"][first], rtol=1e-3, atol=1e-9)
    assert not np.allclose(visits["smoothed"][~first], visits["value"][~first], rtol=0.1)


@pytest.fixture(scope="module")
def whole(python_data, tmp_path_factory):
    """A run of twelve steps with checkpoints of steps 5 and 10."""
    folder = tmp_path_factory.mktemp("smoothing") / "whole"
    run(python_data, folder, *SMOOTHED, "--keep_checkpoints=5")
    return folder


def test_a_run_that_goes_on_ends_in_the_bytes_of_an_undisturbed_one(python_data, whole, tmp_path):
    out = tmp_path / "run"
    run(python_data, out, *SMOOTHED, "--max_iters=7")
    assert means(out)["steps"] == 7
    run(python_data, out, *SMOOTHED, "--init_from=resume")
    assert_same_run(out, whole)
    assert means(out)["steps"] == 12
    for name, mean in means(whole)["means"].items():
        assert torch.equal(means(out)["means"][name], mean), name


def test_a_run_stopped_in_a_step_ends_in_the_bytes_of_an_undisturbed_one(
    python_data, whole, tmp_path, monkeypatch
):
    """By Ctrl-C after step 7 has taken its targets' gradients, and before its end."""
    out = tmp_path / "run"
    check = machine.Interrupted.check
    new_ledger = train.Valuation.new_ledger
    stopping = []

    def remember(self, *args):
        stopping.append(self.step.number == 7)
        return new_ledger(self, *args)

    def stop(self):
        if stopping and stopping[-1]:
            raise machine.Stopped
        check(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.Valuation, "new_ledger", remember)
        patch.setattr(machine.Interrupted, "check", stop)
        run(python_data, out, *SMOOTHED)
    assert len(store.read(out)) == 4 * 7
    assert means(out)["steps"] == 8  # with that of the step under way
    run(python_data, out, *SMOOTHED, "--init_from=resume")
    assert_same_run(out, whole)


@pytest.mark.parametrize("had, now", [(BETA, 0.5), (BETA, 0.0), (0.0, BETA)])
def test_another_smoothing_is_refused_where_a_run_goes_on(python_data, tmp_path, had, now):
    out = tmp_path / "run"
    run(python_data, out, f"--target_smoothing={had}", "--max_iters=1", "--n_layer=1")
    answer = f"--target_smoothing={now}, but .* was run with target_smoothing={had}: type"
    with pytest.raises(UserError, match=answer):
        run(python_data, out, f"--target_smoothing={now}", "--init_from=resume", "--n_layer=1")


def test_a_run_of_an_earlier_version_goes_on_only_without_smoothing(python_data, tmp_path):
    out = tmp_path / "run"
    options = ["--n_layer=1", "--lr_decay_iters=2"]
    run(python_data, out, "--max_iters=1", *options)
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    del checkpoint["config"]["target_smoothing"]
    with open(out / "ckpt.pt", "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        file.write(b"%08x" % crc32(file.name))
    with pytest.raises(UserError, match=r"was run with target_smoothing=0\.0"):
        run(python_data, out, "--target_smoothing=0.9", "--init_from=resume", *options)
    run(python_data, out, "--max_iters=2", "--init_from=resume", *options)


@pytest.mark.parametrize(
    "beta, bound", [("1", "below 1"), ("-.1", "at least 0"), ("inf", "below 1")]
)
def test_a_smoothing_out_of_range_is_refused(beta, bound):
    with pytest.raises(UserError, match=rf"--target_smoothing={beta[:2]}.*: it must be {bound}"):
        config.load(train.Config, [f"--target_smoothing={beta}"])


def test_an_estimate_counts_what_smoothing_needs(python_data, tmp_path):
    """Of memory two more numbers for each weight and target, of disk one in each checkpoint."""
    plain = train.Config(out_dir=str(tmp_path))
    with_means = train.Config(out_dir=str(tmp_path), target_smoothing=0.9)
    n = needs.parameters(plain, 1000)
    more = needs.memory(with_means, 1000, 3, 1) - needs.memory(plain, 1000, 3, 1)
    assert more == 4 * 2 * 3 * n
    more = needs.disk(with_means, 1000, 3, 50) - needs.disk(plain, 1000, 3, 50)
    column = 4 * 3 * plain.batch * plain.max_iters
    assert more == 4 * 3 * n * (plain.keep_checkpoints + 1) + column


# --- a run that is valued again -----------------------------------------------


def test_a_replay_has_the_column_of_the_run(whole):
    """From the first step, and from a checkpoint's with the means that are in it."""
    folder = revalue.revalue(revalue.Config(run=str(whole), replay=True, name="again"))
    assert store.read(folder).tobytes() == store.read(whole).tobytes()
    options = {"replay": True, "start": 5, "name": "end"}
    folder = revalue.revalue(revalue.Config(run=str(whole), **options))
    assert store.read(folder).tobytes() == store.read(whole)[5 * 4 :].tobytes()


def test_a_replay_for_another_target_begins_its_mean_where_it_begins(whole, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("import os\n" * 9)
    options = {"replay": True, "start": 5, "targets": f"mine={text}"}
    visits = store.read(revalue.revalue(revalue.Config(run=str(whole), **options)))
    first = visits["step"] == 5
    assert np.allclose(visits["smoothed"][first], visits["value"][first], rtol=1e-3)


def test_a_walk_has_no_smoothed_column(whole):
    folder = revalue.revalue(revalue.Config(run=str(whole), name="walk"))
    assert "smoothed" not in store.read(folder).dtype.names
    assert open_run(folder).cfg["target_smoothing"] == 0


def test_a_repair_makes_the_column_again(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    content = bytearray((out / "ledger.npy").read_bytes())
    content[-20:] = bytes(20)
    (out / "ledger.npy").write_bytes(content)
    revalue.repair(revalue.Config(run=str(out)))
    assert read_bytes(out) == read_bytes(whole)


# --- readers ------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(python_data, tmp_path_factory):
    """A run without the column, as earlier versions wrote all."""
    folder = tmp_path_factory.mktemp("smoothing") / "plain"
    run(python_data, folder, *PLAIN)
    return folder


def relative_to_steps(folder, k):
    """{chunk: the mean over its visits of the smoothed score over the mean size in the step}."""
    visits = store.read(folder)
    found = {}
    for step in np.unique(visits["step"]):
        of_step = visits[visits["step"] == step]
        size = np.abs(of_step["smoothed"][:, k].astype(float)).mean()
        for visit in of_step:
            found.setdefault(int(visit["chunk"]), []).append(visit["smoothed"][k] / size)
    return {chunk: np.mean(scores) for chunk, scores in found.items()}


def read_as_people_do(capsys, monkeypatch, *words):
    """What a command of values.py prints."""
    monkeypatch.setattr("sys.argv", ["values.py", *map(str, words)])
    capsys.readouterr()
    values.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["top", "bottom"])
def test_chunks_are_ranked_by_their_smoothed_score(whole, command, capsys, monkeypatch):
    expected = relative_to_steps(whole, 1)
    options = ["--score=smoothed", "--target=Docstrings", "--n=6"]
    printed = read_as_people_do(capsys, monkeypatch, command, whole, *options, "--json")
    result = json.loads(printed)
    schema = json.loads((Path(config.ROOT) / "show" / "values.schema.json").read_text())
    jsonschema.validate(result, schema | {"$ref": f"#/$defs/{command}"})
    order = sorted(expected, key=expected.get, reverse=command == "top")
    assert [row["chunk"] for row in result["chunks"]] == order[:6]
    assert any(row["share"] != pytest.approx(row["smoothed"], rel=0.1) for row in result["chunks"])
    for row in result["chunks"]:
        assert row["smoothed"] == pytest.approx(expected[row["chunk"]])
    text = read_as_people_do(capsys, monkeypatch, command, whole, *options)
    first = f"{expected[order[0]]:+,.2f}"
    assert "for Docstrings, by smoothed score" in text
    assert re.search(rf"^ +1 +{order[0]} +{re.escape(first)} ", text, re.MULTILINE)


def test_documents_are_ranked_by_their_smoothed_score(whole, tmp_path, capsys, monkeypatch):
    """The score is that of curate.py's dropped.npy."""
    result = values.docs(open_run(whole), n=1000, score="smoothed", bottom=True)
    options = {"score": "smoothed", "drop_fraction": 0.5, "out": str(tmp_path)}
    made = curate.curate(curate.Config(run=str(whole), **options))
    dropped = np.load(tmp_path / "dropped.npy")
    assert len(dropped) > 5
    rows = result["documents"][: len(dropped)]
    assert [row["doc"] for row in rows] == dropped["document"].tolist()
    np.testing.assert_allclose([row["score"] for row in rows], dropped["score"])
    printed = read_as_people_do(capsys, monkeypatch, "docs", whole, "--score=smoothed")
    assert "by smoothed score" in printed
    quarter = made["config"] | {"drop_fraction": 0.25}
    assert curated.measured(quarter).startswith("Dropping by smoothed score was not measured.")


def test_chunks_are_dropped_by_their_smoothed_score(whole, tmp_path):
    expected = relative_to_steps(whole, 0)
    listed = tmp_path / "dropped.jsonl"
    options = {"by": "chunk", "score": "smoothed", "out": str(tmp_path), "list": str(listed)}
    made = curate.curate(curate.Config(run=str(whole), **options))
    order = sorted(expected, key=expected.get)
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [row["chunk"] for row in rows] == order[: len(order) // 4]
    for row in rows:
        assert row["score"] == pytest.approx(expected[row["chunk"]])
    lines = list(curated.lines(made))
    assert any("those with the smallest smoothed score for Python code" in line for line in lines)
    assert any("smoothed: as share, of the smoothed scores" in line for line in lines)


def test_domains_are_compared_by_their_smoothed_scores(whole, capsys, monkeypatch):
    visits = store.read(whole)
    total = {}
    for visit in visits:
        chunk = int(visit["chunk"])
        total[chunk] = total.get(chunk, 0) + visit["smoothed"][0].astype(float)
    opened = open_run(whole)
    result = values.domains(opened, "smoothed")
    rows = [row for row in result["domains"] if row["target"] == "Python code"]
    assert len(rows) > 1
    for row in rows:
        own = [x for chunk, x in total.items() if opened.domain_of(chunk) == row["domain"]]
        assert row["median"] == pytest.approx(np.median(own), rel=1e-5)
        assert row["sum"] == pytest.approx(sum(own), rel=1e-5)
    relative_size = visits["smoothed"][:, 0].astype(float).reshape(-1, 4)
    relative_size /= np.abs(relative_size).sum(1, keepdims=True)
    shares = sum(row["share"] for row in rows)
    assert shares == pytest.approx(relative_size.sum(1).mean())
    printed = read_as_people_do(capsys, monkeypatch, "domains", whole, "--score=smoothed")
    assert "Of smoothed scores" in printed
    assert printed.splitlines()[-1].endswith("--score=smoothed")


def test_an_export_has_a_smoothed_column_for_each_target(whole, plain, tmp_path):
    values.export(open_run(whole), tmp_path / "table.parquet")
    table = pq.read_table(tmp_path / "table.parquet")
    visits = store.read(whole)
    for k, name in enumerate(["Python code", "Docstrings"]):
        column = table[f"smoothed:{name}"].to_numpy()
        for chunk, value in zip(table["chunk"].to_pylist(), column):
            own = visits["smoothed"][visits["chunk"] == chunk, k]
            assert value == pytest.approx(own.sum(dtype=float), rel=1e-5)
    values.export(open_run(plain), tmp_path / "plain.parquet")
    names = pq.read_table(tmp_path / "plain.parquet").column_names
    assert names == [name for name in table.column_names if "smoothed" not in name]


def test_a_chunk_has_the_smoothed_score_of_every_visit(whole, plain, capsys, monkeypatch):
    visits = store.read(whole)
    chunk = int(visits["chunk"][0])
    own = visits[visits["chunk"] == chunk]
    shown = values.chunk(open_run(whole), chunk=chunk)["visits"]
    assert [v["smoothed"]["Docstrings"] for v in shown] == own["smoothed"][:, 1].tolist()
    printed = read_as_people_do(capsys, monkeypatch, "chunk", whole, str(chunk))
    assert "Docstrings, smoothed" in printed
    assert f"{1e6 * float(own['smoothed'][0, 1]):+,.1f}" in printed
    assert "smoothed" not in values.chunk(open_run(plain), chunk=chunk)["visits"][0]
    assert "smoothed" not in read_as_people_do(capsys, monkeypatch, "chunk", plain, str(chunk))


def test_a_report_lists_chunks_by_their_smoothed_score(whole, plain):
    expected = relative_to_steps(whole, 1)
    opened = open_run(whole)
    content = page.gather(opened, Documents(opened))
    assert content["smoothed"] is True
    shown = {row["chunk"]: row["smoothed"][1] for row in content["chunks"]}
    assert shown == pytest.approx({chunk: expected[chunk] for chunk in shown}, rel=1e-3)
    assert max(expected, key=expected.get) in shown
    opened = open_run(plain)
    content = page.gather(opened, Documents(opened))
    assert content["smoothed"] is False
    assert "smoothed" not in content["chunks"][0]
    report.report(report.Config(run=str(whole), tokens=0))
    assert "Smoothed" in (whole / "report.html").read_text()


@pytest.mark.parametrize("command", ["top", "bottom", "docs", "domains", "curate"])
def test_a_run_without_smoothed_scores_says_what_to_type(plain, command):
    answer = f"{plain} has no smoothed scores: train with --target_smoothing=.9, or choose another"
    with pytest.raises(UserError, match=re.escape(answer)):
        if command == "curate":
            curate.curate(curate.Config(run=str(plain), score="smoothed"))
        else:
            getattr(values, command)(open_run(plain), score="smoothed")


def test_values_json_names_the_smoothing(whole, plain):
    assert open_run(whole).info["target_smoothing"] == BETA
    assert "target_smoothing" not in open_run(plain).info
