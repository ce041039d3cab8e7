"""Several processes: the same values from any number of them, and nothing is lost when some of them
die."""

import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    TWO_TARGETS,
    arguments,
    assert_same_run,
    become_rank,
    ended,
    free_port,
    in_process,
    quiet_run,
    read_bytes,
    run,
    server,
    wait_for,
    weights,
)

import config
from system import parallel
from system.checkpoints import read_checkpoint
from system.errors import UserError
from system.store import read

ROOT = Path(config.__file__).parent
OPTIONS = [TWO_TARGETS, "--book_interval=3", "--target_batch=3", "--lr_decay_iters=12"]


# --- several processes, as torchrun starts them -------------------------------


def environment_of_torchrun():
    """A port of its own, so that several tests can run side by side."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PET_MASTER_PORT": str(free_port())}


def rank_run(rank, world, port, argvs, log, limit):
    """What a rank does. limit: bytes beyond which no file may grow, as on a full disk; 0: none."""
    become_rank(rank, world, port)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for argv in argvs:
        quiet_run(argv, log)
    parallel.leave()


def start(world, log, *argvs, limit=0):
    """The processes that torchrun would start. Each runs all of argvs, one after another."""
    port = free_port()
    ranks = []
    for rank in range(world):
        process = server().Process(target=rank_run, args=(rank, world, port, argvs, log, limit))
        process.start()
        ranks.append(process)
    return ranks


def ranks_run(world, log, *argvs):
    assert set(ended(start(world, log, *argvs))) == {0}, log.read_text()


# --- the same values ----------------------------------------------------------


def distance(many, alone, batch=4, column="value"):
    """The largest relative distance of a step's values, or of another column."""
    many = many[column].reshape(len(many) // batch, -1).astype(float)
    alone = alone[column].reshape(len(alone) // batch, -1).astype(float)
    return max(np.linalg.norm(many - alone, axis=1) / np.linalg.norm(alone, axis=1))


def assert_same_but_for_rounding(many, alone, rule):
    """The ledgers, books and values of two runs (folders) of eight chunks a step."""
    visits = read(many)
    expected = read(alone)
    for name in ("step", "chunk", "early"):
        assert (visits[name] == expected[name]).all(), name
    assert np.allclose(visits["loss"], expected["loss"], rtol=1e-5)
    assert np.allclose(visits["grad_norm"], expected["grad_norm"], rtol=1e-4, equal_nan=True)
    first_sum = expected["value"][:8].sum(0)
    assert np.allclose(visits["value"][:8].sum(0), first_sum, rtol=1e-5)
    compared = 8 if rule.startswith("adamw") else 0
    assert distance(visits[compared:], expected[compared:], 8) < 1e-5

    books = read(many, "books")
    expected_books = read(alone, "books")
    for name in ("passes", "failed"):
        assert (books[name] == expected_books[name]).all(), name
    for name in ("kappa", "before", "after", "momentum", "decay"):
        np.testing.assert_allclose(books[name], expected_books[name], rtol=1e-4, atol=1e-7)

    used = np.isfinite(np.load(many / "values.npy"))
    assert (used == np.isfinite(np.load(alone / "values.npy"))).all()


# of a step, with the default rule: 1, 2 or 4 for each of two ranks, 1 or 2 for each of four
MICRO_BATCHES = {2: [1, 4, 8], 4: [1, 8]}


@pytest.mark.parametrize(
    "world, shard, rules",
    [
        (2, False, ["adamw", "adamw2", "sgd"]),
        (4, False, ["adamw"]),
        (2, True, ["adamw", "adamw2"]),
        (4, True, ["adamw"]),
    ],
)
def test_values_do_not_depend_on_the_number_of_processes(
    python_data, tmp_path, world, shard, rules
):
    """In float32 within 1e-5, step by step, with DDP and FSDP2.

    In AdamW's first step m = v = 0, and the exact secant is b / (sqrt(d) |g| + eps): where g is
    zero but for rounding it can be anything. Such elements cancel from the sum of the step's
    values, so there the sum is compared. The ledger marks the step as early."""
    log = tmp_path / "log"
    options = [*OPTIONS, "--max_iters=6", "--eval_interval=4"]
    argvs = {}
    for rule in rules:
        whole = ["--batch_size=8", "--gradient_accumulation_steps=1"]
        run(python_data, tmp_path / rule, *options, f"--rule={rule}", *whole)
        counts = MICRO_BATCHES[world] if rule == "adamw" else [1]
        for n in counts:
            cut = [f"--batch_size={8 // n}", f"--gradient_accumulation_steps={n}"]
            more = [*options, f"--rule={rule}", f"--shard={shard}", *cut]
            argvs[rule, n] = arguments(python_data, tmp_path / f"{rule}-{n}", *more)
    ranks_run(world, log, *argvs.values())
    for rule, n in argvs:
        assert_same_but_for_rounding(tmp_path / f"{rule}-{n}", tmp_path / rule, rule)


@pytest.mark.parametrize("world, rules", [(3, ["adamw", "adamw2"]), (6, ["adamw2"])])
def test_values_that_depend_on_the_number_of_processes_are_marked_as_early(
    python_data, tmp_path, world, rules
):
    """Over 20 steps: where a step's values are apart by more than 1e-5, its visits are marked.

    In the first steps v is nearly zero, and an element of g that is zero but for rounding is
    divided by itself. Such elements cancel from the sum of a step's values."""
    log = tmp_path / "log"
    options = [TWO_TARGETS, "--target_batch=3", "--max_iters=20", "--eval_interval=0"]
    options += ["--batch_size=6", "--gradient_accumulation_steps=1"]
    argvs = []
    for rule in rules:
        run(python_data, tmp_path / rule, *options, f"--rule={rule}")
        out = tmp_path / f"{rule}-many"
        argvs.append(arguments(python_data, out, *options, f"--rule={rule}"))
    ranks_run(world, log, *argvs)
    for rule in rules:
        alone = read(tmp_path / rule)
        many = read(tmp_path / f"{rule}-many")
        late = alone["early"] == 0
        assert (many["early"] == alone["early"]).all()
        assert set(alone["step"][~late]) == {0, 1, 2}
        assert distance(many[late], alone[late], 6) < 1e-5
        sums = many["value"].reshape(20, 6, 2).sum(1, dtype=float)
        expected = alone["value"].reshape(20, 6, 2).sum(1, dtype=float)
        assert np.allclose(sums, expected, rtol=1e-4)


def test_audits_do_not_depend_on_the_number_of_processes(python_data, tmp_path):
    options = [*OPTIONS, "--dtype=float64", "--audit_interval=5"]
    alone = tmp_path / "alone"
    two = tmp_path / "two"
    run(python_data, alone, *options)
    ranks_run(2, tmp_path / "log", arguments(python_data, two, *options))
    assert distance(read(two), read(alone)) < 1e-6
    for name in ("books", "audit"):
        records = read(two, name)
        expected = read(alone, name)
        for field in records.dtype.names:
            np.testing.assert_allclose(records[field], expected[field], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shard", [False, True])
def test_a_checkpoint_goes_on_with_another_number_of_processes(python_data, tmp_path, shard):
    """Two ranks stop after step 5, and of one copy four more after step 8. One, two and four
    processes go on, sharded and not: the values are those of a run by one process."""
    log = tmp_path / "log"
    resume = [*OPTIONS, "--init_from=resume"]
    run(python_data, tmp_path / "alone", *OPTIONS)
    first = arguments(python_data, tmp_path / "0", *OPTIONS, f"--shard={shard}", "--max_iters=5")
    ranks_run(2, log, first)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    shutil.copytree(tmp_path / "0", tmp_path / "2")
    run(python_data, tmp_path / "0", *resume)
    to_step_8 = [*resume, f"--shard={not shard}", "--max_iters=8"]
    ranks_run(4, log, arguments(python_data, tmp_path / "1", *to_step_8))
    ranks_run(
        2,
        log,
        arguments(python_data, tmp_path / "1", *resume),
        arguments(python_data, tmp_path / "2", *resume, "--shard=True"),
    )
    expected = read(tmp_path / "alone")
    expected_weights = weights(tmp_path / "alone")
    for copy in ("0", "1", "2"):
        visits = read(tmp_path / copy)
        assert (visits["chunk"] == expected["chunk"]).all()
        assert distance(visits[4:], expected[4:]) < 1e-5
        # of AdamW's first step only the sum is the same: see above
        first_sum = expected["value"][:4].sum(0)
        assert np.allclose(visits["value"][:4].sum(0), first_sum, rtol=1e-5)
        for name, weight in weights(tmp_path / copy).items():
            assert torch.allclose(weight, expected_weights[name], atol=1e-5), name


def means(out_dir):
    """{name: tensor}, the means of the targets' gradients in the newest checkpoint."""
    return read_checkpoint(out_dir / "ckpt.pt")["valuation"]["smoothing"]["means"]


@pytest.mark.parametrize("shard, rule", [(False, "adamw"), (True, "adamw"), (True, "adamw2")])
def test_smoothed_scores_do_not_depend_on_the_number_of_processes(
    python_data, tmp_path, shard, rule
):
    """Two ranks stop after step 5; one process, and two the other way, go on with their means."""
    log = tmp_path / "log"
    options = [*OPTIONS, f"--rule={rule}", "--target_smoothing=.9"]
    run(python_data, tmp_path / "alone", *options)
    first = arguments(python_data, tmp_path / "0", *options, f"--shard={shard}", "--max_iters=5")
    ranks_run(2, log, first)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    resume = [*options, "--init_from=resume"]
    run(python_data, tmp_path / "0", *resume)
    ranks_run(2, log, arguments(python_data, tmp_path / "1", *resume, f"--shard={not shard}"))
    expected = read(tmp_path / "alone")
    expected_means = means(tmp_path / "alone")
    for copy in ("0", "1"):
        visits = read(tmp_path / copy)
        assert (visits["chunk"] == expected["chunk"]).all()
        assert distance(visits[4:], expected[4:], column="smoothed") < 1e-5
        for name, mean in means(tmp_path / copy).items():
            assert mean.shape == expected_means[name].shape
            assert relative_distance(mean, expected_means[name]) < 1e-4, name


def relative_distance(a, b):
    return float((a - b).norm() / b.norm())


# --- nothing lost -------------------------------------------------------------


@pytest.mark.parametrize(
    "world, more",
    [
        (2, []),
        (2, ["--shard", "--rule=adamw2", "--target_smoothing=.9"]),
        (4, ["--background", "--dropout=0.1", "--target_smoothing=.9"]),
    ],
)
def test_a_run_whose_ranks_are_killed_ends_in_the_bytes_of_an_undisturbed_one(
    python_data, tmp_path, world, more
):
    """SIGKILL of a random rank at a random moment, and of all of them while a checkpoint is
    written."""
    log = tmp_path / "log"
    out = tmp_path / "killed"
    rng = random.Random(world)
    options = [*OPTIONS, "--max_iters=21", "--checkpoint_interval=3", "--log_interval=3"]
    options += ["--lr_decay_iters=21", "--n_layer=1", "--eval_interval=0", *more]
    server()  # its imports are no part of the duration
    began = time.monotonic()
    ranks_run(world, log, arguments(python_data, tmp_path / "whole", *options))
    duration = time.monotonic() - began
    argv = arguments(python_data, out, *options, "--init_from=auto")
    kills = 0
    while kills < 4:
        ranks = start(world, log, argv)
        if kills % 2:
            while not list(out.glob("*.tmp")) and ranks[0].is_alive():
                time.sleep(0.0005)
            victims = ranks
        else:
            # a run that goes on has less to do than the first
            share = rng.uniform(0.1, 0.4) if kills else rng.uniform(0.2, 0.8)
            ranks[0].join(share * duration)
            victims = rng.sample(ranks, 1)
        alive = [process for process in victims if process.is_alive()]
        for process in alive:
            os.kill(process.pid, signal.SIGKILL)
        if alive:
            kills += 1
        codes = ended(ranks)
        if not any(codes):
            shutil.rmtree(out)  # it was done before it was killed: begin anew
    ranks_run(world, log, argv)
    assert_same_run(out, tmp_path / "whole")
    assert list(read(out)["step"]) == list(np.repeat(np.arange(21), 4))


def test_a_stalled_rank_a_sigterm_and_a_full_disk_lose_nothing(python_data, tmp_path):
    """One after another in one run, which ends in the bytes of an undisturbed one. SIGTERM to a
    single rank lets all give up the same step and keep the last whole one."""
    log = tmp_path / "log"
    out = tmp_path / "run"
    options = [*OPTIONS, "--max_iters=60", "--checkpoint_interval=10", "--lr_decay_iters=60"]
    options += ["--book_interval=30", "--n_layer=1", "--n_embd=48"]
    ranks_run(2, log, arguments(python_data, tmp_path / "whole", *options))
    argv = arguments(python_data, out, *options, "--init_from=auto")

    ranks = start(2, log, argv)
    wait_for(out / "ckpt.pt", ranks[0], log)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    time.sleep(1)  # it stands still
    os.kill(ranks[1].pid, signal.SIGCONT)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert ended(ranks) == [0, 0], log.read_text()
    stopped = [line for line in log.read_text().splitlines() if line.startswith("stopped after")]
    assert len(stopped) == 1
    program = "torchrun --nproc_per_node=2 train.py"
    assert stopped[0].endswith(f"to go on: {program} {out}/config.json --init_from=resume")
    step = int(stopped[0].split()[3].rstrip(";"))
    assert 10 <= step < 50
    assert len(read(out)) == 4 * step

    size = (out / "ckpt.pt").stat().st_size
    assert 2 in ended(start(2, log, argv, limit=size // 2))
    refused = step // 10 * 10 + 10
    answer = f"No checkpoint of step {refused}; the one before it is whole"
    assert answer in log.read_text()
    assert read_checkpoint(out / "ckpt.pt")["iter_num"] == step

    ranks_run(2, log, argv)
    assert_same_run(out, tmp_path / "whole")


def jumping_run(argv, log):
    """The wall clock jumps back and forth by years."""
    rng = random.Random(0)

    def random_time():
        return rng.uniform(0, 4e9)

    def random_time_ns():
        return int(1e9 * random_time())

    time.time = random_time
    time.time_ns = random_time_ns
    quiet_run(argv, log)


def test_a_run_does_not_depend_on_the_wall_clock(python_data, tmp_path):
    log = tmp_path / "log"
    run(python_data, tmp_path / "whole", "--max_iters=6")
    process = in_process(
        jumping_run, arguments(python_data, tmp_path / "run", "--max_iters=6"), log
    )
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# --- damaged files ------------------------------------------------------------

THREE_CHECKPOINTS = ["--checkpoint_interval=4", "--keep_checkpoints=3", "--eval_interval=0"]


@pytest.fixture(scope="module")
def undamaged(python_data, tmp_path_factory):
    """A run with the checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("undamaged") / "run"
    run(python_data, folder, *THREE_CHECKPOINTS)
    return folder


def damage(path, rng, is_cut):
    """Flips a bit of a file, and cuts off what follows, where it is cut. Of an array the bit is in
    the last rows, which only the last checkpoint counted."""
    content = bytearray(path.read_bytes())
    first = 0 if path.name == "ckpt.pt" else len(content) - 100
    place = rng.randrange(first, len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content[:place] if is_cut else content)


@pytest.mark.parametrize(
    "name, is_cut",
    [
        ("ckpt.pt", False),
        ("ckpt.pt", True),
        ("ledger.npy", False),
        ("ledger.npy", True),
        ("books.npy", False),
    ],
)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_file(
    python_data, undamaged, tmp_path, capsys, name, is_cut
):
    """Three times, at random places. The file is named, and the run ends in the same bytes."""
    rng = random.Random(f"{name} {is_cut}")
    for number in range(3):
        out = shutil.copytree(undamaged, tmp_path / str(number))
        damage(out / name, rng, is_cut)
        capsys.readouterr()
        run(python_data, out, *THREE_CHECKPOINTS, "--init_from=resume")
        printed = capsys.readouterr().out
        (line,) = [line for line in printed.splitlines() if "cannot be used" in line]
        assert line.startswith(f"{out}/ckpt.pt cannot be used (")
        assert "damaged" in line
        assert name in line
        assert "steps 8 to 12" in printed
        assert read_bytes(out) == read_bytes(undamaged)
        checkpoints = sorted(path.name for path in out.glob("*.pt"))
        assert checkpoints == ["ckpt-4.pt", "ckpt-8.pt", "ckpt.pt"]


def test_a_run_without_a_whole_checkpoint_is_refused(python_data, undamaged, tmp_path):
    out = shutil.copytree(undamaged, tmp_path / "run")
    for path in out.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    answer = r"no checkpoint in .* is whole.*: --overwrite starts over"
    with pytest.raises(UserError, match=answer):
        run(python_data, out, *THREE_CHECKPOINTS, "--init_from=resume")


# --- while a run is running ---------------------------------------------------


@pytest.fixture
def running(python_data, tmp_path):
    """A process that trains in tmp_path / "run", and its argv."""
    out = tmp_path / "run"
    log = tmp_path / "log"
    argv = arguments(python_data, out, "--max_iters=4000", "--lr_decay_iters=4000")
    process = in_process(quiet_run, argv, log)
    wait_for(out / "ckpt.pt", process, log)
    yield process, argv
    process.kill()
    process.join()


@pytest.mark.parametrize("option", ["--overwrite", "--init_from=resume"])
def test_a_second_process_is_refused_in_the_folder_of_a_running_one(running, tmp_path, option):
    _, argv = running
    log = tmp_path / "second"
    second = in_process(quiet_run, [*argv, option], log)
    second.join()
    assert second.exitcode == 2
    assert "another process is writing" in log.read_text().splitlines()[-1]


def test_ctrl_c_ends_a_run_with_the_command_to_go_on(running, tmp_path):
    process, _ = running
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    command = f"python train.py {tmp_path}/run/config.json --init_from=resume"
    assert process.exitcode == 0
    assert f"to go on: {command}" in (tmp_path / "log").read_text()


# --- torchrun itself ----------------------------------------------------------


@pytest.mark.parametrize(
    "options, answer",
    [
        (
            ["--batch_size=1", "--gradient_accumulation_steps=3"],
            "2 processes cannot share 3 chunks evenly",
        ),
        (
            ["--shard", "--audit_interval=2"],
            "--shard knows no --compile",
        ),
        (
            ["--shard", "--n_embd=15", "--n_head=1"],
            "cannot share the 15 rows of transformer.h.0.ln_1.weight",
        ),
    ],
)
def test_several_processes_refuse_in_one_line(python_data, tmp_path, options, answer):
    log = tmp_path / "log"
    ranks = start(2, log, arguments(python_data, tmp_path / "run", *options))
    assert set(ended(ranks)) == {2}
    lines = log.read_text().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert answer in lines[0]
    assert not (tmp_path / "run").exists()


def documented_commands(section):
    """The commands of the sh blocks of a section of docs/cluster.md."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    text = page.split(f"## {section}\n")[1].split("\n## ")[0]
    commands = []
    for block in text.split("```sh\n")[1:]:
        for line in block.split("```")[0].splitlines():
            if line.strip():
                commands.append(line.split("  #")[0].strip())
    return commands


def test_the_documented_commands_for_one_machine_run(python_data, tmp_path):
    """Of docs/cluster.md, as they stand there, but for sizes: two processes and a small model. The
    first by torchrun itself, whose start costs most of the time, the others as it starts them."""
    sizes = ["--block_size=32", "--max_iters=4", "--checkpoint_interval=2"]
    small = arguments(python_data, tmp_path / "run", *sizes)
    commands = documented_commands("More than one GPU")
    commands = [line for line in commands if line.startswith("torchrun --nproc_per_node")]
    assert len(commands) >= 3
    log = tmp_path / "log"
    for number, line in enumerate(commands):
        launcher, options = line.split(" train.py ")
        assert launcher == "torchrun --nproc_per_node=8"
        argv = [*shlex.split(options), *small, "--overwrite"]
        last_step = 4
        if "--init_from" in line:
            argv = [*shlex.split(options), *small, "--max_iters=6", "--lr_decay_iters=4"]
            last_step = 6
        log.write_text("")
        if number == 0:
            by_torchrun(2, log, argv)
        else:
            ranks_run(2, log, argv)
        assert "x 2 float32" in log.read_text()
        assert f"step {last_step}/" in log.read_text()
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    left_behind = [line for line in running.stdout.splitlines() if f"={tmp_path}" in line]
    assert left_behind == []


def by_torchrun(world, log, argv):
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}"]
    with open(log, "w") as file:
        done = subprocess.run(
            [*launcher, "train.py", *argv],
            cwd=ROOT,
            env=environment_of_torchrun(),
            stdout=file,
            stderr=file,
        )
    assert done.returncode == 0, log.read_text()


def test_torchrun_starts_a_killed_run_again(python_data, tmp_path):
    """With --max-restarts all ranks go on from the checkpoint, to the bytes of an undisturbed
    run."""
    out = tmp_path / "run"
    options = [*OPTIONS, "--max_iters=40", "--lr_decay_iters=40", "--n_layer=1"]
    options += ["--eval_interval=0", "--init_from=auto"]
    ranks_run(2, tmp_path / "log", arguments(python_data, tmp_path / "whole", *options))
    torchrun = ["torch.distributed.run", "--nproc_per_node=2", "--max-restarts=2"]
    agent = subprocess.Popen(
        [sys.executable, "-m", *torchrun, "train.py", *arguments(python_data, out, *options)],
        cwd=ROOT,
        env=environment_of_torchrun(),
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (out / "ckpt.pt").exists():
        assert agent.poll() is None
        time.sleep(0.01)
    pattern = f"train.py.*--out_dir={out}"
    listed = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True)
    workers = [int(pid) for pid in listed.stdout.split() if int(pid) != agent.pid]
    os.kill(max(workers), signal.SIGKILL)
    printed, _ = agent.communicate(timeout=50)
    starts = [line for line in printed.splitlines() if line.startswith("steps ")]
    assert agent.returncode == 0, printed
    assert len(starts) == 2
    assert_same_run(out, tmp_path / "whole")
