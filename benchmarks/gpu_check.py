"""Build, check and measure on a GPU machine that has neither network nor pip: ``make gpu-check OUT=folder``.

``python3 -m benchmarks.gpu_check --out folder`` runs the parts (``--help`` lists them, ``--parts`` chooses) in under
ten minutes: it builds the extension in place, checks every backend on the GPU against fp64, measures the machine's
ceilings and times ours beside the baselines; the last lines say which aims were reached. It writes report.txt (the
whole table), results.csv, results.json, environment.json and logs; results worth keeping go to
benchmarks/results/<device>/. Exit code: 0 all checks passed, 1 one failed, 2 there is no GPU. A missed aim is no
failure. ``--dry-run`` runs on the CPU, at tiny sizes, what can run there.

The parts run in a process of their own: one that crashes, hangs or breaks the GPU's context costs itself only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from . import aims, gpu_parts, rows
from .ceilings import Ceilings
from .rows import ROOT, Row

TOTAL_S = 540.0
GRACE_S = 20.0  # after a part's time is up it is stopped
NUM_FAILURES_SHOWN = 8
BROKEN_CONTEXT = 3  # a worker's exit code


class Check:
    """One run: its device, clock, findings and files. What it knows is kept in state.json while it runs."""

    KEPT = ("checks", "failed", "skipped", "lines", "done", "seconds", "part_end")

    def __init__(self, out: Path, device: str, seed: int, end: float, commit: str = "") -> None:
        self.out, self.device, self.seed, self.commit, self.end = out, device, seed, commit, end
        self.rows: list[Row] = []
        self.checks: list[tuple[str, float]] = []
        self.failed: list[str] = []
        self.skipped: list[str] = []
        self.lines: list[str] = []
        self.done: list[str] = []
        self.seconds: dict[str, float] = {}
        self.part_end = end
        self.selected: list[str] = []  # parts of this process
        self.ceilings = Ceilings(device, gpu_parts.TIMING)
        out.mkdir(parents=True, exist_ok=True)

    def left_s(self) -> float:
        """Seconds left to the part that runs."""
        return min(self.end, self.part_end) - time.time()

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.lines.append(text)

    def skip(self, what: str, why: str) -> None:
        self.skipped.append(f"{what}: {why}")
        self.say(f"  skipped {what}: {why}")

    def take(self, checks: Iterable[tuple[str, float]]) -> None:
        """Run checks one by one while time is left; an exception is a failure of the check after the last one named."""
        name, num, worst = "the first check", 0, 0.0
        try:
            for name, ratio in checks:
                num, worst = num + 1, max(worst, ratio)
                self.checks.append((name, ratio))
                if not ratio <= 1:
                    self.fail(f"{name}: error is {ratio:.3g} times the allowed one")
                if self.left_s() < 0:
                    self.skip(f"checks after {name}", "no time left")
                    break
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

    def save(self) -> None:
        state = {name: getattr(self, name) for name in self.KEPT}
        state["rows"] = [asdict(row) for row in self.rows]
        state["copies"] = list(self.ceilings.copies.items())
        state["products"] = [(str(dtype)[6:], rate) for dtype, rate in self.ceilings.products.items()]
        new = self.out / "state.new"
        new.write_text(json.dumps(state))
        new.replace(self.out / "state.json")

    def load(self) -> None:
        path = self.out / "state.json"
        if not path.exists():
            return
        state = json.loads(path.read_text())
        for name in self.KEPT:
            setattr(self, name, state[name])
        self.rows = [Row(**values) for values in state["rows"]]
        self.ceilings.copies = {int(e): rate for e, rate in state["copies"]}
        self.ceilings.products = {getattr(torch, name): rate for name, rate in state["products"]}


# --- running parts ---------------------------------------------------------------------------------------------------


def run_parts(check: Check, names: list[str]) -> None:
    """The named parts, one after another; raises SystemExit(BROKEN_CONTEXT) if one breaks the GPU's context."""
    parts = {part.name: part for part in gpu_parts.PARTS}
    check.selected = names
    for name in names:
        part, start = parts[name], time.time()
        check.part_end = check.end
        left = check.left_s()
        check.say(f"== {name}")
        if left < part.least_s:
            check.skip(name, f"{left:.0f} s left, it needs {part.least_s:.0f}")
        else:
            check.part_end = start + part.most_s
            check.save()
            try:
                part.run(check)
            except Exception as error:  # one broken part must not cost the others' results
                check.fail(f"{name}: {type(error).__name__}: {error}")
        check.seconds[name] = round(time.time() - start, 1)
        check.say(f"  {check.seconds[name]} s")
        is_broken = not _is_context_alive(check.device)
        if is_broken:
            check.fail(f"{name}: it broke the GPU's context; the next part runs in a new process")
        check.done.append(name)
        check.save()
        if is_broken:
            raise SystemExit(BROKEN_CONTEXT)


def _is_context_alive(device: str) -> bool:
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def supervise(check: Check, names: list[str], command: Callable[[list[str]], list[str]]) -> None:
    """Run the parts in processes of ``command(parts)``, which keep state.json: where one dies or hangs, the part it was
    at has failed, and a new process goes on with the next."""
    remaining = list(names)
    while remaining:
        check.part_end = check.end
        check.save()
        process = subprocess.Popen(command(remaining), cwd=ROOT)
        code: int | None = None
        while code is None:
            try:
                code = process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                check.load()
                if check.left_s() < -GRACE_S:
                    process.kill()
                    process.wait()
                    break
        check.load()
        remaining = [name for name in remaining if name not in check.done]
        if remaining and code != BROKEN_CONTEXT:
            how = "took too long and was stopped" if code is None else f"its process ended with exit code {code}"
            check.fail(f"{remaining[0]}: {how}")
            check.done.append(remaining.pop(0))


# --- files and command -----------------------------------------------------------------------------------------------


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "not available"


def write_files(check: Check) -> None:
    """The files; the last lines on the terminal are the verdicts and a short table."""
    env = rows.environment(check.device, torch.get_num_threads(), gpu_parts.TIMING.clock, check.commit)
    wrong = [r for r in check.rows if r.gate is not None and not r.gate <= 1]
    for row in wrong:
        if row.contender.startswith("ours"):
            check.fail(f"{row.case} {row.contender} ({row.mode}): error is {row.gate:.3g} times the allowed one")
    details = {
        "nvidia_smi": _output_of(
            "nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"
        ),
        "nvcc": _output_of("nvcc", "--version"),
        "seed": check.seed, "seconds": check.seconds,
        "skipped": check.skipped, "failed": check.failed, "checks": dict(check.checks),
    }  # fmt: skip
    (check.out / "environment.json").write_text(json.dumps(env | details, indent=1) + "\n")
    rows.write_csv(check.out / "results.csv", check.rows, env)
    rows.write_json(check.out / "results.json", check.rows, env, check.ceilings.known())
    summary = [
        *aims.short_table(check.rows), *aims.verdicts(check.rows),
        ", ".join(f"{name} {value:.4g}" for name, value in check.ceilings.known().items() if "4096mb" in name
                  or "matmul" in name),
        *textwrap.wrap("seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in check.seconds.items()), aims.WIDTH),
        ", ".join(f"{name} {env[name]}" for name in ("device", "torch", "triton", "commit")),
        f"{len(check.checks)} checks, {len(check.failed)} failed, {len(check.skipped)} left out; all in report.txt",
        *(f"FAILED {what}" for what in check.failed[:NUM_FAILURES_SHOWN]),
    ]  # fmt: skip
    full = [*check.lines, "", rows.table(check.rows, lambda row: True), "", *summary]
    full += [f"FAILED {what}" for what in check.failed[NUM_FAILURES_SHOWN:]]
    (check.out / "report.txt").write_text("\n".join(full) + "\n")
    (check.out / "state.json").unlink(missing_ok=True)
    print("\n" + "\n".join(line[: aims.WIDTH] for line in summary), flush=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    names = [part.name for part in gpu_parts.PARTS]
    says = [(part.run.__doc__ or part.name).splitlines()[0] for part in gpu_parts.PARTS]
    described = "\n".join(f"  {name:15}{text}" for name, text in zip(names, says, strict=True))
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_check", description=__doc__.split("\n\n")[0],
        epilog=f"parts, in their order:\n{described}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu-check"), help="folder for the files")
    add("--parts", default="", help="names separated by commas, e.g. build,correctness,linear (all if not given)")
    add("--dry-run", action="store_true", help="run on the CPU, at tiny sizes, what can run there")
    add("--seed", type=int, help="of the random inputs (a fresh one if not given; the report names it)")
    add("--seconds", type=float, default=TOTAL_S, help="time budget (%(default)s)")
    add("--commit", default="", help="the commit of this tree, for the rows, where git can't say it")
    add("--worker-until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.parts = [name for name in args.parts.split(",") if name] or names
    if unknown := sorted(set(args.parts) - set(names)):
        parser.error(f"--parts: {', '.join(unknown)} not among {', '.join(names)}")
    args.parts = sorted(set(args.parts), key=names.index)
    return args


def main(argv: list[str] | None = None) -> int:
    """See the module."""
    args = _arguments(argv)
    if not torch.cuda.is_available() and not args.dry_run:
        print(f"gpu_check: torch {torch.__version__} sees no GPU here, so there is nothing to check; try --dry-run")
        return 2
    seed = args.seed if args.seed is not None else int.from_bytes(os.urandom(3), "little")
    end = args.worker_until or time.time() + args.seconds
    check = Check(args.out, "cpu" if args.dry_run else "cuda", seed, end, args.commit)
    if args.worker_until:
        check.load()
        run_parts(check, args.parts)
        return 0
    (check.out / "state.json").unlink(missing_ok=True)
    for log in ("build.log", "tests.log", "sanitizer.log"):
        (check.out / log).write_text("")
    check.say(f"gpu_check on {rows.device_name(check.device)}, seed {seed}, budget {args.seconds:.0f} s")
    module = [sys.executable, "-m", "benchmarks.gpu_check", *(["--dry-run"] if args.dry_run else [])]
    facts = ["--out", str(args.out.resolve()), "--seed", str(seed), "--worker-until", str(end), "--commit", args.commit]
    supervise(check, args.parts, lambda names: [*module, *facts, "--parts", ",".join(names)])
    write_files(check)
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
