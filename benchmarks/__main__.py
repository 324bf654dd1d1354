"""``python -m benchmarks``: time the kernels and layers against the baselines; see docs/benchmarks.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from . import cases, rows
from .ceilings import Ceilings
from .contenders import BASELINES
from .models import MODEL_CASES, MODEL_CONTENDERS, run_model
from .rows import Row
from .runner import MODES, OURS, PHASES, Settings, run_kernel, run_layer, run_memory, run_overhead
from .timing import TimingConfig

SUITES = ("kernels", "layers", "overhead", "memory", "models")
QUICK_TIMING = TimingConfig(num_rounds=11, min_rounds=5, budget_s=2.0)
RESULTS = Path(__file__).resolve().parent / "results"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--suite", choices=[*SUITES, "all"], default="all")
    add("--shapes", nargs="+", help="only cases whose name holds one of these, e.g. 3072x768 m64 bf16 conv")
    add("--threads", type=int, nargs="+", help="CPU threads; several values: one run each (torch's own if not given)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--mode", nargs="+", choices=MODES, default=["eager"], help="graph: replays of CUDA graphs; both may be given")
    add("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    add("--baselines", nargs="+", choices=sorted({*BASELINES, *MODEL_CONTENDERS} - {"ours"}),
        help="all but compile_max, with --quick no compile either; suite models: all its contenders")  # fmt: skip
    add("--rounds", type=int, help="samples per contender (101)")
    add("--budget", type=float, help="seconds per case and phase after which sampling stops (20)")
    add("--clock", choices=["wall", "cpu"], default="wall", help="cpu: this process's time (busy machine, one thread)")
    add("--quick", action="store_true", help="small cases, few rounds, no torch.compile")
    add("--out", type=Path, nargs="+", default=[], help="files to write: .csv, .json, .png (a plot)")
    add("--tune", action="store_true", help="instead: time tiles and backends, write this GPU's table")
    add("--record", action="store_true", help="write benchmarks/results/<device>/<suite>_<n>threads.csv and .json")
    args = parser.parse_args(argv)
    if any(path.suffix not in (".csv", ".json", ".png") for path in args.out):
        parser.error(f"--out takes names that end in .csv, .json or .png, got {' '.join(map(str, args.out))}")
    if args.tune:
        args.device = "cuda"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"{'--tune' if args.tune else '--device cuda'}: this torch sees no GPU")
    if "graph" in args.mode and args.device != "cuda":
        parser.error("--mode graph needs --device cuda")
    if args.threads and min(args.threads) < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    timing = QUICK_TIMING if args.quick else TimingConfig()
    rounds = args.rounds or timing.num_rounds
    timing = replace(
        timing, clock=args.clock, num_rounds=rounds, min_rounds=min(timing.min_rounds, rounds),
        budget_s=args.budget or timing.budget_s,
    )  # fmt: skip
    left_out = ("compile_max", "compile", "ours_compile") if args.quick else ("compile_max",)
    names = args.baselines or [name for name in (*BASELINES, *MODEL_CONTENDERS) if name not in left_out]
    ours = (*OURS, *(("ours_fused", "ours_cached") if args.device == "cuda" else ()))
    models = [name for name in MODEL_CONTENDERS if name in names or name == "ours"]
    return Settings(
        args.device, timing, tuple(name for name in BASELINES if name in names), ours, tuple(models),
        tuple(p for p in PHASES if p in args.phases), tuple(args.mode), say=_say, fail=_say,
    )  # fmt: skip


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_suites(args: argparse.Namespace, settings: Settings, ceilings: Ceilings) -> list[Row]:
    """Every selected case of the selected suites."""
    is_gpu = args.device == "cuda"
    layers = cases.GPU_LINEAR_CASES + cases.GPU_CONV_CASES if is_gpu else cases.LINEAR_CASES + cases.CONV_CASES
    ops = cases.KERNEL_CASES + (cases.SCORE_GRADIENT_CASES if is_gpu else [])
    suites: dict[str, tuple[list, Callable[..., list[Row]]]] = {
        "kernels": (ops, run_kernel),
        "layers": (layers, run_layer),
        "overhead": (cases.OVERHEAD_CASES, run_overhead),
        "memory": (layers, run_memory),
        "models": (MODEL_CASES, run_model),
    }
    wanted = [args.suite] if args.suite != "all" else ["kernels", "layers", "overhead"]  # layers' rows hold memory too
    made: list[Row] = []
    for suite in wanted:
        of_suite, run = suites[suite]
        for case in cases.select(of_suite, args.shapes, args.quick):
            start = time.perf_counter()
            made += run(case, settings, ceilings)
            _say(f"{suite} {case.name}: {time.perf_counter() - start:.1f} s")
    return made


def paths_of(args: argparse.Namespace, env: dict, num_threads: int) -> list[Path]:
    """Files to write for this run; with several thread counts each gets its own name."""
    paths = list(args.out)
    if args.threads and len(args.threads) > 1:
        paths = [path.with_stem(f"{path.stem}_{num_threads}threads") for path in paths]
    if args.record:
        mode = "" if args.mode == ["eager"] else f"_{'_'.join(args.mode)}"
        stem = f"{args.suite}{mode}" + (f"_{num_threads}threads" if args.device == "cpu" else "")
        paths += [RESULTS / rows.slug(env["device"]) / f"{stem}{suffix}" for suffix in (".csv", ".json")]
    return paths


def run_once(args: argparse.Namespace, num_threads: int) -> bool:
    """One run with this number of threads; whether every check of ours passed."""
    torch.set_num_threads(num_threads)
    settings = settings_of(args)
    ceilings = Ceilings(args.device, settings.timing)
    made = run_suites(args, settings, ceilings)
    if not made:
        _say(f"no case of suite {args.suite} has one of {args.shapes} in its name")
        return False
    env = rows.environment(args.device, num_threads, args.clock)
    for path in paths_of(args, env, num_threads):
        if path.suffix == ".csv":
            rows.write_csv(path, made, env)
        elif path.suffix == ".json":
            rows.write_json(path, made, env, ceilings.known())
        else:
            try:
                from .plot import plot_ratios
            except ImportError as error:
                _say(f"left out {path}: {error}")
                continue
            plot_ratios(rows.as_records(made, env), path)
        _say(f"wrote {path}")
    print(rows.table(made))
    print(", ".join(f"{name} {value:.3g}" for name, value in ceilings.known().items()))
    print(", ".join(f"{name} {env[name]}" for name in ("device", "num_threads", "clock", "torch", "commit")))
    wrong = [row for row in made if row.gate is not None and not row.gate <= 1]
    for row in wrong:
        print(f"WRONG: {row.case} {row.contender}: error is {row.gate:.3g} times the allowed one", file=sys.stderr)
    return not any(row.contender.startswith("ours") for row in wrong)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks; 0 if every check of ours passed, else 1."""
    args = parse(argv)
    if args.tune:
        from .tune import run as tune

        return tune(cases.select(cases.GPU_LINEAR_CASES, args.shapes, args.quick), _say)
    before = torch.get_num_threads()
    try:
        return 0 if all([run_once(args, n) for n in args.threads or [before]]) else 1
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    sys.exit(main())
