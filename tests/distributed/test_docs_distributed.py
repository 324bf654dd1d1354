"""docs/distributed.md: its script under torchrun, its SLURM array, and the sweep on Ray."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from subnets.subnet import Subnet

from tests.distributed import ranks as scenario

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "python_api"), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(command: list[str], folder: Path, seconds: int = 240, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def script() -> str:
    return next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "# train.py" in block)


@pytest.fixture(scope="module")
def subnet_of_ddp(script: str, tmp_path_factory: pytest.TempPathFactory) -> Subnet:
    """As a user would: the page's script in a file, started by the page's line."""
    assert "torchrun --nproc-per-node=2 train.py " in PAGE
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "train.py").write_text(script)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    printed = run([sys.executable, *launch], folder)
    assert printed.count("Subnet(2 parameters") == 1  # one rank prints and writes
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [str(n) for n in range(10)]
    return Subnet.load(folder / "subnet.safetensors")


def test_the_script_runs_under_torchrun(subnet_of_ddp):
    assert 0.05 < subnet_of_ddp.density() < 0.95


def test_the_script_finds_the_same_subnet_with_fsdp(ranks, script, subnet_of_ddp, tmp_path):
    ranks(scenario.script, text=script, flags=["--fsdp"], folder=str(tmp_path))
    assert Subnet.load(tmp_path / "subnet.safetensors").iou(subnet_of_ddp) > 0.99


def test_the_slurm_array_runs_one_task_per_index(tmp_path):
    script = next(block for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) if "#SBATCH" in block)
    (tmp_path / "array.sh").write_text(script)
    command = tmp_path / "subnets"
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    printed = run(["bash", "array.sh"], tmp_path, PATH=path, SLURM_ARRAY_TASK_ID="3")
    assert printed == "run arithmetic --set seed=3 --out runs/sweep/seed3 --quiet\n"


TINY = (
    "layers=1 width=16 heads=2 base_pairs=300 base_epochs=1 discovery_pairs=300 discovery_epochs=2 transfer_epochs=1 "
    "sizes=10 transfer_seeds=1 num_ambiguous=60 num_held_out=50 conditions=subnet,full_model device=cpu"
)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: the sweep on Ray is not run")
def test_the_sweep_on_ray_runs_every_combination_and_skips_what_is_there(tmp_path):
    sweep = [sys.executable, str(ROOT / "examples" / "sweep_ray.py"), "arithmetic", "runs", *TINY.split()]
    varied = ["seed=0", "seed=1"]
    start = {"RAY_ADDRESS": "", "RAY_TMPDIR": "/tmp", "RAY_DISABLE_IMPORT_WARNING": "1"}
    printed = run([*sweep, *varied], tmp_path, **start)
    assert printed.count(": finished") == 2
    files = [tmp_path / "runs" / name / "layers1" / "base.safetensors" for name in varied]
    assert files[0].read_bytes() != files[1].read_bytes()
    written = [file.stat().st_mtime_ns for file in files]
    printed = run([*sweep, *varied], tmp_path, **start)
    assert printed.count(": finished") == 2 and [file.stat().st_mtime_ns for file in files] == written
