"""`ranks`: two processes joined by gloo, which stay alive for all tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import RANKS

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300  # seconds for one scenario; a rank that waits for another one in vain must not hang the tests


class Ranks:
    """Call a scenario of ranks.py on every rank; gives their results, and raises where one of them failed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.processes: list[subprocess.Popen[str]] = []

    def __call__(self, scenario: Callable[..., Any], **kwargs: Any) -> list[Any]:
        if not self.processes:
            self.start()
        self.count += 1
        files = [self.folder / f"result{self.count}.{rank}" for rank in range(RANKS)]
        for process, file in zip(self.processes, files, strict=True):
            order = {"scenario": scenario.__name__, "kwargs": kwargs, "file": str(file)}
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        timer = threading.Timer(LIMIT, self.kill)
        timer.start()
        for process in self.processes:
            assert process.stdout is not None
            while (line := process.stdout.readline()) and line != "done\n":
                pass  # what torch prints
        timer.cancel()
        results = [torch.load(file, weights_only=False) if file.exists() else {"error": "died"} for file in files]
        if errors := [result["error"] for result in results if "error" in result]:
            self.kill()  # the ranks may be at different places now
            pytest.fail(f"{scenario.__name__}: " + "\n".join(errors))
        return [result["result"] for result in results]

    def start(self) -> None:
        store = self.folder / f"store{self.count}"
        paths = os.pathsep.join([str(ROOT), str(ROOT / "python_api"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # Accelerate asks, and uses the group there is
        for rank in range(RANKS):
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}  # as torchrun does
            self.processes.append(subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.ranks", str(rank), str(store)], cwd=ROOT, env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            ))  # fmt: skip

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes = []

    def end(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    running = Ranks(tmp_path_factory.mktemp("ranks"))
    try:
        yield running
    finally:
        running.end()
