"""A result row, where it came from, and how rows are written."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Row:
    """One contender in one phase of one case. Times are microseconds per call. ``x_<baseline>``: median over the rounds
    of the baseline's time / this one's (above 1: this one is faster). ``gate``: largest error / allowed error (at most
    1 is right; empty: computes something else). ``kept_mb``, ``peak_mb``: memory.py; ``kept_weights``: kept bytes in
    units of the weight's; ``step_bytes``: the most that exist in a training step, per weight. ``ceiling_fraction``:
    floor_us / median_us, floor_us from the copy bandwidth and product rate measured in this run; ``gflop``,
    ``least_mb``: what it was reckoned from. ``state``, on a GPU: "l2-hot" where the working set fits in the L2 cache,
    else "beyond-l2"."""

    suite: str
    case: str
    phase: str
    contender: str
    mode: str
    num_rounds: int
    median_us: float | None
    p20_us: float | None
    p80_us: float | None
    x_eager: float | None = None
    x_compile: float | None = None
    x_compile_max: float | None = None
    x_linear: float | None = None
    x_linear_amp: float | None = None
    x_neurosurgeon: float | None = None
    x_finetune: float | None = None
    x_finetune_amp: float | None = None
    x_unmasked: float | None = None
    x_mm: float | None = None
    over_linear_us: float | None = None
    gate: float | None = None
    kept_mb: float | None = None
    kept_weights: float | None = None
    peak_mb: float | None = None
    step_bytes: float | None = None
    floor_us: float | None = None
    ceiling_fraction: float | None = None
    gflop: float | None = None
    least_mb: float | None = None
    state: str = ""
    note: str = ""


FIELDS = [field.name for field in fields(Row)]
RATIOS = (
    "eager", "compile", "compile_max", "linear", "linear_amp", "neurosurgeon", "finetune", "finetune_amp", "unmasked",
    "mm",
)  # fmt: skip


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _git(*args: str) -> str:
    try:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def cpu_name() -> str:
    """The processor's model name, with family and model where the name alone says little."""
    info: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            info[key.strip()] = value.strip()
    name = info.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in info and not re.search(r"\d", name):
        name += f" family {info['cpu family']} model {info['model']}"
    return re.sub(r"\((R|TM)\)", "", name)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: str, num_threads: int, clock: str, commit: str = "") -> dict[str, Any]:
    """Where the rows come from: device, versions, commit (git's, unless given), threads."""
    import subnet_kernels
    from subnet_kernels.backends.native import is_available

    if not commit and (commit := _git("rev-parse", "--short=12", "HEAD")):
        commit += "+changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
    capability = torch.ops.subnet_native.cpu_capability() if is_available() else "no extension"
    env = {
        "device": device_name(device), "num_threads": num_threads, "clock": clock, "commit": commit or "unknown",
        "torch": torch.__version__, "subnet_kernels": subnet_kernels.__version__,
        "neurosurgeon": _version_of("NeuroSurgeon"), "triton": _version_of("triton"),
        "python": platform.python_version(), "os": platform.platform(terse=True), "native": capability,
        "num_cores": os.cpu_count(), "torch_cpu": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        env |= {"cuda": torch.version.cuda, "num_sms": properties.multi_processor_count,
                "l2_mb": properties.L2_cache_size / 2**20, "memory_gb": properties.total_memory / 2**30}  # fmt: skip
    return env


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def as_records(rows: list[Row], env: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows as flat dicts, each with the device, versions, commit and threads."""
    named = ("device", "num_threads", "clock", "commit", "torch", "subnet_kernels", "neurosurgeon", "triton", "python")
    return [{k: _rounded(v) for k, v in asdict(row).items()} | {k: env[k] for k in named} for row in rows]


def write_csv(path: Path, rows: list[Row], env: dict[str, Any]) -> None:
    records = as_records(rows, env)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]) if records else FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def write_json(path: Path, rows: list[Row], env: dict[str, Any], ceilings: dict[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "environment": env,
        "ceilings": {name: _rounded(value) for name, value in ceilings.items()},
        "rows": [{k: _rounded(v) for k, v in asdict(row).items()} for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _number(value: float | None, spec: str = ".2f") -> str:
    return "" if value is None else format(value, spec)


def table(rows: list[Row], is_wanted: Callable[[Row], bool] = lambda row: row.contender.startswith("ours")) -> str:
    """Short table: one line per row of ours, its ratios to the baselines beside it (columns that hold something)."""
    rows = [row for row in rows if is_wanted(row) or row.step_bytes is not None]  # bytes have no ratios to look at
    ratios = [name for name in RATIOS if any(getattr(row, f"x_{name}") is not None for row in rows)]
    lines = [("case", "phase", "contender", "median us", "p20-p80", *(f"x {name[:11]}" for name in ratios),
              "over lin. us", "kept/W", "peak MB", "step B/w", "ceiling", "state")]  # fmt: skip
    for row in rows:
        phase = row.phase if row.mode == "eager" else f"{row.phase} ({row.mode})"
        lines.append((
            row.case, phase, row.contender, _number(row.median_us, ".1f"),
            f"{_number(row.p20_us, '.1f')}-{_number(row.p80_us, '.1f')}",
            *(_number(getattr(row, f"x_{name}")) for name in ratios), _number(row.over_linear_us, ".1f"),
            _number(row.kept_weights), _number(row.peak_mb, ".1f"),
            _number(row.step_bytes, ".1f"), _number(row.ceiling_fraction), row.state,
        ))  # fmt: skip
    return aligned(lines)


def aligned(lines: list[tuple[str, ...]], num_left: int = 3) -> str:
    """Lines of cells as text in columns: the first ``num_left`` to the left; a column without any entry is left out."""
    columns = [c for c in zip(*lines, strict=True) if any(c[1:])] if len(lines) > 1 else list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    cells = [
        [c.ljust(w) if i < num_left else c.rjust(w) for c in column]
        for i, (column, w) in enumerate(zip(columns, widths, strict=True))
    ]
    return "\n".join("  ".join(line).rstrip() for line in zip(*cells, strict=True))
