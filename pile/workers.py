"""Worker processes, and their results in the order of the jobs.

A ProcessPoolExecutor would wait for ever where a worker is killed while it answers: its workers
share one pipe. Here each worker has a pipe of its own, which ends with it.
"""

import multiprocessing
import os
import signal
import threading
from itertools import chain
from multiprocessing.connection import wait


def start(n, prepare, *args):
    """Starts n processes. Returns {our end of a pipe: the process at the other end}.

    Each calls prepare(*args), which returns the function that it applies to its jobs. Raises
    OSError where so many cannot be started."""
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
    """The life of a worker: it answers one job after another."""
    # the terminal sends Ctrl-C to all; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()
    function = prepare(*args)
    while True:
        pipe.send(function(pipe.recv()))


def end_with_parent():
    """Ends this worker when its parent was killed, for nobody else would."""
    multiprocessing.parent_process().join()
    os._exit(1)


def ordered(workers, jobs):
    """Yields the results of the jobs, in their order. A job is anything but None.

    At most twice as many results wait as there are workers, so that memory stays bounded. Raises
    BrokenPipeError where a worker has died."""
    busy = {}  # {pipe: number of the job there}
    results = {}  # {number of a job: its result}
    next_number = 0  # of the job whose result is to be yielded next
    for number, job in enumerate(chain(jobs, [None])):
        while busy and (job is None or is_full(workers, busy, number - next_number)):
            for pipe in wait(busy):
                results[busy.pop(pipe)] = receive(pipe)
            while next_number in results:
                yield results.pop(next_number)
                next_number += 1
        if job is not None:
            pipe = next(pipe for pipe in workers if pipe not in busy)
            pipe.send(job)
            busy[pipe] = number


def is_full(workers, busy, ahead):
    """Whether no worker is free, or too many results wait for an earlier one."""
    return len(busy) == len(workers) or ahead > 2 * len(workers)


def receive(pipe):
    """A worker's answer. Raises BrokenPipeError where it died before or while it answered."""
    try:
        return pipe.recv()
    except (EOFError, OSError) as e:
        raise BrokenPipeError("a worker process ended") from e


def stop(workers):
    """Kills the workers. A worker that is just starting could miss a SIGTERM."""
    for worker in workers.values():
        worker.kill()
