"""Runs of train.py as tests make them: small, in this process or in a process of their own."""

import functools
import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest
import torch

import config
from train import Config, train

SMALL = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=16",
    "--batch_size=2",
    "--gradient_accumulation_steps=2",
    "--warmup_iters=5",
    "--learning_rate=5e-3",
    "--eval_chunks=2",
    "--log_interval=1",
    "--device=cpu",
    "--dtype=float32",
    "--grad_clip=0.5",
]
TWO_TARGETS = "--targets=val:Python code,val:Docstrings"


def arguments(data_dir, out_dir, *more):
    """The command line of a small run of twelve steps, with a checkpoint of step 5."""
    return [
        *SMALL,
        f"--data_dir={data_dir}",
        f"--out_dir={out_dir}",
        "--max_iters=12",
        "--checkpoint_interval=5",
        *more,
    ]


def run(data_dir, out_dir, *more):
    """Trains in this process. Returns the run's progress."""
    return train(config.load(Config, arguments(data_dir, out_dir, *more)))


# --- in a process of its own --------------------------------------------------


@functools.cache
def server():
    """A multiprocessing context whose processes have everything imported: they are forked from a
    server that never computed anything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["commands", "pytest", "torch._dynamo", "torch.distributed.fsdp"]
    )
    with pytest.MonkeyPatch.context() as patch:  # the server finds modules by its environment alone
        folders = [str(Path(config.__file__).parent), str(Path(__file__).parent)]
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))
        first = context.Process(target=int)
        first.start()
    first.join()  # everything is imported
    return context


def in_process(target, *args):
    process = server().Process(target=target, args=args)
    process.start()
    return process


def quiet_run(argv, log):
    """Trains in this process, which then says everything to the end of a file."""
    torch.set_num_threads(1)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    config.main(lambda: train(config.load(Config, argv)))


def wait_for(path, process, log):
    """Until a file is there, which a process is to write."""
    while not path.exists():
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)


# --- several, as torchrun starts them -----------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def become_rank(rank, world, port):
    """What torchrun tells a process before it starts."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def ended(ranks):
    """Their exit codes. As torchrun does, where one has failed the others are asked to end."""
    deadline = time.monotonic() + 50
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode for process in ranks):
            break
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


# --- what a run left ----------------------------------------------------------


def read_bytes(out_dir):
    """{name: content} of the arrays."""
    return {path.name: path.read_bytes() for path in Path(out_dir).glob("*.npy")}


def weights(out_dir):
    """{name: tensor}, of the newest checkpoint."""
    return torch.load(Path(out_dir, "ckpt.pt"), weights_only=True)["model"]


def assert_same_run(one, other):
    """The arrays of two runs are the same to the byte, and their last weights to the bit."""
    arrays = read_bytes(one)
    expected_arrays = read_bytes(other)
    assert "values.npy" in arrays
    assert arrays.keys() == expected_arrays.keys()
    for name, content in arrays.items():
        assert content == expected_arrays[name], name
    last = weights(one)
    expected = weights(other)
    assert last.keys() == expected.keys()
    for name, weight in last.items():
        assert torch.equal(weight, expected[name]), name
