"""Run folders: one config per folder, refused if another one comes, and a note of the machine."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from subnets.training.files import read_json, write_json


def open_run_folder(folder: Path, experiment: str, config: dict[str, Any]) -> None:
    """Makes `folder` the run folder of this config, or checks that it is; writes config.json and environment.json.

    Raises ValueError, naming the keys that differ, if the folder was made with another config, and if it holds files
    but no config.
    """
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"open_run_folder: {folder} must be a folder, got a file; choose another with --out")
    if path.exists():
        _check_same(folder, read_config(folder, experiment), config)
    elif folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise ValueError(f"open_run_folder: {folder} must be empty or a run folder, got files but no config.json")
    else:
        write_json(path, {"experiment": experiment, **config})
    machine = folder / "environment.json"
    if not machine.exists():
        write_json(machine, environment())


def read_config(folder: Path, experiment: str) -> dict[str, Any]:
    """The config that the folder was made with; ValueError if it is not a run folder of `experiment`."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"read_config: {folder} must be a run folder with a config.json, got none")
    config = read_json(path)
    found = config.pop("experiment", None) if isinstance(config, dict) else None
    if found != experiment:
        raise ValueError(f"read_config: {folder} must be a run folder of {experiment!r}, got experiment {found!r}")
    return config


def _check_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if keys:
        shown = "; ".join(f"{key}: {old.get(key)} there, {new.get(key)} now" for key in keys)
        raise ValueError(
            f"open_run_folder: {folder} was made with another config ({shown}); choose another folder with --out"
        )


def environment() -> dict[str, Any]:
    """Versions, threads and processor: what "the same numbers" rests on."""
    import numpy
    import torch

    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
    }


def _cpu_name() -> str:
    """The processor's name from /proc/cpuinfo, or what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
