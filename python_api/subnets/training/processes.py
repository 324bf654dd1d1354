"""Work side by side in processes of one thread each, which end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, *, name: str, advice: str, chunk: int = 1
) -> Iterator[Result]:
    """`work(job)` of every job, in their order, from `workers` fresh processes; the first error ends all of it.

    Args:
        work: a module's function (or a `functools.partial` of one), which the processes import.
        name, advice: whose processes they are and what to do where one was killed, for the error.
        chunk: jobs that are handed out at once; more where a job takes milliseconds.

    Raises:
        RuntimeError: a process was killed. What `work` raises, as it is.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(os.getpid(),))
    try:
        yield from pool.map(work, jobs, chunksize=chunk)
    except BrokenProcessPool:
        raise RuntimeError(f"{name}: a worker process was killed (out of memory?); {advice}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(parent: int) -> None:
    """One thread; the process ends when its parent was killed."""
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
