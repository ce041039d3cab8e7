"""Several processes: the same values from any number of them, and nothing lost when some die."""

import multiprocessing
import os
import socket
import sys
import time

import numpy as np
import pytest
import torch

import config
import train as train_module
from test_train import TWO, arguments, quiet_run, read_bytes, run, weights
from train import Config, train


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_run(rank, world, port, argv, log):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    quiet_run(argv, log)
    train_module.parallel.stop()


def start(world, argv, log):
    """The processes torchrun would start, forked from a server that has everything imported."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(["train"])
    ranks = [context.Process(target=rank_run, args=(rank, world, port, argv, log)) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def finish(ranks, log):
    for process in ranks:
        process.join(50)
    assert [process.exitcode for process in ranks] == [0] * len(ranks), log.read_text()


@pytest.mark.parametrize("rule", ["adamw"])
def test_values_do_not_depend_on_the_ranks(python_data, tmp_path, rule):
    log = tmp_path / "log"
    more = (TWO, f"--rule={rule}", "--target_batch=3", "--book_interval=3")
    run(python_data, tmp_path / "alone", *more)
    alone = np.load(tmp_path / "alone" / "ledger.npy")
    for world, shard in ((2, False), (2, True), (4, False), (4, True)):
        out = tmp_path / f"{world}-{shard}"
        finish(start(world, arguments(python_data, out, *more, f"--shard={shard}"), log), log)
        ledger = np.load(out / "ledger.npy")
        for name in ("step", "chunk", "early"):
            assert (ledger[name] == alone[name]).all()
        per = np.linalg.norm((ledger["value"] - alone["value"]).reshape(12, -1), axis=1) / np.linalg.norm(alone["value"].reshape(12, -1), axis=1)
        print(world, shard, per, np.linalg.norm(ledger["value"] - alone["value"]) / np.linalg.norm(alone["value"]))
