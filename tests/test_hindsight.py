"""hindsight.py and replay.py: a step back at a time they find what differentiating the whole
training finds (exact.py); and a training can be put back and taken again to the bit."""

import json
import math

import numpy as np
import pytest
import torch
from runs import become_rank, ended, free_port, server
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainings import B, Run, distance

from bench import differences as bench
from shapley import exact, hindsight
from shapley.replay import put_back, state_of
from system import parallel

NEVER = 100.0  # a norm that no gradient here reaches

# --- against the whole training -----------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grad_clip": 0.0},
        {"grad_clip": NEVER},
        {"weight_decay": 0.0},
        {"weight_decay": 5.0},
        {"dropout": 0.2},
        {"micro_batch": 1},
        {"micro_batch": 1, "dropout": 0.2},
        {"kind": "sgd"},
        {"kind": "sgd", "grad_clip": 0.0},
        {"kind": "sgd", "grad_clip": NEVER, "dropout": 0.2, "micro_batch": 2},
    ],
    ids=str,
)
def test_steps_back_find_what_differentiating_the_whole_training_finds(options):
    """For two targets. Matrices decay, norms do not; two rows, of positions that no chunk reaches,
    have no gradient and so no second moment."""
    run = Run(**options)
    torch.manual_seed(5)
    losses = [run.target_loss(0), run.target_loss(1)]
    truth = exact.hindsight(
        run.model, run.optimizer, run.steps(), losses, run.grad_clip, run.micro_batch
    )
    past = run.record()
    is_clipped = [step.clip_coef < 1 for step in past]
    assert all(is_clipped) if run.grad_clip == 0.5 else not any(is_clipped)
    for k in range(2):
        values = run.sweep(past, run.target_gradient(k), epsilon=1e-5)
        assert distance(values, truth[..., k]) < 1e-6


def test_the_written_out_training_is_the_optimizers_own():
    """Its values are the derivative of what the real training ends at, by the weight of a visit's
    gradient."""
    run = Run(dropout=0.2, micro_batch=2)
    torch.manual_seed(5)
    truth = exact.hindsight(
        run.model, run.optimizer, run.steps(), [run.target_loss(0)], run.grad_clip, run.micro_batch
    )
    step, slot = 2, 3
    ends = []
    for weight in (1 + 1e-5, 1 - 1e-5):
        run = Run(dropout=0.2, micro_batch=2)
        backward = run.training.backward

        def weighted(*arguments, weight=weight, run=run, backward=backward):
            if run.training.weights.updates_done() == step:
                arguments[-1][slot] *= weight
            return backward(*arguments)

        run.training.backward = weighted
        run.record()
        ends.append(run.final_loss())
    derivative = (ends[0] - ends[1]) / 2e-5
    assert derivative == pytest.approx(-truth[step, slot, 0], rel=1e-5)


def test_each_visit_of_a_chunk_has_a_value_of_its_own():
    """Every step uses the same four chunks."""
    run = Run(pool=B)
    torch.manual_seed(5)
    truth = exact.hindsight(
        run.model, run.optimizer, run.steps(), [run.target_loss(0)], run.grad_clip
    )
    past = run.record()
    values = run.sweep(past, run.target_gradient(0), epsilon=1e-5)
    for chunk in range(B):
        of_chunk = np.stack([step.ids for step in past]) == chunk
        assert of_chunk.sum() == run.n_steps
        assert len(np.unique(values[of_chunk].round(9))) == run.n_steps
        assert distance(values[of_chunk], truth[of_chunk, 0]) < 1e-6


def test_values_of_a_target_that_nothing_moves_are_0():
    run = Run()
    past = run.record()
    nothing = [torch.zeros_like(p) for p in run.model.parameters()]
    assert (run.sweep(past, nothing) == 0).all()


def test_a_step_back_changes_neither_weights_nor_random_numbers():
    run = Run(dropout=0.2)
    past = run.record()
    gradient = run.target_gradient(0)
    weights = [p.detach().clone() for p in run.model.parameters()]
    rng = torch.get_rng_state()
    run.sweep(past, gradient)
    assert torch.equal(rng, torch.get_rng_state())
    for before, p in zip(weights, run.model.parameters()):
        assert torch.equal(before, p)
        assert p.grad is None


# --- explosion ----------------------------------------------------------------


@pytest.mark.parametrize(
    "norms, n_early",
    [
        ([1, 1.4, 1, 2, 1], 0),  # what is large in the second half is no matter of the beginning
        ([500, 30, 1, 1, 1], 2),
        ([500, 1.6, 1, 1, 1], 2),
        ([1, 1, 30, 1.2, 1, 1, 1], 3),  # what is before an explosion went through it
        ([math.nan, math.inf, 30, 2, 1, 1, 1], 4),
        ([math.nan, math.nan, 1, 1], 2),
        ([7], 0),
    ],
)
def test_steps_up_to_the_last_large_adjoint_are_early(norms, n_early):
    """For each target by itself."""
    calm = np.ones(len(norms))
    found = hindsight.early(np.stack([norms, calm], 1))
    assert found[:, 0].tolist() == [True] * n_early + [False] * (len(norms) - n_early)
    assert not found[:, 1].any()


def test_with_a_horizon_only_explosions_are_early():
    """For the norm jumps where it looks ahead anew."""
    norms = np.array([300, 3, 8, 2, 1, 1, 2, 1.0])[:, None]
    assert hindsight.early(norms)[:, 0].tolist() == [True] * 4 + [False] * 4
    assert hindsight.early(norms, horizon=3)[:, 0].tolist() == [True] + [False] * 7


# --- float32 ------------------------------------------------------------------


@pytest.mark.parametrize("kind, grad_clip", [("adamw", 0.5), ("adamw", 0.0), ("sgd", 0.5)])
def test_differences_in_float32_are_within_a_thousandth_of_derivatives(kind, grad_clip):
    """On one recorded trajectory, so that only the differences differ. Cross-entropy is in float64:
    in the first steps on random tokens, losses differ by little more than what float32 rounds."""
    run = Run(dtype=torch.float32, kind=kind, grad_clip=grad_clip)
    past = run.record()
    gradient = run.target_gradient(0)
    values = run.sweep(past, gradient)
    twin = Run(kind=kind, grad_clip=grad_clip)
    truth = twin.sweep(*bench.in_float64(past, gradient), back=bench.exact_back)
    assert distance(values, truth) < 1e-3


# --- several processes --------------------------------------------------------


def hindsight_on(rank, world, port, path):
    """What each process does; the first writes the values."""
    torch.set_num_threads(1)
    become_rank(rank, world, port)
    parallel.start("cpu")
    run = Run()
    past = run.record()
    values = torch.from_numpy(run.sweep(past, run.target_gradient(0)))
    values = parallel.gather(values, dim=1)
    if rank == 0:
        np.save(path, values.numpy())
    parallel.leave()


def test_two_processes_find_what_one_does(tmp_path):
    port, path = free_port(), tmp_path / "values.npy"
    ranks = []
    for rank in range(2):
        process = server().Process(target=hindsight_on, args=(rank, 2, port, path))
        process.start()
        ranks.append(process)
    run = Run()
    past = run.record()
    alone = run.sweep(past, run.target_gradient(0))
    assert ended(ranks) == [0, 0]
    assert distance(np.load(path), alone) < 1e-6


# --- a training taken again ---------------------------------------------------


def weights_after(run, steps):
    for step in steps:
        run.training.take(step)
    return [p.detach().clone() for p in run.model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("first", [0, 3])
def test_a_training_put_back_goes_the_same_way_to_the_bit(kind, first):
    """With dropout; twice, for the state stays as it is; from before its first step, too."""
    run = Run(dtype=torch.float32, kind=kind, dropout=0.2)
    torch.manual_seed(5)
    weights_after(run, range(first))
    state = state_of(run.training)
    ends = weights_after(run, range(first, 6))
    moments = run.optimizer.state_dict()["state"]
    for _ in range(2):
        put_back(run.training, state)
        assert run.training.weights.updates_done() == (first if kind == "adamw" else 0)
        assert same(weights_after(run, range(first, 6)), ends)
    again = run.optimizer.state_dict()["state"]
    assert again.keys() == moments.keys()
    for i, moment in moments.items():
        for key, value in moment.items():
            assert torch.equal(again[i][key], value)


def test_a_recorded_step_is_the_step():
    """record and take go the same way."""
    one, other = Run(dropout=0.2), Run(dropout=0.2)
    past = one.record()
    torch.manual_seed(5)
    with sdpa_kernel(SDPBackend.MATH):
        taken = weights_after(other, range(6))
    assert same(taken, [p.data for p in one.model.parameters()])
    assert [step.t for step in past] == [1, 2, 3, 4, 5, 6]
    assert [step.lr for step in past] == [one.lr(step) for step in range(6)]


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_step_without_chunks_is_that_of_the_others_gradients_over_B(micro_batch):
    run = Run(kind="sgd", grad_clip=0.0, weight_decay=0.0, micro_batch=micro_batch)
    _, X, Y = run.batch(0)
    x = exact.chunk_gradients(run.model, torch.from_numpy(X), torch.from_numpy(Y))
    before = [p.detach().clone() for p in run.model.parameters()]
    run.training.take(0, left_out=[0, 2])
    for i, p in enumerate(run.model.parameters()):
        expected = before[i] - run.lr(0) * (x[1][i] + x[3][i])
        assert torch.allclose(p, expected, rtol=1e-10, atol=1e-14)


# --- the bench ----------------------------------------------------------------


def test_the_bench_of_differences_prints_errors_of_every_epsilon(python_data, tmp_path, capsys):
    sizes = dict(block_size=32, n_layer=1, n_head=1, n_embd=8, iters=4, segment=2, batch_size=2)
    cfg = bench.Config(
        data=str(python_data), out=str(tmp_path), epsilons="1e-3,3e-3", target_chunks=4, **sizes
    )
    bench.main(cfg)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert len(rows) == 2 * 2 * 3 * 2  # optimizers, segments, losses, epsilons
    assert all(0 < row["error"] < 0.1 for row in rows)
    assert (tmp_path / "differences.png").stat().st_size > 1000
