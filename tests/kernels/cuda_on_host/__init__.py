"""The CUDA C++ kernels and their bindings, compiled for the host and run on CPU tensors (see cuda_runtime.h here)."""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

from subnet_kernels.backends.base import Call
from subnet_kernels.backends.cuda import CudaBackend

FOLDER, ROOT = Path(__file__).parent, Path(__file__).parents[3]
OUT = ROOT / "build" / "cuda_on_host"


@functools.cache
def compiler() -> list[str] | None:
    """The C++ compiler's command, if there is one; as setup.py finds it."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(shlex.split(name)[0]):
            return shlex.split(name)
    return None


def build(source: Path, *flags: str) -> Path:
    """The shared library made of a source that may include any of csrc and of this folder; kept as long as all of these
    stay as they are."""
    cxx = compiler()
    assert cxx is not None
    files = sorted(path for folder in (ROOT / "csrc", FOLDER) for path in folder.rglob("*") if path.is_file())
    key = hashlib.sha256(b"".join(p.read_bytes() for p in files if p.suffix != ".pyc") + " ".join(flags).encode())
    target = OUT / f"{source.stem}-{torch.__version__}-{key.hexdigest()[:16]}.so"
    if not target.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}")
        common = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi"]
        includes = [f"-I{FOLDER}", f"-I{ROOT / 'csrc'}"]
        subprocess.run([*cxx, *common, *includes, "-x", "c++", str(source), *flags, "-o", str(fresh)], check=True)
        fresh.replace(target)
    return target


@functools.cache
def load() -> None:
    """Registers torch.ops.subnet_on_host."""
    folder = Path(torch.__file__).parent
    torch.ops.load_library(build(
        FOLDER / "module.cpp", "-DSUBNET_CUDA_ON_HOST", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-isystem{folder / 'include'}", f"-isystem{sysconfig.get_path('include')}", f"-L{folder / 'lib'}",
        "-Wl,--no-as-needed", "-ltorch",
    ))  # fmt: skip


class OnHost(CudaBackend):
    """The backend ``cuda`` over CPU tensors."""

    def __init__(self) -> None:
        super().__init__()
        load()
        self.ops = torch.ops.subnet_on_host

    def refuse(self, call: Call) -> str | None:
        return None if call.is_same_shape and call.plan != "fused" else "not served"
