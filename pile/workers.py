"""Processes that work on jobs side by side; what comes of them, in the jobs' order.

Not a ProcessPoolExecutor: that waits for ever where a worker is killed while it answers, for all
hold all ends of one pipe. Here each has a pipe of its own, which ends with it.
"""

import multiprocessing
import os
import signal
import threading
from itertools import chain
from multiprocessing.connection import wait


def start(n, prepare, *args):
    """n processes, each of which calls prepare(*args) for the function that it will apply to its
    jobs. -> {our end of a pipe: the process}. Raises OSError where so many cannot be started."""
    workers = {}
    try:
        for _ in range(n):
            ours, theirs = multiprocessing.Pipe()
            arguments = (theirs, prepare, args)
            worker = multiprocessing.Process(target=serve, args=arguments, daemon=True)
            worker.start()
            workers[ours] = worker
            theirs.close()  # so that the pipe ends with the worker
    except OSError:
        stop(workers)
        raise
    return workers


def serve(pipe, prepare, args):
    # the terminal sends Ctrl-C to all; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()
    function = prepare(*args)
    while True:
        pipe.send(function(pipe.recv()))


def end_with_parent():
    """Nobody else would end a worker whose parent was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def ordered(workers, jobs):
    """What comes of the jobs, none of which is None, in their order; at most twice as many wait as
    there are workers, so memory stays constant. Raises BrokenPipeError where a worker died."""
    busy, done = {}, {}  # {pipe: number of its job}, {number: what came of it}
    first = 0  # the number that is next
    for number, job in enumerate(chain(jobs, [None])):
        while busy and (job is None or is_full(workers, busy, number - first)):
            for pipe in wait(busy):
                try:
                    done[busy.pop(pipe)] = pipe.recv()
                except (EOFError, OSError) as e:  # between two answers, or in the midst of one
                    raise BrokenPipeError("a worker process ended") from e
            while first in done:
                yield done.pop(first)
                first += 1
        if job is not None:
            pipe = next(pipe for pipe in workers if pipe not in busy)
            pipe.send(job)
            busy[pipe] = number


def is_full(workers, busy, ahead):
    """Whether no worker is free, or what came of too many jobs waits for an earlier one."""
    return len(busy) == len(workers) or ahead > 2 * len(workers)


def stop(workers):
    for worker in workers.values():
        # one that is just starting would miss a SIGTERM between the handler it inherits and its own
        worker.kill()
