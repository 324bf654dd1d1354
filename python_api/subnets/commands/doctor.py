"""Say what this machine can run: versions, devices, and every backend with the reason why it is or isn't used."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

from subnet_kernels.backends import native
from subnet_kernels.backends.base import Call
from subnet_kernels.dispatch import BACKENDS, choose

PACKAGES = ("subnet-kernels", "torch", "triton", "numpy", "safetensors", "transformers", "NeuroSurgeon")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _backend_line(name: str, device: str) -> str:
    call = Call("masked_linear", device, torch.float32, torch.float32, "sigmoid")
    reason = BACKENDS[name].refuse(call)
    return f"  {name:<10} {'usable' if reason is None else 'not used: ' + reason}"


def report() -> str:
    """The report as text."""
    has_gpu = torch.cuda.is_available()
    extension = "loaded" if native.is_available() else str(native.load_error())
    if native.is_available():
        extension += f", CPU code for {torch.ops.subnet_native.cpu_capability()}"
        extension += ", with CUDA kernels" if native.has_cuda_kernels() else ", without CUDA kernels"
    device = "cuda" if has_gpu else "cpu"
    best = choose(Call("masked_linear", device, torch.float32, torch.float32, "sigmoid")).name
    return "\n".join([
        f"python     {platform.python_version()} on {platform.platform()}",
        *[f"{package:<15} {_version(package)}" for package in PACKAGES],
        f"cpu        {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        f"gpu        {torch.cuda.get_device_name() if has_gpu else 'none that torch can use'}",
        f"extension  {extension}",
        f"backends for a linear layer on {device} (first usable in the device's order: {best}):",
        _backend_line("reference", device),
        _backend_line("cpu", "cpu"),
        _backend_line("triton", "cuda"),
        _backend_line("cuda", "cuda"),
    ])  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Print the report; 0."""
    print(report())
    return 0
