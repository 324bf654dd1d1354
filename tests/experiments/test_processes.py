"""Work in processes side by side: order, threads, errors, killed processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from subnets.training.processes import map_in_processes


def _square(job: int) -> tuple[int, int, int]:
    return job**2, torch.get_num_threads(), os.getpid()


def _refuse(job: int) -> int:
    if job == 1:
        raise ValueError("job must not be 1")
    return job


def _die(job: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order_from_other_processes_of_one_thread() -> None:
    found = list(map_in_processes(_square, range(5), 2, name="squares", advice=""))
    assert [square for square, _, _ in found] == [0, 1, 4, 9, 16]
    assert {threads for _, threads, _ in found} == {1}
    assert os.getpid() not in {process for _, _, process in found}


def test_an_error_of_the_work_is_raised_as_it_is() -> None:
    results = map_in_processes(_refuse, [0, 1, 2], 1, name="refusals", advice="")
    assert next(results) == 0
    with pytest.raises(ValueError, match="^job must not be 1$"):
        next(results)


def test_a_killed_process_is_said_so() -> None:
    with pytest.raises(RuntimeError, match=r"^work: a worker process was killed \(out of memory\?\); start it again$"):
        list(map_in_processes(_die, [0], 1, name="work", advice="start it again"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_processes_end_with_the_one_that_started_them(tmp_path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, pathlib, time\n"
        "from subnets.training.processes import map_in_processes\n"
        f"place = pathlib.Path({str(tmp_path)!r})\n"
        "def work(job):\n"
        "    (place / 'pid').write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    list(map_in_processes(work, [0], 1, name='parent', advice=''))\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    pid = tmp_path / "pid"
    _wait_for(lambda: pid.exists() and pid.read_text() != "")
    worker = int(pid.read_text())
    parent.kill()
    parent.wait()
    _wait_for(lambda: not _is_running(worker))


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # an orphan that ended stays a zombie where nothing collects it
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
