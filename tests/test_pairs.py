"""Pairs of prompt and answer: what prepare_pile.py makes of them, and runs whose chunks have
unequal numbers of labels."""

import numpy as np
import pytest
import torch
import zstandard
from piles import json_lines, parquet, table, write
from piles import run as prepare_run
from runs import arguments, assert_same_run, run, weights
from test_parallel import assert_same_but_for_rounding, ranks_run
from test_revalue import chunk_values
from torch.nn import functional as F

import data
import lookback
import revalue
import train
from shapley import exact
from show.documents import Documents
from show.run import open_run
from show.scores import chunk_scores, document_scores
from system import store
from system.errors import UserError

EOT = 255  # of bytes
ROW = 24  # block_size
PACKED = 64  # block_size of chunks of several pairs
KEYS = {"prompt_key": "q", "answer_key": "a", "domain_key": "kind"}
RUN = ["--batch_size=4", "--gradient_accumulation_steps=1", "--book_interval=3"]


def records(n=80):
    """Answers of 1 to 11 bytes, in two domains."""
    made = []
    for i in range(n):
        made.append({"q": f"ask {i}: ", "a": "abcdefghijk"[: 1 + i * 7 % 11], "kind": "xy"[i % 2]})
    return made


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    source = write(folder / "pairs.jsonl", json_lines(records()))
    return prepare_run(folder, source, block_size=ROW, **KEYS).path


# --- prepare_pile.py ------------------------------------------------------------------


def expected_row(prompt, answer):
    """A pair's row, and what it is to predict, token by token."""
    tokens = [EOT, *prompt.encode(), *answer.encode(), EOT]
    row = tokens + [EOT] * (ROW + 1 - len(tokens))
    first = 1 + len(prompt.encode())
    labels = [-1] * ROW
    for place in range(first, len(tokens)):
        labels[place - 1] = row[place]
    return row, labels


def test_each_pair_has_a_chunk_and_only_its_answer_has_labels(pairs):
    dataset = data.open_dataset(pairs)
    found = 0
    for split in ("train", "val"):
        part = getattr(dataset, split)
        documents = table(dataset, split)
        assert [row["first_chunk"] for row in documents] == list(range(len(part.rows)))
        X, Y = part.batch(np.arange(len(part.rows)), ROW)
        for i, document in enumerate(documents):
            record = records()[document["record"]]
            row, labels = expected_row(record["q"], record["a"])
            assert part.rows[i].tolist() == row
            assert X[i].tolist() == row[:-1]
            assert Y[i].tolist() == labels
            assert dataset.domains[part.domain[i]] == document["domain"] == record["kind"]
            assert document["n_tokens"] == len(record["q"] + record["a"])
        assert part.n_labels(ROW).tolist() == (Y >= 0).sum(1).tolist()
        short = part.batch(np.arange(len(part.rows)), 10)[1]
        assert part.n_labels(10).tolist() == (short >= 0).sum(1).tolist()
        found += len(documents)
    assert found == len(records())
    assert dataset.meta["dropped_tokens"] == 0


def expected_rows(of_domain, most):
    """Rows and labels of a domain's records, a pair at a time: while it fits in whole."""
    rows, labels, holds = [], [], []
    for record in of_domain:
        row, own = expected_row(record["q"], record["a"])
        tokens = row[1 : 1 + len(record["q"] + record["a"]) + 1]
        own = own[: len(tokens)]
        if not holds or len(holds[-1]) == most or len(rows[-1]) + len(tokens) > PACKED + 1:
            rows.append([EOT])
            labels.append([])
            holds.append([])
        rows[-1] += tokens
        labels[-1] += own
        holds[-1].append(record)
    for row, own in zip(rows, labels):
        row += [EOT] * (PACKED + 1 - len(row))
        own += [-1] * (PACKED - len(own))
    return rows, labels, holds


@pytest.mark.parametrize("most", [3, 5])
def test_packed_pairs_follow_each_other_and_only_answers_have_labels(tmp_path, most):
    source = write(tmp_path / "pairs.jsonl", json_lines(records()))
    options = {**KEYS, "block_size": PACKED, "pairs_per_chunk": most}
    dataset = prepare_run(tmp_path, source, **options, workers=2)
    found = 0
    for split in ("train", "val"):
        part = getattr(dataset, split)
        assert len(part.rows) == dataset.meta["chunks"][split]
        documents = table(dataset, split)
        places = [(row["first_chunk"], row["first_token"]) for row in documents]
        assert places == sorted(places)
        for number, domain in enumerate(dataset.domains):
            own = sorted(row["record"] for row in documents if row["domain"] == domain)
            rows, labels, holds = expected_rows([records()[i] for i in own], most)
            ids = np.flatnonzero(part.domain == number)
            X, Y = part.batch(ids, PACKED)
            assert part.rows[ids].tolist() == rows
            assert X.tolist() == [row[:-1] for row in rows]
            assert Y.tolist() == labels
            assert part.n_labels(PACKED, ids).tolist() == (Y >= 0).sum(1).tolist()
            assert part.n_labels(30, ids).tolist() == (Y[:, :30] >= 0).sum(1).tolist()
            found += len(own)
        for document in documents:
            row = part.rows[document["first_chunk"]]
            text = row[document["first_token"] :][: document["n_tokens"]]
            record = records()[document["record"]]
            assert bytes(text.tolist()).decode() == record["q"] + record["a"]
            assert row[document["first_token"] + document["n_tokens"]] == EOT
    assert found == len(records())
    assert max(len(pairs) for pairs in holds) > 1


def test_pairs_that_cannot_be_used_are_counted_and_said(tmp_path, capsys):
    bad = [
        {"q": "no answer", "a": ""},
        {"q": "a blank one", "a": " \n"},
        {"q": "too long: ", "a": "x" * ROW},
        {"q": "no text", "a": 3},
        {"a": "no prompt"},
        {"q": "half a character: ", "a": "\ud800"},
    ]
    good = [*records(20), {"q": "", "a": "from nothing"}, {"q": "y" * 9, "a": "z" * (ROW - 10)}]
    source = write(tmp_path / "p.jsonl.zst", zstandard.compress(json_lines([*bad, *good])))
    dataset = prepare_run(tmp_path, source, block_size=ROW, workers=2, **KEYS)
    skipped = {name: n for name, n in dataset.meta["skipped"].items() if n}
    counted = {"no_answer": 2, "too_many_tokens": 1, "no_text": 2, "lone_surrogate": 1}
    assert skipped == counted
    assert dataset.meta["documents"] == len(good)
    said = capsys.readouterr().out
    assert f"1 pair longer than --block_size={ROW}: dropped, not cut" in said
    assert "2 no_answer" in said
    full = dataset.train if len(dataset.train.rows) > 15 else dataset.val
    assert full.answer[:, 0].min() >= 1


def test_equal_pairs_are_prepared_equally_and_again_only_where_asked(tmp_path, pairs, capsys):
    source = write(tmp_path / "pairs.jsonl", json_lines(records()))
    again = prepare_run(tmp_path, source, block_size=ROW, workers=2, **KEYS)
    assert again.hash == data.open_dataset(pairs).hash
    capsys.readouterr()
    prepare_run(tmp_path, source, block_size=ROW, **KEYS)
    assert "is already prepared" in capsys.readouterr().out
    with pytest.raises(UserError, match="was prepared with --prompt_key=q"):
        prepare_run(tmp_path, source, block_size=ROW, **{**KEYS, "prompt_key": "kind"})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt_key": "q"}, "write both"),
        ({"answer_key": "a"}, "write both"),
        ({**KEYS, "source": "python"}, "name a .jsonl file"),
        ({**KEYS, "source": ""}, "name a .jsonl file"),
        ({**KEYS, "answer_key": "b"}, "see --source and --prompt_key, --answer_key"),
        ({**KEYS, "block_size": 4}, "or raise --block_size=4"),
        ({"pairs_per_chunk": 4, "domain_key": "kind"}, "name their parts with --prompt_key"),
        ({**KEYS, "pairs_per_chunk": 0}, "--pairs_per_chunk=0: it must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    source = write(tmp_path / "pairs.jsonl", json_lines(records(10)))
    with pytest.raises(UserError, match=message):
        prepare_run(tmp_path, **{"source": source, **options})


def test_pairs_in_parquet_are_refused(tmp_path):
    parquet(tmp_path / "p.parquet", [("a", "text")])
    with pytest.raises(UserError, match="pairs are read from"):
        prepare_run(tmp_path, tmp_path / "p.parquet", **KEYS)


@pytest.mark.parametrize(
    "answers",
    [
        [5, 9, 0, 0, 20, 25],  # one left out
        [5, 9, 8, 12, 0, 0],  # one within another
        [0, 0, 0, 0, 0, 0],
        [5, 9, 12, PACKED + 2, 0, 0],
        [5, 9, 7, 0, 0, 0],
    ],
)
def test_answers_of_a_chunk_that_do_not_follow_each_other_are_refused(tmp_path, answers):
    source = write(tmp_path / "pairs.jsonl", json_lines(records(20)))
    options = {**KEYS, "block_size": PACKED, "pairs_per_chunk": 3}
    dataset = prepare_run(tmp_path, source, **options)
    path = dataset.path / "train_answer.npy"
    there = np.load(path)
    there[1] = answers
    np.save(path, there)
    with pytest.raises(UserError, match="an answer is not within its row"):
        data.open_dataset(dataset.path)


def test_an_answer_that_is_not_within_its_row_is_refused(tmp_path):
    source = write(tmp_path / "pairs.jsonl", json_lines(records(20)))
    dataset = prepare_run(tmp_path, source, block_size=ROW, **KEYS)
    path = dataset.path / "train_answer.npy"
    answer = np.load(path)
    answer[0, 1] = ROW + 2
    np.save(path, answer)
    with pytest.raises(UserError, match="an answer is not within its row"):
        data.open_dataset(dataset.path)
    answer[0, 1] = answer[0, 0] + 1
    np.save(path, answer)
    with pytest.raises(UserError, match="its sha256 is not"):
        data.open_dataset(dataset.path)


# --- targets --------------------------------------------------------------------------


def test_a_file_of_pairs_is_a_target_of_its_answers(pairs, tmp_path):
    dataset = data.open_dataset(pairs)
    asked = [{"q": "what: ", "a": "this one"}, {"q": "", "a": "b"}, {"q": "long", "a": "x" * ROW}]
    path = write(tmp_path / "mine.jsonl", json_lines(asked))
    (target,) = data.parse_targets(f"mine={path}", dataset, ROW)
    X, Y = target.batch(np.arange(2))
    assert len(target) == 2
    assert Y.tolist() == [expected_row(pair["q"], pair["a"])[1] for pair in asked[:2]]
    assert X.tolist() == [expected_row(pair["q"], pair["a"])[0][:-1] for pair in asked[:2]]
    assert "1 too_many_tokens" in target.notes[0]
    text = write(tmp_path / "mine.txt", b"plain text is a target too, of all its tokens")
    (plain,) = data.parse_targets(f"mine={text}", dataset, ROW)
    assert (plain.batch([0])[1] >= 0).all()
    with pytest.raises(UserError, match="no pair under 'q' and 'a'"):
        other = write(tmp_path / "other.jsonl", json_lines([{"text": "a text"}]))
        data.parse_targets(f"mine={other}", dataset, ROW)
    with pytest.raises(UserError, match="leave :text out"):
        data.parse_targets(f"mine={path}:text", dataset, ROW)


def test_validation_pairs_whose_answer_is_cut_off_speak_for_no_target(pairs):
    dataset = data.open_dataset(pairs)
    (whole,) = data.parse_targets("val", dataset, ROW)
    (cut,) = data.parse_targets("val", dataset, 8)  # "ask 10: " is longer than "ask 9: "
    assert len(whole) == len(dataset.val.rows)
    assert 0 < len(cut) < len(whole)
    assert "have no label within --block_size=8: they are left out" in cut.notes[-1]
    assert (cut.batch(np.arange(len(cut)))[1] >= 0).any(1).all()


# --- training -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    """Runs of the same steps, in one micro-batch and in several."""
    folder = tmp_path_factory.mktemp("runs")
    for rule, cut in (("adamw", 1), ("adamw", 2), ("adamw2", 1), ("adamw2", 4)):
        more = [f"--batch_size={4 // cut}", f"--gradient_accumulation_steps={cut}"]
        run(pairs, folder / f"{rule}-{cut}", *RUN, f"--rule={rule}", *more)
    return folder


def plain_weights(pairs, cfg, steps):
    """The weights after some steps of a loop that knows nothing of chunks."""
    dataset = data.open_dataset(pairs)
    model = train.build_model(cfg, dataset, "cpu")
    optimizer = train.build_optimizer(cfg, model)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = train.get_lr(cfg, step)
        ids = dataset.ids(step, cfg.batch, cfg.seed)
        X, Y = map(torch.from_numpy, dataset.train.batch(ids, cfg.block_size))
        logits = model.lm_head(model.features(X))
        F.cross_entropy(logits.flatten(0, 1), Y.flatten(), ignore_index=-1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def test_the_weights_are_those_of_a_plain_loop_over_the_mean_of_all_labels(pairs, trained):
    cfg = train.config.load(train.Config, [str(trained / "adamw-1" / "config.json")])
    expected = plain_weights(pairs, cfg, 12)
    for name in ("adamw-1", "adamw-2", "adamw2-4"):
        found = weights(trained / name)
        for key, weight in found.items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule, cut", [("adamw", 2), ("adamw2", 4)])
def test_values_do_not_depend_on_how_unequal_chunks_are_cut_into_micro_batches(trained, rule, cut):
    one, several = trained / f"{rule}-1", trained / f"{rule}-{cut}"
    expected, found = store.read(one), store.read(several)
    assert np.array_equal(found["chunk"], expected["chunk"])
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=2e-4)
    late = expected["early"] == 0
    distance = np.linalg.norm(found["value"][late] - expected["value"][late])
    assert distance < 1e-4 * np.linalg.norm(expected["value"][late])
    losses = store.read(several, "books")["loss"]
    np.testing.assert_allclose(losses, store.read(one, "books")["loss"], rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluations_count_labels(pairs, trained, batch_size):
    """The loss of a domain is the mean over the labels of its chunks, however they are cut."""
    cfg = train.config.load(train.Config, [str(trained / "adamw-1" / "config.json")])
    cfg.batch_size, cfg.eval_chunks = batch_size, 5
    dataset = data.open_dataset(pairs)
    model = train.build_model(cfg, dataset, "cpu")

    def loss_of(X, Y):
        return model(torch.from_numpy(X), torch.from_numpy(Y))[1]

    _, found = train.estimate_loss(model, loss_of, dataset, cfg, lambda: None)
    for domain, name in enumerate(dataset.domains):
        batches = train.evaluation_batches(dataset, cfg)
        ids = np.concatenate([ids for other, ids in batches if other == domain])
        X, Y = map(torch.from_numpy, dataset.val.batch(ids, ROW))
        logits = model.lm_head(model.features(X))
        loss = F.cross_entropy(logits.flatten(0, 1), Y.flatten(), ignore_index=-1)
        assert abs(found[name] - float(loss)) < 1e-6


def test_a_run_on_pairs_that_was_stopped_goes_on_to_the_same_bytes(pairs, trained, tmp_path):
    more = [*RUN, "--rule=adamw", "--batch_size=2", "--gradient_accumulation_steps=2"]
    run(pairs, tmp_path / "run", *more, "--max_iters=7", "--lr_decay_iters=12")
    run(pairs, tmp_path / "run", *more, "--init_from=resume", "--lr_decay_iters=12")
    assert_same_run(tmp_path / "run", trained / "adamw-2")


def test_two_processes_value_pairs_as_one_does(pairs, tmp_path):
    """Each has its own number of labels, and DDP and FSDP2 take the mean of their gradients."""
    options = [*RUN, "--target_batch=3", "--max_iters=5", "--eval_interval=0"]
    whole = ["--batch_size=8", "--gradient_accumulation_steps=1"]
    cut = ["--batch_size=4", "--gradient_accumulation_steps=2"]
    for rule in ("adamw", "adamw2"):
        run(pairs, tmp_path / rule, *options, f"--rule={rule}", *whole)
    kinds = {
        "ddp": ["--rule=adamw", *cut],
        "shard": ["--rule=adamw2", "--shard", *cut],
    }
    argvs = [arguments(pairs, tmp_path / name, *options, *more) for name, more in kinds.items()]
    ranks_run(2, tmp_path / "log", *argvs)
    assert_same_but_for_rounding(tmp_path / "ddp", tmp_path / "adamw", "adamw")
    assert_same_but_for_rounding(tmp_path / "shard", tmp_path / "adamw2", "adamw2")


def test_a_step_without_a_label_is_refused(pairs, tmp_path):
    for rule in ("adamw", "off"):
        with pytest.raises(UserError, match="step 0: none of its 4 chunks has a label"):
            run(pairs, tmp_path / rule, *RUN, f"--rule={rule}", "--block_size=5", *own(tmp_path))


def own(folder):
    """A target that has labels, of however short chunks."""
    text = write(folder / "text.txt", b"some words, and some more words" * 5)
    return [f"--targets=mine={text}", "--eval_interval=0"]


# --- afterwards -----------------------------------------------------------------------


def test_hindsight_of_pairs_is_the_derivative_of_the_whole_training(pairs, tmp_path):
    """Held against exact.hindsight, which writes the training out and differentiates it."""
    folder = tmp_path / "run"
    options = ["--max_iters=5", "--rule=off", "--dtype=float64", "--eval_interval=0"]
    cut = ["--batch_size=2", "--gradient_accumulation_steps=2", "--warmup_iters=0"]
    run(pairs, folder, *RUN, *options, *cut)
    cfg = revalue.Config(run=str(folder), hindsight=True)
    out = revalue.revalue(cfg)
    found = store.read(out)["value"].reshape(5, 4)
    original = revalue.read(cfg)
    dataset = revalue.open_data(original)
    targets = data.parse_targets("val", dataset, ROW)
    rerun = lookback.Rerun(original, dataset, targets, tmp_path)
    steps = []
    for step in range(5):
        _, X, Y = rerun.batch(step)
        steps.append((torch.from_numpy(X), torch.from_numpy(Y), train.get_lr(rerun.options, step)))
    X, Y = map(torch.from_numpy, targets[0].batch(np.arange(len(targets[0]))))
    what = (rerun.model, rerun.optimizer, steps, [exact.batch_loss(X, Y)])
    truth = exact.hindsight(*what, rerun.options.grad_clip)[..., 0]
    assert np.linalg.norm(found - truth) < 1e-4 * np.linalg.norm(truth)


def test_a_replay_of_pairs_is_the_run_to_the_bit_and_a_walk_is_of_its_steps(trained):
    folder = trained / "adamw2-4"
    out = revalue.revalue(revalue.Config(run=str(folder), replay=True, name="again"))
    assert store.read(out).tobytes() == store.read(folder).tobytes()
    cfg = revalue.Config(run=str(folder), name="walked", target_batch=8)
    walked = store.read(revalue.revalue(cfg))
    assert np.array_equal(walked["chunk"], store.read(folder)["chunk"])
    assert np.isfinite(walked["value"]).all()


def test_the_tokens_of_a_pair_have_values_where_they_matter(trained):
    """What fills up the row does nothing, nor is it shown."""
    opened = open_run(trained / "adamw-1")
    chunk = int(opened.used[0])
    _, values = revalue.tokens(opened, [chunk])
    end = int(opened.data.train.answer[chunk, 1])
    assert not values[0, end - 1 :].any()
    assert values[0, : end - 1].any()
    assert opened.pieces(chunk)[end:] == [""] * (ROW + 1 - end)
    record = records()[Documents(opened).of_chunk(chunk)[0]["record"]]
    assert opened.text(chunk) == record["q"] + record["a"]


def test_the_tokens_of_a_pair_add_up_to_its_value(trained):
    """In a step of pairs that have as many labels as all have on average: a short answer counts
    less."""
    opened = open_run(trained / "adamw2-1")
    chunks = opened.used[:8].tolist()
    n_labels = opened.data.train.n_labels(ROW)[chunks]
    assert len(set(n_labels)) > 2
    _, values = revalue.tokens(opened, chunks)
    for of_tokens, of_chunk in zip(values, chunk_values(opened.path, opened, chunks)):
        scale = np.abs(of_tokens).sum()
        np.testing.assert_allclose(of_tokens.sum(0), of_chunk, rtol=1e-5, atol=1e-5 * scale)


def test_a_pair_has_the_whole_value_of_its_chunk(trained):
    opened = open_run(trained / "adamw-1")
    by_chunk = chunk_scores(opened, 0, "value")
    by_document = document_scores(opened, by_chunk)
    np.testing.assert_allclose(by_document.total, by_chunk.total[: len(by_document.total)])


# --- several pairs in a chunk -----------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A run on chunks of up to three pairs."""
    folder = tmp_path_factory.mktemp("packed")
    source = write(folder / "pairs.jsonl", json_lines(records(160)))
    options = {**KEYS, "block_size": PACKED, "pairs_per_chunk": 3, "val_fraction": 0.2}
    path = prepare_run(folder, source, **options).path
    run(path, folder / "run", *RUN, "--rule=adamw2", f"--block_size={PACKED}")
    return folder / "run"


def test_the_tokens_of_packed_pairs_add_up_to_the_value_of_their_chunk(packed):
    opened = open_run(packed)
    chunks = opened.used[:8].tolist()
    _, values = revalue.tokens(opened, chunks)
    for of_tokens, of_chunk in zip(values, chunk_values(opened.path, opened, chunks)):
        scale = np.abs(of_tokens).sum()
        np.testing.assert_allclose(of_tokens.sum(0), of_chunk, rtol=1e-5, atol=1e-5 * scale)


def test_the_value_of_a_chunk_is_shared_out_among_its_pairs_by_their_labels(packed):
    opened = open_run(packed)
    by_chunk = chunk_scores(opened, 0, "value")
    by_document = document_scores(opened, by_chunk)
    np.testing.assert_allclose(by_document.total.sum(), by_chunk.total.sum())
    chunk = int(opened.used[0])
    documents = Documents(opened).of_chunk(chunk)
    assert len(documents) > 1
    n_labels = np.array([len(records(160)[row["record"]]["a"]) + 1 for row in documents])
    place = {int(number): i for i, number in enumerate(by_document.numbers)}
    found = by_document.total[[place[row["doc"]] for row in documents]]
    np.testing.assert_allclose(found, by_chunk.total[chunk] * n_labels / n_labels.sum())
    texts = opened.text(chunk).split("<|endoftext|>")
    whole = [records(160)[row["record"]] for row in documents]
    assert [text.strip() for text in texts] == [row["q"] + row["a"] for row in whole]
