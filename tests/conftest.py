"""One header line that says what this machine can run; one thread per worker where tests run side by side."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from subnet_kernels.backends import native


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backend", action="append", default=[], metavar="NAME",
        help="fail the run at once if this backend (cpu, cuda, triton) can't run here",
    )  # fmt: skip


def pytest_report_header(config: pytest.Config) -> str:
    extension = "extension loaded" if native.is_available() else f"no extension: {native.load_error()}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"subnet-kernels: torch {torch.__version__}, {extension}, {gpu}"


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    has_cuda = torch.cuda.is_available() and native.has_cuda_kernels()
    usable = {"reference": True, "cpu": native.is_available(), "cuda": has_cuda}
    for name in config.getoption("--require-backend"):
        if not usable.get(name, False):
            raise pytest.UsageError(f"--require-backend {name}: this machine can't run it")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data that developers keep beside their checkout, ../shared/data; skips where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data: there is no {folder}")
    return folder
