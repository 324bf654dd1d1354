"""Benchmarks: cases as data, baselines, one runner: ``python -m benchmarks --help``, docs/benchmarks.md."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("subnets") is None:  # a checkout that is not installed, as on a machine without pip
    sys.path.append(str(Path(__file__).resolve().parent.parent / "python_api"))
