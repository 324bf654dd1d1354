"""The command `subnets`: a table of subcommands, each a module that is imported when it is called.

A subcommand's module has `add_arguments(parser)` and `main(args) -> int`. To add one, add its line to COMMANDS.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("subnets.experiments.command", "run an experiment: subnets run arithmetic --preset quick"),
    "report": ("subnets.report.command", "write a run folder's tables, figures and report.html again"),
    "inspect": ("subnets.commands.inspect", "say what is in a subnet file"),
    "diff": ("subnets.commands.diff", "compare two subnet files"),
    "shape-bias": ("subnets.commands.shape_bias", "shape bias of saved classifiers on cue-conflict images"),
    "bench": ("subnets.commands.bench", "time the kernels and layers against their baselines"),
    "doctor": ("subnets.commands.doctor", "say what this machine can run, and why each backend is or isn't used"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status: 0, or 2 with one sentence on stderr for the user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        print(f"subnets: the subcommand must be one of {', '.join(COMMANDS)}, got {name!r}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(
        prog=f"subnets {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    if getattr(module, "PASSES_ARGUMENTS_ON", False) and rest[:1] not in (["-h"], ["--help"]):
        rest = ["--", *rest]
    try:
        args = parser.parse_args(rest)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return module.main(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"subnets {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nsubnets {name}: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def _usage() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name.ljust(width)}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: subnets <subcommand> [options]", "", *lines, "", "subnets <subcommand> --help says more"])


if __name__ == "__main__":
    sys.exit(main())
