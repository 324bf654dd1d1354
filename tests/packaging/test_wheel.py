"""What a user gets: a wheel that works in a fresh environment, and an install without a compiler that still works.

The fresh environments are real virtual environments without this project on their path. PyTorch is not downloaded
again: links lead to the running environment's PyTorch and to what it imports, and to nothing else there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt")
pytestmark = pytest.mark.slow

SMOKE = """
import sys, torch, subnet_kernels
assert subnet_kernels.__file__.startswith(sys.prefix), subnet_kernels.__file__
weight, scores = torch.randn(33, 17, dtype=torch.float64).float(), torch.randn(33, 17)
w_eff, penalty = subnet_kernels.effective_weight(weight, scores, 4.0)
mask = torch.sigmoid(4.0 * scores.double())
torch.testing.assert_close(w_eff.double(), weight * mask, rtol=1e-6, atol=1e-7)
torch.testing.assert_close(penalty.double(), mask.sum(), rtol=1e-6, atol=0)
x = torch.randn(5, 17, requires_grad=True)
scores.requires_grad_()
out, penalty = subnet_kernels.masked_linear(x, weight, scores, 4.0)
(out.sum() + penalty).backward()
assert scores.grad.shape == scores.shape and x.grad.shape == x.shape
"""
WITH_EXTENSION = """
import subnet_kernels._C
assert torch.ops.subnet_native.cpu_capability() in ("portable", "avx2", "avx512")
"""
WITHOUT_EXTENSION = """
try:
    import subnet_kernels._C
except ImportError:
    pass
else:
    raise AssertionError("the extension is there")
"""


def run(*command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """The output of a command that must succeed; on failure its output is in the message."""
    done = subprocess.run([str(part) for part in command], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} gave {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def copy_sources(to: Path) -> Path:
    """What a checkout holds and a build needs, without anything built before."""
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, to / name)
    for folder in ("csrc", "subnet_kernels", "python_api"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    return to


def build_wheel(sources: Path, out: Path, **variables: str) -> tuple[Path, str]:
    """(wheel, pip's output) of the build that `make` does: in the running environment, which has PyTorch."""
    # without the products on CUTLASS: they cost minutes and make no difference here
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "CUTLASS_HOME": "none", **variables}
    env = {name: value for name, value in env.items() if value}
    options = ("-v", "--no-build-isolation", "--no-deps", "--no-index")
    log = run(sys.executable, "-m", "pip", "wheel", *options, "-w", out, ".", env=env, cwd=sources)
    (wheel,) = out.glob("*.whl")
    return wheel, log


def install(wheel: Path, folder: Path) -> Path:
    """The python of a fresh environment that holds the wheel and sees PyTorch; nothing of this project."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    with zipfile.ZipFile(wheel) as archive:  # what pip does with a wheel, and it needs no pip in there
        archive.extractall(site)
    # Only PyTorch and what PyTorch imports: links, so that nothing else of the running environment is visible.
    torch_home = Path(torch.__file__).parents[1]
    needed = ("torch", "torchgen", "functorch", "typing_extensions.py", "sympy", "mpmath", "networkx", "jinja2",
              "markupsafe", "fsspec", "filelock", "numpy", "numpy.libs")  # fmt: skip
    for name in needed:
        if (torch_home / name).exists():
            os.symlink(torch_home / name, site / name)
    return python


def clean_env() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def test_a_wheel_works_in_an_environment_that_holds_only_torch(tmp_path):
    (tmp_path / "sources").mkdir()
    wheel, _ = build_wheel(copy_sources(tmp_path / "sources"), tmp_path / "wheel")
    names = zipfile.ZipFile(wheel).namelist()
    assert "cp310-abi3" in wheel.name and "subnet_kernels/_C.abi3.so" in names
    for path in (ROOT / "python_api" / "subnets").rglob("*"):
        if path.suffix in (".json", ".csv", ".html", ".css"):
            assert path.relative_to(ROOT / "python_api").as_posix() in names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/", "build/"))]
    python = install(wheel, tmp_path / "venv")
    run(python, "-c", SMOKE + WITH_EXTENSION, env=clean_env(), cwd=tmp_path)


@pytest.mark.parametrize("how", ["no compiler on PATH", "a compiler that fails"])
def test_without_a_compiler_the_install_succeeds_says_so_and_runs_on_the_reference(tmp_path, how):
    (tmp_path / "sources").mkdir()
    (tmp_path / "bin").mkdir()
    variables = {"CXX": "false"} if how == "a compiler that fails" else {"CXX": "", "PATH": str(tmp_path / "bin")}
    wheel, log = build_wheel(copy_sources(tmp_path / "sources"), tmp_path / "wheel", **variables)
    assert "subnet-kernels: built without the extension, because" in log
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    python = install(wheel, tmp_path / "venv")
    run(python, "-c", SMOKE + WITHOUT_EXTENSION, env=clean_env(), cwd=tmp_path)
