"""Transfer networks side by side on a CPU: one process and one thread each, twice the throughput of one with two."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

Job = TypeVar("Job")


def run_side_by_side(
    work: Callable[[Path, Job], None], folder: Path, jobs: Sequence[Job], workers: int, show: bool
) -> None:
    """Calls `work(folder, job)` for every job in `workers` fresh processes; the first error ends all of it.

    Raises RuntimeError if a process was killed. What is done is in files, so the same call goes on.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(os.getpid(),))
    bar = tqdm(total=len(jobs), desc=f"transfer networks, {workers} at a time", disable=not show)
    try:
        for done in as_completed([pool.submit(work, folder, job) for job in jobs]):
            done.result()
            bar.update()
    except BrokenProcessPool:
        raise RuntimeError(
            "subnets run vision: a process that trains was killed (out of memory?); the same command goes on where it "
            "stopped, and needs less memory with --set workers=1 in a new folder"
        ) from None
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)


def _start(parent: int) -> None:
    """One thread per process; the process ends when its parent was killed."""
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
