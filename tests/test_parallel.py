"""Several processes: the same values from any number of them, and nothing lost when some of them die."""

import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import TWO, arguments, in_process, quiet_run, read_bytes, run, weights

import config
from system import parallel
from system.checkpoints import read_checkpoint
from system.store import read

ROOT = Path(config.__file__).parent
MORE = (TWO, "--book_interval=3", "--target_batch=3", "--lr_decay_iters=12")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def own_port():
    """torchrun's environment, for several tests at a time."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PET_MASTER_PORT": str(free_port())}


def rank_run(rank, world, port, argvs, log, limit):
    names = dict(
        RANK=rank,
        LOCAL_RANK=rank,
        WORLD_SIZE=world,
        LOCAL_WORLD_SIZE=world,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    os.environ.update({name: str(x) for name, x in names.items()})
    if limit:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (limit, limit)
        )  # no file may grow beyond it, as on a full disk
    for argv in argvs:
        quiet_run(argv, log)
    parallel.stop()


def start(world, log, *argvs, limit=0):
    """The processes that torchrun would start, forked from a server that has everything imported; each runs all of argvs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "torch.distributed.fsdp"])
    port = free_port()
    ranks = [
        context.Process(target=rank_run, args=(rank, world, port, argvs, log, limit))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    return ranks


def ended(ranks):
    """Their exit codes. As torchrun does, where one has failed the others are asked to end."""
    deadline = time.monotonic() + 50
    while (
        any(p.is_alive() for p in ranks)
        and not any(p.exitcode for p in ranks)
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    for process in ranks:
        process.join(2)  # time to find out for itself
        if process.is_alive():
            process.terminate()
            process.join(5)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert None not in codes, codes
    return codes


def ranks_run(world, log, *argvs):
    assert set(ended(start(world, log, *argvs))) == {0}, log.read_text()


def distance(a, b, batch=4):
    """The largest relative distance of a step's values."""
    a, b = (x["value"].reshape(len(x) // batch, -1).astype(float) for x in (a, b))
    return max(np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1))


# --- the same values ----------------------------------------------------------

WORLDS = [
    (2, False, ["adamw", "adamw2", "sgd"]),
    (4, False, ["adamw"]),
    (2, True, ["adamw", "adamw2"]),
    (4, True, ["adamw"]),
]


@pytest.mark.parametrize("world, shard, rules", WORLDS)
def test_values_do_not_depend_on_the_processes(python_data, tmp_path, world, shard, rules):
    """Each rule alone and by 2 or 4 ranks, DDP or FSDP2, the default rule in up to 4 micro-batches a rank: within 1e-5 in float32, step by step.

    But for AdamW's first step, where m = v = 0 and the exact secant is b / (sqrt(d) |g| + eps): a g that is zero but for rounding makes it
    anything. There the sum of the values is compared, from which such elements cancel (and the ledger marks the step as early)."""
    log, argvs, more = tmp_path / "log", {}, (*MORE, "--max_iters=6", "--eval_interval=4")
    for rule in rules:
        run(
            python_data,
            tmp_path / rule,
            *more,
            f"--rule={rule}",
            "--batch_size=8",
            "--gradient_accumulation_steps=1",
        )
        for n in (
            (1, 4, 8)[:: world // 2] if rule == "adamw" else (1,)
        ):  # micro-batches: 1, 2, 4 for each of two ranks, 1 and 2 for each of four
            cut = (
                f"--batch_size={8 // n}",
                f"--gradient_accumulation_steps={n}",
                f"--shard={shard}",
                f"--rule={rule}",
            )
            argvs[rule, n] = arguments(python_data, tmp_path / f"{rule}-{n}", *more, *cut)
    ranks_run(world, log, *argvs.values())
    for rule, n in argvs:
        alone, many = read(tmp_path / rule), read(tmp_path / f"{rule}-{n}")
        for name in ("step", "chunk", "early"):
            assert (many[name] == alone[name]).all()
        assert np.allclose(many["loss"], alone["loss"], rtol=1e-5)
        assert np.allclose(many["grad_norm"], alone["grad_norm"], rtol=1e-4, equal_nan=True)
        assert np.allclose(many["value"][:8].sum(0), alone["value"][:8].sum(0), rtol=1e-5)
        first = 8 if rule.startswith("adamw") else 0
        assert distance(many[first:], alone[first:], 8) < 1e-5
        books, reference = (np.load(tmp_path / out / "books.npy") for out in (f"{rule}-{n}", rule))
        for name in ("kappa", "before", "after", "momentum", "decay"):
            assert np.allclose(
                books[name], reference[name], rtol=1e-4, atol=1e-7, equal_nan=True
            ), name
        values, reference = (
            np.load(tmp_path / out / "values.npy") for out in (f"{rule}-{n}", rule)
        )
        assert (np.isnan(values) == np.isnan(reference)).all()


@pytest.mark.parametrize("world", [3, 6])
def test_where_values_depend_on_the_processes_they_are_marked_early(python_data, tmp_path, world):
    """20 steps by one process and by 3 or 6: where a step's values are apart by more than 1e-5, its
    visits are marked early. There v is nearly zero, and an element of g that is zero but for
    rounding is divided by itself; such elements cancel from the sum of a step's values."""
    log, argvs = tmp_path / "log", {}
    more = (TWO, "--target_batch=3", "--max_iters=20", "--eval_interval=0")
    more += ("--batch_size=6", "--gradient_accumulation_steps=1")
    for rule in ("adamw", "adamw2")[world // 6 :]:
        run(python_data, tmp_path / rule, *more, f"--rule={rule}")
        argvs[rule] = arguments(python_data, tmp_path / f"{rule}-many", *more, f"--rule={rule}")
    ranks_run(world, log, *argvs.values())
    for rule in argvs:
        alone, many = (read(tmp_path / name) for name in (rule, f"{rule}-many"))
        assert (many["early"] == alone["early"]).all()
        assert set(alone["step"][alone["early"] == 1]) == {0, 1, 2}
        late = alone["early"] == 0
        assert distance(many[late], alone[late], 6) < 1e-5
        sums = [x["value"].reshape(20, 6, 2).sum(1, dtype=float) for x in (alone, many)]
        assert np.allclose(*sums, rtol=1e-4)


def test_audits_are_the_same_by_two_processes(python_data, tmp_path):
    more = (
        *MORE,
        "--dtype=float64",
        "--audit_interval=5",
    )
    run(python_data, tmp_path / "alone", *more)
    ranks_run(2, tmp_path / "log", arguments(python_data, tmp_path / "two", *more))
    assert distance(read(tmp_path / "two"), read(tmp_path / "alone")) < 1e-6
    for name in ("books", "audit"):
        two, alone = read(tmp_path / "two", name), read(tmp_path / "alone", name)
        for field in two.dtype.names:
            assert np.allclose(two[field], alone[field], rtol=1e-4, atol=1e-6, equal_nan=True), (
                field
            )


@pytest.mark.parametrize("shard", [False, True])
def test_a_checkpoint_goes_on_with_another_number_of_processes(python_data, tmp_path, shard):
    """From two ranks, stopped after step 5 and again after step 8, to one and to four, sharded and not: the values of a run that was not."""
    log, more = tmp_path / "log", MORE
    run(python_data, tmp_path / "alone", *more)
    ranks_run(
        2, log, arguments(python_data, tmp_path / "0", *more, f"--shard={shard}", "--max_iters=5")
    )
    for copy in "12":
        shutil.copytree(tmp_path / "0", tmp_path / copy)
    resume = "--init_from=resume"
    run(python_data, tmp_path / "0", *more, resume)
    ranks_run(
        4,
        log,
        arguments(
            python_data, tmp_path / "1", *more, resume, f"--shard={not shard}", "--max_iters=8"
        ),
    )
    ranks_run(
        2,
        log,
        arguments(python_data, tmp_path / "1", *more, resume),
        arguments(python_data, tmp_path / "2", *more, resume, "--shard=True"),
    )
    for copy in "012":
        went_on, alone = read(tmp_path / copy), read(tmp_path / "alone")
        assert (went_on["chunk"] == alone["chunk"]).all()
        assert distance(went_on[4:], alone[4:]) < 1e-5
        assert np.allclose(
            went_on["value"][:4].sum(0), alone["value"][:4].sum(0), rtol=1e-5
        )  # AdamW's first step: see above
        assert all(
            torch.allclose(a, b, atol=1e-5)
            for a, b in zip(weights(tmp_path / copy).values(), weights(tmp_path / "alone").values())
        )


# --- nothing lost -------------------------------------------------------------


@pytest.mark.parametrize(
    "world, more",
    [
        (2, ()),
        (2, ("--shard", "--rule=adamw2")),
        (4, ("--background", "--dropout=0.1")),
    ],
)
def test_ranks_killed_at_random(python_data, tmp_path, world, more):
    """SIGKILL of a random rank at a random time, or of all while a checkpoint is written. Resumed, the files are byte for byte those of an
    undisturbed run."""
    log, out, rng = tmp_path / "log", tmp_path / "killed", random.Random(world)
    more = (
        *MORE,
        "--max_iters=21",
        "--checkpoint_interval=3",
        "--log_interval=3",
        "--lr_decay_iters=21",
        "--n_layer=1",
        "--eval_interval=0",
        *more,
    )
    began = time.monotonic()
    ranks_run(world, log, arguments(python_data, tmp_path / "whole", *more))
    duration, kills = time.monotonic() - began, 0
    while kills < 4:
        ranks = start(world, log, arguments(python_data, out, *more, "--init_from=auto"))
        if kills % 2:  # while a checkpoint is written
            while not list(out.glob("*.tmp")) and ranks[0].is_alive():
                time.sleep(0.0005)
            victims = ranks
        else:
            ranks[0].join(rng.uniform(0.2, 0.8) * duration)
            victims = rng.sample(ranks, 1)
        alive = [process for process in victims if process.is_alive()]
        kills += bool(alive)
        for process in alive:
            os.kill(process.pid, signal.SIGKILL)
        if not any(ended(ranks)):  # it was done already: begin anew
            shutil.rmtree(out)
    ranks_run(world, log, arguments(python_data, out, *more, "--init_from=auto"))
    assert read_bytes(out) == read_bytes(tmp_path / "whole")
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(out).values(), weights(tmp_path / "whole").values())
    )
    assert list(read(out)["step"]) == list(np.repeat(np.arange(21), 4))


def test_what_happens_on_a_cluster(python_data, tmp_path):
    """A rank that stands still for a while; SIGTERM, to one of them: the step is finished, a checkpoint written, exit code 0, and the command
    to go on; a full disk. The files end as those of an undisturbed run."""
    log, out = tmp_path / "log", tmp_path / "run"
    more = (
        *MORE,
        "--max_iters=60",
        "--checkpoint_interval=10",
        "--lr_decay_iters=60",
        "--book_interval=30",
        "--n_layer=1",
        "--n_embd=48",
    )
    ranks_run(2, log, arguments(python_data, tmp_path / "whole", *more))
    argv = arguments(python_data, out, *more, "--init_from=auto")

    ranks = start(2, log, argv)
    while not (out / "ckpt.pt").exists():
        time.sleep(0.01)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    time.sleep(1)
    os.kill(ranks[1].pid, signal.SIGCONT)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert ended(ranks) == [0, 0], log.read_text()
    line = [line for line in log.read_text().splitlines() if line.startswith("stopped after step")][
        -1
    ]
    assert line.endswith(
        f"to go on: torchrun --nproc_per_node=2 train.py {out}/config.json --init_from=resume"
    )
    step = int(line.split()[3].rstrip(";"))
    assert 10 < step < 50
    assert len(read(out)) == 4 * step

    size = (out / "ckpt.pt").stat().st_size
    assert 2 in ended(start(2, log, argv, limit=size // 2))
    assert (
        f"No checkpoint of step {step // 10 * 10 + 10}; the one before it is whole"
        in log.read_text()
    )
    assert read_checkpoint(out / "ckpt.pt")["iter_num"] == step

    ranks_run(2, log, argv)
    assert read_bytes(out) == read_bytes(tmp_path / "whole")


def jumping_run(argv, log):
    """The wall clock jumps back and forth by years."""
    rng = random.Random(0)
    time.time = lambda: rng.uniform(0, 4e9)
    time.time_ns = lambda: int(1e9 * time.time())
    quiet_run(argv, log)


def test_the_clock_jumps(python_data, tmp_path):
    run(python_data, tmp_path / "whole", "--max_iters=6")
    process = in_process(
        jumping_run, arguments(python_data, tmp_path / "run", "--max_iters=6"), tmp_path / "log"
    )
    process.join()
    assert process.exitcode == 0
    assert read_bytes(tmp_path / "run") == read_bytes(tmp_path / "whole")


def test_damage_is_found_by_checksum_and_the_checkpoint_before_is_used(
    python_data, tmp_path, capsys
):
    """Bits flipped in and bytes cut off checkpoints and arrays, wherever: named, and the run ends as if nothing had been."""
    out, rng = tmp_path / "run", random.Random(0)
    more = ("--checkpoint_interval=4", "--keep_checkpoints=3", "--eval_interval=0")
    run(python_data, tmp_path / "whole", *more)
    for name, cut in [
        ("ckpt.pt", 0),
        ("ckpt.pt", 1),
        ("ledger.npy", 0),
        ("ledger.npy", 1),
        ("books.npy", 0),
    ] * 3:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", out)
        content = bytearray((out / name).read_bytes())
        at = rng.randrange(
            0 if name == "ckpt.pt" else len(content) - 100, len(content)
        )  # of an array, rows that only the last checkpoint counted
        content[at] ^= 1 << rng.randrange(8)
        (out / name).write_bytes(content[:at] if cut else content)
        capsys.readouterr()
        run(python_data, out, *more, "--init_from=resume")
        said = capsys.readouterr().out
        assert f"{out}/ckpt.pt cannot be used (" in said
        assert "damaged" in said
        assert name == "ckpt.pt" or name in said
        assert "steps 8 to 12" in said
        assert read_bytes(out) == read_bytes(tmp_path / "whole")
        assert sorted(p.name for p in out.glob("*.pt")) == ["ckpt-4.pt", "ckpt-8.pt", "ckpt.pt"]
    for path in out.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* is whole.*: --overwrite starts over"
    ):
        run(python_data, out, *more, "--init_from=resume")


def test_only_one_run_writes_a_folder(python_data, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    first = in_process(
        quiet_run, arguments(python_data, out, "--max_iters=4000", "--lr_decay_iters=4000"), log
    )
    while not (out / "ckpt.pt").exists():
        time.sleep(0.01)
    for more in (["--overwrite"], ["--init_from=resume"]):
        second = in_process(
            quiet_run,
            arguments(python_data, out, "--max_iters=4000", "--lr_decay_iters=4000", *more),
            tmp_path / "second",
        )
        second.join()
        assert second.exitcode == 2
        assert "another process is writing" in (tmp_path / "second").read_text().splitlines()[-1]
    os.kill(first.pid, signal.SIGINT)
    first.join(10)
    assert first.exitcode == 0
    assert f"to go on: python train.py {out}/config.json --init_from=resume" in log.read_text()


# --- torchrun itself ----------------------------------------------------------


def test_what_several_processes_cannot_do_is_said(python_data, tmp_path):
    for argv, answer in {
        (
            "--batch_size=1",
            "--gradient_accumulation_steps=3",
        ): "2 processes cannot share 3 chunks evenly",
        ("--shard", "--audit_interval=2"): "--shard knows no --compile",
        (
            "--shard",
            "--n_embd=15",
            "--n_head=1",
        ): "cannot share the 15 rows of transformer.h.0.ln_1.weight",
    }.items():
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        assert set(ended(start(2, log, arguments(python_data, tmp_path / "run", *argv)))) == {2}
        lines = log.read_text().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and answer in lines[0], lines
        assert not (tmp_path / "run").exists()


def commands(section):
    """The commands of the sh blocks of a section of docs/cluster.md."""
    text = (ROOT / "docs" / "cluster.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return [
        line.split("  #")[0].strip()
        for block in text.split("```sh\n")[1:]
        for line in block.split("```")[0].splitlines()
        if line.strip()
    ]


def test_the_commands_for_one_machine(python_data, tmp_path):
    """Those of docs/cluster.md, "More than one GPU", as they stand there, but for sizes: two processes and a small model."""
    found = [
        line
        for line in commands("More than one GPU")
        if line.startswith("torchrun --nproc_per_node")
    ]
    assert len(found) >= 3
    small = arguments(
        python_data, tmp_path / "run", "--block_size=32", "--max_iters=4", "--checkpoint_interval=2"
    )
    for line in found:
        argv = shlex.split(line.replace("--nproc_per_node=8", "--nproc_per_node=2"))
        more = ["--max_iters=6", "--lr_decay_iters=4"] if "--init_from" in line else ["--overwrite"]
        command = [sys.executable, "-m", "torch.distributed.run", *argv[1:], *small, *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=own_port())
        assert done.returncode == 0, done.stderr
        assert (
            "x 2 float32" in done.stdout
            and f"step {6 if '--init_from' in line else 4}/" in done.stdout
        ), done.stdout
    running = subprocess.run(
        ["ps", "-eo", "args"], capture_output=True, text=True
    ).stdout.splitlines()
    assert not [
        line for line in running if f"--out_dir={tmp_path}" in line
    ]  # no process is left behind


def test_torchrun_starts_again(python_data, tmp_path):
    """--max-restarts: a worker killed, torchrun starts all anew, which go on from the checkpoint: the bytes of an undisturbed run."""
    out, more = (
        tmp_path / "run",
        (
            *MORE,
            "--max_iters=40",
            "--lr_decay_iters=40",
            "--n_layer=1",
            "--eval_interval=0",
            "--init_from=auto",
        ),
    )
    ranks_run(2, tmp_path / "log", arguments(python_data, tmp_path / "whole", *more))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--max-restarts=2",
        "train.py",
    ]
    agent = subprocess.Popen(
        [*command, *arguments(python_data, out, *more)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        env=own_port(),
    )
    while not (out / "ckpt.pt").exists():
        assert agent.poll() is None
        time.sleep(0.01)
    workers = subprocess.run(
        ["pgrep", "-f", f"train.py.*--out_dir={out}"], capture_output=True, text=True
    ).stdout.split()
    os.kill(max(int(pid) for pid in workers if int(pid) != agent.pid), signal.SIGKILL)
    said, _ = agent.communicate(timeout=50)
    assert (
        agent.returncode == 0
        and len([line for line in said.splitlines() if line.startswith("steps ")]) == 2
    ), said
    assert read_bytes(out) == read_bytes(tmp_path / "whole")
