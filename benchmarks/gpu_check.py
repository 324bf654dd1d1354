"""Build, check and measure on a GPU machine that has neither network nor pip: ``make gpu-check OUT=folder``.

``python3 -m benchmarks.gpu_check --out folder`` builds the extension in place, checks the reference backend, the CUDA
kernel of effective weights and the Triton backend on the GPU against fp64, runs the tests marked ``gpu`` and
compute-sanitizer where they are there, and measures the machine's ceilings, the baselines and the kernel's bandwidth,
in under ten minutes. It writes report.txt, results.csv, results.json, environment.json, build.log and tests.log;
results worth keeping go to benchmarks/results/<device>/. Exit code: 0 all checks passed, 1 one failed, 2 there is no
GPU. ``--dry-run`` runs on the CPU what can run there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from . import cases, gpu_correctness, rows
from .ceilings import Ceilings
from .rows import ROOT, Row
from .runner import Settings, run_kernel, run_layer
from .timing import TimingConfig

TOTAL_S = 540.0
TIMING = TimingConfig(num_rounds=31, min_rounds=11, budget_s=2.0)


class Check:
    """One run: its device, clock, findings and files."""

    def __init__(self, out: Path, device: str, seed: int, total_s: float, commit: str) -> None:
        self.out, self.device, self.seed, self.commit = out, device, seed, commit
        self.start, self.total_s = time.perf_counter(), total_s
        self.rows: list[Row] = []
        self.checks: list[tuple[str, float]] = []
        self.failed: list[str] = []
        self.skipped: list[str] = []
        self.lines: list[str] = []
        self.ceilings = Ceilings(device, TIMING)
        out.mkdir(parents=True, exist_ok=True)

    def left_s(self) -> float:
        return self.total_s - (time.perf_counter() - self.start)

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.lines.append(text)

    def skip(self, what: str, why: str) -> None:
        self.skipped.append(f"{what}: {why}")
        self.say(f"  skipped {what}: {why}")

    def take(self, checks: Iterable[tuple[str, float]]) -> None:
        """Run checks one by one; an exception is a failure of the check after the last one named."""
        name, num, worst = "the first check", 0, 0.0
        try:
            for name, ratio in checks:
                num, worst = num + 1, max(worst, ratio)
                self.checks.append((name, ratio))
                if not ratio <= 1:
                    self.fail(f"{name}: error is {ratio:.3g} times the allowed one")
        except Exception as error:  # whatever it is, the rest must still run
            self.fail(f"after {name}: {type(error).__name__}: {error}")
        self.say(f"  {num} checks, worst error {worst:.3g} of the allowed one")

    def fail(self, what: str) -> None:
        self.failed.append(what)
        self.say(f"  FAILED {what}")

    def run(self, command: list[str], log: str, timeout_s: float) -> int | None:
        """Run a command, append its output to a log file; its exit code, or None if it took too long."""
        with (self.out / log).open("a") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            try:
                done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=timeout_s)
                return done.returncode
            except subprocess.TimeoutExpired:
                file.write(f"stopped after {timeout_s:.0f} s\n")
                return None


# --- sections --------------------------------------------------------------------------------------------------------


def build(check: Check) -> None:
    """The extension, in place."""
    if check.device == "cpu":
        (check.out / "build.log").write_text("dry run: nothing is built\n")
        return check.skip("build", "dry run")
    code = check.run([sys.executable, "setup.py", "build_ext", "--inplace"], "build.log", 240)
    if code != 0:
        check.fail(f"build: {'took over 240 s' if code is None else f'exit code {code}'}, see build.log")
    from subnet_kernels.backends.native import has_cuda_kernels, load_error

    if load_error() is not None:
        check.fail(f"build: {load_error()}")
    elif not has_cuda_kernels():
        check.fail("build: the extension has no CUDA kernels (was nvcc found? see build.log)")


def check_reference(check: Check) -> None:
    """Every op of the reference backend against fp64."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 is meant
        check.take(gpu_correctness.reference_checks(check.device, check.seed))


def check_kernel(check: Check) -> None:
    """effective_weights of the extension against fp64."""
    backend = "cuda" if check.device == "cuda" else "cpu"
    check.take(gpu_correctness.effective_weights_checks(backend, check.device, check.seed))
    if check.device == "cpu":
        return check.skip("graph replay and refusals of the cuda backend", "dry run")
    check.take(gpu_correctness.refusal_check(check.device))
    check.take(gpu_correctness.graph_check("cuda", check.device, check.seed))


def check_triton(check: Check) -> None:
    """The Triton backend against fp64: layers, then effective weights of many tensors."""
    if check.device == "cpu":
        return check.skip("triton", "dry run")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check.take(gpu_correctness.triton_checks(check.device, check.seed))
    check.take(gpu_correctness.effective_weights_checks("triton", check.device, check.seed))
    check.take(gpu_correctness.graph_check("triton", check.device, check.seed))


def run_sanitizer(check: Check) -> None:
    """compute-sanitizer memcheck over the kernel's checks."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or check.device == "cpu":
        return check.skip("compute-sanitizer", "dry run" if check.device == "cpu" else "it is not installed")
    script = [sys.executable, "-m", "benchmarks.gpu_check", "--sanitizer-script", "--seed", str(check.seed)]
    code = check.run([tool, "--tool", "memcheck", "--error-exitcode", "9", *script], "tests.log", 120)
    log = (check.out / "tests.log").read_text()
    if code is None:
        check.skip("compute-sanitizer", "it took over 120 s")
    elif "Device not supported" in log:
        check.skip("compute-sanitizer", "it does not support this device")
    elif code != 0:
        check.fail(f"compute-sanitizer memcheck: exit code {code}, see tests.log")
    else:
        check.say("  memcheck found nothing")


def run_tests(check: Check) -> None:
    """The tests marked gpu."""
    from importlib.util import find_spec

    if find_spec("pytest") is None:
        return check.skip("tests", "pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/kernels"]
    code = check.run(command, "tests.log", 120)
    if code == 5:
        check.skip("tests", "none is marked gpu")
    elif code is None:
        check.skip("tests", "they took over 120 s, see tests.log")
    elif code != 0:
        check.fail(f"tests: pytest's exit code {code}, see tests.log")
    else:
        check.say("  passed")


def measure_ceilings(check: Check) -> None:
    """Copy bandwidth (large, beyond the cache; and of a layer's size) and product rates."""
    for num_bytes in (1 << 32 if check.device == "cuda" else 1 << 27, 1 << 24):
        check.ceilings.bytes_per_s(num_bytes)
    for dtype in (torch.bfloat16, torch.float32):
        check.ceilings.flops_per_s(dtype)
    for name, value in check.ceilings.known().items():
        check.say(f"  {name} {value:.4g}")


def _time_each(check: Check, name: str, least_s: float, jobs: list[tuple[Any, Callable[[], list[Row]]]]) -> None:
    """Run the jobs while time is left; what does not run is said, what raises is said and the rest goes on."""
    for case, job in jobs:
        if check.left_s() < least_s:
            check.skip(f"{name} {case.name}", "no time left")
            continue
        try:
            check.rows += job()
        except Exception as error:
            check.fail(f"{name} {case.name}: {type(error).__name__}: {error}")


def _settings(check: Check, mode: str) -> Settings:
    phases = ("forward", "forward_backward", "step") if mode == "eager" else ("forward", "forward_backward")
    baselines = ("eager", "compile", "linear") if check.device == "cuda" else ("eager", "linear")
    return Settings(check.device, TIMING, baselines, phases, mode, mode == "eager", check.say)


def _modes(check: Check) -> tuple[str, ...]:
    return ("eager", "graph") if check.device == "cuda" else ("eager",)


def measure_kernel(check: Check) -> None:
    """effective_weights and effective_weight alone against eager and compiled, launched and as CUDA graphs."""
    chosen = [c for c in cases.KERNEL_CASES if c.op.startswith("effective_weight")]
    if check.device == "cpu":
        chosen = cases.select(chosen, None, quick=True)
    for mode in _modes(check):
        settings = _settings(check, mode)
        jobs = [(c, lambda c=c, s=settings: run_kernel(c, s, check.ceilings)) for c in chosen]
        _time_each(check, f"kernel ({mode})", 20, jobs)


def measure_baselines(check: Check) -> None:
    """Layers at the named shapes: eager, compiled, nn.Linear and ours, launched and as CUDA graphs."""
    chosen = cases.GPU_LINEAR_CASES
    if check.device == "cpu":
        chosen = cases.select(cases.LINEAR_CASES, ["512x128_m256"], quick=True)
    for mode in _modes(check):
        settings = _settings(check, mode)
        jobs = [(c, lambda c=c, s=settings: run_layer(c, s, check.ceilings)) for c in chosen]
        _time_each(check, f"layer ({mode})", 30, jobs)


SECTIONS: tuple[tuple[str, Callable[[Check], None], float], ...] = (  # name, what, seconds it needs at least
    ("build", build, 0),
    ("reference backend", check_reference, 20),
    ("kernel effective_weights", check_kernel, 20),
    ("triton backend", check_triton, 60),
    ("ceilings", measure_ceilings, 20),
    ("kernel speed", measure_kernel, 30),
    ("compute-sanitizer", run_sanitizer, 130),
    ("tests", run_tests, 130),
    ("layer speed", measure_baselines, 30),
)


# --- files and command -----------------------------------------------------------------------------------------------


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "not available"


def write_files(check: Check) -> None:
    env = rows.environment(check.device, torch.get_num_threads(), TIMING.clock, check.commit)
    details = {
        "nvidia_smi": _output_of(
            "nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"
        ),
        "nvcc": _output_of("nvcc", "--version"),
        "seed": check.seed, "seconds": round(time.perf_counter() - check.start, 1),
        "skipped": check.skipped, "failed": check.failed, "checks": dict(check.checks),
    }  # fmt: skip
    (check.out / "environment.json").write_text(json.dumps(env | details, indent=1) + "\n")
    rows.write_csv(check.out / "results.csv", check.rows, env)
    rows.write_json(check.out / "results.json", check.rows, env, check.ceilings.known())
    wrong = [r for r in check.rows if r.gate is not None and not r.gate <= 1]
    for row in wrong:
        if row.contender.startswith("ours"):
            check.fail(f"{row.case} {row.contender}: error is {row.gate:.3g} times the allowed one")
    check.say("")
    check.say(rows.table(check.rows))
    check.say(", ".join(f"{name} {value:.4g}" for name, value in check.ceilings.known().items()))
    check.say(", ".join(f"{name} {env[name]}" for name in ("device", "torch", "triton", "commit")))
    check.say(f"{len(check.checks)} checks, {len(check.failed)} failed, {len(check.skipped)} parts skipped")
    for what in check.failed:
        check.say(f"FAILED {what}")
    (check.out / "report.txt").write_text("\n".join(check.lines) + "\n")


def sanitizer_script(seed: int) -> int:
    """What runs under compute-sanitizer: the kernels' checks, small."""
    checks = [
        *gpu_correctness.effective_weights_checks("cuda", "cuda", seed),
        *gpu_correctness.triton_checks("cuda", seed, is_large=False, dtypes=("bf16",)),
    ]
    worst = max(ratio for _, ratio in checks)
    print(f"worst error {worst:.3g} of the allowed one")
    return 0 if worst <= 1 else 1


def main(argv: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder for the six files")
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU what can run there")
    parser.add_argument("--seed", type=int, help="of the random inputs (a fresh one if not given; the report names it)")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="time budget (%(default)s)")
    parser.add_argument("--commit", default="", help="the commit of this tree, for the rows, where git can't say it")
    parser.add_argument("--sanitizer-script", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not args.dry_run:
        print(f"gpu_check: torch {torch.__version__} sees no GPU here, so there is nothing to check; try --dry-run")
        return 2
    seed = args.seed if args.seed is not None else int.from_bytes(os.urandom(3), "little")
    if args.sanitizer_script:
        return sanitizer_script(seed)
    check = Check(args.out, "cpu" if args.dry_run else "cuda", seed, args.seconds, args.commit)
    for log in ("build.log", "tests.log"):
        (check.out / log).write_text("")
    check.say(f"gpu_check on {rows.device_name(check.device)}, seed {seed}, budget {args.seconds:.0f} s")
    for name, section, least_s in SECTIONS:
        if check.left_s() < least_s:
            check.skip(name, f"{check.left_s():.0f} s left, it needs {least_s:.0f}")
            continue
        before = time.perf_counter()
        check.say(f"== {name}")
        try:
            section(check)
        except Exception as error:  # one broken section must not cost the others' results
            check.fail(f"{name}: {type(error).__name__}: {error}")
        check.say(f"  {time.perf_counter() - before:.1f} s")
    write_files(check)
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
